"""Teaching a language model to read mosaics, in two stages, on one thread: the same seed gives the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from peft_pvm.demo.mosaic import NUM_CELLS, NUM_DIGITS, Batch, draw_pictures
from peft_pvm.demo.questions import COLOURS, Questions, Turn, augment
from peft_pvm.demo.train import Checkpoint, fit, learning_rate_factor, step_generator
from peft_pvm.utils.terminal import Bars

from .arithmetic import one_thread
from .language_model import LanguageModel
from .vlm import new_vlm


Seeing = Literal["words", "digits"]


@dataclass(frozen=True)
class RealRecipe:
    """How the real base is trained.

    Attributes:
        seeing: What is learned first, without the language model. "words": tower and projector learn to write each
            cell in the language model's own embeddings. "digits": the tower learns to tell digits, places and colours,
            as vision towers are trained before they meet a language model; the projector learns in the second stage.
        seeing_steps: Steps of this first stage.
        steps: Steps of the second stage: a LoRA on the language model's attention learns to answer.
        single_steps: The first of them, in which chats have one picture and one turn.
        rows: Rows of nine questions in each step of the second stage.
        max_text: The most tokens of text in a turn there, between image and question. Short texts are more likely.
        on_text: Whether text and questions count there like the answers, so that the language model keeps its text.
        seed: Decides initial weights and questions.
    """

    seeing: Seeing = "words"
    seeing_steps: int = 700
    steps: int = 480
    single_steps: int = 0
    rows: int = 8
    max_text: int = 64
    on_text: bool = False
    seed: int = 0


def lora_config() -> LoraConfig:
    """The LoRA of the second stage."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o)_proj")


def train_real_base(
    language_model: LanguageModel, recipe: RealRecipe, device: str = "cpu", checkpoint: Checkpoint | None = None
) -> PeftModel:
    """Train both stages.

    Args:
        language_model: What reads in the end. It stays as it is.
        recipe: How to train.
        device: Where. On a CPU, the same seed gives the same bits.
        checkpoint: Keeps the state of the second stage every 20 steps, so that an interrupted one goes on to the same
            weights. It is left for the caller to remove once these are saved.

    Returns:
        The base in bf16, in eval mode, with the LoRA beside it and not merged.
    """
    questions = Questions(language_model.tokenizer)
    vlm = new_vlm(language_model, recipe.seed).to(device)

    def draw(step: int) -> Batch:
        generator = step_generator(recipe.seed, step)
        if step < recipe.single_steps:
            turns = [draw_turn(1, NUM_CELLS, recipe.max_text, generator)]
        else:
            turns = draw_turns(recipe.max_text, generator)
        batch = questions.draw("train", recipe.rows, turns, generator, augmented=True, on_text=recipe.on_text)
        return batch.to(vlm.device)

    with one_thread():
        if recipe.seeing == "words":
            align(vlm, questions, recipe.seeing_steps, recipe.seed)
        else:
            tell_digits(vlm, recipe.seeing_steps, recipe.seed)
        round_parameters(vlm)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = get_peft_model(vlm, lora_config())
        vision = nn.ModuleList([vlm.model.vision_tower, vlm.model.multi_modal_projector])
        if recipe.seeing == "digits":
            vision.float()  # small steps would be lost in bf16
            vlm.model.multi_modal_projector.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        peak = 1e-3 if recipe.seeing == "words" else 5e-4
        groups = [{"params": trained, "lr": peak, "weight_decay": 0.0}]
        fit(model, groups, draw, recipe.steps, "Learning to answer", checkpoint)
        round_parameters(vision)
    return model


def draw_turns(max_text: int, generator: torch.Generator) -> list[Turn]:
    """Draw the shape of a chat to learn from: a third have one picture, a third several, a third several turns.

    Args:
        max_text: The most tokens of text in a turn; few are long. Every fourth text tells of other pictures.
        generator: Decides all.
    """

    kind, several = _below(3, generator), 2 + _below(2, generator)
    if kind == 0:
        return [draw_turn(1, NUM_CELLS, max_text, generator)]
    if kind == 1:
        return [draw_turn(several, NUM_CELLS, max_text, generator)]
    return [draw_turn(1, 3, max_text, generator) for _ in range(several)]


def draw_turn(shown: int, cells: int, max_text: int, generator: torch.Generator) -> Turn:
    """Draw the text of a turn with so many new pictures and cells asked for."""
    exponent = torch.empty(()).uniform_(0, math.log(max_text + 1), generator=generator)
    text_tokens = round(math.exp(float(exponent))) - 1
    return Turn(shown, text_tokens, cells, interfering=_below(4, generator) == 0)


def _below(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))


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
    cells = torch.arange(NUM_CELLS, device=vlm.device)
    colours = embeddings[questions.colours]
    energy = digits.square().mean()

    def loss(pictures: Labelled) -> torch.Tensor:
        colour = F.pad(colours, (0, 0, 0, 1))[pictures.colours][:, None]  # grey has no word
        features = image_features(vlm, pictures.pixel_values) - colour
        error = (features - candidates[cells, pictures.digits]).square().mean() / energy
        distances = (features[:, :, None] - candidates).square().mean(-1) / energy  # (pictures, 9, 10)
        return error + 0.3 * F.cross_entropy((-4 * distances).flatten(0, 1), pictures.digits.flatten())

    _see([*vlm.model.vision_tower.parameters(), *vlm.model.multi_modal_projector.parameters()], loss, steps, seed)


def tell_digits(vlm: LlavaForConditionalGeneration, steps: int, seed: int) -> None:
    """Train the tower so that a linear head reads from each patch its digit and place, and from all the colour.

    Args:
        vlm: The model, in fp32; its tower is trained in place. The head is thrown away.
        steps: Optimizer steps, of 24 mosaics each.
        seed: Decides the mosaics and the head.
    """
    tower = vlm.model.vision_tower
    parts = [NUM_DIGITS, NUM_CELLS, len(COLOURS) + 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(tower.config.hidden_size, sum(parts)).to(tower.device)

    def loss(pictures: Labelled) -> torch.Tensor:
        digits, places, colours = head(tower(pictures.pixel_values).last_hidden_state).split(parts, -1)
        where = torch.arange(NUM_CELLS, device=digits.device).repeat(len(digits))
        return (
            F.cross_entropy(digits.flatten(0, 1), pictures.digits.flatten())
            + F.cross_entropy(places.flatten(0, 1), where)
            + F.cross_entropy(colours.mean(1), pictures.colours)
        )

    _see([*tower.parameters(), *head.parameters()], loss, steps, seed)


@dataclass(frozen=True)
class Labelled:
    """Pictures to learn to see from.

    Attributes:
        pixel_values: `(pictures, 3, height, width)`, from -1 to 1.
        digits: `(pictures, 9)`.
        colours: `(pictures,)`, by their place in `COLOURS`; grey comes after them.
    """

    pixel_values: torch.Tensor
    digits: torch.Tensor
    colours: torch.Tensor


def _see(parameters: list[nn.Parameter], loss_of: Callable[[Labelled], torch.Tensor], steps: int, seed: int) -> None:
    """Train on augmented mosaics, half of them grey, half coloured."""
    peak = 2e-3
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    with Bars() as bar:
        for step in bar.track(range(steps), description="Learning to see"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_factor(step, steps) * peak
            generator = step_generator(seed, step)
            grey, several = draw_pictures("train", 12, 0, 1, generator), draw_pictures("train", 4, 0, 3, generator)
            digits = torch.cat([grey.digits[:, 0], several.digits.flatten(0, 1)])
            colours = torch.cat([torch.full((len(grey.digits),), len(COLOURS)), several.colours.flatten()])
            mosaics = augment(torch.cat([grey.mosaics, several.mosaics]), generator)
            device = parameters[0].device
            loss = loss_of(Labelled((mosaics * 2 - 1).to(device), digits.to(device), colours.to(device)))
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
