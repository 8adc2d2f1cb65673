# `make quickstart` and `make test` do everything on a fresh machine: environment, installation, the job.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
RUNS ?= runs
# One-thread processes beat threads of one process on small networks; they divide the batch, so 1, 2 or 4.
PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 1); if [ $$n -ge 4 ]; then echo 4; else echo $$n | sed 's/3/2/'; fi)
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m catmaps

.PHONY: quickstart test lint docs install install-dev clean

# torch first and pinned: where a CPU build is at hand, pip takes it instead of gigabytes of CUDA.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	touch $@

$(VENV)/.train: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[train,report]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[train,report,scale,eval,serve,track,docs,dev]"
	touch $@

install: $(VENV)/.train

install-dev: $(VENV)/.dev

# A base flow on 22 MB of English, its flow map, and a page about both: about 17 minutes on 2 cores.
quickstart: install
	$(TRAIN) train quickstart --out $(RUNS)/quickstart-base
	$(TRAIN) distill --from $(RUNS)/quickstart-base --preset quickstart --out $(RUNS)/quickstart-map
	$(BIN)/catmaps report $(RUNS)/quickstart-map --num 256 --windows 256

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, in build/site: open index.html there. A test builds it as well.
docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile
	bash tests/end_to_end.sh $(BIN)

clean:
	rm -rf $(VENV) build dist *.egg-info
