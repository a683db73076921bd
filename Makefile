# make demo    the whole story on real text, on a CPU, in a few minutes
# make test    the tests, on a CPU
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
VENV19 := .venv-mcore-0.19
RUN := runs/demo

export TORCH_COMPILE_DISABLE := 1
export CUDA_DEVICE_MAX_CONNECTIONS := 1
export MPLBACKEND := Agg

.PHONY: demo setup test test-mcore-0.19 test-upstream gpu-dry-run lint clean

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -c constraints.txt torch  # first: the version that is tested, before another package asks for any
	$(VENV)/bin/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

setup: $(VENV)/.installed  ## the environment of `make demo` and `make test`

demo: setup  ## prepare real text, count exposure, compare baseline and EXACT; report in runs/demo/compare/report.md
	$(VENV)/bin/exact-megatron prepare stdlib --train-tokenizer 4096 --valid-fraction 0.03 --output $(RUN)/data/stdlib
	$(VENV)/bin/exact-megatron census $(RUN)/data/stdlib --seq-length 16384 --plot $(RUN)/census_16384.png
	$(VENV)/bin/exact-megatron census $(RUN)/data/stdlib --seq-length 1024 --plot $(RUN)/census.png --json $(RUN)/census.json
	$(VENV)/bin/exact-megatron compare --config configs/demo.yaml --base-seq-length 256 --base-steps 120

test: setup  ## everything that needs neither a GPU, nor root, nor a checkout of another project
	$(VENV)/bin/python -m pytest -q --durations=10

$(VENV19)/.installed: setup.py
	$(PYTHON312) -m venv $(VENV19)
	$(VENV19)/bin/pip install --quiet --upgrade pip
	$(VENV19)/bin/pip install --quiet megatron-core==0.19.2 -e ".[dev]"
	touch $@

test-mcore-0.19: $(VENV19)/.installed  ## the same tests on megatron-core 0.19.2, Python 3.12 (4.7 GB: it imports triton)
	$(VENV19)/bin/python -m pytest -q --durations=10

test-upstream: $(VENV)/.installed $(VENV19)/.installed  ## the real pretrain_gpt.py: make test-upstream MEGATRON_LM=/path/to/clone
	MEGATRON_LM=$(MEGATRON_LM) $(VENV)/bin/python -m pytest -q -m upstream tests/upstream/test_megatron_lm.py
	MEGATRON_LM=$(MEGATRON_LM) $(VENV19)/bin/python -m pytest -q -m upstream tests/upstream/test_megatron_lm.py

gpu-dry-run: setup  ## the scripts of a GPU session with tiny sizes on a CPU, a few minutes
	$(VENV)/bin/python -m pytest -q -m slow tests/test_gpu_scripts.py tests/gpu

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(RUN) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
