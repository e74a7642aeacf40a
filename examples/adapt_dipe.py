"""DIPE trained in: a LoRA learns under DIPE, on chats with images and little text.

    python examples/adapt_dipe.py --config examples/adapt_dipe.yaml --dataset_name DATA

The data set is as for `train_sft.py`. `output_dir` gets two adapters that belong together, `dipe/` and `lora/`, and
`peft_pvm.load_adapters(model, ["dipe-lora/dipe", "dipe-lora/lora"])` loads both. `docs/how-to/train.md` has the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import datasets
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import peft_pvm.demo.for_trainers  # noqa: F401  lets AutoProcessor load the lab's tiny model, which these scripts can train
from peft_pvm import DIPEConfig, add_adapters
from peft_pvm.integrations.trl import last_answer, shard_decoder_layers
from peft_pvm.tokens.families import find_vlm


@dataclass
class DIPEArguments:
    """DIPE's configuration; what is not here has its default."""

    max_distance: int = field(
        metadata={"help": "How far text moves on from its image; 0: not at all, as in the paper."}
    )


def build(model: ModelConfig, dipe: DIPEArguments) -> PeftModel:
    """The base with DIPE, and with a LoRA on its language model that learns.

    The LoRA is around the model with DIPE in it, so that a checkpoint of the trainer holds the two and not the base.
    """
    if model.load_in_4bit or model.load_in_8bit:
        raise SystemExit("A quantised base is only for examples/train_sft.py.")
    base = AutoModelForImageTextToText.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
    )
    lora = get_peft_config(model)
    if lora is None:
        raise SystemExit("DIPE has nothing that could learn: give --use_peft true, and what else the LoRA is to have.")
    lora.exclude_modules = rf"(?!{re.escape(find_vlm(base).text_model_name)}\.).*"  # not on the vision tower
    add_adapters(base, {"dipe": DIPEConfig(max_distance=dipe.max_distance)})
    return PeftModel(base, lora, adapter_name="lora")


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DIPEArguments))
    script, training, model, dipe = parser.parse_args_and_config(arguments)
    if script.dataset_name is None:
        raise SystemExit("Which data set? --dataset_name takes a folder or a Hub id.")
    processor = AutoProcessor.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    data = datasets.load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    if "messages" in data.column_names and not training.assistant_only_loss:
        data = data.map(last_answer, remove_columns="messages")
    set_seed(training.seed)  # for the first weights of the LoRA
    trainer = SFTTrainer(model=build(model, dipe), args=training, train_dataset=data, processing_class=processor)
    shard_decoder_layers(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # no process leaves while another still saves
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
