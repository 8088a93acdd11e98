//! Flags that several ways to measure have: who is asked, what is asked, what is reported.

use super::values::{Limit, Metric, path, percentile, ratio};
use anyhow::Context;
use clap::{Args, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

/// Who is measured.
#[derive(Clone, Debug, Args)]
pub struct Server {
    /// Server, `http://HOST:PORT`; instead of --host and --port.
    #[arg(long)]
    pub base_url: Option<String>,
    /// Server's host.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Server's port.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Which API is used [default: the one that --endpoint names, or openai].
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,
    /// Where requests go, if not to the API's own path.
    #[arg(long, value_name = "PATH", value_parser = path)]
    pub endpoint: Option<String>,
    /// Model's name; if not given, the first that the server names.
    #[arg(long)]
    pub model: Option<String>,
    /// Key, sent as bearer token.
    #[arg(
        long,
        env = "OPENAI_API_KEY",
        hide_env_values = true,
        conflicts_with = "api_key_file"
    )]
    pub api_key: Option<String>,
    /// File whose first line that is no `#` comment is the key.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Seconds after which a request counts as failed.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// Flags of `cluster up`: that cluster is started for the benchmark, measured, and ended.
    #[arg(last = true, value_name = "FLAGS OF cluster up",
          conflicts_with_all = ["base_url", "host", "port"])]
    pub up: Vec<OsString>,
}

/// Requests of fixed lengths, each generated to its end.
#[derive(Clone, Debug, Args)]
pub struct Lengths {
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub input_len: u32,
    /// Tokens to generate for each.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub output_len: u32,
    /// Prompt tokens are drawn below this; the model's vocabulary must be at least as large.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(400..))]
    pub random_vocab_size: u32,
    /// Makes the prompts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What is asked.
#[derive(Clone, Debug, Args)]
pub struct Prompts {
    /// Where prompts come from.
    #[arg(long, value_enum, default_value_t = Dataset::Random)]
    pub dataset_name: Dataset,
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
}

/// What is reported.
#[derive(Clone, Debug, Args)]
pub struct Reporting {
    /// Which latencies are reported.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "ttft,tpot,itl,e2el"
    )]
    pub percentile_metrics: Vec<Metric>,
    /// Which of their percentiles, beside mean and median.
    #[arg(long, value_delimiter = ',', default_value = "90,99", value_parser = percentile)]
    pub metric_percentiles: Vec<f64>,
    /// Count requests that keep all of these limits in milliseconds: `ttft:MS`, `tpot:MS`, `e2el:MS`.
    #[arg(long, num_args = 1.., value_name = "METRIC:MS")]
    pub goodput: Vec<Limit>,
    /// Write the numbers to this file as well.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the numbers to a file named after load, model and time.
    #[arg(long)]
    pub save_result: bool,
    /// Folder of that file [default: the working directory].
    #[arg(long, value_name = "DIR")]
    pub result_dir: Option<PathBuf>,
    /// Another name for it.
    #[arg(long, value_name = "NAME")]
    pub result_filename: Option<String>,
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

impl Lengths {
    /// Random prompts of these lengths, greedy.
    pub fn prompts(&self) -> Prompts {
        Prompts {
            dataset_name: Dataset::Random,
            random_input_len: self.input_len,
            random_output_len: self.output_len,
            random_prefix_len: 0,
            random_range_ratio: 0.0,
            random_vocab_size: self.random_vocab_size,
            seed: self.seed,
            temperature: 0.0,
            ignore_eos: true,
        }
    }
}

impl Server {
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

    /// Which API is spoken.
    pub fn backend(&self) -> Backend {
        let endpoint = self.endpoint.as_deref().unwrap_or_default();
        let named = if endpoint.ends_with("/chat/completions") {
            Backend::OpenaiChat
        } else {
            Backend::Openai
        };
        self.backend.unwrap_or(named)
    }

    /// Where requests go, below [`Self::url`].
    pub fn endpoint(&self) -> &str {
        match (&self.endpoint, self.backend()) {
            (Some(endpoint), _) => endpoint,
            (None, Backend::Openai) => "/v1/completions",
            (None, Backend::OpenaiChat) => "/v1/chat/completions",
        }
    }

    /// The key, read from its file if that was given.
    ///
    /// # Errors
    /// If the file cannot be read or holds no key.
    pub fn key(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.api_key_file else {
            return Ok(self.api_key.clone());
        };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read the API key from {}", path.display()))?;
        let mut lines = text.lines().map(str::trim);
        let key = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
        let key = key.with_context(|| format!("{} holds no API key", path.display()))?;
        Ok(Some(key.to_owned()))
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
