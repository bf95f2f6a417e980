# make verify and make test need nothing done before: scripts/setup sees to it.
BIN := .venv/bin
GUEST ?= debian-12
# Unit tests run side by side, guests one after another: two software processors want two real ones.
UNIT := -m 'not guest' -n auto --dist worksteal

export PYTHON

.PHONY: help verify test check bench fuzz checks docs test-matrix setup setup-dev clean
.DEFAULT_GOAL := help

help:
	@echo 'make verify       prove what works in a stock Debian 12 kernel (GUEST=debian-13: another)'
	@echo 'make test         style, types and every test; guest tests on the Debian 12 cloud kernel'
	@echo 'make check        the same without guest tests: needs no KVM and no rig'
	@echo 'make test-matrix  guest tests on the kernels of Debian 11, 12, 13 and sid'
	@echo 'make setup        only set up; hvhost is then .venv/bin/hvhost'
	@echo 'make bench        measure; prints a table and writes bench-results.json'
	@echo 'make fuzz         fuzz every protocol module for a minute each'
	@echo 'make checks       take out one check after another; a test must fail (MODULES=vmbus/ring.py)'
	@echo 'make docs         write anew what the docs take from the program'
	@echo 'make clean        remove what the others made in this directory'

verify: setup
	$(BIN)/hvhost verify --guest $(GUEST)

test: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest $(UNIT) --durations=10
	$(BIN)/pytest -m guest --durations=10

check: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest $(UNIT)

# It takes hours, and its waits fit a busy computer, so two guests run at a time. The first one named
# is that of tests for which one guest is enough.
test-matrix: setup-dev
	HVHOST_TEST_GUESTS=debian-12,debian-11,debian-13,sid HVHOST_TEST_FULL=debian-12-full \
		$(BIN)/pytest -m guest -n 2 --dist worksteal --durations=30

bench: setup-dev
	$(BIN)/python -m bench

FUZZ_SECONDS ?= 60
FUZZ := -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/ -verbosity=0
# A few dozen inputs a second are too few to let them grow from one byte on.
FUZZ += -len_control=0 -max_len=2048 -print_final_stats=1
fuzz: setup-dev
	$(BIN)/python -m pip --quiet install -e '.[fuzz]'
	for target in fuzz/fuzz_*.py; do \
		echo "$$target" && $(BIN)/python $$target $(FUZZ) || exit 1; \
	done

checks: setup-dev
	PYTHONPATH=tests $(BIN)/python -m checks $(MODULES)

docs: setup-dev
	$(BIN)/python docs/generate.py

setup:
	@scripts/setup

setup-dev:
	@scripts/setup dev

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
