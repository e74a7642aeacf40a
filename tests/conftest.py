"""The tables every test runs over: families of models, and methods."""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network is a broken test

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_vlms import FAMILIES, VOCAB, TinyVLM

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig
from peft_pvm.versions import CACHE


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

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Method:
    """A method under test.

    Attributes:
        config: Makes its configuration, given field values.
        activate: Makes a freshly attached adapter change the model's output.
        text_alone: What a row without images is to it: "untouched", to the bit, also beside rows with images;
            "equal", where another kernel may compute the same; or "changed".
    """

    config: Callable[..., PeftConfig]
    activate: Callable[[torch.nn.Module], None] = lambda model: None
    text_alone: Literal["untouched", "equal", "changed"] = "untouched"

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


METHODS: dict[str, Method | Combination] = {
    "pvm": Method(config=lambda **fields: PVMConfig(**{"r": 32, **fields}), activate=give_weight),
    "pvm-hidden-states": Method(
        config=lambda **fields: PVMConfig(**{"r": 32, "memory_source": "hidden_states", **fields}),
        activate=give_weight,
    ),
    "dipe": Method(config=DIPEConfig, text_alone="equal"),
    "tdrs": Method(config=TDRSConfig, text_alone="changed"),
    "tdrs-inter": Method(
        config=lambda **fields: TDRSConfig(**{"pairs": "inter", "dc_floor": 0.1, "re_floor": 0.2, **fields}),
        text_alone="equal",
    ),
    "dipe+tdrs": Combination(("dipe", "tdrs"), text_alone="changed"),
    "tdrs-inter+dipe+pvm": Combination(("tdrs-inter", "dipe", "pvm"), text_alone="equal"),
}


PROMPTS = ("t4 i t3 i t6", "t7 i t5", "t9")
REPRESENTATIVE = ("qwen3_vl", "llava", "gemma3")  # mRoPE and DeepStack; plain; sandwich norms and sliding windows
# Special tokens are not sampled: without a cache, the base would take them for images that bring no features.
GENERATE = dict(
    max_new_tokens=5,
    min_new_tokens=5,
    pad_token_id=0,
    suppress_tokens=list(range(300, VOCAB)),
    return_dict_in_generate=True,
    output_logits=True,
)
LAST = 3  # tokens decoded after the operation


@pytest.fixture(params=FAMILIES)
def family(request) -> TinyVLM:
    return FAMILIES[request.param]


@pytest.fixture(params=REPRESENTATIVE)
def tiny(request) -> TinyVLM:
    return FAMILIES[request.param]


@pytest.fixture(params=["qwen3_vl", "llava"])
def plain(request) -> TinyVLM:
    """Families whose cache can be cropped anywhere."""
    return FAMILIES[request.param]


@pytest.fixture(params=METHODS)
def method(request) -> Method | Combination:
    return METHODS[request.param]


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def in_double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def generate(tiny: TinyVLM, model: PeftModel, *prompts: str, seed: int | None = None, **kwargs):
    if seed is not None:
        torch.manual_seed(seed)
    base = model.get_base_model()
    inputs = tiny.prompt(base, *prompts)
    inputs = in_double(inputs) if base.dtype == torch.float64 else inputs
    return model.generate(**inputs, **{**GENERATE, "do_sample": False, **kwargs})


def prefill(tiny: TinyVLM, model: PeftModel, *conversations: str, stop: int | None = None, cache=None):
    inputs = tiny.inputs(model.get_base_model(), *conversations, stop=stop)
    with torch.no_grad():
        return model(**inputs, **{CACHE: cache}, use_cache=True)[CACHE]


def resume(tiny: TinyVLM, model: PeftModel, cache, conversation: str, start: int) -> torch.Tensor:
    inputs = tiny.inputs(model.get_base_model(), conversation, start=start)
    return logits(model, inputs, **{CACHE: cache}, use_cache=True)


def counted_graphs() -> tuple[list[torch.fx.GraphModule], Callable]:
    """A list, and a backend for `torch.compile` that runs graphs as they are and adds each to the list."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    return graphs, backend


def prompt_and_step(tiny: TinyVLM, base: torch.nn.Module, conversation: str) -> tuple[dict, dict]:
    """The inputs of a prompt, and those of one more token on the cache that it leaves."""
    prompt = tiny.inputs(base, conversation)
    step = dict(
        input_ids=torch.tensor([[11]]),
        position_ids=prompt["position_ids"][..., -1:] + 1,
        attention_mask=torch.ones(1, prompt["input_ids"].shape[1] + 1, dtype=torch.long),
    )
    return prompt, step


def length_of(tiny: TinyVLM, model: PeftModel, conversation: str) -> int:
    return tiny.inputs(model.get_base_model(), conversation)["input_ids"].shape[1]
