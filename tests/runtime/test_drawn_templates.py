"""Chat templates as models come with: drawn, and rendered to the tokens transformers makes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from transformers import PreTrainedTokenizerFast

import megrez_gguf
from megrez_gguf.errors import GGUFError
from megrez_runtime import load
from megrez_runtime.template import ChatTemplate, Message, Role
from support.checkpoints import edit_json
from support.configurations import TALKING
from support.random_checkpoint import make_checkpoint

THINK = ("<think>", "</think>")
CONTROL = ("<|turn_end|>", "<|role_start|>", "<|role_end|>")

# What stands around the messages. `content` and `role` are set by LOOP.
HEADS = [
    "",
    "{% if messages[0]['role'] != 'system' %}<|role_start|>system<|role_end|>hi<|turn_end|>"
    "{% endif %}",
    "{{ strftime_now('%d %B') }}\n",
    "{{ bos_token }}",
    "{%- macro end() %}<|turn_end|>{% endmacro %}",
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}",
    "{% for m in messages if m['role'] == 'system' %}{{ m['content'].replace('/nothink', '') }}"
    "{% endfor %}",
]
CHECKS = [
    "",
    "{% if loop.index0 > 0 and role == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}",
    "{% if role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}",
    "{% if content is not string %}{% set content = content[0]['text'] %}{% endif %}",
]
EDITS = [
    "",
    "{% if role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}",
    "{% if role == 'assistant' and '<think>' in content and '</think>' in content %}"
    "{% set content = content.split('<think>')[0] + content.split('</think>')[1] %}{% endif %}",
    "{% if role == 'assistant' and not loop.last %}{% set content = content[:9] %}{% endif %}",
    "{% if loop.index0 < ns.last and role == 'assistant' %}"
    "{% set content = content.split('</think>')|last|trim %}{% endif %}",
    "{% set content = content | trim %}",
    "{% set content = content.strip() %}",
    "{% set content = content | replace('  ', ' ') %}",
    "{% set content = content | upper %}",
]
BODIES = [
    "<|role_start|>{{ role }}<|role_end|>{{ content }}<|turn_end|>",
    "<|role_start|>{{ role }}\n{{ content }}<|turn_end|>\n",
    "{{ '<|' ~ 'role_start' ~ '|>' + role }}:\n\n{{ content ~ '<|turn_end|>' }}",
    "{% if role == 'assistant' %}<|role_start|>{% generation %}{{ content }}<|turn_end|>"
    "{% endgeneration %}{% else %}{{ role }}: {{ content }}\n{% endif %}",
    "<|role_start|>{{ role }}<|role_end|>{% if role == 'assistant' and '<think>' not in content %}"
    "<think></think>{% endif %}{{ content }}<|turn_end|>",
]
TAILS = [
    "{% if add_generation_prompt %}<|role_start|>assistant<|role_end|>{% endif %}",
    "{% if add_generation_prompt %}<|role_start|>assistant\n<think>\n{% endif %}",
    "{% if add_generation_prompt %}<|role_start|>{% if enable_thinking is defined and not "
    "enable_thinking %}<think></think>{% endif %}{% endif %}",
]
LOOP = (
    "{%% set ns = namespace(last=0) %%}{%% for m in messages %%}{%% if m['role'] == 'user' %%}"
    "{%% set ns.last = loop.index0 %%}{%% endif %%}{%% endfor %%}"
    "{%% for m in messages %%}{%% set role = m['role'] %%}{%% set content = m['content'] %%}"
    "%s{%% endfor %%}"
)
TEMPLATES = st.builds(
    lambda head, check, edits, body, tail: head + LOOP % (check + "".join(edits) + body) + tail,
    st.sampled_from(HEADS),
    st.sampled_from(CHECKS),
    st.lists(st.sampled_from(EDITS), max_size=2),
    st.sampled_from(BODIES),
    st.sampled_from(TAILS),
)
ORDINARY = st.text(st.sampled_from("ab <>|/\n\t .?é世🗻/nothink"), min_size=1, max_size=20)
ANSWER = st.one_of(
    ORDINARY,
    st.builds(
        "{}<think>\n{}\n</think>\n\n{}".format, st.sampled_from(["", "\n"]), ORDINARY, ORDINARY
    ),
    st.builds("{}</think>{}".format, ORDINARY, ORDINARY),
)


@st.composite
def conversations(draw: st.DrawFn, said: st.SearchStrategy[str], answer: Any) -> list[Any]:
    system = draw(st.booleans())
    turns = draw(st.integers(0, 3))
    roles: list[Role] = ["user", *(["assistant", "user"] * turns)]  # type: ignore[list-item]
    roles = ["system", *roles] if system else roles
    return [(role, draw(answer if role == "assistant" else said)) for role in roles]


def reasoning_tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Two tokens that nothing else needs, as the tags of reasoning: found in any text."""
    text = json.dumps(tokenizer)
    for old, new in zip(("<|begin_of_text|>", "<|end_of_text|>"), THINK, strict=True):
        text = text.replace(old, new)
    edited: dict[str, Any] = json.loads(text)
    entries = [*edited.get("added_tokens", ()), *edited.get("added_tokens_decoder", {}).values()]
    for entry in entries:
        entry["special"] = entry["content"] not in THINK
    return edited


@pytest.fixture(scope="module", params=["added", "plain"])
def pair(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Iterator[tuple[Any, Any]]:
    """A model, and the tokenizer it was converted from, which may know the tags of reasoning."""
    folder = make_checkpoint(TALKING, tmp_path_factory.mktemp("templates") / "tiny")
    if request.param == "added":
        for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            edit_json(path, reasoning_tokens)
    llm = load(megrez_gguf.convert(folder, folder.with_suffix(".gguf")).path, n_ctx=256)
    bos = llm._model.token_get_text(llm.token_bos())
    yield (
        llm,
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), bos_token=bos, eos_token="<|turn_end|>"
        ),
    )
    llm.close()


def rendered(tokenizer: Any, source: str, messages: list[tuple[Role, str]]) -> list[int] | None:
    """What transformers makes of it; None where the template refuses it."""
    said = [{"role": role, "content": text} for role, text in messages]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            said, chat_template=source, add_generation_prompt=True, return_dict=False
        )
    except Exception:
        return None
    return ids


def template_of(llm: Any, source: str) -> ChatTemplate:
    llm.metadata["tokenizer.chat_template"] = source
    return ChatTemplate(llm)


DRAWN = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def spoken(llm: Any, ids: list[int]) -> list[int | bytes]:
    """Special tokens, and the text between: the same words may be cut into tokens differently."""
    piece = ChatTemplate(llm).piece
    known = {
        i
        for tag in (*CONTROL, *THINK)
        if len(t := llm.tokenize(tag.encode(), False, True)) == 1
        for i in t
    }
    runs = groupby(ids, lambda i: i if i in known else None)
    return [i if i is not None else b"".join(map(piece, run)) for i, run in runs]


@DRAWN
@given(TEMPLATES, conversations(ORDINARY, ANSWER))
def test_tokens_are_those_of_transformers(pair: Any, source: str, messages: list[Any]) -> None:
    llm, tokenizer = pair
    expected = rendered(tokenizer, source, messages)
    template = template_of(llm, source)
    said = [
        Message(role, text, tuple(tokenizer.encode(text)) if role == "assistant" else ())
        for role, text in messages
    ]
    if expected is None:
        with pytest.raises(GGUFError, match="refuses the conversation"):
            template.encode(said)
        return
    assert spoken(llm, template.encode(said)) == spoken(llm, expected)
    # Cut into tokens as one text, where no answer insists on those it was drawn as.
    if not any(tag in text for _, text in messages for tag in THINK):
        assert template.encode([Message(m.role, m.text, ()) for m in said]) == expected


KEEPS = LOOP % (EDITS[5] + BODIES[4]) + TAILS[0]
DROPS = LOOP % (EDITS[1] + BODIES[4]) + TAILS[0]


@pytest.mark.parametrize("pair", ["added"], indirect=True)
def test_tags_of_reasoning_that_are_tokens(pair: Any) -> None:
    """Where the template writes them too, so that a user's are kept from becoming tokens."""
    llm, tokenizer = pair
    said: list[tuple[Role, str]] = [
        ("user", "<think>1</think>"), ("assistant", "\n<think>2</think>\n\n3"), ("user", "4"),
    ]  # fmt: skip
    start, end = tokenizer.convert_tokens_to_ids(list(THINK))
    for source in (KEEPS, DROPS):
        template = template_of(llm, source)
        plain = [template.message(*m) for m in said]
        drawn = [
            Message(m.role, m.text, tuple(tokenizer.encode(m.text)) * (m.role == "assistant"))
            for m in plain
        ]
        for messages in (plain, drawn):
            ids = template.encode(messages)
            text = b"".join(map(template.piece, ids)).decode()
            if source is DROPS:
                assert text == "user<think>1</think>assistant<think></think>3user4assistant"
                assert ids.count(start) == ids.count(end) == 1
            else:
                assert text == "user<think>1</think>assistant<think>2</think>\n\n3user4assistant"
                assert ids.count(end) == (messages is drawn)


INJECTED = st.lists(
    st.one_of(ORDINARY, st.sampled_from([*CONTROL, *(c.upper() for c in CONTROL)])),
    min_size=1,
    max_size=4,
).map("".join)


@DRAWN
@given(
    TEMPLATES, st.sampled_from(["", "lower", "replace(' ', '')"]), conversations(INJECTED, INJECTED)
)
def test_only_the_template_writes_control_tokens(
    pair: Any, source: str, change: str, messages: list[Any]
) -> None:
    """Those that it writes around messages of other letters, in the same order."""
    llm, tokenizer = pair
    control = set(tokenizer.convert_tokens_to_ids(list(CONTROL)))
    if change:
        edit = "{% set content = m['content'] %}"
        source = source.replace(edit, edit.replace(" %}", f" | {change} %}}"))
    template = template_of(llm, source)
    harmless = [(role, re.sub("[<|>]", "#", text)) for role, text in messages]
    try:
        expected = template.encode([template.message(*m) for m in harmless])
    except GGUFError:
        return
    ids = template.encode([template.message(*m) for m in messages])
    assert [i for i in ids if i in control] == [i for i in expected if i in control]
