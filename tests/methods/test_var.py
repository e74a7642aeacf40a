"""Which tokens VAR knows to be sinks, in whatever forwards a conversation was read, and what it refuses."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forwards import TOLERANCE, difference, logits
from methods_under_test import METHODS
from peft import get_peft_model
from tiny_vlms import FAMILIES

from peft_pvm import VARConfig
from peft_pvm.tokens.context import VisualContext
from peft_pvm.utils.packages import CACHE


PLAIN = FAMILIES["llava"]


def test_an_adapter_that_was_off_knows_the_sinks_when_it_is_on():
    model = METHODS["var"].attach(PLAIN.build())
    inputs = PLAIN.inputs(model.get_base_model(), "t4 i t9")
    length = inputs["input_ids"].shape[1]
    prompt, rest = (
        PLAIN.inputs(model.get_base_model(), "t4 i t9", start=start, stop=stop)
        for start, stop in ((0, length - 3), (length - 3, length))
    )
    with torch.no_grad(), model.disable_adapter():
        cache = model(**prompt, use_cache=True)[CACHE]
        off = logits(model, rest, **{CACHE: copy.deepcopy(cache)}, use_cache=True)
    assert difference(logits(model, rest, **{CACHE: cache}, use_cache=True), off) > 100 * TOLERANCE


def test_sinks_of_tokens_that_it_did_not_see_are_not_guessed():
    base = PLAIN.build()
    first = METHODS["vaf"].attach(base)  # which knows what is visual, and not what is a sink
    length = PLAIN.inputs(base, "t4 i t9")["input_ids"].shape[1]
    pieces = [PLAIN.inputs(base, "t4 i t9", start=start, stop=start + 1) for start in range(length - 3, length)]

    def read(cache, *which: int):
        for number in which:
            cache = base(**pieces[number], **{CACHE: cache}, use_cache=True)[CACHE]
        return cache

    with torch.no_grad(), first.disable_adapter():
        cache = base(**PLAIN.inputs(base, "t4 i t9", stop=length - 3), use_cache=True)[CACHE]
        model = METHODS["var"].attach(base, "sinks")
        with pytest.raises(RuntimeError, match="Nobody looked for sinks among all tokens of this KV cache at layer 0"):
            read(cache, 0)

        cache = base(**PLAIN.inputs(base, "t4 i t9", stop=length - 3), use_cache=True)[CACHE]
        cache = read(cache, 0)
        model.unload()
        cache = read(cache, 1)  # by VAF's tap alone
        METHODS["var"].attach(base, "sinks")
        with pytest.raises(RuntimeError, match="must be attached from the first token on"):
            read(cache, 2)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (None, "VARConfig.sink_channels is None, but each model has channels of its own that are large in sinks"),
        ([3, 64], "names channels [64], but the hidden states of LlavaForConditionalGeneration have 64 (0 to 63)"),
    ],
)
def test_channels_must_be_the_models(channels: list[int] | None, message: str):
    model = PLAIN.build()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, VARConfig(sink_channels=channels))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sink_channels", value) for value in ([], [-1], [True], ["3"], 3, [0] * 1_001)),
        *((name, value) for name in ("rho", "least_visual", "p") for value in (-0.1, 1.1, None, True)),
        *(("tau", value) for value in (0, -1, None)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value):
    with pytest.raises(ValueError, match=f"VARConfig.{name} is .*, but must be"):
        VARConfig(**{name: value})


@pytest.mark.parametrize(
    ("of_sinks", "of_others", "acts"),
    [
        (0.25, 0.25, True),  # the largest share of sinks, and the least weight of the image: both still count
        (0.125, 0.375, True),
        (0.25, 0.125, False),
        (0.125, 0.25, False),
        (0.0, 0.5, False),
    ],
)
def test_heads_at_the_thresholds_are_changed(of_sinks: float, of_others: float, acts: bool):
    config = VARConfig(sink_channels=[1], rho=0.5, least_visual=0.5, p=0.5)
    assert _is_changed(config, of_sinks, of_others) is acts


def test_where_no_other_visual_token_is_left_nothing_is_taken():
    assert not _is_changed(VARConfig(sink_channels=[1], rho=1.0, least_visual=0.0), 0.5, 0.0)


def _is_changed(config: VARConfig, of_sinks: float, of_others: float) -> bool:
    """Whether a head changes its row of weights: those of visual sinks, of other visual tokens and of a text sink."""
    weights = torch.tensor([of_sinks, of_others, 1 - of_sinks - of_others])
    groups = config._groups(torch.tensor([True, False, True]), torch.tensor([True, True, False]))
    call: Any = SimpleNamespace(context=VisualContext(None))
    changes = config.changes(call, (weights @ groups)[None, None, None])
    assert bool(changes.isfinite().all())
    return bool(changes.any())


def test_the_default_dtype_decides_nothing():
    sinks, visual = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    config = VARConfig(sink_channels=[1], p=0.3, rho=0.7)
    expected = config._groups(sinks, visual)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = config._groups(sinks, visual)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
