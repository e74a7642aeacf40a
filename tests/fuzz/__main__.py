"""`python -m fuzz --folders 20000 --seed 0`, run in `tests/`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .harness import Harness, Report, say


def main() -> int:
    """Run as many folders as are asked for, and say what came of them."""
    parser = argparse.ArgumentParser(description="Load damaged adapter folders.")
    parser.add_argument("--folders", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0, help="Of the first folder.")
    parser.add_argument("--family", default="llava", help="Of the base model.")
    arguments = parser.parse_args()
    start = time.perf_counter()
    report = Report()
    with tempfile.TemporaryDirectory() as workplace:
        harness = Harness(Path(workplace), arguments.family)
        for first in range(arguments.seed, arguments.seed + arguments.folders, 500):
            known = len(report.faults)
            harness.run(min(500, arguments.seed + arguments.folders - first), first, report)
            seconds = time.perf_counter() - start
            print(f"up to seed {first + 499}: {len(report.faults)} faults, {seconds:.0f} s", flush=True)
            for fault in report.faults[known:]:
                print(fault, flush=True)
    say(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
