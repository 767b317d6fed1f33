"""The two models of the bench ``handover``: encoder and decode with everything else left out."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benches.handover import produce
from triptych import contract
from triptych.settings import DecodeSettings, EncoderSettings
from triptych.stages import backend
from triptych.stages.decode_inputs import read_embeddings, read_ticket
from triptych.stages.encoder import pb_utils
from triptych.stages.roads import Fetchers, Publishers


class Produce:
    """NBYTES to TICKET, EMBEDDINGS, and the time at which they were ready."""

    def initialize(self, args: Any) -> None:
        """Make both roads."""
        torch.set_num_threads(1)
        backend.configure_logging()
        settings = EncoderSettings(model="none", handover_at_start=True)
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
        embeddings, ticket = produce(publisher, nbytes)
        ready = np.array([time.monotonic()])
        data = contract.encode(publisher.publish(embeddings, ticket))
        tensors = [
            backend.text_tensor(contract.TICKET, data, shape=(1, 1)),
            pb_utils.Tensor("READY", ready),
        ]
        if contract.EMBEDDINGS in outputs:
            tensors.append(pb_utils.Tensor(contract.EMBEDDINGS, embeddings[None].numpy()))
        return backend.response(*tensors)


class Consume:
    """TICKET and EMBEDDINGS to the seconds since they were ready."""

    def initialize(self, args: Any) -> None:
        """Make both roads."""
        torch.set_num_threads(1)
        backend.configure_logging()
        self.fetchers = Fetchers(DecodeSettings(model="none", handover_at_start=True))

    def execute(self, requests: Any) -> list[Any]:
        """Answer every request."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """End the roads."""
        self.fetchers.close()

    def _answer(self, request: Any) -> Any:
        ticket = read_ticket(request)
        embeddings = read_embeddings(request)
        self.fetchers.choose(ticket).fetch(ticket, embeddings).result()
        ready = pb_utils.get_input_tensor_by_name(request, "READY").as_numpy()
        return backend.response(pb_utils.Tensor("SECONDS", time.monotonic() - ready))
