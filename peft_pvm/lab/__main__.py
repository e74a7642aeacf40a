"""`python -m peft_pvm.lab demo`, `readings` and `train-base`."""

from __future__ import annotations

import argparse
import time
import warnings

from .demo import run_demo
from .readings import compare_readings
from .tiny_vlm import SHIPPED, new_tiny_vlm, save_tiny_vlm
from .train import accuracy, train_base


def main() -> None:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m peft_pvm.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="train a PVM adapter on the shipped tiny model and show what each method changes"
    )
    demo.add_argument("--out", help="folder for the adapter; by default a temporary one")
    demo.add_argument("--steps", type=int, default=800, help="steps of the adapter's training")
    demo.add_argument("--hidden-share", type=float, default=0.5, help="share of them that hide the image")
    demo.add_argument("--questions", type=int, default=100, help="test questions for every length")
    demo.add_argument("--seed", type=int, default=0)
    readings = commands.add_parser("readings", help="test T-DRS on the tiny model under each reading of the paper")
    readings.add_argument("--questions", type=int, default=200, help="test questions for every length")
    readings.add_argument("--seed", type=int, default=0)
    base = commands.add_parser("train-base", help="train the tiny model again")
    base.add_argument("--out", default=SHIPPED, help="the file; by default the shipped one is overwritten")
    base.add_argument("--steps", type=int, default=1000)
    base.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # PEFT asks transformers for something by its old name; nobody who runs a demo can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if arguments.command == "demo":
        run_demo(arguments.out, arguments.steps, arguments.hidden_share, arguments.questions, arguments.seed)
        return
    if arguments.command == "readings":
        compare_readings(arguments.questions, arguments.seed)
        return
    start = time.perf_counter()
    model = new_tiny_vlm(arguments.seed)
    train_base(model, arguments.steps, seed=arguments.seed)
    save_tiny_vlm(model, arguments.out)
    print(f"Trained in {time.perf_counter() - start:.0f} s, saved to {arguments.out}.")
    for length in (0, 2048):
        result = accuracy(model, length)
        print(f"Accuracy after {length} bytes: {result.value:.3f} ± {result.standard_error:.3f}")


if __name__ == "__main__":
    main()
