"""`ForaModel`: which modules of a model become FoRA layers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedfora.adapter.config import ForaConfig
from fedfora.adapter.layer import ForaLayer, ForaLinear

# LoRA and FoRA read this mapping for target_modules=None; PEFT has no entry for Baichuan.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("baichuan", ["W_pack", "o_proj"])


class ForaModel(BaseTuner):
    """PEFT's tuner for FoRA; made by `peft.get_peft_model(model, ForaConfig(...))`."""

    prefix = "fora_"
    tuner_layer_cls = ForaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: ForaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        rank_key = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern.keys(), current_key)
        options: dict[str, Any] = {
            "r": peft_config.rank_pattern.get(rank_key, peft_config.r),
            "lora_alpha": peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha),
            "config": peft_config,
        }
        if isinstance(target, ForaLayer):
            target.update_layer(adapter_name, **options)
            return
        _settle_fan_in_fan_out(peft_config, target, current_key)
        quantization = get_quantization_kwargs(self.model)
        layer = ForaLinear(target, adapter_name, **options, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _prepare_model(self, peft_config: ForaConfig, model: nn.Module) -> None:
        """Refuse what cannot be adapted before anything is replaced (PEFT calls this first)."""
        if peft_config.target_modules == "all-linear":
            return
        quantization = get_quantization_kwargs(model)
        for key, module in model.named_modules():
            if not key or _inside_adapter(model, key):
                continue
            if self._check_target_module_exists(peft_config, key) is True:
                _check_supported(module, key, quantization)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` (one adapter for each row of a batch) to every layer."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_known(names)
        beams = kwargs.get("num_beams") or 1
        handles = _hook_adapter_names(self, [name for name in names for _ in range(beams)])
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        if beams > 1 and encoder is not None and encoder is not self.model:
            handles += _hook_adapter_names(encoder, names)  # an encoder sees each row once
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_known(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, ForaLayer)]
        known = {name for layer in layers for name in layer.fora_A} | {"__base__"}
        if unknown := sorted(set(adapter_names) - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def _settle_fan_in_fan_out(config: ForaConfig, target: nn.Module, key: str) -> None:
    """Let the configuration say what the layer is, as LoRA's does; other programs read it."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, Conv1D):
        config.fan_in_fan_out = True
    elif config.fan_in_fan_out:
        warnings.warn(
            f"fan_in_fan_out is True, but {key} is not a Conv1D; it is ignored", stacklevel=2
        )
        config.fan_in_fan_out = False


def _inside_adapter(model: nn.Module, key: str) -> bool:
    parts = key.split(".")
    parents = (model.get_submodule(".".join(parts[:n])) for n in range(1, len(parts)))
    return any(isinstance(parent, BaseTunerLayer) for parent in parents)


def _check_supported(target: nn.Module, key: str, quantization: dict[str, Any]) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, nn.Linear | Conv1D):
        return
    if resolve_quantization_backend(base, **quantization) is None:
        raise ValueError(
            f"Target module {key} ({type(base).__name__}) is not supported. FoRA adapts "
            "`torch.nn.Linear`, `Conv1D` and the quantized linear layers that PEFT knows."
        )


def _hook_adapter_names(module: nn.Module, adapter_names: list[str]) -> list[Any]:
    def hand_on(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": adapter_names}

    return [
        layer.register_forward_pre_hook(hand_on, with_kwargs=True)
        for layer in module.modules()
        if isinstance(layer, ForaLayer | AuxiliaryTrainingWrapper)
    ]
