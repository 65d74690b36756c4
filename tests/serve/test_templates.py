"""Chat templates that fail, and what a request may say about how its conversation is rendered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.gguf_edit import STRING, Gguf
from support.server import Answer, Server, serve_model

USER = {"role": "user", "content": "世界上最高的山峰是哪座？"}
BODY = {"messages": [USER], "max_tokens": 4, "temperature": 0}
CHATS = ("/v1/chat/completions", "/v1/messages", "/apply-template")


def edited(pocket: Path, template: str, to: Path) -> Path:
    file = Gguf.read(pocket)
    file.values["tokenizer.chat_template"] = (STRING, template)
    return file.write(to)


def refused(reply: Answer, said: str) -> None:
    assert reply.status == 400, reply.body
    assert said in reply.error


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages %}{{ message.content }}", "chat template of this model"),
        ("{{ messages[ }}", "chat template of this model"),
        ("{{ 'x' | nothing_of_the_kind }}", "nothing_of_the_kind"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages + 1 }}", ""),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "chat template of this model"),
        ("{{ " + "not " * 100_000 + "1 }}", "chat template of this model"),
        ("{% if 1 %}" * 100_000 + "{% endif %}" * 100_000, "chat template of this model"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "levels deep"),
    ],
    ids=["open", "syntax", "filter", "raises", "types", "deep", "nots", "ifs", "macro"],
)
def test_a_template_that_fails(
    pocket_gguf: Callable[..., Path], tmp_path: Path, template: str, said: str
) -> None:
    """Text completions work, and chat is refused with the template's error."""
    model = edited(pocket_gguf("f32"), template, tmp_path / "broken.gguf")
    with serve_model(model, tmp_path) as server:
        reply = server.post("/v1/completions", {"prompt": "山", "max_tokens": 2})
        assert reply.status == 200, reply.body
        for path in CHATS:
            refused(server.post(path, BODY), said)
        assert server.get("/props").status == 200


def test_a_template_that_refuses_a_long_conversation(
    pocket_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """Such as the example that llama.cpp renders when it starts."""
    template = (
        "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    model = edited(pocket_gguf("f32"), template, tmp_path / "strict.gguf")
    with serve_model(model, tmp_path) as server:
        assert server.post(CHATS[0], BODY).status == 200
        answer = {"role": "assistant", "content": "a"}
        refused(server.post(CHATS[0], BODY | {"messages": [USER, answer, USER]}), "too long")


def prompt(server: Server, messages: list[dict[str, Any]], **more: Any) -> str:
    reply = server.post("/apply-template", {"messages": messages, **more})
    assert reply.status == 200, reply.body
    return str(reply.json()["prompt"])


def test_an_answer_that_has_begun_goes_on(server: Server) -> None:
    begun = {"role": "assistant", "content": "珠穆"}
    closed = prompt(server, [USER], add_generation_prompt=False)
    opened = prompt(server, [USER])
    assert closed.endswith("<|turn_end|>")
    assert opened == closed + "<|role_start|>assistant<|role_end|>"
    assert prompt(server, [USER, begun]) == opened + "珠穆"
    reply = server.post("/v1/chat/completions", BODY | {"messages": [USER, begun]})
    text = reply.json()["choices"][0]["message"]["content"]
    raw = {"prompt": opened + "珠穆", "max_tokens": 4, "temperature": 0}
    assert text == server.post("/v1/completions", raw).json()["choices"][0]["text"]
    refused(server.post("/apply-template", BODY | {"messages": [USER, begun, begun]}), "2 or more")


def test_a_request_brings_no_template(server: Server) -> None:
    for path in (CHATS[0], "/apply-template"):
        refused(server.post(path, BODY | {"chat_template": "{{ 1 }}"}), "chat_template")
    same = prompt(server, [USER], chat_template_kwargs={"chat_template": "{{ 1 }}"})
    assert same == prompt(server, [USER])


def test_variables_of_a_template(pocket_gguf: Callable[..., Path], tmp_path: Path) -> None:
    template = "{{ mood }}<|turn_end|>{{ messages[0].content }}"
    model = edited(pocket_gguf("f32"), template, tmp_path / "variables.gguf")
    with serve_model(model, tmp_path) as server:
        more = {"chat_template_kwargs": {"mood": "happy"}}
        assert prompt(server, [USER], **more) == f"happy<|turn_end|>{USER['content']}"
        assert server.post(CHATS[0], BODY | more).status == 200
        refused(
            server.post(CHATS[0], BODY | {"chat_template_kwargs": {"enable_thinking": "x"}}), ""
        )
