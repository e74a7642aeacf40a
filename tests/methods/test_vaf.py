"""Agreement of VAF with an independent computation in float64, on every family."""

from __future__ import annotations

import pytest
import torch
from forwards import difference, in_double, logits
from oracle import Tokens, oracle
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import VAFConfig, attached
from peft_pvm.attention.stages import Bias, KeyScale, Values
from peft_pvm.tokens.families import find_vlm


BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


def factors(config: VAFConfig, layers: list[int]):
    """What scores are multiplied by, pair by pair."""

    def scale(tokens: Tokens, layer_idx: int) -> torch.Tensor:
        visual, real = tokens.visual, tokens.real
        pairs = torch.ones(*visual.shape, visual.shape[1], dtype=torch.float64)
        for row in range(len(visual)) if layer_idx in layers else ():
            images = visual[row].nonzero().flatten().tolist()
            for query in range(visual.shape[1]):
                if images and query > images[0] and not visual[row, query] and real[row, query]:
                    pairs[row, query, images] = config.visual
                    pairs[row, query, : images[0]] = config.before
        return pairs

    return scale


def agrees_with_the_oracle(family: TinyVLM, config: VAFConfig) -> bool:
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    known = VAFConfig.layers_on(find_vlm(model))
    layers = config.layers_to_transform or config.default_layers(known)
    with oracle(family.build(), inputs, scale=factors(config, layers)) as reference:
        expected = logits(reference, in_double(inputs))[real]
    assert difference(expected, base.double()) > 100 * TOLERANCE
    with attached(model, config):
        return difference(logits(model, inputs)[real].double(), expected) < TOLERANCE


@pytest.mark.parametrize("config", [VAFConfig(visual=1.5, before=0.6), VAFConfig(visual=0.7, before=1.2)])
def test_forward(family: TinyVLM, config: VAFConfig):
    assert agrees_with_the_oracle(family, config)


WRONG = {
    "rows of the image too": lambda self, layer: KeyScale(self.of_keys, rows="all"),
    "all text": lambda self, layer: KeyScale(
        lambda call: torch.where(call.visual_keys, self.visual, self.before), rows="text"
    ),
    "weights": lambda self, layer: Bias(lambda call: self.of_keys(call).log(), rows="text"),
    "values": lambda self, layer: Values(self.of_keys, rows="text"),
}


@pytest.mark.parametrize("variant", [None, *WRONG])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_wrong_variants_are_noticed(name: str, variant: str | None, monkeypatch):
    if variant is not None:
        monkeypatch.setattr(VAFConfig, "stages", WRONG[variant])
    assert agrees_with_the_oracle(FAMILIES[name], VAFConfig(visual=1.5, before=0.6)) == (variant is None)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_gradients_equal_the_oracles(name: str, checkpointed: bool):
    family, config = FAMILIES[name], VAFConfig(visual=1.5, before=0.6)
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    scale = factors(config, config.default_layers(VAFConfig.layers_on(find_vlm(model))))
    with oracle(family.build(), inputs, scale=scale) as reference:
        reference(**in_double(inputs)).logits[real].square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if "k_proj" in name}
    if checkpointed:
        model.gradient_checkpointing_enable()
    with attached(model.train(), config):
        model(**inputs, use_cache=False).logits[real].square().mean().backward()
    found = {name: model.get_parameter(name).grad for name in expected}
    assert max(gradient.abs().max() for gradient in expected.values() if gradient is not None) > 1e-3
    for parameter, gradient in expected.items():
        if gradient is not None:
            assert difference(found[parameter].double(), gradient) < TOLERANCE, parameter


def test_its_layers_are_the_papers():
    assert VAFConfig().default_layers(list(range(32))) == [9, 10, 11, 12, 13, 14]
    assert VAFConfig().default_layers(list(range(3))) == [1]
