"""Reports of runs that never were, as large or as odd as a test needs."""

import math
import random
from collections.abc import Sequence

from megrez_gguf.quantization.types import Fallback
from megrez_parity.results import (
    Activation,
    Audit,
    Figure,
    LayerRouting,
    LevelResult,
    Metrics,
    ParityReport,
    ReferenceRun,
    Text,
    Trace,
    TracePoint,
)

# Level -> (bits a weight, error of its weights).
LEVELS = {
    "f32": (32, 3e-7),
    "bf16": (16, 3e-7),
    "f16": (16, 2e-4),
    "q8_0": (8.5, 4e-3),
    "q6_k": (6.56, 1.2e-2),
    "q5_k_m": (5.7, 2.4e-2),
    "q5_k_s": (5.54, 2.6e-2),
    "q5_0": (5.5, 3e-2),
    "q4_k_m": (4.9, 4.8e-2),
    "q4_k_s": (4.6, 5.2e-2),
    "q4_0": (4.5, 6.4e-2),
    "iq4_nl": (4.5, 5.6e-2),
    "iq4_xs": (4.25, 5.7e-2),
    "mxfp4_moe": (4.4, 8e-2),
    "q3_k_m": (3.9, 0.11),
    "q2_k": (2.96, 0.24),
    "q4_k_m+imatrix": (4.9, 4e-2),
    "iq4_xs+imatrix": (4.25, 4.6e-2),
    "q3_k_m+imatrix": (3.9, 8e-2),
    "q2_k+imatrix": (2.96, 0.16),
}
DOMAINS = ("chat", "chinese", "code", "english")
PARAMETERS = 7_500_000_000
TENSORS = ("ffn_inp", "ffn_norm", "ffn_moe_logits", "ffn_moe_out", "ffn_shexp", "l_out")


def figure(value: float, spread: float = 0.06) -> Figure:
    return Figure(value, value * (1 - spread), value * (1 + spread))


def metrics(error: float, positions: int = 2048) -> Metrics:
    kld = error**2 * 4
    return Metrics(
        nmse=figure(error**2),
        mean_kld=figure(kld),
        median_kld=figure(kld * 0.5),
        kld_90=figure(kld * 2.4),
        kld_99=figure(kld * 7, 0.2),
        kld_999=figure(kld * 15, 0.4),
        max_kld=Figure(kld * 30, kld * 20, kld * 30),
        mean_delta_p=Figure(-error / 40, -error / 30, error / 90),
        rms_delta_p=figure(error / 5),
        same_top_p=figure(1 - min(error, 0.9), 0.005),
        perplexity=figure(11.2 * (1 + kld), 0.03),
        reference_perplexity=figure(11.2, 0.03),
        perplexity_ratio=figure(1 + kld / 3, 0.002),
        positions=positions,
    )


def routing(draw: random.Random, error: float, layers: int) -> list[LayerRouting]:
    return [
        LayerRouting(
            layer=layer,
            identical=figure(
                max(0.0, 1 - error * (0.6 + layer / layers + draw.random() / 5)), 0.01
            ),
            overlap=figure(1 - error * 0.2, 0.01),
            first_ties=round(error * 900 / layer),
            first_diverged=round(error * 40 * draw.random()) if error > 0.05 else 0,
            noise=error / 3,
            unfaithful=0,
            input_nmse=error**2 * (layer + 1) ** 0.9 * draw.uniform(0.8, 0.9),
            own_nmse=error**2 * (layer + 1) ** 0.9,
        )
        for layer in range(1, layers)
    ]


def trace(draw: random.Random, error: float, layers: int) -> Trace:
    points = [
        TracePoint(
            name,
            layer,
            error**2 * (layer + 1 + i / 10),
            error**2 * draw.uniform(0.3, 1) * (6 if (name, layer) == ("ffn_moe_out", 17) else 1),
            error**2 * 1.5,
        )
        for layer in range(layers)
        for i, name in enumerate(TENSORS)
    ]
    ends = (("embd", 0.0), ("result_norm", error**2))
    first, last = (TracePoint(name, -1, value, value, 1e-9 + error) for name, value in ends)
    return Trace([first, *points, last])


def level(
    name: str, layers: int = 31, traced: bool = False, kind: str | None = None
) -> LevelResult:
    bits, error = LEVELS.get(kind or name, (4.5, 0.05))
    draw = random.Random(ascii(name))
    size = round(PARAMETERS * bits / 8)
    scale = error**2 * 4
    low_bits = 2 < bits < 8
    return LevelResult(
        level=name,
        kind=name if kind is None else kind,
        file_bytes=size,
        sha256=f"{draw.getrandbits(256):064x}",
        types={"q4_K": round(size * 0.9), "f32": round(size * 0.1)} if low_bits else {"f32": size},
        fallbacks=[
            Fallback(f"blk.{i}.ffn_down_exps.weight", "q4_K", "q5_0", 10**8, 10**7)
            for i in range(1, layers, 3)
            if low_bits
        ],
        metrics=metrics(error),
        domains={domain: metrics(error * draw.uniform(0.8, 1.3), 512) for domain in DOMAINS},
        kld_percentiles=[
            scale * math.exp(6 * (p / 100 - 0.6)) * (1 + 6 * (p == 100)) if p > 2 else 0.0
            for p in range(101)
        ],
        routing=routing(draw, error, layers),
        depth={
            key: [
                error**2 * (1 + layer) ** 0.9 * draw.uniform(0.95, 1.05) for layer in range(layers)
            ]
            for key in ("ffn_norm", "l_out")
        },
        tokenizer_agreement=1.0,
        trace=trace(draw, error, layers) if traced else None,
        thresholds={
            "nmse": error**2 * 1.5,
            "mean_kld": scale * 1.5,
            "same_top_p": 1 - min(error, 0.9) * 1.2,
        },
        seconds={"make": 41.0, "forward": 512.5, "compare": 14.2},
    )


def report(
    names: Sequence[str] = tuple(LEVELS), layers: int = 31, traced: Sequence[str] = ()
) -> ParityReport:
    return ParityReport(
        checkpoint="models/Megrez2-3x7B-A3B",
        context=512,
        texts=[Text(d, f"heldout/{d}.txt", "ab" * 32, 2100, 4) for d in DOMAINS],
        reference=ReferenceRun("float32", 3821.5, 5_600_000_000, False, "~/.cache/megrez/0123"),
        audit=Audit(
            [
                Activation(name, enters, i, 30.0 * (i + 1) ** 2)
                for name, enters in (("attn_norm", "attn_q"), ("ffn_moe_swiglu", "ffn_down_exps"))
                for i in range(layers)
            ]
            + [Activation("result_norm", "output", None, 61.5)],
            0,
            1234,
            98765,
            PARAMETERS,
            "F16 would hold it: the largest activation is 44% of its range.",
        ),
        provenance={
            "command": "megrez-gguf parity models/Megrez2-3x7B-A3B --trace --report out",
            "llama_cpp": "9.9.9+megrez.1",
            "torch": "2.13.0",
            "machine": "Linux x86_64, some CPU with a long name @ 2.10GHz",
            "weights_sha256": "cd" * 32,
            "seed": "0",
        },
        levels=[level(name, layers, name in traced) for name in names],
    )
