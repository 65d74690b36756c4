"""megrez_runtime accepts only the patched llama_cpp."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megrez_gguf.errors import RuntimeUnavailableError
from megrez_llama import patched


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "llama_cpp"
    folder.mkdir()
    (folder / "__init__.py").write_text("answer = 42\n")
    for name in [n for n in sys.modules if n.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    sys.modules.pop("llama_cpp", None)


def test_the_patched_package_is_imported(package: Path) -> None:
    (package / "_megrez.json").write_text(json.dumps({"arch": "megrez-moe"}))
    assert patched.require_patched().answer == 42


@pytest.mark.parametrize("content", [None, "not json", "[]", "{}", '{"arch": "other"}'])
def test_anything_else_is_refused_with_the_install_command(
    package: Path, content: str | None
) -> None:
    if content is not None:
        (package / "_megrez.json").write_text(content)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install \S*bindings/llama-cpp-python"):
        patched.require_patched()
    assert "llama_cpp" not in sys.modules


def test_a_package_that_does_not_load_says_why(package: Path) -> None:
    (package / "_megrez.json").write_text(json.dumps({"arch": "megrez-moe"}))
    (package / "__init__.py").write_text("raise RuntimeError('libllama.so: wrong machine')\n")
    with pytest.raises(RuntimeUnavailableError, match=r"wrong machine.*pip install"):
        patched.require_patched()


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match="not installed"):
        patched.require_patched()
