"""Models and tasks as lmms-eval takes them: folders like those of published models, a data set, a task file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as T
import yaml
from tiny_vlms import MROPE, QWEN_VISION, SIGLIP, TEXT

from peft_pvm.demo import mosaic
from peft_pvm.demo.for_trainers import CHAT_TEMPLATE, cell_token, digit_token, tiny_vlm_processor
from peft_pvm.demo.tiny_vlm import load_tiny_vlm, tiny_vlm_config


SCALE = 4  # the published Qwen3-VL has patches of 16 pixels, on which lmms-eval counts; the lab's has patches of 4
TASK = "visual_recall"
MODEL_ARGS = {
    "qwen3_vl": "device_map=cpu,system_prompt=",
    "qwen2_5_vl": "device_map=cpu,system_prompt=,min_pixels=784",
    "llava_hf": "device_map=cpu,dtype=float32",
}
SMALL_TEXT = dict(
    TEXT,
    vocab_size=mosaic.VOCAB_SIZE + 1,
    pad_token_id=mosaic.PAD,
    eos_token_id=mosaic.PAD,
    initializer_range=0.2,  # so large that answers tell what is attended to
)
IDS = dict(
    image_token_id=mosaic.IMAGE,
    video_token_id=mosaic.VIDEO,
    vision_start_token_id=mosaic.VISION_START,
    vision_end_token_id=mosaic.VISION_END,
)
NORMALISED = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def save_model(name: str, folder: Path) -> Path:
    """A tiny model of a family by lmms-eval's name for it: the lab's, which can do the task, or a random one.

    Args:
        name: "qwen3_vl" (the lab's), "qwen2_5_vl" or "llava_hf".
        folder: Where to.
    """
    torch.manual_seed(0)
    model, processor = {"qwen3_vl": _lab_qwen3_vl, "qwen2_5_vl": _qwen2_5_vl, "llava_hf": _llava}[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _lab_qwen3_vl() -> tuple[Any, Any]:
    """The lab's model with larger patches: of images that are enlarged as much, it makes the very same tokens."""
    config = tiny_vlm_config()
    config.vision_config.patch_size *= SCALE
    weights = load_tiny_vlm().state_dict()
    name = "model.visual.patch_embed.proj.weight"
    weights[name] = weights[name].repeat_interleave(SCALE, 3).repeat_interleave(SCALE, 4) / SCALE**2
    model = T.Qwen3VLForConditionalGeneration(config)
    model.load_state_dict(weights)
    sizes = dict(patch_size=16, merge_size=2, temporal_patch_size=2, **NORMALISED)
    parts = T.Qwen2VLImageProcessor(**sizes), _tokenizer(), T.Qwen3VLVideoProcessor(**sizes)
    return model, T.Qwen3VLProcessor(*parts, chat_template=CHAT_TEMPLATE)


def _qwen2_5_vl() -> tuple[Any, Any]:
    vision = dict(QWEN_VISION, patch_size=14, intermediate_size=64, fullatt_block_indexes=[1], window_size=56)
    text = dict(SMALL_TEXT, rope_parameters=MROPE, use_sliding_window=False)
    model = T.Qwen2_5_VLForConditionalGeneration(T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS))
    sizes = dict(patch_size=14, merge_size=2, temporal_patch_size=2, **NORMALISED)
    parts = T.Qwen2VLImageProcessor(**sizes), _tokenizer(), T.Qwen2VLVideoProcessor(**sizes)
    return model, T.Qwen2_5_VLProcessor(*parts, chat_template=CHAT_TEMPLATE)


def _llava() -> tuple[Any, Any]:
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**SIGLIP),
        text_config=T.LlamaConfig(**SMALL_TEXT),
        image_token_index=mosaic.VOCAB_SIZE,
        vision_feature_layer=-1,
    )
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    processor = T.LlavaProcessor(
        T.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE.replace("<|image_pad|>", "<image>"),
    )
    return T.LlavaForConditionalGeneration(config), processor


def _tokenizer() -> Any:
    tokenizer = tiny_vlm_processor().tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE  # lmms-eval's simple LLaVA asks the tokenizer for it
    return tokenizer


def save_task(folder: Path, rows: int, answers: list[str] | None = None, **config: Any) -> Path:
    """A folder for `--include_path`: which digit is in that cell of the mosaic? One question a document.

    Args:
        folder: Where to.
        rows: Documents.
        answers: What to take for the answers instead.
        config: What to change of the task.
    """
    from datasets import Dataset, Features, Image, Value
    from PIL.Image import fromarray

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    pictures = mosaic.draw_pictures("test", rows, 0, 1, generator)
    cells = torch.randint(mosaic.NUM_CELLS, (rows,), generator=generator).tolist()
    large = pictures.mosaics.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
    right = [digit_token(int(digits[0, cell])) for digits, cell in zip(pictures.digits, cells)]
    documents = {
        "image": [fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in large],
        "question": [cell_token(cell) for cell in cells],
        "answer": answers or right,
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
    (folder / "task.yaml").write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}))
    return folder
