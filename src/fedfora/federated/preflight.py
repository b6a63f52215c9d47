"""What a simulation is going to do, and what would prevent it: everything that needs no model.

Nothing heavy is loaded here, so that a mistake is reported at once.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfora.config import ConfigError, ConfigParser, read_yaml, refuse
from fedfora.data.loading import Example, load_chosen, load_examples
from fedfora.data.partition import partition
from fedfora.federated.secure_aggregation.messages import MIN_SITES
from fedfora.federated.settings import NO_EFFECT, SECTIONS, FederationSettings
from fedfora.models.resolve import check_start, check_targets, checked_model_name
from fedfora.privacy.settings import noise_of
from fedfora.registry import counted
from fedfora.reporting.record import check_output_dir
from fedfora.reporting.trackers import check_trackers
from fedfora.reporting.view import EVALUATED_ROW
from fedfora.seeds import derive_seed
from fedfora.training.settings import check_device, planned_release


def preflight(
    settings: FederationSettings, own_rows: dict[str, int] | None = None
) -> dict[str, int]:
    """Return each site's number of rows, after checking everything that needs no model.

    Sites that bring Trainers of their own have `own_rows`.
    """
    if settings.rounds.resume is None:
        run = settings.run
        check_output_dir(
            run.output_dir,
            overwrite=run.overwrite_output_dir,
            to_resume=f"--resume {run.output_dir}",
        )
    check_trackers(settings.rounds.report_to)
    check_device(settings.train, settings.model.device)
    if own_rows is None:
        checked_model_name(settings.model)
        check_targets(settings.model, settings.adapter.target_modules)
        check_start(settings.adapter)
    rows = site_rows(settings) if own_rows is None else own_rows
    _check_rounds(settings, len(rows))
    scored_rows(settings)
    privacy, federation = settings.privacy, settings.federation
    for count in sorted(set(rows.values())) if privacy.privacy_unit == "record" else ():
        planned_release(settings.train, privacy, count, federation.total_steps)
    if privacy.privacy_unit == "site":
        noise_of(privacy, count=federation.num_rounds)
    return rows


def _check_rounds(settings: FederationSettings, num_sites: int) -> None:
    """Raise if no round could have a quorum, or nothing says when to stop early."""
    rounds = settings.rounds
    num_sampled = settings.federation.clients_per_round or num_sites
    if num_sampled > num_sites:
        raise ValueError(f"--clients_per_round {num_sampled}: only {counted(num_sites, 'site')}")
    secure, only = settings.secure, f"a round has only {counted(num_sampled, 'site')}"
    judged = rounds.validation_fraction > 0 or settings.data.test_file is not None
    refuse(
        (
            secure.secure_aggregation and num_sampled < MIN_SITES,
            f"--secure_aggregation: {only}, at least {MIN_SITES} are needed",
        ),
        (
            secure.secure_aggregation and (secure.secagg_min_sites or 0) > num_sampled,
            f"--secagg_min_sites {secure.secagg_min_sites}: {only}",
        ),
        (rounds.min_clients > num_sampled, f"--min_clients {rounds.min_clients}: {only}"),
        (
            rounds.early_stopping_patience is not None and not judged,
            "--early_stopping_patience needs --validation_fraction or --test_file",
        ),
    )


def work_of(settings: FederationSettings, num_sites: int = 0) -> float:
    """Return the work of a simulation and its comparison, in optimizer steps: the view's total."""
    federation, arms = settings.federation, settings.federation.compare
    rows, num_sites = len(scored_rows(settings)), num_sites or len(site_rows(settings))
    sampled = federation.clients_per_round or num_sites
    steps = federation.total_steps * sampled
    evaluations = -(-federation.num_rounds // federation.eval_rounds)
    if arms:  # a site alone repeats its steps, central training repeats those of all
        trainings = num_sites * (("alone" in arms) + ("central" in arms))
        steps += trainings * federation.total_steps
        evaluations += 1 + num_sites * ("alone" in arms) + ("base" in arms) + ("central" in arms)
    return steps + evaluations * rows * EVALUATED_ROW


# `--resume DIRECTORY`: the settings of a run, from its own config.yaml, all unchanged.

MAY_DIFFER = {"output_dir", "overwrite_output_dir", "resume"}


def resolve_settings(values: Mapping[str, Any], parser: ConfigParser) -> FederationSettings:
    """Return the effective settings: those given, or those of the run to resume.

    Raises:
        ConfigError: If there is no such run, or an option differs from what it began with.
    """
    given = FederationSettings(*parser.build(values))
    directory = given.rounds.resume
    if directory is None:
        return given
    stored = parser.typed(_stored(Path(directory)))
    began = FederationSettings(*parser.build(stored))
    requested = FederationSettings(*parser.build({**stored, **values}))
    _check_unchanged(directory, began, requested)
    return replace(
        began,
        run=replace(began.run, output_dir=directory),
        rounds=replace(began.rounds, resume=directory),
    )


def _stored(directory: Path) -> dict[str, object]:
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--resume {directory}: no run to resume; config.yaml is missing")
    sections = read_yaml(path, f"--resume {directory}: ")
    known = isinstance(sections, dict) and set(sections) <= set(SECTIONS)
    if not known or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigError(f"--resume {directory}: {path} does not belong to a federation")
    flat = {name: value for section in sections.values() for name, value in section.items()}
    return {name: value for name, value in flat.items() if name not in NO_EFFECT}


def _check_unchanged(
    directory: str, began: FederationSettings, requested: FederationSettings
) -> None:
    for section in SECTIONS:
        for name, value in vars(getattr(began, section)).items():
            value_now = getattr(getattr(requested, section), name)
            if name not in MAY_DIFFER and value_now != value:
                raise ConfigError(
                    f"--resume {directory}: the run began with --{name} {value}, not {value_now}; "
                    "leave it out, or start a new run"
                )


# The sites of a simulated federation: which rows each of them has.

SITES_DIR = "sites"  # directory of a run where each site keeps its own files


def site_rows(settings: FederationSettings) -> dict[str, int]:
    """Return the sites that the partition makes: their names, and how many rows each has.

    Raises:
        ValueError: If rows cannot be read or partitioned, or there is no site for canaries.
    """
    _, parts = partition_sites(settings)
    if settings.data.canaries and settings.data.canary_site >= len(parts):
        raise ValueError(
            f"--canary_site {settings.data.canary_site}: only {counted(len(parts), 'site')}, "
            "counted from 0"
        )
    return {name: len(rows) for name, rows in parts.items()}


def scored_rows(settings: FederationSettings) -> list[Example]:
    """Return the common test rows; none if no file was named; raise if they cannot be read."""
    if settings.data.test_file is None:
        return []
    examples = load_examples(settings.data.test_file, settings.data)
    return examples[: settings.evaluation.max_eval_samples]


def partition_sites(settings: FederationSettings) -> tuple[list[Example], dict[str, list[int]]]:
    """Return all rows, and the numbers of each site's rows by its name.

    Raises:
        ValueError: If the rows cannot be read, or partitioned.
    """
    examples = load_chosen(settings.data.train_file, settings.data, flag="--train_file")
    federation = settings.federation
    parts = partition(
        examples,
        federation.partition,
        num_clients=federation.num_clients,
        seed=derive_seed(settings.train.seed, "partition"),
        min_rows=federation.min_rows_per_site,
    )
    return examples, parts
