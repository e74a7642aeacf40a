"""The table of architectures: every type of transformers' image-text models, and what works on it."""

from . import blocks, core, latent, omni, published, readers, refused, stacks, unusual, wrappers
from .rows import Architecture


# By the model's `model_type`, with the form after a slash where one type has several.
ARCHITECTURES: dict[str, Architecture] = {
    **core.ROWS,
    **published.ROWS,
    **wrappers.ROWS,
    **readers.ROWS,
    **omni.ROWS,
    **unusual.ROWS,
    **latent.ROWS,
    **blocks.ROWS,
    **stacks.ROWS,
    **refused.ROWS,
}

# The types that the oldest supported transformers lacks. Tests skip them there by name.
OF_THE_NEWEST = frozenset(
    {
        "apertus1p5",
        "dots3_note",
        "granite_docling",
        "hy_v4_vl",
        "hyperclovax_vision_v2",
        "inkling2",
        "inkling2_loop",
        "lfm3_vl",
        "minicpm_ocr",
        "minicpmv4_7",
        "mistral_large4",
        "molmo2",
        "muse_spark",
        "nemotron_h_omni",
        "unlimited_ocr",
    }
)


def type_of(name: str) -> str:
    """The type of a row: its name, up to the slash."""
    return name.partition("/")[0]
