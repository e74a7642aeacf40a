"""What M3ID and VCD make of scores agrees, on every model, with an independent computation in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, core
from forwards import generate, in_double, logits, without_images
from peft import get_peft_model
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import M3IDConfig, VCDConfig
from peft_pvm.methods import METHODS
from peft_pvm.tuners.in_generate import Prompt
from peft_pvm.tuners.logits_method import LogitsMethod


pytestmark = pytest.mark.every_family
ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")
SINGLE = ("t4 i t3", "t7 i t5", "t9")  # generate repeats images, and not rows with several
VIDEOS = ("t4 v t3", "t2 v t6")  # without images, which the tiny GLM would take for frames
TOLERANCE = 2e-5
SAMPLED = torch.tensor(
    [token_id for token_id in range(300) if token_id != 2]
)  # neither special nor the end of a sequence


@dataclass(frozen=True)
class Formula:
    """What a method computes, written from the maths alone.

    Attributes:
        config: The settings under test: M3ID acts at every step.
        second: What the second run reads, from what the first one does.
        next: The log-probabilities of the next token, from the logits of both runs and how many tokens there are.
        wrong: Methods of the class, each replaced by what looks like it and is not.
    """

    config: LogitsMethod
    second: Callable[[LogitsMethod, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    next: Callable[[LogitsMethod, torch.Tensor, torch.Tensor, int], torch.Tensor]
    wrong: dict[str, tuple[str, Callable[..., Any]]]


# ---- M3ID


def m3id(config: M3IDConfig, with_image: torch.Tensor, without: torch.Tensor, t: int) -> torch.Tensor:
    p, q = with_image.softmax(-1), without.softmax(-1)
    if p.max() >= config.threshold:
        return p.log()
    gamma = math.exp(-config.rate * (t + 1))
    return torch.where(p > 0, p.log() + (1 - gamma) / gamma * (p.log() - q.log()), -math.inf)


M3ID = Formula(
    M3IDConfig(rate=0.3, threshold=1.0),
    lambda config, inputs: without_images(inputs),
    m3id,
    {
        "no threshold": (
            "scores",
            lambda self, logits, other, t: (
                logits + math.expm1(self.rate * (t + 1)) * (logits.log_softmax(-1) - other.log_softmax(-1))
            ),
        ),
        "t from 0": ("scores", lambda self, logits, other, t: RIGHT["m3id"](self, logits, other, t - 1)),
        "no exponential": (
            "scores",
            lambda self, logits, other, t: RIGHT["m3id"](
                self, logits, other, math.log1p(self.rate * (t + 1)) / self.rate - 1
            ),
        ),
        "the image stays": ("second_prompt", lambda self, prompt: dict(prompt.inputs)),
        "a hole where the image was": (
            "second_prompt",
            lambda self, prompt: {
                "input_ids": prompt.inputs["input_ids"].masked_fill(prompt.visual, 7),
                "attention_mask": prompt.inputs["attention_mask"],
            },
        ),
    },
)


# ---- VCD


def noised(config: VCDConfig, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Image by image, and step by step of the diffusion, which the authors' code counts from 0."""
    kept = 1.0
    for step in range(config.noise_steps + 1):
        kept *= 1 - ((0.5e-2 - 1e-5) / (1 + math.exp(6 - 12 * step / 999)) + 1e-5)

    def noisy(image: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(config.seed), device="cpu")
        return math.sqrt(kept) * image + math.sqrt(1 - kept) * noise

    def each(pixels: torch.Tensor) -> torch.Tensor:
        """Over images, and over the tiles or frames of one."""
        return torch.stack([each(image) if image.dim() > 3 else noisy(image) for image in pixels])

    changed = dict(inputs)
    for name in [name for name in inputs if "pixel_values" in name or name == "image_patches"]:
        modality = "video" if "video" in name else "image"
        grid = next((inputs[grid] for grid in inputs if grid in (f"{modality}_grid_thw", f"{modality}_grid_hw")), None)
        if grid is None:
            changed[name] = each(inputs[name])
        else:
            changed[name] = torch.cat([noisy(image) for image in inputs[name].split(grid.prod(-1).tolist())])
    return changed


def vcd(config: VCDConfig, clean: torch.Tensor, noisy: torch.Tensor, t: int) -> torch.Tensor:
    p, scores = clean.softmax(-1), clean + config.alpha * (clean - noisy)
    scores[p < config.beta * p.max()] = -math.inf
    return scores.log_softmax(-1)


def one_noise_for_all(self: VCDConfig, name: str, prompt: Prompt) -> torch.Tensor:
    return self._draw(*prompt.inputs[name].shape)


VCD = Formula(
    VCDConfig(alpha=0.7, beta=0.05, seed=3),
    noised,
    vcd,
    {
        "no cut": ("scores", lambda self, logits, other, t: (1 + self.alpha) * logits - self.alpha * other),
        "the cut after the contrast": (
            "scores",
            lambda self, logits, other, t: cut(self, (1 + self.alpha) * logits - self.alpha * other),
        ),
        "the noised image is added": (
            "scores",
            lambda self, logits, other, t: RIGHT["vcd"](self, logits, 2 * logits - other, t),
        ),
        "one noise for all images": ("_noise", one_noise_for_all),
        "a step less": ("_share_kept", lambda self: SHARE_KEPT(VCDConfig(noise_steps=self.noise_steps - 1))),
    },
)


def cut(config: VCDConfig, scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(config.beta), -math.inf)


WITH_VIDEO = [name for name, tiny in FAMILIES.items() if tiny.video is not None]
FORMULAS = {"m3id": M3ID, "vcd": VCD}
RIGHT = {"m3id": M3IDConfig.scores, "vcd": VCDConfig.scores}
SHARE_KEPT = VCDConfig._share_kept


def test_every_method_on_logits_has_a_formula():
    assert set(FORMULAS) == {row.config.method for row in METHODS if issubclass(row.config, LogitsMethod)}


# ---- what generate does


def normalised(scores: torch.Tensor) -> torch.Tensor:
    """Log-probabilities among the tokens that can be sampled, however the scores are shifted."""
    return scores.double()[..., SAMPLED[scores.shape[-1] > SAMPLED]].log_softmax(-1)


def with_answer(inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of a forward over a row's prompt and its answer."""
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer[None]], 1)}
    if "target_sizes" in inputs:  # MiniCPM-V 4.7, which would ask for the types of tokens
        whole["position_ids"] = torch.arange(whole["input_ids"].shape[1])[None]
    for name in whole:
        if name == "attention_mask" or name.endswith("token_type_ids"):
            new = torch.full((1, len(answer)), int("mm" not in name), dtype=whole[name].dtype)
            whole[name] = torch.cat([whole[name], new], 1)
    return whole


def expected(tiny: TinyVLM, base: torch.nn.Module, formula: Formula, row: str, answer: torch.Tensor) -> torch.Tensor:
    """The scores of each token of an answer to a row alone, `(steps, SAMPLED)`, from two forwards without a cache."""
    prompt = in_double(tiny.prompt(base, row))
    has_image = "i" in row.split() or "v" in row.split()
    runs = []
    for inputs in (prompt, formula.second(formula.config, prompt) if has_image else prompt):
        for module in base.modules():
            if "rope_deltas" in vars(module):
                module.rope_deltas = None
        runs.append(logits(base, with_answer(inputs, answer), use_cache=False)[0, -len(answer) - 1 : -1])
    steps = []
    for t, (first, second) in enumerate(zip(*runs)):
        steps.append(formula.next(formula.config, first, second, t) if has_image else first)
    return normalised(torch.stack(steps))


def deviation(
    tiny: TinyVLM, formula: Formula, rows: tuple[str, ...] = ROWS, **arguments: Any
) -> tuple[float, list[float]]:
    """How generate differs from the formula, over steps and rows; and by row, how the method changes the base."""
    base = tiny.build(dtype=torch.float64)
    base.config.get_text_config()._experts_implementation = "eager"  # the only one that takes float64
    model = get_peft_model(base, formula.config)
    result = generate(tiny, model, *rows, output_scores=True, **arguments)
    repeats = len(result.sequences) // len(rows)
    computed, plain = (normalised(torch.stack(steps, 1)) for steps in (result.scores, result.logits))
    differences, changes = [], []
    with model.disable_adapter():
        for number, answer in enumerate(result.sequences[:, -len(result.scores) :]):
            wanted = expected(tiny, base, formula, rows[number // repeats], answer)
            differences.append(distance(computed[number], wanted))
            changes.append(distance(computed[number], plain[number]))
    return max(differences), changes


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; of two infinities, none."""
    return torch.where(a == b, 0.0, a - b).abs().max().item()


@pytest.fixture(params=FORMULAS)
def formula(request) -> Formula:
    return FORMULAS[request.param]


def test_scores_agree(family: TinyVLM, formula: Formula):
    """In a batch that is padded on the left, on a cache: what each row gives alone, computed at once."""
    # In float64, the base itself gives NaN for padded rows of Gemma 2.
    batches = [(row,) for row in ROWS] if family is FAMILIES["paligemma2"] else [ROWS]
    changes = []
    for rows in batches:
        difference, by_row = deviation(family, formula, rows)
        assert difference < TOLERANCE
        changes += by_row
    assert min(changes[:2]) > 1e-3
    assert changes[2] == 0  # no image


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in core.ROWS])
def test_architecture(name: str, formula: Formula):
    row = ARCHITECTURES[name]
    reason = row.refusal(formula.config.method)
    if reason is None:
        difference, changes = deviation(row.tiny, formula, ROWS[:1], max_new_tokens=3, min_new_tokens=3)
        assert difference < TOLERANCE
        assert min(changes) > 1e-3
    else:
        with pytest.raises((ValueError, NotImplementedError), match=re.escape(reason)):
            get_peft_model(row.tiny.build(), formula.config)


def middle(tiny: TinyVLM) -> float:
    """A threshold below which the likeliest tokens are at about half of the steps, as far from each as can be."""
    model = get_peft_model(tiny.build(), M3IDConfig())
    with model.disable_adapter():
        likeliest = torch.stack(generate(tiny, model, *ROWS[:2]).logits).softmax(-1).amax(-1).flatten().sort().values
    half = likeliest[len(likeliest) // 4 : -(len(likeliest) // 4)]  # of them, the two that lie furthest apart
    wider = half.diff().argmax()
    return half[wider : wider + 2].mean().item()  # on one of them, rounding would decide


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_videos_are_images(name: str, formula: Formula):
    difference, changes = deviation(FAMILIES[name], formula, VIDEOS)
    assert difference < TOLERANCE
    assert min(changes) > 1e-3


def test_the_threshold(tiny: TinyVLM):
    """Where the model is sure, nothing changes."""
    formula = replace(M3ID, config=M3IDConfig(rate=0.3, threshold=middle(tiny)))
    assert deviation(tiny, formula)[0] < TOLERANCE
    assert deviation(tiny, replace(M3ID, config=M3IDConfig(rate=0.3, threshold=1e-3)))[1] == [0, 0, 0]


def test_sampled_rows_agree(tiny: TinyVLM, formula: Formula):
    """Several answers to each row."""
    difference, changes = deviation(tiny, formula, SINGLE, do_sample=True, top_k=0, num_return_sequences=3, seed=0)
    assert difference < TOLERANCE
    assert min(changes[:6]) > 1e-3
    assert changes[6:] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, formula in FORMULAS.items() for wrong in formula.wrong]
)
def test_what_is_wrong_is_noticed(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch):
    formula = FORMULAS[name]
    if wrong == "no threshold":  # with one that matters
        formula = replace(formula, config=M3IDConfig(rate=0.3, threshold=middle(FAMILIES["llava"])))
    attribute, replacement = formula.wrong[wrong]
    assert deviation(FAMILIES["llava"], formula)[0] < TOLERANCE
    monkeypatch.setattr(type(formula.config), attribute, replacement)
    assert deviation(FAMILIES["llava"], formula)[0] > 100 * TOLERANCE
