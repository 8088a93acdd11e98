//! Requests as the words that the kernel of `cuda.cu` reads, and answers from the words that it writes.
//!
//! What happens to one token's logit is collected here first, so that one thread can do it. Pure: no device.
//!
//! Invariant: what was packed names rows, tokens and lists that are there, if the requests passed [`super::check`].

use super::score::Sum;
use super::{IN_PROMPT, changes_logits, has_penalty, is_greedy, philox};
use crate::cuda::launch::unsigned;
use crate::sampling::{Choice, SampleParams, SampleRequest, SampleResult, Score};

/// 32-bit words that go to the device at once: the lists of some hundred requests with penalties over long texts.
pub(super) const WORDS: usize = 1 << 20;

/// 32-bit words that come back at once.
pub(super) const RESULT_WORDS: usize = 1 << 18;

/// Alternatives that the kernel can report; requests for more are rare.
const MOST_TOP: usize = 1024;

/// Words of a row, a request, a change and a result, as in `cuda.cu`.
const ROW: usize = 3;
const EDIT: usize = 6;
const REQUEST: usize = 19;
pub(super) const RESULT: usize = 6;

/// The word of a request that says where its alternatives go.
const TOP_AT: usize = 4;

/// Kinds of requests, as in `cuda.cu`.
const SCORE: u32 = 0;
const GREEDY: u32 = 1;
const GREEDY_CHANGED: u32 = 2;
const DRAW: u32 = 3;

/// Stands for all tokens, or for none, as in `cuda.cu`.
const EVERY: u32 = u32::MAX;

/// What is to go to the device.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// Changes of logits, biases and allowed tokens.
    lists: Vec<u32>,
    requests: Vec<[u32; REQUEST]>,
    /// Places of `requests` in the caller's order, and the alternatives that they want reported.
    places: Vec<(usize, Option<usize>)>,
    rows: Vec<[u32; ROW]>,
    /// Words of results.
    results: usize,
    changes: Vec<Change>,
}

/// Something that happens to a token's logit. Sorts by token, and then in the order in which it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Change {
    token: u32,
    kind: ChangeKind,
    /// Where several biases are added to one token, the order matters.
    place: usize,
    bias: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ChangeKind {
    Bias,
    Prompt,
    Generated,
    Banned,
}

/// The answer in a result's words; `top` begins with the alternatives, where `logprobs` asks for any.
fn read_result(logprobs: Option<usize>, vocab: usize, words: &[u32], top: &[u32]) -> SampleResult {
    let sum = Sum {
        max: f32::from_bits(words[3]),
        total: u64::from(words[5]) << 32 | u64::from(words[4]),
    };
    let score = |count: usize| Score {
        logprob: sum.logprob(f32::from_bits(words[2])),
        rank: words[1],
        top: top[..2 * count.min(vocab)]
            .chunks_exact(2)
            .map(|pair| (pair[0], sum.logprob(f32::from_bits(pair[1]))))
            .collect(),
    };
    SampleResult {
        token: words[0],
        score: logprobs.map(score),
    }
}

/// Whether such requests fit at once, counted generously, and stand in the order of their rows, so that an index among
/// them is one among their results.
pub(super) fn fits(requests: &[SampleRequest]) -> bool {
    let words = |request: &SampleRequest| {
        let lists = match &request.choice {
            Choice::Score(_) => 0,
            Choice::Sample(params) => {
                let changes = params.logit_bias.len() + params.banned.len();
                let occurrences = params.prompt.len() + params.generated.len() + 1;
                (EDIT + 1) * (changes + occurrences) + params.allowed.len()
            }
        };
        ROW + REQUEST + lists
    };
    let top = |request: &SampleRequest| request.logprobs.unwrap_or(0);
    let results = |request| RESULT + 2 * top(request);
    requests.iter().map(words).sum::<usize>() <= WORDS
        && requests.iter().map(results).sum::<usize>() <= RESULT_WORDS
        && requests.iter().all(|request| top(request) <= MOST_TOP)
        && requests.is_sorted_by_key(|request| request.row)
}

impl Packed {
    /// Whether there are no requests.
    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// How many requests there are.
    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }

    /// How many rows of logits they are about.
    pub(super) fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Words of results.
    pub(super) fn result_words(&self) -> usize {
        self.results
    }

    /// Reads the answers from the words of all results, each with its place.
    pub(super) fn read(
        &self,
        words: &[u32],
        vocab: usize,
    ) -> impl Iterator<Item = (usize, SampleResult)> {
        let places = self.places.iter().zip(&self.requests).enumerate();
        places.map(move |(i, (&(place, logprobs), request))| {
            let top = &words[request[TOP_AT] as usize..];
            let result = &words[i * RESULT..][..RESULT];
            (place, read_result(logprobs, vocab, result, top))
        })
    }

    /// Forgets all requests.
    pub(super) fn clear(&mut self) {
        self.lists.clear();
        self.requests.clear();
        self.places.clear();
        self.rows.clear();
        self.results = 0;
    }

    fn words(&self) -> usize {
        self.lists.len() + self.requests.len() * REQUEST + self.rows.len() * ROW
    }

    /// Adds a request that was checked. `false`, and nothing added, where it does not fit.
    pub(super) fn push(&mut self, place: usize, request: &SampleRequest, vocab: usize) -> bool {
        let top = request.logprobs.unwrap_or(0).min(vocab);
        let lists = self.lists.len();
        let results = self.results + RESULT + 2 * top;
        let mut words = self.pack(request, vocab);
        if top > MOST_TOP || results > RESULT_WORDS || self.words() + REQUEST + ROW > WORDS {
            self.lists.truncate(lists);
            return false;
        }
        // Alternatives stand behind the results of all requests; `write` adds where that is.
        words[TOP_AT] = unsigned(self.results - self.requests.len() * RESULT);
        self.results = results;
        let index = unsigned(self.requests.len());
        self.requests.push(words);
        self.places.push((place, request.logprobs));
        let row = unsigned(request.row);
        match self.rows.last_mut() {
            Some(last) if last[0] == row => last[2] += 1,
            _ => self.rows.push([row, index, 1]),
        }
        true
    }

    /// A request's words, its lists added to the others.
    fn pack(&mut self, request: &SampleRequest, vocab: usize) -> [u32; REQUEST] {
        let scored = u32::from(request.logprobs.is_some());
        let top = unsigned(request.logprobs.unwrap_or(0).min(vocab));
        let params = match &request.choice {
            Choice::Score(token) => {
                let mut words = [0; REQUEST];
                words[..4].copy_from_slice(&[SCORE, *token, scored, top]);
                return words;
            }
            Choice::Sample(params) => params,
        };
        let kind = match (is_greedy(params), changes_logits(params)) {
            (true, false) => GREEDY,
            (true, true) => GREEDY_CHANGED,
            (false, _) => DRAW,
        };
        let [u_low, u_high] = philox::words(philox::uniform(params.seed, params.position));
        let (top_k, top_p, min_p) = filters(params, vocab);
        let last = params.last.filter(|_| has_penalty(params));
        let (edits_at, mut edits) = self.pack_changes(params, vocab);
        if last.is_some() {
            // Behind the others, for a token that is none of theirs.
            self.lists.extend([EVERY, 0, 0, 0, edits_at, 0]);
            edits += 1;
        }
        let (allowed_at, allowed) = self.pack_allowed(params, vocab);
        [
            kind,
            0,
            scored,
            top,
            0, // `top_at`: `push` fills it in.
            u_low,
            u_high,
            (1.0 / params.temperature).to_bits(),
            min_p.to_bits(),
            top_p.to_bits(),
            top_k,
            params.repetition_penalty.to_bits(),
            params.presence_penalty.to_bits(),
            params.frequency_penalty.to_bits(),
            edits_at,
            edits,
            allowed_at,
            allowed,
            last.unwrap_or(EVERY),
        ]
    }

    /// Where the changes begin, and how many there are.
    fn pack_changes(&mut self, params: &SampleParams, vocab: usize) -> (u32, u32) {
        let Self { changes, lists, .. } = self;
        changes.clear();
        let mut add = |token: u32, kind, bias: f32| {
            if (token as usize) < vocab {
                let place = changes.len();
                let bias = bias.to_bits();
                changes.push(Change {
                    token,
                    kind,
                    place,
                    bias,
                });
            }
        };
        for &(token, bias) in &params.logit_bias {
            add(token, ChangeKind::Bias, bias);
        }
        if has_penalty(params) {
            params
                .prompt
                .iter()
                .for_each(|&token| add(token, ChangeKind::Prompt, 0.0));
            params
                .generated
                .iter()
                .for_each(|&token| add(token, ChangeKind::Generated, 0.0));
        }
        params
            .banned
            .iter()
            .for_each(|&token| add(token, ChangeKind::Banned, 0.0));
        changes.sort_unstable();

        let mut biases_at = unsigned(lists.len());
        let biases = changes
            .iter()
            .filter(|change| change.kind == ChangeKind::Bias);
        lists.extend(biases.map(|change| change.bias));
        let start = unsigned(lists.len());
        let mut count = 0;
        for of_token in changes.chunk_by(|a, b| a.token == b.token) {
            let times = |kind| unsigned(of_token.iter().filter(|c| c.kind == kind).count());
            let in_prompt = if times(ChangeKind::Prompt) > 0 {
                IN_PROMPT
            } else {
                0
            };
            let mark = in_prompt | times(ChangeKind::Generated);
            let banned = u32::from(times(ChangeKind::Banned) > 0);
            let biases = times(ChangeKind::Bias);
            // The second word is the kernel's, for what it has to put back.
            lists.extend([of_token[0].token, 0, mark, banned, biases_at, biases]);
            biases_at += biases;
            count += 1;
        }
        (start, count)
    }

    /// Where the allowed tokens begin, and how many there are; [`EVERY`] where all are.
    fn pack_allowed(&mut self, params: &SampleParams, vocab: usize) -> (u32, u32) {
        if params.allowed.is_empty() {
            return (0, EVERY);
        }
        let start = self.lists.len();
        let inside = params
            .allowed
            .iter()
            .filter(|token| (**token as usize) < vocab);
        self.lists.extend(inside);
        self.lists[start..].sort_unstable();
        let mut kept = start;
        for i in start..self.lists.len() {
            if i == start || self.lists[i] != self.lists[kept - 1] {
                self.lists[kept] = self.lists[i];
                kept += 1;
            }
        }
        self.lists.truncate(kept);
        (unsigned(start), unsigned(kept - start))
    }

    /// Writes lists, requests and rows; says where the latter two begin, and the end.
    pub(super) fn write(&mut self, words: &mut [u32]) -> (usize, usize, usize) {
        let results = unsigned(self.requests.len() * RESULT);
        for request in &mut self.requests {
            request[TOP_AT] += results;
        }
        let requests_at = self.lists.len();
        let rows_at = requests_at + self.requests.len() * REQUEST;
        let end = rows_at + self.rows.len() * ROW;
        words[..requests_at].copy_from_slice(&self.lists);
        words[requests_at..rows_at].copy_from_slice(self.requests.as_flattened());
        words[rows_at..end].copy_from_slice(self.rows.as_flattened());
        (requests_at, rows_at, end)
    }
}

/// Top-k, top-p and min-p, each neutral where it would remove nothing.
fn filters(params: &SampleParams, vocab: usize) -> (u32, f32, f32) {
    let top_k = if params.top_k < vocab {
        unsigned(params.top_k)
    } else {
        0
    };
    let top_p = if params.top_p < 1.0 {
        params.top_p.max(0.0)
    } else {
        1.0
    };
    (top_k, top_p, params.min_p.max(0.0))
}
