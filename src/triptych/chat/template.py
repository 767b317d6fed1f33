"""Renders a checkpoint's own chat template, as Hugging Face does.

The environment is that of transformers' ``utils/chat_template_utils.py``; a test holds the two
against each other. The template is the model author's program: it runs in Jinja's sandbox.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from triptych.chat.conversations import CONVERSATIONS, Conversation
from triptych.chat.messages import Message, Part, TextPart
from triptych.chat.tool_calls import ToolCallReader
from triptych.chat.tools import Tool, ToolCall, show_tool
from triptych.contract import Modality
from triptych.errors import ConfigurationError, InvalidRequest, UnknownField

_PROBE = "triptych probe of the template"


class ChatTemplate:
    """One checkpoint's chat template, compiled; and the one for tools, where that is another.

    Args:
        checkpoint: Directory in Hugging Face's layout.
        placeholders: The text that stands for one medium of each modality, for templates that
            take strings only.
        chosen: In place of the checkpoint's own: the path of a Jinja file, or the name of one of
            `CONVERSATIONS`.

    Raises:
        ConfigurationError: There is no template, it is broken, it takes no form of content, or it
            does not show the media that the model is for.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        placeholders: Mapping[Modality, str] | None = None,
        chosen: str = "",
    ) -> None:
        root = Path(checkpoint)
        placeholders = placeholders or {}
        self._with_tools: _Template | None = None
        if chosen in CONVERSATIONS:
            self._template: _Template | Conversation = CONVERSATIONS[chosen]
        else:
            self._template = self._read(root, placeholders, chosen)
        for modality in _needed(placeholders):
            token = placeholders[modality]
            if not self._template.shows(modality, token):
                raise ConfigurationError(
                    f"the chat template {chosen or f'of {root}'} has no placeholder for "
                    f"{modality}s: the model has {token!r} stand for each"
                )

    @property
    def leaves_out(self) -> bool:
        """Whether the tokens that begin every text are left to the tokenizer."""
        return isinstance(self._template, Conversation)

    def _read(self, root: Path, placeholders: Mapping[Modality, str], chosen: str) -> _Template:
        first, *others = [read_file(chosen)] if chosen else read_templates(root)
        template = _Template(first, root, placeholders)
        self._with_tools = template if template.takes_tools else None
        while others and self._with_tools is None:
            with contextlib.suppress(ConfigurationError):  # it is not the one that must work
                other = _Template(others.pop(0), root, placeholders)
                self._with_tools = other if other.takes_tools else None
        return template

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The prompt's text, up to where the assistant's answer begins.

        Raises:
            InvalidRequest: The template does not take these messages, and says why.
            UnknownField: It takes no tools, and there are some, or calls of some.
        """
        template: _Template | Conversation = self._template
        if where := _first_of_tools(messages, tools):
            if self._with_tools is None:
                raise UnknownField(
                    "the model's chat template takes no tools whose calls could be read",
                    where=where,
                )
            template = self._with_tools
        try:
            return template.render(messages, tools)
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}", where="messages"
            ) from error


class _Template:
    """One template.

    Templates differ in what they take as a message's content: a string, a list of parts, or
    either. Which, is found once by rendering a probe; each message is then given in a form that
    the template takes. Likewise whether it shows tools, and writes calls of them as we read them.
    """

    def __init__(self, source: str, root: Path, placeholders: Mapping[Modality, str]) -> None:
        self._placeholders = placeholders
        self._variables = special_tokens(root)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigurationError(f"the chat template of {root} is broken: {error}") from error
        self._takes_strings = self._keeps(_PROBE)
        self._takes_lists = self._keeps([{"type": "text", "text": _PROBE}])
        if not (self._takes_strings or self._takes_lists):
            raise ConfigurationError(
                f"the chat template of {root} loses a user's text, whether a string or a list"
            )
        self.takes_tools = self._keeps_tools()

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        return self._render([self._as_dict(message) for message in messages], tools)

    def _render(self, messages: list[dict[str, Any]], tools: Sequence[Tool] = ()) -> str:
        return self._template.render(
            messages=messages,
            tools=[show_tool(tool) for tool in tools] or None,
            documents=None,
            add_generation_prompt=True,
            **self._variables,
        )

    def _keeps(self, content: object) -> bool:
        try:
            rendered = self._render([{"role": "user", "content": content}])
        except Exception:
            # Whatever a template does with a form that it was not written for.
            return False
        # A template for strings that concatenates writes a list out as Python shows it.
        return _PROBE in rendered and (isinstance(content, str) or repr(content) not in rendered)

    def shows(self, modality: Modality, placeholder: str) -> bool:
        """Whether a medium of that modality stands as one ``placeholder``."""
        if not self._takes_lists:
            return True  # it is we who write it
        content = [{"type": modality, modality: ""}, {"type": "text", "text": _PROBE}]
        try:
            return self._render([{"role": "user", "content": content}]).count(placeholder) == 1
        except Exception:
            return False

    def _keeps_tools(self) -> bool:
        user = Message("user", "a")
        call = ToolCall("call_0", "probe_of_tools", {"a": _PROBE})
        turns = [user, Message("assistant", "", tool_calls=(call,))]
        try:
            shown = self.render([user], [Tool(call.name)])
            said = ToolCallReader([call.name]).feed(self.render(turns, []))
        except Exception:
            return False
        arguments = "".join(piece.arguments for piece in said.calls)
        return call.name in shown and _PROBE in arguments

    def _as_dict(self, message: Message) -> dict[str, Any]:
        entry = {"role": message.role, "content": self._content(message.content)}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            # Templates write the arguments as JSON themselves.
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.tool_calls
            ]
        return entry

    def _content(self, content: str | Sequence[Part]) -> Any:
        if isinstance(content, str):
            if self._takes_strings or not content:
                return content
            return [{"type": "text", "text": content}]
        if self._takes_lists:
            # Templates ask for either the type or the key.
            return [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": part.modality, part.modality: ""}
                for part in content
            ]
        return "\n".join(
            part.text if isinstance(part, TextPart) else self._placeholders.get(part.modality, "")
            for part in content
        )


def _first_of_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    """Path of the first thing in a request that has to do with tools; empty: nothing has."""
    if tools:
        return "tools"
    for index, message in enumerate(messages):
        if message.tool_calls:
            return f"messages[{index}].tool_calls"
        if message.role == "tool":
            return f"messages[{index}].role"
    return ""


def _needed(placeholders: Mapping[Modality, str]) -> Iterable[Modality]:
    """The modalities that a template must show: pictures, or whatever else a model is for."""
    return ["image"] if "image" in placeholders else list(placeholders)


def read_file(path: str) -> str:
    """The source of a template in a file of its own.

    Raises:
        ConfigurationError: There is no such file, nor a conversation of that name.
    """
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"chat_template {path!r} is no readable file ({error}), and none of "
            f"{', '.join(CONVERSATIONS)}"
        ) from None


def read_templates(checkpoint: Path) -> list[str]:
    """The sources of the templates, the one for chats without tools first.

    Several by name are an older form, in which ``tool_use`` is the one for tools. Where processor
    and tokenizer have one each, it may be the tokenizer's alone that takes tools.

    Raises:
        ConfigurationError: There is none, or a file is broken.
    """
    found = [read_template(checkpoint)]
    last = read_json(checkpoint / "tokenizer_config.json").get("chat_template")
    if isinstance(last, list):
        named = {entry.get("name"): entry.get("template") for entry in last}
        others = [named.get("tool_use"), named.get("default")]
    else:
        others = [last]
    return found + [source for source in others if isinstance(source, str) and source not in found]


def read_template(checkpoint: Path) -> str:
    """The template's source, from where Hugging Face's processors look for it, in their order.

    Raises:
        ConfigurationError: No file has one, or a file is broken.
    """
    plain = checkpoint / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(checkpoint / name).get("chat_template")
        if isinstance(found, list):
            # Several by name, as tokenizers with a template for tools have them.
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
        if isinstance(found, str):
            return found
    raise ConfigurationError(
        f"{checkpoint} has no chat template: looked for chat_template.jinja, chat_template.json "
        "and chat_template in tokenizer_config.json"
    )


def special_tokens(checkpoint: Path) -> dict[str, str]:
    """The special tokens by name (``bos_token``, …), which templates use as variables."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(checkpoint / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; empty where there is no such file.

    Raises:
        ConfigurationError: It is no JSON object.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{file} holds no JSON object")
    return found


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant said, for training; here it changes nothing."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block, as transformers has it, so that names set inside stay inside.
        call = self.call_method("_say")
        return jinja2.nodes.CallBlock(call, [], [], cast("Any", body)).set_lineno(line)

    def _say(self, caller: Any) -> str:
        return cast("str", caller())


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def find_forged(text: str, placeholders: Iterable[str]) -> str | None:
    """The first of ``placeholders`` that a caller's ``text`` holds."""
    return next((token for token in placeholders if token in text), None)
