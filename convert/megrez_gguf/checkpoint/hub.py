"""Where a checkpoint comes from: a path, or a repository on Hugging Face or ModelScope.

Repositories are fetched by the hubs' own client libraries (`huggingface_hub`, `modelscope_hub`,
both optional), into those libraries' caches and with their own resuming, progress bars and logins.
Only files the converter reads are asked for, each by its name: no code, no pickles. The small ones
come first, so that a model of another kind is refused before gigabytes are on their way.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.checkpoint.chat_templates import FOLDER, JINJA, JSON
from megrez_gguf.checkpoint.documents import CONFIG, GENERATION, INDEX
from megrez_gguf.checkpoint.hub_clients import HUBS, Hub, HubName, Kind, chain, is_disk_full
from megrez_gguf.checkpoint.location import Location, origin
from megrez_gguf.checkpoint.shard_set import SUFFIX
from megrez_gguf.errors import SourceError
from megrez_gguf.text import Say, few, silent

# Every file other than the weights that `convert`, `inspect` or `parity` reads, as patterns.
SMALL_FILES = (
    "README.md",
    f"{FOLDER}/*.jinja",
    JINJA,
    JSON,
    CONFIG,
    GENERATION,
    INDEX,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

Announced = Callable[[Path, Collection[str]], tuple[Sequence[str], int | None]]
"""Tells what shards a model has, and their bytes if that is known, from the folder of its small
files and the names of all files of its repository."""

# What both hubs allow. A revision becomes part of a path in their caches.
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(.*))?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w./+-]*", re.ASCII)
_PREFIX = re.compile(r"(hf|modelscope):(.*)", re.DOTALL)
# `models/tiny.gguf` could be an id, and is a file name that was mistyped.
_FILES = (".gguf", ".safetensors", ".json")


def resolve(
    source: str | os.PathLike[str],
    announced: Announced,
    *,
    revision: str | None = None,
    say: Say = silent,
) -> Location:
    """The folder or file that `source` names, fetched first if it is a repository's id.

    What exists here wins. Otherwise "owner/name" and "hf:owner/name" are repositories on Hugging
    Face and "modelscope:owner/name" one on ModelScope; "@REVISION" after the id does the same as
    `revision`. A `Path` is never an id. `announced` tells what shards to fetch, or raises for
    another kind of model. `say` gets one line before weights are fetched; progress bars go to
    stderr, and nothing to stdout.

    Raises SourceError: no such path or repository, no access, no network, no space, a download that
    stopped, or a client library that is not installed. What `announced` raises comes before weights
    are fetched.
    """
    text = os.fspath(source)
    if os.path.exists(text):  # noqa: PTH110 (a string may be no path at all)
        if revision is not None:
            raise SourceError(
                f"{text}: is on this machine and has no revision {revision!r}; leave the revision "
                f"out, or write hf:{text} for the repository of that name"
            )
        return origin(Path(text))
    return _fetch(_parse(source, revision), announced, say)


# --- reading the argument ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wanted:
    hub: HubName
    repository: str
    revision: str | None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def _parse(source: str | os.PathLike[str], revision: str | None) -> _Wanted:
    text = os.fspath(source)
    prefix = _PREFIX.fullmatch(text)
    match = _ID.fullmatch(prefix[2] if prefix else text)
    if match is None or not isinstance(source, str) or (match[2] is None and text.endswith(_FILES)):
        raise SourceError(
            f"{text}: no such folder or file; a repository is written owner/name (Hugging Face) or "
            "modelscope:owner/name, either one with @REVISION if need be"
        )
    if match[2] is not None and revision not in (None, match[2]):
        raise SourceError(
            f"{text}: names revision {match[2]!r}, and revision {revision!r} is asked for"
        )
    wanted = match[2] if match[2] is not None else revision
    if wanted is not None and not _REVISION.fullmatch(wanted):
        raise SourceError(f"{text}: {wanted!r} is not the name of a branch, tag or commit")
    hub: HubName = "modelscope" if prefix and prefix[1] == "modelscope" else "huggingface"
    return _Wanted(hub, match[1], wanted)


# --- fetching ----------------------------------------------------------------------------------


def _fetch(wanted: _Wanted, announced: Announced, say: Say) -> Location:
    folder = _download(wanted, wanted.revision, SMALL_FILES, say)
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{wanted}: holds no config.json; give the repository with the original safetensors "
            "weights, not one of GGUF files or an adapter"
        )
    found = origin(folder)
    # On the commit the small files came from: a branch may move between the two.
    revision = found.revision if wanted.hub == "huggingface" else wanted.revision
    names, total = announced(folder, _files(wanted, revision, folder))
    if any(not (folder / name).is_file() for name in names):
        size = f", {total / 2**20:,.1f} MiB" if total else ""
        say(f"fetching {wanted}: {len(names)} shard{'s' * (len(names) > 1)}{size}, to {folder}")
    # A name may hold what is special in a pattern.
    _download(wanted, revision, [glob.escape(name) for name in names], say)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SourceError(f"{wanted}: {few(missing)} did not come; run this again")
    # The name of an older client's ModelScope cache folder tells nothing.
    return Location(folder, wanted.hub, wanted.repository, found.revision or wanted.revision)


def _files(wanted: _Wanted, revision: str | None, folder: Path) -> list[str]:
    """The names of the files of a repository, or of those in the cache where it cannot be asked."""
    hub = HUBS[wanted.hub]
    try:
        with redirect_stdout(sys.stderr):
            return [path for path in hub.files(wanted.repository, revision) if "/" not in path]
    except Exception as e:
        # The client has just fetched from there, or from its cache without network.
        cached = [path.name for path in folder.iterdir()]
        if any(name.endswith(SUFFIX) for name in cached):
            return cached
        raise SourceError(f"{wanted}: {_reason(hub, wanted, e, 'offline')}") from e


def _download(wanted: _Wanted, revision: str | None, patterns: Sequence[str], say: Say) -> Path:
    """Fetch the files that match one of `patterns`; those already here are kept."""
    hub = HUBS[wanted.hub]
    try:
        # Clients may print; stdout belongs to the command.
        with redirect_stdout(sys.stderr):
            return hub.download(wanted.repository, revision, list(patterns))
    except ImportError as e:
        raise SourceError(
            f"{wanted}: no such folder here, and fetching it from {hub.title} needs a package: "
            f"pip install 'megrez-gguf[{hub.extra}]' ({e})"
        ) from None
    except KeyboardInterrupt:
        say(f"{wanted}: the download was interrupted; run this again to go on with it")
        raise
    except Exception as e:
        # Any, because the clients let through whatever their transports raise.
        raise SourceError(f"{wanted}: {_reason(hub, wanted, e)}") from e


def _reason(hub: Hub, wanted: _Wanted, error: Exception, kind: Kind | None = None) -> str:
    """What is wrong, of the `kind` the client means unless it is given, and what to do about it."""
    page = hub.page + wanted.repository
    if kind is None:
        kind = "space" if is_disk_full(error) else hub.kind(error)
    if kind == "unknown":
        revision = f", or not its revision {wanted.revision!r}" if wanted.revision else ""
        return (
            f"no such folder here, and {hub.title} does not know {wanted.repository}{revision}; "
            f"if it is private, log in first ({hub.login})"
        )
    if kind == "revision":
        return f"{hub.title} has no revision {wanted.revision!r} of it; see {page}"
    if kind == "denied":
        return (
            f"{hub.title} denies access; accept the model's terms at {page} if it asks for that, "
            f"log in ({hub.login}), and run this again"
        )
    innermost = list(chain(error))[-1]
    lines = str(innermost).splitlines() or [""]
    detail = f"{type(innermost).__name__}: {lines[0]}"
    if kind == "offline":
        return (
            f"no such folder here, {hub.title} cannot be reached, and its cache on this machine "
            f"does not hold all that is needed; a folder works without network ({detail})"
        )
    if kind == "space":
        return (
            f"the disk is full; free some space or move the cache ({hub.cache}=FOLDER), then run "
            "this again: finished files are kept"
        )
    return f"the download stopped; run this again to go on with it ({detail})"
