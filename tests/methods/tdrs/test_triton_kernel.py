"""The Triton kernel computes what `blockwise_attention` computes: on a GPU, and without one in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and PEFT has imported it by now. So without a GPU a session runs
this file once more, in a process of its own in which the variable is set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forwards import difference, logits
from tiny_vlms import FAMILIES
from torch.nn.attention.flex_attention import create_block_mask

from peft_pvm import DIPEConfig, TDRSConfig, attached
from peft_pvm.methods.tdrs.blockwise import Inputs, blockwise_attention
from peft_pvm.tokens.visibility import Visibility


pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PLAIN: dict[str, Any] = {"dc_floor": 0.1, "re_floor": 0.3}  # floors


@dataclass(frozen=True)
class Case:
    """Inputs and settings.

    Attributes:
        config: Fields of the configuration.
        mask: Makes the mask from the shape `(batch, heads, num_queries, num_keys)`.
        past: Keys before the first query's own; as a tensor if `past_is_tensor`.
        unfilled: Keys after the last query's own, as in a static cache.
        heads: Of queries and of keys.
        widths: score_dim, head_dim and value_dim.
        visibility: Other fields of the visibility.
        inputs: Other fields of the inputs.
        blocks: Rows, keys and stages of the kernel's blocks.
        split_keys: The least number of keys in a split.
    """

    config: dict[str, Any] = field(default_factory=dict)
    mask: Callable[[tuple[int, ...]], Any] = lambda shape: None
    num_queries: int = 21
    past: int = 49
    past_is_tensor: bool = False
    unfilled: int = 0
    heads: tuple[int, int] = (2, 1)
    widths: tuple[int, int, int] = (24, 16, 40)
    dtype: torch.dtype = torch.float32
    inter: bool = False
    transposed: bool = False
    visibility: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[int, int, int] = (32, 32, 1)
    split_keys: int = 256

    def build(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        heads, kv_heads = self.heads
        score_dim, head_dim, value_dim = self.widths
        num_keys = self.past + self.num_queries + self.unfilled

        def draw(heads: int, length: int, width: int, unit: bool = False) -> torch.Tensor:
            tensor = torch.randn(2, heads, length, width, generator=generator)
            tensor = (F.normalize(tensor, dim=-1) if unit else tensor).to(DEVICE, self.dtype)
            return tensor.transpose(1, 2).contiguous().transpose(1, 2) if self.transposed else tensor

        def modality(length: int) -> torch.Tensor:
            return (torch.rand(2, length, generator=generator) < 0.5).to(DEVICE)

        return Inputs(
            draw(heads, self.num_queries, score_dim),
            draw(kv_heads, num_keys, score_dim),
            draw(kv_heads, num_keys, value_dim),
            draw(heads, self.num_queries, head_dim, unit=True),
            draw(kv_heads, num_keys, head_dim, unit=True),
            Visibility(
                self.mask((2, heads, self.num_queries, num_keys)),
                self.num_queries,
                num_keys,
                torch.tensor(self.past, device=DEVICE) if self.past_is_tensor else self.past,
                device=DEVICE,
                **self.visibility,
            ),
            (modality(self.num_queries), modality(num_keys)) if self.inter else None,
            scaling=1.3 * score_dim**-0.5,
            **self.inputs,
        )


def causal(shape: tuple[int, ...], past: int = 49) -> torch.Tensor:
    _, _, num_queries, num_keys = shape
    columns = torch.arange(num_queries, device=DEVICE)[:, None] + past
    return torch.arange(num_keys, device=DEVICE) <= columns


def padding(shape: tuple[int, ...], hidden: slice, missing: int = 0) -> torch.Tensor:
    mask = torch.ones(shape[0], shape[3] - missing, dtype=torch.long, device=DEVICE)
    mask[1, hidden] = 0
    return mask


def left_padding(shape: tuple[int, ...]) -> torch.Tensor:
    return padding(shape, slice(0, 53))  # the first queries of the second row see nothing


def right_padding(shape: tuple[int, ...]) -> torch.Tensor:
    return padding(shape, slice(60, None))


def gaps(shape: tuple[int, ...], per_head: bool = False) -> torch.Tensor:
    """A causal mask of four axes with gaps, in which one query sees nothing."""
    batch, heads, num_queries, num_keys = shape
    drawn = torch.rand(batch, heads if per_head else 1, num_queries, num_keys, generator=torch.Generator())
    mask = causal(shape) & (drawn < 0.7).to(DEVICE)
    mask[1, :, 3] = False
    return mask


def added(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A mask to be added, the same for all rows and heads, and longer than the keys."""
    _, _, num_queries, num_keys = shape
    bias = torch.randn(1, 1, num_queries, num_keys + 5, generator=torch.Generator()).to(DEVICE, dtype)
    bias[..., :num_keys].masked_fill_(~causal(shape), torch.finfo(dtype).min)
    return bias


def block_mask(shape: tuple[int, ...]) -> Any:
    batch, _, num_queries, num_keys = shape

    def visible(b, h, q, k):
        return (k <= q + 49) & (k >= 5 * b)

    return create_block_mask(visible, batch, None, num_queries, num_keys, device=DEVICE.type)


CASES = {
    "default": Case(blocks=(16, 32, 1)),
    "sd": Case({"dc_strength": 0.0, "re_strength": 0, "sd_strength": 3}),
    "dc": Case({"sd_strength": 0.0, "re_strength": 0.0}),
    "dc-plain": Case({"sd_strength": 0.0, "re_strength": 0.0, "dc_floor": 0.1}),
    "re": Case({"sd_strength": 0.0, "dc_strength": 0.0, "re_strength": 0.8}),
    "plain-floors": Case(PLAIN),
    "plain-dc-floor": Case({"dc_floor": 0.1}),
    "plain-re-floor": Case({"re_floor": 0.3}),
    "floor-near-one": Case({"dc_floor": "100000*min", "re_floor": "1.5*min"}),
    "from-the-start": Case(num_queries=37, past=0),
    "logits": Case({"form": "logits"}),
    "logits-plain": Case({"form": "logits", "sd_strength": 0.0, **PLAIN}),
    "literal": Case({"form": "literal"}),
    "literal-sd": Case({"form": "literal", "dc_strength": 0.0, "re_strength": 0.0}),
    "inter-literal": Case({"pairs": "inter", "form": "literal", **PLAIN}, inter=True),
    "inter": Case({"pairs": "inter"}, inter=True),
    "inter-logits-plain": Case({"pairs": "inter", "form": "logits", **PLAIN}, inter=True),
    "softcap": Case(inputs={"softcap": 5.0}),
    "softcap-logits": Case({"form": "logits"}, inputs={"softcap": 5.0}),
    "three-heads-share": Case(PLAIN, heads=(6, 2)),
    "no-sharing": Case(PLAIN, heads=(3, 3)),
    "wide-scores": Case(PLAIN, widths=(40, 24, 16)),
    "all-widths-powers-of-two": Case(widths=(32, 16, 64)),
    "transposed": Case(transposed=True),
    "past-in-a-tensor": Case(PLAIN, past_is_tensor=True),
    "static-cache": Case(past=30, past_is_tensor=True, unfilled=19),
    "one-query": Case(num_queries=1, past=69),
    "one-query-plain": Case(PLAIN, num_queries=1, past=69, past_is_tensor=True),
    "one-query-split": Case(num_queries=1, past=89, split_keys=20),
    "window": Case(visibility={"sliding_window": 11}, blocks=(16, 32, 1)),
    "window-plain": Case(PLAIN, visibility={"sliding_window": 11}),
    "window-padding-split": Case(PLAIN, left_padding, visibility={"sliding_window": 35}, split_keys=20),
    "not-causal": Case(PLAIN, past=0, visibility={"is_causal": False}),
    "not-causal-padding": Case(mask=right_padding, visibility={"is_causal": False}),
    "left-padding-split": Case(mask=left_padding, split_keys=20),
    "left-padding-plain": Case(PLAIN, left_padding),
    "right-padding-plain": Case(PLAIN, right_padding),
    "short-padding": Case(PLAIN, lambda shape: padding(shape, slice(20, 25), missing=8), past=41, unfilled=8),
    "bool": Case(mask=gaps),
    "bool-plain": Case(PLAIN, gaps),
    "bool-per-head-split": Case(mask=lambda shape: gaps(shape, per_head=True), split_keys=20),
    "added": Case(mask=added),
    "added-plain-logits": Case({"form": "logits", **PLAIN}, added),
    "block-mask": Case(mask=block_mask),
    "fp16-added": Case(mask=lambda shape: added(shape, torch.float16), dtype=torch.float16),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16-split": Case(num_queries=2, past=68, dtype=torch.bfloat16, split_keys=20),
    "large-blocks": Case(num_queries=80, past=9, blocks=(64, 64, 2)),
}


def repair_interpreter() -> None:
    """Two faults of Triton's interpreter up to 3.7, of which the compiled kernel knows nothing."""
    from triton.runtime import interpreter

    # It multiplies the bits of bf16 numbers instead of the numbers.
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, fp32) if x.dtype.scalar == bf16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    fp32, bf16 = interpreter.tl.float32, interpreter.tl.bfloat16
    builder.create_dot = create_dot

    # Its scalars are arrays of one element, which NumPy 2.4 no longer takes for the bounds of a loop.
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor


if INTERPRETED or DEVICE.type == "cuda":
    from peft_pvm.methods.tdrs import triton_kernel

    if INTERPRETED:
        repair_interpreter()

    @pytest.mark.parametrize("name", CASES)
    def test_equals_blockwise(name: str, monkeypatch: pytest.MonkeyPatch):
        case = CASES[name]
        monkeypatch.setattr(triton_kernel, "BLOCKS", (case.blocks,))
        monkeypatch.setattr(triton_kernel, "SPLIT_KEYS", case.split_keys)
        inputs, config = case.build(), TDRSConfig(**case.config)
        expected, _ = blockwise_attention(inputs, config)
        computed = triton_kernel.triton_attention(inputs, config)
        assert computed.dtype == expected.dtype
        assert computed.isfinite().all()
        visible = inputs.visibility.mask()
        if visible is not None:
            sees = visible.any(-1).expand(inputs.query.shape[:3]).transpose(1, 2)
            expected, computed = expected[sees], computed[sees]
        assert difference(computed.float(), expected.float()) < TOLERANCE[case.dtype]

    @pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
    def test_in_a_model(name: str):
        """With sliding windows, padding, a cache and DIPE."""
        family = FAMILIES[name]
        model = family.build().to(DEVICE)
        inputs = {name: tensor.to(DEVICE) for name, tensor in family.inputs(model, "t4 i t6", "t9").items()}
        real = inputs["attention_mask"].bool()
        found = []
        for kernel in ("blockwise", "triton"):
            with attached(model, DIPEConfig(max_distance=0), TDRSConfig(kernel=kernel)):
                found.append(logits(model, inputs)[real])
        assert difference(*found) < TOLERANCE[torch.float32]

    def test_refuses_what_it_cannot():
        config = TDRSConfig()
        with pytest.raises(NotImplementedError, match="dropout"):
            triton_kernel.triton_attention(Case(inputs={"dropout": 0.1}).build(), config)
        with pytest.raises(NotImplementedError, match="bias by position"):
            triton_kernel.triton_attention(Case(inputs={"bias": torch.zeros(1)}).build(), config)
        inputs = Case().build()
        inputs.value.requires_grad_()
        with pytest.raises(NotImplementedError, match="gradients"):
            triton_kernel.triton_attention(inputs, config)
        with pytest.raises(ValueError, match="float64"):
            triton_kernel.triton_attention(Case(dtype=torch.float64).build(), config)

else:

    def test_without_a_gpu_it_says_so():
        family = FAMILIES["llava"]
        model = family.build()
        inputs = family.inputs(model, "t4 i t6")
        with attached(model, TDRSConfig(kernel="triton")):
            with pytest.raises(NotImplementedError, match="needs a GPU; given tensors on cpu"):
                logits(model, inputs)
            with pytest.raises(NotImplementedError, match="does not return attention weights"):
                logits(model, inputs, output_attentions=True)

    def test_in_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        root = Path(__file__).parents[3]
        finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert f"{len(CASES) + 3} passed" in finished.stdout
