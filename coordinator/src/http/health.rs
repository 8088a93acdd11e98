//! Routes about the process: is it alive, is it ready, what is it.
//!
//! `/health` says whether the groups of shards are as they should be: 200 while they load, serve or
//! drain, 503 from a fault until the group computes again, and for good where it cannot.
//! `/ready` says whether to send requests here. Where several models are served, one that is not well is
//! enough for a 503, which names it. Why it is one is said to those who have a key, where keys are set.

use super::ServerState;
use super::auth::Trusted;
use super::error::ApiError;
use crate::engine::handle::Readiness;
use axum::Json;
use axum::extract::{Extension, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// `/health` and `/ping`.
pub(super) async fn health(
    State(state): State<Arc<ServerState>>,
    Extension(trusted): Extension<Trusted>,
) -> Response {
    match worst(&state) {
        Readiness::Failed(why) => unavailable("failed", why, trusted),
        Readiness::Recovering(why) => unavailable("recovering", why, trusted),
        Readiness::Loading | Readiness::Ready | Readiness::Draining => ().into_response(),
    }
}

/// `/ready`.
pub(super) async fn ready(
    State(state): State<Arc<ServerState>>,
    Extension(trusted): Extension<Trusted>,
) -> Response {
    let (code, why) = match worst(&state) {
        Readiness::Ready => return Json(json!({"status": "ready"})).into_response(),
        Readiness::Loading => ("not_ready", "shards are loading".to_owned()),
        Readiness::Recovering(why) => ("recovering", why),
        Readiness::Draining => ("draining", "the server is draining".to_owned()),
        Readiness::Failed(why) => ("failed", why),
    };
    unavailable(code, why, trusted)
}

/// 503, with the reason for those who may know it.
fn unavailable(code: &'static str, why: String, Trusted(is_trusted): Trusted) -> Response {
    let (code, why) = if is_trusted {
        (code, why)
    } else {
        let sentence = "The server is not ready; with an API key it says why.";
        ("not_ready", sentence.to_owned())
    };
    ApiError::unavailable(code, why).into_response()
}

/// Where the model stands that is worst off, with its name where there are several.
fn worst(state: &ServerState) -> Readiness {
    let stands = state
        .models
        .iter()
        .map(|model| (model, model.engine.readiness()));
    let worst = stands.max_by_key(|(_, readiness)| readiness.severity());
    let Some((model, readiness)) = worst else {
        return Readiness::Loading;
    };
    if state.models.iter().nth(1).is_none() {
        return readiness;
    }
    let named = |why: String| format!("{}: {why}", model.name());
    match readiness {
        Readiness::Recovering(why) => Readiness::Recovering(named(why)),
        Readiness::Failed(why) => Readiness::Failed(named(why)),
        other => other,
    }
}

/// `/version`.
pub(super) async fn version(State(state): State<Arc<ServerState>>) -> Json<Value> {
    Json(json!({"version": state.version}))
}

/// `/load`, as `vllm` has it for load balancers.
pub(super) async fn load(State(state): State<Arc<ServerState>>) -> Json<Value> {
    Json(json!({"server_load": state.models.in_flight()}))
}

/// `/metrics`.
pub(super) async fn metrics(State(state): State<Arc<ServerState>>) -> Response {
    let text = (state.metrics)();
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
