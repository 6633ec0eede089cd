"""``python -m rsengine.data SOURCE --out DIR``: the conversion, where there is no checkout with data/convert.py."""

import sys

from rsengine.data.convert import main

if __name__ == "__main__":
    sys.exit(main())
