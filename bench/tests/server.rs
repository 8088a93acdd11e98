//! The load generator against a small server of its own, over real sockets.

use bench::args::{Args, Backend, Mode, Serve};
use bench::client::Client;
use bench::load::{Arrivals, plan};
use clap::Parser;
use http_body_util::channel::Channel;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::sleep;

type Body = Either<Full<Bytes>, Channel<Bytes, Infallible>>;

/// What the server saw.
#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    generations: AtomicUsize,
    now: AtomicUsize,
    most: AtomicUsize,
}

/// Starts a server on a free port. Prompts of an odd number (by order of arrival) are answered
/// whole or, if `faults`, in one of three wrong ways.
async fn start(faults: bool) -> (u16, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let seen = Arc::new(Seen::default());
    let shared = Arc::clone(&seen);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("accept");
            stream.set_nodelay(true).expect("a TCP socket");
            shared.connections.fetch_add(1, Ordering::Relaxed);
            let seen = Arc::clone(&shared);
            let service = service_fn(move |request| answer(request, Arc::clone(&seen), faults));
            let builder = hyper::server::conn::http1::Builder::new();
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
        }
    });
    (port, seen)
}

async fn answer(
    request: Request<Incoming>,
    seen: Arc<Seen>,
    faults: bool,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let key = request.headers().get("authorization").cloned();
    let body = request.into_body().collect().await.expect("a body");
    let steps = seen.generations.load(Ordering::Relaxed);
    let whole = |status: u16, text: String| {
        let body = Either::Left(Full::from(text));
        let response = Response::builder().status(status).body(body);
        Ok(response.expect("a response"))
    };
    match path.as_str() {
        "/v1/models" => whole(200, r#"{"data":[{"id":"tiny"}]}"#.into()),
        "/metrics" => whole(
            200,
            format!(
                "cluster_step_duration_seconds_count {steps}\n\
                 cluster_step_duration_seconds_sum {}\n\
                 cluster_rank_step_seconds_sum{{rank=\"0\"}} {}\n",
                steps as f64 * 0.010,
                steps as f64 * 0.009
            ),
        ),
        _ if key.is_some_and(|key| key != "Bearer right") => {
            whole(401, r#"{"error":{"message":"the key is wrong"}}"#.into())
        }
        "/v1/completions" | "/v1/chat/completions" => {
            let body: Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
            assert_eq!(body["model"], "tiny");
            let number = seen.generations.fetch_add(1, Ordering::Relaxed);
            if faults && number % 4 == 1 {
                return whole(429, r#"{"error":{"message":"the queue is full"}}"#.into());
            }
            let (sender, channel) = Channel::new(8);
            let fault = if faults { number % 4 } else { 0 };
            tokio::spawn(generate(sender, body, seen, fault));
            Ok(Response::new(Either::Right(channel)))
        }
        _ => whole(404, String::new()),
    }
}

/// Streams as many tokens as asked for, 2 ms each, and counts how many do so at once.
async fn generate(
    mut sender: http_body_util::channel::Sender<Bytes, Infallible>,
    body: Value,
    seen: Arc<Seen>,
    fault: usize,
) {
    let now = seen.now.fetch_add(1, Ordering::SeqCst) + 1;
    seen.most.fetch_max(now, Ordering::SeqCst);
    let tokens = body["max_tokens"].as_u64().expect("max_tokens");
    let chat = body["messages"].is_array();
    let mut send = async |text: String| {
        // The client may be gone.
        let _ = sender.send_data(Bytes::from(text)).await;
    };
    if chat {
        send("data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n".into()).await;
        sleep(Duration::from_millis(20)).await;
    }
    for _ in 0..tokens {
        sleep(Duration::from_millis(2)).await;
        let choice = if chat {
            r#"{"delta":{"content":"x"}}"#
        } else {
            r#"{"text":"x"}"#
        };
        send(format!("data: {{\"choices\":[{choice}]}}\n\n")).await;
    }
    seen.now.fetch_sub(1, Ordering::SeqCst);
    match fault {
        2 => send("data: {\"error\":{\"message\":\"a shard died\"}}\n\n".into()).await,
        3 => {}
        _ => {
            let usage = format!("{{\"prompt_tokens\":5,\"completion_tokens\":{tokens}}}");
            send(format!(
                "data: {{\"choices\":[],\"usage\":{usage}}}\n\ndata: [DONE]\n\n"
            ))
            .await;
        }
    }
}

fn args(port: u16, line: &str) -> Serve {
    let line = format!("bench serve --port {port} --random-output-len 5 {line}");
    match Args::parse_from(line.split_whitespace()).mode {
        Mode::Serve(serve) => *serve,
        mode => panic!("{mode:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_counts_tokens_and_time_and_reuses_connections() {
    let (port, seen) = start(false).await;
    let serve = args(port, "--num-prompts 30 --max-concurrency 4");
    let report = bench::measure(&serve).await.expect("a report");
    assert_eq!((report.completed, report.failed), (30, 0));
    assert_eq!(
        (report.input_tokens, report.output_tokens),
        (30 * 5, 30 * 5)
    );
    assert_eq!(seen.most.load(Ordering::SeqCst), 4);
    let connections = seen.connections.load(Ordering::Relaxed);
    assert!(connections <= 5, "{connections} connections for 4 at once");
    // Sleeps are at least what was asked for, so these are bounds on any machine.
    assert!(report.ttft_ms.mean >= 2.0, "{report}");
    assert!(report.e2el_ms.mean >= 10.0, "{report}");
    // Four of five tokens follow another.
    let rest = report.e2el_ms.mean - report.ttft_ms.mean;
    assert!((report.tpot_ms.mean * 4.0 - rest).abs() < 1e-6, "{report}");
    let steps = report.steps.expect("the server has steps");
    assert!(
        (steps.steps - 30.0).abs() < 1e-9,
        "the warm-up does not count"
    );
    assert!((steps.overhead - 0.001).abs() < 1e-9, "{steps:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_chunk_is_not_the_first_token() {
    let (port, _) = start(false).await;
    let serve = args(port, "--num-prompts 3 --backend openai-chat");
    let report = bench::measure(&serve).await.expect("a report");
    assert_eq!(report.completed, 3);
    assert!(report.ttft_ms.mean >= 22.0, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_counted_and_one_is_shown() {
    let (port, _) = start(true).await;
    let serve = args(port, "--num-prompts 40 --num-warmups 0 --max-concurrency 1");
    let report = bench::measure(&serve).await.expect("a report");
    assert_eq!((report.completed, report.failed), (10, 30));
    let error = report.error.expect("an error");
    assert!(error.contains("the queue is full"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisson_load_takes_its_time() {
    let (port, _) = start(false).await;
    let serve = args(port, "--num-prompts 20 --request-rate 100 --seed 1");
    let arrivals = Arrivals {
        rate: serve.request_rate,
        burstiness: serve.burstiness,
    };
    let last = plan(&serve.prompts, Backend::Openai, "tiny", arrivals, 20)[19].due;
    let report = bench::measure(&serve).await.expect("a report");
    assert!(last > Duration::from_millis(80));
    assert!(report.duration_s >= last.as_secs_f64(), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_without_any_answer_is_an_error() {
    let (port, _) = start(false).await;
    let directory = tempfile::tempdir().expect("a directory");
    let json = directory.path().join("result.json");
    let run = async |more: &str| {
        let line = format!("bench serve --port {port} --num-prompts 3 {more} --json");
        let mut words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        words.push(json.display().to_string());
        bench::run(Args::parse_from(words)).await
    };
    run("--api-key right").await.expect("the key is right");
    let written = || -> Value {
        serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON")
    };
    assert_eq!(written()["completed"], 3);
    let error = run("--api-key wrong").await.expect_err("all failed");
    assert_eq!(error.to_string(), "all 3 requests failed");
    assert_eq!(written()["error"], "401 Unauthorized: the key is wrong");
    let error = run("--timeout 1 --random-output-len 2000").await;
    assert_eq!(
        error.expect_err("too slow").to_string(),
        "all 3 requests failed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_may_stand_in_a_file() {
    let (port, _) = start(false).await;
    let directory = tempfile::tempdir().expect("a directory");
    let key = directory.path().join("key");
    let serve = args(
        port,
        &format!("--num-prompts 2 --api-key-file {}", key.display()),
    );
    std::fs::write(&key, "# of the bench\n\n  right \n").expect("write");
    let report = bench::measure(&serve).await.expect("a report");
    assert_eq!(report.failed, 0, "{report}");
    std::fs::write(&key, "# nothing\n").expect("write");
    let error = bench::measure(&serve).await.expect_err("no key");
    assert!(error.to_string().contains("holds no API key"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_room_counts_in_an_open_loop() {
    let (port, _) = start(false).await;
    // 20 requests due within some 20 ms, one at a time, 10 ms each: the last waits for all others.
    let line = "--num-prompts 20 --request-rate 1000 --max-concurrency 1";
    let report = bench::measure(&args(port, line)).await.expect("a report");
    assert!(report.ttft_ms.percentile(100.0) >= 100.0, "{report}");
    assert!(report.send_delay_ms.percentile(100.0) >= 100.0, "{report}");
    let closed = args(port, "--num-prompts 20 --max-concurrency 1");
    let closed = bench::measure(&closed).await.expect("a report");
    assert!(closed.send_delay_ms.mean.abs() < 1e-9, "{closed}");
    assert!(
        closed.ttft_ms.median() < report.ttft_ms.median(),
        "{closed}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_saved_under_their_name_and_drawn() {
    let (port, _) = start(false).await;
    let directory = tempfile::tempdir().expect("a directory");
    let folder = directory.path().join("new");
    let plot = directory.path().join("plot.svg");
    let line = format!(
        "bench serve --port {port} --num-prompts 5 --random-output-len 4 --save-result --save-detailed \
         --goodput ttft:60000 e2el:120000 --result-dir {} --plot {}",
        folder.display(),
        plot.display()
    );
    bench::run(Args::parse_from(line.split_whitespace()))
        .await
        .expect("a run");
    let mut files = std::fs::read_dir(&folder).expect("the folder was made");
    let file = files.next().expect("a file").expect("an entry").path();
    let name = file
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert!(name.starts_with("openai-infqps-tiny-"), "{name}");
    let json: Value = serde_json::from_slice(&std::fs::read(&file).expect("read")).expect("JSON");
    assert_eq!(json["itls"][4].as_array().expect("gaps").len(), 3);
    let goodput = json["request_goodput"].as_f64().expect("a goodput");
    assert_eq!(json["request_throughput"], goodput, "limits are far");
    let svg = std::fs::read_to_string(&plot).expect("a plot");
    assert!(svg.starts_with("<svg ") && svg.contains("Inter-token latency"));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    drop(listener);
    let error = bench::measure(&args(port, ""))
        .await
        .expect_err("nobody listens");
    let said = format!("{error:#}");
    assert!(
        said.contains(&format!("connect to 127.0.0.1:{port}")),
        "{said}"
    );
    let error = Client::new("https://example.org", None).expect_err("no TLS");
    assert!(error.to_string().contains("http://HOST:PORT"), "{error}");
}
