"""Everything that writes a folder, as processes of its own that are killed or write at the same time.

`python tests/writers.py killed FOLDER TIMES WRITER...` prints what the folder held each time, as JSON by writer:
"old", "new", "nothing" or "a mixture". So does `racing` in the place of `killed`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from methods.pvm.test_checkpoints import GOLDEN, write_checkpoint
from methods_under_test import METHODS
from peft import PeftConfig
from safetensors.torch import load_file
from tiny_vlms import FAMILIES

from peft_pvm import convert_reference_checkpoint, export_reference_checkpoint
from peft_pvm.folders.base_checkpoint import BaseCheckpoint
from peft_pvm.folders.replacing import write_file
from peft_pvm.integrations.vllm import export_vllm
from peft_pvm.methods.pvm.checkpoints import merge_adapters


KINDS = {"old": 1, "new": 2}
VISIBILITY = {"old": "causal", "new": "sample"}  # so that a mixture of the two would load
Write, Read = Callable[[Path, str], None], Callable[[Path], object]


def adapters(folder: Path) -> tuple[Write, Read]:
    """`save_pretrained`. All weights of the old adapter are 1, all of the new one 2."""
    models = {}
    for kind, number in KINDS.items():
        models[kind] = METHODS["pvm"].attach(FAMILIES["llava"].build(), memory_visibility=VISIBILITY[kind])
        with torch.no_grad():
            for name, parameter in models[kind].named_parameters():
                if ".pvm_" in name:
                    parameter.fill_(number)
    return lambda out, kind: models[kind].save_pretrained(out), read_adapter


def merged(folder: Path) -> tuple[Write, Read]:
    """`peft-pvm merge`."""
    save, _ = adapters(folder)
    for kind in KINDS:
        save(folder / kind, kind)
    return lambda out, kind: merge_adapters([folder / kind] * 2, [0.5, 0.5], out, force=True), read_adapter  # type: ignore[return-value]


def bases(folder: Path) -> dict[str, Path]:
    """The authors' checkpoints, in one file and in three: their names overlap in no good way."""
    golden = load_file(GOLDEN)
    filled = {
        kind: {name: torch.full_like(tensor, number) for name, tensor in golden.items()}
        for kind, number in KINDS.items()
    }
    return {
        kind: write_checkpoint(filled[kind], folder / f"theirs-{kind}", shards)
        for kind, shards in {"old": 1, "new": 3}.items()
    }


def converted(folder: Path) -> tuple[Write, Read]:
    """`peft-pvm convert --with-base`, of which the base is read."""
    theirs = bases(folder)
    return lambda out, kind: convert_reference_checkpoint(theirs[kind], folder / "adapter", out), read_model  # type: ignore[return-value]


def exported(export: Callable[..., object]) -> Callable[[Path], tuple[Write, Read]]:
    """`peft-pvm export-reference` and `export-vllm`."""

    def prepare(folder: Path) -> tuple[Write, Read]:
        parts = {}
        for kind, theirs in bases(folder).items():
            parts[kind] = folder / f"adapter-{kind}", folder / f"base-{kind}"
            convert_reference_checkpoint(theirs, *parts[kind])
        return lambda out, kind: export(*parts[kind], out), read_model

    return prepare


def results(folder: Path) -> tuple[Write, Read]:
    """A file of JSON, as `peft-pvm eval-lengths` writes it."""
    text = {kind: json.dumps([number] * 1_000_000) for kind, number in KINDS.items()}
    write = lambda out, kind: write_file(out / "results.json", text[kind])  # noqa: E731
    return write, lambda out: set(json.loads((out / "results.json").read_text()))


def read_adapter(folder: Path) -> object:
    """Every number in it, and what the configuration says."""
    config = PeftConfig.from_pretrained(str(folder))
    numbers = {kind for kind, visibility in VISIBILITY.items() if config.memory_visibility == visibility}  # type: ignore[attr-defined]
    numbers = {KINDS[kind] for kind in numbers}
    return numbers | _numbers(load_file(folder / "adapter_model.safetensors"))


def read_model(folder: Path) -> object:
    """Every number in the weights that transformers would load: its order is `model.safetensors`, then the index."""
    with contextlib.suppress(FileNotFoundError):
        BaseCheckpoint(folder)  # as the next command would, which puts old files back
    if not (folder / "config.json").exists():
        raise FileNotFoundError(folder / "config.json")
    single = folder / "model.safetensors"
    if single.exists():
        return _numbers(load_file(single))
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name in set(weight_map.values()):
        found.update(load_file(folder / name))
    assert found.keys() == weight_map.keys()
    return _numbers(found)


def _numbers(tensors: dict[str, torch.Tensor]) -> set[float]:
    return {number for tensor in tensors.values() for number in tensor.unique().tolist()}


WRITERS: dict[str, Callable[[Path], tuple[Write, Read]]] = {
    "save_pretrained": adapters,
    "merge": merged,
    "convert": converted,
    "export-reference": exported(lambda adapter, base, out: export_reference_checkpoint(adapter, base, out)),
    "export-vllm": exported(lambda adapter, base, out: export_vllm(base, [adapter], out, accept_causal=True)),
    "json": results,
}


def found_in(folder: Path, read: Read) -> str:
    """Which of the two a folder holds."""
    try:
        numbers = read(folder)
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and "Can't find" not in str(error):
            raise
        return "nothing"
    kinds = [kind for kind, number in KINDS.items() if numbers == {number}]
    return kinds[0] if kinds else f"a mixture of {numbers}"


def forked(action: Callable[[], None]) -> int:
    """A process of its own that does something."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return process


def killed(write: Write, read: Read, folder: Path, times: int) -> list[str]:
    """Writes the new over the old and is killed, at moments spread over all of it."""
    write(folder, "old")
    start = time.perf_counter()
    os.waitpid(forked(lambda: write(folder, "new")), 0)
    duration = time.perf_counter() - start
    chance = random.Random(0)
    found = []
    for _ in range(times):
        write(folder, "old")
        (folder / "notes.txt").write_text("mine")
        process = forked(lambda: write(folder, "new"))
        time.sleep(chance.uniform(0, duration))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found.append(found_in(folder, read))
        assert (folder / "notes.txt").read_text() == "mine"
    write(folder, "old")
    assert not list(folder.glob(".*")), "what the dead left is gone"
    return found


def racing(write: Write, read: Read, folder: Path, times: int) -> list[str]:
    """Two processes write at the same time, one of them the old and one the new."""
    found = []
    for _ in range(times):
        waiting, start = os.pipe()

        def write_at_the_start(kind: str, waiting: int = waiting, start: int = start) -> None:
            os.close(start)
            os.read(waiting, 1)
            write(folder, kind)

        processes = [forked(lambda kind=kind: write_at_the_start(kind)) for kind in KINDS]  # type: ignore[misc]
        os.close(start)  # which both have been waiting for
        os.close(waiting)
        assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
        found.append(found_in(folder, read))
    assert not list(folder.glob(".*"))
    return found


if __name__ == "__main__":
    mode, top, times, *names = sys.argv[1:]
    torch.set_num_threads(1)
    test = {"killed": killed, "racing": racing}[mode]
    found = {}
    for name in names:
        folder = Path(top, name)
        folder.mkdir(parents=True)
        found[name] = test(*WRITERS[name](folder), folder / "out", int(times))
    print(json.dumps(found))
