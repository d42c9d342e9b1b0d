# Every target first installs its prerequisites; see scripts/setup.sh.
PYTHON := $(or $(RLRC_VENV),.venv)/bin/python

.PHONY: help setup demo gguf page-check tensorrt-check jetson-check aarch64-check footprint test test-all test-avx2 lint

help:
	@echo "make setup           install system packages, virtual environment and Python packages"
	@echo "make demo            compress, run and measure the reference policy with a small budget (minutes)"
	@echo "make lint            check style and types"
	@echo "make test            check style and types, run the fast tests"
	@echo "make test-all        check style and types, run all tests"
	@echo "make test-avx2       run the fast tests with AVX-512, VNNI and bfloat16 hidden"
	@echo "make gguf            build llama.cpp for this processor, as required by --to gguf"
	@echo "make tensorrt-check  check the TensorRT graphs with NVIDIA's builder, without a GPU"
	@echo "make page-check      test the operator page in Chromium"
	@echo "make jetson-check    check the set-up files for a Jetson with shellcheck, hadolint and systemd-analyze"
	@echo "make aarch64-check   check that the robot side installs and gives the same results on emulated 64-bit Arm"
	@echo "make footprint       measure the robot side's disk space and the time until its first action"

setup:
	@bash scripts/setup.sh

demo: setup
	@bash scripts/demo.sh

gguf: setup
	@bash scripts/llama_cpp.sh

tensorrt-check: setup
	@bash scripts/tensorrt_check.sh

page-check: setup
	@bash scripts/page_check.sh

jetson-check: setup
	@bash scripts/jetson_check.sh

aarch64-check: setup
	@bash scripts/aarch64_check.sh

footprint: setup
	@bash scripts/footprint.sh

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# Tests that measure time run afterwards, one at a time.
test: lint
	$(PYTHON) -m pytest -m "not slow and not timing" -n 2 --dist loadfile
	$(PYTHON) -m pytest -m "timing and not slow"

test-all: lint
	$(PYTHON) -m pytest

# The masked engine needs its own SIGILL handler, which faulthandler would replace.
test-avx2: setup
	$(PYTHON) scripts/masked_engine.py .masked "x86-64 avx2" $(PYTHON) -m pytest -p no:faulthandler -m "not slow and not timing" -n 2 --dist loadfile
