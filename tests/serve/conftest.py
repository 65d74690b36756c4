"""One server of the pocket model for all tests of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.server import Server, serve_model


@pytest.fixture(scope="module")
def server(
    pocket_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve_model(pocket_gguf("f32"), tmp_path_factory.mktemp("server")) as server:
        yield server
