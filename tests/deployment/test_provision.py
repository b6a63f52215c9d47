"""Kits: what is written is read; keys stay; who is revoked is nowhere; nothing is half done."""

import json
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fedfora.cli.main import main
from fedfora.deployment import certificates
from fedfora.deployment import provision as module
from fedfora.deployment.certificates import make_request, read_requests
from fedfora.deployment.check_site import check_keys
from fedfora.deployment.checks import check_certificate
from fedfora.deployment.kit import (
    CoordinatorKit,
    SiteKit,
    read_kit,
    write_description,
    write_file,
)
from fedfora.deployment.provision import provision
from fedfora.deployment.run_state import write_nodes
from fedfora.deployment.server_app import _Members
from fedfora.deployment.settings import (
    PROTECTION,
    ProvisionArguments,
    check_sent,
    own_flags,
    settings_of,
)
from fedfora.deployment.sites_file import read_sites_file
from fedfora.federated.settings import from_run_config
from fedfora.federated.settings_scope import agreed_part, at_site
from fedfora.federated.site.identity import open_identity, read_signing_key, read_site_keys

THIRD = {"cardiology": {}, "dermatology": {}, "surgery": {"device": "cpu"}}


def contents(place):
    return {p.relative_to(place): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def keys(place):
    names = ("node.key", "node.pub", "site.key", "site.pub", "ca.key", "ca.crt", "server.key")
    return {path: data for path, data in contents(place).items() if path.name in names}


def test_a_kit_that_is_written_is_the_kit_that_is_read(provisioned):
    done = provisioned(quorum=2, base_fingerprint="0123456789abcdef" * 2)
    assert read_kit(done.kit.directory, CoordinatorKit) == done.kit
    kit = read_kit(done.place / "sites" / "dermatology", SiteKit)
    assert kit.index == 1
    assert kit.settings == {
        "model_name_or_path": "clinic-base",
        "train_file": "/data/notes.json",
        "device": "cpu",
    }
    for old in (kit, done.kit):
        new = replace(old, settings={**old.settings, "hub": "modelscope"}, base_fingerprint=None)
        write_description(new)
        assert read_kit(new.directory, type(new)) == new


def test_what_a_site_is_promised_stands_in_its_own_kit(provisioned):
    promised = {"secure_aggregation": True, "privacy_unit": "record", "target_epsilon": 3.0}
    planned = {"aggregation": "ffa", "num_rounds": 3, "weighting": "equal"}
    done = provisioned(settings={**promised, **planned})
    kit = read_kit(done.place / "sites" / "cardiology", SiteKit)
    parts = {"secagg_threshold": 0.66, "target_delta": 1e-5, "clipping_norm": 1.0}  # defaults
    parts["shared_noise"] = False  # what a coordinator cannot turn on
    assert kit.settings == {**promised, **parts, "train_file": "/data/notes.json"}
    assert kit.planned == planned


def test_the_coordinator_knows_by_which_key_each_site_signs(provisioned):
    """A key that another one has signed is then refused where it comes from, not at the others."""
    done = provisioned()
    members = _Members(done.kit.state)
    own = [read_signing_key(done.place / "sites" / name / "site.key") for name in done.kit.sites]
    known = [members.identity(index) for index in done.kit.sites.values()]
    assert known == [key.public_key().public_bytes_raw() for key in own]
    assert members.identity(7) is None


def test_a_node_is_only_the_site_whose_key_it_has_under_that_sites_number(provisioned):
    """Numbers decide whose masks and seeds are whose; a name, whose rows."""
    state = provisioned().kit.state
    state.mkdir()
    write_nodes(state, {"cardiology": 10, "dermatology": 11})
    members = _Members(state)
    assert [members.name_of(node) for node in (10, 11, 12)] == [
        *("cardiology", "dermatology", "node 12")
    ]
    assert members.objection(11, 1, "dermatology") is None
    assert members.objection(12, 1, "dermatology") == "its node is not registered"
    assert members.objection(10, 1, "dermatology") == (
        "it claims to be 'dermatology', but has the key of 'cardiology'"
    )
    assert members.objection(11, 0, "dermatology") == ("it claims number 0, but dermatology is 1")


def test_no_kit_promises_privacy_without_a_budget(provisioned):
    """With a noise multiplier alone a coordinator got as many rounds as it asked for."""
    with pytest.raises(ValueError, match="needs --target_epsilon"):
        provisioned(settings={"privacy_unit": "record", "noise_multiplier": 1.0})
    done = provisioned(settings={"privacy_unit": "record", "target_epsilon": 3.0})
    description = done.place / "sites" / "cardiology" / "kit.yaml"
    text = description.read_text()
    description.write_text(text.replace("target_epsilon: 3.0", "noise_multiplier: 1.0"))
    with pytest.raises(ValueError, match="needs --target_epsilon"):
        read_kit(description.parent, SiteKit)


def test_a_promise_holds_however_its_flags_are_spelled(provisioned):
    """With dashes it was none: the coordinator stated the noise."""
    promised = {"secure_aggregation": True, "privacy_unit": "record", "target_epsilon": 3.0}
    dashed = {name.replace("_", "-"): value for name, value in promised.items()}
    done = provisioned(settings={**dashed, "weighting": "equal"})
    kit = done.place / "sites" / "cardiology"
    own = read_kit(kit, SiteKit).settings
    assert promised.items() <= own.items()
    description = kit / "kit.yaml"  # as somebody writes it by hand
    text = description.read_text()
    description.write_text(re.sub(r"(secure|privacy|target|noise)_(?=\w+:)", r"\1-", text))
    assert "privacy-unit: record" in description.read_text()
    own = read_kit(kit, SiteKit).settings
    for sent in ({"noise_multiplier": 0.0}, {"clipping-norm": 9.0}, {"secagg_min_sites": 3}):
        with pytest.raises(ValueError, match="the promise to the site depends on it"):
            check_sent(sent, {name: own[name] for name in promised})


def test_with_a_promise_of_privacy_a_kit_says_how_rows_are_read(provisioned):
    promised = {"privacy_unit": "record", "target_epsilon": 3.0}
    said = {"max_source_length": 300, "template": "plain", "source_prefix": "Notes: "}
    done = provisioned(settings={**promised, **said, "num_rounds": 3})
    own = read_kit(done.place / "sites" / "cardiology", SiteKit).settings
    assert said.items() <= own.items()
    check_sent({**said, "max_source_length": 9}, own)
    settings = from_run_config(at_site({**said, "max_source_length": 9}, own))
    assert settings.data.max_source_length == 300
    assert not said.keys() & own_flags({**said, "num_rounds": 3}, {}).keys() - {"source_prefix"}


def test_with_masks_a_kit_says_all_of_how_rows_are_read_that_no_digest_holds(provisioned):
    said = {"source_prefix": "Notes: ", "task": "triples", "max_source_length": 300}
    done = provisioned(settings={"secure_aggregation": True, **said, "num_rounds": 3})
    own = read_kit(done.place / "sites" / "cardiology", SiteKit).settings
    assert {"source_prefix": "Notes: ", "task": "triples"}.items() <= own.items()
    check_sent(said, own)
    assert "max_source_length" in agreed_part({"max_source_length": 300})


def test_another_name_of_a_flag_is_the_flag(provisioned):
    """Under its short name the length was in no kit, and a private site refused the run's."""
    promised = {"privacy_unit": "record", "target_epsilon": 3.0}
    done = provisioned(settings={**promised, "max_src_len": 300, "lora_r": 4})
    assert done.kit.settings == {**promised, "max_source_length": 300, "lora_rank": 4}
    own = read_kit(done.place / "sites" / "cardiology", SiteKit).settings
    assert own["max_source_length"] == 300
    check_sent(settings_of(done.kit.settings).run_config(), own)


@pytest.mark.parametrize(
    ("federation", "quorum", "fewest"),
    [
        ({}, None, None),  # the site then asks for the threshold's share of all sites
        ({"clients_per_round": 10}, None, 7),
        ({"clients_per_round": 10, "secagg_threshold": 0.9}, None, 9),
        ({"clients_per_round": 10}, 4, 4),
        ({}, 2, 3),
        ({"secagg_min_sites": 5, "clients_per_round": 10}, 4, 5),
    ],
)
def test_a_kit_names_the_fewest_sites_where_a_round_may_have_fewer_than_all(
    federation, quorum, fewest
):
    own = own_flags({"secure_aggregation": True, **federation}, {}, quorum=quorum)
    assert own.get("secagg_min_sites") == fewest
    assert "secagg_min_sites" not in own_flags(
        {"clients_per_round": 10}, {"train_file": "a"}, quorum=quorum
    )


def test_every_flag_of_privacy_is_a_promise():
    """But where the site's own ledger lies, which is nobody else's business."""
    assert sorted(PROTECTION) == [
        *("clipping_norm", "noise_multiplier", "privacy_unit", "sampling_rate"),
        *("secagg_min_sites", "secagg_threshold", "secure_aggregation", "shared_noise"),
        *("target_delta", "target_epsilon"),
    ]


def test_a_coordinator_cannot_take_back_what_was_promised(provisioned):
    promised = {"privacy_unit": "record", "target_epsilon": 3.0, "clipping_norm": 0.5}
    done = provisioned(settings={**promised, "num_rounds": 3})
    own = read_kit(done.place / "sites" / "cardiology", SiteKit).settings
    sent = {"privacy_unit": "none", "target_epsilon": 100.0, "target_delta": 0.9}
    sent |= {"clipping_norm": 9.0, "shared_noise": True}  # with others it is less noise of its own
    settings = from_run_config(at_site(sent, own))
    assert settings.privacy.privacy_unit == "record"
    assert not settings.privacy.shared_noise
    assert settings.privacy.target_epsilon == 3.0
    assert settings.privacy.target_delta == 1e-5
    assert settings.privacy.clipping_norm == 0.5


def test_only_the_owner_reads_a_kit(provisioned):
    place = provisioned().place
    for directory in (place, place / "coordinator", *(place / "sites").iterdir()):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    private = list(place.rglob("*.key"))
    assert len(private) == 2 + 2 * 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_each_site_has_its_own_keys_and_everybody_knows_all_public_ones(provisioned):
    done = provisioned()
    kits = [read_kit(done.place / "sites" / name, SiteKit) for name in done.kit.sites]
    pins = read_site_keys(done.kit.site_keys)
    for kit in kits:
        files = {"signing-key": kit.signing_key, "site-keys": kit.site_keys}
        node_config = {name: str(path) for name, path in files.items()} | {"site-state": "state"}
        identity, known = open_identity(node_config, seed=0)
        assert known == pins
        assert pins[kit.index] == identity.public_bytes
        assert done.kit.node(kit.name).read_bytes() == kit.node_public_key.read_bytes()
    assert len(set(pins.values())) == 2
    assert kits[0].node_key.read_bytes() != kits[1].node_key.read_bytes()


def test_no_private_key_is_in_a_kit_of_somebody_else(provisioned):
    place = provisioned().place
    for secret in place.rglob("*.key"):
        lines = secret.read_text().splitlines()[1:-1]
        for path, data in contents(place).items():
            if path != secret.relative_to(place):
                assert lines[len(lines) // 2].encode() not in data


def test_provisioning_again_changes_nothing(provisioned):
    before = contents(provisioned().place)
    assert contents(provisioned().place) == before


def test_a_late_site_joins_and_nobody_elses_keys_change(provisioned):
    done = provisioned()
    before = keys(done.place)
    again = provisioned(sites=THIRD)
    assert again.added == ["surgery"]
    assert again.need_keys == ["cardiology", "dermatology"]
    assert again.kit.sites == {"cardiology": 0, "dermatology": 1, "surgery": 2}
    after = keys(again.place)
    assert {path: after[path] for path in before} == before
    lists = {
        path: data for path, data in contents(again.place).items() if "sites.json" in str(path)
    }
    assert len(lists) == 4
    assert len(set(lists.values())) == 1


def test_what_a_site_says_about_itself_is_not_written_over(provisioned):
    done = provisioned()
    kit = read_kit(done.place / "sites" / "cardiology", SiteKit)
    write_description(replace(kit, settings={"train_file": "/mine.json"}))
    again = provisioned()
    assert read_kit(kit.directory, SiteKit).settings == {"train_file": "/mine.json"}
    assert "cardiology: its flags in sites.yaml differ from those in its kit" in again.notes[0]


def test_kits_that_were_handed_over_are_not_needed_any_more(provisioned):
    import shutil

    done = provisioned()
    shutil.rmtree(done.place / "sites")
    (done.kit.directory / "ca.key").unlink()
    again = provisioned(sites=THIRD)
    assert again.need_keys == ["cardiology", "dermatology"]
    assert [path.name for path in (done.place / "sites").iterdir()] == ["surgery"]
    assert read_kit(again.kit.directory, CoordinatorKit) == again.kit


def test_the_key_of_a_revoked_site_is_nowhere(provisioned):
    done = provisioned(sites=THIRD)
    kit = read_kit(done.place / "sites" / "dermatology", SiteKit)
    theirs = [
        kit.node_key.read_bytes().splitlines()[2],
        kit.node_public_key.read_bytes().split()[1],
        kit.signing_key.read_bytes().splitlines()[1],
        kit.public_key.read_bytes().splitlines()[1],
    ]
    pinned = done.kit.site_keys.read_text().splitlines()[2].split('"')[3].encode()
    everything = b"".join(contents(done.place).values())
    assert all(key in everything for key in [*theirs, pinned])
    again = provisioned(sites=THIRD, revoke="dermatology")
    everything = b"".join(contents(done.place).values())
    assert not any(key in everything for key in [*theirs, pinned])
    assert again.kit.sites == {"cardiology": 0, "surgery": 2}
    assert again.kit.revoked == {"dermatology": 1}
    assert read_kit(again.kit.directory, CoordinatorKit) == again.kit


def test_the_number_of_a_revoked_site_is_not_given_again(provisioned):
    provisioned(sites=THIRD)
    provisioned(sites=THIRD, revoke="surgery")
    two = {name: {} for name in ("cardiology", "dermatology")}
    assert provisioned(sites={**two, "radiology": {}}).kit.sites["radiology"] == 3
    with pytest.raises(ValueError, match=r"sites\.surgery was revoked"):
        provisioned(sites={**two, "radiology": {}, "surgery": {}})


def test_the_certificate_can_be_renewed_and_the_authority_stays(provisioned):
    done = provisioned()
    before = keys(done.place)
    old = done.kit.server_certificate.read_bytes()
    again = provisioned(renew=True)
    assert again.kit.server_certificate.read_bytes() != old
    changed = {path.name for path, data in keys(done.place).items() if before[path] != data}
    assert changed == {"server.key"}


def test_a_coordinator_moves_to_another_name_with_its_authority_and_the_sites_keys(provisioned):
    before = keys(provisioned().place)
    moved = {"host": "b.org", "port": 18444}
    done = provisioned(renew=True, coordinator=moved)
    assert (done.kit.host, done.kit.port) == ("b.org", 18444)
    assert "for b.org, until" in check_certificate(done.kit)
    assert "listen 18444 ssl" in done.kit.gate.read_text()
    assert read_kit(done.kit.directory, CoordinatorKit) == done.kit
    changed = {path.name for path, data in keys(done.place).items() if before[path] != data}
    assert changed == {"server.key"}
    assert "coordinator: {host: b.org, port: 18444} in kit.yaml" in " ".join(done.notes)


def test_what_does_not_fit_the_kits_is_refused_and_nothing_changes(provisioned, tmp_path):
    place = provisioned().place
    before = contents(place)
    for words, text in (
        ({"federation": "others"}, "federation is 'others', but the kits"),
        ({"coordinator": {"host": "b.org", "port": 18443}}, "host is 'b.org'"),
        ({"coordinator": {"host": "127.0.0.1", "port": 2}}, "port is 2"),
        ({"sites": {"cardiology": {}}}, r"sites\.dermatology is missing.*--revoke dermatology"),
        ({"revoke": "surgery"}, "--revoke surgery: no such site"),
        ({"revoke": "cardiology", "quorum": 2}, "quorum is 2, sites left: 1"),
    ):
        with pytest.raises(ValueError, match=text):
            provisioned(**words)
    (place / "coordinator" / "ca.key").rename(tmp_path / "ca.key")
    with pytest.raises(ValueError, match="--renew needs"):
        provisioned(renew=True)
    (tmp_path / "ca.key").rename(place / "coordinator" / "ca.key")
    assert contents(place) == before


def test_a_directory_with_other_things_is_refused(provisioned, tmp_path):
    (tmp_path / "kits").mkdir()
    (tmp_path / "kits" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty, but holds no kits"):
        provisioned()
    assert [path.name for path in (tmp_path / "kits").iterdir()] == ["thesis.tex"]


def test_a_directory_that_is_no_site_of_the_federation_is_refused(provisioned):
    place = provisioned().place
    (place / "sites" / "surgery").mkdir()
    before = contents(place)
    with pytest.raises(ValueError, match="not part of the federation"):
        provisioned(sites=THIRD)
    assert contents(place) == before


@pytest.fixture
def stopping(monkeypatch):
    """A function that lets so many files be written, and then says Ctrl+C."""

    def stop_after(count):
        written = []

        def writing(*words):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(words)
            write_file(*words)

        monkeypatch.setattr(module, "write_file", writing)

    return stop_after


@pytest.mark.parametrize("count", range(0, 22, 3))
def test_a_first_provisioning_that_is_stopped_leaves_nothing(
    provisioned, tmp_path, stopping, count
):
    stopping(count)
    with pytest.raises(KeyboardInterrupt):
        provisioned()
    assert [path.name for path in tmp_path.iterdir()] == ["sites.yaml"]


@pytest.mark.parametrize("count", range(12))
def test_adding_a_site_that_is_stopped_leaves_kits_that_work(provisioned, stopping, count):
    done = provisioned()
    before = keys(done.place)
    stopping(count)
    with pytest.raises(KeyboardInterrupt):
        provisioned(sites=THIRD)
    read_kit(done.kit.directory, CoordinatorKit)
    for name in done.kit.sites:
        read_kit(done.place / "sites" / name, SiteKit)
    after = keys(done.place)
    assert {path: after[path] for path in before} == before
    assert not list((done.place / "sites").glob(".*"))


@pytest.mark.parametrize("count", range(5))
def test_a_revocation_that_is_stopped_can_be_done_again(provisioned, stopping, count):
    done = provisioned(sites=THIRD)
    pinned = read_site_keys(done.kit.site_keys)[1]
    stopping(count)
    with pytest.raises(KeyboardInterrupt):
        provisioned(sites=THIRD, revoke="dermatology")
    stopping(1000)
    again = provisioned(sites=THIRD, revoke="dermatology")
    assert again.kit.revoked == {"dermatology": 1}
    assert not again.kit.node("dermatology").exists()
    for path in done.place.rglob("sites.json"):
        assert pinned not in read_site_keys(path).values()
    assert read_kit(again.kit.directory, CoordinatorKit) == again.kit


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("role: site", "role: boss", r"kit\.yaml, line 1: role: expected site or coordinator"),
        ("index: 0", "index: -1", r"line 4: index: expected a whole number from 0"),
        ("train_file:", "trainfile:", r"settings\.trainfile: unknown option"),
        ("port: 18443", "port: x", r"coordinator\.port: expected a whole number"),
    ],
)
def test_a_kit_that_was_edited_wrongly_says_where(provisioned, old, new, text):
    path = provisioned().place / "sites" / "cardiology" / "kit.yaml"
    words = path.read_text()
    assert old in words
    path.write_text(words.replace(old, new))
    with pytest.raises(ValueError, match=text):
        read_kit(path.parent, SiteKit)


def test_a_kit_with_a_file_missing_says_which(provisioned):
    place = provisioned().place
    (place / "sites" / "cardiology" / "node.key").unlink()
    with pytest.raises(ValueError, match=r"node\.key is missing"):
        read_kit(place / "sites" / "cardiology", SiteKit)
    with pytest.raises(ValueError, match="no kit there"):
        read_kit(place, CoordinatorKit)
    with pytest.raises(ValueError, match="is a coordinator's kit; a site's kit"):
        read_kit(place / "coordinator", SiteKit)
    with pytest.raises(ValueError, match="is a site's kit; a coordinator's kit"):
        read_kit(place / "sites" / "dermatology", CoordinatorKit)


def test_the_command_says_what_to_hand_to_whom(sites_file, tmp_path, capsys):
    words = ["provision", str(sites_file()), "--output_dir", str(tmp_path / "kits")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"site cardiology: {tmp_path / 'kits' / 'sites' / 'cardiology'}" in out
    assert "ca.key" in out
    assert main([*words, "--revoke", "cardiology"]) == 0
    out = capsys.readouterr().out
    assert "revoked: cardiology" in out
    assert "dermatology" in out.split("each older site")[1]
    assert main(["provision", "--output_dir", str(tmp_path / "other")]) == 2
    assert "no sites file given" in capsys.readouterr().err


def test_kits_are_values():
    where = {"directory": Path("a"), "federation": "f", "host": "h", "port": 1}
    assert SiteKit(**where, name="n", index=0) == SiteKit(**where, name="n", index=0)
    assert CoordinatorKit(**where, superlink_port=2, sites={}).next_index == 0


def requested(place, *names):
    """Keys made at sites, and the directory in which their requests have come."""
    (place / "requests").mkdir(parents=True, exist_ok=True)
    for name in names:
        path = make_request(place / f"at-{name}", name)
        shutil.copy(path, place / "requests")
    return read_requests(place / "requests")


def test_keys_made_at_a_site_stay_there_and_the_kit_that_comes_back_is_whole(
    sites_file, tmp_path, capsys
):
    at_site = tmp_path / "at-cardiology"
    requests = tmp_path / "requests"
    requests.mkdir()
    assert main(["site", "request", "--kit", str(at_site), "--name", "cardiology"]) == 0
    (at_site / "cardiology.request").rename(requests / "cardiology.request")
    words = ["--output_dir", str(tmp_path / "kits"), "--requests", str(requests)]
    assert main(["provision", str(sites_file()), *words]) == 0
    came = tmp_path / "kits" / "sites" / "cardiology"
    assert not list(came.glob("*.key"))
    for path in came.iterdir():
        shutil.copy(path, at_site / path.name)
    kit = read_kit(at_site, SiteKit)
    assert kit.private_files == [at_site / f"{name}.key" for name in ("node", "site", "client")]
    assert check_keys(kit) == f"site {kit.index} of 2"
    private = [path.read_bytes() for path in at_site.glob("*.key")]
    for path in (tmp_path / "kits").rglob("*"):
        assert path.is_dir() or path.read_bytes() not in private
    assert main(["provision", str(sites_file()), *words]) == 0, "the same once more changes nothing"


def test_a_request_that_was_changed_on_its_way_is_refused_by_name(tmp_path):
    requested(tmp_path, "north", "south")
    north, south = (
        json.loads((tmp_path / "requests" / f"{n}.request").read_text()) for n in ("north", "south")
    )
    path = tmp_path / "requests" / "north.request"
    for change in (
        {"node": south["node"]},
        {"site": south["site"]},
        {"certificate": south["certificate"]},
        {"name": "south"},
        {"signature": south["signature"]},
        {"site": "AAAA"},
    ):
        path.write_text(json.dumps({**north, **change}))
        with pytest.raises(ValueError, match=r"north\.request: "):
            read_requests(tmp_path / "requests")
    path.write_text("no JSON")
    with pytest.raises(ValueError, match=r"north\.request: not a site's request"):
        read_requests(tmp_path / "requests")


def test_a_certificate_that_could_sign_others_is_no_sites(tmp_path, monkeypatch):
    limits = certificates.x509.BasicConstraints(ca=True, path_length=None)
    with monkeypatch.context() as patched:
        patched.setattr(certificates, "NO_AUTHORITY", limits)
        path = make_request(tmp_path / "north", "north")
    with pytest.raises(ValueError, match=r"north\.request: its keys or its names do not"):
        read_requests(path.parent)


def test_a_certificate_that_another_has_signed_is_no_sites(tmp_path, monkeypatch):
    """It is its own authority: the gate lists each one, and nobody vouches for another."""
    other = certificates.make_client("north")
    with monkeypatch.context() as patched:
        signed = certificates.make_server(other, "north", valid_days=9)
        patched.setattr(certificates, "make_client", lambda name: signed)
        path = make_request(tmp_path / "north", "north")
    with pytest.raises(ValueError, match=r"north\.request: not a site's request"):
        read_requests(path.parent)


def test_keys_are_replaced_by_their_holder_alone(sites_file, tmp_path):
    plan = read_sites_file(sites_file())
    place = tmp_path / "kits"
    into = ProvisionArguments(output_dir=str(place))
    first = provision(plan, into)
    site = place / "sites" / "cardiology"
    before = contents(place)
    stranger = requested(tmp_path / "stranger", "cardiology")["cardiology"]
    own_key = read_signing_key(tmp_path / "stranger" / "at-cardiology" / "site.key")
    for earlier in (b"", own_key.sign(stranger.signed)):
        forged = {"cardiology": replace(stranger, earlier=earlier)}
        with pytest.raises(ValueError, match=r"cardiology\.request is not signed by cardiology's"):
            provision(plan, into, requests=forged)
    assert contents(place) == before
    request = make_request(site, None)
    assert request.parent == site / "next"
    done = provision(plan, into, requests=read_requests(request.parent))
    assert done.need_keys == list(plan.sites)
    for path in (site / "next").iterdir():
        path.replace(site / path.name)
    kit = read_kit(site, SiteKit)
    assert check_keys(kit) == f"site {kit.index} of 2"
    assert done.kit.node("cardiology").read_bytes() == kit.node_public_key.read_bytes()
    assert kit.client_certificate.read_bytes() in done.kit.client_certificates.read_bytes()
    old = before[first.kit.node("cardiology").relative_to(place)]
    assert not [path for path, data in contents(place).items() if data == old]


def test_the_gate_lists_the_certificates_of_all_sites_and_of_no_revoked_one(provisioned):
    done = provisioned(sites=THIRD)
    gone = done.kit.client("surgery").read_bytes()
    assert gone in done.kit.client_certificates.read_bytes()
    assert "ssl_verify_client on" in done.kit.gate.read_text()
    done = provisioned(revoke="surgery")
    listed = done.kit.client_certificates.read_bytes()
    assert gone not in listed
    assert listed.count(b"BEGIN CERTIFICATE") == 2


def test_a_gate_for_kits_of_before_asks_for_no_certificate(provisioned):
    done = provisioned()
    done.kit.client("cardiology").unlink()
    done = provisioned()
    assert not done.kit.client_certificates.exists()
    assert "ssl_verify_client" not in done.kit.gate.read_text()


def test_a_new_authority_is_trusted_beside_the_old_one_until_the_gate_has_its_certificate(
    sites_file, tmp_path
):
    plan = read_sites_file(sites_file())
    into = ProvisionArguments(output_dir=str(tmp_path / "kits"))
    kit = provision(plan, into).kit
    old = kit.authority.read_bytes()
    provision(plan, replace(into, new_authority=True))
    assert check_certificate(kit)
    both = (tmp_path / "kits" / "sites" / "cardiology" / "ca.crt").read_bytes()
    assert both == kit.authority.read_bytes()
    assert both.endswith(old)
    provision(plan, replace(into, renew=True))
    kit.authority.write_bytes(both.removesuffix(old))
    assert check_certificate(kit)
    kit.authority.write_bytes(old)
    with pytest.raises(ValueError, match="not signed by"):
        check_certificate(kit)
