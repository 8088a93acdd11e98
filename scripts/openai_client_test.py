#!/usr/bin/env python3
"""Asks a running server what the official `openai` client can ask, and checks the answers.

    target/venv-client/bin/python scripts/openai_client_test.py http://127.0.0.1:8000 [--api-key KEY]

Works with any model: nothing is assumed about what it says, only that greedy answers repeat, that
streamed answers are whole ones in pieces, and that counts, offsets and errors fit together. Prints
`N passed, M failed`; exits with 1 if anything failed, with 2 if the server cannot be reached.
"""

import argparse
import asyncio
import json
import os
import sys
import time
import traceback
import urllib.error
import urllib.request

# A proxy of the environment must not stand between us and a server on this machine.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"

import openai  # noqa: E402  (the line above must come first)

CHECKS = []
QUESTION = [{"role": "user", "content": "What is 7 plus 5?"}]
STORY = "Once upon a time there was a little"


def check(function):
    """Registers a check; its first line of documentation is its name."""
    CHECKS.append(function)
    return function


class Server:
    """The server under test, through the client and without it."""

    def __init__(self, url, api_key):
        self.root = url.rstrip("/").removesuffix("/v1")
        self.api_key = api_key
        self.client = openai.OpenAI(base_url=self.root + "/v1", api_key=api_key or "none",
                                    max_retries=0, timeout=120)
        self.model = self.client.models.list().data[0].id

    def chat(self, messages=None, **fields):
        fields = {"temperature": 0, "max_tokens": 24, **fields}
        return self.client.chat.completions.create(model=self.model, messages=messages or QUESTION, **fields)

    def complete(self, prompt, **fields):
        fields = {"temperature": 0, "max_tokens": 16, **fields}
        return self.client.completions.create(model=self.model, prompt=prompt, **fields)

    def raw(self, path, body=None):
        """Status, headers and body of a request without the client."""
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def tokens(self, **body):
        status, _, answer = self.raw("/tokenize", body)
        assert status == 200, answer
        return json.loads(answer)["tokens"]


def equal(left, right):
    assert left == right, f"{left!r} is not {right!r}"


def raises(kind, call, code=None, param=None):
    """Checks that `call` raises this class of the client with OpenAI's error body."""
    try:
        answer = call()
    except openai.APIStatusError as error:
        assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
        assert isinstance(error.body, dict) and error.body.get("message"), error.body
        assert error.request_id, "no x-request-id"
        if code:
            equal(error.code, code)
        if param:
            equal(error.param, param)
    else:
        raise AssertionError(f"no error, but {answer}")


def gather(stream):
    """Text and finish reason by choice, and the usage, from chunks."""
    texts, finishes, usage, roles = {}, {}, None, {}
    for chunk in stream:
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in finishes, "a chunk after the last"
            delta = getattr(choice, "delta", None)
            text = choice.text if delta is None else delta.content or ""
            if delta is not None and delta.role:
                roles[choice.index] = roles.get(choice.index, 0) + 1
            texts[choice.index] = texts.get(choice.index, "") + text
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    assert set(texts) == set(finishes), f"choices without an end: {texts.keys()} {finishes.keys()}"
    assert all(count == 1 for count in roles.values()), f"the role is said once: {roles}"
    return texts, finishes, usage


@check
def models(server):
    """models: list, retrieve, unknown"""
    model = server.client.models.retrieve(server.model)
    equal((model.id, model.object), (server.model, "model"))
    assert model.created > 0
    raises(openai.NotFoundError, lambda: server.client.models.retrieve("no-such-model"), "model_not_found")


@check
def chat_whole(server):
    """chat: shape, usage, request id"""
    answer = server.chat()
    equal((answer.object, answer.model), ("chat.completion", server.model))
    choice = answer.choices[0]
    equal((choice.index, choice.message.role), (0, "assistant"))
    assert choice.finish_reason in ("stop", "length"), choice.finish_reason
    equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
    assert 1 <= answer.usage.completion_tokens <= 24, answer.usage
    equal(answer.usage.prompt_tokens, len(server.tokens(messages=QUESTION)))
    assert answer._request_id, "no x-request-id"


@check
def chat_repeats(server):
    """chat: greedy answers repeat, and seeds decide sampled ones"""
    equal(server.chat().choices[0].message.content, server.chat().choices[0].message.content)
    seeded = [server.chat(temperature=1.0, seed=7).choices[0].message.content for _ in range(2)]
    equal(*seeded)


@check
def chat_streamed(server):
    """chat: streamed is whole"""
    for fields in ({}, {"temperature": 1.0, "seed": 3}, {"max_tokens": 5}, {"max_completion_tokens": 3}):
        if "max_completion_tokens" in fields:
            fields["max_tokens"] = openai.omit
        whole = server.chat(**fields)
        stream = server.chat(**fields, stream=True, stream_options={"include_usage": True})
        texts, finishes, usage = gather(stream)
        equal(texts[0], whole.choices[0].message.content)
        equal(finishes[0], whole.choices[0].finish_reason)
        equal(usage.completion_tokens, whole.usage.completion_tokens)
        equal(usage.prompt_tokens, whole.usage.prompt_tokens)


@check
def chat_helper(server):
    """chat: the client's stream helper"""
    with server.client.chat.completions.stream(model=server.model, messages=QUESTION, temperature=0,
                                               max_completion_tokens=512) as stream:
        final = stream.get_final_completion()
    equal(final.choices[0].message.content,
          server.chat(max_tokens=512).choices[0].message.content)


@check
def chat_several(server):
    """chat: n = 2, whole and streamed"""
    fields = {"n": 2, "temperature": 1.0, "seed": 11}
    whole = server.chat(**fields)
    equal([choice.index for choice in whole.choices], [0, 1])
    texts, finishes, _ = gather(server.chat(**fields, stream=True))
    for choice in whole.choices:
        equal(texts[choice.index], choice.message.content)
        equal(finishes[choice.index], choice.finish_reason)


@check
def chat_stop(server):
    """chat: a stop string cuts the text before it"""
    full = server.chat(max_tokens=48).choices[0].message.content
    assert len(full) > 2, f"the model says too little to cut: {full!r}"
    for stop in {full[len(full) // 2:][:3], full[-1], full[0]}:
        answer = server.chat(max_tokens=48, stop=[stop, "\0never\0"])
        equal(answer.choices[0].message.content, full[:full.find(stop)])
        equal(answer.choices[0].finish_reason, "stop")
        texts, _, _ = gather(server.chat(max_tokens=48, stop=stop, stream=True))
        equal(texts[0], full[:full.find(stop)])
        shown = server.chat(max_tokens=48, stop=stop, extra_body={"include_stop_str_in_output": True})
        equal(shown.choices[0].message.content, full[:full.find(stop) + len(stop)])


@check
def chat_logprobs(server):
    """chat: log-probabilities"""
    answer = server.chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    equal(len(content), answer.usage.completion_tokens)
    for token in content:
        assert token.logprob <= 0, token
        equal(len(token.top_logprobs), 3)
        best = [entry.logprob for entry in token.top_logprobs]
        equal(best, sorted(best, reverse=True))
        assert abs(best[0] - token.logprob) < 1e-4, "a greedy token is the likeliest"
    spelled = b"".join(bytes(token.bytes) for token in content)
    assert spelled.startswith(answer.choices[0].message.content.encode()), spelled
    plain = server.chat()
    assert plain.choices[0].logprobs is None


@check
def completion(server):
    """completions: whole, streamed, batch"""
    first = server.complete(STORY)
    equal(first.object, "text_completion")
    texts, finishes, _ = gather(server.complete(STORY, stream=True))
    equal((texts[0], finishes[0]), (first.choices[0].text, first.choices[0].finish_reason))
    batch = server.complete([STORY, "The cow"], n=1)
    equal([choice.index for choice in batch.choices], [0, 1])
    equal(batch.choices[0].text, first.choices[0].text)
    equal(batch.choices[1].text, server.complete("The cow").choices[0].text)


@check
def completion_tokens(server):
    """completions: prompts as token ids"""
    ids = server.tokens(prompt=STORY)
    text = server.complete(STORY)
    equal(server.complete(ids).choices[0].text, text.choices[0].text)
    equal(server.complete([ids, ids]).choices[1].text, text.choices[0].text)
    equal(text.usage.prompt_tokens, len(ids))
    status, _, answer = server.raw("/detokenize", {"tokens": ids})
    equal(status, 200)
    assert STORY in json.loads(answer)["prompt"], answer


@check
def completion_echo(server):
    """completions: echo with log-probabilities"""
    answer = server.complete(STORY, echo=True, logprobs=2, max_tokens=4)
    choice = answer.choices[0]
    equal(choice.text, STORY + server.complete(STORY, max_tokens=4).choices[0].text)
    scores = choice.logprobs
    count = answer.usage.prompt_tokens + answer.usage.completion_tokens
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        equal(len(getattr(scores, name)), count)
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert all(score <= 0 for score in scores.token_logprobs[1:])
    equal(scores.text_offset, sorted(scores.text_offset))
    assert all(2 <= len(top) <= 3 for top in scores.top_logprobs[1:]), scores.top_logprobs
    # Scoring alone, as evaluations do.
    alone = server.complete(STORY, echo=True, logprobs=2, max_tokens=0)
    equal(alone.choices[0].text, STORY)
    for left, right in zip(alone.choices[0].logprobs.token_logprobs[1:], scores.token_logprobs[1:]):
        assert abs(left - right) < 1e-3, (left, right)


@check
def extras(server):
    """vllm's extra fields"""
    ids = server.tokens(prompt=STORY)
    answer = server.complete(STORY, extra_body={"return_token_ids": True, "ignore_eos": True}, max_tokens=8)
    equal(answer.choices[0].finish_reason, "length")
    produced = answer.choices[0].model_extra["token_ids"]
    equal((len(produced), answer.usage.completion_tokens), (8, 8))
    stopped = server.complete(STORY, max_tokens=8,
                              extra_body={"ignore_eos": True, "stop_token_ids": [produced[2]]})
    equal(stopped.choices[0].finish_reason, "stop")
    equal(stopped.choices[0].model_extra["stop_reason"], produced[2])
    equal(stopped.usage.completion_tokens, produced.index(produced[2]) + 1)
    only = server.complete(STORY, max_tokens=4, logit_bias={}, extra_body={
        "allowed_token_ids": [ids[-1]], "ignore_eos": True, "return_token_ids": True})
    equal(only.choices[0].model_extra["token_ids"], [ids[-1]] * 4)


@check
def one_token(server):
    """max_tokens = 1"""
    answer = server.chat(max_tokens=1)
    equal(answer.usage.completion_tokens, 1)


@check
def errors(server):
    """errors have the client's classes and say which parameter"""
    create = server.client.chat.completions.create
    raises(openai.NotFoundError, lambda: create(model="no-such", messages=QUESTION), "model_not_found", "model")
    bad = openai.BadRequestError
    raises(bad, lambda: server.chat(temperature=5), param="temperature")
    raises(bad, lambda: server.chat(n=0), param="n")
    raises(bad, lambda: server.chat(messages=[{"role": "nobody", "content": "x"}]), param="messages[0]")
    raises(bad, lambda: create(model=server.model, messages=[]), param="messages")
    raises(bad, lambda: server.chat(top_logprobs=3), param="top_logprobs")
    raises(bad, lambda: server.chat(logit_bias={"99999999": 1}), param="logit_bias")
    raises(bad, lambda: server.chat(max_tokens=100_000_000), "context_length_exceeded")
    raises(bad, lambda: server.complete([10**8]), param="prompt")
    raises(bad, lambda: server.complete([]), param="prompt")
    raises(bad, lambda: server.complete("x", logprobs=1000), param="logprobs")
    raises(bad, lambda: server.chat(tools=[{"type": "function", "function": {"name": "f"}}]), param="tools")
    raises(openai.NotFoundError, lambda: server.client.post("/no/such/route", cast_to=object, body={}))
    status, headers, _ = server.raw("/v1/chat/completions")
    equal((status, headers["allow"]), (405, "POST"))
    status, _, body = server.raw("/v1/completions", [1])
    equal((status, json.loads(body)["error"]["type"]), (400, "invalid_request_error"))


@check
def keys(server):
    """a wrong key is refused, where keys are set"""
    if not server.api_key:
        return
    stranger = openai.OpenAI(base_url=server.root + "/v1", api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, lambda: stranger.models.list(), "invalid_api_key")


@check
def raw_stream(server):
    """the bytes of a stream: data lines, one [DONE] at the end"""
    body = {"model": server.model, "messages": QUESTION, "stream": True, "max_tokens": 4}
    status, headers, bytes_ = server.raw("/v1/chat/completions", body)
    equal(status, 200)
    assert headers["content-type"].startswith("text/event-stream"), headers["content-type"]
    frames = [frame for frame in bytes_.decode().split("\n\n") if frame and not frame.startswith(":")]
    equal(frames[-1], "data: [DONE]")
    for frame in frames[:-1]:
        equal(json.loads(frame.removeprefix("data: "))["object"], "chat.completion.chunk")


@check
def abort(server):
    """a stream that is closed is cancelled"""
    stream = server.complete(STORY, max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    for _, _ in zip(range(2), stream):
        pass
    stream.close()
    deadline = time.monotonic() + 10
    while (load := json.loads(server.raw("/load")[2])["server_load"]) > 0:
        assert time.monotonic() < deadline, f"{load} requests still run"
        time.sleep(0.02)
    server.chat(max_tokens=2)


@check
def together(server):
    """eight streams at once say what each says alone"""
    prompts = [f"{STORY} {animal}" for animal in ("cat", "dog", "cow", "owl", "fox", "hen", "bee", "pig")]
    alone = [server.complete(prompt, max_tokens=12).choices[0].text for prompt in prompts]

    async def ask(client, prompt):
        stream = await client.completions.create(model=server.model, prompt=prompt, temperature=0,
                                                 max_tokens=12, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def ask_all():
        key = server.api_key or "none"
        async with openai.AsyncOpenAI(base_url=server.root + "/v1", api_key=key, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    equal(asyncio.run(ask_all()), alone)


@check
def background(server):
    """an answer that is fetched later is the one that is waited for"""
    now = server.chat().choices[0].message.content
    stored = server.client.chat.completions
    taken = server.chat(extra_body={"background": True})
    equal((taken.status, taken.choices), ("queued", []))
    begun = time.monotonic()
    while (later := stored.retrieve(taken.id)).status != "completed":
        assert later.status in ("queued", "in_progress") and time.monotonic() - begun < 60, later
        time.sleep(0.05)
    equal(later.choices[0].message.content, now)
    assert stored.delete(taken.id).deleted
    equal(server.raw(f"/v1/chat/completions/{taken.id}")[0], 404)


@check
def process(server):
    """health, readiness, version, metrics"""
    equal(server.raw("/health")[0], 200)
    equal(server.raw("/ready")[0], 200)
    assert json.loads(server.raw("/version")[2])["version"]
    assert server.raw("/metrics")[1]["content-type"].startswith("text/plain")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="where the server is, as in http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="a key the server accepts")
    parser.add_argument("--only", help="run the checks whose name has this in it")
    arguments = parser.parse_args()
    try:
        server = Server(arguments.url, arguments.api_key)
    except openai.APIError as error:
        print(f"cannot list the models of {arguments.url}: {error}", file=sys.stderr)
        return 2
    failed = passed = 0
    for function in CHECKS:
        if arguments.only and arguments.only not in function.__name__:
            continue
        name = function.__doc__.splitlines()[0]
        start = time.monotonic()
        try:
            function(server)
        except Exception as error:  # noqa: BLE001  (a failed check must not hide the others)
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[1]
            print(f"FAIL  {name}: line {where.lineno}: {type(error).__name__}: {str(error)[:500]}")
        else:
            passed += 1
            print(f"ok    {name} ({time.monotonic() - start:.2f} s)")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
