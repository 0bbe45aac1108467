"""The import rules of pyproject.toml, as `python -m tests.imports`."""

import sys

from importlinter.cli import lint_imports

if __name__ == "__main__":
    sys.exit(lint_imports())
