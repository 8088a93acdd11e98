//! What is sent, and when: both follow from the seed alone.
//!
//! Token ids are drawn from a range that is ordinary text in every tokenizer we know: special
//! tokens and single bytes lie below it or far above.

use crate::args::{Backend, Dataset, Prompts};
use hyper::body::Bytes;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Gamma};
use rand_xoshiro::Xoshiro256PlusPlus;
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
    /// What is sent: JSON, written before the clock runs.
    pub body: Bytes,
    /// Prompt tokens asked for; exact for token ids.
    pub prompt_tokens: u64,
}

/// When requests are due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrivals {
    /// Requests per second; infinite: all at once.
    pub rate: f64,
    /// Shape of the gamma distribution of the times between them; 1 is a Poisson process.
    pub burstiness: f64,
}

impl Arrivals {
    /// All are due at once.
    pub const AT_ONCE: Self = Self {
        rate: f64::INFINITY,
        burstiness: 1.0,
    };

    /// The distribution of gaps in seconds; `None` if there are none.
    fn gaps(self) -> Option<Gamma<f64>> {
        if !self.rate.is_finite() {
            return None;
        }
        let mean = 1.0 / self.rate;
        let gamma = Gamma::new(self.burstiness, mean / self.burstiness);
        Some(gamma.expect("the command line takes numbers above 0 only"))
    }
}

/// The first `count` requests of a run for `model`, in order of time.
pub fn plan(
    prompts: &Prompts,
    backend: Backend,
    model: &str,
    arrivals: Arrivals,
    count: u32,
) -> Vec<Planned> {
    let Dataset::Random = prompts.dataset_name;
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(prompts.seed);
    // Moments have a generator of their own: the same prompts can be sent at any rate.
    let mut clock = rng.clone();
    clock.jump();
    let gaps = arrivals.gaps();
    let prefix = draw(
        &mut rng,
        prompts.random_prefix_len,
        prompts.random_vocab_size,
    );
    let mut due = Duration::ZERO;
    let requests = (0..count).map(|_| {
        let ratio = prompts.random_range_ratio;
        let input = around(&mut rng, prompts.random_input_len, ratio);
        let output = around(&mut rng, prompts.random_output_len, ratio);
        let mut tokens = prefix.clone();
        tokens.extend(draw(&mut rng, input, prompts.random_vocab_size));
        let planned = Planned {
            due,
            prompt_tokens: tokens.len() as u64,
            body: body(prompts, backend, model, &tokens, output),
        };
        if let Some(gaps) = gaps {
            due += Duration::from_secs_f64(gaps.sample(&mut clock));
        }
        planned
    });
    requests.collect()
}

/// `length` give or take `ratio` of it, at least 1.
fn around(rng: &mut impl Rng, length: u32, ratio: f64) -> u32 {
    let spread = f64::from(length) * ratio;
    let offset = rng.random_range(-1.0..=1.0) * spread;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a ratio below 1 keeps it positive, and `as` saturates"
    )]
    let varied = (f64::from(length) + offset).round() as u32;
    varied.max(1)
}

fn draw(rng: &mut impl Rng, length: u32, vocab_size: u32) -> Vec<u32> {
    (0..length)
        .map(|_| rng.random_range(FIRST_TOKEN..vocab_size))
        .collect()
}

fn body(
    prompts: &Prompts,
    backend: Backend,
    model: &str,
    tokens: &[u32],
    max_tokens: u32,
) -> Bytes {
    let mut body = json!({
        "model": model,
        "max_tokens": max_tokens,
        "temperature": prompts.temperature,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    match backend {
        Backend::Openai => body["prompt"] = json!(tokens),
        Backend::OpenaiChat => {
            let words: Vec<&str> = tokens
                .iter()
                .map(|token| WORDS[*token as usize % WORDS.len()])
                .collect();
            body["messages"] = json!([{"role": "user", "content": words.join(" ")}]);
        }
    }
    if prompts.ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    Value::to_string(&body).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Mode, Serve};
    use clap::Parser;

    fn args(line: &str) -> Serve {
        let words = ["bench", "serve"]
            .into_iter()
            .chain(line.split_whitespace());
        match Args::parse_from(words).mode {
            Mode::Serve(serve) => *serve,
            mode => panic!("{mode:?}"),
        }
    }

    fn planned(line: &str, count: u32) -> Vec<Planned> {
        let serve = args(line);
        let arrivals = Arrivals {
            rate: serve.request_rate,
            burstiness: serve.burstiness,
        };
        plan(&serve.prompts, Backend::Openai, "m", arrivals, count)
    }

    fn json_of(planned: &Planned) -> Value {
        serde_json::from_slice(&planned.body).unwrap()
    }

    #[test]
    fn the_seed_makes_the_load() {
        let line = "--random-range-ratio 0.5 --request-rate 10 --seed";
        let plan = |seed: u32| planned(&format!("{line} {seed}"), 50);
        assert_eq!(plan(3), plan(3));
        assert_ne!(plan(3), plan(4));
        let slower = planned("--random-range-ratio 0.5 --request-rate 1 --seed 3", 50);
        let bodies = |plan: &[Planned]| plan.iter().map(|p| p.body.clone()).collect::<Vec<_>>();
        assert_eq!(
            bodies(&plan(3)),
            bodies(&slower),
            "the rate changes no prompt"
        );
    }

    #[test]
    fn prompts_share_their_prefix_and_keep_to_their_lengths() {
        let all = planned(
            "--random-prefix-len 10 --random-input-len 20 \
                         --random-output-len 30 --random-range-ratio 0.2 --ignore-eos",
            40,
        );
        let prompt = |planned: &Planned| json_of(planned)["prompt"].as_array().unwrap().clone();
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
            let json = json_of(planned);
            let output = json["max_tokens"].as_u64().unwrap();
            assert!((24..=36).contains(&output), "{output}");
            assert_eq!(json["ignore_eos"], true);
            assert_eq!(planned.due, Duration::ZERO, "all at once");
        }
        assert_ne!(prompt(&all[1])[10..], first[10..]);
    }

    /// Mean of the gaps times the rate, and their deviation by their mean.
    fn gaps(line: &str) -> (f64, f64) {
        let all = planned(
            &format!("--random-input-len 1 --request-rate 8 {line}"),
            8000,
        );
        let gaps: Vec<f64> = all
            .windows(2)
            .map(|pair| pair[1].due.saturating_sub(pair[0].due).as_secs_f64())
            .collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>();
        let deviation = (variance / gaps.len() as f64).sqrt();
        (mean * 8.0, deviation / mean)
    }

    #[test]
    fn moments_have_the_rate_and_the_spread_of_their_process() {
        // The deviation of a gamma distribution, by its mean, is one over the root of its shape.
        for (line, expected) in [
            ("", 1.0),
            ("--burstiness 0.25", 2.0),
            ("--burstiness 100", 0.1),
        ] {
            let (mean, spread) = gaps(line);
            assert!((mean - 1.0).abs() < 0.1, "{line}: mean {mean}");
            assert!(
                (spread / expected - 1.0).abs() < 0.1,
                "{line}: spread {spread}"
            );
        }
    }
}
