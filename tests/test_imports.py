"""The direction of imports: a package or a room reaches down, never up, and only what is listed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top down: each may import those below it.
PACKAGES = {
    "megrez_cli": ROOT / "bindings" / "megrez_cli",
    "megrez_eval": ROOT / "bindings" / "megrez_eval",
    "megrez_parity": ROOT / "bindings" / "megrez_parity",
    "megrez_runtime": ROOT / "bindings" / "megrez_runtime",
    "megrez_engines": ROOT / "bindings" / "megrez_engines",
    "megrez_gguf": ROOT / "convert" / "megrez_gguf",
    "megrez_llama": ROOT / "bindings" / "megrez_llama",
}
# The rooms of megrez_gguf, from the top down. What lies in none of them is ground for all.
ROOMS = ("examination", "conversion", "quantization", "checkpoint", "format", "storage")
# What comes with an extra, and the packages that may not do with it.
EXTRAS = {
    "torch": {"megrez_cli", "megrez_runtime", "megrez_gguf", "megrez_llama"},
    "safetensors": {"megrez_cli", "megrez_runtime", "megrez_gguf", "megrez_llama"},
    "llama_cpp": {"megrez_cli", "megrez_engines", "megrez_gguf"},
    "transformers": {*PACKAGES} - {"megrez_engines"},
    "vllm": {*PACKAGES} - {"megrez_engines"},
    "sglang": {*PACKAGES} - {"megrez_engines"},
    "lm_eval": {*PACKAGES} - {"megrez_eval"},
}
MODULES = [
    (package, path) for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))
]


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(module imported, whether that happens when the importing module is loaded)."""
    inner = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # `from package import room` names a room as `from package.room import x` does.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) not in inner


def is_above(name: str, other: str, order: tuple[str, ...]) -> bool:
    return name in order and other in order and order.index(name) < order.index(other)


def offences(package: str, module: str, source: str) -> list[str]:
    """Imports that reach up, in `module`, a path within `package`."""
    if module == "__main__.py":  # a program, which stands above all libraries
        return []
    found = []
    room = module.partition("/")[0]
    for name, at_load in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if is_above(top, package, tuple(PACKAGES)) or package in EXTRAS.get(top, ()):
            found.append(f"{package}/{module} imports {name}")
        elif package == top == "megrez_gguf" and target in ROOMS:
            in_room = room in ROOMS
            if is_above(target, room, ROOMS) or (not in_room and at_load and not _is_face(module)):
                found.append(f"{package}/{module} imports {name}")
    return found


def _is_face(module: str) -> bool:
    """The package's own door, which names for type checkers what it loads on first use."""
    return module == "__init__.py"


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda v: getattr(v, "name", v))
def test_import_direction(package: str, path: Path) -> None:
    module = path.relative_to(PACKAGES[package]).as_posix()
    assert offences(package, module, path.read_text(encoding="utf-8")) == []


def test_every_package_and_room_was_looked_at() -> None:
    assert {package for package, _ in MODULES} == PACKAGES.keys()
    rooms = {path.parent.name for package, path in MODULES if package == "megrez_gguf"}
    assert rooms == {*ROOMS, "megrez_gguf"}


def test_the_check_can_fail() -> None:
    inside = "def command():\n    from megrez_parity import harness\n"
    assert offences("megrez_cli", "parity.py", inside) == []
    assert offences("megrez_gguf", "conversion/layout.py", inside) != []
    assert offences("megrez_runtime", "x.py", "import megrez_cli.app") != []
    assert offences("megrez_gguf", "x.py", "def f():\n    import torch") != []
    assert offences("megrez_gguf", "x.py", "from megrez_cli import main") != []
    assert offences("megrez_gguf", "__main__.py", "from megrez_cli import main") == []
    assert offences("megrez_runtime", "x.py", "from megrez_parity import x") != []
    assert offences("megrez_llama", "x.py", "from megrez_gguf.errors import ConfigError") != []
    assert offences("megrez_parity", "x.py", "import torch, megrez_runtime") == []


def test_the_check_of_rooms_can_fail() -> None:
    reader = "from megrez_gguf.format.reader import GGUFFile"
    assert offences("megrez_gguf", "conversion/x.py", reader) == []
    assert offences("megrez_gguf", "storage/x.py", reader) != []
    assert offences("megrez_gguf", "storage/x.py", "from megrez_gguf import format") != []
    assert offences("megrez_gguf", "machine.py", reader) != []
