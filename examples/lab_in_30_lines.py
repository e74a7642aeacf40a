"""A model that forgets its image, an adapter that remembers it, and the test of both: some minutes on a CPU.

python examples/lab_in_30_lines.py
"""

from peft import PeftModel, get_peft_model

from peft_pvm import DIPEConfig, PVMConfig, attached
from peft_pvm.demo.recall import recall, transcription
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import Recipe, train_adapter


model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64))
model.print_trainable_parameters()
train_adapter(model, Recipe(steps=100, hidden_steps=400))
model.save_pretrained("my-pvm")

with_pvm = PeftModel.from_pretrained(load_tiny_vlm(), "my-pvm")
base = load_tiny_vlm()
print("digits told right after so many bytes of text: base, PVM, DIPE")
for length in (0, 256, 1024):
    shares = [recall(model, length, rows=8).value for model in (base, with_pvm)]
    with attached(base, DIPEConfig(max_distance=0)):
        shares.append(recall(base, length, rows=8).value)
    print(f"{length:5} " + " ".join(f"{share:.2f}" for share in shares))
print("and while it writes its mosaic out over and over, the image never repeated, in every fourth round: base, PVM")
for model in (base, with_pvm):
    print(" ".join(f"{round_.value:.2f}" for round_ in transcription(model, 9 * 28, rows=8)[::4]))
