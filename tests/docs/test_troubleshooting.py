"""Every error that the page quotes is one that the code can raise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]
HEADINGS = re.findall(r"^### (.+)$", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
OF_OTHERS = {
    "KeyError: 'PVM'",
    "A gate stays at zero",
    "ImportError about torchvision",
    "The version of PEFT you are using is not compatible, please use a version >= 0.22.0",
    "Model architectures ['PeftPVM…'] are not supported",
    "expected target modules in … but received ['peft_pvm_switch_…']",
}


def text_of(node: ast.AST) -> str:
    """What a string says, with a mark where it is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        return CONSTANTS.get(name, "…")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


TREES = [ast.parse(path.read_text()) for path in (REPOSITORY / "peft_pvm").rglob("*.py")]
CONSTANTS = {
    target.id: node.value.value
    for tree in TREES
    for node in tree.body
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    for target in node.targets
    if isinstance(target, ast.Name)
}
TEXTS = "\0".join(dict.fromkeys(text_of(node) for tree in TREES for node in ast.walk(tree)))


def is_said(quoted: str) -> bool:
    pattern = "[^\0]*".join(re.escape(piece.strip(" ")) for piece in quoted.split("…") if piece.strip(" "))
    return re.search(pattern, TEXTS) is not None


@pytest.mark.parametrize("quoted", [heading for heading in HEADINGS if heading not in OF_OTHERS])
def test_the_code_says_so(quoted):
    assert is_said(quoted)


def test_what_the_code_does_not_say_is_noticed():
    assert not is_said("The adapters are known to have started")
    assert not is_said("adapter_names names …, but the model has the LoRA adapters …")


def test_without_the_import_peft_says_so():
    script = "from peft import PeftModel; PeftModel.from_pretrained(None, 'adapters/pvm-tiny-vlm')"
    process = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert process.stderr.strip().endswith("KeyError: 'PVM'")
