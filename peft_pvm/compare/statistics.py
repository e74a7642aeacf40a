"""What can be told from paired answers: means with errors, an exact test of each difference, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np


HELPS, HURTS, UNCLEAR, UNCHANGED = "helps", "hurts", "inconclusive", "changed nothing"
LEVEL = 0.05  # of all tests of a comparison together


@dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    Attributes:
        mean: The mean.
        standard_error: Of the mean; `None` with a single question.
    """

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The mean of independent values, one or more."""
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(fmean(values), error)

    def shown(self, form: str = ".3f") -> str:
        """The mean and its error as tables show them: `form` is the format of the mean."""
        error = "?" if self.standard_error is None else f"{self.standard_error:.3f}"
        return f"{self.mean:{form}} ± {error}"


def sign_flip_p(differences: Sequence[int]) -> float:
    """The p-value of paired differences, two-sided, by the exact sign-flip test.

    If a method changed nothing, each difference could as well have had the other sign. The p-value is the share of all
    2^n choices of signs whose sum is at least as far from 0 as the one that was seen. For differences of -1, 0 and 1
    it is that of McNemar's exact test. Nothing is drawn at random: the distribution of the sum is computed whole.

    Args:
        differences: One for each question, in whole answers.

    Example:
        >>> sign_flip_p([1, 1, 1, 1, 1, 0])
        0.0625
    """
    sizes = [abs(difference) for difference in differences if difference]
    largest = sum(sizes)
    chances = np.zeros(2 * largest + 1)  # of each sum from -largest on
    chances[largest] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # what is rolled over the end is 0
    far = np.abs(np.arange(-largest, largest + 1)) >= abs(sum(differences))
    return min(1.0, float(chances[far].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method.

    If all differences with a corrected p-value up to a level are taken for real, the probability that any of them is
    not real is at most this level.

    Args:
        p_values: Of all tests.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def verdict(corrected: float, difference: float) -> str:
    """What a corrected p-value and the mean difference to the base say."""
    if corrected > LEVEL:
        return UNCLEAR
    return HELPS if difference > 0 else HURTS


def fewest_changed(tests: int) -> int:
    """How many answers must change, all in one direction, before the strictest of so many tests can tell it."""
    return math.ceil(math.log2(2 * max(tests, 1) / LEVEL))
