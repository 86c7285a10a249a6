# Every command makes its own environment in .venv first; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: env test soak lint demo bench gpu-check clean

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[deepspeed,bench,dev]'
	touch $(READY)

test: $(READY)  ## all tests this machine can run
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

soak: $(READY)  ## kill ranks of a DeepSpeed run 200 times, and compare with a run that is never killed
	KILLS=200 $(BIN)/pytest -s tests/test_deepspeed_kill.py

lint: $(READY)  ## mypy reads an installed copy: it cannot see folders that are mapped into the package
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	rm -rf build $(VENV)/typed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target $(VENV)/typed .
	cd $(VENV)/typed && ../bin/mypy -p adax_triton --config-file ../../pyproject.toml

demo: $(READY)  ## train a small GPT through DeepSpeed with AdaX, against AdamW
	$(BIN)/python examples/demo.py

bench: $(READY)  ## step time against torch and DeepSpeed, interleaved in one run
	$(BIN)/adax-triton bench step

gpu-check:  ## needs only a GPU, torch, triton and pytest; no network, no installation
	$(PYTHON) bench/gpu_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info runs
