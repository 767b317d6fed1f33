"""What the stage and SGLang's process say to each other, over a pair of Unix sockets.

    stage ──Begin──▶ process          once, and then Ready or Failed comes back
          ──Generate, Abort──▶
          ◀──Output, Failed──

A frame is the length of the message and of what follows it (two unsigned 32 and 64 bit integers,
little endian), the message as MessagePack, and the tensors that it names, as raw bytes end to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from triptych.contract import DType

if TYPE_CHECKING:
    import torch

CHILD_FAILED = 70
"""Exit status of SGLang's process after one below it has failed; `os.EX_SOFTWARE`."""
_LENGTHS = struct.Struct("<IQ")


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor behind the message."""

    dtype: DType
    shape: tuple[int, ...]


class Embeddings(msgspec.Struct, frozen=True):
    """All items of one modality of a request."""

    modality: str
    """``IMAGE`` or ``VIDEO``, as SGLang has it."""
    spec: TensorSpec
    """(tokens of all items, width)."""
    hash: int
    """By which SGLang finds keys and values again; it says all that they hang on."""
    fields: dict[str, Any]
    """What else SGLang is told of them: ``image_grid_thw`` and such, as lists."""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Start SGLang."""

    settings: dict[str, Any]
    """`DecodeSettings`."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """SGLang serves."""

    context_length: int
    """Tokens of prompt and answer together."""
    dtype: DType
    """Of the language model."""
    pids: tuple[int, ...]
    """The processes that SGLang has started."""


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Generate the answer to a prompt."""

    id: str
    token_ids: list[int]
    """With every placeholder spread out."""
    sampling: dict[str, Any]
    """SGLang's sampling parameters."""
    top_logprobs: int | None = None
    """None: no logprobs."""
    media: tuple[Embeddings, ...] = ()
    transfer: dict[str, Any] = {}
    """`Prompt.kv_transfer`."""
    priority: int = 0
    """Lower goes first."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End a generation; nothing more comes of it."""

    id: str


Scored: TypeAlias = tuple[int, float]
"""A token's id and the natural logarithm of its probability."""


class Output(msgspec.Struct, frozen=True, tag="output"):
    """What a generation adds to its answer."""

    id: str
    text: str
    token_ids: list[int]
    cached_tokens: int
    finish: Literal["", "stop", "length"] = ""
    """Of the last output, why there is no other."""
    logprobs: tuple[Scored, ...] = ()
    top_logprobs: tuple[tuple[Scored, ...], ...] = ()


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A generation, or the start, has failed."""

    error: str
    """A `TriptychError` as it crosses a wire."""
    id: str = ""
    """Empty: the start."""


Message: TypeAlias = Begin | Ready | Generate | Abort | Output | Failed

_DECODER = msgspec.msgpack.Decoder(Message)
_ENCODER = msgspec.msgpack.Encoder()


class Channel:
    """One end of the pair, on the event loop that runs when it is made.

    Messages are posted without waiting, and one task writes them, so that no cancelled sender
    leaves half a frame behind.

    Args:
        end: Closed by `close`.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._loop = asyncio.get_running_loop()
        self._reading = asyncio.Lock()
        self._posted: asyncio.Queue[Sequence[bytes | memoryview]] = asyncio.Queue()
        self._writer = self._loop.create_task(self._write())

    def post(self, message: Message, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Send a message with the tensors that it names, which stay as they are until then."""
        head = _ENCODER.encode(message)
        parts = [_octets(tensor) for tensor in tensors]
        lengths = _LENGTHS.pack(len(head), sum(part.nbytes for part in parts))
        self._posted.put_nowait([lengths + head, *parts])

    async def receive(self) -> tuple[Message, memoryview]:
        """The next message, and the bytes of its tensors.

        Raises:
            EOFError: The other end is closed.
        """
        async with self._reading:
            head, body = _LENGTHS.unpack(await self._read(_LENGTHS.size))
            return _DECODER.decode(await self._read(head)), await self._read(body)

    async def close(self) -> None:
        """Close this end, which ends a `receive` under way; a second call does nothing."""
        self._writer.cancel()
        await asyncio.wait([self._writer])
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        async with self._reading:
            self._socket.close()

    async def _read(self, size: int) -> memoryview:
        whole = memoryview(bytearray(size))
        rest = whole
        while rest:
            try:
                count = await self._loop.sock_recv_into(self._socket, rest)
            except OSError as error:
                raise EOFError(str(error)) from None
            if count == 0:
                raise EOFError("the other end is closed")
            rest = rest[count:]
        return whole

    async def _write(self) -> None:
        with contextlib.suppress(OSError):  # whoever reads is told so by the reading side
            while True:
                for part in await self._posted.get():
                    await self._loop.sock_sendall(self._socket, part)


def tensor(spec: TensorSpec, octets: memoryview, offset: int) -> tuple[torch.Tensor, int]:
    """A view of the tensor that starts at ``offset``, and where the next one starts."""
    import torch

    dtype = getattr(torch, spec.dtype)
    count = 1
    for extent in spec.shape:
        count *= extent
    view = torch.frombuffer(octets, dtype=dtype, count=count, offset=offset).view(spec.shape)
    return view, offset + view.nbytes


def _octets(data: torch.Tensor) -> memoryview:
    import torch

    return memoryview(data.contiguous().view(torch.uint8).reshape(-1).numpy())
