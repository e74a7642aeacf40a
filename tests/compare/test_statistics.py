"""The statistics of a comparison against hand computations, brute force and what they promise."""

from __future__ import annotations

import itertools
import random

import pytest

from peft_pvm.compare.statistics import (
    HELPS,
    HURTS,
    LEVEL,
    UNCLEAR,
    Estimate,
    fewest_changed,
    holm,
    sign_flip_p,
    verdict,
)


def by_brute_force(differences: list[int]) -> float:
    """All choices of signs, one by one."""
    seen = abs(sum(differences))
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return sum(total >= seen for total in sums) / len(sums)


@pytest.mark.parametrize("seed", range(8))
def test_the_sign_flip_test_is_that_of_all_signs(seed: int):
    draw = random.Random(seed)
    differences = [draw.randint(-9, 9) if seed % 2 else draw.choice([-1, 0, 0, 1, 1]) for _ in range(10)]
    assert sign_flip_p(differences) == pytest.approx(by_brute_force(differences), abs=1e-12)
    assert sign_flip_p([-one for one in differences]) == pytest.approx(sign_flip_p(differences), abs=1e-12)


def test_answers_that_did_not_change_do_not_count():
    assert sign_flip_p([0] * 1000) == 1
    assert sign_flip_p([1] * 8 + [0] * 500) == pytest.approx(2 / 2**8)


def test_many_answers_do_not_underflow():
    assert 0 < sign_flip_p([9] * 500) < 1e-100


def test_by_chance_few_p_values_are_small():
    """Of no effect at all, p is at most .05 in at most 5 % of samples: the test is exact, so rather in fewer."""
    draw = random.Random(0)
    p_values = [sign_flip_p([draw.choice([-1, 0, 1]) for _ in range(40)]) for _ in range(2000)]
    assert 0.02 < sum(p <= LEVEL for p in p_values) / 2000 < 0.06


def test_holm_is_that_of_the_hand():
    """Of four p-values, sorted .005, .01, .03, .04: times 4, 3, 2, 1, and never less than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []
    assert holm([0.7, 0.7]) == [1.0, 1.0]


def test_the_fewest_answers_that_can_be_told():
    for tests in (1, 12, 44):
        least = fewest_changed(tests)
        assert 2 * 2**-least * tests <= LEVEL < 2 * 2 ** -(least - 1) * tests


def test_verdicts():
    assert verdict(LEVEL, 0.1) == HELPS
    assert verdict(0.001, -0.1) == HURTS
    assert verdict(0.051, 0.9) == UNCLEAR


def test_an_error_is_over_questions():
    estimate = Estimate.of([0.0, 1.0, 1.0, 0.0])
    assert (estimate.mean, estimate.standard_error) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))
    assert Estimate.of([1.0]).shown() == "1.000 ± ?"
