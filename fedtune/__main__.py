"""`python -m fedtune`: the command line."""

import sys

from fedtune.commands.main import main

sys.exit(main())
