"""Search for recipes: which tensors deserve which types, at the size of a stock level.

Tensors fall into roles (attention, shared experts, pools ...). The search

  1. measures, with everything else at Q8_0, what each type of each role adds to the mean KLD;
  2. takes these for additive, which small errors nearly are, and finds the mixes of the least sum
     that are no larger than a stock level, of the checkpoint and of every other one that the
     recipes are to fit (of which only the shapes are read), or than so many bytes;
  3. measures the best of them, and those that differ from the best in two roles, until none is
     better.

All of that sees windows from the ends of the texts. What is found, then, is judged with the stock
levels on the windows from their starts, by the parity harness, whose report shows the frontier.
Every measurement is kept in the work folder: killed, the search goes on where it was.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion.convert import plan_convert
from megrez_gguf.conversion.plan import Conversion
from megrez_gguf.errors import ConfigError
from megrez_gguf.quantization.recipe import Recipe
from megrez_gguf.storage.output import OutputFiles
from megrez_gguf.text import Say, silent
from megrez_parity.harness import measure
from megrez_parity.level_files import IMATRIX, PREFIX
from megrez_parity.recipe_meter import Meter
from megrez_parity.results import ParityReport

# Regular expressions that part a model's quantized tensors. "exps" are the pools, "shexp" the
# shared experts; plain gate, up and down are the dense layers'.
ROLES = (
    r"^token_embd\.", r"^output\.",
    r"\.attn_q\.", r"\.attn_k\.", r"\.attn_v\.", r"\.attn_output\.",
    r"\.ffn_(gate|up)\.", r"\.ffn_down\.",
    r"\.ffn_gate_exps\.", r"\.ffn_up_exps\.", r"\.ffn_down_exps\.",
    r"\.ffn_(gate|up)_shexp\.", r"\.ffn_down_shexp\.",
)  # fmt: skip
TYPES = ("q2_K", "q3_K", "iq4_xs", "iq4_nl", "q4_1", "q4_K", "q5_0", "q5_1", "q5_K", "q6_K", "q8_0")
BASE = "q8_0"
# The level of recipes in which every role has a type; with and without an importance matrix.
LEVEL = "q4_k_m"
# What the recipes are called, the level whose size they may have, and what it is compared with.
TARGETS = {"megrez-q3": "q3_k_m", "megrez-q4": "q4_k_m", "megrez-q5": "q5_k_m"}
STOCK = (
    *("q3_k_m", "iq4_xs", "q4_0", "iq4_nl", "q4_k_s", "q4_k_m", "q5_0", "q5_k_s", "q5_k_m"),
    *("q6_k", "q8_0"),
)

# Mixes measured before the local search, and in each of its rounds.
TRIED, ROUND = 12, 10
# Sizes closer than this part of a budget count as one while mixes are put together.
GRID = 400
# More bytes than any file has: no budget.
ANY = 1 << 60

Mix = tuple[str, ...]
"""A type for each role of a checkpoint, in order."""


@dataclass(frozen=True, slots=True)
class Found:
    """A recipe that was found, and the file it was written to.

    `target` is the stock level whose size it may have, or that size; `nbytes` is about its own, in
    bytes; `mean_kld` is in nats, over the windows that the search saw.
    """

    recipe: Recipe
    path: Path
    target: str
    nbytes: int
    mean_kld: float


def search(
    checkpoint: str | os.PathLike[str],
    work: Path,
    *,
    also: Sequence[Path] = (),
    sizes: Sequence[int] = (),
    texts: Sequence[Path] = (),
    n_ctx: int = 512,
    n_windows: int = 16,
    imatrix: Path | None = None,
    pad_rows: bool = False,
    revision: str | None = None,
    say: Say = silent,
) -> list[Found]:
    """Recipes for a checkpoint, one for each of TARGETS, each written to NAME.toml in `work`.

    With `sizes` there is one for each of them instead, of at most so many bytes: of the checkpoints
    `also`, or where there are none, of this one.

    `checkpoint`, `texts` and `revision` are those of `harness.measure`. The search sees the windows
    of `n_ctx` tokens at the end of each text, beyond the `n_windows` from its start, which are for
    `judge`. Recipes are to be no larger than their target for the folders `also`, too. Rounding is
    weighted by the file `imatrix`, if there is one. `pad_rows` lets types whose blocks do not fit
    the pools' down projections be tried, with zeros after their rows. `work` is created;
    measurements that are in it already are not made again. `say` is told what is being done.

    Raises MegrezError: texts with no token beyond the windows to judge by, tensors in no role, no
    mix as small as a target, a divergence that is not finite, a folder that cannot be made, and
    whatever the conversion or llama.cpp raise.
    """
    if n_ctx < 4 or n_windows < 1:
        raise ConfigError(f"{n_windows} windows of {n_ctx} tokens: expected at least 1 of 4")
    source = Checkpoint.find(checkpoint, revision=revision, say=say)
    name = Path(checkpoint).name
    roles = roles_of(source.folder)
    measured = [Sizes(folder, roles, pad_rows=pad_rows) for folder in (source.folder, *also)]
    meter = Meter(
        source, work, texts=texts, n_ctx=n_ctx, n_windows=n_windows, imatrix=imatrix,
        pad_rows=pad_rows, say=say,
    )  # fmt: skip
    say("what each type of each role adds to the mean KLD:")
    options = choices(meter, roles, measured, say)
    found = []
    targets = [
        (recipe_name, target, target, [s.level(target) for s in measured])
        for recipe_name, target in TARGETS.items()
        if not sizes
    ]
    for size in sizes:
        bounds = [size] * len(measured)
        if also:
            bounds[0] = ANY
        targets.append((f"megrez-{size / 2**30:g}g", LEVEL, f"{size / 2**30:g} GiB", bounds))
    for recipe_name, level, target, bounds in targets:
        say(f"{recipe_name}: no larger than {target}")
        # Names of types in the metadata differ in length: a kilobyte of room.
        budgets = [b - s.other - 1024 for b, s in zip(bounds, measured, strict=True)]
        mix, kld = best_measured(meter, roles, options, budgets, say)
        recipe = recipe_of(
            mix, roles, name=recipe_name, level=level, pad_rows=pad_rows,
            description=f"No larger than {target}. Searched by megrez-gguf search on {name}: "
            f"mean KLD {kld:.2g} over the search's windows.",
        )  # fmt: skip
        path = work / f"{recipe_name}.toml"
        with OutputFiles([path], force=True) as file:
            file.start(0)
            file.write(toml(recipe).encode())
        found.append(Found(recipe, path, target, measured[0].whole(mix), kld))
    return found


def judge(
    checkpoint: str | os.PathLike[str],
    recipes: Sequence[str | os.PathLike[str]],
    *,
    texts: Sequence[Path] = (),
    n_ctx: int = 512,
    n_windows: int = 16,
    imatrix: Path | None = None,
    revision: str | None = None,
    command: str = "",
    say: Say = silent,
) -> ParityReport:
    """`recipes`, by name or file, beside stock levels, on windows that `search` has not seen.

    With an `imatrix` the targets and the recipes are judged with it, too. All other arguments are
    those of `harness.measure`, whose report this is. Raises as it does.
    """
    found = [f"{PREFIX}{os.fspath(recipe)}" for recipe in recipes]
    levels = [*STOCK, *found]
    if imatrix:
        levels += [f"{level}{IMATRIX}" for level in (*TARGETS.values(), *found)]
    say("judging on windows the search has not seen")
    return measure(
        checkpoint,
        levels=levels,
        texts=texts,
        n_ctx=n_ctx,
        n_windows=n_windows,
        imatrix=imatrix,
        revision=revision,
        command=command,
        say=say,
    )


def recipe_of(
    mix: Mix,
    roles: Sequence[str],
    *,
    name: str = "mix",
    level: str = LEVEL,
    pad_rows: bool = False,
    description: str = "",
) -> Recipe:
    """The types of `mix` for `roles`, in order, and `level` for what is in none of them."""
    types = tuple(zip(roles, mix, strict=True))
    return Recipe(name, level, types, description, pad_rows, built_in=True)


# --- sizes -------------------------------------------------------------------------------------


class Sizes:
    """Bytes of a checkpoint's tensors, by role and type; reads no weights.

    `other` is in bytes: what is in no role, and so the same in every mix.
    """

    def __init__(self, checkpoint: Path, roles: Sequence[str], *, pad_rows: bool = False) -> None:
        self._checkpoint, self.roles, self._pad_rows = checkpoint, roles, pad_rows
        self._of = {kind: self._plan(kind) for kind in TYPES}
        self.other = self._rest(plan_convert(checkpoint, "x", outtype=BASE))

    def _plan(self, kind: str) -> dict[str, int]:
        """By role, where all its rows can hold `kind`."""
        mix = (kind,) * len(self.roles)
        recipe = recipe_of(mix, self.roles, pad_rows=self._pad_rows)
        plan = plan_convert(self._checkpoint, "x", recipe=recipe)
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
        """Whether all rows of `role` can hold `kind`."""
        return role in self._of[kind]

    def of(self, role: str, kind: str) -> int:
        """Bytes of the tensors in `role`. Raises KeyError unless it can hold `kind`."""
        return self._of[kind][role]

    def whole(self, mix: Mix) -> int:
        """Bytes of the file, about: a few of its metadata differ."""
        return self.other + sum(self.of(r, kind) for r, kind in zip(self.roles, mix, strict=True))

    def level(self, name: str) -> int:
        """Bytes of the file at a stock level."""
        return plan_convert(self._checkpoint, "x", outtype=name).nbytes


def roles_of(checkpoint: Path) -> list[str]:
    """The roles that the checkpoint's tensors have. Raises ConfigError where they leave one out."""
    plan = plan_convert(checkpoint, "x", outtype=BASE)
    names = [item.name for item in plan.items if item.encoding.name == BASE.upper()]
    for name in names:
        if sum(bool(re.search(role, name)) for role in ROLES) != 1:
            raise ConfigError(f"tensor {name} is in no role, or in several")
    return [role for role in ROLES if any(re.search(role, name) for name in names)]


# --- searching ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """A type for a role: what it adds to the mean KLD, and its bytes in each checkpoint."""

    kind: str
    kld: float
    nbytes: tuple[int, ...]


def choices(
    meter: Meter, roles: Sequence[str], sizes: Sequence[Sizes], say: Say
) -> list[list[Choice]]:
    """Those of each role, measured one at a time."""
    base = meter.mean_kld(recipe_of((BASE,) * len(roles), roles))
    mixes = {
        (role, kind): recipe_of(tuple(kind if r == role else BASE for r in roles), roles)
        for role in roles
        for kind in TYPES
        if all(s.can(role, kind) for s in sizes)
    }
    found: dict[str, list[Choice]] = {role: [] for role in roles}
    for (role, kind), mix in mixes.items():
        kld = meter.mean_kld(mix) - base
        nbytes = tuple(s.of(role, kind) for s in sizes)
        found[role].append(Choice(kind, kld, nbytes))
        left = meter.seconds_for(mixes.values())
        later = f"; about {left / 60:.0f} min left" if left >= 60 else ""
        say(f"  {role:26} {kind:7} {kld:+.6f}  {nbytes[0] / 2**20:8.2f} MiB{later}")
    return list(found.values())


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


def best_measured(
    meter: Meter,
    roles: Sequence[str],
    options: Sequence[Sequence[Choice]],
    budgets: Sequence[int],
    say: Say,
) -> tuple[Mix, float]:
    """The best mix found within `budgets` (bytes of each checkpoint), and its mean KLD in nats.

    Raises ConfigError where no mix is that small.
    """

    def tried(mixes: Iterable[Mix], count: int) -> dict[Mix, float]:
        chosen = [mix for mix, _ in zip(mixes, range(count), strict=False)]
        return {mix: meter.mean_kld(recipe_of(mix, roles)) for mix in chosen}

    known = tried(best_mixes(options, budgets), TRIED)
    if not known:
        limits = ", ".join(f"{budget:,}" for budget in budgets)
        raise ConfigError(f"no mix of types is as small as asked for: {limits} bytes")
    while True:
        best = min(known, key=known.__getitem__)
        say(f"  {known[best]:.6f} ({predicted(best, options):.6f} predicted) {' '.join(best)}")
        fresh = (m for m in neighbours(best, options, budgets) if m not in known)
        known |= tried(fresh, ROUND)
        if min(known, key=known.__getitem__) == best:
            return best, known[best]


# --- the result --------------------------------------------------------------------------------


def toml(recipe: Recipe) -> str:
    """The file that `recipe` can be read from again."""
    width = max(len(pattern) for pattern, _ in recipe.types) + 2
    description = textwrap.fill(recipe.description, 98)
    lines = [f'description = """\n{description}"""', f'level = "{recipe.level}"']
    lines += ["pad_rows = true"] * recipe.pad_rows + ["", "[types]"]
    for pattern, kind in recipe.types:
        lines.append(f"'{pattern}'".ljust(width) + f' = "{kind}"')
    return "\n".join(lines) + "\n"
