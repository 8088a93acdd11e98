//! The parameters that completions and chat have in common, checked against the table of limits.

use super::StreamUsage;
use crate::http::auth::Tenant;
use crate::http::body::Object;
use crate::http::error::ApiError;
use crate::http::generate::GenerateRequest;
use crate::http::limits::{
    Bounded, MAX_ALLOWED_TOKEN_IDS, MAX_CHOICES, MAX_LOGIT_BIAS, MAX_STOP_BYTES,
    MAX_STOP_TOKEN_IDS, MAX_STOPS, MIN_PS, REPETITION_PENALTIES, TEMPERATURES, TOP_PS, Whole,
    number, token_ids, whole,
};
use crate::http::served::Served;
use crate::http::{REQUEST_ID_BYTES, is_request_id};
use crate::scheduler::request::SamplingParams;
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use topology::wire::LogitBias;

/// Fields of both bodies; those of one alone are in its own file.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Params {
    pub(super) model: Option<String>,
    n: Option<Whole>,
    best_of: Option<Whole>,
    max_tokens: Option<Whole>,
    max_completion_tokens: Option<Whole>,
    min_tokens: Option<Whole>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<Whole>,
    min_p: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    seed: Option<Whole>,
    stop: Option<Stops>,
    stop_token_ids: Option<Bounded<u32, MAX_STOP_TOKEN_IDS>>,
    allowed_token_ids: Option<Bounded<u32, MAX_ALLOWED_TOKEN_IDS>>,
    logit_bias: Option<LogitBiases>,
    ignore_eos: Option<bool>,
    include_stop_str_in_output: Option<bool>,
    skip_special_tokens: Option<bool>,
    priority: Option<Whole>,
    cache_salt: Option<String>,
    prompt_logprobs: Option<Whole>,
    truncate_prompt_tokens: Option<Whole>,
    return_token_ids: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    background: Option<bool>,
    request_id: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// What one API adds to the common parameters.
#[derive(Debug)]
pub(super) struct Extra {
    /// Prompts as tokens.
    pub(super) prompts: Vec<Arc<[u32]>>,
    /// `max_tokens` where the request is silent; `None`: what the model's files propose, or as many as fit.
    pub(super) default_max_tokens: Option<u32>,
    /// `Some(n)`: log-probabilities with `n` alternatives.
    pub(super) logprobs: Option<u32>,
    /// The prompt's tokens are part of the answer, so that 0 tokens may be generated.
    pub(super) echo: bool,
}

impl Params {
    /// Whether the answer is streamed, and with which usage.
    ///
    /// # Errors
    /// 400 for `stream_options` without `stream`.
    pub(super) fn streaming(&self) -> Result<Option<StreamUsage>, ApiError> {
        let stream = self.stream == Some(true);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::parameter(
                "stream_options",
                "stream_options can be set only when stream is true.",
            ));
        }
        if stream && self.is_background() {
            return Err(ApiError::parameter(
                "background",
                "A background request is answered later and whole: leave out stream, or background.",
            ));
        }
        if stream && self.prompt_logprobs.is_some_and(|it| it.0 >= 0) {
            return Err(ApiError::parameter(
                "prompt_logprobs",
                "prompt_logprobs are not available when stream is true.",
            ));
        }
        let options = self.stream_options.as_ref().map(|Object(options)| options);
        let continuous = options.and_then(|it| it.continuous_usage_stats) == Some(true);
        let at_end = options.and_then(|it| it.include_usage) == Some(true);
        Ok(stream.then_some(StreamUsage {
            at_end: at_end || continuous,
            continuous,
        }))
    }

    /// Whether the answer is to be fetched later.
    pub(super) fn is_background(&self) -> bool {
        self.background == Some(true)
    }

    /// What the client calls the request.
    ///
    /// # Errors
    /// 400 if it cannot be called so.
    pub(super) fn request_id(&self) -> Result<Option<&str>, ApiError> {
        let wrong = |sentence: String| Err(ApiError::parameter("request_id", sentence));
        match self.request_id.as_deref() {
            Some(id) if !is_request_id(id.as_bytes()) => wrong(format!(
                "request_id must be 1 to {REQUEST_ID_BYTES} letters, digits and signs of ASCII, without spaces."
            )),
            Some(_) if self.is_background() => wrong(
                "The server names a background request: leave out request_id, or background."
                    .to_owned(),
            ),
            id => Ok(id),
        }
    }

    /// Makes `seed` the request's own, if there is one.
    pub(super) fn fix_seed(&mut self, seed: Option<u64>) {
        let seed = seed.map(|seed| Whole(seed.into()));
        self.seed = seed.or(self.seed);
    }

    /// Whether token ids are part of the answer.
    pub(super) fn return_token_ids(&self) -> bool {
        self.return_token_ids == Some(true)
    }

    /// Whether special tokens leave no text.
    pub(super) fn skip_special_tokens(&self) -> bool {
        self.skip_special_tokens != Some(false)
    }

    /// Alternatives of the prompt's tokens that the answer shows.
    ///
    /// # Errors
    /// 400 if out of range.
    pub(super) fn prompt_logprobs(&self, served: &Served) -> Result<Option<u32>, ApiError> {
        logprobs(served, "prompt_logprobs", self.prompt_logprobs)
    }

    /// How many tokens at the prompt's end are kept; `None`: all.
    ///
    /// # Errors
    /// 400 if out of range.
    pub(super) fn truncate_prompt_tokens(
        &self,
        served: &Served,
    ) -> Result<Option<usize>, ApiError> {
        let limit = served.model.max_model_len;
        let Some(Whole(given)) = self.truncate_prompt_tokens else {
            return Ok(None);
        };
        let kept = if given == -1 {
            let asked = self.max_completion_tokens.or(self.max_tokens);
            let limit = i128::from(limit);
            limit - asked.map_or(1, |it| it.0.clamp(1, limit))
        } else {
            whole("truncate_prompt_tokens", given, 1..=limit.into())?.into()
        };
        Ok(usize::try_from(kept).ok())
    }

    /// Checks everything and makes the request.
    ///
    /// # Errors
    /// 400 naming the parameter.
    pub(super) fn request(
        &self,
        served: &Served,
        tenant: Tenant,
        extra: Extra,
    ) -> Result<GenerateRequest, ApiError> {
        let n = self.choices()?;
        let least = i64::from(!extra.echo);
        let (mut asked, mut asked_by) = (None, "max_tokens");
        for (name, given) in [
            ("max_tokens", self.max_tokens),
            ("max_completion_tokens", self.max_completion_tokens),
        ] {
            if let Some(Whole(given)) = given {
                let given = whole(name, given, least..=i64::from(u32::MAX))?;
                (asked, asked_by) = (Some(u32::try_from(given).unwrap_or(u32::MAX)), name);
            }
        }
        let max_tokens = most_tokens(served, asked, &extra);
        let shown = self.prompt_logprobs(served)?;
        let (prompt_logprobs, scored_for) = match (extra.echo, extra.logprobs, max_tokens) {
            (true, Some(count), _) if shown.is_none_or(|shown| shown < count) => {
                (Some(count), "logprobs")
            }
            // Only scoring makes a request of no new tokens one that can be scheduled.
            (_, _, Some(0)) if shown.is_none() => (Some(0), asked_by),
            _ => (shown, "prompt_logprobs"),
        };
        let stop_token_ids = list("stop_token_ids", self.stop_token_ids.as_ref(), served)?;
        let min_tokens = self.min_tokens.map_or(0, |it| it.0);
        let min_tokens = whole("min_tokens", min_tokens, 0..=i64::from(u32::MAX))?;
        if self.cache_salt.as_deref() == Some("") {
            return Err(ApiError::parameter(
                "cache_salt",
                "cache_salt must not be empty; leave it out instead.",
            ));
        }
        Ok(GenerateRequest {
            prompts: extra.prompts,
            n,
            sampling: self.sampling(served, extra.logprobs)?,
            max_tokens,
            min_tokens: u32::try_from(min_tokens).unwrap_or(u32::MAX),
            stop_token_ids,
            ignore_eos: self.ignore_eos == Some(true),
            stop: self.stops()?,
            include_stop: self.include_stop_str_in_output == Some(true),
            skip_special_tokens: self.skip_special_tokens(),
            priority: self.priority(served)?,
            cache_salt: tenant.cache_salt(self.cache_salt.as_deref()),
            prompt_logprobs,
            scored_for,
        })
    }

    /// As in `vllm`, any but 0 is for servers that were started to heed it: who may jump the queue is the operator's to
    /// say.
    fn priority(&self, served: &Served) -> Result<i32, ApiError> {
        let priority = self.priority.map_or(0, |it| it.0);
        let range = i64::from(i32::MIN)..=i64::from(i32::MAX);
        let priority = whole("priority", priority, range)?;
        if priority != 0 && !served.model.has_priorities {
            return Err(ApiError::parameter(
                "priority",
                "This server takes requests in the order in which they come: priority must be 0, unless it \
                 is started with --scheduling-policy priority.",
            ));
        }
        Ok(i32::try_from(priority).unwrap_or(0))
    }

    fn choices(&self) -> Result<usize, ApiError> {
        let most = i64::try_from(MAX_CHOICES).unwrap_or(i64::MAX);
        let n = whole("n", self.n.map_or(1, |it| it.0), 1..=most)?;
        if let Some(Whole(best_of)) = self.best_of {
            let best_of = whole("best_of", best_of, 1..=most)?;
            if best_of != n {
                return Err(ApiError::parameter(
                    "best_of",
                    "best_of is not supported by this server: leave it out or make it equal to n.",
                ));
            }
        }
        Ok(usize::try_from(n).unwrap_or(1))
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = self.stop.as_ref().map_or(&[][..], |stops| &stops.0);
        for stop in stops {
            if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
                return Err(ApiError::parameter(
                    "stop",
                    format!(
                        "A stop string must have 1 to {MAX_STOP_BYTES} bytes, got {}.",
                        stop.len()
                    ),
                ));
            }
        }
        Ok(stops.to_vec())
    }

    fn sampling(&self, served: &Served, logprobs: Option<u32>) -> Result<SamplingParams, ApiError> {
        let defaults = &served.model.text.defaults;
        let or = |given: Option<f64>, default: Option<f64>, neutral| {
            given.or(default).unwrap_or(neutral)
        };
        let temperature = or(self.temperature, defaults.temperature, 1.0);
        let top_k = self
            .top_k
            .map_or(i128::from(defaults.top_k.unwrap_or(0)), |it| it.0);
        let top_k = whole("top_k", top_k, -1..=i64::from(u32::MAX))?.max(0);
        let repetition = or(self.repetition_penalty, defaults.repetition_penalty, 1.0);
        let mut logit_bias = Vec::new();
        for (token, bias) in self.logit_bias.iter().flat_map(|biases| &biases.0) {
            token_ids("logit_bias", &[*token], served.model.vocab_size)?;
            let bias = number("logit_bias", *bias, -100.0..=100.0)?;
            logit_bias.push(LogitBias {
                token: *token,
                bias,
            });
        }
        let seed = match self.seed {
            // As in `vllm`, -1 is a way to say nothing.
            None | Some(Whole(-1)) => served.seeds.draw(),
            Some(Whole(seed)) => u64::try_from(seed & i128::from(u64::MAX)).unwrap_or(0),
        };
        Ok(SamplingParams {
            temperature: steady(number("temperature", temperature, TEMPERATURES)?),
            top_k: u32::try_from(top_k).unwrap_or(0),
            top_p: number("top_p", or(self.top_p, defaults.top_p, 1.0), TOP_PS)?,
            min_p: number("min_p", or(self.min_p, defaults.min_p, 0.0), MIN_PS)?,
            presence_penalty: number(
                "presence_penalty",
                self.presence_penalty.unwrap_or(0.0),
                -2.0..=2.0,
            )?,
            frequency_penalty: number(
                "frequency_penalty",
                self.frequency_penalty.unwrap_or(0.0),
                -2.0..=2.0,
            )?,
            repetition_penalty: number("repetition_penalty", repetition, REPETITION_PENALTIES)?,
            seed,
            logit_bias,
            banned_token_ids: Vec::new(),
            allowed_token_ids: list("allowed_token_ids", self.allowed_token_ids.as_ref(), served)?,
            logprobs,
        })
    }
}

/// How many tokens a choice may have; `None`: as many as fit. As in `vllm`: what the model's own files propose is for
/// requests that are silent, and for those of `/v1/completions` 16 goes before it; what the operator's files say
/// (`--generation-config DIR`) is a bound for all.
fn most_tokens(served: &Served, asked: Option<u32>, extra: &Extra) -> Option<u32> {
    let defaults = &served.model.text.defaults;
    let proposed = || {
        // It gives way to what fits.
        let longest = extra.prompts.iter().map(|it| it.len()).max().unwrap_or(0);
        let left = (served.model.max_model_len as usize).saturating_sub(longest);
        let left = u32::try_from(left.max(1)).unwrap_or(u32::MAX);
        let proposed = extra.default_max_tokens.or(defaults.max_new_tokens);
        proposed.map(|most| most.min(left))
    };
    let bound = |most: u32| defaults.bound.map_or(most, |bound| most.min(bound));
    asked.or_else(proposed).map(bound)
}

/// Dividing by a temperature near 0 overflows: below 0.00001 is greedy, below 0.01 is 0.01.
fn steady(temperature: f32) -> f32 {
    if temperature < 1e-5 {
        0.0
    } else {
        temperature.max(0.01)
    }
}

/// A number of alternatives; an absent one asks for nothing, a negative one (all of them, in `vllm`) is refused.
pub(super) fn logprobs(
    served: &Served,
    param: &str,
    given: Option<Whole>,
) -> Result<Option<u32>, ApiError> {
    let Some(Whole(given)) = given else {
        return Ok(None);
    };
    let most = served.limits.max_logprobs.min(served.model.vocab_size);
    let count = whole(param, given, 0..=i64::from(most))?;
    Ok(u32::try_from(count).ok())
}

fn list<const N: usize>(
    param: &str,
    ids: Option<&Bounded<u32, N>>,
    served: &Served,
) -> Result<Vec<u32>, ApiError> {
    let Some(Bounded(ids)) = ids else {
        return Ok(Vec::new());
    };
    token_ids(param, ids, served.model.vocab_size)?;
    Ok(ids.clone())
}

/// `stop`: a text or a list of at most [`MAX_STOPS`].
#[derive(Debug)]
struct Stops(Vec<String>);

impl<'de> Deserialize<'de> for Stops {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrList;
        impl<'de> Visitor<'de> for TextOrList {
            type Value = Stops;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a text or a list of at most {MAX_STOPS} texts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Stops, E> {
                Ok(Stops(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Stops, A::Error> {
                let list = serde::de::value::SeqAccessDeserializer::new(list);
                Ok(Stops(Bounded::<String, MAX_STOPS>::deserialize(list)?.0))
            }
        }
        deserializer.deserialize_any(TextOrList)
    }
}

/// `logit_bias`: token ids, written as texts, with what is added to their logits.
#[derive(Debug, Default)]
struct LogitBiases(BTreeMap<u32, f64>);

impl<'de> Deserialize<'de> for LogitBiases {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = LogitBiases;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    "an object of at most {MAX_LOGIT_BIAS} token ids with a number each"
                )
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LogitBiases, A::Error> {
                let mut biases = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    let Ok(token) = key.parse() else {
                        return Err(A::Error::custom(format!("{key:?} is not a token id")));
                    };
                    // Entries that overwrote each other would get around the bound below.
                    if biases.insert(token, map.next_value()?).is_some() {
                        return Err(A::Error::custom(format!("token id {token} is given twice")));
                    }
                    if biases.len() > MAX_LOGIT_BIAS {
                        return Err(A::Error::custom(format!(
                            "at most {MAX_LOGIT_BIAS} entries are allowed"
                        )));
                    }
                }
                Ok(LogitBiases(biases))
            }
        }
        deserializer.deserialize_map(Map)
    }
}
