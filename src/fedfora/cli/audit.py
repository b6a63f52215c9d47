"""fedfora audit RUN: attack a run's adapter and report what the attacks learned."""

from collections.abc import Sequence
from typing import Any

from fedfora.cli.console import announce_loading, silence_libraries
from fedfora.config import ConfigParser
from fedfora.evaluation.settings import AuditArguments, audited_run


def run(argv: Sequence[str]) -> None:
    """Parse, attack, and print the numbers, good or bad."""
    (arguments,) = ConfigParser([AuditArguments], description=__doc__, first="run").parse(argv)
    silence_libraries()
    audited_run(arguments)
    announce_loading("audit")
    from fedfora.evaluation.audit import audit

    results = audit(arguments)
    print("\n".join([*_membership(results), *_canaries(results)]))


def _membership(result: dict[str, Any]) -> list[str]:
    lines = [
        "membership inference by loss: 0.5 learns nothing, 1.0 knows every row",
        f"{'':8s}  AUC (95 % interval)      found at 1 % false alarms   loss in / out",
    ]
    for name in ("adapter", "base"):
        row = result[name]
        interval = f"{row['auc']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        losses = f"{row['loss_in']:.3f} / {row['loss_out']:.3f}"
        share = row["true_positive_rate"]
        lines.append(f"{name:8s}  {interval:24s} {share:8.1%}                    {losses}")
    return [
        *lines,
        "The base has seen none of the rows; what it tells apart is a difference between files.",
    ]


def _canaries(result: dict[str, Any]) -> list[str]:
    if (row := result.get("canaries")) is None:
        return ["", "canaries: none were planted (train with --canaries to plant some)"]
    lines = [
        "",
        f"canaries: {len(row['after_bits'])}, copies of each: {row['copies']}, ranked among "
        f"{row['alternatives']} other codes: exposure in bits, mean and maximum",
    ]
    for name, when in (("before_bits", "before"), ("after_bits", "after")):
        bits = row[name]
        lines.append(f"{when:8s}  {sum(bits) / len(bits):5.2f}  {max(bits):5.2f}")
    lines.append(f"Codes never seen in training have {row['unseen_bits']:.2f} bits on average.")
    if "guessed" in row:
        right = f"{row['guessed']} of {len(row['after_bits'])} planted codes were told from another"
        bound = f"{row['epsilon_at_least']:.2f} with 95 % confidence"
        lines += [
            f"{right}: for one record replaced by any other, epsilon is",
            f"at least {bound} (what the run promised is in its README.md).",
        ]
    return lines
