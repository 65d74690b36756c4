"""Draw bindings/megrez_runtime/serve.png, the picture of the chat page in its documentation.

    python scripts/makers/page_picture.py [--output FILE]

A server of the tests stands in for the model, so the figures in the picture are examples.
Needs Chromium (Debian: apt install chromium) and the extra `dev`.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

# The library is where the tests, which use it most, import it from.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.browser import chromium
from support.chat_server import LAYERS, N_EXPERT, PAGE, ChatServer, expert_state, serve_chat

QUESTION = "Why is the sky blue? With a table and a line of Python."
ANSWER = """Air scatters **short** waves far more than long ones, by about `1/λ⁴`:

| Colour | Wavelength | Scattered |
|:--|--:|--:|
| Blue | 450 nm | 4.4 |
| Green | 550 nm | 2.0 |
| Red | 650 nm | 1.0 |

```python
scattered = (650 / wavelength_nm) ** 4
```

So the light that comes from all sides is blue. At sunset its way is longer, and red is left."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = PAGE.parent / "serve.png"
    parser.add_argument("--output", type=Path, default=default)
    output = parser.parse_args().output
    pieces = [ANSWER[at : at + 4] for at in range(0, len(ANSWER), 4)]
    with serve_chat(answer=pieces, rate=7.3, experts=state(0, 0, 0)) as chat:
        draw(chat, output)


def draw(chat: ChatServer, output: Path) -> None:
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": 1280, "height": 760}, color_scheme="dark", locale="en-US"
        )
        page.goto(chat.url)
        page.get_by_role("button", name="Experts").click()
        page.locator("#input").fill(QUESTION)
        page.keyboard.press("Enter")
        page.locator(".speed").wait_for()
        chat.experts = state(970, 43_000, 31 << 20)
        page.locator("[data-figure=hits]", has_text="97.0").wait_for()
        page.locator("canvas").hover(position={"x": 139, "y": 17})
        page.screenshot(path=output)


def state(hits: int, wait_us: int, bytes_read: int) -> dict[str, Any]:
    """The experts before, with `hits` 0, and after a second of work."""
    rng = random.Random(0)
    used = [[int(rng.gammavariate(0.4, 5)) for _ in range(N_EXPERT)] for _ in LAYERS]
    store = {"hits": hits, "misses": 30, "wait_us": wait_us, "bytes_read": bytes_read}
    if not hits:
        return expert_state(store=store)
    return expert_state(store=store, used=used)


if __name__ == "__main__":
    main()
