"""Where to listen, whom to ask, what to allow."""

from __future__ import annotations

import msgspec

from triptych.errors import ConfigurationError
from triptych.gateway.keys import ApiKeys
from triptych_client.transport import Address, parse_address

MIB = 1 << 20


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway before one Triton."""

    triton: str = "localhost:8001"
    """Triton's gRPC, ``host:port``, or ``grpcs://host:port`` with TLS."""
    triton_metrics: str = ""
    """URL of Triton's metrics, which are shown with the gateway's; empty: they are not."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0: one that is free."""
    model: str = ""
    """The ensemble that plain aliases stand for and that readiness asks; empty: all that chat."""
    served_model_name: tuple[str, ...] = ()
    """Further names of models: ``NAME`` or ``NAME=ENSEMBLE``."""
    keys: ApiKeys = ApiKeys()
    """Who may ask under ``/v1``; none: everybody."""
    playground: bool = True
    """Whether there is a page to try the models on, at ``/``."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask, ``*`` for all; none: no page may."""
    otlp_endpoint: str = ""
    """Where traces go: a collector's URL for OTLP over HTTP; empty: nowhere."""
    max_body_mb: int = 128
    """Bytes of a request, in MiB; the stage ``preprocess`` has a limit of its own."""
    body_timeout_s: float = 60.0
    """How long a request's next bytes may take to come, in seconds."""
    request_timeout_s: float = 600.0
    """For a whole answer, in seconds."""
    drain_timeout_s: float = 30.0
    """What answers under way are given to end when the gateway stops, in seconds."""

    @property
    def address(self) -> Address:
        """Where Triton is."""
        return parse_address(self.triton)

    @property
    def max_body_bytes(self) -> int:
        """The limit of a request's length."""
        return self.max_body_mb * MIB

    @property
    def aliases(self) -> dict[str, str]:
        """Further names, and the ensemble of each; empty: the only one there is."""
        pairs = (name.partition("=") for name in self.served_model_name)
        return {alias: ensemble or self.model for alias, _, ensemble in pairs}

    def check(self) -> None:
        """Find what can be found wrong before anything starts.

        Raises:
            ConfigurationError: An address is none, an alias has no name, a limit is not positive.
        """
        try:
            scheme = self.address.scheme
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        if not scheme.startswith("grpc"):
            raise ConfigurationError(
                f"the gateway speaks gRPC to Triton, as in localhost:8001, got {self.triton!r}"
            )
        if self.triton_metrics and not self.triton_metrics.startswith(("http://", "https://")):
            raise ConfigurationError(
                "Triton's metrics have a URL, as in http://localhost:8002/metrics, "
                f"got {self.triton_metrics!r}"
            )
        for name in self.served_model_name:
            if not name.partition("=")[0]:
                raise ConfigurationError(f"an alias is NAME or NAME=ENSEMBLE, got {name!r}")
        for limit in ("max_body_mb", "body_timeout_s", "request_timeout_s", "drain_timeout_s"):
            if not getattr(self, limit) > 0:
                raise ConfigurationError(f"{limit} must be positive, got {getattr(self, limit)}")
