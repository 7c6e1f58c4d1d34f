"""`python -m itprune.cli`: the command where no script is installed."""

import sys

from itprune.cli import main

sys.exit(main())
