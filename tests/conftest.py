"""What all tests share: which ones this machine can run, and property tests that draw the same examples every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("same")

GPU = Path("/dev/nvidiactl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, visibly, where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not GPU.exists():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
