"""Commands that run models over texts: imatrix, parity, search."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megrez_cli import console, options
from megrez_gguf.errors import SourceError, ThresholdError


def imatrix(
    out: Annotated[Path, typer.Option("--out", "-o", parser=options.output, help="Output file.")],
    model: Annotated[
        Path | None, typer.Argument(parser=options.path, help="GGUF file to run.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Argument(parser=options.path, help="UTF-8 texts to run it over.")
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            "--merge",
            parser=options.path,
            help="Add this importance matrix; repeatable. Then TEXT may be left out.",
        ),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Chunks to take of each text.  [default: all]")
    ] = None,
    ctx: Annotated[int, typer.Option(min=1, help="Tokens in a chunk.")] = 512,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Treat special tokens in the texts as special.")
    ] = False,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Include the output matrix.")
    ] = False,
    products: Annotated[
        bool,
        typer.Option(
            "--products",
            help="Collect how columns go along, too, so that recipes round by feedback: the file "
            "may take gigabytes.",
        ),
    ] = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Collect an importance matrix, in llama-imatrix's format.

    It tells `convert` and `quantize` which weights matter most. A pool of experts gathers from all
    layers that share it. Experts that no token reached are named.

    \b
    Examples:
      megrez-gguf imatrix megrez2-q8_0.gguf calibration.txt -o megrez2.imatrix.gguf
      megrez-gguf imatrix --merge one.imatrix.gguf --merge two.imatrix.gguf -o both.imatrix.gguf
    """
    from megrez_runtime.calibration import calibrate

    with console.progress("Collecting", "chunks") as progress:
        result = calibrate(
            model, text or (), out,
            merge=merge or (), n_chunks=chunks, n_ctx=ctx, parse_special=parse_special,
            process_output=process_output, products=products, force=force, progress=progress,
            say=console.say,
        )  # fmt: skip
    console.tell_made(result.path, result, as_json)


def _find_folder() -> None:
    """See that there is a current folder: without one, torch's maths library ends the process."""
    try:
        Path.cwd()
    except OSError:
        raise SourceError("the current folder is gone; change to another one") from None


def parity(
    checkpoint: options.Checkpoint,
    levels: Annotated[
        str | None,
        typer.Option(help="Levels to make, e.g. q8_0,q4_k_m+imatrix.  [default: the usual ones]"),
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option("--gguf", parser=options.path, help="Judge this existing file; repeatable."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="NAME[:OPTIONS]",
            help="Judge the checkpoint in transformers, vllm or sglang, e.g. vllm:tp=2,pp=2; "
            "python=PATH names the interpreter of another environment; repeatable.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            parser=options.path,
            help="UTF-8 text; repeatable.  [default: heldout/*.txt beside it]",
        ),
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows to take from the start of each text.")] = 4,
    trace: Annotated[
        bool, typer.Option("--trace", help="Find the first tensor that is wrong by itself.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", parser=options.path, help="Folder for report.html, .json and .md."
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            parser=options.path,
            help="Folder that `eval --out` wrote, to show in the report.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            parser=options.path,
            help="Folder that keeps the reference.  [default: the user's, from 1 GiB on]",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            parser=options.path,
            help="For +imatrix levels.  [default: made from the texts]",
        ),
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            "--thresholds",
            parser=options.path,
            help="JSON with bounds of your own.  [default: the pocket checkpoint's]",
        ),
    ] = None,
    expert_cache: options.ExpertCache = None,
    expert_margin: Annotated[
        Any,
        typer.Option(
            "--expert-margin",
            parser=options.margins,
            metavar="NUMBERS",
            help="With --expert-cache: run each file once more with each of these, e.g. "
            "0,0.02,0.05, as `chat --expert-margin` does.",
        ),
    ] = None,
    gpu_layers: options.GpuLayers = 0,
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a checkpoint's GGUF levels with a torch reference.

    Converts to each level, runs the patched llama.cpp, and prints file size, NMSE of
    logits, KL divergence, same-top-p, perplexity, and how often the same experts ran. Exits 1 when
    a level misses its threshold. With --gguf or --engine and no --levels nothing is converted.

    \b
    Examples:
      megrez-gguf parity tests/data/pocket --report pocket-report
      megrez-gguf parity Megrez2-3x7B-A3B --levels q4_k_m,q4_0 --text novel.txt --windows 2
      megrez-gguf parity Infinigence/Megrez2-3x7B-A3B --gguf theirs.gguf --text novel.txt --trace
      megrez-gguf parity tests/data/pocket --engine transformers --engine vllm:tp=2
    """
    _find_folder()
    from megrez_parity.harness import measure
    from megrez_parity.level_files import LEVELS, listed
    from megrez_parity.report import prepare, print_table, write

    if report:
        prepare(report)  # an hour of computing later would be late
    result = measure(
        checkpoint,
        levels=listed(levels) if levels is not None else () if gguf or engine else LEVELS,
        texts=text or (),
        files=gguf or (),
        engines=engine or (),
        answers=answers,
        n_ctx=ctx,
        n_windows=windows,
        trace=trace,
        cache=cache,
        imatrix=imatrix,
        thresholds=thresholds,
        expert_cache=expert_cache,
        expert_margins=expert_margin or (),
        n_gpu_layers=gpu_layers,
        revision=revision,
        command=shlex.join(["megrez-gguf", *sys.argv[1:]]),
        say=console.say,
    )
    for path in write(result, report) if report else ():
        console.say(f"wrote {path}")
    if as_json:
        console.tell_json(result.as_dict())
    else:
        print_table(result)
    if result.misses:
        raise ThresholdError("; ".join(result.misses))


def search(
    checkpoint: options.Checkpoint,
    work: Annotated[
        Path,
        typer.Option(
            parser=options.path,
            help="Folder for the recipes, the report and every measurement; resumes.",
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            parser=options.path,
            help="UTF-8 text; repeatable.  [default: heldout/*.txt at CKPT]",
        ),
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    windows: Annotated[
        int, typer.Option(help="Windows a text to judge by, which the search does not see.")
    ] = 16,
    imatrix: options.Imatrix = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            "--also",
            parser=options.path,
            metavar="CHECKPOINT",
            help="Be no larger than the level for this folder, too; repeatable. Needs no weights.",
        ),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            parser=options.size,
            metavar="SIZE",
            help="Search for a recipe of at most this size, e.g. 3.5GiB, of --also if there is "
            "one; repeatable.  [default: the sizes of stock levels]",
        ),
    ] = None,
    pad_rows: Annotated[
        bool,
        typer.Option(
            "--pad-rows",
            help="Try types whose blocks are wider than experts, with zeros after rows.",
        ),
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge/--no-judge", help="Compare with stock levels at the end.")
    ] = True,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Search for recipes that suit this checkpoint, no larger than q3_k_m, q4_k_m and q5_k_m.

    Measures what each type costs each kind of tensor, then mixes of them, on the ends of the texts.
    Judges what it found beside stock levels on their starts, as parity does. Takes hours at full
    size; killed, it goes on where it was.

    \b
    Examples:
      megrez-gguf search tests/data/pocket --work pocket-recipes
      megrez-gguf search Megrez2-3x7B-A3B --text novel.txt --windows 2 --work recipes
      megrez-gguf convert Megrez2-3x7B-A3B --recipe recipes/megrez-q4.toml
    """
    _find_folder()
    from megrez_parity import recipe_search
    from megrez_parity.report import prepare, print_table, write

    if judge:
        prepare(work / "report")
    found = recipe_search.search(
        checkpoint,
        work,
        also=also or (),
        sizes=size or (),
        texts=text or (),
        n_ctx=ctx,
        n_windows=windows,
        imatrix=imatrix,
        pad_rows=pad_rows,
        revision=revision,
        say=console.say,
    )
    for one in found:
        console.say(f"wrote {one.path}")
    report = None
    if judge:
        report = recipe_search.judge(
            checkpoint,
            [one.path for one in found],
            texts=text or (),
            n_ctx=ctx,
            n_windows=windows,
            imatrix=imatrix,
            revision=revision,
            command=shlex.join(["megrez-gguf", *sys.argv[1:]]),
            say=console.say,
        )
        for path in write(report, work / "report"):
            console.say(f"wrote {path}")
    if as_json:
        recipes = [
            {
                "path": str(one.path),
                "level": one.recipe.level,
                "types": dict(one.recipe.types),
                "nbytes": one.nbytes,
                "mean_kld": one.mean_kld,
            }
            for one in found
        ]
        summary = {"recipes": recipes, "report": report.as_dict() if report else None}
        console.tell_json(summary)
    elif report:
        print_table(report)
    else:
        for one in found:
            console.tell(str(one.path))
