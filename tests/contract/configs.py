"""Every config.pbtxt of the model repository, parsed."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

REPOSITORY = Path(__file__).parents[2] / "model_repository"


def parse(path: Path) -> ModelConfig:
    """The configuration in one file."""
    config: ModelConfig = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    return config


CONFIGS = {path.parent.name: parse(path) for path in sorted(REPOSITORY.glob("*/config.pbtxt"))}
ENSEMBLES = {name: config for name, config in CONFIGS.items() if config.platform == "ensemble"}
STAGES = {name: config for name, config in CONFIGS.items() if name not in ENSEMBLES}


def shape(config: ModelConfig, dims: list[int]) -> tuple[int, ...]:
    """Dims as they are on the wire: with the batch dimension, whose extent is 1 here."""
    return ((1,) if config.max_batch_size else ()) + tuple(dims)
