"""What the playground may do in a browser, and when it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser

import httpx

from triptych.gateway import Gateway, GatewayOptions
from triptych.gateway.routes import playground


@contextmanager
def serving(**options: bool) -> Iterator[httpx.Client]:
    """A gateway before no server, which the page does not need."""
    with (
        Gateway(GatewayOptions(port=0, **options)) as gateway,
        httpx.Client(base_url=gateway.url, trust_env=False) as http,
    ):
        yield http


class Inline(HTMLParser):
    """Finds what a strict policy would block, and what is not from here."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        bad = [name for name in names if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in names):
            bad.append(tag)
        bad += [url for name in ("src", "href") if (url := names.get(name) or "").count("//")]
        self.found += bad


def test_nothing_is_inline_or_from_elsewhere() -> None:
    reader = Inline()
    reader.feed((playground.FILES / "index.html").read_text())
    assert reader.found == []
    for file in playground.FILES.iterdir():
        outside = set(re.findall(r"https?://[^\s\"')]+", file.read_text()))
        assert outside <= {"http://www.w3.org/2000/svg"}, file.name


def test_the_policy_goes_with_every_file() -> None:
    with serving() as http:
        for file in playground.FILES.iterdir():
            answer = http.get(f"/playground/{file.name}")
            assert answer.content == file.read_bytes()
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            tag = {"if-none-match": answer.headers["etag"]}
            assert http.get(f"/playground/{file.name}", headers=tag).status_code == 304
        assert http.get("/").headers["location"] == "/playground/"
        for name in ("nothing.js", "..%2f__init__.py", "%2e%2e/app.py"):
            assert http.get(f"/playground/{name}").status_code == 404


def test_it_can_be_left_out() -> None:
    with serving(playground=False) as http:
        for path in ("/", "/playground", "/playground/", "/playground/app.js"):
            assert http.get(path).status_code == 404
