"""timm's names for the weights of a ResNet-RS, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# timm's names on the left; the order matters only in that each name matches one row.
_FROM_TIMM = (
    (r"conv1\.(0|3|6)\.", lambda m: f"stem.conv{int(m[1]) // 3 + 1}."),
    (r"conv1\.(1|4)\.", lambda m: f"stem.bn{int(m[1]) // 3 + 1}."),
    (r"bn1\.", lambda m: "stem.bn3."),
    (r"maxpool\.0\.", lambda m: "stem.pool_conv."),
    (r"maxpool\.1\.", lambda m: "stem.pool_bn."),
    (r"layer(\d)\.(\d+)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut.conv."),
    (r"layer(\d)\.(\d+)\.downsample\.2\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut.bn."),
    (r"layer(\d)\.(\d+)\.se\.fc1\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.se.reduce."),
    (r"layer(\d)\.(\d+)\.se\.fc2\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.se.expand."),
    (r"layer(\d)\.(\d+)\.((?:conv|bn)\d)\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.{m[3]}."),
    (r"fc\.", lambda m: "fc."),
)

_TO_TIMM = (
    (r"stem\.conv([123])\.", lambda m: f"conv1.{3 * int(m[1]) - 3}."),
    (r"stem\.bn([12])\.", lambda m: f"conv1.{3 * int(m[1]) - 2}."),
    (r"stem\.bn3\.", lambda m: "bn1."),
    (r"stem\.pool_conv\.", lambda m: "maxpool.0."),
    (r"stem\.pool_bn\.", lambda m: "maxpool.1."),
    (r"stages\.(\d+)\.(\d+)\.shortcut\.conv\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1."),
    (r"stages\.(\d+)\.(\d+)\.shortcut\.bn\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.2."),
    (r"stages\.(\d+)\.(\d+)\.se\.reduce\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.se.fc1."),
    (r"stages\.(\d+)\.(\d+)\.se\.expand\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.se.fc2."),
    (r"stages\.(\d+)\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
)


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename this family's state dict to timm's names, as :func:`from_timm` reads them."""
    renamed = {}
    for name, tensor in state_dict.items():
        ours = name
        for pattern, replacement in _TO_TIMM:
            name, found = re.subn(rf"^{pattern}", replacement, name)
            if found:
                break
        is_map = ".se." in ours and tensor.dim() == 2  # timm keeps these as 1x1 convolutions
        renamed[name] = tensor[:, :, None, None] if is_map else tensor
    return renamed


def from_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a timm ``resnetrs*`` state dict to this family's names. Works for gradients keyed the same way too.

    Raises:
        ValueError: names that no ``resnetrs*`` of timm has; the message begins with the first of them.
    """
    renamed, unknown = {}, []
    for name, tensor in state_dict.items():
        for pattern, replacement in _FROM_TIMM:
            ours, found = re.subn(rf"^{pattern}", replacement, name)
            if found:
                # timm keeps the two linear maps of squeeze-and-excite as 1x1 convolutions.
                renamed[ours] = tensor.flatten(1) if ".se." in ours and tensor.dim() == 4 else tensor
                break
        else:
            unknown.append(name)
    if unknown:
        first = ", ".join(map(repr, unknown[:3])) + f" and {len(unknown) - 3} more" * (len(unknown) > 3)
        verb = "is" if len(unknown) == 1 else "are"
        raise ValueError(f"state_dict: {first} {verb} not among the parameters and buffers of timm's resnetrs models")
    return renamed
