//! Values of flags that are more than a number or a name.
//!
//! Pure functions from text; clap calls them and shows their error beside the flag's name.

use super::args::Up;
use serde::{Serialize, Serializer};
use std::fmt;

/// A number of tokens: `4096`, `32k` (32,000) or `32K` (32,768), as in `vllm serve`.
pub fn tokens(text: &str) -> Result<u32, String> {
    let number = scaled(text)?;
    u32::try_from(number).map_err(|_| format!("{number} is more than {}", u32::MAX))
}

/// A number of bytes: `1000000`, `500m`, `4G`, `4GiB`; lower case counts in thousands, upper case
/// in 1,024s.
pub fn bytes(text: &str) -> Result<u64, String> {
    let number = text
        .strip_suffix("iB")
        .or_else(|| text.strip_suffix('B'))
        .unwrap_or(text);
    scaled(number)
}

/// A part of a whole: more than 0, at most 1.
pub fn part(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok();
    number
        .filter(|number| *number > 0.0 && *number <= 1.0)
        .ok_or_else(|| format!("`{text}` is not a number above 0 and up to 1 such as 0.9"))
}

fn scaled(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.char_indices().next_back() {
        Some((at, 'k')) => (&text[..at], 1_000),
        Some((at, 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm')) => (&text[..at], 1_000_000),
        Some((at, 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g')) => (&text[..at], 1_000_000_000),
        Some((at, 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let whole = |digits: &str| digits.parse::<u64>().ok()?.checked_mul(factor);
    let fraction = |digits: &str| {
        // `25.6k`: fine as long as it comes out whole, and small enough to be exact.
        let value = digits.parse::<f64>().ok()? * factor as f64;
        let fits = factor > 1 && value.fract() == 0.0 && (0.0..1e15).contains(&value);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole, not negative, below 1e15"
        )]
        fits.then_some(value as u64)
    };
    whole(digits)
        .or_else(|| fraction(digits))
        .ok_or_else(|| format!("`{text}` is not a number such as 4096, 32k or 4G"))
}

impl Up {
    /// The models as given, by flag or by place; none: the built-in one.
    pub fn models(&self) -> Vec<&str> {
        match &self.model_positional {
            Some(model) => vec![model],
            None => self.model.iter().map(String::as_str).collect(),
        }
    }
}

/// What a cluster may be called: it is the name of a directory, and no port.
pub fn cluster_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_plain = (1..=40).contains(&text.len()) && text.chars().all(plain);
    if !is_plain || text.starts_with('.') {
        return Err("use up to 40 letters, digits, `-`, `_` and `.`, the last not first".into());
    }
    if text.chars().all(|c| c.is_ascii_digit()) {
        return Err("a number is what a cluster without a name is called; add a letter".into());
    }
    Ok(text.to_owned())
}

/// `auto`, or a number of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoTokens {
    /// As long as the model allows.
    Auto,
    /// This long.
    Tokens(u32),
}

impl AutoTokens {
    /// Reads `auto`, `-1` (as in `vllm serve`), or a positive number of tokens.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" | "-1" => Ok(Self::Auto),
            _ => positive_tokens(text).map(Self::Tokens),
        }
    }
}

impl fmt::Display for AutoTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Tokens(tokens) => tokens.fmt(f),
        }
    }
}

impl Serialize for AutoTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Tokens(tokens) => serializer.serialize_u32(*tokens),
        }
    }
}

/// A number of tokens, at least 1.
pub fn positive_tokens(text: &str) -> Result<u32, String> {
    match tokens(text)? {
        0 => Err("it must be at least 1".into()),
        tokens => Ok(tokens),
    }
}

/// `NAME=DIR` or `DIR`. A directory whose name holds `=` can be given as `NAME=DIR`.
pub fn model(text: &str) -> (Option<&str>, &str) {
    match text.split_once('=') {
        Some((name, dir)) if !name.contains('/') => (Some(name), dir),
        _ => (None, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_count_in_thousands_or_in_1024s() {
        for (text, value) in [
            ("0", 0),
            ("4096", 4096),
            ("32k", 32_000),
            ("32K", 32_768),
            ("25.6k", 25_600),
            ("1m", 1_000_000),
            ("1M", 1 << 20),
        ] {
            assert_eq!(tokens(text), Ok(value), "{text}");
        }
        assert_eq!(bytes("4GiB"), Ok(4 << 30));
        assert_eq!(bytes("2g"), Ok(2_000_000_000));
        assert_eq!(bytes("17B"), Ok(17));
        for text in ["", "k", "-1", "1.5", "4x", "99999999999g", "1e3", "NaNk"] {
            assert!(tokens(text).is_err(), "{text}");
        }
        assert_eq!(AutoTokens::parse("-1"), Ok(AutoTokens::Auto));
        assert!(AutoTokens::parse("0").is_err());
    }

    #[test]
    fn names_of_clusters_are_names_of_directories() {
        for good in ["a", "prod-1", "A.b_c", "8000a"] {
            assert_eq!(cluster_name(good).as_deref(), Ok(good));
        }
        for bad in ["", ".", "..", ".a", "a/b", "a b", "8000", &"x".repeat(41)] {
            assert!(cluster_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_model_may_be_named() {
        assert_eq!(model("/m/llama"), (None, "/m/llama"));
        assert_eq!(model("demo=/m/llama"), (Some("demo"), "/m/llama"));
        assert_eq!(model("/m/a=b"), (None, "/m/a=b"));
    }
}
