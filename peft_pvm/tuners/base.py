"""What the tuners share: configs that remember their file, attaching with all checks of that file, unloading."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..folders.adapter_file import FORMAT_VERSION, PEFT_PREFIX, AdapterFile, SavedConfig
from ..folders.incoming import INCOMING, NOTHING, bare, base_tensors, check_modules_to_save, fitted, refuse_unless_fit
from ..folders.writing import write_card, written_whole
from ..tokens.families import VisionLanguageModel, find_vlm
from ..utils.checks import check, check_settings, is_text, setting
from ..utils.packages import LOADS_MODULES_TO_SAVE, forget_adapters, loads_adapters_itself
from ..utils.text import quoted
from ..utils.wrapping import plain_name, unwrapped, without_wrappers
from .layers import VisualTunerLayer, take_off, unwrap_what_is_left, without_hooks
from .names import check_adapter_name


@dataclass
class VisualConfig(SavedConfig):
    """Base of our configs.

    `target_modules` holds, after attaching, the names of the base modules that carry the adapter, for PEFT's own code
    to read. It is not a field: which layers is said by `layers_to_transform`.

    Args:
        format_version: The format of the saved adapter. Do not change it.
    """

    target_modules = cast(tuple[str, ...], ())  # without annotations, which would make them fields
    acts_in_forwards: ClassVar[bool] = True  # also in one forward over a whole text
    when_absent: ClassVar[dict[str, Any]] = {}  # fields that saved configurations may lack, and what that means

    format_version: str = setting(FORMAT_VERSION, "The format of the saved adapter. Do not change it.")

    def __post_init__(self) -> None:
        for name in ("base_model_name_or_path", "revision", "task_type", "peft_version"):
            check(self, name, getattr(self, name) is None or is_text(getattr(self, name)), "a name or None")
        check(self, "inference_mode", isinstance(self.inference_mode, bool), "True or False")
        valid = self.auto_mapping is None or (
            isinstance(self.auto_mapping, dict)
            and len(self.auto_mapping) <= 10
            and all(is_text(name) and (value is None or is_text(value)) for name, value in self.auto_mapping.items())
        )
        check(self, "auto_mapping", valid, "a dict of names or None")
        super().__post_init__()
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"{type(self).__name__}.format_version is {quoted(self.format_version)}, but this peft_pvm knows "
                f"format {FORMAT_VERSION!r}. An adapter of a newer format needs a newer peft_pvm."
            )
        check_settings(self)
        self.peft_type = PeftType(self.method.upper())

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the configuration and a model card.

        PEFT and transformers call this when they save an adapter; PEFT leaves a card to be filled in.
        """
        with written_whole(save_directory) as staged:
            super().save_pretrained(str(staged), **kwargs)
            write_card(self, staged)


def with_absent_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved configuration of any method, with those that it was saved without.

    A field that came later means there what the method did before, which need not be the field's default.
    """
    peft_type = fields.get("peft_type")
    config_cls = dict[Any, type](PEFT_TYPE_TO_CONFIG_MAPPING).get(peft_type) if isinstance(peft_type, str) else None
    return {**getattr(config_cls, "when_absent", {}), **fields}


MERGE_REFUSAL = (
    "This adapter computes something that no weight of the base model can express, so it cannot be merged into it. "
    "Keep it attached (saving, loading and switching adapters need no merging), or take it off with unload()."
)


class VisualTuner(BaseTuner):
    """Base of our tuners. A subclass names its layer class, its child's name and what it needs of a file."""

    tuner_layer_cls: type[VisualTunerLayer]
    child_name: str  # the attribute of a base module that holds the tuner layer
    _found: VisionLanguageModel

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any):
        # Adapters of several types on one model share one table of configs, which PEFT writes to before it asks us.
        if adapter_name in getattr(model, "peft_config", {}):
            raise name_is_taken(adapter_name)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    @property
    def vlm(self) -> VisionLanguageModel:
        """The parts of the model, as they were found when an adapter was last attached."""
        return self._found

    def expected_tensors(self, config: VisualConfig, layer: nn.Module) -> dict[str, torch.Tensor]:
        """Every tensor that the adapter has at one base module, on the meta device, by its name in the tuner layer."""
        raise NotImplementedError

    def resolve(self, config: VisualConfig) -> VisualConfig:
        """The config with everything spelled out that depends on the base model: a copy where that changes it.

        Raises:
            ValueError: The config does not fit the base model.
        """
        raise NotImplementedError

    def targeted_names(self, config: VisualConfig) -> tuple[str, ...]:
        """The full names of the base modules that get a tuner layer, for a resolved config."""
        raise NotImplementedError

    def new_layer(self, target: nn.Module) -> VisualTunerLayer:
        """A tuner layer without adapters, to be added beside a base module."""
        raise NotImplementedError

    def add_adapter_to(self, layer: Any, adapter_name: str, config: Any) -> None:
        """Give a tuner layer what one more adapter has beside its resolved config: by default nothing."""

    def _create_and_replace(
        self, peft_config: VisualConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        if not hasattr(target, self.child_name):
            target.add_module(self.child_name, self.new_layer(target))
        layer = cast(VisualTunerLayer, target.get_submodule(self.child_name))
        layer.configs[adapter_name] = peft_config
        self.add_adapter_to(layer, adapter_name, peft_config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # not model.forward, which would skip the hooks on the model itself

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        refuse_taken(self, adapter_name)
        with without_hooks(self.model):
            try:
                check_adapter_name(adapter_name, self.model)
                self._found = find_vlm(self.model)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except BaseException:  # Ctrl-C as well
                self.remove_adapter(adapter_name)
                if not getattr(model, "peft_config", None) and loads_adapters_itself(model):
                    forget_adapters(model)  # transformers' add_adapter counts them before it injects
                raise

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"{type(self).__name__} acts on all rows of a batch alike, so adapter_names cannot choose among them. "
                "Use set_adapter and separate batches."
            )
        yield

    def _prepare_adapter_config(self, peft_config: VisualConfig, model_config: dict) -> VisualConfig:
        resolved = self.resolve(peft_config)
        names = self.targeted_names(resolved)
        if resolved.target_modules not in ((), names):  # it is on another model too, whose modules it names
            resolved = copy.copy(resolved)
        resolved.target_modules = names
        saved = getattr(resolved, "modules_to_save", None) or ()
        if saved:
            check_modules_to_save(self.model, saved, self._own_tensors(resolved))
        incoming = INCOMING.get()
        file = incoming.file or resolved.source
        if incoming.by_transformers and not LOADS_MODULES_TO_SAVE and saved:
            raise NotImplementedError(
                f"load_adapter of transformers {transformers.__version__} does not load what modules_to_save trained. "
                "Load the adapter with PeftModel.from_pretrained, or upgrade transformers."
            )
        if incoming.tensors is not None:
            refuse_unless_fit("this model", bare(incoming.tensors), bare(self._expected(resolved)))
        # A folder with only a configuration is a fine start for training, but nothing to run or load.
        elif file is not None and (incoming is not NOTHING or resolved.inference_mode or not file.is_config_only()):
            self._refuse_wrappers(resolved)
            self.check_file(file, resolved)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = resolved
        return resolved

    def _refuse_wrappers(self, config: VisualConfig) -> None:
        # PEFT and transformers would look for the tensors under other names than they have in the file.
        wrapped = [name for name, module in self.model.named_modules() if unwrapped(module) is not module]
        if wrapped and (config.has_parameters or getattr(config, "modules_to_save", None)):
            raise ValueError(
                f"The weights of a saved adapter cannot be loaded into {type(self.model).__name__} as it is: parts of "
                f"it are wrapped ({wrapped[0]}). Load the adapter first, and wrap the model (activation "
                "checkpointing, torch.compile, FSDP) then."
            )

    def check_file(self, file: AdapterFile, config: VisualConfig) -> None:
        """Check that an adapter's file fits the model.

        Args:
            file: The file.
            config: The adapter's configuration, resolved.

        Raises:
            ValueError: It does not.
            FileNotFoundError: There is none.
        """
        expected, incoming = self._expected(config), INCOMING.get()
        names = file.check(expected, base_tensors(self.model), incoming.renaming(self.model, expected))
        incoming.rename_by(names)

    def _own_tensors(self, config: VisualConfig) -> dict[str, torch.Tensor]:
        """Every tensor that an adapter has in tuner layers, by its key in the adapter's file."""
        return {
            f"{PEFT_PREFIX}{name}.{self.child_name}.{key}": tensor
            for name in config.target_modules
            for key, tensor in self.expected_tensors(config, self.model.get_submodule(name)).items()
        }

    def _expected(self, config: VisualConfig) -> dict[str, torch.Tensor]:
        """Every tensor that an adapter's file must hold, by its key."""
        expected = self._own_tensors(config)
        if saved := tuple(getattr(config, "modules_to_save", None) or ()):
            owners = tuple(f"{PEFT_PREFIX}{name}." for name, _ in self.model.named_modules() if name.endswith(saved))
            expected |= {key: tensor for key, tensor in base_tensors(self.model).items() if key.startswith(owners)}
        return expected

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT before 0.21 would freeze the adapters of other types that are on the model.
        others = [
            parameter
            for layer in model.modules()
            if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            and not isinstance(layer, self.tuner_layer_cls)
            for parameter in layer.parameters()
            if parameter.requires_grad
        ]
        super()._mark_only_adapters_as_trainable(model)
        for parameter in others:
            parameter.requires_grad = True

    @staticmethod
    def _check_target_module_exists(peft_config: VisualConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _tuner_layers(self) -> list[VisualTunerLayer]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Let one or several adapters act, and no others.

        Raises:
            ValueError: There is none of such a name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"The model has no adapters {quoted(unknown)}; it has {quoted(list(self.peft_config))}.")
        super().set_adapter(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this type, and choose another one to act.

        Raises:
            ValueError: There is none of that name. Adapters of other types share one table of names with ours.
        """
        own = {name for layer in self._tuner_layers() for name in layer.configs}
        if adapter_name not in own:
            raise ValueError(
                f"This tuner has no adapter {quoted(adapter_name)}. Its adapters: {sorted(own)}. Delete adapters of "
                "another type with the PeftModel of that type."
            )
        super().delete_adapter(adapter_name)

    def remove_adapter(self, adapter_name: str) -> None:
        """Take one adapter off, with the layers and wrappers that hold no other.

        Unlike `delete_adapter`, it chooses no successor.

        Args:
            adapter_name: Its name.
        """
        self.peft_config.pop(adapter_name, None)
        unwrap_what_is_left(self.model, [adapter_name])
        layers = self._tuner_layers()
        for layer in layers:
            if adapter_name in layer.configs:
                if adapter_name in layer.active_adapters:  # PEFT would choose a successor
                    layer.set_adapter([name for name in layer.active_adapters if name != adapter_name])
                layer.delete_adapter(adapter_name)
        take_off(self.model, [layer for layer in layers if not layer.configs])

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: Collection[str],
    ) -> dict[str, torch.Tensor]:
        # PEFT would save the tensors of every tuner layer, also another tuner's that is nested below. And it has left
        # out all whose names have another adapter's name as a part.
        plain, own = {plain_name(key): tensor for key, tensor in state_dict.items()}, {}
        for name, layer in model.named_modules():
            if not isinstance(layer, cls.tuner_layer_cls):
                continue
            for key, tensor in layer.state_dict().items():
                place = f"{plain_name(name)}.{key}"
                was_left_out = not set(unwanted_adapter_names).isdisjoint(place.split("."))
                if key.split(".")[1] == adapter_name and (place in plain or was_left_out):
                    own[place] = plain.get(place, tensor)
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        with without_wrappers(model):
            state_dict = fitted(model, adapter_name, state_dict)
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names = {plain_name(key): key for key in model.state_dict()}
        return {names.get(key, key): tensor for key, tensor in remapped.items()}

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSAL)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT declares None and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        layers = self._tuner_layers()
        own = {adapter_name for layer in layers for adapter_name in layer.configs}
        take_off(self.model, layers)
        unwrap_what_is_left(self.model, own)  # another tuner's layers and wrappers, nested below, stay
        configs = getattr(self.model, "peft_config", {})  # of all tuners on the model, where several are nested
        for adapter_name in own & set(configs):
            del configs[adapter_name]
        if not configs and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def refuse_taken(tuner: BaseTuner, adapter_name: str) -> None:
    """Refuse a second adapter with the name of one of ours, whose place in the table PEFT has given to the new one.

    Raises:
        ValueError: An adapter of ours has that name.
    """
    for layer in tuner.model.modules():
        if isinstance(layer, VisualTunerLayer) and adapter_name in layer.configs:
            tuner.peft_config[adapter_name] = layer.configs[adapter_name]
            raise name_is_taken(adapter_name)


def name_is_taken(adapter_name: str) -> ValueError:
    """The error for a second adapter of one name."""
    return ValueError(
        f"An adapter {quoted(adapter_name)} is already attached to this model. Take another name (adapter_name=...), "
        "or take it off first with unload() or delete_adapter()."
    )
