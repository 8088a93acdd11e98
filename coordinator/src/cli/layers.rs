//! Where values come from: flag, environment, file, default, in this order.
//!
//! The file's keys are flags without their dashes. A key counts only where neither the command line
//! nor the environment gave the flag; it is then read exactly as if it had been typed, by the same
//! parser with the same limits. Invariant: an unknown or unusable key is an error, never ignored.

use super::args::{Cli, Command};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::Value;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A flag, an environment variable, or a request for help: clap knows what to print.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The file.
    #[error("{}: {reason}", .file.display())]
    File {
        /// Which file.
        file: PathBuf,
        /// What to change.
        reason: String,
    },
}

/// Reads a command line (the program's name first) with everything below it.
///
/// # Errors
/// [`LayerError`] if a flag, the environment or the file is wrong, or help was asked for.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Cli, LayerError> {
    let mut argv: Vec<OsString> = argv.into_iter().map(long_spelling).collect();
    let matches = Cli::command().try_get_matches_from(&argv)?;
    if let Some((name @ ("up" | "plan"), given)) = matches.subcommand()
        && let Some(file) = given.get_one::<PathBuf>("config")
    {
        let command = Cli::command();
        let flags = command
            .find_subcommand(name)
            .expect("it was just matched by this name");
        let extra = from_file(file, flags, given).map_err(|reason| LayerError::File {
            file: file.clone(),
            reason,
        })?;
        if !extra.is_empty() {
            argv.splice(2..2, extra);
            let matches = Cli::command()
                .try_get_matches_from(&argv)
                .map_err(|error| LayerError::File {
                    file: file.clone(),
                    reason: first_sentence(&error),
                })?;
            return Ok(Cli::from_arg_matches(&matches)?);
        }
    }
    Ok(Cli::from_arg_matches(&matches)?)
}

/// Spellings of `vllm serve` that clap does not know by itself.
fn long_spelling(argument: OsString) -> OsString {
    match argument.to_str() {
        Some("-tp") => "--tensor-parallel-size".into(),
        Some("--no-enable-prefix-caching") => "--enable-prefix-caching=false".into(),
        _ => argument,
    }
}

/// The file's keys as flags, without those that the command line or the environment gave.
fn from_file(
    file: &Path,
    flags: &clap::Command,
    given: &ArgMatches,
) -> Result<Vec<OsString>, String> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("it cannot be read: {e}"))?;
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| format!("it is not TOML: {}", e.message()))?;
    let mut extra = Vec::new();
    for (key, value) in &table {
        let name = key.replace('_', "-");
        let flag = flags
            .get_arguments()
            .find(|flag| flag.get_long() == Some(&*name))
            .filter(|_| !["config", "print-config", "help"].contains(&&*name))
            .ok_or_else(|| format!("`{key}` is not a setting; `cluster up --help` lists them"))?;
        let id = flag.get_id().as_str();
        let source = given.value_source(id);
        let by_place = id == "model" && given.contains_id("model_positional");
        let above = [ValueSource::CommandLine, ValueSource::EnvVariable];
        if !by_place && source.is_none_or(|source| !above.contains(&source)) {
            let values = match value {
                Value::Array(items) => items.iter().map(scalar).collect(),
                value => scalar(value).map(|value| vec![value]),
            };
            let values: Vec<String> =
                values.ok_or_else(|| format!("`{key}` must be a text, a number, true or false"))?;
            extra.extend(
                values
                    .iter()
                    .map(|value| format!("--{name}={value}").into()),
            );
        }
    }
    Ok(extra)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(yes) => Some(yes.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

/// clap's complaint without its headline word and usage.
fn first_sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.trim_start_matches("error: ").to_owned()
}

/// The settings as a file that `--config` reads.
pub fn print(command: &Command) -> String {
    match command {
        Command::Up(up) | Command::Plan(up) => {
            let mut up = (**up).clone();
            up.model = up.model().map(str::to_owned);
            // The type holds nothing that TOML cannot say.
            let mut text = toml::to_string(&up).expect("flags are scalars and lists of texts");
            if !up.api_key.is_empty() {
                text.push_str("# api-key is set and not shown\n");
            }
            text
        }
        Command::Bench(_) | Command::Shard { .. } => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::Up;
    use std::io::Write;

    fn up(args: &[&str]) -> Result<Up, String> {
        let argv = ["cluster", "up"].iter().chain(args).map(OsString::from);
        match parse(argv).map_err(|e| e.to_string())?.command {
            Command::Up(up) => Ok(*up),
            other => panic!("not up: {other:?}"),
        }
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn the_file_is_below_flags_and_above_defaults() {
        let file = file(
            "port = 9000\nblock_size = 32\nenable-prefix-caching = false\nmodel = \"m=/x\"\n\
             api-key = [\"a\", \"b\"]\nmax-model-len = \"32k\"\n",
        );
        let path = file.path().to_str().unwrap();
        let got = up(&["--config", path, "--port", "7000"]).unwrap();
        assert_eq!(
            (got.port, got.block_size, got.max_num_queued_reqs),
            (7000, 32, 1024)
        );
        assert!(!got.enable_prefix_caching);
        assert_eq!(got.model(), Some("m=/x"));
        assert_eq!(got.api_key, ["a", "b"]);
        assert_eq!(got.max_model_len.to_string(), "32000");
        let got = up(&["/y", "--config", path]).unwrap();
        assert_eq!(got.model(), Some("/y"));
        let got = up(&["--model", "/y", "--config", path, "--enable-prefix-caching"]).unwrap();
        assert_eq!((got.model(), got.enable_prefix_caching), (Some("/y"), true));
    }

    #[test]
    fn what_is_wrong_in_the_file_is_said() {
        for (text, said) in [
            ("prot = 1", "`prot` is not a setting"),
            ("port = \"many\"", "invalid value 'many' for '--port"),
            ("port = { a = 1 }", "`port` must be"),
            ("port", "not TOML"),
            ("config = \"x\"", "`config` is not a setting"),
            ("block-size = 0", "invalid value '0' for '--block-size"),
        ] {
            let file = file(text);
            let error = up(&["--config", file.path().to_str().unwrap()]).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        assert!(
            up(&["--config", "/no/such"])
                .unwrap_err()
                .contains("cannot be read")
        );
    }

    #[test]
    fn printed_settings_read_back_the_same() {
        let args = [
            "/m",
            "-tp",
            "2",
            "--no-enable-prefix-caching",
            "--max-model-len",
            "32k",
        ];
        let argv = ["cluster", "up"].iter().chain(&args).map(OsString::from);
        let printed = print(&parse(argv).unwrap().command);
        let file = file(&printed);
        let argv = ["cluster", "up", "--config", file.path().to_str().unwrap()];
        let again = print(&parse(argv.map(OsString::from)).unwrap().command);
        assert_eq!(printed, again);
        assert!(printed.contains("tensor-parallel-size = 2"), "{printed}");
        assert!(printed.contains("max-model-len = 32000"), "{printed}");
    }

    #[test]
    fn keys_are_never_printed() {
        let argv = ["cluster", "up", "--api-key", "s3cret"].map(OsString::from);
        let printed = print(&parse(argv).unwrap().command);
        assert!(
            !printed.contains("s3cret") && printed.contains("not shown"),
            "{printed}"
        );
    }
}
