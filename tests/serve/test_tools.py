"""Tool calls in Megrez' own format: what the model is told, and what a client gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.gguf_edit import STRING, Gguf
from support.server import Answer, Server, serve_model

START, END = "<|function_start|>", "<|function_end|>"
BEGIN, TURN_END = "2863", "2862"  # the ids of START, where it is a token, and of <|turn_end|>
SYSTEM = "你是 megrez-gguf 的袖珍测试模型，请简短地回答问题。"
USER = {"role": "user", "content": "上海天气？"}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "天气",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["上海", 'é"\\']}}},
}
ROUTE: dict[str, Any] = {
    "name": "route",
    "description": "",
    "parameters": {
        "type": "object",
        "properties": {"by": {"type": "object", "properties": {"n": {"enum": [[1, -2], None]}}}},
    },
}
for schema in (WEATHER["parameters"], ROUTE["parameters"], ROUTE["parameters"]["properties"]["by"]):
    schema["required"] = list(schema["properties"])
TOOLS = [{"type": "function", "function": f} for f in (WEATHER, ROUTE)]
NAMED = {"type": "function", "function": {"name": "route"}}
# A template in the same format that knows of tools.
OWN = (
    "{%- if tools -%}<|role_start|>system<|role_end|>Tools: {{ tools | tojson }}<|turn_end|>"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "<|role_start|>{{ message.role }}<|role_end|>{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] -%}"
    '<|function_start|>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}<|function_end|>'
    "{%- endfor -%}<|turn_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|role_start|>assistant<|role_end|>{%- endif -%}"
)


def described(*functions: dict[str, Any]) -> str:
    lists = (json.dumps(f, ensure_ascii=False, indent=4) for f in functions)
    sentence = "You have access to the following functions. Use them if required -\n"
    return sentence + "\n\n".join(lists)


def turn(role: str, text: str) -> str:
    return f"<|role_start|>{role}<|role_end|>{text}<|turn_end|>"


OPEN = "<|role_start|>assistant<|role_end|>"


def prompt(server: Server, messages: list[dict[str, Any]], **more: Any) -> str:
    reply = server.post("/apply-template", {"messages": messages, **more})
    assert reply.status == 200, reply.body
    return str(reply.json()["prompt"])


def ask(server: Server, **more: Any) -> Answer:
    body = {"messages": [USER], "tools": TOOLS, "temperature": 0, "max_tokens": 500, **more}
    return server.post("/v1/chat/completions", body)


def choice(server: Server, **more: Any) -> dict[str, Any]:
    reply = ask(server, **more)
    assert reply.status == 200, reply.body
    return dict(reply.json()["choices"][0])


def calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message["tool_calls"]]
    return [(f["name"], json.loads(f["arguments"])) for f in functions]


def check(name: str, arguments: Any) -> None:
    """That a call is one of `TOOLS` and its arguments are of its schema."""
    if name == "weather":
        assert list(arguments) == ["city"]
        assert arguments["city"] in ("上海", 'é"\\')
    else:
        assert name == "route"
        assert arguments in ({"by": {"n": [1, -2]}}, {"by": {"n": None}})


def events(reply: Answer) -> list[dict[str, Any]]:
    assert reply.status == 200, reply.body
    lines = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def server(
    pocket_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("long")
    with serve_model(longer(pocket_gguf("f32")).write(folder / "long.gguf"), folder) as server:
        yield server


@pytest.fixture(scope="module")
def marked(
    pocket_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("marked")
    with serve_model(with_markers(pocket_gguf("f32"), folder), folder) as server:
        yield server


def longer(pocket: Path) -> Gguf:
    """The pocket, of more than its 512 tokens: it takes many to describe a function."""
    file = Gguf.read(pocket)
    file.set("context_length", 4096)
    return file


def with_markers(pocket: Path, folder: Path, template: str | None = None) -> Path:
    """The pocket, to whose vocabulary the markers of a call belong as control tokens."""
    file = longer(pocket)
    _, tokens = file.values["tokenizer.ggml.tokens"][1]
    for old, new in (("<|pad|>", START), ("<|begin_of_text|>", END)):
        tokens[tokens.index(old)] = new
    if template:
        file.values["tokenizer.chat_template"] = (STRING, template)
    return file.write(folder / "marked.gguf")


def test_the_functions_are_described_behind_the_system_prompt(server: Server) -> None:
    told = described(WEATHER, ROUTE)
    asked = turn("user", str(USER["content"])) + OPEN
    assert prompt(server, [USER], tools=TOOLS) == turn("system", f"{SYSTEM}\n{told}") + asked
    own = [{"role": "system", "content": "Be brief."}, USER]
    assert prompt(server, own, tools=TOOLS) == turn("system", f"Be brief.\n{told}") + asked
    for choice in ("required", "auto"):
        again = prompt(server, own, tools=TOOLS, tool_choice=choice)
        assert again == prompt(server, own, tools=TOOLS)
    assert prompt(server, [USER], tools=TOOLS, tool_choice="none") == prompt(server, [USER])
    named = prompt(server, [USER], tools=TOOLS, tool_choice=NAMED)
    assert named == turn("system", f"{SYSTEM}\n{described(ROUTE)}") + asked


def call_of(name: str, arguments: str, identity: str = "a") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


def test_calls_and_results_are_turns_again(server: Server) -> None:
    history: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        USER,
        {
            "role": "assistant",
            "content": "看",
            "tool_calls": [
                call_of("weather", '{"city" :"上海"}'),
                call_of("route", "", "b"),
                call_of("route", "no JSON", "c"),
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "晴"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "5 km"}]},
        {"role": "assistant", "content": None, "tool_calls": [call_of("weather", "{}")]},
        {"role": "tool", "tool_call_id": "a", "content": ""},
    ]
    assert prompt(server, history) == (
        turn("system", "s")
        + turn("user", str(USER["content"]))
        + turn(
            "assistant",
            f'看{START}{{"name": "weather", "arguments": {{"city" :"上海"}}}}{END}'
            f'{START}{{"name": "route", "arguments": {{}}}}{END}'
            f'{START}{{"name": "route", "arguments": "no JSON"}}{END}',
        )
        + turn("observation", "晴")
        + turn("observation", "5 km")
        + turn("assistant", f'{START}{{"name": "weather", "arguments": {{}}}}{END}')
        + turn("observation", "")
        + OPEN
    )


@pytest.mark.parametrize("program", ["server", "marked"])
@pytest.mark.parametrize("demanded", ["required", NAMED])
def test_a_demanded_call_is_made(
    program: str, demanded: Any, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(program)
    answer = choice(server, tool_choice=demanded)
    assert answer["finish_reason"] == "tool_calls"
    assert not answer["message"]["content"]
    [(name, arguments)] = calls(answer["message"])
    check(name, arguments)
    assert demanded == "required" or name == "route"
    assert answer["message"]["tool_calls"][0]["id"]


@pytest.mark.parametrize("program", ["server", "marked"])
def test_streamed_arguments_add_up(program: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(program)
    whole = calls(choice(server, tool_choice=NAMED)["message"])
    chunks = events(ask(server, tool_choice=NAMED, stream=True))
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    made = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert {call["index"] for call in made} == {0}
    assert [c["function"]["name"] for c in made if "name" in c["function"]] == ["route"]
    pieces = [call["function"].get("arguments", "") for call in made]
    assert sum(map(bool, pieces)) > 3
    assert [("route", json.loads("".join(pieces)))] == whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_begun_freely_keeps_to_the_format(marked: Server) -> None:
    begin = {"logit_bias": {BEGIN: 100}}
    answer = choice(marked, **begin)
    assert answer["finish_reason"] == "tool_calls"
    [(name, arguments)] = calls(answer["message"])
    check(name, arguments)
    # several only where the client asks for them
    endless = {"logit_bias": {BEGIN: 100, TURN_END: -100}, "parallel_tool_calls": True}
    several = choice(marked, **endless, max_tokens=600)["message"]["tool_calls"]
    assert len(several) > 1
    assert len({call["id"] for call in several}) == len(several)
    for call in several[:-1]:  # the last one is cut off
        check(call["function"]["name"], json.loads(call["function"]["arguments"]))


def test_a_call_that_is_cut_off(marked: Server) -> None:
    for count in range(1, 24):
        for stream in (False, True):
            reply = ask(marked, logit_bias={BEGIN: 100}, max_tokens=count, stream=stream)
            assert reply.status == 200, (count, stream, reply.body)
            assert b'"error"' not in reply.body, (count, stream, reply.body)
            if not stream:
                assert reply.json()["choices"][0]["finish_reason"] == "length"


def test_without_a_call_an_answer_is_text(server: Server) -> None:
    for more in ({}, {"tool_choice": "none"}):
        answer = choice(server, **more, max_tokens=20)
        assert not answer["message"].get("tool_calls")
        assert answer["message"]["content"]
    plain = {"messages": [USER], "temperature": 0, "max_tokens": 20}
    none = choice(server, tool_choice="none", max_tokens=20)
    reply = server.post("/v1/chat/completions", plain).json()
    assert reply["choices"][0]["message"]["content"] == none["message"]["content"]


def test_a_schema_for_the_answer_beside_tools(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    message = choice(server, response_format=form)["message"]
    if message.get("tool_calls"):
        check(*calls(message)[0])
    else:
        assert json.loads(message["content"])["n"] in (1, 2)
    none = choice(server, response_format=form, tool_choice="none")["message"]
    assert json.loads(none["content"])["n"] in (1, 2)


def test_other_apis_call_too(server: Server) -> None:
    tool = {"name": "weather", "description": "", "input_schema": WEATHER["parameters"]}
    body = {"messages": [USER], "max_tokens": 500, "tools": [tool, {**tool, "name": "other"}]}
    body["tool_choice"] = {"type": "tool", "name": "weather"}
    reply = server.post("/v1/messages", body)
    assert reply.status == 200, reply.body
    [made] = reply.json()["content"]
    assert made["type"] == "tool_use"
    check(made["name"], made["input"])

    function = {"type": "function", **WEATHER}
    reply = server.post(
        "/v1/responses",
        {
            "input": USER["content"],
            "tools": [function, {**function, "name": "other"}],
            "tool_choice": {"type": "function", "name": "weather"},
            "max_output_tokens": 500,
        },
    )
    assert reply.status == 200, reply.body
    [item] = reply.json()["output"]
    assert item["type"] == "function_call"
    check(item["name"], json.loads(item["arguments"]))


def test_a_template_that_knows_tools_is_left_alone(
    pocket_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """Then llama.cpp's automatic parser reads the format: it takes text before a demanded call,
    and calls behind the first."""
    with serve_model(with_markers(pocket_gguf("f32"), tmp_path, OWN), tmp_path) as server:
        told = prompt(server, [USER], tools=TOOLS)
        assert told.startswith("<|role_start|>system<|role_end|>Tools: [")
        for demanded in ("auto", "required", NAMED):
            answer = choice(server, tool_choice=demanded, logit_bias={BEGIN: 100})
            made = answer["message"]["tool_calls"][0]["function"]
            check(made["name"], json.loads(made["arguments"]))
        history: list[dict[str, Any]] = [
            USER,
            {"role": "assistant", "tool_calls": [call_of("weather", '{"city": "a"}')]},
        ]
        assert f'{START}{{"name": "weather", "arguments": {{"city": "a"}}}}{END}' in prompt(
            server, [*history, {"role": "tool", "tool_call_id": "a", "content": "b"}]
        )
