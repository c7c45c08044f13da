"""The web page: what is served, what it may not do, and a conversation in a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from spikelm_serve.keys import Keys, make
from spikelm_serve.page import FOLDER, KINDS

Serve = Callable[..., httpx.Client]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATHS = {"/": "text/html", "/static/style.css": "text/css", "/static/app.js": "text/javascript"}


@pytest.mark.parametrize(("path", "kind"), PATHS.items())
def test_the_files_are_served_with_their_type_and_policy(
    noise: httpx.Client, path: str, kind: str
) -> None:
    response = noise.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_nothing_else_is_served(noise: httpx.Client) -> None:
    assert noise.get("/static/page.py").status_code == 404
    assert noise.get("/static/..%2fpage.py").status_code == 404


def test_the_page_needs_no_key_and_the_api_does(
    serve: Serve, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(make("me")[1] + "\n")
    client = serve(make_engine("hello"), keys=Keys.read(tmp_path / "keys"))
    assert all(client.get(path).status_code == 200 for path in PATHS)
    assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize("name", KINDS)
def test_a_file_refers_to_no_other_origin(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    # A name, at which nobody looks.
    text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"(?:https?:|wss?:|data:[a-z,]|\burl\(|@import|[\"'(]//)", text)


@pytest.mark.parametrize("name", KINDS)
def test_text_never_becomes_markup_or_code(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|srcdoc|document\.write|\beval\b|new Function"
    assert not re.findall(ways, text)


def test_the_page_has_no_inline_code_or_style() -> None:
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names))
    script = (FOLDER / "app.js").read_text(encoding="utf-8")
    # `show-${name}` and the like are not found by this.
    assert set(re.findall(r'\$\("([^"]+)"\)', script)) <= set(names)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A page that is open in the browser, and what its console said."""

    def __init__(self, browser: Any, url: str) -> None:
        self.problems: list[str] = []
        self.page = browser.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(url)
        # The name of the model, or why there is none.
        self.page.locator("#model:not(:empty), #alert:visible").first.wait_for()

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def say(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        self.done()

    def done(self) -> None:
        """Waits for the end of an answer."""
        self.page.wait_for_selector("#stop", state="hidden")

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[[httpx.Client], Page]]:
    pages = []

    def open_page(client: httpx.Client) -> Page:
        pages.append(Page(browser, str(client.base_url)))
        return pages[-1]

    yield open_page
    for page in pages:
        page.page.close()


def asked(page: Page) -> list[Any]:
    """The bodies of the chat requests from now on."""
    found: list[Any] = []
    page.page.on("request", lambda r: found.append(r.post_data_json) if "chat" in r.url else None)
    return found


def test_a_conversation_goes_on_is_rewound_and_forks(
    serve: Serve, coded_engine: Any, open_page: Callable[[httpx.Client], Page]
) -> None:
    page = open_page(serve(coded_engine))
    bodies = asked(page)
    page.page.fill("[name=max_tokens]", "8")
    page.page.fill("[name=system]", "Be brief.")
    page.say("one")
    page.say("two")
    assert [m["role"] for m in bodies[0]["messages"]] == ["system", "user"]
    assert bodies[1]["messages"] == [{"role": "user", "content": "two"}]
    assert bodies[1]["state"]["from"].startswith("st_")
    assert re.fullmatch(r"[\d,]+ of [\d,]+ tokens", page.text("#cached"))
    assert "The same after" in page.text("#growth")

    # Back to the first turn: the next message is a second branch, from the same state.
    page.page.get_by_role("treeitem").nth(1).click()
    assert page.texts(".message") == ["one"]
    assert "beside another branch" in page.text("#hint")
    page.say("three")
    assert page.texts(".message") == ["one", "three"]
    assert bodies[2]["state"] == bodies[1]["state"]
    assert page.page.get_by_role("treeitem").count() == 4
    assert page.texts(".item.on-branch .asked") == ["Beginning", "one", "three"]

    page.page.get_by_role("button", name="Another answer").last.click()
    page.done()
    assert "3/3" in page.text(".turn:last-child .actions")
    assert bodies[3]["messages"] == bodies[2]["messages"]
    assert bodies[3]["seed"] != bodies[2]["seed"]

    page.page.fill("#name", "mine")
    page.page.press("#name", "Enter")
    page.page.wait_for_selector(".saved")
    assert page.texts(".saved") == ["◆ mine"]

    page.page.focus("#tree [tabindex='0']")
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        page.page.keyboard.press(key)
    assert page.texts(".message") == ["one", "two"]
    page.page.keyboard.press("Delete")
    assert page.texts(".message") == ["one"]
    assert page.page.get_by_role("treeitem").count() == 4
    assert page.problems == []


def test_a_lost_state_means_the_whole_branch_is_sent(
    serve: Serve, coded_engine: Any, open_page: Callable[[httpx.Client], Page]
) -> None:
    client = serve(coded_engine)
    page = open_page(client)
    bodies = asked(page)
    page.page.fill("[name=max_tokens]", "8")
    page.say("one")
    for state in client.get("/v1/states").json()["data"]:
        assert client.delete(f"/v1/states/{state['id']}").status_code == 200
    page.say("two")
    assert [m["role"] for m in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert "state" not in bodies[-1]
    assert "Sent the whole branch again" in page.text(".note")


def test_an_answer_is_stopped_and_what_was_said_stays(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    page = open_page(serve(make_engine("word " * 200, delay=0.02)))
    page.page.fill("#input", "hello")
    page.page.press("#input", "Enter")
    page.page.locator(".answer", has_text="word word").wait_for()
    page.page.keyboard.press("Escape")
    page.done()
    assert page.text(".note") == "Stopped."
    assert page.text(".answer").startswith("word ")
    assert page.problems == []


def test_an_error_is_shown_and_the_message_comes_back(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    engine = make_engine("hello")
    page = open_page(serve(engine))
    page.page.fill("[name=stop]", "x" * 300)
    page.say("refused")
    assert "allowed: a string or up to 16" in page.text("#alert")
    assert page.page.input_value("#input") == "refused"
    assert page.texts(".turn") == []

    page.page.fill("[name=stop]", "")
    engine.error = RuntimeError("broken")
    page.say("failing")
    assert "the server failed to answer" in page.text("#alert")
    engine.error = None
    page.say("well")
    assert not page.page.is_visible("#alert")
    assert page.texts(".answer")[-1] == "hello"


def test_settings_outlive_a_reload_and_the_key_is_sent(
    serve: Serve,
    make_engine: Callable[..., Any],
    open_page: Callable[[httpx.Client], Page],
    tmp_path: Path,
) -> None:
    key, line = make("me")
    (tmp_path / "keys").write_text(line + "\n")
    client = serve(make_engine("hello"), keys=Keys.read(tmp_path / "keys"))
    page = open_page(client)
    assert "a key is needed" in page.text("#alert")
    page.page.fill("#key", key)
    page.page.press("#key", "Tab")
    page.page.fill("[name=temperature]", "0.5")
    page.page.locator("#model:not(:empty)").wait_for()
    page.page.reload()
    page.page.locator("#model:not(:empty)").wait_for()
    bodies = asked(page)
    page.say("hi")
    assert page.texts(".answer") == ["hello"]
    assert bodies[0]["temperature"] == 0.5
    assert key not in str(page.page.evaluate("JSON.stringify(localStorage)"))


def test_markup_in_an_answer_is_text(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    page = open_page(serve(make_engine(hostile)))
    page.say("<b>hi</b>")
    assert page.texts(".message") == ["<b>hi</b>"]
    assert page.text(".answer") == hostile
    assert page.page.locator("#chat img, #chat b").count() == 0
    assert page.problems == []
