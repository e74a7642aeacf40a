"""Testing on the mosaic task: how many digits a model still answers right after ever more text, and the demo."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from rich.table import Table
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, StoppingCriteriaList

from ..methods import METHODS, DIPEConfig, PVMConfig
from ..tuners.active import attached
from ..tuners.loading import load_adapters
from ..tuners.names import separate
from ..utils.terminal import Bars, Terminal
from .mosaic import (
    FIRST_QUERY,
    IMAGE_LENGTH,
    NUM_CELLS,
    Split,
    make_questions,
    make_transcriptions,
)
from .questions import Questions, Turn
from .tiny_vlm import TRAINED_DISTANCE, load_tiny_vlm
from .train import Recipe, step_generator, target_logits, train_adapter


TOKENS_PER_FORWARD = 4096
LENGTHS = (0, 64, 128, 256, 512, 1024, 2048)  # bytes of text
LENGTHS_IN_TOKENS = (0, 256, 1024, 2048, 4096)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over rows of questions.

    Attributes:
        right: The number of right answers in each row.
        asked: The number of questions in each row.
    """

    right: tuple[int, ...]
    asked: int

    @property
    def value(self) -> float:
        """The accuracy, from 0 to 1."""
        return sum(self.right) / (self.asked * len(self.right))

    @property
    def standard_error(self) -> float:
        """The standard error of `value`. Rows are the independent draws: each has one mosaic and one text."""
        if len(self.right) == 1:
            return math.nan
        shares = [right / self.asked for right in self.right]
        variance = sum((share - self.value) ** 2 for share in shares) / (len(shares) - 1)
        return math.sqrt(variance / len(shares))


@torch.no_grad()
def recall(
    model: nn.Module,
    distractor_length: int,
    rows: int = 32,
    images: int = 1,
    split: Split = "test",
    seed: int = 0,
    description: str = "Testing",
) -> Accuracy:
    """Ask for all nine cells after a distractor, on digits and text that no training saw.

    An answer counts if it has the highest logit of the whole vocabulary.

    Args:
        model: The tiny model, with or without an adapter, in eval mode.
        distractor_length: Bytes of text between the mosaics and the first question.
        rows: Rows of mosaics, text and nine questions.
        images: Mosaics a row, 1 to 3.
        split: Where digits and text come from.
        seed: Decides them: two models tested with the same one are asked the same.
        description: What the progress bar says.

    Raises:
        ValueError: A number out of its range.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}, but must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(64, TOKENS_PER_FORWARD // (images * IMAGE_LENGTH + distractor_length + 2 * NUM_CELLS)))
    right: list[int] = []
    with Bars() as bar:
        for start in bar.track(range(0, rows, at_once), description=f"{description}, {distractor_length} bytes"):
            batch = make_questions(split, min(at_once, rows - start), distractor_length, NUM_CELLS, generator, images)
            right += (target_logits(model, batch).argmax(-1) == batch.targets).sum(1).tolist()
    return Accuracy(tuple(right), NUM_CELLS)


@torch.no_grad()
def look_up(
    model: nn.Module,
    questions: Questions,
    text_tokens: int,
    rows: int = 16,
    split: Split = "test",
    seed: int = 0,
    description: str = "Testing",
) -> Accuracy:
    """Ask the lab's real base, in natural language, for all nine cells after some text.

    Args:
        model: The lab's real base, with or without adapters, in eval mode.
        questions: The task as the base writes it.
        text_tokens: Tokens of text between the mosaic and the question.
        rows: Rows of a mosaic, text and a question about nine cells.
        split: Where digits and text come from.
        seed: Decides them: two models tested with the same one are asked the same.
        description: What the progress bar says.

    Raises:
        ValueError: There is not so much text in the split.
    """
    right = []
    with Bars() as bar:
        for row in bar.track(range(rows), description=f"{description}, {text_tokens} tokens"):
            drawn = questions.draw(split, 1, [Turn(text_tokens=text_tokens)], step_generator(seed, row))
            batch = questions.only_digits(drawn)
            right.append(int((target_logits(model, batch).argmax(-1) == batch.targets).sum()))
    return Accuracy(tuple(right), NUM_CELLS)


@torch.no_grad()
def transcription(
    model: GenerationMixin,
    written_cells: int,
    rows: int = 32,
    split: Split = "test",
    seed: int = 0,
    description: str = "Writing",
) -> list[Accuracy]:
    """Test a model that writes out its mosaic over and over, while the image is never repeated.

    The model is given the first query and generates the rest greedily, so that what it once wrote wrong stays in its
    context. A round of 18 tokens has room for nine cells. A cell counts if its query appears in the round, followed by
    the right digit, even out of turn: a model that loses count can still look.

    Args:
        model: The tiny model, with or without an adapter, in eval mode.
        written_cells: How many cells it writes: whole rounds of nine.
        rows: Mosaics, all written at once.
        split: Where digits come from.
        seed: Decides them.
        description: What the progress bar says.

    Returns:
        The accuracy of each round, in order.

    Raises:
        ValueError: A number out of its range.
    """
    if written_cells < 1 or written_cells % NUM_CELLS:
        raise ValueError(f"written_cells is {written_cells}, but must be a positive multiple of {NUM_CELLS}.")
    batch = make_transcriptions(split, rows, 0, written_cells, torch.Generator().manual_seed(seed))
    inputs = dict(batch.inputs)
    first = int(inputs.pop("logits_to_keep")[0])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = inputs[name][:, : first + 1]
    length = 2 * written_cells  # one token more than the cells have: a cell may be shifted
    with Bars() as bar:
        task = bar.add_task(f"{description} {written_cells} cells", total=length)

        def count(*_: Any, **__: Any) -> torch.Tensor:
            bar.advance(task)
            return torch.zeros(rows, dtype=torch.bool)

        written = model.generate(
            **inputs, max_new_tokens=length, do_sample=False, stopping_criteria=StoppingCriteriaList([count])
        )[:, first:]
    told = torch.cat([inputs["input_ids"][:, -1:], batch.targets], 1)[:, : 2 * NUM_CELLS]
    digits = torch.empty(rows, NUM_CELLS, dtype=torch.long).scatter_(1, told[:, ::2] - FIRST_QUERY, told[:, 1::2])
    cells = written - FIRST_QUERY
    is_query = (cells >= 0) & (cells < NUM_CELLS)
    right = is_query[:, :-1] & (written[:, 1:] == digits.gather(1, cells.clamp(0, NUM_CELLS - 1))[:, :-1])
    rounds = right.unflatten(1, (-1, 2 * NUM_CELLS)).sum(2)
    return [Accuracy(tuple(column), NUM_CELLS) for column in rounds.T.tolist()]


def run_demo(out: str | os.PathLike | None = None, steps: int = 1000, rows: int = 16, seed: int = 0) -> None:
    """Train a PVM adapter on the shipped tiny model, save it, load it back; print accuracy by distractor length.

    Beside the base and PVM it tests the methods that need no training, with their default settings; DIPE is limited to
    the distance that the tiny model was trained with.

    Args:
        out: Folder for the adapter; by default a temporary one, which is deleted at the end.
        steps: Steps of the adapter's training.
        rows: Rows of nine questions for every length, the same in every column.
        seed: Decides initialisation, training questions and test questions.
    """
    if out is not None:
        return _run(os.fspath(out), steps, rows, seed)
    with tempfile.TemporaryDirectory() as folder:
        return _run(folder, steps, rows, seed)


def _run(folder: str, steps: int, rows: int, seed: int) -> None:
    start = time.perf_counter()
    console = Terminal()
    recipe = Recipe(steps=steps // 5, hidden_steps=steps - steps // 5, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64, layers_to_transform="strided"))
    trained, total = model.get_nb_trainable_parameters()
    layers = model.peft_config["default"].layers_to_transform
    console.print(f"PVM at layers {layers} of 6: training {trained:,} of {total:,} parameters; the base is frozen.")
    console.print(f"{recipe}.")
    train_adapter(model, recipe)
    model.save_pretrained(folder)
    size = os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
    training_seconds = time.perf_counter() - start
    console.print(
        f"Trained in {training_seconds:.0f} s. Saved to {folder}: {size / 1e6:.2f} MB, loaded back from there."
    )

    pvm_model, model = PeftModel.from_pretrained(load_tiny_vlm(), folder).eval(), load_tiny_vlm()
    steering = [
        method
        for method in METHODS
        if method.acts_in_forwards and not method.needs_training and not method.of_the_model
    ]
    results: dict[str, dict[int, Accuracy]] = {}
    for name, tested, configs in (
        ("base", model, []),
        ("PVM", pvm_model, []),
        *((method.name, model, [suited(method.config)]) for method in steering),
    ):
        with attached(tested, *configs):
            results[name] = {length: recall(tested, length, rows, seed=seed, description=name) for length in LENGTHS}
    console.print(accuracy_table(results))
    seconds = time.perf_counter() - start
    console.print(
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, {seconds:.0f} s."
    )


def suited(config: type[PeftConfig]) -> PeftConfig:
    """A method's default settings, but for what depends on the model: from how far it has learned to read."""
    return DIPEConfig(max_distance=TRAINED_DISTANCE) if config is DIPEConfig else config()


def load_models(adapters: Sequence[str | os.PathLike], base: str | os.PathLike | None = None) -> dict[str, nn.Module]:
    """A base of the lab without adapters, and with each of some.

    Args:
        adapters: Folders or Hub ids, or several with `+` between, which act together.
        base: Folder of a tiny model that was trained further, or of the real base; `None`: the shipped tiny model.

    Returns:
        Models in eval mode, by "base" or the adapter.
    """

    def load() -> Any:
        return load_tiny_vlm() if base is None else AutoModelForImageTextToText.from_pretrained(base).eval()

    models = {"base": load(), **{os.fspath(name): load() for name in adapters}}
    for name in adapters:
        load_adapters(models[os.fspath(name)], separate(name))
    return models


def compare(models: Mapping[str, nn.Module], rows: int, seed: int, questions: Questions | None = None) -> None:
    """Print the accuracy of models side by side, by length of the text in between.

    Args:
        models: Models of the lab, by the heading of their column.
        rows: Rows of nine questions for every length, the same in every column.
        seed: Decides the questions.
        questions: The task in natural language, for the real base; `None`: for the tiny model, which knows no other.
    """

    def test(name: str, model: nn.Module) -> dict[int, Accuracy]:
        if questions is None:
            return {length: recall(model, length, rows, seed=seed, description=name) for length in LENGTHS}
        return {
            length: look_up(model, questions, length, rows, seed=seed, description=name)
            for length in LENGTHS_IN_TOKENS
        }

    results = {name: test(name, model) for name, model in models.items()}
    Terminal().print(accuracy_table(results, "bytes" if questions is None else "tokens"))


def accuracy_table(results: dict[str, dict[int, Accuracy]], unit: str = "bytes") -> Table:
    """Results side by side, a row for each name, a column for each length of text, in bytes or tokens."""
    shown = {len(result.right) for by_length in results.values() for result in by_length.values()}
    title = (
        f"Digits right, in % ± standard error, by {unit} of text in between; "
        f"{', '.join(map(str, shown))} x {NUM_CELLS} questions"
    )
    lengths = next(iter(results.values()))
    table = Table("", *(f"{length:,}" for length in lengths), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, by_length in results.items():
        table.add_row(name, *(_percent(by_length[length]) for length in lengths))
    return table


def _percent(accuracy: Accuracy) -> str:
    error = accuracy.standard_error
    return f"{accuracy.value:.0%}".rstrip("%") + ("" if math.isnan(error) else f" ±{100 * error:.0f}")
