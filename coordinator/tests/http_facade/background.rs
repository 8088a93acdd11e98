//! Requests that are answered later: accepted, fetched, deleted, and gone on with after a crash.

use super::client::Answer;
use super::support::{Script, Server, Setup, lock};
use coordinator::engine::handle::{Readiness, SubmitError};
use coordinator::http::limits::{BackgroundLimits, ServerLimits};
use coordinator::scheduler::request::{Refusal, Request};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn in_dir(dir: &TempDir, setup: Setup) -> Setup {
    Setup {
        background: Some(dir.path().to_owned()),
        ..setup
    }
}

fn limited(background: BackgroundLimits, setup: Setup) -> Setup {
    let limits = ServerLimits {
        background,
        ..setup.limits
    };
    Setup { limits, ..setup }
}

fn prompt(text: &str) -> Value {
    json!({"prompt": text, "max_tokens": 200, "background": true})
}

fn id(answer: &Answer) -> String {
    assert_eq!(answer.status, 202, "{}", answer.text());
    answer.json()["id"].as_str().expect("an id").to_owned()
}

/// What a GET says as soon as `done` says so.
async fn fetch(server: &Server, path: &str, done: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..2000 {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let said = answer.json();
        if done(&said) {
            return said;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("in vain: {path}");
}

async fn ended(server: &Server, path: &str) -> Value {
    fetch(server, path, |said| {
        said["status"] == "completed" || said["status"] == "failed"
    })
    .await
}

#[tokio::test]
async fn an_answer_that_is_fetched_later_is_the_one_that_is_waited_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = in_dir(&dir, Setup::says("hello")).start().await;
    let bodies = [
        (
            COMPLETIONS,
            json!({"prompt": ["a", "b"], "n": 2, "logprobs": 3}),
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "hi"}], "logprobs": true, "seed": 7}),
        ),
    ];
    for (path, mut body) in bodies {
        let waited_for = server.post(path, &body).await.json();
        body["background"] = true.into();
        let accepted = server.post(path, &body).await;
        let name = id(&accepted);
        let said = accepted.json();
        assert_eq!(
            (&said["status"], &said["choices"]),
            (&json!("queued"), &json!([]))
        );
        let later = ended(&server, &format!("{path}/{name}")).await;
        for field in ["choices", "usage", "model", "object"] {
            assert_eq!(later[field], waited_for[field], "{field} of {path}");
        }
        for field in ["id", "created", "object", "model"] {
            assert_eq!(later[field], said[field], "{field} of {path}");
        }
        assert_eq!(later["status"], "completed");
        // As often as one likes, until it is deleted.
        let path = format!("{path}/{name}");
        assert_eq!(server.get(&path).await.json(), later);
        let deleted = server.send("DELETE", &path, &[], b"").await;
        assert_eq!(deleted.json()["deleted"], true, "{}", deleted.text());
        for method in ["GET", "DELETE"] {
            assert_eq!(server.send(method, &path, &[], b"").await.status, 404);
        }
    }
    let mut said = prompt("a");
    said["background"] = false.into();
    assert_eq!(server.post(COMPLETIONS, &said).await.status, 200);
    assert_eq!(dir.path().read_dir().expect("readable").count(), 0);
}

#[tokio::test]
async fn what_one_key_sent_is_not_there_for_another() {
    let dir = tempfile::tempdir().expect("a directory");
    let setup = Setup {
        keys: vec!["one", "two"],
        ..in_dir(&dir, Setup::says("x"))
    };
    let server = setup.start().await;
    let ask = async |key: &str, method: &str, path: &str, body: &str| {
        let key = format!("Bearer {key}");
        let headers = [("authorization", key.as_str())];
        server.send(method, path, &headers, body.as_bytes()).await
    };
    let name = id(&ask("one", "POST", COMPLETIONS, &prompt("a").to_string()).await);
    let path = format!("{COMPLETIONS}/{name}");
    let uuid = name.trim_start_matches("cmpl-");
    let nobody = ask(
        "two",
        "GET",
        &format!("{COMPLETIONS}/cmpl-{}", "0".repeat(32)),
        "",
    )
    .await;
    for (method, path) in [
        ("GET", path.clone()),
        ("DELETE", path.clone()),
        // Their own, but none that is there.
        ("GET", format!("{CHAT}/{name}")),
        ("GET", format!("{CHAT}/chatcmpl-{uuid}")),
        ("GET", format!("{COMPLETIONS}/{uuid}")),
        ("GET", format!("{COMPLETIONS}/cmpl-..%2f{uuid}")),
    ] {
        let key = if path.ends_with(&name) { "two" } else { "one" };
        let answer = ask(key, method, &path, "").await;
        assert_eq!(answer.status, 404, "{method} {path}");
        // It does not show whether there is such a request.
        let same = nobody.json()["error"]["code"].clone();
        assert_eq!(answer.json()["error"]["code"], same, "{}", answer.text());
    }
    assert_eq!(ask("one", "GET", &path, "").await.status, 200);
    assert_eq!(server.get(&path).await.status, 401);
    assert_eq!(ask("one", "DELETE", &path, "").await.status, 200);
}

#[tokio::test]
async fn what_cannot_be_answered_later_is_refused_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = in_dir(&dir, Setup::says("x")).start().await;
    let refused = async |server: &Server, body: &Value, status: u16, word: &str| {
        let answer = server.post(COMPLETIONS, body).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        let error = &answer.json()["error"];
        let message = error["message"].as_str().expect("a sentence");
        assert!(message.contains(word), "{message}");
    };
    let mut streamed = prompt("a");
    streamed["stream"] = true.into();
    refused(&server, &streamed, 400, "leave out stream").await;
    let mut wrong = prompt("a");
    wrong["temperature"] = 9.into();
    refused(&server, &wrong, 400, "temperature").await;
    refused(
        &server,
        &json!({"prompt": "a", "background": 1}),
        400,
        "background",
    )
    .await;
    for state in [Readiness::Draining, Readiness::Loading] {
        server.readiness.send_replace(state);
        refused(&server, &prompt("a"), 503, "").await;
    }
    assert_eq!(dir.path().read_dir().expect("readable").count(), 0);
    let server = Setup::says("x").start().await;
    refused(&server, &prompt("a"), 400, "keeps no journal").await;
    let missing = server
        .get(&format!("{COMPLETIONS}/cmpl-{}", "0".repeat(32)))
        .await;
    assert_eq!(missing.status, 404);
}

#[tokio::test]
async fn what_is_kept_is_bounded_and_deleting_makes_room() {
    let dir = tempfile::tempdir().expect("a directory");
    let limits = BackgroundLimits {
        requests: 3,
        bytes: 4_000,
        at_once: 1,
        ..BackgroundLimits::default()
    };
    let setup = limited(limits, in_dir(&dir, Setup::always(Script::Hang)));
    let server = setup.start().await;
    let mut names = Vec::new();
    for _ in 0..3 {
        names.push(id(&server.post(COMPLETIONS, &prompt("a")).await));
    }
    let running = format!("{COMPLETIONS}/{}", names[0]);
    fetch(&server, &running, |said| said["status"] == "in_progress").await;
    assert_eq!(lock(&server.seen).requests.len(), 1, "the others wait");
    let full = async |body: &Value, word: &str| {
        let answer = server.post(COMPLETIONS, body).await;
        assert_eq!(answer.status, 429, "{}", answer.text());
        assert!(answer.header("retry-after").is_some());
        let error = &answer.json()["error"];
        assert_eq!(error["code"], "background_full");
        let message = error["message"].as_str().expect("a sentence");
        assert!(
            message.contains(word) && message.contains("delete"),
            "{message}"
        );
    };
    full(&prompt("a"), "3 background requests").await;
    // First the one that waits: it would be computed when the other is gone.
    for name in names[..2].iter().rev() {
        let path = format!("{COMPLETIONS}/{name}");
        assert_eq!(server.send("DELETE", &path, &[], b"").await.status, 200);
    }
    server.until_cancelled(1).await;
    full(&prompt(&"a".repeat(3_900)), "4000 is the limit").await;
    id(&server.post(COMPLETIONS, &prompt("a")).await);
    // The one that was deleted while it waited is never computed.
    let last = format!("{COMPLETIONS}/{}", names[2]);
    fetch(&server, &last, |said| said["status"] == "in_progress").await;
    assert_eq!(lock(&server.seen).requests.len(), 2);
}

#[tokio::test]
async fn what_cannot_be_read_any_more_has_failed() {
    let dir = tempfile::tempdir().expect("a directory");
    let limits = BackgroundLimits {
        at_once: 1,
        ..BackgroundLimits::default()
    };
    let setup = limited(limits, in_dir(&dir, Setup::always(Script::Hang)));
    let server = setup.start().await;
    let mut paths = Vec::new();
    for _ in 0..3 {
        let name = id(&server.post(COMPLETIONS, &prompt("a")).await);
        paths.push(format!("{COMPLETIONS}/{name}"));
    }
    let is_running = |said: &Value| said["status"] == "in_progress";
    fetch(&server, &paths[0], is_running).await;
    let (_, uuid) = paths[1].rsplit_once('-').expect("an id");
    std::fs::remove_file(dir.path().join(format!("{uuid}.request"))).expect("it was accepted");
    let deleted = server.send("DELETE", &paths[0], &[], b"").await;
    assert_eq!(deleted.status, 200);
    let said = ended(&server, &paths[1]).await;
    assert_eq!(said["status"], "failed");
    let message = said["error"]["message"].as_str().expect("a sentence");
    assert!(message.contains("could not read"), "{message}");
    fetch(&server, &paths[2], is_running).await;
}

#[tokio::test]
async fn refusals_that_pass_are_waited_for_and_failures_are_sentences() {
    let dir = tempfile::tempdir().expect("a directory");
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let setup = Setup {
        plan: Arc::new(move |requests| {
            let (waiting, limit) = (5, 5);
            match counted.fetch_add(1, Ordering::SeqCst) {
                0 | 1 => Err(SubmitError::Refused(Refusal::TooManyRequests {
                    waiting,
                    limit,
                })),
                2 => Err(SubmitError::NotReady("the engine is busy".into())),
                3 => Ok(vec![Script::Text("at last".into()); requests.len()]),
                4 => Err(SubmitError::Refused(Refusal::TooLarge {
                    what: "prompt tokens",
                    asked: 9,
                    limit: 8,
                })),
                _ => Ok(vec![Script::Fail("some".into()); requests.len()]),
            }
        }),
        ..in_dir(&dir, Setup::says(""))
    };
    let server = setup.start().await;
    let ask = async || {
        let name = id(&server.post(COMPLETIONS, &prompt("a")).await);
        ended(&server, &format!("{COMPLETIONS}/{name}")).await
    };
    let said = ask().await;
    assert_eq!(said["choices"][0]["text"], "at last");
    assert_eq!(tries.load(Ordering::SeqCst), 4);
    for (word, kind) in [
        ("prompt tokens", "invalid_request_error"),
        ("A shard is lost.", "server_error"),
    ] {
        let said = ask().await;
        assert_eq!(
            (&said["status"], &said["choices"]),
            (&json!("failed"), &json!([]))
        );
        let error = &said["error"];
        assert_eq!(error["type"], kind, "{error}");
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|it| it.contains(word)),
            "{error}"
        );
    }
}

/// A server in a process of its own, as far as that goes: dropping the runtime ends all of it at once.
fn process(dir: &Path, setup: Setup) -> (Runtime, Server) {
    let runtime = Runtime::new().expect("a runtime");
    let setup = Setup {
        background: Some(dir.to_owned()),
        ..setup
    };
    let server = runtime.block_on(setup.start());
    (runtime, server)
}

/// Prompts and their seeds, in the order they came.
type Drawn = Vec<(Vec<u32>, u64)>;

/// Every prompt's own answer; its seed is noted, and those that ask for `hang` are not answered.
fn noting(seeds: &Arc<Mutex<Drawn>>, hang: bool) -> Setup {
    let seeds = Arc::clone(seeds);
    Setup::new(move |requests| {
        let request = &requests[0];
        let mut seeds = seeds.lock().expect("not poisoned");
        seeds.push((request.prompt.to_vec(), request.sampling.seed));
        let is_last = request
            .prompt
            .last()
            .is_some_and(|it| *it >= u32::from(b'5'));
        if hang && is_last {
            return vec![Script::Hang];
        }
        vec![Script::Text(format!("{:?}", request.prompt))]
    })
}

#[test]
fn what_was_accepted_goes_on_in_the_next_process_and_is_answered_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let (before, after) = (Arc::default(), Arc::default());
    let (runtime, server) = process(dir.path(), noting(&before, true));
    let paths: Vec<String> = runtime.block_on(async {
        let mut paths = Vec::new();
        for index in 0..10 {
            let answer = server
                .post(COMPLETIONS, &prompt(&format!("number {index}")))
                .await;
            paths.push(format!("{COMPLETIONS}/{}", id(&answer)));
        }
        paths
    });
    let first: Vec<Value> = runtime.block_on(async {
        let mut first = Vec::new();
        for path in &paths[..5] {
            first.push(ended(&server, path).await);
        }
        for path in &paths[5..] {
            fetch(&server, path, |said| said["status"] == "in_progress").await;
        }
        // A cluster that fails cuts its answers off: that is none of these requests' doing.
        server
            .readiness
            .send_replace(Readiness::Failed("rank 1 is lost".into()));
        first
    });
    drop(server);
    runtime.shutdown_background();

    let (runtime, server) = process(dir.path(), noting(&after, false));
    runtime.block_on(async {
        for (index, path) in paths.iter().enumerate() {
            let said = ended(&server, path).await;
            assert_eq!(said["status"], "completed");
            match first.get(index) {
                Some(before) => assert_eq!(said, *before, "it was answered already"),
                None => assert_eq!(
                    said["choices"][0]["text"],
                    format!("{:?}", format!("number {index}").into_bytes())
                ),
            }
        }
    });
    let (before, after) = (before.lock().expect("whole"), after.lock().expect("whole"));
    assert_eq!(
        (before.len(), after.len()),
        (10, 5),
        "each was computed where it had to be"
    );
    // Nobody gave a seed; the one that was drawn is kept.
    for drawn in after.iter() {
        assert!(before.contains(drawn), "{drawn:?} of {before:?}");
    }
}

#[test]
fn an_answer_that_the_clusters_end_cut_off_is_not_final() {
    let dir = tempfile::tempdir().expect("a directory");
    let readiness = Arc::new(OnceLock::<watch::Sender<Readiness>>::new());
    let failing = Arc::clone(&readiness);
    // As the engine does it: it says that it has failed, and then ends its streams.
    let fails = move |requests: &[Request]| {
        let failed = Readiness::Failed("rank 1 is lost".into());
        failing.get().expect("it was started").send_replace(failed);
        vec![Script::Fail("some".into()); requests.len()]
    };
    let (runtime, server) = process(dir.path(), Setup::new(fails));
    readiness.set(server.readiness.clone()).expect("once");
    let path = runtime.block_on(async {
        let path = format!(
            "{COMPLETIONS}/{}",
            id(&server.post(COMPLETIONS, &prompt("a")).await)
        );
        while lock(&server.seen).requests.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Long enough for an answer to be kept.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(server.get(&path).await.json()["status"], "in_progress");
        path
    });
    drop(server);
    runtime.shutdown_background();
    let (runtime, server) = process(dir.path(), Setup::says("whole"));
    let said = runtime.block_on(ended(&server, &path));
    assert_eq!(said["choices"][0]["text"], "whole", "{said}");
}
