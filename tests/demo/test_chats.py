"""Visual recall as chats: what a trainer's tools make of them is what the lab itself asks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


datasets = pytest.importorskip("datasets", reason="chats need the extra `train`")

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from peft_pvm.cli.app import app  # noqa: E402
from peft_pvm.demo import mosaic  # noqa: E402
from peft_pvm.demo.for_trainers import TinyVLMProcessor, make_chats, save_as_folder, tiny_vlm_processor, write_chats  # noqa: E402  # noqa: E402
from peft_pvm.demo.tiny_vlm import load_tiny_vlm  # noqa: E402


def test_the_processor_writes_the_labs_own_tokens(tmp_path: Path):
    """Ids and, to the rounding of eight bits, pixels."""
    processor = tiny_vlm_processor()
    chat = make_chats("messages", 1, 50, "test", seed=3)[0]
    messages = [dict(message) for message in chat["messages"]]
    first = messages[0]
    first["content"] = [{"type": "image", "image": chat["images"][0]}, {"type": "text", "text": first["content"]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    generator = torch.Generator().manual_seed(3)
    length = int(torch.randint(51, (), generator=generator))
    pictures = mosaic.draw_pictures("test", 1, length, 1, generator)
    cells = torch.randperm(mosaic.NUM_CELLS, generator=generator)
    answers = mosaic.FIRST_ANSWER + pictures.digits[0, 0, cells]
    dialogue = torch.stack([mosaic.FIRST_QUERY + cells, answers], 1).flatten()[None]
    assert torch.equal(inputs["input_ids"], torch.cat([pictures.input_ids, dialogue], 1))
    assert (inputs["pixel_values"] - mosaic.patchify(pictures.mosaics)).abs().max() < 1.01 / 255
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == mosaic.IMAGE).int())


def test_every_byte_and_token_has_its_id():
    tokenizer = tiny_vlm_processor().tokenizer
    assert len(tokenizer) == mosaic.VOCAB_SIZE
    text = "".join(map(chr, range(32, 127))) + "\n\u00e4\u20ac\U0001f600"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("[cell 8][red cell 0][digit 0]<|image_pad|><|pad|>").input_ids == [
        mosaic.FIRST_QUERY + 8,
        mosaic.FIRST_QUERY + mosaic.NUM_CELLS,
        mosaic.FIRST_ANSWER,
        mosaic.IMAGE,
        mosaic.PAD,
    ]


def test_the_model_as_a_folder(tmp_path: Path):
    model = load_tiny_vlm()
    save_as_folder(model, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, TinyVLMProcessor)
    assert processor.tokenizer.get_vocab() == tiny_vlm_processor().tokenizer.get_vocab()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_the_base_answers_chats():
    """Right after the image it knows all cells."""
    processor, model = tiny_vlm_processor(), load_tiny_vlm()
    right = 0
    rows = make_chats("prompts", 20, 0, "test")
    for row in rows:
        content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": row["prompt"][0]["content"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        answer = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=mosaic.PAD)[0, -1:]
        right += processor.decode(answer) == row["solution"]
    assert right >= 19


def test_the_seed_decides_and_the_folder_is_read_back(tmp_path: Path):
    one, same, other = (make_chats("messages", 5, 100, seed=seed) for seed in (0, 0, 1))
    assert one.to_list() == same.to_list() != other.to_list()
    write_chats(one, tmp_path)
    read = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert read["messages"] == one["messages"]
    assert read[0]["images"][0].tobytes() == one[0]["images"][0].tobytes()


@pytest.mark.parametrize(
    ("form", "rows", "message"),
    [("poems", 1, "form is 'poems'"), ("messages", 0, "rows is 0, but must be at least 1")],
)
def test_wrong_arguments_are_refused(form: str, rows: int, message: str):
    with pytest.raises(ValueError, match=message):
        make_chats(form, rows)


SHIPPED = Path(__file__).parents[2] / "adapters" / "pvm-tiny-vlm"


def test_commands(tmp_path: Path):
    for line in (
        ("save-base", tmp_path / "model"),
        ("chats", tmp_path / "chats", "--rows", 3, "--form", "prompts"),
        ("recall", SHIPPED, "--rows", 1, "--base", tmp_path / "model"),
    ):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["lab", *map(str, line)])
        assert result.exit_code == 0, result.output
        if line[0] == "recall":
            assert "pvm-tiny-vlm" in result.output
    assert (tmp_path / "model" / "config.json").is_file()
    assert len(datasets.load_dataset(str(tmp_path / "chats"), split="train", cache_dir=str(tmp_path / "cache"))) == 3
