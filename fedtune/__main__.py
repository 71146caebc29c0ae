"""`python -m fedtune`: the same as the command."""

import sys

from fedtune.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
