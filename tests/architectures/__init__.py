"""The table of architectures: every type of transformers' image-text models, and what works on it."""

from . import core, unusual
from .rows import Architecture


# By the model's `model_type`, with the form after a slash where one type has several.
ARCHITECTURES: dict[str, Architecture] = {**core.ROWS, **unusual.ROWS}
