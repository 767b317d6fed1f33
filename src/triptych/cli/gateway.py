"""``triptych gateway`` and ``triptych serve --openai``: OpenAI's API in front of Triton."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from triptych.cli.output import print_json
from triptych.errors import ConfigurationError
from triptych.gateway import Gateway, GatewayOptions, bind
from triptych.gateway import serve as serve_gateway
from triptych.gateway.keys import ApiKeys
from triptych.server import Server, ServerOptions
from triptych.server.foreground import Address


def read_options(*, api_key: list[str], api_key_file: str, **values: Any) -> GatewayOptions:
    """The options that the flags ask for.

    Args:
        api_key: Keys on the command line.
        api_key_file: File of further keys; empty: none.
        **values: Fields of `GatewayOptions`.

    Raises:
        ConfigurationError: One of them is wrong.
    """
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    options = GatewayOptions(keys=ApiKeys.read(api_key, api_key_file), **{**values, **lists})
    options.check()
    return options


def serve(options: GatewayOptions, complain: Callable[[str], None], *, as_json: bool) -> int:
    """Serve before a Triton that runs elsewhere, until a signal.

    Args:
        options: All of it.
        complain: Prints one line on stderr.
        as_json: Print one JSON object on stdout when it listens.

    Returns:
        The exit code; 2 where the port cannot be used.
    """
    _configure_logging()
    try:
        return serve_gateway(options, complain, on_ready=tell_ready if as_json else None)
    except ConfigurationError as error:
        complain(error.what)
        return 2


class Beside:
    """A gateway that runs beside the Triton that it asks.

    Args:
        options: Everything but where Triton is; the port is taken at once, so that it is missed
            before the models load, and not after.
        server: What is to be served.

    Raises:
        ConfigurationError: The port cannot be used.
    """

    def __init__(self, options: GatewayOptions, server: ServerOptions) -> None:
        self._options = msgspec.structs.replace(
            options,
            host=server.host,
            model=server.chat_model,
            served_model_name=options.served_model_name or (Path(server.model).resolve().name,),
        )
        self._listener = bind(self._options.host, self._options.port)

    @contextlib.contextmanager
    def __call__(self, server: Server) -> Iterator[list[Address]]:
        """Serve while ``server``, which is ready, does; yields where."""
        _configure_logging()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._options.host, self._options.host)
        host = f"[{host}]" if ":" in host else host
        options = msgspec.structs.replace(
            self._options,
            triton=f"{host}:{server.grpc_port}",
            triton_metrics=f"http://{host}:{server.metrics_port}/metrics",
        )
        with Gateway(options, self._listener) as gateway:
            names = ", ".join(name.partition("=")[0] for name in options.served_model_name)
            api = f"{gateway.url}/v1"
            found = [Address("openai", api, f"OpenAI's API on {api}, model {names}")]
            if options.playground:
                page = f"{gateway.url}/playground/"
                found.append(Address("playground", page, f"a page to try it on: {page}"))
            yield found


def tell_ready(gateway: Gateway) -> None:
    """One JSON object on stdout: what is served where."""
    ready = {"ready": True, "openai": f"{gateway.url}/v1", "triton": gateway.options.triton}
    if gateway.options.playground:
        ready["playground"] = f"{gateway.url}/playground/"
    print_json(ready)


def _configure_logging() -> None:
    """Our log, and what uvicorn warns of, on stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    logging.getLogger("triptych.gateway").setLevel(logging.INFO)
