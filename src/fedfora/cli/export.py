"""fedfora export: write an adapter in a form that other programs load, and check it.

fedfora export --model_dir out/adapter --output_dir out/lora
fedfora export --model_dir out/adapter --format merged --output_dir out/merged
"""

from collections.abc import Sequence

from fedfora.cli.console import announce_loading, silence_libraries
from fedfora.config import ConfigParser
from fedfora.exporting.settings import SECTIONS, ExportSettings, check_place


def run(argv: Sequence[str]) -> None:
    """Parse, export, and print how much the result differs from its source."""
    parser = ConfigParser(SECTIONS.values(), description=__doc__)
    given = parser.values(argv)
    settings = ExportSettings(frozenset(given), *parser.build(given))
    silence_libraries()
    check_place(settings)
    announce_loading("export")
    from fedfora.exporting.run import export

    print("\n".join([*export(settings), f"written: {settings.export.output_dir}"]))
