"""Every damaged folder is either refused well or loads without harm: what that means, and who looks."""

from __future__ import annotations

import copy
import logging
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from forwards import logits
from huggingface_hub import ModelCard
from methods_under_test import give_weight
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from tiny_vlms import FAMILIES
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig, hotswap_adapter
from peft_pvm.folders.inspection import inspect_adapter
from peft_pvm.folders.writing import card_text, read_results
from peft_pvm.methods.pvm.checkpoints import merge_adapters
from peft_pvm.utils.text import LONGEST

from .mutations import MUTATIONS, read_config


# What loading may raise, and with what messages. docs/troubleshooting.md says the same.
REFUSALS = (ValueError, FileNotFoundError, NotImplementedError)
SHORTEST = 25  # characters: less says nothing
SECONDS = 20  # for one folder; most take a fraction of one
OURS = ("PVM", "DIPE", "TDRS")
PEFT_TYPES = {"pvm": "PVM", "branches": "PVM", "modules": "PVM", "dipe": "DIPE", "tdrs": "TDRS", "lora": "LORA"}


@dataclass
class Report:
    """What came of the folders.

    Attributes:
        outcomes: How often, by outcome: "loaded", "refused" or "of others".
        faults: What must not be, with the seed that makes the folder again.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Hang(Exception):
    """A folder took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise Hang(f"after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Harness:
    """Whole adapters of each kind and a base model, to be damaged and loaded.

    Args:
        workplace: A folder for them.
        family: The base model's.
    """

    def __init__(self, workplace: Path, family: str = "llava"):
        self.workplace = workplace
        tiny = FAMILIES[family]
        self.base = tiny.build()
        self.inputs = tiny.inputs(self.base, "t4 i t3")
        self.expected = logits(self.base, self.inputs)
        self.tensors = {name: tensor.clone() for name, tensor in self.base.state_dict().items()}
        save_file({name: tensor.clone() for name, tensor in self.tensors.items()}, workplace / "base.safetensors")
        configs = {
            "pvm": PVMConfig(r=32, layers_to_transform=[0, 2]),
            "modules": PVMConfig(r=32, layers_to_transform=[1], modules_to_save=["lm_head"]),
            "dipe": DIPEConfig(max_distance=0),
            "tdrs": TDRSConfig(),
            "lora": LoraConfig(r=2, target_modules=["q_proj"]),
        }
        for kind, config in configs.items():
            self._save(get_peft_model(copy.deepcopy(self.base), config), workplace / kind)
        model = get_peft_model(copy.deepcopy(self.base), PVMConfig(r=16, layers_to_transform=[1]), "a")
        model.add_adapter("b", PVMConfig(r=32, layers_to_transform=[1, 2]))
        model.add_weighted_adapter(["a", "b"], [0.5, 1.0], "both", combination_type="cat")
        model.delete_adapter("a")
        model.delete_adapter("b")
        self._save(model, workplace / "saved", "both")
        shutil.copytree(workplace / "saved" / "both", workplace / "branches")
        self.entries: dict[str, Callable[[PreTrainedModel, Path], torch.nn.Module | None]] = {
            "from_pretrained": PeftModel.from_pretrained,
            "for training": lambda model, folder: PeftModel.from_pretrained(model, folder, is_trainable=True),
            "low_cpu_mem_usage": lambda model, folder: PeftModel.from_pretrained(
                model, folder, low_cpu_mem_usage=True
            ),
            "transformers": self._by_transformers,
            "a second adapter": self._as_a_second_one,
            "new weights": self._as_new_weights,
            "hotswap": self._hotswapped,
            "tools": self._by_tools,
        }

    def _save(self, model: PeftModel, folder: Path, *names: str) -> None:
        give_weight(model)
        model.save_pretrained(folder, selected_adapters=list(names) or None)

    def _by_transformers(self, model: PreTrainedModel, folder: Path) -> torch.nn.Module:
        model.load_adapter(str(folder))
        return model

    def _as_a_second_one(self, model: PreTrainedModel, folder: Path) -> torch.nn.Module:
        peft_model = PeftModel.from_pretrained(model, self.workplace / "pvm", "first")
        peft_model.load_adapter(folder, "second")
        peft_model.set_adapter("second")
        return peft_model

    def _as_new_weights(self, model: PreTrainedModel, folder: Path) -> torch.nn.Module:
        peft_model = PeftModel.from_pretrained(model, self.workplace / self.kind)
        peft_model.load_adapter(folder, "default")
        return peft_model

    def _hotswapped(self, model: PreTrainedModel, folder: Path) -> torch.nn.Module:
        peft_model = PeftModel.from_pretrained(model, self.workplace / "pvm")
        hotswap_adapter(peft_model, folder, "default")
        return peft_model

    def _by_tools(self, model: PreTrainedModel, folder: Path) -> None:
        inspect_adapter(folder)
        config = PeftConfig.from_pretrained(folder)
        ModelCard(card_text(config, read_results(folder)))
        if isinstance(config, PVMConfig) and not config.modules_to_save:
            merge_adapters([folder, folder], [0.5, 0.5], self.workplace / "merged", combination_type="cat")

    def run(self, folders: int, seed: int, report: Report | None = None) -> Report:
        """Make folders, and load each.

        Args:
            folders: How many.
            seed: Of the first; they are numbered on.
            report: To add to.
        """
        report = report or Report()
        logging.disable(logging.ERROR)
        disable_progress_bar()
        # What no test asserts on: PEFT and transformers warn of much that is refused afterwards.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(seed, seed + folders):
                self.attempt(number, report)
        logging.disable(logging.NOTSET)
        return report

    def attempt(self, seed: int, report: Report) -> None:
        """Make one folder by its seed, load it, and add to a report what came of it."""
        random = Random(seed)
        self.kind = random.choice(sorted(PEFT_TYPES))
        with tempfile.TemporaryDirectory(dir=self.workplace) as workplace:
            folder = Path(workplace) / "adapter"
            shutil.copytree(self.workplace / self.kind, folder)
            (Path(workplace) / "base.safetensors").symlink_to(self.workplace / "base.safetensors")
            names = [random.choice(sorted(MUTATIONS)) for _ in range(random.choice((1, 1, 1, 2, 3)))]
            for name in names:
                MUTATIONS[name](folder, random)
            entry = random.choice(sorted(self.entries))
            label = f"seed {seed}, {self.kind}, {' + '.join(names)}, {entry}"
            try:
                with time_limit(SECONDS):
                    report.outcomes[self._outcome(folder, entry)] += 1
            except (Exception, RecursionError, MemoryError) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"
                report.faults.append(f"{label}: {said}")

    def _outcome(self, folder: Path, entry: str) -> str:
        model = copy.deepcopy(self.base)
        peft_type = read_config(folder).get("peft_type")
        if entry == "new weights":  # PEFT does not look at the configuration
            peft_type = PEFT_TYPES[self.kind]
        is_of_others = isinstance(peft_type, str) and peft_type not in OURS and entry not in ("hotswap", "tools")
        if is_of_others and any(path.is_fifo() for path in folder.iterdir()):  # PEFT waits for one to write to it
            return "of others"
        before = state_of(model)
        try:
            loaded = self.entries[entry](model, folder)
        except REFUSALS as error:
            if is_of_others:
                return "of others"
            said = str(error)
            assert SHORTEST <= len(said) <= LONGEST, f"a message of {len(said)} characters: {said[:200]}"
            assert all(c.isprintable() or c == "\n" for c in said), f"a message with {set(said)}"
            if entry not in ("a second adapter", "new weights", "hotswap"):  # before which a whole one was attached
                assert state_of(model) == before, f"refused, but left behind {difference(state_of(model), before)}"
            self._check_base(model)
            return "refused"
        except Exception:
            if is_of_others:
                return "of others"
            raise
        if is_of_others:
            return "of others"
        if loaded is not None:
            assert logits(loaded.eval(), self.inputs).isfinite().all(), "loaded, but what it computes is not finite"
        self._check_base(model)
        return "loaded"

    def _check_base(self, model: PreTrainedModel) -> None:
        """See that the base's tensors and, without adapters, its output are what they were, to the bit."""
        found = {name.replace(".original_module.", "."): tensor for name, tensor in model.state_dict().items()}
        changed = [name for name, tensor in self.tensors.items() if not torch.equal(found[name], tensor)]
        assert not changed, f"tensors of the base were changed: {changed}"
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module.enable_adapters(False)
        assert torch.equal(logits(model.eval(), self.inputs), self.expected), "with adapters off, the base has changed"


def state_of(model: torch.nn.Module) -> dict[str, object]:
    """Everything about a model that a refused adapter must leave as it was, but for numbers."""
    return {
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "tensors": sorted(model.state_dict()),
        "adapters": sorted(getattr(model, "peft_config", {})),
        "transformers": getattr(model, "_hf_peft_config_loaded", False),
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "own methods": sorted(name for name in vars(model) if callable(vars(model)[name])),
        "training": model.training,
    }


def difference(after: dict[str, object], before: dict[str, object]) -> dict[str, object]:
    """What differs between two states, in short."""
    return {name: str(value)[-200:] for name, value in after.items() if value != before[name]}


def say(report: Report) -> None:
    """Print a report."""
    print(", ".join(f"{name}: {count}" for name, count in sorted(report.outcomes.items())))
    print(f"{len(report.faults)} faults", *report.faults[:50], sep="\n", file=sys.stdout)
