"""Tables of published runs for optional tests: they have licences of their own and are not part of this repository."""

import os
from pathlib import Path

import pytest


def table(name: str) -> Path:
    """The path of a table in the folder that LOWPREC_SCALING_DATA names; skips the test where it is not."""
    folder = os.environ.get("LOWPREC_SCALING_DATA")
    if not folder:
        pytest.skip("LOWPREC_SCALING_DATA is not set to a folder with published run tables")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path
