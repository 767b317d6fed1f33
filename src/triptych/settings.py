"""Every setting of the stages, with its default, its unit and its meaning.

A stage reads its settings once, when its model loads: the ``parameters`` of its config.pbtxt,
overruled by environment variables ``TRIPTYCH_<NAME>``, which is how ``triptych serve`` passes its
flags on. A name that no stage has is an error, wherever it stands.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import msgspec

from triptych.errors import ConfigurationError

PREFIX = "TRIPTYCH_"

Positive = Annotated[int, msgspec.Meta(gt=0)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every stage has."""

    model: str
    """Directory of the checkpoint in Hugging Face's layout."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What of ``triptych.*`` goes to the server's log."""
    log_requests: bool = True
    """One line of JSON in the log for each request, without its content."""
    log_content: bool = False
    """What callers wrote may be in the log too: requests, their media cut short, and the words of
    errors, which quote them."""
    otlp_endpoint: str = ""
    """Where traces go: a collector's URL for OTLP over HTTP, such as
    ``http://localhost:4318/v1/traces``; empty: nowhere."""


class MediaSettings(Settings, frozen=True, kw_only=True):
    """What a caller may send and from where; see `triptych.media`."""

    allowed_local_media_path: str = ""
    """Directory under which ``file://`` is served; empty: nowhere."""
    allowed_media_domains: tuple[str, ...] = ()
    """When given, the only hosts that media is fetched from."""
    allow_private_media_hosts: tuple[str, ...] = ()
    """Hosts (name or address) that may resolve to addresses that are not public."""
    max_file_size_mb: Positive = 50
    """Bytes of one medium, in MiB, before it is decoded."""
    fetch_timeout_s: PositiveSeconds = 30.0
    """Whole fetch of an image, a sound or an embedding, in seconds."""
    video_fetch_timeout_s: PositiveSeconds = 60.0
    """Whole fetch of a video, in seconds."""
    connect_timeout_s: PositiveSeconds = 10.0
    """Until a connection stands, in seconds; within the limit of the whole fetch."""
    max_redirects: Annotated[int, msgspec.Meta(ge=0)] = 3
    """Redirects that one fetch follows, each checked anew."""
    max_connections: Positive = 64
    """Connections that one preprocess instance holds at a time."""
    media_proxy: str = ""
    """URL of an HTTP proxy that fetches everything, and must check addresses itself, since only it
    sees them; empty: none. ``HTTP_PROXY`` and its like are never read."""
    max_image_pixels: Positive = 50_000_000
    """Width × height, from the header, before decoding."""
    max_items: Positive = 32
    """Media in one request."""
    image_mode: Literal["exact", "fast"] = "exact"
    """``exact``: the pixels of Hugging Face's processor. ``fast``: scaled while it is decoded."""
    decode_timeout_s: PositiveSeconds = 20.0
    """Decoding of one medium, in seconds."""
    media_workers: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Decoding processes of one preprocess instance; 0: one a core, 4 at most."""
    media_worker_memory_mb: Positive = 2048
    """Private memory of one decoding process, in MiB."""
    max_queued_media: Positive = 256
    """Media that wait for a decoding process; more are turned away."""
    image_max_file_size_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Overrides ``max_file_size_mb`` for images; 0: does not."""
    video_max_file_size_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Overrides ``max_file_size_mb`` for videos; 0: does not."""
    audio_max_file_size_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Overrides ``max_file_size_mb`` for sounds; 0: does not."""
    embeddings_max_file_size_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Overrides ``max_file_size_mb`` for precomputed embeddings; 0: does not."""
    num_frames: Positive = 8
    """Frames of a video when the caller asks for no number."""
    max_frames: Positive = 32
    """Frames of a video that a caller may ask for."""
    max_video_seconds: PositiveSeconds = 3600.0
    """Length of a video, in seconds."""
    max_video_pixels: Positive = 8_847_360
    """Width × height of a video's frame: 4096 × 2160."""
    max_decoded_frames: Positive = 20_000
    """Frames that may be decoded on the way to the chosen ones."""
    max_audio_seconds: PositiveSeconds = 600.0
    """Length of a sound, in seconds."""
    max_audio_channels: Positive = 8
    """Channels of a sound, before they are mixed to one."""
    max_embedding_tokens: Positive = 32_768
    """Rows of a precomputed embedding."""
    allow_pickle_embeddings: bool = False
    """Take ``.pt``, ``.pth`` and ``.bin`` too, read by a process of their own, ``weights_only``."""
    media_cache_mb: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Decoded media kept by one preprocess instance, in MiB; 0: none."""
    media_cache_urls: Positive = 10_000
    """URLs whose validators are remembered."""


class PreprocessSettings(MediaSettings, frozen=True, kw_only=True):
    """The stage ``preprocess``."""

    max_model_len: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Tokens of prompt and answer together; 0: what the checkpoint says."""
    max_request_mb: Positive = 128
    """Bytes of one REQUEST, and of the TENSORS beside it, in MiB."""
    max_inflight_requests: Annotated[int, msgspec.Meta(ge=0)] = 1024
    """Requests that the server has in hand, over all its stages; more are turned away before
    anything is done for them. 0: no limit."""
    max_inflight_media: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Requests with media among those; more of them are turned away, so that there is room for
    text. 0: three quarters of ``max_inflight_requests``."""
    max_inflight_media_mb: Annotated[int, msgspec.Meta(ge=0)] = 2048
    """Bytes of media that are being loaded, over all instances, in MiB, as they come: in requests,
    over the network and out of files. A request with media that would make them more is turned
    away. 0: no limit."""
    max_inflight_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Tokens, of prompts and of the answers asked for, that ``decode_*`` has in hand; while there
    are more, requests are turned away. 0: no limit."""
    chat_template: str = ""
    """In place of the checkpoint's own template: the path of a Jinja file, or one of SGLang's
    conversations by name, such as ``qwen2-vl``."""
    encoder_model: str = "encoder"
    """Name of the model that follows in the ensemble. It is asked which media it holds, so that
    they need not be decoded and sent; empty: it is not asked."""


class HandoverSettings(Settings, frozen=True, kw_only=True):
    """What both ends of the road NIXL have; see `triptych.handover`."""

    handover_at_start: bool = False
    """Make NIXL's agent when the model loads; else when the first request needs it, which then
    waits some two seconds longer."""
    handover_key: str = ""
    """Secret that encoders prove themselves with to decode. Empty: one that this user's processes
    on this host share."""


class EncoderSettings(HandoverSettings, frozen=True, kw_only=True):
    """The stage ``encoder``."""

    encoder_device: str = "auto"
    """``auto``: the GPU that Triton gave the instance, else the CPU; or a torch device."""
    encoder_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 on a GPU, float32 on the CPU."""
    encoder_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Threads of the CPU encoder; 0: all cores."""
    max_encoder_tokens: Positive = 4096
    """Embeddings of one forward pass; what exceeds it waits for the next. A clip that is larger by
    itself goes in parts, and smaller media between them; a picture has a pass of its own."""
    encoder_graph_tokens: Annotated[int, msgspec.Meta(ge=0)] = 1024
    """Embeddings of the largest forward pass that a GPU replays as a CUDA graph when media of the
    same sizes come again and again; 0: none."""
    encoder_cache_mb: Annotated[int, msgspec.Meta(ge=0)] = 512
    """Embeddings kept on the device by one encoder instance, in MiB; 0: none."""
    encoder_host_cache_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Embeddings kept in host memory when they must leave the device, in MiB; 0: none."""
    encoder_lease_s: PositiveSeconds = 120.0
    """How long embeddings are held for a request that counts on them and brings no pixels, in
    seconds: the time it may take from preprocess to the encoder."""
    handover_arena_mb: Positive = 1024
    """Embeddings that wait for their readers, in MiB; memory that is touched as it is needed on
    the CPU, and taken at once on a GPU."""
    handover_lease_s: PositiveSeconds = 60.0
    """How long embeddings wait for their reader, in seconds."""


class RemoteEncoderSettings(Settings, frozen=True, kw_only=True):
    """The stage ``remote_encoder``; see `triptych.remote`."""

    encoder_addresses: tuple[str, ...] = ()
    """Triton's gRPC on the servers that run ``encoder``, ``host:port`` or ``grpcs://host:port``."""
    encoder_timeout_s: PositiveSeconds = 60.0
    """Encoding of one request there, other servers tried included, in seconds."""
    encoder_health_interval_s: PositiveSeconds = 1.0
    """Between two looks at whether a server is ready, in seconds."""
    encoder_health_timeout_s: PositiveSeconds = 3.0
    """A server that says nothing for so long is taken for lost, in seconds."""
    encode_again_mb: Annotated[int, msgspec.Meta(ge=0)] = 1024
    """Pixels kept for a minute, lest decode cannot read what was made of them, in MiB; 0: none."""


class DecodeSettings(HandoverSettings, frozen=True, kw_only=True):
    """The stages ``decode_*``."""

    max_model_len: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Tokens of prompt and answer together; 0: what the checkpoint says."""
    engine_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: the checkpoint's on a GPU, float32 on the CPU."""
    max_num_seqs: Positive = 64
    """Requests that the engine generates for at a time."""
    engine_args: str = ""
    """Path of a JSON file whose object goes to the engine as it is."""
    allow_kv_transfer: bool = False
    """Take the request parameter ``kv_transfer_params``, which names hosts that the engine connects
    to; for servers that only a trusted router reaches."""
    embedding_ingest: Literal["inline", "connector"] = "inline"
    """How embeddings get into the engine. ``inline``: this stage has them, and they go with the
    request. ``connector``: the request has their ticket, and the engine fetches them by NIXL into
    the memory of its device; for vLLM with one worker, and ensembles that map no EMBEDDINGS. What
    waits in the engine's queue for longer than ``handover_lease_s`` of the encoder is lost."""
    handover_buffer_mb: Positive = 1024
    """Embeddings fetched by NIXL that the engine has not taken yet, in MiB; touched as needed, but
    of a GPU, where ``connector`` has them, taken at once."""
    handover_timeout_s: PositiveSeconds = 10.0
    """Fetching of one request's embeddings, in seconds."""
    echo_token_delay_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Pause of the engine ``echo`` before each token, in seconds."""


STAGES: tuple[type[Settings], ...] = (
    PreprocessSettings,
    EncoderSettings,
    RemoteEncoderSettings,
    DecodeSettings,
)

NAMES: frozenset[str] = frozenset(name for stage in STAGES for name in stage.__struct_fields__)
"""Every setting that some stage has."""

SECRETS = frozenset({"handover_key", "media_proxy"})
"""Those whose values are shown to nobody: a proxy's URL may have a password in it."""

SettingsType = TypeVar("SettingsType", bound=Settings)


def load(
    kind: type[SettingsType],
    parameters: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> SettingsType:
    """The settings of one stage.

    Args:
        kind: The stage's struct.
        parameters: The ``parameters`` of its config.pbtxt. Names in capitals are Triton's own
            and are passed over.
        environ: ``os.environ`` unless given.

    Raises:
        ConfigurationError: A name that nothing has, or a value of the wrong type or range.
    """
    environ = os.environ if environ is None else environ
    raw = {key: value for key, value in (parameters or {}).items() if not key.isupper()}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in NAMES:
            raise ConfigurationError(f"{variable} is set, but there is no setting {name!r}")
        if name in kind.__struct_fields__:
            raw[name] = value
    if not raw.get("model"):
        raise ConfigurationError(
            f"no model: set {PREFIX}MODEL to the checkpoint's directory, "
            "or the parameter 'model' in config.pbtxt"
        )
    try:
        return msgspec.convert(_split(kind, raw), kind, strict=False)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        given = f"the setting {name} is {raw[name]!r}" if name in raw else kind.__name__
        raise ConfigurationError(f"{given}: {what.partition(', got')[0]}") from None


def as_environ(values: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables that set ``values`` in every stage that has them."""
    return {
        PREFIX + name.upper(): ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }


def _split(kind: type[Settings], raw: Mapping[str, str]) -> dict[str, object]:
    """Fields that are tuples are written with commas."""
    hints = get_type_hints(kind)
    return {
        name: tuple(part.strip() for part in value.split(",") if part.strip())
        if hints.get(name) == tuple[str, ...]
        else value
        for name, value in raw.items()
    }
