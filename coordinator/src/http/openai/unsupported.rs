//! Fields that we know and cannot honour: they are refused, for an answer that silently is not what
//! was asked for is worse than none.

use super::Api;
use crate::http::body;
use crate::http::error::ApiError;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// Refused unless null, false, or empty, but for those that an API has.
const FIELDS: &[&str] = &[
    "audio",
    "bad_words",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "function_call",
    "functions",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "kv_transfer_params",
    "logits_processors",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "prediction",
    "prompt_embeds",
    "repetition_detection",
    "return_tokens_as_token_ids",
    "store",
    "structural_tag",
    "structured_outputs",
    "suffix",
    "thinking_token_budget",
    "use_beam_search",
    "vllm_xargs",
    "web_search_options",
];

/// Refused unless null or the one value that asks for nothing.
const NEUTRAL: &[(&str, &str)] = &[
    ("reasoning_effort", "none"),
    ("function_call", "none"),
    ("verbosity", "medium"),
];

/// Refused only if false: what we do is what true asks for.
const ALWAYS: &[&str] = &["include_reasoning", "spaces_between_special_tokens"];

/// Refuses what the body asks for and the API lacks.
pub(super) fn refuse(api: Api, body: &[u8]) -> Result<(), ApiError> {
    let asked: Asked = body::parse(body)?;
    let is_lacking = |name: &&&str| api != Api::Chat || **name != "chat_template_kwargs";
    if let Some(name) = asked.fields.iter().find(is_lacking) {
        return Err(ApiError::parameter(
            *name,
            format!("{name} is not supported by this server yet. Leave it out."),
        ));
    }
    if asked.tools && asked.tool_choice.as_deref() != Some("none") {
        return Err(ApiError::parameter(
            "tools",
            "Tool calling is not supported by this server yet. Leave `tools` out, or send \
             `tool_choice`: \"none\".",
        ));
    }
    if asked
        .tool_choice
        .is_some_and(|choice| choice != "none" && choice != "auto")
    {
        return Err(ApiError::parameter(
            "tool_choice",
            "Tool calling is not supported by this server yet: tool_choice must be \"none\" or \
             \"auto\".",
        ));
    }
    if asked.response_format.is_some_and(|format| format != "text") {
        return Err(ApiError::parameter(
            "response_format",
            "Structured output is not supported by this server yet: response_format must be \
             {\"type\": \"text\"}.",
        ));
    }
    if asked.modalities.iter().any(|modality| modality != "text") {
        return Err(ApiError::parameter(
            "modalities",
            "This server produces text only: modalities must be [\"text\"].",
        ));
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Asked {
    fields: Vec<&'static str>,
    tools: bool,
    tool_choice: Option<String>,
    response_format: Option<String>,
    modalities: Vec<String>,
}

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Asked;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Asked, A::Error> {
                let mut asked = Asked::default();
                while let Some(key) = map.next_key::<String>()? {
                    if let Some(neutral) = NEUTRAL.iter().find(|(name, _)| *name == key) {
                        let value: Presence = map.next_value()?;
                        if value.given && value.text.as_deref() != Some(neutral.1) {
                            asked.fields.push(neutral.0);
                        }
                    } else if let Some(name) = FIELDS.iter().find(|name| **name == key) {
                        if map.next_value::<Presence>()?.given {
                            asked.fields.push(name);
                        }
                    } else if let Some(name) = ALWAYS.iter().find(|name| **name == key) {
                        if map.next_value::<Presence>()?.is_false {
                            asked.fields.push(name);
                        }
                    } else {
                        match key.as_str() {
                            // Of beams, which we have none of: 1 is every server's default.
                            "length_penalty" => {
                                let value: Presence = map.next_value()?;
                                let is_one =
                                    value.number.is_some_and(|it| it.total_cmp(&1.0).is_eq());
                                if value.given && !is_one {
                                    asked.fields.push("length_penalty");
                                }
                            }
                            "tools" => asked.tools = map.next_value::<Presence>()?.given,
                            "tool_choice" => {
                                asked.tool_choice = map.next_value::<Presence>()?.word();
                            }
                            "response_format" => {
                                asked.response_format = map.next_value::<Presence>()?.word();
                            }
                            "modalities" => {
                                asked.modalities = map.next_value::<Presence>()?.list;
                            }
                            _ => {
                                map.next_value::<IgnoredAny>()?;
                            }
                        }
                    }
                }
                Ok(asked)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Whether a value asks for anything, with as much of it as the rules above look at.
#[derive(Debug, Default)]
struct Presence {
    given: bool,
    is_false: bool,
    /// The value, if a number; large ones are rounded.
    number: Option<f64>,
    /// The value, if a text.
    text: Option<String>,
    /// The value's `type`, if an object.
    kind: Option<String>,
    /// The value's texts, if a list.
    list: Vec<String>,
}

impl Presence {
    fn number(number: f64) -> Self {
        Self {
            given: true,
            number: Some(number),
            ..Self::default()
        }
    }

    /// What a value of the form `"auto"` or `{"type": "function", …}` is about.
    fn word(self) -> Option<String> {
        self.given
            .then(|| self.text.or(self.kind).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for Presence {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PresenceVisitor)
    }
}

struct PresenceVisitor;

impl<'de> Visitor<'de> for PresenceVisitor {
    type Value = Presence;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Presence, E> {
        Ok(Presence::default())
    }

    fn visit_bool<E>(self, value: bool) -> Result<Presence, E> {
        Ok(Presence {
            given: value,
            is_false: !value,
            ..Presence::default()
        })
    }

    fn visit_i64<E>(self, value: i64) -> Result<Presence, E> {
        Ok(Presence::number(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Presence, E> {
        Ok(Presence::number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Presence, E> {
        Ok(Presence::number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Presence, E> {
        Ok(Presence {
            given: !value.is_empty(),
            // Only short words mean anything to us.
            text: (value.len() <= 64).then(|| value.to_owned()),
            ..Presence::default()
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Presence, A::Error> {
        let mut presence = Presence::default();
        while let Some(entry) = list.next_element::<Shallow>()? {
            presence.given = true;
            if presence.list.len() < 16 {
                presence.list.push(entry.0);
            }
        }
        Ok(presence)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Presence, A::Error> {
        let mut presence = Presence::default();
        while let Some(key) = map.next_key::<String>()? {
            presence.given = true;
            if key == "type" {
                presence.kind = Some(map.next_value::<Shallow>()?.0);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(presence)
    }
}

/// A short text; anything else is read past and counts as an empty one.
struct Shallow(String);

impl<'de> Deserialize<'de> for Shallow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Shallow;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_str<E>(self, value: &str) -> Result<Shallow, E> {
                let short = value.len() <= 64;
                Ok(Shallow(if short {
                    value.to_owned()
                } else {
                    String::new()
                }))
            }

            fn visit_unit<E>(self) -> Result<Shallow, E> {
                Ok(Shallow(String::new()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Shallow, E> {
                Ok(Shallow(String::new()))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Shallow, E> {
                Ok(Shallow(String::new()))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Shallow, E> {
                Ok(Shallow(String::new()))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Shallow, E> {
                Ok(Shallow(String::new()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shallow, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Shallow(String::new()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shallow, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Shallow(String::new()))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asks_for_nothing_passes() {
        for body in [
            "{}",
            r#"{"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}"#,
            r#"{"tools": [{"type": "function"}], "tool_choice": "none"}"#,
            r#"{"suffix": "", "guided_json": null, "use_beam_search": false, "bad_words": []}"#,
            r#"{"length_penalty": 1, "verbosity": "medium", "store": false, "prediction": null}"#,
            r#"{"include_reasoning": true, "spaces_between_special_tokens": null}"#,
            r#"{"modalities": ["text"], "reasoning_effort": "none", "function_call": "none"}"#,
            r#"{"something": {"new": [1, 2]}, "user": "x", "chat_template_kwargs": {}}"#,
        ] {
            assert_eq!(refuse(Api::Completions, body.as_bytes()), Ok(()), "{body}");
        }
    }

    #[test]
    fn what_we_cannot_do_is_refused_by_name() {
        for (body, param) in [
            (r#"{"tools": [{"type": "function"}]}"#, "tools"),
            (r#"{"tool_choice": "required"}"#, "tool_choice"),
            (
                r#"{"tool_choice": {"type": "function", "function": {"name": "f"}}}"#,
                "tool_choice",
            ),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {}}}"#,
                "response_format",
            ),
            (r#"{"response_format": "json"}"#, "response_format"),
            (
                r#"{"structured_outputs": {"regex": "a*"}}"#,
                "structured_outputs",
            ),
            (r#"{"guided_regex": "(a+)+$"}"#, "guided_regex"),
            (r#"{"chat_template": "{{ 1 }}"}"#, "chat_template"),
            (
                r#"{"chat_template_kwargs": {"tokenize": true}}"#,
                "chat_template_kwargs",
            ),
            (r#"{"modalities": ["text", "audio"]}"#, "modalities"),
            (r#"{"suffix": "end"}"#, "suffix"),
            (r#"{"reasoning_effort": "high"}"#, "reasoning_effort"),
            (r#"{"verbosity": "low"}"#, "verbosity"),
            (r#"{"length_penalty": 0.5}"#, "length_penalty"),
            (r#"{"length_penalty": "x"}"#, "length_penalty"),
            (r#"{"store": true}"#, "store"),
            (
                r#"{"prediction": {"type": "content", "content": "x"}}"#,
                "prediction",
            ),
            (r#"{"include_reasoning": false}"#, "include_reasoning"),
            (
                r#"{"spaces_between_special_tokens": false}"#,
                "spaces_between_special_tokens",
            ),
        ] {
            let error = refuse(Api::Completions, body.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert_eq!(error.status.as_u16(), 400);
        }
        assert!(refuse(Api::Completions, b"[]").is_err());
        let variables = br#"{"chat_template_kwargs": {"enable_thinking": false}}"#;
        assert!(refuse(Api::Completions, variables).is_err());
        assert_eq!(refuse(Api::Chat, variables), Ok(()));
    }
}
