# Two commands matter on a fresh machine: make demo, make test. Both make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and alone: the pinned version has a CPU build, and nothing later may ask for another.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-experiments lint format bench freeze clean

demo: $(VENV)/.installed  ## compare four token mixers on the embedded corpus, about seven minutes with the install
	$(BIN)/newllm compare --out runs/demo

test: $(VENV)/.installed-test  ## every test
	$(BIN)/python -m pytest -n 2

test-experiments: $(VENV)/.installed-test  ## the command of every experiment with a budget of 20,000 tokens: about eight minutes
	$(BIN)/python -m pytest -n 2 -m experiments

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## against Hugging Face's models on this machine; nothing else should run
	$(BIN)/newllm bench train
	$(BIN)/newllm bench decode
	$(BIN)/newllm bench memory

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

freeze: $(VENV)/.installed-test  ## pin what is installed now
	{ echo '# Every version of a full install (make demo, make test). Regenerate: make freeze'; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

clean:
	rm -rf $(VENV) runs
