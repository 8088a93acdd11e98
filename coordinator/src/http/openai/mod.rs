//! The OpenAI API over [`super::generate`]: how bodies are read and answers are written.
//!
//! Field names and their meaning are OpenAI's, and `vllm`'s where OpenAI has none. A field that is known
//! and cannot be honoured is refused, never ignored; an unknown field is ignored.

mod asked;
mod chat;
mod completions;
mod logprobs;
pub mod message;
pub mod models;
mod params;
mod prompt;
pub mod tokenize;
mod unsupported;
mod variables;

use super::ServerState;
use super::auth::Tenant;
use super::error::ApiError;
use super::generate::{Finish, StopReason, Usage};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, post};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The APIs that complete a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

impl Api {
    /// `object` of its answers.
    pub(super) fn object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion",
            Self::Completions => "text_completion",
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completions => "cmpl-",
        }
    }

    /// `id` of the answer to the request `id`.
    pub(super) fn name(self, id: &str) -> String {
        format!("{}{id}", self.prefix())
    }

    /// What [`Api::name`] was made of.
    pub(super) fn id(self, name: &str) -> Option<&str> {
        name.strip_prefix(self.prefix())
    }
}

/// Whose a request is, and what its answer is called.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// The request's.
    pub(super) id: String,
    pub(super) tenant: Tenant,
    /// `created` of its answer, in seconds since 1970.
    pub(super) created: u64,
    /// What was drawn for it before; `None`: its own, or one is drawn now.
    pub(super) seed: Option<u64>,
}

impl Call {
    /// A request that has just arrived.
    pub(super) fn now(id: String, tenant: Tenant) -> Self {
        Self {
            id,
            tenant,
            created: crate::clock::unix_seconds(),
            seed: None,
        }
    }
}

/// The whole answer to a body.
///
/// # Errors
/// As to whoever sends it.
pub(super) async fn answer(
    state: &ServerState,
    api: Api,
    body: &[u8],
    call: Call,
) -> Result<Response, ApiError> {
    match api {
        Api::Chat => asked::answer::<chat::Writer>(state, body, call).await,
        Api::Completions => asked::answer::<completions::Writer>(state, body, call).await,
    }
}

/// What answers requests of an API.
pub(super) fn route(api: Api) -> MethodRouter<Arc<ServerState>> {
    match api {
        Api::Chat => post(asked::handle::<chat::Writer>),
        Api::Completions => post(asked::handle::<completions::Writer>),
    }
}

/// Scored tokens of an answer that is written at once; each may have dozens of alternatives.
const INLINE_SCORED: usize = 1024;

/// Whether writing an answer takes so long that others would wait for it.
fn is_long(usage: Usage, n: usize, is_scored: bool) -> bool {
    is_scored && usage.prompt_tokens * n + usage.completion_tokens > INLINE_SCORED
}

/// A whole answer, which `write` makes: off the async threads if it is a long one.
async fn written(
    write: impl FnOnce() -> serde_json::Result<Vec<u8>> + Send + 'static,
    is_long: bool,
) -> Result<Response, ApiError> {
    let written = if is_long {
        tokio::task::spawn_blocking(write).await.map_err(|error| {
            tracing::error!(%error, "writing an answer panicked");
            ApiError::internal("The answer could not be written.")
        })?
    } else {
        write()
    };
    let body = written.expect("our answers are representable in JSON");
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// `usage`.
#[derive(Debug, Serialize)]
struct UsageBody {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: usize,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            completion_tokens: usage.completion_tokens,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: usage.cached_tokens,
            },
        }
    }
}

/// Which usage a stream reports, from `stream_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct StreamUsage {
    /// In a chunk of its own at the end; the others say `null`.
    at_end: bool,
    /// In every chunk.
    continuous: bool,
}

impl StreamUsage {
    /// The `usage` field of a chunk.
    fn chunk(self, usage: Usage) -> ChunkUsage {
        match self {
            Self {
                continuous: true, ..
            } => ChunkUsage::Counts(usage.into()),
            Self { at_end: true, .. } => ChunkUsage::Null,
            _ => ChunkUsage::Absent,
        }
    }
}

/// The `usage` field of a chunk.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum ChunkUsage {
    Absent,
    Null,
    Counts(UsageBody),
}

impl ChunkUsage {
    fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

/// What ended a choice, as two fields of its JSON.
fn finish_fields(finish: Option<Finish>) -> (Option<&'static str>, Option<StopReason>) {
    match finish {
        Some(finish) => (Some(finish.reason), finish.stop),
        None => (None, None),
    }
}
