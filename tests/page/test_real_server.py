"""The page on the server it is made for, with the pocket model."""

from __future__ import annotations

import json

from playwright.sync_api import Route, expect

from support.browser import Open
from support.server import Server, wait_until


def test_the_model_answers_in_chinese(server: Server, open_page: Open) -> None:
    page = open_page(server.url, locale="zh-CN")
    page.locator("#input").fill("世界上最高的山峰是哪座？")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="重新回答")).to_be_visible()
    expect(page.locator(".assistant .body")).to_contain_text("珠穆朗玛峰")
    expect(page.locator(".speed")).to_contain_text("词元/秒")


def test_a_stopped_answer_frees_its_slot(server: Server, open_page: Open) -> None:
    def without_end(route: Route) -> None:
        # Many alternatives with each token also make the server slow enough to be stopped.
        body = json.loads(route.request.post_data or "") | {
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 1000,
        }
        route.continue_(post_data=json.dumps(body))

    page = open_page(server.url)
    page.route("**/completions", without_end)
    page.locator("#input").fill("Count.")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .body")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".assistant .note")).to_have_text("Stopped.")
    wait_until(lambda: server.busy() == 0, 60, "its work stops")


def test_the_panel_tells_what_the_server_counted(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    page.get_by_role("button", name="Experts").click()
    page.locator("#input").fill("Why is the sky blue?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    experts = server.get("/experts").json()
    page.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    layer, pool, count = experts["layers"][1], experts["pools"][1], experts["used"][1][0]
    here = page.locator(".here")
    expect(here).to_contain_text(f"Layer {layer}, pool {pool}, expert 0")
    expect(here).to_contain_text(f"{count:,} since the start")
    expect(page.locator("[data-figure=memory]")).to_contain_text("MiB")


def test_a_conversation_too_long_is_said(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    page.locator("#input").fill("hello " * 1000)
    page.keyboard.press("Enter")
    expect(page.locator(".error")).to_contain_text("and the model's context 512")
