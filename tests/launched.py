"""`accelerate launch` of a training script, which says, in a file, how the model was spread.

The processes are forks of this one, so that it alone imports everything, which takes most of a short run's time.
accelerate turns FSDP on for accelerators only: two processes on CPUs would train copies of the model, whatever the
configuration says. `shard_on_cpus` does for CPUs what `AcceleratorState` does for accelerators. All else is
accelerate's own way.

`python tests/launched.py --config_file CONFIG launched.py STAGE REPORT ARGUMENT...`
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.commands.launch
import torch
import torch.distributed.run
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.launcher.api import LaunchConfig
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


def train(stage: str, report: str, *arguments: str) -> None:
    """What each process does."""
    shard_on_cpus()
    torch.multinomial = by_rank
    trainer = script(stage).main(list(arguments))
    Path(f"{report}-{os.environ['RANK']}.json").write_text(json.dumps(how_it_is_spread(trainer)))


def launch() -> None:
    """`accelerate launch` with this process's arguments."""
    start = torch.distributed.run.config_from_args

    def in_forks(args: Namespace) -> tuple[LaunchConfig, Callable[..., None], list[str]]:
        config, _, (_, _, *arguments) = start(args)  # without buffering, this file, its arguments
        config.start_method = "fork"
        script(arguments[0])  # imports what it needs
        return config, train, arguments

    torch.distributed.run.config_from_args = in_forks
    accelerate.commands.launch.main()


if __name__ == "__main__":
    launch()
