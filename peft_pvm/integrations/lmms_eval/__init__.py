"""Evaluation with lmms-eval: its models with adapters, text between image and question, the PVM paper's tasks.

lmms-eval finds the models by itself, through the entry point `lmms_eval.models`. `models` and `lengths` need it.
"""

from __future__ import annotations

import os
from importlib.resources import files


SEPARATOR = "+"  # of adapters in one argument; a comma would end the argument, a semicolon the shell's command


def tasks_folder() -> str:
    """The folder to give to lmms-eval as `--include_path`; `python -m peft_pvm.integrations.lmms_eval` prints it."""
    return os.fspath(files(__package__) / "tasks")  # type: ignore[call-overload]
