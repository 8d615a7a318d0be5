"""Number types that say their range, and the check of arguments against them.

The values stay plain numbers, which checkpoints may hold, and the check is the same from the command line and from
Python: jsonargparse reads the type, :func:`check_ranges` the range.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Finite numbers between two ends.

    Attributes:
        low: The least, or what is just too low.
        high: The greatest, or what is just too high.
        open_low: Whether ``low`` itself is out.
        open_high: Whether ``high`` itself is out.
        exclude: A number in between that is out.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    exclude: float | None = None

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below and value != self.exclude

    def __repr__(self) -> str:  # what --help shows
        if self.exclude is not None:
            return f"other than {self.exclude:g}"
        if self.high == math.inf:
            return f"greater than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
#: Of an optimizer, whose arithmetic is in float32: beyond this, a step is none.
LearningRate = Annotated[float, Range(0, 1e30)]
PositiveLearningRate = Annotated[float, Range(0, 1e30, open_low=True)]
#: From 0 to 1, with both.
Fraction = Annotated[float, Range(0, 1)]
#: From 0 to 1, without 1.
FractionBelowOne = Annotated[float, Range(0, 1, open_high=True)]
#: From 0 to 1, without 0: a part of an area or a length that cannot be empty.
PositiveFraction = Annotated[float, Range(0, 1, open_low=True)]
#: Least and greatest part of an image's area.
Scale = tuple[PositiveFraction, PositiveFraction]


def check_ranges(owner: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Check numbers against the ranges in a class's constructor, and in those of its bases.

    Args:
        owner: A class, or a dataclass.
        values: Arguments by name; those that the constructors do not name are left out.
        prefix: What stands before a name in an error.

    Raises:
        ValueError: If a number is not in its range, or not finite, or a pair is not in order; names the argument, the
            range and the value.
    """
    check_hints(_hints(owner), values, prefix)


def check_hints(hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """Check numbers against types by name; values without one are left out. Errors as for :func:`check_ranges`."""
    for name, value in values.items():
        if name in hints:
            _check(hints[name], value, prefix + name)


def _hints(owner: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for cls in reversed(owner.__mro__):
        if "__init__" in vars(cls) and cls is not object:
            source: Any = cls if is_dataclass(cls) else cls.__init__  # type: ignore[misc]
            hints |= get_type_hints(source, include_extras=True)
    return hints


class Checked:
    """A dataclass whose numbers are checked when it is made; for :func:`check_ranges`."""

    def __post_init__(self) -> None:
        check_ranges(type(self), {field.name: getattr(self, field.name) for field in fields(self)})  # type: ignore[arg-type]


def _check(hint: Any, value: Any, name: str) -> None:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return
        numbers = [arg for arg in args if _numeric(arg) == isinstance(value, (int, float)) and arg is not NoneType]
        for arg in numbers[:1]:
            _check(arg, value, name)
    elif origin is Annotated:
        base, *ranges = args
        if get_origin(base) in (list, tuple):
            _check(base, value, name)
            return
        if isinstance(value, bool) or not isinstance(value, (int, float) if base is float else int):
            kind = "a number" if base is float else "a whole number"
            raise ValueError(f"{name} must be {kind}, got {value!r}.")
        for span in ranges:
            if isinstance(span, Range) and value not in span:
                raise ValueError(f"{name} must be {span}, got {value!r}.")
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
        inner = [arg for arg in args if arg is not Ellipsis]
        for i, item in enumerate(value):
            _check(inner[min(i, len(inner) - 1)], item, f"{name}[{i}]")
        if hint == Scale and value[0] > value[1]:
            raise ValueError(f"{name} must be in order, got {list(value)}.")


def _numeric(hint: Any) -> bool:
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return base in (int, float)
