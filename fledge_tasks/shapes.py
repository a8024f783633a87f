"""What a TOML or JSON document may hold, told as data.

A document is a `Table` of `Value`, `Array`, `TableOf`, `Table` and `Variants`. From one such shape
come all mistakes of a document at once, each with its key path, the order of the keys in what we
write, and a JSON Schema (`schema.py`). A shape never changes a document and never raises, whatever
TOML or JSON holds.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

Finding = tuple[str, str, str | None]
"""One mistake: dotted key path ('' for the document), message, hint."""

MAX_INTEGER = (1 << 31) - 1

_SHOWN_CHARACTERS = 60
_BARE_KEY = re.compile(r"[A-Za-z0-9_$-]+")


@dataclass(frozen=True)
class Value:
    """A value of exactly one type: a boolean is no integer, and neither is 1.0.

    pattern           is found in a string
    forbidden         is not found in it
    minimum, maximum  of an integer, both included
    choices           one of which it must be
    beyond            what is accepted, too, though no pattern can tell; a JSON Schema does without

    Both patterns mean the same to Python and to ECMA-262, as JSON Schema wants them, and to RE2: no look-around,
    and `$` only for the end of the string.
    """

    kind: type
    expected: str
    _: KW_ONLY
    pattern: str | None = None
    forbidden: str | None = None
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str | int, ...] = ()
    beyond: Callable[[Any], bool] = lambda _: False
    hint: str | None = None

    def accepts(self, value: object) -> bool:
        """Tell whether `value` is such a value."""
        return type(value) is self.kind and (self._is_usual(value) or self.beyond(value))

    def _is_usual(self, value: object) -> bool:
        if self.choices and value not in self.choices:
            return False
        if isinstance(value, str):
            return (self.pattern is None or _is_found(self.pattern, value)) and not (
                self.forbidden is not None and _is_found(self.forbidden, value)
            )
        if isinstance(value, int):
            return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)
        return True

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if not self.accepts(value):
            # With one choice alone, whoever wrote something else did not misspell it.
            words = [choice for choice in self.choices if isinstance(choice, str)] if len(self.choices) > 1 else []
            yield path, f"found {shown(value)}, expected {self.expected}", self.hint or suggestion(value, words)

    def ordered(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Array:
    """A list of like items. With `first` there is at least one, which is also like that; `distinct`: each once."""

    item: Shape
    expected: str = "an array"
    _: KW_ONLY
    first: Value | None = None
    distinct: bool = False

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if (
            not isinstance(value, list)
            or (self.first and not (value and self.first.accepts(value[0])))
            or (self.distinct and any(value.count(each) > 1 for each in value))
        ):
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
class Holds:
    """An array in which a word is, whatever else is."""

    word: str

    def accepts(self, value: object) -> bool:
        """Tell whether `value` is such an array."""
        return isinstance(value, list) and self.word in value


@dataclass(frozen=True)
class Conflict:
    """Keys that are right one by one, not together: all of `having` stand there like that, none of `lacking` does."""

    message: str
    having: Mapping[str, Value | Holds]
    lacking: Mapping[str, Value | Holds] = dataclasses.field(default_factory=dict)

    def applies(self, table: Mapping[str, object]) -> bool:
        """Tell whether a table has this conflict."""

        def has(key: str, value: Value | Holds) -> bool:
            return key in table and value.accepts(table[key])

        return all(has(*each) for each in self.having.items()) and not any(has(*each) for each in self.lacking.items())


@dataclass(frozen=True)
class Table:
    """A table of known keys.

    `derived` are keys that a user may leave out, and that are there when we have added ours. `place` is where the
    allowed keys are allowed, for the message about any other.
    """

    fields: Mapping[str, Shape]
    required: Collection[str] = ()
    _: KW_ONLY
    derived: Collection[str] = ()
    conflicts: Sequence[Conflict] = ()
    place: str = "here"
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
        for conflict in self.conflicts:
            if conflict.applies(value):
                yield path, conflict.message, None

    def ordered(self, value: Any) -> Any:
        return {key: shape.ordered(value[key]) for key, shape in self.fields.items() if key in value}

    def finished(self) -> Table:
        """Return the shape of what comes of such a table when all that we derive is there."""
        fields = {key: shape.finished() if isinstance(shape, Table) else shape for key, shape in self.fields.items()}
        required = [key for key in fields if key in self.required or key in self.derived]
        return dataclasses.replace(self, fields=fields, required=required, derived=())


@dataclass(frozen=True)
class Variants:
    """A table in which the string at `key` decides which other keys it has."""

    key: str
    tables: Mapping[str, Table]
    expected: str = "a table"

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        yield from self._table(value).findings(path, value)

    def ordered(self, value: Any) -> Any:
        return self._table(value).ordered(value)

    @functools.cached_property
    def by_choice(self) -> dict[str, Table]:
        """The whole table of each choice."""
        return {choice: self._whole(choice, table) for choice, table in self.tables.items()}

    def _whole(self, choice: str, table: Table) -> Table:
        fields = {self.key: one_of(choice), **table.fields}
        place = f"with {self.key} {quoted(choice)}"
        return dataclasses.replace(table, fields=fields, required=(self.key, *table.required), place=place)

    @functools.cached_property
    def _any(self) -> Table:
        """The table of which it is not known which one it should be: what depends on that is not looked at."""
        fields: dict[str, Shape] = {self.key: one_of(*self.tables)}
        for table in self.tables.values():
            for key, shape in table.fields.items():
                fields[key] = shape if fields.get(key, shape) == shape else Anything()
        return Table(fields, required=(self.key,))

    def _table(self, value: object) -> Table:
        """Return the table that `value` should be, one of all keys if it does not say which."""
        choice = value.get(self.key) if isinstance(value, dict) else None
        return self.by_choice.get(choice, self._any) if isinstance(choice, str) else self._any


@dataclass(frozen=True)
class Anything:
    """Whatever stands there."""

    expected: str = "anything"

    def findings(self, path: str, value: object) -> Iterator[Finding]:  # noqa: ARG002
        yield from ()

    def ordered(self, value: Any) -> Any:
        return value


Shape = Value | Array | TableOf | Table | Variants | Anything
"""What a part of a document may be.

`expected` says, as a noun for messages, what would have been right. `findings(path, value)` yields every mistake
in `value`, which stands at the key `path`; `ordered(value)` returns a value without mistakes, its keys in the
order of the shape.
"""


def text(expected: str = "a non-empty string") -> Value:
    """Return the shape of a string that is not blank; Volant trims strings before it looks at them."""
    return Value(str, expected, pattern=r"\S")


def integer(minimum: int, maximum: int = MAX_INTEGER) -> Value:
    """Return the shape of an integer, both limits included."""
    return Value(int, f"an integer from {minimum} to {maximum}", minimum=minimum, maximum=maximum)


def one_of(*choices: str, hint: str | None = None) -> Value:
    """Return the shape of a string that is one of `choices`."""
    expected = " or ".join(filter(None, (", ".join(map(quoted, choices[:-1])), quoted(choices[-1]))))
    return Value(str, f"the string {expected}", choices=choices, hint=hint)


def matching(pattern: str, expected: str, hint: str | None = None) -> Value:
    """Return the shape of a string that matches a regular expression as a whole."""
    return Value(str, expected, pattern=f"^(?:{pattern})$", hint=hint)


URL = Value(str, "an http(s) URL", pattern="^https?://[!-.0-~][!-~]*$")
"""A string that looks like an http or https URL."""


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("$", r"\Z"))  # Python's `$` is before a newline at the end, too


def _is_found(pattern: str, value: str) -> bool:
    return _compiled(pattern).search(value) is not None


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
