"""Stage 2 of PVM's recipe: GRPO with PVM and the language model, the vision tower and its projector frozen.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_grpo.py --config examples/grpo.yaml

The data set has `images`, `prompt` and `solution`. With `--use_peft` the language model learns by a LoRA, else all of
it learns. `output_dir` gets the PVM adapter (`pvm/`) and what it belongs to: the LoRA (`lora/`) or the base (`base/`).
`docs/how-to/train.md` has the rest.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import datasets
from peft import inject_adapter_in_model, set_peft_model_state_dict
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, set_seed
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

import peft_pvm.demo.for_trainers  # noqa: F401  lets AutoProcessor load the lab's tiny model, which these scripts can train
from peft_pvm.integrations.trl import (
    GazeCallback,
    accuracy_reward,
    chat_inputs,
    format_reward,
    refuse_vllm,
    save_parts,
    shard_decoder_layers,
)
from peft_pvm.methods.pvm.checkpoints import read_adapter
from peft_pvm.tokens.families import find_vlm


@dataclass
class StageArguments:
    """What stage 2 starts from."""

    adapter: str = field(metadata={"help": "The PVM adapter of stage 1: a folder or a Hub id."})
    system_prompt: str | None = field(default=None, metadata={"help": "Put before every prompt."})


def build(model: ModelConfig, adapter: str) -> PreTrainedModel:
    """The base with PVM, and with a LoRA if asked for, all that is to be learned ready to learn.

    The adapters are injected rather than wrapped, so that the trainer's checkpoints hold everything that learns.
    """
    if model.load_in_4bit or model.load_in_8bit:
        raise SystemExit("A quantised base is only for examples/train_sft.py.")
    base = AutoModelForImageTextToText.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
    )
    config, weights = read_adapter(adapter)
    config.inference_mode = False
    inject_adapter_in_model(config, base, "pvm")
    set_peft_model_state_dict(base, weights, "pvm")
    vlm = find_vlm(base)
    lora = get_peft_config(model)
    if lora is not None:  # only on the language model: not on a vision tower that has such layers too, nor on PVM
        lora.exclude_modules = rf"(?!{re.escape(vlm.text_model_name)}\.).*|.*\.pvm\..*"
        inject_adapter_in_model(lora, base, "lora")
    language_model = {*vlm.text_model.parameters(), *base.get_output_embeddings().parameters()}
    for name, parameter in base.named_parameters():
        of_lora = ".lora_" in name or ".modules_to_save." in name
        parameter.requires_grad = ".pvm_" in name or (of_lora if lora is not None else parameter in language_model)
    base.enable_input_require_grads()
    # A checkpoint goes back in by the names that the model has now; by default it would be saved under older ones.
    base.save_pretrained = functools.partial(base.save_pretrained, save_original_format=False)
    return base


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, StageArguments))
    script, training, model, stage = parser.parse_args_and_config(arguments)
    refuse_vllm(training.use_vllm)
    if script.dataset_name is None:
        raise SystemExit("Which data set? --dataset_name takes a folder or a Hub id.")
    processor = AutoProcessor.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, padding_side="left"
    )
    data = datasets.load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    if stage.system_prompt is not None:
        system = {"role": "system", "content": stage.system_prompt}
        data = data.map(lambda example: {"prompt": [system, *example["prompt"]]})
    set_seed(training.seed)  # for the first weights of a LoRA
    trainer = GRPOTrainer(
        model=build(model, stage.adapter),
        reward_funcs=[format_reward, accuracy_reward],
        args=training,
        train_dataset=data,
        processing_class=processor,
    )
    trainer.add_callback(GazeCallback(trainer, chat_inputs(processor, data)))
    shard_decoder_layers(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    save_parts(trainer, training.output_dir)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # no process leaves while another still saves
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
