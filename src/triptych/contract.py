"""The tensors that pass between the models, and the JSON inside them. Their only home.

    model       tensor      type, dims       what
    chat_*  in  REQUEST     BYTES [1]        one OpenAI chat-completions request, JSON; or one with
                                             a raw `prompt` in place of `messages`
            in  TENSORS     UINT8 [-1]       embeddings that the request's parts name, end to end,
                                             as raw bytes (optional)
            out TEXT        BYTES [1]        the text added since the last response
            out CHUNK       BYTES [1]        the same as an OpenAI chat.completion.chunk, JSON
    preprocess
            in  REQUEST, TENSORS (optional)
            out PROMPT      BYTES [1]        `Prompt`
            out MEDIA       UINT8 [1,-1]     every item's bytes, end to end
            out ITEMS       BYTES [1,1]      `Items`
    encoder, remote_encoder
            in  MEDIA, ITEMS
            out EMBEDDINGS  UINT8 [1,-1]     every item's embeddings, end to end, as raw bytes
            out TICKET      BYTES [1,1]      `Ticket`
    decode_* in PROMPT, TICKET, EMBEDDINGS (optional)

A tensor of raw bytes carries any dtype and stays zero-copy (``tensor.view(torch.uint8)``).
The ensemble's wiring chooses the road: one that maps EMBEDDINGS hands over inside Triton,
one that maps only TICKET hands over by NIXL.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

REQUEST = "REQUEST"
REQUEST_TENSORS = "TENSORS"
TEXT = "TEXT"
CHUNK = "CHUNK"
PROMPT = "PROMPT"
MEDIA = "MEDIA"
ITEMS = "ITEMS"
EMBEDDINGS = "EMBEDDINGS"
TICKET = "TICKET"


class TensorSpec(NamedTuple):
    """Type and shape of a tensor on the wire, whatever model it belongs to."""

    datatype: Literal["BYTES", "UINT8"]
    shape: tuple[int, ...]
    """-1: any extent. A batch dimension of the encoder is among them."""
    optional: bool = False
    """A request may come without it."""


TENSORS: dict[str, TensorSpec] = {
    REQUEST: TensorSpec("BYTES", (1,)),
    REQUEST_TENSORS: TensorSpec("UINT8", (-1,), optional=True),
    TEXT: TensorSpec("BYTES", (1,)),
    CHUNK: TensorSpec("BYTES", (1,)),
    PROMPT: TensorSpec("BYTES", (1,)),
    MEDIA: TensorSpec("UINT8", (1, -1)),
    ITEMS: TensorSpec("BYTES", (1, 1)),
    EMBEDDINGS: TensorSpec("UINT8", (1, -1), optional=True),
    TICKET: TensorSpec("BYTES", (1, 1)),
}

MODELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": ((REQUEST, REQUEST_TENSORS), (TEXT, CHUNK)),
    "preprocess": ((REQUEST, REQUEST_TENSORS), (PROMPT, MEDIA, ITEMS)),
    "encoder": ((MEDIA, ITEMS), (EMBEDDINGS, TICKET)),
    "remote": ((MEDIA, ITEMS), (EMBEDDINGS, TICKET)),
    "decode": ((PROMPT, TICKET, EMBEDDINGS), (TEXT, CHUNK)),
}
"""Inputs and outputs of each model, by its name up to the first underscore."""

TRACEPARENT = "traceparent"
"""Parameter of a request to an ensemble: the caller's place in a trace, as the W3C has it."""
KV_TRANSFER = "kv_transfer_params"
"""Parameter of a request to an ensemble or to ``decode_*``: JSON object that goes to the engine as
it is, and says where the prompt's keys and values are, or whom they are for."""
OUTPUTS = "outputs"
"""Parameter of a request to an ensemble or to ``decode_*``: names of outputs, by commas, that are
all that the caller reads. An ensemble asks its steps for every output, whoever asked it for what;
with many streams each tensor of a response counts."""
ABORT = "abort"
"""Request parameter of ``decode_*``: its value is the Triton request id whose generation ends."""

ORDER = "order"
"""Name of an `Order` among what an engine is told with a request."""

ITEM_ALIGNMENT = 64
"""Every item starts at a multiple of this many bytes in MEDIA and EMBEDDINGS, so that a view of
any dtype is aligned and a copy of it is vectorised."""

Modality = Literal["image", "video", "audio"]
DType = Literal["uint8", "float16", "bfloat16", "float32"]
ITEM_SIZE: dict[DType, int] = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of one element."""

GridTHW = tuple[int, int, int]
"""Patches in time, height and width, before merging (Qwen-VL's ``grid_thw``)."""


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """One medium of a request, as preprocess hands it to the encoder.

    The bytes at ``offset`` in MEDIA are a C-contiguous array of ``dtype`` and ``shape``.
    """

    modality: Modality
    hash: str
    """Hex digest of the content and of every setting that changes the embeddings."""
    dtype: DType
    shape: tuple[int, ...]
    """image: (height, width, 3) · video: (frames, height, width, 3) · audio: (samples,) ·
    precomputed embeddings: (tokens, width)."""
    offset: int
    """Bytes from the start of MEDIA."""
    tokens: int
    """How many embeddings the item becomes, which is how many places it takes in the prompt."""
    grid_thw: GridTHW | None = None
    second_per_grid: float | None = None
    """Seconds from one temporal patch of a video to the next."""
    precomputed: bool = False
    """The bytes are embeddings already; the encoder hands them on unchanged."""
    lease: str = ""
    """The encoder's word that it holds what the embeddings come from: the item has no bytes in
    MEDIA, and ``shape`` is that of the bytes it would have. Good for one use."""
    keep: bool = True
    """False: whoever it came from forbids that anything made of it is stored."""

    @property
    def nbytes(self) -> int:
        """Length in MEDIA, bytes."""
        return 0 if self.lease else _nbytes(self.shape, self.dtype)


class ImagePlan(msgspec.Struct, frozen=True):
    """What a family asks of one picture before it is decoded: the size the tower wants it in."""

    resize: tuple[int, int]
    """(height, width) to scale to, pixels."""
    tokens: int
    crop: tuple[int, int] | None = None
    """(height, width) to cut out of the middle after scaling; None: nothing is cut."""
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    grid_thw: GridTHW | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of the pixels that go into MEDIA."""
        return (*(self.crop or self.resize), 3)


class VideoPlan(msgspec.Struct, frozen=True):
    """What a family asks of the frames that were chosen from a clip."""

    resize: tuple[int, int]
    """(height, width) to scale every frame to, pixels."""
    tokens: int
    crop: tuple[int, int] | None = None
    """(height, width) to cut out of the middle after scaling; None: nothing is cut."""
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    grid_thw: GridTHW | None = None
    second_per_grid: float | None = None
    """Seconds from one temporal patch to the next."""


class AudioPlan(msgspec.Struct, frozen=True):
    """What a family makes of a sound."""

    tokens: int


class Items(msgspec.Struct, frozen=True):
    """ITEMS: the media of one request, in the order of their placeholders in the prompt."""

    items: list[Item]
    deadline: float = 0.0
    """`Prompt.deadline`."""


class NixlSpan(msgspec.Struct, frozen=True):
    """Where an item's embeddings lie in memory that an encoder has registered with NIXL."""

    agent: str
    """Which of `Ticket.agents` owns the memory."""
    memory: Literal["host", "cuda"]
    device: int
    """Ordinal of the GPU; 0 for host memory."""
    header: int
    """Address of the header before all that was published together; it names the generation."""
    address: int
    """Address of the embeddings' first byte, after ``header``."""
    generation: int
    """Unlike that of anything else that ever lies there. It is the lease's name too."""
    checksum: str
    """``<algorithm>:<hex digits>`` of the bytes; see `triptych.handover.seal`."""


class NixlAgent(msgspec.Struct, frozen=True):
    """How to reach an owner of memory; JSON has the bytes in base64."""

    metadata: bytes
    """NIXL's own form. Only loaded if ``proof`` holds."""
    proof: bytes
    """That the metadata come from an encoder of ours; see `triptych.handover.trust`."""


class TicketItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one item's embeddings are, and what they are."""

    modality: Modality
    hash: str
    dtype: DType
    shape: tuple[int, int]
    """(tokens, width)."""
    offset: int
    """Bytes from the start of EMBEDDINGS; without meaning on another road."""
    where: Literal["tensor", "nixl"] = "tensor"
    grid_thw: GridTHW | None = None
    second_per_grid: float | None = None
    nixl: NixlSpan | None = None
    """Where the bytes are if ``where`` is ``nixl``."""

    @property
    def nbytes(self) -> int:
        """Length, bytes."""
        return _nbytes(self.shape, self.dtype)


class Again(msgspec.Struct, frozen=True):
    """How a reader that cannot read a ticket's embeddings has them encoded once more."""

    model: str
    """Name of the model of its own server that it asks."""
    items: list[Item]
    """The ITEMS to ask with; all have a lease, so MEDIA is empty."""


class Ticket(msgspec.Struct, frozen=True, omit_defaults=True):
    """TICKET: the receipt of one request's encoded media, in prompt order."""

    items: list[TicketItem]
    agents: dict[str, NixlAgent] = {}
    """The owners of the items' memory, by name."""
    again: Again | None = None
    """None: what was encoded is in EMBEDDINGS, or the encoder cannot do it again."""


class Order(msgspec.Struct, frozen=True):
    """What an engine that fetches embeddings itself gets with a request in their place, as JSON."""

    id: str
    """By which it is asked why the request failed."""
    ticket: Ticket


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to draw tokens; the field names and meanings are OpenAI's, then vLLM's extensions."""

    max_tokens: int
    """Tokens the answer may have; preprocess has already fitted it to the context."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    json_schema: str = ""
    """JSON schema, as JSON, that the whole answer fulfils; empty: none."""
    structural_tag: str = ""
    """XGrammar's structural tag, as JSON, that the whole answer fulfils; empty: none. Never given
    with ``json_schema``."""
    priority: int = 0
    """Whose turn it is where requests wait: the lower goes first, whenever it came."""


class PromptItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One medium's place in `Prompt.token_ids`."""

    modality: Modality
    position: int
    """Index in ``token_ids`` of the item's single placeholder token."""
    tokens: int
    """How many embeddings the placeholder stands for."""
    hash: str
    spread: list[int] = []
    """What stands in the placeholder's place when it is spread out; empty: the placeholder,
    ``tokens`` times. Some models have text between the embeddings of a clip."""
    times: tuple[float, ...] = ()
    """Seconds that ``spread`` names, one a step of a clip."""
    cached: bool = False
    """The encoder had its embeddings: it was neither decoded nor encoded for this request."""

    @property
    def length(self) -> int:
        """Tokens in the placeholder's place."""
        return len(self.spread) or self.tokens


class Prompt(msgspec.Struct, frozen=True, omit_defaults=True):
    """PROMPT: all that decode needs to know of a request except the embeddings.

    ``token_ids`` hold one placeholder token an item, which is what vLLM wants; engines that want
    the places spread out ask for `expanded`.
    """

    id: str
    """Id of the answer, ``chatcmpl-…``, unique."""
    created: int
    """Seconds since the epoch."""
    model: str
    """The name to put in the chunks."""
    token_ids: list[int]
    items: list[PromptItem]
    sampling: Sampling
    stream: bool = False
    """False: one response with the whole answer."""
    include_usage: bool = True
    usage_with_finish: bool = False
    """The usage of a stream goes into the chunk with the finish reason, not into one more."""
    tools: tuple[str, ...] = ()
    """Names of the functions whose calls are read out of the text; empty: there are none."""
    kv_transfer: dict[str, Any] = {}
    """`KV_TRANSFER`; decode puts it in."""
    traceparent: str = ""
    """The caller's place in a trace, as the W3C has it; empty: none was given."""
    arrived: float = 0.0
    """When preprocess got the request, seconds of this machine's `time.monotonic`."""
    deadline: float = 0.0
    """When its answer must be whole, likewise: `arrived` and Triton's ``timeout`` of the request;
    0: it has time."""
    decoded: float = 0.0
    """When its last medium was decoded, likewise; without one, when the prompt was ready."""

    @property
    def length(self) -> int:
        """Tokens of the prompt with every placeholder spread out: OpenAI's ``prompt_tokens``."""
        return len(self.token_ids) + sum(item.length - 1 for item in self.items)

    def expanded(self) -> list[int]:
        """The token ids with each item's placeholder spread out."""
        ids: list[int] = []
        start = 0
        for item in self.items:
            ids += self.token_ids[start : item.position]
            ids += item.spread or [self.token_ids[item.position]] * item.tokens
            start = item.position + 1
        return ids + self.token_ids[start:]


Payload = TypeVar("Payload", Prompt, Items, Ticket)

_ENCODER = msgspec.json.Encoder()
_DECODERS = {kind: msgspec.json.Decoder(kind) for kind in (Prompt, Items, Ticket)}


def encode(payload: Prompt | Items | Ticket) -> bytes:
    """The JSON that goes into PROMPT, ITEMS or TICKET."""
    return _ENCODER.encode(payload)


def decode(data: bytes, kind: type[Payload]) -> Payload:
    """Read PROMPT, ITEMS or TICKET back; `msgspec.ValidationError` names the field at fault."""
    return _DECODERS[kind].decode(data)  # type: ignore[return-value]


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the next item's start."""
    return -(-nbytes // ITEM_ALIGNMENT) * ITEM_ALIGNMENT


def _nbytes(shape: tuple[int, ...], dtype: DType) -> int:
    count = ITEM_SIZE[dtype]
    for extent in shape:
        count *= extent
    return count
