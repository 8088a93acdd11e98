//! The models of a server, and which of them a request means.
//!
//! Each has its own engine, tokenizer, limits of length and seeds; what a request asks of one says
//! nothing about another. Invariant: no two models have a name in common.

use super::error::ApiError;
use super::limits::{MAX_CHOICES, ServerLimits, check_defaults};
use super::pace::Pace;
use crate::engine::handle::EngineHandle;
use crate::text::TextModel;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A model that is served.
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
    /// Whether requests may have a priority other than 0 (`--scheduling-policy priority`).
    pub has_priorities: bool,
    /// What computes its requests.
    pub engine: EngineHandle,
}

impl ServedModel {
    /// What answers call it.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }
}

/// A model, and what requests of it share.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) model: ServedModel,
    pub(super) limits: ServerLimits,
    pub(super) seeds: Seeds,
    pub(super) pace: Pace,
    /// Of the whole server.
    pub(super) in_flight: Arc<AtomicUsize>,
}

/// All models, in the operator's order.
#[derive(Debug)]
pub(super) struct Models(Vec<Arc<Served>>);

impl Models {
    /// One for each of `models`. Seeds of requests that give none follow from `seed`; each model counts
    /// its own, so that it says what it would say alone.
    pub(super) fn new(models: Vec<ServedModel>, seed: Option<u64>, limits: &ServerLimits) -> Self {
        let in_flight = Arc::default();
        let served = models.into_iter().map(|mut model| {
            for wrong in check_defaults(&mut model.text.defaults) {
                tracing::warn!("model {}: {wrong}", model.name());
            }
            Arc::new(Served {
                model,
                limits: limits.clone(),
                seeds: Seeds::from(seed),
                pace: Pace::default(),
                in_flight: Arc::clone(&in_flight),
            })
        });
        Self(served.collect())
    }

    /// The model that a request names; where there is one, it need not.
    ///
    /// # Errors
    /// 404 for a name that none has, 400 where there are several and none is named.
    pub(super) fn choose(&self, name: Option<&str>) -> Result<&Arc<Served>, ApiError> {
        let Some(name) = name else {
            return match self.0.as_slice() {
                [only] => Ok(only),
                _ => Err(ApiError::parameter(
                    "model",
                    format!(
                        "This server serves several models; name one in `model`: `{}`.",
                        self.names()
                    ),
                )),
            };
        };
        let mut served = self.0.iter();
        let has = |served: &&Arc<Served>| served.model.names.iter().any(|known| known == name);
        let found = served.find(has);
        found.ok_or_else(|| ApiError::unknown_model(name, &self.names()))
    }

    fn names(&self) -> String {
        let names = self.0.iter().flat_map(|served| &served.model.names);
        names.cloned().collect::<Vec<_>>().join("`, `")
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &ServedModel> {
        self.0.iter().map(|served| &served.model)
    }

    /// Requests that are being answered.
    pub(super) fn in_flight(&self) -> usize {
        // It is the same number in all.
        let first = self.0.first();
        first.map_or(0, |served| served.in_flight.load(Ordering::Relaxed))
    }
}

/// Seeds of requests that give none.
#[derive(Debug)]
pub(super) struct Seeds {
    base: Option<u64>,
    drawn: AtomicU64,
}

impl From<Option<u64>> for Seeds {
    fn from(base: Option<u64>) -> Self {
        let drawn = AtomicU64::new(0);
        Self { base, drawn }
    }
}

impl Seeds {
    /// The next one. The one place where chance enters, unless the operator gave a seed.
    pub(super) fn draw(&self) -> u64 {
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
