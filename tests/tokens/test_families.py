"""Models are found by their shape, or refused by name with what was looked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_vlms
import torch
import transformers as T
from architectures import ARCHITECTURES
from oracle import agrees_with_the_oracle
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny_vlms import TinyVLM

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig
from peft_pvm.attention import rotation
from peft_pvm.tokens.blocks import BLOCKS
from peft_pvm.tokens.families import ATTENTION_NAMES, FAMILIES, ROTARY_NAMES, ROTATES, find_vlm


pytestmark = pytest.mark.every_family


def test_every_row_of_the_tables_is_tested():
    if not all(row.tiny.is_there for row in ARCHITECTURES.values()):
        pytest.skip("an older transformers has not all of them")
    configs = [row.tiny.config() for row in ARCHITECTURES.values()]
    assert set(FAMILIES) <= {config.model_type for config in configs}
    text_types = {config.get_text_config().model_type for config in configs}
    assert {*BLOCKS, *ROTATES, *ROTARY_NAMES, *ATTENTION_NAMES} <= text_types


def test_every_family_with_videos_is_tested_with_videos(family: TinyVLM):
    multimodal = find_vlm(family.build()).multimodal
    assert hasattr(multimodal, "get_video_features") == (family.video is not None)


def test_finds_the_parts(family: TinyVLM):
    model = family.build()
    vlm = find_vlm(model)
    assert len(vlm.layers) == model.config.get_text_config().num_hidden_layers
    assert vlm.text_config.hidden_size == tiny_vlms.HIDDEN
    assert model.get_submodule(vlm.layer_name(1)) is vlm.layers[1]
    assert vlm.placeholder_ids["image"] == (tiny_vlms.IMAGE,)
    seen = []
    vlm.multimodal.register_forward_pre_hook(lambda *_: seen.append("multimodal"))
    vlm.text_model.register_forward_pre_hook(lambda *_: seen.append("text"))
    with torch.no_grad():
        model(**family.inputs(model, "t4 i t3"))
    assert seen == ["multimodal", "text"]


def test_the_residual_is_what_the_ffn_is_added_to(family: TinyVLM):
    """Independent of how a block is built: its output is the residual stream after attention + what the FFN adds."""
    model = family.build()
    vlm = find_vlm(model)
    attached = get_peft_model(model, PVMConfig(r=32, layers_to_transform=[1]))
    layer = vlm.layers[1]
    seen = {}
    layer.pvm.register_forward_pre_hook(lambda module, args: seen.update(residual=args[0]))
    # Registered after the adapter's own hook, so it sees the sum; the gate is 0.
    getattr(layer, vlm.block.ffn_end).register_forward_hook(lambda module, args, output: seen.update(ffn=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(layer=output))
    with torch.no_grad():
        attached(**family.inputs(model, "t4 i t3"))
    ffn = seen["ffn"][0] if isinstance(seen["ffn"], tuple) else seen["ffn"]
    scale = getattr(layer, "layer_scalar", 1.0)
    assert torch.allclose(seen["layer"], (seen["residual"] + ffn.view_as(seen["residual"])) * scale, atol=1e-5)


def test_works_below_and_beside_lora():
    model = tiny_vlms.FAMILIES["llava"].build()
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert len(find_vlm(model).layers) == tiny_vlms.LAYERS


def _text_only():
    return T.LlamaForCausalLM(T.LlamaConfig(**tiny_vlms.TEXT))


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (_text_only, r"LlamaForCausalLM \(model_type 'llama'\) reads no images: the forward of none"),
        (
            ARCHITECTURES["mllama"].tiny.build,
            r"looks at images by cross-attention \(model.language_model.layers.1.cross_attn\), so that no",
        ),
        (ARCHITECTURES["git"].tiny.build, r"no image placeholder token .*Looked for config.image_token_id;"),
        (lambda: torch.nn.Linear(2, 2), r"Linear \(model_type ''\) reads no images"),
    ],
    ids=["text only", "cross-attention", "no placeholder", "no transformers model"],
)
@pytest.mark.parametrize(
    "config", [PVMConfig(r=32), DIPEConfig(max_distance=0), TDRSConfig()], ids=["pvm", "dipe", "tdrs"]
)
def test_refuses_others_by_name(build, complaint: str, config: PeftConfig):
    model = build()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=complaint):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


# Text models whose FFN is not known.
UNKNOWN_FFNS = {
    "unknown block": (
        lambda: T.Olmo2Config(**tiny_vlms.TEXT),
        r"\(text model type 'olmo2'\): decoder layer 0 \(Olmo2DecoderLayer\) holds .*post_feedforward_layernorm.*"
        "no other norm. Adapters that change only attention do not need",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN_FFNS)
def test_pvm_refuses_an_unknown_ffn(name: str):
    text_config, complaint = UNKNOWN_FFNS[name]
    model = _llava_over(text_config()).build()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=complaint):
        get_peft_model(model, PVMConfig(r=32))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(("keyword", "config"), {"dipe": DIPEConfig(max_distance=0), "tdrs": TDRSConfig()}.items())
@pytest.mark.parametrize("name", UNKNOWN_FFNS)
def test_what_changes_attention_alone_needs_no_known_ffn(name: str, keyword: str, config: PeftConfig):
    family = _llava_over(UNKNOWN_FFNS[name][0]())
    agrees_with_the_oracle(family, **{keyword: config})


def test_unlisted_model_of_the_common_shape_works():
    """VipLlava is in no table."""
    config = T.VipLlavaConfig(
        vision_config=T.CLIPVisionConfig(**tiny_vlms.SIGLIP),
        text_config=T.LlamaConfig(**tiny_vlms.TEXT),
        image_token_index=tiny_vlms.IMAGE,
        vision_feature_layers=[-1],
    )
    model = T.VipLlavaForConditionalGeneration(config).eval()
    assert model.config.model_type not in FAMILIES
    vlm = find_vlm(get_peft_model(model, PVMConfig(r=32)).get_base_model())
    assert all(hasattr(vlm.layers[layer], "pvm") for layer in (1, 2))


CONFIGS = {"pvm": PVMConfig(r=32, init_weights=False), "dipe": DIPEConfig(max_distance=0), "tdrs": TDRSConfig()}


def _llava_over(text_config: T.PreTrainedConfig) -> TinyVLM:
    config = tiny_vlms.FAMILIES["llava"].config()
    config.text_config = text_config
    return replace(tiny_vlms.FAMILIES["llava"], config=lambda: config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_that_drop_keyword_arguments_are_found_out(config: PeftConfig):
    """Nemotron's do: the adapter would attach and do nothing."""
    model = get_peft_model(_llava_over(T.NemotronConfig(**tiny_vlms.TEXT, head_dim=16)).build(), config)
    inputs = tiny_vlms.FAMILIES["llava"].inputs(model.get_base_model(), "t4 i t6")
    with pytest.raises(NotImplementedError, match="do not pass keyword arguments on to their attention"):
        model(**inputs)
    with model.disable_adapter():
        assert model(**inputs).logits.isfinite().all()


def test_layers_without_rotation_of_an_unlisted_model():
    """SmolLM3 says by `use_rope` which layers rotate."""
    text = T.SmolLM3Config(**tiny_vlms.TEXT, no_rope_layers=[1, 0, 1], layer_types=["full_attention"] * 3)
    model = _llava_over(text).build()
    assert DIPEConfig.layers_on(get_peft_model(model, DIPEConfig(max_distance=0)).base_model.vlm) == [0, 2]


@pytest.mark.parametrize("config", [DIPEConfig(max_distance=0), TDRSConfig()], ids=["dipe", "tdrs"])
def test_unknown_ways_to_rotate_are_refused(config: PeftConfig, monkeypatch):
    monkeypatch.setattr(rotation, "ROTARY_FUNCTIONS", ("rotate_somehow",))
    rotation._rotary_function.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"LlamaAttention \(decoder layer 0 .*\) rotates by none of"):
            get_peft_model(tiny_vlms.FAMILIES["llava"].build(), config)
    finally:
        rotation._rotary_function.cache_clear()


@pytest.mark.parametrize("config", [DIPEConfig(max_distance=0), TDRSConfig()], ids=["dipe", "tdrs"])
def test_positions_that_nobody_asked_for_are_missed(config: PeftConfig):
    """A text model that does not call its rotary embedding would leave the adapter without positions."""
    family = tiny_vlms.FAMILIES["llava"]
    model = get_peft_model(family.build(), config)
    text_model = model.get_base_model().model.language_model
    rotary = text_model.rotary_emb
    del text_model.rotary_emb
    text_model.__dict__["rotary_emb"] = rotary.forward  # past the hooks
    with pytest.raises(NotImplementedError, match="did not call its rotary_emb"):
        model(**family.inputs(model.get_base_model(), "t4 i t6"))
