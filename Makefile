# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_LMMS ?= .venv-lmms
WORKERS ?= auto
PYTEST = pytest -n $(WORKERS) -q

.PHONY: demo bench test test-oldest test-lmms-eval quality style clean

demo: $(VENV)/.installed
	$(VENV)/bin/peft-pvm lab demo

bench: $(VENV)/.installed
	$(VENV)/bin/peft-pvm bench

test: $(VENV)/.installed
	$(VENV)/bin/$(PYTEST)

# The oldest transformers and peft that are supported; and bitsandbytes, which greets every import of PEFT with a warning.
test-oldest: $(VENV_OLDEST)/.installed
	$(VENV_OLDEST)/bin/$(PYTEST) tests --ignore tests/lab

# lmms-eval pins versions that do not go with the training extra's.
test-lmms-eval: $(VENV_LMMS)/.installed
	PYTHONPATH=tests $(VENV_LMMS)/bin/pytest -p torchvision_operators -q tests/integrations

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

style: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_LMMS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("the pinned versions need Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lab,train,dev]'
	touch $@

$(VENV_OLDEST)/.installed: constraints-oldest.txt pyproject.toml
	test -d $(VENV_OLDEST) || $(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[test,quantised]'
	touch $@

$(VENV_LMMS)/.installed: constraints-lmms.txt pyproject.toml
	test -d $(VENV_LMMS) || $(PYTHON) -m venv $(VENV_LMMS)
	$(VENV_LMMS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-lmms.txt --editable '.[eval,lab,test]'
	touch $@
