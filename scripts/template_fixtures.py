#!/usr/bin/env python3
"""Renders the chat templates of `scripts/templates/` with `transformers`, as an oracle for ours.

    target/venv/bin/python scripts/template_fixtures.py            write the fixture
    target/venv/bin/python scripts/template_fixtures.py --check    compare with the committed one

Writes `coordinator/tests/fixtures/templates.json`, a list of

    {name, template, messages, kwargs, bos_token, eos_token, add_generation_prompt, now,
     rendered | (error, error_kind)}

where `name` is `template/conversation`, `kwargs` holds `tools` and the template's own variables,
a null token is not passed to the template at all, and `now` is what the clock shows
(`strftime_now` formats it as local time). `error_kind` is `raised` where the template called
`raise_exception` (the message is the template's own), `template` for any other failure (only that
it fails is meaningful). As in `transformers`, `tools` and `documents` are always defined: none
when they are not given.

The templates are written for this purpose, in the manner of published ones; they deliberately
cover the constructs that a second implementation of Jinja gets wrong.
"""

import argparse
import json
from datetime import datetime
from pathlib import Path

import jinja2
from transformers.utils import chat_template_utils

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "scripts" / "templates"
OUTPUT = ROOT / "coordinator" / "tests" / "fixtures" / "templates.json"

NOW = datetime(2026, 3, 9, 14, 5, 7)


class FrozenClock(datetime):
    """The clock that `strftime_now` reads."""

    @classmethod
    def now(cls, tz=None):
        return NOW


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def function(name, description, properties, required, **more):
    parameters = {"type": "object", "properties": properties, "required": required}
    body = {"name": name, "description": description, "parameters": parameters, **more}
    return {"type": "function", "function": body}


def call(name, arguments, call_id="abc123XYZ"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = function(
    "weather",
    'Weather "now" & later,\n in <degrees> °C.  ',
    {
        "city": {"type": "string", "description": "Where: Zürich, 東京"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "hours": {"type": "array", "items": {"type": "integer"}},
        "limit": {"type": "number", "minimum": 0.5},
    },
    ["city"],
)
SEARCH = function(
    "search",
    "Look something up.",
    {
        "query": {"type": "string"},
        "filter": {
            "type": "object",
            "properties": {"year": {"type": "integer"}, "deep": {"type": "object"}},
        },
    },
    ["query", "filter"],
    strict=True,
)

HELLO = [said("user", "Hello!")]
SPACES = [said("user", "  two  spaces\nand a line \n\n")]
DIALOGUE = [
    said("user", "What is 7 plus 5?"),
    said("assistant", " Twelve. "),
    said("user", "And <3 & 'quotes' \"too\"? 🙂"),
]
WITH_SYSTEM = [said("system", "  Be kind. "), *DIALOGUE]
LATE_SYSTEM = [*HELLO, said("system", "Too late?")]
TWO_USERS = [*HELLO, said("user", "Anyone?")]
NARRATOR = [*HELLO, said("narrator", "The wind blows.")]
ENDS_WITH_ASSISTANT = DIALOGUE[:2]
SYSTEM_ONLY = [said("system", "Only rules.")]
WEATHER_ARGUMENTS = {"city": "Zürich", "hours": [1, 2], "limit": 1.5, "unit": None}
TOOL_USE = [
    said("system", "Use tools."),
    said("user", "Weather in Zürich?"),
    said("assistant", "", tool_calls=[call("weather", WEATHER_ARGUMENTS)]),
    said("tool", '{"degrees": 21.5}', tool_call_id="abc123XYZ"),
    said("assistant", "It is 21.5 °C."),
    said("user", "Thanks, and tomorrow?"),
]
TWO_CALLS = [
    said("user", "Compare Oslo and Rome."),
    said(
        "assistant",
        "Let me look.",
        tool_calls=[
            call("weather", {"city": "Oslo"}),
            call("weather", '{"city":"Rome"}', "123456789"),
        ],
    ),
    said("tool", "4", tool_call_id="abc123XYZ"),
    said("tool", "19", tool_call_id="123456789"),
]
SHORT_ID = [
    said("user", "Go"),
    said("assistant", None, tool_calls=[call("search", {"query": "x", "filter": {}}, "short")]),
]
MAPPING_RESULT = [
    said("user", "Go"),
    said("assistant", None, tool_calls=[call("search", {"query": "x"})]),
    said("tool", {"hits": ["a", "ü"], "more": False}),
]
THOUGHTS = [
    said("user", "First?"),
    said("assistant", "<think>\nold thought\n</think>\n\nOne."),
    said("user", "Second?"),
    said("assistant", "<think>\nnew thought\n</think>\n\nTwo."),
    said("user", "<result>42</result>"),
    said("assistant", "Three.", reasoning_content="\nas a field\n"),
]
LOOK = [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "?"}]
PARTS = [
    said("user", LOOK),
    said("assistant", None),
    said("user", "plain"),
]
UNKNOWN_PART = [said("user", [{"type": "text", "text": "Hear:"}, {"type": "audio", "url": "x"}])]
NAMED = [said("user", " Hi ", name="ann"), said("assistant", "Hello, Ann.")]
NOTES = [
    said("user", "banana bread for two?!"),
    said("note", "skipped"),
    said("assistant", "Oh no, not now."),
    said("user", ""),
    said("user", "solo"),
    said("assistant", "ÀÉ ß İ ﬁ straße"),
    said("user", "past the limit"),
]
DATA = {
    "z": [1, -2, 3.0, 1e-7, 1e22, 12345678901234567890],
    "a": {"ü": "<b>&'\"\\/\u2028\n\t\x01", "empty": {}, "list": []},
    "none": None,
    "flags": [True, False],
    "emoji": "🙂",
}

BOTH_TOOLS = {"tools": [WEATHER, SEARCH]}

# template: [(conversation's name, messages, add_generation_prompt, kwargs)]
RUNS = {
    "chatml": [
        ("hello", HELLO, True, {}),
        ("system", WITH_SYSTEM, True, {}),
        ("no prompt", DIALOGUE, False, {}),
        ("spaces", SPACES, True, {}),
    ],
    "chatml-lines": [
        ("system", WITH_SYSTEM, True, {}),
        ("spaces", SPACES, False, {}),
        ("unknown role", NARRATOR, True, {}),
        ("late system", LATE_SYSTEM, True, {}),
    ],
    "llama3-headers": [("system", WITH_SYSTEM, True, {}), ("spaces", SPACES, False, {})],
    "llama31-tools": [
        ("clock", HELLO, True, {}),
        ("date given", WITH_SYSTEM, True, {"date_string": "26 Jul 2024"}),
        ("tools", TOOL_USE, True, BOTH_TOOLS),
        ("no tools", HELLO, True, {"tools": []}),
        ("mapping", MAPPING_RESULT, True, {"tools": [SEARCH]}),
        ("two calls", TWO_CALLS, True, BOTH_TOOLS),
    ],
    "llama2-sys": [
        ("system", WITH_SYSTEM, False, {}),
        ("dialogue", DIALOGUE, True, {}),
        ("two users", TWO_USERS, False, {}),
    ],
    "mistral-inst": [
        ("system", WITH_SYSTEM, False, {}),
        ("dialogue", DIALOGUE, True, {}),
        ("two users", TWO_USERS, False, {}),
        ("no user", SYSTEM_ONLY, False, {}),
        ("unknown role", NARRATOR, False, {}),
    ],
    "mistral-tools": [
        ("plain", DIALOGUE, False, {}),
        ("tools", TOOL_USE[1:], False, BOTH_TOOLS),
        ("two calls", TWO_CALLS, False, {"tools": [WEATHER]}),
        ("short id", SHORT_ID, False, {}),
    ],
    "qwen-tools": [
        ("plain", WITH_SYSTEM, True, {}),
        ("tools", TOOL_USE, True, BOTH_TOOLS),
        ("two calls", TWO_CALLS, True, {"tools": [WEATHER]}),
    ],
    "thinking": [
        ("thoughts", THOUGHTS, True, {}),
        ("no prompt", THOUGHTS[:4], False, {}),
        ("off", DIALOGUE, True, {"enable_thinking": False}),
        ("on", DIALOGUE, True, {"enable_thinking": True}),
    ],
    "generation": [("dialogue", DIALOGUE, True, {}), ("assistant last", NAMED, False, {})],
    "generation-dashes": [("dialogue", DIALOGUE, False, {})],
    "macro": [("tools", HELLO, True, BOTH_TOOLS), ("no tools", DIALOGUE, False, {})],
    "gemma-turns": [
        ("dialogue", DIALOGUE, True, {}),
        ("system", WITH_SYSTEM, True, {}),
        ("two users", TWO_USERS, True, {}),
    ],
    "zephyr-tags": [("system", WITH_SYSTEM, True, {}), ("no prompt", DIALOGUE, False, {})],
    "content-parts": [("parts", PARTS, False, {}), ("unknown part", UNKNOWN_PART, False, {})],
    "fullwidth": [
        ("two systems", [*LATE_SYSTEM[::-1], *LATE_SYSTEM[::-1]], True, {}),
        ("thoughts", THOUGHTS[:4], True, {}),
        ("tools", TWO_CALLS, True, {}),
    ],
    "vicuna-loop": [
        ("system", WITH_SYSTEM, True, {}),
        ("named", NAMED, True, {}),
        ("two users", TWO_USERS, True, {}),
    ],
    "role-limits": [
        ("clock", WITH_SYSTEM, False, {}),
        ("assistant last", ENDS_WITH_ASSISTANT, False, {}),
        ("empty", [], False, {}),
        ("system only", SYSTEM_ONLY, False, {}),
        ("unknown role", NARRATOR, False, {}),
    ],
    "filters": [("notes", NOTES, False, {}), ("style", HELLO, False, {"style_name": "bold"})],
    "printing": [("hello", HELLO, False, {})],
    "printing-containers": [("hello", HELLO, False, {})],
    "tojson": [("data", DIALOGUE[1:], False, {"data": DATA})],
    "undefined-attribute": [
        ("present", TWO_CALLS[1:2], False, {}),
        ("absent", HELLO, False, {}),
    ],
    "undefined-add": [("hello", HELLO, False, {}), ("named", NAMED, False, {})],
    "syntax-error": [("hello", HELLO, False, {})],
}

# Templates whose model has no special tokens: the names stay undefined.
WITHOUT_TOKENS = {"chatml", "generation"}


def render(template, entry):
    """The rendered text, or the error and its kind, as two keys of the entry."""
    tokens = {key: entry[key] for key in ("bos_token", "eos_token") if entry[key] is not None}
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            conversations=[entry["messages"]],
            chat_template=template,
            add_generation_prompt=entry["add_generation_prompt"],
            **tokens,
            **entry["kwargs"],
        )
    except jinja2.exceptions.TemplateError as error:
        # `raise_exception` raises the base class itself, Jinja's own failures are subclasses.
        raised = type(error) is jinja2.exceptions.TemplateError
        return {"error": str(error), "error_kind": "raised" if raised else "template"}
    return {"rendered": rendered[0]}


def entries():
    found = {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert found == set(RUNS), f"templates without a run, or runs without one: {found ^ set(RUNS)}"
    for name, runs in RUNS.items():
        template = (TEMPLATES / f"{name}.jinja").read_text()
        special = name not in WITHOUT_TOKENS
        for conversation, messages, add_generation_prompt, kwargs in runs:
            entry = {
                "name": f"{name}/{conversation}",
                "template": template,
                "messages": messages,
                "kwargs": kwargs,
                "bos_token": "<s>" if special else None,
                "eos_token": "</s>" if special else None,
                "add_generation_prompt": add_generation_prompt,
                "now": NOW.isoformat(),
            }
            yield entry | render(template, entry)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    chat_template_utils.datetime = FrozenClock

    made = list(entries())
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    if check:
        assert OUTPUT.read_text() == text, f"{OUTPUT} is out of date"
    else:
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.write_text(text)
    errors = sum("error" in entry for entry in made)
    print(f"{len(made)} entries over {len(RUNS)} templates, {errors} of them errors")


if __name__ == "__main__":
    main()
