"""A vLLM that has no build for CPUs: the Python of its release on PyPI, on the compiled kernels of the installed one.

`python tests/newer_vllm.py VERSION FOLDER` writes it into a folder, for the front of PYTHONPATH.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import urllib.request
from importlib.util import find_spec
from pathlib import Path


INDEX = "https://pypi.org/simple/vllm/"


def fetch(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"Accept": "application/vnd.pypi.simple.v1+json, */*;q=0.1"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def main(version: str, folder: Path) -> None:
    files = json.loads(fetch(INDEX))["files"]
    (source,) = [file["url"] for file in files if file["filename"] == f"vllm-{version}.tar.gz"]
    installed = Path(find_spec("vllm").submodule_search_locations[0])
    with tarfile.open(fileobj=io.BytesIO(fetch(source))) as archive:
        top = f"vllm-{version}/"
        for member in archive.getmembers():
            if member.name.startswith(f"{top}vllm/"):
                member.name = member.name.removeprefix(top)
                archive.extract(member, folder, filter="data")
    for library in installed.glob("*.so"):
        shutil.copy(library, folder / "vllm")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
