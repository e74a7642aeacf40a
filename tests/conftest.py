"""Fixtures: the models and methods that tests run over."""

from __future__ import annotations

import environment  # noqa: F401  # first: its settings act before anything else is imported
import pytest
from methods_under_test import METHODS, Combination, Method
from tiny_vlms import FAMILIES, REPRESENTATIVE, TinyVLM


@pytest.fixture(params=FAMILIES)
def family(request) -> TinyVLM:
    return FAMILIES[request.param]


@pytest.fixture(params=REPRESENTATIVE)
def tiny(request) -> TinyVLM:
    return FAMILIES[request.param]


@pytest.fixture(params=["qwen3_vl", "llava"])
def plain(request) -> TinyVLM:
    """Families whose cache can be cropped anywhere."""
    return FAMILIES[request.param]


@pytest.fixture(params=METHODS)
def method(request) -> Method | Combination:
    return METHODS[request.param]
