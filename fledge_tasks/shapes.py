"""What a TOML or JSON document may hold, told as data.

A document is a `Table` of `Value`, `Array`, `TableOf` and `Table`. From one such shape come all
mistakes of a document at once, each with its key path, and the order of the keys in what we write.
A shape never changes a document and never raises, whatever TOML or JSON holds.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Finding = tuple[str, str, str | None]
"""One mistake: dotted key path ('' for the document), message, hint."""

MAX_INTEGER = (1 << 31) - 1

_SHOWN_CHARACTERS = 60
_BARE_KEY = re.compile(r"[A-Za-z0-9_$-]+")


class Shape(Protocol):
    """What a part of a document may be."""

    @property
    def expected(self) -> str:
        """What would have been right, as a noun for messages."""

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        """Yield every mistake in `value`, which stands at the key `path`."""

    def ordered(self, value: Any) -> Any:
        """Return a `value` without mistakes, its keys in the order of the shape."""


@dataclass(frozen=True)
class Value:
    """A value of exactly one type (a boolean is no integer) that `accepts` accepts."""

    kind: type
    expected: str
    accepts: Callable[[Any], bool] = lambda _: True
    choices: tuple[str, ...] = ()
    hint: str | None = None

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if type(value) is not self.kind or not self.accepts(value):
            yield path, f"found {shown(value)}, expected {self.expected}", self.hint or suggestion(value, self.choices)

    def ordered(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Array:
    """A list of like items. `accepts` judges it as a whole."""

    item: Shape
    expected: str = "an array"
    accepts: Callable[[list[Any]], bool] = lambda _: True

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if not isinstance(value, list) or not self.accepts(value):
            yield path, f"found {shown(value)}, expected {self.expected}", None
            return
        for number, item in enumerate(value):
            yield from self.item.findings(f"{path}[{number}]", item)

    def ordered(self, value: Any) -> Any:
        return [self.item.ordered(item) for item in value]


@dataclass(frozen=True)
class TableOf:
    """A table whose keys the user chooses; written in the order of the keys."""

    item: Shape
    key: Value | None = None
    expected: str = "a table"

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if not isinstance(value, dict):
            yield path, f"found {shown(value)}, expected {self.expected}", None
            return
        for key, item in value.items():
            if self.key and not self.key.accepts(key):
                yield path, f"found the key {quoted(key)}, expected {self.key.expected}", None
            yield from self.item.findings(join(path, key), item)

    def ordered(self, value: Any) -> Any:
        return {key: self.item.ordered(value[key]) for key in sorted(value)}


@dataclass(frozen=True)
class Table:
    """A table of known keys. `conflict` may object to keys that are right one by one, not together.

    `place` is where the allowed keys are allowed, for the message about any other.
    """

    fields: Mapping[str, Shape]
    required: Collection[str] = ()
    place: str = "here"
    conflict: Callable[[dict[str, Any]], str | None] = lambda _: None
    expected: str = "a table"

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if not isinstance(value, dict):
            yield path, f"found {shown(value)}, expected {self.expected}", None
            return
        for key, item in value.items():
            if key in self.fields:
                yield from self.fields[key].findings(join(path, key), item)
            else:
                message = f"unknown key, allowed {self.place}: {', '.join(self.fields)}"
                yield join(path, key), message, suggestion(key, self.fields)
        for key in self.required:
            if key not in value:
                yield join(path, key), f"missing, expected {self.fields[key].expected}", None
        if objection := self.conflict(value):
            yield path, objection, None

    def ordered(self, value: Any) -> Any:
        return {key: shape.ordered(value[key]) for key, shape in self.fields.items() if key in value}


def text(expected: str = "a non-empty string") -> Value:
    """Return the shape of a string that is not blank; Volant trims strings before it looks at them."""
    return Value(str, expected, lambda found: bool(found.strip()))


def integer(minimum: int, maximum: int = MAX_INTEGER) -> Value:
    """Return the shape of an integer, both limits included."""
    return Value(int, f"an integer from {minimum} to {maximum}", lambda found: minimum <= found <= maximum)


def one_of(*choices: str, hint: str | None = None) -> Value:
    """Return the shape of a string that is one of `choices`."""
    expected = " or ".join(filter(None, (", ".join(map(quoted, choices[:-1])), quoted(choices[-1]))))
    suggested = choices if len(choices) > 1 else ()
    return Value(str, f"the string {expected}", lambda found: found in choices, suggested, hint)


def matching(pattern: str, expected: str, hint: str | None = None) -> Value:
    """Return the shape of a string that matches a regular expression as a whole."""
    return Value(str, expected, lambda found: re.fullmatch(pattern, found) is not None, hint=hint)


def quoted(found: str) -> str:
    """Return a string of the user's for messages: in quotes, not too long, safe for a terminal."""
    short = found if len(found) <= _SHOWN_CHARACTERS else f"{found[:_SHOWN_CHARACTERS]}..."
    return json.dumps(short, ensure_ascii=not short.isprintable())


def shown(value: object) -> str:
    """Return type and value of what a user wrote, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean {str(value).lower()}"
        case int():
            return f"integer {value}" if -(1 << 64) < value < 1 << 64 else "an integer beyond 64 bits"
        case float():
            return f"float {value}"
        case str():
            return f"string {quoted(value)}" if value else "an empty string"
        case list():
            return "an array" if value else "an empty array"
        case dict():
            return "a table"
        case _:
            return "a date or time"


def join(path: str, key: str) -> str:
    """Return the key path of `key` in the table at `path`, quoted as TOML wants it."""
    name = key if _BARE_KEY.fullmatch(key) else quoted(key)
    return f"{path}.{name}" if path else name


def suggestion(found: object, allowed: Collection[str]) -> str | None:
    """Return a hint when `found` looks like a misspelt word out of `allowed`, else None."""
    close = difflib.get_close_matches(found.lower(), allowed, 1) if isinstance(found, str) else []
    return f"did you mean {quoted(close[0])}?" if close else None


def is_url(found: str) -> bool:
    """Tell whether a string looks like an http or https URL."""
    return re.fullmatch(r"https?://(?!/)[!-~]+", found) is not None
