"""Text between image and question in lmms-eval's tasks: where it is put, and what it must not contain."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any


PLACEHOLDER = re.compile(r"<image(?: \d+)?>")


def into_context(context: str, text: str) -> str:
    """Put a text after the last placeholder of an image in a prompt, or at its start if there is none.

    Args:
        context: The prompt. Images without placeholders come before it.
        text: The distractor.

    Example:
        >>> into_context("<image>\\nWhat?", "Long ago ...")
        '<image>\\nLong ago ...\\n\\nWhat?'
    """
    end = max((match.end() for match in PLACEHOLDER.finditer(context)), default=0)
    head = f"{context[:end]}\n" if end else ""
    return f"{head}{text}\n\n{context[end:].lstrip()}"


def answers_of(task: Any, doc: Mapping[str, Any]) -> list[str]:
    """What a distractor for a document must not contain: its targets, as far as text can give them away.

    If a target is a list, each member counts, and if it is a dict, each value. A list that is written as a string,
    such as "['cat', 'dog']", counts both as this string and by its members. If the task has choices, a number stands
    for the choice with this index, from 0. So does a string of digits, unless it is itself one of the choices. A
    letter stands for the choice with this place, from A. The letter itself, such as "B" or "(B)", gives nothing away
    and is left out.

    Args:
        task: One of lmms-eval's. Without a `doc_to_target` it has no targets.
        doc: The document.
    """
    if task.config.doc_to_target is None:
        return []
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    answers = _spelt(task.doc_to_target(doc), list(map(str, choices)))
    return list(dict.fromkeys(text.strip() for text in answers if re.search(r"\w", text)))


def _spelt(target: Any, choices: Sequence[str]) -> list[str]:
    if target is None:  # some test sets keep their answers
        return []
    if isinstance(target, Mapping):
        return _spelt(list(target.values()), choices)
    if isinstance(target, (list, tuple)):
        return [text for one in target for text in _spelt(one, choices)]
    text = str(target).strip()
    number = int(text) if isinstance(target, int) or (text.isdecimal() and text not in choices) else -1
    if 0 <= number < len(choices):
        return [choices[number]]
    if letter := re.fullmatch(r"\(?([A-Za-z])[).:]?", text):
        number = ord(letter[1].upper()) - ord("A")
        return [choice for choice in choices[number : number + 1] if len(choice) > 1]
    return [text, *_spelt(_written_list(text), choices)]


def _written_list(text: str) -> list[Any]:
    """The list that a string is, or an empty one."""
    if not (text.startswith("[") and text.endswith("]")):
        return []
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, ValueError):  # brackets around something else
        return []
