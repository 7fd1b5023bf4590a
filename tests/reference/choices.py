"""Where a generator's decisions come from: a seeded numpy generator, or Hypothesis (which can then shrink them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from hypothesis import strategies as st

T = TypeVar("T")


class Choices:
    """Decisions, all made from whole numbers. What is simplest comes first: there Hypothesis shrinks to."""

    def __init__(self, whole: Callable[[int, int], int]) -> None:
        self.whole = whole
        """`whole(low, high)`: a whole number between the two, both included."""

    def pick(self, options: Sequence[T]) -> T:
        return options[self.whole(0, len(options) - 1)]

    def one_in(self, count: int) -> bool:
        return self.whole(1, count) == count

    def weighted(self, options: Sequence[tuple[int, T]]) -> T:
        """One of (weight, option)."""
        left = self.whole(1, sum(weight for weight, _ in options))
        for weight, option in options:
            left -= weight
            if left <= 0:
                return option
        raise AssertionError("unreachable: the weights were summed above")


def from_numpy(rng: np.random.Generator) -> Choices:
    return Choices(lambda low, high: int(rng.integers(low, high, endpoint=True)))


def from_hypothesis(draw: st.DrawFn) -> Choices:
    return Choices(lambda low, high: draw(st.integers(low, high)))
