"""fedfora audit: attack a run's adapter, and say what the attack learned."""

from collections.abc import Sequence

from fedfora.cli.quiet import quiet
from fedfora.config import ConfigParser


def run(argv: Sequence[str]) -> None:
    """Parse, attack, and print the numbers, also when they are bad."""
    from fedfora.evaluation.audit import AuditArguments, audit

    parser = ConfigParser([AuditArguments], prog="fedfora audit", description=__doc__)
    (arguments,) = parser.parse(argv)
    quiet()
    found = audit(arguments)
    print("membership inference by loss: 0.5 learns nothing, 1.0 knows every row")
    print(f"{'':8s}  AUC (95 % interval)      found at 1 % false   loss in / out")
    for name in ("adapter", "base"):
        row = found[name]
        interval = f"{row['auc']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        losses = f"{row['loss_in']:.3f} / {row['loss_out']:.3f}"
        print(f"{name:8s}  {interval:24s} {row['true_positive_rate']:8.1%}             {losses}")
    print("The base has seen none of the rows; what it tells apart is a difference of the files.")
