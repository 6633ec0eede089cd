"""A pytest plugin: run every n-th test of those collected, and write each outcome as soon as it is known.

It does not import PyTorch, so that pytest starts quickly where its tests do not either.
"""

from __future__ import annotations

import json
import os

import pytest

SHARE_VARIABLE, OUTCOMES_VARIABLE = "RSENGINE_TEST_SHARE", "RSENGINE_TEST_OUTCOMES"  # "i/n"; a file


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, count = map(int, os.environ[SHARE_VARIABLE].split("/"))
    left = [item for i, item in enumerate(items) if i % count != share]
    items[:] = items[share::count]
    config.hook.pytest_deselected(items=left)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # One outcome a test: that of its call, or of its set-up or tear-down if that failed or skipped it.
    if report.when != "call" and report.outcome == "passed":
        return
    message = str(report.longrepr).strip().splitlines()[-1:] if report.failed else []
    name = report.nodeid.rpartition("/")[2]
    outcome = {"name": name, "outcome": report.outcome, "seconds": report.duration, "message": " ".join(message)[:200]}
    with open(os.environ[OUTCOMES_VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(outcome) + "\n")
