//! `/v1/models`: the served names.

use crate::http::error::ApiError;
use crate::http::{ServedModel, ServerState};
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /v1/models`.
pub async fn list(State(state): State<Arc<ServerState>>) -> Json<Value> {
    let models = state.models.iter().flat_map(|model| {
        let names = model.names.iter();
        names.map(|name| about(&state, model, name))
    });
    let models: Vec<Value> = models.collect();
    Json(json!({"object": "list", "data": models}))
}

/// `GET /v1/models/{id}`; an id may contain slashes.
pub async fn one(
    State(state): State<Arc<ServerState>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|error| ApiError::bad_request(error.body_text()))?;
    let served = state.models.choose(Some(&id))?;
    Ok(Json(about(&state, &served.model, &id)))
}

fn about(state: &ServerState, model: &ServedModel, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "cluster",
        "root": model.name(),
        "parent": null,
        "max_model_len": model.max_model_len,
    })
}
