"""Makes a checkpoint's GGUF file at each quantization level, one at a time.

A level is named like llama.cpp's file types, e.g. "q4_k_m"; "q4_k_m+imatrix" is the same types,
with rounding weighted by an importance matrix.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from megrez_gguf import convert
from megrez_gguf.errors import ConfigError, OutputError
from megrez_gguf.gguf_file import GGUFFile
from megrez_gguf.logs import log
from megrez_gguf.machine import available_cpus
from megrez_gguf.patched import require_patched
from megrez_gguf.pipeline import OutType
from megrez_parity import imatrix
from megrez_parity.imatrix import Imatrix
from megrez_parity.results import Fallback

Say = Callable[[str], None]
IMATRIX = "+imatrix"

# Written by the converter; all others by llama.cpp's quantizer.
CONVERTED = ("f32", "bf16", "f16", "q8_0")
# An importance matrix changes nothing in these, ...
_PLAIN = (*CONVERTED, "mxfp4_moe")
# ... may be used for these, ...
_EITHER = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "q2_k"),
    *("tq2_0", "tq1_0"),
)
# ... and llama.cpp makes these with one only.
_WEIGHTED = (
    *("iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"),
)
# All that can be made. nvfp4 has no quantizer, q1_0 does not fit the widths of Megrez2, and the
# gguf package does not know q2_0 yet.
KNOWN = (*_PLAIN, *_EITHER, *(name + IMATRIX for name in (*_EITHER, *_WEIGHTED)))
# Compared unless others are asked for.
LEVELS = (
    *CONVERTED,
    *("q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl", "iq4_xs"),
    *("mxfp4_moe", "q3_k_m", "q2_k"),
    *("q4_k_m+imatrix", "iq4_xs+imatrix", "q3_k_m+imatrix", "q2_k+imatrix"),
)

_FALLBACK = re.compile(
    r"warning: (?P<tensor>\S+) +- ncols .*\(required for type +(?P<wanted>\S+)\)"
    r".*-> falling back to +(?P<got>\S+)"
)
_FALLBACKS = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")


@dataclass(frozen=True, slots=True)
class Made:
    """A level's file, and the tensors in it that could not have the type they should."""

    path: Path
    fallbacks: list[Fallback]


def check(level: str, calibrated: bool = True) -> None:
    """Raise ConfigError unless `level` names one that can be made.

    `calibrated` tells whether there is what an importance matrix comes from.
    """
    base = level.removesuffix(IMATRIX)
    if level in KNOWN:
        if base != level and not calibrated:
            raise ConfigError(
                f"level {level!r} needs an importance matrix: give its file with --imatrix, or a "
                "longer text, whose tokens beyond the windows it can be made of"
            )
        return
    if base in _WEIGHTED:
        raise ConfigError(f"level {level!r} needs an importance matrix: ask for {base}{IMATRIX}")
    if base in _PLAIN:
        raise ConfigError(f"level {level!r}: an importance matrix changes nothing in {base}")
    raise ConfigError(
        f"unknown level {level!r}; known: {', '.join((*_PLAIN, *_EITHER))}; and with "
        f"{IMATRIX} after the name: {', '.join((*_EITHER, *_WEIGHTED))}"
    )


class Maker:
    """Makes the levels of one checkpoint in `folder`, keeping what several of them start from.

    Importance matrices come from `imatrix_file`, as llama-imatrix writes it, or else from running
    the checkpoint over `calibration`, windows `[S]` of token ids. `say` is told what is being done.
    A context manager, which leaves nothing in `folder`. Raises what `imatrix.load` does.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        say: Say = lambda line: None,
        calibration: Sequence[NDArray[np.int32]] = (),
        imatrix_file: Path | None = None,
    ) -> None:
        self._checkpoint, self._folder, self._say = checkpoint, folder, say
        self._calibration = calibration
        self._source = folder / "source.gguf"
        self._imatrix = imatrix.load(imatrix_file) if imatrix_file else None

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *error: object) -> None:
        self._source.unlink(missing_ok=True)

    @contextmanager
    def make(self, level: str) -> Iterator[Made]:
        """The checkpoint at `level`, in a file that is removed on leaving.

        Raises ConfigError as `check` does, and what converting, quantizing and loading raise.
        """
        check(level, self._imatrix is not None or len(self._calibration) > 0)
        path = self._folder / f"{level}.gguf"
        try:
            yield Made(path, self._make(level, path))
        finally:
            path.unlink(missing_ok=True)

    def _make(self, level: str, path: Path) -> list[Fallback]:
        base = level.removesuffix(IMATRIX)
        if base in CONVERTED:
            self._say(f"{level}: converting")
            done = convert(self._checkpoint, path, outtype=cast(OutType, base))
            return _fallbacks(path, [(name, base, "f16") for name in done.fallbacks])
        weights = self._weights() if base != level else None
        source = self._converted()
        self._say(f"{level}: quantizing")
        return quantize(source, path, base, weights)

    def _converted(self) -> Path:
        """The checkpoint in its own type, for the quantizer."""
        if not self._source.exists():
            self._say("converting, for the quantizer")
            convert(self._checkpoint, self._source, outtype="auto")
        return self._source

    def _weights(self) -> Imatrix:
        if self._imatrix is None:
            source, windows = self._converted(), self._calibration
            self._say(f"importance matrix: {len(windows)} windows in llama.cpp")
            self._imatrix = imatrix.collect(source, windows, max(map(len, windows)))
        return self._imatrix


def quantize(
    source: Path, target: Path, kind: str, weights: Imatrix | None = None
) -> list[Fallback]:
    """Write `source` quantized by llama.cpp's own quantizer, e.g. to `kind` "q4_k_m", as `target`.

    Returns the tensors whose rows do not fill the blocks of the type they should have, as the
    quantizer names them. Raises OutputError when it fails, ConfigError when `weights` are of
    another model; `target` is then gone.
    """
    llama = require_patched()
    params = llama.llama_model_quantize_default_params()
    params.ftype = _file_types()[kind]
    params.nthread = available_cpus()
    entries = None
    if weights:
        _check_weights(source, weights)
        # Contiguous float32, which `weights` keeps alive; ends with an entry of zeros.
        kept = {name.encode(): np.ascontiguousarray(x) for name, x in weights.means.items()}
        entries = (llama.llama_model_imatrix_data * (len(kept) + 1))()
        pointer = ctypes.POINTER(ctypes.c_float)
        for entry, (name, values) in zip(entries, kept.items(), strict=False):
            entry.name, entry.size = name, values.size
            entry.data = values.ctypes.data_as(pointer)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama.llama_model_imatrix_data))
    log.install(llama)
    names = os.fsencode(source), os.fsencode(target)
    try:
        if llama.llama_model_quantize(*names, ctypes.byref(params)) != 0:
            reason = log.take_errors() or "llama.cpp gives no reason"
            raise OutputError(f"{target}: quantizing {source.name} to {kind} failed: {reason}")
        return _fallbacks(target, _announced(target, log.take_warnings()))
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _check_weights(source: Path, weights: Imatrix) -> None:
    """Every matrix of the layers must have its weights: llama.cpp goes on without."""
    if not source.is_file():
        return  # the quantizer says so
    for tensor in GGUFFile.open(source).tensors:
        name = tensor.name
        if not name.startswith("blk.") or not name.endswith(".weight") or len(tensor.shape) < 2:
            continue
        shape = (math.prod(tensor.shape[:-2]), tensor.shape[-1])
        found = weights.means[name].shape if name in weights.means else None
        if found != shape:
            raise ConfigError(
                f"the importance matrix is of another model: for {name} it has {found or 'nothing'}"
                f", expected {shape}"
            )


def _announced(path: Path, lines: Collection[str]) -> list[tuple[str, str, str]]:
    """Tensor, wanted and chosen type of each fallback in the quantizer's log."""
    found = [(m["tensor"], m["wanted"], m["got"]) for m in map(_FALLBACK.search, lines) if m]
    total = sum(int(match[1]) for match in map(_FALLBACKS.search, lines) if match)
    if len(found) != total:
        raise OutputError(
            f"{path}: the quantizer counts {total} fallbacks, and {len(found)} are named in its "
            "log: this llama_cpp is not the pinned version. Reinstall the patched llama-cpp-python"
        )
    return found


def _fallbacks(path: Path, named: Collection[tuple[str, str, str]]) -> list[Fallback]:
    """With the sizes of the tensors in `path`, whose types must be as named."""
    if not named:
        return []
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors = {tensor.name: tensor for tensor in GGUFFile.open(path).tensors}
    found = []
    for name, wanted, got in named:
        tensor = tensors[name]
        if tensor.type != got.upper():
            raise OutputError(f"{path}: {name} was to fall back to {got}, but is {tensor.type}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[wanted.upper()]]
        extra = tensor.nbytes - round(math.prod(tensor.shape) / block * size)
        found.append(Fallback(name, wanted, got, tensor.nbytes, extra))
    return found


def types_of(path: Path) -> dict[str, int]:
    """Bytes in tensors of each ggml type, e.g. "q4_K", the largest first. Raises GGUFError."""
    sizes: dict[str, int] = {}
    for tensor in GGUFFile.open(path).tensors:
        name = re.sub("k$", "K", tensor.type.lower())
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def level_of(path: Path) -> str:
    """The level that a file's own keys name, or "" when they name none. Raises GGUFError."""
    values = GGUFFile.open(path).values
    number = values.get("general.file_type")
    base = next((name for name, kind in _file_types().items() if kind == number), "")
    # llama-quantize leaves its keys where it was given an importance matrix.
    weighted = base in _WEIGHTED or "quantize.imatrix.entries_count" in values
    return next((n for n in (base + IMATRIX * weighted, base) if n in KNOWN), "")


def _file_types() -> Mapping[str, int]:
    """llama.cpp's number of every file type, by its name in lower case."""
    llama = require_patched()
    types = {}
    for name, number in vars(llama).items():
        if match := re.fullmatch("LLAMA_FTYPE_(?:MOSTLY|ALL)_(.+)", name):
            types[match[1].lower()] = int(number)
    return types
