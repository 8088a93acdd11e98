//! Several models over two hosts, what each host checks of them before anything is started, and hosts that
//! lack GPUs. Skipped, with a line that says so, where hosts cannot be made.

use super::{Pair, recoveries, rounds};
use crate::client::{get, metric};
use crate::hosts::listening;
use crate::network::{Network, NodeText};
use crate::process::{Cluster, run, send_signal, until};
use crate::turn;
use rustix::process::Signal;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::thread;

/// Model `a` on the first shard of each node, `b` on the second.
fn topology(network: &Network, pair: &Pair) -> PathBuf {
    let nodes = ["a", "b"].map(|name| NodeText { name, shards: 2 });
    let file = network.topology(&nodes);
    let mut text = fs::read_to_string(&file).expect("it was written");
    for (number, model) in ["a", "b"].into_iter().enumerate() {
        let path = pair.path(model);
        let path = path.display();
        writeln!(
            text,
            "[[model]]\nname = \"{model}\"\npath = \"{path}\"\ndevices = [\"a:{number}\", \"b:{number}\"]"
        )
        .expect("strings grow");
    }
    text += "max_model_len = 512\n";
    fs::write(&file, text).expect("a file");
    file
}

#[test]
fn two_models_over_two_hosts_say_what_each_says_alone() {
    let _turn = turn();
    let Some(network) = Network::make() else {
        return;
    };
    let pair = Pair::make();
    let golden = pair.golden();
    let file = topology(&network, &pair);
    let file = file.to_str().expect("UTF-8");
    let (code, findings, stderr) = run(&["doctor", "--topology", file]);
    assert_eq!(code, 0, "{findings}{stderr}");
    for model in ["a", "b"] {
        let path = format!("{}: the same on every node", pair.path(model).display());
        assert!(findings.contains(&path), "{path} is not in:\n{findings}");
    }
    // Both go over the same nodes: that is one path.
    assert_eq!(findings.matches("over 2 nodes (a, b): ").count(), 1);
    assert!(findings.contains("a fits on 2 ranks") && findings.contains("; b fits on 2 ranks"));

    let cluster = Cluster::start(&["--topology", file]);
    let address = cluster.address;
    assert_eq!(rounds(address), golden);
    for node in ["a", "b"] {
        let pids = network.shards(node);
        assert_eq!(pids.len(), 2, "{node}");
        assert_eq!(listening(pids[0]), [22], "{node}");
    }
    let models: Value = serde_json::from_str(&get(address, "/v1/models")).expect("JSON");
    let lengths: Vec<_> = models["data"].as_array().expect("a list").iter().collect();
    assert_eq!(lengths[0]["id"], "a");
    assert_eq!(
        (&lengths[1]["id"], &lengths[1]["max_model_len"]),
        (&"b".into(), &512.into())
    );

    let (_, status, _) = run(&["status", "--json", "--port", &address.port().to_string()]);
    let status: Value = serde_json::from_str(&status).expect("JSON");
    let of_b = |rank: &&Value| rank["model"] == "b" && rank["host"] == "b";
    let ranks = status["ranks"].as_array().expect("a list");
    let victim = ranks.iter().find(of_b).expect("it has a rank there")["pid"].as_u64();
    let victim = u32::try_from(victim.expect("a process")).expect("a process id");
    let told = thread::spawn(move || rounds(address));
    until("both stream", || {
        metric(address, "vllm:num_requests_running", "") > 1.5
    });
    send_signal(victim, Signal::KILL);
    assert_eq!(told.join().expect("a stream was lost"), golden);
    until("b goes on", || recoveries(address, "b") > 0.5);
    assert!(recoveries(address, "a") < 0.5, "nothing happened to it");
    cluster.stop();
}

#[test]
fn other_nodes_check_their_files_too_before_anything_is_started() {
    let _turn = turn();
    let Some(network) = Network::make() else {
        return;
    };
    let pair = Pair::make();
    let sums = |model: &str| {
        let mut sums = std::process::Command::new("sh");
        let sums = sums.args(["-c", "sha256sum *.json *.safetensors > SHA256SUMS"]);
        let done = sums.current_dir(pair.path(model)).status();
        assert!(done.expect("sha256sum runs").success());
    };
    sums("a");
    let file = topology(&network, &pair);
    let file = file.to_str().expect("UTF-8");
    let up = || run(&["up", "--port", "0", "--topology", file]);
    let cluster = Cluster::start(&["--topology", file]);
    cluster.stop();

    // Node b has other weights where a's should be, and no manifest.
    network.mount("b", &pair.path("b"), &pair.path("a"));
    let (code, _, stderr) = up();
    assert!(code == 2 && stderr.contains("node b: "), "{code} {stderr}");
    assert!(
        stderr.contains("no SHA256SUMS, other than this machine"),
        "{stderr}"
    );
    // With the manifest that belongs to them, they are all right by themselves, and still others.
    sums("b");
    let (code, _, stderr) = up();
    assert!(
        code == 2 && stderr.contains("another SHA256SUMS"),
        "{code} {stderr}"
    );
    // With the right manifest they are found out by their digest, also by a deep look.
    let right = pair.path("a").join("SHA256SUMS");
    fs::copy(right, pair.path("b").join("SHA256SUMS")).expect("it is copied");
    let said = "model.safetensors is not the file that SHA256SUMS lists";
    let (code, _, stderr) = up();
    assert!(
        code == 2,
        "the coordinator's own b is wrong now: {code} {stderr}"
    );
    fs::write(file, one_model(file)).expect("a file");
    let (code, _, stderr) = up();
    assert!(
        code == 2 && stderr.contains("node b: ") && stderr.contains(said),
        "{stderr}"
    );
    let (code, findings, _) = run(&["doctor", "--deep", "--topology", file]);
    assert!(code == 1 && findings.contains(said), "{findings}");
    until("nothing was started, and who was asked has gone", || {
        ["a", "b"]
            .iter()
            .all(|node| network.shards(node).is_empty())
    });
}

/// The file without its last model.
fn one_model(file: &str) -> String {
    let text = fs::read_to_string(file).expect("it was written");
    let end = text.rfind("[[model]]").expect("there are two");
    text[..end].to_owned()
}

#[test]
fn nodes_without_gpus_say_so_and_nccl_needs_an_interface() {
    let _turn = turn();
    let Some(network) = Network::make() else {
        return;
    };
    let nodes = ["a", "b"].map(|name| NodeText { name, shards: 1 });
    let file = network.topology(&nodes);
    let text = fs::read_to_string(&file).expect("it was written");
    let text = text.replace("cpus = 1\nshards = 1\n", "gpus = \"0\"\n");
    fs::write(&file, &text).expect("a file");
    let name = file.to_str().expect("UTF-8");
    let (code, _, stderr) = run(&["up", "--port", "0", "--topology", name]);
    assert!(
        code == 2 && stderr.contains("give node a an `interface`"),
        "{stderr}"
    );
    let text = text.replace("gpus = ", "interface = \"eth0\"\ngpus = ");
    fs::write(&file, text).expect("a file");
    let (code, _, stderr) = run(&["up", "--port", "0", "--topology", name]);
    assert!(
        code == 2 && stderr.contains("its `gpus` cannot be used: "),
        "{code} {stderr}"
    );
    let (code, findings, _) = run(&["doctor", "--topology", name]);
    assert_eq!(code, 1, "{findings}");
    assert!(
        findings.contains("there is no eth0; change `interface`"),
        "{findings}"
    );
    until("nothing was started, and who was asked has gone", || {
        ["a", "b"]
            .iter()
            .all(|node| network.shards(node).is_empty())
    });
}
