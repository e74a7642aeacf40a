"""Parts of a recipe by which adapters learn to look at the image, for any trainer and for your own loop."""

from .distance import TextBetween
from .gates import parameter_groups, speed_up_gates
from .hidden import HiddenImage, hidden_image


__all__ = ["HiddenImage", "TextBetween", "hidden_image", "parameter_groups", "speed_up_gates"]
