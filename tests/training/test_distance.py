"""Texts between image and question: their length, what is not in them, where they go."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peft_pvm.training.distance import Distractors, TextBetween, has_visuals, into_messages, read_paragraphs


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
        assert drawn != [TextBetween(tokenizer, 1023, lengths, paragraphs, seed=1).draw_length(i) for i in range(4000)]


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
