"""FSDP over two real processes: the losses and weights of one process."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharding_worker.py")


@pytest.mark.parametrize("how", ["fsdp1-orig", "fsdp1-flat", "fsdp2"])
def test_two_processes_train_as_one(how, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    words += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run(
        [*words, str(WORKER), how, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
