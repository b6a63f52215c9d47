"""What a real site's own settings and disk hold against a coordinator that asks for more."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedfora.federated.coordinator.rounds import run_rounds
from fedfora.federated.embedded import EmbeddedGrid
from fedfora.federated.secure_aggregation.client import Memory, SecureSite
from fedfora.federated.secure_aggregation.crypto import SignedKey
from fedfora.federated.secure_aggregation.messages import RoundKeys, Terms, digest_of
from fedfora.federated.settings_scope import agreed_part
from fedfora.federated.site import secure_answers
from fedfora.federated.site.client_app import make_client_app, site_facts
from fedfora.federated.site.identity import open_identity
from fedfora.federated.site.memory import AnsweredRounds
from fedfora.federated.site_runtime import load_runtime, site_of
from fedfora.federated.wire.secure_records import ANSWER, ROSTER, TERMS, read, write

NUM_SITES = 4


def restarted(node_configs, run_config, run=1):
    return Context(run, 1, node_configs[0], RecordDict(), run_config)


def invited(
    node_configs, run_config, *, run=1, fraction=0.66, participants=range(NUM_SITES), context=None
):
    """Return the first site's answer to an invitation to round 1, after the site was restarted."""
    context = context or restarted(node_configs, run_config, run)
    own = read(SignedKey, secure_answers.introduce(RecordDict(), context)[ANSWER])
    roster = {0: own}
    for index in range(1, NUM_SITES):
        identity, pinned = open_identity(node_configs[index], seed=1)
        roster[index] = SecureSite(index, identity, pinned, Memory()).introduce(str(run))
    terms = Terms(1, tuple(participants), fraction, digest_of(roster))
    content = RecordDict({ROSTER: write(roster), TERMS: write(terms)})
    return read(RoundKeys, secure_answers.share(content, context)[ANSWER])


@pytest.mark.parametrize("told", [0.51, 0.66, 0.79])
def test_a_site_takes_part_under_no_lower_threshold_than_its_kits(node_configs, run_config, told):
    promised = {**run_config, "secagg_threshold": 0.8}
    with pytest.raises(ValueError, match=r"takes part from --secagg_threshold 0\.8 on"):
        invited(node_configs, promised, fraction=told)
    assert len(invited(node_configs, promised, fraction=0.8).sealed) == NUM_SITES - 1
    assert len(invited(node_configs, promised, run=2, fraction=1.0).sealed) == NUM_SITES - 1


def test_a_site_takes_part_with_no_fewer_sites_than_its_kit_says(node_configs, run_config):
    four = {**run_config, "secagg_min_sites": 4}
    with pytest.raises(ValueError, match=r"3 sites take part .* from 4 on"):
        invited(node_configs, four, participants=[0, 1, 2])
    assert invited(node_configs, four).key.site == 0


def test_without_a_number_it_asks_for_the_thresholds_share_of_all_sites(node_configs, run_config):
    """How many the coordinator says it samples is not asked."""
    with pytest.raises(ValueError, match=r"3 sites take part .* from 4 on"):
        invited(
            node_configs,
            {**run_config, "secagg_threshold": 0.8, "clients_per_round": 3},
            fraction=0.8,
            participants=[0, 1, 2],
        )
    assert invited(node_configs, run_config, participants=[0, 1, 2]).key.site == 0


def test_guesses_of_rows_cannot_be_tested_against_what_a_site_tells_of_them(
    node_configs, run_config
):
    """The attack: all rows are known but one; whose digest fits is the right guess."""

    def told(state):
        config = {**node_configs[0], "site-state": state}
        context = Context(1, 1, config, RecordDict(), run_config)
        return str(site_facts(context, runtime, site)["data-digest"])

    runtime = load_runtime(run_config, 0)
    site, own = site_of(runtime, node_configs[0]), node_configs[0]["site-state"]
    assert told(own) == told(own) != site.digest  # a resumed run recognizes them all the same
    assert len(bytes.fromhex(told(own))) == 8
    assert told(f"{own}-of-a-guesser") != told(own)


def test_a_round_is_answered_once_whatever_was_in_between(node_configs, run_config):
    """Another run, and a restart each time: the site knows from its disk."""
    invited(node_configs, run_config, run=1)
    invited(node_configs, run_config, run=2)
    with pytest.raises(ValueError, match="round 1 is requested again"):
        invited(node_configs, run_config, run=1, participants=[0, 1, 2])


def test_a_site_trains_the_round_that_it_shared_for_and_no_other(node_configs, run_config):
    """Asked to train round 1 in rounds 2 and 3, it would take the same order of rows twice: what
    it remembers is the number of the round that it shared for."""
    context = restarted(node_configs, run_config)
    with pytest.raises(ValueError, match="round 1 was not shared for"):
        secure_answers.begin(context, None, 1)
    invited(node_configs, run_config, context=context)
    for number in (0, 2):
        with pytest.raises(ValueError, match=f"round {number} was not shared for"):
            secure_answers.begin(context, None, number)
    assert secure_answers.begin(context, None, 1).round_number == 1
    with secure_answers._secure_site(context) as member:  # it has masked a vector for those
        member.memory.open_round.present = member.memory.open_round.terms.participants
    with pytest.raises(ValueError, match="or is answered"):  # else it would pay for it again
        secure_answers.begin(context, None, 1)


def test_what_was_answered_is_on_the_disk_before_the_answer_leaves(tmp_path, monkeypatch):
    synced, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd)) or original(fd))
    answered = AnsweredRounds(tmp_path / "state")
    answered.share("7", 1)
    inodes = {stat.st_ino for stat in synced}
    assert {answered.path.stat().st_ino, (tmp_path / "state").stat().st_ino} <= inodes
    assert answered.path.stat().st_mode & 0o077 == 0


def test_of_many_processes_that_answer_the_same_round_one_does(tmp_path):
    def attempt(_):
        try:
            AnsweredRounds(tmp_path).share("7", 3)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"secret": "ab"}', '{"secret": 1}'])
def test_a_site_that_cannot_tell_what_it_answered_answers_nothing(tmp_path, content):
    answered = AnsweredRounds(tmp_path)
    answered.path.write_text(content)
    with pytest.raises(ValueError, match="does not say which rounds were answered"):
        answered.share("7", 1)
    assert answered.path.read_text() == content


def test_the_order_of_rows_is_the_same_until_the_update_has_left(tmp_path):
    """So a run that is killed before is resumed to the bit, and one killed after tells nothing."""
    answered = AnsweredRounds(tmp_path)
    first = answered.seed("run", 1)
    assert AnsweredRounds(tmp_path).seed("run", 1) == first
    answered.leave("run", 1)
    seeds = [first, answered.seed("run", 1)]
    assert answered.seed("run", 2) == first  # the round is a label of its own, see `derive_seed`
    answered.leave("run", 2)
    answered.leave("run", 3)
    answered.leave("run", 2)  # resumed from the checkpoint of round 1
    assert answered.seed("run", 3) == seeds[1]
    answered.leave("run", 3)
    seeds.append(answered.seed("run", 2))
    assert len({*seeds, answered.seed("another run", 1)}) == 4
    assert AnsweredRounds(tmp_path / "another site").seed("run", 1) not in seeds


def test_the_same_round_asked_for_in_two_runs_gives_other_updates(
    node_configs, run_config, monkeypatch
):
    """Else the difference of the sums, once with and once without a site, were its update."""
    updates, original = [], secure_answers.contribution
    monkeypatch.setattr(
        secure_answers,
        "contribution",
        lambda update_N, **rest: updates.append(update_N) or original(update_N, **rest),
    )
    for run in (1, 2):
        config = {**run_config, "overwrite_output_dir": run > 1}
        grid = EmbeddedGrid(make_client_app(), node_configs, config)
        for context in grid._contexts.values():
            context.run_id = run
        run_rounds(grid, config)
    assert len(updates) == 2 * NUM_SITES
    for first, second in zip(updates[:NUM_SITES], updates[NUM_SITES:], strict=True):
        assert np.linalg.norm(first - second) > 0.1 * np.linalg.norm(first)


def test_the_rest_of_the_settings_may_differ_in_how_many_sites_are_enough(run_config):
    """The number is a site's own; the masks of sites that say another one still cancel."""
    assert agreed_part({**run_config, "secagg_min_sites": 5}) == agreed_part(run_config)
