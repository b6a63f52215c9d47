"""A saved adapter to the base it was trained on, held as it was then, and to one model of both.

Every command that reads an adapter takes its base from here, and measures here how far the answers
of two models are apart, on fixed random tokens.
"""

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedfora.adapter.state import draw_inner_factors, read_state, write_state
from fedfora.models.fingerprint import describe, fingerprint, same_model, sketch
from fedfora.models.loading import UNCOVERED, Base, fora_config, load_adapter, load_base, uncovered
from fedfora.models.resolve import check_adapter_dir, read_record, settings_of_base
from fedfora.models.saving import read_adapter
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.seeds import derive_seed

logger = logging.getLogger(__name__)

ROWS, LENGTH, SEED = 4, 32, 0
# Largest deviation of what must be the same function. float32 products in another order differ by
# less than the first; rounding to 16 bits, or the rounded inputs of int8, by less than the second.
SAME, SAME_ROUNDED = 1e-3, 0.1


def load_base_of(
    settings: ModelArguments, adapter_dir: str | Path, *, needs_tokenizer: bool = True
) -> Base:
    """Load an adapter's base and check that it is the one that the adapter was trained on.

    Raises:
        ValueError: If the base cannot be loaded, or is another one.
    """
    base = load_base(settings, needs_tokenizer=needs_tokenizer)
    check_base(base, adapter_dir, read_record(adapter_dir))
    return base


def load_with_adapter(
    settings: ModelArguments, adapter_dir: str | Path | None, given: Collection[str] = ()
) -> tuple[Base, Any]:
    """Load an adapter's base as `settings_of_base` has it, and the model that answers.

    Without an adapter the base itself answers.
    """
    if adapter_dir is None:
        base = load_base(settings)
        return base, base.model
    base = load_base_of(settings_of_base(settings, adapter_dir, given), adapter_dir)
    return base, load_adapter(base, adapter_dir)


def add_adapter(
    base: Base, settings: AdapterArguments, *, seed: int, init_weights: bool | Literal["svd"] = True
) -> PeftModel:
    """Put the adapter that a training begins with on the base: fresh, or the one named.

    The same seed gives the same fresh adapter everywhere; `init_weights` is as in `ForaConfig`.

    Raises:
        ValueError: If a setting is out of range, or the adapter to start from does not exist or is
            of another base or form.
    """
    directory = settings.start_adapter
    if directory is None:
        return _fresh_adapter(base, settings, seed, init_weights)
    check_adapter_dir(directory, "--start_adapter", kind="FORA")
    try:
        check_base(base, Path(directory), read_record(directory))
        model = _fresh_adapter(base, settings, seed, init_weights)
        saved, config = PeftConfig.from_pretrained(directory), model.peft_config["default"]
        for name in ("r", "lora_alpha", "use_rslora"):
            if getattr(saved, name, None) != (ours := getattr(config, name)):
                raise ValueError(f"its {name} is {getattr(saved, name, None)}, here it is {ours}")
        state, targets = read_adapter(directory), saved.target_modules
        if state.keys() != read_state(model).keys():
            names = targets if isinstance(targets, str) else " ".join(sorted(targets))
            raise ValueError(f"it is on other layers: use --target_modules {names}")
        write_state(model, state)
    except (ValueError, OSError) as error:
        raise ValueError(f"--start_adapter {directory} cannot be used: {error}") from error
    return model


def _fresh_adapter(
    base: Base, settings: AdapterArguments, seed: int, init_weights: bool | Literal["svd"]
) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "adapter"))
        config = fora_config(settings, base.name, init_weights=init_weights)
        model = get_peft_model(base.model, config)
    draw_inner_factors(model, seed)
    if settings.target_modules == ["all-linear"]:
        kinds, share = uncovered(base.model, lambda name, _: name.endswith(".base_layer"))
        if share > UNCOVERED:
            logger.warning("no adapter on %.0f %% of the weights: %s", 100 * share, kinds)
    return model


def start_note(settings: AdapterArguments) -> str:
    """Return what a privacy statement adds about the adapter that a training started from."""
    if settings.start_adapter is None:
        return ""
    state = read_adapter(settings.start_adapter)
    numbers = b"".join(state[name].numpy().tobytes() for name in sorted(state))
    return (
        f" It started from adapter {hashlib.sha256(numbers).hexdigest()[:32]}; what that was "
        "trained on counts as public and is not covered."
    )


def check_base(base: Base, adapter_dir: str | Path | None, record: dict[str, Any]) -> str:
    """Raise if an adapter was trained on another model; warn if on the same, held differently.

    `record` is what is stored with the adapter. Of a base without a tokenizer only the embedding is
    compared.

    Returns:
        The base's fingerprint; "" without a tokenizer.

    Raises:
        ValueError: Naming both fingerprints.
    """
    here = "" if base.tokenizer is None else fingerprint(base)
    stored = record.get("base_fingerprint")
    if stored in (None, here):
        return here
    if "base" not in record:  # by an earlier fedfora, which kept no more than the fingerprint
        logger.warning("the base is not as in training: %s, then %s", here, stored)
        return here
    trained, now = record["base"], describe(base)
    conditions = ("quantization", "dtype", "double_quant", "device")
    differing = [key for key in conditions if trained.get(key, now[key]) != now[key]]
    # Of an earlier fedfora's fingerprints, of 16 digits and less than all this, the sketch decides.
    alike = not differing and base.tokenizer is not None and len(str(stored)) == len(here)
    if alike or not same_model(trained["sketch"], now["sketch"]):
        raise ValueError(
            f"--ori_model_dir {base.name} is not the base that {adapter_dir} was trained on: "
            f"fingerprint {here or sketch(base)[:30]}, the adapter's base {trained['name']} has "
            f"{stored}"
        )
    if differing:
        shown = sorted({*conditions[:2], *differing}, key=conditions.index)
        logger.warning(
            "the adapter was trained on its base in %s; here it is in %s",
            *(", ".join(str(held[key]) for key in shown) for held in (trained, now)),
        )
    return here


def merge_adapter(base: Base, adapter_dir: str | Path) -> tuple[Any, Tensor]:
    """Put a saved adapter into the weights of its base: one plain model, faster to run.

    A quantized base is dequantized first, since the sum of both would be rounded again. An
    output layer that shares its weights with the embedding gets its own before it is changed. The
    base is used up.

    Returns:
        The model, and the logits of base and adapter before, on the tokens of `probe`.

    Raises:
        ValueError: If the directory holds no adapter.
    """
    trained = load_adapter(base, adapter_dir)
    expected = logits(trained)
    plain = trained.unload()
    if base.quantization != "none":
        plain = _dequantized(plain)
    model = load_adapter(replace(base, model=plain), adapter_dir)
    head = plain.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and plain.config.get_text_config().tie_word_embeddings:
        head.get_base_layer().weight = nn.Parameter(head.weight.detach().clone())
        for config in (plain.config, plain.config.get_text_config()):
            config.tie_word_embeddings = False
        plain.all_tied_weights_keys = {}
    return model.merge_and_unload(safe_merge=True).eval(), expected


def _dequantized(model: Any) -> Any:
    """Return a model with the layers of its class; transformers makes a Linear of a Conv1D."""
    modules = model.named_modules()
    transposed = [name for name, m in modules if getattr(m, "source_cls", None) is Conv1D]
    model = model.dequantize()
    for name in transposed:
        linear = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Deviation:
    """Distance between the logits of two models.

    Args:
        largest: Largest absolute difference, divided by the largest absolute logit.
        same_token: Share of positions at which both find the same next token likeliest.
    """

    largest: float
    same_token: float

    def __str__(self) -> str:
        return f"largest deviation {self.largest:.1e}, same next token {self.same_token:.1%}"

    def check(self, what: str, limit: float) -> None:
        """Raise if the deviation is beyond a limit, or no number.

        Raises:
            ValueError: Saying what deviates, by how much, and the limit.
        """
        if not self.largest <= limit:
            raise ValueError(f"{what} is not the same function: {self}; the limit is {limit:g}")


def probe(vocab_size: int) -> Tensor:
    """Return the token ids that both models read, of shape `(ROWS, LENGTH)`."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocab_size, (ROWS, LENGTH), generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return a model's logits on the probe, in float32 on the CPU."""
    model.eval()
    ids = probe(model.config.get_text_config().vocab_size).to(model.device)
    result: Tensor = model(input_ids=ids).logits
    return result.float().cpu()


def deviation(expected: Tensor, actual: Tensor) -> Deviation:
    """Return the deviation of `actual` logits from `expected` ones."""
    largest = (expected - actual).abs().max() / expected.abs().max()
    same = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
    return Deviation(float(largest), float(same))


def same_limit(base: Base, *others: torch.dtype) -> float:
    """Return the largest deviation of the same function, for a base as it is held and computed.

    Args:
        base: The base.
        *others: Number formats in which weights have been written.
    """
    whole = all(dtype == torch.float32 for dtype in (base.model.dtype, *others))
    return SAME if whole and base.quantization != "int8" else SAME_ROUNDED
