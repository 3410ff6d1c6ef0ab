"""Runs the command line as `python -m accumtune`, where the folder of scripts is not on the PATH."""

import sys

from accumtune.cli import main

sys.exit(main())
