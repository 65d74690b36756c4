"""The model that a conversion starts from: a checkpoint, or an unquantized GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.checkpoint.tokenizer import UNUSED, read_vocabulary
from megrez_gguf.conversion import copies, layout, metadata
from megrez_gguf.conversion.record import recorded
from megrez_gguf.conversion.stream import Item, Nowhere, Outcome, stream
from megrez_gguf.format.model_check import check_counts, open_checked
from megrez_gguf.format.reader import SPLIT
from megrez_gguf.format.writer import KeyValues
from megrez_gguf.quantization.encode import encoding
from megrez_gguf.storage.shard import Shard
from megrez_gguf.text import Say, silent

# Tensors with a row for each token.
_BY_TOKEN = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model as it lies in files, checkpoint or GGUF."""

    name: str
    tensors: tuple[Item, ...]
    """What is to be written, in the types it is stored in."""
    f32: frozenset[str]
    """Names of the tensors that are F32 at any level; none where llama.cpp is asked for all."""
    values: KeyValues
    shards: tuple[Shard, ...]
    reopen: Callable[[], StoredModel]
    """The same model, its headers and texts read once more. Raises what opening it raised."""
    warnings: tuple[str, ...] = ()
    check_consumed: Callable[[Sequence[str]], None] = lambda names: None
    """Raises CheckpointError unless the stored tensors of these names are all there are, once."""

    def check_unchanged(self, items: Sequence[Item], done: Outcome, **options: Any) -> None:
        """Raise CheckpointError if a file changed since its header was read.

        Where its date or number did, what `stream` made of it with these `options`, `done`, is made
        once more: it must come out the same, from the same header.
        """
        suspects = [shard for shard in self.shards if shard.may_have_changed()]
        if not suspects:
            return
        again = self.reopen()
        if again.tensors != self.tensors or again.values != self.values:
            raise suspects[0].changed()
        for item, digest in zip(items, done.sha256, strict=True):
            touched = [s for s in suspects if any(t.shard == s for t in item.sources)]
            if touched and stream([item], Nowhere(), **options).sha256 != [digest]:
                raise touched[0].changed()

    @property
    def own_type(self) -> str:
        """The type most of the matrices' elements are stored in, e.g. "bf16"."""
        sizes: Counter[str] = Counter()
        for item in self.tensors:
            if item.name not in self.f32:
                for tensor in item.sources:
                    sizes[tensor.dtype] += tensor.size
        return sizes.most_common(1)[0][0].lower()


def from_checkpoint(checkpoint: Checkpoint, say: Say = silent) -> StoredModel:
    """The model in a checkpoint folder.

    What is stored more than once is read and compared, which `say` is told. Raises CheckpointError
    and TokenizerError as `layout.plan`, `read_vocabulary` and `copies.check` do.
    """
    config = checkpoint.config
    plan = layout.plan(checkpoint)
    vocabulary = read_vocabulary(checkpoint.documents, config.vocab_size)
    copies.check(plan.copies, say)
    values = {
        **metadata.key_values(checkpoint, sum(t.size for t in plan.targets)),
        **vocabulary.key_values(),
    }
    return StoredModel(
        name=str(values["general.name"]),
        tensors=tuple(
            Item(
                t.name,
                t.shape,
                t.sources,
                encoding(t.dtype),
                known_rows=_known_rows(t.name, values),
            )
            for t in plan.targets
        ),
        f32=frozenset(t.name for t in plan.targets if t.f32),
        values=values,
        shards=checkpoint.shards,
        reopen=lambda: from_checkpoint(Checkpoint.open(checkpoint.place)),
        warnings=(
            *checkpoint.notes,
            *vocabulary.warnings,
            *config.remarks,
            *plan.remarks,
            *metadata.sampling_remarks(checkpoint.documents.generation),
        ),
        check_consumed=lambda names: layout.check_ledger(checkpoint, plan, names),
    )


def from_gguf(path: Path) -> StoredModel:
    """The model in a GGUF file, its keys as they are but for those that tell of the file.

    Raises GGUFError as `open_checked`, `check_counts` and `recorded` do.
    """
    file = open_checked(path)
    check_counts(file.values, path)
    hashes, _ = recorded(file)
    dropped = {*SPLIT, metadata.HASHES, "general.alignment"}
    return StoredModel(
        name=str(file.values.get("general.name") or path.stem),
        tensors=tuple(
            Item(
                t.name,
                t.shape,
                (t,),
                encoding(t.dtype),
                sha256=hashes.get(t.name),
                known_rows=_known_rows(t.name, file.values),
            )
            for t in file.tensors
        ),
        f32=frozenset(),
        values={key: value for key, value in file.raw.items() if key not in dropped},
        shards=file.shards,
        reopen=lambda: from_gguf(path),
    )


def _known_rows(name: str, values: Mapping[str, Any]) -> int | None:
    """From which row on a tensor may be zero; None if it may nowhere."""
    if name.endswith(".bias"):
        return 0
    if name not in _BY_TOKEN:
        return None
    kinds = values.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list):
        return 0
    return max((i + 1 for i, kind in enumerate(kinds) if kind != UNUSED), default=0)
