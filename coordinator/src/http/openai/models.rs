//! `/v1/models`: the served names.

use crate::http::ServerState;
use crate::http::error::ApiError;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /v1/models`.
pub async fn list(State(state): State<Arc<ServerState>>) -> Json<Value> {
    let models: Vec<Value> = state
        .model
        .names
        .iter()
        .map(|name| model(&state, name))
        .collect();
    Json(json!({"object": "list", "data": models}))
}

/// `GET /v1/models/{id}`; an id may contain slashes.
pub async fn one(
    State(state): State<Arc<ServerState>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|error| ApiError::bad_request(error.body_text()))?;
    state.check_model(Some(&id))?;
    Ok(Json(model(&state, &id)))
}

fn model(state: &ServerState, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "cluster",
        "root": state.model_name(),
        "parent": null,
        "max_model_len": state.model.max_model_len,
    })
}
