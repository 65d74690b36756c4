"""The readers of files that came from elsewhere, each with sound inputs to start from.

Whatever the bytes: a reader returns or raises its refusal, writes nothing, and takes memory in
proportion to the input.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import tempfile
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.shard_set import choose
from megrez_gguf.checkpoint.shards import Checkpoint, announced_shards, read_header
from megrez_gguf.checkpoint.tokenizer import read_vocabulary
from megrez_gguf.conversion import layout, metadata
from megrez_gguf.conversion.plan import plan
from megrez_gguf.conversion.source import StoredModel, from_checkpoint, from_gguf
from megrez_gguf.examination.inspection import inspect, render
from megrez_gguf.format.reader import GGUFFile, part_path
from megrez_gguf.format.writer import header
from megrez_gguf.quantization import imatrix, recipe
from megrez_gguf.text import parse_size
from megrez_llama.errors import MegrezError
from megrez_parity.thresholds import Scope, Thresholds
from megrez_runtime.memory import Needs
from support.configurations import TINY
from support.fuzzing import mutation
from support.gguf_edit import Gguf, floats
from support.paths import REPO
from support.random_checkpoint import CHAT_TEMPLATE, make_checkpoint
from support.random_checkpoint import header as shard_header

# What a reader may take at its peak: so much at once, and so many bytes a byte of input. Python's
# objects are large: the int of one signed byte takes 36, the dict of `{"a":0}` 240.
ALLOWANCE = 2 << 20
MULTIPLE = 80
# Of inputs so long, the peak divided by their length tells something.
_LONG = 1 << 14

# Between the files of an input that has several, and in place of one that is not there.
_SEPARATOR = b"\n\0--8<--\0\n"
_ABSENT = b"\0absent"

_LEAST = TINY | {
    "experts_shared_frequency": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 4,
    "intermediate_size": 4,
    "moe_intermediate_size": 2,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_attention_heads": 2,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "vocab_size": 270,
}
_NAMES = sorted({rule.target.format(i=i) for rule in layout.TABLE for i in (0, 1, 12)})
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.json", "chat_template.jinja"),
    "additional_chat_templates/x.jinja",
)


@dataclass(frozen=True)
class Target:
    """Readers that take the files `names` of one folder, which an input gives in this order.

    `read` gets the folder; it may raise `refusals`. `kinds` tell how each file is changed.
    """

    name: str
    names: tuple[str, ...]
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    kinds: tuple[mutation.Mutate, ...]
    refusals: tuple[type[Exception], ...] = (MegrezError,)
    share: float = 1.0
    """Of the executions, against other targets: less for one that takes long."""
    around: Mapping[str, bytes] = field(default_factory=dict)
    """Sound files that lie beside those of the input."""

    def mutate(self, data: bytes, draw: random.Random) -> bytes:
        """`data` with one of its files changed, or missing."""
        files = data.split(_SEPARATOR)
        at = draw.randrange(len(files))
        if len(self.names) > 1 and draw.random() < 0.03:
            files[at] = _ABSENT
        else:
            files[at] = self.kinds[min(at, len(self.kinds) - 1)](files[at], draw)
        return _SEPARATOR.join(files)


class _Folder:
    """Where inputs lie while they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[str, bytes] = {}

    def put(self, names: Sequence[str], data: bytes) -> None:
        """Make the files of `names` those of the input `data`; unchanged ones are left alone."""
        files = dict(zip(names, data.split(_SEPARATOR), strict=False))
        files = {name: content for name, content in files.items() if content != _ABSENT}
        for name in self._content.keys() - files.keys():
            (self.path / name).unlink()
        for name, content in files.items():
            if self._content.get(name) != content:
                (self.path / name).parent.mkdir(exist_ok=True)
                (self.path / name).write_bytes(content)
        self._content = files


@dataclass
class Checker:
    """Runs inputs through `target`, and raises AssertionError for what must not be.

    They lie in `folder`, which is empty, and in memory if possible. The memory that every `every`th
    input takes is measured, which makes it several times as slow.
    """

    target: Target
    folder: Path
    every: int = 64
    accepted: int = 0
    executions: int = 0
    multiple: float = 0.0
    """The most memory that an input of some length took, in bytes a byte of it."""

    def __post_init__(self) -> None:
        self._files = _Folder(self.folder)
        _watch()
        warnings.simplefilter("ignore")
        for name, content in self.target.around.items():
            (self.folder / name).write_bytes(content)

    def __call__(self, data: bytes) -> bool:
        """Whether the reader accepts `data`."""
        self._files.put(self.target.names, data)
        self.executions += 1
        # Long ones are few.
        every = self.every if len(data) < _LONG else max(self.every // 4, 1)
        measured = self.executions % every == 0
        with self._measured(len(data)) if measured else _unmeasured():
            accepted = self._read()
        self.accepted += accepted
        return accepted

    def accepts(self, data: bytes) -> None:
        """Raises what the reader raises for `data`, which is sound."""
        self._files.put(self.target.names, data)
        self.target.read(self.folder)

    def _read(self) -> bool:
        _watched.append(self.target.name)
        try:
            self.target.read(self.folder)
        except self.target.refusals as e:
            str(e)
            return False
        finally:
            _watched.clear()
        return True

    @contextmanager
    def _measured(self, size: int) -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if size >= _LONG:
            self.multiple = max(self.multiple, peak / size)
        assert peak <= ALLOWANCE + MULTIPLE * size, f"{peak} bytes of memory for {size} of input"


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FORBIDDEN = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.system", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"),
    *("shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp", "pickle.find_class"),
}
# The target that is reading, if any.
_watched: list[str] = []


@cache
def _watch() -> None:
    """Let no reader write, connect or start programs. Python knows no way to end this."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not _watched:
            return
        if event in _FORBIDDEN or (event == "open" and arguments[2] & _WRITING):
            raise AssertionError(f"{_watched[0]} did {event} {arguments}")

    sys.addaudithook(audit)


@contextmanager
def _unmeasured() -> Iterator[None]:
    yield


# --- checkpoints -------------------------------------------------------------------------------


def _checkpoint(**options: Any) -> dict[str, bytes]:
    """The files of the smallest checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        config = _LEAST | options.pop("config", {})
        made = make_checkpoint(config, Path(folder) / "made", **options)
        return {path.name: _compact(path) for path in sorted(made.iterdir())}


def _compact(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    return json.dumps(json.loads(path.read_bytes()), separators=(",", ":")).encode()


_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX = "model.safetensors.index.json"
_CHECKPOINT = ("config.json", _INDEX, *_SHARDS, "README.md", *_TOKENIZER)
_README = b"---\nlicense: other\nlicense_name: 'x'\ntags:\n- moe\n---\n# A model\n"


def bundle(names: Sequence[str], files: dict[str, bytes]) -> bytes:
    return _SEPARATOR.join(files.get(name, _ABSENT) for name in names)


def _checkpoint_seeds() -> list[bytes]:
    tied = {"tie_word_embeddings": True, "attention_bias": True}
    files = [_checkpoint(shard_bytes=3000), _checkpoint(shard_bytes=2400, config=tied)]
    return [bundle(_CHECKPOINT, one | {"README.md": _README}) for one in files]


def _read_checkpoint(folder: Path) -> None:
    _plan(from_checkpoint(Checkpoint.open(folder)))


def _plan(source: StoredModel) -> None:
    planned = plan(source, None, None, weights=None, split_max_size=512, ask_llama_cpp=False)
    planned.headers()


def _shard_seeds() -> list[bytes]:
    shapes: list[dict[str, tuple[int, ...]]] = [
        {"a": (2, 3), "b": (), "c": (0, 4)}, {"model.norm.weight": (4,)}, {}
    ]  # fmt: skip
    return [
        shard_header(s, code, width) + bytes(6 * width + width if "a" in s else 4 * width * len(s))
        for s in shapes
        for code, width in (("F32", 4), ("BF16", 2), ("I8", 1))
    ]


def _read_shard(folder: Path) -> None:
    path = folder / "x.safetensors"
    _, tensors = read_header(path)
    data = path.read_bytes()
    if zlib.crc32(data) % 4 == 0 and b"-0" not in data:  # an integer for Python alone
        from safetensors import deserialize

        theirs = {
            name: (tuple(entry["shape"]), entry["dtype"], len(entry["data"]))
            for name, entry in deserialize(data)
        }
        ours = {t.name: (t.shape, t.dtype, t.nbytes) for t in tensors}
        assert ours == theirs, f"{ours} here, {theirs} in the safetensors package"


def _index_seeds() -> list[bytes]:
    files = _checkpoint(shard_bytes=1800)
    few = {"metadata": {"total_size": 8}, "weight_map": dict(zip("ab", _SHARDS, strict=True))}
    return [files[_INDEX], json.dumps(few).encode()]


def _read_index(folder: Path) -> None:
    announced_shards(folder, _SHARDS)


def _config_seeds() -> list[bytes]:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    odd = {
        "architectures": ["MegrezMoeForCausalLM"],
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        "n_group": 2, "topk_group": 1, "n_routed_experts": 8, "moe_layer_freq": 2,
        "experts_shared_frequency": 2, "first_k_dense_replace": 2, "head_dim": 16,
        "quantization_config": None, "auto_map": {"AutoConfig": "x.y"}, "eos_token_id": [1, 2],
        "_name_or_path": "Infinigence/Megrez2-3x7B-A3B", "partial_rotary_factor": 1.0,
        "sliding_window": None, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    published = json.loads((REPO / "tests/data/pocket/config.json").read_bytes())
    configs = [_LEAST, TINY | {"rope_scaling": yarn}, TINY | odd, published]
    del configs[2]["rope_theta"]  # it stands in rope_parameters
    return [json.dumps(config).encode() for config in configs]


def _read_config(folder: Path) -> None:
    documents = Documents.read(folder)
    config = ModelConfig.of(documents)
    assert all(isinstance(remark, str) for remark in config.remarks)
    header({**metadata.architecture(config), **metadata.sampling(documents.generation)}, ())
    metadata.size_label(config, 1)


def _tokenizer_seeds() -> list[bytes]:
    made = _checkpoint()
    small = json.loads(made["tokenizer.json"])
    letters = ["a", "b", "c", "ab", "abc"]
    small["model"] |= {
        "vocab": {t: i for i, t in enumerate(letters)}, "merges": [["a", "b"], ["ab", "c"]]
    }  # fmt: skip
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    small["added_tokens"] = [
        {"id": 5 + i, "content": text, "special": i < 2, **flags}
        for i, text in enumerate(("<s>", "</s>", "x"))
    ]
    small["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    pieces = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    small["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel"} | dict.fromkeys(("add_prefix_space", "trim_offsets"), False),
            {
                "type": "TemplateProcessing", "single": pieces, "pair": [],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
            },
        ],
    }  # fmt: skip
    settings = {
        "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None,
        "added_tokens_decoder": {"7": {"content": "x"}, "8": {"content": "y", "special": True}},
        "chat_template": [{"name": "default", "template": CHAT_TEMPLATE}],
        "add_bos_token": True,
    }  # fmt: skip
    variant = {
        "tokenizer.json": small,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"bos_token": "<s>", "unk_token": "x"},
        "generation_config.json": {"eos_token_id": [6, 7], "temperature": 0.7, "top_k": 20},
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    files = {name: json.dumps(content).encode() for name, content in variant.items()}
    template = dict.fromkeys(_TOKENIZER[-2:], CHAT_TEMPLATE.encode())
    return [bundle(_TOKENIZER, one) for one in (files, files | template, made, made | template)]


def _read_tokenizer(folder: Path) -> None:
    documents = Documents.read(folder)
    values = read_vocabulary(documents, 300).key_values()
    header({**values, **metadata.sampling(documents.generation)}, ())


# --- GGUF --------------------------------------------------------------------------------------

_PARTS = (part_path(Path("x"), 0, 2).name, part_path(Path("x"), 1, 2).name)


def _model() -> Gguf:
    """The smallest model."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_checkpoint(_LEAST, Path(folder) / "made", dtype="float32")
        source = from_checkpoint(Checkpoint.open(made))
    infos = [item.info for item in source.tensors]
    return Gguf.parse(header(source.values, infos) + bytes(64 * 1024))


def _gguf_seeds() -> list[bytes]:
    odd = Gguf()
    array = [(kind, [0, 1, 1]) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)]
    odd.values = {f"a.{kind}": (9, (kind, items)) for kind, items in array}
    odd.values |= {f"s.{kind}": (kind, 1) for kind, _ in array}
    odd.values |= {"s.8": (8, "é"), "a.8": (9, (8, ["", "b"])), "general.alignment": (4, 32)}
    odd.tensors = {"a": floats([[1.0, 2.0]]), "b": floats([3.0])}
    empty = Gguf()
    return [odd.to_bytes(), empty.to_bytes(), _model().to_bytes()]


def _read_gguf(folder: Path) -> None:
    path = folder / "x.gguf"
    file = GGUFFile.open(path)
    if zlib.crc32(path.read_bytes()) % 8 == 0:
        _compare(file, path)


def _compare(file: GGUFFile, path: Path) -> None:
    """Hold the names, shapes and places of tensors against what the gguf package reads."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError):
        return  # it raises what comes first: of empty tensors, keys of its own, odd alignments
    ours = {t.name: (t.shape[::-1], t.dtype, t.begin, t.nbytes) for t in file.tensors}
    theirs = {
        t.name: (tuple(t.shape.tolist()), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in tensors
    }
    assert ours == theirs, f"{ours} here, {theirs} in the gguf package"


def _read_model(folder: Path) -> None:
    """What refuses a file keeps none of the others from it."""
    refusals = []
    for read in (
        lambda path: _plan(from_gguf(path)),
        lambda path: Needs.of(GGUFFile.open(path), path),
        lambda path: render(inspect(path, scan=False)),
    ):
        try:
            read(folder / "x.gguf")
        except MegrezError as e:
            refusals.append(e)
    if refusals:
        raise refusals[0]


def _split_seeds() -> list[bytes]:
    whole = _model()
    names = list(whole.tensors)
    parts = []
    for number, own in enumerate((names[:20], names[20:])):
        part = Gguf()
        part.values = dict(whole.values) if number == 0 else {}
        part.values |= {
            "split.no": (2, number), "split.count": (2, 2), "split.tensors.count": (5, len(names))
        }  # fmt: skip
        part.tensors = {name: whole.tensors[name] for name in own}
        parts.append(part.to_bytes())
    return [_SEPARATOR.join(parts)]


def _read_split(folder: Path) -> None:
    GGUFFile.open(folder / _PARTS[0])


def _imatrix_seeds() -> list[bytes]:
    file = Gguf()
    file.values = {
        "general.type": (8, "imatrix"), "imatrix.datasets": (9, (8, ["a.txt"])),
        "imatrix.chunk_count": (4, 3), "imatrix.chunk_size": (4, 512),
    }  # fmt: skip
    for name, matrices in (("blk.0.attn_q.weight", 1), ("blk.1.ffn_up_exps.weight", 2)):
        file.tensors[f"{name}.in_sum2"] = floats([[1.0, 2.0, 0.5]] * matrices)
        file.tensors[f"{name}.counts"] = floats([[3.0]] * matrices)
    matrix = b"blk.0.attn_q.weight"
    entry = struct.pack("<i", len(matrix)) + matrix + struct.pack("<ii3f", 2, 3, 1.0, 2.0, 0.5)
    legacy = struct.pack("<i", 1) + entry
    return [file.to_bytes(), legacy, legacy + struct.pack("<ii", 7, 5) + b"a.txt"]


def _read_imatrix(folder: Path) -> None:
    matrix = imatrix.load(folder / "x.imatrix")
    matrix.unseen()
    header(matrix.key_values(), ())
    assert len(matrix.means) == len(matrix.sums)
    shapes = {name: (len(sums), 1, sums.shape[1]) for name, sums in matrix.sums.items()}
    matrix.means_for([_Shaped(*item) for item in shapes.items()])
    if matrix.counts:
        imatrix.merge([matrix, matrix]).to_bytes()


@dataclass(frozen=True)
class _Shaped:
    name: str
    shape: tuple[int, ...]


def _imatrix_mutation(data: bytes, draw: random.Random) -> bytes:
    return (mutation.gguf if data.startswith(b"GGUF") else mutation.octets)(data, draw)


# --- settings ----------------------------------------------------------------------------------


def _recipe_seeds() -> list[bytes]:
    own = b"""description = "..."
level = "q4_k_m"
[types]
'ffn_(up|gate)_exps' = "iq4_nl"
"""
    folder = Path(recipe.__file__).parent / "recipes"
    return [own, *(path.read_bytes() for path in sorted(folder.glob("*.toml")))]


def _read_recipe(folder: Path) -> None:
    recipe.load(folder / "x.toml").check_matches(_NAMES)


def _thresholds_seeds() -> list[bytes]:
    levels = {"q4_0": {"nmse": 0.1, "trace": {"l_out": 1e-3}}, "f32": {"same_top_p": 0.5}}
    return [json.dumps({"weights_sha256": "", "levels": levels}).encode(), b'{"levels":{}}']


def _read_thresholds(folder: Path) -> None:
    bounds = Thresholds.load(folder / "x.json")
    for level in ("f32", *bounds.figures):
        for run in (bounds.scope, Scope()):
            bounds.of(level, run)
            bounds.tolerances(level, run)


def _log_seeds() -> list[bytes]:
    types = [[r"\.attn_q\.", "q4_K"], ["x", "q8_0"]]
    lines = [json.dumps({"types": types[:n], "mean_kld": n / 8}) for n in range(3)]
    return ["\n".join(lines).encode(), "\n".join([*lines, ""]).encode()]


def _read_log(folder: Path) -> None:
    from megrez_parity.recipe_meter import read_log

    read_log(folder / "x.jsonl")


def _record_seeds() -> list[bytes]:
    record = {
        "files": {"x.npy": 0}, "seconds": 1.5, "peak_rss": 1 << 28,
        "maxima": {"ffn_moe_swiglu": 3.5, "attn_norm": 1.0},
    }  # fmt: skip
    return [json.dumps(record).encode()]


def _read_record(folder: Path) -> None:
    from megrez_parity.reference_store import read_record

    if record := read_record(folder):
        assert all(isinstance(size, float) for size in record.maxima.values())


def _listing_seeds() -> list[bytes]:
    folders = (
        [*_SHARDS, "config.json"], ["model.safetensors"], ["x.safetensors", "adapter.safetensors"],
        ["model_1-of-3.safetensors", "model_2-of-3.safetensors", "model_3-of-3.safetensors"],
    )  # fmt: skip
    return ["\n".join(names).encode() for names in folders]


def _read_listing(folder: Path) -> None:
    choose("x", (folder / "x").read_text("utf-8", "replace").splitlines(), None)


def _read_size(folder: Path) -> None:
    size = parse_size((folder / "x").read_text("utf-8"))
    assert size > 0


def _read_readme(folder: Path) -> None:
    metadata.front_matter(folder / "README.md")


_BESIDE = {"config.json": json.dumps(_LEAST | {"eos_token_id": 6}).encode()}

TARGETS = {
    target.name: target
    for target in (
        Target("shard", ("x.safetensors",), _read_shard,
               _shard_seeds, (mutation.safetensors,)),
        Target("index", (_INDEX,), _read_index, _index_seeds, (mutation.document,), around=_BESIDE),
        Target("config", ("config.json",), _read_config, _config_seeds, (mutation.document,)),
        Target("tokenizer", _TOKENIZER, _read_tokenizer, _tokenizer_seeds,
               (*[mutation.document] * 5, mutation.tokens), share=0.5, around=_BESIDE),
        Target("checkpoint", _CHECKPOINT, _read_checkpoint, _checkpoint_seeds,
               (*[mutation.document] * 2, *[mutation.safetensors] * 2, mutation.tokens,
                mutation.document), share=0.1),
        Target("gguf", ("x.gguf",), _read_gguf, _gguf_seeds, (mutation.gguf,)),
        Target("model", ("x.gguf",), _read_model, lambda: [_model().to_bytes()], (mutation.gguf,),
               share=0.25),
        Target("split", _PARTS, _read_split, _split_seeds, (mutation.gguf,)),
        Target("imatrix", ("x.imatrix",), _read_imatrix, _imatrix_seeds, (_imatrix_mutation,)),
        Target("recipe", ("x.toml",), _read_recipe, _recipe_seeds, (mutation.document,)),
        Target("thresholds", ("x.json",), _read_thresholds, _thresholds_seeds,
               (mutation.document,)),
        Target("log", ("x.jsonl",), _read_log, _log_seeds, (mutation.document,)),
        Target("record", ("record.json",), _read_record, _record_seeds, (mutation.document,),
               around={"x.npy": b""}),
        Target("listing", ("x",), _read_listing, _listing_seeds, (mutation.tokens,)),
        Target("readme", ("README.md",), _read_readme, lambda: [_README], (mutation.tokens,)),
        Target("size", ("x",), _read_size, lambda: [b"2GiB", b"0.5 M", b"4096"],
               (mutation.tokens,), refusals=(ValueError,)),
    )
}  # fmt: skip
"""By name. Modules that need torch are imported by what reads with them."""
