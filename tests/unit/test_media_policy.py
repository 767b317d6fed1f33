from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from media_files import settings
from triptych.errors import (
    ConfigurationError,
    MediaError,
    MediaForbidden,
    MediaTooLarge,
    MediaUnreadable,
)
from triptych.media.policy import Policy, effective, is_public

REFUSED = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255"),
    *("127.0.0.1", "127.255.255.254", "169.254.0.1", "169.254.169.254", "172.16.0.1"),
    *("172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
    *("255.255.255.255", "100.100.100.200", "168.63.129.16", "169.254.170.2"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fd20:ce::254"),
    *("ff02::1", "2001:db8::1", "2001::1", "2002:7f00:1::", "3fff::1", "100::1", "5f00::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::10.0.0.1", "fec0::1"),
]
PUBLIC = [
    *("1.1.1.1", "8.8.8.8", "93.184.215.14", "100.63.255.255", "100.128.0.0", "172.15.255.255"),
    *("172.32.0.0", "192.0.1.0", "198.17.255.255", "198.20.0.0", "223.255.255.255"),
    *("2606:4700:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808"),
]


@pytest.mark.parametrize("address", REFUSED)
def test_not_public(address):
    assert not is_public(effective(address))
    with pytest.raises(MediaForbidden, match=r"a\.test"):
        Policy(settings()).check_addresses("a.test", ["8.8.8.8", address])


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address):
    assert is_public(effective(address))
    Policy(settings()).check_addresses("a.test", [address])


@given(st.ip_addresses(v=4))
def test_an_address_is_the_same_in_every_form(address):
    expected = is_public(address)
    number = int(address)
    assert is_public(effective(f"::ffff:{address}")) == expected
    assert is_public(effective(f"64:ff9b::{number >> 16:x}:{number & 0xFFFF:x}")) == expected


SPELLINGS = ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "017700000001"]


@pytest.mark.parametrize("host", SPELLINGS)
def test_a_spelling_is_what_the_resolver_makes_of_it(host):
    found = {entry[4][0] for entry in socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)}
    with pytest.raises(MediaForbidden):
        Policy(settings()).check_addresses(host, sorted(found))


def test_private_hosts_that_are_listed():
    policy = Policy(settings(allow_private_media_hosts=("Store.Internal.", "10.1.2.3", "*.lan")))
    policy.check_addresses("store.internal", ["10.0.0.1", "fd00::1"])
    policy.check_addresses("whatever.test", ["10.1.2.3", "::ffff:10.1.2.3"])
    policy.check_addresses("nas.lan", ["192.168.0.2"])
    for host, address in (("lan", "10.0.0.1"), ("xstore.internal", "10.0.0.1")):
        with pytest.raises(MediaForbidden):
            policy.check_addresses(host, [address])
    with pytest.raises(MediaForbidden):
        policy.check_addresses("store.internal", ["169.254.169.254"])


def test_domains():
    policy = Policy(settings(allowed_media_domains=("Good.Test", "*.cdn.test")))
    for url in ("http://good.test/x", "https://GOOD.test.:8443/", "http://a.b.cdn.test"):
        policy.check_url(url)
    for url in ("http://bad.test", "http://xgood.test", "http://good.test.evil", "http://cdn.test"):
        with pytest.raises(MediaForbidden, match="allowed_media_domains"):
            policy.check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://a.test/x", "gopher://a.test", "javascript:alert(1)", "http://", "//a.test/x"),
        *("http://user@a.test/", "http://user:word@a.test/", "http:///x", "http://a.test:99999/"),
        *("http://[::1", "http://a b/", "http://a.test/" + "x" * 9000, "http://\x00/", "file:x"),
    ],
)
def test_urls_that_are_refused(url):
    with pytest.raises((MediaForbidden, MediaUnreadable)):
        Policy(settings()).check_url(url)


@given(st.text(max_size=60))
def test_no_text_breaks_the_policy(text):
    policy = Policy(settings())
    for url in (text, "http://" + text, "file://" + text):
        for check in (policy.check_url, policy._local_path):
            with suppress(MediaError):
                check(url)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "media"
    (folder / "inner").mkdir(parents=True)
    (folder / "a b.txt").write_bytes(b"content")
    (folder / "inner" / "deep.txt").write_bytes(b"deep")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "media-other").mkdir()
    (tmp_path / "media-other" / "x").write_bytes(b"x")
    return folder


def read(root, url, max_bytes=100):
    policy = Policy(settings(allowed_local_media_path=str(root)))
    with policy.open_file(url, max_bytes=max_bytes) as handle:
        return os.read(handle, 100)


def test_files_under_the_path(root):
    assert read(root, f"file://{root}/a%20b.txt") == b"content"
    assert read(root, f"file://localhost{root}/inner/../inner/deep.txt") == b"deep"
    assert read(root, f"FILE:{root}/inner/deep.txt".replace("FILE", "file")) == b"deep"


def test_links_count_by_where_they_lead(root):
    (root / "good").symlink_to(root / "inner" / "deep.txt")
    (root / "bad").symlink_to(root.parent / "secret.txt")
    (root / "worse").symlink_to("/")
    assert read(root, f"file://{root}/good") == b"deep"
    for path in ("bad", f"worse{root.parent}/secret.txt", "worse/etc/passwd"):
        with pytest.raises(MediaForbidden):
            read(root, f"file://{root}/{path}")


def test_the_path_itself_may_be_a_link(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    assert read(link, f"file://{link}/inner/deep.txt") == b"deep"
    assert read(link, f"file://{root}/inner/deep.txt") == b"deep"


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.txt", "%2e%2e/secret.txt", "inner/../../secret.txt", "../media-other/x"),
        *("../../../../etc/passwd", "../does-not-exist"),
    ],
)
def test_paths_that_climb_out(root, path):
    with pytest.raises(MediaForbidden):
        read(root, f"file://{root}/{path}")


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/dev/zero", "/nowhere"])
def test_elsewhere_nothing_is_told(root, path):
    with pytest.raises(MediaForbidden, match="outside"):
        read(root, f"file://{path}")


def test_only_regular_files(root):
    os.mkfifo(root / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root / "socket"))
    for name in ("fifo", "socket", "inner", ""):
        with pytest.raises(MediaForbidden, match="regular"):
            read(root, f"file://{root}/{name}")
    listener.close()


def test_a_swap_between_check_and_open_cannot_win(root, monkeypatch):
    target = root / "a b.txt"
    readlink = os.readlink

    def swap(path):
        found = readlink(path)
        target.unlink()
        target.symlink_to(root.parent / "secret.txt")
        return found

    monkeypatch.setattr(os, "readlink", swap)
    assert read(root, f"file://{root}/a%20b.txt") == b"content"


def test_sizes(root):
    with pytest.raises(MediaTooLarge, match="7 bytes, over the limit of 6"):
        read(root, f"file://{root}/a%20b.txt", max_bytes=6)


@pytest.mark.parametrize("url", ["file://host/x", "file:relative", "file:///x%00y", "file://["])
def test_urls_that_are_no_files(root, url):
    with pytest.raises((MediaForbidden, MediaUnreadable)):
        read(root, url)


def test_off_by_default():
    with (
        pytest.raises(MediaForbidden, match="not set"),
        Policy(settings()).open_file("file:///etc/passwd", max_bytes=1),
    ):
        pass


def test_the_path_must_be_a_directory(tmp_path):
    with pytest.raises(ConfigurationError, match="directory"):
        Policy(settings(allowed_local_media_path=str(tmp_path / "none")))
