"""The reference at any size: one layer at a time over all windows, every result kept on disk.

A folder holds one reference:

    manifest.json         what it was computed from; anything else needs another folder
    layer-07/             appears whole, by renaming, so that a killed run goes on where it was
        ffn_norm-2.npy    [S, D] of window 2; also l_out [S, D] and, in MoE layers, scores [S, E]
        record.json       sizes of these files, seconds, peak memory, largest activations
    head/                 the same of logits-2.npy [R, V]
    lock                  held by the process that computes

A layer reads its input from the folder of the layer before even when nothing was interrupted, so a
run that goes on gives the same bits. Weights are mapped, upcast where they are used, and unmapped
with the last layer that uses their pool.

Shapes: S tokens a window, D hidden, E experts, V vocabulary, R = S - 1 - S // 2 scored positions,
those from S // 2 to S - 2: the second half of a window but its last, which has no next token.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megrez_gguf.checkpoint import config as config_module
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.json_file import MALFORMED, load_json
from megrez_gguf.errors import OutputError
from megrez_gguf.machine import available_cpus
from megrez_gguf.text import Say, clip
from megrez_llama.nodes import ENTERS
from megrez_parity import reference
from megrez_parity.reference import CheckpointWeights

Floats = NDArray[np.floating[Any]]

# Up to this many parameters the reference runs in float64.
DOUBLE_LIMIT = 500_000_000
# Activations in memory at a time, which together with one pool of experts is most of what a run
# takes. A window is never cut, so long ones may take more.
_WORKING_BYTES = 1 << 30

# Emitted tensors that are kept, and what their files are called.
_KEPT = {"ffn_norm": "ffn_norm", "l_out": "l_out", "ffn_moe_probs_biased": "scores"}
_MANIFEST, _LOCK, _PARTIAL = "manifest.json", "lock", ".partial"


def precision(weights: CheckpointWeights) -> torch.dtype:
    """What the reference computes `weights` in: float64 up to DOUBLE_LIMIT, beyond it float32."""
    return torch.float64 if weights.parameters <= DOUBLE_LIMIT else torch.float32


def cache_key(
    config: ModelConfig,
    checkpoint: Path,
    windows: Sequence[NDArray[np.int32]],
    weights_sha256: str,
) -> str:
    """Hex digest of what a `StoredReference` of these arguments is computed from."""
    key = _key(config, CheckpointWeights(checkpoint), windows, weights_sha256)
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """What was noted on a stage; see `StoredReference` for the fields."""

    seconds: float = 0.0
    peak_rss: int = 0
    maxima: dict[str, float] = field(default_factory=dict)


def read_record(folder: Path) -> Record | None:
    """The record of the stage in `folder`; None when it is not there or not whole."""
    try:
        raw = load_json((folder / "record.json").read_bytes())
        if any((folder / name).stat().st_size != size for name, size in raw["files"].items()):
            return None
        maxima = {str(name): float(size) for name, size in raw["maxima"].items()}
        return Record(float(raw["seconds"]), int(raw["peak_rss"]), maxima)
    except (OSError, *MALFORMED):
        return None


class StoredReference:
    """The reference's results for token ids `windows`, each `[S]`, in `folder`.

    `weights_sha256` identifies the checkpoint's contents; `say` is told the progress. Call `run()`
    before anything is read.
    Raises CheckpointError when the checkpoint cannot be read, OutputError when `folder` holds
    something else or the results of another checkpoint, text or version of this code; ValueError
    unless all windows are of one length of 3 or more.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Path,
        windows: Sequence[NDArray[np.int32]],
        folder: Path,
        weights_sha256: str,
        say: Say,
    ) -> None:
        if len({len(window) for window in windows}) != 1 or len(windows[0]) < 3:
            raise ValueError("expected windows of one length of at least 3 tokens")
        weights = CheckpointWeights(checkpoint)
        self.folder, self._config, self._say = folder, config, say
        self._key = _key(config, weights, windows, weights_sha256)
        self.dtype: str = self._key["dtype"]
        if weights.dtype != getattr(torch, self.dtype):
            weights = CheckpointWeights(checkpoint, getattr(torch, self.dtype))
        self._weights = weights
        self._tokens = torch.from_numpy(np.stack(windows)).long()  # [windows, S]
        self._mapped: int | None = None  # the pool whose weights are mapped
        self.cached = False
        """Whether `run()` found everything there."""
        self.seconds = 0.0
        """Spent computing, over all runs it took."""
        self.peak_rss = 0
        """Bytes: the most memory a process that computed it had resident by then."""
        self.maxima: dict[tuple[str, int], float] = {}
        """Largest magnitude of activations that enter matrix products, by tensor and layer.

        Names are `reference.forward`'s. `result_norm`, of layer -1, is of scored positions only.
        """
        self._check_folder()

    def run(self) -> None:
        """Compute what is not there yet, and read the totals.

        Raises OutputError when the folder cannot be written.
        """
        stages = [f"layer-{i:02}" for i in range(self._config.num_hidden_layers)] + ["head"]
        self.cached = all(read_record(self.folder / stage) for stage in stages)
        if not self.cached:
            threads = torch.get_num_threads()
            torch.set_num_threads(min(threads, available_cpus()))
            try:
                with self._locked():
                    self._compute([s for s in stages if not read_record(self.folder / s)])
            except OSError as e:
                reason = e.strerror or e
                raise OutputError(
                    f"{self.folder}: the reference cannot be kept: {reason}"
                ) from None
            finally:
                torch.set_num_threads(threads)
                self._weights.reopen()
        records = [read_record(self.folder / stage) or Record() for stage in stages]
        self.seconds = sum(record.seconds for record in records)
        self.peak_rss = max(record.peak_rss for record in records)
        self.maxima = {
            (name, -1 if stage == "head" else layer): size
            for layer, (stage, record) in enumerate(zip(stages, records, strict=True))
            for name, size in record.maxima.items()
        }

    def logits(self, window: int) -> Floats:
        """Logits `[R, V]` of the scored positions, mapped from their file."""
        return self._load("head", "logits", window)

    def state(self, name: str, layer: int, window: int) -> Floats:
        """`name` "ffn_norm" or "l_out" of a layer, `[S, D]`, mapped from its file."""
        return self._load(f"layer-{layer:02}", name, window)

    def scores(self, layer: int, window: int) -> Floats:
        """Scores `[S, E]` that select in a MoE layer: biased, -inf for groups left out."""
        return self._load(f"layer-{layer:02}", "scores", window)

    def _load(self, stage: str, name: str, window: int) -> Floats:
        rows: Floats = np.load(self.folder / stage / f"{name}-{window}.npy", mmap_mode="r")
        return rows

    # --- computing ------------------------------------------------------------------------------

    @torch.no_grad()
    def _compute(self, stages: list[str]) -> None:
        windows, length = self._tokens.shape
        self._say(f"reference: {windows} windows of {length} tokens in {self.dtype}")
        begin = said = time.perf_counter()
        for done, stage in enumerate(stages, 1):
            folder = self.folder / stage
            partial = folder.with_name(stage + _PARTIAL)
            partial.mkdir()
            start = time.perf_counter()
            maxima = (
                self._head(partial) if stage == "head" else self._layer(partial, int(stage[6:]))
            )
            now = time.perf_counter()
            record = {
                "files": {path.name: path.stat().st_size for path in partial.iterdir()},
                "seconds": now - start,
                "peak_rss": _peak_rss(),
                "maxima": maxima,
            }
            (partial / "record.json").write_text(json.dumps(record), encoding="utf-8")
            if folder.exists():
                self._say(f"reference: {folder} was damaged; it is computed anew")
                shutil.rmtree(folder)
            partial.rename(folder)
            if now - said > 1 and done < len(stages):  # a small model needs no progress
                left = (now - begin) / done * (len(stages) - done)
                self._say(f"reference: {stage}, {now - start:.1f} s; about {left:.0f} s left")
                said = now

    def _layer(self, out: Path, layer: int) -> dict[str, float]:
        """Run one layer; keeps its states and scores in `out` and gives its maxima."""
        c, length = self._config, self._tokens.shape[1]
        pool = c.pool_layer(layer) if c.is_moe(layer) else -1
        if pool != self._mapped:
            self._weights.reopen()
            self._mapped = pool
        rope = reference.rotary(c, length, self._weights.dtype)
        # A token's attention scores, its inner states in an MLP, what its experts give.
        mlp = max(c.intermediate_size, c.shared_intermediate_size)
        widest = max(c.num_attention_heads * length, mlp, c.num_experts_per_tok * c.hidden_size)
        maxima: dict[str, float] = {}
        for batch in self._batches(length * widest * 4):  # and what they are made from
            if layer == 0:
                x, previous = reference.embed(self._weights, self._tokens[batch]), None
            else:
                x, previous = (
                    self._states(name, layer - 1, batch) for name in ("l_out", "ffn_norm")
                )
            emit = _keeper(out, batch, maxima)
            reference.block(c, self._weights, layer, x, previous, rope, emit)
        return maxima

    def _head(self, out: Path) -> dict[str, float]:
        """Logits of the scored positions, kept in `out`; gives the maxima."""
        self._weights.reopen()
        self._mapped = None
        length = self._tokens.shape[1]
        maxima: dict[str, float] = {}
        last = self._config.num_hidden_layers - 1
        for batch in self._batches(length * self._config.vocab_size):
            x = self._states("l_out", last, batch)[:, length // 2 : -1]
            emit = _keeper(out, batch, maxima)
            logits = reference.head(self._config, self._weights, x, emit)
            _save(out, "logits", batch, logits)
        return maxima

    def _batches(self, numbers: int) -> Iterator[range]:
        """The windows in ranges that fit `_WORKING_BYTES`, at `numbers` numbers a window."""
        size = max(1, _WORKING_BYTES // (numbers * self._weights.dtype.itemsize))
        for start in range(0, len(self._tokens), size):
            yield range(start, min(start + size, len(self._tokens)))

    def _states(self, name: str, layer: int, batch: range) -> Tensor:
        """`name` of a layer `[B, S, D]`."""
        return torch.from_numpy(np.stack([self.state(name, layer, window) for window in batch]))

    # --- the folder -----------------------------------------------------------------------------

    def _check_folder(self) -> None:
        """Raise OutputError unless the folder is new, empty, or this reference's."""
        try:
            text = (self.folder / _MANIFEST).read_bytes()
        except FileNotFoundError:
            ours = {_LOCK, _MANIFEST + _PARTIAL}
            if self.folder.exists() and {path.name for path in self.folder.iterdir()} - ours:
                raise OutputError(
                    f"{self.folder}: holds files and no {_MANIFEST}, so it is not a reference's; "
                    "choose a folder that is empty or does not exist"
                ) from None
            return
        except OSError as e:
            raise OutputError(
                f"{self.folder}: no folder to keep a reference: {e.strerror}"
            ) from None
        try:
            found = load_json(text)
            other = [name for name in self._key if found.get(name) != self._key[name]]
        except MALFORMED:
            raise OutputError(
                f"{self.folder / _MANIFEST}: damaged; remove the folder or choose another one"
            ) from None
        if other:
            raise OutputError(
                f"{self.folder}: a cache of "
                + ", ".join(
                    f"other {n} ({clip(found.get(n))}, here {clip(self._key[n])})" for n in other
                )
                + "; remove the folder or choose another one"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Make the folder, and be the only one to write to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say(f"waiting for another run that computes {self.folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._check_folder()
            partial = self.folder / (_MANIFEST + _PARTIAL)
            partial.write_text(json.dumps(self._key, indent=2) + "\n", encoding="utf-8")
            partial.rename(self.folder / _MANIFEST)
            for left_over in self.folder.glob("*" + _PARTIAL):
                shutil.rmtree(left_over)
            yield


def _key(
    config: ModelConfig,
    weights: CheckpointWeights,
    windows: Sequence[NDArray[np.int32]],
    weights_sha256: str,
) -> dict[str, Any]:
    """What the results depend on. The number of threads may change last bits and is left out."""
    tokens = np.stack(windows).astype("<i4").tobytes()
    sources = [module.__file__ or "" for module in (config_module, reference)] + [__file__]
    code = b"".join(Path(source).read_bytes() for source in sources)
    return {
        "weights": weights_sha256,
        "configuration": _short(repr(sorted(asdict(config).items())).encode()),
        "context": len(windows[0]),
        "text": _short(tokens),
        "dtype": str(precision(weights)).removeprefix("torch."),
        "code": _short(code),
        "torch": torch.__version__,
    }


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _keeper(out: Path, batch: range, maxima: dict[str, float]) -> reference.Trace:
    """A trace that writes to `out` what is kept of the windows `batch` and raises `maxima`."""

    def keep(name: str, layer: int, tensor: Tensor) -> None:
        if name in ENTERS:  # numpy's maximum keeps NaN
            size = float(tensor.abs().max())
            maxima[name] = float(np.maximum(maxima.get(name, 0.0), size))
        if name in _KEPT:
            _save(out, _KEPT[name], batch, tensor)

    return keep


def _save(out: Path, name: str, batch: range, tensor: Tensor) -> None:
    for window, rows in zip(batch, tensor.numpy(), strict=True):
        np.save(out / f"{name}-{window}.npy", rows)


def _peak_rss() -> int:
    """Bytes. Linux counts what a process was before exec in its ru_maxrss, and not in VmHWM."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text("utf-8").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
