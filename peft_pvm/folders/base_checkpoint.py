"""The checkpoint of a vision-language model: its files, copies of it with other weights, the model without weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, device
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

from ..utils.text import plain, quoted
from .data_file import read_json
from .replacing import replacing, settle


CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Models whose first configs have the fields of the text model beside their own. For any other, transformers would make
# up a text model of its defaults.
FLAT = ("qwen2_vl", "qwen2_5_vl")
FIRST_OF_TWO, FURTHER_SHARD = "model-00001-of-00002.safetensors", "model-pvm.safetensors"


class BaseCheckpoint:
    """The checkpoint of a vision-language model. Its files are not changed.

    Args:
        source: Folder or Hub id.

    Attributes:
        folder: Where its files are.
        config: What its `config.json` holds.
        shards: Its safetensors files.

    Raises:
        FileNotFoundError: There is no safetensors checkpoint.
        ValueError: It is not that of a vision-language model, damaged, or has files that are links to somewhere else.
    """

    def __init__(self, source: str | os.PathLike):
        self.folder = _local(source).resolve()
        settle(self.folder, CONFIG)
        self.config = self._read_config()
        self.shards = self._find_shards()
        self._shard_of: dict[str, Path] = {}
        for shard in self.shards:
            for key in keys_of(shard):
                if key in self._shard_of:
                    raise ValueError(
                        f"{key} is in two shards of {self.folder}, {self._shard_of[key].name} and {shard.name}. Which "
                        "is meant is not known: save the model again."
                    )
                self._shard_of[key] = shard

    def copy(
        self,
        out: str | os.PathLike,
        config: dict[str, Any],
        further: dict[str, Tensor],
        beside: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Copy its shards as they are, and write one more.

        Args:
            out: Folder of the copy, which holds the old files or the new ones, whenever the process dies.
            config: The content of its `config.json`.
            further: More weights, by name; none: no more shards.
            beside: Writes other files, given the folder where the copy is made before it takes its place. Those in
                sub-folders take their places after the rest.

        Returns:
            `out`.

        Raises:
            ValueError: `out` is the checkpoint's own folder, or the checkpoint has such weights itself.
        """
        if own := sorted(further.keys() & self._shard_of.keys()):
            raise ValueError(
                f"{self.folder} holds {len(own)} of the adapter's tensors itself, such as {own[0]}. Name the base "
                "model without an adapter."
            )
        # A loader takes a file of the name SINGLE for the whole model.
        names = {shard: shard.name for shard in self.shards if not (further and shard.name == SINGLE)}
        names |= {shard: _free(FIRST_OF_TWO, names.values()) for shard in self.shards if shard not in names}
        with self._writing(out) as staged:
            for shard, name in names.items():
                shutil.copyfile(shard, staged / name)
            if further:
                contiguous = {name: tensor.contiguous() for name, tensor in further.items()}
                save_file(contiguous, staged / _free(FURTHER_SHARD, names.values()), metadata={"format": "pt"})
            beside(staged)
            self._finish(staged, config, {*self._shard_of, *further})
        return Path(out)

    def copy_without(self, out: str | os.PathLike, config: dict[str, Any], part: str) -> Path:
        """Copy the checkpoint, but for some weights, one shard after the other.

        Args:
            out: Folder of the copy, which holds the old files or the new ones, whenever the process dies.
            config: The content of its `config.json`.
            part: What the names of these weights have in them.

        Returns:
            `out`.

        Raises:
            ValueError: `out` is the checkpoint's own folder.
        """
        with self._writing(out) as staged:
            for shard in self.shards:
                with opened(shard) as file:
                    kept = {key: file.get_tensor(key) for key in file.keys() if part not in key}  # noqa: SIM118
                if kept:
                    save_file(kept, staged / shard.name, metadata={"format": "pt"})
            self._finish(staged, config, {key for key in self._shard_of if part not in key})
        return Path(out)

    @contextlib.contextmanager
    def _writing(self, out: str | os.PathLike) -> Iterator[Path]:
        if os.path.exists(out) and self.folder.samefile(out):
            raise ValueError(f"{out} is what is read, and is left as it is: name another folder to write to.")
        with replacing(out, entry=CONFIG, outdated=weight_files) as staged:
            for path in sorted(self.folder.iterdir()):  # tokenizer, processor, templates; no code
                is_other = path.name != CONFIG and not path.name.endswith(".index.json")
                if path.is_file() and path.suffix in (".json", ".txt", ".jinja") and is_other:
                    shutil.copyfile(self._own(path), staged / path.name)
            yield staged

    def _finish(self, staged: Path, config: dict[str, Any], expected: Collection[str]) -> None:
        """Write index and config, after a look at what the shards hold."""
        shards = sorted(staged.glob("*.safetensors"))
        found = [(key, shard.name) for shard in shards for key in keys_of(shard)]
        keys = sorted(key for key, _ in found)
        if keys != sorted(expected):
            differing = sorted(set(keys) ^ set(expected)) or [
                key for key, following in pairwise(keys) if key == following
            ]
            raise ValueError(
                f"The copy of {self.folder} would not hold each tensor once ({len(differing)} differ, such as "
                f"{differing[0]}), so it was not written. Do not change the checkpoint while it is copied."
            )
        if [shard.name for shard in shards] != [SINGLE]:
            total = sum(map(_tensor_bytes, shards))
            _write_json(staged / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(found)})
        _write_json(staged / CONFIG, config)

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}.")
        content = read_json(self._own(path))
        if isinstance(content, dict) and content.get("model_type") in FLAT and "text_config" not in content:
            content = AutoConfig.for_model(**content).to_dict()
        if not isinstance(content, dict) or not isinstance(content.get("text_config"), dict):
            raise ValueError(f"{path} has no text_config: it is not that of a vision-language model.")
        return content

    def _find_shards(self) -> list[Path]:
        index = self.folder / INDEX
        names = _named_by(read_json(self._own(index))) if index.is_file() else [SINGLE]
        if names is None:
            raise ValueError(f"{plain(index, 200)} has no weight_map from tensors to files. Save the model again.")
        if wrong := [name for name in names if not _is_shard(name)]:
            raise ValueError(
                f"{plain(index, 200)} names {quoted(wrong)}, which lead out of the folder or are no safetensors files."
            )
        shards = [self.folder / name for name in names]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise FileNotFoundError(
                f"There is no {quoted(missing)} in {plain(self.folder, 200)}. Checkpoints are read from safetensors "
                "files only."
            )
        return [self._own(shard) for shard in shards]

    def _own(self, path: Path) -> Path:
        """The path, unless it is a link that leaves what belongs to the checkpoint."""
        homes = [self.folder]
        if self.folder.parent.name == "snapshots":  # of the Hub's cache, which links to blobs of a model or of all
            homes += [self.folder.parents[1] / "blobs", self.folder.parents[2] / "blobs"]
        target = path.resolve()
        if not any(target.is_relative_to(home.resolve()) for home in homes):
            raise ValueError(
                f"{path} is a link to {target}, outside {self.folder}. Files of a checkpoint must be in its own "
                "folder: put a copy in the link's place."
            )
        return path


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights of the checkpoint in a folder."""
    try:
        named = _named_by(read_json(folder / INDEX)) or []
    except (OSError, ValueError):  # what cannot be read names nothing
        named = []
    return [SINGLE, INDEX, *filter(_is_shard, named)]


def opened(shard: Path) -> Any:
    """A safetensors file, to be used in `with`.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return safe_open(shard, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{shard} is damaged or not a safetensors file: {error}") from error


def keys_of(shard: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        ValueError: It is damaged.
    """
    with opened(shard) as file:
        return list(file.keys())


def without_weights(source: str | os.PathLike) -> Any:
    """A vision-language model of which only the configuration is read.

    Args:
        source: Folder or Hub id.

    Raises:
        OSError: There is none.
        ValueError: It is no model that reads images and writes text.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{plain(source)} is a {config.model_type!r}, but must be a model that reads images and writes text. "
            "`peft-pvm models` lists those that are tested."
        )
    with device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _local(source: str | os.PathLike) -> Path:
    if os.path.isdir(source):
        return Path(source)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    return Path(snapshot_download(os.fspath(source), allow_patterns=patterns))


def _named_by(index: Any) -> list[str] | None:
    """The files that an index names; `None`: it is no index."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        return None
    return sorted(set(weight_map.values()))


def _is_shard(name: str) -> bool:
    return Path(name).name == name and name.endswith(".safetensors")


def _free(name: str, taken: Collection[str]) -> str:
    """A name that none of the files has, also where upper and lower case are the same."""
    stem, suffix = os.path.splitext(name)
    names = [name, *(f"{stem}-{number}{suffix}" for number in range(2, len(taken) + 3))]
    return next(free for free in names if free.lower() not in {file.lower() for file in taken})


def _tensor_bytes(shard: Path) -> int:
    with open(shard, "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return shard.stat().st_size - header


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
