//! What is done with fuzzed bytes: one function for each reader of what others wrote.
//!
//! Called by the ordinary tests with a seed corpus and its mutations, and by libFuzzer through
//! `scripts/fuzz`. A function returns, whatever the bytes are; it panics where a promise is broken:
//! a request that reaches the engine is within all bounds, an answer is never the server's fault,
//! a message means the same after a round trip, a tensor lies inside its file.

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use coordinator::builtin;
use coordinator::engine::handle::{EngineHandle, Readiness, Submission, SubmitError};
use coordinator::http::auth::ApiKeys;
use coordinator::http::limits::ServerLimits;
use coordinator::http::{ServedModel, ServerConfig, router};
use coordinator::scheduler::request;
use coordinator::text::TextModel;
use coordinator::text::template::{ChatTemplate, Ending, Message};
use http_body_util::BodyExt;
use std::cell::RefCell;
use std::fs;
use std::path::Path;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};
use topology::checkpoint::{Checkpoint, SINGLE_FILE};
use topology::model_files::ModelFiles;
use topology::spec::cluster::Topology;
use topology::wire::{FromShard, MAX_FRAME_BYTES, ToShard, decode, encode};
use tower::ServiceExt;

/// Of the built-in model.
const VOCAB: u32 = 4096;
const MAX_MODEL_LEN: u32 = 1024;

/// Where bodies go, by the input's first byte.
const ROUTES: [&str; 4] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
];

/// The server's router over an engine that takes nothing.
struct Server {
    runtime: Runtime,
    router: Router,
    submissions: mpsc::Receiver<Submission>,
    _readiness: watch::Sender<Readiness>,
}

impl Server {
    fn new() -> Self {
        let (readiness, watched) = watch::channel(Readiness::Ready);
        let (engine, submissions) = EngineHandle::new(watched);
        let files = ModelFiles::BuiltIn(builtin::FILES);
        let read = |name: &str| {
            let file = files.exists(name).then(|| files.read(name)).transpose();
            Ok(file?)
        };
        let router = router(ServerConfig {
            background: None,
            models: vec![ServedModel {
                engine,
                names: vec!["m".to_owned()],
                text: TextModel::load(&read, &[2, 6], VOCAB).expect("the built-in model loads"),
                max_model_len: MAX_MODEL_LEN,
                vocab_size: VOCAB,
                has_priorities: true,
            }],
            keys: ApiKeys::default(),
            limits: ServerLimits::default(),
            allowed_origins: Vec::new(),
            seed: Some(1),
            version: "0".to_owned(),
            metrics: Box::new(String::new),
        });
        let runtime = Builder::new_current_thread().enable_all().build();
        Self {
            runtime: runtime.expect("a runtime starts"),
            router,
            submissions,
            _readiness: readiness,
        }
    }

    fn answer(&mut self, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let request = Request::post(path)
            .header(header::HOST, "fuzz")
            .body(Body::from(body.to_vec()))
            .expect("a request");
        let router = self.router.clone();
        let answer = async {
            let response = router.oneshot(request).await.expect("it cannot fail");
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.expect("it is whole");
            (status, body.to_bytes().to_vec())
        };
        let engine = async {
            while let Some(submission) = self.submissions.recv().await {
                submission.choices.iter().for_each(within_bounds);
                // The other end may have gone: then nobody waits for it.
                let _ = submission.answer.send(Err(SubmitError::Draining));
            }
        };
        self.runtime.block_on(async {
            tokio::select! {
                answer = answer => answer,
                () = engine => panic!("the server let go of its engine"),
            }
        })
    }
}

/// What the scheduler and the shards rely on.
fn within_bounds(request: &request::Request) {
    let sampling = &request.sampling;
    let prompt = u32::try_from(request.prompt.len()).expect("a prompt is short");
    assert!(prompt > 0, "an empty prompt");
    assert!(prompt + request.max_tokens <= MAX_MODEL_LEN, "too long");
    assert!(request.max_tokens > 0 || request.prompt_logprobs.is_some());
    assert!(request.min_tokens <= request.max_tokens);
    let biased = sampling.logit_bias.iter().map(|bias| &bias.token);
    let named = request.prompt.iter().chain(&request.stop_token_ids);
    let mut named = named.chain(&sampling.allowed_token_ids).chain(biased);
    assert!(named.all(|token| *token < VOCAB), "a token that is none");
    assert!(
        (0.0..=100.0).contains(&sampling.temperature),
        "{sampling:?}"
    );
    assert!(
        sampling.top_p > 0.0 && sampling.top_p <= 1.0,
        "{sampling:?}"
    );
    assert!((0.0..=1.0).contains(&sampling.min_p), "{sampling:?}");
    let penalties = [sampling.presence_penalty, sampling.frequency_penalty];
    assert!(penalties.iter().all(|it| (-2.0..=2.0).contains(it)));
    assert!(sampling.repetition_penalty > 0.0 && sampling.repetition_penalty.is_finite());
    assert!(sampling.logit_bias.iter().all(|it| it.bias.abs() <= 100.0));
    assert!(sampling.logprobs.max(request.prompt_logprobs) <= Some(20));
}

/// Bodies of requests: what reaches the engine is within bounds, and the rest is the client's fault.
pub fn http(data: &[u8]) {
    thread_local!(static SERVER: RefCell<Server> = RefCell::new(Server::new()));
    let Some((route, body)) = data.split_first() else {
        return;
    };
    let path = ROUTES[usize::from(*route) % ROUTES.len()];
    let (status, answer) = SERVER.with_borrow_mut(|server| server.answer(path, body));
    let answer: serde_json::Value = serde_json::from_slice(&answer).expect("an answer is JSON");
    match status {
        200 => assert!(path.ends_with("tokenize"), "{answer}"),
        // The engine took nothing, so only this is left.
        503 => assert_eq!(answer["error"]["code"], "draining"),
        400 | 404 | 413 => {
            let message = answer["error"]["message"].as_str();
            assert!(message.is_some_and(|text| text.len() > 10), "{answer}");
        }
        _ => panic!("{path} answers {status}: {answer}"),
    }
}

/// Frames between coordinator and shard: what is a message means the same after a round trip.
pub fn wire(data: &[u8]) {
    assert!(data.len() < MAX_FRAME_BYTES);
    if let Ok(message) = decode::<ToShard>(data) {
        let bytes = encode(&message).expect("what came in goes out");
        let again = decode::<ToShard>(&bytes).expect("what goes out comes in");
        assert_eq!(encode(&again), Ok(bytes), "{message:?}");
    }
    if let Ok(message) = decode::<FromShard>(data) {
        let bytes = encode(&message).expect("what came in goes out");
        let again = decode::<FromShard>(&bytes).expect("what goes out comes in");
        assert_eq!(encode(&again), Ok(bytes), "{message:?}");
    }
}

/// Headers of weight files. An odd first byte: the rest is the file; an even one: two bytes are the length
/// of the data, the rest is the header, and the length before it is right.
pub fn safetensors(data: &[u8]) {
    thread_local!(static DIRECTORY: tempfile::TempDir = tempfile::tempdir().expect("there is room"));
    let file = match data {
        [kind, file @ ..] if kind % 2 == 1 => file.to_vec(),
        [_, low, high, header @ ..] => {
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header);
            let data = usize::from(u16::from_le_bytes([*low, *high]));
            file.resize(file.len() + data, 0);
            file
        }
        _ => return,
    };
    let opened = DIRECTORY.with(|directory| {
        fs::write(directory.path().join(SINGLE_FILE), &file).expect("it is written");
        let files = ModelFiles::directory(directory.path()).expect("it is there");
        Checkpoint::open(&files)
    });
    match opened {
        Ok(checkpoint) => {
            for (name, tensor) in checkpoint.tensors() {
                let bytes = &tensor.bytes;
                let inside = bytes.start <= bytes.end && bytes.end <= file.len() as u64;
                assert!(inside, "{name}: {bytes:?}");
            }
        }
        Err(refused) => assert!(refused.to_string().contains(SINGLE_FILE), "{refused}"),
    }
}

/// Topology files: what is taken holds together, and what is not is refused with a line that exists.
pub fn topology(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    match Topology::parse(Path::new("f.toml"), text) {
        Ok(topology) => {
            assert!(!topology.nodes.is_empty() && !topology.models.is_empty());
            assert!(topology.models.iter().all(|model| !model.ranks.is_empty()));
            let ranks = || topology.models.iter().flat_map(|model| &model.ranks);
            for (index, node) in topology.nodes.iter().enumerate() {
                let ranks = ranks();
                let taken = ranks.filter(|(its, _)| *its == index).count();
                assert!(taken <= node.devices.len(), "a device is taken twice");
            }
            for (node, device) in ranks() {
                assert!(topology.nodes[*node].devices.contains(device));
            }
            for (index, node) in topology.nodes.iter().enumerate() {
                let before = &topology.nodes[..index];
                assert!(before.iter().all(|other| other.name != node.name));
                let ssh = node.ssh.as_ref().map(|target| format!("{target:?}"));
                assert!(
                    ssh.is_none_or(|it| !it.contains("\"-")),
                    "an option as a name"
                );
            }
        }
        Err(refused) => {
            let lines = text.matches('\n').count() + 1;
            assert!((1..=lines).contains(&refused.line), "{refused}");
            assert!(!refused.reason.is_empty());
        }
    }
}

/// Chat templates and what they are given: the source up to a zero byte, then the user's words.
pub fn template(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let (source, words) = text.split_once('\0').unwrap_or((text, "hi"));
    let special = [("bos_token".to_owned(), "<s>".to_owned())];
    let Ok(template) = ChatTemplate::with_clock(source, &special, || 0) else {
        return;
    };
    let message = |role: &str| Message {
        role: role.to_owned(),
        content: Some(words.to_owned()),
        ..Message::default()
    };
    let messages = [message("system"), message("user"), message("assistant")];
    for ending in [(true, false), (false, true)] {
        let ending = Ending {
            add_generation_prompt: ending.0,
            continue_final_message: ending.1,
        };
        // Either is right; it must come to an end, and an error must be a sentence.
        if let Err(refused) = template.render(&messages, &serde_json::Map::new(), ending) {
            assert!(!refused.to_string().is_empty() || source.contains("raise_exception"));
        }
    }
}
