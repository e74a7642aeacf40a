"""What holds for every method on every family, however it computes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from forwards import TOLERANCE, difference, logits
from methods_under_test import Combination, Method, Together
from peft import PeftModel
from tiny_vlms import FAMILIES, IMAGE, TinyVLM
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from peft_pvm.utils.packages import CACHE


pytestmark = pytest.mark.every_family
MIXED_BATCH = ("t4 i t3 i t6", "t7 i t5", "t9")  # two images, one, none


def test_off_is_bit_identical(family: TinyVLM, method: Method):
    with attached_and_gone(family, method):
        pass


@contextlib.contextmanager
def attached_and_gone(
    family: TinyVLM, method: Method, build: Callable[[], torch.nn.Module] | None = None
) -> Iterator[PeftModel]:
    """Attaches a method to a model for a while; off is off before and after.

    `build` makes the model; `None`: `family.build`.
    """
    # PEFT freezes the base, with any adapter. That alone changes the last bits of a projector that is given
    # non-contiguous features (LLaVA-OneVision since transformers 5.24): torch takes another kernel for frozen weights.
    model = (build or family.build)().requires_grad_(False)
    inputs = family.inputs(model, *MIXED_BATCH)
    base = logits(model, inputs)
    names, hooks = set(model.state_dict()), _hooks(model)

    attached = method.attach(model)
    assert difference(logits(attached, inputs), base) > 100 * TOLERANCE, "the method does nothing: nothing is tested"
    with attached.disable_adapter():
        assert torch.equal(logits(attached, inputs), base)
    assert names <= {name.removeprefix("base_model.model.") for name in attached.state_dict()}
    yield attached

    model = attached.unload()
    assert torch.equal(logits(model, inputs), base)
    assert set(model.state_dict()) == names
    assert _hooks(model) == hooks
    assert not hasattr(model, "peft_config")


def _hooks(model: torch.nn.Module) -> dict[str, list]:
    return {name: [*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for name, m in model.named_modules()}


def test_cached_decoding_equals_the_full_forward(family: TinyVLM, method: Method):
    cached_decoding_equals_the_full_forward(family, method.attach(family.build_precise()))


def cached_decoding_equals_the_full_forward(family: TinyVLM, model: PeftModel | Together) -> None:
    """Prompt, answer token by token, a second image into the same cache, answer again."""
    first, whole = "t4 i t3", "t4 i t3 i t6"
    first_turn = family.inputs(model.get_base_model(), first)["input_ids"].shape[1]
    length = family.inputs(model.get_base_model(), whole)["input_ids"].shape[1]
    inputs = family.inputs(model.get_base_model(), whole)
    expected = logits(model, inputs, use_cache=False)

    cuts = [0, first_turn - 2, first_turn - 1, first_turn, length - 2, length - 1, length]
    cache, pieces = None, []
    for start, stop in itertools.pairwise(cuts):
        piece = family.inputs(model.get_base_model(), whole, start=start, stop=stop)
        with torch.no_grad():
            output = model(**piece, **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        pieces.append(output.logits)
    assert difference(torch.cat(pieces, 1), expected) < TOLERANCE


def test_left_padded_batch_equals_its_rows_alone(family: TinyVLM, method: Method):
    left_padded_batch_equals_its_rows_alone(family, method.attach(family.build_precise()))


def left_padded_batch_equals_its_rows_alone(family: TinyVLM, model: PeftModel | Together) -> None:
    together = logits(model, family.inputs(model.get_base_model(), *MIXED_BATCH))
    for row, conversation in enumerate(MIXED_BATCH):
        alone = logits(model, family.inputs(model.get_base_model(), conversation))
        assert difference(together[row : row + 1, -alone.shape[1] :], alone) < TOLERANCE


def test_attention_kernels_agree(family: TinyVLM, method: Method):
    """Those that transformers has for the family and a CPU can run."""
    kernels = [kernel for kernel in ("eager", "sdpa", "flex_attention") if _is_supported(family, kernel)]
    on, off = [], []
    with torch.compiler.set_stance("force_eager"):  # flex attention would compile for half a minute
        for kernel in kernels:
            model = method.attach(family.build(attn_implementation=kernel))  # flex gives NaN in fp64
            inputs = family.inputs(model.get_base_model(), *MIXED_BATCH)
            real = inputs["attention_mask"].bool()  # what a padding token computes is nobody's business
            on.append(logits(model, inputs)[real])
            with model.disable_adapter():
                off.append(logits(model, inputs)[real])
    assert len(kernels) > 1 or family is FAMILIES["paligemma2"], "Gemma 2 has eager attention alone"
    for other in range(1, len(kernels)):
        # Qwen3.5's linear attention alone differs by 1.6e-5 between the first two.
        assert difference(on[0], on[other]) < TOLERANCE + difference(off[0], off[other])


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What flash attention computes: with no mask, or one of two axes; causal, if it is, from the bottom right."""
    assert module.config._attn_implementation == "flash_stand_in", "it asks its config for its own name"
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.shape[1] < num_keys:  # a static cache that is not full
        num_keys = attention_mask.shape[1]
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    own = torch.arange(num_queries)[:, None] + num_keys - num_queries
    others = torch.arange(num_keys)
    visible = (others <= own) | (not module.is_causal)
    if sliding_window is not None:
        visible = visible & (others > own - sliding_window)
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("flash_stand_in", flash_stand_in)
AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)


def test_flash_attention_is_given_what_it_takes(family: TinyVLM, method: Method | Combination):
    """Its kernels need a GPU, so that a stand-in of the same manners takes their place: prefill, decode, padding."""
    if family.is_prefix_lm:
        pytest.skip("PaliGemma's attention is not causal with flash attention: it differs without any adapter")
    on, off = [], []
    for kernel in (None, "flash_stand_in"):
        model = family.build_precise()
        if kernel is not None:
            model.config.get_text_config()._attn_implementation = kernel
        model = method.attach(model)
        base = model.get_base_model()
        inputs = family.inputs(base, *MIXED_BATCH)
        real = inputs["attention_mask"].bool()
        on.append([logits(model, inputs)[real]])
        with model.disable_adapter():
            off.append(logits(model, inputs)[real])
        whole, length = "t4 i t9", family.inputs(base, "t4 i t9")["input_ids"].shape[1]
        with torch.no_grad():
            first = family.inputs(base, whole, stop=length - 2)
            cache = model(**first, use_cache=True)[CACHE]
        for start in (length - 2, length - 1):
            one = family.inputs(base, whole, start=start, stop=start + 1)
            on[-1].append(logits(model, one, **{CACHE: cache}, use_cache=True))
    assert difference(*off) < TOLERANCE
    for one, other in zip(*on):
        assert difference(one, other) < TOLERANCE


def _is_supported(family: TinyVLM, kernel: str) -> bool:
    try:
        family.build(attn_implementation=kernel)
    except ValueError:  # transformers names the models that do not have it
        return False
    return True


def test_no_conversation_sees_anothers_image(family: TinyVLM, method: Method):
    model = method.attach(family.build())
    base = model.get_base_model()

    # In one batch: another image in the first row changes nothing in the second.
    inputs = family.inputs(base, "t4 i t3", "t4 i t5")
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    half = changed["pixel_values"].shape[0] // 2
    changed["pixel_values"][:half] += 1.0
    before, after = logits(model, inputs), logits(model, changed)
    assert difference(before[0, -3:], after[0, -3:]) > TOLERANCE
    if not _routes_tokens_together(base):
        assert torch.equal(before[1], after[1])
    assert difference(before[1], after[1]) < TOLERANCE

    # One after the other: a conversation without an image, after one with.
    text = family.inputs(base, "t9")
    expected = logits(model, text)
    if method.text_alone != "changed":
        with model.disable_adapter():
            assert torch.equal(logits(model, text), expected)
    logits(model, inputs)
    assert torch.equal(logits(model, text), expected)


def test_interleaved_conversations_stay_apart(family: TinyVLM, method: Method):
    model = method.attach(family.build_precise())
    base = model.get_base_model()
    conversations = ("t4 i t6", "t5 i i t7")
    expected = [
        logits(model, family.inputs(base, conversation), use_cache=False)[:, -3:] for conversation in conversations
    ]
    caches, steps = [None, None], [[], []]
    for step in range(4):
        for number, conversation in enumerate(conversations):
            length = family.inputs(base, conversation)["input_ids"].shape[1]
            start, stop = (0, length - 3) if step == 0 else (length - 4 + step, length - 3 + step)
            piece = family.inputs(base, conversation, start=start, stop=stop)
            with torch.no_grad():
                output = model(**piece, **{CACHE: caches[number]}, use_cache=True)
            caches[number] = output[CACHE]
            steps[number].append(output.logits[:, -1:])
    for decoded, whole in zip(steps, expected):
        assert difference(torch.cat(decoded[1:], 1), whole) < TOLERANCE


def _routes_tokens_together(model: torch.nn.Module) -> bool:
    """A mixture of experts computes one expert's tokens of all rows in one product: equal, but not to the last bit."""
    return "moe" in model.config.model_type or model.config.model_type == "llama4"


@pytest.mark.parametrize("rows", [("t9",), ("t4 i t6",), ("t4 i t3 i t6", "t9")], ids=["none", "one", "mixed"])
def test_rows_without_images(family: TinyVLM, rows: tuple[str, ...], method: Method):
    model = method.attach(family.build())
    inputs = family.inputs(model.get_base_model(), *rows)
    with model.disable_adapter():
        base = logits(model, inputs)
    on = logits(model, inputs)
    for row in range(len(rows)):
        real = inputs["attention_mask"][row].bool()
        num_visual = int((inputs["input_ids"][row] == IMAGE).sum())
        if num_visual >= method.least_tokens or method.text_alone == "changed":
            assert difference(on[row], base[row]) > 100 * TOLERANCE
        elif (
            _routes_tokens_together(model.get_base_model())
            or num_visual
            or (method.text_alone == "equal" and len(rows) > 1)
        ):
            assert difference(on[row][real], base[row][real]) < TOLERANCE
        else:
            assert torch.equal(on[row], base[row])
