"""How a command ends: the user's mistakes and the machine's limits in one line, bugs with their traceback."""

import pytest
import torch

from rsengine.data import DataError
from rsengine.data.errors import one_line
from rsengine.errors import SettingsError, run_command


def fail(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("kind", [DataError, SettingsError, OSError])
def test_a_message_is_one_line_that_a_terminal_shows_as_it_is(capsys, kind):
    assert run_command(fail(kind("é: two\nlines\r\n\x1b[31m red \x00\udcff"))) == 2
    assert capsys.readouterr().err == "error: é: two lines \\x1b[31m red \\x00\\udcff\n"


def test_one_line_leaves_names_as_they_are():
    assert one_line("a  b – 32×32 日本.png") == "a  b – 32×32 日本.png"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB")]
)
def test_want_of_memory_is_one_line(capsys, error):
    assert run_command(fail(error)) == 2
    words = capsys.readouterr().err
    assert words.startswith("error: not enough memory (") and words.endswith("with more of it, may do\n")
    assert words.count("\n") == 1


def test_what_pytorch_says_where_the_cpu_s_memory_ends_is_known(capsys):
    assert run_command(lambda: torch.empty(2**60, dtype=torch.uint8).numel() * 0) == 2
    assert "error: not enough memory (" in capsys.readouterr().err


def test_any_other_error_of_pytorch_is_a_bug():
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_command(fail(RuntimeError("size mismatch")))
