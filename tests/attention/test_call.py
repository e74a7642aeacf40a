"""`AttentionCall` against softmax attention written out in float64, and what its kernel is handed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_pvm import TDRSConfig
from peft_pvm.attention.call import WIDEST_FOR_FLASH, AttentionCall, base_kernel, records_gradients, scaled_products
from peft_pvm.attention.dispatch import SteeringHandle
from peft_pvm.attention.reference import ReferenceStages
from peft_pvm.attention.stages import Bias, KeyScale, LayerStages, Positions, Stage, Values
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.memory import Coverage, VisualMemory
from peft_pvm.tuners.attention_method import SteeredLayer


BATCH, HEADS, KV_HEADS, QUERIES, KEYS, WIDTH = 2, 4, 2, 3, 5, 8
VISUAL = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
TOLERANCE = {"eager": 1e-6, "sdpa": 1e-12}  # the former's softmax is in fp32, whatever it is given


@pytest.fixture
def attention() -> LlamaAttention:
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=1
    )
    return LlamaAttention(config, layer_idx=0).eval()


def context_of(visual: torch.Tensor = VISUAL, num_queries: int = QUERIES) -> VisualContext:
    """The last tokens of a batch, the others of which are in the cache."""
    past, memory = visual.shape[1] - num_queries, VisualMemory()
    for start, stop in ((0, past), (past, visual.shape[1])):
        context = VisualContext(visual[:, start:stop])
        context.read(torch.randn(len(visual), stop - start, 2), memory, Coverage(start, start))
        memory = context.memory
    return context


def call_of(attention: LlamaAttention, kernel: str = "sdpa", value_dim: int = WIDTH, **fields: Any) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES).expand(BATCH, 1, -1, -1).clone()
    mask[0, :, :, 1] = False
    made = dict(
        module=attention,
        query=draw(BATCH, HEADS, QUERIES, WIDTH),
        key=draw(BATCH, KV_HEADS, KEYS, WIDTH),
        value=draw(BATCH, KV_HEADS, KEYS, value_dim),
        attention_mask=torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min),
        context=context_of(),
        kernel=kernel,
        kwargs={},
    )
    return AttentionCall(**{**made, **fields})


def by_hand(call: AttentionCall, query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention, pair by pair of heads."""
    outputs = []
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        scores = torch.einsum("bqd,bkd->bqk", query[:, head], key[:, own]) * scaling + call.attention_mask[:, 0]
        outputs.append(torch.einsum("bqk,bkd->bqd", scores.softmax(-1), call.value[:, own]))
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("value_dim", [WIDTH, 3, 2 * WIDTH, 2 * WIDTH + 3, 5 * WIDTH])
@pytest.mark.parametrize("extra", [None, 0, 5], ids=["as given", "other scores", "widened"])
def test_run_kernel(attention: LlamaAttention, kernel: str, value_dim: int, extra: int | None):
    """With values of any width, and scores of other queries and keys: as softmax attention."""
    call = call_of(attention, kernel, value_dim)
    query, key = call.query, call.key
    if extra is not None:
        query, key = (torch.cat([t.flip(-1), t[..., :extra]], -1) for t in (query, key))
        call.widened = query, key
    assert all(found is expected for found, expected in zip(call.scored_by, (query, key)))
    output, _ = call.run_kernel()
    assert output.shape == (BATCH, QUERIES, HEADS, value_dim)
    torch.testing.assert_close(output, by_hand(call, query, key, WIDTH**-0.5), rtol=0, atol=TOLERANCE[kernel])
    torch.testing.assert_close(
        call.run_kernel(scaling=0.3)[0], by_hand(call, query, key, 0.3), rtol=0, atol=TOLERANCE[kernel]
    )


def test_eager_weights_are_of_the_scores(attention: LlamaAttention):
    """Also where values are wide: the weights of the first piece are those of all."""
    wide, narrow = call_of(attention, "eager", 3 * WIDTH), call_of(attention, "eager")
    assert torch.equal(wide.run_kernel()[1], narrow.run_kernel()[1])


@pytest.mark.parametrize(("given", "expected"), [({}, WIDTH**-0.5), ({"scaling": 0.5}, 0.5), ({"scaling": 0.0}, 0.0)])
def test_scaling(attention: LlamaAttention, given: dict, expected: float):
    """That of the model, whatever stages have made of its heads."""
    call = call_of(attention, kwargs=given)
    call.widened = tuple(torch.cat([t, t], -1) for t in (call.query, call.key))
    assert call.scaling == expected
    torch.testing.assert_close(call.run_kernel()[0], by_hand(call, *call.scored_by, expected), rtol=0, atol=1e-12)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What kernels named "spy" and "flash_spy" were called with. Their output is the sum of the values."""
    calls: list[dict[str, Any]] = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append(dict(kwargs, module=module, query=query, key=key, value=value, mask=attention_mask))
        total = value.repeat_interleave(query.shape[1] // value.shape[1], 1).sum(2, keepdim=True)
        return total.expand(-1, -1, query.shape[2], -1).transpose(1, 2), None

    for name in ("spy", "flash_spy"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, spy)
    return calls


@pytest.mark.parametrize(
    ("kernel", "widened_to", "value_dim", "widths"),
    [
        ("spy", None, WIDTH, [WIDTH]),
        ("spy", None, WIDTH + 1, [WIDTH + 8]),
        ("spy", None, 3 * WIDTH + 6, [4 * WIDTH]),
        ("spy", 16, WIDTH, [16]),
        ("spy", 16, 33, [40]),
        ("spy", None, 300, [256, 48]),
        ("spy", 256, 257, [264]),  # one more, and not a kernel for it
        ("flash_spy", 256, 257, [256, 256]),
    ],
)
def test_a_kernel_is_handed_values_as_wide_as_keys(
    attention: LlamaAttention, spied: list, kernel: str, widened_to: int | None, value_dim: int, widths: list[int]
):
    """Fused kernels take nothing else: what is narrower is filled up."""
    SteeringHandle(attention)
    call = call_of(attention, kernel, value_dim, kwargs={"dropout": 0.1, "mine": 1})
    if widened_to is not None:
        call.widened = tuple(torch.nn.functional.pad(t, (0, widened_to - WIDTH)) for t in (call.query, call.key))
    query, key = call.scored_by
    output, _ = call.run_kernel()
    assert [handed["value"].shape[-1] for handed in spied] == widths
    for handed in spied:
        assert handed["query"].shape[-1] == handed["key"].shape[-1] == handed["value"].shape[-1]
        torch.testing.assert_close(handed["query"] @ handed["key"][:, :1].mT, query @ key[:, :1].mT)
        assert (handed["dropout"], handed["mine"], handed["scaling"]) == (0.1, 1, WIDTH**-0.5)
        assert handed["mask"] is call.attention_mask
    torch.testing.assert_close(output[:, 0, ::2].transpose(0, 1), call.value.sum(2).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_scaled_before_they_are_rounded(dtype: torch.dtype):
    """Those of 64 channels are beyond what half precision holds, and an eighth of them is not."""
    query, key = (torch.full((1, 1, length, 64), 40.0, dtype=dtype) for length in (2, 3))
    found = scaled_products(query, key, 0.125)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.full((1, 1, 2, 3), 64 * 40.0**2 / 8, dtype=dtype))


def test_narrow_values_are_left_alone(attention: LlamaAttention, spied: list):
    call = call_of(attention, "spy", 3)
    call.run_kernel()
    assert spied[0]["value"] is call.value


@pytest.mark.parametrize(
    ("kernel", "head_dim", "width", "is_refused"),
    [
        ("flash_spy", WIDTH, WIDEST_FOR_FLASH, False),
        ("flash_spy", WIDTH, WIDEST_FOR_FLASH + 8, True),
        ("flash_spy", 300, 300, False),  # the model's own heads are its own affair
        ("flash_spy", 300, 308, True),
        ("spy", WIDTH, WIDEST_FOR_FLASH + 8, False),
    ],
)
def test_flash_attention_has_a_limit(
    attention: LlamaAttention, spied: list, kernel: str, head_dim: int, width: int, is_refused: bool
):
    SteeringHandle(attention)
    call = call_of(attention, kernel)
    call.query, call.key = (torch.zeros(*t.shape[:3], head_dim) for t in (call.query, call.key))
    if width != head_dim:
        call.widened = tuple(torch.zeros(*t.shape[:3], width) for t in (call.query, call.key))
    if not is_refused:
        call.run_kernel()
        assert spied[0]["key"].shape[-1] == width
        return
    with pytest.raises(NotImplementedError, match=rf"widen heads to {width} channels.*at most 256.*'sdpa'"):
        call.run_kernel()
    assert spied == []


def test_flash_attention_reads_the_config_as_it_is(attention: LlamaAttention, spied: list):
    config = attention.config
    SteeringHandle(attention)
    call_of(attention, "flash_spy").run_kernel()
    call_of(attention, "spy").run_kernel()
    assert spied[0]["module"].config is config
    assert spied[0]["module"].layer_idx == 0
    assert spied[1]["module"] is attention


def test_eager_is_the_models_own(attention: LlamaAttention, monkeypatch: pytest.MonkeyPatch):
    """Each modeling file has its own, which a subclass elsewhere inherits."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", lambda module, *args: (module, args))

    class Mine(LlamaAttention):
        pass

    for module in (attention, Mine(attention.config, 0)):
        assert base_kernel("eager", module)(1, 2) == (module, (1, 2))


# ---- with stages


def add_stages(call: AttentionCall, *stages: Stage) -> LayerStages:
    layer = LayerStages()
    for stage in stages:
        layer.add(stage, "mine", 0)
    call.context.stages[0] = layer
    return layer


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attend_to_other_values_has_the_same_weights(attention: LlamaAttention, kernel: str):
    """Those that stages make as well."""
    call = call_of(attention, kernel)
    add_stages(call, KeyScale(lambda call: torch.arange(1.0, KEYS + 1)[None]))
    changed = call.key * torch.arange(1.0, KEYS + 1)[None, None, :, None]
    expected = by_hand(call, call.query, changed, WIDTH**-0.5)
    torch.testing.assert_close(call.attend()[0], expected, rtol=0, atol=TOLERANCE[kernel])
    value = call.value
    for other in (value * 3, value.flip(2), value[..., :3], torch.cat([value, value + 1], -1)):
        found = call.attend_to(other)
        call.value = other
        expected = by_hand(call, call.query, changed, WIDTH**-0.5)
        call.value = value
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[kernel])
    torch.testing.assert_close(
        call.attend_to(torch.ones_like(value)), torch.ones(BATCH, QUERIES, HEADS, WIDTH).double()
    )


def test_attention_sinks_are_refused_where_stages_act(attention: LlamaAttention, spied: list):
    call = call_of(attention, "spy", kwargs={"s_aux": torch.ones(1), "mine": 2})
    call.attend()
    assert spied[0]["s_aux"] is call.kwargs["s_aux"], "without stages it is the kernel's affair"
    add_stages(call, KeyScale(lambda call: torch.ones(1, KEYS)))
    with pytest.raises(NotImplementedError, match=r"LlamaAttention has attention sinks \(s_aux\)"):
        call.attend()
    call.kwargs["s_aux"] = None
    call.attend()
    assert len(spied) == 2


class Moved(Positions):
    def widen(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return call.query, call.key


NUMBERS = torch.linspace(0.5, 2, KEYS)[None]
STAGES = {
    "keys": KeyScale(lambda call: NUMBERS),
    "values": Values(lambda call: NUMBERS),
    "bias": Bias(lambda call: NUMBERS),
    "weights": TDRSConfig(kernel="blockwise").stages(SteeredLayer(0, None, None)),
}


@pytest.mark.parametrize("num_queries", [QUERIES, 1])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_bias_by_position_is_a_part_of_the_scores(attention: LlamaAttention, stage: Stage, num_queries: int):
    """As if the mask held it."""
    bias = torch.randn(BATCH, HEADS, num_queries, KEYS, generator=torch.Generator().manual_seed(0)).double()
    call = call_of(attention, "sdpa")
    call.query, call.attention_mask = call.query[:, :, -num_queries:], call.attention_mask[:, :, -num_queries:]
    layer = add_stages(call, stage)
    reference = ReferenceStages(layer.stages, layer.adapters)
    expected = reference.attend(replace(call, attention_mask=call.attention_mask + bias))[0]
    assert (call.attend()[0] - expected).abs().max() > 0.1
    call.kwargs = {"position_bias": bias}
    for found in (call.attend()[0], reference.attend(call)[0]):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_other_positions_do_not_go_with_a_bias_by_position(attention: LlamaAttention):
    call = call_of(attention, kwargs={"position_bias": torch.zeros(BATCH, HEADS, QUERIES, KEYS)})
    add_stages(call, Moved())
    with pytest.raises(NotImplementedError, match=r"LlamaAttention adds a bias to scores that depends on positions"):
        call.attend()


def test_stages_of_other_layers_do_not_act(attention: LlamaAttention):
    call = call_of(attention)
    plain = call.attend()[0]
    add_stages(call, KeyScale(lambda call: torch.full((1, KEYS), 5.0)))
    assert not torch.equal(call.attend()[0], plain)
    call.context.stages[1] = call.context.stages.pop(0)
    assert torch.equal(call.attend()[0], plain)


# ---- what it says of its tokens


def test_which_tokens_are_visual(attention: LlamaAttention):
    call = call_of(attention)
    assert call.visual_keys.tolist() == VISUAL.tolist()
    assert call.visual_queries.tolist() == VISUAL[:, -QUERIES:].tolist()
    assert call.keys.text_before_images.tolist() == [[True, *[False] * 4], [False] * 5]
    call.query, call.key = call.query[:, :, -1:], call.key[:, :, -2:]  # the last token, in a sliding window
    assert call.visual_queries.tolist() == VISUAL[:, -1:].tolist()
    assert call.visual_keys.tolist() == VISUAL[:, -2:].tolist()


def test_without_images_nothing_is_visual(attention: LlamaAttention):
    call = call_of(attention, context=context_of(torch.zeros_like(VISUAL)))
    for found, width in (
        (call.visual_queries, QUERIES),
        (call.visual_keys, KEYS),
        (call.keys.text_before_images, KEYS),
    ):
        assert found.tolist() == [[False] * width] * BATCH


def test_visibility_is_shared_by_layers_with_the_same_mask(attention: LlamaAttention):
    call = call_of(attention)
    assert call_of(attention, context=call.context, attention_mask=call.attention_mask).visibility is call.visibility
    others = [
        dict(attention_mask=call.attention_mask.clone()),
        dict(attention_mask=call.attention_mask, kwargs={"sliding_window": 2}),
        dict(attention_mask=call.attention_mask, kwargs={"is_causal": False}),
        dict(attention_mask=call.attention_mask, key=call.key[:, :, 1:]),
    ]
    found = [call_of(attention, context=call.context, **fields).visibility for fields in others]
    assert len({id(visibility) for visibility in (call.visibility, *found)}) == 5


@pytest.mark.parametrize("num_keys", [KEYS, KEYS - 1, KEYS + 3])
@pytest.mark.parametrize("num_queries", [QUERIES, 1])
def test_visibility_is_that_of_the_last_tokens(attention: LlamaAttention, num_keys: int, num_queries: int):
    """Of a sliding window, of a static cache that is not full, and of layers that compute the last token alone."""
    key = torch.zeros(BATCH, KV_HEADS, num_keys, WIDTH)
    query = torch.zeros(BATCH, HEADS, num_queries, WIDTH)
    visibility = call_of(attention, query=query, key=key, attention_mask=None).visibility
    first_key = max(KEYS - num_keys, 0)
    own = [slot - first_key for slot in range(KEYS - num_queries, KEYS)]
    assert visibility.columns.tolist() == own
    mask = visibility.mask()
    mask = torch.ones(1, 1, num_queries, num_keys).bool() if mask is None else mask
    if num_queries > 1 or num_keys <= KEYS:
        assert mask[0, 0].tolist() == [[key <= last for key in range(num_keys)] for last in own]


def test_wants_weights(attention: LlamaAttention):
    assert not call_of(attention).wants_weights
    assert call_of(attention, kwargs={"output_attentions": True}).wants_weights
    attention.config.output_attentions = True
    assert call_of(attention).wants_weights


def test_records_gradients():
    leaf = torch.ones(1, requires_grad=True)
    assert records_gradients(torch.ones(1), None, leaf)
    assert not records_gradients(torch.ones(1), None, "text")
    with torch.no_grad():
        assert not records_gradients(leaf)
