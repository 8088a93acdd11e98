//! `chat_template_kwargs`: what a request tells the model's chat template beyond the conversation.
//!
//! Only values go in; the template is the model's. Invariant: no more than a bounded part of a body becomes values, and
//! none has a name that templates know already.

use crate::http::error::ApiError;
use crate::http::limits::MAX_TEMPLATE_KWARGS_BYTES;
use crate::text::template::ChatTemplate;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// Variables of a template, by name.
#[derive(Debug, Default)]
pub(super) struct Variables(Map<String, Value>);

impl Variables {
    /// What `template` may be given.
    ///
    /// # Errors
    /// 400 for a name that means something to it already.
    pub(super) fn checked(self, template: &ChatTemplate) -> Result<Map<String, Value>, ApiError> {
        match self.0.keys().find(|name| template.is_taken(name)) {
            None => Ok(self.0),
            Some(name) => Err(ApiError::parameter(
                "chat_template_kwargs",
                format!(
                    "chat_template_kwargs must not set `{name}`: chat templates know it already. Leave it out."
                ),
            )),
        }
    }
}

impl<'de> Deserialize<'de> for Variables {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Variables;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Variables, A::Error> {
                let mut left = MAX_TEMPLATE_KWARGS_BYTES;
                Room(&mut left).object(map).map(Variables)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// Reads a value while there is room: each takes a byte, and those of its text.
struct Room<'a>(&'a mut usize);

impl Room<'_> {
    fn take<E: Error>(&mut self, text: &str) -> Result<(), E> {
        let left = self.0.checked_sub(text.len() + 1);
        *self.0 = left.ok_or_else(|| {
            E::custom(format!(
                "at most {MAX_TEMPLATE_KWARGS_BYTES} bytes are allowed"
            ))
        })?;
        Ok(())
    }

    fn object<'de, A: MapAccess<'de>>(
        mut self,
        mut map: A,
    ) -> Result<Map<String, Value>, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.take(&key)?;
            let value = map.next_value_seed(Room(self.0))?;
            object.insert(key, value);
        }
        Ok(object)
    }

    fn scalar<E: Error>(mut self, value: impl Into<Value>) -> Result<Value, E> {
        self.take("")?;
        Ok(value.into())
    }
}

impl<'de> DeserializeSeed<'de> for Room<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Room<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.scalar(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.scalar(value)
    }

    fn visit_str<E: Error>(mut self, text: &str) -> Result<Value, E> {
        self.take(text)?;
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Value, A::Error> {
        self.take("")?;
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Room(self.0))? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, map: A) -> Result<Value, A::Error> {
        self.take("")?;
        self.object(map).map(Value::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn any_object_is_taken_within_bounds() {
        let all = json!({"a": null, "b": [true, -1, 2, 0.5, "x"], "c": {"d": {}}});
        let read = serde_json::from_value::<Variables>(all.clone()).unwrap();
        assert_eq!(Value::from(read.0), all);
        let text = "x".repeat(MAX_TEMPLATE_KWARGS_BYTES - 3);
        assert!(serde_json::from_value::<Variables>(json!({"a": text})).is_ok());
        for wrong in [
            json!({"a": format!("{text}x")}),
            json!({"a": vec![json!([]); MAX_TEMPLATE_KWARGS_BYTES]}),
            json!({ text: "ab" }),
            json!([["a", 1]]),
            json!("a"),
        ] {
            assert!(serde_json::from_value::<Variables>(wrong).is_err());
        }
    }

    #[test]
    fn names_that_templates_know_are_refused() {
        let template = ChatTemplate::new("", &[("image_token".into(), "<i>".into())]).unwrap();
        let checked = |name: &str| {
            let variables = Variables([(name.to_owned(), json!(true))].into_iter().collect());
            variables.checked(&template)
        };
        assert_eq!(checked("enable_thinking").unwrap()["enable_thinking"], true);
        for name in [
            "messages",
            "tools",
            "add_generation_prompt",
            "chat_template",
            "tokenize",
            "raise_exception",
            "range",
            "eos_token",
            "image_token",
        ] {
            let error = checked(name).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("chat_template_kwargs"));
            assert!(error.message.contains(name), "{error}");
        }
    }
}
