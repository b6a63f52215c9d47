"""The FoRA layer: a frozen linear map plus a fused low-rank update.

    y = W x + s D K A dropout(x)        K = I_R + E + C B        s = alpha / R

K is only R x R. It is folded once per forward, so no activation of the inner width M exists and a
step costs what a step of LoRA costs. Forward, merge and export derive from the same K.

Shape suffixes: I = input features, O = output features, R = rank, M = inner width, `...` = batch.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedfora.adapter.config import ForaConfig, default_inner_dim


class ForaLayer(BaseTunerLayer):
    """The five factors of each adapter of one layer, and the core they fold into."""

    # The factors are Linear modules, used only by calling them: FSDP's and ZeRO-3's hooks hang on
    # calls, and TRL copies a reference adapter by names that only submodules have.
    adapter_layer_names = ("fora_A", "fora_B", "fora_C", "fora_D", "fora_E")
    other_param_names = ("r", "lora_alpha", "scaling", "trainable", "fora_dropout")

    # Inherited; PEFT ships no types.
    get_base_layer: Any
    get_base_weight: Any
    set_base_weight: Any
    active_adapters: Any
    _cast_input_dtype: Any

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer: Any = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.trainable: dict[str, str] = {}
        self.fora_dropout = nn.ModuleDict()
        self.fora_A, self.fora_B, self.fora_C = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.fora_D, self.fora_E = nn.ModuleDict(), nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.folded_factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)  # stores W transposed

    def update_layer(
        self, adapter_name: str, *, r: int, lora_alpha: float, config: ForaConfig, **_: Any
    ) -> None:
        """Create and initialize adapter `adapter_name`.

        Raises:
            ValueError: If `r` is less than 1.
        """
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        inner_dim = config.inner_dim or default_inner_dim(self.in_features)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.trainable[adapter_name] = config.trainable
        self.fora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        for factors, rows, columns in (
            (self.fora_A, r, self.in_features),
            (self.fora_B, inner_dim, r),
            (self.fora_C, r, inner_dim),
            (self.fora_D, self.out_features, r),
            (self.fora_E, r, r),
        ):
            # nn.Linear draws what FoRA asks for: kaiming uniform with a = sqrt(5).
            factors[adapter_name] = nn.Linear(columns, rows, bias=False)
        self._start(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _start(self, name: str, init_weights: bool | str) -> None:
        """Make a freshly drawn adapter a no-op, by D = 0 or by K = 0 (see `ForaConfig`)."""
        if init_weights is False:
            return
        nn.init.zeros_(self.factor("B", name).weight)
        if init_weights is True:
            nn.init.zeros_(self.factor("D", name).weight)
        elif self.factor("A", name).weight.device.type != "meta":
            self._start_from_base_weight(name)

    @torch.no_grad()
    def _start_from_base_weight(self, name: str) -> None:
        """Take A and D from the base weight's largest singular values, and K = 0.

        As LoRA-XS does (Balazy et al. 2024, https://arxiv.org/abs/2405.17604, Sec. 3): A = V_R^T
        and D = U_R Sigma_R, between which a small matrix is trained.
        """
        weight_OI = self.get_base_weight().float()
        if self.fan_in_fan_out:
            weight_OI = weight_OI.mT
        U_OO, sigma, Vh_II = torch.linalg.svd(weight_OI, full_matrices=False)
        rank = min(self.r[name], len(sigma))
        for letter in ("A", "D"):
            nn.init.zeros_(self.factor(letter, name).weight)  # a rank beyond the weight's own
        self.factor("A", name).weight[:rank] = Vh_II[:rank]
        self.factor("D", name).weight[:, :rank] = U_OO[:, :rank] * sigma[:rank]
        self.reset_core(name)

    @torch.no_grad()
    def reset_core(self, adapter_name: str) -> None:
        """Make the adapter a no-op that can still learn where A and D are frozen: K = 0."""
        E, B = self.factor("E", adapter_name).weight, self.factor("B", adapter_name).weight
        E.copy_(-torch.eye(len(E), device=E.device, dtype=E.dtype))
        nn.init.zeros_(B)

    def core(self, adapter_name: str) -> Tensor:
        """Return `K^T = (I + E + C B)^T` of shape `(R, R)`, by calling the factors on the identity.

        Always in the factors' own dtype: under autocast a core of bfloat16, the identity plus
        something small, would lose what it learned.
        """
        B, C, E = (self.factor(letter, adapter_name) for letter in "BCE")
        device = "cpu" if E.weight.is_meta else E.weight.device.type  # meta knows no autocast
        with torch.autocast(device, enabled=False):
            eye_RR = torch.eye(E.in_features, device=E.weight.device, dtype=E.weight.dtype)
            core_RR: Tensor = eye_RR + E(eye_RR) + C(B(eye_RR))
        return core_RR

    def factor(self, letter: str, adapter_name: str) -> nn.Linear:
        """Return the module that holds factor A, B, C, D or E."""
        return cast(nn.Linear, getattr(self, f"fora_{letter}")[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that `s D K A` is what a LoRA adapter can hold."""
        return True

    def _freeze_non_trainable_peft_weights(self, adapter_names: list[str] | None = None) -> None:
        """Keep A and D frozen in core mode (a hook that PEFT calls when it sets adapters)."""
        for name, trainable in self.trainable.items():
            if trainable == "core" and (adapter_names is None or name in adapter_names):
                self.factor("A", name).requires_grad_(False)
                self.factor("D", name).requires_grad_(False)


class ForaLinear(nn.Module, ForaLayer):
    """A linear layer, quantized or not, with FoRA adapters; the base weight is never trained."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        r: int,
        lora_alpha: float,
        config: ForaConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        ForaLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r=r, lora_alpha=lora_alpha, config=config)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update `s D K A` in the layout of the base weight, in float32 or wider."""
        A_RI, D_OR = self.factor("A", adapter).weight, self.factor("D", adapter).weight
        dtype = torch.promote_types(D_OR.dtype, torch.float32)
        core_RR = self.core(adapter).mT.to(dtype)
        delta_OI = D_OR.to(dtype) @ (self.scaling[adapter] * core_RR) @ A_RI.to(dtype)
        return delta_OI.mT if self.fan_in_fan_out else delta_OI

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of the given (or all active) adapters to the base weight.

        Raises:
            ValueError: With `safe_merge`, if the merged weight is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.fora_A:
                continue
            merged = self._shifted_weight(name, +1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract all merged updates from the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.set_base_weight(self._shifted_weight(self.merged_adapters.pop(), -1))

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Map `(..., I)` to `(..., O)`.

        Args:
            x: Input.
            *args: Passed to the base layer.
            adapter_names: One adapter for each row of the batch ("__base__" for none); by default
                all active adapters apply to all rows.
            **kwargs: Passed to the base layer.
        """
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if adapter_names is not None:
            if self.quantization_backend is not None:  # some forbid changing it in place
                result = self.quantization_backend.maybe_clone_base_result(result)
            for name in sorted(set(adapter_names) & set(self.fora_A)):
                rows = [i for i, row_name in enumerate(adapter_names) if row_name == name]
                result[rows] += self._update(x[rows], name).to(result.dtype)
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.fora_A:
                result = result + self._update(x, name)
        return result.to(dtype)

    def _update(self, x_I: Tensor, name: str) -> Tensor:
        """Return `s D K A dropout(x)`; the scaling rides on the core, the smallest factor.

        Under autocast the products with A and D are in its format and x needs no copy in the
        factors' own; the product with the core is in the factors' dtype all the same.
        """
        if name in self.folded_factors:
            A_RI, D_OR = self.folded_factors[name]
            return nn.functional.linear(nn.functional.linear(x_I.to(A_RI.dtype), A_RI), D_OR)
        A, D = self.factor("A", name), self.factor("D", name)
        device = "cpu" if x_I.is_meta else x_I.device.type  # meta knows no autocast
        if not torch.is_autocast_enabled(device):
            x_I = self._cast_input_dtype(x_I, A.weight.dtype)
        h_R = A(self.fora_dropout[name](x_I))
        with torch.autocast(device, enabled=False):
            u_R = h_R.to(A.weight.dtype) @ (self.scaling[name] * self.core(name))
        update_O: Tensor = D(u_R)
        return update_O

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    def _shifted_weight(self, name: str, sign: int) -> Tensor:
        weight: Tensor = self.get_base_weight()
        delta = self.get_delta_weight(name).to(weight.device)
        return (weight + sign * delta).to(weight.dtype)

    def __repr__(self) -> str:
        return "fora." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the quantization of the base layer."""
        return str(quantization_extra_repr(self))


@contextmanager
def folded_cores(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold `A` and `s D K` of every active adapter ready while a model answers.

    An answer takes one small step a token, and five more products a layer are a third of its time;
    here they are two. Nothing of the model changes, unlike by merging, which rounds the base.

    Args:
        model: A model in evaluation mode; without FoRA layers nothing happens.
        dtype: The products' number format, the one of the hidden states.
    """
    layers = [m for m in model.modules() if isinstance(m, ForaLinear) and not m.merged]
    try:
        for layer in layers:
            for name in set(layer.active_adapters) & set(layer.fora_A):
                A_RI, D_OR = layer.factor("A", name).weight, layer.factor("D", name).weight
                if D_OR.shape != (layer.out_features, layer.r[name]):
                    continue  # ZeRO-3 keeps no whole factor here
                with torch.no_grad():
                    DK_OR = D_OR @ (layer.scaling[name] * layer.core(name)).mT
                layer.folded_factors[name] = A_RI.detach().to(dtype), DK_OR.to(dtype)
        yield
    finally:
        for layer in layers:
            layer.folded_factors.clear()
