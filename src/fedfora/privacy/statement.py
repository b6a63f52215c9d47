"""What differential privacy was given, in one sentence with its assumptions."""

from fedfora.privacy.accounting import Ledger

NONE = "No differential privacy: the noise multiplier is 0."
ACCOUNTED = "accounted by dp-accounting's PLD accountant"
FLOATS = "floating-point numbers are as good as real ones"


def record_statement(ledger: Ledger, *, clipping_norm: float, num_rows: int) -> str:
    """Return the guarantee for each record of a site.

    Args:
        ledger: What was released.
        clipping_norm: C.
        num_rows: Records of the site, which counts as public.
    """
    if ledger.epsilon == float("inf"):
        return NONE
    steps, noise = _steps_and_noise(ledger)
    return (
        f"Each of the {num_rows} training records has {_level(ledger, 'one record')} against "
        f"anyone who sees every gradient step of this site: {steps} steps of DP-SGD with Poisson "
        f"sampling, gradients clipped to {clipping_norm:g} and noise multiplier {noise}, "
        f"{ACCOUNTED}; assumed: one person's data are one record, the number of records is "
        f"public, noise and samples stay secret, {FLOATS}, and the losses in the site's own log "
        "stay there."
    )


def site_statement(ledger: Ledger, *, clipping_norm: float, num_sites: int, fewest: int = 0) -> str:
    """Return the guarantee for each site of a federation.

    Args:
        ledger: What was released.
        clipping_norm: C.
        num_sites: Sites in an average, which counts as public.
        fewest: Sites that share the noise of a sum, at least; 0 where the coordinator adds it.
    """
    if ledger.epsilon == float("inf"):
        return NONE
    rounds, noise = _steps_and_noise(ledger)
    whom, neighbor = "anyone who sees the global adapters", "one site with all its records"
    who = "the coordinator, who sees single updates, adds the noise honestly"
    floats = f", and {FLOATS}"
    if fewest:
        whom += " or the sums under secure aggregation, the coordinator and any one other site too"
        who = (
            f"sites share the noise honestly, so that {fewest - 1} shares beside that one site's "
            "make it whole, no two sites collude, who takes part is public"
        )
        floats = "; the noise is an exact discrete normal, so nothing is assumed of floats"
    return (
        f"Each of {num_sites} sites has {_level(ledger, neighbor)} against {whom}: {rounds} "
        f"rounds, updates clipped to {clipping_norm:g} and noise multiplier {noise} on their sum, "
        f"no credit for drawing sites, {ACCOUNTED}; assumed: {who}, the number of sites is "
        f"public{floats}."
    )


def _level(ledger: Ledger, neighbor: str) -> str:
    level = f"({ledger.epsilon:.2f}, {ledger.delta:g})-differential privacy"
    return f"{level} (adding or removing {neighbor})"


def _steps_and_noise(ledger: Ledger) -> tuple[int, str]:
    noises = sorted({release.noise_multiplier for release in ledger.releases})
    count = sum(release.count for release in ledger.releases)
    return count, " to ".join(f"{noise:.3g}" for noise in dict.fromkeys((noises[0], noises[-1])))


def federation_statement(epsilon: float | None, *, delta: float, clipping_norm: float) -> str:
    """Return the guarantee for each record of a federation whose sites run DP-SGD themselves.

    Args:
        epsilon: Of the site with the weakest guarantee; None where the sites do not tell enough.
        delta: Of all sites.
        clipping_norm: C.
    """
    if epsilon == float("inf"):
        return NONE
    level = "Differential privacy of a level that only the sites know"
    if epsilon is not None:
        level = f"({epsilon:.2f}, {delta:g})-differential privacy (adding or removing one record)"
    return (
        f"{level} holds for each training record against everybody outside its site, the "
        f"coordinator included: sites train by DP-SGD with gradients clipped to {clipping_norm:g}, "
        "account for it in ledgers of their own with dp-accounting's PLD accountant, and refuse "
        "steps beyond the budget; assumed: sites do so, one person's data are one record at one "
        f"site, numbers of records are public, noise and samples stay secret, and {FLOATS}."
    )
