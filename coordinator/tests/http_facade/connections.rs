//! Connections: clients that leave, clients that do not read or write, failures, the end.

use super::client::{parse, read_until};
use super::support::{Script, Server, Setup, allow_connections, lock};
use coordinator::http::limits::ServerLimits;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

fn stream_body() -> Vec<u8> {
    json!({"prompt": "hi", "max_tokens": 4000, "stream": true})
        .to_string()
        .into_bytes()
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_request() {
    let server = Setup::always(Script::Endless(2)).start().await;
    let mut expected = 0;
    // In the middle of a stream, and of an answer that is collected.
    for n in [1, 3] {
        let body = json!({"prompt": "hi", "max_tokens": 4000, "stream": true, "n": n}).to_string();
        let mut stream = server
            .open("POST", "/v1/completions", &[], body.as_bytes())
            .await;
        read_until(&mut stream, "data: ").await;
        drop(stream);
        expected += n;
        server.until_cancelled(expected).await;
        let body = json!({"prompt": "hi", "max_tokens": 4000, "n": n}).to_string();
        let stream = server
            .open("POST", "/v1/completions", &[], body.as_bytes())
            .await;
        while lock(&server.seen).requests.len() < expected + n {
            sleep(Duration::from_millis(1)).await;
        }
        drop(stream);
        expected += n;
        server.until_cancelled(expected).await;
    }
    assert_eq!(server.get("/load").await.json(), json!({"server_load": 0}));
}

#[tokio::test]
async fn a_client_that_goes_away_while_queued_cancels_its_request() {
    let server = Setup::always(Script::Hang).start().await;
    for body in [
        stream_body(),
        json!({"prompt": "hi"}).to_string().into_bytes(),
    ] {
        let before = lock(&server.seen).cancelled.len();
        let stream = server.open("POST", "/v1/completions", &[], &body).await;
        while lock(&server.seen).requests.len() == before {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(server.get("/load").await.json(), json!({"server_load": 1}));
        drop(stream);
        server.until_cancelled(before + 1).await;
    }
}

#[tokio::test]
async fn a_broken_stream_says_so_and_has_no_done() {
    for script in [Script::Fail("ab".into()), Script::Vanish("ab".into())] {
        let server = Setup::always(script.clone()).start().await;
        let answer = server
            .send("POST", "/v1/completions", &[], &stream_body())
            .await;
        assert_eq!(answer.status, 200);
        let events = answer.events();
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["type"], "server_error", "{script:?}");
        assert!(!answer.text().contains("[DONE]"), "{}", answer.text());
        let texts: Vec<Value> = events[..events.len() - 1]
            .iter()
            .map(|event| {
                serde_json::from_str::<Value>(event).unwrap()["choices"][0]["text"].clone()
            })
            .collect();
        assert_eq!(texts, ["a", "b"], "what was said stays said");
        let answer = server
            .post("/v1/completions", &json!({"prompt": "hi"}))
            .await;
        assert_eq!(answer.status, 500, "{}", answer.text());
        assert_eq!(answer.json()["error"]["type"], "server_error");
    }
}

#[tokio::test]
async fn an_idle_stream_is_kept_open_by_comments() {
    let limits = ServerLimits {
        keep_alive_interval: Duration::from_millis(30),
        ..ServerLimits::default()
    };
    let server = Setup {
        limits,
        ..Setup::always(Script::Hang)
    }
    .start()
    .await;
    let mut stream = server
        .open("POST", "/v1/completions", &[], &stream_body())
        .await;
    let seen = read_until(&mut stream, ": keep-alive\n\n").await;
    assert!(!seen.contains("data:"), "{seen}");
    read_until(&mut stream, ": keep-alive\n\n").await;
}

#[tokio::test]
async fn a_stream_whose_tokens_show_no_text_is_kept_open_too() {
    let setup = Setup::always(Script::Endless(5));
    let limits = ServerLimits {
        keep_alive_interval: Duration::from_millis(50),
        ..setup.limits
    };
    let server = Setup { limits, ..setup }.start().await;
    // All of it may be the beginning of what ends it, and is held back.
    let stop = "a".repeat(1000) + "b";
    let body = json!({"prompt": "hi", "max_tokens": 1500, "stop": stop, "stream": true});
    let mut stream = server
        .open("POST", "/v1/completions", &[], body.to_string().as_bytes())
        .await;
    for _ in 0..2 {
        let seen = read_until(&mut stream, ": keep-alive\n\n").await;
        assert!(!seen.contains("data:"), "{seen}");
    }
}

/// Time until the server closes a connection on which `bytes` were sent.
async fn closed_after(server: &Server, bytes: &[u8]) -> (Duration, Vec<u8>) {
    let mut stream = TcpStream::connect(server.address).await.expect("connect");
    let start = Instant::now();
    stream.write_all(bytes).await.expect("send");
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("closed in time");
    (start.elapsed(), answer)
}

#[tokio::test]
async fn half_sent_heads_and_bodies_are_closed() {
    let limits = ServerLimits {
        header_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        ..ServerLimits::default()
    };
    let server = Setup {
        limits,
        ..Setup::says("x")
    }
    .start()
    .await;
    for half in [
        "",
        "GET /health HT",
        "GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ",
    ] {
        let (took, _) = closed_after(&server, half.as_bytes()).await;
        assert!(took > Duration::from_millis(200), "{half:?} after {took:?}");
        assert!(took < Duration::from_secs(5), "{half:?} after {took:?}");
    }
    let half = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"prompt\"";
    let (took, answer) = closed_after(&server, half.as_bytes()).await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(parse(&answer).status, 408);
    // The same with heads that come byte by byte for ever.
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let start = Instant::now();
    while stream.write_all(b"a").await.is_ok() {
        assert!(start.elapsed() < Duration::from_secs(5), "still open");
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_half_sent_requests_are_closed_while_a_stream_goes_on() {
    const LIMIT: Duration = Duration::from_secs(2);
    allow_connections();
    let limits = ServerLimits {
        header_timeout: LIMIT,
        body_timeout: LIMIT,
        ..ServerLimits::default()
    };
    let server = Setup {
        limits,
        ..Setup::always(Script::Endless(5))
    };
    let server = Arc::new(server.start().await);
    let body = json!({"prompt": "hi", "max_tokens": 600, "stream": true}).to_string();
    let mut stream = server
        .open("POST", "/v1/completions", &[], body.as_bytes())
        .await;
    let canary = tokio::spawn(async move {
        let (mut longest, mut last, mut seen) = (Duration::ZERO, Instant::now(), Vec::new());
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            longest = longest.max(last.elapsed());
            last = Instant::now();
            seen.extend_from_slice(&buffer[..count]);
        }
        (longest, String::from_utf8(seen).expect("text"))
    });
    let half_head = "GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ";
    let half_body = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
    let mut open = JoinSet::new();
    for index in 0..1000 {
        let (server, half) = (Arc::clone(&server), [half_head, half_body][index % 2]);
        open.spawn(async move { closed_after(&server, half.as_bytes()).await.0 });
    }
    let longest = open.join_all().await.into_iter().max().expect("a thousand");
    assert!(longest < LIMIT + Duration::from_secs(3), "{longest:?}");
    let (pause, seen) = canary.await.expect("it goes on");
    assert!(seen.contains("[DONE]"), "{seen}");
    println!("all closed after {longest:.1?}, the stream's longest pause was {pause:.0?}");
    assert!(pause < Duration::from_millis(500), "{pause:?}");
}

#[tokio::test]
async fn heads_that_cannot_be_read_get_a_sentence_and_a_name() {
    let server = Setup::says("x").start().await;
    let long = "a".repeat(70_000);
    for (status, head) in [
        (400, "hello\r\n\r\n".to_owned()),
        (400, "G@T / HTTP/1.1\r\nhost: x\r\n\r\n".to_owned()),
        (
            400,
            "POST /tokenize HTTP/1.1\r\ncontent-length: -5\r\n\r\n".to_owned(),
        ),
        (431, format!("GET /{long} HTTP/1.1\r\nhost: x\r\n\r\n")),
        (
            431,
            format!("GET /health HTTP/1.1\r\nx-long: {long}\r\n\r\n"),
        ),
        (
            431,
            format!("GET /health HTTP/1.1\r\n{}\r\n", "x: 1\r\n".repeat(200)),
        ),
    ] {
        let (_, bytes) = closed_after(&server, head.as_bytes()).await;
        let answer = parse(&bytes);
        let case = &head[..head.len().min(40)];
        assert_eq!(answer.status, status, "{case}");
        assert_eq!(
            answer.header("x-request-id").map(str::len),
            Some(32),
            "{case}"
        );
        assert_eq!(
            answer.header("content-type"),
            Some("application/json"),
            "{case}"
        );
        assert_eq!(answer.header("connection"), Some("close"), "{case}");
        let length = answer.header("content-length").unwrap().parse();
        assert_eq!(length, Ok(answer.body.len()), "{case}");
        let error = &answer.json()["error"];
        assert_eq!(error["type"], "invalid_request_error", "{case}");
        assert!(
            error["message"].as_str().unwrap().contains("head"),
            "{case}: {error}"
        );
    }
    // A sound request before it on the same connection is answered as ever.
    let pair = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\nnonsense\r\n\r\n";
    let (_, bytes) = closed_after(&server, pair).await;
    let text = String::from_utf8(bytes).unwrap();
    let (first, second) = text.split_once("HTTP/1.1 400").unwrap();
    assert!(first.contains("HTTP/1.1 200 OK") && first.ends_with("{\"version\":\"1.2.3\"}"));
    assert!(second.contains("invalid_request_error"), "{second}");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_closed_and_cancelled() {
    let limits = ServerLimits {
        stall_timeout: Duration::from_millis(400),
        ..ServerLimits::default()
    };
    // Without the engine's own cut, the channel alone holds the tokens back.
    let server = Setup {
        limits,
        ..Setup::always(Script::Endless(0))
    }
    .start()
    .await;
    let body =
        json!({"prompt": vec![1; 40], "n": 16, "max_tokens": 4000, "stream": true, "logprobs": 20});
    let stream = server
        .open("POST", "/v1/completions", &[], body.to_string().as_bytes())
        .await;
    let start = Instant::now();
    server.until_cancelled(16).await;
    assert!(
        start.elapsed() > Duration::from_millis(300),
        "{:?}",
        start.elapsed()
    );
    for (_, sent) in &lock(&server.seen).cancelled {
        assert!(*sent < 4000, "the whole answer was buffered somewhere");
    }
    drop(stream);
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let limits = ServerLimits {
        connections: 2,
        header_timeout: Duration::from_millis(500),
        ..ServerLimits::default()
    };
    let server = Setup {
        limits,
        ..Setup::says("x")
    }
    .start()
    .await;
    let mut idle = Vec::new();
    for _ in 0..2 {
        idle.push(TcpStream::connect(server.address).await.unwrap());
    }
    sleep(Duration::from_millis(50)).await;
    let start = Instant::now();
    assert_eq!(server.get("/health").await.status, 200);
    assert!(
        start.elapsed() > Duration::from_millis(200),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn shutdown_lets_answers_end_and_takes_no_more() {
    let text = "t".repeat(100);
    let mut server = Setup::new(move |_| vec![Script::Endless(5)]).start().await;
    let body = json!({"prompt": "hi", "max_tokens": text.len(), "stream": true}).to_string();
    let mut stream = server
        .open("POST", "/v1/completions", &[], body.as_bytes())
        .await;
    read_until(&mut stream, "data: ").await;
    server.begin_stop();
    let rest = read_until(&mut stream, "[DONE]").await;
    assert!(rest.contains("\"finish_reason\":\"length\""), "{rest}");
    assert!(
        TcpStream::connect(server.address).await.is_err(),
        "it still listens"
    );
    server.stop().await;
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let limits = ServerLimits {
        drain_timeout: Duration::from_millis(200),
        ..ServerLimits::default()
    };
    let server = Setup {
        limits,
        ..Setup::always(Script::Hang)
    }
    .start()
    .await;
    let _open = server
        .open("POST", "/v1/completions", &[], &stream_body())
        .await;
    while lock(&server.seen).requests.is_empty() {
        sleep(Duration::from_millis(1)).await;
    }
    let start = Instant::now();
    server.stop().await;
    assert!(start.elapsed() < Duration::from_secs(5));
}
