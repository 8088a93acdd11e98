//! A request's body: bounded in size and time, and read as JSON with errors that say where.

use super::ServerState;
use super::error::ApiError;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::error::Category;
use std::fmt;
use std::marker::PhantomData;

/// Bytes beyond the limit that are read and dropped. A client that is still sending when the
/// connection closes sees a reset, not the answer that says why.
const DISCARDED_BYTES: usize = 16 << 20;

/// Reads the whole body.
///
/// # Errors
/// 413 if it is larger than the limit, 408 if it takes too long, 400 if it breaks off.
pub async fn read(state: &ServerState, request: Request) -> Result<Bytes, ApiError> {
    let limit = state.limits.body_bytes;
    let declared = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let declared = declared.unwrap_or(0);
    if declared > (limit + DISCARDED_BYTES) as u64 {
        return Err(too_large(limit));
    }
    match tokio::time::timeout(
        state.limits.body_timeout,
        collect(request.into_body(), limit),
    )
    .await
    {
        Ok(collected) => collected,
        Err(_) => Err(ApiError::status(
            StatusCode::REQUEST_TIMEOUT,
            "The request's body did not arrive in time.",
        )),
    }
}

async fn collect(mut body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let mut bytes = Vec::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad_request("The request's body broke off."))?;
        let Ok(data) = frame.into_data() else {
            continue; // trailers
        };
        seen += data.len();
        if seen <= limit {
            bytes.extend_from_slice(&data);
        } else if seen <= limit + DISCARDED_BYTES {
            bytes = Vec::new();
        } else {
            break;
        }
    }
    if seen > limit {
        return Err(too_large(limit));
    }
    Ok(bytes.into())
}

fn too_large(limit: usize) -> ApiError {
    ApiError::status(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("The request's body is larger than {limit} bytes."),
    )
}

/// A value that is written as an object. Derived readers also take a list with the values of their
/// fields, in the order of our source, and call what they expect by our names.
#[derive(Debug)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// Reads a JSON object. Unknown fields are ignored.
///
/// # Errors
/// 400 with the path of the value that does not fit, or the place where it is not JSON.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer);
    let Object(value) = value.map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.classify() == Category::Data {
            let param = if path == "." { "body".to_owned() } else { path };
            // All of our 32-bit numbers are token ids.
            let inner = inner.to_string();
            let inner = inner.replace("expected u32", "expected a token id");
            let inner = inner.replace("expected f64", "expected a number");
            ApiError::parameter(&param, format!("{param:.200}: {inner}"))
        } else {
            ApiError::bad_request(format!("The request's body is not valid JSON: {inner}"))
        }
    })?;
    deserializer
        .end()
        .map_err(|error| ApiError::bad_request(format!("The body is not valid JSON: {error}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(default)]
    struct Example {
        list: Vec<u8>,
    }

    #[test]
    fn errors_say_where() {
        let error = parse::<Example>(br#"{"list": [1, 2, "x"], "unknown": {}}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("list[2]"));
        let error = parse::<Example>(b"{\"list\": [1,\n 2").unwrap_err();
        assert!(error.message.contains("line 2"), "{error}");
        assert!(parse::<Example>(b"{} x").is_err());
        assert!(parse::<Example>(b"").is_err());
        let error = parse::<Example>(b"[[1]]").unwrap_err();
        assert!(error.message.contains("expected an object"), "{error}");
        assert!(parse::<Example>(b"{\"other\": 1}").unwrap().list.is_empty());
        // serde_json's own bound on nesting keeps the stack safe.
        assert!(parse::<Example>("[".repeat(1_000_000).as_bytes()).is_err());
        let nested = format!("{{\"unknown\": {}", "[".repeat(1_000_000));
        assert!(parse::<Example>(nested.as_bytes()).is_err());
    }
}
