"""The PEP 517 hooks: refusals, the wheel cache, and the key it goes by."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from megrez_llama_build import cache, source

from support.mini import REPO, Mini, diff, insert

BUILD = (
    "import sys; from megrez_llama_build import backend; print(backend.build_wheel(sys.argv[1]))"
)


def compiler(folder: Path, name: str, version: str = "1") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {name} {version}\n')
    path.chmod(0o755)
    return path


def test_no_compiler_is_named_before_anything_is_fetched(mini: Mini, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    env = {"PATH": str(tmp_path / "empty"), "MEGREZ_LLAMA_SDIST": "/nonexistent"}
    done = mini.run("-c", BUILD, str(tmp_path), CC="", CXX="", **env)
    assert done.returncode == 1
    assert "error: no C compiler: none is on PATH" in done.stderr
    assert "apt install build-essential" in done.stderr
    assert "xcode-select --install" in done.stderr
    assert "Traceback" not in done.stderr
    compiler(tmp_path / "empty", "cc")
    done = mini.run("-c", BUILD, str(tmp_path), CC="", CXX="", **env)
    assert "error: no C++ compiler" in done.stderr
    done = mini.run("-c", BUILD, str(tmp_path), CC="", CXX="/no/such/g++", **env)
    assert "CXX=/no/such/g++ is not a program" in done.stderr


@pytest.mark.parametrize("hook", ["build_editable", "build_sdist"])
def test_hooks_that_make_no_sense_say_what_to_do(mini: Mini, hook: str) -> None:
    done = mini.run("-c", f"from megrez_llama_build import backend; backend.{hook}('x')")
    assert done.returncode == 1
    assert "Remedy" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_conflict_ends_the_build_with_the_message_alone(mini: Mini, tmp_path: Path) -> None:
    mini.patch("0002-two.patch", diff("vendor/two.cpp", insert(9, "C").replace("10", "ten")))
    done = mini.run("-c", BUILD, str(tmp_path))
    assert done.returncode == 1
    assert "0002-two.patch: vendor/two.cpp, hunk 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    tools = tmp_path / "tools"
    for name in ("cc", "c++", "other-cc"):
        compiler(tools, name)
    return {"PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin"}


def test_the_key_follows_sources_flags_and_compilers(
    mini: Mini, env: dict[str, str], tmp_path: Path
) -> None:
    def key(settings: dict[str, str] | None = None, **more: str) -> str:
        return cache.key(cache.ingredients(settings or {}, {**env, **more}, mini.patches))

    base = key()
    assert key() == base
    assert key(UNRELATED="1") == base
    keys = [
        base,
        key(CMAKE_ARGS="-DGGML_CUDA=ON"),
        key(CMAKE_ARGS="-DGGML_NATIVE=OFF"),
        key(CFLAGS="-O1"),
        key(CC="other-cc"),
        key({"cmake.define.GGML_VULKAN": "ON"}),
    ]
    compiler(tmp_path / "tools", "c++", "2")
    keys.append(key())
    mini.patch("0002-two.patch", diff("vendor/two.cpp", insert(9, "other")))
    keys.append(key())
    (mini.patches / "overlay/vendor/new.cpp").write_text("newer\n")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_cpu_counts_only_for_native_builds(
    mini: Mini, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> tuple[str, str]:
        native = cache.ingredients({}, env, mini.patches)
        portable = cache.ingredients({}, {**env, "CMAKE_ARGS": "-DGGML_NATIVE=OFF"}, mini.patches)
        return cache.key(native), cache.key(portable)

    before = keys()
    monkeypatch.setattr(cache, "_cpu", lambda: "another processor")
    after = keys()
    assert before[0] != after[0]
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("-DX=1", "1"),
        ("-DX:BOOL=OFF", "OFF"),
        ("-D X=2", "2"),
        ("-DX=1 -DX=3", "3"),
        ("-DXY=1", None),
    ],
)
def test_cmake_defines_are_read_as_cmake_reads_them(arguments: str, value: str | None) -> None:
    assert cache.cmake_define("X", {}, {"CMAKE_ARGS": arguments}) == value


def test_a_cached_wheel_is_used_and_can_be_bypassed(mini: Mini, tmp_path: Path) -> None:
    wheel = tmp_path / "llama_cpp_python-7.8.9+megrez.4-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llama_cpp_python-7.8.9+megrez.4.dist-info/METADATA", "Name: x\n")
    code = (
        "import os, sys, pathlib; from megrez_llama_build import cache\n"
        "cache.store(cache.key(cache.ingredients({}, os.environ)), pathlib.Path(sys.argv[1]))"
    )
    assert mini.run("-c", code, str(wheel)).returncode == 0
    out = tmp_path / "out"
    out.mkdir()
    done = mini.run("-c", BUILD, str(out), MEGREZ_LLAMA_SDIST="/nonexistent")
    assert (done.returncode, done.stdout.strip()) == (0, wheel.name), done.stderr
    assert (out / wheel.name).read_bytes() == wheel.read_bytes()
    prepare = BUILD.replace("build_wheel", "prepare_metadata_for_build_wheel")
    done = mini.run("-c", prepare, str(out), MEGREZ_LLAMA_SDIST="/nonexistent")
    assert (out / done.stdout.strip() / "METADATA").is_file(), done.stderr
    done = mini.run(
        "-c", BUILD, str(out), MEGREZ_LLAMA_SDIST="/nonexistent", MEGREZ_NO_WHEEL_CACHE="1"
    )
    assert "MEGREZ_LLAMA_SDIST=/nonexistent: no such file" in done.stderr


def test_user_flags_win_over_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megrez_llama_build import backend

    monkeypatch.setenv("CMAKE_ARGS", "-DLLAMA_BUILD_TOOLS=ON -DGGML_CUDA=ON")
    monkeypatch.setenv("CMAKE_C_COMPILER_LAUNCHER", "mine")
    made = backend._environment(tmp_path, {})
    assert cache.cmake_define("LLAMA_BUILD_TOOLS", {}, made) == "ON"
    assert cache.cmake_define("LLAMA_BUILD_TESTS", {}, made) == "OFF"
    assert cache.cmake_define("GGML_CUDA", {}, made) == "ON"
    assert "CMAKE_CXX_COMPILER_LAUNCHER" not in made
    assert source.Pin.load().local_version in made["CMAKE_ARGS"]


def test_what_shortens_the_build_is_found_and_counts_in_the_key(
    mini: Mini, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megrez_llama_build import backend

    monkeypatch.setattr(backend, "_DEFAULTS", {"SOME": "/folder with spaces/x.cmake"})
    made = backend._environment(tmp_path, {})
    assert cache.cmake_define("SOME", {}, made) == "/folder with spaces/x.cmake"
    monkeypatch.undo()
    made = backend._environment(tmp_path, {})
    include = cache.cmake_define("CMAKE_PROJECT_llama.cpp_INCLUDE", {}, made)
    assert include is not None
    assert Path(include).is_file()

    code = (
        "import os; from megrez_llama_build import cache; print(cache.ingredients({}, os.environ))"
    )
    before = mini.run("-c", code).stdout
    assert "backend" in before
    copy = mini.root / "bindings/llama-cpp-python/megrez_llama_build" / Path(include).name
    copy.write_text(copy.read_text() + "# changed\n")
    assert mini.run("-c", code).stdout != before


def test_the_package_has_what_python_loads_and_no_more() -> None:
    import llama_cpp.mtmd_cpp as mtmd

    assert mtmd.mtmd_default_marker()  # upstream's multimodal side is complete
    files = importlib.metadata.files("llama_cpp_python") or []
    libraries = {path.name.partition(".")[0] for path in files if path.parent.name == "lib"}
    assert {"libllama", "libmtmd", "libggml-cpu"} <= libraries
    assert "llama-server" in libraries  # and what it alone needs
    folders = {path.parts[0] for path in files}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"llama_cpp"}


@pytest.mark.parametrize(("given", "verbose"), [("", "0"), ("1", "1")])
def test_the_compilers_progress_is_not_buried_unless_asked(
    given: str, verbose: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megrez_llama_build import backend

    monkeypatch.setenv("SKBUILD_CMAKE_VERBOSE", given)
    assert backend._environment(tmp_path, {})["SKBUILD_CMAKE_VERBOSE"] == verbose


BUILDS = """echo '[7/9] Building CXX object seven.o'
sleep ${PAUSE:-0}
mkdir -p .venv/wheels && touch .venv/wheels/some.whl
"""
FAILS = """echo '[7/9] Building CXX object seven.o'
echo 'FAILED: seven.o'
echo 'seven.cpp:3:9: error: expected a semicolon'
exit 1
"""


class Setup:
    """scripts/setup in an empty repository, with a pip of which only the wheel's part does much."""

    def __init__(self, root: Path, wheel: str) -> None:
        self.root = root
        self.stamp = root / ".venv" / ".megrez-report"
        for name in ("scripts", "patches", "bindings/llama-cpp-python", ".venv/bin"):
            (root / name).mkdir(parents=True)
        shutil.copy(REPO / "scripts" / "setup", root / "scripts")
        for name in ("pyproject.toml", "scripts/constraints.txt", "patches/PIN"):
            (root / name).touch()
        python = root / ".venv/bin/python"
        log = f'echo "$*" >> {root}/asked'
        python.write_text(f'#!/bin/sh\n{log}\ncase "$*" in *" wheel "*)\n{wheel};; esac\n')
        python.chmod(0o755)

    def run(self, stderr: int, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["scripts/setup"],
            cwd=self.root,
            env={**os.environ, **env},
            stderr=stderr,
            text=True,
        )


def test_setup_shows_the_builds_progress_on_a_terminal(tmp_path: Path) -> None:
    setup = Setup(tmp_path, BUILDS)
    ours, theirs = os.openpty()
    done = setup.run(theirs, PAUSE="2")
    assert done.wait(30) == 0
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert re.search(r"0:0\d  \[7/9\] Building CXX object seven", shown), shown
    assert setup.stamp.is_file()
    # An installed one of the same version, from other patches, must not stay.
    removal, install = (tmp_path / "asked").read_text().splitlines()[-2:]
    assert "uninstall --yes llama-cpp-python" in removal
    assert "some.whl" in install


@pytest.mark.slow
def test_setup_shows_it_where_there_is_no_terminal(tmp_path: Path) -> None:
    done = Setup(tmp_path, BUILDS).run(subprocess.PIPE, PAUSE="12")
    shown = done.communicate(timeout=60)[1]
    assert done.returncode == 0
    assert len(re.findall(r"^ *0:1\d  \[7/9\] Building.*\n", shown, re.M)) == 1, shown


def test_setup_shows_the_compilers_error_and_fails(tmp_path: Path) -> None:
    setup = Setup(tmp_path, FAILS)
    done = setup.run(subprocess.PIPE)
    shown = done.communicate(timeout=60)[1]
    assert done.returncode == 1
    assert "seven.cpp:3:9: error: expected a semicolon" in shown
    assert ".venv/setup.log" in shown
    assert not setup.stamp.exists()
