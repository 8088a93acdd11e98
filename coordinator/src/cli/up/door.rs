//! The HTTP server of a cluster: opened before shards are ready, closed after the last answer.

use super::Failure;
use crate::cli::args::Up;
use crate::cli::prepare::{Prepared, PreparedModel};
use crate::cli::{VERSION, presence};
use crate::engine::handle::EngineHandle;
use crate::http::auth::ApiKeys;
use crate::http::background::Background;
use crate::http::limits::ServerLimits;
use crate::http::{ServedModel, ServerConfig, router, server};
use crate::metrics::Registry;
use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long answers may still take to reach their clients once the engines have ended.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// The HTTP server at work.
pub(super) struct Door {
    /// Whether each model has a chat template.
    pub(super) chat: Vec<bool>,
    close: oneshot::Sender<()>,
    server: JoinHandle<io::Result<()>>,
}

impl Door {
    /// Reads what text needs and opens: until shards are ready it answers 503. `engines` are the models', `journal` is
    /// where background requests are kept.
    pub(super) async fn open(
        up: &Up,
        prepared: &Prepared,
        (listener, engines): (TcpListener, Vec<EngineHandle>),
        registry: Arc<Registry>,
        journal: &Path,
    ) -> Result<Self, Failure> {
        let models = prepared.models.iter().zip(engines);
        let models = try_join_all(models.map(|(model, engine)| served(model, engine))).await;
        let models = models.map_err(Failure::Input)?;
        let chat = models.iter().map(|model| model.text.template.is_some());
        let chat = chat.collect();
        let limits = ServerLimits {
            max_logprobs: up.scheduling.max_logprobs,
            drain_timeout: FLUSH_LIMIT,
            ..ServerLimits::default()
        };
        let background = Background::open(journal, &limits, registry.background());
        let router = router(ServerConfig {
            background: Some(background.map_err(Failure::Input)?),
            models,
            keys: ApiKeys::new(&prepared.keys),
            limits: limits.clone(),
            allowed_origins: up.allowed_origins.clone(),
            seed: up.seed,
            version: VERSION.to_owned(),
            metrics: Box::new(move || registry.render()),
        });
        let (close, closed) = oneshot::channel();
        let closed = async {
            // Dropped or sent: both mean close.
            let _ = closed.await;
        };
        let server = tokio::spawn(server::serve(listener, router, limits, closed));
        Ok(Self {
            chat,
            close,
            server,
        })
    }

    /// Takes no more connections and gives open answers a moment to be read.
    pub(super) async fn close(self) {
        // An error means that the server has ended already.
        let _ = self.close.send(());
        let _ = self.server.await;
    }
}

async fn served(model: &PreparedModel, engine: EngineHandle) -> Result<ServedModel> {
    let owned = model.clone();
    let text = tokio::task::spawn_blocking(move || owned.load_text()).await;
    Ok(ServedModel {
        names: model.model.names.clone(),
        text: text.context("reading the tokenizer panicked")??,
        max_model_len: model.load.max_model_len,
        vocab_size: model.model.shape.vocab_size,
        has_priorities: model.has_priorities(),
        engine,
    })
}

/// Takes the address where the API is to be.
pub(super) async fn bind(up: &Up, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let (ip, port) = (address.ip(), address.port());
        match error.kind() {
            io::ErrorKind::AddrInUse => {
                let holder = presence::holder(up, port);
                let by = holder.map_or_else(String::new, |holder| format!(" by {holder}"));
                anyhow::anyhow!(
                    "port {port} of {ip} is in use{by}; give another --port, or 0 for a free one"
                )
            }
            io::ErrorKind::PermissionDenied => anyhow::anyhow!(
                "port {port} may not be used by this user; give a --port above 1023"
            ),
            io::ErrorKind::AddrNotAvailable => {
                anyhow::anyhow!("{ip} is no address of this machine; give --host one that is")
            }
            _ => anyhow::anyhow!("cannot serve on {address}: {error}"),
        }
    })
}
