#!/usr/bin/env python3
"""Show that the parity check can fail: sabotage a model in every way others have got it wrong.

    scripts/sabotage.py                    # the pocket checkpoint
    scripts/sabotage.py CKPT --text FILE

Each sabotaged file is judged against the unharmed checkpoint by the same code as `megrez-gguf
parity --trace`. Prints a table; exits 1 if an unharmed file misses a threshold, a sabotage passes,
or the trace names another tensor than the one harmed first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from safetensors.torch import load_file, save_file

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import MegrezError
from megrez_parity.harness import measure
from megrez_parity.level_files import Maker
from megrez_parity.results import LevelResult
from sabotages import SABOTAGES, File, Model, Sabotage

POCKET = Path(__file__).resolve().parents[1] / "tests" / "data" / "pocket"
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
            )
    return report.levels[0]


def named(result: LevelResult) -> str | None:
    """What the trace names, e.g. "ffn_moe_out-4"."""
    point = result.trace.first_beyond if result.trace else None
    return str(point) if point else None


def row(sabotage: Sabotage, result: LevelResult) -> str:
    """A line of the table."""
    m = result.metrics
    caught = [miss.removeprefix(f"{result.level}: ").split()[0] for miss in result.misses]
    cells = (
        sabotage.name,
        sabotage.level,
        f"{m.nmse.value:.1e}",
        f"{m.mean_kld.value:.2g}",
        f"{m.same_top_p.value:.1%}",
        ", ".join(name for name in caught if "-" not in name) or "-",
        named(result) or "-",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=POCKET, metavar="CKPT")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--ctx", type=int, default=128, metavar="N", help="tokens a window, at F32")
    args = parser.parse_args()
    good = True
    print("| sabotage | level | NMSE | mean KLD | same top | beyond | trace names |")
    print("|---|---|---|---|---|---|---|")
    try:
        with tempfile.TemporaryDirectory(prefix="sabotage-") as cache:
            for sabotage in (*UNHARMED, *SABOTAGES):
                result = judge(args.checkpoint, sabotage, args.text, args.ctx, Path(cache))
                print(row(sabotage, result), flush=True)
                good &= bool(result.misses) == (sabotage.name != "none")
                good &= named(result) == sabotage.first
    except MegrezError as e:
        print(f"sabotage: {e}", file=sys.stderr)
        return e.exit_code
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
