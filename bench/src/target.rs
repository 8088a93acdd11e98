//! The server under load: who it is, and how a planned load is sent to it.
//!
//! Invariant: requests are sent in order, each when it is due and there is room for it.

use crate::args::{Backend, Server};
use crate::client::Client;
use crate::launch::Launched;
use crate::load::Planned;
use crate::report::Outcome;
use crate::steps::Page;
use anyhow::Context;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Measures the server that is given, or one that is started for it and ended after it.
pub(crate) async fn with<T>(
    server: &Server,
    measure: impl AsyncFnOnce(&Target) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    if server.up.is_empty() {
        return measure(&Target::at(server, &server.url()).await?).await;
    }
    let key = server.key()?;
    let launched = Launched::start(&this_program()?, &server.up, key.as_deref()).await?;
    let measured = match Target::at_port(server, launched.port).await {
        Ok(target) => measure(&target).await,
        Err(error) => Err(error),
    };
    launched.stop().await?;
    measured
}

/// The binary that runs, which is also the one to start.
pub(crate) fn this_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("find this program's file")
}

/// A server that named its model.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    client: Arc<Client>,
    /// Model's name.
    pub(crate) model: String,
    /// Which API is spoken.
    pub(crate) backend: Backend,
    endpoint: Arc<str>,
    deadline: Duration,
}

impl Target {
    /// The server that listens on `port` of this machine, asked as `server` says.
    pub(crate) async fn at_port(server: &Server, port: u16) -> anyhow::Result<Self> {
        Self::at(server, &format!("http://127.0.0.1:{port}")).await
    }

    /// Asks the server for its model, if none is given.
    async fn at(server: &Server, url: &str) -> anyhow::Result<Self> {
        let client = Arc::new(Client::new(url, server.key()?.as_deref())?);
        let model = match &server.model {
            Some(model) => model.clone(),
            None => client
                .first_model()
                .await
                .with_context(|| format!("ask {url} for its models"))?,
        };
        Ok(Self {
            client,
            model,
            backend: server.backend(),
            endpoint: server.endpoint().into(),
            deadline: Duration::from_secs(server.timeout),
        })
    }

    /// Sends requests one after the other and forgets the answers.
    pub(crate) async fn warm_up(&self, plan: Vec<Planned>) {
        for warm_up in plan {
            // If it fails, those that are measured will too, and are counted.
            let _ = self.send(&warm_up).await;
        }
    }

    /// What the server's counters say; `None` if it has none.
    pub(crate) async fn page(&self) -> Option<Page> {
        self.client.metrics().await.map(|text| Page::parse(&text))
    }

    /// Sends the whole load, at most `room` requests at once. Moments count from `start`.
    pub(crate) async fn send_all(
        &self,
        plan: Vec<Planned>,
        room: u32,
        start: Instant,
    ) -> anyhow::Result<Vec<Outcome>> {
        let room = Arc::new(Semaphore::new(room as usize));
        let mut requests = JoinSet::new();
        for planned in plan {
            sleep_until(start + planned.due).await;
            let seat = Arc::clone(&room).acquire_owned().await?;
            let target = self.clone();
            requests.spawn(async move {
                let sent = start.elapsed();
                let answer = target.send(&planned).await;
                drop(seat);
                Outcome {
                    prompt_tokens: planned.prompt_tokens,
                    due: planned.due,
                    sent,
                    answer,
                }
            });
        }
        let mut outcomes = Vec::with_capacity(requests.len());
        while let Some(outcome) = requests.join_next().await {
            outcomes.push(outcome.context("run a request")?);
        }
        Ok(outcomes)
    }

    async fn send(&self, planned: &Planned) -> anyhow::Result<crate::stream::Answer> {
        let body = planned.body.clone();
        self.client
            .generate(&self.endpoint, body, self.deadline)
            .await
    }
}
