"""Hugging Face's language model with embeddings in place of pictures, a token at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from tensorrt_llm._torch.shared_tensor import read
from tensorrt_llm.parameters import DisaggregatedParams, SamplingParams

TOWERS = ("visual", "vision_tower", "multi_modal_projector")


class Model:
    """A checkpoint without its vision tower.

    Args:
        path: The checkpoint.
        dtype: ``auto`` or a name of torch's.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        config = json.loads((path / "config.json").read_text())
        self.model_type: str = config["model_type"]
        self.placeholder: int = config.get("image_token_id", config.get("image_token_index", -1))
        [architecture] = config["architectures"]
        whole = getattr(transformers, architecture).from_pretrained(
            path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
        for tower in TOWERS:
            if hasattr(whole.model, tower):
                setattr(whole.model, tower, None)
        self._language_model = whole.model.language_model.eval()
        self._head = whole.lm_head
        self._embed = whole.get_input_embeddings()
        self.end_ids: set[int] = set(_as_list(whole.generation_config.eos_token_id))
        self.hidden_size: int = self._embed.embedding_dim
        self._by_mrope = "mrope_section" in json.dumps(config)

    @torch.inference_mode()
    def prefill(self, ids: list[int], media: Any) -> State:
        """Read a prompt.

        Args:
            ids: With one placeholder a picture.
            media: None, a list of embeddings, or `DisaggregatedParams`.
        """
        if media is None:
            return self._state(self._embed(torch.tensor([ids])), None, 0)
        if isinstance(media, DisaggregatedParams):
            pictures = [read(handle) for handle in media.multimodal_embedding_handles or ()]
            embeddings, deepstack = self._filled(ids, pictures)
            if (
                media.mrope_position_ids_handle is None
                or media.mrope_position_deltas_handle is None
            ):
                raise RuntimeError("mrope positions and deltas must both be provided")
            positions = read(media.mrope_position_ids_handle)
            deltas = read(media.mrope_position_deltas_handle)
            if positions.shape != (3, 1, embeddings.shape[1]) or positions.dtype != torch.int32:
                raise RuntimeError(f"mrope positions of {positions.dtype}, {positions.shape}")
            if deltas.shape != (1,) or deltas.dtype != torch.int32:
                raise RuntimeError(f"mrope deltas of {deltas.dtype}, {deltas.shape}")
            return self._state(embeddings, positions.long(), int(deltas), deepstack)
        embeddings, _ = self._filled(ids, media)
        return self._state(embeddings, None, 0)

    @torch.inference_mode()
    def step(self, state: State, token: int) -> None:
        """Take one token more."""
        embedded = self._embed(torch.tensor([[token]]))
        self._forward(state, embedded, torch.tensor([[state.length + state.delta]]))

    def _filled(self, ids: list[int], pictures: list[torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        """Embeddings of the whole prompt, and what goes into layers beyond the first."""
        places = [index for index, token in enumerate(ids) if token == self.placeholder]
        if len(places) != len(pictures):
            raise RuntimeError(f"{len(places)} placeholders for {len(pictures)} pictures")
        embedded = self._embed(torch.tensor(ids))
        parts, seen, start = [], [], 0
        for place, picture in zip(places, pictures, strict=True):
            if picture.dim() != 2 or picture.shape[1] % self.hidden_size:
                raise RuntimeError(f"embeddings of shape {tuple(picture.shape)}")
            if picture.dtype != embedded.dtype:
                raise RuntimeError(f"embeddings of {picture.dtype} for a model of {embedded.dtype}")
            parts += [embedded[start:place], picture[:, : self.hidden_size]]
            seen += [torch.zeros(place - start).bool(), torch.ones(len(picture)).bool()]
            start = place + 1
        parts.append(embedded[start:])
        seen.append(torch.zeros(len(ids) - start).bool())
        _, *deeper = torch.cat(pictures).split(self.hidden_size, dim=1)
        deepstack = {"visual_pos_masks": torch.cat(seen)[None], "deepstack_visual_embeds": deeper}
        return torch.cat(parts)[None], deepstack if deeper else {}

    def _state(
        self, embedded: torch.Tensor, positions: Any, delta: int, deepstack: Any = None
    ) -> State:
        state = State(DynamicCache(), delta)
        if positions is None:
            positions = torch.arange(embedded.shape[1])[None]
        self._forward(state, embedded, positions, **deepstack or {})
        return state

    def _forward(
        self, state: State, embedded: torch.Tensor, positions: torch.Tensor, **deepstack: Any
    ) -> None:
        if self._by_mrope and positions.dim() == 2:
            positions = positions.expand(3, 1, -1)
        output = self._language_model(
            inputs_embeds=embedded,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            **deepstack,
        )
        state.length += embedded.shape[1]
        state.logits = self._head(output.last_hidden_state[0, -1]).float()


class State:
    """One request's keys and values."""

    def __init__(self, cache: DynamicCache, delta: int) -> None:
        self.cache = cache
        self.delta = delta
        self.length = 0
        self.logits = torch.empty(0)

    def draw(self, sampling: SamplingParams) -> int:
        """The next token; the generator is everybody's, and penalties there are none."""
        if sampling.greedy:
            return int(self.logits.argmax())
        logits = self.logits / (sampling.temperature or 1.0)
        likeliest, tokens = logits.sort(descending=True)
        probabilities = likeliest.softmax(0)
        kept = probabilities.cumsum(0) - probabilities < (sampling.top_p or 1.0)
        if sampling.top_k:
            kept &= torch.arange(len(kept)) < sampling.top_k
        return int(tokens[torch.multinomial(probabilities * kept, 1)])


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
