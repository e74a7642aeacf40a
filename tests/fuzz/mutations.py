"""What may be wrong with the folder of a saved adapter: changes of a folder in place, by a seeded generator."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file


WEIGHTS, CONFIG, RESULTS = "adapter_model.safetensors", "adapter_config.json", "results.json"
Mutation = Callable[[Path, Random], None]
MUTATIONS: dict[str, Mutation] = {}

NAMES = (
    "",
    ".",
    "default",
    "pvm",
    "lm_head",
    "q_proj",
    "self_attn.q_proj",
    "language_model",
    "layers.1",
    "model.language_model.norm",
    "\x1b[2J\x1b[31m",
    "\u202eabc",
    "a\nb",
    "中文",
    "\ud800",
    "<script>alert(1)</script>",
    "[/x]",
    "| a | `b` |",
    "../../etc",
    "a" * 100_000,
    "PVM",
    "LORA",
    "strided",
    "sample",
    "9" * 5_000,
)
NUMBERS = (0, -1, 1, 3, 32, 2**20, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e-300, 1e5, 1e29, 1e39, 1e308)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I8", "U16", "BOOL", "C64", "X")


def mutation(change: Mutation) -> Mutation:
    """Add a mutation to the table, by its name."""
    MUTATIONS[change.__name__] = change
    return change


def any_json(random: Random, depth: int = 0) -> Any:
    """A JSON value of any type and size."""
    kind = random.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return random.choice((None, True, False))
    if kind == 1:
        return random.choice((float("nan"), float("inf"), -float("inf")))
    if kind in (2, 3):
        return random.choice(NUMBERS)
    if kind in (4, 5):
        return random.choice(NAMES)
    if kind == 6:
        return [any_json(random, depth + 1) for _ in range(random.randrange(5))]
    if kind == 7:
        return {random.choice(NAMES)[:50]: any_json(random, depth + 1) for _ in range(random.randrange(4))}
    return [random.choice((0, 1, "pvm", None, {}))] * random.choice((10, 1_000, 100_000))


def nested(depth: int, brackets: str = "[]") -> str:
    """JSON of lists in lists."""
    return brackets[0] * depth + brackets[1] * depth


def is_small(path: Path) -> bool:
    """Whether this is a file, and not one that an earlier mutation made huge."""
    return path.is_file() and path.stat().st_size < 2**26


def read_config(folder: Path) -> dict[str, Any]:
    """What the configuration holds; nothing, where an earlier mutation left no object."""
    try:
        content = json.loads((folder / CONFIG).read_text()) if is_small(folder / CONFIG) else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_config(folder: Path, content: Any) -> None:
    """Write a configuration, unless an earlier mutation put something else into its place."""
    if (folder / CONFIG).is_file():
        (folder / CONFIG).write_text(content if isinstance(content, str) else json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a file that can still be read."""
    if not is_small(folder / WEIGHTS):
        return
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception:  # an earlier mutation has damaged it: that is enough
        return
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a file whose header can still be read."""
    if not is_small(folder / WEIGHTS):
        return
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        change(header)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        return
    written = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])


# ---- bytes


@mutation
def change_bytes(folder: Path, random: Random) -> None:
    path = folder / random.choice((CONFIG, WEIGHTS))
    if not is_small(path):
        return
    content = bytearray(path.read_bytes())
    # Mostly in the header of the weights, where most can go wrong.
    reach = len(content) if path.name == CONFIG else min(len(content), 72 + int.from_bytes(content[:8], "little"))
    for _ in range(random.randint(1, 4)):
        if not content:
            break
        position = random.randrange(max(1, min(reach, len(content))))
        match random.randrange(4):
            case 0:
                content[position] = random.randrange(256)
            case 1:
                content[position] ^= 1 << random.randrange(8)
            case 2:
                content[position:position] = random.randbytes(random.randint(1, 16))
            case 3:
                del content[position : position + random.randint(1, 32)]
    path.write_bytes(bytes(content))


@mutation
def truncate(folder: Path, random: Random) -> None:
    path = folder / random.choice((CONFIG, WEIGHTS))
    if is_small(path):
        content = path.read_bytes()
        path.write_bytes(content[: random.choice((0, 1, 7, 8, 9, random.randrange(len(content) + 1)))])


@mutation
def append(folder: Path, random: Random) -> None:
    path = folder / random.choice((CONFIG, WEIGHTS))
    if is_small(path):
        path.write_bytes(path.read_bytes() + random.choice((b"\0", b"{}", b" ", random.randbytes(1_000))))


# ---- the header of the weights


@mutation
def lie_in_the_header(folder: Path, random: Random) -> None:
    def change(header: dict[str, Any]) -> None:
        key = random.choice(sorted(header))
        match random.randrange(7):
            case 0:
                del header[key]
            case 1:
                header[random.choice(NAMES)] = header.pop(key)
            case 2:
                header[key]["dtype"] = random.choice(DTYPES)
            case 3:
                header[key]["shape"] = random.choice(
                    ([], [0], [-1], [2**40, 2**40], [2**62, 2**62, 0], [1] * 1_000, header[key]["shape"][::-1], [1.5])
                )
            case 4:
                header[key]["data_offsets"] = random.choice(([0, 0], [-1, 5], [5, 1], [0, 2**62], [0, 2**64], [1], []))
            case 5:
                header[key] = any_json(random)
            case 6:
                header["__metadata__"] = any_json(random)

    edit_header(folder, change)


@mutation
def length_of_the_header(folder: Path, random: Random) -> None:
    if is_small(folder / WEIGHTS):
        content = (folder / WEIGHTS).read_bytes()
        length = random.choice((0, 1, 100, 2**20, 2**27, 2**40, 2**63, 2**64 - 1, len(content), len(content) - 8))
        (folder / WEIGHTS).write_bytes(max(0, length).to_bytes(8, "little") + content[8:])


@mutation
def a_sparse_file(folder: Path, random: Random) -> None:
    size = random.choice((2**20, 2**30, 2**36))
    key = random.choice(("stray", "base_model.model.model.language_model.layers.1.pvm.pvm_q_proj.weight"))
    header = json.dumps({key: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    if (folder / WEIGHTS).is_file():
        with open(folder / WEIGHTS, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)


@mutation
def many_tensors(folder: Path, random: Random) -> None:
    count = random.choice((1_000, 5_000, 20_000))
    edit_header(
        folder,
        lambda header: header.update(
            {f"stray.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
        ),
    )


# ---- tensors


@mutation
def names_of_tensors(folder: Path, random: Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        keys = sorted(tensors)
        if not keys:
            tensors[random.choice(NAMES)[:200].replace("\ud800", "")] = torch.zeros(2)
            return
        key = random.choice(keys)
        tensor = tensors.pop(key)
        new = random.choice(
            (
                None,
                key.replace(".pvm.", ".pvm.default."),
                key.replace(".weight", ".default.weight"),
                key.replace("base_model.model.", ""),
                key.replace("model.language_model", "language_model.model"),
                key.replace("layers.1", "layers.0"),
                f"base_model.model.{key}",
                key.replace(".pvm_", ".lora_"),
                key.upper(),
                random.choice(NAMES)[:200].replace("\ud800", ""),
                random.choice(keys),
            )
        )
        if new is not None:
            tensors[new] = tensor

    edit_tensors(folder, change)


@mutation
def shapes_of_tensors(folder: Path, random: Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tensors:
            key = random.choice(sorted(tensors))
            tensor = torch.atleast_1d(tensors[key])
            turned = tensor.mT if tensor.dim() > 1 else tensor
            flat = tensor.flatten()
            tensors[key] = random.choice((turned, tensor[None], tensor[:0], tensor[:-1], flat, flat[:1].squeeze()))

    edit_tensors(folder, change)


@mutation
def dtypes_of_tensors(folder: Path, random: Random) -> None:
    dtype = random.choice(
        (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)
    )

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in random.sample(sorted(tensors), min(len(tensors), random.choice((1, 5, 1_000)))):
            tensors[key] = tensors[key].to(dtype)

    edit_tensors(folder, change)


@mutation
def numbers_in_tensors(folder: Path, random: Random) -> None:
    value = random.choice((torch.nan, torch.inf, -torch.inf, 3e38, -1e30, 65_536, 65_504, -65_504, 1e4, 1e-45, 0.0))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        floating = sorted(key for key, tensor in tensors.items() if tensor.is_floating_point())
        if floating:
            tensor = tensors[random.choice(floating)].view(-1)
            if random.random() < 0.5:
                tensor.copy_(torch.tensor(value))  # which takes what a narrow dtype cannot hold
            elif len(tensor):
                tensor[random.randrange(len(tensor))].copy_(torch.tensor(value))

    edit_tensors(folder, change)


@mutation
def tensors_of_the_base(folder: Path, random: Random) -> None:
    """`base.safetensors` is put beside the folder by the harness."""
    base = load_file(folder.parent / "base.safetensors")
    keys = random.sample(sorted(base), random.choice((1, 3, len(base))))
    prefix = random.choice(("base_model.model.", "", "base_model.", "base_model.model.model."))
    infix = random.choice(("", "", "", "original_module.", "modules_to_save.default.", "base_layer."))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in keys:
            owner, _, leaf = key.rpartition(".")
            tensors[f"{prefix}{owner}.{infix}{leaf}"] = base[key] + 1

    edit_tensors(folder, change)


@mutation
def a_note_of_companions(folder: Path, random: Random) -> None:
    """What the file says of the adapters that this one was trained together with."""
    if not is_small(folder / WEIGHTS):
        return
    companion = {"name": random.choice(NAMES), "method": random.choice(("DIPE", "PVM", "LORA", "x" * 10**6))}
    companion |= {"fields": any_json(random), "weights": random.choice((None, "0" * 16, 3))}
    note = random.choice((json.dumps([companion]), json.dumps(any_json(random)), nested(100_000), "{"))
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "trained_with": note})


# ---- the configuration


@mutation
def a_field(folder: Path, random: Random) -> None:
    content = read_config(folder)
    for _ in range(random.choice((1, 1, 3))):
        name = random.choice((*sorted(content), "runtime_config", "unknown", random.choice(NAMES)[:60]))
        content[name] = any_json(random)
    write_config(folder, content)


@mutation
def a_field_within_its_type(folder: Path, random: Random) -> None:
    content = read_config(folder)
    fields: dict[str, tuple] = {
        "r": (16, 32, 48, 24, 64, 2**20),
        "layers_to_transform": (
            [0],
            [1],
            [0, 1, 2],
            [7],
            [4095],
            "strided",
            1,
            list(range(4_000)),
            list(range(10**6)),
        ),
        "mlp_ratio": (0.01, 1, 2.0, 6e4, 1e308),
        "init_gate": (0.5, 1e29, 65_504),
        "memory_visibility": ("sample", "causal", "all"),
        "memory_source": ("hidden_states", "embeddings"),
        "inference_mode": (True, False, "no"),
        "modules_to_save": (
            ["lm_head"],
            ["pvm"],
            ["q_proj"],
            ["norm"],
            ["layers.1"],
            [""],
            [],
            ["default"],
            ["x"] * 1_000,
        ),
        "branches": ([], [{}], [{}] * 1_000, content.get("branches"), [content.get("branches")]),
        "sd_strength": (0, 1, 65_504, 1e39),
        "dc_strength": (0, 1, 65_504, 1e39),
        "form": ("logits", "weights"),
        "dc_floor": (0.5, "3*min", "0.0*min", f"{'9' * 400}*min", "٣*min"),
        "pairs": ("all", "inter"),
        "kernel": ("auto", "blockwise"),  # "triton" needs a GPU, and says so in the forward
        "lineage": (None, "0" * 16, "x", "0" * 10**6),
        "base_model_name_or_path": (None, "a/b", "/etc/passwd", "x" * 10**6),
        "task_type": (None, "CAUSAL_LM", "SEQ_CLS", "t" * 10**6),
        "init_weights": (True, False),
        "format_version": ("1", "2", 1),
    }
    name = random.choice(sorted(fields.keys() & content.keys()) or ["r"])
    content[name] = random.choice(fields[name])
    if isinstance(content.get("branches"), list) and random.random() < 0.5:
        branch = random.choice(content["branches"] or [{}])
        if isinstance(branch, dict):
            branch[random.choice(("r", "layers_to_transform", "mlp_ratio", "memory_source", "x"))] = any_json(random)
    write_config(folder, content)


@mutation
def drop_fields(folder: Path, random: Random) -> None:
    content = read_config(folder)
    for name in random.sample(sorted(content), min(len(content), random.choice((1, 3, 30)))):
        del content[name]
    write_config(folder, content)


@mutation
def a_type(folder: Path, random: Random) -> None:
    types = ("PVM", "DIPE", "TDRS", "LORA", "IA3", "PROMPT_TUNING", "pvm", "PVM2", "", None, 3, ["PVM"], {"PVM": 1})
    write_config(folder, {**read_config(folder), "peft_type": random.choice(types)})


@mutation
def other_json(folder: Path, random: Random) -> None:
    whole = json.dumps(read_config(folder))
    write_config(
        folder,
        random.choice(
            (
                "",
                "[]",
                "null",
                "3",
                '"PVM"',
                "[1]",
                nested(500),
                nested(100_000),
                '{"a":' * 5_000 + "1" + "}" * 5_000,
                whole[:-1] + f', "r": {"9" * 5_000}}}',
                whole[:-1] + f', "x": {nested(200)}}}',
                whole[:-1] + f', "auto_mapping": {nested(900)}}}',
                whole[:-1] + ', "r": 16, "r": 32, "r": 64}',
                whole[:-1] + ', "peft_type": "DIPE"}',
                whole + whole,
                "\ufeff" + whole,
                whole.replace('"', "'"),
                whole[:-1] + "".join(f', "f{i}": 1' for i in range(10_000)) + "}",
                whole + " " * 9 * 2**20,
            )
        ),
    )


@mutation
def other_encoding(folder: Path, random: Random) -> None:
    if is_small(folder / CONFIG):
        content = json.dumps(read_config(folder))
        (folder / CONFIG).write_bytes(content.encode(random.choice(("utf-16", "utf-32", "utf-8-sig"))) + b"\xff")


# ---- files


@mutation
def no_file(folder: Path, random: Random) -> None:
    path = folder / random.choice((CONFIG, WEIGHTS))
    if not path.is_dir():  # an earlier mutation may have put one in its place
        path.unlink(missing_ok=True)


@mutation
def something_else_in_place_of_a_file(folder: Path, random: Random) -> None:
    path = folder / random.choice((CONFIG, WEIGHTS))
    if not is_small(path) or path.is_symlink():
        return
    copy = folder.parent / f"elsewhere-{path.name}"
    shutil.copy(path, copy)
    path.unlink()
    match random.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path)
        case 2:
            path.symlink_to(folder / "nowhere")
        case 3:
            path.symlink_to(os.devnull)
        case 4:
            path.symlink_to(copy)
        case 5:
            os.mkfifo(path)


@mutation
def in_a_subfolder(folder: Path, random: Random) -> None:
    name = random.choice((CONFIG, WEIGHTS))
    (folder / "default").mkdir(exist_ok=True)
    if (folder / name).is_file():
        os.replace(folder / name, folder / "default" / name)


@mutation
def a_pickle(folder: Path, random: Random) -> None:
    content = pickle.dumps({"base_model.model.lm_head.weight": [1.0]})
    (folder / "adapter_model.bin").write_bytes(content)
    if random.random() < 0.7 and (folder / WEIGHTS).is_file() and not (folder / WEIGHTS).is_symlink():
        (folder / WEIGHTS).write_bytes(content) if random.random() < 0.5 else (folder / WEIGHTS).unlink()


@mutation
def results(folder: Path, random: Random) -> None:
    row = {name: any_json(random) for name in ("dataset", "metric", "value", "base")}
    (folder / RESULTS).write_text(
        random.choice((json.dumps([row]), json.dumps(any_json(random)), nested(10_000), "{"))
    )
