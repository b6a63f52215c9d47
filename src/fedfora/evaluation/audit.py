"""`fedfora audit`: attack a run's own adapter, and say in numbers what the attack learned."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fedfora.config import flag
from fedfora.data.encoding import encode_examples, prompt_format
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.membership import row_losses, separation
from fedfora.models.loading import load_adapter, load_base
from fedfora.models.saving import read_prompt_format
from fedfora.models.settings import ModelArguments
from fedfora.reporting.record import write_text

FILE = "audit.json"


@dataclass
class AuditArguments:
    """Which run to attack, and with which rows."""

    run: str | None = flag(None, "run directory of train, simulate or demo")
    held_out_file: str | None = flag(
        None, "rows of the same kind that were not trained on; default the run's --test_file"
    )
    max_rows: int = flag(500, "rows of either kind that the attack looks at")
    batch_size: int = flag(16, "rows per forward pass")


def audit(arguments: AuditArguments) -> dict[str, Any]:
    """Attack a run's adapter, write audit.json into the run directory, and return its content.

    Membership is inferred from the adapter's losses, and from the base's own, which has seen none
    of the rows: what the two have in common is no leak but a difference between the files.

    Raises:
        ValueError: If the directory holds no run, or there are no rows that were not trained on.
    """
    directory = Path(arguments.run or "")
    if arguments.run is None or not (directory / "config.yaml").is_file():
        raise ValueError(f"--run {arguments.run}: no run there, config.yaml is missing")
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    data = DataArguments(**config["data"])
    held_out = arguments.held_out_file or data.test_file
    if held_out is None or data.train_file is None:
        raise ValueError("--held_out_file is missing: rows of the same kind, not trained on")
    base = load_base(ModelArguments(**config["model"]))
    model = load_adapter(base, directory)
    prompts = read_prompt_format(directory) or prompt_format(data, base.tokenizer)
    kinds = []
    for file in (data.train_file, held_out):
        rows = load_examples(file, data)
        random.Random(0).shuffle(rows)
        kinds.append(encode_examples(rows[: arguments.max_rows], base.tokenizer, prompts))

    def attack() -> dict[str, Any]:
        members, others = (
            row_losses(model, base.tokenizer, rows, batch_size=arguments.batch_size)
            for rows in kinds
        )
        means = {"loss_in": float(members.mean()), "loss_out": float(others.mean())}
        return asdict(separation(members, others)) | means

    found: dict[str, Any] = {"adapter": attack()}
    with model.disable_adapter():
        found["base"] = attack()
    content = {
        "attack": "membership inference by loss",
        "train_file": data.train_file,
        "held_out_file": held_out,
        "rows": [len(rows) for rows in kinds],
        **found,
    }
    write_text(directory / FILE, json.dumps(content, indent=2) + "\n")
    return content
