"""A server stands what goes wrong around it. `scripts/development/check_server` does more of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megrez_llama.server import program
from support import faults
from support.faults import Fault, Place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

QUICK = (
    faults.vanish_streaming,
    faults.vanish_waiting,
    faults.vanish_reset,
    faults.vanish_in_prompt,
    faults.vanish_in_queue,
    faults.garbage,
    faults.huge_body,
    faults.kill_and_restart,
    faults.terminate,
    faults.interrupt,
    faults.terminate_twice,
    faults.terminate_idle,
    faults.port_taken,
    faults.disk_errors,
    faults.replaced_file,
    faults.truncated_file,
    faults.full_log_disk,
    faults.metrics_format,
    faults.log_privacy,
)


@pytest.fixture
def place(pocket_gguf: Callable[..., Path], tmp_path: Path) -> Place:
    # Busy machines notice late; how soon it is on a quiet one, the script says.
    return Place(pocket_gguf("q8_0"), tmp_path, program(), notice=60)


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.__name__)
def test_the_server_stands(fault: Fault, place: Place) -> None:
    assert fault(place)


def test_a_wrong_answer_is_noticed(place: Place) -> None:
    place.expected[-1] += 1
    with place.serve() as server, pytest.raises(AssertionError, match="wrong tokens"):
        place.check(server)


@pytest.mark.parametrize(
    "page",
    [
        "# HELP a b\n# TYPE a counter\n",
        "# HELP a b\na 1\n",
        "# TYPE a counter\na 1\n",
        "# HELP a b\n# TYPE a number\na 1\n",
    ],
)
def test_metrics_that_are_not_whole_are_noticed(page: str) -> None:
    with pytest.raises(AssertionError):
        faults.types(page)
