"""The line that a person writes: history over sessions, completion, several lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style

STYLE = Style.from_dict({"prompt": "bold ansicyan", "bottom-toolbar": "noreverse ansibrightblack"})


class Editor:
    """Reads questions from the terminal.

    Args:
        commands: What there is after a slash, and whether each takes a path.
        toolbar: What to show below the line, asked for whenever it is drawn.
    """

    def __init__(self, commands: Mapping[str, bool], toolbar: Callable[[], str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            message=[("class:prompt", "› ")],
            prompt_continuation="  ",
            multiline=True,  # so that pasted lines stay lines; Enter sends all the same
            history=_history(),
            completer=_Commands(commands),
            complete_while_typing=False,
            key_bindings=_keys(),
            bottom_toolbar=toolbar,
            style=STYLE,
        )

    def read(self, default: str = "") -> str:
        """The next question.

        Args:
            default: What stands there already.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            EOFError: Ctrl-D on an empty line.
        """
        return self._session.prompt(default=default)


class _Commands(Completer):
    """Completes commands, and paths after those that take one."""

    def __init__(self, commands: Mapping[str, bool]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """As prompt_toolkit has it."""
        text = document.text_before_cursor
        command, space, rest = text.partition(" ")
        if space and self._commands.get(command[1:]):
            path = rest.rpartition(" ")[2]
            yield from self._paths.get_completions(Document(path, len(path)), event)
        elif text.startswith("/") and not space:
            for name in self._commands:
                if name.startswith(text[1:]):
                    yield Completion(f"{name} ", start_position=1 - len(text), display=f"/{name}")


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add(Keys.Enter)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add(Keys.Escape, Keys.Enter)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """What was asked before, also in earlier sessions, for this user's eyes only."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "triptych" / "questions"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
