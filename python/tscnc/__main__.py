"""`python -m tscnc`, the command `tscnc`."""

import sys

from tscnc.cli import main

if __name__ == "__main__":
    sys.exit(main())
