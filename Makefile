# Two commands set everything up: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
# The CPU build where an index or folder of wheels offers one; set TORCH=torch for the newest.
TORCH ?= torch==2.13.0
# Twice quiet: errors, and no warnings about where an index does not have what another has.
PIP = $(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check
RUFF = $(VENV)/bin/ruff
RUFF_CHECK = check --line-length 119 --target-version py310 --select C,E,F,I,W,UP --ignore C901 --config 'lint.isort.lines-after-imports=2'
SOURCES = hf_sparse scripts tests setup.py

.PHONY: demo test slow quality style clean

demo: $(VENV)/.installed
	@$(VENV)/bin/python scripts/demo.py

test: $(VENV)/.installed $(VENV)/.deepspeed
	$(VENV)/bin/python -m pytest

slow: $(VENV)/.installed $(VENV)/.deepspeed
	$(VENV)/bin/python -m pytest -m slow

quality: $(VENV)/.installed
	$(RUFF) $(RUFF_CHECK) $(SOURCES)
	$(RUFF) format --check --line-length 119 --target-version py310 $(SOURCES)

style: $(VENV)/.installed
	$(RUFF) $(RUFF_CHECK) --fix $(SOURCES)
	$(RUFF) format --line-length 119 --target-version py310 $(SOURCES)

$(VENV)/.installed: setup.cfg setup.py
	@echo "Installing into $(VENV): this takes some minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[scripts,test,quality]"
	@touch $@

# Comes as source, and finds its compiled parts when it needs them: none of the tests does.
$(VENV)/.deepspeed: $(VENV)/.installed
	@echo "Installing DeepSpeed, for its tests."
	@$(PIP) --upgrade setuptools wheel
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation "deepspeed>=0.19" || \
		echo "DeepSpeed does not install here: its tests are skipped."
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
