"""What makes adapters learn to look: parts of a recipe, for any trainer and for loops of one's own."""

from .distance import TextBetween
from .gates import parameter_groups, speed_up_gates
from .hidden import HiddenImage, hidden_image


__all__ = ["HiddenImage", "TextBetween", "hidden_image", "parameter_groups", "speed_up_gates"]
