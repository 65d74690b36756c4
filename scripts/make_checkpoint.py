#!/usr/bin/env python3
"""Write a random Megrez2 checkpoint of any configuration, in the published layout.

    scripts/make_checkpoint.py OUT --size pocket
    scripts/make_checkpoint.py OUT --size full                         # 15 GB, about 3 minutes
    scripts/make_checkpoint.py OUT --config my.json --set n_group=4 --set topk_group=2
    scripts/make_checkpoint.py OUT --size full --empty                 # no weights: for dry runs

The weights are calibrated so that mistakes show: tests/support/random_checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megrez_gguf.errors import MegrezError

# The library is where the tests, which use it most, import it from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.random_checkpoint import DTYPES, SIZES, make_checkpoint


def setting(text: str) -> tuple[str, Any]:
    """`key=value`, the value as JSON or else as a plain string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to create")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--size", choices=sorted(SIZES))
    source.add_argument("--config", type=Path, help="a config.json to follow")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--shard-mib", type=int, default=4096, metavar="N", help="default 4096")
    parser.add_argument("--tokenizer-vocab", type=int, metavar="N", help="default: vocab_size")
    parser.add_argument("--empty", action="store_true", help="holes in place of weights")
    args = parser.parse_args()

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr)

    try:
        if args.size:
            config = SIZES[args.size]
        else:
            config = json.loads(args.config.read_text(encoding="utf-8"))
        make_checkpoint(
            config | dict(args.set),
            args.folder,
            seed=args.seed,
            dtype=args.dtype,
            shard_bytes=args.shard_mib << 20,
            tokenizer_vocab=args.tokenizer_vocab,
            progress=show,
            empty=args.empty,
        )
    except (MegrezError, OSError, ValueError) as e:
        print(f"make_checkpoint: {e}", file=sys.stderr)
        return 2
    print(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
