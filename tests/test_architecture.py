"""Who may import whom, by folder, and that no files import each other in a circle; read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"train", "evaluate", "predict", "compare", "capture_check", "gpu_check", "augment.__main__", "doctor"}
COMMANDS |= {"export.__main__", "study.__main__", "recipe_table", "cli", "__main__"}
# Of the standard library alone: what kernels and data may import of rsengine.
LOWEST = {"cache", "checked", "disk", "output", "processor", "temporaries"}
# A folder or file of rsengine may import from the lines above its own, and from its own.
LEVELS = [
    LOWEST,
    {"kernels", "data"},
    {"schedule", "device", "errors", "text", "waiting"},
    {"parallel"},
    {"model", "augment"},
    {"config"},
    {"engine", "input", "run", "checks"},
    {"track"},
    {"trainer", "export", "study"},
    {"training"},
    {"plan"},
    COMMANDS - {"train"},
    {"api"},  # what the commands do, from Python
    {"train"},
]
ABOVE_COMMANDS = {"rsengine.api", "rsengine.__main__"}
HOUSES = ("rsengine", "kernels", "data", "bench")


def sources(house):
    """The files of a folder of the top level. rsengine's links to kernels/ and data/ are left out: those are there."""
    for path in sorted((ROOT / house).rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[:2] not in (("rsengine", "kernels"), ("rsengine", "data")):
            yield path


def module_of(path):
    """The name under which a file is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "data"):
        parts.insert(0, "rsengine")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for house in HOUSES for path in sources(house)}


def imports(path, inside_functions=True):
    """Modules that a file imports, not for type checkers alone. ``from package import module`` is the module."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                name = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    found.add(f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name)
            elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(path.read_text()).body)
    return found


def level_of(module):
    """The place in :data:`LEVELS` of a module ``rsengine.…``."""
    name = module.removeprefix("rsengine.")
    own = name if name in COMMANDS else name.split(".")[0]
    return next(i for i, names in enumerate(LEVELS) if own in names)


@pytest.mark.parametrize("path", list(sources("rsengine")), ids=module_of)
def test_imports_go_down_only(path):
    module = module_of(path)
    if module == "rsengine":
        assert imports(path, inside_functions=False) == {"typing", "rsengine.processor"}
        assert imports(path) == {"typing", "importlib", "rsengine.processor"}
        return
    for name in imports(path):
        assert not name.startswith(("bench", "tests")), f"{module} imports {name}"
        if name.startswith("rsengine."):
            assert level_of(name) <= level_of(module), f"{module} imports {name}"
            if module not in ABOVE_COMMANDS:
                assert name.removeprefix("rsengine.") not in COMMANDS, f"{module} imports a command"


def circles(graph):
    """Groups of modules that import each other, by Tarjan's strongly connected components."""
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1 or module in graph[module]:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_no_files_import_each_other_in_a_circle():
    assert circles({module: imports(path) & MODULES.keys() for module, path in MODULES.items()}) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


@pytest.mark.parametrize("house", ["kernels", "data"])
def test_kernels_and_data_know_nothing_of_rsengine_but_the_lowest(house):
    for path in sources(house):
        for name in imports(path):
            if name.startswith("rsengine"):
                assert name.split(".")[1] in {house, *LOWEST}, f"{path}: {name}"


@pytest.mark.parametrize("name", sorted(LOWEST))
def test_the_lowest_need_the_standard_library_alone(name):
    found = imports(ROOT / "rsengine" / f"{name}.py")
    assert {each.split(".")[0] for each in found} <= sys.stdlib_module_names


LIGHT = {"__future__", "collections", "contextlib", "contextvars", "dataclasses", "functools", "importlib", "math"}
LIGHT |= {"os", "types", "typing"}


def outside(path):
    """What a file imports at its top that is not of this project."""
    return {name.split(".")[0] for name in imports(path, inside_functions=False)} - {"rsengine"}


def test_kernels_import_torch_alone():
    allowed = {
        "kernels": {"torch", *LIGHT},
        "jit": {"torch", "triton", "numpy", *LIGHT},
        "native": {"torch", *sys.stdlib_module_names},
        "proof": {"torch", "triton", "numpy", *sys.stdlib_module_names},  # tools for tests and reports
    }
    for path in sources("kernels"):
        assert outside(path) <= allowed[path.parent.name], f"{path.name}: {outside(path)}"


def test_ops_import_neither_triton_code_nor_tools_at_the_top():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports(path, inside_functions=False):
            assert name.split(".")[2:3] not in (["jit"], ["native"], ["proof"]), f"{path.name}: {name}"


def test_importing_the_package_is_light():
    code = (
        "import sys, rsengine; others = {name for name in sys.modules if name.startswith('rsengine.')}; "
        "assert others == {'rsengine.processor'} and 'numpy' not in sys.modules, others; import rsengine.data; "
        "heavy = {'triton', 'ffcv', 'matplotlib', 'torch', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, rsengine.kernels; assert not {'triton', 'ffcv'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("house", ["kernels", "data"])
def test_a_folder_found_under_its_own_name_makes_no_second_copy(house):
    """As transformers finds it from a checkout, where it looks for a package named ``kernels``."""
    modules = f"{{name: module for name, module in sys.modules.items() if name.startswith('rsengine.{house}.')}}"
    code = (
        f"import sys, rsengine.{house}; before = {modules}; import {house}; assert before == {modules}; "
        f"assert all(getattr({house}, name) is getattr(rsengine.{house}, name) for name in {house}.__all__); "
        f"assert not [name for name in sys.modules if name.startswith('{house}.')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_operator_is_defined_once_whatever_name_a_kernel_is_imported_by():
    code = (
        "import rsengine.kernels.ema as ema, torch; operator = torch.ops.rsengine.ema_update.default\n"
        "try:\n    import kernels.ema\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        "assert torch.ops.rsengine.ema_update.default is operator is ema._ema_update._opoverload"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout == "No module named 'kernels.ema'\n"


def test_no_bare_or_silent_except():
    for path in (path for house in HOUSES for path in sources(house)):
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
