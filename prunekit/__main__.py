"""`python -m prunekit`, for launchers that start modules."""

import sys

from prunekit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
