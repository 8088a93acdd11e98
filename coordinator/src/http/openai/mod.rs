//! The OpenAI API over [`super::generate`]: how bodies are read and answers are written.
//!
//! Field names and their meaning are OpenAI's, and `vllm`'s where OpenAI has none. A field that is known
//! and cannot be honoured is refused, never ignored; an unknown field is ignored.

pub mod chat;
pub mod completions;
mod logprobs;
pub mod message;
pub mod models;
mod params;
mod prompt;
pub mod tokenize;
mod unsupported;

use super::generate::{Finish, StopReason, Usage};
use serde::Serialize;

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
