# make train   sets up .venv and trains a ResNet on handwritten digits: 2 pipelines x 2 stages on this machine
# make test    sets up .venv and runs the tests
# make test-all   and the long ones among them: a minute of chaos under every synchroniser, and more
# make check   formatting, lint, types
# make bench   the benchmarks of docs/benchmarks.md
# make clean   removes .venv and caches; results (runs, out, checkpoints) stay
#
# PYTHON=python3.12 chooses the Python that .venv is made with; VENV=DIR another place for it;
# TRAIN_ARGS='...' other arguments for train_resnet.py; TEST_ARGS='-k mpi' for pytest.

PYTHON ?= python3
VENV ?= .venv
TRAIN_ARGS ?= --dataset digits --placement local_2x2 --pipeline pipedream --batch-size 32 \
    --learning-rate 0.03 --lr-schedule cosine --epochs 5
TEST_ARGS ?=

STAMP := $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: train test test-all check bench clean env host
.DELETE_ON_ERROR:

train: env
	heturun -c config/local.yml python3 train_resnet.py $(TRAIN_ARGS)

test: env host
	python3 -m pytest $(TEST_ARGS)

test-all: export HETURUN_THOROUGH = 1
test-all: export HETURUN_CHAOS_S ?= 60
test-all: test

check: env
	ruff format --check .
	ruff check .
	mypy

bench: env
	python3 bench/transport.py
	python3 bench/pipeline.py
	python3 bench/coordinator.py
	python3 bench/hetero.py
	python3 bench/chaos.py
	python3 bench/survival.py
	python3 bench/gpu.py

env: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(VENV)/bin/python3 || $(PYTHON) -m venv $(VENV) || \
	    { echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(VENV)/bin/python3 -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	@touch $@

# The tests of two hosts need sshd and ip, and a root who may make network namespaces; without them they are skipped.
host:
	@if [ "$$(id -u)" = 0 ]; then \
	    if ! { [ -x /usr/sbin/sshd ] && command -v ip >/dev/null; } && command -v apt-get >/dev/null; then \
	        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq openssh-server iproute2; } \
	            || echo "make: no sshd or ip could be installed: the tests of two hosts will be skipped" >&2; \
	    fi; \
	    mkdir -p /run/sshd; \
	fi

clean:
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || \
	    { echo "make: VENV=$(VENV) is no virtual environment, so it stays; remove it by hand" >&2; exit 1; }
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
