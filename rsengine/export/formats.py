"""The formats that a network is exported to, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rsengine.errors import SettingsError
from rsengine.export import program, timm_folder
from rsengine.export.card import write_card
from rsengine.run.files import WEIGHTS_FILE, write_atomically, writing
from rsengine.run.weights import Weights, load_weights, weights_bytes, weights_file

# Name -> what it gives, and who reads it.
FORMATS = {
    "timm": "model.safetensors and config.json: timm, Hugging Face transformers",
    "onnx": "model.onnx: ONNX Runtime and everything else that takes ONNX",
    "torch": "model.pt2 of torch.export: PyTorch alone, without rsengine",
    "safetensors": "weights.safetensors: the state dict, with classes and preprocessing in the metadata",
}


_FILES = {"onnx": program.ONNX_FILE, "torch": program.TORCH_FILE, "safetensors": WEIGHTS_FILE}


def export(
    run: str | Path | Weights,
    format: str,
    out: str | Path,
    *,
    uint8: bool = False,
    opset: int | None = None,
    compiled: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write the network of a run into the folder ``out``, with a model card, ``README.md``.

    Args:
        run: a run folder, its ``weights.safetensors``, or weights that :func:`rsengine.run.weights.load_weights` read.
        out: a folder; or the name of the file to write, which ends in ``.onnx``, ``.pt2`` or ``.safetensors`` as the
            format's does, without a card.
        format: one of :data:`FORMATS`.
        uint8: ``onnx`` and ``torch`` take (N, H, W, 3) uint8 pixels, in place of (N, 3, H, W) float32 normalised ones.
        opset: ``onnx``: version of the operators; by default PyTorch's choice.
        compiled: ``torch``: machine code by AOTInductor for this kind of processor.
        say: called with a line where the card lacks something.

    Returns:
        The files written.

    Raises:
        SettingsError: an unknown format, an option of another one, a package that is missing, or a network that the
            format cannot express.
        WeightsError: there are none, or they are damaged.
        WriteError: the disk refuses it.
    """
    if format not in FORMATS:
        raise SettingsError(f"--to {format}: expected one of {', '.join(FORMATS)}")
    takes = {"uint8": (uint8, ("onnx", "torch")), "opset": (opset is not None, ("onnx",))}
    takes["aot-inductor"] = compiled, ("torch",)
    for option, (given, formats) in takes.items():
        if given and format not in formats:
            raise SettingsError(f"--{option}: only for --to {' and '.join(formats)}; leave it out")
    weights, path = run if isinstance(run, Weights) else load_weights(run), Path(out)
    alone = format in _FILES and path.suffix == Path(_FILES[format]).suffix and not path.is_dir()
    folder = path.parent if alone else path
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out {folder}: is no folder; name one")
    if path.suffix in (".onnx", ".pt2", ".safetensors") and not alone and not path.is_dir():
        raise SettingsError(f"--out {path}: not the suffix of a file of --to {format}; name such a file, or a folder")
    if format == "timm":
        timm_folder.timm_arguments(weights.model)  # refused before anything is made
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if format == "timm":
        files = timm_folder.write(weights, folder)
    else:
        files = [path if alone else folder / (program.COMPILED_FILE if compiled else _FILES[format])]
        if format == "onnx":
            program.write_onnx(weights, files[0], uint8=uint8, opset=opset)
        elif format == "torch":
            program.write_torch(weights, files[0], uint8=uint8, compiled=compiled)
        else:
            write_atomically(files[0], weights_bytes(weights.model, weights.recipe, weights))
    if alone:
        return files
    source = None if isinstance(run, Weights) else weights_file(run).parent
    return [*files, write_card(source, weights, folder, files[0].name, uint8=uint8, say=say)]
