"""The fused operations of a ResNet-RS training step, each one public function with one signature for every device.

Imported as ``rsengine.kernels``. Knows torch only; importing it costs nothing else and asks no device anything.
"""

from rsengine.kernels.augment import augment_batch
from rsengine.kernels.augment_tables import PolicyTables
from rsengine.kernels.batch_normalization import batch_norm
from rsengine.kernels.block_epilogue import batch_norm_squeeze_excite_residual
from rsengine.kernels.bottleneck import bottleneck, conv_batch_norm_relu, joins
from rsengine.kernels.conv_norm import ConvNorm
from rsengine.kernels.cross_entropy import label_smoothed_cross_entropy
from rsengine.kernels.dispatch import explain
from rsengine.kernels.ema import ema_update, sgd_ema_step
from rsengine.kernels.squeeze_excitation import squeeze_excite, squeeze_excite_residual

if __name__ != "rsengine.kernels":
    # In a checkout this folder is also found as ``kernels``: transformers imports that name in search of another
    # package. A second copy of a module below would take its operators' names in PyTorch, which drops the first's.
    __path__: list[str] = []

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
