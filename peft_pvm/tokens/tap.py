"""The tap: hooks that tell every layer of a vision-language model which tokens are visual.

A hook on the multimodal module notes, from `input_ids` and the features that come with them, which tokens are visual,
and sends a `VisualContext` along as a keyword argument. A hook on the text model completes it with what the vision
tower wrote into `inputs_embeds` and with what the KV cache remembers. Nothing is kept on a module, so two
conversations, two forwards before one backward, beams and re-used caches cannot get into each other's way.

Where the tap cannot know what is visual, it says so in the context. An active adapter raises that; with the adapter
disabled the base goes its own way.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import uuid
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Cache

from ..utils.packages import (
    cache_in,
    caches_in,
    held_by,
    is_tuner_child,
    modalities_in,
    paged_inputs,
)
from ..utils.wrapping import Shadow
from .adapters_by_row import AdaptersByRow
from .context import CONTEXT, VisualContext
from .families import VisionLanguageModel
from .memory import (
    Coverage,
    VisualMemory,
    attach_memory,
    capacity_of,
    coverage_of,
    has_lost_keys,
    keys_by_layer,
    memory_of,
    num_fixed_keys,
)
from .positions import placeholder_mask
from .visibility import parts_rows


VISUAL_MASK = "visual_mask"  # the keyword by which a user says which of their own `inputs_embeds` are visual
FEATURES = "image_embeds"  # the keyword by which a text model that puts features in itself is given them
ATTRIBUTE = "_visual_tap"  # the attribute of the text model that holds its tap


class Tap:
    """The hooks of one model, shared by all tuners on it.

    Args:
        vlm: The model's parts.
    """

    def __init__(self, vlm: VisionLanguageModel):
        self.vlm = vlm
        # By default, what Dynamo compiled for a layer without hooks also runs where there are hooks, in silence.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self._handles = [
            vlm.multimodal.register_forward_pre_hook(self._note_inputs, with_kwargs=True),
            vlm.text_model.register_forward_pre_hook(self._complete_context, with_kwargs=True),
            vlm.text_model.register_forward_hook(self._end_forward, with_kwargs=True),
        ]
        if vlm.rotary is not None:
            self._handles.append(vlm.rotary.register_forward_pre_hook(self._note_positions, with_kwargs=True))
        # Of the forward that is running, by thread, for the rotary embedding, which is given no keyword arguments. The
        # forward itself holds the context: nothing outlives it, however it ends.
        self._in_flight: dict[int, weakref.ref[VisualContext]] = {}
        self.by_row = AdaptersByRow()
        self._name = uuid.uuid4().hex
        self._has_warned = False
        # Set aside until the tap is removed. The forward refuses packed rows too, but generate_batch works in a thread
        # of its own and would only log that. And generate refuses keywords that it does not know.
        self._own_batching = Shadow(vlm.model, "init_continuous_batching", self._init_continuous_batching)
        self._own_check = Shadow(vlm.model, "_validate_model_kwargs", self._validate_model_kwargs)
        self._shadows = [self._own_batching, self._own_check]
        if vlm.inner_generator is not None:
            self._own_prepare = Shadow(vlm.inner_generator, "prepare_inputs_for_generation", self._prepare_inputs)
            self._shadows.append(self._own_prepare)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_flight": {}}  # what a failed forward has left points nowhere, and is not pickled

    @staticmethod
    def on(vlm: VisionLanguageModel) -> Tap:
        """The tap of a model, attached now if there is none yet."""
        tap = vlm.text_model.__dict__.get(ATTRIBUTE)
        if tap is None:
            tap = vlm.text_model.__dict__[ATTRIBUTE] = Tap(vlm)
        return tap

    @staticmethod
    @contextlib.contextmanager
    def lent_to(vlm: VisionLanguageModel) -> Iterator[Tap]:
        """The tap of a model, for the length of a block: one that was not there before is removed."""
        was_there = ATTRIBUTE in vlm.text_model.__dict__
        tap = Tap.on(vlm)
        try:
            yield tap
        finally:
            if not was_there:
                tap.remove()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        for shadow in self._shadows:
            shadow.remove()
        del self.vlm.text_model.__dict__[ATTRIBUTE]

    def _init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self._has_active_adapter():
            raise NotImplementedError(f"generate_batch and paged continuous batching {PACKED_REFUSAL}")
        return self._own_batching(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self._own_check({name: value for name, value in model_kwargs.items() if name != VISUAL_MASK})

    # The name `inputs_embeds` tells generate that they may be given.
    def _prepare_inputs(self, input_ids: torch.Tensor, inputs_embeds: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Say which of the embeddings are visual from which an inner model is to generate."""
        inputs = self._own_prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        is_on = self.vlm.text_model.__dict__.get(ATTRIBUTE) is self  # else whoever patched the method still calls this
        if is_on and inputs.get("inputs_embeds") is not None:
            token_ids = {token_id for ids in self.vlm.placeholder_ids.values() for token_id in ids}
            inputs[VISUAL_MASK] = placeholder_mask(input_ids, sorted(token_ids))
        return inputs

    def _note_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = by_name(module, args, kwargs)
        given_mask = kwargs.pop(VISUAL_MASK, None)
        if self.vlm.family.image_mask:
            context = self._context_of_mask(inputs)
        elif inputs.get("input_ids") is None and inputs.get("inputs_embeds") is not None:
            context = _context_of_own_embeds(given_mask, inputs["inputs_embeds"])
        else:
            context = self._context_of_ids(inputs)
        context.attention_mask = inputs.get("attention_mask")
        return args, {**kwargs, CONTEXT: context}

    def _context_of_mask(self, inputs: dict[str, Any]) -> VisualContext:
        """The context for a text model that puts the features in by itself: its inputs say where they are."""
        family, cache = self.vlm.family, cache_in(inputs)
        mask = inputs.get(cast(str, family.image_mask))
        is_later = family.images_first and cache is not None and bool(cache.get_seq_length() > 0)
        return VisualContext(None if mask is None or inputs.get(FEATURES) is None or is_later else mask.bool())

    def _context_of_ids(self, inputs: dict[str, Any]) -> VisualContext:
        """The context in the usual case: `input_ids`, and features for the placeholders among them."""
        context = VisualContext(None)
        for modality in modalities_in(inputs):  # a placeholder id without features is text: a model may sample one
            token_ids = self.vlm.placeholder_ids[modality]
            mask = placeholder_mask(inputs["input_ids"], token_ids)
            if not bool(mask.any()):
                context.refusal = ValueError(
                    f"This forward brings {modality} features, but none of the placeholder ids that "
                    f"{type(self.vlm.model).__name__}'s config names for them ({token_ids}) is among input_ids. "
                    "If this model uses another token, it needs a row in peft_pvm/tokens/families.py."
                )
            context.visual_mask = mask if context.visual_mask is None else context.visual_mask | mask
        self._warn_of_missing_features(inputs)
        return context

    def _warn_of_missing_features(self, inputs: dict[str, Any]) -> None:
        """Warn, once for this model, of a prompt in which placeholders stand for images that it does not bring."""
        input_ids, cache = inputs.get("input_ids"), cache_in(inputs)
        # A placeholder that was sampled is text, and a step of decoding does not wait for the device.
        if torch.compiler.is_compiling() or self._has_warned or input_ids is None or input_ids.shape[1] == 1:
            return
        if cache is not None and bool(cache.get_seq_length() > 0):
            return
        given = {token_id for modality in modalities_in(inputs) for token_id in self.vlm.placeholder_ids[modality]}
        missing = {token_id for ids in self.vlm.placeholder_ids.values() for token_id in ids} - given
        if not bool(placeholder_mask(input_ids, sorted(missing)).any()) or not self._has_active_adapter():
            return
        self._has_warned = True
        warnings.warn(
            f"This prompt has placeholder tokens ({sorted(missing)}) for images or videos, but no pixels came with "
            f"it. {type(self.vlm.model).__name__} and the adapter take them for text. Pass all that the processor "
            "returns, pixel_values included.",
            stacklevel=2,
        )

    def _has_active_adapter(self) -> bool:
        return any(is_active(module) for module in self.vlm.model.modules())

    def _complete_context(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        inputs = by_name(module, args, kwargs)
        inputs_embeds, cache = inputs.get("inputs_embeds"), cache_in(inputs)
        given_mask = kwargs.pop(VISUAL_MASK, None)
        context = kwargs.get(CONTEXT)
        if self.vlm.family.image_mask and context is not None and context.visual_mask is not None:
            where, features = context.visual_mask.unsqueeze(-1), inputs[FEATURES]
            inputs_embeds = features.new_zeros(*where.shape[:2], features.shape[-1]).masked_scatter(where, features)
        elif inputs_embeds is None:  # only text: nothing to read but the shape
            context = context or VisualContext(None)
            inputs_embeds = torch.empty(*inputs["input_ids"].shape, 0, device=inputs["input_ids"].device)
        else:
            if context is None:  # the text model is called by itself
                context = _context_of_own_embeds(given_mask, inputs_embeds)
            context.inputs_embeds = inputs_embeds.detach()
        if context.attention_mask is None:
            context.attention_mask = inputs.get("attention_mask")

        context.cache, num_keys = cache, 0 if cache is None else _length_of(cache)
        try:
            _refuse_copied(module)
            is_first = num_keys == 0 if isinstance(num_keys, int) else memory_of(cache) is None
            _refuse_packed(inputs, is_first, context)
            # To learn the length of a static cache is to wait for the device. Decoding a token after others does not.
            is_asked = inputs_embeds.shape[1] > 1 or coverage_of(cache).read_by != self._name
            memory, coverage = _remembered(cache, num_keys, is_asked)
        except (NotImplementedError, ValueError) as refusal:
            context.refusal = refusal.with_traceback(None)  # whose frames hold the context
        if context.refusal is None:
            context.read(inputs_embeds, memory, coverage)
            context.keys_before = keys_by_layer(cache)
            context.num_fixed_keys = num_fixed_keys(cache)
            context.capacity = capacity_of(cache)
        context.adapter_names = self.by_row.names(len(inputs_embeds))
        self._in_flight[this_thread()] = weakref.ref(context)
        return args, {**kwargs, CONTEXT: context}

    def _note_positions(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        in_flight = self._in_flight.get(this_thread())
        context = None if in_flight is None else in_flight()
        position_ids = by_name(module, args, kwargs).get("position_ids")
        if context is not None and position_ids is not None:  # without them, what needs them raises
            context.note_positions(position_ids)

    def _end_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Put the memory on the cache, which may be one that the text model made itself."""
        self._in_flight.pop(this_thread(), None)
        context = kwargs[CONTEXT]
        missed = context.missed(type(self.vlm.model).__name__)
        # An adapter whose decoder layer was replaced left the model with it, and cannot be switched off any more.
        if missed is not None and self._has_active_adapter():
            raise missed
        if context.refusal is not None:
            return
        num_tokens = context.past_length + context.seq_len
        given = cache_in(by_name(module, args, kwargs))
        for cache in caches_in(output) or ([] if given is None else [given]):
            is_evicted = context.is_evicted or has_lost_keys(cache, context.keys_before, context.seq_len)
            # A static cache counts in place, and is not asked.
            num_keys = num_tokens if cache.is_compileable else _length_of(cache)
            attach_memory(cache, context.memory, Coverage(num_tokens, num_keys, is_evicted, self._name))


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All inputs of a forward by name, positional ones included."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs}


def is_active(module: nn.Module) -> bool:
    """Whether a module is a layer of adapters beside the base's modules, and one of them acts."""
    if not isinstance(module, BaseTunerLayer) or not is_tuner_child(module) or module.disable_adapters:
        return False
    return bool(set(module.active_adapters) & held_by(module))


def _context_of_own_embeds(visual_mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> VisualContext:
    """The context of a forward whose caller has merged the features in, and has to say where."""
    shape = tuple(inputs_embeds.shape[:2])
    context = VisualContext(None)
    if visual_mask is None:
        context.refusal = ValueError(
            "With inputs_embeds instead of input_ids, the adapter cannot know which tokens are visual. Pass "
            f"{VISUAL_MASK}, a bool tensor of shape {shape} that is True at the positions of image or video features "
            "(all False if there is only text)."
        )
    elif not isinstance(visual_mask, torch.Tensor) or visual_mask.dtype != torch.bool or visual_mask.shape != shape:
        given = getattr(visual_mask, "dtype", type(visual_mask).__name__)
        context.refusal = ValueError(
            f"{VISUAL_MASK} must be a bool tensor of shape {shape}, as inputs_embeds has it; got {given} of shape "
            f"{tuple(getattr(visual_mask, 'shape', ()))}."
        )
    else:
        context.visual_mask = visual_mask
    return context


def _length_of(cache: Cache) -> int | torch.Tensor:
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor) and not cache.is_compileable:
        return int(length)  # crop leaves a tensor in transformers 5.16
    return length


def _refuse_packed(inputs: dict[str, Any], is_first: bool, context: VisualContext) -> None:
    packed = paged_inputs(inputs)
    positions = inputs.get("position_ids")
    if positions is not None and is_first and inputs.get("attention_mask") is None:
        # transformers takes positions that start again, without an attention mask, for packed rows. Of several axes,
        # the first is that of text, or of time, and grows along the row as well.
        axis = positions if positions.dim() == 2 else positions[0]
        if bool((axis.diff(dim=-1) < 0).any()):
            packed.append("position_ids that start again")
    masks = context.attention_mask.values() if isinstance(context.attention_mask, dict) else [context.attention_mask]
    if is_first and context.visual_mask is not None and any(parts_rows(mask, context.visual_mask) for mask in masks):
        packed.append("a mask that parts rows")
    if packed:
        raise NotImplementedError(f"This forward ({', '.join(packed)} given) {PACKED_REFUSAL}")


PACKED_REFUSAL = (
    "would put several conversations into one row, where the adapter could not tell their images apart. Use generate "
    "with a padded batch, or take the adapter off with unload()."
)


def _refuse_copied(text_model: nn.Module) -> None:
    if getattr(text_model, "_is_replica", False):
        raise NotImplementedError(
            "torch.nn.DataParallel runs copies of the model with the hooks of the original, so that the adapter would "
            "compute with the original's weights. Use DistributedDataParallel (launch the script with torchrun or "
            "accelerate), or a single device (CUDA_VISIBLE_DEVICES=0)."
        )


def _remembered(cache: Cache | None, num_keys: int | torch.Tensor, is_asked: bool) -> tuple[VisualMemory, Coverage]:
    """The memory that `cache` carries and what it covers, brought up to date with the cache's length."""
    memory, coverage = memory_of(cache), coverage_of(cache)
    unread = 0
    if is_asked or isinstance(num_keys, int):
        unread = int(num_keys - coverage.num_keys)
    if unread > 0:
        raise ValueError(
            f"{unread} tokens of this KV cache were computed without the adapter knowing which of them are visual (it "
            "was not attached yet, or they came as inputs_embeds without visual_mask). Start with a new cache."
        )
    if memory is None or (isinstance(num_keys, int) and num_keys == 0):
        return VisualMemory(), Coverage()
    if not isinstance(num_keys, int):  # where a static cache is cropped, its memory is as well
        return memory, Coverage(num_keys, num_keys)
    if coverage.is_evicted:
        if unread < 0:
            raise ValueError(
                f"{-unread} keys were cropped from a KV cache that had lost others during a forward (to kvpress or "
                "another compression of the cache), so that nobody can know which images are left. Do not crop such a "
                "cache; start with a new one."
            )
        return memory, coverage
    if unread < 0:
        memory = replace(memory, notes={})  # the forward that left them has not been, as far as the cache goes
    return memory.cropped(num_keys), Coverage(num_keys, num_keys)


def this_thread() -> int:
    """What tells forwards that run side by side on one model apart."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
