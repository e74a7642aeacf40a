"""The fields of configurations are checked by what they say they accept."""

from __future__ import annotations

import re
from dataclasses import make_dataclass
from typing import Any

import pytest

from peft_pvm.utils.checks import check_settings, setting


@pytest.mark.parametrize(
    ("bounds", "valid", "wrong", "accepted"),
    [
        (dict(least=0), [0, 0.5, 65_504], [-0.1, 65_505, True, "1", None], "a number from 0 to 65504"),
        (dict(above=0), [1e-9, 65_504], [0, 65_505], "a number above 0"),
        (dict(least=0, most=1), [0, 1, 0.5], [-1e-9, 1.1, float("nan")], "a number from 0 to 1"),
        (dict(above=0, most=1), [1e-9, 1], [0, 1.1], "a number above 0, at most 1"),
        (
            dict(least=1, most=2**20, whole=True),
            [1, 2**20],
            [0, 1.0, True, 2**20 + 1],
            f"an integer from 1 to {2**20}",
        ),
        (dict(among=("a", "b")), ["a"], ["c", None], "one of ('a', 'b')"),
    ],
)
def test_what_a_setting_accepts(bounds: dict[str, Any], valid: list, wrong: list, accepted: str):
    config = make_dataclass("Config", [("strength", Any, setting(valid[0], "How much.", **bounds))])
    for value in valid:
        check_settings(config(strength=value))
    for value in wrong:
        message = f"Config.strength is {value!r}, but must be {accepted}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_settings(config(strength=value))
