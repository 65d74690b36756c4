"""What is in a checkpoint or a GGUF: hyper-parameters, expert groups, tensors, weights at risk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megrez_gguf.checkpoint import hub
from megrez_gguf.checkpoint.location import Location
from megrez_gguf.checkpoint.shards import Checkpoint, announced_shards
from megrez_gguf.conversion import copies, layout, metadata
from megrez_gguf.errors import GGUFError
from megrez_gguf.format.model_check import MAX_LAYERS, layers_with, pool_layers
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.quantization import encode
from megrez_gguf.storage.tensor import RAW_DTYPE, Tensor
from megrez_gguf.text import Progress, Say, clip, format_size, silent
from megrez_llama import ARCH


@dataclass(frozen=True, slots=True)
class Group:
    """One expert pool: the layer whose tensors hold it, and the layers that route into it."""

    pool: int
    layers: tuple[int, ...]


@dataclass(slots=True)
class TensorReport:
    """One tensor, experts stacked, under its GGUF name.

    Counts are None where weights were not read, as those of quantized tensors never are: their
    values exist only after dequantization.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    role: str
    non_finite: int | None = None
    f16_overflow: int | None = None
    f16_flushed: int | None = None


@dataclass(slots=True)
class Inspection:
    """The result of `inspect`. `hyperparameters` go by their GGUF names without the prefix."""

    path: str
    kind: str
    name: str
    parameters: int
    nbytes: int
    hyperparameters: dict[str, Any]
    dense_layers: tuple[int, ...]
    groups: tuple[Group, ...]
    roles: dict[str, int]
    """Bytes by role."""
    tensors: list[TensorReport]
    non_finite: int | None = None
    f16_overflow: int | None = None
    f16_flushed: int | None = None
    warnings: list[str] = field(default_factory=list)


def inspect(
    path: str | os.PathLike[str],
    *,
    scan: bool = True,
    progress: Progress | None = None,
    revision: str | None = None,
    say: Say = silent,
) -> Inspection:
    """Look into a checkpoint folder or a GGUF file; `scan` reads all weights to count.

    A text that names neither may name a repository, which is fetched first: see `hub.resolve`, to
    which `revision` and `say` go.

    Raises MegrezError: SourceError for what is not there, ConfigError or CheckpointError for a
    checkpoint that cannot be converted for its structure, GGUFError for a file that is damaged or
    no Megrez2 model.
    """
    place = hub.resolve(path, announced_shards, revision=revision, say=say)
    if not place.path.is_file():
        report, sources = _checkpoint(place, scan, say)
    else:
        report, sources = _gguf(place.path)
    if scan:
        _scan(report, sources, progress)
    return report


def _checkpoint(
    place: Location, scan: bool, say: Say
) -> tuple[Inspection, list[tuple[Tensor, ...]]]:
    checkpoint = Checkpoint.open(place)
    config, folder = checkpoint.config, checkpoint.folder
    plan = layout.plan(checkpoint)
    tensors = [
        TensorReport(
            target.name,
            "/".join(sorted({t.dtype for t in target.sources})),
            target.shape,
            sum(t.nbytes for t in target.sources),
            target.role,
        )
        for target in plan.targets
    ]
    hyperparameters = {
        key.removeprefix(f"{ARCH}."): value for key, value in metadata.architecture(config).items()
    }
    groups = _groups(config.moe_layers, config.pool_layers)
    dense = tuple(i for i in range(config.num_hidden_layers) if not config.is_moe(i))
    report = _report(folder, "checkpoint", metadata.model_name(place), hyperparameters, tensors)
    report.groups, report.dense_layers = groups, dense
    report.warnings += (*checkpoint.notes, *config.remarks, *plan.remarks)
    if scan:
        copies.check(plan.copies, say)
    return report, [target.sources for target in plan.targets]


def _gguf(path: Path) -> tuple[Inspection, list[tuple[Tensor, ...]]]:
    file = GGUFFile.open_model(path)
    prefix = f"{ARCH}."
    hyperparameters = {
        key.removeprefix(prefix): value
        for key, value in file.values.items()
        if key.startswith(prefix)
    }
    layers = hyperparameters.get("block_count")
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        raise GGUFError(
            f"{path}: {prefix}block_count: expected an integer from 1 to {MAX_LAYERS}, found "
            f"{clip(layers)}"
        )
    moe = layers_with("ffn_gate_inp", file.tensors, layers)
    pools = layers_with("ffn_gate_exps", file.tensors, layers)
    if not moe or not pools or moe[0] < pools[0]:
        raise GGUFError(
            f"{path}: no expert pool for layer {moe[0] if moe else 0}; not a Megrez2 model"
        )
    tensors = [
        TensorReport(t.name, t.dtype, t.shape, t.nbytes, layout.role_of(t.name))
        for t in file.tensors
    ]
    name = file.values.get("general.name")
    report = _report(path, "gguf", str(name or path.stem), hyperparameters, tensors)
    report.groups = _groups(moe, pools)
    report.dense_layers = tuple(i for i in range(layers) if i not in moe)
    report.warnings += _contradictions(report, moe, pools)
    return report, [(t,) if t.dtype in RAW_DTYPE else () for t in file.tensors]


def _report(
    path: Path, kind: str, name: str, hyperparameters: dict[str, Any], tensors: list[TensorReport]
) -> Inspection:
    roles: dict[str, int] = {}
    for tensor in tensors:
        roles[tensor.role] = roles.get(tensor.role, 0) + tensor.nbytes
    return Inspection(
        str(path),
        kind,
        name,
        sum(int(np.prod(t.shape, dtype=object)) for t in tensors),
        sum(t.nbytes for t in tensors),
        hyperparameters,
        (),
        (),
        dict(sorted(roles.items(), key=lambda r: -r[1])),
        tensors,
    )


def _groups(moe: Iterable[int], pools: Iterable[int]) -> tuple[Group, ...]:
    """Each MoE layer uses the last pool at or before it."""
    users: dict[int, list[int]] = {pool: [] for pool in pools}
    for layer in moe:
        users[max(p for p in users if p <= layer)].append(layer)
    return tuple(Group(pool, tuple(layers)) for pool, layers in sorted(users.items()))


def _contradictions(report: Inspection, moe: list[int], pools: list[int]) -> Iterator[str]:
    period = report.hyperparameters.get("experts_shared_frequency")
    lead = report.hyperparameters.get("leading_dense_block_count", moe[0])
    if period is None:
        yield "no experts_shared_frequency: the groups are read from which layers hold experts"
    elif type(period) is not int or period < 1:
        yield f"experts_shared_frequency is {clip(period)}"
    elif type(lead) is not int:
        yield f"leading_dense_block_count is {clip(lead)}"
    else:
        expected = pool_layers(moe, lead, period)
        if expected != pools:
            yield (
                f"experts_shared_frequency {period} puts expert pools in layers {expected}; "
                f"the file has them in {pools}"
            )
    if "pre_gate" not in report.hyperparameters:
        yield "no pre_gate: taken as true"


def _scan(report: Inspection, sources: list[tuple[Tensor, ...]], progress: Progress | None) -> None:
    total = sum(t.nbytes for tensors in sources for t in tensors)
    done = 0
    report.non_finite = report.f16_overflow = report.f16_flushed = 0
    for row, tensors in zip(report.tensors, sources, strict=True):
        if not tensors:
            continue
        bad, loss = 0, encode.Loss()
        for raw in (chunk for tensor in tensors for chunk in tensor.chunks()):
            values = encode.to_f32(raw)
            if encode.first_non_finite(raw) is not None:
                finite = np.isfinite(values)
                bad += int((~finite).sum())
                values = np.where(finite, values, np.float32(0))
            loss += encode.count_loss(values, encode.FLOATS["F16"])
            done += raw.nbytes
            if progress:
                progress(done, total)
        row.non_finite, row.f16_overflow, row.f16_flushed = bad, loss.overflow, loss.flushed
        report.non_finite += bad
        report.f16_overflow += loss.overflow
        report.f16_flushed += loss.flushed


def render(report: Inspection) -> str:
    """The report as text, for people."""
    lines = [
        f"{report.name} ({report.kind}, {report.path})",
        f"{report.parameters:,} parameters, {format_size(report.nbytes, 1)}",
        "",
        "Hyper-parameters",
        *(f"  {key:<36} {_value(value)}" for key, value in report.hyperparameters.items()),
        "",
        "Layers",
        f"  dense: {_ranges(report.dense_layers) or 'none'}",
        *(f"  experts of layer {g.pool}: used by {_ranges(g.layers)}" for g in report.groups),
        "",
        "Size by role",
        *(
            f"  {role:<16} {format_size(size, 1):>11} {size / max(report.nbytes, 1):>6.1%}"
            for role, size in report.roles.items()
        ),
        "",
        "Tensors",
        *(_row(t) for t in report.tensors),
        "",
    ]
    if report.non_finite is not None:
        lines += [
            f"NaN or infinite: {report.non_finite:,}",
            f"F16 would overflow: {report.f16_overflow:,}, flush to zero: {report.f16_flushed:,}",
        ]
    lines += [f"warning: {w}" for w in report.warnings]
    return "\n".join(lines)


def _row(tensor: TensorReport) -> str:
    shape = " x ".join(map(str, tensor.shape))
    counts = [
        f"{count:,} {what}"
        for count, what in (
            (tensor.non_finite, "NaN or infinite"),
            (tensor.f16_overflow, "over F16"),
            (tensor.f16_flushed, "flushed by F16"),
        )
        if count
    ]
    row = f"  {tensor.name:<32} {tensor.type:<8} {shape:<20} {format_size(tensor.nbytes, 1):>11}"
    return f"{row}  {', '.join(counts)}".rstrip()


def _value(value: Any) -> str:
    """GGUF floats are float32, whose seven digits are all that can be told."""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _ranges(layers: Iterable[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
