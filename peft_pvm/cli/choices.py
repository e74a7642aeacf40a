"""Accepted values and defaults of options that the library keeps beside code that imports torch and PEFT.

They are repeated here so that help and errors do not wait for these imports. A test compares them with the library's.
"""

from __future__ import annotations

from typing import Literal


DType = Literal["float32", "bfloat16", "float16"]
LoadedAs = Literal["auto", "float32", "bfloat16", "float16"]
Split = Literal["train", "validation", "test"]
Combination = Literal["linear", "ties", "dare_linear", "cat"]
Preset = Literal["tiny", "1b-random", "2b-random", "8b-random", "32b-random"]
GPU = Literal["h100", "a100", "4090"]

# What `peft-pvm compare` attaches, what `bench` measures, and what `scale` predicts.
UNTRAINED = (
    *("dipe", "t-drs", "vaf", "log-bias", "pai", "hgai", "cai", "var", "savaa", "sparc", "memvr", "vista", "m3id"),
    "vcd",
)
BENCHED = (
    *("base", "pvm", "pvm-naive", "dipe", "dipe-naive", "t-drs", "t-drs-naive", "vaf", "vaf-naive", "log-bias"),
    *("log-bias-naive", "pai", "pai-naive", "hgai", "hgai-naive", "cai", "cai-naive", "var", "var-naive", "savaa"),
    *("sparc", "memvr", "vista", "m3id", "vcd", "pvm+dipe", "pvm+dipe+t-drs"),
)
ALL = ("base", "pvm", *UNTRAINED)  # of those
PREDICTED = ("base", "pvm", "dipe", "t-drs", "vaf", "log-bias", "pai", "hgai", "cai", "var", "memvr")
BENCHED_BY_DEFAULT = ("pvm", "pvm-naive", "dipe", "t-drs")

LENGTHS = (0, 256, 1024, 4096)  # of text in `calibrate`
MAX_DISTANCES = (0, 32, 64, 128, 256, 512)
FARTHEST = 2**24  # a limit of DIPE at most
TAU = 20.0  # of VAR
