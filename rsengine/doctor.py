"""``rsengine doctor``: what this machine has, which paths a run will take and why, and how to get what is missing.

It is run where packages are missing or broken, so this file imports the standard library alone at its top, and of
rsengine what does the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rsengine.cache import cache_folder
from rsengine.errors import run_command
from rsengine.output import UserError, add_output_options, counted, one_line, parsed, print_json, program
from rsengine.run.machine import machine

GOOD, OPTIONAL, WRONG = "ok", "--", "!!"
NEEDED = {"numpy": "numpy", "pillow": "PIL", "tqdm": "tqdm", "psutil": "psutil", "tomli-w": "tomli_w"}  # and modules
NEEDED |= {name: name for name in ("safetensors", "numba", "matplotlib", "torch", "torchvision")}
# Packages that only some need: the module, what it is for, and the command that brings it.
EXTRAS = {
    "scikit-learn": ("sklearn", "the digits", "pip install scikit-learn"),
    "ffcv": ("ffcv", "the fastest loader", "pip install 'rsengine[ffcv]'"),
    "pyarrow": ("pyarrow", "data sets in Parquet", "pip install 'rsengine[parquet]'"),
    "timm": ("timm", "exporting to timm", "pip install 'rsengine[export]'"),
    "onnx": ("onnx", "exporting to ONNX", "pip install 'rsengine[export]'"),
    "onnxruntime": ("onnxruntime", "predicting with ONNX", "pip install 'rsengine[export]'"),
    "tensorboard": ("tensorboard", "--track tensorboard", "pip install 'rsengine[tensorboard]'"),
    "wandb": ("wandb", "--track wandb", "pip install 'rsengine[wandb]'"),
    "mlflow": ("mlflow", "--track mlflow", "pip install 'rsengine[mlflow]'"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: ``ok``; ``--`` for what is missing and not needed; ``!!`` for what no run works without.
        remedy: the command or change that mends it, or nothing.
    """

    subject: str
    state: str
    what: str
    remedy: str = ""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 1 where something that every run needs is missing."""
    parser = argparse.ArgumentParser(
        prog=program("doctor"),
        description="Say what this machine has, which paths a run will take and why, and what is missing.",
        epilog="example: %(prog)s --json > machine.json",
    )
    add_output_options(parser, result="the findings", quiet=False)
    arguments = parsed(parser, argv)
    return run_command(lambda: _report(arguments.json))


def _report(as_json: bool) -> int:
    findings = examine()
    healthy = all(finding.state != WRONG for finding in findings)
    if as_json:
        print_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        width = max(len(finding.subject) for finding in findings)
        for each in findings:
            print(f"{each.state}  {each.subject:{width}}  {each.what}{f'; {each.remedy}' * bool(each.remedy)}")
        print("ready to train" if healthy else "not ready: see the lines that begin with !!")
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """Look at everything, the needed packages first: without them, what depends on them is left out."""
    here = machine()
    memory = f", {here['ram_gib']:.1f} GiB" if here["ram_gib"] else ""
    cores = counted(here["logical_cores"], "logical core")
    findings = [
        Finding("machine", GOOD, f"{here['processor']}, {cores}{memory}, {here['os']}, {here['python']}"),
        _cache(),
    ]
    packages = [_needed(*each) for each in NEEDED.items()]
    findings += packages
    if all(finding.state == GOOD for finding in packages):
        checks = (_device, _gpu, _loader, _layers, _fused, _compiler, _data)
        findings += [_examined(check) for check in checks]
    return findings + [_extra(name, *about) for name, about in EXTRAS.items()]


def _examined(check: Callable[[], Finding]) -> Finding:
    """What ``check`` finds; an error of its own is a finding too, for this command is run where something is broken."""
    try:
        return check()
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(check.__name__.strip("_"), WRONG, f"cannot be examined ({why})", "install its package again")


def _needed(name: str, module: str) -> Finding:
    """Whether the package ``name`` can be imported. That it is installed by its metadata says nothing of its files."""
    version = _version(name)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        lacks = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if lacks == module and version is None:
            return Finding(name, WRONG, "not installed", f"pip install {name}")
        package = next((each for each, its in NEEDED.items() if its == lacks != module), None)
        remedy = f"mend {package} first" if package else f"pip install --force-reinstall {name}"
        what = f"cannot be imported ({type(error).__name__}: {one_line(error)})"
        return Finding(name, WRONG, f"{version}, {what}" if version else what, remedy)
    if getattr(found, "__file__", None) is None:  # a folder without the files of the package
        return Finding(name, WRONG, "its files are missing", f"pip install --force-reinstall {name}")
    return Finding(name, GOOD, version or "installed")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(name: str, module: str, purpose: str, remedy: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(name, OPTIONAL, f"not installed; it is for {purpose}", remedy)
    return Finding(name, GOOD, f"{_version(name) or 'installed'}, for {purpose}")


def _cache() -> Finding:
    try:
        folder = cache_folder()
        above = next(each for each in (folder, *folder.parents) if each.exists())
    except OSError as error:
        return Finding("cache", WRONG, str(error), "set RSENGINE_CACHE to a folder that you may write to")
    if not os.access(above, os.W_OK | os.X_OK):
        return Finding(
            "cache", WRONG, f"{folder} cannot be written", "set RSENGINE_CACHE to a folder that you may write to"
        )
    free = shutil.disk_usage(above).free / 2**30
    return Finding("cache", GOOD, f"{folder}, {free:.1f} GiB free on its disk")


def _device() -> Finding:
    from rsengine.device import choose_execution

    execution = choose_execution()
    return Finding("device", GOOD, f"{execution.reason}; {counted(execution.threads, 'thread')}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("GPU", GOOD, f"{names}; each step one CUDA-graph replay")
    if torch.version.cuda is None and torch.version.hip is None:
        remedy = "with an NVIDIA GPU, install a build of PyTorch for CUDA (pytorch.org/get-started)"
        return Finding("GPU", OPTIONAL, "this build of PyTorch is for the CPU alone", remedy)
    remedy = "where there is one, see that `nvidia-smi` lists it: the driver may be missing or too old"
    return Finding("GPU", OPTIONAL, "PyTorch sees none", remedy)


def _loader() -> Finding:
    from rsengine.input.choose import choose_loader

    return Finding("loader", GOOD, choose_loader("auto").reason)


def _layers() -> Finding:
    from rsengine.config import Recipe
    from rsengine.device import choose_execution
    from rsengine.engine.build import explain_layers
    from rsengine.kernels import explain

    execution = choose_execution()
    on_cpu = execution.device.type == "cpu"
    chosen = explain_layers(Recipe(), execution) if on_cpu else [explain("batch_norm", execution.device)]
    slow = on_cpu and "batch_norm: eager" in chosen[-1]
    return Finding(
        "layers",
        OPTIONAL if slow else GOOD,
        "; ".join(chosen),
        "install a C compiler, such as gcc, for passes that are faster" if slow else "",
    )


def _fused() -> Finding:
    from rsengine.kernels import explain

    return Finding("kernels", GOOD, explain("squeeze_excite_residual").removeprefix("squeeze_excite_residual: "))


def _compiler() -> Finding:
    from rsengine.device import choose_execution
    from rsengine.engine.compiler import check_compiler

    try:
        check_compiler(choose_execution())
    except UserError as error:
        return Finding("--compile", OPTIONAL, " ".join(str(error).split()))
    return Finding("--compile", GOOD, "torch.compile has the compiler that it needs")


def _data() -> Finding:
    from rsengine.data import DataError, find_dataset
    from rsengine.data.find import NotConverted

    try:
        dataset = find_dataset(conversion=False, log=lambda _line: None)
    except NotConverted as error:
        return Finding("data", OPTIONAL, str(error), "rsengine convert SOURCE --out data/NAME does it once and for all")
    except DataError as error:
        return Finding("data", OPTIONAL, str(error), "rsengine train --data digits needs none")
    return Finding("data", GOOD, f"{dataset.name} in {dataset.folder}")


if __name__ == "__main__":
    sys.exit(main())
