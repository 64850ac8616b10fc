"""The chat page: one file, nothing from elsewhere, and in a real browser, where there is one, a whole conversation."""

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from typing import Any

import httpx
import pytest

from skipkernels.engine import Engine
from tests.server.http.fakes import EchoModel, client_of, echo_service
from tests.server.http.running import running
from tests.server.http.test_interface import engine, real_service  # noqa: F401  # a fixture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not CHROMIUM or not find_spec("playwright"), reason="needs Chromium and playwright")


def get(path: str, **options: str) -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with client_of(echo_service(**options)) as client:
            return await client.get(path)

    return asyncio.run(exchange())


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_and_needs_no_key() -> None:
    answer = get("/", api_key="secret")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    page = Page(answer.text)
    assert not page.open
    assert not page.sources, "nothing is loaded from elsewhere"
    wanted = set(re.findall(r'at\("([\w-]+)"\)', answer.text))
    assert wanted == set(page.ids) - {""}, "the script and the page name the same things"
    assert len(page.ids) == len(set(page.ids))
    assert get("/v1/models", api_key="secret").status_code == 401


def test_each_number_on_the_page_is_explained() -> None:
    page = get("/").text
    assert "a lower 95 % bound" in page
    assert "up to the first difference" in page
    for named in ("skip level", "deadline, ms", "new tokens"):
        label = next(line for line in page.splitlines() if f">{named} " in line)
        assert 'title="' in label, named
    told = page[page.index("const parts = [") : page.index("tell(box, parts)")]
    assert told.count("`") / 2 + told.count("told.strategy") + told.count('"late"') == told.count("EXPLAINED."), told


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_what_is_promised_and_chosen_stands_under_the_chat() -> None:
    """As a browser shows it, once the page has asked the server."""
    with running(echo_service()) as server:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
        shown = subprocess.run([CHROMIUM or "", *options, server.url], capture_output=True, text=True, timeout=120)
    assert re.search(r'<p id="promise"[^>]*>Promised accuracy: [^<]*up to the first difference', shown.stdout)
    rows = re.findall(r"<tr>.*?</tr>", shown.stdout)
    cells = [re.sub(r"<[^>]*>", "|", row) for row in rows]
    assert "promised accuracy" in cells[0]
    assert "chosen by the server" in cells[0]
    assert rows[0].count("title=") == 4
    assert "with 1, 2, 4 or 8 requests at once" in cells[1]


@pytest.fixture
def tab() -> Iterator[tuple[Any, list[str]]]:
    """A page as wide as a phone, and what goes wrong in it, apart from requests that are refused or reach nobody."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 375, "height": 667})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page, errors
        chromium.close()
        assert errors == []


NEWEST = "document.querySelector('#chat').lastElementChild.getBoundingClientRect()"


@browser
def test_the_newest_text_stays_in_sight_unless_the_reader_scrolled_away(tab: tuple[Any, list[str]]) -> None:
    from playwright.sync_api import expect

    page, _ = tab

    def in_sight() -> bool:
        bottom = page.evaluate(f"{NEWEST}.bottom")
        box = page.locator("#form").bounding_box()
        return bool(0 < bottom <= box["y"] and box["y"] + box["height"] <= 667)

    with running(echo_service(EchoModel(word_s=0.02))) as server:
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("echo")
        long = " ".join(f"word{number}" for number in range(150))
        for _ in range(2):
            page.fill("#text", long)
            page.press("#text", "Enter")
            expect(page.locator(".assistant > span").last).to_contain_text("word100", timeout=20_000)
            assert in_sight()
            expect(page.locator("#send")).to_be_enabled(timeout=20_000)
            assert in_sight()

        page.fill("#text", long)
        page.click("#send")
        expect(page.locator(".assistant > span").last).to_contain_text("word9", timeout=20_000)
        page.evaluate("scrollBy(0, -300)")
        page.wait_for_timeout(100)
        stays = page.evaluate("scrollY")
        expect(page.locator("#send")).to_be_enabled(timeout=20_000)
        assert page.evaluate("scrollY") == stays
        assert page.evaluate(f"{NEWEST}.bottom") > 667
        page.fill("#text", "short")
        page.click("#send")
        expect(page.locator("#send")).to_be_enabled(timeout=20_000)
        assert in_sight(), "who sends goes back to the newest text"


@browser
def test_how_an_answer_ended_is_said(tab: tuple[Any, list[str]]) -> None:
    from playwright.sync_api import expect

    page, _ = tab
    told = page.locator(".assistant .told")
    with running(echo_service(EchoModel(word_s=0.05))) as server:
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("echo")
        page.fill("#tokens", "3")
        page.fill("#text", "one two three four")
        page.press("#text", "Enter")
        expect(told).to_contain_text("cut at 3 tokens · ", timeout=20_000)

        for wrong in ("0", ""):
            page.fill("#tokens", wrong)
            page.fill("#text", "not sent")
            page.press("#text", "Enter")
            page.evaluate("at('example').click()")
            assert not page.evaluate("at('tokens').checkValidity()")
            expect(page.locator(".user")).to_have_count(1)

        page.fill("#tokens", "256")
        page.fill("#text", " ".join(["word"] * 200))
        page.press("#text", "Enter")
        expect(page.locator(".assistant > span").last).to_contain_text("word word word", timeout=20_000)
        page.click("#stop")
        expect(told.last).to_contain_text(re.compile(r"stopped after about \d+ tokens · [\d.]+ tokens/s"))

        page.fill("#tokens", "99999999999999999999999")
        page.fill("#text", "too many")
        page.press("#text", "Enter")
        expect(page.locator(".error")).to_contain_text("max_tokens")
        expect(page.locator(".error")).to_contain_text("(on this page: new tokens)")


@browser
def test_why_there_are_no_levels_is_said_until_there_are(tab: tuple[Any, list[str]]) -> None:
    from playwright.sync_api import expect

    page, _ = tab
    state = {"profiling": True, "levels": 1}

    def models(route: Any) -> None:
        answer = route.fetch()
        document = answer.json()
        told = document["data"][0]["skipkernels"]
        levels = sorted({one["skip_level"] for one in told["strategies"]})[: state["levels"]]
        told["strategies"] = [one for one in told["strategies"] if one["skip_level"] in levels]
        told["profiling"] = state["profiling"]
        route.fulfill(response=answer, json=document)

    with running(echo_service()) as server:
        page.route("**/v1/models", models)
        page.goto(server.url)
        why = page.locator("#level-why")
        expect(why).to_have_text("skip levels are being measured")
        expect(page.locator("#level")).to_be_disabled()
        state.update(profiling=False, levels=2)
        expect(why).to_have_text("", timeout=10_000)
        expect(page.locator("#level")).to_be_enabled()
        state.update(levels=1)
        page.reload()
        expect(why).to_have_text("this model is served without skip levels")
        page.unroute_all()


@browser
def test_a_server_that_is_gone_is_said_and_found_again(tab: tuple[Any, list[str]]) -> None:
    from playwright.sync_api import expect

    page, _ = tab
    with running(echo_service()) as server:
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("echo")
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        page.fill("#text", "anybody?")
        page.press("#text", "Enter")
        expect(page.locator(".error")).to_have_text("the server does not answer")
        expect(page.locator("#model")).to_have_text("the server does not answer")
        expect(page.locator("#send")).to_be_enabled()
        page.unroute_all()
        expect(page.locator("#model")).to_have_text("echo", timeout=10_000)


HALF_AN_ANSWER = """
window.realFetch = window.fetch;
window.fetch = async (url, options) => url.includes("completions") ? new Response(new ReadableStream({start(stream) {
  stream.enqueue(new TextEncoder().encode('data: {"choices": [{"delta": {"content": "half"}}]}\\n\\n'));
  options.signal.addEventListener("abort", () => stream.error(new DOMException("", "AbortError")));
}})) : window.realFetch(url, options);
null;
"""


@browser
def test_a_conversation_in_a_real_browser(engine: Engine) -> None:  # noqa: F811
    from playwright.sync_api import expect, sync_playwright

    with running(real_service(engine)) as server, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("tiny")
        assert page.locator("#level").get_attribute("max") == "1"
        expect(page.locator("#strategies")).to_contain_text("text@0.3")

        page.fill("#tokens", "60")
        page.fill("#text", "the quick brown fox")
        page.press("#text", "Enter")
        told = page.locator(".assistant .told")
        expect(told).to_contain_text("text@0 ", timeout=20_000)
        expect(told).to_contain_text("tokens/s")
        expect(told).to_contain_text("0.0 % of the FFN bytes not read")
        assert page.locator(".assistant > span").inner_text()
        parts = page.locator(".assistant .told span")
        assert all(parts.nth(at).get_attribute("title") for at in range(parts.count()))
        expect(page.locator("#promise")).to_contain_text("a lower 95 % bound")

        page.click("#clear")
        expect(page.locator(".message")).to_have_count(0)
        page.locator("#level").fill("1")
        expect(page.locator("#level-text")).to_have_text("0.3")
        page.fill("#text", "the quick brown fox")
        page.click("#send")
        expect(told).to_contain_text("text@0.3", timeout=20_000)
        assert "0.0 % of" not in told.inner_text()

        page.fill("#text", "a second message; without a chat template it stands for itself")
        page.click("#send")
        expect(told).to_have_count(2, timeout=20_000)

        page.evaluate(HALF_AN_ANSWER)
        page.fill("#text", "an answer that a new chat leaves behind")
        page.click("#send")
        expect(page.locator(".assistant > span").last).to_have_text("half")
        page.click("#clear")
        expect(page.locator("#send")).to_be_enabled(timeout=20_000)
        assert page.evaluate("messages.length") == 0
        page.evaluate("window.fetch = realFetch; null")
        expect(page.locator("#hint")).to_contain_text("each message stands for itself")
        page.click("#example")
        expect(page.locator("#hint")).to_be_hidden()
        expect(told).to_contain_text("tokens/s", timeout=20_000)
        assert page.locator(".user").inner_text().startswith("Q: What is")
        chromium.close()
        assert errors == []
