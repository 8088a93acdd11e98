//! An answer as server-sent events.
//!
//! Frames are `data: {json}` and an empty line; the stream ends with `data: [DONE]`. A broken one ends
//! with an `error` event and *without* `[DONE]`: SDKs take a clean close for success, so silence is
//! never an ending. While nothing happens a comment goes out now and then.
//!
//! Nothing is buffered here: the body is polled when the socket has room, and a client that does not
//! read is cut by the engine (events) and by the connection's stall timeout (bytes).

use super::error::ApiError;
use super::generate::{Delta, Generation, Usage};
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How one API writes deltas.
pub trait Dialect: Send + 'static {
    /// What comes before any delta.
    fn open(&mut self, frames: &mut Frames);
    /// One delta; `usage` counts all tokens so far.
    fn delta(&mut self, delta: Delta, usage: Usage, frames: &mut Frames);
    /// What comes after the last delta.
    fn close(&mut self, usage: Usage, frames: &mut Frames);
}

/// Frames to send.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// Adds `data: {json}`.
    pub fn data(&mut self, value: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.0, value).expect("our answers are representable in JSON");
        self.0.extend_from_slice(b"\n\n");
    }

    /// Adds a line of the protocol itself.
    pub fn literal(&mut self, line: &'static str) {
        self.0.extend_from_slice(line.as_bytes());
    }

    fn take(&mut self) -> Option<Bytes> {
        (!self.0.is_empty()).then(|| std::mem::take(&mut self.0).into())
    }
}

/// Answers with the events of `generation`, written by `dialect`.
pub fn respond(generation: Generation, dialect: impl Dialect, keep_alive: Duration) -> Response {
    let stream = EventStream {
        generation,
        dialect,
        keep_alive,
        state: State::Opening,
    };
    let body = stream::unfold(stream, |mut stream| async move {
        let bytes = stream.next().await?;
        Some((Ok::<_, Infallible>(bytes), stream))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the stream otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct EventStream<D> {
    generation: Generation,
    dialect: D,
    keep_alive: Duration,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Opening,
    Running,
    Over,
}

impl<D: Dialect> EventStream<D> {
    /// The next bytes; `None` at the end. Asked for when those before were sent, so that from then on no more than
    /// `keep_alive` goes by in silence, whatever is computed that leaves no text.
    async fn next(&mut self) -> Option<Bytes> {
        let mut frames = Frames::default();
        let silent = Instant::now() + self.keep_alive;
        if self.state == State::Opening {
            self.state = State::Running;
            self.dialect.open(&mut frames);
        }
        while self.state == State::Running && frames.0.is_empty() {
            match timeout_at(silent, self.generation.next()).await {
                Err(_) => frames.literal(": keep-alive\n\n"),
                Ok(Ok(Some(delta))) => {
                    let usage = self.generation.usage();
                    self.dialect.delta(delta, usage, &mut frames);
                }
                Ok(Ok(None)) => {
                    self.state = State::Over;
                    self.dialect.close(self.generation.usage(), &mut frames);
                }
                Ok(Err(error)) => {
                    self.state = State::Over;
                    broken(&error, &mut frames);
                }
            }
        }
        frames.take()
    }
}

fn broken(error: &ApiError, frames: &mut Frames) {
    tracing::warn!("a stream was cut: {}", error.message);
    frames.data(&error.body());
}
