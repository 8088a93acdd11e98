//! `cluster doctor`: what it says of good hosts, and of each thing that can be wrong with one.

use crate::network::{Network, NodeText};
use crate::process::run;
use crate::turn;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Findings, and the exit code.
fn doctor(arguments: &[&str]) -> (i32, Vec<Value>) {
    let (code, stdout, stderr) = run(&[&["doctor", "--json"], arguments].concat());
    let findings = serde_json::from_str(&stdout);
    (
        code,
        findings.unwrap_or_else(|_| panic!("{stdout}{stderr}")),
    )
}

/// The text of the one finding about `check` on `place`.
fn about(findings: &[Value], place: &str, check: &str, level: &str) -> String {
    let matches = |finding: &&Value| finding["place"] == place && finding["check"] == check;
    let found: Vec<_> = findings.iter().filter(matches).collect();
    let [finding] = found.as_slice() else {
        panic!("{place} {check}: {findings:?}");
    };
    assert_eq!(finding["level"], level, "{finding}");
    finding["text"].as_str().expect("a text").to_owned()
}

#[test]
fn this_machine_is_looked_at_without_a_topology() {
    let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin");
    let (code, table, stderr) = run(&["doctor", "--model", builtin.to_str().expect("UTF-8")]);
    assert_eq!(code, 0, "{table}{stderr}");
    for part in ["this machine", "memory", "limits", "model", "plan"] {
        assert!(table.contains(part), "{part} is not in:\n{table}");
    }
    assert!(table.contains(" 0 failed"), "{table}");
    let (code, findings) = doctor(&["--model", "/no/such"]);
    assert_eq!(code, 1);
    let text = about(&findings, "this machine", "model", "fail");
    assert!(
        text.contains("/no/such") && text.contains("put the model there"),
        "{text}"
    );
    let (code, _, stderr) = run(&["doctor", "--topology", "/no/such"]);
    assert!(code == 2 && stderr.contains("/no/such"), "{stderr}");
}

/// A model that is the same on all hosts, and another one.
fn models(network: &Network) -> [PathBuf; 2] {
    let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin");
    let files = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ];
    let models = ["model", "model-b"].map(|name| network.path(name));
    for directory in &models {
        fs::create_dir(directory).expect("a directory");
        for file in files {
            fs::copy(builtin.join(file), directory.join(file)).expect("it is copied");
        }
    }
    let config = models[1].join("config.json");
    let text = fs::read_to_string(&config).expect("it was copied");
    fs::write(config, text + "\n").expect("a file");
    models
}

/// What is found on two good hosts.
fn all_is_well(network: &Network, findings: &[Value]) {
    for node in ["a", "b"] {
        assert!(about(findings, node, "reach", "ok").contains("ssh root@"));
        assert!(about(findings, node, "interface", "ok").contains(&network.address(node)));
        for check in ["program", "control", "memory", "clock"] {
            about(findings, node, check, "ok");
        }
    }
    assert!(about(findings, "all", "model", "ok").contains("the same on every node"));
    let plan = about(findings, "all", "plan", "ok");
    assert!(plan.contains("fits on 2 ranks"), "{plan}");
    let speed = findings
        .iter()
        .find(|finding| finding["check"] == "all-reduce");
    let speed = speed.expect("it was measured");
    // A loaded machine may be slow.
    assert!(speed["level"] != "fail", "{speed}");
    let text = speed["text"].as_str().expect("a text");
    assert!(text.contains("over 2 nodes"), "{text}");
}

#[test]
fn hosts_are_examined_over_the_real_path() {
    let _turn = turn();
    let Some(network) = Network::make() else {
        return;
    };
    let nodes = ["a", "b"].map(|name| NodeText { name, shards: 1 });
    let file = network.topology(&nodes);
    let [model, other] = models(&network);
    let good = format!(
        "{}[[model]]\npath = \"{}\"\ndevices = [\"a\", \"b\"]\n",
        fs::read_to_string(&file).expect("it was written"),
        model.display()
    );
    fs::write(&file, &good).expect("a file");
    let name = file.to_str().expect("UTF-8");
    let (code, findings) = doctor(&["--deep", "--topology", name]);
    assert_eq!(code, 0, "{findings:?}");
    all_is_well(&network, &findings);
    println!("{}", run(&["doctor", "--topology", name]).1);

    let spoiled = |node: &str, check: &str, said: &str| {
        let (code, findings) = doctor(&["--topology", name]);
        let text = about(&findings, node, check, "fail");
        assert!(code == 1 && text.contains(said), "{code} {text}");
        about(&findings, "a", "memory", "ok"); // the rest is looked at all the same
    };
    network.mount("b", &other, &model);
    spoiled("all", "model", "b has another config.json;");

    let known = network.path("known");
    let keys = fs::read_to_string(&known).expect("it was written");
    let of_b = |line: &&str| line.starts_with(&network.address("b"));
    let right = keys.lines().find(of_b).expect("its key is known");
    let stranger = fs::read_to_string(network.path("stranger.pub")).expect("it was made");
    let wrong = format!("{} {}", network.address("b"), stranger.trim());
    fs::write(&known, keys.replace(right, &wrong)).expect("a file");
    spoiled("b", "reach", "host key is not known here, or has changed");

    fs::write(&known, &keys).expect("a file");
    network.set_link("b", "down");
    spoiled("b", "reach", "it cannot be reached");
}
