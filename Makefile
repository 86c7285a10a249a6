# Every command makes its own environment in .venv first; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The version that `make acceptance` runs; one other than the pinned has an environment of its own.
PINNED_DEEPSPEED := $(shell sed -n 's/^deepspeed==//p' constraints.txt)
DEEPSPEED ?= $(PINNED_DEEPSPEED)
DEEPSPEED_VENV := $(if $(filter $(PINNED_DEEPSPEED),$(DEEPSPEED)),$(VENV),.venv-deepspeed-$(DEEPSPEED))

.PHONY: env test quick durations audit mutants soak lint demo bench results report acceptance gpu-check clean

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[deepspeed,huggingface,bench,dev]'
	-DS_ACCELERATOR=cpu $(BIN)/python tests/support/async_io.py >/dev/null
	touch $(READY)

# One worker has all tests of a file, the files that take longest first.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)  ## all tests this machine can run
	$(PYTEST) --durations=10

quick: $(READY)  ## after an edit: lint without mypy, and the tests that take a minute together
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(PYTEST) --quick

durations: $(READY)  ## all tests, on a quiet machine: tests/support/durations.json anew, the order of `test` and the choice of `quick`
	$(PYTEST) --durations=30 --record-durations --cache-clear

audit: $(READY)  ## read the code of every kernel variant for every GPU target, and keep the facts for `test`
	AUDIT=all $(BIN)/pytest tests/gpu_code/test_code_audit.py tests/gpu_code/test_small_kernels_audit.py

mutants: $(READY)  ## make the faults of tests/support/mutants.toml one by one; every one has to fail a test. MUTANTS="a b" chooses
	$(BIN)/python tests/support/mutants.py $(MUTANTS)

soak: $(READY)  ## kill ranks of a DeepSpeed run 200 times, and compare with a run that is never killed
	KILLS=200 KILL_SEED=$$(date +%s) $(BIN)/pytest -s tests/deepspeed_runs/test_deepspeed_kill.py

lint: $(READY)  ## mypy reads an installed copy: it cannot see folders that are mapped into the package
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	rm -rf build $(VENV)/typed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target $(VENV)/typed .
	cd $(VENV)/typed && ../bin/mypy -p adax_triton --config-file ../../pyproject.toml

demo: $(READY)  ## train a small GPT through DeepSpeed with AdaX, against AdamW
	$(BIN)/python examples/demo.py

bench: $(READY)  ## step time against torch and DeepSpeed, interleaved in one run
	$(BIN)/adax-triton bench step

results: $(READY)  ## measure the committed CPU figures anew, in some fifteen minutes
	$(BIN)/adax-triton bench step --sizes 5e7 --models gpt2 --budget 330 --json bench/results/cpu-step.json
	$(BIN)/adax-triton bench scale --json bench/results/cpu-scale.json
	$(BIN)/adax-triton bench host --json bench/results/cpu-host.json
	$(BIN)/adax-triton bench cpu --json bench/results/cpu-native.json
	$(BIN)/adax-triton bench functions --json bench/results/cpu-functions.json
	$(BIN)/adax-triton bench train --steps 20 --budget 100 --json bench/results/cpu-train.json \
		--only 'plain / torch AdamW' 'plain / AdaXW' 'ZeRO-2 /' 'ZeRO-3 /'
	$(BIN)/python -m adax_triton.bench.zero_passes.passes --out bench/results/cpu-passes.json \
		--table docs/deepspeed-passes.md
	$(MAKE) report

REPORTED = $(wildcard $(foreach kind,step native scale host functions train counters passes variants,bench/results/*-$(kind).json))

README_RESULT := bench/results/nvidia-h200-step.json

report: $(READY)  ## docs/benchmarks and the README's section from the committed results
	rm -f docs/benchmarks/*.png
	$(BIN)/adax-triton bench report $(REPORTED) --out docs/benchmarks
	$(BIN)/adax-triton bench report $(README_RESULT) --readme README.md

acceptance: $(DEEPSPEED_VENV)/.ready  ## run docs/deepspeed-acceptance.md anew; DEEPSPEED=0.19.1 for that version
	$(DEEPSPEED_VENV)/bin/python tests/support/acceptance_table.py

.venv-deepspeed-%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	sed 's/^deepspeed==.*/deepspeed==$*/' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt --editable '.[deepspeed,huggingface,dev]'
	touch $@

CALL ?= 1
gpu-check:  ## CALL=1 checks, CALL=2 measures; needs only a GPU, torch, triton and pytest, no network, no installation
	$(PYTHON) bench/gpu_check.py --call $(CALL)

clean:
	rm -rf $(VENV) .venv-deepspeed-* build dist *.egg-info runs
