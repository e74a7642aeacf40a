"""The methods that every test runs over, alone and together, and what attaches them to a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import environment  # noqa: F401  # its settings act before PEFT is imported
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_pvm import CAIConfig, DIPEConfig, LogBiasConfig, MemVRConfig, PVMConfig, TDRSConfig, VARConfig
from peft_pvm.methods import METHODS as PACKAGED
from peft_pvm.tuners.attention_method import AttentionMethod


@dataclass(frozen=True)
class Method:
    """A method under test.

    Attributes:
        config: Makes its configuration, given field values.
        activate: Makes a freshly attached adapter change the model's output.
        text_alone: What a row without images is to it: "untouched", to the bit, also beside rows with images;
            "equal", where another kernel may compute the same; or "changed".
        least_tokens: How many visual tokens a row has in which it acts.
    """

    config: Callable[..., PeftConfig]
    activate: Callable[[torch.nn.Module], None] = lambda model: None
    text_alone: Literal["untouched", "equal", "changed"] = "untouched"
    least_tokens: int = 1

    def attach(self, model: torch.nn.Module, adapter_name: str = "default", **fields) -> PeftModel:
        peft_model = get_peft_model(model, self.config(**fields), adapter_name)
        self.activate(peft_model)
        return peft_model.eval()


class Together(torch.nn.Module):
    """Several adapters on one model, each in a PeftModel of its own, used as if they were one.

    Args:
        model: The base model.
        methods: What is attached, in this order, by name.
    """

    def __init__(self, model: torch.nn.Module, **methods: Method):
        super().__init__()
        self.peft_models = torch.nn.ModuleList(method.attach(model, name) for name, method in methods.items())

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.get_base_model(), name)

    def get_base_model(self) -> torch.nn.Module:
        return self.peft_models[0].get_base_model()

    @contextlib.contextmanager
    def disable_adapter(self):
        with contextlib.ExitStack() as stack:
            for peft_model in self.peft_models:
                stack.enter_context(peft_model.disable_adapter())
            yield

    def state_dict(self, *args, **kwargs):
        return self.peft_models[0].state_dict(*args, **kwargs)

    def unload(self) -> torch.nn.Module:
        for peft_model in self.peft_models:
            model = peft_model.unload()
        return model


@dataclass(frozen=True)
class Combination:
    """Several methods under test as one, by name."""

    methods: tuple[str, ...]
    text_alone: Literal["untouched", "equal", "changed"]
    least_tokens = 1

    def attach(self, model: torch.nn.Module) -> Together:
        return Together(model, **{name: METHODS[name] for name in self.methods}).eval()


def give_weight(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every PVM weight at a scale at which the branch matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".pvm_" in name:
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                if parameter.dim() == 2:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter.copy_((0.5 if "pvm_gate." in name else 1.0) + 0.1 * noise)


# By name: the methods that change attention, and all. A test that is about methods in general runs over these. Those
# that do not act in forwards have tests of their own.
PUBLISHED = tuple(row.config.method for row in PACKAGED if row.acts_in_forwards)
STEERING = tuple(
    row.config.method for row in PACKAGED if row.acts_in_forwards and issubclass(row.config, AttentionMethod)
)
# Of these every property is tested on every family. Others differ in the stages that they add: theirs are tested on
# the representative families, and in short on all (test_architectures.py).
LEADING = ("pvm", "dipe", "tdrs")
# One of each kind, with parameters or without.
FIRST_OF_KIND = tuple({(row.changes, row.needs_training): row.config.method for row in reversed(PACKAGED)}.values())
# One of each kind of stage, but for a second that decides the weights, and PVM: these act in one layer together.
TOGETHER = tuple(name for name in PUBLISHED if name not in ("pai", "hgai", "cai", "memvr"))


def _acting(config: type[PeftConfig]) -> Callable[..., PeftConfig]:
    """A method that acts on a few tokens of text and on random weights: DIPE as it was published, without a limit;
    CAI and MemVR on every token."""
    fixed = {
        DIPEConfig: {"max_distance": 0},
        LogBiasConfig: {"t0": 1.0},
        CAIConfig: {"threshold": 0},
        MemVRConfig: {"threshold": 0},
        # In each family, some visual tokens are sinks and some are not.
        VARConfig: {"sink_channels": [28, 39], "tau": 1.0, "rho": 0.9, "least_visual": 0.05, "p": 0.1},
    }.get(config, {})
    return lambda **fields: config(**{**fixed, **fields})


METHODS: dict[str, Method | Combination] = {
    "pvm": Method(config=lambda **fields: PVMConfig(**{"r": 32, **fields}), activate=give_weight),
    "pvm-hidden-states": Method(
        config=lambda **fields: PVMConfig(**{"r": 32, "memory_source": "hidden_states", **fields}),
        activate=give_weight,
    ),
    **{
        row.config.method: Method(
            config=_acting(row.config),
            text_alone=row.text_alone,
            least_tokens=2 if row.config is VARConfig else 1,  # one that gives, and one that takes
        )
        for row in PACKAGED
        if row.acts_in_forwards and not row.needs_training
    },
    "dipe-limited": Method(config=lambda **fields: DIPEConfig(**{"max_distance": 1, **fields}), text_alone="equal"),
    "dipe-image": Method(
        config=lambda **fields: DIPEConfig(**{"max_distance": 1, "anchor": "image", "image_gap": 1, **fields}),
        text_alone="equal",
    ),
    "tdrs-inter": Method(
        config=lambda **fields: TDRSConfig(**{"pairs": "inter", "dc_floor": 0.1, "re_floor": 0.2, **fields}),
        text_alone="equal",
    ),
    "dipe+tdrs": Combination(("dipe", "tdrs"), text_alone="changed"),
    "tdrs-inter+dipe+pvm": Combination(("tdrs-inter", "dipe", "pvm"), text_alone="equal"),
}
