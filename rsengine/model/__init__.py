"""The ResNet-RS family."""

from rsengine.model.network import (
    DEPTHS,
    DROP_PATH_RULES,
    HEAD,
    ZERO_INITS,
    Bottleneck,
    PlainStem,
    ResNetRS,
    body_parts,
    divisible,
    drop_path_rates,
    resnet_rs,
)
from rsengine.model.timm_weights import from_timm, to_timm

__all__ = [
    "DEPTHS",
    "DROP_PATH_RULES",
    "HEAD",
    "ZERO_INITS",
    "Bottleneck",
    "PlainStem",
    "ResNetRS",
    "body_parts",
    "divisible",
    "drop_path_rates",
    "from_timm",
    "resnet_rs",
    "to_timm",
]
