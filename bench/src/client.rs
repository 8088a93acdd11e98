//! HTTP to one server: connections that are kept, requests with a deadline.
//!
//! Plain HTTP/1.1 only. Time is measured from the moment a request is handed over to the moment
//! its bytes arrive in this process.

use crate::stream::{Answer, Reader};
use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, Response, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// A server that does not answer a connection for this long is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Deadline of short requests: the list of models, the metrics.
const SHORT_DEADLINE: Duration = Duration::from_secs(10);

/// Most bytes of an answer that is not streamed; metrics of many ranks are a few hundred KiB.
const MAX_BODY_BYTES: usize = 16 << 20;

/// Most bytes of an error's text that are shown.
const MAX_ERROR_CHARS: usize = 300;

type Connection = SendRequest<Full<Bytes>>;

/// One server.
#[derive(Debug)]
pub struct Client {
    authority: String,
    path: String,
    authorization: Option<String>,
    /// Connections that wait for the next request: at most as many as requests were under way.
    idle: Mutex<Vec<Connection>>,
}

impl Client {
    /// A client of `url`, which has to be `http://HOST[:PORT][/PATH]`. Connects nothing yet.
    pub fn new(url: &str, api_key: Option<&str>) -> anyhow::Result<Self> {
        let uri: Uri = url
            .parse()
            .with_context(|| format!("read the address {url}"))?;
        ensure!(
            uri.scheme_str() == Some("http"),
            "{url} is not an address of the form http://HOST:PORT; TLS is not spoken here"
        );
        let host = uri.host().context("read the host")?;
        Ok(Self {
            authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)),
            path: uri.path().trim_end_matches('/').to_owned(),
            authorization: api_key.map(|key| format!("Bearer {key}")),
            idle: Mutex::default(),
        })
    }

    /// The first model that the server names.
    pub async fn first_model(&self) -> anyhow::Result<String> {
        let (status, body) = self.get("/v1/models").await?;
        ensure!(status.is_success(), "{status}: {}", shorten(&body));
        let models: Value = serde_json::from_str(&body).context("read the list of models")?;
        let name = models["data"][0]["id"].as_str();
        name.map(str::to_owned)
            .context("the server names no model; give --model")
    }

    /// Whether `/ready` says that requests may be sent.
    pub async fn is_ready(&self) -> anyhow::Result<bool> {
        Ok(self.get("/ready").await?.0.is_success())
    }

    /// The metrics' text, or `None` if the server has none.
    pub async fn metrics(&self) -> Option<String> {
        let (status, body) = self.get("/metrics").await.ok()?;
        status.is_success().then_some(body)
    }

    /// Sends one streamed request and reads all of its answer.
    ///
    /// # Errors
    /// What went wrong, as a user would want to read it.
    pub async fn generate(
        &self,
        path: &str,
        body: Bytes,
        deadline: Duration,
    ) -> anyhow::Result<Answer> {
        let request = self.stream(path, body);
        match timeout(deadline, request).await {
            Ok(answer) => answer,
            Err(_) => bail!("no complete answer within {} s", deadline.as_secs()),
        }
    }

    async fn stream(&self, path: &str, body: Bytes) -> anyhow::Result<Answer> {
        let start = Instant::now();
        let (response, connection) = self.send(Method::POST, path, body).await?;
        let status = response.status();
        if !status.is_success() {
            let body = Limited::new(response.into_body(), MAX_BODY_BYTES);
            let body = body.collect().await.map_err(anyhow::Error::from_boxed)?;
            let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            self.keep(connection);
            bail!("{status}: {}", shorten(&text));
        }
        let mut body = response.into_body();
        let mut reader = Reader::default();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("read the stream")?;
            if let Some(bytes) = frame.data_ref() {
                let at = start.elapsed();
                reader.feed(bytes, at).map_err(anyhow::Error::msg)?;
            }
        }
        self.keep(connection);
        reader.finish().map_err(anyhow::Error::msg)
    }

    async fn get(&self, path: &str) -> anyhow::Result<(StatusCode, String)> {
        let request = async {
            let (response, connection) = self.send(Method::GET, path, Bytes::new()).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY_BYTES);
            let body = body.collect().await.map_err(anyhow::Error::from_boxed)?;
            self.keep(connection);
            let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            anyhow::Ok((status, text))
        };
        timeout(SHORT_DEADLINE, request)
            .await
            .with_context(|| format!("wait for {path}"))?
    }

    /// Sends over a kept connection if one still stands, otherwise over a new one.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<(Response<Incoming>, Connection)> {
        while let Some(mut connection) = self.take() {
            if connection.ready().await.is_err() {
                continue;
            }
            let request = self.request(&method, path, body.clone())?;
            match connection.send_request(request).await {
                Ok(response) => return Ok((response, connection)),
                // The server closed it while it was idle: nothing was read of this request.
                Err(error) if error.is_canceled() || error.is_incomplete_message() => {}
                Err(error) => return Err(error).context("send the request"),
            }
        }
        let mut connection = self.connect().await?;
        let request = self.request(&method, path, body)?;
        let response = connection.send_request(request).await;
        Ok((response.context("send the request")?, connection))
    }

    fn request(
        &self,
        method: &Method,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.path))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.body(Full::new(body)).context("write the request")
    }

    async fn connect(&self) -> anyhow::Result<Connection> {
        let context = || format!("connect to {}", self.authority);
        let connect = TcpStream::connect(&self.authority);
        let stream = timeout(CONNECT_DEADLINE, connect)
            .await
            .with_context(context)?
            .with_context(context)?;
        // Small writes leave at once, or latency would be Nagle's.
        stream.set_nodelay(true).with_context(context)?;
        let (connection, driver) = handshake(TokioIo::new(stream)).await?;
        // It ends with the connection; its error is seen by the request that is under way.
        tokio::spawn(driver);
        Ok(connection)
    }

    fn take(&self) -> Option<Connection> {
        self.idle().pop()
    }

    fn keep(&self, connection: Connection) {
        self.idle().push(connection);
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The message of an error body, or its beginning.
fn shorten(body: &str) -> String {
    let message = serde_json::from_str::<Value>(body)
        .ok()
        .and_then(|json| json["error"]["message"].as_str().map(str::to_owned));
    let text = message.unwrap_or_else(|| body.to_owned());
    text.chars().take(MAX_ERROR_CHARS).collect()
}
