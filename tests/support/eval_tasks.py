"""Small tasks from the pocket checkpoint's own domain, in lm-evaluation-harness's YAML.

On harness tasks the pocket model scores what guessing scores; on these it is far from chance.

    python tests/support/eval_tasks.py FOLDER 400     write them, with so many questions
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.paths import HELDOUT, REPO

CHAT = json.loads((REPO / "scripts" / "makers" / "pocket_chat.json").read_text("utf-8"))
SYSTEM: str = CHAT["system"]

CLOZE = """\
task: pocket_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
CAPITALS = """\
task: pocket_capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 32, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TEXT = """\
task: pocket_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def cloze(count: int = 60) -> list[dict[str, Any]]:
    """How does held-out English go on? One of four ways is the true one."""
    draw = random.Random(0)
    words = (HELDOUT / "en.txt").read_text("utf-8").split()
    starts = draw.sample(range(len(words) - 60), 4 * count)
    docs = []
    for i in range(count):
        true, *false = starts[4 * i : 4 * i + 4]
        choices = [" " + " ".join(words[s + 40 : s + 46]) for s in (true, *false)]
        answer = draw.randrange(4)
        choices[0], choices[answer] = choices[answer], choices[0]
        context = " ".join(words[true : true + 40])
        docs.append({"context": context, "choices": choices, "answer": answer})
    return docs


def capitals(count: int = 40) -> list[dict[str, Any]]:
    """The capitals that the model was taught, by questions as it was taught them."""
    questions, said = CHAT["capital_questions"]["en"], CHAT["capital_answers"]["en"]
    draw = random.Random(0)
    return [
        {
            "question": draw.choice(questions).format(country),
            "answer": said.format(country, city),
        }
        for _, _, country, city in CHAT["capitals"][:count]
    ]


def texts() -> list[dict[str, Any]]:
    """Pieces of held-out English and Chinese."""
    whole = [(HELDOUT / f"{name}.txt").read_text("utf-8") for name in ("en", "zh")]
    return [{"text": text[at : at + 1000]} for text in whole for at in range(0, 8000, 1000)]


def write(folder: Path, count: int = 60) -> Path:
    """The tasks pocket_cloze (`count` questions), pocket_capitals and pocket_text, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text, docs in (
        ("cloze", CLOZE, cloze(count)),
        ("capitals", CAPITALS, capitals()),
        ("text", TEXT, texts()),
    ):
        data = folder / f"{name}.jsonl"
        lines = (json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
        data.write_text("".join(lines), "utf-8")
        (folder / f"{name}.yaml").write_text(text.format(data=data), "utf-8")
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
