"""Read a trained network from what a run wrote, or from any format of :data:`rsengine.export.FORMATS`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsengine.checked import Field, FieldError
from rsengine.config import Recipe, RecipeError
from rsengine.data.errors import one_line
from rsengine.data.sources.images import LARGEST_SIDE
from rsengine.device import choose_execution
from rsengine.engine.build import build_model
from rsengine.errors import SettingsError
from rsengine.export import program
from rsengine.export.classifier import Classifier
from rsengine.export.packages import require
from rsengine.model.preprocess import Preprocess
from rsengine.run.files import METRICS_FILE, WEIGHTS_FILE
from rsengine.run.foreign import TIMM_CONFIG, TIMM_FILES, InitialError
from rsengine.run.initial import UNUSED, read_initial
from rsengine.run.tensors import check_like
from rsengine.run.weights import Description, Weights, WeightsError, load_weights

_AGAIN = "export the run again with `python -m rsengine.export`"
# In a folder, in this order.
_FILES = (WEIGHTS_FILE, *TIMM_FILES, program.ONNX_FILE, program.TORCH_FILE, program.COMPILED_FILE)


def load_classifier(given: str | Path, device: str = "auto", precision: str = "fp32") -> Classifier:
    """Read a trained network, of whatever format.

    Args:
        given: a run folder, a folder that was exported, or a file of it: ``weights.safetensors``;
            ``model.safetensors`` or ``pytorch_model.bin`` with timm's ``config.json`` beside it; ``.onnx``; ``.pt2``.
        device: auto, cpu or cuda. Programs, ``.onnx`` and ``.pt2``, run on the CPU in float32.
        precision: auto, bf16 or fp32.

    Raises:
        WeightsError: nothing there, damaged, of no known format, or without a description of its classes.
        SettingsError: a package is missing, or the device or the precision is another than the format's.
    """
    path = _file_in(Path(given))
    execution = choose_execution(device, precision)
    if path.suffix in _PROGRAMS:
        if not path.exists():
            raise WeightsError(f"{path}: no such file; give a run folder, or what rsengine.export wrote")
        if device == "cuda" or precision == "bf16":
            raise SettingsError(
                f"{path}: a program, which runs on the CPU in float32; leave out --device and --precision, or give "
                "the weights of the run"
            )
        try:
            return _PROGRAMS[path.suffix](path)
        except (FieldError, RecipeError) as error:
            raise WeightsError(f"{path}: {error}; {_AGAIN}") from error
    if path.name in TIMM_FILES and (path.parent / TIMM_CONFIG).is_file():
        return Classifier.of_weights(
            _timm_weights(path), execution, path.parent, "weights as timm and the Hub have them"
        )
    kind = "weights of a run" if (path.parent / METRICS_FILE).is_file() else "weights in safetensors"
    return Classifier.of_weights(load_weights(path), execution, path, kind)


def _file_in(given: Path) -> Path:
    if not given.is_dir():
        return given if given.is_file() else given / WEIGHTS_FILE if not given.suffix else given
    return next((given / name for name in _FILES if (given / name).is_file()), given / WEIGHTS_FILE)


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_weights(path: Path) -> Weights:
    """The network of a folder of timm's, in ours."""
    config = path.parent / TIMM_CONFIG
    try:
        initial = read_initial(path)
        described = Field.of_json(config.read_bytes())
        classes, size = _timm_classes(described), _timm_size(described)
        if initial.mean is None or initial.std is None:
            raise FieldError("pretrained_cfg.mean, pretrained_cfg.std: missing")
        recipe = Recipe(model=initial.model)
        model = build_model(recipe, len(classes))
        own = model.state_dict()
        state = {name: tensor for name, tensor in own.items() if name.endswith(UNUSED)} | dict(initial.state)
        check_like(Field(state, "tensors"), own)
    except InitialError as error:
        raise WeightsError(str(error).removeprefix("--init ")) from error
    except OSError as error:
        raise WeightsError(f"{config}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (FieldError, RecipeError) as error:
        raise WeightsError(f"{config}: {error}; give a folder that timm or `rsengine.export` wrote") from error
    model.load_state_dict(state)
    return Weights(model.eval(), recipe, classes, size, initial.mean, initial.std)


def _timm_classes(config: Field) -> tuple[str, ...]:
    """The names of the classes; their numbers where the configuration has none."""
    top = _pretrained(config)
    for place in (config, top):
        for key in ("label_names", "labels"):
            if key in place and place[key].value is not None:
                return tuple(each.text(any_bytes=True) for each in place[key].items())
    return tuple(str(i) for i in range((config if "num_classes" in config else top)["num_classes"].integer(1, 10**6)))


def _timm_size(config: Field) -> tuple[int, int]:
    channels, height, width = _pretrained(config)["input_size"].items(3)
    channels.integer(3, 3)
    return height.integer(1, LARGEST_SIDE), width.integer(1, LARGEST_SIDE)


def _pretrained(config: Field) -> Field:
    """The part on inputs and classes, which older files have at the top."""
    if "pretrained_cfg" in config:
        return config["pretrained_cfg"]
    return config


# --- programs ---------------------------------------------------------------------------------------------------------


def _onnx(path: Path) -> Classifier:
    require(f"{path}", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what is wrong is raised too
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except Exception as error:  # its exceptions have no base class of their own
        raise WeightsError(f"{path}: not an ONNX file that can be run ({one_line(error)[:200]}); {_AGAIN}") from error
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return _program(path, "an ONNX file in ONNX Runtime", session.get_modelmeta().custom_metadata_map, run)


def _pt2(path: Path) -> Classifier:
    extra = {program.DESCRIPTION: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            compiled = any("/aotinductor/" in name for name in archive.namelist())
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        if compiled:
            network = torch._inductor.aoti_load_package(str(path))
            metadata = network.get_metadata()
        else:
            network = torch.export.load(path, extra_files=extra).module()
            metadata = Field.of_json(extra[program.DESCRIPTION] or "{}", program.DESCRIPTION).mapping()
    except FieldError:
        raise
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except Exception as error:  # PyTorch raises almost anything of a file that is none of its own
        raise WeightsError(f"{path}: not a program of torch.export ({one_line(error)[:200]}); {_AGAIN}") from error
    kind = "machine code by AOTInductor" if compiled else "a program of torch.export"
    return _program(path, kind, metadata, network)


_PROGRAMS: Mapping[str, Callable[[Path], Classifier]] = {".onnx": _onnx, ".pt2": _pt2}


def _program(path: Path, kind: str, metadata: Mapping[str, Any], network: Callable[[Tensor], Tensor]) -> Classifier:
    """``network`` as a classifier. Raises FieldError or RecipeError where its metadata do not describe one."""
    said = Field(dict(metadata))
    if said.value.get("format") != program.FORMAT:
        raise WeightsError(f"{path}: without a description of classes and preprocessing by rsengine; {_AGAIN}")
    described = Description.of_metadata(said, str(path))
    takes = said["input"].text()
    if takes not in (program.PIXELS, program.NORMALISED):
        raise said["input"].error(f"{program.PIXELS} or {program.NORMALISED}")
    if takes == program.PIXELS:
        return Classifier(path, f"{kind} that takes pixels", described, network)
    preprocess = Preprocess(described.mean, described.std)
    return Classifier(path, kind, described, lambda images: network(preprocess(images).contiguous()))
