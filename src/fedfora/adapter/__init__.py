"""FoRA, Fusion of Low Rank Adaptation, as a PEFT method; importing this registers it in PEFT."""

from fedfora.adapter.config import ForaConfig, register
from fedfora.adapter.layer import ForaLayer, ForaLinear
from fedfora.adapter.model import ForaModel

__all__ = ["ForaConfig", "ForaLayer", "ForaLinear", "ForaModel"]

register(ForaConfig, ForaModel)
