"""Early exit: what a model would write after each decoder layer, by its final norm and its head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .families import VisionLanguageModel
from .positions import gather_rows, pack


TOP = 10  # tokens that the entropy is over
LOGITS_AT_ONCE = 2**24
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "layer_norm", "norm_f")

# By the text model's `model_type`: why nothing can be read off between its layers.
WITHOUT_EXIT: dict[str, str] = dict.fromkeys(
    ("gemma3n_text", "glm5_next_text", "hy_v4_vl_text", "inkling2_text", "inkling2_loop_text", "qwen4_exp_text"),
    "its residual is several streams, which become one only after the last layer",
)


class EarlyExit:
    """Reads the residual stream between decoder layers as if it were the one after the last layer.

    Args:
        vlm: The model's parts.

    Raises:
        ValueError: The model has no head or no final norm, or several residual streams.
    """

    def __init__(self, vlm: VisionLanguageModel):
        self.vlm = vlm
        reason = WITHOUT_EXIT.get(vlm.text_config.model_type)
        if reason is None and self.vlm.head is None:
            reason = "it has no head (get_output_embeddings)"
        if reason is None and not self._norm_name():
            reason = f"its text model has no final norm of a known name; looked for {', '.join(FINAL_NORMS)}"
        if reason is not None:
            raise ValueError(
                f"Nothing can be read off between the decoder layers of {type(vlm.model).__name__} (text model type "
                f"{vlm.text_config.model_type!r}): {reason}. The adapter needs the entropy of what the model would "
                "write there."
            )

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits of an early exit: `(..., hidden_size)` to `(..., vocab_size)`."""
        norm = getattr(self.vlm.text_model, self._norm_name())
        if _is_plain(norm) and norm.weight.dtype == hidden_states.dtype:  # one operation in place of eight
            normed = F.rms_norm(hidden_states, hidden_states.shape[-1:], norm.weight, norm.variance_epsilon)
        else:
            normed = norm(hidden_states)
        return self.vlm.logits(normed)

    def entropies(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """How undecided the model is: the entropy over only the likeliest tokens, from 0 to log `TOP`.

        Args:
            hidden_states: The residual stream, `(batch, length, hidden_size)`: the head may differ from row to row.

        Returns:
            `(batch, length)`, fp32, without gradients.
        """
        at_once = max(LOGITS_AT_ONCE // (self.vlm.text_config.vocab_size * len(hidden_states)), 1)
        with torch.no_grad():
            found = [_entropies(self.logits(block)) for block in hidden_states.detach().split(at_once, 1)]
        whole = torch.cat(found, 1) if len(found) > 1 else found[0]
        return whole.to(hidden_states.device)

    def undecided(self, hidden_states: torch.Tensor, threshold: float, among: torch.Tensor) -> torch.Tensor:
        """Which of some tokens have an entropy above a threshold, `(batch, seq_len)` both, bool.

        Args:
            hidden_states: The residual stream, `(batch, seq_len, hidden_size)`.
            threshold: From 0 to 1: over the largest entropy there is.
            among: The tokens.
        """
        least = threshold * math.log(TOP)
        if all_at_once(among):
            return among & (self.entropies(hidden_states) > least)
        positions = pack(among)
        if positions.shape[1] == 0:
            return among
        found = self.entropies(gather_rows(hidden_states, positions)) > least
        return among.masked_scatter(among, found[positions >= 0])

    def _norm_name(self) -> str:
        names = (name for name in FINAL_NORMS if isinstance(getattr(self.vlm.text_model, name, None), nn.Module))
        return next(names, "")


def _is_plain(norm: nn.Module) -> bool:
    """Whether a norm is known to divide by the root mean square and multiply by its weight, and nobody changed it.

    In transformers, a class of this name that has this attribute does. Those that multiply by 1 + the weight have
    another one. A hook may bring weights from where they are kept.
    """
    is_known = type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")
    return is_known and not (norm._forward_pre_hooks or norm._forward_hooks or "forward" in vars(norm))


def all_at_once(tokens: torch.Tensor) -> bool:
    """Whether to compute all tokens, so that no shape depends on which are marked and nothing waits for the device."""
    return tokens.shape[1] == 1 or torch.compiler.is_compiling()


def _entropies(logits: torch.Tensor) -> torch.Tensor:
    """The entropies of some rows of logits over their likeliest tokens, `(rows, vocab_size)` to `(rows,)`."""
    return torch.special.entr(logits.topk(TOP, -1).values.float().softmax(-1)).sum(-1)
