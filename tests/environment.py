"""The settings that every test, and every script under tests/, runs with.

`conftest.py` and the modules of helpers import this before PEFT, transformers and torch, so that it also acts in the
processes that tests start.
"""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network is a broken test

import peft
import pytest
import torch
import transformers
from packaging.version import Version


torch.set_num_threads(1)  # tests run side by side
DEVICE = os.environ.get("PEFT_PVM_TEST_DEVICE", "cpu")  # where models and tensors are made: `make test-gpu`
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False
on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a CPU, or tests/test_on_cuda.py, shows it")
# transformers 5.24 asks for a PEFT that has not been released. Its adapter methods are tested without that bound.
if Version(peft.__version__) < Version(transformers.integrations.peft.MIN_PEFT_VERSION):
    transformers.integrations.peft.MIN_PEFT_VERSION = peft.__version__
transformers.logging.set_verbosity_error()
