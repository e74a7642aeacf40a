"""Where does a model look while it answers, and what do adapters change? Writes a report to `probe_report/`.

python examples/probe_a_model.py                                      # the tiny model of the lab, offline
python examples/probe_a_model.py Qwen/Qwen3-VL-2B-Instruct photo.jpg "What is written on the sign?"
"""

import sys

import torch

from peft_pvm import DIPEConfig, TDRSConfig, attached
from peft_pvm.probe import build_inputs, probe


def tiny_model_and_inputs():
    """A mosaic of nine digits, which the model then writes out over and over."""
    from peft_pvm.demo.mosaic import make_transcriptions
    from peft_pvm.demo.tiny_vlm import load_tiny_vlm

    batch = make_transcriptions("test", 1, 0, written_cells=1, generator=torch.Generator().manual_seed(0))
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "logits_to_keep"}
    return load_tiny_vlm(), inputs, str


def model_and_inputs(model_id: str, image_path: str, prompt: str):
    """A model from the Hub, an image file and a prompt."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(model_id)
    inputs = build_inputs(processor, Image.open(image_path).convert("RGB"), prompt)
    return model, {name: tensor.to(model.device) for name, tensor in inputs.items()}, processor.tokenizer.decode


model, inputs, decode = model_and_inputs(*sys.argv[1:4]) if len(sys.argv) == 4 else tiny_model_and_inputs()
with attached(model, DIPEConfig(max_distance=0), TDRSConfig()):
    result = probe(model, inputs, decode=decode, max_new_tokens=128)
for forward in result.forwards:
    print(f"{forward.name}: {forward.mean_mass[0]:.3f} of attention on the image, decay {forward.mean_decay}")
print("Report:", result.save("probe_report"))
