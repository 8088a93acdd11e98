//! Where values come from: flag, environment, file, default, in this order.
//!
//! The file's keys are flags without their dashes. A key counts only where neither the command line
//! nor the environment gave the flag; it is then read exactly as if it had been typed, by the same
//! parser with the same limits. Invariant: an unknown or unusable key is an error, never ignored.

use super::args::{Cli, Command, Up};
use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::Value;
use topology::spec::cluster::Setting;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A flag, or a request for help: clap knows what to print.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// A variable of the environment.
    #[error("{variable}: {reason}")]
    Environment {
        /// Its name.
        variable: String,
        /// What to change.
        reason: String,
    },
    /// The file.
    #[error("{}: {reason}", .file.display())]
    File {
        /// Which file.
        file: PathBuf,
        /// What to change.
        reason: String,
    },
}

/// Pairs of flags of which one is enough. Between layers the higher one wins, as between two values
/// of one flag; only within a layer is it a mistake to give both.
const RIVALS: [(&str, &str); 2] = [("model_positional", "model"), ("gpus", "cpus")];

/// Reads a command line (the program's name first) with everything below it.
///
/// # Errors
/// [`LayerError`] if a flag, the environment or the file is wrong, or help was asked for.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Cli, LayerError> {
    let mut argv: Vec<OsString> = argv.into_iter().map(long_spelling).collect();
    let mut matches = matches(&argv).map_err(|error| blame_environment(error, &argv))?;
    if let Some((name @ ("up" | "plan"), given)) = matches.subcommand()
        && let Some(file) = given.get_one::<PathBuf>("config")
    {
        let in_file = |reason| LayerError::File {
            file: file.clone(),
            reason,
        };
        let flags = flags(name).expect("it was just matched by this name");
        let extra = from_file(file, &flags, given).map_err(in_file)?;
        if !extra.is_empty() {
            argv.splice(2..2, extra);
            matches = self::matches(&argv).map_err(|error| in_file(sentence(&error)))?;
        }
    }
    let mut cli = Cli::from_arg_matches(&matches)?;
    split_keys(&mut cli.command, &matches);
    Ok(cli)
}

/// A variable is one text, so that several keys stand in it with commas between; a key that is typed, or stands in the
/// file, may have commas in it.
fn split_keys(command: &mut Command, matches: &ArgMatches) {
    let is_variable = || {
        let given = matches.subcommand().map(|(_, given)| given);
        given.and_then(|given| given.value_source("api_key")) == Some(ValueSource::EnvVariable)
    };
    match command {
        Command::Up(up) | Command::Plan(up) if is_variable() => {
            let keys = up.api_key.iter().flat_map(|keys| keys.split(','));
            up.api_key = keys.map(str::to_owned).collect();
        }
        Command::RunBatch(batch) if is_variable() => {
            let keys = batch.api_key.as_deref();
            batch.api_key = keys.and_then(|keys| Some(keys.split(',').next()?.to_owned()));
        }
        _ => {}
    }
}

/// Reads flags and environment, and settles which of two rivals counts.
fn matches(argv: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let mut command = command();
    let matches = command.clone().try_get_matches_from(argv)?;
    let Some((name @ ("up" | "plan"), given)) = matches.subcommand() else {
        return Ok(matches);
    };
    for (one, other) in RIVALS {
        let (Some(source), Some(rival)) = (given.value_source(one), given.value_source(other))
        else {
            continue;
        };
        if source == rival {
            let mut flags = flags(name).expect("it was just matched by this name");
            let shown = |id: &str| flags.get_arguments().find(|flag| flag.get_id() == id);
            let both = [one, other].into_iter().filter_map(shown);
            let both = both.map(ToString::to_string).collect::<Vec<_>>();
            let sentence = format!("give one of {}, not both", both.join(" and "));
            return Err(flags.error(ErrorKind::ArgumentConflict, sentence));
        }
        // Below the command line is only the environment here: the loser is not to read it.
        let loser = if source > rival { other } else { one };
        command = command.mut_subcommand(name, |flags| {
            flags.mut_arg(loser, |flag| flag.env(Resettable::Reset))
        });
    }
    command.try_get_matches_from(argv)
}

fn command() -> clap::Command {
    // A number may be wrong because it is negative; it is not another flag.
    let number = |flag: clap::Arg| {
        let negative = flag.get_long().is_some() && flag.get_action().takes_values();
        flag.allow_negative_numbers(negative)
    };
    Cli::command().mut_subcommands(|command| match command.get_name() {
        "up" | "plan" => command.mut_args(number),
        _ => command,
    })
}

/// The flags of a subcommand, if there is one of that name.
fn flags(name: &str) -> Option<clap::Command> {
    let mut command = command();
    command.build(); // so that flags and usage can be shown
    command.find_subcommand(name).cloned()
}

/// Spellings of `vllm serve` that clap does not know by itself.
fn long_spelling(argument: OsString) -> OsString {
    match argument.to_str() {
        Some("-tp") => "--tensor-parallel-size".into(),
        Some("--no-enable-prefix-caching") => "--enable-prefix-caching=false".into(),
        Some("--no-async-scheduling") => "--async-scheduling=false".into(),
        Some(text) => match text.strip_prefix("-tp=") {
            Some(size) => format!("--tensor-parallel-size={size}").into(),
            None => argument,
        },
        None => argument,
    }
}

/// clap says which value is wrong, but not that nobody typed it.
fn blame_environment(error: clap::Error, argv: &[OsString]) -> LayerError {
    let told = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (Some(shown), Some(value)) = (
        told(ContextKind::InvalidArg),
        told(ContextKind::InvalidValue),
    ) else {
        return error.into();
    };
    let flags = argv.get(1).and_then(|name| name.to_str()).and_then(flags);
    let flag = flags
        .as_ref()
        .and_then(|flags| flags.get_arguments().find(|flag| flag.to_string() == shown));
    let variable = flag.and_then(clap::Arg::get_env);
    match variable {
        Some(variable) if std::env::var_os(variable).is_some_and(|set| set == value) => {
            LayerError::Environment {
                variable: variable.to_string_lossy().into_owned(),
                reason: sentence(&error),
            }
        }
        _ => error.into(),
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
        .map_err(|e: toml::de::Error| not_toml(&e, &text))?;
    let above = |id: &str| given.value_source(id) > Some(ValueSource::DefaultValue);
    let mut extra = Vec::new();
    for (key, value) in &table {
        let name = key.replace('_', "-");
        let flag = flags
            .get_arguments()
            .find(|flag| flag.get_long() == Some(&*name))
            .filter(|_| !["adopt", "config", "print-config", "help"].contains(&&*name))
            .ok_or_else(|| format!("`{key}` is not a setting; `cluster up --help` lists them"))?;
        let values = match value {
            Value::Array(items) if matches!(flag.get_action(), ArgAction::Append) => {
                items.iter().map(scalar).collect()
            }
            value => scalar(value).map(|value| vec![value]),
        };
        let values: Vec<String> =
            values.ok_or_else(|| format!("`{key}` must be a text, a number, true or false"))?;
        let id = flag.get_id().as_str();
        let rival = RIVALS.iter().find_map(|(one, other)| match id {
            _ if id == *one => Some(*other),
            _ if id == *other => Some(*one),
            _ => None,
        });
        if !above(id) && !rival.is_some_and(above) {
            let typed = values.iter().map(|value| format!("--{name}={value}"));
            extra.extend(typed.map(OsString::from));
        }
    }
    Ok(extra)
}

fn not_toml(error: &toml::de::Error, text: &str) -> String {
    let begin = error.span().map_or(0, |span| span.start);
    let line = text[..begin].matches('\n').count() + 1;
    format!("line {line} is not TOML: {}", error.message())
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

/// clap's complaint without its headline word and usage, on one line.
fn sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().take_while(|line| !line.is_empty());
    let line = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    line.trim_start_matches("error: ").to_owned()
}

/// The flags with other values for some, read as if they had been typed.
///
/// # Errors
/// The setting that cannot be read, and why.
pub fn with_settings<'a>(up: &Up, settings: &'a [Setting]) -> Result<Up, (&'a Setting, String)> {
    let mut up = up.clone();
    for setting in settings {
        let flag = setting.key.replace('_', "-");
        let argv = ["up".to_owned(), format!("--{flag}={}", setting.value)];
        // Without defaults and environment: what is not typed stays.
        let command = Up::augment_args_for_update(clap::Command::new("up"));
        let mut command = command.mut_args(|flag| {
            let flag = flag.env(Resettable::Reset);
            flag.default_value(Resettable::Reset)
        });
        let matches = command.try_get_matches_from_mut(argv);
        let updated = matches.and_then(|matches| up.update_from_arg_matches(&matches));
        updated.map_err(|error| (setting, sentence(&error)))?;
    }
    Ok(up)
}

/// The settings as a file that `--config` reads.
pub fn print(command: &Command) -> String {
    match command {
        Command::Up(up) | Command::Plan(up) => {
            let mut up = (**up).clone();
            up.model = up.models().into_iter().map(str::to_owned).collect();
            // The type holds nothing that TOML cannot say.
            let mut text = toml::to_string(&up).expect("flags are scalars and lists of texts");
            if !up.api_key.is_empty() {
                text.push_str("# api-key is set and not shown\n");
            }
            text
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::scheduling::SchedulingPolicy;
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
            (got.port, got.block_size, got.scheduling.max_num_queued_reqs),
            (7000, 32, 1024)
        );
        assert!(!got.scheduling.enable_prefix_caching);
        assert_eq!(got.models(), ["m=/x"]);
        assert_eq!(got.api_key, ["a", "b"]);
        assert_eq!(got.max_model_len.to_string(), "32000");
        let got = up(&["/y", "--config", path]).unwrap();
        assert_eq!(got.models(), ["/y"]);
        let got = up(&["--model", "/y", "--config", path, "--enable-prefix-caching"]).unwrap();
        assert_eq!(
            (got.models(), got.scheduling.enable_prefix_caching),
            (vec!["/y"], true)
        );
        let got = up(&["--model", "a=/x", "--model", "b=/y", "--config", path]).unwrap();
        assert_eq!(got.models(), ["a=/x", "b=/y"]);
    }

    /// `--cpus` typed must not fail for a `gpus` that stands in a file somewhere.
    #[test]
    fn of_two_rivals_the_higher_layer_counts() {
        let file = file("gpus = \"0,1\"\nmodel = \"/x\"\n");
        let path = file.path().to_str().unwrap();
        let got = up(&["--config", path, "--cpus", "3", "/y"]).unwrap();
        assert_eq!((got.gpus, got.cpus.as_deref()), (None, Some("3")));
        let got = up(&["--config", path]).unwrap();
        assert_eq!((got.gpus.as_deref(), got.cpus), (Some("0,1"), None));
        for both in [
            &["--gpus", "0", "--cpus", "1"][..],
            &["/x", "--model", "/y"],
        ] {
            assert!(up(both).unwrap_err().contains("not both"));
        }
    }

    #[test]
    fn numbers_may_be_wrong_by_being_negative() {
        for flag in ["--port", "--max-logprobs", "--seed", "--block-size"] {
            let error = up(&[flag, "-1"]).unwrap_err();
            assert!(error.contains("invalid value '-1'"), "{flag}: {error}");
        }
        assert_eq!(up(&["-tp=4"]).unwrap().tensor_parallel_size, Some(4));
        assert!(
            up(&["--model", ""])
                .unwrap_err()
                .contains("value is required")
        );
    }

    #[test]
    fn what_is_wrong_in_the_file_is_said() {
        for (text, said) in [
            ("prot = 1", "`prot` is not a setting"),
            ("port = \"many\"", "invalid value 'many' for '--port"),
            ("port = { a = 1 }", "`port` must be"),
            ("\nport", "line 2 is not TOML"),
            ("port = [1, 2]", "`port` must be a text, a number"),
            ("seed = []", "`seed` must be"),
            ("port = -1", "-1 is not in"),
            ("log-format = \"xml\"", "[possible values: text, json]"),
            ("gpus = \"0\"\ncpus = 2", "not both"),
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
            "--no-async-scheduling",
            "--scheduling-policy",
            "priority",
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
        assert!(
            printed.contains("scheduling-policy = \"priority\""),
            "{printed}"
        );
        assert!(
            printed.contains("enable-prefix-caching = false"),
            "{printed}"
        );
    }

    #[test]
    fn a_models_own_settings_change_nothing_else_and_have_the_flags_limits() {
        let typed = [
            "--port",
            "7000",
            "--dtype",
            "bfloat16",
            "--no-async-scheduling",
        ];
        let all = up(&typed).unwrap();
        let setting = |key, value: &str| Setting {
            key,
            value: value.into(),
            line: 7,
        };
        let own = [
            setting("max_model_len", "32k"),
            setting("gpu_memory_utilization", "0.5"),
            setting("enforce_eager", "true"),
            setting("scheduling_policy", "priority"),
        ];
        let got = with_settings(&all, &own).unwrap();
        let mut expected = all.clone();
        expected.max_model_len = "32000"
            .parse::<u32>()
            .map(crate::cli::values::AutoTokens::Tokens)
            .unwrap();
        expected.gpu_memory_utilization = 0.5;
        expected.enforce_eager = true;
        expected.scheduling.scheduling_policy = SchedulingPolicy::Priority;
        assert_eq!(format!("{got:?}"), format!("{expected:?}"));
        for (key, value, said) in [
            ("dtype", "int3", "possible values"),
            ("max_model_len", "0", "at least 1"),
            ("gpu_memory_utilization", "1.5", "above 0 and up to 1"),
        ] {
            let wrong = [setting(key, value)];
            let (at, why) = with_settings(&all, &wrong).unwrap_err();
            assert!(at.line == 7 && why.contains(said), "{key}: {why}");
        }
    }

    #[test]
    fn a_typed_key_may_have_commas_in_it() {
        let got = up(&["--api-key", "a,b", "--api-key", "c"]).unwrap();
        assert_eq!(got.api_key, ["a,b", "c"]);
        let argv = ["run-batch", "-i", "i", "-o", "o", "--api-key", "a,b"];
        let argv = ["cluster"].iter().chain(&argv).map(OsString::from);
        let Command::RunBatch(batch) = parse(argv).unwrap().command else {
            panic!("not run-batch");
        };
        assert_eq!(batch.api_key.as_deref(), Some("a,b"));
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
