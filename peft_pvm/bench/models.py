"""What is measured: models of real shapes with random weights, their bytes on paper, and the methods on them.

Each method is also measured in its plain form, as one would write it at first: the same numbers, without what makes
them fast.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.initialization import no_init_weights

from .. import methods
from ..attention.reference import ReferenceStages
from ..methods.pvm import PVMConfig
from ..methods.pvm.branch import PlainBranch
from ..methods.pvm.config import BranchShape
from ..methods.pvm.layer import PVMLayer
from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import find_vlm
from ..tuners.in_generate import InGenerate
from ..tuners.loading import add_adapters


PAPER_SHARE = 3 / 36  # of the decoder layers have a branch
PAPER_WIDTH = 512 / 4096  # of a branch, in hidden sizes


@dataclass(frozen=True)
class Shape:
    """The text model of a Qwen3-VL.

    Attributes:
        title: What it stands for.
        layers: Number of decoder layers.
        hidden_size: The width of the residual stream.
        intermediate_size: The width of the FFN.
        heads: The number of query heads.
        kv_heads: The number of key and value heads.
        head_dim: Width of a head.
        vocab_size: Number of tokens.
        ties_embeddings: Whether the output layer shares its weights with the input embeddings.
    """

    title: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    ties_embeddings: bool

    def part(self, layers: int) -> Shape:
        """The shape with fewer decoder layers and the same share of the vocabulary.

        So the output layer keeps its share of the work.

        Raises:
            ValueError: It has fewer layers.
        """
        if not 0 < layers <= self.layers:
            raise ValueError(f"layers is {layers}, but {self.title} has 1 to {self.layers}.")
        return dataclasses.replace(self, layers=layers, vocab_size=self.vocab_size * layers // self.layers)

    def config(self, layers: int | None = None) -> Qwen3VLConfig:
        """The configuration, with a vision tower as small as it gets: it is not measured.

        Args:
            layers: Of a `part` with this many decoder layers.

        Raises:
            ValueError: The shape has fewer layers.
        """
        if layers is not None:
            return self.part(layers).config()
        quarter = self.head_dim // 2 // 4
        text = dict(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=262_144,
            tie_word_embeddings=self.ties_embeddings,
            pad_token_id=0,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [self.head_dim // 2 - 2 * quarter, quarter, quarter],
                "mrope_interleaved": True,
            },
        )
        vision = dict(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=1,
            out_hidden_size=self.hidden_size,
            deepstack_visual_indexes=[],
        )
        ids = dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=self.ties_embeddings, **ids)


PRESETS = {
    "tiny": Shape("a model of 6 layers of width 128", 6, 128, 384, 4, 2, 32, 512, True),
    "1b-random": Shape("16 of the 28 layers of Qwen3-VL-2B", 16, 2048, 6144, 16, 8, 128, 151_936, True),
    "2b-random": Shape("Qwen3-VL-2B", 28, 2048, 6144, 16, 8, 128, 151_936, True),
    "8b-random": Shape("Qwen3-VL-8B", 36, 4096, 12288, 32, 8, 128, 151_936, False),
    "32b-random": Shape("Qwen3-VL-32B", 64, 5120, 25600, 64, 8, 128, 151_936, False),
}


def _shape(preset: str) -> Shape:
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}.")
    return PRESETS[preset]


def build_random(
    preset: str | Shape, layers: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """A model of one of `PRESETS` with random weights.

    Args:
        preset: Its name, or another shape.
        layers: Fewer decoder layers: see `Shape.part`.
        dtype: The dtype of the weights.
        device: The device of the weights.

    Raises:
        ValueError: There is no such preset, or it has fewer layers.
    """
    config = (preset if isinstance(preset, Shape) else _shape(preset)).config(layers)
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    fill_at_random(model)
    return model.eval()


@torch.no_grad()
def fill_at_random(model: nn.Module) -> None:
    """Overwrite all weights with normal numbers, matrices of deviation 0.02: the same few million over and over.

    Drawing billions of numbers takes minutes, and what is measured does not depend on them.
    """
    weights = {parameter: name for name, parameter in model.named_parameters()}
    draws: dict[Any, torch.Tensor] = {}
    for parameter in weights:
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        kind = (parameter.dtype, parameter.device)
        if kind not in draws:
            generator = torch.Generator(parameter.device).manual_seed(0)
            numbers = torch.empty(2**22 + 1, dtype=parameter.dtype, device=parameter.device)
            draws[kind] = numbers.normal_(std=0.02, generator=generator)
        flat = parameter.view(-1)
        for part in flat.split(draws[kind].numel()):
            part.copy_(draws[kind][: part.numel()])


def load(model: str, dtype: torch.dtype, device: str, attn_implementation: str) -> nn.Module:
    """A vision-language model from a folder or the Hub.

    Raises:
        OSError: There is none.
    """
    kwargs = dict(dtype=dtype, device_map=device, attn_implementation=attn_implementation)
    try:
        return AutoModelForImageTextToText.from_pretrained(model, **kwargs).eval()
    except OSError as error:
        raise OSError(f"{model}: {error}") from error


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its tensors, but not its hooks and adapters."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model and of PVM at the paper's proportions.

    Attributes:
        weights: What a step of decoding reads of the base: all but the vision tower and the input embeddings.
        input_embeddings: What these take where the output layer does not share them.
        cache: What a token takes in the KV cache.
        pvm_weights: What it reads of PVM: all but the projections of the memory.
        projections: PVM's keys and values, for a visual token.
        embeddings: What is kept of a visual token to project it with another adapter.
        bytes_of_a_number: 2 for bf16.
    """

    weights: int
    input_embeddings: int
    cache: int
    pvm_weights: int
    projections: int
    embeddings: int
    bytes_of_a_number: int

    def kept(self, context: int, visual_tokens: int) -> tuple[int, int, int]:
        """What a conversation keeps: KV cache, PVM's keys and values, embeddings."""
        return self.cache * context, self.projections * visual_tokens, self.embeddings * visual_tokens

    def held(self, context: int, visual_tokens: int, batch: int) -> tuple[int, int]:
        """What memory holds at least to decode a batch: of the base without its vision tower, and of PVM."""
        cache, *of_pvm = self.kept(context, visual_tokens)
        return self.weights + self.input_embeddings + batch * cache, self.pvm_weights + batch * sum(of_pvm)

    def read(self, context: int, visual_tokens: int, batch: int) -> tuple[int, int]:
        """What a step of decoding a batch reads: of the base, and of PVM beyond that."""
        base = self.weights + batch * self.cache * context
        return base, self.pvm_weights + batch * self.projections * visual_tokens


def footprint(preset: str | Shape, branches: int | None = None, bytes_of_a_number: int = 2) -> Footprint:
    """The footprint of a shape.

    Args:
        preset: The shape, or its name among `PRESETS`.
        branches: How many decoder layers, from the first on, have a branch; by default as many as in the paper.
        bytes_of_a_number: 2 for bf16.

    Raises:
        ValueError: There is no such preset, or it has fewer layers.
    """
    of_preset = preset if isinstance(preset, Shape) else _shape(preset)
    if branches is not None and not 1 <= branches <= of_preset.layers:
        raise ValueError(f"branches is {branches}, but {of_preset.title} has 1 to {of_preset.layers} decoder layers.")
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(of_preset.config())
        vlm, config = find_vlm(model), pvm_config(model)
        if branches is not None:
            config = dataclasses.replace(config, layers_to_transform=list(range(branches)))
        text = vlm.text_config
        read, embeddings = sum(parameter.numel() for parameter in vlm.text_model.parameters()), 0
        if not of_preset.ties_embeddings:  # a step reads the output layer, and of the input embeddings a row
            embeddings = model.get_input_embeddings().weight.numel()
            read += model.lm_head.weight.numel() - embeddings
        wrapped = PeftModel(model, config)
    shape = BranchShape.of(config, text)
    own = [
        parameter.numel()
        for name, parameter in wrapped.named_parameters()
        if ".pvm_" in name and not any(f".pvm_{part}." in name for part in ("vision_reducer", "k_proj", "v_proj"))
    ]
    number = len(config.layer_indices)
    return Footprint(
        weights=bytes_of_a_number * read,
        input_embeddings=bytes_of_a_number * embeddings,
        cache=bytes_of_a_number * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim,
        pvm_weights=bytes_of_a_number * sum(own),
        projections=bytes_of_a_number * 2 * number * shape.num_key_value_heads * shape.head_dim,
        embeddings=bytes_of_a_number * text.hidden_size,
        bytes_of_a_number=bytes_of_a_number,
    )


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: What the table says.
        adapters: Each makes a configuration, given the model.
        is_naive: Whether the adapters work as one would write them at first.
        whole_matrices: How many matrices of scores of all heads, in fp32, it holds at once.
        given: Settings by which it acts on any model and prompt.
        in_forwards: Whether it changes a forward over a whole text.
        in_generate: Whether it acts only in `generate`.
    """

    title: str
    adapters: tuple[Callable[[nn.Module], Any], ...] = ()
    is_naive: bool = False
    whole_matrices: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)
    in_forwards: bool = True
    in_generate: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether it is one method in its usual form, or the base."""
        return not self.is_naive and len(self.adapters) < 2

    def attach(self, model: nn.Module) -> None:
        """Put it on a model from transformers, active."""
        add_adapters(model, {f"adapter_{number}": make(model) for number, make in enumerate(self.adapters)})
        if self.is_naive:
            make_naive(model)


def pvm_config(model: nn.Module) -> PVMConfig:
    """PVM of the paper's proportions: one branch for twelve layers, an eighth as wide as the model."""
    vlm = find_vlm(model)
    text_config = vlm.text_config.per_layer_config[0]  # as PVM takes sizes, where layers differ
    depth, hidden_size = len(vlm.layers), text_config.hidden_size
    head_dim = getattr(text_config, "head_dim", None) or hidden_size // text_config.num_attention_heads
    branches = max(1, round(PAPER_SHARE * depth))
    layers = [round((number + 0.5) * depth / branches - 0.5) for number in range(branches)]
    return PVMConfig(r=max(1, round(PAPER_WIDTH * hidden_size / head_dim)) * head_dim, layers_to_transform=layers)


# By name, settings by which methods act on any model and prompt. DIPE has no limit of distance, so that it acts
# however short the text is. VAR takes random embeddings for sinks in which channel 0 is large, about one of 22.
GIVEN: dict[str, dict[str, Any]] = {
    "DIPE": {"max_distance": 0},
    "VAR": {"sink_channels": [0], "tau": 2.0, "least_visual": 0.0},
}


def _config(method: methods.Method) -> Callable[[nn.Module], Any]:
    """Makes a method's configuration, given the model: the default one, PVM's in the paper's proportions."""
    if method.config is PVMConfig:
        return pvm_config
    fields = GIVEN.get(method.name, method.of_the_model)
    return lambda model: method.config(**fields)


def _rows() -> Iterator[tuple[str, Method]]:
    yield "base", Method("base")
    for method in methods.METHODS:
        name, adapters = method.name, (_config(method),)
        yield (
            name.lower(),
            Method(
                name,
                adapters,
                given=GIVEN.get(name, {}),
                in_forwards=method.acts_in_forwards,
                in_generate=issubclass(method.config, InGenerate),
            ),
        )
        if method.acts_in_forwards and method.plain_matrices is not None:
            plain = Method(f"{name}, naive", adapters, is_naive=True, whole_matrices=method.plain_matrices)
            yield f"{name.lower()}-naive", plain
    configs = {method.name: _config(method) for method in methods.METHODS}
    for names in (("PVM", "DIPE"), ("PVM", "DIPE", "T-DRS")):
        yield "+".join(names).lower(), Method(" + ".join(names), tuple(configs[name] for name in names))


METHODS = dict(_rows())
ALL = tuple(name for name, method in METHODS.items() if method.is_alone)  # what `--method all` stands for


def make_naive(model: nn.Module) -> None:
    """Switch the adapters on a model to their naive form, permanently."""
    for layer in model.modules():
        if isinstance(layer, PVMLayer):
            for name, branches in layer.pvm_branches.items():
                layer.pvm_branches[name] = [PlainBranch(**vars(branch)) for branch in branches]

    def replace_stages(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = cast(VisualContext, kwargs[CONTEXT])
        for layer_idx, stages in context.stages.items():
            context.stages[layer_idx] = ReferenceStages(stages.stages, stages.adapters)

    find_vlm(model).text_model.register_forward_pre_hook(replace_stages, with_kwargs=True)
