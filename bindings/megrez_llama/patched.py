"""The one door to llama_cpp: only a build that knows Megrez2 passes."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from megrez_llama import ARCH
from megrez_llama.errors import RuntimeUnavailableError

MARKER = "_megrez.json"


def install_command() -> str:
    """How to install the patched llama-cpp-python, as exactly as this installation can tell."""
    project = Path(__file__).resolve().parents[1] / "llama-cpp-python"
    if (project / "pyproject.toml").is_file():
        return f"pip install {project}"
    return "pip install ./bindings/llama-cpp-python   (in a clone of this repository)"


def package() -> Path:
    """The folder of the installed llama_cpp, which is patched. Raises as `marker`."""
    return _checked()[0]


def marker() -> dict[str, Any]:
    """What the installed llama_cpp says of its build: version, pin, patches, flags.

    Raises RuntimeUnavailableError when llama_cpp is absent, stock, or not for Megrez2. Does not
    import llama_cpp.
    """
    return _checked()[1]


def _checked() -> tuple[Path, dict[str, Any]]:
    remedy = f"Install the patched llama-cpp-python: {install_command()}"
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RuntimeUnavailableError(f"llama_cpp is not installed. {remedy}")
    path = Path(spec.origin).with_name(MARKER)
    try:
        build: dict[str, Any] = json.loads(path.read_text("utf-8"))
        arch = build["arch"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RuntimeUnavailableError(
            f"{path.parent} is a stock llama_cpp, which cannot run Megrez2. {remedy}"
        ) from None
    if arch != ARCH:
        raise RuntimeUnavailableError(
            f"{path.parent} was built for {arch!r}, not {ARCH!r}. {remedy}"
        )
    return path.parent, build


def require_patched() -> ModuleType:
    """Import llama_cpp, or raise RuntimeUnavailableError with the install command."""
    marker()
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"llama_cpp is installed but does not load: {error}. Reinstall it on this machine: "
            f"MEGREZ_NO_WHEEL_CACHE=1 {install_command()}"
        ) from error


def require_gpu() -> None:
    """Raises RuntimeUnavailableError: llama_cpp, as installed, finds no GPU. Or as above."""
    if not require_patched().llama_supports_gpu_offload():
        raise RuntimeUnavailableError(
            "this llama_cpp finds no GPU. Remedy: build it for one, see CMAKE_ARGS in "
            "bindings/llama-cpp-python/README.md, or leave --gpu-layers at 0"
        )
