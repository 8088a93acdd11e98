//! The requests of a batch: one JSON object in each line of a file.
//!
//! Lines are looked at once, to see that all can be told apart, and read again when their turn comes, so that a
//! file of any size takes little memory. What a body says is the server's business. Invariant: no two
//! lines have the same `custom_id`.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where a request may go.
const URLS: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];

/// Longest line in bytes; the server takes less.
const MAX_LINE_BYTES: usize = 16 << 20;

/// A file of requests.
#[derive(Debug)]
pub(super) struct Input {
    path: PathBuf,
    file: File,
    /// In the file's order.
    pub(super) lines: Vec<Line>,
}

/// Where a request stands.
#[derive(Debug)]
pub(super) struct Line {
    /// What its answer is known by.
    pub(super) custom_id: String,
    number: usize,
    offset: u64,
    bytes: usize,
}

/// A line's content.
#[derive(Debug, Deserialize)]
pub(super) struct Request {
    custom_id: String,
    method: String,
    url: String,
    body: Value,
}

/// A request that can be sent.
#[derive(Debug)]
pub(super) struct Checked {
    /// Path on the server.
    pub(super) url: String,
    /// Its JSON.
    pub(super) body: Vec<u8>,
}

impl Input {
    /// Looks at every line.
    ///
    /// # Errors
    /// A sentence with the line's number.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let file = File::open(path).with_context(|| format!("cannot read {shown}"))?;
        let mut reader = BufReader::new(&file);
        let (mut lines, mut ids) = (Vec::new(), HashSet::new());
        let (mut offset, mut text) = (0, Vec::new());
        for number in 1.. {
            text.clear();
            let read = reader.read_until(b'\n', &mut text);
            let bytes = read.with_context(|| format!("cannot read {shown}"))?;
            if bytes == 0 {
                break;
            }
            ensure!(
                bytes <= MAX_LINE_BYTES,
                "line {number} of {shown} is longer than 16 MiB"
            );
            if !text.trim_ascii().is_empty() {
                let request = parse(&text);
                let request = request.with_context(|| format!("line {number} of {shown}"))?;
                let custom_id = request.custom_id;
                ensure!(
                    ids.insert(custom_id.clone()),
                    "line {number} of {shown} has the custom_id `{custom_id}` of an earlier line; give each its \
                     own"
                );
                lines.push(Line {
                    custom_id,
                    number,
                    offset,
                    bytes,
                });
            }
            offset += bytes as u64;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            lines,
        })
    }

    /// Reads a line again.
    ///
    /// # Errors
    /// If the file is not what it was.
    pub(super) fn read(&self, line: &Line) -> Result<Request> {
        let mut text = vec![0; line.bytes];
        let read = self.file.read_exact_at(&mut text, line.offset);
        let request = read.map_err(Into::into).and_then(|()| parse(&text));
        let request = request
            .ok()
            .filter(|request| request.custom_id == line.custom_id);
        let (number, path) = (line.number, self.path.display());
        request.with_context(|| format!("line {number} of {path} has changed meanwhile"))
    }
}

fn parse(text: &[u8]) -> Result<Request> {
    let form = "is no request such as {\"custom_id\": \"1\", \"method\": \"POST\", \"url\": \
                \"/v1/chat/completions\", \"body\": {…}}";
    serde_json::from_slice(text).map_err(|error| anyhow::anyhow!("{form}: {error}"))
}

impl Request {
    /// With `model` where the body names none; or why it cannot be sent.
    pub(super) fn checked(mut self, model: Option<&str>) -> Result<Checked, String> {
        if self.method != "POST" {
            return Err(format!(
                "the method is {}; only POST can be used",
                self.method
            ));
        }
        if !URLS.contains(&&*self.url) {
            let urls = URLS.join(" and ");
            return Err(format!("the url is {}; {urls} can be used", self.url));
        }
        let Some(body) = self.body.as_object_mut() else {
            return Err("the body is no JSON object".to_owned());
        };
        for field in ["stream", "background"] {
            let is_asked = |value: &Value| *value != false && !value.is_null();
            if body.get(field).is_some_and(is_asked) {
                return Err(format!(
                    "a batch waits for whole answers; leave out `{field}`"
                ));
            }
        }
        if let Some(model) = model {
            body.entry("model").or_insert_with(|| model.into());
        }
        Ok(Checked {
            url: self.url,
            body: self.body.to_string().into_bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn input(text: &str) -> (tempfile::NamedTempFile, Result<Input>) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let input = Input::open(file.path());
        (file, input)
    }

    fn line(id: &str, body: &str) -> String {
        format!(r#"{{"custom_id":"{id}","method":"POST","url":"/v1/completions","body":{body}}}"#)
    }

    #[test]
    fn lines_are_found_again_and_what_is_wrong_is_numbered() {
        let text = format!("{}\n\n{}", line("a", r#"{"prompt":"x"}"#), line("b", "{}"));
        let (mut file, opened) = input(&text);
        let opened = opened.unwrap();
        let ids: Vec<_> = opened.lines.iter().map(|line| &*line.custom_id).collect();
        assert_eq!(ids, ["a", "b"]);
        let request = opened
            .read(&opened.lines[0])
            .unwrap()
            .checked(Some("m"))
            .unwrap();
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        assert_eq!(
            (&body["prompt"], &body["model"]),
            (&"x".into(), &"m".into())
        );
        let own = line("c", r#"{"model":"mine"}"#);
        let own = parse(own.as_bytes()).unwrap().checked(Some("m")).unwrap();
        assert!(String::from_utf8(own.body).unwrap().contains("mine"));

        file.as_file_mut().set_len(10).unwrap();
        let changed = opened.read(&opened.lines[1]).unwrap_err().to_string();
        assert!(
            changed.contains("line 3") && changed.contains("changed"),
            "{changed}"
        );
        for (text, said) in [
            (
                format!("{}\n{}\n", line("a", "{}"), line("a", "{}")),
                "line 2",
            ),
            (format!("{}\n{{", line("a", "{}")), "line 2"),
            (r#"{"custom_id":"a"}"#.to_owned(), "missing field"),
        ] {
            let error = format!("{:#}", input(&text).1.unwrap_err());
            assert!(error.contains(said), "{error}");
        }
        assert!(Input::open(Path::new("/no/such")).is_err());
    }

    #[test]
    fn what_is_no_request_of_a_batch_is_told_so() {
        for (from, to, said) in [
            ("POST", "GET", "only POST"),
            (
                "/v1/completions",
                "/v1/embeddings",
                "/v1/completions can be used",
            ),
            ("{}", "[]", "no JSON object"),
            ("{}", r#"{"stream":true}"#, "leave out `stream`"),
            ("{}", r#"{"background":true}"#, "leave out `background`"),
        ] {
            let request = parse(line("a", "{}").replace(from, to).as_bytes()).unwrap();
            let error = request.checked(None).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
