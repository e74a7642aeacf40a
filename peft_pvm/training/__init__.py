"""What makes adapters learn to look: recipes for training, for any trainer."""

from .hidden import HiddenImage, hidden_image


__all__ = ["HiddenImage", "hidden_image"]
