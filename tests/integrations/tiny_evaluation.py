"""The lab's model and task as lmms-eval takes them: a folder like that of a published model, a data set, a task file."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import Qwen2VLImageProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

from peft_pvm.lab import mosaic
from peft_pvm.lab.processor import CHAT_TEMPLATE, cell_token, digit_token, tiny_vlm_processor
from peft_pvm.lab.tiny_vlm import load_tiny_vlm, tiny_vlm_config


PATCH_SIZE = 16  # that of the published Qwen3-VL, which lmms-eval counts on
SCALE = PATCH_SIZE // mosaic.PATCH_SIZE
TASK = "visual_recall"


def save_model(folder: Path) -> Path:
    """The lab's model with patches of 16 instead of 4 pixels; of images enlarged fourfold it makes the same tokens."""
    model = load_tiny_vlm()
    config = tiny_vlm_config()
    config.vision_config.patch_size = PATCH_SIZE
    weights = model.state_dict()
    name = "model.visual.patch_embed.proj.weight"
    weights[name] = weights[name].repeat_interleave(SCALE, 3).repeat_interleave(SCALE, 4) / SCALE**2
    larger = Qwen3VLForConditionalGeneration(config)
    larger.load_state_dict(weights)
    larger.save_pretrained(folder)
    sizes = dict(patch_size=PATCH_SIZE, merge_size=mosaic.MERGE_SIZE, temporal_patch_size=mosaic.TEMPORAL_PATCH_SIZE)
    statistics = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes, **statistics),
        tiny_vlm_processor().tokenizer,
        Qwen3VLVideoProcessor(**sizes, **statistics),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_task(folder: Path, rows: int, **config) -> Path:
    """A folder for `--include_path`: which digit is in that cell of the mosaic? One question a document."""
    from datasets import Dataset, Features, Image, Value
    from PIL.Image import fromarray

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    pictures = mosaic.draw_pictures("test", rows, 0, 1, generator)
    cells = torch.randint(mosaic.NUM_CELLS, (rows,), generator=generator).tolist()
    large = pictures.mosaics.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
    documents = {
        "image": [fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in large],
        "question": [cell_token(cell) for cell in cells],
        "answer": [digit_token(int(digits[0, cell])) for digits, cell in zip(pictures.digits, cells)],
    }
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(documents, features=features).to_parquet(folder / "test.parquet")
    task = {
        "task": TASK,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": "image",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 1},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **config,
    }
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder
