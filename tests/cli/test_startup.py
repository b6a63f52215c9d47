"""What a command has loaded when it first speaks: nothing that takes seconds.

Modules are counted, not seconds. One process tries all commands, the light ones: the first that
loads a heavy package spoils those after it, so the earliest entry with one is to blame.
"""

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from fedfora.cli.main import main
from fedfora.config import ConfigParser
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.privacy.accounting import Release, noise_multiplier_for
from fedfora.privacy.ledger import Ledger
from fedfora.training.checkpoints import Progress, identity_of, write_progress
from fedfora.training.preflight import ledger_of
from fedfora.training.settings import NO_EFFECT, SECTIONS, TrainSettings

# A GGUF file with one key: magic, version, tensors, keys; key, type of a text, the text.
GGUF = struct.Struct("<4sIQQQ20sIQ13s")
ARCHITECTURE, FAMILY = b"general.architecture", b"strangeformer"
PROBE = Path(__file__).with_name("startup_probe.py")
PREDICT = "predict --model_dir {d}/adapter --test_file clinic:test "
TRAIN = "train --model_name_or_path clinic-base --output_dir {d}/out "
SIMULATE = "simulate --model_name_or_path clinic-base --output_dir {d}/out "
RESUMED = "train --model_name_or_path clinic-base --output_dir {d}/run --train_file clinic "
RESUMED += "--resume_from_checkpoint last "
BEGUN = RESUMED.replace("{d}/run", "{d}/begun")
RECORD = "--train_file clinic --privacy_unit record --target_epsilon "
SITE = RECORD.replace("record", "site")
EXPORT = "export --model_dir {d}/adapter --output_dir {d}/exported "

PROGRAM = """
import socket, sys
import datasets, huggingface_hub.constants, transformers
import fedfora

def told(**options):
    try:
        fedfora.train(output_dir=sys.argv[1] + "/out", **options)
    except ValueError as error:
        print("unreached" if "127.0.0.1 cannot be reached (" in str(error) else error)

told(model="no/such", train_file="clinic")
told(model="no/such", train_file="clinic")
told(model="clinic-base", train_file="no/such")
socket.create_connection = lambda *args, **options: socket.socket()
from fedfora.registry import try_hub
assert try_hub() == ""
print("is asked" if not huggingface_hub.constants.HF_HUB_OFFLINE else "is not")
"""
MISTAKES = {
    "train --nonsense": "unknown option --nonsense",
    TRAIN + "--train_file {d}/no.json": "no such file",
    TRAIN + "--train_file {d}/broken.json": "broken.json, line 2",
    TRAIN + "--train_file {d}/no_answer.json": '"output" is missing',
    TRAIN + "--train_file clinic --quantization nf5": "did you mean 'nf4'",
    TRAIN + "--train_file clinic --validation_file {d}/no.json": "no such file",
    "train --model_name_or_path {d}/no --train_file clinic --output_dir {d}/out": "no model there",
    "train --model_name_or_path clinic-base --train_file clinic --output_dir {d}/no_answer.json": (
        "is not a directory"
    ),
    SIMULATE + "--num_round 3": "did you mean --num_rounds",
    SIMULATE + "--train_file clinic --aggregation fedavgg": "did you mean 'fedavg'",
    SIMULATE + "--train_file {d}/broken.json --num_clients 1": "broken.json, line 2",
    SIMULATE + "--train_file clinic --num_clients 5000": "only 2,400 rows to distribute",
    SIMULATE + "--train_file clinic --num_clients 2 --partition dirichlet:ward:1": "no column",
    SIMULATE + "--train_file clinic --num_clients 2 --test_file {d}/no.json": "no such file",
    SIMULATE + "--resume {d}/kits": "no run to resume",
    "simulate --train_file clinic --num_clients 2 --output_dir {d}/out": "_path is missing",
    "demo --sed 3": "did you mean --seed",
    "demo --output_dir {d}/broken.json": "is not a directory",
    "coordinator --nonsense": "unknown option --nonsense",
    "coordinator --kit {d}": "no kit there",
    "coordinator run --kit {d}": "no kit there",
    "site --kit {d}": "no kit there",
    "site journal --kit {d}": "no kit there",
    "site journal --kit {d}/kits/sites/north": "no journal yet",
    "site request --kit {d}/new": "--name is missing: the site's",
    "site request --kit {d} --name north": "is not empty; keys are never overwritten",
    "coordinator journal --kit {d}/kits/coordinator": "no journal yet",
    "provision {d}/sites.yaml --requests {d}/no": "no such directory",
    "provision {d}/private.yaml --output_dir {d}/none": (
        "private.yaml, line 8: settings.target_epsilon: --target_epsilon 0.0001 cannot be reached"
    ),
    "rehearse {d}/no.yaml": "cannot be read",
    "rehearse {d}/sites.yaml --rehearsal_rounds 0": "--rehearsal_rounds must be at least 1",
    "check data {d}/no.json": "no such file",
    "check data clinic --history_column hist": 'no row has "hist"',
    "check data --trian_file x": "did you mean --train_file",
    "check site --kit {d}": "no kit there",
    "check federation --kit {d}": "no kit there",
    "predict --nonsense": "unknown option --nonsense",
    "export --nonsense": "unknown option --nonsense",
    "predict --output_dir {d}/out": "--test_file is missing",
    "predict --test_file clinic:test --output_dir {d}/out": "--model_name_or_path is missing",
    "predict --test_file clinic:test --model_dir {d}/kits": "holds no adapter_config.json",
    "predict --test_file {d}/no.json --model clinic-base --output_dir {d}/out": "no such file",
    "export --output_dir {d}/out": "--model_dir is missing",
    "export --model_dir {d}/kits": "holds no adapter_config.json",
    "export --format quantized-base": "--model_name_or_path is missing",
    "chat": "--model_name_or_path is missing",
    "chat --adapter {d}/kits": "--adapter {d}/kits: the directory holds no adapter_config.json",
    "chat --model_dir {d}/kits": "--model_dir {d}/kits: the directory holds no adapter_config.json",
    "chat --adapter {d}/old": "fedfora.json is not an adapter's record",
    "predict --test_file clinic:test --model_dir {d}/old": "is not an adapter's record",
    "chat --adapter {d}/sealed": "safetensors.sealed is encrypted: its key is missing",
    "export --model_dir {d}/sealed": "adapter_model.safetensors.sealed is encrypted",
    "predict --test_file clinic:test --model_dir {d}/half": "safetensors, are missing",
    PREDICT + "--output_dir {d}/answers": "holds another run (predictions.jsonl)",
    PREDICT + "--output_dir {d}/adapter": "holds an adapter: name another directory",
    PREDICT + "--options_column nope": 'no row has "nope"',
    PREDICT + "--model no/such": "no/such: no such directory, and no model of that id",
    "predict --test_file {d}/options.json --model clinic-base": "a list of at least two texts",
    "train --train_file clinic --output_dir {d}/out --model no/such": "no model of that id",
    "simulate --train_file clinic --num_clients 2 --output_dir {d}/out --model such": "no model of",
    "chat --model no/such": "no model of that id",
    "export --model no/such --model_dir {d}/adapter": "no model of that id",
    TRAIN + "--train_file {d}/empty": "empty: a directory without rows",
    TRAIN + "--train_file clinic --start_adapter {d}/kits": "--start_adapter {d}/kits: the dir",
    TRAIN
    + "--train_file clinic --start_adapter {d}/old": "fedfora.json is not an adapter's record",
    TRAIN + "--train_file clinic --start_adapter {d}/adapter --lora_rank 4": "use --lora_rank 8",
    TRAIN
    + "--train_file clinic --start_adapter {d}/adapter --use_rslora --target_modules o_proj": (
        "of another form; use --use_rslora false --target_modules q_proj"
    ),
    SIMULATE + "--train_file clinic --num_clients 2 --start_adapter {d}/half": "--start_adapter",
    TRAIN + "--train_file clinic --deepspeed {d}/no.json": "--deepspeed: no such file",
    TRAIN + "--train_file clinic --resume_from_checkpoint {d}/kits": "holds no complete checkpoint",
    TRAIN + "--train_file clinic --history_column hist": 'no row has "hist"',
    TRAIN + "--train_file clinic --response_column outputt": "did you mean 'output'",
    TRAIN + "--train_file clinic --report_to foo": "unknown tracker 'foo' (known: none, tensorb",
    TRAIN + "--train_file clinic --report_to no wandb": "unknown tracker 'no'; did you mean 'none'",
    TRAIN + "--train_file clinic --report_to neptune": "--report_to neptune needs: pip install nep",
    TRAIN + "--train_file clinic --fp16 --device cpu": "--fp16 needs a GPU",
    SIMULATE + "--train_file clinic --num_clients 2 --fp16 --device cpu": "--fp16 needs a GPU",
    RESUMED + "--learning_rate 0.1": "learning_rate was 0.0002, now it is 0.1",
    RESUMED + "--resume_from_checkpoint {d}/run/checkpoint-2 --lora_rank 4": "lora_rank was 8, now",
    BEGUN + "--lora_rank 4": "{d}/begun: lora_rank was 8, now it is 4",
    EXPORT + "--format gguf-lora --base_gguf {d}/no.gguf": "--base_gguf",
    EXPORT + "--format merged --base_gguf {d}/no.gguf": "--format gguf-lora",
    EXPORT + "--format gguf --base_gguf {d}/no.gguf": "--format gguf-lora",
    EXPORT + "--merge_into original": "--merge_into original: --format lora merges nothing",
    EXPORT + "--output_dir {d}/empty --format quantized-base --quantization none": "nf4 or int8",
    EXPORT + "--output_dir {d}/kits": "--output_dir {d}/kits is not empty",
    EXPORT + "--output_dir {d}/adapter": "is where {d}/adapter is",
    "audit": "no run there",
    "audit {d}/kits": "no run there",
    "verify {d}/nowhere": "{d}/nowhere: no such directory",
    "predict {d}/kits": "'{d}/kits' belongs to no option",
    "audit --run {d}/kits": "no run there",
    TRAIN + "--train_file clinic --lora_rank 0": "--lora_rank must be at least 1",
    TRAIN + "--train_file clinic --target_modules query": "no layer of clinic-base is called that",
    SIMULATE + "--train_file clinic --num_clients 2 --target_modules query": "no layer of",
    TRAIN + "--train_file clinic --privacy_unit site --noise_multiplier 1": "train has one",
    TRAIN + RECORD + "1e-4": "--target_epsilon 0.0001 cannot be reached (steps: 120)",
    SIMULATE
    + RECORD
    + "1e-4 --num_clients 2": "--target_epsilon 0.0001 cannot be reached (steps: 30)",
    SIMULATE
    + SITE
    + "1e-4 --num_clients 2": "--target_epsilon 0.0001 cannot be reached (steps: 3)",
    TRAIN + RECORD + "8 --sampling_rate 1e-17": (
        "--sampling_rate 1e-17 is less than one of 2,400 rows in a step's sample: at least 0.000419"
    ),
    TRAIN + RECORD + "8 --privacy_dir {d}/spent": (
        "the privacy budget does not allow 120 more steps: epsilon would be "
    ),
    TRAIN + RECORD.replace("--target_epsilon", "--noise_multiplier 3 --target_epsilon") + "8 "
    "--privacy_dir {d}/spent": "--target_epsilon is 8 and",
    SIMULATE + RECORD + "8 --num_clients 2 --sampling_rate 8e-4": "less than one of 1,200 rows",
    "check privacy --rows 300 --trained 9 --target_epsilon 8 --sampling_rate 1e-17": "of 300 rows",
    "check privacy --rows 600 --target_epsilon 8 --model no/such": "no model of that id",
    "check data clinic --model no/such": "no model of that id",
    "train --train_file clinic --output_dir {d}/out --model {d}/strange.gguf": (
        "{d}/strange.gguf: unknown GGUF family 'strangeformer' (known: bloom, deci, falcon"
    ),
    EXPORT + "--format llama": "--format llama: clinic-base is a llama model, not a Baichuan",
    EXPORT + "--format llama --model {d}/gpt2": "{d}/gpt2 is a gpt2 model, not a Baichuan",
    "export --format llama --model_dir {d}/gpt2": "{d}/gpt2 is a gpt2 model, not a Baichuan",
    EXPORT + "--format gguf --model {d}/gpt2": "no such export for gpt2 models (known: llama, ",
    "export --model_dir {d}/lora": "{d}/lora: expected a FORA adapter, this one is LORA",
    TRAIN + "--train_file clinic --start_adapter {d}/lora": "expected a FORA adapter, this one is",
    "predict --test_file clinic:test --model_dir {d}/untyped": (
        "--model_dir: {d}/untyped/adapter_config.json is not an adapter's configuration: peft_t"
    ),
    "predict --test_file clinic:test --checkpoint_dir {d}/untyped": "--checkpoint_dir: {d}/untyped",
    TRAIN + "--train_file clinic --start_adapter {d}/untyped": "--start_adapter: {d}/untyped/adapt",
    "chat --adapter {d}/listed": "--adapter: {d}/listed/adapter_config.json is not an adapter's ",
    "export --model_dir {d}/listed": "configuration: not a JSON object",
    "chat --adapter {d}/torn": "adapter_config.json is not an adapter's configuration: not JSON: ",
    "predict --test_file clinic:test --model_dir {d}/baseless": "names no base_model_name_or_path",
}
FIRST_LINES = {
    "audit --help": "usage: fedfora audit RUN",
    "--version": "fedfora ",
    TRAIN + "--train_file clinic": "2,400 rows of clinic for clinic-base (nf4)",
    SIMULATE + "--train_file clinic --num_clients 2": "2 sites (rows): ",
    "demo --output_dir {d}/demo": "Four clinics: cardiology",
    "coordinator --kit {d}/kits/coordinator": "coordinator of clinics, at 127.0.0.1:9092",
    "coordinator run --kit {d}/kits/coordinator": "coordinator of clinics",
    "site --kit {d}/kits/sites/north": "site north of clinics",
    "rehearse {d}/sites.yaml": "rehearsal of clinics on this machine: 1 site",
    "check data {d}/no_answer.json": "no_answer.json: 1 row",
    "check privacy --rows 600 --target_epsilon 8 --trained 9": "600 rows, 1 site, 9 trained",
    "check site --kit {d}/kits/sites/north": "site north of clinics",
    "check federation --kit {d}/kits/coordinator": "coordinator of clinics",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows with mistakes, and a federation's kits."""
    place = tmp_path_factory.mktemp("startup")
    (place / "broken.json").write_text('{"input": "x", "output": "y"}\n{"input": \n')
    (place / "no_answer.json").write_text('{"instruction": "a", "input": "b"}\n')
    (place / "options.json").write_text('{"input": "b", "output": "A", "options": "AB"}\n')
    (place / "empty").mkdir()
    prompts = {"template": "plain", "source_prefix": ""}
    lengths = {"max_source_length": 64, "max_target_length": 64}
    (place / "strange.gguf").write_bytes(
        GGUF.pack(b"GGUF", 3, 0, 1, 20, ARCHITECTURE, 8, 13, FAMILY)
    )
    (place / "gpt2").mkdir()
    (place / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    typed = {"base_model_name_or_path": "clinic-base", "r": 8, "peft_type": "FORA"}
    typed |= {"target_modules": ["q_proj"]}
    configs = {
        **dict.fromkeys(("adapter", "old", "half", "sealed"), json.dumps(typed)),
        "lora": json.dumps({**typed, "peft_type": "LORA"}),
        "untyped": json.dumps({"base_model_name_or_path": "clinic-base", "r": 8}),
        "baseless": json.dumps({"peft_type": "FORA"}),
        **{"listed": "[]", "torn": "{"},
    }
    for name, config in configs.items():
        (place / name).mkdir()
        (place / name / "adapter_config.json").write_text(config)
        record = {} if name == "old" else {"prompts": prompts | lengths}
        (place / name / "fedfora.json").write_text(json.dumps(record))
        if name != "half":
            sealed = ".sealed" * (name == "sealed")
            (place / name / f"adapter_model.safetensors{sealed}").write_bytes(b"")
    parser = ConfigParser(SECTIONS.values(), prog="fedfora train", without=NO_EFFECT)
    began = TrainSettings(*parser.parse(RESUMED.format(d=place).split()[1:]))
    for name in ("run", "begun"):
        (place / name).mkdir()
        (place / name / "metrics.jsonl").write_text("")
    (place / "begun" / "config.yaml").write_text(yaml.safe_dump(asdict(began)))
    (place / "run" / "checkpoint-2").mkdir()
    write_progress(place / "run" / "checkpoint-2", Progress(), identity_of(asdict(began)))
    (place / "answers").mkdir()
    (place / "answers" / "predictions.jsonl").write_text("")
    (place / "answers" / "environment.json").write_text('{"identity": "another"}')
    plan = {
        "federation": "clinics",
        "coordinator": {"host": "127.0.0.1", "port": 9092},
        "settings": {"model_name_or_path": "clinic-base"},
        "sites": {"north": {"train_file": "clinic"}},
    }
    (place / "sites.yaml").write_text(yaml.safe_dump(plan))
    plan["settings"] |= {"privacy_unit": "record", "target_epsilon": 1e-4}
    (place / "private.yaml").write_text(yaml.safe_dump(plan))
    recipe = {"target_epsilon": 8.0, "delta": 1e-5, "sampling_rate": 0.5, "count": 120}
    name = f"{ledger_of(load_examples('clinic', DataArguments()))}.json"
    spent = Ledger(1e-5, 8.0, path=place / "spent" / name)
    spent.spend(Release(0.5, noise_multiplier_for(**recipe), 120))
    assert main(["provision", str(place / "sites.yaml"), "--output_dir", str(place / "kits")]) == 0
    return place


@pytest.mark.parametrize("expected", [MISTAKES, FIRST_LINES], ids=["mistakes", "first lines"])
def test_nothing_heavy_is_loaded_before_the_first_line(expected, place):
    commands = [words.format(d=place).split() for words in expected]
    done = subprocess.run(
        [sys.executable, str(PROBE), json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for (words, message), (line, heavy) in zip(
        expected.items(), json.loads(done.stdout), strict=True
    ):
        assert message.format(d=place) in line, words
        assert heavy == [], words


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path):
    """Its library would ask again for 24 seconds; a port where nobody listens stands for it."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment.pop(name, None)
    train = [sys.executable, "-m", "fedfora", *TRAIN.format(d=tmp_path).split(), "--train_file"]
    for words in (["no/such"], ["clinic", "--model_name_or_path", "no/such"]):
        done = subprocess.run([*train, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        assert "127.0.0.1 cannot be reached (" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1  # the library tells of each try


def test_a_program_that_has_the_hubs_library_already_does_not_wait_for_the_hub_either(tmp_path):
    """What the library reads when it is imported comes too late; each call tries the Hub anew."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment.pop(name, None)
    program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*["unreached"] * 3, "is asked"]
    assert "Retry" not in done.stderr  # the library tells of each try
