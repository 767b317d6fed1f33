"""Who may be asked for media: schemes, hosts, addresses and files.

An address is judged as the number it is, never as the text that a caller wrote, and a file by
where the kernel says the opened file lies, so neither spelling nor timing wins.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import unquote_to_bytes, urlsplit

import httpx

from triptych.errors import ConfigurationError, MediaForbidden, MediaTooLarge, MediaUnreadable
from triptych.settings import MediaSettings

Address = IPv4Address | IPv6Address

_HOST = re.compile(r"[a-z0-9._:-]{1,253}")
MAX_URL = 8192
"""Characters of an http(s) or file URL."""

_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
"""IANA's special-purpose registries (RFC 6890 and later), plus multicast and class E. Teredo and
6to4 are in it because they carry an IPv4 address to a relay that nobody has checked."""
_GLOBAL_UNICAST = ip_network("2000::/3")
_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
"""RFC 6052, RFC 8215: the last four bytes are the IPv4 address that is reached."""
_METADATA = frozenset(
    ip_address(address)
    for address in (
        *("169.254.169.254", "169.254.170.2", "169.254.169.123", "100.100.100.200"),
        *("192.0.0.192", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254"),
    )
)
"""Where clouds (AWS, GCP, Azure, Oracle, Alibaba) hand credentials to whoever asks."""


def effective(address: str | Address) -> Address:
    """The address that packets reach: zones cut off, mapped and NAT64 forms unwrapped."""
    found = ip_address(address.partition("%")[0] if isinstance(address, str) else address)
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped:
            return found.ipv4_mapped
        if int(found) >> 32 == 0 and int(found) > 1:
            return IPv4Address(int(found))  # IPv4-compatible, RFC 4291 2.5.5.1
        if any(found in network for network in _NAT64):
            return IPv4Address(int(found) & 0xFFFFFFFF)
    return found


def is_metadata(address: Address) -> bool:
    """Whether a cloud answers there with the machine's own secrets."""
    return address in _METADATA


def is_public(address: Address) -> bool:
    """Whether ``address``, made by `effective`, belongs to the public internet."""
    if is_metadata(address) or any(address in network for network in _NOT_PUBLIC):
        return False
    return isinstance(address, IPv4Address) or address in _GLOBAL_UNICAST


class Policy:
    """What the settings let a caller name.

    Raises:
        ConfigurationError: ``allowed_local_media_path`` is not a directory.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._domains = frozenset(_host(name) for name in settings.allowed_media_domains)
        self._private = frozenset(_host(name) for name in settings.allow_private_media_hosts)
        self._configured = settings.allowed_local_media_path
        self._root = os.path.realpath(self._configured) if self._configured else ""
        if self._root and not os.path.isdir(self._root):
            raise ConfigurationError(
                f"allowed_local_media_path must be a directory, got {self._configured!r}"
            )

    def check_url(self, text: str) -> httpx.URL:
        """An http or https URL that may be asked, apart from what its name resolves to.

        Raises:
            MediaForbidden: Another scheme, credentials in the URL, or a host that is not allowed.
            MediaUnreadable: Not a URL.
        """
        if len(text) > MAX_URL:
            raise MediaUnreadable(f"the URL has {len(text)} characters, over the limit {MAX_URL}")
        try:
            url = httpx.URL(text)
            host = _host(url.raw_host.decode("ascii"))
        except (httpx.InvalidURL, ValueError) as error:
            raise MediaUnreadable(f"not a URL: {error}") from None
        if url.scheme not in ("http", "https"):
            raise MediaForbidden(f"media is fetched by http and https, got {url.scheme!r}")
        if not _HOST.fullmatch(host) or (url.port is not None and not 0 < url.port < 65_536):
            raise MediaUnreadable(f"the URL has no proper host and port: {text[:100]!r}")
        if url.userinfo:
            raise MediaForbidden("a media URL must not hold a user name or password")
        if self._domains and not _listed(host, self._domains):
            raise MediaForbidden(f"the host {host!r} is not in allowed_media_domains")
        return url

    def check_addresses(self, host: str, addresses: Sequence[str]) -> None:
        """Judge all that ``host`` resolved to; one address that is refused refuses the host.

        Raises:
            MediaForbidden: An address is not public, and the host is not listed as private.
        """
        for text in addresses:
            address = effective(text)
            if is_public(address) or str(address) in self._private:
                continue
            if _listed(_host(host), self._private) and not is_metadata(address):
                continue
            raise MediaForbidden(
                f"the host {host!r} leads to an address that is not public; "
                "allow_private_media_hosts can allow it"
            )

    @contextmanager
    def open_file(self, url: str, *, max_bytes: int) -> Iterator[int]:
        """The file that a ``file:`` URL names, as a descriptor to read from.

        The path is opened without effect (O_PATH), the kernel tells where that file lies, and
        the very same file is then opened for reading: what a symlink or a rename does between
        check and open cannot matter.

        Raises:
            MediaForbidden: Not under ``allowed_local_media_path``, or not a regular file.
            MediaUnreadable: There is no such file, or it cannot be read.
            MediaTooLarge: More than ``max_bytes``.
        """
        path = self._local_path(url)
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise MediaUnreadable(f"the file cannot be opened: {_errno(error)}") from None
        try:
            link = f"/proc/self/fd/{handle}"
            status = os.fstat(handle)
            if not _inside(os.readlink(link), self._root):
                raise MediaForbidden("the file lies outside allowed_local_media_path")
            if not stat.S_ISREG(status.st_mode):
                raise MediaForbidden("only regular files are served")
            if status.st_size > max_bytes:
                raise MediaTooLarge(
                    f"the file holds {status.st_size} bytes, over the limit of {max_bytes}"
                )
            try:
                readable = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise MediaUnreadable(f"the file cannot be read: {_errno(error)}") from None
        finally:
            os.close(handle)
        try:
            yield readable
        finally:
            os.close(readable)

    def _local_path(self, url: str) -> str:
        """The path in a ``file:`` URL; whether it exists is not told before it is allowed."""
        if not self._root:
            raise MediaForbidden("local files are not served; allowed_local_media_path is not set")
        if len(url) > MAX_URL:
            raise MediaUnreadable(f"the URL has {len(url)} characters, over the limit {MAX_URL}")
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise MediaUnreadable(f"not a URL: {error}") from None
        if parts.netloc not in ("", "localhost"):
            raise MediaForbidden("a file URL must not name another host")
        path = os.fsdecode(unquote_to_bytes(parts.path))
        if not path.startswith("/") or "\0" in path or parts.query or parts.fragment:
            raise MediaUnreadable("a file URL must hold one absolute path and nothing else")
        plain = os.path.normpath(path)
        if not any(
            _inside(plain, root) for root in (self._root, os.path.abspath(self._configured))
        ):
            raise MediaForbidden("the file lies outside allowed_local_media_path")
        return path


def _host(name: str) -> str:
    """A host as it is compared: lower case, no final dot, no brackets."""
    return name.strip().lower().rstrip(".").removeprefix("[").removesuffix("]")


def _listed(host: str, names: frozenset[str]) -> bool:
    """Whether ``host`` is in the list itself or under a name that starts with ``*.``."""
    if host in names:
        return True
    parts = host.split(".")
    return any("*." + ".".join(parts[start:]) in names for start in range(1, len(parts)))


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _errno(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or "bad path"
