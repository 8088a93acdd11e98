//! The OpenAI HTTP facade: one router over one state.
//!
//! Reading order: [`server`] accepts connections; the layers here give every answer a request id and
//! ask for a key; `served` finds the model a request names; [`openai`] turns a body into a [`generate::GenerateRequest`] and its
//! [`generate::Delta`]s into JSON; [`sse`] sends them as events. Nothing here decides what is computed
//! when: that is the engines', reached by their handles alone.
//!
//! Invariant: every answer carries `x-request-id`, every error has OpenAI's body, and no route but the probes'
//! (`/health`, `/ready`, `/ping`) answers without a key where keys are set.

pub mod auth;
pub mod background;
pub mod body;
pub mod error;
pub mod generate;
mod health;
pub mod limits;
pub mod openai;
mod pace;
mod refusal;
mod served;
pub mod server;
pub mod sse;
mod stall;

use crate::clock;
use auth::ApiKeys;
use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use background::Background;
use error::ApiError;
use limits::ServerLimits;
use openai::Api;
use served::Models;
pub use served::ServedModel;
use std::fmt;
use std::sync::Arc;
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

/// Header that names a request, ours or the client's.
const REQUEST_ID: &str = "x-request-id";

/// Longest request id taken from a client, in bytes; it goes into logs.
const REQUEST_ID_BYTES: usize = 128;

/// What `/metrics` answers.
pub type RenderMetrics = Box<dyn Fn() -> String + Send + Sync>;

/// What the server is made of.
pub struct ServerConfig {
    /// The models, at least one; no two have a name in common.
    pub models: Vec<ServedModel>,
    /// Keys.
    pub keys: ApiKeys,
    /// Bounds.
    pub limits: ServerLimits,
    /// Origins of web pages that may call; empty: none, `*`: all.
    pub allowed_origins: Vec<String>,
    /// Seeds of requests that give none follow from this; `None`: from chance.
    pub seed: Option<u64>,
    /// What `/version` says.
    pub version: String,
    /// What `/metrics` answers.
    pub metrics: RenderMetrics,
    /// Where requests that are answered later are kept; without it they are refused.
    pub background: Option<Background>,
}

/// What all handlers share.
pub struct ServerState {
    models: Models,
    keys: ApiKeys,
    limits: ServerLimits,
    version: String,
    metrics: RenderMetrics,
    background: Option<Arc<Background>>,
    /// When the server was made, in seconds since 1970: the models' `created`.
    created: u64,
}

impl fmt::Debug for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerState")
            .field("models", &self.models)
            .field("keys", &self.keys)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerConfig")
            .field("models", &self.models)
            .field("keys", &self.keys)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// The name of a request, as in its answer's `x-request-id`.
#[derive(Clone, Debug)]
pub struct RequestId {
    /// The name.
    pub text: String,
    /// Whether it stood in the request's head; one in its body goes before one of ours.
    pub is_given: bool,
}

/// Every route with its methods. The router is made of this list, and tests go through it.
pub const ROUTES: &[(&str, &[Method])] = &[
    ("/v1/models", &[Method::GET]),
    ("/v1/models/{*id}", &[Method::GET]),
    ("/v1/completions", &[Method::POST]),
    ("/v1/completions/{id}", &[Method::GET, Method::DELETE]),
    ("/v1/chat/completions", &[Method::POST]),
    ("/v1/chat/completions/{id}", &[Method::GET, Method::DELETE]),
    ("/tokenize", &[Method::POST]),
    ("/detokenize", &[Method::POST]),
    ("/health", &[Method::GET]),
    ("/ready", &[Method::GET]),
    ("/ping", &[Method::GET, Method::POST]),
    ("/version", &[Method::GET]),
    ("/load", &[Method::GET]),
    ("/metrics", &[Method::GET]),
];

fn handler(path: &str) -> MethodRouter<Arc<ServerState>> {
    match path {
        "/v1/models" => get(openai::models::list),
        "/v1/models/{*id}" => get(openai::models::one),
        "/v1/completions" => openai::route(Api::Completions),
        "/v1/completions/{id}" => background::route(Api::Completions),
        "/v1/chat/completions" => openai::route(Api::Chat),
        "/v1/chat/completions/{id}" => background::route(Api::Chat),
        "/tokenize" => post(openai::tokenize::tokenize),
        "/detokenize" => post(openai::tokenize::detokenize),
        "/health" => get(health::health),
        "/ready" => get(health::ready),
        "/ping" => get(health::health).post(health::health),
        "/version" => get(health::version),
        "/load" => get(health::load),
        "/metrics" => get(health::metrics),
        _ => unreachable!("{path} is in ROUTES and has no handler"),
    }
}

/// The router with all its layers. With `background` there must be a tokio runtime around.
pub fn router(config: ServerConfig) -> Router {
    let cors = cors(&config.allowed_origins);
    let state = Arc::new(ServerState {
        models: Models::new(config.models, config.seed, &config.limits),
        keys: config.keys,
        limits: config.limits,
        version: config.version,
        metrics: config.metrics,
        background: config.background.map(Arc::new),
        created: clock::unix_seconds(),
    });
    background::start(&state);
    let mut router = Router::new();
    for (path, _) in ROUTES {
        router = router.route(path, handler(path));
    }
    let router = router
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&state),
            auth::require_key,
        ))
        .with_state(state);
    let router = match cors {
        // Outside of the keys: a browser asks for permission without one.
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(middleware::from_fn(name_request))
}

async fn unknown_route(request: Request) -> ApiError {
    ApiError::status(
        StatusCode::NOT_FOUND,
        format!(
            "There is no {} {:.200} here.",
            request.method(),
            request.uri().path()
        ),
    )
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::status(
        StatusCode::METHOD_NOT_ALLOWED,
        format!(
            "{:.200} does not answer to {}.",
            request.uri().path(),
            request.method()
        ),
    )
}

/// Gives every request a name and every answer that name.
async fn name_request(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID);
    let given = given.filter(|id| is_request_id(id.as_bytes()));
    let given = given.and_then(|id| Some(id.to_str().ok()?.to_owned()));
    let is_given = given.is_some();
    let id = given.unwrap_or_else(new_request_id);
    let text = id.clone();
    request
        .extensions_mut()
        .insert(RequestId { text, is_given });
    let mut response = if names_one_host(&request) {
        next.run(request).await
    } else {
        let sentence = "A request of HTTP/1.1 must have exactly one Host header.";
        ApiError::bad_request(sentence).into_response()
    };
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().entry(REQUEST_ID).or_insert(id);
    }
    response
}

/// Whether a client may call its request so.
fn is_request_id(id: &[u8]) -> bool {
    (1..=REQUEST_ID_BYTES).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
}

/// What RFC 9112, section 3.2, asks of a server: proxies that disagree about the host would disagree
/// about who is asked.
fn names_one_host(request: &Request) -> bool {
    let hosts = request.headers().get_all(header::HOST).iter().count();
    hosts == 1 || (hosts == 0 && request.version() < Version::HTTP_11)
}

fn new_request_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origin = if origins.is_empty() {
        return None;
    } else if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::from(Any)
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse().ok()))
    };
    Some(
        CorsLayer::new()
            .allow_origin(origin)
            .allow_methods([Method::GET, Method::POST, Method::DELETE])
            // By name: to browsers `*` is everything but `authorization`.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([
                header::RETRY_AFTER,
                REQUEST_ID.parse().expect("a header's name"),
            ]),
    )
}
