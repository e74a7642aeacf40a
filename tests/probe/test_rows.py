"""Rows of a data set as chats, and chats with their answers as a model takes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image
from processors import PROCESSORS
from tiny_vlms import BOS
from tokenizers import processors as tokenizing

from peft_pvm.demo.for_trainers import make_chats, tiny_vlm_processor
from peft_pvm.probe.rows import Chat, Lesson, read_chats, teach


IMAGE = Image.new("RGB", (28, 28))
QUESTION = {"role": "user", "content": "what?"}
ANSWER = {"role": "assistant", "content": "a dog"}
WHOLE = {"images": [IMAGE], "messages": [QUESTION, ANSWER]}
PLACEHOLDER, WHAT = {"type": "image"}, {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    "row",
    [
        WHOLE,
        {"image": IMAGE, "messages": [QUESTION, ANSWER]},
        {"images": [IMAGE], "prompt": [QUESTION], "completion": [ANSWER]},
        {"images": [IMAGE], "prompt": "what?", "completion": " a dog\n"},
        {"images": [IMAGE], "messages": [{"role": "user", "content": [PLACEHOLDER, WHAT]}, ANSWER]},
        # as datasets pads what parts lack
        {"images": [IMAGE], "messages": [{"role": "user", "content": [{**PLACEHOLDER, "text": None}, WHAT]}, ANSWER]},
    ],
    ids=["messages", "image", "prompt", "texts", "parts", "padded"],
)
def test_rows_are_one_chat_in_whatever_columns(row: dict[str, Any]):
    before = json.dumps(row, default=id)
    (chat,) = read_chats([row], 8)
    assert chat.prompt == [{"role": "user", "content": [PLACEHOLDER, WHAT]}]
    assert (chat.images, chat.answer) == ([IMAGE], "a dog")
    assert json.dumps(row, default=id) == before


def test_images_stand_before_the_first_message_of_the_user():
    system = {"role": "system", "content": "be brief"}
    messages = [system, QUESTION, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "b"}]
    (chat,) = read_chats([{"images": [IMAGE, IMAGE], "messages": messages}], 8)
    assert [message["role"] for message in chat.prompt] == ["system", "user", "assistant", "user"]
    assert [len(message["content"]) for message in chat.prompt] == [1, 3, 1, 1]
    assert chat.prompt[1]["content"] == [PLACEHOLDER, PLACEHOLDER, WHAT]
    assert chat.answer == "b"


def test_the_first_rows_with_images_are_read_and_no_more():
    def rows():
        for number in range(4):
            yield {**WHOLE, "images": [] if number % 2 == 0 else [IMAGE]}
        raise AssertionError("More was read than was asked for.")

    assert len(read_chats(rows(), 2)) == 2
    assert len(read_chats([WHOLE] * 3, 8)) == 3


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "No row of the data set has an image"),
        ([{"messages": [QUESTION, ANSWER]}], "No row of the data set has an image"),
        ([{**WHOLE, "images": []}, {**WHOLE, "images": None}], "No row of the data set has an image"),
        ([{"images": [IMAGE], "messages": [QUESTION]}], "does not end with an answer of the assistant"),
        ([{"images": [IMAGE], "messages": [ANSWER]}], "does not end with an answer of the assistant"),
        ([{"images": [IMAGE], "messages": []}], "does not end with an answer of the assistant"),
        ([{"images": [IMAGE], "messages": [QUESTION, {**ANSWER, "content": " "}]}], "does not end with an answer"),
        ([{"images": [IMAGE], "messages": [QUESTION, {**ANSWER, "content": None}]}], "does not end with an answer"),
        ([{"images": [IMAGE], "prompt": [QUESTION], "solution": "a dog"}], "'images', 'prompt', 'solution'"),
        ([{"images": [IMAGE], "text": "what?"}], "'images', 'text'"),
        (
            [{"images": [IMAGE, IMAGE], "messages": [{"role": "user", "content": [PLACEHOLDER, WHAT]}, ANSWER]}],
            "has 2 images, but 1 in its messages",
        ),
    ],
)
def test_what_is_no_chat_with_image_and_answer_is_refused(rows: list[dict[str, Any]], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        read_chats(rows, 8)


def test_at_least_one_row_is_asked_for():
    with pytest.raises(ValueError, match="rows is 0"):
        read_chats([WHOLE], 0)


def prompt_ids(processor: Any, chat: Chat) -> list[int]:
    """What the model is given before it answers."""
    text = processor.apply_chat_template(chat.prompt, add_generation_prompt=True)
    return processor(images=[chat.images], text=[text], return_tensors="pt")["input_ids"][0].tolist()


def parted(lesson: Lesson) -> tuple[list[int], list[int]]:
    ids = lesson.inputs["input_ids"][0].tolist()
    return ids[: -lesson.num_answer_tokens], ids[-lesson.num_answer_tokens :]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_the_answer_stands_behind_what_the_model_is_asked_with(family: str):
    processor = PROCESSORS[family]()
    (chat,) = read_chats([WHOLE], 1)
    before, answer = parted(teach(processor, chat))
    assert before == prompt_ids(processor, chat)
    assert processor.tokenizer.decode(answer) == "a dog"


def test_the_chats_of_the_lab():
    pytest.importorskip("datasets", reason="chats are a data set")
    pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")
    processor = tiny_vlm_processor()
    for chat in read_chats(make_chats("messages", 3, 30), 3):
        lesson = teach(processor, chat)
        before, answer = parted(lesson)
        assert before == prompt_ids(processor, chat)
        assert processor.tokenizer.decode(answer) == chat.answer
        assert lesson.num_answer_tokens == 1
        assert lesson.inputs["mm_token_type_ids"].shape == lesson.inputs["input_ids"].shape


TURNS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}</a dog>{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_what_the_template_puts_around_an_answer_is_not_the_answer():
    """Neither the end of a turn, though it holds the same words, nor the space that the answer's token may take up."""
    from tokenizers import Tokenizer

    processor = PROCESSORS["llava"]()
    processor.chat_template = TURNS
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][" a"] = len(content["model"]["vocab"])
    content["model"]["merges"] = [[" ", "a"]]
    content["pre_tokenizer"] = None
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    (chat,) = read_chats([WHOLE], 1)
    before, answer = parted(teach(processor, chat))
    assert processor.tokenizer.decode(answer) == " a dog"
    assert before == prompt_ids(processor, chat)


def test_a_text_begins_once():
    processor = PROCESSORS["llava"]()
    processor.tokenizer.backend_tokenizer.post_processor = tokenizing.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    (chat,) = read_chats([WHOLE], 1)
    for template in (processor.chat_template, "<bos>" + processor.chat_template):
        processor.chat_template = template
        ids = teach(processor, chat).inputs["input_ids"][0].tolist()
        assert ids[0] == BOS != ids[1]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "has no chat template"),
        (PROCESSORS["llava"]().chat_template.replace("part['text']", "part['text'].upper()"), "as it is"),
        ("<image>", "does not leave an answer in a chat as it is"),
    ],
    ids=["none", "changed", "left out"],
)
def test_a_template_that_does_not_show_the_answer_is_refused(template: str | None, complaint: str):
    processor = PROCESSORS["llava"]()
    processor.chat_template = template
    (chat,) = read_chats([WHOLE], 1)
    with pytest.raises(ValueError, match=complaint):
        teach(processor, chat)
