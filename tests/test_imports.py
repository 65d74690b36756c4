"""The direction of imports: megrez_parity -> megrez_runtime -> megrez_gguf, never back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "megrez_gguf": ROOT / "convert" / "megrez_gguf",
    "megrez_runtime": ROOT / "bindings" / "megrez_runtime",
    "megrez_parity": ROOT / "bindings" / "megrez_parity",
}
# What each may never import; the compiled libraries belong to the outer packages.
FORBIDDEN = {
    "megrez_gguf": {"megrez_runtime", "megrez_parity", "torch", "llama_cpp", "safetensors"},
    "megrez_runtime": {"megrez_parity", "torch"},
    "megrez_parity": set[str](),
}
MODULES = [
    (package, path) for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))
]


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(top-level name imported, whether that happens when the module is loaded)."""
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
            names = [node.module or ""]
        for name in names:
            yield name.partition(".")[0], id(node) not in inner


def offences(package: str, module: str, source: str) -> list[str]:
    composition_root = (package, module) == ("megrez_gguf", "cli.py")
    return [
        f"{package}/{module} imports {name}"
        for name, at_load in imports(ast.parse(source))
        if name in FORBIDDEN[package]
        and not (composition_root and not at_load and name.startswith("megrez_"))
    ]


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda v: getattr(v, "name", v))
def test_import_direction(package: str, path: Path) -> None:
    assert offences(package, path.name, path.read_text(encoding="utf-8")) == []


def test_every_package_was_looked_at() -> None:
    assert {package for package, _ in MODULES} == PACKAGES.keys()


def test_the_check_can_fail() -> None:
    inside = "def command():\n    from megrez_parity import harness\n"
    assert offences("megrez_gguf", "cli.py", inside) == []
    assert offences("megrez_gguf", "layout.py", inside) != []
    assert offences("megrez_gguf", "cli.py", "import megrez_parity.harness") != []
    assert offences("megrez_gguf", "cli.py", "def f():\n    import torch") != []
    assert offences("megrez_runtime", "x.py", "from megrez_parity import x") != []
    assert offences("megrez_parity", "x.py", "import torch, megrez_runtime") == []
