"""What T-DRS leaves open, measured: the tiny model's accuracy under each reading, without any training."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from rich.table import Table

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.demo.recall import recall
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.methods.tdrs import TDRSConfig
from peft_pvm.tuners.active import attached
from peft_pvm.utils.terminal import Terminal


LENGTHS = (128, 256, 512)
SD_ALONE = {"dc_strength": 0.0, "re_strength": 0.0}
READINGS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "all three steps, as by default": {},
    "re_strength 0.8": {"re_strength": 0.8},
    "SD alone": SD_ALONE,
    "SD alone, sd_strength 3": {**SD_ALONE, "sd_strength": 3.0},
    "SD alone, text-visual pairs": {**SD_ALONE, "pairs": "inter"},
    "DC alone": {"sd_strength": 0.0, "re_strength": 0.0},
    "re alone": {"sd_strength": 0.0, "dc_strength": 0.0},
    "SD and DC": {"re_strength": 0.0},
    "form logits": {"form": "logits"},
    "form logits, DC alone": {"form": "logits", "sd_strength": 0.0, "re_strength": 0.0},
    "text-visual pairs": {"pairs": "inter"},
    "form logits, text-visual pairs": {"form": "logits", "pairs": "inter"},
    "floors 0.1": {"dc_floor": 0.1, "re_floor": 0.1},
}


def compare_readings(rows: int = 32, seed: int = 0) -> None:
    """Print a table of accuracies, one row per reading.

    Args:
        rows: Rows of nine held-out questions at every length.
        seed: Decides the questions.
    """
    start = time.perf_counter()
    model = load_tiny_vlm()
    title = f"Which digit was in that cell? {rows} x {NUM_CELLS} held-out questions, by bytes of text between"
    table = Table("T-DRS", *map(str, LENGTHS), title=title)
    for name, fields in READINGS.items():
        with attached(model, *([] if fields is None else [TDRSConfig(**fields)])):
            results = [recall(model, length, rows, seed=seed, description=name) for length in LENGTHS]
        table.add_row(name, *(f"{result.value:.3f} ± {result.standard_error:.3f}" for result in results))
    console = Terminal()
    console.print(table)
    seconds = time.perf_counter() - start
    console.print(
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, {seconds:.0f} s."
    )
