"""``triptych chat`` without a question: a conversation, until Ctrl-D."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from triptych.cli import compose
from triptych.cli.editor import Editor
from triptych.cli.live import LiveAnswer
from triptych.cli.media import MAKE, modality, part_of
from triptych.cli.meter import Meter
from triptych_client import (
    Client,
    MediaError,
    Message,
    Part,
    TriptychClientError,
    assistant,
    system,
    user,
)
from triptych_client.media import Modality


class Command(NamedTuple):
    """What can follow a slash."""

    usage: str
    help: str
    takes_path: bool = False


COMMANDS: dict[str, Command] = {
    "image": Command("PATH…", "attach pictures to the next question", takes_path=True),
    "video": Command("PATH…", "attach clips", takes_path=True),
    "audio": Command("PATH…", "attach sounds", takes_path=True),
    "undo": Command("", "forget what is attached, or else the last question and its answer"),
    "clear": Command("", "begin a new conversation"),
    "save": Command("FILE", "write the conversation as OpenAI's messages, JSON", takes_path=True),
    "help": Command("", "show this"),
    "exit": Command("", "end, as Ctrl-D does"),
}
HINT = "A path in the line, typed or dragged, is attached. Ctrl-C stops an answer, Ctrl-D ends."


class Attached(NamedTuple):
    """A medium that waits for the next question."""

    name: str
    kind: Modality
    part: Part


class Session:
    """A conversation on a terminal.

    Args:
        client: Way to the server.
        model: The ensemble.
        instruction: What the model is told first; None: nothing.
        media: Files and URLs for the first question.
        options: Sampling and ``timeout``, as `Client.chat` takes them.

    Raises:
        MediaError: A file is not there, or is no medium.
    """

    def __init__(
        self,
        client: Client,
        *,
        model: str,
        instruction: str | None,
        media: Sequence[str],
        options: dict[str, Any],
    ) -> None:
        self._client = client
        self._model = model
        self._start = [] if instruction is None else [system(instruction)]
        self._options = options
        self._console = Console(highlight=False)
        self._said: list[Message] = []
        self._attached = [_attach(source) for source in media]

    def run(self) -> None:
        """Ask and answer until the person has had enough."""
        takes_path = {name: command.takes_path for name, command in COMMANDS.items()}
        editor = Editor(takes_path, self._toolbar)
        self._note(f"{self._model}. {HINT} /help")
        for one in self._attached:
            self._tell(one)
        unsent = ""
        while True:
            try:
                line = editor.read(unsent)
            except KeyboardInterrupt:
                unsent = ""
                continue
            except EOFError:
                return
            unsent = ""
            try:
                if not self._take(line):
                    return
            except (MediaError, TriptychClientError, ValueError, OSError) as error:
                code = f" ({error.code})" if isinstance(error, TriptychClientError) else ""
                self._console.print(f"[red]{escape(str(error))}{code}[/]")
                unsent = line  # to be changed and sent again

    def _toolbar(self) -> str:
        """One line on what the next question goes with."""
        turns = len(self._said) // 2
        parts = [self._model, f"{turns} question{'s' * (turns != 1)} so far"]
        if self._attached:
            parts.append("attached: " + ", ".join(one.name for one in self._attached))
        return "  ·  ".join(parts)

    def _take(self, text: str) -> bool:
        """Do what a line says; False: it ends the session."""
        line = compose.read(text, COMMANDS)
        if line.command == "exit":
            return False
        if line.command:
            self._obey(line.command, line.text)
        elif line.text:
            self._ask(line.text, [*self._attached, *map(_attach, line.media)])
        else:  # a file alone, to be asked about next
            self._add(list(line.media))
        return True

    def _obey(self, command: str, text: str) -> None:
        if command in MAKE:
            self._add(compose.words(text), command)
        elif command == "undo":
            self._undo()
        elif command == "clear":
            self._said, self._attached = [], []
            self._note("a new conversation")
        elif command == "save":
            self._save(text)
        else:
            for name, about in COMMANDS.items():
                self._note(f"  /{f'{name} {about.usage}':<14} {about.help}")
            self._note(f"{HINT} Alt-Enter begins a line.")

    def _add(self, sources: list[str], kind: Modality | None = None) -> None:
        if kind and not sources:
            raise ValueError(f"/{kind} needs a path or a URL")
        for source in sources:
            self._attached.append(_attach(source, kind))
            self._tell(self._attached[-1])

    def _tell(self, attached: Attached) -> None:
        self._note(f"attached: {attached.kind} {attached.name}")

    def _undo(self) -> None:
        if self._attached:
            self._attached = []
            self._note("nothing is attached")
        elif self._said:
            del self._said[-2:]
            self._note("the last question and its answer are forgotten")
        else:
            raise ValueError("nothing has been said")

    def _save(self, text: str) -> None:
        if not (paths := compose.words(text)):
            raise ValueError("/save needs the name of a file")
        path = Path(paths[0]).expanduser()
        with path.open("x") as file:  # never over what is there
            json.dump([*self._start, *self._said], file, ensure_ascii=False, indent=1)
        self._note(f"saved {len(self._said)} messages to {path}")

    def _ask(self, text: str, media: list[Attached]) -> None:
        """Ask; what comes to nothing leaves no trace.

        Raises:
            TriptychClientError: What ended the answer.
        """
        question = user(*(one.part for one in media), text)
        messages = [*self._start, *self._said, question]
        meter = Meter()
        note = ""
        with LiveAnswer(self._console) as answer:
            try:
                with self._client.chat(messages, model=self._model, **self._options) as chunks:
                    for chunk in meter.watch(chunks):
                        answer.add(chunk.text)
            except KeyboardInterrupt:
                note = "stopped"
        if answer.text:
            self._said += [question, assistant(answer.text)]
            self._attached = []
        if meter.finish_reason == "length":
            note = "cut off at the limit of tokens"
        self._note(", ".join((*filter(None, (note,)), *meter.facts())) + "\n")

    def _note(self, text: str) -> None:
        self._console.print(f"[dim]{escape(text)}[/]")


def _attach(source: str, kind: Modality | None = None) -> Attached:
    """Read a file now, so that what is wrong is said now.

    Raises:
        MediaError: The file is not there, or is no medium of that kind.
    """
    part = MAKE[kind](source) if kind else part_of(source)
    name = Path(source.partition("?")[0]).name if not source.startswith("data:") else "data"
    return Attached(name, kind or modality(source), part)
