"""The playground in a real Chromium, before real servers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from browser import WAIT_MS, chromium, watched
from pictures import encoded, noise
from triptych.gateway import Gateway, GatewayOptions
from triptych.gateway.keys import ApiKeys
from triptych.server import Server

pytestmark = pytest.mark.server

DELAY_S = 0.05
LONG = " ".join(f"word{number}" for number in range(400))
"""Takes the slow server twenty seconds to say back."""
KEY = "sk-test-1"
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 360, "height": 720}


def before(server: Server, **options) -> Gateway:
    return Gateway(GatewayOptions(triton=f"127.0.0.1:{server.grpc_port}", port=0, **options))


@pytest.fixture(scope="module")
def gateway(echo_server: Server) -> Iterator[Gateway]:
    with before(echo_server, served_model_name=("tiny",)) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def slow(start_server: Callable[..., Server]) -> Iterator[Gateway]:
    """Before a server that says one word after the other."""
    server = start_server("echo", echo_token_delay_s=DELAY_S)
    with before(server) as gateway:
        yield gateway
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, gateway: Gateway) -> Iterator[Page]:
    with watched(browser, gateway.url) as page:
        yield page


@pytest.fixture
def slow_page(browser: Browser, slow: Gateway) -> Iterator[Page]:
    with watched(browser, slow.url) as page:
        yield page


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    path.write_bytes(encoded(noise(320, 240, seed=77), "png"))
    return path


def ask(page: Page, text: str) -> None:
    expect(page.get_by_label("Model")).to_be_enabled()
    page.get_by_role("textbox", name="Question").fill(text)
    page.keyboard.press("Enter")


def answers(page: Page):
    return page.get_by_role("article", name="Answer")


def drop(page: Page, name: str, kind: str, data: bytes = b"data") -> None:
    transfer = page.evaluate_handle(
        """([name, type, data]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], name, { type }));
            return transfer;
        }""",
        [name, kind, list(data)],
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


# Upload, stream, stop, error.


def test_a_picture_is_asked_about_and_the_answer_is_measured(page: Page, picture: Path) -> None:
    for count in range(2):
        page.get_by_label("Attach pictures, clips or sounds").set_input_files(picture)
        expect(page.get_by_role("list", name="Attached").get_by_role("img")).to_be_visible()
        ask(page, "What is **in** it?")
        answer = answers(page).nth(count)
        expect(answer).to_contain_text("First token")
        expect(answer).to_contain_text(re.compile(r"image 0: \d+×\d+ \w+, crc32"))
        expect(answer).to_contain_text("What is in it?")  # said back, and shown bold
        expect(answer.locator("strong").first).to_have_text("in")
        expect(answer).to_contain_text(re.compile(r"First token\d.*Tokens\d+ in, \d+ out"))
        strip = answer.get_by_role("img", name=re.compile("preprocess .* encode .* decode"))
        expect(strip).to_be_visible()
        expect(page.get_by_role("list", name="Attached")).to_be_empty()
    # The second question goes with the first one's picture, as part of what was said.
    expect(answers(page).nth(0)).to_contain_text("Media cached0 of 1")
    expect(answers(page).nth(1)).to_contain_text("Media cached2 of 2")
    expect(answers(page).nth(1)).to_contain_text("image 1: ")


def test_an_answer_is_shown_as_it_is_written_and_stopped(slow_page: Page, slow: Gateway) -> None:
    ask(slow_page, LONG)
    answer = answers(slow_page)
    expect(answer).to_contain_text("word3 ")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(slow_page.get_by_role("status")).to_have_text("Answering")
    expect(slow_page.get_by_role("button", name="Send")).to_be_hidden()
    early = answer.inner_text()
    expect(answer).to_contain_text("word9 ")
    assert answer.inner_text().startswith(early.rstrip("▍\n"))
    slow_page.keyboard.press("Escape")
    expect(answer).to_contain_text("Stopped.")
    expect(answer).not_to_have_attribute("aria-busy", "true")
    expect(slow_page.get_by_role("button", name="Send")).to_be_visible()
    expect(slow_page.get_by_role("status")).to_have_text("Stopped.")
    assert "word399" not in answer.inner_text()
    left = 'requests_total{route="/v1/chat/completions",status="499"} 1.0'
    deadline = time.monotonic() + 10  # it is counted once the page has gone
    while left not in httpx.get(f"{slow.url}/metrics", trust_env=False).text:
        assert time.monotonic() < deadline
        time.sleep(0.1)

    # What had been said is kept, and the next question goes on from there.
    ask(slow_page, "And now?")
    expect(answers(slow_page).nth(1)).to_contain_text("word9 ")
    slow_page.get_by_role("button", name="Stop").click()
    expect(answers(slow_page).nth(1)).to_contain_text("Stopped.")


def test_a_new_chat_ends_the_answer_and_forgets(slow_page: Page) -> None:
    ask(slow_page, LONG)
    expect(answers(slow_page)).to_contain_text("word3 ")
    slow_page.get_by_role("button", name="New chat").click()
    expect(answers(slow_page)).to_have_count(0)
    expect(slow_page.get_by_role("button", name="Send")).to_be_visible()
    ask(slow_page, "Short")
    expect(answers(slow_page)).to_contain_text(re.compile(r"Speed[\d.]+ tokens/s"))
    assert "word3" not in answers(slow_page).inner_text()


def test_a_refusal_is_shown_and_the_question_put_back(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(encoded(noise(64, 64), "png")[:200])
    page.get_by_label("Attach pictures, clips or sounds").set_input_files(broken)
    ask(page, "What is it?")
    refusal = answers(page).get_by_role("alert")
    expect(refusal).to_contain_text("messages[0].content[0].image_url.url: ")
    expect(refusal).to_contain_text("(media_unreadable)")
    expect(page.get_by_role("textbox", name="Question")).to_have_value("What is it?")
    page.get_by_role("button", name="Remove broken.png").click()
    ask(page, "And without it?")
    expect(answers(page).nth(1)).to_contain_text("And without it?")
    expect(answers(page).nth(1)).to_contain_text("First token")


def test_a_server_that_is_gone_is_told(browser: Browser, echo_server: Server) -> None:
    with before(echo_server) as gateway, watched(browser, gateway.url) as page:
        expect(page.get_by_label("Model")).to_be_enabled()
        gateway.stop()
        ask(page, "Hello")
        expect(answers(page).get_by_role("alert")).to_contain_text("the server does not answer")


def test_files_are_dropped(page: Page, picture: Path) -> None:
    drop(page, "a.png", "image/png", picture.read_bytes())
    drop(page, "b.mp4", "video/mp4")
    drop(page, "c.flac", "")
    drop(page, "d.txt", "text/plain")
    attached = page.get_by_role("list", name="Attached").get_by_role("listitem")
    expect(attached).to_have_text(["a.png×", "b.mp4×", "c.flac×"])
    expect(page.get_by_role("alert")).to_have_text("d.txt is no picture, clip or sound")
    for name in ("b.mp4", "c.flac"):
        page.get_by_role("button", name=f"Remove {name}").click()
    ask(page, "")
    expect(answers(page)).to_contain_text("image 0: ")


# Models, keys and settings.


def test_models_are_chosen_by_engine_and_name(page: Page) -> None:
    select = page.get_by_label("Model")
    expect(select).to_be_enabled()
    assert select.locator("optgroup").get_attribute("label") == "echo"
    assert select.locator("option").all_inner_texts() == ["chat_echo", "tiny"]
    select.select_option("tiny")
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "Hello")
    assert sent.value.post_data_json["model"] == "tiny"


def test_a_key_is_asked_for(browser: Browser, echo_server: Server) -> None:
    with (
        before(echo_server, keys=ApiKeys([KEY])) as gateway,
        watched(browser, gateway.url) as page,
    ):
        field = page.get_by_label("API key")
        expect(page.get_by_role("alert")).to_contain_text("an API key is needed")
        expect(field).to_be_focused()
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(field).to_be_hidden()
        ask(page, "Hello")
        expect(answers(page)).to_contain_text("First token")
        page.reload()
        expect(page.get_by_label("Model")).to_be_enabled()  # kept with the tab


def test_settings_go_with_the_question(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Tokens at most").fill("2")
    page.keyboard.press("Enter")
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "Hello")
    body = sent.value.post_data_json
    assert (body["temperature"], body["max_tokens"]) == (0.5, 2)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(answers(page)).to_contain_text("Cut off at the limit of tokens.")


# For everybody: keyboard, screen reader, colours, sizes.


def test_the_keyboard_reaches_everything(page: Page, picture: Path) -> None:
    expect(page.get_by_label("Model")).to_be_enabled()
    page.get_by_label("Attach pictures, clips or sounds").set_input_files(picture)
    question = page.get_by_role("textbox", name="Question")
    question.fill("one")
    page.keyboard.press("Shift+Enter")
    expect(question).to_have_value("one\n")
    page.get_by_role("link", name="Skip to the question").focus()
    reached = []
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.title"
                                     " || document.activeElement.ariaLabel"
                                     " || document.activeElement.textContent"))  # fmt: skip
    assert reached[:8] == [
        *("model", "new", "Settings", "theme", "log", "Remove noise.png", "files", "question")
    ]
    assert reached[8] == "send"


def test_a_screen_reader_hears_the_answer_once(page: Page) -> None:
    ask(page, "Say it back")
    expect(page.get_by_role("status")).to_contain_text("Say it back")
    expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "off")
    expect(page.get_by_role("status")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_can_be_read(
    browser: Browser, gateway: Gateway, scheme: str, size: dict, picture: Path
) -> None:
    with watched(browser, gateway.url, viewport=size, color_scheme=scheme) as page:
        page.get_by_label("Attach pictures, clips or sounds").set_input_files(picture)
        ask(page, "x" * 300)
        expect(answers(page)).to_contain_text("First token")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert page.evaluate("document.getElementById('log').scrollWidth") <= size["width"]
        for selector in (".answer .text", ".stats dt", ".stats dd", ".legend", "#send", "#new"):
            assert contrast(page, selector) >= 4.5, selector  # WCAG 2.2, 1.4.3
        ink, paper = colours(page, "body")
        assert (luminance(paper) > luminance(ink)) is (scheme == "light")


def test_the_colours_can_be_chosen(browser: Browser, gateway: Gateway) -> None:
    with watched(browser, gateway.url, color_scheme="light") as page:
        button = page.get_by_role("button", name="Colours")
        seen = []
        for name in ("light", "dark", "system"):
            button.click()
            expect(button).to_have_accessible_name(f"Colours: {name}")
            seen.append(luminance(colours(page, "body")[1]) > 0.5)
        assert seen == [True, False, True]
        button.click()
        button.click()
        page.reload()
        expect(button).to_have_accessible_name("Colours: dark")


def colours(page: Page, selector: str) -> list[list[float]]:
    """Of an element: its text's, and the first that is opaque behind it. sRGB, 0 to 1."""
    return page.eval_on_selector(
        selector,
        """(element) => {
            const paint = (colour) => {
                const context = new OffscreenCanvas(1, 1).getContext("2d");
                context.fillStyle = colour;
                context.fillRect(0, 0, 1, 1);
                return [...context.getImageData(0, 0, 1, 1).data].map((one) => one / 255);
            };
            const ink = paint(getComputedStyle(element).color);
            const ground = (one) => paint(getComputedStyle(one).backgroundColor);
            let behind = element;
            while (ground(behind)[3] < 1) behind = behind.parentElement;
            return [ink, ground(behind)];
        }""",
    )


def luminance(colour: list[float]) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Page, selector: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    dark, light = sorted(luminance(colour) for colour in colours(page, selector))
    return (light + 0.05) / (dark + 0.05)
