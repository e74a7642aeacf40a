"""Adapters that keep vision-language models looking at the image. Importing registers their types with PEFT."""

from . import methods
from .folders.sharing import push_adapter
from .methods import *  # noqa: F403  # configurations and tuners
from .methods.pvm.checkpoints import convert_reference_checkpoint, export_reference_checkpoint
from .tuners.active import attached
from .tuners.loading import add_adapters, load_adapters
from .tuners.registry import extend_peft, register
from .tuners.saving import save_adapter
from .utils.packages import check_versions


__version__ = "0.1.0"
__all__ = [
    "add_adapters",
    "attached",
    "convert_reference_checkpoint",
    "export_reference_checkpoint",
    "load_adapters",
    "push_adapter",
    "register",
    "save_adapter",
]
__all__ += methods.__all__

check_versions()
for method in methods.METHODS:
    register(method.config, method.tuner)
extend_peft()
