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
