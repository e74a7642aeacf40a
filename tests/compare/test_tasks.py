"""Questions from files and of the lab, and how their answers are scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")

from PIL import Image

from peft_pvm.compare.files import questions_of, read_questions
from peft_pvm.compare.tasks import Question, exact_match, file_task, normalised
from peft_pvm.demo.cells import ROUNDS, CellQuestion, ask_in_tokens, ask_in_words, cells_right, digits_right


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Two cats.", "2 cats"),
        ("the CAT", "Cat!"),
        ('"yes"', "yes"),
        ("a red, round ball", "red round ball"),
        ("1,000", "1,000."),
        ("\uff12", "2"),
        ("T-shirt", "t shirt"),
    ],
)
def test_what_does_not_count_in_an_answer(answer: str, same: str):
    assert normalised(answer) == normalised(same)


@pytest.mark.parametrize(("answer", "other"), [("35", "3.5"), ("-5", "5"), ("it is a cat", "cat"), ("cats", "cat")])
def test_what_counts(answer: str, other: str):
    assert normalised(answer) != normalised(other)


def test_each_accepted_answer_is_right():
    question = Question("0", [], [], ("sofa", "The couch"))
    assert [exact_match(answer, question) for answer in ("Couch.", "a sofa", "chair", "")] == [1, 1, 0, 0]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def written(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_file_is_read_in_each_of_its_forms(image: Path):
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    rows = (
        {"image": "a.png", "question": "How many?", "answer": 3},
        {"images": ["a.png", "a.png"], "question": "What?", "answers": ["this", "that"]},
        {"image": "a.png", "messages": chat},
    )
    path = written(image.parent, *rows)
    questions = read_questions(path, 10)
    assert [question.answers for question in questions] == [("3",), ("this", "that"), ("This.",)]
    assert [len(question.images) for question in questions] == [1, 2, 1]
    assert questions[0].prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "How many?"}]
    assert len(read_questions(path, 2)) == 2
    (message,) = file_task("t", questions).messages(questions[1], "Long ago ...")
    assert [part["type"] for part in message["content"]] == ["image", "image", "text", "text"]
    assert message["content"][2]["text"] == "Long ago ...\n\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is [1], but must be an object"),
        ({"question": "?", "answer": "x"}, "line 3 has the image None"),
        ({"image": "b.png", "question": "?", "answer": "x"}, "line 3: 'b.png' cannot be read as an image"),
        ({"image": "questions.jsonl", "question": "?", "answer": "x"}, "cannot be read as an image"),
        ({"image": "a.png", "question": "?"}, "must have a text in `question`, and in `answer` a text or number"),
        ({"image": "a.png", "question": 3, "answer": "x"}, "has the question 3 and the answer 'x', but must"),
        ({"image": "a.png", "question": "?", "answers": [["x"]]}, "line 3 has the question"),
        ({"image": "a.png", "question": "?", "answer": " "}, "line 3 is no question about an image"),
        ({"image": "a.png", "text": "?"}, "line 3 is no question about an image"),
    ],
)
def test_a_bad_line_is_refused_by_name(row: object, said: str, image: Path):
    path = written(image.parent, {"image": "a.png", "question": "?", "answer": "x"}, row)
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 3") as refused:
        read_questions(path, 10)
    assert said in str(refused.value)


def test_a_file_without_questions_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"questions\.jsonl holds no questions"):
        read_questions(written(tmp_path, ""), 10)
    with pytest.raises(ValueError, match="row 1 is no question"):
        questions_of([("row 1", {"text": "x"})], 3, "data")


@pytest.mark.parametrize("transcription", [True, False])
def test_a_right_answer_of_the_lab_is_wholly_right(transcription: bool):
    (asked,) = ask_in_tokens(transcription, 1, 7)
    whole = asked.question + asked.answer
    assert cells_right(whole, whole) == (ROUNDS * 9 if transcription else 1)
    assert cells_right(asked.question, whole) == 0
    (asked,) = ask_in_words(transcription, 1, 7)
    assert digits_right(asked.answer, asked.answer) == 9
    assert digits_right("", asked.answer) == 0


@pytest.mark.parametrize("ask", [ask_in_tokens, ask_in_words])
def test_rows_do_not_depend_on_how_many_there_are(ask: Callable[..., list[CellQuestion]]):
    assert ask(True, 1, 7)[0].answer == ask(True, 2, 7)[0].answer != ask(True, 1, 8)[0].answer


def test_a_cell_counts_out_of_turn_and_a_digit_in_its_place():
    assert cells_right("[cell 1][digit 4][digit 4][cell 0][digit 9]", "[cell 0][digit 3][cell 1][digit 4]") == 1
    assert digits_right("3, 5", "3, 4") == 1
    assert digits_right("It is 35.", "3") == 0
