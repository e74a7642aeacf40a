<<<<<<< HEAD
"""What makes adapters learn to look: parts of a recipe, for any trainer and for loops of one's own."""

from .distance import TextBetween, read_paragraphs
from .hidden import HiddenImage, hidden_image


__all__ = ["HiddenImage", "TextBetween", "hidden_image", "read_paragraphs"]
=======
"""What makes a training work on the user's own model and data."""
>>>>>>> layers
