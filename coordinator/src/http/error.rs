//! The one error every route answers with, in the form OpenAI's clients parse.
//!
//! A message is a sentence that says what to change. It never quotes another user's data, a path, or
//! an internal error: those are logged, and the client gets a fixed sentence.

use crate::engine::handle::SubmitError;
use crate::scheduler::request::Refusal;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

/// What went wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status; the SDKs choose their exception by it.
    pub status: StatusCode,
    /// A sentence for the user.
    pub message: String,
    /// `invalid_request_error` and the like.
    pub kind: &'static str,
    /// The parameter at fault, as in `messages[2].content`.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds after which trying again makes sense; SDKs give up above 60.
    pub retry_after: Option<u64>,
}

/// Longest message in bytes: a body may be quoted in it, but not at length.
const MESSAGE_BYTES: usize = 1024;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MESSAGE_BYTES {
            let mut end = MESSAGE_BYTES;
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            message.truncate(end);
            message.push('…');
        }
        Self {
            status,
            message,
            kind,
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// 400: the request must change.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 about one parameter.
    pub fn parameter(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::bad_request(message)
        }
    }

    /// 400: prompt and answer do not fit the model.
    pub fn too_long(message: impl Into<String>) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::bad_request(message)
        }
    }

    /// 401.
    pub fn unauthorized(message: &str) -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
        }
    }

    /// 404 for a model that is not served.
    pub fn unknown_model(name: &str, served: &str) -> Self {
        Self {
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("The model `{name:.200}` does not exist. This server serves `{served}`."),
            )
        }
    }

    /// 404, 405, 408, 413: what is wrong is not a parameter.
    pub fn status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// 429: too much of something; nothing says when there will be less.
    pub fn too_many(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code: Some(code),
            retry_after: Some(60),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    /// 500, also told in the middle of a stream.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 503.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code: Some(code),
            retry_after: Some(5),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
        }
    }

    /// What the engine's refusal is over HTTP. `retry_after` is for full queues.
    pub fn from_submit(error: &SubmitError, retry_after: u64) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Refused(Refusal::TooLong { .. }) => Self::too_long(message),
            SubmitError::Refused(refusal) if !refusal.is_temporary() => Self::bad_request(message),
            SubmitError::Refused(_) => Self {
                code: Some("queue_full"),
                retry_after: Some(retry_after.clamp(1, 60)),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            },
            SubmitError::Draining => Self::unavailable("draining", message),
            SubmitError::NotReady(_) => Self::unavailable("not_ready", message),
        }
    }

    /// The body, also the data of an error in the middle of a stream.
    pub fn body(&self) -> impl Serialize + use<> {
        json!({"error": self.fields()})
    }

    /// What stands under `error` in the body.
    pub(super) fn fields(&self) -> Value {
        json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_the_engine_have_their_status() {
        let full = Refusal::TooManyRequests {
            waiting: 8,
            limit: 8,
        };
        let long = Refusal::TooLong {
            prompt: 9,
            max_tokens: 9,
            limit: 10,
        };
        let large = Refusal::TooLarge {
            what: "sequences",
            asked: 9,
            limit: 8,
        };
        for (error, status, retry) in [
            (SubmitError::Refused(large), 400, None),
            (SubmitError::Refused(full.clone()), 429, Some(60)),
            (SubmitError::Refused(long), 400, None),
            (SubmitError::Draining, 503, Some(5)),
            (SubmitError::NotReady("x".into()), 503, Some(5)),
        ] {
            let error = ApiError::from_submit(&error, 1000);
            assert_eq!(
                (error.status.as_u16(), error.retry_after),
                (status, retry),
                "{error}"
            );
        }
        assert_eq!(
            ApiError::from_submit(&SubmitError::Refused(full), 0).retry_after,
            Some(1)
        );
    }

    #[test]
    fn messages_are_bounded() {
        let error = ApiError::bad_request("ä".repeat(5000));
        assert!(error.message.len() <= MESSAGE_BYTES + 4);
    }
}
