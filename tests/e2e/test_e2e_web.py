"""The web page in headless Chromium, against the real stack. Skipped where there is no Chromium or no selenium."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_server import RealServer, ask, starting, until

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install selenium)")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("needs Chromium and chromedriver (Debian: chromium, chromium-driver)", allow_module_level=True)

KEY = "page-s3cret"
STORY = "Tell me a story about a fox."
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ENTER, ESCAPE, SHIFT = "\ue007", "\ue00c", "\ue008"


class Page:
    """The page in a browser, as its user sees it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self) -> None:
        self.driver.get(self.url)
        until(lambda: self.text("#state") == "ready")

    def fresh(self) -> None:
        """The page as on a first visit."""
        self.driver.get(self.url)
        self.js("localStorage.clear(); sessionStorage.clear()")
        self.open()

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """The text of the last such element that shows."""
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.innerText).at(-1) ?? ''"
        text: str = self.js(script, selector)
        return text

    def send(self, text: str) -> None:
        self.one("#prompt").send_keys(text, ENTER)

    def answering(self) -> bool:
        return bool(self.one("#stop").is_displayed())

    def wait_answer(self) -> str:
        until(lambda: not self.answering(), 30)
        return self.text("article.assistant .text")

    def wait_text(self) -> None:
        until(lambda: len(self.text("article.assistant .text")) > 5, 20)

    def titles(self) -> list[str]:
        return [element.text for element in self.all("#conversations .title")]

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    for server in starting(tmp_path_factory.mktemp("web") / "log"):
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(driver: Any, server: RealServer) -> Iterator[Page]:
    """A first visit; the test fails when the browser complained of the page."""
    page = Page(driver, server.url)
    page.resize(1280, 800)
    page.fresh()
    driver.get_log("browser")
    yield page
    complaints = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [text for text in complaints if "Failed to load resource" not in text] == []


# ---- chat -----------------------------------------------------------------------------------------------------------


def test_an_answer_streams_in_and_is_measured(page: Page) -> None:
    assert page.js("return document.activeElement.id") == "prompt"
    page.send(STORY)
    lengths = set()
    while page.answering():
        lengths.add(len(page.text("article.assistant .text")))
    assert len(lengths) > 5, "the text came in one piece"
    assert page.text("article.user .text") == STORY
    assert "fox" in page.text("article.assistant .text")
    note = r"\d+\.\d tokens/s · TTFB \d+(\.\d+)? (µs|ms|s) · \d+ tokens"
    assert re.match(note, page.text("article.assistant .note"))
    assert page.one("#messages").get_attribute("aria-busy") == "false"


def test_the_model_is_told_the_conversation(page: Page) -> None:
    page.send("My name is Alice.")
    page.wait_answer()
    page.send("What is my name?")
    assert "Alice" in page.wait_answer()


def test_the_same_seed_gives_the_same_answer(page: Page) -> None:
    page.one("#sampling-box summary").click()
    for name, value in (("temperature", "1.5"), ("seed", "7"), ("max_new_tokens", "24"), ("top_k", "40")):
        field = page.one(f"#sampling [name={name}]")
        field.clear()
        field.send_keys(value)
    page.send(STORY)
    first = page.wait_answer()
    assert "cut at max tokens" in page.text("article.assistant .note")
    page.one("article.assistant .note button").click()
    until(page.answering, 5)
    assert page.wait_answer() == first
    assert len(page.all("article")) == 2
    page.open()
    assert page.one("#sampling [name=seed]").get_attribute("value") == "7"


@pytest.mark.parametrize("how", ["escape", "button"])
def test_stop_ends_the_answer_here_and_on_the_server(page: Page, server: RealServer, how: str) -> None:
    aborted = server.stats("http-0")["aborted"]
    page.send(STORY)
    page.wait_text()
    if how == "escape":
        page.one("#prompt").send_keys(ESCAPE)
    else:
        page.one("#stop").click()
    text = page.wait_answer()
    assert page.text("article.assistant .note").startswith("stopped")
    until(lambda: server.stats("http-0")["aborted"] == aborted + 1)
    until(lambda: server.stats("scheduler-0")["running"] == 0)
    assert page.text("article.assistant .text") == text
    page.send("Hello")
    assert page.wait_answer()


def test_shift_enter_is_a_new_line(page: Page) -> None:
    prompt = page.one("#prompt")
    webdriver.ActionChains(page.driver).send_keys("one").key_down(SHIFT).send_keys(ENTER).key_up(SHIFT).perform()
    prompt.send_keys("two")
    assert prompt.get_attribute("value") == "one\ntwo"
    assert not page.all("article")


def test_a_refusal_is_shown(page: Page) -> None:
    page.js("document.getElementById('prompt').value = 'word '.repeat(9000)")
    page.send("")
    page.wait_answer()
    assert "context" in page.text("article.assistant .error")


def test_a_death_half_way_is_shown_and_the_answer_can_be_had_again(page: Page, server: RealServer) -> None:
    page.send(STORY)
    page.wait_text()
    os.kill(server.worker_pids()["scheduler-0"], signal.SIGKILL)
    page.wait_answer()
    assert page.text("article.assistant .error")
    until(lambda: page.text("#state") != "ready", 5)
    until(lambda: page.text("#state") == "ready", 60)
    page.one("article.assistant .note button").click()
    until(page.answering, 5)
    assert page.wait_answer()
    assert page.text("article.assistant .error") == ""


# ---- Markdown -------------------------------------------------------------------------------------------------------

HOSTILE = """# Title <script>alert(1)</script>

<img src=x onerror="document.title='taken'"> **bold** `code <b>` [bad](javascript:document.title='taken')
[good](https://a.example/?a=1&b="x) [data](data:text/html,x)

- item
  1. inner

```html
<iframe src="/"></iframe>
```"""


def test_markdown_is_shown_and_brings_no_markup_of_its_own(page: Page) -> None:
    messages = [{"role": "user", "content": "<u>hi</u>"}, {"role": "assistant", "content": HOSTILE}]
    stored = {"id": "x", "title": "<i>title</i>", "changed": 1, "messages": messages}
    page.js("localStorage.setItem('minisgl.chat.x', arguments[0])", json.dumps(stored))
    page.open()
    page.one("#conversations .title").click()
    tags = page.js("return [...document.querySelectorAll('article.assistant .text *')].map((e) => e.localName)")
    assert set(tags) == {"h1", "p", "strong", "code", "br", "a", "ul", "li", "ol", "pre"}
    (link,) = page.all("article.assistant a")
    assert link.get_attribute("href").startswith("https://a.example/?a=1")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert page.text("article.assistant pre").endswith('<iframe src="/"></iframe>')
    assert page.text("article.user .text") == "<u>hi</u>"
    assert page.titles() == ["<i>title</i>"]
    assert "taken" not in page.driver.title


def test_the_policy_forbids_to_make_markup_of_strings(page: Page) -> None:
    with pytest.raises(Exception, match="TrustedHTML"):
        page.js("document.body.innerHTML = '<b>x</b>'")
    page.driver.get_log("browser")


# ---- conversations --------------------------------------------------------------------------------------------------


def test_conversations_are_kept_switched_and_deleted(page: Page) -> None:
    page.send("Hello")
    hello = page.wait_answer()
    page.one("#new").click()
    assert not page.all("article")
    page.send("What is my name?")
    page.wait_answer()
    assert page.titles() == ["What is my name?", "Hello"]
    page.open()
    assert page.titles() == ["What is my name?", "Hello"]
    page.all("#conversations .title")[1].click()
    assert page.text("article.assistant .text") == hello
    page.all("#conversations .remove")[1].click()
    assert page.titles() == ["What is my name?"]
    assert not page.all("article")


def test_an_answer_goes_on_while_another_conversation_is_read(page: Page) -> None:
    page.send(STORY)
    page.wait_text()
    page.one("#new").click()
    assert not page.all("article")
    page.wait_answer()
    assert not page.all("article")
    page.one("#conversations .title").click()
    assert "tokens/s" in page.text("article.assistant .note")


# ---- the live view --------------------------------------------------------------------------------------------------


def test_the_way_of_the_last_request_is_drawn(page: Page) -> None:
    page.send(STORY)
    until(lambda: len(page.all(".hops li")) == 9, 20)  # before the answer is complete: all but the write
    assert page.answering()
    page.wait_answer()
    assert len(page.all(".hops li")) == 10
    tokens = re.search(r"(\d+) tokens$", page.text("article.assistant .note").splitlines()[0])
    assert tokens is not None
    assert len(page.all(".steps rect:not(.before)")) == int(tokens.group(1))
    ends = "return [...document.querySelectorAll('.hops i')].map((e) => [e.offsetLeft, e.offsetLeft + e.offsetWidth])"
    bars = page.js(ends)
    assert bars[0][0] == 0
    assert all(before[1] <= after[0] + 3 for before, after in itertools.pairwise(bars)), bars


def test_the_servers_figures_are_live(page: Page, server: RealServer) -> None:
    # Long enough to be seen: a story is told within one update of the figures.
    body = {"prompt": "Once", "max_new_tokens": 1000, "ignore_eos": True, "stream": False}
    asking = threading.Thread(target=ask, args=(server.url, body))
    asking.start()
    until(lambda: page.text("#running") == "1", 10)
    until(lambda: float(page.text("#throughput")) > 0, 10)
    assert re.match(r"[\d.]+K? used, [\d.]+K? cached of 262\.1K$", page.text("#kv-text"))
    assert [element.text for element in page.all("#workers li")] == [
        "detokenizer-0",
        "http-0",
        "scheduler-0",
        "tokenizer-0",
    ]
    asking.join(30)
    until(lambda: page.text("#running") == "0", 20)


# ---- looks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark"), (800, "light"), (1280, "dark")])
def test_nothing_is_out_of_reach_at_any_width(page: Page, width: int, scheme: str) -> None:
    page.resize(width, 700, scheme)
    page.send("Hello")
    page.wait_answer()

    def fits(selector: str) -> bool:
        box = page.js("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        return 0 <= box["left"] < box["right"] <= width and 0 <= box["top"] < box["bottom"] <= 700

    assert page.js("return document.documentElement.scrollWidth") <= width
    assert all(map(fits, ("#prompt", "#send", "#state", "article.assistant .text")))
    for panel, opener in (("#list", "#show-list"), ("#live", "#show-live")):
        if page.one(opener).is_displayed():
            page.one(opener).click()
            assert fits("#new" if panel == "#list" else "#running")
            page.one("body").send_keys(ESCAPE)
            assert not page.one(panel).is_displayed()
        assert page.one(panel).is_displayed() == (width >= (1081 if panel == "#live" else 721))
    ground, text = page.js("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert (brightness(ground) > brightness(text)) == (scheme == "light")


def brightness(color: str) -> int:
    return sum(map(int, re.findall(r"\d+", color)[:3]))


# ---- the API key ----------------------------------------------------------------------------------------------------


def test_the_api_page_describes_every_route_from_this_server_alone(page: Page) -> None:
    page.driver.get(f"{page.url}/docs")
    until(lambda: len(page.all("#routes details")) > 5)
    document = json.loads(page.js("return fetch('/openapi.json').then((answer) => answer.text())"))
    described = [f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item]
    assert [element.text for element in page.all("#routes summary code")] == described
    assert "null" not in page.text("#description")
    page.one("details[id='POST/generate'] summary").click()
    shown = page.text("details[id='POST/generate']")
    for field in ("max_new_tokens", "default 128", "input_ids", "curl -X POST", "text/event-stream", "503"):
        assert field in shown, field
    hosts = page.js("return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)")
    assert set(hosts) == {page.url}


@pytest.fixture
def locked(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setenv("MINISGL_API_KEY", KEY)
    for server in starting(tmp_path / "log"):
        server.wait_ready()
        page = Page(driver, server.url)
        page.resize(1280, 800)
        yield page


def test_the_page_asks_for_the_key_and_keeps_it_in_this_tab(locked: Page) -> None:
    locked.fresh()
    dialog = locked.one("#key-dialog")
    until(dialog.is_displayed)
    locked.one("#key").send_keys("wrong", ENTER)
    until(lambda: dialog.is_displayed() and "does not take" in dialog.text)
    locked.one("#key").send_keys(ESCAPE)
    until(lambda: not dialog.is_displayed())
    locked.send("Hello")
    until(dialog.is_displayed)
    locked.one("#key").send_keys(KEY, ENTER)
    assert locked.wait_answer()
    until(lambda: locked.text("#model") == "demo")
    assert locked.text("#running") in ("0", "1")
    assert KEY not in locked.js("return JSON.stringify(localStorage)")
    locked.open()
    until(lambda: locked.text("#model") == "demo")
    assert not locked.one("#key-dialog").is_displayed()
    locked.driver.get(f"{locked.url}/docs")
    until(lambda: len(locked.all("#routes details")) > 5)
    locked.js("sessionStorage.clear()")
    locked.driver.refresh()
    until(lambda: locked.one("#key-dialog").is_displayed())
