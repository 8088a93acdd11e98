//! The one generation request that every API turns into, and its answer as a series of text deltas.
//!
//! `/v1/completions`, `/v1/chat/completions` and whatever comes later differ only in how they fill
//! [`GenerateRequest`] and how they write [`Delta`]s. Tokens become text here, stop strings end
//! choices here; nothing here knows JSON.
//!
//! Invariant: the deltas do not depend on who reads them, so a streamed answer is the whole answer
//! cut in pieces. Dropping a [`Generation`] cancels it.

use super::error::ApiError;
use super::limits::{self, MAX_CHOICES, MAX_PROMPT_SCORES};
use super::served::Served;
use crate::clock;
use crate::engine::handle::{Events, StreamEventKind, SubmitError};
use crate::scheduler::request::{FinishReason, Request, SamplingParams};
use crate::text::detokenize::Detokenizer;
use crate::text::stop::StopMatcher;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use topology::wire::TokenScore;

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Prompts as tokens, none of them empty.
    pub prompts: Vec<Arc<[u32]>>,
    /// Choices for each prompt.
    pub n: usize,
    /// How tokens are chosen. The `k`-th choice of a prompt takes `seed + k`.
    pub sampling: SamplingParams,
    /// `None`: as many as the model has room for.
    pub max_tokens: Option<u32>,
    /// The first so many tokens do not end a choice.
    pub min_tokens: u32,
    /// Tokens that end a choice, besides the model's own end of text.
    pub stop_token_ids: Vec<u32>,
    /// The model's own end of text does not end a choice.
    pub ignore_eos: bool,
    /// Texts that end a choice.
    pub stop: Vec<String>,
    /// Whether what ended a choice is part of its text.
    pub include_stop: bool,
    /// Whether special tokens leave no text.
    pub skip_special_tokens: bool,
    /// Lower is sooner.
    pub priority: i32,
    /// Cached blocks are shared only under the same salt.
    pub cache_salt: u64,
    /// `Some(n)`: score the prompt's tokens, with `n` alternatives.
    pub prompt_logprobs: Option<u32>,
    /// The parameter that asks for those.
    pub scored_for: &'static str,
}

/// What is new in one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// `prompt_index * n + k`.
    pub choice: usize,
    /// Text that is now certain.
    pub text: String,
    /// The token behind it, or of text still held back.
    pub token: Option<TokenOut>,
    /// Scores of the prompt's tokens after the first; once, before any token.
    pub prompt_scores: Option<Vec<TokenScore>>,
    /// Present in the choice's last delta.
    pub finish: Option<Finish>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// Its id.
    pub id: u32,
    /// Present when log-probabilities were asked for.
    pub score: Option<TokenScore>,
    /// Characters of the choice's text before the token's own.
    pub offset: usize,
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// What stopped it, unless it was the model's own end of text.
    pub stop: Option<StopReason>,
}

/// `stop_reason`, as in `vllm`.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    Text(String),
}

/// Tokens counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of all prompts, each once.
    pub prompt_tokens: usize,
    /// Generated in all choices, those that ended them included.
    pub completion_tokens: usize,
    /// Prompt tokens that were in the prefix cache.
    pub cached_tokens: usize,
}

/// A request that runs.
#[derive(Debug)]
pub struct Generation {
    served: Arc<Served>,
    events: Events,
    choices: Vec<Choice>,
    n: usize,
    running: usize,
    rules: Rules,
    usage: Usage,
    _in_flight: InFlight,
}

#[derive(Debug)]
struct Choice {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Tokens so far.
    generated: u32,
    /// The last of them.
    last: Option<u32>,
    /// Characters detokenised so far, held back or not.
    chars: usize,
    done: bool,
}

/// What ends choices.
#[derive(Debug)]
struct Rules {
    eos: Vec<u32>,
    stop_token_ids: Vec<u32>,
    include_stop: bool,
    min_tokens: u32,
}

/// Counts a request for `/load` while it lives.
#[derive(Debug)]
struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.served.pace.ended(clock::now());
    }
}

impl Generation {
    /// Checks the request against the model and hands it to the engine.
    ///
    /// # Errors
    /// 400 if it cannot fit the model, 429 or 503 if it is not taken now.
    pub(super) async fn start(
        served: &Arc<Served>,
        request: GenerateRequest,
    ) -> Result<Self, ApiError> {
        served.in_flight.fetch_add(1, Ordering::Relaxed);
        let in_flight = InFlight(Arc::clone(&served.in_flight));
        let eos = if request.ignore_eos {
            Vec::new()
        } else {
            served.model.text.eos_token_ids.clone()
        };
        let sequences = sequences(served, &request, &eos)?;
        let count = sequences.len();
        let submitted = served.model.engine.submit(sequences);
        let events = tokio::time::timeout(served.limits.submit_timeout, submitted)
            .await
            .unwrap_or_else(|_| Err(SubmitError::NotReady("the engine does not answer".into())))
            .map_err(|error| {
                ApiError::from_submit(&error, served.pace.retry_after(clock::now()))
            })?;
        let pieces = served.model.text.tokenizer.pieces();
        let skip = request.skip_special_tokens;
        let choice = |_| Choice {
            detokenizer: Detokenizer::after_prompt(Arc::clone(&pieces), skip),
            stops: StopMatcher::new(&request.stop, request.include_stop),
            generated: 0,
            last: None,
            chars: 0,
            done: false,
        };
        Ok(Self {
            served: Arc::clone(served),
            events,
            choices: (0..count).map(choice).collect(),
            n: request.n,
            running: count,
            usage: Usage {
                prompt_tokens: request.prompts.iter().map(|prompt| prompt.len()).sum(),
                ..Usage::default()
            },
            rules: Rules {
                eos,
                stop_token_ids: request.stop_token_ids,
                include_stop: request.include_stop,
                min_tokens: request.min_tokens,
            },
            _in_flight: in_flight,
        })
    }

    /// The next delta of any choice; `None` when all have ended.
    ///
    /// # Errors
    /// If the engine cannot go on. The request is over then.
    pub async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        while self.running > 0 {
            let Some(event) = self.events.recv().await else {
                return Err(ApiError::internal(
                    "The engine stopped before the answer was complete. Try again.",
                ));
            };
            let known = self.choices.get(event.choice).is_some_and(|it| !it.done);
            if !known {
                // A choice that a stop string ended while its next token was under way.
                continue;
            }
            if let Some(delta) = self.take(event.choice, event.kind)? {
                return Ok(Some(delta));
            }
        }
        Ok(None)
    }

    /// Tokens counted so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    fn take(&mut self, index: usize, kind: StreamEventKind) -> Result<Option<Delta>, ApiError> {
        let mut delta = Delta {
            choice: index,
            ..Delta::default()
        };
        match kind {
            StreamEventKind::Started { cached_tokens } => {
                // Further choices of a prompt find what the first has just computed.
                if index.is_multiple_of(self.n) {
                    self.usage.cached_tokens += cached_tokens as usize;
                }
                return Ok(None);
            }
            StreamEventKind::PromptScores(scores) => delta.prompt_scores = Some(scores),
            StreamEventKind::Token { token, score, .. } => {
                self.usage.completion_tokens += 1;
                let choice = &mut self.choices[index];
                choice.take_token(token, score, &self.rules, &mut delta);
                if delta.finish.is_some() {
                    self.events.cancel(index);
                    self.running -= 1;
                }
            }
            StreamEventKind::Finished(reason) => {
                let finish = self.choices[index].finish(reason, &self.rules, &mut delta)?;
                delta.finish = Some(finish);
                self.running -= 1;
            }
            StreamEventKind::Failed(sentence) => return Err(ApiError::internal(sentence)),
        }
        Ok(Some(delta))
    }
}

impl Choice {
    fn take_token(
        &mut self,
        token: u32,
        score: Option<TokenScore>,
        rules: &Rules,
        delta: &mut Delta,
    ) {
        self.generated += 1;
        self.last = Some(token);
        delta.token = Some(TokenOut {
            id: token,
            score,
            offset: self.chars,
        });
        if rules.stops_at(token) && !rules.include_stop {
            // The engine's next event says so; its text is not shown.
            return;
        }
        let mut text = String::new();
        self.detokenizer.push(token, &mut text);
        self.show(&text, rules, delta);
    }

    /// Takes text that is certain; what may be shown of it goes into `delta`.
    fn show(&mut self, text: &str, rules: &Rules, delta: &mut Delta) {
        self.chars += text.chars().count();
        if self.generated <= rules.min_tokens {
            delta.text += &self.stops.pass(text);
            return;
        }
        let released = self.stops.push(text);
        delta.text += &released.text;
        if let Some(stop) = released.stop {
            self.done = true;
            delta.finish = Some(Finish {
                reason: "stop",
                stop: Some(StopReason::Text(stop)),
            });
        }
    }

    /// The engine ended the choice.
    fn finish(
        &mut self,
        reason: FinishReason,
        rules: &Rules,
        delta: &mut Delta,
    ) -> Result<Finish, ApiError> {
        let mut stop = None;
        let finish = match reason {
            FinishReason::Length => "length",
            FinishReason::Stop => {
                let asked = |token: &u32| rules.stop_token_ids.contains(token);
                let own = |token: &u32| rules.eos.contains(token);
                stop = self.last.filter(|token| asked(token) && !own(token));
                "stop"
            }
            FinishReason::Cancelled => {
                return Err(ApiError::internal(
                    "The request was cancelled by the server.",
                ));
            }
            FinishReason::Error => {
                return Err(ApiError::internal(
                    "The cluster could not finish the answer. Try again.",
                ));
            }
        };
        let mut rest = String::new();
        self.detokenizer.finish(&mut rest);
        self.show(&rest, rules, delta);
        if let Some(finish) = delta.finish.take() {
            return Ok(finish);
        }
        delta.text += &self.stops.finish();
        self.done = true;
        Ok(Finish {
            reason: finish,
            stop: stop.map(StopReason::Token),
        })
    }
}

impl Rules {
    fn stops_at(&self, token: u32) -> bool {
        self.stop_token_ids.contains(&token) || self.eos.contains(&token)
    }
}

/// The sequences of a request, checked against the model.
fn sequences(
    served: &Served,
    request: &GenerateRequest,
    eos: &[u32],
) -> Result<Vec<Request>, ApiError> {
    let count = request.prompts.len() * request.n;
    if count == 0 || count > MAX_CHOICES {
        return Err(ApiError::parameter(
            "prompt",
            format!(
                "{} prompts with n = {} make {count} choices; at most {MAX_CHOICES} are allowed in \
                 one request. Send several requests.",
                request.prompts.len(),
                request.n
            ),
        ));
    }
    check_prompt_scores(served, request)?;
    let model = &served.model;
    let mut stop_token_ids = eos.to_vec();
    stop_token_ids.extend(&request.stop_token_ids);
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    let mut sequences = Vec::with_capacity(count);
    for prompt in &request.prompts {
        if prompt.is_empty() {
            return Err(ApiError::parameter(
                "prompt",
                "The prompt is empty: it must have at least one token.",
            ));
        }
        limits::token_ids("prompt", prompt, model.vocab_size)?;
        let max_tokens = room(model.max_model_len, prompt.len(), request)?;
        if request.min_tokens > max_tokens {
            return Err(ApiError::parameter(
                "min_tokens",
                format!(
                    "min_tokens is {}, but at most {max_tokens} tokens can be generated.",
                    request.min_tokens
                ),
            ));
        }
        for k in 0..request.n {
            let mut sampling = request.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(k as u64);
            sequences.push(Request {
                id: served.model.engine.next_id(),
                prompt: Arc::clone(prompt),
                sampling,
                max_tokens,
                min_tokens: request.min_tokens,
                stop_token_ids: stop_token_ids.clone(),
                priority: request.priority,
                cache_salt: request.cache_salt,
                prompt_logprobs: request.prompt_logprobs,
            });
        }
    }
    Ok(sequences)
}

/// Holds the scores that are asked for of all prompts to their limit. One prompt may have all that it can have.
fn check_prompt_scores(served: &Served, request: &GenerateRequest) -> Result<(), ApiError> {
    let Some(alternatives) = request.prompt_logprobs else {
        return Ok(());
    };
    let tokens: usize = request.prompts.iter().map(|prompt| prompt.len()).sum();
    let each = (alternatives as usize + 1).saturating_mul(request.n);
    let scores = tokens.saturating_mul(each);
    let model = &served.model;
    let alternatives_at_most = served.limits.max_logprobs.min(model.vocab_size) as usize;
    let alone = (alternatives_at_most + 1).saturating_mul(model.max_model_len as usize);
    let most = alone.max(MAX_PROMPT_SCORES);
    if scores <= most {
        return Ok(());
    }
    Err(ApiError::parameter(
        request.scored_for,
        format!(
            "{tokens} prompt tokens with {alternatives} alternatives each, scored for n = {}, have {scores} \
             log-probabilities; at most {most} are allowed in one request. Ask for fewer alternatives \
             or choices, or send several requests.",
            request.n
        ),
    ))
}

/// Tokens that may be generated after a prompt of this length.
fn room(limit: u32, prompt: usize, request: &GenerateRequest) -> Result<u32, ApiError> {
    let left = u32::try_from(prompt).map_or(0, |prompt| limit.saturating_sub(prompt));
    match request.max_tokens {
        Some(wanted) if wanted <= left => Ok(wanted),
        None if left > 0 => Ok(left),
        wanted => Err(ApiError::too_long(format!(
            "This model's maximum context length is {limit} tokens. However, your prompt has \
             {prompt} tokens and you asked for {} more. Shorten the prompt or lower max_tokens.",
            wanted.unwrap_or(1)
        ))),
    }
}
