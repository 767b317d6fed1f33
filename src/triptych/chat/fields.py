"""Reads one JSON object field by field; every refusal names the place, the value and the limit."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from typing import Literal, get_args

from triptych.errors import InvalidValue, UnknownField

SHOWN = 64
"""Characters of a caller's string that an error repeats."""

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]{0,63}")


def show(value: object) -> str:
    """``value`` as JSON, cut short enough for an error."""
    if isinstance(value, str):
        if len(value) <= SHOWN:
            return json.dumps(value, ensure_ascii=False)
        start = json.dumps(value[:SHOWN], ensure_ascii=False)
        return f'{start[:-1]}…" ({len(value)} characters)'
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return json.dumps(value)


def wrong(where: str, rule: str, value: object) -> InvalidValue:
    """The error for ``value`` at ``where``, which breaks ``rule``."""
    return InvalidValue(f"{rule}, got {show(value)}", where=where)


def as_list(value: object, where: str, what: str) -> list[object]:
    """``value`` if it is a list of at least one ``what``."""
    if not isinstance(value, list):
        raise wrong(where, f"must be a list of {what}", value)
    if not value:
        raise InvalidValue(f"must not be empty, got no {what}", where=where)
    return value


class Fields:
    """A JSON object whose fields are taken one by one; `close` refuses what nobody took.

    A field that is null counts as one that was not given, as OpenAI has it.

    Args:
        value: What stands at ``where``; anything but an object is refused.
        where: JSON path of the object, empty for the whole request.
        unserved: Fields that the API has but that are not served; refused by name unless null.
    """

    def __init__(self, value: object, where: str, unserved: Collection[str] = ()) -> None:
        if not isinstance(value, dict):
            raise wrong(where, "must be an object", value)
        self._left: dict[str, object] = dict(value)
        self._known: list[str] = []
        self._where = where
        self._unserved = unserved

    def path(self, name: str) -> str:
        """JSON path of the field ``name``."""
        if not _PLAIN_NAME.fullmatch(name):
            return self._where
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str) -> object:
        """The field as it stands, or None."""
        self._known.append(name)
        return self._left.pop(name, None)

    def need(self, name: str) -> object:
        """The field as it stands.

        Raises:
            InvalidValue: It is missing or null.
        """
        value = self.take(name)
        if value is None:
            raise InvalidValue("is required", where=self.path(name))
        return value

    def string(self, name: str, *, longest: int | None = None) -> str | None:
        """A string of at most ``longest`` characters."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise wrong(self.path(name), "must be a string", value)
        if longest is not None and len(value) > longest:
            raise wrong(self.path(name), f"must have at most {longest} characters", value)
        return value

    def text(self, name: str) -> str:
        """A string that must be there and may be empty."""
        value = self.need(name)
        if not isinstance(value, str):
            raise wrong(self.path(name), "must be a string", value)
        return value

    def filled(self, name: str) -> str:
        """A string that must be there and must not be empty."""
        value = self.text(name)
        if not value:
            raise wrong(self.path(name), "must not be empty", value)
        return value

    def choice(self, name: str, kind: object) -> str | None:
        """One of the strings of ``kind``, a `Literal`."""
        value = self.take(name)
        if value is None:
            return None
        allowed = get_args(kind)
        if not isinstance(value, str) or value not in allowed:
            raise wrong(self.path(name), f"must be one of {', '.join(allowed)}", value)
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(self.path(name), "must be true or false", value)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number from ``low`` to ``high``, both included."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(self.path(name), "must be an integer", value)
        if not low <= value <= high:
            raise wrong(self.path(name), _range("integer", low, high, above=False), value)
        return value

    def integers(self, name: str, count: int, low: int, high: int) -> tuple[int, ...] | None:
        """A list of ``count`` whole numbers, each from ``low`` to ``high``."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise wrong(self.path(name), f"must be a list of {count} integers", value)
        each = Fields({str(index): entry for index, entry in enumerate(value)}, self.path(name))
        found = [each.integer(str(index), low, high) for index in range(count)]
        if None in found:
            raise wrong(self.path(name), f"must be a list of {count} integers", value)
        return tuple(entry for entry in found if entry is not None)

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """A number from ``low`` to ``high``; ``above`` leaves out ``low`` itself."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise wrong(self.path(name), "must be a number", value)
        if not low <= value <= high or (above and value == low):
            raise wrong(self.path(name), _range("number", low, high, above=above), value)
        return float(value)

    def close(self) -> None:
        """Refuse the fields that are left.

        Raises:
            UnknownField: There is one.
        """
        for name, value in self._left.items():
            if name in self._unserved:
                if value is not None:
                    raise UnknownField("this field is not served", where=self.path(name))
                continue
            near = difflib.get_close_matches(name[:SHOWN], self._known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownField(f"unknown field {show(name)}{hint}", where=self.path(name))


def _range(kind: Literal["integer", "number"], low: float, high: float, *, above: bool) -> str:
    start = f"above {low}" if above else f"from {low}"
    article = "an" if kind == "integer" else "a"
    return f"must be {article} {kind} {start} to {high}"
