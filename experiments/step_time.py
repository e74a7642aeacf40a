"""What a step of training costs with PVM, beside LoRA of its size and the base's own forward and backward.

Also with PVM where the image is hidden, and where there is none.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from peft_pvm.demo.mosaic import CHANNELS, IMAGE, NUM_BYTES, PATCH_SIZE, TEMPORAL_PATCH_SIZE, VISION_END, VISION_START
from peft_pvm.demo.tiny_vlm import tiny_vlm_config
from peft_pvm.methods.pvm import PVMConfig
from peft_pvm.tokens.families import find_vlm
from peft_pvm.training import hidden_image
from peft_pvm.tuners.active import base_of
from peft_pvm.utils.terminal import Bars, Terminal


Size = Literal["tiny", "middle"]
PATCH_NUMBERS = CHANNELS * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
SIDE = 16  # visual tokens along a side of the image


def middle_config() -> Qwen3VLConfig:
    """16 decoder layers of width 1,024 after the tiny model's vision tower, with the vocabulary of Qwen3-VL, tied."""
    content = tiny_vlm_config().to_dict()
    content["text_config"] |= dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        initializer_range=0.02,
        vocab_size=151_936,
    )
    content["tie_word_embeddings"] = content["text_config"]["tie_word_embeddings"] = True
    content["text_config"]["rope_parameters"]["mrope_section"] = [12, 10, 10]
    content["vision_config"]["out_hidden_size"] = 1024
    return Qwen3VLConfig.from_dict(content)


@dataclass(frozen=True, eq=False)
class Step:
    """A step of training.

    Attributes:
        model: In training mode.
        inputs: What it is called with, labels included.
        hides: Whether images are hidden.
    """

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    hides: bool = False

    def loss(self) -> torch.Tensor:
        """The loss of its forward."""
        with hidden_image(self.model) if self.hides else contextlib.nullcontext():
            return self.model(**self.inputs, use_cache=False).loss


def show_step_time(size: Size, text_tokens: int, rows: int, repeats: int, r: int, seed: int) -> None:
    """Print time, operations and memory of forward and backward. Times are of rounds in which the models take turns.

    The base gets a gradient at what its embeddings return, so that its backward goes through all layers. That of an
    adapter ends at the adapter's lowest layer.

    Args:
        size: "tiny" or "middle"; random weights of a Qwen3-VL.
        text_tokens: Of a row, after an image of 256 visual tokens.
        rows: Of a batch.
        repeats: Rounds that count, after one that does not.
        r: PVM's width.
        seed: Decides weights and tokens.
    """
    config = tiny_vlm_config() if size == "tiny" else middle_config()
    steps = _steps(_models(config, r, seed), rows, text_tokens, torch.Generator().manual_seed(seed))
    times: dict[str, list[float]] = {name: [] for name in steps}
    with Bars() as progress:
        task = progress.add_task("Steps", total=(repeats + 1) * len(steps))
        for _ in range(repeats + 1):
            for name, step in steps.items():
                times[name].append(_time_of(step))
                progress.advance(task)
    kept = {name: bytes_kept(step) for name, step in steps.items()}
    operations = {name: operations_of(step) for name, step in steps.items()}
    parameters = sum(parameter.numel() for parameter in steps["base"].model.parameters())
    title = f"{size}: {parameters:,} parameters, {rows} rows of {SIDE * SIDE} visual and {text_tokens} text tokens"
    console = Terminal()
    console.print(_table(title, steps, {name: values[1:] for name, values in times.items()}, kept, operations))
    console.print(f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32.")


def _steps(models: dict[str, nn.Module], rows: int, text_tokens: int, generator: torch.Generator) -> dict[str, Step]:
    inputs = _batch(rows, text_tokens, generator)
    text = {name: inputs[name][:, -text_tokens:] for name in ("input_ids", "attention_mask", "labels")}
    return {
        **{name: Step(model, inputs) for name, model in models.items()},
        "PVM, image hidden": Step(models["PVM"], inputs, hides=True),
        "PVM, text without image": Step(models["PVM"], text),
    }


def _models(config: Qwen3VLConfig, r: int, seed: int) -> dict[str, nn.Module]:
    """The base with a gradient at what its embeddings return, and two copies with LoRA and PVM of one size."""

    def build() -> Any:
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config).train()

    pvm = get_peft_model(build(), PVMConfig(r=r))
    trained = pvm.get_nb_trainable_parameters()[0]
    base = build().requires_grad_(False)
    base.enable_input_require_grads()
    return {"base": base, "LoRA": get_peft_model(build(), lora_of_size(build(), trained)), "PVM": pvm}


def _table(
    title: str,
    steps: dict[str, Step],
    times: dict[str, list[float]],
    kept: dict[str, int],
    operations: dict[str, int],
) -> Table:
    columns = ("trained", "s a step", "spread", "of base", "GFLOP", "of base", "MiB for the backward", "of base")
    table = Table("", *columns, title=title)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, step in steps.items():
        learns = 0 if name == "base" else sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        table.add_row(
            name,
            f"{learns:,}",
            f"{medians[name]:.3f}",
            f"{max(times[name]) - min(times[name]):.3f}",
            f"{medians[name] / medians['base']:.2f}",
            f"{operations[name] / 1e9:.2f}",
            f"{operations[name] / operations['base']:.2f}",
            f"{kept[name] / 2**20:.1f}",
            f"{kept[name] / kept['base']:.2f}",
        )
    return table


def _batch(rows: int, text_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    image = torch.tensor([VISION_START, *[IMAGE] * SIDE**2, VISION_END]).expand(rows, -1)
    text = torch.randint(NUM_BYTES, (rows, text_tokens), generator=generator)
    input_ids = torch.cat([image, text], 1)
    patches = rows * (2 * SIDE) ** 2
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "pixel_values": torch.randn(patches, PATCH_NUMBERS, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * SIDE, 2 * SIDE]]).expand(rows, -1),
        "labels": input_ids.masked_fill(input_ids >= NUM_BYTES, -100),
    }


def lora_of_size(model: nn.Module, parameters: int) -> LoraConfig:
    """LoRA on every linear layer of the decoder, of the rank that comes nearest."""
    layers = find_vlm(model).layers
    sizes = [
        sum(linear.weight.shape) for layer in layers for linear in layer.modules() if isinstance(linear, nn.Linear)
    ]
    rank = max(1, round(parameters / sum(sizes)))
    return LoraConfig(r=rank, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")


def _time_of(step: Step) -> float:
    start = time.perf_counter()
    step.loss().backward()
    step.model.zero_grad()
    return time.perf_counter() - start


def operations_of(step: Step) -> int:
    """The floating-point operations of a forward and backward, in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which it can count
        step.loss().backward()
    step.model.zero_grad()
    return counter.get_total_flops()


def bytes_kept(step: Step) -> int:
    """The bytes that a forward keeps for its backward, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in base_of(step.model).parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step.loss()
    total = sum(kept.values())
    del loss
    return total
