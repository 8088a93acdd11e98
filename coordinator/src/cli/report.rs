//! What `cluster up` prints when it serves: address, a request to paste, ranks, memory, time.
//!
//! Text only; knows nothing of how the numbers came to be.

use crate::fleet::Ready;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;
use topology::fit::Bytes;

/// The report.
#[derive(Debug)]
pub(super) struct Report {
    /// Where the API is, as this machine reaches it.
    pub address: SocketAddr,
    /// Whether clients need a key.
    pub key_needed: bool,
    /// At least one.
    pub models: Vec<ModelReport>,
    /// From the command to readiness.
    pub startup: Duration,
}

/// What there is to say of one model.
#[derive(Debug)]
pub(super) struct ModelReport {
    /// The name to ask for.
    pub name: String,
    /// Whether chat requests have a template.
    pub chat: bool,
    /// Its ranks, KV blocks and phases.
    pub ready: Ready,
    /// Tokens per block.
    pub block_size: u32,
    /// Longest sequence in tokens.
    pub max_model_len: u32,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.models.iter().map(|model| &*model.name).collect();
        let (names, are) = match names.as_slice() {
            [only] => ((*only).to_owned(), "is"),
            _ => (names.join(", "), "are"),
        };
        writeln!(f, "{names} {are} served at http://{}/v1", self.address)?;
        writeln!(f)?;
        if let Some(first) = self.models.first() {
            writeln!(f, "  {}", self.curl_line(first))?;
            writeln!(f)?;
        }
        for model in &self.models {
            if self.models.len() > 1 {
                writeln!(f, "  {}", model.name)?;
            }
            write!(f, "{model}")?;
        }
        let seconds = self.startup.as_secs_f64();
        let of = match self.models.as_slice() {
            [only] => only.phases(),
            // They start at the same time, and the phases of each say little about the whole.
            several => format!("{} models", several.len()),
        };
        writeln!(f, "  ready after {seconds:.2} s ({of})")?;
        writeln!(f)?;
        write!(f, "Ctrl-C finishes running requests and ends it.")
    }
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for rank in &self.ready.ranks {
            writeln!(
                f,
                "  rank {}  {}  weights {}, KV blocks {}, workspace {}, {} free  (process {})",
                rank.rank,
                rank.device,
                Bytes(rank.weight_bytes),
                Bytes(rank.kv_bytes),
                Bytes(rank.workspace_bytes),
                Bytes(rank.free_bytes),
                rank.pid,
            )?;
        }
        let num_blocks = self.ready.num_blocks;
        let tokens = u64::from(num_blocks) * u64::from(self.block_size);
        writeln!(
            f,
            "  {} KV blocks of {} tokens: {} tokens, {:.1} sequences of the longest {}",
            thousands(num_blocks.into()),
            self.block_size,
            thousands(tokens),
            tokens as f64 / f64::from(self.max_model_len),
            thousands(self.max_model_len.into()),
        )
    }
}

impl ModelReport {
    fn phases(&self) -> String {
        let phases = self.ready.phases.iter();
        let phases =
            phases.map(|(phase, took)| format!("{} {} ms", phase.name(), took.as_millis()));
        phases.collect::<Vec<_>>().join(", ")
    }
}

impl Report {
    /// A request that works when pasted into a shell.
    fn curl_line(&self, model: &ModelReport) -> String {
        let key = if self.key_needed {
            " -H \"Authorization: Bearer $CLUSTER_API_KEY\""
        } else {
            ""
        };
        // The name stands inside JSON inside single quotes.
        let name = serde_json::Value::from(&*model.name).to_string();
        let name = name.replace('\'', r"'\''");
        let (path, body) = if model.chat {
            let messages = r#"[{"role": "user", "content": "What is 7 plus 5?"}]"#;
            (
                "chat/completions",
                format!(r#"{{"model": {name}, "messages": {messages}, "temperature": 0}}"#),
            )
        } else {
            let prompt = r#""Once upon a time""#;
            let body = format!(r#"{{"model": {name}, "prompt": {prompt}, "max_tokens": 32}}"#);
            ("completions", body)
        };
        format!(
            "curl http://{}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'",
            self.address
        )
    }
}

/// `1,234,567`.
fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        // Writing to a string does not fail.
        let _ = write!(text, "{digit}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Phase, RankReport};
    use topology::ids::{Epoch, Rank};

    #[test]
    fn it_says_what_a_newcomer_needs() {
        let rank = |rank| RankReport {
            rank: Rank(rank),
            pid: 100 + rank,
            device: "cpu, 1 thread".into(),
            weight_bytes: 7 << 19,
            workspace_bytes: 1 << 20,
            kv_bytes: 1 << 28,
            free_bytes: 1 << 33,
        };
        let model = |name: &str| ModelReport {
            name: name.into(),
            chat: true,
            ready: Ready {
                num_blocks: 16384,
                ranks: vec![rank(0), rank(1)],
                phases: vec![(Phase::Launch, Duration::from_millis(41))],
                epoch: Epoch(0),
            },
            block_size: 16,
            max_model_len: 1024,
        };
        let mut report = Report {
            address: "127.0.0.1:8000".parse().unwrap(),
            key_needed: false,
            models: vec![model("it's")],
            startup: Duration::from_millis(430),
        };
        let text = report.to_string();
        for part in [
            "http://127.0.0.1:8000/v1",
            r#"'{"model": "it'\''s", "messages"#,
            "rank 1  cpu, 1 thread  weights 3.5 MiB",
            "16,384 KV blocks of 16 tokens: 262,144 tokens, 256.0 sequences",
            "ready after 0.43 s (launch 41 ms)",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        let curl: Vec<&str> = text
            .lines()
            .filter(|line| line.trim().starts_with("curl "))
            .collect();
        assert_eq!(curl.len(), 1);
        assert!(!curl[0].contains("Bearer"));
        report.key_needed = true;
        assert!(report.to_string().contains("Bearer $CLUSTER_API_KEY"));
        report.models.push(model("b"));
        let text = report.to_string();
        for part in [
            "it's, b are served at",
            "\n  b\n  rank 0  cpu",
            "ready after 0.43 s (2 models)",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}
