"""Refuses ways to generate that do not go one token at a time on a KV cache, for methods that depend on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationConfig

from ..tokens.families import VisionLanguageModel
from ..utils.wrapping import Shadow


ATTRIBUTE = "_one_by_one"  # the attribute of the model that holds its `_Ways`


class OneByOne:
    """Refuses other ways to generate as long as an adapter acts: those of `_Ways`.

    Args:
        vlm: The model's parts.
        title: The method's name, for the message.
        acting: The adapters that act.
    """

    def __init__(self, vlm: VisionLanguageModel, title: str, acting: Callable[[], list[str]]):
        self.title, self.acting = title, acting
        self._ways = [vars(model).get(ATTRIBUTE) or _Ways(model) for model in vlm.generators]
        for ways in self._ways:
            ways.guards.append(self)

    def remove(self) -> None:
        """Allow these ways again, unless others refuse them."""
        for ways in self._ways:
            ways.guards.remove(self)
            if not ways.guards:
                ways.remove()


class _Ways:
    """Takes the place of a model's own methods, for all adapters on it.

    It refuses assisted decoding and prompt lookup, `use_cache=False`, and prompts that are read in pieces.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.guards: list[OneByOne] = []
        vars(model)[ATTRIBUTE] = self
        self._own_candidates = Shadow(model, "_get_candidate_generator", self._get_candidates)
        self._own_cache = Shadow(model, "_prepare_cache_for_generation", self._prepare_cache)

    def remove(self) -> None:
        self._own_candidates.remove()
        self._own_cache.remove()
        del vars(self.model)[ATTRIBUTE]

    def _get_candidates(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse(
            "but assisted decoding and prompt lookup read several tokens at once. Call generate without "
            "assistant_model and prompt_lookup_num_tokens."
        )
        return self._own_candidates(*args, **kwargs)

    def _prepare_cache(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        if not generation_config.use_cache:
            self._refuse("but use_cache=False leaves no KV cache to keep it on. Call generate with use_cache=True.")
        if generation_config.prefill_chunk_size is not None:
            self._refuse("but prefill_chunk_size makes a piece of the prompt look like an answer. Leave it out.")
        return self._own_cache(generation_config, *args, **kwargs)

    def _refuse(self, why: str) -> None:
        names = [f"{guard.title} {name}" for guard in self.guards for name in guard.acting()]
        if names:
            raise NotImplementedError(
                f"The active adapters ({', '.join(names)}) depend on what they saw in the forward before, {why}"
            )
