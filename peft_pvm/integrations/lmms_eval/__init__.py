"""Evaluation with lmms-eval: its models with adapters, text between image and question, the PVM paper's tasks.

lmms-eval finds the models by itself, through the entry point `lmms_eval.models`. `models` and `lengths` need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files


MISSING = "This needs lmms-eval and more, which extras bring: pip install '.[eval,lab]' in a checkout of peft_pvm."
TESTED = "0.7.3"  # of lmms-eval
SEPARATOR = "+"  # of adapters in one argument; a comma would end the argument, a semicolon the shell's command


def tasks_folder() -> str:
    """The folder to give to lmms-eval as `--include_path`; `python -m peft_pvm.integrations.lmms_eval` prints it."""
    return str(files(__package__) / "tasks")


def separate(adapter: str | Sequence[str]) -> list[str]:
    """The adapters in an argument: those of a sequence, or of a string with `+` between.

    Raises:
        ValueError: One of them has no name.

    Example:
        >>> separate("my-pvm+adapters/dipe")
        ['my-pvm', 'adapters/dipe']
    """
    parts = list(map(str, adapter)) if isinstance(adapter, (list, tuple)) else str(adapter).split(SEPARATOR)
    if not all(part.strip() for part in parts):
        raise ValueError(f"adapter is {adapter!r}, but must be folders or Hub ids, with {SEPARATOR} between.")
    return parts
