//! Routes about the process: is it alive, is it ready, what is it.
//!
//! `/health` says whether the group of shards is as it should be: 200 while it loads, serves or
//! drains, 503 from a fault until the group computes again, and for good where it cannot.
//! `/ready` says whether to send requests here.

use super::ServerState;
use super::error::ApiError;
use crate::engine::handle::Readiness;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `/health` and `/ping`.
pub(super) async fn health(State(state): State<Arc<ServerState>>) -> Response {
    match state.engine.readiness() {
        Readiness::Failed(why) => ApiError::unavailable("failed", why).into_response(),
        Readiness::Recovering(why) => ApiError::unavailable("recovering", why).into_response(),
        Readiness::Loading | Readiness::Ready | Readiness::Draining => ().into_response(),
    }
}

/// `/ready`.
pub(super) async fn ready(State(state): State<Arc<ServerState>>) -> Response {
    let (code, why) = match state.engine.readiness() {
        Readiness::Ready => return Json(json!({"status": "ready"})).into_response(),
        Readiness::Loading => ("not_ready", "shards are loading".to_owned()),
        Readiness::Recovering(why) => ("recovering", why),
        Readiness::Draining => ("draining", "the server is draining".to_owned()),
        Readiness::Failed(why) => ("failed", why),
    };
    ApiError::unavailable(code, why).into_response()
}

/// `/version`.
pub(super) async fn version(State(state): State<Arc<ServerState>>) -> Json<Value> {
    Json(json!({"version": state.version}))
}

/// `/load`, as `vllm` has it for load balancers.
pub(super) async fn load(State(state): State<Arc<ServerState>>) -> Json<Value> {
    Json(json!({"server_load": state.in_flight.load(Ordering::Relaxed)}))
}

/// `/metrics`.
pub(super) async fn metrics(State(state): State<Arc<ServerState>>) -> Response {
    let text = (state.metrics)();
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
