"""What `fedfora site` becomes once the kit is checked: a supervisor that needs little memory."""

import sys

from fedfora.cli.saying import say
from fedfora.deployment.kit import read_site_kit
from fedfora.deployment.site import run_site


def main(directory: str) -> int:
    """Run the processes of the site whose kit lies in a directory; return the exit status."""
    try:
        run_site(read_site_kit(directory, flags=False), say)
    except ValueError as error:
        print(f"fedfora site: error: {error}", file=sys.stderr)
        return 2
    say("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
