"""The two laws of decay: planted ones are found, and nothing is claimed where nothing can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_pvm.probe import fit_dilution, fit_power_law


TEXT = [10, 17, 30, 55, 90, 160, 400]


@given(exponent=st.floats(-2, 3), level=st.floats(1e-6, 1e-2))
def test_a_planted_exponent_is_recovered(exponent: float, level: float):
    law = fit_power_law(TEXT, [level * t**-exponent for t in TEXT])
    assert law.exponent == pytest.approx(exponent, abs=1e-5)
    assert law.standard_error < 1e-5
    assert law.num_points == len(TEXT)
    if abs(exponent) > 0.01:
        assert law.r_squared == pytest.approx(1)


def test_the_fit_is_that_of_numpy():
    masses = np.random.default_rng(0).uniform(0.1, 0.9, len(TEXT))
    (slope, _), covariance = np.polyfit(np.log(TEXT), np.log(masses), 1, cov=True)
    law = fit_power_law(TEXT, masses.tolist())
    assert law.exponent == pytest.approx(-slope, rel=1e-5)
    assert law.standard_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-5)
    assert law.r_squared == pytest.approx(np.corrcoef(np.log(TEXT), np.log(masses))[0, 1] ** 2, rel=1e-4)


@given(a=st.floats(0.5, 1e4))
def test_planted_dilution_is_recovered(a: float):
    law = fit_dilution(TEXT, [a / (a + t) for t in TEXT])
    assert law.a == pytest.approx(a, rel=1e-5)
    assert law.r_squared == pytest.approx(1)


def test_dilution_knows_when_it_does_not_fit():
    assert fit_dilution(TEXT, [0.1 * t**0.2 for t in TEXT]).r_squared < 0


@pytest.mark.parametrize("fit", [fit_power_law, fit_dilution])
@pytest.mark.parametrize(
    ("text_tokens", "masses"),
    [
        ([], []),
        ([10, 20], [0.5, 0.4]),
        ([10, 10, 10, 10], [0.5, 0.4, 0.3, 0.2]),  # a sliding window that is full
        ([10, 20, 30, 40], [0.5, 0.0, 0.0, 0.0]),  # an image that has left it
        ([0, 0, 10, 20], [0.5, 0.4, 0.3, 0.2]),
    ],
)
def test_nothing_is_fitted_where_nothing_can_be(fit, text_tokens: list[int], masses: list[float]):
    assert fit(text_tokens, masses) is None


def test_constant_attention_does_not_decay():
    law = fit_power_law(TEXT, [0.3] * len(TEXT))
    assert law.exponent == pytest.approx(0, abs=1e-9)
    assert law.r_squared is None
