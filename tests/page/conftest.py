"""Chromium, driven headless, on the page; no test here may reach another host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from megrez_llama.expert_store import COUNTS_KEY
from megrez_llama.server import program
from support.browser import CHROMIUM, Open, chromium
from support.chat_server import PAGE, ChatServer, serve_chat
from support.server import Server, serve


@pytest.fixture(scope="module")  # while it is open, nothing else in the process can use asyncio
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
def server(
    pocket_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """llama-server with the pocket model and the page."""
    command: list[str | Path] = [program(), "--model", pocket_gguf(), "--path", PAGE]
    command += ["--threads", "1", "--override-kv", f"{COUNTS_KEY}=bool:true", "--metrics"]
    with serve(command, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
