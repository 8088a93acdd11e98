//! Wrong input: one sentence that says what to change, exit code 2, and no shard was started.

use crate::process::{Cluster, command, run};
use crate::turn;
use coordinator::fleet::{Fleet, Limits, LocalHost, Program, RankSite, Setup};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use topology::model_shape::ModelShape;
use topology::partition::tensors;
use topology::placement::Device;
use topology::wire::{Load, ModelLocation};

/// What a machine without a GPU lacks first.
const NO_GPU: &str = if cfg!(feature = "cuda") {
    "NVIDIA driver"
} else {
    "a build with CUDA"
};

fn builtin() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin")
}

/// A copy of the built-in model that a test may spoil.
pub(crate) fn model() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("there is room");
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        fs::copy(builtin().join(name), directory.path().join(name)).expect("it is copied");
    }
    directory
}

fn config() -> Value {
    let text = fs::read(builtin().join("config.json")).expect("it is there");
    serde_json::from_slice(&text).expect("it is JSON")
}

fn set_config(directory: &Path, config: &Value) {
    fs::write(directory.join("config.json"), config.to_string()).expect("it is written");
}

/// Weights of the right shapes that take no room on disk: the file has a hole for data.
fn write_hollow_weights(directory: &Path, config: &Value) {
    let shape = ModelShape::from_config(config.to_string().as_bytes()).expect("a model");
    let mut header = json!({});
    let mut end = 0;
    for tensor in tensors(&shape) {
        let begin = end;
        end += 2 * u64::from(tensor.rows) * u64::from(tensor.cols);
        header[&tensor.name] =
            json!({"dtype": "BF16", "shape": tensor.stored_shape(), "data_offsets": [begin, end]});
    }
    let mut header = header.to_string();
    header.push_str(&" ".repeat(8 - header.len() % 8));
    let mut file = File::create(directory.join("model.safetensors")).expect("it is created");
    file.write_all(&(header.len() as u64).to_le_bytes())
        .expect("it is written");
    file.write_all(header.as_bytes()).expect("it is written");
    file.set_len(8 + header.len() as u64 + end)
        .expect("holes take no room");
}

/// `cluster up` must refuse these arguments with a sentence that holds all of `needles`.
fn refused(arguments: &[&str], needles: &[&str]) {
    let (code, stdout, stderr) = run(&[&["up", "--port", "0"], arguments].concat());
    let context = format!("{arguments:?}: {code}\n{stdout}\n{stderr}");
    assert_eq!(code, 2, "{context}");
    assert_eq!(stdout, "", "{context}");
    for needle in needles {
        assert!(stderr.contains(needle), "`{needle}` is not said; {context}");
    }
    assert!(
        !stderr.contains("rank 0: process"),
        "a shard was started; {context}"
    );
    if let Some(sentence) = stderr.strip_prefix("cluster: ") {
        assert_eq!(
            sentence.trim_end().lines().count(),
            1,
            "one sentence; {context}"
        );
    } else {
        assert!(stderr.starts_with("error: "), "{context}");
    }
}

#[test]
fn formats_of_weights_and_keys_must_fit() {
    for (arguments, needles) in [
        (&["--quantization", "int3"][..], &["int3", "int4", "gptq"]),
        (
            &["-q", "awq"],
            &["--quantization awq", "not quantised", "int8"],
        ),
        (
            &["--kv-cache-dtype", "int8"],
            &["int8", "bfloat16", "fp8_e4m3"],
        ),
    ] {
        refused(arguments, needles);
    }
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    for (arguments, needles) in [
        (&["--prot", "8000"][..], &["--prot"][..]),
        (&["--port", "eighty"], &["eighty", "--port"]),
        (&["--dtype", "int3"], &["int3", "bfloat16"]),
        // Without CUDA in the build, or without a driver on the machine.
        (&["--gpus", "0,1"], &["--gpus", NO_GPU]),
        (&["--gpu-memory-utilization", "1.5"], &["1.5", "up to 1"]),
        (&["--gpus", "all"], &["--gpus", "list of GPUs"]),
        (&["--gpus", "0", "--cpus", "1"], &["--gpus", "--cpus"]),
        (&["--cpus", "many"], &["--cpus", "`many`"]),
        (&["--cpus", "0-3,2"], &["--cpus", "named twice"]),
        (&["-tp", "3"], &["heads", "3"]),
        (
            &["--max-model-len", "32k"],
            &["--max-model-len 32000", "1024"],
        ),
        (
            &["--kv-cache-memory-bytes", "1k"],
            &["--kv-cache-memory-bytes 1000 B", "raise"],
        ),
        (&["--kv-cache-memory-bytes", "900T"], &["900T"]),
        (
            &["--kv-cache-memory-bytes", "900000G"],
            &["--kv-cache-memory-bytes", "lower"],
        ),
        (
            &["--max-num-seqs", "64", "--max-num-batched-tokens", "32"],
            &["--max-num-batched-tokens (32)", "--max-num-seqs (64)"],
        ),
        (
            &["--host", "0.0.0.0"],
            &["--api-key", "--insecure-no-api-key"],
        ),
        (&["--host", "no such host"], &["--host no such host"]),
        (
            &["--host", "192.0.2.1", "--api-key", "k"],
            &["192.0.2.1", "--host"],
        ),
        (
            &["--api-key-file", "/no/such"],
            &["--api-key-file /no/such"],
        ),
        (&["--api-key", ""], &["API key is empty"]),
        (
            &["--config", "/no/such.toml"],
            &["/no/such.toml", "cannot be read"],
        ),
        (
            &["--chat-template", "/no/such"],
            &["/no/such", "does not exist"],
        ),
        (
            &["--generation-config", "/no/such"],
            &["/no/such/generation_config.json"],
        ),
        (&["--log-level", "a=b=c"], &["--log-level a=b=c"]),
        // As the name of a part of the program it would silence all the others.
        (&["--log-level", "wran"], &["`wran` is no level"]),
        (
            &["--num-gpu-blocks-override", "4000000000"],
            &["--num-gpu-blocks-override 4000000000", "TiB", "lower it"],
        ),
        (
            &["--num-gpu-blocks-override", "1"],
            &["raise --num-gpu-blocks-override"],
        ),
        (&["--port", "-1"], &["'-1'", "0..=65535"]),
        (&["--model", ""], &["--model", "value is required"]),
    ] {
        refused(arguments, needles);
    }
}

#[test]
fn an_instruction_set_that_cannot_be_is_refused() {
    refused(&["--cpu-isa", "sse2"], &["sse2", "--cpu-isa", "portable"]);
    refused(
        &["--gpus", "0", "--cpu-isa", "avx2"],
        &["--cpu-isa is for CPU shards", "leave it out"],
    );
}

#[test]
fn a_port_in_use_is_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("there are free ports");
    let port = taken.local_addr().expect("it is bound").port().to_string();
    refused(&["--port", &port], &[&port, "in use", "--port"]);
}

#[test]
fn environment_and_file_are_read_and_refused_alike() {
    let output = command(&["up"])
        .env("CLUSTER_PORT", "eighty")
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("CLUSTER_PORT: ") && stderr.contains("eighty"),
        "{stderr}"
    );
    let output = command(&["plan", "--cpus", "1"])
        .env("CLUSTER_GPUS", "0,1")
        .output()
        .expect("it runs");
    assert_eq!(
        output.status.code(),
        Some(0),
        "a flag is above the environment"
    );
    let mut command = command(&["up", "--print-config", "--block-size", "32"]);
    let output = command
        .env("CLUSTER_PORT", "8123")
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("port = 8123") && text.contains("block-size = 32"),
        "{text}"
    );
    let mut file = tempfile::NamedTempFile::new().expect("there is room");
    writeln!(file, "port = 8124\nblock-sizes = 3").expect("it is written");
    let path = file.path().to_str().expect("a plain name");
    refused(
        &["--config", path],
        &[path, "`block-sizes` is not a setting"],
    );
}

#[test]
fn models_that_cannot_be_served_are_refused() {
    refused(
        &["--model", "/no/such/model"],
        &["/no/such/model", "does not exist"],
    );
    let spoiled = |spoil: &dyn Fn(&Path), needles: &[&str]| {
        let directory = model();
        spoil(directory.path());
        let path = directory.path().to_str().expect("a plain name");
        refused(&[path], needles);
    };
    let with = |key: &'static str, value: Value| {
        move |directory: &Path| {
            let mut config = config();
            config[key] = value.clone();
            set_config(directory, &config);
        }
    };
    let remove = |name: &'static str| {
        move |directory: &Path| fs::remove_file(directory.join(name)).expect("it was there")
    };
    spoiled(&remove("config.json"), &["config.json"]);
    spoiled(
        &remove("tokenizer.json"),
        &["tokenizer.json", "save_pretrained"],
    );
    spoiled(&remove("model.safetensors"), &["safetensors"]);
    spoiled(
        &with("architectures", json!(["GPTNeoXForCausalLM"])),
        &["GPTNeoXForCausalLM"],
    );
    spoiled(&with("architectures", json!(null)), &["architectures"]);
    spoiled(&with("num_hidden_layers", json!(5)), &["model.layers.4"]);
    spoiled(&with("intermediate_size", json!(100)), &["mlp", "100"]);
    spoiled(
        &|directory| {
            let file = File::options()
                .write(true)
                .open(directory.join("model.safetensors"));
            file.and_then(|file| file.set_len(1_000_000))
                .expect("it can be cut");
        },
        &["model.safetensors", "truncated"],
    );
    spoiled(
        &|directory| fs::write(directory.join("model.safetensors"), b"no").expect("written"),
        &["model.safetensors"],
    );
    spoiled(
        &|directory| fs::write(directory.join("config.json"), b"{]").expect("written"),
        &["config.json"],
    );
}

#[test]
fn a_model_that_is_not_what_its_manifest_lists_is_refused() {
    let directory = model();
    let path = directory.path().to_str().expect("a plain name");
    let manifest = directory.path().join("SHA256SUMS");
    let (zeros, config) = ("0".repeat(64), "config.json");
    fs::write(&manifest, format!("{zeros}  {config}\n")).expect("it is written");
    let unlisted = ["model.safetensors", "not listed", "SHA256SUMS"];
    refused(&["--model", path], &unlisted);
    let sums = std::process::Command::new("sha256sum")
        .args([config, "model.safetensors"])
        .current_dir(directory.path())
        .output()
        .expect("coreutils has it");
    let sums = String::from_utf8(sums.stdout).expect("it is UTF-8");
    fs::write(&manifest, &sums).expect("it is written");
    assert_eq!(run(&["plan", path]).0, 0);
    let right = &sums[..64];
    fs::write(&manifest, sums.replace(right, &zeros)).expect("it is written");
    refused(&["--model", path], &[config, right, &zeros]);
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_arithmetic() {
    let directory = model();
    let mut config = config();
    config["vocab_size"] = json!(10_000_000);
    config["hidden_size"] = json!(16384);
    config["num_hidden_layers"] = json!(1);
    set_config(directory.path(), &config);
    write_hollow_weights(directory.path(), &config);
    let path = directory.path().to_str().expect("a plain name");
    refused(
        &[path],
        &["does not fit", "free", "weights take 305", "--dtype"],
    );
}

#[test]
fn it_says_what_it_is() {
    let (code, stdout, _) = run(&["--version"]);
    assert_eq!(code, 0);
    assert!(
        stdout.starts_with("cluster 0.") && stdout.contains("build "),
        "{stdout}"
    );
    let (code, stdout, _) = run(&["up", "--help"]);
    assert_eq!(code, 0);
    for part in [
        "--tensor-parallel-size",
        "CLUSTER_PORT",
        "--insecure-no-api-key",
    ] {
        assert!(stdout.contains(part), "{part}");
    }
    assert!(run(&["--help"]).1.contains("Exit codes"));
    assert_eq!(run(&["bench", "serve", "--no-such"]).0, 2);
    assert!(
        run(&["bench", "serve", "--help"])
            .1
            .contains("--max-concurrency")
    );
}

/// The one file that is read while shards start already: they must be gone all the same.
#[test]
fn a_tokenizer_that_cannot_be_read_ends_what_was_started() {
    let _turn = turn();
    let directory = model();
    fs::write(directory.path().join("tokenizer.json"), b"{\"version\": 7}").expect("written");
    let path = directory.path().to_str().expect("a plain name");
    let (code, stdout, stderr) = run(&["up", "--port", "0", path]);
    assert_eq!((code, &*stdout), (2, ""), "{stderr}");
    assert!(stderr.contains("tokenizer.json"), "{stderr}");
}

#[test]
fn a_plan_starts_nothing_and_a_directory_is_served_under_its_names() {
    let directory = model();
    let path = directory.path().to_str().expect("a plain name");
    let (code, stdout, stderr) = run(&["plan", "--model", path, "-tp", "4", "--cpus", "4"]);
    assert_eq!(code, 0, "{stderr}");
    for needle in ["LlamaForCausalLM", "rank 3", "KV blocks of 16 tokens"] {
        assert!(stdout.contains(needle), "{needle}: {stdout}");
    }
    let (_, stdout, _) = run(&["plan", "--num-gpu-blocks-override", "77"]);
    assert!(stdout.contains("77 KV blocks of 16 tokens"), "{stdout}");
    let _turn = turn();
    let cluster = Cluster::start(&["--model", &format!("mine={path}"), "--dtype", "float32"]);
    let models: Value =
        serde_json::from_str(&crate::client::get(cluster.address, "/v1/models")).expect("JSON");
    assert_eq!(models["data"][0]["id"], "mine");
    let answer = crate::client::chat("What is 7 plus 5?", 16);
    let answer = crate::client::post(cluster.address, "/v1/chat/completions", &answer);
    assert!(crate::client::content(&answer).contains("12"), "{answer}");
    cluster.stop();
}

/// What a shard says of itself is held against what was started: another process would be ended in its place.
#[test]
fn a_shard_that_is_not_the_process_that_was_started_is_refused_and_the_field_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let (shell, cluster) = (dir.path().join("shell"), command(&[]));
    // Without `exec`, so that the shard is a child of what was started.
    let script = format!("#!/bin/sh\n'{}' \"$@\"\n", cluster.get_program().display());
    fs::write(&shell, script).expect("a file");
    fs::set_permissions(&shell, fs::Permissions::from_mode(0o700)).expect("it is ours");
    let device = Device::Cpu {
        threads: 1,
        cores: Vec::new(),
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let fault = runtime.block_on(async {
        let program = Program {
            path: shell.into(),
            log_level: "warn".into(),
            cpu_isa: "auto".into(),
            sites: vec![RankSite::here(device)],
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            alive: tokio::sync::mpsc::channel(1).0,
            witness: Arc::new(()),
            keeper: None,
        };
        let load = Load {
            model: ModelLocation::BuiltIn,
            tensor_parallel_size: 1,
            dtype: "auto".into(),
            quantization: "auto".to_owned(),
            kv_cache_dtype: "auto".to_owned(),
            block_size: 16,
            max_model_len: 64,
            max_num_batched_tokens: 64,
            max_num_seqs: 4,
            async_scheduling: true,
            enforce_eager: false,
        };
        let limit = Duration::from_secs(30);
        let setup = Setup {
            load,
            limits: Limits {
                startup: limit,
                step: limit,
            },
            generation: 0,
        };
        let host = LocalHost::new(program).expect("a socket");
        let started = Fleet::start(host, setup, |_| Ok(1), |_| {}).await;
        started.expect_err("it is another process").to_string()
    });
    assert!(fault.contains("its `pid` is"), "{fault}");
}
