"""Stage 1 of PVM's recipe: supervised fine-tuning of PVM alone, on chats with images.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_sft.py --config examples/sft.yaml

The data set has `images` and `messages`, or `images`, `prompt` and `completion`. The loss is on the last answer; with
`--assistant_only_loss` on all of them. What is saved is a PVM adapter. `docs/how-to/train.md` has the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
from transformers import AutoProcessor
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

import peft_pvm.demo.for_trainers  # noqa: F401  lets AutoProcessor load the lab's tiny model, which these scripts can train
from peft_pvm import PVMConfig
from peft_pvm.integrations.trl import GazeCallback, chat_inputs, last_answer, shard_decoder_layers


@dataclass
class PVMArguments:
    """PVM's configuration; what is not here has its default."""

    r: int = field(default=512, metadata={"help": "Width of the branch."})
    layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers; by default the paper's stride."})
    memory_visibility: str = field(default="causal", metadata={"help": '"causal", or the paper\'s "sample".'})


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
    }
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=data,
        processing_class=processor,
        peft_config=PVMConfig(
            r=pvm.r, layers_to_transform=pvm.layers or "strided", memory_visibility=pvm.memory_visibility
        ),
    )
    trainer.add_callback(GazeCallback(trainer, chat_inputs(processor, data)))
    shard_decoder_layers(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # no process leaves while another still saves
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
