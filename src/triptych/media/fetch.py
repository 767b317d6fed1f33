"""http and https: one client, checked addresses, counted bytes, one deadline.

httpx has no place to check an address between resolving and connecting, its connection pool
(httpcore) has: the network backend. `CheckedBackend` resolves a name once, judges every address and
connects to one of those, so a second answer of the name server has nobody to go to; TLS still
proves the name, and connections are shared by name.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import blake3
import httpcore
import httpx

from triptych.errors import (
    ConfigurationError,
    MediaForbidden,
    MediaTimeout,
    MediaTooLarge,
    MediaType,
    MediaUnreachable,
)
from triptych.media.base import RECEIVED
from triptych.media.policy import Policy
from triptych.settings import MediaSettings

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) to the addresses that it has, as text."""

RETRIED_STATUS = frozenset({502, 503, 504})
RETRY_PAUSE_S = 0.2
KEEPALIVE_S = 15.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"accept-encoding": "identity", "user-agent": "triptych"}
"""Identity, because a decompressor would stand between the bytes and their limit."""
_BINARY = frozenset({"", "application/octet-stream", "binary/octet-stream", "application/binary"})


@dataclass(frozen=True, slots=True)
class Fetched:
    """One answer, whole, or the word that nothing has changed."""

    data: bytes
    hash: str
    """blake3 of ``data``, hex."""
    headers: httpx.Headers
    not_modified: bool = False


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host`` by the system's resolver.

    Raises:
        OSError: It has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that the policy has seen."""

    def __init__(self, policy: Policy, resolve: Resolve = resolve) -> None:
        self._policy = policy
        self._resolve = resolve
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve once, judge, connect to the first address that answers."""
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise MediaUnreachable(f"the host {host!r} has no address") from error
        self._policy.check_addresses(host, addresses)
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return await self._sockets.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Never: no URL of ours leads to one."""
        raise MediaForbidden("media is not fetched from a unix socket")

    async def sleep(self, seconds: float) -> None:
        """As httpcore's own backends do."""
        await asyncio.sleep(seconds)


class CheckedTransport(httpx.AsyncBaseTransport):
    """httpx over an httpcore pool with a `CheckedBackend`, or over a proxy that is trusted."""

    def __init__(
        self,
        backend: httpcore.AsyncNetworkBackend,
        *,
        ssl_context: ssl.SSLContext,
        max_connections: int,
        proxy: str = "",
    ) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=max_connections,
            keepalive_expiry=KEEPALIVE_S,
            proxy=_proxy(proxy) if proxy else None,
            network_backend=None if proxy else backend,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; httpcore's errors come out as httpx's of the same name."""
        with _as_httpx():
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=request.url.raw_scheme,
                        host=request.url.raw_host,
                        port=request.url.port,
                        target=request.url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Stream(response),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._pool.aclose()


def _proxy(url: str) -> httpcore.Proxy:
    try:
        parsed = httpx.Proxy(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigurationError(f"media_proxy is not a proxy's URL: {error}") from None
    return httpcore.Proxy(str(parsed.url), auth=parsed.raw_auth)


class _Stream(httpx.AsyncByteStream):
    """A response body on its way through."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._response.aclose()


@contextmanager
def _as_httpx() -> Iterator[None]:
    """Turn httpcore's exceptions into httpx's, which have the same names."""
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise getattr(httpx, type(error).__name__, httpx.TransportError)(str(error)) from error
    except httpcore.ProxyError as error:
        raise httpx.ProxyError(str(error)) from error


class Fetcher:
    """One HTTP client for the process.

    Args:
        settings: The limits.
        policy: Who may be asked.
        resolve: How names become addresses.
        ssl_context: Whom to trust; the system's and certifi's roots unless given.
    """

    def __init__(
        self,
        settings: MediaSettings,
        policy: Policy,
        *,
        resolve: Resolve = resolve,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._client = httpx.AsyncClient(
            transport=CheckedTransport(
                CheckedBackend(policy, resolve),
                ssl_context=ssl_context or httpx.create_ssl_context(trust_env=False),
                max_connections=settings.max_connections,
                proxy=settings.media_proxy,
            ),
            headers=_HEADERS,
            timeout=httpx.Timeout(settings.connect_timeout_s, read=None, pool=None, write=None),
            follow_redirects=False,
            trust_env=False,
        )

    async def fetch(
        self,
        url: str,
        *,
        types: tuple[str, ...],
        max_bytes: int,
        timeout_s: float,
        validators: dict[str, str] | None = None,
    ) -> Fetched:
        """One medium, by GET.

        Args:
            url: http or https.
            types: Content types that are believed, such as ``image/``; binary is always.
            max_bytes: Of the body.
            timeout_s: For everything: names, redirects, the retry and the body.
            validators: Headers of a conditional request.

        Raises:
            MediaForbidden: The URL, or one that it redirects to, is not allowed.
            MediaUnreachable: No answer, or none that is a medium.
            MediaTimeout: Not done in ``timeout_s``.
            MediaTooLarge: More than ``max_bytes``, by its header or by counting.
            MediaType: Another content type.
        """
        target = self._policy.check_url(url)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(target, types, max_bytes, validators or {})
        except TimeoutError:
            raise MediaTimeout(
                f"{target.host!r} did not give the medium within {timeout_s:g} s"
            ) from None

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def _follow(
        self, url: httpx.URL, types: tuple[str, ...], max_bytes: int, validators: dict[str, str]
    ) -> Fetched:
        limit = self._settings.max_redirects
        for _ in range(limit + 1):
            async with self._get(url, validators) as response:
                if response.status_code not in _REDIRECTS:
                    return await self._read(response, types, max_bytes)
                location = response.headers.get("location", "")
            try:
                joined = str(url.join(location))
            except (httpx.InvalidURL, ValueError):
                joined = ""
            if not location or not joined:
                raise MediaUnreachable(f"{url.host!r} redirects to no URL: {location[:100]!r}")
            url = self._policy.check_url(joined)
        raise MediaUnreachable(f"more than {limit} redirects")

    @asynccontextmanager
    async def _get(
        self, url: httpx.URL, validators: dict[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """One response, its body unread; a second try for a connection or gateway that failed."""
        for last in (False, True):
            request = self._client.build_request("GET", url, headers=validators)
            try:
                response = await self._client.send(request, stream=True)
            except httpx.TransportError as error:
                if last:
                    raise MediaUnreachable(_failure(url, error)) from error
            else:
                if last or response.status_code not in RETRIED_STATUS:
                    break
                await response.aclose()
            await asyncio.sleep(RETRY_PAUSE_S)
        try:
            yield response
        finally:
            await response.aclose()

    async def _read(
        self, response: httpx.Response, types: tuple[str, ...], max_bytes: int
    ) -> Fetched:
        host, status = response.request.url.host, response.status_code
        if status == httpx.codes.NOT_MODIFIED:
            return Fetched(b"", "", response.headers, not_modified=True)
        if status != httpx.codes.OK:
            raise MediaUnreachable(f"{host!r} answered {status}")
        _check_headers(host, response.headers, types, max_bytes)
        data, digest, received = bytearray(), blake3.blake3(), RECEIVED.get()
        try:
            async for part in response.aiter_raw():
                if len(data) + len(part) > max_bytes:
                    raise MediaTooLarge(f"{host!r} sends more than the limit of {max_bytes} bytes")
                data += part
                digest.update(part)
                received(len(part))
        except httpx.TransportError as error:
            raise MediaUnreachable(_failure(response.request.url, error)) from error
        return Fetched(bytes(data), digest.hexdigest(), response.headers)


def _check_headers(
    host: str, headers: httpx.Headers, types: tuple[str, ...], max_bytes: int
) -> None:
    """Refuse by its headers what need not be read."""
    content_type = headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type not in _BINARY and not content_type.startswith(types):
        wanted = " or ".join(f"{prefix}*" if prefix.endswith("/") else prefix for prefix in types)
        raise MediaType(f"{host!r} sends {content_type[:100]!r}, where {wanted} is served")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise MediaUnreachable(f"{host!r} compresses, which was not asked for")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise MediaTooLarge(f"{host!r} sends {length[:20]} bytes, over the limit of {max_bytes}")


def _failure(url: httpx.URL, error: httpx.TransportError) -> str:
    """What went wrong, without the addresses that the caller should not learn."""
    if isinstance(error.__cause__, httpcore.ConnectError) and "certificate" in str(error).lower():
        return f"the certificate of {url.host!r} is not valid"
    kinds = {
        httpx.ConnectError: "cannot be connected to",
        httpx.ConnectTimeout: "does not answer",
        httpx.RemoteProtocolError: "broke off or does not speak HTTP",
    }
    return f"{url.host!r} {kinds.get(type(error), 'broke off')}"
