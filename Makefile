# Everything sets itself up: Python >= 3.10, a C compiler and make are enough (see .ci/bootstrap.py).
PYTHON ?= python3
RUN = .venv/bin/python
QUICK = "not long and not peers and not slurm_real"
SETUP = @command -v $(PYTHON) >/dev/null || { echo "setup: there is no $(PYTHON) on the PATH: install Python 3.10 or newer \
(Debian: apt install python3 python3-venv)."; exit 1; }; $(PYTHON) .ci/bootstrap.py
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
.PHONY: build demo test test-long test-gpu test-slurm test-peers bench cuda-check lint clean distclean

build: ## virtual environment, MPI, packages, native library
	$(SETUP)

demo: build ## the main job on real text: prepare, train on two ranks, inspect, generate (about two minutes)
	@$(RUN) -m benchmarks.demo

test: ## lint and every test that takes seconds, under both MPIs
	$(SETUP) mpich
	@$(MAKE) --no-print-directory lint cuda-check
	@$(RUN) -m pytest -q -n 2 -m $(QUICK) tests/pure tests/kernels tests/gpu tests/runtime tests/house
	@$(RUN) -m pytest -q -m $(QUICK) tests/mpi tests/slurm

test-long: ## the tests that take minutes
	$(SETUP) mpich
	@$(RUN) -m pytest -q -m "long and not peers"

test-gpu: build ## on this machine's GPU (pip install -e .[cuda12] or .[cuda13] into .venv first)
	@$(RUN) -m pytest -q -m gpu

test-slurm: ## the batch scripts on a real Slurm of four emulated hosts (root, Debian; installs its packages)
	$(SETUP) mpich
	@$(RUN) .ci/slurm.py

test-peers: ## against PyTorch and transformers (downloads them)
	$(SETUP) peers
	@.venv-peers/bin/python -m pytest -q -m peers

bench: ## beside JAX and PyTorch on the same cores (downloads them)
	$(SETUP) peers
	@$(RUN) -m benchmarks.step

cuda-check: build ## compile native/cuda for every architecture: registers, shared memory, spills (needs nvcc)
	@$(RUN) .ci/cuda_check.py

lint: build ## ruff and mypy
	@$(RUN) -m ruff check -q .
	@$(RUN) -m mypy

clean: ## what was built and what tests and demo left
	@rm -rf build hpcpipe/native/*.so hpcpipe/native/cuda hpcpipe/native/include *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +

distclean: clean ## and the environments
	@rm -rf .venv .venv-mpich .venv-peers
