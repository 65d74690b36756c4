"""The model that a conversion starts from: a checkpoint, or an unquantized GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.checkpoint.tokenizer import read_vocabulary
from megrez_gguf.conversion import layout, metadata
from megrez_gguf.conversion.stream import Item
from megrez_gguf.format.model_check import check_counts, open_checked
from megrez_gguf.format.reader import SPLIT
from megrez_gguf.format.writer import KeyValues
from megrez_gguf.quantization.encode import encoding
from megrez_gguf.storage.tensor import Shard


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
    warnings: tuple[str, ...] = ()
    check_consumed: Callable[[Sequence[str]], None] = lambda names: None
    """Raises CheckpointError unless the stored tensors of these names are all there are, once."""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file changed since its header was read."""
        for shard in self.shards:
            shard.check_unchanged()

    @property
    def own_type(self) -> str:
        """The type most of the matrices' elements are stored in, e.g. "bf16"."""
        sizes: Counter[str] = Counter()
        for item in self.tensors:
            if item.name not in self.f32:
                for tensor in item.sources:
                    sizes[tensor.dtype] += tensor.size
        return sizes.most_common(1)[0][0].lower()


def from_checkpoint(checkpoint: Checkpoint) -> StoredModel:
    """The model in a checkpoint folder.

    Raises CheckpointError and TokenizerError as `layout.plan` and `read_vocabulary` do, and
    CheckpointError for a tied `lm_head` that is stored and differs.
    """
    config = checkpoint.config
    plan = layout.plan(checkpoint)
    vocabulary = read_vocabulary(checkpoint.documents, config.vocab_size)
    if plan.tied_copy:
        plan.tied_copy[0].check_equal(plan.tied_copy[1], "config.json says tie_word_embeddings")
    values = metadata.key_values(checkpoint, sum(t.size for t in plan.targets))
    return StoredModel(
        name=str(values["general.name"]),
        tensors=tuple(Item(t.name, t.shape, t.sources, encoding(t.dtype)) for t in plan.targets),
        f32=frozenset(t.name for t in plan.targets if t.f32),
        values={**values, **vocabulary.key_values()},
        shards=checkpoint.shards,
        warnings=(*checkpoint.notes, *vocabulary.warnings, *config.remarks, *plan.remarks),
        check_consumed=lambda names: layout.check_ledger(checkpoint, plan, names),
    )


def from_gguf(path: Path) -> StoredModel:
    """The model in a GGUF file, its keys as they are but for those that tell of the file.

    Raises GGUFError as `open_checked` and `check_counts` do.
    """
    file = open_checked(path)
    check_counts(file.values, path)
    dropped = {*SPLIT, metadata.HASHES, "general.alignment"}
    return StoredModel(
        name=str(file.values.get("general.name") or path.stem),
        tensors=tuple(Item(t.name, t.shape, (t,), encoding(t.dtype)) for t in file.tensors),
        f32=frozenset(),
        values={key: value for key, value in file.raw.items() if key not in dropped},
        shards=file.shards,
    )
