"""One data set to one per client: `iid`, `by-column:COLUMN`, `dirichlet:COLUMN:ALPHA`."""

from typing import Any

from fedfora.data.loading import DataError, Example
from fedfora.registry import counted

JOINED = "small sites"
FORMS = "iid, by-column:COLUMN, dirichlet:COLUMN:ALPHA"


def partition(
    examples: list[Example], how: str, *, num_clients: int | None, seed: int, min_rows: int = 1
) -> dict[str, list[int]]:
    """Return the row indices of every client, by the client's name.

    Args:
        examples: The rows to distribute; each goes to exactly one client.
        how: `iid`; `by-column:COLUMN`, one client for each value; or `dirichlet:COLUMN:ALPHA`, each
            value distributed by a Dirichlet draw (https://arxiv.org/abs/1909.06335);
            the smaller ALPHA > 0, the less alike the clients.
        num_clients: How many clients; None if `how` already says it.
        seed: Seed of the draw.
        min_rows: Fewest rows of a client. With `by-column`, smaller ones are merged into one,
            called `JOINED`, with the one that has this name already.

    Raises:
        DataError: If the partition is unknown or cannot be made of these rows.
    """
    parts = _parts(examples, how, num_clients=num_clients, seed=seed)
    small = [name for name, rows in parts.items() if len(rows) < min_rows]
    if small and how.startswith("by-column:"):
        joined = sorted(row for name in {*small, JOINED} for row in parts.pop(name, []))
        parts[JOINED], small = joined, [JOINED] if len(joined) < min_rows else []
    if small:
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in parts.items())
        raise DataError(
            f"--min_rows_per_site {min_rows}: {small[0]} has "
            f"{counted(len(parts[small[0]]), 'row')} (rows of all sites: {counts})"
        )
    return parts


def _parts(
    examples: list[Example], how: str, *, num_clients: int | None, seed: int
) -> dict[str, list[int]]:
    kind, *rest = how.split(":")
    if kind == "by-column" and len(rest) == 1:
        return _by_column(examples, rest[0], num_clients)
    if kind not in ("iid", "dirichlet") or len(rest) != {"iid": 0, "dirichlet": 2}[kind]:
        columns = examples[0].columns if examples else ()
        hint = f"; did you mean by-column:{how}?" if how in columns else ""
        raise DataError(f"--partition: {how!r} is not one of {FORMS}{hint}")
    if num_clients is None:
        raise DataError(f"--partition {how} needs --num_clients")
    if num_clients > len(examples):
        raise DataError(
            f"--num_clients {num_clients}: only {counted(len(examples), 'row')} to distribute"
        )
    if kind == "iid":
        import numpy as np

        order = np.random.default_rng(seed).permutation(len(examples))
        shares = np.array_split(order, num_clients)
        return {
            site_name(i, num_clients): sorted(map(int, share)) for i, share in enumerate(shares)
        }
    return _dirichlet(examples, rest[0], rest[1], num_clients, seed)


def _by_column(
    examples: list[Example], column: str, num_clients: int | None
) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {}
    for index, value in enumerate(_values(examples, column)):
        parts.setdefault(value, []).append(index)
    if num_clients not in (None, len(parts)):
        raise DataError(
            f"--partition by-column:{column} makes {counted(len(parts), 'client')}, "
            f"but --num_clients is {num_clients}; leave --num_clients out"
        )
    return parts


def _dirichlet(
    examples: list[Example], column: str, text: str, num_clients: int, seed: int
) -> dict[str, list[int]]:
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not alpha > 0:
        raise DataError(f"--partition: ALPHA must be a number above 0, got {text!r}")
    values = _values(examples, column)  # reports its mistakes before seconds of imports
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=num_clients,
        partition_by=column,
        alpha=alpha,
        min_partition_size=1,
        seed=seed,
    )
    partitioner.dataset = Dataset.from_dict({column: values, "row": list(range(len(values)))})
    return {
        site_name(i, num_clients): sorted(partitioner.load_partition(i)["row"])
        for i in range(num_clients)
    }


def _values(examples: list[Example], column: str) -> list[str]:
    values = []
    for number, example in enumerate(examples, start=1):
        value: Any = example.columns.get(column)
        if value is None:
            names = ", ".join(map(str, example.columns))
            raise DataError(f'--partition: row {number} has no column "{column}"; it has: {names}')
        values.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)))
    return values


def site_name(index: int, num_clients: int) -> str:
    """Return the name of a site that has none."""
    return f"site-{index:0{len(str(num_clients - 1))}d}"
