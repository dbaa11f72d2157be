# From a fresh clone, with only Python 3.11+ and make:  make demo   make test
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: install demo test check lint types wheel api lock clean

install: $(VENV)/.installed

# The lock pins every file by hash; uv installs it (it finds the same torch build for torch and torchvision).
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {v}: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/dino demo --out runs/demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright

check: lint types test

# Builds the wheel, installs it into an empty environment (the lock's versions), and trains there for a few steps.
wheel: install
	rm -rf dist build/wheel
	$(BIN)/python -m hatchling build --target wheel
	$(BIN)/uv venv --quiet --python $(BIN)/python build/wheel
	$(BIN)/uv pip install --quiet --python build/wheel/bin/python --constraint requirements.lock dist/*.whl
	cd build && wheel/bin/dino demo --help > /dev/null && rm -rf run && wheel/bin/dino pretrain shapes:64x32 --out run \
		--optim.length "4 steps" --optim.batch-size 8 --model.out-dim 256
	test -s build/run/report.html && test -s build/run/model_card.md && test -e build/wheel/lib/python3*/site-packages/dino/py.typed

# The reference of the Python interface, from its docstrings.
api: install
	$(BIN)/python docs/make_api.py

lock:
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
		--python-version 3.11 --all-extras --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) runs dist build
