"""Published checkpoints: adapters attach to their real sizes, and come to what docs/checkpoints.md says."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch
from pages import REPOSITORY
from peft import get_peft_model
from published_configs import CHECKPOINTS, figures_of, row_of, source_of
from tiny_vlms import FAMILIES
from torch import nn

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig
from peft_pvm.methods.pvm.config import BranchShape, ffn_width
from peft_pvm.tokens.families import find_vlm
from peft_pvm.utils.packages import CACHE


PAGE = (REPOSITORY / "docs" / "checkpoints.md").read_text()
CONFIGS = {"pvm": PVMConfig, "dipe": DIPEConfig, "tdrs": TDRSConfig}
# The FFN that a token passes in the layers with a branch, over what the config calls `intermediate_size`.
OTHER_WIDTHS = {
    "DeepSeek-OCR-2": 7168 / 6848,  # that of the dense layers
    "GLM-4.5V": 12672 / 10944,  # that of the dense layers
    "Gemma 4 E2B": 2,  # layers that share keys and values have an FFN of twice the width
    "Llama 4 Scout": 2,  # that of an expert, beside which there is a shared one
}
FFN = re.compile("mlp|feed_forward|experts")  # parameters of a decoder layer, by their names
ROUTING = re.compile("router|gate.weight$")
IN_WHOLE = re.compile(r"(\d+(?:\.\d+)?)B\b")  # parameters, as a checkpoint's name gives them


def test_the_page_lists_them():
    table, _, sources = PAGE.partition("<summary>")
    assert re.findall(r"^\| (.+?) \| [\d.,]+ B \|", table, re.MULTILINE) == list(CHECKPOINTS)
    assert re.findall(r"^- (.+?): ", sources.partition("</details>")[0], re.MULTILINE) == list(CHECKPOINTS)
    text = CHECKPOINTS["Qwen3-VL-8B"].text
    cache = 2 * 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"]
    assert f"holds {cache:,} bytes for each token" in " ".join(table.split())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name: str):
    checkpoint = CHECKPOINTS[name]
    if not checkpoint.is_there:
        pytest.skip(f"this version of transformers has no {checkpoint.model}")
    model = checkpoint.build()
    figures = figures_of(model)
    assert row_of(name, figures) in PAGE, "run `make generate`"
    assert source_of(name, checkpoint) in PAGE, "run `make generate`"
    if (named := IN_WHOLE.search(name)) and not name.startswith(("Gemma 3n", "Gemma 4 E")):  # effective parameters
        assert 0.7 < figures.base / 1e9 / float(named[1]) < 1.1, "not the sizes of this checkpoint"
    vlm = find_vlm(model)
    width = ffn_width(vlm.text_config)
    ffn = ffn_of_a_token(vlm.layers[figures.layers[-1]], vlm.text_config)
    assert ffn == pytest.approx(width * OTHER_WIDTHS.get(name, 1), rel=1e-3)
    if (shape := figures.shape) is not None:
        heads = {attention.head_dim for attention in vlm.self_attentions.values() if hasattr(attention, "head_dim")}
        assert shape.head_dim == min(heads, default=shape.head_dim)
        assert shape.num_heads * shape.head_dim == shape.r == 512
        assert shape.intermediate_size == int(512 * (width / vlm.text_config.hidden_size))

    names, refused = set(model.state_dict()), set()
    for method, config in CONFIGS.items():
        try:
            with torch.device("meta"):
                attached = get_peft_model(model, config())
        except ValueError:
            refused.add(method)
            continue
        assert all(tensor.is_meta for tensor in (*attached.parameters(), *attached.buffers()))
        if method == "pvm":
            assert attached.peft_config["default"].layers_to_transform == figures.layers
            assert attached.get_nb_trainable_parameters()[0] == figures.parameters
        attached.unload()
    assert refused == set()
    assert set(model.state_dict()) == names


def ffn_of_a_token(layer: nn.Module, text_config: Any) -> float:
    """How wide the FFN of a layer is for one token, from its weights."""
    per_token = getattr(text_config, "num_experts_per_tok", None) or getattr(text_config, "top_k_experts", None)
    matrices = (
        len(weight[0]) * weight.shape[-1] * per_token if weight.dim() == 3 else weight.numel()  # experts, or a matrix
        for name, weight in layer.named_parameters()
        if FFN.search(name) and not ROUTING.search(name) and weight.dim() > 1
    )
    return sum(matrices) / (3 * text_config.hidden_size)


def test_what_is_kept_of_a_visual_token():
    """As docs/checkpoints.md counts it, on a model that runs."""
    tiny = FAMILIES["qwen3_vl"]
    model = get_peft_model(tiny.build().to(torch.bfloat16), PVMConfig(r=32)).eval()
    inputs = tiny.inputs(model.get_base_model(), "t4 i t3")
    inputs = {name: each.bfloat16() if each.is_floating_point() else each for name, each in inputs.items()}
    with torch.no_grad():
        memory = model(**inputs, use_cache=True)[CACHE].visual_memory
    kept = [memory.embeddings, memory.slots, *itertools.chain(*memory.projections.values())]
    figures = dataclasses.replace(
        figures_of(model.unload()), shape=BranchShape.of(PVMConfig(r=32), tiny.config().text_config)
    )
    assert len(memory.projections) == len(figures.layers) > 1
    assert sum(each.numel() * each.element_size() for each in kept) == 4 * figures.bytes_per_token  # tokens
