"""Run as a program: commands one after another, and what each had loaded when it first spoke.

    python startup_probe.py '[["train", "--nonsense"], ...]'

A command is stopped at its first line, on whichever stream. Prints a list with, for each command,
that line and the heavy packages that were loaded then.
"""

import json
import sys

from fedfora.cli.main import main

HEAVY = ("torch", "transformers", "peft", "trl", "flwr", "datasets", "bitsandbytes", "pandas")


class FirstLine(BaseException):
    """Somebody has said something."""


class Listener:
    """A stream that takes a line and stops whoever wrote it."""

    encoding = "utf-8"

    def __init__(self):
        self.said = ""

    def isatty(self):
        return False

    def flush(self):
        pass

    def write(self, text):
        self.said += text
        if "\n" in self.said:
            raise FirstLine(self.said.strip())


def first_line(words):
    streams, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), Listener(), Listener()
    try:
        main(words)
    except FirstLine as line:
        return str(line), [name for name in HEAVY if name in sys.modules]
    finally:
        sys.stdout, sys.stderr = streams
    return "", []


if __name__ == "__main__":
    print(json.dumps([first_line(words) for words in json.loads(sys.argv[1])]))
