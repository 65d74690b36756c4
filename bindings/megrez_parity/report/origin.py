"""What the files are made of, whether F16 would do, and where all of it comes from."""

from __future__ import annotations

import math
from collections import Counter

from megrez_gguf.quantization.encode import F16_LIMIT
from megrez_parity.report.content import Bad, Section, Table
from megrez_parity.report.words import NONE, clean, mib, number, percent
from megrez_parity.results import ParityReport

F16_MAX = 65504.0  # what is up to F16_LIMIT still rounds to it


def fallbacks(report: ParityReport) -> Section:
    rows, single = [], []
    for result in report.levels:
        kinds = Counter((x.wanted, x.got) for x in result.fallbacks)
        for (wanted, got), count in kinds.items():
            chosen = [x for x in result.fallbacks if (x.wanted, x.got) == (wanted, got)]
            extra = sum(x.extra_bytes for x in chosen)
            share = extra / result.file_bytes if result.file_bytes else None
            rows.append(
                [
                    clean(result.level),
                    f"{wanted} → {got}",
                    str(count),
                    mib(sum(x.nbytes for x in chosen)),
                    mib(extra),
                    percent(share),
                ]
            )
        single += [
            [
                clean(result.level),
                clean(x.tensor),
                f"{x.wanted} → {x.got}",
                f"{x.nbytes:,}",
                f"{x.extra_bytes:,}",
            ]
            for x in result.fallbacks
        ]
    words = frozenset({0, 1})
    return Section(
        "fallbacks",
        "Tensors that fell back",
        "K-quants need rows divisible by 256. Where a tensor's are not, llama.cpp takes another "
        "type, mostly a wider one: what that costs is above the wanted type at its bits a weight.",
        [] if rows else ["None did."],
        tables=[
            Table(
                "Fallbacks and their cost",
                ("level", "wanted → got", "tensors", "MiB", "extra MiB", "of the file"),
                rows,
                words,
            ),
            Table(
                "Every tensor that fell back",
                ("level", "tensor", "wanted → got", "bytes", "extra bytes"),
                single,
                frozenset({0, 1, 2}),
                folded=True,
            ),
        ],
    )


def audit(report: ParityReport) -> Section:
    reading = (
        f"F16 ends at {F16_MAX:,.0f}. The largest magnitude that enters each matrix product in the "
        "reference's pass over these texts, and the weights that F16 would make infinite, zero "
        "or shorter."
    )
    audit = report.audit
    if audit is None:
        return Section("audit", "Would F16 hold it?", reading, ["Not audited."])
    places = dict.fromkeys((x.name, x.enters) for x in audit.activations)
    rows = []
    for name, enters in places:
        here = [x for x in audit.activations if (x.name, x.enters) == (name, enters)]
        # What is not a number is never compared away.
        top = max(here, key=lambda x: math.inf if math.isnan(x.max_abs) else x.max_abs)
        share = percent(top.max_abs / F16_MAX)
        rows.append(
            [
                clean(name),
                clean(enters),
                NONE if top.layer is None else str(top.layer),
                number(top.max_abs),
                share if top.max_abs <= F16_LIMIT else Bad(share),
            ]
        )
    counts = [
        ("become infinite", audit.overflowing_weights),
        ("become 0", audit.flushed_weights),
        ("keep fewer bits", audit.subnormal_weights),
        ("all", audit.weights),
    ]
    return Section(
        "audit",
        "Would F16 hold it?",
        reading,
        [clean(audit.verdict)],
        tables=[
            Table(
                "Largest activation entering each matrix product",
                ("activation", "enters", "layer", "largest magnitude", "of F16's range"),
                rows,
                frozenset({0, 1}),
            ),
            Table("Weights in F16", ("weights that", "count"), [[n, f"{c:,}"] for n, c in counts]),
        ],
    )


def provenance(report: ParityReport) -> Section:
    run, values = report.reference, dict(report.provenance)
    command = values.pop("command", "")
    facts = [["checkpoint", clean(report.checkpoint)], ["context", f"{report.context} tokens"]]
    facts += [[clean(name), clean(value)] for name, value in values.items()]
    facts += [
        ["reference: type", run.dtype],
        ["reference: time", f"{run.seconds:,.1f} s"],
        ["reference: peak memory", f"{run.peak_rss / 2**30:.2f} GiB"],
        ["reference: from the cache", "yes" if run.cached else "no"],
        ["reference: folder", clean(run.cache) or NONE],
    ]
    texts = [
        [clean(x.domain), clean(x.path), f"{x.tokens:,}", f"{x.windows:,}", x.sha256]
        for x in report.texts
    ]
    files = [
        [clean(x.level), mib(x.file_bytes), _types(x.types), x.kind or NONE]
        + [number(x.seconds.get(step), ".1f") for step in ("make", "forward", "compare")]
        + [x.sha256]
        for x in report.levels
    ]
    file_header = ["level", "MiB", "MiB of each type", "judged as"]
    file_header += ["made, s", "forward, s", "compared, s", "SHA-256"]
    return Section(
        "provenance",
        "Provenance",
        "What it takes to measure this again: the command, the versions, and hashes of all that "
        "went in and of every file that was judged.",
        code=clean(command),
        tables=[
            Table("Run", ("what", "value"), facts, frozenset({0, 1})),
            Table(
                "Texts",
                ("domain", "file", "tokens", "windows", "SHA-256"),
                texts,
                frozenset({0, 1, 4}),
            ),
            Table("Files", file_header, files, frozenset({0, 2, 3, 7})),
        ],
    )


def _types(types: dict[str, int]) -> str:
    ordered = sorted(types.items(), key=lambda item: -item[1])
    return ", ".join(f"{clean(name)} {mib(nbytes)}" for name, nbytes in ordered)
