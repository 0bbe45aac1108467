"""`python -m common`: see common/cli.py."""

from common.cli import main

if __name__ == "__main__":
    main()
