"""What only this repository runs: the training of the tiny model and of all methods on it, tests of them, the report.

`python -m experiments COMMAND` runs it from the repository's root. The recorded results are in `experiments/results/`.
The package is not part of the wheel.
"""
