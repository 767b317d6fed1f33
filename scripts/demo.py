"""The main job, shown: a picture in, a streamed answer out, through a real tritonserver."""

from __future__ import annotations

import random
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.text import Text

from tiny.shapes import Scene, draw, questions, random_scene
from triptych.errors import TriptychError
from triptych.server import Server, ServerOptions
from triptych_client import Client, TriptychClientError, image, user

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "models" / "tiny-qwen2.5-vl"
ASKED = ("contents", "count", "place", "background")
"""Types of question for the picture that the demo draws."""

out = Console(highlight=False)


def demo(
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures of yours to ask about as well.", exists=True, dir_okay=False),
    ] = None,
    question: Annotated[
        str, typer.Option("--question", "-q", help="What to ask about them.")
    ] = "What is in the picture?",
    model: Annotated[
        Path, typer.Option(help="Checkpoint to serve.", exists=True, file_okay=False)
    ] = CHECKPOINT,
    engine: Annotated[
        str, typer.Option(help="vllm or sglang, whose environment is made first.")
    ] = "vllm",
    seed: Annotated[int | None, typer.Option(help="Draws the same picture again.")] = None,
) -> None:
    """Serve the tiny model, and ask it about a picture drawn on the spot."""
    if failed := subprocess.run([ROOT / "scripts" / "setup", "--engine", engine]).returncode:
        raise typer.Exit(failed)
    began = time.monotonic()
    seed = secrets.randbelow(10_000) if seed is None else seed
    options = ServerOptions(
        model=str(model), engine=engine, http_port=0, grpc_port=0, metrics_port=0
    )
    try:
        with Server(options) as server:
            with out.status(f"tritonserver loads {model.name}"):
                server.wait_ready()
            out.print(f"[dim]tritonserver ready after {time.monotonic() - began:.1f} s[/dim]\n")
            with (
                Client(f"localhost:{server.grpc_port}") as client,
                tempfile.TemporaryDirectory() as folder,
            ):
                chat = Chat(client, options.chat_model)
                wrong = ask_about_drawing(chat, Path(folder) / f"drawn-{seed}.png", seed)
                for picture in pictures or ():
                    show(picture)
                    chat.ask(picture, question)
    except (TriptychError, TriptychClientError) as error:
        out.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    if wrong > 1:  # the tiny model errs once in a hundred questions
        out.print(f"[red]{wrong} of {len(ASKED)} answers about the drawing were wrong[/red]")
        raise typer.Exit(1)


def ask_about_drawing(chat: Chat, picture: Path, seed: int) -> int:
    """Draw shapes, ask about them, and return how many answers were not what was drawn."""
    scene, asked = drawing(seed)
    draw(scene, (320, 240)).save(picture)
    show(picture)
    wrong = 0
    for text, expected in asked:
        answer = chat.ask(picture, text)
        if answer != expected:
            wrong += 1
            out.print(f"  [red]✗ drawn was: {expected}[/red]")
    out.print()
    return wrong


def drawing(seed: int) -> tuple[Scene, list[tuple[str, str]]]:
    """A scene of two or three shapes, with questions about it and their answers."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng)
        by_type = {found.type: found for found in questions(scene, rng)}
        if 2 <= len(scene.shapes) <= 3 and all(kind in by_type for kind in ASKED):
            return scene, [(by_type[kind].text, by_type[kind].answer) for kind in ASKED]


class Chat:
    """One ensemble of the server."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model

    def ask(self, picture: Path, question: str) -> str:
        """Ask, print the answer as it streams, and its time to first token."""
        out.print(Text.assemble("  ", (question, "bold"), "  "), end="")
        sent = time.monotonic()
        first = 0.0
        answer = ""
        message = user(question, image(picture))
        for chunk in self._client.chat([message], model=self._model, temperature=0, max_tokens=128):
            first = first or time.monotonic() - sent
            answer += chunk.text
            out.print(Text(chunk.text, "green"), end="")
            out.file.flush()
        out.print(f"  [dim]first token after {1000 * first:.0f} ms[/dim]")
        return answer


def show(picture: Path, width: int = 48) -> None:
    """Print a picture in half blocks, two pixels a character."""
    out.print(f"[dim]{picture.name}[/dim]")
    if not out.is_terminal:
        return
    with Image.open(picture) as opened:
        height = max(2, round(width * opened.height / opened.width / 2) * 2)
        pixels = opened.convert("RGB").resize((width, height))
    for row in range(0, height, 2):
        line = Text("  ")
        for column in range(width):
            upper, lower = (pixels.getpixel((column, row + half)) for half in (0, 1))
            line.append(
                "▀", style=f"rgb{upper} on rgb{lower}".replace(" ", "").replace("on", " on ")
            )
        out.print(line)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    typer.run(demo)
