# Everything here works on a fresh machine that has python3 (3.11 or newer), make and git.
# The .venv is made from requirements.lock by the first target that needs it, and again when the lock changes.

PYTHON ?= python3
BIN := .venv/bin
PACKAGES := .venv/.packages
READY := .venv/.ready

# Bytecode is wanted: without it every start of Python compiles scikit-learn anew, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo lab test bench format readme lock clean
.DELETE_ON_ERROR:

help:  ## List the targets (the default)
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(READY)  ## Make .venv with the exact packages of requirements.lock, and nbprod itself

demo: $(READY)  ## The whole way on real flights, in the folder demo: train, sweep, promote, serve, report
	$(BIN)/nbprod demo demo
	@echo "or, from here:" && echo "  make lab"

lab: $(READY)  ## Open JupyterLab in the demo's project, with its service running
	@test -d demo || $(MAKE) demo
	$(BIN)/nbprod lab demo --traffic 40

test: $(READY)  ## Run every notebook, every test and every check of the repository
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(READY)  ## Run the benchmarks, one after the other
	@for file in benchmarks/*.py; do echo "== $$file" && $(BIN)/python $$file || exit 1; done

format: $(READY)  ## Format notebooks and code, then export the notebooks to nbprod/
	$(BIN)/ruff check --quiet --fix-only . nbprod/templates
	$(BIN)/ruff format --quiet . nbprod/templates
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-clean --fname nbprod/templates
	$(BIN)/nbdev-export

readme: $(READY)  ## Write README.md from nbs/index.ipynb
	$(BIN)/python scripts/readme.py

# Without the extra xgboost: `dev` has xgboost-cpu in its place, the same module without its GPU libraries.
lock: $(READY)  ## Bring requirements.lock up to settings.ini (UPGRADE=1: and every package to its newest)
	@touch setup.py  # by whose time uv knows whether its requirements have changed
	$(BIN)/uv pip compile setup.py --extra demo --extra dev --extra dask --extra lightgbm --extra optuna \
	    --extra postgres --extra s3 --extra tracing --universal --python-version 3.11 \
	    --generate-hashes --quiet $(if $(UPGRADE),--upgrade) --custom-compile-command "make lock" -o requirements.lock

clean:  ## Remove what the other targets made: .venv, demo, .nbprod and the tools' caches
	rm -rf .venv demo .nbprod build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip fetches uv alone, the version and the hashes being the lock's; uv installs the rest of the lock.
$(PACKAGES): requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	    "nbprod needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 install" % v[:2])'
	$(PYTHON) -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode requirements.lock
	@touch $@

# compat: the .venv gets a plain .pth line, which costs no time when Python starts.
$(READY): $(PACKAGES) setup.py settings.ini
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@
