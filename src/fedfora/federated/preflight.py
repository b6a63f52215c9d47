"""What a simulation is going to do, and what would keep it from that: all that needs no model.

Nothing heavy is loaded here, so that whoever made a mistake learns of it at once.
"""

from fedfora.data.loading import load_examples
from fedfora.federated.arguments import check_ray
from fedfora.federated.secure_aggregation.graph import MIN_SITES
from fedfora.federated.settings import FederationSettings
from fedfora.federated.sharing import site_names
from fedfora.models.resolve import checked_model_name
from fedfora.reporting.record import check_output_dir
from fedfora.reporting.view import EVALUATED_ROW


def preflight(settings: FederationSettings) -> list[str]:
    """Return the sites' names, once everything that needs no model has been checked."""
    if settings.rounds.resume is None:
        run = settings.run
        check_output_dir(
            run.output_dir,
            overwrite=run.overwrite_output_dir,
            to_resume=f"--resume {run.output_dir}",
        )
    if settings.rounds.engine == "ray":
        check_ray()
    checked_model_name(settings.model)
    names = site_names(settings)
    _check_rounds(settings, len(names))
    if settings.data.test_file is not None:
        load_examples(settings.data.test_file, settings.data)
    return names


def _check_rounds(settings: FederationSettings, num_sites: int) -> None:
    """Raise where no round could have a quorum, or nothing says when to stop early."""
    rounds = settings.rounds
    drawn = settings.federation.clients_per_round or num_sites
    if settings.secure.secure_aggregation and drawn < MIN_SITES:
        raise ValueError(
            f"--secure_aggregation: a round has only {drawn} sites, at least {MIN_SITES} are needed"
        )
    if settings.secure.secure_aggregation and (settings.secure.secagg_min_sites or 0) > drawn:
        raise ValueError(
            f"--secagg_min_sites {settings.secure.secagg_min_sites}: a round has only {drawn} sites"
        )
    if rounds.min_clients > drawn:
        raise ValueError(f"--min_clients {rounds.min_clients}: a round has only {drawn} sites")
    judged = rounds.validation_fraction > 0 or settings.data.test_file is not None
    if rounds.early_stopping_patience is not None and not judged:
        raise ValueError("--early_stopping_patience needs --validation_fraction or --test_file")


def work_of(settings: FederationSettings) -> float:
    """Return the work of a simulation, in optimizer steps, for the view's total."""
    federation = settings.federation
    sites = federation.clients_per_round or len(site_names(settings))
    rounds = federation.num_rounds
    evaluations = -(-rounds // federation.eval_rounds)
    rows = num_test_rows(settings)
    return rounds * sites * federation.local_steps + evaluations * rows * EVALUATED_ROW


def num_test_rows(settings: FederationSettings) -> int:
    """Return how many rows an evaluation answers."""
    if settings.data.test_file is None:
        return 0
    rows = load_examples(settings.data.test_file, settings.data)
    return len(rows[: settings.evaluation.max_eval_samples])
