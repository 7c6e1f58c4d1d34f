"""Published behaviour reproduced, for every case of every golden file found.

python -m pytest tests/test_golden.py -s --golden DIR     # prints the largest deviation of each key
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import tests.golden
from tests.golden import CASES, Case, Golden, read

for _module in pkgutil.iter_modules(tests.golden.__path__):
    importlib.import_module(f"tests.golden.{_module.name}")

FLOAT_TOLERANCE = 1e-4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    golden = Golden(Path(metafunc.config.getoption("golden")))
    found = [
        pytest.param(golden, path, case, id=f"{path.stem}-{case.key}")
        for case in CASES
        for path in golden.files(case.prefix)
    ]
    absent = pytest.mark.skip(reason=f"no golden data in {golden.folder.name}")
    metafunc.parametrize(
        ("golden", "path", "case"), found or [pytest.param(None, None, None, marks=absent)]
    )


def test_published_behaviour(golden: Golden, path: Path, case: Case) -> None:
    data = read(path)
    if case.key not in data:
        pytest.skip(f"{path.name} does not hold {case.key}")
    with torch.no_grad():
        found = case.compute(data, golden)
    expected = data[case.key]
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        print(f"{path.stem} {case.key}: exact")
        return
    deviation = float((found - expected).abs().max())
    print(f"{path.stem} {case.key}: {deviation:.1e}")
    assert deviation <= FLOAT_TOLERANCE
