"""Commands that run a model: chat, bench."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Annotated

import typer

from megrez_cli import console, options


def chat(
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            callback=options.said,
            help="Answer this and exit; - reads it from stdin.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt.  [default: the chat template's own]")
    ] = None,
    temp: Annotated[
        float | None,
        typer.Option(
            min=0, max=options.FLOAT, help="Temperature; 0 is greedy.  [default: the file's]"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Draw from the likeliest tokens up to this probability.  [default: the file's]",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=options.INT,
            help="Draw from this many of the likeliest tokens; 0 is off.  [default: the file's]",
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Leave out tokens below this share of the likeliest.  [default: the file's]",
        ),
    ] = None,
    repeat_penalty: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=options.FLOAT,
            help="Make repeats less likely; 1 is off.  [default: the file's]",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed gives the same answer.")
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of context.  [default: all the model has, up to 8192]"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="End an answer after so many tokens.")
    ] = None,
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = -1,
    ram: options.Ram = "auto",
    expert_cache: options.ExpertCache = None,
    expert_margin: options.ExpertMargin = 0.0,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show what the expert cache did, after each answer.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log.")] = False,
) -> None:
    """Chat with a model, in the terminal or through a pipe.

    Answers go to stdout, everything else to stderr. Sampling is as the file says unless you say
    otherwise; a file that says nothing gets temperature 0.7 and top_p 0.9, the model card's advice.
    Ctrl-C stops an answer; /help lists the commands.

    \b
    Examples:
      megrez-gguf chat megrez2-q4.gguf
      megrez-gguf chat megrez2-q4.gguf -p "世界上最高的山峰是哪座？" --temp 0
      megrez-gguf chat megrez2-q4.gguf < questions.txt > answers.txt
      megrez-gguf chat megrez2-q4.gguf --ram 2GiB --stats
    """
    from megrez_cli.terminal import Terminal, read_prompt, readable
    from megrez_runtime import Sampling, Session, load

    llm = load(
        model,
        n_ctx=ctx,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        ram=ram,
        expert_cache=expert_cache,
        expert_margin=expert_margin,
        verbose=verbose,
        say=console.say,
    )
    with contextlib.closing(llm):
        sampling = Sampling.advised(llm.metadata).changed(
            temp=temp, top_p=top_p, top_k=top_k, min_p=min_p, repeat_penalty=repeat_penalty
        )
        system = readable(system) if system else None
        session = Session(llm, system=system, sampling=sampling, seed=seed, max_tokens=max_tokens)
        terminal = Terminal(session, stats=stats)
        if prompt == "-":
            prompt = options.said(read_prompt())
        code = terminal.run() if prompt is None else terminal.once(prompt)
    raise typer.Exit(code)


def bench(
    model: options.Model,
    prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of the prompt; 0 leaves it out.")
    ] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Tokens decoded first and not timed.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the median is reported.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random tokens.")] = 0,
    threads: options.Threads = None,
    ram: options.Ram = "auto",
    expert_cache: options.ExpertCache = None,
    expert_margin: options.ExpertMargin = 0.0,
    as_json: options.Json = False,
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
        n_prompt=prompt,
        n_decode=tokens,
        n_warmup=warmup,
        n_repeats=repeats,
        seed=seed,
        n_threads=threads,
        ram=ram,
        expert_cache=expert_cache,
        expert_margin=expert_margin,
        say=console.say,
    )
    if as_json:
        console.tell_json(dataclasses.asdict(result))
        return
    for line in str(result).split("\n"):
        console.tell(line)
