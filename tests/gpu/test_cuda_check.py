"""`make cuda-check`: what it reads out of the compiler, what it calls a problem, and that it fails when it should."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "cuda_check.py"

with_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"), reason="nvcc is not here: no GPU code is compiled"
)

# As nvcc 13.0 says it.
SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'hp_small_h' for 'sm_90a'
ptxas info    : Function properties for hp_small_h
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compile time = 18.689 ms
ptxas info    : Compiling entry function 'hp_large' for 'sm_90a'
ptxas info    : Function properties for hp_large
    160 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 160 bytes cumulative stack size, 256 bytes smem
ptxas info    : Function properties for _Z5twicef
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""

GOOD = """
extern "C" __global__ void __launch_bounds__(256) hp_good(float *y, const float *x) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[255 - threadIdx.x];
}
"""
# 1024 threads leave 64 registers each; 128 values are alive at once.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) hp_spills(float *y, const float *x) {
  float a[128];
#pragma unroll
  for (int i = 0; i < 128; i++) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; i++) y[i * 1024 + threadIdx.x] = a[127 - i] * a[i];
}
"""


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        del sys.modules[spec.name]


def sources(folder: Path, **files: str) -> Path:
    (folder / "cuda").mkdir()
    (folder / "include").mkdir()
    for name, text in files.items():
        (folder / "cuda" / f"{name}.cu").write_text(text)
    return folder


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_reads_what_ptxas_says(check):
    uses = check.parse(SAID, {"hp_large": 256})
    assert uses == {
        "hp_small_h": check.Use(registers=8),
        "hp_large": check.Use(registers=32, shared=256, stack=168, spills=36, threads=256),  # with its function's
    }


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "arch", "share"),
    [
        (32, 0, 256, "sm_90a", 1.0),
        (33, 0, 256, "sm_90a", 0.75),  # 40 registers: 51 warps, 48 of them are whole quarters, 6 blocks of 8
        (128, 0, 256, "sm_90a", 0.25),
        (255, 0, 128, "sm_80", 0.125),
        (32, 48 << 10, 128, "sm_90a", 0.25),  # four blocks of 49 KiB in 228
        (32, 48 << 10, 128, "sm_80", 0.1875),  # three in 164
        (16, 0, 32, "sm_80", 0.5),  # 32 blocks of one warp
        (64, 0, 1024, "sm_100a", 0.5),
    ],
)
def test_occupancy(check, registers, shared, threads, arch, share):
    assert check.Use(registers, shared, 0, 0, threads).occupancy(arch) == share


def test_problems(check, monkeypatch):
    use, result = check.Use(registers=8), check.Result
    results = {("a.cu", "sm_80"): result("", {"hp_a": use}, []), ("b.cu", "sm_80"): result("", {"hp_b": use}, [])}
    assert check.problems(results) == []
    monkeypatch.setitem(check.COLD, "hp_b", "runs once")
    assert check.problems(results) == ["hp_b does not spill: take it out of COLD"]
    spilt = {**results, ("b.cu", "sm_90a"): result("", {"hp_b": use._replace(spills=4)}, [])}
    assert check.problems(spilt) == []
    hot = {**spilt, ("a.cu", "sm_90a"): result("", {"hp_a": use._replace(spills=4)}, [])}
    assert [p.split(":")[0] for p in check.problems(hot)] == ["hp_a spills 4 bytes for sm_90a"]
    slow = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    serial = {**spilt, ("c.cu", "sm_90a"): result("", {}, [slow])}
    assert len(check.problems(serial)) == 1
    broken = {("a.cu", "sm_90a"): result("In file\na.cu(3): error: no\nmore", {}, [])}
    assert check.problems(broken) == ["a.cu does not compile for sm_90a: a.cu(3): error: no"]


def test_says_that_nothing_was_compiled(tmp_path):
    done = run(PATH=str(tmp_path), CUDA_HOME="")
    assert done.returncode == 0 and "SKIPPED" in done.stderr


@with_nvcc
def test_a_good_file(tmp_path):
    numbers = tmp_path / "numbers.json"
    done = run("--sources", str(sources(tmp_path, good=GOOD)), "--json", str(numbers))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(numbers.read_text())["kernels"]
    assert [row["arch"] for row in rows] == ["sm_80", "sm_90a", "sm_100a", "sm_103a"]
    for row in rows:
        assert (row["kernel"], row["threads"], row["spills"], row["occupancy"]) == ("hp_good", 256, 0, 1.0)
        assert row["shared"] >= 1024 and row["registers"] > 0


@with_nvcc
def test_fails_on_spills_and_on_errors(tmp_path):
    done = run("--sources", str(sources(tmp_path, spills=SPILLS, broken="void f() { none(); }")), "--nvrtc", "")
    assert done.returncode == 1
    assert "hp_spills spills" in done.stderr and 'broken.cu(1): error: identifier "none"' in done.stderr


@with_nvcc
def test_nvrtc_refuses_a_host_header(check, tmp_path):
    library = check.find_nvrtc()
    if not library:
        pytest.skip("the package nvidia-cuda-nvrtc is not installed")
    host = "#include <vector>\n" + GOOD
    done = run("--sources", str(sources(tmp_path, host=host)), "--nvrtc", library)
    assert done.returncode == 1 and "NVRTC" in done.stderr and "vector" in done.stderr
