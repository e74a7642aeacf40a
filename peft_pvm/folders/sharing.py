"""Uploads saved adapters to the Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .adapter_file import RESULTS_NAME
from .inspection import inspect_adapter
from .writing import CARD_NAME, write_card


SHARED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME, RESULTS_NAME)
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of the package that the Hub's client speaks HTTP with


def push_adapter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a saved adapter to the Hub: its configuration, weights, model card and `results.json`, and no other file.

    The repository is created if it does not exist. The folder stays as it is.

    Args:
        folder: Where the adapter is saved.
        repo_id: The repository, as in "you/my-adapter".
        base: Hub id of the base model, in place of the one that the adapter's configuration names.
        revision: The branch, which is created if it does not exist; `None`: the main one.
        private: Whether a new repository is private; `None`: the default of the account.
        token: The account's token; `None`: the one from `hf auth login` or `HF_TOKEN`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The adapter is damaged, or names a folder on this machine as its base.
        FileNotFoundError: There is no such folder, or it has no weights file.
        OSError: The Hub cannot be reached, or refuses.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder on this machine.")
    inspect_adapter(folder)  # reads all of it
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place)
        for name in SHARED:
            if (file := Path(folder, name)).is_file():
                shutil.copyfile(file, staged / name)
        _name_the_base(staged, base)
        write_card(PeftConfig.from_pretrained(str(staged)), staged)
        try:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=staged, revision=revision, commit_message="Upload adapter"
            )
        except HTTPError as error:
            if isinstance(error, OSError):
                raise
            raise ConnectionError(f"The Hub cannot be reached: {error}") from error
    return str(commit.commit_url)


def _name_the_base(folder: Path, base: str | None) -> None:
    """Write a Hub id into an adapter's configuration, and into a card that names a folder on this machine."""
    config, card = folder / CONFIG_NAME, folder / CARD_NAME
    content = json.loads(config.read_text())
    named = content.get("base_model_name_or_path")
    is_local = bool(named) and Path(named).is_dir()
    if base is None:
        if is_local:
            raise ValueError(
                f"The adapter names {named} as its base model, a folder on this machine that others do not have. Give "
                "the Hub id of that model as `base` (--base)."
            )
        return
    config.write_text(json.dumps({**content, "base_model_name_or_path": base}, indent=2, sort_keys=True))
    if is_local and card.is_file():  # PEFT's own cards name it too
        card.write_text(card.read_text().replace(named, base))
