//! Messages to bytes and back, with limits.
//!
//! A frame is a `u32` length (little endian) and a bincode body. Lengths are checked before memory
//! is taken, trailing bytes are refused, and before any frame a fixed [`Preamble`] settles
//! that both ends are the same build.

use super::{MAX_FRAME_BYTES, StepPlan, ToShard, WIRE_VERSION, plan::PlanDigest};
use bincode::{Decode, Encode, config};
use sha2::{Digest, Sha256};

/// Why bytes are not a message.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// The other end is not a cluster process.
    #[error("the peer does not speak the cluster's protocol (wrong magic)")]
    Magic,
    /// The other end is another version.
    #[error(
        "the peer speaks wire version {theirs}, this process {ours}; use the same binary everywhere"
    )]
    Version {
        /// This process's version.
        ours: u32,
        /// The peer's version.
        theirs: u32,
    },
    /// The other end is another build.
    #[error(
        "the peer is build {theirs}, this process is build {ours}; use the same binary everywhere"
    )]
    Build {
        /// This process's build.
        ours: String,
        /// The peer's build.
        theirs: String,
    },
    /// A frame or preamble ended early, or goes on after its message.
    #[error("the frame is malformed: {0}")]
    Malformed(String),
    /// A frame is longer than the limit.
    #[error("a frame of {0} bytes is above the limit of {MAX_FRAME_BYTES}")]
    TooLong(usize),
}

/// The first bytes of a connection, in a layout that never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Wire version.
    pub version: u32,
    /// Identifies the build: the first bytes of a hash over version and source revision.
    pub build: [u8; 16],
}

const MAGIC: [u8; 8] = *b"cluster\n";

/// Bytes of the length that precedes a body.
pub const LENGTH_BYTES: usize = 4;

/// Bytes that say which variant of a message's enumeration follows; there are few.
const VARIANT_BYTES: usize = 1;

impl Preamble {
    /// Length in bytes on the wire.
    pub const BYTES: usize = 28;

    /// This process's preamble.
    pub fn ours() -> Self {
        let mut build = [0; 16];
        build.copy_from_slice(&Sha256::digest(build_text().as_bytes())[..16]);
        Self {
            version: WIRE_VERSION,
            build,
        }
    }

    /// To bytes.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[12..].copy_from_slice(&self.build);
        bytes
    }

    /// Accepts the peer's preamble only if it is of this version and build.
    pub fn check(self, peer: &[u8; Self::BYTES]) -> Result<(), WireError> {
        if peer[..8] != MAGIC {
            return Err(WireError::Magic);
        }
        let mut version = [0; 4];
        version.copy_from_slice(&peer[8..12]);
        let theirs = u32::from_le_bytes(version);
        if theirs != self.version {
            return Err(WireError::Version {
                ours: self.version,
                theirs,
            });
        }
        if peer[12..] != self.build {
            let mut theirs = [0; 16];
            theirs.copy_from_slice(&peer[12..]);
            return Err(WireError::Build {
                ours: hex(self.build),
                theirs: hex(theirs),
            });
        }
        Ok(())
    }
}

fn hex(build: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(build))
}

/// What names this build: the version and, in a release build from a repository, its revision.
pub fn build_text() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), " ", env!("CLUSTER_BUILD"))
}

/// The body of a frame (without its length).
///
/// # Errors
/// [`WireError::TooLong`] if the message does not fit a frame.
pub fn encode<T: Encode>(message: &T) -> Result<Vec<u8>, WireError> {
    encode_after(Vec::new(), message)
}

/// A whole frame: length and body.
///
/// # Errors
/// [`WireError::TooLong`] if the message does not fit a frame.
pub fn encode_frame<T: Encode>(message: &T) -> Result<Vec<u8>, WireError> {
    let mut frame = encode_after(vec![0; LENGTH_BYTES], message)?;
    let length = frame.len() - LENGTH_BYTES;
    let length = u32::try_from(length).map_err(|_| WireError::TooLong(length))?;
    frame[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// A whole frame of [`ToShard::Run`], and the digest of its plan: encoded once for both.
///
/// # Errors
/// [`WireError::TooLong`] if the plan does not fit a frame.
pub fn encode_run(plan: StepPlan) -> Result<(Vec<u8>, PlanDigest), WireError> {
    let frame = encode_frame(&ToShard::Run(Box::new(plan)))?;
    let digest = shorten(&Sha256::digest(&frame[LENGTH_BYTES + VARIANT_BYTES..]));
    Ok((frame, digest))
}

/// What the first bytes of a frame say about the length of its body.
///
/// # Errors
/// [`WireError::TooLong`] above the limit, so that no memory is taken for it.
pub fn body_length(length: [u8; LENGTH_BYTES]) -> Result<usize, WireError> {
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_FRAME_BYTES {
        Err(WireError::TooLong(length))
    } else {
        Ok(length)
    }
}

fn encode_after<T: Encode>(mut bytes: Vec<u8>, message: &T) -> Result<Vec<u8>, WireError> {
    let start = bytes.len();
    bincode::encode_into_std_write(message, &mut bytes, config::standard())
        .map_err(|e| WireError::Malformed(e.to_string()))?;
    if bytes.len() - start > MAX_FRAME_BYTES {
        Err(WireError::TooLong(bytes.len() - start))
    } else {
        Ok(bytes)
    }
}

/// Reads the body of a frame.
///
/// # Errors
/// [`WireError`] if it is too long, ends early, claims more than the limit, or goes on after the
/// message. Never takes more than [`MAX_FRAME_BYTES`] of memory on a claim.
pub fn decode<T: Decode<()>>(body: &[u8]) -> Result<T, WireError> {
    if body.len() > MAX_FRAME_BYTES {
        return Err(WireError::TooLong(body.len()));
    }
    let limited = config::standard().with_limit::<MAX_FRAME_BYTES>();
    let (message, used) = bincode::decode_from_slice(body, limited)
        .map_err(|e| WireError::Malformed(e.to_string()))?;
    if used == body.len() {
        Ok(message)
    } else {
        Err(WireError::Malformed(format!(
            "{} bytes after the message",
            body.len() - used
        )))
    }
}

impl StepPlan {
    /// Identifies the plan: equal on all ranks or the step must not start. The SHA-256 of its
    /// encoding, which is not kept.
    pub fn digest(&self) -> PlanDigest {
        let mut hasher = Sha256::new();
        bincode::encode_into_std_write(self, &mut hasher, config::standard())
            .expect("a hasher takes any bytes, and a plan holds nothing that cannot be encoded");
        shorten(&hasher.finalize())
    }
}

/// Identifies what a rank sampled, row by row: equal on all ranks, or the next step would differ.
pub fn digest_of_tokens(tokens: impl IntoIterator<Item = u32>) -> PlanDigest {
    let mut hasher = Sha256::new();
    for token in tokens {
        hasher.update(token.to_le_bytes());
    }
    shorten(&hasher.finalize())
}

fn shorten(hash: &[u8]) -> PlanDigest {
    let mut digest = PlanDigest::default();
    let length = digest.len();
    digest.copy_from_slice(&hash[..length]);
    digest
}
