# Set-up and runs of the suite. make itself ends with status 2 whatever failed; the line before it names the real one.

# A thread for each process that computes, unless the user chose another number: those of libgomp spin while they wait.
export OMP_NUM_THREADS ?= 1

# PYTHON, from the environment or the command line, names the interpreter; without it the first of these that is new enough.
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
VENV_PYTHON := .venv/bin/python
PYTEST := $(VENV_PYTHON) -m pytest -m "not slow"

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):[^#]*## /make \1\t/p' Makefile | expand -t 16

# Without ARGS, which are about this machine's run, the kernels of every other GPU are built first.
verify: setup  ## set up, build for every GPU, verify this machine: make verify ARGS="--phase 4" only verifies
	@built=0; $(if $(ARGS),:,$(VENV_PYTHON) -m verify compile) || built=$$?; \
	    $(VENV_PYTHON) -m verify run $(ARGS) && exit $$built

# Without ARGS: the checks as `verify` runs them, where a soft failure fails too, and then the other tests, a file at a time
# in each process, so that what a file sets up is set up once.
TESTS := -n auto --dist loadfile --no-loadscope-reorder --durations-to=reports/durations.json verify/tests triattention/tests
test: setup  ## set up, then run the whole test suite: make test ARGS="-k oracle"
	@checked=0; $(if $(ARGS),:,$(VENV_PYTHON) -m verify run -m "not slow" --strict-soft) || checked=$$?; \
	    $(PYTEST) $(or $(ARGS),$(TESTS)) && exit $$checked

screenshots: setup  ## pictures of every page of the reports, light and dark, in reports/screenshots
	@$(VENV_PYTHON) -m verify report --format html --out reports/site || [ $$? -eq 5 ]
	@$(VENV_PYTHON) -m verify.tests.browser reports/screenshots reports/site

setup:  ## make .venv ready, or repair it; does nothing where it is
	@for python in $(PYTHONS); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        exec "$$python" ci/bootstrap.py; \
	    fi; \
	done; \
	echo "setup: none of these is Python 3.11 or newer: $(PYTHONS); run: apt-get install python3 python3-venv" \
	    "(or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12)" >&2; \
	exit 3

.PHONY: help verify test screenshots setup
