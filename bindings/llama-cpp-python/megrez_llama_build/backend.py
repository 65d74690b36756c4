"""PEP 517 hooks: make the patched tree, then let scikit-build-core build the wheel from it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import cache, source

Settings = dict[str, Any] | None

# Inherited through the environment, so that the user's CMAKE_ARGS come later and win.
_DEFAULTS = {"LLAMA_BUILD_TESTS": "OFF", "LLAMA_BUILD_TOOLS": "OFF", "LLAMA_BUILD_SERVER": "OFF"}
_DEFAULTS["CMAKE_PROJECT_llama.cpp_INCLUDE"] = Path(__file__).with_name("shorter.cmake").as_posix()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """End with the message alone; a traceback would bury it in the installer's output."""
    try:
        yield
    except source.SourceError as error:
        _say(f"\nerror: {error}\n")
        raise SystemExit(1) from None


@contextmanager
def _inside(folder: Path, env: dict[str, str]) -> Iterator[None]:
    before, saved = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(env)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(saved)


def _environment(root: Path, settings: dict[str, Any]) -> dict[str, str]:
    pin = source.Pin.load()
    defaults = dict(_DEFAULTS, LLAMA_BUILD_COMMIT=pin.local_version, LLAMA_BUILD_NUMBER="0")
    defines = [shlex.quote(f"-D{name}={value}") for name, value in defaults.items()]
    env = {"CMAKE_ARGS": " ".join([*defines, os.environ.get("CMAKE_ARGS", "")]).strip()}
    launchers = [f"CMAKE_{language}_COMPILER_LAUNCHER" for language in ("C", "CXX")]
    chosen = any(
        os.environ.get(n) or cache.cmake_define(n, settings, os.environ) for n in launchers
    )
    if not chosen and (ccache := shutil.which("ccache")):
        env.update(dict.fromkeys(launchers, ccache))
    # Every build has a new temporary folder. So that its name does not defeat ccache, the build
    # goes beside the source: then the paths between the two never change.
    env["SKBUILD_BUILD_DIR"] = os.environ.get("SKBUILD_BUILD_DIR") or str(root.parent / "build")
    env.update(CCACHE_BASEDIR=str(root.parent), CCACHE_NOHASHDIR="1")
    # `pip install -v` shows ninja's [12/65]; with upstream's "verbose", command lines bury it.
    # Upstream installs everything twice; llama_cpp/lib is what is loaded.
    env["SKBUILD_WHEEL_EXCLUDE"] = (
        os.environ.get("SKBUILD_WHEEL_EXCLUDE") or "/bin/;/include/;/lib/"
    )
    env["SKBUILD_CMAKE_VERBOSE"] = os.environ.get("SKBUILD_CMAKE_VERBOSE") or "0"
    return env


@contextmanager
def _tree(settings: dict[str, Any]) -> Iterator[Path]:
    """The patched tree in a temporary folder, entered, with the build's environment."""
    with tempfile.TemporaryDirectory(prefix="megrez-build-") as folder:
        root = Path(folder).resolve() / "source"
        source.tree(root)
        flags = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", ""), "config_settings": settings}
        marker = json.loads((root / source.MARKER).read_text("utf-8")) | {"flags": flags}
        (root / source.MARKER).write_text(json.dumps(marker, indent=1) + "\n", "utf-8")
        with _inside(root, _environment(root, settings)):
            yield root


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    from scikit_build_core.build import get_requires_for_build_wheel as upstream

    return list(upstream(config_settings))  # cmake and ninja, where the system has none


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    settings = config_settings or {}
    with _plain_errors():
        if wheel := cache.find(cache.key(cache.ingredients(settings, os.environ))):
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if ".dist-info/" in n]
                archive.extractall(metadata_directory, names)
            return names[0].partition("/")[0]
        with _tree(settings):
            from scikit_build_core.build import prepare_metadata_for_build_wheel as upstream

            return str(upstream(metadata_directory, config_settings))


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    settings = config_settings or {}
    out = Path(wheel_directory).resolve()
    with _plain_errors():
        name = cache.key(cache.ingredients(settings, os.environ))
        if wheel := cache.find(name):
            _say(f"Using the cached wheel {wheel} (MEGREZ_NO_WHEEL_CACHE=1 builds anew)")
            shutil.copyfile(wheel, out / wheel.name)
            return wheel.name
        with _tree(settings):
            from scikit_build_core.build import build_wheel as upstream

            built = str(upstream(str(out), config_settings, None))
        cache.store(name, out / built)
        return built


def _refuse(what: str, instead: str) -> SystemExit:
    _say(f"\nerror: {what} cannot be made of this project. {instead}\n")
    return SystemExit(1)


def build_editable(*_: Any) -> str:
    raise _refuse(
        "an editable install",
        "What is installed is generated from patches/ and compiled; there is nothing to edit in "
        "place. Remedy: drop -e: pip install ./bindings/llama-cpp-python",
    )


def build_sdist(*_: Any) -> str:
    raise _refuse(
        "a source distribution",
        "Its sources are upstream's sdist plus ../../patches. Remedy: build the wheel from the "
        "clone: pip wheel --no-deps ./bindings/llama-cpp-python",
    )
