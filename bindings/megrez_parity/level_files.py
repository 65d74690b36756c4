"""Makes a checkpoint's GGUF file at each quantization level, one at a time.

A level is named like llama.cpp's file types, e.g. "q4_k_m"; "q4_k_m+imatrix" is the same types,
with rounding weighted by an importance matrix. "recipe:NAME" is a mix of types, ours or from a file
"recipe:FILE.toml"; with "+imatrix" it is rounded by feedback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megrez_gguf import convert
from megrez_gguf.conversion.metadata import RECIPE
from megrez_gguf.errors import ConfigError
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.quantization import imatrix, levels, recipe
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.levels import EITHER, FLOATS, PLAIN, WEIGHTED
from megrez_gguf.quantization.types import Fallback
from megrez_gguf.text import Say, silent
from megrez_runtime.calibration import collect

IMATRIX = "+imatrix"
PREFIX = "recipe:"

RECIPES = tuple(PREFIX + name for name in recipe.names())

# All that can be made, beside recipes from files.
KNOWN = (*PLAIN, *EITHER, *RECIPES, *(n + IMATRIX for n in (*EITHER, *WEIGHTED, *RECIPES)))
# Compared unless others are asked for.
LEVELS = (
    *FLOATS,
    "q8_0",
    *("q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl", "iq4_xs"),
    *("mxfp4_moe", "q3_k_m", "q2_k"),
    *RECIPES,
    *("q4_k_m+imatrix", "iq4_xs+imatrix", "q3_k_m+imatrix", "q2_k+imatrix"),
)


@dataclass(frozen=True, slots=True)
class Made:
    """A level's file, and the tensors in it that could not have the type they should."""

    path: Path
    fallbacks: list[Fallback]


def listed(text: str) -> list[str]:
    """The levels in a list with commas, each once, as `canonical` spells them.

    Raises ConfigError for a list of none.
    """
    found = [canonical(name) for name in text.split(",") if name.strip()]
    if not found:
        raise ConfigError(f"{text!r}: expected a level, or several with commas between them")
    return list(dict.fromkeys(found))


def canonical(level: str) -> str:
    """`level` as it is spelled here, known or not: "q4_k_m+imatrix" for " Q4_K+IMATRIX"."""
    name = level.strip()
    weighted = name.lower().endswith(IMATRIX)
    base = name[: -len(IMATRIX)] if weighted else name
    is_recipe = base.lower().startswith(PREFIX)  # what follows may be a file's name
    base = PREFIX + base[len(PREFIX) :] if is_recipe else levels.spelled(base)
    return base + IMATRIX * weighted


def check(level: str, *, calibrated: bool = True) -> None:
    """Raise ConfigError unless `level` names one that can be made.

    `calibrated` tells whether there is what an importance matrix comes from.
    """
    base = level.removesuffix(IMATRIX)
    if base.startswith(PREFIX):
        recipe.load(base.removeprefix(PREFIX))
    elif level not in KNOWN:
        if base in WEIGHTED:
            raise ConfigError(
                f"level {level!r} needs an importance matrix: ask for {base}{IMATRIX}"
            )
        if base in PLAIN:
            raise ConfigError(f"level {level!r}: an importance matrix changes nothing in {base}")
        raise ConfigError(
            f"unknown level {level!r}; {levels.suggestion(base)}"
            f"known: {', '.join((*PLAIN, *EITHER, *RECIPES))}; and "
            f"with {IMATRIX} after the name: {', '.join((*EITHER, *WEIGHTED, *RECIPES))}; and "
            f"{PREFIX}FILE.toml"
        )
    if base != level and not calibrated:
        raise ConfigError(
            f"level {level!r} needs an importance matrix: give its file, or a "
            "longer text, whose tokens beyond the windows it can be made of",
            option="imatrix",
        )


class Maker:
    """Makes the levels of one checkpoint in `folder`, keeping their importance matrix.

    Importance matrices come from `imatrix_file`, as llama-imatrix writes it, or else from running
    the checkpoint over `calibration`, windows `[S]` of token ids. `say` is told what is being done.
    Nothing stays in `folder`. Raises what `imatrix.load` does.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        *,
        say: Say = silent,
        calibration: Sequence[NDArray[np.int32]] = (),
        imatrix_file: Path | None = None,
    ) -> None:
        self._checkpoint, self._folder, self._say = checkpoint, folder, say
        self._calibration = calibration
        self._given = imatrix.load(imatrix_file) if imatrix_file else None
        self._made: dict[bool, Imatrix] = {}  # by whether they have products

    @contextmanager
    def make(self, level: str) -> Iterator[Made]:
        """The checkpoint at `level`, in a file that is removed on leaving.

        Raises ConfigError as `check` does, and what converting, quantizing and loading raise.
        """
        check(level, calibrated=self._given is not None or len(self._calibration) > 0)
        path = self._folder / f"{level.replace('/', '-')}.gguf"
        try:
            yield Made(path, self._make(level, path))
        finally:
            path.unlink(missing_ok=True)

    def _make(self, level: str, path: Path) -> list[Fallback]:
        base = level.removesuffix(IMATRIX)
        mix = recipe.load(base.removeprefix(PREFIX)) if base.startswith(PREFIX) else None
        weights = None
        if base != level:
            weights = self._weights(products=mix is not None)
        self._say(f"{level}: converting")
        if mix:
            done = convert(self._checkpoint, path, imatrix=weights, recipe=mix, allow_zeros=True)
        else:
            done = convert(self._checkpoint, path, outtype=base, imatrix=weights, allow_zeros=True)
        return [replace(f, wanted=_ggml(f.wanted), got=_ggml(f.got)) for f in done.fallbacks]

    def _weights(self, *, products: bool) -> Imatrix:
        if self._given:
            return self._given
        if products not in self._made:
            windows = self._calibration
            self._say(f"importance matrix: {len(windows)} windows in llama.cpp")
            source = self._folder / "source.gguf"
            try:
                convert(self._checkpoint, source, allow_zeros=True)
                self._made[products] = collect(
                    source,
                    windows,
                    n_ctx=max(map(len, windows)),
                    process_output=products,
                    products=products,
                )
            finally:
                source.unlink(missing_ok=True)
        return self._made[products]


def types_of(path: Path) -> dict[str, int]:
    """Bytes in tensors of each ggml type, e.g. "q4_K", the largest first. Raises GGUFError."""
    sizes: dict[str, int] = {}
    for tensor in GGUFFile.open(path).tensors:
        name = _ggml(tensor.dtype)
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def level_of(path: Path) -> str:
    """The level that a file's own keys name, or "" when they name none. Raises GGUFError."""
    values = GGUFFile.open(path).values
    base = levels.level_of(values.get("general.file_type"))
    if RECIPE in values:
        base = f"{PREFIX}{values[RECIPE]}"
    # Left in the file by what was given an importance matrix to make it.
    weighted = base in WEIGHTED or "quantize.imatrix.entries_count" in values
    return next(
        (n for n in (base + IMATRIX * weighted, base) if n in KNOWN or RECIPE in values), ""
    )


def _ggml(name: str) -> str:
    """ggml's spelling of a type's name: "q4_K" for "Q4_K"."""
    return re.sub("k$", "K", name.lower())
