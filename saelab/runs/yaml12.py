"""Reads YAML as settings are written: numbers and booleans of YAML 1.2, each key once, and errors of one line.

``2e6`` and ``1e-4`` are numbers; ``on``, ``yes`` and dates are text. Tags that make other objects are refused.
"""

import re
from typing import Any

import yaml

from saelab.errors import SaelabError, brief

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


class _Loader(yaml.SafeLoader):
    """YAML of null, booleans, numbers, text, lists and mappings."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what `<<` names. Each key is kept once, or merges of merges would double the mapping every time."""
        super().flatten_mapping(node)
        node.value = list({(key.tag, key.value): (key, value) for key, value in node.value}.values())


_SCALARS = ("null", "bool", "int", "float", "str")
_OLDER = {f"{_TAG}{name}" for name in ("float", "bool", "int", "timestamp")}
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (*(f"{_TAG}{name}" for name in (*_SCALARS, "seq", "map")), None)
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OLDER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_LONGEST_NUMBER = 1000
"""Most characters of a whole number; Python refuses to read much longer ones."""


def parse(text: str, where: str) -> Any:
    """The value that `text` describes; None if it is empty.

    Raises SaelabError that begins with `where`, on one line, if it is not YAML, or if a mapping has a key twice.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        problem = _problem(node, loader)
        if problem is None:
            return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        what = f"{error.context}, {error.problem}" if str(error.problem).startswith("but ") else error.problem
        problem = f"cannot be read as YAML: {at}{what}"
    except yaml.YAMLError as error:  # characters that no text has
        problem = f"cannot be read as YAML: {brief(error)}"
    except RecursionError:
        problem = "cannot be read as YAML: too many nested lists or mappings"
    finally:
        if loader is not None:
            loader.dispose()
    raise SaelabError(f"{where}: {problem}")


def _problem(root: yaml.Node, loader: _Loader) -> str | None:
    """The first key that is given twice or is no name, or scalar that is not of its tag, in words; None without one."""
    seen: set[int] = set()  # an alias is the node itself, so that a few lines can describe billions of values
    rest: list[tuple[str, yaml.Node]] = [("", root)]
    while rest:
        name, node = rest.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        line = f"line {node.start_mark.line + 1}"
        if isinstance(node, yaml.SequenceNode):
            rest += [(name, item) for item in node.value]
        elif isinstance(node, yaml.ScalarNode):
            tag = node.tag.removeprefix(_TAG)
            natural = loader.resolve(yaml.ScalarNode, node.value, (True, False))
            if tag in _SCALARS and tag != "str" and node.tag != natural:
                return f"{name}: {node.value[:40]!r} is not of the type {tag} ({line})"
            if tag == "int" and len(node.value) > _LONGEST_NUMBER:
                return f"{name}: a number of {len(node.value):,} digits is too large ({line})"
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    return f"{name or 'it'}: has a list or a mapping as a key; a key is a name ({line})"
                whole = f"{name}.{key.value}" if name else key.value
                here = key.start_mark.line + 1
                if key.value in lines:
                    both = f"lines {lines[key.value]} and {here}" if here > lines[key.value] else f"line {here}"
                    more = "; `<<: [*a, *b]` merges several mappings" if key.tag == _MERGE else ""
                    return f"{whole}: is given twice ({both}); keep one of them{more}"
                lines[key.value] = here
                rest.append((name if key.tag == _MERGE else whole, value))
    return None
