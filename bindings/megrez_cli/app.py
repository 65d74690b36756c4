"""The command line. One thin function a command; whatever is heavy is imported inside it.

Data goes to stdout, talk to stderr, and the exit code is the truth: 0 done, 1 the answer is no,
2 something is wrong with the input or the machine, 130 interrupted.

This is the composition root: the only module of `megrez_gguf` that may import `megrez_runtime` or
`megrez_parity`, and only inside a command.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from megrez_cli import console
from megrez_gguf.errors import MegrezError
from megrez_gguf.text import parse_size


class _Commands(typer.core.TyperGroup):
    """Turns the failures we expect into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MegrezError as e:
            console.say(f"error: {e}")
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            console.say("interrupted")
            sys.exit(130)


app = typer.Typer(
    name="megrez-gguf",
    cls=_Commands,
    help="Convert, run and verify Megrez2 mixture-of-experts models as GGUF.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            version = metadata.version("megrez-gguf")
        except metadata.PackageNotFoundError:
            version = "(run from its source, not installed)"
        typer.echo(f"megrez-gguf {version}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def _ram(text: str) -> int | str:
    return text if text in ("auto", "off") else _size(text)


ImatrixOption = Annotated[
    Path | None, typer.Option("--imatrix", help="Importance matrix, as llama-imatrix writes it.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="megrez-q4, or TOML with a level and the types that differ."),
]
SplitOption = Annotated[
    int | None,
    typer.Option("--split-max-size", parser=_size, metavar="SIZE", help="Split, e.g. by 2G."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Tell sizes, types, fallbacks and about how long; no output."),
]
RamOption = Annotated[
    Any,
    typer.Option(
        "--ram", parser=_ram, metavar="SIZE",
        help="Memory for the whole process, e.g. 2GiB: experts beyond it stay in the file. "
        "auto: what is free; off: everything in memory.",
    ),
]  # fmt: skip
CacheOption = Annotated[
    int | None,
    typer.Option(
        "--expert-cache", parser=_size, metavar="SIZE", help="Memory for experts, e.g. 1GiB."
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of the repository.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")]


@app.command()
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder, or owner/name on Hugging Face, or modelscope:owner/name.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output file.  [default: NAME-TYPE.gguf]")
    ] = None,
    outtype: Annotated[
        str, typer.Option(help="Level, e.g. q8_0 or q4_k_m; auto is the checkpoint's own type.")
    ] = "auto",
    imatrix: ImatrixOption = None,
    recipe: RecipeOption = None,
    split_max_size: SplitOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    clamp: Annotated[
        bool, typer.Option("--clamp", help="Limit weights beyond the type's range to it.")
    ] = False,
    revision: RevisionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to GGUF, at any level in one pass.

    Norms, routers and biases are always F32. Levels that quantize give what llama-quantize gives,
    and need the patched llama-cpp-python. The output appears whole or not at all.

    \b
    Examples:
      megrez-gguf convert Megrez2-3x7B-A3B
      megrez-gguf convert Megrez2-3x7B-A3B -o megrez2.gguf --outtype q4_k_m --imatrix m.imatrix
      megrez-gguf convert Megrez2-3x7B-A3B --outtype q8_0 --split-max-size 2G
      megrez-gguf convert Infinigence/Megrez2-3x7B-A3B --outtype q4_k_m
    """
    from megrez_gguf.conversion.pipeline import convert as run
    from megrez_gguf.conversion.pipeline import plan_convert

    if dry_run:
        plan = plan_convert(
            checkpoint, out, outtype, imatrix, recipe, split_max_size, revision, console.say
        )
        console.tell_plan(plan, as_json)
        return
    with console.progress("Converting") as progress:
        result = run(
            checkpoint, out, outtype, force, clamp, progress,
            imatrix=imatrix, recipe=recipe, split_max_size=split_max_size,
            revision=revision, say=console.say,
        )  # fmt: skip
    console.tell_result(result, as_json)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="GGUF file in f32, bf16 or f16.")],
    out: Annotated[Path, typer.Argument(help="Output file.")],
    level: Annotated[str, typer.Argument(help="Level, e.g. q4_k_m; auto with --recipe.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    imatrix: ImatrixOption = None,
    recipe: RecipeOption = None,
    split_max_size: SplitOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a GGUF file, tensor for tensor as llama-quantize does.

    \b
    Examples:
      megrez-gguf quantize megrez2-bf16.gguf megrez2-q4.gguf q4_k_m
      megrez-gguf quantize megrez2-bf16.gguf mine.gguf --recipe mine.toml
    """
    from megrez_gguf.conversion.pipeline import plan_quantize
    from megrez_gguf.conversion.pipeline import quantize as run

    if dry_run:
        console.tell_plan(
            plan_quantize(source, out, level, imatrix, recipe, split_max_size), as_json
        )
        return
    with console.progress("Quantizing") as progress:
        result = run(
            source, out, level, force, progress,
            imatrix=imatrix, recipe=recipe, split_max_size=split_max_size,
        )  # fmt: skip
    console.tell_result(result, as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="GGUF file, or the first part of a split one.")],
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder, or owner/name or modelscope:owner/name.")
    ] = None,
    imatrix: ImatrixOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every tensor of a file against its recorded hash and its checkpoint.

    Without CHECKPOINT, tells damage since the file was written. With it, encodes every tensor anew
    and compares byte for byte, for files of any program. Exits 1 where anything differs.

    \b
    Examples:
      megrez-gguf verify megrez2-q4.gguf
      megrez-gguf verify megrez2-q4.gguf Megrez2-3x7B-A3B
      megrez-gguf verify theirs.gguf Infinigence/Megrez2-3x7B-A3B --revision main
    """
    from megrez_gguf.examination.verification import verify as run

    with console.progress("Verifying") as progress:
        result = run(path, checkpoint, imatrix, progress, revision=revision, say=console.say)
    for note in result.notes:
        console.say(f"warning: {note}")
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), default=str))
    else:
        for failure in result.failures:
            typer.echo(failure)
        typer.echo(
            f"{result.tensors} tensors: {result.hashed} held against their recorded hash, "
            f"{result.compared} against the checkpoint; {len(result.failures)} differences"
        )
    if result.failures:
        raise typer.Exit(1)


@app.command()
def imatrix(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file.")],
    model: Annotated[Path | None, typer.Argument(help="GGUF file to run.")] = None,
    text: Annotated[list[Path] | None, typer.Argument(help="UTF-8 texts.")] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="Add this importance matrix; repeatable. Needs no TEXT."),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Chunks a text.  [default: all]")
    ] = None,
    ctx: Annotated[int, typer.Option(min=1, help="Tokens a chunk.")] = 512,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read special tokens in the texts.")
    ] = False,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Include the output matrix.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Collect an importance matrix, in llama-imatrix's format.

    A pool of experts gathers from all layers that use it. Experts that no token reached are named.

    \b
    Examples:
      megrez-gguf imatrix megrez2-q8_0.gguf calibration.txt -o megrez2.imatrix.gguf
      megrez-gguf imatrix --merge one.imatrix.gguf --merge two.imatrix.gguf -o both.imatrix.gguf
    """
    from megrez_runtime.calibration import run

    with console.progress("Collecting", "chunks") as progress:
        result = run(
            model, text or (), out,
            merge=merge or (), chunks=chunks, context=ctx, parse_special=parse_special,
            process_output=process_output, force=force, progress=progress, say=console.say,
        )  # fmt: skip
    typer.echo(json.dumps(dataclasses.asdict(result), default=str) if as_json else str(result.path))


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="GGUF file, folder, owner/name or modelscope:owner/name.")
    ],
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    scan: Annotated[
        bool, typer.Option("--scan/--no-scan", help="Read all weights, to count those at risk.")
    ] = True,
) -> None:
    """Show hyper-parameters, expert groups, tensors and weights at risk.

    \b
    Examples:
      megrez-gguf inspect Megrez2-3x7B-A3B
      megrez-gguf inspect megrez2.gguf --json --no-scan
    """
    from megrez_gguf.examination.inspection import inspect as run
    from megrez_gguf.examination.inspection import render

    with console.progress("Reading") as progress:
        report = run(path, scan, progress, revision=revision, say=console.say)
    typer.echo(json.dumps(dataclasses.asdict(report)) if as_json else render(report))


@app.command()
def parity(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder, or owner/name on Hugging Face, or modelscope:owner/name.")
    ],
    levels: Annotated[
        str | None,
        typer.Option(help="Comma-separated, e.g. q8_0,q4_k_m+imatrix.  [default: the usual ones]"),
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option("--gguf", help="Judge this file of the checkpoint, too; repeatable."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="UTF-8 text; repeatable.  [default: heldout/*.txt at CKPT]"),
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows a text, from its start.")] = 4,
    trace: Annotated[
        bool, typer.Option("--trace", help="Name the first tensor that errs by itself.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write report.html, .json and .md here.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Keep the reference here.  [default: kept from 1 GiB on]"),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", help="Importance matrix (GGUF).  [default: made of the texts]"),
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", help="JSON with bounds.  [default: ours]")
    ] = None,
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Compare a checkpoint's GGUF levels with a torch reference.

    Converts to each level, runs the patched llama.cpp on the CPU, and prints file size, NMSE of
    logits, KL divergence, same-top-p, perplexity, and how often the same experts ran. Exits 1 when
    a level misses its threshold. With --gguf and without --levels nothing is converted.

    \b
    Examples:
      megrez-gguf parity tests/data/pocket --report pocket-report
      megrez-gguf parity Megrez2-3x7B-A3B --levels q4_k_m,q4_0 --text novel.txt --windows 2
      megrez-gguf parity Infinigence/Megrez2-3x7B-A3B --gguf theirs.gguf --text novel.txt --trace
    """
    from megrez_gguf.errors import ThresholdError
    from megrez_parity.harness import measure
    from megrez_parity.level_files import LEVELS
    from megrez_parity.report import prepare, print_table, write

    if report:
        prepare(report)  # an hour of computing later would be late
    result = measure(
        checkpoint,
        levels.split(",") if levels is not None else () if gguf else LEVELS,
        text or (),
        ctx,
        windows,
        gguf or (),
        trace=trace,
        cache=cache,
        imatrix=imatrix,
        thresholds=thresholds,
        revision=revision,
        command=shlex.join(["megrez-gguf", *sys.argv[1:]]),
        say=console.say,
    )
    for path in write(result, report) if report else ():
        console.say(f"wrote {path}")
    if as_json:
        typer.echo(json.dumps(result.as_dict(), ensure_ascii=False))
    else:
        print_table(result)
    if result.misses:
        raise ThresholdError("; ".join(result.misses))


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="GGUF file.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Answer this and leave; - reads it from stdin."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt.  [default: the chat template's own]")
    ] = None,
    temp: Annotated[
        float | None, typer.Option(min=0, help="Temperature; 0 is greedy.  [default: the file's]")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="[default: the file's]")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="0 is off.  [default: the file's]")
    ] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1, help="[default: the file's]")] = None,
    repeat_penalty: Annotated[
        float | None, typer.Option(min=0.01, help="1 is off.  [default: the file's]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same answer.")] = None,
    ctx: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of context.  [default: all, up to 8192]"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: all CPUs]")] = None,
    gpu_layers: Annotated[int, typer.Option(min=-1, help="Layers on the GPU; -1 is all.")] = -1,
    ram: RamOption = "auto",
    expert_cache: CacheOption = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="After an answer, what the expert cache did.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log.")] = False,
) -> None:
    """Chat with a model, in the terminal or through a pipe.

    Answers go to stdout, everything else to stderr. Sampling not asked for here is the file's own,
    or else temperature 0.7 and top_p 0.9. Ctrl-C stops an answer; /help lists the commands.

    \b
    Examples:
      megrez-gguf chat megrez2-q4.gguf
      megrez-gguf chat megrez2-q4.gguf -p "世界上最高的山峰是哪座？" --temp 0
      megrez-gguf chat megrez2-q4.gguf < questions.txt > answers.txt
      megrez-gguf chat megrez2-q4.gguf --ram 2GiB --stats
    """
    from megrez_runtime.terminal import chat as run

    sampling = {
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
    }
    code = run(
        model,
        prompt,
        {name: value for name, value in sampling.items() if value is not None},
        {"system": system, "seed": seed, "max_tokens": max_tokens},
        {
            "n_ctx": ctx,
            "n_threads": threads,
            "n_gpu_layers": gpu_layers,
            "ram": ram,
            "expert_cache": expert_cache,
            "verbose": verbose,
            "say": console.say,
        },
        stats,
    )
    raise typer.Exit(code)


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="GGUF file.")],
    prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of the prompt; 0 leaves it out.")
    ] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Tokens decoded before, not timed.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; their median counts.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the random tokens.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: all CPUs]")] = None,
    ram: RamOption = "auto",
    expert_cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time a model: tokens a second in the prompt and after it, and what the expert cache did.

    \b
    Examples:
      megrez-gguf bench megrez2-q4.gguf
      megrez-gguf bench megrez2-q4.gguf --ram 2GiB --json
    """
    from megrez_runtime.bench import bench as run

    result = run(
        model,
        prompt=prompt,
        tokens=tokens,
        warmup=warmup,
        repeats=repeats,
        seed=seed,
        n_threads=threads,
        ram=ram,
        expert_cache=expert_cache,
        say=console.say,
    )
    typer.echo(json.dumps(dataclasses.asdict(result)) if as_json else str(result))


def _terminated(number: int, frame: FrameType | None) -> None:
    # As an exception, so that everything on the way out is cleaned up.
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminated)
    app(argv)


if __name__ == "__main__":
    main()
