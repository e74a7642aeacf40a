"""Training with TRL: rewards, logs of how much the model looks and their picture, and checks of what cannot work.

The recipe is that of PVM, arXiv 2605.00814: supervised fine-tuning of only PVM, then GRPO with the language model.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..folders.adapter_file import PEFT_PREFIX
from ..folders.base_checkpoint import CONFIG, weight_files
from ..folders.data_file import holding, read_json
from ..folders.replacing import replacing
from ..folders.writing import write_adapter
from ..probe.observers import AttentionObserver, branches_observed, observed, undisturbed, visual_mask
from ..tokens.families import find_vlm
from ..tuners.active import base_of
from ..tuners.companions import trained_with
from ..tuners.saving import check_whole
from ..utils.plotting import as_png, line_look, new_figure, styled
from ..utils.wrapping import without_wrappers


FORMAT = re.compile(r"\s*<think>.*?</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
CHOICE = re.compile(r"\(?([A-Za-z])(?:\)|[.:]|$)")  # "B", "(B)", "B.", "B: a dog"
BOXED = re.compile(r"\\boxed\{(.*)\}", re.DOTALL)
STATE = "trainer_state.json"  # in a checkpoint of transformers' Trainer, and where `save_state` puts it
VISUAL_MASS = "gaze/visual_mass"  # the name of the share of attention that reaches visual tokens
BRANCH_KEY = re.compile(r"gaze/(?P<kind>gate|update)/(?P<adapter>[^/]+)/(?P<layer>\d+)")


def format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """1 for a completion that is `<think>...</think><answer>...</answer>` and nothing else, 0 for others.

    Args:
        completions: Texts, or chats of one message.
        kwargs: What else TRL gives to rewards.
    """
    return [float(FORMAT.fullmatch(_text(completion)) is not None) for completion in completions]


def accuracy_reward(completions: Sequence[Any], solution: Sequence[str], **kwargs: Any) -> list[float]:
    r"""1 for a completion whose answer is right, 0 for others.

    The answer is what comes between the last `<answer>` and `</answer>`, or all of a completion without them. Three
    rules are tried in this order, and the answer is right if one of them holds. It equals the solution, apart from
    letter case, white space, a final full stop, `$` and `\boxed{}`. Or the solution is one letter, and the answer
    begins with it as a choice, such as "(B) a dog" for "B". Or the solution is a number or formula, and math-verify
    finds the answer equal to it.

    Args:
        completions: Texts, or chats of one message.
        solution: The right answer of each.
        kwargs: What else TRL gives to rewards.
    """
    return [float(is_right(_answer(_text(text)), right)) for text, right in zip(completions, solution, strict=True)]


def is_right(answer: str, solution: str) -> bool:
    r"""Whether an answer is the solution, by the rule of `accuracy_reward`.

    Example:
        >>> is_right("0.50", r"$\frac{1}{2}$"), is_right("(B) a dog", "B"), is_right("A cat.", "a dog")
        (True, True, False)
    """
    plain, wanted = _normalised(answer), _normalised(solution)
    if plain == wanted:
        return True
    if len(wanted) == 1 and wanted.isalpha():
        choice = CHOICE.match(plain)
        return choice is not None and choice.group(1) == wanted
    from math_verify import parse, verify

    # Its time limits are signals, which only the main thread gets.
    limits = {} if threading.current_thread() is threading.main_thread() else {"parsing_timeout": None}
    gold, found = parse(solution, **limits), parse(answer, **limits)
    return bool(gold and found) and verify(gold, found, **({"timeout_seconds": None} if limits else {}))


class GazeCallback(TrainerCallback):
    """Logs how much the model looks at an image, and what PVM does, whenever the loss is logged: see `gaze`.

    The model runs once more for it, without gradients, over the same chat every time.

    Args:
        trainer: The trainer, which logs. Give it the callback with `trainer.add_callback`.
        inputs: The chat, as `chat_inputs` makes it.
    """

    def __init__(self, trainer: Trainer, inputs: Mapping[str, torch.Tensor]):
        self.trainer = trainer
        self.inputs = inputs

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" in (logs or {}):  # of a training step, not of an evaluation, nor our own
            # The base class's: TRL's adds its own averages once more.
            Trainer.log(self.trainer, gaze(self.trainer.model, self.inputs))


def last_answer(example: Mapping[str, Any]) -> dict[str, Any]:
    """A chat as prompt and completion, so that TRL trains only on the completion. For `datasets.Dataset.map`.

    Args:
        example: `messages`, of which the last is the assistant's.

    Raises:
        ValueError: The last message is not the assistant's.
    """
    *prompt, last = example["messages"]
    if not prompt or last["role"] != "assistant":
        raise ValueError(f"The chat does not end with an answer of the assistant: {example['messages']}.")
    return {"prompt": prompt, "completion": [last]}


def chat_inputs(processor: ProcessorMixin, data: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """What a model takes for the first row of a data set that has an image.

    Args:
        processor: The model's processor.
        data: Rows with `images` or one `image`, and `messages` or `prompt` (with `completion` or without).

    Raises:
        ValueError: No row has an image.
    """
    example = next((row for row in data if row.get("images") or row.get("image")), None)
    if example is None:
        raise ValueError("No row of the data set has an image (columns `images` or `image`): PVM would learn nothing.")
    images = example.get("images") or [example["image"]]
    from trl.data_utils import prepare_multimodal_messages

    messages = example.get("messages") or [*example["prompt"], *example.get("completion", [])]
    return processor.apply_chat_template(
        prepare_multimodal_messages(messages, images=images),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=messages[-1]["role"] != "assistant",
    )


@torch.no_grad()
def gaze(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How much a model looks at the image of one prompt or chat, and what PVM does there.

    Args:
        model: A vision-language model, with adapters or without.
        inputs: One row with visual tokens, as its processor gives it. They are moved to the model's device.

    Returns:
        "gaze/visual_mass": the share of attention that reaches visual tokens, mean over layers, heads and the tokens
        after the last visual one. For each PVM adapter and layer, "gaze/gate/<adapter>/<layer>" and
        "gaze/update/<adapter>/<layer>": the norm of what PVM adds, over that of the residual stream, mean over the
        same tokens.
    """
    vlm = find_vlm(base_of(model))
    device = next(vlm.model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    num_queries = int((~visual_mask(vlm, inputs)[0]).flip(0).cumprod(0).sum())
    observer = AttentionObserver(num_queries)
    with undisturbed(vlm), branches_observed(vlm.model, num_queries) as branches, observed(vlm, observer):
        # The model as it is given, not what it wraps: FSDP gathers weights where its outermost module is called.
        model(**{**inputs, "use_cache": False, "logits_to_keep": 1})
    masses = [masses.visual.mean() for masses in observer.masses.values()]
    values = {VISUAL_MASS: float(torch.stack(masses).mean())}
    for (adapter, layer_idx), trace in sorted(branches.items()):
        values[branch_key("gate", adapter, layer_idx)] = trace.gate
        values[branch_key("update", adapter, layer_idx)] = float(trace.relative_update.mean())
    return values


def shard_decoder_layers(trainer: Trainer) -> None:
    """Let FSDP shard the decoder layers one by one, and not the blocks of the vision tower. Call it before training.

    The weights of a module that is sharded by itself are gathered from all processes when the module runs. A process
    whose batch has no image does not run the vision tower, so with the default of transformers, which shards its
    blocks as well, the others would wait for it.

    Args:
        trainer: The trainer. Without FSDP, or with classes that its configuration names, nothing changes.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        layers = find_vlm(base_of(trainer.model)).layers
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})


def save_parts(trainer: Trainer, output_dir: str | os.PathLike) -> None:
    """Save each adapter of a trained model in a folder of its name, and the base in `base` if it learned.

    To be called on all processes. The adapters are on the model itself, not on a PeftModel around it.

    Args:
        trainer: The trainer of the model.
        output_dir: The folder to write to.

    Raises:
        ValueError: The model is a PeftModel, which saves itself.
    """
    if isinstance(trainer.model, PeftModel):
        raise ValueError("The model is a PeftModel, of which trainer.save_model() saves the adapter.")
    state_dict = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.accelerator.is_main_process:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with without_wrappers(model):
        _write_parts(model, state_dict, Path(output_dir), trainer.processing_class)


def _write_parts(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], folder: Path, processor: ProcessorMixin
) -> None:
    for name, config in model.peft_config.items():
        tensors = get_peft_model_state_dict(model, state_dict, adapter_name=name)
        in_file = {PEFT_PREFIX + key: tensor for key, tensor in tensors.items()}
        check_whole(model, name, in_file)
        write_adapter(folder / name, config, in_file, trained_with(model, name, state_dict))
    kinds: tuple[type[Any], ...] = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    of_adapters = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for key in module.state_dict()
    }
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if learned - of_adapters:
        base = {key: tensor for key, tensor in state_dict.items() if key not in of_adapters}
        with replacing(folder / "base", entry=CONFIG, outdated=weight_files) as staged:
            model.save_pretrained(staged, state_dict=base, save_original_format=True)
            processor.save_pretrained(staged)


def refuse_vllm(use_vllm: bool) -> None:
    """TRL generates with vLLM by merging adapters into the base, and PVM cannot be merged.

    Raises:
        ValueError: `use_vllm` is True.
    """
    if use_vllm:
        raise ValueError(
            "use_vllm=True merges the adapter into the base before every generation, and PVM computes something that "
            "no weight of the base can express. Set use_vllm=False: the trainer then generates with the model itself."
        )


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def _answer(text: str) -> str:
    _, tag, answer = text.rpartition("<answer>")
    return answer.partition("</answer>")[0] if tag else text


def _normalised(text: str) -> str:
    text = text.strip().strip("$").strip()
    boxed = BOXED.fullmatch(text)
    text = boxed.group(1) if boxed else text
    return " ".join(text.removesuffix(".").casefold().split())


def branch_key(kind: Literal["gate", "update"], adapter: str, layer_idx: int) -> str:
    """The name under which a number of one PVM adapter in one layer is logged, which `BRANCH_KEY` reads.

    Example:
        >>> branch_key("gate", "default", 10)
        'gaze/gate/default/10'
    """
    return f"gaze/{kind}/{adapter}/{layer_idx}"


def read_log(folder: str | os.PathLike) -> list[dict[str, float]]:
    """The numbers that a trainer logged.

    Args:
        folder: An output folder or a checkpoint of transformers' `Trainer`.

    Raises:
        FileNotFoundError: There is no `trainer_state.json`.
        ValueError: It is damaged.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {STATE} in {folder}. Give the output folder of a training, or one of its checkpoints."
        )
    state = read_json(path)
    with holding(path, "what a trainer logged"):
        return [
            {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
            for entry in state["log_history"]
        ]


@styled
def draw_curves(log: Sequence[Mapping[str, float]]) -> bytes:
    """Three panels over steps: loss, or the reward if there is one; gates; updates over the residual stream. A PNG.

    Args:
        log: What `read_log` returns.

    Raises:
        ValueError: It holds neither loss nor reward.
    """
    score = next((name for name in ("reward", "loss") if any(name in entry for entry in log)), None)
    if score is None:
        raise ValueError("The log holds neither a loss nor a reward: nothing was logged before it was saved.")
    figure, axes = new_figure(2.6, columns=3)
    panels = {score: axes[0][0], "gate": axes[0][1], "update": axes[0][2]}
    panels[score].plot(*_series(log, score), **line_look(0, 0.1))
    found = filter(None, map(BRANCH_KEY.fullmatch, {name for entry in log for name in entry}))
    logged = sorted((key["kind"], key["adapter"], int(key["layer"]), key[0]) for key in found)
    for kind, title in (("gate", "gate"), ("update", "update / residual stream")):
        of_kind = [key for key in logged if key[0] == kind]
        for number, (_, adapter, layer, name) in enumerate(of_kind):
            label = f"layer {layer}" if adapter in ("default", "pvm") else f"{adapter}, layer {layer}"
            panels[kind].plot(*_series(log, name), label=label, **line_look(number, 0.1))
        panels[kind].set_ylabel(title)
        if of_kind:
            panels[kind].legend()
    panels[score].set_ylabel(score)
    for panel in panels.values():
        panel.set_xlabel("step")
    return as_png(figure)


def _series(log: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    entries = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
    return [step for step, _ in entries], [value for _, value in entries]
