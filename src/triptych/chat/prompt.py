"""A request and its media's token counts to the PROMPT that decode takes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from triptych.chat.messages import TextPart
from triptych.chat.request import ChatRequest
from triptych.chat.sampling import GenerationDefaults, sampling
from triptych.chat.template import ChatTemplate, find_forged
from triptych.chat.tokenizer import PromptTokenizer
from triptych.chat.tools import show_tool, write_calls
from triptych.contract import Modality, Prompt, PromptItem
from triptych.errors import ContextTooLong, InvalidRequest, InvalidValue, UnsupportedMedium


class Slot(msgspec.Struct, frozen=True):
    """Where one medium stands in the prompt."""

    position: int
    """Index in the token ids of its placeholder token."""
    medium: int
    """Index in `ChatRequest.media`."""


class Rendered(msgspec.Struct, frozen=True):
    """A request's prompt before its media are there."""

    token_ids: list[int]
    """One placeholder token a medium."""
    slots: list[Slot]
    """In the order of the prompt; a template may put a turn's images before its videos."""


class MediumSize(msgspec.Struct, frozen=True):
    """What the prompt must know of one medium when it is loaded."""

    tokens: int
    """Embeddings."""
    hash: str
    text: str = ""
    """What stands in its place, placeholders and all; empty: the placeholder, ``tokens`` times."""
    times: tuple[float, ...] = ()
    """Seconds that ``text`` names."""
    cached: bool = False
    """See `PromptItem.cached`."""


class PromptBuilder:
    """Builds prompts for one checkpoint.

    Args:
        checkpoint: Directory in Hugging Face's layout.
        placeholders: The special token that stands for one medium, by modality; other
            modalities are refused.
        max_model_len: Tokens that prompt and answer may have together.
        model: Name for the answers to requests that give none.
        family: What refusals call the model.
        unserved: Why some modality is refused that a caller may expect to be taken.
        chat_template: In place of the checkpoint's own; see `ChatTemplate`.

    Raises:
        ConfigurationError: The checkpoint's template, tokenizer or generation_config is broken.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        placeholders: Mapping[Modality, str],
        *,
        max_model_len: int,
        model: str = "",
        family: str = "the model",
        unserved: Mapping[Modality, str] = MappingProxyType({}),
        chat_template: str = "",
    ) -> None:
        self.max_model_len = max_model_len
        self.model = model or Path(checkpoint).resolve().name
        self._placeholders = dict(placeholders)
        self._family = family
        self._unserved = unserved
        self._tokenizer = PromptTokenizer(checkpoint)
        self._defaults = GenerationDefaults.read(checkpoint)
        self._modality_of = {
            self._tokenizer.token_id(token): modality for modality, token in placeholders.items()
        }
        self._template = ChatTemplate(checkpoint, placeholders, chat_template)

    def render(self, request: ChatRequest) -> Rendered:
        """Token ids, and the place of each medium in them.

        Raises:
            UnsupportedMedium: The model does not take a medium's modality.
            InvalidValue: A text holds a token that stands for media.
            InvalidRequest: The template does not take the messages, or drops a medium.
            ContextTooLong: Text alone fills the context.
        """
        if request.prompt is not None:
            return self._raw(request.prompt)
        self._check_texts(request)
        media = [part.modality for part in request.media]
        for part in request.media:
            if part.modality not in self._placeholders:
                raise UnsupportedMedium(self._why_not(part.modality), where=part.where)
        tools = () if request.tool_choice == "none" else request.tools
        token_ids = self._tokenizer.encode(
            self._template.render(request.messages, tools), special=self._template.leaves_out
        )
        rendered = Rendered(token_ids, self._locate(token_ids, media))
        self._check_length(len(token_ids), len(media))
        return rendered

    def build(
        self, request: ChatRequest, rendered: Rendered, media: Sequence[MediumSize] = ()
    ) -> Prompt:
        """The PROMPT.

        Args:
            request: The request.
            rendered: What `render` made of it.
            media: One entry for each of `ChatRequest.media`, in that order.

        Raises:
            ContextTooLong: Prompt, or prompt and ``max_tokens``, do not fit the context.
        """
        modalities = [part.modality for part in request.media]
        items = [
            PromptItem(
                modality=modalities[slot.medium],
                position=slot.position,
                tokens=media[slot.medium].tokens,
                hash=media[slot.medium].hash,
                spread=self._tokenizer.encode(text) if (text := media[slot.medium].text) else [],
                times=media[slot.medium].times,
                cached=media[slot.medium].cached,
            )
            for slot in rendered.slots
        ]
        taken = sum(item.length for item in items)
        length = len(rendered.token_ids) + taken - len(items)
        where = "messages" if request.prompt is None else "prompt"
        self._check_length(length, taken, where)
        return Prompt(
            id=f"{'chatcmpl' if request.prompt is None else 'cmpl'}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model or self.model,
            token_ids=rendered.token_ids,
            items=items,
            sampling=sampling(request, self._defaults, self._max_tokens(request, length, taken)),
            stream=request.stream,
            include_usage=request.include_usage,
            usage_with_finish=request.usage_with_finish,
            tools=()
            if request.tool_choice == "none"
            else tuple(tool.name for tool in request.tools),
        )

    def _raw(self, prompt: str | tuple[int, ...]) -> Rendered:
        """A prompt that has no template."""
        if isinstance(prompt, str):
            self._check_text(prompt, "prompt")
            token_ids = self._tokenizer.encode(prompt, special=True)
        else:
            token_ids = list(prompt)
            for index, token in enumerate(token_ids):
                if not self._tokenizer.has(token):
                    raise InvalidValue(
                        f"must be a token of the model, got {token}", where=f"prompt[{index}]"
                    )
                if token in self._modality_of:
                    raise InvalidValue(
                        f"must not be {token}, which stands for a medium", where=f"prompt[{index}]"
                    )
        self._check_length(len(token_ids), 0, "prompt")
        return Rendered(token_ids, [])

    def _why_not(self, modality: Modality) -> str:
        takes = ", ".join(sorted(self._placeholders)) or "text alone"
        why = self._unserved.get(modality)
        return f"{self._family} takes no {modality}; it takes {takes}" + (f": {why}" if why else "")

    def _check_texts(self, request: ChatRequest) -> None:
        for index, message in enumerate(request.messages):
            where = f"messages[{index}]"
            texts = {
                f"{where}.name": message.name or "",
                f"{where}.tool_calls": _written(write_calls(message.tool_calls)),
                f"{where}.tool_call_id": message.tool_call_id or "",
            }
            if isinstance(message.content, str):
                texts[f"{where}.content"] = message.content
            else:
                for place, part in enumerate(message.content):
                    if isinstance(part, TextPart):
                        texts[f"{where}.content[{place}].text"] = part.text
            for path, text in texts.items():
                self._check_text(text, path)
        for index, tool in enumerate(request.tools):
            self._check_text(_written(show_tool(tool)), f"tools[{index}]")

    def _check_text(self, text: str, where: str) -> None:
        if token := find_forged(text, self._placeholders.values()):
            raise InvalidValue(f"must not hold {token!r}, which stands for a medium", where=where)

    def _locate(self, token_ids: list[int], media: Sequence[Modality]) -> list[Slot]:
        """Match the k-th placeholder of each modality to the k-th medium of that modality."""
        waiting: dict[Modality, list[int]] = {modality: [] for modality in self._placeholders}
        for index, modality in enumerate(media):
            waiting[modality].append(index)
        found: dict[Modality, int] = dict.fromkeys(waiting, 0)
        slots = []
        for position, token in enumerate(token_ids):
            kind = self._modality_of.get(token)
            if kind is None:
                continue
            if found[kind] < len(waiting[kind]):
                slots.append(Slot(position, waiting[kind][found[kind]]))
            found[kind] += 1
        for kind, indices in waiting.items():
            if found[kind] != len(indices):
                raise InvalidRequest(
                    f"the model's chat template made {found[kind]} places for {len(indices)} "
                    f"media of kind {kind}",
                    where="messages",
                )
        return slots

    def _check_length(self, length: int, media: int, where: str = "messages") -> None:
        if length >= self.max_model_len:
            raise ContextTooLong(
                f"the prompt has {length} tokens{_of_media(media)}, and with at least 1 token of "
                f"answer the limit is {self.max_model_len}",
                where=where,
            )

    def _max_tokens(self, request: ChatRequest, length: int, media: int) -> int:
        rest = self.max_model_len - length
        if request.max_tokens is None:
            return min(rest, self._defaults.max_new_tokens or rest)
        if request.max_tokens > rest:
            raise ContextTooLong(
                f"{request.max_tokens} tokens of answer do not fit: the prompt has {length} "
                f"tokens{_of_media(media)}, which leaves {rest} of {self.max_model_len}",
                where="max_tokens",
            )
        return request.max_tokens


def _written(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _of_media(tokens: int) -> str:
    return f" ({tokens} of them for media)" if tokens else ""
