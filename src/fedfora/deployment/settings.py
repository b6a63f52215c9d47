"""The user's settings for a deployment, and who may set which flag of a federation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedfora.config import Options, flag
from fedfora.data.settings import DataArguments
from fedfora.deployment.yaml_source import Keys, YamlSource
from fedfora.federated.secure_aggregation.messages import MIN_SITES, fewest_survivors
from fedfora.federated.settings import (
    SECTIONS,
    FederationSettings,
    SecureAggregationArguments,
    settings_parser,
)
from fedfora.federated.settings_scope import LOCAL_ONLY, SITE_MAY_OVERRIDE
from fedfora.privacy.settings import PrivacyArguments, noise_of

# What a site is promised is in its own kit too, and applies whatever the coordinator sends: all but
# how numbers are written, and where a site's own ledger is.
PROTECTION = frozenset(
    item.name for kind in (SecureAggregationArguments, PrivacyArguments) for item in fields(kind)
) - {"secagg_range", "privacy_dir"}
# How rows are read: where it fails, it tells of a row, and nothing is paid for.
READING = frozenset(item.name for item in fields(DataArguments)) - LOCAL_ONLY
UNBOUND = READING & SITE_MAY_OVERRIDE  # in no digest of a task, on which masks depend
# Which belong to a promise even where nobody named them: their defaults are written down with it.
IMPLIED_FLAGS = {
    "secure_aggregation": {"secagg_threshold"},
    "privacy_unit": {"target_delta", "clipping_norm", "shared_noise"},
}
NOT_OF_FEDERATION = {
    "canaries": "a real site plants no rows",
    "partition": "a real site trains on all rows of its files",
    "num_clients": "the sites are those under sites",
    "resume": "`fedfora coordinator` resumes from its checkpoint by itself",
    "output_dir": "the results go into the coordinator's kit, under state",
    "overwrite_output_dir": "the results go into the coordinator's kit, under state",
}
OPTIONS = [item for section in SECTIONS.values() for item in fields(section)]
DEFAULTS = {item.name: item.default for item in OPTIONS}
ALIASES = {alias.strip("-"): item.name for item in OPTIONS for alias in item.metadata["aliases"]}
SITE_FLAGS = (LOCAL_ONLY | SITE_MAY_OVERRIDE | PROTECTION) - NOT_OF_FEDERATION.keys()


@dataclass
class ProvisionArguments(Options):
    """Output directory, certificates, revoked sites."""

    sites_file: str | None = flag(None, "sites.yaml of the federation; also the first word")
    output_dir: str = flag("kits", "directory of the kits; if it holds some, sites are added")
    valid_days: int = flag(
        365, "days for which the coordinator's certificate is valid", within="[1, 3650]"
    )
    renew: bool = flag(False, "make a new server certificate; needs the CA's key in the kit")
    revoke: str | None = flag(None, "remove a site: its keys are deleted from every list")
    requests: str | None = flag(
        None, "directory of NAME.request files, from sites that made their keys themselves"
    )
    new_authority: bool = flag(
        False, "make a new authority; its certificate goes to all sites, then --renew"
    )


@dataclass
class KitArguments:
    """Which kit."""

    kit: str = flag(".", "directory of the kit, as `fedfora provision` made it")


@dataclass
class OwnTrainerArguments:
    """A site whose own script trains."""

    own_trainer: bool = flag(False, "rows and base come from a script that calls fedfora.federate")


def settings_of(mapping: Mapping[str, Any]) -> FederationSettings:
    """Return all settings of a federation from the flags that differ from their defaults.

    Raises:
        ConfigError: If a name or a value is wrong, or two contradict each other.
    """
    return FederationSettings(*settings_parser().parse_mapping(mapping))


def own_flags(
    federation: Mapping[str, Any], site: Mapping[str, Any], *, quorum: int | None = None
) -> dict[str, Any]:
    """Return the flags for a site's kit: its own, and what all sites are told of the same kind."""
    # What is left to the site travels as a default; how promised rows are read does not.
    said = {**federation, **site}
    read = READING if said.get("privacy_unit", "none") != "none" else frozenset()
    read |= UNBOUND if said.get("secure_aggregation") else frozenset()
    shared_names = SITE_FLAGS - (SITE_MAY_OVERRIDE - PROTECTION) | read
    shared = {name: value for name, value in federation.items() if name in shared_names}
    own = {**shared, **site}
    threshold = own.get("secagg_threshold", SecureAggregationArguments.secagg_threshold)
    sampled = federation.get("clients_per_round")
    fewest = [fewest_survivors(sampled, threshold)] if sampled else []
    fewest += [quorum] if quorum else []
    if own.get("secure_aggregation") and fewest:
        own.setdefault("secagg_min_sites", max(MIN_SITES, min(fewest)))
    parts = set().union(
        *(IMPLIED_FLAGS[name] for name in IMPLIED_FLAGS if own.get(name) not in (None, False))
    )
    return {**{name: default for name, default in DEFAULTS.items() if name in parts}, **own}


def check_promise(own: Mapping[str, Any]) -> None:
    """Raise if a site's kit promises privacy without a limit.

    Raises:
        ValueError: Naming the flag.
    """
    if own.get("privacy_unit", "none") != "none" and own.get("target_epsilon") is None:
        raise ValueError(
            f"--privacy_unit {own['privacy_unit']} at a real site needs --target_epsilon: with a "
            "noise multiplier alone the coordinator gets as many rounds as it asks for"
        )


def check_budget(settings: FederationSettings) -> None:
    """Raise if no noise keeps a federation within its budget.

    For single records this needs the sampling rate. Where a batch size is named instead, the rate
    depends on a site's number of rows, which only the site knows; nothing is checked then. The
    default rate is taken at its highest, that of a site with few rows.
    """
    privacy, train, federation = settings.privacy, settings.train, settings.federation
    if privacy.privacy_unit == "site":
        noise_of(privacy, count=federation.num_rounds)
    elif privacy.privacy_unit == "record" and not train.names_batch:
        rate = train.sampling_rate(privacy, 1)
        noise_of(privacy, count=federation.total_steps, sampling_rate=rate)


def check_sent(received: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise if what a coordinator sent would weaken what a site's own kit promises.

    Raises:
        ValueError: Naming the flag.
    """
    plain = {name.replace("-", "_"): value for name, value in received.items()}
    fixed = {"canaries"}
    if own.get("secure_aggregation"):
        fixed |= {"secagg_min_sites"} | IMPLIED_FLAGS["secure_aggregation"] | UNBOUND
    if own.get("privacy_unit", "none") != "none":
        check_promise(own)
        fixed |= {"noise_multiplier"} | IMPLIED_FLAGS["privacy_unit"] | READING
    for name in sorted(fixed - own.keys()):
        if plain.get(name) not in (None, DEFAULTS[name]):
            raise ValueError(
                f"the coordinator may not set {name}: the promise to the site depends on it"
            )


def check_flags(
    document: YamlSource, keys: Keys, federation: Mapping[str, Any] | None, *, of_site: bool = False
) -> dict[str, Any]:
    """Return the flags at `keys` of a file, checked as `fedfora simulate` checks them.

    Args:
        document: The file.
        keys: Where they are.
        federation: Flags that they must be consistent with; None if those are not known.
        of_site: Whether they are a site's own, which may set only some flags.

    Raises:
        ValueError: Naming file, line and flag.
    """
    written = document.mapping(keys, empty=True)
    names = {ALIASES.get(plain := name.replace("-", "_"), plain): name for name in written}
    if twice := sorted(written.keys() - names.values()):
        raise document.error((*keys, twice[0]), "is said again, by another name of it")
    flags = {name: written[names[name]] for name in names}
    allowed = SITE_FLAGS | (READING if federation is None else set())
    for name in flags:
        if name in NOT_OF_FEDERATION:
            reason = NOT_OF_FEDERATION[name]
            raise document.error((*keys, names[name]), f"cannot be set here: {reason}")
        if of_site and name in DEFAULTS.keys() - allowed:
            belongs = "is the same for all sites; it belongs under settings"
            raise document.error((*keys, names[name]), belongs)
    try:
        if of_site:
            check_promise({**(federation or {}), **flags})
        if federation is None:
            settings_parser().parse_mapping(flags)
        else:
            settings_of({**federation, **flags})
    except ValueError as error:
        told = [names[name] for name in re.findall(r"--(\w+)", str(error)) if name in flags]
        raise document.error((*keys, *told[:1]), str(error)) from error
    return flags
