"""Every level is made, of the types llama.cpp gives it, and leaves nothing behind."""

import ctypes
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from megrez_gguf import quantize
from megrez_gguf.conversion.convert import plan_quantize
from megrez_gguf.errors import ConfigError, GGUFError, OutputError
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.quantization import imatrix
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.levels import canonical as canonical_level
from megrez_gguf.quantization.types import Fallback
from megrez_llama.engine import Engine
from megrez_llama.logs import log
from megrez_parity.level_files import KNOWN, LEVELS, Made, Maker, check, level_of, listed, types_of
from megrez_runtime.calibration import collect
from support.marks import loop_takes
from support.paths import POCKET
from support.random_checkpoint import POCKET as RANDOM
from support.random_checkpoint import make_checkpoint
from support.shared import Shared

CONTEXT = 64
# Those of blocks of 256 weights.
K_LEVELS = {
    *("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q2_k"),
    *("q4_k_m+imatrix", "iq4_xs+imatrix", "q3_k_m+imatrix", "q2_k+imatrix"),
}
# What the blocks of 256 take, in bytes; ggml's own constants.
BLOCKS = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136}


@pytest.fixture(scope="module")
def windows() -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2800, CONTEXT, dtype=np.int32) for _ in range(4)]


@pytest.fixture
def maker(tmp_path: Path, windows: list[NDArray[np.int32]]) -> Iterator[Maker]:
    yield Maker(POCKET, tmp_path, calibration=windows[:3])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def source(shared: Shared) -> Path:
    return shared.pocket()


@pytest.fixture(scope="module")
def exact(source: Path, windows: list[NDArray[np.int32]]) -> NDArray[np.float32]:
    with Engine(source, CONTEXT) as engine:
        return engine.logits(windows[3])


def error(made: Made, exact: NDArray[np.float32], window: NDArray[np.int32]) -> float:
    with Engine(made.path, CONTEXT) as engine:
        found = engine.logits(window)
    return float(np.square(found - exact).sum() / np.square(exact).sum())


def misfits(path: Path) -> set[str]:
    """The quantized tensors whose rows are not whole blocks of 256, from the file itself."""
    return {
        tensor.name
        for tensor in GGUFFile.open(path).tensors
        if tensor.shape[-1] % 256 and tensor.dtype != "F32"
    }


@pytest.mark.parametrize("level", loop_takes({"f32", "q4_0", "q4_k_m"}.__contains__, LEVELS))
def test_default_levels(
    level: str, maker: Maker, exact: NDArray[np.float32], windows: list[NDArray[np.int32]]
) -> None:
    with maker.make(level) as made:
        assert error(made, exact, windows[3]) < 0.2  # of noise, the hardest of texts
        tensors = {tensor.name: tensor for tensor in GGUFFile.open(made.path).tensors}
        assert sum(types_of(made.path).values()) == sum(t.nbytes for t in tensors.values())
        assert level_of(made.path) == level
        fallen = {fallback.tensor: fallback for fallback in made.fallbacks}
        assert fallen.keys() == (misfits(made.path) if level in K_LEVELS else set())
        for name, fallback in fallen.items():
            tensor = tensors[name]
            assert tensor.dtype == fallback.got.upper()
            assert tensor.nbytes == fallback.nbytes
            wanted = math.prod(tensor.shape) / 256 * BLOCKS[fallback.wanted.upper()]
            assert fallback.extra_bytes == fallback.nbytes - wanted > 0
    assert not made.path.exists()


def test_fallbacks_of_the_pocket_widths(maker: Maker) -> None:
    with maker.make("q4_k_m") as made:
        down = 256 * 416
        pool = 16 * 256 * 64
        assert made.fallbacks == [
            # 5.5 bits a weight instead of 4.5
            Fallback("blk.0.ffn_down.weight", "q4_K", "q5_0", down * 11 // 16, down // 8),
            Fallback("blk.1.ffn_down_exps.weight", "q4_K", "q5_0", pool * 11 // 16, pool // 8),
            Fallback("blk.4.ffn_down_exps.weight", "q4_K", "q5_0", pool * 11 // 16, pool // 8),
        ]
        types = types_of(made.path)
        assert types.keys() == {"q4_K", "q6_K", "q5_0", "f32"}
        assert types["q5_0"] == sum(fallback.nbytes for fallback in made.fallbacks)
        assert list(types.values()) == sorted(types.values(), reverse=True)


def test_the_converters_fallbacks(tmp_path: Path) -> None:
    make_checkpoint(RANDOM | {"num_hidden_layers": 2, "intermediate_size": 48}, tmp_path / "c")
    with Maker(tmp_path / "c", tmp_path).make("q8_0") as made:
        size = 48 * 256
        # 16 bits a weight instead of 8.5
        assert made.fallbacks == [
            Fallback("blk.0.ffn_down.weight", "q8_0", "f16", size * 2, size * 15 // 16)
        ]


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("q3", "unknown level 'q3'; known: f32, bf16, .*q4_k_m, .*with \\+imatrix .*: .*iq1_s"),
        ("", "unknown level ''"),
        ("Q4_K_M", "unknown level"),
        ("nvfp4", "unknown level"),
        ("q4_k_m+imatrix+imatrix", "unknown level"),
        ("iq2_xs", "level 'iq2_xs' needs an importance matrix: ask for iq2_xs\\+imatrix"),
        ("q8_0+imatrix", "an importance matrix changes nothing in q8_0"),
    ],
)
def test_levels_that_cannot_be_made(level: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(level)
    with pytest.raises(ConfigError, match=message), Maker(POCKET, tmp_path).make(level):
        pass
    assert not list(tmp_path.iterdir())


def test_every_known_level_passes_the_check() -> None:
    assert set(LEVELS) < set(KNOWN)
    assert len(set(KNOWN)) == len(KNOWN)
    for level in KNOWN:
        check(level)


def test_nothing_to_calibrate_on(tmp_path: Path) -> None:
    expected = "level 'q2_k\\+imatrix' needs an importance matrix: give its file"
    with pytest.raises(ConfigError, match=expected):
        check("q2_k+imatrix", calibrated=False)
    check("q2_k", calibrated=False)
    with pytest.raises(ConfigError, match=expected):
        Maker(POCKET, tmp_path).make("q2_k+imatrix").__enter__()


def test_what_levels_share_is_made_once(tmp_path: Path, windows: list[NDArray[np.int32]]) -> None:
    said: list[str] = []
    maker = Maker(POCKET, tmp_path, say=said.append, calibration=windows)
    for level in ("q4_0", "q4_0+imatrix", "q2_k+imatrix", "f16"):
        with maker.make(level) as made:
            assert [path.name for path in tmp_path.iterdir()] == [made.path.name]
    assert said == [
        "q4_0: converting",
        "importance matrix: 4 windows in llama.cpp",
        "q4_0+imatrix: converting",
        "q2_k+imatrix: converting",
        "f16: converting",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["f32", "q4_0"])
def test_the_file_is_removed_after_an_error(level: str, maker: Maker) -> None:
    paths = []

    def fail() -> None:
        with maker.make(level) as made:
            assert made.path.exists()
            paths.append(made.path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not paths[0].exists()


def test_an_importance_matrix_from_a_file_is_taken(
    tmp_path: Path, maker: Maker, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with maker.make("q4_0") as plain, maker.make("q4_0+imatrix") as weighted:
        plain_bytes, collected = plain.path.read_bytes(), weighted.path.read_bytes()
    shapes = {
        tensor.name: (math.prod(tensor.shape[:-2]), tensor.shape[-1])
        for tensor in GGUFFile.open(source).tensors
        if len(tensor.shape) > 1
    }
    assert plain_bytes != collected
    read = []

    def load(path: Path) -> Imatrix:
        read.append(path)
        sums = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        return Imatrix(sums, {name: np.ones(s[0], np.int64) for name, s in shapes.items()})

    monkeypatch.setattr(imatrix, "load", load)
    folder = tmp_path / "other"
    folder.mkdir()
    other = Maker(POCKET, folder, imatrix_file=Path("some.gguf"))
    with other.make("q4_0+imatrix") as made:
        assert made.path.read_bytes() not in (plain_bytes, collected)
    assert read == [Path("some.gguf")]
    folder.rmdir()


@pytest.mark.parametrize("fault", ["absent", "columns", "experts"])
def test_an_importance_matrix_of_another_model(
    fault: str, source: Path, windows: list[NDArray[np.int32]], tmp_path: Path
) -> None:
    collected = collect(source, windows[:1], n_ctx=CONTEXT)
    sums, name = dict(collected.sums), "blk.4.ffn_down_exps.weight"
    total = sums.pop(name)
    found = {"columns": total[:, 1:], "experts": total[:8]}
    if fault in found:
        sums[name] = found[fault]
    expected = {
        "absent": f"it has nothing for {name}",
        "columns": rf"for {name} it has \(16, 63\), expected \(16, 64\)",
        "experts": rf"for {name} it has \(8, 64\), expected \(16, 64\)",
    }[fault]
    counts = {n: collected.counts[n][: len(total)] for n, total in sums.items()}
    weights = Imatrix(sums, counts)
    with pytest.raises(ConfigError, match=f"of another model: {expected}"):
        quantize(source, tmp_path / "x.gguf", outtype="q4_0", imatrix=weights)
    assert not list(tmp_path.iterdir())


def test_types_do_not_depend_on_what_is_logged(source: Path) -> None:
    """Lines of any other thread may come between the quantizer's own."""
    stop = threading.Event()

    def babble() -> None:
        while not stop.is_set():
            log._receive(
                2, b"[   1/   1] token_embd.weight - [1], type = f32, size = 1 MiB\n", None
            )

    quiet = plan_quantize(source, None, outtype="q4_k_m")
    thread = threading.Thread(target=babble)
    thread.start()
    try:
        loud = plan_quantize(source, None, outtype="q4_k_m")
    finally:
        stop.set()
        thread.join()
    assert loud.fallbacks == quiet.fallbacks != ()
    assert [i.encoding.name for i in loud.items] == [i.encoding.name for i in quiet.items]


def test_a_failing_quantizer_leaves_nothing(source: Path, tmp_path: Path) -> None:
    bad = with_value(source, tmp_path / "bad.gguf", "megrez-moe.block_count", 0)
    with pytest.raises(OutputError, match=r"llama.cpp cannot quantize this model to q4_0: "):
        quantize(bad, tmp_path / "out.gguf", outtype="q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_used_count", 99, "expert_used_count = 99, expected 1 to expert_count = 16"),
        ("expert_group_count", 3, "do not divide expert_count = 16"),
        ("experts_shared_frequency", 2, "experts_shared_frequency = 2 puts expert pools"),
    ],
)
def test_contradictions_are_not_quantized(
    source: Path, tmp_path: Path, key: str, value: int, message: str
) -> None:
    bad = with_value(source, tmp_path / "bad.gguf", f"megrez-moe.{key}", value)
    with pytest.raises(GGUFError, match=message):
        quantize(bad, tmp_path / "out.gguf", outtype="q4_0")


def with_value(source: Path, target: Path, key: str, value: int) -> Path:
    """`source` with the number under `key`, which takes four bytes, replaced."""
    raw = bytearray(source.read_bytes())
    start = raw.index(key.encode()) + len(key) + 4
    raw[start : start + 4] = value.to_bytes(4, "little")
    target.write_bytes(raw)
    return target


def test_level_of_other_files(source: Path, tmp_path: Path) -> None:
    for number, level in {0: "f32", 28: "iq2_s+imatrix", 39: "", 4: "", 1024: ""}.items():
        path = with_value(source, tmp_path / "x.gguf", "general.file_type", number)
        assert level_of(path) == level


def made_by_llama_cpp(
    source: Path, target: Path, number: int, weights: dict[str, NDArray[np.float32]] | None
) -> str:
    """Why the quantizer refuses or the file cannot be read, or "" for a file that loads."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    if weights:
        entries = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
        for entry, (name, values) in zip(entries, weights.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    names = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
        return "refused"
    try:
        GGUFFile.open(target)
    except GGUFError as e:
        return str(e)
    with Engine(target, CONTEXT) as engine:
        assert np.isfinite(engine.logits(np.arange(CONTEXT, dtype=np.int32))).all()
    return ""


@pytest.mark.slow
def test_the_levels_are_those_llama_cpp_can_make(
    shared: Shared, tmp_path: Path, windows: list[NDArray[np.int32]]
) -> None:
    """All its file types, with and without an importance matrix: known, or refused, or the same.

    Of a model with all kinds of tensors and few of each: there are seventy files to be made.
    """
    few = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_shared_experts": 1}
    few |= {"intermediate_size": 256, "vocab_size": 512}
    source = shared.converted(shared.checkpoint(RANDOM | few))
    weights = collect(source, [window % 500 for window in windows], n_ctx=CONTEXT).means
    prefix = "LLAMA_FTYPE_MOSTLY_"
    names = [name for name in vars(llama_cpp) if name.startswith(prefix)]
    assert len(names) > 30
    for name in names:
        kind, number = name.removeprefix(prefix).lower(), getattr(llama_cpp, name)
        plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
        without = made_by_llama_cpp(source, plain, number, None)
        given = made_by_llama_cpp(source, weighted, number, weights)
        assert (kind in KNOWN) == (not without), (kind, without)
        useful = not given and (without or plain.read_bytes() != weighted.read_bytes())
        assert (kind + "+imatrix" in KNOWN) == bool(useful), (kind, given)


@pytest.mark.parametrize("seed", range(20))
def test_a_list_of_levels_as_people_write_it(seed: int) -> None:
    draw = random.Random(seed)
    names = draw.sample([*KNOWN, "recipe:My Mix.toml", "recipe:My Mix.toml+imatrix"], 6)

    def written(name: str) -> str:
        spelled = name if "recipe:" in name else draw.choice([name, name.upper(), name.title()])
        return f"{draw.choice(['', ' ', '  '])}{spelled}{draw.choice(['', ' '])}"

    entries = [*map(written, names), *map(written, draw.sample(names, 2)), "", " "]
    repeated = entries[:6] + draw.sample(entries[6:], 4)
    assert listed(",".join(repeated)) == names
    with pytest.raises(ConfigError, match="expected a level"):
        listed(draw.choice(["", ",", " , ,"]))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *(
            ("q4km", "q4_k_m"),
            ("Q4_K - Medium", "q4_k_m"),
            ("MOSTLY_Q8_0", "q8_0"),
            ("int8", "q8_0"),
        ),
        *(("fp16", "f16"), ("bfloat16", "bf16"), ("float32", "f32"), ("IQ4-XS", "iq4_xs")),
    ],
)
def test_a_level_of_another_spelling_is_suggested(theirs: str, ours: str) -> None:
    for refuse in (canonical_level, check):
        with pytest.raises(ConfigError, match=f"did you mean {ours}"):
            refuse(theirs)
