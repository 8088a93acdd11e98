//! Reads `quantization_config`: GPTQ, AWQ and fp8; compressed-tensors is next door.
//!
//! Keys that only say how a checkpoint was made (`dataset`, `damp_percent`, …) are passed over. Invariant: what would
//! change a number and is not understood is refused, with the key and its value.

use super::modules::{has_components, names};
use super::{Code, Grouping, Layout, Method, Order, Quantization, Scheme, compressed};
use crate::model_config::{Fields, ShapeError, invalid, shorten, unsupported};
use crate::model_shape::ModelShape;
use crate::tensors::tensors;
use serde_json::Value;
use std::collections::BTreeMap;

/// The head's name. It is dense in all formats but compressed-tensors', where it may be named.
pub(super) const HEAD: &str = "lm_head";

/// Largest group or block; no model is wider.
const MAX_GROUP: u32 = 1 << 20;

/// What `config` says of a model of this `shape`; `None` where it is not quantised.
pub(crate) fn read(
    config: Fields<'_>,
    shape: &ModelShape,
) -> Result<Option<Quantization>, ShapeError> {
    const FIELD: &str = "quantization_config";
    // Older releases of compressed-tensors had a key of their own.
    let older = config.get("compression_config");
    let Some(value) = config.get(FIELD).or(older) else {
        return Ok(None);
    };
    let map = value.as_object();
    let map = map.ok_or_else(|| invalid(FIELD, value, "an object".to_owned()))?;
    let fields = Fields(map);
    let method = fields.get("quant_method").and_then(Value::as_str);
    let quantization = match method.unwrap_or("") {
        "gptq" => gptq(fields, shape)?,
        "awq" => awq(fields, shape)?,
        "fp8" => fp8(fields, shape)?,
        "compressed-tensors" => compressed::read(fields, shape)?,
        other => {
            let what = format!("`quant_method` `{}` in {FIELD}", shorten(other.to_owned()));
            return Err(unsupported(
                what,
                "gptq, awq, compressed-tensors and fp8 are; so is the unquantized checkpoint",
            ));
        }
    };
    same_code_in_each_product(&quantization, shape)?;
    Ok(Some(quantization))
}

/// The names of a model's linear layers, the head among them where it has a tensor of its own.
pub(super) fn linear_modules(shape: &ModelShape) -> Vec<String> {
    let matrices = tensors(shape).into_iter().filter(|spec| !spec.is_vector);
    let names = matrices.filter_map(|spec| spec.name.strip_suffix(".weight").map(str::to_owned));
    names.filter(|name| name != "model.embed_tokens").collect()
}

fn all_but(
    shape: &ModelShape,
    scheme: Scheme,
    skipped: impl Fn(&str) -> bool,
) -> BTreeMap<String, Scheme> {
    let modules = linear_modules(shape).into_iter();
    let modules = modules.filter(|name| name != HEAD && !skipped(name));
    modules.map(|name| (name, scheme)).collect()
}

fn gptq(fields: Fields<'_>, shape: &ModelShape) -> Result<Quantization, ShapeError> {
    // Newer writers call it `format`; `checkpoint_format` wins where both are there.
    let format = fields.get("checkpoint_format").or(fields.get("format"));
    let zeros_less_one = match format.map_or(Some("gptq"), Value::as_str) {
        Some("gptq") => true,
        Some("gptq_v2") => false,
        _ => return Err(refuse("checkpoint_format", format, "gptq and gptq_v2 are")),
    };
    let code = match fields.count("bits")? {
        Some(4) => Code::Int4,
        Some(8) => Code::Int8,
        _ => return Err(refuse("bits", fields.get("bits"), "4 and 8 bits are")),
    };
    let is_symmetric = fields.flag_or("sym", true)?;
    if code == Code::Int8 && !is_symmetric {
        return Err(refuse(
            "sym",
            fields.get("sym"),
            "8 bits are with `sym` true",
        ));
    }
    refuse_unless(fields, "pack_dtype", &["int32"])?;
    for (key, instead) in [
        ("lm_head", "a head that is not quantized is"),
        ("is_marlin_format", "the layout before that conversion is"),
        (
            "modules_in_block_to_quantize",
            "all linear layers quantized alike are",
        ),
        ("dynamic", "all linear layers quantized alike are"),
    ] {
        let is_set = |value: &&Value| !matches!(value, Value::Bool(false)) && !is_empty(value);
        if let Some(value) = fields.get(key).filter(is_set) {
            return Err(refuse(key, Some(value), instead));
        }
    }
    let order = if fields.flag("desc_act")? {
        Order::Listed
    } else {
        Order::MayBeListed
    };
    let scheme = Scheme {
        code,
        layout: Layout::Gptq { zeros_less_one },
        grouping: group_size(fields.get("group_size"))?,
        has_zeros: true,
        order,
    };
    Ok(Quantization {
        method: Method::Gptq,
        modules: all_but(shape, scheme, |_| false),
        notes: Vec::new(),
    })
}

fn awq(fields: Fields<'_>, shape: &ModelShape) -> Result<Quantization, ShapeError> {
    let bits = fields.get("bits").or(fields.get("w_bit"));
    if bits.and_then(Value::as_u64) != Some(4) {
        return Err(refuse("bits", bits, "4 bits are"));
    }
    if let Some(version) = fields.get("version")
        && !version
            .as_str()
            .is_some_and(|version| version.eq_ignore_ascii_case("gemm"))
    {
        return Err(refuse("version", Some(version), "gemm is"));
    }
    if !fields.flag_or("zero_point", true)? {
        return Err(refuse(
            "zero_point",
            fields.get("zero_point"),
            "`zero_point` true is",
        ));
    }
    // As the format's own readers do: any part of a module's name.
    let skipped = names(
        fields.get("modules_to_not_convert"),
        "modules_to_not_convert",
    )?;
    let scheme = Scheme {
        code: Code::Int4,
        layout: Layout::Awq,
        grouping: group_size(fields.get("group_size").or(fields.get("q_group_size")))?,
        has_zeros: true,
        order: Order::ByPlace,
    };
    let is_skipped = |module: &str| skipped.iter().any(|part| module.contains(part));
    Ok(Quantization {
        method: Method::Awq,
        modules: all_but(shape, scheme, is_skipped),
        notes: Vec::new(),
    })
}

fn fp8(fields: Fields<'_>, shape: &ModelShape) -> Result<Quantization, ShapeError> {
    refuse_unless(fields, "fmt", &["e4m3"])?;
    refuse_unless(fields, "activation_scheme", &["dynamic", "static"])?;
    let is_static = fields.get("activation_scheme").and_then(Value::as_str) == Some("static");
    let (grouping, scale) = match fields.get("weight_block_size") {
        Some(value) => (block(value, "weight_block_size")?, "weight_scale_inv"),
        None => (Grouping::Tensor, "weight_scale"),
    };
    let mut skipped = names(
        fields.get("modules_to_not_convert"),
        "modules_to_not_convert",
    )?;
    skipped.extend(names(fields.get("ignored_layers"), "ignored_layers")?);
    let scheme = Scheme {
        code: Code::Fp8,
        layout: Layout::Bytes { scale },
        grouping,
        has_zeros: false,
        order: Order::ByPlace,
    };
    let is_skipped = |module: &str| skipped.iter().any(|name| has_components(module, name));
    let notes = is_static.then(|| static_activations("activation_scheme"));
    Ok(Quantization {
        method: Method::Fp8,
        modules: all_but(shape, scheme, is_skipped),
        notes: notes.into_iter().collect(),
    })
}

pub(super) fn static_activations(key: &str) -> String {
    format!(
        "`{key}` in quantization_config gives static scales of activations; they are not needed and not used"
    )
}

/// Inputs for each scale; -1 is all of them.
pub(super) fn group_size(value: Option<&Value>) -> Result<Grouping, ShapeError> {
    const FIELD: &str = "group_size";
    let value = value.ok_or(ShapeError::Missing(FIELD))?;
    if value.as_i64() == Some(-1) {
        return Ok(Grouping::Output);
    }
    Ok(Grouping::Inputs(size(value, FIELD)?))
}

/// `[outputs, inputs]`
pub(super) fn block(value: &Value, field: &'static str) -> Result<Grouping, ShapeError> {
    let expected = || invalid(field, value, "a list of two whole numbers".to_owned());
    match value.as_array().map(Vec::as_slice) {
        Some([outputs, inputs]) => Ok(Grouping::Block {
            outputs: size(outputs, field)?,
            inputs: size(inputs, field)?,
        }),
        _ => Err(expected()),
    }
}

fn size(value: &Value, field: &'static str) -> Result<u32, ShapeError> {
    let size = value.as_u64().and_then(|size| u32::try_from(size).ok());
    let size = size.filter(|size| (1..=MAX_GROUP).contains(size));
    size.ok_or_else(|| {
        invalid(
            field,
            value,
            format!("a whole number from 1 to {MAX_GROUP}"),
        )
    })
}

/// Refuses a key that is there and none of `known`.
pub(super) fn refuse_unless(
    fields: Fields<'_>,
    key: &str,
    known: &[&str],
) -> Result<(), ShapeError> {
    match fields.get(key) {
        Some(value) if !value.as_str().is_some_and(|text| known.contains(&text)) => Err(refuse(
            key,
            Some(value),
            &format!("{} is", known.join(" or ")),
        )),
        _ => Ok(()),
    }
}

pub(super) fn refuse(key: &str, value: Option<&Value>, instead: &str) -> ShapeError {
    let value = value.map_or_else(|| "absent".to_owned(), |value| shorten(value.to_string()));
    unsupported(format!("`{key}` {value} in quantization_config"), instead)
}

/// `null`, `{}`, `[]`.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// q, k and v are one product, and gate and up are one: half of it cannot be in another form.
fn same_code_in_each_product(
    quantization: &Quantization,
    shape: &ModelShape,
) -> Result<(), ShapeError> {
    let code = |module: &str| quantization.modules.get(module).map(|scheme| scheme.code);
    for layer in 0..shape.num_layers {
        for (block, names) in [
            ("self_attn", &["q_proj", "k_proj", "v_proj"][..]),
            ("mlp", &["gate_proj", "up_proj"]),
        ] {
            let module = |name: &str| format!("model.layers.{layer}.{block}.{name}");
            let first = module(names[0]);
            for other in names.iter().map(|name| module(name)) {
                if code(&other) != code(&first) {
                    return Err(unsupported(
                        format!("quantization_config that stores {first} and {other} differently"),
                        "the same bits for q, k and v, and for gate and up, are",
                    ));
                }
            }
        }
    }
    Ok(())
}
