//! Ten million frames that were tampered with: each is a message or an error, without a panic and
//! without more memory than a frame may claim.

use crate::counting::measure;
use crate::random::{Random, seed};
use crate::samples::{commands, random_plan, replies};
use bincode::Encode;
use std::thread;
use topology::wire::{FromShard, MAX_FRAME_BYTES, ToShard, WireError, decode, encode};

const FRAMES: u64 = 10_000_000;
const THREADS: u64 = 2;

/// Most memory that one short frame may have in use: a claim, and the text of an error.
const MAX_PEAK: usize = MAX_FRAME_BYTES + (64 << 10);

#[test]
fn ten_million_mutated_frames_do_no_harm() {
    let seed = seed(0x00F7_A3E5);
    let work = |thread: u64| move || tamper(seed.wrapping_add(thread), FRAMES / THREADS);
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| thread::spawn(work(thread)))
        .collect();
    let mut good = 0;
    for thread in threads {
        good += thread
            .join()
            .expect("a panic within a decoder, printed above");
    }
    // Neither all of them harmless nor all of them refused at the first byte.
    assert!(
        (FRAMES / 100..FRAMES * 9 / 10).contains(&good),
        "{good} frames were messages"
    );
}

/// How many were still messages.
fn tamper(seed: u64, frames: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut corpus: Vec<Vec<u8>> = commands().iter().map(body).collect();
    corpus.extend(replies().iter().map(body));
    let plans = std::iter::repeat_with(|| random_plan(&mut random))
        .map(|plan| body(&ToShard::Run(Box::new(plan))));
    corpus.extend(plans.filter(|body| body.len() < 400).take(40));
    let mut good = 0;
    let mut frame = Vec::with_capacity(4096);
    for number in 0..frames {
        frame.clear();
        frame.extend_from_slice(random.pick::<Vec<u8>>(&corpus));
        for _ in 0..=random.below(3) {
            mutate(&mut frame, &mut random, &corpus);
        }
        let is_command = random.below(2) == 0;
        let (decoded, usage) = measure(|| {
            if is_command {
                decode::<ToShard>(&frame).map(drop)
            } else {
                decode::<FromShard>(&frame).map(drop)
            }
        });
        assert!(
            usage.largest <= MAX_FRAME_BYTES && usage.peak <= MAX_PEAK,
            "frame {number} of seed {seed}: {usage:?} for {frame:?}"
        );
        good += u64::from(decoded.is_ok());
    }
    good
}

fn body<T: Encode>(message: &T) -> Vec<u8> {
    encode(message).expect("a short message")
}

/// One change: of bits, bytes, lengths, or parts.
fn mutate(frame: &mut Vec<u8>, random: &mut Random, corpus: &[Vec<u8>]) {
    /// What introduces longer integers, and the ends of ranges.
    const SPECIAL: [u8; 10] = [0, 1, 2, 127, 128, 250, 251, 252, 253, 255];
    if frame.is_empty() {
        frame.push(*random.pick(&SPECIAL));
        return;
    }
    let at = random.below(frame.len());
    match random.below(8) {
        0 => frame[at] ^= 1 << random.below(8),
        1 => frame[at] = *random.pick(&SPECIAL),
        2 => frame[at] = u8::try_from(random.below(256)).expect("a byte"),
        3 => frame.truncate(at),
        4 => frame.insert(at, *random.pick(&SPECIAL)),
        5 => drop(frame.remove(at)),
        // A length of four or eight bytes.
        6 => {
            let marker = 252 + u8::try_from(random.below(2)).expect("a byte");
            let length = random.next() >> random.below(64);
            let end = frame.len().min(at + 1);
            let bytes = [marker].into_iter().chain(length.to_le_bytes());
            frame.splice(at..end, bytes);
        }
        _ => {
            let other = random.pick(corpus);
            let from = random.below(other.len());
            frame.truncate(at);
            frame.extend_from_slice(&other[from..]);
        }
    }
}

/// A claim of many elements costs no more than a frame, whatever kind of element it is.
#[test]
fn a_large_claim_takes_no_more_than_a_frame() {
    let run = |rest: &[u8]| {
        let mut frame = body(&ToShard::Run(Box::default()));
        frame.truncate(frame.len() - 1);
        frame.extend_from_slice(rest);
        frame
    };
    let rows = [&[252], 100_000u32.to_le_bytes().as_slice()].concat();
    let tokens = [&[1, 252], 4_000_000u32.to_le_bytes().as_slice()].concat();
    let absurd = [&[253], u64::MAX.to_le_bytes().as_slice()].concat();
    for (frame, takes_memory) in [
        (run(&rows), true),
        // Those are looked for before memory is taken.
        (run(&tokens), false),
        (run(&absurd), false),
    ] {
        let (decoded, usage) = measure(|| decode::<ToShard>(&frame));
        assert!(matches!(decoded, Err(WireError::Malformed(_))));
        assert!(
            usage.largest <= MAX_FRAME_BYTES && usage.peak <= MAX_PEAK,
            "{usage:?}"
        );
        // The first claim is near the limit, or the test would show nothing.
        assert_eq!(usage.largest > 8 << 20, takes_memory, "{usage:?}");
    }
    let long = vec![0; MAX_FRAME_BYTES + 1];
    let (decoded, usage) = measure(|| decode::<ToShard>(&long));
    assert_eq!(decoded, Err(WireError::TooLong(MAX_FRAME_BYTES + 1)));
    assert_eq!(usage.largest, 0, "refused before anything is taken");
}
