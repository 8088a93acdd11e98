//! Reads a streamed answer: server-sent events in, moments and token counts out.
//!
//! Pure: bytes and the time of their arrival are handed in. A chunk counts as output when it
//! carries text, not when it only opens a role; a stream that ends without `[DONE]` is broken.

use serde_json::Value;
use std::time::Duration;

/// Longest line of a stream in bytes; more is no answer of an `OpenAI` server.
const MAX_LINE_BYTES: usize = 1 << 20;

/// What one request came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// From sending to the first chunk with content.
    pub first: Duration,
    /// Between chunks with content.
    pub between: Vec<Duration>,
    /// From sending to the last chunk with content.
    pub last: Duration,
    /// Prompt tokens as the server counts them.
    pub prompt_tokens: Option<u64>,
    /// Generated tokens as the server counts them, or else chunks with content.
    pub output_tokens: u64,
}

/// A stream that is being read.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
    answer: Answer,
    num_chunks: u64,
    usage: Option<u64>,
    /// When the stream said that it was finished, should it have had no content.
    finished: Option<Duration>,
    done: bool,
}

impl Reader {
    /// Takes in bytes that arrived `at` this long after sending.
    ///
    /// # Errors
    /// A sentence, if this is no stream or the server reports an error in it.
    pub fn feed(&mut self, bytes: &[u8], at: Duration) -> Result<(), String> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.read_line(&line, at)?;
        }
        self.line.extend_from_slice(rest);
        if self.line.len() > MAX_LINE_BYTES {
            return Err(format!(
                "a line of the stream is over {MAX_LINE_BYTES} bytes"
            ));
        }
        Ok(())
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// A sentence, if it ended before its end.
    pub fn finish(mut self) -> Result<Answer, String> {
        if !self.done {
            return Err("the stream ended without [DONE]".into());
        }
        if self.num_chunks == 0 {
            let at = self.finished.ok_or("the stream held no output")?;
            (self.answer.first, self.answer.last) = (at, at);
        }
        self.answer.output_tokens = self.usage.unwrap_or(self.num_chunks);
        Ok(self.answer)
    }

    fn read_line(&mut self, line: &[u8], at: Duration) -> Result<(), String> {
        let line = std::str::from_utf8(line).map_err(|_| "the stream is not UTF-8")?;
        // Comments keep a connection alive; other fields are not used by this API.
        let Some(data) = line.trim_end().strip_prefix("data:") else {
            return Ok(());
        };
        let data = data.trim_start();
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Value =
            serde_json::from_str(data).map_err(|error| format!("a chunk is not JSON: {error}"))?;
        if !chunk["error"].is_null() {
            return Err(format!("the stream broke off: {}", chunk["error"]));
        }
        if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
            self.usage = Some(tokens);
            self.answer.prompt_tokens = chunk["usage"]["prompt_tokens"].as_u64();
        }
        let choice = &chunk["choices"][0];
        if has_content(choice) {
            if self.num_chunks == 0 {
                self.answer.first = at;
            } else {
                self.answer
                    .between
                    .push(at.saturating_sub(self.answer.last));
            }
            self.answer.last = at;
            self.num_chunks += 1;
        }
        if !choice["finish_reason"].is_null() {
            self.finished = Some(at);
        }
        Ok(())
    }
}

fn has_content(choice: &Value) -> bool {
    let delta = &choice["delta"];
    let texts = [
        &choice["text"],
        &delta["content"],
        &delta["reasoning_content"],
        &delta["reasoning"],
    ];
    let text = texts
        .iter()
        .any(|text| text.as_str().is_some_and(|text| !text.is_empty()));
    let calls = delta["tool_calls"].as_array();
    text || calls.is_some_and(|calls| !calls.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = ": hello\n\n\
        data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"a\u{e9}\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}],\"usage\":null}\n\n\
        data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n\
        data: [DONE]\n\n";

    #[test]
    fn a_stream_reads_the_same_however_it_is_cut() {
        for cut in 1..CHAT.len() {
            let mut reader = Reader::default();
            for piece in CHAT.as_bytes().chunks(cut) {
                reader.feed(piece, Duration::ZERO).unwrap();
            }
            let answer = reader.finish().unwrap();
            assert_eq!((answer.output_tokens, answer.prompt_tokens), (3, Some(7)));
            assert_eq!(answer.between.len(), 1);
        }
    }

    #[test]
    fn time_counts_from_the_first_content_not_from_the_role() {
        let mut reader = Reader::default();
        for (at, line) in (1..).zip(CHAT.split_inclusive("\n\n")) {
            reader
                .feed(line.as_bytes(), Duration::from_secs(at))
                .unwrap();
        }
        let answer = reader.finish().unwrap();
        assert_eq!(answer.first, Duration::from_secs(3));
        assert_eq!(answer.last, Duration::from_secs(4));
        assert_eq!(answer.between, [Duration::from_secs(1)]);
    }

    #[test]
    fn broken_streams_are_errors() {
        let read = |text: &str| {
            let mut reader = Reader::default();
            reader.feed(text.as_bytes(), Duration::ZERO)?;
            reader.finish()
        };
        let content = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
        assert!(read(content).unwrap_err().contains("without [DONE]"));
        assert!(read("data: [DONE]\n\n").unwrap_err().contains("no output"));
        assert!(read("data: {\n\n").unwrap_err().contains("not JSON"));
        let error = format!("{content}data: {{\"error\":{{\"message\":\"gone\"}}}}\n\n");
        assert!(read(&error).unwrap_err().contains("gone"));
        let empty =
            "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
        assert_eq!(read(empty).unwrap().output_tokens, 0);
    }
}
