#!/usr/bin/env python3
"""Search for recipes: which tensors deserve which types, at the size of a stock level.

    scripts/search_recipes.py tests/data/pocket --work FOLDER --write
    scripts/make_checkpoint.py EMPTY --size full --empty --tokenizer-vocab 4000
    scripts/search_recipes.py tests/data/pocket --also EMPTY --work FOLDER --write
    scripts/search_recipes.py Megrez2-3x7B-A3B --text novel.txt --windows 2 --work FOLDER

Tensors fall into roles (attention, shared experts, pools ...). The search

  1. measures, with everything else at Q8_0, what each type of each role adds to the mean KLD;
  2. takes these for additive, which small errors nearly are, and finds the mixes of the least sum
     that are no larger than a stock level, of CHECKPOINT and of every --also checkpoint (of which
     only the shapes are read);
  3. measures the best of them, and those that differ from the best in two roles, until none is
     better.

All of that sees windows from the ends of the texts. What is found, then, is judged with the stock
levels on the windows from their starts, by the parity harness, whose report shows the frontier.
Every measurement is kept in the work folder: killed, the search goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion.convert import convert, plan_convert
from megrez_gguf.conversion.plan import Conversion
from megrez_gguf.errors import ConfigError, MegrezError
from megrez_gguf.quantization.recipe import Recipe
from megrez_llama.engine import Engine
from megrez_parity.harness import measure
from megrez_parity.metrics import Comparison
from megrez_parity.provenance import checkpoint_sha256, sha256
from megrez_parity.reference_store import StoredReference, cache_key
from megrez_parity.report import print_table, write
from megrez_parity.windows import read_corpus

REPO = Path(__file__).resolve().parents[1]
RECIPES = REPO / "convert" / "megrez_gguf" / "recipes"

# Regular expressions that part a model's quantized tensors. "exps" are the pools, "shexp" the
# shared experts; plain gate, up and down are the dense layers'.
ROLES = (
    r"^token_embd\.", r"^output\.",
    r"\.attn_q\.", r"\.attn_k\.", r"\.attn_v\.", r"\.attn_output\.",
    r"\.ffn_(gate|up)\.", r"\.ffn_down\.",
    r"\.ffn_(gate|up)_exps\.", r"\.ffn_down_exps\.",
    r"\.ffn_(gate|up)_shexp\.", r"\.ffn_down_shexp\.",
)  # fmt: skip
TYPES = ("q3_K", "iq4_xs", "iq4_nl", "q4_1", "q4_K", "q5_0", "q5_1", "q5_K", "q6_K", "q8_0")
BASE = "q8_0"
# What the recipes are called, the level whose size they may have, and what it is compared with.
TARGETS = {"megrez-q3": "q3_k_m", "megrez-q4": "q4_k_m", "megrez-q5": "q5_k_m"}
STOCK = ("q3_k_m", "iq4_xs", "q4_0", "iq4_nl", "q4_k_s", "q4_k_m", "q5_0", "q5_k_s", "q5_k_m")
STOCK += ("q6_k", "q8_0")

# Mixes measured before the local search, and in each of its rounds.
TRIED, ROUND = 12, 10
# Sizes closer than this part of a budget count as one while mixes are put together.
GRID = 400

Mix = tuple[str, ...]
"""A type for each role of a checkpoint, in order."""


def recipe(name: str, level: str, roles: Sequence[str], mix: Mix) -> Recipe:
    return Recipe(name, level, tuple(zip(roles, mix, strict=True)), built_in=True)


# --- sizes -------------------------------------------------------------------------------------


class Sizes:
    """Bytes of a checkpoint's tensors, by role and type; reads no weights."""

    def __init__(self, checkpoint: Path, roles: Sequence[str]) -> None:
        self._checkpoint, self.roles = checkpoint, roles
        self._of = {kind: self._plan(kind) for kind in TYPES}
        self.other = self._rest(plan_convert(checkpoint, "x", outtype=BASE))

    def _plan(self, kind: str) -> dict[str, int]:
        """By role, where all its rows can hold `kind`."""
        mix = recipe("x", BASE, self.roles, (kind,) * len(self.roles))
        plan = plan_convert(self._checkpoint, "x", recipe=mix)
        lacking = {fallback.tensor for fallback in plan.fallbacks}
        sizes = {}
        for role in self.roles:
            items = [item for item in plan.items if re.search(role, item.name)]
            if not lacking.intersection(item.name for item in items):
                assert {item.encoding.name for item in items} == {kind.upper()}, (role, kind)
                sizes[role] = sum(item.nbytes for item in items)
        return sizes

    def _rest(self, plan: Conversion) -> int:
        any_role = re.compile("|".join(self.roles))
        named = sum(item.nbytes for item in plan.items if any_role.search(item.name))
        return plan.nbytes - named

    def can(self, role: str, kind: str) -> bool:
        return role in self._of[kind]

    def of(self, role: str, kind: str) -> int:
        return self._of[kind][role]

    def whole(self, mix: Mix) -> int:
        """About the size of the file: a few bytes of metadata differ."""
        return self.other + sum(self.of(r, kind) for r, kind in zip(self.roles, mix, strict=True))

    def level(self, name: str) -> int:
        return plan_convert(self._checkpoint, "x", outtype=name).nbytes


def roles_of(checkpoint: Path) -> list[str]:
    """The roles that the checkpoint's tensors have. Raises ConfigError where they leave one out."""
    plan = plan_convert(checkpoint, "x", outtype=BASE)
    names = [item.name for item in plan.items if item.encoding.name == BASE.upper()]
    for name in names:
        if sum(bool(re.search(role, name)) for role in ROLES) != 1:
            raise ConfigError(f"tensor {name} is in no role, or in several")
    return [role for role in ROLES if any(re.search(role, name) for name in names)]


# --- measuring ---------------------------------------------------------------------------------


class Meter:
    """Mean KLD of recipes from the reference, over windows nobody is judged by."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._checkpoint, self._imatrix = args.checkpoint, args.imatrix
        checkpoint = Checkpoint.open(args.checkpoint)
        config = checkpoint.config
        corpus = read_corpus(checkpoint, args.text, n_ctx=args.ctx, n_windows=args.windows)
        if not corpus.calibration:
            raise ConfigError("the texts end with the windows to judge by; give longer ones")
        self._windows = corpus.calibration
        tokens = [window.tokens for window in self._windows]
        weights = checkpoint_sha256(checkpoint)
        key = cache_key(config, args.checkpoint, tokens, weights)[:16]
        args.work.mkdir(parents=True, exist_ok=True)
        self._reference = StoredReference(
            config, args.checkpoint, tokens, args.work / f"reference-{key}", weights, say
        )
        self._reference.run()
        weighted = f"-{sha256([args.imatrix])[0][:16]}" if args.imatrix else ""
        self._log = args.work / f"measured-{key}{weighted}.jsonl"
        self._file = args.work / "candidate.gguf"
        self._known: dict[str, float] = {}
        if self._log.exists():
            for line in self._log.read_text("utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # the last one may have been cut off
                    entry = json.loads(line)
                    self._known[json.dumps(entry["types"])] = entry["mean_kld"]

    def mean_kld(self, mix: Recipe) -> float:
        """In nats."""
        types = [list(pair) for pair in mix.types]
        key = json.dumps(types)
        if key not in self._known:
            self._known[key] = self._measure(mix)
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps({"types": types, "mean_kld": self._known[key]}) + "\n")
        return self._known[key]

    def _measure(self, mix: Recipe) -> float:
        comparison = Comparison()
        try:
            convert(self._checkpoint, self._file, force=True, imatrix=self._imatrix, recipe=mix)
            with Engine(self._file, len(self._windows[0].tokens)) as engine:
                for i, window in enumerate(self._windows):
                    half = len(window.tokens) // 2
                    logits = engine.run(window.tokens, half).logits[:-1]
                    targets = window.tokens[half + 1 :]
                    comparison.add(self._reference.logits(i), logits, targets, window.domain)
        finally:
            self._file.unlink(missing_ok=True)
        kld = comparison.mean_kld()
        if not math.isfinite(kld):
            raise ConfigError(f"{mix.types}: the divergence is not finite")
        return kld


# --- searching ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """A type for a role: what it adds to the mean KLD, and its bytes in each checkpoint."""

    kind: str
    kld: float
    nbytes: tuple[int, ...]


def choices(meter: Meter, roles: Sequence[str], sizes: Sequence[Sizes]) -> list[list[Choice]]:
    """Those of each role, measured one at a time."""
    base = meter.mean_kld(recipe("base", BASE, roles, (BASE,) * len(roles)))
    found = []
    for number, role in enumerate(roles):
        options = []
        for kind in TYPES:
            if not all(s.can(role, kind) for s in sizes):
                continue
            mix = tuple(kind if i == number else BASE for i in range(len(roles)))
            kld = meter.mean_kld(recipe("one", BASE, roles, mix)) - base
            nbytes = tuple(s.of(role, kind) for s in sizes)
            options.append(Choice(kind, kld, nbytes))
            say(f"  {role:26} {kind:7} {kld:+.6f}  {nbytes[0] / 2**20:8.2f} MiB")
        found.append(options)
    return found


def best_mixes(options: Sequence[Sequence[Choice]], budgets: Sequence[int]) -> Iterator[Mix]:
    """Mixes within all `budgets` (bytes of each checkpoint), the least sum of KLD first.

    Dynamic programming over roles: of partial mixes of nearly the same sizes the best is kept.
    """
    least = [[min(c.nbytes[i] for c in role) for role in options] for i in range(len(budgets))]
    partial: dict[tuple[int, ...], tuple[float, tuple[int, ...], Mix]]
    partial = {(): (0.0, (0,) * len(budgets), ())}
    for number, role in enumerate(options):
        ahead = [sum(sizes[number + 1 :]) for sizes in least]
        longer: dict[tuple[int, ...], tuple[float, tuple[int, ...], Mix]] = {}
        for (kld, used, mix), choice in product(partial.values(), role):
            total = tuple(a + b for a, b in zip(used, choice.nbytes, strict=True))
            if any(t + a > b for t, a, b in zip(total, ahead, budgets, strict=True)):
                continue
            cell = tuple(t * GRID // b for t, b in zip(total, budgets, strict=True))
            if cell not in longer or longer[cell][0] > kld + choice.kld:
                longer[cell] = (kld + choice.kld, total, (*mix, choice.kind))
        partial = longer
    yield from (mix for _, _, mix in sorted(partial.values()))


def neighbours(
    mix: Mix, options: Sequence[Sequence[Choice]], budgets: Sequence[int]
) -> Iterator[Mix]:
    """Mixes within the budgets that differ in one or two roles, the least sum of KLD first."""
    table = [{choice.kind: choice for choice in role} for role in options]

    def fits(other: Mix) -> bool:
        chosen = [role[kind] for role, kind in zip(table, other, strict=True)]
        return all(sum(c.nbytes[i] for c in chosen) <= b for i, b in enumerate(budgets))

    found = set()
    for one, two in combinations(range(len(mix)), 2):
        for a, b in product(table[one], table[two]):
            other = (*mix[:one], a, *mix[one + 1 : two], b, *mix[two + 1 :])
            if other != mix and fits(other):
                found.add(other)
    yield from sorted(found, key=lambda other: (predicted(other, options), other))


def predicted(mix: Mix, options: Sequence[Sequence[Choice]]) -> float:
    """Sum of what the types add to the mean KLD."""
    return sum(
        choice.kld
        for kind, role in zip(mix, options, strict=True)
        for choice in role
        if choice.kind == kind
    )


def search(
    meter: Meter,
    roles: Sequence[str],
    options: Sequence[Sequence[Choice]],
    budgets: Sequence[int],
) -> tuple[Mix, float]:
    """The best mix found within the budgets, and its mean KLD over the search's windows."""

    def tried(mixes: Iterable[Mix], count: int) -> dict[Mix, float]:
        chosen = [mix for mix, _ in zip(mixes, range(count), strict=False)]
        return {mix: meter.mean_kld(recipe("mix", BASE, roles, mix)) for mix in chosen}

    known = tried(best_mixes(options, budgets), TRIED)
    if not known:
        raise ConfigError("no mix is that small")
    while True:
        best = min(known, key=known.__getitem__)
        say(f"  {known[best]:.6f} ({predicted(best, options):.6f} predicted) {' '.join(best)}")
        fresh = (m for m in neighbours(best, options, budgets) if m not in known)
        known |= tried(fresh, ROUND)
        if min(known, key=known.__getitem__) == best:
            return best, known[best]


# --- the result --------------------------------------------------------------------------------


def toml(mix: Recipe, description: str) -> str:
    width = max(len(pattern) for pattern, _ in mix.types) + 2
    lines = [f'description = """\n{textwrap.fill(description, 98)}"""', f'level = "{mix.level}"']
    lines += ["", "[types]"]
    for pattern, kind in mix.types:
        lines.append(f"'{pattern}'".ljust(width) + f' = "{kind}"')
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    roles = roles_of(args.checkpoint)
    checkpoints: list[Path] = [args.checkpoint, *args.also]
    sizes = [Sizes(checkpoint, roles) for checkpoint in checkpoints]
    meter = Meter(args)
    say("What each type of each role adds to the mean KLD:")
    options = choices(meter, roles, sizes)
    found = []
    for name, level in TARGETS.items():
        # Names of types in the metadata differ in length: a kilobyte of room.
        budgets = [s.level(level) - s.other - 1024 for s in sizes]
        say(f"{name}: no larger than {level}")
        mix, kld = search(meter, roles, options, budgets)
        text = toml(
            recipe(name, level, roles, mix),
            f"No larger than {level}. Searched by scripts/search_recipes.py on "
            f"{args.checkpoint.name}: mean KLD {kld:.2g} over the search's windows.",
        )
        path = (RECIPES if args.write else args.work) / f"{name}.toml"
        path.write_text(text, "utf-8")
        found.append(f"recipe:{name if args.write else path}")
    if not args.judge:
        return
    say("Judging on windows the search has not seen")
    levels = [*STOCK, *found]
    if args.imatrix:
        levels += [f"{level}+imatrix" for level in (*TARGETS.values(), *found)]
    report = measure(
        args.checkpoint,
        levels=levels,
        texts=args.text,
        n_ctx=args.ctx,
        n_windows=args.windows,
        imatrix=args.imatrix,
        command=shlex.join(["scripts/search_recipes.py", *sys.argv[1:]]),
        say=say,
    )
    for path in write(report, args.work / "report"):
        say(f"wrote {path}")
    print_table(report)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--ctx", type=int, default=512, help="tokens a window")
    parser.add_argument("--windows", type=int, default=16, help="windows a text to judge by")
    parser.add_argument("--imatrix", type=Path, help="search with this importance matrix")
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is measured")
    parser.add_argument("--write", action="store_true", help=f"into {RECIPES.relative_to(REPO)}")
    parser.add_argument("--no-judge", action="store_false", dest="judge")
    args = parser.parse_args()
    try:
        run(args)
    except MegrezError as e:
        say(f"search_recipes: {e}")
        return e.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
