"""Convert a checkpoint to several levels and measure each against the torch reference.

The way of the data: texts become windows of token ids (`windows`), the reference runs over them
once (`stream`), then each level is made (`levels`), run by llama.cpp (`engine`) and compared window
by window (`metrics`, `routing`). Other engines run the checkpoint itself (`engines`). Tensors for a
trace wait on disk until all levels are done.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.checkpoint.tokenizer import UNUSED, Vocabulary
from megrez_gguf.conversion import copies, layout, metadata
from megrez_gguf.errors import ConfigError, GGUFError, OutputError, RuntimeUnavailableError
from megrez_gguf.format.model_check import open_checked
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.machine import available_cpus
from megrez_gguf.text import Say, silent
from megrez_llama import ARCH
from megrez_llama.engine import Engine
from megrez_llama.nodes import ROUTING, TRACED
from megrez_llama.patched import require_gpu
from megrez_parity.answers import read as read_answers
from megrez_parity.engines import EngineProcess, EngineSpec
from megrez_parity.level_files import LEVELS, Made, Maker, canonical, check, level_of, types_of
from megrez_parity.provenance import cache_folder, checkpoint_sha256, file_sha256, provenance
from megrez_parity.results import LevelResult, ParityReport, ReferenceRun
from megrez_parity.thresholds import Scope, Thresholds
from megrez_parity.windows import Corpus, read_corpus

try:
    from megrez_parity import tracing
    from megrez_parity.audit import audit
    from megrez_parity.metrics import Comparison
    from megrez_parity.reference_store import StoredReference, cache_key
    from megrez_parity.routing import Nodes, RoutingComparison, routers
except ImportError as e:
    raise RuntimeUnavailableError(
        f"parity needs torch and safetensors ({e}); pip install 'megrez-gguf[parity]'"
    ) from None


# A checkpoint of this size takes minutes, so its reference is kept for the next run.
_KEEP_BYTES = 1 << 30
# Where a file differs in these it is another model, not a damaged one.
_SHAPE = ("embedding_length", "block_count", "attention.head_count", "expert_count")


def measure(
    checkpoint: str | os.PathLike[str],
    *,
    levels: Sequence[str] = LEVELS,
    texts: Sequence[Path] = (),
    files: Sequence[Path] = (),
    engines: Sequence[str] = (),
    answers: Path | None = None,
    n_ctx: int = 512,
    n_windows: int = 4,
    trace: bool = False,
    cache: Path | None = None,
    imatrix: Path | None = None,
    thresholds: Path | None = None,
    expert_cache: int | None = None,
    expert_margins: Sequence[float] = (),
    n_gpu_layers: int = 0,
    revision: str | None = None,
    command: str = "",
    say: Say = silent,
) -> ParityReport:
    """Compare a checkpoint at each level, GGUF `files` and other `engines` with a torch reference.

    Every text gives up to `n_windows` windows of `n_ctx` tokens from its start; without `texts`,
    the files of a folder `heldout` in or next to the checkpoint, which may be a repository: see
    `hub.resolve`, to which `revision` goes. A file is judged by the thresholds of the level its
    file type names. `trace` looks for the tensor that errs first. `cache` is a folder for the
    reference's results, by default one in the user's cache for large checkpoints and a temporary
    one for small. `imatrix` is an importance matrix for the levels that ask for one, by default
    collected on the texts beyond the windows. `thresholds` replaces the committed bounds, which
    apply to what they were set on (`thresholds.Scope`). `command` is recorded, `say` is told what
    is being done.

    With `expert_cache`, bytes of experts in memory, every file is run once more for each of
    `expert_margins`, token by token as in an answer: what preferring experts in memory costs, and
    what 0 does, which is exact. All other margins have no thresholds; `say` is told their speed.
    `n_gpu_layers` is as for `megrez_llama.engine.Engine`. `engines` run the checkpoint itself
    (`engines.EngineSpec`), are held to the bounds of the level that has their precision, and are
    not traced. `answers` is a folder that `megrez-gguf eval` wrote, for the report.

    Raises MegrezError: margins without a cache, an unknown level, no text or one shorter than a
    window, a file of another model or vocabulary, a cache of another reference, and whatever the
    conversion or llama.cpp raise. A missed threshold is in the report, not raised.
    """
    if not levels and not files and not engines:
        raise ConfigError("nothing to compare: give a level, a GGUF file or an engine")
    if n_ctx < 4 or n_windows < 1:
        raise ConfigError(f"{n_windows} windows of {n_ctx} tokens: expected at least 1 of 4")
    if expert_margins and expert_cache is None:
        raise ConfigError("expert margins need an expert cache: give its size")
    if n_gpu_layers:
        require_gpu()  # here, not after the reference: that can take an hour
    specs = [EngineSpec.parse(text) for text in dict.fromkeys(engines)]
    answered = read_answers(answers) if answers else None
    bounds = Thresholds.load(thresholds)
    source = Checkpoint.find(checkpoint, revision=revision, say=say)
    config, folder = source.config, source.folder
    # Every tensor is there, in its shape, and the same wherever it is stored.
    copies.check(layout.plan(source).copies, say)
    corpus = read_corpus(source, texts, n_ctx=n_ctx, n_windows=n_windows)
    levels = [canonical(level) for level in levels]
    for level in levels:
        check(level, calibrated=bool(imatrix or corpus.calibration))
    for file in files:
        _check_file(file, config, corpus.vocabulary)
    say("hashing the checkpoint")
    weights = checkpoint_sha256(source)
    tokens = [window.tokens for window in corpus.windows]
    calibration = [window.tokens for window in corpus.calibration]
    large = sum(shard.size for shard in source.shards) >= _KEEP_BYTES
    with ExitStack() as stack:
        scratch = stack.enter_context(_scratch(large))
        if cache is None:
            key = cache_key(config, folder, tokens, weights)
            cache = (cache_folder() / "parity" if large else scratch / "reference") / key
        # Before the reference: an importance matrix that cannot be read is told at once.
        maker = Maker(folder, scratch, say=say, calibration=calibration, imatrix_file=imatrix)
        reference = StoredReference(config, folder, tokens, cache, weights, say)
        reference.run()
        judge = _Judge(config, folder, corpus, reference, scratch, trace, n_gpu_layers)
        results: list[LevelResult] = []
        priced = set()  # rows that route as nobody's router says

        def add(name: str, kind: str, made: Made, making: float) -> None:
            say(f"{name}: {len(tokens)} windows in llama.cpp")
            results.append(judge.level(name, kind, made, making))
            for margin in dict.fromkeys(expert_margins):
                label = f"{name}, margin {margin:g}"
                row = judge.level(label, kind, made, 0.0, expert_cache, margin)
                if margin:
                    priced.add(label)
                rate = sum(map(len, tokens)) / row.seconds["forward"]
                say(f"{row.level}: {rate:.1f} tok/s")
                results.append(row)

        for file in dict.fromkeys(files):
            add(str(file), level_of(file), Made(file, []), 0.0)
        for spec in specs:
            say(f"{spec.text}: starting it")
            begin = time.perf_counter()
            with EngineProcess(spec, folder, n_ctx, scratch) as process:
                took = time.perf_counter() - begin
                say(f"{spec.text}: {len(tokens)} windows in {process.version}")
                results.append(judge.engine(spec, process, weights, took))
        for level in dict.fromkeys(levels):
            begin = time.perf_counter()
            with maker.make(level) as made:
                add(level, level, made, time.perf_counter() - begin)
        run = Scope(weights, n_ctx, {text.sha256: text.windows for text in corpus.texts})
        if lacking := bounds.scope.lacks(run):
            say(
                "levels are judged by what holds for any model and text: their thresholds were set "
                f"on {lacking}"
            )
        results = [
            replace(r, thresholds={} if r.level in priced else _bounds(r, bounds.of(r.kind, run)))
            for r in results
        ]
        if trace:
            say("tracing, layer by layer")
            tolerances = {r.level: bounds.tolerances(r.kind, run) for r in results}
            results = judge.traced(results, tolerances)
        return ParityReport(
            checkpoint=os.fspath(checkpoint),
            context=n_ctx,
            texts=corpus.texts,
            reference=ReferenceRun(
                dtype=reference.dtype,
                seconds=reference.seconds,
                peak_rss=reference.peak_rss,
                cached=reference.cached,
                cache="" if cache.is_relative_to(scratch) else str(cache),
            ),
            audit=audit(source, reference),
            provenance=provenance(weights, command),
            levels=results,
            answers=answered,
        )


def _bounds(result: LevelResult, bounds: dict[str, float]) -> dict[str, float]:
    """Those `bounds` whose figures there are: an engine may not tell its experts."""
    return {k: v for k, v in bounds.items() if k != "unfaithful" or result.routing}


@contextmanager
def _scratch(large: bool) -> Iterator[Path]:
    """A temporary folder; for what is `large`, not in /tmp, which may be memory."""
    place = None
    if large and "TMPDIR" not in os.environ:
        place = cache_folder() / "parity"
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{place}: cannot be made: {e.strerror}; set TMPDIR") from None
    with tempfile.TemporaryDirectory(prefix="megrez-parity-", dir=place) as folder:
        yield Path(folder)


class _Judge:
    """Runs files over the windows and compares them with the reference."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Path,
        corpus: Corpus,
        reference: StoredReference,
        scratch: Path,
        trace: bool,
        n_gpu_layers: int,
    ) -> None:
        self._n_gpu_layers = n_gpu_layers
        self._config, self._checkpoint = config, checkpoint
        self._corpus, self._reference, self._scratch = corpus, reference, scratch
        self._routers = routers(config, checkpoint)
        first = {window.domain: i for i, window in reversed([*enumerate(corpus.windows)])}
        self._traced = sorted(first.values()) if trace else []  # one window of each text
        self._nodes: dict[str, list[Nodes]] = {}
        self._serial = count()

    def level(
        self,
        name: str,
        kind: str,
        made: Made,
        making: float,
        expert_cache: int | None = None,
        expert_margin: float = 0.0,
    ) -> LevelResult:
        """What `made` computes, by every measure; thresholds and trace are left out.

        With an `expert_cache` token by token, as a margin concerns nothing else.
        """
        with Engine(
            made.path,
            len(self._corpus.windows[0].tokens),
            n_threads=available_cpus(),
            expert_cache=expert_cache,
            expert_margin=expert_margin,
            batch_size=1 if expert_cache is not None else None,
            n_gpu_layers=self._n_gpu_layers,
        ) as engine:
            result = self._compared(name, kind, engine, making, self._traced)
        file = GGUFFile.open(made.path)
        return replace(
            result,
            file_bytes=file.nbytes,
            sha256=file_sha256(file),
            types=types_of(made.path),
            fallbacks=made.fallbacks,
        )

    def engine(
        self, spec: EngineSpec, process: EngineProcess, sha256: str, starting: float
    ) -> LevelResult:
        """What an engine computes, likewise; its size is that of the weights in its memory."""
        result = self._compared(spec.text, spec.kind, process, starting, [])
        size = process.weights
        return replace(result, file_bytes=size, sha256=sha256, types={spec.kind: size})

    def _compared(
        self,
        name: str,
        kind: str,
        engine: Engine | EngineProcess,
        making: float,
        traced: Collection[int],
    ) -> LevelResult:
        """The figures of what `engine` computes; what tells of a file is left empty."""
        corpus, windows = self._corpus, self._corpus.windows
        comparison = Comparison()
        routing = RoutingComparison(self._config, self._routers)
        seconds = {"make": making, "forward": 0.0, "compare": 0.0}
        kept = self._nodes.setdefault(name, [])
        tokenized = [engine.tokenize(content) for content in corpus.contents]
        agreement = corpus.agreement(tokenized, engine.bos)
        told = False
        for i, window in enumerate(windows):
            tokens = window.tokens
            half = len(tokens) // 2
            capture = {*ROUTING, *TRACED} if i in traced else ROUTING
            start = time.perf_counter()
            outputs = engine.run(tokens, first=half, capture=capture)
            ran = time.perf_counter()
            # The last position has no next token to score.
            logits = outputs.logits[: len(tokens) - 1 - half]
            comparison.add(self._reference.logits(i), logits, tokens[half + 1 :], window.domain)
            if outputs.nodes:
                routing.add(self._reference, i, outputs.nodes)
                told = True
            if i in traced:
                kept.append(self._spill(outputs.nodes, TRACED))
            seconds["forward"] += ran - start
            seconds["compare"] += time.perf_counter() - ran
        return LevelResult(
            level=name,
            kind=kind,
            file_bytes=0,
            sha256="",
            types={},
            fallbacks=[],
            metrics=comparison.result(),
            domains={text.domain: comparison.result(text.domain) for text in corpus.texts},
            kld_percentiles=comparison.kld_percentiles(),
            routing=routing.layers() if told else [],
            depth=routing.depth() if told else {},
            tokenizer_agreement=agreement,
            trace=None,
            thresholds={},
            seconds=seconds,
        )

    def traced(
        self, results: list[LevelResult], tolerances: Mapping[str, Mapping[str, float]]
    ) -> list[LevelResult]:
        """`results` with their traces; one pass over the reference's layers serves all."""
        windows = [self._corpus.windows[i].tokens for i in self._traced]
        nodes = {name: kept for name, kept in self._nodes.items() if kept}  # engines keep none
        traces = tracing.trace(self._config, self._checkpoint, windows, nodes, tolerances)
        return [replace(result, trace=traces.get(result.level)) for result in results]

    def _spill(self, nodes: Nodes, names: Collection[str]) -> Nodes:
        """`nodes` mapped from files: at full size one window's take 800 MB."""
        mapped = {}
        for (name, layer), array in nodes.items():
            if name in names:
                path = self._scratch / f"{next(self._serial)}.npy"
                np.save(path, array)
                mapped[name, layer] = np.load(path, mmap_mode="r")
        return mapped


def _check_file(path: Path, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Raise GGUFError unless the file is of this model: same shape, same vocabulary."""
    if not path.is_file():
        raise GGUFError(f"{path}: no such file")
    values = open_checked(path).values
    expected = metadata.architecture(config)
    for key in (f"{ARCH}.{name}" for name in _SHAPE):
        if key in values and values[key] != expected[key]:
            raise GGUFError(
                f"{path}: {key} is {values[key]}, the checkpoint's is {expected[key]}: "
                "another model"
            )
    tokens = values.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    if len(tokens) != config.vocab_size:
        raise GGUFError(
            f"{path}: {len(tokens)} tokens in its vocabulary, expected the checkpoint's "
            f"{config.vocab_size}"
        )
    # What only fills the vocabulary up has no name of its own; converters differ in it.
    for i, (theirs, ours, kind) in enumerate(
        zip(tokens, vocabulary.tokens, vocabulary.types, strict=True)
    ):
        if kind != UNUSED and theirs != ours:
            raise GGUFError(
                f"{path}: token {i} is {theirs!r}, the checkpoint's is {ours!r}: another vocabulary"
            )
