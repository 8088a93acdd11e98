//! What is sent, and when: both follow from the seed alone.
//!
//! Token ids are drawn from a range that is ordinary text in every tokenizer we know: special
//! tokens and single bytes lie below it or far above.

use crate::args::{Backend, Dataset, Serve};
use serde_json::{Value, json};
use std::time::Duration;

/// Below are special tokens and bytes.
const FIRST_TOKEN: u32 = 300;

/// About one token each in most tokenizers.
const WORDS: &[&str] = &[
    "time", "day", "house", "water", "light", "tree", "book", "road", "hand", "bird", "stone",
    "river", "cloud", "song", "door", "green", "small", "long", "old", "new", "good", "round",
    "cold", "warm", "go", "see", "make", "find", "take", "come", "run", "and",
];

/// One request of the load.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// When it is due, counted from the beginning.
    pub due: Duration,
    /// What is sent.
    pub body: Value,
    /// Prompt tokens asked for; exact for token ids.
    pub prompt_tokens: u64,
}

/// A seeded generator (xorshift64*).
#[derive(Debug)]
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        // Zero is the one state it never leaves.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// In `0..end`.
    fn below(&mut self, end: u32) -> u32 {
        u32::try_from(self.next() % u64::from(end)).expect("below a u32")
    }

    /// In `(0, 1]`.
    fn share(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// `length` give or take `ratio` of it, at least 1.
    fn around(&mut self, length: u32, ratio: f64) -> u32 {
        let spread = f64::from(length) * ratio;
        let offset = (self.share() * 2.0 - 1.0) * spread;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a ratio below 1 keeps it positive, and `as` saturates"
        )]
        let varied = (f64::from(length) + offset).round() as u32;
        varied.max(1)
    }
}

/// The first `count` requests of a run, in order of time.
pub fn plan(args: &Serve, model: &str, count: u32) -> Vec<Planned> {
    let Dataset::Random = args.dataset_name;
    let mut rng = Rng::new(args.seed);
    let prefix = draw(&mut rng, args.random_prefix_len, args.random_vocab_size);
    let mut due = Duration::ZERO;
    let requests = (0..count).map(|_| {
        let input = rng.around(args.random_input_len, args.random_range_ratio);
        let output = rng.around(args.random_output_len, args.random_range_ratio);
        let mut tokens = prefix.clone();
        tokens.extend(draw(&mut rng, input, args.random_vocab_size));
        let planned = Planned {
            due,
            prompt_tokens: tokens.len() as u64,
            body: body(args, model, &tokens, output),
        };
        if args.request_rate.is_finite() {
            // Waiting times of a Poisson process are exponential.
            due += Duration::from_secs_f64(-rng.share().ln() / args.request_rate);
        }
        planned
    });
    requests.collect()
}

fn draw(rng: &mut Rng, length: u32, vocab_size: u32) -> Vec<u32> {
    let range = vocab_size - FIRST_TOKEN;
    (0..length)
        .map(|_| FIRST_TOKEN + rng.below(range))
        .collect()
}

fn body(args: &Serve, model: &str, tokens: &[u32], max_tokens: u32) -> Value {
    let mut body = json!({
        "model": model,
        "max_tokens": max_tokens,
        "temperature": args.temperature,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    match args.backend {
        Backend::Openai => body["prompt"] = json!(tokens),
        Backend::OpenaiChat => {
            let words: Vec<&str> = tokens
                .iter()
                .map(|token| WORDS[*token as usize % WORDS.len()])
                .collect();
            body["messages"] = json!([{"role": "user", "content": words.join(" ")}]);
        }
    }
    if args.ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Mode};
    use clap::Parser;

    fn args(line: &str) -> Serve {
        let words = ["bench", "serve"]
            .into_iter()
            .chain(line.split_whitespace());
        let Mode::Serve(serve) = Args::parse_from(words).mode;
        serve
    }

    #[test]
    fn the_seed_makes_the_load() {
        let line = "--random-range-ratio 0.5 --request-rate 10 --seed";
        let plan = |seed: u32| plan(&args(&format!("{line} {seed}")), "m", 50);
        assert_eq!(plan(3), plan(3));
        assert_ne!(plan(3), plan(4));
    }

    #[test]
    fn prompts_share_their_prefix_and_keep_to_their_lengths() {
        let args = args(
            "--random-prefix-len 10 --random-input-len 20 \
                         --random-output-len 30 --random-range-ratio 0.2 --ignore-eos",
        );
        let all = plan(&args, "m", 40);
        let prompt = |planned: &Planned| planned.body["prompt"].as_array().unwrap().clone();
        let first = prompt(&all[0]);
        for planned in &all {
            let prompt = prompt(planned);
            assert_eq!(prompt.len() as u64, planned.prompt_tokens);
            assert!((26..=34).contains(&prompt.len()), "{}", prompt.len());
            assert_eq!(prompt[..10], first[..10]);
            assert!(
                prompt
                    .iter()
                    .all(|t| (300..1000).contains(&t.as_u64().unwrap()))
            );
            let output = planned.body["max_tokens"].as_u64().unwrap();
            assert!((24..=36).contains(&output), "{output}");
            assert_eq!(planned.due, Duration::ZERO, "all at once");
        }
        assert_ne!(prompt(&all[1])[10..], first[10..]);
    }

    #[test]
    fn moments_have_the_rate_and_the_spread_of_a_poisson_process() {
        let all = plan(&args("--random-input-len 1 --request-rate 8"), "m", 4000);
        let gaps: Vec<f64> = all
            .windows(2)
            .map(|pair| pair[1].due.saturating_sub(pair[0].due).as_secs_f64())
            .collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>();
        let deviation = (variance / gaps.len() as f64).sqrt();
        assert!((mean * 8.0 - 1.0).abs() < 0.1, "mean {mean}");
        assert!(
            (deviation / mean - 1.0).abs() < 0.1,
            "deviation {deviation}"
        );
    }
}
