"""What to serve and where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from triptych.errors import ConfigurationError
from triptych.settings import NAMES

DEFAULT_REPOSITORY = Path(__file__).parents[3] / "model_repository"
"""The one of the clone that this package is imported from."""


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One tritonserver with one ensemble."""

    model: str
    """Directory of the checkpoint in Hugging Face's layout."""
    engine: str = "vllm"
    """Chooses the ensemble ``chat_<engine>``."""
    ensemble: str = ""
    """The ensemble itself, where it is not ``chat_<engine>``."""
    model_repository: str = ""
    """Directory of the models; empty: the clone's."""
    host: str = "127.0.0.1"
    """Address that every port listens on."""
    http_port: int = 8000
    """0: one that is free; `Server.http_port` tells which."""
    grpc_port: int = 8001
    metrics_port: int = 8002
    settings: Mapping[str, Any] = {}
    """Settings of the stages by name (see `triptych.settings`), over those in config.pbtxt."""
    ready_timeout_s: float = 900.0
    """From the start to the first answer, in seconds."""
    exit_timeout_s: int = 30
    """What requests under way, and then the engine, may take to end on a stop, in seconds."""
    max_restarts: int = 5
    """How often in a row a server that died or hangs is started again; 0: never."""
    allow_shared_memory: bool = False
    """Whether callers may name regions of this host's memory as inputs and outputs."""
    allow_model_control: bool = False
    """Whether callers may load and unload models, and change what Triton logs and traces. A model
    brings code of its own, so whoever may load one may do anything."""
    log_file: str = ""
    """Where the whole log is written as well; empty: nowhere."""
    log_verbose: int = 0
    """Triton's ``--log-verbose``."""
    extra_args: tuple[str, ...] = ()
    """Further flags for tritonserver, as they are."""

    @property
    def chat_model(self) -> str:
        """Name of the ensemble."""
        return self.ensemble or f"chat_{self.engine}"

    @property
    def repository(self) -> Path:
        """The model repository, absolute."""
        return Path(self.model_repository or DEFAULT_REPOSITORY).resolve()

    def stage_settings(self) -> dict[str, Any]:
        """The settings for the stages' environment, the checkpoint's absolute path among them."""
        return {**self.settings, "model": str(Path(self.model).resolve())}

    def check(self) -> None:
        """Find what can be found wrong before anything starts.

        Raises:
            ConfigurationError: The checkpoint or ensemble is not there, or a setting is unknown.
        """
        if not self.model:
            raise ConfigurationError("no model: give the checkpoint's directory")
        model = Path(self.model)
        if not model.is_dir():
            raise ConfigurationError(f"the model {str(model)!r} is not a directory")
        if not (model / "config.json").is_file():
            raise ConfigurationError(f"the model directory {str(model)!r} has no config.json")
        if not (self.repository / self.chat_model / "config.pbtxt").is_file():
            there = sorted(path.parent.name for path in self.repository.glob("chat_*/config.pbtxt"))
            raise ConfigurationError(
                f"no ensemble {self.chat_model!r} in {self.repository}; "
                f"there is: {', '.join(there) or 'none'}"
            )
        for name in self.settings:
            if name not in NAMES:
                raise ConfigurationError(
                    f"there is no setting {name!r}; there are: {', '.join(sorted(NAMES))}"
                )
