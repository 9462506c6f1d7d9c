"""The form of an answer that a JSON schema asks for: what is fixed in it, and what is left to the model.

    parts({"type": "object", "properties": {"odd": {"type": "integer", "minimum": 1, "maximum": 3}}, ...})
    ['{"odd": ', ("1", "2", "3"), '}']

So a local model writes an answer in this form whatever it would say by itself: it only chooses.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Part = str | tuple[str, ...] | None
"""A fixed text, a choice of texts, or, None, a text up to a quotation mark. Fixed texts surround the others."""

_MOST = 1000
"""Most texts to choose from."""
_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*(")')


def parts(schema: Mapping[str, Any]) -> list[Part] | None:
    """The parts of the answer in order; None for a schema with more than objects whose properties are all required,
    arrays of one length, whole numbers within bounds, enumerations of numbers, and strings."""
    try:
        found = _parts(schema)
    except (KeyError, TypeError, ValueError):
        return None
    merged: list[Part] = []
    for part in found:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged if isinstance(merged[0], str) and isinstance(merged[-1], str) else None


def _parts(schema: Mapping[str, Any]) -> list[Part]:
    if "enum" in schema:
        return [tuple(str(int(value)) for value in schema["enum"])]
    kind = schema["type"]
    if kind == "string":
        return ['"', None, '"']
    if kind == "integer":
        numbers = range(schema["minimum"], schema["maximum"] + 1)
        if not 0 < len(numbers) <= _MOST:
            raise ValueError("too many numbers, or none")
        return [tuple(map(str, numbers))]
    if kind == "array" and schema["minItems"] == schema["maxItems"]:
        return ["[", *_joined([_parts(schema["items"])] * schema["minItems"]), "]"]
    if kind == "object":
        return ["{", *_joined([[f'"{name}": ', *_parts(each)] for name, each in schema["properties"].items()]), "}"]
    raise ValueError(kind)


def _joined(items: Sequence[list[Part]]) -> list[Part]:
    return [part for i, item in enumerate(items) for part in ([", "] if i else []) + item]


def before_quote(text: str) -> str | None:
    """The part of `text` before its first quotation mark that no backslash escapes; None if there is none."""
    found = _QUOTE.search(text)
    return text[: found.start(1)] if found else None
