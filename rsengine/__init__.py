"""rsengine: a performance-optimised training engine for ResNet-RS on CIFAR-sized images.

``python -m rsengine.train`` trains; :mod:`rsengine.model` is the family; :mod:`rsengine.kernels` the fused operations.
Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
