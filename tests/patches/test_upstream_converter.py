"""Upstream's converter, taught Megrez2 by the patches, writes what ours writes.

Every tensor is the same byte for byte, and every key that llama.cpp reads has the same value and
type, save for those of `DIFFERENT`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from megrez_llama_build import source
from safetensors.torch import load_file, save_file

import megrez_gguf
from megrez_gguf.errors import MegrezError
from support.odd_configs import BASE, CASES, Case
from support.paths import POCKET
from support.random_checkpoint import make_checkpoint

Tensors = dict[str, torch.Tensor]

# Keys of which the two may differ, and why.
DIFFERENT = {
    "general.name": "upstream spells a folder's name as a title",
    "general.basename": "upstream leaves it out where the name has no size in it",
    "general.size_label": "upstream counts experts, ours how often each pool is used",
    "megrez-moe.rope.scaling.original_context_length": "upstream: for yarn, which alone uses it",
    "tokenizer.ggml.bos_token_id": "ours names one where the tokenizer does not, since llama.cpp "
    "would take token 11",
}

# The reader's own fields, and our converter's record of its work, which llama.cpp passes over.
IGNORED = ("GGUF.", "megrez-gguf.")

# One process converts one checkpoint after the other: importing torch takes seconds. AutoTokenizer
# of transformers 5.23 dies of yarn in the config.json of a model it does not know, so the class it
# would choose takes its place; `test_the_pocket_by_the_script_itself` goes without this.
WORKER = """
import json, os, sys, traceback
import transformers
transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import convert_hf_to_gguf, conversion, gguf, transformers
# Upstream pins transformers 4. Version 5 loads no tokenizer beside a config.json with yarn, if it
# does not know the model: it looks for this in the configuration before it is put there.
transformers.PreTrainedConfig.max_position_embeddings = None
print(json.dumps([m.__file__ for m in (conversion, gguf)]), file=answers, flush=True)
for line in sys.stdin:
    sys.argv = ["convert_hf_to_gguf.py", *json.loads(line)]
    error = None
    try:
        convert_hf_to_gguf.main()
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps(error), file=answers, flush=True)
"""


def environment(llama: Path) -> dict[str, str]:
    """Of a process that finds the patched tree's own gguf, and no network."""
    path = os.pathsep.join([str(llama / "gguf-py"), str(llama)])
    return os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp in a patched tree."""
    tree = tmp_path_factory.mktemp("upstream") / "tree"
    source.tree(tree)
    return tree / "vendor" / "llama.cpp"


class Upstream:
    """A running converter of the tree at `llama`."""

    def __init__(self, llama: Path, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment(llama),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
        )
        self.modules = [Path(name) for name in self._answer()]

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text("utf-8")
        return json.loads(line)

    def try_to_convert(self, folder: Path, outtype: str = "auto") -> str | None:
        """Write `upstream.gguf` beside the checkpoint; the traceback if that failed."""
        out = folder.parent / "upstream.gguf"
        arguments = [str(folder), "--outfile", str(out), "--outtype", outtype]
        assert self.process.stdin is not None
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        error: str | None = self._answer()
        return error

    def convert(self, folder: Path, outtype: str = "auto") -> Path:
        error = self.try_to_convert(folder, outtype)
        assert error is None, error
        return folder.parent / "upstream.gguf"


@pytest.fixture(scope="module")
def upstream(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    running = Upstream(llama, tmp_path_factory.mktemp("log") / "stderr.txt")
    assert all(path.is_relative_to(llama) for path in running.modules), running.modules
    yield running
    running.process.communicate()


def make(
    folder: Path,
    changes: dict[str, Any] | None = None,
    dtype: str = "bfloat16",
    edit: Callable[[Tensors], Any] | None = None,
    **options: Any,
) -> Path:
    """A small checkpoint in `folder`, of BASE with `changes`, after `edit(tensors)` in place."""
    checkpoint = make_checkpoint(BASE | (changes or {}), folder / "checkpoint", 0, dtype, **options)
    if edit:
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
    return checkpoint


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content), "utf-8")


def key_values(reader: GGUFReader) -> dict[str, Any]:
    return {
        name: (tuple(field.types), field.contents())
        for name, field in reader.fields.items()
        if not name.startswith(IGNORED) and name not in DIFFERENT
    }


def assert_same(theirs: Path, ours: Path) -> None:
    one, two = GGUFReader(theirs), GGUFReader(ours)
    assert key_values(one) == key_values(two)
    tensors = {t.name: t for t in one.tensors}
    assert tensors.keys() == {t.name for t in two.tensors}
    for mine in two.tensors:
        other = tensors[mine.name]
        assert other.tensor_type == mine.tensor_type, mine.name
        assert other.shape.tolist() == mine.shape.tolist(), mine.name
        assert np.array_equal(other.data.view(np.uint8), mine.data.view(np.uint8)), mine.name


def check(upstream: Upstream, folder: Path, outtype: Any = "auto") -> None:
    theirs = upstream.convert(folder, outtype)
    ours = folder.parent / "ours.gguf"
    megrez_gguf.convert(folder, ours, outtype=outtype)
    assert_same(theirs, ours)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_configuration(upstream: Upstream, tmp_path: Path, case: Case) -> None:
    check(upstream, make(tmp_path, case.changes, edit=case.edit, **case.options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("outtype", ["f32", "bf16", "f16", "q8_0"])
def test_every_type(upstream: Upstream, tmp_path: Path, dtype: str, outtype: str) -> None:
    check(upstream, make(tmp_path, {"intermediate_size": 168}, dtype), outtype)


def test_several_shards(upstream: Upstream, tmp_path: Path) -> None:
    folder = make(tmp_path, shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    check(upstream, folder)


def test_yarn_of_the_deepseek_kind(upstream: Upstream, tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 8, "mscale": 1.0, "mscale_all_dim": 0, "beta_fast": None}
    check(upstream, make(tmp_path, {"rope_scaling": yarn}))


def test_only_what_must_be_there_is(upstream: Upstream, tmp_path: Path) -> None:
    folder = make(tmp_path)
    optional = {
        "moe_layer_freq", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
        "scoring_func", "topk_method", "rope_scaling", "tie_word_embeddings", "attention_bias",
    }  # fmt: skip
    edit_json(folder / "config.json", lambda config: [config.pop(name) for name in optional])
    check(upstream, folder)


def test_prediction_layers_and_tied_outputs_are_left_out(
    upstream: Upstream, tmp_path: Path
) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name in [n for n in tensors if n.startswith("model.layers.4.")]:
            tensors[name.replace(".4.", ".7.")] = tensors[name].clone()

    changes = {"num_nextn_predict_layers": 1, "tie_word_embeddings": True}
    check(upstream, make(tmp_path, changes, edit=add))


def test_the_pocket_by_the_script_itself(llama: Path, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "upstream.gguf", tmp_path / "ours.gguf"
    command = [sys.executable, str(llama / "convert_hf_to_gguf.py"), str(POCKET)]
    command += ["--outfile", str(theirs)]
    done = subprocess.run(command, env=environment(llama), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    megrez_gguf.convert(POCKET, ours)
    assert_same(theirs, ours)


def _lose_an_expert(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def _give_experts_to_a_layer_that_shares(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.1.mlp.experts.")]:
        tensors[name.replace(".1.", ".2.", 1)] = -tensors[name]


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({}, _lose_an_expert, "Unprocessed experts: ['model.layers.1.mlp.experts."),
        (
            {},
            _give_experts_to_a_layer_that_shares,
            "Unexpected 'model.layers.2.mlp.experts.0.down_proj.weight': only layers [1, 4] hold",
        ),
        ({"moe_layer_freq": 2}, None, "moe_layer_freq = 2 makes layers [1] dense"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            None,
            "Unsupported RoPE type: longrope",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}},
            None,
            "yarn with mscale_all_dim",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
            None,
            "yarn with mscale and no attention_factor",
        ),
    ],
    ids=[
        "an expert is missing",
        "experts where none belong",
        "dense pool",
        "longrope",
        "mscale_all_dim",
        "mscale",
    ],
)
def test_refusals(
    upstream: Upstream,
    tmp_path: Path,
    changes: dict[str, Any],
    edit: Callable[[Tensors], Any] | None,
    message: str,
) -> None:
    folder = make(tmp_path, edit=edit)
    edit_json(folder / "config.json", lambda config: config.update(changes))
    error = upstream.try_to_convert(folder)
    assert error is not None
    assert message in error
    with pytest.raises(MegrezError):
        megrez_gguf.convert(folder, tmp_path / "ours.gguf")


def _digits_by_three(tokenizer: dict[str, Any]) -> None:
    split = tokenizer["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")


@pytest.mark.parametrize(
    "edit",
    [
        _digits_by_three,
        lambda t: t["model"].update(ignore_merges=True),
        lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
        lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
        lambda t: t.update(normalizer={"type": "Lowercase"}),
    ],
    ids=["other regex", "ignore_merges", "second regex", "other behaviour", "other normaliser"],
)
def test_a_tokenizer_that_splits_otherwise_is_not_called_megrez(
    upstream: Upstream, tmp_path: Path, edit: Callable[[Any], Any]
) -> None:
    folder = make(tmp_path)
    edit_json(folder / "tokenizer.json", edit)
    error = upstream.try_to_convert(folder)
    assert error is not None
    assert "BPE pre-tokenizer was not recognized" in error
