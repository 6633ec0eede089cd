"""The model card beside exported weights, ``README.md``: results, preprocessing, and how to load them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsengine.data.errors import one_line
from rsengine.output import escaped
from rsengine.run.checkpoint import CheckpointError, load_checkpoint
from rsengine.run.files import CHECKPOINT_FILE, METRICS_FILE, WEIGHTS_FILE, write_atomically
from rsengine.run.log import EPOCH, RunLog, accuracy
from rsengine.run.weights import Weights

CARD_FILE = "README.md"
_LISTED = 100  # names of classes

_TIMM = """import timm, torch
from PIL import Image

model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # DIR: this folder; hf-hub:… once it is on the Hub
config = timm.data.resolve_model_data_config(model)
picture = timm.data.create_transform(**config, is_training=False)(Image.open("picture.png").convert("RGB"))
with torch.no_grad():
    probabilities = model(picture[None]).softmax(1)[0]
print(model.pretrained_cfg["label_names"][int(probabilities.argmax())])

# or with transformers
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("DIR").eval()"""
_IMAGES = {
    True: "images = np.asarray(picture)[None]  # (N, {height}, {width}, 3) uint8; normalisation is inside",
    False: """images = ((np.asarray(picture) / 255 - {mean}) / {std}).transpose(2, 0, 1)[None].astype("float32")""",
}
_PICTURE = """picture = Image.open("picture.png").convert("RGB")
picture = ImageOps.fit(picture, ({width}, {height}), Image.Resampling.BICUBIC)  # scaled, then cropped at the centre"""
_ONNX = """import json
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{file}")
{picture}
{images}
(logits,) = session.run(None, {{"images": images}})
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
print(classes[logits[0].argmax()])"""
_TORCH = """import json
import numpy as np, torch
from PIL import Image, ImageOps

extra = {{"rsengine.json": ""}}
model = torch.export.load("{file}", extra_files=extra).module()
{picture}
{images}
logits = model(torch.from_numpy(images.copy()))
classes = json.loads(json.loads(extra["rsengine.json"])["classes"])
print(classes[int(logits[0].argmax())])"""
_COMPILED = """import json
import numpy as np, torch
from PIL import Image, ImageOps

model = torch._inductor.aoti_load_package("{file}")  # machine code: load it only from people you trust
{picture}
{images}
logits = model(torch.from_numpy(images.copy()))
classes = json.loads(model.get_metadata()["classes"])
print(classes[int(logits[0].argmax())])"""
_SAFETENSORS = """from safetensors import safe_open

with safe_open("{file}", framework="pt") as file:
    state = {{name: file.get_tensor(name) for name in file.keys()}}
    about = file.metadata()  # recipe (TOML); classes, image_size, mean and std (JSON)

# or with rsengine
from rsengine.run.weights import load_weights
model = load_weights("{file}").model"""
_USES = {
    "model.safetensors": ("timm", ["timm", "transformers"], _TIMM),
    "model.onnx": ("onnx", ["onnx"], _ONNX),
    "model.pt2": ("pytorch", ["pytorch"], _TORCH),
    "model-compiled.pt2": ("pytorch", ["pytorch"], _COMPILED),
    WEIGHTS_FILE: ("rsengine", ["safetensors"], _SAFETENSORS),
}


def write_card(
    run: Path | None, weights: Weights, folder: Path, file: str, *, uint8: bool, say: Callable[[str], None] = print
) -> Path:
    """Write ``README.md`` into ``folder``.

    Args:
        run: the folder that the weights come from, whose log has the results, if there is one; None: unknown.
        weights: what was exported.
        file: the name of the exported file.
        uint8: whether it takes pixels.
        say: called with a line where something is lacking.
    """
    library, tags, use = _USES[file]
    height, width = weights.image_size
    mean, std = list(weights.mean), [value or 1.0 for value in weights.std]
    places = {"file": file, "height": height, "width": width, "mean": mean, "std": std}
    if use is not _TIMM:
        places |= {"picture": _PICTURE.format(**places), "images": _IMAGES[uint8].format(**places)}
        use = use.format(**places)
    result, data = (None, None) if run is None else (_result(run), _data_name(run, say))
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *tags, "resnet-rs"],
    }
    if result:
        front["metrics"] = ["accuracy"]
    if result and data:
        front["model-index"] = [
            {
                "name": weights.recipe.name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": data, "type": data, "split": "test"},
                        "metrics": [{"type": "accuracy", "value": round(result["accuracy"], 6)}],
                    }
                ],
            }
        ]
    # JSON is YAML, and quotes what needs it.
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    model = weights.model
    names = [_plain(name) for name in weights.classes[:_LISTED]]
    more = len(weights.classes) - len(names)
    parts = [
        f"---\n{head}\n---",
        f"# {_plain(weights.recipe.name)}: ResNet-RS for {len(weights.classes)} classes",
        f"A ResNet-RS ([Bello et al., 2021](https://arxiv.org/abs/2103.07579)) of "
        f"{[len(stage) for stage in model.stages]} blocks, trained by rsengine"
        f"{f' on {_plain(data)}' if data else ''}. {model.summary(weights.image_size)}.",
        "## Results",
        _results(result),
        "## Input",
        f"RGB images of {height}×{width} pixels (height×width). "
        + (
            "The file takes pixels, (N, height, width, 3) uint8: the normalisation is inside."
            if uint8
            else f"Pixels are divided by 255, then normalised by the mean {_numbers(mean)} and the standard deviation "
            f"{_numbers(std)} of the red, green and blue channel."
        )
        + " Training resized the shorter side of larger pictures (bicubic, antialiased) and cropped the centre.",
        "## Use",
        f"```python\n{use}\n```",
        "`python -m rsengine.predict` and `python -m rsengine.evaluate` read this folder too.",
        "## Classes",
        ", ".join(names) + (f" and {more:,} more" if more else ""),
        "## Recipe",
        f"```toml\n{weights.recipe.to_toml().strip()}\n```",
    ]
    path = folder / CARD_FILE
    write_atomically(path, ("\n\n".join(parts) + "\n").encode(errors="backslashreplace"))
    return path


def _result(run: Path) -> dict[str, Any] | None:
    """The last evaluation in the log of a run; None where there is no log."""
    if not (run / METRICS_FILE).is_file():
        return None
    log = RunLog(run)
    log.check()
    records = log.records(EPOCH)
    if not records or accuracy(records[-1]) is None:
        return None
    last = records[-1]
    kind = "raw weights" if last["test_accuracy_ema"] is None else "EMA weights"
    loss = last["test_loss"] if last["test_accuracy_ema"] is None else last["test_loss_ema"]
    return {"accuracy": accuracy(last), "loss": loss, "epoch": last["epoch"], "kind": kind}


def _results(result: dict[str, Any] | None) -> str:
    if result is None:
        return "No log of the run lay beside the weights, so none are known."
    loss = "" if result["loss"] is None or not math.isfinite(result["loss"]) else f"{result['loss']:.4f}"
    rows = [("Test accuracy", f"{result['accuracy']:.2%}"), ("Test loss, with the recipe's label smoothing", loss)]
    rows += [("Weights", f"{result['kind']} after epoch {result['epoch']}")]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _data_name(run: Path, say: Callable[[str], None]) -> str | None:
    """The data set that a run was trained on; None where no checkpoint says it."""
    path = run / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        return str(load_checkpoint(path)["dataset"]["name"])
    except CheckpointError as error:
        say(f"model card: does not name the data set, because its checkpoint is of no use ({one_line(error)})")
        return None


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _plain(words: str) -> str:
    """Text that Markdown prints as it is."""
    return "".join(f"\\{c}" if c in "\\`*_<[|#" else c for c in escaped(words))
