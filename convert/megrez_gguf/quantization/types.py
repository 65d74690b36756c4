"""llama.cpp's choice of a type for every tensor, asked of its quantizer."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.errors import OutputError
from megrez_gguf.format.writer import KeyValues, TensorInfo, header, padded
from megrez_gguf.quantization import levels
from megrez_gguf.quantization.encode import type_number, type_numbers
from megrez_llama.logs import log
from megrez_llama.patched import require_patched

Overrides = Sequence[tuple[str, str]]
"""Regular expressions searched for in tensor names, and the types of the tensors they match."""

_TYPE = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[.*?\], type = +(?P<own>\S+), "
    r"size = +\S+ MiB(?: -> +\S+ MiB \((?P<new>\S+)\))?"
)
_FALLBACK = re.compile(
    r"warning: (?P<tensor>\S+) +- ncols .*\(required for type +(?P<wanted>\S+)\)"
    r".*-> falling back to +(?P<got>\S+)"
)
_FALLBACKS = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")


@dataclass(frozen=True, slots=True)
class Types:
    """The type of each tensor, e.g. "Q4_K", and the one wanted where its rows cannot hold that."""

    chosen: Mapping[str, str]
    wanted: Mapping[str, str]


def choose_types(
    values: KeyValues,
    tensors: Sequence[TensorInfo],
    level: str,
    *,
    weighted: bool = False,
    overrides: Overrides = (),
) -> Types:
    """What llama-quantize would store each of `tensors` as, at `level`.

    `values` are the key-values of the model's file, `tensors` its unquantized tensors; `weighted`
    tells that there is an importance matrix. `overrides` are llama-quantize's `--tensor-type`.

    Asks the quantizer itself, in a dry run on a file with that header and no data: no disk is used.
    Raises OutputError when it fails, RuntimeUnavailableError without the patched llama_cpp.
    """
    llama = require_patched()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = levels.file_type(level), 1, True
    kept = []  # what llama.cpp holds bare pointers to
    if weighted:
        # It looks only whether there is one.
        entries = (llama.llama_model_imatrix_data * 2)()
        number = ctypes.c_float(1)
        entries[0].name, entries[0].size, entries[0].data = b"-", 1, ctypes.pointer(number)
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
        kept += [entries, number]
    if overrides:
        types = (llama.llama_model_tensor_override * (len(overrides) + 1))()
        for entry, (pattern, kind) in zip(types, overrides, strict=False):
            entry.pattern, entry.type = pattern.encode(), type_number(kind)
        params.tt_overrides = ctypes.cast(types, type(params.tt_overrides))
        kept.append(types)
    # The vocabulary has no say.
    values = {k: v for k, v in values.items() if not k.startswith("tokenizer.")}
    log.install(llama)
    with _sparse_file(values, tensors) as path, log.listening() as lines:
        failed = llama.llama_model_quantize(os.fsencode(path), b"", ctypes.byref(params))
        text = lines()
    if failed:
        reason = log.take_errors() or "llama.cpp gives no reason"
        raise OutputError(f"llama.cpp cannot quantize this model to {level}: {reason}")
    return _parse(text, tensors)


def _parse(lines: Sequence[str], tensors: Sequence[TensorInfo]) -> Types:
    chosen: dict[str, str] = {}
    for match in map(_TYPE.search, lines):
        if match:
            chosen[match["name"]] = (match["new"] or match["own"]).upper()
    fallbacks = [match for match in map(_FALLBACK.search, lines) if match]
    announced = sum(int(match[1]) for match in map(_FALLBACKS.search, lines) if match)
    known = type_numbers().keys()
    if (
        chosen.keys() != {t.name for t in tensors}
        or not known >= set(chosen.values())
        or len(fallbacks) != announced
        or any(chosen[m["tensor"]] != m["got"].upper() for m in fallbacks)
    ):
        raise OutputError(
            "llama.cpp's quantizer does not report the types it chose as expected: this llama_cpp "
            "is not the pinned version. Reinstall the patched llama-cpp-python"
        )
    return Types(chosen, {m["tensor"]: m["wanted"].upper() for m in fallbacks})


@contextmanager
def _sparse_file(values: KeyValues, tensors: Sequence[TensorInfo]) -> Iterator[Path]:
    """A file of the right size with only a header in it."""
    head = header(values, tensors)
    size = sum(padded(t.nbytes) for t in tensors)
    with tempfile.TemporaryDirectory(prefix="megrez-gguf-") as folder:
        path = Path(folder) / "header.gguf"
        try:
            with path.open("wb") as file:
                file.write(head)
                file.truncate(len(head) + size)
        except OSError as e:
            raise OutputError(
                f"{path}: no sparse file of {len(head) + size} bytes can be made here "
                f"({e.strerror}); set TMPDIR to a folder on another file system"
            ) from None
        yield path
