//! A client of few lines: HTTP/1.0, so that an answer ends with its connection and needs no
//! decoding.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest silence of the server.
const SILENCE: Duration = Duration::from_secs(60);

/// Status and body of one request.
pub(crate) fn request(address: SocketAddr, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut answer = send(address, method, path, body);
    let mut rest = String::new();
    answer
        .reader
        .read_to_string(&mut rest)
        .expect("the body is UTF-8");
    (answer.status, rest)
}

/// The body of a GET that must succeed.
pub(crate) fn get(address: SocketAddr, path: &str) -> String {
    let (status, body) = request(address, "GET", path, "");
    assert_eq!(status, 200, "{path}: {body}");
    body
}

/// The answer to a POST that must succeed.
pub(crate) fn post(address: SocketAddr, path: &str, body: &Value) -> Value {
    let (status, answer) = request(address, "POST", path, &body.to_string());
    assert_eq!(status, 200, "{body}: {answer}");
    serde_json::from_str(&answer).expect("the answer is JSON")
}

/// The answer to a POST with an API key.
pub(crate) fn post_as(address: SocketAddr, key: &str, path: &str, body: &Value) -> Value {
    let key = format!("Authorization: Bearer {key}\r\n");
    let mut answer = send_with(address, "POST", path, (&key, &body.to_string()));
    assert_eq!(answer.status, 200, "{body}");
    let mut text = String::new();
    answer.reader.read_to_string(&mut text).expect("UTF-8");
    serde_json::from_str(&text).expect("the answer is JSON")
}

/// A value of `/metrics`: the sum over all series of this name whose labels contain `label`.
pub(crate) fn metric(address: SocketAddr, name: &str, label: &str) -> f64 {
    let text = get(address, "/metrics");
    let series = text.lines().filter(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']))
            && line.contains(label)
    });
    let value = |line: &str| {
        line.rsplit(' ')
            .next()
            .and_then(|value| value.parse::<f64>().ok())
    };
    series
        .map(|line| value(line).expect("a series has a value"))
        .sum()
}

/// A greedy chat request.
pub(crate) fn chat(question: &str, max_tokens: u32) -> Value {
    json!({
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
    })
}

/// A greedy completion that does not end before `max_tokens`.
pub(crate) fn endless(prompt: &str, max_tokens: u32) -> Value {
    json!({
        "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": true,
        "stream": true,
    })
}

/// The text of a chat answer.
pub(crate) fn content(answer: &Value) -> String {
    let content = &answer["choices"][0]["message"]["content"];
    content
        .as_str()
        .unwrap_or_else(|| panic!("no content: {answer}"))
        .to_owned()
}

/// A stream of server-sent events.
pub(crate) struct Stream(BufReader<TcpStream>);

impl Stream {
    /// Sends a request with `"stream": true` and reads up to the first event.
    pub(crate) fn open(address: SocketAddr, path: &str, mut body: Value) -> Self {
        body["stream"] = true.into();
        let answer = send(address, "POST", path, &body.to_string());
        assert_eq!(answer.status, 200, "{body}");
        Self(answer.reader)
    }

    /// The data of the next event; `None` when the connection ends.
    pub(crate) fn next(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(data) = line.trim_end().strip_prefix("data:") {
                return Some(data.trim_start().to_owned());
            }
        }
    }

    /// All text, and the data of the last event.
    pub(crate) fn read_to_end(mut self) -> (String, String) {
        let (mut text, mut last) = (String::new(), String::new());
        while let Some(data) = self.next() {
            if let Ok(event) = serde_json::from_str::<Value>(&data) {
                let choice = &event["choices"][0];
                let part = choice["delta"]["content"]
                    .as_str()
                    .or(choice["text"].as_str());
                text.push_str(part.unwrap_or_default());
            }
            last = data;
        }
        (text, last)
    }
}

struct Answer {
    status: u16,
    reader: BufReader<TcpStream>,
}

fn send(address: SocketAddr, method: &str, path: &str, body: &str) -> Answer {
    send_with(address, method, path, ("", body))
}

/// Sends a request with further lines in its head.
fn send_with(address: SocketAddr, method: &str, path: &str, (more, body): (&str, &str)) -> Answer {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream
        .set_read_timeout(Some(SILENCE))
        .expect("a timeout can be set");
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\n{more}\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("it reads");
    stream.write_all(body.as_bytes()).expect("it reads");
    let mut reader = BufReader::new(stream);
    let mut status_line = String::new();
    reader.read_line(&mut status_line).expect("it answers");
    let status = status_line
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("the head goes on");
        if line.trim().is_empty() {
            let status = status.unwrap_or_else(|| panic!("a status line: {status_line}"));
            return Answer { status, reader };
        }
    }
}
