//! Reads the `quantization_config` of compressed-tensors: groups of modules, each with a format of its own.
//!
//! Weights only: what is said of activations, keys and values is noted, not followed. Invariant: as elsewhere, what
//! would change a weight and is not understood is refused.

use super::config::{
    block, group_size, is_empty, linear_modules, refuse, refuse_unless, static_activations,
};
use super::modules::Pattern;
use super::{Code, Grouping, Layout, Method, Order, Quantization, Scheme};
use crate::model_config::{Fields, ShapeError, invalid};
use crate::model_shape::ModelShape;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const FORMATS: &str = "pack-quantized, int-quantized and float-quantized are";

/// Most groups; published files have one or two.
const MAX_GROUPS: usize = 64;

pub(super) fn read(fields: Fields<'_>, shape: &ModelShape) -> Result<Quantization, ShapeError> {
    const GROUPS: &str = "config_groups";
    if let Some(transforms) = fields
        .get("transform_config")
        .filter(|value| !is_empty(value))
    {
        let instead = "weights without transformed inputs are";
        return Err(refuse("transform_config", Some(transforms), instead));
    }
    if let Some(sparsity) = fields.get("sparsity_config").and_then(Value::as_object) {
        refuse_unless(Fields(sparsity), "format", &["dense"])?;
    }
    let groups = fields.get(GROUPS).ok_or(ShapeError::Missing(GROUPS))?;
    let groups = groups
        .as_object()
        .filter(|groups| groups.len() <= MAX_GROUPS);
    let groups = groups.ok_or_else(|| {
        let found = fields.get(GROUPS).unwrap_or(&Value::Null);
        invalid(
            GROUPS,
            found,
            format!("an object of at most {MAX_GROUPS} groups"),
        )
    })?;
    let ignored = Pattern::list(fields.get("ignore"), "ignore")?;
    let mut notes = Vec::new();
    if fields
        .get("kv_cache_scheme")
        .is_some_and(|value| !is_empty(value))
    {
        notes.push(
            "`kv_cache_scheme` in quantization_config is not used: keys and values are kept as --kv-cache-dtype says"
                .to_owned(),
        );
    }
    let mut read = Vec::new();
    for group in groups.values() {
        let group = group
            .as_object()
            .ok_or_else(|| invalid(GROUPS, group, "objects".to_owned()))?;
        let group = Fields(group);
        let targets = Pattern::list(group.get("targets"), "targets")?;
        read.push((targets, scheme(group, fields.get("format"))?));
        let activations = group.get("input_activations");
        if activations.is_some_and(|value| !is_empty(value) && value["dynamic"] == json!(false)) {
            notes.push(static_activations("input_activations"));
        }
    }
    let mut modules = BTreeMap::new();
    for module in linear_modules(shape) {
        let is_in = |list: &[Pattern]| list.iter().any(|pattern| pattern.matches(&module));
        if is_in(&ignored) {
            continue;
        }
        // A module that several groups name belongs to the first that names it.
        if let Some((_, scheme)) = read.iter().find(|(targets, _)| is_in(targets)) {
            modules.insert(module, *scheme);
        }
    }
    notes.dedup();
    Ok(Quantization {
        method: Method::CompressedTensors,
        modules,
        notes,
    })
}

/// How the weights of one group are stored.
fn scheme(group: Fields<'_>, format: Option<&Value>) -> Result<Scheme, ShapeError> {
    let weights = group.get("weights").ok_or(ShapeError::Missing("weights"))?;
    let weights = weights.as_object().map(Fields);
    let weights = weights.ok_or_else(|| refuse("weights", group.get("weights"), "an object is"))?;
    let format = group.get("format").or(format);
    let (kind, bits) = (
        weights.get("type").and_then(Value::as_str),
        weights.count("num_bits")?,
    );
    let bytes = Layout::Bytes {
        scale: "weight_scale",
    };
    let (layout, code) = match (format.and_then(Value::as_str), kind.unwrap_or("int"), bits) {
        (Some("pack-quantized"), "int", Some(4)) => (Layout::Packed, Code::Int4),
        (Some("pack-quantized"), "int", Some(8)) => (Layout::Packed, Code::Int8),
        (Some("int-quantized" | "naive-quantized"), "int", Some(8)) => (bytes, Code::Int8),
        (Some("float-quantized" | "naive-quantized"), "float", Some(8)) => (bytes, Code::Fp8),
        (Some("pack-quantized" | "int-quantized" | "naive-quantized"), "int", _) => {
            let instead = "8 bits are, and 4 with pack-quantized";
            return Err(refuse("num_bits", weights.get("num_bits"), instead));
        }
        (Some("float-quantized" | "naive-quantized"), "float", _) => {
            return Err(refuse("num_bits", weights.get("num_bits"), "8 bits are"));
        }
        (Some("pack-quantized" | "int-quantized" | "float-quantized"), ..) => {
            let instead = "`int` is, and `float` with float-quantized";
            return Err(refuse("type", weights.get("type"), instead));
        }
        _ => return Err(refuse("format", format, FORMATS)),
    };
    let is_symmetric = weights.flag_or("symmetric", true)?;
    if !is_symmetric && code != Code::Int4 {
        let instead = "8 bits are with `symmetric` true";
        return Err(refuse("symmetric", weights.get("symmetric"), instead));
    }
    if weights.flag("dynamic")? {
        return Err(refuse(
            "dynamic",
            weights.get("dynamic"),
            "weights with stored scales are",
        ));
    }
    Ok(Scheme {
        code,
        layout,
        grouping: grouping(weights)?,
        has_zeros: !is_symmetric,
        order: order(weights, layout)?,
    })
}

fn grouping(weights: Fields<'_>) -> Result<Grouping, ShapeError> {
    let has_group = weights.get("group_size").is_some();
    let default = if has_group { "group" } else { "tensor" };
    match weights.get("strategy").map_or(Some(default), Value::as_str) {
        Some("tensor") => Ok(Grouping::Tensor),
        Some("channel") => Ok(Grouping::Output),
        Some("group") => group_size(weights.get("group_size")),
        Some("block") => match weights.get("block_structure") {
            // Older files have it as `128x128`.
            Some(Value::String(text)) => {
                let sizes = text.split('x').map(|size| size.parse::<u32>().unwrap_or(0));
                block(&json!(sizes.collect::<Vec<_>>()), "block_structure")
            }
            Some(value) => block(value, "block_structure"),
            None => Err(ShapeError::Missing("block_structure")),
        },
        _ => {
            let instead = "tensor, channel, group and block are";
            Err(refuse("strategy", weights.get("strategy"), instead))
        }
    }
}

fn order(weights: Fields<'_>, layout: Layout) -> Result<Order, ShapeError> {
    let value = weights.get("actorder");
    let is_listed = match value {
        None | Some(Value::Bool(false)) => false,
        Some(Value::Bool(true)) => true,
        Some(value) => match value.as_str() {
            Some("group" | "dynamic") => true,
            // Columns were quantised in another order, and are stored in their own.
            Some("weight" | "static") => false,
            _ => {
                return Err(refuse(
                    "actorder",
                    Some(value),
                    "group, weight and null are",
                ));
            }
        },
    };
    match (is_listed, layout) {
        (false, _) => Ok(Order::ByPlace),
        (true, Layout::Packed) => Ok(Order::Listed),
        (true, _) => Err(refuse("actorder", value, "it is with pack-quantized")),
    }
}
