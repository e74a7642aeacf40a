"""A method on logits is one class, and an adapter like any other; it acts in generate alone, whatever else goes on."""

from __future__ import annotations

import copy
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from environment import on_a_cpu
from forwards import GENERATE, TOLERANCE, difference, generate, logits
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_model_status, get_peft_model
from safetensors import safe_open
from test_turns import TURNS, Conversation
from tiny_vlms import FAMILIES, IMAGE, TinyVLM
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from peft_pvm import DIPEConfig, M3IDConfig, VCDConfig, attached
from peft_pvm.tuners.in_generate import Prompt
from peft_pvm.tuners.logits_method import LogitsMethod, logits_tuner
from peft_pvm.tuners.registry import register
from peft_pvm.utils.packages import CACHE


SHIPPED = Path(__file__).parents[2] / "adapters"
ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")
CONFIGS: dict[str, LogitsMethod] = {"m3id": M3IDConfig(rate=0.3, threshold=1.0), "vcd": VCDConfig(beta=0.01)}


@pytest.fixture(params=CONFIGS)
def config(request) -> LogitsMethod:
    return copy.copy(CONFIGS[request.param])


@pytest.fixture
def llava() -> TinyVLM:
    return FAMILIES["llava"]


def scores(tiny: TinyVLM, model: PeftModel, *rows: str, **arguments: Any) -> torch.Tensor:
    """`(batch, steps, vocab_size)`, with infinities as large numbers."""
    result = generate(tiny, model, *(rows or ROWS), output_scores=True, **arguments)
    return torch.stack(result.scores, 1).nan_to_num(neginf=-1e4)


@dataclass
class SecondReadingConfig(LogitsMethod):
    """Adds the logits of the same prompt again (arXiv 2401.01234)."""

    method: ClassVar[str] = "secondreading"

    def second_prompt(self, prompt: Prompt) -> dict[str, Any]:
        return dict(prompt.inputs)

    def scores(self, logits: torch.Tensor, other: torch.Tensor, num_generated: int) -> torch.Tensor:
        return logits + other


register(SecondReadingConfig)


def test_the_second_run_is_that_of_its_prompt(family: TinyVLM):
    """A second run of the same prompt gives the same logits, at each step."""
    model = get_peft_model(family.build(), SecondReadingConfig())
    assert (SecondReadingConfig.title, SecondReadingConfig.paper) == ("SecondReading", "2401.01234")
    result = generate(family, model, *ROWS, output_scores=True, suppress_tokens=None, min_new_tokens=None)
    for step, (made, read) in enumerate(zip(result.scores, result.logits)):
        assert difference(made[:2], 2 * read[:2]) < 2 * TOLERANCE, step
        assert torch.equal(made[2], read[2])


# ---- an adapter like any other


def test_off_and_gone_are_the_base(tiny: TinyVLM, config: LogitsMethod):
    base = tiny.build()
    before = dict(vars(base))
    expected = generate(tiny, get_peft_model(tiny.build(), LoraConfig(target_modules=["q_proj"])), *ROWS)
    inputs = tiny.inputs(base, *ROWS)
    forward = logits(base, inputs)
    model = get_peft_model(base, config)
    assert torch.equal(logits(model, inputs), forward), "a plain forward is that of the base"
    assert difference(scores(tiny, model)[:2], torch.stack(expected.logits, 1)[:2]) > 1e-3
    with model.disable_adapter():
        off = generate(tiny, model, *ROWS)
    assert torch.equal(torch.stack(off.logits), torch.stack(expected.logits))
    assert torch.equal(off.sequences, expected.sequences)
    assert model.unload() is base
    assert vars(base).keys() == before.keys()
    with attached(base, config):
        assert vars(base).keys() != before.keys()
    assert vars(base).keys() == before.keys()
    assert all(not hooks for name, hooks in vars(base).items() if "hooks" in name)


def test_saving_and_loading(llava: TinyVLM, config: LogitsMethod, tmp_path: Path):
    model = get_peft_model(llava.build(), config)
    expected = scores(llava, model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert list(file.keys()) == []
        assert file.metadata() == {"format": "pt", "method": config.method, "version": "1"}
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["peft-pvm", config.method]
    again = PeftModel.from_pretrained(llava.build(), tmp_path)
    assert torch.equal(scores(llava, again), expected)
    assert get_model_status(again).total_params == get_model_status(model).total_params
    loaded = llava.build()
    loaded.load_adapter(tmp_path)
    result = loaded.generate(**llava.prompt(loaded, *ROWS), **GENERATE, do_sample=False, output_scores=True)
    assert torch.equal(torch.stack(result.scores, 1).nan_to_num(neginf=-1e4), expected)


@pytest.mark.parametrize("cls", [M3IDConfig, VCDConfig])
def test_shipped_adapters(llava: TinyVLM, cls: type[LogitsMethod], tmp_path: Path):
    """They hold the default settings, as saving writes them."""
    shipped = SHIPPED / cls.method
    loaded = PeftModel.from_pretrained(llava.build(), shipped)
    assert torch.equal(scores(llava, loaded), scores(llava, get_peft_model(llava.build(), cls())))
    cls(inference_mode=True).save_pretrained(tmp_path)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (shipped, tmp_path)]
    assert {**configs[0], "peft_version": ""} == {**configs[1], "peft_version": ""}
    headers = []
    for folder in (shipped, tmp_path):
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            headers.append((list(file.keys()), file.metadata()))
    assert headers[0] == headers[1]
    card = ModelCard.load(shipped / "README.md")
    assert card.data.library_name == "peft"
    assert "import peft_pvm" in card.text


def test_switching(llava: TinyVLM):
    model = get_peft_model(llava.build(), CONFIGS["m3id"], "one")
    model.add_adapter("two", M3IDConfig(rate=1.0, threshold=1.0))
    one = scores(llava, model)
    model.set_adapter("two")
    assert difference(scores(llava, model)[:2], one[:2]) > 1e-3
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(scores(llava, model), one)


def test_a_deepcopied_model_is_its_own(llava: TinyVLM, config: LogitsMethod):
    model = get_peft_model(llava.build(), config)
    on = scores(llava, model)
    twin = copy.deepcopy(model)
    model.unload()
    assert torch.equal(scores(llava, twin), on)


def test_the_tuner_is_made_of_the_class(config: LogitsMethod):
    tuner = type(config).tuner()
    assert tuner is logits_tuner(type(config))
    assert tuner.__name__ == type(config).__name__.replace("Config", "Model")
    assert tuner.child_name == config.method


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (M3IDConfig, {"rate": -0.1}),
        (M3IDConfig, {"threshold": 0}),
        (VCDConfig, {"alpha": -1}),
        (VCDConfig, {"beta": 0}),
        (VCDConfig, {"beta": 1.5}),
        (VCDConfig, {"noise_steps": -1}),
        (VCDConfig, {"noise_steps": 1000}),
        (VCDConfig, {"noise_steps": 0.5}),
        (VCDConfig, {"seed": -1}),
    ],
)
def test_wrong_fields_are_refused(cls: type[PeftConfig], fields: dict):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.{name} is .*, but must be"):
        cls(**fields)


# ---- whatever generate does


def test_rows_are_what_they_are_alone(family: TinyVLM, config: LogitsMethod):
    model = get_peft_model(family.build(), config)
    together = generate(family, model, *ROWS, output_scores=True)
    for number, row in enumerate(ROWS):
        alone = generate(family, model, row, output_scores=True)
        for one, other in zip(together.scores, alone.scores):
            finite = other[0].isfinite() & one[number].isfinite()
            assert difference(one[number][finite], other[0][finite]) < 10 * TOLERANCE


@pytest.mark.parametrize(
    "arguments",
    [
        dict(use_cache=False),
        pytest.param(dict(cache_implementation="static"), marks=on_a_cpu),
        dict(max_new_tokens=None, max_length=60),
    ],
    ids=["no cache", "static cache", "max_length"],
)
def test_other_settings_change_nothing(tiny: TinyVLM, config: LogitsMethod, arguments: dict):
    model = get_peft_model(tiny.build(), config)
    expected = scores(tiny, model, *ROWS[:2])
    assert difference(scores(tiny, model, *ROWS[:2], **arguments)[:, :5], expected) < 10 * TOLERANCE


def test_padding_is_found_by_generate(llava: TinyVLM, config: LogitsMethod):
    """Without an attention mask."""
    model = get_peft_model(llava.build(), config)
    prompt = llava.prompt(model.get_base_model(), *ROWS)
    del prompt["attention_mask"]
    settings = {**GENERATE, "do_sample": True, "num_return_sequences": 2, "output_scores": True, "top_k": 0}
    torch.manual_seed(0)
    found = torch.stack(model.generate(**prompt, **settings).scores, 1).nan_to_num(neginf=-1e4)
    assert torch.equal(found, scores(llava, model, do_sample=True, num_return_sequences=2, top_k=0, seed=0))


def test_no_placeholder_is_left_for_the_second_run(tiny: TinyVLM):
    """Not even in its padding: an adapter would warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "This prompt has placeholder tokens")
        generate(tiny, get_peft_model(tiny.build(), M3IDConfig()), *ROWS)


def test_stop_strings(llava: TinyVLM, config: LogitsMethod, tokenizer: PreTrainedTokenizerFast):
    """Which need a tokenizer in the first run, and nothing in the second."""
    model = get_peft_model(llava.build(), config)
    stopping = dict(stop_strings=["never said"], tokenizer=tokenizer)
    assert torch.equal(scores(llava, model, **stopping), scores(llava, model))


def test_sampling_goes_by_the_seed(tiny: TinyVLM, config: LogitsMethod):
    """And a second run draws nothing: a method that changes nothing leaves the tokens as they are."""
    model = get_peft_model(tiny.build(), config)
    sampled = [generate(tiny, model, *ROWS, do_sample=True, seed=seed).sequences for seed in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    idle = get_peft_model(tiny.build(), M3IDConfig(rate=0))
    with_idle = generate(tiny, idle, *ROWS, do_sample=True, seed=0).sequences
    with idle.disable_adapter():
        assert torch.equal(generate(tiny, idle, *ROWS, do_sample=True, seed=0).sequences, with_idle)


class Recording(torch.nn.Module):
    """A model whose `generate` keeps all scores."""

    def __init__(self, model: PeftModel):
        super().__init__()
        self.model, self.scores = model, []

    def get_base_model(self) -> torch.nn.Module:
        return self.model.get_base_model()

    def generate(self, **arguments: Any) -> Any:
        answer = self.model.generate(**arguments, output_scores=True)
        self.scores += answer.scores
        return answer

    def forward(self, **inputs: Any) -> Any:
        with self.model.disable_adapter():
            return self.model(**inputs)


def test_several_turns(family: TinyVLM):
    """Each answer on one cache is what whole forwards over the conversation say, with the images and without."""
    base = family.build(dtype=torch.float64)
    base.config.get_text_config()._experts_implementation = "eager"  # the only one that takes float64
    config = M3IDConfig(rate=0.3, threshold=1.0)
    recording = Recording(get_peft_model(base, config))
    conversation = Conversation(family, recording)
    for text, cache_name in TURNS.items():
        conversation.take_turn(text, cache_name)
    with_images = conversation.computed_at_once().log_softmax(-1)
    is_text = conversation.input_ids[0] != IMAGE
    inputs = {"input_ids": conversation.input_ids[:, is_text]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if family.is_prefix_lm:
        inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    for module in base.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
    places = is_text.cumsum(0)[conversation.answered_at] - 1
    without = logits(recording, inputs, use_cache=False)[0, places].log_softmax(-1)
    t = torch.arange(len(places)) % GENERATE["max_new_tokens"] + 1
    expected = with_images + torch.expm1(0.3 * t)[:, None] * (with_images - without)
    made = torch.cat(recording.scores).double()
    wanted = expected.masked_fill(made.isinf(), -math.inf).log_softmax(-1)
    finite = made.isfinite()
    assert difference(made.log_softmax(-1)[finite], wanted[finite]) < 2e-5


def turns(tiny: TinyVLM, model: PeftModel, *texts: str) -> list[Any]:
    """What generate returns for each turn, whose text comes after all that was said."""
    said, results, cache = {}, [], None
    for text in texts:
        prompt = tiny.prompt(model.get_base_model(), text)
        if results:
            prompt["input_ids"] = torch.cat([results[-1].sequences, prompt["input_ids"]], 1)
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        said = {**GENERATE, **prompt, CACHE: cache, "do_sample": False, "output_scores": True}
        results.append(model.generate(**said))
        cache = results[-1][CACHE]
    del said[CACHE]
    return [*results, model.generate(**said)]


def test_an_image_in_a_later_turn(llava: TinyVLM, config: LogitsMethod):
    *_, on_the_cache, anew = turns(llava, get_peft_model(llava.build(), config), "t5", "t3 i t4")
    for one, other in zip(on_the_cache.scores, anew.scores):
        finite = one.isfinite() & other.isfinite()
        assert difference(one[finite], other[finite]) < 10 * TOLERANCE


def test_a_conversation_of_another_goes_on(config: LogitsMethod):
    """What Qwen's models keep on a module is the first run's after each call."""
    tiny = FAMILIES["qwen3_vl"]
    model = get_peft_model(tiny.build(), config)
    generate(tiny, model, *ROWS[:2])
    on = model.get_base_model().model.rope_deltas
    with model.disable_adapter():
        generate(tiny, model, *ROWS[:2])
    assert torch.equal(model.get_base_model().model.rope_deltas, on)
    assert (on < 0).any()


def test_beside_another_adapter(llava: TinyVLM, config: LogitsMethod):
    """Which acts in both runs."""
    base = llava.build()
    with attached(base, DIPEConfig(max_distance=0)):
        dipe = scores(llava, _Bare(base))
    with attached(base, DIPEConfig(max_distance=0), config):
        both = scores(llava, _Bare(base))
    with attached(base, config, DIPEConfig(max_distance=0)):
        assert torch.equal(scores(llava, _Bare(base)), both)
    with attached(base, config):
        alone = scores(llava, _Bare(base))
    assert min(difference(both[:2], other[:2]) for other in (dipe, alone)) > 1e-3


class _Bare:
    def __init__(self, base: torch.nn.Module):
        self.base, self.generate = base, base.generate

    def get_base_model(self) -> torch.nn.Module:
        return self.base


def test_other_processors_come_after(llava: TinyVLM, config: LogitsMethod):
    seen = []

    class Seeing(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores.nan_to_num(neginf=-1e4))
            return scores

    model = get_peft_model(llava.build(), config)
    made = scores(llava, model, logits_processor=LogitsProcessorList([Seeing()]))
    assert torch.equal(torch.stack(seen, 1), made)


def test_two_threads(llava: TinyVLM, config: LogitsMethod):
    model = get_peft_model(llava.build(), config)
    alone = [scores(llava, model, row) for row in ROWS]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda row: scores(llava, model, row), ROWS))
    assert all(map(torch.equal, together, alone))


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (dict(num_beams=2), "which beam_search does not do"),
        (dict(num_beams=2, do_sample=True), "which beam_sample does not do"),
        (dict(prompt_lookup_num_tokens=2), "which assisted_generation does not do"),
    ],
)
def test_other_ways_to_decode(tiny: TinyVLM, config: LogitsMethod, arguments: dict, complaint: str):
    model = get_peft_model(tiny.build(), config)
    with pytest.raises(NotImplementedError, match=complaint):
        generate(tiny, model, ROWS[0], **arguments)
    with pytest.raises(NotImplementedError, match="which assisted_generation does not do"):
        generate(tiny, model, ROWS[0], assistant_model=tiny.build())
    with model.disable_adapter():
        generate(tiny, model, ROWS[0], **arguments)


def test_a_loop_that_goes_back(llava: TinyVLM, config: LogitsMethod):
    def twice(model: Any, input_ids: torch.Tensor, logits_processor: Any, generation_config: Any, **inputs: Any):
        for _ in range(2):
            logits_processor(input_ids, torch.zeros(1, 320))

    with pytest.raises(NotImplementedError, match="goes back"):
        generate(llava, get_peft_model(llava.build(), config), ROWS[0], custom_generate=twice)


def test_a_generate_that_makes_no_processors(llava: TinyVLM, config: LogitsMethod, monkeypatch: pytest.MonkeyPatch):
    model = get_peft_model(llava.build(), config)
    monkeypatch.setattr(type(model.get_base_model()), "generate", lambda self, **kwargs: None)
    with pytest.raises(NotImplementedError, match="did not go token by token"):
        generate(llava, model, ROWS[0])


def test_positional_arguments(llava: TinyVLM, config: LogitsMethod):
    base = get_peft_model(llava.build(), config).get_base_model()
    prompt = llava.prompt(base, *ROWS)
    expected = base.generate(**prompt, **GENERATE, do_sample=False, output_scores=True)
    positional = base.generate(prompt.pop("input_ids"), GenerationConfig(**GENERATE, output_scores=True), **prompt)
    assert all(map(torch.equal, positional.scores, expected.scores))


def test_two_at_once(llava: TinyVLM):
    model = llava.build()
    with attached(model, CONFIGS["m3id"], CONFIGS["vcd"]):
        with pytest.raises(NotImplementedError, match="'m3id' and 'vcd' are active and both run the model"):
            scores(llava, _Bare(model))
        assert torch.isfinite(logits(model, llava.inputs(model, ROWS[0]))).all()


def test_embeddings_instead_of_tokens(llava: TinyVLM, config: LogitsMethod):
    model = get_peft_model(llava.build(), config)
    embeds = model.get_base_model().get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    mask = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="needs the tokens of the prompt"):
        model.generate(inputs_embeds=embeds, visual_mask=mask, **GENERATE)


def test_the_new_tokens_alone(llava: TinyVLM, config: LogitsMethod):
    model = get_peft_model(llava.build(), config)
    first = generate(llava, model, "t5")
    new = {"input_ids": torch.tensor([[11, 12, 13]]), CACHE: first[CACHE]}
    with pytest.raises(NotImplementedError, match="Give it all input_ids"):
        model.generate(**new, attention_mask=torch.ones(1, first.sequences.shape[1] + 3), **GENERATE)


def test_generate_batch(llava: TinyVLM, config: LogitsMethod):
    model = get_peft_model(llava.build(), config)
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.get_base_model().generate_batch([[5, 6, 7]])


def test_a_model_without_generate(llava: TinyVLM, config: LogitsMethod):
    with pytest.raises(ValueError, match="LlavaModel has no generate"):
        get_peft_model(llava.build().model, config)


def test_m3id_needs_text(llava: TinyVLM):
    with pytest.raises(ValueError, match="has nothing else"):
        generate(llava, get_peft_model(llava.build(), M3IDConfig()), "i", "t5")


def test_vcd_needs_all_pixels(llava: TinyVLM):
    model = get_peft_model(llava.build(), CONFIGS["vcd"])
    with pytest.raises(NotImplementedError, match="holds images of an earlier turn"):
        turns(llava, model, "t5 i t4", "t3")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3_vl", {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}),
        ("llava", {"pixel_values": torch.randn(1, 3, 28, 56)}),
    ],
)
def test_vcd_tells_images_apart(name: str, change: dict):
    tiny = FAMILIES[name]
    base = tiny.build()
    prompt = {**tiny.prompt(base, "t5 i t4", "i t3"), **change}
    vlm = get_peft_model(base, CONFIGS["vcd"]).base_model.vlm
    visual = prompt["input_ids"] == IMAGE
    with pytest.raises(NotImplementedError, match="does not say which part is which image"):
        CONFIGS["vcd"].second_prompt(Prompt(vlm, prompt, visual, 0))


def test_vcd_with_images_padded_to_one_size():
    tiny = FAMILIES["mistral3"]
    base = tiny.build()
    prompt = tiny.prompt(base, "t5 i t4", "i t3")
    vlm = get_peft_model(base, CONFIGS["vcd"]).base_model.vlm
    visual = prompt["input_ids"] == IMAGE
    assert "pixel_values" in CONFIGS["vcd"].second_prompt(Prompt(vlm, prompt, visual, 0))
    for extra in ({"image_sizes": [[28, 28], [28, 14]]}, {"pixel_attention_mask": torch.ones(2, 28, 28).tril()}):
        with pytest.raises(NotImplementedError, match="are of several sizes and padded to one"):
            CONFIGS["vcd"].second_prompt(Prompt(vlm, {**prompt, **extra}, visual, 0))


def test_vcd_with_features_instead_of_pixels(llava: TinyVLM):
    base = llava.build()
    prompt = llava.prompt(base, "t5 i t4")
    prompt["image_hidden_states"] = prompt.pop("pixel_values")
    vlm = get_peft_model(base, CONFIGS["vcd"]).base_model.vlm
    with pytest.raises(NotImplementedError, match="brings features in another form"):
        CONFIGS["vcd"].second_prompt(Prompt(vlm, prompt, prompt["input_ids"] == IMAGE, 0))
