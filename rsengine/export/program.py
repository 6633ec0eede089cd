"""A network as a program without rsengine: ``torch.export``, AOTInductor and ONNX."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rsengine.data.errors import one_line
from rsengine.errors import SettingsError
from rsengine.export.packages import require
from rsengine.model.layers import use_products
from rsengine.model.preprocess import Preprocess
from rsengine.run.files import atomic_path, write_atomically
from rsengine.run.weights import Weights
from rsengine.temporaries import temporary_folder

FORMAT = "rsengine-export-1"
ONNX_FILE, TORCH_FILE, COMPILED_FILE = "model.onnx", "model.pt2", "model-compiled.pt2"
DESCRIPTION = "rsengine.json"  # in a .pt2 file
PIXELS, NORMALISED = "pixels", "normalised"  # what a program takes, see metadata_of
_MOST_BYTES = 2**31 - 2**24  # of an ONNX file, which a protocol buffer limits to 2 GiB


class FromPixels(nn.Module):
    """A network behind its normalisation: ``images``, (N, H, W, 3) uint8, to logits (N, C)."""

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", preprocess.scale)
        self.register_buffer("shift", preprocess.shift)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() * self.scale + self.shift).permute(0, 3, 1, 2).contiguous())


def metadata_of(weights: Weights, uint8: bool) -> dict[str, str]:
    """What a file says of the network in it: texts by name.

    ``classes``, ``image_size`` (height, width), ``mean`` and ``std`` (units of 0 to 1) are JSON, ``recipe`` is TOML.
    ``input`` is ``pixels`` for (N, H, W, 3) uint8, or ``normalised`` for (N, 3, H, W) float32,
    ``(pixels / 255 - mean) / std``.
    """
    return {"format": FORMAT, **weights.description.to_metadata(), "input": PIXELS if uint8 else NORMALISED}


def write_onnx(weights: Weights, path: Path, *, uint8: bool = False, opset: int | None = None) -> None:
    """Write an ONNX file by PyTorch's exporter over ``torch.export``; input ``images``, output ``logits``.

    Args:
        uint8: take pixels, see :func:`metadata_of`.
        opset: version of the operators; by default PyTorch's choice.

    Raises:
        SettingsError: a package is missing, the network is too large for one file, or the exporter refuses.
    """
    require("--to onnx", "onnx", "onnxscript")
    if sum(tensor.nbytes for tensor in weights.model.state_dict().values()) > _MOST_BYTES:
        raise SettingsError("--to onnx: the network does not fit the 2 GiB of an ONNX file; use --to torch")
    network, images = _network(weights, uint8)
    with _quiet(), _one_line("--to onnx", opset):
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            verbose=False,
        )
    written = program.model.opset_imports.get("")
    if opset not in (None, written):  # the exporter passes over versions that it cannot convert to
        raise SettingsError(f"--opset {opset}: PyTorch writes version {written} of the operators; leave it out")
    program.model.producer_name = "rsengine"
    program.model.metadata_props.update(metadata_of(weights, uint8))
    with atomic_path(path) as temporary:
        program.save(str(temporary), external_data=False)


def write_torch(weights: Weights, path: Path, *, uint8: bool = False, compiled: bool = False) -> None:
    """Write a program of ``torch.export``; or with ``compiled``, machine code for this kind of processor by
    AOTInductor, which needs a C++ compiler.

    Raises:
        SettingsError: it cannot be compiled.
    """
    network, images = _network(weights, uint8)
    metadata = metadata_of(weights, uint8)
    with _quiet(), torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(network, (images,), dynamic_shapes=shapes)
        if not compiled:
            content = io.BytesIO()
            torch.export.save(program, content, extra_files={DESCRIPTION: json.dumps(metadata)})
            write_atomically(path, content.getvalue())
            return
        with temporary_folder("compiled") as scratch, _one_line("--aot-inductor"):
            package = torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(scratch / COMPILED_FILE),
                inductor_configs={"aot_inductor.metadata": metadata},
            )
            write_atomically(path, Path(package).read_bytes())


def _network(weights: Weights, uint8: bool) -> tuple[nn.Module, Tensor]:
    """The network of PyTorch's own operators, in float32 on the CPU, and images to trace it with."""
    network = copy.deepcopy(weights.model).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()
    use_products(network, "library")  # the rewrites depend on the size of the maps, and a compiler knows its own
    height, width = weights.image_size
    if uint8:
        network = FromPixels(network, Preprocess(weights.mean, weights.std)).eval()
        return network, torch.zeros(2, height, width, 3, dtype=torch.uint8)
    return network, torch.zeros(2, 3, height, width)


@contextlib.contextmanager
def _one_line(what: str, opset: int | None = None) -> Iterator[None]:
    """In this block whatever a compiler or an exporter raises becomes one line."""
    try:
        yield
    except (SettingsError, OSError, MemoryError):
        raise
    except Exception as error:
        remedy = "use --to torch without it" if opset is None else "leave out --opset"
        raise SettingsError(f"{what}: PyTorch refuses ({one_line(error)[:200]}); {remedy}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """In this block the exporters say nothing of what concerns their own makers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
