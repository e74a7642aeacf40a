"""Evaluation with lmms-eval: its models with adapters, text between image and question, the PVM paper's tasks.

lmms-eval finds the models by itself, through the entry point `lmms_eval.models`. `models` and `lengths` need it.
"""

from __future__ import annotations

from importlib.resources import files


MISSING = "This needs lmms-eval and more, which extras bring: pip install '.[eval,lab]' in a checkout of peft_pvm."
TESTED = "0.7.3"  # of lmms-eval


def tasks_folder() -> str:
    """The folder to give to lmms-eval as `--include_path`; `python -m peft_pvm.integrations.lmms_eval` prints it."""
    return str(files(__package__) / "tasks")
