//! The link between coordinator and shard: QUIC with mutual TLS, carrying [`crate::wire`]'s messages.
//!
//! One connection for each shard, two streams on it: one for commands and replies, in order, and an
//! urgent one that never waits behind a large plan. Knows nothing of what the messages mean. Control
//! messages only: activations never travel this way.
//!
//! Invariants: nobody is admitted before certificate, preamble and `Hello` were checked; no frame is
//! longer than [`crate::wire::MAX_FRAME_BYTES`]; every wait ends by its deadline or, where none is
//! given, by [`IDLE_LIMIT`] when the peer falls silent.

mod connect;
mod frame;
mod listener;
mod tls;

#[cfg(test)]
mod strangers;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod weather;

pub use connect::{Connected, Dialed, Dialer, connect};
pub use frame::Frame;
pub use listener::{Admitted, Listener};
pub use tls::{Certificate, Identity, SavedIdentity};

use crate::ids::Rank;
use crate::wire::WireError;
use bincode::{Decode, Encode};
use frame::{FrameReader, FrameWriter};
use futures_util::future::join_all;
use quinn::{Connection, ConnectionError, Endpoint, SendStream, TransportConfig, VarInt};
use rustix::net::sockopt;
use std::io;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// A peer that says nothing for this long is gone, or as good as gone. Eight signs of life, so that a machine
/// with more work than cores gives no false alarm, and a false one costs a recomputation and no
/// request. The death of a local process is noticed by its launcher at once.
pub const IDLE_LIMIT: Duration = Duration::from_secs(2);

/// How often the coordinator asks for a sign of life. One side is enough.
const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// Longest time that one frame may take to be handed to the connection. A peer that lives but does
/// not read for this long is as good as dead.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// Bytes that may be on their way on one connection: half a largest frame, many plans.
const WINDOW_BYTES: u32 = 8 << 20;

/// Largest datagram over loopback, where nothing else limits it: fewer packets for a plan. Ten of
/// them, which quinn hands to the system in one call, must stay below the 64 KiB that such a call
/// may carry; above, they are lost, and quinn falls back to 1,200 bytes for good.
const LOOPBACK_MTU: u16 = 6_500;

/// Bytes that the operating system keeps for a process that is busy: several plans.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Spoken by both ends; raised if the meaning of streams changes.
const ALPN: &[u8] = b"cluster/1";

/// Codes of connections that one end closed on purpose.
const CODE_DONE: VarInt = VarInt::from_u32(0);
const CODE_REFUSED: VarInt = VarInt::from_u32(1);

/// Why a link does not work or no longer does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The other end, or this one, ended the link.
    #[error("the link was closed: {0}")]
    Closed(String),
    /// Nothing came, or nothing could be sent, in time.
    #[error("no answer within {}s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The other end does not want this process.
    #[error("the peer refused this process: {0}")]
    Refused(String),
    /// A process with an expected certificate was not admitted.
    #[error("rank {rank} was not admitted: {reason}")]
    NotAdmitted {
        /// Whose certificate it was.
        rank: Rank,
        /// Which process's: another one may have been expected in its place since it came.
        certificate: Certificate,
        /// A sentence for the operator.
        reason: String,
    },
    /// The bytes are not messages.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Keys, sockets or TLS could not be set up.
    #[error("cannot set up the link: {0}")]
    Setup(String),
}

/// The end of a link that sends messages of type `M`.
#[derive(Debug)]
pub struct LinkSender<M> {
    connection: Connection,
    main: FrameWriter,
    urgent: FrameWriter,
    sends: PhantomData<fn(&M)>,
}

impl<M: Encode> LinkSender<M> {
    /// Sends a message in order. Cancel-safe: a message whose send was given up is sent whole, before
    /// the next one, or not at all.
    ///
    /// # Errors
    /// [`LinkError`] if the link is over or the peer does not read for a long time;
    /// [`LinkError::Wire`] if the message is too long, and then nothing was sent.
    pub async fn send(&mut self, message: &M) -> Result<(), LinkError> {
        self.send_frame(&Frame::new(message)?).await
    }

    /// Sends a message that was encoded before, as when several ranks get the same.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_frame(&mut self, frame: &Frame<M>) -> Result<(), LinkError> {
        self.main.write(frame).await
    }

    /// Sends a message that overtakes whatever is on its way: it has a stream and a priority of its
    /// own, and works even where a [`Self::send`] was given up because the peer did not read. The
    /// peer may see it before messages that were sent earlier.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_urgent(&mut self, message: &M) -> Result<(), LinkError> {
        self.urgent.write(&Frame::new(message)?).await
    }

    /// Ends the link after everything sent has arrived. For a last message before the process exits.
    ///
    /// # Errors
    /// [`LinkError`] if the peer did not confirm within `limit`.
    pub async fn finish(mut self, limit: Duration) -> Result<(), LinkError> {
        let confirmed = async {
            self.main.finish().await?;
            self.urgent.finish().await
        };
        timeout(limit, confirmed)
            .await
            .unwrap_or(Err(LinkError::TimedOut(limit)))
    }

    /// Ends the link at once, both ways; messages on their way are lost.
    pub fn close(&self, reason: &str) {
        self.connection.close(CODE_DONE, reason.as_bytes());
    }

    /// The current estimate of the time to the peer and back.
    pub fn round_trip(&self) -> Duration {
        self.connection.rtt()
    }
}

/// Sends one frame to several peers at once. The results are in the order of the senders.
pub async fn broadcast<'a, M: Encode + 'a>(
    senders: impl IntoIterator<Item = &'a mut LinkSender<M>>,
    frame: &Frame<M>,
) -> Vec<Result<(), LinkError>> {
    join_all(senders.into_iter().map(|sender| sender.send_frame(frame))).await
}

/// The end of a link that receives messages of type `M`.
#[derive(Debug)]
pub struct LinkReceiver<M> {
    main: FrameReader<M>,
    urgent: FrameReader<M>,
    /// The urgent stream has ended; the main one may still hold messages.
    urgent_is_over: bool,
}

impl<M: Decode<()>> LinkReceiver<M> {
    /// The next message, urgent ones first. Cancel-safe. Has no deadline of its own: a peer that lives
    /// may have nothing to say; one that does not is noticed within [`IDLE_LIMIT`].
    ///
    /// # Errors
    /// [`LinkError`]; the link is of no use afterwards.
    pub async fn recv(&mut self) -> Result<M, LinkError> {
        if !self.urgent_is_over {
            tokio::select! {
                biased;
                urgent = self.urgent.next() => match urgent {
                    Ok(_) | Err(LinkError::Wire(_)) => return urgent,
                    // The end of one stream must not hide a last message on the other.
                    Err(_) => self.urgent_is_over = true,
                },
                message = self.main.next() => return message,
            }
        }
        self.main.next().await
    }

    /// The next message, if it comes within `limit`. Cancel-safe.
    ///
    /// # Errors
    /// As [`Self::recv`], and [`LinkError::TimedOut`], after which the link still works.
    pub async fn recv_within(&mut self, limit: Duration) -> Result<M, LinkError> {
        timeout(limit, self.recv())
            .await
            .unwrap_or(Err(LinkError::TimedOut(limit)))
    }
}

/// The two streams of a connection, as this end sees them.
struct Streams {
    main: (SendStream, quinn::RecvStream),
    urgent: (SendStream, quinn::RecvStream),
}

fn pair<Out, In>(connection: Connection, streams: Streams) -> (LinkSender<Out>, LinkReceiver<In>) {
    let (urgent, urgent_reader) = streams.urgent;
    let (main, main_reader) = streams.main;
    // Fails only where the stream is closed, which the first use will tell.
    let _ = urgent.set_priority(1);
    let sender = LinkSender {
        connection,
        main: FrameWriter::new(main),
        urgent: FrameWriter::new(urgent),
        sends: PhantomData,
    };
    let receiver = LinkReceiver {
        main: FrameReader::new(main_reader),
        urgent: FrameReader::new(urgent_reader),
        urgent_is_over: false,
    };
    (sender, receiver)
}

/// `ip` is the peer's or, for a listener, its own.
fn transport(ip: IpAddr, idle: Duration, keep_alive: Option<Duration>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(2))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        // Twice a stream's, so that a full main stream leaves room for the urgent one.
        .receive_window(VarInt::from_u32(2 * WINDOW_BYTES))
        .send_window(u64::from(2 * WINDOW_BYTES))
        .send_fairness(false)
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(keep_alive)
        .max_idle_timeout(quinn::IdleTimeout::try_from(idle).ok());
    if ip.is_loopback() {
        let mut discovery = quinn::MtuDiscoveryConfig::default();
        discovery.upper_bound(LOOPBACK_MTU);
        config.mtu_discovery_config(Some(discovery));
    }
    Arc::new(config)
}

/// A UDP socket on `address`, where port 0 is any, with its QUIC endpoint.
fn endpoint(address: SocketAddr) -> Result<Endpoint, LinkError> {
    let mut config = quinn::EndpointConfig::default();
    if address.ip().is_loopback() {
        config
            .max_udp_payload_size(LOOPBACK_MTU)
            .map_err(|e| setup(&e))?;
    }
    let socket = std::net::UdpSocket::bind(address).map_err(|e| setup(&e))?;
    // As far as the system allows; a smaller buffer works, but large plans lose packets.
    let _ = sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new(config, None, socket, runtime).map_err(|e| setup(&e))
}

fn setup(error: &(impl std::fmt::Display + ?Sized)) -> LinkError {
    LinkError::Setup(error.to_string())
}

impl From<ConnectionError> for LinkError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::TimedOut(IDLE_LIMIT),
            ConnectionError::ApplicationClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason).into_owned();
                if close.error_code == CODE_REFUSED {
                    Self::Refused(reason)
                } else {
                    Self::Closed(reason)
                }
            }
            // TLS alerts: the peer does not know this process's certificate, or it does not know ours.
            ConnectionError::ConnectionClosed(close) => Self::Refused(close.to_string()),
            ConnectionError::TransportError(error) => Self::Refused(error.to_string()),
            other => Self::Closed(other.to_string()),
        }
    }
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        setup(&error)
    }
}
