# Everything runs in .venv, made by the first target that needs it. `make` alone does that and no more.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Python keeps what it compiles: a command begins a fifth sooner.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart check test test-all sanitize clients peers clean help

install: $(STAMP)  ## make .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install  ## build recipe `quickstart` (nothing, if it is built) and generate text from the artifact
	$(BIN)/doit build recipe=quickstart
	$(BIN)/furiosa-build generate artifacts/quickstart/latest --prompt "It is a truth universally acknowledged, that" --seed 4 --max-tokens 96

check: install  ## format, lint, types and the floors that packages import from
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install  ## every test but the grids, on all cores: some 11 minutes on two
	$(BIN)/pytest -n auto -m "not grid"

test-all: test clients  ## the tests, then the grids: checks repeated over many models and settings, and standard clients
	$(BIN)/pytest -n auto -m grid

sanitize: install  ## the kernels' tests under AddressSanitizer and UBSan; those of products, attention and rows under ThreadSanitizer
	@for name in libasan.so libubsan.so libtsan.so; do \
	  test -e "$$($${CXX:-g++} -print-file-name=$$name)" || { echo "$$name is missing: it comes with g++" >&2; exit 1; }; \
	done
	$(BIN)/pytest tests/test_backends/test_native/test_sanitizers.py
	FURIOSA_TEST_KERNEL_OPTIONS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" $(BIN)/pytest --capture=sys -m "not grid" \
	  --ignore tests/test_backends/test_native/test_build_library.py tests/test_backends/test_native
	FURIOSA_TEST_THREADS=4 FURIOSA_TEST_KERNEL_OPTIONS="-O1 -fsanitize=thread" TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
	setarch -R env LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libtsan.so)" $(BIN)/pytest --capture=sys -m "not grid" -k "not emulated" \
	  $(addprefix tests/test_backends/test_native/test_,linear.py linear_groups.py attention.py rows.py)

clients: install  ## make .venv-clients, where test-all has the clients that it runs against the server
	tests/test_server/clients/install.sh $(BIN)/python .venv-clients

peers: install  ## make .venv-peers, where benchmarks/peers.py has the engines that it compares with
	benchmarks/peer_programs/install.sh $(BIN)/python .venv-peers

clean:  ## remove .venv and artifacts
	rm -rf $(VENV) artifacts

help:  ## list these targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
