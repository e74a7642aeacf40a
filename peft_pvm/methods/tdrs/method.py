"""T-DRS: attention reweighted by similarity and distance."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ...attention.call import AttentionCall, Output, records_gradients
from ...attention.reference import products
from ...attention.rotation import Tables, between, inverse, may_scale, rotate, rotation_tables, turned_by_matrix
from ...attention.stages import Stage, Weights
from ...tokens.context import VisualContext
from ...tuners.attention_method import AttentionMethod, SteeredLayer
from ...utils.checks import setting
from .blockwise import Inputs, blockwise_attention
from .weights import Floor, Steps, reweighted


FORMS = ("weights", "logits", "literal")
PAIRS = ("all", "inter")
KERNELS = ("auto", "blockwise", "triton")
FLOORS = "a number between 0 and 1, or a multiple of the least weight, such as '3*min'"
EPSILON = 1e-24  # beside the mean square of a content's channels: what is nearly zero has no direction
POSITIONS = "position_ids"  # what is kept of every token in the memory


@dataclass
class TDRSConfig(AttentionMethod):
    """Configuration of T-DRS, arXiv 2511.09868. It has no parameters.

    Attention is reweighted in three steps: towards keys that are similar to the query (SD-DRS), towards keys that are
    near, where a similar key counts as nearer (DC-DRS), and towards distant keys, so that they keep a share (reDRS).
    What the paper leaves open is our reading; docs/methods/t-drs.md sets the two side by side.

    Args:
        form: What distance multiplies. "weights": attention weights, which are then renormalised. "logits": scores.
            "literal": also scores, as in a literal reading of the paper's sum. The score then counts twice: by itself,
            and within the step SD-DRS, which contains it.
        sd_strength: How much is added to the score of a key of the same direction as the query. The paper has 1.
        dc_strength: Weight of the step that favours near keys (lambda_dc), 0 or more. The paper's best is 1.
        re_strength: Weight of the step that keeps distant keys in view (lambda_re), 0 or more. The paper's best is 0.8
            or 1.
        dc_floor: What the near-key factor falls to at the farthest key: a number in (0, 1), or "3*min" for a multiple
            of the least weight in the query's row, at most 0.999. A number saves a pass over the keys.
        re_floor: The same for the distant-key factor.
        pairs: Which pairs are reweighted: "all", or "inter" for those of text with visual tokens.
        kernel: "auto" takes the Triton kernel on CUDA where no gradients or weights are asked for, and otherwise
            works blockwise in PyTorch. "blockwise" and "triton" fix the choice.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all with self-attention.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.

    Raises:
        ValueError: A value out of its range or not among the choices.
    """

    method: ClassVar[str] = "tdrs"
    title: ClassVar[str] = "T-DRS: attention reweighted by similarity and distance"
    summary: ClassVar[str] = (
        "Three steps at inference: similar keys weigh more, near keys weigh more (similar ones count as nearer), and "
        "distant keys keep a share."
    )
    paper: ClassVar[str] = "2511.09868"

    rotates: ClassVar[bool] = True

    form: Literal["weights", "logits", "literal"] = setting(
        "weights",
        "What distance multiplies: attention 'weights', renormalised after, or scores ('logits'); 'literal' counts "
        "scores twice.",
        among=FORMS,
    )
    sd_strength: float = setting(
        1.0, "How much is added to the score of a key of the same direction as the query, 0 or more.", least=0
    )
    dc_strength: float = setting(1.0, "Weight of the step that favours near keys (lambda_dc), 0 or more.", least=0)
    re_strength: float = setting(
        1.0, "Weight of the step that keeps distant keys in view (lambda_re), 0 or more.", least=0
    )
    dc_floor: float | str = setting(
        "3*min",
        "What the near-key factor falls to at the farthest key: a number in (0, 1), or a multiple of the row's least "
        "attention weight, such as '3*min'.",
        valid=Floor.is_valid,
        accepted=FLOORS,
    )
    re_floor: float | str = setting(
        "2*min",
        "What the distant-key factor falls to at the farthest key, like dc_floor.",
        valid=Floor.is_valid,
        accepted=FLOORS,
    )
    pairs: Literal["all", "inter"] = setting(
        "all", "Which pairs are reweighted: 'all', or 'inter' for those of text with visual tokens.", among=PAIRS
    )
    kernel: Literal["auto", "blockwise", "triton"] = setting(
        "auto", "How it is computed: 'auto' takes Triton on CUDA, else 'blockwise' in PyTorch.", among=KERNELS
    )

    @classmethod
    def start_forward(cls, context: VisualContext) -> None:
        """Keep the positions of all tokens, so that the rotation of keys can be undone."""
        keep_positions(context)

    def stages(self, layer: SteeredLayer) -> Stage | Sequence[Stage]:
        """Reweighted scores, unless every step is off."""
        reweighting = Reweighting(self, layer.rotary, layer.layer_type)
        return () if self.is_off else Weights(reweighting.attend, reweighting.reference)

    @property
    def floors(self) -> tuple[Floor, Floor]:
        """The floors of both steps that look at the distance. A step that is off must not need the least weight."""
        return Floor.of(self.dc_floor), Floor.of(self.re_floor if self.re_strength else 0.5)

    @property
    def knows_distance(self) -> bool:
        """Whether one of the two steps acts that look at the distance."""
        return self.dc_strength != 0 or self.re_strength != 0

    @property
    def counts_twice(self) -> bool:
        """Whether scores count twice: where the step SD-DRS is read as the score and what it adds."""
        return self.form == "literal" and self.sd_strength != 0

    @property
    def is_off(self) -> bool:
        """Whether every step has strength 0."""
        return self.sd_strength == 0 and not self.knows_distance


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def keep_positions(context: VisualContext) -> None:
    """Keep the position of every token in the memory, as the rotary embedding is given it."""
    context.keeps[POSITIONS] = lambda context: context.noted()[0]


class Reweighting:
    """How the scores of one layer are weighed, by one adapter.

    Args:
        config: The adapter's configuration.
        rotary: The rotary embedding of the layer; `None` in a layer that does not rotate.
        layer_type: The layer's type, for a rotary embedding that tells types apart.
    """

    def __init__(self, config: Steps, rotary: nn.Module | None, layer_type: str | None):
        self.config = config
        self.rotary = rotary
        self.layer_type = layer_type

    def attend(self, call: AttentionCall) -> Output:
        """What the attention function returns.

        Raises:
            NotImplementedError: Heads see different keys.
        """
        if call.visibility.differs_by_head and call.visibility.ranked_by() is None:
            raise NotImplementedError(
                "The heads of this attention see different keys (block-sparse attention, for instance). A key that "
                "one query does not see need not be padding, so T-DRS cannot count the tokens between two. Take it "
                "off with unload()."
            )
        query, key = call.scored_by
        inter = None
        if self.config.pairs == "inter":
            if call.context.memory.is_empty:  # no pair of a text and a visual token
                return call.run_kernel()
            inter = call.visual_queries, call.visual_keys
        content_query, content_key = self.contents(call)
        inputs = Inputs(
            query=query,
            key=key,
            value=call.value,
            content_query=content_query,
            content_key=content_key,
            visibility=call.visibility,
            inter=inter,
            scaling=call.scaling,
            softcap=call.kwargs.get("softcap"),
            dropout=call.kwargs.get("dropout", 0.0),
            bias=call.position_bias,
        )
        if self.takes_triton(inputs, call.wants_weights):
            from .triton_kernel import triton_attention

            return triton_attention(inputs, self.config), None
        return blockwise_attention(inputs, self.config, call.wants_weights)

    def reference(self, call: AttentionCall, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The weights in their plainest form: see `Weights`."""
        content_query, content_key = self.contents(call)
        similarity = products(content_query, content_key(slice(None)))
        key_ranks, query_ranks = call.visibility.ranks()
        distance = (query_ranks.unsqueeze(-1) - key_ranks.unsqueeze(-2)).to(scores.dtype)
        inter = call.visual_queries[:, None, :, None] != call.visual_keys[:, None, None]
        return reweighted(self.config, scores, similarity, distance, hidden, inter).nan_to_num()

    def takes_triton(self, inputs: Inputs, wants_weights: bool) -> bool:
        """Whether the Triton kernel computes it."""
        if self.config.kernel == "blockwise":
            return False
        if self.config.kernel == "triton":
            if wants_weights:
                raise NotImplementedError(
                    "The Triton kernel does not return attention weights. Use TDRSConfig(kernel='auto')."
                )
            if not _has_triton():
                raise ImportError("TDRSConfig(kernel='triton') needs Triton, which is not installed.")
            if torch.compiler.is_compiling():
                raise NotImplementedError(
                    "torch.compile cannot take in the Triton kernel. Use TDRSConfig(kernel='auto'), which computes in "
                    "PyTorch there."
                )
            return True
        needs_blockwise = wants_weights or inputs.dropout > 0 or inputs.query.dtype == torch.float64
        needs_blockwise |= inputs.bias is not None
        records = records_gradients(inputs.query, inputs.key, inputs.value)
        needs_blockwise |= torch.compiler.is_compiling()  # inductor fails on the kernel
        return inputs.query.is_cuda and _has_triton() and not needs_blockwise and not records

    def contents(self, call: AttentionCall) -> tuple[torch.Tensor, Callable[[slice], torch.Tensor]]:
        """Queries without position, in fp32 at least, and a function that gives the same of some keys.

        Their products are cosines: queries are of the length by which those of keys is divided, the root of their
        width. So both take one operation of torch's.
        """
        rotary, context, width = self.rotary, call.context, call.query.shape[-1]
        precise = torch.promote_types(call.query.dtype, torch.float32)

        def make() -> torch.Tensor:
            return torch.full((width,), 1 / width, dtype=precise, device=call.query.device)

        inverse_width = context.derived(("tdrs", "width", width, precise, call.query.device), make)

        def of_query(states: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(states, (width,), inverse_width, eps=EPSILON)

        def of_keys(states: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(states, (width,), eps=EPSILON)

        if rotary is None:
            return of_query(call.query.to(precise)), lambda keys: of_keys(call.key[:, :, keys].to(precise))
        num_queries = call.query.shape[2]
        own, _ = context.noted()
        positions = call.keys.kept(POSITIONS)
        if positions is None:
            raise RuntimeError(
                "The KV cache holds tokens whose positions nobody kept: T-DRS must be attached from the first token "
                "on. Start with a new cache."
            )

        def name(what: str, positions: torch.Tensor) -> tuple[Hashable, ...]:
            return "tdrs", what, rotary, self.layer_type, positions.shape[1]

        def undo(what: str, positions: torch.Tensor) -> Tables:
            make = functools.partial(rotation_tables, rotary, positions, self.layer_type)
            return context.derived(name(what, positions), lambda: inverse(make(), may_scale(rotary, self.layer_type)))

        def content(states: torch.Tensor, tables: Tables) -> torch.Tensor:
            return rotate(call.module, states.to(precise), tables)

        to_keys = undo("keys", positions)
        own = own[:, -num_queries:]
        length = context.past_length
        if isinstance(length, int) and positions.shape[1] <= length + context.seq_len:  # the last keys are the newest
            to_queries = between(to_keys, -num_queries, None)
        else:
            to_queries = undo("queries", own)
        if num_queries == 1:
            query = turned_by_matrix(call, to_queries, name("queries", own))
        else:
            query = content(call.query, to_queries)
        return of_query(query), lambda keys: of_keys(
            content(call.key[:, :, keys], between(to_keys, keys.start, keys.stop))
        )
