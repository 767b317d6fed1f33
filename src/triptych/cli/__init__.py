"""The command ``triptych``.

    triptych serve    start tritonserver with a model
    triptych gateway  OpenAI's API in front of a running server
    triptych chat     ask a running server, once or in a conversation
    triptych embed    what its encoder makes of media, as files
    triptych top      what a running server does now
    triptych doctor   what is installed, and every setting in force
    triptych matrix   which engine serves which medium of which model family, and what sampling
    triptych settings every setting, its default and its meaning
    triptych version

Exit codes: 0 it did what was asked; 1 the server, the request or what ``doctor`` looked at failed,
with one line on stderr that says why; 2 the command line is wrong, a file on it included; 130
Ctrl-C, or a server that had to be killed.

Each command imports what it needs when it runs, so that ``--help`` is there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from triptych.cli.flags import (
    Address,
    ApiKeyFile,
    ApiKeys,
    CorsOrigins,
    Model,
    Playground,
    ReadyJson,
    ServedModelNames,
    Timeout,
)

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# typer brings a click of its own and exports no more of it than this child of its UsageError.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Multimodal chat on NVIDIA Triton Inference Server.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name; ``sys.argv`` unless given.

    Returns:
        The exit code.
    """
    try:
        code = app(args=arguments, prog_name="triptych", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "triptych"
        _complain(f"{error.format_message().rstrip('.')}; see `{command} --help`")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else OK


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Every setting of the stages is a flag too, such as --max-model-len 4096 or "
    "--allowed-local-media-path /data; `triptych doctor` lists them.",
)
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(metavar="DIR", help="Checkpoint in Hugging Face's layout.")
    ] = "",
    engine: Annotated[str, typer.Option(help="Chooses the ensemble chat_ENGINE.")] = "vllm",
    model_repository: Annotated[
        str, typer.Option(metavar="DIR", help="Triton's models; the clone's unless given.")
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535)] = 8002,
    ready_timeout_s: Annotated[
        float, typer.Option(min=1, help="Seconds from the start to the first answer.")
    ] = 900.0,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Of a server that died or hangs, in a row.")
    ] = 5,
    allow_shared_memory: Annotated[
        bool,
        typer.Option(
            "--allow-shared-memory", help="Let callers name regions of this host's memory."
        ),
    ] = False,
    allow_model_control: Annotated[
        bool,
        typer.Option(
            "--allow-model-control",
            help="Let callers load models, and so run code, and set what is logged.",
        ),
    ] = False,
    log_file: Annotated[
        str, typer.Option(metavar="FILE", help="Write the server's whole log there too.")
    ] = "",
    log_verbose: Annotated[int, typer.Option(min=0, help="Triton's --log-verbose.")] = 0,
    openai: Annotated[bool, typer.Option("--openai", help="Serve OpenAI's API too.")] = False,
    openai_port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    served_model_name: ServedModelNames = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = "",
    cors_origin: CorsOrigins = None,
    playground: Playground = True,
    as_json: ReadyJson = False,
) -> int:
    """Start tritonserver with a model, until Ctrl-C or SIGTERM."""
    from triptych.cli.serve import serve as run
    from triptych.server import ServerOptions

    gateway = None
    if openai:
        gateway = _gateway_options(
            port=openai_port,
            served_model_name=served_model_name or [],
            api_key=api_key or [],
            api_key_file=api_key_file,
            cors_origins=cors_origin or [],
            playground=playground,
        )
        if gateway is None:
            return USAGE
    elif served_model_name or api_key or api_key_file or cors_origin or not playground:
        _complain("--served-model-name, --api-key, --cors-origin and --no-playground need --openai")
        return USAGE
    return run(
        ServerOptions(
            model=model,
            engine=engine,
            model_repository=model_repository,
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            ready_timeout_s=ready_timeout_s,
            max_restarts=max_restarts,
            allow_shared_memory=allow_shared_memory,
            allow_model_control=allow_model_control,
            log_file=log_file,
            log_verbose=log_verbose,
        ),
        context.args,
        _complain,
        gateway,
        as_json=as_json,
    )


@app.command()
def gateway(
    triton: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Triton's gRPC; grpcs://HOST:PORT for TLS.")
    ] = "localhost:8001",
    triton_metrics: Annotated[
        str,
        typer.Option(metavar="URL", help="Triton's metrics, to be shown with the gateway's."),
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8080,
    model: Annotated[
        str, typer.Option(metavar="ENSEMBLE", help="What aliases and readiness are about.")
    ] = "",
    served_model_name: ServedModelNames = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = "",
    cors_origin: CorsOrigins = None,
    playground: Playground = True,
    otlp_endpoint: Annotated[
        str, typer.Option(metavar="URL", help="Where traces go, as OTLP over HTTP.")
    ] = "",
    max_body_mb: Annotated[int, typer.Option(min=1, help="Of one request, in MiB.")] = 128,
    request_timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a whole answer.")
    ] = 600.0,
    drain_timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds that answers have to end after SIGTERM.")
    ] = 30.0,
    as_json: ReadyJson = False,
) -> int:
    """Serve OpenAI's API in front of a running server, until Ctrl-C or SIGTERM."""
    options = _gateway_options(
        triton=triton,
        triton_metrics=triton_metrics,
        host=host,
        port=port,
        model=model,
        served_model_name=served_model_name or [],
        api_key=api_key or [],
        api_key_file=api_key_file,
        cors_origins=cors_origin or [],
        playground=playground,
        otlp_endpoint=otlp_endpoint,
        max_body_mb=max_body_mb,
        request_timeout_s=request_timeout_s,
        drain_timeout_s=drain_timeout_s,
    )
    if options is None:
        return USAGE
    from triptych.cli.gateway import serve as run

    return run(options, _complain, as_json=as_json)


@app.command()
def chat(
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            help="What to ask; - reads it from stdin. Without it, a conversation.",
        ),
    ] = "",
    media: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MEDIA", help="Files and URLs of pictures, clips and sounds, in order."
        ),
    ] = None,
    server: Address = "",
    http: Annotated[
        bool, typer.Option("--http", help="Speak HTTP; without it, and without http://, gRPC.")
    ] = False,
    model: Model = "chat_vllm",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of the answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    timeout: Timeout = None,
    stream: Annotated[bool, typer.Option(help="Print the answer as it is written.")] = True,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print OpenAI's chunks, one a line; with --no-stream, one object."
        ),
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Time to first token and speed, on stderr.")
    ] = False,
) -> int:
    """Ask a running server about pictures, clips and sounds, or about nothing but words.

    Without QUESTION it is a conversation: /help there tells more.
    """
    from triptych.cli.chat import Asker, ask, converse, is_medium, local_errors

    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "timeout": timeout,
    }
    given = {name: value for name, value in options.items() if value is not None}
    try:
        asker = Asker(_address(server, http=http), model, system, given, _complain)
        if question and (media or not is_medium(question)):
            text = sys.stdin.read() if question == "-" else question
            return ask(asker, text, media or [], stream=stream, as_json=as_json, stats=stats)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ValueError("Missing argument 'QUESTION': a conversation needs a terminal")
        if as_json or not stream:
            raise ValueError("--json and --no-stream need a QUESTION")
        return converse(asker, [question] if question else [])
    except local_errors() as error:
        _complain(str(error))
        return USAGE


@app.command()
def embed(
    media: Annotated[
        list[str], typer.Argument(metavar="MEDIA...", help="Files and URLs of pictures and so on.")
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="PATH", help="A directory, or for one medium a file."
        ),
    ] = "",
    server: Address = "localhost:8001",
    model: Model = "chat_vllm",
    timeout: Timeout = 600.0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a file.")] = False,
) -> int:
    """Write what a running server's encoder makes of media, as files that its API takes instead.

    PICTURE.png becomes PICTURE.safetensors, which goes wherever the picture does.
    """
    from triptych.cli.chat import local_errors
    from triptych.cli.embed import embed as run
    from triptych.cli.embed import plan
    from triptych_client import Client

    try:
        works = plan(media, output, force=force)
        client = Client(server)
    except local_errors() as error:
        _complain(str(error))
        return USAGE
    return run(works, client, model=model, timeout=timeout, as_json=as_json, complain=_complain)


@app.command()
def top(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADDRESS",
            help="Where metrics are: Triton's, as localhost:8002, a gateway's, as localhost:8080, "
            "or both.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.2, help="Between two looks.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One interval, and the end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object an interval.")
    ] = False,
) -> int:
    """Show what a running server does now: requests, tokens, stages, errors; until Ctrl-C."""
    try:
        from triptych.cli.top import top as run

        return run(
            addresses or ["localhost:8002"],
            _complain,
            interval=interval,
            once=once,
            as_json=as_json,
        )
    except ValueError as error:
        _complain(str(error))
        return USAGE


@app.command()
def matrix(
    sampling: Annotated[
        bool,
        typer.Option("--sampling", help="What each field of a request means, and to each engine."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print README's table.")] = False,
) -> int:
    """Tell which engine serves which medium of which model family in which form, and why not."""
    from triptych.cli.matrix import show

    show(sampling=sampling, as_json=as_json, as_markdown=as_markdown)
    return OK


@app.command("settings")
def list_settings(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> int:
    """List every setting of the stages with its default and its meaning."""
    import msgspec

    from triptych.cli.settings import every, markdown

    typer.echo(msgspec.json.encode(every()).decode() if as_json else markdown())
    return OK


@app.command()
def doctor(
    model_repository: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Triton's models; the clone's unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Tell what is installed, what the machine has, and every setting in force with its source."""
    from triptych.cli.doctor import examine, show
    from triptych.cli.output import waiting

    with waiting("looking at what is installed"):
        report = examine(model_repository)
    show(report, as_json=as_json)
    return FAILED if report.problems else OK


@app.command()
def version(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the version."""
    import triptych

    if as_json:
        from triptych.cli.output import print_json

        print_json({"triptych": triptych.__version__})
    else:
        typer.echo(f"triptych {triptych.__version__}")


def _address(server: str, *, http: bool) -> str:
    """Where to ask; ``http`` is for whoever writes no scheme."""
    if not server:
        return "http://localhost:8000" if http else "localhost:8001"
    return f"http://{server}" if http and "://" not in server else server


def _gateway_options(**flags: Any) -> Any:
    """The gateway's options; None where they are wrong, or the gateway is not installed."""
    from triptych.errors import ConfigurationError

    try:
        from triptych.cli.gateway import read_options

        return read_options(**flags)
    except ModuleNotFoundError as error:
        _complain(f"the gateway needs {error.name}: pip install 'triptych[gateway]'")
    except ConfigurationError as error:
        _complain(error.what)
    return None


def _complain(text: str) -> None:
    """One line for the person who must act on it."""
    print(f"triptych: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201
