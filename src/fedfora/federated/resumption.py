"""`--resume DIRECTORY`: the settings of a run, from its own config.yaml, all unchanged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from fedfora.config import ConfigError, ConfigParser
from fedfora.federated.settings import SECTIONS, FederationSettings

MAY_DIFFER = {"output_dir", "overwrite_output_dir", "resume"}


def resolve_settings(argv: Sequence[str], parser: ConfigParser) -> FederationSettings:
    """Return the settings that are meant: those typed, or those of the run to go on with.

    Args:
        argv: What was typed.
        parser: Of all sections of a federation.

    Raises:
        ConfigError: If there is no such run, or something typed is not what it began with.
    """
    typed = FederationSettings(*parser.parse(argv))
    directory = typed.rounds.resume
    if directory is None:
        return typed
    stored = _stored(Path(directory))
    began = FederationSettings(*parser.parse_mapping(stored))
    asked = FederationSettings(*parser.parse(argv, defaults=stored))
    _check_unchanged(directory, began, asked)
    return replace(
        began,
        run=replace(began.run, output_dir=directory),
        rounds=replace(began.rounds, resume=directory),
    )


def _stored(directory: Path) -> dict[str, object]:
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--resume {directory}: no run to go on with, there is no config.yaml")
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(sections, dict) or not set(sections) <= set(SECTIONS):
        raise ConfigError(f"--resume {directory}: {path} is not that of a federation")
    return {name: value for section in sections.values() for name, value in section.items()}


def _check_unchanged(directory: str, began: FederationSettings, asked: FederationSettings) -> None:
    for section in SECTIONS:
        for name, value in vars(getattr(began, section)).items():
            wanted = getattr(getattr(asked, section), name)
            if name not in MAY_DIFFER and wanted != value:
                raise ConfigError(
                    f"--resume {directory}: the run began with --{name} {value}, not {wanted}; "
                    "leave it out, or start a new run"
                )
