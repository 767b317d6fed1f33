"""``triptych settings``: every setting with its default and meaning, read off its own docstring."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

import msgspec

from triptych import settings

STAGES: dict[str, type[settings.Settings]] = {
    "preprocess": settings.PreprocessSettings,
    "encoder": settings.EncoderSettings,
    "remote_encoder": settings.RemoteEncoderSettings,
    "decode_*": settings.DecodeSettings,
}


class Setting(msgspec.Struct, frozen=True):
    """What a setting is."""

    name: str
    default: Any
    """None: it must be given."""
    meaning: str
    stages: tuple[str, ...]

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return settings.PREFIX + self.name.upper()


def every() -> list[Setting]:
    """All settings of all stages, in the order of `triptych.settings`."""
    found: dict[str, Setting] = {}
    for stage, kind in STAGES.items():
        meanings = dict(_meanings(kind))
        for field in msgspec.structs.fields(kind):
            default = None if field.required else field.default
            before = found[field.name].stages if field.name in found else ()
            meaning = meanings[field.name]
            found[field.name] = Setting(field.name, default, meaning, (*before, stage))
    return list(found.values())


def markdown(names: set[str] | None = None) -> str:
    """A table of the settings called ``names``, or of all."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for setting in every():
        if names is None or setting.name in names:
            shown = _shown(setting.default)
            lines.append(f"| `{setting.name}` | {shown} | {setting.meaning.replace('``', '`')} |")
    return "\n".join(lines)


def media_names() -> set[str]:
    """The limits on what a caller may send."""
    return set(settings.MediaSettings.__struct_fields__) - set(settings.Settings.__struct_fields__)


def _shown(default: Any) -> str:
    if default is None:
        return ""
    if default in ("", ()):
        return "none"
    return f"{default:,}" if type(default) is int else str(default).lower()


def _meanings(kind: type) -> Iterator[tuple[str, str]]:
    """Each field's docstring on one line; those of the base classes too."""
    for base in reversed(kind.__mro__):
        if not (isinstance(base, type) and issubclass(base, settings.Settings)):
            continue
        [body] = ast.parse(inspect.getsource(base)).body
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                said = ""
                if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                    said = " ".join(str(doc.value.value).split())
                yield field.target.id, said
