"""HTTP, blocking and asynchronous, through Triton's generate extension."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from triptych_client import http_wire
from triptych_client.background import Background, TaskBackground, ThreadBackground
from triptych_client.errors import (
    ConnectionFailed,
    InvalidRequest,
    InvalidValue,
    TriptychClientError,
)
from triptych_client.requests import Call
from triptych_client.transport import (
    CONTROL_TIMEOUT_S,
    Address,
    Exchange,
    Input,
    ModelInfo,
    Transport,
)

# A connection for each chat: only then is its socket known before the first byte comes back, and
# only by its socket can a read that waits be ended from elsewhere.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)


class HttpExchange(Exchange):
    """A chat as one POST, whose body comes back event by event."""

    def __init__(self, client: Any, call: Call, address: Address) -> None:
        self.ended = self.settled = False
        self._client = client
        self._call = call
        self._address = address
        self._reader = http_wire.EventReader()
        self._events: deque[bytes] = deque()
        self._body: Any = None
        self._response: Any = None
        self._socket: Any = None
        self._reading = False

    async def receive(self) -> bytes | None:
        """As `Exchange` says."""
        if self.ended:
            return None
        self._reading = True
        try:
            if self._response is None:
                await self._start()
            while not self._events:
                if (data := await self._read()) is None:
                    self.ended = self.settled = True
                    return None
                self._events += self._reader.feed(data)
            return http_wire.chunk_of(self._events.popleft())
        except httpx.HTTPError as error:
            self.ended = True
            self.settled = self.settled or _never_arrived(error)
            raise _connection_error(error, self._address) from None
        except TriptychClientError:
            self.settled = True
            raise
        except BaseException:  # then httpx has closed the connection
            self.ended = True
            raise
        finally:
            self._reading = False

    async def close(self) -> None:
        """As `Exchange` says."""
        if self._reading:
            self._shut()
        elif self._response is not None:
            await self._close_response()

    async def _start(self) -> None:
        """Send the request and read the head of the response, which the first CHUNK comes with."""
        connect = min(CONTROL_TIMEOUT_S, self._call.timeout or CONTROL_TIMEOUT_S)
        request = self._client.build_request(
            "POST",
            f"{_path(self._call.model)}/generate_stream",
            content=http_wire.chat_body(self._call),
            timeout=httpx.Timeout(None, connect=connect),
            extensions={"trace": self._trace},
        )
        self._response = await self._send(request)
        self._body = self._iterate(self._response)
        if self._response.status_code != httpx.codes.OK:
            body = b""
            while (data := await self._read()) is not None:
                body += data
            raise http_wire.refusal(self._response.status_code, body)

    def _shut(self) -> None:
        """End the read that waits, wherever it waits: closing alone would not wake it."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._socket.shutdown(socket.SHUT_RDWR)

    def _see(self, event: str, info: dict[str, Any]) -> None:
        """Learn the connection's socket; TLS wraps it in another one."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")

    # What differs on an event loop.

    @property
    def _trace(self) -> Any:
        return self._see

    async def _send(self, request: Any) -> Any:
        return self._client.send(request, stream=True)

    def _iterate(self, response: Any) -> Any:
        return response.iter_raw()

    async def _read(self) -> Any:
        return next(self._body, None)

    async def _close_response(self) -> None:
        self._response.close()


class AsyncHttpExchange(HttpExchange):
    """The same on an event loop."""

    @property
    def _trace(self) -> Any:
        async def see(event: str, info: dict[str, Any]) -> None:
            self._see(event, info)

        return see

    async def _send(self, request: Any) -> Any:
        return await self._client.send(request, stream=True)

    def _iterate(self, response: Any) -> Any:
        return response.aiter_raw()

    async def _read(self) -> Any:
        return await anext(self._body, None)

    async def _close_response(self) -> None:
        await self._response.aclose()


class _Statistics(msgspec.Struct, frozen=True):
    """What Triton tells of the models that are loaded, as far as it matters here."""

    model_stats: list[ModelInfo]


class HttpTransport(Transport):
    """A client of httpx, and the paths of Triton's HTTP server."""

    _api: Any = httpx.Client
    _exchange: type[HttpExchange] = HttpExchange
    _background_type: type[Background] = ThreadBackground

    def __init__(self, address: Address) -> None:
        self.address = address
        self.background = self._background_type()
        self._client = self._api(
            base_url=str(address),
            limits=LIMITS,
            timeout=CONTROL_TIMEOUT_S,
            trust_env=not address.is_local,
        )

    def open(self, call: Call) -> HttpExchange:
        """As `Transport` says; the request leaves with the first `receive`."""
        if call.tensors:  # in JSON they would be a list of numbers, one a byte
            raise InvalidValue("embeddings travel by gRPC alone; give host:port as the address")
        return self._exchange(self._client, call, self.address)

    async def ready(self, model: str) -> bool:
        """As `Transport` says."""
        try:
            for path in ("/v2/health/ready", f"{_path(model)}/ready"):
                await self._get("GET", path)
        except TriptychClientError:
            return False
        return True

    async def models(self) -> list[ModelInfo]:
        """As `Transport` says; Triton's index of the repository is closed to most callers."""
        body = await self._get("GET", "/v2/models/stats")
        return msgspec.json.decode(body, type=_Statistics).model_stats

    async def outputs(self, ensemble: str) -> dict[str, str]:
        """As `Transport` says."""
        config = msgspec.json.decode(await self._get("GET", f"{_path(ensemble)}/config"))
        return {
            tensor: step["model_name"]
            for step in config.get("ensemble_scheduling", {}).get("step", ())
            for tensor in step["output_map"].values()
        }

    async def infer(
        self, model: str, inputs: Sequence[Input], timeout_s: float | None
    ) -> dict[str, bytes]:
        """As `Transport` says; Triton's generate extension has no raw tensors."""
        raise InvalidRequest(
            f"tensors go over gRPC: give host:port of Triton's gRPC, not {self.address}"
        )

    async def abort(self, model: str, request_id: str) -> None:
        """As `Transport` says."""
        body = http_wire.abort_body(request_id)
        await self._get("POST", f"{_path(model)}/generate_stream", body)

    async def close(self) -> None:
        """As `Transport` says."""
        await self.background.drain()
        self._client.close()

    async def _get(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            response = await self._request(method, path, body)
        except httpx.HTTPError as error:
            raise _connection_error(error, self.address) from None
        if response.status_code != httpx.codes.OK:
            raise http_wire.refusal(response.status_code, response.content)
        content: bytes = response.content
        return content

    async def _request(self, method: str, path: str, body: bytes | None) -> Any:
        return self._client.request(method, path, content=body)


class AsyncHttpTransport(HttpTransport):
    """The same on an event loop."""

    _api = httpx.AsyncClient
    _exchange = AsyncHttpExchange
    _background_type = TaskBackground

    async def close(self) -> None:
        """As `Transport` says."""
        await self.background.drain()
        await self._client.aclose()

    async def _request(self, method: str, path: str, body: bytes | None) -> Any:
        return await self._client.request(method, path, content=body)


def _path(model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}"


def _never_arrived(error: httpx.HTTPError) -> bool:
    return isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) or _is_no_http(error)


def _is_no_http(error: httpx.HTTPError) -> bool:
    return isinstance(error, httpx.RemoteProtocolError) and str(error).startswith("illegal")


def _connection_error(error: httpx.HTTPError, address: Address) -> ConnectionFailed:
    if _is_no_http(error):
        return ConnectionFailed(f"{address} speaks no HTTP; for gRPC give {address.host}")
    if _never_arrived(error):
        return ConnectionFailed(f"{address.hint} ({str(error) or 'it does not answer'})")
    return ConnectionFailed(f"the connection to {address} broke: {error}")
