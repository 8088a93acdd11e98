//! Log-probabilities in the three shapes clients know.
//!
//! A token that is a part of a character is written `bytes:\xe4\xb8`, so that different tokens
//! keep different names; chat has the bytes themselves beside it.

use crate::http::generate::TokenOut;
use crate::text::pieces::Pieces;
use serde::Serialize;
use serde_json::{Map, Value, json};
use topology::wire::TokenScore;

/// JSON has no infinity; this is what `vllm` writes for "impossible".
const LEAST: f32 = -9999.0;

/// `logprobs` of `/v1/completions`; all lists have an entry for each token.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Legacy {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl Legacy {
    /// Adds a token. Without a score it is the first of a prompt, of which nothing can be said.
    pub(super) fn push(
        &mut self,
        pieces: &Pieces,
        id: u32,
        score: Option<&TokenScore>,
        offset: usize,
    ) {
        self.tokens.push(pieces.token_text(id));
        self.token_logprobs.push(score.map(|it| finite(it.logprob)));
        self.text_offset.push(offset);
        self.top_logprobs.push(score.map(|score| {
            let mut top = Map::new();
            for (token, logprob) in &score.top {
                // Two tokens may have the same text; the likelier one speaks for both.
                top.entry(pieces.token_text(*token))
                    .or_insert_with(|| json!(finite(*logprob)));
            }
            top.entry(pieces.token_text(id))
                .or_insert_with(|| json!(finite(score.logprob)));
            top
        }));
    }

    /// Appends those of the text that follows.
    pub(super) fn extend(&mut self, next: Self) {
        self.tokens.extend(next.tokens);
        self.token_logprobs.extend(next.token_logprobs);
        self.top_logprobs.extend(next.top_logprobs);
        self.text_offset.extend(next.text_offset);
    }
}

/// One entry of `logprobs.content` of a chat.
#[derive(Debug, Serialize)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    chosen: Scored,
    top_logprobs: Vec<Scored>,
}

#[derive(Debug, Serialize)]
struct Scored {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatToken {
    /// The entry of a generated token; `None` if it was not scored.
    pub(super) fn new(pieces: &Pieces, token: &TokenOut) -> Option<Self> {
        let score = token.score.as_ref()?;
        let scored = |id, logprob| Scored {
            token: pieces.token_text(id),
            logprob: finite(logprob),
            bytes: pieces.token_bytes(id),
        };
        Some(Self {
            chosen: scored(token.id, score.logprob),
            top_logprobs: score
                .top
                .iter()
                .map(|&(id, logprob)| scored(id, logprob))
                .collect(),
        })
    }
}

/// `prompt_logprobs`, as in `vllm`: for each token its alternatives by id, null for the first.
pub(super) fn prompt(pieces: &Pieces, tokens: &[u32], scores: &[TokenScore]) -> Value {
    let mut entries = vec![Value::Null];
    for (id, score) in tokens.iter().skip(1).zip(scores) {
        let entry = |id: u32, logprob: f32, rank: u32| {
            json!({
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": pieces.token_text(id),
            })
        };
        let mut alternatives = Map::new();
        alternatives.insert(id.to_string(), entry(*id, score.logprob, score.rank));
        for (rank, (id, logprob)) in (1..).zip(&score.top) {
            alternatives
                .entry(id.to_string())
                .or_insert_with(|| entry(*id, *logprob, rank));
        }
        entries.push(alternatives.into());
    }
    entries.into()
}

fn finite(logprob: f32) -> f32 {
    // `max` is the number if the other is NaN.
    logprob.max(LEAST)
}
