"""``python -m rsengine COMMAND``: the same as the console script ``rsengine``."""

import sys

from rsengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
