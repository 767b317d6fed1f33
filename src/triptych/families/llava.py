"""LLaVA-1.5: pictures as squares of one size, a CLIP tower, and a projector of two layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from triptych.contract import GridTHW, ImagePlan, Item, Modality, TicketItem
from triptych.errors import ConfigurationError, InvalidValue, UnsupportedMedium
from triptych.families.base import Family, Tower
from triptych.families.checkpoint import Checkpoint
from triptych.families.clip import ClipProcessor, ClipVisionConfig
from triptych.families.fields import Activation, read_config
from triptych.families.text import text_config

if TYPE_CHECKING:
    import torch

VISION_PREFIXES = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.",
)
"""The hub's, then what several versions of transformers have saved."""
PROJECTOR_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")


class LlavaConfig(msgspec.Struct, frozen=True):
    """config.json; the defaults are those of transformers' LlavaConfig."""

    vision_config: ClipVisionConfig
    projector_hidden_act: Activation = "gelu"
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """``default`` leaves the class embedding out."""
    vision_feature_layer: int | tuple[int, ...] = -2
    """Hidden states of the tower, side by side: 0 goes into the first block, -1 comes out of the
    last."""
    multimodal_projector_bias: bool = True

    @property
    def layers(self) -> tuple[int, ...]:
        """``vision_feature_layer`` counted from the first hidden state."""
        chosen = self.vision_feature_layer
        states = self.vision_config.num_hidden_layers + 1
        return tuple(
            layer % states if -states <= layer < states else layer
            for layer in ((chosen,) if isinstance(chosen, int) else chosen)
        )

    @property
    def keep_class(self) -> bool:
        """Whether the class embedding is a token."""
        return self.vision_feature_select_strategy == "full"

    @property
    def tokens(self) -> int:
        """Embeddings of one picture."""
        return self.vision_config.grid**2 + self.keep_class


class Llava(Family):
    """LLaVA-1.5."""

    name = "LLaVA-1.5"
    model_types = ("llava",)
    modalities = frozenset[Modality]({"image"})

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.text = text_config(checkpoint, "llama")
        self.config = read_llava_config(checkpoint)
        where = f"{checkpoint.path}: the image processor"
        self.processor = read_config(ClipProcessor, checkpoint.image_processor, where)
        self.processor.check(self.config.vision_config.image_size, where)

    @property
    def embedding_width(self) -> int:
        """The language model's hidden size."""
        return self.text.hidden_size

    @property
    def context_length(self) -> int:
        """``max_position_embeddings`` of the language model."""
        return self.text.max_position_embeddings

    def placeholder(self, modality: Modality) -> str:
        """``<image>``."""
        if modality != "image":
            raise UnsupportedMedium(f"{self.name} takes no {modality}")
        return "<image>"

    def plan_image(self, height: int, width: int) -> ImagePlan:
        """The sizes that Hugging Face's CLIP processor would scale and crop the picture to."""
        return self.processor.plan(ImagePlan, height, width, self.config.tokens)

    def plan_embeddings(
        self, modality: Modality, shape: tuple[int, int], grid_thw: GridTHW | None
    ) -> None:
        """Check embeddings that a caller made: every picture has as many."""
        super().plan_embeddings(modality, shape, grid_thw)
        if shape[0] != self.config.tokens or grid_thw is not None:
            raise InvalidValue(
                f"a picture is {self.config.tokens} embeddings of {self.name}, without a grid; "
                f"got {shape = }, {grid_thw = }"
            )

    def check_item(self, item: Item) -> None:
        """Hold an item's shape and token count against the tower's."""
        super().check_item(item)
        size = self.config.vision_config.image_size
        wanted = ("uint8", (size, size, 3), self.config.tokens, None)
        got = (item.dtype, item.shape, item.tokens, item.grid_thw)
        if not item.precomputed and got != wanted:
            raise InvalidValue(
                f"a picture must be (dtype, shape, tokens, grid) {wanted}, got {got}"
            )

    def load_tower(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """Read the tower's weights up to the layer that is wanted, and the projector's.

        Raises:
            ConfigurationError: Weights are missing, those of the whole projector for one.
        """
        from triptych.families.towers.clip import ClipVisionTower
        from triptych.families.towers.llava import LlavaTower, Projector
        from triptych.families.towers.weights import load_weights

        vision = self.config.vision_config
        left_out = range(max(self.config.layers), vision.num_hidden_layers)
        tower = load_weights(
            lambda: ClipVisionTower(vision, self.config.layers),
            self.checkpoint,
            prefixes=VISION_PREFIXES,
            device=device,
            dtype=dtype,
            unused=(
                *(f"encoder.layers.{index}." for index in left_out),
                "post_layernorm.",
                "embeddings.position_ids",
            ),
        )
        projector = load_weights(
            lambda: Projector(self.config, self.text.hidden_size),
            self.checkpoint,
            prefixes=PROJECTOR_PREFIXES,
            device=device,
            dtype=dtype,
        )
        whole = LlavaTower(tower, projector, self.processor, keep_class=self.config.keep_class)
        return whole.to(device).eval()  # type: ignore[no-any-return]

    def embedding_inputs(
        self, items: Sequence[TicketItem], embeddings: Sequence[torch.Tensor]
    ) -> Mapping[Modality, Sequence[torch.Tensor]]:
        """``{"image": [(tokens, width), …]}``."""
        self.check_embeddings(items, embeddings)
        for index, item in enumerate(items):
            if item.shape[0] != self.config.tokens:
                raise InvalidValue(
                    f"a picture is {self.config.tokens} embeddings, got {item.shape}",
                    where=f"items[{index}]",
                )
        return {"image": list(embeddings)} if items else {}


def read_llava_config(checkpoint: Checkpoint) -> LlavaConfig:
    """The parts of config.json that make the tower, checked.

    Raises:
        ConfigurationError: A field is of the wrong type, or asks for what is not served.
    """
    where = str(checkpoint.path / "config.json")
    config = read_config(LlavaConfig, checkpoint.config, where)
    vision = config.vision_config
    if vision.hidden_size % vision.num_attention_heads:
        raise ConfigurationError(
            f"{where}: vision_config has a hidden_size of {vision.hidden_size}, which "
            f"{vision.num_attention_heads} heads cannot share"
        )
    layers = config.layers
    if not layers or not 0 <= min(layers) <= max(layers) <= vision.num_hidden_layers:
        raise ConfigurationError(
            f"{where}: vision_feature_layer is {config.vision_feature_layer}, but the tower has "
            f"{vision.num_hidden_layers} layers"
        )
    return config
