//! `/v1/completions`: prompts as text or tokens, one or many.
//!
//! Streamed and whole answers are made of the same `Piece`s, so they cannot differ.

use super::asked::Head;
use super::logprobs::{Legacy, PromptScores};
use super::params::Extra;
use super::prompt::{Prompt, PromptInput};
use super::{Api, ChunkUsage, StreamUsage, finish_fields};
use crate::http::body;
use crate::http::error::ApiError;
use crate::http::generate::{Delta, GenerateRequest, Generation, StopReason, Usage};
use crate::http::limits::Whole;
use crate::http::sse::{Dialect, Frames};
use crate::text::detokenize::Detokenizer;
use crate::text::pieces::Pieces;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use topology::wire::TokenScore;

/// `max_tokens` where a request does not say, whatever the model's files propose; OpenAI's, and `vllm`'s.
const DEFAULT_MAX_TOKENS: u32 = 16;

#[derive(Debug, Deserialize)]
struct Body {
    prompt: PromptInput,
    echo: Option<bool>,
    logprobs: Option<Whole>,
    add_special_tokens: Option<bool>,
}

impl super::asked::Writer for Writer {
    const API: Api = Api::Completions;

    async fn read(head: &Head<'_>, bytes: &[u8]) -> Result<(GenerateRequest, Self), ApiError> {
        let Head {
            call,
            served,
            params,
            streaming,
        } = head;
        let body: Body = body::parse(bytes)?;
        let echo = body.echo == Some(true);
        let logprobs = super::params::logprobs(served, "logprobs", body.logprobs)?;
        let truncate = params.truncate_prompt_tokens(served)?;
        let special = body.add_special_tokens != Some(false);
        let prompts = body.prompt.resolve(served, special, truncate).await?;
        let extra = Extra {
            prompts: prompts.iter().map(|it| Arc::clone(&it.tokens)).collect(),
            default_max_tokens: Some(DEFAULT_MAX_TOKENS),
            logprobs,
            echo,
        };
        let request = params.request(served, call.tenant, extra)?;
        let writer = Self {
            id: Self::API.name(&call.id),
            created: call.created,
            model: served.model.name().to_owned(),
            pieces: served.model.text.tokenizer.pieces(),
            skip_special: params.skip_special_tokens(),
            n: request.n,
            choices: vec![ChoiceState::default(); prompts.len() * request.n],
            prompts,
            echo,
            logprobs: logprobs.is_some(),
            prompt_logprobs: params.prompt_logprobs(served)?.is_some(),
            token_ids: params.return_token_ids(),
            usage: streaming.unwrap_or_default(),
        };
        Ok((request, writer))
    }

    async fn whole(mut self, mut generation: Generation) -> Result<Response, ApiError> {
        let mut choices: Vec<Piece> = (0..self.choices.len()).map(Piece::new).collect();
        while let Some(delta) = generation.next().await? {
            let piece = self.piece(delta);
            choices[piece.index].append(piece);
        }
        let (usage, is_scored) = (generation.usage(), self.logprobs || self.prompt_logprobs);
        let is_long = super::is_long(usage, self.n, is_scored);
        let write = move || {
            let usage = ChunkUsage::Counts(usage.into());
            serde_json::to_vec(&self.answer(choices, usage))
        };
        super::written(write, is_long).await
    }
}

/// Turns deltas into pieces of choices.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a field of the request, independent of the others"
)]
#[derive(Debug)]
pub(super) struct Writer {
    id: String,
    created: u64,
    model: String,
    pieces: Arc<Pieces>,
    skip_special: bool,
    n: usize,
    prompts: Vec<Prompt>,
    choices: Vec<ChoiceState>,
    echo: bool,
    logprobs: bool,
    prompt_logprobs: bool,
    token_ids: bool,
    usage: StreamUsage,
}

#[derive(Clone, Debug, Default)]
struct ChoiceState {
    begun: bool,
    /// Characters of the echoed prompt, before which no generated token stands.
    offset: usize,
}

/// What is new in one choice, or all of it.
#[derive(Debug, Serialize)]
struct Piece {
    index: usize,
    text: String,
    logprobs: Option<Legacy>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptScores>,
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Piece>,
    #[serde(skip_serializing_if = "ChunkUsage::is_absent")]
    usage: ChunkUsage,
}

impl Piece {
    fn new(index: usize) -> Self {
        Self {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            prompt_token_ids: None,
            prompt_logprobs: None,
        }
    }

    /// Whether there is nothing in it to send.
    fn is_empty(&self) -> bool {
        self.text.is_empty()
            && self.logprobs.is_none()
            && self.token_ids.is_none()
            && self.prompt_token_ids.is_none()
            && self.finish_reason.is_none()
    }

    fn append(&mut self, next: Self) {
        self.text += &next.text;
        self.finish_reason = next.finish_reason;
        self.stop_reason = next.stop_reason;
        match (&mut self.logprobs, next.logprobs) {
            (Some(all), Some(next)) => all.extend(next),
            (all, next) => *all = all.take().or(next),
        }
        match (&mut self.token_ids, next.token_ids) {
            (Some(all), Some(next)) => all.extend(next),
            (all, next) => *all = all.take().or(next),
        }
        self.prompt_token_ids = self.prompt_token_ids.take().or(next.prompt_token_ids);
        self.prompt_logprobs = self.prompt_logprobs.take().or(next.prompt_logprobs);
    }
}

impl Writer {
    fn piece(&mut self, mut delta: Delta) -> Piece {
        let mut piece = Piece::new(delta.choice);
        if !self.choices[delta.choice].begun {
            self.choices[delta.choice].begun = true;
            let scores = delta.prompt_scores.take();
            self.begin(&mut piece, scores.unwrap_or_default());
        }
        piece.text += &delta.text;
        let offset = self.choices[delta.choice].offset;
        if let Some(token) = delta.token {
            if self.logprobs {
                let new = || Legacy::new(&self.pieces);
                let logprobs = piece.logprobs.get_or_insert_with(new);
                logprobs.push(token.id, token.score, offset + token.offset);
            }
            if self.token_ids {
                piece.token_ids.get_or_insert_default().push(token.id);
            }
        }
        (piece.finish_reason, piece.stop_reason) = finish_fields(delta.finish);
        piece
    }

    /// What a choice starts with: its prompt, as far as that is asked for.
    fn begin(&mut self, piece: &mut Piece, scores: Vec<TokenScore>) {
        let prompt = &self.prompts[piece.index / self.n];
        if self.token_ids {
            piece.prompt_token_ids = Some(prompt.tokens.to_vec());
        }
        if self.echo {
            self.echo(piece, &scores);
        }
        if self.prompt_logprobs {
            piece.prompt_logprobs = Some(PromptScores {
                pieces: Arc::clone(&self.pieces),
                tokens: Arc::clone(&self.prompts[piece.index / self.n].tokens),
                scores,
            });
        }
    }

    fn echo(&mut self, piece: &mut Piece, scores: &[TokenScore]) {
        let prompt = &self.prompts[piece.index / self.n];
        let mut text = String::new();
        let mut chars = 0;
        let pieces = Arc::clone(&self.pieces);
        let mut detokenizer = Detokenizer::at_start(pieces, self.skip_special);
        let mut legacy = self.logprobs.then(|| Legacy::new(&self.pieces));
        let scores = std::iter::once(None).chain(scores.iter().map(Some));
        for (&token, score) in prompt
            .tokens
            .iter()
            .zip(scores.chain(std::iter::repeat(None)))
        {
            if let Some(legacy) = &mut legacy {
                legacy.push(token, score.cloned(), chars);
            }
            let before = text.len();
            detokenizer.push(token, &mut text);
            chars += text[before..].chars().count();
        }
        detokenizer.finish(&mut text);
        // The prompt as it was given, where it was given as text.
        let text = prompt.text.clone().unwrap_or(text);
        self.choices[piece.index].offset = text.chars().count();
        piece.text = text;
        piece.logprobs = legacy;
    }

    fn answer(&self, choices: Vec<Piece>, usage: ChunkUsage) -> Answer<'_> {
        Answer {
            id: &self.id,
            object: Api::Completions.object(),
            created: self.created,
            model: &self.model,
            choices,
            usage,
        }
    }
}

impl Dialect for Writer {
    fn open(&mut self, _: &mut Frames) {}

    fn delta(&mut self, delta: Delta, usage: Usage, frames: &mut Frames) {
        let piece = self.piece(delta);
        if !piece.is_empty() {
            frames.data(&self.answer(vec![piece], self.usage.chunk(usage)));
        }
    }

    fn close(&mut self, usage: Usage, frames: &mut Frames) {
        if self.usage.at_end {
            frames.data(&self.answer(Vec::new(), ChunkUsage::Counts(usage.into())));
        }
        frames.literal("data: [DONE]\n\n");
    }
}
