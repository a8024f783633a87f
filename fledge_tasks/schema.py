"""JSON Schemas (draft 7, that of plugin-manifest-v1) of the shapes that do the checking.

A schema accepts what the shape finds no mistake in, and nothing else, with exceptions that lie in JSON
Schema: it takes 1.0 for an integer; validators that search with Python's `re` take a string with a newline
behind it for one without, where a pattern ends in `$`; and what is `beyond` a pattern is left out.
"""

from __future__ import annotations

from typing import Any, assert_never

from fledge_tasks.shapes import Anything, Array, Conflict, Holds, Shape, Table, TableOf, Value, Variants

DRAFT = "http://json-schema.org/draft-07/schema#"

_TYPES = {str: "string", int: "integer", bool: "boolean", dict: "object"}

Schema = dict[str, Any]


def document(shape: Shape, title: str) -> Schema:
    """Return the schema of a whole document. The same shape gives the same schema, keys in the same order."""
    return {"$schema": DRAFT, "title": title, **_schema(shape)}


def _schema(shape: Shape) -> Schema:
    match shape:
        case Value():
            return _value(shape)
        case Array():
            return _array(shape)
        case TableOf():
            names = {"propertyNames": _value(shape.key)} if shape.key else {}
            return {"type": "object", **names, "additionalProperties": _schema(shape.item)}
        case Table():
            return _table(shape)
        case Variants():
            return _variants(shape)
        case Anything():
            return {}
        case _:
            assert_never(shape)


def _value(value: Value) -> Schema:
    limits = {
        "enum": list(value.choices) or None,
        "pattern": value.pattern,
        "not": {"pattern": value.forbidden} if value.forbidden is not None else None,
        "minimum": value.minimum,
        "maximum": value.maximum,
    }
    given = {key: limit for key, limit in limits.items() if limit is not None}
    return {"description": value.expected, "type": _TYPES[value.kind], **given}


def _array(array: Array) -> Schema:
    head: Schema = {"description": array.expected, "type": "array"}
    if array.distinct:
        head["uniqueItems"] = True
    if array.first is None:
        return {**head, "items": _schema(array.item)}
    # Of the first item both hold. It has a schema of its own, and so all others are 'additional'.
    first = {"allOf": [_schema(array.first), _schema(array.item)]}
    return {**head, "minItems": 1, "items": [first], "additionalItems": _schema(array.item)}


def _table(table: Table) -> Schema:
    schema: Schema = {
        "type": "object",
        "properties": {key: _schema(shape) for key, shape in table.fields.items()},
        "additionalProperties": False,
    }
    if table.required:
        schema["required"] = list(table.required)
    if table.conflicts:
        schema["allOf"] = [{"not": _conflict(conflict)} for conflict in table.conflicts]
    return schema


def _conflict(conflict: Conflict) -> Schema:
    """Return the schema of a table that has the conflict."""

    def having(key: str, value: Value | Holds) -> Schema:
        there = _value(value) if isinstance(value, Value) else {"type": "array", "contains": {"const": value.word}}
        return {"required": [key], "properties": {key: there}}

    both: Schema = {"description": conflict.message, "allOf": [having(*each) for each in conflict.having.items()]}
    if conflict.lacking:
        both["not"] = {"anyOf": [having(*each) for each in conflict.lacking.items()]}
    return both


def _variants(variants: Variants) -> Schema:
    return {
        "type": "object",
        "properties": {variants.key: {"enum": list(variants.tables)}},
        "required": [variants.key],
        "allOf": [
            {"if": {"properties": {variants.key: {"const": choice}}}, "then": _table(table)}
            for choice, table in variants.by_choice.items()
        ],
    }
