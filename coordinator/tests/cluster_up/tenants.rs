//! Keys do not share cached blocks: otherwise how quickly an answer comes, and how many of its tokens
//! were cached, would tell one tenant what another has asked.

use crate::client::post_as;
use crate::process::{Cluster, command};
use crate::turn;
use serde_json::{Value, json};

#[test]
fn a_prompt_is_cached_for_its_own_key_and_salt_alone() {
    const CHAT: &str = "/v1/chat/completions";
    const COMPLETIONS: &str = "/v1/completions";
    let _turn = turn();
    let mut up = command(&["up", "--port", "0"]);
    up.env("CLUSTER_API_KEY", "alice,bob");
    let cluster = Cluster::launch(up);
    let story = "Once upon a time there was a dog who liked to run and play in the sun. ".repeat(6);
    let bodies = [
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": story}]}),
        ),
        (COMPLETIONS, json!({"prompt": story})),
    ];
    for (path, mut body) in bodies {
        body["temperature"] = 0.into();
        body["max_tokens"] = 8.into();
        let mut first: Option<Value> = None;
        // Who asks, with which salt, and whether they have asked before.
        for (key, salt, cached) in [
            ("alice", None, false),
            ("bob", None, false),
            ("alice", Some("x"), false),
            ("bob", Some("x"), false),
            ("alice", Some("y"), false),
            ("alice", None, true),
            ("bob", None, true),
            ("alice", Some("x"), true),
            ("bob", Some("x"), true),
            ("alice", Some("alice"), false),
            ("bob", Some("alice"), false),
        ] {
            body["cache_salt"] = salt.into();
            let answer = post_as(cluster.address, key, path, &body);
            let found = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
            let found = found.unwrap_or_else(|| panic!("no such count: {answer}"));
            assert_eq!(
                found > 0,
                cached,
                "{path} as {key} with {salt:?}: {found} cached"
            );
            let choice = first.get_or_insert_with(|| answer["choices"].clone());
            assert_eq!(
                answer["choices"], *choice,
                "the text is the same, cached or not"
            );
        }
    }
    cluster.stop();
}
