"""Text between the image and the question, as many tokens of it as are asked for.

The long-context protocol of DIPE, arXiv 2603.10863: a model that answers right after the image may have lost it some
thousand tokens later.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any


VISUAL = ("image", "video")
# Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Kana, Chinese characters.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
UNSPACED += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
CHOICE = re.compile(r"\(?[A-Za-z][).:]?")
SPACED = rf"[^\W{UNSPACED}]"  # a letter or digit of all other scripts
AROUND = 16  # a cut text may become more or fewer tokens than it was cut from: so many lengths are tried on each side


def read_paragraphs(path: str | os.PathLike | None = None) -> list[str]:
    """What distractors are made of: the paragraphs of a text file, or of Python's help topics.

    Args:
        path: A text file in UTF-8, with blank lines between paragraphs; `None`: the help topics, English prose of
            about 460,000 characters. Another version of Python may word them otherwise.

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


def check_tokens(tokens: Any, name: str = "distractor_tokens") -> None:
    """Raise ValueError unless a text can have this many tokens; `name` is the argument's, for the message."""
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"{name} is {tokens!r}, but must be a whole number of tokens, 0 for none.")


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

    def draw(self, document: str, answers: Collection[str] = (), tokens: int | None = None) -> str:
        """The text for a document: always the same, and for a greater length the same and more.

        It has exactly the number of tokens asked for. If no cut of the text gives this number, it has the nearest one.

        Args:
            document: What names the document, such as task, split and number.
            answers: What must not be in the text as separate words, whatever their letter case and line breaks. In a
                script that puts no spaces between words, it must not be anywhere in the text. The letter of a choice,
                such as "B" or "(b)", is ignored: it gives nothing away, and no text would be without it.
            tokens: How many tokens the text has. `None`: `tokens` of the class.

        Raises:
            ValueError: The paragraphs without answers do not suffice.
        """
        tokens = self.tokens if tokens is None else tokens
        answers = [answer for answer in answers if not CHOICE.fullmatch(answer.strip())]
        given_away = _any_of(answers)
        ids = self._enough(document, tokens, given_away)
        if len(ids) < tokens:
            without = f" in which none of {sorted(answers)} occurs" if answers else ""
            raise ValueError(
                f"A distractor of {tokens} tokens is asked for, but the text has only {len(ids)}{without}. Give a "
                "longer one (distractor_file, paragraphs)."
            )
        nearest: tuple[int, str] | None = None
        for step in sorted(range(-AROUND, AROUND + 1), key=abs):
            text = self._decode(ids[: max(1, tokens + step)])
            off = abs(self.count(text) - tokens)
            if (nearest is None or off < nearest[0]) and not given_away.search(text):  # a word cut short may be one
                nearest = off, text
            if nearest is not None and nearest[0] == 0:
                break
        if nearest is None:
            raise ValueError(f"No cut after about {tokens} tokens leaves out all of {sorted(answers)}.")
        return nearest[1]

    def _enough(self, document: str, tokens: int, given_away: re.Pattern[str]) -> list[int]:
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
            if length > tokens + AROUND and self.count("\n\n".join(chosen)) > tokens + AROUND:
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
    """Whether the parts of a chat's messages show an image or a video."""
    return any(part["type"] in VISUAL for message in messages for part in parts_of(message))


def parts_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The parts of a message; one that is only a text has none."""
    content = message["content"]
    return [] if isinstance(content, str) else content


def into_messages(messages: Sequence[Mapping[str, Any]], text: str, ending: str = "\n\n") -> list[dict[str, Any]]:
    """Put a text after the last image or video of a chat.

    Args:
        messages: Each with `role` and `content`, a list of parts with `type`. At least one part is visual.
        text: The distractor.
        ending: What comes after it.

    Returns:
        New messages.

    Example:
        >>> content = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "What?"}]
        >>> (message,) = into_messages([{"role": "user", "content": content}], "...")
        >>> _, distractor, _ = message["content"]
        >>> distractor["text"]
        '...\\n\\n'
    """
    changed = [dict(message) for message in messages]
    number, place = max(
        (number, place)
        for number, message in enumerate(messages)
        for place, part in enumerate(parts_of(message))
        if part["type"] in VISUAL
    )
    parts = list(parts_of(messages[number]))
    changed[number]["content"] = [
        *parts[: place + 1],
        {"type": "text", "text": f"{text}{ending}"},
        *parts[place + 1 :],
    ]
    return changed


def _any_of(answers: Collection[str]) -> re.Pattern[str]:
    """A pattern for answers that no letter or digit continues; their words may be on two lines.

    Where a script without spaces begins or ends, a word may.
    """
    by_ends: dict[tuple[str, str], list[str]] = {}
    for answer in answers:
        before = "" if re.match(f"[{UNSPACED}]", answer) else f"(?<!{SPACED})"
        after = "" if re.search(f"[{UNSPACED}]$", answer) else f"(?!{SPACED})"
        words = r"[^\S\n]*\n?[^\S\n]*".join(map(re.escape, answer.split()))
        by_ends.setdefault((before, after), []).append(words)
    # Python takes long over each mention of the scripts, above all with letter case aside.
    each = (f"{before}(?i:{'|'.join(words)}){after}" for (before, after), words in by_ends.items())
    return re.compile("|".join(each) or r"(?!)")
