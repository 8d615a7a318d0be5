"""Arguments are held against the ranges in their types, from the command line and from Python."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from nepa_plugin.runtime.ranges import (
    Checked,
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Scale,
    check_ranges,
)


class Base:
    def __init__(self, count: PositiveInt = 1, rate: NonNegativeFloat = 0.0, name: str = "x"):
        pass


class Method(Base):
    def __init__(
        self,
        scale: Scale = (0.1, 1.0),
        steps: NonNegativeInt | None = None,
        part: Fraction | None = None,
        decay: FractionBelowOne = 0.5,
        width: PositiveFloat = 1.0,
        rate: PositiveFloat = 1.0,  # narrower than the base's
        devices: PositiveInt | str = "auto",
        epochs: Annotated[int, Range(-1), Range(exclude=0)] = 1,
        **kwargs,
    ):
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count must be at least 1, got 0."),
        ("count", 1.5, "count must be a whole number, got 1.5."),
        ("count", True, "count must be a whole number, got True."),
        ("rate", 0.0, "rate must be greater than 0, got 0.0."),
        ("rate", float("nan"), "rate must be greater than 0, got nan."),
        ("width", float("inf"), "width must be greater than 0, got inf."),
        ("width", "1", "width must be a number, got '1'."),
        ("steps", -1, "steps must be at least 0, got -1."),
        ("part", 7, "part must be in [0, 1], got 7."),
        ("decay", 1.0, "decay must be in [0, 1), got 1.0."),
        ("scale", (0, 0), "scale[0] must be in (0, 1], got 0."),
        ("scale", [0.5, 1.2], "scale[1] must be in (0, 1], got 1.2."),
        ("scale", (0.5, 0.2), "scale must be in order, got [0.5, 0.2]."),
        ("devices", 0, "devices must be at least 1, got 0."),
        ("epochs", 0, "epochs must be other than 0, got 0."),
        ("epochs", -2, "epochs must be at least -1, got -2."),
    ],
)
def test_what_is_out_of_range(name, value, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_ranges(Method, {name: value})
    assert str(error.value) == message


def test_what_is_in_range():
    good = {"count": 1, "rate": 1e-9, "steps": None, "part": 1, "decay": 0, "scale": [0.2, 0.2], "devices": "auto"}
    check_ranges(Method, good | {"unknown": -1, "name": "y"})
    check_ranges(Base, {"rate": 0})


def test_a_dataclass_checks_itself():
    @dataclass
    class Inner(Checked):
        epochs: PositiveInt = 1

    @dataclass
    class Outer(Checked):
        inner: Inner = field(default_factory=Inner)
        k: PositiveInt = 20

    assert Outer(k=3).k == 3
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        Outer(k=0)
    with pytest.raises(ValueError, match="epochs must be at least 1, got -3"):
        Outer(Inner(epochs=-3))
