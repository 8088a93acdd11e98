//! Requests that are answered later: `"background": true` in the body of a completion.
//!
//! The mark is that of OpenAI's Responses API; the answer is fetched, and deleted, as OpenAI's stored completions are.
//! A request is checked as any other and then accepted with 202, which means that it is in the journal, on disk.
//! It is computed beside those that wait for their answers, a few at a time so that it takes no place of theirs in the
//! queue; refusals that will pass, and a process that ends, only delay it. Decides nothing about how it is computed.
//!
//! Invariants: what was accepted gets one answer, unless it is deleted; to any other key than the one that sent it, it is not
//! there.

mod journal;
#[cfg(test)]
mod tests;

use super::ServerState;
use super::auth::Tenant;
use super::error::ApiError;
use super::limits::{BackgroundLimits, ServerLimits};
use super::openai::{self, Api, Call};
use super::served::Served;
use crate::clock::unix_seconds;
use crate::metrics::BackgroundMetrics;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use journal::{Head, Journal, NotBegun, Refused, Task, Unreadable};
use metrics::Counter;
use serde_json::{Value, json};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use uuid::Uuid;

/// Largest answer that is kept, in bytes: as large as the largest body, four times over.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Pause before what failed and may pass is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// How often it is looked for what is too old.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// The journal, and who computes what is in it.
#[derive(Debug)]
pub struct Background {
    /// Held by one thread at a time: it waits for the disk.
    journal: Arc<Mutex<Journal>>,
    /// Told when something is accepted.
    arrived: Arc<Notify>,
    turns: Arc<Semaphore>,
    metrics: Arc<BackgroundMetrics>,
}

impl Background {
    /// Opens the journal in `dir`, which is made where it is not there.
    ///
    /// # Errors
    /// A sentence: it cannot be read or written.
    pub fn open(
        dir: &std::path::Path,
        limits: &ServerLimits,
        metrics: BackgroundMetrics,
    ) -> anyhow::Result<Self> {
        let limits = &limits.background;
        let journal = Journal::open(dir, limits.clone())?;
        let left = journal.counts().queued;
        if left > 0 {
            tracing::warn!("{left} background requests of a process before this one go on");
        }
        show(&journal, &metrics);
        Ok(Self {
            journal: Arc::new(Mutex::new(journal)),
            arrived: Arc::default(),
            turns: Arc::new(Semaphore::new(limits.at_once)),
            metrics: Arc::new(metrics),
        })
    }

    /// Does something with the journal on a thread that may wait for the disk. It is done whether or not anyone
    /// still waits for it.
    async fn with<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Journal) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let mut journal = Arc::clone(&self.journal).lock_owned().await;
        let metrics = Arc::clone(&self.metrics);
        let done = tokio::task::spawn_blocking(move || {
            let done = act(&mut journal);
            show(&journal, &metrics);
            done
        });
        done.await.map_err(|error| {
            tracing::error!(%error, "the journal of background requests is broken");
            ApiError::internal("The journal of background requests is broken.")
        })
    }
}

fn show(journal: &Journal, metrics: &BackgroundMetrics) {
    let counts = journal.counts();
    metrics.queued.set(counts.queued as f64);
    metrics.in_progress.set(counts.in_progress as f64);
    metrics.ended.set(counts.ended as f64);
    metrics.bytes.set(counts.bytes as f64);
}

/// Whether requests wait in the journal `dir` that a process to come is to compute.
pub fn has_work(dir: &std::path::Path) -> bool {
    journal::has_work(dir, &BackgroundLimits::default(), unix_seconds())
}

/// Begins to compute what is in the journal and what will be.
pub(super) fn start(state: &Arc<ServerState>) {
    let Some(background) = &state.background else {
        return;
    };
    let sweeping = Arc::clone(background);
    tokio::spawn(async move {
        loop {
            let swept = sweeping.with(|journal| journal.expire(unix_seconds(), given_up));
            match swept.await {
                Ok(Ok(expired)) => sweeping.metrics.expired.increment(expired as u64),
                Ok(Err(error)) => tracing::warn!("old background requests stay: {error}"),
                Err(_) => return,
            }
            sleep(SWEEP_INTERVAL).await;
        }
    });
    let (state, background) = (Arc::clone(state), Arc::clone(background));
    tokio::spawn(async move {
        while let Ok(turn) = Arc::clone(&background.turns).acquire_owned().await {
            let Some(task) = next(&background).await else {
                return;
            };
            match task {
                Ok(task) => tokio::spawn(work(Arc::clone(&state), task, turn)),
                Err(unreadable) => tokio::spawn(give_back(Arc::clone(&background), unreadable)),
            };
        }
    });
}

/// Waits for a request to be computed.
async fn next(background: &Background) -> Option<Result<Task, Unreadable>> {
    loop {
        match background.with(Journal::begin).await.ok()? {
            Some(Ok(task)) => return Some(Ok(task)),
            Some(Err(NotBegun::Lost(unreadable))) => return Some(Err(unreadable)),
            Some(Err(later @ NotBegun::Later(..))) => {
                tracing::warn!("{later}");
                sleep(PAUSE).await;
            }
            None => background.arrived.notified().await,
        }
    }
}

/// Answers a request of which nothing but that it was accepted is known any more.
async fn give_back(background: Arc<Background>, unreadable: Unreadable) {
    tracing::error!("{unreadable}");
    let message = "The server could not read this request from its disk. Send it again.";
    let Unreadable { id, head, .. } = unreadable;
    let answer = failed(id, &head, &ApiError::internal(message));
    keep(&background, id, answer, &background.metrics.failed).await;
}

/// Computes a request and keeps its answer.
async fn work(state: Arc<ServerState>, task: Task, _turn: OwnedSemaphorePermit) {
    let (Some(background), id) = (&state.background, task.id) else {
        return;
    };
    let answered = tokio::select! {
        answered = compute(&state, &task) => answered,
        () = task.cancelled.cancelled() => return,
    };
    let (answer, metric) = match answered {
        None => return,
        Some(Ok(answer)) => (answer, &background.metrics.completed),
        Some(Err(error)) => (failed(id, &task.head, &error), &background.metrics.failed),
    };
    keep(background, id, answer, metric).await;
}

/// Keeps an answer, as soon as it can be written.
async fn keep(background: &Background, id: Uuid, answer: Vec<u8>, metric: &Counter) {
    let answer = Arc::new(answer);
    loop {
        let kept = Arc::clone(&answer);
        let kept = background.with(move |journal| journal.finish(id, &kept, unix_seconds()));
        match kept.await {
            Ok(Ok(is_kept)) => return metric.increment(u64::from(is_kept)),
            Ok(Err(error)) => tracing::error!("an answer cannot be written: {error}"),
            Err(_) => return,
        }
        sleep(PAUSE).await;
    }
}

/// The answer to a request, or what is wrong with it; `None` where this process will give none.
async fn compute(state: &ServerState, task: &Task) -> Option<Result<Vec<u8>, ApiError>> {
    let head = &task.head;
    loop {
        let served = match state.models.choose(Some(&head.model)) {
            Ok(served) => served,
            Err(error) => return Some(Err(error)),
        };
        let engine = &served.model.engine;
        engine.until_admits().await?;
        let call = Call {
            id: task.id.simple().to_string(),
            tenant: head.tenant,
            created: head.created,
            seed: Some(head.seed),
        };
        let error = match openai::answer(state, head.api, &task.body, call).await {
            Ok(answer) => return Some(completed(answer).await),
            Err(error) => error,
        };
        let will_pass = match error.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => true,
            // Where the cluster failed the answer was cut off with it, which is not the request's fault.
            StatusCode::INTERNAL_SERVER_ERROR => engine.admits().is_err(),
            _ => false,
        };
        if !will_pass {
            return Some(Err(error));
        }
        sleep(PAUSE).await;
    }
}

/// What is kept of an answer: itself, and that it is one.
async fn completed(answer: Response) -> Result<Vec<u8>, ApiError> {
    let whole = axum::body::to_bytes(answer.into_body(), MAX_ANSWER_BYTES).await;
    let whole = whole.map_err(|_| {
        ApiError::bad_request(format!(
            "The answer is larger than {MAX_ANSWER_BYTES} bytes. Ask for fewer choices or log-probabilities."
        ))
    })?;
    // Read and written again its numbers could change, so that it is put together from text.
    let fields = whole.strip_prefix(b"{").unwrap_or_default();
    Ok([br#"{"status":"completed","#, fields].concat())
}

/// What a GET says of a request that has no answer.
fn without_answer(id: Uuid, head: &Head, status: &str) -> Value {
    json!({
        "status": status,
        "id": head.api.name(&id.simple().to_string()),
        "object": head.api.object(),
        "created": head.created,
        "model": head.model,
        "choices": [],
    })
}

fn failed(id: Uuid, head: &Head, error: &ApiError) -> Vec<u8> {
    let mut answer = without_answer(id, head, "failed");
    answer["error"] = error.fields();
    answer.to_string().into_bytes()
}

fn given_up(id: Uuid, head: &Head) -> Vec<u8> {
    let message =
        "The server had no time to compute this request before it became too old. Send it again.";
    failed(id, head, &ApiError::internal(message))
}

/// Accepts a request that was checked, with the seed it has: it is on disk, and will be computed, when this
/// answers 202.
///
/// # Errors
/// 429 if too much is kept already, 503 if it cannot be written or no requests are taken now.
pub(super) async fn accept(
    state: &ServerState,
    served: &Served,
    (api, tenant): (Api, Tenant),
    (seed, body): (u64, Bytes),
) -> Result<Response, ApiError> {
    let Some(background) = &state.background else {
        let message = "This server keeps no journal of requests. Leave `background` out.";
        return Err(ApiError::parameter("background", message));
    };
    let admits = served.model.engine.admits();
    admits.map_err(|error| ApiError::from_submit(&error, 0))?;
    let id = Uuid::new_v4();
    let head = Head {
        api,
        tenant,
        model: served.model.name().to_owned(),
        created: unix_seconds(),
        seed,
    };
    let answer = Json(without_answer(id, &head, "queued"));
    let arrived = Arc::clone(&background.arrived);
    let metrics = Arc::clone(&background.metrics);
    let accepted = background.with(move |journal| {
        let accepted = journal.accept(id, head, &body);
        // Here, where it is done even if whoever asks has gone.
        if accepted.is_ok() {
            metrics.accepted.increment(1);
            arrived.notify_one();
        } else {
            metrics.rejected.increment(1);
        }
        accepted
    });
    accepted.await?.map_err(|refused| refusal(&refused))?;
    Ok((StatusCode::ACCEPTED, answer).into_response())
}

fn refusal(refused: &Refused) -> ApiError {
    match refused {
        Refused::Count(_) | Refused::Bytes(..) => ApiError::too_many(
            "background_full",
            format!("{refused}: delete answers that you have fetched, or come back later."),
        ),
        Refused::Disk(error) => {
            tracing::error!("a background request cannot be written: {error}");
            let message = "The request could not be written down, and is not accepted.";
            ApiError::unavailable("not_written", message)
        }
    }
}

/// Where the answers of an API are fetched and deleted.
pub(super) fn route(api: Api) -> MethodRouter<Arc<ServerState>> {
    type Shared = State<Arc<ServerState>>;
    let fetch = move |State(state): Shared, Extension(tenant), Path(name): Path<String>| async move {
        fetch(&state, (api, tenant), &name).await
    };
    let delete = move |State(state): Shared, Extension(tenant), Path(name): Path<String>| async move {
        delete(&state, (api, tenant), &name).await
    };
    get(fetch).delete(delete)
}

async fn fetch(
    state: &ServerState,
    whose: (Api, Tenant),
    name: &str,
) -> Result<Response, ApiError> {
    let (background, id) = known(state, whose.0, name)?;
    let found = background.with(move |journal| {
        let (head, state) = journal.find(id, whose)?;
        Some(match state {
            journal::State::Queued => Ok(without_answer(id, &head, "queued").to_string().into()),
            journal::State::InProgress(_) => {
                Ok(without_answer(id, &head, "in_progress").to_string().into())
            }
            journal::State::Ended(_) => journal.answer(id),
        })
    });
    let answer = found.await?.ok_or_else(|| unknown(name))?;
    let answer = answer.map_err(|error| broken(&error))?;
    let kind = [(header::CONTENT_TYPE, "application/json")];
    Ok((kind, answer).into_response())
}

async fn delete(
    state: &ServerState,
    whose: (Api, Tenant),
    name: &str,
) -> Result<Response, ApiError> {
    let (background, id) = known(state, whose.0, name)?;
    let deleted = background.with(move |journal| {
        let (_, state) = journal.find(id, whose)?;
        Some(journal.delete(id).map(|()| state))
    });
    let state = deleted.await?.ok_or_else(|| unknown(name))?;
    if !matches!(
        state.map_err(|error| broken(&error))?,
        journal::State::Ended(_)
    ) {
        background.metrics.cancelled.increment(1);
    }
    let object = format!("{}.deleted", whose.0.object());
    Ok(Json(json!({"id": name, "object": object, "deleted": true})).into_response())
}

fn known<'a>(
    state: &'a ServerState,
    api: Api,
    name: &str,
) -> Result<(&'a Background, Uuid), ApiError> {
    let id = api.id(name).and_then(|id| Uuid::try_parse(id).ok());
    let background = state.background.as_deref();
    background.zip(id).ok_or_else(|| unknown(name))
}

/// Says nothing about whether there is such a request of somebody else's.
fn unknown(name: &str) -> ApiError {
    ApiError::status(
        StatusCode::NOT_FOUND,
        format!(
            "There is no background request {name:.100} of this API key here; it may have been deleted, or its \
             answer was kept for as long as answers are."
        ),
    )
}

fn broken(error: &io::Error) -> ApiError {
    tracing::error!("a background request cannot be read or deleted: {error}");
    ApiError::internal("The journal of background requests cannot be read or written. Try again.")
}
