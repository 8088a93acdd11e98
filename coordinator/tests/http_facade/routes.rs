//! What holds for every route: keys, names, health, refusals, and bodies no one would write.

use super::support::{Setup, VOCAB, lock};
use coordinator::engine::handle::{Readiness, SubmitError};
use coordinator::http::ROUTES;
use coordinator::scheduler::request::Refusal;
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test]
async fn no_route_but_the_probes_answers_without_a_key() {
    let setup = Setup {
        keys: vec!["secret-1", "secret-2"],
        ..Setup::says("x")
    };
    let server = setup.start().await;
    let mut asked = 0;
    let unknown: &[(&str, &[axum::http::Method])] = &[
        ("/", &[axum::http::Method::GET]),
        (
            "/nothing",
            &[axum::http::Method::GET, axum::http::Method::DELETE],
        ),
        // CVE-2026-48746: the path as text must not decide.
        ("/health/../metrics", &[axum::http::Method::GET]),
        ("//health", &[axum::http::Method::GET]),
        ("/ready/", &[axum::http::Method::GET]),
        ("/health%2f..%2fmetrics", &[axum::http::Method::GET]),
        ("/v1/models?path=/health", &[axum::http::Method::GET]),
    ];
    for (path, methods) in ROUTES.iter().chain(unknown) {
        let path = path.replace("{*id}", "x");
        for method in methods.iter().chain([&axum::http::Method::PUT]) {
            for key in [
                None,
                Some("Bearer secret-"),
                Some("Bearer "),
                Some("Basic secret-1"),
            ] {
                let headers: Vec<_> = key.map(|key| ("authorization", key)).into_iter().collect();
                let answer = server.send(method.as_str(), &path, &headers, b"").await;
                if ["/health", "/ready", "/ping"].contains(&&*path) {
                    assert_ne!(answer.status, 401, "{method}");
                    continue;
                }
                assert_eq!(answer.status, 401, "{method} {path} {key:?}");
                let error = &answer.json()["error"];
                assert_eq!(error["code"], "invalid_api_key", "{method} {path}");
                asked += 1;
            }
        }
    }
    assert!(asked > 100, "only {asked} requests were tried");
    for key in ["Bearer secret-1", "bearer secret-2"] {
        let answer = server
            .send("GET", "/v1/models", &[("authorization", key)], b"")
            .await;
        assert_eq!(answer.status, 200, "{key}");
    }
}

#[tokio::test]
async fn probes_without_a_key_are_told_whether_and_not_why() {
    let setup = Setup {
        keys: vec!["k"],
        ..Setup::says("x")
    };
    let server = setup.start().await;
    let probes = ["/health", "/ping", "/ready"];
    for path in probes {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let states = [
        Readiness::Loading,
        Readiness::Draining,
        Readiness::Recovering("rank 1 of node-7 is lost".into()),
        Readiness::Failed("rank 1 of node-7 is lost".into()),
    ];
    let (mut told, mut whys) = (Vec::new(), 0);
    for state in states {
        server.readiness.send_replace(state);
        for path in probes {
            for key in [None, Some("Bearer wrong")] {
                let headers: Vec<_> = key.map(|key| ("authorization", key)).into_iter().collect();
                let answer = server.send("GET", path, &headers, b"").await;
                assert!([200, 503].contains(&answer.status), "{path}");
                if answer.status == 503 {
                    told.push(answer.text().to_owned());
                }
            }
            let headers = [("authorization", "Bearer k")];
            let answer = server.send("GET", path, &headers, b"").await;
            whys += usize::from(answer.text().contains("rank 1 of node-7"));
        }
    }
    told.dedup();
    assert_eq!(
        told.len(),
        1,
        "one and the same whatever is wrong: {told:?}"
    );
    assert!(!told[0].contains("rank"), "{told:?}");
    assert_eq!(whys, 6, "who has a key is told by each");
}

#[tokio::test]
async fn every_listed_route_answers_its_methods() {
    let server = Setup::says("x").start().await;
    for (path, methods) in ROUTES {
        for method in *methods {
            let path = path.replace("{*id}", super::support::MODEL);
            let is_of_nothing = path.ends_with("/{id}");
            let answer = server.send(method.as_str(), &path, &[], b"{}").await;
            assert!(
                ![404, 405].contains(&answer.status) || (is_of_nothing && answer.status == 404),
                "{method} {path}: {}",
                answer.status
            );
            assert!(answer.header("x-request-id").is_some(), "{method} {path}");
        }
        let wrong = if methods.contains(&axum::http::Method::GET) {
            "PUT"
        } else {
            "GET"
        };
        let answer = server
            .send(wrong, &path.replace("{*id}", "x"), &[], b"")
            .await;
        assert_eq!(answer.status, 405, "{wrong} {path}");
        assert!(answer.header("x-request-id").is_some());
    }
    assert_eq!(
        server.get("/version").await.json(),
        json!({"version": "1.2.3"})
    );
    assert_eq!(server.get("/metrics").await.text(), "up 1\n");
    assert_eq!(server.get("/load").await.json(), json!({"server_load": 0}));
}

#[tokio::test]
async fn tenants_share_no_cached_blocks() {
    let setup = Setup {
        keys: vec!["one", "two"],
        ..Setup::says("x")
    };
    let server = setup.start().await;
    for (key, salt) in [
        ("one", Value::Null),
        ("two", Value::Null),
        ("one", json!("s")),
        ("one", Value::Null),
    ] {
        let body = json!({"prompt": "a", "cache_salt": salt}).to_string();
        let key = format!("Bearer {key}");
        let headers = [("authorization", key.as_str())];
        let answer = server
            .send("POST", "/v1/completions", &headers, body.as_bytes())
            .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let salts: Vec<u64> = lock(&server.seen)
        .requests
        .iter()
        .map(|it| it.cache_salt)
        .collect();
    assert_ne!(salts[0], salts[1]);
    assert_ne!(salts[0], salts[2]);
    assert_eq!(salts[0], salts[3]);
}

#[tokio::test]
async fn request_ids_are_taken_or_made() {
    let server = Setup::says("x").start().await;
    let answer = server
        .send("GET", "/nothing", &[("x-request-id", "abc-1")], b"")
        .await;
    assert_eq!(
        (answer.status, answer.header("x-request-id")),
        (404, Some("abc-1"))
    );
    let long = "x".repeat(129);
    for odd in [long.as_str(), "a b", ""] {
        let answer = server
            .send("GET", "/health", &[("x-request-id", odd)], b"")
            .await;
        let id = answer.header("x-request-id").unwrap();
        assert!(id != odd && id.len() == 32, "{id}");
    }
    let one = server.get("/health").await;
    assert_ne!(
        one.header("x-request-id"),
        server.get("/health").await.header("x-request-id")
    );
    // vLLM's field, before which the header goes.
    let body = json!({"prompt": "a", "request_id": "mine-7"});
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.json()["id"], "cmpl-mine-7");
    assert_eq!(answer.header("x-request-id"), Some("mine-7"));
    let body = body.to_string();
    let headers = [("x-request-id", "abc-1")];
    let answer = server
        .send("POST", "/v1/completions", &headers, body.as_bytes())
        .await;
    assert_eq!(answer.json()["id"], "cmpl-abc-1");
    assert_eq!(answer.header("x-request-id"), Some("abc-1"));
    let chat = json!({"messages": [{"role": "user", "content": "a"}], "stream": true,
                      "request_id": "mine-8"});
    let answer = server.post("/v1/chat/completions", &chat).await;
    assert_eq!(answer.chunks()[0]["id"], "chatcmpl-mine-8");
    // An error has it too, once it is known.
    let wrong = json!({"prompt": "a", "n": 0, "request_id": "mine-9"});
    let answer = server.post("/v1/completions", &wrong).await;
    assert_eq!(
        (answer.status, answer.header("x-request-id")),
        (400, Some("mine-9"))
    );
}

#[tokio::test]
async fn readiness_and_health_tell_the_truth() {
    let server = Setup::says("x").start().await;
    let body = json!({"prompt": "a"});
    let states = [
        (Readiness::Loading, 200, 503, 503),
        (Readiness::Ready, 200, 200, 200),
        (Readiness::Draining, 200, 503, 503),
        (Readiness::Failed("rank 1 is lost".into()), 503, 503, 503),
    ];
    for (state, health, ready, completion) in states {
        server.readiness.send_replace(state.clone());
        let answer = server.get("/health").await;
        assert_eq!(answer.status, health, "{state:?}");
        assert_eq!(answer.body.is_empty(), health == 200);
        assert_eq!(server.get("/ready").await.status, ready, "{state:?}");
        let answer = server.post("/v1/completions", &body).await;
        assert_eq!(answer.status, completion, "{state:?}");
        if completion == 503 {
            let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
            assert!((1..=60).contains(&seconds));
            assert_eq!(answer.json()["error"]["type"], "server_error");
        }
    }
}

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_come_back() {
    let refusals = [
        Refusal::TooManyRequests {
            waiting: 5,
            limit: 5,
        },
        Refusal::TooManyTokens {
            waiting: 500,
            limit: 500,
        },
    ];
    for refusal in refusals {
        let server = Setup::refuses(SubmitError::Refused(refusal)).start().await;
        for stream in [false, true] {
            let answer = server
                .post("/v1/completions", &json!({"prompt": "a", "stream": stream}))
                .await;
            assert_eq!(answer.status, 429, "{}", answer.text());
            let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
            assert!((1..=60).contains(&seconds));
            assert_eq!(answer.json()["error"]["code"], "queue_full");
        }
    }
    // Trying again would not help, so clients must not be told to.
    let larger_than_the_queue = Refusal::TooLarge {
        what: "prompt tokens",
        asked: 9,
        limit: 5,
    };
    for refusal in [larger_than_the_queue, Refusal::Invalid("no prompt")] {
        let server = Setup::refuses(SubmitError::Refused(refusal)).start().await;
        let answer = server
            .post("/v1/completions", &json!({"prompt": "a"}))
            .await;
        assert_eq!(answer.status, 400, "{}", answer.text());
        assert_eq!(answer.header("retry-after"), None);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    let refusal = Refusal::TooLong {
        prompt: 9,
        max_tokens: 9,
        limit: 10,
    };
    let server = Setup::refuses(SubmitError::Refused(refusal)).start().await;
    let answer = server
        .post("/v1/completions", &json!({"prompt": "a"}))
        .await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
}

#[tokio::test]
async fn web_pages_may_call_only_where_they_are_allowed() {
    let ask = async |origins: &[&str]| {
        let origins = origins.iter().map(|&it| it.to_owned()).collect();
        let setup = Setup {
            origins,
            keys: vec!["k"],
            ..Setup::says("x")
        };
        let server = setup.start().await;
        let headers = [
            ("origin", "https://a.example"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization"),
        ];
        let answer = server
            .send("OPTIONS", "/v1/completions", &headers, b"")
            .await;
        if let Some(allowed) = answer.header("access-control-allow-headers") {
            // `*` would not cover it: browsers want this one by name.
            assert_eq!(allowed, "authorization");
        }
        answer
            .header("access-control-allow-origin")
            .map(str::to_owned)
    };
    assert_eq!(ask(&[]).await, None);
    assert_eq!(ask(&["https://b.example"]).await, None);
    assert_eq!(
        ask(&["https://a.example"]).await.as_deref(),
        Some("https://a.example")
    );
    assert_eq!(ask(&["*"]).await.as_deref(), Some("*"));
}

#[tokio::test]
async fn mutated_bodies_never_break_the_server() {
    let server = Setup::says("x").start().await;
    let seeds = [
        json!({"model": super::support::MODEL, "messages": [{"role": "user", "content": "hi"}], "n": 2,
               "stop": ["a", "b"], "logit_bias": {"5": 1.5}, "stream": true, "logprobs": true, "top_logprobs": 3}),
        json!({"prompt": [[1, 2], [3]], "echo": true, "logprobs": 2, "max_tokens": 3, "seed": -4}),
    ];
    let paths = ["/v1/chat/completions", "/v1/completions", "/tokenize"];
    let mut state = 0x1234_5678_9ABC_DEF0_u64;
    let mut draw = |bound: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % bound
    };
    for case in 0..2000 {
        let mut body = seeds[case % 2].to_string().into_bytes();
        for _ in 0..=draw(4) {
            if body.is_empty() {
                break;
            }
            let at = draw(body.len());
            match draw(4) {
                0 => body[at] = b"\"{}[],:0-9e\\\xff"[draw(13)],
                1 => drop(body.remove(at)),
                2 => body.insert(at, body[draw(body.len())]),
                _ => body.truncate(at.max(1)),
            }
        }
        let begun = coordinator::clock::now();
        let answer = server.send("POST", paths[draw(3)], &[], &body).await;
        let took = coordinator::clock::since(begun);
        assert!(took < Duration::from_secs(1), "case {case} took {took:?}");
        let allowed = [200, 400, 404].contains(&answer.status);
        assert!(
            allowed,
            "case {case}: {} for {:?}",
            answer.status,
            String::from_utf8_lossy(&body)
        );
    }
    assert!(
        lock(&server.seen)
            .requests
            .iter()
            .all(|it| it.prompt.iter().all(|&id| id < VOCAB))
    );
}
