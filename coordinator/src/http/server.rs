//! The accept loop: connections with deadlines.
//!
//! `axum::serve` never times out a half-sent head, so this is hyper's own connection with a timer.
//! Knows nothing of routes. Every connection ends: its head, its body and its client's reading have
//! deadlines, and after the shutdown begins there is one for all that is still open.

use super::limits::ServerLimits;
use super::refusal::Explained;
use super::stall::StallGuard;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Pause after `accept` fails, as it does while the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes that the system keeps for a client that does not read; it doubles them. Left to itself it takes up to 4 MB, and
/// whoever does not read would be found out only after many thousands of tokens.
const SEND_BUFFER_BYTES: usize = 32 << 10;

/// Serves `router` until `shutdown` completes; then takes no more connections, and gives open answers
/// [`ServerLimits::drain_timeout`].
///
/// # Errors
/// If the listener has no address.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ServerLimits,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    tracing::debug!(%address, "serving HTTP");
    let places = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accept = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accept => accepted,
            // Ended tasks are only taken off the set; their errors are the client's business.
            Some(_) = connections.join_next() => continue,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = connection(stream, router.clone(), &limits);
                let connection = graceful.watch(connection);
                connections.spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a connection ended early");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained = tokio::time::timeout(limits.drain_timeout, graceful.shutdown()).await;
    if drained.is_err() {
        tracing::warn!("connections were still open at the end of the drain time");
    }
    // Dropping the set ends what is left.
    drop(connections);
    Ok(())
}

type Io = TokioIo<StallGuard<Explained<TcpStream>>>;
type Connection = http1::Connection<Io, TowerToHyperService<Router>>;

fn connection(stream: TcpStream, router: Router, limits: &ServerLimits) -> Connection {
    // A token is a small packet that must not wait for the next one. The error is harmless.
    let _ = stream.set_nodelay(true);
    let bounded = sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER_BYTES);
    if let Err(error) = bounded {
        tracing::debug!(%error, "a connection keeps its send buffer");
    }
    let io = TokioIo::new(StallGuard::new(
        Explained::new(stream),
        limits.stall_timeout,
    ));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(limits.header_bytes.max(8 << 10)) // hyper's own least
        .serve_connection(io, TowerToHyperService::new(router))
}
