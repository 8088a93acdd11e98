//! One request at a time to a server that may be full, starting, or dead for a while.
//!
//! Keeps its connection from one request to the next. A refusal that will pass, and a connection that broke,
//! are tried again; what the server says of the request itself is final, and what it says of all of them (a wrong
//! key, a model that it has not) ends the batch. Invariant: every try ends by a deadline, and no try follows a failed one
//! when the server has taken nothing for as long as the operator allows.

use super::input::Checked;
use super::{Batch, refusal};
use crate::cli::args::{RunBatch, Which};
use crate::cli::find;
use crate::clock::{now, since};
use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
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
/// Requests may wait in a long queue, and answers have every token with many alternatives.
const LIMITS: Limits = Limits {
    time: Duration::from_secs(3600),
    bytes: 64 << 20,
    failures: 10,
};
/// Pause before the first try again; doubled for each further one, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause, also where the server asks for a longer one.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause where nobody is there: whoever comes next has nothing else to do.
const MAX_ABSENCE: Duration = Duration::from_secs(1);
/// Longest time that a connection is kept without use: servers close idle ones, ours after 5 s, which is also as long as a
/// pause may be.
const MAX_IDLE: Duration = Duration::from_secs(2);

/// Bounds of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Longest time to the end of its answer.
    pub(super) time: Duration,
    /// Longest answer.
    pub(super) bytes: usize,
    /// How often it may fail on the server, or take its connection along, before that is its answer: it may be its own
    /// fault.
    pub(super) failures: u32,
}

/// Where requests go.
#[derive(Debug)]
pub(super) struct Server {
    place: Place,
    key: Option<String>,
    pub(super) limits: Limits,
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
    /// The server has enough to do; how long to wait, if it said so.
    Full(Option<Duration>),
    /// The server takes nothing, as one that starts; how long to wait, if it said so.
    NotReady(Option<Duration>, anyhow::Error),
    /// It was taken, and failed.
    Failed(Answer),
    /// It may have been taken; nobody knows. The last that was seen of the server.
    Lost(Instant, anyhow::Error),
    /// The same on a connection that was kept: it need not be the request's fault.
    Stale(Instant, anyhow::Error),
    /// Nobody is there.
    Absent(anyhow::Error),
    /// It is no use to ask for anything.
    Never(Hopeless),
}

impl Answer {
    /// What the server says is wrong.
    fn said(&self) -> String {
        let said = self.body["error"]["message"].as_str();
        format!("{} ({})", self.status, said.unwrap_or("no reason given"))
    }

    /// What is wrong with the command rather than with the request, if that is what it says.
    fn hopeless(&self) -> Option<Hopeless> {
        let (error, said) = (&self.body["error"], self.said());
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
        Ok(Self {
            place,
            key,
            limits: LIMITS,
        })
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
            let begun = now();
            // How long to wait, and since when nothing was taken, and why.
            let (wait, silence) = match self.attempt(request, server).await {
                Ok(answer) => {
                    batch.heard();
                    return Ok(answer);
                }
                Err(Miss::Full(asked)) => (asked.unwrap_or(pause), None),
                Err(Miss::NotReady(asked, why)) => (asked.unwrap_or(pause), Some((begun, why))),
                Err(Miss::Failed(answer)) => {
                    failures += 1;
                    if failures >= server.limits.failures {
                        batch.heard();
                        return Ok(answer);
                    }
                    (pause, None)
                }
                Err(Miss::Lost(seen, why)) => {
                    failures += 1;
                    ensure!(
                        failures < server.limits.failures,
                        "a request lost its connection {failures} times: {why:#}"
                    );
                    (pause, Some((seen, why)))
                }
                Err(Miss::Stale(seen, why)) => (Duration::ZERO, Some((seen, why))),
                Err(Miss::Absent(why)) => (pause.min(MAX_ABSENCE), Some((begun, why))),
                Err(Miss::Never(hopeless)) => return Err(hopeless.into()),
            };
            match silence {
                None => batch.heard(),
                Some((begun, why)) => {
                    self.open = None;
                    if batch.is_silent_too_long(begun) {
                        return Err(why.context(format!(
                            "the server has taken nothing for --retry-timeout {} s",
                            batch.retry_limit.as_secs()
                        )));
                    }
                }
            }
            sleep(wait.min(MAX_PAUSE)).await;
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
        let (limits, begun) = (server.limits, now());
        let answered = exchange(&mut open.sender, request, limits.bytes);
        let answered = timeout(limits.time, answered).await;
        let is_kept = open.last_used.is_some();
        match answered {
            Ok(Err(Miss::Lost(seen, error))) if is_kept => Err(Miss::Stale(seen, error)),
            Ok(answered) => {
                open.last_used = Some(now());
                self.open = Some(open);
                answered
            }
            Err(_) => {
                let why = anyhow!("no answer within {} s", limits.time.as_secs());
                Err(Miss::Lost(begun, why))
            }
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
    most_bytes: usize,
) -> Result<Answer, Miss> {
    // Whoever hangs up was there until then: a long answer that a restart takes along was no silence.
    let lost = |error: anyhow::Error| Miss::Lost(now(), error.context("the connection broke"));
    let answer = sender.send_request(request).await;
    let answer = answer.map_err(|error| lost(error.into()))?;
    let (head, body) = answer.into_parts();
    let header = |name: &str| Some(head.headers.get(name)?.to_str().ok()?.to_owned());
    let id = header("x-request-id");
    let body = match Limited::new(body, most_bytes).collect().await {
        Ok(body) => body.to_bytes(),
        // It would be as long the next time.
        Err(error) if error.is::<LengthLimitError>() => return Ok(too_long(id, most_bytes)),
        Err(error) => return Err(lost(anyhow!("{error}"))),
    };
    let body: Value = serde_json::from_slice(&body)
        .unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned().into());
    let answer = Answer {
        status: head.status.as_u16(),
        id: id.or_else(|| Some(body["id"].as_str()?.to_owned())),
        body,
    };
    let seconds = header(RETRY_AFTER.as_str()).and_then(|text| text.parse().ok());
    let asked = seconds.map(Duration::from_secs);
    match head.status {
        StatusCode::TOO_MANY_REQUESTS => Err(Miss::Full(asked)),
        StatusCode::SERVICE_UNAVAILABLE if answer.body["error"]["code"] == "queue_full" => {
            Err(Miss::Full(asked))
        }
        StatusCode::SERVICE_UNAVAILABLE => Err(Miss::NotReady(asked, anyhow!(answer.said()))),
        // A server that read too slowly, as when it is short of time, may read it the next time.
        StatusCode::REQUEST_TIMEOUT => Err(Miss::Failed(answer)),
        status if status.is_server_error() => Err(Miss::Failed(answer)),
        _ => match answer.hopeless() {
            Some(hopeless) => Err(Miss::Never(hopeless)),
            None => Ok(answer),
        },
    }
}

fn too_long(id: Option<String>, most_bytes: usize) -> Answer {
    let why = format!(
        "The answer is longer than {most_bytes} bytes, which is as much as run-batch reads. Ask for fewer choices \
         or log-probabilities."
    );
    Answer {
        status: 400,
        id,
        body: refusal(&why),
    }
}
