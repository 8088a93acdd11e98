//! One message of a conversation as clients send it, and as templates see it.

use crate::http::body::Object;
use crate::http::limits::MAX_PARTS;
use crate::text::template::Message;
use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// Roles that conversations have.
const ROLES: [&str; 6] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
];

/// A message, checked and brought into the form templates know.
#[derive(Debug)]
pub struct ChatMessage(pub Message);

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Raw {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    tool_call_id: Option<String>,
    tool_calls: Option<Value>,
    reasoning_content: Option<String>,
}

impl<'de> Deserialize<'de> for ChatMessage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Object(raw) = Object::<Raw>::deserialize(deserializer)?;
        if !ROLES.contains(&raw.role.as_str()) {
            return Err(D::Error::custom(format!(
                "role must be one of {}, got {:.50?}",
                ROLES.join(", "),
                raw.role
            )));
        }
        if raw.content.is_none() && raw.role != "assistant" {
            return Err(D::Error::custom("content is missing"));
        }
        let mut extra = Map::new();
        for (key, value) in [
            ("name", raw.name),
            ("tool_call_id", raw.tool_call_id),
            ("reasoning_content", raw.reasoning_content),
        ] {
            extra.extend(value.map(|value| (key.to_owned(), Value::from(value))));
        }
        if let Some(mut calls) = raw.tool_calls.filter(|calls| !calls.is_null()) {
            read_arguments(&mut calls);
            extra.insert("tool_calls".to_owned(), calls);
        }
        // Templates were written before OpenAI renamed the role.
        let role = if raw.role == "developer" {
            "system".to_owned()
        } else {
            raw.role
        };
        Ok(Self(Message {
            role,
            content: raw.content.map(|it| it.0),
            extra,
        }))
    }
}

/// Arguments are sent as a text of JSON, and templates expect what it says.
fn read_arguments(calls: &mut Value) {
    for call in calls.as_array_mut().into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            continue;
        };
        let read = arguments
            .as_str()
            .and_then(|text| serde_json::from_str(text).ok());
        if let Some(read) = read {
            *arguments = read;
        }
    }
}

/// `content`: a text, or a list of text parts, which stand on lines of their own.
#[derive(Debug)]
struct Content(String);

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrParts;
        impl<'de> Visitor<'de> for TextOrParts {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of text parts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut text = String::new();
                let mut count = 0;
                while let Some(part) = parts.next_element()? {
                    let Object(Part { kind, text: words }) = part;
                    let kind = kind.as_deref().unwrap_or("text");
                    let (true, Some(words)) = (kind == "text", words) else {
                        return Err(A::Error::custom(format!(
                            "a content part of type {kind:.50?} is not supported; this server \
                             takes text only"
                        )));
                    };
                    if count > 0 {
                        text.push('\n');
                    }
                    text += &words;
                    count += 1;
                    if count > MAX_PARTS {
                        return Err(A::Error::custom(format!(
                            "at most {MAX_PARTS} parts are allowed"
                        )));
                    }
                }
                Ok(Content(text))
            }
        }
        deserializer.deserialize_any(TextOrParts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(json: Value) -> Result<Message, serde_json::Error> {
        serde_json::from_value::<ChatMessage>(json).map(|it| it.0)
    }

    #[test]
    fn contents_come_as_text_or_parts() {
        let plain = read(json!({"role": "user", "content": "hi", "name": "Ann", "x": 1})).unwrap();
        assert_eq!(plain.content.as_deref(), Some("hi"));
        assert_eq!(plain.extra["name"], "Ann");
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let parts = read(json!({"role": "developer", "content": parts})).unwrap();
        assert_eq!(
            (parts.role.as_str(), parts.content.as_deref()),
            ("system", Some("a\nb"))
        );
        let call = json!([{"function": {"name": "f", "arguments": "{\"x\": 1}"}}]);
        let call = read(json!({"role": "assistant", "content": null, "tool_calls": call})).unwrap();
        assert_eq!(call.content, None);
        assert_eq!(call.extra["tool_calls"][0]["function"]["arguments"]["x"], 1);
    }

    #[test]
    fn what_is_no_text_is_refused() {
        for wrong in [
            json!({"role": "narrator", "content": "x"}),
            json!({"content": "x"}),
            json!({"role": "user"}),
            json!({"role": "user", "content": 1}),
            json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}),
            json!({"role": "user", "content": [{"type": "text"}]}),
            json!({"role": "user", "content": vec![json!({"type": "text", "text": ""}); MAX_PARTS + 1]}),
        ] {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
