"""Fixtures: the models and methods that tests run over, and texts with tokenizers of them."""

from __future__ import annotations

import gc
import zlib
from typing import Any

import environment  # noqa: F401  # first: its settings act before anything else is imported
import pytest
import torch
import transformers
from architectures.page import OLDEST
from hypothesis import settings
from methods_under_test import LEADING, METHODS, PUBLISHED, Combination, Method
from tiny_vlms import FAMILIES, REPRESENTATIVE, TWINS, TinyVLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peft_pvm.utils.distractors import read_paragraphs


settings.register_profile("tests", deadline=None, derandomize=True, database=None)  # a machine may be busy
settings.load_profile("tests")
IS_OLDEST = transformers.__version__ == OLDEST
PLAIN = ("qwen3_vl", "llava")
FIXTURES = ("family", "tiny", "plain")  # a test asks for one of these to run on families


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What tells nothing new is left out.

    Properties that are marked by `every_family` are tested for every method on every family, others for the leading
    methods on families of every kind; with the oldest transformers, for the leading methods on the representative
    ones. The rest, with other settings and combinations, is tested with the newest transformers, each property on one
    of the representative families that the test has, in turn: what sets it apart is this package's own arithmetic. In
    short, test_architectures.py tests every method on every family, with both.
    """
    families: dict[str, dict[str, None]] = {}  # the representative ones, by test
    for item in items:
        if _family(item) in REPRESENTATIVE:
            families.setdefault(_test(item), {})[_family(item)] = None
    items[:] = [item for item in items if _tells_something_new(item, list(families.get(_test(item), ())))]


def pytest_collection_finish() -> None:
    """What is there now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What is drawn in a test does not hang on the tests before it, which are others in every process."""
    torch.manual_seed(0)


def _params(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _family(item: pytest.Item) -> str | None:
    return next((_params(item)[name] for name in FIXTURES if name in _params(item)), None)


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _tells_something_new(item: pytest.Item, in_turn: list[str]) -> bool:
    params, family = _params(item), _family(item)
    if params.get("family") in TWINS and not item.get_closest_marker("every_family"):
        return False
    if family is None or "method" not in params:
        return True
    method = params["method"]
    if method in PUBLISHED and item.get_closest_marker("every_family"):
        return not IS_OLDEST or (method in LEADING and family in REPRESENTATIVE)
    if method in LEADING or method not in METHODS:
        return family in REPRESENTATIVE or not IS_OLDEST
    turn = zlib.crc32(_test(item).encode()) + list(METHODS).index(method)
    return bool(in_turn) and family == in_turn[turn % len(in_turn)] and not IS_OLDEST


@pytest.fixture(params=FAMILIES)
def family(request) -> TinyVLM:
    return FAMILIES[request.param]


@pytest.fixture(params=REPRESENTATIVE)
def tiny(request) -> TinyVLM:
    return FAMILIES[request.param]


@pytest.fixture(params=PLAIN)
def plain(request) -> TinyVLM:
    """Families whose cache can be cropped anywhere."""
    return FAMILIES[request.param]


@pytest.fixture(params=METHODS)
def method(request) -> Method | Combination:
    return METHODS[request.param]


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    return read_paragraphs()


@pytest.fixture(scope="session", params=["byte-level", "metaspace"])
def tokenizer(request, paragraphs: list[str]) -> PreTrainedTokenizerFast:
    """As Qwen's and as Llama's: words with the space before them, and words with a mark for it."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    if request.param == "byte-level":
        tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = []
    special = ["<unk>", "<image>"]
    tokens.train_from_iterator(
        paragraphs, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", extra_special_tokens=["<image>"])
