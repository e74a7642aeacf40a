"""Training steps in which the image is hidden from attention, so that only an adapter beside it can look at it.

Where the base still answers right, PVM has nothing to learn. Hiding the image is the extreme case of fading: no text
token can attend to a visual token, so the answer has to come through PVM. The recipe is ours, not a paper's.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer_callback

from ..attention.dispatch import SteeringHandle, steerable_attentions
from ..methods.pvm.layer import PVMLayer
from ..tokens.context import CONTEXT, VisualContext, dropped_keywords
from ..tokens.families import VisionLanguageModel
from ..tokens.tap import Tap, this_thread
from ..utils.checks import is_int, is_number
from ..utils.wrapping import unwrapped
from .text_alone import TextAlone, TextAloneAtHead, labels_of, layers_for_text, needs_text_alone


RowsOf = Callable[[int], torch.Tensor | None]  # of a batch of so many rows, which to choose, `(batch,)`, bool


def _all_rows(batch_size: int) -> torch.Tensor:
    """Every row of a batch."""
    return torch.ones(batch_size, dtype=torch.bool, device="cpu")


@contextlib.contextmanager
def hidden_image(model: nn.Module, rows: torch.Tensor | Sequence[bool] | None = None) -> Iterator[None]:
    """Hide images from text in the training forwards of a block, so that only PVM can bring them to the answer.

    In these forwards, no text token attends to a visual token. The attention of visual tokens, positions, padding and
    PVM do not change. This works on every attention kernel; flash attention is replaced by sdpa for such a forward.
    Layers of linear attention carry what they saw in a state, so visual tokens are set to 0 there and do not see one
    another either.

    Only forwards of training are changed: those that begin with the model in training mode and with gradients. So
    evaluation and `generate` see the image. The backward pass may come after the block, also with gradient
    checkpointing.

    If all rows hide their images, and `model` is called with labels none of which is right after an image, decoder
    layers and the head compute only the text. Loss and gradients are the same. The logits at visual tokens are then
    meaningless.

    Args:
        model: A model with an active PVM adapter, also wrapped by PEFT, DistributedDataParallel or FSDP.
        rows: Which rows of the batch hide their images, `(batch,)`, bool. `None`: all.

    Raises:
        ValueError: No PVM adapter is active, or the model's attention cannot be reached. In a forward: `rows` does not
            have the length of the batch.
        NotImplementedError: In a forward that continues from a KV cache, in a model with linear attention.

    Example:
        with hidden_image(model):
            loss = model(**batch).loss
        loss.backward()
    """
    chosen = None if rows is None else torch.as_tensor(rows)

    def rows_of(batch_size: int) -> torch.Tensor:
        if chosen is None:
            return _all_rows(batch_size)
        if chosen.dtype != torch.bool or chosen.shape != (batch_size,):
            raise ValueError(
                f"rows must be bool, one for each of the {batch_size} rows of the batch; got {chosen.dtype} of shape "
                f"{tuple(chosen.shape)}."
            )
        return chosen

    with images_hidden(_learning_vlm(model), rows_of, model):
        yield


class HiddenImage(TrainerCallback):
    """Hides images from text in some training steps of transformers' `Trainer` and of TRL's: see `hidden_image`.

    Seed, optimizer step and the row's place in the global batch decide which rows hide their images. So the choice is
    the same on one process and on several, with accumulated gradients, and in a resumed training.

    Args:
        steps: In this many optimizer steps at the beginning, all rows hide their images.
        share: After these steps, this share of all rows hides its images, from 0 to 1. The rows are drawn at random.
            If `steps` and `share` are 0, no row hides them.
        seed: Decides the draws.

    Raises:
        ValueError: A number out of its range. When training begins: as `hidden_image` does.

    Example:
        trainer = SFTTrainer(model, args, callbacks=[HiddenImage(steps=100, share=0.75)], ...)
    """

    def __init__(self, steps: int = 0, share: float = 0.0, seed: int = 0):
        for name, value, fits, accepted in (
            ("steps", steps, is_int(steps) and steps >= 0, "an integer from 0 on"),
            ("share", share, is_number(share) and 0 <= share <= 1, "a number from 0 to 1"),
            ("seed", seed, is_int(seed) and seed >= 0, "an integer from 0 on"),
        ):
            if not fits:
                raise ValueError(f"HiddenImage.{name} is {value!r}, but must be {accepted}.")
        self.steps = steps
        self.share = share
        self.seed = seed
        self._block = contextlib.ExitStack()
        self._loop: FrameType | None = None
        self._step = self._first = self._stride = 0

    def rows(self, step: int, first: int, number: int) -> torch.Tensor:
        """Which rows hide their images in an optimizer step.

        Args:
            step: Its number, from 0.
            first: The place of the first row in the global batch.
            number: How many rows.

        Returns:
            `(number,)`, bool.
        """
        if step < self.steps:
            return _all_rows(number)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        return torch.rand(first + number, generator=generator, device="cpu")[first:] < self.share

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_step()
        if self.steps or self.share:
            steerable_attentions(_learning_vlm(kwargs["model"]), "Hiding images")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_step()
        if state.global_step >= self.steps and not self.share:
            return
        rows_per_device = state.train_batch_size or args.train_batch_size
        self._step, self._loop = state.global_step, _training_loop()
        self._first, self._stride = args.process_index * rows_per_device, args.world_size * rows_per_device
        this = weakref.ref(self)  # the model must not keep what trains it

        def rows_of(batch_size: int) -> torch.Tensor | None:
            callback = this()
            return None if callback is None else callback._rows_of(batch_size)

        model = kwargs["model"]
        self._block.enter_context(images_hidden(_learning_vlm(model), rows_of, model))

    def _rows_of(self, batch_size: int) -> torch.Tensor | None:
        """Which rows of the present batch hide their images."""
        if not _is_running(self._loop):  # it ended with an error, of which callbacks are not told
            self._end_step()
            return None
        return self.rows(self._step, self._first, batch_size)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first += self._stride

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_step()

    def _end_step(self) -> None:
        self._block.close()
        self._loop = None


def _learning_vlm(model: nn.Module) -> VisionLanguageModel:
    """The parts of a model in which something can learn although images are hidden.

    Raises:
        ValueError: No PVM adapter is active.
    """
    for layer in model.modules():
        if isinstance(layer, PVMLayer) and layer.acting():
            return layer.vlm
    raise ValueError(
        "No PVM adapter is active on this model. Where text does not attend to the image, nothing else could bring "
        "it to the answer, so that nothing would be learned from it but to guess. Attach an adapter with PVMConfig, "
        "or activate it with set_adapter."
    )


class _Steering:
    """Keeps on a model what hides images, as long as a block or a forward that began in it still needs it.

    Layers that are checkpointed run once more in the backward pass, and that may come after the block.

    Args:
        vlm: The model's parts.
    """

    def __init__(self, vlm: VisionLanguageModel):
        attentions = steerable_attentions(vlm, "Hiding images")
        stack = contextlib.ExitStack()
        stack.enter_context(Tap.lent_to(vlm))
        for attention in attentions.values():
            stack.callback(SteeringHandle(attention).remove)
        for layer in layers_for_text(vlm):
            stack.callback(TextAlone(vlm, layer).remove)
        self.has_states = len(attentions) < len(vlm.layers)
        for layer_idx in set(range(len(vlm.layers))) - attentions.keys():
            mixer = unwrapped(vlm.block.token_mixer(vlm.layers[layer_idx]))
            hook = self._without_images(layer_idx)
            stack.callback(mixer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        weakref.finalize(self, _take_off, stack.close)

    def _without_images(self, layer_idx: int) -> Callable[..., tuple[tuple, dict[str, Any]] | None]:
        """A hook for modules that mix tokens by a state. It sets visual tokens to 0 in the rows that hide images."""
        this = weakref.ref(self)

        def zero(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            context: VisualContext | None = kwargs.get(CONTEXT)
            if context is None or context.hidden_rows is None or context.steering is not this():
                return None  # one of several blocks does it
            context.reached(layer_idx, dropped_keywords)
            if context.visual_mask is None:
                return None
            hidden = (context.visual_mask & context.hidden_rows.unsqueeze(1)).unsqueeze(2)
            if args:
                return (args[0].masked_fill(hidden, 0), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"].masked_fill(hidden, 0)}

        return zero


class _Garbage:
    """What only the garbage collector frees: when it next runs, and not now."""

    def __init__(self) -> None:
        self.itself = self


def _take_off(close: Callable[[], None]) -> None:
    """Take what hides images off the model. Not while Dynamo traces it: it would not find what it began with."""
    if torch.compiler.is_compiling():
        weakref.finalize(_Garbage(), _take_off, close)
    else:
        close()


@contextlib.contextmanager
def images_hidden(
    vlm: VisionLanguageModel, rows_of: RowsOf = _all_rows, model: nn.Module | None = None
) -> Iterator[None]:
    """Like `hidden_image`, without a check that anything can learn from it.

    Args:
        vlm: The model's parts.
        rows_of: Called at the start of each training forward with the size of its batch. It returns the rows that hide
            their images, or `None` if none does.
        model: What is called with labels, the model or a wrapper of it. The labels tell whether decoder layers and the
            head can leave out visual tokens. `None`: they compute them.
    """
    steering = _Steering(vlm)
    head = TextAloneAtHead(vlm)
    labels: dict[int, torch.Tensor | None] = {}  # of the forward that is beginning, by thread

    def note_labels(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        labels[this_thread()] = labels_of(kwargs)
        head.expect(None)

    def start_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = labels.pop(this_thread(), None)
        context: VisualContext | None = kwargs.get(CONTEXT)  # none where the last adapter has left in the meantime
        if context is None or not (vlm.model.training and torch.is_grad_enabled()):
            return
        context.check_keys()
        rows = rows_of(context.batch_size)
        if rows is None or context.memory.is_empty or not bool(rows.any()):
            return
        if steering.has_states and not (isinstance(context.past_length, int) and context.past_length == 0):
            raise NotImplementedError(
                "Layers of linear attention carry what they saw in a state, from which an image cannot be taken out "
                "again. To hide images, train without a KV cache (use_cache=False)."
            )
        context.hide_images(rows, steering)
        if needs_text_alone(vlm, context, given):
            context.leave_out_images()
            head.expect(context.text_alone)
        for layer_idx in range(len(vlm.layers)):
            context.await_layer(layer_idx, dropped_keywords)

    with contextlib.ExitStack() as hooks:
        hooks.callback(vlm.text_model.register_forward_pre_hook(start_forward, with_kwargs=True).remove)
        hooks.callback(head.remove)
        if model is not None:
            hooks.callback(model.register_forward_pre_hook(note_labels, with_kwargs=True).remove)
        yield


def _training_loop() -> FrameType | None:
    """The frame of the function that runs the training: it called the callback, or the handler of all callbacks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == trainer_callback.__name__:
        frame = frame.f_back
    return frame


def _is_running(loop: FrameType | None) -> bool:
    """Whether a function is still running: whether its frame is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not loop:
        frame = frame.f_back
    return frame is not None
