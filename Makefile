# make pretrain, make test: all they need is Python 3.11 or newer, and make. `make help` lists the rest.
#
#   PYTHON=python3.13   the interpreter of the virtual environment (default: the first that is new enough)
#   VENV=.venv          where that environment is; without it nothing is installed anywhere
#   MESH=8x4            the mesh of `make pretrain`: data x model
#   WORKERS=2           processes of `make test`; each takes up to 4 GB
#   ARGS="--steps 100"  more options for `make pretrain`, or for pytest in `make test`

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
MESH ?= 8x4
ARGS ?=
PYTHON_GPU ?= python3
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: help pretrain transfer test test-all test-faults test-faults-beside test-faults-alone test-peers test-gpu lint docs format hooks clean
.DELETE_ON_ERROR:

help:
	@echo "make pretrain      train a small ViT on handwritten digits over a mesh of $(MESH); again: resume   (ARGS=\"--help\" lists the options)"
	@echo "make transfer      pre-train on the digits 0 to 4, transfer to 5 to 9: fine-tuning and few shots, with a picture"
	@echo "make test          the fast tests                                                     (ARGS=\"-k attention\" picks some)"
	@echo "make test-all      all tests there are, for hours: every op at every shape compiled, every count, against other libraries"
	@echo "make test-faults   runs that are killed, damaged and starved"
	@echo "make test-gpu      what must hold on a GPU, on the cards of this machine               (PYTHON_GPU=python3: no environment is made)"
	@echo "make test-peers    against torch's ViTs, timm's and transformers', which it installs"
	@echo "make lint          ruff, pyright; changes nothing"
	@echo "make docs          the documentation as a site, in site/; a broken link is an error"
	@echo "make format        ruff's formatter and safe fixes"
	@echo "make hooks         lint before every commit from now on"
	@echo "make clean         remove $(VENV) and caches; runs stay"

pretrain: $(VENV)/.run
	$(BIN)/python -m train.pretrain --mesh $(MESH) $(ARGS)

transfer: $(VENV)/.run
	$(BIN)/python -m train.transfer $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not faults and not peers and not gpu" $(ARGS)

# Everything there is. Each part runs whatever became of those before it, and one that failed fails the whole. XLA_FLAGS is set, even
# if to nothing: tests/conftest.py then leaves XLA's compiler for the CPU as a user has it.
test-all: export XLA_FLAGS := $(XLA_FLAGS)
test-all: $(VENV)/.peers
	@failed=0; for tests in "not faults and not clock and not gpu" "faults and not clock" "clock"; do \
		beside="-n $(WORKERS) --dist loadfile"; [ "$$tests" != clock ] || beside=; \
		echo "+ pytest $$beside -m '$$tests' $(ARGS)"; \
		$(BIN)/python -m pytest $$beside -m "$$tests" $(ARGS) || [ $$? -eq 5 ] || failed=1; \
	done; exit $$failed

# First what runs beside each other, then what watches the clock and wants the machine for itself.
test-faults:
	@$(MAKE) --no-print-directory test-faults-beside
	@$(MAKE) --no-print-directory test-faults-alone

# Exit code 5: ARGS left no test of this part.
test-faults-beside: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "faults and not clock and not slow" $(ARGS) || [ $$? -eq 5 ]

test-faults-alone: $(VENV)/.test
	$(BIN)/python -m pytest -m "faults and clock and not slow" $(ARGS) || [ $$? -eq 5 ]

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -m "peers and not slow" $(ARGS)

# With the machine's own Python, which has the jax that fits its driver (it wants pytest, pytest-timeout and hypothesis beside).
test-gpu:
	VITCORE_TEST_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON_GPU) -m pytest -v $(ARGS) tests/gpu tests/kernels/test_gpu.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --quiet

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# The environment, and a stamp for what is installed in it: a second `make` starts at once. Each includes the ones before it.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found on the PATH: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: '$(PYTHON)' is not Python 3.11 or newer: name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || \
		{ echo "make: '$(PYTHON)' has no venv module: install it (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.run: EXTRA =
$(VENV)/.test: EXTRA = [test]
$(VENV)/.dev: EXTRA = [dev]
$(VENV)/.peers: EXTRA = [peers]
$(VENV)/.peers: ALONE = timm
$(VENV)/.run: HAS = .run
$(VENV)/.test: HAS = .run .test
$(VENV)/.dev: HAS = .run .test .dev
$(VENV)/.peers: HAS = .run .test .peers
$(VENV)/.run $(VENV)/.test $(VENV)/.dev $(VENV)/.peers: $(REQUIREMENTS) | $(BIN)/python
	@echo "Installing vitcore$(EXTRA) into $(VENV); about a minute, once."
	@$(PIP) install -qq -c constraints.txt -e ".$(EXTRA)"
	@$(if $(ALONE),$(PIP) install -qq -c constraints.txt --no-deps $(ALONE))
	@touch $(addprefix $(VENV)/,$(HAS))
