"""Where nobody reads visual tokens, decoder layers compute the text alone, with the loss and gradients of all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from forwards import TOLERANCE, difference
from hidden_images import in_training, leftovers, text_tokens, visual_tokens
from methods_under_test import METHODS, Method, Together
from peft import LoraConfig
from test_five_properties import _is_supported
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import PVMConfig
from peft_pvm.tokens.families import find_vlm
from peft_pvm.training import hidden_image
from peft_pvm.training.hidden import images_hidden
from peft_pvm.training.text_alone import TextAlone, layers_for_text


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")  # two images, one, none
LORA = Method(
    config=lambda **fields: LoraConfig(
        target_modules=r".*\.(q|v)_proj", exclude_modules=r".*vision.*", init_lora_weights=False
    )
)
# The layers that compute all tokens: they are called with more of each token than is known, have linear attention, or
# do not rotate.
WHOLE = {"gemma4": [0, 1, 2], "llama4": [1], "qwen3_5": [0]}


def built(family: TinyVLM, kernel: str = "sdpa", pvm: Method = METHODS["pvm"], **methods: Method) -> Together:
    """A model in training in which PVM and LoRA learn."""
    torch.manual_seed(0)
    if kernel == "flash_stand_in":
        base = family.build()
        base.config.get_text_config()._attn_implementation = kernel
    else:
        base = family.build(attn_implementation=kernel if _is_supported(family, kernel) else "eager")
    model = in_training(Together(base, pvm=pvm, lora=LORA, **methods))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".pvm_" in name or ".lora_" in name)
    return model


def answers(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels of the text, but for the first token after an image or padding."""
    text = text_tokens(inputs)
    return inputs["input_ids"].masked_fill(~(text & text.roll(1, 1)), -100)


def padded_on_the_right(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = inputs["attention_mask"].sum(1)
    by_token = {name for name, tensor in inputs.items() if tensor.shape == inputs["input_ids"].shape}
    return {
        name: torch.stack([row.roll(int(n)) for row, n in zip(tensor, lengths)]) if name in by_token else tensor
        for name, tensor in inputs.items()
    }


@contextlib.contextmanager
def tokens_at_ffns(model: Together) -> Iterator[list[int]]:
    """How many tokens of a row reach the FFN of each decoder layer."""
    vlm, found = find_vlm(model.get_base_model()), []
    handles = [
        vlm.block.norm(layer).register_forward_pre_hook(lambda module, args: found.append(args[0].shape[-2]))
        for layer in vlm.layers
    ]
    yield found
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def tokens_at_head(model: Together) -> Iterator[list[int]]:
    """How many tokens of a row reach the head."""
    found: list[int] = []
    head = find_vlm(model.get_base_model()).head
    handle = head.register_forward_pre_hook(lambda module, args: found.append(args[0].shape[-2]))
    yield found
    handle.remove()


def step(model: Together, inputs: dict[str, torch.Tensor], alone: bool, **kwargs: Any) -> tuple[list[int], Any]:
    """The tokens at each FFN; the loss, the logits of text and all gradients."""
    hidden = hidden_image(model) if alone else images_hidden(find_vlm(model.get_base_model()))
    with tokens_at_ffns(model) as lengths, hidden:
        output = model(**{"labels": answers(inputs), "use_cache": False, **inputs, **kwargs})
        found = list(lengths)
    output.loss.backward()
    learning = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = torch.cat([parameter.grad.flatten() for parameter in learning])
    model.zero_grad()
    return found, (output.loss.detach(), output.logits.detach()[text_tokens(inputs)], gradients)


def agrees(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected):
        assert difference(one, other) < TOLERANCE
    assert expected[2].abs().max() > 1e-3


def agrees_with_whole(model: Together, inputs: dict[str, torch.Tensor], whole_layers: Collection[int] = ()) -> None:
    whole, expected = step(model, inputs, alone=False)
    with tokens_at_head(model) as at_head:
        alone, found = step(model, inputs, alone=True)
    at_most, text = inputs["input_ids"].shape[1], int(text_tokens(inputs).sum(1).max())
    assert set(whole) == {at_most}
    assert alone == [at_most if layer in whole_layers else text for layer in range(len(whole))]
    assert at_head == [text]
    agrees(found, expected)


@pytest.mark.parametrize("padded", [lambda inputs: inputs, padded_on_the_right], ids=["left", "right"])
def test_loss_and_gradients_are_those_of_all_tokens(family: TinyVLM, padded: Callable, request: pytest.FixtureRequest):
    model = built(family)
    inputs = padded(family.inputs(model.get_base_model(), *ROWS))
    agrees_with_whole(model, inputs, WHOLE.get(request.node.callspec.params["family"], ()))


@pytest.mark.parametrize("kernel", ["eager", "flash_stand_in"])
def test_on_other_kernels(tiny: TinyVLM, kernel: str):
    """Flash attention counts the tokens of a window itself, so that nothing may be taken out of it."""
    model = built(tiny, kernel)
    has_windows = model.get_base_model().config.get_text_config().to_dict().get("sliding_window") is not None
    for rows in (ROWS, ROWS[:1]):
        inputs = tiny.inputs(model.get_base_model(), *rows)
        agrees_with_whole(model, inputs, range(3) if has_windows and kernel == "flash_stand_in" else ())


def test_windows_that_end_within_the_text():
    """Those of the whole rows: what of the text they hide depends on the images in between."""
    family = FAMILIES["gemma3"]
    model = built(family)
    inputs = family.inputs(model.get_base_model(), "t4 i t3 i t16", "t12 i t5")
    assert model.get_base_model().config.get_text_config().sliding_window < 16
    agrees_with_whole(model, inputs)
    inputs["token_type_ids"] = visual_tokens(inputs).long()  # images whose tokens see one another both ways
    agrees_with_whole(model, inputs)


def test_a_memory_that_the_whole_row_sees():
    family = FAMILIES["qwen3_vl"]
    pvm = replace(METHODS["pvm"], config=lambda **fields: PVMConfig(r=32, memory_visibility="sample"))
    model = built(family, pvm=pvm)
    agrees_with_whole(model, family.inputs(model.get_base_model(), *ROWS))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_a_recomputed_layer_computes_the_text_alone(name: str, reentrant: bool):
    """Also after the block. Nothing is left on the model then."""
    family = FAMILIES[name]
    model = built(family)
    base = model.get_base_model()
    inputs = family.inputs(base, *ROWS)
    once, expected = step(model, inputs, alone=True)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    with tokens_at_ffns(model) as lengths:
        _, found = step(model, inputs, alone=True)
    assert lengths == once + once[::-1]
    agrees(found, expected)
    assert leftovers(model) == []


def test_blocks_within_blocks():
    """Rows of text alone may be as long as any: then there is nothing to leave out."""
    family = FAMILIES["llava"]
    model = built(family)
    for rows in (ROWS, ("t4 i t3", "t40")):
        inputs = family.inputs(model.get_base_model(), *rows)
        once, expected = step(model, inputs, alone=False, num_items_in_batch=torch.tensor(7))
        with hidden_image(model):
            lengths, found = step(model, inputs, alone=True, num_items_in_batch=torch.tensor(7))
        assert (lengths == once) == ("t40" in rows)
        agrees(found, expected)


def test_a_head_that_failed_leaves_nothing_to_the_next_forward():
    family = FAMILIES["llava"]
    model = built(family)
    base = model.get_base_model()
    inputs = family.inputs(base, *ROWS)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    with hidden_image(model.train()):
        handle = find_vlm(base).head.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs, labels=answers(inputs), use_cache=False)
        handle.remove()
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, expected)


# ---- where somebody may read visual tokens, all are computed


def as_it_is(model: Together, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {}


def asked_for(name: str) -> Callable:
    return lambda model, inputs: {name: True}


def configured(model: Together, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    model.get_base_model().config.get_text_config().output_hidden_states = True
    return {}


def label_behind_an_image(model: Together, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    labels = answers(inputs)
    behind = text_tokens(inputs) & visual_tokens(inputs).roll(1, 1)
    labels[behind] = inputs["input_ids"][behind]
    return {"labels": labels}


def no_labels(model: Together, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"labels": None}


OTHERS = {
    "hidden states are asked for": (asked_for("output_hidden_states"), {}, None),
    "attention is asked for": (asked_for("output_attentions"), {}, None),
    "the config asks for hidden states": (configured, {}, None),
    "a cache": (asked_for("use_cache"), {}, None),
    "a label after an image": (label_behind_an_image, {}, None),
    "no labels": (no_labels, {}, None),
    "some rows": (as_it_is, {}, [True, False, True]),
    "a memory of hidden states": (as_it_is, {"pvm": METHODS["pvm-hidden-states"]}, None),
    "another method for attention": (as_it_is, {"vaf": METHODS["vaf"]}, None),
    "another method for FFNs": (as_it_is, {"memvr": METHODS["memvr"]}, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_tokens_are_computed_where_somebody_may_read_them(name: str):
    change, methods, rows = OTHERS[name]
    family = FAMILIES["llava"]
    model = built(family, "eager", **methods)
    inputs = family.inputs(model.get_base_model(), *(("t4 i t8", "t8 i t4", "t24") if name == "no masks" else ROWS))
    kwargs = {"labels": answers(inputs), "use_cache": False, **change(model, inputs)}
    with tokens_at_ffns(model) as lengths, hidden_image(model, rows):
        model(**{**inputs, **kwargs})
    assert set(lengths) == {inputs["input_ids"].shape[1]}


def test_all_tokens_are_computed_where_rows_without_a_mask_differ():
    """Without padding, sdpa is given no mask. Of one row, there are more tokens of text than of the other."""
    family = FAMILIES["llava"]
    model = built(family)
    for rows, whole_layers in ((("t4 i t8", "t8 i t4"), ()), (("t4 i t1 i t3", "t4 i t8"), range(3))):
        inputs = family.inputs(model.get_base_model(), *rows)
        assert inputs["attention_mask"].all()
        agrees_with_whole(model, inputs, whole_layers)


# Attention that chooses keys or looks at neighbours reads visual tokens; attention that does not rotate may count.
LAYERS = {"llava": [0, 1, 2], "aya_vision": [0, 1], "minimax_m3_vl": [], "dots3_note": [], "inkling_mm_model": []}


@pytest.mark.parametrize("name", LAYERS)
def test_which_layers_can_compute_the_text_alone(name: str):
    vlm = find_vlm(ARCHITECTURES[name].tiny.build())
    assert [vlm.index_of(layer) for layer in layers_for_text(vlm)] == LAYERS[name]
    vlm.layers[1].convolution = torch.nn.Conv1d(1, 1, 3)
    assert layers_for_text(vlm) == []


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_may_be_removed_while_hooks_run(register: str):
    """By the garbage collector. torch calls it once more then, without keyword arguments."""
    family = FAMILIES["llava"]
    model = built(family)
    vlm = find_vlm(model.get_base_model())
    hook = TextAlone(vlm, vlm.layers[0])
    getattr(vlm.layers[0], register)(lambda *_: hook.remove(), prepend=True)
    model(**family.inputs(model.get_base_model(), *ROWS))


def test_hooks_of_others_see_what_a_layer_computes():
    family = FAMILIES["llava"]
    model = built(family)
    layer, lengths = find_vlm(model.get_base_model()).layers[0], []
    layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    layer.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    inputs = family.inputs(model.get_base_model(), *ROWS)
    at_ffns, _ = step(model, inputs, alone=True)
    assert lengths == 2 * at_ffns[:1]
