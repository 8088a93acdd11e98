//! The encrypted link between the coordinator and each shard: QUIC with mutual TLS.
//!
//! Every process makes its own key at start and both ends pin the other's exact certificate, so a
//! launch is a closed group: no authority, no name, no trust that outlives it. A peer counts as
//! admitted only after its certificate, then its preamble, then its `Hello` were checked.
//!
//! Commands and answers travel on one stream; [`LinkSender::send_urgent`] has a second one of
//! higher priority, so that an `Abort` never waits behind a plan. Activations never travel here.
//!
//! Invariant: no wait without a deadline, and no memory taken on a peer's word beyond
//! [`MAX_FRAME_BYTES`].

mod connect;
mod identity;
mod listen;
mod stream;

pub use connect::connect;
pub use identity::{Certificate, Identity};
pub use listen::{Admitted, Listener};
pub use stream::{Frame, LinkReceiver, LinkSender};

use crate::ids::Rank;
use crate::wire::{MAX_FRAME_BYTES, WireError};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::sync::Arc;
use std::time::Duration;

/// From a connection's first packet to its admission.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// How long a frame may wait for the peer to make room.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// A peer that says nothing for this long is gone. A killed process of this host is noticed at once by
/// whoever started it; this is for lost networks, and long enough for an overloaded host.
const IDLE_LIMIT: Duration = Duration::from_secs(10);

/// One end keeps the link awake; the coordinator.
const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// What both ends must call the protocol before TLS goes on.
const ALPN: &[u8] = b"cluster/1";

/// Largest UDP payload: loopback carries it whole, and discovery finds what other paths carry.
const MAX_UDP_PAYLOAD: u16 = 65_527;

/// Why a link cannot be made or is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer ended it, or the path did.
    #[error("the link is closed: {0}")]
    Closed(String),
    /// Too much time went by.
    #[error("{what} took longer than {}s", .limit.as_secs_f32())]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The peer's bytes are not the protocol's.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer speaks the protocol and breaks its rules.
    #[error("the peer was refused: {0}")]
    Refused(String),
    /// A socket, key or configuration of this process.
    #[error("cannot set up the link: {0}")]
    Setup(String),
}

impl LinkError {
    fn closed(error: impl std::fmt::Display) -> Self {
        Self::Closed(error.to_string())
    }

    fn setup(error: impl std::fmt::Display) -> Self {
        Self::Setup(error.to_string())
    }
}

/// Settings of both ends.
fn transport(keep_alive: bool) -> Result<Arc<TransportConfig>, LinkError> {
    let window = VarInt::try_from(2 * MAX_FRAME_BYTES as u64).map_err(LinkError::setup)?;
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_UDP_PAYLOAD);
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE_LIMIT).map_err(LinkError::setup)?))
        .keep_alive_interval(keep_alive.then_some(KEEP_ALIVE))
        .initial_rtt(Duration::from_millis(20))
        .mtu_discovery_config(Some(mtu))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_concurrent_bidi_streams(VarInt::from_u32(2))
        .stream_receive_window(window)
        .receive_window(window)
        .send_window(4 * MAX_FRAME_BYTES as u64)
        .send_fairness(false)
        .datagram_receive_buffer_size(None);
    Ok(Arc::new(config))
}

/// Settings of the UDP socket.
fn endpoint_config() -> Result<quinn::EndpointConfig, LinkError> {
    let mut config = quinn::EndpointConfig::default();
    config.max_udp_payload_size(MAX_UDP_PAYLOAD).map_err(LinkError::setup)?;
    Ok(config)
}

/// Fails with [`LinkError::TimedOut`] when `work` does not end in time.
async fn within<T>(
    limit: Duration,
    what: &'static str,
    work: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(LinkError::TimedOut { what, limit }))
}

/// The name in every certificate; identity is the key, not the name.
fn server_name(rank: Option<Rank>) -> String {
    rank.map_or_else(|| "coordinator".to_owned(), |rank| format!("shard-{rank}"))
}
