"""Which adapter each row of a batch has (`adapter_names`): noted by thread, beside what a forward is given."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..utils.packages import held_by


BASE = "__base__"  # what PEFT calls no adapter, where every row has its own


class AdaptersByRow:
    """What is said about the forwards of each thread. Other threads may be running through the same model."""

    def __init__(self) -> None:
        self._by_thread: dict[int, tuple[Sequence[str], bool]] = {}

    @contextlib.contextmanager
    def chosen(self, adapter_names: Sequence[str], may_repeat: bool = True) -> Iterator[None]:
        """Give each row of a batch its own adapter, in the forwards of this thread, for the length of a block.

        Args:
            adapter_names: Of each row that the user gave.
            may_repeat: Whether forwards may have several rows for each: `generate` has, for beams and several answers.
        """
        thread = threading.get_ident()
        outer = self._by_thread.get(thread)
        self._by_thread[thread] = adapter_names, may_repeat
        try:
            yield
        finally:
            if outer is None:
                del self._by_thread[thread]
            else:
                self._by_thread[thread] = outer

    def names(self, batch_size: int) -> list[str] | None:
        """The adapter of each row of a batch in this thread. `None`: rows do not have adapters of their own.

        Raises:
            ValueError: As many rows cannot come from as many names.
            NotImplementedError: The forward is being compiled.
        """
        given = self._given()
        return None if given is None else _spread(*given, batch_size)

    def _given(self) -> tuple[Sequence[str], bool] | None:
        """The names that were given in this thread, and whether rows may be repeated. `None` without any."""
        if torch.compiler.is_compiling():
            if self._by_thread:  # a compiled forward cannot ask which thread runs it
                raise NotImplementedError(
                    "adapter_names cannot choose adapters in a compiled forward. Make this call on the model that is "
                    "not compiled, or use set_adapter."
                )
            return None
        return self._by_thread.get(threading.get_ident())

    def choose_in(self, wrapper: AuxiliaryTrainingWrapper, name: str, sees_rows: bool) -> None:
        """Let a module that PEFT keeps several copies of (`modules_to_save`) choose among them row by row as well.

        Args:
            wrapper: The module.
            name: Its name, for the message.
            sees_rows: Whether its input has the rows of the batch. That of a vision tower has images or patches.
        """
        if "_visual_choice" not in wrapper.__dict__:
            hook = functools.partial(self._name_rows, name, sees_rows)
            wrapper.__dict__["_visual_choice"] = wrapper.register_forward_pre_hook(hook, with_kwargs=True)
            if isinstance(wrapper, ModulesToSaveWrapper):
                wrapper.register_forward_hook(self._run_the_one, with_kwargs=True)

    def _name_rows(
        self, name: str, sees_rows: bool, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        given = self._given()
        if given is None:
            return args, kwargs
        adapter_names, may_repeat = given
        length, copies = len(next(iter((*args, *kwargs.values())))), _copies(module, adapter_names)
        if len(set(copies)) == 1:
            if isinstance(module, ModulesToSaveWrapper):  # which takes names for few types of modules
                return args, kwargs
            names = copies[:1] * length
        elif sees_rows:
            names = _spread(copies, may_repeat, length)
        else:
            raise NotImplementedError(
                f"adapter_names chooses adapters row by row, but {name}, which an adapter has trained along, reads "
                "images, and which row an image belongs to is not known there. Use one adapter a call (set_adapter)."
            )
        return args, {**kwargs, "adapter_names": names}

    def _run_the_one(self, module: ModulesToSaveWrapper, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Where all rows have the same copy, its output, unless that is the copy that has run."""
        given = self._given()
        copies = set() if given is None or module.disable_adapters else set(_copies(module, given[0]))
        if len(copies) != 1 or copies == set(module.active_adapters):
            return output
        (name,) = copies
        return (module.original_module if name == BASE else module.modules_to_save[name])(*args, **kwargs)


def _copies(wrapper: nn.Module, names: Sequence[str]) -> list[str]:
    """Which copy of a module each of some adapters has: its own, or the base's."""
    own = held_by(wrapper)
    return [name if name in own else BASE for name in names]


def _spread(names: Sequence[str], may_repeat: bool, batch_size: int) -> list[str]:
    """The name of each row, where `generate` may have repeated the rows that the names were given for.

    Raises:
        ValueError: As many rows cannot come from as many names.
    """
    if not names or batch_size % len(names) or (len(names) != batch_size and not may_repeat):
        raise ValueError(f"adapter_names has {len(names)} names, but the batch has {batch_size} rows.")
    return [name for name in names for _ in range(batch_size // len(names))]
