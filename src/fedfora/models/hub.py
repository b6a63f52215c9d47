"""A model's id and a hub to what transformers can load: an id of Hugging Face or a directory."""

from pathlib import Path

# What a checkpoint may bring and a model does not need; code is never downloaded.
IGNORED = ["*.py", "*.pdf"]


def local_path(name: str, hub: str, cache_dir: str | None) -> str:
    """Return a directory, or an id that transformers finds on Hugging Face by itself.

    Args:
        name: A directory, which wins whatever the hub, or an id such as
            "baichuan-inc/Baichuan2-7B-Chat".
        hub: "huggingface" or "modelscope".
        cache_dir: Where ModelScope keeps what it downloads; None takes its own default.

    Raises:
        ValueError: If the package for ModelScope is missing or it cannot provide the model.
    """
    if hub == "huggingface" or Path(name).is_dir():
        return name
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ValueError(
            '--hub modelscope needs a package: pip install "fedfora[modelscope]"'
        ) from error
    try:
        return str(snapshot_download(name, cache_dir=cache_dir, ignore_patterns=IGNORED))
    except Exception as error:  # its errors have no common kind; the user needs their message
        raise ValueError(
            f"--model_name_or_path {name}: ModelScope cannot provide it: {error}"
        ) from error
