"""Loading: what is refused, in which words, and what stays off the terminal."""

from __future__ import annotations

import gc
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from jinja2 import TemplateError
from llama_cpp import Llama

import megrez_llama.patched
from megrez_gguf.errors import GGUFError, MegrezError, RuntimeUnavailableError
from megrez_gguf.machine import available_cpus
from megrez_llama.logs import log
from megrez_runtime import Session, load
from megrez_runtime.errors import ContextError
from support.checkpoints import Make, set_json
from support.commands import chat


def test_loads_an_ordinary_llama_with_this_machines_cpus(model: Path) -> None:
    import llama_cpp

    llm = load(model, n_ctx=100)
    assert isinstance(llm, llama_cpp.Llama)
    assert llm.n_ctx() == 256
    assert len(llm.input_ids) == 256
    assert llm.n_threads == llm.n_threads_batch == available_cpus() >= 1
    llm.close()
    assert load(model, n_threads=1).n_threads == 1


def test_the_context_is_the_models_own_up_to_8192(model: Path, tmp_path: Path) -> None:
    assert load(model).n_ctx() == 2048
    longer = tmp_path / "longer.gguf"
    shutil.copy(model, longer)
    reader = GGUFReader(longer, "r+")
    reader.fields["megrez-moe.context_length"].parts[-1][0] = 1 << 20
    reader.data.flush()
    assert load(longer).n_ctx() == 8192


def test_what_is_no_megrez2_file_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"absent\.gguf: cannot be read: No such file"):
        load(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"nothing known" + bytes(100))
    with pytest.raises(GGUFError, match=r"other\.gguf: does not start with GGUF"):
        load(other)
    other.write_bytes(model.read_bytes()[:37])
    with pytest.raises(GGUFError, match=r"other\.gguf: .*damaged"):
        load(other)
    writer = GGUFWriter(other, "llama")
    writer.add_tensor("t", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"'llama', not 'megrez-moe': not a Megrez2 model"):
        load(other)


def damage(model: Path, out: Path) -> Path:
    """A file that is well-formed, and that llama.cpp refuses: no expert would be chosen."""
    shutil.copy(model, out)
    reader = GGUFReader(out, "r+")
    reader.fields["megrez-moe.expert_used_count"].parts[-1][0] = 99
    reader.data.flush()
    return out


def test_llama_cpps_own_reason_is_in_the_error(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = damage(model, tmp_path / "bad.gguf")
    with pytest.raises(GGUFError, match=r"bad\.gguf: llama\.cpp cannot load it: .*expert") as e:
        load(bad)
    assert "\n" not in str(e.value)
    gc.collect()
    assert capfd.readouterr() == ("", "")
    # Later failures have reasons of their own, whatever was logged before.
    for level, text in ((4, b"stale "), (5, b"reason\n")):
        log._receive(level, text, None)
    with pytest.raises(ContextError) as later:
        load(model, type_v=2)
    assert "expert" not in str(later.value)
    assert "stale" not in str(later.value)


def test_the_log_is_silent_unless_asked_for(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(model, n_ctx=4096).close()  # more than it was trained on: llama.cpp warns
    gc.collect()
    assert capfd.readouterr() == ("", "")
    load(model, n_ctx=256, verbose=True).close()
    assert "megrez-moe" in capfd.readouterr().err
    load(model, n_ctx=256).close()
    assert capfd.readouterr() == ("", "")


def test_a_context_that_cannot_be_made_is_refused(model: Path) -> None:
    # A quantized V cache needs flash attention; running out of memory goes the same way.
    with pytest.raises(ContextError, match=r"no context of 512 tokens .*V cache .*flash_attn"):
        load(model, n_ctx=512, type_v=2)
    for size in (0, -1, 1 << 31):
        with pytest.raises(ContextError, match=f"context of {size} tokens: expected"):
            load(model, n_ctx=size)


def test_only_chatting_needs_a_template(make: Make) -> None:
    broken = make(
        lambda f: set_json(f / "tokenizer_config.json", chat_template="<|turn_end|>{% for %}")
    )
    llm = load(broken, n_ctx=256)
    assert llm.tokenize(b"a") != []
    with pytest.raises(GGUFError, match=r"its chat template is not valid Jinja: line 1: "):
        Session(llm)
    # Nor does Llama's own chatting go on with another format.
    with pytest.raises(TemplateError):
        llm.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=1)


def test_llamas_own_chatting_uses_the_files_template(make: Make) -> None:
    named = [{"name": "default", "template": "a{{ eos_token }}"}, {"name": "b", "template": "b"}]
    llm = load(
        make(lambda f: set_json(f / "tokenizer_config.json", chat_template=named)), n_ctx=256
    )
    assert type(llm) is Llama
    assert llm.metadata["tokenizer.chat_template.b"] == "b"
    llm.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=1)
    assert llm.input_ids[:2].tolist() == llm.tokenize(b"a<|turn_end|>", False, True)
    llm.chat_format = "chat_template.b"
    llm.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=1)
    assert llm.input_ids[:1].tolist() == llm.tokenize(b"b", False)


def test_an_option_llama_does_not_have_is_refused(model: Path) -> None:
    with pytest.raises(TypeError, match="n_cxt"):
        load(model, n_cxt=512)


def test_a_stock_llama_cpp_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megrez_llama.patched, "MARKER", "absent.json")
    with pytest.raises(RuntimeUnavailableError, match="pip install"):
        load(model)


def test_the_command_says_it_in_one_line_and_exits_2(model: Path, tmp_path: Path) -> None:
    bad = damage(model, tmp_path / "bad.gguf")
    for path, reason in ((bad, b"expert"), (tmp_path / "absent.gguf", b"No such file")):
        done = chat(path, "-p", "x")
        assert done.returncode == MegrezError.exit_code == 2
        assert done.stdout == b""
        assert re.fullmatch(rb"error: [^\n]*%s[^\n]*\n" % reason, done.stderr)
