//! The short form of `scripts/fuzz.sh`: every target over its seed corpus and a few thousand seeded
//! mutations of it. Nothing here looks for coverage; it keeps the targets and what was found alive.

#[expect(
    unreachable_pub,
    reason = "libFuzzer's programs reach it by another path"
)]
mod targets;

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Mutations of the corpus, per target.
const MUTATIONS: usize = 3000;

/// No input takes longer, on a loaded machine; libFuzzer's own limit is 5 s.
const SLOWEST: Duration = Duration::from_secs(5);

/// What mutations put in: ends of ranges, and what formats are made of.
const WORDS: &[&[u8]] = &[
    b"\0",
    b"\xFF",
    b"\x7F\xFF\xFF\xFF",
    b"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF",
    b"\xFC\xFF\xFF\xFF\xFF",
    b"-1",
    b"1e999",
    b"4294967296",
    b"18446744073709551616",
    b"null",
    b"{",
    b"[[[[[[[[",
    b"\"",
    b",",
    b"\\ud800",
    b"\xC3\xA4",
    b"\n",
    b"{% for i in messages %}",
    b"{{ ",
];

/// The seed corpus of a target, sorted by name.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let entries = fs::read_dir(directory.join(target)).expect("the target has a corpus");
    let path = |entry: std::io::Result<fs::DirEntry>| entry.expect("it can be listed").path();
    let mut paths: Vec<_> = entries.map(path).collect();
    paths.sort();
    let read = |path| fs::read(path).expect("a seed is readable");
    paths.into_iter().map(read).collect()
}

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut fastrand::Rng) {
    let at = random.usize(..=input.len());
    match random.u32(..6) {
        0 if at < input.len() => input[at] = random.u8(..),
        1 if at < input.len() => input[at] ^= 1 << random.u32(..8),
        2 => input.truncate(at),
        3 => {
            let end = (at + random.usize(..16)).min(input.len());
            input.drain(at..end);
        }
        4 => {
            let other = &corpus[random.usize(..corpus.len())];
            let from = random.usize(..=other.len());
            let end = (from + random.usize(..64)).min(other.len());
            input.splice(at..at, other[from..end].iter().copied());
        }
        _ => {
            let word = WORDS[random.usize(..WORDS.len())];
            input.splice(at..at, word.iter().copied());
        }
    }
}

#[expect(clippy::print_stdout, reason = "shown with the test that failed")]
fn run(name: &str, target: impl Fn(&[u8])) {
    let seed = 0x5EED_F022;
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let corpus = corpus(name);
    assert!(!corpus.is_empty());
    let mutations = (0..MUTATIONS).map(|_| {
        let mut input = corpus[random.usize(..corpus.len())].clone();
        for _ in 0..random.usize(1..5) {
            mutate(&mut input, &corpus, &mut random);
        }
        input
    });
    let mutations: Vec<Vec<u8>> = mutations.collect();
    for input in corpus.iter().chain(&mutations) {
        // The input that made a test fail is the last one shown.
        println!("{}", input.escape_ascii());
        let begun = coordinator::clock::now();
        target(input);
        let took = coordinator::clock::since(begun);
        assert!(took < SLOWEST, "{took:?}");
    }
}

#[test]
fn bodies_of_requests() {
    run("http", targets::http);
}

#[test]
fn frames_between_processes() {
    run("wire", targets::wire);
}

#[test]
fn headers_of_weight_files() {
    run("safetensors", targets::safetensors);
}

#[test]
fn topology_files() {
    run("topology", targets::topology);
}

#[test]
fn chat_templates() {
    run("template", targets::template);
}
