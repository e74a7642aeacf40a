"""What training with TRL takes from us: rewards, what is logged, what is refused."""

from __future__ import annotations

from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
import yaml
from methods_under_test import give_weight
from peft import LoraConfig, get_peft_model
from training_runs import EXAMPLES, run, script

from peft_pvm import DIPEConfig, PVMConfig, attached
from peft_pvm.demo.for_trainers import make_chats, tiny_vlm_processor
from peft_pvm.demo.mosaic import IMAGE
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.integrations.trl import (
    accuracy_reward,
    chat_inputs,
    format_reward,
    gaze,
    is_right,
    last_answer,
    refuse_vllm,
)
from peft_pvm.probe import probe


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>so</think><answer>7</answer>", 1),
        ("<think>so\nand so</think>\n<answer>7</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer>7</answer>", 0),
        ("<think>so</think>7", 0),
        ("Well: <think>so</think><answer>7</answer>", 0),
        ("<think>so</think><answer>7</answer> I hope", 0),
        ("<answer>7</answer><think>so</think>", 0),
    ],
)
def test_format(text: str, reward: float):
    assert format_reward([text, [{"role": "assistant", "content": text}]]) == [reward, reward]


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("A dog.", "a  dog", True),
        ("a dog", "a cat", False),
        ("(B) a dog", "B", True),
        ("b", "B", True),
        ("B: 12", "B", True),
        ("Because of A", "B", False),
        ("Bdog", "B", False),
        ("C", "B", False),
        ("0.5", r"\frac{1}{2}", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"$\boxed{a dog}$", "A dog", True),
        ("2,000", "2000", True),
        ("The answer is 12", "12", True),
        ("13", "12", False),
        ("", "12", False),
        ("nothing", "12", False),
        ("[digit 7]", "[digit 7]", True),
        ("[digit 8]", "[digit 7]", False),
    ],
)
def test_what_is_right(answer: str, solution: str, right: bool):
    assert is_right(answer, solution) is right
    in_tags = f"<think>It is {solution}.</think><answer>{answer}</answer>"
    assert accuracy_reward([in_tags, answer], [solution, solution]) == [right, right]


def test_only_the_last_answer_counts():
    assert accuracy_reward(["<answer>7</answer> or <answer>8</answer>"] * 2, ["7", "8"]) == [0, 1]


def test_lengths_must_fit():
    with pytest.raises(ValueError, match="zip"):
        accuracy_reward(["7", "8"], ["7"])


def test_last_answer():
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert last_answer({"messages": chat}) == {"prompt": chat[:2], "completion": chat[2:]}
    for wrong in (chat[:2], chat[2:]):
        with pytest.raises(ValueError, match="does not end with an answer"):
            last_answer({"messages": wrong})


def test_vllm_is_refused():
    refuse_vllm(False)
    with pytest.raises(ValueError, match="use_vllm=False"):
        refuse_vllm(True)


def test_the_grpo_script_refuses_vllm_before_it_loads_anything(material: SimpleNamespace, tmp_path):
    with pytest.raises(ValueError, match="no weight of the base can express"):
        run("grpo", material, adapter="nowhere", output_dir=tmp_path, use_vllm=True)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_data_set_must_be_named(stage: str):
    line = ["--config", str(EXAMPLES / f"{stage}.yaml"), "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(SystemExit, match="--dataset_name takes a folder"):
        script(stage).main(line)


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_rows_of_several_samples_are_refused(material: SimpleNamespace, option: str, tmp_path):
    """By TRL, for images. Where they reach a model all the same, it refuses: tests/test_generation.py."""
    with pytest.raises(ValueError, match="supported for vision datasets"):
        run("sft", material, output_dir=tmp_path, max_steps=1, **{option: True})


@pytest.fixture
def chat() -> dict[str, torch.Tensor]:
    return chat_inputs(tiny_vlm_processor(), make_chats("messages", 1, 64))


def test_gaze_is_what_the_probe_sees(chat: dict[str, torch.Tensor]):
    """With a prompt that ends after its image: there, the probe looks at the same tokens as long as it generates."""
    model = get_peft_model(load_tiny_vlm(), PVMConfig(r=32, layers_to_transform=[1, 4]))
    give_weight(model)
    end = int((chat["input_ids"][0] == IMAGE).nonzero().max()) + 2
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    prompt = {name: tensor[:, :end] if name in per_token else tensor for name, tensor in chat.items()}
    seen = probe(model, prompt, max_new_tokens=4)
    answer = torch.tensor([seen.token_ids[:-1]])
    for name, more in zip(per_token, (answer, torch.ones_like(answer), torch.zeros_like(answer))):
        prompt[name] = torch.cat([prompt[name], more], 1)
    found = gaze(model, prompt)
    masses = [mass for layer in seen.forwards[1].attention for mass in layer.visual_mass]
    expected = {"gaze/visual_mass": fmean(masses)}
    for branch in seen.branches:
        assert max(branch.relative_update) > 1.1 * min(branch.relative_update)
        expected[f"gaze/gate/default/{branch.layer_idx}"] = branch.gate
        expected[f"gaze/update/default/{branch.layer_idx}"] = fmean(branch.relative_update)
    assert found == pytest.approx(expected, rel=1e-4)


def test_gaze_leaves_the_model_as_it_was(chat: dict[str, torch.Tensor]):
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(load_tiny_vlm(), lora).train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = gaze(model, chat)["gaze/visual_mass"]
    assert model.training
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with attached(model, DIPEConfig(max_distance=0)):
        assert gaze(model, chat)["gaze/visual_mass"] != before
    assert gaze(model, chat)["gaze/visual_mass"] == before
    with model.disable_adapter():
        assert gaze(model, chat) == gaze(load_tiny_vlm(), chat)


@pytest.mark.parametrize("name", ["sft_paper", "grpo"])
def test_the_papers_recipe(name: str):
    """What arXiv 2605.00814 says of its two stages."""
    recipe = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    expected = {
        "sft_paper": {
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "bf16": True,
            "r": 512,
        },
        "grpo": {
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "num_generations": 8,
            "max_completion_length": 16384,
            "temperature": 1.0,
            "reward_weights": [0.1, 0.9],
            "mask_truncated_completions": True,
        },
    }[name]
    assert {key: recipe[key] for key in expected} == expected
    if name == "sft_paper":
        processes = yaml.safe_load((EXAMPLES / "accelerate" / "fsdp2.yaml").read_text())["num_processes"]
        assert processes * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 64


def test_the_first_row_with_an_image(chat: dict[str, torch.Tensor]):
    row = make_chats("messages", 1, 64)[0]
    bare = {"images": [], "messages": row["messages"]}
    single = chat_inputs(tiny_vlm_processor(), [bare, {"image": row["images"][0], "messages": row["messages"]}])
    assert all(torch.equal(single[name], chat[name]) for name in chat)
    with pytest.raises(ValueError, match="No row of the data set has an image"):
        chat_inputs(tiny_vlm_processor(), [bare])
