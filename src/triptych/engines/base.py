"""What every engine promises, and what passes through its hands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import msgspec

from triptych.contract import KV_TRANSFER, Modality, Prompt, TicketItem
from triptych.engines.claim import Claim
from triptych.engines.sampling import Declaration, check_sampling
from triptych.errors import (
    ConfigurationError,
    ContextTooLong,
    InternalError,
    InvalidValue,
    UnknownField,
    UnsupportedMedium,
)

if TYPE_CHECKING:
    import torch

    from triptych.families.base import Family
    from triptych.settings import DecodeSettings

FinishReason = Literal["stop", "length"]
"""``stop``: an end-of-text token or a stop string; ``length``: ``max_tokens`` or the context."""

Media: TypeAlias = "Sequence[tuple[TicketItem, torch.Tensor]]"
"""One request's media in prompt order, each with its embeddings of shape (tokens, width)."""

EmbeddingInputs: TypeAlias = "Mapping[Modality, Mapping[str, Any] | Sequence[torch.Tensor]]"
"""See `Family.embedding_inputs`."""


class Alternative(msgspec.Struct, frozen=True):
    """A token that could have stood at a place."""

    token: str
    logprob: float
    """Natural logarithm of the probability."""
    raw: bytes | None = None
    """The token's own bytes, which may be a part of a character; None: those of ``token``."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """The token that was drawn at a place, and what else could have stood there."""

    token: str
    logprob: float
    """Natural logarithm of the probability."""
    raw: bytes | None = None
    """The token's own bytes, which may be a part of a character; None: those of ``token``."""
    top: tuple[Alternative, ...] = ()
    """``Sampling.top_logprobs`` of them, likeliest first."""


class Usage(msgspec.Struct, frozen=True):
    """What a generation took, counted by the engine, in tokens."""

    prompt_tokens: int
    """With every placeholder spread out."""
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt's, those whose keys and values the engine still had."""


class Delta(msgspec.Struct, frozen=True):
    """What a generation adds to its answer. Only the last has ``finish_reason`` and ``usage``."""

    text: str
    """May be empty: bytes of an unfinished character, or text that may begin a stop string, are
    held back."""
    tokens: int
    """Tokens drawn since the last delta."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, if `Sampling.logprobs` asks for them."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    kv_transfer: dict[str, Any] | None = None
    """What another engine needs to go on with this prompt's keys and values, if one may."""


class Engine(ABC):
    """A language model that takes embeddings for its media.

    Promises:

    - All methods are called on one event loop, that of `start`, and none blocks it for longer
      than it takes to prepare a request: `start`, which takes long, does its work in a thread.
    - `start` returns when `generate` can be called, or raises.
    - `stop` may be called at any time, also after a `start` that failed; a second call does
      nothing. After it no process, thread or device memory of the engine is left, and what was
      being generated has ended with `Cancelled` or `Unavailable`.
    - Nothing that `generate` is given can end the engine. Embeddings of a wrong shape or dtype
      are refused before the engine's library sees them.
    - What goes wrong is raised as a `TriptychError`.

    Args:
        settings: The stage's settings.
        family: The model's family, bound to the checkpoint.

    Raises:
        ConfigurationError: A setting is not the engine's, or it takes none of the family's media.
    """

    name: ClassVar[str]
    """As in ``triptych serve --engine``."""
    caution: ClassVar[str] = ""
    """What to know before relying on it; `triptych matrix` shows it."""
    sampling: ClassVar[Declaration] = {}
    """What the engine makes of each field of `triptych.engines.sampling.FIELDS`. One that is
    missing is refused by name."""
    transfers: ClassVar[bool] = False
    """Whether it takes `Prompt.kv_transfer`, and gives its own with the last delta."""
    ingests: frozenset[str] = frozenset({"inline"})
    """The values of `DecodeSettings.embedding_ingest` that the engine serves."""

    def __init__(self, settings: DecodeSettings, family: Family) -> None:
        if settings.embedding_ingest not in self.ingests:
            raise ConfigurationError(
                f"the engine {self.name} has no embedding_ingest {settings.embedding_ingest!r}, "
                f"but {', '.join(sorted(self.ingests))}"
            )
        refusals = [self.refuses(type(family), modality) for modality in family.modalities]
        if refusals and all(refusals):
            raise ConfigurationError(refusals[0])
        self.settings = settings
        self.family = family

    @property
    def pids(self) -> Sequence[int]:
        """The processes that run the engine, apart from this one, and end with it."""
        return ()

    @classmethod
    def refuses(cls, family: type[Family], modality: Modality) -> str:
        """Why the engine cannot serve a medium that the family has; empty: it can."""
        return ""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.settings.max_model_len or self.family.context_length

    def admit(self, prompt: Prompt, media: Media) -> EmbeddingInputs:
        """Check a request; every engine does so first, before its library sees any of it.

        Returns:
            The media as `Family.embedding_inputs` has them; empty for a text alone.

        Raises:
            UnknownField: The engine does not take a field of the sampling, or `KV_TRANSFER`.
            ContextTooLong: The prompt leaves no room for an answer.
            InvalidRequest: The media are not those of the prompt, or not the model's.
        """
        check_sampling(self.name, self.sampling, prompt.sampling)
        if prompt.kv_transfer:
            self._check_transfer()
        if prompt.length >= self.context_length:
            raise ContextTooLong(
                f"a prompt of {prompt.length} tokens leaves no room for an answer in the "
                f"context of {self.context_length}"
            )
        items = [item for item, _ in media]
        check_media(prompt, items)
        for index, item in enumerate(items):
            if why := self.refuses(type(self.family), item.modality):
                raise UnsupportedMedium(why, where=f"items[{index}]")
        return self.family.embedding_inputs(items, [tensor for _, tensor in media]) if items else {}

    def _check_transfer(self) -> None:
        if not self.transfers:
            raise UnknownField(
                f"the engine {self.name} takes no keys and values from elsewhere", where=KV_TRANSFER
            )
        if not self.settings.allow_kv_transfer:
            raise UnknownField("this server does not set allow_kv_transfer", where=KV_TRANSFER)

    @abstractmethod
    async def start(self) -> None:
        """Load the model.

        Raises:
            ConfigurationError: A setting, an engine argument or the checkpoint is wrong.
            Unavailable: The engine did not come up for another reason.
        """

    @abstractmethod
    def generate(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        """Generate the answer to one prompt.

        At least one delta comes, and the last one alone has ``finish_reason``. The engine's slot
        is free again as soon as the iterator ends, is closed, or the task that awaits it is
        cancelled.

        Args:
            prompt: Its ``id`` is unique among the generations that are running.
            media: The embeddings of ``prompt.items``, in their order. They need only live until
                the first delta. A `Claim` if `DecodeSettings.embedding_ingest` is ``connector``.

        Raises:
            InvalidRequest: The prompt or its media cannot be served; `ContextTooLong` where it
                is longer than the context.
            Cancelled: `abort` or `stop` was called.
            Unavailable: The engine has died, or cannot fetch what a `Claim` is for.
        """

    async def give_back(self, claim: Claim) -> None:
        """Let the owner of a claim's embeddings have its memory back, unless `generate` sees to it.

        Raises:
            Unavailable: Not started, stopped, or dead.
        """
        raise InternalError(f"the engine {self.name} fetches nothing")

    @abstractmethod
    async def abort(self, prompt_id: str) -> None:
        """End a generation with `Cancelled`; nothing if there is none of that id."""

    @abstractmethod
    async def health(self) -> None:
        """Return if `generate` would be served.

        Raises:
            Unavailable: Not started, stopped, or dead.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End everything; see the class."""


def check_media(prompt: Prompt, items: Sequence[TicketItem]) -> None:
    """Hold the ticket of a request against its prompt: each place gets what it was made for.

    An engine that is given fewer embeddings than places fails as a whole, not for that request
    alone, so this comes before any engine; `Family.embedding_inputs` then checks the embeddings.

    Raises:
        InvalidValue: Number, modality, content or tokens differ.
    """
    if len(items) != len(prompt.items):
        raise InvalidValue(f"{len(items)} embeddings for {len(prompt.items)} places in the prompt")
    for index, (place, item) in enumerate(zip(prompt.items, items, strict=True)):
        wanted = (place.modality, place.hash, place.tokens)
        got = (item.modality, item.hash, item.shape[0])
        if got != wanted:
            raise InvalidValue(
                f"the place is for (modality, hash, tokens) {wanted}, the embeddings are {got}",
                where=f"items[{index}]",
            )
        places = place.spread.count(prompt.token_ids[place.position])
        if place.spread and places != place.tokens:
            raise InvalidValue(
                f"{place.tokens} embeddings for {places} placeholders",
                where=f"items[{index}]",
            )
