"""The messages of a chat: roles, text, and media at any place in any turn.

Source of the format: https://platform.openai.com/docs/api-reference/chat/create, with
``video_url``, ``audio_url``, ``image_embeds`` and ``uuid`` as vLLM has them; that ``image_embeds``
may name a piece of the tensor TENSORS is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import msgspec

from triptych.chat.fields import Fields, as_list, show, wrong
from triptych.chat.tools import ToolCall, read_calls, write_calls
from triptych.contract import GridTHW, Modality
from triptych.errors import InvalidValue, UnknownField

Role = Literal["system", "user", "assistant", "tool"]
Detail = Literal["auto", "low", "high"]
MediaKind = Literal["image_url", "video_url", "audio_url", "input_audio", "image_embeds"]
EmbedsDType = Literal["bfloat16", "float16", "float32"]
AudioFormat = Literal["wav", "mp3", "flac", "ogg"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_UNSERVED_ROLES = ("function",)
_UNSERVED_MESSAGE_FIELDS = (
    "annotations",
    "audio",
    "function_call",
    "reasoning",
    "reasoning_content",
    "refusal",
)
_UNSERVED_PARTS = ("audio_embeds", "file", "image_pil", "refusal", "thinking", "video_embeds")

MODALITIES: dict[MediaKind, Modality] = {
    "image_url": "image",
    "video_url": "video",
    "audio_url": "audio",
    "input_audio": "audio",
    "image_embeds": "image",
}
"""What the medium of each kind of part is."""

_MAX_FRAMES = 1 << 16
_MAX_RATE = 1 << 20
_MAX_OFFSET = 1 << 40
_MAX_EXTENT = 1 << 24
_MAX_GRID = 1 << 16


class TextPart(msgspec.Struct, frozen=True):
    """Text between media."""

    text: str


class TensorPlace(msgspec.Struct, frozen=True, omit_defaults=True):
    """Embeddings that lie in the request's tensor TENSORS."""

    offset: int
    """Bytes from its start."""
    shape: tuple[int, int]
    """(tokens, width)."""
    dtype: EmbedsDType
    grid_thw: GridTHW | None = None


class MediaPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One medium, as the caller names it."""

    kind: MediaKind
    """The ``type`` of the content part."""
    url: str
    """http, https, data or file; the media loader judges it. An ``input_audio`` is a data URI.
    Empty where the medium is in ``tensor``."""
    where: str
    """JSON path of what names the medium, for errors."""
    detail: Detail = "auto"
    uuid: str | None = None
    """The caller's own name for the content."""
    num_frames: int | None = None
    """Frames to take of a video, evenly over the clip."""
    fps: float | None = None
    """Frames to take of each second of a video."""
    sampling_rate: int | None = None
    """Samples a second that a sound is brought to."""
    tensor: TensorPlace | None = None
    """Where the embeddings are, if they came beside the request and not in it."""

    @property
    def modality(self) -> Modality:
        """Image, video or audio."""
        return MODALITIES[self.kind]

    @property
    def embeds(self) -> bool:
        """The caller sends embeddings in place of the medium."""
        return self.kind == "image_embeds"

    def __repr__(self) -> str:
        named = show(self.url) if self.tensor is None else repr(self.tensor)
        return f"MediaPart({self.kind}, {named}, where={self.where!r})"


Part = TextPart | MediaPart


class Message(msgspec.Struct, frozen=True):
    """One turn."""

    role: Role
    """``developer`` is read as ``system``."""
    content: str | tuple[Part, ...]
    """A string stays one: templates may tell the two forms apart. Empty where a turn has calls
    and nothing else."""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant's turn."""
    tool_call_id: str | None = None
    """Which call it answers; of a tool's turn."""

    @property
    def media(self) -> Iterator[MediaPart]:
        """The media of this turn, in order."""
        if not isinstance(self.content, str):
            yield from (part for part in self.content if isinstance(part, MediaPart))


def read_messages(value: object, where: str = "messages") -> tuple[Message, ...]:
    """The messages of a request.

    Raises:
        InvalidValue: No list, none in it, or a message that is not one.
        UnknownField: A message or part has a field that is not served.
    """
    found = as_list(value, where, "messages")
    return tuple(_read_message(entry, f"{where}[{index}]") for index, entry in enumerate(found))


def write_message(message: Message) -> dict[str, object]:
    """``message`` as OpenAI's JSON; `read_messages` reads it back."""
    content: object = message.content
    if not isinstance(message.content, str):
        content = [_write_part(part) for part in message.content]
    written: dict[str, object] = {"role": message.role, "content": content}
    if message.name is not None:
        written["name"] = message.name
    if message.tool_calls:
        written["tool_calls"] = write_calls(message.tool_calls)
    if message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    return written


def _read_message(value: object, where: str) -> Message:
    fields = Fields(value, where, _UNSERVED_MESSAGE_FIELDS)
    given = fields.need("role")
    if isinstance(given, str) and given in _UNSERVED_ROLES:
        raise InvalidValue(f"messages of role {given!r} are not served", where=fields.path("role"))
    if not isinstance(given, str) or given not in _ROLES:
        raise wrong(fields.path("role"), f"must be one of {', '.join(_ROLES)}", given)
    role = _ROLES[given]
    calls, answered = _read_tool_fields(fields, role)
    content = fields.take("content")
    name = fields.string("name", longest=256)
    # Before the content is missed: it is not what is wrong with an assistant's ``function_call``.
    fields.close()
    if content is None and calls:
        content = ""
    return Message(role, _read_content(content, fields.path("content")), name, calls, answered)


def _read_tool_fields(fields: Fields, role: Role) -> tuple[tuple[ToolCall, ...], str | None]:
    """An assistant's ``tool_calls``, and a tool's ``tool_call_id``."""
    calls, answered = fields.take("tool_calls"), fields.take("tool_call_id")
    for name, given, of in (("tool_calls", calls, "assistant"), ("tool_call_id", answered, "tool")):
        if given is not None and role != of:
            raise UnknownField(f"not served in a message of role {role!r}", where=fields.path(name))
    if role == "tool" and (not isinstance(answered, str) or not answered):
        raise wrong(fields.path("tool_call_id"), "must be a string that is not empty", answered)
    path = fields.path("tool_calls")
    return () if calls is None else read_calls(calls, path), cast("str | None", answered)


def _read_content(value: object, where: str) -> str | tuple[Part, ...]:
    if isinstance(value, str):
        return value
    if value is None:
        raise InvalidValue("is required: a string or a list of parts", where=where)
    if not isinstance(value, list):
        raise wrong(where, "must be a string or a list of parts", value)
    parts = as_list(value, where, "parts")
    return tuple(_read_part(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _read_part(value: object, where: str) -> Part:
    fields = Fields(value, where)
    kind = fields.need("type")
    if kind == "text":
        part: Part = TextPart(fields.text("text"))
        fields.close()
        return part
    if isinstance(kind, str) and kind in _UNSERVED_PARTS:
        raise UnknownField(f"parts of type {kind!r} are not served", where=fields.path("type"))
    if not isinstance(kind, str) or kind not in MODALITIES:
        raise wrong(fields.path("type"), f"must be one of text, {', '.join(MODALITIES)}", kind)
    medium = Fields(fields.need(kind), fields.path(kind))
    uuid = fields.string("uuid", longest=256)
    part = _read_medium(kind, medium, uuid or None)
    medium.close()
    fields.close()
    return part


def _read_medium(kind: MediaKind, fields: Fields, uuid: str | None) -> MediaPart:
    if kind == "input_audio":
        data, sound = fields.filled("data"), fields.choice("format", AudioFormat) or "wav"
        return MediaPart(
            kind=kind,
            url=f"data:audio/{sound};base64,{data}",
            where=fields.path("data"),
            uuid=uuid,
        )
    if kind == "image_embeds" and (tensor := fields.take("tensor")) is not None:
        place = _read_place(tensor, fields)
        return MediaPart(kind=kind, url="", where=fields.path("tensor"), uuid=uuid, tensor=place)
    url, where = fields.filled("url"), fields.path("url")
    if kind == "image_url":
        detail = cast("Detail", fields.choice("detail", Detail) or "auto")
        return MediaPart(kind=kind, url=url, where=where, uuid=uuid, detail=detail)
    if kind == "video_url":
        frames = fields.integer("num_frames", 1, _MAX_FRAMES)
        fps = fields.number("fps", 0, 1000, above=True)
        if frames is not None and fps is not None:
            raise wrong(fields.path("fps"), f"must not be given with num_frames={frames}", fps)
        return MediaPart(kind=kind, url=url, where=where, uuid=uuid, num_frames=frames, fps=fps)
    if kind == "audio_url":
        rate = fields.integer("sampling_rate", 1, _MAX_RATE)
        return MediaPart(kind=kind, url=url, where=where, uuid=uuid, sampling_rate=rate)
    return MediaPart(kind=kind, url=url, where=where, uuid=uuid)


def _read_place(value: object, part: Fields) -> TensorPlace:
    """The ``tensor`` of an ``image_embeds``, and the grid beside it."""
    if (url := part.take("url")) is not None:
        raise wrong(part.path("url"), "must not be given with a tensor", url)
    fields = Fields(value, part.path("tensor"))
    shape, dtype = fields.integers("shape", 2, 1, _MAX_EXTENT), fields.choice("dtype", EmbedsDType)
    for name, given in (("shape", shape), ("dtype", dtype)):
        if given is None:
            raise InvalidValue("is required", where=fields.path(name))
    place = TensorPlace(
        offset=fields.integer("offset", 0, _MAX_OFFSET) or 0,
        shape=cast("tuple[int, int]", shape),
        dtype=cast("EmbedsDType", dtype),
        grid_thw=cast("GridTHW | None", part.integers("image_grid_thw", 3, 1, _MAX_GRID)),
    )
    fields.close()
    return place


def _write_part(part: Part) -> dict[str, object]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    medium: dict[str, object] = {"url": part.url}
    if part.kind == "input_audio":
        start, _, data = part.url.partition(";base64,")
        medium = {"data": data, "format": start.removeprefix("data:audio/")}
    elif part.tensor is not None:
        place = part.tensor
        shape = list(place.shape)
        medium = {"tensor": {"offset": place.offset, "shape": shape, "dtype": place.dtype}}
        if place.grid_thw:
            medium["image_grid_thw"] = list(place.grid_thw)
    elif part.detail != "auto":
        medium["detail"] = part.detail
    options = {name: getattr(part, name) for name in ("num_frames", "fps", "sampling_rate")}
    medium |= {name: value for name, value in options.items() if value is not None}
    written: dict[str, object] = {"type": part.kind, part.kind: medium}
    if part.uuid is not None:
        written["uuid"] = part.uuid
    return written
