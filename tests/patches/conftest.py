"""A repository with a miniature upstream, made anew for each test."""

import shutil
from pathlib import Path

import pytest

from support.mini import PROJECT, REPO, UPSTREAM, Mini, diff, insert, make_sdist


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mini:
    root = tmp_path / "repo"
    ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(PROJECT, root / "bindings" / "llama-cpp-python", ignore=ignore)
    (root / "scripts" / "development").mkdir(parents=True)
    shutil.copy(REPO / "scripts/development/patches", root / "scripts/development/patches")
    sdist = tmp_path / "index" / "llama_cpp_python-7.8.9.tar.gz"
    sdist.parent.mkdir()
    make_sdist(sdist, UPSTREAM)
    made = Mini(root, sdist)
    overlay = made.patches / "overlay" / "vendor" / "new.cpp"
    overlay.parent.mkdir(parents=True)
    overlay.write_text("new\n")
    made.pin()
    made.patch("0001-one.patch", diff("vendor/one.cpp", insert(5, "A"), insert(20, "B", 1)))
    made.patch("0002-two.patch", diff("vendor/two.cpp", insert(9, "C")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEGREZ_LLAMA_SDIST", str(sdist))
    for name in ("MEGREZ_NO_WHEEL_CACHE", "MEGREZ_NO_SDIST_CACHE", "CMAKE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return made
