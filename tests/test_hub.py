"""Sharing through a Hub: huggingface_hub's own client against a server on loopback, in a process of its own.

The client reads HF_ENDPOINT when it is imported, and the other tests run with the network switched off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import serve
from tiny_vlms import REPRESENTATIVE


LOOP = """
import contextlib, io, json, sys, traceback
sys.path.insert(0, {tests!r})
import torch
from forwards import logits
from methods_under_test import METHODS, give_weight
from peft import PeftModel, get_peft_model
from tiny_vlms import FAMILIES
from peft_pvm import DIPEConfig, PVMConfig, hotswap_adapter
from peft_pvm.folders.inspection import inspect_adapter

def attached(seed, **fields):
    torch.manual_seed(0)
    model = get_peft_model(family.build(), PVMConfig(**{{"r": 32, **fields}})).eval()
    give_weight(model, seed)
    return model
def same(model, other):
    return torch.equal(logits(model, inputs), logits(other, inputs))

for line in sys.stdin:
    name, script = json.loads(line)
    family = FAMILIES[name]
    inputs = family.inputs(family.build(), "t4 i t3 i t6", "t7 i t5")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(script)
        reply = ["", json.loads(printed.getvalue().splitlines()[-1])]
    except BaseException:
        reply = [traceback.format_exc(), None]
    print(json.dumps(reply), flush=True)
"""


class Client:
    """A process that knows the server as the Hub, and runs one script after another."""

    def __init__(self, cache: Path):
        self.server, self.hub = serve()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_address[1]}",
            "HF_HOME": str(cache),
            "HF_TOKEN": "hf_token",
            "HF_HUB_DISABLE_XET": "1",  # another protocol, to other servers
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "120",
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", LOOP.format(tests=str(Path(__file__).parent))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, **pipes)

    def run(self, script: str, family: str = "llava") -> Any:
        """What a script prints, as JSON in its last line."""
        self.process.stdin.write(json.dumps([family, script]) + "\n")
        self.process.stdin.flush()
        error, found = json.loads(self.process.stdout.readline())
        assert not error, error
        return found

    def close(self) -> None:
        self.process.communicate()
        self.server.shutdown()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(tmp_path_factory.mktemp("hf"))
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _empty_hub(client: Client) -> None:
    client.hub.clear()


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_there_and_back(client: Client, family: str):
    found = client.run(
        """
model = attached(1)
model.push_to_hub("someone/pvm")
loaded = PeftModel.from_pretrained(family.build(), "someone/pvm")
base = family.build()
base.load_adapter("someone/pvm", adapter_name="other")
base.push_to_hub("someone/again")  # by transformers
again = PeftModel.from_pretrained(family.build(), "someone/again")
swapped = attached(2)
hotswap_adapter(swapped, "someone/pvm", "default")
print(json.dumps([same(loaded, model), same(base.eval(), model), same(swapped, model), same(attached(2), model),
                  same(again, model), inspect_adapter("someone/pvm").method]))
""",
        family,
    )
    assert found == [True, True, True, False, True, "pvm"]
    held = client.hub
    for repo in ("someone/pvm", "someone/again"):
        _, files = held.files(repo, "main")
        own = set(files) - {"generation_config.json"}  # of the base: transformers saves it along
        assert own == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert b"pipeline_tag: image-text-to-text" in files["README.md"]
        assert b"# PVM: Persistent Visual Memory" in files["README.md"]
    assert any(request.startswith("PUT /lfs/") for request in held.requests), "weights go up as large files"


def test_adapters_that_belong_together(client: Client, tmp_path: Path):
    """The note goes along, also that of a LoRA and its card; and no file is asked for because of it."""
    found = client.run(
        """
import warnings
from peft import LoraConfig
from peft_pvm import add_adapters, load_adapters
base = family.build()
add_adapters(base, {"dipe": DIPEConfig(max_distance=2)})
lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
model = PeftModel(base, lora, "default")
model.push_to_hub("someone/lora")
DIPEConfig(max_distance=2).save_pretrained("{folder}")
said = []
for sources in (["someone/lora"], ["{folder}", "someone/lora"]):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_adapters(family.build(), sources)
    said.append([str(w.message) for w in caught if "trained together with" in str(w.message)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(family.build(), sources[-1])
    said.append([str(w.message) for w in caught if "trained together with" in str(w.message)])
print(json.dumps(said))
""".replace("{folder}", str(tmp_path / "dipe")),
    )
    assert [len(texts) for texts in found] == [1, 1, 0, 1]
    assert "load_adapters(model, ['<the folder of dipe>', 'someone/lora'])" in found[0][0]
    held = client.hub
    _, files = held.files("someone/lora", "main")
    assert set(files) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("dipe/README.md", "dipe/adapter_config.json", "dipe/adapter_model.safetensors"),
    }
    assert b"| `dipe` | DIPE | `max_distance=2, " in files["README.md"]
    assert b"| `default` | LORA | `weights " in files["dipe/README.md"]


def test_a_saved_folder_from_the_command_line(client: Client, tmp_path: Path):
    """There and back, without what else is in the folder and with a base that others have."""
    found = client.run(
        """
import functools, pathlib
from peft_pvm.cli.app import app
from peft_pvm.folders import sharing
saved, place = attached(1), pathlib.Path("{folder}")
saved.peft_config["default"].base_model_name_or_path = "{folder}"
saved.save_pretrained(place)
(place / "optimizer.pt").write_text("mine")
held = lambda: {path.name: path.read_bytes() for path in place.iterdir()}
before = held()
def run(line):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = app(line.split(), standalone_mode=False)
    return status, said.getvalue()
refused = run("push {folder} someone/pvm")
done = run("push {folder} someone/pvm --base org/base"), run("push {folder} someone/pvm --base org/base --revision b")
loaded = PeftModel.from_pretrained(family.build(), "someone/pvm", revision="b")
is_untouched = held() == before
sharing.HfApi, hub = functools.partial(sharing.HfApi, "http://127.0.0.1:9"), sharing.HfApi
unreachable = run("push {folder} someone/other --base org/base")
sharing.HfApi = hub
from peft import LoraConfig
base = family.build()
base.config._name_or_path = base.name_or_path = "{folder}"
lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
lora.save_pretrained(place / "lora")
assert "{folder}" in (place / "lora" / "README.md").read_text()
done += (run("push {folder}/lora someone/lora --base org/base"),)
(place / "adapter_model.safetensors").write_bytes(b"not an adapter")
damaged = run("push {folder} someone/other --base org/base")
print(json.dumps([refused, done, loaded.peft_config["default"].base_model_name_or_path, same(loaded, saved),
                  is_untouched, unreachable, damaged]))
""".replace("{folder}", str(tmp_path)),
    )
    refused, done, base, is_same, is_untouched, unreachable, damaged = found
    assert refused[0] == 1
    assert "a folder on this machine that others do not have. Give the Hub id" in refused[1]
    assert [status for status, _ in done] == [0, 0, 0], done
    assert (base, is_same, is_untouched) == ("org/base", True, True)
    assert unreachable[0] == 1
    assert "The Hub cannot be reached: " in unreachable[1]
    assert damaged[0] == 1
    assert "is damaged or not a safetensors file" in damaged[1]
    assert client.hub.commits.keys() == {"someone/pvm", "someone/lora"}, "nothing was made for what was refused"
    for repo, branch in (("someone/pvm", "b"), ("someone/lora", "main")):
        _, files = client.hub.files(repo, branch)
        assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert b"base_model: org/base" in files["README.md"]
        assert str(tmp_path).encode() not in files["README.md"] + files["adapter_config.json"]


def test_revisions_and_subfolders(client: Client, tmp_path: Path):
    found = client.run(
        """
from huggingface_hub import HfApi
first, second = attached(1), attached(2, layers_to_transform=[0])
commit = first.push_to_hub("someone/pvm")
HfApi().create_branch("someone/pvm", branch="later")
second.push_to_hub("someone/pvm", revision="later")
second.save_pretrained("{folder}")
HfApi().upload_folder(repo_id="someone/pvm", folder_path="{folder}", path_in_repo="inner/second")
load = lambda **kwargs: PeftModel.from_pretrained(family.build(), "someone/pvm", **kwargs)
print(json.dumps([
    same(load(), first), same(load(revision="main"), first), same(load(revision=commit.oid), first),
    same(load(revision="later"), second), same(load(subfolder="inner/second"), second),
    inspect_adapter("someone/pvm", revision="later").config["layers_to_transform"],
]))
""".replace("{folder}", str(tmp_path / "saved")),
    )
    assert found == [True, True, True, True, True, [0]]


def test_what_is_not_there_is_said_to_be_missing(client: Client):
    found = client.run(
        """
get_peft_model(family.build(), DIPEConfig(max_distance=0)).push_to_hub("someone/dipe")
messages = []
missing = (("someone/nothing", {}), ("someone/dipe", {"revision": "none"}), ("someone/dipe", {"subfolder": "x"}))
for name, options in missing:
    try:
        PeftModel.from_pretrained(family.build(), name, **options)
    except ValueError as error:
        messages.append(str(error))
model = PeftModel.from_pretrained(family.build(), "someone/dipe")
print(json.dumps([messages, model.peft_config["default"].method]))
""",
    )
    messages, method = found
    assert method == "dipe"
    assert len(messages) == 3
    assert all("Can't find 'adapter_config.json'" in message for message in messages)
