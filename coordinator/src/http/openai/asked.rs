//! What the endpoints that complete a text have in common: a body is checked once, and its answer is streamed, given
//! whole, or made later.
//!
//! What a body says and how an answer looks is each endpoint's own.

use super::params::Params;
use super::{Api, Call, StreamUsage, unsupported};
use crate::http::auth::Tenant;
use crate::http::error::ApiError;
use crate::http::generate::{GenerateRequest, Generation};
use crate::http::served::Served;
use crate::http::sse::{self, Dialect};
use crate::http::{REQUEST_ID, RequestId, ServerState, background, body};
use axum::body::Bytes;
use axum::extract::{Extension, Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// What writes the answers of one API.
pub(super) trait Writer: Dialect + Sized {
    const API: Api;

    /// Checks what the API alone has in a body.
    fn read(
        head: &Head<'_>,
        bytes: &[u8],
    ) -> impl Future<Output = Result<(GenerateRequest, Self), ApiError>> + Send;

    /// The answer when all is there.
    fn whole(
        self,
        generation: Generation,
    ) -> impl Future<Output = Result<Response, ApiError>> + Send;
}

/// What all APIs have in a body, checked.
#[derive(Debug)]
pub(super) struct Head<'a> {
    pub(super) call: Call,
    pub(super) served: &'a Arc<Served>,
    pub(super) params: Params,
    /// If it is to be streamed.
    pub(super) streaming: Option<StreamUsage>,
}

impl<'a> Head<'a> {
    fn read(state: &'a ServerState, api: Api, bytes: &[u8], call: Call) -> Result<Self, ApiError> {
        let mut params: Params = body::parse(bytes)?;
        let served = state.models.choose(params.model.as_deref())?;
        unsupported::refuse(api, bytes)?;
        params.fix_seed(call.seed);
        let streaming = params.streaming()?;
        Ok(Self {
            call,
            served,
            params,
            streaming,
        })
    }
}

/// Answers a request.
pub(super) async fn handle<W: Writer>(
    State(state): State<Arc<ServerState>>,
    Extension(id): Extension<RequestId>,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, ApiError> {
    let bytes = body::read(&state, request).await?;
    let mut head = Head::read(&state, W::API, &bytes, Call::now(id.text, tenant))?;
    let named = head.params.request_id()?.map(str::to_owned);
    // As in `vllm`, a name in the request's head goes before one in its body.
    let named = named.filter(|_| !id.is_given);
    head.call.id = named.clone().unwrap_or(head.call.id);
    let answered = respond::<W>(&state, head, tenant, bytes).await;
    let mut response = answered.into_response();
    if let Some(Ok(name)) = named.map(HeaderValue::try_from) {
        response.headers_mut().insert(REQUEST_ID, name);
    }
    Ok(response)
}

async fn respond<W: Writer>(
    state: &ServerState,
    head: Head<'_>,
    tenant: Tenant,
    bytes: Bytes,
) -> Result<Response, ApiError> {
    let (request, writer) = W::read(&head, &bytes).await?;
    if head.params.is_background() {
        let seed = request.sampling.seed;
        return background::accept(state, head.served, (W::API, tenant), (seed, bytes)).await;
    }
    drop(bytes);
    let generation = Generation::start(head.served, request).await?;
    match head.streaming {
        None => writer.whole(generation).await,
        Some(_) => Ok(sse::respond(
            generation,
            writer,
            head.served.limits.keep_alive_interval,
        )),
    }
}

/// The whole answer to a body, as [`super::answer`].
pub(super) async fn answer<W: Writer>(
    state: &ServerState,
    bytes: &[u8],
    call: Call,
) -> Result<Response, ApiError> {
    let head = Head::read(state, W::API, bytes, call)?;
    let (request, writer) = W::read(&head, bytes).await?;
    let generation = Generation::start(head.served, request).await?;
    writer.whole(generation).await
}
