"""The web page: what is served, what it may not do, and a conversation in a browser."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from spikelm_serve.keys import Keys, make
from spikelm_serve.page import FOLDER, KINDS

Serve = Callable[..., httpx.Client]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATHS = {"/": "text/html", **{f"/static/{name}": kind for name, kind in KINDS.items()}}


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
    assert not re.findall(r"(?:https?:|\bwss?:|data:[a-z,]|\burl\(|@import|[\"'(]//)", text)


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
    script = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js"))
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

    def __init__(self, context: Any, url: str) -> None:
        self.problems: list[str] = []
        self.page = context.new_page()
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

    def ask(self, text: str, *, until: str) -> None:
        """Leaves the answer running, which has that text already."""
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        self.page.locator(".turn:last-child .answer", has_text=until).wait_for()

    def reload(self) -> None:
        self.page.reload()
        self.page.locator("#model:not(:empty)").wait_for()

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
    contexts = []

    def open_page(client: httpx.Client) -> Page:
        contexts.append(browser.new_context())
        return Page(contexts[-1], str(client.base_url))

    yield open_page
    for context in contexts:
        context.close()


def asked(page: Page) -> list[Any]:
    """The bodies of the chat requests from now on."""
    found: list[Any] = []
    page.page.on("request", lambda r: found.append(r.post_data_json) if "/chat/" in r.url else None)
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
    page.ask("hello", until="word word")
    with page.page.expect_response(lambda r: r.request.method == "DELETE") as told:
        page.page.keyboard.press("Escape")
    assert told.value.json()["cancelled"]
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


@pytest.fixture
def held(make_engine: Callable[..., Any]) -> Iterator[tuple[Any, threading.Event]]:
    """An engine that reads no prompt before the event."""
    engine = make_engine("word " * 200, delay=0.01)
    goes_on, prefill = threading.Event(), engine.prefill
    engine.prefill = lambda *args: (goes_on.wait(10), prefill(*args))[1]
    yield engine, goes_on
    goes_on.set()


def test_an_answer_is_stopped_before_it_begins(
    serve: Serve,
    held: tuple[Any, threading.Event],
    open_page: Callable[[httpx.Client], Page],
) -> None:
    engine, goes_on = held
    page = open_page(serve(engine))
    page.page.fill("#input", "hello")
    page.page.press("#input", "Enter")
    page.page.keyboard.press("Escape")
    page.page.locator(".turn", has_text="Stopping").wait_for()
    with page.page.expect_response(lambda r: r.request.method == "DELETE") as told:
        goes_on.set()
    assert told.value.json()["cancelled"]
    page.done()
    assert page.texts(".turn") == []
    assert page.page.input_value("#input") == "hello"
    assert page.problems == []


def fired(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, tuple[int, int]]]:
    """Per step, of how many neurons how many fired, by name."""
    text = client.post("/v1/chat/completions", json=body).text
    lines = [
        line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")
    ]
    steps = [
        step
        for line in lines
        for choice in json.loads(line)["choices"]
        for step in choice.get("spikes", [])
    ]
    return [
        {
            part["neurons"]: (
                sum(byte.bit_count() for byte in base64.b64decode(part["bits"])),
                part["size"],
            )
            for part in step["fired"]
        }
        for step in steps
    ]


def test_who_fired_is_shown(
    serve: Serve, coded_engine: Any, open_page: Callable[[httpx.Client], Page]
) -> None:
    client = serve(coded_engine)
    page = open_page(client)
    bodies = asked(page)
    page.page.locator("#spikes-note", has_text="The next answer shows here who fires.").wait_for()
    page.page.fill("[name=max_tokens]", "8")
    page.page.fill("[name=seed]", "1")
    page.say("one")
    assert bodies[0]["return_spikes"] is True
    steps = fired(client, bodies[0])
    last = steps[-1]
    label = f"{len(last)} populations, {len(steps)} tokens. Last token: Layer 0 "
    page.page.locator(f"#map[aria-label*='{label}']").wait_for()
    assert page.text("#spikes-note") == ""
    for name, (number, size) in last.items():
        told = f"{name}: {number} of {size} neurons fired at the last token; "
        [canvas] = page.page.locator(f"#layers canvas[aria-label^='{told}']").all()
        silent = float(canvas.get_attribute("aria-label").removeprefix(told).partition(" ")[0])
        all_fired = sum(step[name][0] for step in steps)
        assert silent == pytest.approx(100 - 100 * all_fired / (len(steps) * size), abs=0.06)
    assert re.fullmatch(r"\d+\.\d %", page.text("#silent-last"))
    assert re.fullmatch(r"\d+\.\d %", page.text("#silent-all"))
    if coded_engine.program is not None:
        assert "kB" in page.text("#read-all")
    # A column per token: the last one has colour, the next has none yet.
    opacity = """([canvas, x]) => Math.max(...canvas.getContext("2d")
        .getImageData(x, 0, 1, canvas.height).data.filter((_, i) => i % 4 === 3))"""
    plot = page.page.locator("#map").element_handle()
    assert page.page.evaluate(opacity, [plot, len(steps) - 1]) > 0
    assert page.page.evaluate(opacity, [plot, len(steps)]) == 0

    page.page.focus("#map")
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("ArrowLeft")
    name, (number, size) = next(iter(steps[-2].items()))
    page.page.locator("#map-cell", has_text=f"{name}, token {len(steps)}: ").wait_for()
    share = float(page.text("#map-cell").split()[-3])
    assert share == pytest.approx(100 * number / size, abs=0.8)
    assert page.problems == []

    # Switched off it asks for nothing, also after a reload.
    page.page.uncheck("#show-spikes")
    page.page.wait_for_selector("#fired", state="hidden")
    page.reload()
    assert not page.page.is_checked("#show-spikes")
    bodies = asked(page)
    page.say("two")
    assert "return_spikes" not in bodies[0]
    page.page.check("#show-spikes")
    page.page.locator("#spikes-note", has_text="came while spikes were not shown").wait_for()
    page.page.get_by_role("treeitem").nth(1).click()
    page.page.wait_for_selector("#fired", state="visible")


def test_a_model_that_does_not_tell_who_fired(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    page = open_page(serve(make_engine("hello")))
    page.say("hi")
    page.page.locator("#spikes-note", has_text="This model does not tell who fired.").wait_for()
    assert "%" not in page.text("#silent-all")
    assert not page.page.is_visible("#fired, #populations")
    assert page.problems == []


def test_the_tree_outlives_a_reload_until_it_is_forgotten(
    serve: Serve, coded_engine: Any, open_page: Callable[[httpx.Client], Page]
) -> None:
    page = open_page(serve(coded_engine))
    page.page.fill("[name=max_tokens]", "8")
    page.say("one")
    page.page.fill("#name", "mine")
    page.page.press("#name", "Enter")
    page.page.wait_for_selector(".saved")
    page.say("two")
    page.page.get_by_role("treeitem").nth(1).click()
    page.say("three")
    seen = ["#tree", "#chat", "#measured"]
    before = [page.text(selector) for selector in seen]
    page.reload()
    assert [page.text(selector) for selector in seen] == before
    page.page.wait_for_selector("#fired", state="visible")
    bodies = asked(page)
    page.say("four")
    assert page.texts(".message") == ["one", "three", "four"]
    assert bodies[0]["state"]["from"].startswith("st_")
    assert page.problems == []

    page.page.click("#forget")
    assert page.text("#forget") == "Forget all?"
    page.page.focus("#input")
    assert page.text("#forget") == "Forget"
    assert page.page.get_by_role("treeitem").count() == 5
    page.page.click("#forget")
    page.page.click("#forget")
    assert page.page.get_by_role("treeitem").count() == 1
    assert "three" not in str(page.page.evaluate("JSON.stringify(localStorage)"))
    page.reload()
    assert page.page.get_by_role("treeitem").count() == 1


FORBIDDEN = "Storage.prototype.setItem = () => { throw new DOMException('no', 'SecurityError'); };"
FULL = """
const setItem = Storage.prototype.setItem;
Storage.prototype.setItem = function (name, value) {
  if (value.length > 4000) throw new DOMException("full", "QuotaExceededError");
  setItem.call(this, name, value);
};
"""


@pytest.mark.parametrize("script", [FORBIDDEN, FULL])
def test_storage_that_is_forbidden_or_full(
    serve: Serve,
    make_engine: Callable[..., Any],
    open_page: Callable[[httpx.Client], Page],
    script: str,
) -> None:
    page = open_page(serve(make_engine("hello")))
    page.page.add_init_script(script)
    page.reload()
    for message in "123456":
        page.page.click("#new")
        page.say(message)
    page.page.get_by_role("treeitem").nth(2).click()
    assert page.page.get_by_role("treeitem").count() == 7
    page.reload()
    found = page.texts(".item .asked")[1:]
    if script == FORBIDDEN:
        assert found == []
    else:
        # The one that was current, and the newest of the others.
        assert page.texts(".message") == found[:1] == ["2"]
        assert 2 <= len(found) < 6
        assert "123456".endswith("".join(found[1:]))
    assert page.problems == []


def test_what_another_program_stored_does_no_harm(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    page = open_page(serve(make_engine("hello")))
    page.say("one")
    for value in ("{", "null", '{"version": 1}', '{"version": 1, "turns": [null, {"parent": 5}]}'):
        store = "v => { for (const k of Object.keys(localStorage)) localStorage[k] = v; }"
        page.page.evaluate(store, value)
        page.reload()
        page.say("hi")
        assert page.texts(".answer") == ["hello"]
    assert page.problems == []


def test_two_tabs_add_to_one_tree(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    client = serve(make_engine("hello"))
    page = open_page(client)
    page.say("one")
    other = Page(page.page.context, str(client.base_url))
    assert other.texts(".message") == ["one"]
    page.say("two")
    other.say("three")
    page.reload()
    assert page.texts(".item .asked") == ["Beginning", "one", "two", "three"]
    assert page.problems == other.problems == []


class Relay:
    """Passes connections on to a server; the first that brings `until` is cut off there."""

    def __init__(self, port: int, until: bytes) -> None:
        self.port, self._until, self._is_cut = port, until, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            seen = b""
            while data := source.recv(1 << 16):
                seen += data
                if self._until in seen and not self._is_cut:
                    self._is_cut = True
                    sink.sendall(data[: -len(seen.partition(self._until)[2]) or None])
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


WORDS = "".join(f"word{i} " for i in range(30))


def test_a_lost_connection_is_taken_up_again(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    client = serve(make_engine(WORDS, delay=0.005))
    relay = Relay(client.base_url.port or 0, until=b"id: 20\n")
    page = open_page(httpx.Client(base_url=relay.url))
    wanted: list[tuple[str, str]] = []
    may_pass = False

    def pass_or_refuse(route: Any) -> None:
        wanted.append((route.request.method, route.request.headers["last-event-id"]))
        route.continue_() if may_pass else route.abort()

    page.page.route("**/v1/streams/*", pass_or_refuse)
    page.page.fill("#input", "hello")
    page.page.press("#input", "Enter")
    page.page.locator(".turn", has_text="Connection lost, trying again").wait_for()
    may_pass = True
    page.done()
    assert page.text(".answer") == WORDS.strip()
    assert page.texts(".note") == []
    assert not page.page.is_visible("#alert")
    assert set(wanted) == {("GET", "19")}
    relay.close()


@pytest.mark.parametrize("is_crash", [False, True])
def test_an_answer_outlives_a_reload(
    serve: Serve,
    make_engine: Callable[..., Any],
    open_page: Callable[[httpx.Client], Page],
    is_crash: bool,
) -> None:
    page = open_page(serve(make_engine(WORDS, delay=0.005)))
    page.say("before")
    page.ask("hello", until="word7")
    if is_crash:
        # The page does not get to note how far it was: the answer comes from its beginning.
        stop = "addEventListener('pagehide', (event) => event.stopImmediatePropagation(), true)"
        page.page.evaluate(stop)
    page.reload()
    page.page.locator(".turn:nth-child(2) .facts").wait_for()
    assert page.texts(".answer") == [WORDS.strip()] * 2
    assert page.texts(".note") == []
    assert "tokens/s" in page.text("#speed")
    page.reload()
    assert page.texts(".answer") == [WORDS.strip()] * 2
    assert page.problems == []


def test_a_message_outlives_a_reload_before_its_answer_begins(
    serve: Serve,
    held: tuple[Any, threading.Event],
    open_page: Callable[[httpx.Client], Page],
) -> None:
    page = open_page(serve(held[0]))
    page.page.fill("#input", "hello")
    page.page.press("#input", "Enter")
    page.reload()
    assert page.texts(".turn") == []
    assert page.page.input_value("#input") == "hello"
    assert page.problems == []


def test_an_answer_that_is_gone_after_a_reload_is_cut_off(
    serve: Serve, make_engine: Callable[..., Any], open_page: Callable[[httpx.Client], Page]
) -> None:
    page = open_page(serve(make_engine(WORDS, delay=0.005)))
    page.ask("hello", until="word7")
    error = {"error": {"message": "no stream", "code": "stream_not_found"}}
    page.page.route("**/v1/streams/*", lambda route: route.fulfill(status=404, json=error))
    page.reload()
    page.page.locator(".note").wait_for()
    assert page.text(".note") == "Cut off: the server does not have the rest."
    assert "word7" in page.text(".answer")
    assert not page.page.is_visible("#alert")
    page.say("and now?")
    assert page.texts(".message") == ["hello", "and now?"]
