//! API keys: one layer over the whole router, decided by the matched route, not by the URL's text.
//!
//! Both sides are hashed before they are compared, and compared in constant time, so neither
//! a key's length nor its beginning shows in the time an answer takes. Keys are kept as hashes.
//!
//! Probes have no key, so their routes are open; who has none is told by them whether the server is ready, not why.

use super::ServerState;
use super::error::ApiError;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};

/// The only routes that answer without a key: probes of Kubernetes and load balancers have none.
const OPEN_ROUTES: [&str; 3] = ["/health", "/ready", "/ping"];

/// Keys that are accepted. Without any, every request is.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

impl ApiKeys {
    /// Accepts any of `keys`; empty ones are skipped.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Self {
        let keys = keys.into_iter();
        Self(
            keys.filter(|key| !key.as_ref().is_empty())
                .map(|key| Sha256::digest(key.as_ref()).into())
                .collect(),
        )
    }

    /// Whether requests need a key.
    pub fn required(&self) -> bool {
        !self.0.is_empty()
    }

    /// The hash of the accepted key that `given` is.
    fn accept(&self, given: &[u8]) -> Option<[u8; 32]> {
        let given: [u8; 32] = Sha256::digest(given).into();
        let mut accepted = Choice::from(0);
        for key in &self.0 {
            accepted |= key.ct_eq(&given);
        }
        bool::from(accepted).then_some(given)
    }
}

/// Who asks, as far as it matters: requests under different keys share no cached blocks, and do not see each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant(pub Option<[u8; 32]>);

impl Tenant {
    /// The number under which this tenant's cached blocks are found, given the request's own salt.
    pub fn cache_salt(self, salt: Option<&str>) -> u64 {
        if self.0.is_none() && salt.is_none() {
            return 0;
        }
        let mut hash = Sha256::new();
        hash.update(self.0.unwrap_or_default());
        hash.update(salt.unwrap_or_default());
        let digest: [u8; 32] = hash.finalize().into();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        u64::from_le_bytes(first)
    }
}

/// Whether who asks has a key, or needs none. Others learn from the open routes no more than a status.
#[derive(Clone, Copy, Debug)]
pub struct Trusted(pub bool);

/// The layer.
pub async fn require_key(
    State(state): State<Arc<ServerState>>,
    mut request: Request,
    next: Next,
) -> Response {
    let matched = request.extensions().get::<MatchedPath>();
    let open = matched.is_some_and(|path| OPEN_ROUTES.contains(&path.as_str()));
    let (mut tenant, mut trusted) = (Tenant::default(), Trusted(true));
    if state.keys.required() {
        let token = bearer(request.headers());
        match token.and_then(|token| state.keys.accept(token)) {
            Some(key) => tenant = Tenant(Some(key)),
            None if open => trusted = Trusted(false),
            None => {
                let sentence = match token {
                    None => {
                        "You didn't provide an API key. Send it as `Authorization: Bearer KEY`."
                    }
                    Some(_) => "The API key is not valid for this server.",
                };
                return ApiError::unauthorized(sentence).into_response();
            }
        }
    }
    request.extensions_mut().insert(tenant);
    request.extensions_mut().insert(trusted);
    next.run(request).await
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_are_accepted() {
        let keys = ApiKeys::new(["alpha", "", "beta"]);
        assert!(keys.required());
        for (given, accepted) in [
            ("alpha", true),
            ("beta", true),
            ("", false),
            ("alph", false),
        ] {
            assert_eq!(keys.accept(given.as_bytes()).is_some(), accepted, "{given}");
        }
        assert!(!ApiKeys::new([""]).required());
        assert_eq!(format!("{keys:?}"), "ApiKeys(2)");
    }

    #[test]
    fn tenants_and_salts_do_not_mix() {
        let one = Tenant(Some([1; 32]));
        let two = Tenant(Some([2; 32]));
        let salts = [
            one.cache_salt(None),
            two.cache_salt(None),
            one.cache_salt(Some("x")),
            two.cache_salt(Some("x")),
            Tenant(None).cache_salt(Some("x")),
            Tenant(None).cache_salt(None),
        ];
        for (i, salt) in salts.iter().enumerate() {
            assert!(!salts[..i].contains(salt), "{salts:?}");
        }
        assert_eq!(one.cache_salt(Some("x")), one.cache_salt(Some("x")));
    }

    #[test]
    fn the_scheme_is_not_case_sensitive() {
        let mut headers = HeaderMap::new();
        assert_eq!(bearer(&headers), None);
        headers.insert(header::AUTHORIZATION, "bearer  k ".parse().unwrap());
        assert_eq!(bearer(&headers), Some(b"k".as_slice()));
        headers.insert(header::AUTHORIZATION, "Basic k".parse().unwrap());
        assert_eq!(bearer(&headers), None);
    }
}
