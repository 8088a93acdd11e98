//! Which layers of a model have a sliding window, by each family's rule. The rest of `config.json` is not read here.
//!
//! Invariant: there is one entry for each layer.

use crate::model_config::{Family, Fields, ShapeError, invalid, shorten, unsupported};
use serde_json::Value;

/// For each layer: how many last positions a token sees.
pub(crate) fn sliding_window(
    config: Fields<'_>,
    family: Family,
    num_layers: u32,
) -> Result<Vec<Option<u32>>, ShapeError> {
    const FIELD: &str = "sliding_window";
    /// What `transformers` takes where the key is absent; `null` is no window.
    const DEFAULT_WINDOW: u32 = 4096;
    /// The same for Qwen's `max_window_layers`.
    const DEFAULT_FULL_LAYERS: u32 = 28;
    let window = || match config.map().get(FIELD) {
        None => Ok(Some(DEFAULT_WINDOW)),
        Some(Value::Null) => Ok(None),
        Some(_) => config.dimension(FIELD, u32::MAX).map(Some),
    };
    let layers = num_layers as usize;
    match family {
        Family::Gemma2 | Family::Gemma3 => {
            let kinds = match layer_types(config, layers)? {
                Some(kinds) => kinds,
                None => pattern(config, family, num_layers)?,
            };
            let window = if config.map().contains_key(FIELD) {
                // `null` reads as missing: what a window of no length would be nobody says.
                let any = kinds.contains(&true);
                any.then(|| config.dimension(FIELD, u32::MAX)).transpose()?
            } else {
                Some(DEFAULT_WINDOW)
            };
            Ok(kinds
                .into_iter()
                .map(|sliding| window.filter(|_| sliding))
                .collect())
        }
        Family::Llama => Ok(vec![None; layers]),
        Family::Mistral => {
            let window = window()?;
            let kinds = layer_types(config, layers)?;
            // The published implementations disagree about such files, so none of them is right.
            if window.is_some() && kinds.is_some_and(|kinds| kinds.contains(&false)) {
                return Err(unsupported(
                    "a Mistral model with `layer_types` beside `sliding_window`".to_owned(),
                    "Mistral models with the same window in all layers are",
                ));
            }
            Ok(vec![window; layers])
        }
        Family::Qwen2 | Family::Qwen3 => {
            let on = config.flag("use_sliding_window")?;
            let window = if on { window()? } else { None };
            let full = config
                .count("max_window_layers")?
                .unwrap_or(DEFAULT_FULL_LAYERS);
            let kinds = layer_types(config, layers)?.unwrap_or_else(|| {
                (0..num_layers)
                    .map(|layer| window.is_some() && layer >= full)
                    .collect()
            });
            if window.is_none() && kinds.contains(&true) {
                let expected = "true, and `sliding_window` given, where `layer_types` has \
                                sliding_attention";
                return Err(invalid(
                    "use_sliding_window",
                    &on.into(),
                    expected.to_owned(),
                ));
            }
            Ok(kinds
                .into_iter()
                .map(|sliding| window.filter(|_| sliding))
                .collect())
        }
    }
}

/// Gemma's layers without `layer_types`: every n-th one has no window, n being 2 in Gemma 2.
fn pattern(config: Fields<'_>, family: Family, num_layers: u32) -> Result<Vec<bool>, ShapeError> {
    const FIELD: &str = "sliding_window_pattern";
    /// What `transformers` takes where a Gemma 3 configuration does not say.
    const DEFAULT_PATTERN: u32 = 6;
    let every = if family == Family::Gemma2 {
        2
    } else if config.get(FIELD).is_some() {
        config.dimension(FIELD, u32::MAX)?
    } else {
        DEFAULT_PATTERN
    };
    let layers = 1..=num_layers;
    Ok(layers.map(|layer| !layer.is_multiple_of(every)).collect())
}

/// `layer_types` as "is it a sliding one", or `None` if absent.
fn layer_types(config: Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>, ShapeError> {
    const FIELD: &str = "layer_types";
    let Some(value) = config.get(FIELD) else {
        return Ok(None);
    };
    let kinds = value.as_array().filter(|kinds| kinds.len() == layers);
    let kinds = kinds.ok_or_else(|| {
        invalid(
            FIELD,
            value,
            format!("a list of {layers} entries, one for each layer"),
        )
    })?;
    let sliding = kinds.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(unsupported(
            format!("the layer type {}", shorten(kind.to_string())),
            "full_attention and sliding_attention are",
        )),
    });
    sliding.collect::<Result<_, _>>().map(Some)
}
