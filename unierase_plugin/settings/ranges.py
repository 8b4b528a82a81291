"""Ranges of numeric settings, and the message for a value outside its range."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import HyperParamsError, shown


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`. `above` and `below` exclude these two bounds."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """NaN is in no range."""
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        """The range in words that follow "must"."""
        if not self.above and self.least:
            top = f" to {self.most:.16g}" if self.most < math.inf else " on"
            return f"be from {self.least:.16g}{top}"
        low = f"be greater than {self.least:.16g}" if self.above else "not be negative"
        if self.most == math.inf:
            return low
        if self.above:
            return f"{low} and {'less than' if self.below else 'at most'} {self.most:.16g}"
        return f"{low}, nor {self.most:.16g} or more" if self.below else f"{low}, nor more than {self.most:.16g}"

    def check(self, name: str, value: float) -> None:
        """Raises HyperParamsError if the value is outside the range. The message names setting, value and range."""
        if value not in self:
            raise HyperParamsError(f"{name} = {shown(value)} must {self}.")


def positive(most: float = math.inf) -> Range:
    """Greater than 0, up to `most`."""
    return Range(0, most, above=True)


def weight(most: float = 1e12) -> Range:
    """From 0 to `most`. 0 switches off what the weight applies to."""
    return Range(0, most)
