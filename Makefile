# Everything runs from here: `make year` (the main job) and `make test` need no preparation but Python 3.11 or newer.
# Without make, see "Without make" in README.md: the same commands in plain pip and python.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(if $(filter Windows_NT,$(OS)),$(VENV)/Scripts,$(VENV)/bin)
STAMP  := $(VENV)/.installed
SIZE   ?= small

.PHONY: year test anywhere notebooks gallery clean help
help:
	@echo "make year       set up if needed, fetch the texts, run every finished month, write runs/report.html"
	@echo "make test       set up if needed, run every check: lint, import rules, tests, notebooks, gallery, links"
	@echo "make anywhere   repeat what numbers decide under settings that stand in for other processors; an hour"
	@echo "make notebooks  execute every notebook again, in place, in a clean kernel"
	@echo "make gallery    measure the failure gallery and rewrite gallery.csv"
	@echo "make clean      delete runs/ and the virtual environment"

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or newer is needed; '$(PYTHON)' is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "== setting up $(VENV): about 2 GB of packages, a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(STAMP)

year: $(STAMP)
	@echo "== the year, size $(SIZE): each finished month in order; unchanged months are skipped"
	@$(BIN)/python -m common year --size $(SIZE)

test: $(STAMP)
	@$(BIN)/python -m tests

anywhere: $(STAMP)
	@$(BIN)/python -m tests anywhere

notebooks: $(STAMP)
	@$(BIN)/python -m tests notebooks

gallery: $(STAMP)
	@$(BIN)/python -m common gallery --write

clean:
	rm -rf runs $(VENV)
