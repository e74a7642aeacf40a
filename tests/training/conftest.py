from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    from training_runs import make_material  # here: it skips what needs the extra `train`

    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def stage_1(material: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PVM adapter, hardly trained."""
    from training_runs import run

    folder = tmp_path_factory.mktemp("stage_1")
    run("sft", material, output_dir=folder, max_steps=2)
    return folder
