//! Every bound on what a request may ask for, in one table, checked before anything is copied.
//!
//! Each has taken some server down where it was missing; the tests name the cases. A bound on the
//! size of a list is checked while it is read, so that a longer one is never held in memory.

use super::error::ApiError;
use crate::text::config::GenerationDefaults;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Sequences of one request: prompts times `n`. OpenAI's own bound on `n`.
pub const MAX_CHOICES: usize = 128;
/// Entries of `logit_bias`; they travel to the shard with every step.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Entries of `allowed_token_ids`; they travel to the shard with every step.
pub const MAX_ALLOWED_TOKEN_IDS: usize = 1024;
/// Stop strings. OpenAI allows 4, `vllm` any number; each costs an automaton per choice.
pub const MAX_STOPS: usize = 16;
/// Bytes of one stop string: so much text may be held back.
pub const MAX_STOP_BYTES: usize = 1024;
/// Entries of `stop_token_ids`, which are banned one by one before `min_tokens`.
pub const MAX_STOP_TOKEN_IDS: usize = 128;
/// Log-probabilities of prompt tokens in one request, alternatives and choices included: each is 8 bytes here and some 70
/// in JSON. It is 128 prompts of 4 Ki with one alternative; one prompt as long as the model allows may have as many as
/// `--max-logprobs` allows, even if that is more.
pub const MAX_PROMPT_SCORES: usize = 1 << 20;
/// Messages of a conversation.
pub const MAX_MESSAGES: usize = 4096;
/// Bytes of `chat_template_kwargs`, names included; those that are in use are a handful of words.
pub const MAX_TEMPLATE_KWARGS_BYTES: usize = 16 << 10;
/// Parts of a message's content.
pub const MAX_PARTS: usize = 1024;

/// `temperature`: OpenAI's.
pub const TEMPERATURES: RangeInclusive<f64> = 0.0..=2.0;
/// `top_p`: at 0 no token would be left.
pub const TOP_PS: RangeInclusive<f64> = 1e-6..=1.0;
/// `min_p`.
pub const MIN_PS: RangeInclusive<f64> = 0.0..=1.0;
/// `repetition_penalty`: logits are divided by it.
pub const REPETITION_PENALTIES: RangeInclusive<f64> = 0.01..=100.0;

/// Bounds of the process, settable from the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Alternatives for each token (`--max-logprobs`); each costs 8 bytes on the wire and 100 in
    /// JSON.
    pub max_logprobs: u32,
    /// Bytes of a request's body. 4 MiB is a prompt of a million tokens.
    pub body_bytes: usize,
    /// Bytes of a request's head, and of what hyper buffers for writing.
    pub header_bytes: usize,
    /// From the first byte a connection could send to the end of a request's head. Also how long a
    /// kept-alive connection may be idle.
    pub header_timeout: Duration,
    /// From the head of a request to the end of its body.
    pub body_timeout: Duration,
    /// How long a client may refuse to take bytes that are ready for it.
    pub stall_timeout: Duration,
    /// Open connections; more wait in the kernel's queue.
    pub connections: usize,
    /// After an idle time of this length a stream gets a comment, so that proxies keep it open.
    pub keep_alive_interval: Duration,
    /// How long the engine may take to answer whether it takes a request.
    pub submit_timeout: Duration,
    /// How long open answers may take after the shutdown has begun.
    pub drain_timeout: Duration,
    /// Of requests that are answered later.
    pub background: BackgroundLimits,
}

/// Bounds of what is kept of background requests, of all keys together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackgroundLimits {
    /// Requests that wait, are computed, or whose answers are kept.
    pub requests: usize,
    /// Bytes of their bodies and answers. It is asked for when a request is accepted, so that there may be more by the
    /// answers to those that were.
    pub bytes: u64,
    /// How long one may wait, and how long its answer is kept then; OpenAI's for batches.
    pub age: Duration,
    /// Those that are computed at once: a quarter of a step's sequences, so that others find room.
    pub at_once: usize,
}

impl Default for BackgroundLimits {
    fn default() -> Self {
        Self {
            requests: 4096,
            bytes: 256 << 20,
            age: Duration::from_secs(24 * 60 * 60),
            at_once: 64,
        }
    }
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            max_logprobs: 20,
            body_bytes: 4 << 20,
            header_bytes: 32 << 10,
            header_timeout: Duration::from_secs(5),
            body_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(30),
            connections: 4096,
            keep_alive_interval: Duration::from_secs(15),
            submit_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(30),
            background: BackgroundLimits::default(),
        }
    }
}

/// Checks a whole number.
pub fn whole(param: &str, value: i128, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    if let Ok(value) = i64::try_from(value)
        && range.contains(&value)
    {
        return Ok(value);
    }
    let (low, high) = range.into_inner();
    let bound = if high == i64::MAX {
        format!("at least {low}")
    } else {
        format!("from {low} to {high}")
    };
    Err(ApiError::parameter(
        param,
        format!("{param} must be {bound}, got {value}."),
    ))
}

/// Checks a number. NaN is in no range.
pub fn number(param: &str, value: f64, range: RangeInclusive<f64>) -> Result<f32, ApiError> {
    if range.contains(&value) {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "all ranges are far inside f32's"
        )]
        return Ok(value as f32);
    }
    let (low, high) = range.into_inner();
    Err(ApiError::parameter(
        param,
        format!("{param} must be from {low} to {high}, got {value}."),
    ))
}

/// Leaves out what a model's files propose and no request could ask for, and says so. Otherwise every request that is
/// silent there would be refused for it.
pub fn check_defaults(defaults: &mut GenerationDefaults) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, value, range) in [
        ("temperature", &mut defaults.temperature, TEMPERATURES),
        ("top_p", &mut defaults.top_p, TOP_PS),
        ("min_p", &mut defaults.min_p, MIN_PS),
        (
            "repetition_penalty",
            &mut defaults.repetition_penalty,
            REPETITION_PENALTIES,
        ),
    ] {
        if let Some(given) = value.take_if(|given| !range.contains(given)) {
            let (low, high) = range.into_inner();
            wrong.push(format!(
                "generation_config.json: {name} must be from {low} to {high}, and is {given}: left out"
            ));
        }
    }
    wrong
}

/// Checks that token ids name tokens of the model.
pub fn token_ids(param: &str, ids: &[u32], vocab_size: u32) -> Result<(), ApiError> {
    match ids.iter().find(|&&id| id >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(ApiError::parameter(
            param,
            format!("{param} has token id {id}, but the vocabulary has only {vocab_size} tokens."),
        )),
    }
}

/// A list of at most `N` entries; reading stops at the one too many.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounded<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for Bounded<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for List<T, N> {
            type Value = Bounded<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} entries")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = list.next_element()? {
                    if entries.len() == N {
                        return Err(A::Error::custom(format!("at most {N} entries are allowed")));
                    }
                    entries.push(entry);
                }
                Ok(Bounded(entries))
            }
        }
        deserializer.deserialize_seq(List(PhantomData))
    }
}

/// A whole number however it is written: `10`, `10.0`. Wide enough for seeds, which use all 64 bits
/// with or without a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole(pub i128);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;
        impl Visitor<'_> for Number {
            type Value = Whole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Whole, E> {
                Ok(Whole(value.into()))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Whole, E> {
                Ok(Whole(value.into()))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Whole, E> {
                const EXACT: f64 = 9_007_199_254_740_992.0;
                if value.fract() != 0.0 {
                    return Err(E::custom(format!("{value} is not a whole number")));
                }
                if value.abs() > EXACT {
                    return Err(E::custom(format!("{value} is too large")));
                }
                #[expect(clippy::cast_possible_truncation, reason = "checked just above")]
                Ok(Whole(value as i128))
            }
        }
        deserializer.deserialize_any(Number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_held_to_their_range() {
        assert!(whole("n", 0, 1..=4).is_err());
        assert_eq!(whole("n", 4, 1..=4), Ok(4));
        let error = whole("max_tokens", -3, 1..=i64::MAX).unwrap_err();
        assert_eq!(error.message, "max_tokens must be at least 1, got -3.");
        assert_eq!(error.param.as_deref(), Some("max_tokens"));
        assert!(number("top_p", f64::NAN, 0.0..=1.0).is_err());
        assert!(number("top_p", f64::INFINITY, 0.0..=1.0).is_err());
        assert!(token_ids("prompt", &[1, 9, 10], 10).is_err());
        assert!(token_ids("prompt", &[1, 9], 10).is_ok());
    }

    #[test]
    fn proposals_that_no_request_could_make_are_left_out_and_named() {
        let read = |text: &str| GenerationDefaults::parse(text.as_bytes()).unwrap();
        let mut good = read(r#"{"temperature": 2, "top_p": 1, "min_p": 0, "top_k": 5}"#);
        let before = good.clone();
        assert!(check_defaults(&mut good).is_empty());
        assert_eq!(good, before);
        let mut bad = read(
            r#"{"temperature": 3, "top_p": 0, "min_p": -1, "repetition_penalty": 0, "top_k": 5}"#,
        );
        let wrong = check_defaults(&mut bad);
        for (sentence, name) in
            wrong
                .iter()
                .zip(["temperature", "top_p", "min_p", "repetition_penalty"])
        {
            assert!(sentence.contains(name), "{sentence}");
        }
        assert_eq!((wrong.len(), bad), (4, read(r#"{"top_k": 5}"#)));
    }

    #[test]
    fn lists_and_whole_numbers_are_read_within_bounds() {
        assert_eq!(
            serde_json::from_str::<Bounded<u32, 2>>("[1,2]").unwrap().0,
            [1, 2]
        );
        let error = serde_json::from_str::<Bounded<u32, 2>>("[1,2,3]").unwrap_err();
        assert!(error.to_string().contains("at most 2"), "{error}");
        assert_eq!(serde_json::from_str::<Whole>("10.0").unwrap(), Whole(10));
        assert_eq!(serde_json::from_str::<Whole>("-1").unwrap(), Whole(-1));
        let most = serde_json::from_str::<Whole>("18446744073709551615").unwrap();
        assert_eq!(most, Whole(u64::MAX.into()));
        for wrong in ["1.5", "1e300", "\"1\"", "null", "true"] {
            assert!(serde_json::from_str::<Whole>(wrong).is_err(), "{wrong}");
        }
    }
}
