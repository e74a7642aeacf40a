"""Texts between image and question: their length, what is not in them, where they go. Without lmms-eval."""

from __future__ import annotations

import importlib
import re
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peft_pvm.integrations.lmms_eval.distractors import (
    Distractors,
    answers_of,
    has_visuals,
    into_context,
    into_messages,
    read_paragraphs,
)


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    return read_paragraphs()


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def tokenizer(request, paragraphs: list[str]) -> PreTrainedTokenizerFast:
    """As Qwen's and as Llama's: words with the space before them, and words with a mark for it."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    if request.param == "byte-level":
        tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = []
    special = ["<unk>", "<image>"]
    tokens.train_from_iterator(
        paragraphs, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", extra_special_tokens=["<image>"])


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
    with pytest.raises(ValueError, match=r"has only \d+ tokens"):
        Distractors(tokenizer, 10**6, paragraphs).draw("a")
    with pytest.raises(ValueError, match=r"in which none of \['words'\] stands"):
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
    ("context", "expected"),
    [
        ("Q", "T\n\nQ"),
        ("<image>\nQ", "<image>\nT\n\nQ"),
        ("<image> <image>\nQ", "<image> <image>\nT\n\nQ"),
        ("See <image 1> and <image 2>. Q", "See <image 1> and <image 2>\nT\n\n. Q"),
    ],
)
def test_where_a_text_goes_in_a_prompt(context, expected):
    assert into_context(context, "T") == expected


@pytest.mark.parametrize(
    ("target", "choices", "expected"),
    [
        ("cat", None, ["cat"]),
        (["cat", "a cat", "cat"], None, ["cat", "a cat"]),
        (7, None, ["7"]),
        (1, ["cat", "dog"], ["dog"]),
        ("B", ["cat", "dog"], ["dog"]),
        ("(B)", None, []),
        ("B", ["A", "B"], []),
        ("C", ["cat", "dog"], []),
        ("['cat','dog']", None, ["['cat','dog']", "cat", "dog"]),
        ("[cat", None, ["[cat"]),
        ("[cat]", None, ["[cat]"]),
        ("[1, 0]", ["cat", "dog"], ["[1, 0]", "dog", "cat"]),
        ("1", ["cat", "dog"], ["dog"]),
        ("2", ["1", "2", "3"], ["2"]),
        ("2", [1, 2, 3], ["2"]),
        ("7", ["cat", "dog"], ["7"]),
        ("2", None, ["2"]),
        ({"answer": "cat", "others": ["dog"], "count": 3}, None, ["cat", "dog", "3"]),
        (" ", None, []),
        (None, None, []),
    ],
)
def test_what_counts_as_an_answer(target, choices, expected):
    config = SimpleNamespace(doc_to_choice=choices, doc_to_target="answer")
    task = SimpleNamespace(config=config, doc_to_target=lambda doc: target, doc_to_choice=lambda doc: choices)
    assert answers_of(task, {}) == expected


def test_a_task_without_targets_has_no_answers():
    def refuse(doc):
        raise TypeError

    config = SimpleNamespace(doc_to_choice=None, doc_to_target=None)
    assert answers_of(SimpleNamespace(config=config, doc_to_target=refuse), {}) == []


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


@pytest.mark.parametrize("module", ["models", "lengths"])
def test_without_lmms_eval_it_says_what_to_install(without_lmms_eval, module: str):
    pytest.importorskip("matplotlib", reason="the lengths are drawn, which needs the extra lab")
    with pytest.raises(ImportError, match=r"needs lmms-eval .* pip install '\.\[eval,lab\]'"):
        importlib.import_module(f"peft_pvm.integrations.lmms_eval.{module}")


def test_the_folder_of_tasks_is_printed(capsys):
    runpy.run_module("peft_pvm.integrations.lmms_eval", run_name="__main__")
    assert (Path(capsys.readouterr().out.strip()) / "pvm_paper.yaml").is_file()
