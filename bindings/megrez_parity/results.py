"""What a parity run finds: plain data, the same in Python, in JSON and in every report.

The JSON form is `ParityReport.as_dict()`; `report.schema.json` describes it.
Shapes: S tokens a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from megrez_gguf.quantization.types import Fallback

# Raised whenever a field changes its name or meaning.
SCHEMA_VERSION = 1

# Where a figure must not fall; all others must not rise.
FLOORS = {"same_top_p", "tokenizer_agreement"}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of one comparison, as llama-perplexity defines them (NMSE apart).

    KLD is in nats, of the candidate from the reference; delta-p is the candidate's probability of
    the text's next token minus the reference's, -1 to 1.
    """

    nmse: Figure  # mean squared error of the logits over the mean square of the reference's
    mean_kld: Figure
    median_kld: Figure
    kld_90: Figure  # percentiles over positions, interpolated
    kld_99: Figure
    kld_999: Figure
    max_kld: Figure  # of these positions: its interval ends at the value
    mean_delta_p: Figure
    rms_delta_p: Figure
    same_top_p: Figure  # share of positions where both rank the same token first, 0 to 1
    perplexity: Figure  # of the candidate, on the text
    reference_perplexity: Figure
    perplexity_ratio: Figure  # candidate's over reference's
    positions: int  # positions scored


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """Which experts ran in one MoE layer, against the reference."""

    layer: int
    identical: Figure  # share of tokens whose expert set is the reference's
    overlap: Figure  # mean share of a token's experts that are the reference's
    first_ties: int  # tokens that first leave the reference here by less than `noise`...
    first_diverged: int  # ... and by more: not what this level's noise explains
    noise: float  # difference of two selection scores that this level's noise can turn round
    unfaithful: int  # tokens that the reference's router routes otherwise, given the same state
    input_nmse: float  # error of the state the router reads: with pre-gate, of the layer before
    own_nmse: float  # error of the state this layer's FFN reads: what it would read without


@dataclass(frozen=True, slots=True)
class TracePoint:
    """One tensor of one layer, compared over the traced windows."""

    name: str  # one of TRACED
    layer: int
    nmse: float  # against the reference: with all error from the layers before
    local_nmse: float  # against the reference's layer fed with the candidate's own input
    tolerance: float | None  # for `local_nmse`; None where none is known

    @property
    def is_beyond(self) -> bool:
        """Whether its own error is beyond its tolerance; NaN always is."""
        limit = math.inf if self.tolerance is None else self.tolerance
        return not self.local_nmse <= limit

    def __str__(self) -> str:
        """As llama.cpp names it; what is outside the layers has no number."""
        return self.name if self.layer < 0 else f"{self.name}-{self.layer}"


@dataclass(frozen=True, slots=True)
class Trace:
    """Where it breaks. `points` are in the order they are computed."""

    points: list[TracePoint]

    @property
    def first_beyond(self) -> TracePoint | None:
        """The first tensor whose own error is beyond its tolerance."""
        return next((point for point in self.points if point.is_beyond), None)


@dataclass(frozen=True, slots=True)
class Activation:
    """The largest magnitude that enters matrix products at one place."""

    name: str  # e.g. "ffn_moe_swiglu"
    enters: str  # e.g. "ffn_down_exps"
    layer: int | None  # None: outside the layers
    max_abs: float


@dataclass(frozen=True, slots=True)
class Audit:
    """Would F16 hold this model? Counts are of the checkpoint's weights."""

    activations: list[Activation]
    overflowing_weights: int  # become infinite
    flushed_weights: int  # become 0
    subnormal_weights: int  # keep fewer bits than F16 has
    weights: int
    verdict: str  # one line


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One file: its figures, and the thresholds that apply to them."""

    level: str  # the level, or the path of a file given
    kind: str  # the level whose thresholds apply; "" when none do
    file_bytes: int
    sha256: str
    types: dict[str, int]  # bytes in tensors of each ggml type
    fallbacks: list[Fallback]
    metrics: Metrics
    domains: dict[str, Metrics]
    kld_percentiles: list[float]  # 0th, 1st, ... 100th, in nats
    routing: list[LayerRouting]
    depth: dict[str, list[float]]  # "ffn_norm", "l_out": NMSE after each layer
    tokenizer_agreement: float  # share of the texts' tokens that its own tokenizer gives too
    trace: Trace | None
    thresholds: dict[str, float]
    seconds: dict[str, float]  # make, forward, compare

    def figure(self, name: str) -> float:
        """The figure a threshold of this name bounds."""
        if name == "tokenizer_agreement":
            return self.tokenizer_agreement
        if name == "unfaithful":
            return sum(layer.unfaithful for layer in self.routing)
        figure: Figure = getattr(self.metrics, name)
        return figure.value

    def holds(self, name: str) -> bool:
        """Whether that figure meets its threshold; NaN never does."""
        figure, limit = self.figure(name), self.thresholds[name]
        return figure >= limit if name in FLOORS else figure <= limit

    @property
    def misses(self) -> list[str]:
        """One sentence for every figure beyond its threshold; NaN always is, even without one."""
        return list(self._misses())

    def _misses(self) -> Iterator[str]:
        if not math.isfinite(self.metrics.nmse.value):
            yield f"{self.level}: it computes logits that are not finite"
        for name, limit in self.thresholds.items():
            if not self.holds(name):
                relation = "below" if name in FLOORS else "above"
                yield f"{self.level}: {name} {self.figure(name):.6g} is {relation} {limit:g}"
        point = self.trace.first_beyond if self.trace else None
        if point:
            above = "" if point.tolerance is None else f" is above {point.tolerance:g}"
            yield (
                f"{self.level}: {point} is the first tensor to err by itself: "
                f"local NMSE {point.local_nmse:.3g}{above}"
            )


@dataclass(frozen=True, slots=True)
class Text:
    """A held-out text; its file's stem is the domain it stands for."""

    domain: str
    path: str
    sha256: str
    tokens: int  # in the whole text
    windows: int  # taken from its start


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """How the reference was computed."""

    dtype: str
    seconds: float  # of computing, over all runs it took; 0 is impossible
    peak_rss: int  # bytes, of the whole process while it computed
    cached: bool  # whether this run found all of it in the cache
    cache: str  # folder


@dataclass(frozen=True, slots=True)
class Answered:
    """One model's score on one task, as `megrez-gguf eval` found it."""

    model: str
    task: str
    metric: str
    n: int
    value: float
    low: float
    high: float
    chance: float | None  # what guessing scores


@dataclass(frozen=True, slots=True)
class Lost:
    """A question that the first model answered right, and the second did not."""

    question: str
    target: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Flipped:
    """How many answers to one task changed between two models; `p` is McNemar's exact test."""

    task: str
    first: str
    second: str
    n: int
    lost: int
    won: int
    p: float
    least: float  # the smallest difference of scores that so many flips could show
    examples: list[Lost]


@dataclass(frozen=True, slots=True)
class Answers:
    """What models answered to the questions of benchmarks."""

    scores: list[Answered]
    flips: list[Flipped]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All levels of one checkpoint over the same windows of text."""

    checkpoint: str
    context: int  # tokens a window
    texts: list[Text]
    reference: ReferenceRun
    audit: Audit | None
    provenance: dict[str, str]
    levels: list[LevelResult]
    answers: Answers | None = None
    schema: int = field(default=SCHEMA_VERSION)

    @property
    def misses(self) -> list[str]:
        return [miss for level in self.levels for miss in level.misses]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not a number there (NaN, infinities) becomes None."""
        data = asdict(self)
        for level, raw in zip(self.levels, data["levels"], strict=True):
            raw["misses"] = level.misses
            if level.trace:
                first = level.trace.first_beyond
                raw["trace"]["first_beyond"] = str(first) if first else None
        data |= {"passed": not self.misses, "misses": self.misses}
        finite: dict[str, Any] = _finite(data)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
