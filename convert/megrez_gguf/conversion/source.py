"""The model that a conversion starts from: a checkpoint, or an unquantized GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.checkpoint.tokenizer import Vocabulary, read_vocabulary
from megrez_gguf.conversion import layout, metadata
from megrez_gguf.conversion.layout import Layout
from megrez_gguf.conversion.stream import Item
from megrez_gguf.errors import CheckpointError
from megrez_gguf.format.reader import SPLIT, GGUFFile
from megrez_gguf.format.writer import KeyValues
from megrez_gguf.quantization.encode import encoding
from megrez_gguf.storage.tensor import Shard, Tensor


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
    vocabulary = read_vocabulary(
        checkpoint.folder,
        config.vocab_size,
        model_config=checkpoint.raw_config,
        generation=checkpoint.generation,
    )
    if plan.tied_copy:
        _check_equal(*plan.tied_copy)
    general = metadata.general(
        config, checkpoint.raw_config, checkpoint.place, sum(t.size for t in plan.targets)
    )
    return StoredModel(
        name=str(general["general.name"]),
        tensors=tuple(
            Item(t.name, t.shape, t.sources, encoding(_commonest(t.sources))) for t in plan.targets
        ),
        f32=frozenset(t.name for t in plan.targets if t.f32),
        values={
            **general,
            **metadata.architecture(config),
            **metadata.sampling(checkpoint.generation),
            **vocabulary.key_values(),
        },
        shards=checkpoint.shards,
        warnings=(
            *checkpoint.notes,
            *vocabulary.warnings,
            *_remarks(checkpoint, plan, vocabulary),
        ),
        check_consumed=lambda names: layout.check_ledger(checkpoint, plan, names),
    )


def from_gguf(path: Path, drop: frozenset[str]) -> StoredModel:
    """The model in a GGUF file, its keys as they are but for those that tell of the file: `drop`.

    Raises GGUFError.
    """
    file = GGUFFile.open_model(path)
    dropped = {*SPLIT, *drop, "general.alignment"}
    return StoredModel(
        name=str(file.values.get("general.name") or path.stem),
        tensors=tuple(Item(t.name, t.shape, (t,), encoding(t.dtype)) for t in file.tensors),
        f32=frozenset(),
        values={key: value for key, value in file.raw.items() if key not in dropped},
        shards=file.shards,
    )


def _commonest(tensors: Sequence[Tensor]) -> str:
    return Counter(t.dtype for t in tensors).most_common(1)[0][0]


def _remarks(checkpoint: Checkpoint, plan: Layout, vocabulary: Vocabulary) -> Iterator[str]:
    if unknown := checkpoint.config.unknown_fields:
        yield f"config.json has fields nobody here knows: {', '.join(unknown)}"
    if vocabulary.padding:
        yield f"the vocabulary was padded by {vocabulary.padding} unused tokens to vocab_size"
    for reason, count in Counter(plan.skipped.values()).items():
        yield f"{count} tensors left out: {reason}"


def _check_equal(head: Tensor, embeddings: Tensor) -> None:
    """A tied `lm_head` may be stored as well, if it says the same."""
    same = head.dtype == embeddings.dtype and all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(head.chunks(), embeddings.chunks(), strict=True)
    )
    if not same:
        raise CheckpointError(
            f"{head.shard.path}: tensor {head.name} differs from {embeddings.name}, and "
            "config.json says tie_word_embeddings: one of them is wrong"
        )
