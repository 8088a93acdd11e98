//! Messages as length-prefixed frames on one stream.
//!
//! Both directions keep what is half done, so that a wait may be given up and taken up again.
//! Invariant: frames are never cut or mixed; memory for a frame grows with the bytes that arrive,
//! never with a claimed length.

use super::{LinkError, SEND_LIMIT};
use crate::wire::codec::{LENGTH_BYTES, body_length, encode_frame, encode_run};
use crate::wire::{PlanDigest, StepPlan, ToShard, WireError, decode};
use bincode::{Decode, Encode};
use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream, StoppedError, WriteError};
use std::marker::PhantomData;
use std::slice;
use tokio::time::timeout;

/// An encoded message of type `M`, cheap to clone.
#[derive(Debug)]
pub struct Frame<M> {
    bytes: Bytes,
    holds: PhantomData<fn(&M)>,
}

impl<M: Encode> Frame<M> {
    /// Encodes a message once, for any number of peers.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if it does not fit a frame.
    pub fn new(message: &M) -> Result<Self, WireError> {
        Ok(Self {
            bytes: encode_frame(message)?.into(),
            holds: PhantomData,
        })
    }

    /// The encoded message, without the length that precedes it: what [`decode`] reads. For carriers
    /// other than a link.
    pub fn body(&self) -> &[u8] {
        &self.bytes[LENGTH_BYTES..]
    }
}

impl Frame<ToShard> {
    /// The frame of [`ToShard::Run`] and the digest of its plan, from one encoding.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if it does not fit a frame.
    pub fn run(plan: StepPlan) -> Result<(Self, PlanDigest), WireError> {
        let (bytes, digest) = encode_run(plan)?;
        let frame = Self {
            bytes: bytes.into(),
            holds: PhantomData,
        };
        Ok((frame, digest))
    }
}

impl<M> Clone for Frame<M> {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes.clone(),
            holds: PhantomData,
        }
    }
}

/// Puts frames on one stream.
#[derive(Debug)]
pub(super) struct FrameWriter {
    stream: SendStream,
    /// The rest of a frame whose write was given up half-way; goes out before anything else.
    unsent: Bytes,
}

impl FrameWriter {
    pub(super) fn new(stream: SendStream) -> Self {
        Self {
            stream,
            unsent: Bytes::new(),
        }
    }

    /// Hands a frame to the connection. Cancel-safe: a frame goes out whole or not at all.
    pub(super) async fn write<M>(&mut self, frame: &Frame<M>) -> Result<(), LinkError> {
        let writing = async {
            self.flush().await?;
            self.unsent = frame.bytes.clone();
            self.flush().await
        };
        timeout(SEND_LIMIT, writing)
            .await
            .unwrap_or(Err(LinkError::TimedOut(SEND_LIMIT)))
    }

    /// Ends the stream and waits until the peer has confirmed all of it.
    pub(super) async fn finish(&mut self) -> Result<(), LinkError> {
        self.flush().await?;
        // An error means that the stream is over already; `stopped` says why.
        let _ = self.stream.finish();
        match self.stream.stopped().await {
            Ok(_) => Ok(()),
            Err(StoppedError::ConnectionLost(e)) => Err(e.into()),
            Err(e @ StoppedError::ZeroRttRejected) => Err(LinkError::Closed(e.to_string())),
        }
    }

    /// Bytes that are no frame, and the end of the stream.
    #[cfg(test)]
    pub(super) async fn write_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("an open stream");
        self.stream.finish().expect("an open stream");
    }

    async fn flush(&mut self) -> Result<(), LinkError> {
        while !self.unsent.is_empty() {
            // Takes off the front of `unsent` what the connection took, as its last act.
            let chunks = slice::from_mut(&mut self.unsent);
            self.stream
                .write_chunks(chunks)
                .await
                .map_err(|e| match e {
                    WriteError::ConnectionLost(e) => e.into(),
                    other => LinkError::Closed(other.to_string()),
                })?;
        }
        Ok(())
    }
}

/// Takes messages off one stream.
#[derive(Debug)]
pub(super) struct FrameReader<M> {
    stream: RecvStream,
    /// What has come of the current frame, its length included.
    buffer: Vec<u8>,
    holds: PhantomData<fn() -> M>,
}

impl<M> FrameReader<M> {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            holds: PhantomData,
        }
    }
}

impl<M: Decode<()>> FrameReader<M> {
    /// The next message. Cancel-safe: the only wait takes bytes off the stream as its last act.
    pub(super) async fn next(&mut self) -> Result<M, LinkError> {
        loop {
            let whole = match self.buffer.first_chunk::<LENGTH_BYTES>() {
                None => LENGTH_BYTES,
                Some(length) => LENGTH_BYTES + body_length(*length)?,
            };
            // A length alone is never whole: its body may be empty, but then the next turn says so.
            if self.buffer.len() >= LENGTH_BYTES && self.buffer.len() == whole {
                let message = decode(&self.buffer[LENGTH_BYTES..]);
                self.buffer.clear();
                return Ok(message?);
            }
            let missing = whole - self.buffer.len();
            let chunk = self.stream.read_chunk(missing, true).await;
            match chunk {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Ok(None) if self.buffer.is_empty() => {
                    return Err(LinkError::Closed("the peer has finished".to_owned()));
                }
                Ok(None) => {
                    let reason = "the stream ended within a frame".to_owned();
                    return Err(WireError::Malformed(reason).into());
                }
                Err(ReadError::ConnectionLost(e)) => return Err(e.into()),
                Err(other) => return Err(LinkError::Closed(other.to_string())),
            }
        }
    }
}
