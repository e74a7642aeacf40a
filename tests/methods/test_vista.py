"""VISTA agrees with an independent computation in float64, in `generate` on every model."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, core
from ffn_outputs import changing_ffns, text_model_of
from forwards import GENERATE, TOLERANCE, difference, generate, in_double, logits, without_images
from oracle import oracle
from peft import PeftModel, get_peft_model
from stepwise import with_answer
from test_five_properties import _hooks
from tiny_vlms import FAMILIES, IMAGE, VIDEO, TinyVLM
from transformers import LogitsProcessor, LogitsProcessorList

from peft_pvm import M3IDConfig, VISTAConfig, attached
from peft_pvm.methods import vista
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tuners.ffn_method import FFNStep
from peft_pvm.tuners.in_generate import Prompt


pytestmark = pytest.mark.every_family
AGREES = 2e-5
ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")
CONFIG = VISTAConfig(strength=0.7)


def last_outputs(tiny: TinyVLM, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What each decoder layer returns for the last token of one conversation, in float64."""
    found: list[torch.Tensor] = []
    with oracle(tiny.build(), inputs) as reference:
        for layer in text_model_of(reference).layers:
            layer.register_forward_hook(
                lambda module, args, output: found.append((output[0] if isinstance(output, tuple) else output)[0, -1])
            )
        logits(reference, in_double(inputs))
    return found


def expected(
    tiny: TinyVLM, config: VISTAConfig, prompt: dict[str, torch.Tensor], answer: torch.Tensor
) -> torch.Tensor:
    """The logits from which each token of an answer came, `(tokens, vocab_size)`."""
    whole = with_answer(prompt, answer)
    visual = torch.isin(whole["input_ids"], torch.tensor((IMAGE, VIDEO)))[0]
    images = visual.nonzero().flatten().tolist()
    towards = []
    if images:
        pairs = zip(last_outputs(tiny, prompt), last_outputs(tiny, without_images(prompt)))
        towards = [(ours - other) / (ours - other).norm().clamp(min=1e-12) for ours, other in pairs]

    def turn(layer_idx: int, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        for place in range(output.shape[1]) if images else ():
            if place < images[0] or visual[place]:
                continue
            y = output[0, place]
            unit, v = y / y.norm(), towards[layer_idx]
            turned = unit + config.strength * (1 + max(0.0, -float(unit @ v))) * v
            changed[0, place] = y.norm() * turned / turned.norm()
        return changed

    with oracle(tiny.build(), whole) as reference:
        layers = config.layers_to_transform or list(range(len(text_model_of(reference).layers)))
        with changing_ffns(reference, layers, whole["input_ids"].shape, turn):
            found = logits(reference, in_double(whole), use_cache=False)[0]
    length = prompt["input_ids"].shape[1]
    return found[length - 1 : length - 1 + len(answer)]


def deviation(
    tiny: TinyVLM, used: VISTAConfig, config: VISTAConfig, rows: tuple[str, ...] = ROWS, **arguments: Any
) -> tuple[float, list[float]]:
    """How the logits of generate differ from the oracle's; and by row, what the method changes."""
    base = tiny.build()
    result = generate(tiny, get_peft_model(base, used), *rows, max_new_tokens=3, min_new_tokens=3, **arguments)
    computed, differences, changes = torch.stack(result.logits, 1).double(), [], []
    for number, row in enumerate(rows):
        prompt, answer = tiny.prompt(base, row), result.sequences[number, -3:]
        right = expected(tiny, config, prompt, answer)
        plain = expected(tiny, replace(config, strength=0.0), prompt, answer)
        differences.append(difference(computed[number], right))
        changes.append(difference(right, plain))
    return max(differences), changes


def test_generate(family: TinyVLM):
    """In a batch that is padded on the left."""
    deviates, changes = deviation(family, CONFIG, CONFIG)
    assert deviates < AGREES
    assert min(changes[:2]) > 100 * AGREES
    assert changes[2] == 0


def test_some_layers_without_a_cache(plain: TinyVLM):
    config = replace(CONFIG, layers_to_transform=[1])
    assert deviation(plain, config, config, use_cache=False)[0] < AGREES


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in core.ROWS])
def test_architecture(name: str):
    row, found = ARCHITECTURES[name], []
    if reason := row.refusal("vista"):
        with pytest.raises((ValueError, NotImplementedError), match=re.escape(reason)):
            generate(row.tiny, get_peft_model(row.tiny.build(), CONFIG), ROWS[0])
        return
    for strength in (0.0, 0.7):
        model = get_peft_model(row.tiny.build(), VISTAConfig(strength=strength))
        found.append(torch.stack(generate(row.tiny, model, ROWS[0], max_new_tokens=3).logits))
    assert difference(*found) > 100 * TOLERANCE


CHANGED, LAST = VISTAConfig.changed, vista._last_outputs


def in_step(**changes: Callable[[FFNStep], Any]) -> Callable[..., Any]:
    return lambda self, step: CHANGED(self, replace(step, **{name: of(step) for name, of in changes.items()}))


def unturned(self: VISTAConfig, step: FFNStep) -> torch.Tensor | None:
    """Added, without keeping the length."""
    turned = CHANGED(self, step)
    return None if turned is None else torch.where(turned == step.output, turned, 2 * turned - step.output)


def without_noise_of_prompt(prompt: Prompt, title: str) -> dict[str, Any]:
    ids = prompt.inputs["input_ids"].masked_fill(prompt.visual, 7)
    return {"input_ids": ids, "attention_mask": prompt.inputs["attention_mask"]}


WRONG = {
    "away from the image": (vista, "_last_outputs", lambda *args: {i: -v for i, v in LAST(*args).items()}),
    "tokens where the image was": (vista, "text_alone", without_noise_of_prompt),
    "the layer before": (VISTAConfig, "changed", in_step(layer_idx=lambda step: max(step.layer_idx - 1, 0))),
    "of the stream": (VISTAConfig, "changed", in_step(output=lambda step: step.ffn_input)),
    "longer": (VISTAConfig, "changed", unturned),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_wrong_variants_are_noticed(wrong: str | None, monkeypatch: pytest.MonkeyPatch):
    if wrong is not None:
        monkeypatch.setattr(*WRONG[wrong])
    assert (deviation(FAMILIES["llava"], CONFIG, CONFIG)[0] < AGREES) == (wrong is None)


def test_forwards_and_what_is_off_are_the_bases(tiny: TinyVLM):
    base = tiny.build().requires_grad_(False)
    before = dict(vars(base))
    inputs = tiny.inputs(base, *ROWS)
    forward, answer = logits(base, inputs), base.generate(**tiny.prompt(base, *ROWS), **GENERATE, do_sample=False)
    hooks = _hooks(base)  # those of transformers included
    model = get_peft_model(base, CONFIG)
    assert torch.equal(logits(model, inputs), forward)
    with model.disable_adapter():
        assert torch.equal(torch.stack(generate(tiny, model, *ROWS).logits), torch.stack(answer.logits))
    on = torch.stack(generate(tiny, model, *ROWS).logits)
    assert difference(on[:, :2], torch.stack(answer.logits)[:, :2]) > 1e-3
    assert torch.equal(on[:, 2], torch.stack(answer.logits)[:, 2]), "a row without images, to the bit"
    assert torch.equal(logits(model.unload(), inputs), forward)
    assert vars(base).keys() == before.keys()
    assert _hooks(base) == hooks


def test_an_error_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch):
    llava = FAMILIES["llava"]
    model = get_peft_model(llava.build(), CONFIG)
    generate(llava, model, ROWS[0])
    hooks = _hooks(model)
    with monkeypatch.context() as patch:
        patch.setattr(vista, "Branch", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(llava, model, ROWS[0])
    assert _hooks(model) == hooks
    generate(llava, model, ROWS[0])


def test_what_another_thread_runs_is_not_looked_at():
    """A server may answer somebody else on the same model while a prompt is read."""
    llava = FAMILIES["llava"]
    model, found = llava.build(), {}
    inputs = llava.inputs(model, ROWS[0])
    with vista._watching(find_vlm(model), found):
        other = threading.Thread(target=lambda: logits(model, inputs))
        other.start()
        other.join()
        assert not found
        logits(model, inputs)
    assert sorted(found) == [0, 1, 2]


def test_saving_and_loading(tmp_path: Path):
    llava = FAMILIES["llava"]
    model = get_peft_model(llava.build(), CONFIG)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llava.build(), tmp_path)
    found = [torch.stack(generate(llava, each, *ROWS).logits) for each in (model, again)]
    assert torch.equal(*found)


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_other_ways_to_decode(plain: TinyVLM, arguments: dict[str, Any]):
    """Each sequence of a prompt is turned as the prompt is."""
    torch.manual_seed(0)
    base = plain.build()
    model, row = get_peft_model(base, CONFIG), "t7 i t5"
    arguments = {**GENERATE, "max_new_tokens": 3, "min_new_tokens": 3, "output_scores": True, **arguments}
    result = model.generate(**plain.prompt(base, row), **arguments)
    for number, sequence in enumerate(result.sequences):
        right = expected(plain, CONFIG, plain.prompt(base, row), sequence[-3:])
        if "num_return_sequences" in arguments:
            computed = torch.stack(result.logits, 1)[number]
            assert difference(computed.double(), right) < AGREES
        else:
            found = right.log_softmax(-1).gather(1, sequence[-3:, None]).sum() / 3
            assert abs(float(result.sequences_scores[number]) - float(found)) < AGREES


def test_several_turns(plain: TinyVLM):
    """On a cache that holds text alone; one with images is refused, since their pixels are gone."""
    model = get_peft_model(plain.build(), CONFIG)
    first = generate(plain, model, ROWS[1])
    ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    later = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
    with pytest.raises(NotImplementedError, match="VISTA reads the whole conversation with and without its images"):
        model.generate(**later, **GENERATE, do_sample=False)


def test_forwards_within_generate_are_the_bases(plain: TinyVLM):
    """Those of a logits processor, say, which may be about another conversation."""
    base = plain.build()
    model, other = get_peft_model(base, CONFIG), plain.inputs(base, "t3 i t5", "t4 i t4")
    expected, found = logits(base, other), []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            found.append(logits(base, other))
            return scores

    undisturbed = torch.stack(generate(plain, model, ROWS[1]).logits)
    asking = generate(plain, model, ROWS[1], logits_processor=LogitsProcessorList([Asks()]))
    assert torch.equal(torch.stack(asking.logits), undisturbed)
    assert len(found) == len(asking.logits)
    assert all(torch.equal(each, expected) for each in found)


def test_beside_others():
    llava = FAMILIES["llava"]
    model = llava.build()
    with attached(model, CONFIG, M3IDConfig()), pytest.raises(NotImplementedError, match="both run the model"):
        model.generate(**llava.prompt(model, ROWS[0]), **GENERATE, do_sample=False)
    with pytest.raises(ValueError, match="LlavaModel has no generate, in which VISTAModel would act"):
        get_peft_model(llava.build().model, CONFIG)
