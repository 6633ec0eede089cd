"""rsengine: a performance-optimised training engine for ResNet-RS on CIFAR-sized images.

``rsengine.train(...)`` or ``python -m rsengine.train`` trains, ``rsengine.load(run)`` gives the network back;
:mod:`rsengine.model` is the family, :mod:`rsengine.kernels` the fused operations. Importing this package imports
nothing large: its functions bring what they need when they are first used.
"""

from typing import TYPE_CHECKING

from rsengine.processor import set_waiting

if TYPE_CHECKING:
    from rsengine.api import History, Model, Predictions, Run, load, train

__version__ = "0.1.0"
__all__ = ["History", "Model", "Predictions", "Run", "load", "train"]


set_waiting()  # OpenMP reads it once, when PyTorch is imported


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    # Importing the module of the command binds it to rsengine.train; it can be called as the function.
    return import_module("rsengine.train") if name == "train" else getattr(import_module("rsengine.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
