"""Chromium, driven headless, on the page; no test here may reach another host."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from playwright.sync_api import Browser, Page

from support.browser import CHROMIUM, Open, chromium
from support.chat_server import PAGE, ChatServer, serve_chat

LLAMA_SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium in PATH; on Debian: apt install chromium")
    with chromium() as browser:
        yield browser


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with serve_chat() as chat:
        yield chat


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Afterwards: the page has asked nothing of any other host, and no script of it failed."""
    asked: list[tuple[str, str]] = []
    wrong: list[str] = []
    contexts = []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**({"locale": "en-US"} | options))
        context.set_default_timeout(10_000)
        contexts.append(context)
        context.on("request", lambda request: asked.append((url, request.url)))
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        page = context.new_page()
        page.goto(url)
        page.wait_for_function("document.querySelector('#title').textContent")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
    assert all(request.startswith(url) for url, request in asked), asked


@pytest.fixture(scope="session")
def real_url(pocket_gguf: Callable[..., Path]) -> Iterator[str]:
    """llama-server with the pocket model and the page."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command: list[str | Path] = [LLAMA_SERVER, "-m", pocket_gguf(), "--path", PAGE]
    command += ["--port", port, "--threads", "1"]
    command += ["--override-kv", "megrez-moe.expert_counts=bool:true"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/"
        while not _healthy(url):
            assert process.poll() is None, f"llama-server ended with {process.returncode}"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "health", timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False
