"""A pytest plugin for runs in several processes: the files that take longest come first, so that none ends alone."""

import pytest

LONGEST = ("test_jit.py", "test_train.py", "test_capture.py", "test_measurements.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
