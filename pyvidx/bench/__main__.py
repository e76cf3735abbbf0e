"""python -m pyvidx.bench COMMAND: the same as pyvidx bench COMMAND."""

import sys

from pyvidx.cli.arguments import ended
from pyvidx.cli.bench import main

if __name__ == "__main__":
    sys.exit(ended("pyvidx bench", lambda: main(sys.argv[1:])))
