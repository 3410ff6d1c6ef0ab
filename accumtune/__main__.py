"""`python -m accumtune`: the command line, where the folder of scripts is not on the PATH."""

import sys

from accumtune.cli import main

sys.exit(main())
