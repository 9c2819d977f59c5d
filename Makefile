# Every target works from a bare clone: the first one to run sets up .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test test-asan test-arm bench bench-network bench-load lint format pair evaluate clean

demo: .venv/.installed
	$(BIN)/ugsd-fast demo --report demo-report.html

test: .venv/.installed
	$(BIN)/python -m pytest -q

# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, no Python involved.
test-asan:
	$(MAKE) -C csrc/tests asan

# The C++ tests cross-compiled for AArch64 and run under qemu-user; Debian: g++-aarch64-linux-gnu qemu-user.
test-arm:
	$(MAKE) -C csrc/tests arm

bench: .venv/.installed
	$(BIN)/python -m bench.run

# Captions over a shaped link between two network namespaces (root, Linux; some 15 minutes), and one server under load
# (some 6 minutes); each writes docs/network.md anew.
bench-network: .venv/.installed
	$(BIN)/python -m bench.network.latency --json bench/results/network.json
	$(BIN)/python -m bench.network.document

bench-load: .venv/.installed
	$(BIN)/python -m bench.network.load --json bench/results/load.json
	$(BIN)/python -m bench.network.document

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Regenerates the embedded pair, its data included, from seeds: about an hour on two cores.
pair: .venv/.installed
	$(PIP) install -q -c constraints.txt -r examples/embedded_pair/requirements.txt
	$(BIN)/python -m examples.embedded_pair.run_all

# Decodes the held-out splits anew with the shipped pair and rewrites its tables.
evaluate: .venv/.installed
	$(PIP) install -q -c constraints.txt -r examples/embedded_pair/requirements.txt
	$(BIN)/python -m examples.embedded_pair.evaluate

.venv/.installed: constraints.txt pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch setuptools pybind11 ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev,triton]'
	touch $@

clean:
	rm -rf .venv build ugsd_fast.egg-info ugsd_fast/_C*.so ugsd_fast/_cuda*.so
