"""llama.cpp's own `llama-perplexity --kl-divergence` as the judge of every figure.

That tool compares a model with a file of log-probabilities, which here the torch reference writes.
It keeps them in 16 bits, a step of 16/65535 of a nat, and drops what is rarer than exp(-16).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megrez_gguf import quantize
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_llama.engine import Engine
from megrez_parity.metrics import Comparison
from megrez_parity.reference import CheckpointWeights, forward
from megrez_parity.results import Metrics
from megrez_parity.windows import Window, read_corpus
from support.native_tools import run_native
from support.paths import POCKET
from support.shared import Shared

pytestmark = pytest.mark.slow

CONTEXT, WINDOWS = 256, 3  # of each of the four texts: 1524 positions
FIRST = CONTEXT // 2
STEP = 16 / 65535  # between two log-probabilities of the file

# What the tool prints, and what it is here. Delta-p and shares are printed in percent.
PRINTED = {
    "mean_kld": "Mean    KLD",
    "median_kld": "Median  KLD",
    "kld_90": "90.0%   KLD",
    "kld_99": "99.0%   KLD",
    "kld_999": "99.9%   KLD",
    "max_kld": "Maximum KLD",
    "mean_delta_p": "Mean    Δp",
    "rms_delta_p": "RMS Δp",
    "same_top_p": "Same top p",
    "perplexity": "Mean PPL(Q)",
    "reference_perplexity": "Mean PPL(base)",
    "perplexity_ratio": "Mean PPL(Q)/PPL(base)",
}
PERCENTILES = {1: " 1.0%   KLD", 5: " 5.0%   KLD", 10: "10.0%   KLD", 95: "95.0%   KLD"}

Both = tuple[Metrics, list[float], dict[str, tuple[float, float]]]


@dataclass(frozen=True)
class Base:
    """The reference's logits `[R, V]` of every window, and the same as the tool's file."""

    windows: list[Window]
    logits: list[NDArray[np.float64]]
    file: Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    config = ModelConfig.from_folder(POCKET)
    windows = read_corpus(Checkpoint.open(POCKET), [], n_ctx=CONTEXT, n_windows=WINDOWS).windows
    weights = dict(CheckpointWeights(POCKET, torch.float64))
    logits = []
    with torch.no_grad():
        for window in windows:
            out = forward(config, weights, torch.from_numpy(window.tokens).long()[None])
            logits.append(out[0, FIRST:-1].numpy())
    file = tmp_path_factory.mktemp("base") / "pocket.logits"
    with file.open("wb") as out:
        out.write(b"_logits_")
        out.write(np.array([CONTEXT, config.vocab_size, len(windows)], "<i4").tobytes())
        out.write(np.concatenate([window.tokens for window in windows]).astype("<i4").tobytes())
        for rows in logits:
            out.write(packed(rows).tobytes())
    return Base(windows, logits, file)


def packed(logits: NDArray[np.float64]) -> NDArray[np.void]:
    """Rows `[R, V]` as the tool stores them: a scale and a least log-probability, 16 bits each."""
    vocabulary = logits.shape[1]
    row = [("scale", "<f4"), ("least", "<f4"), ("steps", "<u2", (vocabulary + vocabulary % 2,))]
    out = np.zeros(len(logits), row)
    most = logits.max(-1, keepdims=True)
    least = np.maximum(logits.min(-1, keepdims=True), most - 16)
    out["scale"] = ((most - least) / 65535)[:, 0]
    total = np.log(np.exp(logits - most).sum(-1, keepdims=True))
    out["least"] = (least - most - total)[:, 0]
    steps = (np.maximum(logits, least) - least) / out["scale"][:, None]
    out["steps"][:, :vocabulary] = np.rint(steps).clip(0, 65535)
    return out


@pytest.fixture(scope="module", params=["q4_0", "q2_k"])
def both(
    request: pytest.FixtureRequest,
    base: Base,
    shared: Shared,
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    """Our figures and percentiles of one level, and the tool's: value and "±" by name."""
    folder = tmp_path_factory.mktemp("level")
    model = folder / f"{request.param}.gguf"
    quantize(shared.pocket("f32"), model, outtype=request.param)
    comparison = Comparison()
    with Engine(model, CONTEXT) as engine:
        for window, logits in zip(base.windows, base.logits, strict=True):
            candidate = engine.run(window.tokens, first=FIRST).logits[:-1]
            comparison.add(logits, candidate, window.tokens[FIRST + 1 :], window.domain)
    output = run_tool(model, base.file)
    return comparison.result(), comparison.kld_percentiles(), read(output)


def run_tool(model: Path, file: Path) -> str:
    """What it prints. Its log is written by a thread it does not wait for, so its end may lack."""
    arguments = ["-m", model, "--kl-divergence", "--kl-divergence-base", file]
    arguments += ["-c", CONTEXT, "-b", CONTEXT, "-ub", CONTEXT, "-ctk", "f32", "-ctv", "f32"]
    arguments += ["-fa", "off", "--device", "none", "-fit", "off"]
    for _ in range(10):
        output = run_native("llama-perplexity", *arguments)
        if "Same top p:" in output:
            return output
    pytest.fail(f"llama-perplexity stops early:\n{output[-2000:]}", pytrace=False)


def read(output: str) -> dict[str, tuple[float, float]]:
    line = re.compile(r"^(.+?)\s*:\s+(-?[\d.]+)(?: ± +([\d.]+))?( ?%)?$", re.MULTILINE)
    found = {}
    for name, value, error, percent in line.findall(output):
        unit = 100 if percent else 1
        found[name] = (float(value) / unit, float(error or "nan") / unit)
    return found


def test_every_figure_is_the_tools(both: Both) -> None:
    ours, percentiles, theirs = both
    assert ours.positions == (CONTEXT - 1 - FIRST) * 4 * WINDOWS
    for name, printed in PRINTED.items():
        # A mean of both signs is near 0 for a good candidate; its scale is what it averages.
        scale = ours.rms_delta_p.value if name == "mean_delta_p" else theirs[printed][0]
        figure = getattr(ours, name).value
        assert figure == pytest.approx(theirs[printed][0], rel=0, abs=0.01 * abs(scale)), name
    for percent, printed in PERCENTILES.items():  # the least are of the size of the file's steps
        expected = pytest.approx(theirs[printed][0], rel=0.01, abs=STEP / 2)
        assert percentiles[percent] == expected, printed


def test_intervals_are_of_the_size_of_its_errors(both: Both) -> None:
    # Its "±" is one standard error of independent positions, so ours is wider by how neighbours
    # correlate: by 1 to 1.5 on trained models; sampling of the bootstrap, tens of percent.
    ours, _, theirs = both
    for name, printed in PRINTED.items():
        error = theirs[printed][1]
        if error == error:  # percentiles have none
            figure = getattr(ours, name)
            ratio = (figure.high - figure.low) / (2 * 1.96 * error)
            assert 0.7 < ratio < 2, f"{name}: {ratio}"
