# `make demo` and `make test` create the virtual environment that they need. Rules of style: pyproject.toml.
PYTHON ?= python3
VENV ?= .venv
# The pinned version has a CPU build where an index offers one; TORCH=torch installs the newest.
TORCH ?= torch==2.13.0
# Whether DeepSpeed, for its tests, is tried, required, or left out (no).
DEEPSPEED ?= try
# Processes that run tests.
JOBS ?= 2
# Twice quiet: errors only, no warnings about packages that one of several indexes lacks.
PIP = $(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check
RUFF = $(VENV)/bin/ruff
SOURCES = hf_sparse scripts tests $(wildcard docs/*.py) setup.py

.PHONY: demo test slow quality docs style matrix dist clean

demo: $(VENV)/.usable
	@$(VENV)/bin/python scripts/demo.py

# loadfile: the tests of a file share processes that they start once.
test: $(VENV)/.installed $(VENV)/.deepspeed
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

slow: $(VENV)/.installed $(VENV)/.deepspeed
	$(VENV)/bin/python -m pytest -m slow

quality: $(VENV)/.installed
	$(RUFF) check $(SOURCES)
	$(RUFF) format --check $(SOURCES)
	$(VENV)/bin/mypy

# The site, in site/: nothing is downloaded, and a broken link or an undocumented public name is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

style: $(VENV)/.installed
	$(RUFF) check --fix $(SOURCES)
	$(RUFF) format $(SOURCES)

# What the package and its scripts need.
$(VENV)/.usable: setup.cfg setup.py pyproject.toml
	@echo "Installing into $(VENV), once: it takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@echo "  $(TORCH) (the largest part)"
	@$(PIP) "$(TORCH)"
	@echo "  hf_sparse, and transformers, datasets, accelerate, scikit-learn and what they need"
	@$(PIP) -e ".[scripts]"
	@touch $@

$(VENV)/.installed: $(VENV)/.usable
	@echo "  what the tests, the checks of style and the documentation need"
	@$(PIP) -e ".[scripts,test,quality,docs]"
	@touch $@

# DeepSpeed comes as source and compiles its kernels at first use; no test uses them. Where it fails to install, its
# reason is shown, and the next `make` tries again; DEEPSPEED=no leaves it out.
$(VENV)/.deepspeed: $(VENV)/.installed
ifeq ($(DEEPSPEED),no)
	@echo "DEEPSPEED=no: the tests of DeepSpeed are skipped."
else
	@echo "Installing DeepSpeed for its tests."
	@$(PIP) --upgrade setuptools wheel
	@if DS_BUILD_OPS=0 $(PIP) --no-build-isolation "deepspeed>=0.19"; then touch $@; else \
		echo "DeepSpeed could not be installed, for the reason above: its tests are skipped. To leave it out," \
			"use DEEPSPEED=no; to stop here, use DEEPSPEED=required."; \
		test "$(DEEPSPEED)" != required; \
	fi
endif

# One line for each row; ROWS="newest floors" runs some of them, TESTS="tests/hub" other tests.
matrix: $(VENV)/.installed
	@$(PIP) uv
	@$(VENV)/bin/python scripts/matrix.py $(ROWS) --torch "$(TORCH)" $(if $(TESTS),--tests $(TESTS)) $(MATRIX)

# The files of a release, checked. A small environment of its own: nothing here needs torch.
dist:
	@rm -rf dist
	@test -d $(VENV)/dist || $(PYTHON) -m venv $(VENV)/dist
	@$(VENV)/dist/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(VENV)/dist/bin/python -m build
	$(VENV)/dist/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) runs build dist site .matrix .mypy_cache .pytest_cache .ruff_cache
