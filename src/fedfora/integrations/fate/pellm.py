"""FATE-LLM's model class for a causal language model with a FoRA adapter on a quantized base.

Importing this makes FATE-LLM know `peft_type="ForaConfig"` for its own model classes too: it takes
any class of the name `...Config` that it finds in the namespace `peft`. It looks once, when its
module is imported, so the name is set before.
"""

from typing import Any

import peft
import torch

from fedfora.adapter import ForaConfig
from fedfora.adapter.state import draw_inner_factors
from fedfora.integrations.fate.round_sum import train_core_alone
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import Base, load_base
from fedfora.models.resolve import resolve_model
from fedfora.models.settings import ModelArguments
from fedfora.seeds import derive_seed

peft.ForaConfig = ForaConfig

from fate_llm.model_zoo.pellm.parameter_efficient_llm import PELLM  # noqa: E402  # see above


class ForaCausalLM(PELLM):  # type: ignore[misc]  # FATE-LLM's interface
    """A base as fedfora loads it, quantized or not, and a fresh adapter drawn from a seed.

    With `trainable="core"` only E is trained: it alone reaches every core, and FATE, which averages
    trainable tensors one by one, then averages the update itself.

    Args:
        pretrained_path: Base model, as `--model_name_or_path`.
        peft_type: As FATE-LLM has it; its own class or another of PEFT's works too.
        peft_config: Options of the adapter's configuration.
        seed: Parties with the same seed start from the same adapter.
        **base: Further fields of `ModelArguments`, e.g. `quantization`.
    """

    base: Base
    base_fingerprint: str

    def __init__(
        self,
        pretrained_path: str,
        peft_type: str = "ForaConfig",
        peft_config: dict[str, Any] | None = None,
        seed: int = 42,
        **base: Any,
    ) -> None:
        self._arguments = ModelArguments(model_name_or_path=pretrained_path, **base)
        self._seed = seed
        path = resolve_model(self._arguments)
        super().__init__(pretrained_path=path, peft_type=peft_type, peft_config=peft_config)

    @property
    def peft_model(self) -> Any:
        """The PEFT model inside."""
        return self._pe_lm

    def init_base_lm(self, **_: Any) -> None:
        """Load the base (FATE-LLM calls this)."""
        self.base = load_base(self._arguments)
        self.base_fingerprint = fingerprint(self.base)
        self._pe_lm = self.base.model

    def add_peft(self) -> None:
        """Put the adapter on the base (FATE-LLM calls this)."""
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self._seed, "adapter"))
            super().add_peft()
        draw_inner_factors(self._pe_lm, self._seed)
        if getattr(self.peft_config, "trainable", "all") == "core":
            train_core_alone(self._pe_lm)

    def model_summary(self) -> None:
        """Say nothing where FATE-LLM would print."""
