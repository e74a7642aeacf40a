"""Evaluate adapters with VLMEvalKit (github.com/open-compass/VLMEvalKit), which has no hook for models from elsewhere.

python examples/vlmevalkit.py --kit ../VLMEvalKit --model Qwen3-VL-8B-Instruct --adapter my-pvm \\
    --data MMStar --work-dir outputs

`--kit` is a checkout in which VLMEvalKit is installed, `--model` one of its own names, of a class that keeps a model
of transformers as `.model`. Names that it would serve with vLLM run on transformers. Several `--adapter` act together.
All other options go to its `run.py`, which sees a model of the name `Qwen3-VL-8B-Instruct+my-pvm`.
"""

import argparse
import runpy
import sys
from pathlib import Path

from peft_pvm import load_adapters
from peft_pvm.tuners.names import adapter_names


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--kit", type=Path, required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--adapter", action="append", required=True)
arguments, others = parser.parse_known_args()

script = arguments.kit / "run.py"
if not script.is_file():
    sys.exit(f"There is no {script}: --kit is a checkout of VLMEvalKit.")
sys.path.insert(0, str(arguments.kit.resolve()))
from vlmeval.config import supported_VLM  # noqa: E402


if arguments.model not in supported_VLM:
    sys.exit(f"VLMEvalKit has no model {arguments.model!r}: `vlmutil mlist all` shows its names.")
build = supported_VLM[arguments.model]


def build_with_adapters(**kwargs):
    """VLMEvalKit's own model, with the adapters attached in place."""
    if "use_vllm" in {**getattr(build, "keywords", {}), **kwargs}:
        kwargs["use_vllm"] = False
    wrapper = build(**kwargs)
    model = getattr(wrapper, "model", None)
    if not hasattr(model, "load_adapter"):
        sys.exit(f"{type(wrapper).__name__} keeps no model of transformers as .model: there is nothing to attach to.")
    load_adapters(model, arguments.adapter)
    return wrapper


name = "+".join([arguments.model, *adapter_names(arguments.adapter)])
supported_VLM[name] = build_with_adapters
sys.argv = [str(script), "--model", name, *others]
runpy.run_path(str(script), run_name="__main__")
