# make demo    the whole story on real text, on a CPU, in a few minutes
# make test    the tests, on a CPU
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
VENV19 := .venv-mcore-0.19
VENVNEMO := .venv-nemo
RUN := runs/demo

export TORCH_COMPILE_DISABLE := 1
export CUDA_DEVICE_MAX_CONNECTIONS := 1
export MPLBACKEND := Agg

.PHONY: demo setup test test-mcore-0.19 test-upstream test-nemo lint clean

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

# nemo_toolkit's own list of requirements asks for far more than its language models use.
$(VENVNEMO)/.installed: setup.py tests/upstream/nemo_requirements.txt
	$(PYTHON) -m venv $(VENVNEMO)
	$(VENVNEMO)/bin/pip install --quiet --upgrade pip
	$(VENVNEMO)/bin/pip install --quiet --no-deps nemo_toolkit==2.4.0 megatron-core==0.13.1 -e .
	$(VENVNEMO)/bin/pip install --quiet -r tests/upstream/nemo_requirements.txt
	touch $@

test-nemo: $(VENVNEMO)/.installed  ## NeMo's own script and YAML: make test-nemo NEMO=/path/to/NeMo, a checkout of tag v2.4.0
	NEMO=$(NEMO) $(VENVNEMO)/bin/python -m pytest -q -m "upstream or not upstream" tests/test_nemo_settings.py \
		tests/upstream/test_nemo.py tests/upstream/test_nemo_recipes.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(RUN) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
