"""The documentation: its command lines, each parsed by the command's own parser, and its links."""

import argparse
import importlib
import re
import shlex

import pytest

from rsengine import cli
from rsengine.config import Recipe, recipe_names
from tests.test_setup import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# At the start of a line or of code in the text, behind settings of the environment, or in $(…).
COMMAND = re.compile(
    r"(?:^|\$\()(?:\w+=\S* )*(rsengine|python -m rsengine(?:\.[\w.]+)?|python data/convert\.py)(?: (.*)|$)"
)
ENDS = re.compile(r"\s(?:[|>&#]|&&)\s|[;)]")


class Parsed(BaseException):
    """Ends a command once its line is parsed. Not an Exception, which a command might report as an error of its own."""


def code_lines(text):
    """The lines of blocks without a language, each continued line as one, and the code in the text around blocks."""
    text = re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.M | re.S)
    for block in re.findall(r"^```\n(.*?)^```$", text, flags=re.M | re.S):
        joined = re.sub(r"\\\n|\n +(?=\[)", " ", block)  # the second is a synopsis over several lines
        yield from (line.strip() for line in joined.splitlines())
    text = re.sub(r"^```\n.*?^```$", "", text, flags=re.M | re.S)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))


def command_lines(text):
    """The module and the words of each command line in a page; where a command is only named, there are no words."""
    for line in code_lines(text):
        if not (found := COMMAND.search(line)):
            continue
        started, line = found[1], re.sub(r"\$\w+", "1", found[2] or "")
        words = shlex.split(ENDS.split(line)[0])
        if started == "python data/convert.py":
            yield "rsengine.data.convert", words
        elif started.count("rsengine."):
            yield started.removeprefix("python -m "), words
        elif words and not words[0].startswith("-"):
            assert words[0] in (*cli.COMMANDS, "COMMAND", "…"), f"rsengine {words[0]}"
            if words[0] in cli.COMMANDS:
                yield cli.COMMANDS[words[0]].module, words[1:]


def spelled_out(words):
    """The lines that a synopsis stands for: all options in brackets given, with each alternative of ``a|b`` in turn."""
    words = [word.strip("[]") for word in words if word.strip("[]…")]
    words = [re.sub(r"\b[NF]\b", "1", word) for word in words]
    most = max((word.count("|") + 1 for word in words), default=1)
    for turn in range(most):
        yield [parts[turn % len(parts)] for parts in (word.split("|") for word in words)]


def parsed(module, words, monkeypatch):
    """What the parser of a command makes of ``words``. Raises SystemExit where it refuses them."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    plain = argparse.ArgumentParser.parse_args

    def parse_alone(parser, arguments=None, namespace=None):
        raise Parsed(plain(parser, arguments, namespace))

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        with pytest.raises(Parsed) as ended:
            found.main(words)
    return ended.value.args[0]


def check_line(module, words, monkeypatch):
    if not words:
        importlib.import_module(module)
        return
    for line in spelled_out(words):
        arguments = parsed(module, line, monkeypatch)
        if module == "rsengine.train":
            Recipe().with_settings([each for each in arguments.set if not each.startswith("section.")])
            recipe = arguments.recipe
            assert recipe is None or recipe in (*recipe_names(), "NAME") or recipe.endswith(".toml"), recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_lines_of_a_page_are_parsed(page, monkeypatch, capsys):
    for module, words in command_lines(page.read_text(encoding="utf-8")):
        try:
            check_line(module, words, monkeypatch)
        except (SystemExit, ValueError, ImportError) as refused:
            pytest.fail(f"{module} {shlex.join(words)}: {refused!r}; {capsys.readouterr().err}")


def test_every_command_has_an_example_in_the_documentation():
    lines = [line for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"))]
    given = {importlib.import_module(module).__name__.removesuffix(".__main__") for module, words in lines if words}
    for command in ("train", "evaluate", "predict", "export", "compare", "augment", "data.convert"):
        assert f"rsengine.{command}" in given


@pytest.mark.parametrize("line, refused", [
    ("rsengine train --epoch-count 3", True),
    ("rsengine train --track nothing", True),
    ("rsengine train --set train.epoch=3", True),
    ("rsengine train --recipe nothing", True),
    ("for x in 1 2; do\nrsengine train \\\n  --epoch-count $x --seed 3", True),
    ("n=$(rsengine recipes --jsn | wc -l)", True),
    ("python -m rsengine.export RUN --to timm|nothing --out DIR", True),
    ("python -m rsengine.train [--recipe NAME]\n       [--seeds N]", True),
    ("python -m rsengine.tran", True),
    ("rsengine train --set train.epochs=$n --seed $n > log  # a comment", False),
    ("X=1 python -m rsengine.export RUN --to timm|onnx [--opset N] --out DIR", False),
    ("pip install rsengine --nothing", False),
])  # fmt: skip
def test_what_the_check_of_command_lines_refuses(line, refused, monkeypatch, capsys):
    lines = list(command_lines(f"text\n```\n{line}\n```\n"))
    assert len(lines) == (not line.startswith("pip"))
    for module, words in lines:
        if refused:
            with pytest.raises((SystemExit, ValueError, ImportError, AssertionError)):
                check_line(module, words, monkeypatch)
        else:
            check_line(module, words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", text, flags=re.M)
    for target in ("".join(each) for each in targets):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings], target


def test_pictures_are_small():
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size <= 150_000, path
