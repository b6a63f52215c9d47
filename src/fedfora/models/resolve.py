"""What the user named as a base model to where it is; nothing heavy is loaded to find out."""

from importlib.resources import as_file, files
from pathlib import Path

from fedfora.models.settings import ModelArguments

BUNDLED = {"clinic-base": "clinic_base"}


def checked_model_name(settings: ModelArguments) -> str:
    """Return what the user named, if it can be a model at all.

    Raises:
        ValueError: If nothing was named, or a directory without a model.
    """
    name = settings.model_name_or_path
    if not name:
        raise ValueError("--model_name_or_path is missing: a directory, a Hub id, or clinic-base")
    check_model_name(name)
    return name


def resolve_model(settings: ModelArguments) -> str:
    """Return the directory of the model that the user named, or its id on Hugging Face.

    Raises:
        ValueError: If nothing was named, or there is no model.
    """
    name = checked_model_name(settings)
    return model_path(name, hub=settings.hub, cache_dir=settings.cache_dir)


def model_path(name: str, *, hub: str = "huggingface", cache_dir: str | None = None) -> str:
    """Return the directory of a bundled or a ModelScope model, or the name as it is.

    Raises:
        ValueError: If the name is a directory without a model, or ModelScope cannot provide it.
    """
    if name in BUNDLED:
        with as_file(files("fedfora.models") / BUNDLED[name]) as path:
            return str(path)
    check_model_name(name)
    return local_path(name, hub, cache_dir)


def check_model_name(name: str) -> None:
    """Raise if a name can be no model: it is none that is bundled, no directory of one, no id.

    Raises:
        ValueError: Saying what is there instead.
    """
    if name in BUNDLED:
        return
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"--model_name_or_path {name}: "
            + (
                "that is an adapter, not a base model (an adapter: --model_dir)"
                if (path / "adapter_config.json").is_file()
                else "the directory holds no config.json"
            )
        )
    if not path.is_dir() and _looks_like_a_path(name):
        raise ValueError(f"--model_name_or_path {name}: no model there: no such directory")


def _looks_like_a_path(name: str) -> bool:
    """Whether a name can be no id on a hub, which is `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


# A model's id and a hub to what transformers can load: an id of Hugging Face or a directory.


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
