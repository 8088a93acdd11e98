//! `/tokenize` and `/detokenize`, as `vllm` has them.
//!
//! A request is read as the one whose tokens are asked for would be, and what that would refuse is refused. Only a text
//! that is too long for the model is counted like any other: that is what some ask for.

use super::chat::{self, ChatMessage};
use super::prompt::encode;
use super::variables::Variables;
use super::{Api, unsupported};
use crate::http::ServerState;
use crate::http::body;
use crate::http::error::ApiError;
use crate::http::limits::{Bounded, MAX_MESSAGES, token_ids};
use axum::Json;
use axum::extract::{Request, State};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizeBody {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Bounded<ChatMessage, MAX_MESSAGES>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template_kwargs: Option<Variables>,
    return_token_strs: Option<bool>,
}

/// `POST /tokenize`: of a text, or of a conversation.
pub async fn tokenize(
    State(state): State<Arc<ServerState>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let bytes = body::read(&state, request).await?;
    let body: TokenizeBody = body::parse(&bytes)?;
    let served = state.models.choose(body.model.as_deref())?;
    let api = match body.messages {
        Some(_) => Api::Chat,
        None => Api::Completions,
    };
    unsupported::refuse(api, &bytes)?;
    drop(bytes);
    let (text, special) = match (body.prompt, body.messages) {
        (Some(prompt), None) => (prompt, true),
        (None, Some(messages)) => {
            let ending = chat::ending(body.add_generation_prompt, body.continue_final_message)?;
            let variables = body.chat_template_kwargs.unwrap_or_default();
            let text = chat::render(served, messages, variables, ending).await?;
            (text, false)
        }
        _ => return Err(ApiError::bad_request("Send either `prompt` or `messages`.")),
    };
    let tokens = encode(served, text, body.add_special_tokens.unwrap_or(special)).await?;
    let tokenizer = &served.model.text.tokenizer;
    let texts = (body.return_token_strs == Some(true)).then(|| {
        let written = |&id: &u32| tokenizer.id_to_token(id).unwrap_or_default();
        tokens.iter().map(written).collect::<Vec<_>>()
    });
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": served.model.max_model_len,
        "tokens": tokens,
        "token_strs": texts,
    })))
}

#[derive(Debug, Deserialize)]
struct DetokenizeBody {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// `POST /detokenize`: special tokens are shown.
pub async fn detokenize(
    State(state): State<Arc<ServerState>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let body: DetokenizeBody = body::parse(&body::read(&state, request).await?)?;
    let served = state.models.choose(body.model.as_deref())?;
    token_ids("tokens", &body.tokens, served.model.vocab_size)?;
    let text = served
        .model
        .text
        .tokenizer
        .decode(&body.tokens, false)
        .map_err(|error| {
            tracing::warn!(%error, "tokens could not be decoded");
            ApiError::bad_request("These tokens are not a text of this model.")
        })?;
    Ok(Json(json!({"prompt": text})))
}
