# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= runs/demo
JOBS   ?= 2

# threads that wait must not spin: with a second process on the cores, torch is about five times slower otherwise
export OMP_WAIT_POLICY ?= PASSIVE

# pip's cmake serves where the system has none
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install demo test test-hostile test-slow soak test-zoo test-browser mutate results results-methods lint plugin docs dist clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 7 GB, some minutes"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,rtx]'
	@touch $(STAMP)

demo: install
	$(BIN)/moee demo --out $(OUT) --force

# JOBS processes, each with files of its own
test: install lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: install
	$(BIN)/python -m pip install -q -c constraints.txt atheris || echo "no atheris here: its fuzz targets are skipped"
	$(BIN)/python -m pytest -m "slow and not gpu and not trt" --durations=20

# ordinary and hostile input through every command; ends with the table of docs/reliability.md
test-hostile: install
	$(BIN)/python -m pytest tests/hostile -m "not gpu and not trt" --count-kinds

# the whole pipeline in one process for MINUTES; exit code 1 if memory, handles, threads or files grow
MINUTES ?= 30
soak: install
	folder=$$(mktemp -d) && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.soak $$folder --minutes $(MINUTES)

# every family of timm and others through extract, export and verify; writes docs/models.md
test-zoo: install
	$(BIN)/python -m tests.zoo

# every method at equal MACs on several models and domains; goes on where it was stopped; writes docs/results/methods_table.md
results-methods: install
	$(BIN)/python scripts/methods_table.py

# static pruning and experts beside the dense model, timed in turns; writes docs/results/speed.md
results: install
	$(BIN)/python scripts/results.py

# small faults in five modules, which the tests must notice; writes docs/results/mutation.md, goes on where it was stopped
mutate: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[mutation]'
	$(BIN)/python -m tests.mutation

test-browser: install
	$(BIN)/python -m pytest -m browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

plugin: install
	$(BIN)/moee plugin build

# docs/ and the API reference as a site, in build/site, without network; a warning is an error
docs: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -E docs build/site
	$(BIN)/python scripts/build_api.py build/site/api

# wheel, with the operator of ONNX Runtime for x86-64 and aarch64, and source distribution, in dist/
dist: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dist]'
	$(BIN)/python scripts/build_dist.py dist --operator

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
