"""`python -m fedfora` is the same as `fedfora`."""

import sys

from fedfora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
