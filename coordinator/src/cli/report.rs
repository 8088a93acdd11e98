//! What `cluster up` prints when it serves: address, a request to paste, ranks, memory, time.
//!
//! Text only; knows nothing of how the numbers came to be.

use crate::fleet::{Phase, RankReport};
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;
use topology::fit::Bytes;

/// The report.
#[derive(Debug)]
pub(super) struct Report<'a> {
    /// Where the API is, as this machine reaches it.
    pub address: SocketAddr,
    /// The name to ask for.
    pub model_name: &'a str,
    /// Whether chat requests have a template.
    pub chat: bool,
    /// Whether clients need a key.
    pub key_needed: bool,
    /// One per rank, in order.
    pub ranks: &'a [RankReport],
    /// KV blocks, the same on every rank.
    pub num_blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Longest sequence in tokens.
    pub max_model_len: u32,
    /// Phases of the start.
    pub phases: &'a [(Phase, Duration)],
    /// From the command to readiness.
    pub startup: Duration,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} is served at http://{}/v1",
            self.model_name, self.address
        )?;
        writeln!(f)?;
        writeln!(f, "  {}", self.curl_line())?;
        writeln!(f)?;
        for rank in self.ranks {
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
        let tokens = u64::from(self.num_blocks) * u64::from(self.block_size);
        writeln!(
            f,
            "  {} KV blocks of {} tokens: {} tokens, {:.1} sequences of the longest {}",
            thousands(self.num_blocks.into()),
            self.block_size,
            thousands(tokens),
            tokens as f64 / f64::from(self.max_model_len),
            thousands(self.max_model_len.into()),
        )?;
        let phases: Vec<String> = self
            .phases
            .iter()
            .map(|(phase, took)| format!("{} {} ms", phase.name(), took.as_millis()))
            .collect();
        let seconds = self.startup.as_secs_f64();
        writeln!(f, "  ready after {seconds:.2} s ({})", phases.join(", "))?;
        writeln!(f)?;
        write!(f, "Ctrl-C finishes running requests and ends it.")
    }
}

impl Report<'_> {
    /// A request that works when pasted into a shell.
    fn curl_line(&self) -> String {
        let key = if self.key_needed {
            " -H \"Authorization: Bearer $CLUSTER_API_KEY\""
        } else {
            ""
        };
        // The name stands inside JSON inside single quotes.
        let name = serde_json::Value::from(self.model_name).to_string();
        let name = name.replace('\'', r"'\''");
        let (path, body) = if self.chat {
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
    use topology::ids::Rank;

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
        let mut report = Report {
            address: "127.0.0.1:8000".parse().unwrap(),
            model_name: "it's",
            chat: true,
            key_needed: false,
            ranks: &[rank(0), rank(1)],
            num_blocks: 16384,
            block_size: 16,
            max_model_len: 1024,
            phases: &[(Phase::Launch, Duration::from_millis(41))],
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
    }
}
