"""Text between the images and the question of chats that a model is trained on."""

from __future__ import annotations

from typing import Any

import pytest

from peft_pvm.training import TextBetween


def user(*parts: str) -> dict[str, Any]:
    content = [
        {"type": part, "url": "x"} if part in ("image", "video", "audio") else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


@pytest.fixture
def between(tokenizer, paragraphs: list[str]) -> TextBetween:
    return TextBetween(tokenizer, 50, paragraphs=paragraphs)


def question(content: Any = "What?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any = "A cat.") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


NOTHING = {"images": [], "image": None, "messages": None, "prompt": None, "completion": None, "solution": None}
ROWS = {
    "messages": {"images": ["x"], "messages": [question(), answer(), question("More?"), answer()]},
    "one image": {"image": "x", "messages": [question(), answer()]},
    "prompt and completion": {"images": ["x"], "prompt": [question()], "completion": [answer()]},
    "prompt and solution": {"images": ["x"], "prompt": [question()], "solution": "A cat."},
    "a system message": {"images": ["x"], "messages": [{"role": "system", "content": "S"}, question(), answer()]},
    "parts": {"images": ["x"], "messages": [question([{"type": "text", "text": "What?"}]), answer()]},
    "an image among the parts": {
        "messages": [user("A", "image", "What?"), answer([{"type": "text", "text": "A cat."}])]
    },
}


@pytest.mark.parametrize("columns", ["alone", "with empty ones"])
@pytest.mark.parametrize("form", ROWS)
def test_text_goes_between_the_image_and_the_first_question(between: TextBetween, form: str, columns: str):
    row = {**(NOTHING if columns == "with empty ones" else {}), **ROWS[form]}
    (column,) = ("messages",) if row.get("messages") else ("prompt",)
    index = next(index for index in range(9) if between.draw_length(index) > 2)
    changed = between(row, index)
    assert list(changed) == [column]
    text = between.distractors.draw(str(index), ["A cat."], between.draw_length(index)) + "\n\n"
    asked = [message["role"] for message in row[column]].index("user")
    for number, (old, new) in enumerate(zip(row[column], changed[column], strict=True)):
        if number != asked:
            assert new == old
        elif isinstance(old["content"], str):
            assert new["content"] == text + old["content"]
        else:
            place = 2 if "image" in form else 0
            assert new["content"][place] == {"type": "text", "text": text}
            assert new["content"][:place] + new["content"][place + 1 :] == old["content"]


def test_a_data_set_keeps_its_images_as_they_are(tokenizer, paragraphs: list[str], tmp_path):
    """To the byte: a JPEG that is decoded and written again is another one."""
    datasets = pytest.importorskip("datasets", reason="needs the extra train")
    pil = pytest.importorskip("PIL.Image")
    pil.new("RGB", (9, 9), (200, 30, 10)).save(tmp_path / "a.jpg", quality=30)
    encoded = (tmp_path / "a.jpg").read_bytes()
    between = TextBetween(tokenizer, 50, paragraphs=paragraphs)
    messages = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    for column, feature in (("images", datasets.List(datasets.Image())), ("image", datasets.Image())):
        image: Any = {"bytes": encoded, "path": None}
        rows = [
            {column: [image] if column == "images" else image, "messages": [question(), answer()]},
            {column: [] if column == "images" else None, "messages": [question(), answer()]},
        ] * 4
        data = datasets.Dataset.from_list(rows, features=datasets.Features({column: feature, "messages": messages}))
        changed = between.put_into(data)
        assert changed.features == data.features
        for index, row in enumerate(rows):
            assert changed[index]["messages"] == between(row, index)["messages"]
        undecoded = datasets.Image(decode=False)
        kept = changed.cast_column(column, datasets.List(undecoded) if column == "images" else undecoded)[column]
        first = kept[0][0] if column == "images" else kept[0]
        assert first["bytes"] == encoded
        assert not kept[1]


def test_rows_without_images_stay_as_they_are(between: TextBetween):
    row = {"images": [], "messages": [question(), answer()]}
    assert all(between(row, index) == {"messages": row["messages"]} for index in range(9))


@pytest.mark.parametrize("row", [{}, {"prompt": "What?", "images": ["x"]}, {"messages": [], "images": ["x"]}])
def test_rows_without_a_chat_are_refused(between: TextBetween, row: dict[str, Any]):
    with pytest.raises(ValueError, match="Row 3 has no chat"):
        between(row, 3)


def test_no_answer_stands_in_the_text(tokenizer):
    between = TextBetween(
        tokenizer, 60, paragraphs=[f"Some words about {word}." for word in ("cats", "dogs")] * 2 + ["x " * 400]
    )
    rows = {
        "messages": [question(), answer("cats"), question(), answer("dogs")],
        "completion": [answer([{"type": "text", "text": "cats"}]), answer("dogs")],
        "prompt": [question()],
    }
    said = ""
    for row in ({"messages": rows["messages"]}, {"prompt": rows["prompt"], "completion": rows["completion"]}):
        for index in range(20):
            said += str(
                between({**row, "images": ["x"]}, index).get("prompt")
                or between({**row, "images": ["x"]}, index)["messages"][0]
            )
    assert "cats" not in said
    assert "dogs" not in said
    alone = "".join(str(between({"prompt": [question()], "images": ["x"]}, index)) for index in range(20))
    assert "cats" in alone
    assert "dogs" in alone
    solved = "".join(
        str(between({"prompt": [question()], "solution": "cats", "images": ["x"]}, index)) for index in range(20)
    )
    assert "cats" not in solved
    assert "dogs" in solved


def test_lengths(tokenizer, paragraphs: list[str]):
    """Of 4,000 rows: counts in bins that are as likely, to four standard deviations."""
    for lengths, edges in (("uniform", range(0, 1024, 128)), ("log-uniform", [2**power - 1 for power in range(10)])):
        between = TextBetween(tokenizer, 1023, lengths, paragraphs)
        drawn = [between.draw_length(index) for index in range(4000)]
        assert min(drawn) >= 0
        assert max(drawn) <= 1023
        counts = [sum(low <= length < high for length in drawn) for low, high in zip(edges, [*edges, 1024][1:])]
        expected = 4000 / len(edges)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counts), counts
        assert drawn == [between.draw_length(index) for index in range(4000)]
        other = TextBetween(tokenizer, 1023, lengths, paragraphs, seed=1)
        assert drawn != [other.draw_length(index) for index in range(4000)]


def test_a_processor_gives_its_tokenizer(tokenizer):
    class Processor:
        def __init__(self):
            self.tokenizer = tokenizer

    row = ROWS["messages"]
    assert TextBetween(Processor(), 50)(row, 1) == TextBetween(tokenizer, 50)(row, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, but must be a whole number"),
        ({"lengths": "log"}, "lengths is 'log', but must"),
    ],
)
def test_wrong_settings_are_refused(tokenizer, fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TextBetween(tokenizer, **{"max_tokens": 9, **fields})
