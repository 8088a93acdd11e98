//! The command line of the benchmarks.
//!
//! Names are those of `vllm bench` where it has one, so that commands can be carried over; defaults are small enough
//! for a first try on a CPU. It reads the command line and the API key's variable, no file.

mod shared;
mod values;

pub use shared::{Backend, Dataset, Lengths, Prompts, Reporting, Server};
pub use values::{Limit, Metric};

use clap::{Args as ClapArgs, Parser, Subcommand};
use std::path::PathBuf;
use values::{positive, rate, ratio};

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
    Serve(Box<Serve>),
    /// Time one batch of requests with fixed lengths, again and again.
    Latency(Box<Latency>),
    /// Send all requests at once and report tokens per second.
    Throughput(Box<Throughput>),
    /// Start `cluster up` several times and report what it takes to listen, to be ready and to give a first token.
    Startup(Box<Startup>),
    /// Run `serve` under rising load: where throughput ends to grow, and how much load keeps within limits.
    Sweep(Box<Sweep>),
}

/// How requests are made and sent.
#[derive(Clone, Debug, ClapArgs)]
pub struct Serve {
    /// Who is measured.
    #[command(flatten)]
    pub server: Server,
    /// What is asked.
    #[command(flatten)]
    pub prompts: Prompts,
    /// What is reported.
    #[command(flatten)]
    pub reporting: Reporting,
    /// Requests to send.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub num_prompts: u32,
    /// Requests sent before the measurement, one after the other.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub num_warmups: u32,
    /// Most requests under way at once; all if not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_concurrency: Option<u32>,
    /// Requests per second, at random moments (open loop); `inf` sends each as soon as there is room for it (closed
    /// loop).
    #[arg(long, default_value_t = f64::INFINITY, value_parser = rate)]
    pub request_rate: f64,
    /// Shape of the gamma distribution of the times between requests: 1 is a Poisson process, less comes in bursts,
    /// more is even.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub burstiness: f64,
    /// Write ttfts, itls, lengths, moments and errors of each request as well.
    #[arg(long)]
    pub save_detailed: bool,
    /// Draw time to first token, inter-token latency and throughput over time to this SVG file.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// One batch, again and again.
#[derive(Clone, Debug, ClapArgs)]
pub struct Latency {
    /// Who is measured.
    #[command(flatten)]
    pub server: Server,
    /// What is asked.
    #[command(flatten)]
    pub lengths: Lengths,
    /// Requests of a batch.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub batch_size: u32,
    /// Batches before the measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub num_iters_warmup: u32,
    /// Batches that are measured.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub num_iters: u32,
    /// Write the numbers to this file as well.
    #[arg(long, value_name = "FILE")]
    pub output_json: Option<PathBuf>,
}

/// All at once.
#[derive(Clone, Debug, ClapArgs)]
pub struct Throughput {
    /// Who is measured.
    #[command(flatten)]
    pub server: Server,
    /// What is asked.
    #[command(flatten)]
    pub lengths: Lengths,
    /// Tokens that all prompts begin with.
    #[arg(long, default_value_t = 0)]
    pub prefix_len: u32,
    /// Lengths vary by this share around the ones given.
    #[arg(long, default_value_t = 0.0, value_parser = ratio)]
    pub random_range_ratio: f64,
    /// Requests to send.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub num_prompts: u32,
    /// Write the numbers to this file as well.
    #[arg(long, value_name = "FILE")]
    pub output_json: Option<PathBuf>,
}

/// Start after start.
#[derive(Clone, Debug, ClapArgs)]
pub struct Startup {
    /// How the cluster that was started is asked; its flags stand behind `--`.
    #[command(flatten)]
    pub server: Server,
    /// What its first request asks.
    #[command(flatten)]
    pub lengths: Lengths,
    /// Starts with the model's files dropped from the file cache.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub num_iters_cold: u32,
    /// Starts before the warm ones that are measured.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub num_iters_warmup: u32,
    /// Starts with the model's files in the file cache.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub num_iters_warm: u32,
    /// Write the numbers to this file as well.
    #[arg(long, value_name = "FILE")]
    pub output_json: Option<PathBuf>,
}

/// Rising load.
#[derive(Clone, Debug, ClapArgs)]
pub struct Sweep {
    /// Who is measured.
    #[command(flatten)]
    pub server: Server,
    /// What is asked.
    #[command(flatten)]
    pub prompts: Prompts,
    /// What is reported.
    #[command(flatten)]
    pub reporting: Reporting,
    /// Loads as requests under way at once.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_concurrency: Vec<u32>,
    /// Loads as requests per second instead.
    #[arg(long, value_delimiter = ',', value_parser = positive, conflicts_with = "max_concurrency")]
    pub request_rate: Option<Vec<f64>>,
    /// As in `serve`, with --request-rate.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub burstiness: f64,
    /// Requests of each load [default: 6 for each one under way at once, or 30 s of a rate; at least 16].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub num_prompts: Option<u32>,
    /// Draw throughput and latency over load to this SVG file.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Serve, clap::Error> {
        let words = ["cluster bench"].into_iter().chain(line.split_whitespace());
        Args::try_parse_from(words).map(|args| match args.mode {
            Mode::Serve(serve) => *serve,
            mode => panic!("{mode:?}"),
        })
    }

    #[test]
    fn the_command_line_is_that_of_vllm() {
        let serve = parse(
            "serve --backend openai-chat --base-url http://h:1/ --model m --num-prompts 7 \
             --max-concurrency 3 --request-rate 2.5 --burstiness 0.5 --random-input-len 9 \
             --random-output-len 8 --random-prefix-len 4 --random-range-ratio 0.5 --seed 6 \
             --ignore-eos --percentile-metrics ttft,e2el --metric-percentiles 50,99.9 \
             --goodput ttft:300 tpot:20.5 e2el:9000 --save-result --save-detailed --result-dir d",
        )
        .unwrap();
        assert_eq!(serve.server.url(), "http://h:1");
        assert_eq!(serve.server.endpoint(), "/v1/chat/completions");
        assert_eq!((serve.max_concurrency, serve.request_rate), (Some(3), 2.5));
        let reporting = &serve.reporting;
        assert_eq!(reporting.percentile_metrics, [Metric::Ttft, Metric::E2el]);
        assert_eq!(reporting.metric_percentiles, [50.0, 99.9]);
        let limit = |metric, ms| Limit { metric, ms };
        assert_eq!(
            reporting.goodput,
            [
                limit(Metric::Ttft, 300.0),
                limit(Metric::Tpot, 20.5),
                limit(Metric::E2el, 9000.0)
            ]
        );
        let plain = parse("serve --request-rate inf --backend vllm --dataset-name random").unwrap();
        assert_eq!(plain.server.endpoint(), "/v1/completions");
        assert_eq!(plain.server.url(), "http://127.0.0.1:8000");
        assert!(plain.request_rate.is_infinite());
        let pasted = parse("serve --base-url http://h:1/v1/").unwrap();
        assert_eq!(pasted.server.url(), "http://h:1");
    }

    #[test]
    fn an_endpoint_says_which_api_it_is() {
        let chat = parse("serve --endpoint /v1/chat/completions").unwrap();
        assert_eq!(chat.server.backend(), Backend::OpenaiChat);
        let other = parse("serve --endpoint /x/generate --backend openai").unwrap();
        assert_eq!(other.server.backend(), Backend::Openai);
        assert_eq!(other.server.endpoint(), "/x/generate");
        assert!(parse("serve --endpoint v1/completions").is_err());
    }

    #[test]
    fn what_stands_behind_two_dashes_is_a_cluster_to_start() {
        let serve = parse("serve --seed 3 -- --model /m --cpus 2").unwrap();
        assert_eq!(serve.server.up, ["--model", "/m", "--cpus", "2"]);
        assert!(parse("serve --port 1 -- --cpus 2").is_err(), "two servers");
        let sweep = |line: &str| {
            Args::try_parse_from(
                ["cluster bench", "sweep"]
                    .into_iter()
                    .chain(line.split(' ')),
            )
        };
        assert!(sweep("--max-concurrency 1,2,4 -- --cpus 2").is_ok());
        assert!(sweep("--request-rate 0.5,8").is_ok());
        assert!(sweep("--request-rate 1,0").is_err());
        assert!(sweep("--request-rate 1 --max-concurrency 1").is_err());
    }

    #[test]
    fn numbers_that_make_no_load_are_refused() {
        for wrong in [
            "--request-rate 0",
            "--request-rate nan",
            "--burstiness 0",
            "--burstiness inf",
            "--num-prompts 0",
            "--max-concurrency 0",
            "--random-range-ratio 1",
            "--percentile-metrics ttfb",
            "--metric-percentiles 101",
            "--goodput itl:5",
            "--goodput ttft:0",
            "--goodput ttft",
        ] {
            assert!(parse(&format!("serve {wrong}")).is_err(), "{wrong}");
        }
    }
}
