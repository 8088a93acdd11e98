//! Values of flags that are more than a number, and the sentences that refuse wrong ones.
//!
//! Pure: text in, value or sentence out.

use clap::ValueEnum;
use std::str::FromStr;

/// What is measured of a request, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Metric {
    /// Time to first token.
    Ttft,
    /// Time per output token after the first.
    Tpot,
    /// Inter-token latency: time between chunks.
    Itl,
    /// End-to-end latency: time to the last token.
    E2el,
}

impl Metric {
    /// Its title in the table.
    pub fn title(self) -> &'static str {
        match self {
            Self::Ttft => "Time to First Token",
            Self::Tpot => "Time per Output Token (excl. 1st token)",
            Self::Itl => "Inter-token Latency",
            Self::E2el => "End-to-end Latency",
        }
    }

    /// Its name in flags and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }
}

/// A goodput limit: a request is good if its value is at most this.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// What is limited: not [`Metric::Itl`], of which a request has many.
    pub metric: Metric,
    /// Milliseconds.
    pub ms: f64,
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let says = "a limit is ttft:MS, tpot:MS or e2el:MS with milliseconds above 0";
        let (name, ms) = text.split_once(':').ok_or(says)?;
        let metric = match name {
            "ttft" => Metric::Ttft,
            "tpot" => Metric::Tpot,
            "e2el" => Metric::E2el,
            _ => return Err(says.into()),
        };
        match ms.parse::<f64>() {
            Ok(ms) if ms > 0.0 && ms.is_finite() => Ok(Self { metric, ms }),
            _ => Err(says.into()),
        }
    }
}

/// Requests per second; may be infinite.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 => Ok(rate),
        _ => Err("a number of requests per second above 0, or inf".into()),
    }
}

/// A finite number above 0.
pub(super) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("a number above 0".into()),
    }
}

/// A share in `[0, 1)`.
pub(super) fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..1.0).contains(&ratio) => Ok(ratio),
        _ => Err("a share of at least 0 and below 1".into()),
    }
}

/// A percentile in `[0, 100]`.
pub(super) fn percentile(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(value),
        _ => Err("a percentile between 0 and 100".into()),
    }
}

/// A path of the server.
pub(super) fn path(text: &str) -> Result<String, String> {
    if text.starts_with('/') {
        Ok(text.to_owned())
    } else {
        Err("a path of the server begins with /, as in /v1/completions".into())
    }
}
