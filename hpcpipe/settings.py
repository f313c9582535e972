"""Frozen dataclasses <- TOML and back: types, limits, the nearest right key for a misspelt one; no setting by name.

In go a dataclass made of ``value`` fields and of sections (dataclasses of ``value`` fields), and text; out come checked
values. A field's declaration is its only home: default, unit, meaning and limits stand in one line. What is wrong is a
ValueError whose message is one sentence that begins with the name of its source.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

LARGEST = 2**63 - 1
KINDS: Mapping[Any, tuple[tuple[type, ...], str]] = {  # what TOML must give for a type, and how to ask for it
    str: ((str,), "a text"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
    bool | None: ((bool,), "true or false"),
    str | tuple[int, ...]: ((str,), "a text or a list of whole numbers"),
}


class Limits(NamedTuple):
    """What a field accepts beside its type; ``above`` and ``below`` are exclusive, ``least`` and ``most`` inclusive."""

    doc: str
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    one_of: tuple[str, ...] = ()
    result: bool = True  # False: changing it leaves every loss and parameter the same


class Key(NamedTuple):
    """One setting: its dotted name, its type and its limits."""

    name: str
    type: Any
    limits: Limits

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def value(default: Any, doc: str, **limits: Any) -> Any:
    """A field with its meaning and limits."""
    return field(default=default, metadata={"limits": Limits(doc, **limits)})


@dataclass(frozen=True)
class Schema:
    """The settings of one root dataclass, in the order of their declaration, and the dataclasses of its sections."""

    keys: Mapping[str, Key]
    sections: Mapping[str, Any]

    @classmethod
    def of(cls, root: type) -> Schema:
        """``value`` fields of the root and of its sections, which are one level deep."""
        keys: dict[str, Key] = {}
        sections = {name: kind for name, kind in get_type_hints(root).items() if is_dataclass(kind)}
        for section, kind in [("", root), *sections.items()]:
            hints = get_type_hints(kind)
            for f in fields(kind):
                if "limits" in f.metadata:
                    name = f"{section}.{f.name}".lstrip(".")
                    keys[name] = Key(name, hints[f.name], f.metadata["limits"])
        return cls(keys, sections)

    def members(self, section: str) -> list[Key]:
        """The keys of a section; of the root for an empty name."""
        return [key for name, key in self.keys.items() if name.rpartition(".")[0] == section]

    # --- reading

    def read(self, text: str, source: str) -> dict[str, Any]:
        """Dotted name -> checked value, for the keys that a TOML text sets."""
        values: dict[str, Any] = {}
        for name, found in parse(text, source).items():
            if name not in self.sections:
                values[name] = typed(self.known(name, source), found, source)
            elif not isinstance(found, dict):
                raise ValueError(f"{source}: {name} is a section, not a value; write [{name}] and its keys below it")
            else:
                for leaf, inner in found.items():
                    values[f"{name}.{leaf}"] = typed(self.known(f"{name}.{leaf}", source), inner, source)
        return values

    def override(self, text: str) -> tuple[str, Any]:
        """(dotted name, checked value) of ``section.key=value``; what is not TOML, or meant for a text, stays."""
        source = f"--set {text}" if text.isprintable() else f"--set {text!r}"
        name, equals, raw = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise ValueError(f"{source}: an override is written section.key=value, for example {[*self.keys][-1]}=1")
        if name in self.sections:
            example = self.members(name)[0].name
            raise ValueError(f"{source}: {name} is a section; name one of its keys, for example {example}")
        key = self.known(name, source)
        try:
            table = tomllib.loads(f"value = {raw}")
        except (tomllib.TOMLDecodeError, RecursionError):
            table = {}
        found = table["value"] if list(table) == ["value"] else raw
        return name, typed(key, raw if key.type is str and not isinstance(found, str) else found, source)

    def known(self, name: str, source: str) -> Key:
        """The key of that name, or an error with the nearest right one."""
        if name in self.keys:
            return self.keys[name]
        section, _, leaf = name.rpartition(".")
        guess = [key.name for key in self.keys.values() if key.leaf == leaf]
        if section in self.sections:
            leaves = [key.leaf for key in self.members(section)]
            guess += [f"{section}.{near}" for near in difflib.get_close_matches(leaf, leaves, n=1)]
            hint = f"[{section}] has {', '.join(leaves)}"
        else:
            guess += difflib.get_close_matches(name, [*self.keys, *self.sections], n=1, cutoff=0.7)
            roots = ", ".join(key.name for key in self.members(""))
            hint = f"there are {roots} and the sections {', '.join(self.sections)}"
        if guess:
            hint = f"did you mean {f'the section [{guess[0]}]' if guess[0] in self.sections else guess[0]}?"
        raise ValueError(f"{source}: unknown key {name}; {hint}")

    # --- writing

    def write(self, root: object, comments: bool = False, keep: Callable[[Key], bool] = lambda _: True) -> str:
        """TOML that ``read`` turns into the same values; of the keys to ``keep``, with what they mean if asked."""
        blocks = []
        for section in ("", *self.sections):
            holder = getattr(root, section) if section else root
            lines = [_line(key, getattr(holder, key.leaf), comments) for key in self.members(section) if keep(key)]
            blocks.append((f"[{section}]\n" if section else "") + "".join(lines))
        return "\n".join(blocks)


def _line(key: Key, found: object, comments: bool) -> str:
    if found is None:
        return f"# {key.leaf} = true or false  # {key.limits.doc}\n" if comments else ""
    line = f"{key.leaf} = {literal(found)}"
    return f"{line:<28}  # {key.limits.doc}\n" if comments else f"{line}\n"


def literal(found: object) -> str:
    """A value as TOML."""
    if isinstance(found, bool):
        return str(found).lower()
    if isinstance(found, str):
        # A printable text in JSON is one in TOML, if nothing becomes a surrogate pair.
        return json.dumps(found, ensure_ascii=False)
    if isinstance(found, tuple):
        return "[" + ", ".join(map(str, found)) + "]"
    return repr(found)


def parse(text: str, source: str) -> dict[str, Any]:
    """The tables of a TOML text; an error says the line."""
    try:
        tree: dict[str, Any] = tomllib.loads(text)
        return tree
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rpartition(" (at ")
        at = re.search(r"line (\d+), column (\d+)", where)
        line, column = (at[1], f", column {at[2]}") if at else (max(1, len(text.splitlines())), "")
        raise ValueError(f"{source}: line {line}{column} is not valid TOML: {what[:1].lower()}{what[1:]}") from None
    except RecursionError:
        raise ValueError(f"{source}: the values are nested too deeply to be settings") from None


# --- checking


def typed(key: Key, found: Any, source: str) -> Any:
    """The value in the key's type and within its limits."""
    kinds, expected = KINDS[key.type]
    if isinstance(found, list) and key.type == str | tuple[int, ...]:
        if not found or any(type(x) is not int or not 1 <= x <= LARGEST for x in found):
            raise ValueError(f"{source}: {key.name} is {_shown(found)}, expected whole numbers of 1 or more")
        return tuple(found)
    if type(found) not in kinds:
        raise ValueError(f"{source}: {key.name} is {_shown(found)}, expected {expected}")
    wrong = _text_offence(key.limits, found) if isinstance(found, str) else _number_offence(key.limits, found)
    if wrong:
        raise ValueError(f"{source}: {key.name} is {_shown(found)}, {wrong}")
    return float(found) if key.type is float else found


def _shown(found: Any) -> str:
    """A TOML value in words, for an error."""
    if isinstance(found, dict):
        return "a table"
    if isinstance(found, str):
        return f'the text "{found}"' if found.isprintable() else f"the text {found!r}"
    if isinstance(found, list):
        return f"the list {found}"
    return str(found).lower() if isinstance(found, bool) else str(found)


def _text_offence(limits: Limits, found: str) -> str:
    if limits.one_of and found not in limits.one_of:
        near = difflib.get_close_matches(found, limits.one_of, n=1)
        return f"expected {' or '.join(limits.one_of)}" + (f"; did you mean {near[0]}?" if near else "")
    return "" if found.isprintable() else "which has characters that are not printable"


def _number_offence(limits: Limits, found: float) -> str:
    if not math.isfinite(found) or abs(found) > LARGEST:
        expected = f"a number between -{LARGEST} and {LARGEST}"
    elif limits.least is not None and found < limits.least:
        expected = f"{limits.least} or more"
    elif limits.above is not None and found <= limits.above:
        expected = f"more than {limits.above}"
    elif limits.below is not None and found >= limits.below:
        expected = f"less than {limits.below}"
    elif limits.most is not None and found > limits.most:
        expected = f"at most {limits.most}"
    else:
        return ""
    return f"expected {expected} ({limits.doc})"
