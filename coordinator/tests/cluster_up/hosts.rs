//! Clusters over two hosts: the text of one host, ranks replaced where they were, and sentences for what
//! is wrong with the way to a node. Skipped, with a line that says so, where hosts cannot be made.

use crate::client::{metric, request};
use crate::network::{Network, NodeText};
use crate::process::{Cluster, is_running, run, send_signal, until};
use crate::recovery::{recoveries, round};
use crate::turn;
use coordinator::clock;
use rustix::process::Signal;
use std::fs;
use std::thread;
use std::time::Duration;

const STREAMS: usize = 8;
const TOKENS: u32 = 120;

/// What the project promises from a cut to `/health` telling of it, and to the next token where the node can be reached
/// again by then. The link knows after 2.25 s at most, which its own tests hold it to.
const CUT_LIMIT: Duration = Duration::from_secs(3);
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// Cuts of which one must be so.
const CUT_ROUNDS: u32 = 4;

pub(crate) fn nodes(shards: u32) -> [NodeText<'static>; 2] {
    ["a", "b"].map(|name| NodeText { name, shards })
}

/// What one host says.
fn golden(ranks: u32) -> Vec<String> {
    let ranks = ranks.to_string();
    let cluster = Cluster::start(&["--tensor-parallel-size", &ranks]);
    let told = round(cluster.address, STREAMS, TOKENS);
    cluster.stop();
    told
}

/// TCP ports that are listened on where a process is.
pub(crate) fn listening(pid: u32) -> Vec<u16> {
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).expect("it runs");
        let rows = text.lines().skip(1).map(|row| row.split_ascii_whitespace());
        let rows = rows.map(Iterator::collect::<Vec<_>>);
        let port = |row: &[&str]| u16::from_str_radix(row[1].rsplit(':').next()?, 16).ok();
        ports.extend(
            rows.filter(|row| row[3] == "0A")
                .filter_map(|row| port(&row)),
        );
    }
    ports
}

#[test]
fn two_hosts_say_what_one_says_and_a_killed_rank_comes_back_where_it_was() {
    let _turn = turn();
    let Some(network) = Network::make() else {
        return;
    };
    for shards in [1, 2] {
        let golden = golden(2 * shards);
        let topology = network.topology(&nodes(shards));
        let cluster = Cluster::start(&["--topology", topology.to_str().expect("UTF-8")]);
        for node in ["a", "b"] {
            let pids = network.shards(node);
            assert_eq!(pids.len(), shards as usize, "{node}");
            assert!(pids.iter().all(|pid| network.is_on(*pid, node)));
            // The group is formed: but for sshd nobody waits for anybody.
            assert_eq!(listening(pids[0]), [22], "{node}");
        }
        assert_eq!(round(cluster.address, STREAMS, TOKENS), golden);

        disturb(&network, &cluster, Some(Signal::KILL), &golden);
        // How a rank is found missing does not depend on how many there are.
        if shards == 1 {
            disturb(&network, &cluster, Some(Signal::STOP), &golden);
            // Other work of the machine may delay one; it has to be as promised once.
            let is_in_time = (0..CUT_ROUNDS).any(|_| {
                let (noticed, resumed) = disturb(&network, &cluster, None, &golden);
                noticed < CUT_LIMIT && resumed < SILENCE_LIMIT
            });
            assert!(
                is_in_time,
                "noticed in {CUT_LIMIT:?} and over in {SILENCE_LIMIT:?}"
            );
        }
        cluster.stop();
        until("no shard is left on any node", || {
            network.shards("a").is_empty() && network.shards("b").is_empty()
        });
    }
}

/// Sends the first shard of node `b` a signal, or cuts the node off until that is noticed, while it streams; nothing is
/// lost, and another process takes its place there. How long a cut took to be noticed, and to the next token.
#[expect(clippy::print_stdout, reason = "figures of a test, shown on demand")]
fn disturb(
    network: &Network,
    cluster: &Cluster,
    signal: Option<Signal>,
    golden: &[String],
) -> (Duration, Duration) {
    let address = cluster.address;
    let told = thread::spawn(move || round(address, STREAMS, TOKENS));
    until("it streams", || {
        metric(address, "vllm:num_requests_running", "") > 0.5
    });
    let before = recoveries(cluster);
    let spent = || metric(address, "cluster_recovery_seconds_sum", "");
    let spent_before = spent();
    let (survivors, others) = (network.shards("a"), network.shards("b"));
    let mut times = (Duration::ZERO, Duration::ZERO);
    if let Some(signal) = signal {
        send_signal(others[0], signal);
    } else {
        let begun = clock::now();
        network.set_link("b", "down");
        until("the cut is noticed", || {
            request(address, "GET", "/health", "").0 == 503
        });
        times.0 = clock::since(begun);
        network.set_link("b", "up");
        let tokens = || metric(address, "vllm:generation_tokens_total", "");
        let known = tokens();
        until("a token is computed", || tokens() > known);
        times.1 = clock::since(begun);
        println!(
            "a cut was noticed after {:.1?}, the next token came after {:.1?}",
            times.0, times.1
        );
    }
    assert_eq!(told.join().expect("a stream was lost"), golden);
    assert!(recoveries(cluster) > before, "it was disturbed");
    let took = spent() - spent_before;
    println!("requests went on {took:.2} s after the fault ({signal:?})");
    assert_eq!(
        network.shards("a"),
        survivors,
        "survivors keep their processes"
    );
    until("the old process is gone", || !is_running(others[0]));
    let replaced = network.shards("b");
    assert_eq!(replaced.len(), others.len());
    assert!(!replaced.contains(&others[0]) && replaced.iter().all(|pid| network.is_on(*pid, "b")));
    assert_eq!(request(address, "GET", "/health", "").0, 200);
    times
}

#[test]
fn shards_that_may_not_wait_end_when_their_coordinator_is_killed() {
    let _turn = turn();
    let Some(network) = Network::make() else {
        return;
    };
    let topology = network.topology(&nodes(1));
    let topology = topology.to_str().expect("UTF-8");
    let cluster = Cluster::start(&["--topology", topology, "--shard-grace-period", "0"]);
    let port = cluster.address.port().to_string();
    let (code, table, stderr) = run(&["status", "--port", &port]);
    assert_eq!(code, 0, "{stderr}");
    for (node, rank) in [("a", 0), ("b", 1)] {
        let row = table.lines().map(|line| line.split_whitespace().collect());
        let row = row.collect::<Vec<Vec<_>>>();
        let pid = network.shards(node)[0].to_string();
        let expected = [&rank.to_string(), node, &pid, "ready"];
        assert!(row.iter().any(|row| row.starts_with(&expected)), "{table}");
    }
    cluster.signal(Signal::KILL);
    until("no shard is left on any node", || {
        network.shards("a").is_empty() && network.shards("b").is_empty()
    });
    // What they printed over there is here, also now.
    for (node, rank) in [("a", "0"), ("b", "1")] {
        let (_, logs, _) = run(&["logs", "--port", &port, rank]);
        assert!(logs.contains(&format!(" on {node}, cpu")), "{logs}");
        assert!(logs.contains("shard: admitted to the cluster"), "{logs}");
    }
}

#[test]
fn what_is_wrong_with_the_way_to_a_node_is_said() {
    let _turn = turn();
    let Some(network) = Network::make() else {
        return;
    };
    let file = network.topology(&nodes(1));
    let file = file.to_str().expect("UTF-8");
    let good = fs::read_to_string(file).expect("it was written");
    let (code, plan, stderr) = run(&["plan", "--topology", file]);
    assert_eq!(code, 0, "{stderr}");
    assert!(plan.contains("rank 1: node b (ssh root@"), "{plan}");
    assert!(plan.contains("left on node a: "), "{plan}");
    let path = |name: &str| network.path(name).display().to_string();
    let known = fs::read_to_string(path("known")).expect("it was written");
    fs::write(
        path("other"),
        known.replace(&network.address("b"), "192.0.2.1"),
    )
    .expect("a file");
    let config = fs::read_to_string(path("config")).expect("it was written");
    fs::write(
        path("config2"),
        config.replace(&path("known"), &path("other")),
    )
    .expect("a file");
    for (from, to, said) in [
        (
            path("client"),
            path("stranger"),
            "does not accept this user's key",
        ),
        (path("config"), path("config2"), "host key is not known"),
        (
            "user = \"root\"".into(),
            "port = 9".into(),
            "cannot be reached",
        ),
        (
            "cpus = 1".into(),
            "cpus = 0".into(),
            "cluster.toml:6: `cpus`",
        ),
        (
            network.coordinator(),
            "192.0.2.7".into(),
            "cannot listen on 192.0.2.7",
        ),
    ] {
        fs::write(file, good.replace(&from, &to)).expect("a file");
        let (code, _, stderr) = run(&["up", "--port", "0", "--topology", file]);
        assert!(code == 1 || code == 2, "{to}: {code} {stderr}");
        assert!(stderr.contains(said), "{to}: {stderr}");
    }
    let (code, _, stderr) = run(&["plan", "--topology", file, "--cpus", "2"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("leave out --cpus"), "{stderr}");
    let (_, _, stderr) = run(&["plan", "--topology", "/no/such"]);
    assert!(
        stderr.contains("cannot read --topology /no/such"),
        "{stderr}"
    );
}
