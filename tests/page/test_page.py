"""The page in a browser, against a server that says and does what a test wants."""

from __future__ import annotations

import datetime
import json
import re

import pytest
from playwright.sync_api import Locator, Page, expect

from support.browser import Open
from support.chat_server import PAGE, ChatServer, expert_state, serve_chat
from support.marks import loop_takes

STORE = {
    "hits": 970,
    "misses": 30,
    "wasted": 0,
    "bytes_read": 0,
    "reads": 30,
    "wait_us": 0,
    "settle_us": 0,
    "slots": 900,
    "slot_bytes": 1,
    "experts": 640,
}


def say(page: Page, text: str) -> None:
    box = page.locator("#input")
    box.fill(text)
    box.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".assistant .body")


def do(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).last.click()


def ask(page: Page, text: str = "Hi") -> Locator:
    """Ask, wait for the whole answer, and return it."""
    say(page, text)
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    return answers(page).last


def said(chat: ChatServer, request: int = -1) -> list[str]:
    """What the server was told, as "role: content"."""
    return [f"{each['role']}: {each['content']}" for each in chat.asked[request]["messages"]]


# --- talking ---


def test_an_answer_streams_and_tells_its_speed(chat: ChatServer, open_page: Open) -> None:
    chat.hold_after = 2
    page = open_page(chat.url)
    say(page, "Hi")
    expect(answers(page)).to_have_text("Hello there")
    expect(page.locator(".assistant")).to_have_attribute("aria-busy", "true")
    chat.go.set()
    expect(answers(page)).to_have_text("Hello there.")
    expect(page.locator(".speed")).to_have_text("3 tokens · 12.5 tokens/s")
    expect(page.get_by_role("status")).to_have_text("Hello there.")
    assert said(chat) == ["user: Hi"]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_servers_work_and_keeps_what_came(
    chat: ChatServer, open_page: Open, how: str
) -> None:
    chat.hold_after = 2
    page = open_page(chat.url)
    say(page, "Hi")
    expect(answers(page)).to_have_text("Hello there")
    if how == "button":
        do(page, "Stop")
    else:
        page.keyboard.press("Escape")
    assert chat.gone.wait(10)
    expect(page.locator(".note")).to_have_text(["", "Stopped."])
    expect(answers(page)).to_have_text("Hello there")
    page.reload()
    expect(answers(page)).to_have_text("Hello there")


def test_edit_and_resend(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url)
    ask(page, "one")
    ask(page, "two")
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit", exact=True).first.click()
    page.get_by_role("textbox", name="Edit").fill("three")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_have_text("Hello there.")
    assert said(chat) == ["user: three"]


def test_edit_while_an_answer_is_written(chat: ChatServer, open_page: Open) -> None:
    chat.hold_after = 1
    page = open_page(chat.url)
    say(page, "one")
    expect(answers(page)).to_have_text("Hello")
    page.locator(".user").hover()
    do(page, "Edit")
    page.get_by_role("textbox", name="Edit").fill("two")
    page.keyboard.press("Enter")
    assert chat.gone.wait(10)
    chat.go.set()
    expect(answers(page)).to_have_text("Hello there.")
    assert said(chat) == ["user: two"]


def test_arrow_up_edits_the_last_message_and_escape_leaves_it(
    chat: ChatServer, open_page: Open
) -> None:
    page = open_page(chat.url)
    ask(page, "one")
    page.locator("#input").press("ArrowUp")
    box = page.get_by_role("textbox", name="Edit")
    expect(box).to_have_value("one")
    box.fill("two")
    page.keyboard.press("Escape")
    expect(page.locator(".user .body")).to_have_text("one")
    assert len(chat.asked) == 1


def test_answer_again(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url)
    ask(page)
    chat.answer = ["Other"]
    do(page, "Answer again")
    expect(answers(page)).to_have_text("Other")
    assert said(chat) == ["user: Hi"]


def test_an_answer_that_reached_its_limit_goes_on(chat: ChatServer, open_page: Open) -> None:
    chat.finish = "length"
    page = open_page(chat.url)
    ask(page)
    expect(page.locator(".assistant .note")).to_have_text(
        "The answer reached the limit of its length."
    )
    chat.answer, chat.finish = [" More", "."], "stop"
    do(page, "Continue")
    expect(answers(page)).to_have_text("Hello there. More.")
    expect(page.locator(".speed")).to_contain_text("5 tokens")
    assert said(chat) == ["user: Hi", "assistant: Hello there."]


def test_settings_go_with_every_request(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url)
    do(page, "Settings")
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "server's 0.7")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("7")
    do(page, "Save")
    page.reload()
    ask(page)
    assert said(chat) == ["system: Be brief.", "user: Hi"]
    sampling = {name: chat.asked[-1].get(name) for name in ("temperature", "seed", "top_p")}
    assert sampling == {"temperature": 0.25, "seed": 7, "top_p": None}


# --- conversations ---


def test_conversations_are_kept_renamed_and_deleted(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url)
    ask(page, "first question")
    do(page, "New chat")
    ask(page, "second question")
    assert said(chat) == ["user: second question"]
    page.reload()
    expect(answers(page)).to_have_text("Hello there.")
    entries = page.locator("#conversations .open")
    expect(entries).to_have_text(["second question", "first question"])
    entries.last.click()
    expect(page.locator(".user .body")).to_have_text("first question")

    page.get_by_role("button", name="Rename: first question").click()
    page.get_by_role("textbox", name="Rename").fill("renamed")
    page.keyboard.press("Enter")
    expect(entries).to_have_text(["renamed", "second question"])
    expect(entries.first).to_be_focused()
    page.get_by_role("button", name="Delete: renamed").click()
    expect(entries).to_have_text(["second question"])
    do(page, "Undo")
    expect(entries).to_have_text(["renamed", "second question"])
    page.reload()
    expect(entries).to_have_text(["renamed", "second question"])


def test_an_answer_goes_on_while_another_conversation_is_read(
    chat: ChatServer, open_page: Open
) -> None:
    page = open_page(chat.url)
    chat.hold_after = 1
    say(page, "slow")
    expect(answers(page)).to_have_text("Hello")
    do(page, "New chat")
    expect(answers(page)).to_have_count(0)
    chat.go.set()
    page.locator("#conversations .open").click()
    expect(answers(page)).to_have_text("Hello there.")


def test_two_tabs_see_each_other(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url)
    ask(page, "one")
    other = page.context.new_page()
    other.goto(page.url)
    expect(answers(other)).to_have_text("Hello there.")
    chat.hold_after = 1
    say(page, "two")
    expect(other.locator(".user .body")).to_have_text(["one", "two"])
    say(other, "three")
    expect(other.get_by_role("alert")).to_contain_text("another tab")
    expect(other.locator("#input")).to_have_value("three")
    chat.go.set()
    expect(answers(other)).to_have_text(["Hello there."] * 2)
    assert len(chat.asked) == 2
    ask(other, "three")
    expect(page.locator(".user .body")).to_have_text(["one", "two", "three"])


def test_a_full_storage_is_said_and_the_conversation_goes_on(
    chat: ChatServer, open_page: Open
) -> None:
    page = open_page(chat.url)
    page.evaluate(
        "() => { Storage.prototype.setItem ="
        " () => { throw new DOMException('', 'QuotaExceededError'); }; }"
    )
    ask(page, "one")
    expect(page.get_by_role("alert")).to_contain_text("storage is full")
    ask(page, "two")
    assert said(chat) == ["user: one", "assistant: Hello there.", "user: two"]
    expect(page.locator("#conversations .open")).to_have_text("one")


def test_without_storage_the_page_works(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url)
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })"
    )
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("keeps nothing")
    expect(ask(page)).to_have_text("Hello there.")


# --- errors ---


def test_a_missing_key_is_asked_for_and_kept(chat: ChatServer, open_page: Open) -> None:
    chat.key = "sk-right"
    page = open_page(chat.url)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key").fill("sk-wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("refused")
    dialog.get_by_label("Key").fill("sk-right")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_text("megrez-moe")
    expect(ask(page)).to_have_text("Hello there.")
    page.reload()
    expect(ask(page)).to_have_text("Hello there.")
    do(page, "Settings")
    do(page, "Forget the key")
    do(page, "Cancel")
    say(page, "Hi")
    expect(dialog.get_by_label("Key")).to_be_visible()
    do(page, "Cancel")
    expect(page.locator(".error")).to_have_text("The server asks for its key.")


def test_a_server_that_loads_is_waited_for(chat: ChatServer, open_page: Open) -> None:
    chat.loading = True
    page = open_page(chat.url)
    expect(page.get_by_role("alert")).to_contain_text("The model is loading")
    say(page, "Hi")
    expect(page.locator(".assistant .note")).to_contain_text("The model is loading")
    chat.loading = False
    expect(answers(page)).to_have_text("Hello there.")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator(".assistant .note")).to_have_text("")


def test_a_conversation_too_long_says_by_how_much(chat: ChatServer, open_page: Open) -> None:
    chat.refusal = (
        400,
        {
            "code": 400,
            "type": "exceed_context_size_error",
            "message": "request (5000 tokens) exceeds the available context size (4096 tokens)",
            "n_prompt_tokens": 5000,
            "n_ctx": 4096,
        },
    )
    page = open_page(chat.url)
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("5000 tokens and the model's context 4096")


def test_a_refused_request_says_why_and_can_be_retried(chat: ChatServer, open_page: Open) -> None:
    chat.refusal = 500, {"message": "an expert could not be read"}
    page = open_page(chat.url)
    say(page, "Hi")
    expect(page.locator(".error")).to_have_text(
        "The server answered 500: an expert could not be read"
    )
    do(page, "Try again")
    expect(answers(page)).to_have_text("Hello there.")
    expect(page.locator(".error")).to_have_count(0)
    assert said(chat) == ["user: Hi"]


@pytest.mark.parametrize("politely", [False, True])
def test_a_broken_stream_keeps_what_came_and_goes_on(
    chat: ChatServer, open_page: Open, politely: bool
) -> None:
    chat.hold_after = chat.break_after = 2
    chat.break_politely = politely
    page = open_page(chat.url)
    say(page, "Hi")
    expect(answers(page)).to_have_text("Hello there")
    chat.go.set()
    expect(page.locator(".error")).to_contain_text("The connection broke")
    expect(answers(page)).to_have_text("Hello there")
    page.reload()
    chat.break_after, chat.answer = None, ["."]
    do(page, "Continue")
    expect(answers(page)).to_have_text("Hello there.")
    assert said(chat) == ["user: Hi", "assistant: Hello there"]


def test_a_server_that_is_gone_is_said(open_page: Open) -> None:
    with serve_chat() as chat:
        page = open_page(chat.url)
        expect(page.locator("#model")).to_have_text("megrez-moe")
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("The server does not answer")


# --- Markdown ---

MARKDOWN = """# Title

Some **bold**, *italic*, ***both***, ~~gone~~, `a*b*c` and 2 * 3 * 4, snake_case_name.
Next line. [Site](https://example.org/a_(b)) and https://example.org/c.

1. one
   - inner
2. two

> quoted

| a | b |
|---|--:|
| 1 | x\\|y |

```python
if a < b:
    print("**no**")
```

Then \\(x_1 * y_1\\), $a_b$ and $5."""


def test_markdown(chat: ChatServer, open_page: Open) -> None:
    chat.answer = [MARKDOWN[at : at + 5] for at in range(0, len(MARKDOWN), 5)]
    page = open_page(chat.url)
    body = ask(page)
    expect(body.locator("h2")).to_have_text("Title")
    expect(body.locator("p > strong")).to_have_text(["bold", "both"])
    expect(body.locator("em")).to_have_text(["italic", "both"])
    expect(body.locator("p > code")).to_have_text("a*b*c")
    expect(body.locator("p").first).to_contain_text("2 * 3 * 4, snake_case_name.")
    links = body.locator("a")
    expect(links).to_have_text(["Site", "https://example.org/c"])
    expect(links.first).to_have_attribute("href", "https://example.org/a_(b)")
    expect(links.first).to_have_attribute("rel", "noopener noreferrer")
    expect(body.locator("ol > li")).to_have_count(2)
    expect(body.locator("ol ul > li")).to_have_text("inner")
    expect(body.locator("blockquote")).to_have_text("quoted")
    expect(body.locator("td")).to_have_text(["1", "x|y"])
    expect(body.locator("td.right")).to_have_text("x|y")
    assert body.locator("pre").text_content() == 'if a < b:\n    print("**no**")'
    expect(body.locator(".math")).to_have_text(["\\(x_1 * y_1\\)", "$a_b$"])
    expect(body.locator("p").last).to_contain_text("and $5.")


def test_code_is_copied_as_it_is(chat: ChatServer, open_page: Open) -> None:
    code = "a = '<b>'\n\n\tb"
    chat.answer = [f"```\n{code}\n```"]
    page = open_page(chat.url, permissions=["clipboard-read", "clipboard-write"])
    body = ask(page)
    body.get_by_role("button", name="Copy").click()
    expect(body.get_by_role("button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code


HOSTILE = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> <b>html</b>

[click](javascript:window.hacked=3) [data](data:text/html,<script>window.hacked=4</script>)
[case](JaVaScRiPt:window.hacked=5) [tab](java\tscript:window.hacked=6)
[rel](/steal) [proto](//evil.example/)
![pixel](https://evil.example/pixel.png?secret)

```html"><img src=x onerror=window.hacked=7>
<script>window.hacked = 8</script>
```

| <svg onload="window.hacked = 9"> | b |
|---|---|
| <iframe src="https://evil.example"> | c |
"""


def test_hostile_markdown_stays_text(chat: ChatServer, open_page: Open) -> None:
    chat.answer = [HOSTILE[at : at + 9] for at in range(0, len(HOSTILE), 9)]
    page = open_page(chat.url)
    body = ask(page)
    assert body.locator("script, img, svg, iframe, b").count() == 0
    expect(body).to_contain_text('<img src=x onerror="window.hacked = 2"> <b>html</b>')
    # What leads to https is a link, to follow or not, the picture too; nothing else leads anywhere.
    expect(body.locator("a")).to_have_text(["pixel", "https://evil.example"])
    assert page.evaluate("window.hacked") is None


def test_html_in_what_the_reader_writes_stays_text(chat: ChatServer, open_page: Open) -> None:
    text = "<img src=x onerror=window.hacked=1>"
    page = open_page(chat.url)
    ask(page, text)
    expect(page.locator(".user .body")).to_have_text(text)
    expect(page.locator("#title")).to_have_text(text)
    assert page.locator("main img[src=x], nav img[src=x]").count() == 0


@pytest.mark.parametrize(
    "unit",
    loop_takes(
        lambda unit: unit == "*a **b ",
        ["*a **b ", "[", "[a](", "`", "> ", "- ", "_a", "| ", "$a", "!["],
    ),
)
def test_markdown_made_to_be_slow_is_not(chat: ChatServer, open_page: Open, unit: str) -> None:
    chat.answer = [unit * 20_000]
    page = open_page(chat.url)
    expect(ask(page)).to_be_visible()


def test_growing_markdown_never_shows_its_marks(chat: ChatServer, open_page: Open) -> None:
    """At every length of the text: no stray mark at its end, and what was complete stays put."""
    page = open_page(chat.url)
    shown = page.evaluate(
        """async (text) => {
            const { render } = await import("/markdown.js");
            const parent = document.createElement("div");
            const seen = [];
            for (let end = 1; end <= text.length; end += 1) {
                render(parent, text.slice(0, end), true);
                seen.push([parent.textContent, parent.firstChild]);
            }
            const first = seen[12][1];
            return [seen.map(([text]) => text), seen.slice(12).every(([, node]) => node === first)];
        }""",
        "## Heading\n\nSome **bold** and `code`, [a link](https://example.org/long).\n\n"
        "- item **one**",
    )
    texts, still = shown
    assert still
    assert not [text for text in texts if re.search(r"[*`#\[\]]|https", text)]


# --- appearance and hands ---


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_colours_follow_the_system_until_the_reader_chooses(
    chat: ChatServer, open_page: Open, scheme: str, other: str
) -> None:
    page = open_page(chat.url, color_scheme=scheme)
    paper = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 30)"}
    assert page.evaluate(paper) == colours[scheme]
    do(page, "Light or dark")
    assert page.evaluate(paper) == colours[other]
    page.reload()
    assert page.evaluate(paper) == colours[other]


def test_a_narrow_phone_scrolls_only_downwards(chat: ChatServer, open_page: Open) -> None:
    chat.answer = [MARKDOWN, "\n\n```\n" + "x" * 300 + "\n```\n\n" + "y" * 300]
    chat.answer.append("\n\n|" + "wide cell|" * 30 + "\n|" + "-|" * 30)
    chat.experts = expert_state()
    page = open_page(
        chat.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True
    )
    ask(page, "z" * 200)
    widths = (
        "[document.documentElement.scrollWidth, document.querySelector('#scroller').scrollWidth]"
    )
    assert page.evaluate(widths) == [360, 360]
    expect(page.locator("#send")).to_be_in_viewport()
    do(page, "Conversations")
    expect(page.locator("#conversations .open")).to_be_in_viewport()
    page.locator("#shade").click(position={"x": 350, "y": 300})
    expect(page.locator("#conversations .open")).not_to_be_in_viewport()
    do(page, "Experts")
    expect(page.locator("canvas")).to_be_visible()
    assert page.evaluate(widths) == [360, 360]


def test_the_keyboard_reaches_everything(chat: ChatServer, open_page: Open) -> None:
    chat.experts = expert_state()
    page = open_page(chat.url)
    expect(page.locator("#toggle-panel")).to_be_visible()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    assert said(chat) == ["user: one\ntwo"]
    reached = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        focused = page.evaluate_handle("document.activeElement").as_element()
        assert focused is not None
        reached.add(focused.get_attribute("aria-label") or focused.inner_text())
        # The field around the input has a border of its own.
        if not focused.evaluate("node => node.matches('#input, body')"):
            assert focused.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    expected = {"New chat", "one", "Rename: one", "Delete: one", "Settings", "Light or dark"}
    assert expected | {"Experts", "Copy", "Edit", "Answer again", "Message"} <= reached


def compose(page: Page, key: str) -> None:
    """An input method offers 世界 for "shijie", and takes `key` to end with it."""
    keys = page.context.new_cdp_session(page)
    keys.send("Input.imeSetComposition", {"text": "shijie", "selectionStart": 6, "selectionEnd": 6})
    pressed = {"key": key, "code": key, "windowsVirtualKeyCode": 229}
    keys.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **pressed})
    keys.send("Input.insertText", {"text": "世界"})


@pytest.mark.parametrize("key", ["Enter", "Escape"])
def test_a_key_that_ends_a_composition_ends_no_edit(
    chat: ChatServer, open_page: Open, key: str
) -> None:
    page = open_page(chat.url)
    ask(page, "one")
    page.locator("#input").press("ArrowUp")
    box = page.get_by_role("textbox", name="Edit")
    box.fill("")
    compose(page, key)
    expect(box).to_have_value("世界")
    box.press(key)
    expect(box).not_to_be_visible()
    expect(page.locator(".user .body")).to_have_text("世界" if key == "Enter" else "one")


def test_enter_that_ends_a_composition_does_not_send(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url, locale="zh-CN")
    box = page.get_by_role("textbox", name="输入消息")
    box.focus()
    compose(page, "Enter")
    expect(box).to_have_value("世界")
    assert chat.asked == []
    box.press("Enter")
    expect(answers(page)).to_have_text("Hello there.")
    assert said(chat) == ["user: 世界"]
    expect(page.get_by_role("button", name="重新回答")).to_be_visible()


def test_scrolling_stays_where_the_reader_is(chat: ChatServer, open_page: Open) -> None:
    chat.answer = ["line\n\n" * 100, "end"]
    chat.hold_after = 1
    page = open_page(chat.url)
    say(page, "Hi")
    expect(answers(page)).to_contain_text("line")
    scroller = page.locator("#scroller").element_handle()
    at_end = "node => node.scrollHeight - node.scrollTop - node.clientHeight < 2"
    page.wait_for_function(at_end, arg=scroller)
    scroller.evaluate("node => { node.scrollTop = 100; }")
    expect(page.get_by_role("button", name="To the end")).to_be_visible()
    chat.go.set()
    expect(answers(page)).to_contain_text("end")
    assert scroller.evaluate("node => node.scrollTop") == 100
    do(page, "To the end")
    page.wait_for_function(at_end, arg=scroller)


def test_both_languages_say_everything(chat: ChatServer, open_page: Open) -> None:
    page = open_page(chat.url)
    text = (PAGE / "strings.js").read_text()
    english, chinese = (
        set(
            re.findall(r"^  (\w+):", text.partition(f"const {name} = ")[2].partition("};")[0], re.M)
        )
        for name in ("ENGLISH", "CHINESE")
    )
    assert english == chinese
    assert page.locator("html").get_attribute("lang") == "en"


# --- the panel ---


def figure(page: Page, name: str) -> Locator:
    return page.locator(f"[data-figure={name}]")


def test_the_panel_tells_what_the_server_tells(chat: ChatServer, open_page: Open) -> None:
    chat.experts = expert_state(store=STORE)
    page = open_page(chat.url)
    ask(page)
    page.clock.install()
    page.clock.pause_at(datetime.datetime.now() + datetime.timedelta(seconds=10))
    with page.expect_response("**/experts"):
        do(page, "Experts")
    expect(figure(page, "rate")).to_have_text("12.5")
    expect(figure(page, "prompt")).to_have_text("150 tokens/s")
    expect(figure(page, "context")).to_have_text("23 / 4,096")
    expect(figure(page, "memory")).to_have_text("2.0 GiB")
    expect(figure(page, "hits")).to_have_text("97.0 %")

    page.locator("canvas").focus()
    for key in ["ArrowDown"] * 4 + ["ArrowRight"] * 9:
        page.keyboard.press(key)
    here = page.locator(".here")
    expect(here).to_have_text("Layer 5, pool 4, expert 9: 0 in the last second, 0 since the start")
    used = [[0] * 64 for _ in range(30)]
    used[4][9] = 12
    chat.experts |= {
        "used": used,
        "store": STORE | {"wait_us": 500_000, "bytes_read": 4 * 2**20},
    }
    page.clock.run_for(1000)
    expect(here).to_have_text(re.compile(r": 12 in the last second, 12 since"))
    expect(figure(page, "waiting")).to_have_text("50.0 %")
    expect(figure(page, "read")).to_have_text("4.0 MiB/s")
    page.clock.run_for(1000)
    expect(here).to_have_text(re.compile(r": 0 in the last second, 12 since"))
    expect(figure(page, "waiting")).to_have_text("0.0 %")


def test_the_panel_starts_anew_with_the_server(chat: ChatServer, open_page: Open) -> None:
    used = [[5] * 64 for _ in range(30)]
    chat.experts = expert_state(used=used, store=STORE)
    page = open_page(chat.url)
    do(page, "Experts")
    page.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    here = page.locator(".here")
    expect(here).to_have_text(re.compile(r": 0 in the last second, 5 since"))
    chat.experts = expert_state(store=STORE | {"hits": 10})
    expect(here).to_have_text(re.compile(r": 0 in the last second, 0 since"))


def test_a_server_that_does_not_count_has_figures_and_no_map(
    chat: ChatServer, open_page: Open
) -> None:
    chat.experts = expert_state(layers=[], pools=[], n_expert=0, used=[], store=STORE)
    page = open_page(chat.url)
    do(page, "Experts")
    expect(figure(page, "hits")).to_have_text("97.0 %")
    expect(page.locator("canvas")).to_be_hidden()


def test_the_map_shows_the_expert_at_work(chat: ChatServer, open_page: Open) -> None:
    used = [[0] * 64 for _ in range(30)]
    used[6][20] = 50
    chat.experts = expert_state(used=used)
    page = open_page(chat.url, color_scheme="dark")
    do(page, "Experts")
    expect(page.get_by_text("All experts are in memory.")).to_be_visible()
    expect(figure(page, "hits")).to_be_hidden()
    do(page, "Since the start")
    lit = page.locator("canvas").evaluate(
        """canvas => {
            const context = canvas.getContext("2d");
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            for (let at = 0; at < data.length; at += 4) {
                if (data[at] > 250 && data[at + 1] > 205 && data[at + 2] < 130) {
                    return [(at / 4) % canvas.width, Math.floor(at / 4 / canvas.width)];
                }
            }
        }"""
    )
    page.locator("canvas").hover(position={"x": lit[0] + 1, "y": lit[1] + 1})
    expect(page.locator(".here")).to_have_text(
        re.compile(r"^Layer 7, pool 7, expert 20: \d+ in the last second, 50 since the start$")
    )


def test_the_panel_asks_only_while_it_is_open(chat: ChatServer, open_page: Open) -> None:
    chat.experts = expert_state()
    page = open_page(chat.url)
    with page.expect_response("**/experts"):
        do(page, "Experts")
    page.clock.install()
    do(page, "Experts")
    expect(page.locator("#panel")).to_be_hidden()
    before = chat.paths.count("/experts")
    for _ in range(5):
        page.clock.run_for(1000)
        page.evaluate("fetch('v1/models')")  # all that was asked before has been noted
    assert chat.paths.count("/experts") <= before + 1  # one may have been under way
    with page.expect_response("**/experts"):
        do(page, "Experts")
        page.clock.run_for(1000)


def test_a_server_without_experts_has_no_panel(chat: ChatServer, open_page: Open) -> None:
    chat.props = False
    page = open_page(chat.url)
    with page.expect_response("**/experts"):
        page.reload()
    expect(page.locator("#model")).to_have_text("megrez-moe")
    expect(page.locator("#toggle-panel")).to_be_hidden()


# --- the files ---


def test_the_page_is_small_and_asks_for_nothing_from_elsewhere() -> None:
    files = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert sum(len(text.encode()) for text in files.values()) < 100_000
    assert not [name for name, text in files.items() if "innerHTML" in text or "eval(" in text]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)', files["index.html"])
    assert policy is not None
    directives = dict(each.strip().split(" ", 1) for each in policy[1].split(";"))
    assert directives["default-src"] == "'none'"
    allowed = json.dumps(sorted(directives.values()))
    assert "http" not in allowed
    assert "unsafe" not in allowed
