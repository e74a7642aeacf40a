"""With its image hidden, a model knows of it what PVM tells: on every family and kernel, in training alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from forwards import GENERATE, TOLERANCE, difference, logits
from hidden_images import (
    changes,
    gates_at_zero,
    in_training,
    leftovers,
    text_tokens,
    trained_on,
    visual_tokens,
    with_other_pixels,
)
from methods_under_test import METHODS, Method, Together
from peft import LoraConfig, PeftModel, get_peft_model
from test_five_properties import _is_supported, _routes_tokens_together
from tiny_vlms import FAMILIES, GEMMA4_SHARED, TinyVLM

from peft_pvm import PVMConfig, add_adapters
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.families import find_vlm
from peft_pvm.training import hidden_image
from peft_pvm.training.hidden import _Steering
from peft_pvm.tuners.active import activate
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")  # two images, one, none
KERNELS = ("eager", "sdpa", "flex_attention", "flash_stand_in")


def built(family: TinyVLM, kernel: str = "sdpa", method: str = "pvm") -> PeftModel:
    """A model in training with an adapter that acts. Skips kernels that transformers has not for the family."""
    if kernel == "flash_stand_in":
        model = family.build()
        model.config.get_text_config()._attn_implementation = kernel
    elif _is_supported(family, kernel):
        model = family.build(attn_implementation=kernel)
    else:
        pytest.skip(f"{family.model_class} does not run on {kernel}")
    return in_training(METHODS[method].attach(model))


@pytest.mark.parametrize("kernel", KERNELS)
def test_text_learns_of_the_image_from_pvm_alone(family: TinyVLM, kernel: str):
    model = built(family, kernel)
    base = model.get_base_model()
    # A mixture of experts computes an expert's tokens in one product: equal, but for the last bit.
    least = TOLERANCE if _routes_tokens_together(base) else 0
    for rows in (ROWS, ("t4 v t6",)) if family.video else (ROWS,):
        inputs = family.inputs(base, *rows)
        with hidden_image(model):
            assert changes(model, inputs) > 100 * TOLERANCE
        with gates_at_zero(model):
            assert changes(model, inputs) > 100 * TOLERANCE, "in sight, it is seen"
            with hidden_image(model):
                assert changes(model, inputs) <= least


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_stand_in"])
def test_rows_hide_their_images_one_by_one(family: TinyVLM, kernel: str):
    """Other rows, and rows without images, are as they were."""
    model = built(family, kernel)
    inputs = family.inputs(model.get_base_model(), *ROWS)
    real = inputs["attention_mask"].bool()
    shown = trained_on(model, inputs)
    with hidden_image(model):
        hidden = trained_on(model, inputs)
    for rows in ([True, False, False], torch.tensor([False, True, True])):
        with hidden_image(model, rows):
            found = trained_on(model, inputs)
        for row, is_hidden in enumerate(rows):
            expected = hidden if is_hidden else shown
            assert difference(found[row][real[row]], expected[row][real[row]]) < TOLERANCE
    assert difference(hidden[:2], shown[:2]) > 100 * TOLERANCE
    assert difference(hidden[2][real[2]], shown[2][real[2]]) < TOLERANCE
    text = family.inputs(model.get_base_model(), "t9", "t5")
    shown = trained_on(model, text)
    with hidden_image(model):
        assert torch.equal(trained_on(model, text), shown)


def test_layers_that_compute_the_last_tokens_alone():
    """Gemma 4 has layers with the keys and values of others, in which visual tokens have no hidden states."""
    model = in_training(METHODS["pvm"].attach(GEMMA4_SHARED.build(), layers_to_transform=[0, 1, 2, 3]))
    inputs = {**GEMMA4_SHARED.inputs(model.get_base_model(), *ROWS), "use_cache": False, "logits_to_keep": 3}
    with hidden_image(model):
        on = [model(**each).logits for each in (inputs, with_other_pixels(inputs))]
        with gates_at_zero(model):
            off = [model(**each).logits for each in (inputs, with_other_pixels(inputs))]
    assert difference(*on) > 100 * TOLERANCE
    assert torch.equal(*off)


def test_a_left_padded_batch_equals_its_rows_alone(family: TinyVLM):
    model = built(family, "eager")
    with hidden_image(model):
        together = trained_on(model, family.inputs(model.get_base_model(), *ROWS))
        for row, conversation in enumerate(ROWS):
            alone = trained_on(model, family.inputs(model.get_base_model(), conversation))
            assert difference(together[row : row + 1, -alone.shape[1] :], alone) < TOLERANCE


def test_kernels_agree(family: TinyVLM):
    """As far as they do with the image in sight."""
    shown, hidden = [], []
    for kernel in KERNELS:
        if kernel == "flash_stand_in" and (family.is_prefix_lm or not _is_supported(family, "sdpa")):
            continue  # its attention is not causal with flash attention
        if kernel != "flash_stand_in" and not _is_supported(family, kernel):
            continue
        model = built(family, kernel)
        inputs = family.inputs(model.get_base_model(), *ROWS)
        real = inputs["attention_mask"].bool()
        shown.append(trained_on(model, inputs)[real])
        with hidden_image(model):
            hidden.append(trained_on(model, inputs)[real])
    for other in range(1, len(hidden)):
        assert difference(hidden[0], hidden[other]) < TOLERANCE + difference(shown[0], shown[other])


def test_visual_tokens_and_positions_stay(family: TinyVLM):
    """Their hidden states, as long as they see no text after an image; and what is known of runs and positions."""
    model = built(family, "eager")
    inputs = family.inputs(model.get_base_model(), "t4 i t6", "t2 i t3")
    vlm = find_vlm(model.get_base_model())
    contexts: list[VisualContext] = []
    vlm.text_model.register_forward_hook(
        lambda module, args, kwargs, output: contexts.append(kwargs["visual_context"]), with_kwargs=True
    )
    states = []
    for block in (contextlib.nullcontext(), hidden_image(model)):
        with block:
            states.append(model(**inputs, use_cache=False, output_hidden_states=True).hidden_states)
    assert len(states[0]) > len(vlm.layers)
    visual, has_states = visual_tokens(inputs), len(vlm.self_attentions) < len(vlm.layers)
    for shown, hidden in zip(*states):
        assert has_states or torch.equal(shown[visual], hidden[visual])
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.equal(states[0][-1][visual], states[1][-1][visual]) or not has_states
    assert not torch.equal(states[0][-1][text_tokens(inputs)], states[1][-1][text_tokens(inputs)])
    shown, hidden = contexts
    assert torch.equal(shown.position_ids, hidden.position_ids)
    assert torch.equal(shown.anchors, hidden.anchors)
    assert torch.equal(shown.memory.slots, hidden.memory.slots)


# Images whose tokens see one another in both directions, and prefixes: as processors mark them.
BOTH_WAYS = {
    "gemma3": lambda inputs: visual_tokens(inputs).long(),
    "paligemma": lambda inputs: torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]) >= 14,
    "paligemma2": lambda inputs: torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]) >= 14,
}


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_masks_that_are_not_causal(name: str, kernel: str):
    """Text before an image would see it, and visual tokens go on seeing what stands behind them."""
    family = FAMILIES[name]
    model = built(family, kernel)
    inputs = family.inputs(model.get_base_model(), "t4 i t8", "t7 i t5")
    plain = trained_on(model, inputs)
    inputs["token_type_ids"] = BOTH_WAYS[name](inputs).long()
    assert difference(trained_on(model, inputs), plain) > 100 * TOLERANCE, "the mask is another one"
    with gates_at_zero(model):
        assert changes(model, inputs) > 100 * TOLERANCE
        shown = trained_on(model, inputs)
        with hidden_image(model):
            assert changes(model, inputs) == 0
            hidden = trained_on(model, inputs)
            ids = inputs["input_ids"].clone()
            ids[:, 12] += 1  # text after the image, and within the prefix
            other_text = trained_on(model, {**inputs, "input_ids": ids})
    visual = visual_tokens(inputs)
    if name == "gemma3":  # an image sees itself, and text before it
        assert difference(hidden[visual], shown[visual]) < TOLERANCE
    else:
        assert difference(other_text[visual], hidden[visual]) > 100 * TOLERANCE


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_stand_in"])
@pytest.mark.parametrize(
    "name", ["dipe", "dipe-limited", "tdrs", "tdrs-inter", "vaf", "log_bias", "tdrs-inter+dipe+pvm"]
)
def test_methods_that_change_attention_see_no_image_either(tiny: TinyVLM, name: str, kernel: str):
    method = METHODS[name]
    names = [name] if isinstance(method, Method) else list(method.methods)
    base = tiny.build()
    base.config.get_text_config()._attn_implementation = kernel
    model = in_training(Together(base, **{each: METHODS[each] for each in dict.fromkeys(["pvm", *names])}))
    inputs = tiny.inputs(base, *ROWS)
    with gates_at_zero(model):
        assert changes(model, inputs) > 100 * TOLERANCE
        with hidden_image(model):
            assert changes(model, inputs) == 0
        on = trained_on(model, inputs)
        for each in model.peft_models[1:]:
            each.base_model.disable_adapter_layers()
        assert difference(trained_on(model, inputs)[:2], on[:2]) > 100 * TOLERANCE, "they act"


# ---- backward


def loss_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, labels=inputs["input_ids"].masked_fill(~text_tokens(inputs), -100), use_cache=False).loss


def gradients(model: torch.nn.Module) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return found


@pytest.mark.parametrize(("kernel", "reentrant"), [("eager", False), ("sdpa", True), ("flash_stand_in", False)])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava_cohere", "qwen3_5"])
def test_a_recomputed_layer_hides_the_same(name: str, kernel: str, reentrant: bool):
    """After the block, and after a forward that hides nothing."""
    family = FAMILIES[name]
    model = built(family, kernel)
    inputs = family.inputs(model.get_base_model(), *ROWS)
    loss_of(model, inputs).backward()
    shown = gradients(model)
    rows = [True, False, True]
    with hidden_image(model, rows):
        loss_of(model, inputs).backward()
    hidden = gradients(model)
    assert difference(hidden, shown) > 1e-3

    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with hidden_image(model, rows):
        loss = loss_of(model, inputs)
        with hidden_image(model):
            other_loss = loss_of(model, inputs)
    third_loss = loss_of(model, inputs)
    loss.backward()
    assert difference(gradients(model), hidden) < 1e-5
    third_loss.backward()
    assert difference(gradients(model), shown) < 1e-5
    del other_loss, loss, third_loss
    assert leftovers(model) == []


# ---- in training alone


def test_inference_sees_the_image(tiny: TinyVLM):
    model = built(tiny).eval()
    base = model.get_base_model()
    inputs, prompt = tiny.inputs(base, *ROWS), tiny.prompt(base, *ROWS)
    expected = logits(model, inputs)
    answers = model.generate(**prompt, **GENERATE, do_sample=False).logits
    with hidden_image(model):
        assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(model(**inputs).logits, expected), "in eval mode, with gradients"
        model.train()
        in_training(model)
        assert torch.equal(logits(model, inputs), expected), "in training mode, without gradients"
        for found, wanted in zip(model.generate(**prompt, **GENERATE, do_sample=False).logits, answers):
            assert torch.equal(found, wanted)
        assert difference(trained_on(model, inputs)[:2], expected[:2]) > 100 * TOLERANCE
    assert torch.equal(trained_on(model, inputs), expected)
    assert leftovers(model) == []


class Interruption(Exception):
    """Raised in a forward."""


@pytest.mark.parametrize("name", ["llava", "qwen3_5"])
@pytest.mark.parametrize("kind", [Interruption, KeyboardInterrupt])
def test_nothing_is_left_after_an_interruption(name: str, kind: type[BaseException]):
    family = FAMILIES[name]
    model = built(family)
    inputs = family.inputs(model.get_base_model(), *ROWS)
    shown = trained_on(model, inputs)

    def interrupt(*args: object) -> None:
        raise kind

    handle = find_vlm(model.get_base_model()).layers[1].mlp.register_forward_pre_hook(interrupt)
    try:
        with hidden_image(model):
            assert len(leftovers(model)) > 3
            model(**inputs, use_cache=False)
    except kind:
        pass
    handle.remove()
    assert leftovers(model) == []
    assert torch.equal(trained_on(model, inputs), shown)


def test_what_hides_images_is_not_taken_off_while_dynamo_traces_the_model(plain: TinyVLM):
    """The garbage collector may free it at any time, and the model must not change between a trace and its guards."""
    model = built(plain)
    steering = [_Steering(find_vlm(model.get_base_model()))]
    while_tracing = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        steering.clear()
        while_tracing.extend(leftovers(model))
        return graph.forward

    torch.compile(lambda tensor: tensor + 1, backend=backend)(torch.ones(1))
    assert while_tracing
    assert not leftovers(model)


def test_blocks_within_blocks_hide_the_rows_of_both(plain: TinyVLM):
    model = built(plain)
    inputs = plain.inputs(model.get_base_model(), "t4 i t6", "t5 i t5", "t6 i t4")
    with gates_at_zero(model), hidden_image(model, [True, False, False]):
        with hidden_image(model, [False, True, False]):
            both = [trained_on(model, each) for each in (inputs, with_other_pixels(inputs))]
        one = [trained_on(model, each) for each in (inputs, with_other_pixels(inputs))]
    text = text_tokens(inputs)
    for pair, hidden in ((both, [True, True, False]), (one, [True, False, False])):
        assert [torch.equal(pair[0][row][text[row]], pair[1][row][text[row]]) for row in range(3)] == hidden


def test_the_adapter_may_leave_within_a_block(plain: TinyVLM):
    """After an error in a trainer, a block may still be open."""
    base = plain.build()
    inputs = plain.inputs(base, *ROWS)
    expected = logits(base, inputs)
    model = in_training(METHODS["pvm"].attach(base))
    with hidden_image(model):
        trained_on(model, inputs)
        base = model.unload().train()
        assert difference(trained_on(base, inputs), expected) < TOLERANCE
    assert leftovers(base) == []


# ---- whom it is for


def test_it_finds_the_model_in_its_wrappers(plain: TinyVLM):
    bare = plain.build()
    add_adapters(bare, {"pvm": PVMConfig(r=32, init_gate=1.0), "lora": LoraConfig(target_modules=["q_proj"])})
    peft_model = get_peft_model(plain.build(), PVMConfig(r=32, init_gate=1.0))

    class Distributed(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, **inputs: torch.Tensor):
            return self.module(**inputs)

    for model in (bare, peft_model, Distributed(peft_model)):
        model.train()
        inputs = plain.inputs(peft_model.get_base_model(), *ROWS)
        shown = trained_on(model, inputs)
        with hidden_image(model):
            assert difference(trained_on(model, inputs)[:2], shown[:2]) > 100 * TOLERANCE


def nothing_attached(family: TinyVLM) -> torch.nn.Module:
    return family.build()


def lora_alone(family: TinyVLM) -> torch.nn.Module:
    return get_peft_model(family.build(), LoraConfig(target_modules=["q_proj"]))


def without_pvm(family: TinyVLM) -> torch.nn.Module:
    return METHODS["dipe"].attach(family.build())


def disabled(family: TinyVLM) -> torch.nn.Module:
    model = METHODS["pvm"].attach(family.build())
    model.base_model.disable_adapter_layers()
    return model


def another_is_active(family: TinyVLM) -> torch.nn.Module:
    model = family.build()
    add_adapters(model, {"pvm": PVMConfig(r=32), "lora": LoraConfig(target_modules=["q_proj"])})
    activate(model, ["lora"])
    return model


@pytest.mark.parametrize("make", [nothing_attached, lora_alone, without_pvm, disabled, another_is_active])
def test_refused_where_nothing_could_learn_from_it(make: Callable[[TinyVLM], torch.nn.Module]):
    model = make(FAMILIES["llava"])
    with pytest.raises(ValueError, match="No PVM adapter is active"), hidden_image(model):
        pytest.fail("it was let in")


@pytest.mark.parametrize("rows", [[True], [1, 0, 1], torch.ones(3, 1).bool(), torch.ones(3)])
def test_rows_must_fit_the_batch(rows: object):
    family = FAMILIES["llava"]
    model = built(family)
    with hidden_image(model, rows), pytest.raises(ValueError, match="rows must be bool, one for each of the 3 rows"):
        model(**family.inputs(model.get_base_model(), *ROWS))


def test_a_state_cannot_forget_an_image():
    """Linear attention in Qwen3.5. Softmax attention hides what is in a cache as well."""
    for name in ("qwen3_5", "qwen3_vl"):
        family = FAMILIES[name]
        model = built(family)
        base, conversation = model.get_base_model(), "t4 i t6"
        length = family.inputs(base, conversation)["input_ids"].shape[1]
        first = family.inputs(base, conversation, stop=length - 3)
        last = family.inputs(base, conversation, start=length - 3)
        found = []
        with gates_at_zero(model), hidden_image(model):
            for inputs in (first, with_other_pixels(first)):
                cache = model(**inputs, use_cache=True)[CACHE]
                if name == "qwen3_5":
                    with pytest.raises(NotImplementedError, match="use_cache=False"):
                        model(**last, **{CACHE: cache})
                else:
                    found.append(model(**last, **{CACHE: cache}).logits)
        assert name == "qwen3_5" or torch.equal(*found)
