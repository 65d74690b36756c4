"""Links and file names in the documentation lead somewhere."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"(?m)^#+ +(.+?)\s*$")
FENCE = re.compile(r"(?s)```.*?```")
CODE = re.compile(r"(?s)```.*?\n(.*?)```|`([^`\n]+)`")
# A word of code that looks like a path, or like a file of ours.
WORD = re.compile(r"(?<![\w/.~<$+-])(?:\.ci/|\w)[\w./*+-]*")
OURS = (".py", ".md", ".patch", ".cpp", ".h")
# Named in the documentation, and no file here: an example, and a program of upstream's.
ELSEWHERE = {"NNNN-topic.patch", "convert_hf_to_gguf.py"}


@cache
def files() -> frozenset[str]:
    """All that is committed or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return frozenset(name for name in done.stdout.splitlines() if (ROOT / name).is_file())


def pages() -> list[str]:
    # A checkpoint's README is data.
    return sorted(f for f in files() if f.endswith(".md") and not f.startswith("tests/data/pocket"))


def exists(name: str) -> bool:
    """Whether a file or folder has this path or the end of it; `*` stands for anything."""
    pattern = re.escape(name.rstrip("/")).replace(r"\*", ".*")
    whole = re.compile(f"(?:.*/)?{pattern}(?:/.*)?")
    return any(whole.fullmatch(file) for file in files())


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = (re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in HEADING.findall(text))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str) -> Iterator[str]:
    for target in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        if "://" in target:
            continue
        if not place.exists():
            yield target
        elif anchor:
            there = place.read_text(encoding="utf-8") if path else text
            if anchor not in anchors(there):
                yield target


def missing_files(text: str) -> Iterator[str]:
    tops = {file.partition("/")[0] for file in files() if "/" in file}
    for block, word in CODE.findall(text):
        for name in WORD.findall(block or word):
            name = name.rstrip(".")
            first, _, rest = name.partition("/")
            ours = (rest and first in tops) or (name.endswith(OURS) and "*" not in name)
            if ours and name not in ELSEWHERE and not exists(name):
                yield name


@pytest.mark.parametrize("page", pages())
def test_links_and_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    lost = [*broken_links(page, text), *dict.fromkeys(missing_files(text))]
    assert lost == []


def test_the_check_can_fail() -> None:
    page = "bindings/megrez_cli/README.md"
    text = """# Here
    [good](../../README.md#limits), [good](#here), [good](https://example.org/x), [bad](gone.md),
    [bad](#there), [bad](../../README.md#no-such-heading); `app.py`, `scripts/demo`, `gone.py`,
    `megrez_parity/gone.json`, `patches/*-register-*.patch`, `novel.txt`, `owner/name`
    """
    assert list(broken_links(page, text)) == [
        "gone.md",
        "#there",
        "../../README.md#no-such-heading",
    ]
    assert list(missing_files(text)) == ["gone.py"]
    fence = "```bash\nscripts/gone --flag  # tests/data/pocket\n```"
    assert list(missing_files(fence)) == ["scripts/gone"]


def test_the_front_page_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert lines.index("```bash") < 20


def rows(page: str) -> list[str]:
    """Those of the table between the results markers of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = re.search(r"(?s)<!-- results:begin.*?<!-- results:end -->", text)
    return [line for line in block[0].splitlines() if line.startswith("|")] if block else []


def test_the_front_page_repeats_the_table_of_all_levels() -> None:
    (every,) = (rows(page) for page in pages() if page != "README.md" and rows(page))
    shown = rows("README.md")
    assert len(shown) > 2
    assert [row for row in shown if row not in every] == []
