//! What chats answer, byte for byte where clients depend on it, over a scripted engine.
//! Streamed answers are compared with whole ones.

use super::client::Answer;
use super::support::{EOS, MODEL, Script, Setup, lock};
use serde_json::{Value, json};

pub(crate) fn chat(content: &str) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": content}]})
}

pub(crate) fn with(mut body: Value, fields: &Value) -> Value {
    let fields = fields.as_object().expect("fields").clone();
    body.as_object_mut().expect("a body").extend(fields);
    body
}

/// Text, finish reason and stop reason of each choice, from a whole chat answer.
fn whole_chat(answer: &Answer) -> Vec<(String, Value, Value)> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let body = answer.json();
    let choices = body["choices"].as_array().expect("choices");
    choices
        .iter()
        .map(|choice| {
            let text = choice["message"]["content"].as_str().expect("content");
            (
                text.to_owned(),
                choice["finish_reason"].clone(),
                choice["stop_reason"].clone(),
            )
        })
        .collect()
}

/// The same, put together from chunks as the SDKs do.
fn streamed_chat(answer: &Answer, n: usize) -> Vec<(String, Value, Value)> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut choices = vec![(String::new(), Value::Null, Value::Null); n];
    let mut roles = vec![0; n];
    for chunk in answer.chunks() {
        for choice in chunk["choices"].as_array().expect("choices") {
            let index = usize::try_from(choice["index"].as_u64().expect("index")).expect("small");
            let all = &mut choices[index];
            assert_eq!(all.1, Value::Null, "nothing comes after the finish reason");
            roles[index] += usize::from(choice["delta"].get("role").is_some());
            all.0 += choice["delta"]["content"].as_str().unwrap_or("");
            all.1 = choice["finish_reason"].clone();
            all.2 = choice.get("stop_reason").cloned().unwrap_or_default();
        }
    }
    assert_eq!(roles, vec![1; n], "the role is said once");
    choices
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let server = Setup::says("x").start().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["object"], "model");
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    assert!(list["data"][0]["created"].as_u64().unwrap() > 1_700_000_000);
    let other = server.get("/v1/models/org/other%20name").await;
    assert_eq!(
        (other.status, &other.json()["id"]),
        (200, &json!("org/other name"))
    );
    let none = server.get("/v1/models/none").await;
    assert_eq!(none.status, 404);
    assert_eq!(none.json()["error"]["code"], "model_not_found");
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let server = Setup::says("Grüße ☃!").start().await;
    let answer = server.post("/v1/chat/completions", &chat("hi")).await;
    let body = answer.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], MODEL);
    let id = format!("chatcmpl-{}", answer.header("x-request-id").unwrap());
    assert_eq!(body["id"], id.as_str());
    assert_eq!(body["choices"][0]["message"]["role"], "assistant");
    assert_eq!(
        whole_chat(&answer),
        [("Grüße ☃!".into(), json!("stop"), Value::Null)]
    );
    // "<user>hi\n<assistant>" and "Grüße ☃!" with its end of text, all bytes.
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 20, "total_tokens": 33, "completion_tokens": 13,
               "prompt_tokens_details": {"cached_tokens": 3}})
    );
    let seen = lock(&server.seen);
    let prompt: Vec<u8> = seen.requests[0]
        .prompt
        .iter()
        .map(|&id| u8::try_from(id).unwrap())
        .collect();
    assert_eq!(prompt, b"<user>hi\n<assistant>");
    assert_eq!(seen.requests[0].max_tokens, 4096 - 20);
    assert_eq!(seen.requests[0].stop_token_ids, [EOS]);
}

#[tokio::test]
async fn the_bytes_of_a_stream_are_what_sdks_parse() {
    let server = Setup::says("ab").start().await;
    let body = with(
        chat("hi"),
        &json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    let headers = [("x-request-id", "req-7")];
    let answer = server
        .send(
            "POST",
            "/v1/chat/completions",
            &headers,
            body.to_string().as_bytes(),
        )
        .await;
    assert_eq!(
        answer.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    assert_eq!(answer.header("x-request-id"), Some("req-7"));
    let created = answer.chunks()[0]["created"].as_u64().unwrap();
    let chunk = |choices: &str, usage: &str| {
        format!(
            "data: {{\"id\":\"chatcmpl-req-7\",\"object\":\"chat.completion.chunk\",\
             \"created\":{created},\"model\":\"test-model\",\"choices\":[{choices}],\
             \"usage\":{usage}}}\n\n"
        )
    };
    let choice = |delta: &str, finish: &str| {
        chunk(
            &format!(
                "{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\"finish_reason\":{finish}}}"
            ),
            "null",
        )
    };
    let expected = choice("{\"role\":\"assistant\",\"content\":\"\"}", "null")
        + &choice("{\"content\":\"a\"}", "null")
        + &choice("{\"content\":\"b\"}", "null")
        + &choice("{}", "\"stop\"")
        + &chunk(
            "",
            "{\"prompt_tokens\":20,\"total_tokens\":23,\"completion_tokens\":3,\
             \"prompt_tokens_details\":{\"cached_tokens\":3}}",
        )
        + "data: [DONE]\n\n";
    assert_eq!(answer.text(), expected);
}

#[tokio::test]
async fn streamed_is_whole() {
    let text = "One, two ☃☃ three; END of four.";
    let server = Setup::new(move |requests| {
        let script = |i: usize| match i {
            0 => Script::Text(text.to_owned()),
            // Half a character in the middle and at the end.
            1 => Script::Tokens(vec![0xE2, 0x98, 0x41, 0xC3, 0xA4, 0xF0, 0x9F]),
            _ => Script::Text(format!("{i} {text}")),
        };
        (0..requests.len()).map(script).collect()
    })
    .start()
    .await;
    for fields in [
        json!({}),
        json!({"n": 4}),
        json!({"n": 3, "stop": ["END", "☃ t"]}),
        json!({"n": 2, "stop": "☃", "include_stop_str_in_output": true}),
        json!({"stop": ["four.", "o, two"], "max_tokens": 9}),
        json!({"n": 3, "stop_token_ids": [59], "min_tokens": 2}),
        json!({"ignore_eos": true}),
        json!({"stop": "One", "min_tokens": 5}),
        json!({"n": 2, "max_completion_tokens": 5}),
    ] {
        let n = usize::try_from(fields["n"].as_u64().unwrap_or(1)).unwrap();
        let body = with(chat("hi"), &fields);
        let whole = server.post("/v1/chat/completions", &body).await;
        let body = with(body, &json!({"stream": true}));
        let streamed = server.post("/v1/chat/completions", &body).await;
        assert_eq!(streamed_chat(&streamed, n), whole_chat(&whole), "{fields}");
    }
}

#[tokio::test]
async fn stop_strings_cut_the_text_and_cancel_their_choice_alone() {
    let server = Setup::new(|requests| {
        let mut scripts = vec![Script::Text("Well, hello there".to_owned()); requests.len()];
        scripts[0] = Script::Text("abc STOP".to_owned() + &"z".repeat(1000));
        scripts
    })
    .start()
    .await;
    let body = with(chat("hi"), &json!({"n": 2, "stop": ["STOP", "o t"]}));
    let answer = server.post("/v1/chat/completions", &body).await;
    assert_eq!(
        whole_chat(&answer),
        [
            ("abc ".into(), json!("stop"), json!("STOP")),
            ("Well, hell".into(), json!("stop"), json!("o t")),
        ]
    );
    let usage = &answer.json()["usage"];
    assert_eq!(
        usage["completion_tokens"],
        8 + 13,
        "tokens up to the end of the stop string"
    );
    server.until_cancelled(2).await;
    for (choice, sent) in &lock(&server.seen).cancelled {
        assert!(*sent < 60, "choice {choice} went on for {sent} tokens");
    }
}

#[tokio::test]
async fn stop_tokens_leave_no_text_and_are_named() {
    let server = Setup::says("abXcd").start().await;
    let ask = async |fields: Value| {
        let answer = server
            .post("/v1/chat/completions", &with(chat("hi"), &fields))
            .await;
        whole_chat(&answer).remove(0)
    };
    assert_eq!(
        ask(json!({"stop_token_ids": [88]})).await,
        ("ab".into(), json!("stop"), json!(88))
    );
    let shown = json!({"stop_token_ids": [88], "include_stop_str_in_output": true});
    assert_eq!(ask(shown).await, ("abX".into(), json!("stop"), json!(88)));
    assert_eq!(
        ask(json!({"max_tokens": 2})).await,
        ("ab".into(), json!("length"), Value::Null)
    );
    let special = json!({"skip_special_tokens": false, "ignore_eos": true});
    assert_eq!(
        ask(special).await,
        ("abXcd</s>".into(), json!("length"), Value::Null)
    );
}

#[tokio::test]
async fn chat_logprobs_show_tokens_with_their_bytes() {
    let server = Setup::says("aä").start().await;
    let fields = json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 3});
    let whole = server
        .post("/v1/chat/completions", &with(chat("hi"), &fields))
        .await
        .json();
    let content = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 3);
    assert_eq!(
        content[0],
        json!({"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
            {"token": "A", "logprob": -1.0, "bytes": [65]},
            {"token": "B", "logprob": -2.0, "bytes": [66]}]})
    );
    assert_eq!(content[1]["token"], "bytes:\\xc3");
    assert_eq!(
        (&content[1]["bytes"], &content[2]["bytes"]),
        (&json!([0xC3]), &json!([0xA4]))
    );
    let body = with(with(chat("hi"), &fields), &json!({"stream": true}));
    let chunks = server.post("/v1/chat/completions", &body).await.chunks();
    let streamed: Vec<Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(&streamed, content);
    let plain = server
        .post("/v1/chat/completions", &chat("hi"))
        .await
        .json();
    assert_eq!(plain["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn conversations_are_rendered_by_the_model_s_template() {
    let server = Setup::says("ok").start().await;
    let render = async |messages: Value, fields: Value| {
        let body = with(json!({"messages": messages}), &fields);
        let answer = server.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let prompt = lock(&server.seen).requests.last().unwrap().prompt.clone();
        prompt
            .iter()
            .map(|&id| char::from(u8::try_from(id).unwrap()))
            .collect::<String>()
    };
    let parts = json!([{"role": "developer", "content": "be kind"},
                       {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(
        render(parts, json!({})).await,
        "<system>be kind\n<user>a\nb\n<assistant>"
    );
    let user = json!([{"role": "user", "content": "a"}]);
    assert_eq!(
        render(user, json!({"add_generation_prompt": false})).await,
        "<user>a\n"
    );
    let begun = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "The "}]);
    let text = render(begun, json!({"continue_final_message": true})).await;
    assert_eq!(text, "<user>a\n<assistant>The ");
    let raised = json!({"messages": [{"role": "tool", "content": "x"}]});
    let answer = server.post("/v1/chat/completions", &raised).await;
    assert_eq!(
        (answer.status, &answer.json()["error"]["message"]),
        (400, &json!("Begin with a user."))
    );

    let plain = Setup {
        template: None,
        ..Setup::says("ok")
    }
    .start()
    .await;
    let answer = plain.post("/v1/chat/completions", &chat("hi")).await;
    assert_eq!(answer.status, 400);
    assert!(
        answer.text().contains("no chat template"),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_template_is_given_the_request_s_variables() {
    let template = "{{ messages[0].content }}{% if enable_thinking is defined and enable_thinking is false %}\
                    <think></think>{% endif %}{{ style.words if style else '' }}";
    let setup = Setup {
        template: Some(template),
        ..Setup::says("ok")
    };
    let server = setup.start().await;
    for (variables, text) in [
        (Value::Null, "hi"),
        (json!({}), "hi"),
        (json!({"enable_thinking": true}), "hi"),
        (json!({"enable_thinking": false}), "hi<think></think>"),
        (json!({"style": {"words": 7}, "unused": [1]}), "hi7"),
    ] {
        let body = with(chat("hi"), &json!({"chat_template_kwargs": variables}));
        let answer = server.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let prompt = lock(&server.seen).requests.last().unwrap().prompt.clone();
        let bytes = prompt.iter().map(|&id| u8::try_from(id).unwrap());
        assert_eq!(bytes.collect::<Vec<_>>(), text.as_bytes());
        let counted = server.post("/tokenize", &body).await.json();
        assert_eq!(counted["count"], text.len());
    }
    for wrong in [
        json!({"messages": []}),
        json!({"bos_token": "x"}),
        json!({"text": "x".repeat(20_000)}),
        json!([]),
        json!("enable_thinking"),
    ] {
        let body = with(chat("hi"), &json!({"chat_template_kwargs": wrong}));
        for path in ["/v1/chat/completions", "/tokenize"] {
            let answer = server.post(path, &body).await;
            assert_eq!(answer.status, 400, "{wrong}: {}", answer.text());
            let error = &answer.json()["error"];
            let param = error["param"].as_str().expect("it is named");
            assert!(param.starts_with("chat_template_kwargs"), "{error}");
        }
    }
}

#[tokio::test]
async fn the_model_s_own_defaults_give_way_to_the_request() {
    let setup = Setup {
        generation_config: json!({"temperature": 0.25, "top_k": 7, "top_p": 0.5, "min_p": 0.125,
            "repetition_penalty": 1.5, "max_new_tokens": 9, "eos_token_id": [33]}),
        has_priorities: true,
        ..Setup::says("ab!cd")
    };
    let server = setup.start().await;
    let answer = server.post("/v1/chat/completions", &chat("hi")).await;
    assert_eq!(whole_chat(&answer)[0].0, "ab", "33 is `!`");
    let fields = json!({"temperature": 1, "top_k": -1, "top_p": 1, "min_p": 0,
        "repetition_penalty": 1, "max_tokens": 4, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {"5": -100, "9": 1.5}, "allowed_token_ids": [97], "priority": -3, "seed": 42});
    server
        .post("/v1/chat/completions", &with(chat("hi"), &fields))
        .await;
    let seen = lock(&server.seen);
    let [first, second] = &seen.requests[..] else {
        panic!("{:?}", seen.requests)
    };
    let default = &first.sampling;
    assert_eq!(
        (default.temperature, default.top_k, default.top_p),
        (0.25, 7, 0.5)
    );
    assert_eq!(
        (default.min_p, default.repetition_penalty, first.max_tokens),
        (0.125, 1.5, 9)
    );
    assert_eq!(first.stop_token_ids, [33, EOS]);
    let own = &second.sampling;
    assert_eq!(
        (own.temperature, own.top_k, own.top_p, own.min_p),
        (1.0, 0, 1.0, 0.0)
    );
    assert_eq!(
        (own.presence_penalty, own.frequency_penalty, own.seed),
        (0.5, -0.5, 42)
    );
    assert_eq!(
        own.logit_bias
            .iter()
            .map(|it| (it.token, it.bias))
            .collect::<Vec<_>>(),
        [(5, -100.0), (9, 1.5)]
    );
    assert_eq!(
        (&*own.allowed_token_ids, second.priority, second.max_tokens),
        (&[97][..], -3, 4)
    );
    assert_ne!(first.sampling.seed, second.sampling.seed);
}
