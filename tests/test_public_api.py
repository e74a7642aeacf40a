"""What users can import and call today still can be, as tests/data/public_api.json holds it.

New names and new parameters may come. What `peft_pvm` exports stays. What else docs/api/ documents may move to another
module. Where it is renamed, removed or called in another way, a table below says so, with the reason.

`python tests/test_public_api.py --write` wrote the file with the code and the docs of commit 7a97acf. It keeps the
entries of modules that cannot be imported, so that an environment with other packages adds what the first lacks. A
failing test is no reason to write the file again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import environment  # noqa: F401  # its settings act before PEFT is imported
import pytest
from peft import PeftConfig
from reference import documented, names_out_of_reach

import peft_pvm


FILE = Path(__file__).parent / "data" / "public_api.json"
EXPECTED: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
# Exceptions, each with its reason. They are for documented names outside of `peft_pvm.__all__`, and for methods of
# exported classes, as "PVMModel.resolve".
STAGES = "what an adapter does to a layer is a stage of a kind"
ONE_CLASS = "a method that changes attention is one class"
RENAMED = {  # the new name, and why
    "Scoring": ("Positions", STAGES),
    "Weighing": ("Weights", STAGES),
    "Steering": ("LayerStages", STAGES),
    "SteeringConfig": ("AttentionMethod", ONE_CLASS),
    "SteeringLayer": ("AttentionMethodLayer", ONE_CLASS),
    "SteeringTuner": ("AttentionMethodTuner", ONE_CLASS),
    "ours_in": ("saved_in", "adapters of other packages get a card too, if they were trained together with others"),
}
REMOVED = {
    "steer": "SteeringHandle is a handle like that of a hook",
    "hide_image": "peft_pvm.training.hidden_image, for any model",
    "release": "SteeringHandle.remove",
    "names_by_row": "AdaptersByRow.names",
    "MemoryView": "it is PVM's own, in methods/pvm/branch.py",
    "fingerprint": "in experiments/, outside the package",
    "new_tiny_vlm": "in experiments/, outside the package",
    "train_base": "in experiments/, outside the package",
    "join_positions": "what is noted of tokens is put together by VisualContext",
}
CHANGED = {  # parameters
    "Checkpoint": "what a training writes to; the file is experiments.checkpoint.CheckpointFile",
    "VisualMemory": "it keeps what methods want of every token, and not positions alone",
    "dropped_keywords": "it names the layers",
    "register": "a configuration says its name itself, and its tuner can be made from it",
    **dict.fromkeys(("Scoring", "Weighing", "Steering", "SteeringLayer", "SteeringTuner"), STAGES),
    **dict.fromkeys(("ForwardRecord", "LayerAttention", "ProbeResult"), "probe makes it, of all that it found"),
    "VisionLanguageModel": "find_vlm makes it; its block is looked for when it is asked for",
}

Parameters = dict[str, dict[str, str]]


def shown(default: object) -> str:
    """A default as text that does not depend on the process, or on where the code is."""
    if inspect.isroutine(default):
        return "a function"
    if isinstance(default, (str, Path)) and Path(default).is_absolute():
        return Path(default).name
    if isinstance(default, (list, tuple)):
        return f"{type(default).__name__}({', '.join(map(shown, default))})"
    text = repr(default)
    return type(default).__qualname__ if " at 0x" in text else text


def parameters_of(call: Any) -> Parameters | None:
    """Parameters by name, each with "kind" and perhaps "default"; `None` for a constructor of another package."""
    skipped, factories = {"self", "cls"}, {}
    if inspect.isclass(call):
        constructors = [base for base in call.__mro__ if {"__init__", "__new__"} & vars(base).keys()]
        if not constructors[0].__module__.startswith("peft_pvm") or getattr(call, "_is_protocol", False):
            return None
        if dataclasses.is_dataclass(call):
            factories = {field.name: field.default_factory for field in dataclasses.fields(call)}
        if issubclass(call, PeftConfig):  # whose fields differ between versions of PEFT
            skipped |= {field.name for field in dataclasses.fields(PeftConfig)}
    found: Parameters = {}
    for name, parameter in inspect.signature(call).parameters.items():
        if name in skipped:
            continue
        found[name] = {"kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            factory = factories.get(name, dataclasses.MISSING)
            found[name]["default"] = shown(parameter.default if factory is dataclasses.MISSING else factory())
    return found


def methods_of(entry: object) -> dict[str, Parameters | None]:
    """The public methods that a class has from this package; `None` for an attribute that is computed."""
    found: dict[str, Parameters | None] = {}
    for base in reversed(entry.__mro__) if inspect.isclass(entry) else ():
        if base.__module__.startswith("peft_pvm"):
            for name, value in vars(base).items():
                function = getattr(value, "__func__", value)
                if name.startswith("_"):
                    continue
                if inspect.isfunction(function):
                    found[name] = parameters_of(function)
                elif isinstance(value, (property, functools.cached_property)):
                    found[name] = None
    return found


def public_api() -> dict[str, dict[str, Any]]:
    """What `peft_pvm` exports, with the methods of classes, and everything else that is documented, by name."""
    exported = {name: getattr(peft_pvm, name) for name in peft_pvm.__all__}
    top = {
        name: {"parameters": parameters_of(entry), "methods": methods_of(entry)} for name, entry in exported.items()
    }
    others: dict[str, Any] = {}
    for entry in documented():
        if not any(entry is known for known in exported.values()):
            others.setdefault(entry.__name__, []).append(parameters_of(entry))
    return {"exported": top, "documented": others}


@functools.cache
def present() -> dict[str, dict[str, Any]]:
    return public_api()


def faults(before: Parameters | None, now: Parameters | None) -> list[str]:
    """What a call that was written for the parameters before meets now."""
    if before is None:  # the constructor was another package's, or there is nothing to call
        return []
    if now is None:
        return ["it cannot be called with these parameters"]
    found = [f"{name} is gone" for name in before if name not in now]
    for name, parameter in now.items():
        if name in before and parameter != before[name]:
            found.append(f"{name} was {before[name]}, is {parameter}")
        if name not in before and "default" not in parameter and not parameter["kind"].startswith("VAR_"):
            found.append(f"{name} is new and has no default")
    places = [
        [name for name, parameter in parameters.items() if parameter["kind"].startswith("POSITIONAL")]
        for parameters in (before, now)
    ]
    if places[1][: len(places[0])] != places[0]:
        found.append(f"the order was {places[0]}, is {places[1]}")
    return found


@pytest.mark.parametrize("name", EXPECTED["exported"])
def test_an_exported_name_is_called_as_before(name: str):
    before, now = EXPECTED["exported"][name], present()["exported"].get(name)
    assert now is not None, f"peft_pvm.{name} is gone"
    assert faults(before["parameters"], now["parameters"]) == []
    for method, parameters in before["methods"].items():
        place = f"{name}.{method}"
        if place not in REMOVED:
            new = RENAMED[place][0] if place in RENAMED else method
            assert new in now["methods"], f"{place} is gone"
            assert place in CHANGED or faults(parameters, now["methods"][new]) == []


@pytest.mark.parametrize("name", EXPECTED["documented"])
def test_a_documented_name_is_called_as_before(name: str):
    if name in REMOVED:
        pytest.skip(REMOVED[name])
    new = RENAMED[name][0] if name in RENAMED else name
    if new in names_out_of_reach():
        pytest.skip("its module imports what is not installed")
    now = list(present()["documented"].get(new, []))
    if new in present()["exported"]:
        now.append(present()["exported"][new]["parameters"])
    assert now, f"docs/api/ documents no {new}"
    for before in EXPECTED["documented"][name]:
        found = [faults(before, candidate) for candidate in now]
        assert name in CHANGED or [] in found, f"{name}: {found}"


def test_every_exception_is_of_a_name_that_there_was():
    methods = {f"{name}.{method}" for name, entry in EXPECTED["exported"].items() for method in entry["methods"]}
    assert {*RENAMED, *REMOVED, *CHANGED} <= EXPECTED["documented"].keys() | methods


def test_each_way_to_break_a_call_is_seen():
    def before(a, b=1, *, c="x"): ...

    breaks = [
        lambda a, *, c="x": None,
        lambda a, b=2, *, c="x": None,
        lambda b=1, a=None, *, c="x": None,
        lambda a, b=1, *, c="x", d: None,
        lambda a, *, b=1, c="x": None,
        lambda a, new=2, b=1, *, c="x": None,
    ]
    assert all(faults(parameters_of(before), parameters_of(now)) for now in breaks)
    assert faults(parameters_of(before), parameters_of(lambda a, b=1, e=(), *, c="x", d=2, **kwargs: None)) == []


def write() -> None:
    """One name a line."""
    parts = []
    for part, names in public_api().items():
        merged = {**EXPECTED.get(part, {}), **names}
        lines = [f"  {json.dumps(name)}: {json.dumps(merged[name])}" for name in sorted(merged)]
        parts.append(f' "{part}": {{\n' + ",\n".join(lines) + "\n }")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="Write tests/data/public_api.json.")
    parser.parse_args()
    write()
