//! The example's command line. A flag that is not known is an error that names it.

use anyhow::{Context, Result, bail, ensure};

/// What is measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// All cores, divided among the ranks.
    Cpu,
    /// This GPU, shared by all ranks.
    Gpu(usize),
}

/// What to measure.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) model: String,
    pub(crate) device: Device,
    pub(crate) tp: u32,
    pub(crate) decode: Vec<u32>,
    pub(crate) prefill: Vec<u32>,
    /// Lengths of prompts that are computed beside each batch of decoding sequences.
    pub(crate) beside: Vec<u32>,
    pub(crate) context: u32,
    pub(crate) steps: u32,
    pub(crate) dtype: String,
    /// Instruction set of the CPU, or `auto`.
    pub(crate) cpu_isa: String,
    pub(crate) quantization: String,
    pub(crate) kv_cache_dtype: String,
    /// Whether no step is recorded and replayed.
    pub(crate) eager: bool,
    /// Set by the launcher: which rank this process is.
    pub(crate) rank: Option<u32>,
    /// Set by the launcher: the communicator's identity, in hexadecimal; rank 0 makes it.
    pub(crate) id: Option<String>,
}

impl Options {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            model: String::new(),
            device: Device::Cpu,
            tp: 1,
            decode: vec![1, 8, 64, 256],
            prefill: vec![512, 2048, 8192],
            beside: Vec::new(),
            context: 512,
            steps: 32,
            dtype: "auto".to_owned(),
            cpu_isa: "auto".to_owned(),
            quantization: "auto".to_owned(),
            kv_cache_dtype: "auto".to_owned(),
            eager: false,
            rank: None,
            id: None,
        };
        while let Some(flag) = arguments.next() {
            let value = arguments.next();
            let value = value.with_context(|| format!("{flag} needs a value"))?;
            let number = || {
                value
                    .parse()
                    .with_context(|| format!("{flag} {value} is no number"))
            };
            match flag.as_str() {
                "--model" => options.model = value,
                "--device" => options.device = device(&value)?,
                "--tp" => options.tp = number()?,
                "--decode" => options.decode = list(&value)?,
                "--prefill" => options.prefill = list(&value)?,
                "--beside" => options.beside = list(&value)?,
                "--context" => options.context = number()?,
                "--steps" => options.steps = number()?,
                "--dtype" => options.dtype = value,
                "--cpu-isa" => options.cpu_isa = value,
                "--quantization" => options.quantization = value,
                "--kv-cache-dtype" => options.kv_cache_dtype = value,
                "--enforce-eager" => {
                    options.eager = value.parse().context("--enforce-eager is true or false")?;
                }
                "--rank" => options.rank = Some(number()?),
                "--id" => options.id = Some(value),
                _ => bail!("{flag} is not known"),
            }
        }
        ensure!(!options.model.is_empty(), "--model is missing");
        ensure!(
            options.tp > 0 && options.steps > 0,
            "--tp and --steps are at least 1"
        );
        Ok(options)
    }
}

fn device(text: &str) -> Result<Device> {
    if text == "cpu" {
        return Ok(Device::Cpu);
    }
    let index = text
        .strip_prefix("cuda:")
        .and_then(|index| index.parse().ok());
    Ok(Device::Gpu(index.context("--device is cpu or cuda:N")?))
}

/// `1,8,64`; nothing where the text is empty.
fn list(text: &str) -> Result<Vec<u32>> {
    let items = text.split(',').filter(|item| !item.is_empty());
    items
        .map(|item| {
            item.parse()
                .with_context(|| format!("`{item}` is no number"))
        })
        .collect()
}
