//! The admin socket: status and shutdown, for this user on this machine alone.
//!
//! A Unix socket in a directory that nobody else may enter; whoever connects is asked by the kernel who
//! they are all the same. HTTP with JSON over it, so that any client can be used. Invariant: nothing
//! here is ever served on a network.

use super::board::Board;
use anyhow::{Context, Result};
use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

/// Connections at the same time: one operator, a few scripts.
const MAX_CONNECTIONS: usize = 16;
/// How long one may take, from the connection to the answer's end.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Pause after `accept` fails, as it does while the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the operator asked for. It never becomes less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asked {
    /// Nothing: serve.
    #[default]
    Nothing,
    /// To end when running requests have finished.
    Drain,
    /// To end now.
    Now,
}

/// What the routes need.
#[derive(Clone, Debug)]
pub struct Desk {
    /// What the process knows of itself.
    pub board: Arc<Board>,
    /// Where wishes go.
    pub asked: watch::Sender<Asked>,
}

/// Opens the socket.
///
/// # Errors
/// A sentence with its path.
pub fn bind(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path)
        .with_context(|| format!("cannot open the admin socket {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .with_context(|| format!("cannot close {} to others", path.display()))?;
    Ok(listener)
}

/// Answers until it is dropped.
pub async fn serve(listener: UnixListener, desk: Desk) {
    let router = Router::new()
        .route("/status", get(status))
        .route("/drain", post(drain))
        .route("/now", post(now))
        .with_state(desk);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) if may_ask(&stream) => {
                let router = router.clone();
                tokio::spawn(async move {
                    let connection = http1::Builder::new()
                        .timer(TokioTimer::new())
                        .keep_alive(false)
                        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
                    // Whoever asked may have gone.
                    let _ = timeout(CONNECTION_LIMIT, connection).await;
                    drop(place);
                });
            }
            Ok(_) => tracing::warn!("another user tried the admin socket"),
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the admin socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// This user, and whoever may do everything.
fn may_ask(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream
        .peer_cred()
        .is_ok_and(|peer| [own, 0].contains(&peer.uid()))
}

async fn status(State(desk): State<Desk>) -> Json<super::status::Status> {
    Json(desk.board.status())
}

async fn drain(State(desk): State<Desk>) -> Json<Value> {
    desk.ask(Asked::Drain)
}

async fn now(State(desk): State<Desk>) -> Json<Value> {
    desk.ask(Asked::Now)
}

impl Desk {
    fn ask(&self, wish: Asked) -> Json<Value> {
        self.asked.send_if_modified(|asked| {
            let more = wish > *asked;
            *asked = wish.max(*asked);
            more
        });
        Json(json!({"unfinished": self.board.unfinished()}))
    }
}
