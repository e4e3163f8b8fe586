"""`python -m plugins.aot`: the command line of `plugins.aot.build`."""

import sys

from plugins.aot.build import main

if __name__ == "__main__":
    sys.exit(main())
