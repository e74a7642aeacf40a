"""Where does a model look while it answers, and what do adapters change? Writes a report to `probe_report/`.

python examples/probe_a_model.py                                      # the tiny model of the lab, offline
python examples/probe_a_model.py Qwen/Qwen3-VL-2B-Instruct photo.jpg "What is written on the sign?"
"""

import sys

from peft_pvm import DIPEConfig, TDRSConfig, attached
from peft_pvm.probe import build_inputs, picture_of, probe, verdict


def load(model_id: str, image_path: str, prompt: str):
    """A model from the Hub, its processor, an image and a prompt."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto", device_map="auto")
    return model, AutoProcessor.from_pretrained(model_id), Image.open(image_path).convert("RGB"), prompt


def load_tiny():
    """The tiny model, and a mosaic of nine digits, which it then writes out over and over."""
    from peft_pvm.demo.cells import ask_in_tokens
    from peft_pvm.demo.for_trainers import tiny_vlm_processor
    from peft_pvm.demo.tiny_vlm import load_tiny_vlm

    question = ask_in_tokens(transcription=True, rows=1, seed=0)[0]
    return load_tiny_vlm(), tiny_vlm_processor(), question.image, question.question


model, processor, image, prompt = load(*sys.argv[1:4]) if len(sys.argv) == 4 else load_tiny()
inputs = {name: tensor.to(model.device) for name, tensor in build_inputs(processor, image, prompt).items()}
with attached(model, DIPEConfig(max_distance=0), TDRSConfig()):
    result = probe(
        model,
        inputs,
        prompt=prompt,
        decode=processor.tokenizer.decode,
        images=[picture_of(processor, image)],
        max_new_tokens=128,
    )
print(*verdict(result), sep="\n")
print("Report:", result.save("probe_report"))
