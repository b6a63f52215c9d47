"""An adapter's README.md: what it is, how it was trained, how it scored, and how to load it."""

from typing import Any

import yaml

from fedfora.registry import counted
from fedfora.reporting.card import Card
from fedfora.reporting.sections import score_table
from fedfora.reporting.wording import data_size, label

LOADING = """## Loading

```python
import fedfora  # makes PEFT know the adapter type FORA
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("THIS_DIRECTORY")
```

Without fedfora: `fedfora export --model_dir THIS_DIRECTORY --output_dir LORA` writes the same
adapter as LoRA. `fedfora.json` holds the prompt format it was trained with.
"""


def model_card(adapter_config: dict[str, Any], card: Card | None = None) -> str:
    """Return the model card of an adapter.

    There is no evaluation card while the run that makes the adapter is in progress.
    """
    base, rank = adapter_config["base_model_name_or_path"], adapter_config["r"]
    federated = card is not None and "federation" in card
    tags = ["fora", "federated-learning"] if federated else ["fora"]
    facts = {"base_model": base, "library_name": "peft", "tags": tags}
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---",
        f"# FoRA adapter of rank {rank} for {base}\n",
    ]
    if card is not None:
        parts += [_training(card), _results(card)]
        if federated or card["privacy"]["epsilon"] is not None:
            parts.append(f"## Privacy\n\n{card['privacy']['statement']}\n")
    return "\n".join(part for part in [*parts, LOADING] if part)


def _training(card: Card) -> str:
    """Say what it was trained on, and by whom."""
    quantization = card["base"]["quantization"]
    lines = [
        f"- data: {card['data']['train_file']}",
        f"- base held as: {quantization}, fingerprint `{card['base']['fingerprint']}`",
    ]
    if federation := card.get("federation"):
        sites, settings = federation["sites"], federation["settings"]
        names = f": {', '.join(sites)}" if len(sites) <= 8 else ""
        lines += [
            f"- federation of {counted(len(sites), 'site')}{names}",
            f"- {counted(federation['rounds'], 'round')} of "
            f"{counted(settings['local_steps'], 'step')}, aggregation `{settings['aggregation']}`",
            f"- sent by all sites together: {data_size(federation['uplink_bytes'])}",
        ]
    lines += [f"- {name}: {value}" for name, value in card["training"].items()]
    if command := card["environment"]["command"]:
        lines += ["", "```", command, "```"]
    return "\n".join(["## Training\n", *lines, ""])


def _results(card: Card) -> str:
    """Return the card's rows as a table, with intervals where there are any."""
    if not card["rows"]:
        return ""
    table = score_table(card)
    names = table["names"]
    lines = [
        f"## Results on {card['data']['test_file'] or 'the test rows'}\n",
        "| | " + " | ".join(map(label, names)) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for row in table["rows"]:
        cells = [f"{value} ({around})" if around else value for value, around in row["scores"]]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
