"""Which settings a federation shares, and which are a site's own: no path travels.

The coordinator's settings travel to real sites with Flower's run config. What names a file, a
directory, a model or a device there is the site's own business: such a setting never travels, and a
site refuses a run config that holds one.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fedfora.config import Scalar
from fedfora.federated.settings import SECTIONS

LOCAL_ONLY = frozenset(
    {
        *("model_name_or_path", "start_adapter", "hub", "cache_dir", "device"),
        *("train_file", "test_file", "dataset", "dataset_dir", "skip_bad_rows"),
        *("output_dir", "overwrite_output_dir", "resume", "privacy_dir"),
        *("partition", "num_clients"),
    }
)

# These travel as defaults; a site that sets another value still takes part.
SITE_MAY_OVERRIDE = frozenset(
    {
        *("task", "source_prefix", "instruction_column", "prompt_column", "response_column"),
        *("history_column", "bnb_4bit_use_double_quant", "gradient_checkpointing"),
        *("per_device_eval_batch_size", "secagg_min_sites"),
    }
)


def common_part(run_config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the settings that may travel from the coordinator to its sites."""
    return {name: value for name, value in run_config.items() if _plain(name) not in LOCAL_ONLY}


def agreed_part(run_config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the settings that are the same at the coordinator and at every site."""
    left_out = LOCAL_ONLY | SITE_MAY_OVERRIDE
    return {name: value for name, value in run_config.items() if _plain(name) not in left_out}


def at_site(received: Mapping[str, Scalar], own: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a site's settings: what the coordinator sent, overridden by the site's own.

    Raises:
        ValueError: If the coordinator sent a setting that is the site's own, by its name or by
            another name that a command line has for it.
    """
    known = {field.name for section in SECTIONS.values() for field in fields(section)}
    if wrong := sorted(name for name in received if _plain(name) not in known - LOCAL_ONLY):
        raise ValueError(f"the coordinator may not set {', '.join(wrong)} at a site")
    return {_plain(name): value for name, value in [*received.items(), *own.items()]}


def as_scalar(value: Any) -> Scalar:
    """Return a setting from a YAML file as Flower's run config can hold it: lists become words."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


def _plain(name: str) -> str:
    return name.replace("-", "_")
