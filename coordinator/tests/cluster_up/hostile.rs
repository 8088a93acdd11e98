//! Hostile requests while others are being served: each is refused quickly, and nobody else notices.
//!
//! The requests are lines of `hostile/requests.txt`, each named after the advisory or thread it comes
//! from. Meanwhile canaries read streams: their text must be the undisturbed one, and the pauses
//! between their tokens must stay small. What is measured is printed.

use crate::process::Cluster;
use crate::turn;
use coordinator::clock;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const KEY: &str = "authorization: Bearer canary-key\r\n";

/// Half of all hostile requests are answered within this, on a machine with two busy cores too.
const MEDIAN: Duration = Duration::from_millis(50);
/// And each within this: it may have to wait for a core.
const SLOWEST: Duration = Duration::from_secs(1);
/// Longest pause within a canary's stream.
const PAUSE: Duration = Duration::from_secs(1);
/// How much longer than without attack the usual pause may be; the requests take some of the cores.
const SLOWER: u32 = 4;
/// Most memory that all of them together may make the coordinator take, in KiB.
const GROWTH: u64 = 256 << 10;
/// When a connection that sends nothing more must have ended: the server's limit is 5 s.
const SLOW: Duration = Duration::from_secs(15);
/// How often the table is gone through.
const ROUNDS: usize = 2;

const CANARIES: [&str; 4] = [
    "Once upon a time Tom had a ball.",
    "Lily went to the park with her dog.",
    "The sun was up and Ben was glad.",
    "Anna saw a bird in the tree.",
];

/// A line of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    statuses: &'static str,
    slow: bool,
    bytes: Vec<u8>,
}

fn rows(trap: SocketAddr) -> Vec<Row> {
    let table = include_str!("hostile/requests.txt");
    let lines = table.lines();
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| row(line, &trap.to_string()))
        .collect()
}

fn row(line: &'static str, trap: &str) -> Row {
    let mut parts = line.splitn(3, " |");
    let mut part = || {
        parts
            .next()
            .unwrap_or_else(|| panic!("three parts: {line}"))
    };
    let (head, name, payload) = (part(), part().trim(), part());
    let (kind, statuses) = head.split_once(' ').expect("a kind and statuses");
    let payload = expand(payload.strip_prefix(' ').unwrap_or_default(), trap);
    let post = |path: &str, before: &str, after: &str| {
        let body = [before.as_bytes(), &payload, after.as_bytes()].concat();
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{KEY}content-length: {length}\r\n\r\n"
        );
        [head.into_bytes(), body].concat()
    };
    let messages = r#"{"messages": [{"role": "user", "content": "hi"}], "#;
    let bytes = match kind {
        "complete" => post("/v1/completions", r#"{"prompt": "hi", "#, "}"),
        "chat" => post("/v1/chat/completions", messages, "}"),
        "raw" | "slow" => payload,
        path => post(path, "", ""),
    };
    let slow = kind == "slow";
    Row {
        name,
        statuses,
        slow,
        bytes,
    }
}

/// Writes out what the table abbreviates.
fn expand(text: &str, trap: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("<<") {
        bytes.extend(before.replace('¶', "\r\n").bytes());
        let (inside, after) = after.split_once(">>").expect("`<<` is closed");
        let (unit, times) = match inside.rsplit_once('*') {
            Some((unit, times)) => (unit, times.parse().expect("a number of times")),
            None => (inside, 1),
        };
        let byte = unit.strip_prefix('x').filter(|digits| digits.len() == 2);
        let unit = match (unit, byte.map(|digits| u8::from_str_radix(digits, 16))) {
            ("key", _) => KEY.as_bytes().to_vec(),
            ("trap", _) => trap.as_bytes().to_vec(),
            (_, Some(byte)) => vec![byte.expect("two hexadecimal digits")],
            (unit, None) => unit.replace('¶', "\r\n").into_bytes(),
        };
        bytes.extend(unit.repeat(times));
        rest = after;
    }
    bytes.extend(rest.replace('¶', "\r\n").bytes());
    bytes
}

/// Sends bytes and reads until the connection ends. All statuses that came, the answer, the time to
/// its first byte.
fn exchange(address: SocketAddr, bytes: &[u8], limit: Duration) -> (Vec<String>, String, Duration) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream
        .set_read_timeout(Some(limit))
        .expect("a timeout can be set");
    let begun = clock::now();
    // A server that refuses may have stopped reading, and may reset what it did not read.
    let _ = stream.write_all(bytes);
    let (mut answer, mut buffer, mut took) = (Vec::new(), [0; 4096], None);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("still open after {limit:?}: {error}"),
        }
        took.get_or_insert_with(|| clock::since(begun));
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let digits = |status: &&str| status.bytes().all(|byte| byte.is_ascii_digit());
    let lines = answer.split("HTTP/1.").skip(1);
    let statuses = lines.filter_map(|line| line.get(2..5).filter(digits));
    let statuses = statuses.map(str::to_owned).collect();
    (
        statuses,
        answer,
        took.unwrap_or_else(|| clock::since(begun)),
    )
}

/// One greedy stream: its text, and the pauses between its tokens.
fn canary(address: SocketAddr, prompt: &str) -> (String, Vec<Duration>) {
    let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 48, "ignore_eos": true,
        "stream": true})
    .to_string();
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a timeout can be set");
    let head = format!(
        "POST /v1/completions HTTP/1.0\r\n{KEY}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("it reads");
    let (mut text, mut pauses, mut last) = (String::new(), Vec::new(), None);
    for line in BufReader::new(stream).lines() {
        let line = line.expect("the stream goes on");
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data == "[DONE]" {
            return (text, pauses);
        }
        let now = clock::now();
        pauses.extend(last.replace(now).map(|last| now.duration_since(last)));
        let event: Value = serde_json::from_str(data).expect("an event is JSON");
        text += event["choices"][0]["text"]
            .as_str()
            .unwrap_or_else(|| panic!("no text: {event}"));
    }
    panic!("a canary's stream broke off after {text:?}")
}

/// Canaries sing until `done`; all pauses between their tokens, shortest first.
fn sing(address: SocketAddr, expected: &[String], done: &AtomicBool) -> Vec<Duration> {
    let sing = |index: usize| {
        let mut pauses = Vec::new();
        while !done.load(Ordering::Relaxed) {
            let (text, new) = canary(address, CANARIES[index]);
            assert_eq!(text, expected[index], "canary {index} says something else");
            pauses.extend(new);
        }
        pauses
    };
    let mut pauses: Vec<Duration> = thread::scope(|scope| {
        let singing: Vec<_> = (0..CANARIES.len())
            .map(|i| scope.spawn(move || sing(i)))
            .collect();
        singing
            .into_iter()
            .flat_map(|it| it.join().expect("a canary lives"))
            .collect()
    });
    pauses.sort_unstable();
    pauses
}

fn quantile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

/// The most memory the process has held, in KiB.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .expect("a peak")
}

/// Sends every row once; complaints, and how long each answer took.
fn attack(address: SocketAddr, rows: &[Row]) -> (Vec<String>, Vec<(Duration, &'static str)>) {
    let (mut wrong, mut times) = (Vec::new(), Vec::new());
    for row in rows.iter().filter(|row| !row.slow) {
        let (statuses, answer, took) = exchange(address, &row.bytes, Duration::from_secs(10));
        // What follows a refused request on its connection may be refused too, and nothing else.
        let refused = statuses.iter().all(|status| status.starts_with('4'));
        let first = statuses.first().map_or("-", String::as_str);
        let head: String = answer.chars().take(600).collect();
        if !refused || !row.statuses.split(',').any(|status| status == first) {
            wrong.push(format!(
                "{}: {statuses:?} is not {}: {head}",
                row.name, row.statuses
            ));
        }
        if answer.len() > 4096
            || ["panicked", ".rs:", "0x"]
                .iter()
                .any(|it| answer.contains(it))
        {
            wrong.push(format!("{}: says too much: {head}", row.name));
        }
        times.push((took, row.name));
    }
    (wrong, times)
}

/// What was measured while `rows` were sent.
struct Measured {
    wrong: Vec<String>,
    /// How long answers took, shortest first.
    times: Vec<(Duration, &'static str)>,
    /// Between the canaries' tokens, shortest first.
    pauses: Vec<Duration>,
}

/// All rows, [`ROUNDS`] times, under the canaries.
fn besiege(address: SocketAddr, rows: &[Row], expected: &[String]) -> Measured {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let singing = scope.spawn(|| sing(address, expected, &done));
        let slow = rows.iter().filter(|row| row.slow);
        let slow = slow.map(|row| scope.spawn(|| drop(exchange(address, &row.bytes, SLOW))));
        let slow: Vec<_> = slow.collect();
        let (mut wrong, mut times) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (new_wrong, new_times) = attack(address, rows);
            wrong.extend(new_wrong);
            times.extend(new_times);
        }
        for slow in slow {
            slow.join().expect("a silent connection is closed");
        }
        done.store(true, Ordering::Relaxed);
        times.sort_unstable();
        let pauses = singing.join().expect("the canaries live");
        Measured {
            wrong,
            times,
            pauses,
        }
    })
}

/// The canaries' pauses while nobody else asks.
fn undisturbed(address: SocketAddr, expected: &[String]) -> Vec<Duration> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let singing = scope.spawn(|| sing(address, expected, &done));
        thread::sleep(Duration::from_secs(2));
        done.store(true, Ordering::Relaxed);
        singing.join().expect("the canaries live")
    })
}

fn figures(sorted: &[Duration]) -> String {
    let [half, most, all] = [50, 99, 100].map(|percent| quantile(sorted, percent));
    format!(
        "p50 {half:?}, p99 {most:?}, longest {all:?} of {}",
        sorted.len()
    )
}

#[test]
fn hostile_requests_are_refused_and_nobody_else_notices() {
    let _turn = turn();
    let trap = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let rows = rows(trap.local_addr().expect("it is bound"));
    assert!(rows.len() >= 80, "{} rows", rows.len());
    let cluster = Cluster::start(&["--tensor-parallel-size", "2", "--api-key", "canary-key"]);
    let address = cluster.address;
    let before = (cluster.children(), peak(cluster.pid()));
    let expected = CANARIES.map(|prompt| canary(address, prompt).0);

    let undisturbed = undisturbed(address, &expected);
    let found = besiege(address, &rows, &expected);
    let grown = peak(cluster.pid()) - before.1;

    let (times, pauses) = (&found.times, &found.pauses);
    let sorted: Vec<Duration> = times.iter().map(|(took, _)| *took).collect();
    println!("{} hostile requests: {}", rows.len(), figures(&sorted));
    println!("pauses of canaries: {}", figures(pauses));
    println!("undisturbed: {}", figures(&undisturbed));
    println!("{grown} KiB more");
    let wrong = found.wrong;
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    let half = quantile(&sorted, 50);
    assert!(half <= MEDIAN, "the median is {half:?}");
    assert!(quantile(&sorted, 100) <= SLOWEST, "{:?}", times.last());
    let longest = quantile(pauses, 100);
    assert!(longest <= PAUSE, "a pause of {longest:?}");
    let (usual, now) = (quantile(&undisturbed, 50), quantile(pauses, 50));
    assert!(
        now <= usual * SLOWER,
        "{now:?} is the usual pause, and was {usual:?}"
    );
    assert!(grown <= GROWTH, "{grown} KiB more");
    trap.set_nonblocking(true)
        .expect("it can be asked without waiting");
    assert!(
        trap.accept().is_err(),
        "the server called an address out of a request"
    );
    assert_eq!(cluster.children(), before.0, "a shard was replaced");
    cluster.stop();
}
