"""The command that asks models questions: eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from megrez_cli import console, options
from megrez_gguf.errors import ConfigError


def eval_(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            parser=options.name,
            help="GGUF files; or one checkpoint, with --levels or --engine.",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, with commas between them.")
    ] = "",
    levels: Annotated[
        str | None, typer.Option(help="Levels of the checkpoint to make and ask, e.g. q8_0,q4_k_m.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="NAME[:OPTIONS]",
            help="Ask the checkpoint in transformers or vllm; repeatable.",
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option("--url", help="Ask a server, e.g. http://127.0.0.1:8000/v1; repeatable."),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="The model's name at --url.  [default: its first]")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to --url at once.")] = 4,
    include: Annotated[
        Path | None,
        typer.Option("--include", parser=options.path, help="Folder with more tasks, in YAML."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions to take of each task.  [default: all]")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question.  [default: the task's]")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Ask through the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt, with --chat.")] = None,
    sampling: Annotated[
        Literal["task", "advised", "greedy"],
        typer.Option(help="How answers are drawn: as the task says, as the file advises, or so."),
    ] = "task",
    seed: Annotated[int, typer.Option(help="For drawing answers and examples.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=options.path,
            help="Folder for results.json and every question and answer; resumes.",
        ),
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Let tasks such as humaneval execute what the model wrote, as you.",
        ),
    ] = False,
    ctx: Annotated[int | None, typer.Option(min=1, help="Tokens of context.")] = None,
    cache_type: Annotated[
        Literal["f32", "f16", "q8_0", "q5_1", "q4_0"],
        typer.Option(help="Type of the KV cache; f16 is how files are run."),
    ] = "f16",
    ram: options.Ram = "auto",
    expert_cache: options.ExpertCache = None,
    threads: options.Threads = None,
    imatrix: options.Imatrix = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Ask models the questions of benchmarks, and tell in which answers they differ.

    The harness is lm-evaluation-harness, with its tasks and its judgement; their data come from the
    hub. Every model is compared with the first, by the questions that one answers and the other
    does not. A model that does no better than guessing is said to. With --out an ended run goes on
    where it was.

    \b
    Examples:
      megrez-gguf eval q8_0.gguf q4.gguf --tasks arc_easy,hellaswag --limit 200 -o scores
      megrez-gguf eval Megrez2-3x7B-A3B --levels q8_0,q4_k_m --tasks megrez2_gsm8k --chat
      megrez-gguf eval --url http://127.0.0.1:8000/v1 --tasks ifeval --chat
    """
    names, asked = list(model or ()), [t.strip() for t in tasks.split(",") if t.strip()]
    if not asked:
        raise ConfigError("which tasks? e.g. --tasks arc_easy,gsm8k")
    if (levels or engine) and len(names) != 1:
        raise ConfigError("--levels and --engine are for one checkpoint")
    if not names and not url:
        raise ConfigError("whom to ask? GGUF files, or a checkpoint with --levels, or --url")
    # There is one bar here, and not one of every library.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        from megrez_eval import candidates, tables
        from megrez_eval.evaluation import evaluate
    except ImportError as e:
        from megrez_gguf.errors import RuntimeUnavailableError

        raise RuntimeUnavailableError(
            f"eval needs lm-evaluation-harness ({e}); pip install 'megrez-gguf[eval]'"
        ) from None
    from megrez_parity.level_files import listed
    from megrez_runtime.session import Sampling

    if out:
        out.mkdir(parents=True, exist_ok=True)
    with console.progress("Asking", "questions") as progress:
        common = {"seed": seed, "progress": progress}
        file_options = common | {
            "n_ctx": ctx, "cache": cache_type, "ram": ram, "expert_cache": expert_cache,
            "n_threads": threads, "sampling": sampling,
        }  # fmt: skip
        models: dict[str, candidates.Open] = {}
        if levels:
            models |= candidates.levels(
                names[0], listed(levels), out, imatrix=imatrix, revision=revision,
                say=console.say, **file_options,
            )  # fmt: skip
        if engine:
            models |= candidates.engines(names[0], engine, out)
        if not levels and not engine:
            models |= candidates.files([Path(name) for name in names], out, **file_options)
        drawn = {"task": None, "greedy": {"temperature": 0.0}}.get(
            sampling,
            {"temperature": Sampling.advised({}).temp, "top_p": Sampling.advised({}).top_p},
        )
        models |= candidates.servers(
            url or (), served_model, out, concurrency=concurrency, sampling=drawn, **common
        )
        result = evaluate(
            models,
            asked,
            include=include,
            limit=limit,
            fewshot=fewshot,
            chat=chat,
            system=system,
            allow_code=allow_code_execution,
            seed=seed,
            say=console.say,
        )
    for path in tables.write(result, out) if out else ():
        console.say(f"wrote {path}")
    if as_json:
        console.tell_json(result.as_dict())
    else:
        tables.print_tables(result)
