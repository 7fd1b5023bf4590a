"""`python -m loadtest`, which is what `make loadtest` runs. Everything is in `loadtest.load.command`."""

import sys

from loadtest.load.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
