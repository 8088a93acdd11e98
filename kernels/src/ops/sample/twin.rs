//! The kernel of `cuda.cu` against the CPU path: the same answers, bit for bit.
//!
//! Runs under emulation, and on a device where there is one.

use super::tests::neutral;
use crate::backend::{Backend, Element, Precision};
use crate::batch::Batch;
use crate::cpu::{CpuBackend, CpuTensor};
use crate::cuda::{CudaBackend, CudaPending, CudaTensor, CudaWeight};
use crate::sampling::{Choice, SampleParams, SampleRequest};
use crate::testing::{Rng, bits, cuda_backend, tensor, tokens, upload, weight};

/// The same logits on both.
struct Twins {
    cpu: CpuBackend,
    cuda: CudaBackend,
    vocab: usize,
    host: CpuTensor,
    device: CudaTensor,
}

impl Twins {
    fn new(cuda: CudaBackend, values: &[f32], (width, vocab): (usize, usize)) -> Self {
        let cpu = CpuBackend::new(2, None).unwrap();
        let host = tensor(&cpu, values, width);
        let rows = values.len() / width;
        let mut device = cuda.allocate(rows, width, Precision::F32).unwrap();
        cuda.write(values, &mut device).unwrap();
        Self {
            cpu,
            cuda,
            vocab,
            host,
            device,
        }
    }

    /// Embeds tokens that are left to the device, and the same ones known: `[vocab, 3]` of f32 is the `table`.
    fn embed_left(&self, table: &(CudaWeight, Vec<f32>), left: &[(u32, u32)], known: &[u32]) {
        let batch = Batch {
            left: left.to_vec(),
            ..tokens(vec![0; known.len()], vec![0; known.len()])
        };
        let rows = known.len();
        let mut out = self.cuda.allocate(rows, 3, Precision::F32).unwrap();
        let batch = upload(&self.cuda, &batch);
        self.cuda.embed(&batch, &table.0, 0, 1.0, &mut out);
        let mut found = Vec::new();
        self.cuda.read(&out, &mut found).unwrap();
        let row = |&token: &u32| &table.1[token as usize * 3..][..3];
        assert_eq!(
            found,
            known.iter().flat_map(row).copied().collect::<Vec<_>>()
        );
    }

    /// Asks both, and checks that the logits are as they were.
    fn agree(&mut self, requests: &[SampleRequest]) {
        let expected = self.cpu.sample(&mut self.host, self.vocab, requests);
        let expected = expected.unwrap();
        let actual = self.cuda.sample(&mut self.device, self.vocab, requests);
        for (i, (actual, expected)) in actual.unwrap().iter().zip(&expected).enumerate() {
            assert_eq!(actual, expected, "request {i}: {:?}", requests[i]);
        }
        let mut after = Vec::new();
        self.cuda.read(&self.device, &mut after).unwrap();
        assert_eq!(bits(&after), bits(self.host.values()));
    }
}

/// Logits of some shape: spread, peaked, flat, with many equal ones, with what is no number.
fn logits(rng: &mut Rng, count: usize) -> Vec<f32> {
    let scale = rng.pick(&[0.0, 0.1, 1.0, 4.0, 15.0, 1e30]);
    let steps = rng.pick(&[0.0, 0.0, 1.0, 8.0]);
    let strange = rng.within(0..4) == 0;
    let mut value = || {
        let sum: f32 = rng.values(6).iter().sum();
        let value = sum * scale;
        let value = if steps > 0.0 {
            (value * steps).round() / steps
        } else {
            value
        };
        match rng.within(0..20) {
            0 if strange => f32::NAN,
            1 if strange => f32::NEG_INFINITY,
            2 if strange => -0.0,
            3 if strange && scale > 4.0 => f32::INFINITY,
            _ => value,
        }
    };
    (0..count).map(|_| value()).collect()
}

fn some_tokens(rng: &mut Rng, limit: usize, vocab: usize) -> Vec<u32> {
    let count = rng.within(0..limit);
    // A few of them do not exist.
    (0..count)
        .map(|_| rng.within(0..vocab + 2) as u32)
        .collect()
}

fn params(rng: &mut Rng, vocab: usize) -> SampleParams {
    let k = rng.within(1..vocab + 3);
    let biases = some_tokens(rng, 9, vocab);
    let limit = rng.pick(&[1, 1, 5, 300]);
    let mut params = SampleParams {
        temperature: rng.pick(&[
            0.0,
            0.3,
            0.7,
            1.0,
            1.0,
            2.5,
            40.0,
            1e30,
            f32::INFINITY,
            2e-5,
        ]),
        top_k: rng.pick(&[0, 0, 1, 7, 40, k]),
        top_p: rng.pick(&[1.0, 1.0, 0.95, 0.7, 0.2, 0.0, -1.0, f32::NAN]),
        min_p: rng.pick(&[0.0, 0.0, 0.05, 0.5, 1.0, 1.5, f32::NAN]),
        presence_penalty: rng.pick(&[0.0, 0.7, -0.7]),
        frequency_penalty: rng.pick(&[0.0, 0.3, 1.7]),
        repetition_penalty: rng.pick(&[1.0, 1.3, 0.6, 0.0]),
        seed: rng.next(),
        position: rng.within(0..100_000) as u32,
        logit_bias: biases
            .into_iter()
            .map(|token| (token, 3.0 * rng.value()))
            .collect(),
        banned: some_tokens(rng, limit, vocab),
        allowed: Vec::new(),
        prompt: some_tokens(rng, limit, vocab),
        generated: some_tokens(rng, limit, vocab),
        last: None,
    };
    if rng.within(0..4) == 0 {
        params.allowed = some_tokens(rng, vocab.min(500) + 1, vocab);
    }
    if rng.within(0..10) == 0 {
        let strange = rng.pick(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e38]);
        params
            .logit_bias
            .push((rng.within(0..vocab) as u32, strange));
        params.repetition_penalty = strange;
    }
    params
}

fn request(rng: &mut Rng, rows: usize, vocab: usize) -> SampleRequest {
    let choice = match rng.within(0..5) {
        0 => Choice::Score(rng.within(0..vocab) as u32),
        1 => Choice::Sample(Box::new(SampleParams {
            temperature: 0.0,
            ..neutral()
        })),
        _ => Choice::Sample(Box::new(params(rng, vocab))),
    };
    SampleRequest {
        row: rng.within(0..rows),
        choice,
        logprobs: rng.pick(&[None, None, Some(0), Some(1), Some(20), Some(200)]),
    }
}

#[test]
fn the_device_gives_the_answers_of_the_cpu() {
    let mut rng = Rng::new(24);
    for case in 0..40 {
        let Some(cuda) = cuda_backend() else { return };
        let several = rng.within(2..400);
        let vocab = rng.pick(&[1, several, several, 1024, 4096, 9000]);
        let (rows, padding) = (rng.within(1..5), rng.within(0..9));
        println!("case {case}: {rows} rows of {vocab} tokens and {padding} columns more");
        let mut values = Vec::new();
        for _ in 0..rows {
            values.extend(logits(&mut rng, vocab));
            values.extend(vec![1e9; padding]);
        }
        let mut twins = Twins::new(cuda, &values, (vocab + padding, vocab));
        let requests: Vec<_> = (0..rng.within(1..12))
            .map(|_| request(&mut rng, rows, vocab))
            .collect();
        twins.agree(&requests);
    }
}

/// Where one token is all but certain, its log-probability is the other's weight, to the last bit.
#[test]
fn weights_are_the_same_to_the_last_bit() {
    let mut rng = Rng::new(28);
    let Some(cuda) = cuda_backend() else { return };
    let rows = 1500;
    let values: Vec<f32> = (0..rows)
        .flat_map(|_| [0.0, -6.5 + 4.5 * rng.value()])
        .collect();
    let mut twins = Twins::new(cuda, &values, (2, 2));
    let requests: Vec<_> = (0..rows)
        .map(|row| SampleRequest {
            row,
            choice: Choice::Score(0),
            logprobs: Some(0),
        })
        .collect();
    twins.agree(&requests);
}

#[test]
fn ties_are_broken_alike_where_many_tokens_are_equal() {
    let mut rng = Rng::new(25);
    let Some(cuda) = cuda_backend() else { return };
    // Far more equal tokens than are sorted at once, above and below a few others.
    let vocab = 20_000;
    let values: Vec<f32> = (0..2 * vocab)
        .map(|i| match (i / vocab, rng.within(0..100)) {
            (0, 0) => 2.0,
            (0, 1) => -1.0,
            (0, _) => 1.5,
            _ => 0.0,
        })
        .collect();
    let mut twins = Twins::new(cuda, &values, (vocab, vocab));
    let requests: Vec<_> = [
        (1, 1.0),
        (150, 1.0),
        (5000, 1.0),
        (19_999, 1.0),
        (0, 0.01),
        (0, 0.5),
        (9000, 0.9),
    ]
    .into_iter()
    .enumerate()
    .map(|(i, (top_k, top_p))| SampleRequest {
        row: i % 2,
        choice: Choice::Sample(Box::new(SampleParams {
            top_k,
            top_p,
            seed: rng.next(),
            ..neutral()
        })),
        logprobs: rng.pick(&[None, Some(900)]),
    })
    .collect();
    twins.agree(&requests);
}

#[test]
fn a_vocabulary_of_today_is_drawn_from_alike() {
    let mut rng = Rng::new(26);
    let Some(cuda) = cuda_backend() else { return };
    let vocab = 128_256;
    let values: Vec<f32> = (0..vocab)
        .map(|_| rng.values(4).iter().sum::<f32>() * 6.0)
        .collect();
    let mut twins = Twins::new(cuda, &values, (vocab, vocab));
    let requests: Vec<_> = [(1.0, 0, 1.0), (0.6, 0, 0.95), (0.7, 20, 0.8), (3.0, 0, 0.9)]
        .map(|(temperature, top_k, top_p)| SampleRequest {
            row: 0,
            choice: Choice::Sample(Box::new(SampleParams {
                temperature,
                top_k,
                top_p,
                seed: rng.next(),
                ..neutral()
            })),
            logprobs: Some(5),
        })
        .to_vec();
    twins.agree(&requests);
}

/// Steps that are queued behind each other: each names tokens that nobody has read, in penalties and in its batch.
#[test]
fn deferred_sampling_gives_the_answers_of_the_cpu_and_leaves_its_tokens() {
    let mut rng = Rng::new(29);
    for case in 0..30 {
        let Some(cuda) = cuda_backend() else { return };
        let vocab = rng.pick(&[3, 40, 1024, 3000]);
        let rows = rng.within(1..5);
        println!("case {case}: {rows} rows of {vocab} tokens");
        let values = logits(&mut rng, rows * vocab);
        let mut twins = Twins::new(cuda, &values, (vocab, vocab));
        let table = weight(&mut rng, &twins.cuda, (vocab, 3), Element::F32);
        // Tokens that the step before chose, by request, and that step if it is not read yet.
        let (mut before, mut unread): (Vec<u32>, Option<(CudaPending, Vec<_>)>) =
            (Vec::new(), None);
        for step in 0..6 {
            let left: Vec<_> = (0..before.len()).map(|r| (r as u32, r as u32)).collect();
            twins.embed_left(&table, &left, &before);
            let mut requests: Vec<_> = (0..rng.within(1..7))
                .map(|_| request(&mut rng, rows, vocab))
                .collect();
            requests.sort_by_key(|request| request.row);
            let mut known = requests.clone();
            for (request, known) in requests.iter_mut().zip(&mut known) {
                if before.is_empty() || rng.within(0..3) == 0 {
                    continue;
                }
                if let (Choice::Sample(left), Choice::Sample(known)) =
                    (&mut request.choice, &mut known.choice)
                {
                    let index = rng.within(0..before.len());
                    left.last = Some(index as u32);
                    known.generated.push(before[index]);
                }
            }
            let expected = twins.cpu.sample(&mut twins.host, vocab, &known).unwrap();
            assert!(twins.cuda.defers(&requests));
            let logits = Some((&mut twins.device, vocab));
            let pending = twins.cuda.defer(logits, &requests).unwrap().unwrap();
            before = expected.iter().map(|answer| answer.token).collect();
            let waits = rng.within(0..4) > 0 && step < 5;
            let end = |(pending, expected): (CudaPending, Vec<_>)| {
                assert!(twins.cuda.wait(&pending, &mut || false).unwrap());
                assert_eq!(twins.cuda.finish(pending).unwrap(), expected);
            };
            if let Some(unread) = unread.replace((pending, expected)) {
                end(unread);
            }
            if !waits {
                unread.take().into_iter().for_each(end);
            }
        }
        let mut after = Vec::new();
        twins.cuda.read(&twins.device, &mut after).unwrap();
        assert_eq!(bits(&after), bits(twins.host.values()));
    }
}

#[test]
fn tokens_that_nobody_left_are_refused() {
    let Some(cuda) = cuda_backend() else { return };
    let mut twins = Twins::new(cuda, &[0.5; 8], (4, 4));
    let of = |last| SampleRequest {
        row: 0,
        choice: Choice::Sample(Box::new(SampleParams {
            repetition_penalty: 2.0,
            last,
            ..neutral()
        })),
        logprobs: None,
    };
    let Twins { cuda, device, .. } = &mut twins;
    assert!(cuda.defer(Some((&mut *device, 4)), &[of(Some(0))]).is_err());
    let first = cuda.defer(Some((&mut *device, 4)), &[of(None)]).unwrap();
    assert!(cuda.defer(Some((&mut *device, 4)), &[of(Some(1))]).is_err());
    assert!(
        cuda.sample(device, 4, &[of(Some(0))]).is_err(),
        "not deferred"
    );
    let mut batch = tokens(vec![0], vec![0]);
    let mut uploaded = cuda.batch(1, 1, 0).unwrap();
    for (request, is_left) in [(0, true), (1, false)] {
        batch.left = vec![(0, request)];
        assert_eq!(cuda.upload(&batch, &mut uploaded).is_ok(), is_left);
    }
    assert_eq!(cuda.finish(first.unwrap()).unwrap().len(), 1);
    // What was waited for is nobody's any more.
    cuda.sample(device, 4, &[of(None)]).unwrap();
    assert!(cuda.defer(Some((&mut *device, 4)), &[of(Some(0))]).is_err());
    // Of three, the oldest can no longer be told.
    let mut three = Vec::new();
    for _ in 0..3 {
        let pending = cuda.defer(Some((&mut *device, 4)), &[of(None)]).unwrap();
        three.extend(pending);
    }
    let told: Vec<_> = three.into_iter().map(|p| cuda.finish(p).is_ok()).collect();
    assert_eq!(told, [false, true, true]);
}

#[test]
fn what_does_not_fit_is_answered_all_the_same() {
    let mut rng = Rng::new(27);
    let Some(cuda) = cuda_backend() else { return };
    let vocab = 3000;
    let mut twins = Twins::new(cuda, &logits(&mut rng, 2 * vocab), (vocab, vocab));
    let long = |row, count: usize, logprobs| SampleRequest {
        row,
        choice: Choice::Sample(Box::new(SampleParams {
            logit_bias: (0..count).map(|i| ((i % vocab) as u32, 1e-3)).collect(),
            seed: count as u64,
            ..neutral()
        })),
        logprobs,
    };
    // Several that go to the device one after the other, one that never could, and too many alternatives.
    let requests = [
        long(0, 700_000, None),
        long(1, 800_000, Some(3)),
        long(0, 2_000_000, Some(2)),
        long(1, 10, Some(2500)),
        long(0, 10, Some(1024)),
    ];
    twins.agree(&requests);
    let scores: Vec<_> = (0..400)
        .map(|token| SampleRequest {
            row: token % 2,
            choice: Choice::Score(token as u32),
            logprobs: Some(1000),
        })
        .collect();
    twins.agree(&scores);
}
