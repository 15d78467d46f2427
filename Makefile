# Everything here sets itself up: Python 3.10 or newer and a package index are all it needs.
PYTHON ?= python3
VENV ?= .venv
# For this environment only; the pack itself pins nothing and runs on any torch from 2.4.
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN = $(VENV)/bin/python

COMFY ?= $(firstword $(wildcard $(VENV)/bin/comfy) $(shell command -v comfy 2>/dev/null))

.PHONY: help demo test check lint format clean fuzz
help: # the default: prints this list and changes nothing
	@echo "make demo    two pictures on tiny random weights, in ComfyUI where it can be had"
	@echo "make test    every test; those that need ComfyUI or a browser say so when they cannot have it"
	@echo "make check   lint and the tests that need no ComfyUI, under 5 minutes"
	@echo "make lint    ruff, mypy and, where comfy-cli is installed, comfy node validate"
	@echo "make fuzz    damaged files and odd requests by the thousand, counted (ten minutes)"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the environment and what was built"

demo: $(VENV)/.ready
	$(RUN) scripts/demo.py

test: $(VENV)/.ready
	$(RUN) -m pytest

check: lint
	$(RUN) -m pytest --ignore tests/host

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(if $(COMFY),DO_NOT_TRACK=1 $(COMFY) --skip-prompt node validate,@echo "comfy-cli is not installed: comfy node validate is left out")

# 10,000 media, 5,000 checkpoints, 5,000 requests, 500 queued prompts, and 150 jobs through a server.
fuzz: $(VENV)/.ready
	$(RUN) tests/fuzz
	LANCE_FUZZ_PROMPTS=500 $(RUN) -m pytest -s tests/host/test_inproc.py -k fuzz
	LANCE_SOAK_JOBS=150 $(RUN) -m pytest -s tests/host/test_server.py -k many_jobs

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# comfy-kitchen is what ComfyUI decodes quantised weights with, to compare with ours; without it those tests skip. The pure Python
# wheel has 0.3 MB, the others 68. Triton interprets its kernels on a CPU in tests; where it cannot be had, these skip.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev]'
	-$(PIP) --no-deps --only-binary=:all: --platform any --target $$($(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))") comfy-kitchen==0.2.40
	-$(PIP) triton
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
