"""A sabotaged model made, and judged by the code of `megrez-gguf parity --trace`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

from safetensors.torch import load_file, save_file

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.harness import measure
from megrez_parity.level_files import Maker
from megrez_parity.results import LevelResult
from support.sabotages import SABOTAGES, File, Model, Sabotage

# What must pass: a file of every level that a sabotage starts from, written anew.
UNHARMED = tuple(
    Sabotage("none", level=level, edit=lambda file, other: None)
    for level in dict.fromkeys(s.level for s in SABOTAGES)
)


def harm(checkpoint: Path, folder: Path, sabotage: Sabotage) -> Path:
    """A file of `checkpoint` as `sabotage` leaves it, made in the empty `folder`."""
    source = checkpoint
    if sabotage.change:
        source = folder / "checkpoint"
        _change(checkpoint, source, sabotage)
    target = folder / "sabotaged.gguf"
    maker = Maker(source, folder)
    with maker.make(sabotage.level) as made:
        shutil.copy(made.path, target)
    if sabotage.edit:
        file = other = File.read(target)
        if sabotage.other:
            with maker.make(sabotage.other) as made:
                other = File.read(made.path)
        sabotage.edit(file, other)
        file.replace(target)
    return target


def _change(checkpoint: Path, copy: Path, sabotage: Sabotage) -> None:
    assert sabotage.change
    raw = json.loads((checkpoint / "config.json").read_text("utf-8"))
    model = Model(ModelConfig.from_folder(checkpoint), raw, {})
    for shard in checkpoint.glob("*.safetensors"):
        model.tensors.update(load_file(shard))
    sabotage.change(model)
    copy.mkdir()
    for path in checkpoint.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, copy)
    (copy / "config.json").write_text(json.dumps(model.raw), "utf-8")
    save_file(model.tensors, copy / "model.safetensors")


def judge(
    checkpoint: Path,
    sabotage: Sabotage,
    texts: Sequence[Path] = (),
    context: int = 128,
    cache: Path | None = None,
) -> LevelResult:
    """What `megrez-gguf parity --gguf --trace` finds of the sabotaged model.

    F32 shows everything in one window of `context` tokens a text, the noise of other levels needs
    more. `cache` is a folder that keeps the reference from one call to the next.
    """
    n_ctx, n_windows = (context, 1) if sabotage.level == "f32" else (2 * context, 2)
    keep = cache / f"{n_ctx}-{n_windows}" if cache and not sabotage.patch else None
    with tempfile.TemporaryDirectory(prefix="sabotage-") as folder:
        gguf = harm(checkpoint, Path(folder), sabotage)
        with sabotage.patch() if sabotage.patch else nullcontext():
            report = measure(
                checkpoint,
                levels=(),
                texts=texts,
                files=[gguf],
                n_ctx=n_ctx,
                n_windows=n_windows,
                trace=True,
                cache=keep,
                thresholds=_of_any_text(Path(folder)),
            )
    return report.levels[0]


def _of_any_text(folder: Path) -> Path:
    """The committed thresholds without the texts they were set on.

    They are loose enough for shorter ones: what is unharmed passes, as is tested.
    """
    committed = resources.files("megrez_parity").joinpath("thresholds.json")
    raw = json.loads(committed.read_text("utf-8"))
    path = folder / "thresholds.json"
    kept = {key: raw[key] for key in ("weights_sha256", "levels")}
    path.write_text(json.dumps(kept), "utf-8")
    return path


def named(result: LevelResult) -> str | None:
    """What the trace names, e.g. "ffn_moe_out-4"."""
    point = result.trace.first_beyond if result.trace else None
    return str(point) if point else None
