"""Options at their extremes, names that are none, and strings that could drive a terminal."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main

from megrez_cli import app
from megrez_gguf.text import printable
from megrez_llama.errors import MegrezError
from megrez_llama.threads import MAX_THREADS, thread_count
from support.commands import cli

NUMBERS = (
    *("nan", "inf", "-inf", "-1", "-0", "0", "1", "1e3", "1e39", "1e400", "1.5", "0x10", "", " "),
    *(str(2**n + d) for n in (31, 32, 63, 64, 200) for d in (-1, 0)),
    *("1" + "0" * 400, "1" * 5000, "8G", "1e99G", "99999999999999999999TiB", "2 GiB", "８"),
)
RUNS = {
    "chat": ["MODEL", "-p", "x", "--max-tokens", "1", "--ctx", "256"],
    "bench": ["MODEL", "--prompt", "2", "--tokens", "1", "--warmup", "0", "--repeats", "1"],
    "imatrix": ["MODEL", "TEXT", "-o", "OUT", "--ctx", "16", "--chunks", "1"],
    "convert": ["MODEL", "-o", "OUT"],
    "quantize": ["MODEL", "OUT", "q8_0"],
}
# What takes as long as it is told to.
LENGTHY = {"--repeats", "--tokens", "--warmup", "--prompt", "--max-tokens"}


def numeric() -> list[tuple[str, str]]:
    """(command, option) of all options that take a number or a size."""
    commands: Any = typer.main.get_command(app)
    found = []
    for name in RUNS:
        for option in commands.commands[name].params:
            kind = f"{vars(option)}"
            if option.param_type_name == "option" and re.search("int|float|INT|FLOAT|SIZE", kind):
                found.append((name, option.opts[0]))
    return found


@pytest.mark.parametrize(("command", "option"), numeric())
def test_numbers_at_their_extremes(command: str, option: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three " * 50)
    places = {"MODEL": model, "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    draw = random.Random(f"{command} {option}")
    for value in draw.sample(NUMBERS, 8):
        if option in LENGTHY and value.strip().isdigit() and int(value[:9]) > 9:
            continue
        arguments = [places.get(part, part) for part in RUNS[command]]
        done = cli(command, *arguments, f"{option}={value}")
        assert done.exit_code in (0, 2), (value, done.stderr)
        assert "Traceback" not in done.stderr, value
        assert "fault of megrez-gguf" not in done.stderr, value
        assert done.exit_code == 0 or "rror" in done.stderr
        (tmp_path / "out").unlink(missing_ok=True)


def test_numeric_options_were_found() -> None:
    assert {("chat", "--threads"), ("chat", "--ram"), ("bench", "--seed")} <= set(numeric())


@pytest.mark.parametrize("count", [-1, -(2**31), MAX_THREADS + 1, 100_000, 2**31, 2**64])
def test_threads_beyond_what_ggml_holds(count: int) -> None:
    with pytest.raises(MegrezError, match="expected 1 to 512"):
        thread_count(count, 4)
    assert thread_count(None, 4096) == thread_count(MAX_THREADS, 1) == MAX_THREADS


def paths() -> list[tuple[str, str]]:
    """(command, parameter) of all parameters that name a file, a folder or a repository."""
    commands: Any = typer.main.get_command(app)
    return [
        (name, option.opts[0])
        for name, command in commands.commands.items()
        for option in command.params
        if option.param_type_name == "option" and "Path" in str(vars(option))
    ]


@pytest.mark.parametrize(("command", "option"), paths())
def test_an_empty_name_is_no_folder(command: str, option: str) -> None:
    done = cli(command, "x", f"{option}=")
    assert done.exit_code == 2
    assert "the name is empty" in done.stderr
    left = cli(command, "x", f"{option}=~/x")
    assert left.exit_code == 2
    assert "write $HOME/x" in left.stderr


@pytest.mark.parametrize("out", ["-", "/dev/stdout", "/dev/fd/1", "/dev/null", "folder/"])
def test_an_output_is_a_file(out: str, checkpoint: Path) -> None:
    done = cli("convert", checkpoint, "-o", out, "--force")
    assert done.exit_code == 2
    assert "the name of a file" in done.stderr


def test_an_option_given_twice_is_told(checkpoint: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    done = cli("convert", checkpoint, "-o", outs[0], "--out", outs[1], "--dry-run")
    assert done.exit_code == 0
    assert "warning: --out is given more than once" in done.stderr
    assert cli("convert", checkpoint, "-o", outs[0], "--dry-run").stderr == ""


HOSTILE = "".join(map(chr, [*range(32), *range(127, 160), *range(0x202A, 0x202F)])) + "\u2066\u2069"


def test_strings_of_a_file_do_not_reach_the_terminal(checkpoint: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    named = tmp_path / "".join(c for c in HOSTILE if c not in "\0/")
    shutil.move(checkpoint, named)
    config = named / "config.json"
    raw = json.loads(config.read_text("utf-8"))
    for key in ("hidden_act", "model_type", "scoring_func", "rope_scaling"):
        changed = raw | {key: "".join(draw.sample(HOSTILE, 20))}
        config.write_text(json.dumps(changed), "utf-8")
        for arguments in (("inspect", named), ("convert", named, "--dry-run"), ("chat", named)):
            done = cli(*arguments)
            shown = done.stdout + done.stderr
            assert not set(shown) & set(HOSTILE) - set("\n\t"), arguments


@pytest.mark.parametrize("character", HOSTILE + "\ud800\udfff")
def test_printable(character: str) -> None:
    shown = printable(f"世{character}　é")
    assert shown.startswith("世\\")
    assert shown.endswith("　é")
    assert shown.isprintable() or "　" in shown
    assert printable(character, keep=character) == character
    assert printable("\udcff") == r"\xff"


def test_help_and_completion() -> None:
    assert cli("-h").stdout == cli("--help").stdout
    assert cli("chat", "-h").stdout == cli("chat", "--help").stdout
    assert "--install-completion" in cli("-h").stdout
