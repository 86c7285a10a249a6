# All targets except gpu-check and clean create .venv first; set PYTHON to choose its interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# `make acceptance` tests this version; a version that is not pinned uses a separate environment.
PINNED_DEEPSPEED := $(shell sed -n 's/^deepspeed==//p' constraints.txt)
DEEPSPEED ?= $(PINNED_DEEPSPEED)
DEEPSPEED_VENV := $(if $(filter $(PINNED_DEEPSPEED),$(DEEPSPEED)),$(VENV),.venv-deepspeed-$(DEEPSPEED))

.PHONY: env test frameworks quick durations audit mutants soak lint docs docs-serve demo study bench results report acceptance gpu-check clean

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[deepspeed,huggingface,lightning,bench,docs,dev]'
	-DS_ACCELERATOR=cpu $(BIN)/python tests/support/async_io.py >/dev/null
	touch $(READY)

# Each worker runs whole test files, the slowest files first.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)  ## run all tests that this machine can run
	$(PYTEST) --durations=10

# timm needs torchvision, which must match the build of torch. The tests of timm's optimizers need neither.
frameworks: $(READY)  ## run the tests of frameworks, also with PEFT, TRL and timm, which it installs
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[frameworks]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps timm
	$(PYTEST) --durations=10 tests/frameworks

quick: $(READY)  ## after an edit: ruff, and tests that take a minute in total
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(PYTEST) --quick

durations: $(READY)  ## run all tests on an idle machine and rewrite tests/support/durations.json: the order of test files, and which of them `quick` runs
	$(PYTEST) --durations=30 --record-durations --cache-clear

audit: $(READY)  ## check the compiled code of all kernel variants for all GPU targets, and cache the results for `test`
	AUDIT=all $(BIN)/pytest tests/gpu_code/test_code_audit.py tests/gpu_code/test_small_kernels_audit.py

mutants: $(READY)  ## mutation tests: apply each fault of tests/support/mutants.toml; a test must fail. MUTANTS="a b" selects some
	$(BIN)/python tests/support/mutants.py $(MUTANTS)

soak: $(READY)  ## kill ranks of a DeepSpeed run 200 times, and compare with an uninterrupted run
	KILLS=200 KILL_SEED=$$(date +%s) $(BIN)/pytest -s tests/deepspeed_runs/test_deepspeed_kill.py

# mypy reads an installed copy, because it does not follow package-dir.
lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	rm -rf build $(VENV)/typed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target $(VENV)/typed .
	cd $(VENV)/typed && ../bin/mypy -p adax_triton --config-file ../../pyproject.toml

# mkdocs-material prints a notice about its successor unless the variable is set.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: $(READY)  ## build the documentation into site/; a broken link, a missing docstring or a stale table fails
	$(MKDOCS) build --strict

docs-serve: $(READY)  ## show the documentation at http://127.0.0.1:8000 and rebuild it after each edit
	$(MKDOCS) serve --strict --watch adax_triton --watch kernels --watch integrations

demo: $(READY)  ## train a small GPT through DeepSpeed with AdaX, against AdamW
	$(BIN)/python examples/demo.py

study: $(READY)  ## compare the rules for w_t with tuned learning rates: hours; a stopped study continues. STUDY=--quick takes a minute
	$(BIN)/adax-triton bench study $(STUDY)

bench: $(READY)  ## step time next to torch and DeepSpeed, interleaved in one run
	$(BIN)/adax-triton bench step

results: $(READY)  ## measure the committed CPU results again (about 20 minutes)
	$(BIN)/adax-triton bench step --sizes 5e7 --models gpt2 --budget 330 --json bench/results/cpu-step.json
	$(BIN)/adax-triton bench scale --json bench/results/cpu-scale.json
	$(BIN)/adax-triton bench host --json bench/results/cpu-host.json
	$(BIN)/adax-triton bench cpu --json bench/results/cpu-native.json
	$(BIN)/adax-triton bench functions --json bench/results/cpu-functions.json
	$(BIN)/adax-triton bench train --steps 20 --budget 400 --json bench/results/cpu-train.json \
		--only 'plain / torch AdamW' 'plain / AdaXW' 'ZeRO-2 /' 'ZeRO-3 /'
	$(BIN)/python -m adax_triton.bench.zero_passes.passes --out bench/results/cpu-passes.json \
		--table docs/deepspeed-passes.md
	$(MAKE) report

REPORTED = $(wildcard $(foreach kind,step native scale host norm functions train counters passes variants,bench/results/*-$(kind).json))

README_RESULT := bench/results/nvidia-h100-step.json

report: $(READY)  ## regenerate the tables of docs/benchmarks, docs/options.md and the README
	rm -f docs/benchmarks/*.png
	$(BIN)/adax-triton bench report $(REPORTED) --out docs/benchmarks
	$(BIN)/adax-triton bench report $(README_RESULT) --readme README.md --picture docs/speed.png
	$(BIN)/python docs/hooks/options_table.py
	$(BIN)/adax-triton bench study --page docs/study.md --out bench/results/study.jsonl

acceptance: $(DEEPSPEED_VENV)/.ready  ## run the acceptance tests and rewrite docs/deepspeed-acceptance.md; DEEPSPEED=0.19.1 selects a version
	$(DEEPSPEED_VENV)/bin/python tests/support/acceptance_table.py

.venv-deepspeed-%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	sed 's/^deepspeed==.*/deepspeed==$*/' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt --editable '.[deepspeed,huggingface,dev]'
	touch $@

CALL ?= 1
gpu-check:  ## CALL=1 checks, CALL=2 measures; needs a GPU, torch, triton and pytest; no network, no installation
	$(PYTHON) bench/gpu_check.py --call $(CALL)

clean:
	rm -rf $(VENV) .venv-deepspeed-* build dist site *.egg-info runs
