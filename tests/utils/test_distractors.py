"""Texts between image and question: their length, what is not in them, where they go."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest

from peft_pvm.utils.distractors import Distractors, has_visuals, into_messages, read_paragraphs


@pytest.mark.parametrize("tokens", [1, 7, 100, 1024, 8192, 32768])
def test_a_text_is_as_long_as_asked(tokenizer, paragraphs: list[str], tokens: int):
    text = Distractors(tokenizer, tokens, paragraphs).draw("task/test/0")
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == tokens


class NeverFive:
    """A tokenizer of letters to which no text is five tokens long."""

    get_added_vocab, decode = dict, staticmethod(lambda ids, **kwargs: "".join(ids))

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[str]]:
        return {"input_ids": list(text) if len(text) != 5 else [*text, ""]}


def test_the_nearest_length_where_none_is_right():
    distractors = Distractors(NeverFive(), 5, ["abcdefgh" * 40])
    assert distractors.count(distractors.draw("a")) in (4, 6)


def test_a_text_depends_on_the_document_and_the_seed_alone(tokenizer, paragraphs: list[str]):
    draw = Distractors(tokenizer, 200, paragraphs, seed=1).draw
    assert draw("a") == draw("a")
    assert draw("a") != draw("b")
    assert draw("a") != Distractors(tokenizer, 200, paragraphs, seed=2).draw("a")


def test_a_longer_text_goes_on_where_a_shorter_one_ends(tokenizer, paragraphs: list[str]):
    short, long = (Distractors(tokenizer, tokens, paragraphs).draw("a") for tokens in (300, 600))
    assert long.startswith(short[:-5])


@pytest.mark.parametrize("answer", ["object", "Class", "the value", "is", "1", "[1]", "e.g."])
def test_answers_are_left_out(tokenizer, paragraphs: list[str], answer: str):
    distractors = Distractors(tokenizer, 4000, paragraphs)
    pattern = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)".replace(r"\ ", r"\s+"), re.IGNORECASE)
    assert any(pattern.search(distractors.draw(str(document))) for document in range(8))
    for document in range(8):
        assert not pattern.search(distractors.draw(str(document), [answer, "42"]))


@pytest.mark.parametrize("letter", ["A", "(a)", "I."])
def test_the_letter_of_a_choice_gives_nothing_away(tokenizer, paragraphs: list[str], letter: str):
    distractors = Distractors(tokenizer, 4000, paragraphs)
    assert distractors.draw("a", [letter, "B"]) == distractors.draw("a")


def test_a_word_that_is_cut_short_is_no_answer(tokenizer):
    cut = set()
    for tokens in range(30, 40):
        distractors = Distractors(tokenizer, tokens, ["understandable " * 200])
        last = distractors.draw("a").split()[-1]
        if last != "understandable":
            cut.add(last)
            assert last not in distractors.draw("a", [last]).split()
    assert cut


def test_nothing_in_a_text_opens_an_image(tokenizer):
    text = Distractors(tokenizer, 20, ["Here is an <image> of a cat.", "Plain words. " * 30]).draw("a")
    assert "<image>" not in text


def test_what_cannot_be_drawn_is_refused(tokenizer, paragraphs: list[str], tmp_path):
    with pytest.raises(ValueError, match=r"has only \d+\. Give a longer"):
        Distractors(tokenizer, 10**6, paragraphs).draw("a")
    with pytest.raises(ValueError, match=r"in which none of \['words'\] occurs"):
        Distractors(tokenizer, 10, ["Some words. " * 30]).draw("a", ["words"])
    for tokens in (-1, 0, 1.5, "many"):
        with pytest.raises(ValueError, match="but must be a whole number of tokens"):
            Distractors(tokenizer, tokens, paragraphs)
    with pytest.raises(FileNotFoundError, match="no text file"):
        read_paragraphs(tmp_path / "nothing.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_paragraphs(tmp_path / "blank.txt")


def test_paragraphs_of_a_file(tmp_path):
    (tmp_path / "text.txt").write_text("Ä one\nand on\n \n\ntwo\n\nÄ one\nand on\n", encoding="utf-8")
    assert read_paragraphs(tmp_path / "text.txt") == ["Ä one\nand on", "two"]


def user(*parts: str) -> dict[str, Any]:
    content = [
        {"type": part, "url": "x"} if part in ("image", "video", "audio") else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def shown(messages: list[dict[str, Any]]) -> list[list[str]]:
    return [[part.get("text", part["type"]) for part in message["content"]] for message in messages]


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ([user("image", "Q")], [["image", "T\n\n", "Q"]]),
        ([user("A", "image", "B", "image", "Q")], [["A", "image", "B", "image", "T\n\n", "Q"]]),
        ([user("Q", "image")], [["Q", "image", "T\n\n"]]),
        ([user("video", "audio", "Q")], [["video", "T\n\n", "audio", "Q"]]),
        ([user("image", "Q"), user("image", "R"), user("S")], [["image", "Q"], ["image", "T\n\n", "R"], ["S"]]),
    ],
)
def test_where_a_text_goes_in_a_chat(chat, expected):
    before = shown(chat)
    assert has_visuals(chat)
    assert shown(into_messages(chat, "T")) == expected
    assert shown(chat) == before


def test_a_chat_without_image():
    assert not has_visuals([user("audio", "Q")])


@pytest.mark.parametrize(
    ("answer", "text", "stands"),
    [
        ("猫", "这是一只猫的照片。", True),
        ("こねこ", "これはこねこです。", True),
        ("แมว", "นี่คือแมวตัวหนึ่ง", True),
        ("7", "共有7只猫。", True),
        ("7", "共有17只猫。", False),
        ("7只", "共有7只猫。", True),
        ("7只", "共有17只猫。", False),
        ("cat", "这是cat的照片。", True),
        ("猫", "A猫7", True),
        ("cat", "a category", False),
        ("cat", "two wildcats", False),
        ("최고", "최고의", False),
    ],
)
def test_where_words_have_no_spaces_between(answer: str, text: str, stands: bool):
    draw = Distractors(NeverFive(), 1, [text]).draw
    with pytest.raises(ValueError, match="in which none of") if stands else nullcontext():
        draw("a", [answer])
