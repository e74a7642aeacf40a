"""What methods that change attention compute, written from the maths alone: in float64, on whole score matrices.

It shares nothing with the package but the formulas of T-DRS on whole matrices.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from forwards import difference, in_double, logits
from peft import get_peft_model
from tiny_vlms import IMAGE, VIDEO, TinyVLM
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from peft_pvm import DIPEConfig
from peft_pvm.methods.tdrs.weights import reweighted


ORACLE_TOLERANCE = 2e-5  # of logits in fp32
LEAST = -1e4  # a logit: models suppress tokens by the least number of the dtype
# Text models that leave neighbouring channels rotated.
NEIGHBOURS = {
    *("cohere", "cohere2", "deepseek_v2", "ernie4_5_vl_moe_text", "glm4v_text", "glm_ocr_text", "hy_v4_vl_text"),
    "llama4_text",
}
NO_ROPE = {"llama4_text", "mistral_large4_text"}  # text models that say which layers do not rotate


@dataclass
class Tokens:
    """The tokens of one forward.

    Attributes:
        positions: `(batch, seq_len, axes)`.
        visual: `(batch, seq_len)`, bool.
        real: `(batch, seq_len)`, bool.
        exit: Gives the logits that the final norm and the head make of hidden states, without gradients.
        layer_inputs: By layer, the hidden states that it begins with, `(batch, seq_len, hidden_size)`.
    """

    positions: torch.Tensor
    visual: torch.Tensor
    real: torch.Tensor
    exit: Callable[[torch.Tensor], torch.Tensor]
    layer_inputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def met_from(self, max_distance: int, by_image: tuple[int, int] | None) -> torch.Tensor:
        """Where each token stands for each token of the other modality, `(batch, seq_len, seq_len, axes)`.

        Args:
            max_distance: How far a token moves on from its anchor.
            by_image: The least number of positions of text between two images, and how many images are told apart.
                `None`: a token has one anchor, the first coordinate of the first token of its run, on all axes.
        """
        positions = self.positions.unsqueeze(2).repeat(1, 1, self.positions.shape[1], 1)
        for row in range(len(positions)):
            for token in range(positions.shape[1]):
                if self.real[row, token]:
                    anchors = torch.tensor(self._anchors_seen_from(row, token, by_image))[:, None] + max_distance
                    positions[row, token] = (
                        torch.minimum(anchors, self.positions[row, token]) if max_distance else anchors
                    )
        return positions

    def _anchors_seen_from(self, row: int, token: int, by_image: tuple[int, int] | None) -> list[int]:
        """A token's anchor for every token of the row, from what stands up to it alone."""
        runs: list[list[int]] = []
        for other in range(token + 1):
            if not self.real[row, other]:
                continue
            if runs and self.visual[row, other] == self.visual[row, runs[-1][0]]:
                runs[-1].append(other)
            else:
                runs.append([other])
        begins = [int(self.positions[row, run[0], 0]) for run in runs]
        anchors = [begins[-1]] * self.positions.shape[1]
        if by_image is None or self.visual[row, token]:
            return anchors
        image_gap, max_images = by_image
        images: list[list[int]] = []  # of each, its runs
        for number, run in enumerate(runs):
            if not self.visual[row, run[0]]:
                continue
            is_near = bool(images) and begins[number] - begins[number - 1] < image_gap
            if images and (is_near or len(images) == max_images):
                images[-1].append(number)
            else:
                images.append([number])
        for image in images:
            for number in image:
                for other in runs[number]:
                    anchors[other] = begins[image[-1] + 1]
        return anchors

    def distances(self) -> torch.Tensor:
        """How many real tokens lie between two, `(batch, seq_len, seq_len)`."""
        rank = self.real.double().cumsum(1)
        return rank[:, :, None] - rank[:, None, :]


ByPair = Callable[[Tokens, int], torch.Tensor]
Change = Callable[[Tokens, int, torch.Tensor], torch.Tensor]


def angles(attention: Any, text_model: Any, positions: torch.Tensor) -> torch.Tensor:
    """By which angles an attention module turns channels at some positions, `(batch, seq_len, frequencies)`."""
    config, rotary = text_model.config, getattr(text_model, "rotary_emb", None)
    if rotary is None:
        return positions.double()[..., :0]
    if getattr(text_model, "rope_types", None) and text_model.rope_types[attention.layer_idx] == "unscaled":
        rotary = text_model.rotary_emb_unscaled
    layer_type = config.layer_types[attention.layer_idx] if getattr(config, "layer_types", None) else None
    rope = config.rope_parameters.get(layer_type, config.rope_parameters)
    if rope is None:  # there are no frequencies for a layer type that does not rotate
        return positions.new_zeros(*positions.shape[:-1], 0).double()
    no_rotation = (
        (config.model_type in NO_ROPE and not config.no_rope_layers[attention.layer_idx])
        or (config.model_type == "cohere2" and layer_type == "full_attention")
        or (config.model_type == "exaone4" and layer_type == "full_attention" and config.sliding_window is not None)
        or (config.model_type.startswith("muse_") and config.layer_rope_theta[attention.layer_idx] == 0)
    )
    name = f"{layer_type}_inv_freq"
    frequencies = (getattr(rotary, name) if hasattr(rotary, name) else rotary.inv_freq).double()
    if hasattr(rotary, "alpha"):  # Mistral Large 4 learns them
        frequencies = frequencies * rotary.alpha.double().exp()
    if no_rotation:
        frequencies = frequencies * 0
    axes = torch.zeros(frequencies.shape[-1], dtype=torch.long)
    if positions.shape[-1] == 3:
        sections = rope["mrope_section"]
        if config.model_type in ("cosmos3_edge_text", "ernie4_5_vl_moe_text"):  # they keep them in another order
            frequencies = rope["rope_theta"] ** -(torch.arange(len(axes)).double() / len(axes))
        if config.model_type == "ernie4_5_vl_moe_text":  # heights and widths in turn, times behind
            axes[: sections[0] + sections[1]] = 1 + torch.arange(sections[0] + sections[1]) % 2
        elif rope.get("mrope_interleaved") or config.model_type == "cosmos3_edge_text":
            for axis in (1, 2):
                axes[axis : 3 * sections[axis] : 3] = axis
        else:
            axes = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    return positions.double()[:, :, axes] * frequencies


def to_complex(states: torch.Tensor, frequencies: int, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that are rotated, as complex numbers, and the others. `(batch, heads, seq_len, ...)` each."""
    if hasattr(attention, "kv_lora_rank"):  # the latent part first
        rest, rotated = states.tensor_split([states.shape[-1] - 2 * frequencies], -1)
    else:
        rotated, rest = states[..., : 2 * frequencies], states[..., 2 * frequencies :]
    if attention.config.model_type in NEIGHBOURS:
        return torch.complex(rotated[..., 0::2].contiguous(), rotated[..., 1::2].contiguous()), rest
    return torch.complex(rotated[..., :frequencies].contiguous(), rotated[..., frequencies:].contiguous()), rest


class OracleName(str):
    """The name of eager attention to a model that asks for it, by which the oracle is found instead."""

    def __eq__(self, other: object) -> bool:
        return other in ("eager", "oracle")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("oracle")


def oracle_attention(
    text_model: Any,
    tokens: Tokens,
    dipe: DIPEConfig | None,
    tdrs: Any,
    scale: ByPair | None,
    bias: ByPair | None,
    change: Change | None,
    weigh: Change | None,
):
    met_from: list[torch.Tensor] = []  # the same for all layers
    own_modules = set(text_model.modules())

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, position_bias=None, **kwargs):
        if module not in own_modules:  # of a projector that has the text model's config
            eager = sys.modules[type(module).__module__].eager_attention_forward
            return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        own = angles(module, text_model, tokens.positions)
        turn = torch.polar(torch.ones_like(own), own)[:, None]
        query_turned, query_rest = to_complex(query, own.shape[-1], module)
        key_turned, key_rest = to_complex(key, own.shape[-1], module)
        content_query, content_key = query_turned / turn, key_turned / turn

        def product(left, right):
            return (left @ right.conj().transpose(2, 3)).real + query_rest @ key_rest.transpose(2, 3)

        scores = product(content_query * turn, content_key * turn)
        inter = (tokens.visual[:, :, None] != tokens.visual[:, None, :])[:, None]
        if dipe is not None:
            if not met_from:
                by_image = (dipe.image_gap, dipe.max_images) if dipe.anchor == "image" else None
                met_from.append(tokens.met_from(dipe.max_distance or 0, by_image))
                if dipe.axes != "all":
                    anchored = torch.arange(tokens.positions.shape[-1]) == 0
                    anchored = anchored if dipe.axes == "time" else ~anchored
                    met_from[0] = torch.where(anchored, met_from[0], tokens.positions[:, :, None])
            by_pair = angles(module, text_model, met_from[0].flatten(1, 2)).unflatten(1, own.shape[1:2] * 2)
            turned = content_query.unsqueeze(3) * torch.polar(torch.ones_like(by_pair), by_pair)[:, None]
            rotated = (turned * (content_key * turn).conj().unsqueeze(2)).real.sum(-1)
            scores = torch.where(inter, rotated + query_rest @ key_rest.transpose(2, 3), scores)
        if scale is not None:
            scores = scores * scale(tokens, module.layer_idx)[:, None]
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if position_bias is not None:
            scores = scores + position_bias
        if bias is not None:
            scores = scores + bias(tokens, module.layer_idx)[:, None]
        if change is not None:
            scores = change(tokens, module.layer_idx, scores)
        visible = (
            torch.ones_like(scores, dtype=torch.bool).tril() if attention_mask is None else attention_mask > -1e30
        )
        hidden = ~visible.expand_as(scores)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        if tdrs is not None:
            norm = (query.norm(dim=-1)[..., None] * key.norm(dim=-1)[..., None, :]).clamp(min=1e-12)
            similarity = product(content_query, content_key) / norm
            weights = reweighted(tdrs, scores, similarity, tokens.distances()[:, None], hidden, inter)
        weights = weights.nan_to_num()  # a row of padding sees nothing
        if weigh is not None:
            weights = weigh(tokens, module.layer_idx, weights)
        output = weights @ value
        return output.transpose(1, 2).contiguous(), weights

    return attend


def embeds_tokens(module: torch.nn.Module) -> bool:
    return hasattr(module, "embed_tokens") or isinstance(getattr(module, "embeddings", None), torch.nn.Embedding)


@contextlib.contextmanager
def oracle(
    model: Any,
    inputs: dict[str, torch.Tensor],
    dipe: DIPEConfig | None = None,
    tdrs: Any = None,
    scale: ByPair | None = None,
    bias: ByPair | None = None,
    change: Change | None = None,
    weigh: Change | None = None,
) -> Iterator[Any]:
    """The model in float64, computing as the oracle does for these inputs, which must be one whole forward.

    Args:
        model: The model.
        inputs: What it will be given.
        dipe: The configuration of DIPE. `None`: it does not act.
        tdrs: The configuration of T-DRS. `None`: it does not act.
        scale: What the scores of a layer are multiplied by, `(batch, seq_len, seq_len)`. `None`: 1.
        bias: What is added to them after scaling, likewise. `None`: 0.
        change: Gives other scores for those of a layer, `(batch, heads, seq_len, seq_len)`. `None`: they stay.
        weigh: Gives other weights for those of a layer, likewise.
    """
    model = model.double()
    text_model = next(m for m in model.modules() if embeds_tokens(m) and hasattr(m, "layers"))
    ids = inputs["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)

    @torch.no_grad()
    def exit(states):
        scores = model.get_output_embeddings()(text_model.norm(states))
        softcap = getattr(text_model.config, "final_logit_softcapping", None)
        return softcap * torch.tanh(scores / softcap) if softcap else scores

    tokens = Tokens(torch.zeros(*ids.shape, 1), visual, inputs["attention_mask"].bool(), exit)

    def note(module, args, kwargs):
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        positions = positions if positions.dim() == 3 else positions[None]
        tokens.positions = positions.movedim(0, -1).expand(*ids.shape, -1)

    rotary = getattr(text_model, "rotary_emb", torch.nn.Module())

    def note_input(layer_idx):
        def note(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            tokens.layer_inputs[layer_idx] = states.detach().view(*ids.shape, -1)

        return note

    handles = [rotary.register_forward_pre_hook(note, with_kwargs=True)]
    for layer_idx, layer in enumerate(text_model.layers):
        handles.append(layer.register_forward_pre_hook(note_input(layer_idx), with_kwargs=True))
    kernel = text_model.config._attn_implementation
    AttentionInterface.register("oracle", oracle_attention(text_model, tokens, dipe, tdrs, scale, bias, change, weigh))
    AttentionMaskInterface.register("oracle", eager_mask)
    text_model.config._attn_implementation = OracleName("eager")
    text_model.config._experts_implementation = "eager"  # the only one that takes float64
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        text_model.config._attn_implementation = kernel


def agrees_with_the_oracle(
    family: TinyVLM,
    dipe: DIPEConfig | None = None,
    tdrs: Any = None,
    batch: tuple[str, ...] = ("t4 i t3 i t6", "i t9", "t9"),
) -> None:
    """Assert that the base computes what the oracle does without methods, and the method what it does with it."""
    model = family.build_precise()
    inputs = family.inputs(model, *batch)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real].clamp(min=LEAST)
    with oracle(family.build(), inputs) as reference:
        bare = logits(reference, in_double(inputs))[real].clamp(min=LEAST)
        assert difference(bare, base.double()) < ORACLE_TOLERANCE
    with oracle(family.build(), inputs, dipe, tdrs) as reference:
        expected = logits(reference, in_double(inputs))[real].clamp(min=LEAST)
    computed = logits(get_peft_model(model, dipe or tdrs), inputs)[real].clamp(min=LEAST)
    assert difference(expected, base.double()) > 100 * ORACLE_TOLERANCE
    assert difference(computed.double(), expected) < ORACLE_TOLERANCE
