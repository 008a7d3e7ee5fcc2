"""The page in a headless chromium, with clicks and keys: what it shows, keeps and never runs."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import TOKENIZER, Scripted, served, service_of

from nanojax.serve import page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; on Debian: apt-get install chromium")
# Each sets window.hit if it is run.
ATTACKS = [
    "<script>window.hit=1</script>", "<img src=x onerror=window.hit=1>", "<svg onload=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>", "<body onload=window.hit=1>", "<style>*{display:none}</style>",
    "<a href=javascript:window.hit=1>x</a>", "<details open ontoggle=window.hit=1>", "<base href=//evil.example/>",
    "<form action=//evil.example><input autofocus onfocus=window.hit=1></form>", "<meta http-equiv=refresh content=0>",
    "</textarea><script>window.hit=1</script>", "\"><script>window.hit=1</script>", "<object data=//evil.example></object>",
    "<math><mtext><img src=x onerror=window.hit=1></mtext></math>", "&lt;script&gt;window.hit=1&lt;/script&gt;",
    "[x](javascript:window.hit=1)", "[x](https://e.example/\"onmouseover=window.hit=1)", "![x](x onerror=window.hit=1)",
    "```html\"><script>window.hit=1</script>\n<script>window.hit=1</script>\n```", "https://e.example/<script>window.hit=1</script>",
    "|<script>window.hit=1</script>|b|\n|---|---|\n|<img src=x onerror=window.hit=1>|c|", "# <script>window.hit=1</script>",
    "`<img src=x onerror=window.hit=1>`",
]  # fmt: skip
MARKDOWN = "# Head\n\none **two** *three* `four`\n\n1. a\n   - b\n2. c\n\n> q\n\n```python\nx = 1\n```\n\n|h|\n|---|\n|d|\n\nhttps://e.example"


def reply(prompt: Sequence[int]) -> list[int]:
    """What the scripted model answers to its last message: `say X` is X, `sum` uses the calculator, `long` takes a while."""
    special = TOKENIZER.special
    begin = len(prompt) - 1 - list(reversed(prompt)).index(special("<|user_start|>"))
    asked = TOKENIZER.decode(prompt[begin + 1 : -2])
    if asked.startswith("say "):
        return [*TOKENIZER.encode(asked[4:]), special("<|assistant_end|>")]
    if asked == "sum":
        call = [special("<|python_start|>"), *TOKENIZER.encode("6*7"), special("<|python_end|>")]
        return [*TOKENIZER.encode("It is "), *call, *TOKENIZER.encode(" 42."), special("<|assistant_end|>")]
    if asked == "long":
        return TOKENIZER.encode("word " * 600)
    return [*TOKENIZER.encode(f"{len(prompt)} tokens"), special("<|assistant_end|>")]


@pytest.fixture(scope="module")
def engine() -> Scripted:
    return Scripted(reply)


@pytest.fixture(scope="module")
def url(engine: Scripted) -> Iterator[str]:
    with served(service_of(engine)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the test extra is not installed")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a browser that has kept nothing; fails on any error of the page's own, or a dialog."""
    contexts, wrong = [], []

    def go(width: int = 1200, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(60_000)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(url)
        return tab

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def say(tab: Any, text: str) -> Any:
    """Sends a message and waits for the end of its answer: that answer's text."""
    before = tab.locator(".turn.assistant").count()
    tab.fill("#input", text)
    tab.keyboard.press("Enter")
    tab.locator(".turn.assistant:not(.live)").nth(before).wait_for()
    return tab.locator(".turn.assistant .text").last


@pytest.mark.long
@needs_chromium
def test_talk(opened: Callable[..., Any], engine: Scripted) -> None:
    """Send with a click, stream, stop, edit, regenerate, copy, a step that is folded, and after a reload all is there; a
    second conversation beside it, and its deletion."""
    tab = opened()
    tab.click("#ideas button >> nth=0")
    tab.locator(".turn.assistant:not(.live) .stats", has_text="tokens").wait_for()
    tab.fill("#input", "long")
    engine.pause = 0.05  # a minute for the answer, so that a busy machine has time to click
    tab.click("#send")
    tab.locator(".turn.live .text", has_text="word word").wait_for()
    assert not tab.is_visible("#send")
    tab.click("#stop")
    tab.locator(".stats", has_text="stopped").wait_for()
    engine.pause = 0.0
    shown = tab.locator(".turn.assistant .text").last.text_content()
    assert shown.startswith("word") and len(shown) < 2000

    assert say(tab, "sum").locator("details").count() == 1
    step = tab.locator(".turn.assistant .text").last
    assert step.locator("dd").all_text_contents() == ["6*7", "42"] and not step.locator("dl").is_visible()
    step.locator("summary").click()
    assert step.locator("dl").is_visible()
    first = say(tab, "count").text_content()
    tab.locator("button", has_text="Regenerate").last.click()
    tab.locator(".turn.assistant:not(.live)").nth(3).wait_for()
    assert tab.locator(".turn.assistant .text").last.text_content() == first  # the same tokens, steps among them
    tab.click("#input")
    tab.keyboard.press("ArrowUp")
    tab.fill(".edit textarea", "say edited")
    tab.keyboard.press("Enter")
    tab.locator(".turn.assistant:not(.live)", has_text="edited").wait_for()

    before = tab.locator("#log .text").all_text_contents()
    tab.reload()
    tab.locator(".turn").nth(7).wait_for()
    assert tab.locator("#log .text").all_text_contents() == before and len(before) == 8
    tab.click("#new")
    assert tab.is_visible("#hello") and tab.locator(".turn").count() == 0
    say(tab, "say other")
    assert tab.locator("#chats li").count() == 2
    tab.on("dialog", lambda dialog: dialog.accept())
    tab.locator("#chats li.now .drop").click()
    assert tab.locator("#chats li").count() == 1 and tab.locator(".turn").count() == 0
    tab.locator("#chats .open").click()
    assert tab.locator("#log .text").all_text_contents() == before


@pytest.mark.long
@needs_chromium
def test_nothing_of_the_model_is_run(opened: Callable[..., Any]) -> None:
    """24 strings that would run a script, load something or change the page stay text, in the question and in the answer,
    also after a reload; links lead to http and https only."""
    tab = opened()
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    for attack in ATTACKS:
        text = say(tab, "say " + attack).text_content()
        if not any(mark in attack for mark in "`[|#"):
            assert text == attack
    for _ in range(2):
        assert tab.evaluate("window.hit") is None
        bad = "script, img, iframe, svg, style, object, form, input, base, meta, math, [onerror], [onload]"
        assert tab.locator("#log").locator(bad).count() == 0
        addresses = tab.eval_on_selector_all("#log a", "links => links.map(link => link.href)")
        assert all(address.startswith("https://e.example/") for address in addresses)
        assert tab.locator(".turn.user .text").all_text_contents() == ["say " + attack for attack in ATTACKS]
        tab.reload()
        tab.locator(".turn.assistant").nth(len(ATTACKS) - 1).wait_for()
    assert all(request.startswith(tab.url) for request in requests if not request.startswith("data:")), requests


@pytest.mark.long
@needs_chromium
def test_markdown_and_themes_and_a_phone(opened: Callable[..., Any], tmp_path: Path) -> None:
    """Markdown becomes the elements it stands for; the settings reach the request; both themes and 390 pixels: nothing is
    wider than the screen, the list of conversations opens and closes, and the text has contrast."""
    tab = opened(390, "dark")
    text = say(tab, "say " + MARKDOWN)
    found = {
        tag: text.locator(tag).count()
        for tag in ("h3", "strong", "em", "ol", "ol ul", "blockquote", "pre", "table", "a")
    }
    assert set(found.values()) == {1}, found
    assert text.locator("li").all_text_contents() == ["ab", "b", "c"] and text.locator("pre").text_content() == "x = 1"
    say(tab, "say " + "wide" * 200)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert not tab.is_visible("#side")
    tab.click("#menu")
    assert tab.is_visible("#new")
    tab.keyboard.press("Escape")
    tab.locator("#side").wait_for(state="hidden")
    tab.click("#tune")
    tab.fill("[name=seed]", "7")
    tab.locator("[name=temperature]").focus()
    for _ in range(30):
        tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Escape")
    with tab.expect_request("**/v1/chat/completions") as sent:
        say(tab, "count")
    body = json.loads(sent.value.post_data)
    assert (body["temperature"], body["seed"], body["top_k"], body["stream"]) == (0, 7, 50, True)
    contrasts = []
    for _ in range(2):
        colours = tab.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        light = [sum(map(int, colour[4:-1].split(","))) for colour in colours]
        contrasts.append(light[0] - light[1])
        tab.click("#theme")
    assert contrasts[0] > 400 and contrasts[1] < -400  # dark, then light


@pytest.mark.long
@needs_chromium
def test_errors_are_shown(opened: Callable[..., Any], engine: Scripted) -> None:
    """What the server refuses is shown in its words, and `Try again` asks once more; a lost server too."""
    tab = opened()
    tab.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, json={"error": {"message": "the queue is full"}}),
    )
    tab.fill("#input", "say it")
    tab.keyboard.press("Enter")
    tab.locator("#error", has_text="The queue is full").wait_for()
    assert tab.locator(".turn").count() == 1
    tab.unroute("**/v1/chat/completions")
    tab.click("#error button")
    tab.locator(".turn.assistant:not(.live)", has_text="it").wait_for()
    assert not tab.is_visible("#error")
    tab.route("**/v1/chat/completions", lambda route: route.abort())
    tab.fill("#input", "say more")
    tab.keyboard.press("Enter")
    tab.locator("#error button", has_text="Try again").wait_for()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """No address in it is fetched, no HTML is assigned, and the policy allows its own script and style alone."""
    html, policy = page._page()
    assert not any(
        word in html for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "src=")
    )
    assert html.count("<script>") == html.count("<style>") == 1 and "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "frame-ancestors 'none'" in policy
