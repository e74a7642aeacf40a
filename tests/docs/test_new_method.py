"""The method that CONTRIBUTING shows whole: how short it is, and what becomes of it beside others."""

from __future__ import annotations

import pytest
import torch
from forwards import difference, logits
from pages import BLOCKS
from peft import PeftModel, get_peft_model
from tiny_vlms import FAMILIES

from peft_pvm import DIPEConfig, TDRSConfig
from peft_pvm.tuners.attention_method import AttentionMethod


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")
MOST_LINES = 25
NAME = '"sharper"'  # in the block, which another test registers under it
BLOCK = next(block.code for block in BLOCKS["CONTRIBUTING.md"] if f"ClassVar[str] = {NAME}" in block.code)


@pytest.fixture(scope="module")
def sharper() -> type[AttentionMethod]:
    namespace: dict = {"__name__": __name__}
    exec(BLOCK.replace(NAME, '"sharpened"'), namespace)
    return namespace["SharperConfig"]


def attach(*configs: AttentionMethod) -> PeftModel:
    model = FAMILIES["llava"].build()
    for config in configs:
        attached = get_peft_model(model, config, config.method)
    return attached.eval()


def inputs() -> dict[str, torch.Tensor]:
    return FAMILIES["llava"].inputs(FAMILIES["llava"].build(), *ROWS)


def test_a_whole_method_is_short():
    lines = BLOCK.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line == "@dataclass")
    (stop,) = (number for number, line in enumerate(lines) if line.startswith("register("))
    assert stop - start + 1 <= MOST_LINES


def test_it_makes_attention_sharper(sharper: type[AttentionMethod]):
    """By its factor: 1 is the base, and other factors differ from one another."""
    given = inputs()
    base = logits(FAMILIES["llava"].build(), given)
    assert difference(logits(attach(sharper(factor=1.0)), given), base) < 1e-6
    default, stronger = (logits(attach(config), given) for config in (sharper(), sharper(factor=4.0)))
    assert difference(default, base) > 1e-3
    assert difference(stronger, default) > 1e-3
    with pytest.raises(ValueError, match=r"SharperConfig.factor is 0, but must be a number above 0"):
        sharper(factor=0)


@pytest.mark.parametrize("toy_first", [False, True])
def test_with_t_drs_in_one_layer_it_is_refused_by_name(sharper: type[AttentionMethod], toy_first: bool):
    """Both decide the weights. In different layers they go together."""
    for layer_idx, meet in ((1, True), (2, False)):
        configs = [TDRSConfig(layers_to_transform=[1]), sharper(layers_to_transform=[layer_idx])]
        configs = configs[::-1] if toy_first else configs
        model = attach(*configs)
        if not meet:
            assert logits(model, inputs()).isfinite().all()
            continue
        first, second = (config.method for config in configs)
        message = (
            f"The adapters '{first}' and '{second}' are active and both decide the weights of attention in decoder "
            "layer 1"
        )
        with pytest.raises(ValueError, match=message):
            logits(model, inputs())


@pytest.mark.parametrize(
    "other",
    [lambda: DIPEConfig(max_distance=0), lambda: TDRSConfig(layers_to_transform=[0])],
    ids=["positions in the same layers", "weights in another layer"],
)
def test_the_order_of_attaching_does_not_matter(sharper: type[AttentionMethod], other):
    given = inputs()
    toy = sharper(layers_to_transform=[1, 2])
    one, two = logits(attach(toy, other()), given), logits(attach(other(), toy), given)
    assert torch.equal(one, two)
    for alone in (toy, other()):
        assert difference(one, logits(attach(alone), given)) > 1e-3, "both act"
