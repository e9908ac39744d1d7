"""Behaviour of pocketcoder_proxy.py, in its sections and their order.

Everything is real: servers, bash, and a tmux on a socket of its own for each server.

    python -m pytest                everything but the following
    python -m pytest -m slow        tests that wait for real time-outs, and the rarer cases
    python -m pytest -m browser     the page, in a Chromium
    python -m pytest -m bench -s    medians and ratios of hot paths
    python -m pytest -m soak -s     mixed load with faults

    python test_pocketcoder_proxy.py mcp-fixture legacy|modern|both    the relay's MCP server alone

POCKETCODER_FUZZ   how many times as many random inputs as usual (1)
POCKETCODER_PICTURE  where the README's picture goes, as .github/page.png
POCKETCODER_SOAK   how many seconds the soak test lasts (3600)
PYENV_ROOT         where older interpreters are looked for (~/.pyenv)
"""

# The other imports stand below the MCP fixture, which starts without them.
# ruff: noqa: E402

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

# ==========================================================================
# MCP fixture
#
# The stdio MCP server that the relay is tested with: what the official conformance suite calls, and
# some misbehaving tools.  `python test_pocketcoder_proxy.py mcp-fixture legacy` runs it:
#
# legacy   speaks the revisions with a handshake only (2024-11-05 to 2025-11-25)
# modern   speaks 2026-07-28 only
# both     the first message decides (server/discover does not)
#
# FIXTURE_PAGE   entries in each page of a list; 0: all in one
# FIXTURE_KEY    the secret that signs requestState
#
# Each tool is written once.  `ServedCall.ask()` asks the client and waits (legacy), or ends the
# call with `input_required` and finds the answers in the retry (modern).
#
# The section stands above the other imports and uses nothing below it: a server has to start fast.
# ==========================================================================
JsonObject = dict[str, Any]

NS = "io.modelcontextprotocol/"
MODERN_REVISION = "2026-07-28"
LEGACY_REVISIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
FIXTURE_INFO = {"name": "fixture-server", "version": "1.0.0"}
FIXTURE_HELLO: JsonObject = {
    "instructions": "Fixtures for tests",
    "capabilities": {
        "tools": {"listChanged": True},
        "prompts": {"listChanged": True},
        "completions": {},
        "logging": {},
        "resources": {"subscribe": True, "listChanged": True},
    },
}
LOG_LEVELS = ["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"]
CACHED_METHODS = {
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
    "resources/read",
}
STATE_KEY = os.environ.get("FIXTURE_KEY", "fixture").encode()
PAGE_SIZE = int(os.environ.get("FIXTURE_PAGE", "0"))
# What a server may ask: the capability that the client needs, and the member that every answer has.
ASKABLE = {
    "elicitation/create": ("elicitation", "action"),
    "sampling/createMessage": ("sampling", "content"),
    "roots/list": ("roots", "roots"),
}


class Reply(Exception):
    """Ends a request with its argument: {"error": ...} or {"result": ...}."""


class ToolError(Exception):
    """Becomes a result with isError."""


class CallCancelled(Exception):
    """The client has cancelled the call."""


def error_reply(code: int, message: str, data: Any = None) -> Reply:
    error = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return Reply({"error": error})


def as_object(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}


def log_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def state_signature(body: bytes) -> str:
    return hmac.new(STATE_KEY, body, hashlib.sha256).hexdigest()


def seal_state(bound: Any, known: JsonObject) -> str:
    """A requestState: the answers so far, good for this call only, for ten minutes."""
    content = {
        "for": bound,
        "known": known,
        "until": time.time() + 600,
    }
    body = base64.urlsafe_b64encode(json.dumps(content).encode())
    return f"{body.decode()}.{state_signature(body)}"


def unseal_state(state: Any, bound: Any) -> JsonObject:
    body, _, signature = state.partition(".") if isinstance(state, str) else ("", "", "")
    if hmac.compare_digest(signature.encode(), state_signature(body.encode()).encode()):
        content: JsonObject = json.loads(base64.urlsafe_b64decode(body))
        if content["for"] == bound and content["until"] > time.time():
            return dict(content["known"])
    raise error_reply(-32602, "Invalid requestState")


class ServedCall:
    """A request that the fixture server answers."""

    def __init__(self, server: FixtureServer, message: JsonObject, modern: bool) -> None:
        self.server = server
        self.modern = modern
        self.id = message["id"]
        self.method = str(message["method"])
        self.params = as_object(message.get("params"))
        self.meta = as_object(self.params.get("_meta"))
        self.args = as_object(self.params.get("arguments"))
        self.name = str(self.params.get("name", self.params.get("uri", "")))
        if modern:
            self.capabilities = as_object(self.meta.get(NS + "clientCapabilities"))
        else:
            self.capabilities = server.capabilities
        # What its requestState is good for.
        self.bound = [self.method, self.name, self.args]
        # The answers so far.
        self.known: JsonObject = {}
        self.cancelled = False
        self.changed = threading.Condition()

    def receive(self, answers: JsonObject) -> None:
        with self.changed:
            self.known.update(answers)
            self.changed.notify_all()

    def cancel(self) -> None:
        with self.changed:
            self.cancelled = True
            self.changed.notify_all()

    def wait(self, done: Callable[[], bool] = lambda: False, seconds: float | None = None) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.cancelled or done(), seconds)
        if self.cancelled:
            raise CallCancelled

    def progress(self, progress: float, **more: Any) -> None:
        if "progressToken" in self.meta:
            token = self.meta["progressToken"]
            self.server.notify("progress", progressToken=token, progress=progress, **more)

    def log(self, data: Any, level: str = "info") -> None:
        floor = self.meta.get(NS + "logLevel") if self.modern else self.server.level
        if floor is not None and LOG_LEVELS.index(level) >= LOG_LEVELS.index(floor):
            self.server.notify("message", level=level, logger="fixture", data=data)

    def need(self, capability: str) -> None:
        if capability in self.capabilities:
            return
        if not self.modern:
            raise ToolError(f"Client lacks {capability}")
        needed: JsonObject = {"requiredCapabilities": {capability: {}}}
        raise error_reply(-32021, "Missing required client capability", needed)

    def ask(self, questions: JsonObject, stateful: bool) -> JsonObject:
        """Ask the client all questions at once; the answers by key."""
        for question in questions.values():
            self.need(ASKABLE[question["method"]][0])
        if not self.modern:
            return self.ask_and_wait(questions)

        given = {}
        if "requestState" in self.params or not stateful:
            given = as_object(self.params.get("inputResponses"))
        for key, question in questions.items():
            member = ASKABLE[question["method"]][1]
            if member in as_object(given.get(key)):
                self.known[key] = given[key]

        missing = {key: each for key, each in questions.items() if key not in self.known}
        if missing:
            result: JsonObject = {"resultType": "input_required", "inputRequests": missing}
            if stateful:
                result["requestState"] = seal_state(self.bound, self.known)
            raise Reply({"result": result})
        return self.known

    def ask_and_wait(self, questions: JsonObject) -> JsonObject:
        ids = {key: next(self.server.ids) for key in questions}
        for key, question in questions.items():
            self.server.asked[ids[key]] = self, key
            self.server.send({"id": ids[key], **question})
        try:
            self.wait(lambda: questions.keys() <= self.known.keys())
        except CallCancelled:
            for number in ids.values():
                if self.server.asked.pop(number, None):
                    self.server.notify("cancelled", requestId=number)
            raise

        errors = [answer["error"] for answer in self.known.values() if "error" in answer]
        if errors:
            raise ToolError(f"Client error: {json.dumps(errors)}")
        return {key: answer.get("result", {}) for key, answer in self.known.items()}


# Tools.  What runs one returns a string, which becomes text content, a list, which is the content,
# or an object, which is the whole result.
Run = Callable[[ServedCall], Any]
FIXTURE_TOOLS: dict[str, tuple[JsonObject, Run]] = {}
STRING = {"type": "string"}
INTEGER = {"type": "integer"}
BOOLEAN = {"type": "boolean"}
NUMBER = {"type": "number"}
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQ"
    "AAAABJRU5ErkJggg=="
)
WAV = b"RIFF&\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0\x80>\0\0\2\0\x10\0data\2\0\0\0\0\0"
IMAGE: JsonObject = {
    "type": "image",
    "data": PNG,
    "mimeType": "image/png",
}


def schema_of(properties: JsonObject, required: str = "") -> JsonObject:
    schema: JsonObject = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required.split()
    return schema


def add_tool(
    name: str,
    run: Run | str | list[JsonObject],
    about: str = "",
    required: str = "",
    /,
    **properties: Any,
) -> None:
    listed = {
        "name": name,
        "description": about or f"Fixture {name}",
        "inputSchema": properties.get("inputSchema") or schema_of(properties, required),
    }
    FIXTURE_TOOLS[name] = (listed, run if callable(run) else lambda call: run)


def text_content(value: str) -> JsonObject:
    return {"type": "text", "text": value}


def resource_content(uri: str, mime: str, value: str) -> JsonObject:
    return {"type": "resource", "resource": {"uri": uri, "mimeType": mime, "text": value}}


def elicitation(message: str, required: str = "", **fields: JsonObject) -> JsonObject:
    params = {"message": message, "requestedSchema": schema_of(fields, required)}
    return {"method": "elicitation/create", "params": params}


def sampling(prompt: str, tokens: int = 100) -> JsonObject:
    messages = [{"role": "user", "content": text_content(prompt)}]
    return {
        "method": "sampling/createMessage",
        "params": {"messages": messages, "maxTokens": tokens},
    }


ROOTS_LIST: JsonObject = {"method": "roots/list", "params": {}}
ASK_NAME = elicitation("What is your name?", "name", name=STRING)
ASK_OK = elicitation("Please confirm", "ok", ok=BOOLEAN)
ASK_STEP_1 = elicitation("Step 1: your name?", "name", name=STRING)
ASK_STEP_2 = elicitation("Step 2: your favorite color?", "color", color=STRING)
ASK_CONTEXT = elicitation("What context should the prompt use?", "context", context=STRING)
OPTIONS = ["option1", "option2", "option3"]
TITLED = [{"const": f"value{number}", "title": f"Option {number}"} for number in (1, 2, 3)]
ASK_DEFAULTS = elicitation(
    "Please review the defaults",
    name={**STRING, "default": "John Doe"},
    age={**INTEGER, "default": 30},
    score={**NUMBER, "default": 95.5},
    status={
        **STRING,
        "enum": ["active", "inactive", "pending"],
        "default": "active",
    },
    verified={**BOOLEAN, "default": True},
)
ASK_ENUMS = elicitation(
    "Please select options",
    untitledSingle={**STRING, "enum": OPTIONS},
    titledSingle={**STRING, "oneOf": TITLED},
    legacyEnum={
        **STRING,
        "enum": ["opt1", "opt2", "opt3"],
        "enumNames": ["Option One", "Option Two", "Option Three"],
    },
    untitledMulti={"type": "array", "items": {**STRING, "enum": OPTIONS}},
    titledMulti={"type": "array", "items": {"anyOf": TITLED}},
)


def three_steps(call: ServedCall) -> str:
    steps = {
        0: "Tool execution started",
        50: "Tool processing data",
        100: "Tool execution completed",
    }
    for value, line in steps.items():
        if "logging" in call.name:
            call.log(line)
        else:
            call.progress(value, total=100, message=line)
        call.wait(seconds=0.05)
    return "Three steps done"


def sleep_with_progress(call: ServedCall) -> str:
    last = round(call.args.get("seconds", 5) / 0.2)
    for step in range(1, last + 1):
        call.wait(seconds=0.2)
        call.progress(step, message=f"step {step} of {last}")
    return f"slept {last * 0.2:.1f} s"


def answers_to(call: ServedCall, stateful: bool = False, **questions: JsonObject) -> str:
    return f"Answers: {json.dumps(call.ask(questions, stateful))}"


def ask_in_two_rounds(call: ServedCall) -> str:
    answers_to(call, True, step1=ASK_STEP_1)
    return answers_to(call, True, step2=ASK_STEP_2)


def ask_after_progress(call: ServedCall) -> str:
    call.progress(1, message="about to ask")
    return answers_to(call, ok=ASK_OK)


def ask_what_the_client_can(call: ServedCall) -> str:
    questions = {}
    for question in (ASK_NAME, sampling("Say hello"), ROOTS_LIST):
        method = question["method"]
        if ASKABLE[method][0] in call.capabilities:
            questions[method] = question
    return answers_to(call, False, **questions)


def need_sampling(call: ServedCall) -> str:
    call.need("sampling")
    return "The client declared sampling"


def fail(call: ServedCall) -> Any:
    if call.name != "fail":
        raise ToolError("This tool intentionally returns an error for testing")
    code = call.args.get("code", -32000)
    raise error_reply(code, call.args.get("message", "failed"), call.args.get("data"))


def change_a_list(call: ServedCall) -> str:
    """Really add or remove `extra_tool` or `extra_prompt`; resources only pretend to change."""
    kind = call.name.split("_")[2]
    uri = call.args.get("uri")
    call.server.extra ^= {kind}
    if uri is None:
        call.server.tell(f"{kind}s/list_changed", f"{kind}sListChanged")
    else:
        call.server.tell("resources/updated", "resourceSubscriptions", uri)
    return f"{kind} changed"


def flood(call: ServedCall) -> str:
    write = log_line if call.args.get("to") == "stderr" else call.log
    for number in range(call.args.get("lines", 1000)):
        write(f"log line {number}")
    return "flooded"


def write_noise(call: ServedCall) -> str:
    call.server.write(b"this line is no JSON\n")
    return "after the noise"


def write_half_a_line(call: ServedCall) -> None:
    call.server.write(b'{"jsonrpc":"2.0","resu')
    os._exit(4)


def echo(call: ServedCall) -> JsonObject:
    received = {"arguments": call.args, "params": call.params}
    content = [text_content(json.dumps(received, ensure_ascii=False))]
    return {"content": content, **call.args.get("result", {})}


def end_all_listening(call: ServedCall) -> str:
    for key in list(call.server.listens):
        del call.server.listens[key]
        result = {"resultType": "complete", "_meta": {NS + "subscriptionId": key}}
        call.server.send({"id": key, "result": result})
    return "ended"


add_tool("test_simple_text", "This is a simple text response for testing.")
add_tool("test_image_content", [IMAGE])
add_tool(
    "test_audio_content",
    [
        {
            "type": "audio",
            "data": base64.b64encode(WAV).decode(),
            "mimeType": "audio/wav",
        }
    ],
)
add_tool(
    "test_embedded_resource",
    [
        resource_content(
            "test://embedded-resource", "text/plain", "This is an embedded resource content."
        )
    ],
)
add_tool(
    "test_multiple_content_types",
    [
        text_content("Multiple content types test:"),
        IMAGE,
        resource_content(
            "test://mixed-content-resource", "application/json", '{"test":"data","value":123}'
        ),
    ],
)
add_tool("test_error_handling", fail)
add_tool("test_tool_with_logging", three_steps)
add_tool("test_logging_tool", three_steps)
add_tool("test_tool_with_progress", three_steps)
add_tool(
    "test_sampling",
    lambda call: answers_to(call, llm=sampling(call.args["prompt"])),
    "Asks the model",
    "prompt",
    prompt=STRING,
)
add_tool(
    "test_elicitation",
    lambda call: answers_to(
        call,
        user=elicitation(call.args["message"], "username email", username=STRING, email=STRING),
    ),
    "Asks the user",
    "message",
    message=STRING,
)
add_tool("test_elicitation_sep1034_defaults", lambda call: answers_to(call, form=ASK_DEFAULTS))
add_tool("test_elicitation_sep1330_enums", lambda call: answers_to(call, form=ASK_ENUMS))
add_tool("test_streaming_elicitation", ask_after_progress)
add_tool("test_missing_capability", need_sampling)
add_tool(
    "json_schema_2020_12_tool",
    lambda call: json.dumps(call.args),
    inputSchema={
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "$defs": {
            "address": {
                "$anchor": "addressDef",
                "type": "object",
                "properties": {"street": STRING, "city": STRING},
            }
        },
        "properties": {
            "name": STRING,
            "address": {"$ref": "#/$defs/address"},
            "phone": STRING,
            "email": STRING,
            "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        },
        "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
        "if": {
            "properties": {"contactMethod": {"const": "phone"}},
            "required": ["contactMethod"],
        },
        "then": {"required": ["phone"]},
        "else": {"required": ["email"]},
        "additionalProperties": False,
    },
)
add_tool(
    "test_x_mcp_header",
    lambda call: json.dumps(call.args),
    "Has arguments that HTTP headers repeat",
    "region",
    query=STRING,
    region={**STRING, "x-mcp-header": "Region"},
    priority={**INTEGER, "x-mcp-header": "Priority"},
)
add_tool("test_trigger_tool_change", change_a_list)
add_tool("test_trigger_prompt_change", change_a_list)
add_tool(
    "test_trigger_resource_change",
    change_a_list,
    "With uri: the resource was updated; without: the list changed",
    uri=STRING,
)
add_tool(
    "test_input_required_result_elicitation", lambda call: answers_to(call, user_name=ASK_NAME)
)
add_tool(
    "test_input_required_result_sampling",
    lambda call: answers_to(call, capital_question=sampling("What is the capital of France?")),
)
add_tool(
    "test_input_required_result_list_roots",
    lambda call: answers_to(call, client_roots=ROOTS_LIST),
)
add_tool(
    "test_input_required_result_request_state",
    lambda call: "state-ok. " + answers_to(call, True, confirm=ASK_OK),
)
add_tool(
    "test_input_required_result_multiple_inputs",
    lambda call: answers_to(
        call,
        True,
        user_name=ASK_NAME,
        greeting=sampling("Generate a greeting", 50),
        client_roots=ROOTS_LIST,
    ),
)
add_tool("test_input_required_result_multi_round", ask_in_two_rounds)
add_tool(
    "test_input_required_result_tampered_state",
    lambda call: answers_to(call, True, confirm=ASK_OK),
)
add_tool("test_input_required_result_capabilities", ask_what_the_client_can)
add_tool("test_slow", sleep_with_progress, "Progress every 0.2 s", seconds=NUMBER, label=STRING)
add_tool("hang", lambda call: call.wait(), "Never answers", label=STRING)
add_tool("echo", echo, "Returns arguments and params as JSON; `result` is merged into the result")
add_tool("fail", fail, "A JSON-RPC error", code=INTEGER, message=STRING, data={})
add_tool("big", lambda call: "x" * call.args.get("bytes", 1 << 20), bytes=INTEGER)
add_tool("die", lambda call: os._exit(3))
add_tool("flood", flood, "Log messages, or lines on stderr (to=stderr)", lines=INTEGER, to=STRING)
add_tool("noise", write_noise)
add_tool("half", write_half_a_line, "Writes half a line and exits")
add_tool(
    "counter",
    lambda call: str(next(call.server.count)),
    "How often it was called in this process",
)
add_tool(
    "env",
    lambda call: os.environ.get(call.args["name"], ""),
    "An environment variable",
    "name",
    name=STRING,
)
add_tool("pid", lambda call: str(os.getpid()))
add_tool("end_listen", end_all_listening, "Ends all subscriptions/listen from this side")
add_tool("extra_tool", "extra", "Comes and goes")

# Prompts and resources.
FIXTURE_PROMPTS: dict[str, tuple[JsonObject, Callable[[ServedCall], list[JsonObject]]]] = {}
FIXTURE_RESOURCES: dict[str, tuple[str, Callable[[ServedCall], str]]] = {
    "test://static-text": (
        "text/plain",
        lambda call: "This is the content of the static text resource.",
    ),
    "test://static-binary": ("image/png", lambda call: PNG),
    "test://watched-resource": ("text/plain", lambda call: "Watched"),
    "test://asking": ("text/plain", lambda call: answers_to(call, user_name=ASK_NAME)),
}
RESOURCES_LISTED = [
    {
        "uri": uri,
        "name": uri.removeprefix("test://"),
        "description": f"Fixture {uri}",
        "mimeType": mime,
    }
    for uri, (mime, _) in FIXTURE_RESOURCES.items()
]
TEMPLATE_LISTED = {
    "uriTemplate": "test://template/{id}/data",
    "name": "template",
    "mimeType": "application/json",
}


def add_prompt(name: str, make: Callable[[ServedCall], list[JsonObject]], *arguments: str) -> None:
    listed: JsonObject = {"name": name, "description": f"Fixture {name}"}
    if arguments:
        listed["arguments"] = [{"name": each, "required": True} for each in arguments]
    FIXTURE_PROMPTS[name] = (listed, make)


add_prompt(
    "test_simple_prompt", lambda call: [text_content("This is a simple prompt for testing.")]
)
add_prompt(
    "test_prompt_with_arguments",
    lambda call: [
        text_content(
            f"Prompt with arguments: arg1='{call.args['arg1']}', arg2='{call.args['arg2']}'"
        )
    ],
    "arg1",
    "arg2",
)
add_prompt(
    "test_prompt_with_embedded_resource",
    lambda call: [
        resource_content(
            call.args["resourceUri"], "text/plain", "Embedded resource content for testing."
        ),
        text_content("Please process the embedded resource above."),
    ],
    "resourceUri",
)
add_prompt(
    "test_prompt_with_image",
    lambda call: [IMAGE, text_content("Please analyze the image above.")],
)
add_prompt(
    "test_input_required_result_prompt",
    lambda call: [text_content(answers_to(call, user_context=ASK_CONTEXT))],
)
add_prompt("extra_prompt", lambda call: [text_content("extra")])


# Methods.  None means that there is no answer.
def page_of(call: ServedCall, key: str, entries: list[JsonObject]) -> JsonObject:
    cursor = call.params.get("cursor", "0")
    if not (isinstance(cursor, str) and cursor.isdecimal() and int(cursor) < len(entries)):
        raise error_reply(-32602, "Invalid cursor")
    start = int(cursor)
    size = PAGE_SIZE or len(entries)
    end = start + size
    page: JsonObject = {key: entries[start:end]}
    if end < len(entries):
        page["nextCursor"] = str(end)
    return page


def list_tools(call: ServedCall) -> JsonObject:
    entries = [listed for listed, _ in FIXTURE_TOOLS.values()]
    if "tool" not in call.server.extra:
        entries = entries[:-1]
    return page_of(call, "tools", entries)


def list_prompts(call: ServedCall) -> JsonObject:
    entries = [listed for listed, _ in FIXTURE_PROMPTS.values()]
    if "prompt" not in call.server.extra:
        entries = entries[:-1]
    return page_of(call, "prompts", entries)


def call_tool(call: ServedCall) -> JsonObject:
    hidden = call.name == "extra_tool" and "tool" not in call.server.extra
    if call.name not in FIXTURE_TOOLS or hidden:
        raise error_reply(-32602, f"Unknown tool: {call.name}")
    try:
        out = FIXTURE_TOOLS[call.name][1](call)
    except (ToolError, LookupError, TypeError, ValueError) as error:
        return {"content": [text_content(str(error))], "isError": True}
    if isinstance(out, dict):
        return out
    return {"content": out if isinstance(out, list) else [text_content(out)]}


def get_prompt(call: ServedCall) -> JsonObject:
    try:
        contents = FIXTURE_PROMPTS[call.name][1](call)
    except (ToolError, LookupError) as error:
        raise error_reply(-32602, f"No such prompt, or it cannot be made: {error}") from None
    return {"messages": [{"role": "user", "content": content} for content in contents]}


def read_resource(call: ServedCall) -> JsonObject:
    uri = call.name
    key = uri[len("test://template/") : -len("/data")]
    if uri == f"test://template/{key}/data":
        data = {
            "id": key,
            "templateTest": True,
            "data": f"Data for ID: {key}",
        }
        found = {
            "uri": uri,
            "mimeType": "application/json",
            "text": json.dumps(data),
        }
        return {"contents": [found]}

    if uri not in FIXTURE_RESOURCES:
        code = -32602 if call.modern else -32002
        raise error_reply(code, "Resource not found", {"uri": uri})
    mime, get = FIXTURE_RESOURCES[uri]
    member = "text" if mime == "text/plain" else "blob"
    return {
        "contents": [
            {
                "uri": uri,
                "mimeType": mime,
                member: get(call),
            }
        ]
    }


def complete(call: ServedCall) -> JsonObject:
    start = str(as_object(call.params.get("argument")).get("value", ""))
    values = [
        value for value in ("paris", "park", "party", "test1", "test2") if value.startswith(start)
    ]
    return {
        "completion": {
            "values": values,
            "total": len(values),
            "hasMore": False,
        }
    }


def initialize(call: ServedCall) -> JsonObject:
    asked = call.params.get("protocolVersion")
    call.server.begin(as_object(call.params.get("capabilities")))
    return {
        "protocolVersion": asked if asked in LEGACY_REVISIONS else LEGACY_REVISIONS[-1],
        "serverInfo": FIXTURE_INFO,
        **FIXTURE_HELLO,
    }


def set_level(call: ServedCall) -> JsonObject:
    level = call.params.get("level")
    if level not in LOG_LEVELS:
        raise error_reply(-32602, "Invalid log level")
    call.server.set_level(level)
    return {}


def subscribe(call: ServedCall) -> JsonObject:
    if call.method == "resources/subscribe":
        call.server.subscribed.add(call.name)
    else:
        call.server.subscribed.discard(call.name)
    return {}


def listen(call: ServedCall) -> None:
    wanted = as_object(call.params.get("notifications"))
    honoured = {}
    for kind in (
        "toolsListChanged",
        "promptsListChanged",
        "resourcesListChanged",
        "resourceSubscriptions",
    ):
        if wanted.get(kind):
            honoured[kind] = wanted[kind]
    meta = {NS + "subscriptionId": call.id}
    call.server.notify("subscriptions/acknowledged", _meta=meta, notifications=honoured)
    # Not before: the acknowledgement comes first.
    call.server.listens[call.id] = honoured


Method = Callable[[ServedCall], JsonObject | None]
COMMON_METHODS: dict[str, Method] = {
    "tools/list": list_tools,
    "tools/call": call_tool,
    "prompts/list": list_prompts,
    "prompts/get": get_prompt,
    "resources/list": lambda call: page_of(call, "resources", RESOURCES_LISTED),
    "resources/templates/list": lambda call: page_of(call, "resourceTemplates", [TEMPLATE_LISTED]),
    "resources/read": read_resource,
    "completion/complete": complete,
}
LEGACY_METHODS: dict[str, Method] = {
    **COMMON_METHODS,
    "initialize": initialize,
    "ping": lambda call: {},
    "logging/setLevel": set_level,
    "resources/subscribe": subscribe,
    "resources/unsubscribe": subscribe,
}
MODERN_METHODS: dict[str, Method] = {
    **COMMON_METHODS,
    "subscriptions/listen": listen,
    "server/discover": lambda call: {"supportedVersions": [MODERN_REVISION], **FIXTURE_HELLO},
}


class FixtureServer:
    """Reads messages from stdin and writes answers to stdout."""

    def __init__(self, era: str) -> None:
        # Empty until a message decides.
        self.era = era
        self.level = "info"
        self.initialized = False
        # From 0, so that they collide with the client's.
        self.ids: itertools.count[int] = itertools.count()
        self.count: itertools.count[int] = itertools.count(1)
        self.out = threading.Lock()
        self.calls: dict[Any, ServedCall] = {}
        self.asked: dict[Any, tuple[ServedCall, str]] = {}
        self.listens: dict[Any, JsonObject] = {}
        self.capabilities: JsonObject = {}
        self.subscribed: set[str] = set()
        self.extra: set[str] = set()

    def begin(self, capabilities: JsonObject) -> None:
        self.capabilities = capabilities
        self.initialized = True

    def set_level(self, level: str) -> None:
        self.level = level

    def write(self, raw: bytes) -> None:
        with self.out:
            sys.stdout.buffer.write(raw)
            sys.stdout.buffer.flush()

    def send(self, message: JsonObject) -> None:
        complete_message = {"jsonrpc": "2.0", **message}
        line = json.dumps(complete_message, ensure_ascii=False, separators=(",", ":"))
        # A lone surrogate is \udXXX in JSON, too.
        self.write(line.encode(errors="backslashreplace") + b"\n")

    def notify(self, kind: str, **params: Any) -> None:
        self.send({"method": f"notifications/{kind}", "params": params})

    def tell(self, method: str, kind: str, uri: str | None = None) -> None:
        """Notify whoever subscribed to this kind of change."""
        params = {} if uri is None else {"uri": uri}
        if self.era == "legacy" and (uri is None or uri in self.subscribed):
            self.notify(method, **params)
        for key, wanted in list(self.listens.items()):
            if kind in wanted and (uri is None or uri in wanted[kind]):
                self.notify(method, _meta={NS + "subscriptionId": key}, **params)

    def check(self, call: ServedCall) -> None:
        methods = MODERN_METHODS if call.modern else LEGACY_METHODS
        if call.method not in methods:
            raise error_reply(-32601, "Method not found")
        if call.modern:
            self.check_modern(call)
        elif not self.initialized and call.method not in ("initialize", "ping"):
            raise error_reply(-32600, "Not initialized")

    def check_modern(self, call: ServedCall) -> None:
        asked = call.meta.get(NS + "protocolVersion")
        if not isinstance(asked, str) or NS + "clientCapabilities" not in call.meta:
            needed = f"_meta needs {NS}protocolVersion and {NS}clientCapabilities"
            raise error_reply(-32602, needed)
        if asked != MODERN_REVISION:
            versions = {"supported": [MODERN_REVISION], "requested": asked}
            raise error_reply(-32022, "Unsupported protocol version", versions)
        if call.meta.get(NS + "logLevel", "info") not in LOG_LEVELS:
            raise error_reply(-32602, "Invalid log level")
        if "requestState" in call.params:
            call.receive(unseal_state(call.params["requestState"], call.bound))

    def answer(self, call: ServedCall) -> None:
        methods = MODERN_METHODS if call.modern else LEGACY_METHODS
        reply: JsonObject = {}
        try:
            self.check(call)
            reply = {"result": methods[call.method](call)}
        except Reply as end:
            reply = end.args[0]
        except CallCancelled:
            log_line(f"cancelled {call.name} {call.args.get('label', '')}".rstrip())
        except Exception as error:
            reply = {"error": {"code": -32603, "message": repr(error)}}

        served = self.calls.pop(call.id, call)
        unanswered = "result" in reply and reply["result"] is None
        if served.cancelled or unanswered:
            return
        if call.modern and "result" in reply:
            result = reply["result"]
            if call.method in CACHED_METHODS and "resultType" not in result:
                result = {
                    **result,
                    "ttlMs": 1234,
                    "cacheScope": "public",
                }
            meta = {NS + "serverInfo": FIXTURE_INFO}
            reply["result"] = {
                "resultType": "complete",
                "_meta": meta,
                **result,
            }
        self.send({"id": call.id, **reply})

    def receive(self, line: bytes) -> None:
        try:
            message = as_object(json.loads(line))
        except (ValueError, RecursionError):
            message = {}
        method = message.get("method")
        params = as_object(message.get("params"))
        cancels = method == "notifications/cancelled"
        id_ = params.get("requestId") if cancels else message.get("id", 0)

        if not message or not isinstance(id_, (int, str)):
            error = {"code": -32700, "message": "Not a JSON-RPC message"}
            self.send({"id": None, "error": error})
        elif method is None:
            self.receive_answer(id_, message)
        elif cancels:
            self.listens.pop(id_, None)
            running = self.calls.get(id_)
            if running is not None:
                running.cancel()
        elif "id" in message:
            self.receive_request(message)

    def receive_answer(self, id_: Any, message: JsonObject) -> None:
        asked = self.asked.pop(id_, None)
        if asked is not None:
            call, key = asked
            call.receive({key: message})

    def receive_request(self, message: JsonObject) -> None:
        if not self.era and message["method"] != "server/discover":
            meta = as_object(as_object(message.get("params")).get("_meta"))
            self.era = "modern" if NS + "protocolVersion" in meta else "legacy"
        call = ServedCall(self, message, self.era != "legacy")
        self.calls[call.id] = call
        if call.method in ("tools/call", "prompts/get", "resources/read"):
            threading.Thread(target=self.answer, args=(call,), daemon=True).start()
        else:
            self.answer(call)


def run_mcp_fixture(era: str) -> None:
    log_line(f"fixture server {os.getpid()}: {era}")
    server = FixtureServer("" if era == "both" else era)
    for line in sys.stdin.buffer:
        if line.strip():
            server.receive(line)
    # Whatever still runs ends with it.
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] != ["mcp-fixture"] or sys.argv[2:] not in (["legacy"], ["modern"], ["both"]):
        sys.exit(f"usage: {sys.argv[0]} mcp-fixture legacy|modern|both")
    run_mcp_fixture(sys.argv[2])

# ------------------------------- the line: all above is a program by itself, all below are tests

import ast
import asyncio
import atexit
import contextlib
import fcntl
import http.client
import http.server
import inspect
import logging
import marshal
import pathlib
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import tempfile
import termios
import textwrap
import traceback
import urllib.parse
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import ClassVar, NamedTuple, TypeVar, cast

import pytest
import tornado.httpclient
import tornado.iostream
import tornado.web
import tornado.websocket

import pocketcoder_proxy as pp

MODULE = pathlib.Path(pp.__file__)
SOURCE = MODULE.read_text()
# A file of its own starts faster than this one, which Python compiles anew each time.
MCP_FIXTURE = (
    pathlib.Path(__file__).read_text().partition("# ------------------------------- the line")[0]
)
T = TypeVar("T")

# Otherwise what we start under nohup ignores them.
signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(ignored, signal.SIG_DFL)
if shutil.which("tmux") is None:
    pytest.exit(
        "tmux is needed: install it, with `apt-get install tmux` for instance", returncode=2
    )


# ==========================================================================
# Tools of the tests
# ==========================================================================
# What Python does with a script, but for compiling it, which takes a tenth of a second.
RUN_COMPILED = """
import marshal, os, sys
compiled, __file__ = sys.argv[1:3]
del sys.argv[:2]
sys.path[0] = os.path.dirname(os.path.realpath(__file__))
with open(compiled, "rb") as file:
    code = marshal.load(file)
exec(code)
"""


def program(script: str) -> list[str]:
    """The words that run the module under the name `script`, compiled once for all."""
    return [sys.executable, "-c", RUN_COMPILED, compiled(), script]


@cache
def compiled() -> str:
    folder = tempfile.mkdtemp(prefix="pc")
    atexit.register(shutil.rmtree, folder)
    path = pathlib.Path(folder, "compiled")
    path.write_bytes(marshal.dumps(compile(SOURCE, str(MODULE), "exec")))
    # Some tests start it as another user.
    os.chmod(folder, 0o755)
    return str(path)


def eventually(fact: Callable[[], T], seconds: float = 15.0) -> T:
    """Wait for a fact to be true, and return it."""
    deadline = time.monotonic() + seconds
    got = fact()
    while not got and time.monotonic() < deadline:
        time.sleep(0.01)
        got = fact()
    assert got, f"not within {seconds} s"
    return got


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def processes_with(text: str) -> list[int]:
    """Processes that have `text` in their environment or command line."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = (
                pathlib.Path(f"/proc/{pid}/environ").read_bytes()
                + pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            )
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if text.encode() in words and state not in "ZX" and int(pid) != os.getpid():
                found.append(int(pid))

    return found


def wait_until_running(text: str, seconds: float = 15.0) -> None:
    """Wait for a process with `text` in its environment or command line."""
    eventually(lambda: processes_with(text), seconds)


def wait_until_gone(text: str, seconds: float = 15.0) -> None:
    """Wait until no process has `text` in its environment or command line."""
    eventually(lambda: not processes_with(text), seconds)


def kill_tmux(socket_path: str) -> None:
    """End a tmux server if it runs."""
    words = ["tmux", "-S", socket_path, "kill-server"]
    subprocess.run(words, capture_output=True, timeout=10)


@contextlib.contextmanager
def limited(process: subprocess.Popen[Any] | int, kind: int, soft: int) -> Iterator[None]:
    """A soft limit of a process, which is restored at the end."""
    pid = process if isinstance(process, int) else process.pid
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, kind, before)


def outer_environment() -> dict[str, str]:
    """Our environment without what a server or a tmux around us has put into it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("POCKETCODER", "TMUX"))
    }


def descriptors_of(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        # The descriptor of this very listing is gone by now.
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def status_bytes(pid: int, field: str) -> int:
    """A size in /proc/PID/status, which has it in KiB."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+)", text)[0]) * 1024


class Background:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(call)
        self.pool.shutdown(wait=False)

    def result(self, seconds: float = 30.0) -> Any:
        return self.future.result(seconds)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class UnixConnection(http.client.HTTPConnection):
    """HTTP at a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = connected_to(self.path)


def connected_to(path: str) -> socket.socket:
    """A connection to a unix socket."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(10)
    peer.connect(path)
    return peer


class Proxy:
    """A server in a process of its own, with its own tmux socket, workspace and home.

    unix  a path to listen at, in place of a port
    """

    def __init__(
        self, *words: str, port: str = "0", unix: str = "", folder: str = "", **variables: str
    ) -> None:
        self.folder = folder or tempfile.mkdtemp(prefix="pc")
        self.workspace = f"{self.folder}/work"
        self.socket = f"{self.folder}/tmux/s"
        # The files of runs.
        self.run_folder = pathlib.Path(f"{self.socket}.d")
        for name in ("work", "home"):
            os.makedirs(f"{self.folder}/{name}", exist_ok=True)
        pathlib.Path(self.folder, "home/.bashrc").write_text("PS1='$ '\n")
        self.env = {
            **outer_environment(),
            "HOME": f"{self.folder}/home",
            "TMUX_SOCKET": self.socket,
            **variables,
        }
        self.token = variables.get("POCKETCODER_TOKEN", "")
        self.unix = unix
        self.words = [
            *program(str(MODULE)),
            "server",
            *(["--unix", unix] if unix else ["-p", port]),
            "--workspace",
            self.workspace,
            *words,
        ]
        self.log_to(f"{self.folder}/log")
        self.start()

    def log_to(self, file: str | int) -> None:
        # `close_files` closes it.
        self.log = open(file, "a")  # noqa: SIM115

    def start(self) -> None:
        """Start the server; again, after `stop`."""
        if self.log.closed:
            self.log_to(f"{self.folder}/log")
        self.process = subprocess.Popen(
            self.words,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=self.env,
            cwd=self.folder,
            text=True,
        )
        assert self.process.stdout

        self.said = self.process.stdout.readline()
        assert self.said, pathlib.Path(f"{self.folder}/log").read_text()
        if self.unix:
            self.url = f"unix:{self.unix}"
        else:
            self.port = int(self.said.rsplit(":", 1)[1])
            self.url = f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        if self.unix:
            return UnixConnection(self.unix)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def raw_connection(self) -> socket.socket:
        if self.unix:
            return connected_to(self.unix)
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def status(
        self,
        method: str,
        path: str,
        body: bytes | str | None = None,
        headers: dict[str, str] | None = None,
    ) -> int:
        return self.request(method, path, body, headers)[0]

    def post(self, body: Any, path: str = "/exec", **headers: str) -> tuple[int, dict[str, Any]]:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {
            "Content-Type": "application/json",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        if self.token:
            given.setdefault("Authorization", f"Bearer {self.token}")
        status, _, answer = self.request("POST", path, sent, given)
        return status, json.loads(answer)

    def servers(self) -> Any:
        """The relayed servers, as `GET /servers` shows them."""
        return json.loads(self.request("GET", "/servers")[2])

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `GET /ready`."""
        status, _, answer = self.request("GET", "/ready")
        return status, json.loads(answer)

    def unready(self) -> str:
        """Why it is not ready; "": it is."""
        return str(self.ready()[1].get("error", ""))

    def metrics(self) -> dict[str, float]:
        """The samples of `GET /metrics`, as `name{label="value"}`."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        status, _, text = self.request("GET", "/metrics", headers=headers)
        assert status == 200, text
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        pairs = [line.rsplit(" ", 1) for line in lines]
        return {name: float(value) for name, value in pairs}

    def exec(self, cmd: str, **fields: Any) -> dict[str, Any]:
        status, answer = self.post({"cmd": cmd, **fields})
        assert status == 200, answer
        return answer

    def start_exec(self, cmd: str, **fields: Any) -> Background:
        """The same in a thread."""
        return Background(lambda: self.exec(cmd, **fields))

    def launch(self, cmd: str, **fields: Any) -> str:
        """Start a command that goes on without us; its run_id."""
        status, answer = self.post({"cmd": cmd, "wait": 0, **fields})
        assert status in (200, 202), answer
        return str(answer["run_id"])

    def runs(self, **query: Any) -> list[dict[str, Any]]:
        """The list of runs."""
        status, _, answer = self.request("GET", f"/runs?{urlencode(query)}")
        assert status == 200, answer
        found: list[dict[str, Any]] = json.loads(answer)["runs"]
        return found

    def run(self, run_id: str, wait: float = 0) -> dict[str, Any]:
        """One run, when it has ended or after `wait` seconds."""
        status, _, answer = self.request("GET", f"/runs/{run_id}?wait={wait}")
        assert status == 200, answer
        found: dict[str, Any] = json.loads(answer)
        return found

    def output(self, run_id: str, **query: Any) -> bytes:
        """What a run has printed, from `offset` on, `limit` bytes at most."""
        return self.output_and_headers(run_id, **query)[0]

    def output_and_headers(self, run_id: str, **query: Any) -> tuple[bytes, dict[str, str]]:
        status, headers, data = self.request("GET", f"/runs/{run_id}/output?{urlencode(query)}")
        assert status == 200, data
        return data, headers

    def follow(self, run_id: str, last_id: int = 0) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Events of a run's output: name, id, data."""
        connection = self.connect()
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last_id)}
        connection.request("GET", f"/runs/{run_id}/output", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        try:
            fields = {"id": "-1"}
            while line := answer.readline().decode():
                name, _, value = line.rstrip("\n").partition(": ")
                fields[name] = value
                if line == "\n" and "data" in fields:
                    yield fields["event"], int(fields["id"]), json.loads(fields["data"])
                    fields = {"id": "-1"}
        finally:
            answer.close()
            connection.close()

    def kill_and_start(self, number: int = signal.SIGKILL) -> None:
        """End the server, and start another one at the same socket."""
        self.stop(number)
        self.start()

    def stream(
        self, cmd: str, **fields: Any
    ) -> Generator[tuple[str, dict[str, Any], float], None, None]:
        """Events with the time of their arrival."""
        connection = self.connect()
        accept = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", "/exec", json.dumps({"cmd": cmd, **fields}), accept)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.getheader("Content-Type") == "text/event-stream"

        try:
            while line := answer.readline().decode().rstrip("\n"):
                yield from self._event(line, answer)
        finally:
            answer.close()
            connection.close()

    def _event(
        self, line: str, answer: http.client.HTTPResponse
    ) -> Iterator[tuple[str, dict[str, Any], float]]:
        if line.startswith(":"):
            answer.readline()
            yield ":", {}, time.monotonic()
        else:
            data = answer.readline().decode()
            if data.startswith("id: "):
                data = answer.readline().decode()
            answer.readline()
            yield (
                line.removeprefix("event: "),
                json.loads(data.removeprefix("data: ")),
                time.monotonic(),
            )

    def tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self.socket, *words], capture_output=True, text=True, timeout=10
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    def tmux_pid(self) -> int:
        return int(self.tmux("display-message", "-p", "#{pid}"))

    def panes(self, agent: str) -> list[str]:
        """pane_id, pid of its shell."""
        lines = self.tmux(
            "list-panes", "-s", "-t", "=pocketcoder:", "-F", "#{pane_id} #{pane_pid} #{window_name}"
        )
        return [
            line.rsplit(" ", 1)[0]
            for line in lines.split("\n")
            if line.endswith(f" {agent}:terminal")
        ]

    def pane(self, agent: str) -> str:
        return eventually(lambda: self.panes(agent))[0].split()[0]

    def type(self, agent: str, *keys: str) -> None:
        self.tmux("send-keys", "-t", self.pane(agent), *keys)

    def screen(self, agent: str) -> str:
        return self.tmux("capture-pane", "-p", "-J", "-S", "-200", "-t", self.pane(agent))

    def memory(self) -> int:
        """Resident bytes."""
        return status_bytes(self.process.pid, "VmRSS")

    def peak(self) -> int:
        """The most resident bytes there were."""
        return status_bytes(self.process.pid, "VmHWM")

    def seconds(self) -> float:
        """CPU time used."""
        return cpu_seconds(self.process.pid)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def run_files(self) -> int:
        """Open ends of the files of runs."""
        return sum(
            bool(re.search(r"/s\.d/[0-9a-f]{4}/\w+\.\w+", path))
            for path in descriptors_of(self.process.pid)
        )

    def logged(self) -> str:
        return pathlib.Path(f"{self.folder}/log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.close_files()
        return status

    def close_files(self) -> None:
        assert self.process.stdout
        self.process.stdout.close()
        self.log.close()

    def remove(self) -> None:
        """Leave nothing behind.  Never raises: it would hide a failure."""
        with contextlib.suppress(Exception):
            if self.process.poll() is None:
                self.stop()

        with contextlib.suppress(Exception):
            self.close_files()
            kill_tmux(self.socket)
            for pid in processes_with(self.folder):
                os.kill(pid, signal.SIGKILL)

        shutil.rmtree(self.folder, ignore_errors=True)


# What the fixtures `own` and `warm` give.
StartServer = Callable[..., Proxy]
# How many times as many random inputs as usual.
FUZZ = int(os.environ.get("POCKETCODER_FUZZ", "1"))
MARKS = [
    "",
    " ",
    "\n",
    "\r",
    "\t",
    "a",
    "it's",
    '"',
    "\\",
    "$x",
    "`",
    "*",
    "-n",
    "é",
    "🙂",
    "\x85",
    "\u2028",
    "\x1b[0m",
    "\x7f",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    1e300,
    10**30,
    [],
    {},
    [[]],
    {"a": []},
    "\ud800",
    "\0",
    "x" * 100,
]


def words(dice: random.Random, most: int = 6) -> str:
    return "".join(dice.choices(MARKS, k=dice.randrange(most)))


def junk(dice: random.Random, *likely: Any) -> Any:
    """Something of JSON, rather one of `likely`."""
    if likely and dice.random() < 0.5:
        return dice.choice(likely)
    kind = dice.randrange(8)
    if kind == 0:
        return [junk(dice, *likely) for _ in range(dice.randrange(3))]
    if kind == 1:
        return {words(dice, 3): junk(dice, *likely) for _ in range(dice.randrange(3))}
    if kind == 2:
        return words(dice)

    return dice.choice(VALUES)


def spoil(dice: random.Random, data: bytes) -> bytes:
    """Mostly the same bytes; often a few are missing, doubled or others."""
    for _ in range(dice.choice((0, 0, 1, 1, 2, 5)) if data else 0):
        at = dice.randrange(len(data))
        end = dice.randrange(9)
        data = (
            data[:at]
            + dice.choice((b"", dice.randbytes(end), data[at : at + end] * 2))
            + data[at + end :]
        )
        data = data or b"\0"

    return data


def cuts(dice: random.Random, data: bytes) -> Iterator[list[bytes]]:
    """`data` whole, byte by byte, and cut at random."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    ends = sorted(dice.choices(range(len(data) + 1), k=dice.randrange(8)))
    yield [data[begin:end] for begin, end in pairwise([0, *ends, len(data)])]


def with_slow(cases: list[Any], *telling: str) -> list[Any]:
    """The same cases; all but those with these ids are slow ones."""
    ids = [case.id for case in cases]
    assert [name for name in telling if name not in ids] == []
    return [
        case
        if case.id in telling
        else pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        for case in cases
    ]


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """A server for tests that leave it as it was; each takes an agent of its own."""
    server = Proxy()
    server.exec("true")
    yield server
    server.remove()


@pytest.fixture
def own() -> Iterator[StartServer]:
    """Servers for one test, which may break them."""
    made: list[Proxy] = []

    def make(*words: str, **variables: str) -> Proxy:
        made.append(Proxy(*words, **variables))
        return made[-1]

    yield make
    for server in made:
        server.remove()


@pytest.fixture
def warm(own: StartServer) -> StartServer:
    """Such servers after their first command, so with a tmux and a terminal."""

    def make(*words: str, **variables: str) -> Proxy:
        server = own(*words, **variables)
        server.exec("true")
        return server

    return make


@pytest.fixture
def agent(request: pytest.FixtureRequest) -> str:
    """An agent that no other test has."""
    return "t" + re.sub(r"\W", "", str(abs(hash(request.node.nodeid))))[:12]


@pytest.fixture
def audited(own: StartServer, tmp_path: pathlib.Path) -> tuple[Proxy, pathlib.Path]:
    """A server, and the file where it notes what it runs."""
    return own("--audit-log", str(tmp_path / "audit")), tmp_path / "audit"


def noted(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program(str(MODULE)), *words],
        capture_output=True,
        text=True,
        timeout=20,
        env=outer_environment() | variables,
    )


NAMES = ["pocketcoder", "pocketcoder-shell", "sh", "bash"]


@pytest.fixture(scope="module")
def names() -> Iterator[str]:
    """A folder with links to the module, under the names of shells, and to our Python."""
    folder = tempfile.mkdtemp(prefix="pc")
    for name in NAMES:
        os.symlink(MODULE, f"{folder}/{name}")
    os.symlink(sys.executable, f"{folder}/python3")
    yield folder
    shutil.rmtree(folder)


class Caller:
    """Runs commands as the reasoning engine would, through the bridge or a local bash."""

    def __init__(self, proxy: Proxy, names: str) -> None:
        self.proxy = proxy
        self.names = names
        self.cwd = proxy.workspace
        self.env = {
            **proxy.env,
            "PROXY_URL": proxy.url,
            "OPENCODE_AGENT": "engine",
        }
        if proxy.token:
            self.env["POCKETCODER_TOKEN"] = proxy.token

    def words(self, *arguments: str | bytes, name: str = "bash") -> list[str | bytes]:
        return [*program(f"{self.names}/{name}"), *arguments]

    def start(
        self, *arguments: str | bytes, name: str = "bash", **options: Any
    ) -> subprocess.Popen[bytes]:
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        } | options
        options["env"] = self.env | options.get("env", {})
        words = self.words(*arguments, name=name)
        cwd = options.pop("cwd", self.cwd)
        if options.pop("closes_stdin", False):
            words = ["/bin/bash", "-c", 'exec "$@" <&-', "closes", *words]

        return cast("subprocess.Popen[bytes]", subprocess.Popen(words, cwd=cwd, **options))

    def run(
        self, *arguments: str | bytes, name: str = "bash", input: bytes = b"", **options: Any
    ) -> tuple[int, bytes, bytes]:
        process = self.start(*arguments, name=name, stdin=subprocess.PIPE, **options)
        out, err = process.communicate(input, timeout=30)
        return process.returncode, out, err

    def local(
        self, *arguments: str | bytes, input: bytes = b"", stderr: int = subprocess.PIPE
    ) -> tuple[int, bytes, bytes]:
        options: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": stderr,
            "cwd": self.cwd,
            "env": self.env,
        }
        done = subprocess.run(["bash", *arguments], executable="/bin/bash", input=input, **options)
        return (
            done.returncode if done.returncode >= 0 else 128 - done.returncode,
            done.stdout,
            done.stderr,
        )


@pytest.fixture(scope="module")
def wedged(names: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str], float]]:
    """A shell whose server accepts and never answers, started early since that takes 10 s."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        env = {**os.environ, "PROXY_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        words = [*program(f"{names}/sh"), "-c", "echo no"]
        process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        yield process, env, time.monotonic()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def engine(proxy: Proxy, names: str, wedged: object) -> Caller:
    pathlib.Path(proxy.workspace, "script.sh").write_text(
        '#!/bin/sh\necho "$0|$#|$1"; cat; nosuch; exit 9\n'
    )
    pathlib.Path(proxy.workspace, "long.sh").write_text(
        f': {"x" * 200_000}\necho long "$0" "$@"; exit 4\n'
    )
    return Caller(proxy, names)


def old_python(version: str) -> str:
    """An interpreter of this version; skips where there is none."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}")]
    found += [str(path) for path in root.glob(f"versions/{version}.*/bin/python3")]
    for path in found:
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    pytest.skip(f"there is no Python {version} here")


@pytest.fixture
def console_script(tmp_path: pathlib.Path) -> str:
    """The script that pip makes of `[project.scripts]`."""
    path = tmp_path / "bin" / "pocketcoder"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pocketcoder_proxy import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    path.chmod(0o755)
    return str(path)


LOST = (
    r"lost: (tmux has ended|\w+:terminal, pane %\d+, died); the next command starts a new terminal"
)
DEATHS = {
    "shell": "kill -9 $(tmux -S {socket} display -p -t {pane} '#{{pane_pid}}')",
    "pane": "tmux -S {socket} kill-pane -t {pane}",
    "window": "tmux -S {socket} kill-window -t {pane}",
    "session": "tmux -S {socket} kill-session -t pocketcoder",
    "server": "tmux -S {socket} kill-server",
    "server killed": "kill -9 $(tmux -S {socket} display -p '#{{pid}}')",
    "hung up": "kill -HUP $(tmux -S {socket} display -p -t {pane} '#{{pane_pid}}')",
}
INITIALIZE = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "t", "version": "1"},
}
EXEC = {"name": "exec", "arguments": {"cmd": "echo hi"}}


def request(method: str, params: Any = None, id_: Any = 1, **fields: Any) -> dict[str, Any]:
    return {
        "jsonrpc": "2.0",
        "id": id_,
        "method": method,
        "params": {} if params is None else params,
        **fields,
    }


def modern(
    method: str, params: Any = None, id_: Any = 1, version: Any = "2026-07-28", **meta: Any
) -> dict[str, Any]:
    envelope = {
        f"{NS}protocolVersion": version,
        f"{NS}clientCapabilities": {},
        **meta,
    }
    return request(method, {**(params or {}), "_meta": envelope}, id_)


def events_of(text: str) -> list[Any]:
    assert text.endswith("\n\n") or not text
    return [
        json.loads(part.partition("data: ")[2]) for part in text.split("\n\n") if "data: " in part
    ]


def mcp(
    proxy: Proxy, body: Any, method: str = "POST", path: str = "/mcp", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Send a message to `/mcp` with the headers that its era wants.

    Returns the status, the headers, and JSON or events.
    """
    given = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    if isinstance(body, dict) and NS + "protocolVersion" in (body.get("params") or {}).get(
        "_meta", {}
    ):
        given["MCP-Protocol-Version"] = str(body["params"]["_meta"][NS + "protocolVersion"])
        given["Mcp-Method"] = body["method"]
        given |= {"Mcp-Name": body["params"]["name"]} if "name" in body["params"] else {}

    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, got, answer = proxy.request(
        method, path, sent, {name: value for name, value in given.items() if value}
    )
    if got.get("content-type") == "text/event-stream":
        return status, got, events_of(answer.decode())
    return status, got, json.loads(answer) if answer[:1] == b"{" else None


def mcp_status(proxy: Proxy, body: Any, *words: str, **options: str) -> int:
    return mcp(proxy, body, *words, **options)[0]


def mcp_result(proxy: Proxy, body: Any, *words: str, **options: str) -> Any:
    return mcp(proxy, body, *words, **options)[2]["result"]


def mcp_error_code(proxy: Proxy, body: Any, *words: str, **options: str) -> Any:
    return mcp(proxy, body, *words, **options)[2]["error"]["code"]


def opened(proxy: Proxy, version: str = "2025-11-25", **headers: str) -> str:
    """A session of Streamable HTTP."""
    status, got, answer = mcp(
        proxy, request("initialize", {**INITIALIZE, "protocolVersion": version}), **headers
    )
    assert status == 200
    assert answer["result"]["protocolVersion"] == version

    session = got["mcp-session-id"]
    noted = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert mcp(proxy, noted, Mcp_Session_Id=session, **headers)[0] == 202

    return session


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A server that relays the MCP fixture in each era."""
    path = tmp_path_factory.mktemp("fixtures") / "server.py"
    path.write_text(MCP_FIXTURE)
    command = f"{sys.executable} -S {path} mcp-fixture"
    server = Proxy(*(f"--mcp-server={era}={command} {era}" for era in ("legacy", "modern", "both")))
    yield server
    server.remove()


@pytest.fixture
def fixtures(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "server.py").write_text(MCP_FIXTURE)
    return tmp_path / "server.py"


ERAS = [(client, server) for client in ("legacy", "modern") for server in ("legacy", "modern")]
CAN: dict[str, Any] = {"elicitation": {}, "sampling": {}, "roots": {}}


class Client:
    """A client of one era at `/servers/NAME/mcp`, with all capabilities."""

    def __init__(
        self,
        proxy: Proxy,
        era: str,
        name: str,
        make: OpenStream,
        can: Any = None,
        info: Any = None,
    ) -> None:
        self.proxy = proxy
        self.era = era
        self.path = f"/servers/{name}/mcp"
        self.make = make
        self.can = CAN if can is None else can
        self.headers = dict[str, str]()
        self.info = info or {"name": "t", "version": "1"}

        if era == "legacy":
            params = {
                **INITIALIZE,
                "capabilities": self.can,
                "clientInfo": self.info,
            }
            hello = request("initialize", params, id_=0)
            _, headers, self.hello = mcp(proxy, hello, path=self.path)
            self.headers = {"Mcp_Session_Id": headers["mcp-session-id"]}
            self.tell("notifications/initialized", {})

    def message(self, method: str, params: dict[str, Any], id_: Any) -> dict[str, Any]:
        meta = params.get("_meta", {})
        if self.era == "legacy":
            return request(method, params, id_)
        envelope = {NS + "clientCapabilities": self.can, NS + "clientInfo": self.info}
        return modern(method, params, id_, **{**envelope, **meta})

    def tell(self, method: str, params: dict[str, Any]) -> None:
        message = {
            "jsonrpc": "2.0",
            "method": method,
            "params": params,
        }
        assert mcp(self.proxy, message, path=self.path, **self.headers)[0] == 202

    def ask(
        self, method: str, params: dict[str, Any] | None = None, id_: Any = 1, **headers: str
    ) -> Any:
        """All that comes, the response last."""
        status, _, got = mcp(
            self.proxy,
            self.message(method, params or {}, id_),
            path=self.path,
            **self.headers,
            **headers,
        )
        assert status in (200, 400, 404)

        return got if isinstance(got, list) else [got]

    def result(self, method: str, params: Any = None, *words: Any, **options: Any) -> Any:
        return self.ask(method, params, *words, **options)[-1]["result"]

    def error_code(self, method: str, params: Any = None, *words: Any, **options: Any) -> Any:
        return self.ask(method, params, *words, **options)[-1]["error"]["code"]

    def open(self, method: str, params: dict[str, Any], id_: Any = 1) -> Stream:
        """The same, event by event."""
        message = self.message(method, params, id_)
        headers = dict(self.headers)
        if self.era == "modern":
            headers |= {"MCP_Protocol_Version": "2026-07-28", "Mcp_Method": method}
            headers |= {"Mcp_Name": params["name"]} if "name" in params else {}
        return self.make(self.proxy, self.path, message, **headers)

    def call(self, name: str, id_: Any = 1, token: Any = None, **arguments: Any) -> Any:
        """The result of a tool; or the error."""
        params: dict[str, Any] = {"name": name, "arguments": arguments}
        if token is not None:
            params["_meta"] = {"progressToken": token}
        *told, answer = self.ask("tools/call", params, id_)
        assert answer["id"] == id_
        assert {each["params"]["progressToken"] for each in told} <= {token}
        return answer.get("result", answer.get("error"))


class Stream:
    """An event stream, read as it comes."""

    def __init__(self, proxy: Proxy, path: str, body: Any = None, **headers: str) -> None:
        self.connection = proxy.connect()
        given = {
            "Accept": "application/json, text/event-stream",
            "Content-Type": "application/json",
        }
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(
            "POST" if body else "GET", path, json.dumps(body) if body else None, given
        )
        # An answer that ends with the connection takes it away.
        self.socket = cast("socket.socket", self.connection.sock)
        self.answer = self.connection.getresponse()
        self.status = self.answer.status

    def next(self) -> Any:
        """The next event's data; None at the end."""
        data = None
        while line := self.answer.readline().decode():
            if line.startswith("data: "):
                data = line[6:].rstrip("\n")
            elif line == "\n" and data is not None:
                return json.loads(data) if data[:1] == "{" else data
        return None

    def break_off(self) -> None:
        """End the connection, in the middle of a `next` too."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


# What the fixture `stream` gives.
OpenStream = Callable[..., Stream]


@pytest.fixture
def stream() -> Iterator[OpenStream]:
    made: list[Stream] = []

    def make(proxy: Proxy, path: str, body: Any = None, **headers: str) -> Stream:
        made.append(Stream(proxy, path, body, **headers))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(params=ERAS, ids=[" to ".join(pair) for pair in ERAS])
def client(request: pytest.FixtureRequest, relay: Proxy, stream: OpenStream) -> Client:
    era, server = request.param
    return Client(relay, era, server, stream)


def program_of(function: Callable[[], None]) -> str:
    """A program that calls this function, which uses nothing outside of itself."""
    source = textwrap.dedent(inspect.getsource(function))
    return f"from __future__ import annotations\n\n{source}\n{function.__name__}()\n"


def peculiar_server() -> None:
    """A stdio MCP server; its arguments say what is peculiar about it.

    era=legacy|modern|both  what it speaks
    lock=FILE    only one may run at a time
    starts=FILE  gets a line for each start
    slow=S       it reads nothing before
    exits        it ends at `server/discover`
    silent       it answers nothing that it does not know
    asks=hello   it asks for the roots before it answers `initialize`, and waits for them
    asks=start   it does so once it is initialized
    mark         a byte order mark comes first
    """
    import fcntl
    import json
    import os
    import sys
    import threading
    import time

    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    era = words.get("era", "legacy")
    served = "2026-07-28"
    writing = threading.Lock()
    came = threading.Condition()
    answers: dict[Any, Any] = {}
    roots: list[Any] = []
    calls = [0]

    def write(raw: bytes) -> None:
        with writing:
            sys.stdout.buffer.write(raw)
            sys.stdout.buffer.flush()

    def say(**fields: Any) -> None:
        write(json.dumps({"jsonrpc": "2.0", **fields}).encode() + b"\n")

    def ask(method: str, name: str) -> Any:
        say(id=name, method=method, params={})
        with came:
            came.wait_for(lambda: name in answers)
            return answers.pop(name)

    def ask_for_roots() -> None:
        roots.append(ask("roots/list", "roots").get("result"))

    def text(value: Any) -> Any:
        return {"content": [{"type": "text", "text": json.dumps(value)}]}

    def call(id_: Any, name: str, arguments: Any) -> None:
        calls[0] += 1
        if name == "crash":
            os._exit(3)

        if name == "pid":
            time.sleep(arguments.get("seconds", 0))
            say(id=id_, result=text(os.getpid()))
        elif name == "count":
            say(id=id_, result=text(calls[0]))
        elif name == "roots":
            say(id=id_, result=text(roots))
        elif name == "ask":
            time.sleep(arguments.get("seconds", 0))
            say(id=id_, result=text(ask("roots/list", f"ask {id_}")))
        elif name == "ask later":
            say(id=id_, result=text("soon"))
            time.sleep(0.1)
            ask_for_roots()
        elif name == "odd bytes":
            write(b'{"jsonrpc":"2.0","id":%d,"result":{"text":"caf\xe9"}}\n' % id_)
        elif name == "long":
            filling = b"x" * arguments["bytes"]
            first = b'{"jsonrpc":"2.0","id":%d,"result":{"text":"%s"}}\n'
            last = b'{"result":{"text":"\\",\\"id\\":1}%s"},"jsonrpc":"2.0","id":%d}\n'
            write(last % (filling, id_) if arguments["id"] == "last" else first % (id_, filling))
        elif name == "note later":
            say(id=id_, result=text("soon"))
            time.sleep(0.1)
            for number in range(arguments["count"]):
                say(method="notifications/message", params={"level": "info", "data": number})
        elif name == "withdraw":
            say(method="notifications/cancelled", **arguments)
            say(id=id_, result=text("done"))
        elif name == "ping later":
            say(id=id_, result=text("soon"))
            time.sleep(0.1)
            for number in range(arguments["count"]):
                roots.append(ask("ping", f"ping {number}").get("result"))
        else:
            say(id=id_, error={"code": -32602, "message": f"no tool {name}: {arguments}"})

    if "starts" in words:
        with open(words["starts"], "a") as file:
            file.write(f"{os.getpid()}\n")

    if "lock" in words:
        # It stays locked until this process ends.
        lock = open(words["lock"], "a")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit("another one runs")

    time.sleep(float(words.get("slow", 0)))
    if "mark" in words:
        write(b"\xef\xbb\xbf")
    info = {"name": "peculiar", "version": "1"}

    for line in sys.stdin:
        got = json.loads(line)
        method = got.get("method")
        params = got.get("params") or {}

        if method is None:
            with came:
                answers[got["id"]] = got
                came.notify_all()
        elif method == "server/discover" and era != "legacy":
            result = {"supportedVersions": [served], "capabilities": {"tools": {}}}
            say(id=got["id"], result=result)
        elif method == "server/discover" and "exits" in words:
            sys.exit(4)
        elif method == "initialize" and era != "modern":

            def greet(id_: Any = got["id"]) -> None:
                if words.get("asks") == "hello":
                    ask_for_roots()
                hello = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}}
                say(id=id_, result={**hello, "serverInfo": info})

            threading.Thread(target=greet, daemon=True).start()
        elif method == "notifications/initialized" and words.get("asks") == "start":
            threading.Thread(target=ask_for_roots, daemon=True).start()
        elif method == "ping":
            say(id=got["id"], result={})
        elif method == "tools/list":
            say(id=got["id"], result={"tools": []})
        elif method == "tools/call":
            given = (got["id"], params["name"], params.get("arguments") or {})
            threading.Thread(target=call, args=given, daemon=True).start()
        elif "id" in got and "silent" not in words:
            say(id=got["id"], error={"code": -32601, "message": "no such method"})


@pytest.fixture
def peculiar(tmp_path: pathlib.Path) -> str:
    """The command that starts one."""
    path = tmp_path / "peculiar.py"
    path.write_text(program_of(peculiar_server))
    return f"{sys.executable} -S {path}"


def text_of(result: dict[str, Any]) -> str:
    return "".join(part["text"] for part in result["content"])


def said(result: Any) -> Any:
    """What a tool of the peculiar server answers."""
    return json.loads(text_of(result))


def call(proxy: Proxy, name: str, **arguments: Any) -> dict[str, Any]:
    """The result of a tool, by a modern request."""
    status, _, answer = mcp(proxy, modern("tools/call", {"name": name, "arguments": arguments}))
    assert status == 200, answer
    return dict(answer["result"])


async def close(connection: Any) -> None:
    """Close a WebSocket, and wait until the other side has closed it too."""
    connection.close()
    with contextlib.suppress(asyncio.TimeoutError):
        while await asyncio.wait_for(connection.read_message(), 1) is not None:
            pass


def screen_when(
    watched: Stream, fact: Callable[[dict[str, Any]], Any], seconds: float = 20.0
) -> dict[str, Any]:
    """Read pictures until one has this fact."""
    # The comments of a silent stream would keep the connection alive for ever.
    timer = threading.Timer(seconds, watched.break_off)
    timer.start()
    screen: dict[str, Any] | None = None
    try:
        while (screen := watched.next()) is not None:
            if fact(screen):
                return dict(screen)
    finally:
        timer.cancel()
    raise AssertionError(f"the stream has ended, or has not shown it within {seconds} s")


def screen_text(screen: dict[str, Any]) -> str:
    """What a screen shows, in all its panes."""
    return "\n".join(pane["text"] for pane in screen["panes"])


def shows(text: str, screen: dict[str, Any]) -> bool:
    return text in screen_text(screen)


def watch(proxy: Proxy, stream: OpenStream, agents: str, **headers: str) -> Stream:
    """A stream of what terminals show, after its first picture."""
    watched = stream(proxy, f"/terminals/{agents}", None, **headers)
    assert watched.status == 200, watched.answer.read()
    assert watched.next()["panes"]
    return watched


def count_pictures(proxy: Proxy, path: pathlib.Path) -> None:
    """Have tmux add a line to a file for each picture that is taken."""
    path.write_text("")
    proxy.tmux("set-hook", "-g", "after-capture-pane", f"run-shell -b 'echo >> {path}'")


class Browser:
    """A Chromium of its own, driven over the DevTools protocol.

    Its calls are those of a thread with an event loop: tests stay as they are.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="pcb")
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        assert program, "chromium is needed: install it, with `apt-get install chromium`"
        words = [
            program,
            "--headless=new",
            "--disable-gpu",
            "--disable-quic",
            "--disable-sync",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--remote-debugging-port=0",
            f"--user-data-dir={self.folder}/profile",
            "--lang=en-US",
            "about:blank",
        ]
        if os.geteuid() == 0:
            words.insert(1, "--no-sandbox")

        self.log = open(f"{self.folder}/log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            words,
            stdout=self.log,
            stderr=self.log,
            env={**outer_environment(), "HOME": self.folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        place = pathlib.Path(self.folder, "profile/DevToolsActivePort")
        eventually(lambda: place.exists() and place.read_text().count("\n"), 60)
        port, path = place.read_text().split("\n")[:2]

        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.numbers = itertools.count(1)
        self.answers: dict[int, asyncio.Future[Any]] = {}
        # By session.
        self.tabs: dict[str, Tab] = {}
        self.await_(self._connect(f"ws://127.0.0.1:{port}{path}"))

    def await_(self, work: Any, seconds: float = 30.0) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    async def _connect(self, url: str) -> None:
        request = tornado.httpclient.HTTPRequest(url, connect_timeout=20)
        self.socket = await tornado.websocket.websocket_connect(
            request, max_message_size=256 * 1024 * 1024
        )
        self.reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        while (message := await self.socket.read_message()) is not None:
            got = json.loads(message)
            if "id" in got:
                future = self.answers.pop(got["id"])
                if not future.done():
                    future.set_result(got)
            elif got.get("sessionId") in self.tabs:
                self.tabs[got["sessionId"]].events.append((got["method"], got["params"]))

    async def _call(self, method: str, session: str | None, params: dict[str, Any]) -> Any:
        number = next(self.numbers)
        answered: asyncio.Future[Any] = self.loop.create_future()
        self.answers[number] = answered
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session

        await self.socket.write_message(json.dumps(message))
        answer = await answered
        assert "error" not in answer, (method, answer)
        return answer["result"]

    async def _close(self) -> None:
        await asyncio.wait({self.reading}, timeout=10)
        self.socket.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        return self.await_(self._call(method, session, params))

    def open(self, url: str, width: int = 1440, height: int = 900, scheme: str = "dark") -> Tab:
        """A tab without cookies or memories of others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = Tab(self, attached["sessionId"], context)
        self.tabs[tab.session] = tab
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility", "DOM"):
            tab.call(f"{domain}.enable")

        tab.resize(width, height)
        tab.prefer(scheme)
        tab.go(url)
        return tab

    def close(self) -> None:
        """Leave nothing behind.  Never raises: it would hide a failure."""
        with contextlib.suppress(Exception):
            self.call("Browser.close")
            self.await_(self._close())

        with contextlib.suppress(Exception):
            self.process.wait(10)

        with contextlib.suppress(Exception):
            os.killpg(self.process.pid, signal.SIGKILL)

        with contextlib.suppress(Exception):
            self.process.wait(10)
            for pid in processes_with(self.folder):
                os.kill(pid, signal.SIGKILL)

            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)
            self.loop.close()

        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Tab:
    """A page in a browser, as a person has it."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self.browser = browser
        self.session = session
        self.context = context
        # Method and parameters, in their order.
        self.events: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self.session, **params)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """Light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def minimize(self, is_minimized: bool) -> None:
        """Take its window away, or bring it back."""
        window = self.call("Browser.getWindowForTarget")["windowId"]
        state = "minimized" if is_minimized else "normal"
        self.call("Browser.setWindowBounds", windowId=window, bounds={"windowState": state})

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 15.0) -> Any:
        return eventually(lambda: self.evaluate(expression), seconds)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        found = self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".map((each) => each.innerText).join('\\n')"
        )
        return str(found)

    def wait_for_text(self, selector: str, text: str, seconds: float = 15.0) -> None:
        eventually(lambda: text in self.text(selector), seconds)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        place = self.wait_for(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            " if (!found) return null; found.scrollIntoView({block: 'nearest'});"
            " const box = found.getBoundingClientRect();"
            " return box.width && [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    def press(self, key: str, code: int = 0, text: str = "", modifiers: int = 0) -> None:
        """Press a key; `code` is what Windows calls it, modifiers 1 Alt, 2 Control, 8 Shift."""
        fields: dict[str, Any] = {
            "key": key,
            "windowsVirtualKeyCode": code,
            "modifiers": modifiers,
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def type(self, text: str) -> None:
        """Enter text as a keyboard does."""
        self.call("Input.insertText", text=text)

    def requests(self) -> list[str]:
        """The addresses of all requests so far."""
        return [
            params["request"]["url"]
            for method, params in self.events
            if method == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the browser has logged of faults: scripts that failed, policies that were hurt."""
        found = [
            params["entry"]["text"]
            for method, params in self.events
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")
        ]
        return found + [
            json.dumps(params)
            for method, params in self.events
            if method == "Runtime.exceptionThrown"
        ]

    def picture(self, path: pathlib.Path | str) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


# What the fixture `tab` gives.
OpenTab = Callable[..., Tab]


@pytest.fixture
def tab(browser: Browser) -> Iterator[OpenTab]:
    """Tabs that show the page of a server, of one agent if there is a name."""
    made: list[Tab] = []

    def make(proxy: Proxy, agent: str = "", fragment: str = "", **options: Any) -> Tab:
        opened = browser.open(f"http://127.0.0.1:{proxy.port}/{fragment}", **options)
        made.append(opened)
        if agent:
            opened.click(f"#tabs [data-agent={agent}]")
            opened.wait_for(f"terminals.has({json.dumps(agent)}) && terminals.size === 1")
        return opened

    yield make
    for each in made:
        each.close()


JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Proxy]:
    """A server with a token, for requests that it refuses."""
    server = Proxy(POCKETCODER_TOKEN="t0ken")
    yield server
    server.remove()


class Channel:
    """A client of `GET /exec/ws`, with another implementation of WebSocket than ours."""

    patience = 10.0  # seconds, for a message

    def __init__(self, proxy: Proxy, **options: Any) -> None:
        self.url = f"ws://127.0.0.1:{proxy.port}/exec/ws"
        self.options = options

    async def __aenter__(self) -> Channel:
        request = tornado.httpclient.HTTPRequest(self.url, **self.options)
        self.socket = await tornado.websocket.websocket_connect(request, subprotocols=[pp.CHANNELS])
        assert self.socket.selected_subprotocol == pp.CHANNELS
        self.streams = {1: b"", 2: b""}
        return self

    async def __aexit__(self, *_: object) -> None:
        await close(self.socket)

    async def send(self, message: bytes | dict[str, Any]) -> None:
        binary = isinstance(message, bytes)
        await self.socket.write_message(message if binary else json.dumps(message), binary=binary)

    async def next(self) -> int:
        """Read a message; its channel."""
        message = await asyncio.wait_for(self.socket.read_message(), self.patience)
        assert isinstance(message, bytes), message
        if message[0] == 3:
            self.final = json.loads(message[1:])
        else:
            self.streams[message[0]] += message[1:]
        return message[0]

    async def end(self) -> dict[str, Any]:
        while await self.next() != 3:
            pass
        return dict(self.final)


def frame(text: str) -> bytes:
    """A WebSocket frame of a client, with a mask of zeros."""
    data = text.encode()
    size = bytes([128 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return b"\x81" + size + bytes(4) + data


def shaken(proxy: Proxy, path: str, after: bytes = b"") -> socket.socket:
    """A WebSocket that sends its handshake and first frames in one piece."""
    peer = proxy.raw_connection()
    head = (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    )
    head += f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {pp.WS_KEY}\r\n"
    head += "Sec-WebSocket-Protocol: mcp\r\n\r\n"
    peer.sendall(head.encode() + after)
    return peer


class Kept:
    """`POST /exec` on one connection that is kept open."""

    def __init__(self, proxy: Proxy) -> None:
        self.connection = proxy.connect()

    def __call__(self, cmd: str = "true", **fields: Any) -> dict[str, Any]:
        self.connection.request("POST", "/exec", json.dumps({"cmd": cmd, **fields}), JSON_TYPE)
        answer: dict[str, Any] = json.loads(self.connection.getresponse().read())
        return answer

    def close(self) -> None:
        self.connection.close()


def resolved(document: Any, part: Any) -> Any:
    """What a reference of an OpenAPI document means; what is none, means itself."""
    while "$ref" in part:
        found = document
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        part = found
    return part


def fits(value: Any, schema: Any) -> bool:
    """Whether a value is what its JSON Schema describes, as a public validator sees it."""
    from openapi_schema_validator import OAS31Validator

    return bool(OAS31Validator(schema).is_valid(value))


def types_of(schema: Any) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


# A value of each type.
OF_TYPES: list[Any] = [None, True, 7, 1.5, "no such value", ["x"], {"x": "y"}]


def bounds_of(schema: Any) -> Iterator[tuple[str, Any]]:
    """Values at the bounds of a JSON Schema, and just beyond them, each with a name."""
    if "minimum" in schema:
        yield "minimum", schema["minimum"]
        yield "below-minimum", schema["minimum"] - 1
    if "exclusiveMinimum" in schema:
        yield "at-exclusive-minimum", schema["exclusiveMinimum"]
        yield "above-exclusive-minimum", schema["exclusiveMinimum"] + 0.001
    if "maximum" in schema:
        yield "maximum", schema["maximum"]
        yield "above-maximum", schema["maximum"] + 1
    if "minLength" in schema:
        yield "min-length", "x" * schema["minLength"]
        yield "below-min-length", "x" * (schema["minLength"] - 1)
    if "maxLength" in schema:
        yield "max-length", "x" * schema["maxLength"]
        yield "above-max-length", "x" * (schema["maxLength"] + 1)
    if "pattern" in schema:
        yield "empty", ""
        yield "other-characters", "a b/c"
        yield "newline", "a\n"
    if "maxItems" in schema:
        item = schema["examples"][0][0]
        yield "max-items", [item] * schema["maxItems"]
        yield "above-max-items", [item] * (schema["maxItems"] + 1)
    if "items" in schema:
        yield "no-items", []
        for name, value in bounds_of(schema["items"]):
            yield f"item-{name}", [value]
        for value in OF_TYPES:
            yield f"item-{type(value).__name__}", [value]
    if "additionalProperties" in schema:
        yield "no-properties", {}
        yield "property-without-a-name", {"": "x"}
        yield "property-with-an-equals-sign", {"a=b": "x"}
        for name, value in bounds_of(schema["additionalProperties"]):
            yield f"property-{name}", {"NAME": value}
        for value in OF_TYPES:
            yield f"property-{type(value).__name__}", {"NAME": value}


def values_of(schema: Any) -> list[tuple[str, Any, bool]]:
    """Values of a JSON Schema, right and wrong ones: a name, the value, whether it is right."""
    found = [(f"example-{at}", value) for at, value in enumerate(schema.get("examples", []))]
    found += [(f"choice-{value}", value) for value in schema.get("enum", [])]
    if "default" in schema:
        found.append(("default", schema["default"]))
    found += bounds_of(schema)
    found += [(f"a-{type(value).__name__}", value) for value in OF_TYPES]
    # That validator's `$` also stands before a newline at the end, unlike that of JSON Schema.
    return [
        (name, value, fits(value, schema) and not name.endswith("newline")) for name, value in found
    ]


# ==========================================================================
# Map
# ==========================================================================
BANNER = re.compile(r"# ={70,}\n# (?P<name>[^\n]+)\n# ={70,}\n")
SECTIONS = [(match["name"], match.start()) for match in BANNER.finditer(SOURCE)]
STARTS = [SOURCE.count("\n", 0, start) + 1 for _, start in SECTIONS]


def section_of(line: int) -> int:
    return sum(start <= line for start in STARTS) - 1


def names_defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )

    return [
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


def test_sections_use_only_what_stands_above_them() -> None:
    home: dict[str, int] = {}
    uses = []
    for node in ast.parse(SOURCE).body:
        home |= {name: section_of(node.lineno) for name in names_defined(node)}
        uses += [(section_of(node.lineno), n.id) for n in ast.walk(node) if isinstance(n, ast.Name)]
    assert [use for use in uses if home.get(use[1], -1) > use[0]] == []


def test_the_map_lists_every_section_route_and_variable() -> None:
    head = ast.get_docstring(ast.parse(SOURCE)) or ""
    assert [name for name, _ in SECTIONS if name not in head] == []
    paths = [
        re.sub(r"\(\?P<(\w+)>[^)]*\)", lambda found: found[1].upper(), path)
        for path, _ in pp.ROUTES
    ]
    assert [path for path in paths if "/NAME/" not in path and path not in head] == []
    assert [
        name
        for name in re.findall(r"\"(POCKETCODER_[A-Z_]+|TMUX_S[A-Z]+)\"", SOURCE)
        if name not in head
    ] == []


README = (MODULE.parent / "README.md").read_text(encoding="utf-8")
# What it shows as code: between two backquotes, and what a call of curl asks for.
CODE = re.findall(r"`([^`\n]+)`", README)
ADDRESSES = re.findall(r"http://127\.0\.0\.1:3001(/[^\s\"'`?)>]*)", README)
# Variables of the tests, and two that a command does not see.
OTHER_VARIABLES = {"POCKETCODER_FUZZ", "POCKETCODER_SOAK", "TMUX_PANE"}


def section_of_readme(title: str) -> str:
    """The text below a heading, up to the next one."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(table: str, heading: str) -> list[str]:
    """What the first column of a table shows as code; `heading` starts its first line."""
    rows = table.partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def options_in_help(level: str) -> list[tuple[str, ...]]:
    """The names of each option that its help lists, without those of all levels."""
    lines = re.findall(r"^  (-.*?)(?:  |$)", run(level, "--help").stdout, re.MULTILINE)
    options = [tuple(re.findall(r"(?:^|, )(--?[\w-]+)", line)) for line in lines]
    return [names for names in options if not {"--help", "--version"} & {*names}]


def test_readme_and_help_name_the_same_options() -> None:
    listed = [names for level in pp.HELP for names in options_in_help(level)]
    missing = [names for names in listed if not re.search(f"(?:{'|'.join(names)})[ `]", README)]
    assert missing == []

    known = {name for names in listed for name in names} | {"--help", "--version"}
    named = {word for code in CODE for word in re.findall(r"^--[\w-]+", code)}
    assert named - known == set()


def test_readme_and_help_name_the_same_variables() -> None:
    named = {*re.findall(r"(?:POCKETCODER|OPENCODE|TMUX|PROXY)_[A-Z_]+", README)}
    assert pp.VARIABLES.keys() - named == set()

    set_for_commands = (pp.__doc__ or "").partition("Set for a command:")[2].partition("\n\n")[0]
    others = {*re.findall(r"POCKETCODER_[A-Z_]+", set_for_commands)} | OTHER_VARIABLES
    assert named - pp.VARIABLES.keys() - others == set()


def test_readme_and_document_name_the_same_routes() -> None:
    served = {
        (method.upper(), re.sub(r"{(?:run_)?(id|agent|name)s?}", lambda at: at[1].upper(), path))
        for path, methods in pp.openapi(pp.described_routes(), has_token=False)["paths"].items()
        for method in methods
    }
    with_method = {tuple(code.split()[:2]) for code in CODE if re.match("[A-Z]+ /", code)}
    assert with_method - served == set()

    # All routes of MCP are at each relayed server too, which the README says in words.
    paths = {path for _, path in served if not path.startswith("/servers/NAME/")}
    addresses = [path.replace("$ID", "ID") for path in ADDRESSES]
    named = {path for _, path in with_method} | {*CODE, *addresses}
    assert paths - named == set()


def test_readme_and_document_name_the_same_fields() -> None:
    text = section_of_readme("HTTP by example")
    document = pp.openapi(pp.described_routes(), has_token=False)
    command = document["paths"]["/exec"]["post"]
    schema = command["requestBody"]["content"]["application/json"]["schema"]
    request = first_cells(text, "field")
    # This one is of the channel only.
    assert {*request, "combined"} == {*schema["properties"]}
    assert "`combined`" in text
    answer = command["responses"]["200"]["content"]["application/json"]["schema"]
    assert {*first_cells(text, "answer")} == {*answer["properties"]}

    listing = document["paths"]["/runs"]["get"]["parameters"]
    about_runs = section_of_readme("Long jobs")
    for each in listing:
        assert re.search(rf"`{each['name']}[`=]", about_runs), each["name"]


def test_the_readme_names_every_status_that_a_command_may_be_answered_with() -> None:
    statuses = section_of_readme("HTTP by example").partition("**Status codes.**")[2]
    named = {*re.findall(r"\b[2-5]\d\d\b", statuses.partition("\n")[0])}
    document = pp.openapi(pp.described_routes(), has_token=False)
    assert {*document["paths"]["/exec"]["post"]["responses"]} - named == set()


def test_the_readme_names_the_tools_in_the_order_in_which_clients_see_them() -> None:
    named = first_cells(section_of_readme("MCP: the terminals as tools"), "tool")
    assert [name for name in named if name in pp.TOOLS] == [*pp.TOOLS]


def test_the_readme_names_every_metric_with_its_labels() -> None:
    ours = {
        f"{each.name}{{{', '.join(each.labels)}}}" if getattr(each, "labels", None) else each.name
        for each in vars(pp.Metrics()).values()
        if each.name.startswith("pocketcoder_")
    }
    assert {code for code in CODE if re.match("pocketcoder_[a-z_]+({|$)", code)} == ours


def test_the_readme_names_the_limits_and_defaults_of_the_settings() -> None:
    said = [
        f"command {pp.MAX_COMMAND // pp.MIB} MiB, body {pp.MAX_BODY // pp.MIB} MiB",
        f"answer {pp.MAX_OUTPUT // pp.MIB} MiB, `env` {pp.MAX_ENVIRONMENT // pp.KIB} KiB",
        f"({pp.MAX_VARIABLE // pp.KIB} KiB a variable), headers {pp.MAX_HEADERS // pp.KIB} KiB",
        f"per agent {pp.MAX_PANES} panes, {pp.MAX_ALL_PANES} with commands that nobody waits for",
        f"a queue of {pp.MAX_QUEUE:,}; {pp.MAX_RUNS:,} remembered commands",
        f"{pp.MAX_SESSIONS:,} MCP sessions; {pp.MAX_WATCHERS} streams",
        f"| `timeout` | {pp.DEFAULT_TIMEOUT} |",
        f"at most {pp.MAX_TIMEOUT} |",
        f"| `max_output` | {pp.DEFAULT_OUTPUT // pp.MIB} MiB |",
        f"after `wait` seconds ({pp.TOOL_WAIT})",
        f"list the newest {pp.TOOL_LISTED}",
        f"come back within {pp.SESSION_KEPT:g} s",
        f"the first and the last {pp.KEPT_END // pp.MIB} MiB of output",
        f"`--keep-mib` ({pp.DEFAULT_KEEP})",
        f"ended after {pp.CHILD_IDLE:g} s (`--mcp-idle SECONDS`)",
        f"first answer may take {pp.CHILD_START:g} s",
        f"or the next progress, {pp.CHILD_TIMEOUT:g} s",
        f"An answer may have {pp.MAX_ANSWER // pp.MIB} MiB",
        f"has {pp.MAX_CHILDREN} processes at most",
        f"running commands get {pp.STOP_GRACE:g} s",
    ]
    assert [words for words in said if words not in README] == []


def test_a_copy_of_the_file_carries_its_licence_and_can_be_run() -> None:
    assert SOURCE.startswith(
        "#!/usr/bin/env python3\n# SPDX-License-Identifier: MIT\n# /// script\n"
    )
    assert os.access(MODULE, os.X_OK)


# ==========================================================================
# Shell Bridge
# ==========================================================================
@pytest.fixture
def audited_engine(audited: tuple[Proxy, pathlib.Path], names: str) -> tuple[Caller, pathlib.Path]:
    proxy, log = audited
    return Caller(proxy, names), log


SHOW = 'printf "%s|" "$0" "$#" "$@"; echo "$-" >&2'
FORMS: list[list[str | bytes]] = [
    ["-c", "echo out; echo err >&2; exit 7"],
    ["-c", "echo 'a  b' \"c$HOME\" `echo d` $(echo e) \\f"],
    ["-c", "cat <<'X'\nhere $doc\nX\necho end"],
    ["-c", ""],
    ["-c", " \n"],
    ["-c", "\r"],
    ["-c", "-n"],
    ["-c", "kill -TERM $$"],
    ["-c", "kill -9 $$"],
    ["-c", "nosuchcommand"],
    ["-c", "if then"],
    ["-c", "printf '\\377\\000\\001'; printf '\\376' >&2"],
    ["-c", b"echo \xff\xfe'q'"],
    ["-c", SHOW, "zero", "one two", "new\nline", "quote'\"$x`", "", "*"],
    ["-c", SHOW, b"\xff\xfe", b"a\x80'\\b"],
    ["-c", "echo ${#1}", "zero", "x" * 100_000],
    ["-c", f"echo {'y' * 100_000} | wc -c"],
    ["-c", 'echo "$@"', "git", "commit", "-m", "x"],
    ["-lc", "echo login; shopt -q login_shell; echo $?"],
    ["-l", "-c", "echo $1", "opencode", "/tmp"],
    ["-c", "-l", "echo cl"],
    ["-ec", "false; echo no"],
    ["-c", "-e", "false; echo no"],
    ["-ce", "echo $-"],
    ["-eu", "-o", "pipefail", "-c", "echo $-; false | true; echo no"],
    ["-euo", "pipefail", "-c", "echo $unset"],
    ["-o", "pipefail", "-c", "false | true"],
    ["+e", "-c", "false; echo yes"],
    ["-e", "+e", "-c", "false; echo yes"],
    ["-O", "extglob", "-c", "shopt extglob"],
    ["-c", "--", "echo dashes"],
    ["-c", "--", "-es"],
    ["-e", "--", "script.sh", "--", "-x"],
    ["-xc", "echo traced"],
    ["-nc", "echo not run"],
    ["--norc", "--noprofile", "-c", "echo long options"],
    ["-c"],
    ["-Z", "-c", "echo"],
    ["-Z"],
    ["--nope"],
    ["-e", "-o", "nope"],
    ["-ec", "-o"],
    ["-s", "one", "two"],
    ["-se"],
    ["script.sh", "argument"],
    ["-e", "script.sh"],
    ["long.sh", "a b"],
    ["nosuchscript"],
    ["."],
    ["--version"],
    [],
    ["-e"],
]
ON_STDIN = b'echo "script $1 $2"; read -r line; echo "$line"; false; echo end >&2\nnext\nexit 5\n'


# One of each kind; the others are slow ones.
TELLING_FORMS: list[list[str | bytes]] = [
    ["-c", "echo 'a  b' \"c$HOME\" `echo d` $(echo e) \\f"],
    ["-c", ""],
    ["-c", "kill -9 $$"],
    ["-c", SHOW, "zero", "one two", "new\nline", "quote'\"$x`", "", "*"],
    ["-c", SHOW, b"\xff\xfe", b"a\x80'\\b"],
    ["-l", "-c", "echo $1", "opencode", "/tmp"],
    ["-eu", "-o", "pipefail", "-c", "echo $-; false | true; echo no"],
    ["-c"],
    ["-Z", "-c", "echo"],
    ["-s", "one", "two"],
    ["-e", "script.sh"],
    ["long.sh", "a b"],
    ["nosuchscript"],
    [],
]


@pytest.mark.slow
def test_streams_that_are_one_file_keep_their_order(engine: Caller) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done; exit 4"
    for form in (["-c", script], ["-ec", script], ["script.sh", "x"]):
        here = engine.local(*form, input=b"x", stderr=subprocess.STDOUT)
        assert engine.run(*form, input=b"x", stderr=subprocess.STDOUT) == here


@contextlib.contextmanager
def stdin_of(kind: str) -> Iterator[dict[str, Any]]:
    """Options of Popen for a stdin of this kind, with `hello` in it where anything can be."""
    with contextlib.ExitStack() as undo:
        if kind == "/dev/null":
            yield {"stdin": subprocess.DEVNULL}
        elif kind == "closed":
            yield {"closes_stdin": True}
        elif kind == "terminal":
            master, slave = os.openpty()
            undo.callback(os.close, master)
            undo.callback(os.close, slave)
            os.write(master, b"hello\n")
            yield {"stdin": slave}
        elif kind == "pipe":
            read, write = os.pipe()
            undo.callback(os.close, read)
            os.write(write, b"hello\n")
            os.close(write)
            yield {"stdin": read}
        elif kind == "file":
            file = undo.enter_context(tempfile.TemporaryFile())
            file.write(b"hello\n")
            file.seek(0)
            yield {"stdin": file}
        else:
            ours, theirs = socket.socketpair()
            undo.enter_context(ours)
            undo.enter_context(theirs)
            ours.sendall(b"hello\n")
            ours.shutdown(socket.SHUT_WR)
            yield {"stdin": theirs}


NO_STDIN = ["/dev/null", "closed", "terminal"]


@pytest.mark.parametrize("kind", NO_STDIN)
def test_a_stdin_without_content_is_dev_null_in_the_sandbox(engine: Caller, kind: str) -> None:
    with stdin_of(kind) as options:
        process = engine.start("-c", "readlink /proc/self/fd/0; cat; exit 3", **options)
        out, err = process.communicate(timeout=20)
    assert out == b"/dev/null\n"
    assert err == b""
    assert process.returncode == 3


@pytest.mark.parametrize("kind", NO_STDIN)
@pytest.mark.slow
def test_no_thread_waits_for_a_stdin_without_content(engine: Caller, kind: str) -> None:
    with stdin_of(kind) as options:
        process = engine.start("-c", "echo ready; sleep 0.5", **options)
        assert process.stdout
        process.stdout.readline()
        threads = os.listdir(f"/proc/{process.pid}/task")
        process.communicate(timeout=20)
    assert len(threads) == 1


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_a_stdin_with_content_is_forwarded(engine: Caller, kind: str) -> None:
    with stdin_of(kind) as options:
        process = engine.start("-c", "cat; [ ! -c /dev/stdin ]", **options)
        out, err = process.communicate(timeout=20)
    assert out == b"hello\n"
    assert err == b""
    assert process.returncode == 0


def test_make_gives_its_recipes_no_stdin_to_wait_for(
    engine: Caller, tmp_path: pathlib.Path
) -> None:
    here = pathlib.Path(engine.cwd, "recipes")
    here.mkdir(exist_ok=True)
    here.joinpath("Makefile").write_text("all:\n\t@cat; readlink /proc/self/fd/0\n")
    shell = f"{engine.names}/pocketcoder-shell"
    path = {"PATH": f"{engine.names}:{engine.env['PATH']}"}

    with stdin_of("terminal") as options:
        done = subprocess.run(
            ["make", f"SHELL={shell}"],
            cwd=here,
            env=engine.env | path,
            stdin=options["stdin"],
            capture_output=True,
            timeout=20,
        )

    assert done.stdout == b"/dev/null\n"


def test_the_shell_reports_errors_with_its_own_files(engine: Caller) -> None:
    with open("/dev/full", "wb") as full, open("/dev/null", "wb") as null:
        process = engine.start("-c", "echo x; sleep 5", stdout=full)
        _, err = process.communicate(timeout=15)
        assert err == b"pocketcoder: cannot write: No space left on device\n"
        assert process.returncode == 125

        process = engine.start("-c", "echo x >&2; sleep 5", stderr=full)
        assert process.communicate(timeout=15)[0] == b""
        assert process.returncode == 125

        process = engine.start(stdin=null)
        assert process.communicate(timeout=15)[0] == b""
        assert process.returncode == 1

    pathlib.Path(engine.cwd, "binary.sh").write_bytes(b"\x7fELF\0\0")
    code, _, err = engine.run("binary.sh")
    assert code == 126
    assert err == b"pocketcoder: binary.sh: cannot execute binary file\n"

    os.makedirs(f"{engine.cwd}/gone")
    words = ["bash", "-c", 'rmdir ../gone; exec "$@"', "x", *engine.words("-c", "echo no")]
    done = subprocess.run(words, env=engine.env, cwd=f"{engine.cwd}/gone", capture_output=True)
    assert done.returncode == 125
    assert done.stdout == b""
    assert b"gone" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        pytest.param(NAMES[0], TELLING_FORMS, id="some"),
        *(pytest.param(name, FORMS, id=name, marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_every_form_of_arguments_works_as_with_bash(
    engine: Caller, name: str, forms: list[list[str | bytes]]
) -> None:
    def through_the_bridge(form: list[str | bytes]) -> tuple[int, bytes, bytes]:
        # Under this name plain words are one command.
        plain = name == "pocketcoder" and form and str(form[0])[:1] not in "-+"
        # Under this name it is our own version.
        ours = name == "pocketcoder" and form == ["--version"]
        code, out, err = engine.run(
            *(["shell", "--norc"] if plain or ours else []), *form, name=name, input=ON_STDIN
        )
        # The bridge reads the script itself, so the message is its own.
        missing = form[:1] in (["nosuchscript"], ["."]) and err.startswith(b"pocketcoder: ")

        return code, out, engine.local(*form)[2] if missing else err

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(through_the_bridge, forms))
    expected = [engine.local(*form, input=ON_STDIN) for form in forms]
    assert [case for case in zip(forms, got, expected, strict=True) if case[1] != case[2]] == []


def test_under_the_subcommand_plain_words_are_one_command(engine: Caller) -> None:
    assert engine.run("shell", "printf", "%s|", "a b", "$HOME", name="pocketcoder")[:2] == (
        0,
        b"a b|$HOME|",
    )
    assert engine.run("shell", "--", "echo", "-n", "x", name="pocketcoder")[:2] == (0, b"x")
    assert engine.run("shell", "--command", "echo $0 $1; exit 3", "zero", "1", name="pocketcoder")[
        :2
    ] == (
        3,
        b"zero 1\n",
    )
    assert engine.run("shell", "--command=echo hi", name="pocketcoder")[:2] == (0, b"hi\n")
    assert engine.run("-c", "echo option", name="pocketcoder")[:2] == (0, b"option\n")
    assert engine.run("-lc", "echo option", name="pocketcoder")[:2] == (0, b"option\n")


def test_a_wrong_option_is_reported_whole(engine: Caller) -> None:
    code, out, err = engine.run("shell", "--=x", "echo", "hi", name="pocketcoder")
    assert code == 2
    assert out == b""
    assert b"--=x: invalid option" in err


WORDS_SHOWN = [
    pytest.param(["ls", "-la", "a/b.c"], "ls -la a/b.c", id="plain"),
    pytest.param(["echo", "a b", "$x", ""], "echo 'a b' '$x' ''", id="quoted-where-needed"),
    pytest.param(["time", "time"], "'time' time", id="keyword"),
    pytest.param(["A=b", "x"], "'A=b' x", id="assignment"),
    pytest.param(["it's"], "'it'\\''s'", id="apostrophe"),
]


@pytest.mark.parametrize(("given", "text"), WORDS_SHOWN)
def test_plain_words_become_a_command_that_reads_as_written(given: list[str], text: str) -> None:
    assert pp.shell_arguments(["pocketcoder", "shell", *given]) == ["-c", "--", text]


@pytest.mark.slow
def test_a_first_word_that_names_a_file_is_a_script(engine: Caller) -> None:
    pathlib.Path(engine.cwd, "named.sh").write_text('echo "$0|$1"; exit 4\n')
    pathlib.Path(engine.cwd, "server").write_text("echo no\n")
    for form in (["./named.sh", "a"], ["named.sh", "b c"], [f"{engine.cwd}/named.sh"]):
        assert engine.run(*form, name="pocketcoder") == engine.local(*form), form
    code, out, err = engine.run("no-such.sh", name="pocketcoder")
    assert code == 2
    assert out == b""
    assert b"no-such.sh" in err
    assert b"usage" in engine.run("server", "--help", name="pocketcoder")[1]

    os.unlink(f"{engine.cwd}/server")


def test_without_arguments_a_person_sees_the_help(engine: Caller) -> None:
    with stdin_of("terminal") as options:
        process = engine.start(name="pocketcoder", **options)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert out == b""
    assert b"usage: pocketcoder" in err
    assert b"install" in err


def test_without_arguments_a_script_is_read_from_a_pipe(engine: Caller) -> None:
    assert engine.run(name="pocketcoder", input=b"echo $0; exit 3") == (3, b"bash\n", b"")


@pytest.mark.parametrize("kind", NO_STDIN)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("pocketcoder", ["shell"], id="subcommand"),
        pytest.param("sh", [], id="sh"),
        pytest.param("bash", ["-s"], id="bash-s"),
        pytest.param("bash", ["-l"], id="login"),
    ],
)
@pytest.mark.slow
def test_an_interactive_shell_is_refused(
    engine: Caller, name: str, words: list[str], kind: str
) -> None:
    with stdin_of(kind) as options:
        process = engine.start(*words, name=name, **options)
        out, err = process.communicate(timeout=20)

    assert process.returncode == 1
    assert out == b""
    assert err.decode() == (
        "pocketcoder: [Firewall Blocked] "
        "Interactive or raw shell invocation is restricted for security. "
        "Always execute commands via 'bash -c \"command\"'.\n"
    )


@pytest.mark.parametrize("kind", ["pipe", "file"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("sh", [], id="sh"),
        pytest.param("sh", ["-s"], id="sh-s"),
        pytest.param("bash", ["-s", "argument"], id="bash-s-argument"),
        pytest.param("pocketcoder", ["shell"], id="subcommand"),
        pytest.param("pocketcoder", [], id="pocketcoder"),
    ],
)
@pytest.mark.slow
def test_an_empty_stdin_is_an_empty_script(
    engine: Caller, name: str, words: list[str], kind: str
) -> None:
    with stdin_of(kind) as options:
        if kind == "pipe":
            os.read(options["stdin"], 100)
        else:
            options["stdin"].truncate(0)
        process = engine.start(*words, name=name, **options)
        out, err = process.communicate(timeout=20)

    assert process.returncode == 0
    assert out == b""
    assert err == b""


def test_both_parsers_agree_and_importers_can_run_commands(engine: Caller) -> None:
    for argv in (
        ["pocketcoder", "shell", "-c", "x"],
        ["sh", "x"],
        ["a/b-shell"],
        ["pocketcoder", "-lc", "x"],
    ):
        command = pp.Cli.parse(argv).command
        assert command.name == "shell"
        assert [*command.arguments] == pp.shell_arguments(argv)

    assert pp.shell_arguments(["pocketcoder", "server", "-p", "0"]) is None
    importer = {**engine.env, "PYTHONPATH": str(MODULE.parent)}
    code = (
        "import sys, pocketcoder_proxy as p; sys.exit(p.run('echo $0 $1; exit 6', ['zero', 'one']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=importer, cwd=engine.cwd, capture_output=True
    )
    assert done.returncode == 6, done.stderr
    assert done.stdout == b"zero one\n", done.stderr

    code = (
        "import sys, pocketcoder_proxy as p; "
        "sys.argv[1:] = ['shell', 'echo', 'a b']; sys.exit(p.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=importer, cwd=engine.cwd, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"a b\n", done.stderr


def test_the_way_to_a_command_imports_next_to_nothing(engine: Caller) -> None:
    # -S: what an environment's .pth files import is not ours.
    words = [
        sys.executable,
        "-S",
        "-X",
        "importtime",
        f"{engine.names}/pocketcoder",
        "shell",
        "-c",
        "true",
    ]
    done = subprocess.run(
        words,
        env=engine.env,
        cwd=engine.cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0

    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")}
    slow = [
        "tornado",
        "asyncio",
        "argparse",
        "json",
        "http",
        "urllib",
        "socket",
        "typing",
        "dataclasses",
        "enum",
        "re",
    ]
    assert "_socket" in loaded
    assert not loaded & {*slow, "subprocess"}


def test_the_shell_runs_without_tornado_and_the_server_asks_for_it(engine: Caller) -> None:
    # -S: without site-packages, so without Tornado.
    bare = [sys.executable, "-S", f"{engine.names}/pocketcoder"]
    done = subprocess.run(
        [*bare, "shell", "-c", "echo hi"], env=engine.env, cwd=engine.cwd, capture_output=True
    )
    assert done.returncode == 0
    assert done.stdout == b"hi\n"

    done = subprocess.run([*bare, "server"], env=engine.env, cwd=engine.cwd, capture_output=True)
    assert done.returncode == 1
    assert b"tornado" in done.stderr
    assert b"Traceback" not in done.stderr

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import pocketcoder_proxy as p; print(p.default_agent_name())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(MODULE.parent)], capture_output=True
    )
    assert done.stdout == b"poco\n", done.stderr


def test_every_line_has_the_grammar_of_python_3_8() -> None:
    ast.parse(SOURCE, feature_version=(3, 8))


@pytest.mark.parametrize("version", ["3.8", pytest.param("3.9", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "form",
    with_slow(
        [
            pytest.param(["-c", "echo $1; cat; exit 3", "zero", "one"], id="command"),
            pytest.param(["-e", "script.sh", "x"], id="script-file"),
            pytest.param(["-s", "argument"], id="script-on-stdin"),
            pytest.param(["-c", b"echo \xff\xfe'q'"], id="bytes"),
            pytest.param(["nosuchscript"], id="no-such-script"),
        ],
        "command",
        "script-file",
    ),
)
def test_the_shell_runs_on_old_pythons(
    engine: Caller, tmp_path: pathlib.Path, version: str, form: list[str | bytes]
) -> None:
    python = old_python(version)
    for file in (f"{engine.names}/bash", "alone"):
        path = tmp_path / "alone-shell"
        path.write_text(pp.installed_text())
        name = str(path) if file == "alone" else file
        done = subprocess.run(
            [python, name, *form],
            input=ON_STDIN,
            env=engine.env,
            cwd=engine.cwd,
            capture_output=True,
            timeout=20,
        )
        code, out, err = engine.local(*form, input=ON_STDIN)
        assert done.returncode == code, done.stderr
        assert done.stdout == out

        if form != ["nosuchscript"]:
            assert done.stderr == err


def test_a_directory_whose_name_is_no_text_can_be_used(engine: Caller) -> None:
    here = os.fsencode(engine.cwd) + b"/odd\xff"
    os.makedirs(here)
    got = engine.run(
        "-c",
        'pwd; echo "$ODD"',
        cwd=os.fsdecode(here),
        env={"PWD": os.fsdecode(here), "ODD": b"\xfe", "POCKETCODER_FORWARD_ENV": "ODD"},
    )
    assert got == (0, here + b"\n\xfe\n", b"")


def test_an_old_python_shows_the_version_of_the_shell() -> None:
    command = [str(old_python("3.8")), str(MODULE), "shell", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert done.stdout == f"pocketcoder-proxy {pp.VERSION}\n"


@pytest.mark.parametrize("version", ["3.8", "3.9"])
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["server"], id="server"),
        pytest.param(["--help"], id="help"),
        pytest.param(["--version"], id="version"),
        pytest.param(["install", "/tmp"], id="install"),
        pytest.param(["shell", "--help"], id="help-of-the-shell"),
        pytest.param(["nonsense"], id="nonsense"),
    ],
)
@pytest.mark.slow
def test_an_old_python_says_which_one_is_needed(version: str, words: list[str]) -> None:
    done = subprocess.run(
        [old_python(version), MODULE, *words], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "needs Python 3.10 or later" in done.stderr
    assert "3.8" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_old_python_cannot_import_the_module_and_says_which_one_is_needed() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import pocketcoder_proxy"
    done = subprocess.run(
        [old_python("3.9"), "-c", code, MODULE.parent], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1
    assert "ImportError: pocketcoder_proxy needs Python 3.10" in done.stderr


@pytest.mark.parametrize("version", ["3.6", "3.7"])
def test_a_python_that_is_too_old_for_the_shell_says_so(
    tmp_path: pathlib.Path, version: str
) -> None:
    path = tmp_path / "sh"
    path.write_text(pp.installed_text())
    done = subprocess.run(
        [old_python(version), path, "-c", "true"], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 125
    expected = f"pocketcoder: the shell needs Python 3.8 or later, this is {version}"
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1


def test_a_program_that_imports_the_module_is_not_mistaken_for_the_shell(
    tmp_path: pathlib.Path,
) -> None:
    program = tmp_path / "my-shell"
    program.write_text("import pocketcoder_proxy; print('mine')\n")
    env = {**os.environ, "PYTHONPATH": str(MODULE.parent)}
    done = subprocess.run(
        [sys.executable, program, "-c", "true"], env=env, capture_output=True, text=True, timeout=20
    )
    assert done.stdout == "mine\n"


@pytest.mark.slow
def test_busybox_runs_it_as_its_shell(engine: Caller, tmp_path: pathlib.Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("there is no busybox here")
    around = tmp_path / "around"
    around.write_text(f'#!{busybox} ash\nexec {engine.names}/pocketcoder shell "$@"\n')
    around.chmod(0o755)
    (tmp_path / "sh").symlink_to(f"{engine.names}/pocketcoder-shell")
    path = {"PATH": f"{engine.names}:{engine.env['PATH']}"}
    cases = [
        [str(around), "-c", 'echo "$0 $1 $POCKETCODER_AGENT"; exit 3', "zero", "a b"],
        [str(around), "-lc", 'echo "zero a b $POCKETCODER_AGENT"; exit 3'],
        [str(around), "sh", "-c", 'echo "zero a b $POCKETCODER_AGENT"; exit 3'],
        [
            *[busybox, "ash", "-c", f'{tmp_path}/sh -c "$@"; exit $?', "x"],
            *['echo "$0 $1 $POCKETCODER_AGENT"; exit 3', "zero", "a b"],
        ],
        [
            *[busybox, "ash", "-c"],
            f"echo 'echo zero a b $POCKETCODER_AGENT; exit 3' | {tmp_path}/sh",
        ],
    ]

    for words in cases:
        done = subprocess.run(
            words,
            env=engine.env | path,
            cwd=engine.cwd,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.stdout == b"zero a b engine\n", (words, done.stderr)
        assert done.returncode == 3


def test_what_stands_above_the_line_is_a_shell_by_itself(
    engine: Caller, tmp_path: pathlib.Path
) -> None:
    head = tmp_path / "sh"
    head.write_text(SOURCE.partition("# ------------------------------- the line")[0])
    done = subprocess.run(
        [sys.executable, str(head), "-c", "echo $0"],
        env=engine.env,
        cwd=engine.cwd,
        capture_output=True,
    )
    assert done.returncode == 0
    assert done.stdout == b"bash\n"
    assert done.stderr == b""


def test_the_request_carries_ids_directory_and_chosen_variables_only(engine: Caller) -> None:
    os.makedirs(f"{engine.cwd}/sub dir", exist_ok=True)
    variables = {
        "OPENCODE_SESSION_ID": "s1",
        "POCKETCODER_USAGE_ID": 'u"\\\n1',
        "KEY": "secret",
        "LC_A": 'é\t"',
        "LC_B": "",
    }
    variables |= {
        "POCKETCODER_FORWARD_ENV": "LC_*, POCKETCODER_TOKEN,ABSENT",
        "POCKETCODER_TOKEN": "t0k",
    }
    script = 'pwd; echo "$POCKETCODER_AGENT $POCKETCODER_SESSION_ID $POCKETCODER_USAGE_ID|$KEY|$LC_A|${LC_B-unset}|'
    script += '$POCKETCODER_TOKEN"'
    code, out, err = engine.run("-c", script, cwd=f"{engine.cwd}/sub dir", env=variables)
    assert code == 0
    assert err == b""
    assert out.decode() == f'{engine.cwd}/sub dir\nengine s1 u"\\\n1||é\t"||\n'

    argv = ["-lc", "ls 'é' \x01\x7f\udcff", "zero"]
    read = pp.ExecRequest.from_wire(pp.request_of(argv), os.getcwd())
    assert read.argv == tuple(argv)
    assert read.cmd == argv[1]
    assert read.timeout == 86400


@pytest.fixture
def linked(engine: Caller) -> str:
    """A directory of the workspace by the name of a link to it, `WORKSPACE/turned -> deep/er`."""
    os.makedirs(f"{engine.cwd}/deep/er", exist_ok=True)
    link = f"{engine.cwd}/turned"
    if not os.path.islink(link):
        os.symlink("deep/er", link)
    return link


NAMED = 'pwd; echo "$PWD"; pwd -P; cd ..; pwd; cd turned; cd -P ..; pwd'


def test_a_directory_keeps_the_name_its_caller_uses(engine: Caller, linked: str) -> None:
    local = subprocess.run(
        ["bash", "-c", NAMED], cwd=linked, env={**engine.env, "PWD": linked}, capture_output=True
    )
    got = engine.run("-c", NAMED, cwd=linked, env={"PWD": linked})
    assert got == (0, local.stdout, b"")
    assert got[1].startswith(f"{linked}\n".encode())


@pytest.mark.parametrize(
    "pwd",
    with_slow(
        [
            pytest.param("/", id="elsewhere"),
            pytest.param("/no/such", id="nowhere"),
            pytest.param("", id="empty"),
            pytest.param("turned", id="relative"),
            pytest.param("{link}/../deep/er", id="back-through-a-link"),
        ],
        "elsewhere",
        "back-through-a-link",
    ),
)
def test_a_wrong_name_of_the_directory_is_not_used(engine: Caller, linked: str, pwd: str) -> None:
    got = engine.run("-c", "pwd", cwd=linked, env={"PWD": pwd.format(link=linked)})
    assert got == (0, f"{engine.cwd}/deep/er\n".encode(), b"")


def test_the_directory_keeps_its_name_in_a_terminal_that_resolves_links(
    own: StartServer, names: str
) -> None:
    proxy = own()
    pathlib.Path(proxy.folder, "home/.bashrc").write_text("PS1='$ '; set -P; export PWD\n")
    engine = Caller(proxy, names)
    os.makedirs(f"{engine.cwd}/deep/er")
    os.symlink("deep/er", f"{engine.cwd}/link")
    here = f"{engine.cwd}/link"
    got = engine.run("-c", "cd ..; pwd", cwd=here, env={"PWD": here})
    assert got == (0, f"{engine.cwd}\n".encode(), b"")


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"LC_ALL": "C.UTF-8"}, id="utf-8"),
        pytest.param(
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, id="a-locale-of-bytes"
        ),
    ],
)
def test_text_arrives_whatever_the_locale(engine: Caller, variables: dict[str, str]) -> None:
    ours = {"LC_A": "é", "POCKETCODER_FORWARD_ENV": "LC_A"}
    got = engine.run("-c", "echo $LC_A $1 ü", "zero", "ä", env=variables | ours)
    assert got == (0, "é ä ü\n".encode(), b"")


@pytest.mark.slow
def test_people_and_the_audit_log_see_the_command_as_written(
    audited_engine: tuple[Caller, pathlib.Path],
) -> None:
    engine, log = audited_engine
    pathlib.Path(engine.cwd, "shown.sh").write_text("echo script $1\n")
    forms = {
        "echo login": ["-lc", "echo login"],
        "echo $0 $1": ["-c", "echo $0 $1", "zero", "one"],
        "echo joined": ["-c", "echo joined"],
        "echo words": ["shell", "echo", "words"],
        "echo script $1\n": ["shown.sh", "a"],
        "bash -s one": ["-s", "one"],
    }

    for shown, form in forms.items():
        name = "pocketcoder" if form[0] == "shell" else "bash"
        code, _, err = engine.run(*form, name=name, input=b"exit 0", stderr=subprocess.STDOUT)
        assert code == 0, shown
        assert not err

    starts = [line for line in noted(log) if line["event"] == "start"]
    assert [line["cmd"] for line in starts] == [*forms]
    assert starts[0]["argv"] == ["-lc", "echo login"]
    assert starts[5]["argv"] == ["-s", "one"]

    screen = engine.proxy.screen("engine")
    lines_seen = [line.rstrip() for line in screen.split("\n")]
    for shown in forms:
        assert f"$ {shown.strip()}" in lines_seen
    assert "exec" not in screen
    assert "2>&1" not in screen


def test_a_directory_outside_the_workspace_is_an_error_with_both_names(
    engine: Caller, tmp_path: pathlib.Path
) -> None:
    code, out, err = engine.run("-c", "echo no", cwd=tmp_path)
    assert code == 125
    assert out == b""
    assert str(tmp_path).encode() in err
    assert engine.cwd.encode() in err
    assert err.count(b"\n") == 1


def test_stdin_is_forwarded_as_it_arrives_without_delaying_the_command(engine: Caller) -> None:
    data = os.urandom(3_000_000)
    assert engine.run("-c", "cat", input=data) == (0, data, b"")
    process = engine.start(
        "-c", "read -r a; echo got $a; read -r b; echo got $b; exit 2", stdin=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout

    for word in (b"one", b"two"):
        process.stdin.write(word + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got " + word + b"\n"

    # It exits although stdin is open.
    assert process.wait(15) == 2
    process.communicate()
    endless = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    process = engine.start("-c", "head -1; exit 3", stdin=endless.stdout)
    assert process.communicate(timeout=15)[0] == b"y\n"
    assert process.returncode == 3

    endless.kill()
    endless.communicate()
    closed = subprocess.run(
        ["bash", "-c", 'exec "$@" <&-', "x", *engine.words("-c", "cat; echo $?")],
        env=engine.env,
        cwd=engine.cwd,
        capture_output=True,
    )
    assert closed.returncode == 0
    assert closed.stdout == b"0\n"


@pytest.mark.slow
def test_a_slow_command_slows_stdin_and_memory_stays_flat(engine: Caller) -> None:
    flood = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    process = engine.start("-c", "sleep 1; echo done; sleep 30", stdin=flood.stdout)
    assert process.stdout
    assert process.stdout.readline() == b"done\n"
    assert engine.proxy.memory() < 80 * pp.MIB

    # Most of its memory is what Python needs to compile the file.
    idle = engine.start("-c", "echo done; sleep 30")
    assert idle.stdout
    assert idle.stdout.readline() == b"done\n"
    most = status_bytes(idle.pid, "VmRSS") + 8 * pp.MIB
    idle.terminate()
    idle.communicate()
    assert status_bytes(process.pid, "VmRSS") < most

    # Signals pass through even while stdin is stuck.
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143

    process.communicate()
    flood.kill()
    flood.communicate()
    wait_until_gone("sleep\x0030", 6)


def test_a_reader_that_leaves_ends_the_command_with_141(engine: Caller) -> None:
    process = engine.start("-c", "echo first; exec yes marker141")
    assert process.stdout
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    assert process.wait(15) == 141
    assert process.stderr
    assert process.stderr.read() == b""
    process.stderr.close()
    wait_until_gone("marker141", 6)


@pytest.mark.slow
def test_a_slow_reader_slows_the_command(engine: Caller) -> None:
    process = engine.start("-c", "head -c 100000000 /dev/zero; touch finished")
    time.sleep(1)
    assert engine.proxy.memory() < 80 * pp.MIB
    assert not os.path.exists(f"{engine.cwd}/finished")
    assert len(process.communicate(timeout=20)[0]) == 100_000_000
    assert os.path.exists(f"{engine.cwd}/finished")


@pytest.mark.slow
def test_a_signal_reaches_the_command_and_ends_the_shell_at_once(engine: Caller) -> None:
    def deliver(number: int) -> None:
        name = signal.Signals(number).name.removeprefix("SIG")
        process = engine.start(
            "-c",
            f"trap 'echo heard {name}' {name}; trap '' TERM; (setsid sleep 63.{number} &) ; echo ready; "
            f"sleep 64.{number}; sleep 65.{number}",
        )
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"

        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(15) == 128 + number
        # It takes 0.15 s; a busy machine is given more.
        assert time.monotonic() - started < 3

        out, err = process.communicate()
        assert out in (b"", f"heard {name}\n".encode())
        assert b"pocketcoder" not in err
        eventually(
            lambda: (
                not [digit for digit in (3, 4, 5) if processes_with(f"sleep\x006{digit}.{number}")]
            ),
            6,
        )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(deliver, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)))


def test_a_signalled_shell_leaves_nothing_behind_even_if_its_command_ends_at_once(
    engine: Caller,
) -> None:
    process = engine.start("-c", "setsid sleep 66.5 & echo ready; sleep 66.6")
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    process.communicate()
    wait_until_gone("sleep\x0066.", 6)


def test_other_signals_end_the_shell_with_their_number(engine: Caller) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        process = engine.start("-c", "echo ready; sleep 66.7")
        assert process.stdout
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert process.communicate()[1] == b""
    wait_until_gone("sleep\x0066.", 6)


@pytest.mark.slow
def test_killing_the_shell_ends_its_command(engine: Caller) -> None:
    process = engine.start(
        "-c", "trap '' TERM; (setsid sleep 66.1 &); echo ready; sleep 66.2; sleep 66.3"
    )
    assert process.stdout
    process.stdout.readline()
    process.kill()
    process.communicate()
    wait_until_gone("sleep\x0066.", 6)


@pytest.mark.slow
def test_a_signal_ends_a_shell_whose_output_is_stuck(engine: Caller) -> None:
    process = engine.start("-c", "exec yes stuck67")
    wait_until_running("yes\x00stuck67", 20)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    process.communicate()
    wait_until_gone("stuck67", 6)


def test_the_exit_status_shows_a_lost_terminal_and_a_stopped_server(
    own: StartServer, names: str
) -> None:
    engine = Caller(own(), names)
    process = engine.start("-c", "echo ready; sleep 30")
    assert process.stdout

    process.stdout.readline()
    engine.proxy.tmux("kill-server")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert err[:18] == b"pocketcoder: lost:"

    process = engine.start("-c", "echo ready; sleep 30")
    assert process.stdout
    process.stdout.readline()
    engine.proxy.stop(signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 125
    assert err.startswith(b"pocketcoder: http://127.0.0.1:")
    assert err.count(b"\n") == 1

    code, out, err = engine.run("-c", "touch run-here")
    assert code == 125
    assert out == b""
    assert err.count(b"\n") == 1
    assert b"is it running?" in err
    # A command never falls back to this side.
    assert not os.path.exists(f"{engine.cwd}/run-here")


# What a server sends that accepts the handshake of a WebSocket.
ACCEPTED = b"HTTP/1.1 101 x\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
GARBAGE_SERVERS = [
    pytest.param(b"", "refused", id="nothing"),
    pytest.param(b"SSH-2.0-OpenSSH\r\n", "refused", id="ssh"),
    pytest.param(b"HTTP/1.1 200 OK\r\n\r\nhi", "200 OK", id="status-200"),
    pytest.param(b"HTTP/1.1 101 x\r\n\r\n", "refused", id="no-accept"),
    pytest.param(ACCEPTED + b"\x82\x05\x07garb", "does not speak", id="broken-frame"),
    pytest.param(ACCEPTED + b"\x82\x05\x03garb", "ended with", id="unknown-tag"),
    pytest.param(ACCEPTED + b"\x88\x02\x03\xe8", "closed", id="closed"),
]


@pytest.mark.parametrize(("said", "told"), with_slow(GARBAGE_SERVERS, "ssh", "broken-frame"))
def test_a_server_that_answers_garbage_is_reported_in_one_line(
    names: str, tmp_path: pathlib.Path, said: bytes, told: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        env = {**os.environ, "PROXY_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        words = [*program(f"{names}/sh"), "-c", "echo no"]
        process = subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        connection = listener.accept()[0]
        connection.recv(1000)
        connection.sendall(said)
        # The shell may have exited already.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        out, err = process.communicate(timeout=20)
        connection.close()

    assert process.returncode == 125
    assert out == b""
    assert err.count(b"\n") == 1
    assert told.encode() in err


@pytest.mark.slow
def test_the_shell_gives_up_after_ten_seconds_without_an_answer(
    wedged: tuple[subprocess.Popen[bytes], dict[str, str], float], names: str
) -> None:
    process, env, started = wedged
    other = subprocess.Popen(
        [*program(f"{names}/sh"), "-c", "echo no"], env=env, stdin=subprocess.DEVNULL
    )
    eventually(lambda: "socket:" in "".join(descriptors_of(other.pid)), 20)
    other.send_signal(signal.SIGTERM)
    assert other.wait(10) == 143
    assert process.poll() is None or time.monotonic() - started > 9
    assert b"10 s" in process.communicate(timeout=15)[1]
    assert process.returncode == 125


@pytest.mark.parametrize(
    ("url", "said"),
    [
        pytest.param("https://x", "http://HOST:PORT", id="https"),
        pytest.param("nonsense", "http://HOST:PORT", id="no-address"),
        pytest.param("http://127.0.0.1:x", "http://HOST:PORT", id="no-number"),
        pytest.param("http://127.0.0.1:1/", "refused", id="nobody-listens"),
        pytest.param("http://[::1]", "refused", id="address-of-ip6-without-a-port"),
        pytest.param("http://no-such-host.invalid:1", "cannot reach", id="no-such-host"),
        # getaddrinfo(3) would take it for 34463.
        pytest.param("http://127.0.0.1:99999", "http://HOST:PORT", id="too-large"),
        pytest.param("http://h:1/prefix", 'a path behind "h:1", expected http://HOST', id="path"),
        pytest.param("http://h?a=b", 'a path behind "h", expected http://HOST', id="query"),
    ],
)
@pytest.mark.slow
def test_a_wrong_address_is_reported_in_one_line(names: str, url: str, said: str) -> None:
    words = [*program(f"{names}/sh"), "-c", "echo no"]
    done = subprocess.run(
        words, env={**os.environ, "PROXY_URL": url}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 125
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize(
    "url",
    with_slow(
        [
            pytest.param("http://me:s3cret@127.0.0.1:1", id="user-and-password"),
            pytest.param("http://s3cret@127.0.0.1", id="user"),
            pytest.param("http://me:s3cret/x@127.0.0.1:1", id="password-with-a-slash"),
            pytest.param("https://me:s3cret@127.0.0.1:1/path", id="https"),
            pytest.param("me:s3cret@127.0.0.1", id="no-scheme"),
            pytest.param("http://127.0.0.1:1/?token=s3cret", id="query"),
            pytest.param("http://127.0.0.1:1/#s3cret", id="fragment"),
        ],
        "user-and-password",
        "fragment",
    ),
)
def test_a_password_in_the_address_is_never_shown(names: str, url: str) -> None:
    words = [*program(f"{names}/sh"), "-c", "echo no"]
    done = subprocess.run(
        words, env={**os.environ, "PROXY_URL": url}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1
    assert "s3cret" not in done.stderr
    assert "expected http://HOST:PORT" in done.stderr


def test_the_shell_sends_the_token_and_reports_a_refusal(own: StartServer, names: str) -> None:
    engine = Caller(own(POCKETCODER_TOKEN="t0k"), names)
    assert engine.run("-c", "echo in")[:2] == (0, b"in\n")
    code, out, err = engine.run("-c", "echo in", env={"POCKETCODER_TOKEN": "wrong"})
    assert code == 125
    assert out == b""
    assert b"401" in err
    assert b"POCKETCODER_TOKEN" in err


@pytest.mark.slow
def test_programs_use_it_as_their_shell(engine: Caller) -> None:
    path = {"PATH": f"{engine.names}:{engine.env['PATH']}"}
    here = f"{engine.cwd}/programs"
    os.makedirs(here, exist_ok=True)
    pathlib.Path(here, "Makefile").write_text("all:\n\t@echo made in $$POCKETCODER_AGENT; false\n")
    shell = f"{engine.names}/pocketcoder-shell"
    code = (
        "import subprocess; print(subprocess.run('echo $POCKETCODER_AGENT; exit 3', shell=True, "
        f"executable={shell!r}).returncode)"
    )
    programs: dict[str, tuple[list[str], str]] = {
        "python": ([sys.executable, "-u", "-c", code], "engine\n3\n"),
        "make": (["make", f"SHELL={shell}"], "made in engine\n"),
        "node": (
            [
                "node",
                "-e",
                "require('child_process').exec('echo n $POCKETCODER_AGENT', "
                f"{{shell: {shell!r}}}, (e, o) => console.log(e, o))",
            ],
            "null n engine\n\n",
        ),
    }
    git = (
        f"rm -rf repo; git init -q repo; cd repo; printf '#!{engine.names}/sh\\necho hook $POCKETCODER_AGENT\\n' "
        "> .git/hooks/pre-commit; chmod +x .git/hooks/pre-commit; "
        "git -c user.name=a -c user.email=b commit -q --allow-empty -m x 2>&1; "
        "git -c alias.x='!sh -c '\\''echo alias $POCKETCODER_AGENT \"$@\"'\\'' --' x argument"
    )
    programs["git"] = (["/bin/bash", "-c", git], "hook engine\nalias engine argument\n")

    for program, (words, said) in programs.items():
        if program == "python" or shutil.which(program):
            done = subprocess.run(
                words, cwd=here, env=engine.env | path, capture_output=True, text=True, timeout=30
            )
            assert done.stdout == said, (program, done.stderr)

    pipe = subprocess.run(
        ["/bin/bash", "-c", f"{shell} -c yes | head -1; echo ${{PIPESTATUS[0]}}"],
        env=engine.env | path,
        cwd=here,
        capture_output=True,
    )
    assert pipe.stdout == b"y\n141\n"


@pytest.mark.slow
def test_many_shells_at_once_do_not_mix(engine: Caller) -> None:
    def one(number: int) -> bool:
        agent = {"OPENCODE_AGENT": f"crowd{number % 10}"}
        return engine.run(
            "-c", f"cat; echo {number} >&2; exit {number}", input=b"%d" % number, env=agent
        ) == (
            number,
            b"%d" % number,
            b"%d\n" % number,
        )

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(one, range(50)))


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_quoted_word_comes_back_from_bash(locale: str) -> None:
    dice = random.Random(1)
    for _ in range(2 * FUZZ):
        given = [dice.randbytes(dice.randrange(9)).replace(b"\0", b"") for _ in range(300)]
        given += [os.fsencode(words(dice)) for _ in range(300)]
        script = "printf '%s\\0' " + " ".join(pp.quote(os.fsdecode(word)) for word in given)
        done = subprocess.run(
            ["bash"], input=os.fsencode(script), capture_output=True, env={"LC_ALL": locale}
        )
        assert done.stdout.split(b"\0")[:-1] == given


def test_any_table_of_texts_becomes_json() -> None:
    dice = random.Random(2)
    for _ in range(1000 * FUZZ):
        table = {
            words(dice): words(dice) + chr(dice.randrange(0xD800)) for _ in range(dice.randrange(4))
        }
        assert json.loads(pp.json_text(table)) == table


IN_THE_SHELL = """
import json, os, sys
__name__ = "shell"  # which is not called
exec(open(sys.argv[1]).read().partition("# ------------------------------- the line")[0])
said = os.fdopen(os.dup(1), "w")
for case in json.load(open("cases")):
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDWR | os.O_TRUNC), (2, os.O_RDWR | os.O_TRUNC)):
        opened = os.open("std%d" % fd, flags)
        os.dup2(opened, fd)
        os.close(opened)
    try:
        got = eval(sys.argv[2])
    except Failed as failure:
        got = failure.args
    except BaseException as wrong:
        got = repr(wrong)
    streams = [open("std%d" % fd, "rb").read().decode("latin-1") for fd in (1, 2)]
    print(json.dumps([got, *streams]), file=said, flush=True)
"""


def in_the_shell(work: str, cases: list[Any], folder: pathlib.Path, **env: str) -> list[Any]:
    """What `work` gives or raises in each case, and what it writes to stdout and stderr."""
    (folder / "cases").write_text(json.dumps(cases))
    for name in ("std1", "std2"):
        (folder / name).touch()
    command = [sys.executable, "-S", "-c", IN_THE_SHELL, str(MODULE), work]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, stdout=subprocess.PIPE, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


OPTION_WORDS = [
    "-c",
    "-c",
    "-c",
    "-ec",
    "-lc",
    "-l",
    "-e",
    "+e",
    "-u",
    "-x",
    "-o",
    "pipefail",
    "-euo",
    "-O",
    "extglob",
]
OPTION_WORDS += ["+O", "-s", "-n", "-v", "-p", "-r", "-B", "+B", "-h", "-C", "-P", "-E"]
OPTION_WORDS += [
    "-",
    "--",
    "--norc",
    "--noprofile",
    "--posix",
    "--login",
    "--verbose",
    "--rcfile",
    "-cs",
    "-oc",
    "-Z",
]
COMMANDS = [
    'echo "$0|$#|$*|${-//c}"; exit 3',
    'false; printf "[%s]" "$@"',
    "exit 4",
    "cat",
    "read x; echo $x",
    "nosuch; $y",
]
COMMANDS += [
    "script.sh",
    ".",
    "nosuchscript",
    "-n",
    "+x",
    "if",
    "shopt login_shell posix; set -o | grep on",
]


def test_any_list_of_arguments_means_the_same_to_bash(tmp_path: pathlib.Path) -> None:
    dice = random.Random(3)
    (tmp_path / "std0").write_text(f"{COMMANDS[0]}\nread y; echo $y\nnext\n")
    (tmp_path / "script.sh").write_text(f"{COMMANDS[1]}\nread y; echo $y; {COMMANDS[0]}")
    cases = []

    for _ in range(60 * FUZZ):
        cases.append(dice.choices(OPTION_WORDS, k=dice.randrange(4)))
        cases[-1] += [
            dice.choice([dice.choice(COMMANDS), words(dice)]) for _ in range(dice.randrange(4))
        ]

    sent = [argv for argv, _, _ in in_the_shell("[arguments_of(case)]", cases, tmp_path)]
    script = f"cd {tmp_path}\n"
    for number, (case, argv) in enumerate(zip(cases, sent, strict=True)):
        # Our side refuses these words.
        if len(argv) == 2:
            continue
        request = pp.ExecRequest(cmd=pp.command_text(argv[0]), argv=tuple(argv[0]))
        there, _ = pp.bash_command(request, "/bin/bash")

        for name, called in (
            (f"here.{number}", ["-a", "bash", "/bin/bash", *case]),
            (f"there.{number}", there),
        ):
            script += f"(exec {' '.join(map(pp.quote, called))}) <std0 >{name} 2>{name}.err\n"
            script += f"echo $? >>{name}\n"

    subprocess.run(
        ["bash"], input=os.fsencode(script), env={**os.environ, "HOME": str(tmp_path)}, check=True
    )

    for number, (case, argv) in enumerate(zip(cases, sent, strict=True)):
        if len(argv) == 2:
            assert argv[1] in (1, 126, 127), (case, argv)
            continue
        for end in ("", ".err"):
            here = (tmp_path / f"here.{number}{end}").read_bytes()
            there_said = (tmp_path / f"there.{number}{end}").read_bytes()
            assert there_said == here, (case, argv)


def server_frame(data: bytes, opcode: int = 0x82, width: int = 0) -> bytes:
    """A WebSocket frame of a server; `width`: bytes of its length, if it is long."""
    width = max(width, 0 if len(data) < 126 else 2)
    size = {
        0: bytes([len(data) & 127]),
        2: b"\x7e",
        8: b"\x7f",
    }[width]
    return bytes([opcode]) + size + (len(data).to_bytes(width, "big") if width else b"") + data


def test_any_address_is_parsed_or_refused_in_one_line(tmp_path: pathlib.Path) -> None:
    dice = random.Random(5)
    parts = ["http://", "https://", "unix:", "/", ":", "@", "[::1]", "localhost", "3001", "99999"]
    parts += [
        "?",
        "#",
        "..",
        "\n",
        "\r",
        "\x1b",
        "\x9b",
        "\u2028",
        "\udcff",
        " ",
        "é",
        "x" * 120,
        chr(0xFF10),
    ]
    cases = ["".join(dice.choices(parts, k=dice.randrange(7))) for _ in range(1000 * FUZZ)]
    (tmp_path / "std0").touch()
    work = "[parse_path(case) if case[:5] == 'unix:' else parse_url(case)]"
    for case, (got, _, _) in zip(cases, in_the_shell(work, cases, tmp_path), strict=True):
        assert isinstance(got, list), (case, got)
        if len(got) == 2:
            assert got[1] == 125, case
            assert got[0].isprintable(), case
            assert got[0].startswith("PROXY_URL: got "), case


FINALS: list[tuple[str, Any]] = [
    ("[" * 100_000, ["u ended with", 125]),
    ('{"exit_code":' + "9" * 5000 + ",", ["u ended with", 125]),
    ('{"exit_code":999,"ended":"exit"}', 231),
    ('{"exit_code":1e999,"error":"x","ended":"lost"}', ["u ended with", 125]),
    ('{"exit_code":1,"error":3}', ["u ended with", 125]),
    ('{"exit_code":7,"error":"two\\nlines","ended":"lost"}', ["two lines", 7]),
]


def test_a_final_message_that_makes_no_sense_is_a_status_and_one_line(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "std0").touch()
    got = in_the_shell("Bridge('u').end(case.encode())", [final for final, _ in FINALS], tmp_path)
    short = [[each[0][:12], each[1]] if isinstance(each, list) else each for each, _, _ in got]
    assert short == [told for _, told in FINALS]


def test_whatever_a_server_sends_the_shell_exits_with_a_status_and_one_line(
    tmp_path: pathlib.Path,
) -> None:
    dice = random.Random(4)
    (tmp_path / "std0").touch()
    finals = [
        '{"exit_code":%s}',
        '{"exit_code":%s,"ended":"exit"}',
        '{"error":%s,"exit_code":1}',
        "%s",
    ]
    finals += [
        '{"error":"x","exit_code":%s,"ended":"lost"}',
        '{"error":%s,"exit_code":7,"ended":"lost"}',
    ]
    hello = f"HTTP/1.1 101 x\r\nSec-WebSocket-Accept: {pp.WS_ACCEPT.decode()}\r\n\r\n".encode()
    said = []

    for _ in range(100 * FUZZ):
        frames = hello
        for _ in range(dice.randrange(4)):
            value = dice.choice(
                [json.dumps(junk(dice, 0, 255, 256, 3, -1, "two\nlines")), "9" * 5000, "[" * 5000]
            )
            final = b"\3" + (dice.choice(finals) % value).encode()
            data = bytes([dice.choice((1, 2, 2, dice.randrange(256)))]) + dice.randbytes(
                dice.randrange(300)
            )
            kind = dice.choice((0x82, 0x82, 0x82, dice.randrange(256)))
            width = dice.choice((0, 0, 2, 8))
            frames += server_frame(dice.choice((final, data)), kind, width)

        said.append(spoil(dice, frames) if dice.random() < 0.5 else frames)

    with socket.create_server(("127.0.0.1", 0), backlog=5) as listener:

        def serve() -> None:
            for each in said:
                with listener.accept()[0] as peer, contextlib.suppress(OSError):
                    peer.settimeout(1)
                    peer.recv(65536)
                    peer.sendall(each)
                    peer.shutdown(socket.SHUT_WR)
                    while peer.recv(65536):
                        pass

        serving = Background(serve)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        got = in_the_shell("run_shell(['-c', 'x'])", [None] * len(said), tmp_path, PROXY_URL=url)
        serving.result(60.0 * FUZZ)

    for each, (status, out, err) in zip(said, got, strict=True):
        assert type(status) is int, (status, each)
        assert 0 <= status <= 255, (status, each)
        # Without a failure, stderr holds at most one line, from the shell itself.
        if b"\x02" not in each and not out:
            assert err.count("\n") <= 1, (err, each)
            assert err or status != 125 or b'"error":"' in each, each


def check(url: str, *python: str) -> subprocess.CompletedProcess[str]:
    """`pocketcoder check` of this server."""
    words = [*python, str(MODULE), "check"] if python else [*program(str(MODULE)), "check"]
    return subprocess.run(
        words,
        env=outer_environment() | {"PROXY_URL": url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_check_says_whether_the_server_is_ready(warm: StartServer) -> None:
    server = warm(POCKETCODER_TOKEN="t0k")
    url = f"http://localhost:{server.port}"
    done = check(url)
    assert done.stdout == f"pocketcoder: {url} is ready\n"
    assert done.stderr == ""
    assert done.returncode == 0

    os.rename(server.workspace, f"{server.folder}/away")
    eventually(lambda: check(url).returncode == 1)
    done = check(url)
    assert done.stdout == ""
    assert done.stderr == (
        f"pocketcoder: {url} is not ready: the workspace: No such file or directory\n"
    )

    os.rename(f"{server.folder}/away", server.workspace)
    eventually(lambda: check(url).returncode == 0)
    server.stop()
    assert check(url).returncode == 1


ANSWERS_OF_OTHERS = [
    pytest.param(b"", "is that the proxy?", id="nothing"),
    pytest.param(b"SSH-2.0-x\x1b[2J\r\n", 'got "SSH-2.0-x?[2J"', id="ssh"),
    pytest.param(b"HTTP/1.1 200 OK\r\n\r\n<html>", 'got "HTTP/1.1 200 OK"', id="a-page"),
    pytest.param(
        b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"ready":"yes"}',
        "is that the proxy?",
        id="ready-without-truth",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n[",
        "is that the proxy?",
        id="half-a-body",
    ),
    pytest.param(
        b'HTTP/1.1 404 Not Found\r\nContent-Length: 24\r\n\r\n{"error":"no such\\npath"}',
        "refused: 404 Not Found: no such path",
        id="an-older-proxy",
    ),
    pytest.param(
        b'HTTP/1.1 503 x\r\nContent-Length: 39\r\n\r\n{"ready":false,"error":"two\\n\\u001bwords"',
        "is that the proxy?",
        id="cut-short",
    ),
    pytest.param(
        b'HTTP/1.1 503 x\r\nContent-Length: 42\r\n\r\n{"ready":false,"error":"two\\n\\u001bwords"}',
        "is not ready: two ?words",
        id="control-characters",
    ),
]


@pytest.mark.parametrize(
    ("said", "told"), with_slow(ANSWERS_OF_OTHERS, "a-page", "control-characters")
)
def test_check_reports_what_is_no_ready_proxy_in_one_line(said: bytes, told: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        checking = Background(lambda: check(url))
        with listener.accept()[0] as peer:
            peer.recv(1000)
            peer.sendall(said)
        done = checking.result()

    assert done.returncode == 1
    assert done.stdout == ""
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr


@pytest.mark.slow
def test_check_gives_up_before_the_health_check_of_a_container_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        done = check(url)
    assert time.monotonic() - started < 5 + 2
    assert done.returncode == 1
    assert done.stderr == f"pocketcoder: {url}: no answer within 4.5 s\n"


def test_check_loads_nothing_of_the_server(proxy: Proxy) -> None:
    done = check(f"http://127.0.0.1:{proxy.port}", sys.executable, "-S", "-X", "importtime")
    assert done.returncode == 0
    loaded = set(re.findall(r"\| +(\S+)\n", done.stderr))
    assert "json" in loaded
    assert loaded.isdisjoint(["tornado", "asyncio", "argparse", "http.client", "socket", "ssl"])


@pytest.mark.parametrize("version", ["3.8", "3.9"])
def test_check_runs_on_older_pythons(proxy: Proxy, version: str) -> None:
    done = check(f"http://127.0.0.1:{proxy.port}", old_python(version))
    assert done.stdout.endswith(" is ready\n")
    assert done.returncode == 0


def test_check_works_with_stdout_and_stderr_closed(proxy: Proxy) -> None:
    words = ["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "x", sys.executable, str(MODULE), "check"]
    for port, status in ((proxy.port, 0), (1, 1)):
        env = outer_environment() | {"PROXY_URL": f"http://127.0.0.1:{port}"}
        assert subprocess.run(words, env=env).returncode == status


def test_a_file_called_check_is_no_script_of_the_subcommand(
    proxy: Proxy, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "check").write_text("exit 7\n")
    env = outer_environment() | {"PROXY_URL": f"http://127.0.0.1:{proxy.port}"}
    words = [sys.executable, str(MODULE), "check"]
    assert subprocess.run(words, env=env, cwd=tmp_path, capture_output=True).returncode == 0


# ==========================================================================
# Log
# ==========================================================================
LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) \S.*|pocketcoder: .+"
)


def refused_lines(server: Proxy) -> list[str]:
    """The lines that name a refused request."""
    return [line for line in server.logged().splitlines() if " refused status=" in line]


def test_the_log_has_a_line_for_the_start_and_one_for_the_stop(own: StartServer) -> None:
    server = own()
    assert server.stop() == 0
    address = f"http://127.0.0.1:{server.port}"
    start = f"INFO start version={pp.VERSION} address={address} workspace={server.workspace}"
    assert f"{start} socket={server.socket}\n" in server.logged()
    assert "INFO stopping signal=SIGTERM\n" in server.logged()
    assert server.logged().endswith("INFO stopped\n")


def test_each_line_of_the_log_has_its_time_with_a_zone(own: StartServer) -> None:
    server = own("--log-level", "debug")
    server.exec("echo seen")
    server.request("GET", "/nowhere")
    server.stop()
    lines = server.logged().splitlines()
    assert len(lines) > 5
    assert [line for line in lines if not LOG_LINE.fullmatch(line)] == []


REFUSED_REASONS = [
    pytest.param(
        "GET", "/nowhere?token=s3cret", {}, b"", "status=404 method=GET path=/nowhere", id="path"
    ),
    pytest.param(
        "GET",
        "/exec",
        {},
        b"",
        'status=405 .* reason="method: got GET, expected POST"',
        id="method",
    ),
    pytest.param("POST", "/exec", {}, b"{}", "status=415 .* reason=.*Content-Type", id="type"),
    pytest.param(
        "POST",
        "/exec",
        {"Content-Type": "application/json"},
        b"{}",
        'status=400 .* reason="`cmd`: expected a bash command, or `argv`"',
        id="field-missing",
    ),
    pytest.param(
        "POST",
        "/exec",
        {"Content-Type": "application/json"},
        b'{"cmd": "true", "env": {"KEY": ["s3cret, expected x"]}}',
        'status=400 .* reason="`env.KEY`: expected a string"',
        id="field-wrong",
    ),
    pytest.param(
        "POST", "/exec", {"Origin": "http://evil"}, b"{}", "status=403 .*Origin.*evil", id="origin"
    ),
    pytest.param(
        "POST",
        "/mcp",
        {"Content-Type": "application/json", "Mcp-Session-Id": "s3cret"},
        b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}',
        'status=404 .*path=/mcp .*reason="no such session"',
        id="session",
    ),
    pytest.param(
        "POST",
        "/mcp",
        {"Content-Type": "application/json"},
        b"s3cret",
        "status=400 .*path=/mcp .*expected JSON",
        id="mcp-message",
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "line"),
    with_slow(REFUSED_REASONS, "path", "field-wrong", "session"),
)
def test_a_refused_request_has_a_line_with_the_reason(
    own: StartServer, method: str, path: str, headers: dict[str, str], body: bytes, line: str
) -> None:
    server = own()
    assert server.status(method, path, body, headers) >= 400
    told = eventually(lambda: refused_lines(server))
    assert len(told) == 1
    assert re.search(line, told[0])
    assert "address=127.0.0.1" in told[0]
    assert "s3cret" not in told[0]


def test_a_command_that_a_channel_refuses_has_a_line_too(own: StartServer) -> None:
    server = own()

    async def talk() -> dict[str, Any]:
        async with Channel(server) as channel:
            await channel.send({"cmd": "true", "timeout": -1})
            return await channel.end()

    assert "timeout" in asyncio.run(talk())["error"]
    told = eventually(lambda: refused_lines(server))
    assert "path=/exec/ws" in told[0]
    assert "`timeout`: expected seconds" in told[0]


@pytest.mark.slow
def test_of_many_refusals_ten_a_second_are_named_and_the_others_counted(own: StartServer) -> None:
    server = own()
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: server.status("GET", "/nowhere"), range(120)))
    seconds = time.monotonic() - started

    def counted() -> int:
        return sum(map(int, re.findall(r"refused more=(\d+)\n", server.logged())))

    eventually(lambda: len(refused_lines(server)) + counted() == 120)
    assert counted() > 0
    assert len(refused_lines(server)) <= 10 * (seconds + 1)

    # After a quiet second each has a line again.
    named = len(refused_lines(server))
    server.status("GET", "/nowhere")
    eventually(lambda: len(refused_lines(server)) == named + 1)


def test_refusals_without_a_line_are_counted_when_the_server_stops(own: StartServer) -> None:
    server = own()
    for _ in range(25):
        server.status("GET", "/nowhere")
    server.stop()
    more = sum(map(int, re.findall(r"refused more=(\d+)\n", server.logged())))
    assert len(refused_lines(server)) + more == 25


@pytest.mark.parametrize(
    ("level", "levels"),
    with_slow(
        [
            pytest.param("debug", {"DEBUG", "INFO", "WARNING"}, id="debug"),
            pytest.param("info", {"INFO", "WARNING"}, id="info"),
            pytest.param("warning", {"WARNING"}, id="warning"),
            pytest.param("error", set(), id="error"),
        ],
        "warning",
    ),
)
def test_the_log_has_its_level_and_what_is_above_it(
    own: StartServer, level: str, levels: set[str]
) -> None:
    server = own("--log-level", level)
    server.exec("true")
    server.status("GET", "/nowhere")
    server.stop()
    assert set(re.findall(r"^\S+Z ([A-Z]+) ", server.logged(), re.MULTILINE)) == levels


FIELDS_SHOWN = [
    pytest.param({"a": "x/y:1", "b": 2}, "a=x/y:1 b=2", id="plain"),
    pytest.param({"a": None, "b": ""}, 'b=""', id="none-and-empty"),
    pytest.param({"a": "x y"}, 'a="x y"', id="blank"),
    pytest.param({"a": "x=y"}, 'a="x=y"', id="equals-sign"),
    pytest.param({"a": 'x"y'}, 'a="x\\"y"', id="quote"),
    pytest.param({"a": "x\nstart version=9"}, 'a="x\\nstart version=9"', id="newline"),
    pytest.param({"a": "x\u2028y"}, 'a="x\u2028y"', id="line-separator"),
    pytest.param({"a": "x" * 400}, f"a={'x' * 300}…", id="long"),
]


@pytest.mark.parametrize(("fields", "text"), FIELDS_SHOWN)
def test_fields_of_a_line_can_be_told_apart(fields: dict[str, Any], text: str) -> None:
    assert pp.key_values(**fields) == text


def test_nothing_that_is_logged_can_start_a_line_of_its_own(own: StartServer) -> None:
    folder = tempfile.mkdtemp(prefix="pc")
    forged = f"{folder}/x\n2026-01-01T00:00:00.000Z INFO forged\u2028\x1b[2J"
    os.mkdir(forged)
    server = own("--workspace", forged)
    with server.raw_connection() as peer:
        peer.sendall(b"GET /%0aforged%1b\xc2\x85\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert peer.recv(100).startswith(b"HTTP/1.1 40")
    server.stop()
    shutil.rmtree(folder)
    assert [line for line in server.logged().splitlines() if not LOG_LINE.fullmatch(line)] == []
    assert [line for line in server.logged().splitlines() if "INFO forged" in line[:45]] == []
    assert "\x1b" not in server.logged()


def test_a_traceback_is_indented_below_its_line() -> None:
    formatter = pp.LineFormatter("%(levelname)s %(message)s")
    try:
        raise ValueError("two\nlines\x1b")
    except ValueError:
        wrong = sys.exc_info()
    record = logging.LogRecord("x", 40, "", 0, "failed path=%s", ("/a\nb",), wrong)
    first, *rest = formatter.format(record).split("\n")
    assert first == r"ERROR failed path=/a\nb"
    assert [line for line in rest if line[:2] != "  "] == []
    assert rest[-1] == r"  lines\x1b"


# ==========================================================================
# Wire types
# ==========================================================================
SURROGATE = b'"\\ud800"'


def wrong_values(field: str, values: dict[str, bytes]) -> list[Any]:
    """A case for each value of a field; its key stands in the id."""
    return [
        pytest.param(
            b'{"cmd": "true", "%s": %s}' % (field.encode(), value), field, id=f"{field}-{name}"
        )
        for name, value in values.items()
    ]


BAD_BODIES = [
    pytest.param(b"", "body", id="body-empty"),
    pytest.param(b"{", "body", id="body-half-an-object"),
    pytest.param(b"\xff\xfe{}", "body", id="body-no-utf-8"),
    pytest.param(b"[" * 100_000, "body", id="body-deep"),
    pytest.param(b"[]", "body", id="body-list"),
    pytest.param(b'"ls"', "body", id="body-text"),
    pytest.param(b"9" * 5000, "body", id="body-long-number"),
    pytest.param(b"{}", "cmd", id="cmd-missing"),
    pytest.param(b'{"cmd": null}', "cmd", id="cmd-null"),
    pytest.param(b'{"cmd": ""}', "cmd", id="cmd-empty"),
    pytest.param(b'{"cmd": 7}', "cmd", id="cmd-number"),
    pytest.param(b'{"cmd": ["ls"]}', "cmd", id="cmd-list"),
    pytest.param(b'{"cmd": "a\\u0000b"}', "cmd", id="cmd-nul"),
    pytest.param(b'{"cmd": %s}' % SURROGATE, "cmd", id="cmd-half-a-character"),
    pytest.param(b'{"cmd": "%s"}' % (b"x" * (8 * 1024 * 1024 + 1)), "cmd", id="cmd-too-long"),
    *wrong_values(
        "cwd",
        {
            "number": b"3",
            "nul": b'"a\\u0000"',
            "no-such-directory": b'"nowhere"',
            "above": b'".."',
            "root": b'"/"',
        },
    ),
    *wrong_values(
        "agent_name",
        {
            "empty": b'""',
            "blank": b'"a b"',
            "option": b'"-a"',
            "colon": b'"a:b"',
            "null": b"null",
            "too-long": b'"%s"' % (b"a" * 65),
            "newline": b'"a\\n"',
        },
    ),
    *wrong_values(
        "usage_id",
        {
            "number": b"1",
            "nul": b'"\\u0000"',
            "half-a-character": SURROGATE,
        },
    ),
    *wrong_values("session_id", {"object": b"{}", "nul": b'"\\u0000"'}),
    *wrong_values(
        "timeout",
        {
            "zero": b"0",
            "negative": b"-1",
            "too-long": b"86401",
            "true": b"true",
            "null": b"null",
            "text": b'"5"',
            "nan": b"NaN",
            "infinity": b"Infinity",
            "out-of-range": b"1e999",
            "long-number": b"9" * 400,
        },
    ),
    *wrong_values(
        "stdin",
        {
            "number": b"1",
            "list": b"[]",
            "half-a-character": SURROGATE,
        },
    ),
    *wrong_values(
        "env",
        {
            "list": b"[]",
            "null": b"null",
            "value-number": b'{"A": 1}',
            "name-empty": b'{"": "x"}',
            "name-with-an-equals-sign": b'{"A=B": "x"}',
            "value-nul": b'{"A": "\\u0000"}',
            "value-too-long": b'{"A": "%s"}' % (b"x" * 200_000),
            "too-long": b"{%s}" % b",".join(b'"A%d": "%s"' % (i, b"x" * 60_000) for i in range(12)),
        },
    ),
    *wrong_values(
        "max_output",
        {
            "zero": b"0",
            "negative": b"-5",
            "true": b"true",
            "fraction": b"1.5",
            "null": b"null",
            "too-large": b"67108865",
            "text": b'"9"',
        },
    ),
]


@pytest.mark.parametrize(("body", "field"), BAD_BODIES)
def test_bad_input_is_a_400_that_names_the_field(proxy: Proxy, body: bytes, field: str) -> None:
    status, answer = proxy.post(body)
    assert status == 400
    assert answer["exit_code"] == 2
    assert field in answer["error"]
    assert "expected" in answer["error"]
    assert len(answer["error"]) < 500


def test_unknown_fields_are_ignored(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec("echo ok", agent_name=agent, unknown={"x": [1]}, nan=float("nan"))
    assert answer["stdout"] == "ok\n"


ARGV = [
    pytest.param(["-c", "echo $0 $1", "zero", "one"], "zero one\n", id="arguments"),
    pytest.param(["-lc", "shopt -q login_shell && echo $0"], "bash\n", id="login"),
    pytest.param(["-euo", "pipefail", "-c", "echo ${-//[^eu]}"], "eu\n", id="options"),
    pytest.param(["-s", "a"], "from stdin a\n", id="script-on-stdin"),
    pytest.param([], "from stdin\n", id="none"),
    pytest.param(["-c", ""], "", id="empty-text"),
    pytest.param(["-c", "echo ${#0}", "x" * 100_000], "100000\n", id="long-argument"),
    pytest.param(["-ec", f": {'x' * 200_000}; echo $0 $1", "z", "1"], "z 1\n", id="long-text"),
    pytest.param(["-c", "printf \udcff\udcc3 | od -An -tx1"], " ff c3\n", id="bytes"),
]


@pytest.mark.parametrize(("argv", "said"), ARGV)
@pytest.mark.slow
def test_arguments_of_bash_run_in_place_of_a_command(
    proxy: Proxy, agent: str, argv: list[str], said: str
) -> None:
    script = "echo from stdin $1" if argv[:1] in ([], ["-s"]) else None
    status, answer = proxy.post(
        {
            "argv": argv,
            "stdin": script,
            "agent_name": agent,
        }
    )
    assert status == 200
    assert answer["stdout"] == said
    assert answer["exit_code"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"argv": "true"}, id="text"),
        pytest.param({"argv": None}, id="null"),
        pytest.param({"argv": ["-c", 1]}, id="number"),
        pytest.param({"argv": ["-c", "a\0b"]}, id="nul"),
        pytest.param({"argv": ["-c", "\ud800"]}, id="half-a-character"),
        pytest.param({"argv": ["-c", "x" * (8 * 2**20 + 1)]}, id="too-long"),
        pytest.param({"argv": ["-c", "true"], "cmd": "true"}, id="beside-cmd"),
        pytest.param({"cmd": "true", "combined": 1}, id="combined"),
    ],
)
def test_wrong_arguments_of_bash_are_refused(proxy: Proxy, fields: dict[str, Any]) -> None:
    status, answer = proxy.post(json.dumps(fields).encode())
    assert status == 400
    assert answer["exit_code"] == 2
    assert "expected" in answer["error"]
    assert len(answer["error"]) < 500


@pytest.mark.parametrize("stdin", [None, ""], ids=["null", "empty"])
def test_an_empty_stdin_is_dev_null(proxy: Proxy, agent: str, stdin: str | None) -> None:
    answer = proxy.exec("readlink /proc/self/fd/0", stdin=stdin, agent_name=agent)
    assert answer["stdout"] == "/dev/null\n"


@pytest.mark.parametrize("cwd", ["turn", "./turn/", "turn/../turn", "{workspace}/turn"])
def test_a_directory_is_entered_under_the_name_given(proxy: Proxy, agent: str, cwd: str) -> None:
    os.makedirs(f"{proxy.workspace}/far/away", exist_ok=True)
    if not os.path.islink(f"{proxy.workspace}/turn"):
        os.symlink("far/away", f"{proxy.workspace}/turn")
    answer = proxy.exec(
        "pwd; cd ..; pwd", cwd=cwd.format(workspace=proxy.workspace), agent_name=agent
    )
    assert answer["stdout"] == f"{proxy.workspace}/turn\n{proxy.workspace}\n"


def test_going_up_by_name_cannot_leave_the_workspace(proxy: Proxy) -> None:
    os.makedirs(f"{proxy.workspace}/far/away/deep", exist_ok=True)
    if not os.path.islink(f"{proxy.workspace}/down"):
        os.symlink("far/away/deep", f"{proxy.workspace}/down")
    status, answer = proxy.post({"cmd": "pwd", "cwd": "down/../.."})
    assert status == 400
    assert "inside the workspace" in answer["error"]


def test_the_names_of_the_original_module_still_work() -> None:
    assert pp.default_agent_name() == "poco"
    request = pp.ExecRequest(cmd="ls", cwd="", usage_id=None, session_id=None, agent_name="poco")
    assert request.timeout == 300
    assert request.max_output == 1024 * 1024
    assert pp.CommandResult(output="x", exit_code=0).ended == "exit"
    response = pp.ExecResponse(stdout="x", exit_code=0, error=None)
    assert response.to_wire() == '{"stdout":"x","exit_code":0}'

    driver = pp.PocketCoderDriver("/nowhere/at/all", "pocketcoder")
    assert driver.socket_path == "/nowhere/at/all"
    assert driver.session_name == "pocketcoder"
    assert pp.AppState(sessions=pp.SessionMap(), driver=driver).driver is driver
    assert pp.McpQuery(session_id=None).session_id is None
    assert {name for name in pp.__all__ if not hasattr(pp, name)} == set()


# The fields of a request, and values that each may have.
FIELDS: dict[str, tuple[Any, ...]] = {
    "cmd": ("true", "x" * 100),
    "cwd": ("", ".", "sub", "../..", "/", "sub/../sub", "x" * 300),
    "usage_id": ("u", "\n"),
    "session_id": ("s", "é"),
    "agent_name": ("poco", "a" * 64, "a" * 65, "-a", "a\n"),
    "timeout": (0.1, 86400, 86401, 1e999),
    "stdin": ("", "\0"),
    "env": ({}, {"A": "b"}, {"A=": "b"}, {"A b": ""}),
    "max_output": (1, 2**26, 2**26 + 1, 1.0),
}


def test_any_body_becomes_a_valid_request_or_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    dice = random.Random(5)
    workspace = str(tmp_path)
    taken = 0
    said = set[str]()
    (tmp_path / "sub").mkdir()

    for _ in range(3000 * FUZZ):
        fields = {"cmd": "true"} if dice.random() < 0.9 else {}
        fields |= {
            name: junk(dice, *FIELDS[name]) for name in dice.choices([*FIELDS], k=dice.randrange(4))
        }
        body = json.dumps(fields if dice.random() < 0.95 else junk(dice, fields)).encode()
        if dice.random() < 0.3:
            body = spoil(dice, body)

        try:
            got = pp.ExecRequest.from_wire(body, workspace)
        except pp.BadMessage as refused:
            said.add(str(refused))
            continue

        taken += 1
        texts = [got.cmd, got.cwd, got.agent_name, *got.env, *got.env.values()]
        texts += [text for text in (got.usage_id, got.session_id) if text is not None]
        assert all(
            isinstance(text, str) and "\0" not in text and text.encode() is not None
            for text in texts
        ), body
        assert got.cmd, body
        assert got.stdin is None or got.stdin.encode() is not None, body
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", got.agent_name), body
        assert os.path.isdir(got.cwd), body
        assert f"{got.cwd}/".startswith(f"{workspace}/"), body
        assert type(got.timeout) in (int, float), body
        assert 0 < got.timeout <= 86400, body
        assert type(got.max_output) is int, body
        assert 1 <= got.max_output <= 64 * 1024 * 1024, body
        assert not any(name == "" or "=" in name for name in got.env), body

    assert taken > 500 * FUZZ
    assert [text for text in said if "expected" not in text or len(ascii(text)) > 800] == []


def test_unknown_fields_are_named_in_the_answer(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec("true", agent_name=agent, agent="x", time_out=3)
    assert answer["ignored"] == ["agent", "time_out"]
    many = {f"field{number}" + "x" * 100: 0 for number in range(1000)}
    assert len(proxy.exec("true", agent_name=agent, **many)["ignored"]) == pp.MAX_IGNORED
    assert proxy.exec("true", agent_name=agent, ignored=["cmd"])["ignored"] == ["ignored"]
    assert "ignored" not in proxy.exec("true", agent_name=agent)


# ==========================================================================
# Processes
# ==========================================================================
TREES = [
    "sleep 60",
    "trap '' TERM; sleep 60 & sleep 60; sleep 60",
    "setsid sleep 60; sleep 60",
    "(setsid sleep 60 &) ; (trap '' TERM HUP; exec setsid sleep 60) & sleep 60",
    "env -i sleep 60",
    "(env -i setsid -f sleep 60); sleep 60",
]


@pytest.mark.slow
def test_a_timeout_ends_the_whole_tree(proxy: Proxy, agent: str) -> None:
    def end(number: int) -> None:
        name = f"{agent}-{number}"
        started = time.monotonic()
        answer = proxy.exec(f"echo before; {TREES[number]}", agent_name=name, timeout=0.3)
        assert answer["ended"] == "timeout"
        assert answer["exit_code"] == 124
        assert answer["stdout"][:7] == "before\n"
        assert "0.3 s" in answer["error"]
        assert 0.3 <= time.monotonic() - started < 10
        wait_until_gone(f"POCKETCODER_RUN_ID={answer['run_id']}")
        assert proxy.exec("echo next", agent_name=name)["stdout"] == "next\n"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(end, range(len(TREES))))


@pytest.mark.slow
def test_ending_one_run_does_not_harm_the_next_ones(proxy: Proxy, agent: str) -> None:
    def follow(number: int) -> list[tuple[int, str]]:
        name = f"{agent}-{number}"
        assert proxy.exec("sleep 30", agent_name=name, timeout=0.2)["ended"] == "timeout"
        # Enough commands to last beyond the last step of the ladder.
        count = 26 // number
        answers = [
            proxy.exec(f"sleep {0.1 * number}; echo ok", agent_name=name) for _ in range(count)
        ]
        return [(answer["exit_code"], answer["stdout"]) for answer in answers]

    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(follow, range(1, 5)):
            assert set(answers) == {(0, "ok\n")}


def test_a_command_may_clean_up_after_its_timeout(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec(
        "trap 'echo clean; exit 5' TERM; sleep 60 & wait", agent_name=agent, timeout=0.3
    )
    assert answer["stdout"] == "clean\n"
    assert answer["exit_code"] == 124
    assert answer["ended"] == "timeout"


@pytest.mark.slow
def test_a_command_that_does_not_end_at_its_timeout_costs_nothing(warm: StartServer) -> None:
    server = warm()
    server.exec("true")
    before = server.seconds()
    answer = server.exec("trap '' TERM; echo $$; while :; do sleep 0.1; done", timeout=0.2)
    assert answer["ended"] == "timeout"
    # It takes two seconds until SIGKILL comes.
    assert answer["duration_ms"] > 1500
    assert server.seconds() - before < 0.5


def test_a_command_that_stops_itself_is_ended(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec("kill -STOP $$; sleep 60", agent_name=agent)
    assert answer["exit_code"] == 128 + signal.SIGSTOP
    assert answer["ended"] == "exit"
    wait_until_gone(f"POCKETCODER_RUN_ID={answer['run_id']}")


@pytest.mark.slow
def test_starting_a_child_needs_no_thread(warm: StartServer) -> None:
    server = warm("--mcp-server", "none=false")
    size = status_bytes(server.process.pid, "VmSize")
    # A thread's stack takes 8 MiB.
    with limited(server.process, resource.RLIMIT_AS, size + 4 * pp.MIB):
        answer = mcp(server, request("initialize", INITIALIZE), path="/servers/none/mcp")[2]
        assert "before it answered" in answer["error"]["message"]

        server.tmux("kill-server")
        assert server.exec("echo ok")["stdout"] == "ok\n"


def test_a_command_cannot_hide_under_another_name(proxy: Proxy, agent: str) -> None:
    escape = "(setsid sleep 77.75 >/dev/null 2>&1 </dev/null &); sleep 9"
    env = {"POCKETCODER_RUN_ID": "fake"}
    assert proxy.exec(escape, agent_name=agent, timeout=0.3, env=env)["ended"] == "timeout"
    wait_until_gone("sleep\x0077.75")


# ==========================================================================
# Places
# ==========================================================================
# user, owner and mode of the directory, owner of the socket; whether it is sound
PLACES = [
    pytest.param(0, 0, 0o700, 0, True, id="root-private"),
    # The terminals are a worker's.
    pytest.param(0, 7, 0o755, 7, True, id="root-private-of-a-worker"),
    # Also through his group.
    pytest.param(0, 0, 0o2770, 7, True, id="root-group-of-a-worker"),
    pytest.param(0, 0, 0o1777, 0, True, id="root-sticky"),
    pytest.param(0, 7, 0o1777, 7, True, id="root-sticky-socket-of-the-owner"),
    pytest.param(0, 0, 0o1777, 7, False, id="root-sticky-socket-of-a-stranger"),
    pytest.param(0, 0, 0o777, 0, True, id="root-writable"),
    pytest.param(0, 7, 0o777, 7, False, id="root-writable-of-a-worker"),
    pytest.param(7, 7, 0o700, None, True, id="own-private-no-socket"),
    pytest.param(7, 7, 0o775, 7, True, id="own-group"),
    pytest.param(7, 0, 0o1777, None, True, id="sticky-of-root-no-socket"),
    pytest.param(7, 0, 0o1777, 7, True, id="sticky-of-root-own-socket"),
    pytest.param(7, 0, 0o755, 0, True, id="closed-of-root"),
    pytest.param(7, 0, 0o1777, 8, False, id="sticky-of-root-socket-of-a-stranger"),
    pytest.param(7, 8, 0o700, None, False, id="private-of-a-stranger"),
    pytest.param(7, 8, 0o1777, 7, False, id="sticky-of-a-stranger"),
    pytest.param(7, 7, 0o777, 7, True, id="own-writable"),
]


@pytest.mark.parametrize(("user", "owner", "mode", "socket_owner", "sound"), PLACES)
def test_a_socket_a_stranger_could_have_made_is_refused(
    user: int, owner: int, mode: int, socket_owner: int | None, sound: bool
) -> None:
    if os.geteuid():
        # Only root can try.
        return
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pc"))
    (folder / "place").mkdir()
    (folder / "link").symlink_to("place")

    try:
        os.chmod(folder, 0o755)
        os.chown(folder / "place", owner, -1)
        os.chmod(folder / "place", mode)
        if socket_owner is not None:
            (folder / "place/s").touch()
            os.chown(folder / "place/s", socket_owner, -1)
        os.chown(folder / "link", user, -1, follow_symlinks=False)
        os.seteuid(user)

        for name in ("place", "link"):
            with (
                contextlib.nullcontext()
                if sound
                else pytest.raises(pp.NoTerminal, match=f"{folder}/(place|{name})")
            ):
                pp.check_place(f"{folder}/{name}/s")

        os.seteuid(0)
        os.chown(folder / "link", 9, -1, follow_symlinks=False)
        os.seteuid(user)
        with pytest.raises(pp.NoTerminal, match="got user 9"):
            pp.check_place(f"{folder}/link/s")
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_our_directory_gets_the_sticky_bit_if_open_to_all(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.chmod(tmp_path, 0o777)
    pp.check_place(f"{tmp_path}/s")
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777
    assert f"{tmp_path}: any user could replace what is in it" in caplog.text


def test_our_directory_below_one_open_to_all_is_accepted_with_a_warning(
    tmp_path: pathlib.Path,
) -> None:
    # As volumes of Kubernetes are.
    os.chmod(tmp_path, 0o2777)
    pp.check_place(f"{tmp_path}/own/s")
    assert pp.open_above(f"{tmp_path}/own/s") == [str(tmp_path)]
    os.chmod(tmp_path, 0o1777)
    assert pp.open_above(f"{tmp_path}/own/s") == []


# ==========================================================================
# Tmux
# ==========================================================================
def test_words_reach_tmux_unchanged(proxy: Proxy) -> None:
    async def there_and_back(word: str) -> list[str]:
        tmux = await pp.Tmux.connect(proxy.socket, "pocketcoder", [])
        try:
            await tmux.ask("set-option", "-g", "@word", word)
            return await tmux.ask("show-options", "-gv", "@word")
        finally:
            tmux.close()
            await tmux.ended.wait()

    for word in (
        "plain",
        "it's",
        '"; kill-server',
        "$HOME ~ {a} ; b \\",
        "#{pane_id}",
        "%end 1 2 3",
        "-x",
        "é",
    ):
        assert asyncio.run(there_and_back(word)) == [word]


def test_a_refused_command_raises_an_error_with_the_words_of_tmux(proxy: Proxy) -> None:
    async def ask() -> None:
        tmux = await pp.Tmux.connect(proxy.socket, "pocketcoder", [])
        try:
            with pytest.raises(pp.NoTerminal, match="unknown command: nosuch"):
                await tmux.ask("nosuch")
            assert await tmux.ask("display-message", "-p", "still there") == ["still there"]
        finally:
            tmux.close()
            await tmux.ended.wait()

    asyncio.run(ask())


def test_a_lost_connection_fails_every_pending_command_at_once(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> None:
        tmux = await pp.Tmux.connect(proxy.socket, "pocketcoder", [])
        os.kill(tmux.process.get_pid(), signal.SIGKILL)
        await asyncio.wait_for(tmux.ended.wait(), 10)
        for _ in range(10):
            with pytest.raises(pp.NoTerminal):
                await tmux.ask("display-message", "-p", "x")

    asyncio.run(ask())
    # Nothing was written to a closed connection.
    assert not caplog.records


def test_replies_of_tmux_are_read_the_same_however_they_are_cut() -> None:
    dice = random.Random(6)
    lines = [
        "",
        "x",
        "é",
        "\udcff",
        "%end 1 2 0",
        "%error",
        "%begin 1 2 1",
        "%exit",
        "%output %1 x",
    ]

    async def read(pieces: list[bytes], count: int) -> Any:
        told: list[int] = []
        tmux = pp.Tmux("s", lambda: told.append(tmux.notice_count))
        replies = [tmux.loop.create_future() for _ in range(count)]
        tmux.replies.extend(replies)
        for piece in pieces:
            tmux.pipe_data_received(1, piece)
        if told:
            assert told[-1] == tmux.notice_count
        assert tmux.attached.result() == ["attached"]

        return (
            tmux.notice_count,
            tmux.unread,
            [reply.exception() or reply.result() for reply in replies],
        )

    async def check() -> None:
        for _ in range(50 * FUZZ):
            wrote = "%begin 1 1 0\nattached\n%end 1 1 0\n"
            expected = []
            notices = 0

            for number in range(dice.randrange(5)):
                for _ in range(dice.randrange(3)):
                    wrote += dice.choice(
                        ["%window-add @1\n", "%session-changed $1 é\n", "\n", "noise\n"]
                    )
                    notices += 1

                reply = dice.choices(lines, k=dice.randrange(4))
                end = dice.choice(["%end", "%error"])
                expected.append(
                    (
                        end,
                        [
                            line.encode(errors="surrogateescape").decode(errors="replace")
                            for line in reply
                        ],
                    )
                )
                wrote += "".join(
                    f"{line}\n" for line in (f"%begin 9 {number} 1", *reply, f"{end} 9 {number} 1")
                )

            data = (wrote + dice.choice(["", "%begin", "%beg"])).encode(errors="surrogateescape")
            for pieces in cuts(dice, data):
                seen, unread, replies = await read(pieces, len(expected))
                assert seen == notices, pieces
                assert unread == data.rpartition(b"\n")[2], pieces

                for (end, reply), got in zip(expected, replies, strict=True):
                    assert (
                        str(got) == f"tmux: {' '.join(reply)}" if end == "%error" else got == reply
                    ), pieces

    asyncio.run(check())


@pytest.mark.slow
def test_every_caller_learns_at_once_that_tmux_does_not_answer(warm: StartServer) -> None:
    server = warm()
    tmux = server.tmux_pid()
    os.kill(tmux, signal.SIGSTOP)
    begun = time.monotonic()
    calls = [
        Background(partial(server.post, {"cmd": "true", "agent_name": f"a{number}"}))
        for number in range(8)
    ]
    for call in calls:
        status, answer = call.result()
        assert status == 503
        assert "no answer within 5 s" in answer["error"]

    assert time.monotonic() - begun < 20  # seconds, of which it took eight callers 40 and more
    assert server.status("GET", "/health") == 200
    os.kill(tmux, signal.SIGCONT)
    eventually(lambda: server.post({"cmd": "true"})[0] == 200, 10)


def test_a_session_name_that_tmux_would_change_is_refused() -> None:
    for name in ("", "a:b", "a.b", "x\n", "=x", "#{x}", "a;", "$1", "a\\", "\x9b"):
        with pytest.raises(pp.BadMessage, match="session_name"):
            pp.PocketCoderDriver("/tmp/s", name)


# ==========================================================================
# Records
# ==========================================================================
@pytest.fixture
def shelf(tmp_path: pathlib.Path) -> pp.Shelf:
    return pp.Shelf(f"{tmp_path}/runs", 64 * pp.MIB, "s")


@pytest.fixture
def full_disk(tmp_path: pathlib.Path) -> Iterator[str]:
    """A directory with room for 4 MiB; where we may not mount one, files have no room at all."""
    folder = str(tmp_path / "disk")
    os.mkdir(folder)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder])
    if mounted.returncode == 0:
        yield folder
        subprocess.run(["umount", "-l", folder], check=True)
    else:
        with limited(os.getpid(), resource.RLIMIT_FSIZE, 0):
            yield folder


def kept_of(record: pp.Record) -> list[tuple[int, bytes]]:
    """All that a record has kept, by offset; stretches without a gap are one."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while True:
        start, chunk = record.read(at, pp.MIB)
        if not chunk:
            return found
        if found and start == at:
            found[-1] = (found[-1][0], found[-1][1] + chunk)
        else:
            found.append((start, chunk))
        at = start + len(chunk)


@pytest.mark.parametrize(
    "size",
    [0, 1, pp.SMALL_OUTPUT, pp.SMALL_OUTPUT + 1, pp.PIECE_SIZE, 3 * pp.PIECE_SIZE + 17],
    ids=["nothing", "a-byte", "small", "just-not-small", "a-file", "files"],
)
@pytest.mark.parametrize("chunk_size", [1000, 65536, pp.MIB], ids=["bits", "pipes", "chunks"])
def test_a_record_keeps_every_byte_of_what_has_room(
    shelf: pp.Shelf, size: int, chunk_size: int
) -> None:
    data = random.Random(size).randbytes(size)
    record = shelf.record("0" * 16, pp.MIB, False)
    for start in range(0, size, chunk_size):
        record.add(data[start : start + chunk_size])

    assert record.total == size
    assert b"".join(chunk for _, chunk in kept_of(record)) == data
    for offset in {0, 1, size // 2, size - 1} & set(range(size)):
        assert record.read(offset, 10) == (offset, data[offset : offset + 10])


def test_a_small_record_makes_no_file(shelf: pp.Shelf) -> None:
    shelf.record("0" * 16, pp.MIB, False).add(bytes(pp.SMALL_OUTPUT))
    assert not os.path.exists(shelf.folder)


def test_of_a_large_record_the_first_and_the_last_8_mib_are_kept(shelf: pp.Shelf) -> None:
    size = 40 * pp.MIB + 5
    data = random.Random(1).randbytes(size)
    record = shelf.record("0" * 16, pp.MIB, False)
    for start in range(0, size, 300_000):
        record.add(data[start : start + 300_000])

    (first, head), (second, tail) = kept_of(record)
    assert first == 0
    assert data.startswith(head)
    assert data.endswith(tail)
    assert second + len(tail) == size
    assert 8 * pp.MIB <= len(head) <= 9 * pp.MIB
    assert 8 * pp.MIB <= len(tail) <= 10 * pp.MIB
    assert shelf.used == len(head) + len(tail)
    assert record.read(20 * pp.MIB, 3) == (second, tail[:3])


def test_an_answer_of_64_mib_is_kept_whole(tmp_path: pathlib.Path) -> None:
    shelf = pp.Shelf(f"{tmp_path}/runs", 256 * pp.MIB, "s")
    record = shelf.record("0" * 16, pp.MAX_OUTPUT, False)
    for number in range(64):
        record.add(bytes([number]) * pp.MIB)

    assert record.is_whole(pp.MAX_OUTPUT, record.total)
    assert sum(map(len, record.text(pp.MAX_OUTPUT, record.total))) == pp.MAX_OUTPUT


def test_when_there_is_no_room_the_oldest_output_goes_first(tmp_path: pathlib.Path) -> None:
    shelf = pp.Shelf(f"{tmp_path}/runs", 10 * pp.MIB, "s")
    records = [shelf.record(f"{number:016x}", pp.MIB, False) for number in range(5)]
    for record in records:
        record.add(bytes(3 * pp.MIB))
        record.finish()
        shelf.retire(record)

    assert [record.size() // pp.MIB for record in records] == [0, 0, 3, 3, 3]
    assert records[0].total == 3 * pp.MIB
    assert shelf.used <= shelf.limit


def test_floods_share_the_room_and_keep_their_ends(tmp_path: pathlib.Path) -> None:
    shelf = pp.Shelf(f"{tmp_path}/runs", 100 * pp.MIB, "s")
    records = [shelf.record(f"{number:016x}", pp.MIB, False) for number in range(20)]
    for round_ in range(30):
        for number, record in enumerate(records):
            record.add(bytes([number, round_]) * (pp.MIB // 2))

    assert shelf.used <= shelf.limit
    on_disk = sum(os.stat(f"{shelf.folder}/{name}").st_size for name in os.listdir(shelf.folder))
    assert on_disk <= shelf.limit + len(shelf.socket)
    for number, record in enumerate(records):
        text = b"".join(chunk for _, chunk in kept_of(record))
        assert text.startswith(bytes([number, 0]) * (pp.MIB // 2))
        assert text.endswith(bytes([number, 29]) * (pp.MIB // 2))


def test_a_full_disk_costs_old_output_and_then_the_middle_of_new_output(full_disk: str) -> None:
    shelf = pp.Shelf(f"{full_disk}/runs", 64 * pp.MIB, "s")
    old = shelf.record("0" * 16, pp.MIB, False)
    old.add(bytes(2 * pp.MIB))
    old.finish()
    shelf.retire(old)

    new = shelf.record("1" * 16, pp.MIB, False)
    data = random.Random(2).randbytes(9 * pp.MIB)
    for start in range(0, len(data), 100_000):
        new.add(data[start : start + 100_000])

    assert old.size() == 0
    assert new.total == len(data)
    stretches = kept_of(new)
    assert stretches[0] == (0, data[: len(stretches[0][1])])
    assert len(stretches[0][1]) >= pp.MIB // 2
    assert data.endswith(stretches[-1][1])
    assert len(stretches[-1][1]) >= pp.MIB // 2
    for start, chunk in stretches:
        assert data[start : start + len(chunk)] == chunk


@pytest.mark.parametrize("obstacle", ["file", "missing-parent"])
def test_without_a_directory_the_answer_is_kept_in_memory(
    tmp_path: pathlib.Path, obstacle: str
) -> None:
    folder = tmp_path / "place"
    folder.write_text("")
    shelf = pp.Shelf(str(folder if obstacle == "file" else folder / "runs"), 64 * pp.MIB, "s")
    record = shelf.record("0" * 16, 100_000, False)
    data = random.Random(3).randbytes(500_000)
    for start in range(0, len(data), 7_000):
        record.add(data[start : start + 7_000])

    (_, head), (_, tail) = kept_of(record)
    assert data[:50_000] == head
    assert data[-50_000:] == tail


def test_what_somebody_removes_is_a_gap(shelf: pp.Shelf) -> None:
    record = shelf.record("0" * 16, 10 * pp.MIB, False)
    record.add(bytes(pp.MIB) + b"\1" * pp.MIB + b"\2" * pp.MIB)
    os.unlink(record.pieces[1].path or "")
    assert record.read(pp.MIB, 1) == (2 * pp.MIB, b"\2")
    text = "".join(record.text(10 * pp.MIB, record.total))
    assert f"[pocketcoder: {pp.MIB} bytes left out]" in text


def test_nobody_can_remove_the_end_of_output_before_the_answer(shelf: pp.Shelf) -> None:
    record = shelf.record("0" * 16, pp.MIB, False)
    record.add(b"x" * 100_000)
    record.finish()
    shutil.rmtree(shelf.folder)
    assert len("".join(record.text(pp.MIB, record.total))) == 100_000
    shelf.retire(record)
    assert record.fd is None


def test_only_a_full_disk_costs_old_output(shelf: pp.Shelf) -> None:
    old = shelf.record("0" * 16, pp.MIB, False)
    old.add(bytes(pp.MIB))
    old.finish()
    shelf.retire(old)
    new = shelf.record("1" * 16, pp.MIB, False)
    os.mkdir(f"{new.path}.0")
    new.add(b"x" * pp.MIB)
    assert old.size() == pp.MIB
    assert new.read(0, 3) == (0, b"xxx")


def test_a_record_that_was_dropped_goes_on_at_its_offset(shelf: pp.Shelf) -> None:
    record = shelf.record("0" * 16, pp.MIB, False)
    record.add(b"gone")
    record.drop()
    record.add(b"kept")
    assert record.read(0, 10) == (4, b"kept")


def test_a_wiped_directory_is_made_again(shelf: pp.Shelf) -> None:
    first = shelf.record("0" * 16, pp.MIB, False)
    first.add(bytes(pp.MIB))
    shutil.rmtree(shelf.folder)
    second = shelf.record("1" * 16, pp.MIB, False)
    second.add(b"x" * 2 * pp.MIB)
    assert second.read(0, 3) == (0, b"xxx")
    assert os.stat(shelf.folder).st_mode & 0o777 == 0o700


@pytest.mark.parametrize("more", [b"", b"two\n"], ids=["before-the-end", "before-more"])
def test_what_is_printed_survives_a_wipe_while_it_grows(shelf: pp.Shelf, more: bytes) -> None:
    record = shelf.record("0" * 16, pp.MIB, True)
    record.add(b"one\n")
    shutil.rmtree(shelf.folder)
    if more:
        record.add(more)
    record.finish()
    assert record.read(0, 100) == (0, b"one\n" + more)
    assert record.is_whole(100, record.total)


def test_what_is_wiped_after_the_answer_is_missed(shelf: pp.Shelf) -> None:
    record = shelf.record("0" * 16, pp.MIB, True)
    record.add(b"one\n")
    record.finish()
    shelf.retire(record)
    assert record.is_whole(100, record.total)
    shutil.rmtree(shelf.folder)
    assert record.read(0, 100) == (4, b"")
    assert not record.is_whole(100, record.total)


def test_a_lasting_record_moves_bytes_from_the_fifo_to_its_file(shelf: pp.Shelf) -> None:
    record = shelf.record("0" * 16, pp.MIB, True)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    data = random.Random(4).randbytes(3 * pp.MIB)
    try:
        for start in range(0, len(data), 60_000):
            os.write(writer, data[start : start + 60_000])
            wanted = start + len(data[start : start + 60_000])
            while record.total < wanted:
                record.fill(reader)
        with pytest.raises(BlockingIOError):
            record.fill(reader)
        os.close(writer)
        assert record.fill(reader) == 0
    finally:
        os.close(reader)

    names = sorted(os.listdir(shelf.folder))
    files = [name for name in names if not name.endswith(".lock")]
    assert [name.partition(".")[0] for name in files] == ["0" * 16] * len(files)
    stored = sorted(files, key=lambda name: int(name.partition(".")[2]))
    assert b"".join(pathlib.Path(shelf.folder, name).read_bytes() for name in stored) == data


# ==========================================================================
# Streams
# ==========================================================================
def test_stdin_arrives_byte_for_byte(proxy: Proxy, agent: str) -> None:
    text = "line\nno newline\0é\x1b" + "y" * 300_000
    answer = proxy.exec("cat", agent_name=agent, stdin=text)
    assert answer["stdout"] == text
    assert proxy.exec("cat; echo end", agent_name=agent, stdin="")["stdout"] == "end\n"


def test_output_beyond_the_limit_keeps_both_ends(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec("seq -w 1 100000", agent_name=agent, max_output=1000)
    text = answer["stdout"]
    whole = "".join(f"{i:06}\n" for i in range(1, 100001))
    head, gap, tail = re.fullmatch(
        r"(?s)(.*?\n)\[pocketcoder: (\d+) bytes left out\]\n(.*)", text
    ).groups()  # type: ignore[union-attr]
    assert whole.startswith(head.rstrip("\n"))
    assert whole.endswith(tail)
    assert answer["truncated"] is True
    assert answer["output_bytes"] == len(whole)
    assert len(tail) == 500
    assert int(gap) == len(whole) - 1000
    answer = proxy.exec("head -c 1000 /dev/zero", agent_name=agent, max_output=1000)
    assert answer["truncated"] is False


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 11, 64], ids="{}-bytes".format)
def test_a_limit_never_splits_a_character(tmp_path: pathlib.Path, limit: int) -> None:
    whole = "é漢🙂x" * 50
    for chunks in (1, 3, 1000):
        record = pp.Shelf(f"{tmp_path}/runs", pp.MIB, "s").record("0" * 16, limit, False)
        data = whole.encode()
        for start in range(0, len(data), chunks):
            record.add(data[start : start + chunks])
        text = "".join(record.text(limit, len(data)))
        head, gap, tail = re.fullmatch(
            r"(.*)\n\[pocketcoder: (\d+) bytes left out\]\n(.*)", text
        ).groups()  # type: ignore[union-attr]
        assert whole.startswith(head)
        assert whole.endswith(tail)
        assert int(gap) + len((head + tail).encode()) == len(data)
        assert len((head + tail).encode()) <= limit


def test_bytes_that_are_no_text_become_replacement_characters(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec("printf 'a\\377b\\303'", agent_name=agent)
    assert answer["stdout"] == "a\ufffdb\ufffd"
    assert answer["output_bytes"] == 4


@pytest.mark.slow
def test_a_flood_leaves_the_server_small(warm: StartServer) -> None:
    server = warm()
    before = server.memory()
    answer = server.exec("head -c 300000000 /dev/zero", max_output=100_000, timeout=60)
    assert answer["output_bytes"] == 300_000_000

    endless = server.exec("yes", timeout=0.5)
    assert endless["ended"] == "timeout"
    assert endless["exit_code"] == 124
    assert endless["truncated"] is True
    assert server.peak() - before < 80 * 1024 * 1024


@pytest.mark.slow
def test_background_processes_live_on_and_their_output_is_discarded(
    proxy: Proxy, agent: str
) -> None:
    gate = f"{proxy.folder}/{agent}"
    noise = f"until [ -e {gate} ]; do echo noise; sleep 0.02; done; echo last > {gate}.out"
    cmd = f"({noise}) & echo started"
    answer = proxy.exec(cmd, agent_name=agent)
    assert answer["stdout"].replace("noise\n", "") == "started\n"
    assert answer["duration_ms"] < 2000

    for _ in range(5):
        assert proxy.exec("sleep 0.03; echo mine", agent_name=agent)["stdout"] == "mine\n"
    pathlib.Path(gate).touch()
    eventually(lambda: os.path.exists(f"{gate}.out"))


@pytest.mark.slow
def test_a_background_flood_blocks_no_command_and_releases_its_descriptor(
    own: StartServer,
) -> None:
    server = own()
    assert server.exec("(sleep 0.05; timeout 2.5 yes) & echo on")["stdout"].startswith("on\n")
    assert server.exec("echo mine")["stdout"] == "mine\n"
    assert server.run_files() >= 1
    eventually(lambda: server.run_files() == 0)


def test_an_editor_does_not_read_its_own_screen_as_keys(proxy: Proxy, agent: str) -> None:
    """As vim does, which reads keys from descriptor 2 where stdin is no terminal."""
    editor = f"{sys.executable} -c \"import os; os.write(1, b'touch'); print(os.read(2, 9))\""
    assert "Bad file descriptor" in proxy.exec(editor, agent_name=agent, timeout=3)["stdout"]


LATE_CHILDREN = [
    pytest.param("echo hi > >(cat)", "hi\n", id="process-substitution"),
    pytest.param("exec > >(tee /dev/null) 2>&1; echo hi", "hi\n", id="tee-for-good"),
    pytest.param("(echo no >&2) 2> >(sed s/^/E:/ >&2)", "E:no\n", id="stderr-filtered"),
    pytest.param("(sleep 0.15; echo late) & echo now", "now\nlate\n", id="once-later"),
    pytest.param(
        "(for n in 1 2 3 4; do sleep 0.08; echo $n; done) &", "1\n2\n3\n4\n", id="some-times-later"
    ),
]


@pytest.mark.parametrize(
    ("cmd", "output"), with_slow(LATE_CHILDREN, "process-substitution", "once-later")
)
def test_output_of_late_children_is_in_the_answer(
    proxy: Proxy, agent: str, cmd: str, output: str
) -> None:
    assert [proxy.exec(cmd, agent_name=agent)["stdout"] for _ in range(5)] == [output] * 5


def test_a_silent_background_process_delays_the_answer_a_little(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    started = time.monotonic()
    answer = proxy.exec("sleep 79.75 & echo on", agent_name=agent)
    assert answer["stdout"] == "on\n"
    assert answer["duration_ms"] < 100
    assert 0.1 < time.monotonic() - started < 0.9
    for pid in processes_with("sleep\x0079.75"):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_background_process_that_keeps_writing_delays_the_answer_by_a_second(
    proxy: Proxy, agent: str
) -> None:
    proxy.exec("true", agent_name=agent)
    started = time.monotonic()
    answer = proxy.exec("(while sleep 0.01; do echo tick; done) & echo $!", agent_name=agent)
    assert 0.9 < time.monotonic() - started < 2.5
    os.kill(int(answer["stdout"].split()[0]), signal.SIGKILL)


@pytest.mark.slow
def test_a_background_process_that_exits_takes_no_output_from_a_later_command(
    proxy: Proxy, agent: str
) -> None:
    call = Kept(proxy)

    def leave_some(name: str) -> None:
        for _ in range(5):
            proxy.exec("sleep 0.3 &", agent_name=name)

    ending = [Background(partial(leave_some, f"{agent}{number}")) for number in range(4)]
    said = set()
    while not all(each.future.done() for each in ending):
        said.add(call("echo whole", agent_name=agent)["stdout"])
    call.close()
    assert said == {"whole\n"}


def test_a_person_sees_prompt_command_output_and_exit_code(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    proxy.exec("echo one; printf 'no newline'; exit 3", agent_name=agent)
    proxy.exec("echo 'a\nb'", agent_name=agent)
    expected = [
        "$ true",
        "$ echo one; printf 'no newline'; exit 3",
        "one",
        "no newline",
        "[exit 3]",
        "$ echo 'a",
        "b'",
        "a",
        "b",
        "$",
    ]
    shown = eventually(
        lambda: [line.rstrip() for line in proxy.screen(agent).split("\n") if line.strip()]
    )
    eventually(lambda: proxy.screen(agent).rstrip().endswith("$"))
    shown = [line.rstrip() for line in proxy.screen(agent).split("\n") if line.strip()]
    assert shown == expected


def test_a_person_sees_output_as_it_comes(proxy: Proxy, agent: str) -> None:
    gate = f"{proxy.folder}/{agent}"
    call = proxy.start_exec(
        f"echo live; until [ -e {gate} ]; do sleep 0.02; done", agent_name=agent
    )
    eventually(lambda: "\nlive" in proxy.screen(agent))
    pathlib.Path(gate).touch()
    assert call.result()["exit_code"] == 0


def test_output_neither_floods_nor_attacks_a_person(proxy: Proxy, agent: str) -> None:
    proxy.exec(
        "printf '\\033]2;evil\\007\\033[?1049h\\016\\033[31mred\\033[0m'; head -c 1000000 /dev/zero | tr '\\0' x",
        agent_name=agent,
    )
    assert "more bytes not shown here]" in eventually(
        lambda: proxy.screen(agent) if "shown" in proxy.screen(agent) else ""
    )
    shown = proxy.tmux(
        "display-message", "-p", "-t", proxy.pane(agent), "#{alternate_on} #{pane_title}"
    )
    assert shown.split()[0] == "0"
    assert "evil" not in proxy.tmux(
        "display-message", "-p", "-t", proxy.pane(agent), "#{pane_title}"
    )


def test_recorded_output_is_the_same_however_it_is_cut(tmp_path: pathlib.Path) -> None:
    dice = random.Random(8)
    shelf = pp.Shelf(f"{tmp_path}/runs", pp.MIB, "s")
    for _ in range(500 * FUZZ):
        limit = dice.choice((1, 2, 3, 5, 10, 20, 50))
        data = "".join(dice.choices("ab\né漢🙂", k=dice.randrange(40))).encode()
        if dice.random() < 0.3:
            data = spoil(dice, data)
        texts = set()

        for pieces in cuts(dice, data):
            record = shelf.record("0" * 16, limit, False)
            for piece in pieces:
                record.add(piece)
            texts.add("".join(record.text(limit, len(data))))

        assert len(texts) == 1, (limit, data)
        text = texts.pop()
        head = data[: limit // 2]
        tail = data[max(0, len(data) - (limit - limit // 2)) :]
        if len(data) <= limit:
            assert text == data.decode(errors="replace"), (limit, data)
            continue
        match = re.fullmatch(r"(?s)(.*?\n)\[pocketcoder: (\d+) bytes left out\]\n(.*)", text)
        assert match, (limit, data)
        assert head.decode(errors="ignore").startswith(
            match[1].rstrip("\n\ufffd").partition("\ufffd")[0]
        ), (
            limit,
            data,
        )
        assert tail.decode(errors="replace").endswith(match[3]), (limit, data)
        assert len(data) - limit <= int(match[2]) <= len(data) - limit + 6, (limit, data)


# ==========================================================================
# Run files
# ==========================================================================
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGTERM, id="stopped", marks=pytest.mark.slow),
    ],
)
def test_a_background_process_outlives_the_server(own: StartServer, number: int) -> None:
    server = own()
    count = f"{server.folder}/count"
    # More than any pipe holds, and SIGPIPE would end it.
    loop = (
        f"(while sleep 0.01; do head -c 100000 /dev/zero; echo x >> {count}; done) & echo $! > pid"
    )
    server.exec(loop, max_output=8)
    pid = int(pathlib.Path(server.workspace, "pid").read_text())
    server.stop(number)
    before = os.path.getsize(count)
    eventually(lambda: os.path.getsize(count) > before + 100)
    os.kill(pid, signal.SIGKILL)
    # Nobody reads on for a writer that is no more.
    wait_until_gone("exec 3<&0 4<&1")


@pytest.mark.slow
def test_a_background_process_outlives_a_server_that_is_killed_before_the_answer(
    own: StartServer,
) -> None:
    server = own()
    count = f"{server.folder}/count"
    loop = f"(while sleep 0.01; do echo x; echo x >> {count}; done) & echo $! > pid"
    connection = server.connect()
    connection.request("POST", "/exec", json.dumps({"cmd": loop}), JSON_TYPE)
    eventually(lambda: os.path.exists(count) and os.path.getsize(count) > 10)
    # The answer waits for quiet.
    time.sleep(0.2)
    server.stop(signal.SIGKILL)
    connection.close()
    before = os.path.getsize(count)
    eventually(lambda: os.path.getsize(count) > before + 100)
    os.kill(int(pathlib.Path(server.workspace, "pid").read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_a_command_whose_server_is_killed_leaves_its_background_processes_alone(
    own: StartServer,
) -> None:
    server = own()
    count = f"{server.folder}/count"
    gate = f"{server.folder}/gate"
    flood = f"while sleep 0.01; do head -c 100000 /dev/zero; echo x >> {count}; done"
    loop = f"({flood}) & echo $! > {gate}; sleep 1"
    connection = server.connect()
    connection.request("POST", "/exec", json.dumps({"cmd": loop}), JSON_TYPE)
    eventually(lambda: os.path.exists(gate) and pathlib.Path(gate).read_text())
    server.stop(signal.SIGKILL)
    connection.close()
    # By then its command has ended, without a server to report to.
    time.sleep(1.5)
    before = os.path.getsize(count)
    eventually(lambda: os.path.getsize(count) > before + 100)
    os.kill(int(pathlib.Path(gate).read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_a_line_recalled_from_the_history_runs_nothing(own: StartServer) -> None:
    server = own()
    pathlib.Path(server.folder, "home/.bashrc").write_text("PS1='$ '; HISTCONTROL=ignoredups\n")
    count = f"{server.folder}/count"
    server.exec(f"echo x >> {count}")

    for _ in range(2):
        server.type("poco", "Up", "Enter")
        server.type("poco", "-l", f"touch {server.folder}/typed")
        server.type("poco", "Enter")
        eventually(lambda: os.path.exists(f"{server.folder}/typed"))
        os.unlink(f"{server.folder}/typed")

    assert pathlib.Path(count).read_text() == "x\n"

    # Nor does it end the next one, which has the same files.
    running = server.start_exec(f"sleep 1; echo y >> {count}; exit 7")
    wait_until_running("sleep\x001\x00")
    server.tmux("split-window", "-d", "-t", server.pane("poco"), "bash", "-i")
    go = server.tmux("list-panes", "-s", "-F", "#{pane_id}").split()[-1]
    files = sorted(pathlib.Path(server.folder).glob("tmux/s.d/*/*.go"))
    server.tmux("send-keys", "-t", go, f". {files[0]}", "Enter")
    assert running.result()["exit_code"] == 7
    assert pathlib.Path(count).read_text() == "x\ny\n"


@pytest.mark.slow
def test_a_shell_without_descriptors_runs_nothing_of_older_commands(
    own: StartServer,
) -> None:
    server = own()
    server.exec("cat >/dev/null <<'X'\n" + f"touch {server.folder}/old\n" * 200 + "X")
    time.sleep(0.2)
    server.type("poco", "ulimit -S -n 9", "Enter")
    time.sleep(0.2)
    # This one runs in another pane.
    assert server.exec("echo ok")["stdout"] == "ok\n"
    assert not os.path.exists(f"{server.folder}/old")


@pytest.mark.slow
def test_the_run_directory_is_private_and_recreated_when_wiped(warm: StartServer) -> None:
    server = warm()
    base = server.run_folder
    assert base.stat().st_mode & 0o777 == 0o700

    call = server.start_exec("sleep 0.5; echo survived; exit 4")
    wait_until_running("sleep\x000.5")
    subprocess.run(["rm", "-rf", base], check=True)
    answer = call.result()
    assert answer["stdout"] == "survived\n"
    assert answer["exit_code"] == 4
    assert server.exec("echo next")["stdout"] == "next\n"


@pytest.mark.slow
def test_a_run_whose_files_are_wiped_leaves_no_process(own: StartServer) -> None:
    server = own()
    running = Background(partial(server.post, {"cmd": "sleep 0.5; : wiped", "wait": 20}))
    wait_until_running("sleep 0.5; : wiped")
    shutil.rmtree(server.run_folder)
    assert running.result()[0] == 200

    def waits_for_a_server() -> list[int]:
        pids = processes_with(server.folder)
        return [pid for pid in pids if any(".done" in path for path in descriptors_of(pid))]

    eventually(lambda: not waits_for_a_server())


@pytest.mark.parametrize("file", ["*.out", "*.cmd", "status"])
@pytest.mark.slow
def test_a_run_whose_files_are_wiped_just_before_its_start_is_retried(
    warm: StartServer, file: str
) -> None:
    server = warm()
    base = server.run_folder
    tmux = server.tmux_pid()
    # This tmux is about to type the line.
    os.kill(tmux, signal.SIGSTOP)
    call = server.start_exec(f"ls /proc/self/fd; echo kept #{'x' * 40_000}")
    eventually(lambda: [path for path in base.rglob("*.cmd") if "echo kept" in path.read_text()])
    for path in base.rglob(file):
        path.unlink()
    os.kill(tmux, signal.SIGCONT)
    answer = call.result()
    # 3 is that of ls.
    assert answer["stdout"] == "0\n1\n2\n3\nkept\n"
    assert answer["ended"] == "exit"


@pytest.mark.slow
def test_a_run_directory_of_another_user_is_refused(warm: StartServer) -> None:
    server = warm()
    subprocess.run(["rm", "-rf", f"{server.socket}.d"], check=True)
    os.symlink(server.workspace, f"{server.socket}.d")
    status, answer = server.post({"cmd": "true"})
    assert status == 503
    assert f"{server.socket}.d" in answer["error"]
    os.unlink(f"{server.socket}.d")
    assert server.exec("echo ok")["stdout"] == "ok\n"


# The directory with the files of runs.
RUNS = "cd {socket}.d/[0-9a-f][0-9a-f][0-9a-f][0-9a-f]/; "
PLANTS = {
    "go": "for n in 1 2 3 4; do rm -f $n.go; mkfifo $n.go; done",
    "done": "for n in 1 2 3 4; do rm $n.done; ln -s {precious} $n.done; done",
    "out": "for n in 1 2 3 4; do rm $n.out; ln {precious} $n.out; done",
    "status": "rm status; touch status",
    "reports": "head -c 100000 /dev/zero >status; printf '%s 1' $POCKETCODER_RUN_ID exit >status",
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.slow
def test_files_planted_by_a_command_harm_no_other_command(own: StartServer, plant: str) -> None:
    server = own()
    precious = pathlib.Path(server.folder, "precious")
    precious.write_text("precious")
    # Make four names.
    for call in [server.start_exec("true", agent_name=f"a{number}") for number in range(4)]:
        call.result()
    command = (RUNS + PLANTS[plant]).format(socket=server.socket, precious=precious)
    server.exec(command)
    for _ in range(3):
        answer = server.exec("echo ok; exit 3", agent_name="a1", timeout=20)
        assert answer["stdout"] == "ok\n"
        assert answer["exit_code"] == 3

    assert precious.read_text() == "precious"


WORKER = 65534  # nobody


@pytest.fixture
def workers() -> Iterator[Proxy]:
    """A server of root, with the terminals of another user; skips where we are not root."""
    if os.geteuid():
        pytest.skip("only root can hand files over")
    folder = tempfile.mkdtemp(prefix="pc")
    os.makedirs(f"{folder}/tmux")
    os.chown(f"{folder}/tmux", WORKER, -1)
    os.chmod(folder, 0o755)
    command = [
        "tmux",
        "-S",
        f"{folder}/tmux/s",
        "new-session",
        "-d",
        "-s",
        "pocketcoder",
        "-n",
        "poco:terminal",
    ]
    subprocess.run(
        [*command, "--", "bash", "--norc", "-i"],
        check=True,
        user=WORKER,
        env={**os.environ, "HOME": "/"},
    )
    server = Proxy(folder=folder)
    yield server
    server.remove()


@pytest.mark.slow
def test_commands_of_a_root_server_run_as_the_terminals_owner(workers: Proxy) -> None:
    for number in range(2):
        answer = workers.exec(f"id -u; cat; exit {number}", stdin="x", env={"A": "b"})
        assert answer["stdout"] == f"{WORKER}\nx"
        assert answer["exit_code"] == number

    assert workers.exec("sleep 78.4 & wait", timeout=0.2)["ended"] == "timeout"
    base = workers.run_folder
    assert base.stat().st_uid == 0
    assert base.stat().st_mode & 0o777 == 0o711
    assert {(path.stat().st_uid, path.stat().st_mode & 0o077) for path in base.glob("*")} == {
        (WORKER, 0)
    }
    assert "the terminals belong to user 65534:" in workers.logged()


@pytest.mark.slow
def test_a_worker_cannot_make_root_touch_files_or_processes_of_others(workers: Proxy) -> None:
    workers.exec("true")
    folder = next(workers.run_folder.glob("*"))
    for name in ("1.go", "1.done", "1.in"):
        precious = folder / f"precious.{name}"
        precious.write_text("precious")
        precious.chmod(0o600)
        (folder / name).unlink(missing_ok=True)
        os.link(precious, folder / name)

    assert workers.exec("echo ok", stdin="x" * 10)["stdout"] == "ok\n"
    assert workers.exec("echo ok")["stdout"] == "ok\n"
    for precious in folder.glob("precious.*"):
        assert precious.read_text() == "precious"
        assert precious.stat().st_uid == 0
    victim = subprocess.Popen(["sleep", "77"], start_new_session=True)

    try:
        # Delay the real report, so that the false one comes first.
        workers.type("poco", "trap 'sleep 0.3' DEBUG", "Enter")
        call = workers.start_exec("echo $PPID; sleep 76.5", timeout=0.3)
        found = eventually(
            lambda: [path for path in folder.glob("*.go") if "76.5" in path.read_text()]
        )
        token = re.findall(r'"(\w{16}) start', found[0].read_text())[0]
        (folder / "status").write_text(f"{token} start {victim.pid}\n")
        assert call.result()["ended"] in ("timeout", "lost")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.slow
def test_a_command_whose_report_is_stolen_is_lost(proxy: Proxy, agent: str) -> None:
    token = r"$(grep -o '[0-9a-f]\{16\} exit' $(grep -lx $$ *.pid | sed s/pid/go/) | head -n 1 | cut -c1-16)"
    command = RUNS.format(socket=proxy.socket) + f"echo {token} back 0 >status; sleep 78.5"
    answer = proxy.exec(command, agent_name=agent, timeout=20)
    assert answer["ended"] == "lost"
    assert "did not report" in answer["error"]
    assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"
    wait_until_gone("sleep\x0078.5")


@pytest.mark.slow
def test_a_server_stops_even_with_strange_files_among_its_own(own: StartServer) -> None:
    server = own()
    deep = "import os\nfor _ in range(1200):\n os.mkdir('d')\n os.chdir('d')"
    server.exec(RUNS.format(socket=server.socket) + f'{sys.executable} -c "{deep}"')
    try:
        assert server.stop() == 0
    finally:
        subprocess.run(["rm", "-rf", f"{server.socket}.d"], check=True)


@pytest.mark.slow
def test_runs_leave_no_files_and_no_descriptors(own: StartServer) -> None:
    server = own()
    for cmd in ("true", "cat", "exit 3", "kill -9 $$"):
        server.exec(cmd, stdin="x")
    server.exec("sleep 9", timeout=0.1)
    server.post({"cmd": "true", "cwd": "nowhere"})
    # Files of up to three names are kept.
    eventually(lambda: len(list(server.run_folder.rglob("*"))) <= 13)
    before = server.descriptors()
    for number in range(50):
        server.exec(f"exit {number}", stdin="x" * number)
    eventually(lambda: server.descriptors() <= before)
    # Files of up to three names are kept.
    eventually(lambda: len(list(server.run_folder.rglob("*"))) <= 13)
    server.stop()
    assert list(server.run_folder.rglob("*")) == []


@pytest.mark.slow
def test_without_space_a_run_is_refused_with_its_place_and_leaves_nothing(
    warm: StartServer,
) -> None:
    server = warm()
    files = f"{server.socket}.d"

    for pid, shell in (
        (server.process.pid, False),
        (int(server.panes("poco")[0].split()[1]), True),
    ):
        if shell:
            server.type("poco", "trap '' XFSZ", "Enter")
            eventually(lambda: "XFSZ" in server.screen("poco"))
        with limited(pid, resource.RLIMIT_FSIZE, 0):
            began = time.monotonic()
            status, answer = server.post({"cmd": "true"})
            assert status == 503, answer
            assert files in answer["error"], answer
            assert time.monotonic() - began < 5, answer
            assert server.status("GET", "/health") == 200

        assert server.exec("echo ok")["stdout"] == "ok\n"
        # Files of up to two names are kept.
        assert len(list(pathlib.Path(files).rglob("*"))) <= 10, os.listdir(files)


@pytest.mark.slow
def test_without_descriptors_new_runs_are_refused_and_others_continue(
    warm: StartServer,
) -> None:
    server = warm()
    kept = server.connect()
    panes = server.panes("poco")
    kept.request("GET", "/health")
    assert kept.getresponse().read() == b"ok"

    running = server.start_exec("sleep 0.8; echo done")
    ends = server.start_exec(
        "trap '' TERM; sleep 9 & wait; sleep 9", agent_name="other", timeout=0.6
    )
    eventually(lambda: processes_with("sleep\x000.8") and processes_with("sleep\x009"))
    used = server.descriptors()

    def refused() -> None:
        kept.request("POST", "/exec", '{"cmd": "true"}', {"Content-Type": "application/json"})
        answer = kept.getresponse()
        assert answer.status == 503
        assert "Too many open files" in answer.read().decode()

    with limited(server.process, resource.RLIMIT_NOFILE, used):
        refused()
        with limited(server.process, resource.RLIMIT_NOFILE, 1):
            refused()
            time.sleep(0.6)
    assert running.result()["stdout"] == "done\n"
    assert ends.result()["ended"] == "timeout"
    assert server.exec("echo ok")["stdout"] == "ok\n"
    assert server.panes("poco")[:1] == panes
    wait_until_gone("sleep\x009")

    kept.close()


@pytest.mark.slow
def test_a_run_whose_files_cannot_be_removed_does_not_block_the_next(
    warm: StartServer,
) -> None:
    server = warm()
    running = server.start_exec("sleep 0.5; echo done")
    pid = eventually(lambda: [*server.run_folder.glob("*/*.pid")])[0]
    folder = pid.parent

    # Nothing can be removed from such a directory.
    if (
        not shutil.which("chattr")
        or subprocess.run(["chattr", "+a", folder], capture_output=True).returncode
    ):
        pytest.skip("needs a file system and a user that can `chattr +a`")

    try:
        assert running.result()["stdout"] == "done\n"
        assert server.exec("echo next")["stdout"] == "next\n"
        assert pid.exists()
    finally:
        subprocess.run(["chattr", "-a", folder], check=True)

    assert server.exec("echo ok")["stdout"] == "ok\n"


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_created_leaves_no_descriptor(
    warm: StartServer,
) -> None:
    server = warm()
    kept = server.connect()
    kept.request("GET", "/health")
    kept.getresponse().read()
    used = server.descriptors()

    for free in range(-4, 4):
        shutil.rmtree(f"{server.socket}.d", ignore_errors=True)
        with limited(server.process, resource.RLIMIT_NOFILE, used + free):
            kept.request("POST", "/exec", '{"cmd": "true"}', {"Content-Type": "application/json"})
            assert kept.getresponse().read()

    kept.close()
    assert server.exec("echo ok")["stdout"] == "ok\n"

    eventually(lambda: server.descriptors() <= used)


@pytest.mark.slow
def test_commands_survive_a_killed_server_and_the_next_one_drains_them(
    own: StartServer,
) -> None:
    server = own()
    done = f"{server.folder}/done"
    server.exec("true")
    call = server.start_exec(f"sleep 0.5; head -c 3000000 /dev/zero; echo $? > {done}; sleep 0.2")
    wait_until_running("sleep\x000.5")
    server.stop(signal.SIGKILL)
    with pytest.raises((http.client.HTTPException, OSError)):
        call.result()
    server.start()
    assert server.exec("echo next")["stdout"] == "next\n"

    eventually(lambda: os.path.exists(done) and pathlib.Path(done).read_text() == "0\n")
    eventually(lambda: len(os.listdir(f"{server.socket}.d")) == 1)


@pytest.mark.slow
def test_background_writers_pass_to_the_next_server_after_a_clean_stop(
    own: StartServer,
) -> None:
    server = own()
    done = f"{server.folder}/done"
    server.exec(f"(sleep 1; seq 100000; touch {done}) & true")
    assert server.stop() == 0
    server.start()
    eventually(lambda: os.path.exists(done))
    eventually(lambda: len(os.listdir(f"{server.socket}.d")) == 1)


@pytest.mark.slow
def test_a_stray_file_or_a_missing_folder_stops_no_command(warm: StartServer) -> None:
    server = warm()
    server.stop()
    pathlib.Path(f"{server.socket}.d/stray").touch()
    server.start()
    assert server.exec("echo ok")["stdout"] == "ok\n"

    tmux = server.tmux_pid()
    subprocess.run(["rm", "-rf", f"{server.folder}/tmux"], check=True)
    assert server.exec("echo still")["stdout"] == "still\n"

    # Its socket is gone, so only a signal can end it.
    os.kill(tmux, signal.SIGKILL)


@pytest.mark.parametrize("shell", ["bash --norc -i", "zsh -f", "dash", "ksh", "busybox ash"])
@pytest.mark.slow
def test_an_alias_for_the_typed_command_changes_nothing(warm: StartServer, shell: str) -> None:
    if shutil.which(shell.split()[0]) is None:
        pytest.skip(f"there is no {shell.split()[0]} here")
    server = warm()
    server.tmux("new-window", "-d", "-n", "mine:terminal", "--", *shell.split())
    server.type("mine", "alias .='echo alias'; echo is-$((1 + 1))", "Enter")
    eventually(lambda: "is-2" in server.screen("mine"))

    for _ in range(3):
        started = time.monotonic()
        answer = server.exec("echo $0", agent_name="mine", timeout=9)
        assert answer["stdout"] == "bash\n"
        assert time.monotonic() - started < 5


def test_the_typed_line_stays_out_of_the_history(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    proxy.type(agent, "echo mine", "Enter")
    eventually(lambda: "\nmine" in proxy.screen(agent))
    proxy.exec("true", agent_name=agent)
    proxy.type(agent, "Up")
    eventually(lambda: proxy.screen(agent).rstrip().endswith("$ echo mine"))


def test_reports_of_runs_are_read_the_same_however_they_are_cut(tmp_path: pathlib.Path) -> None:
    dice = random.Random(7)
    reports: list[tuple[str, int]] = []

    async def check() -> None:
        folder = pp.RunFolder(f"{tmp_path}/s.d")
        files = folder.open(lambda word, number: reports.append((word, number)), pp.ignore)
        name = files.token.encode()
        fd = os.open(folder.status_path, os.O_WRONLY)

        for _ in range(100 * FUZZ):
            wrote = b""
            expected = []
            for _ in range(dice.randrange(8)):
                word = dice.choice(["start", "exit", "back"])
                number = dice.randrange(10**9)
                if dice.random() < 0.5:
                    wrote += b"%s %s %d\n" % (name, word.encode(), number)
                    expected.append((word, number))
                else:
                    noise = (
                        b"",
                        b"other exit 0",
                        name + b" exit",
                        name + b" exit x",
                        name + b" exit 1 2",
                        dice.randbytes(9),
                    )
                    wrote += dice.choice(noise).replace(b"\n", b"") + b"\n"

            for pieces in cuts(dice, wrote):
                reports.clear()
                for piece in filter(None, pieces):
                    os.write(fd, piece)
                    folder.on_status()
                assert reports == expected, pieces

        os.close(fd)
        folder.close()

    asyncio.run(check())


# ==========================================================================
# Terminals
# ==========================================================================
def test_two_agents_do_not_wait_for_each_other(proxy: Proxy, agent: str) -> None:
    go = pathlib.Path(proxy.folder, f"{agent}.go")
    slow = proxy.start_exec(f"until [ -e {go} ]; do sleep 0.05; done; echo slow", agent_name=agent)
    assert proxy.exec("echo quick", agent_name=f"{agent}b")["stdout"] == "quick\n"
    assert not slow.future.done()
    go.touch()
    assert slow.result()["stdout"] == "slow\n"


def test_commands_run_in_up_to_four_panes_while_others_are_busy(proxy: Proxy, agent: str) -> None:
    gate = f"{proxy.folder}/{agent}"
    calls = [
        proxy.start_exec(
            f"until [ -e {gate} ]; do sleep 0.02; done; tty </dev/tty", agent_name=agent
        )
        for _ in range(6)
    ]
    eventually(lambda: len(proxy.panes(agent)) == 4)
    time.sleep(0.3)
    assert len(proxy.panes(agent)) == 4

    pathlib.Path(gate).touch()
    answers = [call.result() for call in calls]
    assert {answer["exit_code"] for answer in answers} == {0}
    assert len({answer["stdout"] for answer in answers}) <= 4
    assert proxy.exec("echo x", agent_name=agent)["stdout"] == "x\n"


def test_queued_commands_run_in_order(warm: StartServer) -> None:
    server = warm()
    gate = f"{server.folder}/gate"
    order = f"{server.folder}/order"
    running = [server.start_exec(f"until [ -e {gate} ]; do sleep 0.05; done") for _ in range(4)]
    eventually(lambda: len(processes_with("until [ -e")) >= 4)
    queued = []
    for number in range(80):
        queued.append(server.start_exec(f"flock {order} -c 'echo {number} >> {order}'"))
        time.sleep(0.01)

    assert server.exec("echo other", agent_name="other")["stdout"] == "other\n"
    pathlib.Path(gate).touch()
    assert {call.result()["exit_code"] for call in [*running, *queued]} == {0}

    got = [int(line) for line in pathlib.Path(order).read_text().split()]
    # Four run at a time, and one that is slow to write may be overtaken some times.
    # In no order it were by 40.
    assert max(abs(place - number) for place, number in enumerate(got)) <= 16


@pytest.mark.slow
def test_a_thousand_commands_may_wait_and_the_next_gets_503(warm: StartServer) -> None:
    server = warm()
    gate = f"{server.folder}/gate"
    running = [server.start_exec(f"until [ -e {gate} ]; do sleep 0.05; done") for _ in range(4)]
    eventually(lambda: len(processes_with("until [ -e")) >= 4)
    queued = []
    for number in range(1000):
        connection = server.connect()
        connection.request("POST", "/exec", json.dumps({"cmd": f"exit {number % 99}"}), JSON_TYPE)
        queued.append(connection)

    eventually(lambda: server.post({"cmd": "true"})[0] == 503)
    status, answer = server.post({"cmd": "true"})
    assert status == 503
    assert answer["exit_code"] == 125
    assert "1000" in answer["error"]

    pathlib.Path(gate).touch()
    assert {call.result()["exit_code"] for call in running} == {0}
    got = []
    for connection in queued:
        got.append(json.loads(connection.getresponse().read())["exit_code"])
        connection.close()

    assert got == [number % 99 for number in range(1000)]


def test_an_existing_terminal_is_used_as_it_is(warm: StartServer) -> None:
    server = warm()
    server.tmux(
        "new-window", "-d", "-n", "mine:terminal", "-e", "MINE=1", "--", "/bin/bash", "--norc", "-i"
    )
    pane = eventually(lambda: server.panes("mine"))
    assert server.exec("echo $MINE", agent_name="mine")["stdout"] == "1\n"
    assert server.panes("mine") == pane


@pytest.mark.parametrize(
    "shell",
    [
        "/bin/sh -i",
        "dash -i",
        "zsh -f -i",
        "busybox ash -i",
        "bash --norc -o vi -i",
        "bash -c 'exec bash --norc -i'",
    ],
)
@pytest.mark.slow
def test_any_posix_shell_works_in_the_pane(warm: StartServer, shell: str) -> None:
    if shutil.which(shell.split()[0]) is None:
        # This machine lacks the shell.
        return
    server = warm()
    server.tmux(
        "new-window",
        "-d",
        "-n",
        "mine:terminal",
        "--",
        *shell.split(" ", 2)[:2],
        *(["exec bash --norc -i"] if "exec" in shell else shell.split()[2:]),
    )

    for cmd, output, code in [
        ("echo $BASH_VERSION | head -c 1; exit 3", "5", 3),
        ("kill -INT $$", "", 130),
        ("pwd", f"{server.workspace}\n", 0),
    ]:
        answer = server.exec(cmd, agent_name="mine")
        assert answer["stdout"] == output
        assert answer["exit_code"] == code

    # Two on a slow machine.
    assert len(server.panes("mine")) <= 2, server.screen("mine") + server.logged()


def test_nothing_is_typed_into_a_program_that_a_person_runs(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    typed = f"{proxy.folder}/{agent}"
    proxy.type(agent, f"cat > {typed}", "Enter")
    eventually(lambda: os.path.exists(typed))
    assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"
    assert len(proxy.panes(agent)) == 2
    proxy.type(agent, "mine", "Enter", "C-d")
    eventually(lambda: pathlib.Path(typed).read_text() == "mine\n")


@pytest.mark.slow
def test_nothing_is_typed_into_a_script_or_a_builtin_that_reads(warm: StartServer) -> None:
    server = warm()
    server.tmux(
        "new-window",
        "-d",
        "-n",
        "a:terminal",
        "--",
        "bash",
        "-c",
        'while read -r x; do echo "got $x"; done',
    )
    server.tmux("new-window", "-d", "-n", "b:terminal", "--", "bash", "--norc", "-i")
    eventually(lambda: "bash" in server.screen("b"))
    server.exec("true", agent_name="b")
    server.type("b", 'read -r x; echo "got $x"', "Enter")
    for agent in ("a", "b"):
        assert server.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"
        assert len(server.panes(agent)) == 2
        assert not re.search(r"^got", server.screen(agent), re.M)


def test_copy_mode_is_left_alone(proxy: Proxy, agent: str) -> None:
    proxy.exec("seq 100", agent_name=agent)
    pane = proxy.pane(agent)
    proxy.tmux("copy-mode", "-t", pane)
    assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"
    assert proxy.tmux("display-message", "-p", "-t", pane, "#{pane_in_mode}") == "1"
    proxy.tmux("copy-mode", "-q", "-t", pane)


@pytest.mark.slow
def test_copy_mode_in_every_pane_is_left_rather_than_waited_for(proxy: Proxy, agent: str) -> None:
    calls = [proxy.start_exec("sleep 0.4", agent_name=agent) for _ in range(4)]
    assert [call.result()["exit_code"] for call in calls] == [0] * 4
    for pane in proxy.panes(agent):
        proxy.tmux("copy-mode", "-t", pane.split()[0])
    assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"


@pytest.mark.parametrize("shell", ["bash --norc -i", "bash --norc -i -o vi", "dash -i"])
@pytest.mark.parametrize(
    "enter", [[], pytest.param(["Enter"], marks=pytest.mark.slow)], ids=["half", "whole"]
)
@pytest.mark.slow
def test_text_typed_during_a_command_stays_out_of_the_next_one(
    proxy: Proxy, agent: str, shell: str, enter: list[str]
) -> None:
    proxy.exec("true")
    proxy.tmux("new-window", "-d", "-n", f"{agent}:terminal", "--", *shell.split())
    proxy.exec("true", agent_name=agent)

    def type_during_a_command(number: int) -> None:
        typed = f"{proxy.folder}/{agent}.{number}"
        asked = f"{proxy.folder}/{agent}.asked.{number}"
        call = proxy.start_exec(f"until [ -e {asked} ]; do sleep 0.01; done", agent_name=agent)
        wait_until_running(f"until [ -e {asked} ]")
        proxy.type(agent, "-l", f"echo >>{typed} one")
        if enter:
            proxy.type(agent, *enter)
        eventually(lambda: typed in proxy.screen(agent))
        pathlib.Path(asked).touch()
        call.result()
        assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"

        # Anyone at a terminal may press Enter.
        if enter:
            eventually(lambda: os.path.exists(typed))
            assert pathlib.Path(typed).read_text() == "one\n"

        assert os.path.exists(typed) == bool(enter)

    for number in range(3):
        type_during_a_command(number)


def test_a_half_typed_line_is_cleared_and_can_be_brought_back(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    # No person is quicker.
    time.sleep(0.3)
    proxy.type(agent, "-l", "echo half 'typed")
    eventually(lambda: "half" in proxy.screen(agent))
    assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"
    proxy.type(agent, "C-y")
    eventually(lambda: proxy.screen(agent).rstrip().endswith("echo half 'typed"))


PENDING = [
    "echo 'open",
    "cat <<X",
    "for x in 1 2; do",
    "echo \\",
    "touch {f} &&",
    "touch {f} ||",
    "touch {f} |",
    "touch {f} \\",
]


@pytest.mark.parametrize("wait", [0, 0.3], ids=["at-once", "after-0.3-s"])
@pytest.mark.slow
def test_a_continuation_prompt_is_left_and_nothing_of_it_runs(
    proxy: Proxy, agent: str, wait: float
) -> None:
    def leave(number: int) -> None:
        name = f"{agent}-{number}"
        file = f"{proxy.folder}/{agent}-{number}"
        proxy.exec("true", agent_name=name)
        time.sleep(0.2 + wait)
        proxy.type(name, PENDING[number].format(f=file), "Enter")
        eventually(lambda: proxy.screen(name).rstrip().endswith(">"))
        time.sleep(wait)
        started = time.monotonic()
        assert proxy.exec("echo ok", agent_name=name)["stdout"] == "ok\n"
        assert time.monotonic() - started < 10
        assert len(proxy.panes(name)) == 1
        assert not os.path.exists(file)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(len(PENDING))))


def test_a_program_in_a_synchronized_pane_gets_nothing(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    proxy.tmux("split-window", "-d", "-t", proxy.pane(agent), f"cat > {proxy.folder}/{agent}")
    eventually(lambda: os.path.exists(f"{proxy.folder}/{agent}"))
    pane = proxy.pane(agent)
    proxy.exec("true", agent_name=agent)
    # This comes just before the prompt is recorded.
    proxy.tmux("set-option", "-w", "-t", pane, "synchronize-panes", "on")
    time.sleep(0.2)
    for number in range(3):
        answer = proxy.exec(f"echo {number}", agent_name=agent, timeout=2)
        assert answer["stdout"] == f"{number}\n"
        assert answer["exit_code"] == 0

    assert pathlib.Path(proxy.folder, agent).read_text() == ""


SETTINGS = ["set -e", "set -x", "set -ex", "set -u", "cd() { false; }", "export() { false; }"]
SETTINGS += ["exec() { :; }", "echo() { command echo mine; }"]


@pytest.mark.parametrize("typed", SETTINGS)
@pytest.mark.slow
def test_shell_options_set_by_a_person_change_no_answer(
    proxy: Proxy, agent: str, typed: str
) -> None:
    proxy.exec("true", agent_name=agent)
    time.sleep(0.2)
    proxy.type(agent, typed, "Enter")
    time.sleep(0.2)

    for code in (0, 55):
        answer = proxy.exec(f"echo {code}; exit {code}", agent_name=agent, env={"SECRET": "s3cret"})
        assert answer["stdout"] == f"{code}\n"
        assert answer["exit_code"] == code
        assert answer["ended"] == "exit"

    assert len(proxy.panes(agent)) == 1


KEYS = [
    ["C-r", "x"],
    ["Escape"],
    ["set -o vi", "Enter", "abc", "Escape"],
    ["C-v"],
    ["M-5"],
    ["C-x"],
]


@pytest.mark.slow
def test_the_next_command_runs_in_any_state_of_the_line_editor(proxy: Proxy, agent: str) -> None:
    def interrupt(number: int) -> None:
        name = f"{agent}-{number}"
        proxy.exec("true", agent_name=name)
        proxy.type(name, *KEYS[number])
        started = time.monotonic()
        assert proxy.exec("echo ok", agent_name=name)["stdout"] == "ok\n"
        assert time.monotonic() - started < 10

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(interrupt, range(len(KEYS))))


@pytest.mark.slow
def test_a_shell_that_never_answers_is_replaced(warm: StartServer) -> None:
    server = warm()
    server.tmux("new-window", "-d", "-n", "deaf:terminal", "--", "bash", "--norc", "-i")
    eventually(lambda: "bash" in server.screen("deaf"))
    server.exec("true", agent_name="deaf")
    server.type("deaf", ".() { :; }; trap '' INT", "Enter")
    time.sleep(0.2)
    started = time.monotonic()
    assert server.exec("echo ok", agent_name="deaf")["stdout"] == "ok\n"
    assert time.monotonic() - started < 10
    assert len(server.panes("deaf")) == 2


@pytest.mark.slow
def test_a_slow_start_up_file_delays_the_first_command(warm: StartServer) -> None:
    server = warm()
    pathlib.Path(server.folder, "home/.bashrc").write_text("sleep 1.5\nexport FROM_RC=1\n")
    assert server.exec("echo $FROM_RC", agent_name="slow")["stdout"] == "1\n"
    assert ".go" not in server.screen("slow")


@pytest.mark.slow
def test_a_new_shell_that_takes_single_keys_is_not_interrupted_before_it_waits_for_one(
    own: StartServer,
) -> None:
    server = own()
    # It never waits for a child of its own: it works all the time.
    pathlib.Path(server.folder, "home/.bashrc").write_text(
        "set_mode() { { stty $1 </dev/tty; touch $2; } & until [ -e $2 ]; do :; done; }\n"
        f"set_mode -icanon {server.folder}/single-keys\n"
        "for ((n = 0; n < 200000; n++)); do :; done\n"
        f"set_mode icanon {server.folder}/lines\n"
        "FROM_RC=1\n"
    )
    call(server, "send_keys", text="echo from $FROM_RC", keys=["Enter"])
    eventually(lambda: re.search(r"^from \d*$", server.screen("poco"), re.M))
    assert "\nfrom 1\n" in server.screen("poco")


@pytest.mark.slow
def test_keys_reach_the_prompts_of_new_shells_on_a_busy_machine(warm: StartServer) -> None:
    server = warm()

    def shown(number: int) -> str:
        agent = f"busy{number}"
        text = f"echo $(({number} + 1000))"
        call(server, "send_keys", agent_name=agent, text=text, keys=["Enter"])
        lines = eventually(lambda: re.findall(r"(?m)^1\d{3}$|^bash: .*$", server.screen(agent)))
        return str(lines[0])

    with contextlib.ExitStack() as stack:
        for _ in range(2 * (os.cpu_count() or 1)):
            loop = subprocess.Popen(["bash", "-c", "while :; do :; done"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        with ThreadPoolExecutor(6) as pool:
            lines = list(pool.map(shown, range(100)))
    assert lines == [str(number + 1000) for number in range(100)]


def type_early(server: Proxy, window: str, text: str) -> None:
    """Type while the shell of a new window reads its start-up files."""
    eventually(lambda: os.path.exists(server.socket))
    eventually(lambda: server.panes(window))
    time.sleep(0.3)
    server.tmux("send-keys", "-t", server.panes(window)[-1].split()[0], "-l", text)


@pytest.mark.parametrize("where", ["first-window", "new-agent", "second-pane"])
@pytest.mark.slow
def test_keys_typed_while_a_new_shell_starts_are_never_run(own: StartServer, where: str) -> None:
    server = own()
    rc = pathlib.Path(server.folder, "home/.bashrc")
    precious = pathlib.Path(server.folder, "precious")
    precious.touch()
    agent = "poco"

    if where == "new-agent":
        server.exec("true")
        agent = "other"
    elif where == "second-pane":
        busy = server.start_exec("sleep 4")
        wait_until_running("sleep\x004\x00")

    rc.write_text("sleep 1; PS1='$ '\n")
    running = server.start_exec("echo ok", agent_name=agent)
    if where == "second-pane":
        eventually(lambda: len(server.panes(agent)) == 2)
    type_early(server, agent, f"rm -f {precious} ;")
    answer = running.result()
    assert answer["stdout"] == "ok\n"
    assert answer["waited_ms"] + answer["duration_ms"] < 4000
    assert precious.exists()

    if where == "second-pane":
        busy.result()


UNFINISHED = [
    pytest.param("touch {file} &&", id="and"),
    pytest.param("touch {file} |", id="pipe"),
    pytest.param("touch {file} \\", id="backslash"),
    pytest.param("echo 'open", id="quote"),
    pytest.param("cat <<X", id="here-document"),
    pytest.param("if true; then", id="keyword"),
]


@pytest.mark.parametrize("typed", with_slow(UNFINISHED, "and"))
def test_an_unfinished_command_typed_while_a_new_shell_starts_is_never_run(
    own: StartServer, typed: str
) -> None:
    server = own()
    file = pathlib.Path(server.folder, "ran")
    pathlib.Path(server.folder, "home/.bashrc").write_text("sleep 0.6; PS1='$ '\n")
    running = server.start_exec("echo ok")
    type_early(server, "poco", typed.format(file=file) + "\n")
    answer = running.result()
    assert answer["stdout"] == "ok\n"
    assert answer["waited_ms"] + answer["duration_ms"] < 4000
    assert not file.exists()


def test_a_new_terminal_shows_the_first_command_behind_its_prompt(own: StartServer) -> None:
    server = own()
    server.exec("echo out")
    eventually(lambda: server.screen("poco").rstrip().endswith("$"))
    assert server.screen("poco").split("\n")[0].rstrip() == "$ echo out"


@pytest.mark.slow
def test_a_program_that_asks_on_its_terminal_shows_in_the_answer_of_a_timeout(
    proxy: Proxy, agent: str
) -> None:
    ask = "echo out; sleep 0.1; read -p 'Continue connecting (yes/no)? ' x </dev/tty 2>/dev/tty"
    answer = proxy.exec(ask, agent_name=agent, timeout=0.5)
    assert answer["ended"] == "timeout"
    assert answer["terminal"] == "Continue connecting (yes/no)?"


@pytest.mark.slow
def test_a_question_asked_at_once_stays_on_the_terminal(proxy: Proxy, agent: str) -> None:
    ask = "printf 'Go on? ' >/dev/tty; read -r a </dev/tty"
    proxy.exec("true", agent_name=agent)
    asked = [proxy.exec(ask, agent_name=agent, timeout=0.1) for _ in range(8)]
    assert [answer.get("terminal") for answer in asked] == ["Go on?"] * 8


QUIET_TIMEOUTS = {
    "nothing was written": "sleep 60",
    "the last line is output": "echo out; sleep 60",
    "no newline": "printf half; sleep 60",
    "tabs and colours": "printf 'a\\tb\\033[31mred\\033[0m c'; sleep 60",
    "a command of two lines": "true\nsleep 60",
}


@pytest.mark.parametrize("cmd", QUIET_TIMEOUTS.values(), ids=QUIET_TIMEOUTS)
@pytest.mark.slow
def test_output_and_the_command_are_not_taken_for_a_question(
    proxy: Proxy, agent: str, cmd: str
) -> None:
    answer = proxy.exec(cmd, agent_name=agent, timeout=0.3)
    assert answer["ended"] == "timeout"
    assert "terminal" not in answer


def test_a_person_can_answer_a_question_and_interrupt(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    asked = proxy.start_exec(
        "read -rsp 'Password: ' x </dev/tty 2>/dev/tty; echo \"got $x\"", agent_name=agent
    )
    eventually(lambda: "Password:" in proxy.screen(agent))
    proxy.type(agent, "secret", "Enter")
    assert asked.result()["stdout"] == "got secret\n"

    slow = proxy.start_exec("echo go; sleep 60", agent_name=agent)
    eventually(lambda: "\ngo" in proxy.screen(agent))
    proxy.type(agent, "C-c")
    assert slow.result()["exit_code"] == 130
    assert proxy.exec("echo next", agent_name=agent)["stdout"] == "next\n"


@pytest.mark.parametrize(
    "death",
    with_slow([pytest.param(death, id=death) for death in DEATHS], "shell", "server killed"),
)
def test_a_terminal_that_dies_loses_its_command_and_is_replaced(
    warm: StartServer, death: str
) -> None:
    server = warm()
    call = server.start_exec(
        "echo before; (trap '' HUP TERM; sleep 62.5) & setsid sleep 62.6 & sleep 62.7"
    )
    eventually(lambda: len(processes_with("sleep\x0062.")) >= 3)
    pane = server.pane("poco")
    started = time.monotonic()
    subprocess.run(
        ["bash", "-c", DEATHS[death].format(socket=server.socket, pane=pane)],
        check=True,
        env=server.env,
    )
    answer = call.result()
    assert time.monotonic() - started < 10
    assert answer["ended"] == "lost"
    assert answer["exit_code"] == 137
    assert answer["stdout"] == "before\n"
    assert re.match(LOST, answer["error"])
    wait_until_gone("sleep\x0062.")

    started = time.monotonic()
    assert server.exec("echo next")["stdout"] == "next\n"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.slow
def test_an_idle_terminal_that_died_is_replaced(warm: StartServer, death: str) -> None:
    server = warm()
    subprocess.run(
        ["bash", "-c", DEATHS[death].format(socket=server.socket, pane=server.pane("poco"))],
        check=True,
        env=server.env,
    )
    started = time.monotonic()
    assert server.exec("echo next")["stdout"] == "next\n"
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_dead_pane_that_remains_is_started_again(warm: StartServer) -> None:
    server = warm()
    server.tmux("set-option", "-g", "remain-on-exit", "on")
    assert server.exec("kill -9 $PPID; sleep 60")["ended"] == "lost"
    eventually(lambda: server.tmux("list-panes", "-F", "#{pane_dead}") == "1")
    assert server.exec("echo next")["stdout"] == "next\n"
    assert len(server.panes("poco")) == 1


def test_a_renamed_window_no_longer_belongs_to_the_agent(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    proxy.tmux("rename-window", "-t", proxy.pane(agent), f"{agent}-old")
    assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"
    assert len(proxy.panes(agent)) == 1
    proxy.tmux("kill-window", "-t", f"={agent}-old")


def test_a_program_that_sets_titles_does_not_rename_the_window(proxy: Proxy, agent: str) -> None:
    proxy.exec("printf '\\033k%s\\033\\\\' evil >/dev/tty; sleep 0.1", agent_name=agent)
    assert len(proxy.panes(agent)) == 1


def test_two_servers_on_one_socket_share_it(own: StartServer) -> None:
    first = own()
    second = Proxy(folder=first.folder)
    try:
        calls = [
            server.start_exec(f"sleep 0.05; echo {name} {n}")
            for n in range(8)
            for name, server in (("a", first), ("b", second))
        ]
        got = [call.result()["stdout"] for call in calls]
        assert got == [f"{name} {n}\n" for n in range(8) for name in "ab"]
    finally:
        second.stop()


def test_a_pane_held_by_another_driver_is_left_alone(proxy: Proxy, agent: str) -> None:
    first = proxy.exec("echo $PPID", agent_name=agent)["stdout"]
    tty = proxy.tmux("display-message", "-p", "-t", proxy.pane(agent), "#{pane_tty}")
    held = os.open(tty, os.O_RDONLY | os.O_NOCTTY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert proxy.exec("echo $PPID", agent_name=agent)["stdout"] != first
    finally:
        os.close(held)
    assert proxy.exec("echo $PPID", agent_name=agent)["stdout"] == first


# ==========================================================================
# Run list
# ==========================================================================
def test_the_list_has_every_run_whatever_its_door_newest_first(
    own: StartServer, names: str
) -> None:
    server = own()
    server.exec("echo one", usage_id="u1")
    list(server.stream("echo two", session_id="s1"))
    Caller(server, names).run("-c", "echo three")
    call(server, "exec", cmd="echo four; exit 4", agent_name="alice")

    runs = server.runs()
    assert [run["door"] for run in runs] == ["mcp", "shell", "stream", "exec"]
    assert [run["cmd"] for run in runs] == [
        "echo four; exit 4",
        "echo three",
        "echo two",
        "echo one",
    ]
    assert [server.output(run["run_id"]) for run in runs] == [
        b"four\n",
        b"three\n",
        b"two\n",
        b"one\n",
    ]
    assert {run["state"] for run in runs} == {"ended"}
    assert [run["exit_code"] for run in runs] == [4, 0, 0, 0]
    assert server.run(runs[0]["run_id"]) == runs[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", runs[0]["started"])

    assert [run["cmd"] for run in server.runs(agent_name="alice")] == ["echo four; exit 4"]
    assert [run["cmd"] for run in server.runs(session_id="s1")] == ["echo two"]
    assert [run["cmd"] for run in server.runs(usage_id="u1")] == ["echo one"]
    assert server.runs(state="running") == []
    assert [run["door"] for run in server.runs(limit=2)] == ["mcp", "shell"]
    assert [run["door"] for run in server.runs(before=runs[1]["run_id"])] == ["stream", "exec"]
    assert server.runs(limit=0) == []


def test_a_run_waits_runs_and_ends(proxy: Proxy, agent: str) -> None:
    first = [proxy.start_exec("read x </dev/tty", agent_name=agent) for _ in range(pp.MAX_PANES)]
    eventually(lambda: len(proxy.runs(agent_name=agent, state="running")) == pp.MAX_PANES)
    last = proxy.start_exec("echo last", agent_name=agent)
    (waiting,) = eventually(lambda: proxy.runs(agent_name=agent, state="waiting"))
    assert waiting["started"] is None
    assert "exit_code" not in waiting
    assert waiting["running"] is True

    for run in proxy.runs(agent_name=agent, state="running"):
        proxy.request("DELETE", f"/runs/{run['run_id']}")
    assert {each.result()["ended"] for each in first} == {"cancelled"}
    assert last.result()["stdout"] == "last\n"
    assert proxy.run(waiting["run_id"])["state"] == "ended"


def test_the_newest_thousand_runs_are_remembered(tmp_path: pathlib.Path) -> None:
    shelf = pp.Shelf(f"{tmp_path}/runs", 64 * pp.MIB, "s")
    runs = pp.RunList(shelf)
    request = pp.ExecRequest("true")
    made = []
    for number in range(pp.MAX_RUNS + 10):
        run = runs.open(request, "exec")
        made.append(run.run_id)
        runs.started(run)
        run.record.add(b"x" * 100)
        # The third one never ends.
        if number != 2:
            result = pp.CommandResult("", 0, output_bytes=100, run_id=run.run_id)
            runs.end(run, result)
            runs.complete(run)
            runs.answered(run)

    assert list(runs.runs) == [made[2], *made[11:]]
    assert shelf.used == 100 * pp.MAX_RUNS
    with pytest.raises(pp.NoSuchRun):
        runs.find(made[0])


def test_a_long_command_is_cut_in_the_list_between_characters(proxy: Proxy, agent: str) -> None:
    proxy.exec("true #" + "é" * 5000, agent_name=agent)
    (run,) = proxy.runs(agent_name=agent)
    assert len(run["cmd"].encode()) == pp.MAX_LISTED_COMMAND
    assert run["cmd"].endswith("é")


def test_a_refused_command_is_no_run(proxy: Proxy, agent: str) -> None:
    assert proxy.post({"cmd": "true", "agent_name": agent, "timeout": 0})[0] == 400
    assert proxy.runs(agent_name=agent) == []


# ==========================================================================
# Runs
# ==========================================================================

# What bash -c does, the sandbox does.
ALIKE = [
    pytest.param("echo hi; exit 3", id="output-and-status"),
    pytest.param("printf 'no newline'", id="no-newline"),
    pytest.param("printf 'a\\n\\n\\nb\\n\\n'", id="blank-lines-at-the-end"),
    pytest.param("echo out; echo err >&2; echo out", id="out-and-err-in-turn"),
    pytest.param("true", id="true"),
    pytest.param("false", id="false"),
    pytest.param("exit 255", id="exit-255"),
    pytest.param("nosuchcommand", id="no-such-command"),
    pytest.param("if then", id="syntax-error"),
    pytest.param("kill -KILL $$", id="killed"),
    pytest.param("kill -TERM $$", id="terminated"),
    pytest.param("kill -INT $$", id="interrupted"),
    pytest.param("kill -HUP $$; sleep 1", id="hung-up"),
    pytest.param("(exit 139); echo $?", id="status-139"),
    pytest.param("cat", id="empty-stdin"),
    pytest.param("cat | wc -c", id="empty-stdin-counted"),
    pytest.param('read x; echo "$? [$x]"', id="empty-stdin-read"),
    pytest.param('echo $0 $# "$@"', id="name-and-arguments"),
    pytest.param("echo $-", id="flags"),
    pytest.param("shopt expand_aliases login_shell", id="shell-options"),
    pytest.param("ls /proc/$$/fd", id="descriptors"),
    pytest.param("[ -t 0 ] || [ -t 1 ] || [ -t 2 ] || echo no tty", id="no-terminal"),
    pytest.param("set -e; false; echo never", id="errexit"),
    pytest.param("trap 'echo bye' EXIT; exit 4", id="trap-exit"),
    pytest.param("cd /; pwd; export X=1; X=2; alias ls=echo; exit 1", id="nothing-stays"),
    pytest.param(
        "echo 'single' \"double $((1+1))\" `echo back` $(echo dollar) \\\\ \\$ '!' !x ~nobody # comment",
        id="quotes",
    ),
    pytest.param("cat <<'E'\nhere $x `y`\nE", id="here-document-quoted"),
    pytest.param("cat <<E\nlast line without newline\nE", id="here-document-without-newline"),
    pytest.param("echo a\\\nb; echo 'c\nd'", id="continued-lines"),
    pytest.param("printf '\\001\\002\\177\\033[31m\\r\\n\\200\\377'", id="binary-bytes"),
    pytest.param("echo é ü 漢字 🙂", id="unicode"),
    pytest.param(
        "x='\x01\x7f\x1b\r\t'; printf %s \"$x\" | od -c", id="control-characters-in-the-command"
    ),
    pytest.param("seq 1 5000", id="large-output"),
    pytest.param("head -c 300000 /dev/zero | tr '\\0' x", id="one-long-line"),
    pytest.param("sleep 0.05 & wait; echo $?", id="background-job"),
    pytest.param("echo $BASH_SUBSHELL $SHLVL >/dev/null; ulimit -n", id="limits-and-depth"),
    pytest.param("umask; bash -c 'exit 9'", id="umask-and-a-shell"),
    pytest.param("exec echo replaced", id="exec"),
    pytest.param(
        "kill -STOP $BASHPID & sleep 0.1; kill -CONT %1 2>/dev/null; echo done",
        id="stopped-and-continued",
    ),
    pytest.param("f() { return 7; }; f", id="function-status"),
    pytest.param("yes | head -3; echo ${PIPESTATUS[*]}", id="broken-pipe"),
    pytest.param("printf '%s\\n' {1..3}; [[ a == a* ]] && echo bash", id="braces-and-tests"),
    pytest.param('echo "$(yes x | head -c 140000 | wc -c)"', id="large-substitution"),
    pytest.param("#" + "x" * 200_000 + "\necho long", id="long-comment"),
    pytest.param("echo '" + "é'\"'" * 40_000 + "' | wc -c; exit 6", id="long-quoted-text"),
]


def write(proxy: Proxy, text: str) -> str:
    path = pathlib.Path(proxy.folder, "script")
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("cmd", ALIKE)
def test_a_command_behaves_as_with_bash_c(proxy: Proxy, agent: str, cmd: str) -> None:
    words = ["bash", "-c", cmd, "bash"]
    # Such a command is too long for an argument.
    if len(cmd) > 100_000:
        words[2:] = ['eval "$(cat "$1")"', "bash", write(proxy, cmd)]
    here = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=proxy.workspace,
        check=False,
    )
    there = proxy.exec(cmd, agent_name="alike")
    assert there["stdout"] == here.stdout.decode(errors="replace")
    assert there["exit_code"] == (
        here.returncode if here.returncode >= 0 else 128 - here.returncode
    )
    assert there["ended"] == "exit"
    assert there["truncated"] is False
    assert there.get("error") is None
    assert there["output_bytes"] == len(here.stdout)


def test_the_answer_has_every_field_of_the_contract(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec("sleep 0.1; exit 2", agent_name=agent)
    assert set(answer) == {
        "stdout",
        "exit_code",
        "ended",
        "truncated",
        "output_bytes",
        "duration_ms",
        "waited_ms",
        "run_id",
    }
    # It counts from the report of the start, which may come late.
    assert 50 <= answer["duration_ms"] < 5000
    assert answer["run_id"] != proxy.exec("true", agent_name=agent)["run_id"]


def test_nothing_of_a_command_reaches_the_next_one(proxy: Proxy, agent: str) -> None:
    proxy.exec(
        "cd /; export LEAK=1; alias true=false; set -e; trap 'echo x' EXIT; exit 1",
        agent_name=agent,
    )
    answer = proxy.exec('echo "${LEAK-none} $PWD"; true; echo $?', agent_name=agent)
    assert answer["stdout"] == f"none {proxy.workspace}\n0\n"


def test_commands_inherit_the_exports_of_the_pane_but_no_aliases_functions_or_descriptors(
    proxy: Proxy, agent: str
) -> None:
    proxy.exec("true", agent_name=agent)
    proxy.type(
        agent,
        "export SHARED=yes; alias ls=false cd=false; ls() { false; }; cd() { false; }; exec 5</etc/passwd",
        "Enter",
    )
    eventually(lambda: proxy.exec("echo $SHARED", agent_name=agent)["stdout"] == "yes\n")
    answer = proxy.exec(
        "ls -d /; type -t ls; ls /proc/self/fd | tr '\\n' ' '; pwd", agent_name=agent, cwd=""
    )
    assert answer["stdout"] == f"/\nfile\n0 1 2 3 {proxy.workspace}\n"
    assert len(proxy.panes(agent)) == 1


def test_a_command_that_looks_like_an_option_is_run_as_a_command(proxy: Proxy, agent: str) -> None:
    for cmd in ("-s", "-n; exit 127", "+x", "--version", "-" + " " * 200_000):
        answer = proxy.exec(cmd, stdin="echo not a command", agent_name=agent)
        assert answer["exit_code"] == 127
        assert "not found" in answer["stdout"]


def test_a_command_may_kill_its_own_shell_but_not_the_pane(proxy: Proxy, agent: str) -> None:
    before = proxy.exec("echo x", agent_name=agent) and proxy.panes(agent)
    assert proxy.exec("kill $$", agent_name=agent)["exit_code"] == 143
    assert proxy.panes(agent) == before


def test_variables_say_what_runs_and_keep_programs_from_waiting(proxy: Proxy, agent: str) -> None:
    names = "POCKETCODER_AGENT POCKETCODER_SESSION_ID POCKETCODER_USAGE_ID "
    names += "PAGER GIT_PAGER MANPAGER GIT_TERMINAL_PROMPT"
    show = f"for n in {names} DEBIAN_FRONTEND; do echo ${{!n}}; done; echo $POCKETCODER_RUN_ID"
    answer = proxy.exec(show, agent_name=agent, session_id="s 'x'", usage_id='u"$y')
    expected = [
        agent,
        "s 'x'",
        'u"$y',
        "cat",
        "cat",
        "cat",
        "0",
        "noninteractive",
        answer["run_id"],
    ]
    assert answer["stdout"].splitlines() == expected

    asked = {
        "PAGER": "less",
        "POCKETCODER_AGENT": "me",
        "odd.name": "v = 'w'\nx",
        "UID": "7",
        "EMPTY": "",
    }
    answer = proxy.exec(
        "env -0 | grep -zE '^(PAGER|POCKETCODER_AGENT|odd.name|EMPTY)=' | sort -z",
        agent_name=agent,
        env=asked,
    )
    assert answer["stdout"].split("\0")[:-1] == [
        "EMPTY=",
        "PAGER=less",
        f"POCKETCODER_AGENT={agent}",
        "odd.name=v = 'w'\nx",
    ]


ODD_DIRECTORIES = [
    "a b",
    "it's",
    'say "hi"',
    "$(touch evil)",
    "`x`",
    "a\nb",
    "-rf",
    "é漢",
    "*",
    "\\",
    "#{pane_id}",
]


@pytest.mark.parametrize("name", ODD_DIRECTORIES)
def test_a_directory_may_have_any_name(proxy: Proxy, name: str) -> None:
    path = pathlib.Path(proxy.workspace, "odd", name)
    path.mkdir(parents=True, exist_ok=True)
    for cwd in (f"odd/{name}", str(path)):
        assert proxy.exec("pwd", agent_name="odd", cwd=cwd)["stdout"] == f"{path}\n"
    assert not pathlib.Path(proxy.workspace, "evil").exists()


def test_a_directory_outside_the_workspace_is_refused_even_through_a_link(
    proxy: Proxy, agent: str
) -> None:
    os.symlink("/etc", f"{proxy.workspace}/link")
    os.symlink(proxy.workspace, f"{proxy.folder}/way")
    for cwd in ("link", "..", "/etc", f"{proxy.workspace}-other", "link/../.."):
        status, answer = proxy.post({"cmd": "pwd", "cwd": cwd, "agent_name": agent})
        assert status == 400, cwd
        assert "cwd" in answer["error"], cwd

    way = f"{proxy.folder}/way"
    assert proxy.exec("pwd", cwd=way, agent_name=agent)["stdout"] == f"{way}\n"
    assert proxy.exec("pwd -P", cwd=way, agent_name=agent)["stdout"] == f"{proxy.workspace}\n"

    pathlib.Path(proxy.workspace, "plain").touch()
    assert proxy.post({"cmd": "pwd", "cwd": "plain"})[0] == 400


def test_a_long_command_still_knows_its_name(proxy: Proxy, agent: str) -> None:
    cmd = "echo $0 $#; nosuchcommand #" + "x" * 500_000
    answer = proxy.exec(cmd, agent_name=agent)
    assert answer["stdout"].startswith("bash 0\nbash:")
    assert answer["exit_code"] == 127


@pytest.mark.slow
def test_two_hundred_clients_at_once_get_their_own_answers(proxy: Proxy) -> None:
    def wrong(number: int) -> dict[str, Any]:
        answer = proxy.exec(f"echo {number}; exit {number % 100}", agent_name=f"many{number % 20}")
        return (
            answer
            if (answer["stdout"], answer["exit_code"]) != (f"{number}\n", number % 100)
            else {}
        )

    with ThreadPoolExecutor(200) as pool:
        assert [answer for answer in pool.map(wrong, range(200)) if answer] == []


@pytest.mark.slow
def test_waiting_in_the_queue_does_not_count_towards_the_timeout(proxy: Proxy, agent: str) -> None:
    calls = [
        proxy.start_exec("sleep 0.7; echo done", agent_name=agent, timeout=1.2) for _ in range(8)
    ]
    assert [call.result()["stdout"] for call in calls] == ["done\n"] * 8


def test_a_client_that_disconnects_cancels_its_command(proxy: Proxy, agent: str) -> None:
    mark = f"sleep 61.{agent[1:5]}"
    connection = proxy.connect()
    connection.request(
        "POST",
        "/exec",
        json.dumps({"cmd": f"{mark}; true", "agent_name": agent}),
        {"Content-Type": "application/json"},
    )
    wait_until_running(mark.replace(" ", "\0"))
    connection.close()
    wait_until_gone(mark.replace(" ", "\0"))
    assert proxy.exec("echo next", agent_name=agent)["stdout"] == "next\n"


def test_a_queued_command_whose_client_disconnects_never_runs(proxy: Proxy, agent: str) -> None:
    gate = f"{proxy.folder}/{agent}"
    running = [
        proxy.start_exec(f"until [ -e {gate} ]; do sleep 0.05; done", agent_name=agent)
        for _ in range(4)
    ]
    eventually(lambda: len(processes_with(f"[ -e {gate} ]")) >= 4)
    connection = proxy.connect()
    connection.request(
        "POST",
        "/exec",
        json.dumps({"cmd": f"touch {gate}.run", "agent_name": agent}),
        {"Content-Type": "application/json"},
    )
    time.sleep(0.2)
    connection.close()
    time.sleep(0.1)
    pathlib.Path(gate).touch()
    assert [call.result()["exit_code"] for call in running] == [0] * 4

    proxy.exec("true", agent_name=agent)
    assert not os.path.exists(f"{gate}.run")


def test_tmux_inside_a_command_does_not_reach_the_servers_tmux(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec('echo "${TMUX-none} ${TMUX_PANE-none}"', agent_name=agent)
    assert answer["stdout"] == "none none\n"
    killed = proxy.exec("TMUX_TMPDIR=/nonexistent tmux kill-server; echo on", agent_name=agent)
    assert killed["stdout"].endswith("on\n")
    assert proxy.panes(agent)


@pytest.mark.slow
def test_the_time_in_the_queue_is_in_the_answer(proxy: Proxy, agent: str) -> None:
    proxy.exec("true", agent_name=agent)
    running = [proxy.start_exec("sleep 0.5", agent_name=agent) for _ in range(4)]
    eventually(lambda: len(processes_with("sleep\x000.5\x00")) == 4)
    answer = proxy.exec("true", agent_name=agent)
    assert answer["waited_ms"] > 100
    assert answer["duration_ms"] < 400
    assert [call.result()["exit_code"] for call in running] == [0] * 4


def test_a_command_that_kills_its_parent_is_lost(proxy: Proxy, agent: str) -> None:
    answer = proxy.exec("echo before; kill -9 $PPID; sleep 60", agent_name=agent)
    assert answer["ended"] == "lost"
    assert answer["stdout"] == "before\n"
    assert re.match(LOST, answer["error"])
    assert proxy.exec("echo next", agent_name=agent)["stdout"] == "next\n"


@pytest.mark.slow
def test_a_command_that_exits_while_the_server_is_stopped_is_in_time(
    warm: StartServer,
) -> None:
    server = warm()
    running = server.start_exec("sleep 0.8; echo done; exit 3", timeout=1.5)
    wait_until_running("sleep\x000.8")
    # By then it waits in epoll_wait(2).
    time.sleep(0.2)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    server.process.send_signal(signal.SIGCONT)
    answer = running.result()
    assert answer["stdout"] == "done\n"
    assert answer["ended"] == "exit"
    assert answer["exit_code"] == 3


def test_a_command_cancelled_before_it_reports_its_start_gets_term(
    tmp_path: pathlib.Path,
) -> None:
    driver = pp.PocketCoderDriver(f"{tmp_path}/tmux/s", "pocketcoder")

    async def use() -> pp.CommandResult:
        await driver.exec("true", None, "poco")
        starting = asyncio.ensure_future(
            driver.start(pp.ExecRequest("sleep 79.25"), {"out": lambda chunk: None})
        )
        # There is no event to wait for.
        while not [job for job in driver.jobs() if job.phase is pp.Phase.SENT]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        job = driver.jobs()[0]
        assert job.files is not None

        # Block the loop, so that the run has started and its report is not read.
        while not os.path.exists(f"{job.files.path}.pid"):  # noqa: ASYNC240
            time.sleep(0.0001)  # noqa: ASYNC251
        job.end("cancelled")
        return await (await starting).result()

    try:
        result = asyncio.run(use())
        assert result.ended == "cancelled"
        assert result.exit_code == 143
        assert result.duration_ms < 1900
    finally:
        kill_tmux(driver.socket_path)


@pytest.mark.slow
def test_notices_of_tmux_during_a_start_harm_nothing(tmp_path: pathlib.Path) -> None:
    class Slow(pp.Watch):
        async def start(self, run_id: str) -> None:
            tmux = [
                "tmux",
                "-S",
                f"{tmp_path}/tmux/s",
                "new-window",
                "-d",
                "-t",
                "=pocketcoder:",
                "sleep 0.1",
            ]
            await asyncio.to_thread(subprocess.run, tmux, check=True)
            await asyncio.sleep(0.5)

    async def use() -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        driver = pp.PocketCoderDriver(f"{tmp_path}/tmux/s", "pocketcoder")
        job = await driver.start(
            pp.ExecRequest("exit 3"), {"out": lambda chunk: None}, watch=Slow()
        )
        assert (await job.result()).exit_code == 3

        await driver.close()
        return told

    try:
        assert asyncio.run(use()) == []
    finally:
        kill_tmux(f"{tmp_path}/tmux/s")


def test_a_failed_start_always_gives_the_pane_back(tmp_path: pathlib.Path) -> None:
    class Wrong(pp.Watch):
        async def start(self, run_id: str) -> None:
            raise ZeroDivisionError

    async def use() -> pp.CommandResult:
        driver = pp.PocketCoderDriver(f"{tmp_path}/tmux/s", "pocketcoder")
        for _ in range(pp.MAX_PANES + 1):
            with pytest.raises(ZeroDivisionError):
                await driver.start(
                    pp.ExecRequest("true"), {"out": lambda chunk: None}, watch=Wrong()
                )

        result = await asyncio.wait_for(driver.exec("echo ok", None, "poco"), 20)
        await driver.close()
        return result

    try:
        assert asyncio.run(use()).output == "ok\n"
    finally:
        kill_tmux(f"{tmp_path}/tmux/s")


@pytest.mark.slow
def test_the_driver_can_be_used_alone(tmp_path: pathlib.Path) -> None:
    folder = tempfile.mkdtemp(prefix="pc")
    driver = pp.PocketCoderDriver(f"{folder}/tmux/s", "pocketcoder")

    async def use() -> pp.CommandResult:
        assert not driver.session_exists("pocketcoder")
        result = await driver.exec("pwd; echo $POCKETCODER_AGENT; exit 3", str(tmp_path), "poco")
        assert driver.session_exists("pocketcoder")
        assert not driver.session_exists("pocket")
        assert (await driver.exec("echo here", None, "poco")).output == "here\n"

        await driver.close()
        return result

    try:
        # Each round has a loop of its own.
        for _ in range(2):
            driver.sandbox.stopping = False
            with contextlib.suppress(subprocess.SubprocessError):
                kill_tmux(driver.socket_path)

            result = asyncio.run(use())
            assert result.output == f"{tmp_path}\npoco\n"
            assert result.exit_code == 3
            assert result.ended == "exit"

        driver.sandbox.stopping = False
        before = descriptors_of(os.getpid())
        # As a script would, without closing it.
        for number in range(3):
            assert asyncio.run(driver.exec(f"echo {number}", None, "poco")).output == f"{number}\n"
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(asyncio.wait_for(driver.exec("sleep 79.5", None, "poco"), 0.3))
        wait_until_gone("sleep\x0079.5")
        assert [path for path in descriptors_of(os.getpid()) if path not in before] == []

        with pytest.raises(pp.BadMessage, match="agent_name"):
            asyncio.run(driver.exec("true", None, "a b"))
    finally:
        kill_tmux(driver.socket_path)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_workspace_may_have_any_name(own: StartServer, tmp_path: pathlib.Path) -> None:
    workspace = tmp_path / "#{pid} %H\nset-environment -g PWNED 1\n;"
    workspace.mkdir()
    server = own("--workspace", str(workspace))

    for agent_name in ("poco", "second"):
        assert server.exec("pwd", agent_name=agent_name)["stdout"] == f"{workspace}\n"
        path = server.tmux(
            "display-message", "-p", "-t", server.pane(agent_name), "#{pane_current_path}"
        )
        assert path == str(workspace)

    assert "PWNED" not in server.tmux("show-environment", "-g")


# --- Runs that outlive their callers.


def test_wait_answers_202_and_the_command_goes_on(proxy: Proxy, agent: str) -> None:
    cmd = "echo first; read x </dev/tty; echo second; exit 5"
    status, answer = proxy.post({"cmd": cmd, "agent_name": agent, "wait": 0.5})
    assert status == 202
    assert answer["stdout"] == "first\n"
    assert answer["running"] is True
    assert "exit_code" not in answer

    run_id = answer["run_id"]
    assert proxy.run(run_id)["state"] == "running"
    call(proxy, "send_keys", agent_name=agent, keys=["Enter"], run_id=run_id)
    ended = proxy.run(run_id, wait=10)
    assert ended["exit_code"] == 5
    assert ended["ended"] == "exit"
    assert proxy.output(run_id) == b"first\nsecond\n"


def test_wait_answers_200_as_soon_as_the_command_ends(proxy: Proxy, agent: str) -> None:
    status, answer = proxy.post({"cmd": "echo done; exit 3", "agent_name": agent, "wait": 60})
    assert status == 200
    assert answer["stdout"] == "done\n"
    assert answer["exit_code"] == 3
    assert "running" not in answer


def test_a_stream_with_wait_ends_with_an_event_that_says_so(proxy: Proxy, agent: str) -> None:
    cmd = "echo first; read x </dev/tty; echo second"
    events = list(proxy.stream(cmd, agent_name=agent, wait=0.5))
    assert [name for name, _, _ in events if name != ":"] == ["output", "running"]
    last = events[-1][1]
    assert last["running"] is True
    call(proxy, "send_keys", agent_name=agent, keys=["Enter"], run_id=last["run_id"])
    assert proxy.run(last["run_id"], wait=10)["exit_code"] == 0

    events = list(proxy.stream("echo all; exit 2", agent_name=agent, wait=30))
    assert [name for name, _, _ in events if name != ":"] == ["output", "exit"]
    assert events[-1][1]["exit_code"] == 2


@pytest.mark.slow
def test_a_caller_that_leaves_during_its_wait_cancels_nothing(proxy: Proxy, agent: str) -> None:
    connection = proxy.connect()
    body = json.dumps({"cmd": "sleep 1; echo on", "agent_name": agent, "wait": 30})
    connection.request("POST", "/exec", body, {"Content-Type": "application/json"})
    (run,) = eventually(lambda: proxy.runs(agent_name=agent, state="running"))
    connection.close()
    assert proxy.run(run["run_id"], wait=10)["exit_code"] == 0
    assert proxy.output(run["run_id"]) == b"on\n"


@pytest.mark.parametrize(
    "wait",
    [-1, 86401, True, "1", float("nan"), [1]],
    ids=["negative", "too-long", "true", "text", "nan", "list"],
)
def test_a_wrong_wait_is_refused(proxy: Proxy, wait: Any) -> None:
    status, answer = proxy.post({"cmd": "true", "wait": wait})
    assert status == 400
    assert "`wait`" in answer["error"]


def test_a_run_that_outlives_its_caller_has_a_day_unless_told_otherwise(
    tmp_path: pathlib.Path,
) -> None:
    def timeout_of(**fields: Any) -> float:
        return pp.ExecRequest.from_fields({"cmd": "true", **fields}, str(tmp_path)).timeout

    assert timeout_of() == 300
    assert timeout_of(wait=None) == 300
    assert timeout_of(wait=1) == 86400
    assert timeout_of(wait=1, timeout=5) == 5


def test_programs_of_a_person_in_every_pane_block_no_agent(own: StartServer) -> None:
    server = own()
    first = [server.start_exec("read x </dev/tty") for _ in range(pp.MAX_PANES)]
    eventually(lambda: len(server.runs(state="running")) == pp.MAX_PANES)
    for pane in server.panes("poco"):
        server.tmux("send-keys", "-t", pane.split()[0], "Enter")
    assert {each.result()["exit_code"] for each in first} == {0}
    for pane in server.panes("poco"):
        server.tmux("send-keys", "-t", pane.split()[0], "sleep 77.35", "Enter")
    eventually(lambda: len(processes_with("77.35")) >= pp.MAX_PANES)
    assert server.exec("echo at once", timeout=20)["stdout"] == "at once\n"


@pytest.mark.slow
def test_runs_for_which_nobody_waits_block_no_agent(own: StartServer) -> None:
    server = own()
    ids = [server.launch("read x </dev/tty") for _ in range(pp.MAX_PANES + 2)]
    eventually(lambda: len(server.runs(state="running")) == pp.MAX_PANES + 2)
    assert server.exec("echo at once", timeout=20)["stdout"] == "at once\n"
    assert len(server.panes("poco")) == pp.MAX_PANES + 3

    for run_id in ids:
        server.request("DELETE", f"/runs/{run_id}")
    eventually(lambda: len(server.panes("poco")) == pp.MAX_PANES, 30)
    assert server.exec("echo on")["stdout"] == "on\n"


@pytest.mark.slow
def test_a_pane_too_many_stays_while_somebody_types_there(own: StartServer) -> None:
    server = own()
    ids = [server.launch("read x </dev/tty") for _ in range(pp.MAX_PANES + 1)]
    eventually(lambda: len(server.runs(state="running")) == pp.MAX_PANES + 1)
    last = server.panes("poco")[-1].split()[0]
    server.request("DELETE", f"/runs/{ids[-1]}")
    server.tmux("send-keys", "-t", last, "half a line")
    time.sleep(2 * pp.CLOSE_PAUSE)
    assert len(server.panes("poco")) == pp.MAX_PANES + 1


def test_sixteen_panes_are_the_most(own: StartServer) -> None:
    server = own()
    for _ in range(pp.MAX_ALL_PANES + 2):
        server.launch("sleep 77.25")
    eventually(lambda: len(server.runs(state="running")) == pp.MAX_ALL_PANES, 30)
    assert len(server.runs(state="waiting")) == 2
    assert len(server.panes("poco")) == pp.MAX_ALL_PANES


def test_what_background_processes_print_later_belongs_to_their_run(
    proxy: Proxy, agent: str
) -> None:
    go_on = f"{proxy.folder}/go-on-{agent}"
    cmd = f"(until [ -e {go_on} ]; do sleep 0.01; done; echo LATE) & echo now"
    answer = proxy.exec(cmd, agent_name=agent)
    assert answer["stdout"] == "now\n"
    data, headers = proxy.output_and_headers(answer["run_id"])
    assert data == b"now\n"
    assert headers["output-ended"] == "false"

    pathlib.Path(go_on).touch()
    eventually(lambda: proxy.output_and_headers(answer["run_id"])[1]["output-ended"] == "true")
    assert proxy.output(answer["run_id"]) == b"now\nLATE\n"
    assert proxy.run(answer["run_id"])["output_bytes"] == 4


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGTERM, id="stopped", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_wait_outlives_the_server(own: StartServer, number: int) -> None:
    server = own()
    go_on = f"{server.folder}/go-on"
    cmd = (
        "echo start; seq 20000; until [ -e " + go_on + " ]; do sleep 0.01; done;"
        " seq 20000 30000; exit 6"
    )
    run_id = server.launch(cmd, usage_id="u", session_id="s")
    eventually(lambda: server.run(run_id)["output_bytes"] > 100_000)
    server.kill_and_start(number)

    run = server.run(run_id)
    assert run["state"] == "running"
    assert run["cmd"] == cmd
    assert run["usage_id"] == "u"
    pathlib.Path(go_on).touch()
    run = server.run(run_id, wait=15)
    assert run["exit_code"] == 6
    assert run["ended"] == "exit"
    numbers = [*range(1, 20001), *range(20000, 30001)]
    assert server.output(run_id) == b"start\n" + b"".join(b"%d\n" % each for each in numbers)
    assert server.exec("echo next")["stdout"] == "next\n"
    assert len(server.panes("poco")) == 1


@pytest.mark.slow
def test_a_run_that_ends_while_no_server_is_there_is_known_to_the_next(own: StartServer) -> None:
    server = own()
    go_on = f"{server.folder}/go-on"
    done = f"{server.folder}/done"
    run_id = server.launch(
        f"echo start; until [ -e {go_on} ]; do sleep 0.01; done; seq 5000; touch {done}; exit 7"
    )
    eventually(lambda: server.output(run_id) == b"start\n")
    server.stop(signal.SIGKILL)
    pathlib.Path(go_on).touch()
    eventually(lambda: os.path.exists(done))
    server.start()

    run = server.run(run_id, wait=15)
    assert run["exit_code"] == 7
    assert run["ended"] == "exit"
    assert server.output(run_id) == b"start\n" + b"".join(b"%d\n" % each for each in range(1, 5001))
    eventually(lambda: server.run_files() == 0)
    eventually(lambda: not list(server.run_folder.glob("[0-9a-f]*/[0-9]*.out")))


@pytest.mark.slow
def test_a_run_whose_line_is_just_typed_is_left_to_the_next_server(own: StartServer) -> None:
    server = own()
    server.exec("true")
    # The shell takes so long to start what is typed.
    server.type("poco", "trap 'sleep 0.8125' DEBUG", "Enter")
    asked = Background(partial(server.post, {"cmd": "echo ran; touch mark", "wait": 20}))
    wait_until_running("sleep\x000.8125")
    server.stop()
    answer = asked.result()[1]
    assert answer["running"]
    eventually(lambda: os.path.exists(f"{server.workspace}/mark"))
    server.start()
    assert server.run(answer["run_id"], 10)["ended"] == "exit"
    assert server.output(answer["run_id"]) == b"ran\n"


@pytest.mark.slow
def test_a_run_that_is_being_ended_is_not_left_to_the_next_server(own: StartServer) -> None:
    server = own()
    slow = "trap 'sleep 1.0625; exit 3' TERM; while :; do sleep 0.1; done"
    run_id = server.post({"cmd": slow, "wait": 0.1, "timeout": 0.5})[1]["run_id"]
    wait_until_running("sleep\x001.0625")
    server.stop()
    wait_until_gone("sleep\x001.0625")
    server.start()
    assert server.run(run_id)["ended"] == "timeout"


def test_ended_runs_are_remembered_over_a_restart(own: StartServer) -> None:
    server = own()
    ended = server.post({"cmd": "seq 100000; exit 3", "wait": 20})[1]["run_id"]
    plain = server.exec("echo plain")["run_id"]
    before = server.run(ended)
    output = server.output(ended)
    server.kill_and_start()
    assert server.run(ended) == before
    assert server.output(ended) == output
    assert server.status("GET", f"/runs/{plain}") == 404

    assert server.status("DELETE", f"/runs/{ended}") == 204
    assert server.status("GET", f"/runs/{ended}") == 404
    server.kill_and_start()
    assert server.runs() == []
    assert [
        path.name for path in (server.run_folder / "runs").iterdir() if path.suffix != ".lock"
    ] == []


def test_a_run_of_another_server_can_be_ended_signalled_and_typed_to(own: StartServer) -> None:
    server = own()
    ended = server.launch("sleep 77.5")
    signalled = server.launch("trap 'echo got; exit 9' USR1; while :; do sleep 0.01; done")
    asked = server.launch("read x </dev/tty; echo got $x")
    eventually(lambda: len(server.runs(state="running")) == 3)
    server.kill_and_start()

    status, _, answer = server.request("DELETE", f"/runs/{ended}")
    assert status == 200
    assert json.loads(answer)["ended"] == "cancelled"
    wait_until_gone("77.5")

    assert server.post({"signal": "USR1"}, f"/runs/{signalled}/signal")[0] == 200
    assert server.run(signalled, wait=10)["exit_code"] == 9
    assert server.output(signalled).endswith(b"got\n")

    call(server, "send_keys", text="me", keys=["Enter"], run_id=asked)
    assert server.run(asked, wait=10)["exit_code"] == 0
    assert server.output(asked) == b"got me\n"


@pytest.mark.slow
def test_runs_of_several_servers_before_are_all_known(own: StartServer) -> None:
    server = own()
    ids = []
    for number in range(3):
        ids.append(server.launch(f"echo {number}; read x </dev/tty; echo $x"))
        eventually(lambda: len(server.runs(state="running")) == len(ids))
        server.kill_and_start()

    assert {run["run_id"] for run in server.runs(state="running")} == set(ids)
    for number, run_id in enumerate(ids):
        call(server, "send_keys", text="on", keys=["Enter"], run_id=run_id)
        assert server.run(run_id, wait=10)["exit_code"] == 0
        assert server.output(run_id) == b"%d\non\n" % number


@pytest.mark.slow
def test_runs_of_another_server_block_no_agent(own: StartServer) -> None:
    server = own()
    for _ in range(pp.MAX_PANES + 2):
        server.launch("read x </dev/tty")
    eventually(lambda: len(server.runs(state="running")) == pp.MAX_PANES + 2)
    server.kill_and_start()
    assert server.exec("echo at once", timeout=20)["stdout"] == "at once\n"


@pytest.mark.slow
def test_a_run_of_another_server_keeps_its_time_limit(own: StartServer) -> None:
    server = own()
    run_id = server.launch("sleep 77.75", timeout=2)
    eventually(lambda: server.runs(state="running"))
    server.kill_and_start()
    run = server.run(run_id, wait=15)
    assert run["ended"] == "timeout"
    assert run["exit_code"] == 124
    wait_until_gone("77.75")


@pytest.mark.slow
def test_a_run_whose_terminal_died_without_a_server_is_lost(own: StartServer) -> None:
    server = own()
    run_id = server.launch("echo before; trap '' HUP; sleep 78.25")
    eventually(lambda: server.output(run_id) == b"before\n")
    server.stop(signal.SIGKILL)
    kill_tmux(server.socket)
    server.start()
    run = server.run(run_id, wait=15)
    assert run["ended"] == "lost"
    assert run["exit_code"] == 137
    assert server.output(run_id) == b"before\n"
    wait_until_gone("78.25")
    assert server.exec("echo next")["stdout"] == "next\n"


@pytest.mark.slow
def test_background_processes_of_a_run_go_on_over_a_restart(own: StartServer) -> None:
    server = own()
    go_on = f"{server.folder}/go-on"
    cmd = f"(until [ -e {go_on} ]; do echo tick; sleep 0.01; done; echo LATE) & echo now"
    status, answer = server.post({"cmd": cmd, "wait": 20})
    assert status == 200
    run_id = answer["run_id"]
    server.kill_and_start()
    assert server.output_and_headers(run_id)[1]["output-ended"] == "false"
    pathlib.Path(go_on).touch()
    eventually(lambda: server.output_and_headers(run_id)[1]["output-ended"] == "true")
    output = server.output(run_id).split(b"\n")
    assert output[-2:] == [b"LATE", b""]
    assert set(output) == {b"now", b"tick", b"LATE", b""}
    assert server.run(run_id)["output_bytes"] == answer["output_bytes"]


def test_two_servers_at_one_socket_leave_each_others_runs_alone(own: StartServer) -> None:
    first = own()
    run_id = first.launch("read x </dev/tty; echo $x")
    eventually(lambda: first.runs(state="running"))
    second = own(folder=first.folder)
    assert second.runs() == []
    assert second.exec("echo second")["stdout"] == "second\n"
    call(first, "send_keys", text="mine", keys=["Enter"], run_id=run_id)
    assert first.run(run_id, wait=10)["exit_code"] == 0
    assert first.output(run_id) == b"mine\n"


@pytest.mark.slow
def test_servers_of_different_sockets_can_share_a_directory(
    own: StartServer, tmp_path: pathlib.Path
) -> None:
    first = own("--runs-dir", f"{tmp_path}/runs")
    run_id = first.launch("seq 5000; sleep 78.5")
    eventually(lambda: first.run(run_id)["output_bytes"] > 20_000)
    first.stop(signal.SIGKILL)
    second = own("--runs-dir", f"{tmp_path}/runs")
    assert second.runs() == []
    first.start()
    assert first.run(run_id)["state"] == "running"
    first.request("DELETE", f"/runs/{run_id}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    with_slow(
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"{", id="half"),
            pytest.param(b"[]", id="list"),
            pytest.param(b"{}", id="no-fields"),
            pytest.param(b"\xff", id="no-text"),
            pytest.param(None, id="link"),
            pytest.param(b'{"run_id": "0", "server": "x", "socket": "y"}', id="another-run"),
        ],
        "half",
        "link",
    ),
)
def test_a_damaged_record_is_skipped_with_a_line_in_the_log(
    own: StartServer, damage: bytes | None
) -> None:
    server = own()
    good = server.post({"cmd": "echo good", "wait": 20})[1]["run_id"]
    bad = server.post({"cmd": "echo bad", "wait": 20})[1]["run_id"]
    server.stop(signal.SIGKILL)
    file = server.run_folder / "runs" / f"{bad}.json"
    file.unlink()
    if damage is None:
        file.symlink_to("/etc/passwd")
    else:
        file.write_bytes(damage)

    server.start()
    assert [run["run_id"] for run in server.runs()] == [good]
    assert f"{bad}.json" in server.logged()


@pytest.mark.slow
def test_fields_of_a_record_that_make_no_sense_are_skipped_too(own: StartServer) -> None:
    server = own()
    changes: list[dict[str, Any]] = [
        {"cmd": 7},
        {"asked_time": "x"},
        {"asked_time": 10**400},
        {"result": {"a": 1}},
        {"location": [1]},
        {"location": {"path": 1}},
        {"door": "window"},
    ]
    ids = [
        server.post({"cmd": f"echo {number}", "wait": 20})[1]["run_id"]
        for number in range(len(changes) + 1)
    ]
    server.stop(signal.SIGKILL)
    for run_id, change in zip(ids, changes, strict=False):
        file = server.run_folder / "runs" / f"{run_id}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    server.start()
    assert [run["run_id"] for run in server.runs()] == [ids[-1]]
    assert server.logged().count("runs skipped=") == len(changes)


def test_a_run_without_a_text_is_known_to_the_next_server(own: StartServer) -> None:
    server = own()
    status, answer = server.post({"argv": ["-c", ""], "wait": 20})
    assert status == 200
    server.kill_and_start()
    assert server.run(answer["run_id"])["exit_code"] == 0


def test_a_server_that_stops_waits_for_no_follower(own: StartServer) -> None:
    server = own()
    run_id = server.launch("echo on; sleep 77.45")
    events = server.follow(run_id)
    assert next(events)[0] == "output"
    seconds = timed(server.stop)
    assert list(events) == []
    assert seconds < pp.STOP_GRACE
    server.start()
    assert server.run(run_id)["state"] == "running"
    server.request("DELETE", f"/runs/{run_id}")


@pytest.mark.slow
def test_what_cannot_be_taken_over_leaves_no_shell_behind(own: StartServer) -> None:
    server = own()
    go_on = f"{server.folder}/go-on"
    run_id = server.launch(f"until [ -e {go_on} ]; do sleep 0.01; done")
    eventually(lambda: server.runs(state="running"))
    server.stop(signal.SIGKILL)
    (server.run_folder / "runs" / f"{run_id}.json").write_text("{")
    pathlib.Path(go_on).touch()
    (_, shell), *_ = (pane.split() for pane in server.panes("poco"))
    eventually(lambda: len(pathlib.Path(f"/proc/{shell}/task/{shell}/children").read_text()) == 0)
    server.start()
    assert server.exec("echo next")["stdout"] == "next\n"
    eventually(lambda: not list(server.run_folder.glob("[0-9a-f]*/2.out")))
    eventually(lambda: len(list(server.run_folder.glob("[0-9a-f]*/status"))) == 1)


def test_a_directory_for_runs_that_goes_away_costs_no_command(
    own: StartServer, tmp_path: pathlib.Path
) -> None:
    server = own("--runs-dir", f"{tmp_path}/runs")
    go_on = f"{server.folder}/go-on"
    run_id = server.launch(
        f"seq 100000; until [ -e {go_on} ]; do sleep 0.01; done; echo end; exit 4"
    )
    eventually(lambda: server.run(run_id)["output_bytes"] > 500_000)
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("in the way")
    pathlib.Path(go_on).touch()
    assert server.run(run_id, wait=10)["exit_code"] == 4
    assert server.output(run_id).endswith(b"end\n")
    assert server.exec("seq 100000")["output_bytes"] == 588895


@pytest.mark.slow
def test_a_full_disk_for_runs_costs_no_command(own: StartServer, full_disk: str) -> None:
    server = own("--runs-dir", f"{full_disk}/runs")
    run_id = server.launch("seq 2000000; exit 4")
    run = server.run(run_id, wait=30)
    assert run["exit_code"] == 4
    assert run["output_bytes"] == 14888896
    output = server.output(run_id)
    assert output.startswith(b"1\n2\n3\n")
    assert server.exec("seq 100000")["stdout"].endswith("\n99999\n100000\n")


def test_without_room_for_output_answers_are_whole_all_the_same(own: StartServer) -> None:
    server = own("--keep-mib", "0")
    answer = server.exec("seq 100000")
    assert answer["stdout"].endswith("\n99999\n100000\n")
    assert answer["truncated"] is False
    data, headers = server.output_and_headers(answer["run_id"])
    assert data == b""
    assert headers["output-bytes"] == "588895"
    assert not list((server.run_folder / "runs").glob("*.[0-9]*"))


@pytest.mark.slow
def test_whenever_the_server_is_killed_nothing_is_lost_and_nothing_comes_twice(
    own: StartServer,
) -> None:
    """200 times, at four servers at once."""

    def kill_at_random(server: Proxy, seed: int) -> None:
        dice = random.Random(seed)
        for number in range(50):
            lines = dice.choice((1, 50, 3000, 40_000))
            pause = dice.choice((0, 0.02, 0.2))
            run_id = server.launch(f"seq {lines}; sleep {pause}; seq {lines}; exit {number}")
            time.sleep(dice.choice((0, 0.001, 0.01, 0.03, 0.1, 0.3)) * dice.random())
            server.kill_and_start()
            if dice.random() < 0.3:
                time.sleep(0.1 * dice.random())
                server.kill_and_start()

            run = server.run(run_id, wait=20)
            assert run["state"] == "ended", (seed, number)
            if run["ended"] == "cancelled":
                # It was killed before the command could start.
                assert "never started" in run["error"], (seed, number)
                continue
            assert run["exit_code"] == number, (seed, number, run)
            expected = b"".join(b"%d\n" % each for each in range(1, lines + 1)) * 2
            assert server.output(run_id) == expected, (seed, number)

    servers = [own() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(kill_at_random, servers, range(16, 20)))


# ==========================================================================
# Screens
# ==========================================================================
ROWS = [
    pytest.param(["\x1b[1;31mred\x1b[0m"], "\x1b[1;31mred\x1b[0m", id="colours-stay"),
    pytest.param(["\x1b[38:2::1:2:3mx"], "\x1b[38:2::1:2:3mx", id="colours-with-colons-stay"),
    pytest.param(["a\x1b[2Jb\x1b[5;5Hc\x1b[?1049hd"], "abcd", id="movements-go"),
    pytest.param(["\x1b]0;title\x07a\x1b]2;title\x1b\\b"], "ab", id="titles-go"),
    pytest.param(["\x1b]52;c;aGk=\x07a"], "a", id="the-clipboard-goes"),
    pytest.param(
        ["\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\"], "link", id="hyperlinks-go"
    ),
    pytest.param(["\x1bPq#0;2;0;0;0\x1b\\a\x1b_x\x1b\\b"], "ab", id="images-go"),
    pytest.param(["a\0b\x08c\x7fd\x9be"], "abcde", id="control-characters-go"),
    pytest.param(["\x1b[99999", "\x1b"], "", id="cut-sequences-go"),
    pytest.param([f"\x1b[{'1;' * 60}mx"], "x", id="a-colour-that-is-too-long-goes"),
    pytest.param(["\x0elqk", "x\x0fx"], "┌─┐\n│x", id="line-drawing-becomes-unicode"),
    pytest.param(["a", "", ""], "a", id="empty-rows-at-the-end-go"),
    pytest.param(["", "<b>&amp;"], "\n<b>&amp;", id="markup-is-text"),
]


@pytest.mark.parametrize(("rows", "text"), ROWS)
def test_only_colours_are_left_of_escape_sequences(rows: list[str], text: str) -> None:
    assert pp.plain_text(rows) == text


def test_what_a_pane_shows_cannot_pass_for_another_pane() -> None:
    row = "%9 0 0 80 24 0 0 1 1"
    text = f"%1 0 0 80 2 5 1 1 1\n{row}\n\n%2 0 3 80 1 0 0 0 0\n{row}\n"
    first, second = pp.read_pictures(text)
    assert (first.pane_id, first.rows, first.has_cursor) == ("%1", [row, ""], True)
    assert (second.pane_id, second.rows, second.has_cursor) == ("%2", [row], False)
    with pytest.raises(pp.NoTerminal):
        pp.read_pictures("\n\n")


def test_a_watcher_sees_a_terminal_in_its_colours_and_size(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    proxy.exec("printf '\\033[31mred\\033[0m plain\\n'", agent_name=agent)
    eventually(lambda: proxy.screen(agent).rstrip().endswith("\n$"))
    screen = stream(proxy, f"/terminals/{agent}").next()
    assert screen["agent_name"] == agent
    assert (screen["columns"], screen["lines"]) == (200, 50)

    (pane,) = screen["panes"]
    assert pane["pane_id"] == proxy.pane(agent)
    assert (pane["left"], pane["top"], pane["columns"], pane["lines"]) == (0, 0, 200, 50)
    assert (pane["command"], pane["run_id"]) == ("bash", None)
    assert "\x1b[31mred\x1b[39m plain" in pane["text"]
    last = pane["text"].count("\n")
    assert screen["cursor"] == {"pane_id": pane["pane_id"], "column": 2, "line": last}
    assert (pane["cursor_column"], pane["cursor_line"]) == (2, last)


def test_output_reaches_a_watcher_while_the_command_runs(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    proxy.exec(f"mkfifo {agent}", agent_name=agent)
    watched = watch(proxy, stream, agent)
    running = proxy.start_exec(f"echo one; read -r word < {agent}; echo $word", agent_name=agent)
    screen = screen_when(watched, lambda screen: "\none" in screen_text(screen))
    assert re.fullmatch(pp.RUN_ID, screen["panes"][0]["run_id"])
    assert "\ntwo" not in screen_text(screen)

    pathlib.Path(proxy.workspace, agent).write_text("two\n")
    screen_when(
        watched,
        lambda screen: "\ntwo" in screen_text(screen) and screen["panes"][0]["run_id"] is None,
    )
    assert running.result()["stdout"] == "one\ntwo\n"


@pytest.mark.slow
def test_panes_are_apart_also_behind_a_zoomed_one(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    proxy.exec("true", agent_name=agent)
    watched = watch(proxy, stream, agent)
    running = proxy.start_exec("echo first; sleep 30", agent_name=agent)
    screen_when(watched, lambda screen: "\nfirst" in screen_text(screen))
    proxy.exec("echo second", agent_name=agent)
    screen = screen_when(
        watched,
        lambda screen: len(screen["panes"]) == 2 and "\nsecond" in screen["panes"][1]["text"],
    )
    assert "\nfirst" in screen["panes"][0]["text"]
    assert "second" not in screen["panes"][0]["text"]

    pane = proxy.pane(agent)
    proxy.tmux("resize-pane", "-Z", "-t", pane)
    screen = screen_when(watched, lambda screen: screen["panes"][1]["top"] > 0)
    assert (screen["columns"], screen["lines"]) == (200, 50)
    proxy.tmux("kill-pane", "-t", screen["panes"][1]["pane_id"])
    screen = screen_when(watched, lambda screen: len(screen["panes"]) == 1)
    assert screen["panes"][0]["pane_id"] == pane
    proxy.type(agent, "C-c")
    running.result()


def test_one_stream_shows_several_agents(proxy: Proxy, agent: str, stream: OpenStream) -> None:
    names = [f"{agent}a", f"{agent}b"]
    for name in names:
        proxy.exec("true", agent_name=name)
    watched = stream(proxy, f"/terminals/{','.join([*names, *names])}")
    assert {watched.next()["agent_name"], watched.next()["agent_name"]} == set(names)
    proxy.exec("echo b", agent_name=names[1])
    screen = screen_when(watched, lambda screen: "\nb" in screen_text(screen))
    assert screen["agent_name"] == names[1]


@pytest.mark.slow
def test_twenty_watchers_share_one_picture(
    warm: StartServer, stream: OpenStream, tmp_path: pathlib.Path
) -> None:
    proxy = warm()
    watchers = [watch(proxy, stream, "poco") for _ in range(20)]
    count_pictures(proxy, tmp_path / "count")
    proxy.exec("echo hi")
    for watched in watchers:
        screen_when(watched, lambda screen: "\nhi" in screen_text(screen))
    # One or two for the command, and no more for 20 who watch.
    assert len((tmp_path / "count").read_text()) < 6
    # The driver, and one connection for all of them.
    assert proxy.tmux("list-clients", "-F", "#{client_pid}").count("\n") == 1


@pytest.mark.slow
def test_a_flood_is_ten_pictures_a_second_at_most(
    warm: StartServer, stream: OpenStream, tmp_path: pathlib.Path
) -> None:
    proxy = warm()
    watched = watch(proxy, stream, "poco")
    count_pictures(proxy, tmp_path / "count")
    proxy.type("poco", "yes", "Enter")
    screen_when(watched, lambda screen: "\ny\ny" in screen_text(screen))
    started = time.monotonic()
    before = len((tmp_path / "count").read_text())
    for _ in range(10):
        watched.next()
    assert len((tmp_path / "count").read_text()) - before <= (time.monotonic() - started) * 10 + 2
    assert proxy.status("GET", "/health") == 200


def test_nothing_runs_while_nobody_watches(
    warm: StartServer, stream: OpenStream, tmp_path: pathlib.Path
) -> None:
    proxy = warm()
    watched = watch(proxy, stream, "poco")
    assert proxy.tmux("list-clients", "-F", "#{client_pid}").count("\n") == 1

    watched.close()
    eventually(lambda: "\n" not in proxy.tmux("list-clients", "-F", "#{client_pid}"))
    count_pictures(proxy, tmp_path / "count")
    proxy.exec("echo hi")
    proxy.exec("true")
    assert (tmp_path / "count").read_text() == ""


def test_who_watches_again_at_once_finds_the_same_connection(
    warm: StartServer, stream: OpenStream
) -> None:
    proxy = warm()
    watched = watch(proxy, stream, "poco")
    before = proxy.tmux("list-clients", "-F", "#{client_pid}")

    for _ in range(5):
        watched.close()
        watched = watch(proxy, stream, "poco")
    assert proxy.tmux("list-clients", "-F", "#{client_pid}") == before


@pytest.mark.slow
def test_a_watched_terminal_that_is_idle_is_left_alone(
    warm: StartServer, stream: OpenStream, tmp_path: pathlib.Path
) -> None:
    proxy = warm()
    watch(proxy, stream, "poco")
    count_pictures(proxy, tmp_path / "count")
    # There is no fact to wait for where nothing shall happen.
    time.sleep(0.5)
    before = (tmp_path / "count").read_text()
    time.sleep(1)
    assert (tmp_path / "count").read_text() == before


def test_of_each_terminal_only_the_newest_picture_waits_for_a_reader() -> None:
    async def read() -> tuple[list[str], list[str]]:
        reader = pp.ScreenReader()
        for number in range(100):
            for name in ("a", "b"):
                reader.show(name, f"{name}{number}")
        return await reader.next(5), await reader.next(0.01)

    assert asyncio.run(read()) == (["a99", "b99"], [])


@pytest.mark.slow
def test_a_reader_that_does_not_read_costs_nothing_and_misses_pictures(
    warm: StartServer, stream: OpenStream
) -> None:
    proxy = warm()
    other = watch(proxy, stream, "poco")
    with proxy.raw_connection() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET /terminals/poco HTTP/1.1\r\nHost: localhost\r\n\r\n")
        # More than the buffers of the connection take.
        wide = "head -c 9000 /dev/urandom | od -An -tx1 -w64 | head -n 49"
        before = proxy.memory()
        for number in range(60):
            proxy.exec(f"{wide}; echo number {number}")
            shown = f"number {number}"
            screen_when(other, partial(shows, shown))
        assert proxy.memory() - before < 10_000_000


@pytest.mark.slow
def test_a_terminal_that_dies_is_shown_again_when_it_comes_back(
    warm: StartServer, stream: OpenStream
) -> None:
    proxy = warm()
    watched = watch(proxy, stream, "poco")
    window = proxy.tmux("display-message", "-p", "-t", proxy.pane("poco"), "#{window_id}")
    for end in (f"kill-window -t {window}", "kill-session -t pocketcoder", "kill-server"):
        proxy.tmux(*end.split())
        screen = screen_when(watched, lambda screen: not screen["panes"])
        assert (screen["columns"], screen["cursor"]) == (0, None)
        proxy.exec("echo back")
        screen_when(watched, lambda screen: "\nback" in screen_text(screen))


def test_who_cannot_be_watched_is_an_error(proxy: Proxy) -> None:
    for path, status, said in (
        ("/terminals/nobody", 404, "nobody"),
        ("/terminals/poco,nobody", 404, "nobody"),
        ("/terminals/no%20body", 400, "`agents`"),
        ("/terminals/poco,", 400, "`agents`"),
        ("/terminals/" + ",".join(f"a{number}" for number in range(99)), 400, "at most"),
    ):
        got, _, answer = proxy.request("GET", path)
        assert (got, said in json.loads(answer)["error"]) == (status, True)


def test_there_is_a_bound_to_watchers(warm: StartServer, stream: OpenStream) -> None:
    proxy = warm()
    watchers = [stream(proxy, "/terminals/poco") for _ in range(pp.MAX_WATCHERS)]
    assert {watched.status for watched in watchers} == {200}
    refused = stream(proxy, "/terminals/poco")
    assert refused.status == 503
    assert b"close another page" in refused.answer.read()

    watchers[0].close()
    eventually(lambda: stream(proxy, "/terminals/poco").status == 200)


def test_a_stopping_server_ends_the_streams_of_watchers(
    warm: StartServer, stream: OpenStream
) -> None:
    proxy = warm()
    watched = watch(proxy, stream, "poco")
    started = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - started < pp.STOP_GRACE
    assert watched.next() is None


# ==========================================================================
# Audit log
# ==========================================================================
def test_the_audit_log_has_the_start_and_the_end_of_each_command(
    audited: tuple[Proxy, pathlib.Path],
) -> None:
    proxy, path = audited
    ids = {
        "usage_id": "u\n\u2028",
        "session_id": "s",
        "agent_name": "a",
    }
    cmd = f"grep -c $POCKETCODER_RUN_ID {path}; exit 3"
    answer = proxy.exec(cmd, **ids)
    # The start is recorded before the command runs.
    assert answer["stdout"] == "1\n"

    # The end is recorded before the answer.
    start, end = noted(path)
    fields = {
        "run_id": answer["run_id"],
        "door": "exec",
        **ids,
        "cwd": os.path.realpath(proxy.workspace),
        "cmd": cmd,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", start["time"])
    assert start == {
        "time": start["time"],
        "event": "start",
        **fields,
    }

    result = {
        "exit_code": 3,
        "ended": "exit",
        "error": None,
        "waited_ms": answer["waited_ms"],
        "duration_ms": answer["duration_ms"],
        "output_bytes": 2,
    }
    assert end == {
        "time": end["time"],
        "event": "end",
        **fields,
        **result,
    }
    assert start["time"] <= end["time"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_the_audit_log_has_the_commands_of_every_door(audited: tuple[Proxy, pathlib.Path]) -> None:
    proxy, path = audited

    async def talk() -> None:
        async with Channel(proxy) as channel:
            await channel.send({"cmd": "echo channel; kill -9 $$"})
            await channel.end()

    list(proxy.stream("echo stream"))
    asyncio.run(talk())
    call(proxy, "exec", cmd="sleep 30", timeout=0.05)
    call(proxy, "send_keys", text="p\u00e4ss", keys=["Enter"])
    connection = proxy.connect()
    connection.request("POST", "/exec", json.dumps({"cmd": "touch begun; sleep 31"}), JSON_TYPE)
    eventually(pathlib.Path(proxy.workspace, "begun").exists)
    connection.close()
    eventually(lambda: len(noted(path)) == 10)
    lines = noted(path)
    assert [line["event"] for line in lines] == ["start", "end"] * 5
    assert all(
        start["run_id"] == end["run_id"] for start, end in zip(lines[::2], lines[1::2], strict=True)
    )

    ends = [
        (line["cmd"], line["exit_code"], line["error"] and line["error"][:9])
        for line in lines[1::2]
    ]
    assert ends == [
        ("echo stream", 0, None),
        ("echo channel; kill -9 $$", 137, None),
        ("sleep 30", 124, "ended aft"),
        (None, 0, None),
        ("touch begun; sleep 31", 143, "cancelled"),
    ]
    assert lines[6]["text"] == "p\u00e4ss"
    assert lines[6]["keys"] == ["Enter"]


@pytest.mark.parametrize(("era", "server"), ERAS)
@pytest.mark.slow
def test_the_audit_log_has_relayed_calls_without_arguments_or_results(
    own: StartServer,
    fixtures: pathlib.Path,
    tmp_path: pathlib.Path,
    stream: OpenStream,
    era: str,
    server: str,
) -> None:
    audit = tmp_path / "audit"
    proxy = own(
        f"--mcp-server=x={sys.executable} -S {fixtures} mcp-fixture {server}",
        "--audit-log",
        str(audit),
    )
    client = Client(proxy, era, "x", stream, info={"name": "tester", "version": "9"})
    client.call("echo", argument="s3cret", result={"secret": "s3cret"})
    assert client.call("fail", message="s3cret")["message"] == "s3cret"
    assert client.call("test_error_handling")["isError"] is True

    slow = {
        "name": "test_slow",
        "arguments": {"seconds": 9},
        "_meta": {"progressToken": 1},
    }
    going = client.open("tools/call", slow, id_=9)
    if era == "legacy":
        client.tell("notifications/cancelled", {"requestId": 9})
    going.close()
    eventually(lambda: "cancelled" in audit.read_text())

    lines = [line for line in noted(audit) if line.get("tool")]
    starts = [line for line in lines if line["event"] == "start"]
    ends = [line for line in lines if line["event"] == "end"]
    assert [line["tool"] for line in starts] == ["echo", "fail", "test_error_handling", "test_slow"]
    assert [line["tool"] for line in ends] == [line["tool"] for line in starts]
    assert [line["call_id"] for line in ends] == [line["call_id"] for line in starts]

    expected = [None, "error -32000", "the tool failed", "cancelled"]
    assert [line["error"] for line in ends] == expected
    for line in lines:
        assert line["server"] == "x"
        assert line["method"] == "tools/call"
        assert line["client"] == {"name": "tester", "version": "9"}
        assert line["address"] == "127.0.0.1"

    assert all(type(line["duration_ms"]) is int for line in ends)
    assert "s3cret" not in audit.read_text()


def test_no_call_is_relayed_while_the_audit_log_fails(
    own: StartServer, fixtures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    audit = tmp_path / "audit"
    proxy = own(
        f"--mcp-server=x={sys.executable} -S {fixtures} mcp-fixture modern", f"--audit-log={audit}"
    )
    call = modern("tools/call", {"name": "test_simple_text"})
    assert "result" in mcp(proxy, call, path="/servers/x/mcp")[2]

    audit.unlink()
    audit.mkdir()
    failed = mcp(proxy, call, path="/servers/x/mcp")[2]["error"]
    assert "audit log" in failed["message"]


@pytest.mark.slow
def test_no_command_runs_or_is_answered_while_the_audit_log_fails(
    audited: tuple[Proxy, pathlib.Path],
) -> None:
    proxy, path = audited
    long = proxy.start_exec("sleep 0.3; exit 5", agent_name="a")
    # Make the log longer than the files of a run.
    eventually(lambda: proxy.exec("true") and len(noted(path)) > 8)
    # Only part of a line can be written.
    size = path.stat().st_size + 20
    with limited(proxy.process, resource.RLIMIT_FSIZE, size):
        # This is the end of `long`.
        eventually(lambda: "File too large" in proxy.logged())

        for _ in range(3):
            status, answer = proxy.post({"cmd": "touch ran"})
            assert status == 503
            assert answer["exit_code"] == 125
            assert answer["error"].startswith(f"cannot write the audit log {path}: File too large")

        result = call(proxy, "exec", cmd="touch ran")
        assert result["isError"]
        assert call(proxy, "send_keys", text="touch ran", keys=["Enter"])["isError"]
        assert proxy.status("GET", "/health") == 200
        assert path.stat().st_size == size
        assert not long.future.done()

    assert long.result()["exit_code"] == 5
    assert proxy.exec("ls")["stdout"] == ""

    # Nothing of its start is written, so nothing has to wait.
    with limited(proxy.process, resource.RLIMIT_FSIZE, path.stat().st_size):
        assert proxy.post({"cmd": "touch ran"})[0] == 503

    assert proxy.exec("ls")["stdout"] == ""
    lines = noted(path)
    assert [line["event"] for line in lines].count("start") == len(lines) / 2
    assert [
        line["exit_code"] for line in lines if line["event"] == "end" and line["agent_name"] == "a"
    ] == [5]


@pytest.mark.slow
def test_a_result_that_is_never_logged_is_withheld(audited: tuple[Proxy, pathlib.Path]) -> None:
    proxy, path = audited
    for _ in range(8):
        proxy.exec("true")
    began = Background(lambda: proxy.post({"cmd": "sleep 0.3; echo secret; exit 5"}))
    eventually(lambda: len(noted(path)) == 17)
    with limited(proxy.process, resource.RLIMIT_FSIZE, path.stat().st_size):
        status, answer = began.result()
    assert status == 500
    assert answer["exit_code"] == 125
    assert set(answer) == {"error", "exit_code"}
    assert answer["error"].startswith(
        "the command ended with 5, its answer is withheld: cannot write the audit log"
    )


@pytest.mark.slow
def test_a_stream_says_that_its_unlogged_result_is_withheld(
    audited: tuple[Proxy, pathlib.Path],
) -> None:
    proxy, path = audited
    for _ in range(8):
        proxy.exec("true")
    events = proxy.stream("echo out; sleep 0.5")
    while next(events)[0] != "output":
        pass
    with limited(proxy.process, resource.RLIMIT_FSIZE, path.stat().st_size):
        *_, (kind, last, _) = events
    assert kind == "exit"
    assert last["exit_code"] == 125
    assert "is withheld" in last["error"]


@pytest.mark.slow
def test_a_server_that_stops_while_its_log_fails_answers_every_caller(
    audited: tuple[Proxy, pathlib.Path],
) -> None:
    proxy, path = audited
    for _ in range(8):
        proxy.exec("true")
    long = Background(lambda: proxy.post({"cmd": "sleep 64.75"}))
    wait_until_running("sleep\x0064.75")
    with limited(proxy.process, resource.RLIMIT_FSIZE, path.stat().st_size):
        assert proxy.stop() == 0

    status, answer = long.result()
    assert status == 500
    assert "is withheld" in answer["error"]


@pytest.mark.slow
def test_an_audit_pipe_takes_lines_of_any_length_as_fast_as_it_is_read(
    own: StartServer, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "audit"
    os.mkfifo(path)
    # The reader exists, and reads nothing.
    with contextlib.closing(open(os.open(path, os.O_RDONLY | os.O_NONBLOCK))):
        proxy = own("--audit-log", str(path))
        # The line has been read before the command runs.
        cmd = "#" * 300_000 + f"\n[ -s {tmp_path}/copy ] && echo hi"
        call = proxy.start_exec(cmd)
        time.sleep(0.2)
        reader = subprocess.Popen(f"exec cat {path} >{tmp_path}/copy", shell=True)
        assert call.result()["stdout"] == "hi\n"

    proxy.stop()
    assert reader.wait(15) == 0
    assert [line["cmd"] for line in noted(tmp_path / "copy")] == [cmd] * 2


def test_a_retried_command_is_logged_once(audited: tuple[Proxy, pathlib.Path]) -> None:
    proxy, path = audited
    proxy.exec("true")
    proxy.tmux("split-window", "-d", "-t", proxy.pane("poco"), "sleep 79")
    proxy.tmux("set-option", "-w", "-t", proxy.pane("poco"), "synchronize-panes", "on")
    # The first one is not typed.
    answers = [proxy.exec("true")["run_id"] for _ in range(3)]
    assert [line["run_id"] for line in noted(path)[2:]] == [
        run_id for run_id in answers for _ in range(2)
    ]


def test_hup_reopens_the_audit_log(audited: tuple[Proxy, pathlib.Path]) -> None:
    proxy, path = audited
    proxy.exec("echo old")
    rotated = path.with_name("rotated")
    path.rename(rotated)
    proxy.exec("echo old")
    assert len(noted(rotated)) == 4

    proxy.process.send_signal(signal.SIGHUP)
    eventually(path.exists)
    proxy.exec("echo new")
    assert len(noted(rotated)) == 4
    assert [line["cmd"] for line in noted(path)] == ["echo new"] * 2

    path.rename(path.with_name("again"))
    path.mkdir()
    proxy.process.send_signal(signal.SIGHUP)
    eventually(lambda: "Is a directory" in proxy.logged())
    assert proxy.post({"cmd": "true"})[0] == 503

    path.rmdir()
    for _ in range(2):
        # The server recovers by itself.
        proxy.exec("true")
        assert len(noted(path)) == 2
        path.unlink()


def test_a_killed_server_loses_no_line_of_an_answered_command(
    audited: tuple[Proxy, pathlib.Path],
) -> None:
    proxy, path = audited
    run_ids = [proxy.exec("true")["run_id"] for _ in range(20)]
    proxy.stop(signal.SIGKILL)
    assert [line["run_id"] for line in noted(path) if line["event"] == "end"] == run_ids


@pytest.mark.slow
def test_a_truncated_line_damages_no_other(audited: tuple[Proxy, pathlib.Path]) -> None:
    proxy, path = audited
    with path.open("a") as file:
        # As a server leaves it that was killed while writing.
        file.write('{"time": "2026-')
    proxy.process.send_signal(signal.SIGHUP)
    for _ in range(8):
        proxy.exec("true")
    long = proxy.start_exec("sleep 0.3; exit 5")
    eventually(lambda: len(path.read_text().splitlines()) == 18)
    with limited(proxy.process, resource.RLIMIT_FSIZE, path.stat().st_size + 20):
        eventually(lambda: "File too large" in proxy.logged())
        cut = path.with_name("cut")
        path.rename(cut)
        proxy.process.send_signal(signal.SIGHUP)
        assert long.result()["exit_code"] == 5

    proxy.exec("true")
    torn, *lines, cut_short = cut.read_text().splitlines()
    assert torn == '{"time": "2026-'
    assert cut_short[:8] == '{"time":'
    assert len(cut_short) == 20
    assert [json.loads(line)["event"] for line in lines] == ["start", "end"] * 8 + ["start"]
    assert [line["event"] for line in noted(path)] == ["end", "start", "end"]


def test_an_audit_log_behind_a_symlink_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "theirs").write_text("")
    (tmp_path / "audit").symlink_to(tmp_path / "theirs")
    done = run("server", "-p", "0", "--audit-log", str(tmp_path / "audit"))
    assert done.returncode == 1
    assert done.stdout == ""
    expected = f"cannot write the audit log {tmp_path}/audit: Too many levels of symbolic links"
    assert expected in done.stderr


# ==========================================================================
# Readiness
# ==========================================================================
def test_a_server_that_can_run_commands_is_ready(proxy: Proxy) -> None:
    assert proxy.ready() == (200, {"ready": True, "version": pp.VERSION})
    assert proxy.status("HEAD", "/ready") == 200


def test_readiness_needs_no_token_but_the_gate_stands_before_it(
    proxy: Proxy, guarded: Proxy
) -> None:
    assert guarded.status("GET", "/ready") == 200
    assert proxy.status("GET", "/ready", headers={"Host": "evil.example"}) == 403
    assert guarded.status("GET", "/ready", headers={"Origin": "http://evil.example"}) == 403
    assert proxy.status("POST", "/ready", "{}", JSON_TYPE) == 405


@contextlib.contextmanager
def moved_away(path: pathlib.Path) -> Iterator[None]:
    """Something has another name for a while."""
    away = path.with_name(path.name + ".away")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


@contextlib.contextmanager
def replaced(path: pathlib.Path, make: Callable[[pathlib.Path], object]) -> Iterator[None]:
    """Something else stands in its place for a while."""
    with moved_away(path):
        make(path)
        try:
            yield
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


def open_to_all(path: pathlib.Path) -> None:
    path.mkdir()
    path.chmod(0o777)


Trouble = Callable[[Proxy], contextlib.AbstractContextManager[None]]


def with_workspace(proxy: Proxy) -> pathlib.Path:
    return pathlib.Path(proxy.workspace)


def with_audit_folder(proxy: Proxy) -> pathlib.Path:
    return pathlib.Path(proxy.folder, "audit")


@contextlib.contextmanager
def no_audit_folder(proxy: Proxy) -> Iterator[None]:
    """The directory of the audit log is gone, and the log with it."""
    folder = with_audit_folder(proxy)
    shutil.rmtree(folder)
    try:
        yield
    finally:
        folder.mkdir()


@contextlib.contextmanager
def full_audit_log(proxy: Proxy) -> Iterator[None]:
    """The log may not grow, but the files of runs, which are shorter, may."""
    path = with_audit_folder(proxy) / "log"
    eventually(lambda: proxy.exec("true") and path.stat().st_size > 2 * pp.SAMPLE_SIZE)
    with limited(proxy.process, resource.RLIMIT_FSIZE, path.stat().st_size):
        yield


TROUBLES = [
    pytest.param(
        lambda proxy: moved_away(with_workspace(proxy)),
        "the workspace: No such file or directory",
        id="workspace-gone",
    ),
    pytest.param(
        lambda proxy: replaced(with_workspace(proxy), pathlib.Path.touch),
        "the workspace: Not a directory",
        id="workspace-a-file",
    ),
    pytest.param(no_audit_folder, "the audit log: No such file or directory", id="audit-log-gone"),
    pytest.param(
        lambda proxy: replaced(with_audit_folder(proxy) / "log", pathlib.Path.mkdir),
        "",
        id="audit-log-renamed",
    ),
    pytest.param(full_audit_log, "the audit log: File too large", id="audit-log-full"),
    pytest.param(
        lambda proxy: replaced(proxy.run_folder, pathlib.Path.touch),
        "the directory of the socket: expected one that only this user may write to",
        id="files-a-file",
    ),
    pytest.param(
        lambda proxy: replaced(proxy.run_folder, open_to_all),
        "the directory of the socket: expected one that only this user may write to",
        id="files-open-to-all",
    ),
    pytest.param(
        lambda proxy: replaced(proxy.run_folder.parent, pathlib.Path.touch),
        "the directory of the socket: Not a directory",
        id="files-without-a-place",
    ),
    pytest.param(
        lambda proxy: limited(proxy.process, resource.RLIMIT_FSIZE, 0),
        "the audit log: File too large; the directory of the socket: File too large;"
        " the directory for runs: File too large",
        id="everything-full",
    ),
]


@pytest.fixture(scope="module")
def troubled() -> Iterator[Proxy]:
    """A server with an audit log, for troubles that are over before the next."""
    folder = tempfile.mkdtemp(prefix="pc")
    os.mkdir(f"{folder}/audit")
    server = Proxy(
        "--audit-log", f"{folder}/audit/log", "--runs-dir", f"{folder}/runs", folder=folder
    )
    server.exec("true")
    yield server
    server.remove()


@pytest.mark.parametrize(("trouble", "reason"), with_slow(TROUBLES, "workspace-gone"))
def test_a_trouble_makes_the_server_unready_while_it_lasts(
    troubled: Proxy, trouble: Trouble, reason: str
) -> None:
    eventually(lambda: troubled.ready()[0] == 200)
    with trouble(troubled):
        eventually(lambda: troubled.unready() == reason)
        status, answer = troubled.ready()
        assert status == (503 if reason else 200)
        assert answer["ready"] is not bool(reason)
        # It is true: no command runs.
        assert (troubled.post({"cmd": "true"})[0] == 200) is not bool(reason)

    eventually(lambda: troubled.ready() == (200, {"ready": True, "version": pp.VERSION}))
    assert troubled.exec("echo ok")["stdout"] == "ok\n"


@pytest.mark.parametrize(
    ("make", "reason"),
    with_slow(
        [
            pytest.param(pathlib.Path.touch, "expected a directory of our own", id="a-file"),
            pytest.param(
                lambda path: path.symlink_to(path.parent),
                "expected a directory of our own",
                id="a-link",
            ),
            pytest.param(pathlib.Path.mkdir, "", id="empty"),
        ],
        "a-file",
        "empty",
    ),
)
def test_a_directory_for_runs_that_cannot_be_used_makes_the_server_unready(
    troubled: Proxy, make: Callable[[pathlib.Path], object], reason: str
) -> None:
    runs = pathlib.Path(troubled.folder, "runs")
    runs.mkdir(exist_ok=True)
    eventually(lambda: troubled.ready()[0] == 200)
    with replaced(runs, make):
        expected = f"the directory for runs: {reason}" if reason else ""
        eventually(lambda: troubled.unready() == expected)

    eventually(lambda: troubled.ready()[0] == 200)


@pytest.mark.slow
def test_an_unready_answer_has_the_shape_of_an_error_and_no_path(troubled: Proxy) -> None:
    with moved_away(with_workspace(troubled)):
        eventually(troubled.unready)
        assert troubled.ready()[1] == {
            "ready": False,
            "error": "the workspace: No such file or directory",
            "exit_code": 125,
            "version": pp.VERSION,
        }
        reason = f"No such file or directory: '{troubled.workspace}/.'"
        assert f'unready reason="the workspace: [Errno 2] {reason}"' in troubled.logged()

    eventually(lambda: troubled.ready()[0] == 200)
    assert troubled.logged().rstrip().endswith("INFO ready")


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A file system of 256 KiB; None where we may not mount one."""
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        yield None
        return

    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "place", ["audit", *(pytest.param(place, marks=pytest.mark.slow) for place in ("tmux", "runs"))]
)
def test_a_full_disk_makes_the_server_unready_until_there_is_space(
    own: StartServer, tmp_path: pathlib.Path, small_disk: pathlib.Path | None, place: str
) -> None:
    if small_disk is None:
        return

    words = {
        "tmux": [],
        "audit": ["--audit-log", f"{small_disk}/log"],
        "runs": ["--runs-dir", f"{small_disk}/runs"],
    }
    variables = {"TMUX_SOCKET": f"{small_disk}/s"} if place == "tmux" else {}
    server = own(*words[place], **variables)
    server.socket = variables.get("TMUX_SOCKET", server.socket)
    assert server.exec("true")["exit_code"] == 0

    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(pp.MIB))
    eventually(lambda: "No space left on device" in server.unready())
    # A short one may fit into files that are there; and output may be lost, but no command is.
    status = server.post({"cmd": f"true {'x' * 40_000}"})[0]
    assert status == (200 if place == "runs" else 503)

    filler.unlink()
    eventually(lambda: server.ready()[0] == 200)
    assert server.exec("true")["exit_code"] == 0


@pytest.mark.slow
def test_an_audit_log_that_nobody_reads_makes_the_server_unready(
    own: StartServer, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    server = own("--audit-log", str(path))
    assert server.ready()[0] == 200

    # Full, then without a reader.
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.close(writer)
    eventually(lambda: server.unready() == "the audit log: its reader does not read")
    os.close(reader)
    eventually(lambda: server.unready() == "the audit log: it has no reader")

    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 65536)
    eventually(lambda: server.ready()[0] == 200)
    os.close(reader)


def tmux_apart(folder: pathlib.Path) -> dict[str, str]:
    """A PATH in which tmux has a directory of its own, and leaves a line for each of its starts."""
    real = shutil.which("tmux")
    script = folder / "tmux"
    script.write_text(f'#!/bin/sh\necho "$@" >>{folder}/starts\nexec {real} "$@"\n')
    script.chmod(0o755)
    tools = folder / "tools"
    tools.mkdir()
    for name in ("sh", "bash", "cat", "env", "sleep"):
        (tools / name).symlink_to(shutil.which(name) or name)
    return {"PATH": f"{folder}:{tools}"}


@pytest.mark.slow
def test_without_tmux_the_server_is_unready_until_it_is_back(
    own: StartServer, tmp_path: pathlib.Path
) -> None:
    server = own(**tmux_apart(tmp_path))
    assert server.ready()[0] == 200
    with moved_away(tmp_path / "tmux"):
        eventually(lambda: server.unready() == "tmux is not in PATH: install tmux 3.2 or later")
        assert server.post({"cmd": "true"})[0] == 503

    eventually(lambda: server.ready()[0] == 200)
    assert server.exec("true")["exit_code"] == 0


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "not-connected"])
@pytest.mark.slow
def test_a_tmux_that_hangs_makes_the_server_unready_within_seconds(
    warm: StartServer, connected: bool
) -> None:
    server = warm()
    if not connected:
        server.stop()
        server.start()
    tmux = server.tmux_pid()
    os.kill(tmux, signal.SIGSTOP)
    try:
        eventually(server.unready)
        time.sleep(pp.READY_KEPT)
        begun = time.monotonic()
        calls = [Background(server.ready) for _ in range(20)]
        asking = f"{server.socket}\0{pp.NO_COMMAND}"
        if not connected:
            wait_until_running(asking)
        assert len(processes_with(asking)) == (0 if connected else 1)
        assert server.status("GET", "/health") == 200
        for call in calls:
            status, answer = call.result()
            assert status == 503
            assert answer["error"] == "tmux does not answer within 2 s"

        # Seconds, although the machine may be busy.
        assert time.monotonic() - begun < 10
    finally:
        os.kill(tmux, signal.SIGCONT)

    eventually(lambda: server.ready()[0] == 200)
    assert server.exec("true")["exit_code"] == 0
    wait_until_gone(f"{server.socket}\0{pp.NO_COMMAND}")


@pytest.mark.slow
def test_a_caller_that_leaves_ends_no_check_that_others_wait_for(warm: StartServer) -> None:
    server = warm()
    tmux = server.tmux_pid()
    os.kill(tmux, signal.SIGSTOP)
    try:
        time.sleep(pp.READY_KEPT)
        with server.raw_connection() as first:
            first.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            second = Background(server.ready)
            eventually(lambda: server.descriptors() and server.status("GET", "/health") == 200)

        assert second.result()[0] == 503
    finally:
        os.kill(tmux, signal.SIGCONT)
    eventually(lambda: server.ready()[0] == 200)


@pytest.mark.slow
def test_without_descriptors_the_server_is_unready(warm: StartServer) -> None:
    server = warm()
    kept = server.connect()

    def ready() -> tuple[int, str]:
        kept.request("GET", "/ready")
        answer = kept.getresponse()
        return answer.status, json.loads(answer.read()).get("error", "")

    assert ready() == (200, "")
    with limited(server.process, resource.RLIMIT_NOFILE, server.descriptors() + 2):
        eventually(lambda: ready()[1] == "descriptors: Too many open files")
        assert ready()[0] == 503

    eventually(lambda: ready() == (200, ""))
    kept.close()


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_server_that_stops_is_unready_at_once(warm: StartServer) -> None:
    server = warm()
    kept = server.connect()
    kept.request("GET", "/ready")
    assert json.loads(kept.getresponse().read())["ready"] is True
    running = server.start_exec("touch up; until [ -e go ]; do sleep 0.02; done")
    eventually(lambda: os.path.exists(f"{server.workspace}/up"))

    server.process.send_signal(signal.SIGTERM)
    # Its listener goes first.
    eventually(lambda: is_refused(server.port))
    kept.request("GET", "/ready")
    answer = kept.getresponse()
    assert answer.status == 503
    assert json.loads(answer.read())["error"] == "the server is stopping"

    pathlib.Path(server.workspace, "go").touch()
    assert running.result()["exit_code"] == 0
    kept.close()
    assert server.process.wait(20) == 0
    server.close_files()
    server.start()
    assert server.ready()[0] == 200


def times_in(folder: str) -> dict[str, tuple[int, int]]:
    """When each file below was changed."""
    found = {}
    for path in [pathlib.Path(folder), *pathlib.Path(folder).rglob("*")]:
        there = path.lstat()
        if path.name != "log":
            found[str(path)] = (there.st_mtime_ns, there.st_size)
    return found


@pytest.mark.slow
def test_a_check_makes_nothing_before_the_first_command(own: StartServer) -> None:
    server = own("--audit-log", "audit")
    os.unlink(f"{server.folder}/audit")
    before = times_in(server.folder)
    for _ in range(3):
        assert server.ready()[0] == 200
        time.sleep(pp.READY_KEPT)
    assert times_in(server.folder) == before
    assert not os.path.exists(server.socket)


@pytest.mark.slow
def test_a_person_sees_nothing_of_a_check(warm: StartServer) -> None:
    server = warm("--audit-log", "audit")
    server.pane("poco")

    def messages() -> int:
        """What tmux has noted of commands; ours here are others."""
        noted = server.tmux("show-messages")
        return noted.count("display-message") + noted.count(pp.NO_COMMAND)

    described = ("list-windows", "-a", "-F", "#{window_name} #{window_panes} #{window_activity}")

    def seen() -> tuple[Any, ...]:
        return server.screen("poco"), server.tmux(*described), messages(), times_in(server.folder)

    # The prompt after the command is looked at a few times more.
    before = seen()
    time.sleep(pp.PROMPT_TIMEOUT)
    while seen() != before:
        before = seen()
        time.sleep(pp.PROMPT_TIMEOUT)

    for _ in range(3):
        assert server.ready()[0] == 200
        time.sleep(pp.READY_KEPT)
    assert seen() == before


def test_many_who_ask_cost_no_more_than_a_few(own: StartServer, tmp_path: pathlib.Path) -> None:
    server = own(**tmux_apart(tmp_path))
    starts = tmp_path / "starts"
    begun = time.monotonic()
    before = len(starts.read_text().splitlines())
    for _ in range(100):
        assert server.ready()[0] == 200
    checks = len(starts.read_text().splitlines()) - before
    assert checks <= 1 + (time.monotonic() - begun) / pp.READY_KEPT


# ==========================================================================
# MCP messages
# ==========================================================================
MALFORMED = [
    pytest.param(b"", -32700, None, id="empty"),
    pytest.param(b"{", -32700, None, id="half-an-object"),
    pytest.param(b"\xff{}", -32700, None, id="no-utf-8"),
    pytest.param(b"[" * 100_000, -32700, None, id="deep"),
    pytest.param(
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":NaN}}', -32700, 1, id="nan"
    ),
    pytest.param(
        b'{"jsonrpc":"2.0","id":"x","method":"ping","params":{"a":1e999}}',
        -32700,
        "x",
        id="number-out-of-range",
    ),
    pytest.param(
        b'{"jsonrpc":"2.0","id":%s,"method":"ping"}' % (b"9" * 5000), -32700, None, id="long-id"
    ),
    pytest.param(b"[]", -32600, None, id="empty-batch"),
    pytest.param(b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', -32600, None, id="batch"),
    pytest.param(b'"ping"', -32600, None, id="text"),
    pytest.param(b"{}", -32600, None, id="empty-object"),
    pytest.param(b'{"id":1,"method":"ping"}', -32600, 1, id="no-version"),
    pytest.param(b'{"jsonrpc":2.0,"id":"a","method":"ping"}', -32600, "a", id="version-no-text"),
    *[
        pytest.param(
            b'{"jsonrpc":"2.0","id":%s,"method":"ping"}' % value, -32600, None, id=f"id-{name}"
        )
        for name, value in {
            "null": b"null",
            "true": b"true",
            "fraction": b"1.5",
            "object": b"{}",
            "list": b"[]",
        }.items()
    ],
    pytest.param(b'{"jsonrpc":"2.0","id":1}', -32600, 1, id="neither-method-nor-result"),
    pytest.param(
        b'{"jsonrpc":"2.0","id":1,"result":{},"error":{}}', -32600, 1, id="result-and-error"
    ),
    pytest.param(b'{"jsonrpc":"2.0","id":1,"method":7}', -32600, 1, id="method-no-text"),
    pytest.param(
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', -32600, 1, id="params-in-a-list"
    ),
]


@pytest.mark.parametrize(("body", "code", "id_"), MALFORMED)
def test_an_invalid_message_is_refused_with_its_code(
    proxy: Proxy, body: bytes, code: int, id_: Any
) -> None:
    status, _, answer = mcp(proxy, body)
    assert status == 400
    assert answer["error"]["code"] == code
    assert answer["id"] == id_
    assert "expected" in answer["error"]["message"]

    with pytest.raises(pp.ProxyError) as refused:
        pp.read_message(body)
    assert refused.value.rpc_code == code
    assert refused.value.request_id == id_


def without(message: dict[str, Any], name: str) -> dict[str, Any]:
    del message["params"]["_meta"][NS + name]
    return message


# Message, headers; status, code: mcp.md, section 4.
FAULTS = [
    pytest.param(
        without(modern("tools/list"), "clientCapabilities"),
        {},
        400,
        -32602,
        id="modern-without-capabilities",
    ),
    pytest.param(
        modern("tools/list", **{NS + "clientCapabilities": 3}),
        {},
        400,
        -32602,
        id="modern-capabilities-no-object",
    ),
    pytest.param(
        request("tools/list"),
        {"MCP_Protocol_Version": "2026-07-28"},
        400,
        -32602,
        id="modern-header-without-meta",
    ),
    pytest.param(
        request("tools/list"),
        {"MCP_Protocol_Version": "1999-01-01"},
        400,
        -32602,
        id="unknown-version-in-the-header-only",
    ),
    pytest.param(request("server/discover"), {}, 400, -32602, id="discover-without-meta"),
    pytest.param(
        modern("tools/list"), {"MCP_Protocol_Version": ""}, 400, -32020, id="version-header-empty"
    ),
    pytest.param(
        modern("tools/list"),
        {"MCP_Protocol_Version": "2025-11-25"},
        400,
        -32020,
        id="version-header-of-another-revision",
    ),
    pytest.param(modern("tools/list"), {"Mcp_Method": ""}, 400, -32020, id="method-header-empty"),
    pytest.param(
        modern("tools/list"),
        {"Mcp_Method": "TOOLS/LIST"},
        400,
        -32020,
        id="method-header-in-capitals",
    ),
    pytest.param(modern("tools/call", EXEC), {"Mcp_Name": ""}, 400, -32020, id="name-header-empty"),
    pytest.param(
        modern("tools/call", EXEC),
        {"Mcp_Name": "send_keys"},
        400,
        -32020,
        id="name-header-of-another-tool",
    ),
    pytest.param(
        modern("tools/call", EXEC),
        {"Mcp_Name": "=?base64?ZXhlY?="},
        400,
        -32020,
        id="name-header-base64-cut",
    ),
    pytest.param(
        modern("tools/call", EXEC),
        {"Mcp_Name": "=?base64?Z!hlYw==?="},
        400,
        -32020,
        id="name-header-base64-wrong",
    ),
    pytest.param(modern("tools/list", version="2099-01-01"), {}, 400, -32022, id="unknown-version"),
    pytest.param(
        modern("tools/list", version="2025-11-25"), {}, 400, -32022, id="legacy-version-in-meta"
    ),
    pytest.param(modern("initialize", INITIALIZE), {}, 404, -32601, id="modern-initialize"),
    *[
        pytest.param(modern(method), {}, 404, -32601, id=f"modern-{method}")
        for method in (
            "ping",
            "logging/setLevel",
            "prompts/list",
            "resources/list",
            "subscriptions/listen",
            "nope",
        )
    ],
    pytest.param(modern("tools/call", {"name": "nope"}), {}, 400, -32602, id="modern-unknown-tool"),
    pytest.param(
        modern("tools/list", {"cursor": "x"}), {}, 400, -32602, id="modern-unknown-cursor"
    ),
    pytest.param(
        modern("tools/call", {**EXEC, "arguments": []}),
        {},
        400,
        -32602,
        id="modern-arguments-in-a-list",
    ),
    pytest.param(
        modern("tools/call", EXEC, progressToken=1.5),
        {},
        400,
        -32602,
        id="modern-progress-token-no-integer",
    ),
    pytest.param(
        modern("tools/call", EXEC, **{NS + "logLevel": "loud"}),
        {},
        400,
        -32602,
        id="modern-unknown-log-level",
    ),
    pytest.param(
        modern("tools/list"),
        {"MCP_Protocol_Version": "2025-11-25", "Mcp_Method": ""},
        400,
        -32020,
        id="two-headers-wrong",
    ),
    pytest.param(
        {"jsonrpc": "2.0", "method": "notifications/x"},
        {"MCP_Protocol_Version": "1999-01-01"},
        400,
        -32600,
        id="notification-of-an-unknown-version",
    ),
    pytest.param(
        [modern("tools/list")],
        {"MCP_Protocol_Version": "2026-07-28"},
        400,
        -32600,
        id="modern-batch",
    ),
    pytest.param(
        {"jsonrpc": "2.0", "id": 1, "result": {}},
        {"MCP_Protocol_Version": "2026-07-28"},
        400,
        -32600,
        id="modern-response",
    ),
    pytest.param(request("tools/list"), {}, 400, -32600, id="legacy-without-a-session"),
    pytest.param(
        request("tools/list"), {"Mcp_Session_Id": "gone"}, 404, -32600, id="legacy-session-gone"
    ),
    pytest.param(
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"Mcp_Session_Id": "gone"},
        404,
        -32600,
        id="notification-to-a-session-gone",
    ),
    pytest.param(
        request("initialize", {**INITIALIZE, "protocolVersion": 7}),
        {},
        200,
        -32602,
        id="version-no-text",
    ),
]


@pytest.mark.parametrize(("message", "headers", "status", "code"), FAULTS)
def test_every_fault_of_a_message_has_its_status_and_code(
    proxy: Proxy, message: Any, headers: dict[str, str], status: int, code: int
) -> None:
    got, _, answer = mcp(proxy, message, **headers)
    assert got == status, answer
    assert answer["error"]["code"] == code, answer
    assert answer["id"] == (
        message["id"] if isinstance(message, dict) and "id" in message else None
    )

    if code == -32022:
        asked = message["params"]["_meta"][NS + "protocolVersion"]
        assert answer["error"]["data"] == {"supported": ["2026-07-28"], "requested": asked}


@pytest.mark.parametrize(
    "id_",
    [
        pytest.param(0, id="zero"),
        pytest.param(1, id="one"),
        pytest.param("7", id="text-of-a-digit"),
        pytest.param("", id="empty-text"),
        pytest.param(-3, id="negative"),
        pytest.param(2**60, id="large"),
        pytest.param("\ud800", id="half-a-character"),
        pytest.param("é" * 100, id="long-text"),
    ],
)
def test_an_id_comes_back_as_it_was_sent(proxy: Proxy, id_: Any) -> None:
    _, _, answer = mcp(proxy, modern("tools/list", id_=id_))
    assert answer["id"] == id_
    assert type(answer["id"]) is type(id_)


def test_modern_fields_are_in_modern_answers_only(proxy: Proxy) -> None:
    server = {"name": "pocketcoder", "version": pp.VERSION}
    found = mcp_result(proxy, modern("server/discover"))
    assert found["supportedVersions"] == ["2026-07-28"]
    assert found["capabilities"] == {"tools": {}}

    listed = mcp_result(proxy, modern("tools/list"))
    for result in (found, listed):
        assert result["resultType"] == "complete"
        assert result["cacheScope"] == "private"
        assert type(result["ttlMs"]) is int
        assert result["_meta"] == {f"{NS}serverInfo": server}

    called = mcp_result(proxy, modern("tools/call", EXEC))
    assert called["resultType"] == "complete"
    assert called["_meta"] == {f"{NS}serverInfo": server}
    assert "ttlMs" not in called

    session = opened(proxy)
    for method, params in (("tools/list", {}), ("tools/call", EXEC), ("ping", {})):
        result = mcp_result(proxy, request(method, params), Mcp_Session_Id=session)
        assert {"resultType", "ttlMs", "cacheScope", "_meta"} & set(result) == set()

    again = mcp_result(proxy, request("tools/list"), Mcp_Session_Id=session)
    assert again["tools"] == listed["tools"]


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        pytest.param(
            "2024-11-05",
            {"annotations", "title", "outputSchema", "structuredContent"},
            id="2024-11-05",
        ),
        pytest.param("2025-03-26", {"title", "outputSchema", "structuredContent"}, id="2025-03-26"),
        pytest.param("2025-06-18", set(), id="2025-06-18"),
        pytest.param("2025-11-25", set(), id="2025-11-25"),
    ],
)
def test_a_client_gets_the_fields_of_its_revision(
    proxy: Proxy, version: str, missing: set[str]
) -> None:
    session = opened(proxy, version)
    tools = mcp_result(proxy, request("tools/list"), Mcp_Session_Id=session)["tools"]
    called = mcp_result(proxy, request("tools/call", EXEC), Mcp_Session_Id=session)
    fields = {"annotations", "title", "outputSchema", "structuredContent"}
    assert fields - (set(tools[0]) | set(called)) == missing


def test_an_unknown_revision_gets_our_latest_legacy_one(proxy: Proxy) -> None:
    for asked in ("2026-07-28", "1.0", ""):
        answer = mcp(proxy, request("initialize", {**INITIALIZE, "protocolVersion": asked}))[2]
        assert answer["result"]["protocolVersion"] == "2025-11-25"


def test_headers_are_read_as_http_and_mcp_require(proxy: Proxy) -> None:
    call = modern("tools/call", EXEC)
    assert mcp_status(proxy, call, Mcp_Name="  exec ") == 200
    assert mcp_status(proxy, call, Mcp_Name="=?base64?ZXhlYw==?=") == 200

    connection = proxy.connect()
    body = json.dumps(call).encode()
    connection.putrequest("POST", "/mcp")

    for name, value in (
        ("MCP-Protocol-Version", "2026-07-28"),
        ("mcp-method", "tools/call"),
        ("Mcp-Name", "exec"),
    ):
        connection.putheader(name, value)

    # Twice: a router in between may read another one than we do.
    connection.putheader("Mcp-Name", "exec")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    assert answer["error"]["code"] == -32020


def test_a_legacy_fault_in_a_session_is_an_error_inside_a_200(proxy: Proxy) -> None:
    session = opened(proxy)
    for message, code in (
        (request("nope"), -32601),
        (request("prompts/list"), -32601),
        (request("tools/call", {"name": "nope"}), -32602),
        (request("logging/setLevel", {"level": "loud"}), -32602),
    ):
        status, _, answer = mcp(proxy, message, Mcp_Session_Id=session)
        assert status == 200
        assert answer["error"]["code"] == code

    assert mcp_result(proxy, request("ping"), Mcp_Session_Id=session) == {}


def test_messages_without_an_answer_get_202(proxy: Proxy) -> None:
    session = opened(proxy)
    for message in (
        {"jsonrpc": "2.0", "method": "notifications/unknown"},
        {
            "jsonrpc": "2.0",
            "method": "notifications/cancelled",
            "params": {"requestId": "none"},
        },
        {
            "jsonrpc": "2.0",
            "method": "notifications/cancelled",
            "params": {"requestId": {}},
        },
        {"jsonrpc": "2.0", "id": 5, "result": {}},
    ):
        assert mcp(proxy, message, Mcp_Session_Id=session)[::2] == (202, None)

    noted = {
        "jsonrpc": "2.0",
        "method": "notifications/cancelled",
        "params": {"requestId": 1},
    }
    assert mcp(proxy, noted, MCP_Protocol_Version="2026-07-28")[::2] == (202, None)


def pick(dice: random.Random, values: list[Any]) -> Any:
    return dice.choice(values)


def test_the_core_survives_any_message(proxy: Proxy) -> None:
    """Decisions or a BadMessage, whatever comes; a fixed seed."""
    dice = random.Random(4)
    methods = [
        "initialize",
        "ping",
        "tools/list",
        "tools/call",
        "server/discover",
        "logging/setLevel",
        "nope",
    ]
    methods += ["notifications/cancelled"]
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        1.5,
        "",
        "exec",
        [],
        {},
        {"a": []},
        "2026-07-28",
        "\ud800",
        10**30,
    ]

    for _ in range(20_000):
        params = {
            dice.choice(
                ["name", "arguments", "_meta", "level", "cursor", "protocolVersion", "requestId"]
            ): pick(dice, values)
            for _ in range(dice.randrange(5))
        }

        if dice.random() < 0.5:
            params["_meta"] = {
                NS + "protocolVersion": pick(dice, values),
                NS + "clientCapabilities": pick(dice, values),
            }

        message = {
            "jsonrpc": "2.0",
            "id": pick(dice, values),
            "method": dice.choice(methods),
            "params": params,
        }
        for name in [name for name in message if dice.random() < 0.05]:
            message[name] = pick(dice, values)

        try:
            read = pp.read_message(json.dumps(message))
            header = dice.choice([None, "2025-11-25", "2026-07-28"])
            pp.check_era(read, header)
            era = pp.era_of(read, header) is pp.Era.MODERN
            if era and pp.is_request(read):
                pp.check_envelope(read, None)
            pp.step(read, pp.MODERN if era else "2025-11-25", pp.built_in_facts())
        except pp.BadMessage as refused:
            pp.to_json(pp.refusal(refused.request_id, refused)).encode()


def test_every_answer_has_the_id_and_the_shape_of_its_era() -> None:
    dice = random.Random(9)
    methods = (
        "initialize",
        "ping",
        "tools/list",
        "tools/call",
        "server/discover",
        "logging/setLevel",
        "prompts/get",
    )
    likely = (
        "exec",
        "info",
        "2025-03-26",
        pp.MODERN,
        {"progressToken": 1},
        {NS + "logLevel": "loud"},
        "=?base64?eA==?=",
    )
    answered = 0

    for _ in range(2000 * FUZZ):
        names = ("name", "arguments", "_meta", "level", "cursor", "protocolVersion", "uri")
        params: Any = {
            name: junk(dice, *likely) for name in dice.choices(names, k=dice.randrange(4))
        }

        if dice.random() < 0.7:
            claims = {NS + "protocolVersion": pp.MODERN, NS + "clientCapabilities": {}}
            params["_meta"] = {
                **claims,
                **({NS + "protocolVersion": junk(dice)} if dice.random() < 0.2 else {}),
            }

        sent = {
            "jsonrpc": "2.0",
            "id": junk(dice, 1, "1"),
            "method": junk(dice, *methods),
            "params": params,
        }
        sent |= {dice.choice([*sent]): junk(dice)} if dice.random() < 0.1 else {}
        body = json.dumps(sent).encode()
        headers = {
            "MCP-Protocol-Version": pp.MODERN,
            "Mcp-Method": sent["method"],
            "Mcp-Name": junk(dice, *likely),
        }
        headers |= {"Mcp-Param-X": junk(dice, *likely)}
        given = {name: [value] for name, value in headers.items() if isinstance(value, str)}
        headers_of = partial(lambda given, name: given.get(name, []), given)

        try:
            read = pp.read_message(spoil(dice, body) if dice.random() < 0.2 else body)
            header = dice.choice((None, None, *pp.LEGACY, pp.MODERN, words(dice)))
            pp.check_era(read, header)
            era = pp.era_of(read, header) is pp.Era.MODERN
            if not pp.is_request(read):
                continue
            if era:
                pp.check_envelope(read, dice.choice((None, headers_of)))
                pp.check_parameters(read, headers_of, {"a": "X"} if dice.random() < 0.1 else {})
            decisions = pp.step(
                read, pp.MODERN if era else dice.choice(pp.LEGACY), pp.built_in_facts()
            )
        except pp.BadMessage as refused:
            answer = pp.refusal(refused.request_id, refused)
            assert answer["error"]["code"] in (-32700, -32600, -32601, -32602, -32020, -32022), body
            assert set(json.loads(pp.to_json(answer).encode())) == {"jsonrpc", "id", "error"}, body
            continue

        for decision in decisions:
            if isinstance(decision, pp.Send):
                answered += 1
                answer = json.loads(pp.to_json(decision.message).encode())
                assert answer["jsonrpc"] == "2.0", body
                assert answer["id"] == read["id"], body
                assert type(answer["id"]) is type(read["id"]), body
                assert ("resultType" in answer["result"]) == era, body
            elif isinstance(decision, pp.CallTool):
                assert decision.id == read["id"], body
                assert decision.name in pp.TOOLS, body

    assert answered > 100 * FUZZ


def test_an_event_carries_any_message_unchanged() -> None:
    dice = random.Random(10)
    for _ in range(1000 * FUZZ):
        message = {"jsonrpc": "2.0", "result": [junk(dice) for _ in range(3)]}
        kind, data, *end = asyncio.run(pp.sse_event(message)).encode().decode().splitlines()
        assert kind == "event: message"
        assert data[:6] == "data: "
        assert end == [""]
        assert json.loads(data[6:]) == message


# ==========================================================================
# Sessions
# ==========================================================================
def test_a_closed_stream_cancels_a_modern_call(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    params = {"name": "exec", "arguments": {"cmd": "echo go; sleep 71.5", "agent_name": agent}}
    message = modern("tools/call", params, progressToken=1)
    names = {
        "MCP_Protocol_Version": "2026-07-28",
        "Mcp_Method": "tools/call",
        "Mcp_Name": "exec",
    }
    left = stream(proxy, "/mcp", message, **names)
    assert left.next()["params"]["message"] == "go"

    left.close()
    wait_until_gone("sleep\x0071.5")
    # This connection breaks before any answer.
    unanswered = proxy.connect()
    head = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): value for name, value in names.items()},
    }
    params = {"name": "exec", "arguments": {"cmd": "sleep 71.6", "agent_name": agent}}
    unanswered.request("POST", "/mcp", json.dumps(modern("tools/call", params)), head)
    wait_until_running("sleep\x0071.6")
    unanswered.close()
    wait_until_gone("sleep\x0071.6")


@pytest.mark.slow
def test_a_closed_stream_cancels_no_legacy_call_but_a_notification_does(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    session = opened(proxy)
    other = opened(proxy)
    arguments = {"cmd": "echo go; sleep 72.5", "agent_name": agent}
    message = request(
        "tools/call",
        {
            "name": "exec",
            "arguments": arguments,
            "_meta": {"progressToken": 1},
        },
        id_=9,
    )
    left = stream(proxy, "/mcp", message, Mcp_Session_Id=session)
    assert left.next()["params"]["message"] == "go"

    left.close()
    time.sleep(0.5)
    assert processes_with("sleep\x0072.5")

    cancel = {
        "jsonrpc": "2.0",
        "method": "notifications/cancelled",
        "params": {"requestId": 9, "reason": "user"},
    }
    # The same id in another session cancels nothing.
    assert mcp_status(proxy, cancel, Mcp_Session_Id=other) == 202
    # The same id in another type cancels nothing.
    status = mcp_status(proxy, {**cancel, "params": {"requestId": "9"}}, Mcp_Session_Id=session)
    assert status == 202

    time.sleep(0.3)
    assert processes_with("sleep\x0072.5")
    assert mcp_status(proxy, cancel, Mcp_Session_Id=session) == 202
    wait_until_gone("sleep\x0072.5")

    again = stream(proxy, "/mcp", message, Mcp_Session_Id=session)
    assert again.next()["params"]["message"] == "go"
    assert mcp_status(proxy, cancel, Mcp_Session_Id=session) == 202

    # The stream ends without an answer.
    for got in iter(again.next, None):
        assert got["method"] == "notifications/progress"


def test_an_id_in_flight_cannot_be_used_twice(proxy: Proxy, agent: str, stream: OpenStream) -> None:
    session = opened(proxy)
    arguments = {"cmd": "echo go; sleep 73.5", "agent_name": agent}
    message = request(
        "tools/call",
        {
            "name": "exec",
            "arguments": arguments,
            "_meta": {"progressToken": 1},
        },
        id_=9,
    )
    first = stream(proxy, "/mcp", message, Mcp_Session_Id=session)
    assert first.next()["params"]["message"] == "go"
    assert mcp_error_code(proxy, message, Mcp_Session_Id=session) == -32600
    assert mcp_status(proxy, b"", "DELETE", Mcp_Session_Id=session) == 204

    while first.next() is not None:
        pass
    wait_until_gone("sleep\x0073.5")
    assert mcp_status(proxy, message, Mcp_Session_Id=session) == 404


def test_a_session_belongs_to_the_credential_that_opened_it(
    own: StartServer, stream: OpenStream
) -> None:
    # A server without a token takes any credential, but remembers it.
    proxy = own()
    session = opened(proxy, Authorization="Bearer mine")
    for header in ("", "Bearer yours"):
        status = mcp_status(proxy, request("ping"), Mcp_Session_Id=session, Authorization=header)
        assert status == 404
    status = mcp_status(proxy, request("ping"), Mcp_Session_Id=session, Authorization="Bearer mine")
    assert status == 200
    assert (
        stream(proxy, "/sse?session_id=named&token=mine").next()
        == "/messages?session_id=named&token=mine"
    )
    assert stream(proxy, "/sse?session_id=named&token=yours").status == 404
    assert mcp_status(proxy, request("ping"), path="/messages?session_id=named&token=yours") == 404
    status = mcp_status(
        proxy, request("ping"), path="/messages?session_id=named", Authorization="Bearer mine"
    )
    assert status == 202
    # A session of another transport is not found.
    status = mcp_status(proxy, request("ping"), Mcp_Session_Id="named", Authorization="Bearer mine")
    assert status == 404


def test_commands_are_reported_to_the_session_they_name(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    listening = stream(proxy, f"/sse?session_id={agent}")
    assert listening.next() == f"/messages?session_id={agent}"
    answer = proxy.exec("echo told; exit 4", agent_name=agent, session_id=agent)
    begun = listening.next()
    ended = listening.next()

    for told, event in ((begun, "start"), (ended, "end")):
        assert told["method"] == "notifications/message"
        assert told["params"]["level"] == "info"
        assert told["params"]["logger"] == "exec"

        data = told["params"]["data"]
        assert data["event"] == event
        assert data["run_id"] == answer["run_id"]
        assert data["agent_name"] == agent

    assert begun["params"]["data"]["cmd"] == "echo told; exit 4"
    assert ended["params"]["data"]["exit_code"] == 4
    assert ended["params"]["data"]["ended"] == "exit"

    left = proxy.connect()
    left.request(
        "POST",
        "/exec",
        json.dumps(
            {
                "cmd": "sleep 77.5",
                "agent_name": agent,
                "session_id": agent,
            }
        ),
        JSON_TYPE,
    )
    wait_until_running("sleep\x0077.5")
    left.close()
    assert listening.next()["params"]["data"]["cmd"] == "sleep 77.5"

    told = listening.next()["params"]["data"]
    assert told["exit_code"] == 143
    assert told["ended"] == "cancelled"
    assert told["duration_ms"] > 0

    session = opened(proxy)
    # Nobody listens yet.
    proxy.exec("true", agent_name=agent, session_id=session)
    get = stream(proxy, "/mcp", None, Mcp_Session_Id=session)
    missed = [get.next()["params"]["data"] for _ in range(2)]
    assert [each["event"] for each in missed] == ["start", "end"]
    assert missed[0]["cmd"] == "true"

    proxy.exec("echo second", agent_name=agent, session_id=session)
    assert get.next()["params"]["data"]["cmd"] == "echo second"
    status = mcp_status(
        proxy, request("logging/setLevel", {"level": "error"}), Mcp_Session_Id=session
    )
    assert status == 200
    assert get.next()["params"]["data"]["event"] == "end"

    proxy.exec("echo third", agent_name=agent, session_id=session)
    status = mcp_status(
        proxy, request("logging/setLevel", {"level": "info"}), Mcp_Session_Id=session
    )
    assert status == 200

    proxy.exec("echo fourth", agent_name=agent, session_id=session)
    assert get.next()["params"]["data"]["cmd"] == "echo fourth"


@pytest.mark.slow
def test_a_client_that_reconnects_gets_missed_messages_and_running_calls(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    path = f"/messages?session_id={agent}"
    first = stream(proxy, f"/sse?session_id={agent}")
    assert first.next() == path

    arguments = {"cmd": "sleep 0.7; echo done", "agent_name": agent}
    status = mcp_status(
        proxy, request("tools/call", {"name": "exec", "arguments": arguments}, id_=5), path=path
    )
    assert status == 202

    first.close()
    time.sleep(0.3)
    for number in range(3):
        assert mcp_status(proxy, request("ping", id_=f"away{number}"), path=path) == 202
    time.sleep(0.8)
    second = stream(proxy, f"/sse?sessionId={agent}")
    assert second.next() == path
    assert [second.next()["id"] for _ in range(3)] == ["away0", "away1", "away2"]
    assert text_of(second.next()["result"]) == "done\n"

    # This stream replaces the second.
    third = stream(proxy, f"/sse?session_id={agent}")
    assert third.next() == path
    assert second.next() is None
    assert mcp_status(proxy, request("ping", id_="last"), path=path) == 202
    assert third.next()["id"] == "last"


def test_a_session_of_one_stream_ends_with_it_and_so_do_its_calls(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    opened = stream(proxy, "/sse")
    path = opened.next()
    assert re.fullmatch(r"/messages\?session_id=[0-9a-f]{32}", path)

    arguments = {"cmd": "sleep 74.5", "agent_name": agent}
    status = mcp_status(
        proxy, request("tools/call", {"name": "exec", "arguments": arguments}), path=path
    )
    assert status == 202

    wait_until_running("sleep\x0074.5")
    opened.close()
    wait_until_gone("sleep\x0074.5")
    assert mcp_status(proxy, request("ping"), path=path) == 404


def test_too_many_waiting_messages_end_the_session_and_are_logged(
    own: StartServer, stream: OpenStream
) -> None:
    proxy = own()
    stream(proxy, "/sse?session_id=away").close()
    path = "/messages?session_id=away"
    statuses = [mcp_status(proxy, request("ping", id_=number), path=path) for number in range(102)]
    assert statuses == [202] * 101 + [404]
    assert "session end id=away why=100 messages wait" in proxy.logged()


def test_named_sessions_and_idle_ones_expire(own: StartServer, stream: OpenStream) -> None:
    async def expiring() -> list[str]:
        driver = pp.PocketCoderDriver("/nowhere/at/all", "x")
        state = pp.AppState(pp.SessionMap(), driver)
        server = state.servers[""]
        server.session_idle = 0.05
        idle = state.sessions.open(pp.Session(state, server, "http", pp.Lifetime.HTTP))
        idle.end_or_look_later()
        named = state.sessions.open(
            pp.Session(state, server, "sse", pp.Lifetime.NAMED, session_id="named")
        )
        async with named.stream():
            await asyncio.sleep(0.1)
            assert "named" in state.sessions

        assert "named" in state.sessions
        await asyncio.sleep(0.3)
        return [*state.sessions]

    with pytest.MonkeyPatch.context() as patch:
        # Idle sessions are looked for this often.
        patch.setattr(pp, "KEEP_ALIVE", 0.05)
        patch.setattr(pp, "SESSION_KEPT", 0.05)
        assert asyncio.run(expiring()) == []


def test_the_number_of_sessions_is_bounded() -> None:
    async def crowded() -> None:
        state = pp.AppState(pp.SessionMap(), pp.PocketCoderDriver("/nowhere/at/all", "x"))
        first = state.sessions.open(pp.Session(state, state.servers[""], "http", pp.Lifetime.HTTP))
        for _ in range(pp.MAX_SESSIONS):
            session = state.sessions.open(
                pp.Session(state, state.servers[""], "http", pp.Lifetime.HTTP)
            )
            session.streams += 1

        # The session that was unused longest made room.
        assert first.session_id not in state.sessions
        with pytest.raises(pp.NoTerminal):
            state.sessions.open(pp.Session(state, state.servers[""], "http", pp.Lifetime.HTTP))

    asyncio.run(crowded())


# ==========================================================================
# Child lines
# ==========================================================================
def test_lines_are_split_the_same_however_they_arrive() -> None:
    dice = random.Random(5)
    texts = [b"", b"a", b"x" * 20, b"y" * 21, b"{" + b"z" * 9000 + b"}", b"end"]
    expected = [
        text
        if len(text) <= 20
        else pp.TooLong(text[: pp.MAX_ENDS], text[-pp.MAX_ENDS :], len(text))
        for text in texts
    ]

    for _ in range(5):
        for pieces in cuts(dice, b"\n".join(texts)):
            lines = pp.Lines(20)
            got = [line for piece in pieces for line in lines.feed(piece)]
            shown = [
                each if isinstance(each, bytes) else (each.head[:20], each.tail[-20:], each.size)
                for each in [*got, lines.rest()]
            ]
            assert shown == [
                each if isinstance(each, bytes) else (each.head[:20], each.tail[-20:], each.size)
                for each in expected
            ]


@pytest.mark.parametrize(
    ("head", "tail", "id_"),
    [
        pytest.param(b'{"jsonrpc":"2.0","id":7,"result":{"a', b'"}}', 7, id="before the result"),
        pytest.param(b'\xef\xbb\xbf { "id" : 7 , "x', b'"}}', 7, id="behind a byte order mark"),
        pytest.param(b'{"result":{"id":3,"x', b'"},"jsonrpc":"2.0","id":7}', 7, id="at the end"),
        pytest.param(
            b'{"result":{"id":3,"x', b'"} , "id" : 7 }\r', 7, id="at the end, with blanks"
        ),
        pytest.param(b'{"result":{"x', b'","id":3}}', None, id="in the result only"),
        pytest.param(b'{"result":"x', b',\\"id\\":3}"}', None, id="in a text only"),
        pytest.param(b'{"method":"notifications/message","params":{"x', b'"}}', None, id="none"),
        pytest.param(b"no JSON", b"", None, id="no JSON"),
    ],
)
def test_the_id_of_a_long_answer_is_found_at_its_ends(head: bytes, tail: bytes, id_: Any) -> None:
    assert pp.id_of_long(pp.TooLong(head, tail, 1 << 30)) == id_


# ==========================================================================
# MCP children
# ==========================================================================
@pytest.mark.parametrize(("era", "server"), ERAS)
@pytest.mark.slow
def test_calls_to_a_child_that_dies_fail_at_once_and_it_is_restarted(
    own: StartServer,
    fixtures: pathlib.Path,
    stream: OpenStream,
    era: str,
    server: str,
) -> None:
    proxy = own(f"--mcp-server=x={sys.executable} -S {fixtures} mcp-fixture {server}")

    def state() -> Any:
        return proxy.servers()[0]

    def reached() -> Any:
        """A call by a new client; it is refused while the server is held back."""
        # There is no session in this era.
        with contextlib.suppress(KeyError):
            return Client(proxy, era, "x", stream).call("pid").get("content")

    client = Client(proxy, era, "x", stream)
    process = int(text_of(client.call("pid")))
    waiting = Background(partial(client.call, "hang", id_="h"))
    time.sleep(0.2)
    started = time.monotonic()
    os.kill(process, signal.SIGKILL)
    failed = waiting.result()
    assert time.monotonic() - started < 5
    assert failed["code"] == -32603, failed
    assert "ended with -9" in failed["message"], failed
    assert state()["state"] == "failed"
    assert "ended with -9" in state()["error"]

    if era == server == "legacy":
        eventually(
            lambda: mcp_status(proxy, request("ping"), path=client.path, **client.headers) == 404
        )

    eventually(reached)
    assert state()["state"] == "running"
    assert state()["restarts"] == 1

    for name in ("die", "half"):
        failed = Client(proxy, era, "x", stream).call(name)
        assert failed["code"] == -32603
        assert "before it answered" in failed["message"]
        eventually(reached)

    assert state()["restarts"] == 3


@pytest.mark.slow
def test_noisy_servers_still_get_answers_through(client: Client) -> None:
    assert text_of(client.call("noise")) == "after the noise"
    *told, answer = client.ask("tools/call", {"name": "flood", "arguments": {"lines": 3000}})
    assert text_of(answer["result"]) == "flooded"
    if client.era == "legacy":
        assert [each["params"]["data"] for each in told] == [
            f"log line {number}" for number in range(3000)
        ]
    assert text_of(client.call("flood", lines=500, to="stderr")) == "flooded"
    assert text_of(client.call("test_simple_text"))


def odd_server() -> None:
    """A stdio MCP server whose answers and notices make no sense."""
    import json
    import os
    import sys
    import time

    def say(**fields: Any) -> None:
        print(json.dumps({"jsonrpc": "2.0", **fields}), flush=True)

    def notify_oddly(id_: Any) -> None:
        odd_params: list[dict[str, Any]] = [
            {"progressToken": id_},
            {"progressToken": {}},
            {"_meta": 3},
            {"uri": {}},
            {"_meta": {"io.modelcontextprotocol/subscriptionId": []}},
        ]
        for params in odd_params:
            for method in ("progress", "message", "tools/list_changed", "resources/updated"):
                say(method="notifications/" + method, params=params)
        for wrong in (99999, str(id_), True):
            say(id=wrong, result={})

    def answer(id_: Any, method: str, name: Any) -> None:
        results = {"null": None, "list": [1], "text": "x"}
        if method == "initialize":
            for number in range(300):
                say(method="notifications/message", params={"level": "info", "data": number})
            result = {
                "protocolVersion": 7,
                "capabilities": ["x"],
                "serverInfo": None,
                "_meta": 3,
            }
            say(id=id_, result=result)
        elif method == "tools/list":
            tools = [None, 3, {"name": None}, {"name": "t", "inputSchema": []}]
            say(id=id_, result={"tools": tools})
        elif name in results:
            say(id=id_, result=results[name])
        elif name == "code":
            say(id=id_, error={"message": "no code"})
        elif name in ("nan", "infinity"):
            wrong = "NaN" if name == "nan" else "1e999"
            print(f'{{"jsonrpc":"2.0","id":{id_},"result":{{"x":{wrong}}}}}', flush=True)
        elif name == "notes":
            notify_oddly(id_)
            say(id=id_, result={"right": 1})
            say(id=id_, result={"twice": 1})
        elif name == "close":
            os.close(1)
            time.sleep(1)
        else:
            say(id=id_, error={"code": -32601, "message": "no"})

    for line in sys.stdin:
        got = json.loads(line)
        if "id" in got:
            answer(got["id"], got["method"], (got.get("params") or {}).get("name"))


@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.slow
def test_whatever_a_server_answers_the_client_gets_an_answer(
    own: StartServer, tmp_path: pathlib.Path, stream: OpenStream, era: str
) -> None:
    (tmp_path / "odd.py").write_text(program_of(odd_server))
    proxy = own(f"--mcp-server=odd={sys.executable} -S {tmp_path}/odd.py")
    client = Client(proxy, era, "odd", stream)
    for name in ("null", "list", "text", "code", "nan", "infinity"):
        failed = client.call(name)
        assert failed["code"] == -32603
        assert re.search("answered (with|badly)", failed["message"])

    *_, answer = client.ask("tools/call", {"name": "notes", "arguments": {}})
    assert answer["result"]["right"] == 1
    if era == "modern":
        assert client.result("server/discover")["capabilities"] == {}
    started = time.monotonic()
    assert "closed its output" in client.call("close")["message"]
    assert time.monotonic() - started < 5
    assert "Traceback" not in proxy.logged()


@pytest.mark.parametrize(("era", "server"), ERAS)
@pytest.mark.slow
def test_the_next_request_after_a_crash_waits_for_the_new_process(
    own: StartServer, peculiar: str, stream: OpenStream, era: str, server: str
) -> None:
    proxy = own(f"--mcp-server=x={peculiar} era={server}")
    bystander = Client(proxy, "legacy", "x", stream)
    for _ in range(5):
        crashing = Client(proxy, era, "x", stream)
        failed = crashing.call("crash")
        assert failed["code"] == -32603
        assert "ended with 3, before it answered" in failed["message"]

        if era == server == "legacy":
            status = mcp_status(proxy, request("ping"), path=crashing.path, **crashing.headers)
            assert status == 404
            crashing = Client(proxy, era, "x", stream)

        assert type(said(crashing.call("pid"))) is int

    assert type(said(bystander.call("pid"))) is int
    assert proxy.servers()[0]["state"] == "running"


def test_a_crash_leaves_the_processes_of_other_clients_alone(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    proxy = own(f"--mcp-server=x={peculiar}")
    one, two = (
        Client(proxy, "modern", "x", stream, info={"name": name, "version": "1"})
        for name in ("one", "two")
    )
    assert [said(each.call("count")) for each in (one, two)] == [1, 1]
    assert "ended with 3" in one.call("crash")["message"]
    assert said(two.call("count")) == 2
    assert said(one.call("count")) == 1


@pytest.mark.slow
def test_only_a_process_that_never_answered_is_restarted_with_a_delay(
    own: StartServer,
) -> None:
    proxy = own("--mcp-server=short=sh -c 'echo oh no >&2; exit 7'")

    def attempt() -> tuple[str, float]:
        started = time.monotonic()
        answer = mcp(proxy, modern("tools/list"), path="/servers/short/mcp")[2]
        return answer["error"]["message"], time.monotonic() - started

    tries = [attempt() for _ in range(7)]
    assert all("ended with 7; it said: oh no, before it answered" in text for text, _ in tries[:5])
    refused, seconds = tries[-1]
    assert re.fullmatch(r"server short ended with 7; .*; it is started again in \d+ s", refused)
    # A request waits for the next start, but not longer than for 5 s.
    assert max(took for _, took in tries) < 6
    assert tries[3][1] > 0.5
    assert seconds < 6


@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize(
    "odd",
    [
        pytest.param("", id="a legacy server"),
        pytest.param(" exits", id="one that ends at what it does not know"),
        pytest.param(" era=both", id="a server of both eras"),
        pytest.param(" era=modern", id="a modern server"),
    ],
)
@pytest.mark.slow
def test_a_server_that_allows_one_instance_works(
    own: StartServer,
    peculiar: str,
    tmp_path: pathlib.Path,
    stream: OpenStream,
    era: str,
    odd: str,
) -> None:
    proxy = own(f"--mcp-server=x={peculiar} lock={tmp_path}/lock{odd}")
    client = Client(proxy, era, "x", stream)
    first = said(client.call("pid"))
    client.call("crash")
    if (era, "modern" in odd or "both" in odd) == ("legacy", False):
        client = Client(proxy, era, "x", stream)
    assert said(client.call("pid")) != first


@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.slow
def test_an_abandoned_session_gives_up_the_only_instance(
    own: StartServer,
    peculiar: str,
    tmp_path: pathlib.Path,
    stream: OpenStream,
    era: str,
) -> None:
    proxy = own(f"--mcp-server=x={peculiar} lock={tmp_path}/lock")
    killed = Client(proxy, "legacy", "x", stream)
    assert type(said(Client(proxy, era, "x", stream).call("pid"))) is int
    assert mcp_status(proxy, request("ping"), path=killed.path, **killed.headers) == 404


def test_a_session_in_use_keeps_the_only_instance(
    own: StartServer, peculiar: str, tmp_path: pathlib.Path, stream: OpenStream
) -> None:
    proxy = own(f"--mcp-server=x={peculiar} lock={tmp_path}/lock")
    session = Client(proxy, "legacy", "x", stream)
    stream(proxy, session.path, None, **session.headers)
    refused = mcp(proxy, request("initialize", INITIALIZE), path=session.path)[2]
    assert "another one runs" in refused["error"]["message"]
    assert type(said(session.call("pid"))) is int


@pytest.mark.slow
@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize(
    "odd",
    [
        pytest.param("era=legacy slow=7", id="a slow legacy server"),
        pytest.param("era=modern slow=7", id="a slow modern server"),
        pytest.param("era=both slow=7", id="a slow server of both eras"),
        pytest.param("era=legacy silent", id="one that ignores what it does not know"),
    ],
)
def test_a_slow_server_is_started_once_and_still_served(
    own: StartServer,
    peculiar: str,
    tmp_path: pathlib.Path,
    stream: OpenStream,
    era: str,
    odd: str,
) -> None:
    proxy = own(f"--mcp-server=x={peculiar} {odd} starts={tmp_path}/starts")
    started = time.monotonic()
    client = Client(proxy, era, "x", stream)
    assert type(said(client.call("pid"))) is int
    assert time.monotonic() - started < 9
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


@pytest.mark.parametrize(("era", "server"), ERAS)
@pytest.mark.slow
def test_invalid_bytes_are_replaced(
    own: StartServer, peculiar: str, stream: OpenStream, era: str, server: str
) -> None:
    client = Client(own(f"--mcp-server=x={peculiar} era={server}"), era, "x", stream)
    assert client.call("odd bytes")["text"] == "caf\ufffd"


def test_a_byte_order_mark_is_skipped(own: StartServer, peculiar: str, stream: OpenStream) -> None:
    started = time.monotonic()
    client = Client(own(f"--mcp-server=x={peculiar} mark"), "modern", "x", stream)
    assert type(said(client.call("pid"))) is int
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.slow
def test_an_answer_beyond_the_limit_fails_its_call_only(
    own: StartServer, peculiar: str, stream: OpenStream, place: str
) -> None:
    proxy = own(f"--mcp-server=x={peculiar}")
    client = Client(proxy, "modern", "x", stream)
    process = said(client.call("pid"))
    other = Background(partial(client.call, "pid", id_="other", seconds=2))
    failed = client.call("long", bytes=pp.MAX_ANSWER, id=place)
    assert failed["code"] == -32603
    assert f"expected at most {pp.MAX_ANSWER}" in failed["message"]
    assert said(client.call("pid")) == process
    assert said(other.result()) == process


@pytest.mark.slow
def test_a_dead_child_is_noticed_even_if_its_output_stays_open(
    own: StartServer, fixtures: pathlib.Path, stream: OpenStream
) -> None:
    held = f"sleep 82.5 & exec {sys.executable} -S {fixtures} mcp-fixture legacy"
    proxy = own(f"--mcp-server=x=sh -c {shlex.quote(held)}")
    client = Client(proxy, "legacy", "x", stream)
    started = time.monotonic()
    assert "ended with 3" in client.call("die")["message"]
    assert time.monotonic() - started < 10
    wait_until_gone("sleep\x0082.5")


@pytest.mark.slow
def test_a_dead_child_is_removed_even_if_its_stderr_stays_open(
    own: StartServer, fixtures: pathlib.Path, stream: OpenStream
) -> None:
    left = "setsid sleep 5.25 >/dev/null & while read -r line; do"
    result = {"protocolVersion": "2025-11-25", "capabilities": {}}
    hello = json.dumps({"jsonrpc": "2.0", "id": 1, "result": result})
    left += f" echo '{hello}'; "
    left += "exec >&-; sleep 0.3; exit 3; done"
    proxy = own(f"--mcp-server=x=sh -c {shlex.quote(left)}")
    mcp(proxy, request("initialize", INITIALIZE), path="/servers/x/mcp")
    eventually(lambda: proxy.servers()[0]["state"] == "failed", 4)


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_once(own: StartServer, tmp_path: pathlib.Path) -> None:
    program = tmp_path / "gone"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    proxy = own(f"--mcp-server=gone={program}", "--mcp-server=short=sh -c 'echo oh no >&2; exit 7'")
    program.unlink()

    for name, why in (
        ("gone", r"server gone cannot start: .*No such file.*"),
        ("short", "server short ended with 7; it said: oh no, before it answered"),
    ):
        for message in (request("initialize", INITIALIZE), modern("tools/list")):
            failed = mcp(proxy, message, path=f"/servers/{name}/mcp")[2]["error"]
            assert failed["code"] == -32603
            assert re.fullmatch(why, failed["message"]), failed["message"]

    shown = {each["name"]: each for each in proxy.servers()}
    assert shown["gone"]["state"] == "failed"
    assert shown["gone"]["pid"] is None
    assert re.fullmatch("cannot start: .*No such file.*", shown["gone"]["error"])
    assert mcp_status(proxy, modern("tools/list"), path="/servers/other/mcp") == 404


@pytest.mark.slow
def test_a_server_cannot_control_the_terminal_of_the_log_reader(own: StartServer) -> None:
    proxy = own(
        """--mcp-server=loud=sh -c 'printf "\\033]2;evil\\007\\302\\233 \\r1\\n" >&2; exit 7'"""
    )
    mcp(proxy, request("initialize", INITIALIZE), path="/servers/loud/mcp")
    assert r"server loud: \x1b]2;evil\x07\x9b \r1" in eventually(
        lambda: proxy.logged() if "evil" in proxy.logged() else ""
    )
    assert not re.search(r"[\0-\x09\x0b-\x1f\x7f-\x9f]", proxy.logged())


def test_a_group_of_which_nobody_lives_is_not_waited_for() -> None:
    living = subprocess.Popen(["sleep", "60"], start_new_session=True)
    ended = subprocess.Popen(["true"], start_new_session=True)
    eventually(lambda: pp.process(ended.pid) is None)
    # It has not been reaped.
    os.killpg(ended.pid, 0)
    assert pp.has_processes(living.pid)
    assert not pp.has_processes(ended.pid)

    living.kill()
    living.wait()
    ended.wait()
    assert not pp.has_processes(living.pid)


@pytest.mark.slow
def test_processes_beside_a_child_have_time_to_end(
    own: StartServer, fixtures: pathlib.Path, stream: OpenStream, tmp_path: pathlib.Path
) -> None:
    done = tmp_path / "done"
    beside = f"trap 'sleep 0.5; touch {done}; exit' TERM; while :; do sleep 0.05; done"
    plain = f"{sys.executable} -S {fixtures} mcp-fixture legacy"
    words = f"sh -c {shlex.quote(beside)} & exec {plain}"
    client = Client(own(f"--mcp-server=x=sh -c {shlex.quote(words)}"), "legacy", "x", stream)
    assert client.call("pid")
    status = mcp_status(client.proxy, b"", "DELETE", path=client.path, **client.headers)
    assert status == 204
    eventually(done.exists)


@pytest.mark.slow
def test_children_end_as_a_group_and_are_never_orphaned(
    own: StartServer, fixtures: pathlib.Path, stream: OpenStream
) -> None:
    stubborn = (
        f"trap '' TERM; sleep 81.5 & {sys.executable} -S {fixtures} mcp-fixture legacy; sleep 81.6"
    )
    proxy = own(
        f"--mcp-server=plain={sys.executable} -S {fixtures} mcp-fixture modern",
        "--mcp-server=stubborn=sh -c " + shlex.quote(stubborn),
    )
    clients = [Client(proxy, "legacy", name, stream) for name in ("plain", "stubborn")]
    pids = [int(text_of(client.call("pid"))) for client in clients]
    assert mcp_status(proxy, b"", "DELETE", path=clients[1].path, **clients[1].headers) == 204
    wait_until_gone("sleep\x0081.5", 10)
    assert not processes_with("sleep\x0081.6")
    assert pids

    proxy.stop(signal.SIGKILL)
    wait_until_gone(str(fixtures))
    proxy.start()
    assert text_of(Client(proxy, "modern", "plain", stream).call("pid"))
    assert processes_with(str(fixtures))
    assert proxy.stop() == 0
    assert not processes_with(str(fixtures))


@pytest.mark.slow
def test_an_unused_child_ends_after_the_configured_time(
    own: StartServer, fixtures: pathlib.Path, stream: OpenStream
) -> None:
    proxy = own(
        f"--mcp-server=legacy={sys.executable} -S {fixtures} mcp-fixture legacy",
        f"--mcp-server=modern={sys.executable} -S {fixtures} mcp-fixture modern",
        "--mcp-idle=1",
    )
    session = Client(proxy, "legacy", "legacy", stream)
    clients = [session, *(Client(proxy, "modern", name, stream) for name in ("legacy", "modern"))]
    pids = [int(text_of(client.call("pid"))) for client in clients]
    working = [Background(partial(client.call, "test_slow", seconds=2)) for client in clients]
    assert [text_of(each.result()) for each in working] == ["slept 2.0 s"] * 3
    assert [int(text_of(client.call("pid"))) for client in clients] == pids
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 5)
    assert mcp_status(proxy, request("ping"), path=session.path, **session.headers) == 404

    states = [each["state"] for each in proxy.servers()]
    assert states == ["idle", "idle"]


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
def test_a_person_has_time_of_their_own_to_answer_a_question(
    fixtures: pathlib.Path, answers: bool
) -> None:
    async def call_and_answer() -> dict[str, Any]:
        words = (sys.executable, "-S", str(fixtures), "mcp-fixture", "legacy")
        relay = pp.Relay(pp.ServerConfig("x", words))
        session = pp.Session(pp.SessionHost(), relay, "ws", pp.Lifetime.STREAM)
        outbox = pp.Outbox(int)

        async def ask(message: dict[str, Any]) -> dict[str, Any]:
            return dict(await relay.respond(session, message, pp.Era.LEGACY, outbox))

        await ask(request("initialize", INITIALIZE | {"capabilities": {"elicitation": {}}}))
        arguments = {"message": "Who are you?"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pp, "CHILD_TIMEOUT", 0.3)
            patch.setattr(pp, "PARK_TIMEOUT", 1.2)
            calling = asyncio.ensure_future(
                ask(request("tools/call", {"name": "test_elicitation", "arguments": arguments}, 7))
            )
            question = await anext(outbox.messages())
            assert question is not None
            await asyncio.sleep(0.9)
            assert not calling.done()
            if answers:
                result = {"action": "accept", "content": {"username": "u", "email": "e"}}
                answer = {"jsonrpc": "2.0", "id": question["id"], "result": result}
                relay.notify(session, answer)

            answered = await asyncio.wait_for(calling, 5)
            await relay.close()
            return answered

    got = asyncio.run(call_and_answer())
    if answers:
        assert "accept" in text_of(got["result"])
    else:
        assert got["error"]["message"] == "server x did not answer within 0.3 s"


@pytest.mark.slow
def test_calls_to_a_child_that_hangs_or_never_reads_time_out(fixtures: pathlib.Path) -> None:
    async def trouble() -> list[str]:
        said = []
        relay = pp.Relay(
            pp.ServerConfig("x", (sys.executable, "-S", str(fixtures), "mcp-fixture", "modern"))
        )
        outbox = pp.Outbox(int)
        session = pp.Session(pp.SessionHost(), relay, "once", pp.Lifetime.ONCE)
        await relay.respond(session, modern("tools/list"), pp.Era.MODERN, outbox)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pp, "CHILD_TIMEOUT", 0.3)
            patch.setattr(
                pp, "CHILD_LADDER", ((0, 0.1), (signal.SIGTERM, 0.1), (signal.SIGKILL, 2.0))
            )
            hang = await relay.respond(
                session, modern("tools/call", {"name": "hang"}), pp.Era.MODERN, outbox
            )
            said.append(hang["error"]["message"])
            slow = modern(
                "tools/call", {"name": "test_slow", "arguments": {"seconds": 1}}, progressToken=1
            )
            # Progress gives the call more time.
            said.append(
                text_of((await relay.respond(session, slow, pp.Era.MODERN, outbox))["result"])
            )
            patch.setattr(pp, "CHILD_QUEUE", 1000)
            assert relay.launcher.shared

            os.kill(relay.launcher.shared.process.pid, signal.SIGSTOP)
            for _ in range(20):
                with contextlib.suppress(pp.RelayError):
                    await relay.respond(
                        session,
                        modern("tools/call", {"name": "x" * 100_000}),
                        pp.Era.MODERN,
                        outbox,
                    )

            with pytest.raises(pp.RelayError) as full:
                await relay.respond(session, modern("tools/list"), pp.Era.MODERN, outbox)
            said.append(str(full.value))
            await relay.close()

        return said

    hung, slow, full = asyncio.run(trouble())
    assert hung == "server x did not answer within 0.3 s"
    assert slow == "slept 1.0 s"
    assert full == "server x does not read what it is sent"


@pytest.mark.slow
def test_an_unused_shared_child_ends(fixtures: pathlib.Path) -> None:
    async def idle(era: str) -> None:
        relay = pp.Relay(
            pp.ServerConfig("x", (sys.executable, "-S", str(fixtures), "mcp-fixture", era)),
            idle=0.2,
        )
        outbox = pp.Outbox(int)
        session = pp.Session(pp.SessionHost(), relay, "once", pp.Lifetime.ONCE)

        for _ in range(2):
            slow = modern("tools/call", {"name": "test_slow", "arguments": {"seconds": 0.4}})
            assert "result" in await relay.respond(session, slow, pp.Era.MODERN, outbox)
            for _ in range(100):
                if not relay.launcher.children:
                    break
                await asyncio.sleep(0.05)

            assert relay.launcher.children == set()
            assert relay.launcher.back_off.failure == ""

        await relay.close()

    async def both() -> None:
        await asyncio.gather(idle("legacy"), idle("modern"))

    asyncio.run(both())


def talking_server() -> None:
    """A stdio MCP server that repeats given lines; its argument is the revision it supports."""
    import json
    import sys

    output: Any = sys.stdout
    output.reconfigure(encoding="utf-8")
    for line in sys.stdin:
        got = json.loads(line, parse_constant=sys.exit)
        for wrote in (got.get("params") or {}).get("lines", []):
            output.write(wrote.replace("ID", str(got["id"])) + "\n")
        if "id" in got:
            result = {
                "capabilities": {},
                "protocolVersion": "2025-11-25",
                "supportedVersions": [sys.argv[1]],
            }
            print(json.dumps({"jsonrpc": "2.0", "id": got["id"], "result": result}), flush=True)


@pytest.mark.parametrize("era", ["modern", "legacy"])
def test_whatever_a_child_writes_every_request_gets_one_valid_answer(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, era: str
) -> None:
    dice = random.Random(11)
    (tmp_path / "talker.py").write_text(program_of(talking_server))
    revision = pp.MODERN if era == "modern" else "none"
    methods = [
        "notifications/progress",
        "notifications/message",
        "roots/list",
        "ping",
        "notifications/tools/list_changed",
    ]
    likely = (
        "=ID=",
        {"_meta": {pp.SUBSCRIPTION: "=ID="}},
        {"progressToken": "=ID="},
        {"code": 1, "message": "m"},
        {"_meta": 3},
    )

    def line() -> str:
        fields = {
            "result": junk(dice, *likely),
            "error": junk(dice, *likely),
            "params": junk(dice, *likely),
        }
        fields |= {"id": junk(dice, "=ID=", "=ID="), "method": junk(dice, *methods)}
        chosen = {"jsonrpc": "2.0"} | {
            name: fields[name] for name in dice.choices([*fields], k=dice.randrange(5))
        }
        text = (
            json.dumps(chosen)
            .replace('"=ID="', "ID")
            .replace("1e+300", dice.choice(("1e300", "1e999")))
        )

        return (
            text
            if dice.random() < 0.8
            else spoil(dice, text.encode()).decode("latin-1").replace("\n", "")
        )

    async def check() -> None:
        relay = pp.Relay(
            pp.ServerConfig("talker", (sys.executable, "-S", str(tmp_path / "talker.py"), revision))
        )
        outbox = pp.Outbox.nowhere()
        answered = list[bool]()
        session = pp.Session(pp.SessionHost(), relay, "once", pp.Lifetime.ONCE)

        try:
            for number in range(100 * FUZZ):
                lines = [line() for _ in range(dice.randrange(6))]
                meta = {**pp.envelope({"roots": {}}, pp.OURSELVES), "progressToken": "t"}
                message = pp.new_request("tools/call", {"lines": lines, "_meta": meta}) | {
                    "id": number
                }

                modern_client = dice.random() < 0.7
                era_of_client = pp.Era.MODERN if modern_client else pp.Era.LEGACY
                try:
                    answer = await asyncio.wait_for(
                        relay.respond(session, message, era_of_client, outbox), 5
                    )
                except pp.RelayError as wrong:
                    answer = pp.refusal(number, wrong)

                sent = json.loads(pp.to_json(answer).encode(), parse_constant=pytest.fail)
                answered.append("capabilities" in sent.get("result", {}))
                assert sent["id"] == number, lines
                assert isinstance(sent.get("result"), dict) != isinstance(
                    sent.get("error"), dict
                ), lines
                assert "error" not in sent or type(sent["error"]["code"]) is int, lines
        finally:
            await relay.close()

        assert sum(answered) > len(answered) / 4, sum(answered)

    asyncio.run(check())
    assert [
        each.getMessage()
        for each in caplog.records
        if (each.name, each.levelname) == ("pocketcoder", "ERROR")
    ] == []


# ==========================================================================
# Era translation
# ==========================================================================
def test_clients_of_each_era_are_served_by_servers_of_each_era(client: Client) -> None:
    modern_client = client.era == "modern"
    if modern_client:
        found = client.result("server/discover")
        assert found["supportedVersions"] == ["2026-07-28"]
        assert found["instructions"] == "Fixtures for tests"
        assert found["_meta"][NS + "serverInfo"]["name"] == "fixture-server"
    else:
        found = client.hello["result"]
        assert found["protocolVersion"] == "2025-11-25"
        assert found["serverInfo"]["name"] == "fixture-server"
        assert client.result("ping") == {}

    assert found["capabilities"]["tools"] == {"listChanged": True}
    listed = client.result("tools/list")
    assert ("ttlMs" in listed) == modern_client
    assert ("resultType" in listed) == modern_client

    schema = next(each for each in listed["tools"] if each["name"] == "json_schema_2020_12_tool")[
        "inputSchema"
    ]
    assert schema["$defs"]["address"]["$anchor"] == "addressDef"
    assert schema["$schema"].endswith("2020-12/schema")

    result = client.call("test_simple_text", id_="s")
    assert text_of(result) == "This is a simple text response for testing."
    assert ("resultType" in result) == modern_client

    read = client.result(
        "resources/read", {"uri": "test://static-text"}, Mcp_Name="test://static-text"
    )
    assert read["contents"][0]["uri"] == "test://static-text"

    missing = client.ask("resources/read", {"uri": "test://none"}, Mcp_Name="test://none")[-1][
        "error"
    ]
    assert missing["code"] == (-32602 if modern_client else -32002)
    assert missing["data"] == {"uri": "test://none"}
    assert client.error_code("nope") == -32601

    if modern_client:
        for method in ("ping", "logging/setLevel", "resources/subscribe", "tasks/get"):
            assert client.error_code(method) == -32601


def test_relayed_messages_arrive_unchanged(client: Client) -> None:
    extra = {"x": [1, 2.5, None, {"é\u2028": "😀"}], "y": -(10**20)}
    result = client.call(
        "echo", id_="ä", deep=extra, result={"unknown": extra, "_meta": {"own": extra}}
    )
    assert result["unknown"] == extra
    assert result["_meta"]["own"] == extra

    got = json.loads(text_of(result))
    assert got["arguments"]["deep"] == extra
    failed = client.call("fail", code=-31999, message="own", data=extra)
    assert failed == {
        "code": -31999,
        "message": "own",
        "data": extra,
    }

    params = {
        "name": "echo",
        "arguments": {},
        "_meta": {"trace": "t-1", "progressToken": "p"},
    }
    got = json.loads(text_of(client.result("tools/call", params)))["params"]
    assert got["_meta"]["trace"] == "t-1"
    # The relay replaces the client's token by a number of its own.
    assert type(got["_meta"]["progressToken"]) is int


@pytest.mark.slow
def test_progress_arrives_on_the_stream_of_its_request_with_its_token(client: Client) -> None:
    for token in (0, "t"):
        params = {
            "name": "test_slow",
            "arguments": {"seconds": 0.4},
            "_meta": {"progressToken": token},
        }
        *told, answer = client.ask("tools/call", params, id_=token)
        assert [each["params"]["progress"] for each in told] == [1, 2]
        assert [each["params"]["progressToken"] for each in told] == [token] * 2
        assert [type(each["params"]["progressToken"]) for each in told] == [type(token)] * 2
        assert answer["id"] == token


@pytest.mark.slow
def test_a_cancelled_call_is_cancelled_in_the_child(client: Client, relay: Proxy) -> None:
    label = f"{client.era}{client.path.split('/')[2]}"
    params = {
        "name": "test_slow",
        "arguments": {"seconds": 20, "label": label},
        "_meta": {"progressToken": 1},
    }
    going = client.open("tools/call", params, id_=7)
    assert going.next()["method"] == "notifications/progress"

    if client.era == "modern":
        going.close()
    else:
        client.tell("notifications/cancelled", {"requestId": 7})
        for got in iter(going.next, None):
            assert got["method"] == "notifications/progress"

    eventually(lambda: f"cancelled test_slow {label}" in relay.logged())


def test_a_server_may_ask_the_client_it_serves(client: Client) -> None:
    params = {"name": "test_input_required_result_elicitation", "arguments": {}}
    answer = {"action": "accept", "content": {"name": "Zoë"}}
    if client.era == "modern":
        asked = client.result("tools/call", params, id_="first")
        assert asked["resultType"] == "input_required"
        ((key, question),) = asked["inputRequests"].items()
        assert question["method"] == "elicitation/create"

        again = {**params, "inputResponses": {key: answer}}
        again |= {"requestState": asked["requestState"]} if "requestState" in asked else {}
        result = client.ask("tools/call", again, id_="second")[-1]
        assert result["id"] == "second"
    else:
        going = client.open("tools/call", params, id_="first")
        question = going.next()
        assert question["method"] == "elicitation/create"
        assert question["params"]["message"] == "What is your name?"

        reply = {
            "jsonrpc": "2.0",
            "id": question["id"],
            "result": answer,
        }
        assert mcp_status(client.proxy, reply, path=client.path, **client.headers) == 202
        result = going.next()
        assert result["id"] == "first"

    assert "Zoë" in json.loads(json.dumps(text_of(result["result"]))).encode().decode(
        "unicode_escape"
    ) or "Zoë" in text_of(result["result"])


def test_a_server_cannot_ask_a_client_without_the_capability(
    relay: Proxy, stream: OpenStream
) -> None:
    for era, server in ERAS:
        silent = Client(relay, era, server, stream, can={})
        got = silent.call("test_input_required_result_sampling")
        if era == server == "modern":
            assert got["code"] == -32021
        else:
            assert got.get("isError") is True or got["code"] == -32021


def test_a_forged_request_state_is_refused(relay: Proxy, stream: OpenStream) -> None:
    client = Client(relay, "modern", "legacy", stream)
    params = {"name": "test_input_required_result_elicitation", "arguments": {}}
    asked = client.result("tools/call", params)
    ((key, _),) = asked["inputRequests"].items()
    good = {"requestState": asked["requestState"], "inputResponses": {key: {"action": "decline"}}}

    for wrong in (
        {**params, **good, "requestState": "x"},
        {**params, **good, "arguments": {"a": 1}},
    ):
        assert client.error_code("tools/call", wrong) == -32602

    assert client.error_code("tools/call", {**params, **good}, Authorization="Bearer x") == -32602

    missing = client.ask(
        "tools/call",
        {
            **params,
            "requestState": asked["requestState"],
            "inputResponses": 3,
        },
    )[-1]
    # It asks again.
    assert missing["result"]["inputRequests"] == asked["inputRequests"]

    good["requestState"] = missing["result"]["requestState"]
    assert "decline" in text_of(client.result("tools/call", {**params, **good}))
    # This question has been answered already.
    assert client.error_code("tools/call", {**params, **good}) == -32602


@pytest.mark.slow
def test_changes_are_reported_to_subscribers_only(client: Client) -> None:
    if client.era == "modern":
        wanted = {"toolsListChanged": True, "resourceSubscriptions": ["test://watched-resource"]}
        events = client.open("subscriptions/listen", {"notifications": wanted}, id_="w1")
        first = events.next()
        assert first["method"] == "notifications/subscriptions/acknowledged"
        assert first["params"]["notifications"] == wanted
        assert first["params"]["_meta"] == {NS + "subscriptionId": "w1"}
    else:
        events = client.make(client.proxy, client.path, None, **client.headers)
        assert client.result("resources/subscribe", {"uri": "test://watched-resource"}) == {}

    # By then a modern child has received the subscription.
    time.sleep(0.2)
    client.call("test_trigger_tool_change", id_=50)
    client.call("test_trigger_resource_change", id_=51, uri="test://watched-resource")
    heard = [events.next() for _ in range(2)]
    methods = {"notifications/tools/list_changed", "notifications/resources/updated"}
    assert {each["method"] for each in heard} == methods

    for each in heard:
        meta = (each.get("params") or {}).get("_meta", {})
        assert meta.get(NS + "subscriptionId") == ("w1" if client.era == "modern" else None)


@pytest.mark.slow
def test_log_messages_reach_clients_that_ask_for_them(client: Client) -> None:
    params: dict[str, Any] = {"name": "test_tool_with_logging", "arguments": {}}
    if client.era == "modern":
        assert len(client.ask("tools/call", params)) == 1
        params["_meta"] = {NS + "logLevel": "debug"}
    *told, _ = client.ask("tools/call", params)
    assert told[0]["params"]["data"] == "Tool execution started"
    if client.era == "legacy":
        assert client.result("logging/setLevel", {"level": "error"}) == {}
        assert len(client.ask("tools/call", params)) == 1


def test_headers_repeat_the_arguments_that_a_schema_names(relay: Proxy, stream: OpenStream) -> None:
    for server in ("legacy", "modern"):
        client = Client(relay, "modern", server, stream)
        params = {"name": "test_x_mcp_header", "arguments": {"region": "Zürich", "priority": 42}}
        good = {"Mcp_Param_Region": "=?base64?WsO8cmljaA==?=", "Mcp_Param_Priority": "42.0"}
        assert "result" in client.ask("tools/call", params, **good)[-1]

        for wrong in (
            {},
            {**good, "Mcp_Param_Priority": "41"},
            {**good, "Mcp_Param_Region": "zurich"},
        ):
            assert client.error_code("tools/call", params, **wrong) == -32020


# ==========================================================================
# Relay
# ==========================================================================
@pytest.mark.slow
def test_clients_with_equal_ids_and_tokens_never_meet(relay: Proxy, stream: OpenStream) -> None:
    clients = [Client(relay, era, server, stream) for era, server in ERAS for _ in range(4)]

    def work(number: int, client: Client) -> None:
        params = {
            "name": "echo",
            "arguments": {"mine": number},
            "_meta": {"progressToken": 1},
        }
        for _ in range(5):
            assert json.loads(text_of(client.result("tools/call", params)))["arguments"] == {
                "mine": number
            }

        steps = 1 + number % 4
        slow = {
            "name": "test_slow",
            "arguments": {"seconds": 0.2 * steps},
            "_meta": {"progressToken": 1},
        }
        assert len(client.ask("tools/call", slow)) == steps + 1

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(work, range(len(clients)), clients))


@pytest.mark.slow
def test_two_hundred_calls_through_one_child_get_their_own_answers(
    relay: Proxy, stream: OpenStream
) -> None:
    client = Client(relay, "modern", "modern", stream)
    process = text_of(client.call("pid"))

    def one(number: int) -> tuple[int, str]:
        result = client.call("test_slow", id_=number, seconds=1.0)
        return len(text_of(result)), text_of(client.call("echo", id_=number, n=number))

    with ThreadPoolExecutor(200) as pool:
        for number, (_, echoed) in enumerate(pool.map(one, range(200))):
            assert json.loads(echoed)["arguments"] == {"n": number}

    assert text_of(client.call("pid")) == process


@pytest.mark.slow
def test_ten_megabytes_pass_through_the_relay(client: Client) -> None:
    assert len(text_of(client.call("big", bytes=10_000_000))) == 10_000_000


def test_websockets_and_event_streams_reach_stdio_servers_too(
    relay: Proxy, stream: OpenStream
) -> None:
    for server in ("legacy", "modern"):
        events = stream(relay, f"/servers/{server}/sse")
        path = events.next()
        assert path.startswith(f"/servers/{server}/messages?session_id=")
        # A client that reconnects may skip `initialize`.
        assert mcp_status(relay, request("tools/list", id_="without initialize"), path=path) == 202
        assert len(events.next()["result"]["tools"]) > 10
        assert mcp_status(relay, request("initialize", INITIALIZE), path=path) == 202
        assert events.next()["result"]["serverInfo"]["name"] == "fixture-server"
        status = mcp_status(relay, request("ping"), path=path.replace(f"/servers/{server}", ""))
        assert status == 404

        async def talk(server: str) -> None:
            url = f"ws://127.0.0.1:{relay.port}/servers/{server}/mcp/ws"
            socket: Any = await tornado.websocket.websocket_connect(url, subprotocols=["mcp"])

            async def ask(message: Any) -> Any:
                await socket.write_message(json.dumps(message))
                return json.loads(await asyncio.wait_for(socket.read_message(), 10))

            assert (await ask(request("initialize", {**INITIALIZE, "capabilities": CAN})))[
                "result"
            ]["capabilities"]

            await socket.write_message(
                json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"})
            )
            question = await ask(
                request("tools/call", {"name": "test_input_required_result_elicitation"}, id_="q")
            )
            assert question["method"] == "elicitation/create"

            answer = await ask(
                {
                    "jsonrpc": "2.0",
                    "id": question["id"],
                    "result": {"action": "cancel"},
                }
            )
            assert answer["id"] == "q"
            assert "cancel" in text_of(answer["result"])
            assert (await ask(modern("server/discover", id_="m")))["result"][
                "supportedVersions"
            ] == ["2026-07-28"]

            await close(socket)

        asyncio.run(talk(server))


def test_a_legacy_session_has_its_own_child_that_ends_with_it(
    relay: Proxy, stream: OpenStream
) -> None:
    one, two = (Client(relay, "legacy", "legacy", stream) for _ in range(2))
    assert [text_of(each.call("counter")) for each in (one, one, two)] == ["1", "2", "1"]
    process = int(text_of(one.call("pid")))
    assert mcp_status(relay, b"", "DELETE", path=one.path, **one.headers) == 204
    eventually(lambda: not os.path.exists(f"/proc/{process}"))
    assert text_of(two.call("counter")) == "2"

    modern_one = Client(relay, "modern", "legacy", stream)
    before = int(text_of(modern_one.call("counter")))
    # Calls one after the other meet the same child.
    assert int(text_of(modern_one.call("counter"))) == before + 1


def answered(client: Client, asked: Any, tool: dict[str, Any], roots: list[Any], id_: Any) -> Any:
    """The result of a call that was answered with a question for the roots."""
    assert asked["resultType"] == "input_required", asked
    ((name, question),) = asked["inputRequests"].items()
    assert question["method"] == "roots/list"

    again = {
        **tool,
        "inputResponses": {name: {"roots": roots}},
        "requestState": asked["requestState"],
    }
    return client.result("tools/call", again, id_)


@pytest.mark.slow
def test_parallel_calls_of_a_modern_client_share_one_process(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    client = Client(own(f"--mcp-server=x={peculiar}"), "modern", "x", stream)

    def one(number: int) -> Any:
        return said(client.call("pid", id_=number, seconds=0.3))

    with ThreadPoolExecutor(40) as pool:
        pids = list(pool.map(one, range(40)))
    assert len(set(pids)) == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"info": {"name": "b", "version": "1"}}, id="clientInfo"),
        pytest.param({"can": {"roots": {"listChanged": True}}}, id="capabilities"),
        pytest.param({"authorization": "Bearer other"}, id="credential"),
        pytest.param({"address": "127.0.0.2"}, id="address"),
    ],
)
@pytest.mark.slow
def test_modern_clients_that_differ_get_a_process_each(
    own: StartServer, peculiar: str, other: dict[str, Any]
) -> None:
    proxy = own(f"--mcp-server=x={peculiar}")

    def count(
        info: Any = None,
        can: Any = None,
        authorization: str = "",
        address: str = "127.0.0.1",
    ) -> Any:
        meta = {
            NS + "clientInfo": info or {"name": "a", "version": "1"},
            NS + "clientCapabilities": {"roots": {}} if can is None else can,
        }
        message = modern("tools/call", {"name": "count"}, **meta)
        headers = {
            **JSON_TYPE,
            "MCP-Protocol-Version": "2026-07-28",
            "Mcp-Method": "tools/call",
            "Mcp-Name": "count",
            "Authorization": authorization,
        }
        source = (address, 0)
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, 20, source_address=source)
        connection.request("POST", "/servers/x/mcp", json.dumps(message), headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()

        return said(answer["result"])

    assert count() == 1
    assert count(**other) == 1
    assert count() == 2
    assert count(**other) == 2


def test_a_question_reaches_only_the_client_of_its_process(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    proxy = own(f"--mcp-server=x={peculiar}")
    clients = [
        Client(proxy, "modern", "x", stream, info={"name": name, "version": "1"})
        for name in ("a", "b")
    ]
    tool = {"name": "ask", "arguments": {}}
    asked = [client.call("ask") for client in clients]
    # The other one's state is unknown here.
    stolen = {
        **tool,
        "requestState": asked[0]["requestState"],
        "inputResponses": {},
    }
    assert clients[1].error_code("tools/call", stolen) == -32602

    for client, question in zip(clients, asked, strict=True):
        roots = [{"uri": f"file:///{client.info['name']}"}]
        got = said(answered(client, question, tool, roots, id_="again"))
        assert got["result"]["roots"] == roots


@pytest.mark.slow
@pytest.mark.parametrize(
    "notice",
    [
        pytest.param({}, id="no-parameters"),
        pytest.param({"params": {}}, id="no-id"),
        pytest.param({"params": {"requestId": "never asked"}}, id="unknown"),
        pytest.param({"params": {"requestId": [1]}}, id="no-possible-id"),
    ],
)
def test_a_question_that_was_never_asked_may_be_withdrawn(
    own: StartServer, peculiar: str, stream: OpenStream, notice: dict[str, Any]
) -> None:
    proxy = own(f"--mcp-server=x={peculiar} era=legacy")
    client = Client(proxy, "legacy", "x", stream)
    *_, answer = client.ask("tools/call", {"name": "withdraw", "arguments": notice}, 7)
    assert said(answer["result"]) == "done"
    assert "skipped" not in proxy.logged()


@pytest.mark.slow
def test_a_question_goes_to_the_newest_call_in_flight(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    client = Client(own(f"--mcp-server=x={peculiar}"), "modern", "x", stream)
    client.call("pid")
    asking = Background(partial(client.call, "ask", id_="old", seconds=0.3))
    time.sleep(0.1)
    asked = client.call("pid", id_="new", seconds=1.0)
    roots = [{"uri": "file:///r"}]
    tool = {"name": "pid", "arguments": {"seconds": 1.0}}
    assert type(said(answered(client, asked, tool, roots, id_="again"))) is int
    assert said(asking.result())["result"]["roots"] == roots


@pytest.mark.slow
def test_a_question_outside_any_call_waits_for_the_next_call(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    client = Client(own(f"--mcp-server=x={peculiar}"), "modern", "x", stream)
    assert said(client.call("ask later")) == "soon"
    time.sleep(0.3)
    # This one cannot be asked.
    assert client.result("tools/list")["tools"] == []

    asked = client.call("roots", id_="next")
    roots = [{"uri": "file:///r"}]
    tool = {"name": "roots", "arguments": {}}
    assert said(answered(client, asked, tool, roots, id_="again")) == [{"roots": roots}]


@pytest.mark.slow
def test_a_cancelled_call_leaves_no_question_behind(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    client = Client(own(f"--mcp-server=x={peculiar}"), "modern", "x", stream)
    client.call("pid")
    going = client.open("tools/call", {"name": "ask", "arguments": {"seconds": 0.3}})
    going.close()
    time.sleep(0.6)
    assert type(said(client.call("pid"))) is int


@pytest.mark.parametrize("first", ["tools/call", "tools/list"])
@pytest.mark.parametrize("asks", ["hello", "start"])
@pytest.mark.slow
def test_a_question_at_startup_goes_to_the_client_that_started_the_process(
    own: StartServer,
    peculiar: str,
    stream: OpenStream,
    asks: str,
    first: str,
) -> None:
    client = Client(own(f"--mcp-server=x={peculiar} asks={asks}"), "modern", "x", stream)
    roots = [{"uri": "file:///r"}]
    tool = {"name": "roots", "arguments": {}}
    if first == "tools/call":
        asked = client.call("roots", id_="first")
        assert said(answered(client, asked, tool, roots, id_="again")) == [{"roots": roots}]
        return

    # This one cannot be asked, the next one is.
    listing = Background(lambda: client.ask("tools/list", id_="l")[-1])
    if asks == "start":
        listing.result()
    time.sleep(0.2)
    asked = client.call("roots", id_="first")
    assert said(answered(client, asked, tool, roots, id_="again")) == [{"roots": roots}]
    assert listing.result()["result"]["tools"] == []


@pytest.mark.parametrize("asks", ["hello", "start"])
@pytest.mark.slow
def test_a_question_at_startup_may_be_answered_by_a_session(
    own: StartServer, peculiar: str, stream: OpenStream, asks: str
) -> None:
    proxy = own(f"--mcp-server=x={peculiar} asks={asks}")
    path = "/servers/x/mcp"
    hello = request("initialize", {**INITIALIZE, "capabilities": CAN}, id_=0)
    starting = stream(proxy, path, hello)
    first = starting.next()
    session = {"Mcp_Session_Id": starting.answer.getheader("Mcp-Session-Id") or ""}
    events = starting

    if asks == "start":
        noted = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert mcp_status(proxy, noted, path=path, **session) == 202
        events = stream(proxy, path, None, **session)
        first = events.next()

    assert first["method"] == "roots/list"
    answer = {
        "jsonrpc": "2.0",
        "id": first["id"],
        "result": {"roots": []},
    }
    assert mcp_status(proxy, answer, path=path, **session) == 202

    if asks == "hello":
        assert "serverInfo" in starting.next()["result"]
    call = request("tools/call", {"name": "roots"}, id_=2)
    # A thread of the server takes the answer, perhaps after the call.
    roots = eventually(lambda: said(mcp_result(proxy, call, path=path, **session)))
    assert roots == [{"roots": []}]


def test_a_session_is_unknown_as_soon_as_its_process_dies(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    proxy = own(f"--mcp-server=x={peculiar}")
    for _ in range(5):
        client = Client(proxy, "legacy", "x", stream)
        client.call("crash")
        # Each of these comes within the first milliseconds.
        answers = [
            mcp_status(proxy, request("ping"), path=client.path, **client.headers) for _ in range(3)
        ]
        assert answers == [404] * 3


@pytest.mark.parametrize("busy", [False, True], ids=["idle ones", "busy ones"])
@pytest.mark.slow
def test_a_new_client_gets_the_place_of_an_idle_one(
    own: StartServer, peculiar: str, stream: OpenStream, busy: bool
) -> None:
    proxy = own(f"--mcp-server=x={peculiar}")

    def client(number: int) -> Client:
        return Client(proxy, "modern", "x", stream, info={"name": f"c{number}", "version": "1"})

    def count(number: int) -> Any:
        return said(client(number).call("count"))

    assert [count(number) for number in range(16)] == [1] * 16
    if not busy:
        assert count(16) == 1
        # The longest unused one has made room.
        assert count(1) == 2
        assert count(0) == 1
        return

    with ThreadPoolExecutor(17) as pool:
        seconds = [9.0] * 15 + [2.0]
        working = [
            pool.submit(partial(client(number).call, "pid", seconds=each))
            for number, each in enumerate(seconds)
        ]
        time.sleep(0.5)
        started = time.monotonic()
        assert count(16) == 1
        assert 1 < time.monotonic() - started < 4

        asking = pool.submit(partial(client(16).call, "pid", seconds=9.0))
        time.sleep(0.3)
        started = time.monotonic()
        refused = client(17).call("pid")
        assert "16 clients use it" in refused["message"]
        assert 4 < time.monotonic() - started < 7
        assert all(type(said(each.result())) is int for each in [*working, asking])


@pytest.mark.slow
def test_the_newest_notices_are_kept_until_a_session_listens(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    proxy = own(f"--mcp-server=x={peculiar}")
    client = Client(proxy, "legacy", "x", stream)
    assert said(client.call("note later", count=130)) == "soon"
    time.sleep(0.5)
    events = stream(proxy, client.path, None, **client.headers)
    got = [events.next()["params"]["data"] for _ in range(100)]
    assert got == list(range(30, 130))


def test_pings_of_a_server_are_answered_for_a_session_without_a_stream(
    own: StartServer, peculiar: str, stream: OpenStream
) -> None:
    client = Client(own(f"--mcp-server=x={peculiar}"), "legacy", "x", stream)
    assert said(client.call("ping later", count=150)) == "soon"

    def answers() -> Any:
        return len(said(client.call("roots")))

    eventually(lambda: answers() == 150)


def chatty_server() -> None:
    """A stdio MCP server that sends many notices once the roots have changed."""
    import json
    import sys

    def say(**fields: Any) -> None:
        print(json.dumps({"jsonrpc": "2.0", **fields}), flush=True)

    token = None
    for line in sys.stdin:
        got = json.loads(line)
        if got["method"] == "initialize":
            hello = {
                "protocolVersion": "2025-11-25",
                "capabilities": {},
                "serverInfo": {"name": "c", "version": "1"},
            }
            say(id=got["id"], result=hello)
        elif got["method"] == "tools/call":
            token = got["params"]["_meta"]["progressToken"]
            progress = {"progressToken": token, "progress": 1}
            say(method="notifications/progress", params=progress)
        elif got["method"] == "notifications/roots/list_changed":
            for number in range(120):
                if token and number < 60:
                    progress = {"progressToken": token, "progress": 2 + number}
                    say(method="notifications/progress", params=progress)
                else:
                    say(method="notifications/message", params={"level": "info", "data": number})
        elif "id" in got:
            say(id=got["id"], result={"tools": []})


@pytest.mark.parametrize("kind", ["POST", "GET"])
@pytest.mark.slow
def test_a_disconnected_stream_does_not_block_its_server(
    own: StartServer, tmp_path: pathlib.Path, stream: OpenStream, kind: str
) -> None:
    (tmp_path / "chatter.py").write_text(program_of(chatty_server))
    proxy = own(f"--mcp-server=c={sys.executable} -S {tmp_path}/chatter.py")
    client = Client(proxy, "legacy", "c", stream)

    if kind == "POST":
        left = client.open("tools/call", {"name": "x", "_meta": {"progressToken": 1}}, 7)
        assert left.next()["params"]["progress"] == 1
    else:
        left = stream(proxy, client.path, None, **client.headers)

    left.close()
    # By then the server has noticed.
    time.sleep(0.3)
    client.tell("notifications/roots/list_changed", {})
    time.sleep(0.3)
    started = time.monotonic()
    assert client.result("tools/list") == {"tools": []}
    # It does not wait a minute for each unread message.
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_abandoned_calls_block_nothing(relay: Proxy, stream: OpenStream) -> None:
    # More than there may be children.
    for number in range(40):
        can = {"elicitation": {"n": number % 20}}
        client = Client(relay, "modern", "legacy", stream, can=can)
        asked = client.call("test_input_required_result_elicitation")
        assert asked["resultType"] == "input_required", asked
    assert text_of(Client(relay, "modern", "legacy", stream).call("test_simple_text"))


# ==========================================================================
# Metrics
# ==========================================================================
def families_of(text: str) -> dict[str, Any]:
    """What Prometheus' own parser reads."""
    from prometheus_client.parser import text_string_to_metric_families

    return {family.name: family for family in text_string_to_metric_families(text)}


def test_metrics_are_what_prometheus_reads_named_by_its_rules(proxy: Proxy) -> None:
    status, headers, text = proxy.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"

    families = families_of(text.decode())
    assert len(families) == text.count(b"# TYPE ")
    assert len(families) == text.count(b"# HELP ")
    for name, family in families.items():
        assert re.fullmatch(r"(pocketcoder|process)(_[a-z]+)+", name)
        assert family.documentation.endswith(".")
        assert family.samples
        # The parser leaves `_total` out of a counter's name.
        assert (family.type == "counter") == (f"{name}_total" in text.decode())
        if family.type == "counter" and name.startswith("pocketcoder"):
            assert "since the server started" in family.documentation
        if family.type == "histogram":
            assert name.endswith("_seconds")

    assert families["pocketcoder_build_info"].samples[0].labels == {"version": pp.VERSION}


def test_metrics_need_the_token(guarded: Proxy) -> None:
    assert guarded.status("GET", "/metrics") == 401
    assert guarded.metrics()["pocketcoder_ready"] == 1
    assert guarded.status("POST", "/metrics", "{}", JSON_TYPE) == 401


def grown(proxy: Proxy, before: dict[str, float]) -> dict[str, float]:
    """Counters that have grown since, and by how much."""
    after = proxy.metrics()
    return {
        name: after[name] - value
        for name, value in before.items()
        if after[name] != value and "_total" in name and name.startswith("pocketcoder")
    }


@pytest.mark.slow
def test_commands_are_counted_by_door_and_end(warm: StartServer) -> None:
    proxy = warm()
    before = proxy.metrics()
    proxy.exec("printf 12345; exit 3")
    proxy.exec("sleep 9", timeout=0.05)
    assert [*proxy.stream("printf 12")][-1][0] == "exit"
    call(proxy, "exec", cmd="printf 1")

    async def by_channel() -> None:
        async with Channel(proxy) as channel:
            await channel.send({"cmd": "printf 1; printf 1 >&2"})
            assert (await channel.end())["exit_code"] == 0

    asyncio.run(by_channel())

    leaves = proxy.raw_connection()
    body = b'{"cmd": "touch up; sleep 9"}'
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    leaves.sendall(f"POST /exec HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
    eventually(lambda: os.path.exists(f"{proxy.workspace}/up"))
    leaves.close()

    cancelled = 'pocketcoder_commands_total{door="exec",ended="cancelled"}'
    eventually(lambda: proxy.metrics()[cancelled] == 1)
    dies = proxy.start_exec("sleep 9")
    wait_until_running("sleep\x009")
    proxy.tmux("kill-server")
    assert dies.result()["ended"] == "lost"

    assert grown(proxy, before) == {
        'pocketcoder_commands_total{door="exec",ended="exit"}': 1,
        'pocketcoder_commands_total{door="exec",ended="timeout"}': 1,
        cancelled: 1,
        'pocketcoder_commands_total{door="exec",ended="lost"}': 1,
        'pocketcoder_commands_total{door="stream",ended="exit"}': 1,
        'pocketcoder_commands_total{door="shell",ended="exit"}': 1,
        'pocketcoder_commands_total{door="mcp",ended="exit"}': 1,
        "pocketcoder_command_output_bytes_total": 10,
    }
    assert proxy.metrics()["pocketcoder_command_run_seconds_count"] == 8


@pytest.mark.slow
def test_seconds_waited_and_run_are_in_histograms(own: StartServer) -> None:
    proxy = own()
    took = [proxy.exec(f"sleep {seconds}") for seconds in (0, 0.3, 0.6)]
    text = proxy.request("GET", "/metrics")[2].decode()
    families = families_of(text)

    for name, field in (("run", "duration_ms"), ("wait", "waited_ms")):
        samples = families[f"pocketcoder_command_{name}_seconds"].samples
        by_name = {each.name.rpartition("_")[2]: each.value for each in samples}
        assert by_name["count"] == 3
        assert by_name["sum"] == pytest.approx(sum(answer[field] for answer in took) / 1000)
        buckets = {float(each.labels["le"]): each.value for each in samples if "le" in each.labels}
        assert list(buckets) == sorted(buckets)
        assert buckets == {
            bound: sum(answer[field] / 1000 <= bound for answer in took) for bound in buckets
        }
        assert buckets[float("inf")] == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "reason"),
    [
        pytest.param("POST", "/exec", b"{}", JSON_TYPE, "bad_message", id="no-command"),
        pytest.param("POST", "/exec", b"{}", {}, "unsupported_media", id="no-content-type"),
        pytest.param("GET", "/nowhere", None, {}, "no_such_path", id="no-such-path"),
        pytest.param("GET", "/exec", None, {}, "method_not_allowed", id="method"),
        pytest.param("GET", "/ready", None, {"Host": "x.example"}, "forbidden", id="host"),
        pytest.param(
            "GET", "/servers", None, {"Origin": "http://x.example"}, "forbidden", id="origin"
        ),
        pytest.param(
            "POST",
            "/exec",
            None,
            {**JSON_TYPE, "Content-Length": "999999999"},
            "too_large",
            id="body",
        ),
        pytest.param(
            "POST",
            "/exec",
            b'{"cmd": "true"}',
            JSON_TYPE,
            "no_terminal",
            id="no-terminal",
            marks=pytest.mark.slow,
        ),
        pytest.param("POST", "/mcp", b"{", JSON_TYPE, "not_json", id="mcp-no-json"),
    ],
)
def test_refused_requests_are_counted_by_reason(
    refusing: Proxy,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    reason: str,
) -> None:
    before = refusing.metrics()
    assert refusing.status(method, path, body, headers) >= 400
    assert grown(refusing, before) == {
        f'pocketcoder_requests_refused_total{{reason="{reason}"}}': 1
    }


def test_a_wrong_token_is_counted(guarded: Proxy) -> None:
    before = guarded.metrics()
    assert guarded.status("GET", "/metrics") == 401
    name = 'pocketcoder_requests_refused_total{reason="unauthorized"}'
    assert grown(guarded, before) == {name: 1}


@pytest.fixture(scope="module")
def refusing() -> Iterator[Proxy]:
    """A server that can run nothing: a file stands where its runs should be."""
    server = Proxy()
    server.run_folder.touch()
    yield server
    server.run_folder.unlink()
    server.remove()


def test_what_runs_and_waits_now_is_measured(warm: StartServer) -> None:
    proxy = warm()
    wait = "until [ -e go ]; do sleep 0.02; done"
    calls = [proxy.start_exec(wait) for _ in range(6)]
    eventually(lambda: proxy.metrics()["pocketcoder_commands_running"] == pp.MAX_PANES)
    eventually(lambda: proxy.metrics()["pocketcoder_commands_waiting"] == 2)
    other = proxy.start_exec(wait, agent_name="other")
    eventually(lambda: proxy.metrics()["pocketcoder_commands_running"] == pp.MAX_PANES + 1)
    assert proxy.metrics()["pocketcoder_terminals"] == 2

    pathlib.Path(proxy.workspace, "go").touch()
    for each in (*calls, other):
        assert each.result()["exit_code"] == 0
    assert proxy.metrics()["pocketcoder_commands_running"] == 0
    assert proxy.metrics()["pocketcoder_commands_waiting"] == 0


def test_open_sessions_are_measured_by_transport(own: StartServer, stream: OpenStream) -> None:
    proxy = own()
    session = opened(proxy)
    events = stream(proxy, "/sse")
    assert events.next().startswith("/messages")
    sockets = [shaken(proxy, "/mcp/ws") for _ in range(2)]

    def sessions() -> list[float]:
        found = proxy.metrics()
        return [
            found[f'pocketcoder_mcp_sessions{{transport="{name}"}}']
            for name in ("http", "sse", "ws")
        ]

    eventually(lambda: sessions() == [1, 1, 2])
    assert mcp_status(proxy, None, "DELETE", Mcp_Session_Id=session) == 204
    events.close()
    for each in sockets:
        each.close()
    eventually(lambda: sessions() == [0, 0, 0])


def test_relayed_servers_are_measured_by_state(own: StartServer, fixtures: pathlib.Path) -> None:
    command = f"{sys.executable} -S {fixtures} mcp-fixture modern"
    proxy = own(*(f"--mcp-server={name}" for name in (f"a={command}", f"b={command}", "c=false")))

    def states() -> list[float]:
        found = proxy.metrics()
        return [
            found[f'pocketcoder_mcp_servers{{state="{name}"}}']
            for name in ("idle", "running", "failed")
        ]

    assert states() == [3, 0, 0]
    mcp(proxy, modern("tools/list"), path="/servers/a/mcp")
    mcp(proxy, modern("tools/list"), path="/servers/c/mcp")
    assert states() == [1, 1, 1]


@pytest.mark.slow
def test_readiness_is_a_metric(own: StartServer) -> None:
    proxy = own()
    assert proxy.metrics()["pocketcoder_ready"] == 1
    with moved_away(pathlib.Path(proxy.workspace)):
        eventually(lambda: proxy.metrics()["pocketcoder_ready"] == 0)
    eventually(lambda: proxy.metrics()["pocketcoder_ready"] == 1)


def test_the_process_is_measured_as_the_system_sees_it(proxy: Proxy) -> None:
    found = proxy.metrics()
    assert found["process_resident_memory_bytes"] == pytest.approx(proxy.memory(), rel=0.1)
    virtual = status_bytes(proxy.process.pid, "VmSize")
    assert found["process_virtual_memory_bytes"] == pytest.approx(virtual, rel=0.1)
    assert found["process_cpu_seconds_total"] == pytest.approx(proxy.seconds(), abs=0.2)
    # And the connection that asked.
    assert found["process_open_fds"] == pytest.approx(proxy.descriptors(), abs=3)
    limit = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)[0]
    assert found["process_max_fds"] == limit
    assert 0 < time.time() - found["process_start_time_seconds"] < 3600


@pytest.mark.slow
def test_no_caller_can_add_a_series(warm: StartServer) -> None:
    proxy = warm()
    before = proxy.metrics()
    for number in range(5):
        proxy.exec(f"true secret{number}", agent_name=f"secret{number}", session_id="secret")
    proxy.post({"cmd": "true", "agent_name": "secret no name", "usage_id": "secret"})
    proxy.request("GET", "/secret")
    proxy.request("SECRET", "/secret")
    mcp(proxy, request("secret/method"))
    assert proxy.metrics().keys() == before.keys()
    assert b"secret" not in proxy.request("GET", "/metrics")[2]


# ==========================================================================
# Tools
# ==========================================================================
def test_the_tools_are_described_for_models_and_programs(proxy: Proxy) -> None:
    tools = mcp_result(proxy, modern("tools/list"))["tools"]
    assert [tool["name"] for tool in tools] == [
        "exec",
        "wait_run",
        "end_run",
        "list_runs",
        "read_terminal",
        "send_keys",
        "list_terminals",
    ]

    for tool in tools:
        assert tool["title"]
        assert len(tool["description"]) > 80
        assert set(tool["annotations"]) >= {
            "readOnlyHint",
            "destructiveHint",
            "idempotentHint",
            "openWorldHint",
        }
        assert tool["inputSchema"]["type"] == "object"
        assert all(shape.get("description") for shape in tool["inputSchema"]["properties"].values())

    reads = {tool["name"]: tool["annotations"]["readOnlyHint"] for tool in tools}
    assert reads == {
        "exec": False,
        "wait_run": True,
        "end_run": False,
        "list_runs": True,
        "read_terminal": True,
        "send_keys": False,
        "list_terminals": True,
    }
    assert {tool["name"] for tool in tools if "outputSchema" not in tool} == {
        "read_terminal",
        "send_keys",
    }


def test_exec_answers_in_text_for_models_and_data_for_programs(proxy: Proxy, agent: str) -> None:
    result = call(proxy, "exec", cmd="printf 'ä\\n'; printf oops >&2; exit 3", agent_name=agent)
    assert text_of(result) == "ä\noops\n[exit code 3]"
    facts = result["structuredContent"]
    assert re.fullmatch("[0-9a-f]{16}", facts.pop("run_id"))
    assert facts == {
        "output": "ä\noops",
        "exit_code": 3,
        "running": False,
        "next_offset": 7,
        "ended": "exit",
        "truncated": False,
        "output_bytes": 7,
    }
    assert result["isError"] is False
    assert text_of(call(proxy, "exec", cmd="printf ok", agent_name=agent)) == "ok"

    result = call(
        proxy,
        "exec",
        cmd="cat; pwd",
        agent_name=agent,
        stdin="in ",
        cwd="",
        timeout=9.5,
        env={"ignored": 1},
    )
    below = "[arguments that mean nothing here: env]"
    assert text_of(result) == f"in {os.path.realpath(proxy.workspace)}\n{below}"

    result = call(
        proxy, "exec", cmd="head -c 5000 /dev/zero | tr '\\0' x", agent_name=agent, max_output=100
    )
    assert result["structuredContent"]["truncated"] is True
    assert result["structuredContent"]["output_bytes"] == 5000

    result = call(proxy, "exec", cmd="echo before; sleep 30", agent_name=agent, timeout=0.3)
    assert result["isError"] is True
    assert result["structuredContent"]["ended"] == "timeout"
    assert re.fullmatch(r"before\n\[exit code 124\]\n\[ended after 0.3 s: .+\]", text_of(result))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("exec", {"cmd": "echo hi", "time_out": 3, "agent": "x"}, id="exec"),
        pytest.param("read_terminal", {"time_out": 3, "agent": "x"}, id="read-terminal"),
        pytest.param("exec", {"time_out": 3, "agent": "x"}, id="also-beside-an-error"),
    ],
)
def test_arguments_that_mean_nothing_are_named_to_the_model(
    proxy: Proxy, name: str, arguments: dict[str, Any]
) -> None:
    proxy.exec("true")
    shown = call(proxy, name, **arguments)["content"]
    assert shown[-1]["text"] == "[arguments that mean nothing here: time_out, agent]"
    assert len(shown) == 2
    assert len(call(proxy, "exec", cmd="echo hi")["content"]) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        pytest.param("exec", {}, "cmd", id="exec-no-cmd"),
        pytest.param("exec", {"cmd": ""}, "cmd", id="exec-empty-cmd"),
        pytest.param("exec", {"cmd": "true", "timeout": True}, "timeout", id="exec-timeout-true"),
        pytest.param("exec", {"cmd": "true", "cwd": "/"}, "cwd", id="exec-cwd-root"),
        pytest.param(
            "exec", {"cmd": "true", "agent_name": "a b"}, "agent_name", id="exec-agent-with-a-blank"
        ),
        pytest.param("exec", {"cmd": "true", "wait": None}, "wait", id="exec-wait-null"),
        pytest.param("exec", {"cmd": "true", "wait": -1}, "wait", id="exec-wait-negative"),
        pytest.param("wait_run", {}, "run_id", id="wait-no-run"),
        pytest.param("wait_run", {"run_id": "x"}, "run_id", id="wait-run-text"),
        pytest.param("wait_run", {"run_id": "0" * 16}, "run_id", id="wait-unknown-run"),
        pytest.param("end_run", {"run_id": 7}, "run_id", id="end-run-number"),
        pytest.param("list_runs", {"running": 1}, "running", id="list-running-number"),
        pytest.param("list_runs", {"agent_name": "a b"}, "agent_name", id="list-agent"),
        pytest.param("read_terminal", {"lines": 0}, "lines", id="read-no-lines"),
        pytest.param("read_terminal", {"lines": 2001}, "lines", id="read-too-many-lines"),
        pytest.param("read_terminal", {"lines": "5"}, "lines", id="read-lines-text"),
        pytest.param(
            "read_terminal", {"agent_name": "nobody-yet"}, "agent_name", id="read-unknown-agent"
        ),
        pytest.param(
            "read_terminal",
            {"agent_name": "x; kill-server"},
            "agent_name",
            id="read-agent-with-a-command",
        ),
        pytest.param("send_keys", {}, "keys", id="keys-none"),
        pytest.param("send_keys", {"text": 7}, "text", id="keys-text-number"),
        pytest.param("send_keys", {"text": "a\0"}, "text", id="keys-text-nul"),
        pytest.param("send_keys", {"text": "x" * 5000}, "text", id="keys-text-too-long"),
        pytest.param("send_keys", {"keys": "Enter"}, "keys", id="keys-no-list"),
        pytest.param("send_keys", {"keys": ["Entr"]}, "keys", id="keys-unknown"),
        pytest.param("send_keys", {"keys": ["-t", "%0"]}, "keys", id="keys-option"),
        pytest.param("send_keys", {"keys": ["C-c\n"]}, "keys", id="keys-newline"),
    ],
)
def test_a_wrong_argument_is_a_tool_result_that_names_it(
    proxy: Proxy, name: str, arguments: dict[str, Any], field: str
) -> None:
    result = call(proxy, name, **arguments)
    assert result["isError"] is True
    assert f"`{field}`" in text_of(result)


@pytest.mark.slow
def test_keys_that_create_a_terminal_stay_out_of_the_next_command(
    warm: StartServer,
) -> None:
    server = warm()
    server.tmux("kill-server")
    half = f"echo >{server.folder}/half one"
    # At first tmux may be just dying.
    eventually(lambda: not call(server, "send_keys", text=half)["isError"])
    assert server.exec("echo ok")["stdout"] == "ok\n"
    assert not os.path.exists(f"{server.folder}/half")


@pytest.mark.slow
def test_keys_reach_a_program_whose_caller_is_waiting(proxy: Proxy, agent: str) -> None:
    asking = [
        proxy.start_exec("read -r x </dev/tty; echo $x", agent_name=agent)
        for _ in range(pp.MAX_PANES)
    ]
    eventually(lambda: len(proxy.panes(agent)) == pp.MAX_PANES)
    queued = proxy.start_exec("echo queued", agent_name=agent)
    time.sleep(0.3)
    answer = Background(
        partial(call, proxy, "send_keys", text="here", keys=["Enter"], agent_name=agent)
    ).result(10)
    assert not answer["isError"]
    assert queued.result()["stdout"] == "queued\n"

    for pane in proxy.panes(agent):
        proxy.tmux("send-keys", "-t", pane.split()[0], "C-c")
    assert sorted(each.result()["stdout"] for each in asking) == ["", "", "", "here\n"]


def test_a_pane_whose_shell_has_just_died_runs_no_program() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    pane = pp.Pane("%0", "@0", ended.pid, False, 80, 24, "/dev/null", "poco:terminal")
    assert not pp.runs_program(pane)


def test_a_model_sees_what_a_command_asks_on_its_terminal(proxy: Proxy, agent: str) -> None:
    ask = "sleep 0.1; read -p 'Go on? ' x </dev/tty 2>/dev/tty"
    result = call(proxy, "exec", cmd=ask, agent_name=agent, timeout=0.5)
    assert result["isError"]
    assert "[its terminal shows: Go on?]" in text_of(result)
    assert result["structuredContent"]["terminal"] == "Go on?"


def is_busy(server: Proxy, agent: str) -> bool:
    """Whether a command or a program runs in the terminal of this agent."""
    listed = call(server, "list_terminals")["structuredContent"]["terminals"]
    return any(each["busy"] for each in listed if each["agent_name"] == agent)


def test_keys_go_to_the_program_a_person_started(proxy: Proxy, agent: str) -> None:
    call(proxy, "send_keys", agent_name=agent, text=f"{sys.executable} -q", keys=["Enter"])
    eventually(lambda: ">>>" in text_of(call(proxy, "read_terminal", agent_name=agent)))
    running = proxy.start_exec("read -r x </dev/tty; echo got $x", agent_name=agent)
    wait_until_running("read -r x </dev/tty; echo got")

    shown = call(proxy, "send_keys", agent_name=agent, text="print(6*7)", keys=["Enter"])
    assert "\n42\n" in text_of(shown)
    both = text_of(call(proxy, "read_terminal", agent_name=agent))
    assert "\n42\n" in both
    assert "read -r x" in both

    (run_id,) = {
        word.split("=")[1]
        for pid in processes_with("echo got")
        for word in pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0")
        if word.startswith("POCKETCODER_RUN_ID=")
    }
    call(proxy, "send_keys", agent_name=agent, text="aimed", keys=["Enter"], run_id=run_id)
    assert running.result()["stdout"] == "got aimed\n"

    refused = call(proxy, "send_keys", agent_name=agent, text="x", run_id=run_id)
    assert refused["isError"]
    assert "run_id" in text_of(refused)

    call(proxy, "send_keys", agent_name=agent, keys=["C-d"])
    # Until it has ended, keys go to it.
    eventually(lambda: not is_busy(proxy, agent))
    again = proxy.start_exec("read -r x </dev/tty; echo got $x", agent_name=agent)
    wait_until_running("read -r x </dev/tty; echo got")
    call(proxy, "send_keys", agent_name=agent, text="newest", keys=["Enter"])
    assert again.result()["stdout"] == "got newest\n"


def test_a_command_that_a_killed_server_left_takes_no_keys_from_the_newest(
    own: StartServer,
) -> None:
    server = own()
    ask = "read -r x </dev/tty; echo got $x > {}"
    connection = server.connect()
    body = json.dumps({"cmd": ask.format("left")})
    connection.request("POST", "/exec", body, JSON_TYPE)
    wait_until_running("$x > left")
    server.kill_and_start()
    connection.close()

    running = server.start_exec(ask.format("newest"))
    wait_until_running("$x > newest")
    call(server, "send_keys", text="first", keys=["Enter"])
    assert running.result()["exit_code"] == 0
    assert pathlib.Path(server.workspace, "newest").read_text() == "got first\n"

    # Where nothing else runs, they go there.
    call(server, "send_keys", text="second", keys=["Enter"])
    left = pathlib.Path(server.workspace, "left")
    eventually(lambda: left.exists() and left.read_text() == "got second\n")


@pytest.mark.slow
def test_a_program_is_driven_by_keys_and_read_like_a_person_would(proxy: Proxy, agent: str) -> None:
    ask = "read -p 'Name? ' n; echo \"<$n>\""
    shown = text_of(call(proxy, "send_keys", agent_name=agent, text=ask, keys=["Enter"]))
    assert shown.endswith(f"$ {ask}\nName?")
    assert text_of(call(proxy, "read_terminal", agent_name=agent)) == shown

    listed = {
        each["agent_name"]: each
        for each in call(proxy, "list_terminals")["structuredContent"]["terminals"]
    }
    assert listed[agent] == {
        "agent_name": agent,
        "busy": False,
        "command": "bash",
        "columns": 200,
        "lines": 50,
    }

    call(
        proxy,
        "send_keys",
        agent_name=agent,
        text='Zoë \'n "$HOME" ; # {}\\',
        keys=["BSpace", "Enter"],
    )
    eventually(
        lambda: (
            '<Zoë \'n "$HOME" ; # {}>' in text_of(call(proxy, "read_terminal", agent_name=agent))
        )
    )
    running = proxy.start_exec("cat /dev/tty", agent_name=agent, timeout=20)
    eventually(
        lambda: (
            "cat"
            in [
                each["command"]
                for each in call(proxy, "list_terminals")["structuredContent"]["terminals"]
            ]
        )
    )
    listed = {
        each["agent_name"]: each
        for each in call(proxy, "list_terminals")["structuredContent"]["terminals"]
    }
    assert listed[agent]["busy"] is True

    call(proxy, "send_keys", agent_name=agent, text="seen\n")
    call(proxy, "send_keys", agent_name=agent, keys=["C-d"])
    assert running.result()["stdout"] == "seen\n"

    lines = text_of(call(proxy, "read_terminal", agent_name=agent, lines=2)).split("\n")
    assert len(lines) == 2
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_wrapped_line_is_read_as_one(proxy: Proxy, agent: str) -> None:
    proxy.exec("printf '%0500d\\n' 7; echo end", agent_name=agent)
    eventually(lambda: f"{7:0500}\nend" in text_of(call(proxy, "read_terminal", agent_name=agent)))
    proxy.exec("seq 3000", agent_name=agent)
    eventually(
        lambda: "\n3000\n" in text_of(call(proxy, "read_terminal", agent_name=agent, lines=2000))
    )
    shown = text_of(call(proxy, "read_terminal", agent_name=agent, lines=2000))
    assert len(shown.split("\n")) == 2000


@pytest.mark.slow
def test_terminal_content_is_not_mistaken_for_a_reply_of_tmux(proxy: Proxy, agent: str) -> None:
    proxy.exec(
        'for i in $(seq 400); do echo "%end $(date +%s) $i 1"; echo "%exit"; done', agent_name=agent
    )
    eventually(
        lambda: "%exit" in text_of(call(proxy, "read_terminal", agent_name=agent, lines=900))
    )
    assert proxy.exec("echo ok", agent_name=agent)["stdout"] == "ok\n"


@pytest.mark.slow
def test_progress_shows_the_newest_line_and_only_grows(proxy: Proxy, agent: str) -> None:
    session = opened(proxy)
    slow = {
        "cmd": "sleep 1.1; echo one; sleep 1.2; "
        "for i in $(seq 60); do echo line $i; sleep 0.01; done",
        "agent_name": agent,
    }
    params = {
        "name": "exec",
        "arguments": slow,
        "_meta": {"progressToken": 0},
    }
    _, headers, events = mcp(proxy, request("tools/call", params, id_="p"), Mcp_Session_Id=session)
    assert headers["x-accel-buffering"] == "no"

    told = [each["params"] for each in events[:-1]]
    answer = events[-1]
    assert {each["method"] for each in events[:-1]} == {"notifications/progress"}
    assert {each["progressToken"] for each in told} == {0}

    seconds = [each["progress"] for each in told]
    assert all(after - before >= 0.09 for before, after in pairwise(seconds))
    assert all(after - before < 1.6 for before, after in pairwise([0.0, *seconds]))
    assert "message" not in told[0]
    assert told[1]["message"] == "one"
    assert any(re.fullmatch(r"line \d+", each.get("message", "")) for each in told)
    assert answer["id"] == "p"
    assert answer["result"]["structuredContent"]["exit_code"] == 0


def test_without_a_progress_token_the_answer_is_plain_json(proxy: Proxy, agent: str) -> None:
    _, headers, answer = mcp(
        proxy, modern("tools/call", {"name": "exec", "arguments": {"cmd": "sleep 0.3"}})
    )
    assert headers["content-type"] == "application/json"
    assert answer["result"]["structuredContent"]["exit_code"] == 0


def test_a_model_reads_what_to_call_next_and_gets_the_whole_output(
    proxy: Proxy, agent: str
) -> None:
    cmd = "echo first é; read x </dev/tty; echo second; exit 3"
    answer = call(proxy, "exec", cmd=cmd, agent_name=agent, wait=0.5)
    facts = answer["structuredContent"]
    assert answer["isError"] is False
    assert facts["running"] is True
    assert facts["exit_code"] is None
    assert facts["output"] == "first é\n"
    run_id = facts["run_id"]
    assert text_of(answer) == (
        f'first é\n[still running: run {run_id}. Call wait_run with run_id "{run_id}" and offset 9'
        " to wait for the rest, end_run to end it.]"
    )

    again = call(proxy, "wait_run", run_id=run_id, offset=facts["next_offset"], wait=0.1)
    assert again["structuredContent"]["running"] is True
    assert again["structuredContent"]["output"] == ""
    call(proxy, "send_keys", agent_name=agent, keys=["Enter"], run_id=run_id)
    last = call(proxy, "wait_run", run_id=run_id, offset=facts["next_offset"])
    assert last["structuredContent"]["output"] == "second\n"
    assert last["structuredContent"]["exit_code"] == 3
    assert text_of(last) == "second\n[exit code 3]"
    whole = call(proxy, "wait_run", run_id=run_id)
    assert whole["structuredContent"]["output"] == "first é\nsecond\n"


def test_a_model_that_does_what_it_reads_gets_every_byte(proxy: Proxy, agent: str) -> None:
    expected = "".join(f"{number} é\n" for number in range(1, 20001))
    cmd = "for i in $(seq 20000); do echo $i é; done"
    answer = call(proxy, "exec", cmd=cmd, agent_name=agent, wait=0, max_output=10_000)
    facts = answer["structuredContent"]
    text = facts["output"] if facts["running"] else ""
    named = re.search(r'Call wait_run with run_id "(\w+)" and offset (\d+)', text_of(answer))
    assert named, text_of(answer)
    if not facts["running"]:
        text = expected.encode()[: int(named[2])].decode()

    while named:
        answer = call(
            proxy, "wait_run", run_id=named[1], offset=int(named[2]), max_output=10_000, wait=5
        )
        text += answer["structuredContent"]["output"]
        named = re.search(r'Call wait_run with run_id "(\w+)" and offset (\d+)', text_of(answer))

    assert text == expected


def test_end_run_ends_a_command_and_says_how_it_ended(proxy: Proxy, agent: str) -> None:
    run_id = proxy.launch("sleep 79.25", agent_name=agent)
    eventually(lambda: proxy.run(run_id)["state"] == "running")
    ended = call(proxy, "end_run", run_id=run_id)
    assert ended["structuredContent"]["ended"] == "cancelled"
    assert ended["structuredContent"]["exit_code"] == 143
    wait_until_gone("79.25")

    other = proxy.launch("trap 'exit 7' USR1; while :; do sleep 0.01; done", agent_name=agent)
    eventually(lambda: proxy.run(other)["state"] == "running")
    time.sleep(0.2)
    ended = call(proxy, "end_run", run_id=other, signal="USR1")
    assert ended["structuredContent"]["exit_code"] == 7
    assert ended["structuredContent"]["ended"] == "exit"


def test_list_runs_shows_what_runs_and_how_others_ended(proxy: Proxy, agent: str) -> None:
    proxy.exec("exit 3", agent_name=agent)
    run_id = proxy.launch("sleep 79.75", agent_name=agent)
    eventually(lambda: proxy.run(run_id)["state"] == "running")
    runs = call(proxy, "list_runs", agent_name=agent)["structuredContent"]["runs"]
    assert [(run["cmd"], run["state"]) for run in runs] == [
        ("sleep 79.75", "running"),
        ("exit 3", "ended"),
    ]
    running = call(proxy, "list_runs", agent_name=agent, running=True)
    assert [run["run_id"] for run in running["structuredContent"]["runs"]] == [run_id]
    call(proxy, "end_run", run_id=run_id)


def test_a_cancelled_call_ends_its_command_and_a_call_that_was_answered_does_not(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    events = stream(proxy, "/sse")
    path = events.next()

    def say(message: dict[str, Any]) -> None:
        assert proxy.status("POST", path, json.dumps(message), JSON_TYPE) == 202

    say(request("initialize", INITIALIZE))
    events.next()
    params = {"name": "exec", "arguments": {"cmd": "sleep 77.1", "agent_name": agent}}
    say(request("tools/call", params, 2))
    wait_until_running("77.1")
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 2}}
    say(cancel)
    wait_until_gone("77.1")

    params["arguments"] = {"cmd": "sleep 77.2", "agent_name": agent, "wait": 0}
    say(request("tools/call", params, 3))
    run_id = events.next()["result"]["structuredContent"]["run_id"]
    wait_until_running("77.2")
    events.close()
    assert proxy.run(run_id)["state"] == "running"
    call(proxy, "end_run", run_id=run_id)
    wait_until_gone("77.2")


# ==========================================================================
# HTTP gate
# ==========================================================================
BODY = b'{"cmd": "touch pwned"}'
REFUSED = [
    pytest.param("POST", "/exec", {}, 415, id="no-content-type"),
    pytest.param("POST", "/exec", {"Content-Type": "text/plain"}, 415, id="content-type-text"),
    pytest.param(
        "POST",
        "/exec",
        {"Content-Type": "application/x-www-form-urlencoded"},
        415,
        id="content-type-form",
    ),
    pytest.param(
        "POST", "/exec", {**JSON_TYPE, "Origin": "http://evil.example"}, 403, id="origin-elsewhere"
    ),
    pytest.param("POST", "/exec", {**JSON_TYPE, "Origin": "null"}, 403, id="origin-null"),
    pytest.param(
        "POST",
        "/exec",
        {**JSON_TYPE, "Origin": "http://127.0.0.1.evil.example"},
        403,
        id="origin-that-begins-with-a-loopback-address",
    ),
    pytest.param(
        "POST",
        "/exec",
        {**JSON_TYPE, "Origin": "http://localhost"},
        403,
        id="origin-localhost-of-another-port",
    ),
    pytest.param("POST", "/exec", {**JSON_TYPE, "Host": "evil.example"}, 403, id="host-elsewhere"),
    pytest.param(
        "POST",
        "/exec",
        {**JSON_TYPE, "Host": "127.0.0.1.evil.example:80"},
        403,
        id="host-that-begins-with-a-loopback-address",
    ),
    pytest.param(
        "POST", "/exec", {**JSON_TYPE, "Host": "10.0.0.1"}, 403, id="host-address-of-a-network"
    ),
    pytest.param("POST", "/exec", {**JSON_TYPE, "Host": ""}, 403, id="host-empty"),
    pytest.param("GET", "/exec", {}, 405, id="get-exec"),
    pytest.param("PUT", "/exec", {}, 405, id="put-exec"),
    pytest.param("DELETE", "/health", {}, 405, id="delete-health"),
    pytest.param("POST", "/health", {}, 405, id="post-health"),
    pytest.param(
        "OPTIONS", "/exec", {"Origin": "http://evil.example"}, 403, id="preflight-from-elsewhere"
    ),
    pytest.param("OPTIONS", "/exec", {}, 405, id="options-without-origin"),
    pytest.param("GET", "/nowhere", {}, 404, id="no-such-path"),
    pytest.param("POST", "/exec/", JSON_TYPE, 404, id="slash-after-exec"),
    pytest.param("GET", "/health", {"Host": "evil.example"}, 403, id="get-with-a-host-elsewhere"),
    pytest.param("GET", "/servers", {"Sec-Fetch-Site": "same-site"}, 403, id="same-site"),
    pytest.param(
        "GET", "/nowhere", {"Sec-Fetch-Site": "same-origin"}, 404, id="same-origin-no-such-path"
    ),
]


@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSED)
def test_the_gate_refuses_with_a_json_error(
    proxy: Proxy, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    got, answer_headers, answer = proxy.request(
        method, path, BODY if method == "POST" else None, headers
    )
    assert got == status
    assert json.loads(answer)["exit_code"] == 125
    assert json.loads(answer)["error"]
    assert "access-control-allow-origin" not in answer_headers

    if status == 405:
        assert ("POST" if path == "/exec" else "GET") in answer_headers["allow"]
        assert method == "OPTIONS" or method not in answer_headers["allow"]

    assert not os.path.exists(f"{proxy.workspace}/pwned")


MCP_REFUSED = [
    pytest.param("POST", "/mcp", {"Authorization": ""}, 401, id="no-token"),
    pytest.param("GET", "/sse", {"Authorization": "Bearer wrong"}, 401, id="wrong-token"),
    pytest.param("GET", "/mcp/ws", {"Authorization": ""}, 401, id="no-token-of-a-websocket"),
    pytest.param("POST", "/mcp", {"Origin": "http://evil.example"}, 403, id="origin"),
    pytest.param("GET", "/sse", {"Sec-Fetch-Site": "cross-site"}, 403, id="site"),
    pytest.param("POST", "/servers/none/mcp", {}, 404, id="unknown-server"),
    pytest.param("GET", "/servers/none/sse", {}, 404, id="unknown-server-of-events"),
    pytest.param("GET", "/servers/none/mcp/ws", {}, 404, id="unknown-server-of-a-websocket"),
    pytest.param("POST", "/messages?session_id=none", {}, 404, id="unknown-session"),
    pytest.param("GET", "/mcp", {}, 405, id="no-session"),
    pytest.param("POST", "/sse", {}, 405, id="method"),
    pytest.param("GET", "/mcp", {"Mcp-Session-Id": "none"}, 404, id="unknown-session-of-http"),
    pytest.param("POST", "/mcp", {"Accept": "text/html"}, 406, id="accept"),
    pytest.param("POST", "/mcp", {"Content-Length": str(10**9)}, 413, id="size"),
    pytest.param("POST", "/messages", {"Content-Type": "text/plain"}, 415, id="content-type"),
    pytest.param("GET", "/mcp/ws", {}, 400, id="no-websocket"),
]


@pytest.mark.parametrize(("method", "path", "headers", "status"), MCP_REFUSED)
def test_refusals_on_mcp_routes_are_json_rpc_errors(
    guarded: Proxy, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    given = {
        **JSON_TYPE,
        "Authorization": f"Bearer {guarded.token}",
        **headers,
    }
    got, _, answer = guarded.request(method, path, b"{}" if method == "POST" else None, given)
    assert got == status

    told = json.loads(answer)
    assert told["jsonrpc"] == "2.0"
    assert told["id"] is None
    assert told["error"]["code"] == -32600
    assert len(told["error"]["message"]) > 10


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:99", "127.0.0.1", "127.1.2.3:3001", "[::1]:3001", "LOCALHOST"]
)
def test_loopback_hosts_pass_the_gate(proxy: Proxy, host: str) -> None:
    assert proxy.status("POST", "/exec", b'{"cmd": "true"}', {**JSON_TYPE, "Host": host}) == 200


def test_the_token_is_demanded_and_never_shown(own: StartServer) -> None:
    server = own(POCKETCODER_TOKEN="geheim-1")
    for given in (
        "",
        "Bearer",
        "Bearer geheim",
        "Bearer geheim-12",
        "geheim-1",
        "Basic geheim-1",
        "Bearer Geheim-1",
        "Bearer \xff",
    ):
        status, headers, answer = server.request(
            "POST", "/exec", BODY, {**JSON_TYPE, "Authorization": given}
        )
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(answer)["exit_code"] == 125

    status, _, _ = server.request(
        "POST",
        "/exec",
        BODY,
        {
            **JSON_TYPE,
            "Authorization": "Bearer geheim-1",
            "Origin": "http://a.b",
        },
    )
    assert status == 403

    headers = {
        **JSON_TYPE,
        "Authorization": "Bearer geheim-1",
        "Host": "sandbox:3001",
    }
    status, _, answer = server.request(
        "POST",
        "/exec",
        b'{"cmd": "env; tr \\"\\\\\\\\0\\" \\"\\\\\\\\n\\" </proc/$PPID/environ"}',
        headers,
    )
    assert status == 200
    assert "geheim" not in answer.decode()
    assert "geheim" not in server.logged()
    assert "geheim" not in server.tmux("show-environment", "-g")


def test_only_an_allowed_origin_may_call(own: StartServer) -> None:
    server = own("--allow-origin", "http://ui.example:8080")
    good = {"Origin": "http://ui.example:8080"}
    status, headers, _ = server.request(
        "OPTIONS", "/exec", None, {**good, "Access-Control-Request-Method": "POST"}
    )
    assert status == 204
    assert headers["access-control-allow-origin"] == "http://ui.example:8080"
    assert "POST" in headers["access-control-allow-methods"]

    status, headers, _ = server.request("POST", "/exec", b'{"cmd": "true"}', {**JSON_TYPE, **good})
    assert status == 200
    assert headers["access-control-allow-origin"] == "http://ui.example:8080"

    for origin in (
        "http://ui.example",
        "https://ui.example:8080",
        "http://ui.example:8080.evil.example",
    ):
        assert server.status("POST", "/exec", BODY, {**JSON_TYPE, "Origin": origin}) == 403


def test_a_channel_passes_the_gate_and_needs_a_websocket(own: StartServer) -> None:
    server = own("--allow-origin", "http://good.example", POCKETCODER_TOKEN="t0k")
    token = {"Authorization": "Bearer t0k"}

    def refused(headers: dict[str, str]) -> int:
        async def talk() -> int:
            try:
                async with Channel(server, headers=headers):
                    return 101
            except tornado.httpclient.HTTPError as error:
                return error.code

        return asyncio.run(talk())

    assert refused({}) == 401
    assert refused(token) == 101
    assert refused({**token, "Origin": "http://evil.example"}) == 403
    assert refused({**token, "Origin": "http://good.example"}) == 101

    shake = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "x",
        "Sec-WebSocket-Version": "13",
    }

    for name, wrong in zip(shake, ("h2c", "close", "", "8"), strict=True):
        status, _, answer = server.request(
            "GET", "/exec/ws", headers={**token, **shake, name: wrong}
        )
        assert status == 400
        assert json.loads(answer)["exit_code"] == 2

    assert server.post({"cmd": "true"}, "/exec/ws")[0] == 405
    assert "Traceback" not in server.logged()


def test_the_token_may_be_a_parameter_where_headers_cannot_be_set(
    own: StartServer, stream: OpenStream
) -> None:
    proxy = own(POCKETCODER_TOKEN="s3cret+/=")
    assert mcp_status(proxy, modern("tools/list")) == 401
    status = proxy.status(
        "POST", "/mcp?token=s3cret%2B/=", b"{}", {"Content-Type": "application/json"}
    )
    assert status == 401
    assert stream(proxy, "/sse").status == 401

    opened = stream(proxy, "/sse?token=s3cret%2B/=")
    path = opened.next()
    assert mcp_status(proxy, request("ping"), path=path) == 202
    assert opened.next()["result"] == {}
    assert mcp_status(proxy, request("ping"), path=path.partition("&")[0]) == 401

    with_header = stream(proxy, "/sse", None, Authorization="Bearer s3cret+/=")
    assert "token" not in with_header.next()

    async def socket(query: str) -> Any:
        url = f"ws://127.0.0.1:{proxy.port}/mcp/ws{query}"
        connection = await tornado.websocket.websocket_connect(url, subprotocols=["mcp"])
        await connection.write_message(json.dumps(request("ping")))
        answer = await connection.read_message()
        await close(connection)
        return json.loads(answer or "null")

    with pytest.raises(tornado.httpclient.HTTPClientError):
        asyncio.run(socket(""))
    assert asyncio.run(socket("?token=s3cret%2B/="))["result"] == {}
    assert "s3cret" not in proxy.logged()


def test_the_gate_comes_before_the_body_of_an_upgrade_too(own: StartServer) -> None:
    proxy = own(POCKETCODER_TOKEN="t")
    before = proxy.memory()
    for path in ("/mcp/ws", "/exec/ws"):
        with proxy.raw_connection() as peer:
            peer.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400000000\r\n\r\n".encode()
            )
            with contextlib.suppress(OSError):
                for _ in range(100):
                    peer.sendall(bytes(1_000_000))

    assert proxy.peak() - before < 30_000_000


def test_a_request_refused_as_http_is_logged_without_its_token(own: StartServer) -> None:
    proxy = own(POCKETCODER_TOKEN="geheim")
    for line in (b"Authorization: Bearer geheim\x01", b"Bearer geheim\x01: x", b"Host: geheim@x"):
        with proxy.raw_connection() as peer:
            peer.sendall(b"GET /servers HTTP/1.1\r\n" + line + b"\r\n\r\n")
            # It is 400, or 401 with an old Tornado.
            assert peer.recv(100).startswith(b"HTTP/1.1 40")
    assert "geheim" not in proxy.logged()


def test_without_the_token_nobody_learns_the_names_of_servers(own: StartServer) -> None:
    proxy = own(
        "--allow-origin", "http://app.example.com", "--mcp-server=x=cat", POCKETCODER_TOKEN="t0k"
    )
    for headers, status in (({}, 401), ({"Origin": "http://app.example.com"}, 204)):
        for name in ("x", "none"):
            assert proxy.status("OPTIONS", f"/servers/{name}/mcp", None, headers) == status


def test_an_allowed_browser_sees_the_session_header(own: StartServer) -> None:
    proxy = own("--allow-origin", "http://app.example.com", "--mcp-server=x=cat")
    _, headers, _ = mcp(proxy, request("initialize", INITIALIZE), Origin="http://app.example.com")
    assert headers["access-control-expose-headers"] == "Mcp-Session-Id"

    asked = {"Origin": "http://app.example.com", "Access-Control-Request-Method": "POST"}
    status, headers, _ = proxy.request("OPTIONS", "/servers/x/mcp", None, asked)
    assert status == 204

    status, headers, _ = proxy.request("OPTIONS", "/mcp", None, asked)
    assert status == 204
    assert {"Mcp-Method", "Mcp-Name", "MCP-Protocol-Version"} <= set(
        headers["access-control-allow-headers"].split(", ")
    )


OWN_ORIGINS = [
    pytest.param("http://sandbox:3001", "sandbox:3001", True, id="the-same"),
    pytest.param("https://sandbox.example", "sandbox.example", True, id="behind-tls"),
    pytest.param("https://sandbox.example", "sandbox.example:443", True, id="port-of-tls-in-host"),
    pytest.param("http://Sandbox.example:80", "sandbox.example", True, id="port-in-origin"),
    pytest.param("http://[fd00::1]:3001", "[fd00::1]:3001", True, id="ipv6"),
    pytest.param("http://sandbox", "sandbox:3001", False, id="another-port"),
    pytest.param("https://sandbox:80", "sandbox", False, id="port-of-another-scheme"),
    pytest.param("http://evil.example", "sandbox:3001", False, id="another-host"),
    pytest.param("http://sandbox:3001.evil.example", "sandbox:3001", False, id="begins-like-it"),
    pytest.param("http://evil.sandbox:3001", "sandbox:3001", False, id="ends-like-it"),
    pytest.param("http://user@sandbox:3001", "sandbox:3001", False, id="user"),
    pytest.param("null", "null", False, id="null"),
    pytest.param("file://sandbox:3001", "sandbox:3001", False, id="another-scheme"),
    pytest.param("", "", False, id="empty"),
]


@pytest.mark.parametrize(("origin", "host", "is_own"), OWN_ORIGINS)
def test_with_a_token_the_page_may_call_by_any_name_of_the_server(
    origin: str, host: str, is_own: bool
) -> None:
    headers = {"Origin": origin, "Host": host, "Authorization": "Bearer t0k"}
    gate = pp.Gate(token="t0k")
    if is_own:
        assert gate.admit(headers) == "t0k"
        with pytest.raises(pp.Unauthorized):
            gate.admit({**headers, "Authorization": "Bearer guess"})
    else:
        with pytest.raises(pp.Forbidden):
            gate.admit(headers)

    # Without a token a name may have been bound to us anew.
    with pytest.raises(pp.Forbidden):
        pp.Gate().admit(headers)


@pytest.mark.parametrize("path", ["/terminals", "/terminals/poco", "/terminals/poco/keys"])
def test_a_foreign_page_gets_nothing_of_terminals(guarded: Proxy, path: str) -> None:
    method = "POST" if path.endswith("keys") else "GET"
    token = {**JSON_TYPE, "Authorization": f"Bearer {guarded.token}"}
    body = b'{"text": "touch pwned\\r"}' if method == "POST" else None
    for headers, status in (
        (JSON_TYPE, 401),
        ({**token, "Origin": "http://evil.example"}, 403),
        ({**token, "Origin": "null"}, 403),
        ({**token, "Sec-Fetch-Site": "cross-site"}, 403),
        ({**token, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
    ):
        got, answer_headers, answer = guarded.request(method, path, body, headers)
        assert (got, b"panes" in answer) == (status, False)
        assert "access-control-allow-origin" not in answer_headers

    # Only clients that cannot set headers have it in the address.
    assert guarded.status(method, f"{path}?token={guarded.token}", body, JSON_TYPE) == 401
    assert not os.path.exists(f"{guarded.workspace}/pwned")


# ==========================================================================
# Page
# ==========================================================================
def test_the_page_needs_no_token_and_holds_no_data(guarded: Proxy) -> None:
    given = {"Authorization": f"Bearer {guarded.token}"}
    guarded.post({"cmd": "echo secret-command"})
    status, headers, page = guarded.request("GET", "/", headers={"Host": "sandbox.example"})
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    for secret in (b"secret-command", guarded.token.encode(), guarded.workspace.encode()):
        assert secret not in page

    # It is the same for everybody, but for the nonce.
    nonces = [re.findall(rb'nonce="([^"]+)"', page)]
    other = guarded.request("GET", "/", headers=given)[2]
    nonces.append(re.findall(rb'nonce="([^"]+)"', other))
    assert [len(each) for each in nonces] == [2, 2]
    assert len({each for found in nonces for each in found}) == 2
    assert page.replace(nonces[0][0], b"") == other.replace(nonces[1][0], b"")


def test_the_page_may_load_nothing_and_be_in_nothing(proxy: Proxy) -> None:
    _, headers, page = proxy.request("GET", "/")
    nonce = re.findall(rb'nonce="([^"]+)"', page)[0].decode()
    rules = dict(
        rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";")
    )
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    # No address of another place is in it, but the name of a format.
    assert set(re.findall(rb"https?://[\w.]+", page)) == {b"http://www.w3.org"}
    assert not re.findall(rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    assert proxy.request("HEAD", "/")[0] == 200


def test_a_link_of_another_site_may_lead_to_the_page_only(proxy: Proxy) -> None:
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert proxy.status("GET", "/", None, linked) == 200
    assert proxy.status("GET", "/terminals", None, linked) == 403
    assert proxy.status("GET", "/", None, {**linked, "Sec-Fetch-Mode": "no-cors"}) == 403
    assert proxy.status("GET", "/", None, {**linked, "Host": "evil.example"}) == 403


@pytest.mark.browser
def test_live_output_appears_in_its_colours(proxy: Proxy, agent: str, tab: OpenTab) -> None:
    proxy.exec(f"mkfifo {agent}", agent_name=agent)
    page = tab(proxy, agent)
    proxy.exec(
        "printf '\\033[31mred\\033[0m \\033[48;5;21mblue\\033[0m \\033[1;38;2;1;200;3mgreen\\033[0m\\n'",
        agent_name=agent,
    )
    running = proxy.start_exec(f"echo before; cat {agent}", agent_name=agent)
    page.wait_for_text(".row", "\nbefore")

    def style(text: str, name: str) -> Any:
        return page.evaluate(
            "getComputedStyle([...document.querySelectorAll('.row span')]"
            f".find((each) => each.textContent === {text!r})).{name}"
        )

    assert style("red", "color") == "rgb(240, 113, 120)"
    assert style("blue", "backgroundColor") == "rgb(0, 0, 255)"
    assert style("green", "fontWeight") == "700"
    assert style("green", "color") == "rgb(1, 200, 3)"

    assert "\nafter" not in page.text(".row")
    pathlib.Path(proxy.workspace, agent).write_text("after\n")
    page.wait_for_text(".row", "\nafter")
    assert running.result()["exit_code"] == 0
    assert page.complaints() == []


@pytest.mark.browser
def test_a_run_is_seen_running_and_ended(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    proxy.exec("mkfifo go")
    page = tab(proxy)
    page.wait_for_text("#runs", "mkfifo go")
    assert page.evaluate("document.title") == "pocketcoder"
    assert page.text("#running") == "idle"

    running = proxy.start_exec("cat go; exit 3")
    page.wait_for_text("#runs li:first-child", "cat go; exit 3")
    page.wait_for("document.title === '(1) pocketcoder'")
    assert page.text("#running") == "● 1 running"
    assert page.text("#runs li:first-child .mark") == "●"
    page.wait_for_text(".card .head", "cat go; exit 3")

    pathlib.Path(proxy.workspace, "go").write_text("done\n")
    assert running.result()["exit_code"] == 3
    page.wait_for_text("#runs li:first-child .mark", "✗")
    assert "exit 3" in page.text("#runs li:first-child .facts")
    page.wait_for("document.title === 'pocketcoder'")
    # What a screen reader is told.
    assert page.evaluate("byId('told').textContent") == "poco: cat go; exit 3 failed: exit 3"
    assert page.text("#count") == "3 · 1 failed"


@pytest.mark.browser
def test_the_output_of_a_run_is_followed_while_it_comes(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    proxy.exec("mkfifo go")
    running = proxy.start_exec("printf 'one\\033[32mgreen\\033[0m\\n10%%\\r100%%\\n'; cat go")
    page = tab(proxy)
    page.click("#runs li:first-child button")
    page.wait_for_text("#out", "100%")
    assert page.text("#out .line") == "onegreen\n100%"
    assert page.evaluate("document.querySelector('#out .f2').textContent") == "green"
    assert page.text("#command") == "printf 'one\\033[32mgreen\\033[0m\\n10%%\\r100%%\\n'; cat go"

    with open(f"{proxy.workspace}/go", "w") as pipe:
        pipe.write("two\nhalf")
        pipe.flush()
        page.wait_for_text("#out", "\nhalf")
        pipe.write(" a line\n")
    page.wait_for_text("#out", "\nhalf a line")
    assert running.result()["exit_code"] == 0
    page.wait_for_text("#state", "ended well")
    assert page.evaluate("byId('end').hidden") is True
    assert page.complaints() == []


@pytest.mark.browser
def test_of_a_long_output_the_end_is_shown_and_more_on_demand(
    warm: StartServer, tab: OpenTab
) -> None:
    proxy = warm()
    proxy.exec("seq 200000")
    page = tab(proxy)
    page.click("#runs li:first-child button")
    page.wait_for("byId('out').innerText.endsWith('\\n200000')")
    shown = page.evaluate("document.querySelectorAll('#out .line').length")
    assert 10_000 < shown <= 20_000
    page.click("#earlier")
    page.wait_for("output.isComplete && output.start < 1000")
    page.click("#close")
    assert page.evaluate("byId('shown').hidden") is True
    assert page.evaluate("document.activeElement.closest('#runs') !== null") is True


@pytest.mark.browser
def test_a_run_is_ended_only_after_it_was_asked_once_more(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    running = proxy.start_exec("echo started; sleep 600")
    page = tab(proxy)
    page.wait_for_text("#runs li:first-child", "sleep 600")
    page.click("#runs li:first-child button")
    page.wait_for_text("#out", "started")
    page.click("#end")
    page.wait_for("byId('ask').open")
    assert "sleep 600" in page.text("#ask-cited")
    # The answer that does no harm has the focus.
    assert page.evaluate("document.activeElement.id") == "ask-no"
    page.press("Enter", 13, "\r")
    page.wait_for("!byId('ask').open")
    assert not running.future.done()

    page.click("#end")
    page.press("Escape", 27)
    page.wait_for("!byId('ask').open")
    # The event of the question that was closed comes when the next one is open.
    page.evaluate("byId('end').click(); byId('ask-no').click(); byId('end').click()")
    page.click("#ask-yes")
    assert running.result()["ended"] == "cancelled"
    page.wait_for_text("#state", "cancelled")


@pytest.mark.browser
def test_keys_go_through_only_while_they_are_switched_on(
    proxy: Proxy, agent: str, tab: OpenTab
) -> None:
    proxy.exec("true", agent_name=agent)
    page = tab(proxy, agent)
    page.click(".view")
    page.type("echo no\r")
    page.press("Enter", 13, "\r")

    page.click("#keys")
    assert page.evaluate("byId('keys').getAttribute('aria-checked')") == "true"
    assert page.evaluate("document.activeElement.id") == "typed"
    page.type("echo ab")
    page.press("Backspace", 8)
    page.type("ü\u4e2d")
    page.press("Enter", 13, "\r")
    page.wait_for_text(".row", "\naü\u4e2d")
    page.type("cat")
    page.press("Enter", 13, "\r")
    page.wait_for_text(".card .head", "cat")
    page.press("c", 67, modifiers=2)
    page.wait_for_text(".row", "^C")

    # By keyboard alone one gets out, and to the switch.
    page.press("Enter", 13, modifiers=3)
    page.wait_for("document.activeElement.id === 'keys'")
    page.press(" ", 32, " ")
    page.wait_for("byId('keys').getAttribute('aria-checked') === 'false'")
    assert "echo no" not in proxy.screen(agent)
    assert page.complaints() == []


@pytest.mark.browser
def test_a_phone_has_a_row_of_keys_and_pastes(proxy: Proxy, agent: str, tab: OpenTab) -> None:
    proxy.exec("true", agent_name=agent)
    page = tab(proxy, agent, width=360, height=740)
    running = proxy.start_exec("cat -v </dev/tty", agent_name=agent)
    page.wait_for_text(".row", "cat -v")
    page.click("#keys")
    for key in ("Escape", "Up", "Down", "Right", "Left", "Tab", "Enter"):
        page.click(f"#row [data-key={key}]")
    page.wait_for_text(".row", "\n^[^[[A^[[B^[[C^[[D")
    page.click("#row [data-key=C-c]")
    assert running.result()["exit_code"] == 130

    page.click("#paste")
    page.wait_for("byId('ask').open && document.activeElement.id === 'ask-text'")
    page.type("echo pas''ted\necho tw''ice\n")
    page.click("#ask-yes")
    page.wait_for_text(".row", "\npasted")
    page.wait_for_text(".row", "\ntwice")

    # One line needs no question.
    page.evaluate(
        "(() => { const data = new DataTransfer(); data.setData('text/plain', 'echo o\\'\\'ne');"
        " byId('typed').dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})); })()"
    )
    page.click("#row [data-key=Enter]")
    page.wait_for_text(".row", "\none")


ATTACKS = [
    pytest.param("<script>document.title='pwned'</script>", "<script>", id="script"),
    pytest.param("<img src=x onerror=\"document.title='pwned'\">", "<img src=x", id="image"),
    pytest.param("<svg onload=document.title=1><a href=//evil.example>", "<svg onload", id="svg"),
    pytest.param("</div></textarea></script><iframe src=//evil.example>", "</div>", id="end-tags"),
    pytest.param("&lt;b&gt; &#60;b&#62;", "&lt;b&gt;", id="entities"),
    pytest.param(
        "http://evil.example/ javascript:alert(1)", "http://evil.example/", id="addresses"
    ),
    pytest.param("data:text/html,<script>alert(1)</script>", "data:text/html", id="data"),
    pytest.param("\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\.", "link.", id="hyperlink"),
    pytest.param("\x1b]52;c;cHduZWQ=\x07clip", "clip", id="clipboard"),
    pytest.param("\x1b]0;pwned\x07\x1b]2;pwned\x1b\\name", "name", id="title"),
    pytest.param("\x1b[38;2;url(//evil);1;1mx\x1b[0my", "", id="colour-that-is-none"),
    pytest.param("\x1b[38;2;999;-1;1mx\x1b[48;5;999my\x1b[0m", "xy", id="colour-out-of-range"),
    pytest.param("\x1b[5i\x1b[4i\x1bPpwned\x1b\\print", "print", id="printer"),
    pytest.param("abc\u202egnp.exe\u2066x", "abc", id="text-in-the-other-direction"),
    pytest.param("a\0b\x01\x07\x7f\x9bc", "", id="control-characters"),
    pytest.param("x" * 300_000, "x" * 50, id="a-long-line"),
    pytest.param("\x1b[1m" * 20_000 + "many", "many", id="many-sequences"),
    pytest.param("\n" * 20_000 + "below", "below", id="many-lines"),
    pytest.param("\ud800".encode(errors="surrogatepass").decode(errors="replace"), "", id="utf-8"),
]


@pytest.mark.browser
@pytest.mark.parametrize(("attack", "seen"), ATTACKS)
def test_what_is_printed_never_becomes_markup_a_link_or_a_request(
    proxy: Proxy, agent: str, tab: OpenTab, attack: str, seen: str
) -> None:
    path = pathlib.Path(proxy.workspace, agent)
    path.write_bytes(attack.encode() + b"\n")
    proxy.exec("true", agent_name=agent)
    page = tab(proxy, agent)
    elements = "[...document.querySelectorAll('*')].map((each) => each.localName)"
    known = set(page.evaluate(elements)) | {"span", "div", "button", "p", "li"}
    assert not known & {"a", "img", "iframe", "svg", "object", "embed"}
    page.evaluate("window.opened = []; window.open = (...all) => opened.push(all); 0")

    # In a command, on a terminal, in an output.
    comment = re.sub(r"[\0\n\r]", " ", attack)[:2000]
    proxy.exec(f"cat {agent} # {comment}", agent_name=agent)
    proxy.exec(f"cat {agent} >/dev/tty; echo the end", agent_name=agent)
    page.wait_for_text(".row", "\nthe end")
    page.wait_for_text("#runs li:first-child", "echo the end")
    assert len(page.text(".row")) < 200_000
    page.click("#runs li:nth-child(2) button")
    page.wait_for("output.isComplete")
    page.wait_for_text("#out", seen)
    assert seen[:40] in page.text(".row") or len(attack) > 10_000

    assert set(page.evaluate(elements)) <= known
    assert page.evaluate("document.scripts.length") == 1
    assert re.fullmatch(r"(\(\d\) )?pocketcoder", page.evaluate("document.title"))
    assert page.evaluate("opened.length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") is True
    own = f"http://127.0.0.1:{proxy.port}/"
    assert [url for url in page.requests() if not url.startswith((own, "data:image/svg"))] == []
    assert [name for name, _ in page.events if name == "Page.javascriptDialogOpening"] == []
    assert page.complaints() == []
    for sign in "\u202e\u2066\0\x07\x1b":
        assert sign not in page.text("body")


@pytest.mark.browser
def test_a_page_of_another_site_gets_nothing(
    warm: StartServer, browser: Browser, tmp_path: pathlib.Path
) -> None:
    proxy = warm()
    (tmp_path / "index.html").write_text("<p>elsewhere</p>")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = Background(server.serve_forever)
        foreign = browser.open(f"http://127.0.0.1:{server.server_port}/")
        own = f"http://127.0.0.1:{proxy.port}"
        for path in ("/", "/terminals", "/terminals/poco", "/runs"):
            for mode in ("cors", "no-cors"):
                got = foreign.evaluate(
                    f"fetch('{own}{path}', {{mode: '{mode}'}})"
                    ".then((answer) => answer.text()).catch(() => 'refused')"
                )
                assert got in ("refused", "")

        foreign.evaluate(
            f"(() => {{ const frame = document.createElement('iframe'); frame.src = '{own}/';"
            " document.body.append(frame); })()"
        )
        eventually(lambda: any("frame" in text for text in foreign.complaints()))
        # A link leads there all the same.
        foreign.go(f"{own}/")
        foreign.wait_for("document.title === 'pocketcoder'")
        foreign.close()
        server.shutdown()
        serving.result()


@pytest.mark.browser
def test_several_agents_are_side_by_side_or_one_at_a_time(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    # Names that JavaScript has things for.
    for name in ("constructor", "toString"):
        proxy.exec(f"echo I am {name}", agent_name=name)
    page = tab(proxy)
    page.wait_for("document.querySelectorAll('#terminals .card').length === 3")
    page.wait_for_text("#terminals", "I am toString")
    places = page.evaluate(
        "[...document.querySelectorAll('#terminals .card')].map((each) => each.offsetTop)"
    )
    assert places[0] == places[1] < places[2]

    # With the keys that tabs have.
    page.evaluate("document.querySelector('#tabs [aria-selected=true]').focus()")
    page.press("ArrowRight", 39)
    page.wait_for("terminals.size === 1 && terminals.has('constructor')")
    page.wait_for("document.activeElement.dataset.agent === 'constructor'")
    page.wait_for_text("#terminals", "I am constructor")
    page.wait_for("byId('runs').innerText.includes('constructor')")
    assert "toString" not in page.text("#runs")
    page.press("End", 35)
    page.wait_for("terminals.has('toString')")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_usable_on_a_phone(proxy: Proxy, agent: str, tab: OpenTab, scheme: str) -> None:
    proxy.exec("seq 100; printf '%0200d\\n' 5", agent_name=agent)
    page = tab(proxy, agent, width=360, height=740, scheme=scheme)
    page.click("#keys")

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        small = page.evaluate(
            "[...document.querySelectorAll('button, input')].filter((each) => {"
            " const box = each.getBoundingClientRect();"
            " return box.width && (box.width < 28 || box.height < 28); })"
            ".map((each) => each.outerHTML)"
        )
        assert small == []

    fits()
    page.wait_for_text(".row", "\n100")
    page.click("#drawer")
    page.click("#runs li:first-child button")
    page.wait_for("output.isComplete")
    fits()
    assert page.evaluate("byId('left').offsetWidth") == 0
    page.click("#close")
    page.wait_for("byId('runs').offsetWidth > 300")
    fits()
    page.click("#drawer")
    page.wait_for("byId('left').offsetWidth > 300")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(244, 245, 246)", "dark": "rgb(21, 23, 27)"}[scheme]


@pytest.mark.browser
def test_texts_can_be_read_on_light_and_dark(proxy: Proxy, agent: str, tab: OpenTab) -> None:
    sequences = [f"\\033[{number}mxx\\033[0m " for number in (*range(30, 38), *range(90, 98))]
    sequences += [f"\\033[38;5;{number}mxx\\033[0m " for number in range(16, 256, 7)]
    proxy.exec(f"printf '{''.join(sequences)}\\n'", agent_name=agent)
    page = tab(proxy, agent)
    page.wait_for("document.querySelectorAll('.row span').length > 40")
    contrast = """(() => {
        const light = (text) => {
            const parts = text.match(/[\\d.]+/g).slice(0, 3).map((each) => {
                const part = each / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const ratio = (one, two) => {
            const [low, high] = [light(one), light(two)].sort((a, b) => a - b);
            return (high + 0.05) / (low + 0.05);
        };
        const back = (node) => {
            for (; node; node = node.parentElement) {
                const colour = getComputedStyle(node).backgroundColor;
                if (colour !== "rgba(0, 0, 0, 0)") return colour;
            }
        };
        const worst = (selector) => Math.min(...[...document.querySelectorAll(selector)]
            .filter((each) => each.offsetWidth && each.innerText.trim())
            .map((each) => ratio(getComputedStyle(each).color, back(each))));
        return [worst("h1, h2, p, button, .muted, .facts, .time"), worst(".row span")];
    })()"""
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        texts, colours = page.evaluate(contrast)
        # What WCAG asks of text; colours of programs are theirs, but can be seen.
        assert texts >= 4.5
        assert colours >= 2.2


@pytest.mark.browser
def test_a_screen_reader_finds_its_way(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    proxy.exec("exit 2", agent_name="alice")
    proxy.exec("true")
    page = tab(proxy, "poco")
    page.wait_for_text("#runs", "true")
    page.wait_for_text(".row", "$ true")
    page.click("#runs li:first-child button")
    page.click("#keys")
    page.wait_for("output.isComplete")
    found = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in page.call("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    }
    for role, name in (
        ("tablist", "Agents"),
        ("tab", "poco"),
        ("tab", "All"),
        ("tabpanel", "Terminals"),
        ("region", "Screen of poco"),
        ("toolbar", "Typing"),
        ("switch", "Keys"),
        ("button", "Escape"),
        ("button", "Control C"),
        ("complementary", "Runs"),
        ("list", "Runs"),
        ("region", "Output of the run"),
        ("button", "Close the output"),
        ("button", "Fit the columns of poco"),
        ("textbox", "Keys for the terminal"),
    ):
        assert (role, name) in found, sorted(found)
    # A run says how it is before what it is.
    assert any(role == "button" and name.startswith("ended well: true") for role, name in found)
    # Nothing that can be pressed is without a name.
    assert [role for role, name in found if role in ("button", "tab", "textbox") and not name] == []


@pytest.mark.browser
def test_a_server_that_is_away_is_found_again(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    proxy.exec("echo before")
    page = tab(proxy)
    page.wait_for_text(".row", "\nbefore")
    port = proxy.port
    proxy.stop()
    page.wait_for_text("#banner", "The server is away")
    assert "before" in page.text(".row")

    proxy.words[proxy.words.index("-p") + 1] = str(port)
    proxy.start()
    page.wait_for("byId('banner').hidden")
    proxy.exec("echo after")
    page.wait_for_text(".row", "\nafter")
    page.wait_for_text("#runs", "echo after")


@pytest.mark.browser
def test_a_page_too_many_says_so_and_waits_for_its_turn(
    warm: StartServer, tab: OpenTab, stream: OpenStream
) -> None:
    proxy = warm()
    others = [stream(proxy, "/terminals/poco") for _ in range(pp.MAX_WATCHERS)]
    page = tab(proxy)
    page.wait_for_text("#banner", "close another page")
    # The runs are there, and go on.
    proxy.exec("echo more")
    page.wait_for_text("#runs", "echo more")
    assert "close another page" in page.text("#banner")

    others[0].close()
    page.wait_for_text(".row", "echo more")
    assert page.evaluate("byId('banner').hidden") is True


@pytest.mark.browser
def test_a_terminal_that_is_killed_comes_back_on_the_page(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    page = tab(proxy)
    page.wait_for_text(".row", "$ true")
    proxy.tmux("kill-server")
    page.wait_for("document.querySelectorAll('.row').length === 0")
    page.wait_for_text("#terminals", "opens")
    proxy.exec("echo back")
    page.wait_for_text(".row", "\nback")


@pytest.mark.browser
def test_the_token_is_asked_for_kept_for_the_tab_and_sent_in_headers_only(
    own: StartServer, tab: OpenTab
) -> None:
    proxy = own(POCKETCODER_TOKEN="t0k+n/%")
    proxy.exec("echo hello")
    page = tab(proxy)
    page.wait_for("!byId('login').hidden && document.activeElement.id === 'token'")
    assert page.text("#login h2") == "This server wants a token"
    assert "hello" not in page.text("body")

    page.type("wrong")
    page.press("Enter", 13, "\r")
    page.wait_for_text("#why", "This token is wrong")
    assert page.evaluate("sessionStorage.getItem('token')") is None
    page.type("t0k+n/%")
    page.press("Enter", 13, "\r")
    page.wait_for_text(".row", "\nhello")
    page.call("Page.reload")
    page.wait_for("document.readyState === 'complete'")
    page.wait_for_text(".row", "\nhello")
    assert page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"

    linked = tab(proxy, fragment="#token=t0k%2Bn%2F%25")
    linked.wait_for_text(".row", "\nhello")
    assert linked.evaluate("location.href") == f"http://127.0.0.1:{proxy.port}/"
    assert linked.evaluate("history.length") <= 2
    wrong = tab(proxy, fragment="#token=old")
    wrong.wait_for_text("#why", "This token is wrong")
    for each in (page, linked, wrong):
        assert [url for url in each.requests() if "t0k" in url or "token" in url] == []
    assert "t0k" not in proxy.logged()


@pytest.mark.browser
def test_a_tab_that_is_not_seen_watches_nothing(warm: StartServer, tab: OpenTab) -> None:
    proxy = warm()
    page = tab(proxy)
    page.wait_for_text(".row", "$ true")
    assert proxy.tmux("list-clients", "-F", "#{client_pid}").count("\n") == 1
    page.minimize(True)
    page.wait_for("document.hidden")
    eventually(lambda: "\n" not in proxy.tmux("list-clients", "-F", "#{client_pid}"))
    page.minimize(False)
    proxy.exec("echo seen")
    page.wait_for_text(".row", "\nseen")


# ==========================================================================
# Interface
# ==========================================================================
DOCUMENT = pp.openapi(pp.described_routes(), has_token=False)


def operations_of(document: Any) -> Iterator[tuple[str, str, Any]]:
    """Path, method and what the document says of it."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_document_is_openapi_by_a_public_validator(proxy: Proxy, guarded: Proxy) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    status, headers, text = proxy.request("GET", "/openapi.json")
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert guarded.status("GET", "/openapi.json") == 401
    _, _, with_token = guarded.request(
        "GET", "/openapi.json", headers={"Authorization": f"Bearer {guarded.token}"}
    )

    for document in map(json.loads, (text, with_token)):
        assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
        assert document["info"]["version"] == pp.VERSION
    assert json.loads(text) == json.loads(json.dumps(DOCUMENT))


def test_the_document_has_every_method_of_every_route(guarded: Proxy) -> None:
    for pattern, endpoint in pp.ROUTES:
        documented = DOCUMENT["paths"][pp.path_template(pattern)]
        served = {name.lower() for name in endpoint.SUPPORTED_METHODS} - {"options"}
        missing = tornado.web.RequestHandler._unimplemented_method
        served = {name for name in served if getattr(endpoint, name) is not missing}
        assert documented.keys() == served, pattern
        assert endpoint.operations.keys() == served, pattern

    # Those without a token say so, and only those.
    with_token = pp.openapi(pp.described_routes(), has_token=True)
    for path, method, operation in operations_of(with_token):
        concrete = re.sub(r"{\w+}", "x", path)
        status = guarded.status(method.upper(), concrete)
        assert (status == 401) == ("security" in operation), path
        assert (status == 401) == ("401" in operation["responses"]), path


def test_every_operation_is_described_in_words(proxy: Proxy) -> None:
    ids = [operation["operationId"] for _, _, operation in operations_of(DOCUMENT)]
    assert len(set(ids)) == len(ids)
    for path, _, operation in operations_of(DOCUMENT):
        assert operation["summary"]
        assert all(each["description"] for each in operation.get("parameters", [])), path
        kinds = {
            kind
            for answer in operation["responses"].values()
            for kind in resolved(DOCUMENT, answer).get("content", {})
        }
        if "text/event-stream" in kinds or "101" in operation["responses"]:
            assert operation["description"] or "stream" in operation["summary"], path


def check_answer(path: str, method: str, answer: tuple[int, dict[str, str], bytes]) -> None:
    """Assert that an answer of the server is one that the document describes."""
    status, headers, body = answer
    responses = DOCUMENT["paths"][path][method]["responses"]
    assert str(status) in responses, (path, status, body)
    content = resolved(DOCUMENT, responses[str(status)]).get("content")
    if content is None:
        assert body == b""
        return

    kind = headers["content-type"]
    described = next((content[name] for name in content if kind.startswith(name)), None)
    assert described is not None, (path, status, kind)
    schema = {**described["schema"], "components": DOCUMENT["components"]}
    value = json.loads(body) if kind == "application/json" else body.decode("latin-1")
    assert fits(value, schema), (path, status, value)
    for name in resolved(DOCUMENT, responses[str(status)]).get("headers", {}):
        assert name.lower() in headers


BODY_FIELDS = DOCUMENT["paths"]["/exec"]["post"]["requestBody"]["content"]["application/json"][
    "schema"
]["properties"]
# What no schema can say: whether there is such a directory.
IN_WORDS = {("cwd", "max-length"), ("cwd", "a-str")}
EXEC_CASES = [
    pytest.param(field, value, right, id=f"{field}-{name}")
    for field, schema in BODY_FIELDS.items()
    for name, value, right in values_of(schema)
    if (field, name) not in IN_WORDS
]


@pytest.mark.parametrize(("field", "value", "right"), EXEC_CASES)
def test_exec_takes_what_the_document_allows_and_nothing_else(
    proxy: Proxy, agent: str, field: str, value: Any, right: bool
) -> None:
    body = {"cmd": "true", "agent_name": "documented", field: value}
    if field == "argv":
        del body["cmd"]
        # Otherwise bash may wait for what it reads.
        body["timeout"] = 5

    answer = proxy.request("POST", "/exec", json.dumps(body).encode(), JSON_TYPE)
    check_answer("/exec", "post", answer)
    assert answer[0] in ((200, 202) if right else (400,)), answer
    if not right:
        assert field in json.loads(answer[2])["error"]


@pytest.mark.parametrize(
    ("body", "right"),
    [
        pytest.param({"cmd": "true", "argv": ["-c", "true"]}, False, id="both"),
        pytest.param({"cwd": "."}, False, id="neither"),
        pytest.param({"cmd": "true", "other": 1}, True, id="unknown-field"),
        pytest.param([], False, id="no-object"),
    ],
)
def test_exec_takes_bodies_that_the_document_allows_and_no_others(
    proxy: Proxy, body: Any, right: bool
) -> None:
    schema = DOCUMENT["paths"]["/exec"]["post"]["requestBody"]["content"]["application/json"]
    assert fits(body, schema["schema"]) == right
    answer = proxy.request("POST", "/exec", json.dumps(body).encode(), JSON_TYPE)
    check_answer("/exec", "post", answer)
    assert (answer[0] == 200) == right


TYPED = DOCUMENT["paths"]["/terminals/{agent}/keys"]["post"]["requestBody"]["content"][
    "application/json"
]["schema"]["properties"]


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        pytest.param(field, value, right, id=f"{field}-{name}")
        for field, schema in TYPED.items()
        for name, value, right in values_of(schema)
        # No such run is there, and no terminal takes these keys at once.
        if (field, name) not in {("run_id", "example-0"), ("keys", "max-items")}
    ],
)
def test_keys_are_taken_as_the_document_allows_and_not_otherwise(
    relay: Proxy, ended_run: str, field: str, value: Any, right: bool
) -> None:
    body = {"text": " ", "keys": ["C-u"], "show": False, field: value}
    path = "/terminals/{agent}/keys"
    concrete = path.replace("{agent}", "documented")
    answer = relay.request("POST", concrete, json.dumps(body).encode(), JSON_TYPE)
    check_answer(path, "post", answer)
    assert answer[0] == (200 if right else 400), answer
    if not right:
        assert field in json.loads(answer[2])["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 415, id="no-content-type"),
        pytest.param({**JSON_TYPE, "Content-Length": "99999999"}, 413, id="large"),
        pytest.param({**JSON_TYPE, "Host": "evil.example"}, 403, id="host"),
        pytest.param({**JSON_TYPE, "Origin": "http://evil.example"}, 403, id="origin"),
    ],
)
@pytest.mark.parametrize("path", ["/exec", "/mcp", "/messages", "/terminals/{agent}/keys"])
def test_refused_requests_are_answered_as_documented(
    relay: Proxy, path: str, headers: dict[str, str], status: int
) -> None:
    answer = relay.request("POST", path.replace("{agent}", "x"), None, headers)
    check_answer(path, "post", answer)
    assert answer[0] == status


@pytest.fixture(scope="module")
def ended_run(relay: Proxy) -> str:
    """The id of a run that has printed something."""
    return str(relay.exec("echo documented", agent_name="documented")["run_id"])


QUERIES = [
    pytest.param(path, each["name"], value, right, id=f"{path[1:]}-{each['name']}-{name}")
    for path, method, operation in operations_of(DOCUMENT)
    for each in operation.get("parameters", [])
    for name, value, right in values_of(each["schema"])
    # In a query all is text.
    if each["in"] == "query"
    and method == "get"
    # The others answer with a stream.
    and (path.startswith("/runs") or not right)
    and isinstance(value, (int, float, str))
    and not isinstance(value, bool)
    and not (types_of(each["schema"]) == ["string"] and not isinstance(value, str))
]


@pytest.mark.parametrize(("path", "name", "value", "right"), QUERIES)
def test_queries_take_what_the_document_allows_and_nothing_else(
    relay: Proxy, ended_run: str, path: str, name: str, value: Any, right: bool
) -> None:
    given = urllib.parse.urlencode({name: value})
    concrete = path.replace("{run_id}", ended_run).replace("{name}", "legacy")
    answer = relay.request("GET", f"{concrete}?{given}")
    check_answer(path, "get", answer)
    assert answer[0] == (200 if right else 400), answer
    if not right:
        assert name in str(json.loads(answer[2])["error"])


@pytest.mark.parametrize(
    ("value", "right"),
    [
        pytest.param(value, right, id=name)
        for name, value, right in values_of(
            DOCUMENT["paths"]["/runs/{run_id}/signal"]["post"]["requestBody"]["content"][
                "application/json"
            ]["schema"]["properties"]["signal"]
        )
    ],
)
def test_signals_are_those_of_the_document(
    relay: Proxy, agent: str, ended_run: str, value: Any, right: bool
) -> None:
    run_id = ended_run
    if right:
        run_id = relay.post({"cmd": "sleep 60", "wait": 0.2, "agent_name": agent})[1]["run_id"]

    path = f"/runs/{run_id}"
    answer = relay.request("POST", f"{path}/signal", json.dumps({"signal": value}), JSON_TYPE)
    check_answer("/runs/{run_id}/signal", "post", answer)
    assert answer[0] == (200 if right else 400)
    if right:
        check_answer("/runs/{run_id}", "delete", relay.request("DELETE", path))


PLAIN = [
    (path, method)
    for path, method, operation in operations_of(DOCUMENT)
    if "requestBody" not in operation
    and not {"101", "204"} & operation["responses"].keys()
    and "text/event-stream" not in str(operation["responses"].get("200"))
]


@pytest.mark.parametrize(
    ("path", "method"), [pytest.param(*each, id=" ".join(each)) for each in PLAIN]
)
def test_other_answers_are_as_documented(relay: Proxy, path: str, method: str) -> None:
    run_id = relay.exec("true")["run_id"]
    concrete = path.replace("{run_id}", run_id).replace("{name}", "legacy")
    answer = relay.request(method.upper(), concrete)
    if method != "head":
        check_answer(path, method, answer)
    assert answer[0] == 200
    if "{" in path:
        check_answer(path, method, relay.request(method.upper(), re.sub(r"{\w+}", "x", path)))


@pytest.mark.parametrize("path", ["/mcp", "/servers/{name}/mcp"])
def test_the_documents_message_of_mcp_is_answered(relay: Proxy, path: str) -> None:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    for message in content["schema"]["examples"]:
        assert fits(message, content["schema"])
        headers = {**JSON_TYPE, "Accept": "application/json, text/event-stream"}
        concrete = path.replace("{name}", "legacy")
        answer = relay.request("POST", concrete, json.dumps(message), headers)
        check_answer(path, "post", answer)
        assert answer[0] == 200

    for body in (b"{", b"[]", b"{}"):
        answer = relay.request("POST", path.replace("{name}", "legacy"), body, headers)
        check_answer(path, "post", answer)
        assert answer[0] == 400


@pytest.mark.parametrize(
    "path", [path for path, _, each in operations_of(DOCUMENT) if "101" in each["responses"]]
)
def test_a_socket_without_a_handshake_is_refused_as_documented(relay: Proxy, path: str) -> None:
    answer = relay.request("GET", path.replace("{name}", "legacy"))
    check_answer(path, "get", answer)
    assert answer[0] == 400


@pytest.mark.parametrize("prefix", ["", "/servers/{name}"])
def test_sessions_are_answered_as_documented(relay: Proxy, stream: OpenStream, prefix: str) -> None:
    server = prefix.replace("{name}", "legacy")
    content = DOCUMENT["paths"]["/mcp"]["post"]["requestBody"]["content"]["application/json"]
    message = content["schema"]["examples"][0]
    events = stream(relay, f"{server}/sse")
    posts = events.next()
    answer = relay.request("POST", posts, json.dumps(message), JSON_TYPE)
    check_answer(f"{prefix}/messages", "post", answer)
    assert answer[0] == 202
    answer = relay.request(
        "POST", f"{server}/messages?session_id=x", json.dumps(message), JSON_TYPE
    )
    check_answer(f"{prefix}/messages", "post", answer)
    assert answer[0] == 404

    for method in ("get", "delete"):
        for headers, status in (({}, 405), ({"Mcp-Session-Id": "x"}, 404)):
            answer = relay.request(method.upper(), f"{server}/mcp", headers=headers)
            check_answer(f"{prefix}/mcp", method, answer)
            assert answer[0] == status


def test_documented_ways_to_end_a_command_are_those_that_there_are() -> None:
    assert [*pp.ENDINGS] == [*pp.ENDED]


TOOL_CASES = [
    pytest.param(
        tool.shown["name"],
        argument,
        value,
        right,
        id=f"{tool.shown['name']}-{argument}-{name}",
        # Those of /exec have them all, and keys wait until the screen shows what they did.
        marks=[pytest.mark.slow]
        if argument in BODY_FIELDS or (right and tool.shown["name"] == "send_keys")
        else [],
    )
    for tool in pp.TOOLS.values()
    for argument, field in tool.takes.items()
    for name, value, right in values_of(field.schema())
    if (argument, name) not in IN_WORDS
]


def test_tools_and_routes_describe_a_field_in_the_same_way() -> None:
    for tool in pp.TOOLS.values():
        shown = tool.shown["inputSchema"]["properties"]
        assert shown.keys() == tool.takes.keys()
        for name, schema in shown.items():
            same = pp.FIELDS[name].schema()
            for word in ("pattern", "minimum", "maximum", "maxLength", "enum", "description"):
                assert schema.get(word) == same.get(word), (name, word)


@pytest.mark.parametrize(("name", "argument", "value", "right"), TOOL_CASES)
def test_tools_take_what_their_schema_allows_and_nothing_else(
    relay: Proxy, ended_run: str, name: str, argument: str, value: Any, right: bool
) -> None:
    needed = {"cmd": "true", "run_id": ended_run}
    required = pp.TOOLS[name].shown["inputSchema"]["required"]
    arguments: dict[str, Any] = {each: needed[each] for each in required}
    if name in ("exec", "read_terminal", "send_keys"):
        arguments["agent_name"] = "documented"
    if name == "send_keys":
        arguments |= {"text": " ", "keys": ["Enter"]}
    arguments[argument] = value

    # Facts of the sandbox, which no schema knows: no such run, no such terminal, no such offset.
    unknown = r"no run|has no terminal yet|runs in this agent's terminal now|bytes of output so far"
    result = call(relay, name, **arguments)
    if right:
        refused = re.search(r"got .*, expected", text_of(result))
        assert not refused or re.search(unknown, text_of(result)), text_of(result)
    else:
        assert result["isError"] is True
        assert argument in text_of(result)
        assert "expected" in text_of(result)


def project() -> Iterator[tuple[str, str]]:
    """The files of a small program, whose tests fail."""
    yield "prices.py", "def total(items):\n    return sum(price for _, price in items)\n"
    yield "prices.old", "def total(items):\n    return sum([item[1] for item in items])\n"
    yield (
        "test_prices.py",
        "import unittest\n\nfrom prices import total\n\n\n"
        "class Prices(unittest.TestCase):\n"
        "    def test_nothing_costs_nothing(self):\n        self.assertEqual(total([]), 0)\n\n"
        "    def test_prices_add_up(self):\n"
        '        self.assertEqual(total([("tea", 3), ("cake", 4)]), 7)\n\n'
        "    def test_a_discount_is_taken_off(self):\n"
        '        self.assertEqual(total([("tea", 3), ("cake", 4)], discount=2), 5)\n',
    )
    yield (
        "check",
        "#!/bin/bash\nfor name in basket checkout customer delivery invoice; do\n"
        "  printf '\\033[32m✓\\033[0m tests/%-12s \\033[2m%2d passed\\033[0m\\n'"
        " $name $((${#name} + 3))\ndone\n"
        "printf '\\033[31m✗\\033[0m tests/prices       \\033[31m 1 failed\\033[0m\\n'\n"
        "printf '\\033[33m●\\033[0m tests/search       \\033[2mrunning\\033[0m\\n'\ncat go\n",
    )


@pytest.fixture
def shop() -> Iterator[str]:
    """A workspace with a short name: people see it."""
    with tempfile.TemporaryDirectory(prefix="shop-") as folder:
        yield folder


@pytest.mark.browser
def test_the_picture_of_the_readme_shows_two_agents_at_work(
    own: StartServer, tab: OpenTab, shop: str, tmp_path: pathlib.Path
) -> None:
    proxy = own("--workspace", shop)
    for name, text in project():
        pathlib.Path(shop, name).write_text(text)
    os.chmod(f"{shop}/check", 0o755)
    os.mkfifo(f"{shop}/go")
    proxy.exec("grep --color=always -n total *.py", agent_name="alice")
    proxy.exec("ls")
    proxy.exec("wc -l *.py")
    proxy.exec("python3 -m unittest -v test_prices.py", agent_name="alice")
    proxy.exec("diff -u --color=always prices.old prices.py", agent_name="alice")
    running = proxy.start_exec("./check --all")

    page = tab(proxy, width=1280, height=720)
    page.wait_for_text("#terminals", "tests/search")
    page.wait_for_text("#runs li:first-child", "./check --all")
    item = page.evaluate(
        "1 + [...byId('runs').children].findIndex((each) => each.innerText.includes('unittest'))"
    )
    page.click(f"#runs li:nth-child({item}) button")
    page.wait_for("output.isComplete")
    page.wait_for_text("#out", "FAILED")
    page.evaluate("document.activeElement.blur()")
    path = os.environ.get("POCKETCODER_PICTURE") or str(tmp_path / "page.png")
    page.picture(path)
    data = pathlib.Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1280, 720)

    pathlib.Path(shop, "go").write_text("")
    running.result()


# ==========================================================================
# Endpoints
# ==========================================================================
@pytest.mark.slow
def test_health_needs_no_token_and_answers_while_commands_run(own: StartServer) -> None:
    server = own(POCKETCODER_TOKEN="geheim")
    call = server.start_exec("sleep 0.5")
    status, headers, body = server.request("GET", "/health")
    assert status == 200
    assert body == b"ok"
    assert server.status("HEAD", "/health") == 200
    assert call.result()["exit_code"] == 0
    assert "Access-Control-Allow-Origin".lower() not in headers


def test_an_mcp_body_that_is_too_large_is_a_json_rpc_error(guarded: Proxy) -> None:
    given = {**JSON_TYPE, "Authorization": f"Bearer {guarded.token}"}
    status, _, answer = guarded.request("POST", "/mcp", b" " * (pp.MAX_BODY + 1), given)
    assert status == 413
    assert json.loads(answer)["error"]["code"] == -32600


@pytest.mark.parametrize("server", ["", "/servers/legacy"], ids=["built-in", "relayed"])
def test_an_mcp_path_may_end_with_a_slash(relay: Proxy, stream: OpenStream, server: str) -> None:
    status, _, answer = mcp(relay, request("initialize", INITIALIZE), path=f"{server}/mcp/")
    assert status == 200
    assert "serverInfo" in answer["result"]

    events = stream(relay, f"{server}/sse/")
    assert events.status == 200
    path = events.next().replace("/messages?", "/messages/?")
    assert mcp_status(relay, request("initialize", INITIALIZE), path=path) == 202
    assert "serverInfo" in events.next()["result"]
    assert relay.status("GET", "/servers/") == 200

    async def connect() -> None:
        url = f"ws://127.0.0.1:{relay.port}{server}/mcp/ws/"
        await close(await tornado.websocket.websocket_connect(url, subprotocols=["mcp"]))

    asyncio.run(connect())


REFUSED_MESSAGES = [
    pytest.param(
        {"jsonrpc": "1.0", "id": 7, "method": "x", "params": {"cmd": "grep error log"}},
        {"id": 7, "code": -32600},
        id="a-request-with-the-word-error",
    ),
    pytest.param(
        {"jsonrpc": "2.0", "id": "a", "method": ["error"]},
        {"id": "a", "code": -32600},
        id="a-method-that-is-none",
    ),
    pytest.param({"jsonrpc": "1.0", "id": 7, "error": {"code": 1}}, None, id="an-error"),
    pytest.param({"jsonrpc": "1.0", "id": 7, "result": {}}, None, id="a-result"),
    pytest.param(
        {"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": "m"}},
        None,
        id="an-error-without-id",
    ),
]


@pytest.mark.parametrize(("message", "answer"), REFUSED_MESSAGES)
def test_a_websocket_answers_every_bad_message_but_responses(
    proxy: Proxy, message: Any, answer: Any
) -> None:
    async def talk() -> None:
        url = f"ws://127.0.0.1:{proxy.port}/mcp/ws"
        socket: Any = await tornado.websocket.websocket_connect(url, subprotocols=["mcp"])
        await socket.write_message(json.dumps(message))
        await socket.write_message(json.dumps(request("ping", id_="last")))
        got = json.loads(await asyncio.wait_for(socket.read_message(), 10))
        if answer is not None:
            assert {"id": got["id"], "code": got["error"]["code"]} == answer
            got = json.loads(await asyncio.wait_for(socket.read_message(), 10))

        assert got["id"] == "last"
        await close(socket)

    asyncio.run(talk())


def test_a_bad_message_that_is_posted_is_refused_with_its_id(
    proxy: Proxy, stream: OpenStream
) -> None:
    path = stream(proxy, "/sse").next()
    bad = {
        "jsonrpc": "1.0",
        "id": 7,
        "method": "x",
        "params": {"cmd": "grep error log"},
    }
    for where in (path, "/mcp"):
        status, _, answer = mcp(proxy, bad, path=where)
        assert status == 400
        assert answer["id"] == 7
        assert answer["error"]["code"] == -32600


def test_a_body_beyond_the_limit_gets_413_declared_or_chunked(proxy: Proxy) -> None:
    big = b'{"cmd": "true", "stdin": "%s"}' % (b"x" * (16 * 1024 * 1024))
    status, answer = proxy.post(big)
    assert status == 413
    assert answer["exit_code"] == 125

    connection = proxy.connect()
    connection.request(
        "POST",
        "/exec",
        iter([big[i : i + 500_000] for i in range(0, len(big), 500_000)]),
        JSON_TYPE,
        encode_chunked=True,
    )
    assert connection.getresponse().status == 413

    connection.close()


def test_requests_on_one_connection_are_answered_in_order(proxy: Proxy, agent: str) -> None:
    connection = proxy.connect()
    for number in range(5):
        connection.request(
            "POST", "/exec", json.dumps({"cmd": f"echo {number}", "agent_name": agent}), JSON_TYPE
        )
        assert json.loads(connection.getresponse().read())["stdout"] == f"{number}\n"

        connection.request("POST", "/exec", "{", JSON_TYPE)
        answer = connection.getresponse()
        assert answer.status == 400
        assert json.loads(answer.read())["exit_code"] == 2

    connection.close()


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x16\x03\x01\x02\x00", id="tls"),
        pytest.param(b"GET\r\n\r\n", id="no-version"),
        pytest.param(b"POST /exec HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", id="two-hosts"),
        pytest.param(b"\0" * 70_000, id="nul-bytes"),
        pytest.param(
            b"POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
            id="negative-length",
        ),
    ],
)
def test_garbage_ends_only_its_connection(proxy: Proxy, garbage: bytes) -> None:
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as raw,
        contextlib.suppress(OSError),
    ):
        raw.sendall(garbage)
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(4096):
            pass
    assert proxy.status("GET", "/health") == 200


def test_a_stream_sends_output_as_it_is_written_and_then_the_result(
    proxy: Proxy, agent: str
) -> None:
    gate = f"{proxy.folder}/{agent}"
    got: list[tuple[str, dict[str, Any]]] = []
    for event, data, _ in proxy.stream(
        f"echo one; until [ -e {gate} ]; do sleep 0.01; done; printf two; exit 3", agent_name=agent
    ):
        if event == "output" and not got:
            # The command goes on only after its first line is here.
            pathlib.Path(gate).touch()
        if event != ":":
            got.append((event, data))

    assert "".join(data["stdout"] for event, data in got if event == "output") == "one\ntwo"
    event, data = got[-1]
    assert event == "exit"
    assert data["exit_code"] == 3
    assert data["ended"] == "exit"
    assert data["output_bytes"] == 7
    assert "stdout" not in data


def test_a_stream_never_splits_a_character(proxy: Proxy, agent: str) -> None:
    cmd = "for b in 360 237 231 202; do printf \"\\\\$b\"; sleep 0.03; done; printf '\\303'"
    texts = [
        data["stdout"]
        for event, data, _ in proxy.stream(cmd, agent_name=agent)
        if event == "output"
    ]
    assert texts == ["🙂", "\ufffd"]


def test_a_stream_never_splits_a_character_wherever_it_is_cut(proxy: Proxy, agent: str) -> None:
    dice = random.Random(14)
    for _ in range(4 * FUZZ):
        data = spoil(dice, "".join(dice.choices("aé漢🙂", k=10)).encode())
        ends = sorted(dice.choices(range(len(data) + 1), k=3))
        pieces = [data[begin:end] for begin, end in pairwise([0, *ends, len(data)])]
        octal = ("".join(f"\\{byte:03o}" for byte in piece) for piece in pieces)
        cmd = "; sleep 0.004; ".join(f"printf '{piece}'" for piece in octal)
        texts = [
            got["stdout"]
            for event, got, _ in proxy.stream(cmd, agent_name=agent)
            if event == "output"
        ]
        assert "".join(texts) == data.decode(errors="replace"), pieces
        assert all(texts), pieces


def test_a_large_stream_arrives_whole(proxy: Proxy, agent: str) -> None:
    events = [
        (event, data)
        for event, data, _ in proxy.stream("seq 1 300000", agent_name=agent, max_output=10)
    ]
    assert "".join(data["stdout"] for event, data in events if event == "output") == "".join(
        f"{n}\n" for n in range(1, 300_001)
    )
    assert events[-1][1]["exit_code"] == 0


@pytest.mark.slow
def test_a_slow_reader_slows_the_command_and_not_the_server(warm: StartServer) -> None:
    server = warm()
    before = server.memory()
    connection = server.connect()
    accept = {**JSON_TYPE, "Accept": "text/event-stream"}
    connection.request(
        "POST",
        "/exec",
        json.dumps({"cmd": "head -c 200000000 /dev/zero | tr '\\0' x; touch done"}),
        accept,
    )
    answer = connection.getresponse()
    time.sleep(1)
    assert not os.path.exists(f"{server.workspace}/done")
    assert server.memory() - before < 30 * 1024 * 1024

    while answer.read(1 << 20):
        pass
    connection.close()
    assert os.path.exists(f"{server.workspace}/done")


def test_a_closed_event_stream_cancels_its_command(proxy: Proxy, agent: str) -> None:
    stream = proxy.stream("while :; do echo x; sleep 0.01; done; : 63.5", agent_name=agent)
    next(stream)
    # It starts, and then becomes bash.
    wait_until_running(": 63.5")
    stream.close()
    wait_until_gone(": 63.5")


def test_an_error_before_the_stream_is_plain_json(proxy: Proxy) -> None:
    status, answer = proxy.post({"cmd": ""}, Accept="text/event-stream")
    assert status == 400
    assert answer["exit_code"] == 2


@pytest.mark.slow
def test_a_channel_keeps_streams_apart_and_ends_with_the_result(proxy: Proxy, agent: str) -> None:
    async def talk() -> None:
        async with Channel(proxy) as channel:
            await channel.send(
                {"cmd": "cat; echo err >&2; printf '\\377'; exit 3", "agent_name": agent}
            )
            for part in (b"one ", b"", b"two\n"):
                await channel.send(b"\0" + part)
            await channel.send(b"\xff\0")
            final = await channel.end()
            assert channel.streams == {1: b"one two\n\xff", 2: b"err\n"}
            assert final["exit_code"] == 3
            assert final["ended"] == "exit"
            assert final["output_bytes"] == 13
            assert "stdout" not in final
            assert await channel.socket.read_message() is None

    asyncio.run(talk())


def test_a_channel_whose_request_has_stdin_needs_no_end_of_it(proxy: Proxy, agent: str) -> None:
    async def talk() -> None:
        async with Channel(proxy) as channel:
            await channel.send(
                {
                    "cmd": "cat",
                    "stdin": "given",
                    "agent_name": agent,
                }
            )
            assert (await channel.end())["exit_code"] == 0
            assert channel.streams[1] == b"given"

    asyncio.run(talk())


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "KILL", "USR1", "USR2"])
@pytest.mark.slow
def test_a_channel_signals_the_whole_group(proxy: Proxy, agent: str, name: str) -> None:
    async def talk() -> None:
        async with Channel(proxy) as channel:
            await channel.send({"cmd": "echo ready; sleep 68.5", "agent_name": agent})
            await channel.next()
            # Wait for it, since bash itself ignores QUIT.
            await asyncio.to_thread(wait_until_running, "sleep\x0068.5")
            await channel.send({"signal": name})
            final = await channel.end()
            assert final["exit_code"] == 128 + signal.Signals[f"SIG{name}"]
            assert final["ended"] == "exit"

    asyncio.run(talk())
    wait_until_gone("sleep\x0068.5")


def test_a_closed_channel_cancels_its_command(proxy: Proxy, agent: str) -> None:
    async def talk() -> None:
        async with Channel(proxy) as channel:
            await channel.send({"cmd": "echo ready; exec sleep 68.6", "agent_name": agent})
            await channel.next()

    asyncio.run(talk())
    wait_until_gone("sleep\x0068.6")


BAD_MESSAGES = [
    pytest.param([{"cmd": ""}], "cmd", id="empty-cmd"),
    pytest.param([b"{"], "body", id="half-a-body"),
    pytest.param([{"cmd": "sleep 69", "agent_name": "a b"}], "agent_name", id="agent-with-a-blank"),
    pytest.param([{"cmd": "sleep 69", "cwd": "/nowhere"}], "cwd", id="no-such-directory"),
    pytest.param(
        [{"cmd": "exec sleep 69.5"}, b"\x07"], "channel", id="stdin-on-an-unknown-channel"
    ),
    pytest.param([{"cmd": "exec sleep 69.5"}, b""], "channel", id="empty-message"),
    pytest.param([{"cmd": "exec sleep 69.5"}, {"signal": "STOP"}], "signal", id="signal-stop"),
    pytest.param(
        [{"cmd": "exec sleep 69.5"}, {"signal": ["INT"]}], "signal", id="signal-in-a-list"
    ),
    pytest.param([{"cmd": "exec sleep 69.5"}, {}], "signal", id="empty-object"),
]


@pytest.mark.parametrize(("messages", "said"), BAD_MESSAGES)
def test_a_bad_message_ends_the_channel_with_an_error_that_names_it(
    proxy: Proxy, messages: list[bytes | dict[str, Any]], said: str
) -> None:
    async def talk() -> None:
        async with Channel(proxy) as channel:
            for message in messages:
                await channel.send(message)
            final = await channel.end()
            assert final["exit_code"] == 2
            assert said in final["error"]
            assert "ended" not in final

    asyncio.run(talk())
    wait_until_gone("sleep\x0069.5")


@pytest.mark.slow
def test_a_client_that_leaves_a_full_channel_is_noticed(proxy: Proxy, agent: str) -> None:
    async def talk() -> None:
        async with Channel(proxy) as channel:
            await channel.send({"cmd": "echo ready; exec sleep 68.7", "agent_name": agent})
            await channel.next()
            # Nobody reads these messages.
            waiting = [asyncio.ensure_future(channel.send(b"\0" * 100_000)) for _ in range(40)]
            await asyncio.wait(waiting, timeout=0.3)
            stream: Any = channel.socket.protocol and channel.socket.protocol.stream
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.close()
            await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(talk())
    wait_until_gone("sleep\x0068.7", 6)


def test_streamable_http_requires_both_types_and_checks_methods(proxy: Proxy) -> None:
    for accept, status in (
        ("application/json", 406),
        ("text/event-stream", 406),
        ("*/*", 200),
        ("", 200),
    ):
        assert mcp_status(proxy, modern("tools/list"), Accept=accept) == status

    both = "text/event-stream;q=0.9,application/*"
    assert mcp_status(proxy, modern("tools/list"), Accept=both) == 200
    assert mcp_status(proxy, modern("tools/list"), Content_Type="text/plain") == 415
    assert mcp_status(proxy, b"", "GET") == 405
    assert mcp_status(proxy, b"", "DELETE") == 405
    assert mcp_status(proxy, b"", "GET", Mcp_Session_Id="gone") == 404
    assert mcp_status(proxy, b"", "DELETE", Mcp_Session_Id="gone") == 404
    assert mcp_status(proxy, b"", "PUT") == 405
    # This tells clients that try POST first to use GET.
    assert mcp_status(proxy, request("ping"), path="/sse") == 405
    assert mcp_status(proxy, b"", "GET", path="/messages") == 405
    assert mcp_status(proxy, b"x" * (16 * 1024 * 1024 + 1)) == 413
    assert mcp_status(proxy, modern("tools/list"), Origin="http://127.0.0.1.evil.com") == 403
    assert mcp_status(proxy, modern("tools/list"), Host="evil.example.com") == 403


class AnyError(dict[str, Any]):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and set(other) == {"code", "message"}


ANY_ERROR = AnyError()


def test_a_client_of_either_era_is_served_on_an_event_stream(
    proxy: Proxy, agent: str, stream: OpenStream
) -> None:
    events = stream(proxy, "/sse")
    path = events.next()

    def ask(message: dict[str, Any]) -> Any:
        assert mcp_status(proxy, message, path=path, MCP_Protocol_Version="", Mcp_Method="") == 202
        return events.next()

    assert (
        ask(request("initialize", {**INITIALIZE, "protocolVersion": "2024-11-05"}))["result"][
            "protocolVersion"
        ]
        == "2024-11-05"
    )
    assert "annotations" not in ask(request("tools/list"))["result"]["tools"][0]
    assert ask(modern("server/discover", id_="d"))["result"]["supportedVersions"] == ["2026-07-28"]
    assert ask(modern("tools/call", EXEC))["result"]["resultType"] == "complete"
    assert ask(modern("tools/list", version="2099-01-01"))["error"]["code"] == -32022
    assert ask(request("nope", id_=0)) == {"jsonrpc": "2.0", "id": 0, "error": ANY_ERROR}
    assert ask(request("server/discover"))["error"]["code"] == -32602
    assert mcp_status(proxy, b"{", path=path) == 400
    assert mcp_status(proxy, b'{"jsonrpc":"2.0","id":null,"method":"ping"}', path=path) == 400
    assert mcp_status(proxy, request("ping"), path="/messages?session_id=gone") == 404
    assert mcp_status(proxy, request("ping"), path="/messages") == 404
    assert stream(proxy, "/sse?session_id=a%20b").status == 400

    arguments = {"cmd": "sleep 75.5", "agent_name": agent}
    status = mcp_status(
        proxy,
        modern("tools/call", {"name": "exec", "arguments": arguments}, id_="c"),
        path=path,
    )
    assert status == 202

    wait_until_running("sleep\x0075.5")
    cancel = {
        "jsonrpc": "2.0",
        "method": "notifications/cancelled",
        "params": {"requestId": "c"},
    }
    assert mcp_status(proxy, cancel, path=path) == 202
    wait_until_gone("sleep\x0075.5")
    # The cancelled request gets no answer.
    assert ask(request("ping", id_="after"))["id"] == "after"


def test_a_websocket_session_lasts_as_long_as_its_socket(proxy: Proxy, agent: str) -> None:
    async def talk() -> None:
        url = f"ws://127.0.0.1:{proxy.port}/mcp/ws"
        socket: Any = await tornado.websocket.websocket_connect(url, subprotocols=["mcp"])
        assert socket.selected_subprotocol == "mcp"

        async def ask(message: Any) -> Any:
            sent = message if isinstance(message, (str, bytes)) else json.dumps(message)
            await socket.write_message(sent, binary=isinstance(sent, bytes))
            return json.loads(await asyncio.wait_for(socket.read_message(), 10) or "null")

        assert (await ask("{"))["error"]["code"] == -32700
        assert (await ask(b"\xff"))["error"]["code"] == -32700
        assert (await ask("[]"))["id"] is None
        assert (await ask(request("initialize", INITIALIZE, id_="a")))["id"] == "a"
        assert (await ask(request("tools/call", EXEC, id_=0)))["result"]["structuredContent"][
            "output"
        ] == "hi\n"
        assert (await ask(modern("server/discover")))["result"]["resultType"] == "complete"

        params = {"name": "exec", "arguments": {"cmd": "echo go; sleep 76.5", "agent_name": agent}}
        told = await ask(request("tools/call", {**params, "_meta": {"progressToken": "x"}}, id_=3))
        assert told["params"]["message"] == "go"

        await close(socket)
        await asyncio.to_thread(wait_until_gone, "sleep\x0076.5")

    asyncio.run(talk())
    assert proxy.status("GET", "/mcp/ws") == 400
    head = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": pp.WS_KEY,
    }
    status = proxy.status("GET", "/mcp/ws", headers={**head, "Origin": "http://evil.example.com"})
    assert status == 403


def test_a_burst_of_messages_is_answered_whole(proxy: Proxy) -> None:
    burst = b"".join(frame(json.dumps(request("ping", id_=number))) for number in range(300))
    with shaken(proxy, "/mcp/ws", burst) as peer, peer.makefile("rb") as file:
        got = b""
        while b'"id":299,' not in got:
            piece = file.read1()
            assert piece
            got += piece
    assert [int(number) for number in re.findall(rb'"id":(\d+),', got)] == list(range(300))


@pytest.mark.slow
def test_clients_that_leave_at_once_leave_nothing_behind(warm: StartServer) -> None:
    proxy = warm()
    before = proxy.descriptors()
    params = {"name": "exec", "arguments": {"cmd": "sleep 78.5"}}
    cancel = {
        "jsonrpc": "2.0",
        "method": "notifications/cancelled",
        "params": {"requestId": 1},
    }

    for _ in range(10):
        shaken(
            proxy,
            "/mcp/ws",
            frame(json.dumps(request("tools/call", params))) + b"\x88\x80" + bytes(4),
        ).close()
        half = socket.create_connection(("127.0.0.1", proxy.port))
        half.sendall(
            b"POST /exec HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        half.close()
        half = socket.create_connection(("127.0.0.1", proxy.port))
        half.sendall(b"GET /exec/ws HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        half.close()
        reset = shaken(proxy, "/exec/ws", b"x" * 100)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()

    both = frame(json.dumps(request("tools/call", params))) + frame(json.dumps(cancel))
    with shaken(proxy, "/mcp/ws", both + both + frame(json.dumps(request("ping", id_=1)))) as peer:
        got = b""
        # Until the id is free again.
        while b'"result":{}' not in got:
            got += peer.recv(4096)

    # It leaves while its output is being written.
    for _ in range(3):
        flood = Stream(proxy, "/exec", {"cmd": "yes"}, Accept="text/event-stream")
        assert flood.next()["stdout"].startswith("y\n")
        flood.close()

    wait_until_gone("sleep\x0078.5")
    eventually(lambda: proxy.descriptors() <= before)
    # A failure without a listener is logged at the end.
    assert proxy.stop() == 0
    assert "Traceback" not in proxy.logged()


@pytest.mark.slow
def test_an_unused_body_takes_no_memory(warm: StartServer) -> None:
    proxy = warm()
    files = proxy.descriptors()
    before = proxy.memory()
    unread = ["GET /health", "HEAD /health", "OPTIONS /exec"] * 2

    with contextlib.ExitStack() as held:
        for number, start in enumerate(unread + ["POST /exec"] * 5):
            head = f"{start} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 16000000\r\n\r\n"
            peer = held.enter_context(proxy.raw_connection())
            peer.sendall(head.encode() + bytes(15_000_000))
            # This caller leaves before the end of its body.
            if number + 1 >= len(unread):
                held.close()
                eventually(lambda: proxy.descriptors() <= files)

    assert proxy.peak() - before < 50_000_000


@pytest.mark.parametrize(
    ("length", "status"),
    [pytest.param("abc", 400, id="text"), pytest.param("9" * 5000, 413, id="long-number")],
)
def test_a_wrong_content_length_gets_a_4xx_status(
    own: StartServer, length: str, status: int
) -> None:
    proxy = own()
    head = "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with proxy.raw_connection() as peer:
        peer.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert peer.recv(100).startswith(f"HTTP/1.1 {status} ".encode())
    assert "Traceback" not in proxy.logged()


@pytest.mark.parametrize("digits", [200, 305, 350, 5000], ids="{}-digits".format)
def test_a_number_of_any_length_is_refused_by_the_name_of_its_field(
    proxy: Proxy, digits: int
) -> None:
    number = "9" * digits
    assert proxy.post(f'{{"cmd": "echo ok", "unknown": {number}}}'.encode())[0] == 200
    status, answer = proxy.post(f'{{"cmd": "true", "timeout": {number}}}'.encode())
    assert status == 400, answer
    assert answer["error"].startswith("`timeout`"), answer

    answer = mcp(
        proxy,
        f'{{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {{"x": {number}}}}}'.encode(),
    )[2]
    # An unknown session, or a length that is no number.
    assert answer["error"]["code"] in (-32600, -32700)


def test_half_open_and_slow_clients_block_no_other(own: StartServer) -> None:
    proxy = own()
    body = json.dumps(modern("tools/list")).encode()
    head = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/list\r\n"
    stuck = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(50)]
    for number, each in enumerate(stuck):
        each.sendall((head + b"Content-Length: 500\r\n\r\n" + body)[: 20 + number * 8])
    slow = socket.create_connection(("127.0.0.1", proxy.port))
    for byte in head + b"Content-Length: %d\r\n\r\n" % len(body) + body:
        slow.sendall(bytes([byte]))
    assert slow.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert mcp_status(proxy, modern("tools/list")) == 200

    for each in (*stuck, slow):
        each.close()
    eventually(lambda: proxy.descriptors() < 30)


@pytest.mark.slow
def test_idle_connections_are_dropped_for_active_ones(own: StartServer, agent: str) -> None:
    proxy = own()
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (100, 1000))
    busy = proxy.start_exec("touch up; until [ -e go ]; do sleep 0.02; done; echo gone")
    eventually(lambda: os.path.exists(f"{proxy.workspace}/up"))

    with contextlib.ExitStack() as idle:
        for _ in range(200):
            idle.enter_context(proxy.raw_connection())
        assert proxy.exec("touch go; echo hi", agent_name=agent)["stdout"] == "hi\n"
        # A caller that waits for its answer is not disconnected.
        assert busy.result()["stdout"] == "gone\n"
        assert proxy.descriptors() < 100


# What `HttpServer.accept` is for: Tornado's own, with more callers than descriptors.
PLAIN_TORNADO = """
import asyncio, resource, tornado.httpserver, tornado.netutil, tornado.web

async def serve():
    server = tornado.httpserver.HTTPServer(tornado.web.Application([]))
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
    print(sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


@pytest.mark.slow
def test_without_descriptors_tornados_accept_loop_spins_and_ours_rests(own: StartServer) -> None:
    plain = subprocess.Popen(
        [sys.executable, "-c", PLAIN_TORNADO],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    proxy = own()
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (proxy.descriptors() + 8, 1000))
    try:
        assert plain.stdout is not None
        port = int(plain.stdout.readline())
        with contextlib.ExitStack() as callers:
            for _ in range(40):
                callers.enter_context(socket.create_connection(("127.0.0.1", port)))
                callers.enter_context(proxy.raw_connection())
            time.sleep(0.3)
            before = [cpu_seconds(plain.pid), proxy.seconds()]
            time.sleep(1)
            assert cpu_seconds(plain.pid) - before[0] > 0.3
            assert proxy.seconds() - before[1] < 0.2
    finally:
        plain.kill()
        plain.communicate()


@pytest.mark.slow
def test_an_unread_answer_is_dropped_after_a_while(own: StartServer) -> None:
    proxy = own()
    proxy.stop()
    hasty = (
        "import sys, pocketcoder_proxy as module; "
        "module.SLOW_READER_TIMEOUT = 1; sys.exit(module.main())"
    )
    proxy.words[: proxy.words.index("server")] = [sys.executable, "-c", hasty]
    proxy.env["PYTHONPATH"] = str(MODULE.parent)
    proxy.start()
    proxy.exec("true")
    body = json.dumps({"cmd": "yes | head -c 30000000", "max_output": 30_000_000})

    with proxy.raw_connection() as unread:
        head = "POST /exec HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        unread.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert unread.recv(15) == b"HTTP/1.1 200 OK"

        # The connection as the server sees it, established.
        there = rf":{proxy.port:04X} \w+:{unread.getsockname()[1]:04X} 01"
        table = pathlib.Path("/proc/net/tcp")
        assert re.search(there, table.read_text())
        eventually(lambda: not re.search(there, table.read_text()), 20)


def test_headers_beyond_the_limit_end_the_connection(proxy: Proxy) -> None:
    with proxy.raw_connection() as peer:
        got = b""
        with contextlib.suppress(ConnectionError):
            peer.sendall(
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
                + b"a" * pp.MAX_HEADERS
                + b"\r\n\r\n"
            )
            got = peer.recv(100)

    assert got == b""


@pytest.mark.slow
def test_a_server_without_descriptors_pauses_and_recovers(warm: StartServer) -> None:
    proxy = warm()
    connection = socket.socket()
    connection.settimeout(10)
    with connection:
        # No new descriptor can be opened.
        with limited(proxy.process, resource.RLIMIT_NOFILE, 3):
            connection.connect(("127.0.0.1", proxy.port))
            # It tries a second time.
            eventually(lambda: proxy.logged().count("accept failed") == 2)
            assert len(proxy.logged()) < 2000

        assert proxy.status("GET", "/health") == 200


def test_an_error_before_the_body_is_read_closes_the_connection(proxy: Proxy) -> None:
    wrong = [
        ("POST", "/exec", {}),
        ("POST", "/nowhere", JSON_TYPE),
        ("GET", "/exec", {}),
        ("GET", "/mcp", {}),
    ]
    for method, path, headers in wrong:
        assert proxy.request(method, path, b"{}", headers)[1]["connection"] == "close"
    connection = proxy.connect()

    # The connection remains usable afterwards.
    for _ in range(2):
        connection.request("POST", "/exec", b"{}", JSON_TYPE)
        answer = connection.getresponse()
        assert answer.status == 400
        assert answer.getheader("Connection") is None
        answer.read()

    connection.close()


def exchange(proxy: Proxy, sent: bytes) -> bytes:
    """All that the server says to that."""
    got = b""
    with (
        proxy.raw_connection() as peer,
        contextlib.suppress(ConnectionError),
    ):
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        while piece := peer.recv(65536):
            got += piece

    return got


def test_every_http_request_gets_an_answer_in_its_shape(proxy: Proxy) -> None:
    dice = random.Random(12)
    types = ("application/json", "application/json; charset=utf-8", "text/plain", "\xff", "")
    names = [
        "Accept",
        "Origin",
        "Authorization",
        "Mcp-Session-Id",
        "MCP-Protocol-Version",
        "Mcp-Method",
        "Mcp-Name",
    ]
    names += [
        "Content-Type",
        "Host",
        "Upgrade",
        "Connection",
        "Cookie",
        "Expect",
        "Last-Event-ID",
        "X-Forwarded-For",
    ]
    values = [
        *types,
        "*/*",
        "text/event-stream;q=0",
        "null",
        "http://localhost",
        "Bearer",
        "Bearer x",
        "websocket",
    ]
    values += [
        "Upgrade",
        pp.MODERN,
        "tools/call",
        "localhost:1",
        "[::1]",
        "[",
        "a@localhost",
        "=?base64?x?=",
        "100-continue",
    ]
    paths = [
        "/health",
        "/exec",
        "/exec/ws",
        "/mcp",
        "/mcp/ws",
        "/messages",
        "/servers",
        "/servers/x/mcp",
        "/%ff",
        "//",
        "*",
    ]
    paths += [
        "/exec?a=%ff",
        "/messages?session_id=%ff",
        "/sse?session_id=" + "x" * 200,
        "/mcp/ws?token=%00",
        "/\xe9",
    ]

    for _ in range(60 * FUZZ):
        body = dice.choice(
            [b"", b"{}", b'{"cmd": ""}', json.dumps(request("ping")).encode(), dice.randbytes(20)]
        )
        lines = [
            f"{dice.choice(('GET', 'POST', 'DELETE', 'OPTIONS', 'PUT', 'X'))} {dice.choice(paths)} HTTP/1.1"
        ]
        lines += ["Host: localhost", "Connection: close"] if dice.random() < 0.9 else []
        lines += (
            [f"Content-Length: {len(body)}"] if dice.random() < 0.9 else ["Content-Length: \xb2"]
        )
        lines += [f"Content-Type: {dice.choice(types)}"] if dice.random() < 0.8 else []
        for _ in range(dice.randrange(3)):
            lines.append(
                f"{dice.choice(names)}: {dice.choice([dice.choice(values), words(dice).strip()])}"
            )

        sent = (
            "\r\n".join([*lines, "", ""]).encode(
                "utf-8" if dice.random() < 0.5 else "latin-1", "replace"
            )
            + body
        )
        sent = spoil(dice, sent) if dice.random() < 0.4 else sent
        got = exchange(proxy, sent)
        while got.startswith(b"HTTP/1.1 100 "):
            got = got.partition(b"\r\n\r\n")[2]
        head, _, answer = got.partition(b"\r\n\r\n")
        status = int((re.match(rb"HTTP/1\.1 (\d{3}) ", head) or [b"", b"0"])[1])
        assert not got or status, (sent, got)
        assert status < 500, (sent, got)

        if status < 400 or not answer or b"HTTP/1.1 " in answer:
            continue
        told = json.loads(answer)

        if "jsonrpc" in told:
            assert any(path in sent for path in (b"/mcp", b"/sse", b"/messages")), (sent, got)
            assert type(told["error"]["code"]) is int, (sent, got)
        else:
            assert isinstance(told["error"], str), (sent, got)
            assert told["exit_code"] in (2, 125), (sent, got)

    assert proxy.status("GET", "/health") == 200
    assert "Traceback" not in proxy.logged(), proxy.logged()[-3000:]


def client_frame(dice: random.Random, data: bytes, opcode: int) -> bytes:
    """A WebSocket frame of a client, masked."""
    mask = dice.randbytes(4)
    size = len(data)
    length = bytes([128 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return (
        bytes([opcode]) + length + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    )


@pytest.mark.parametrize("path", ["/exec/ws", "/mcp/ws"])
def test_any_frames_end_the_socket_and_leave_nothing(proxy: Proxy, agent: str, path: str) -> None:
    dice = random.Random(13)
    before = proxy.descriptors()
    opcodes = (0x81, 0x82, 0x81, 0x82, 0x01, 0x02, 0x00, 0x80, 0x88, 0x89, 0x8A)
    run = {"cmd": "cat; exec sleep 74.25", "agent_name": agent}
    calls = [
        request("tools/call", {"name": "exec", "arguments": run}, id_=number) for number in (1, "x")
    ]
    texts = [
        json.dumps(each).encode()
        for each in (run, *calls, request("ping"), {"signal": "INT"}, [], {"cmd": ""})
    ]

    for _ in range(20 * FUZZ):
        sent = b""
        for _ in range(dice.randrange(6)):
            data = dice.choice(
                [
                    dice.choice(texts),
                    dice.choice([b"\0stdin", b"\xff\0", b"\xff", b"", b"\x03\xe8"]),
                ]
            )
            data = spoil(dice, data) if dice.random() < 0.3 else data
            sent += client_frame(dice, data, dice.choice((*opcodes, dice.randrange(256))))

        sent = spoil(dice, sent) if dice.random() < 0.3 else sent
        with shaken(proxy, path, sent) as peer, contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass

    wait_until_gone("sleep\x0074.25", 10)
    eventually(lambda: proxy.descriptors() <= before + 10, 10)
    assert "Traceback" not in proxy.logged(), proxy.logged()[-3000:]


# --- Runs.


def test_output_is_read_by_offset_while_it_grows(proxy: Proxy, agent: str) -> None:
    run_id = proxy.launch("printf '\\377\\0ab'; read x </dev/tty; echo end", agent_name=agent)
    eventually(lambda: proxy.output(run_id) == b"\xff\0ab")
    data, headers = proxy.output_and_headers(run_id, offset=1, limit=2)
    assert data == b"\0a"
    assert headers["content-type"] == "application/octet-stream"
    assert headers["output-offset"] == "1"
    assert headers["output-bytes"] == "4"
    assert headers["output-ended"] == "false"
    assert proxy.output(run_id, offset=4) == b""
    assert proxy.output(run_id, limit=0) == b""

    call(proxy, "send_keys", agent_name=agent, keys=["Enter"], run_id=run_id)
    proxy.run(run_id, wait=10)
    data, headers = proxy.output_and_headers(run_id, offset=4)
    assert data == b"end\n"
    assert headers["output-ended"] == "true"


def test_a_gap_in_the_output_is_skipped(own: StartServer) -> None:
    server = own("--keep-mib", "4")
    run_id = server.exec("seq 3000000", timeout=60)["run_id"]
    total = 22888896
    first, headers = server.output_and_headers(run_id)
    assert first.startswith(b"1\n2\n3\n")
    assert headers["output-bytes"] == str(total)

    at = len(first)
    kept = len(first)
    gaps = 0
    data = b""
    while at < total:
        data, headers = server.output_and_headers(run_id, offset=at)
        start = int(headers["output-offset"])
        gaps += start > at
        at = start + len(data)
        kept += len(data)

    assert data.endswith(b"\n3000000\n")
    assert gaps > 0
    assert kept <= 4 * pp.MIB


def test_a_follower_gets_the_rest_as_it_comes_and_then_the_end(proxy: Proxy, agent: str) -> None:
    cmd = "echo é; read x </dev/tty; echo more; exit 3"
    run_id = proxy.launch(cmd, agent_name=agent)
    events = proxy.follow(run_id)
    assert next(events) == ("output", 3, {"stdout": "é\n"})
    call(proxy, "send_keys", agent_name=agent, keys=["Enter"], run_id=run_id)
    assert next(events) == ("output", 8, {"stdout": "more\n"})
    name, _, end = next(events)
    assert name == "exit"
    assert end["exit_code"] == 3
    assert list(events) == []

    assert [event[0] for event in proxy.follow(run_id, last_id=3)] == ["output", "exit"]
    assert [event[0] for event in proxy.follow(run_id, last_id=8)] == ["exit"]


@pytest.mark.slow
def test_a_follower_that_comes_back_gets_every_byte_once(proxy: Proxy, agent: str) -> None:
    cmd = "for i in $(seq 300); do echo $i é🙂; sleep 0.005; done"
    run_id = proxy.launch(cmd, agent_name=agent)
    text = ""
    last_id = 0
    name = ""
    while name != "exit":
        events = proxy.follow(run_id, last_id)
        for name, id_, data in events:
            if name == "exit":
                break
            text += data["stdout"]
            last_id = id_
            if len(text) % 3 == 0:
                break
        events.close()  # type: ignore[attr-defined]

    assert text == "".join(f"{number} é🙂\n" for number in range(1, 301))


@pytest.mark.slow
def test_a_follower_that_reads_nothing_slows_nobody(own: StartServer) -> None:
    server = own()
    run_id = server.launch("read x </dev/tty; seq 3000000")
    eventually(lambda: server.runs(state="running"))
    silent = server.raw_connection()
    other = server.follow(run_id)
    try:
        silent.sendall(
            f"GET /runs/{run_id}/output HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
            "Accept: text/event-stream\r\n\r\n".encode()
        )
        call(server, "send_keys", keys=["Enter"], run_id=run_id)
        *_, last = other
        assert last[0] == "exit"
        assert last[2]["exit_code"] == 0
        assert server.memory() < 150e6
    finally:
        silent.close()


def test_a_follower_gets_what_background_processes_print_after_the_end(
    proxy: Proxy, agent: str
) -> None:
    go_on = f"{proxy.folder}/go-on-{agent}"
    cmd = f"(until [ -e {go_on} ]; do sleep 0.01; done; echo LATE) & echo now"
    run_id = proxy.exec(cmd, agent_name=agent)["run_id"]
    events = proxy.follow(run_id)
    assert next(events)[2] == {"stdout": "now\n"}
    assert next(events)[0] == "exit"
    pathlib.Path(go_on).touch()
    assert next(events) == ("output", 9, {"stdout": "LATE\n"})
    assert list(events) == []


def test_a_stream_starts_at_an_offset_as_well(proxy: Proxy, agent: str) -> None:
    run_id = proxy.exec("echo abc", agent_name=agent)["run_id"]
    headers = {"Accept": "text/event-stream"}
    _, _, stream = proxy.request("GET", f"/runs/{run_id}/output?offset=2", headers=headers)
    assert b'data: {"stdout":"c\\n"}' in stream


def test_deleting_a_run_ends_it_first_and_forgets_it_then(proxy: Proxy, agent: str) -> None:
    run_id = proxy.launch("trap 'echo bye; exit 4' TERM; sleep 79 & wait", agent_name=agent)
    eventually(lambda: proxy.run(run_id)["state"] == "running")
    time.sleep(0.2)
    status, _, answer = proxy.request("DELETE", f"/runs/{run_id}")
    assert status == 200
    ended = json.loads(answer)
    assert ended["ended"] == "cancelled"
    assert ended["exit_code"] == 4
    assert proxy.output(run_id) == b"bye\n"

    assert proxy.status("DELETE", f"/runs/{run_id}") == 204
    assert proxy.status("DELETE", f"/runs/{run_id}") == 404
    assert proxy.status("GET", f"/runs/{run_id}/output") == 404


def test_a_run_whose_caller_waits_is_not_taken_out_of_the_queue(proxy: Proxy, agent: str) -> None:
    blockers = [proxy.start_exec("read x </dev/tty", agent_name=agent) for _ in range(4)]
    eventually(lambda: len(proxy.runs(agent_name=agent, state="running")) == 4)
    last = proxy.start_exec("echo last", agent_name=agent)
    (waiting,) = eventually(lambda: proxy.runs(agent_name=agent, state="waiting"))
    assert proxy.status("DELETE", f"/runs/{waiting['run_id']}") == 400
    for run in proxy.runs(agent_name=agent, state="running"):
        proxy.request("DELETE", f"/runs/{run['run_id']}")
    assert {each.result()["ended"] for each in blockers} == {"cancelled"}
    assert last.result()["stdout"] == "last\n"


def test_deleting_a_run_that_waits_takes_it_out_of_the_queue(proxy: Proxy, agent: str) -> None:
    blockers = [proxy.start_exec("read x </dev/tty", agent_name=agent) for _ in range(4)]
    eventually(lambda: len(proxy.runs(agent_name=agent, state="running")) == 4)
    run_id = proxy.launch("echo never", agent_name=agent)
    status, _, answer = proxy.request("DELETE", f"/runs/{run_id}")
    assert status == 200
    assert json.loads(answer)["exit_code"] == 125
    assert "never started" in json.loads(answer)["error"]
    for run in proxy.runs(agent_name=agent, state="running"):
        proxy.request("DELETE", f"/runs/{run['run_id']}")
    assert {each.result()["ended"] for each in blockers} == {"cancelled"}


def test_a_deleted_run_ends_its_followers(proxy: Proxy, agent: str) -> None:
    run_id = proxy.launch("echo on; sleep 78.75", agent_name=agent)
    events = proxy.follow(run_id)
    assert next(events)[0] == "output"
    proxy.request("DELETE", f"/runs/{run_id}")
    assert next(events)[0] == "exit"


def test_a_signal_reaches_the_process_group(proxy: Proxy, agent: str) -> None:
    run_id = proxy.launch("sleep 79.5", agent_name=agent)
    eventually(lambda: proxy.run(run_id)["state"] == "running")
    status, _ = proxy.post({"signal": "INT"}, f"/runs/{run_id}/signal")
    assert status == 200
    assert proxy.run(run_id, wait=10)["exit_code"] == 130

    status, answer = proxy.post({"signal": "INT"}, f"/runs/{run_id}/signal")
    assert status == 400
    assert "a command that runs now" in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "named"),
    [
        pytest.param("GET", "/runs/nothing", None, 404, "nothing", id="unknown"),
        pytest.param(
            "GET", "/runs/0000000000000000/output", None, 404, "0000", id="unknown-output"
        ),
        pytest.param("GET", "/runs/ID?wait=x", None, 400, "wait", id="wait-text"),
        pytest.param("GET", "/runs/ID?wait=99999", None, 400, "wait", id="wait-too-long"),
        pytest.param("GET", "/runs/ID/output?offset=-1", None, 400, "offset", id="offset-negative"),
        pytest.param("GET", "/runs/ID/output?offset=9", None, 400, "offset", id="offset-behind"),
        pytest.param("GET", "/runs/ID/output?limit=x", None, 400, "limit", id="limit-text"),
        pytest.param("GET", "/runs?limit=1001", None, 400, "limit", id="list-too-many"),
        pytest.param("GET", "/runs?limit=-1", None, 400, "limit", id="list-negative"),
        pytest.param("GET", "/runs?state=done", None, 400, "state", id="list-state"),
        pytest.param("GET", "/runs?agent_name=a%20b", None, 400, "agent_name", id="list-agent"),
        pytest.param("GET", "/runs?before=x", None, 400, "before", id="list-before"),
        pytest.param("POST", "/runs/ID/signal", {}, 400, "signal", id="no-signal"),
        pytest.param("POST", "/runs/ID/signal", {"signal": "STOP"}, 400, "signal", id="a-signal"),
        pytest.param("POST", "/runs/ID/signal", {"signal": ["INT"]}, 400, "signal", id="signals"),
        pytest.param("POST", "/runs/ID/signal", [], 400, "body", id="no-object"),
        pytest.param("POST", "/runs", {}, 405, "expected GET", id="post-to-the-list"),
    ],
)
def test_a_wrong_question_about_a_run_is_refused_with_the_name_of_the_field(
    proxy: Proxy, method: str, path: str, body: Any, status: int, named: str
) -> None:
    run_id = proxy.exec("true", agent_name="asked")["run_id"]
    sent = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    got, _, answer = proxy.request(method, path.replace("ID", run_id), sent, headers)
    assert got == status
    assert named in json.loads(answer)["error"]


def test_a_last_event_id_that_is_no_offset_is_refused(proxy: Proxy, agent: str) -> None:
    run_id = proxy.exec("true", agent_name=agent)["run_id"]
    for last_id in ("x", "-1", "5"):
        headers = {"Accept": "text/event-stream", "Last-Event-ID": last_id}
        assert proxy.status("GET", f"/runs/{run_id}/output", headers=headers) == 400


def test_runs_belong_to_whoever_has_the_token(guarded: Proxy) -> None:
    for path in ("/runs", "/runs/0000000000000000", "/runs/0000000000000000/output"):
        assert guarded.status("GET", path) == 401
    assert guarded.status("DELETE", "/runs/0000000000000000") == 401


@pytest.mark.slow
def test_other_callers_are_answered_while_a_large_answer_leaves(warm: StartServer) -> None:
    server = warm()
    cmd = "head -c 67108864 /dev/zero | tr '\\0' x"
    large = server.start_exec(cmd, max_output=pp.MAX_OUTPUT)
    waits = [0.0]
    while not large.future.done():
        waits.append(timed(lambda: server.request("GET", "/health")))
        time.sleep(0.01)
    assert len(large.result()["stdout"]) == pp.MAX_OUTPUT
    # A guard against standing still; the benchmark has the bound.
    assert max(waits) < 2


def test_terminals_are_listed_as_the_tool_lists_them(proxy: Proxy, agent: str) -> None:
    def listed() -> Any:
        status, headers, answer = proxy.request("GET", "/terminals")
        assert status == 200
        assert headers["content-type"] == "application/json"
        terminals = json.loads(answer)["terminals"]
        return next(each for each in terminals if each["agent_name"] == agent)

    proxy.exec("true", agent_name=agent)
    # Its prompt comes a moment after the answer.
    eventually(lambda: not listed()["busy"])
    told = call(proxy, "list_terminals")["structuredContent"]["terminals"]
    assert listed() == next(each for each in told if each["agent_name"] == agent)


def test_keys_from_the_page_are_typed_and_audited(
    audited: tuple[Proxy, pathlib.Path], stream: OpenStream
) -> None:
    proxy, path = audited
    proxy.exec("true")
    watched = watch(proxy, stream, "poco")
    body: dict[str, Any] = {"text": "echo a$((1+1))b", "keys": ["Enter"], "odd": 1}
    status, answer = proxy.post(body, "/terminals/poco/keys")
    assert status == 200
    assert "\na2b" in answer["screen"]
    assert answer["ignored"] == ["odd"]

    status, answer = proxy.post({"text": "echo c\r", "show": False}, "/terminals/poco/keys")
    assert (status, answer) == (200, {})
    screen_when(watched, lambda screen: "\nc\n" in screen_text(screen))

    lines = [line for line in noted(path) if line["door"] == "page"]
    assert [line["event"] for line in lines] == ["start", "end"] * 2
    assert [line["agent_name"] for line in lines] == ["poco"] * 4
    assert (lines[0]["text"], lines[0]["keys"]) == ("echo a$((1+1))b", ["Enter"])
    assert [lines[at]["exit_code"] for at in (1, 3)] == [0, 0]


BAD_KEYS = [
    pytest.param("poco", b"", "body", id="nothing"),
    pytest.param("poco", b"[]", "body", id="a-list"),
    pytest.param("poco", b'{"text": "\\ud800"}', "text", id="half-a-character"),
    pytest.param("poco", b"{}", "text", id="neither-text-nor-keys"),
    pytest.param("poco", b'{"text": 5}', "text", id="text-a-number"),
    pytest.param("poco", b'{"text": "a\\u0000b"}', "text", id="text-with-nul"),
    pytest.param("poco", b'{"text": "%s"}' % (b"x" * 5000), "text", id="text-too-long"),
    pytest.param("poco", b'{"keys": "Enter"}', "keys", id="keys-a-string"),
    pytest.param("poco", b'{"keys": ["rm -rf /"]}', "keys", id="keys-no-name"),
    pytest.param("poco", b'{"keys": ["-X"]}', "keys", id="keys-an-option"),
    pytest.param("poco", b'{"keys": ["Up"], "run_id": "x"}', "run_id", id="run-no-id"),
    pytest.param(
        "poco", b'{"keys": ["Up"], "run_id": "0123456789abcdef"}', "run_id", id="run-unknown"
    ),
    pytest.param("poco", b'{"keys": ["Up"], "show": 1}', "show", id="show-a-number"),
    pytest.param("po%0Aco", b'{"keys": ["Up"]}', "agent", id="agent-with-a-line-break"),
]


@pytest.mark.parametrize(("name", "body", "field"), BAD_KEYS)
def test_keys_that_are_wrong_are_refused_by_name(
    proxy: Proxy, name: str, body: bytes, field: str
) -> None:
    status, answer = proxy.post(body, f"/terminals/{name}/keys")
    assert (status, answer["exit_code"]) == (400, 2)
    assert field in answer["error"]


# ==========================================================================
# Install
# ==========================================================================
def test_what_install_writes_is_the_shell_under_every_name(
    engine: Caller, tmp_path: pathlib.Path
) -> None:
    names = ["sh", "bash", "my-shell", "pocketcoder"]
    done = run("install", str(tmp_path), *names)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted([pp.INSTALLED, *names])

    first, second = (tmp_path / pp.INSTALLED).read_text().split("\n")[:2]
    assert first == f"#!{sys.executable} -IS"
    assert "SPDX-License-Identifier" in second
    assert (tmp_path / pp.INSTALLED).stat().st_mode & 0o7777 == 0o755

    for name in (pp.INSTALLED, *names):
        got = subprocess.run(
            [tmp_path / name, "-c", "echo $1; exit 3", "zero", name],
            env=engine.env,
            cwd=engine.cwd,
            capture_output=True,
        )
        assert got.stdout.decode() == f"{name}\n"
        assert got.stderr == b""
        assert got.returncode == 3

    got = subprocess.run([tmp_path / "pocketcoder", "check"], env=engine.env, capture_output=True)
    assert got.stdout.endswith(b" is ready\n")
    assert got.returncode == 0

    got = subprocess.run([tmp_path / "pocketcoder", "server"], capture_output=True)
    assert got.returncode == 1
    assert b"only the shell is here" in got.stderr


def test_what_install_writes_is_compiled_for_its_python_only(
    engine: Caller, tmp_path: pathlib.Path
) -> None:
    # Only the text ends with 9.
    path = tmp_path / pp.INSTALLED
    path.write_text(pp.installed_text().replace("\nimport os\n", "\nimport os; os._exit(9)\n", 1))
    both: dict[str, Any] = {
        "env": engine.env,
        "cwd": engine.cwd,
        "capture_output": True,
    }
    done = subprocess.run([sys.executable, str(path), "-c", "echo hi"], **both)
    assert done.stdout == b"hi\n", done.stderr

    done = subprocess.run([old_python("3.8"), str(path), "-c", "echo hi"], **both)
    assert done.returncode == 9


@pytest.mark.slow
def test_install_replaces_what_it_wrote_and_nothing_else(tmp_path: pathlib.Path) -> None:
    assert run("install", str(tmp_path), "sh").returncode == 0
    installed = tmp_path / pp.INSTALLED
    installed.write_text(installed.read_text() + "# older\n")
    assert run("install", str(tmp_path), "sh", "bash").returncode == 0
    assert "# older" not in installed.read_text()

    (tmp_path / "zsh").write_text("#!/bin/sh\n")
    (tmp_path / "ksh").symlink_to("/nowhere")
    (tmp_path / "ash").mkdir()
    installed.write_text(installed.read_text() + "# untouched\n")

    for name in ("zsh", "ksh", "ash"):
        done = run("install", str(tmp_path), "dash", name)
        assert done.returncode == 1
        assert f"{tmp_path}/{name} is not a file that `install` wrote" in done.stderr
        assert done.stderr.count("\n") == 1

    assert not (tmp_path / "dash").exists()
    assert "# untouched" in installed.read_text()
    assert (tmp_path / "zsh").read_text() == "#!/bin/sh\n"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["/no/such"], "DIR", id="no-directory"),
        pytest.param(["/proc", "sh"], "/proc", id="not-to-be-written-to"),
        pytest.param([".", "../sh"], "NAME", id="another-directory"),
        pytest.param([".", "x/y-shell"], "NAME", id="below"),
        pytest.param([".", "python3"], "NAME", id="no-name-of-a-shell"),
    ],
)
@pytest.mark.slow
def test_install_fails_with_one_sentence(words: list[str], said: str) -> None:
    done = run("install", *words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Errno" not in done.stderr


@pytest.mark.parametrize("name", ["pocketcoder", "sh"])
def test_the_console_script_loads_nothing_of_the_server(
    engine: Caller, console_script: str, name: str
) -> None:
    link = os.path.join(os.path.dirname(console_script), name)
    if name != "pocketcoder":
        os.symlink(console_script, link)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", link, "-c", "echo hi; exit 3"],
        env={**engine.env, "PYTHONPATH": str(MODULE.parent)},
        cwd=engine.cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 3
    assert done.stdout == "hi\n"
    assert "_socket" in done.stderr

    for module in ("asyncio", "tornado", "argparse", "json"):
        assert f" {module}\n" not in done.stderr


def test_the_console_script_has_the_other_subcommands_too(console_script: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(MODULE.parent)}
    done = subprocess.run(
        [console_script, "--version"], env=env, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0
    assert done.stdout == f"pocketcoder-proxy {pp.VERSION}\n"


# ==========================================================================
# Attach
# ==========================================================================
class View:
    """`pocketcoder attach` at a terminal of its own, of 80 columns and 24 lines."""

    def __init__(self, proxy: Proxy, *words: str, **variables: str) -> None:
        self.proxy = proxy
        self.main, worker = pty.openpty()
        fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [*program(str(MODULE)), "attach", *words],
            stdin=worker,
            stdout=worker,
            stderr=worker,
            env={**proxy.env, "TERM": "xterm", **variables},
            cwd=proxy.workspace,
            start_new_session=True,
        )
        os.close(worker)
        self.seen = b""

    def read(self) -> None:
        while select.select([self.main], [], [], 0)[0]:
            try:
                self.seen += os.read(self.main, 65536)
            except OSError:
                # The other side is closed.
                return

    def shows(self, text: str) -> bool:
        self.read()
        # Tmux may move its cursor within a line.
        shown = re.sub(rb"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])", b"", self.seen)
        return text.encode() in shown or text.encode() in self.seen

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def leave(self) -> int:
        self.type("\x02d")
        eventually(self.is_over)
        return self.process.wait()

    def is_over(self) -> bool:
        # What it says last must not keep it waiting.
        self.read()
        return self.process.poll() is not None

    def close(self) -> None:
        """Leave nothing behind.  Never raises: it would hide a failure."""
        with contextlib.suppress(Exception):
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(10)
        with contextlib.suppress(OSError):
            os.close(self.main)


OpenView = Callable[..., View]


@pytest.fixture
def view() -> Iterator[OpenView]:
    made: list[View] = []

    def make(proxy: Proxy, *words: str, **variables: str) -> View:
        made.append(View(proxy, *words, **variables))
        return made[-1]

    yield make
    for each in made:
        each.close()


def sessions(proxy: Proxy) -> list[str]:
    return proxy.tmux("list-sessions", "-F", "#{session_name}").split("\n")


def test_a_view_shows_an_agent_and_goes_when_its_person_leaves(
    warm: StartServer, view: OpenView
) -> None:
    proxy = warm()
    proxy.exec("true", agent_name="other")
    opened = view(proxy, "other")
    eventually(lambda: opened.shows("$ true"))
    assert len(sessions(proxy)) == 2

    opened.type("echo typ''ed\r")
    eventually(lambda: "\ntyped" in proxy.screen("other"))
    assert "typed" not in proxy.screen("poco")
    assert opened.leave() == 0
    assert sessions(proxy) == ["pocketcoder"]
    assert proxy.exec("echo $((6 * 7))", agent_name="other")["stdout"] == "42\n"


def test_views_go_their_own_ways_and_have_no_say_in_the_size(
    warm: StartServer, view: OpenView
) -> None:
    proxy = warm()
    proxy.exec("true", agent_name="other")
    first = view(proxy, "poco")
    second = view(proxy, "other")
    eventually(lambda: first.shows("$ true"))
    eventually(lambda: second.shows("$ true"))
    current = proxy.tmux("list-clients", "-F", "#{client_flags} #{window_name}").split("\n")
    assert sorted(line.split()[-1] for line in current if "control-mode" not in line) == [
        "other:terminal",
        "poco:terminal",
    ]
    assert proxy.exec("tput cols < /dev/tty")["stdout"] == "200\n"
    sizes = proxy.tmux(
        "list-windows", "-t", "pocketcoder", "-F", "#{window_width}x#{window_height}"
    )
    assert sizes == "200x50\n200x50"
    assert first.leave() == 0
    assert second.leave() == 0


def test_a_view_that_only_watches_types_nothing(warm: StartServer, view: OpenView) -> None:
    proxy = warm()
    opened = view(proxy, "-r")
    eventually(lambda: opened.shows("$ true"))
    opened.type("touch typed\r")
    proxy.exec("echo shown")
    eventually(lambda: opened.shows("shown"))
    assert opened.leave() == 0
    assert not os.path.exists(f"{proxy.workspace}/typed")


def test_a_view_makes_what_is_missing(own: StartServer, view: OpenView) -> None:
    proxy = own()
    opened = view(proxy, "new", POCKETCODER_WORKSPACE=proxy.workspace)
    eventually(lambda: opened.shows("$ "))
    assert proxy.panes("new")
    opened.type("pwd\r")
    eventually(lambda: f"\n{proxy.workspace}" in proxy.screen("new"))
    assert proxy.exec("echo same", agent_name="new")["stdout"] == "same\n"
    assert len(proxy.panes("new")) == 1
    assert opened.leave() == 0
    assert sessions(proxy) == ["pocketcoder"]


def test_a_view_whose_person_is_gone_leaves_nothing(warm: StartServer, view: OpenView) -> None:
    proxy = warm()
    opened = view(proxy)
    eventually(lambda: opened.shows("$ true"))
    opened.process.send_signal(signal.SIGHUP)
    os.close(opened.main)
    opened.process.wait(15)
    eventually(lambda: sessions(proxy) == ["pocketcoder"])
    eventually(lambda: "\n" not in proxy.tmux("list-clients", "-F", "#{client_pid}"))


def test_a_view_that_is_killed_ends_with_its_terminal(warm: StartServer, view: OpenView) -> None:
    proxy = warm()
    opened = view(proxy)
    eventually(lambda: opened.shows("$ true"))
    opened.process.kill()
    opened.process.wait()
    assert len(sessions(proxy)) == 2
    os.close(opened.main)
    eventually(lambda: sessions(proxy) == ["pocketcoder"])


def test_views_that_end_at_the_same_time_harm_no_terminal(
    warm: StartServer, view: OpenView
) -> None:
    proxy = warm()
    server_pid = proxy.tmux("display-message", "-p", "#{pid}")

    def open_one() -> View:
        opened = view(proxy)
        eventually(lambda: opened.shows("$ true"))
        return opened

    for _ in range(3):
        views = [open_one() for _ in range(3)]
        for each in views:
            each.type("\x02d")
        for each in views:
            eventually(each.is_over)
        assert [each.process.wait() for each in views] == [0, 0, 0]
    assert proxy.tmux("display-message", "-p", "#{pid}") == server_pid
    assert sessions(proxy) == ["pocketcoder"]


def test_attach_says_what_it_lacks(proxy: Proxy, view: OpenView, tmp_path: pathlib.Path) -> None:
    done = run("attach", TMUX_SOCKET=proxy.socket)
    assert (done.returncode, done.stdout) == (1, "")
    assert "must be a terminal" in done.stderr

    done = run("attach", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "needs tmux" in done.stderr

    done = run("attach", "no such agent")
    assert done.returncode == 2
    assert "AGENT: got" in done.stderr

    inside = view(proxy, TMUX=f"{proxy.socket},1,0")
    eventually(lambda: inside.shows("inside of this tmux already"))
    assert inside.process.wait(10) == 1


# ==========================================================================
# MCP configuration
# ==========================================================================
def test_a_typical_config_file_is_read(
    own: StartServer,
    fixtures: pathlib.Path,
    tmp_path: pathlib.Path,
    stream: OpenStream,
) -> None:
    config = tmp_path / "mcp.json"
    server = {
        "command": sys.executable,
        "args": ["-S", str(fixtures), "mcp-fixture", "both"],
        "env": {"SECRET": "s3cret"},
        "cwd": str(tmp_path),
    }
    config.write_text(json.dumps({"mcpServers": {"both": {**server, "type": "stdio"}}, "other": 1}))
    proxy = own(f"--mcp-config={config}", "--mcp-server=two=cat", POCKETCODER_TOKEN="t0ken")
    headers = {"Authorization": "Bearer t0ken"}
    listed = proxy.request("GET", "/servers", None, headers)[2].decode()
    assert [each["name"] for each in json.loads(listed)] == ["both", "two"]
    assert "s3cret" not in listed
    assert proxy.status("GET", "/servers") == 401

    call = modern("tools/call", {"name": "env", "arguments": {"name": "SECRET"}})
    assert text_of(mcp_result(proxy, call, path="/servers/both/mcp", **headers)) == "s3cret"
    call["params"]["arguments"] = {"name": "POCKETCODER_TOKEN"}
    assert text_of(mcp_result(proxy, call, path="/servers/both/mcp", **headers)) == ""

    (shown,) = [
        each
        for each in json.loads(proxy.request("GET", "/servers", None, headers)[2])
        if each["name"] == "both"
    ]
    assert shown["state"] == "running"
    assert shown["era"] == "modern"
    assert type(shown["pid"]) is int
    assert shown["restarts"] == 0


def started_with(tmp_path: pathlib.Path, text: str, *words: str, **variables: str) -> Any:
    """A server that is to fail at its start with this configuration."""
    (tmp_path / "c.json").write_text(text)
    command = [sys.executable, str(MODULE), "server", "-p", "0"]
    return subprocess.run(
        [*command, "--mcp-config", str(tmp_path / "c.json"), *words],
        capture_output=True,
        text=True,
        timeout=20,
        env={
            **os.environ,
            "TMUX_SOCKET": str(tmp_path / "tmux/s"),
            **variables,
        },
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param(["--mcp-server", "x"], "--mcp-server:", id="no-command"),
        pytest.param(["--mcp-server", "x="], "--mcp-server:", id="an-empty-command"),
        pytest.param(["--mcp-server", "=cat"], "the name of an MCP server:", id="no-name"),
        pytest.param(["--mcp-server", "..=cat"], "the name of an MCP server:", id="dots"),
        pytest.param(["--mcp-server", "a\n=cat"], "the name of an MCP server:", id="a-line"),
        pytest.param(["--mcp-server", "a='"], "--mcp-server:", id="an-open-quote"),
        pytest.param(
            ["--mcp-server", "a=/no/such/program x"],
            "MCP server `a`, key `command`",
            id="no-such-program",
        ),
        pytest.param(["--mcp-config", "/no/such/file"], "--mcp-config:", id="no-file"),
        pytest.param(["--mcp-config", "/dev/null"], "--mcp-config:", id="an-empty-file"),
    ],
)
@pytest.mark.slow
def test_wrong_servers_end_the_start_with_a_sentence(words: list[str], text: str) -> None:
    done = subprocess.run(
        [sys.executable, MODULE, "server", *words], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    assert text in done.stderr


@pytest.mark.parametrize(
    ("config", "text"),
    with_slow(
        [
            pytest.param("{}", "--mcp-config:", id="no-servers"),
            pytest.param("{'mcpServers': {}}", "--mcp-config:", id="other-quotes"),
            pytest.param('{"mcpServers": []}', "--mcp-config:", id="a-list"),
        ],
        "other-quotes",
    ),
)
def test_a_wrong_file_of_servers_ends_the_start_with_a_sentence(
    tmp_path: pathlib.Path, config: str, text: str
) -> None:
    done = started_with(tmp_path, config)
    assert done.returncode == 2
    assert text in done.stderr


@pytest.mark.parametrize(
    ("entry", "key"),
    with_slow(
        [
            pytest.param("s3cret", "", id="a-string"),
            pytest.param({"args": ["s3cret"]}, "command", id="no-command"),
            pytest.param({"command": ["cat", "s3cret"]}, "command", id="a-command-as-list"),
            pytest.param({"command": "/no/s3cret"}, "command", id="no-such-program"),
            pytest.param({"command": "cat", "args": "s3cret"}, "args", id="args-as-string"),
            pytest.param(
                {"command": "cat", "args": ["-", ["s3cret"]]}, "args[1]", id="nested-args"
            ),
            pytest.param({"command": "cat", "env": ["s3cret"]}, "env", id="env-as-list"),
            pytest.param({"command": "cat", "env": {"A": {"s3cret": 1}}}, "env.A", id="nested-env"),
            pytest.param({"command": "cat", "env": {"A": None}}, "env.A", id="null-in-env"),
            pytest.param({"command": "cat", "env": {"A": "s3cret\0"}}, "env.A", id="nul-in-env"),
            pytest.param({"command": "cat", "cwd": "/no/s3cret"}, "cwd", id="no-such-directory"),
            pytest.param({"command": "cat", "cwd": ["s3cret"]}, "cwd", id="cwd-as-list"),
            pytest.param(
                {"command": "cat", "disabled": "s3cret"}, "disabled", id="disabled-as-text"
            ),
            pytest.param(
                {"command": "cat", "args": ["s3cret${UNSET_X}"]}, "args[0]", id="no-variable"
            ),
            pytest.param(
                {"command": "cat", "env": {"A": "${input:s3cret}"}}, "env.A", id="an-input"
            ),
        ],
        "no-command",
        "nested-env",
        "no-variable",
    ),
)
def test_a_bad_entry_is_reported_by_its_key_and_never_shown(
    tmp_path: pathlib.Path, entry: Any, key: str
) -> None:
    config = {"mcpServers": {"good": {"command": "cat"}, "My Bad": entry}}
    done = started_with(tmp_path, json.dumps(config))
    assert done.returncode == 2
    assert "MCP server `My Bad`" in done.stderr
    assert f", key `{key}`:" in done.stderr or not key
    assert "s3cret" not in done.stderr
    assert "listening" not in done.stdout


LIVED_IN = """\ufeff{
  // What VS Code writes has `servers`; a // in "a string // is none".
  "inputs": [],
  "SERVERS": {
    "plain": {
      "command": "PYTHON", /* with
      a comment */ "args": ["-S", "FIXTURES", "mcp-fixture", "${ERA:-both}"],
      "env": {
        "PORT": 8080, "RATE": 1.5, "DEBUG": true, "URL": "http://x//y", "TOKEN": "${TOKEN_X}",
        "HOST": "${HOST_X:-local}host", "SHELL_X": "${#x} $TOKEN_X", "CODE": "${env:TOKEN_X}",
      },
    },
    "My Server": {"command": "cat"},
    "@scope/x": {"command": "PYTHON", "args": ["-S", "FIXTURES", "mcp-fixture", "legacy"]},
    "off": {"command": "/no/such/program", "disabled": true, "args": ["${UNSET_X}"]},
    "remote": {"type": "http", "url": "https://s3cret.example/mcp"},
  },
}
"""


@pytest.mark.parametrize("key", ["mcpServers", "servers"])
@pytest.mark.slow
def test_both_common_layouts_of_a_config_file_are_read(
    own: StartServer,
    fixtures: pathlib.Path,
    tmp_path: pathlib.Path,
    stream: OpenStream,
    key: str,
) -> None:
    config = tmp_path / "mcp.json"
    text = LIVED_IN.replace("PYTHON", sys.executable).replace("FIXTURES", str(fixtures))
    config.write_text(text.replace("SERVERS", key))
    proxy = own(f"--mcp-config={config}", TOKEN_X="s3cret")
    names = [each["name"] for each in proxy.servers()]
    assert names == ["plain", "My Server", "@scope/x"]
    assert "server off is not served: it is disabled" in proxy.logged()
    assert "server remote is not served: it is a remote server" in proxy.logged()
    assert "s3cret" not in proxy.logged()

    client = Client(proxy, "modern", "plain", stream)
    expected = {
        "PORT": "8080",
        "RATE": "1.5",
        "DEBUG": "true",
        "URL": "http://x//y",
        "TOKEN": "s3cret",
        "HOST": "localhost",
        "SHELL_X": "${#x} $TOKEN_X",
        "CODE": "s3cret",
    }

    def variable(name: str) -> str:
        params = {"name": "env", "arguments": {"name": name}}
        return text_of(client.result("tools/call", params))

    assert {name: variable(name) for name in expected} == expected

    events = stream(proxy, "/servers/%40scope%2Fx/sse")
    path = events.next()
    assert path.startswith("/servers/%40scope%2Fx/messages?session_id=")
    assert mcp_status(proxy, request("initialize", INITIALIZE), path=path) == 202
    assert events.next()["result"]["serverInfo"]["name"] == "fixture-server"
    assert type(text_of(Client(proxy, "legacy", "%40scope%2Fx", stream).call("pid"))) is str
    assert mcp_status(proxy, modern("tools/list"), path="/servers/My%20Server/mcp") == 200


# ==========================================================================
# Listening
# ==========================================================================
def is_there(path: str) -> bool:
    return os.path.lexists(path)


@pytest.fixture
def place() -> Iterator[str]:
    """A path for a unix socket, short enough for one."""
    folder = tempfile.mkdtemp(prefix="pc")
    yield f"{folder}/socket"
    shutil.rmtree(folder)


@pytest.fixture
def nearby(own: StartServer, place: str) -> Proxy:
    """A server at a unix socket."""
    return own(unix=place)


def test_a_server_at_a_unix_socket_says_so_and_removes_it_at_its_end(nearby: Proxy) -> None:
    assert nearby.said == f"pocketcoder: listening on unix:{nearby.unix}\n"
    found = os.lstat(nearby.unix)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    eventually(lambda: f" address=unix:{nearby.unix} " in nearby.logged())
    assert nearby.stop() == 0
    assert not is_there(nearby.unix)


def test_the_mode_of_a_unix_socket_depends_on_no_umask(own: StartServer, place: str) -> None:
    before = os.umask(0)
    try:
        own(unix=place)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(place).st_mode) == 0o600


def test_a_unix_socket_needs_no_token_and_takes_any_host(nearby: Proxy) -> None:
    assert nearby.exec("echo in")["stdout"] == "in\n"
    status, answer = nearby.post({"cmd": "echo in"}, Host="sandbox")
    assert status == 200
    assert answer["stdout"] == "in\n"
    assert nearby.post({"cmd": "true"}, Origin="http://evil.example")[0] == 403
    assert nearby.status("GET", "/servers", None, {"Sec-Fetch-Site": "cross-site"}) == 403
    eventually(lambda: "address=unix reason=" in nearby.logged())


def test_a_token_is_demanded_at_a_unix_socket_too_if_there_is_one(
    own: StartServer, place: str
) -> None:
    server = own(unix=place, POCKETCODER_TOKEN="t0k", POCKETCODER_HOST="0.0.0.0")
    assert server.status("POST", "/exec", b"{}", JSON_TYPE) == 401
    assert server.exec("echo in")["stdout"] == "in\n"


def test_the_shell_and_check_reach_a_unix_socket(nearby: Proxy, names: str) -> None:
    engine = Caller(nearby, names)
    done = engine.run("-c", "cat; echo err >&2; exit 7", input=b"in\xff")
    assert done == (7, b"in\xff", b"err\n")
    ready = check(nearby.url)
    assert ready.stdout == f"pocketcoder: {nearby.url} is ready\n"
    assert ready.returncode == 0

    big = engine.run("-c", "head -c 30000000 /dev/zero | tee >(wc -c >&2)")
    assert len(big[1]) == 30_000_000
    assert engine.run("-c", "wc -c", input=bytes(5_000_000))[1] == b"5000000\n"


def test_streams_and_mcp_work_at_a_unix_socket(nearby: Proxy) -> None:
    events = [name for name, _, _ in nearby.stream("echo one; sleep 0.3; echo two")]
    assert [name for name in events if name != ":"] == ["output", "output", "exit"]
    assert text_of(call(nearby, "exec", cmd="echo tool")) == "tool\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGTERM, id="stopped", marks=pytest.mark.slow),
    ],
)
def test_a_shell_at_a_unix_socket_that_ends_takes_its_command_along(
    nearby: Proxy, names: str, number: int
) -> None:
    engine = Caller(nearby, names)
    # Nobody reads this stdin, so after a while nobody reads the connection either.
    with open("/dev/zero", "rb") as zeros:
        process = engine.start(
            "-c", "(setsid sleep 68.1 &); echo ready; exec sleep 68.2", stdin=zeros
        )
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.send_signal(number)
        process.communicate(timeout=10)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    wait_until_gone("sleep\x0068.", 6)


def test_a_socket_that_a_killed_server_left_is_replaced(nearby: Proxy) -> None:
    nearby.stop(signal.SIGKILL)
    assert is_there(nearby.unix)
    done = check(nearby.url)
    assert "Connection refused; is it running?" in done.stderr

    nearby.start()
    assert nearby.exec("echo again")["stdout"] == "again\n"


def test_a_socket_at_which_a_server_listens_is_left_alone(nearby: Proxy) -> None:
    done = run("server", "--unix", nearby.unix, TMUX_SOCKET=f"{nearby.folder}/other/s")
    assert done.returncode == 1
    assert done.stderr == (
        f"pocketcoder: --unix: another server listens at {nearby.unix}: stop that, or give another"
        " path\n"
    )
    assert nearby.exec("echo still")["stdout"] == "still\n"


def test_a_socket_of_a_stopped_server_with_a_full_backlog_is_left_alone(place: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(place)
        listener.listen(0)
        with connected_to(place):
            done = run("server", "--unix", place, TMUX_SOCKET=f"{place}.d/s")
    assert done.returncode == 1
    assert "another server listens" in done.stderr
    assert is_there(place)


@pytest.mark.slow
def test_of_servers_that_start_at_once_at_a_stale_socket_one_listens(place: str) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(place)
    stale.close()
    env = outer_environment() | {"TMUX_SOCKET": f"{place}.tmux/s"}
    words = [*program(str(MODULE)), "server", "--unix", place]
    servers = [
        subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    ended = eventually(
        lambda: [each for each in servers if each.poll() is not None][4:] and servers
    )
    living = [each for each in ended if each.poll() is None]
    assert len(living) == 1
    assert check(f"unix:{place}").returncode == 0

    living[0].terminate()
    said = [each.communicate(timeout=20) for each in servers]
    assert sorted(each.returncode for each in servers) == [0, 1, 1, 1, 1, 1]
    assert sum(b"another server listens" in err for _, err in said) == 5
    assert not is_there(place)


@pytest.mark.parametrize(
    "kind",
    [
        "file",
        "link",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("directory", "link-to-nowhere", "fifo")
        ),
    ],
)
def test_what_is_no_socket_is_left_alone(place: str, kind: str) -> None:
    if kind == "file":
        pathlib.Path(place).write_text("mine")
    elif kind == "directory":
        os.mkdir(place)
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        os.symlink("/etc/passwd" if kind == "link" else "/no/where", place)

    before = os.lstat(place)
    done = run("server", "--unix", place, TMUX_SOCKET=f"{place}.d/s")
    assert done.returncode == 1
    assert (
        done.stderr == f"pocketcoder: --unix: {place} is there, and no socket: give another path\n"
    )
    assert os.path.samestat(os.lstat(place), before)


def test_a_stopping_server_leaves_a_file_that_another_has_put_there(nearby: Proxy) -> None:
    os.unlink(nearby.unix)
    pathlib.Path(nearby.unix).write_text("mine")
    assert nearby.stop() == 0
    assert pathlib.Path(nearby.unix).read_text() == "mine"


@pytest.mark.slow
def test_a_relative_path_and_linked_directories_are_fine(own: StartServer, place: str) -> None:
    folder = os.path.dirname(place)
    os.mkdir(f"{folder}/real")
    os.symlink("real", f"{folder}/link")
    server = own(unix=f"{folder}/link/s")
    assert stat.S_ISSOCK(os.lstat(f"{folder}/real/s").st_mode)
    assert check(server.url).returncode == 0


@pytest.mark.slow
def test_the_longest_path_works(own: StartServer, names: str) -> None:
    folder = tempfile.mkdtemp(prefix="pc")
    server = own(unix=f"{folder}/{'x' * (pp.MAX_SOCKET_PATH - len(folder) - 1)}")
    assert Caller(server, names).run("-c", "echo hi")[:2] == (0, b"hi\n")
    server.stop()
    shutil.rmtree(folder)


def test_another_user_cannot_use_a_unix_socket(nearby: Proxy) -> None:
    os.chmod(os.path.dirname(nearby.unix), 0o755)
    script = "import os, socket, sys; os.setuid(65534)\n"
    script += "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, nearby.unix], capture_output=True, text=True
    )
    assert "PermissionError" in done.stderr


def test_a_directory_that_others_could_change_is_refused(place: str) -> None:
    folder = os.path.dirname(place)
    os.chown(folder, 65534, 65534)
    os.chmod(folder, 0o777)
    done = run("server", "--unix", place, TMUX_SOCKET=f"{place}.d/s")
    os.chown(folder, os.getuid(), os.getgid())
    assert done.returncode == 1
    assert "set --unix to a path in a safe directory" in done.stderr
    assert not is_there(place)


def test_a_server_looks_at_a_stale_socket_only_when_no_other_starts_there(place: str) -> None:
    folder = os.path.dirname(place)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    words = [*program(str(MODULE)), "server", "--unix", place]
    env = outer_environment() | {"TMUX_SOCKET": f"{place}.tmux/s"}
    with (
        subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first,
    ):
        try:
            eventually(lambda: folder in descriptors_of(server.pid))
            first.bind(place)
            first.listen()
            os.close(lock)
            said = server.communicate(timeout=20)[1]
        finally:
            server.kill()
    assert server.returncode == 1
    assert "another server listens" in said


@pytest.mark.slow
def test_a_lock_of_another_program_on_the_directory_is_not_waited_for_long(place: str) -> None:
    fd = os.open(os.path.dirname(place), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    done = run("server", "--unix", place, TMUX_SOCKET=f"{place}.d/s")
    os.close(fd)
    assert done.returncode == 1
    assert "another program holds a lock" in done.stderr


async def written_to(reads: Callable[[socket.socket], Any]) -> bool:
    """Whether a connection at a unix socket is kept while its peer does this for a second."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        stream = pp.LocalStream(ours)
        stream.be_patient(0.3)
        with contextlib.suppress(tornado.iostream.StreamClosedError):
            written = stream.write(bytes(3_000_000))
            await asyncio.get_running_loop().run_in_executor(None, reads, theirs)
            if not stream.closed():
                await asyncio.wait({written}, timeout=0)
        kept = not stream.closed()
        stream.close()
        with contextlib.suppress(tornado.iostream.StreamClosedError):
            await written
        return kept


@pytest.mark.slow
def test_a_reader_at_a_unix_socket_that_takes_nothing_is_given_up() -> None:
    assert not asyncio.run(written_to(lambda peer: time.sleep(1)))


@pytest.mark.slow
def test_a_slow_reader_at_a_unix_socket_is_waited_for() -> None:
    def reads(peer: socket.socket) -> None:
        for _ in range(10):
            time.sleep(0.1)
            peer.recv(100_000)

    assert asyncio.run(written_to(reads))


# ==========================================================================
# Command line
# ==========================================================================
def level_words(words: list[str]) -> list[str]:
    """The words that name the subcommand."""
    return words[:1] if words and words[0] in pp.HELP else []


@pytest.mark.parametrize(
    "level",
    [
        "",
        "server",
        *(pytest.param(level, marks=pytest.mark.slow) for level in pp.HELP if level != "server"),
    ],
)
def test_the_version_is_printed_on_every_level(level: str) -> None:
    done = run(*level.split(), "--version")
    assert done.returncode == 0
    assert done.stdout == f"pocketcoder-proxy {pp.VERSION}\n"


@pytest.mark.parametrize("option", [pytest.param("-h", marks=pytest.mark.slow), "--help"])
@pytest.mark.parametrize("level", ["", *pp.HELP])
def test_help_is_printed_on_every_level_with_variables_and_two_examples(
    level: str, option: str
) -> None:
    done = run(*level.split(), option)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(f"usage: pocketcoder{level and ' '}{level}")
    examples = done.stdout.partition("\nexamples:\n")[2]
    assert len(re.findall(r"^  \S", examples, re.MULTILINE)) >= 2
    named = pp.HELP[level].variables if level else pp.VARIABLES
    assert [name for name in named if not re.search(rf"^  {name} ", done.stdout, re.M)] == []
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_help_names_every_variable_that_is_read() -> None:
    head = pp.__doc__ or ""
    read = head.partition("Read from the environment:")[2].partition("Set for a command")[0]
    names = set(re.findall(r"[A-Z]+_[A-Z_]+", read))
    assert names == set(pp.VARIABLES)


EXAMPLES = [example for each in pp.HELP.values() for example in each.examples]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_help_is_understood(example: str) -> None:
    line = re.findall(r"\b(pocketcoder .*?)(?:;|$)", example)[0]
    if "'" in line:
        line = example
    command = pp.Cli.parse(shlex.split(line)).command
    assert command.name == line.split()[1]


@pytest.mark.parametrize("words", [[], ["install"]], ids=["above", "install"])
def test_without_arguments_that_are_needed_the_help_is_printed(words: list[str]) -> None:
    with stdin_of("terminal") as options:
        done = subprocess.run(
            [*program(str(MODULE)), *words], stdin=options["stdin"], capture_output=True
        )
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"usage: pocketcoder")
    assert b"examples:" in done.stderr


LONG_PATH = "/tmp/" + "x" * 120
URL_FORMS = "expected http://HOST:PORT, without a user, a password or a path, or unix:/PATH"
SESSION_FORM = (
    'TMUX_SESSION: got "{}", expected a name of a tmux session without `:`, `.`, `#`, `=`, `;`,'
    " `$`, `\\`"
)
OPEN = (
    "the address {} is reached from elsewhere: set POCKETCODER_TOKEN to a secret, here and for the"
    " shell, or listen on 127.0.0.1 (--host, POCKETCODER_HOST)"
)
# words, variables, status, what is printed
MISTAKES = [
    pytest.param(
        ["sever"], {}, 2, "no such subcommand: sever; did you mean server?", id="subcommand-typo"
    ),
    pytest.param(
        ["ls", "-la", "a b"],
        {},
        2,
        "no such subcommand: ls; to run it in the sandbox: pocketcoder shell ls -la 'a b'",
        id="subcommand-forgotten",
    ),
    pytest.param(
        ["server", "--prot", "3002"],
        {},
        2,
        "no such option: --prot; did you mean --port?",
        id="option-typo",
    ),
    pytest.param(
        ["server", "--audit-lgo=x"],
        {},
        2,
        "no such option: --audit-lgo; did you mean --audit-log?",
        id="option-typo-with-value",
    ),
    pytest.param(
        ["server", "-P", "1"], {}, 2, "no such option: -P; did you mean -p?", id="option-case"
    ),
    pytest.param(["server", "--zzz"], {}, 2, "no such option: --zzz", id="option-like-no-other"),
    pytest.param(
        ["server", "3002"], {}, 2, 'got "3002", expected only options', id="word-too-many"
    ),
    pytest.param(
        ["check", "http://x"], {}, 2, 'got "http://x", expected only options', id="check-a-word"
    ),
    pytest.param(
        ["server", "-p"], {}, 2, "--port: got nothing, expected a value", id="value-missing"
    ),
    pytest.param(
        ["server", "-p", "x"],
        {},
        2,
        '--port: got "x", expected a number from 0 to 65535',
        id="port-no-number",
    ),
    pytest.param(
        ["server", "-p", "70000"],
        {},
        2,
        '--port: got "70000", expected a number from 0 to 65535',
        id="port-too-large",
    ),
    pytest.param(
        ["server", "-p", "9" * 5000],
        {},
        2,
        f'--port: got "{"9" * 80}"..., expected a number from 0 to 65535',
        id="port-far-too-large",
    ),
    pytest.param(
        ["server", "--port="],
        {},
        2,
        "--port: got nothing (is a variable empty?), expected a number from 0 to 65535",
        id="port-empty",
    ),
    pytest.param(
        ["server", "--host", ""],
        {"POCKETCODER_TOKEN": "t"},
        2,
        "--host: got nothing (is a variable empty?), expected a name or address of this machine",
        id="host-empty",
    ),
    pytest.param(
        ["server", "--host", "0.0.0.0"], {}, 1, OPEN.format("0.0.0.0"), id="open-without-a-token"
    ),
    pytest.param(
        ["server", "--host", "::"], {}, 1, OPEN.format("::"), id="open-by-ip6-without-a-token"
    ),
    pytest.param(
        ["server"],
        {"POCKETCODER_HOST": "0.0.0.0"},
        1,
        OPEN.format("0.0.0.0"),
        id="open-by-variable-without-a-token",
    ),
    pytest.param(
        ["server", "--host", "192.0.2.1", "-p", "0"],
        {"POCKETCODER_TOKEN": "t"},
        1,
        "cannot listen on 192.0.2.1:0: this machine has no such address",
        id="host-of-another-machine",
    ),
    pytest.param(
        ["server", "--host", "no-such-host.invalid", "-p", "0"],
        {"POCKETCODER_TOKEN": "t"},
        1,
        "cannot listen on no-such-host.invalid:0: Name or service not known",
        id="host-unknown",
    ),
    pytest.param(
        ["server", "--host", "a..b", "-p", "0"],
        {"POCKETCODER_TOKEN": "t"},
        1,
        "cannot listen on a..b:0: no name of a host",
        id="host-no-name",
    ),
    pytest.param(
        ["server", "-p", "0"],
        {"POCKETCODER_TOKEN": "a b"},
        1,
        "POCKETCODER_TOKEN: expected letters, digits and marks of ASCII, without blanks and ends of"
        " lines",
        id="token-with-a-blank",
    ),
    pytest.param(
        ["server", "--"], {"TMUX_SESSION": ":"}, 1, SESSION_FORM.format(":"), id="two-dashes"
    ),
    pytest.param(
        ["server", "--", "x"], {}, 2, 'got "x", expected only options', id="word-behind-dashes"
    ),
    pytest.param(
        ["server", "--unix", "/no/such/socket"],
        {},
        2,
        "--unix: no such directory: /no/such",
        id="unix-nowhere",
    ),
    pytest.param(
        ["server", "--unix", LONG_PATH],
        {},
        2,
        f'--unix: got "{LONG_PATH[:80]}"..., expected at most 107 bytes (it has 125)',
        id="unix-too-long",
    ),
    pytest.param(
        ["server", "--unix="],
        {},
        2,
        "--unix: got nothing (is a variable empty?), expected a path that can be shown",
        id="unix-empty",
    ),
    pytest.param(
        ["server", "--unix", "/tmp/a\nb"],
        {},
        2,
        '--unix: got "/tmp/a\\u000ab", expected a path that can be shown',
        id="unix-with-a-newline",
    ),
    pytest.param(
        ["server", "--unix", "/tmp/x", "-p", "3001"],
        {},
        2,
        "--unix: got a port or host too, expected one of --unix and --port, --host",
        id="unix-and-a-port",
    ),
    pytest.param(
        ["server", "--unix", "/etc/passwd"],
        {},
        1,
        "--unix: /etc/passwd is there, and no socket: give another path",
        id="unix-at-a-file",
    ),
    pytest.param(
        ["server", "--workspace", "/no/such"],
        {},
        2,
        "--workspace: no such directory: /no/such",
        id="workspace-missing",
    ),
    pytest.param(
        ["server"],
        {"POCKETCODER_WORKSPACE": "/no/such"},
        2,
        "POCKETCODER_WORKSPACE: no such directory: /no/such",
        id="workspace-of-the-variable-missing",
    ),
    pytest.param(
        ["server", "--workspace", "/etc/passwd"],
        {},
        2,
        "--workspace: /etc/passwd is not a directory",
        id="workspace-a-file",
    ),
    pytest.param(
        ["server", "--workspace", ""],
        {},
        2,
        "--workspace: got nothing (is a variable empty?), expected a directory",
        id="workspace-empty",
    ),
    pytest.param(
        ["server", "--audit-log", ""],
        {},
        2,
        "--audit-log: got nothing (is a variable empty?), expected a file",
        id="audit-log-empty",
    ),
    pytest.param(
        ["server", "-p", "0", "--audit-log", "/no/such/file"],
        {},
        1,
        "cannot write the audit log /no/such/file: No such file or directory; no command runs until"
        " this is fixed",
        id="audit-log-nowhere",
    ),
    pytest.param(
        ["server", "--allow-origin", "*"],
        {},
        2,
        '--allow-origin: got "*", expected one like http://name:port',
        id="any-origin",
    ),
    pytest.param(
        ["server", "--log-level", "warn"],
        {},
        2,
        '--log-level: got "warn", expected one of debug, info, warning, error; did you mean'
        " warning?",
        id="log-level-typo",
    ),
    pytest.param(
        ["server", "--mcp-idle", "ten"],
        {},
        2,
        '--mcp-idle: got "ten", expected a number of seconds above 0',
        id="idle-no-number",
    ),
    pytest.param(
        ["server", "--mcp-idle", "0"],
        {},
        2,
        '--mcp-idle: got "0", expected a number of seconds above 0',
        id="idle-zero",
    ),
    pytest.param(
        ["server", "--mcp-server", "foo"],
        {},
        2,
        '--mcp-server: got "foo", expected NAME=COMMAND',
        id="mcp-server-without-a-name",
    ),
    pytest.param(
        ["server", "--mcp-server", "foo=no-such-program x"],
        {},
        2,
        "MCP server `foo`, key `command`: no such program, or it cannot be run",
        id="mcp-server-missing",
    ),
    pytest.param(
        ["server", "--mcp-config", "/no/such/file"],
        {},
        2,
        "--mcp-config: /no/such/file: No such file or directory",
        id="mcp-config-missing",
    ),
    pytest.param(
        ["server", "--mcp-config", "/dev/null"],
        {},
        2,
        "--mcp-config: /dev/null is not JSON: Expecting value: line 1 column 1 (char 0)",
        id="mcp-config-empty",
    ),
    pytest.param(
        ["server", "-p", "0"],
        {"TMUX_SESSION": "a:b"},
        1,
        SESSION_FORM.format("a:b"),
        id="session-with-a-colon",
    ),
    pytest.param(
        ["server", "-p", "0"],
        {"TMUX_SOCKET": LONG_PATH},
        1,
        f'TMUX_SOCKET: got "{LONG_PATH[:80]}", expected a path of at most 107 bytes (it has 125)',
        id="socket-too-long",
    ),
    pytest.param(
        ["server", "-p", "0"],
        {"PATH": "/nowhere"},
        1,
        "needs tmux 3.2 or later, got none: install it, for instance `apt-get install tmux`",
        id="no-tmux",
    ),
    pytest.param(
        ["install", "/no/such"], {}, 1, "DIR: no such directory: /no/such", id="install-nowhere"
    ),
    pytest.param(
        ["install", "/tmp", "ls"],
        {},
        1,
        'NAME: got "ls", expected one of sh, bash, dash, ash, zsh, ksh, pocketcoder, or …-shell',
        id="install-no-shell",
    ),
    pytest.param(
        ["shell", "ls"],
        {"PROXY_URL": "https://sandbox:3001"},
        125,
        f"PROXY_URL: got one with https, {URL_FORMS}; the shell speaks no TLS: reach the server by"
        " a tunnel or a private network",
        id="url-https",
    ),
    pytest.param(
        ["shell", "ls"],
        {"PROXY_URL": "localhost:3001"},
        125,
        f'PROXY_URL: got "localhost:3001", {URL_FORMS}',
        id="url-without-a-scheme",
    ),
    pytest.param(
        ["check"],
        {"PROXY_URL": "http://sandbox:3001/exec"},
        1,
        f'PROXY_URL: got one with a path behind "sandbox:3001", {URL_FORMS}',
        id="url-with-a-path",
    ),
    pytest.param(
        ["shell", "ls"],
        {"PROXY_URL": "http://127.0.0.1:1"},
        125,
        "cannot reach the proxy at http://127.0.0.1:1: Connection refused; is it running?",
        id="nobody-listens",
    ),
    pytest.param(
        ["check"],
        {"PROXY_URL": "http://no-such-host.invalid"},
        1,
        "cannot reach the proxy at http://no-such-host.invalid: Name or service not known; is it"
        " running?",
        id="host-of-the-url-unknown",
    ),
    pytest.param(
        ["check"],
        {"PROXY_URL": "http://a\r\nX\x1b[2Jb"},
        1,
        f'PROXY_URL: got "http://a\\u000d\\u000aX\\u001b[2Jb", {URL_FORMS}',
        id="url-with-control-characters",
    ),
    pytest.param(
        ["check"],
        {"PROXY_URL": "unix:run/x"},
        1,
        'PROXY_URL: got "unix:run/x", expected unix:/PATH, from the root',
        id="url-of-a-relative-path",
    ),
    pytest.param(
        ["shell", "ls"],
        {"PROXY_URL": "unix:/no/such/socket"},
        125,
        "cannot reach the proxy at unix:/no/such/socket: No such file or directory; is it running?",
        id="url-of-no-socket",
    ),
    pytest.param(
        ["shell", "ls"],
        {"PROXY_URL": f"unix:{LONG_PATH}"},
        125,
        "PROXY_URL: got a path of 125 bytes for a unix socket, expected at most 107",
        id="url-of-a-long-path",
    ),
]


@pytest.mark.parametrize(
    ("words", "variables", "status", "text"),
    with_slow(
        MISTAKES,
        "subcommand-typo",
        "subcommand-forgotten",
        "option-typo",
        "port-no-number",
        "open-without-a-token",
        "workspace-missing",
        "mcp-server-missing",
        "no-tmux",
        "url-with-a-path",
        "nobody-listens",
    ),
)
def test_a_mistake_is_answered_with_what_is_wrong_and_what_is_right(
    words: list[str], variables: dict[str, str], status: int, text: str
) -> None:
    done = run(*words, **variables)
    level = " ".join(["pocketcoder", *level_words(words)])
    more = f"See `{level} --help`.\n" if status == 2 else ""
    assert done.stderr == f"pocketcoder: {text}\n{more}"
    assert done.stdout == ""
    assert done.returncode == status


def test_a_token_that_no_header_can_hold_is_reported_by_the_shell(proxy: Proxy) -> None:
    done = run("shell", "ls", PROXY_URL=proxy.url, POCKETCODER_TOKEN="secret\n")
    assert done.returncode == 125
    assert done.stderr == (
        "pocketcoder: POCKETCODER_TOKEN: expected letters, digits and marks of ASCII, without"
        " blanks and ends of lines\n"
    )


# POCKETCODER_TOKEN of a shell; what is printed behind the address
REFUSED_SHELLS = [
    pytest.param("wrong", "the token is wrong", id="token-wrong"),
    pytest.param("", "the token is missing", id="token-missing"),
]


@pytest.mark.parametrize(("token", "text"), REFUSED_SHELLS)
def test_the_shell_says_whether_the_token_is_wrong_or_missing(
    guarded: Proxy, token: str, text: str
) -> None:
    url = f"http://127.0.0.1:{guarded.port}"
    done = run("shell", "ls", PROXY_URL=url, POCKETCODER_TOKEN=token)
    assert done.returncode == 125
    assert done.stderr == (
        f"pocketcoder: {url} refused: 401 Unauthorized: {text}: expected `Authorization: Bearer"
        " TOKEN` as the server has it; the shell takes it from POCKETCODER_TOKEN\n"
    )


def test_a_name_that_is_not_ours_is_refused_with_what_it_needs(proxy: Proxy) -> None:
    status, answer = proxy.post({"cmd": "true"}, Host="sandbox:3001")
    assert status == 403
    assert answer["error"] == (
        '`Host`: got "sandbox:3001", expected localhost or a loopback address: another name needs a'
        " token, POCKETCODER_TOKEN for the server and for the shell"
    )


def test_a_port_of_another_server_is_reported_with_its_process(proxy: Proxy) -> None:
    done = run("server", "-p", str(proxy.port), TMUX_SOCKET=f"{proxy.folder}/other/s")
    assert done.returncode == 1
    assert done.stderr == (
        f"pocketcoder: port {proxy.port} on 127.0.0.1 is taken by another pocketcoder server"
        f" (process {proxy.process.pid}): stop that, or take another with `-p {proxy.port + 1}`,"
        f" and PROXY_URL=http://localhost:{proxy.port + 1} for the shell\n"
    )


def test_a_port_of_another_program_is_reported_with_its_name(tmp_path: pathlib.Path) -> None:
    name = pathlib.Path("/proc/self/comm").read_text().strip()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run("server", "-p", str(port), TMUX_SOCKET=f"{tmp_path}/s")
    assert done.returncode == 1
    assert f"is taken by {name} (process {os.getpid()}): " in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_mistake_cannot_control_the_terminal() -> None:
    done = run("server", "--workspace", "/no\x1b[2J\nsuch")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[0]
        == r"pocketcoder: --workspace: no such directory: /no\x1b[2J\nsuch"
    )


def test_a_workspace_whose_path_is_not_utf_8_is_refused(tmp_path: pathlib.Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(path)
    done = run("server", "-p", "0", "--workspace", os.fsdecode(path))
    assert done.returncode == 2
    assert "UTF-8" in done.stderr


# ==========================================================================
# Application
# ==========================================================================
def lines(*commands: str) -> str:
    return "\n".join(commands)


@pytest.mark.slow
def test_a_log_that_cannot_be_written_stops_no_command(own: StartServer) -> None:
    server = own()
    server.stop()
    server.log_to("/dev/full")
    server.start()
    assert server.exec("echo ok")["stdout"] == "ok\n"
    assert server.stop() == 0


def test_the_server_says_where_it_listens_and_how_to_watch(own: StartServer) -> None:
    server = own()
    assert server.said == f"pocketcoder: listening on http://127.0.0.1:{server.port}\n"
    attach = f"tmux -S {server.socket} new-session -A -s pocketcoder"
    eventually(lambda: attach in server.logged())


def start_as_script(server: Proxy) -> None:
    """Start it again as people do: Python compiles the file."""
    server.stop()
    server.words[: server.words.index("server")] = [sys.executable, str(MODULE)]
    server.start()


def test_a_server_keeps_nothing_in_memory_that_only_compiling_needed(own: StartServer) -> None:
    server = own()
    start_as_script(server)
    assert server.memory() < 40 * pp.MIB
    assert [path for path in descriptors_of(server.process.pid) if "memfd" in path] == []


def test_a_server_is_found_by_its_command_line(own: StartServer) -> None:
    server = own()
    start_as_script(server)
    command = pathlib.Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert command.replace(b"\0", b" ").endswith(
        b" " + os.fsencode(shlex.join(server.words[1:])) + b" "
    )


@pytest.mark.parametrize(
    "start",
    with_slow(
        [
            pytest.param("exec {python} {script}", id="by-python"),
            pytest.param("exec {python} -u {script}", id="by-python-with-an-option"),
            pytest.param(
                "cd {folder}; exec {python} pocketcoder_proxy.py", id="by-a-relative-path"
            ),
            pytest.param("ln -s {script} pocketcoder; exec {python} pocketcoder", id="by-a-link"),
            pytest.param("ulimit -v 100000; exec {python} {script}", id="with-little-memory"),
        ],
        "by-a-link",
        "with-little-memory",
    ),
)
def test_a_server_starts_from_a_file_that_cannot_be_written(
    own: StartServer, tmp_path: pathlib.Path, start: str
) -> None:
    folder = tmp_path / "read only"
    folder.mkdir()
    script = folder / "pocketcoder_proxy.py"
    script.write_text(SOURCE)
    script.chmod(0o555)
    folder.chmod(0o555)
    # No module of the directory where it is started takes the place of another.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("marshal", "os", "argparse"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('not this one')\n")

    command = start.format(
        python=sys.executable, script=shlex.quote(str(script)), folder=shlex.quote(str(folder))
    )
    server = own()
    server.stop()
    rest = server.words[server.words.index("server") :]
    server.words = ["bash", "-c", f'cd {elsewhere}; {command} "$@"', "start", *rest]
    server.start()
    assert server.exec("echo ok")["stdout"] == "ok\n"
    assert list(folder.iterdir()) == [script]


def test_a_server_makes_no_session_before_it_is_needed(own: StartServer) -> None:
    server = own()
    assert server.status("GET", "/health") == 200
    assert call(server, "list_terminals")["structuredContent"] == {"terminals": []}
    assert call(server, "read_terminal")["isError"]
    assert not os.path.exists(server.socket)
    assert server.exec("echo made")["stdout"] == "made\n"


def test_a_token_guards_other_interfaces_and_no_command_finds_it(
    own: StartServer,
) -> None:
    # The search does not find itself: it has the token as a pattern.
    token = os.urandom(4).hex()
    pattern = f"g[3]heim{token}"
    server = own(
        "--host",
        "0.0.0.0",
        POCKETCODER_TOKEN=f"g3heim{token}",
        POCKETCODER_TOKEN_2="kept",
    )
    pid = server.process.pid
    search = "; ".join(
        [
            "exec 2>/dev/null",
            f"tr '\\0' '\\n' </proc/{pid}/environ | grep TOKEN",
            # If it is there, then whose it is.
            f"for it in $(grep -l {pattern} /proc/*/environ); do cat ${{it%environ}}cmdline; done",
            f"tmux -S {server.socket} show-environment -g | grep {pattern}",
            f"grep -r {pattern} {server.folder}",
        ]
    )
    assert server.exec(search)["stdout"] == "POCKETCODER_TOKEN_2=kept\n"


@pytest.mark.slow
def test_sigterm_lets_commands_finish_cancels_the_rest_and_answers_all(
    warm: StartServer,
) -> None:
    server = warm()
    quick = server.start_exec("sleep 1; echo quick")
    slow = server.start_exec("echo slow; sleep 64.5", agent_name="slow")
    wait_until_running("sleep\x0064.5")
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert quick.result()["stdout"] == "quick\n"

    answer = slow.result()
    assert answer["ended"] == "cancelled"
    assert answer["stdout"] == "slow\n"
    assert "cancelled" in answer["error"]
    assert server.process.wait(10) == 0
    assert 4 < time.monotonic() - started < 20
    assert not processes_with("sleep\x0064.5")
    assert "Traceback" not in server.logged()


@pytest.mark.slow
def test_a_stopping_server_answers_mcp_calls_and_ends_their_streams(
    own: StartServer, stream: OpenStream
) -> None:
    proxy = own()
    idle = stream(proxy, "/mcp", None, Mcp_Session_Id=opened(proxy))
    events = stream(proxy, "/sse")
    path = events.next()
    params = {"name": "exec", "arguments": {"cmd": "sleep 0.6; echo done"}}
    assert mcp_status(proxy, request("tools/call", params), path=path) == 202

    wait_until_running("sleep\x000.6")
    started = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - started < 4
    # The next server has its end.
    assert events.next()["result"]["structuredContent"]["running"] is True
    assert events.next() is idle.next() is None


@pytest.mark.slow
def test_a_queued_command_is_refused_when_the_server_stops(warm: StartServer) -> None:
    server = warm()
    running = [server.start_exec("sleep 1; echo ran") for _ in range(4)]
    eventually(lambda: len(processes_with("sleep\x001")) >= 4)
    queued = Background(lambda: server.post({"cmd": f"touch {server.folder}/queued"}))
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    status, answer = queued.result()
    assert status == 503
    assert answer["exit_code"] == 125
    assert [call.result()["stdout"] for call in running] == ["ran\n"] * 4
    assert server.process.wait(10) == 0
    assert not os.path.exists(f"{server.folder}/queued")


@pytest.mark.slow
def test_text_typed_before_the_first_command_never_runs(own: StartServer) -> None:
    server = own()
    subprocess.run(
        [
            *("tmux", "-S", server.socket, "new-session", "-d", "-s", "pocketcoder"),
            *("-n", "poco:terminal", "--", "/bin/bash", "-i"),
        ],
        env=server.env,
        check=True,
    )
    eventually(lambda: server.screen("poco").rstrip().endswith("$"))
    time.sleep(0.3)
    server.type("poco", f"touch {server.folder}/typed &&", "Enter")
    eventually(lambda: server.screen("poco").rstrip().endswith(">"))
    assert server.exec("echo ok")["stdout"] == "ok\n"
    assert not os.path.exists(f"{server.folder}/typed")


def test_a_server_whose_first_terminal_is_slow_stops_at_once(warm: StartServer) -> None:
    server = warm()
    assert server.stop() == 0

    pathlib.Path(server.folder, "home/.bashrc").write_text("sleep 12\n")
    server.tmux("kill-server")
    server.start()
    waiting = server.start_exec("true")
    wait_until_running("sleep\x0012\x00")
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 4.5

    with pytest.raises(AssertionError, match="stopping"):
        waiting.result()


@pytest.mark.slow
def test_an_unread_log_blocks_nothing(own: StartServer) -> None:
    server = own()
    server.stop()
    unread, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 8192)
    server.log_to(write)
    server.start()
    for number in range(60):
        assert server.exec(f"exit {number}")["exit_code"] == number
    assert server.stop() == 0
    assert b"exec end agent=poco" in os.read(unread, 4096)

    os.close(unread)


def test_a_server_without_commands_stops_at_once(warm: StartServer) -> None:
    server = warm()
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 4.5
    assert "Traceback" not in server.logged()


@pytest.mark.slow
def test_a_server_that_cannot_use_tmux_answers_503_and_recovers(warm: StartServer) -> None:
    server = warm()
    server.tmux("kill-server")
    os.rename(f"{server.folder}/tmux", f"{server.folder}/away")
    pathlib.Path(f"{server.folder}/tmux").write_text("a file in the way")
    status, answer = server.post({"cmd": "true"})
    assert status == 503
    assert answer["exit_code"] == 125
    assert "tmux" in answer["error"]
    assert server.status("GET", "/health") == 200

    os.unlink(f"{server.folder}/tmux")
    assert server.exec("echo back")["stdout"] == "back\n"


@pytest.fixture
def image() -> Iterator[str]:
    """A folder as an image of PocketCoder's sandbox has it: `tmux` in it is open to all."""
    folder = tempfile.mkdtemp(prefix="pc")
    subprocess.run(
        ["bash", "-c", 'rm -rf "$1"/*; mkdir -p "$1"; chmod 777 "$1"', "bash", f"{folder}/tmux"],
        check=True,
    )
    yield folder
    # Also where no server took the session over.
    kill_tmux(f"{folder}/tmux/s")
    shutil.rmtree(folder, ignore_errors=True)


# What that image's own entry point does, some seconds after it started the server.
ENTRYPOINT = lines(
    "set -e",
    "tmux -S $1/tmux/s new-session -d -s pocketcoder -n system",
    "chmod 777 $1/tmux/s",
    "tmux -S $1/tmux/s new-window -t pocketcoder -n poco-terminal -c $1/work",
)


def enter(folder: str) -> subprocess.CompletedProcess[str]:
    os.makedirs(f"{folder}/work", exist_ok=True)
    words = ["bash", "-c", ENTRYPOINT, "bash", folder]
    return subprocess.run(
        words,
        env=outer_environment() | {"HOME": f"{folder}/home"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def has_session(server: Proxy) -> bool:
    words = ["tmux", "-S", server.socket, "has-session", "-t", "=pocketcoder"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def windows(server: Proxy) -> list[str]:
    """Names of windows, once for each pane."""
    there = server.tmux("list-panes", "-s", "-t", "=pocketcoder:", "-F", "#{window_name}")
    return there.split("\n")


# Prints the number of the shell's terminal.
WHERE = "cut -d' ' -f7 /proc/$$/stat"


def terminal_of(server: Proxy, window: str) -> int:
    tty = server.tmux("display-message", "-p", "-t", f"=pocketcoder:={window}", "#{pane_tty}")
    return os.stat(tty).st_rdev


@pytest.mark.slow
def test_an_entrypoint_may_start_the_server_first_and_its_session_later(
    image: str, own: StartServer
) -> None:
    server = own(folder=image)
    assert server.status("GET", "/health") == 200
    # It does nothing, so there is nothing to wait for.
    time.sleep(0.3)
    assert not has_session(server)

    done = enter(image)
    assert done.stderr == ""
    assert done.returncode == 0
    assert server.exec(WHERE)["stdout"] == f"{terminal_of(server, 'poco-terminal')}\n"
    assert server.exec("pwd")["stdout"] == f"{server.workspace}\n"
    assert windows(server) == ["system", "poco-terminal"]

    assert server.exec(WHERE, agent_name="alice")["exit_code"] == 0
    assert windows(server) == ["system", "poco-terminal", "alice:terminal"]


def test_a_directory_open_to_all_gets_the_sticky_bit_and_is_logged(
    image: str, own: StartServer
) -> None:
    server = own(folder=image)
    assert stat.S_IMODE(os.stat(f"{image}/tmux").st_mode) == 0o1777
    told = [line for line in server.logged().splitlines() if "sticky" in line]
    assert len(told) == 1
    assert f"{image}/tmux" in told[0]


@pytest.mark.slow
def test_a_server_creates_its_session_with_the_first_command(image: str, own: StartServer) -> None:
    server = own(folder=image)
    assert server.status("GET", "/health") == 200
    # It does nothing, so there is nothing to wait for.
    time.sleep(0.3)
    assert not has_session(server)
    assert server.exec("echo first")["stdout"] == "first\n"
    assert windows(server) == ["poco:terminal"]
    assert server.exec(WHERE)["stdout"] == f"{terminal_of(server, 'poco:terminal')}\n"


def test_an_existing_session_is_used(image: str, own: StartServer) -> None:
    assert enter(image).returncode == 0
    server = own(folder=image)
    assert windows(server) == ["system", "poco-terminal"]
    assert server.exec(WHERE)["stdout"] == f"{terminal_of(server, 'poco-terminal')}\n"
    assert windows(server) == ["system", "poco-terminal"]


# ==========================================================================
# Comparison with bash
# ==========================================================================

# What `bash -c` makes of a line, every door makes of it.  Each line runs in a directory of its own
# that has the FILES.  None depends on times, on process ids or on the machine.
FILES = {
    "a.txt": "one\ntwo\nthree\n",
    "b.txt": "two\nfour\n",
    "c d.txt": "",
    ".hidden": "",
    "sub/e.txt": "",
}
# The sandbox has its own values of these: variables of the terminal, of its shell, and ours.
OWN = "_|SHELL|SHLVL|OLDPWD|TERM|TERM_PROGRAM|TERM_PROGRAM_VERSION|POCKETCODER_[A-Z_]*"
SAYING = [
    pytest.param("echo out; echo err >&2; echo out; echo err >&2", id="out-and-err-in-turn"),
    pytest.param("printf 'no newline'", id="no-newline-at-the-end"),
    pytest.param("printf 'no newline' >&2", id="no-newline-at-the-end-of-stderr"),
    pytest.param(r"printf 'a\n\n\n  b  \n\n\n'", id="blank-lines-and-blanks-at-the-end"),
    pytest.param(":", id="no-output"),
    pytest.param("echo", id="a-blank-line"),
    pytest.param("echo -n -e 'a\\tb\\c hidden'", id="echo-with-options"),
    pytest.param("# only a comment", id="a-comment"),
    pytest.param("echo é ü 漢字 🙂 👩‍👩‍👧", id="unicode"),
    pytest.param("x=é漢🙂; echo ${#x} ${x:1:1} ${x^^}", id="unicode-counted"),
    pytest.param("echo $'\\u00e9\\x41\\e[0m\\a' | od -An -c", id="escapes-of-dollar-quotes"),
    pytest.param(r"printf '\000\001\177\200\376\377'", id="binary-bytes"),
    pytest.param(r"printf '\360\237'; printf '\231\202\n'", id="half-a-character-twice"),
    pytest.param(r"printf '\355\240\200|\300\200|\364\220\200\200|\342\202'", id="wrong-utf-8"),
    pytest.param(r"printf '\r\n\033[2J\033]0;title\007\b\f\v'", id="control-characters"),
    pytest.param("head -c 200000 /dev/zero", id="many-nul-bytes"),
    pytest.param("seq 1 20000", id="large-output"),
    pytest.param("seq 1 20000 >&2", id="large-stderr"),
    pytest.param("head -c 300000 /dev/zero | tr '\\0' x", id="one-long-line"),
    pytest.param(
        "for i in {1..300}; do echo o$i; echo e$i >&2; done", id="out-and-err-in-turn-often"
    ),
    pytest.param("yes é | head -c 99999", id="large-and-cut-inside-a-character"),
    pytest.param("echo 'it'\\''s' \"a\\\"b\" 'c\"d' \\' \\\"", id="quotes-in-quotes"),
    pytest.param('echo "$(echo "nested $(echo \'deep  er\')")"', id="nested-substitutions"),
    pytest.param("echo `echo \\`echo back\\``", id="nested-backquotes"),
    pytest.param("echo a\\\nb 'c\nd' \"e\\\nf\"", id="continued-lines"),
    pytest.param("echo '!' !! \"!x\" !$", id="no-history-expansion"),
    pytest.param("echo [EXIT] $? __END__ '[exit 3]'", id="words-like-markers"),
    pytest.param("echo one\recho two", id="a-carriage-return-is-no-newline"),
    pytest.param("\n\n  echo indented\n\n", id="blank-lines-around"),
    pytest.param("echo tab\there   many", id="tabs-and-blanks"),
    pytest.param(
        "printf '%5.2f|%-5s|%05d|%q|%b|%x\\n' 3.14159 ab 42 'a b' 'x\\ty' 255", id="printf"
    ),
    pytest.param(
        "printf '%s-%s\\n' a b c; printf -v v %03d 7; echo $v", id="printf-again-and-to-v"
    ),
    pytest.param("printf '%d\\n' abc; echo $?", id="printf-of-no-number"),
    pytest.param("echo {1..5} {a..e..2} {01..03} x{,y,z}", id="braces"),
    pytest.param('echo ~ ~/x | sed "s|$HOME|HOME|g"', id="tildes"),
]
ENDING = [
    pytest.param("exit 0; echo never", id="exit-0"),
    pytest.param("exit 256", id="exit-256"),
    pytest.param("exit -1", id="exit-minus-1"),
    pytest.param("exit abc; echo never", id="exit-of-no-number"),
    pytest.param("exit 1 2; echo here", id="exit-with-two-numbers"),
    pytest.param("false; exit", id="exit-with-the-last-status"),
    pytest.param("(exit 7); echo $?; (exit 8)", id="exit-in-a-subshell"),
    pytest.param("{ exit 9; }; echo never", id="exit-in-a-group"),
    pytest.param("f() { exit 11; }; f; echo never", id="exit-in-a-function"),
    pytest.param("f() { return 12; echo never; }; f", id="return-in-a-function"),
    pytest.param("return 3; echo $?", id="return-outside"),
    pytest.param("break; continue; echo $?", id="break-outside"),
    pytest.param("x=$(exit 13); echo $?; x=$(exit 14)", id="exit-in-a-substitution"),
    pytest.param("local x=$(false); echo $?", id="local-outside"),
    pytest.param("for i in 1 2 3; do [ $i = 2 ] && exit 5; echo $i; done", id="exit-in-a-loop"),
    pytest.param("while :; do exit 6; done | cat; echo $?", id="exit-in-a-pipe"),
    pytest.param("eval 'exit 15'; echo never", id="exit-in-eval"),
    pytest.param("echo 'exit 16' >s; . ./s; echo never", id="exit-in-a-sourced-file"),
    pytest.param("! true", id="not-true"),
    pytest.param("! false | true; echo $? ${PIPESTATUS[*]}", id="not-a-pipe"),
    pytest.param("nosuch --option", id="no-such-command"),
    pytest.param("./nosuch; ./sub; ./a.txt", id="what-cannot-be-run"),
    pytest.param("nosuch 2>/dev/null || echo $?", id="no-such-command-caught"),
    pytest.param("if then", id="a-syntax-error"),
    pytest.param("echo before\necho 'open", id="an-open-quote"),
    pytest.param("echo before; echo $(", id="an-open-substitution"),
    pytest.param("echo one\necho two; ;; echo three", id="a-syntax-error-on-the-second-line"),
    pytest.param("echo before\nfi\necho after", id="a-word-out-of-place"),
    pytest.param("for", id="half-a-loop"),
    pytest.param("cat <<E\nno end", id="a-here-document-without-end"),
    pytest.param("eval 'if'; echo $?", id="a-syntax-error-in-eval"),
    pytest.param("}", id="a-brace-too-many"),
    pytest.param(")", id="a-parenthesis-too-many"),
    pytest.param("echo $((1 +)); echo never", id="an-arithmetic-error"),
    pytest.param("echo $((1 / 0)); echo never", id="a-division-by-zero"),
    pytest.param("echo ${x!y}; echo never", id="a-bad-substitution"),
    pytest.param("echo ${x:?is needed}; echo never", id="a-needed-variable"),
    pytest.param("readonly r=1; r=2; echo never", id="a-readonly-variable"),
    pytest.param("\n\nnosuch\n\nnosuch2", id="line-numbers-in-messages"),
    pytest.param("f() {\n nosuch\n}\n\nf; echo $LINENO", id="line-numbers-in-functions"),
    pytest.param("exec nosuch; echo never", id="exec-of-nothing"),
    pytest.param("exec echo replaced; echo never", id="exec-of-a-program"),
    pytest.param("exec bash -c 'exit 21'", id="exec-of-a-shell"),
    pytest.param("exec -a other bash -c 'echo $0'", id="exec-under-another-name"),
    pytest.param("command exit 22; echo never", id="exit-by-command"),
]
STRICT = [
    pytest.param("set -e; false; echo never", id="errexit"),
    pytest.param("set -e; false || true; if false; then :; fi; echo here", id="errexit-spared"),
    pytest.param("set -e; (false; echo never); echo never", id="errexit-in-a-subshell"),
    pytest.param('set -e; x=$(false; echo inside); echo "[$x]"', id="errexit-in-a-substitution"),
    pytest.param("set -e; f() { false; echo here; }; f && echo too", id="errexit-in-a-condition"),
    pytest.param("set -e; false | true; echo here", id="errexit-and-a-pipe"),
    pytest.param("set -eo pipefail; false | true; echo never", id="errexit-and-pipefail"),
    pytest.param("set -o pipefail; exit 3 | exit 4 | true; echo $?", id="pipefail"),
    pytest.param("set -u; echo ${x-unset}; echo $x; echo never", id="nounset"),
    pytest.param('set -u; a=(); echo "${a[@]}" here; echo $1', id="nounset-and-arrays"),
    pytest.param("set -x; echo traced $((1+1)); f() { :; }; f", id="xtrace"),
    pytest.param("PS4='+$LINENO '; set -x; echo a\necho b", id="xtrace-with-a-prompt"),
    pytest.param("set -v; echo one\necho two", id="verbose"),
    pytest.param("set -n; echo never", id="noexec"),
    pytest.param("set -f; echo *; set +f; echo *", id="noglob"),
    pytest.param("set -C; echo x >a.txt; echo $?; echo y >|a.txt; cat a.txt", id="noclobber"),
    pytest.param("set -a; x=1; env | grep ^x=", id="allexport"),
    pytest.param("set -m; set -o | grep -c on; echo $-", id="monitor"),
    pytest.param("set -o posix; set -o; echo $-", id="all-options"),
    pytest.param("shopt", id="all-shell-options"),
    pytest.param("echo $-; set -eu; echo $-", id="flags"),
    pytest.param(
        "set -- a 'b c' d; echo $# \"$2\"; shift 2; echo $*; shift 9; echo $?", id="shift"
    ),
    pytest.param(
        "while getopts ab:c o -a -b x -d; do echo $o $OPTARG; done; echo $OPTIND", id="getopts"
    ),
    pytest.param("set -E; trap 'echo trapped $?' ERR; f() { false; }; f; echo on", id="errtrace"),
    pytest.param("set -eE; trap 'echo at $LINENO' ERR\nx=$(false)\necho never", id="errtrace-exit"),
]
EXPANDING = [
    pytest.param("echo $((2**10)) $((7/2)) $((-7%3)) $((0x1f)) $((2#101)) $((1?2:3))", id="sums"),
    pytest.param("((x=5, x+=2)); echo $x $?; ((0)); echo $?; let y=x*2; echo $y", id="let"),
    pytest.param("echo $((08)); echo never", id="a-wrong-octal"),
    pytest.param("echo $((9223372036854775807 + 1))", id="an-overflow"),
    pytest.param(
        "a=(x 'y z' w); echo ${#a[@]} ${a[1]} ${!a[@]} \"${a[@]:1}\" ${a[-1]}", id="arrays"
    ),
    pytest.param(
        "declare -A m=([k]=v [l]=w); echo ${m[k]} ${#m[@]}; unset 'm[k]'; declare -p m", id="maps"
    ),
    pytest.param("mapfile -t l <a.txt; echo ${#l[@]}; printf '[%s]' \"${l[@]}\"", id="mapfile"),
    pytest.param("a=(1 2); a+=(3); a[7]=8; declare -p a", id="sparse-arrays"),
    pytest.param("declare -n r=v; v=1; r=2; echo $v; declare -i n=2+3; echo $n", id="namerefs"),
    pytest.param(
        "x=path/to/file.tar.gz; echo ${x##*/} ${x%.*} ${x%%.*} ${x#*/} ${x/t/T}", id="cuts"
    ),
    pytest.param("x=abcdef; echo ${x:2} ${x:1:3} ${x: -2} ${x^} ${x@Q} ${x//[bd]/-}", id="slices"),
    pytest.param("echo ${x:-default} ${x:=set} ${x:+there} ${y+no}; echo $x", id="defaults"),
    pytest.param(
        'x=\'a  b\'; echo $x "$x"; IFS=:; y=a:b:c; set -- $y; echo $# "$*"', id="words-split"
    ),
    pytest.param("echo *; echo .h*; echo */*; echo no*such; echo ?.txt [!a].txt", id="globs"),
    pytest.param(
        "shopt -s nullglob; echo no*such; shopt -s dotglob; echo *", id="globs-of-nothing"
    ),
    pytest.param("shopt -s failglob; echo no*such; echo never", id="failglob"),
    pytest.param("shopt -s extglob\necho !(a|b).txt @(a|b).txt", id="extended-globs"),
    pytest.param('shopt -s globstar; echo **; for f in *.txt; do echo "<$f>"; done', id="globstar"),
    pytest.param(
        "[[ abc =~ ^a(.)c$ ]] && echo ${BASH_REMATCH[1]}; [[ a < b ]]; echo $?", id="matches"
    ),
    pytest.param(
        "[ 1 -lt 2 -a x = x ] && [ -f a.txt ] && [ ! -e no ]; echo $?; [ a b c", id="tests"
    ),
    pytest.param("case a.txt in *.md) echo 1;; *.t?t) echo 2;;& a*) echo 3;; esac", id="cases"),
    pytest.param(
        "for ((i=0;i<3;i++)); do echo $i; done; until [ $((i--)) = 0 ]; do :; done", id="loops"
    ),
    pytest.param(
        "f() { local x=in; g; }; g() { echo $x ${FUNCNAME[*]}; }; x=out; f; echo $x", id="scopes"
    ),
    pytest.param(
        "f() { echo $# \"$@\"; }; f 'a b' '' c; declare -f f; unset -f f; f", id="functions"
    ),
    pytest.param(
        "f() ( cd sub; x=1; ls ); f; echo ${x-unset}; ls -d sub", id="a-function-as-subshell"
    ),
    pytest.param(
        "fact() { (($1 < 2)) && echo 1 || echo $(($1 * $(fact $(($1-1))))); }; fact 6",
        id="recursion",
    ),
    pytest.param("alias ll=echo; ll x; shopt -s expand_aliases\nalias lm=echo\nlm y", id="aliases"),
    pytest.param("echo $'a\\'b' $\"translated\" \"$'not'\"", id="dollar-quotes"),
    pytest.param("select x in a b; do echo $x; done; echo $?", id="select-without-input"),
    pytest.param(
        "echo $BASH_SUBSHELL $(echo $BASH_SUBSHELL) $( (echo $BASH_SUBSHELL) )", id="depths"
    ),
    pytest.param(
        'echo "${BASH_SOURCE[*]}|$BASH_EXECUTION_STRING|${#BASH_ARGV[@]}"', id="bash-variables"
    ),
]
# Octal flags of open(2), without O_LARGEFILE: a pipe without a name never has it.
FLAGS = "while read k v; do [ $k = flags: ] && echo $((8#$v & ~8#100000)); done </proc/$$/fdinfo/{}"
REDIRECTED = [
    pytest.param("cat <<E\n$((1+1)) `echo x` \\$y\nE", id="here-document"),
    pytest.param("cat <<'E'\n$((1+1)) `echo x` \\$y\nE", id="here-document-quoted"),
    pytest.param("cat <<-E\n\t\tindented\n\tE\necho end", id="here-document-indented"),
    pytest.param("cat <<A; cat <<B\none\nA\ntwo\nB", id="here-documents-in-turn"),
    pytest.param(
        "cat <<A - <(cat <<B\ninner\nB\n)\nouter\nA", id="here-document-in-a-substitution"
    ),
    pytest.param("cat <<<\"$(printf 'a\\nb')\"; wc -c <<<''", id="here-string"),
    pytest.param(
        "cat <<E | wc -c\n$(head -c 200000 /dev/zero | tr '\\0' y)\nE", id="here-document-large"
    ),
    pytest.param('read x; echo "$? [$x]"; cat; wc -c', id="read-from-empty-stdin"),
    pytest.param('while read -r l; do echo "<$l>"; done; echo end', id="loop-over-empty-stdin"),
    pytest.param(
        "read -t 1 x; echo $?; read -n 1 y; echo $?; mapfile z; echo ${#z[@]}", id="reads"
    ),
    pytest.param("readlink /proc/self/fd/0", id="what-stdin-is"),
    pytest.param("[ -p /dev/stdin ]; echo $?; [ -c /dev/stdin ]; echo $?", id="what-kind-stdin-is"),
    pytest.param("[ -t 0 ] || [ -t 1 ] || [ -t 2 ]; echo $?; tty", id="no-terminal"),
    pytest.param("read x <&1; echo $?", id="read-from-stdout"),
    pytest.param("read x <&2; echo $?", id="read-from-stderr"),
    pytest.param("cat <&1; echo $?", id="a-program-reads-stdout"),
    pytest.param("cat <&2; echo $?", id="a-program-reads-stderr"),
    pytest.param("echo x >&0; echo $?", id="write-to-stdin"),
    pytest.param(FLAGS.format(1), id="stdout-is-open-for-writing-only"),
    pytest.param(FLAGS.format(2), id="stderr-is-open-for-writing-only"),
    pytest.param(
        "for f in 1 2; do [ -p /dev/fd/$f ]; echo $?; done", id="stdout-and-stderr-are-pipes"
    ),
    pytest.param("[ /dev/fd/1 -ef /dev/fd/2 ]; echo $?", id="whether-stdout-and-stderr-are-one"),
    pytest.param("ls /proc/$$/fd", id="descriptors-of-the-shell"),
    pytest.param("ls /proc/self/fd | cat", id="descriptors-of-a-program"),
    pytest.param(
        "echo x >/dev/stdout; echo y >/dev/stderr; echo z >>/dev/stderr", id="opened-again"
    ),
    pytest.param(
        "echo x >/dev/fd/1; echo y >/proc/self/fd/2; echo z | tee /dev/stderr", id="by-number"
    ),
    pytest.param("cat /dev/stdin; cat /dev/fd/0; echo $?", id="stdin-opened-again"),
    pytest.param("echo hidden >&-; echo $?", id="closed-stdout"),
    pytest.param("exec >&-; echo hidden; echo $? >&2", id="closed-stdout-for-good"),
    pytest.param("exec 2>&-; nosuch; echo $?", id="closed-stderr"),
    pytest.param("exec 0<&-; cat; echo $?; read x; echo $?", id="closed-stdin"),
    pytest.param("exec >&- 2>&- <&-; exit 17", id="everything-closed"),
    pytest.param("exec 1>&- 2>&-; sleep 0.1; exit 18", id="closed-long-before-the-end"),
    pytest.param("exec 3>&1 1>&2 2>&3 3>&-; echo to-err; echo to-out >&2", id="swapped"),
    pytest.param(
        "{ echo out; echo err >&2; } 2>&1 >/dev/null | sed s/^/E:/", id="only-stderr-piped"
    ),
    pytest.param(
        "echo both &>f; cat f; echo more &>>f; cat f; nosuch |& sed s/^/P:/", id="both-at-once"
    ),
    pytest.param(
        "exec 3>f; echo three >&3; exec 3>&-; cat f; echo no >&3; echo $?", id="descriptor-3"
    ),
    pytest.param(
        "exec 9<a.txt; read x <&9; cat <&9; echo $x; echo y >&9; echo $?", id="descriptor-9"
    ),
    pytest.param("for f in {3..9}; do echo $f >&$f; done 2>&1", id="descriptors-3-to-9-are-closed"),
    pytest.param("for f in 10 63 255; do [ -e /dev/fd/$f ]; echo $?; done", id="high-descriptors"),
    pytest.param(
        "exec {f}<a.txt; cat <&$f; echo $((f >= 10)); exec {f}<&-", id="a-named-descriptor"
    ),
    pytest.param("exec 7<>f; echo x >&7; exec 7<f; cat <&7", id="read-write"),
    pytest.param("exec 5>&1; (echo in >&5) | cat; echo x 1>&5-; echo $?", id="moved-descriptors"),
    pytest.param("echo x >no/such/file; echo $?", id="no-such-directory"),
    pytest.param("cat <nosuch; echo $?; : >sub; echo $?", id="no-such-file"),
    pytest.param(">new; ls -s new; >>new <a.txt; echo $?", id="only-redirections"),
    pytest.param(
        "echo x >'sp ace' >last; ls; cat last; <a.txt cat; 2>/dev/null nosuch", id="anywhere"
    ),
    pytest.param("exec <a.txt; read x; echo $x; cat", id="stdin-for-good"),
    pytest.param("exec >f; echo in; exec >&2; cat f", id="stdout-for-good"),
    pytest.param("cat a.txt - <b.txt; tac <a.txt | cat - b.txt", id="stdin-as-an-argument"),
    pytest.param("echo x >/dev/full; echo $?", id="a-full-disk"),
    pytest.param("if read x; then echo $x; fi <a.txt; { cat; } <b.txt; (cat) <b.txt", id="blocks"),
    pytest.param("dd if=/dev/zero of=/dev/stdout bs=1 count=3 status=none | od -An -c", id="dd"),
]
PIPED = [
    pytest.param("yes | head -3; echo ${PIPESTATUS[*]}", id="a-reader-that-leaves"),
    pytest.param("true | false | (exit 3); echo ${PIPESTATUS[@]} $?", id="statuses-of-a-pipe"),
    pytest.param(
        'echo x | read y; echo "[$y]"; shopt -s lastpipe; echo x | read y; echo "[$y]"',
        id="lastpipe",
    ),
    pytest.param("seq 100000 | sort -rn | sed -n '1p;$p' | tr '\\n' ,", id="a-long-pipe"),
    pytest.param(
        "seq 5 | while read n; do x=$n; echo $((n*n)); done; echo ${x-unset}", id="a-loop-in-a-pipe"
    ),
    pytest.param("cat <(echo one) <(echo two)", id="process-substitution-read"),
    pytest.param("diff <(seq 3) <(seq 2 4); echo $?", id="process-substitution-diff"),
    pytest.param(
        'while read l; do echo "<$l>"; done < <(cat a.txt)', id="process-substitution-loop"
    ),
    pytest.param("echo hi > >(cat)", id="process-substitution-written"),
    pytest.param("echo hi | tee >(sed s/^/A:/) >/dev/null", id="process-substitution-tee"),
    pytest.param("exec > >(tee /dev/null) 2>&1; echo hi", id="process-substitution-for-good"),
    pytest.param(
        "exec > >(sed s/^/L:/); echo one; echo two; exit 5", id="process-substitution-and-exit"
    ),
    pytest.param(
        "exec 2> >(sed s/^/E:/ >&2); ls /nope; exit 6", id="process-substitution-for-stderr"
    ),
    pytest.param("ls /nope 2> >(sed s/^/E:/ >&2)", id="process-substitution-of-stderr"),
    pytest.param("seq 30000 > >(tail -n 1)", id="process-substitution-of-much"),
    pytest.param("seq 30000 > >(cat)", id="process-substitution-that-writes-much"),
    pytest.param("echo x > >(cat >f); wait $!; cat f", id="process-substitution-waited-for"),
    pytest.param("(sleep 0.03; echo late) & exit 4", id="a-child-that-is-a-little-late"),
    pytest.param("(sleep 0.03; echo late >&2) & echo now", id="a-child-that-is-late-on-stderr"),
    pytest.param("setsid -f bash -c 'sleep 0.03; echo late'; echo now", id="a-late-session"),
    pytest.param(
        "coproc cat; echo hi >&${COPROC[1]}; read x <&${COPROC[0]}; echo $x", id="coprocess"
    ),
    pytest.param(
        'coproc UP { tr a-z A-Z; }; exec 5<&${UP[0]} 6>&${UP[1]}; eval "exec ${UP[1]}>&-"; '
        "echo hi >&6; exec 6>&-; cat <&5; wait; echo $?",
        id="coprocess-with-a-name",
    ),
    pytest.param("mkfifo p; echo through >p & cat p; wait; echo $?", id="a-named-pipe"),
    pytest.param("mkfifo p; exec 3<>p; echo x >&3; read y <&3; echo $y", id="a-named-pipe-alone"),
    pytest.param("(trap '' PIPE; yes 2>&1 | :; echo ${PIPESTATUS[0]})", id="ignored-sigpipe"),
    pytest.param("bash -c 'kill -PIPE $$'; echo $?", id="sigpipe-kills"),
    pytest.param("echo 'echo piped $0; exit 3' | bash; echo $?", id="a-script-piped-to-bash"),
    pytest.param(
        "bash -s a b <<< 'echo $# $2'; bash <<'E'\necho here\nexit 4\nE", id="scripts-on-stdin"
    ),
    pytest.param("(echo a; (echo b; (echo c; exit 3); echo $?))", id="subshells-in-subshells"),
    pytest.param('x=$(cat <&0); echo "[$x]"; y=$(<a.txt); echo "$y"', id="substitutions-that-read"),
]
SIGNALLED = [
    pytest.param("sleep 0.02 & wait; echo $?", id="background-waited-for"),
    pytest.param("(exit 7) & wait $!; echo $?; wait 1; echo $?", id="background-with-a-status"),
    pytest.param("true & false & wait -n; wait; echo $?", id="several-in-background"),
    pytest.param(
        "(sleep 0.05; exit 3) & (sleep 0.05; exit 4) & wait %1; echo $?; wait $!; echo $?",
        id="jobs-by-number",
    ),
    pytest.param("sleep 5 & kill $!; wait $!; echo $?", id="background-terminated"),
    pytest.param("sleep 5 & kill -9 %1; wait %1 2>/dev/null; echo $?", id="background-killed"),
    pytest.param("cat & wait; echo $?", id="background-reads-nothing"),
    pytest.param("sleep 5 & jobs | sed 's/  */ /g'; kill %%; wait 2>/dev/null; echo $?", id="jobs"),
    pytest.param("sleep 5 & disown; jobs; kill $!; echo $?", id="disowned"),
    pytest.param("set -m; sleep 5 & kill -TERM -- -$!; wait $!; echo $?", id="a-job-as-a-group"),
    pytest.param("set -m; (sleep 0.05; exit 5) & fg >/dev/null; echo $?", id="foreground"),
    pytest.param("fg; bg; echo $?", id="no-job-control"),
    pytest.param("trap 'echo bye' EXIT; exit 4", id="trap-exit"),
    pytest.param("trap 'echo bye; exit 9' EXIT; exit 4", id="trap-exit-with-a-status"),
    pytest.param("trap 'echo $?' EXIT; false", id="trap-exit-sees-the-status"),
    pytest.param("trap 'echo bye' EXIT; kill $$; sleep 1; echo never", id="trap-exit-and-term"),
    pytest.param("trap 'echo bye' EXIT; exec true", id="trap-exit-and-exec"),
    pytest.param("trap 'echo bye' EXIT; (echo in); nosuch", id="trap-exit-and-a-subshell"),
    pytest.param("trap 'echo term' TERM; kill $$; echo on; exit 3", id="trap-term"),
    pytest.param("trap 'echo int' INT; kill -INT $$; echo on", id="trap-int"),
    pytest.param("trap '' TERM; kill $$; bash -c 'kill $$; echo ignored'", id="trap-ignored"),
    pytest.param("trap 'echo err $?' ERR; false; (exit 5); true", id="trap-err"),
    pytest.param("trap 'echo $BASH_COMMAND' DEBUG; x=1; echo a", id="trap-debug"),
    pytest.param("f() { trap 'echo left' RETURN; :; }; f; echo on", id="trap-return"),
    pytest.param(
        "trap 'echo u1' USR1; trap 'echo u2' USR2; kill -USR1 $$; kill -USR2 $$", id="trap-usr"
    ),
    pytest.param("trap 'echo chld' CHLD; set -m; /bin/true & wait $!; trap - CHLD", id="trap-chld"),
    pytest.param("trap 'echo a' TERM EXIT; trap -p; trap - TERM EXIT; trap", id="traps-listed"),
    pytest.param("trap; trap -p INT TERM HUP QUIT PIPE", id="no-traps-at-the-start"),
    pytest.param(
        "trap 'echo got; exit 3' TERM; (sleep 0.02; kill $$) & wait; echo never", id="trap-in-wait"
    ),
    pytest.param("kill $$; sleep 1", id="terminated"),
    pytest.param("kill -9 $$; sleep 1", id="killed"),
    pytest.param("kill -INT $$; sleep 1", id="interrupted"),
    pytest.param("kill -HUP $$; sleep 1", id="hung-up"),
    pytest.param("kill -QUIT $$; echo on", id="quit"),
    pytest.param("kill -USR1 $$; sleep 1", id="usr1"),
    pytest.param("kill -PIPE $$; sleep 1", id="broken-pipe"),
    pytest.param("kill -ALRM $$; sleep 1", id="alarm"),
    pytest.param("ulimit -c 0; kill -SEGV $$; sleep 1", id="segmentation-fault"),
    pytest.param("ulimit -c 0; kill -ABRT $$; sleep 1", id="aborted"),
    pytest.param("kill -RTMIN $$; sleep 1", id="a-real-time-signal"),
    pytest.param("echo before; kill -9 $BASHPID", id="killed-by-bashpid"),
    pytest.param(
        "bash -c '(kill -9 $BASHPID); echo $?' 2>&1 | sed 's/: *[0-9]* K/: PID K/'",
        id="a-subshell-killed",
    ),
    pytest.param("bash -c 'kill -9 $$' 2>&1 | cat; echo ${PIPESTATUS[0]}", id="killed-in-a-pipe"),
    pytest.param("bash -c 'kill -TERM $$'; echo $?", id="a-child-terminated"),
    pytest.param(
        "bash -c \"ulimit -c 0; bash -c 'kill -SEGV \\$\\$'; echo \\$?\" 2>&1 | sed 's/: *[0-9]* S/: PID S/'",
        id="a-child-with-a-fault",
    ),
    pytest.param("bash -c 'kill -9 $PPID'; sleep 1; echo never", id="killed-by-its-child"),
    pytest.param("grep -E '^Sig(Blk|Ign|Cgt)' /proc/$$/status", id="signals-blocked-and-ignored"),
    pytest.param("grep -E '^Sig(Blk|Ign)' /proc/self/status", id="signals-of-a-program"),
    pytest.param(
        "sleep 5 & kill -STOP $!; kill -CONT $!; kill $!; wait $!; echo $?",
        id="stopped-and-continued",
    ),
    pytest.param(
        "kill -0 $$; echo $?; kill -0 99999999; kill -l 15; kill -NOSUCH $$", id="kill-itself"
    ),
    pytest.param("kill -TERM 0; sleep 1; echo never", id="the-whole-group"),
    pytest.param("trap 'echo all' TERM; kill -TERM 0; echo on", id="the-whole-group-trapped"),
]
AROUND = [
    pytest.param('echo "$0|$#|$*"', id="name-and-arguments"),
    pytest.param("[ $$ = $BASHPID ]; echo $?; ([ $$ = $BASHPID ]; echo $?)", id="pid-and-bashpid"),
    pytest.param("echo $(( $$ == $(echo $$) ))", id="pid-in-a-substitution"),
    pytest.param("cat /proc/$$/comm", id="name-of-its-process"),
    pytest.param("umask; umask 077; umask -S; touch f; stat -c %a f; (umask 0); umask", id="umask"),
    pytest.param("ulimit -a", id="limits"),
    pytest.param("ulimit -Ha", id="hard-limits"),
    pytest.param(
        "ulimit -n 50; ulimit -n; ulimit -f 1; (trap '' XFSZ; head -c 9999 /dev/zero >f); echo $?",
        id="limits-set",
    ),
    pytest.param("nice; cat /proc/$$/oom_score_adj; grep Seccomp: /proc/$$/status", id="niceness"),
    pytest.param(
        "id -u; id -g; id -G; grep -E '^(Cap|NoNew|Groups)' /proc/$$/status", id="identity"
    ),
    pytest.param("pwd; cd sub; pwd; cd - >/dev/null; pwd; echo $OLDPWD", id="cd-and-back"),
    pytest.param("cd nosuch; echo $?; cd a.txt; echo $?; cd ''; pwd", id="cd-nowhere"),
    pytest.param("ln -s sub l; cd l; pwd; pwd -P; cd ..; pwd", id="cd-through-a-link"),
    pytest.param(
        "mkdir gone; cd gone; rmdir ../gone; pwd; ls; cd ..; pwd", id="a-directory-that-is-gone"
    ),
    pytest.param("pushd sub; popd; dirs; CDPATH=sub; cd .; cd /; pwd", id="directory-stack"),
    pytest.param('echo $PWD; [ "$PWD" = "$(/bin/pwd)" ]; echo $?', id="working-directory"),
    pytest.param(f"env | cut -d= -f1 | grep -vxE '{OWN}' | sort", id="names-of-the-environment"),
    pytest.param(
        f"env -0 | tr '\\n\\0' ' \\n' | grep -vE '^({OWN})=' | sort", id="the-environment"
    ),
    pytest.param(
        f"tr '\\n\\0' ' \\n' </proc/$$/environ | grep -vE '^({OWN})=' | sort",
        id="the-environment-as-it-was-given",
    ),
    pytest.param("echo ${TMUX-unset} ${TMUX_PANE-unset}", id="no-tmux"),
    pytest.param(f"compgen -v | grep -vxE '{OWN}' | sort", id="names-of-variables"),
    pytest.param(
        "declare -F; alias; compgen -A function; bind -p 2>&1 | head -1", id="no-functions"
    ),
    pytest.param("complete -p; hash; history; dirs; caller; echo $?", id="nothing-learned-yet"),
    pytest.param(
        'x=$SHLVL; bash -c "echo \\$((SHLVL - $x))"; (echo $((SHLVL - x)))', id="level-of-the-shell"
    ),
    pytest.param(": x; echo $_; echo a b; echo $_", id="last-argument"),
    pytest.param(
        'echo "$IFS" | od -An -c; echo $PATH $HOME $BASH $BASH_VERSION', id="well-known-variables"
    ),
    pytest.param('echo "${PS1-unset}|$PS2|${PS4}|${PROMPT_COMMAND-unset}"', id="prompts"),
    pytest.param(
        "echo ${COLUMNS-unset} ${LINES-unset} ${HISTFILE-unset} ${BASH_ENV-unset}", id="no-size"
    ),
    pytest.param(
        "X=1 bash -c 'echo $X'; echo ${X-unset}; export X=2; env | grep ^X=", id="exports"
    ),
    pytest.param(
        "env -i bash -c 'echo ${HOME-none} $-'; env -i /bin/echo x", id="an-empty-environment"
    ),
    pytest.param("export -n HOME; bash -c 'echo ${HOME-none}'; unset PATH; ls", id="taken-away"),
    pytest.param("export X=$'a\\nb\\xff'; bash -c 'printf %s \"$X\"'", id="odd-values"),
    pytest.param("f() { echo exported; }; export -f f; bash -c f", id="exported-functions"),
    pytest.param(
        "RANDOM=1; a=$RANDOM; RANDOM=1; [ $a = $RANDOM ]; echo $?; SECONDS=0; echo $SECONDS",
        id="counters",
    ),
    pytest.param("LC_ALL=C; x=é; echo ${#x}; LC_ALL=C sort a.txt b.txt", id="locale"),
    pytest.param("times | wc -l; TIMEFORMAT=timed; time true; time (exit 3); echo $?", id="timed"),
    pytest.param("type echo ls if nosuch; command -v cd; which nosuch; echo $?", id="types"),
    pytest.param("ls -A; stat -c '%F' . a.txt", id="the-files-there"),
    pytest.param(
        "cut -d' ' -f5 /proc/$$/stat | sed \"s/^$$\\$/leader/;s/^[0-9]*$/member/\"", id="its-group"
    ),
    pytest.param(
        "bash -ic 'echo $-' 2>/dev/null | grep -c i; bash -lc 'echo login'",
        id="other-kinds-of-shells",
    ),
]
PROGRAMS = [
    pytest.param("seq 5 | xargs -n 2 echo x; echo a b | xargs -I{} echo '<{}>'", id="xargs"),
    pytest.param(
        "echo 1 2 | xargs -n 1 bash -c 'exit $0'; echo $?; xargs echo none", id="xargs-that-fails"
    ),
    pytest.param("seq 4 | xargs -P 4 -n 1 bash -c 'echo $0' | sort", id="xargs-at-once"),
    pytest.param(
        "timeout 0.05 sleep 5; echo $?; timeout -s INT 0.05 bash -c 'sleep 5'; echo $?",
        id="timeout",
    ),
    pytest.param("timeout 5 bash -c 'echo in; exit 3'", id="timeout-in-time"),
    pytest.param("timeout --foreground 5 cat; echo $?", id="timeout-in-the-foreground"),
    pytest.param("nohup echo hi; echo $?; ls", id="nohup"),
    pytest.param("nohup bash -c 'kill -HUP $$; echo lives' 2>&1", id="nohup-ignores"),
    pytest.param("setsid -w bash -c 'echo new; exit 5'; echo $?", id="setsid"),
    pytest.param("setsid bash -c 'echo replaced'", id="setsid-alone"),
    pytest.param("env -C sub ls; env X=1 -u HOME bash -c 'echo $X ${HOME-none}'", id="env"),
    pytest.param("find . -name '*.txt' -print0 | sort -z | tr '\\0' ,", id="find"),
    pytest.param("find . -type f -exec sh -c 'echo $#' x {} +", id="find-with-a-shell"),
    pytest.param("awk 'BEGIN{print 1 > \"/dev/stderr\"; print 2; exit 3}'", id="awk"),
    pytest.param("sed -n '2p;2q' a.txt; grep -c . a.txt b.txt; grep no a.txt", id="sed-and-grep"),
    pytest.param("sh -c 'echo $0 $1; exit 2' zero one; echo $?", id="sh"),
    pytest.param(
        "printf '#!/bin/bash\\necho \"$0\" $1; exit 7' >s; chmod +x s; ./s x", id="a-script"
    ),
    pytest.param(
        "printf 'echo plain $0' >s; chmod +x s; ./s; PATH=.:$PATH; s", id="a-script-without-a-line"
    ),
    pytest.param(
        "printf '#!/no/such\\n' >s; chmod +x s; ./s; echo $?", id="a-script-without-interpreter"
    ),
    pytest.param(
        "echo 'f() { echo sourced $1; return 4; }' >s; . ./s; f x; . nosuch", id="sourced"
    ),
    pytest.param(
        "ls nosuch a.txt; echo $?; rm nosuch; mkdir sub; cat sub; cp a.txt no/", id="complaints"
    ),
    pytest.param(
        "stdbuf -o0 printf x; : >/dev/no/such; dirname /a/b; basename /a/b.c .c", id="odds-and-ends"
    ),
    pytest.param("perl -e '$| = 1; print STDOUT 1; print STDERR 2; print 3; exit 4'", id="perl"),
    pytest.param("tar c a.txt | tar tv | wc -l; gzip -c a.txt | gunzip", id="archives"),
    pytest.param(
        "sort -u a.txt b.txt | tee f | wc -l; cmp a.txt f; comm -12 a.txt b.txt",
        id="files-compared",
    ),
    pytest.param("bash -c 'echo $- $0' name; bash -euc 'echo $x'; bash -xc ':'", id="bash-in-bash"),
    pytest.param('bash -c \'exec bash -c "exec bash -c \\"echo deep\\""\'', id="bash-by-exec"),
    pytest.param("ls -la / >/dev/null & ls nosuch; wait; echo $?", id="beside-each-other"),
]
# The stdin of the lines below.
GIVEN = "one\n  two\\\nécho three\nno newline"
FED = [
    pytest.param("cat", id="fed-whole"),
    pytest.param("wc -c; cat; echo $?", id="fed-once"),
    pytest.param('read x; echo "[$x]"; read -r y; echo "[$y]"; cat', id="fed-by-lines"),
    pytest.param('while IFS= read -r l; do echo "<$l>"; done; echo "$l"', id="fed-loop"),
    pytest.param("cat /dev/stdin", id="fed-by-name"),
    pytest.param("sleep 0.05; cat /dev/stdin; echo $?", id="fed-by-name-when-all-is-written"),
    pytest.param("read -r x; cat /proc/self/fd/0; echo $?", id="fed-by-name-after-a-line"),
    pytest.param("wc -l </dev/stdin; wc -c /dev/fd/0", id="fed-and-read-to-its-end-twice"),
    pytest.param("exec 3<&0 0</dev/null; cat; cat <&3", id="fed-on-another-descriptor"),
    pytest.param("cat & wait; cat", id="fed-and-background"),
    pytest.param("cat <<<x; cat", id="fed-and-a-here-string"),
    pytest.param("true | cat; (cat); cat", id="fed-to-a-subshell"),
    pytest.param('x=$(cat); echo "[$x]"', id="fed-to-a-substitution"),
    pytest.param(
        "cat <(cat <&0); diff <(sort) /dev/null | wc -l", id="fed-to-process-substitutions"
    ),
    pytest.param('mapfile -t l; echo ${#l[@]} "${l[3]}"', id="fed-to-mapfile"),
    pytest.param("tee f | cat -A; cmp f f; tail -c 3 f", id="fed-to-tee"),
    pytest.param("exit 3", id="fed-for-nothing"),
    pytest.param("exec <&-; cat; echo $?", id="fed-and-closed"),
    pytest.param("[ -t 0 ]; echo $?; xargs -n 1 echo", id="fed-to-xargs"),
]
# No line takes that many seconds.
HANGS = 8


class Ended(NamedTuple):
    """How a command line ended."""

    code: int
    out: bytes
    # Empty where both come as one.
    err: bytes


class Doors:
    """Plain bash, and every way to run a command through a server, as like functions."""

    def __init__(self, proxy: Proxy, folder: pathlib.Path) -> None:
        self.proxy = proxy
        self.folder = folder
        # What `install` writes: it starts faster than the whole file.
        self.head = folder / "pocketcoder"
        self.head.write_text(SOURCE.partition("# ------------------------------- the line")[0])
        (folder / "given").write_text(GIVEN)

    def plain(self, cmd: str, cwd: str, stdin: str | None, apart: bool = False) -> Ended:
        env = {
            **self.proxy.env,
            **pp.QUIET_PROGRAMS,
            "PWD": f"{self.proxy.workspace}/{cwd}",
            # A pane exports these; bash has them unexported where nobody gave them.
            "SHELL": pp.find_shell(),
            "TERM": "screen",
        }
        done = self.run(["bash", "-c", cmd], cwd, stdin, env, apart)
        # Where a signal ended it, a shell reports 128 + n.
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        if apart:
            return Ended(code, done.stdout, done.stderr)
        return Ended(code, done.stdout.decode(errors="replace").encode(), b"")

    def exec(self, cmd: str, cwd: str, stdin: str | None, agent: str) -> Ended:
        answer = self.proxy.exec(cmd, cwd=cwd, stdin=stdin, agent_name=agent, timeout=HANGS)
        return Ended(answer["exit_code"], answer["stdout"].encode(), b"")

    def stream(self, cmd: str, cwd: str, stdin: str | None, agent: str) -> Ended:
        events = list(self.proxy.stream(cmd, cwd=cwd, stdin=stdin, agent_name=agent, timeout=HANGS))
        out = "".join(data["stdout"] for name, data, _ in events if name == "output")
        return Ended(events[-1][1]["exit_code"], out.encode(), b"")

    def shell(self, cmd: str, cwd: str, stdin: str | None, agent: str) -> Ended:
        env = {
            **self.proxy.env,
            "PROXY_URL": f"http://127.0.0.1:{self.proxy.port}",
            "OPENCODE_AGENT": agent,
            "PWD": f"{self.proxy.workspace}/{cwd}",
        }
        words = [sys.executable, "-I", "-S", str(self.head), "shell", "-c", cmd]
        done = self.run(words, cwd, stdin, env, apart=True)
        return Ended(done.returncode, done.stdout, done.stderr)

    def mcp(self, cmd: str, cwd: str, stdin: str | None, agent: str) -> Ended:
        arguments = {
            "cmd": cmd,
            "cwd": cwd,
            "agent_name": agent,
            "timeout": HANGS,
        }
        if stdin is not None:
            arguments["stdin"] = stdin
        result = call(self.proxy, "exec", **arguments)["structuredContent"]
        return Ended(result["exit_code"], result["output"].encode(), b"")

    def run(
        self, words: list[str], cwd: str, stdin: str | None, env: dict[str, str], apart: bool
    ) -> subprocess.CompletedProcess[bytes]:
        """The shell is given a pipe; what `stdin` of a request holds is a file to the command."""
        with contextlib.ExitStack() as stack:
            if stdin is None:
                given = os.open("/dev/null", os.O_RDONLY)
            elif apart:
                given, write = os.pipe()
                os.write(write, stdin.encode())
                os.close(write)
            else:
                given = os.open(self.folder / "given", os.O_RDONLY)

            stack.callback(os.close, given)

            return subprocess.run(
                words,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if apart else subprocess.STDOUT,
                cwd=f"{self.proxy.workspace}/{cwd}",
                env=env,
                start_new_session=True,
                timeout=HANGS + 2,
                check=False,
            )


@pytest.fixture(scope="module")
def doors(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Doors:
    return Doors(proxy, tmp_path_factory.mktemp("doors"))


# A command beyond MAX_ARGUMENT goes another way.  Bash alone gets these with a shorter first line.
# Two things differ: a syntax error names `eval` in place of `-c`, and xtrace says `++` for `+`.
LONG = [
    pytest.param("#long\necho out; echo err >&2; exit 3", id="long"),
    pytest.param("#long\nnosuch; echo $?", id="long-no-such-command"),
    pytest.param("#long\n\necho ${x:?is needed}; echo never", id="long-needed-variable"),
    pytest.param('#long\necho "$0|$#|$-|$LINENO|$BASH_SUBSHELL"', id="long-name-and-arguments"),
    pytest.param("#long\nls /proc/$$/fd; ls /proc/self/fd | cat", id="long-descriptors"),
    pytest.param("#long\nreadlink /proc/$$/fd/0; cat; read x; echo $?", id="long-stdin"),
    pytest.param("#long\n[ $$ = $BASHPID ]; echo $?; kill $$; sleep 1", id="long-terminated"),
    pytest.param("#long\ntrap 'echo bye' EXIT; (exit 5); false", id="long-trap-exit"),
    pytest.param("#long\nset -e\ntrap 'echo at $LINENO' ERR\nfalse\necho x", id="long-errexit"),
    pytest.param("#long\ntrap 'echo $BASH_COMMAND' DEBUG; :; echo x", id="long-trap-debug"),
    pytest.param("#long\nreturn 3; echo $?; local x; break; echo $?", id="long-return-outside"),
    pytest.param("#long\nf() { local x=1; return 6; }; f; exit", id="long-function"),
    pytest.param("#long\nexec bash -c 'exit 7'", id="long-exec"),
    pytest.param("#long\n(sleep 0.02; exit 8) & wait $!", id="long-background"),
    pytest.param(
        "#long\ncat <<'E' | wc -c\n$x\nE\nexport X=1; env | grep ^X=", id="long-here-document"
    ),
    pytest.param(
        "#long\ncompgen -v | grep -vxE \"$(compgen -e | tr '\\n' '|')_|PIPESTATUS\"",
        id="long-variables",
    ),
]


def through(lines: list[Any], *doors: str) -> list[Any]:
    """A case for each line and each door; those through any but these doors are slow ones."""
    return [
        pytest.param(
            *line.values,
            door,
            id=f"{line.id}-{door}",
            marks=() if door in doors else pytest.mark.slow,
        )
        for line in lines
        for door in ("exec", "stream", "shell")
    ]


CASES = [
    *through(SAYING, "exec"),
    *through(ENDING, "exec"),
    *through(STRICT),
    *through(EXPANDING),
    *through(REDIRECTED, "exec"),
    *through(PIPED, "stream", "shell"),
    *through(SIGNALLED, "shell"),
    *through(AROUND, "exec"),
    *through(PROGRAMS),
    *through(FED, "exec", "shell"),
    *(case for case in through(LONG, "exec") if case.values[1] != "shell"),
]


class Comparison:
    """Runs lines with plain bash and through doors, several at once."""

    def __init__(self, doors: Doors, cases: list[tuple[str, str]]) -> None:
        self.doors = doors
        self.fed = {line.values[0] for line in FED}
        self.pool = ThreadPoolExecutor(5)
        self.ends: dict[tuple[str, str], Future[tuple[Ended, Ended]]] = {}
        # One line after the other, since its runs share a directory.
        by_line: dict[str, list[str]] = {}
        for line, door in cases:
            by_line.setdefault(line, []).append(door)
            self.ends[line, door] = Future()
        for number, (line, chosen) in enumerate(by_line.items()):
            self.pool.submit(self.compare, line, chosen, f"line{number}", f"line{number % 3}")

    def compare(self, line: str, chosen: list[str], cwd: str, agent: str) -> None:
        stdin = GIVEN if line in self.fed else None
        expected: dict[bool, Ended] = {}
        for door in chosen:
            apart = door == "shell"
            try:
                if apart not in expected:
                    self.lay_out(cwd)
                    expected[apart] = self.doors.plain(line, cwd, stdin, apart)
                self.lay_out(cwd)
                sent = line.replace("#long", "#" + "x" * pp.MAX_ARGUMENT)
                got: Ended = getattr(self.doors, door)(sent, cwd, stdin, agent)
                self.ends[line, door].set_result((got, expected[apart]))
            except Exception as error:
                self.ends[line, door].set_exception(error)

    def lay_out(self, cwd: str) -> None:
        """The same files before each run."""
        folder = pathlib.Path(self.doors.proxy.workspace, cwd)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "sub").mkdir(parents=True)
        for name, text in FILES.items():
            (folder / name).write_text(text)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def comparison(request: pytest.FixtureRequest, doors: Doors) -> Iterator[Comparison]:
    """The cases that this session of pytest has selected, all on their way."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [
        (call.params["line"], call.params["door"])
        for call in calls
        if call and {"line", "door"} <= call.params.keys()
    ]
    started = Comparison(doors, cases)
    yield started
    started.close()


@pytest.mark.parametrize(("line", "door"), CASES)
def test_a_line_works_through_every_door_as_with_bash(
    comparison: Comparison, line: str, door: str
) -> None:
    got, expected = comparison.ends[line, door].result(60)
    assert got.code == expected.code
    assert got.out == expected.out
    assert got.err == expected.err


@pytest.mark.parametrize("descriptor", [1, 2], ids=["stdout", "stderr"])
@pytest.mark.parametrize("door", ["exec", "stream", "shell", "mcp"])
@pytest.mark.slow
def test_a_program_cannot_read_its_own_output_back(
    doors: Doors, agent: str, door: str, descriptor: int
) -> None:
    code = f"import os; os.write({descriptor}, b'hello\\n'); os.read({descriptor}, 3)"
    cmd = f"exec {shlex.join([sys.executable, '-I', '-S', '-c', code])}"
    ended: Ended = getattr(doors, door)(cmd, "", None, agent)
    said = ended.out + ended.err
    assert ended.code == 1
    assert said.startswith(b"hello\n")
    assert said.endswith(b"OSError: [Errno 9] Bad file descriptor\n")


# What such children write is waited for, as long as there is no long quiet in between.
LATE = [
    pytest.param("echo hi > >(cat)", b"hi\n", id="process-substitution"),
    pytest.param("exec > >(tee /dev/null) 2>&1; echo hi", b"hi\n", id="tee-for-good"),
    pytest.param(
        "cd /; LC_ALL=C ls /nope 2> >(sed s/^/E:/ >&2)",
        b"E:ls: cannot access '/nope': No such file or directory\n",
        id="stderr-filtered",
    ),
    pytest.param(
        "(for n in 1 2 3; do sleep 0.05; echo $n; done) & echo 0",
        b"0\n1\n2\n3\n",
        id="a-child-that-writes-until-0.15-s-later",
    ),
    pytest.param(
        "(sleep 0.15; echo late) & echo now",
        b"now\nlate\n",
        id="a-child-that-writes-0.15-s-later",
    ),
]


@pytest.mark.parametrize("door", ["exec", "stream", "shell", "mcp"])
@pytest.mark.parametrize(("cmd", "expected"), LATE)
@pytest.mark.slow
def test_output_of_late_children_is_complete_in_a_thousand_tries(
    doors: Doors, agent: str, cmd: str, expected: bytes, door: str
) -> None:
    def attempt(number: int) -> bytes:
        ended: Ended = getattr(doors, door)(cmd, "", None, f"{agent}{number % 2}")
        return ended.out + ended.err

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(attempt, range(1000 // (4 * len(LATE)))))
    assert [text for text in said if text != expected] == []


# ==========================================================================
# Benchmarks: python -m pytest -m bench -s
# ==========================================================================
def local(cmd: str = "true") -> float:
    """Seconds that bash -c takes from here: the floor."""
    started = time.perf_counter()
    subprocess.run(["bash", "-c", cmd], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


@pytest.mark.bench
def test_bench_a_small_command(own: StartServer) -> None:
    call = Kept(own())
    call()
    # In turn, so that both see the same machine.
    pairs = [(local(), timed(call)) for _ in range(1000)]
    floor, ours = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    p95 = sorted(pair[1] for pair in pairs)[950] * 1000
    print(
        f"\nPOST /exec true: {ours:.2f} ms, bash -c true: {floor:.2f} ms, "
        f"ratio {ours / floor:.2f} (bound 2.5)"
    )
    print(f"p95 {p95:.2f} ms, {p95 / ours:.2f} x its median (bound 3)")
    call.close()


@pytest.mark.bench
def test_bench_the_audit_log(own: StartServer, tmp_path: pathlib.Path) -> None:
    calls = [Kept(own()), Kept(own("--audit-log", str(tmp_path / "audit")))]
    for call in calls:
        call()
    pairs = [[timed(call) for call in calls] for _ in range(1000)]
    plain, ours = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    audit = pp.AuditLog(str(tmp_path / "direct"))
    lines = list[float]()
    pause = 1 / 2000
    fields = {
        "run_id": "0" * 16,
        "usage_id": None,
        "session_id": None,
        "agent_name": "poco",
        "cwd": "/w",
        "cmd": "true",
    }
    for _ in range(2000):
        lines.append(timed(lambda: audit.end(fields)))
        time.sleep(pause)
    cost = 2 * statistics.median(lines) * 1000
    print(
        f"\nPOST /exec true: {plain:.2f} ms, audited {ours:.2f} ms, "
        f"ratio {ours / plain:.3f} (bound 1.05)"
    )
    print(
        f"two lines, at 2,000 a second: {cost:.3f} ms, {cost / plain:.1%} of a command (bound 5 %)"
    )
    os.close(audit.fd)
    for call in calls:
        call.close()


@pytest.mark.bench
def test_bench_a_small_command_as_a_tool(own: StartServer) -> None:
    proxy = own()
    call = Kept(proxy)
    connection = proxy.connect()
    session = opened(proxy)
    exec_true = {"name": "exec", "arguments": {"cmd": "true"}}
    names = {
        "MCP-Protocol-Version": "2026-07-28",
        "Mcp-Method": "tools/call",
        "Mcp-Name": "exec",
    }

    def tool(message: dict[str, Any], **headers: str) -> None:
        given = {
            **JSON_TYPE,
            "Accept": "application/json, text/event-stream",
            **headers,
        }
        connection.request("POST", "/mcp", json.dumps(message), given)
        assert (
            json.loads(connection.getresponse().read())["result"]["structuredContent"]["exit_code"]
            == 0
        )

    eras = {
        "modern": lambda: tool(modern("tools/call", exec_true), **names),
        "legacy": lambda: tool(request("tools/call", exec_true), **{"Mcp-Session-Id": session}),
    }
    call()

    for era, ask in eras.items():
        pairs = [(timed(call), timed(ask)) for _ in range(300)]
        plain, ours = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
        ratio = f"ratio {ours / plain:.2f} (bound 1.5)"
        print(f"\n{era} tools/call exec true: {ours:.2f} ms, POST /exec: {plain:.2f} ms, {ratio}")

    connection.close()
    call.close()


@pytest.mark.bench
def test_bench_a_thousand_idle_sessions(own: StartServer, stream: OpenStream) -> None:
    proxy = own()
    for _ in range(20):
        stream(proxy, "/sse").next()
    before = proxy.memory()
    used = proxy.seconds()
    for _ in range(1000):
        stream(proxy, "/sse").next()
    opening = proxy.seconds() - used
    each = (proxy.memory() - before) / 1000 / 1024
    used = proxy.seconds()
    time.sleep(20)
    print(f"\nan idle session: {each:.1f} KiB (bound 30), opened in {opening:.2f} ms of CPU")
    print(f"a thousand of them for 20 s: {(proxy.seconds() - used) * 1000:.0f} ms of CPU")


@pytest.mark.bench
def test_bench_a_call_through_the_relay(own: StartServer, fixtures: pathlib.Path) -> None:
    command = [sys.executable, "-S", str(fixtures), "mcp-fixture", "modern"]
    proxy = own(f"--mcp-server=x={shlex.join(command)}")
    connection = proxy.connect()
    names = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call"}
    given = {
        **JSON_TYPE,
        "Accept": "application/json, text/event-stream",
        **names,
        "Mcp-Name": "test_simple_text",
    }
    message = json.dumps(modern("tools/call", {"name": "test_simple_text"}))

    def relayed() -> None:
        connection.request("POST", "/servers/x/mcp", message, given)
        assert b"simple text" in connection.getresponse().read()

    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdin
        assert child.stdout

        def direct() -> None:
            assert child.stdin
            assert child.stdout
            child.stdin.write(message.encode() + b"\n")
            child.stdin.flush()
            assert b"simple text" in child.stdout.readline()

        for each in (relayed, direct):
            each()
        pairs = [(timed(direct), timed(relayed)) for _ in range(1000)]
        floor, ours = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
        print(f"\na call through the relay: {ours:.2f} ms, to the child itself: {floor:.2f} ms")
        print(f"more by {ours - floor:.2f} ms (bound 1)")
        started = time.perf_counter()
        for _ in range(3000):
            child.stdin.write(message.encode() + b"\n")
        child.stdin.flush()
        for _ in range(3000):
            child.stdout.readline()
        itself = 3000 / (time.perf_counter() - started)
        child.stdin.close()

    connection.close()

    async def pipelined() -> float:
        url = f"ws://127.0.0.1:{proxy.port}/servers/x/mcp/ws"
        socket: Any = await tornado.websocket.websocket_connect(url, subprotocols=["mcp"])
        started = time.perf_counter()
        done = 0
        sent = 0

        while done < 5000:
            while sent < 5000 and sent - done < 60:
                socket.write_message(
                    json.dumps(modern("tools/call", {"name": "test_simple_text"}, id_=sent))
                )
                sent += 1

            await socket.read_message()
            done += 1

        await close(socket)
        return 5000 / (time.perf_counter() - started)

    print(f"pipelined over one WebSocket: {asyncio.run(pipelined()):.0f} calls/s (bound 2,000)")
    print(f"the child itself: {itself:.0f}")


@pytest.mark.bench
def test_bench_thirty_three_sessions_of_three_servers(
    warm: StartServer, fixtures: pathlib.Path, stream: OpenStream
) -> None:
    command = f"{sys.executable} -S {fixtures} mcp-fixture legacy"
    proxy = warm(*(f"--mcp-server={name}={command}" for name in "abc"))
    clients = [Client(proxy, "legacy", name, stream) for name in "abc" for _ in range(11)]
    for client in clients:
        assert text_of(client.call("big", bytes=1_000_000))
        assert text_of(client.call("pid"))
    size = proxy.memory() / 1e6
    print(f"\nthree servers with 33 sessions: {size:.0f} MB (bound 50)")


@pytest.mark.bench
def test_bench_twenty_agents_at_once(own: StartServer) -> None:
    server = own()
    calls = [Kept(server) for _ in range(20)]
    for number, call in enumerate(calls):
        call(agent_name=f"a{number}")
    ratios = []

    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            floor = 400 / timed(lambda: list(pool.map(lambda _: local(), range(400))))
        with ThreadPoolExecutor(20) as pool:

            def work(number: int) -> None:
                for _ in range(20):
                    assert calls[number](agent_name=f"a{number}")["exit_code"] == 0

            ours = 400 / timed(lambda: list(pool.map(work, range(20))))

        ratios.append(ours / floor)
        print(
            f"\n20 agents: {ours:.0f}/s, 4 threads of bash -c: {floor:.0f}/s, "
            f"ratio {ours / floor:.2f} (bound 0.33)"
        )

    print(f"median ratio {statistics.median(ratios):.2f}")
    for call in calls:
        call.close()


@pytest.mark.bench
def test_bench_a_run_that_outlives_its_caller(own: StartServer) -> None:
    call = Kept(own())
    call()
    pairs = [(timed(call), timed(lambda: call(wait=60))) for _ in range(500)]
    plain, lasting = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    print(
        f"\nPOST /exec true: {plain:.2f} ms, with `wait`: {lasting:.2f} ms, "
        f"ratio {lasting / plain:.2f}"
    )
    call.close()


@pytest.mark.bench
def test_bench_a_thousand_runs(own: StartServer) -> None:
    server = own()
    call = Kept(server)
    call()
    before = server.memory()
    for _ in range(1000):
        call("seq 800")
    grown = (server.memory() - before) / 2**20
    print(f"\n1,000 runs with 3 KB of output: {grown:.1f} MiB (bound 10)")
    connection = server.connect()

    def ask() -> None:
        connection.request("GET", "/runs?limit=1000")
        assert len(json.loads(connection.getresponse().read())["runs"]) == 1000

    times = [timed(ask) for _ in range(30)]
    print(f"GET /runs?limit=1000: {statistics.median(times) * 1000:.1f} ms (bound 20)")
    connection.close()
    call.close()


@pytest.mark.bench
def test_bench_a_start_that_adopts_a_hundred_runs(own: StartServer) -> None:
    server = own()
    times = []
    for _ in range(3):
        server.stop()
        times.append(timed(server.start))
    for number in range(100):
        server.post({"cmd": f"seq {number * 100}", "wait": 20})
    adopting = []
    for _ in range(5):
        server.stop(signal.SIGKILL)
        adopting.append(timed(server.start))
        assert len(server.runs(limit=1000)) == 100
    more = statistics.median(adopting) - statistics.median(times)
    print(f"\na start that adopts 100 runs: {more:.2f} s more than one without (bound 1)")


@pytest.mark.bench
def test_bench_an_answer_of_64_mib(warm: StartServer) -> None:
    server = warm()
    cmd = "head -c 67108864 /dev/zero | tr '\\0' x"
    for _ in range(3):
        large = server.start_exec(cmd, max_output=pp.MAX_OUTPUT)
        waits = [0.0]
        while not large.future.done():
            waits.append(timed(lambda: server.request("GET", "/health")))
            time.sleep(0.005)
        print(f"\nGET /health during an answer of 64 MiB: {max(waits):.3f} s at most (bound 0.25)")


@pytest.mark.bench
def test_bench_a_hundred_megabytes(warm: StartServer) -> None:
    server = warm()
    idle = server.memory()
    cmd = "head -c 100000000 /dev/zero | tr '\\0' x"
    pairs = [(local(f"{cmd} | cat >/dev/null"), timed(lambda: server.exec(cmd))) for _ in range(7)]
    floor, ours = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    print(f"\n100 MB: {ours:.0f} ms, into cat: {floor:.0f} ms, ratio {ours / floor:.2f} (bound 4)")
    cmd = "head -c 100000000 /dev/zero"
    pairs = [(local(f"{cmd} | cat >/dev/null"), timed(lambda: server.exec(cmd))) for _ in range(7)]
    floor, ours = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    print(
        f"100 MB from /dev/zero itself: {ours:.0f} ms, into cat: {floor:.0f} ms, "
        f"ratio {ours / floor:.2f}"
    )
    print(f"peak {server.peak() / 1e6:.0f} MB, idle {idle / 1e6:.0f} MB (bound idle + 84 MB)")


@pytest.mark.bench
def test_bench_start_and_size(warm: StartServer) -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        server = warm()
        times.append(time.perf_counter() - started)
    print(f"\nstart to the first answer: {statistics.median(times):.2f} s (bound 1)")
    print(f"idle: {server.memory() / 2**20:.1f} MiB resident (bound 45)")


@pytest.mark.bench
def test_bench_the_shell(engine: Caller, tmp_path: pathlib.Path, console_script: str) -> None:
    assert run("install", str(tmp_path)).returncode == 0
    installed = str(tmp_path / pp.INSTALLED)
    compiled = {"PYTHONPATH": str(MODULE.parent), "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    env = {**engine.env, **compiled}
    # Otherwise pip's form is the file itself.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    python = sys.executable
    ways = {
        "python3 -I -S -c pass": [python, "-I", "-S", "-c", "pass"],
        "what install writes (bound 2.5)": [installed, "-c", "true"],
        "python3 -c pass": [python, "-c", "pass"],
        "the file itself": [python, f"{engine.names}/pocketcoder", "shell", "-c", "true"],
        "the form that pip installs": [console_script, "shell", "-c", "true"],
    }
    both: dict[str, Any] = {
        "env": env,
        "cwd": engine.cwd,
        "stdin": subprocess.DEVNULL,
        "check": True,
    }
    times = [
        [timed(partial(subprocess.run, words, **both)) for words in ways.values()]
        for _ in range(100)
    ]
    medians = [statistics.median(column) * 1000 for column in zip(*times, strict=True)]
    ratios = [median / medians[0] for median in medians]
    for way, median, ratio in zip(ways, medians, ratios, strict=True):
        print(f"\n{way}: {median:.1f} ms, ratio {ratio:.2f}", end="")
    assert ratios[1] <= 2.5
    assert ratios[4] <= ratios[3]

    process = engine.start("-c", "for i in 1 2 3 4 5 6 7 8 9 10; do date +%s.%N; sleep 0.1; done")
    assert process.stdout
    late = [time.time() - float(line) for line in process.stdout]
    process.communicate()
    print(
        f"\noutput arrives {statistics.median(late) * 1000:.1f} ms after it was written (bound 50)"
    )


def peak_memory(
    words: list[str | bytes], engine: Caller, source: str, sink: str
) -> tuple[float, int]:
    """Seconds, and the most memory of the shell in kilobytes."""
    pipe = ["bash", "-c", f'{source} | "$@" {sink}', "x", *words]
    started = time.perf_counter()
    process = subprocess.Popen(pipe, env=engine.env, cwd=engine.cwd, stdout=subprocess.DEVNULL)
    most = 0

    while process.poll() is None:
        for pid in processes_with(engine.names):
            with contextlib.suppress(OSError, IndexError):
                status = pathlib.Path(f"/proc/{pid}/status").read_text()
                most = max(most, int(re.findall(r"VmHWM:\s+(\d+)", status)[0]))
        time.sleep(0.05)

    return time.perf_counter() - started, most


@pytest.mark.bench
def test_bench_a_unix_socket_beside_a_port(
    warm: StartServer, names: str, tmp_path: pathlib.Path
) -> None:
    assert run("install", str(tmp_path)).returncode == 0
    installed = str(tmp_path / pp.INSTALLED)
    folder = tempfile.mkdtemp(prefix="pc")
    servers = {"a port": warm(), "a unix socket": warm(unix=f"{folder}/s")}
    kept = [Kept(server) for server in servers.values()]
    engines = [Caller(server, names) for server in servers.values()]
    for each in kept:
        each()

    def shell(engine: Caller) -> None:
        words = [installed, "-c", "true"]
        subprocess.run(words, env=engine.env, cwd=engine.cwd, stdin=subprocess.DEVNULL, check=True)

    ways: dict[str, tuple[int, list[Callable[[], Any]]]] = {
        "POST /exec true": (500, [*kept]),
        "the installed shell": (200, [partial(shell, engine) for engine in engines]),
        "100 MB of output": (
            5,
            [partial(each, "head -c 100000000 /dev/zero | tr '\\0' x") for each in kept],
        ),
    }
    for way, (count, calls) in ways.items():
        times = [[timed(each) for each in calls] for _ in range(count)]
        medians = [statistics.median(column) * 1000 for column in zip(*times, strict=True)]
        shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in zip(servers, medians, strict=True))
        print(f"\n{way}: {shown}, ratio {medians[1] / medians[0]:.2f}", end="")

    print()
    for each in kept:
        each.close()
    shutil.rmtree(folder)


@pytest.mark.bench
def test_bench_a_gigabyte_through_the_shell(engine: Caller) -> None:
    for way, command, source, sink in (
        ("out", "head -c 1000000000 /dev/zero", ":", "| cat"),
        ("in", "cat >/dev/null", "head -c 1000000000 /dev/zero", ""),
    ):
        seconds, most = peak_memory(engine.words("-c", command), engine, source, sink)
        print(
            f"\n1 GB {way}: {1000 / seconds:.0f} MB/s (bound 150), "
            f"the shell's memory {most / 1024:.0f} MiB",
            end="",
        )

    print(f"\nthe server's peak {engine.proxy.peak() / 2**20:.0f} MiB")


@pytest.mark.bench
def test_bench_twenty_thousand_mixed_commands(own: StartServer) -> None:
    server = own()
    calls = [Kept(server) for _ in range(16)]
    sizes = [0, 1, 10, 1000, 4096, 65536, 70000, 300000]

    def work(worker: int, first: int, count: int) -> int:
        wrong = 0
        for number in range(first, first + count):
            code = number % 256
            size = sizes[number * 7 % len(sizes)]
            fill = f"head -c {size} /dev/zero | tr '\\0' {number % 10}"
            cmd = f"printf %s {number}; {fill}; exit {code}"
            answer = calls[worker](cmd, agent_name=f"m{number % 5}")
            expected = f"{number}{str(number % 10) * size}"
            wrong += (answer.get("stdout"), answer["exit_code"]) != (expected, code)

        return wrong

    def rounds(start: int, total: int) -> int:
        each = total // 16
        with ThreadPoolExecutor(16) as pool:
            return sum(
                pool.map(lambda worker: work(worker, start + worker * each, each), range(16))
            )

    wrong = rounds(0, 2000)
    time.sleep(1)
    before = server.memory()
    files = server.descriptors()
    taken = timed(
        lambda: print(f"\nwrong answers: {wrong + rounds(2000, 18000)} of 20,000 (bound 0)")
    )
    time.sleep(1)
    grown = (server.memory() - before) / 2**20
    more = server.descriptors() - files
    print(
        f"after the first 2,000: {grown:+.1f} MiB (bound 5), {more:+d} descriptors, "
        f"{18000 / taken:.0f} commands/s"
    )
    for call in calls:
        call.close()


@pytest.mark.bench
def test_bench_an_idle_terminal_that_is_watched(warm: StartServer, stream: OpenStream) -> None:
    proxy = warm()
    watch(proxy, stream, "poco")
    time.sleep(1)
    pids = (proxy.process.pid, proxy.tmux_pid())
    before = sum(map(cpu_seconds, pids))
    seconds = 20
    time.sleep(seconds)
    share = (sum(map(cpu_seconds, pids)) - before) / seconds
    print(f"\nan idle terminal, watched: {share:.2%} of a core (bound 1 %)")


@pytest.mark.bench
def test_bench_a_flood_that_is_watched(warm: StartServer, stream: OpenStream) -> None:
    proxy = warm()
    flood = "yes 0123456789abcdef | head -c 20000000 >/dev/tty"
    alone = list[float]()
    seen = list[float]()
    rates = list[float]()
    for _ in range(5):
        alone.append(timed(lambda: proxy.exec(flood)))
        watched = watch(proxy, stream, "poco")
        running = Background(lambda: timed(lambda: proxy.exec(flood)))
        started = time.perf_counter()
        pictures = 0
        while not running.future.done():
            screen_when(watched, lambda _: True)
            pictures += 1
        seen.append(running.result())
        rates.append(pictures / (time.perf_counter() - started))
        watched.break_off()
        watched.close()
    ratio = statistics.median(seen) / statistics.median(alone)
    print(f"\n20 MB on the terminal: {statistics.median(alone):.2f} s, watched ratio {ratio:.2f}")
    print(f"pictures: {max(rates):.1f} a second at most (bound 10)")


# ==========================================================================
# Soak: POCKETCODER_SOAK=3600 python -m pytest -m soak -s
# ==========================================================================
SECRET = "soak"
TMUX_DIES = ("session", "server", "server killed")
PANE_DIES = ("shell", "pane", "window", "hung up")
RESTARTS = ("restart", "kill")
OTHERS = ("child", "client", "half request", "wipe", "half a line", "sleep", "copy mode")
# Ended by a timeout, a signal or a caller that leaves, long before its time.
LINGER = "sleep 30."


class Bearer(http.client.HTTPConnection):
    def request(
        self, method: str, url: str, body: Any = None, headers: Any = None, **more: Any
    ) -> None:
        super().request(
            method, url, body, {**(headers or {}), "Authorization": f"Bearer {SECRET}"}, **more
        )


class Guarded(Proxy):
    """A server with a token, which all its clients send."""

    def connect(self) -> http.client.HTTPConnection:
        return Bearer("127.0.0.1", self.port, timeout=60)


class Order(NamedTuple):
    """A command, and what it has to answer."""

    fields: dict[str, Any]
    out: str
    err: str = ""
    code: int = 0
    ended: str = "exit"


class Answer(NamedTuple):
    out: str
    # None: it is in `out`.
    err: str | None
    facts: dict[str, Any]


class Fault:
    def __init__(self, kind: str, agent: str | None) -> None:
        self.kind = kind
        self.agent = agent
        self.begin = time.monotonic()
        self.end = float("inf")


class Refused(Exception):
    """503, or 125: nothing was run."""


class Lost(Exception):
    """A child died."""


def ordered(chance: random.Random, tag: str, agent: str, folder: str, door: str) -> Order:
    number = chance.randrange(256)
    given = f"{tag}é\n" * chance.randrange(1, 20_000)
    count = int(10 ** chance.uniform(1, 5.3))
    name = chance.choice(["KILL", "TERM", "INT", "HUP", "USR1"])
    code = 128 + signal.Signals[f"SIG{name}"]
    later = f"(sleep 1; echo {tag} >{folder}/late.{tag}) {chance.choice(['', '>/dev/null 2>&1'])} &"
    orders = [
        Order({"cmd": f"echo {tag}; exit {number}"}, f"{tag}\n", "", number),
        Order(
            {"cmd": f"echo {tag}; echo err {tag} >&2; kill -{name} $$"},
            f"{tag}\n",
            f"err {tag}\n",
            code,
        ),
        Order({"cmd": f"yes {tag} | head -n {count}", "max_output": 64 << 20}, f"{tag}\n" * count),
        Order(
            {
                "cmd": "cat; exit 3",
                "stdin": given,
                "max_output": 64 << 20,
            },
            given,
            "",
            3,
        ),
        Order(
            {"cmd": f'echo {tag} "$POCKETCODER_AGENT"; pwd >&2', "cwd": "sub"},
            f"{tag} {agent}\n",
            os.path.realpath(f"{folder}/work/sub") + "\n",
        ),
        Order({"cmd": f"{later} echo {tag}"}, f"{tag}\n"),
        Order({"cmd": f": {'x' * 40_000}; echo {tag}"}, f"{tag}\n"),
        Order({"cmd": f"for i in 1 2 3; do echo {tag}; sleep 0.{number}; done"}, f"{tag}\n" * 3),
    ]

    if door == "channel" and number < 60:
        return Order(
            {"cmd": f"echo {tag}; {LINGER}{tag.replace('x', '00')}", "signal": name},
            f"{tag}\n",
            "",
            code,
        )

    if door != "shell" and number < 90:
        return Order(
            {"cmd": f"echo {tag}; {LINGER}{tag.replace('x', '00')}", "timeout": 0.3},
            f"{tag}\n",
            "",
            124,
            "timeout",
        )

    return chance.choice(orders)


# Seconds between two commands of a worker, about.
PAUSE = 0.5


class Soak:
    """The load, the faults, and what may be excused by which."""

    def __init__(self, server: Proxy, names: str, fixtures: pathlib.Path) -> None:
        self.server = server
        self.names = names
        self.fixtures = fixtures
        self.until = float("inf")
        self.life = 0
        self.faults: list[Fault] = []
        self.wrong: list[str] = []
        # By door: verdict, seconds.
        self.done: dict[str, list[tuple[str, float]]] = {}
        # By worker: when it asked.
        self.since: dict[int, float] = {}
        # Exit code by run_id.
        self.runs: dict[str, int] = {}
        # What background processes will write: its agent, and when they began.
        self.late: dict[str, tuple[str, float]] = {}
        self.sessions: dict[int, tuple[int, str]] = {}
        self.samples: list[tuple[int, float, int, int]] = []

    # ---- doors ----

    def post(self, worker: int, order: Order) -> Answer:
        status, facts = self.server.post(order.fields)
        if status != 200:
            raise Refused(f"{status} {facts}")
        return Answer(facts["stdout"], None, facts)

    def stream(self, worker: int, order: Order) -> Answer:
        with contextlib.closing(
            Stream(self.server, "/exec", order.fields, Accept="text/event-stream")
        ) as events:
            if events.status != 200:
                raise Refused(f"{events.status} {events.answer.read()!r}")
            got = []
            event = events.next()
            while "exit_code" not in event:
                got.append(event["stdout"])
                event = events.next()
            return Answer("".join(got), None, event)

    def channel(self, worker: int, order: Order) -> Answer:
        fields = dict(order.fields)
        stdin = fields.pop("stdin", "").encode()
        number = fields.pop("signal", None)

        async def talk() -> Answer:
            async with Channel(
                self.server, headers={"Authorization": f"Bearer {SECRET}"}
            ) as channel:
                channel.patience = 60.0
                await channel.send(fields)
                for at in range(0, len(stdin), 50_000):
                    await channel.send(b"\0" + stdin[at : at + 50_000])
                await channel.send(b"\xff\0")
                if number:
                    descriptor = await channel.next()
                    if descriptor == 1:
                        await channel.send({"signal": number})

                facts = await channel.end() if not hasattr(channel, "final") else channel.final
                if "ended" not in facts:
                    raise Refused(str(facts))
                return Answer(channel.streams[1].decode(), channel.streams[2].decode(), facts)

        return asyncio.run(talk())

    def shell(self, worker: int, order: Order) -> Answer:
        caller = Caller(self.server, self.names)
        fields = order.fields
        caller.env["OPENCODE_AGENT"] = fields["agent_name"]
        where = os.path.join(caller.cwd, fields.get("cwd", ""))

        with caller.start("-c", fields["cmd"], stdin=subprocess.PIPE, cwd=where) as process:
            out, err = (
                part.decode()
                for part in process.communicate(fields.get("stdin", "").encode(), timeout=60)
            )

        ours = [line for line in err.split("\n") if line.startswith("pocketcoder: ")]
        if process.returncode == 125 and ours:
            raise Refused(err)
        ended = next(
            (ended for ended in ("lost", "cancelled") if ours and ended in ours[0]), "exit"
        )
        return Answer(out, err, {"exit_code": process.returncode, "ended": ended})

    def told(self, order: Order, result: dict[str, Any]) -> Answer:
        facts = result.get("result", {}).get("structuredContent")
        if not facts:
            raise Refused(str(result))

        out = facts["output"]
        # A server that stops leaves the command running, and the next one finds it.
        while facts["running"]:
            facts = self.wait_for(order, facts)
            out += facts["output"]
        return Answer(out, None, facts)

    def wait_for(self, order: Order, facts: dict[str, Any]) -> Any:
        """What `wait_run` tells of a command, once there is a server to ask."""
        arguments = {
            "run_id": facts["run_id"],
            "offset": facts["next_offset"],
            "max_output": order.fields.get("max_output", pp.DEFAULT_OUTPUT),
        }
        message = modern("tools/call", {"name": "wait_run", "arguments": arguments})

        def ask() -> Any:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return mcp_result(self.server, message)
            return None

        result = eventually(ask, 20)
        assert "structuredContent" in result, result
        return result["structuredContent"]

    def tool(self, worker: int, order: Order) -> Answer:
        params = {"name": "exec", "arguments": order.fields}
        id_ = order.fields["usage_id"]
        if worker % 2:
            got = mcp(self.server, modern("tools/call", params, id_, progressToken=id_))[2]
        else:
            if self.sessions.get(worker, (-1, ""))[0] != self.life:
                life = self.life
                self.sessions[worker] = life, opened(self.server)
            params["_meta"] = {"progressToken": id_}
            got = mcp(
                self.server,
                request("tools/call", params, id_),
                Mcp_Session_Id=self.sessions[worker][1],
            )[2]

        answer = got[-1] if isinstance(got, list) else got
        assert answer["id"] == id_, answer
        return self.told(order, answer)

    def socket(self, worker: int, order: Order) -> Answer:
        async def talk() -> dict[str, Any]:
            url = f"ws://127.0.0.1:{self.server.port}/mcp/ws?token={SECRET}"
            socket = await tornado.websocket.websocket_connect(
                url, subprotocols=["mcp"], max_message_size=64 << 20
            )

            for message in (
                request("initialize", INITIALIZE, "hello"),
                request(
                    "tools/call",
                    {"name": "exec", "arguments": order.fields},
                    order.fields["usage_id"],
                ),
            ):
                await socket.write_message(json.dumps(message))
                got = json.loads(cast(str, await asyncio.wait_for(socket.read_message(), 60)))
                assert got["id"] == message["id"], got

            await close(socket)
            return cast("dict[str, Any]", got)

        return self.told(order, asyncio.run(talk()))

    def events(self, worker: int, order: Order) -> Answer:
        """A session that was away meanwhile gets the answer."""
        name = f"/sse?session_id=w{worker}"
        first = Stream(self.server, name)
        path = first.next()
        if worker % 2:
            first.close()
        message = request(
            "tools/call", {"name": "exec", "arguments": order.fields}, order.fields["usage_id"]
        )
        assert mcp_status(self.server, message, path=path) == 202

        with contextlib.closing(Stream(self.server, name) if worker % 2 else first) as stream:
            got = stream.next()
            got = stream.next() if got == path else got
            assert got["id"] == order.fields["usage_id"], got
            return self.told(order, got)

    def keys(self, worker: int, order: Order) -> Answer:
        """A question at the terminal, answered there."""
        agent = order.fields["agent_name"]
        tag = order.fields["usage_id"]
        ask = {
            "cmd": f"echo ready; read -r x </dev/tty; echo {tag} $x; exit 5",
            "agent_name": agent,
            "timeout": 20,
        }

        with contextlib.closing(
            Stream(self.server, "/exec", ask, Accept="text/event-stream")
        ) as stream:
            assert stream.next() == {"stdout": "ready\n"}
            for name, arguments in (
                (
                    "send_keys",
                    {
                        "agent_name": agent,
                        "text": f"word {tag}",
                        "keys": ["Enter"],
                    },
                ),
                ("list_terminals", {}),
                ("read_terminal", {"agent_name": agent, "lines": 50}),
            ):
                got = mcp_result(
                    self.server, modern("tools/call", {"name": name, "arguments": arguments})
                )
                assert not got["isError"], got

            assert stream.next() == {"stdout": f"{tag} word {tag}\n"}
            facts = stream.next()

        assert facts.pop("exit_code") == 5, facts
        assert facts["ended"] == "exit", facts
        return Answer(order.out, order.err, {"exit_code": order.code, "ended": order.ended})

    def relay(self, worker: int, order: Order) -> Answer:
        era, server = ERAS[worker % 4]
        try:
            client = Client(self.server, era, server, partial(Stream))
        except KeyError as none:
            raise Lost("no session") from none

        for name, arguments in (
            ("echo", {"n": order.fields["usage_id"]}),
            ("test_slow", {"seconds": 0.4}),
        ):
            got = client.ask(
                "tools/call", {"name": name, "arguments": arguments}, id_=order.fields["usage_id"]
            )[-1]
            if "error" in got:
                raise Lost(str(got))
            text = text_of(got["result"])
            assert got["id"] == order.fields["usage_id"], got
            assert (
                text == "slept 0.4 s"
                if name == "test_slow"
                else json.loads(text)["arguments"] == arguments
            ), got

        if era == "legacy":
            assert mcp_status(self.server, b"", "DELETE", path=client.path, **client.headers) == 204
        return Answer(order.out, order.err, {"exit_code": order.code, "ended": order.ended})

    # Each way to run a command, and how often it is taken.
    DOORS: ClassVar[dict[str, tuple[Callable[..., Answer], int]]] = {
        "exec": (post, 20),
        "stream": (stream, 15),
        "channel": (channel, 15),
        "tool": (tool, 20),
        "socket": (socket, 10),
        "events": (events, 8),
        "keys": (keys, 4),
        "relay": (relay, 5),
        "shell": (shell, 3),
    }

    # ---- load ----

    def hit(self, begin: float, agent: str, *kinds: str, grace: float = 2.0) -> bool:
        """Whether one of these faults could have hit a call that started then."""
        hits = (
            fault
            for fault in list(self.faults)
            if fault.kind in kinds and fault.agent in (None, agent)
        )
        return any(fault.end + grace >= begin for fault in hits)

    def work(self, worker: int) -> None:
        chance = random.Random(worker)
        serial = 0
        agent = f"a{worker if worker < 20 else 10 + worker % 10}"
        names = list(self.DOORS)
        weights = [weight for _, weight in self.DOORS.values()]

        while time.monotonic() < self.until and len(self.wrong) < 20:
            door = chance.choices(names, weights)[0]
            serial = serial + 1
            tag = f"{worker}x{serial}"
            if door == "keys" and worker >= 10:
                continue
            order = ordered(chance, tag, agent, self.server.folder, door)
            order.fields.update(agent_name=agent, usage_id=tag)
            begin = time.monotonic()
            self.since[worker] = begin
            verdict = self.judge(door, worker, order, agent, tag)
            self.done.setdefault(door, []).append((verdict, time.monotonic() - begin))
            self.since[worker] = float("inf")
            time.sleep(chance.uniform(0, 2 * PAUSE))

    def judge(self, door: str, worker: int, order: Order, agent: str, tag: str) -> str:
        begin = time.monotonic()
        terminal = (*PANE_DIES, *TMUX_DIES)
        try:
            answer = self.DOORS[door][0](self, worker, order)
        except TimeoutError as hang:
            verdict = "hang"
            excused = False
            said = repr(hang)
        except Refused as refused:
            verdict = "refused"
            excused = self.hit(begin, agent, *RESTARTS)
            said = str(refused)
        except Lost as lost:
            verdict = "lost"
            excused = self.hit(begin, agent, *RESTARTS, "child", grace=40)
            said = str(lost)
        # Mostly the connection is gone.
        except Exception as gone:
            kinds = (
                *RESTARTS,
                *(terminal if door == "keys" else ["child"] if door == "relay" else []),
            )
            verdict = "gone"
            excused = self.hit(begin, agent, *kinds)
            said = "".join(traceback.format_exception(gone))[-1500:]
        else:
            verdict, excused, said = self.compare(order, answer, begin, agent)
            if "late." in order.fields["cmd"] and door not in ("keys", "relay"):
                self.late[tag] = f"{agent} {door} {verdict} {order.fields['cmd']}", begin

        if not excused:
            now = time.monotonic()
            past = [
                f"{each.kind} {each.agent or ''} {now - each.begin:.2f} s ago"
                for each in self.faults[-4:]
            ]
            at = f"{door} {agent}, {now - begin:.2f} s, after {past}"
            self.wrong.append(f"{verdict} at {at}: {order.fields['cmd'][-200:]!r}: {said[:1500]}")
            print("WRONG", self.wrong[-1], flush=True)

        return verdict

    def compare(
        self, order: Order, answer: Answer, begin: float, agent: str
    ) -> tuple[str, bool, str]:
        facts = answer.facts
        combined = answer.err is None
        ended = facts["ended"]
        got = (answer.out, answer.err or "")
        if "run_id" in facts:
            assert facts["run_id"] not in self.runs, "a run_id twice"
            self.runs[facts["run_id"]] = facts["exit_code"]
        due = (order.out + order.err, "") if combined else (order.out, order.err)
        lengths = f"{[len(text) for text in got]} of {[len(text) for text in due]}"
        said = f"{facts}, {[text[:60] for text in got]}, {lengths}"

        if ended in ("lost", "cancelled") and ended != order.ended:
            kinds = RESTARTS[:1] if ended == "cancelled" else (*PANE_DIES, *TMUX_DIES)
            code = facts["exit_code"] == 137 or ended == "cancelled"
            # It may end within a character.
            begun = due[0].startswith(got[0].replace("\ufffd", ""))
            return ended, self.hit(begin, agent, *kinds) and begun and code, said

        right = got == due and (facts["exit_code"], ended) == (order.code, order.ended)
        return ("ok" if right else "wrong"), right, said

    # ---- faults ----

    def hurt(self, kind: str, chance: random.Random) -> None:
        agent = f"a{chance.randrange(10, 20) if kind in OTHERS else chance.randrange(20)}"
        fault = Fault(kind, agent if kind in PANE_DIES else None)
        self.faults.append(fault)
        number = len(self.faults)
        server = self.server
        panes: list[str] = []
        # There may be no tmux.
        with contextlib.suppress(AssertionError):
            panes = [line.split()[0] for line in server.panes(agent)]
        pane = chance.choice(panes or ["%none"])

        if kind in DEATHS:
            words = ["bash", "-c", DEATHS[kind].format(socket=server.socket, pane=pane)]
            subprocess.run(words, env=server.env, stderr=subprocess.DEVNULL, timeout=20)
        elif kind in RESTARTS:
            begin = time.monotonic()
            status = server.stop(signal.SIGTERM if kind == "restart" else signal.SIGKILL)
            if kind == "restart" and (status or time.monotonic() - begin > 12):
                self.wrong.append(f"stopped with {status} after {time.monotonic() - begin:.1f} s")
            server.start()
            self.life += 1
        elif kind == "child":
            children = [
                pid for pid in processes_with(str(self.fixtures)) if pid != server.process.pid
            ]
            if children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(children), signal.SIGKILL)
        elif kind == "client":
            self.leave(agent, number)
        elif kind == "half request":
            head = f"POST /exec HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {SECRET}\r\n"
            with socket.create_connection(("127.0.0.1", server.port)) as half:
                half.sendall(
                    f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode()
                )

            params = {
                "name": "exec",
                "arguments": {"cmd": f"{LINGER}{number}", "agent_name": agent},
            }
            call = frame(json.dumps(request("tools/call", params)))
            with shaken(server, f"/mcp/ws?token={SECRET}", call + call[: number % 20]):
                time.sleep(chance.uniform(0, 0.2))
        elif kind == "wipe":
            shutil.rmtree(f"{server.socket}.d", ignore_errors=True)
        else:
            keys = {
                "half a line": [f"touch {server.folder}/half.{number}"],
                "sleep": ["C-u", "sleep 2", "Enter"],
            }
            words = (
                ["send-keys", "-t", pane, *keys[kind]]
                if kind in keys
                else ["copy-mode", "-t", pane]
            )
            with contextlib.suppress(AssertionError):
                # In copy mode a key may ask something, and tmux waits for good.
                server.tmux("copy-mode", "-q", "-t", pane)
                server.tmux(*words)

        fault.end = time.monotonic()

    def leave(self, agent: str, number: int) -> None:
        """A caller that is killed, and one that drops its stream."""
        caller = Caller(self.server, self.names)
        caller.env["OPENCODE_AGENT"] = agent
        with caller.start("-c", f"echo go; {LINGER}{number}") as process:
            assert process.stdout
            process.stdout.readline()
            process.kill()

        cmd = [f"echo go; {LINGER}{number}", "yes"][number % 2]
        left = Stream(
            self.server, "/exec", {"cmd": cmd, "agent_name": agent}, Accept="text/event-stream"
        )
        left.next()
        left.close()

    def look(self, begin: float) -> None:
        """Sample the server; nothing hangs, and what was to end has."""
        now = time.monotonic()
        server = self.server
        self.samples.append((self.life, now - begin, server.memory(), server.descriptors()))
        self.wrong += [
            f"worker {worker} hangs"
            for worker, since in list(self.since.items())
            if now - since > 100
        ]

        for pid in processes_with("sleep\x0030."):
            with contextlib.suppress(OSError):
                ticks = int(
                    pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
                )
                age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if age > 12 and not self.hit(now - age, "", "kill"):
                    self.wrong.append(f"still there after {age:.0f} s: {words}")


def left_over(server: Proxy, fixtures: pathlib.Path) -> list[str]:
    """Processes that are neither the server, its children, tmux, nor shells in its panes."""
    known = {server.process.pid, server.tmux_pid()}
    known |= {int(pid) for pid in server.tmux("list-panes", "-a", "-F", "#{pane_pid}").split()}
    found = []

    for pid in set(processes_with(server.folder)) - known:
        with contextlib.suppress(OSError):
            process = pp.process(pid)
            if process and process.parent != server.process.pid:
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_text()[:200]
                found.append(f"{pid} {words!r} of {process.parent}")

    return found


def unaudited(audit: pathlib.Path, runs: dict[str, int]) -> list[str]:
    """Answered runs without their two lines in the audit log, or with another exit code."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in audit.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry.get("run_id"), []).append(entry)
    told = {
        run: [(entry["event"], entry.get("exit_code")) for entry in entries]
        for run, entries in found.items()
    }
    due = {run: [("start", None), ("end", code)] for run, code in runs.items()}

    return [
        f"audit of {run}: {told.get(run)}, not {due[run]}"
        for run in due
        if told.get(run) != due[run]
    ]


def drift(samples: list[tuple[int, float, int, int]]) -> tuple[float, float]:
    """How many MiB and descriptors more the last third has than the second, by medians.

    The first third is warm-up.
    """
    third = len(samples) // 3
    if not third:
        return 0.0, 0.0
    memory, files = zip(*((row[2] / 2**20, row[3]) for row in samples), strict=True)
    middle = slice(third, 2 * third)
    last = slice(2 * third, None)
    return tuple(statistics.median(s[last]) - statistics.median(s[middle]) for s in (memory, files))


def soak_for(seconds: float, soak: Soak, audit: pathlib.Path) -> None:
    server = soak.server
    chance = random.Random(7)
    begin = time.monotonic()
    looked = 0.0
    os.mkdir(f"{server.workspace}/sub")
    server.exec("true")
    files_before = server.descriptors()
    soak.until = begin + seconds
    faults = [*PANE_DIES, *TMUX_DIES, *OTHERS]

    with ThreadPoolExecutor(26) as pool:
        workers = [pool.submit(soak.work, worker) for worker in range(26)]
        while True:
            now = time.monotonic()
            if now >= soak.until or len(soak.wrong) >= 20:
                break
            # After that the server lives long, to see whether its memory is flat.
            restarts = [*RESTARTS] * 2 if now - begin < 0.4 * seconds else []
            soak.hurt(chance.choice(faults + restarts), chance)
            if now - looked > 10:
                looked = now
                soak.look(begin)
            time.sleep(chance.uniform(1, 4))

        for worker in workers:
            worker.result(120)

    ended = time.monotonic()
    soak.hurt("copy mode", chance)
    # Files of lines that were given up stay for so long.
    time.sleep(pp.NEW_SHELL_TIMEOUT + 5)
    soak.look(begin)
    print(
        f"\n{'door':10}{'n':>7}{'ok':>7}{'lost':>6}{'cancel':>7}"
        f"{'refused':>8}{'gone':>6}{'ms':>8}{'p99':>8}"
    )

    for door, done in soak.done.items():
        times = sorted(seconds for verdict, seconds in done if verdict == "ok") or [0.0]
        counts = [
            sum(verdict == each for verdict, _ in done)
            for each in ("ok", "lost", "cancelled", "refused", "gone")
        ]
        print(
            f"{door:10}{len(done):7}{counts[0]:7}{counts[1]:6}{counts[2]:7}{counts[3]:8}{counts[4]:6}",
            end="",
        )
        print(f"{statistics.median(times) * 1000:8.1f}{times[len(times) * 99 // 100] * 1000:8.0f}")

    kinds = sorted(fault.kind for fault in soak.faults)
    print(f"{sum(map(len, soak.done.values())) / (ended - begin):.0f} calls/s; faults:", end=" ")
    print(", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds)))
    last = [row for row in soak.samples if row[0] == soak.life]
    memory = [row[2] / 2**20 for row in last]
    files = [row[3] for row in last]
    more, more_files = drift(last[:-1])
    print(f"last of {soak.life + 1} lives, {len(last)} samples: ", end="")
    print(
        f"MiB {memory[0]:.1f} first, {statistics.median(memory):.1f} median, "
        f"{memory[-1]:.1f} last, {more:+.1f} drift"
    )
    print(
        f"descriptors {files[0]} first, {statistics.median(files)} median, "
        f"{files[-1]} last, {more_files:+} drift"
    )
    lines = [
        line
        for line in server.logged().split("\n")
        if re.match(r"\S+ (WARNING|ERROR|CRITICAL)", line)
    ]
    print(f"warnings {len(lines)}")
    children = server.servers()
    print("children", children)
    wrong = soak.wrong

    for tag, (agent, since) in soak.late.items():
        file = pathlib.Path(f"{server.folder}/late.{tag}")
        if not file.exists() or file.read_text() != f"{tag}\n":
            excused = soak.hit(since, agent.split()[0], *PANE_DIES, *TMUX_DIES)
            wrong += [] if excused else [f"a background process of {agent} did not live on: {tag}"]

    wrong += unaudited(audit, soak.runs) if audit.exists() else []
    wrong += [
        f"a half-typed line was run: {name}"
        for name in os.listdir(server.folder)
        if name.startswith("half.")
    ]
    wrong += [f"left over: {each}" for each in left_over(server, soak.fixtures)]
    wrong += [
        f"logged: {line}"
        for line in server.logged().split("\n")
        if re.search("Traceback|ERROR|CRITICAL", line)
    ]
    own = [path.name for path in server.run_folder.rglob("*") if path.suffix in (".in", ".cmd")]
    wrong += [f"files of runs: {own}"] if own else []
    wrong += (
        [f"descriptors {files_before} at first, {files[-1]} at last"]
        if files[-1] > files_before + 30
        else []
    )
    if more > 10:
        wrong.append(f"memory grows: {more:+.1f} MiB")
    assert server.stop() == 0

    # Runs that outlive their server are kept for the next one.
    kept = server.run_folder / "runs"
    found = [path for path in server.run_folder.rglob("*") if kept not in (path, path.parent)]
    if found:
        wrong.append(f"files left: {found}")
    assert not wrong, "\n".join(wrong)


# Clients that are cut off leave sockets to the garbage collector.
@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_soak_mixed_load_with_faults(names: str, fixtures: pathlib.Path) -> None:
    seconds = float(os.environ.get("POCKETCODER_SOAK", "3600"))
    servers = [
        f"--mcp-server={era}={sys.executable} -S {fixtures} mcp-fixture {era}"
        for era in ("legacy", "modern")
    ]
    audit = ["--audit-log", f"{fixtures.parent}/audit"] if '"--audit-log"' in SOURCE else []
    server = Guarded(*servers, *audit, POCKETCODER_TOKEN=SECRET)

    try:
        soak_for(seconds, Soak(server, names, fixtures), fixtures.parent / "audit")
    finally:
        (fixtures.parent / "log").write_text(server.logged())
        server.remove()
