"""The command that serves a model: serve. It decides, says what, and becomes llama.cpp's server."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from megrez_cli import console, options


def serve(
    model: options.Model,
    host: Annotated[
        str,
        typer.Option(
            parser=options.name,
            help="Address to listen on, or a path ending in .sock; several with commas. Any that "
            "others can reach needs a key.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            parser=options.path,
            help="File of keys, one a line, of which each request needs one; - is stdin.  "
            "[default: the key in $MEGREZ_API_KEY, if there is one]",
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(hidden=True)] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Clients answered at once; others wait.  [default: up to 4, as memory allows]",
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of context of each client.  [default: all the model has, up to 8192, as "
            "memory allows]",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=options.INT, help="End an answer so, if the request does not say."),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            parser=options.name,
            help="Name of the model in requests; repeatable.  [default: megrez-moe, the file's]",
        ),
    ] = None,
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = -1,
    ram: options.Ram = "auto",
    expert_cache: options.ExpertCache = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log requests to stdout, a JSON object a line.")
    ] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log everything, prompts and answers included.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show llama.cpp's log; prompts are not in it.")
    ] = False,
) -> None:
    """Serve a model to OpenAI clients, and a page to chat at, from one process.

    Each client has a context of its own, which no other can fill. Sampling is as the file says
    unless a request says otherwise. Pages of other origins have no access. Ctrl-C or SIGTERM ends
    it.

    \b
    Examples:
      megrez-gguf serve megrez2-q4.gguf
      megrez-gguf serve megrez2-q4.gguf --ram 3GiB --parallel 2
      MEGREZ_API_KEY=sk-something megrez-gguf serve megrez2-q4.gguf --host 0.0.0.0
      megrez-gguf serve megrez2-q4.gguf --host 0.0.0.0 --port 80 --api-key-file keys.txt
    """
    from megrez_cli import listening
    from megrez_gguf.machine import available_cpus
    from megrez_llama import server
    from megrez_llama.threads import thread_count
    from megrez_runtime.serving import page, plan_serving

    if api_key is not None:
        raise typer.BadParameter(
            "everybody on a machine can see the arguments of a program: put the key into the "
            f"variable {listening.KEY_VARIABLE}, or into a file for --api-key-file",
            param_hint="--api-key",
        )
    program = server.program()
    n_threads = thread_count(threads, available_cpus())
    keys = listening.read_keys(api_key_file, os.environ, console.say)
    hosts = listening.parse_hosts(host)
    if not keys and not listening.is_local(hosts):
        raise listening.ListeningError(
            f"others can reach {host}: set {listening.KEY_VARIABLE} to a key that they need, or "
            "give --api-key-file FILE"
        )
    plan = plan_serving(model, n_ctx=ctx, n_slots=parallel, ram=ram, expert_cache=expert_cache)
    for warning in plan.warnings:
        console.say(f"warning: {warning}")
    port = listening.free_port(hosts, port)
    names = tuple(alias) if alias else plan.names
    console.say(f"{names[0]} at {' and '.join(listening.urls(hosts, port))}: {plan}")
    settings = server.Settings(
        model=model,
        hosts=hosts,
        port=port,
        aliases=names,
        n_slots=plan.n_slots,
        n_ctx=plan.n_ctx,
        n_ubatch=plan.n_ubatch,
        n_threads=n_threads,
        n_gpu_layers=gpu_layers,
        expert_cache=plan.expert_cache,
        prompt_cache=plan.prompt_cache,
        sampling=plan.sampling,
        max_tokens=max_tokens,
        page=page(),
        keys=listening.keys_for_child(keys) if keys else None,
        verbosity=5 if log_prompts else 4 if verbose else 3 if log_json else 2,
        json_log=log_json,
    )
    environment = server.environment(os.environ)
    environment.pop(listening.KEY_VARIABLE, None)
    _become(program, server.arguments(settings), environment)


def _become(program: Path, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Go on as another program, with this one's standard streams and signals as they were."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in range(3):
        # Those that were closed are occupied by now, and are to stay so.
        with contextlib.suppress(OSError):
            os.set_inheritable(number, True)
    for name in ("SIGPIPE", "SIGXFSZ"):  # which Python ignores
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execve(program, [str(program), *arguments], environment)
