//! Which modules a configuration means: names, parts of names, and regular expressions.
//!
//! Knows no layout. Invariant: a pattern takes time linear in the name, whoever wrote it.

use crate::model_config::{ShapeError, invalid, shorten, unsupported};
use regex::{Regex, RegexBuilder};
use serde_json::Value;

/// Most entries of a list of modules; published ones name every norm of every layer.
const MAX_ENTRIES: usize = 1 << 14;

/// A compiled expression may take this many bytes.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// A list of names under `field`; absent is empty.
pub(super) fn names(value: Option<&Value>, field: &'static str) -> Result<Vec<String>, ShapeError> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(Vec::new());
    };
    let entries = value.as_array().filter(|list| list.len() <= MAX_ENTRIES);
    let names = entries.and_then(|list| {
        let names = list.iter().map(|name| name.as_str().map(str::to_owned));
        names.collect()
    });
    let expected = || format!("a list of at most {MAX_ENTRIES} names of modules");
    names.ok_or_else(|| invalid(field, value, expected()))
}

/// Whether `name` stands in `module` as whole components: `mlp.up_proj` does in `model.layers.0.mlp.up_proj`, `mlp.up`
/// does not.
pub(super) fn has_components(module: &str, name: &str) -> bool {
    !name.is_empty() && format!(".{module}.").contains(&format!(".{name}."))
}

/// An entry of compressed-tensors' `targets` and `ignore`.
#[derive(Debug)]
pub(super) enum Pattern {
    /// Every linear layer.
    Linear,
    /// The module of this name.
    Name(String),
    /// Modules whose name begins so.
    Regex(Regex),
}

impl Pattern {
    /// Reads a list of them.
    pub(super) fn list(
        value: Option<&Value>,
        field: &'static str,
    ) -> Result<Vec<Self>, ShapeError> {
        let read = |name: String| match name.strip_prefix("re:") {
            // As Python's `re.match`: from the beginning, not to the end.
            Some(text) => RegexBuilder::new(&format!("^(?:{text})"))
                .size_limit(MAX_REGEX_BYTES)
                .build()
                .map(Self::Regex)
                .map_err(|_| {
                    let what =
                        format!("the expression `{}` under `{field}`", shorten(name.clone()));
                    unsupported(
                        what,
                        "expressions without look-around and back references are",
                    )
                }),
            None if name == "Linear" => Ok(Self::Linear),
            None => Ok(Self::Name(name)),
        };
        names(value, field)?.into_iter().map(read).collect()
    }

    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Self::Linear => true,
            Self::Name(name) => name == module,
            Self::Regex(regex) => regex.is_match(module),
        }
    }
}
