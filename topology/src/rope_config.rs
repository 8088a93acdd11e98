//! Reads the rotary embedding's part of `config.json`, in both dialects.
//!
//! Older files have `rope_theta` and `rope_scaling` (whose kind is under `type` or `rope_type`),
//! newer ones `rope_parameters` with everything inside. The precedence between them is that of
//! `transformers`. Frequencies are not computed here.

use crate::model_config::{Fields, ShapeError, invalid, shorten, unsupported};
use crate::model_shape::{Rope, RopeScaling};
use serde_json::{Map, Value};

/// The base of most families where nothing is said.
const DEFAULT_THETA: f64 = 10_000.0;
/// The base of Gemma 3's global layers where nothing is said.
const DEFAULT_GLOBAL_THETA: f64 = 1_000_000.0;

/// `max_positions` is the default of `original_max_position_embeddings`.
pub(crate) fn rope(config: Fields<'_>, max_positions: u32) -> Result<Rope, ShapeError> {
    let empty = Map::new();
    let inner = Fields(parameters(config)?.unwrap_or(&empty));
    if inner.map().values().any(Value::is_object) {
        return Err(unsupported(
            "rotary parameters that differ by layer type".to_owned(),
            "one set for all layers is",
        ));
    }
    read(config, inner, ("rope_theta", DEFAULT_THETA), max_positions)
}

/// The rotary embeddings of global layers and of those with a window (Gemma 3). Older files have `rope_theta` with
/// `rope_scaling` for the one and `rope_local_base_freq` for the other, newer ones an entry of
/// `rope_parameters` for each.
pub(crate) fn by_layer_type(
    config: Fields<'_>,
    max_positions: u32,
) -> Result<(Rope, Rope), ShapeError> {
    const FIELD: &str = "rope_parameters";
    let object = |field, value: Option<&Value>, expected: &str| match value {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map.clone()),
        Some(other) => Err(invalid(field, other, expected.to_owned())),
    };
    let expected = "an object with `full_attention` and `sliding_attention`";
    let both = object(FIELD, config.get(FIELD), expected)?;
    if let Some(key) = both
        .keys()
        .find(|key| !matches!(key.as_str(), "full_attention" | "sliding_attention"))
    {
        let found = Value::String(shorten(key.clone()));
        return Err(invalid(FIELD, &found, expected.to_owned()));
    }
    let entry = |kind| object(FIELD, Fields(&both).get(kind), expected);
    let (mut global, local) = (entry("full_attention")?, entry("sliding_attention")?);
    let scaling = config.get("rope_scaling");
    global.extend(object("rope_scaling", scaling, "an object or null")?);
    let base = ("rope_theta", DEFAULT_GLOBAL_THETA);
    let local_base = ("rope_local_base_freq", DEFAULT_THETA);
    Ok((
        read(config, Fields(&global), base, max_positions)?,
        read(config, Fields(&local), local_base, max_positions)?,
    ))
}

/// One rotary embedding: `inner` says how it is scaled, and its base unless `config` does under `base`'s name.
fn read(
    config: Fields<'_>,
    inner: Fields<'_>,
    (base, default): (&'static str, f64),
    max_positions: u32,
) -> Result<Rope, ShapeError> {
    refuse_partial(config, inner)?;
    // Inside beats outside.
    let theta = match positive(inner, "rope_theta")? {
        Some(theta) => theta,
        None => positive(config, base)?.unwrap_or(default),
    };
    if theta <= 1.0 {
        return Err(invalid(base, &theta.into(), "greater than 1".to_owned()));
    }
    let scaling = scaling(config, inner, max_positions)?;
    Ok(Rope { theta, scaling })
}

/// `rope_scaling` if it says anything, else `rope_parameters`.
fn parameters(config: Fields<'_>) -> Result<Option<&Map<String, Value>>, ShapeError> {
    for field in ["rope_scaling", "rope_parameters"] {
        match config.get(field) {
            None => {}
            Some(Value::Object(map)) if map.is_empty() => {}
            Some(Value::Object(map)) => return Ok(Some(map)),
            Some(other) => return Err(invalid(field, other, "an object or null".to_owned())),
        }
    }
    Ok(None)
}

fn refuse_partial(config: Fields<'_>, inner: Fields<'_>) -> Result<(), ShapeError> {
    for fields in [config, inner] {
        let partial = fields.number("partial_rotary_factor")?;
        if partial.is_some_and(|factor| (factor - 1.0).abs() > 0.0) {
            return Err(unsupported(
                "a partial_rotary_factor other than 1".to_owned(),
                "only rotary embeddings over whole heads are",
            ));
        }
    }
    Ok(())
}

fn scaling(
    config: Fields<'_>,
    inner: Fields<'_>,
    max_positions: u32,
) -> Result<RopeScaling, ShapeError> {
    let kind = inner.get("rope_type").or_else(|| inner.get("type"));
    let kind = match kind {
        None => "default",
        Some(Value::String(kind)) => kind,
        Some(other) => return Err(invalid("rope_type", other, "a string".to_owned())),
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: required(inner, "factor")?,
        }),
        "llama3" => llama3(inner, original_positions(config, inner, max_positions)?),
        "yarn" => yarn(
            inner,
            original_positions(config, inner, max_positions)?,
            max_positions,
        ),
        other => Err(unsupported(
            format!(
                "the rope type `{}`",
                shorten(other.escape_debug().to_string())
            ),
            "default, linear, llama3 and yarn are",
        )),
    }
}

fn original_positions(
    config: Fields<'_>,
    inner: Fields<'_>,
    max_positions: u32,
) -> Result<f64, ShapeError> {
    const FIELD: &str = "original_max_position_embeddings";
    // Here outside beats inside, unlike for the base.
    match positive(config, FIELD)? {
        Some(positions) => Ok(positions),
        None => Ok(positive(inner, FIELD)?.unwrap_or(f64::from(max_positions))),
    }
}

fn llama3(inner: Fields<'_>, original_max_position: f64) -> Result<RopeScaling, ShapeError> {
    let low_freq_factor = required(inner, "low_freq_factor")?;
    let high_freq_factor = required(inner, "high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let expected = format!("greater than low_freq_factor, which is {low_freq_factor}");
        return Err(invalid(
            "high_freq_factor",
            &high_freq_factor.into(),
            expected,
        ));
    }
    Ok(RopeScaling::Llama3 {
        factor: required(inner, "factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position,
    })
}

fn yarn(
    inner: Fields<'_>,
    original_max_position: f64,
    max_positions: u32,
) -> Result<RopeScaling, ShapeError> {
    let factor = match positive(inner, "factor")? {
        Some(factor) => factor,
        None => f64::from(max_positions) / original_max_position,
    };
    // The default also replaces a zero, as in `transformers`.
    let or_default = |field, default| -> Result<f64, ShapeError> {
        let given = inner.number(field)?.filter(|number| *number != 0.0);
        let number = given.unwrap_or(default);
        if number > 0.0 {
            Ok(number)
        } else {
            Err(invalid(field, &number.into(), "greater than 0".to_owned()))
        }
    };
    let beta_fast = or_default("beta_fast", 32.0)?;
    let beta_slow = or_default("beta_slow", 1.0)?;
    if beta_fast < beta_slow {
        let expected = format!("at least beta_slow, which is {beta_slow}");
        return Err(invalid("beta_fast", &beta_fast.into(), expected));
    }
    let truncate = match inner.get("truncate") {
        None => true,
        Some(value) => value
            .as_bool()
            .ok_or_else(|| invalid("truncate", value, "true or false".to_owned()))?,
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position,
        beta_fast,
        beta_slow,
        attention_factor: yarn_attention_factor(inner, factor)?,
        truncate,
    })
}

/// The factor on cos and sin: as given, else the ratio of the two scales, else by the stretch.
fn yarn_attention_factor(inner: Fields<'_>, factor: f64) -> Result<f64, ShapeError> {
    if let Some(given) = positive(inner, "attention_factor")? {
        return Ok(given);
    }
    let by_stretch = |scale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * scale * factor.ln() + 1.0
        }
    };
    let scale = |field| Ok(inner.number(field)?.filter(|scale| *scale != 0.0));
    let (mscale, mscale_all_dim) = (scale("mscale")?, scale("mscale_all_dim")?);
    let resolved = match mscale.zip(mscale_all_dim) {
        Some((mscale, all_dim)) => by_stretch(mscale) / by_stretch(all_dim),
        None => by_stretch(1.0),
    };
    if resolved.is_finite() && resolved > 0.0 {
        Ok(resolved)
    } else {
        let found = mscale_all_dim.unwrap_or_default().into();
        let expected = "such that the attention factor is positive".to_owned();
        Err(invalid("mscale_all_dim", &found, expected))
    }
}

fn required(fields: Fields<'_>, field: &'static str) -> Result<f64, ShapeError> {
    positive(fields, field)?.ok_or(ShapeError::Missing(field))
}

fn positive(fields: Fields<'_>, field: &'static str) -> Result<Option<f64>, ShapeError> {
    /// Beyond this no positions are told apart in 64-bit floats.
    const MAX: f64 = 1e15;
    let number = fields.number(field)?;
    match number {
        Some(found) if !(found > 0.0 && found <= MAX) => Err(invalid(
            field,
            &found.into(),
            format!("greater than 0 and at most {MAX}"),
        )),
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_one(config: &Value) -> Result<Rope, ShapeError> {
        rope(Fields(config.as_object().unwrap()), 4096)
    }

    #[test]
    fn both_dialects_mean_the_same() {
        let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"});
        let older = json!({"rope_theta": 500_000.0, "rope_scaling": scaling});
        let mut inner = scaling;
        inner["rope_theta"] = json!(500_000);
        let newer = json!({"rope_parameters": inner});
        let expected = Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: 8192.0,
            },
        };
        assert_eq!(read_one(&older).unwrap(), expected);
        assert_eq!(read_one(&newer).unwrap(), expected);
    }

    #[test]
    fn nothing_said_is_the_default() {
        let plain = Rope {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        };
        for config in [
            json!({}),
            json!({"rope_scaling": null, "rope_parameters": {}}),
            json!({"rope_parameters": {"rope_type": "default"}}),
            json!({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 7.0}}),
        ] {
            assert_eq!(read_one(&config).unwrap(), plain, "{config}");
        }
    }

    #[test]
    fn the_inner_base_wins_but_the_outer_original_length_does() {
        let config = json!({"rope_theta": 5.0, "original_max_position_embeddings": 100,
            "rope_parameters": {"rope_theta": 7.0, "rope_type": "yarn", "factor": 2.0,
                "original_max_position_embeddings": 200}});
        let rope = read_one(&config).unwrap();
        assert!(rope.theta > 6.0);
        let RopeScaling::Yarn {
            original_max_position,
            ..
        } = rope.scaling
        else {
            panic!()
        };
        assert!(original_max_position < 150.0);
    }

    #[test]
    fn yarn_resolves_its_attention_factor() {
        let factor = |extra: Value| {
            let mut inner = json!({"type": "yarn", "factor": 4.0});
            inner
                .as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            match read_one(&json!({"rope_scaling": inner})).unwrap().scaling {
                RopeScaling::Yarn {
                    attention_factor, ..
                } => attention_factor,
                other => panic!("{other:?}"),
            }
        };
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        let by_stretch = 0.1 * 4f64.ln() + 1.0;
        close(factor(json!({})), by_stretch);
        close(factor(json!({"mscale": 1.0})), by_stretch);
        close(
            factor(json!({"mscale": 0.0, "mscale_all_dim": 1.0})),
            by_stretch,
        );
        close(
            factor(json!({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 2.0})),
            1.25,
        );
        let ratio = (0.1 * 0.707 * 4f64.ln() + 1.0) / (0.1 * 2.0 * 4f64.ln() + 1.0);
        close(
            factor(json!({"mscale": 0.707, "mscale_all_dim": 2.0})),
            ratio,
        );
        close(factor(json!({"factor": 0.5})), 1.0);
        // Without a factor it is the ratio of the lengths: 4096 / 2048.
        let derived = json!({"factor": null, "original_max_position_embeddings": 2048});
        close(factor(derived), 0.1 * 2f64.ln() + 1.0);
    }

    #[test]
    fn what_cannot_be_computed_is_refused() {
        for (config, word) in [
            (
                json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
                "`dynamic`",
            ),
            (
                json!({"rope_scaling": {"rope_type": "longrope"}}),
                "llama3 and yarn",
            ),
            (json!({"rope_scaling": {"rope_type": 3}}), "string"),
            (json!({"rope_scaling": "linear"}), "object"),
            (
                json!({"rope_scaling": {"type": "linear"}}),
                "lacks `factor`",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": -1}}),
                "greater than 0",
            ),
            (
                json!({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4,
                "high_freq_factor": 4}}),
                "high_freq_factor",
            ),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 8, "beta_fast": 0.5}}),
                "beta_slow",
            ),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 8, "truncate": 1}}),
                "truncate",
            ),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 8, "mscale": -900, "mscale_all_dim": 1}}),
                "mscale",
            ),
            (
                json!({"partial_rotary_factor": 0.5}),
                "partial_rotary_factor",
            ),
            (
                json!({"rope_parameters": {"partial_rotary_factor": 0.25}}),
                "partial_rotary_factor",
            ),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
                "layer type",
            ),
            (json!({"rope_theta": 1.0}), "greater than 1"),
            (json!({"rope_theta": "big"}), "number"),
        ] {
            let refused = read_one(&config).unwrap_err().to_string();
            assert!(refused.contains(word), "{config}: {refused}");
        }
    }
}
