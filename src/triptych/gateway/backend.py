"""Triton as the gateway sees it: chats, and which ensembles there are."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator

import msgspec

from triptych import contract
from triptych.gateway.faults import ModelNotFound
from triptych.gateway.options import GatewayOptions
from triptych.gateway.watch import Watch
from triptych_client.answers import Chunk
from triptych_client.conversation import Conversation, Server
from triptych_client.errors import LeaseLost, NotFound
from triptych_client.grpc_transport import AsyncGrpcTransport
from triptych_client.requests import Call

ONLY_S = 5.0
"""How long the only ensemble is taken for that without asking again, which takes longer than a
token does, in seconds."""


class Served(msgspec.Struct, frozen=True):
    """A name under which a model is served."""

    name: str
    ensemble: str
    """Another name than ``name`` where that is an alias."""


class Backend:
    """One Triton; belongs to the event loop that runs when it is made.

    Args:
        options: Where it is, and how its models are called.
    """

    def __init__(self, options: GatewayOptions) -> None:
        self.answered: dict[str, float] = {}
        """When each ensemble last wrote a piece of an answer, `time.monotonic` seconds."""
        self._options = options
        self._aliases = options.aliases
        self._transport = AsyncGrpcTransport(options.address)
        self._server = Server(self._transport)
        self._watch = Watch(self._transport)
        self._chats: dict[str, bool] = {}
        self._single, self._single_until = "", 0.0

    async def close(self) -> None:
        """End what is not over, and let go of the connection."""
        await self._watch.close()
        await self._server.close()

    async def chat(
        self,
        ensemble: str,
        body: bytes,
        request_id: str,
        timeout_s: float,
        traceparent: str = "",
    ) -> AsyncGenerator[Chunk, None]:
        """The pieces of one answer; closing the generator before its end ends it in Triton too.

        Embeddings that were promised and lost are encoded anew by a second request, as long as
        nothing of the answer has been given out.

        Raises:
            TriptychClientError: What ended the answer.
        """
        for last in (False, True):
            # An abort goes by this id, so it must be nobody else's, whatever the caller chose.
            name = f"{request_id}.{uuid.uuid4().hex}"
            call = Call(ensemble, name, body, timeout_s, traceparent=traceparent)
            conversation = Conversation(self._server, call)
            begun = False
            try:
                with self._watch.over(conversation, ensemble) as waiting:
                    while (chunk := await conversation.next()) is not None:
                        begun = True
                        self.answered[ensemble] = time.monotonic()
                        yield chunk
                        waiting.moved()
                if waiting.fault is not None:
                    raise waiting.fault
                return
            except LeaseLost:
                if begun or last:
                    raise
            except NotFound:
                self._chats.pop(ensemble, None)  # it was unloaded
                self._single_until = 0.0
                raise
            finally:
                await conversation.close()

    async def resolve(self, name: str) -> str:
        """The ensemble that a caller means.

        Raises:
            ModelNotFound: There is none.
            TriptychClientError: Triton does not answer.
        """
        ensemble = self._aliases.get(name, name) or await self._only(name)
        if not await self._is_chat(ensemble):
            raise ModelNotFound(
                f"there is no model {name!r}; GET /v1/models lists those that there are",
                where="model",
            )
        return ensemble

    async def served(self) -> list[Served]:
        """Every name that a caller may use now: the ensembles that are loaded, then aliases.

        Raises:
            TriptychClientError: Triton does not answer.
        """
        ensembles = await self.ensembles()
        found = [Served(ensemble, ensemble) for ensemble in ensembles]
        for alias, ensemble in self._aliases.items():
            target = ensemble or (ensembles[0] if len(ensembles) == 1 else "")
            if target in ensembles:
                found.append(Served(alias, target))
        return found

    async def ensembles(self) -> list[str]:
        """The ensembles that are loaded and chat.

        Raises:
            TriptychClientError: Triton does not answer.
        """
        ready = [model.name for model in await self._transport.models()]
        chats = await asyncio.gather(*(self._is_chat(name) for name in ready))
        return [name for name, chat in zip(ready, chats, strict=True) if chat]

    async def _only(self, alias: str) -> str:
        if time.monotonic() < self._single_until:
            return self._single
        ensembles = await self.ensembles()
        if len(ensembles) == 1:
            self._single, self._single_until = ensembles[0], time.monotonic() + ONLY_S
            return ensembles[0]
        raise ModelNotFound(
            f"{alias!r} may be any of {', '.join(ensembles) or 'no'} models: the gateway's "
            f"operator should write --served-model-name {alias}=ENSEMBLE",
            where="model",
        )

    async def _is_chat(self, model: str) -> bool:
        """Whether it is an ensemble whose answers are CHUNKs; what is none is asked about anew."""
        if not self._chats.get(model):
            try:
                outputs = await self._transport.outputs(model)
            except NotFound:
                return False
            self._chats[model] = contract.CHUNK in outputs
        return self._chats[model]
