//! Requests that have taken servers down, each named after its case, and the sentence they get here.
//!
//! A refused request must not reach the engine, and must be refused quickly. Cases are lines of
//! `name | fields or body | parameter that the error names`.

use super::client::Answer;
use super::support::{EOS, MODEL, Script, Server, Setup, VOCAB, lock};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Fields on top of a sound request, for both routes. `NAME` is a text of 129 letters.
const PARAMETERS: &str = r#"
vLLM CVE-2026-34756: n | {"n": 5000000} | n
SGLang #36856: n | {"n": 1000000} | n
n of 0 | {"n": 0} | n
n below 0 | {"n": -1} | n
n of one and a half | {"n": 1.5} | n
n of 2^64 - 1 | {"n": 18446744073709551615} | n
best_of | {"n": 1, "best_of": 4} | best_of
best_of of 10^6 | {"best_of": 1000000} | best_of
out-of-vocabulary bias, vLLM #16529 | {"logit_bias": {"258": 1}} | logit_bias
out-of-vocabulary bias, SGLang #7670 | {"logit_bias": {"4294967295": 1}} | logit_bias
bias of no token, vLLM #6866 | {"logit_bias": {"-1": 1}} | logit_bias
bias of a word | {"logit_bias": {"x": 1}} | logit_bias
bias that is too strong | {"logit_bias": {"1": 101}} | logit_bias
bias that is a list | {"logit_bias": [1]} | logit_bias
GHSA-m9fh-2f8w-jhw9: bad_words | {"bad_words": ["a"]} | bad_words
allowed beyond the vocabulary | {"allowed_token_ids": [258]} | allowed_token_ids
stop ids below 0 | {"stop_token_ids": [-1]} | stop_token_ids
stop ids beyond the vocabulary | {"stop_token_ids": [9999]} | stop_token_ids
empty stop | {"stop": [""]} | stop
stop of a number | {"stop": 1} | stop
TRT-LLM #6329: top_k | {"top_k": -2} | top_k
top_k that wraps to -1 | {"top_k": 18446744073709551615} | top_k
top_k of 10^20 | {"top_k": 1e20} | top_k
TRT-LLM #7692: max_tokens of 0 | {"max_tokens": 0} | max_tokens
max_tokens below 0 | {"max_tokens": -5} | max_tokens
max_tokens beyond 2^32 | {"max_tokens": 1099511627776} | max_tokens
max_tokens beyond the model | {"max_tokens": 100000} |
max_completion_tokens of 0 | {"max_completion_tokens": 0} | max_completion_tokens
min_tokens above max_tokens | {"min_tokens": 9, "max_tokens": 3} | min_tokens
min_tokens below 0 | {"min_tokens": -1} | min_tokens
TRT-LLM #7145: beams | {"use_beam_search": true, "stop_token_ids": [1]} | use_beam_search
llama.cpp #19367: temperature | {"temperature": 999999} | temperature
temperature below 0 | {"temperature": -0.1} | temperature
temperature as text | {"temperature": "hot"} | temperature
llama.cpp #19367: top_p | {"top_p": -1} | top_p
top_p of 0 | {"top_p": 0} | top_p
llama.cpp #19367: repetition | {"repetition_penalty": 0} | repetition_penalty
min_p | {"min_p": 2} | min_p
presence_penalty | {"presence_penalty": 2.5} | presence_penalty
frequency_penalty | {"frequency_penalty": -3} | frequency_penalty
seed of a text | {"seed": "x"} | seed
priority | {"priority": 1099511627776} | priority
priority that wraps to -1 | {"priority": 18446744073709551615} | priority
a priority that nobody allowed | {"priority": -1} | priority
empty salt | {"cache_salt": ""} | cache_salt
truncation to nothing | {"truncate_prompt_tokens": 0} | truncate_prompt_tokens
vLLM #5907: prompt_logprobs | {"prompt_logprobs": 1000} | prompt_logprobs
prompt_logprobs of a stream | {"prompt_logprobs": 1, "stream": true} | prompt_logprobs
stream options without stream | {"stream_options": {}} | stream_options
stream options as a list | {"stream": true, "stream_options": [true]} | stream_options
stop ids as texts | {"stop_token_ids": ["a"]} | stop_token_ids
vLLM #17313: an invalid regex | {"structured_outputs": {"regex": "[a"}} | structured_outputs
vLLM #45118: a regex bomb | {"guided_regex": "((a{1,1000}){1,1000}){1,1000}"} | guided_regex
llama.cpp PR #22606: a regex | {"guided_regex": "^+[a-z]$"} | guided_regex
vLLM #54003: oneOf | {"response_format": {"type": "json_schema", "json_schema": {}}} | response_format
vLLM #47312: a grammar | {"guided_grammar": "root ::= x"} | guided_grammar
vLLM CVE-2025-48944: tools | {"tools": [{"type": "function", "function": {"name": 1}}]} | tools
vLLM CVE-2025-62426: kwargs | {"chat_template_kwargs": {"tokenize": true}} | chat_template_kwargs
SGLang CVE-2026-5760: template | {"chat_template": "{{ x }}"} | chat_template
suffix | {"suffix": "x"} | suffix
storing | {"store": true} | store
a prediction | {"prediction": {"type": "content", "content": "x"}} | prediction
a penalty of beams | {"length_penalty": 2} | length_penalty
no spaces | {"spaces_between_special_tokens": false} | spaces_between_special_tokens
no reasoning | {"include_reasoning": false} | include_reasoning
verbosity | {"verbosity": "high"} | verbosity
an empty name | {"request_id": ""} | request_id
a long name | {"request_id": "NAME"} | request_id
a name of two lines | {"request_id": "a\nb"} | request_id
a name that is not ASCII | {"request_id": "ä"} | request_id
a name that is a number | {"request_id": 7} | request_id
a name for a background request | {"request_id": "a", "background": true} | request_id
"#;

/// Bodies for `/v1/completions`.
const COMPLETIONS: &str = r#"
SGLang #36856: out-of-vocabulary prompt | {"prompt": [1, 258]} | prompt
prompt of 2^32 | {"prompt": [4294967296]} | prompt
prompt of negative ids | {"prompt": [[-1]]} | prompt
empty prompt | {"prompt": ""} | prompt
empty list | {"prompt": []} | prompt
an empty prompt among others | {"prompt": [[1], []]} | prompt
texts and ids | {"prompt": ["a", 1]} | prompt
no prompt | {"echo": true} |
null prompt | {"prompt": null} | prompt
SGLang #40076: logprobs | {"prompt": "a", "logprobs": 1000000000} | logprobs
logprobs below 0 | {"prompt": "a", "logprobs": -1} | logprobs
logprobs as in chat | {"prompt": "a", "logprobs": true} | logprobs
a number too large | {"prompt": "a", "temperature": 1e999} |
a field twice | {"prompt": "a", "n": 1, "n": 2} |
"#;

/// Bodies for `/v1/chat/completions`; `USER` is a sound list of messages.
const CHATS: &str = r#"
no messages | {} |
empty messages | {"messages": []} | messages
messages as text | {"messages": "hi"} | messages
a role no one has | {"messages": [{"role": "x", "content": "y"}]} | messages[0]
a message as a list | {"messages": [["user", "hi"]]} | messages[0]
a part as a list | {"messages": [{"role": "user", "content": [["text", "x"]]}]} | messages[0].content[0]
no content | {"messages": [{"role": "user"}]} | messages[0]
SSRF, TGI CVE-2026-0599 | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]} | messages[0].content
SGLang #36856: top_logprobs | {"messages": USER, "logprobs": true, "top_logprobs": 1000000} | top_logprobs
top_logprobs alone | {"messages": USER, "top_logprobs": 2} | top_logprobs
two endings | {"messages": USER, "add_generation_prompt": true, "continue_final_message": true} | continue_final
echo | {"messages": USER, "echo": true} | echo
audio | {"messages": USER, "modalities": ["audio"]} | modalities
tool_choice | {"messages": USER, "tool_choice": "required"} | tool_choice
functions | {"messages": USER, "functions": [{}]} | functions
"#;

/// Bodies for every route.
const BODIES: &str = r#"
no body | |
no JSON | hello |
a list | [1] |
a list in the order of the fields | [null, "a"] |
null | null |
a bare number | 1e999 |
half a body | {"prompt": "a |
two bodies | {"prompt": "a"}{} |
a number that is none | {"prompt": "a", "temperature": NaN} |
half a surrogate | {"prompt": "\ud800"} |
"#;

fn cases(table: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    table.trim().lines().map(|line| {
        let (case, rest) = line.split_once(" | ").expect("a name");
        let (body, param) = rest.rsplit_once('|').expect("a body");
        (case, body.trim(), param.trim())
    })
}

async fn post(server: &Server, case: &str, path: &str, body: &[u8]) -> Answer {
    let sent = server.send("POST", path, &[], body);
    let answer = tokio::time::timeout(Duration::from_secs(5), sent).await;
    answer.unwrap_or_else(|_| panic!("{case}: no answer in time"))
}

fn check(case: &str, answer: &Answer, status: u16, param: &str) {
    assert_eq!(answer.status, status, "{case}: {}", answer.text());
    let error = &answer.json()["error"];
    let message = error["message"].as_str().unwrap_or_default();
    assert!((11..1100).contains(&message.len()), "{case}: {error}");
    for ours in ["struct ", "u32", "f64", "i64"] {
        assert!(
            !message.contains(ours),
            "{case}: {message} speaks of {ours}"
        );
    }
    assert_eq!(error["type"], "invalid_request_error", "{case}");
    let named = error["param"].as_str().unwrap_or_default();
    assert!(
        named.starts_with(param),
        "{case}: {error} does not name {param}"
    );
    assert!(answer.header("x-request-id").is_some(), "{case}");
}

async fn refused(server: &Server, case: &str, path: &str, body: &[u8], param: &str) {
    check(case, &post(server, case, path, body).await, 400, param);
}

#[tokio::test]
async fn absurd_parameters_get_400_and_never_reach_the_engine() {
    let server = Setup::says("x").start().await;
    let biases: Map<String, Value> = (0..1025).map(|id| (id.to_string(), json!(1))).collect();
    let mut all: Vec<(&str, Value, &str)> = cases(PARAMETERS)
        .map(|(case, fields, param)| {
            let fields = fields.replace("NAME", &"x".repeat(129));
            let fields = serde_json::from_str(&fields).unwrap_or_else(|it| panic!("{case}: {it}"));
            (case, fields, param)
        })
        .collect();
    all.extend([
        (
            "GHSA-4fv6-24cq-h5pw",
            json!({"logit_bias": biases}),
            "logit_bias",
        ),
        (
            "GHSA-83mh-6mwq-3hg9",
            json!({"allowed_token_ids": vec![1; 1025]}),
            "allowed_token_ids",
        ),
        (
            "GHSA-q9q8-922v-2c42",
            json!({"stop_token_ids": vec![1; 129]}),
            "stop_token_ids",
        ),
        (
            "GHSA-rp22-rc8r-qjmh",
            json!({"stop": vec!["x"; 17]}),
            "stop",
        ),
        ("long stop", json!({"stop": "x".repeat(1025)}), "stop"),
        (
            "llama.cpp #26600",
            json!({"guided_grammar": "(".repeat(60_000)}),
            "guided_grammar",
        ),
    ]);
    for (path, base) in [
        ("/v1/completions", json!({"model": MODEL, "prompt": "hi"})),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "hi"}]}),
        ),
    ] {
        for (case, fields, param) in &all {
            let mut body = base.as_object().expect("an object").clone();
            body.extend(fields.as_object().expect("fields").clone());
            let body = Value::from(body).to_string();
            refused(&server, case, path, body.as_bytes(), param).await;
        }
    }
    assert!(lock(&server.seen).requests.is_empty());
}

#[tokio::test]
async fn no_shard_is_asked_for_what_is_not_in_the_vocabulary() {
    let mut setup = Setup::says("x");
    setup.limits.max_logprobs = 1000;
    setup.generation_config = json!({"eos_token_id": [VOCAB + 40, 7, VOCAB]});
    let server = setup.start().await;
    for param in ["logprobs", "prompt_logprobs"] {
        let body = json!({"prompt": "hi", param: VOCAB + 1}).to_string();
        let path = "/v1/completions";
        refused(&server, "all and one more", path, body.as_bytes(), param).await;
    }
    assert!(lock(&server.seen).requests.is_empty());
    let body = json!({"prompt": "hi", "logprobs": VOCAB, "min_tokens": 1});
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(lock(&server.seen).requests[0].stop_token_ids, [7, EOS]);
}

#[tokio::test]
async fn absurd_prompts_get_400() {
    let server = Setup::says("x").start().await;
    let path = "/v1/completions";
    for (case, body, param) in cases(COMPLETIONS) {
        refused(&server, case, path, body.as_bytes(), param).await;
    }
    for (case, body, param) in [
        (
            "too many prompts",
            json!({"prompt": vec!["a"; 129]}),
            "prompt",
        ),
        (
            "too many choices",
            json!({"prompt": vec!["a"; 100], "n": 2}),
            "prompt",
        ),
        (
            "TRT-LLM #9760, vllm-metal #200",
            json!({"prompt": vec![1; 5000]}),
            "",
        ),
        (
            "vLLM #10635: megabytes to tokenise",
            json!({"prompt": "a".repeat(3 << 20)}),
            "",
        ),
    ] {
        refused(&server, case, path, body.to_string().as_bytes(), param).await;
    }
    refused(&server, "not UTF-8", path, b"{\"prompt\": \"\xff\"}", "").await;
    assert!(lock(&server.seen).requests.is_empty());
}

#[tokio::test]
async fn scores_of_prompts_are_bounded_in_all() {
    let server = Setup::says("x").start().await;
    let path = "/v1/completions";
    let prompt = vec![1; 4000];
    for (case, body, param) in [
        (
            "many choices",
            json!({"prompt": prompt, "prompt_logprobs": 20, "n": 13}),
            "prompt_logprobs",
        ),
        (
            "many prompts, echoed",
            json!({"prompt": vec![prompt.clone(); 66], "echo": true, "logprobs": 3, "max_tokens": 0}),
            "logprobs",
        ),
        (
            "many prompts, echoed, and more alternatives of them",
            json!({"prompt": vec![prompt.clone(); 66], "echo": true, "logprobs": 3, "prompt_logprobs": 4}),
            "prompt_logprobs",
        ),
    ] {
        refused(&server, case, path, body.to_string().as_bytes(), param).await;
    }
    assert!(lock(&server.seen).requests.is_empty());
    // Long enough to be written aside.
    let body = json!({"prompt": prompt, "prompt_logprobs": 20, "n": 2, "max_tokens": 1});
    let answer = server.post(path, &body).await.json();
    for choice in 0..2 {
        let scores = answer["choices"][choice]["prompt_logprobs"].as_array();
        let scores = scores.expect("a list");
        assert_eq!((scores.len(), &scores[0]), (4000, &Value::Null));
        // The token itself is none of its alternatives.
        assert!(
            scores[1..]
                .iter()
                .all(|it| it.as_object().is_some_and(|it| it.len() == 21))
        );
    }
}

#[tokio::test]
async fn absurd_conversations_get_400() {
    let server = Setup::says("x").start().await;
    let path = "/v1/chat/completions";
    for (case, body, param) in cases(CHATS) {
        let body = body.replace("USER", r#"[{"role": "user", "content": "hi"}]"#);
        refused(&server, case, path, body.as_bytes(), param).await;
    }
    let many = vec![json!({"role": "user", "content": ""}); 4097];
    let many = json!({"messages": many}).to_string();
    refused(
        &server,
        "too many messages",
        path,
        many.as_bytes(),
        "messages",
    )
    .await;
    let long = json!({"messages": [{"role": "user", "content": "a".repeat(3 << 20)}]}).to_string();
    refused(&server, "a long message", path, long.as_bytes(), "").await;
    assert!(lock(&server.seen).requests.is_empty());
}

#[tokio::test]
async fn absurd_bodies_get_400_on_every_route() {
    let server = Setup::says("x").start().await;
    // Triton CVE-2025-23310's kind: nesting must not reach the stack's end.
    let deep = "[".repeat(100_000);
    let inside = format!("{{\"prompt\": \"a\", \"x\": {deep}");
    for path in [
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
    ] {
        for (case, body, param) in cases(BODIES) {
            refused(&server, case, path, body.as_bytes(), param).await;
        }
        refused(&server, "nesting", path, deep.as_bytes(), "").await;
        refused(
            &server,
            "nesting in an unknown field",
            path,
            inside.as_bytes(),
            "",
        )
        .await;
    }
    refused(
        &server,
        "ids",
        "/detokenize",
        br#"{"tokens": [258]}"#,
        "tokens",
    )
    .await;
    refused(
        &server,
        "both",
        "/tokenize",
        br#"{"prompt": "a", "messages": []}"#,
        "",
    )
    .await;
    assert!(lock(&server.seen).requests.is_empty());
}

#[tokio::test]
async fn absurd_output_does_not_break_json() {
    // llama.cpp #11738: bytes that are no text.
    let bytes: Vec<u8> = (128..=255).chain(0..32).chain([0xFF, 0xF4, 0x90]).collect();
    let tokens = bytes.iter().map(|&byte| u32::from(byte)).collect();
    let server = Setup::always(Script::Tokens(tokens)).start().await;
    let body = json!({"prompt": "a", "max_tokens": 4000, "logprobs": 5, "ignore_eos": true});
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(
        answer.json()["choices"][0]["text"],
        *String::from_utf8_lossy(&bytes)
    );
}

#[tokio::test]
async fn what_is_neutral_or_unknown_is_accepted() {
    let server = Setup::says("x").start().await;
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi", "weight": 1}],
        "user": "u", "metadata": {"a": [1]}, "store": false, "service_tier": "auto", "stop": null,
        "parallel_tool_calls": false, "tools": [], "tool_choice": "none", "logprobs": false,
        "response_format": {"type": "text"}, "n": 1.0, "best_of": 1, "max_tokens": null, "top_k": 0,
        "temperature": 0, "spaces_between_special_tokens": true, "unheard_of": {"x": null},
        "stream": false, "logit_bias": {}, "stop_token_ids": [], "seed": -1, "top_logprobs": 0});
    let answer = server.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn wrong_routes_methods_and_sizes_have_their_status() {
    let server = Setup::says("x").start().await;
    let answer = post(&server, "", "/v2/completions", b"{}").await;
    check("unknown route", &answer, 404, "");
    check(
        "wrong method",
        &post(&server, "", "/v1/models", b"{}").await,
        405,
        "",
    );
    let answer = server.get("/v1/completions").await;
    assert_eq!((answer.status, answer.header("allow")), (405, Some("POST")));
    let body = br#"{"model": "gpt-x", "prompt": "a"}"#;
    let answer = post(&server, "", "/v1/completions", body).await;
    check("unknown model", &answer, 404, "model");
    let large = vec![b' '; (4 << 20) + 1];
    check(
        "large body",
        &post(&server, "", "/v1/completions", &large).await,
        413,
        "",
    );
    // Without a length: chunks until the limit.
    let chunk = [
        b"500000\r\n",
        vec![b' '; 0x50_0000].as_slice(),
        b"\r\n0\r\n\r\n",
    ]
    .concat();
    let headers = [("transfer-encoding", "chunked")];
    let answer = server
        .send("POST", "/v1/completions", &headers, &chunk)
        .await;
    check("large chunked body", &answer, 413, "");
    // CVE-2025-48956: a huge header.
    let huge = "x".repeat(100 << 10);
    let answer = server
        .send("GET", "/health", &[("x-huge", &huge)], b"")
        .await;
    assert_eq!(answer.status, 431);
    let names: Vec<String> = (0..200).map(|i| format!("x-{i}")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "y")).collect();
    assert_eq!(server.send("GET", "/health", &many, b"").await.status, 431);
}
