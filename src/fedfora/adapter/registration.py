"""Makes PEFT know the adapter type "FORA".

PEFT has an official way to register a method, but it asks for a member of the closed enumeration
`PeftType`; so the member is added first. PEFT's loading functions look only there.
"""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import hotswap, register_peft_method
from peft.utils.peft_types import PeftType

NAME = "FORA"


def peft_type() -> Any:
    """Return `PeftType.FORA`, adding it to the enumeration when it is not there."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register FoRA in PEFT; the second call changes nothing.

    Raises:
        RuntimeError: If PEFT already knows another method of that name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if known is None:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="fora_"
        )
        hotswap.CONFIG_KEYS_TO_CHECK[peft_type()] = ["use_rslora", "lora_dropout", "alpha_pattern"]
    elif known is not config_cls:
        raise RuntimeError(f"PEFT already knows another method called {NAME}: {known!r}")
