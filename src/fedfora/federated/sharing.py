"""The sites of a simulated federation: which rows each of them has."""

from fedfora.data.loading import Example, load_chosen
from fedfora.data.partition import partition
from fedfora.federated.settings import FederationSettings
from fedfora.seeds import derive_seed

SITES_DIR = "sites"  # directory of a run in which each site keeps what is its own


def site_names(settings: FederationSettings) -> list[str]:
    """Return the names of the sites that the partition makes.

    Raises:
        ValueError: If the rows cannot be read or shared out so, or more sites are to be drawn for a
            round than there are.
    """
    _, parts = partition_sites(settings)
    drawn = settings.federation.clients_per_round
    if drawn is not None and drawn > len(parts):
        raise ValueError(f"--clients_per_round {drawn}: there are only {len(parts)} sites")
    if settings.data.canaries and settings.data.canary_site >= len(parts):
        raise ValueError(
            f"--canary_site {settings.data.canary_site}: there are only {len(parts)} sites, "
            "counted from 0"
        )
    return list(parts)


def partition_sites(settings: FederationSettings) -> tuple[list[Example], dict[str, list[int]]]:
    """Return all rows, and the numbers of each site's rows by its name.

    Raises:
        ValueError: If the rows cannot be read, or shared out so.
    """
    examples = load_chosen(settings.data.train_file, settings.data, flag="--train_file")
    federation = settings.federation
    parts = partition(
        examples,
        federation.partition,
        num_clients=federation.num_clients,
        seed=derive_seed(settings.train.seed, "partition"),
    )
    return examples, parts
