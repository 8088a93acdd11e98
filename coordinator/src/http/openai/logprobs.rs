//! Log-probabilities in the three shapes clients know.
//!
//! There may be a million of them in an answer: scores are kept as they came, and become text and names only while
//! they are written.
//!
//! A token that is a part of a character is written `bytes:\xe4\xb8`, so that different tokens
//! keep different names; chat has the bytes themselves beside it.

use crate::http::generate::TokenOut;
use crate::text::pieces::Pieces;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use serde_json::{Map, Value, json};
use std::iter::once;
use std::sync::Arc;
use topology::wire::TokenScore;

/// JSON has no infinity; this is what `vllm` writes for "impossible".
const LEAST: f32 = -9999.0;

/// `logprobs` of `/v1/completions`; all lists have an entry for each token.
#[derive(Debug)]
pub(super) struct Legacy {
    pieces: Arc<Pieces>,
    tokens: Vec<LegacyToken>,
}

#[derive(Debug)]
struct LegacyToken {
    id: u32,
    score: Option<TokenScore>,
    offset: usize,
}

impl Legacy {
    /// Of no token so far.
    pub(super) fn new(pieces: &Arc<Pieces>) -> Self {
        Self {
            pieces: Arc::clone(pieces),
            tokens: Vec::new(),
        }
    }

    /// Adds a token. Without a score it is the first of a prompt, of which nothing can be said.
    pub(super) fn push(&mut self, id: u32, score: Option<TokenScore>, offset: usize) {
        self.tokens.push(LegacyToken { id, score, offset });
    }

    /// Appends those of the text that follows.
    pub(super) fn extend(&mut self, next: Self) {
        self.tokens.extend(next.tokens);
    }

    fn top(&self, id: u32, score: &TokenScore) -> Map<String, Value> {
        let mut top = Map::new();
        for (token, logprob) in score.top.iter().chain(once(&(id, score.logprob))) {
            // Two tokens may have the same text; the likelier one speaks for both.
            top.entry(self.pieces.token_text(*token))
                .or_insert_with(|| json!(finite(*logprob)));
        }
        top
    }
}

impl Serialize for Legacy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = |it: &LegacyToken| self.pieces.token_text(it.id);
        let logprob = |it: &LegacyToken| it.score.as_ref().map(|score| finite(score.logprob));
        let top = |it: &LegacyToken| it.score.as_ref().map(|score| self.top(it.id, score));
        let offset = |it: &LegacyToken| it.offset;
        let mut fields = serializer.serialize_struct("Legacy", 4)?;
        fields.serialize_field("tokens", &Column(&self.tokens, text))?;
        fields.serialize_field("token_logprobs", &Column(&self.tokens, logprob))?;
        fields.serialize_field("top_logprobs", &Column(&self.tokens, top))?;
        fields.serialize_field("text_offset", &Column(&self.tokens, offset))?;
        fields.end()
    }
}

/// One of the lists: what is made of each token while it is written.
struct Column<'a, F>(&'a [LegacyToken], F);

impl<T: Serialize, F: Fn(&LegacyToken) -> T> Serialize for Column<'_, F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(&self.1))
    }
}

/// One entry of `logprobs.content` of a chat.
#[derive(Debug, serde::Serialize)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    chosen: Scored,
    top_logprobs: Vec<Scored>,
}

#[derive(Debug, serde::Serialize)]
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
#[derive(Debug)]
pub(super) struct PromptScores {
    pub(super) pieces: Arc<Pieces>,
    pub(super) tokens: Arc<[u32]>,
    /// Of the tokens after the first.
    pub(super) scores: Vec<TokenScore>,
}

impl Serialize for PromptScores {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pieces = &self.pieces;
        let scored = self.tokens.iter().skip(1).zip(&self.scores);
        let scored = scored.map(|(&id, score)| Some(Alternatives { pieces, id, score }));
        serializer.collect_seq(once(None).chain(scored))
    }
}

/// A token of a prompt, and others that could stand there.
struct Alternatives<'a> {
    pieces: &'a Pieces,
    id: u32,
    score: &'a TokenScore,
}

#[derive(serde::Serialize)]
struct Alternative {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl Serialize for Alternatives<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let entry = |id, logprob, rank| {
            let alternative = Alternative {
                logprob: finite(logprob),
                rank,
                decoded_token: self.pieces.token_text(id),
            };
            (id, alternative)
        };
        let own = entry(self.id, self.score.logprob, self.score.rank);
        let ranked = (1..).zip(&self.score.top);
        let others = ranked.filter(|(_, (id, _))| *id != self.id);
        let others = others.map(|(rank, &(id, logprob))| entry(id, logprob, rank));
        serializer.collect_map(once(own).chain(others))
    }
}

fn finite(logprob: f32) -> f32 {
    // `max` is the number if the other is NaN.
    logprob.max(LEAST)
}
