"""What a model has answered already, so that a run that was ended goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]


class Answers:
    """A file of answers, one JSON line each, that is appended to as they come.

    `identity` names what gave them: answers of anything else are not taken from the file. Without
    a `path` nothing is kept.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path, self._identity = path, identity
        self._known: dict[str, Any] = {}
        if path and path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:  # the last line of a run that was killed
                    continue
                self._known[key] = value

    def fill(
        self,
        kind: str,
        requests: Sequence[Any],
        compute: Callable[[Sequence[tuple[int, Any, int]]], Iterator[tuple[int, Any]]],
        progress: Progress | None = None,
    ) -> list[Any]:
        """An answer for each of `requests`, in their order; those not known yet by `compute`.

        `compute` gets (index, request, how often the same came before), and yields (index, answer)
        in any order. `progress` is told how many answers there are, and of how many.
        """
        seen: Counter[str] = Counter()
        answers: list[Any] = [None] * len(requests)
        keys, wanted = [], []
        for i, request in enumerate(requests):
            text = json.dumps([self._identity, kind, request], sort_keys=True, default=str)
            nth = seen[text]
            seen[text] += 1
            key = hashlib.sha256(f"{nth} {text}".encode()).hexdigest()
            keys.append(key)
            if key in self._known:
                answers[i] = self._known[key]
            else:
                wanted.append((i, request, nth))
        done = len(requests) - len(wanted)
        for i, answer in compute(wanted) if wanted else ():
            answers[i] = answer
            self._keep(keys[i], answer)
            done += 1
            if progress:
                progress(done, len(requests))
        return answers

    def _keep(self, key: str, answer: Any) -> None:
        self._known[key] = answer
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, answer], ensure_ascii=False) + "\n")
