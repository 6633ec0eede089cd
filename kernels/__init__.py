"""The fused operations of a ResNet-RS training step, each one public function with one signature for every device.

Imported as ``rsengine.kernels``. Knows torch only; importing it costs nothing else and asks no device anything.
"""

from .augment import augment_batch
from .augment_tables import PolicyTables
from .batch_normalization import batch_norm
from .block_epilogue import batch_norm_squeeze_excite_residual
from .bottleneck import bottleneck, conv_batch_norm_relu, joins
from .conv_norm import ConvNorm
from .cross_entropy import label_smoothed_cross_entropy
from .dispatch import explain
from .ema import ema_update, sgd_ema_step
from .squeeze_excitation import squeeze_excite, squeeze_excite_residual

__all__ = [
    "ConvNorm",
    "PolicyTables",
    "augment_batch",
    "batch_norm",
    "batch_norm_squeeze_excite_residual",
    "bottleneck",
    "conv_batch_norm_relu",
    "ema_update",
    "explain",
    "joins",
    "label_smoothed_cross_entropy",
    "sgd_ema_step",
    "squeeze_excite",
    "squeeze_excite_residual",
]
