"""Held-out texts as windows of token ids, cut by the checkpoint's own tokenizer.

The `tokenizers` library is the judge here, as the torch reference is for the logits: a GGUF file
that carries another tokenizer is fed the same ids, and told apart by `agreement`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.checkpoint.tokenizer import NORMAL, Vocabulary, read_vocabulary
from megrez_gguf.checkpoint.tokenizer_judge import library_tokenizer
from megrez_gguf.errors import ConfigError, RuntimeUnavailableError
from megrez_gguf.text import read_text
from megrez_parity.results import Text

Tokens = NDArray[np.int32]

# Windows a text gives for an importance matrix: from its end, so never those that are scored.
CALIBRATION = 8


@dataclass(frozen=True, slots=True)
class Window:
    """`tokens` `[S]` of one text."""

    domain: str
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Corpus:
    """All texts of a run, cut into windows of the same length."""

    texts: list[Text]
    contents: list[str]  # of `texts`
    ids: list[Tokens]  # of `texts`, whole, without BOS
    windows: list[Window]
    calibration: list[Window]  # of the same texts, beyond `windows`
    vocabulary: Vocabulary

    @property
    def bos(self) -> int | None:
        """The token every window starts with, if the tokenizer asks for one."""
        return self.vocabulary.special["bos"] if self.vocabulary.add_bos else None

    def agreement(self, tokenized: Sequence[Tokens], bos: int | None) -> float:
        """Share of the texts' tokens that another tokenizer gives at the same place too, 0 to 1.

        `tokenized` are its ids of each text, `bos` is what it starts a window with: where that
        differs no window is the same, and the share 0.
        """
        if bos != self.bos:
            return 0.0
        lengths = self._byte_lengths()
        same = total = 0
        for ours, theirs in zip(self.ids, tokenized, strict=True):
            mine = _placed(ours, lengths)
            same += len(mine & _placed(theirs, lengths))
            total += len(mine)
        return same / total

    def _byte_lengths(self) -> list[int]:
        # A normal token's text spells each byte as one character.
        tokens, types = self.vocabulary.tokens, self.vocabulary.types
        return [
            len(token) if kind == NORMAL else len(token.encode())
            for token, kind in zip(tokens, types, strict=True)
        ]


def _placed(ids: Tokens, lengths: list[int]) -> set[tuple[int, int]]:
    """Each token as (byte it starts at, id)."""
    starts = accumulate((lengths[i] for i in ids.tolist()), initial=0)
    return set(zip(starts, ids.tolist(), strict=False))


def read_corpus(
    checkpoint: Checkpoint, texts: Sequence[Path], *, n_ctx: int, n_windows: int
) -> Corpus:
    """At most `n_windows` consecutive windows of `n_ctx` tokens from the start of each text.

    Without `texts`, the files of a folder `heldout` in or next to the checkpoint. Raises
    MegrezError: no text, one that is not UTF-8 or shorter than a window, no usable tokenizer.
    """
    paths = list(texts) or _default_texts(checkpoint.folder)
    vocabulary = read_vocabulary(checkpoint.documents, checkpoint.config.vocab_size)
    try:
        tokenizer = library_tokenizer(checkpoint.folder / "tokenizer.json")
    except ImportError as e:
        raise RuntimeUnavailableError(
            f"parity needs tokenizers ({e}); pip install 'megrez-gguf[parity]'"
        ) from None
    bos = vocabulary.special["bos"] if vocabulary.add_bos else None
    stems = Counter(path.stem for path in paths)
    corpus = Corpus([], [], [], [], [], vocabulary)
    for path in paths:
        raw = read_text(path)
        content = raw.decode("utf-8")
        ids = np.array(tokenizer.encode(content, add_special_tokens=False).ids, dtype=np.int32)
        if len(ids) < n_ctx:
            raise ConfigError(
                f"{path}: {len(ids)} tokens, shorter than one window of {n_ctx}; "
                "give a longer text, or shorter windows",
                option="n_ctx",
            )
        domain = path.stem if stems[path.stem] == 1 else str(path)
        whole = len(ids) // n_ctx
        cut = [Window(domain, _window(ids, i * n_ctx, n_ctx, bos)) for i in range(whole)]
        corpus.windows.extend(cut[:n_windows])
        corpus.calibration.extend(cut[n_windows:][-CALIBRATION:])
        digest = hashlib.sha256(raw).hexdigest()
        corpus.texts.append(Text(domain, str(path), digest, len(ids), min(whole, n_windows)))
        corpus.contents.append(content)
        corpus.ids.append(ids)
    return corpus


def _window(ids: Tokens, start: int, length: int, bos: int | None) -> Tokens:
    window = ids[start : start + length].copy()
    if bos is not None:
        window[0] = bos  # in the place of a token, as llama-perplexity does
    return window


def _default_texts(folder: Path) -> list[Path]:
    whole = folder.resolve()
    for place in (whole, whole.parent):
        if found := sorted(place.glob("heldout/*.txt")):
            # As short as a user would write it: reports show the paths.
            return [Path(os.path.relpath(path)) for path in found]
    raise ConfigError(
        f"{folder}: no heldout/*.txt in it or next to it; name a text",
        option="texts",
    )
