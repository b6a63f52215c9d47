"""The processes of a training: alone, or started by torchrun, accelerate or deepspeed."""

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from fedfora.protection.keys import ENCRYPTION_FILE, encryption_key
from fedfora.training.arguments import trainer_arguments
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainSettings

_IN_PLAIN = ("DEEPSPEED", "FSDP")  # as accelerate's environment has them


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them: which one it is, and their number.

    `arguments` are the Trainer's that started them. While they live, transformers knows that
    DeepSpeed is in use, which decides how a base model is loaded.
    """

    index: int
    number: int
    arguments: Any = None


def start_processes(settings: TrainSettings) -> Processes:
    """Connect with the other processes of this training, if a launcher started any.

    Raises:
        ValueError: If DeepSpeed or FSDP would write in plain what is to be encrypted.
    """
    launch = settings.launch
    if launch.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    by_launcher = (os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in _IN_PLAIN)
    if encryption_key() is not None and (launch.deepspeed is not None or any(by_launcher)):
        raise ValueError(
            f"{' and '.join(_IN_PLAIN)} write their states in plain, and {ENCRYPTION_FILE} asks "
            "for encryption: train without them, or without the key"
        )
    if launch.deepspeed is None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(index=0, number=1)
    arguments = trainer_arguments(  # making them connects this process with the others
        settings.train,
        StepWindow(0, 1, 1),
        seed=settings.train.seed,
        device=settings.model.device if torch.cuda.is_available() else "cpu",
        output_dir=tempfile.gettempdir(),
        bf16=settings.train.bf16,
        deepspeed=launch.deepspeed,
    )
    return Processes(
        index=arguments.process_index, number=arguments.world_size, arguments=arguments
    )
