"""A parity report for people and programs: a table, and a folder with HTML, JSON and Markdown."""

from __future__ import annotations

import json
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from megrez_gguf.errors import OutputError, RuntimeUnavailableError
from megrez_gguf.storage.output import OutputFiles
from megrez_parity.report.table import print_table
from megrez_parity.results import ParityReport

__all__ = ["prepare", "print_table", "schema", "write"]


def prepare(folder: Path) -> None:
    """Create `folder` and see that `write` will succeed: worth knowing before hours of work.

    Raises OutputError if nothing can be written there, RuntimeUnavailableError without plotly.
    """
    try:
        import_module("plotly")
    except ImportError as e:
        raise RuntimeUnavailableError(
            f"the HTML report needs plotly ({e}); pip install 'megrez-gguf[report]'"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder}: the report's folder cannot be made: {e.strerror}") from None
    with OutputFiles([folder / ".writable"], force=True):
        pass
    (folder / ".writable").unlink()


def write(report: ParityReport, folder: Path) -> list[Path]:
    """Write report.html, report.json and report.md into `folder`, whole or not at all.

    The folder is created, files of those names in it are replaced. Raises as `prepare`.
    """
    prepare(folder)
    from megrez_parity.report.html import render as html
    from megrez_parity.report.markdown import render as markdown

    contents = {
        "report.html": html(report),
        "report.json": json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False, indent=1),
        "report.md": markdown(report),
    }
    paths = [folder / name for name in contents]
    with OutputFiles(paths, force=True) as files:
        for number, text in enumerate(contents.values()):
            files.start(number)
            # Paths need not be UTF-8: what stands for their odd bytes is an escape in JSON, too.
            files.write(text.encode("utf-8", "backslashreplace"))
    return paths


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of report.json and of `--json`."""
    text = resources.files(__name__).joinpath("report.schema.json").read_text("utf-8")
    parsed: dict[str, Any] = json.loads(text)
    return parsed
