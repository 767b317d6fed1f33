"""The flags that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ServedModelNames = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME[=ENSEMBLE]",
        help="Another name of the model; may be given again.",
    ),
]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option("--api-key", help="Who may ask; may be given again. See --api-key-file."),
]
ApiKeyFile = Annotated[
    str, typer.Option(metavar="FILE", help="API keys, one a line, out of sight of `ps`.")
]
CorsOrigins = Annotated[
    list[str] | None,
    typer.Option("--cors-origin", help="Whose pages may ask, or *; may be given again."),
]
Playground = Annotated[
    bool, typer.Option("--playground/--no-playground", help="The page to try the models on.")
]
ReadyJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, when ready: what is served where.")
]

Address = Annotated[
    str, typer.Option("--server", metavar="ADDRESS", help="host:port, or http://host:port.")
]
Model = Annotated[str, typer.Option(help="The ensemble that answers.")]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", min=0.001, help="For the whole answer.")
]
