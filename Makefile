# make tutorial, make test: on a fresh machine each creates .venv, installs and runs.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
KEY    ?= scores/dot_product
export OPENBLAS_NUM_THREADS ?= 1
export OMP_NUM_THREADS ?= 2
export NUMBA_NUM_THREADS ?= 2
export PYTHONDONTWRITEBYTECODE ?= 1

.PHONY: help tutorial test test-long oracles docs docs-quick tutorials golden mutants calibrate \
        bench gpu style new verify clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# One stamp file for each set of extras; it is made again when the metadata changes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(VENV)/bin/python setup.cfg pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

tutorial: $(VENV)/.installed-tutorials  ## run one tutorial: make tutorial KEY=family/slug
	$(PY) tutorials/$(KEY).py

tutorials: $(VENV)/.installed-tutorials  ## run every tutorial whose result is stale
	$(PY) -m attention_ref.kit.tutorials $(if $(ALL),--all,)

test: $(VENV)/.installed-test  ## the whole test suite
	$(PY) -m pytest -n 2 --dist loadfile -q

test-long: $(VENV)/.installed-test  ## the suite with every slow test and many more examples
	$(PY) -m pytest -n 2 --dist loadfile -q --long

oracles: $(VENV)/.installed-oracles  ## install what the oracle tests compare with

verify: $(VENV)/.installed-test  ## run the checks of every method (or KEY=) and record them
	$(PY) -m attention_ref verify $(if $(filter command line,$(origin KEY)),$(KEY),)

golden: $(VENV)/.installed-test  ## rewrite golden files that no longer hold (or KEY=)
	$(PY) -m attention_ref golden write $(if $(filter command line,$(origin KEY)),$(KEY),)

calibrate: $(VENV)/.installed-test  ## measure the bounds of every method again (or KEY=)
	$(PY) -m attention_ref golden calibrate $(if $(filter command line,$(origin KEY)),$(KEY),)

mutants: $(VENV)/.installed-test  ## break one method in every way and see which tests notice
	$(PY) tests/mutants.py $(KEY) $(if $(BY),--by $(BY),)

bench: $(VENV)/.installed-oracles  ## ratios against other libraries, in one run
	$(PY) -m attention_ref bench

gpu:  ## the GPU suite, where there is a GPU (with .venv when it exists)
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m pytest -q tests/gpu -rs

docs-quick: $(VENV)/.installed-docs  ## build the pages from what is there
	$(PY) -m sphinx -b html -n -W --keep-going -q docs docs/_build/html
	$(PY) docs/check_pages.py docs/_build/html
	@echo "docs/_build/html/index.html"

docs: tutorials docs-quick  ## stale figures first, then the pages

style: $(VENV)/.installed-style  ## ruff and the house rules
	$(PY) -m ruff check .
	$(PY) -m ruff format --check attention_ref/core attention_ref/engine attention_ref/kit
	$(PY) tests/style.py

new: $(VENV)/.installed-test  ## stubs of a row: make new FAMILY=scores SLUG=alibi
	$(PY) -m attention_ref new $(FAMILY)/$(SLUG)

clean:  ## remove what was built, not what was drawn
	rm -rf docs/_build docs/methods docs/gallery .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -exec rm -rf {} +
