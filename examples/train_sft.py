"""Stage 1 of PVM's recipe: supervised fine-tuning of only PVM, on chats with images.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_sft.py --config examples/sft.yaml

The data set has `images` and `messages`, or `images`, `prompt` and `completion`. The loss is on the last answer; with
`--assistant_only_loss` on all of them. First come steps in which the image is hidden from attention, on the rows as
they are; then all rows, with text between image and question. What is saved is a PVM adapter.
`docs/how-to/train.md` has the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

import peft_pvm.demo.for_trainers  # noqa: F401  lets AutoProcessor load the lab's tiny model, which these scripts can train
from peft_pvm import PVMConfig
from peft_pvm.integrations.trl import GazeCallback, chat_inputs, last_answer, shard_decoder_layers
from peft_pvm.probe.layers import propose_layers
from peft_pvm.probe.rows import read_chats
from peft_pvm.training import HiddenImage, TextBetween, speed_up_gates
from peft_pvm.utils.distractors import read_paragraphs


@dataclass
class PVMArguments:
    """PVM's configuration and how it is trained; what is not here has its default."""

    r: int = field(default=512, metadata={"help": "Width of the branch."})
    layers: list[str] | None = field(
        default=None, metadata={"help": 'Decoder layers, or "auto"; by default the paper\'s stride.'}
    )
    memory_visibility: str = field(default="causal", metadata={"help": '"causal", or the paper\'s "sample".'})
    init_gate: float = field(default=1.0, metadata={"help": "What the gates start from; the paper's is 0."})
    faster_gates: float = field(default=1.0, metadata={"help": "The gates' learning rate over that of the rest."})
    hidden_steps: int = field(default=100, metadata={"help": "First steps, in which all images are hidden."})
    hidden_share: float = field(default=0.75, metadata={"help": "Share of later rows whose images are hidden."})
    max_text: int = field(default=0, metadata={"help": "Most tokens of text between image and question later on."})
    text_lengths: str = field(default="uniform", metadata={"help": 'How they are drawn: or "log-uniform".'})
    text_file: str | None = field(default=None, metadata={"help": "What they are from; by default Python's help."})


def chosen_layers(
    pvm: PVMArguments, model: ModelConfig, training: SFTConfig, processor: ProcessorMixin, data: datasets.Dataset
) -> str | list[int]:
    """Where PVM sits: for "auto", at and around the layer that looks at the image most, in eight rows."""
    if pvm.layers is None:
        return "strided"
    if "auto" not in pvm.layers:
        return [int(layer) for layer in pvm.layers]
    base = AutoModelForImageTextToText.from_pretrained(model.model_name_or_path, **training.model_init_kwargs)
    proposal = propose_layers(base, processor, read_chats(data, 8))
    print(proposal.reason)
    return proposal.layers


def in_order(data: datasets.Dataset, training: SFTConfig, pvm: PVMArguments, processor: ProcessorMixin):
    """The rows of the hidden steps, as they are, and then all rows, with text between image and question."""
    if training.train_sampling_strategy == "random":
        data = data.shuffle(training.seed)
    rows_per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    first = data.select([row % len(data) for row in range(pvm.hidden_steps * rows_per_step)])
    if pvm.max_text:
        between = TextBetween(processor, pvm.max_text, pvm.text_lengths, read_paragraphs(pvm.text_file), training.seed)
        data = between.put_into(data)
    training.train_sampling_strategy = "sequential"
    return datasets.concatenate_datasets([first, data])


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, PVMArguments))
    script, training, model, pvm = parser.parse_args_and_config(arguments)
    if script.dataset_name is None:
        raise SystemExit("Which data set? --dataset_name takes a folder or a Hub id.")
    processor = AutoProcessor.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    data = datasets.load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    if "messages" in data.column_names and not training.assistant_only_loss:
        data = data.map(last_answer, remove_columns="messages")
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
    }
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=in_order(data, training, pvm, processor),
        processing_class=processor,
        peft_config=PVMConfig(
            r=pvm.r,
            layers_to_transform=chosen_layers(pvm, model, training, processor, data),
            memory_visibility=pvm.memory_visibility,
            init_gate=pvm.init_gate,
        ),
        callbacks=[HiddenImage(pvm.hidden_steps, pvm.hidden_share, training.seed)],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL rounds them to bf16 on a quantised base: a gate of 1 would move by 0.008
            parameter.data = parameter.data.float()
    trainer.add_callback(GazeCallback(trainer, chat_inputs(processor, data)))
    shard_decoder_layers(trainer)
    speed_up_gates(trainer, pvm.faster_gates)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # no process leaves while another still saves
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
