//! The OpenAI HTTP facade: one router over one state.
//!
//! Reading order: [`server`] accepts connections; the layers here give every answer a request id and
//! ask for a key; [`openai`] turns a body into a [`generate::GenerateRequest`] and its
//! [`generate::Delta`]s into JSON; [`sse`] sends them as events. Nothing here decides what is computed
//! when: that is the engine's, reached by its handle alone.
//!
//! Invariant: every answer carries `x-request-id`, every error has OpenAI's body, and no route but
//! `/health` answers without a key where keys are set.

pub mod auth;
pub mod body;
pub mod error;
pub mod generate;
mod health;
pub mod limits;
pub mod openai;
mod pace;
mod refusal;
pub mod server;
pub mod sse;
mod stall;

use crate::clock;
use crate::engine::handle::EngineHandle;
use crate::text::TextModel;
use auth::ApiKeys;
use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use error::ApiError;
use limits::{MAX_CHOICES, ServerLimits};
use pace::Pace;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

/// Header that names a request, ours or the client's.
const REQUEST_ID: &str = "x-request-id";

/// Longest request id taken from a client, in bytes; it goes into logs.
const REQUEST_ID_BYTES: usize = 128;

/// The model that is served.
#[derive(Debug)]
pub struct ServedModel {
    /// What requests may call it, at least one; the first is what answers call it.
    pub names: Vec<String>,
    /// Tokenizer, template, defaults.
    pub text: TextModel,
    /// Most tokens of prompt and answer together.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
}

/// What `/metrics` answers.
pub type RenderMetrics = Box<dyn Fn() -> String + Send + Sync>;

/// What the server is made of.
pub struct ServerConfig {
    /// The engine.
    pub engine: EngineHandle,
    /// The model.
    pub model: ServedModel,
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
}

/// What all handlers share.
pub struct ServerState {
    engine: EngineHandle,
    model: ServedModel,
    keys: ApiKeys,
    limits: ServerLimits,
    version: String,
    metrics: RenderMetrics,
    /// When the server was made, in seconds since 1970: the model's `created`.
    created: u64,
    seeds: Seeds,
    in_flight: Arc<AtomicUsize>,
    pace: Pace,
}

impl fmt::Debug for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerState")
            .field("models", &self.model.names)
            .field("keys", &self.keys)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerConfig")
            .field("models", &self.model.names)
            .field("keys", &self.keys)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Seeds of requests that give none.
#[derive(Debug)]
struct Seeds {
    base: Option<u64>,
    drawn: AtomicU64,
}

impl Seeds {
    /// The next one. The one place where chance enters, unless the operator gave a seed.
    fn draw(&self) -> u64 {
        let Some(base) = self.base else {
            let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
            return high ^ low.rotate_left(32);
        };
        // Consecutive requests of one server differ, and two servers with one seed agree. Choices
        // of a request take the seeds after its own, so requests keep a distance.
        let number = self.drawn.fetch_add(1, Ordering::Relaxed);
        base.wrapping_add(number.wrapping_mul(MAX_CHOICES as u64))
    }
}

/// The name of a request, as in its answer's `x-request-id`.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

/// Every route with its methods. The router is made of this list, and tests go through it.
pub const ROUTES: &[(&str, &[Method])] = &[
    ("/v1/models", &[Method::GET]),
    ("/v1/models/{*id}", &[Method::GET]),
    ("/v1/completions", &[Method::POST]),
    ("/v1/chat/completions", &[Method::POST]),
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
        "/v1/completions" => post(openai::completions::handle),
        "/v1/chat/completions" => post(openai::chat::handle),
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

/// The router with all its layers.
pub fn router(config: ServerConfig) -> Router {
    let cors = cors(&config.allowed_origins);
    let state = Arc::new(ServerState {
        engine: config.engine,
        model: config.model,
        keys: config.keys,
        limits: config.limits,
        version: config.version,
        metrics: config.metrics,
        created: clock::unix_seconds(),
        seeds: Seeds {
            base: config.seed,
            drawn: AtomicU64::new(0),
        },
        in_flight: Arc::default(),
        pace: Pace::default(),
    });
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
    let given = request.headers().get(REQUEST_ID).filter(|id| {
        let id = id.as_bytes();
        (1..=REQUEST_ID_BYTES).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
    });
    let id = match given.and_then(|id| id.to_str().ok()) {
        Some(id) => id.to_owned(),
        None => new_request_id(),
    };
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = if names_one_host(&request) {
        next.run(request).await
    } else {
        let sentence = "A request of HTTP/1.1 must have exactly one Host header.";
        ApiError::bad_request(sentence).into_response()
    };
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
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
            .allow_methods([Method::GET, Method::POST])
            // By name: to browsers `*` is everything but `authorization`.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([
                header::RETRY_AFTER,
                REQUEST_ID.parse().expect("a header's name"),
            ]),
    )
}

impl ServerState {
    /// What answers call the model.
    fn model_name(&self) -> &str {
        self.model.names.first().map_or("", String::as_str)
    }

    /// Checks the model a request names; none is the one there is.
    fn check_model(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            None => Ok(()),
            Some(name) if self.model.names.iter().any(|known| known == name) => Ok(()),
            Some(name) => Err(ApiError::unknown_model(
                name,
                &self.model.names.join("`, `"),
            )),
        }
    }
}
