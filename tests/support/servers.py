"""`megrez-gguf serve` as it runs, and requests to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from support.commands import RUN


class Server:
    """A server that runs, and its one line."""

    def __init__(self, process: subprocess.Popen[str], line: str) -> None:
        self.process, self.line = process, line
        found = re.search(r"http://\S+:\d+", line)
        self.url = found[0] if found else ""

    def ask(self, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as e:
            return e.code, json.loads(e.read())


@contextmanager
def serving(
    *arguments: str | Path, within: Sequence[str] = (), **environment: str
) -> Iterator[Server]:
    """A server on a free port, once it answers; ended on leaving.

    `within` is a command that runs what follows it, in the same process.
    """
    words = [*within, *RUN, "serve", *map(str, arguments), "--threads", "1", "--port", "0"]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stderr is not None
        line = next((line for line in process.stderr if " at http" in line), "")
        # What it logs is not to fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        server = Server(process, line)
        try:
            while process.poll() is None:
                with suppress(OSError):
                    if server.ask("/health")[0] == 200:
                        break
                time.sleep(0.05)
            yield server
        finally:
            process.kill()
