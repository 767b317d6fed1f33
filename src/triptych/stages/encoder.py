"""The model ``encoder``: MEDIA and ITEMS in, EMBEDDINGS and TICKET out.

Not decoupled. Triton's dynamic batcher gathers requests; what comes in one ``execute`` is encoded
together. Behind a preprocess of the same server that is the exception: it brings pixels by a side
road (`triptych.encode.lookup`), and its requests come with leases on what was made of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from triptych import contract, families
from triptych.encode import Encoded, Encoder, lookup
from triptych.encode.ahead import EncodeAhead
from triptych.encode.lookup_server import LookupServer
from triptych.encode.peers import Peers
from triptych.errors import ConfigurationError, TriptychError
from triptych.handover import Publisher
from triptych.pulse import Pulse
from triptych.settings import EncoderSettings
from triptych.stages import backend
from triptych.stages.encoder_inputs import read_items, read_media
from triptych.stages.encoder_metrics import Metrics
from triptych.stages.ended import Ended
from triptych.stages.roads import Publishers
from triptych.stages.telemetry import Telemetry

logger = logging.getLogger("triptych.stages.encoder")

_NO_TICKET = contract.encode(contract.Ticket([]))
_NO_EMBEDDINGS = np.empty((1, 0), np.uint8)


class EncoderModel:
    """What the encoder's model.py hands to Triton."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the tower.

        Raises:
            ConfigurationError: A setting or the checkpoint is wrong; Triton does not start.
        """
        backend.configure_logging()
        backend.take_turns()
        settings = backend.model_settings(EncoderSettings, args)
        backend.configure_logging(settings.log_level)
        self._pulse = Pulse(args["model_instance_name"])
        if settings.encoder_threads:
            torch.set_num_threads(settings.encoder_threads)
        self._name = args["model_name"]
        self._telemetry = Telemetry("encoder", settings, args)
        self._metrics = Metrics(args["model_name"], args["model_instance_name"])
        self._encoder = Encoder(
            families.load(settings.model),
            settings,
            choose_device(settings.encoder_device, args),
            on_batch=self._metrics.batch,
            name=lookup.instance(args["model_name"], args["model_instance_name"]),
        )
        self._publishers = Publishers(settings, self._encoder.device)
        self._side_road = open_side_road(self._encoder, settings)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request; a faulty one has an error for an answer, alone."""
        answers: list[Any] = [None] * len(requests)
        places: list[int] = []
        work: list[tuple[list[contract.Item], torch.Tensor]] = []
        publishers: list[Publisher] = []
        for place, request in enumerate(requests):
            try:
                items = read_items(request)
                if not items:  # every text comes by here, and has no time to lose
                    answers[place] = _nothing(request)
                    continue
                media = read_media(request)
                outputs = request.requested_output_names()
                publishers.append(self._publishers.choose(outputs, items))
                work.append((items, media))
                places.append(place)
            except Exception as error:
                answers[place] = self._refuse(request, error)
        if not work:
            self._metrics.show(self._encoder.cache, self._publishers.leases)
            return answers
        try:
            encoded = self._encoder.encode(work, [publisher.room for publisher in publishers])
        except Exception as error:
            for place in places:
                answers[place] = self._refuse(requests[place], error)
            return answers
        for place, (items, _), answer, publisher in zip(
            places, work, encoded, publishers, strict=True
        ):
            answers[place] = self._respond(requests[place], items, answer, publisher)
        self._metrics.show(self._encoder.cache, self._publishers.leases)
        return answers

    def _respond(
        self,
        request: Any,
        items: Sequence[contract.Item],
        answer: Encoded | TriptychError,
        publisher: Publisher,
    ) -> Any:
        """The response with the outputs that were asked for."""
        try:
            if isinstance(answer, TriptychError):
                raise answer
            ticket = publisher.publish(answer.embeddings, answer.ticket)
        except Exception as error:
            return self._refuse(request, error)
        wanted = request.requested_output_names()
        tensors = []
        if contract.EMBEDDINGS in wanted:
            embeddings = answer.embeddings[None]
            tensors.append(
                pb_utils.Tensor(contract.EMBEDDINGS, embeddings.numpy())
                if embeddings.device.type == "cpu"
                else pb_utils.Tensor.from_dlpack(contract.EMBEDDINGS, embeddings)
            )
        elif promised := self._encoder.promise(items, answer.keys):
            again = contract.Again(self._name, promised)
            ticket = msgspec.structs.replace(ticket, again=again)
        if contract.TICKET in wanted:
            data = contract.encode(ticket)
            tensors.append(backend.text_tensor(contract.TICKET, data, shape=(1, 1)))
        return backend.response(*tensors)

    def _refuse(self, request: Any, error: BaseException) -> Any:
        self._telemetry.ended(Ended.by(error, request.request_id()))
        return backend.error_response(error, request.request_id())

    def finalize(self) -> None:
        """End the look-up, remove its socket, and end all leases; a second call does nothing."""
        side_road: SideRoad | None = getattr(self, "_side_road", None)
        if side_road:
            side_road.stop()
        if hasattr(self, "_publishers"):
            self._publishers.close()
        if hasattr(self, "_telemetry"):
            self._telemetry.stop()


def _nothing(request: Any) -> Any:
    """The response to a request without media, made without torch."""
    wanted = request.requested_output_names()
    tensors = []
    if contract.EMBEDDINGS in wanted:
        tensors.append(backend.uint8_tensor(contract.EMBEDDINGS, _NO_EMBEDDINGS))
    if contract.TICKET in wanted:
        tensors.append(backend.text_tensor(contract.TICKET, _NO_TICKET, shape=(1, 1)))
    return backend.response(*tensors)


def choose_device(name: str, args: Mapping[str, str]) -> torch.device:
    """`EncoderSettings.encoder_device` as a device; ``auto`` is what Triton gave the instance.

    Raises:
        ConfigurationError: Torch does not know the device or cannot use it.
    """
    if name == "auto":
        if args["model_instance_kind"] != "GPU":
            return torch.device("cpu")
        name = f"cuda:{args['model_instance_device_id']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"the encoder cannot use the device {name!r}: {error}") from error
    return device


class SideRoad:
    """By which preprocess asks for, and brings, what its requests will need.

    Args:
        encoder: Whose cache it leads to.
        max_tokens: Embeddings of one forward pass.

    Raises:
        OSError: The socket cannot be made here.
        ValueError: Its path will not do.
    """

    def __init__(self, encoder: Encoder, max_tokens: int) -> None:
        folder = lookup.place()
        self._ahead = EncodeAhead(encoder, max_tokens)
        try:
            self._server = LookupServer(encoder, self._ahead, folder)
        except BaseException:
            self._ahead.stop()
            raise
        encoder.share(Peers(folder, encoder.revision))

    def stop(self) -> None:
        """Answer what is pending with nothing, end both threads and remove the socket."""
        self._ahead.stop()
        self._server.stop()


def open_side_road(encoder: Encoder, settings: EncoderSettings) -> SideRoad | None:
    """A `SideRoad`; None: nothing is kept, or this machine does not let us have one."""
    if not encoder.cache.enabled:
        return None
    try:
        return SideRoad(encoder, settings.max_encoder_tokens)
    except (OSError, ValueError) as error:
        logger.warning("preprocess cannot be told which media are held: %s", error)
        return None
