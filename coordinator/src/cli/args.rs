//! The command line: every flag, its environment variable, default and help text.
//!
//! Says nothing of what the values mean for each other (`check` does) or where else they may come
//! from (`layers` does). Flags that `vllm serve` has keep its names and meaning.

use super::scheduling::Scheduling;
use super::values::{AutoTokens, bytes, cluster_name, part};
use clap::builder::{
    BoolishValueParser, NonEmptyStringValueParser as NonEmpty, PossibleValuesParser,
};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use std::ffi::OsString;
use std::path::PathBuf;
use topology::launch::attend::Charge;
use topology::model_shape::KvDtype;

/// Serves large language models from several devices at once.
#[derive(Debug, Parser)]
#[command(name = "cluster", version, long_version = super::long_version(), after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    stopped as asked: running requests finished or --shutdown-timeout passed
  1    the cluster could not start or could not go on; the log says which rank and why. `status`: it is
       not ready; `down`: it did not end; `doctor`: something will not work
  2    a flag, the configuration, the model or the port is wrong; nothing was started;
       `status`, `logs`, `down`: there is no such cluster
  130  a second Ctrl-C or SIGTERM, or `down --now`, ended it at once";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start shards, load a model and serve it over HTTP.
    Up(Box<Up>),
    /// Show how a model would be placed and how many KV blocks fit, and start nothing.
    Plan(Box<Up>),
    /// Say where a running cluster stands; exit code 0 only if it is ready.
    Status(Status),
    /// Show what shards print, also those that are gone.
    Logs(Logs),
    /// End a running cluster: its requests finish first.
    Down(Down),
    /// Answer the requests of a file into another file; started again, it goes on where it was.
    RunBatch(RunBatch),
    /// Find what would go wrong with a topology file, or on this machine, before anything is loaded.
    Doctor(Doctor),
    /// Measure a server: latency, throughput, overhead.
    #[command(disable_help_flag = true)]
    Bench(Rest),
    /// One shard process; started by `up`, not by people.
    #[command(hide = true)]
    Shard {
        /// Which log lines it writes to standard error.
        #[arg(long, default_value = "info")]
        log: String,
        /// Print what GPUs this host has, and exit.
        #[arg(long)]
        probe: bool,
        /// Answer what `cluster doctor` asks about this host.
        #[arg(long)]
        examine: bool,
        /// Look after a shard of this host for a coordinator on another one.
        #[arg(long, value_name = "JSON")]
        attend: Option<Charge>,
        /// Take the place of a shard of this host, which is ended first.
        #[arg(long, value_name = "JSON", conflicts_with = "attend")]
        after: Option<Charge>,
    },
}

/// Arguments that another crate reads.
#[derive(Args, Debug)]
pub struct Rest {
    /// As given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

/// Which cluster of this user on this machine is meant; needed only where there are several.
#[derive(Args, Clone, Debug, Default)]
pub struct Which {
    /// The one that was started with this --name.
    #[arg(long, env = "CLUSTER_NAME", value_name = "NAME", value_parser = cluster_name)]
    pub name: Option<String>,
    /// The one that serves on this port.
    #[arg(long, env = "CLUSTER_PORT")]
    pub port: Option<u16>,
    /// Where it was started with this --run-dir.
    #[arg(long, env = "CLUSTER_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

/// Flags of `cluster status`.
#[derive(Args, Clone, Debug)]
pub struct Status {
    /// Which cluster.
    #[command(flatten)]
    pub which: Which,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `cluster logs`.
#[derive(Args, Clone, Debug)]
pub struct Logs {
    /// One shard's, by its number in `cluster status` (with one model, its rank); without it, all in the order of their times.
    #[arg(value_name = "SHARD")]
    pub shard: Option<u32>,
    /// Go on with what is printed from now, until the cluster has ended.
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines of each shard.
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// Which cluster; one that has ended is found too.
    #[command(flatten)]
    pub which: Which,
}

/// Flags of `cluster down`.
#[derive(Args, Clone, Debug)]
pub struct Down {
    /// Which cluster.
    #[command(flatten)]
    pub which: Which,
    /// Do not wait for running requests.
    #[arg(long)]
    pub now: bool,
}

/// Flags of `cluster run-batch`. Files have the form of OpenAI's batches.
#[derive(Args, Clone, Debug)]
pub struct RunBatch {
    /// Requests: a JSON object with `custom_id`, `method`, `url` and `body` in each line.
    #[arg(short, long, value_name = "FILE")]
    pub input_file: PathBuf,
    /// Answers, in the order in which they come. What is there already is not asked again.
    #[arg(short, long, value_name = "FILE")]
    pub output_file: PathBuf,
    /// The model of requests that name none.
    #[arg(long, value_name = "NAME", value_parser = NonEmpty::new())]
    pub model: Option<String>,
    /// Most requests under way at the same time.
    #[arg(long, default_value_t = 64, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_concurrency: u32,
    /// Seconds after which a server that takes no request is given up. One that hangs is noticed when a request has
    /// waited for an hour.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub retry_timeout: u32,
    /// Key to present; of several in the variable, the first.
    #[arg(
        long,
        env = "CLUSTER_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub api_key: Option<String>,
    /// Any OpenAI server (http://HOST:PORT) instead of a cluster of this user on this machine.
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// Which cluster.
    #[command(flatten)]
    pub which: Which,
}

/// Flags of `cluster doctor`.
#[derive(Args, Clone, Debug)]
pub struct Doctor {
    /// TOML file of the nodes; without it, this machine is looked at.
    #[arg(long, env = "CLUSTER_TOPOLOGY", value_name = "FILE")]
    pub topology: Option<PathBuf>,
    /// Directory of the model, where the file names none; several times for several.
    #[arg(long, env = "CLUSTER_MODEL", value_delimiter = ',', value_name = "[NAME=]DIR",
          value_parser = NonEmpty::new())]
    pub model: Vec<String>,
    /// Read the weights whole and compare them by SHA-256, with each other and with SHA256SUMS where there is one;
    /// takes as long as reading them does.
    #[arg(long)]
    pub deep: bool,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What the API's element type of weights may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DtypeArg {
    /// What the model's configuration says.
    Auto,
    /// 32-bit float.
    #[value(alias = "float")]
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE half.
    #[value(alias = "half")]
    Float16,
}

impl DtypeArg {
    /// As it is spelled on the command line and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

/// What CPU shards compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum CpuIsaArg {
    /// The best that the CPU has, in the order below.
    Auto,
    /// Matrix tiles for weights of bfloat16, the next one for all else.
    Amx,
    /// 512-bit vectors, with instructions for products of bytes.
    Avx512Vnni,
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors.
    Avx2,
    /// What every CPU has.
    Portable,
}

impl CpuIsaArg {
    /// As it is spelled on the command line and for shards.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Amx => "amx",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// What weights may be quantised to at load, and how a checkpoint may be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum QuantizationArg {
    /// 8 bits, a scale for each output.
    Int8,
    /// 4 bits, a scale and a zero for each 128 inputs of an output.
    Int4,
    /// 8-bit floats (`E4M3`), a scale for each output; also checkpoints stored so.
    Fp8,
    /// The checkpoint is GPTQ's.
    Gptq,
    /// The checkpoint is AWQ's.
    Awq,
    /// The checkpoint is compressed-tensors'.
    CompressedTensors,
}

impl QuantizationArg {
    /// As it is spelled on the command line and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
            Self::Gptq => "gptq",
            Self::Awq => "awq",
            Self::CompressedTensors => "compressed-tensors",
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Flags of `cluster up`. Of a flag that is given twice the last counts.
#[derive(Args, Clone, Debug, Serialize)]
#[command(args_override_self = true)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line"
)]
pub struct Up {
    /// Directory of the model, or NAME=DIR; without one, the built-in demo model.
    #[arg(value_name = "MODEL", value_parser = NonEmpty::new())]
    #[serde(skip)]
    pub model_positional: Option<String>,
    /// Directory of the model, or NAME=DIR. Given several times, each is served under its name, on a part of the
    /// devices: they are dealt out in order, --tensor-parallel-size to each. If it has a SHA256SUMS, as `sha256sum * >
    /// SHA256SUMS` writes it, every file listed there is checked first.
    #[arg(long, env = "CLUSTER_MODEL", value_delimiter = ',', value_name = "[NAME=]DIR",
          value_parser = NonEmpty::new(), help_heading = MODEL)]
    pub model: Vec<String>,
    /// Names under which the API knows the model; the first one is shown.
    #[arg(long, env = "CLUSTER_SERVED_MODEL_NAME", num_args = 1.., value_delimiter = ',',
          value_name = "NAME", value_parser = NonEmpty::new(), help_heading = MODEL)]
    pub served_model_name: Vec<String>,
    /// Element type of the weights.
    #[arg(long, env = "CLUSTER_DTYPE", default_value = "auto", help_heading = MODEL)]
    pub dtype: DtypeArg,
    /// Quantise a checkpoint's linear layers at load: int8, int4 or fp8; or how it is quantised (short: -q).
    #[arg(short, long, env = "CLUSTER_QUANTIZATION", value_name = "FORMAT", help_heading = MODEL)]
    pub quantization: Option<QuantizationArg>,
    /// Longest sequence, prompt and answer together: `auto`, 4096, 32k.
    #[arg(long, env = "CLUSTER_MAX_MODEL_LEN", default_value = "auto", value_name = "TOKENS",
          value_parser = AutoTokens::parse, help_heading = MODEL)]
    pub max_model_len: AutoTokens,
    /// Where default sampling parameters come from: the model (`auto`), nowhere (`vllm`), or a directory, whose
    /// `max_new_tokens` is then a bound for all requests.
    #[arg(long, env = "CLUSTER_GENERATION_CONFIG", default_value = "auto",
          value_name = "auto|vllm|DIR", value_parser = NonEmpty::new(), help_heading = MODEL)]
    pub generation_config: String,
    /// Chat template to use instead of the model's own.
    #[arg(long, env = "CLUSTER_CHAT_TEMPLATE", value_name = "FILE", help_heading = MODEL)]
    pub chat_template: Option<PathBuf>,
    /// Seeds of requests that give none follow from this one; without it, from chance.
    #[arg(long, env = "CLUSTER_SEED", help_heading = MODEL)]
    pub seed: Option<u64>,

    /// TOML file of the nodes, their devices and the models'; instead of --gpus, --cpus and
    /// --tensor-parallel-size. What it says of a model goes before these flags, which are for all models.
    #[arg(long, env = "CLUSTER_TOPOLOGY", value_name = "FILE", help_heading = DEVICES)]
    pub topology: Option<PathBuf>,
    /// GPUs to use, one rank on each: 0,1,2,3. A GPU that is named twice is shared, for tests.
    #[arg(long, env = "CLUSTER_GPUS", value_name = "LIST", value_parser = NonEmpty::new(),
          help_heading = DEVICES)]
    pub gpus: Option<String>,
    /// CPU cores for all shards: a list to pin threads to (0-3,8), or a count (4), spread over NUMA nodes.
    #[arg(long, env = "CLUSTER_CPUS", value_name = "COUNT|LIST", value_parser = NonEmpty::new(),
          help_heading = DEVICES)]
    pub cpus: Option<String>,
    /// Instruction set that CPU shards compute with; one that a CPU lacks is refused.
    #[arg(long, env = "CLUSTER_CPU_ISA", default_value = "auto", help_heading = DEVICES)]
    pub cpu_isa: CpuIsaArg,
    /// Shards each model is split over (short: -tp).
    #[arg(long, env = "CLUSTER_TENSOR_PARALLEL_SIZE", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=64), help_heading = DEVICES)]
    pub tensor_parallel_size: Option<u32>,
    /// Part of each GPU's memory that may be taken, from 0 to 1.
    #[arg(long, env = "CLUSTER_GPU_MEMORY_UTILIZATION", default_value_t = 0.92, value_name = "PART",
          value_parser = part, help_heading = DEVICES)]
    pub gpu_memory_utilization: f64,
    /// Memory for KV blocks on each rank: 4G, 500m; without it, what is left is shared out.
    #[arg(long, env = "CLUSTER_KV_CACHE_MEMORY_BYTES", value_name = "BYTES", value_parser = bytes,
          help_heading = DEVICES)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// What keys and values are kept as; `auto` is 32-bit floats on the CPU, and as the weights on GPUs.
    #[arg(long, env = "CLUSTER_KV_CACHE_DTYPE", default_value = "auto", value_name = "TYPE",
          value_parser = PossibleValuesParser::new(KvDtype::NAMES), help_heading = DEVICES)]
    pub kv_cache_dtype: String,
    /// Number of KV blocks, instead of what fits.
    #[arg(long, env = "CLUSTER_NUM_GPU_BLOCKS_OVERRIDE", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..), help_heading = DEVICES)]
    pub num_gpu_blocks_override: Option<u32>,
    /// Tokens per KV block.
    #[arg(long, env = "CLUSTER_BLOCK_SIZE", default_value_t = 16, value_name = "TOKENS",
          value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = DEVICES)]
    pub block_size: u32,
    /// Queue every kernel of every step on its own: decode steps are not recorded as CUDA graphs.
    #[arg(long, env = "CLUSTER_ENFORCE_EAGER", default_value_t = false,
          default_missing_value = "true", num_args = 0..=1, require_equals = true,
          value_name = "BOOL", value_parser = BoolishValueParser::new(),
          action = clap::ArgAction::Set, help_heading = DEVICES)]
    pub enforce_eager: bool,

    /// What a step holds and what may wait.
    #[command(flatten)]
    #[serde(flatten)]
    pub scheduling: Scheduling,

    /// Address to serve on. Anything but this machine's own loopback asks for an API key.
    #[arg(long, env = "CLUSTER_HOST", default_value = "127.0.0.1", value_parser = NonEmpty::new(),
          help_heading = SERVER)]
    pub host: String,
    /// Port to serve on; 0 takes a free one, and the output says which.
    #[arg(long, env = "CLUSTER_PORT", default_value_t = 8000, help_heading = SERVER)]
    pub port: u16,
    /// Key that clients must present; may be repeated. The variable may hold several, with commas between.
    #[arg(long, env = "CLUSTER_API_KEY", hide_env_values = true, value_name = "KEY", help_heading = SERVER)]
    #[serde(skip)] // a printed configuration must not spread secrets
    pub api_key: Vec<String>,
    /// File with one key per line; `#` begins a comment.
    #[arg(long, env = "CLUSTER_API_KEY_FILE", value_name = "FILE", help_heading = SERVER)]
    pub api_key_file: Option<PathBuf>,
    /// Serve other machines without any key.
    #[arg(long, env = "CLUSTER_INSECURE_NO_API_KEY", default_value_t = false,
          default_missing_value = "true", num_args = 0..=1, require_equals = true,
          value_name = "BOOL", value_parser = BoolishValueParser::new(),
          action = clap::ArgAction::Set, help_heading = SERVER)]
    pub insecure_no_api_key: bool,
    /// Web origins whose pages may call the API; `*` is any.
    #[arg(long, env = "CLUSTER_ALLOWED_ORIGINS", value_delimiter = ',', value_name = "ORIGIN",
          value_parser = NonEmpty::new(), help_heading = SERVER)]
    pub allowed_origins: Vec<String>,
    /// Seconds that running requests get to finish after Ctrl-C or SIGTERM.
    #[arg(long, env = "CLUSTER_SHUTDOWN_TIMEOUT", default_value_t = 30, value_name = "SECONDS",
          help_heading = SERVER)]
    pub shutdown_timeout: u32,
    /// Seconds that reading the weights may take.
    #[arg(long, env = "CLUSTER_STARTUP_TIMEOUT", default_value_t = 600, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(1..), help_heading = SERVER)]
    pub startup_timeout: u32,
    /// Seconds that one step may take before the cluster is taken for stuck.
    #[arg(long, env = "CLUSTER_STEP_TIMEOUT", default_value_t = 300, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(1..), help_heading = SERVER)]
    pub step_timeout: u32,
    /// How often in a row, without a new token, a scored prompt or ten idle minutes in between, the group of shards may be formed again after a fault.
    #[arg(long, env = "CLUSTER_MAX_RECOVERY_ATTEMPTS", default_value_t = 10, value_name = "N", help_heading = SERVER)]
    pub max_recovery_attempts: u32,
    /// Seconds that shards keep what they loaded when this process is killed, for a `cluster up` with the same
    /// settings to go on with; 0: they end with it.
    #[arg(long, env = "CLUSTER_SHARD_GRACE_PERIOD", default_value_t = 60, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(..=86_400), help_heading = SERVER)]
    pub shard_grace_period: u32,
    /// Take over the shards of a process that was killed, or fail. Without it they are taken over where
    /// nothing has changed, and ended where something has.
    #[arg(long, help_heading = SERVER)]
    #[serde(skip)] // what is to be done once is no setting
    pub adopt: bool,
    /// What `cluster status`, `logs` and `down` call it [default: the port].
    #[arg(long, env = "CLUSTER_NAME", value_name = "NAME", value_parser = cluster_name, help_heading = SERVER)]
    pub name: Option<String>,
    /// Where this user's clusters leave logs and background requests, and are reached by `cluster status`, `logs` and
    /// `down` [default: cluster in the user's runtime directory, or /tmp/cluster-UID].
    #[arg(long, env = "CLUSTER_RUN_DIR", value_name = "DIR", help_heading = SERVER)]
    pub run_dir: Option<PathBuf>,
    /// How log lines look.
    #[arg(long, env = "CLUSTER_LOG_FORMAT", default_value = "text", help_heading = SERVER)]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter such as `coordinator=debug`.
    #[arg(long, env = "CLUSTER_LOG_LEVEL", default_value = "warn", help_heading = SERVER)]
    pub log_level: String,
    /// TOML file whose keys are these flags; flags and environment come first.
    #[arg(long, env = "CLUSTER_CONFIG", value_name = "FILE", help_heading = SERVER)]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Print what flags, environment, file and defaults come to, as such a file, and exit.
    #[arg(long, help_heading = SERVER)]
    #[serde(skip)]
    pub print_config: bool,
}

const MODEL: &str = "Model";
const DEVICES: &str = "Devices and memory";
const SERVER: &str = "Server";
