"""Over which road a server is asked, and when its caller leaves."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import httpx
import msgspec

from faults.load import Refused
from faults.served import Ready
from soaking.kinds import WORDS, Kind
from triptych_client import AsyncClient, DeadlineExceeded, TriptychClientError
from triptych_client.messages import Message

Road = Literal["grpc", "http", "openai"]
ROADS: tuple[Road, ...] = ("grpc", "http", "openai")
AT_A_TIME = 12
BETWEEN = 6
"""As many leave as each other before it is the other way's turn: so both come over each road."""
LIMIT_S = 120.0
"""After which a request hangs; the machine may have others to serve."""
STAY_S = 0.2
"""The longest that a caller stays who does not wait for the answer."""
MAX_TOKENS = 24


@dataclass
class Tally:
    """What became of requests."""

    ended: Counter[str] = field(default_factory=Counter)
    """By road, form, kind and outcome."""
    faults: list[str] = field(default_factory=list)
    """What must not happen, in words."""

    def note(self, road: str, kind: str, outcome: str) -> None:
        """One request has ended as it should."""
        self.ended[f"{road}, {kind}: {outcome}"] += 1


class Callers:
    """The clients of one round; with them all their connections go.

    Args:
        at: Where the server is.
        tally: Where it is noted what becomes of each request.
    """

    def __init__(self, at: Ready, tally: Tally) -> None:
        self._at = at
        self._tally = tally
        self._random = random.Random(0)
        self._room = asyncio.Semaphore(AT_A_TIME)
        self._clients = {"grpc": AsyncClient(at.grpc), "http": AsyncClient(at.http)}
        self._openai = httpx.AsyncClient(base_url=at.openai, trust_env=False, timeout=None)

    async def __aenter__(self) -> Callers:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients.values():
            await client.aclose()
        await self._openai.aclose()

    async def ask(self, road: Road, stream: bool, kind: Kind) -> None:
        """Ask, and hold what comes against what must come."""
        async with self._room:
            try:
                async with asyncio.timeout(LIMIT_S):
                    code = await self._code(road, kind, stream=stream)
            except TimeoutError:
                code = "hangs"
            except Exception as error:
                code = repr(error)
        if code == kind.refusal:
            self._tally.note(_called(road, stream=stream), kind.name, code or "answered")
        else:
            wanted = kind.refusal or "an answer"
            self._tally.faults.append(f"{road}, {kind.name}: {code or 'answered'}, not {wanted}")

    async def leave(self, number: int, road: Road, stream: bool, kind: Kind) -> None:
        """Ask, and leave before long: by going away, or, each fourth time, by a deadline."""
        stays = self._random.uniform(0.001, STAY_S)
        by_deadline = road != "openai" and number // BETWEEN % 4 == 0
        async with self._room:
            asking = asyncio.create_task(
                self._code(road, kind, stream=stream, within_s=stays if by_deadline else None)
            )
            await asyncio.wait({asking}, timeout=LIMIT_S if by_deadline else stays)
            if not asking.done():
                asking.cancel()
            [end] = await asyncio.gather(asking, return_exceptions=True)
        road_name = _called(road, stream=stream)
        if isinstance(end, asyncio.CancelledError):
            self._tally.note(road_name, kind.name, "left")
        elif end in ("", kind.refusal, DeadlineExceeded.code):
            self._tally.note(road_name, kind.name, str(end) or "answered")
        else:
            self._tally.faults.append(f"{road_name}, {kind.name}, leaving: {end!r}")

    async def first_tokens(self, count: int) -> int:
        """How many of ``count`` long answers are written at the same time."""

        async def one(client: AsyncClient) -> tuple[float, float]:
            first = 0.0
            async for chunk in client.chat(WORDS * 6, model=self._at.model, temperature=0):
                if chunk.text and not first:
                    first = asyncio.get_running_loop().time()
            return first, asyncio.get_running_loop().time()

        times = await asyncio.gather(*(one(self._clients["grpc"]) for _ in range(count)))
        ended = min(end for _, end in times)
        return sum(0 < first < ended for first, _ in times)

    async def _code(
        self, road: Road, kind: Kind, *, stream: bool, within_s: float | None = None
    ) -> str:
        """The code of the error that has come; empty: an answer."""
        content = [*kind.make(), {"type": "text", "text": WORDS}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        fields: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0, **kind.fields}
        try:
            if road == "openai":
                await self._ask_openai({"messages": messages, "stream": stream, **fields})
            elif stream:
                await (
                    self._clients[road]
                    .chat(
                        cast("list[Message]", messages),
                        model=self._at.model,
                        timeout=within_s,
                        **fields,
                    )
                    .collect()
                )
            else:
                await self._clients[road].chat(
                    cast("list[Message]", messages),
                    model=self._at.model,
                    timeout=within_s,
                    stream=False,
                    **fields,
                )
        except (TriptychClientError, Refused) as error:
            return error.code
        return ""

    async def _ask_openai(self, body: dict[str, Any]) -> None:
        body["model"] = self._at.model
        async with self._openai.stream("POST", "chat/completions", json=body) as response:
            data = await response.aread()
            if response.status_code != httpx.codes.OK:
                raise Refused(msgspec.json.decode(data)["error"]["code"])
            if body["stream"]:
                events = [line for line in data.split(b"\n") if line.startswith(b"data: ")]
                last = events[-1].removeprefix(b"data: ").strip()
                if last != b"[DONE]":
                    raise Refused(msgspec.json.decode(last)["error"]["code"])


def ways(roads: Sequence[Road]) -> list[tuple[Road, bool]]:
    """Each of them streamed and not."""
    return [(road, stream) for stream in (True, False) for road in roads]


def _called(road: Road, *, stream: bool) -> str:
    return f"{road}, {'streamed' if stream else 'whole'}"
