"""Text the pocket checkpoint is trained on, and the text held out from it.

Everything comes from installed packages; nothing is downloaded here. Documents are split into
training and held-out by a hash of their text, so the split does not depend on their order.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

POETRY_PACKAGE = "chinese-poetry@2.0.1"
POEMS_A_DOCUMENT = 12
LYRIC_FILES = 5  # of 22, a thousand lyrics each: more than a short training can use
CODE_MODULES = [
    "argparse",
    "contextlib",
    "dataclasses",
    "functools",
    "json/decoder",
    "json/encoder",
    "pathlib",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "textwrap",
    "urllib/parse",
]
CHAT = Path(__file__).with_name("pocket_chat.json")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}"
    "{{- '<|role_start|>system<|role_end|>SYSTEM<|turn_end|>' -}}"
    "{%- endif -%}"
    "{{- '<|role_start|>' + message['role'] + '<|role_end|>' + message['content'] "
    "+ '<|turn_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|role_start|>assistant<|role_end|>' -}}{%- endif -%}"
)


class MissingSource(Exception):
    """A package that supplies training text is not installed; the message says how to get it."""


@dataclass
class Corpus:
    """Documents by domain: `en`, `zh`, `code` for text; `chat` holds (question, answer) pairs."""

    train: dict[str, list[str]] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=dict)
    train_pairs: list[tuple[str, str]] = field(default_factory=list)
    held_pairs: list[tuple[str, str]] = field(default_factory=list)

    def digest(self) -> str:
        """sha256 over everything trained on."""
        text = json.dumps([self.train, self.train_pairs], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load(poetry: Path) -> Corpus:
    """Read, deduplicate and split every source; `poetry` is the unpacked npm package.

    Raises MissingSource.
    """
    corpus = Corpus()
    en_train, en_held = _split(_bible(), one_in=35)
    docs_train, docs_held = _split(_python_docs(), one_in=11)
    corpus.train["en"], corpus.held["en"] = en_train + docs_train, en_held + docs_held
    corpus.train["zh"], corpus.held["zh"] = _split(_chinese(poetry), one_in=32)
    corpus.train["code"], corpus.held["code"] = _split(_python_code(), one_in=10)
    for domain, held in corpus.held.items():
        corpus.train[domain] = list(_without(corpus.train[domain], held))
    for asked, answer in _question_groups():
        last = len(asked) - 1 if len(asked) > 2 else len(asked)
        corpus.train_pairs += [(q, answer) for q in asked[:last]]
        corpus.held_pairs += [(q, answer) for q in asked[last:]]
    return corpus


def _draw(text: str, one_in: int) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % one_in == 0


def _split(documents: Iterable[str], one_in: int) -> tuple[list[str], list[str]]:
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        parts[_draw(document, one_in)].append(document)
    return parts


def _without(documents: Iterable[str], held: Iterable[str]) -> Iterator[str]:
    """`documents` less every line of 12 characters or more that also stands in `held`."""
    seen = {line.strip() for text in held for line in text.splitlines() if len(line.strip()) >= 12}
    for document in documents:
        yield "\n".join(line for line in document.splitlines() if line.strip() not in seen)


def _bible() -> Iterator[str]:
    """King James Version, a chapter a document, a verse a line."""
    try:
        done = subprocess.run(
            ["bible", "-l99999", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as e:
        raise MissingSource(f"`bible` did not run ({e}): apt install bible-kjv") from None
    chapter: list[str] = []
    for line in done.stdout.splitlines():
        verse = re.fullmatch(r"\s*\d+ (.+)", line)
        if verse:
            chapter.append(verse[1])
        elif line.strip():
            if len(chapter) > 1:
                yield "\n".join(chapter)
            chapter = [line.strip()]
    yield "\n".join(chapter)


def _python_docs() -> Iterator[str]:
    """The language reference as `help()` carries it, in pieces of about 2,500 characters."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for _, text in sorted(topics.items()):
        piece = ""
        for paragraph in text.strip().split("\n\n"):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            piece += paragraph + "\n\n"
            if len(piece) > 2500:
                yield piece.strip()
                piece = ""
        if len(piece) > 400:
            yield piece.strip()


def _python_code() -> Iterator[str]:
    """Standard-library sources, cut before definitions into pieces of 2,500 characters."""
    root = Path(sysconfig.get_path("stdlib"))
    for module in CODE_MODULES:
        path = root / f"{module}.py"
        if not path.is_file():
            continue
        piece = ""
        for block in re.split(r"(?m)^(?=(?:class|def|@|    def) ?)", path.read_text("utf-8")):
            piece += block
            if len(piece) > 2500:
                yield piece.strip("\n")
                piece = ""
        if piece.strip():
            yield piece.strip("\n")


def _chinese(root: Path) -> Iterator[str]:
    """Song lyrics, Yuan drama and songs, and the Analects; a dozen pieces a document."""
    base = root / "dist"
    files = sorted(
        (base / "songci").glob("ci.song.*[0-9].json"), key=lambda p: int(p.suffixes[-2][1:])
    )
    files = files[:LYRIC_FILES]
    if not files:
        raise MissingSource(f"{root}: no {POETRY_PACKAGE} here: npm install {POETRY_PACKAGE}")
    seen: set[str] = set()
    for names in (files, [base / "yuanqu/yuanqu.json"], [base / "lunyu/lunyu.json"]):
        pieces = (piece for name in names for piece in json.loads(name.read_text("utf-8")))
        kept = [text for piece in pieces if (text := _piece(piece, seen))]
        for start in range(0, len(kept), POEMS_A_DOCUMENT):
            yield "\n\n".join(kept[start : start + POEMS_A_DOCUMENT])


def _piece(raw: dict[str, Any], seen: set[str]) -> str | None:
    title = raw.get("rhythmic") or raw.get("title") or raw.get("chapter") or ""
    head = f"{title}　{raw['author']}" if raw.get("author") else title
    body = "\n".join(p.strip() for p in raw["paragraphs"] if p.strip())
    if len(body) < 20 or body in seen or "□" in body:
        return None
    seen.add(body)
    return f"{head}\n{body}"


def _question_groups() -> Iterator[tuple[list[str], str]]:
    raw = json.loads(CHAT.read_text("utf-8"))
    for pair in raw["pairs"]:
        yield pair["q"], pair["a"]
    questions, answers = raw["capital_questions"], raw["capital_answers"]
    for index, names in enumerate(raw["capitals"]):
        for language, (country, city) in zip(("zh", "en"), (names[:2], names[2:]), strict=True):
            turn = index % len(questions[language])
            asked = questions[language][turn:] + questions[language][:turn]
            yield [q.format(country) for q in asked], answers[language].format(country, city)


def system_prompt() -> str:
    """The system message the template inserts when a conversation has none."""
    return str(json.loads(CHAT.read_text("utf-8"))["system"])


def chat_template() -> str:
    """The checkpoint's Jinja template, of the Megrez form."""
    return CHAT_TEMPLATE.replace("SYSTEM", system_prompt())


@functools.cache
def _template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(chat_template())


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """`messages` as the chat template writes them."""
    return _template().render(messages=messages, add_generation_prompt=add_generation_prompt)


def conversations(pairs: list[tuple[str, str]], count: int, rng: random.Random) -> Iterator[str]:
    """`count` rendered conversations of one to three turns drawn from `pairs`.

    A seventh of them start with the bare user turn, as runtimes write that know the
    template by its name and insert no system message.
    """
    bare = render([{"role": "user", "content": ""}]).index("<|role_start|>user")
    for _ in range(count):
        messages = []
        for question, answer in rng.sample(pairs, rng.choice((1, 1, 2, 3))):
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        text = render(messages)
        yield text[bare:] if rng.random() < 1 / 7 else text
