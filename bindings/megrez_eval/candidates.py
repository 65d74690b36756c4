"""What can be asked: files, levels of a checkpoint, engines, servers; each opened for its turn."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM

from megrez_eval.engine_lm import open_engine
from megrez_eval.gguf_lm import GgufLM
from megrez_eval.served_lm import ServedLM
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.text import Say, silent
from megrez_parity.level_files import Maker
from megrez_parity.provenance import checkpoint_sha256

Open = Callable[[], AbstractContextManager[LM]]


def files(paths: Sequence[Path], keep: Path | None = None, **options: Any) -> dict[str, Open]:
    """GGUF files, by their names; `options` are GgufLM's, answers go into the folder `keep`."""
    plain = len({path.name for path in paths}) == len(paths)
    return {
        path.name if plain else str(path): partial(_file, path, keep, options) for path in paths
    }


def levels(
    checkpoint: str,
    names: Sequence[str],
    keep: Path | None = None,
    *,
    imatrix: Path | None = None,
    revision: str | None = None,
    say: Say = silent,
    **options: Any,
) -> dict[str, Open]:
    """Levels of a checkpoint, as `megrez_parity.level_files` names them, each made for its turn."""

    @contextmanager
    def opened(name: str) -> Iterator[LM]:
        folder = Checkpoint.find(checkpoint, revision=revision, say=say).folder
        with tempfile.TemporaryDirectory(prefix="megrez-eval-") as scratch:
            maker = Maker(folder, Path(scratch), say=say, imatrix_file=imatrix)
            with maker.make(name) as made, _file(made.path, keep, options) as lm:
                yield lm

    return {name: partial(opened, name) for name in names}


def engines(checkpoint: str, texts: Sequence[str], keep: Path | None = None) -> dict[str, Open]:
    """Engines that run the checkpoint itself, as `engine_lm.open_engine` takes them.

    What they answered is kept by the harness's own cache, which leaves out drawn answers: an engine
    has no seed for each.
    """

    @contextmanager
    def opened(text: str) -> Iterator[LM]:
        lm = open_engine(text, checkpoint)
        if keep:
            weights = checkpoint_sha256(Checkpoint.find(checkpoint))
            whose = hashlib.sha256(f"{weights} {text}".encode()).hexdigest()
            lm = CachingLM(lm, str(keep / f"answers-{whose[:16]}.db"))
        yield lm

    return {text: partial(opened, text) for text in texts}


def servers(
    urls: Sequence[str], model: str | None = None, keep: Path | None = None, **options: Any
) -> dict[str, Open]:
    """Models behind OpenAI URLs; `options` are ServedLM's."""

    @contextmanager
    def opened(url: str) -> Iterator[LM]:
        yield ServedLM(url, model, keep=_kept(keep), **options)

    return {url: partial(opened, url) for url in urls}


@contextmanager
def _file(path: Path, keep: Path | None, options: dict[str, Any]) -> Iterator[LM]:
    lm = GgufLM(path, keep=_kept(keep), **options)
    try:
        yield lm
    finally:
        lm.close()


def _kept(folder: Path | None) -> Path | None:
    """One file for all: an answer says whose it is."""
    return folder / "answers.jsonl" if folder else None
