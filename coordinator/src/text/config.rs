//! `tokenizer_config.json` and `generation_config.json`, as far as text and sampling need them.
//!
//! Both files are written by many programs of many ages; unknown keys are skipped and values of an
//! unexpected kind are an error that names the key.

use anyhow::{Context, bail};
use serde_json::{Map, Value};

/// Special tokens that templates know by name.
pub(super) const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// What `tokenizer_config.json` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// `("bos_token", "<s>")` and the like, as far as present.
    pub special_tokens: Vec<(String, String)>,
    /// The template named `default`, or the only one.
    pub chat_template: Option<String>,
    /// Whether a prompt begins with the `bos_token`; `None` leaves it to `tokenizer.json`.
    pub add_bos_token: Option<bool>,
    /// Added tokens with their ids and whether they are special, by id.
    pub added_tokens: Vec<(u32, String, bool)>,
}

impl TokenizerConfig {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// If it is not JSON, or a key has a value of an unknown kind.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let map: Map<String, Value> = serde_json::from_slice(bytes)?;
        let mut special_tokens = Vec::new();
        for name in SPECIAL_TOKENS {
            if let Some(content) = token_content(map.get(name)).with_context(|| name.to_owned())? {
                special_tokens.push((name.to_owned(), content));
            }
        }
        Ok(Self {
            special_tokens,
            chat_template: chat_template(map.get("chat_template")).context("chat_template")?,
            add_bos_token: map.get("add_bos_token").and_then(Value::as_bool),
            added_tokens: added_tokens(map.get("added_tokens_decoder"))
                .context("added_tokens_decoder")?,
        })
    }

    /// The special token of this name, as text.
    pub fn special(&self, name: &str) -> Option<&str> {
        self.special_tokens
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, token)| token.as_str())
    }
}

/// A token is a string, or an object with its `content`.
fn token_content(value: Option<&Value>) -> anyhow::Result<Option<String>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Object(object)) => match object.get("content") {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            _ => bail!("expected a text under `content`"),
        },
        Some(other) => bail!("expected a text or an object, found {other}"),
    }
}

/// A template is a string, or a list of `{name, template}` of which we want `default`.
fn chat_template(value: Option<&Value>) -> anyhow::Result<Option<String>> {
    let named = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text.clone())),
        Some(Value::Array(named)) => named,
        Some(_) => bail!("expected a text or a list of named templates"),
    };
    let of = |entry: &Value| {
        entry
            .get("template")
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let default = named
        .iter()
        .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
    Ok(default.or(named.first()).and_then(of))
}

fn added_tokens(value: Option<&Value>) -> anyhow::Result<Vec<(u32, String, bool)>> {
    let Some(Value::Object(map)) = value else {
        return Ok(Vec::new());
    };
    let mut tokens = Vec::with_capacity(map.len());
    for (id, token) in map {
        let content = token_content(Some(token))?.unwrap_or_default();
        let special = token.get("special").and_then(Value::as_bool) == Some(true);
        tokens.push((
            id.parse().context("a key is not a token id")?,
            content,
            special,
        ));
    }
    tokens.sort_unstable();
    Ok(tokens)
}

/// What `generation_config.json` proposes; `None` where it is silent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// Likeliest tokens to choose among; 0 is off.
    pub top_k: Option<u32>,
    /// Share of probability to choose among.
    pub top_p: Option<f64>,
    /// Least probability, relative to the likeliest token's.
    pub min_p: Option<f64>,
    /// Penalty on tokens seen before.
    pub repetition_penalty: Option<f64>,
    /// Tokens to generate where a request does not say.
    pub max_new_tokens: Option<u32>,
    /// Most tokens to generate, whatever a request says. Not in the file: the operator's directory makes
    /// `max_new_tokens` one.
    pub bound: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl GenerationDefaults {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// If it is not JSON, or a number is none.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let map: Map<String, Value> = serde_json::from_slice(bytes)?;
        let float = |name: &str| match map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_f64()
                .map(Some)
                .with_context(|| format!("{name} is not a number")),
        };
        let integer = |name: &str| match map.get(name) {
            None | Some(Value::Null) => Ok(None),
            // -1 is how some files say "off".
            Some(value) if value.as_i64() == Some(-1) => Ok(Some(0)),
            Some(value) => value
                .as_u64()
                .and_then(|number| u32::try_from(number).ok())
                .map(Some)
                .with_context(|| format!("{name} is not a whole number from 0 to 2^32 - 1")),
        };
        // `do_sample: false` means greedy, unless a temperature stands beside it, which is all that `vllm` looks at.
        let greedy = map.get("do_sample").and_then(Value::as_bool) == Some(false)
            && !map.contains_key("temperature");
        Ok(Self {
            temperature: if greedy {
                Some(0.0)
            } else {
                float("temperature")?
            },
            top_k: integer("top_k")?,
            top_p: float("top_p")?,
            min_p: float("min_p")?,
            repetition_penalty: float("repetition_penalty")?,
            max_new_tokens: integer("max_new_tokens")?.filter(|&count| count > 0),
            bound: None,
            eos_token_ids: ids(map.get("eos_token_id")).context("eos_token_id")?,
        })
    }
}

/// An id, or a list of them.
fn ids(value: Option<&Value>) -> anyhow::Result<Vec<u32>> {
    let id = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .with_context(|| format!("{value} is not a token id"))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(single) => Ok(vec![id(single)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_templates_come_in_two_shapes() {
        let plain = TokenizerConfig::parse(
            br#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},
                 "pad_token": null, "chat_template": "T", "add_bos_token": true,
                 "added_tokens_decoder": {"7": {"content": "<x>", "special": true}}, "other": [1]}"#,
        )
        .unwrap();
        assert_eq!(plain.special("bos_token"), Some("<s>"));
        assert_eq!(plain.special("eos_token"), Some("</s>"));
        assert_eq!(plain.special("pad_token"), None);
        assert_eq!(plain.chat_template.as_deref(), Some("T"));
        assert_eq!(plain.add_bos_token, Some(true));
        assert_eq!(plain.added_tokens, [(7, "<x>".to_owned(), true)]);

        let named = br#"{"chat_template": [{"name": "rag", "template": "R"},
                                           {"name": "default", "template": "D"}]}"#;
        let named = TokenizerConfig::parse(named).unwrap();
        assert_eq!(named.chat_template.as_deref(), Some("D"));
        let error = TokenizerConfig::parse(br#"{"bos_token": 3}"#).unwrap_err();
        assert!(format!("{error:#}").contains("bos_token"), "{error:#}");
    }

    #[test]
    fn generation_defaults_are_read_and_checked() {
        let read = GenerationDefaults::parse(
            br#"{"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "max_new_tokens": 512}"#,
        )
        .unwrap();
        assert_eq!(read.eos_token_ids, [1, 2]);
        assert_eq!(read.temperature, Some(0.6));
        assert_eq!(read.top_k, Some(20));
        assert_eq!(read.max_new_tokens, Some(512));
        assert_eq!(read.top_p, None);
        let one = GenerationDefaults::parse(br#"{"eos_token_id": 5, "top_k": -1}"#).unwrap();
        assert_eq!((one.eos_token_ids, one.top_k), (vec![5], Some(0)));
        let error = GenerationDefaults::parse(br#"{"top_p": "x"}"#).unwrap_err();
        assert!(error.to_string().contains("top_p"), "{error}");
        assert!(GenerationDefaults::parse(br#"{"eos_token_id": -3}"#).is_err());
        for (text, temperature) in [
            (&br#"{"do_sample": false}"#[..], Some(0.0)),
            (br#"{"do_sample": false, "temperature": 0.7}"#, Some(0.7)),
            (br#"{"do_sample": true}"#, None),
        ] {
            let read = GenerationDefaults::parse(text).unwrap();
            assert_eq!(read.temperature, temperature);
        }
    }
}
