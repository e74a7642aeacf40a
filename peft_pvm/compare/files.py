"""Questions about images from a user's own file or data set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..folders.data_file import read_image
from ..probe.rows import read_chats
from ..utils.text import plain, quoted
from .tasks import Question


def read_questions(path: str | os.PathLike, most: int) -> list[Question]:
    """The first questions of a JSON Lines file.

    Args:
        path: The file. Each line is an object as `questions_of` takes it; images are paths from the file's folder.
        most: So many questions at most.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is no such object, or its image cannot be read; the message names file and line.
    """
    name, folder = plain(os.fspath(path), 200), Path(path).parent
    with open(path, encoding="utf-8", errors="replace") as file:
        return questions_of(_rows(file, name, folder), most, name)


def _rows(lines: Iterable[str], name: str, folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{where} is not JSON: {plain(error, 200)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {quoted(row)}, but must be an object with image, question and answer.")
        sources = row.get("images") or [row.get("image")]
        yield where, {**row, "images": [_open(folder, source, where) for source in sources]}


def _open(folder: Path, source: Any, where: str) -> Any:
    if not isinstance(source, str) or not source:
        raise ValueError(f"{where} has the image {quoted(source)}, but must have the path of a file in `image`.")
    try:
        return read_image(folder / source)
    except ValueError as error:
        raise ValueError(f"{where}: '{plain(source, 200)}' {error}") from error


def questions_of(rows: Iterable[tuple[str, Mapping[str, Any]]], most: int, name: str) -> list[Question]:
    """The first questions of a data set.

    Args:
        rows: Each with where it comes from, for messages. A row has `images` or one `image`, and either `question`
            with `answer`, or `answers` of which each is accepted, or a chat as `read_chats` takes it, whose last
            message is the answer.
        most: So many at most.
        name: Where they all come from, for messages.

    Raises:
        ValueError: There are none, or a row has no image, question or answer; the message says which.
    """
    questions: list[Question] = []
    for number, (where, row) in enumerate(rows):
        if len(questions) == most:
            break
        questions.append(_question(str(number), where, row))
    if not questions:
        raise ValueError(f"{name} holds no questions.")
    return questions


def _question(name: str, where: str, row: Mapping[str, Any]) -> Question:
    if "question" in row:
        answer = row.get("answers") or row.get("answer")
        accepted = answer if isinstance(answer, list) else [answer]
        if not isinstance(row["question"], str) or not all(isinstance(one, (str, int, float)) for one in accepted):
            raise ValueError(
                f"{where} has the question {quoted(row['question'])} and the answer {quoted(answer)}, but must have a "
                "text in `question`, and in `answer` a text or number, or several in `answers`."
            )
        answers = tuple(map(str, accepted))
        row = {**row, "messages": None, "prompt": row["question"], "completion": answers[0]}
    else:
        answers = ()
    try:
        (chat,) = read_chats([row], 1)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no question about an image: {plain(error, 300)}") from error
    return Question(name, chat.images, chat.prompt, answers or (chat.answer,))
