"""Windows and macOS lack what Linux has. Nothing that the package imports may need it.

Neither system is at hand: the modules and symbols that one of them lacks are hidden here, after the libraries of others
have been imported, which know those systems.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HIDE = r"""
import sys
sys.modules["triton"] = sys.modules["ffcv"] = None  # they have no packages for these systems
import concurrent.futures.process, ctypes, importlib, multiprocessing.resource_tracker, os, pkgutil, signal
import matplotlib.figure, numba, PIL.Image, psutil, pyarrow, safetensors.torch, sklearn.datasets, torch._inductor.config
import torchvision, tqdm

for name in ("fcntl", "grp", "pwd", "resource", "termios"):  # Windows has none of them
    sys.modules[name] = None
# Windows: no fork, users, process groups, reading at a place. macOS and Windows: no affinity, no such flags of files.
for name in '''
    fork forkpty register_at_fork getuid geteuid getgid getegid killpg setsid getpgid pread pwrite fchmod statvfs
    fstatvfs sysconf sysconf_names uname mkfifo wait sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise
    fdatasync memfd_create O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_NONBLOCK
'''.split():
    if hasattr(os, name):
        delattr(os, name)
for name in '''
    SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGPIPE SIGCHLD setitimer pthread_sigmask sigwait alarm pause
'''.split():
    if hasattr(signal, name):
        delattr(signal, name)
# There is no C library by the name of nothing, on Windows, and none with mallopt, prctl or renameat2 on either.
plain = ctypes.CDLL
def library(name, *arguments, **options):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    return plain(name, *arguments, **options)
ctypes.CDLL = library
"""


def python(code: str, folder: Path, *arguments: object) -> list[str]:
    """The lines that ``code`` prints in ``folder``, where ``sys.argv[1:]`` are ``arguments``."""
    start = f"{HIDE}\nsys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_module_can_be_imported(tmp_path):
    *failed, count = python(
        """
import rsengine
names = [module.name for module in pkgutil.walk_packages(rsengine.__path__, "rsengine.")]
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        if (getattr(error, "name", None) or "").split(".")[0] not in ("ffcv", "triton"):  # theirs alone
            print(f"{name}: {type(error).__name__}: {error}")
print(len(names))
""",
        tmp_path,
    )
    assert failed == [] and int(count) > 100


def test_what_is_missing_is_done_without(tmp_path):
    (tmp_path / ".leftover.tmp-4000000").mkdir()
    lines = python(
        """
import re
from pathlib import Path
from rsengine import device, gpu_check, processor, temporaries
from rsengine.kernels import explain
from rsengine.run import folder, machine

assert processor.usable_cpus() == set(range(os.cpu_count()))
assert machine.machine()["ram_gib"] is None
assert not device.keep_freed_memory()
print(explain("batch_norm", "cpu"))
with gpu_check.ended_like_ctrl_c(), gpu_check.alone_in(Path.cwd()), folder.locked(Path.cwd(), print):
    print(Path(".lock").read_text())
with temporaries.temporary_folder("test") as private:
    assert private.is_dir()
assert temporaries.remove_abandoned(Path.cwd(), re.compile(r"\\..+\\.tmp-(?P<pid>\\d+)"))
""",
        tmp_path,
    )
    assert "eager" in lines[0] and "whose a file is" in lines[0]
    assert lines[1].startswith("run: no lock on") and lines[2].startswith("process ")
    assert not (tmp_path / ".leftover.tmp-4000000").exists()


def test_a_run_its_evaluation_and_its_predictions(tmp_path, toy_dataset):
    lines = python(
        """
from rsengine import evaluate, predict, train
data, picture = sys.argv[1:]
small = ["--set", "model.blocks=[1]", "--set", "model.width_multiplier=0.25", "--set", "train.batch_size=16"]
options = ["--recipe", "digits", "--epochs", "1", "--data", data, "--device", "cpu", "--out", "run"]
assert train.main([*options, *small]) == 0
assert evaluate.main(["run", "--data", data]) == 0
assert predict.main(["run", picture]) == 0
""",
        tmp_path,
        toy_dataset.folder,
        next((toy_dataset.folder.parent / "source" / "test").rglob("*.png")),
    )
    assert any(line.startswith("run: no lock on") for line in lines)
    assert any(line.startswith("source: accuracy") for line in lines) and lines[-1].endswith("%")
