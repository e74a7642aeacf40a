"""Text between the image and the question, as many tokens of it as are asked for.

The long-context protocol of DIPE, arXiv 2603.10863: a model that answers right after the image may have lost it some
thousand tokens later.
"""

from __future__ import annotations

import ast
import os
import random
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any


VISUAL = ("image", "video")
PLACEHOLDER = re.compile(r"<image(?: \d+)?>")
# Of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Kana, Chinese characters.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
UNSPACED += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
AROUND = 16  # a cut text may become more or fewer tokens than it was cut from: so many lengths are tried on each side


def read_paragraphs(path: str | os.PathLike | None = None) -> list[str]:
    """What distractors are made of: the paragraphs of a text file, or of Python's help topics.

    Args:
        path: A text file in UTF-8, paragraphs apart by blank lines; `None`: the help topics, English prose of about
            460,000 characters. Another version of Python may word them otherwise.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no text.
    """
    if path is None:
        text = "\n\n".join(sorted(set(topics.values())))  # a few topics share one
    elif Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(f"There is no text file {path} to make distractors of.")
    paragraphs = [paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", text)]
    distinct = list(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph.strip()))
    if not distinct:
        raise ValueError(f"{path} holds no text to make distractors of.")
    return distinct


def check_tokens(tokens: Any) -> None:
    """Raise ValueError unless a text can have so many tokens."""
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"distractor_tokens is {tokens!r}, but must be a whole number of tokens, 0 for none.")


class Distractors:
    """Draws texts of one length, a different one for each document.

    Args:
        tokenizer: The tokenizer of the model.
        tokens: How many tokens each text has.
        paragraphs: What texts are put together from.
        seed: Together with the document, it decides which paragraphs come in which order.

    Raises:
        ValueError: `tokens` is no positive number.
    """

    def __init__(self, tokenizer: Any, tokens: int, paragraphs: Sequence[str], seed: int = 0):
        check_tokens(tokens)
        # The text must not open an image or end a turn.
        reserved = tokenizer.get_added_vocab()
        self.paragraphs = [text for text in paragraphs if not any(token in text for token in reserved)]
        self.tokenizer, self.tokens, self.seed = tokenizer, tokens, seed

    def draw(self, document: str, answers: Collection[str] = ()) -> str:
        """The text for a document: always the same, and for a greater length the same and more.

        It is exactly `tokens` tokens long, or, where no cut gives that, as near to it as a cut does.

        Args:
            document: What names the document, such as task, split and number.
            answers: What must not stand in the text, as words of their own, letter case and line breaks aside;
                anywhere in it, if they are of a script that puts no spaces between words.

        Raises:
            ValueError: The paragraphs without answers do not suffice.
        """
        given_away = re.compile("|".join(map(_as_words, answers)) or r"(?!)", re.IGNORECASE)
        ids = self._enough(document, given_away)
        if len(ids) < self.tokens:
            without = f" in which none of {sorted(answers)} stands" if answers else ""
            raise ValueError(
                f"distractor_tokens is {self.tokens}, but the text has only {len(ids)} tokens{without}. Give a longer "
                "one as distractor_file."
            )
        nearest: tuple[int, str] | None = None
        for step in sorted(range(-AROUND, AROUND + 1), key=abs):
            text = self._decode(ids[: max(1, self.tokens + step)])
            off = abs(self.count(text) - self.tokens)
            if (nearest is None or off < nearest[0]) and not given_away.search(text):  # a word cut short may be one
                nearest = off, text
            if nearest is not None and nearest[0] == 0:
                break
        if nearest is None:
            raise ValueError(f"No cut after about {self.tokens} tokens leaves out all of {sorted(answers)}.")
        return nearest[1]

    def _enough(self, document: str, given_away: re.Pattern[str]) -> list[int]:
        """Tokens of whole paragraphs, a few more than are wanted if there are so many."""
        order = list(self.paragraphs)
        random.Random(f"{self.seed} {document}").shuffle(order)
        chosen: list[str] = []
        length = 0
        for paragraph in order:
            if given_away.search(paragraph):
                continue
            chosen.append(paragraph)
            length += self.count(paragraph)
            # Paragraph by paragraph the count is only about right.
            if length > self.tokens + AROUND and self.count("\n\n".join(chosen)) > self.tokens + AROUND:
                break
        return self._encode("\n\n".join(chosen))

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        # verbose: a text that is cut may well be longer than the tokenizer thinks the model can take.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")  # of a character that was cut in two


def has_visuals(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chat, as a task's `doc_to_messages` gives it, shows an image or a video."""
    return any(part["type"] in VISUAL for message in messages for part in message["content"])


def into_messages(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Put a text behind the last image or video of a chat.

    Args:
        messages: As a task's `doc_to_messages` gives them: each with `role` and `content`, a list of parts with
            `type`. At least one part is visual.
        text: The distractor.

    Returns:
        New messages.

    Example:
        >>> content = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "What?"}]
        >>> (message,) = into_messages([{"role": "user", "content": content}], "...")
        >>> _, distractor, _ = message["content"]
        >>> distractor["text"]
        '...\\n\\n'
    """
    changed = [{**message, "content": list(message["content"])} for message in messages]
    number, place = max(
        (number, place)
        for number, message in enumerate(messages)
        for place, part in enumerate(message["content"])
        if part["type"] in VISUAL
    )
    changed[number]["content"].insert(place + 1, {"type": "text", "text": f"{text}\n\n"})
    return changed


def into_context(context: str, text: str) -> str:
    """Put a text behind the last placeholder of an image in a prompt, at its start if there is none.

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

    Of a list each member counts, of a dict each value. A list that is written as a string, such as "['cat', 'dog']",
    counts as it is and by its members. If the task has choices, a target that is a number among them stands for that
    choice, counted from 0; so does a string of digits, unless it is itself one of the choices; so does a letter,
    counted from A. A letter itself, such as "B" or "(B)", gives nothing away and is left out.

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


def _as_words(answer: str) -> str:
    """A pattern for an answer that no letter or digit continues; its words may be on two lines.

    Where a script without spaces begins or ends, a word may.
    """
    words = r"[^\S\n]*\n?[^\S\n]*".join(map(re.escape, answer.split()))
    spaced = rf"[^\W{UNSPACED}]"
    before = "" if re.match(f"[{UNSPACED}]", answer) else f"(?<!{spaced})"
    after = "" if re.search(f"[{UNSPACED}]$", answer) else f"(?!{spaced})"
    return f"{before}{words}{after}"
