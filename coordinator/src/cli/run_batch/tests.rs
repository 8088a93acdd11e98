//! What a batch makes of servers that refuse, fall silent or hang up, scripted answer by answer.

use super::ask::Limits;
use super::*;
use crate::cli::args::Command;
use crate::cli::layers;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use tempfile::TempDir;

#[test]
fn output_lines_have_the_form_of_others() {
    let line = output("a", 200, Some("r".into()), json!({"x": 1}));
    assert_eq!(line["custom_id"], "a");
    assert_eq!(line["response"]["status_code"], 200);
    assert_eq!(line["response"]["request_id"], "r");
    assert_eq!(
        (&line["response"]["body"], &line["error"]),
        (&json!({"x": 1}), &Value::Null)
    );
    let line = output("a", 400, None, refusal("no"));
    assert_eq!(line["error"]["error"]["message"], "no");
    assert!(
        line["response"]["body"].is_null()
            && line["id"] != output("a", 400, None, Value::Null)["id"]
    );
}

/// What a server does with a request.
enum Reply {
    Say(u16, &'static str, Value),
    /// Hangs up after so long.
    HangUp(Duration),
}

fn text() -> Reply {
    Reply::Say(200, "", json!({"choices": []}))
}

fn error(status: u16, code: &str) -> Reply {
    Reply::Say(
        status,
        "",
        json!({"error": {"message": "Because.", "code": code}}),
    )
}

/// A server that is asked for one thing after the other, and told how many requests came before on all connections and
/// on this one.
fn serve(reply: impl Fn(usize, usize) -> Reply + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it has one");
    thread::spawn(move || {
        let mut before = 0;
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            let mut reader = BufReader::new(&stream);
            let mut on_this = 0;
            while read_request(&mut reader) {
                let reply = reply(before, on_this);
                (before, on_this) = (before + 1, on_this + 1);
                match reply {
                    Reply::Say(status, head, body) => say(&stream, status, head, &body),
                    Reply::HangUp(after) => {
                        thread::sleep(after);
                        break;
                    }
                }
            }
        }
    });
    address
}

/// Reads to the end of a request; false where there is none.
fn read_request(reader: &mut BufReader<&TcpStream>) -> bool {
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return false;
        }
        if let Some(given) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = given.trim().parse().expect("a number");
        }
        if line.trim().is_empty() {
            let mut body = vec![0; length];
            return reader.read_exact(&mut body).is_ok();
        }
    }
}

fn say(mut stream: &TcpStream, status: u16, head: &str, body: &Value) {
    let body = body.to_string();
    let length = body.len();
    let text = format!("HTTP/1.1 {status} x\r\n{head}content-length: {length}\r\n\r\n{body}");
    stream.write_all(text.as_bytes()).expect("it is read");
}

/// Asks a server for two things, one after the other: what came of it, and the lines that were written.
fn ask(address: SocketAddr, retry_timeout: u32) -> (Result<()>, Vec<Value>) {
    ask_with(address, retry_timeout, |_| {})
}

/// [`ask`] with other bounds of a request.
fn ask_with(
    address: SocketAddr,
    retry_timeout: u32,
    change: impl FnOnce(&mut Limits),
) -> (Result<()>, Vec<Value>) {
    let dir = TempDir::new().expect("a directory");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let lines = ["a", "b"].map(|id| {
        json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": {}}).to_string()
    });
    fs::write(path("in"), lines.join("\n")).expect("written");
    let (url, seconds) = (format!("http://{address}"), retry_timeout.to_string());
    let (input, output) = (path("in"), path("out"));
    let argv = [
        "cluster",
        "run-batch",
        "-i",
        &input,
        "-o",
        &output,
        "--url",
        &url,
        "--retry-timeout",
        &seconds,
        "--max-concurrency",
        "1",
    ];
    let flags = layers::parse(argv.map(OsString::from)).expect("flags");
    let Command::RunBatch(flags) = flags.command else {
        panic!("not run-batch");
    };
    let (mut batch, journal) = prepare(&flags).expect("files");
    change(&mut batch.server.limits);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = runtime
        .expect("threads")
        .block_on(work(&Arc::new(batch), journal, 1));
    let written = fs::read_to_string(output).expect("it is there");
    let written = written
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    (ended, written.collect())
}

fn statuses(written: &[Value]) -> Vec<u64> {
    let statuses = written
        .iter()
        .map(|line| line["response"]["status_code"].as_u64());
    statuses.map(|status| status.expect("a number")).collect()
}

#[test]
fn a_wrong_key_or_model_ends_the_batch_and_is_no_answer() {
    for (status, code, said) in [
        (401, "invalid_api_key", "--api-key"),
        (403, "forbidden", "--api-key"),
        (404, "model_not_found", "--model"),
    ] {
        let code = code.to_owned();
        let (ended, written) = ask(serve(move |_, _| error(status, &code)), 60);
        let ended = ended.unwrap_err();
        assert!(ended.is::<Hopeless>(), "{ended:#}");
        let sentence = ended.to_string();
        assert!(
            sentence.contains(said) && sentence.contains("Because."),
            "{sentence}"
        );
        assert!(written.is_empty(), "{written:?}");
    }
    let vllm = json!({"error": {"message": "Because.", "code": 404, "param": "model"}});
    let (ended, _) = ask(serve(move |_, _| Reply::Say(404, "", vllm.clone())), 60);
    assert!(ended.unwrap_err().is::<Hopeless>());
    // What was answered before is kept.
    let (ended, written) = ask(
        serve(|before, _| if before == 0 { text() } else { error(401, "") }),
        60,
    );
    assert!(ended.is_err());
    assert_eq!(statuses(&written), [200]);
    let (ended, written) = ask(serve(|_, _| error(404, "not_found")), 60);
    assert!(ended.is_ok(), "the request's own fault");
    assert_eq!(statuses(&written), [404, 404]);
}

#[test]
fn what_was_not_taken_in_time_is_asked_again() {
    let (ended, written) = ask(
        serve(|before, _| if before == 0 { error(408, "") } else { text() }),
        60,
    );
    assert!(ended.is_ok(), "{ended:?}");
    assert_eq!(statuses(&written), [200, 200]);
}

/// It may be the request's own fault, and then no restart of the batch would help.
#[test]
fn what_is_never_taken_in_time_is_answered_so() {
    let address = serve(|before, _| if before < 3 { error(408, "") } else { text() });
    let (ended, written) = ask_with(address, 60, |limits| limits.failures = 3);
    assert!(ended.is_ok(), "{ended:?}");
    assert_eq!(statuses(&written), [408, 200]);
}

#[test]
fn an_answer_that_is_too_long_is_an_error_of_its_line() {
    let long = Value::from("x".repeat(1000));
    let address = serve(move |before, _| {
        assert!(before < 2, "it is asked once");
        match before {
            0 => Reply::Say(200, "x-request-id: mine\r\n", long.clone()),
            _ => text(),
        }
    });
    let (ended, written) = ask_with(address, 60, |limits| limits.bytes = 1000);
    assert!(ended.is_ok(), "{ended:?}");
    assert_eq!(statuses(&written), [400, 200]);
    assert_eq!(written[0]["response"]["request_id"], "mine");
    let why = written[0]["error"]["error"]["message"].as_str();
    assert!(
        why.is_some_and(|why| why.contains("1000 bytes")),
        "{written:?}"
    );
}

/// A request that hangs counts from when it was sent, not from when it was given up.
#[test]
fn a_server_that_hangs_is_silent_from_the_request_on() {
    let begun = now();
    let address = serve(|_, _| Reply::HangUp(Duration::from_secs(60)));
    let limit = Duration::from_millis(1500);
    let (ended, _) = ask_with(address, 1, |limits| limits.time = limit);
    let sentence = format!("{:#}", ended.unwrap_err());
    assert!(
        sentence.contains("--retry-timeout 1 s: no answer within"),
        "{sentence}"
    );
    assert!(since(begun) < 2 * limit, "it was tried again");
}

#[test]
fn silence_counts_from_its_beginning() {
    let longer = Duration::from_millis(1500);
    // A long answer that a restart takes along.
    let address = serve(move |before, _| match before {
        0 => Reply::HangUp(longer),
        1 => Reply::HangUp(Duration::ZERO),
        _ => text(),
    });
    let (ended, written) = ask(address, 1);
    assert!(ended.is_ok(), "{ended:?}");
    assert_eq!(statuses(&written), [200, 200]);
    // A server that is full says so, and is not silent.
    let busy = |status, code| {
        let begun = now();
        move |_: usize, _: usize| {
            if since(begun) < longer {
                error(status, code)
            } else {
                text()
            }
        }
    };
    for (status, code) in [(429, "queue_full"), (503, "queue_full"), (429, "")] {
        let (ended, _) = ask(serve(busy(status, code)), 1);
        assert!(ended.is_ok(), "{status} {code}: {ended:?}");
    }
    // One that takes nothing may as well be gone.
    for code in ["not_ready", "draining", ""] {
        let (ended, _) = ask(serve(move |_, _| error(503, code)), 1);
        let sentence = format!("{:#}", ended.unwrap_err());
        assert!(
            sentence.contains("--retry-timeout 1 s: 503 (Because.)"),
            "{sentence}"
        );
    }
    let (ended, _) = ask(serve(|_, _| Reply::HangUp(Duration::ZERO)), 1);
    let sentence = ended.unwrap_err().to_string();
    assert!(sentence.contains("--retry-timeout 1 s"), "{sentence}");
}

/// As a server does that closes idle connections just when they are used again.
#[test]
fn a_connection_that_was_kept_may_break_at_any_time() {
    let (ended, written) = ask(
        serve(|before, on_this| match (before, on_this) {
            (40.., _) => text(),
            (_, 0) => Reply::Say(429, "retry-after: 0\r\n", json!({})),
            _ => Reply::HangUp(Duration::ZERO),
        }),
        60,
    );
    assert!(ended.is_ok(), "{ended:?}");
    assert_eq!(statuses(&written), [200, 200]);
}
