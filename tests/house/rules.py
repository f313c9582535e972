"""The rules of the house, each a function from source text to the sentences that say where it is broken."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

# Methods that change a list, dict or set in place.
_CHANGES = {"append", "add", "update", "extend", "insert", "remove", "pop", "popitem", "clear", "setdefault", "discard"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """One imported name: ``from module import name`` or ``import module`` (name empty); lazy: inside a function."""

    module: str
    name: str
    line: int
    lazy: bool


def imports(source: str) -> list[Import]:
    """Every import, also those under ``if TYPE_CHECKING``: knowing a type is knowing the room."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, "", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.extend(Import(module, alias.name, node.lineno, lazy) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, _FUNCTIONS))

    visit(ast.parse(source), False)
    return found


def room_of(path: str) -> str:
    """``hpcpipe/checkpoint/read.py`` lives in the room checkpoint, ``hpcpipe/train.py`` in train."""
    return path.split("/")[1].removesuffix(".py")


def arrows(source: str) -> set[tuple[str, str]]:
    """(room, name) for everything imported from hpcpipe; the name is empty for a whole module."""
    found = set()
    for module, name, _, _ in imports(source):
        parts = module.split(".")
        if parts[0] != "hpcpipe":
            continue
        if len(parts) == 1 and name:  # from hpcpipe import model
            found.add((name, ""))
        elif len(parts) > 1:
            found.add((parts[1], name))
    return found


def door_offences(path: str, source: str, doors: Mapping[str, Sequence[str]], lazy: Sequence[str]) -> Iterator[str]:
    """A heavy library is imported behind its doors only (a folder ends in /), a lazy one inside functions only."""
    for module, _, line, inside in imports(source):
        library = module.split(".")[0]
        if library in doors and not any(path == d or (d.endswith("/") and path.startswith(d)) for d in doors[library]):
            yield f"{path}:{line} imports {library}, whose only door is {', '.join(doors[library]) or 'not built yet'}"
        elif library in lazy and not inside:
            yield f"{path}:{line} imports {library} at the top; import it in the function that needs it"


def foreign_offences(path: str, source: str, standard: frozenset[str]) -> Iterator[str]:
    """A pure file knows the standard library and hpcpipe."""
    for module, _, line, _ in imports(source):
        if module.split(".")[0] not in standard | {"hpcpipe"}:
            yield f"{path}:{line} imports {module}, but this room is pure: standard library only"


def table_offences(path: str, source: str, tables: Sequence[str]) -> Iterator[str]:
    """Among pure rooms those with ``tables`` know numpy, and of it arrays and their types: no random, no linalg."""
    for module, name, line, _ in imports(source):
        if module.split(".")[0] == "numpy":
            if not path.startswith(tuple(tables)):
                yield f"{path}:{line} imports {module}, but of the pure rooms only {', '.join(tables)} has tables"
            elif name or module not in ("numpy", "numpy.typing"):
                yield f"{path}:{line} imports more of numpy than arrays and their types; write import numpy as np"


def relative_offences(path: str, source: str) -> Iterator[str]:
    """Imports are written in full, so that a search for a room finds who uses it."""
    for module, _, line, _ in imports(source):
        if module.startswith("."):
            yield f"{path}:{line} imports {module}: write the full name"


def export_offences(path: str, source: str) -> Iterator[str]:
    """An __init__.py holds a docstring at most."""
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield f"{path}:{node.lineno} does something: nothing is re-exported, a name lives where it is defined"


def length_offences(path: str, source: str, lines: int, function_lines: int) -> Iterator[str]:
    """Files and functions that fit a head."""
    total = source.count("\n")
    if total > lines:
        yield f"{path} has {total} lines, at most {lines}: which two things is it?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _FUNCTIONS):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > function_lines:
                yield f"{path}:{node.lineno} {node.name} has {length} lines, at most {function_lines}"


def docstring_offences(path: str, source: str) -> Iterator[str]:
    """Every module says why it exists."""
    if not ast.get_docstring(ast.parse(source)):
        yield f"{path} has no docstring: why does it exist, what flows in and out?"


def _module_names(tree: ast.Module) -> Iterator[tuple[str, ast.expr | None, int]]:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value, node.lineno  # type: ignore[union-attr]


def state_offences(path: str, source: str) -> Iterator[str]:
    """Module-level state: ``global``, a container without a constant's name, or one that a function changes."""
    tree = ast.parse(source)
    names = set()
    for name, value, line in _module_names(tree):
        names.add(name)
        mutable = isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))
        if mutable and not name.isupper() and not name.startswith("__"):
            yield f"{path}:{line} {name} is a mutable container at module level; a constant is written in capitals"
    for function in (n for n in ast.walk(tree) if isinstance(n, _FUNCTIONS)):
        known = names - {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield f"{path}:{node.lineno} global {', '.join(node.names)}: no module-level state"
            elif _changed(node) in known:
                yield f"{path}:{node.lineno} {function.name} changes the module's {_changed(node)}"


def _changed(node: ast.AST) -> str | None:
    """The plain name whose container this node changes in place."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return node.value.id if isinstance(node.value, ast.Name) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
        return node.func.value.id if isinstance(node.func.value, ast.Name) else None
    return None


def word_offences(path: str, text: str, words: Sequence[str]) -> Iterator[str]:
    """Words that must not be committed."""
    for number, line in enumerate(text.splitlines(), 1):
        for word in words:
            if re.search(rf"(?<![\w.])({word})", line):
                yield f"{path}:{number} says {word!r}: {line.strip()[:80]}"


class Command(NamedTuple):
    """A command line shown in a document."""

    line: int
    words: tuple[str, ...]


def commands(markdown: str) -> list[Command]:
    """What a document shows to type: lines of fenced or indented code, and `code` spans, that start such a program."""
    found, fenced = [], False
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        pieces = [line] if fenced or line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        for piece in pieces:
            words = tuple(piece.split("#")[0].strip().removeprefix("$ ").split())
            if words and words[0].rsplit("/", 1)[-1] in (
                "make",
                "hpcpipe",
                "mpirun",
                "srun",
                "sbatch",
                "python",
                "python3",
            ):
                found.append(Command(number, words))
    return found


def command_offences(path: str, markdown: str, targets: set[str], files: set[str], modules: set[str]) -> Iterator[str]:
    """A document shows only make targets, scripts and modules that exist."""
    for line, words in commands(markdown):
        if words[0] == "make" and len(words) > 1 and words[1] not in targets and "=" not in words[1]:
            yield f"{path}:{line} make has no target {words[1]}"
        for before, word in pairwise(words):
            if before == "-m" and word.split(".")[0] in ("hpcpipe", "benchmarks") and word not in modules:
                yield f"{path}:{line} there is no module {word}"
        for word in words:
            if word.startswith(("slurm/", ".ci/", "benchmarks/")) and word not in files:
                yield f"{path}:{line} there is no file {word}"
