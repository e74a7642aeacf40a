"""adapter_names: every row of a batch has its own PVM adapter, or none."""

from __future__ import annotations

import threading

import pytest
import torch
from forwards import GENERATE, TOLERANCE, difference, logits, prompt_and_step
from methods_under_test import METHODS, give_weight
from peft import PeftModel
from tiny_vlms import FAMILIES, TinyVLM
from transformers import StaticCache

from peft_pvm import DIPEConfig, PVMConfig
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9", "t2 i t8")
NAMES = ["wide", "__base__", "narrow", "narrow"]
BASE = "__base__"


@pytest.fixture
def model(tiny: TinyVLM) -> PeftModel:
    """Two adapters of different rank, layers and memory; the first is active."""
    model = METHODS["pvm"].attach(tiny.build(), "wide", layers_to_transform=[0, 2])
    narrow = PVMConfig(
        r=model.base_model.vlm.text_config.head_dim, layers_to_transform=[1], memory_visibility="sample"
    )
    model.add_adapter("narrow", narrow)
    give_weight(model)
    return model.eval()


def with_adapter(model: PeftModel, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What all rows get from one adapter, or from none."""
    if name == BASE:
        with model.disable_adapter():
            return logits(model, inputs)
    model.set_adapter(name)
    return logits(model, inputs)


def test_each_row_gets_its_own(tiny: TinyVLM, model: PeftModel):
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    by_name = {name: with_adapter(model, name, inputs) for name in NAMES}
    model.set_adapter("wide")
    mixed = logits(model, inputs, adapter_names=NAMES)
    real = inputs["attention_mask"].bool()
    for row, name in enumerate(NAMES):
        assert difference(mixed[row][real[row]], by_name[name][row][real[row]]) < TOLERANCE
    assert torch.equal(mixed[1][real[1]], by_name[BASE][1][real[1]])
    for row in (0, 3):  # and it matters which
        for other in {"wide", "narrow", BASE} - {NAMES[row]}:
            assert difference(mixed[row], with_adapter(model, other, inputs)[row]) > 100 * TOLERANCE
    model.set_adapter("wide")
    assert torch.equal(logits(model, inputs), by_name["wide"])  # nothing stays behind


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate(tiny: TinyVLM, model: PeftModel, options: dict):
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    mixed = model.generate(**inputs, **GENERATE, **options, adapter_names=NAMES).sequences
    answers = options.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        alone = model.generate(
            **tiny.inputs(model.get_base_model(), *ROWS), **GENERATE, **options, adapter_names=[name] * len(ROWS)
        ).sequences
        assert torch.equal(mixed[row * answers : (row + 1) * answers], alone[row * answers : (row + 1) * answers])


def test_one_name_for_all_is_that_adapter(tiny: TinyVLM, model: PeftModel):
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    for name in ("narrow", BASE):
        assert torch.equal(logits(model, inputs, adapter_names=[name] * len(ROWS)), with_adapter(model, name, inputs))


def test_other_threads_keep_their_own(tiny: TinyVLM, model: PeftModel):
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    model.set_adapter("wide")
    expected, found = logits(model, inputs), []
    with model.base_model._enable_peft_forward_hooks(adapter_names=NAMES):
        thread = threading.Thread(target=lambda: found.append(logits(model, inputs)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_modules_to_save_go_by_row_as_well(tiny: TinyVLM):
    model = METHODS["pvm"].attach(tiny.build(), "first", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().get_output_embeddings().modules_to_save["first"].weight.mul_(2)
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    names = ["first", BASE, BASE, "first"]
    mixed = logits(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        assert difference(mixed[row], with_adapter(model, name, inputs)[row]) < TOLERANCE


def test_which_row_an_image_belongs_to_is_not_known_in_the_projector():
    """Two images in one row and none in the other look like an image in each."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build(), "first", modules_to_save=["linear_2"])
    base = model.get_base_model()
    with torch.no_grad():
        base.model.multi_modal_projector.linear_2.modules_to_save["first"].weight.mul_(2)
    inputs = family.inputs(base, "t4 i t3 i t6", "t9")
    with pytest.raises(NotImplementedError, match="linear_2, which an adapter has trained along, reads images"):
        logits(model, inputs, adapter_names=["first", BASE])
    for name in ("first", BASE):
        assert torch.equal(logits(model, inputs, adapter_names=[name] * 2), with_adapter(model, name, inputs))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wide", "wrong", BASE, BASE], r"names \['wrong'\], but the model has the PVM adapters \['narrow', 'wide'\]"),
        (["wide", "narrow", BASE], "has 3 names, but the batch has 4 rows"),
        (["wide", "narrow"], "has 2 names, but the batch has 4 rows"),
        ([], "has 0 names, but the batch has 4 rows"),
    ],
)
def test_names_that_do_not_fit_are_refused(tiny: TinyVLM, model: PeftModel, names: list[str], message: str):
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    before = logits(model, inputs)
    with pytest.raises(ValueError, match=message):
        logits(model, inputs, adapter_names=names)
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("module", ["multi_modal_projector", "lm_head"])
def test_all_rows_may_have_the_same_copy_of_any_module(module: str):
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build(), "first", modules_to_save=[module])
    model.add_adapter("second", PVMConfig(r=16, modules_to_save=[module]))
    give_weight(model)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{module}.modules_to_save" in name:
                parameter.mul_(2 if "first" in name else 3)
    inputs = family.inputs(model.get_base_model(), *ROWS)
    for name in ("first", "second", BASE):
        expected = with_adapter(model, name, inputs)
        for active in ("first", "second"):
            model.set_adapter(active)
            assert difference(logits(model, inputs, adapter_names=[name] * len(ROWS)), expected) < TOLERANCE


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_too_few_names_are_not_spread(task_type: str | None):
    """PEFT's model for a task does not hand on the rows of a forward."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build(), "first", task_type=task_type).eval()
    inputs = family.inputs(model.get_base_model(), *ROWS)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="has 2 names, but the batch has 4 rows"):
            call(**inputs, adapter_names=["first", BASE])
    beams = model.generate(**inputs, adapter_names=["first", BASE] * 2, num_beams=2, max_new_tokens=2)
    assert len(beams) == len(ROWS)


def test_one_name_is_no_list(tiny: TinyVLM, model: PeftModel):
    with pytest.raises(TypeError, match="adapter_names is a list"):
        logits(model, tiny.inputs(model.get_base_model(), *ROWS), adapter_names="wide")


def test_modules_to_save_may_be_called_by_keywords_alone():
    family = FAMILIES["gemma3"]
    model = METHODS["pvm"].attach(family.build(), modules_to_save=["vision_tower"])
    inputs = family.inputs(model.get_base_model(), "t4 i t3")
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(family.build(), inputs))
    assert logits(model, inputs).isfinite().all()


def test_training_is_refused(tiny: TinyVLM, model: PeftModel):
    with pytest.raises(ValueError, match="only in inference"):
        logits(model.train(), tiny.inputs(model.get_base_model(), *ROWS), adapter_names=NAMES)


def test_compiled_forwards_do_not_ignore_names():
    """Where a forward may leave its graph it does; where it may not, it says so."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    base = model.get_base_model()
    prompt, step = prompt_and_step(family, base, "t4 i t9")

    def decode(run: torch.nn.Module) -> torch.Tensor:
        cache = StaticCache(config=base.config.get_text_config(), max_cache_len=64)
        logits(base, prompt, **{CACHE: cache}, use_cache=True)
        with model.base_model._enable_peft_forward_hooks(adapter_names=[BASE]):
            return logits(run, step, **{CACHE: cache}, use_cache=True)

    torch.compiler.reset()
    assert difference(decode(torch.compile(base, backend="eager")), decode(base)) < TOLERANCE
    torch.compiler.reset()
    with pytest.raises(Exception, match="adapter_names cannot choose adapters in a compiled forward"):
        decode(torch.compile(base, fullgraph=True, backend="eager"))


def test_methods_without_parameters_refuse(tiny: TinyVLM):
    model = METHODS["dipe"].attach(tiny.build())
    assert isinstance(model.peft_config["default"], DIPEConfig)
    with pytest.raises(NotImplementedError, match="acts on all rows of a batch alike"):
        logits(model, tiny.inputs(model.get_base_model(), *ROWS), adapter_names=["default"] * 4)
