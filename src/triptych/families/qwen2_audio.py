"""Qwen2-Audio: sounds of up to half a minute, Whisper's log-mel spectrogram and encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from triptych.contract import AudioPlan, GridTHW, ImagePlan, Item, Modality, TicketItem
from triptych.errors import (
    ConfigurationError,
    InvalidValue,
    MediaError,
    MediaTooLarge,
    UnsupportedMedium,
)
from triptych.families.base import Family, Tower
from triptych.families.checkpoint import Checkpoint
from triptych.families.fields import Activation, Positive, Zero, read_config
from triptych.families.text import text_config

if TYPE_CHECKING:
    import torch

MIN_FRAMES = 3
"""Frames of the spectrogram that make one token; fewer make none."""


class FeatureExtractor(msgspec.Struct, frozen=True):
    """preprocessor_config.json; the defaults are those of transformers' WhisperFeatureExtractor."""

    feature_size: Positive = 80
    """Bands of the mel scale."""
    sampling_rate: Positive = 16_000
    """Samples a second."""
    hop_length: Positive = 160
    """Samples from one frame to the next."""
    chunk_length: Positive = 30
    """Seconds that the tower hears at most."""
    n_fft: Positive = 400
    """Samples of one frame."""
    padding_value: Zero = 0.0
    dither: Zero = 0.0

    @property
    def max_samples(self) -> int:
        """Samples that the tower hears at most."""
        return self.chunk_length * self.sampling_rate

    @property
    def max_frames(self) -> int:
        """Frames of the longest sound."""
        return self.max_samples // self.hop_length

    def frames(self, samples: int) -> int:
        """Frames that hold something of a sound; those of the silence after it do not count."""
        return -(-samples // self.hop_length)


class AudioConfig(msgspec.Struct, frozen=True):
    """``audio_config``; the defaults are those of transformers' Qwen2AudioEncoderConfig."""

    num_mel_bins: Positive = 128
    encoder_layers: Positive = 32
    encoder_attention_heads: Positive = 20
    encoder_ffn_dim: Positive = 5120
    d_model: Positive = 1280
    activation_function: Activation = "gelu"
    max_source_positions: Positive = 1500
    """Places after the convolutions, which halve the frames."""


class Qwen2Audio(Family):
    """Qwen2-Audio."""

    name = "Qwen2-Audio"
    model_types = ("qwen2_audio",)
    modalities = frozenset[Modality]({"audio"})

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.text = text_config(checkpoint, "qwen2")
        self.audio = read_config(
            AudioConfig,
            checkpoint.config.get("audio_config") or {},
            f"{checkpoint.path / 'config.json'}: audio_config",
        )
        self.extractor = read_config(
            FeatureExtractor,
            checkpoint.feature_extractor,
            f"{checkpoint.path}: the feature extractor",
        )
        self._check_agreement()

    @property
    def embedding_width(self) -> int:
        """The language model's hidden size."""
        return self.text.hidden_size

    @property
    def context_length(self) -> int:
        """``max_position_embeddings`` of the language model."""
        return self.text.max_position_embeddings

    @property
    def audio_rate(self) -> int:
        """Samples a second, mono."""
        return self.extractor.sampling_rate

    def placeholder(self, modality: Modality) -> str:
        """``<|AUDIO|>``."""
        if modality != "audio":
            raise UnsupportedMedium(f"{self.name} takes no {modality}, but audio")
        return "<|AUDIO|>"

    def plan_image(self, height: int, width: int) -> ImagePlan:
        """No size."""
        raise UnsupportedMedium(f"{self.name} takes no image, but audio")

    def plan_audio(self, samples: int) -> AudioPlan:
        """How many tokens a sound becomes.

        Raises:
            MediaTooLarge: The tower does not hear so long a sound; Hugging Face's processor would
                cut it off in silence.
            MediaError: It is too short for a single token.
        """
        if samples > self.extractor.max_samples:
            raise MediaTooLarge(
                f"the sound lasts {samples / self.audio_rate:.1f} s; {self.name} hears "
                f"{self.extractor.chunk_length} s at most"
            )
        if self.extractor.frames(samples) < MIN_FRAMES:
            least = (MIN_FRAMES - 1) * self.extractor.hop_length + 1
            raise MediaError(
                f"the sound has {samples} samples at {self.audio_rate} a second; {self.name} "
                f"needs {least} at least"
            )
        return AudioPlan(tokens=self._tokens(samples))

    def plan_embeddings(
        self, modality: Modality, shape: tuple[int, int], grid_thw: GridTHW | None
    ) -> None:
        """Check embeddings that a caller made: no more than of the longest sound."""
        super().plan_embeddings(modality, shape, grid_thw)
        limit = self._tokens(self.extractor.max_samples)
        if not 1 <= shape[0] <= limit or grid_thw is not None:
            raise InvalidValue(
                f"a sound is 1 to {limit} embeddings of {self.name}, without a grid; "
                f"got {shape = }, {grid_thw = }"
            )

    def check_item(self, item: Item) -> None:
        """Hold an item's samples and token count against one another."""
        super().check_item(item)
        if item.precomputed:
            return
        if item.dtype != "float32" or len(item.shape) != 1 or item.grid_thw is not None:
            raise InvalidValue(
                "a sound must be float32 of shape (samples,) without a grid, got "
                f"{item.dtype} of shape {item.shape}, {item.grid_thw}"
            )
        tokens = self.plan_audio(item.shape[0]).tokens
        if tokens != item.tokens:
            raise InvalidValue(
                f"{item.shape[0]} samples make {tokens} embeddings, the item says {item.tokens}"
            )

    def load_tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """Read the weights under ``audio_tower.`` and ``multi_modal_projector.``."""
        from triptych.families.towers.qwen2_audio import AudioEncoder, AudioTower, Projector
        from triptych.families.towers.weights import load_weights

        encoder = load_weights(
            lambda: AudioEncoder(self.audio),
            self.checkpoint,
            prefixes=("audio_tower.", "model.audio_tower."),
            device=device,
            dtype=dtype,
        )
        projector = load_weights(
            lambda: Projector(self.audio.d_model, self.text.hidden_size),
            self.checkpoint,
            prefixes=("multi_modal_projector.", "model.multi_modal_projector."),
            device=device,
            dtype=dtype,
        )
        tower = AudioTower(encoder, projector, self.extractor)
        return tower.to(device).eval()  # type: ignore[no-any-return]

    def embedding_inputs(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> Mapping[Modality, Sequence[torch.Tensor]]:
        """``{"audio": [(tokens, width), …]}``."""
        self.check_embeddings(items, embeddings)
        return {"audio": list(embeddings)} if items else {}

    def _tokens(self, samples: int) -> int:
        """As ``_get_feat_extract_output_lengths`` has it: a convolution, a mean of pairs."""
        places = (self.extractor.frames(samples) - 1) // 2 + 1
        return (places - 2) // 2 + 1

    def _check_agreement(self) -> None:
        """The feature extractor and the tower must be made for one another."""
        pairs = {
            "feature_size": (self.extractor.feature_size, self.audio.num_mel_bins),
            "the number of frames": (
                self.extractor.max_frames,
                2 * self.audio.max_source_positions,
            ),
        }
        for field, (ours, tower) in pairs.items():
            if ours != tower:
                raise ConfigurationError(
                    f"{self.checkpoint.path}: {field} of the feature extractor is {ours}, but the "
                    f"audio tower takes {tower}"
                )
        if self.audio.d_model % self.audio.encoder_attention_heads:
            raise ConfigurationError(
                f"{self.checkpoint.path}: audio_config has a d_model of {self.audio.d_model}, "
                f"which {self.audio.encoder_attention_heads} heads cannot share"
            )
