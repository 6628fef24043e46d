"""Runs `python -m hashvision`, the same as the command `hashvision`."""

import sys

from hashvision.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
