"""A training script as `accelerate launch` starts it in the tests. It says, in a file, how the model was spread.

accelerate turns FSDP on for accelerators only: two processes on CPUs would train copies of the model, whatever the
configuration says. `shard_on_cpus` does for CPUs what `AcceleratorState` does for accelerators. All else is
accelerate's own way.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_runs import by_rank, script
from transformers import Trainer


def shard_on_cpus() -> None:
    """Have processes that were launched for FSDP train by FSDP, on CPUs too."""
    original = AcceleratorState.__init__

    def start(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start


def how_it_is_spread(trainer: Trainer) -> dict[str, Any]:
    """What this process holds of the model, and how many modules of which classes are sharded by themselves."""
    model = trainer.model_wrapped
    parameters = list(model.parameters())
    here = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    return {
        "parameters": len(parameters),
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "numbers": sum(parameter.numel() for parameter in parameters),
        "numbers_here": sum(part.numel() for part in here),
        "by_itself": Counter(type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)),
    }


def main(stage: str, report: str, *arguments: str) -> None:
    shard_on_cpus()
    torch.multinomial = by_rank
    trainer = script(stage).main(list(arguments))
    Path(f"{report}-{os.environ['RANK']}.json").write_text(json.dumps(how_it_is_spread(trainer)))
    # Python's own exit ends C++ threads that ask for its lock, which now and then aborts the process. All is saved.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
