"""The sizes of published checkpoints, and what PVM comes to on each: for a test, and for docs/checkpoints.md.

A checkpoint is given by what its config says of the text model. The vision tower is cut to a block or two, because
no adapter stands there. Models are built on the meta device, so that no weight is downloaded or allocated.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from torch import nn

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig
from peft_pvm.methods.pvm.config import BranchShape
from peft_pvm.methods.pvm.model import strided_layers
from peft_pvm.tokens.families import VisionLanguageModel, find_vlm
from peft_pvm.tuners.attention_method import AttentionMethod


Sizes = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        model: The first part of the names of its classes, `...Config` and `...ForConditionalGeneration`.
        text: What its config says of the text model, where it differs from the defaults of transformers.
        source: Where these sizes were read.
        rest: Other fields of the config.
        tower: The vision tower's config, where the model's own tower needs a package of its own.
    """

    model: str
    text: Sizes
    source: str
    rest: Sizes
    tower: Any = None

    @property
    def is_there(self) -> bool:
        """Whether the installed transformers has its type."""
        return hasattr(T, f"{self.model}Config")

    def build(self) -> T.PreTrainedModel:
        """The model, on the meta device, in bfloat16."""
        config = getattr(T, f"{self.model}Config")(text_config=dict(self.text), **self.rest)
        if self.tower is not None:
            config.__dict__["vision_config"] = self.tower  # past the check of its class
        with torch.device("meta"):
            return getattr(T, f"{self.model}ForConditionalGeneration")._from_config(config, dtype=torch.bfloat16)


def _sizes(hidden: int, ffn: int | None, depth: int, heads: int, kv_heads: int, vocab: int, **others: Any) -> Sizes:
    sizes = dict(hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=kv_heads)
    sizes["vocab_size"] = vocab
    return {**sizes, **({} if ffn is None else dict(intermediate_size=ffn)), **others}


def _experts(num: int, per_token: int, width: int, **others: Any) -> Sizes:
    return dict(num_experts=num, num_experts_per_tok=per_token, moe_intermediate_size=width, **others)


# ---- text models of which several checkpoints are made

QWEN2_5_3B = _sizes(2048, 11008, 36, 16, 2, 151936)
QWEN2_5_7B = _sizes(3584, 18944, 28, 28, 4, 152064)
QWEN2_5_72B = _sizes(8192, 29568, 80, 64, 8, 152064)
QWEN3_1_7B = _sizes(2048, 6144, 28, 16, 8, 151936, head_dim=128)
QWEN3_4B = _sizes(2560, 9728, 36, 32, 8, 151936, head_dim=128)
QWEN3_8B = _sizes(4096, 12288, 36, 32, 8, 151936, head_dim=128)
QWEN3_32B = _sizes(5120, 25600, 64, 64, 8, 151936, head_dim=128)
QWEN3_30B_A3B = _sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128, **_experts(128, 8, 768))
QWEN3_235B_A22B = _sizes(4096, 12288, 94, 64, 4, 151936, head_dim=128, **_experts(128, 8, 1536))

# ---- where the sizes of the text model were read: in public code, by repository and file

TRANSFORMERS = "transformers, defaults of the config"
MAXTEXT = "AI-Hypercomputer/maxtext, hf_model_configs.py"
XTUNER = "InternLM/xtuner, v1/model"
COPY = "a copy of its config.json"

# ---- towers of vision, cut

QWEN_VISION = dict(depth=1, hidden_size=32, num_heads=2)
SIGLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def _qwen(model: str, text: Sizes, source: str, **vision: Any) -> Checkpoint:
    vision = dict(QWEN_VISION, out_hidden_size=text["hidden_size"], **vision)
    return Checkpoint(model, text, source, dict(vision_config=vision))


def _qwen3(model: str, text: Sizes, source: str) -> Checkpoint:
    return _qwen(model, text, source, deepstack_visual_indexes=[0])


def _qwen3_5(text: Sizes, source: str, linear_heads: int) -> Checkpoint:
    model = "Qwen3_5Moe" if "num_experts" in text else "Qwen3_5"
    return _qwen(model, dict(text, head_dim=256, linear_num_value_heads=linear_heads), source)


def _wrapper(model: str, text_type: str, text: Sizes, source: str, **rest: Any) -> Checkpoint:
    """For a model that takes text models of several types."""
    return Checkpoint(model, dict(text, model_type=text_type), source, dict(vision_config=SIGLIP, **rest))


def _internvl(text_type: str, text: Sizes, source: str) -> Checkpoint:
    vision = dict(SIGLIP, image_size=[28, 28], patch_size=[7, 7])
    return Checkpoint("InternVL", dict(text, model_type=text_type), source, dict(vision_config=vision))


def _gemma3(text: Sizes, head_dim: int) -> Checkpoint:
    return Checkpoint("Gemma3", dict(text, head_dim=head_dim), MAXTEXT, dict(vision_config=SIGLIP))


def _gemma3n(source: str, **text: Any) -> Checkpoint:
    tower = T.SiglipVisionConfig(**SIGLIP, vocab_size=128, vocab_offset=262144, rms_norm_eps=1e-6)
    rest = dict(audio_config=dict(hidden_size=64, conf_num_hidden_layers=1))
    return Checkpoint("Gemma3n", text, source, rest, tower)


def _gemma4(text: Sizes, sliding: int, **others: Any) -> Checkpoint:
    pattern = ["sliding_attention"] * sliding + ["full_attention"]
    layer_types = pattern * (text["num_hidden_layers"] // len(pattern))
    text = dict(text, head_dim=256, global_head_dim=512, layer_types=layer_types, **others)
    vision = dict(SIGLIP, num_key_value_heads=2, head_dim=16)
    return Checkpoint("Gemma4", text, MAXTEXT, dict(vision_config=vision, audio_config=None))


def _gemma4_small(text: Sizes, sliding: int, num_shared: int, **others: Any) -> Checkpoint:
    return _gemma4(text, sliding, num_kv_shared_layers=num_shared, hidden_size_per_layer_input=256, **others)


def _gemma4_large(text: Sizes, global_kv_heads: int, **others: Any) -> Checkpoint:
    none = dict(num_kv_shared_layers=0, hidden_size_per_layer_input=0)
    return _gemma4(text, 5, attention_k_eq_v=True, num_global_key_value_heads=global_kv_heads, **none, **others)


def _lfm2_vl(text: Sizes) -> Checkpoint:
    attention = dict(full_attn_idxs=[2, 5, 8, 10, 12, 14])
    return _wrapper("Lfm2Vl", "lfm2", {**text, **attention}, f"{COPY}, checked against its weights there")


CHECKPOINTS = {
    "Qwen3-VL-2B": _qwen3("Qwen3VL", QWEN3_1_7B, "jax-ml/bonsai, models/qwen3vl/modeling.py"),
    "Qwen3-VL-4B": _qwen3("Qwen3VL", QWEN3_4B, "kohya-ss/musubi-tuner, krea2/krea2_encoder.py"),
    "Qwen3-VL-8B": _qwen3("Qwen3VL", QWEN3_8B, f"{XTUNER}/dense/qwen3vl_text.py"),
    "Qwen3-VL-32B": _qwen3("Qwen3VL", QWEN3_32B, COPY),
    "Qwen3-VL-30B-A3B": _qwen3("Qwen3VLMoe", QWEN3_30B_A3B, f"{XTUNER}/moe/qwen3vl_text.py"),
    "Qwen3-VL-235B-A22B": _qwen3("Qwen3VLMoe", QWEN3_235B_A22B, f"{XTUNER}/moe/qwen3vl_text.py"),
    "Qwen3-Omni-30B-A3B (thinker)": _qwen3("Qwen3OmniMoeThinker", dict(QWEN3_30B_A3B, intermediate_size=768), COPY),
    "Qwen2.5-VL-3B": _qwen("Qwen2_5_VL", QWEN2_5_3B, COPY),
    "Qwen2.5-VL-7B": _qwen("Qwen2_5_VL", QWEN2_5_7B, "acproject/duorou, docs/qwen2.5vl_graph.md"),
    "Qwen2.5-VL-72B": _qwen("Qwen2_5_VL", QWEN2_5_72B, COPY),
    "Qwen3.5-4B": _qwen3_5(_sizes(2560, 9216, 32, 16, 4, 248320), f"{XTUNER}/dense/qwen3_5_text.py", 32),
    "Qwen3.5-27B": _qwen3_5(_sizes(5120, 17408, 64, 24, 4, 248320), "InternLM/xtuner, tests of the config", 48),
    "Qwen3.5-35B-A3B": _qwen3_5(
        _sizes(2048, None, 40, 16, 2, 248320, **_experts(256, 8, 512, shared_expert_intermediate_size=512)),
        MAXTEXT,
        32,
    ),
    "Qwen3.5-397B-A17B": _qwen3_5(
        _sizes(4096, None, 60, 32, 2, 248320, **_experts(512, 10, 1024, shared_expert_intermediate_size=1024)),
        MAXTEXT,
        64,
    ),
    "InternVL3-8B": _internvl("qwen2", QWEN2_5_7B, f"Qwen2.5-7B in {MAXTEXT}"),
    "InternVL3.5-8B": _internvl("qwen3", QWEN3_8B, f"{XTUNER}/compose/internvl"),
    "InternVL3.5-30B-A3B": _internvl("qwen3_moe", QWEN3_30B_A3B, f"{XTUNER}/compose/internvl"),
    "LLaVA-OneVision-7B": _wrapper("LlavaOnevision", "qwen2", QWEN2_5_7B, f"Qwen2.5-7B in {MAXTEXT}"),
    "Gemma 3 4B": _gemma3(_sizes(2560, 10240, 34, 8, 4, 262144), 256),
    "Gemma 3 12B": _gemma3(_sizes(3840, 15360, 48, 16, 8, 262144), 256),
    "Gemma 3 27B": _gemma3(_sizes(5376, 21504, 62, 32, 16, 262144), 128),
    "Gemma 3n E2B": _gemma3n(
        "transformers, convert_gemma3n_weights.py",
        intermediate_size=8192,
        num_hidden_layers=30,
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20,
        num_kv_shared_layers=10,
    ),
    "Gemma 3n E4B": _gemma3n(TRANSFORMERS),
    "Gemma 4 E2B": _gemma4_small(_sizes(1536, 6144, 35, 8, 1, 262144), 4, 20, use_double_wide_mlp=True),
    "Gemma 4 E4B": _gemma4_small(_sizes(2560, 10240, 42, 8, 2, 262144), 5, 18),
    "Gemma 4 26B-A4B": _gemma4_large(
        _sizes(2816, 2112, 30, 16, 8, 262144),
        2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "Gemma 4 31B": _gemma4_large(_sizes(5376, 21504, 60, 32, 16, 262144), 4),
    "GLM-4.1V-9B": _qwen("Glm4v", _sizes(4096, 13696, 40, 32, 2, 151552), TRANSFORMERS),
    "GLM-4.5V": _qwen(
        "Glm4vMoe",
        _sizes(4096, 10944, 46, 96, 8, 151552, head_dim=128, **_experts(128, 8, 1408)),
        f"{TRANSFORMERS}, and THUDM/slime, scripts/models/glm4.5-106B-A12B.sh",
    ),
    "MiniCPM-V 4.6": _wrapper(
        "MiniCPMV4_6",
        "qwen3_5_text",
        _sizes(1024, 3584, 24, 8, 2, 248320, head_dim=256, linear_num_value_heads=16),
        COPY,
        image_token_id=248056,
    ),
    "Kimi K2.5": Checkpoint(
        "Kimi_K25",
        _sizes(
            7168,
            18432,
            61,
            64,
            64,
            163840,
            n_routed_experts=384,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
        f"{COPY}, and AI-Hypercomputer/maxtext, kimi-k2-1t.yml",
        dict(vision_config=SIGLIP),
    ),
    "Llama 4 Scout": Checkpoint(
        "Llama4",
        _sizes(5120, 8192, 48, 40, 8, 202048, num_local_experts=16),
        "AI-Hypercomputer/maxtext, llama4-17b-16e.yml",
        dict(vision_config=dict(SIGLIP, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)),
    ),
    "Mistral Small 3.2 24B": _wrapper(
        "Mistral3",
        "mistral",
        _sizes(5120, 32768, 40, 32, 8, 131072, head_dim=128),
        "NVIDIA-NeMo/Megatron-Bridge, mistral_provider.py",
    ),
    "Molmo2-8B": Checkpoint(
        "Molmo2",
        _sizes(4096, 12288, 36, 32, 8, 151936),
        TRANSFORMERS,
        dict(
            vision_config=dict(SIGLIP, num_key_value_heads=2, head_dim=16),
            adapter_config=dict(vision_feature_layer=[0], text_hidden_size=4096),
        ),
    ),
    "Idefics3-8B": _wrapper("Idefics3", "llama", _sizes(4096, 14336, 32, 32, 8, 128256), f"Llama 3.1 8B in {MAXTEXT}"),
    "SmolVLM2-500M": _wrapper("SmolVLM", "llama", _sizes(960, 2560, 32, 15, 5, 49280), COPY),
    "SmolVLM2-2.2B": _wrapper(
        "SmolVLM", "llama", _sizes(2048, 8192, 24, 32, 32, 49280), "SmolLM2-1.7B, a copy of its config.json"
    ),
    "PaddleOCR-VL": Checkpoint(
        "PaddleOCRVL",
        _sizes(1024, 3072, 18, 16, 2, 103424, head_dim=128),
        TRANSFORMERS,
        dict(vision_config=SIGLIP),
    ),
    "DeepSeek-OCR-2": Checkpoint(
        "DeepseekOcr2",
        _sizes(
            1280,
            6848,
            12,
            10,
            10,
            129280,
            n_routed_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=896,
            mlp_layer_types=["dense"] + ["sparse"] * 11,
        ),
        "AI-Hypercomputer/maxtext, deepseek_ocr_2.yml",
        dict(vision_config=dict(encoder_config=dict(num_hidden_layers=1))),
    ),
    "LFM2-VL-450M": _lfm2_vl(_sizes(1024, 6656, 16, 16, 8, 65536)),
    "LFM2-VL-1.6B": _lfm2_vl(_sizes(2048, 12288, 16, 32, 8, 65536)),
}


@dataclass(frozen=True)
class Figures:
    """What adapters with the default settings come to on a model.

    Attributes:
        base: Parameters of the text model.
        depth: Its decoder layers.
        layers: Those that get a branch of PVM.
        shape: The sizes of a branch; `None` where PVM is refused.
        steered: How many layers DIPE and T-DRS act on; `None` where they are refused.
    """

    base: int
    depth: int
    layers: list[int]
    shape: BranchShape | None
    steered: tuple[int | None, int | None]

    @property
    def parameters(self) -> int:
        """How many parameters a PVM adapter has."""
        assert self.shape is not None
        return len(self.layers) * sum(map(math.prod, self.shape.weights().values()))

    @property
    def bytes_per_token(self) -> int:
        """What PVM keeps of a visual token with the KV cache, base in bfloat16 and adapter in float32.

        Its embedding, where it stands, and in each branch a key and a value.
        """
        assert self.shape is not None
        projected = 2 * self.shape.num_key_value_heads * self.shape.head_dim
        return 2 * self.shape.hidden_size + 8 + 4 * len(self.layers) * projected


def figures_of(model: nn.Module) -> Figures:
    """What adapters with the default settings come to on a model, found out without attaching any."""
    vlm = find_vlm(model)
    base = sum(parameter.numel() for parameter in vlm.text_model.parameters())
    steered = (_steered(DIPEConfig, vlm), _steered(TDRSConfig, vlm))
    return Figures(base, len(vlm.layers), strided_layers(vlm.text_config), _branch_shape(vlm), steered)


def _branch_shape(vlm: VisionLanguageModel) -> BranchShape | None:
    try:
        _ = vlm.block
        return BranchShape.of(PVMConfig(), vlm.text_config)
    except ValueError:
        return None


def _steered(method: type[AttentionMethod], vlm: VisionLanguageModel) -> int | None:
    try:
        return len(method.layers_on(vlm))
    except ValueError:
        return None


# ---- docs/checkpoints.md

TABLE = re.compile(r"(<!-- checkpoints:[^>]*-->\n).*?(<!-- checkpoints end -->)", re.DOTALL)
HEAD = """| Checkpoint | Text model | Layers | PVM in | Heads | MLP | Parameters | Bytes | DIPE | T-DRS |
|---|---|---|---|---|---|---|---|---|---|"""


def row_of(name: str, figures: Figures) -> str:
    """The row of a checkpoint in docs/checkpoints.md."""
    size = f"{figures.base / 1e9:,.2f} B"
    pvm = ["no"] + 4 * [""]
    if (shape := figures.shape) is not None:
        heads = f"{shape.num_heads} x {shape.head_dim}, {shape.num_key_value_heads}"
        sizes = (shape.intermediate_size, figures.parameters, figures.bytes_per_token)
        pvm = [", ".join(map(str, figures.layers)), heads, *(f"{size:,}" for size in sizes)]
    steered = ["no" if number is None else str(number) for number in figures.steered]
    return f"| {' | '.join([name, size, str(figures.depth), *pvm, *steered])} |"


def table() -> str:
    """The table of docs/checkpoints.md, and where the sizes were read."""
    rows = (row_of(name, figures_of(checkpoint.build())) for name, checkpoint in CHECKPOINTS.items())
    sources = (source_of(name, checkpoint) for name, checkpoint in CHECKPOINTS.items())
    folded = ['<details markdown="1">', "<summary>Where the sizes were read</summary>", "", *sources, "", "</details>"]
    return "\n".join([HEAD, *rows, "", *folded])


def source_of(name: str, checkpoint: Checkpoint) -> str:
    """Where the sizes of a checkpoint were read, as docs/checkpoints.md lists it."""
    return f"- {name}: {checkpoint.source}"


def with_table(page: str) -> str:
    """docs/checkpoints.md with the table as it is now."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", page)
