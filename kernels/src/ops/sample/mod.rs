//! Chooses a token from a row of logits, and scores tokens.
//!
//! With logits `l: [vocab]`, in this order (parameters mean what they mean in `vllm`):
//!
//! 1. Scores: `logprob[i] = l[i] - ln Σ exp(l)`, from the raw logits.
//! 2. `logit_bias` is added; tokens that occur in prompt or output have positive logits divided and
//!    negative ones multiplied by `repetition_penalty`; generated tokens lose `frequency_penalty` for each time
//!    and `presence_penalty` once; `banned` tokens, and those not in `allowed` if it is not empty, are out.
//! 3. Temperature below 1e-5: the largest. Otherwise `w[i] = exp((l[i] - max l) / temperature)`; out are
//!    `w[i] < min_p`, all but the `top_k` likeliest, and, of what is left, all after the likeliest whose sum
//!    reaches `top_p` of it.
//! 4. The token is the first, by id, at which the running sum of `w` exceeds `u * Σ w`, with
//!    `u` from [`philox::uniform`].
//!
//! Sums are of whole numbers ([`whole`]): they are exact, so their order does not matter and every device draws the
//! same token from the same logits. What is less than a trillionth as likely as the likeliest counts as 0.
//!
//! Ties go to the smaller id, in exactly `top_k` tokens too (`vllm` keeps all that tie with the last).
//! Filters that remove nothing change nothing. NaN counts as minus infinity. A row without a finite
//! logit is a uniform one. If all tokens are out, the answer is token 0.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
mod packed;
mod philox;
mod score;
mod select;
#[cfg(test)]
mod tests;
#[cfg(test)]
#[cfg(feature = "cuda")]
mod twin;

use crate::backend::DeviceError;
use crate::cpu::exp::exp;
use crate::cpu::simd::{Isa, Kernel, Simd};
use crate::cpu::{CpuBackend, CpuTensor};
use crate::sampling::{Choice, SampleParams, SampleRequest, SampleResult};
use select::{Cut, key, nucleus};
use std::cell::RefCell;

/// Below this temperature the choice is greedy: dividing by it would leave nothing else.
const GREEDY_BELOW: f32 = 1e-5;

/// Weights are summed in pieces of this many, and a draw looks for its piece first.
const PIECE: usize = 1024;

/// A weight of 1, the largest there is, as a whole number: 2^40.
const ONE: f64 = 1_099_511_627_776.0;

/// The sum of this many weights fits 64 bits.
const MAX_VOCAB: usize = 1 << 24;

/// Marks a token of the prompt; the bits below count how often it was generated.
const IN_PROMPT: u32 = 1 << 31;

/// What a thread keeps from one request to the next.
#[derive(Default)]
struct Scratch {
    /// Logits after bias, penalties and bans; those that are out are minus infinity. `[vocab]`
    logits: Vec<f32>,
    /// Unnormalised probabilities. `[vocab]`
    weights: Vec<f32>,
    /// Sums of `weights` by pieces, whole numbers. `[vocab / PIECE]`
    sums: Vec<u64>,
    /// Tokens in an order that sorts.
    keys: Vec<u64>,
    /// Occurrences of tokens; zero between requests. `[vocab]`
    marks: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The fast path: requests divided among threads.
pub(crate) fn sample(
    cpu: &CpuBackend,
    logits: &CpuTensor,
    vocab: usize,
    requests: &[SampleRequest],
) -> Result<Vec<SampleResult>, DeviceError> {
    let checked = check((logits.rows(), logits.width()), vocab, requests);
    let checked = checked.and_then(|()| check_known(requests));
    checked.map_err(|reason| DeviceError::Failed {
        device: "cpu".into(),
        reason,
    })?;
    // Sampling a token costs about as much as eight multiply-adds.
    Ok(cpu.threads.map(requests.len(), 8 * vocab, |i| {
        let request = &requests[i];
        let row = &logits.row(request.row)[..vocab];
        SCRATCH.with_borrow_mut(|scratch| answer(cpu.isa, row, request, scratch))
    }))
}

/// Says what is wrong with requests to logits of `(rows, width)`.
fn check(
    (rows, width): (usize, usize),
    vocab: usize,
    requests: &[SampleRequest],
) -> Result<(), String> {
    if vocab == 0 || vocab > width || vocab > MAX_VOCAB {
        return Err(format!(
            "a vocabulary of {vocab} in logits of width {width}"
        ));
    }
    for request in requests {
        if request.row >= rows {
            let row = request.row;
            return Err(format!("sampling asks for row {row} of {rows}"));
        }
        if let Choice::Score(token) = request.choice
            && token as usize >= vocab
        {
            return Err(format!(
                "token {token} of a vocabulary of {vocab} has no score"
            ));
        }
    }
    Ok(())
}

/// Says what is wrong with requests whose answers are waited for: they have no part in what was deferred.
fn check_known(requests: &[SampleRequest]) -> Result<(), String> {
    let is_left = |request: &&SampleRequest| match &request.choice {
        Choice::Sample(params) => params.last.is_some(),
        Choice::Score(_) => false,
    };
    match requests.iter().find(is_left) {
        Some(request) => Err(format!(
            "row {} needs a token that nobody has waited for",
            request.row
        )),
        None => Ok(()),
    }
}

fn answer(isa: Isa, row: &[f32], request: &SampleRequest, scratch: &mut Scratch) -> SampleResult {
    let token = match &request.choice {
        Choice::Score(token) => *token,
        Choice::Sample(params) => choose(isa, row, params, scratch),
    };
    let score = request
        .logprobs
        .map(|top| score::score(isa, row, (token, top), scratch));
    SampleResult { token, score }
}

fn choose(isa: Isa, row: &[f32], params: &SampleParams, scratch: &mut Scratch) -> u32 {
    let greedy = is_greedy(params);
    if greedy && !changes_logits(params) {
        return argmax(row);
    }
    adjust(row, params, scratch);
    if greedy {
        return argmax(&scratch.logits);
    }
    draw(isa, params, scratch)
}

fn is_greedy(params: &SampleParams) -> bool {
    params.temperature < GREEDY_BELOW || params.temperature.is_nan()
}

/// Whether any parameter changes logits before the choice.
fn changes_logits(params: &SampleParams) -> bool {
    has_penalty(params)
        || !params.logit_bias.is_empty()
        || !params.banned.is_empty()
        || !params.allowed.is_empty()
}

#[expect(clippy::float_cmp, reason = "neutral values are exact")]
fn has_penalty(params: &SampleParams) -> bool {
    params.repetition_penalty != 1.0
        || params.frequency_penalty != 0.0
        || params.presence_penalty != 0.0
}

/// The largest, the first of equals; NaN never; 0 where there is nothing.
#[expect(clippy::float_cmp, reason = "the maximum is one of the values")]
fn argmax(values: &[f32]) -> u32 {
    let max = maximum(values);
    let place = values.iter().position(|&value| value == max).unwrap_or(0);
    u32::try_from(place).expect("the vocabulary is below 2^32")
}

/// The largest value that is not NaN, or minus infinity.
fn maximum(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for vector in vectors {
        for (lane, &value) in lanes.iter_mut().zip(vector) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    let all = lanes.iter().chain(rest);
    all.fold(
        f32::NEG_INFINITY,
        |max, &value| if value > max { value } else { max },
    )
}

/// A finite number for any logit, so that only what is ruled out is minus infinity.
fn finite(logit: f32) -> f32 {
    if logit > f32::MIN {
        logit.min(f32::MAX)
    } else {
        f32::MIN
    }
}

/// Step 2, into `scratch.logits`.
fn adjust(row: &[f32], params: &SampleParams, scratch: &mut Scratch) {
    let Scratch { logits, marks, .. } = scratch;
    logits.clear();
    logits.extend(row.iter().map(|&logit| finite(logit)));
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = finite(*logit + bias);
        }
    }
    if has_penalty(params) {
        penalise(logits, params, marks);
    }
    for &token in &params.banned {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if !params.allowed.is_empty() {
        marks.resize(row.len().max(marks.len()), 0);
        let inside = |token: &&u32| (**token as usize) < row.len();
        for &token in params.allowed.iter().filter(inside) {
            marks[token as usize] = 1;
        }
        for (logit, mark) in logits.iter_mut().zip(marks.iter()) {
            *logit = if *mark == 0 {
                f32::NEG_INFINITY
            } else {
                *logit
            };
        }
        for &token in params.allowed.iter().filter(inside) {
            marks[token as usize] = 0;
        }
    }
}

/// Applies the three penalties, once to each token that occurs.
fn penalise(logits: &mut [f32], params: &SampleParams, marks: &mut Vec<u32>) {
    marks.resize(logits.len().max(marks.len()), 0);
    let vocab = logits.len();
    let inside = |token: &&u32| (**token as usize) < vocab;
    for &token in params.prompt.iter().filter(inside) {
        marks[token as usize] |= IN_PROMPT;
    }
    for &token in params.generated.iter().filter(inside) {
        marks[token as usize] += 1;
    }
    for &token in params.prompt.iter().chain(&params.generated).filter(inside) {
        let token = token as usize;
        // Zero when the token was met before.
        let mark = std::mem::take(&mut marks[token]);
        if mark == 0 {
            continue;
        }
        let logit = &mut logits[token];
        let factor = params.repetition_penalty;
        *logit = if *logit > 0.0 {
            *logit / factor
        } else {
            *logit * factor
        };
        let times = mark & !IN_PROMPT;
        if times > 0 {
            *logit -= params.frequency_penalty * times as f32 + params.presence_penalty;
        }
        *logit = finite(*logit);
    }
}

/// Steps 3 and 4 on `scratch.logits`.
fn draw(isa: Isa, params: &SampleParams, scratch: &mut Scratch) -> u32 {
    let max = maximum(&scratch.logits);
    if max == f32::NEG_INFINITY {
        return 0;
    }
    weigh(isa, scratch, max, 1.0 / params.temperature);
    let Scratch {
        logits,
        weights,
        sums,
        keys,
        ..
    } = scratch;
    if params.min_p > 0.0 {
        for weight in weights.iter_mut().filter(|weight| **weight < params.min_p) {
            *weight = 0.0;
        }
    }
    let top_k = (1..logits.len())
        .contains(&params.top_k)
        .then_some(params.top_k);
    let top_p = (params.top_p < 1.0).then_some(f64::from(params.top_p.max(0.0)));
    if top_k.is_some() || top_p.is_some() {
        keys.clear();
        let likely = (0_u32..).zip(logits.iter()).zip(weights.iter());
        keys.extend(
            likely
                .filter(|(_, w)| whole(**w) > 0)
                .map(|((id, logit), _)| key(*logit, id)),
        );
    }
    if let Some(k) = top_k.filter(|&k| k < keys.len()) {
        let (_, last, _) = keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        Cut(*last).apply(logits, weights);
        keys.truncate(k);
    }
    let mut total = sum_pieces(isa, weights, sums);
    if let Some(p) = top_p {
        nucleus(keys, weights, share(p, total)).apply(logits, weights);
        total = sum_pieces(isa, weights, sums);
    }
    let u = philox::uniform(params.seed, params.position);
    find(weights, sums, high_half(u, total))
}

/// `p * total`, without its fraction. The same on every device: one rounded product.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "p is in [0, 1), and a share of 2^53 or more may be rounded"
)]
fn share(p: f64, total: u64) -> u64 {
    (p * total as f64) as u64
}

/// `u * total` where `u` is a fraction of 2^64.
fn high_half(u: u64, total: u64) -> u64 {
    ((u128::from(u) * u128::from(total)) >> 64) as u64
}

/// A weight as a whole number: `weight * 2^40`, rounded to nearest even. Anything but a positive number is 0.
#[inline(always)]
fn whole(weight: f32) -> u64 {
    // Added to this, a smaller number is rounded to an integer, which is then in the low bits.
    const ROUND: f64 = 4_503_599_627_370_496.0; // 2^52
    let bits = (f64::from(weight) * ONE + ROUND).to_bits() & ((1 << 52) - 1);
    if weight > 0.0 { bits } else { 0 }
}

/// `weights = exp((logits - max) * factor)`.
fn weigh(isa: Isa, scratch: &mut Scratch, max: f32, factor: f32) {
    struct Weigh<'a> {
        logits: &'a [f32],
        weights: &'a mut [f32],
        max: f32,
        factor: f32,
    }
    impl Kernel for Weigh<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            for (weight, logit) in self.weights.iter_mut().zip(self.logits) {
                *weight = exp((logit - self.max) * self.factor);
            }
        }
    }
    let Scratch {
        logits, weights, ..
    } = scratch;
    weights.resize(logits.len(), 0.0);
    isa.run(Weigh {
        logits,
        weights,
        max,
        factor,
    });
}

/// Sums of pieces, and their sum.
fn sum_pieces(isa: Isa, weights: &[f32], sums: &mut Vec<u64>) -> u64 {
    struct Sums<'a> {
        weights: &'a [f32],
        sums: &'a mut Vec<u64>,
    }
    impl Kernel for Sums<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            for piece in self.weights.chunks(PIECE) {
                let mut sum = 0;
                for &weight in piece {
                    sum += whole(weight);
                }
                self.sums.push(sum);
            }
        }
    }
    sums.clear();
    isa.run(Sums { weights, sums });
    sums.iter().sum()
}

/// The first token at which the running sum exceeds `target`, which is below the whole sum; 0 where that is 0.
fn find(weights: &[f32], sums: &[u64], target: u64) -> u32 {
    let mut before = 0;
    let mut passes = |sum: u64| {
        let found = before + sum > target;
        before += if found { 0 } else { sum };
        found
    };
    let Some(piece) = sums.iter().position(|&sum| passes(sum)) else {
        return 0;
    };
    let start = piece * PIECE;
    let within = weights[start..].iter().position(|&w| passes(whole(w)));
    u32::try_from(start + within.unwrap_or(0)).expect("the vocabulary is below 2^32")
}
