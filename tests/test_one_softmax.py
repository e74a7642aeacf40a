"""Attention has one softmax: each part of it is done by one adapter, whatever methods meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from forwards import TOLERANCE, difference, logits
from methods_under_test import METHODS
from peft import get_peft_model
from tiny_vlms import FAMILIES

from peft_pvm import DIPEConfig, TDRSConfig
from peft_pvm.attention import AttentionCall, Steering
from peft_pvm.registry import register
from peft_pvm.steering import SteeringConfig, SteeringLayer, SteeringTuner


@dataclass
class OwnConfig(SteeringConfig):
    """A user's own method, which does one part of attention."""

    method: ClassVar[str] = "own"
    title: ClassVar[str] = "Own"
    summary: ClassVar[str] = "A user's own method."
    paper: ClassVar[str] = "0000.00000"

    part: str = field(default="scoring", metadata={"help": "Which part it does."})


class OwnPart:
    """Leaves everything as it is."""

    def attend(self, call: AttentionCall, *scored_by: torch.Tensor):
        query, key = scored_by or (call.query, call.key)
        return call.run_kernel(query, key, call.value)

    def widen(self, call: AttentionCall):
        return call.query, call.key


class OwnLayer(SteeringLayer[OwnConfig]):
    def plan(self, context, configs):
        for adapter_name, config in configs.items():
            for layer_idx in self.layers_of(config):
                Steering.add(context, layer_idx, adapter_name, **{config.part: OwnPart()})


class OwnModel(SteeringTuner):
    prefix = "own_"
    child_name = "own"
    tuner_layer_cls = OwnLayer


register("own", OwnConfig, OwnModel)

CLASHES = {
    "scoring": [DIPEConfig(layers_to_transform=[1]), OwnConfig(part="scoring")],
    "weighing": [TDRSConfig(layers_to_transform=[1]), OwnConfig(part="weighing")],
}


@pytest.mark.parametrize("rows", [("t4 i t6",), ("t9",)], ids=["image", "text alone"])
@pytest.mark.parametrize("own_first", [False, True], ids=["", "own first"])
@pytest.mark.parametrize("part", CLASHES)
def test_a_part_is_done_by_one_adapter(part: str, own_first: bool, rows: tuple[str, ...]):
    family = FAMILIES["llava"]
    model = family.build()
    for config in reversed(CLASHES[part]) if own_first else CLASHES[part]:
        peft_model = get_peft_model(model, config, config.method)
    published = "dipe" if part == "scoring" else "tdrs"
    first, second = ("own", published) if own_first else (published, "own")
    inputs = family.inputs(model, *rows)
    message = (
        f"The adapters '{first}' and '{second}' are active and both do the {part} of attention in decoder layer 1"
    )
    with pytest.raises(ValueError, match=message):
        logits(model, inputs)
    with peft_model.disable_adapter():  # the last one alone
        assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize(("published", "part"), [("dipe", "weighing"), ("tdrs", "scoring")])
def test_different_parts_go_together(published: str, part: str):
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, "t4 i t6")
    alone = logits(METHODS[published].attach(model, published), inputs)
    get_peft_model(model, OwnConfig(part=part), "own")
    assert difference(logits(model, inputs), alone) < TOLERANCE


def test_several_adapters_of_dipe_make_a_union():
    family = FAMILIES["llava"]
    model = get_peft_model(family.build(), DIPEConfig(layers_to_transform=[0, 1]), "one")
    inputs = family.inputs(model.get_base_model(), "t4 i t6")
    model.add_adapter("other", DIPEConfig(layers_to_transform=[1, 2]))
    model.base_model.set_adapter(["one", "other"])
    union = get_peft_model(family.build(), DIPEConfig(layers_to_transform=[0, 1, 2]))
    assert torch.equal(logits(model, inputs), logits(union, inputs))
