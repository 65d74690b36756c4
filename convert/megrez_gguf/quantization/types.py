"""llama.cpp's choice of a type for every tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megrez_gguf.errors import OutputError
from megrez_gguf.format.writer import KeyValues, TensorInfo, header
from megrez_gguf.quantization import levels
from megrez_gguf.quantization.encode import type_number, type_numbers, type_size
from megrez_llama import quantizer

Overrides = Sequence[tuple[str, str]]
"""Regular expressions searched for in tensor names, and the types of the tensors they match."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """A tensor whose rows do not fill the blocks of the type its level asks for."""

    tensor: str
    wanted: str
    got: str
    nbytes: int
    extra_bytes: int
    """Bytes more than the type wanted would take, were its blocks divisible."""


@dataclass(frozen=True, slots=True)
class Types:
    """The type of each tensor, e.g. "Q4_K", and those that could not have the one they should."""

    chosen: Mapping[str, str]
    fallbacks: tuple[Fallback, ...] = ()


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

    Asks the quantizer itself, which gets a header and no data. Raises OutputError when it fails,
    RuntimeUnavailableError without the patched llama_cpp.
    """
    # The vocabulary has no say.
    values = {k: v for k, v in values.items() if not k.startswith("tokenizer.")}
    try:
        numbers = quantizer.choose_types(
            header(values, tensors),
            len(tensors),
            levels.file_type(level),
            weighted=weighted,
            overrides=[(pattern, type_number(kind)) for pattern, kind in overrides],
        )
    except ValueError as e:
        raise OutputError(f"llama.cpp cannot quantize this model to {level}: {e}") from None
    names = {number: name for name, number in type_numbers().items()}
    chosen, fallbacks = {}, []
    for tensor, (got, wanted) in zip(tensors, numbers, strict=True):
        chosen[tensor.name] = names[got]
        if wanted in names:
            fallbacks.append(_fallback(tensor, names[wanted], names[got]))
    return Types(chosen, tuple(fallbacks))


def _fallback(tensor: TensorInfo, wanted: str, got: str) -> Fallback:
    size = math.prod(tensor.shape)
    (block, nbytes), (wanted_block, wanted_bytes) = type_size(got), type_size(wanted)
    stored = size // block * nbytes
    extra = stored - round(size / wanted_block * wanted_bytes)
    return Fallback(tensor.name, wanted, got, stored, extra)
