"""Methods that go from token to token agree with loops without a cache, and what they note follows the cache."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, core
from environment import on_a_cpu
from forwards import (
    GENERATE,
    TOLERANCE,
    counted_graphs,
    difference,
    generate,
    logits,
    prefill,
    prompt_and_step,
)
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from stepwise import STEPWISE, Stepwise, in_pieces, length_of, steps, with_answer
from test_decoding_step import static_cache, step_at, watched_step
from test_five_properties import _hooks
from tiny_vlms import FAMILIES, GEMMA4_SHARED, TinyVLM

from peft_pvm import SAVAAConfig, SPARCConfig, attached
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.stages import Values
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.families import LOGITS
from peft_pvm.tuners.last_logits import LastLogits
from peft_pvm.utils.packages import CACHE


pytestmark = pytest.mark.every_family
AGREES = 2e-5
SAVAA, SPARC = STEPWISE["savaa"], STEPWISE["sparc"]
ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")


@pytest.fixture(params=STEPWISE)
def stepwise(request: pytest.FixtureRequest) -> Stepwise:
    return STEPWISE[request.param]


def deviation(tiny: TinyVLM, attached_config: Any, stepwise: Stepwise, config: Any = None) -> float:
    """How two chats in turns differ from the loop: a prompt, an answer, another image, an answer, text, an answer."""
    model = tiny.build()
    chats, cuts = ["t4 i t6 i t9", "t5 i i t7 i t11"], []
    for chat, first in zip(chats, ("t4 i t3", "t5 i i t4")):
        prompt, length = length_of(tiny, model, first), length_of(tiny, model, chat)
        cuts.append([0, *range(prompt, prompt + 4), *range(length - 7, length - 4), length - 2, length - 1, length])
    config = config or stepwise.config
    expected = [stepwise.loop(tiny, config, tiny.inputs(model, chat), ends) for chat, ends in zip(chats, cuts)]
    with attached(model, attached_config):
        found = in_pieces(tiny, model, chats, cuts)
    return max(difference(one.double(), other) for one, other in zip(found, expected))


@pytest.mark.parametrize("which", ["config", "other"])
def test_two_chats_in_turns_are_the_loops(tiny: TinyVLM, stepwise: Stepwise, which: str):
    config = getattr(stepwise, which)
    assert deviation(tiny, config, stepwise, config) < AGREES


def noting(change: Callable[[VisualContext], dict[str, torch.Tensor]]) -> Callable[..., bool]:
    """The method with other notes."""

    def acts_in(self: SAVAAConfig, context: VisualContext) -> bool:
        acts = ACTS_IN(self, context)
        context.notes = {**context.notes, **(change(context) if acts else {})}
        return acts

    return acts_in


ACTS_IN, GROUNDED = SAVAAConfig.acts_in, LastLogits._grounded
NOTED, WEIGHTS, STAGES = SPARCConfig._noted, AttentionCall.last_row_weights, SPARCConfig.stages
WRONG: dict[str, dict[str, tuple[type, str, Callable[..., Any]]]] = {
    "savaa": {
        "entropy in nats": (SAVAAConfig, "acts_in", noting(lambda c: {"entropy": c.notes["entropy"] * math.log(320)})),
        "what is grounded is risky": (
            SAVAAConfig,
            "acts_in",
            noting(lambda c: {"grounding": 1 - c.notes["grounding"]}),
        ),
        "all text": (SAVAAConfig, "acts_in", noting(lambda c: {"prompt_length": c.notes["prompt_length"] + 99})),
        "the prompt grows": (
            SAVAAConfig,
            "acts_in",
            noting(lambda c: {"prompt_length": torch.zeros_like(c.notes["prompt_length"]) + c.past_length}),
        ),
        "the last image alone": (
            LastLogits,
            "_grounded",
            lambda self, memory, *rest: GROUNDED(
                self, replace(memory, grounding=tuple((slot, 0 * of) for slot, of in memory.grounding)), *rest
            ),
        ),
        "the first image alone": (
            LastLogits,
            "_grounded",
            lambda self, memory, *rest: (
                replace(memory, grounding=((memory.last_slot, memory.grounding[0][1]),))
                if memory.grounding
                else GROUNDED(self, memory, *rest)
            ),
        ),
        "forwards of several tokens too": (SAVAAConfig, "acts_in", lambda self, context: "entropy" in context.notes),
    },
    "sparc": {
        "one head": (AttentionCall, "last_row_weights", lambda self: WEIGHTS(self)[:, :1]),
        "once chosen is enough": (
            SPARCConfig,
            "_noted",
            lambda self, context: (NOTED(self, context)[0], NOTED(self, context)[1].clamp(max=1)),
        ),
        "new images start at 0": (
            SPARCConfig,
            "_noted",
            lambda self, context: (NOTED(self, context)[0].nan_to_num(0), NOTED(self, context)[1]),
        ),
        "keys are scaled": (
            Values,
            "scaled",
            lambda self, call, factors: replace(call, key=call.key * factors.to(call.key.dtype)),
        ),
        "visual rows too": (
            SPARCConfig,
            "stages",
            lambda self, layer: [replace(s, rows="all") if isinstance(s, Values) else s for s in STAGES(self, layer)],
        ),
    },
}


@pytest.mark.parametrize(
    ("method", "wrong"), [(method, wrong) for method in WRONG for wrong in (None, *WRONG[method])]
)
def test_wrong_variants_are_noticed(method: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch):
    if wrong is not None:
        monkeypatch.setattr(*WRONG[method][wrong])
    stepwise = STEPWISE[method]
    assert (deviation(FAMILIES["llava"], stepwise.config, stepwise) < AGREES) == (wrong is None)


FIELDS = {"savaa": ("visual", "text", "alpha", "risk_scale"), "sparc": ("alpha", "tau", "beta")}


@pytest.mark.parametrize(("method", "field"), [(method, field) for method in FIELDS for field in FIELDS[method]])
def test_every_field_counts(method: str, field: str):
    stepwise = STEPWISE[method]
    other = replace(stepwise.config, **{field: 0.6 * getattr(stepwise.config, field)})
    assert deviation(FAMILIES["llava"], other, stepwise) > 10 * AGREES


# ---- in generate


def generated(
    tiny: TinyVLM, stepwise: Stepwise, rows: tuple[str, ...], steps: int = 5, **arguments: Any
) -> tuple[float, list[float]]:
    """How the logits of generate differ from the loop's; and by row, what the method changes."""
    base = tiny.build()
    model = get_peft_model(base, stepwise.config)
    result = generate(tiny, model, *rows, max_new_tokens=steps, min_new_tokens=steps, **arguments)
    computed = torch.stack(result.logits, 1).double()
    differences, changes = [], []
    for number, row in enumerate(rows):
        prompt = tiny.prompt(base, row)
        length, answer = prompt["input_ids"].shape[1], result.sequences[number, -steps:]
        whole = with_answer(prompt, answer)
        expected = stepwise.loop(tiny, stepwise.config, whole, [0, *range(length, length + steps + 1)])
        differences.append(difference(computed[number], expected[length - 1 : -1]))
        plain = stepwise.loop(tiny, stepwise.without, whole, [0, length + steps])
        changes.append(difference(expected[length - 1 : -1], plain[length - 1 : -1]))
    return max(differences), changes


def test_generate_is_the_loop(family: TinyVLM, stepwise: Stepwise):
    """In a batch that is padded on the left: what each row gives alone. Without an image, that is the base's."""
    deviates, changes = generated(family, stepwise, ROWS)
    assert deviates < AGREES
    assert min(changes[:2]) > 1e-3 or not stepwise.always
    assert changes[2] == 0


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in core.ROWS])
def test_architecture(name: str):
    """Of SAVAA: its head and its logits are what types differ in."""
    row = ARCHITECTURES[name]
    reason = row.refusal("savaa")
    if reason is None:
        deviates, changes = generated(row.tiny, SAVAA, ROWS[:1], steps=2)
        assert deviates < AGREES
        assert changes[0] > 1e-3
    else:
        with pytest.raises((ValueError, NotImplementedError), match=re.escape(reason)):
            generate(row.tiny, get_peft_model(row.tiny.build(), SAVAAConfig()), ROWS[0])


# ---- beside generate


def test_forwards_and_what_is_off_are_the_bases(tiny: TinyVLM, stepwise: Stepwise):
    base = tiny.build().requires_grad_(False)
    before = dict(vars(base))
    inputs = tiny.inputs(base, *ROWS)
    forward, answer = logits(base, inputs), base.generate(**tiny.prompt(base, *ROWS), **GENERATE, do_sample=False)
    hooks = _hooks(base)
    model = get_peft_model(base, stepwise.config)
    assert torch.equal(logits(model, inputs), forward)
    assert difference(torch.stack(generate(tiny, model, *ROWS).logits)[1:], torch.stack(answer.logits)[1:]) > 1e-3
    with model.disable_adapter():
        assert torch.equal(torch.stack(generate(tiny, model, *ROWS).logits), torch.stack(answer.logits))
    assert torch.equal(logits(model.unload(), inputs), forward)
    assert vars(base).keys() == before.keys()
    assert _hooks(base) == hooks


def test_saving_and_loading(tmp_path: Path, stepwise: Stepwise):
    llava = FAMILIES["llava"]
    model = get_peft_model(llava.build(), stepwise.config)
    expected = torch.stack(generate(llava, model, *ROWS).logits)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert list(file.keys()) == []
    again = PeftModel.from_pretrained(llava.build(), tmp_path)
    assert torch.equal(torch.stack(generate(llava, again, *ROWS).logits), expected)


def test_kernels_agree(tiny: TinyVLM, stepwise: Stepwise):
    found = []
    for kernel in ("eager", "sdpa"):
        model = get_peft_model(tiny.build(attn_implementation=kernel), stepwise.config)
        found.append(torch.stack(generate(tiny, model, *ROWS[:2]).logits))
    assert difference(*found) < TOLERANCE


def test_a_step_waits_for_nothing(tiny: TinyVLM, stepwise: Stepwise):
    model = get_peft_model(tiny.build(), stepwise.config)
    with model.disable_adapter():
        base_waits = watched_step(tiny, model, 64).waits
    assert watched_step(tiny, model, 64).waits == base_waits


@on_a_cpu
def test_steps_are_the_same_graphs():
    """Of SAVAA: one of the model's forward, and one of the hook behind it."""
    llava = FAMILIES["llava"]
    base = get_peft_model(llava.build(), SAVAA.config).get_base_model()
    prompt, step = prompt_and_step(llava, base, "t4 i t9")
    graphs, backend = counted_graphs()
    results = []
    for run in (base, torch.compile(base, fullgraph=True, backend=backend)):
        cache = static_cache(base, 64)
        logits(base, prompt, **{CACHE: cache}, use_cache=True)
        steps = []
        for number in range(4):
            inputs = step_at(step, number)
            inputs["attention_mask"] = (torch.arange(64) < inputs["attention_mask"].shape[1]).long()[None]
            steps.append(logits(run, inputs, **{CACHE: cache}, use_cache=True))
        results.append(torch.cat(steps, 1))
    assert len(graphs) == 2
    assert difference(*results) < TOLERANCE


def test_what_was_noted_follows_the_cache(plain: TinyVLM, stepwise: Stepwise):
    model = get_peft_model(plain.build(), stepwise.config)
    chats = ("t4 i t9", "t6 i t7")
    alone, caches = [], []
    for chat in chats:
        length = length_of(plain, model.get_base_model(), chat)
        caches.append(prefill(plain, model, chat, stop=length - 3))
        alone.append(steps(plain, model, copy.deepcopy(caches[-1]), chat, length - 3, 3))
        with model.disable_adapter():
            base = steps(plain, model, caches[-1], chat, length - 3, 3)
        assert difference(alone[-1], base) > 1e-3
    whole = plain.inputs(model.get_base_model(), *chats)
    cache = prefill(plain, model, *chats, stop=length - 3)
    cases: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        "pickle": (lambda cache: vars(cache).update(vars(pickle.loads(pickle.dumps(cache)))), [0, 1]),
    }
    for name, (operation, rows) in cases.items():
        changed, found = copy.deepcopy(cache), []
        operation(changed)
        for place in range(length - 3, length):
            of_rows = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"][:, : place + 1]}
            of_rows["input_ids"] = of_rows["input_ids"][:, place : place + 1]
            positions = whole["position_ids"][..., place : place + 1]
            piece = {key: tensor[rows] for key, tensor in of_rows.items()}
            piece["position_ids"] = positions[:, rows] if positions.dim() == 3 else positions[rows]
            found.append(logits(model, piece, **{CACHE: changed}, use_cache=True))
        assert difference(torch.cat(found, 1), torch.cat(alone)[rows]) < TOLERANCE, name


CHAT, REFUSAL = "t4 i t6 i t5", "needs the logits at all image tokens of a conversation"


def test_a_crop_leaves_what_a_shorter_conversation_has(plain: TinyVLM):
    """A chat of two images goes on as if there had been no second, but for what the last forward said."""
    model = get_peft_model(plain.build(), SAVAA.config)
    first = length_of(plain, model.get_base_model(), "t4 i t3")
    fresh = prefill(plain, model, CHAT, stop=first)
    rest = plain.inputs(model.get_base_model(), CHAT, start=first)
    with torch.no_grad():
        cropped = model(**rest, **{CACHE: copy.deepcopy(fresh)}, use_cache=True)[CACHE]
    assert len(cropped.visual_memory.grounding) == 2
    cropped.crop(first - cropped.get_seq_length())
    fresh.visual_memory.notes.clear()
    found = [steps(plain, model, cache, CHAT, first, 3) for cache in (cropped, fresh)]
    assert difference(*found) < TOLERANCE
    with model.disable_adapter():
        base = steps(plain, model, prefill(plain, model, CHAT, stop=first), CHAT, first, 3)
    changes = [difference(found[0][:, place], base[:, place]) for place in range(3)]
    assert changes[0] < TOLERANCE
    assert min(changes[1:]) > 1e-3


def test_what_is_not_known_is_refused(plain: TinyVLM):
    """An image that was read while the adapter was off, and one that a crop went through."""
    model = get_peft_model(plain.build(), SAVAA.config)
    first = length_of(plain, model.get_base_model(), "t4 i t3")
    with model.disable_adapter():
        cache = prefill(plain, model, CHAT, stop=first)
    steps(plain, model, cache, CHAT, first, 1)
    with pytest.raises(NotImplementedError, match=REFUSAL):
        steps(plain, model, cache, CHAT, first + 1, 1)
    cache = prefill(plain, model, CHAT, stop=first)
    cache.crop(first - 5 - cache.get_seq_length())
    with pytest.raises(NotImplementedError, match=REFUSAL):
        steps(plain, model, cache, CHAT, first, 3)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"use_cache": False}, "use_cache=False leaves no KV cache"),
        ({"prefill_chunk_size": 7}, "prefill_chunk_size makes a piece of the prompt look like an answer"),
    ],
)
def test_other_ways_to_generate_are_refused_by_name(stepwise: Stepwise, setting: dict[str, Any], reason: str):
    """Without a cache, nothing would be known of earlier tokens. In pieces, a prompt would be taken for an answer."""
    llava = FAMILIES["llava"]
    base = llava.build()
    prompt, how = llava.prompt(base, ROWS[0]), {**GENERATE, "do_sample": False, **setting}
    expected = torch.stack(base.generate(**prompt, **how).logits)
    model = get_peft_model(base, stepwise.config)
    message = rf"\({stepwise.config.title} default\) depend on what .* {reason}"
    with pytest.raises(NotImplementedError, match=message):
        model.generate(**prompt, **how)
    with model.disable_adapter():
        assert torch.equal(torch.stack(model.generate(**prompt, **how).logits), expected)
    model.unload()
    assert torch.equal(torch.stack(base.generate(**prompt, **how).logits), expected)


def test_models_and_ways_to_generate_that_are_refused(monkeypatch: pytest.MonkeyPatch):
    llava = FAMILIES["llava"]
    model = get_peft_model(llava.build(), SAVAA.config)
    with pytest.raises(
        NotImplementedError, match="depend on what they saw in the forward before, but assisted decoding"
    ):
        generate(llava, model, ROWS[0], prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="LlavaModel has no head that makes logits, which SAVAAModel reads"):
        get_peft_model(llava.build().model, SAVAA.config)
    granite = ARCHITECTURES["granite4_vision"].tiny
    model = granite.build()
    model.config.text_config.logits_scaling = 4.0
    model = get_peft_model(model, SAVAA.config)
    generate(granite, model, ROWS[0])
    monkeypatch.delitem(LOGITS, "granite4_vision")
    with pytest.raises(NotImplementedError, match="does more to the output of its head than peft_pvm knows"):
        generate(granite, model, ROWS[0])
    if widths_of_last_layer(GEMMA4_SHARED) == [1]:
        with pytest.raises(NotImplementedError, match=REFUSAL):
            generate(GEMMA4_SHARED, get_peft_model(GEMMA4_SHARED.build(), SAVAA.config), ROWS[0])


def widths_of_last_layer(tiny: TinyVLM) -> list[int]:
    """How many tokens of a prompt the last layer computes."""
    model, widths = tiny.build(), []
    attention = model.model.language_model.layers[-1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    logits(model, tiny.inputs(model, ROWS[0]), logits_to_keep=1)
    return widths
