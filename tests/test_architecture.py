"""The rooms and the one direction of imports, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = {"train", "predict", "evaluate", "study", "gpu_check"}
# A module may import from lower layers, and from its own.
LAYERS = [
    {"kernels", "data", "files", "device", "signals", "display", "schedule", "preprocess", "layers"},
    {"model", "augment", "mix", "muon"},
    {"config"},
    {"loader", "resident", "feed", "batches", "step", "graph"}
    | {"capture_check", "findings", "trace", "fake_device", "launches"}
    | {"checkpoint", "runlog", "plots", "weights", "evaluate"},
    {"report", "trainer", "showcase", "checks"},
    {"records"},
    {"train", "predict", "study", "gpu_check", "augment.__main__"},
]


def layer_of(module):
    return next(i for i, names in enumerate(LAYERS) if module in names)


def top_level_imports(path):
    """Modules imported when the file is: not inside functions, not for type checkers alone."""
    found = set()

    def visit(body):
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = ("." * node.level) + (node.module or "")
                found.update([base] if base != "rsengine" else [f"rsengine.{alias.name}" for alias in node.names])
            elif isinstance(node, ast.With | ast.Try | ast.If) and "TYPE_CHECKING" not in ast.dump(node)[:80]:
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    return found


def modules():
    for path in sorted((ROOT / "rsengine").glob("*.py")):
        if path.stem != "__init__":
            yield path.stem, path
    for path in sorted((ROOT / "rsengine" / "augment").glob("*.py")):
        yield ("augment.__main__" if path.stem == "__main__" else "augment"), path
    for path in sorted((ROOT / "rsengine" / "checks").rglob("*.py")):
        yield "checks", path


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: getattr(value, "name", value))
def test_imports_go_down_only(module, path):
    for name in top_level_imports(path):
        if name.startswith("rsengine."):
            other = name.split(".")[1]
            assert layer_of(other) <= layer_of(module), f"{path.name} imports {name}"
            assert other not in ENTRY_POINTS - {"evaluate"} or other == module, f"{path.name} imports an entry point"


@pytest.mark.parametrize("room", ["kernels", "data"])
def test_the_lower_rooms_know_nothing_of_rsengine(room):
    for path in (ROOT / room).glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rsengine"):
                assert room == "data" and node.module.startswith("rsengine.data"), f"{path}: {node.module}"


LIGHT = {"__future__", "collections", "contextlib", "contextvars", "dataclasses", "functools", "importlib", "math"}
LIGHT |= {"os", "typing"}
# Tools for tests and reports; the ops must not need them.
TOOLS = {"interpreter.py", "interpreter_memory.py", "offline.py", "compile_report.py"}


def test_kernels_import_torch_alone():
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "jit").glob("*.py")]:
        outside = {name.split(".")[0] for name in top_level_imports(path) if not name.startswith(".")}
        if path.name in TOOLS:
            allowed = {"torch", "triton", "numpy", *sys.stdlib_module_names}
        else:
            allowed = {"torch", *LIGHT} | ({"triton", "numpy"} if path.parent.name == "jit" else set())
        assert outside <= allowed, f"{path.name}: {outside - allowed}"


def test_the_compiled_passes_import_torch_and_the_standard_library():
    for path in (ROOT / "kernels" / "native").glob("*.py"):
        outside = {name.split(".")[0] for name in top_level_imports(path) if not name.startswith(".")}
        assert outside <= {"torch", *sys.stdlib_module_names}, f"{path.name}: {outside}"


def test_ops_import_neither_triton_code_nor_tools_at_the_top():
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name not in TOOLS:
            inner = {name.lstrip(".").split(".")[0] for name in top_level_imports(path) if name.startswith(".")}
            assert not inner & {"jit", "native", *(name.removesuffix(".py") for name in TOOLS)}, f"{path.name}: {inner}"


def test_importing_the_package_is_light():
    code = (
        "import sys, rsengine, rsengine.data; "
        "heavy = {'triton', 'ffcv', 'matplotlib', 'torch', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, rsengine.kernels; assert not {'triton', 'ffcv'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_bare_or_silent_except():
    for path in [*ROOT.glob("rsengine/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("data/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} bare except"
                silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                assert not silent, f"{path}:{node.lineno} swallows an error"


def test_nothing_names_the_shared_folder_except_ci():
    for path in ROOT.glob("**/*"):
        ours = path.suffix in (".py", ".toml", ".md", ".sh") and not {".venv", "runs"} & set(
            path.relative_to(ROOT).parts
        )
        if ours and path.name != Path(__file__).name:
            assert "../shared" not in path.read_text(), path
