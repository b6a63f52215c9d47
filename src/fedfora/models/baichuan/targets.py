"""Which layers of a Baichuan an adapter takes when nobody names them: FoRA's micro level."""

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

ATTENTION = ["W_pack", "o_proj"]

# LoRA and FoRA read this mapping for target_modules=None; PEFT itself has no entry for Baichuan.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("baichuan", ATTENTION)
