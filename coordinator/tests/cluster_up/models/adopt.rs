//! A killed coordinator of several models: each is handed on by itself.

use super::{Pair, long_stream, rounds};
use crate::adopt::{all_gone, forget, loads, status};
use crate::process::{Cluster, is_running, run, send_signal};
use crate::turn;
use rustix::process::Signal;
use std::fs;

const NAME: &str = "adopt-models";

#[test]
fn all_models_are_taken_over_and_one_that_has_changed_begins_afresh() {
    let _turn = turn();
    forget(NAME);
    let pair = Pair::make();
    let cluster = pair.start(&["--name", NAME]);
    let golden = rounds(cluster.address);
    let shards = cluster.shards.clone();
    assert_eq!(shards.len(), 4);
    let open = ["a", "b"].map(|model| long_stream(cluster.address, model));
    cluster.kill();
    for stream in open {
        assert_ne!(stream.read_to_end().1, "[DONE]", "it was under way");
    }
    let (_, said) = status(NAME);
    let reason = said["reason"].as_str().expect("a text");
    assert!(reason.contains("4 of 4 shards hold"), "{reason}");

    let cluster = pair.start(&["--name", NAME, "--adopt"]);
    assert_eq!(cluster.shards, shards, "shards keep their processes");
    assert_eq!(rounds(cluster.address), golden);
    assert_eq!(loads(NAME, 4), [1; 4], "nothing was loaded again");

    // The last model is another one now, and of the first a rank is missing.
    cluster.kill();
    send_signal(shards[0], Signal::KILL);
    let weights = pair.path("b").join("model.safetensors");
    let bytes = fs::read(&weights).expect("it is there");
    fs::write(&weights, bytes).expect("it is written anew");
    let (a, b) = (pair.flag("a"), pair.flag("b"));
    let models = ["--model", &a, "--model", &b, "-tp", "2"];
    let up = ["up", "--adopt", "--name", NAME, "--port", "0"];
    let (code, _, stderr) = run(&[&up, &models[..]].concat());
    let why = "model b: the model's files have changed";
    assert!(code == 2 && stderr.contains(why), "{code} {stderr}");
    assert!(shards[1..].iter().all(|pid| is_running(*pid)), "left alone");
    let cluster = pair.start(&["--name", NAME]);
    assert_eq!(cluster.shards[1], shards[1]);
    assert!(
        cluster
            .shards
            .iter()
            .filter(|pid| shards.contains(pid))
            .count()
            == 1
    );
    all_gone(&shards[2..]);
    assert_eq!(rounds(cluster.address), golden);
    assert_eq!(loads(NAME, 4), [2, 1, 2, 2]);

    // A model that is not served any more holds nothing.
    let shards = cluster.shards.clone();
    cluster.kill();
    let (code, _, stderr) = run(&[&up, &models[..2]].concat());
    assert!(code == 2 && stderr.contains("number 2 is not"), "{stderr}");
    let cluster = Cluster::start(&[&["--name", NAME], &models[..2]].concat());
    all_gone(&shards[2..]);
    cluster.stop();
    all_gone(&shards);
}
