# Every target sets up what it needs first; see scripts/setup.sh.
PYTHON := $(or $(RLRC_VENV),.venv)/bin/python

.PHONY: help setup demo gguf page-check tensorrt-check jetson-check aarch64-check footprint test test-all test-avx2 lint

help:
	@echo "make demo      compress, run and measure the reference policy with a small budget (minutes)"
	@echo "make test      lint, types and the fast tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make test-avx2 the fast tests as on a processor without AVX-512, VNNI and bfloat16"
	@echo "make gguf      llama.cpp, built for this processor: what --to gguf and its graphs need"
	@echo "make tensorrt-check  whether NVIDIA's builder takes the TensorRT graphs, without a GPU"
	@echo "make page-check  the operator's page in a real Chromium"
	@echo "make jetson-check  the files that a Jetson is set up with, by shellcheck, hadolint, systemd-analyze"
	@echo "make aarch64-check   whether the robot side installs and answers alike on 64-bit Arm, in an emulator"
	@echo "make footprint       what the robot side takes, and how long until its first action"
	@echo "make lint      lint and types only"
	@echo "make setup     system packages, virtual environment, Python packages"

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

# Two processes; then, by themselves, the tests that measure time.
test: lint
	$(PYTHON) -m pytest -m "not slow and not timing" -n 2 --dist loadfile
	$(PYTHON) -m pytest -m "timing and not slow"

test-all: lint
	$(PYTHON) -m pytest

# The masked engine answers SIGILL itself, which pytest would take.
test-avx2: setup
	$(PYTHON) scripts/masked_engine.py .masked "x86-64 avx2" $(PYTHON) -m pytest -p no:faulthandler -m "not slow and not timing" -n 2 --dist loadfile
