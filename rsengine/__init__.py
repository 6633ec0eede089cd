"""rsengine: a performance-optimised training engine for ResNet-RS on CIFAR-sized images.

``rsengine.train(...)`` or ``python -m rsengine.train`` trains, ``rsengine.load(run)`` gives the network back;
:mod:`rsengine.model` is the family, :mod:`rsengine.kernels` the fused operations. Importing this package imports
nothing else: its functions bring what they need when they are first used.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rsengine.api import History, Model, Predictions, Run, load, train

__version__ = "0.1.0"
__all__ = ["History", "Model", "Predictions", "Run", "load", "train"]


# How often a thread that waits for the others looks before it sleeps; OpenMP reads it once, when PyTorch is imported.
# With its default of 300,000 a step of two threads takes three to five times as long beside one busy process, and with
# this about twice; alone it takes as long as ever (docs/performance.md). On many cores, where waking may cost more,
# nobody has measured it.
if (os.cpu_count() or 1) <= 4 and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    # Importing the module of the command binds it to rsengine.train; it can be called as the function.
    return import_module("rsengine.train") if name == "train" else getattr(import_module("rsengine.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
