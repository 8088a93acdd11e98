//! `/v1/completions`, `/tokenize` and `/detokenize`, over a scripted engine.

use super::chat::{chat, with};
use super::support::{MODEL, Script, Setup, lock};
use serde_json::{Value, json};

#[tokio::test]
async fn completions_take_prompts_in_every_form() {
    let server = Setup::new(|requests| {
        let script = |request: &coordinator::scheduler::request::Request| {
            Script::Text(format!("<{}>", request.prompt.len()))
        };
        requests.iter().map(script).collect()
    })
    .start()
    .await;
    for (prompt, texts) in [
        (json!("abc"), vec!["<3>"]),
        (json!(["a", "bcd"]), vec!["<1>", "<3>"]),
        (json!([1, 2]), vec!["<2>"]),
        (json!([[1], [1, 2, 3, 4]]), vec!["<1>", "<4>"]),
    ] {
        let body = json!({"model": MODEL, "prompt": prompt});
        let answer = server.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let body = answer.json();
        assert_eq!(body["object"], "text_completion");
        let choices = body["choices"].as_array().unwrap();
        let got: Vec<&str> = choices
            .iter()
            .map(|it| it["text"].as_str().unwrap())
            .collect();
        assert_eq!(got, texts, "{prompt}");
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], i);
        }
    }
    assert_eq!(
        lock(&server.seen).requests[0].max_tokens,
        16,
        "OpenAI's default"
    );
    let body = json!({"prompt": ["a", "bc"], "n": 2, "truncate_prompt_tokens": 1, "seed": 5});
    let answer = server.post("/v1/completions", &body).await.json();
    assert_eq!(answer["choices"][3]["text"], "<1>");
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    let seen = lock(&server.seen);
    let last = &seen.requests[seen.requests.len() - 4..];
    let seeds: Vec<u64> = last.iter().map(|request| request.sampling.seed).collect();
    assert_eq!(seeds, [5, 6, 5, 6]);
    assert_eq!(*last[2].prompt, [u32::from(b'c')]);
}

#[tokio::test]
async fn echo_scores_the_prompt_as_evaluations_need_it() {
    let server = Setup::says("xy").start().await;
    let body =
        json!({"prompt": "aäb", "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0});
    let whole = server.post("/v1/completions", &body).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "aäbx");
    assert_eq!(
        choice["logprobs"],
        json!({
            "tokens": ["a", "bytes:\\xc3", "bytes:\\xa4", "b", "x"],
            "token_logprobs": [null, -0.5, -0.5, -0.5, -0.5],
            "top_logprobs": [null, {"A": -1.0, "bytes:\\xc3": -0.5}, {"A": -1.0, "bytes:\\xa4": -0.5},
                             {"A": -1.0, "b": -0.5}, {"A": -1.0, "x": -0.5}],
            "text_offset": [0, 1, 1, 2, 3]})
    );
    let chunks = server
        .post("/v1/completions", &with(body, &json!({"stream": true})))
        .await
        .chunks();
    let mut tokens = Vec::new();
    let mut text = String::new();
    for chunk in &chunks {
        text += chunk["choices"][0]["text"].as_str().unwrap();
        let more = chunk["choices"][0]["logprobs"]["tokens"].as_array();
        tokens.extend(more.into_iter().flatten().cloned());
    }
    assert_eq!(text, "aäbx");
    assert_eq!(Value::from(tokens), choice["logprobs"]["tokens"]);
    // Scoring alone: no token is generated.
    let body = json!({"prompt": [[97, 98]], "echo": true, "logprobs": 0, "max_tokens": 0});
    let scored = server.post("/v1/completions", &body).await.json();
    assert_eq!(scored["choices"][0]["text"], "ab");
    assert_eq!(scored["choices"][0]["finish_reason"], "length");
    assert_eq!(
        scored["choices"][0]["logprobs"]["top_logprobs"],
        json!([null, {"b": -0.5}])
    );
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn usage_comes_at_the_end_or_with_every_chunk() {
    let server = Setup::says("abc").start().await;
    let ask = async |options: Value| {
        let body = json!({"prompt": "pp", "stream": true, "stream_options": options});
        server.post("/v1/completions", &body).await.chunks()
    };
    let chunks = ask(json!({"include_usage": true})).await;
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!(
        (&last["choices"], &last["usage"]["completion_tokens"]),
        (&json!([]), &json!(4))
    );
    assert!(
        rest.iter()
            .all(|chunk| chunk.get("usage") == Some(&Value::Null))
    );
    let chunks = ask(json!({"include_usage": true, "continuous_usage_stats": true})).await;
    let counts: Vec<_> = chunks
        .iter()
        .map(|it| it["usage"]["completion_tokens"].clone())
        .collect();
    assert_eq!(counts, [1, 2, 3, 4, 4]);
    assert!(
        ask(json!({}))
            .await
            .iter()
            .all(|chunk| chunk.get("usage").is_none())
    );
}

#[tokio::test]
async fn token_ids_and_prompt_scores_come_when_asked_for() {
    let server = Setup::says("ab").start().await;
    let fields = json!({"return_token_ids": true, "prompt_logprobs": 1, "max_tokens": 2});
    let body = with(json!({"prompt": "pq"}), &fields);
    let choice = server.post("/v1/completions", &body).await.json()["choices"][0].clone();
    assert_eq!(choice["token_ids"], json!([97, 98]));
    assert_eq!(choice["prompt_token_ids"], json!([112, 113]));
    let scores = json!([null, {
        "113": {"logprob": -0.5, "rank": 2, "decoded_token": "q"},
        "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"}}]);
    assert_eq!(choice["prompt_logprobs"], scores);
    let answer = server
        .post("/v1/chat/completions", &with(chat("q"), &fields))
        .await
        .json();
    assert_eq!(answer["choices"][0]["token_ids"], json!([97, 98]));
    assert_eq!(answer["prompt_logprobs"].as_array().unwrap().len(), 19);
    assert_eq!(answer["prompt_token_ids"].as_array().unwrap().len(), 19);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let server = Setup::says("").start().await;
    let body = json!({"prompt": "hä</s>", "return_token_strs": true});
    let answer = server.post("/tokenize", &body).await.json();
    assert_eq!(answer["tokens"], json!([104, 195, 164, 257]));
    assert_eq!(answer["count"], 4);
    assert_eq!(answer["max_model_len"], 4096);
    assert_eq!(answer["token_strs"][3], "</s>");
    let back = server
        .post("/detokenize", &json!({"tokens": answer["tokens"]}))
        .await
        .json();
    assert_eq!(back["prompt"], "hä</s>");
    let long = "a".repeat(100_000);
    let answer = server.post("/tokenize", &json!({"prompt": long})).await;
    assert_eq!(answer.json()["count"], 100_000, "more than the model takes");
    let messages = json!({"messages": [{"role": "user", "content": "x"}]});
    let answer = server.post("/tokenize", &messages).await.json();
    let text = server
        .post("/detokenize", &json!({"tokens": answer["tokens"]}))
        .await
        .json();
    assert_eq!(text["prompt"], "<user>x\n<assistant>");
}

#[tokio::test]
async fn what_a_chat_would_refuse_is_not_counted() {
    let server = Setup::says("").start().await;
    for (fields, param) in [
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"chat_template": "{{ 1 }}"}), "chat_template"),
        (json!({"documents": [{"text": "x"}]}), "documents"),
        (
            json!({"add_generation_prompt": true, "continue_final_message": true}),
            "continue_final_message",
        ),
    ] {
        let answer = server.post("/tokenize", &with(chat("x"), &fields)).await;
        assert_eq!(answer.status, 400, "{fields}: {}", answer.text());
        assert_eq!(answer.json()["error"]["param"], param);
    }
    let begun = json!({"continue_final_message": true});
    let answer = server.post("/tokenize", &with(chat("x"), &begun)).await;
    assert_eq!(answer.json()["count"], "<user>x".len());
}

#[tokio::test]
async fn a_prompt_of_any_length_is_cut_to_what_is_asked_for() {
    let server = Setup::says("x").start().await;
    let long = "a".repeat(100_000);
    let cut = json!({"truncate_prompt_tokens": 100, "max_tokens": 1});
    for (path, body) in [
        ("/v1/completions", json!({"prompt": long})),
        ("/v1/chat/completions", chat(&long)),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path}");
        let answer = server.post(path, &with(body, &cut)).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert_eq!(answer.json()["usage"]["prompt_tokens"], 100);
    }
}

#[tokio::test]
async fn the_model_s_files_neither_lengthen_completions_nor_make_requests_wrong() {
    let setup = Setup {
        generation_config: json!({"max_new_tokens": 512, "temperature": 3, "top_p": 0}),
        ..Setup::says("x")
    };
    let server = setup.start().await;
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/chat/completions", chat("x")),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    let seen = lock(&server.seen);
    let most: Vec<u32> = seen.requests.iter().map(|it| it.max_tokens).collect();
    assert_eq!(most, [16, 512], "as in vLLM");
    for request in &seen.requests {
        let sampling = &request.sampling;
        assert_eq!((sampling.temperature, sampling.top_p), (1.0, 1.0));
    }
}
