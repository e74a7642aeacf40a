"""Every architecture works, or is refused for its true reason."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import test_five_properties as properties
import torch
import transformers as T
from architectures import ARCHITECTURES, OF_THE_NEWEST, Architecture, core, stacks, type_of
from architectures.page import NEWEST, OLDEST
from forwards import TOLERANCE, difference, generate, logits
from methods_under_test import FIRST_OF_KIND, LEADING, METHODS, PUBLISHED, Together
from oracle import agrees_with_the_oracle
from peft import get_peft_model
from tiny_vlms import IMAGE, VIDEO, TinyVLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from peft_pvm import CAIConfig, DIPEConfig, SPARCConfig, TDRSConfig
from peft_pvm.tokens.context import CONTEXT
from peft_pvm.tokens.early_exit import EarlyExit
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tuners.attention_method import AttentionMethod


ROTATING = {"dipe": DIPEConfig(max_distance=0), "tdrs": TDRSConfig()}


def _is_tested(name: str, method: str) -> bool:
    """On the families of the core, the leading methods are tested elsewhere, at length. On the others, so is PVM's
    other memory where that is what works."""
    if method in LEADING:
        return name not in core.ROWS
    return ARCHITECTURES[name].refusal("pvm") != ARCHITECTURES[name].refusal(method)


CASES = [
    (name, method) for name in ARCHITECTURES for method in (*LEADING, "pvm-hidden-states") if _is_tested(name, method)
]
DECIDES_THE_WEIGHTS = ("pai", "hgai", "cai")  # one of these at most acts in a layer: each is tested by itself
FFN = re.compile("mlp|feed_forward|ffn|moe|expert|fc[12]")  # a parameter of an FFN, by its name in the decoder layer


def test_every_type_of_transformers_has_a_row():
    missing = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(map(type_of, ARCHITECTURES))
    assert not missing, (
        f"tests/architectures/ lacks types of transformers {T.__version__}: {', '.join(sorted(missing))}. Write a row "
        "with a tiny model for each, run `pytest -k TYPE`, and say in the row what is refused and with which words. "
        "`make generate` brings it into docs/models.md."
    )


def test_the_types_of_the_newest_transformers_are_known():
    lacking = {type_of(name) for name, row in ARCHITECTURES.items() if not row.tiny.is_there}
    if T.__version__ == OLDEST:
        assert lacking == OF_THE_NEWEST & set(map(type_of, ARCHITECTURES))
    if T.__version__ == NEWEST:
        assert not lacking


@pytest.mark.parametrize(("name", "method"), CASES)
def test_architecture(name: str, method: str):
    """Off is off, a cache changes nothing, rows of a batch are what they are alone, and the sums are right."""
    row = ARCHITECTURES[name]
    reason = row.refusal(method)
    if reason:
        is_refused(row.tiny, method, reason)
        return
    with properties.attached_and_gone(row.tiny, METHODS[method], row.tiny.build_precise) as model:
        if "cached" not in row.differs:
            properties.cached_decoding_equals_the_full_forward(row.tiny, model)
        if "padded" not in row.differs:
            properties.left_padded_batch_equals_its_rows_alone(row.tiny, model)
    if method in ROTATING:
        # Where padded rows differ anyway, kernels may disagree on them.
        batch = ("t4 i t3 i t6",) if "padded" in row.differs else ("t4 i t3 i t6", "i t9", "t9")
        agrees_with_the_oracle(row.tiny, **{method: ROTATING[method]}, batch=batch)
    elif row.streams:
        is_added_to_the_streams(row.tiny, method, *row.streams)
    else:
        is_added_to_the_stream(row, method)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_methods(name: str):
    """Off is off for each of them: one of each kind, on the families of the core all.

    A cache, and other rows, change nothing while all that can act together do: what sets these methods apart is
    tested by their own oracles, so that here a fault of any of them is one of what they share with the model.
    """
    row = ARCHITECTURES[name]
    tested = [method for method in PUBLISHED if name in core.ROWS or method in FIRST_OF_KIND]
    working = []
    for method in [method for method in tested if method not in LEADING]:
        reason = row.refusal(method)
        if reason:
            is_refused(row.tiny, method, reason)
            continue
        working.append(method)
        with properties.attached_and_gone(row.tiny, METHODS[method]):
            pass
    if "memvr" in working:
        exit_behind_the_last_layer_is_the_models_own(row.tiny)
    beside = [method for method in working if method not in DECIDES_THE_WEIGHTS]
    for together in filter(None, [beside, *([method] for method in working if method not in beside)]):
        model = Together(row.tiny.build_precise(), **{method: METHODS[method] for method in together}).eval()
        if "cached" not in row.differs:
            properties.cached_decoding_equals_the_full_forward(row.tiny, model)
        if "padded" not in row.differs:
            properties.left_padded_batch_equals_its_rows_alone(row.tiny, model)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in core.ROWS])
@pytest.mark.parametrize("config", [CAIConfig(threshold=0), SPARCConfig(alpha=3.0, tau=0.0)], ids=["cai", "sparc"])
def test_what_reads_more_than_scores(name: str, config: AttentionMethod):
    """Each acts on every type, or is refused for its own reason."""
    row = ARCHITECTURES[name]
    if reason := row.refusal(config.method):
        with pytest.raises((ValueError, NotImplementedError), match=re.escape(reason)):
            generate(row.tiny, get_peft_model(row.tiny.build(), config), "t4 i t3 i t6")
        return

    def answer(config: AttentionMethod) -> torch.Tensor:
        model = get_peft_model(row.tiny.build(), config)
        return torch.stack(generate(row.tiny, model, "t4 i t3 i t6", max_new_tokens=4).logits)

    acting = answer(config)
    assert acting.isfinite().all()
    if config.method == "cai":  # whether SPARC chooses a token depends on the weights
        assert difference(acting, answer(replace(config, threshold=1.0))) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.tiny.video])
def test_videos_are_visual(name: str):
    """Adapters know the tokens that stand for them."""
    row = ARCHITECTURES[name]
    method = next((method for method in PUBLISHED if not row.refusal(method)), None)
    if method is None:
        pytest.skip(f"No method acts on {name}")
    model = METHODS[method].attach(row.tiny.build())
    inputs = row.tiny.inputs(model.get_base_model(), "t4 v t5")
    seen = {}
    text_model = find_vlm(model.get_base_model()).text_model
    text_model.register_forward_pre_hook(lambda *args: seen.update(args[-1]), with_kwargs=True)
    on = logits(model, inputs)
    assert torch.equal(seen[CONTEXT].visual_mask, torch.isin(inputs["input_ids"], torch.tensor((IMAGE, VIDEO))))
    with model.disable_adapter():
        assert difference(on, logits(model, inputs)) > 100 * TOLERANCE


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


def exit_behind_the_last_layer_is_the_models_own(tiny: TinyVLM) -> None:
    model = tiny.build()
    vlm = find_vlm(model)
    seen = {}
    vlm.layers[-1].register_forward_hook(lambda module, args, output: seen.update(last=_first(output)))
    expected = logits(model, tiny.inputs(model, "t4 i t3 i t6"))
    with torch.no_grad():
        found = EarlyExit(vlm).logits(seen["last"])
    said = expected > -1e30  # Chameleon never writes tokens of images
    assert difference(found.view_as(expected)[said], expected[said]) < TOLERANCE


def is_added_to_the_stream(row: Architecture, method: str) -> None:
    """A branch reads the residual stream after attention, and is added to it as it is.

    Independent of how a block is built: with an FFN of zeros, a layer returns that stream.
    """
    attached = METHODS[method].attach(row.tiny.build())
    vlm = find_vlm(attached.get_base_model())
    branch, layer = next((layer.pvm, layer) for layer in vlm.layers if hasattr(layer, "pvm"))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if FFN.search(name) and ".pvm_" not in f".{name}" and parameter.dim() >= 2:
                parameter.zero_()
            if name.startswith("post_feedforward_residual_gate."):  # closed: it lets the stream pass as it is
                parameter.fill_(-100)
    seen = {}
    branch.register_forward_hook(lambda module, args, output: seen.update(stream=args[0], update=output))
    if row.sum_reader is None:
        layer.register_forward_hook(lambda module, args, output: seen.update(layer=_first(output)))
    else:
        layer.get_submodule(row.sum_reader).register_forward_pre_hook(lambda module, args: seen.update(layer=args[0]))
    inputs = row.tiny.inputs(attached.get_base_model(), "t4 i t3 i t6")
    logits(attached, inputs)
    assert seen["update"].abs().amax() > 100 * TOLERANCE
    torch.testing.assert_close(seen["layer"], seen["stream"] + seen["update"], rtol=0, atol=TOLERANCE)


def test_dropout_of_the_ffn_spares_the_branch():
    """Fuyu's is a module after the FFN. All of the FFN is dropped, so that a layer adds the branch alone."""
    tiny = ARCHITECTURES["fuyu"].tiny
    attached = METHODS["pvm"].attach(tiny.build())
    layer = find_vlm(attached.get_base_model()).layers[1].train()
    layer.dropout.p = 1.0
    seen = {}
    layer.pvm.register_forward_hook(lambda module, args, output: seen.update(stream=args[0], update=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(layer=output))
    logits(attached, tiny.inputs(attached.get_base_model(), "t4 i t3 i t6"))
    assert seen["update"].abs().amax() > 100 * TOLERANCE
    torch.testing.assert_close(seen["layer"], seen["stream"] + seen["update"])


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
