"""Every architecture works, or is refused for its true reason."""

from __future__ import annotations

import re

import pytest
import test_five_properties as properties
import torch
from architectures import ARCHITECTURES, core, stacks
from forwards import TOLERANCE, difference, generate, logits
from methods_under_test import METHODS
from oracle import agrees_with_the_oracle
from tiny_vlms import TinyVLM

from peft_pvm import DIPEConfig, TDRSConfig
from peft_pvm.tokens.families import find_vlm


ROTATING = {"dipe": DIPEConfig(max_distance=0), "tdrs": TDRSConfig()}
FFN = re.compile("mlp|feed_forward|ffn|moe|expert|fc[12]")  # a parameter of an FFN, by its name in the decoder layer


@pytest.mark.parametrize("method", ["pvm", "pvm-hidden-states", *ROTATING])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in core.ROWS])
def test_architecture(name: str, method: str):
    """Off is off, a cache changes nothing, rows of a batch are what they are alone, and the sums are right."""
    row = ARCHITECTURES[name]
    reason = row.refusal(method)
    if reason:
        is_refused(row.tiny, method, reason)
        return
    properties.test_off_is_bit_identical(row.tiny, METHODS[method])
    if "cached" not in row.differs:
        properties.test_cached_decoding_equals_the_full_forward(row.tiny, METHODS[method])
    if "padded" not in row.differs:
        properties.test_left_padded_batch_equals_its_rows_alone(row.tiny, METHODS[method])
    if method in ROTATING:
        # Where padded rows differ anyway, kernels may disagree on them.
        batch = ("t4 i t3 i t6",) if "padded" in row.differs else ("t4 i t3 i t6", "i t9", "t9")
        agrees_with_the_oracle(row.tiny, **{method: ROTATING[method]}, batch=batch)
    elif row.streams:
        is_added_to_the_streams(row.tiny, method, *row.streams)
    else:
        is_added_to_the_stream(row.tiny, method)


def is_refused(tiny: TinyVLM, method: str, reason: str) -> None:
    """When it is attached, or in the first forward; and the model is as it was."""
    model = tiny.build().requires_grad_(False)
    inputs = tiny.inputs(model, "t4 i t3 i t6")
    base = logits(model, inputs)
    names, hooks = set(model.state_dict()), properties._hooks(model)
    attached = []

    def attach_and_run() -> None:
        attached.append(METHODS[method].attach(model))
        logits(attached[0], inputs)

    with pytest.raises((ValueError, NotImplementedError), match=re.escape(reason)):
        attach_and_run()
    for peft_model in attached:
        peft_model.unload()
    assert torch.equal(logits(model, inputs), base)
    assert set(model.state_dict()) == names
    assert properties._hooks(model) == hooks


def is_added_to_the_stream(tiny: TinyVLM, method: str) -> None:
    """A branch reads the residual stream after attention, and is added to it as it is.

    Independent of how a block is built: with an FFN of zeros, a layer returns that stream.
    """
    attached = METHODS[method].attach(tiny.build())
    vlm = find_vlm(attached.get_base_model())
    branch, layer = next((layer.pvm, layer) for layer in vlm.layers if hasattr(layer, "pvm"))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if FFN.search(name) and ".pvm_" not in f".{name}" and parameter.dim() >= 2:
                parameter.zero_()
    seen = {}
    branch.register_forward_hook(lambda module, args, output: seen.update(stream=args[0], update=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(layer=_first(output)))
    inputs = tiny.inputs(attached.get_base_model(), "t4 i t3 i t6")
    logits(attached, inputs)
    assert seen["update"].abs().amax() > 100 * TOLERANCE
    torch.testing.assert_close(seen["layer"], seen["stream"] + seen["update"], rtol=0, atol=TOLERANCE)


def is_added_to_the_streams(tiny: TinyVLM, method: str, reader: str, returner: str) -> None:
    """A branch reads the mixture that the FFN reads, and its layer returns what it would if the FFN had returned more.

    Independent of how streams are mixed.
    """
    attached = METHODS[method].attach(tiny.build())
    vlm = find_vlm(attached.get_base_model())
    branch, layer = next((layer.pvm, layer) for layer in vlm.layers if hasattr(layer, "pvm"))
    seen = {}
    branch.register_forward_hook(lambda module, args, output: seen.update(stream=args[0], update=output))
    layer.get_submodule(reader).register_forward_pre_hook(lambda module, args: seen.update(mixture=args[0]))
    layer.register_forward_hook(lambda module, args, output: seen.update(layer=_first(output)))
    inputs = tiny.inputs(attached.get_base_model(), "t4 i t3 i t6")
    logits(attached, inputs)
    assert seen["update"].abs().amax() > 100 * TOLERANCE
    assert torch.equal(seen["stream"], seen["mixture"])
    computed, update = seen["layer"], seen["update"]
    layer.get_submodule(returner).register_forward_hook(lambda module, args, output: output + update)
    with attached.disable_adapter():
        logits(attached, inputs)
    torch.testing.assert_close(computed, seen["layer"], rtol=0, atol=TOLERANCE)


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", [name for name, row in stacks.ROWS.items() if "all" not in row.refused])
def test_generates_as_whole_forwards_do(name: str):
    """Also where `generate` hands embeddings, or features, to that of an inner model."""
    row = ARCHITECTURES[name]
    for method in [method for method in ("pvm", "tdrs") if row.refusal(method) is None]:
        model = METHODS[method].attach(row.tiny.build())
        prompt = row.tiny.prompt(model.get_base_model(), "t4 i t3 i t6")
        generated = generate(row.tiny, model, "t4 i t3 i t6")
        whole = {**prompt, "input_ids": generated.sequences}
        longer = generated.sequences.shape[1] - prompt["input_ids"].shape[1]
        for mask_name, value in (("attention_mask", 1), ("image_embeds_position_mask", 0), ("mm_token_type_ids", 0)):
            if mask_name in prompt:
                whole[mask_name] = torch.nn.functional.pad(prompt[mask_name], (0, longer), value=value)
        expected = logits(model, whole)[:, -longer - 1 : -1]
        assert difference(torch.stack(generated.logits, 1), expected) < TOLERANCE
        with model.disable_adapter():
            assert difference(logits(model, whole)[:, -longer - 1 : -1], expected) > 100 * TOLERANCE
