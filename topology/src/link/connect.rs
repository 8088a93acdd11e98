//! The shard's end: connects to the one coordinator it was told of.
//!
//! With TLS 1.3 a client believes itself connected before the server has looked at its certificate.
//! Invariant: [`connect`] returns a link only after the coordinator's `Welcome`.

use super::tls::{self, Certificate, Identity, NAME};
use super::{
    IDLE_LIMIT, LinkError, LinkReceiver, LinkSender, Streams, endpoint, pair, setup, transport,
};
use crate::wire::{FromShard, Hello, Preamble, ToShard};
use quinn::{Connection, Endpoint};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// A link to a coordinator that has admitted this process.
#[derive(Debug)]
pub struct Connected {
    /// Number of ranks, from the coordinator's `Welcome`.
    pub world_size: u32,
    /// Which of its launch's coordinators it is.
    pub generation: u32,
    /// Its process id on its own machine.
    pub pid: u32,
    /// Replies to it.
    pub sender: LinkSender<FromShard>,
    /// Commands from it, from the one after `Welcome` on.
    pub receiver: LinkReceiver<ToShard>,
}

/// The coordinator, proven by its key, which has not said yet whether it wants this process.
#[derive(Debug)]
pub struct Dialed(Connection);

/// Connects, says `hello` and waits for `Welcome`, all within `limit`.
///
/// # Errors
/// [`LinkError::Refused`] with the coordinator's reason, [`LinkError::TimedOut`], or
/// [`LinkError::Wire`] if the coordinator speaks otherwise.
pub async fn connect(
    address: SocketAddr,
    coordinator: &Certificate,
    identity: &Identity,
    hello: Hello,
    limit: Duration,
) -> Result<Connected, LinkError> {
    let greeting = greet(address, coordinator, identity, hello, Preamble::ours());
    timeout(limit, greeting)
        .await
        .unwrap_or(Err(LinkError::TimedOut(limit)))
}

/// Tries to reach a coordinator, as often as it takes, from one socket: each try that came to nothing occupies
/// its own for seconds.
#[derive(Debug)]
pub struct Dialer {
    address: SocketAddr,
    config: quinn::ClientConfig,
    endpoint: Endpoint,
}

impl Dialer {
    /// For the coordinator with this certificate, which is to be at `address`.
    ///
    /// # Errors
    /// [`LinkError`] if there is no socket to be had.
    pub fn new(
        address: SocketAddr,
        coordinator: &Certificate,
        identity: &Identity,
    ) -> Result<Self, LinkError> {
        let crypto = tls::client(identity, coordinator)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport(address.ip(), IDLE_LIMIT, None));
        let ip: IpAddr = match address.ip() {
            ip if ip.is_loopback() => ip,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Ok(Self {
            address,
            config,
            endpoint: endpoint(SocketAddr::new(ip, 0))?,
        })
    }

    /// Only connects. What goes wrong here says nothing about the coordinator, which may not be there or
    /// have another in its place; what goes wrong afterwards is its own word.
    ///
    /// # Errors
    /// [`LinkError`] if nobody with the coordinator's key is reached within `limit`.
    pub async fn dial(&self, limit: Duration) -> Result<Dialed, LinkError> {
        timeout(limit, self.reach())
            .await
            .unwrap_or(Err(LinkError::TimedOut(limit)))
    }

    async fn reach(&self) -> Result<Dialed, LinkError> {
        let config = self.config.clone();
        let connecting = self.endpoint.connect_with(config, self.address, NAME);
        // The endpoint lives on behind the connection.
        Ok(Dialed(connecting.map_err(|e| setup(&e))?.await?))
    }
}

impl Dialed {
    /// Says `hello` and waits for `Welcome`.
    ///
    /// # Errors
    /// As [`connect`].
    pub async fn greet(self, hello: Hello, limit: Duration) -> Result<Connected, LinkError> {
        timeout(limit, introduce(self.0, hello, Preamble::ours()))
            .await
            .unwrap_or(Err(LinkError::TimedOut(limit)))
    }
}

/// With the preamble as an argument, so that tests can say a wrong one.
pub(super) async fn greet(
    address: SocketAddr,
    coordinator: &Certificate,
    identity: &Identity,
    hello: Hello,
    preamble: Preamble,
) -> Result<Connected, LinkError> {
    let dialer = Dialer::new(address, coordinator, identity)?;
    let Dialed(connection) = dialer.reach().await?;
    introduce(connection, hello, preamble).await
}

async fn introduce(
    connection: Connection,
    hello: Hello,
    preamble: Preamble,
) -> Result<Connected, LinkError> {
    let mut streams = Streams {
        main: connection.open_bi().await?,
        urgent: connection.open_bi().await?,
    };
    // A stream exists for the other end only once something was written to it.
    for stream in [&mut streams.main.0, &mut streams.urgent.0] {
        let written = stream.write_all(&preamble.to_bytes()).await;
        written.map_err(|e| {
            connection
                .close_reason()
                .map_or(LinkError::Closed(e.to_string()), Into::into)
        })?;
    }
    let (mut sender, mut receiver) = pair::<FromShard, ToShard>(connection, streams);
    sender.send(&FromShard::Hello(hello)).await?;
    match receiver.recv().await? {
        ToShard::Welcome {
            world_size,
            generation,
            pid,
        } => Ok(Connected {
            world_size,
            generation,
            pid,
            sender,
            receiver,
        }),
        other => Err(LinkError::Refused(format!(
            "the first message is not Welcome but {other:?}"
        ))),
    }
}
