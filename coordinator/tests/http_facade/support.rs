//! A server over a scripted engine.
//!
//! The tokenizer has one token per byte (the token's id is the byte), so scripts can be written as
//! text; 256 is `<s>`, 257 `</s>`, which ends a text. No shard, no scheduler: what the engine says is
//! in the test.

use coordinator::engine::handle::{
    EngineHandle, Readiness, StreamEvent, StreamEventKind, Submission, SubmitError,
};
use coordinator::http::auth::ApiKeys;
use coordinator::http::background::Background;
use coordinator::http::limits::ServerLimits;
use coordinator::http::{ServedModel, ServerConfig, router, server};
use coordinator::metrics::Registry;
use coordinator::scheduler::request::{FinishReason, Request};
use coordinator::text::TextModel;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use topology::wire::TokenScore;

pub(crate) const EOS: u32 = 257;
pub(crate) const VOCAB: u32 = 258;
pub(crate) const MODEL: &str = "test-model";
pub(crate) const MAX_MODEL_LEN: u32 = 4096;

/// What the engine does with a choice.
#[derive(Clone, Debug)]
pub(crate) enum Script {
    /// These tokens, then end of text.
    Text(String),
    /// These tokens, bytes that need not be text.
    Tokens(Vec<u32>),
    /// `a` for ever, one each so many milliseconds.
    Endless(u64),
    /// This text, then a failure.
    Fail(String),
    /// This text, then nothing more is said.
    Vanish(String),
    /// Taken, and nothing happens.
    Hang,
}

/// What to do with a submission: refuse it, or one script for each choice.
pub(crate) type Plan = Arc<dyn Fn(&[Request]) -> Result<Vec<Script>, SubmitError> + Send + Sync>;

/// What happened in the engine.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// All requests that were submitted.
    pub(crate) requests: Vec<Request>,
    /// Choices that ended because they were cancelled, with the tokens they had sent.
    pub(crate) cancelled: Vec<(usize, u32)>,
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
    pub(crate) readiness: watch::Sender<Readiness>,
    shutdown: Option<oneshot::Sender<()>>,
    serving: tokio::task::JoinHandle<()>,
}

/// How to start a server.
pub(crate) struct Setup {
    pub(crate) plan: Plan,
    pub(crate) keys: Vec<&'static str>,
    pub(crate) limits: ServerLimits,
    pub(crate) template: Option<&'static str>,
    pub(crate) generation_config: Value,
    /// `--scheduling-policy priority`.
    pub(crate) has_priorities: bool,
    pub(crate) origins: Vec<String>,
    /// Where background requests are kept, if they are taken.
    pub(crate) background: Option<PathBuf>,
}

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
     {% if messages[0].role == 'tool' %}{{ raise_exception('Begin with a user.') }}{% endif %}\
     {% if add_generation_prompt %}<assistant>{% endif %}";

impl Setup {
    pub(crate) fn new(plan: impl Fn(&[Request]) -> Vec<Script> + Send + Sync + 'static) -> Self {
        Self {
            plan: Arc::new(move |requests| Ok(plan(requests))),
            keys: Vec::new(),
            limits: ServerLimits::default(),
            template: Some(TEMPLATE),
            generation_config: json!({}),
            has_priorities: false,
            origins: Vec::new(),
            background: None,
        }
    }

    /// Every choice gives this text.
    pub(crate) fn says(text: &str) -> Self {
        let script = Script::Text(text.to_owned());
        Self::always(script)
    }

    pub(crate) fn always(script: Script) -> Self {
        Self::new(move |requests| vec![script.clone(); requests.len()])
    }

    pub(crate) fn refuses(error: SubmitError) -> Self {
        Self {
            plan: Arc::new(move |_| Err(error.clone())),
            ..Self::says("")
        }
    }

    pub(crate) async fn start(self) -> Server {
        let (readiness, watched) = watch::channel(Readiness::Ready);
        let (engine, submissions) = EngineHandle::new(watched);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let plan = Arc::clone(&self.plan);
        tokio::spawn(run_engine(submissions, plan, Arc::clone(&seen)));
        self.serve(engine, readiness, seen).await
    }

    /// A server over an engine that was started.
    pub(crate) async fn serve(
        self,
        engine: EngineHandle,
        readiness: watch::Sender<Readiness>,
        seen: Arc<Mutex<Seen>>,
    ) -> Server {
        let background = self.background.map(|dir| {
            let metrics = Registry::new(MAX_MODEL_LEN, "test").background();
            Background::open(&dir, &self.limits, metrics).expect("the journal opens")
        });
        let config = ServerConfig {
            background,
            models: vec![ServedModel {
                engine,
                names: vec![MODEL.to_owned(), "org/other name".to_owned()],
                text: text_model(self.template, &self.generation_config),
                max_model_len: MAX_MODEL_LEN,
                vocab_size: VOCAB,
                has_priorities: self.has_priorities,
            }],
            keys: ApiKeys::new(self.keys),
            limits: self.limits.clone(),
            allowed_origins: self.origins,
            seed: None,
            version: "1.2.3".to_owned(),
            metrics: Box::new(|| "up 1\n".to_owned()),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (shutdown, stop) = oneshot::channel();
        let serving = tokio::spawn(async move {
            let stop = async {
                let _ = stop.await;
            };
            server::serve(listener, router(config), self.limits, stop)
                .await
                .expect("serve");
        });
        Server {
            address,
            seen,
            readiness,
            shutdown: Some(shutdown),
            serving,
        }
    }
}

pub(crate) fn text_model(template: Option<&str>, generation_config: &Value) -> TextModel {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
    let files = [
        ("tokenizer.json", tokenizer_json().to_string()),
        ("tokenizer_config.json", config.to_string()),
        ("generation_config.json", generation_config.to_string()),
    ];
    let read = |name: &str| {
        let file = files.iter().find(|(known, _)| *known == name);
        Ok(file.map(|(_, text)| Cow::Owned(text.clone().into_bytes())))
    };
    TextModel::load(&read, &[], VOCAB).expect("the test model loads")
}

fn tokenizer_json() -> Value {
    // GPT-2's alphabet in the order of the bytes.
    let mut next = 256;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255_u32 {
        let printable = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if printable { byte } else { next };
        next += u32::from(!printable);
        let c = char::from_u32(code).expect("a character");
        vocab.insert(c.to_string(), byte.into());
    }
    vocab.insert("<s>".into(), 256.into());
    vocab.insert("</s>".into(), EOS.into());
    let added = [(256, "<s>"), (257, "</s>")].map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    });
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                       "use_regex": true});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "byte_fallback": false, "vocab": vocab, "merges": []}})
}

async fn run_engine(
    mut submissions: mpsc::Receiver<Submission>,
    plan: Plan,
    seen: Arc<Mutex<Seen>>,
) {
    while let Some(submission) = submissions.recv().await {
        lock(&seen).requests.extend(submission.choices.clone());
        match plan(&submission.choices) {
            Err(error) => drop(submission.answer.send(Err(error))),
            Ok(scripts) => {
                tokio::spawn(run_submission(submission, scripts, Arc::clone(&seen)));
            }
        }
    }
}

async fn run_submission(submission: Submission, scripts: Vec<Script>, seen: Arc<Mutex<Seen>>) {
    let Submission {
        choices,
        events,
        answer,
        cancelled,
        ..
    } = submission;
    if answer.send(Ok(())).is_err() {
        return;
    }
    let mut running = Vec::new();
    for (choice, (request, script)) in choices.into_iter().zip(scripts).enumerate() {
        let (events, cancelled, seen) = (events.clone(), cancelled.clone(), Arc::clone(&seen));
        running.push(tokio::spawn(async move {
            let alone = |sent| {
                if events.is_closed() || cancelled.contains(choice) {
                    lock(&seen).cancelled.push((choice, sent));
                    return true;
                }
                false
            };
            run_choice(choice, &request, script, &events, alone).await;
        }));
    }
    for choice in running {
        let _ = choice.await;
    }
}

async fn run_choice(
    choice: usize,
    request: &Request,
    script: Script,
    events: &mpsc::Sender<StreamEvent>,
    cancelled: impl Fn(u32) -> bool,
) {
    let say = async |kind| drop(events.send(StreamEvent { choice, kind }).await);
    let (tokens, pause, last): (Vec<u32>, u64, _) = match script {
        Script::Text(text) => {
            let tokens = text.bytes().map(u32::from).chain([EOS]).collect();
            (
                tokens,
                0,
                Some(StreamEventKind::Finished(FinishReason::Length)),
            )
        }
        Script::Tokens(tokens) => (
            tokens,
            0,
            Some(StreamEventKind::Finished(FinishReason::Length)),
        ),
        Script::Endless(pause) => (vec![u32::from(b'a'); 1 << 16], pause, None),
        Script::Fail(text) => {
            let failed = StreamEventKind::Failed("A shard is lost.".to_owned());
            (text.bytes().map(u32::from).collect(), 0, Some(failed))
        }
        Script::Vanish(text) => (text.bytes().map(u32::from).collect(), 0, None),
        Script::Hang => {
            while !cancelled(0) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            return;
        }
    };
    let vanishes = last.is_none() && pause == 0;
    say(StreamEventKind::Started { cached_tokens: 3 }).await;
    if let Some(alternatives) = request.prompt_logprobs {
        let scores = request.prompt[1..]
            .iter()
            .map(|&token| score(token, alternatives));
        say(StreamEventKind::PromptScores(scores.collect())).await;
    }
    for (index, &token) in (0..).zip(&tokens) {
        if index == request.max_tokens {
            say(StreamEventKind::Finished(FinishReason::Length)).await;
            return;
        }
        if cancelled(index) {
            return;
        }
        let score = request.sampling.logprobs.map(|count| score(token, count));
        say(StreamEventKind::Token {
            index,
            token,
            score,
        })
        .await;
        if request.stop_token_ids.contains(&token) && index >= request.min_tokens {
            say(StreamEventKind::Finished(FinishReason::Stop)).await;
            return;
        }
        if pause > 0 {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        } else {
            tokio::task::yield_now().await;
        }
    }
    if let Some(last) = last {
        say(last).await;
    } else if vanishes {
        // The sender is dropped without a word.
    }
}

/// The likeliest tokens are always `A`, `B`, `C`, ….
pub(crate) fn score(token: u32, alternatives: u32) -> TokenScore {
    let top = (0..alternatives)
        .map(|i| (65 + i, -1.0 - f64_to_f32(i)))
        .collect();
    TokenScore {
        logprob: -0.5,
        rank: 1 + token % 7,
        top,
    }
}

fn f64_to_f32(i: u32) -> f32 {
    f32::from(u16::try_from(i).expect("few alternatives"))
}

/// Lets this process have as many connections as it may: client and server are both in it.
pub(crate) fn allow_connections() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, all).expect("what is allowed can be taken");
}

pub(crate) fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Begins the shutdown and waits for its end.
    pub(crate) async fn stop(mut self) {
        if let Some(shutdown) = self.shutdown.take() {
            let _ = shutdown.send(());
        }
        (&mut self.serving).await.expect("the server ends");
    }

    /// Begins the shutdown.
    pub(crate) fn begin_stop(&mut self) {
        if let Some(shutdown) = self.shutdown.take() {
            let _ = shutdown.send(());
        }
    }

    /// Waits until the engine has seen `count` cancelled choices.
    pub(crate) async fn until_cancelled(&self, count: usize) {
        let waited = tokio::time::timeout(Duration::from_secs(10), async {
            while lock(&self.seen).cancelled.len() < count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        assert!(
            waited.await.is_ok(),
            "cancelled: {:?}",
            lock(&self.seen).cancelled
        );
    }
}
