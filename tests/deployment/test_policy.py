"""A site's policy: what it limits, and that nothing it does not name is limited."""

from datetime import date, datetime, time

import pytest

from fedfora.deployment.client_app import CODES
from fedfora.deployment.policy import KEYS, POLICY, Policy, PolicyError, read_policy
from fedfora.deployment.settings import settings_of

NOON, NIGHT = datetime(2027, 3, 31, 12), datetime(2027, 3, 31, 23, 30)


def refused(policy, operation="train", asked=None, answered=0, now=NOON, **flags):
    """The key that forbids a message; None where it is allowed."""
    settings = settings_of({"num_rounds": 5, "local_steps": 10, "lora_rank": 8, **flags})
    try:
        policy.check(settings, operation, asked or {}, answered=answered, now=now)
    except PolicyError as error:
        return error.key
    return None


def test_no_policy_limits_nothing(tmp_path):
    policy = read_policy(tmp_path)
    assert policy == Policy()
    assert refused(policy, answered=10**6, num_rounds=10**6, lora_rank=512) is None
    policy.check_base("0" * 16)


@pytest.mark.parametrize(
    ("policy", "within", "beyond"),
    [
        (Policy(rounds=5), {"answered": 4}, {"answered": 5}),
        (Policy(rounds=5), {"num_rounds": 5}, {"num_rounds": 6, "operation": "describe"}),
        (Policy(rank=8), {}, {"lora_rank": 9}),
        (Policy(rank=8), {"asked": {"rank": 8}}, {"asked": {"rank": 16}}),
        (Policy(steps=10), {}, {"local_steps": 11}),
        (Policy(rules=("fedavg",)), {}, {"aggregation": "refactor"}),
        (Policy(rules=("fedavg",)), {"asked": {"rule": "fedavg"}}, {"asked": {"rule": "core"}}),
        (Policy(until=date(2027, 3, 31)), {}, {"now": datetime(2027, 4, 1)}),
        (Policy(hours=(time(20), time(6))), {"now": NIGHT}, {"now": NOON}),
        (Policy(hours=(time(8), time(18))), {"now": NOON}, {"now": NIGHT}),
        (Policy(hours=(time(20), time(6))), {"operation": "describe"}, {"operation": "evaluate"}),
    ],
)
def test_each_limit_allows_what_is_within_and_names_what_is_beyond(policy, within, beyond):
    assert refused(policy, **within) is None
    key = refused(policy, **beyond)
    assert f"POLICY_{key.upper()}" in CODES
    assert vars(policy)[key]


def test_a_base_that_is_not_named_is_refused():
    policy = Policy(base=("0123456789abcdef" * 2,))
    policy.check_base("0123456789abcdef" * 2)
    with pytest.raises(PolicyError, match=r"f{32} is not among (0123456789abcdef){2}"):
        policy.check_base("f" * 32)


def test_every_key_of_the_file_is_a_limit_and_has_a_code(tmp_path):
    text = (
        "base: [0123456789abcdef0123456789abcdef]\nrounds: 50\nrank: 64\nsteps: 20\n"
        'hours: "20:00-6:00"\nuntil: 2027-03-31\nrules: [fedavg, refactor]\n'
    )
    (tmp_path / POLICY).write_text(text)
    policy = read_policy(tmp_path)
    assert set(vars(policy)) == set(KEYS)
    assert all(vars(policy).values())
    assert {f"POLICY_{key.upper()}" for key in KEYS} <= set(CODES)
    assert policy.hours == (time(20), time(6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rouns: 3", "line 1: rouns: unknown key 'rouns'; did you mean 'rounds'"),
        ("rank: 8\nrounds: none", "line 2: rounds: expected a whole number from 1"),
        ("rounds: 0", "line 1: rounds: expected a whole number from 1"),
        ("hours: 20-6", "line 1: hours: expected local times"),
        ("hours: 25:00-06:00", "line 1: hours: expected local times"),
        ("until: soon", "line 1: until: expected a day as in 2027-03-31"),
        ("until: 2027-03-31 12:00:00", "line 1: until: expected a day as in 2027-03-31"),
        ("rules: fedavgg", "did you mean 'fedavg'"),
        ("rules: []", "line 1: rules: is empty"),
        ("base: clinic-base", "line 1: base: expected fingerprints"),
        ("base: [13672758079c9411]", "line 1: base: expected fingerprints of 32 digits"),
        ("- rounds", "expected keys and values"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / POLICY).write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_policy(tmp_path)
