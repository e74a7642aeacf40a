"""How adapters reach attention: a view of its config, counted, and given back as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny_vlms import FAMILIES
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_pvm import DIPEConfig
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.dispatch import (
    PREFIX,
    ConfigView,
    SteeringHandle,
    is_steerable,
    steerable_attentions,
    steered_attention,
    steered_name,
)
from peft_pvm.tokens.context import VisualContext, dropped_keywords
from peft_pvm.tokens.memory import Coverage, VisualMemory


def new_config() -> LlamaConfig:
    sizes = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    return LlamaConfig(**sizes, attn_implementation="sdpa")


@pytest.fixture
def attention() -> LlamaAttention:
    return LlamaAttention(new_config(), layer_idx=0).eval()


def states(attention: LlamaAttention) -> dict:
    return dict(query=torch.randn(1, 2, 4, 8), key=torch.randn(1, 1, 4, 8), value=torch.randn(1, 1, 4, 8))


# ---- the view


def test_a_view_differs_in_the_kernels_name_alone():
    config = new_config()
    view = ConfigView(config)
    assert view._attn_implementation == "visual|sdpa"
    assert view.hidden_size == 16
    assert view.to_dict() == config.to_dict()
    assert config._attn_implementation == "sdpa"
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = view.no_such_field


def test_what_is_written_to_a_view_is_written_to_the_config():
    config = new_config()
    view = ConfigView(config)
    view.hidden_size = 32
    view.mine = "yes"
    view._attn_implementation = "eager"
    assert (config.hidden_size, config.mine, config._attn_implementation) == (32, "yes", "eager")
    assert view._attn_implementation == "visual|eager", "a kernel that is changed later is followed"
    assert set(vars(view)) == {"config", "users"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copied_view_has_a_config_of_its_own(duplicate):
    view = ConfigView(new_config())
    twin = duplicate(view)
    twin.hidden_size = 32
    assert (view.hidden_size, twin.hidden_size) == (16, 32)
    assert isinstance(twin, ConfigView)


# ---- counted


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_last_handle_gives_the_config_back(attention: LlamaAttention, order: tuple[int, ...]):
    config = attention.config
    handles = [SteeringHandle(attention) for _ in range(3)]
    view = attention.config
    assert isinstance(view, ConfigView)
    assert view.config is config, "never a view of a view"
    for index in order[:-1]:
        handles[index].remove()
        assert attention.config is view
    handles[order[-1]].remove()
    assert attention.config is config
    SteeringHandle(attention).remove()
    assert attention.config is config


def test_somebody_elses_config_stays(attention: LlamaAttention):
    handles = [SteeringHandle(attention) for _ in range(2)]
    attention.config = mine = new_config()
    for handle in handles:
        handle.remove()
        assert attention.config is mine


def test_a_config_set_while_steered_is_kept():
    model = FAMILIES["llava"].build()
    attached = get_peft_model(model, DIPEConfig(max_distance=0))
    attention = model.model.language_model.layers[1].self_attn
    attention.config = mine = copy.deepcopy(attention.config.config)
    attached.unload()
    assert attention.config is mine


# ---- the steered function


def test_a_steered_name_is_registered_once():
    name = steered_name("sdpa")
    assert name == PREFIX + "sdpa"
    function = ALL_ATTENTION_FUNCTIONS[name]
    assert steered_name("sdpa") == name
    assert ALL_ATTENTION_FUNCTIONS[name] is function
    assert steered_name("eager") != name


def test_of_an_unknown_kernel_the_base_says_so(attention: LlamaAttention):
    function = ALL_ATTENTION_FUNCTIONS[steered_name("no_such_kernel")]
    with pytest.raises(KeyError, match="no_such_kernel"):
        function(attention, **states(attention), attention_mask=None)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_where_no_adapter_acts_it_is_the_kernel(attention: LlamaAttention, kernel: str):
    """To the bit, whether or not there is a context."""
    given = dict(states(attention), attention_mask=None)
    scaling = dict(scaling=0.3, dropout=0.0)
    if kernel == "eager":
        from transformers.models.llama.modeling_llama import eager_attention_forward

        expected = eager_attention_forward(attention, **given, **scaling)[0]
    else:
        expected = ALL_ATTENTION_FUNCTIONS["sdpa"](attention, **given, **scaling)[0]
    steered = ALL_ATTENTION_FUNCTIONS[steered_name(kernel)]
    assert torch.equal(steered(attention, **given, **scaling)[0], expected)
    for context in (VisualContext(None), None):
        assert torch.equal(steered(attention, **given, **scaling, visual_context=context)[0], expected)


def test_it_tells_the_context_and_its_observers(attention: LlamaAttention):
    """Which see what the attention was called with, in their order, and whose answers are nobody's."""
    context = VisualContext(None)
    context.read(torch.zeros(1, 4, 2), VisualMemory(), Coverage())
    context.await_layer(0, dropped_keywords)
    seen: list[tuple[str, AttentionCall]] = []
    context.observers += [lambda call: seen.append(("first", call)) or 7, lambda call: seen.append(("second", call))]
    given = states(attention)
    plain, _ = steered_attention(attention, **given, attention_mask=None, kernel="sdpa")
    found, _ = steered_attention(attention, **given, attention_mask=None, kernel="sdpa", visual_context=context)
    assert torch.equal(found, plain)
    assert context.missed("Model") is None
    assert [name for name, _ in seen] == ["first", "second"]
    (_, call), (_, other) = seen
    assert call is other
    assert (call.module, call.kernel, call.context) == (attention, "sdpa", context)
    assert all(getattr(call, name) is tensor for name, tensor in given.items())


def test_observers_come_after_the_output(attention: LlamaAttention):
    context = VisualContext(None)
    given = states(attention)
    expected, _ = steered_attention(attention, **given, attention_mask=None, kernel="sdpa")
    context.observers.append(lambda call: call.value.zero_())
    found, _ = steered_attention(attention, **given, attention_mask=None, kernel="sdpa", visual_context=context)
    assert torch.equal(found, expected)
    assert not given["value"].any()


# ---- which modules


def as_vlm(*attentions: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(model=nn.Linear(1, 1), self_attentions=dict(enumerate(attentions)))


def test_modules_that_look_up_their_kernel_are_steerable(attention: LlamaAttention):
    assert is_steerable(attention)
    assert not is_steerable(nn.MultiheadAttention(4, 1))
    del attention.layer_idx
    assert not is_steerable(attention)


def test_steerable_attentions(attention: LlamaAttention):
    vlm = as_vlm(attention)
    assert steerable_attentions(vlm, "Mine") is vlm.self_attentions
    with pytest.raises(ValueError, match="Linear has no layer with self-attention, which Mine works on"):
        steerable_attentions(as_vlm(), "Mine")
    with pytest.raises(ValueError, match=r"MultiheadAttention \(decoder layer 1 of Linear\).*through which Mine"):
        steerable_attentions(as_vlm(attention, nn.MultiheadAttention(4, 1)), "Mine")
    other = copy.deepcopy(attention)
    other.sinks = 4
    with pytest.raises(ValueError, match=r"decoder layer 1 .* has attention sinks, which Mine does not know"):
        steerable_attentions(as_vlm(attention, other), "Mine")
