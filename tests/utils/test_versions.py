"""The supported versions are the same wherever they stand, and others are refused or warned of."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from tiny_vlms import FAMILIES
from transformers import DynamicCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from peft_pvm.utils import packages
from peft_pvm.utils.packages import CACHE, SUPPORTED, cache_in, caches_in, check_versions, modalities_in, paged_inputs


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("package", SUPPORTED)
def test_the_package_asks_for_the_supported_versions(package):
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest, newest = SUPPORTED[package]
    major, minor = newest.split(".")
    assert f"{package}>={oldest},<{major}.{int(minor) + 1}" in dependencies


@pytest.mark.parametrize("package", SUPPORTED)
@pytest.mark.parametrize(("file", "end"), [("constraints-oldest.txt", 0), ("constraints.txt", 1)])
def test_the_tests_run_on_both_ends(package, file, end):
    pinned = re.search(rf"^{package}==(\d+\.\d+)", (REPOSITORY / file).read_text(), re.MULTILINE)
    assert pinned[1] == SUPPORTED[package][end]


@pytest.mark.parametrize("page", ["README.md", "docs/troubleshooting.md"])
def test_the_documentation_says_so(page):
    assert packages.supported_ranges() in " ".join((REPOSITORY / page).read_text().split())


def test_an_older_version_is_refused():
    with pytest.raises(ImportError, match=r"supports transformers .* to .* and peft .*, but transformers 5\.9\.2 is"):
        check_versions({"transformers": "5.9.2", "peft": "0.21.0"})


@pytest.mark.parametrize("newer", [{"transformers": "5.125.0.dev0"}, {"peft": "1.0"}])
def test_a_newer_version_gives_one_warning(newer):
    supported = {package: f"{newest}.7" for package, (_, newest) in SUPPORTED.items()}
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        check_versions(supported)
        assert given == []
        check_versions({**supported, **newer})
    (warning,) = given
    (package,) = newer
    assert packages.supported_ranges() in str(warning.message)
    assert f"{package} {newer[package]} is installed" in str(warning.message)


def test_importing_checks():
    code = """
import importlib.metadata as metadata
version = metadata.version
for installed in ("4.57.0", "5.99.0"):
    metadata.version = lambda package: installed if package == "transformers" else version(package)
    try:
        import peft_pvm
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("peft_pvm supports")
    assert run.stderr.count("transformers 5.99.0 is installed") == 1


@pytest.mark.parametrize("name", packages.CACHE_NAMES)
def test_a_cache_is_found_by_either_name(name):
    cache = DynamicCache()
    assert cache_in({name: cache, "use_cache": True}) is cache
    assert paged_inputs({name: cache}) == []
    paged = object.__new__(PagedAttentionCache)
    assert cache_in({name: paged}) is None
    assert paged_inputs({name: paged}) == [name]


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_cache_is_found_in_outputs(return_dict):
    family = FAMILIES["llava"]
    model = family.build()
    with torch.no_grad():
        output = model.model(**family.inputs(model, "t4 i t3"), use_cache=True, return_dict=return_dict)
    (cache,) = caches_in(output)
    assert cache.get_seq_length() > 0
    assert caches_in(torch.ones(1)) == []


def test_features_are_found_encoded_or_not():
    pixels = torch.ones(1)
    assert modalities_in({"input_ids": pixels}) == []
    assert modalities_in({"pixel_values": pixels, "mm_encoder_outputs": None}) == ["image"]
    assert modalities_in({"mm_encoder_outputs": {"image": None, "video": pixels}}) == ["video"]
    assert modalities_in({"mm_encoder_outputs": pixels}) == ["image"]  # Idefics3 takes the features alone as well


@pytest.mark.skipif(CACHE == "past_key_values", reason="transformers before 5.24 knows one name")
def test_the_old_name_of_the_argument_still_works():
    from forwards import difference, logits
    from methods_under_test import METHODS

    family = FAMILIES["qwen3_vl"]
    model = METHODS["tdrs-inter+dipe+pvm"].attach(family.build())
    whole = family.inputs(model.get_base_model(), "t4 i t9")
    length = whole["input_ids"].shape[1]
    cache = DynamicCache()
    for start, stop in ((0, length - 2), (length - 2, length)):
        piece = family.inputs(model.get_base_model(), "t4 i t9", start=start, stop=stop)
        last = logits(model, piece, past_key_values=cache, use_cache=True)
    assert difference(last, logits(model, whole)[:, -2:]) < 1e-5
