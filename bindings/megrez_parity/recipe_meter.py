"""How much a recipe loses: measured once, and kept in a log for searches that go on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megrez_gguf.checkpoint.json_file import MALFORMED, load_json
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion.convert import convert
from megrez_gguf.errors import ConfigError, OutputError
from megrez_gguf.quantization.imatrix import load
from megrez_gguf.quantization.recipe import Recipe
from megrez_gguf.text import Say, clip
from megrez_llama.engine import Engine
from megrez_parity.metrics import Comparison
from megrez_parity.provenance import checkpoint_sha256, sha256
from megrez_parity.reference_store import StoredReference, cache_key
from megrez_parity.windows import read_corpus


def read_log(path: Path) -> dict[str, float]:
    """What was measured before: the mean KLD, in nats, by a mix's types as JSON.

    Raises OutputError: it cannot be read, or a line is damaged; the last may have been cut off.
    """
    known = {}
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as e:
        raise OutputError(f"{path}: cannot be read: {e.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = load_json(line)
            types = [[str(pattern), str(kind)] for pattern, kind in entry["types"]]
            known[json.dumps(types)] = float(entry["mean_kld"])
        except MALFORMED as e:
            raise OutputError(
                f"{path}: line {number} is damaged ({clip(e)}); remove it, and that is measured "
                "anew"
            ) from None
    return known


def _key(mix: Recipe) -> str:
    return json.dumps([list(pair) for pair in mix.types])


class Meter:
    """Mean KLD of recipes from the reference, over windows nobody is judged by."""

    def __init__(
        self,
        source: Checkpoint,
        work: Path,
        *,
        texts: Sequence[Path],
        n_ctx: int,
        n_windows: int,
        imatrix: Path | None,
        pad_rows: bool = False,
        say: Say,
    ) -> None:
        self._checkpoint, self._pad_rows = source.folder, pad_rows
        self._imatrix = load(imatrix) if imatrix else None
        corpus = read_corpus(source, texts, n_ctx=n_ctx, n_windows=n_windows)
        if not corpus.calibration:
            raise ConfigError(
                f"no text has a window of {n_ctx} tokens beyond the {n_windows} to judge by",
                option="n_windows",
            )
        self._windows = corpus.calibration
        tokens = [window.tokens for window in self._windows]
        weights = checkpoint_sha256(source)
        key = cache_key(source.config, source.folder, tokens, weights)[:16]
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{work}: the work folder cannot be made: {e.strerror}") from None
        self._reference = StoredReference(
            source.config, source.folder, tokens, work / f"reference-{key}", weights, say
        )
        self._reference.run()
        weighted = f"-{sha256([imatrix])[0][:16]}" if imatrix else ""
        self._log = work / f"measured-{key}{weighted}.jsonl"
        self._file = work / "candidate.gguf"
        self._known = read_log(self._log)
        self._took: list[float] = []  # seconds of each measurement

    def mean_kld(self, mix: Recipe) -> float:
        """In nats. Raises ConfigError where it is not finite, and whatever llama.cpp raises."""
        key = _key(mix)
        if key not in self._known:
            began = time.perf_counter()
            self._known[key] = self._measure(mix)
            self._took.append(time.perf_counter() - began)
            with self._log.open("a", encoding="utf-8") as log:
                entry = {"types": json.loads(key), "mean_kld": self._known[key]}
                log.write(json.dumps(entry) + "\n")
        return self._known[key]

    def seconds_for(self, mixes: Iterable[Recipe]) -> float:
        """What it will take to measure those that are not known yet, about; 0 before any was."""
        missing = sum(_key(mix) not in self._known for mix in mixes)
        return missing * sum(self._took) / max(len(self._took), 1)

    def _measure(self, mix: Recipe) -> float:
        comparison = Comparison()
        try:
            convert(
                self._checkpoint,
                self._file,
                force=True,
                imatrix=self._imatrix,
                recipe=replace(mix, pad_rows=self._pad_rows),
                allow_zeros=True,
            )
            with Engine(self._file, len(self._windows[0].tokens)) as engine:
                for i, window in enumerate(self._windows):
                    half = len(window.tokens) // 2
                    logits = engine.run(window.tokens, first=half).logits[:-1]
                    targets = window.tokens[half + 1 :]
                    comparison.add(self._reference.logits(i), logits, targets, window.domain)
        finally:
            self._file.unlink(missing_ok=True)
        kld = comparison.mean_kld()
        if not math.isfinite(kld):
            raise ConfigError(f"{mix.types}: the divergence is not finite")
        return kld
