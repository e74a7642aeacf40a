"""What makes adapters learn to look: parts of a recipe, for any trainer and for loops of one's own."""

from .calibrate import calibrate
from .distance import TextBetween, read_paragraphs
from .gates import parameter_groups, speed_up_gates
from .hidden import HiddenImage, hidden_image
from .layers import propose_layers
from .rows import read_chats


__all__ = [
    "HiddenImage",
    "TextBetween",
    "calibrate",
    "hidden_image",
    "parameter_groups",
    "propose_layers",
    "read_chats",
    "read_paragraphs",
    "speed_up_gates",
]
