"""``triptych serve``: flags to options, then the server in the foreground."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, get_type_hints

import msgspec

from triptych import server, settings
from triptych.cli.output import print_json
from triptych.errors import ConfigurationError
from triptych.server.foreground import Address

if TYPE_CHECKING:
    from triptych.gateway import GatewayOptions


def serve(
    options: server.ServerOptions,
    extra: Sequence[str],
    complain: Callable[[str], None],
    gateway: GatewayOptions | None = None,
    *,
    as_json: bool = False,
) -> int:
    """Serve until a signal.

    Args:
        options: From the flags that ``serve`` has itself.
        extra: The rest of the command line: settings of the stages as flags.
        complain: Prints one line on stderr.
        gateway: OpenAI's API, to be served too; None: it is not.
        as_json: Print one JSON object on stdout when it is ready.

    Returns:
        The exit code; 2 where a flag or a setting is wrong.
    """
    try:
        values = read_settings(extra)
        options = msgspec.structs.replace(
            options,
            model=options.model or os.environ.get(f"{settings.PREFIX}MODEL", ""),
            settings=values,
        )
        options.check()
        environ = os.environ | settings.as_environ(options.stage_settings())
        for stage in settings.STAGES:
            settings.load(stage, environ=environ)
        on_ready = tell_ready if as_json else None
        if gateway is None:
            return server.serve(options, on_ready=on_ready)
        from triptych.cli.gateway import Beside

        first = settings.load(settings.PreprocessSettings, environ=environ)
        gateway = msgspec.structs.replace(
            gateway, max_body_mb=first.max_request_mb, otlp_endpoint=first.otlp_endpoint
        )
        return server.serve(options, beside=Beside(gateway, options), on_ready=on_ready)
    except ConfigurationError as error:
        complain(error.what)
        return 2


def tell_ready(started: server.Server, addresses: Sequence[Address]) -> None:
    """One JSON object on stdout: what is served where."""
    host = started.options.host
    host = f"[{host}]" if ":" in host else host
    found = {
        "ready": True,
        "model": started.options.chat_model,
        "http": f"http://{host}:{started.http_port}",
        "grpc": f"{host}:{started.grpc_port}",
        "metrics": f"http://{host}:{started.metrics_port}/metrics",
    }
    print_json(found | {address.name: address.url for address in addresses})


def read_settings(arguments: Sequence[str]) -> dict[str, str]:
    """Settings by name, as text, from the flags that ``serve`` has not itself.

    They are written ``--max-model-len 64`` or ``--max-model-len=64``, and one that is on or off
    may stand alone: ``--allow-pickle-embeddings``.

    Raises:
        ConfigurationError: There is no such setting, or its value is missing.
    """
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in settings.NAMES:
            raise ConfigurationError(_unknown(flag))
        if not given:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif _is_switch(name):
                value = "true"
            else:
                raise ConfigurationError(f"{flag} needs a value")
        values[name] = value
    return values


def _is_switch(name: str) -> bool:
    return any(get_type_hints(stage).get(name) is bool for stage in settings.STAGES)


def _unknown(flag: str) -> str:
    own = [name for name in server.ServerOptions.__struct_fields__ if name != "settings"]
    known = [f"--{name.replace('_', '-')}" for name in (*own, *settings.NAMES)]
    if not flag.startswith("-"):
        return f"serve takes flags only, got {flag!r}"
    close = difflib.get_close_matches(flag, known, n=1)
    return f"there is no flag {flag}" + (f"; did you mean {close[0]}?" if close else "")
