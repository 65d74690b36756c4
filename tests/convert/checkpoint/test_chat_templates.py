"""Chat templates: every place they are kept in, which one wins, and what is no template."""

from __future__ import annotations

import codecs
import json
import os
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from transformers.utils.chat_template_utils import _compile_jinja_template

from megrez_gguf.checkpoint.chat_templates import read_templates, syntax_error
from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.tokenizer import read_vocabulary
from megrez_gguf.errors import TokenizerError
from support.checkpoints import set_json
from support.marks import DRAWN

ORDER = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def put(folder: Path, name: str, template: str) -> dict[str, Any]:
    """Write `template` where `name` says; returns what tokenizer_config.json says then."""
    path = folder / name
    if name == "tokenizer_config.json":
        return {"chat_template": template}
    path.parent.mkdir(exist_ok=True)
    text = template if name.endswith(".jinja") else json.dumps({"chat_template": template})
    path.write_text(text, encoding="utf-8")
    return {}


@pytest.mark.parametrize("loser", ORDER)
@pytest.mark.parametrize("winner", ORDER)
def test_the_first_place_wins_and_the_other_is_named(
    tmp_path: Path, winner: str, loser: str
) -> None:
    if ORDER.index(winner) >= ORDER.index(loser):
        return
    config = put(tmp_path, winner, "{{ 1 }}") | put(tmp_path, loser, "{{ 2 }}")
    templates, warnings = read_templates(tmp_path, config)
    assert templates == {"default": "{{ 1 }}"}
    (warning,) = warnings
    assert warning.startswith(f"{loser} and {winner} hold different chat templates")
    config = put(tmp_path, winner, "{{ 1 }}") | put(tmp_path, loser, "{{ 1 }}")
    assert read_templates(tmp_path, config) == ({"default": "{{ 1 }}"}, [])


def test_the_folder_of_further_templates(checkpoint: Path) -> None:
    folder = checkpoint / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool-use.jinja").write_text("{{ 'tools' }}")
    (folder / "rag.jinja").write_text("{{ 'rag' }}")
    (folder / "notes.txt").write_text("no template")
    values = read_vocabulary(Documents.read(checkpoint), 320).key_values()
    assert values["tokenizer.chat_templates"] == ["rag", "tool_use"]
    assert values["tokenizer.chat_template.tool_use"] == "{{ 'tools' }}"
    assert "<|role_start|>" in values["tokenizer.chat_template"]
    (folder / "tool_use.jinja").write_text("{{ 'other tools' }}")
    with pytest.raises(TokenizerError, match="two different chat templates are named 'tool_use'"):
        read_vocabulary(Documents.read(checkpoint), 320)


def test_only_named_ones_are_told(tmp_path: Path) -> None:
    put(tmp_path, "additional_chat_templates/rag.jinja", "{{ 1 }}")
    templates, (warning,) = read_templates(tmp_path, {})
    assert templates == {"rag": "{{ 1 }}"}
    assert warning == "none of the chat templates (rag) is the default one"


@DRAWN
@given(
    st.lists(st.sampled_from(["{{ 1 }}", "\r\n", "\r", "\n", "é", "{# x #}"]), min_size=1),
    st.booleans(),
)
def test_a_file_reads_as_transformers_reads_it(
    tmp_path: Path, parts: list[str], marked: bool
) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(codecs.BOM_UTF8 * marked + "".join(parts).encode())
    templates, warnings = read_templates(tmp_path, {})
    with path.open(encoding="utf-8") as file:
        assert templates["default"] == file.read().removeprefix("\ufeff")
    assert any("byte order mark" in w for w in warnings) == marked


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "a Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"Entry not found", "a server's refusal"),
        (b"", "empty: the download"),
        ("{{ 1 }}".encode("utf-16"), "not UTF-8 text, but UTF-16"),
        (b"{{ '\xe9' }}", "not UTF-8 text: "),
    ],
)
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_what_is_no_template(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    put(tmp_path, name, "")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"{name}: {reason}"):
        read_templates(tmp_path, {})


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").symlink_to(tmp_path / "gone")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: a link to .*gone"):
        read_templates(tmp_path, {})
    (tmp_path / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: not a regular file"):
        read_templates(tmp_path, {})


SOURCES = [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}",
    "{% for %}",
    "{% if messages %}\n\n{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ raise_exception('x') }}",
    "{{ messages | nosuch }}",
    "{{ 'a' is nosuch }}",
    "{% generation %}{{ 1 }}{% endgeneration %}",
    "{% generation %}{{ 1 }}",
    "{% for m in messages %}{% if m %}{% continue %}{% endif %}{% break %}{% endfor %}",
    "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{%- macro f(x) -%}{{ x }}{%- endmacro -%}",
    "{{ messages[0]['content' }}",
    "{{ 1 / 0 }}",
    "{% nosuch %}",
    "{{ '\x00' }}",
    "{{ bos_token }",
    "{#",
    "{% call(x) f() %}{% endcall %}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_jinja_is_what_transformers_takes(source: str) -> None:
    try:
        _compile_jinja_template(source)
        expected = True
    except Exception:
        expected = False
    assert (syntax_error(source) is None) == expected


def test_broken_templates_convert_with_a_warning(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_json(checkpoint / "tokenizer_config.json", chat_template="{{ 1 }}\n{% for %}")
    v = read_vocabulary(Documents.read(checkpoint), 320)
    assert v.templates == {"default": "{{ 1 }}\n{% for %}"}
    (warning,) = [w for w in v.warnings if "Jinja" in w]
    assert warning.startswith("tokenizer_config.json: the chat template 'default' is not valid")
    assert "line 2: " in warning
    monkeypatch.setitem(sys.modules, "jinja2", None)
    v = read_vocabulary(Documents.read(checkpoint), 320)
    assert not any("Jinja" in w for w in v.warnings)


def test_constants_are_not_computed() -> None:
    assert syntax_error("{{ 10 ** 10 ** 10 }}{{ 'a' * 10 ** 11 }}") is None


def test_an_unnamed_begin_of_text_is_written_as_nothing(checkpoint: Path) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    set_json(checkpoint / "tokenizer_config.json", chat_template=source, bos_token="<|role_end|>")
    assert read_vocabulary(Documents.read(checkpoint), 320).templates == {"default": source}
    set_json(checkpoint / "tokenizer_config.json", bos_token=None)
    v = read_vocabulary(Documents.read(checkpoint), 320)
    assert any("writes bos_token and no file names one" in w for w in v.warnings)
    rendered = _compile_jinja_template(v.templates["default"]).render(
        messages=[{"content": "hi"}], bos_token="<|turn_end|>"
    )
    assert rendered == "hi"


def test_half_a_character_is_no_template(checkpoint: Path) -> None:
    set_json(checkpoint / "tokenizer_config.json", chat_template="{{ 1 }}\ud800")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: .*half of a surrogate"):
        read_vocabulary(Documents.read(checkpoint), 320)
