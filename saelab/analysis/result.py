"""The result of an analysis: a frozen dataclass that is a table, a plot and a file.

    @dataclass(frozen=True, eq=False, repr=False)
    class Dead(Result): ...

Its fields are numbers, text, booleans, None, `Interval`, numpy arrays, other dataclasses, and tuples and dictionaries
(by name) of these. `stored` takes it apart into JSON and arrays, and `rebuilt` puts it together again. Needs numpy, no
torch; pandas and plotly are imported when they draw.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from saelab.analysis.intervals import Interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ARRAY = "$array"
"""In JSON, an object with only this key stands for the array that it names."""
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """What every analysis returns."""

    @abstractmethod
    def figures(self) -> Mapping[str, int | float | str | Interval]:
        """The headline figures, in order, by names that say their unit."""

    @abstractmethod
    def plot(self) -> "go.Figure": ...

    def to_frame(self) -> "pd.DataFrame":
        """The headline figures: one line each, with the ends of their 95% intervals where there are some."""
        import pandas as pd

        def line(value: int | float | str | Interval) -> tuple[object, object, object]:
            return (value.value, value.low, value.high) if isinstance(value, Interval) else (value, None, None)

        lines = {name: line(value) for name, value in self.figures().items()}
        return pd.DataFrame.from_dict(lines, orient="index", columns=["value", "low", "high"], dtype=object)

    def _repr_html_(self) -> str:
        frame = self.to_frame().map(shown)
        return f"<b>{escape(type(self).__name__)}</b>{frame.to_html(border=0)}"  # pandas escapes names and values

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}: {shown(value)}" for name, value in self.figures().items())
        return f"{type(self).__name__}({figures})"


def stored(result: Result) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of `result` as JSON, NaN and infinite numbers as None, and the arrays that it names."""
    arrays: dict[str, np.ndarray] = {}
    return {name: _stored(getattr(result, name), name, arrays) for name in _fields(type(result))}, arrays


def with_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """JSON that `stored` gave, its arrays in their places. Raises KeyError if one is missing."""
    if isinstance(value, list):
        return [with_arrays(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {ARRAY}:
        return arrays[value[ARRAY]]
    return {key: with_arrays(item, arrays) for key, item in value.items()}


def rebuilt(kind: type[R], value: Any) -> R:
    """The value of type `kind` from what `with_arrays` returns; None for a number is NaN.

    Raises KeyError, TypeError or ValueError if it does not fit.
    """
    return _rebuilt(kind, value)


def _stored(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {ARRAY: name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        value = {field: getattr(value, field) for field in _fields(type(value))}
    if isinstance(value, Mapping):
        return {str(key): _stored(item, f"{name}.{key}", arrays) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_stored(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
    return value


def _rebuilt(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if value is None:
        return math.nan if kind is float else None
    if origin is not None and NoneType in arguments:  # X | None
        return _rebuilt(next(each for each in arguments if each is not NoneType), value)
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        hints = get_type_hints(kind)
        return kind(**{name: _rebuilt(hints[name], value[name]) for name in _fields(kind)})
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_rebuilt(each, item) for each, item in zip(kinds, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {key: _rebuilt(arguments[1], item) for key, item in value.items()}
    return value


def _fields(kind: Any) -> tuple[str, ...]:
    """The fields of a dataclass or of a named tuple."""
    return kind._fields if hasattr(kind, "_fields") else tuple(field.name for field in dataclasses.fields(kind))


def shown(value: object) -> str:
    """A figure as text: four digits, whole numbers in full, "" for None."""
    if value is None:
        return ""
    if isinstance(value, bool | str | Interval):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
