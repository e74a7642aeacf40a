"""What PVM is compared with: a branch of its size that does not look at the image (arXiv 2605.00814, section 4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_pvm.methods.pvm.branch import Gate


class MLPBranch(nn.Module):
    """A gated SwiGLU beside the FFN of a decoder layer, where PVM has its branch.

    Args:
        layer: The decoder layer.
        hidden_size: Its width.
        r: Width of the branch.
        num_parameters: The number of parameters, met as closely as the widths allow.
        std: Standard deviation of the initial weights.
        eps: Epsilon of the norms.
    """

    def __init__(self, layer: Any, hidden_size: int, r: int, num_parameters: int, std: float, eps: float):
        super().__init__()
        width = round((num_parameters - 2 * hidden_size * r - r - 1) / (3 * r))
        self.reducer = nn.Linear(hidden_size, r, bias=False)
        self.norm = nn.RMSNorm(r, eps=eps)
        self.gate_proj = nn.Linear(r, width, bias=False)
        self.up_proj = nn.Linear(r, width, bias=False)
        self.down_proj = nn.Linear(width, r, bias=False)
        self.expander = nn.Linear(r, hidden_size, bias=False)
        self.gate = Gate(0.0)
        self.eps = eps
        for linear in (self.reducer, self.gate_proj, self.up_proj, self.down_proj, self.expander):
            nn.init.normal_(linear.weight, std=std)
        self._residuals: list[torch.Tensor] = []
        layer.post_attention_layernorm.register_forward_pre_hook(self._take_residual)
        layer.mlp.register_forward_hook(self._add_branch)

    def _take_residual(self, module: nn.Module, args: tuple) -> None:
        self._residuals.append(args[0])

    def _add_branch(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        residual = self._residuals.pop().to(self.gate.weight.dtype)
        return output + self(residual).to(output.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, seq_len, hidden_size)` to the same shape."""
        latent = self.norm(self.reducer(hidden_states))
        latent = self.down_proj(F.silu(self.gate_proj(latent)) * self.up_proj(latent))
        expanded = self.expander(latent)
        return self.gate(F.rms_norm(expanded, expanded.shape[-1:], eps=self.eps))


def add_mlp_branches(model: Any, layers: list[int], r: int, num_parameters: int) -> None:
    """Put an `MLPBranch` beside decoder layers of a base.

    Args:
        model: The base, without adapters.
        layers: Indices of the decoder layers.
        r: Width of each branch.
        num_parameters: Of all branches together.
    """
    config = model.config.text_config
    for layer_idx in layers:
        layer = model.model.language_model.layers[layer_idx]
        layer.mlp.branch = MLPBranch(  # below the FFN: the layer keeps its shape
            layer, config.hidden_size, r, num_parameters // len(layers), config.initializer_range, config.rms_norm_eps
        )
