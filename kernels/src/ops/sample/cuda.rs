//! Sampling on a GPU: requests packed for the kernel of `cuda.cu`, and answers made of its results.
//!
//! A call's requests, their sparse lists and the rows they are about go to the device in one copy and the results
//! come back in one; more than fits goes in several. What happens to one token's logit is collected here
//! first, so that one thread can do it. Randomness and logarithms are computed here, by the CPU path's
//! own functions. A request that no memory taken at start can hold is answered by the CPU path.
//!
//! Invariant: every answer is the CPU path's, bit for bit, to the same logits.

#![expect(unsafe_code, reason = "the launcher is C")]

use super::score::Sum;
use super::{SCRATCH, answer, changes_logits, check, has_penalty, is_greedy, philox};
use crate::backend::{DeviceError, Element};
use crate::cpu::simd::Isa;
use crate::cuda::device::{Device, Memory, Pinned};
use crate::cuda::launch::{long, unsigned};
use crate::cuda::{CudaBackend, CudaTensor};
use crate::sampling::{Choice, SampleParams, SampleRequest, SampleResult, Score};
use std::ffi::{c_int, c_void};

/// 32-bit words that go to the device at once: the lists of some hundred requests with penalties over long texts.
const WORDS: usize = 1 << 20;

/// 32-bit words that come back at once.
const RESULT_WORDS: usize = 1 << 18;

/// Alternatives that the kernel can report; requests for more are rare.
const MOST_TOP: usize = 1024;

/// Words of a row, a request, a change and a result, as in `cuda.cu`.
const ROW: usize = 3;
const REQUEST: usize = 18;
const RESULT: usize = 6;

/// The word of a request that says where its alternatives go.
const TOP_AT: usize = 4;

/// Kinds of requests, as in `cuda.cu`.
const SCORE: u32 = 0;
const GREEDY: u32 = 1;
const GREEDY_CHANGED: u32 = 2;
const DRAW: u32 = 3;

unsafe extern "C" {
    fn cluster_sample(
        stream: *mut c_void,
        logits: *mut c_void,
        width: i64,
        vocab: i64,
        words: *mut c_void,
        requests_at: i64,
        rows_at: i64,
        rows: i64,
        results: *mut c_void,
    ) -> c_int;
}

/// Memory for requests and results, taken at start.
#[derive(Debug)]
pub(crate) struct Space {
    words: Memory,
    upload: Pinned,
    results: Memory,
    download: Pinned,
    packed: Packed,
}

/// What is to go to the device.
#[derive(Debug, Default)]
struct Packed {
    /// Changes of logits, biases and allowed tokens.
    lists: Vec<u32>,
    requests: Vec<[u32; REQUEST]>,
    /// Places of `requests` in the caller's order.
    places: Vec<usize>,
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

impl Space {
    /// Takes the memory.
    pub(crate) fn new(device: &Device) -> Result<Self, DeviceError> {
        let (up, down) = (WORDS * size_of::<u32>(), RESULT_WORDS * size_of::<u32>());
        Ok(Self {
            words: device.allocate("sampling requests", up)?,
            upload: device.pinned("sampling requests", up)?,
            results: device.allocate("sampling results", down)?,
            download: device.pinned("sampling results", down)?,
            packed: Packed::default(),
        })
    }
}

/// The operation, as [`super::sample`] defines it. Logits are f32.
pub(crate) fn sample(
    cuda: &CudaBackend,
    logits: &mut CudaTensor,
    vocab: usize,
    requests: &[SampleRequest],
) -> Result<Vec<SampleResult>, DeviceError> {
    assert_eq!(logits.element(), Element::F32, "logits are f32");
    check((logits.rows(), logits.width()), vocab, requests).map_err(|reason| {
        DeviceError::Failed {
            device: cuda.device.name().to_owned(),
            reason,
        }
    })?;
    // A block answers all requests about its row, so they have to follow each other.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&place| requests[place].row);

    let mut space = cuda.sampler();
    let mut results = vec![None; requests.len()];
    space.packed.clear();
    for place in order {
        let request = &requests[place];
        if space.packed.push(place, request, vocab) {
            continue;
        }
        space.run(cuda, logits, vocab, requests, &mut results)?;
        if !space.packed.push(place, request, vocab) {
            results[place] = Some(space.answer_on_host(cuda, logits, vocab, request)?);
        }
    }
    space.run(cuda, logits, vocab, requests, &mut results)?;
    Ok(results.into_iter().flatten().collect())
}

impl Space {
    /// Answers what is packed, and empties it.
    fn run(
        &mut self,
        cuda: &CudaBackend,
        logits: &mut CudaTensor,
        vocab: usize,
        requests: &[SampleRequest],
        results: &mut [Option<SampleResult>],
    ) -> Result<(), DeviceError> {
        if self.packed.requests.is_empty() {
            return Ok(());
        }
        let words: &mut [u32] = bytemuck::cast_slice_mut(self.upload.write()?);
        let (requests_at, rows_at, used) = self.packed.write(words);
        let bytes = used * size_of::<u32>();
        cuda.device
            .upload(&self.upload, bytes, (&mut self.words, 0))?;
        self.launch(cuda, logits, vocab, (requests_at, rows_at));
        cuda.check()?;
        let bytes = self.packed.results * size_of::<u32>();
        // Before the copy that is waited for, so that it is there to be read then.
        cuda.stop_clock();
        cuda.device
            .download((&self.results, 0), bytes, &mut self.download)?;
        let words: &[u32] = bytemuck::cast_slice(self.download.read()?);
        for (i, &place) in self.packed.places.iter().enumerate() {
            let top = self.packed.requests[i][TOP_AT] as usize..;
            let result = &words[i * RESULT..][..RESULT];
            results[place] = Some(read_result(&requests[place], vocab, result, &words[top]));
        }
        self.packed.clear();
        Ok(())
    }

    fn launch(
        &mut self,
        cuda: &CudaBackend,
        logits: &mut CudaTensor,
        vocab: usize,
        (requests_at, rows_at): (usize, usize),
    ) {
        let width = long(logits.width());
        // SAFETY: rows, tokens and lists are inside the logits and the words: `check` and `Packed` saw to it.
        let code = unsafe {
            cluster_sample(
                cuda.stream(),
                logits.pointer_mut(),
                width,
                long(vocab),
                self.words.pointer_mut(),
                long(requests_at),
                long(rows_at),
                long(self.packed.rows.len()),
                self.results.pointer_mut(),
            )
        };
        cuda.launched("sample", code);
    }

    /// For what is too large to pack: the CPU path, on a copy of the row.
    fn answer_on_host(
        &mut self,
        cuda: &CudaBackend,
        logits: &CudaTensor,
        vocab: usize,
        request: &SampleRequest,
    ) -> Result<SampleResult, DeviceError> {
        let mut row: Vec<f32> = Vec::with_capacity(vocab);
        let start = request.row * logits.width();
        while row.len() < vocab {
            let count = (vocab - row.len()).min(RESULT_WORDS);
            let at = (start + row.len()) * size_of::<f32>();
            let from = (logits.memory(), at);
            cuda.device
                .download(from, count * size_of::<f32>(), &mut self.download)?;
            let values: &[f32] = bytemuck::cast_slice(self.download.read()?);
            row.extend_from_slice(&values[..count]);
        }
        let isa = Isa::detect();
        Ok(SCRATCH.with_borrow_mut(|scratch| answer(isa, &row, request, scratch)))
    }
}

/// The answer in a result's words; `top` begins with the alternatives, if there are any.
fn read_result(request: &SampleRequest, vocab: usize, words: &[u32], top: &[u32]) -> SampleResult {
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
        score: request.logprobs.map(score),
    }
}

impl Packed {
    fn clear(&mut self) {
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
    fn push(&mut self, place: usize, request: &SampleRequest, vocab: usize) -> bool {
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
        self.places.push(place);
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
        let (edits_at, edits) = self.pack_changes(params, vocab);
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
                super::IN_PROMPT
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

    /// Where the allowed tokens begin, and how many there are; `u32::MAX` where all are.
    fn pack_allowed(&mut self, params: &SampleParams, vocab: usize) -> (u32, u32) {
        if params.allowed.is_empty() {
            return (0, u32::MAX);
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
    fn write(&mut self, words: &mut [u32]) -> (usize, usize, usize) {
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
