//! hyper's own refusals, given what every other answer has: a name and a sentence.
//!
//! hyper answers a head that it cannot read by itself, before there is a request that a route could
//! see, and with nothing but a status. There is no hook for it, so this stands where the bytes leave.
//! It changes no answer of ours: those all have a request id.

use super::error::ApiError;
use super::{REQUEST_ID, new_request_id};
use axum::http::StatusCode;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Wraps a connection.
#[derive(Debug)]
pub(super) struct Explained<T> {
    inner: T,
    /// What is being sent instead of a refusal of hyper's, and how much of it is out.
    instead: Option<(Vec<u8>, usize)>,
}

impl<T> Explained<T> {
    pub(super) fn new(inner: T) -> Self {
        Self {
            inner,
            instead: None,
        }
    }
}

/// The same refusal with a name and a body; `None` if `bytes` are anything else.
fn explain(bytes: &[u8]) -> Option<Vec<u8>> {
    // The status alone sorts out nearly all writes.
    let status = StatusCode::from_bytes(bytes.strip_prefix(b"HTTP/1.1 ")?.get(..3)?).ok()?;
    let sentence = match status {
        StatusCode::BAD_REQUEST => "The request's head is not valid HTTP/1.1.",
        StatusCode::URI_TOO_LONG => "The address in the request's head is too long.",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            "The request's head is too large: send fewer or shorter headers."
        }
        _ => return None,
    };
    let head = std::str::from_utf8(bytes).ok()?.strip_suffix("\r\n\r\n")?;
    if head.contains("\r\n\r\n") || head.contains(REQUEST_ID) {
        return None;
    }
    let body = ApiError::status(status, sentence).body();
    let body = serde_json::to_string(&body).ok()?;
    let (before, after) = head.split_once("content-length: 0")?;
    let (id, length) = (new_request_id(), body.len());
    Some(
        format!(
            "{before}content-type: application/json\r\n{REQUEST_ID}: {id}\r\n\
             content-length: {length}{after}\r\n\r\n{body}"
        )
        .into_bytes(),
    )
}

impl<T: AsyncRead + Unpin> AsyncRead for Explained<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Explained<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.instead.is_none() {
            this.instead = explain(bytes).map(|answer| (answer, 0));
        }
        let Some((answer, sent)) = &mut this.instead else {
            return Pin::new(&mut this.inner).poll_write(context, bytes);
        };
        while *sent < answer.len() {
            let written = Pin::new(&mut this.inner).poll_write(context, &answer[*sent..]);
            match ready!(written)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => *sent += count,
            }
        }
        this.instead = None;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A head without a body is one slice.
        if let [only] = slices {
            return self.poll_write(context, only);
        }
        Pin::new(&mut self.inner).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// What arrives through a pipe that takes few bytes at a time.
    async fn sent(bytes: &[u8]) -> String {
        let (ours, mut theirs) = tokio::io::duplex(7);
        let mut explained = Explained::new(ours);
        let mut arrived = String::new();
        let write = async {
            explained.write_all(bytes).await.unwrap();
            drop(explained);
        };
        let read = theirs.read_to_string(&mut arrived);
        let ((), read) = tokio::join!(write, read);
        read.unwrap();
        arrived
    }

    #[tokio::test]
    async fn only_bare_refusals_are_changed() {
        let bare = "HTTP/1.1 431 X\r\nconnection: close\r\ncontent-length: 0\r\ndate: now\r\n\r\n";
        let explained = sent(bare.as_bytes()).await;
        assert!(explained.starts_with("HTTP/1.1 431 X\r\nconnection: close\r\n"));
        assert!(
            explained.contains("\r\ndate: now\r\n\r\n{\"error\":{"),
            "{explained}"
        );
        let ours = bare.replace("date", REQUEST_ID);
        for other in [
            ours.as_str(),
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 4",
            "data: HTTP/1.1 400 Bad Request\r\n\r\n",
            "",
        ] {
            assert_eq!(sent(other.as_bytes()).await, other);
        }
    }
}
