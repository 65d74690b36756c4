"""Convert a checkpoint to several levels and measure each against the torch reference."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megrez_gguf import convert
from megrez_gguf.config import ModelConfig
from megrez_gguf.errors import ConfigError, GGUFError, RuntimeUnavailableError
from megrez_gguf.pipeline import OutType
from megrez_parity.engine import Engine, quantize
from megrez_parity.metrics import Comparison, Metrics
from megrez_runtime.patched import require_patched

try:
    import torch

    from megrez_parity.reference import CheckpointWeights, forward
except ImportError as e:
    raise RuntimeUnavailableError(
        f"parity needs torch and safetensors ({e}); pip install 'megrez-gguf[parity]'"
    ) from None

CONVERTED = ("f32", "bf16", "f16", "q8_0")
QUANTIZED = ("q6_k", "q5_k_m", "q4_k_m", "q4_0")
LEVELS = CONVERTED + QUANTIZED

# Where a figure must not fall; all others must not rise.
_FLOORS = {"same_top_p"}
# Up to this many parameters the reference runs in float64: 8 bytes each must fit in memory.
_DOUBLE_LIMIT = 500_000_000
_WORKING_BYTES = 2 << 30

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One level: its figures, and the thresholds that apply to them."""

    level: str
    file_bytes: int
    metrics: Metrics
    thresholds: dict[str, float]

    @property
    def misses(self) -> list[str]:
        """One sentence for every figure beyond its threshold; NaN always is."""
        found = []
        for name, limit in self.thresholds.items():
            figure = getattr(self.metrics, name)
            floor = name in _FLOORS
            if not (figure >= limit if floor else figure <= limit):
                relation = "below" if floor else "above"
                found.append(f"{self.level}: {name} {figure:.6g} is {relation} {limit:g}")
        return found


@dataclass(frozen=True, slots=True)
class Report:
    """All levels of one checkpoint over the same windows of text."""

    checkpoint: str
    texts: list[str]
    context: int
    windows: int
    reference_dtype: str
    reference_perplexity: float
    made_with: dict[str, str]
    levels: list[LevelResult]

    @property
    def misses(self) -> list[str]:
        return [miss for level in self.levels for miss in level.misses]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `metrics` and `thresholds` of each level beside its name and size."""
        return asdict(self) | {"passed": not self.misses, "misses": self.misses}


def measure(
    checkpoint: Path,
    levels: Sequence[str] = LEVELS,
    texts: Sequence[Path] = (),
    context: int = 512,
    windows: int = 4,
    files: Sequence[Path] = (),
    say: Say = lambda line: None,
) -> Report:
    """Compare `checkpoint` at each level, and existing GGUF `files`, with the torch reference.

    Every text gives up to `windows` windows of `context` tokens from its start; without `texts`,
    the files of a folder `heldout` in or next to the checkpoint. A file is judged by the thresholds
    of the level its file type names. `say` is told what is being done.
    Raises MegrezError: an unknown level, no text or one shorter than a window, a file of another
    vocabulary, and whatever the conversion or llama.cpp raise. A missed threshold is in the report,
    not raised.
    """
    for level in levels:
        if level not in LEVELS:
            raise ConfigError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
    if not levels and not files:
        raise ConfigError("nothing to compare: give a level or a GGUF file")
    if context < 4 or windows < 1:
        raise ConfigError(f"{windows} windows of {context} tokens: expected at least 1 of 4")
    config = ModelConfig.from_folder(checkpoint)
    texts = list(texts) or _default_texts(checkpoint)
    contents = {path: _read(path) for path in texts}
    bounds = thresholds()
    results = []
    with tempfile.TemporaryDirectory(prefix="megrez-parity-") as temporary:
        folder = Path(temporary)
        candidates: list[tuple[str, AbstractContextManager[Path]]] = [
            (str(file), nullcontext(file)) for file in files
        ]
        candidates += [
            (level, _converted(checkpoint, level, folder, say)) for level in dict.fromkeys(levels)
        ]
        reference = _Reference(config, checkpoint, folder)
        tokens: list[NDArray[np.int32]] = []
        for name, candidate in candidates:
            with candidate as path, Engine(path, context) as engine:
                if engine.vocab_size != config.vocab_size:
                    raise GGUFError(
                        f"{path}: {engine.vocab_size} tokens in its vocabulary, expected the "
                        f"checkpoint's {config.vocab_size}"
                    )
                if not tokens:
                    tokens = _windows(engine, contents, context, windows)
                    say(f"reference: {len(tokens)} windows in {reference.dtype}")
                    reference.run(tokens)
                say(f"{name}: {len(tokens)} windows in llama.cpp")
                comparison = Comparison()
                for i, window in enumerate(tokens):
                    comparison.add(reference.logits(i), engine.logits(window), window)
                level = name if name in LEVELS else _level_of(path)
                size = path.stat().st_size
            results.append(LevelResult(name, size, comparison.result(), bounds.get(level, {})))
    return Report(
        checkpoint=str(checkpoint),
        texts=[str(text) for text in texts],
        context=context,
        windows=len(tokens),
        reference_dtype=reference.dtype,
        reference_perplexity=results[0].metrics.reference_perplexity,
        made_with=_made_with(),
        levels=results,
    )


def thresholds() -> dict[str, dict[str, float]]:
    """The committed bounds: level -> metric -> the worst figure that passes."""
    text = resources.files("megrez_parity").joinpath("thresholds.json").read_text("utf-8")
    bounds: dict[str, dict[str, float]] = json.loads(text)
    return bounds


class _Reference:
    """Logits of the reference, computed once for all levels and kept in files."""

    def __init__(self, config: ModelConfig, checkpoint: Path, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._weights = CheckpointWeights(checkpoint)
        self._small = self._weights.parameters <= _DOUBLE_LIMIT
        if self._small:
            self._weights = CheckpointWeights(checkpoint, torch.float64)
        self.dtype = str(self._weights.dtype).removeprefix("torch.")

    @torch.no_grad()
    def run(self, windows: Sequence[NDArray[np.int32]]) -> None:
        """Compute and keep the logits of all `windows`, each `[S]`."""
        c, context = self._config, len(windows[0])
        weights = dict(self._weights) if self._small else self._weights
        # Streamed weights are read once a batch, so a batch is as large as memory allows.
        one = 8 * context * (2 * c.vocab_size + 3 * c.num_attention_heads * context)
        size = max(1, _WORKING_BYTES // one)
        for start in range(0, len(windows), size):
            tokens = torch.from_numpy(np.stack(windows[start : start + size])).long()  # [B, S]
            logits = forward(c, weights, tokens).numpy()  # [B, S, V]
            for i, rows in enumerate(logits, start):
                np.save(self._folder / f"reference-{i}.npy", rows)

    def logits(self, window: int) -> NDArray[np.floating[Any]]:
        """Logits `[S, V]` of one window, mapped from its file."""
        rows: NDArray[np.floating[Any]] = np.load(
            self._folder / f"reference-{window}.npy", mmap_mode="r"
        )
        return rows


@contextmanager
def _converted(checkpoint: Path, level: str, folder: Path, say: Say) -> Iterator[Path]:
    """`checkpoint` as a GGUF file at `level`, removed afterwards."""
    path = folder / f"{level}.gguf"
    if level in CONVERTED:
        say(f"{level}: converting")
        convert(checkpoint, path, outtype=cast(OutType, level))
    else:
        source = folder / "source.gguf"
        if not source.exists():
            say("converting, for the quantizer")
            convert(checkpoint, source, outtype="auto")
        say(f"{level}: quantizing")
        quantize(source, path, level)
    yield path
    path.unlink()


def _level_of(path: Path) -> str:
    """The level a file's own file type names, or "" for one there are no thresholds for."""
    from gguf import GGUFReader, LlamaFileType

    try:
        kind = LlamaFileType(GGUFReader(path).fields["general.file_type"].contents())
    except (KeyError, ValueError):
        return ""
    return str(kind.name).removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def _made_with() -> dict[str, str]:
    return {
        "llama_cpp": str(require_patched().__version__),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}",
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _default_texts(checkpoint: Path) -> list[Path]:
    folder = checkpoint.resolve()
    for place in (folder, folder.parent):
        if found := sorted(place.glob("heldout/*.txt")):
            return found
    raise ConfigError(
        f"{checkpoint}: no heldout/*.txt in it or next to it; name a text with --text FILE"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {e}") from None


def _windows(
    engine: Engine, texts: Mapping[Path, str], context: int, count: int
) -> list[NDArray[np.int32]]:
    """Consecutive windows of `context` tokens from the start of each text, at most `count` each."""
    found = []
    for path, text in texts.items():
        tokens = engine.tokenize(text)
        if len(tokens) < context:
            raise ConfigError(
                f"{path}: {len(tokens)} tokens, shorter than one window of {context}; "
                "give a longer text or a smaller --ctx"
            )
        for start in range(0, min(len(tokens) // context, count) * context, context):
            window = tokens[start : start + context].copy()
            if engine.bos is not None:
                window[0] = engine.bos
            found.append(window)
    return found
