"""A conversation in OpenAI's form, and short ways to write one.

    [
        system("You describe pictures."),
        user("How many circles?", image("a.png"), image("https://example.org/b.jpg")),
    ]

The helpers return plain dicts, so JSON from elsewhere serves as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, Required, TypeAlias, TypedDict

from triptych_client.answers import ToolCall
from triptych_client.media import Source, locate
from triptych_client.tensors import Embeddings


class ImageURL(TypedDict, total=False):
    """Where a picture is."""

    url: Required[str]
    """``http(s):``, ``data:``, or ``file:`` on the server's machine where it allows that."""
    detail: Literal["auto", "low", "high"]


class URL(TypedDict):
    """Where a clip or a sound is."""

    url: str


class TextPart(TypedDict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


class VideoPart(TypedDict):
    """A clip."""

    type: Literal["video_url"]
    video_url: URL


class AudioPart(TypedDict):
    """A sound."""

    type: Literal["audio_url"]
    audio_url: URL


class ImageEmbeds(TypedDict, total=False):
    """What a picture has become elsewhere."""

    tensor: Required[Embeddings]
    image_grid_thw: tuple[int, int, int]


class ImageEmbedsPart(TypedDict):
    """A picture's embeddings in its place."""

    type: Literal["image_embeds"]
    image_embeds: ImageEmbeds


Part: TypeAlias = TextPart | ImagePart | VideoPart | AudioPart | ImageEmbedsPart


class CalledFunction(TypedDict):
    """What was to be called."""

    name: str
    arguments: str
    """A JSON object."""


class Call(TypedDict):
    """A call of a tool that the model asked for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(TypedDict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    tool_calls: NotRequired[list[Call]]
    """Of the assistant."""
    tool_call_id: NotRequired[str]
    """Of a tool: which call it answers."""


def text(content: str) -> TextPart:
    """A piece of text between media; in `user` and its like a plain string does."""
    return {"type": "text", "text": content}


def image(source: Source, *, detail: Literal["auto", "low", "high"] | None = None) -> ImagePart:
    """A picture for a message.

    Args:
        source: A path (read here and sent along), a URL or ``data:`` URI (sent as it is), the
            bytes of an image file, a `PIL.Image.Image`, or an array of uint8 (height, width),
            (height, width, 3) or (height, width, 4). The last two are sent as PNG.
        detail: OpenAI's hint.

    Raises:
        MediaUnreachable: The file is not there or may not be read.
        MediaUnreadable: It is empty.
        MediaType: It is no picture, or of a format that nobody knows.
    """
    url: ImageURL = {"url": locate(source, "image")}
    if detail is not None:
        url["detail"] = detail
    return {"type": "image_url", "image_url": url}


def image_embeds(
    embeddings: Any, *, grid_thw: tuple[int, int, int] | None = None
) -> ImageEmbedsPart:
    """A picture's embeddings for a message, sent as raw bytes beside it. gRPC alone carries them.

    Args:
        embeddings: What the served model's tower and projector make of the picture: a numpy array
            or torch tensor of float32, float16 or bfloat16, of shape (tokens, width).
        grid_thw: Steps, rows and columns of patches, which the Qwen-VL families need.

    Raises:
        InvalidValue: It is no such array.
    """
    found: ImageEmbeds = {"tensor": Embeddings(embeddings)}
    if grid_thw is not None:
        found["image_grid_thw"] = grid_thw
    return {"type": "image_embeds", "image_embeds": found}


def video(source: Source) -> VideoPart:
    """A clip for a message: a path, a URL, a ``data:`` URI or the bytes of a file.

    Raises:
        MediaError: As of `image`.
    """
    return {"type": "video_url", "video_url": {"url": locate(source, "video")}}


def audio(source: Source) -> AudioPart:
    """A sound for a message: a path, a URL, a ``data:`` URI or the bytes of a file.

    Raises:
        MediaError: As of `image`.
    """
    return {"type": "audio_url", "audio_url": {"url": locate(source, "audio")}}


def user(*parts: str | Part) -> Message:
    """What a person says, with the media in the order they are to be seen."""
    return {"role": "user", "content": _content(parts)}


def system(*parts: str | Part) -> Message:
    """What the model is told beforehand."""
    return {"role": "system", "content": _content(parts)}


def assistant(*parts: str | Part, tool_calls: Sequence[ToolCall] = ()) -> Message:
    """What the model said in an earlier turn, with the calls of its answer."""
    message: Message = {"role": "assistant", "content": _content(parts) if parts else ""}
    if tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in tool_calls
        ]
    return message


def tool(call: ToolCall, *parts: str | Part) -> Message:
    """What a call of the model's came to."""
    return {"role": "tool", "tool_call_id": call.id, "content": _content(parts)}


def _content(parts: tuple[str | Part, ...]) -> str | list[Part]:
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [text(part) if isinstance(part, str) else part for part in parts]
