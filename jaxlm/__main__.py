"""`python -m jaxlm` is the same as the `jaxlm` command."""

import sys

from jaxlm.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
