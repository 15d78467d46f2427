# Everything here sets itself up: Python 3.10 or newer and a package index are all it needs.
PYTHON ?= python3
VENV ?= .venv
# For this environment only; the pack itself pins nothing and runs on any torch from 2.4.
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN = $(VENV)/bin/python

.PHONY: demo test lint format clean
demo: $(VENV)/.ready
	$(RUN) scripts/demo.py

test: $(VENV)/.ready
	$(RUN) -m pytest

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# comfy-kitchen is what ComfyUI decodes quantised weights with, to compare with ours; without it those tests skip. The pure Python
# wheel has 0.3 MB, the others 68.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev]'
	-$(PIP) --no-deps --only-binary=:all: --platform any --target $$($(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))") comfy-kitchen==0.2.40
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
