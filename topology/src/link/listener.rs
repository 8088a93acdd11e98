//! The coordinator's end: waits for shards and admits those it expects.
//!
//! Each incoming connection is examined in a task of its own, so that a slow or hostile one holds up
//! nobody. An unknown certificate is refused within the TLS handshake and leaves no trace but a line
//! in the log; a known process that is the wrong build or claims another rank is reported.
//!
//! Invariant: an expected certificate opens one link; for another, it must be expected again.

use super::tls::{self, Certificate, Expected, Identity};
use super::{
    CODE_REFUSED, IDLE_LIMIT, KEEP_ALIVE, LinkError, LinkReceiver, LinkSender, Streams, endpoint,
    pair, transport,
};
use crate::ids::Rank;
use crate::wire::{FromShard, Hello, Preamble, ToShard};
use quinn::{Connection, Endpoint, Incoming, RecvStream, ServerConfig};
use rustls::pki_types::CertificateDer;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

/// Connections that are examined at the same time; further ones are refused and may try again.
const MAX_HANDSHAKES: usize = 64;

/// Longest time from a connection's first packet to its `Hello`.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Admitted links that wait to be taken by [`Listener::accept`].
const ADMITTED_CAPACITY: usize = 64;

/// A shard that was admitted. The first message it waits for is [`ToShard::Welcome`].
#[derive(Debug)]
pub struct Admitted {
    /// What it said of itself; `hello.rank` is the rank whose certificate it has.
    pub hello: Hello,
    /// Which process it is: another one may have been expected in its place since it came.
    pub certificate: Certificate,
    /// Commands to it.
    pub sender: LinkSender<ToShard>,
    /// Replies from it.
    pub receiver: LinkReceiver<FromShard>,
}

/// Waits for shards on one UDP socket.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    /// How it answers, until it does.
    config: Option<ServerConfig>,
    identity: Identity,
    expected: Expected,
    admitted: mpsc::Receiver<Result<Admitted, LinkError>>,
    examiner: AbortHandle,
}

impl Listener {
    /// Listens on `ip`, on a port that the operating system chooses, with a key made for this call.
    /// Must be called within a tokio runtime; links stop giving signs of life when it is blocked.
    ///
    /// # Errors
    /// [`LinkError::Setup`] if the address cannot be bound.
    pub fn bind(ip: IpAddr) -> Result<Self, LinkError> {
        Self::bind_with(ip, IDLE_LIMIT)
    }

    pub(super) fn bind_with(ip: IpAddr, idle: Duration) -> Result<Self, LinkError> {
        let address = SocketAddr::new(ip, 0);
        let mut listener = Self::open(address, Identity::generate()?, idle)?;
        listener.answer();
        Ok(listener)
    }

    /// Takes the address of another listener whose key this is. Answers nobody until it is told to
    /// ([`Self::answer`]): who knocks in vain tries again, who is refused does not.
    ///
    /// # Errors
    /// [`LinkError::Setup`] if the address cannot be bound, as while the other one has it.
    pub fn bind_again(address: SocketAddr, identity: Identity) -> Result<Self, LinkError> {
        Self::open(address, identity, IDLE_LIMIT)
    }

    /// From now on connections are answered, if they were not before.
    pub fn answer(&mut self) {
        if let Some(config) = self.config.take() {
            self.endpoint.set_server_config(Some(config));
        }
    }

    fn open(address: SocketAddr, identity: Identity, idle: Duration) -> Result<Self, LinkError> {
        let expected = Expected::default();
        let crypto = tls::server(&identity, expected.clone())?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(transport(address.ip(), idle, Some(KEEP_ALIVE)));
        // A shard's address does not change while it lives.
        config.migration(false);
        let endpoint = endpoint(address)?;
        let (found, admitted) = mpsc::channel(ADMITTED_CAPACITY);
        let examine = examine_all(endpoint.clone(), expected.clone(), found);
        let examiner = tokio::spawn(examine).abort_handle();
        Ok(Self {
            endpoint,
            config: Some(config),
            identity,
            expected,
            admitted,
            examiner,
        })
    }

    /// Where shards connect to.
    ///
    /// # Errors
    /// [`LinkError::Setup`] if the socket has no address.
    pub fn local_addr(&self) -> Result<SocketAddr, LinkError> {
        Ok(self.endpoint.local_addr()?)
    }

    /// What shards must pin.
    pub fn certificate(&self) -> &Certificate {
        self.identity.certificate()
    }

    /// Its key, for a successor.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Admits the process with this certificate as this rank, once. Replaces what was expected of
    /// the rank before; links that exist are not touched.
    pub fn expect(&self, rank: Rank, certificate: Certificate) {
        self.expected.insert(rank, certificate);
    }

    /// The next shard that was admitted. Cancel-safe.
    ///
    /// # Errors
    /// [`LinkError::TimedOut`] if none came within `limit`; [`LinkError::NotAdmitted`] if an expected
    /// process came but cannot be used. The listener works on after both.
    pub async fn accept(&mut self, limit: Duration) -> Result<Admitted, LinkError> {
        match timeout(limit, self.admitted.recv()).await {
            Ok(Some(admitted)) => admitted,
            Ok(None) => Err(LinkError::Closed("the listener has ended".to_owned())),
            Err(_) => Err(LinkError::TimedOut(limit)),
        }
    }
}

impl Drop for Listener {
    /// Nobody is admitted any more; links that exist live on.
    fn drop(&mut self) {
        self.examiner.abort();
    }
}

async fn examine_all(
    endpoint: Endpoint,
    expected: Expected,
    found: mpsc::Sender<Result<Admitted, LinkError>>,
) {
    // Dropped, and all its tasks ended, when this one is.
    let mut tasks = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        while tasks.try_join_next().is_some() {}
        if tasks.len() >= MAX_HANDSHAKES {
            incoming.refuse();
            continue;
        }
        let (expected, found) = (expected.clone(), found.clone());
        tasks.spawn(async move {
            let from = incoming.remote_address();
            let examined = timeout(HANDSHAKE_LIMIT, examine(incoming, &expected)).await;
            match examined.unwrap_or(Err(LinkError::TimedOut(HANDSHAKE_LIMIT))) {
                // The channel is closed only when the listener is gone.
                Ok(admitted) => drop(found.send(Ok(admitted)).await),
                Err(error @ LinkError::NotAdmitted { .. }) => drop(found.send(Err(error)).await),
                Err(error) => tracing::debug!(%from, %error, "refused a connection"),
            }
        });
    }
}

async fn examine(incoming: Incoming, expected: &Expected) -> Result<Admitted, LinkError> {
    let connection = incoming.accept()?.await?;
    let certificate = peer_certificate(&connection)?;
    let Some(rank) = expected.rank_of(&certificate.0) else {
        // Replaced or used up since the handshake looked at it.
        let reason = "its certificate is no longer expected";
        connection.close(CODE_REFUSED, reason.as_bytes());
        return Err(LinkError::Refused(reason.to_owned()));
    };
    let refuse = |error: LinkError| {
        let (reason, certificate) = (error.to_string(), certificate.clone());
        connection.close(CODE_REFUSED, reason.as_bytes());
        LinkError::NotAdmitted {
            rank,
            certificate,
            reason,
        }
    };
    let (hello, sender, receiver) = greet(&connection).await.map_err(refuse)?;
    if hello.rank != rank {
        let reason = format!(
            "its `rank` is {}, and its certificate that of rank {rank}",
            hello.rank
        );
        return Err(refuse(LinkError::Refused(reason)));
    }
    if !expected.take(rank, &certificate.0) {
        let reason = "another process was admitted in its place".to_owned();
        return Err(refuse(LinkError::Refused(reason)));
    }
    Ok(Admitted {
        hello,
        certificate,
        sender,
        receiver,
    })
}

type Greeted = (Hello, LinkSender<ToShard>, LinkReceiver<FromShard>);

/// Preambles of both streams, then `Hello`.
async fn greet(connection: &Connection) -> Result<Greeted, LinkError> {
    let mut main = connection.accept_bi().await?;
    check_preamble(&mut main.1).await?;
    let mut urgent = connection.accept_bi().await?;
    check_preamble(&mut urgent.1).await?;
    let streams = Streams { main, urgent };
    let (sender, mut receiver) = pair::<ToShard, FromShard>(connection.clone(), streams);
    match receiver.recv().await? {
        FromShard::Hello(hello) => {
            hello.check().map_err(LinkError::Refused)?;
            Ok((hello, sender, receiver))
        }
        _ => Err(LinkError::Refused(
            "its first message is not Hello".to_owned(),
        )),
    }
}

async fn check_preamble(stream: &mut RecvStream) -> Result<(), LinkError> {
    let mut bytes = [0; Preamble::BYTES];
    let read = stream.read_exact(&mut bytes).await;
    read.map_err(|e| LinkError::Closed(e.to_string()))?;
    Ok(Preamble::ours().check(&bytes)?)
}

fn peer_certificate(connection: &Connection) -> Result<Certificate, LinkError> {
    let identity = connection.peer_identity();
    let chain = identity.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let first = chain.and_then(|chain| chain.first().map(|first| Certificate(first.to_vec())));
    first.ok_or_else(|| LinkError::Refused("it has no certificate".to_owned()))
}
