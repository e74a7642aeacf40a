"""Refuses ways to generate that read several tokens of an answer at once, for methods that go from token to token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..tokens.families import VisionLanguageModel


CANDIDATES = "_get_candidate_generator"  # of a transformers model: how assisted decoding and prompt lookup begin


class OneByOne:
    """Has assisted decoding and prompt lookup refused as long as an adapter acts.

    Args:
        vlm: The model's parts.
        acting: The adapters that act.
    """

    def __init__(self, vlm: VisionLanguageModel, acting: Callable[[], list[str]]):
        self.vlm, self.acting = vlm, acting
        for model in vlm.generators:
            model.__dict__.setdefault(CANDIDATES, _Candidates(model)).guards.append(self)

    def remove(self) -> None:
        """Have them work again, unless others refuse them."""
        for model in self.vlm.generators:
            guards = model.__dict__[CANDIDATES].guards
            guards.remove(self)
            if not guards:
                del model.__dict__[CANDIDATES]


class _Candidates:
    """Stands for a model's own method of that name."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.guards: list[OneByOne] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = [name for guard in self.guards for name in guard.acting()]
        if names:
            raise NotImplementedError(
                f"The active adapters ({', '.join(names)}) go by what the token before was or did, but assisted "
                "decoding and prompt lookup read several tokens at once. Call generate without assistant_model and "
                "prompt_lookup_num_tokens."
            )
        return getattr(type(self.model), CANDIDATES)(self.model, *args, **kwargs)
