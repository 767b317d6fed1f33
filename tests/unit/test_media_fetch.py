from __future__ import annotations

import asyncio
import ssl
import time

import httpx
import pytest

from media_files import jpeg, settings
from media_planner import FilePlanner
from media_server import certificates, serving
from triptych.errors import (
    ConfigurationError,
    MediaForbidden,
    MediaTimeout,
    MediaTooLarge,
    MediaType,
    MediaUnreachable,
    MediaUnreadable,
)
from triptych.media import MediaLoader
from triptych.media.fetch import Fetcher
from triptych.media.policy import Policy

PICTURE = jpeg()
PRIVATE = {"allow_private_media_hosts": ("127.0.0.1", "media.test")}
TRUST = ssl.create_default_context()
"""Made once, since reading every authority's certificate takes 40 ms."""
TYPES = {"types": ("image/",), "max_bytes": 100_000, "timeout_s": 5.0}


class Names:
    """A resolver of the test's own; a list answers each question with its next entry."""

    def __init__(self, **hosts):
        self.hosts = {name.replace("_", "."): list(answers) for name, answers in hosts.items()}
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append(host)
        if host not in self.hosts:
            return [host]
        answers = self.hosts[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
async def server():
    async with serving() as server:
        server.route("/picture", PICTURE)
        yield server


@pytest.fixture
async def fetch(server):
    fetchers = []

    async def fetch(path, *, host="127.0.0.1", names=None, limits=None, **options):
        values = {**PRIVATE, **(limits or {})}
        policy = Policy(settings(**values))
        resolver = names or Names(**{"media.test".replace(".", "_"): [["127.0.0.1"]]})
        fetcher = Fetcher(settings(**values), policy, resolve=resolver, ssl_context=TRUST)
        fetchers.append(fetcher)
        url = path if "://" in path else f"http://{host}:{server.port}{path}"
        return await fetcher.fetch(url, **{**TYPES, **options})

    yield fetch
    for fetcher in fetchers:
        await fetcher.close()


async def test_a_picture(fetch, server):
    got = await fetch("/picture", host="media.test")
    assert got.data == PICTURE
    assert server.hosts == [f"media.test:{server.port}"]


async def test_the_name_is_resolved_once_for_a_connection(fetch, server):
    names = Names(rebind_test=[["127.0.0.1"], ["10.0.0.1"]])
    assert (await fetch("/picture", host="rebind.test", names=names)).data == PICTURE
    assert names.asked == ["rebind.test"]


async def test_rebinding_finds_nobody(fetch, server):
    names = Names(rebind_test=[["93.184.215.14"], ["127.0.0.1"]])
    limits = {"allow_private_media_hosts": (), "connect_timeout_s": 0.2}
    with pytest.raises((MediaForbidden, MediaUnreachable, MediaTimeout)):
        await fetch("/picture", host="rebind.test", names=names, limits=limits, timeout_s=2.0)
    assert not server.hits


async def test_one_bad_address_refuses_the_host(fetch, server):
    names = Names(mixed_test=[["93.184.215.14", "127.0.0.1"]])
    with pytest.raises(MediaForbidden, match=r"mixed\.test"):
        await fetch(
            "/picture", host="mixed.test", names=names, limits={"allow_private_media_hosts": ()}
        )
    assert not server.hits


REDIRECTED = [
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:127.0.0.2]/",
    "http://inner.test/",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
    "http://user:secret@127.0.0.1/",
]


@pytest.mark.parametrize("target", REDIRECTED)
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Again", "308 Moved"])
async def test_redirects_are_checked_anew(fetch, server, target, status):
    server.route("/away", status=status, location=target)
    names = Names(inner_test=[["192.168.1.1"]])
    with pytest.raises(MediaForbidden):
        await fetch("/away", names=names)


async def test_redirects_are_counted(fetch, server):
    for step in range(5):
        server.route(f"/{step}", status="302 Found", location=f"/{step + 1}")
    server.route("/3", PICTURE)
    assert (await fetch("/0")).data == PICTURE
    server.route("/3", status="302 Found", location="/4")
    with pytest.raises(MediaUnreachable, match="more than 3 redirects"):
        await fetch("/0")
    server.route("/loop", status="302 Found", location="/loop")
    with pytest.raises(MediaUnreachable, match="redirects"):
        await fetch("/loop")
    server.route("/nowhere", status="302 Found")
    with pytest.raises(MediaUnreachable, match="no URL"):
        await fetch("/nowhere")


async def test_domains(fetch):
    limits = {"allowed_media_domains": ("good.test", "*.cdn.test")}
    with pytest.raises(MediaForbidden, match="allowed_media_domains"):
        await fetch("/picture", limits=limits)


async def test_a_body_without_end_is_cut(fetch, server):
    async def endless(request):
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
        while True:
            await request.send(bytes(10_000))

    server.routes["/endless"] = endless
    with pytest.raises(MediaTooLarge, match="100000"):
        await fetch("/endless")


async def test_a_length_over_the_limit_is_refused_unread(fetch, server):
    server.route("/long", b"x", content_length="999999999999")
    with pytest.raises(MediaTooLarge):
        await fetch("/long")


async def test_a_body_shorter_than_its_length(fetch, server):
    async def short(request):
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\nabc")
        raise ConnectionError

    server.routes["/short"] = short
    with pytest.raises(MediaUnreachable, match="broke off"):
        await fetch("/short")


async def test_the_deadline_is_total(fetch, server):
    async def drip(request):
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
        while True:
            await request.send(b"x")
            await asyncio.sleep(0.05)

    async def mute(request):
        await asyncio.sleep(60)

    server.routes["/drip"], server.routes["/mute"] = drip, mute
    for path in ("/drip", "/mute"):
        start = time.monotonic()
        with pytest.raises(MediaTimeout, match=r"0\.4 s"):
            await fetch(path, timeout_s=0.4)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("kind", ["text/html", "application/json", "video/mp4", "image"])
async def test_content_types(fetch, server, kind):
    server.route("/typed", PICTURE, content_type=kind)
    with pytest.raises(MediaType, match=kind):
        await fetch("/typed")


@pytest.mark.parametrize("kind", ["IMAGE/PNG; charset=x", "application/octet-stream", ""])
async def test_believed_content_types(fetch, server, kind):
    server.route("/typed", PICTURE, content_type=kind)
    assert (await fetch("/typed")).data == PICTURE


async def test_compression_that_nobody_asked_for(fetch, server):
    server.route("/gzip", b"\x1f\x8b", content_encoding="gzip")
    with pytest.raises(MediaUnreachable, match="compresses"):
        await fetch("/gzip")


@pytest.mark.parametrize("status", ["400 Bad", "401 No", "404 None", "418 Teapot", "500 Oops"])
async def test_other_statuses(fetch, server, status):
    server.route("/status", status=status)
    with pytest.raises(MediaUnreachable, match=status[:3]):
        await fetch("/status")
    assert server.hits["/status"] == 1


@pytest.mark.parametrize("status", ["502 Bad", "503 Busy", "504 Late"])
async def test_gateways_are_asked_twice(fetch, server, status):
    async def once(request):
        await request.answer(PICTURE, "200 OK" if server.hits["/flaky"] > 1 else status)

    server.routes["/flaky"] = once
    assert (await fetch("/flaky")).data == PICTURE
    server.route("/down", status=status)
    with pytest.raises(MediaUnreachable, match=status[:3]):
        await fetch("/down")
    assert server.hits["/down"] == 2


async def test_a_connection_that_breaks_is_tried_twice(fetch, server):
    async def once(request):
        if server.hits["/flaky"] == 1:
            raise ConnectionError
        await request.answer(PICTURE)

    server.routes["/flaky"] = once
    assert (await fetch("/flaky")).data == PICTURE


async def test_nobody_listens(fetch):
    with pytest.raises(MediaUnreachable, match="cannot be connected"):
        await fetch("http://127.0.0.1:1/x")


async def test_no_such_name(fetch):
    async def none(host, port):
        raise OSError("no such host")

    with pytest.raises(MediaUnreachable, match="no address"):
        await fetch("http://none.test/x", names=none)


async def test_what_is_not_http(fetch, server):
    async def rubbish(request):
        await request.send(b"\x00\x01\x02 what\r\n\r\n")

    server.routes["/rubbish"] = rubbish
    with pytest.raises(MediaUnreachable):
        await fetch("/rubbish")


async def test_environment_proxies_are_not_trusted(fetch, server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert (await fetch("/picture")).data == PICTURE


async def test_a_proxy_that_is_set_is_used(fetch, server):
    server.route("http://media.example/picture", PICTURE)
    limits = {"media_proxy": f"http://127.0.0.1:{server.port}"}
    assert (await fetch("http://media.example/picture", limits=limits)).data == PICTURE


@pytest.mark.parametrize("proxy", ["socks://x", "http://[::1", "nonsense"])
async def test_a_proxy_that_is_none(fetch, proxy):
    with pytest.raises(ConfigurationError, match="media_proxy"):
        await fetch("/picture", limits={"media_proxy": proxy})


async def test_tls_proves_the_name():
    ours, theirs = certificates("media.test")
    names = Names(media_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
    limits = settings(allow_private_media_hosts=("media.test", "other.test"))
    async with serving(ours) as server:
        server.route("/picture", PICTURE)
        fetcher = Fetcher(limits, Policy(limits), resolve=names, ssl_context=theirs)
        got = await fetcher.fetch(f"https://media.test:{server.port}/picture", **TYPES)
        assert got.data == PICTURE
        with pytest.raises(MediaUnreachable, match="certificate"):
            await fetcher.fetch(f"https://other.test:{server.port}/picture", **TYPES)
        await fetcher.close()
        unknown = Fetcher(limits, Policy(limits), resolve=names)
        with pytest.raises(MediaUnreachable, match="certificate"):
            await unknown.fetch(f"https://media.test:{server.port}/picture", **TYPES)
        await unknown.close()


async def test_a_cancelled_fetch_hangs_up(fetch, server):
    started = asyncio.Event()

    async def slow(request):
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
        started.set()
        while True:
            await request.send(bytes(100))
            await asyncio.sleep(0.01)

    server.routes["/slow"] = slow
    task = asyncio.create_task(fetch("/slow"))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if server.gone["/slow"]:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the connection stayed open")


@pytest.fixture
async def loader(server):
    limits = settings(**PRIVATE)
    loader = MediaLoader(limits, FilePlanner())
    yield loader
    await loader.close()


def url(server, path):
    return f"http://127.0.0.1:{server.port}{path}"


async def test_the_same_url_is_fetched_and_decoded_once(loader, server):
    async def slow(request):
        await asyncio.sleep(0.1)
        await request.answer(PICTURE, cache_control="max-age=60")

    server.routes["/slow"] = slow
    got = await asyncio.gather(
        *(loader.load("image", url(server, "/slow"), where=f"[{n}]") for n in range(5))
    )
    assert server.hits["/slow"] == 1
    assert len({loaded.hash for loaded in got}) == 1
    assert loader.counters.misses == 1
    assert loader.counters.joined >= 4
    await loader.load("image", url(server, "/slow"), where="again")
    assert server.hits["/slow"] == 1
    assert loader.counters.hits == 1


async def test_validators_spare_the_body(loader, server):
    async def tagged(request):
        if request.headers.get("if-none-match") == '"one"':
            await request.answer(status="304 Same")
        else:
            await request.answer(PICTURE, etag='"one"')

    server.routes["/tagged"] = tagged
    first = await loader.load("image", url(server, "/tagged"), where="x")
    second = await loader.load("image", url(server, "/tagged"), where="x")
    assert server.hits["/tagged"] == 2
    assert loader.counters.revalidated == 1
    assert loader.counters.fetched_bytes == len(PICTURE)
    assert second.hash == first.hash


@pytest.mark.parametrize("control", ["no-store", "private", "no-cache", "max-age=0"])
async def test_origins_that_want_to_be_asked_are_asked(loader, server, control):
    server.route("/control", PICTURE, cache_control=control)
    for _ in range(2):
        await loader.load("image", url(server, "/control"), where="x")
    assert server.hits["/control"] == 2
    assert loader.counters.misses == (2 if control in ("no-store", "private") else 1)


async def test_the_case_of_a_path_matters(loader, server):
    server.route("/A", jpeg(seed=1), cache_control="max-age=60")
    server.route("/a", jpeg(seed=2), cache_control="max-age=60")
    upper = await loader.load("image", url(server, "/A"), where="x")
    lower = await loader.load("image", url(server, "/a"), where="x")
    assert upper.hash != lower.hash


async def test_a_name_of_the_callers_spares_asking_but_never_lies(loader, server):
    from triptych.media import MediaOptions

    named = MediaOptions(uuid="mine")
    server.route("/one", jpeg(seed=1), etag='"1"')
    server.route("/two", jpeg(seed=2), etag='"2"')
    one = await loader.load("image", url(server, "/one"), where="x", options=named)
    again = await loader.load("image", url(server, "/one"), where="x", options=named)
    assert again.hash == one.hash
    assert server.hits["/one"] == 1
    two = await loader.load("image", url(server, "/two"), where="x", options=named)
    assert two.hash != one.hash
    await loader.load("image", url(server, "/one"), where="x")
    assert server.hits["/one"] == 2


async def test_nothing_changed_though_nobody_asked(loader, server):
    server.route("/same", status="304 Same")
    with pytest.raises(MediaUnreachable, match="not asked"):
        await loader.load("image", url(server, "/same"), where="x")


async def test_one_of_two_may_leave(loader, server):
    async def slow(request):
        await asyncio.sleep(0.2)
        await request.answer(PICTURE)

    server.routes["/slow"] = slow
    stays, leaves = (
        asyncio.create_task(loader.load("image", url(server, "/slow"), where="x")) for _ in "12"
    )
    await asyncio.sleep(0.05)
    leaves.cancel()
    assert (await stays).tokens == 7
    assert server.hits["/slow"] == 1


async def test_an_html_page_called_a_picture(loader, server):
    server.route("/page", b"<!DOCTYPE html><html></html>")
    with pytest.raises(MediaType, match="HTML"):
        await loader.load("image", url(server, "/page"), where="x")


async def test_an_error_names_its_own_place(loader, server):
    server.route("/bad", PICTURE[:100])
    results = await asyncio.gather(
        *(loader.load("image", url(server, "/bad"), where=f"p[{n}]") for n in range(3)),
        return_exceptions=True,
    )
    assert [error.where for error in results] == ["p[0]", "p[1]", "p[2]"]
    assert all(isinstance(error, MediaUnreadable) for error in results)


def test_httpx_has_an_error_for_each_of_httpcores():
    import httpcore

    for name in ("ConnectError", "ReadError", "ConnectTimeout", "RemoteProtocolError"):
        assert hasattr(httpcore, name)
        assert issubclass(getattr(httpx, name), httpx.TransportError)
