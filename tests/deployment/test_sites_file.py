"""A sites file says what is wrong in it: file, line, key, and what is allowed there."""

import pytest

from fedfora.deployment.sites_file import read_sites_file

GOOD = """\
federation: clinics
coordinator: {host: fed.example.org, port: 8443}
quorum: 2
base_fingerprint: 0123456789abcdef0123456789abcdef
settings:
  num_rounds: 3
  target_modules: [q_proj, v_proj]
sites:
  cardiology: {train_file: /data/notes.json}
  dermatology:
"""


def read(tmp_path, text):
    path = tmp_path / "sites.yaml"
    path.write_text(text)
    return read_sites_file(path)


def test_a_sites_file_is_read(tmp_path):
    plan = read(tmp_path, GOOD)
    assert (plan.federation, plan.host, plan.port) == ("clinics", "fed.example.org", 8443)
    assert plan.superlink_port == 8444
    assert plan.quorum == 2
    assert plan.settings == {"num_rounds": 3, "target_modules": ["q_proj", "v_proj"]}
    assert plan.sites == {"cardiology": {"train_file": "/data/notes.json"}, "dermatology": {}}
    assert list(plan.sites) == ["cardiology", "dermatology"]


MISTAKES = [
    ("federation: clinics", "federation: my clinics", 1, "federation: a name has"),
    ("federation: clinics\n", "", 1, "federation is missing"),
    ("federation:", "federations:", 1, "did you mean 'federation'?"),
    ("port: 8443", "port: 84430", 2, "coordinator.port: expected a whole number from 1 to 65535"),
    ("port: 8443", "port: yes", 2, "coordinator.port: expected a whole number"),
    ("port: 8443", "prot: 8443", 2, "coordinator.prot: unknown key 'prot'; did you mean 'port'?"),
    (", port: 8443", "", 2, "coordinator: port is missing"),
    ("port: 8443", "port: 8443, superlink_port: 8443", 2, "8443 is the gate's port already"),
    ("fed.example.org", "https://fed", 2, "coordinator.host: expected a DNS name or an address"),
    ("fed.example.org", "10.0.0.300", 2, "coordinator.host: expected a DNS name or an address"),
    ("quorum: 2", "quorum: 3", 3, "quorum: expected a whole number from 1 to 2, got 3"),
    ("  num_rounds: 3", "  num_rounds: 3\n  min_clients: 1", 3, "settings.min_clients says 1"),
    ("0123456789abcdef" * 2, "nonsense", 4, "base_fingerprint: expected the 32 hexadecimal"),
    (
        "0123456789abcdef" * 2,
        "13672758079c9411",
        4,
        "base_fingerprint: expected the 32 hexadecimal",
    ),
    ("num_rounds: 3", "num_round: 3", 6, "settings.num_round: unknown option --num_round; did"),
    ("num_rounds: 3", "num_rounds: many", 6, "settings.num_rounds: "),
    ("num_rounds: 3", "num_rounds: 0", 6, "settings.num_rounds: --num_rounds must be at least 1"),
    ("num_rounds: 3", "num_rounds: 3\n  num_rounds: 4", 7, "settings.num_rounds: twice"),
    ("num_rounds: 3", "output_dir: x", 6, "settings.output_dir: cannot be set here"),
    ("num_rounds: 3", "partition: iid", 6, "a real site trains on all rows of its files"),
    ("train_file: /data/notes.json", "num_clients: 2", 9, "the sites are those under sites"),
    ("num_rounds: 3", "resume: x", 6, "settings.resume: cannot be set here"),
    ("num_rounds: 3", "aggregation: fedavgg", 6, "did you mean 'fedavg'?"),
    ("{train_file: /data/notes.json}", "[1]", 9, "sites.cardiology: expected keys and values"),
    ("train_file:", "train_fil:", 9, "sites.cardiology.train_fil: unknown option"),
    ("train_file: /data/notes.json", "learning_rate: 1", 9, "it belongs under settings"),
    ("train_file: /data/notes.json", "device: tpu", 9, "sites.cardiology.device: "),
    (
        "train_file: /data/notes.json",
        "lora_r: 4",
        9,
        "cardiology.lora_r: is the same for all sites",
    ),
    (
        "num_rounds: 3",
        "lora_r: 4\n  lora-rank: 8",
        6,
        "settings.lora_r: is said again, by another name",
    ),
    (
        "num_rounds: 3",
        "num_rounds: 3\n  lora_r: 0",
        7,
        "settings.lora_r: --lora_rank must be at le",
    ),
    ("  dermatology:", "  ../../etc:", 10, "a name has"),
    ("  dermatology:", "  Cardiology:", 10, "differs from cardiology only in case"),
    ("  dermatology:", "  Coordinator:", 10, "sites.Coordinator: is the coordinator's name"),
    ("  dermatology:", "  7:", 8, "the key 7 is not text"),
    ("clinics", "[", 1, "is not valid YAML"),
]


@pytest.mark.parametrize(("old", "new", "line", "text"), MISTAKES)
def test_a_mistake_is_named_with_file_line_and_key(tmp_path, old, new, line, text):
    assert old in GOOD
    with pytest.raises(ValueError, match=r"sites\.yaml") as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert text in str(caught.value)


RECORD = "num_rounds: 3\n  privacy_unit: record\n  target_epsilon: "
SITE = RECORD.replace("record", "site")


@pytest.mark.parametrize(
    ("settings", "own", "line", "text"),
    [
        (RECORD + "0.001", "", 8, "target_epsilon 0.001 cannot be reached (steps: 30)"),
        (SITE + "0.001", "", 8, "(steps: 3)"),
        (RECORD + "8", ", target_epsilon: 0.001", 11, "cardiology.target_epsilon: --target_eps"),
        (RECORD + "0.001\n  per_device_train_batch_size: 4", "", None, ""),
    ],
)
def test_a_budget_that_no_noise_keeps_is_named_as_far_as_it_is_known_without_rows(
    tmp_path, settings, own, line, text
):
    good = GOOD.replace("num_rounds: 3", settings).replace("notes.json}", f"notes.json{own}}}")
    if line is None:
        assert read(tmp_path, good).sites
        return
    with pytest.raises(ValueError, match=rf"sites\.yaml, line {line}: ") as caught:
        read(tmp_path, good)
    assert text in str(caught.value)
    assert f"line {line}" in str(caught.value)


def test_flags_that_do_not_fit_together_are_told(tmp_path):
    text = GOOD.replace("num_rounds: 3", "secure_aggregation: true\n  robust: median")
    with pytest.raises(ValueError, match=r"line 7: settings\.robust: --robust median needs every"):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        read_sites_file(tmp_path / "none.yaml")
