"""A process of `in_turns`: it measures the package that it finds, whichever version that is, and needs nothing else.

Its one argument is JSON: the arguments of `build_random` and of `Settings`. Each line of its input names a method, and
"prefill" or "decode". It answers each with a line of JSON: the seconds that this took.
"""

from __future__ import annotations

import json
import sys

import torch

from peft_pvm.bench.models import build_random

# Earlier versions have all three in one module, which imports them in later ones.
from peft_pvm.bench.run import Runner, Settings, seconds  # type: ignore[attr-defined]


@torch.no_grad()
def main() -> None:
    """Serve one `in_turns`."""
    about = json.loads(sys.argv[1])
    settings = Settings(**about["settings"])
    (context,) = settings.contexts
    model = build_random(about["preset"], about["layers"], getattr(torch, about["dtype"]))
    runners = {name: Runner(model, name, context, settings) for name in settings.methods}
    for line in sys.stdin:
        name, what = line.split()
        repeats = settings.new_tokens if what == "decode" else 1
        action = getattr(runners[name], what)
        times = [seconds(action, torch.device("cpu")) for _ in range(repeats)]
        print(json.dumps(sorted(times)[len(times) // 2]), flush=True)


if __name__ == "__main__":
    main()
