//! One request at a time to a server that may be full, starting, or dead for a while.
//!
//! Keeps its connection from one request to the next. A refusal that will pass, and a connection that broke,
//! are tried again; what the server says of the request itself is final, and what it says of all of them (a wrong
//! key, a model that it has not) ends the batch. Invariant: every try ends by a deadline, and tries end when the
//! server has been silent for as long as the operator allows.

use super::Batch;
use super::input::Checked;
use crate::cli::args::{RunBatch, Which};
use crate::cli::find;
use crate::clock::{now, since};
use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, RETRY_AFTER};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// Longest time to be connected.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Longest time from a request to the end of its answer, which may wait in a long queue.
const ANSWER_LIMIT: Duration = Duration::from_secs(3600);
/// Longest answer in bytes: every token with many alternatives.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Pause before the first try again; doubled for each further one, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause, also where the server asks for a longer one.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause where nobody is there: whoever comes next has nothing else to do.
const MAX_ABSENCE: Duration = Duration::from_secs(1);
/// Longest time that a connection is kept without use: servers close idle ones, ours after 5 s, which is also as long as a
/// pause may be.
const MAX_IDLE: Duration = Duration::from_secs(2);
/// How often a request may fail on the server, or take its connection along, before that is its answer: it may
/// be the request's own fault.
const MAX_FAILURES: u32 = 10;

/// Where requests go.
#[derive(Debug)]
pub(super) struct Server {
    place: Place,
    key: Option<String>,
}

#[derive(Debug)]
enum Place {
    /// Host and port, and what stands before a request's path.
    Url(String, String),
    /// A cluster of this machine; looked up again for each connection, as it may have been started again.
    Cluster(Which),
}

/// Why no request of the batch can be answered before the command is another one.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Hopeless(String);

/// A final answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// What the server calls the request.
    pub(super) id: Option<String>,
    pub(super) body: Value,
}

/// Why a try gave nothing.
enum Miss {
    /// It was not taken; how long to wait, if the server said so.
    NotNow(Option<Duration>),
    /// It was taken, and failed.
    Failed(Answer),
    /// It may have been taken; nobody knows.
    Lost(anyhow::Error),
    /// The same on a connection that was kept: it need not be the request's fault.
    Stale(anyhow::Error),
    /// Nobody is there.
    Absent(anyhow::Error),
    /// It is no use to ask for anything.
    Never(Hopeless),
}

impl Answer {
    /// What is wrong with the command rather than with the request, if that is what it says.
    fn hopeless(&self) -> Option<Hopeless> {
        let error = &self.body["error"];
        let said = error["message"].as_str().unwrap_or("no reason given");
        let said = format!("{} ({said})", self.status);
        Some(Hopeless(match self.status {
            401 => format!("the server does not take the key: {said}; give another --api-key"),
            403 => {
                format!("the server lets this key do nothing here: {said}; give another --api-key")
            }
            // vLLM's code is a number, but it names the parameter too.
            404 if error["code"] == "model_not_found" || error["param"] == "model" => format!(
                "the server has not the model that a request names: {said}; give another --model, or change \
                 the requests"
            ),
            _ => return None,
        }))
    }
}

impl Place {
    fn url(url: &str) -> Result<Self> {
        let uri: Uri = url
            .parse()
            .with_context(|| format!("--url {url} is no URL"))?;
        ensure!(
            uri.scheme_str() == Some("http"),
            "--url {url} must begin with http://; for TLS, go through a local proxy"
        );
        let authority = uri.authority().context("--url names no host")?;
        let port = authority.port_u16().unwrap_or(80);
        // Both http://host:8000 and http://host:8000/v1 are usual.
        let path = uri.path().trim_end_matches('/').trim_end_matches("/v1");
        Ok(Self::Url(
            format!("{}:{port}", authority.host()),
            path.to_owned(),
        ))
    }
}

impl Server {
    /// The server that is meant.
    ///
    /// # Errors
    /// A sentence: the URL is none, or there is no such cluster.
    pub(super) fn find(flags: &RunBatch) -> Result<Self> {
        let place = if let Some(url) = &flags.url {
            Place::url(url)?
        } else {
            find::live(&flags.which)?;
            Place::Cluster(flags.which.clone())
        };
        let key = flags.api_key.as_ref().map(|key| format!("Bearer {key}"));
        Ok(Self { place, key })
    }

    /// Host and port, and what stands before paths.
    fn address(&self) -> Result<(String, &str)> {
        match &self.place {
            Place::Url(host, path) => Ok((host.clone(), path)),
            Place::Cluster(which) => Ok((find::live(which)?.state.address.to_string(), "")),
        }
    }

    fn request(&self, host: &str, prefix: &str, request: &Checked) -> Result<Request<Full<Bytes>>> {
        let mut head = Request::post(format!("{prefix}{}", request.url))
            .header(HOST, host)
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            head = head.header(AUTHORIZATION, key);
        }
        let body = Full::new(Bytes::copy_from_slice(&request.body));
        head.body(body).context("make a request")
    }
}

/// Asks, on a connection of its own.
#[derive(Debug, Default)]
pub(super) struct Asker {
    open: Option<Open>,
}

/// An open connection.
#[derive(Debug)]
struct Open {
    host: String,
    sender: SendRequest<Full<Bytes>>,
    /// When an answer came on it; `None`: it is new.
    last_used: Option<Instant>,
}

impl Asker {
    /// Asks until there is a final answer.
    ///
    /// # Errors
    /// [`Hopeless`], or the server was silent for too long; with what it was last.
    pub(super) async fn ask(
        &mut self,
        request: &Checked,
        (server, batch): (&Server, &Batch),
    ) -> Result<Answer> {
        let (mut pause, mut failures) = (FIRST_PAUSE, 0);
        loop {
            // How long to wait, and what came instead of an answer.
            let (wait, silence) = match self.attempt(request, server).await {
                Ok(answer) => {
                    batch.heard();
                    return Ok(answer);
                }
                Err(Miss::NotNow(asked)) => (asked.unwrap_or(pause).min(MAX_PAUSE), None),
                Err(Miss::Failed(answer)) => {
                    failures += 1;
                    if failures >= MAX_FAILURES {
                        batch.heard();
                        return Ok(answer);
                    }
                    (pause, None)
                }
                Err(Miss::Lost(error)) => {
                    failures += 1;
                    ensure!(
                        failures < MAX_FAILURES,
                        "a request lost its connection {failures} times: {error:#}"
                    );
                    (pause, Some(error))
                }
                Err(Miss::Stale(error)) => (Duration::ZERO, Some(error)),
                Err(Miss::Absent(error)) => (pause.min(MAX_ABSENCE), Some(error)),
                Err(Miss::Never(hopeless)) => return Err(hopeless.into()),
            };
            match silence {
                None => batch.heard(),
                Some(error) => {
                    self.open = None;
                    if batch.is_silent_too_long() {
                        return Err(error.context(format!(
                            "the server has answered nothing for --retry-timeout {} s",
                            batch.retry_limit.as_secs()
                        )));
                    }
                }
            }
            sleep(wait).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    async fn attempt(&mut self, request: &Checked, server: &Server) -> Result<Answer, Miss> {
        let (host, prefix) = server.address().map_err(Miss::Absent)?;
        let kept = self.open.take().filter(Open::is_usable);
        let mut open = match kept {
            Some(open) => open,
            None => connect(&host).await.map_err(Miss::Absent)?,
        };
        let request = server.request(&open.host, prefix, request);
        let request = request.map_err(Miss::Absent)?;
        let answered = timeout(ANSWER_LIMIT, exchange(&mut open.sender, request)).await;
        let is_kept = open.last_used.is_some();
        match answered {
            Ok(Err(Miss::Lost(error))) if is_kept => Err(Miss::Stale(error)),
            Ok(answered) => {
                open.last_used = Some(now());
                self.open = Some(open);
                answered
            }
            Err(_) => Err(Miss::Lost(anyhow!(
                "no answer within {} s",
                ANSWER_LIMIT.as_secs()
            ))),
        }
    }
}

impl Open {
    fn is_usable(&self) -> bool {
        let is_idle = self.last_used.is_some_and(|at| since(at) > MAX_IDLE);
        self.sender.is_ready() && !is_idle
    }
}

async fn connect(host: &str) -> Result<Open> {
    let stream = timeout(CONNECT_LIMIT, TcpStream::connect(host)).await;
    let stream = stream.with_context(|| format!("no connection to {host}"))?;
    let stream = stream.with_context(|| format!("cannot connect to {host}"))?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It moves the bytes; its own end says less than what is missing then.
    tokio::spawn(connection);
    Ok(Open {
        host: host.to_owned(),
        sender,
        last_used: None,
    })
}

async fn exchange(
    sender: &mut SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> Result<Answer, Miss> {
    let lost = |error: anyhow::Error| Miss::Lost(error.context("the connection broke"));
    let answer = sender.send_request(request).await;
    let answer = answer.map_err(|error| lost(error.into()))?;
    let (head, body) = answer.into_parts();
    let header = |name: &str| Some(head.headers.get(name)?.to_str().ok()?.to_owned());
    let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
    let body = body.map_err(|error| lost(anyhow!("{error}")))?.to_bytes();
    let body: Value = serde_json::from_slice(&body)
        .unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned().into());
    let id = header("x-request-id").or_else(|| Some(body["id"].as_str()?.to_owned()));
    let answer = Answer {
        status: head.status.as_u16(),
        id,
        body,
    };
    match head.status {
        // A server that read too slowly, as when it is short of time, has not taken it either.
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::REQUEST_TIMEOUT => {
            let seconds = header(RETRY_AFTER.as_str()).and_then(|text| text.parse().ok());
            Err(Miss::NotNow(seconds.map(Duration::from_secs)))
        }
        status if status.is_server_error() => Err(Miss::Failed(answer)),
        _ => match answer.hopeless() {
            Some(hopeless) => Err(Miss::Never(hopeless)),
            None => Ok(answer),
        },
    }
}
