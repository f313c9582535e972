"""Published peaks: a name is a model or nothing."""

from __future__ import annotations

import pytest

from hpcpipe.backends.cuda.peaks import ROWS, TYPES, mfu, peak, peaks


@pytest.mark.parametrize(
    ("name", "model", "bfloat16", "bandwidth"),
    [
        ("NVIDIA H200", "H200 SXM", 989e12, 4.8e12),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H100 NVL", "H100 NVL", 835e12, 3.9e12),
        ("NVIDIA H200 NVL", "H200 NVL", 835e12, 4.8e12),
        ("NVIDIA GB300", "GB300", 2500e12, 8e12),
        ("NVIDIA B300 SXM6 AC", "B300", 2250e12, 8e12),
        ("A100-SXM4-80GB", "A100 SXM 80 GB", 312e12, 2.039e12),
        ("NVIDIA A100-SXM4-40GB\n", "A100 SXM 40 GB", 312e12, 1.555e12),
    ],
)
def test_a_model_by_its_name(name, model, bfloat16, bandwidth):
    found = peaks(name)
    assert found is not None
    assert (found.model, found.flops["bfloat16"], found.bandwidth) == (model, bfloat16, bandwidth)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA",
        "NVIDIA H20",
        "NVIDIA H100",
        "H100 SXM",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA A100-SXM4-80GB-X",
        "NVIDIA B2000",
        "NVIDIA L40S",
        "AMD H200",
    ],
)
def test_what_only_begins_like_a_model_is_none(name):
    assert peaks(name) is None and peak(name, "bfloat16") is None


def test_types_that_a_model_has():
    assert peak("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak("NVIDIA H200", "fp4") is None and peak("NVIDIA H200", "fp8") == 1979e12
    assert peak("NVIDIA B300", "fp4") is None and peak("NVIDIA GB300", "fp4") == 15000e12
    assert peak("NVIDIA H200", "float16") is None


def test_rows_are_dense_and_no_name_has_two():
    for _, _, teraflops, gigabytes in ROWS:
        by = dict(zip(TYPES, teraflops, strict=True))
        assert by["bfloat16"] == 2 * by["tf32"] and 1000 < gigabytes <= 8000
        assert by["fp8"] == 0 or abs(by["fp8"] / by["bfloat16"] - 2) < 0.01
        assert 4 * by["float32"] < by["tf32"]
    models = [model for _, model, _, _ in ROWS]
    assert len(set(models)) == len(models)


def test_mfu():
    assert mfu(494.5e12, peak("NVIDIA H200", "bfloat16")) == pytest.approx(0.5)
    assert mfu(1e12, None) is None
