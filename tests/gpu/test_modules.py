"""Compiling the GPU code at run time: which compiler, what is kept, what is taken on trust (nothing)."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path

import pytest

from hpcpipe.backends.cuda import modules
from hpcpipe.config import UserError

ARCH = "sm_90a"
KERNEL = '#include "shape.cuh"\nextern "C" __global__ void hp_{0}(float *y) {{ y[threadIdx.x] = WIDTH; }}\n'

# An nvcc of a few lines: counts its calls, fails on a file with the word "none", and copies a real cubin otherwise.
FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.1"; exit 0; fi
for word in "$@"; do
  if [ "$last" = -o ]; then target="$word"; fi
  case "$word" in *.cu) file="$word";; esac
  last="$word"
done
echo "$*" >> {calls}
case "$*" in *sm_999*) echo "nvcc fatal   : Unsupported gpu architecture 'sm_999'" >&2; exit 1;; esac
if grep -q none "$file"; then echo "$file(2): error: identifier \\"none\\" is undefined" >&2; exit 1; fi
cp {cubin} "$target"
"""


def elf(*names: str) -> bytes:
    """A cubin as far as its symbols go: section 1 has the names, section 2 the symbols, the headers come last."""
    strings, symbols = b"\0", b"\0" * 24
    for other, name in [(0, "$device_function"), *((0x10, name) for name in names)]:
        symbols += struct.pack("<IBBHQQ", len(strings), 0x12, other, 5, 0, 64)
        strings += name.encode() + b"\0"
    head = 64
    table = head + len(strings) + len(symbols)
    sections = [
        (0,) * 10,
        (0, 3, 0, 0, head, len(strings), 0, 0, 1, 0),
        (0, 2, 0, 0, head + len(strings), len(symbols), 1, 0, 8, 24),
    ]
    start = b"\x7fELF" + bytes(36) + struct.pack("<Q", table) + bytes(10) + struct.pack("<HHH", 64, len(sections), 1)
    return start.ljust(head, b"\0") + strings + symbols + b"".join(struct.pack("<IIQQQQIIQQ", *s) for s in sections)


class Bench:
    """Sources, a cache of its own and a fake nvcc."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls, self.cubin = folder, folder / "calls", folder / "cubin"
        self.sources = modules.Sources(folder / "native" / "cuda", folder / "native" / "include")
        for each in self.sources:
            each.mkdir(parents=True)
        (self.sources.cuda / "shape.cuh").write_text("#define WIDTH 4\n")
        for name in ("one", "two"):
            (self.sources.cuda / f"{name}.cu").write_text(KERNEL.format(name))
        self.cubin.write_bytes(elf("hp_one", "hp_one_h"))
        self.install("13.0")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setattr(modules, "PACKAGE", folder / "site" / "hpcpipe")
        monkeypatch.setattr(modules, "nvrtc", lambda: None)

    def install(self, version: str, where: str = "bin") -> None:
        program = self.folder / where / "nvcc"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(FAKE.format(version=version, calls=self.calls, cubin=self.cubin))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def compiled(self) -> list[str]:
        """The files that the compiler saw since the last time it was asked."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return sorted(word for line in lines for word in line.split() if word.endswith(".cu") and "probe" not in word)

    def images(self, arch: str = ARCH) -> dict[str, modules.Image]:
        return modules.images(arch, self.sources)

    @property
    def kept(self) -> list[Path]:
        return sorted((self.folder / "cache" / "hpcpipe" / "cuda").iterdir())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


def test_kernels_are_the_launchable_functions():
    assert modules.kernels(elf("hp_two", "hp_one")) == ("hp_one", "hp_two")
    with pytest.raises(modules.CompileError, match="no cubin"):
        modules.kernels(b"none")


def test_compiles_once(bench):
    first = bench.images()
    assert first == {stem: modules.Image(elf("hp_one", "hp_one_h"), ("hp_one", "hp_one_h")) for stem in ("one", "two")}
    assert bench.compiled() == ["one.cu", "two.cu"]
    assert bench.images() == first and bench.compiled() == []
    assert len(bench.kept) == 2 and {f.suffix for f in bench.kept} == {".cubin"}


def test_compiles_again_what_changed(bench):
    bench.images()
    bench.compiled()
    (bench.sources.cuda / "two.cu").write_text(KERNEL.format("two") + "\n")
    bench.images()
    assert bench.compiled() == ["two.cu"]
    for change in (
        lambda: (bench.sources.cuda / "shape.cuh").write_text("#define WIDTH 5\n"),
        lambda: (bench.sources.include / "formula.h").write_text("\n"),
        lambda: bench.install("13.1"),
    ):
        change()
        bench.images()
        assert bench.compiled() == ["one.cu", "two.cu"]
    bench.images("sm_103a")
    assert bench.compiled() == ["one.cu", "two.cu"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + b"\1" + b[101:], lambda b: b"", bytes.upper])
def test_a_broken_file_is_made_again(bench, damage):
    first = bench.images()
    bench.compiled()
    victim = next(f for f in bench.kept if f.name.startswith("one"))
    victim.write_bytes(damage(victim.read_bytes()))
    assert bench.images() == first
    assert bench.compiled() == ["one.cu"]


def test_a_cache_that_cannot_be_written_is_no_error(bench, monkeypatch):
    (bench.folder / "cache").write_text("a file where the folder should be")
    assert set(bench.images()) == {"one", "two"}
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert modules.cache() is None
    assert set(bench.images()) == {"one", "two"}
    assert bench.compiled() == ["one.cu", "one.cu", "two.cu", "two.cu"]


def test_cuda_home_goes_first(bench, monkeypatch):
    bench.install("12.9", "toolkit/bin")
    monkeypatch.setenv("CUDA_HOME", str(bench.folder / "toolkit"))
    assert modules.nvcc().name == "nvcc 12.9.1"
    monkeypatch.setenv("CUDA_HOME", str(bench.folder / "nowhere"))
    assert modules.nvcc().name == "nvcc 13.0.1"


def test_built_ahead_is_taken_if_it_is_of_these_sources(bench):
    modules.build(ARCH, bench.folder / "site" / "hpcpipe" / "native" / "cuda", bench.sources)
    assert bench.compiled() == ["one.cu", "two.cu"]
    modules.build(ARCH, bench.folder / "site" / "hpcpipe" / "native" / "cuda", bench.sources)
    bench.images()
    assert bench.compiled() == []
    (bench.sources.cuda / "one.cu").write_text(KERNEL.format("one") + "\n")
    bench.images()
    assert bench.compiled() == ["one.cu"]


def test_the_first_complaint_is_the_sentence(bench):
    (bench.sources.cuda / "two.cu").write_text("\nnone\n")
    with pytest.raises(
        UserError, match=r'two\.cu for sm_90a: two\.cu\(2\): error: identifier "none" is undefined; use'
    ):
        bench.images()


def test_an_architecture_that_the_compiler_does_not_know(bench, monkeypatch):
    with pytest.raises(UserError, match=r"no compiler for sm_999 \(.*Unsupported gpu architecture 'sm_999'\); load"):
        bench.images("sm_999")
    other = modules.Compiler("NVRTC 13.5", lambda sources, file, arch: elf("hp_other"))
    monkeypatch.setattr(modules, "nvrtc", lambda: other)
    assert bench.images("sm_999")["one"].entries == ("hp_other",)
    bench.calls.unlink()
    assert bench.images("sm_999")["one"].entries == ("hp_other",) and not bench.calls.exists()


def test_no_compiler_at_all(bench, monkeypatch):
    monkeypatch.setenv("PATH", str(bench.folder))
    with pytest.raises(UserError, match="nvcc is neither in CUDA_HOME nor on the PATH, and CuPy finds no NVRTC"):
        bench.images()


def test_sources_that_are_not_there(bench):
    with pytest.raises(UserError, match="GPU sources"):
        modules.images(ARCH)
    shutil.copytree(bench.folder / "native", bench.folder / "site" / "hpcpipe" / "native")
    assert set(modules.images(ARCH)) == {"one", "two"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here: no GPU code is compiled")
def test_with_nvcc(tmp_path, monkeypatch):
    program = shutil.which("nvcc")
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", f"{Path(program).parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    shutil.rmtree(bench.folder / "bin")
    (bench.sources.cuda / "two.cu").write_text(KERNEL.format("two") + KERNEL.format("two_h"))
    assert {stem: image.entries for stem, image in bench.images().items()} == {
        "one": ("hp_one",),
        "two": ("hp_two", "hp_two_h"),
    }


def test_with_nvrtc(tmp_path, monkeypatch):
    pytest.importorskip("cupy", reason="CuPy is not installed: NVRTC cannot be asked")
    real = modules.nvrtc()
    if real is None:
        pytest.skip("CuPy finds no NVRTC")
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setattr(modules, "nvcc", lambda: None)
    monkeypatch.setattr(modules, "nvrtc", lambda: real)
    assert bench.images()["two"].entries == ("hp_two",)
    (bench.sources.cuda / "two.cu").write_text("\nvoid f() { none(); }\n")
    with pytest.raises(UserError, match=r"NVRTC does not compile two\.cu for sm_90a: two\.cu\(2\): error"):
        bench.images()
