"""A site's policy: what a coordinator may ask of it, checked at the site before any work.

It is in the kit's `policy.yaml`, which only the site writes; a key that is absent limits nothing,
and a change applies from the next message on. A refusal leaves the site as a code that names the
key: `site-error POLICY_HOURS 1a2b3c`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from fedfora.deployment.sites_file import FINGERPRINT
from fedfora.deployment.yaml_source import YamlSource
from fedfora.federated.aggregation import RULES
from fedfora.federated.settings import FederationSettings
from fedfora.registry import unknown

POLICY = "policy.yaml"
WORK = ("train", "evaluate")  # what is done only within the hours; the rest takes no time
MOST = {"rounds": 1_000_000, "rank": 1_000_000, "steps": 10_000_000}
KEYS = ("base", *MOST, "hours", "until", "rules")

_HOURS = re.compile(r"([01]?\d|2[0-3]):([0-5]\d) *- *([01]?\d|2[0-3]):([0-5]\d)")


class PolicyError(ValueError):
    """The site's policy forbids what was asked for; `key` says which part of it."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{POLICY}: {key}: {text}")
        self.key = key


@dataclass(frozen=True)
class Policy:
    """What a site allows; None and empty limit nothing.

    Args:
        base: Fingerprints of the bases that may be trained on.
        rounds: Most rounds that are answered, in all runs together.
        rank: Largest rank of an adapter.
        steps: Most optimizer steps in a round.
        hours: Local times between which the site works.
        until: The last day.
        rules: Aggregation rules that a run may follow.
    """

    base: tuple[str, ...] = ()
    rounds: int | None = None
    rank: int | None = None
    steps: int | None = None
    hours: tuple[time, time] | None = None
    until: date | None = None
    rules: tuple[str, ...] = ()

    def check(
        self,
        settings: FederationSettings,
        operation: str,
        asked: Mapping[str, Any],
        *,
        answered: int,
        now: datetime,
    ) -> None:
        """Raise if a run, or this message of it, is not allowed.

        Args:
            settings: The run's, as they apply here.
            operation: What is asked for.
            asked: What the message itself says about its round.
            answered: Rounds answered so far.
            now: Local time.

        Raises:
            PolicyError: Naming the key.
        """
        if self.until is not None and now.date() > self.until:
            raise PolicyError("until", f"{self.until} is over")
        _at_most("rounds", self.rounds, settings.federation.num_rounds)
        if operation == "train":
            _at_most("rounds", self.rounds, answered + 1)
        rank = max(settings.adapter.lora_rank, int(asked.get("rank", 0)))
        _at_most("rank", self.rank, rank)
        _at_most("steps", self.steps, settings.federation.local_steps)
        name = settings.aggregation.aggregation
        if self.rules and (name not in self.rules or asked.get("rule", name) != name):
            raise PolicyError("rules", f"{name} is not among {', '.join(self.rules)}")
        if self.hours is not None and operation in WORK:
            begin, end, at = *self.hours, now.time()
            within = begin <= at < end if begin < end else at >= begin or at < end
            if not within:
                raise PolicyError("hours", f"{begin:%H:%M}-{end:%H:%M}, it is {at:%H:%M} now")

    def check_base(self, fingerprint: str) -> None:
        """Raise if a base may not be trained on.

        Raises:
            PolicyError: Naming its fingerprint.
        """
        if self.base and fingerprint not in self.base:
            raise PolicyError("base", f"{fingerprint} is not among {', '.join(self.base)}")


def _at_most(key: str, most: int | None, asked: int) -> None:
    if most is not None and asked > most:
        raise PolicyError(key, f"at most {most}, asked for {asked}")


def read_policy(kit: Path) -> Policy:
    """Return the policy in a site's kit; one without limits if there is no file.

    Raises:
        ValueError: Naming file, line, key and what is allowed there.
    """
    path = kit / POLICY
    if not path.exists():
        return Policy()
    document = YamlSource(path)
    document.check_keys((), needed=(), allowed=KEYS)
    has = document.content.keys()
    bases, rules = (_words(document, key) for key in ("base", "rules"))
    for base in bases:
        if not FINGERPRINT.fullmatch(base):
            wanted = "expected fingerprints of 32 digits, as `fedfora check site` shows them"
            raise document.error(("base",), f"{wanted}, got {base!r}")
    for rule in rules:
        if rule not in RULES:
            raise document.error(("rules",), unknown("aggregation rule", rule, RULES))
    limits = {key: document.integer((key,), 1, most) for key, most in MOST.items() if key in has}
    return Policy(
        base=bases,
        hours=_hours(document) if "hours" in has else None,
        until=_until(document) if "until" in has else None,
        rules=rules,
        **limits,
    )


def _words(document: YamlSource, key: str) -> tuple[str, ...]:
    value = document.content.get(key, [])
    values = value if isinstance(value, list) else [value]
    if key in document.content and not values:
        raise document.error((key,), "is empty; leave the key out, or name what is allowed")
    return tuple(map(str, values))


def _hours(document: YamlSource) -> tuple[time, time]:
    match = _HOURS.fullmatch(str(document.content["hours"]))
    if match is None:
        raise document.error(("hours",), 'expected local times as in "20:00-06:00"')
    from_hour, from_minute, to_hour, to_minute = map(int, match.groups())
    return time(from_hour, from_minute), time(to_hour, to_minute)


def _until(document: YamlSource) -> date:
    value = document.content["until"]
    if isinstance(value, datetime) or not isinstance(value, date):
        raise document.error(("until",), f"expected a day as in 2027-03-31, got {value!r}")
    return value
