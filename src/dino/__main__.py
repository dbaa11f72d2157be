"""``python -m dino`` and the command ``dino``."""

import sys

from dino.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
