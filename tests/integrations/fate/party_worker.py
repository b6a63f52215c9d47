"""One party in a process of its own, which leaves what it sent and got in each round.

usage: party_worker.py DUMP_DIR DIE_AFTER_ROUND FLAGS...
"""

import logging
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from fedfora.config import ConfigParser
from fedfora.integrations.fate.party import run_party
from fedfora.integrations.fate.settings import SECTIONS, FateSettings
from fedfora.reporting.view import View


def main(dump_dir, die_after_round, words):
    logging.disable(logging.WARNING)

    def dump(report):
        Path(dump_dir).mkdir(parents=True, exist_ok=True)
        save_file(report.sent, f"{dump_dir}/sent-{report.round}.safetensors")
        save_file(report.averaged, f"{dump_dir}/averaged-{report.round}.safetensors")
        if report.round == die_after_round:
            os._exit(9)  # as a killed process ends: without a word

    settings = FateSettings(*ConfigParser(SECTIONS.values()).parse(words))
    run_party(settings, View(1), on_round=dump)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    except ValueError as error:
        sys.exit(f"error: {error}")
