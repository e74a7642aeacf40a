"""T-DRS block by block: equal to whole matrices, in memory that grows with the length; gradients and weights."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch
import torch.nn.functional as F
from environment import on_a_cpu
from forwards import difference, in_double, logits
from oracle import oracle, reweighted
from tiny_vlms import FAMILIES
from transformers import DynamicCache

from peft_pvm import DIPEConfig, TDRSConfig, attached
from peft_pvm.methods.tdrs import blockwise, method
from peft_pvm.methods.tdrs.blockwise import Inputs, blockwise_attention
from peft_pvm.tokens.visibility import Visibility
from peft_pvm.utils.packages import CACHE


def random_inputs(visibility: Visibility, seed: int = 0, **fields: Any) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    num_queries, num_keys = visibility.num_queries, visibility.num_keys

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(2, heads, length, 16, generator=generator)

    content = F.normalize(draw(4, num_queries), dim=-1), F.normalize(draw(2, num_keys), dim=-1)
    scores = draw(4, num_queries), draw(2, num_keys), draw(2, num_keys)
    return Inputs(*scores, *content, visibility, **{"inter": None, "scaling": 0.25, **fields})


def naive(inputs: Inputs, config: TDRSConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """On whole matrices, in float64."""
    key, value, content_key = (
        tensor.double().repeat_interleave(2, 1) for tensor in (inputs.key, inputs.value, inputs.content_key)
    )
    scores = inputs.query.double() @ key.transpose(2, 3) * inputs.scaling
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if inputs.bias is not None:
        scores = scores + inputs.bias
    similarity = inputs.content_query.double() @ content_key.transpose(2, 3)
    visible = inputs.visibility.mask()
    hidden = torch.zeros_like(scores, dtype=torch.bool) if visible is None else ~visible.expand_as(scores)
    columns = inputs.visibility.columns.double()
    distance = (columns[:, None] - torch.arange(key.shape[2]))[None, None]
    of_queries, of_keys = inputs.inter or (torch.ones(2, 1, dtype=bool), torch.zeros(2, 1, dtype=bool))
    inter = of_queries[:, None, :, None] != of_keys[:, None, None]
    weights = reweighted(config, scores, similarity, distance, hidden, inter)
    return (weights @ value).transpose(1, 2), weights


CASES = {"decode": (1, 700, 699), "whole": (300, 300, 0), "long": (800, 800, 0), "cached": (65, 700, 635)}


@pytest.mark.parametrize("form", ["weights", "logits", "literal"])
@pytest.mark.parametrize(("num_queries", "num_keys", "first"), CASES.values(), ids=CASES)
def test_equals_whole_matrices(form: str, num_queries: int, num_keys: int, first: int, monkeypatch):
    """Also in other blocks, which change nothing."""
    inputs = random_inputs(Visibility(None, num_queries, num_keys, first))
    config = TDRSConfig(form=form)
    expected, expected_weights = naive(inputs, config)
    output, weights = blockwise_attention(inputs, config)
    assert weights is None
    assert difference(output.double(), expected) < 1e-5
    output, weights = blockwise_attention(inputs, config, wants_weights=True)
    assert difference(output.double(), expected) < 1e-5
    assert difference(weights.double(), expected_weights) < 1e-5
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", 2**10)
    monkeypatch.setattr(blockwise, "ELEMENTS_IN_CACHE", 2**10)
    assert difference(blockwise_attention(inputs, config)[0].double(), expected) < 1e-5


@pytest.mark.parametrize("form", ["weights", "logits", "literal"])
@pytest.mark.parametrize("num_queries", [1, 300])
def test_with_all_that_attention_may_bring(form: str, num_queries: int):
    """In several blocks: pairs of one modality as they are, scores that are capped, and a bias by distance."""
    generator = torch.Generator().manual_seed(1)
    of_keys = torch.rand(2, 300, generator=generator) < 0.4
    inputs = random_inputs(
        Visibility(None, num_queries, 300, 300 - num_queries),
        inter=(of_keys[:, -num_queries:], of_keys),
        softcap=3.0,
        bias=torch.randn(1, 4, num_queries, 300, generator=generator),
    )
    config = TDRSConfig(form=form, pairs="inter", sd_strength=2.0)
    expected, expected_weights = naive(inputs, config)
    output, weights = blockwise_attention(inputs, config, wants_weights=True)
    assert difference(output.double(), expected) < 1e-5
    assert difference(weights.double(), expected_weights) < 1e-5


@on_a_cpu
def test_few_hidden_scores_are_computed_and_few_calls_are_made(monkeypatch):
    """With a head of keys for each head, 512 tokens fit into one block, of which half would be hidden."""
    computed: list[int] = []
    attend = blockwise._Rows._attend_pairs

    def counting(rows: Any, pairs: slice, queries: slice, keys: slice, block: Any):
        output, weights = attend(rows, pairs, queries, keys, block)
        computed.append(weights.numel())
        return output, weights

    monkeypatch.setattr(blockwise._Rows, "_attend_pairs", counting)
    states = [torch.randn(1, 4, 512, 16) for _ in range(5)]
    blockwise_attention(Inputs(*states, Visibility(None, 512, 512, 0), None, 0.25), TDRSConfig())
    assert sum(computed) <= 0.65 * 4 * 512**2
    assert len(computed) == 4


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_a_token_takes_keys_a_few_at_a_time(name: str, monkeypatch):
    """Their rotation too is undone a few at a time, and the result is the full forward's."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, "t9 i t20")
    length = inputs["input_ids"].shape[1]
    made: list[int] = []
    content_of = Inputs.content_of

    def note(self: Inputs, keys: slice) -> torch.Tensor:
        made.append(keys.stop - keys.start)
        return content_of(self, keys)

    with attached(model, DIPEConfig(max_distance=0), TDRSConfig()):
        expected = logits(model, inputs)[:, -1]
        cache = DynamicCache()
        logits(model, family.inputs(model, "t9 i t20", stop=length - 1), **{CACHE: cache}, use_cache=True)
        monkeypatch.setattr(blockwise, "ELEMENTS_IN_CACHE", 1)
        monkeypatch.setattr(Inputs, "content_of", note)
        last = family.inputs(model, "t9 i t20", start=length - 1)
        assert difference(logits(model, last, **{CACHE: cache}, use_cache=True)[:, -1], expected) < 1e-5
    assert max(made) == 16
    assert sum(made) == 3 * length


def test_gradients_equal_those_of_whole_matrices():
    visibility = Visibility(None, 70, 70, 0)
    inputs = random_inputs(visibility)
    tensors = (inputs.query, inputs.key, inputs.value, inputs.content_query, inputs.content_key)
    for config in (TDRSConfig(), TDRSConfig(form="logits", dc_floor=0.1)):
        gradients = []
        for compute in (naive, blockwise_attention):
            for tensor in tensors:
                tensor.grad = None
                tensor.requires_grad_()
            compute(inputs, config)[0].square().sum().backward()
            gradients.append([tensor.grad for tensor in tensors])
        assert all(difference(*pair) < 1e-4 for pair in zip(*gradients))
        assert all(gradient.abs().max() > 1e-2 for gradient in gradients[0])


def test_training_keeps_no_scores():
    """For the backward pass, less is kept than one matrix of scores."""
    inputs = random_inputs(Visibility(None, 600, 600, 0))
    inputs.query.requires_grad_()
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output, _ = blockwise_attention(inputs, TDRSConfig())
    assert sum(kept) < 2 * 4 * 600 * 600 / 4
    output.sum().backward()
    assert inputs.query.grad.abs().max() > 0


@pytest.mark.parametrize("form", ["weights", "logits"])
def test_gradients_under_a_mask_of_infinities(form: str):
    hidden = ~torch.ones(30, 30).tril().bool()
    mask = torch.zeros(2, 1, 30, 30).masked_fill(hidden, -math.inf)
    gradients = []
    for visibility in (Visibility(mask, 30, 30, 0), Visibility(None, 30, 30, 0)):
        inputs = random_inputs(visibility)
        inputs.query.requires_grad_()
        blockwise_attention(inputs, TDRSConfig(form=form))[0].square().sum().backward()
        gradients.append(inputs.query.grad)
    assert gradients[0].isfinite().all()
    assert difference(*gradients) < 1e-4


def test_gradients_through_a_model():
    family = FAMILIES["qwen3_vl"]
    inputs = family.inputs(family.build(), "t4 i t3 i t6")
    gradients = []
    for kind in ("oracle", "plain", "checkpointed"):
        model = family.build()
        embeddings = model.get_input_embeddings()
        if kind == "oracle":
            with oracle(model, inputs, dipe=DIPEConfig(max_distance=0), tdrs=TDRSConfig()) as reference:
                reference(**in_double(inputs)).logits.square().mean().backward()
        else:
            with attached(model, DIPEConfig(max_distance=0), TDRSConfig()):
                embeddings.weight.requires_grad_()
                model.train()
                if kind == "checkpointed":
                    model.gradient_checkpointing_enable()
                model(**inputs, use_cache=False).logits.square().mean().backward()
        gradients.append(embeddings.weight.grad.double())
    expected, *others = gradients
    assert expected.abs().max() > 1e-3
    for found in others:
        assert difference(found, expected) < 2e-5


def test_true_weights_are_returned():
    """With `output_attentions`, on the eager kernel and on sdpa, which itself returns none."""
    family = FAMILIES["llava"]
    for kernel in ("eager", "sdpa"):
        model = family.build(attn_implementation=kernel)
        inputs = family.inputs(model, "t4 i t6")
        with oracle(family.build(), inputs, tdrs=TDRSConfig()) as reference, torch.no_grad():
            expected = reference(**in_double(inputs), output_attentions=True).attentions
        with attached(model, TDRSConfig()), torch.no_grad():
            outputs = model(**inputs, output_attentions=True)
            assert len(outputs.attentions) == len(expected) == 3
            for found, true in zip(outputs.attentions, expected):
                assert difference(found.double(), true) < 1e-5
            assert difference(outputs.logits, logits(model, inputs)) < 1e-5


def test_dropout_is_applied():
    """To the weights after they were normalised, so that the mean stays: by a regression on what is expected."""
    inputs = random_inputs(Visibility(None, 64, 64, 0), dropout=0.5)
    config = TDRSConfig()
    torch.manual_seed(0)
    drawn = torch.stack([blockwise_attention(inputs, config)[0] for _ in range(200)])
    expected, _ = naive(inputs, config)
    assert difference(drawn[0], drawn[1]) > 0.1
    mean = drawn.mean(0).double()
    slope = (mean * expected).sum() / expected.square().sum()
    assert abs(slope - 1) < 0.02
    _, weights = blockwise_attention(inputs, config, wants_weights=True)
    dropped = (weights == 0).double().mean() - (inputs.visibility.mask() == 0).double().mean()
    assert abs(dropped / (inputs.visibility.mask().double().mean()) - 0.5) < 0.02


MEASURE = """
import re, torch
from pathlib import Path
import torch.nn.functional as F
from peft_pvm import TDRSConfig
from peft_pvm.methods.tdrs.blockwise import Inputs, blockwise_attention
from peft_pvm.tokens.visibility import Visibility

def peak():
    '''KiB this program held at most (ru_maxrss would begin with what the process that started it held).'''
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


torch.set_num_threads(1)
length = 4_096
torch.manual_seed(0)
query, key, value, content_query, content_key = (torch.randn(1, 8, length, 64) for _ in range(5))
contents = F.normalize(content_query, dim=-1), F.normalize(content_key, dim=-1)
visibility = Visibility(None, length, length, 0)
inputs = Inputs(query, key, value, *contents, visibility, None, 0.125)
before = peak()
output, _ = blockwise_attention(inputs, TDRSConfig())
assert output.isfinite().all()
print(before * 1024, peak() * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from Linux's /proc")
def test_memory_is_linear_in_length():
    """4,096 tokens, 8 heads of 64: one matrix of scores would take 512 MiB."""
    before, peak = map(int, fresh.run(MEASURE).split())
    assert 0 < before < peak < before + 2**27


def test_a_row_of_padding_is_finite_and_changes_nothing():
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    inputs = random_inputs(Visibility(mask, 12, 12, 0))
    output, _ = blockwise_attention(inputs, TDRSConfig())
    assert output.isfinite().all()
    assert math.isfinite(output.sum())


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, True),
        ({"kernel": "blockwise"}, False),
        ({"is_cuda": False}, False),
        ({"wants_weights": True}, False),
        ({"dropout": 0.1}, False),
        ({"dtype": torch.float64}, False),
        ({"requires_grad": True}, False),
        ({"requires_grad": True, "no_grad": True}, True),
        ({"triton": False}, False),
        ({"triton": False, "kernel": "triton"}, ImportError),
        ({"wants_weights": True, "kernel": "triton"}, NotImplementedError),
        ({"is_cuda": False, "kernel": "triton"}, True),
        ({"bias": torch.zeros(1)}, False),
        ({"compiling": True}, False),
        ({"compiling": True, "kernel": "triton"}, NotImplementedError),
    ],
)
def test_which_kernel_is_chosen(changes: dict[str, Any], takes: bool | type[Exception], monkeypatch):
    """On what stands for a GPU: the choice looks at nothing but these."""
    given = {"is_cuda": True, "dtype": torch.float32, "requires_grad": False, "kernel": "auto", **changes}
    tensor = SimpleNamespace(**{name: given[name] for name in ("is_cuda", "dtype", "requires_grad")})
    others = {"dropout": changes.get("dropout", 0.0), "bias": changes.get("bias")}
    inputs = SimpleNamespace(query=tensor, key=tensor, value=tensor, **others)
    monkeypatch.setattr(method, "_has_triton", lambda: changes.get("triton", True))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: changes.get("compiling", False))
    weighing = method.Reweighting(TDRSConfig(kernel=given["kernel"]), None, None)
    with torch.set_grad_enabled("no_grad" not in changes):
        if isinstance(takes, bool):
            assert weighing.takes_triton(inputs, changes.get("wants_weights", False)) is takes
        else:
            with pytest.raises(takes):
                weighing.takes_triton(inputs, changes.get("wants_weights", False))
