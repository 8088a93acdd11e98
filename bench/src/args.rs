//! The command line of the load generator.
//!
//! Names are those of `vllm bench serve` where it has one, so that commands can be carried over;
//! defaults are small enough for a first try on a CPU. It does not read anything but the command
//! line and the API key's variable.

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Measures a server that speaks the `OpenAI` API.
#[derive(Clone, Debug, Parser)]
#[command(name = "cluster bench", bin_name = "cluster bench")]
pub struct Args {
    /// What is measured.
    #[command(subcommand)]
    pub mode: Mode,
}

/// Ways to measure.
#[derive(Clone, Debug, Subcommand)]
pub enum Mode {
    /// Send streamed requests to a running server and report latency and throughput.
    Serve(Serve),
}

/// How requests are made and sent.
#[derive(Clone, Debug, ClapArgs)]
pub struct Serve {
    /// Server, `http://HOST:PORT`; instead of --host and --port.
    #[arg(long)]
    pub base_url: Option<String>,
    /// Server's host.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Server's port.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Which API is used.
    #[arg(long, value_enum, default_value_t = Backend::Openai)]
    pub backend: Backend,
    /// Where prompts come from.
    #[arg(long, value_enum, default_value_t = Dataset::Random)]
    pub dataset_name: Dataset,
    /// Model's name; if not given, the first that the server names.
    #[arg(long)]
    pub model: Option<String>,
    /// Key, sent as bearer token.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Requests to send.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub num_prompts: u32,
    /// Requests sent before the measurement, one after the other.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub num_warmups: u32,
    /// Most requests under way at once; all if not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_concurrency: Option<u32>,
    /// Requests per second, at random moments (Poisson); `inf` sends all at once.
    #[arg(long, default_value_t = f64::INFINITY, value_parser = rate)]
    pub request_rate: f64,
    /// Tokens of each prompt, behind the shared prefix.
    #[arg(long, default_value_t = 128)]
    pub random_input_len: u32,
    /// Tokens to generate for each.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub random_output_len: u32,
    /// Tokens that all prompts begin with.
    #[arg(long, default_value_t = 0)]
    pub random_prefix_len: u32,
    /// Lengths vary by this share around the ones given: 0.2 is 80 % to 120 %.
    #[arg(long, default_value_t = 0.0, value_parser = ratio)]
    pub random_range_ratio: f64,
    /// Prompt tokens are drawn below this; the model's vocabulary must be at least as large.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(400..))]
    pub random_vocab_size: u32,
    /// Makes prompts and moments; equal seeds give equal load.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Go on generating behind an end of text (an extension of vLLM's, which OpenAI refuses).
    #[arg(long)]
    pub ignore_eos: bool,
    /// Seconds after which a request counts as failed.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// Write the numbers to this file as well.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// APIs that can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// `/v1/completions`, prompts as token ids: lengths are exact.
    #[value(alias = "vllm")]
    Openai,
    /// `/v1/chat/completions`, prompts as words: lengths are about those asked for.
    OpenaiChat,
}

/// Where prompts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dataset {
    /// Drawn from the seed, as the `--random-…` options say.
    Random,
}

impl Serve {
    /// The server's address without a slash or the API's `/v1` at the end.
    pub fn url(&self) -> String {
        match &self.base_url {
            Some(url) => {
                let url = url.trim_end_matches('/');
                // SDKs take the address with it, and so people have it at hand.
                url.strip_suffix("/v1").unwrap_or(url).to_owned()
            }
            None => format!("http://{}:{}", self.host, self.port),
        }
    }
}

impl Backend {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::OpenaiChat => "openai-chat",
        }
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 => Ok(rate),
        _ => Err("a number of requests per second above 0, or inf".into()),
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..1.0).contains(&ratio) => Ok(ratio),
        _ => Err("a share of at least 0 and below 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Serve, clap::Error> {
        let words = ["cluster bench"].into_iter().chain(line.split_whitespace());
        Args::try_parse_from(words).map(|args| match args.mode {
            Mode::Serve(serve) => serve,
        })
    }

    #[test]
    fn the_command_line_is_that_of_vllm() {
        let serve = parse(
            "serve --backend openai-chat --base-url http://h:1/ --model m --num-prompts 7 \
             --max-concurrency 3 --request-rate 2.5 --random-input-len 9 --random-output-len 8 \
             --random-prefix-len 4 --random-range-ratio 0.5 --seed 6 --ignore-eos",
        )
        .unwrap();
        assert_eq!(serve.url(), "http://h:1");
        assert_eq!(serve.backend, Backend::OpenaiChat);
        assert_eq!((serve.max_concurrency, serve.request_rate), (Some(3), 2.5));
        let plain = parse("serve --request-rate inf --backend vllm --dataset-name random").unwrap();
        assert_eq!(plain.backend, Backend::Openai);
        let pasted = parse("serve --base-url http://h:1/v1/").unwrap();
        assert_eq!(pasted.url(), "http://h:1");
        assert_eq!(plain.url(), "http://127.0.0.1:8000");
        assert!(plain.request_rate.is_infinite());
    }

    #[test]
    fn numbers_that_make_no_load_are_refused() {
        for wrong in [
            "--request-rate 0",
            "--request-rate nan",
            "--num-prompts 0",
            "--max-concurrency 0",
            "--random-range-ratio 1",
        ] {
            assert!(parse(&format!("serve {wrong}")).is_err(), "{wrong}");
        }
    }
}
