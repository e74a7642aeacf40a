"""How the decoder layers of each text model are put together around their FFN: a special case is a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..utils.packages import is_tuner_child
from ..utils.wrapping import unwrapped


NEEDS_NO_BLOCK = "Adapters that change only attention do not need to know the FFN"


@dataclass(frozen=True)
class DecoderBlock:
    """How a decoder layer is put together around its FFN.

    Attributes:
        ffn_norm: The submodule whose *input* is the residual stream after self-attention. `None` for a parallel block,
            where FFN and attention read the same normed input: there that stream is layer input + attention output.
        ffn_end: The submodule whose *output* is what the FFN adds to the residual stream.
        token_mixers: The submodules that mix tokens; a layer has one of them.
        ends_with_sum: Whether the output of `ffn_end` is the residual stream with the FFN added already: a gate that
            weighs both.
        ffn_scale: What a layer multiplies that output by before it adds it: Granite's `residual_multiplier`.
        has_streams: Whether there are several residual streams. The FFN then reads a mixture of them, and what it
            returns is spread over them. So is what is put beside it, which reads that mixture.
    """

    ffn_norm: str | None = "post_attention_layernorm"
    ffn_end: str = "mlp"
    token_mixers: tuple[str, ...] = ("self_attn", "linear_attn")
    ends_with_sum: bool = False
    ffn_scale: float = 1.0
    has_streams: bool = False

    @property
    def is_parallel(self) -> bool:
        """Whether FFN and attention read the same normed input."""
        return self.ffn_norm is None

    @property
    def reads_stream(self) -> bool:
        """Whether the FFN reads the residual stream as it is, without a norm before it."""
        return self.ffn_norm == "mlp"

    @property
    def norm_name(self) -> str:
        """The norm before the FFN."""
        return self.ffn_norm or "input_layernorm"

    @property
    def looked_for(self) -> str:
        return f"{' or '.join(self.token_mixers)}, {self.norm_name} and {self.ffn_end}"

    def fits(self, layer: nn.Module) -> bool:
        names = dict(layer.named_children())
        mixer = any(name in names for name in self.token_mixers)
        return mixer and self.norm_name in names and self.ffn_end in names

    def norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the FFN of `layer`."""
        return getattr(layer, self.norm_name)

    def token_mixer(self, layer: nn.Module) -> nn.Module:
        """The attention module of `layer`."""
        return next(getattr(layer, name) for name in self.token_mixers if hasattr(layer, name))


PRE_NORM = DecoderBlock()
PRE_NORM_CHILDREN = {*PRE_NORM.token_mixers, "input_layernorm", PRE_NORM.ffn_norm, PRE_NORM.ffn_end}
SANDWICH = DecoderBlock(ffn_norm="pre_feedforward_layernorm", ffn_end="post_feedforward_layernorm")

CONV = DecoderBlock(ffn_norm="ffn_norm", ffn_end="feed_forward", token_mixers=("self_attn", "conv"))
INKLING = "an FFN reads several residual streams by attention, and a convolution would spread a branch over tokens"
STREAMS = DecoderBlock(ffn_norm="mlp", has_streams=True)
KOSMOS = DecoderBlock(ffn_norm="final_layer_norm", ffn_end="ffn")
POST_NORM = DecoderBlock(ffn_norm="mlp", ffn_end="post_attention_layernorm")  # the FFN reads the stream as it is

# By the text model's `model_type`: a wrapper such as LLaVA or PaliGemma takes several. A function, where its config
# decides. What is not listed must be of exactly the common pre-norm shape. A string says why no branch fits in.
BLOCKS: dict[str, DecoderBlock | str | Callable[[Any], DecoderBlock]] = {
    "apertus1p5_text": DecoderBlock(ffn_norm="feedforward_layernorm"),
    "cohere": DecoderBlock(ffn_norm=None),
    "cohere2": DecoderBlock(ffn_norm=None),
    "cohere_compass_text": DecoderBlock(ffn_norm=None),
    "emu3_text_model": PRE_NORM,
    "exaone4": DecoderBlock(ffn_norm="mlp", ffn_end="post_feedforward_layernorm"),
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "gemma3n_text": SANDWICH,  # within the residual stream that a layer computes; AltUp passes it on to the others
    "gemma4_text": SANDWICH,
    "gemma4_unified_text": SANDWICH,
    "glm4v_text": DecoderBlock(ffn_end="post_mlp_layernorm"),
    "glm5_next_text": STREAMS,
    "glm_ocr_text": DecoderBlock(ffn_end="post_mlp_layernorm"),
    "hy_v4_vl_text": "its residual is several streams, which each layer mixes, and no single one to read and add to",
    "hyperclovax": DecoderBlock(ffn_end="post_norm2"),
    "inkling2_loop_text": INKLING,
    "inkling2_text": INKLING,
    "inkling_text": DecoderBlock(ffn_end="mlp_sconv"),  # a convolution over tokens, which must not spread a branch
    "kosmos_2_5_text_model": KOSMOS,
    "kosmos_2_text_model": KOSMOS,
    "lfm2": CONV,
    "lfm3": replace(CONV, ffn_end="post_ffn_norm"),
    "llama4_text": DecoderBlock(ffn_end="feed_forward"),
    "molmo2_text": lambda config: POST_NORM if config.norm_after else PRE_NORM,
    "muse_glimmer_text": SANDWICH,
    "muse_spark_text": DecoderBlock(
        ffn_norm="pre_feedforward_layernorm", ffn_end="post_feedforward_residual_gate", ends_with_sum=True
    ),
    "nemotron_h": "each layer is attention or an FFN, not both",
    "opt": DecoderBlock(ffn_norm="final_layer_norm", ffn_end="fc2"),
    "persimmon": DecoderBlock(ffn_end="dropout"),
    "qwen4_exp_text": STREAMS,
}


def layer_input(args: tuple, kwargs: dict[str, Any], batch_size: int, hidden_size: int) -> torch.Tensor:
    """The hidden states that a decoder layer is called with, `(batch, seq_len, hidden_size)`.

    Args:
        args: Its arguments.
        kwargs: Those by name.
        batch_size: How many rows there are.
        hidden_size: How wide a hidden state is.

    Raises:
        NotImplementedError: It has several residual streams, of which none is the hidden state.
    """
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if hidden_states.dim() == 2:  # OPT puts the tokens of all rows in one list
        hidden_states = hidden_states.unflatten(0, (batch_size, -1))
    if hidden_states.dim() != 3 or hidden_states.shape[-1] != hidden_size:
        raise NotImplementedError(
            "The decoder layers of this model have several residual streams, and no single hidden state of a token "
            "in which sinks could be found."
        )
    return hidden_states


def find_block(model: nn.Module, text_model: Any) -> DecoderBlock:
    """The shape of the decoder layers, if all of them have it.

    Args:
        model: The model.
        text_model: Its decoder stack.

    Raises:
        ValueError: Nothing can be put beside their FFNs, or it is not known how; the message says why.
    """
    text_type = getattr(text_model.config, "model_type", "")
    is_listed = text_type in BLOCKS
    row = BLOCKS.get(text_type, PRE_NORM)
    of_model = f"{type(model).__name__} (text model type {text_type!r})"
    if isinstance(row, str):
        raise ValueError(f"Nothing can be put beside the FFNs of {of_model}: {row}. {NEEDS_NO_BLOCK}.")
    block = row if isinstance(row, DecoderBlock) else row(text_model.config)
    for layer_idx, layer in enumerate(map(unwrapped, text_model.layers)):
        children = {name for name, child in layer.named_children() if not is_tuner_child(child)}
        # Norms in unknown places change where the branch belongs, so an unlisted layer must have no other children.
        if not block.fits(layer) or (not is_listed and not children <= PRE_NORM_CHILDREN):
            raise ValueError(
                f"Nothing can be put beside the FFNs of {of_model}: decoder layer {layer_idx} "
                f"({type(layer).__name__}) holds {sorted(children)}. Looked for {block.looked_for}"
                f"{'' if is_listed else ' and no other norm'}. {NEEDS_NO_BLOCK}, and a row in "
                "peft_pvm/tokens/blocks.py makes this one known."
            )
    return replace(block, ffn_scale=getattr(text_model.config, "residual_multiplier", 1.0))
