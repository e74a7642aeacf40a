"""Refuses ways to generate that read several tokens of an answer at once, for methods that go from token to token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..tokens.families import VisionLanguageModel
from ..utils.wrapping import Shadow


ATTRIBUTE = "_one_by_one"  # of the model, on which what stands in the place of its method is found


class OneByOne:
    """Has assisted decoding and prompt lookup refused as long as an adapter acts.

    Args:
        vlm: The model's parts.
        acting: The adapters that act.
    """

    def __init__(self, vlm: VisionLanguageModel, acting: Callable[[], list[str]]):
        self.acting = acting
        self._candidates = [vars(model).get(ATTRIBUTE) or _Candidates(model) for model in vlm.generators]
        for candidates in self._candidates:
            candidates.guards.append(self)

    def remove(self) -> None:
        """Have them work again, unless others refuse them."""
        for candidates in self._candidates:
            candidates.guards.remove(self)
            if not candidates.guards:
                candidates.remove()


class _Candidates:
    """Stands in the place of a model's own method, for all adapters on it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.guards: list[OneByOne] = []
        vars(model)[ATTRIBUTE] = self
        self._own = Shadow(model, "_get_candidate_generator", self._get)

    def remove(self) -> None:
        self._own.remove()
        del vars(self.model)[ATTRIBUTE]

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        names = [name for guard in self.guards for name in guard.acting()]
        if names:
            raise NotImplementedError(
                f"The active adapters ({', '.join(names)}) go by what the token before was or did, but assisted "
                "decoding and prompt lookup read several tokens at once. Call generate without assistant_model and "
                "prompt_lookup_num_tokens."
            )
        return self._own(*args, **kwargs)
