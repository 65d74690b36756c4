"""Finished wheels, keyed by everything that decides their content."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import source

# Variables that CMake, scikit-build-core or the compilers read.
_PREFIXES = ("CMAKE_", "SKBUILD_", "GGML_", "LLAMA_")
_VARIABLES = {"CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CUDAARCHS", "HIPCXX", "CFLAGS", "CXXFLAGS"}
_VARIABLES |= {"CPPFLAGS", "CUDAFLAGS", "LDFLAGS", "ARCHFLAGS", "SDKROOT", "VULKAN_SDK"}
_VARIABLES |= {"MACOSX_DEPLOYMENT_TARGET"}
_OFF = {"OFF", "0", "NO", "N", "FALSE", "IGNORE", "NOTFOUND", ""}


def cmake_define(name: str, settings: Mapping[str, Any], env: Mapping[str, str]) -> str | None:
    """The value of a `-D` that the user gave through CMAKE_ARGS or config_settings."""
    arguments = shlex.split(env.get("CMAKE_ARGS", ""))
    value = None
    for key, given in settings.items():
        if key.endswith("cmake.args"):
            arguments += given if isinstance(given, list) else str(given).split(";")
        elif key.endswith(f"cmake.define.{name}"):
            value = str(given)
    joined = "\0".join(arguments).replace("-D\0", "-D").split("\0")
    for argument in joined:
        if match := re.match(rf"-D{name}(?::\w+)?=(.*)", argument):
            value = match[1]
    return value


def compilers(settings: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """Where the C and C++ compilers are, looked for as CMake does.

    Empty when the choice is left to a toolchain file or to Windows' own discovery.
    Raises SourceError when there is none.
    """
    if os.name == "nt" or cmake_define("CMAKE_TOOLCHAIN_FILE", settings, env):
        return {}
    found = {}
    for language, variable, names in (
        ("C", "CC", "cc gcc clang icx"),
        ("C++", "CXX", "c++ g++ clang++ icpx"),
    ):
        define = f"CMAKE_{variable.replace('CC', 'C')}_COMPILER"
        asked = cmake_define(define, settings, env) or env.get(variable, "")
        candidates = shlex.split(asked)[:1] or names.split()
        path = next(filter(None, (shutil.which(c, path=env.get("PATH")) for c in candidates)), None)
        if path is None:
            what = f"{variable}={asked} is not a program" if asked else "none is on PATH"
            raise source.SourceError(
                f"no {language} compiler: {what}. llama.cpp is compiled on your machine.\n"
                "Remedy: Debian/Ubuntu: apt install build-essential; Fedora: dnf install gcc-c++; "
                "macOS: xcode-select --install (or brew install llvm); or set CC and CXX."
            )
        found[variable] = path
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        wanted = ("flags", "Features", "model name", "CPU part")
        lines = {line for line in info.read_text("utf-8").splitlines() if line.startswith(wanted)}
        return "\n".join(sorted(lines))
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()


def ingredients(
    settings: Mapping[str, Any], env: Mapping[str, str], patches: Path = source.PATCHES
) -> dict[str, Any]:
    """Everything that decides the wheel: sources, flags, compilers, platform and CPU.

    Not the Python version: upstream's wheel is py3-none.
    """
    native = (cmake_define("GGML_NATIVE", settings, env) or "ON").upper() not in _OFF
    code = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".cmake"))
    cuda = "CUDA" in env.get("CMAKE_ARGS", "") + json.dumps(dict(settings), default=str)
    return {
        "series": source.series_hash(patches),
        "backend": [source.sha256_of(path) for path in code],
        "settings": {k: settings[k] for k in sorted(settings)},
        "environment": {
            k: env[k] for k in sorted(env) if k in _VARIABLES or k.startswith(_PREFIXES)
        },
        "compilers": {
            variable: [path, _output(path, "--version"), _output(path, "-dumpmachine")]
            for variable, path in compilers(settings, env).items()
        },
        "cuda": _output(env.get("CUDACXX", "nvcc"), "--version") if cuda else "",
        "platform": [sysconfig.get_platform(), *platform.libc_ver()],
        "cpu": _cpu() if native else "any",
    }


def key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def find(name: str) -> Path | None:
    """The cached wheel under this key, unless MEGREZ_NO_WHEEL_CACHE is set."""
    if source.enabled("MEGREZ_NO_WHEEL_CACHE"):
        return None
    return next((source.cache_root() / "wheels" / name).glob("*.whl"), None)


def store(name: str, wheel: Path) -> None:
    """Keep a finished wheel; appears whole or not at all."""
    if source.enabled("MEGREZ_NO_WHEEL_CACHE"):
        return
    folder = source.cache_root() / "wheels" / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
        shutil.copyfile(wheel, part.name)
    Path(part.name).chmod(0o644)
    Path(part.name).replace(folder / wheel.name)
