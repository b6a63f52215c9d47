"""Four real sites, as their administrators configure them."""

import base64
import json

import pytest

from fedfora.federated.settings import from_run_config
from fedfora.protection.keys import make_signing_key, read_signing_key

NUM_SITES = 4


@pytest.fixture
def node_configs(tmp_path):
    """What the administrators of four sites configure: a key each, and everybody's public keys."""
    public = {}
    for index in range(NUM_SITES):
        make_signing_key(tmp_path / f"site-{index}.pem")
        private = read_signing_key(tmp_path / f"site-{index}.pem")
        public[index] = base64.b64encode(private.public_key().public_bytes_raw()).decode()
    (tmp_path / "sites.json").write_text(json.dumps(public))
    return [
        {
            "partition-id": index,
            "num-partitions": NUM_SITES,
            "signing-key": str(tmp_path / f"site-{index}.pem"),
            "site-keys": str(tmp_path / "sites.json"),
            "site-state": str(tmp_path / f"state-{index}"),
        }
        for index in range(NUM_SITES)
    ]


@pytest.fixture
def run_config(tiny_dir, tmp_path):
    return from_run_config(
        {
            "model_name_or_path": tiny_dir,
            "quantization": "none",
            "train_file": "clinic",
            "partition": "by-column:specialty",
            "output_dir": str(tmp_path / "out"),
            "lora_rank": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "warmup_ratio": 0.0,
            "num_rounds": 1,
            "local_steps": 1,
            "secure_aggregation": True,
        }
    ).run_config()
