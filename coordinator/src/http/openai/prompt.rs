//! Prompts in the forms `/v1/completions` takes them, and their tokens.

use crate::http::error::ApiError;
use crate::http::limits::MAX_CHOICES;
use crate::http::served::Served;
use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use std::fmt;
use std::sync::Arc;

/// A text, a list of texts, a list of token ids, or a list of such lists.
#[derive(Debug, PartialEq)]
pub(super) enum PromptInput {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

/// A prompt, ready to be computed.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub(super) tokens: Arc<[u32]>,
    /// As it was given; `None` if as tokens.
    pub(super) text: Option<String>,
}

impl PromptInput {
    /// The tokens of all prompts. `truncate` keeps so many at the end of each.
    ///
    /// # Errors
    /// 400 if a text cannot be the prompt of this model, however it is cut into tokens.
    pub(super) async fn resolve(
        self,
        served: &Served,
        add_special_tokens: bool,
        truncate: Option<usize>,
    ) -> Result<Vec<Prompt>, ApiError> {
        let mut prompts = Vec::new();
        match self {
            Self::Tokens(lists) => {
                for tokens in lists {
                    let text = None;
                    let tokens = last(&tokens, truncate).into();
                    prompts.push(Prompt { tokens, text });
                }
            }
            Self::Texts(texts) => {
                for text in texts {
                    may_fit(served, &text, truncate)?;
                    let tokens = encode(served, text.clone(), add_special_tokens).await?;
                    let shown = truncate.is_none_or(|most| tokens.len() <= most);
                    prompts.push(Prompt {
                        tokens: last(&tokens, truncate).into(),
                        // A cut prompt is shown as what is left of it.
                        text: shown.then_some(text),
                    });
                }
            }
        }
        Ok(prompts)
    }
}

fn last(tokens: &[u32], most: Option<usize>) -> &[u32] {
    let skipped = tokens.len().saturating_sub(most.unwrap_or(usize::MAX));
    &tokens[skipped..]
}

/// Whether a prompt may fit the model, unless it is cut to what does. Tokenising takes time in proportion to the text, so
/// one that cannot fit is refused by its length alone.
///
/// # Errors
/// 400.
pub(super) fn may_fit(
    served: &Served,
    text: &str,
    truncate: Option<usize>,
) -> Result<(), ApiError> {
    let limit = served.model.max_model_len;
    let least = served.model.text.tokenizer.least_tokens(text.len());
    if truncate.is_none() && least > limit as usize {
        return Err(ApiError::too_long(format!(
            "This model's maximum context length is {limit} tokens. Your prompt of {} bytes is \
             longer than that. Shorten it.",
            text.len()
        )));
    }
    Ok(())
}

/// The tokens of a text of any length.
///
/// # Errors
/// 400.
pub(super) async fn encode(
    served: &Served,
    text: String,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = &served.model.text.tokenizer;
    tokenizer
        .encode_async(text, add_special_tokens)
        .await
        .map_err(|error| {
            tracing::warn!(%error, "a text could not be tokenised");
            ApiError::bad_request("The text cannot be expressed in this model's vocabulary.")
        })
}

impl<'de> Deserialize<'de> for PromptInput {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = PromptInput;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a text, a list of token ids, or a list of at most {MAX_CHOICES} of either"
        )
    }

    fn visit_str<E>(self, text: &str) -> Result<PromptInput, E> {
        Ok(PromptInput::Texts(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PromptInput, A::Error> {
        // The first entry says what the others are, so that long lists of ids are read as such.
        let full = || A::Error::custom(format!("at most {MAX_CHOICES} prompts are allowed"));
        match list.next_element()? {
            None => Ok(PromptInput::Tokens(vec![Vec::new()])),
            Some(Entry::Id(first)) => {
                let mut ids = vec![first];
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                Ok(PromptInput::Tokens(vec![ids]))
            }
            Some(Entry::Text(first)) => {
                let mut texts = vec![first];
                while let Some(text) = list.next_element()? {
                    if texts.len() == MAX_CHOICES {
                        return Err(full());
                    }
                    texts.push(text);
                }
                Ok(PromptInput::Texts(texts))
            }
            Some(Entry::Ids(first)) => {
                let mut lists = vec![first];
                while let Some(ids) = list.next_element()? {
                    if lists.len() == MAX_CHOICES {
                        return Err(full());
                    }
                    lists.push(ids);
                }
                Ok(PromptInput::Tokens(lists))
            }
        }
    }
}

enum Entry {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a token id, or a list of token ids")
            }

            fn visit_str<E>(self, text: &str) -> Result<Entry, E> {
                Ok(Entry::Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Entry, E> {
                let id = u32::try_from(id).map_err(|_| E::custom("not a token id"))?;
                Ok(Entry::Id(id))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entry, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                Ok(Entry::Ids(ids))
            }
        }
        deserializer.deserialize_any(EntryVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_come_in_four_forms() {
        let read = |json: &str| serde_json::from_str::<PromptInput>(json);
        let text = |texts: &[&str]| PromptInput::Texts(texts.iter().map(|&t| t.into()).collect());
        assert_eq!(read(r#""a""#).unwrap(), text(&["a"]));
        assert_eq!(read(r#"["a", "b"]"#).unwrap(), text(&["a", "b"]));
        assert_eq!(
            read("[1, 2]").unwrap(),
            PromptInput::Tokens(vec![vec![1, 2]])
        );
        assert_eq!(
            read("[[1], [], [2, 3]]").unwrap(),
            PromptInput::Tokens(vec![vec![1], vec![], vec![2, 3]])
        );
        for wrong in [
            "1",
            "null",
            "{}",
            r#"["a", 1]"#,
            "[1, \"a\"]",
            "[-1]",
            "[4294967296]",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        let ids = vec![[1]; MAX_CHOICES + 1];
        let texts = vec!["a"; MAX_CHOICES + 1];
        assert!(read(&serde_json::to_string(&texts[1..]).unwrap()).is_ok());
        for many in [serde_json::to_string(&ids), serde_json::to_string(&texts)] {
            let error = read(&many.unwrap()).unwrap_err().to_string();
            assert!(error.contains("at most 128 prompts"), "{error}");
        }
    }

    #[test]
    fn truncation_keeps_the_end() {
        assert_eq!(last(&[1, 2, 3], Some(2)), [2, 3]);
        assert_eq!(last(&[1, 2, 3], Some(5)), [1, 2, 3]);
        assert_eq!(last(&[1, 2, 3], None), [1, 2, 3]);
    }
}
