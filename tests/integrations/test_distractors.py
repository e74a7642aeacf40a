"""What tasks of lmms-eval need to have text between image and question. Without lmms-eval."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_pvm.integrations.lmms_eval.distractors import answers_of, into_context


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("Q", "T\n\nQ"),
        ("<image>\nQ", "<image>\nT\n\nQ"),
        ("<image> <image>\nQ", "<image> <image>\nT\n\nQ"),
        ("See <image 1> and <image 2>. Q", "See <image 1> and <image 2>\nT\n\n. Q"),
    ],
)
def test_where_a_text_goes_in_a_prompt(context, expected):
    assert into_context(context, "T") == expected


@pytest.mark.parametrize(
    ("target", "choices", "expected"),
    [
        ("cat", None, ["cat"]),
        (["cat", "a cat", "cat"], None, ["cat", "a cat"]),
        (7, None, ["7"]),
        (1, ["cat", "dog"], ["dog"]),
        ("B", ["cat", "dog"], ["dog"]),
        ("(B)", None, []),
        ("B", ["A", "B"], []),
        ("C", ["cat", "dog"], []),
        ("['cat','dog']", None, ["['cat','dog']", "cat", "dog"]),
        ("[cat", None, ["[cat"]),
        ("[cat]", None, ["[cat]"]),
        ("[1, 0]", ["cat", "dog"], ["[1, 0]", "dog", "cat"]),
        ("1", ["cat", "dog"], ["dog"]),
        ("2", ["1", "2", "3"], ["2"]),
        ("2", [1, 2, 3], ["2"]),
        ("7", ["cat", "dog"], ["7"]),
        ("2", None, ["2"]),
        ({"answer": "cat", "others": ["dog"], "count": 3}, None, ["cat", "dog", "3"]),
        (" ", None, []),
        (None, None, []),
    ],
)
def test_what_counts_as_an_answer(target, choices, expected):
    config = SimpleNamespace(doc_to_choice=choices, doc_to_target="answer")
    task = SimpleNamespace(config=config, doc_to_target=lambda doc: target, doc_to_choice=lambda doc: choices)
    assert answers_of(task, {}) == expected


def test_a_task_without_targets_has_no_answers():
    def refuse(doc):
        raise TypeError

    config = SimpleNamespace(doc_to_choice=None, doc_to_target=None)
    assert answers_of(SimpleNamespace(config=config, doc_to_target=refuse), {}) == []


@pytest.mark.parametrize("module", ["models", "lengths"])
def test_without_lmms_eval_it_says_what_to_install(without_lmms_eval, module: str):
    pytest.importorskip("matplotlib", reason="the lengths are drawn, which needs the extra lab")
    with pytest.raises(ImportError, match=r"needs lmms-eval .* pip install '\.\[eval,lab\]'"):
        importlib.import_module(f"peft_pvm.integrations.lmms_eval.{module}")


def test_the_folder_of_tasks_is_printed(capsys):
    runpy.run_module("peft_pvm.integrations.lmms_eval", run_name="__main__")
    assert (Path(capsys.readouterr().out.strip()) / "pvm_paper.yaml").is_file()
