"""Who asks while faults are played: over every road, and each answer is held against the truth."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec

from faults.served import Ready
from tiny.shapes import draw, random_scene
from triptych_client import AsyncClient, TriptychClientError, user
from triptych_client.messages import image, text

Road = Literal["grpc", "http", "openai"]
ROADS: tuple[Road, ...] = ("grpc", "http", "openai")
LIMIT_S = 20.0
"""After which a request hangs."""
PAUSE_S = 0.1
"""After an answer; the machine is to have time to notice faults."""
REFUSED_PAUSE_S = 0.25
"""After a refusal."""
AT_ONCE = 8
"""Questions whose true answers are learnt at a time."""
CLEAN = frozenset({"unavailable", "connection_failed", "overloaded", "lease_lost"})
"""Codes of an error that says: not now, and not your fault."""
WORDS = "Say all that you see in it, and where, and then say it once more. "


@dataclass
class Asked:
    """One request."""

    road: Road
    seed: int
    """Of its picture; 0: it has none."""
    began: float
    ended: float = 0.0
    answer: str = ""
    refusal: str = ""
    """Code of a clean error."""
    fault: str = ""
    """What is not to happen, in words."""
    hung: bool = False

    @property
    def answered(self) -> bool:
        """Whether an answer came."""
        return not (self.refusal or self.fault or self.hung)


class Refused(Exception):
    """An error that the gateway has told in its own form."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Load:
    """Requests in a thread of its own, from `start` to `stop`.

    Args:
        at: Where the server is.
        max_tokens: Of an answer.
    """

    at: Ready
    max_tokens: int = 60
    done: list[Asked] = field(default_factory=list)
    truths: dict[int, str] = field(default_factory=dict)
    """By the picture's seed: what a server in good health says."""
    ends: bool = False
    """The server will end, gateway and all: then no connection is a clean error too."""

    def __post_init__(self) -> None:
        self._live: list[Asked] = []
        self._seeds = itertools.count(1)
        self._stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        """Learn the truth about a text, then begin to ask."""
        self._learn({0})
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; what is under way comes to its end."""
        self._stopping = True
        self._thread.join()

    def under_way(self) -> list[Asked]:
        """Requests that have not ended."""
        return list(self._live)

    def answered_since(self, when: float) -> bool:
        """Whether each road has answered a request that began after ``when``, and one a picture."""
        good = [each for each in self.done if each.began >= when and each.answered]
        return {each.road for each in good} == set(ROADS) and any(each.seed for each in good)

    def check(self, asked: list[Asked]) -> None:
        """Mark the answers that are not what the server says now, in good health."""
        answered = [each for each in asked if each.answered]
        self._learn({each.seed for each in answered} - self.truths.keys())
        for each in answered:
            if each.answer != self.truths[each.seed]:
                each.fault = f"answered {each.answer!r}, not {self.truths[each.seed]!r}"

    def _learn(self, seeds: set[int]) -> None:
        """Ask for the truth."""

        async def learn() -> None:
            left = iter(seeds)

            async def ask() -> None:
                for seed in left:
                    self.truths[seed] = await roads.ask("grpc", seed)

            async with _Roads(self.at, self.max_tokens) as roads:
                await asyncio.gather(*(ask() for _ in range(AT_ONCE)))

        asyncio.run(learn())

    async def _run(self) -> None:
        async with _Roads(self.at, self.max_tokens) as roads:
            asking = [self._keep_asking(roads, road, pictures=False) for road in ROADS]
            asking += [self._keep_asking(roads, road, pictures=True) for road in ("grpc", "openai")]
            await asyncio.gather(*asking)

    async def _keep_asking(self, roads: _Roads, road: Road, *, pictures: bool) -> None:
        while not self._stopping:
            asked = Asked(road, next(self._seeds) if pictures else 0, time.monotonic())
            self._live.append(asked)
            await self._once(roads, asked)
            asked.ended = time.monotonic()
            self.done.append(asked)
            self._live.remove(asked)
            await asyncio.sleep(PAUSE_S if asked.answered else REFUSED_PAUSE_S)

    async def _once(self, roads: _Roads, asked: Asked) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                asked.answer = await roads.ask(asked.road, asked.seed)
        except TimeoutError:
            asked.hung = True
        except (TriptychClientError, Refused) as error:
            if error.code in CLEAN:
                asked.refusal = error.code
            else:
                asked.fault = f"{error.code}: {error}"
        except httpx.TransportError as error:
            if self.ends:
                asked.refusal = "connection_failed"
            else:
                asked.fault = repr(error)
        except Exception as error:
            asked.fault = repr(error)


class _Roads:
    """The ways to a server; they last through its restarts."""

    def __init__(self, at: Ready, max_tokens: int) -> None:
        self._at = at
        self._max_tokens = max_tokens
        self._clients = {"grpc": AsyncClient(at.grpc), "http": AsyncClient(at.http)}
        self._openai = httpx.AsyncClient(base_url=at.openai, trust_env=False, timeout=None)

    async def __aenter__(self) -> _Roads:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients.values():
            await client.aclose()
        await self._openai.aclose()

    async def ask(self, road: Road, seed: int) -> str:
        """The whole answer about a picture, or without one."""
        if road == "openai":
            return await self._ask_openai(seed)
        message = user(text(WORDS), image(picture(seed))) if seed else user(text(WORDS))
        stream = self._clients[road].chat(
            [message],
            model=self._at.model,
            timeout=None,
            temperature=0,
            max_tokens=self._max_tokens,
        )
        return (await stream.collect()).text

    async def _ask_openai(self, seed: int) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": WORDS}]
        if seed:
            data = base64.b64encode(picture(seed)).decode()
            url = {"url": f"data:image/png;base64,{data}"}
            content.append({"type": "image_url", "image_url": url})
        body = {
            "model": self._at.model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        async with self._openai.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                error = msgspec.json.decode(await response.aread())["error"]
                if response.status_code in (429, 503) and "retry-after" not in response.headers:
                    raise Refused("no Retry-After")
                raise Refused(error["code"])
            return await _events(response)


async def _events(response: httpx.Response) -> str:
    answer, whole = "", False
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            whole = True
        elif line.startswith("data: "):
            event = msgspec.json.decode(data)
            if "error" in event:
                raise Refused(event["error"]["code"])
            answer += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if not whole:
        raise Refused("cut off")
    return answer


def picture(seed: int) -> bytes:
    """A picture of its own for each seed, as PNG."""
    rng = random.Random(seed)
    with io.BytesIO() as file:
        draw(random_scene(rng), (rng.randrange(200, 400), 240)).save(file, "PNG")
        return file.getvalue()
