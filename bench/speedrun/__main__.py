"""``python -m bench.speedrun``: see :mod:`bench.speedrun.run`."""

import sys

from bench.speedrun.run import main

if __name__ == "__main__":
    sys.exit(main())
