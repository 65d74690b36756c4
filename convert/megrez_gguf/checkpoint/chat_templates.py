"""Chat templates: every place where a checkpoint may keep them, and whether they are Jinja."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megrez_gguf.checkpoint.json_file import read_object
from megrez_gguf.errors import TokenizerError
from megrez_gguf.storage.opening import mistaken, opened
from megrez_gguf.text import few

JINJA = "chat_template.jinja"
JSON = "chat_template.json"
FOLDER = "additional_chat_templates"


def read_templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Templates by name, the usual one being "default", and warnings about them.

    `config` is what tokenizer_config.json says. A .jinja file wins over chat_template.json, which
    wins over `config`, as in transformers; where they differ, a warning names both. Raises
    TokenizerError: a file that cannot be read, or holds something else.
    """
    warnings: list[str] = []
    places = {
        JINJA: _files({"default": folder / JINJA}, warnings),
        f"{FOLDER}/": _files({p.stem: p for p in _jinja_files(folder / FOLDER)}, warnings),
        JSON: _named(read_object(folder / JSON, TokenizerError) or {}, folder / JSON),
        "tokenizer_config.json": _named(config, folder / "tokenizer_config.json"),
    }
    found: dict[str, tuple[str, str]] = {}
    for place, templates in places.items():
        for name, template in templates.items():
            first, kept = found.setdefault(name, (place, template))
            if kept != template:
                warnings.append(
                    f"{place} and {first} hold different chat templates named {name!r}; that of "
                    f"{first} is used, as transformers does"
                )
    for name, (place, template) in found.items():
        if reason := syntax_error(template):
            warnings.append(
                f"{place}: the chat template {name!r} is not valid Jinja, so the model will run "
                f"and cannot chat with it: {reason}"
            )
    if not found:
        warnings.append("the checkpoint has no chat template")
    elif "default" not in found:
        warnings.append(f"none of the chat templates ({few(sorted(found))}) is the default one")
    return {name: template for name, (_, template) in found.items()}, warnings


def syntax_error(template: str) -> str | None:
    """Why transformers would not take `template`; None where it would or jinja2 is missing."""
    try:
        from jinja2 import nodes, pass_context
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None

    class Generation(Extension):
        """transformers' tag around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 (so Jinja has it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    @pass_context
    def at_run_time(*arguments: object) -> None:
        """In place of a filter or a test; what reads the context is not called before."""

    # Otherwise the compiler computes constants, however large.
    environment.intercepted_binops = frozenset(environment.default_binop_table)
    environment.filters = dict.fromkeys(environment.filters, at_run_time)
    environment.tests = dict.fromkeys(environment.tests, at_run_time)
    try:
        environment.compile(template)
    except Exception as e:  # what computing constants raises, too
        line = f"line {e.lineno}: " if hasattr(e, "lineno") else ""
        return f"{line}{e}"
    return None


def _jinja_files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix == ".jinja")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise TokenizerError(f"{folder}: cannot be read: {e.strerror or e}") from None


def _files(paths: Mapping[str, Path], warnings: list[str]) -> dict[str, str]:
    present = [(n, path) for n, path in paths.items() if path.exists() or path.is_symlink()]
    return _by_key(((n, _read(path, warnings)) for n, path in present), FOLDER)


def _read(path: Path, warnings: list[str]) -> str:
    with opened(path, TokenizerError) as (file, _):
        raw = file.read()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
            raise TokenizerError(
                f"{path}: not UTF-8 text{', but UTF-16' * utf16}: {e}; save it as UTF-8"
            ) from None
        if "{{" not in text and "{%" not in text and mistaken(raw):
            raise TokenizerError(f"{path}: no template")  # `opened` tells what it is
    if text.startswith("\ufeff"):
        warnings.append(f"{path.name} begins with a byte order mark, which was left out")
    # As a text file is read on any system.
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _named(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """What `values["chat_template"]` says: one template, or a list of {name, template}."""
    raw = values.get("chat_template") or []
    if isinstance(raw, str):
        raw = [{"name": "default", "template": raw}]
    entries = [e if isinstance(e, dict) else {} for e in raw] if isinstance(raw, list) else [{}]
    if not all(isinstance(e.get(k), str) for e in entries for k in ("name", "template")):
        raise TokenizerError(
            f"{path}: chat_template: expected a string, or a list of {{name, template}}"
        )
    return _by_key(((e["name"], e["template"]) for e in entries), path)


def _by_key(templates: Iterable[tuple[str, str]], place: object) -> dict[str, str]:
    """`templates` by their names as parts of GGUF keys."""
    found: dict[str, str] = {}
    for name, template in templates:
        key = re.sub(r"\W", "_", name, flags=re.ASCII)
        if found.setdefault(key, template) != template:
            raise TokenizerError(f"{place}: two different chat templates are named {key!r} in GGUF")
    return found
