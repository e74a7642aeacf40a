"""Teaching a language model to read mosaics, in two stages, on one thread: the same seed gives the same bits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from peft_pvm.demo.mosaic import NUM_CELLS, Batch, draw_pictures
from peft_pvm.demo.train import fit, learning_rate_factor, step_generator
from peft_pvm.utils.terminal import progress_bar

from .language_model import LanguageModel
from .questions import Questions, Turn, augment
from .vlm import new_vlm


@dataclass(frozen=True)
class RealRecipe:
    """How the real base is trained.

    Attributes:
        alignment_steps: Steps of the first stage: vision tower and projector learn to write each cell in the language
            model's own embeddings.
        steps: Steps of the second stage: a LoRA on the language model's attention learns to answer.
        rows: Rows of nine questions in each step of the second stage.
        max_text: The most tokens of text between image and question there.
        seed: Decides initial weights and questions.
    """

    alignment_steps: int = 700
    steps: int = 480
    rows: int = 8
    max_text: int = 64
    seed: int = 0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, on which sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def lora_config() -> LoraConfig:
    """The LoRA of the second stage."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o)_proj")


def train_real_base(language_model: LanguageModel, recipe: RealRecipe) -> PeftModel:
    """Train both stages.

    Args:
        language_model: What reads in the end. It stays as it is.
        recipe: How to train.

    Returns:
        The base in bf16, in eval mode, with the LoRA beside it and not merged.
    """
    questions = Questions(language_model.tokenizer)
    vlm = new_vlm(language_model, recipe.seed)

    def draw(step: int) -> Batch:
        generator = step_generator(recipe.seed, step)
        turns = draw_turns(recipe.max_text, generator)
        return questions.draw("train", recipe.rows, turns, generator, augmented=True)

    with one_thread():
        align(vlm, questions, recipe.alignment_steps, recipe.seed)
        round_parameters(vlm)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = get_peft_model(vlm, lora_config())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "lr": 1e-3, "weight_decay": 0.0}]
        fit(model, groups, draw, recipe.steps, "Learning to answer")
    return model


def draw_turns(max_text: int, generator: torch.Generator) -> list[Turn]:
    """Draw the shape of a chat to learn from: a third have one picture, a third several, a third several turns.

    Args:
        max_text: The most tokens of text in a turn; few are long. Every fourth text tells of other pictures.
        generator: Decides all.
    """

    def below(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    def turn(shown: int, cells: int) -> Turn:
        exponent = torch.empty(()).uniform_(0, math.log(max_text + 1), generator=generator)
        return Turn(shown, round(math.exp(float(exponent))) - 1, cells, interfering=below(4) == 0)

    kind, several = below(3), 2 + below(2)
    if kind == 0:
        return [turn(1, NUM_CELLS)]
    if kind == 1:
        return [turn(several, NUM_CELLS)]
    return [turn(1, 3) for _ in range(several)]


def align(vlm: LlavaForConditionalGeneration, questions: Questions, steps: int, seed: int) -> None:
    """Train tower and projector to give, for each cell, the sum of its words: digit, row, column, colour.

    The words are the language model's own embeddings. Half of the mosaics are grey, and have no word for it.

    The language model does not run. Beside the squared error, a cross-entropy over the ten digits keeps the embeddings
    of like digits apart.

    Args:
        vlm: The model, in fp32; its tower and projector are trained in place.
        questions: The task.
        steps: Optimizer steps, of 24 mosaics each.
        seed: Decides the mosaics.
    """
    embeddings = vlm.get_input_embeddings().weight.detach()
    digits, places = embeddings[questions.digits], embeddings[questions.places].sum(1)
    candidates = places[:, None] + digits  # (9, 10, hidden_size), grey
    colours = embeddings[questions.colours]
    energy = digits.square().mean()
    parameters = [*vlm.model.vision_tower.parameters(), *vlm.model.multi_modal_projector.parameters()]
    peak = 2e-3
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    with progress_bar() as bar:
        for step in bar.track(range(steps), description="Learning to see"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_factor(step, steps) * peak
            generator = step_generator(seed, step)
            grey, several = draw_pictures("train", 12, 0, 1, generator), draw_pictures("train", 4, 0, 3, generator)
            shown = torch.cat([grey.digits[:, 0], several.digits.flatten(0, 1)])
            colour = F.pad(colours[several.colours.flatten()], (0, 0, len(grey.digits), 0))[:, None]
            mosaics = augment(torch.cat([grey.mosaics, several.mosaics]), generator)
            features = image_features(vlm, mosaics * 2 - 1) - colour
            error = (features - candidates[torch.arange(NUM_CELLS), shown]).square().mean() / energy
            distances = (features[:, :, None] - candidates).square().mean(-1) / energy  # (rows, 9, 10)
            loss = error + 0.3 * F.cross_entropy((-4 * distances).flatten(0, 1), shown.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()


def image_features(vlm: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the projector makes of images, `(images, 9, hidden_size)`."""
    return torch.stack(list(vlm.get_image_features(pixel_values).pooler_output))


def round_parameters(model: nn.Module) -> None:
    """Round all parameters to bf16. `model.bfloat16()` would also round the frequencies of rotary embeddings."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
