//! `/v1/chat/completions`: a conversation and the assistant's next words.
//!
//! Only text goes in and comes out. Templates come from the model, never from a request.

use super::asked::Head;
use super::logprobs::{ChatToken, PromptScores};
use super::params::Extra;
use super::prompt::{encode, may_fit};
use super::variables::Variables;
use super::{Api, ChunkUsage, StreamUsage, UsageBody, finish_fields};
use crate::http::body;
use crate::http::error::ApiError;
use crate::http::generate::{Delta, GenerateRequest, Generation, StopReason, Usage};
use crate::http::limits::{Bounded, MAX_MESSAGES, Whole};
use crate::http::served::Served;
use crate::http::sse::{Dialect, Frames};
use crate::text::pieces::Pieces;
use crate::text::template::{Ending, TemplateError};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) use super::message::ChatMessage;

/// Conversations of more bytes are rendered off the async threads.
const INLINE_BYTES: usize = 16 << 10;

#[derive(Debug, Deserialize)]
struct Body {
    messages: Bounded<ChatMessage, MAX_MESSAGES>,
    logprobs: Option<bool>,
    top_logprobs: Option<Whole>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    add_special_tokens: Option<bool>,
    echo: Option<bool>,
    chat_template_kwargs: Option<Variables>,
}

impl Body {
    fn logprobs(&self, served: &Served) -> Result<Option<u32>, ApiError> {
        let alternatives = super::params::logprobs(served, "top_logprobs", self.top_logprobs)?;
        if self.logprobs == Some(true) {
            return Ok(Some(alternatives.unwrap_or(0)));
        }
        if alternatives.unwrap_or(0) > 0 {
            return Err(ApiError::parameter(
                "top_logprobs",
                "top_logprobs can be set only when logprobs is true.",
            ));
        }
        Ok(None)
    }
}

impl super::asked::Writer for Writer {
    const API: Api = Api::Chat;

    async fn read(head: &Head<'_>, bytes: &[u8]) -> Result<(GenerateRequest, Self), ApiError> {
        let Head {
            call,
            served,
            params,
            streaming,
        } = head;
        let body: Body = body::parse(bytes)?;
        if body.echo == Some(true) {
            let message = "echo is available for /v1/completions only.";
            return Err(ApiError::parameter("echo", message));
        }
        let ending = ending(body.add_generation_prompt, body.continue_final_message)?;
        let logprobs = body.logprobs(served)?;
        let truncate = params.truncate_prompt_tokens(served)?;
        let variables = body.chat_template_kwargs.unwrap_or_default();
        let text = render(served, body.messages, variables, ending).await?;
        may_fit(served, &text, truncate)?;
        let mut tokens = encode(served, text, body.add_special_tokens == Some(true)).await?;
        if let Some(most) = truncate {
            tokens.drain(..tokens.len().saturating_sub(most));
        }
        let prompt: Arc<[u32]> = tokens.into();
        let extra = Extra {
            prompts: vec![Arc::clone(&prompt)],
            default_max_tokens: None,
            logprobs,
            echo: false,
        };
        let request = params.request(served, call.tenant, extra)?;
        let writer = Self {
            id: Self::API.name(&call.id),
            created: call.created,
            model: served.model.name().to_owned(),
            pieces: served.model.text.tokenizer.pieces(),
            n: request.n,
            logprobs: logprobs.is_some(),
            prompt_logprobs: params.prompt_logprobs(served)?.is_some(),
            token_ids: params.return_token_ids(),
            prompt,
            usage: streaming.unwrap_or_default(),
        };
        Ok((request, writer))
    }

    async fn whole(self, mut generation: Generation) -> Result<Response, ApiError> {
        let mut choices: Vec<Choice> = (0..self.n).map(|_| Choice::default()).collect();
        let mut prompt_logprobs = None;
        while let Some(mut delta) = generation.next().await? {
            let scores = delta.prompt_scores.take();
            if let Some(scores) = scores.filter(|_| self.prompt_logprobs) {
                // Those of other choices say the same.
                prompt_logprobs.get_or_insert_with(|| PromptScores {
                    pieces: Arc::clone(&self.pieces),
                    tokens: Arc::clone(&self.prompt),
                    scores,
                });
            }
            choices[delta.choice].append(delta, &self.pieces);
        }
        let (usage, is_scored) = (generation.usage(), self.logprobs || self.prompt_logprobs);
        let is_long = super::is_long(usage, self.n, is_scored);
        let write = move || {
            let choices = (0..).zip(choices);
            serde_json::to_vec(&Answer {
                id: &self.id,
                object: Self::API.object(),
                created: self.created,
                model: &self.model,
                choices: choices.map(|(i, it)| it.json(i, &self)).collect(),
                usage: usage.into(),
                prompt_logprobs,
                prompt_token_ids: self.token_ids.then_some(&*self.prompt),
            })
        };
        super::written(write, is_long).await
    }
}

/// What a conversation is to end with: the opening of an answer, unless a request says otherwise.
///
/// # Errors
/// 400 if it asks for two endings.
pub(super) fn ending(
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
) -> Result<Ending, ApiError> {
    let continue_final_message = continue_final_message == Some(true);
    if continue_final_message && add_generation_prompt == Some(true) {
        return Err(ApiError::parameter(
            "continue_final_message",
            "continue_final_message and add_generation_prompt exclude each other.",
        ));
    }
    Ok(Ending {
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
    })
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Value>,
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptScores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

/// The text of a conversation.
///
/// # Errors
/// 400 if the model has no template, its template objects, or `variables` are not for it.
pub(super) async fn render(
    served: &Arc<Served>,
    messages: Bounded<ChatMessage, MAX_MESSAGES>,
    variables: Variables,
    ending: Ending,
) -> Result<String, ApiError> {
    let Some(template) = &served.model.text.template else {
        return Err(ApiError::bad_request(
            "This model has no chat template, so it cannot chat. Use /v1/completions, or add a \
             chat_template to the model's tokenizer_config.json.",
        ));
    };
    let variables = variables.checked(template)?;
    let messages: Vec<_> = messages.0.into_iter().map(|it| it.0).collect();
    if messages.is_empty() {
        return Err(ApiError::parameter(
            "messages",
            "messages must not be empty.",
        ));
    }
    let size: usize = messages
        .iter()
        .map(crate::text::template::Message::size)
        .sum();
    let shared = Arc::clone(served);
    let render = move || match &shared.model.text.template {
        Some(template) => template.render(&messages, &variables, ending),
        None => Err(TemplateError::Failed("there is none".to_owned())),
    };
    let rendered = if size <= INLINE_BYTES {
        render()
    } else {
        tokio::task::spawn_blocking(render).await.map_err(|error| {
            tracing::error!(%error, "rendering a chat template panicked");
            ApiError::internal("The conversation could not be rendered.")
        })?
    };
    rendered.map_err(|error| ApiError::parameter("messages", error.to_string()))
}

#[derive(Debug, Default)]
struct Choice {
    text: String,
    logprobs: Vec<ChatToken>,
    token_ids: Vec<u32>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
}

impl Choice {
    fn append(&mut self, delta: Delta, pieces: &Pieces) {
        self.text += &delta.text;
        if let Some(token) = &delta.token {
            self.token_ids.push(token.id);
            self.logprobs.extend(ChatToken::new(pieces, token));
        }
        if delta.finish.is_some() {
            (self.finish_reason, self.stop_reason) = finish_fields(delta.finish);
        }
    }

    fn json(self, index: usize, writer: &Writer) -> Value {
        let mut choice = json!({
            "index": index,
            "message": {"role": "assistant", "content": self.text},
            "logprobs": writer.logprobs.then(|| json!({"content": self.logprobs})),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        });
        if writer.token_ids {
            choice["token_ids"] = json!(self.token_ids);
        }
        choice
    }
}

/// Writes what comes as chunks or whole.
#[derive(Debug)]
pub(super) struct Writer {
    id: String,
    created: u64,
    model: String,
    pieces: Arc<Pieces>,
    n: usize,
    logprobs: bool,
    prompt_logprobs: bool,
    token_ids: bool,
    prompt: Arc<[u32]>,
    usage: StreamUsage,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "ChunkUsage::is_absent")]
    usage: ChunkUsage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Default, Serialize)]
struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<ChunkLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<[u32; 1]>,
}

#[derive(Default, Serialize)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

#[derive(Serialize)]
struct ChunkLogprobs {
    content: [ChatToken; 1],
}

impl Writer {
    fn chunk(&self, choices: Vec<ChunkChoice>, usage: ChunkUsage) -> Chunk<'_> {
        Chunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.model,
            choices,
            usage,
            prompt_token_ids: None,
        }
    }
}

impl Dialect for Writer {
    fn open(&mut self, frames: &mut Frames) {
        for index in 0..self.n {
            // Clients concatenate what deltas say, so the role is said once.
            let delta = ChunkDelta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            let choice = ChunkChoice {
                index,
                delta,
                ..ChunkChoice::default()
            };
            let usage = Usage {
                prompt_tokens: self.prompt.len(),
                ..Usage::default()
            };
            let mut chunk = self.chunk(vec![choice], self.usage.chunk(usage));
            chunk.prompt_token_ids = (self.token_ids && index == 0).then_some(&*self.prompt);
            frames.data(&chunk);
        }
    }

    fn delta(&mut self, delta: Delta, usage: Usage, frames: &mut Frames) {
        let token = delta.token.as_ref();
        let scored = token.and_then(|token| ChatToken::new(&self.pieces, token));
        let logprobs = scored.map(|token| ChunkLogprobs { content: [token] });
        let token_ids = token.filter(|_| self.token_ids).map(|token| [token.id]);
        if !delta.text.is_empty() || logprobs.is_some() || token_ids.is_some() {
            let choice = ChunkChoice {
                index: delta.choice,
                delta: ChunkDelta {
                    role: None,
                    content: Some(delta.text),
                },
                logprobs,
                token_ids,
                ..ChunkChoice::default()
            };
            frames.data(&self.chunk(vec![choice], self.usage.chunk(usage)));
        }
        if delta.finish.is_some() {
            let (finish_reason, stop_reason) = finish_fields(delta.finish);
            let choice = ChunkChoice {
                index: delta.choice,
                finish_reason,
                stop_reason,
                ..ChunkChoice::default()
            };
            frames.data(&self.chunk(vec![choice], self.usage.chunk(usage)));
        }
    }

    fn close(&mut self, usage: Usage, frames: &mut Frames) {
        if self.usage.at_end {
            frames.data(&self.chunk(Vec::new(), ChunkUsage::Counts(usage.into())));
        }
        frames.literal("data: [DONE]\n\n");
    }
}
