"""The models of the bench ``handover``: an encoder that only hands over, and decode.

Both note times, `time.monotonic` seconds, a line each in a file that the parameter NOTES names.
"""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

import torch

from benches._wide import WIDTH
from benches.handover import produce
from triptych import contract
from triptych.contract import Prompt, PromptItem, Sampling, Ticket
from triptych.engines import vllm_ingest
from triptych.engines.vllm import VllmEngine
from triptych.settings import EncoderSettings
from triptych.stages import backend
from triptych.stages.decode import DecodeModel
from triptych.stages.encoder import pb_utils
from triptych.stages.roads import Publishers


class Consume(DecodeModel):
    """``decode_vllm``, which notes when an engine has its input."""

    engine_type = VllmEngine

    def initialize(self, args: Any) -> None:
        """Have the engine use one of our connectors."""
        arguments = vllm_ingest.arguments

        def noting(*given: Any) -> dict[str, Any]:
            from vllm.config import ECTransferConfig

            made = arguments(*given)
            ours = made.get("ec_transfer_config")
            config = ECTransferConfig(
                ec_connector="NotingConnector" if ours else "Noting",
                ec_role="ec_consumer",
                ec_connector_module_path="benches._handover_engine",
                ec_connector_extra_config={
                    **(ours.ec_connector_extra_config if ours else {}),
                    "notes": str(notes(args)),
                },
            )
            return {**made, "ec_transfer_config": config}

        vllm_ingest.arguments = noting
        super().initialize(args)


def notes(args: Any) -> Path:
    """The file of a model's times."""
    return Path(json.loads(args["model_config"])["parameters"]["NOTES"]["string_value"])


class Produce:
    """NBYTES to PROMPT, TICKET and EMBEDDINGS; notes when the last were ready."""

    def initialize(self, args: Any) -> None:
        """Make both roads."""
        torch.set_num_threads(1)
        backend.configure_logging()
        self.notes = notes(args)
        settings = backend.model_settings(EncoderSettings, args)
        tokens = json.loads(Path(settings.model, "tokenizer.json").read_text())["added_tokens"]
        ids = {token["content"]: token["id"] for token in tokens}
        self.ids = [ids[f"<|{name}|>"] for name in ("vision_start", "image_pad", "vision_end")]
        self.publishers = Publishers(settings, torch.device("cpu"))

    def execute(self, requests: Any) -> list[Any]:
        """Answer every request."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """End the roads."""
        self.publishers.close()

    def _answer(self, request: Any) -> Any:
        nbytes = int(pb_utils.get_input_tensor_by_name(request, "NBYTES").as_numpy()[0])
        outputs = request.requested_output_names()
        publisher = self.publishers.choose(outputs, [None])  # type: ignore[list-item]
        embeddings, ticket = produce(publisher, nbytes, WIDTH, secrets.token_hex(16))
        with self.notes.open("a") as notes:
            notes.write(f"{time.monotonic()}\n")
        data = contract.encode(publisher.publish(embeddings, ticket))
        tensors = [
            backend.text_tensor(contract.PROMPT, contract.encode(self._prompt(ticket))),
            backend.text_tensor(contract.TICKET, data, shape=(1, 1)),
        ]
        if contract.EMBEDDINGS in outputs:
            tensors.append(pb_utils.Tensor(contract.EMBEDDINGS, embeddings[None].numpy()))
        return backend.response(*tensors)

    def _prompt(self, ticket: Ticket) -> Prompt:
        [item] = ticket.items
        place = PromptItem("image", 1, item.shape[0], item.hash)
        sampling = Sampling(max_tokens=1, temperature=0.0)
        return Prompt(item.hash, 0, "bench", self.ids + self.ids[:1], [place], sampling)
