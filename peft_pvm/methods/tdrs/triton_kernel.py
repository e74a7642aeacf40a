"""T-DRS as a Triton kernel, forward only: what `blockwise_attention` computes, without a score leaving the chip.

Only this module needs Triton; import it where the kernel is wanted.
"""

from __future__ import annotations

import os

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore

from .blockwise import Inputs
from .weights import LOG2_E, Steps


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows, keys and stages of the pipeline, the best first; the first that fits in shared memory is taken.
BLOCKS = ((64, 64, 2), (64, 32, 2), (32, 32, 2), (32, 32, 1), (16, 16, 1))
SHARED_MEMORY = 64 * 1024  # bytes, where the device does not say, as on AMD and before torch 2.7
PROGRAMS = 256  # with fewer blocks of rows than this, keys are split, so that decoding fills the GPU
SPLIT_KEYS = 256  # in a split at least
LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 2)  # finite, so that rows that see nothing come out finite


def triton_attention(inputs: Inputs, config: Steps) -> torch.Tensor:
    """Attention with reweighted scores, as `blockwise_attention` computes it.

    Products and sums are in fp32; attention weights are rounded to the dtype of the values.

    Args:
        inputs: What it is computed from, in fp32, fp16 or bf16.
        config: How it is reweighted.

    Returns:
        `(batch, num_queries, heads, value_dim)`, in the dtype of the values.

    Raises:
        NotImplementedError: Gradients, dropout or a bias by position are asked for, or there is no GPU.
        ValueError: A tensor of another dtype.
    """
    contents = (content.to(inputs.query.dtype) for content in (inputs.content_query, inputs.content_of(slice(None))))
    tensors = [inputs.query, inputs.key, *contents, inputs.value]
    if not inputs.query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError(
            f"The Triton kernel needs a GPU; given tensors on {inputs.query.device}. Use kernel='auto'."
        )
    if inputs.dropout > 0:
        raise NotImplementedError(
            f"The Triton kernel has no dropout; given {inputs.dropout}. Use kernel='blockwise', or set it to 0."
        )
    if inputs.bias is not None:
        raise NotImplementedError("The Triton kernel adds no bias by position. Use kernel='blockwise'.")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError("The Triton kernel has no gradients. Use kernel='blockwise', or torch.no_grad().")
    given = {tensor.dtype for tensor in tensors}
    if not given <= set(DTYPES):
        raise ValueError(f"The Triton kernel takes {DTYPES}, not {given}. Use kernel='blockwise'.")
    tensors = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    with torch.cuda.device_of(inputs.query):  # Triton launches on the current device
        return _Launch(inputs, config, tensors).attend()


class _Launch:
    """The passes over one attention layer, which differ in little but their outputs."""

    def __init__(self, inputs: Inputs, config: Steps, tensors: list[torch.Tensor]):
        self.inputs, self.config = inputs, config
        self.visibility = visibility = inputs.visibility
        self.batch, self.heads, self.num_queries, _ = inputs.query.shape
        _, kv_heads, num_keys, value_dim = inputs.value.shape
        group = self.heads // kv_heads

        query, key, content_query, content_key, value = tensors
        block_q, block_k, num_stages, num_warps = _block_sizes(group * self.num_queries, tensors)
        blocks = triton.cdiv(group * self.num_queries, block_q)
        splits = max(min(PROGRAMS // (blocks * self.batch * kv_heads), triton.cdiv(num_keys, SPLIT_KEYS)), 1)
        split_keys = triton.cdiv(triton.cdiv(num_keys, splits), block_k) * block_k
        self.splits = triton.cdiv(num_keys, split_keys)
        self.grid = (blocks, self.batch * kv_heads, self.splits)

        key_ranks, query_ranks = visibility.ranks()
        self.query_ranks = self._of_batch(query_ranks[:, 0])
        of_queries, of_keys = inputs.inter or (None, None)
        mask, least_bias = visibility.entries()
        if mask is not None:
            entries = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
            mask = entries.expand(self.batch, self.heads, self.num_queries, num_keys)
        self.arguments = dict(
            **_with_strides(query=query, key=key, content_query=content_query, content_key=content_key, value=value),
            **_with_strides(mask=mask),
            columns=visibility.columns,
            query_ranks=self.query_ranks,
            key_ranks=self._of_batch(key_ranks[:, 0]),
            query_modality=None if of_queries is None else self._of_batch(of_queries),
            key_modality=None if of_keys is None else self._of_batch(of_keys),
            num_queries=self.num_queries,
            num_keys=num_keys,
            split_keys=split_keys,
            kv_heads=kv_heads,
            scaling=float(inputs.scaling),
            softcap=None if inputs.softcap is None else float(inputs.softcap),
            window=None if visibility.mask_decides else visibility.sliding_window,
            least_bias=least_bias,
            sd_strength=float(config.sd_strength),
            dc_strength=float(config.dc_strength) or None,
            re_strength=float(config.re_strength) or None,
            CAUSAL=visibility.is_causal and not visibility.mask_decides,
            IN_LOGITS=config.form != "weights",
            AGAIN=config.counts_twice,
            GROUP=group,
            SCORE_DIM=query.shape[-1],
            CONTENT_DIM=content_query.shape[-1],
            VALUE_DIM=value_dim,
            SCORE_BLOCK=_padded(query.shape[-1]),
            CONTENT_BLOCK=_padded(content_query.shape[-1]),
            VALUE_BLOCK=_padded(value_dim),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            num_stages=num_stages,
            num_warps=num_warps,
        )

    def attend(self) -> torch.Tensor:
        """The last pass, after the statistics that it needs."""
        value = self.inputs.value
        shape = self.splits, self.batch, self.heads, self.num_queries, value.shape[-1]
        outputs = value.new_empty(shape, dtype=value.dtype if self.splits == 1 else torch.float32)
        log_totals = self._run("attention", outputs, self._row_factors())[0]
        if self.splits == 1:
            output = outputs[0]
        else:
            output = (outputs * log_totals.softmax(0).unsqueeze(-1)).sum(0).to(value.dtype)
        return output.transpose(1, 2).contiguous()

    def _row_factors(self) -> torch.Tensor | None:
        """d_max and the exponents a and b / log(1 + a) of `distance_boost`, `(3, batch, heads, num_queries)`."""
        config, visibility = self.config, self.visibility
        if not config.knows_distance:
            return None
        floors, log_least = config.floors, None
        if any(floor.is_multiple for floor in floors):
            log_total, farthest, least = self._run("statistics")
            log_least = (least.amin(0) - log_total.logsumexp(0)) * LOG2_E
            farthest = farthest.amax(0)
        elif visibility.is_causal and visibility.sliding_window is None and not visibility.mask_decides:
            # The first real token is visible and of rank 0.
            farthest = self.query_ranks.float().unsqueeze(1).expand(-1, self.heads, -1)
        else:
            farthest = self._run("distances")[1].amax(0)
        dc_exponent, re_exponent = (torch.zeros_like(farthest) + floor.exponent(log_least) for floor in floors)
        return torch.stack((farthest.clamp(min=1), dc_exponent, re_exponent / torch.log1p(dc_exponent)))

    def _run(
        self, mode: str, output: torch.Tensor | None = None, row_factors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One pass over the keys.

        Args:
            mode: "attention", "statistics" or "distances".
            output: What attention is written to, `(splits, batch, heads, num_queries, value_dim)`.
            row_factors: As `_row_factors` gives them, for attention.

        Returns:
            `(1 or 3, splits, batch, heads, num_queries)`, fp32: logarithm of the sum of the row's weights; for all but
            attention, also its farthest visible key and its least score. For distances only the second is set.
        """
        planes = 1 if mode == "attention" else 3
        shape = planes, self.splits, self.batch, self.heads, self.num_queries
        statistics = torch.empty(shape, dtype=torch.float32, device=self.query_ranks.device)
        _pass[self.grid](**self.arguments, output=output, row_factors=row_factors, statistics=statistics, MODE=mode)
        return statistics

    def _of_batch(self, tensor: torch.Tensor) -> torch.Tensor:
        """One int32 for each token, `(batch, length)`, in rows without gaps."""
        return tensor.to(torch.int32).expand(self.batch, -1).contiguous()


def _with_strides(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor | int | None]:
    """Each tensor with its strides: `query`, `query_0`, `query_1`, ...; the last axis is dense but for a mask."""
    arguments: dict[str, torch.Tensor | int | None] = {}
    for name, tensor in tensors.items():
        arguments[name] = tensor
        for axis in range(4 if name == "mask" else 3):
            arguments[f"{name}_{axis}"] = 0 if tensor is None else tensor.stride(axis)
    return arguments


def _padded(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)  # tl.dot takes no less than 16


def _block_sizes(rows: int, tensors: list[torch.Tensor]) -> tuple[int, int, int, int]:
    """Rows, keys, stages of the pipeline and warps."""
    query, key, content_query, content_key, value = (
        tensor.element_size() * _padded(tensor.shape[-1]) for tensor in tensors
    )
    available = SHARED_MEMORY
    if tensors[0].is_cuda:
        properties = torch.cuda.get_device_properties(tensors[0].device)
        available = getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)
    for most_rows, block_k, num_stages in BLOCKS:
        block_q = min(most_rows, _padded(rows))
        of_rows, of_keys = query + content_query, key + content_key + value
        if block_q * of_rows + num_stages * block_k * of_keys + 8 * block_q * block_k <= available:
            break
    # The registers of four warps do not hold two tiles of scores beside wide operands.
    num_warps = 8 if block_q * max(query, content_query, value) >= 64 * 256 else 4
    return block_q, block_k, num_stages, num_warps


@triton.jit
def _load(tensor, offsets, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that start at `offsets`, `(rows, BLOCK)`, 0 where there is nothing."""
    columns = tl.arange(0, BLOCK)
    inside = inside[:, None] & (columns < DIM)[None, :]
    return tl.load(tensor + offsets[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "split_keys"])  # they change with every token
def _pass(
    query, query_0, query_1, query_2,
    key, key_0, key_1, key_2,
    content_query, content_query_0, content_query_1, content_query_2,
    content_key, content_key_0, content_key_1, content_key_2,
    value, value_0, value_1, value_2,
    mask, mask_0, mask_1, mask_2, mask_3,
    columns,
    query_ranks, key_ranks, query_modality, key_modality,
    num_queries, num_keys, split_keys, kv_heads,
    scaling, softcap, window, least_bias,
    sd_strength, dc_strength, re_strength,
    output, row_factors, statistics,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, IN_LOGITS: tl.constexpr, AGAIN: tl.constexpr, GROUP: tl.constexpr,
    SCORE_DIM: tl.constexpr, CONTENT_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    SCORE_BLOCK: tl.constexpr, CONTENT_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of rows against a split of the keys. Rows are the queries of all heads that share keys, heads fastest.

    What is None is left out: `softcap`, `window`, `mask`, modalities and strengths. `least_bias` is None for a mask
    of 0 and 1.
    """
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = rows // GROUP
    in_rows = queries < num_queries
    # Offsets in int64: at a million tokens they outgrow int32.
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    query_index = queries.to(tl.int64)
    row_index = (batch * kv_heads * GROUP + head) * num_queries + query_index
    num_rows = tl.num_programs(1).to(tl.int64) * GROUP * num_queries

    first_query = tl.program_id(0) * BLOCK_Q // GROUP
    last_query = tl.minimum((tl.program_id(0) * BLOCK_Q + BLOCK_Q - 1) // GROUP, num_queries - 1)
    first_column = tl.load(columns).to(tl.int32)
    column = first_column + queries
    start = tl.program_id(2) * split_keys
    stop = tl.minimum(start + split_keys, num_keys)
    if CAUSAL:
        stop = tl.minimum(stop, first_column + last_query + 1)
    if window is not None:
        first_seen = tl.maximum(first_column + first_query - window + 1, 0)
        start = tl.maximum(start, first_seen // BLOCK_K * BLOCK_K)

    query_rank = tl.load(query_ranks + batch * num_queries + query_index, mask=in_rows, other=0)
    if query_modality is not None:
        of_rows = tl.load(query_modality + batch * num_queries + query_index, mask=in_rows, other=0)
    if MODE != "distances":
        offsets = batch * query_0 + head * query_1 + query_index * query_2
        query_block = _load(query, offsets, in_rows, SCORE_DIM, SCORE_BLOCK)
        offsets = batch * content_query_0 + head * content_query_1 + query_index * content_query_2
        content_block = _load(content_query, offsets, in_rows, CONTENT_DIM, CONTENT_BLOCK)
    if row_factors is not None:
        d_max = tl.load(row_factors + row_index, mask=in_rows, other=1.0)
        dc_exponent = tl.load(row_factors + num_rows + row_index, mask=in_rows, other=0.0)
        re_power = tl.load(row_factors + 2 * num_rows + row_index, mask=in_rows, other=0.0)
    largest = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    farthest = tl.zeros((BLOCK_Q,), tl.int32)
    least = tl.full((BLOCK_Q,), -LOWEST, tl.float32)
    attended = tl.zeros((BLOCK_Q, VALUE_BLOCK), tl.float32)

    for first_key in range(start, stop, BLOCK_K):
        keys = first_key + tl.arange(0, BLOCK_K)
        in_keys = keys < stop
        key_index = keys.to(tl.int64)
        visible = in_rows[:, None] & in_keys[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= column[:, None])
        if window is not None:
            visible = visible & (keys[None, :] > column[:, None] - window)
        if mask is not None:
            row_start = batch * mask_0 + head * mask_1 + query_index * mask_2
            entries = tl.load(mask + row_start[:, None] + (key_index * mask_3)[None, :], mask=visible, other=0)
            if least_bias is not None:
                entries = entries.to(tl.float32)
                visible = visible & (entries > least_bias)
            else:
                visible = visible & (entries != 0)
        key_rank = tl.load(key_ranks + batch * num_keys + key_index, mask=in_keys, other=0)
        # 0 where hidden, so that nothing overflows there.
        distance = tl.where(visible, tl.abs(query_rank[:, None] - key_rank[None, :]), 0)
        if MODE != "attention":
            farthest = tl.maximum(farthest, tl.max(distance, 1))

        if MODE != "distances":
            key_offsets = batch * key_0 + kv_head * key_1 + key_index * key_2
            key_block = _load(key, key_offsets, in_keys, SCORE_DIM, SCORE_BLOCK).to(query_block.dtype)
            scores = tl.dot(query_block, tl.trans(key_block), input_precision="ieee") * scaling
            if softcap is not None:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
            if least_bias is not None:
                scores += tl.where(visible, entries, 0.0)
            key_offsets = batch * content_key_0 + kv_head * content_key_1 + key_index * content_key_2
            key_block = _load(content_key, key_offsets, in_keys, CONTENT_DIM, CONTENT_BLOCK).to(content_block.dtype)
            semantic = (tl.dot(content_block, tl.trans(key_block), input_precision="ieee") + 1) / 2
            step = sd_strength * semantic
            if query_modality is not None:
                of_keys = tl.load(key_modality + batch * num_keys + key_index, mask=in_keys, other=0)
                applies = of_rows[:, None] != of_keys[None, :]
                step = tl.where(applies, step, 0.0)
            raised = scores + step
            if MODE == "statistics":
                least = tl.minimum(least, tl.min(tl.where(visible, raised, -LOWEST), 1))
            elif AGAIN:
                again = scores
                if query_modality is not None:
                    again = tl.where(applies, scores, 0.0)
                raised += again

            if row_factors is not None:
                x = distance.to(tl.float32) / (d_max[:, None] * (1 + semantic))
                scaled = dc_exponent[:, None] * x * x
                boost = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
                if dc_strength is not None:
                    boost += dc_strength * tl.exp(-scaled)
                if re_strength is not None:
                    # log(1 + scaled), also where scaled is small: the error of the sum is undone by the quotient.
                    above_one = 1 + scaled
                    undo = scaled / tl.maximum(above_one - 1, 1e-30)
                    log1p = tl.where(above_one == 1, scaled, tl.log(above_one) * undo)
                    boost += re_strength * tl.exp(-re_power[:, None] * log1p)
                if query_modality is not None:
                    boost = tl.where(applies, boost, 0.0)
                if IN_LOGITS:
                    raised += scores * boost

            raised = tl.where(visible, raised, LOWEST)
            new_largest = tl.maximum(largest, tl.max(raised, 1))
            weights = tl.exp(raised - new_largest[:, None])
            if row_factors is not None and not IN_LOGITS:
                weights = weights * (1 + boost)
            shrink = tl.exp(largest - new_largest)
            total = total * shrink + tl.sum(weights, 1)
            largest = new_largest
            if MODE == "attention":
                key_offsets = batch * value_0 + kv_head * value_1 + key_index * value_2
                value_block = _load(value, key_offsets, in_keys, VALUE_DIM, VALUE_BLOCK)
                attended = attended * shrink[:, None]
                attended += tl.dot(weights.to(value_block.dtype), value_block, input_precision="ieee")

    total = tl.where(total > 0, total, 1.0)  # a split in which there is no key to see
    place = tl.program_id(2) * num_rows + row_index
    plane = tl.num_programs(2) * num_rows
    if MODE != "distances":
        tl.store(statistics + place, largest + tl.log(total), mask=in_rows)
    if MODE != "attention":
        tl.store(statistics + plane + place, farthest.to(tl.float32), mask=in_rows)
        tl.store(statistics + 2 * plane + place, least, mask=in_rows)
    else:
        dims = tl.arange(0, VALUE_BLOCK)
        inside = in_rows[:, None] & (dims < VALUE_DIM)[None, :]
        attended = (attended / total[:, None]).to(output.dtype.element_ty)
        tl.store(output + place[:, None] * VALUE_DIM + dims[None, :], attended, mask=inside)
