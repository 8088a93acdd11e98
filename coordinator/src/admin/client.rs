//! The other end of the admin socket: one question, one answer, within [`ANSWER_LIMIT`].

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long a process that lives may take to answer.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Longest answer in bytes: the status of a thousand ranks fits.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Asks the process behind `socket`.
///
/// # Errors
/// Why there is no answer.
pub fn ask<T: DeserializeOwned>(socket: &Path, method: Method, path: &str) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a thread")?;
    let answer = runtime.block_on(async {
        let answer = timeout(ANSWER_LIMIT, exchange(socket, method, path)).await;
        answer.with_context(|| format!("no answer within {}s", ANSWER_LIMIT.as_secs()))?
    });
    serde_json::from_slice(&answer?).context("the answer is another version's")
}

async fn exchange(socket: &Path, method: Method, path: &str) -> Result<Bytes> {
    let stream = UnixStream::connect(socket).await;
    let stream = stream.with_context(|| format!("cannot connect to {}", socket.display()))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .context("cannot talk to it")?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "cluster")
        .body(Empty::<Bytes>::new())
        .context("make a request")?;
    // It moves the bytes; its own end says less than what is missing then.
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.context("cannot ask")?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect();
    let body = body.await;
    let body = body.map_err(|e| anyhow::anyhow!("cannot read the answer: {e}"))?;
    ensure!(status.is_success(), "it answers {status}");
    Ok(body.to_bytes())
}
