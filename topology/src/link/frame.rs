//! Messages as length-prefixed frames on one stream.
//!
//! Reading keeps what has come so far, so that a wait may be given up and taken up again.
//! Invariant: memory for a frame grows with the bytes that arrive, never with a claimed length.

use super::LinkError;
use crate::wire::codec::{LENGTH_BYTES, body_length, encode_frame};
use crate::wire::{WireError, decode};
use bincode::{Decode, Encode};
use bytes::Bytes;
use quinn::{ReadError, RecvStream};
use std::marker::PhantomData;

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
}

impl<M> Frame<M> {
    /// Length and body.
    pub(super) fn bytes(&self) -> Bytes {
        self.bytes.clone()
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
