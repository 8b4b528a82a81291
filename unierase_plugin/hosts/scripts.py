"""Runs a script of a harness with UniErase among its methods.

EasyEdit's examples, and evaluate.py of the ROME family, choose a class of settings by the method's name: by a chain of
if and elif, or by a table. UniErase is added to the program in memory. The file is not changed.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UniEraseError, reason, shown

METHOD = "UniErase"
#: Where a script treats methods differently, it treats ours as this one: a batch of facts with their subjects.
LIKE = "MEMIT"
#: The names of our class and our function in the changed program.
HPARAMS, APPLY = "_unierase_hparams", "_apply_unierase"
#: An option chooses the method if its `choices` hold one of these.
PEERS = frozenset({"ROME", "MEMIT", "AlphaEdit", "FT"})


def run_script(path: Path, arguments: Sequence[str]) -> None:
    """Runs the script as `python path arguments` would, with the method UniErase among its choices.

    Raises UniEraseError for a file that cannot be read, and for one that chooses no settings by a method's name.
    """
    program = add_choice(_read(path), path)
    _find_modules(path)
    names = _ours(_imports_easyedit(program))
    module = types.ModuleType("__main__")
    vars(module).update({"__file__": str(path), **names})
    before = sys.modules["__main__"], sys.argv
    sys.modules["__main__"], sys.argv = module, [str(path), *arguments]
    try:
        exec(compile(program, str(path), "exec"), vars(module))
    finally:
        sys.modules["__main__"], sys.argv = before


def add_choice(source: str, path: Path) -> ast.Module:
    """The script's program with the choice added.

    Raises UniEraseError for a file that is no Python, and for one where no method is chosen.
    """
    try:
        program = ast.parse(source, str(path))
    except SyntaxError as error:
        raise UniEraseError(f"{path} is not a Python script: {error}.") from error
    adder = _Adder()
    adder.visit(program)
    ast.fix_missing_locations(program)
    if not adder.added:
        raise UniEraseError(
            f"{METHOD} cannot be added to {path}: it chooses no class of settings by a method's name, neither by "
            "`if ... == 'ROME': ... = ROMEHyperParams` nor by a table. Change the script by hand: "
            "docs/how-to/hosts.md shows the two lines."
        )
    return program


class _Adder(ast.NodeTransformer):
    """Adds the choice to every chain and every table of classes of settings, and to the choices of the option."""

    def __init__(self) -> None:
        self.added = 0

    def visit_If(self, node: ast.If) -> ast.AST:
        chosen = _chosen_settings(node)
        if chosen is None:
            return self.generic_visit(node)
        # A branch at the beginning is enough. The rest of the chain stays.
        option, targets = chosen
        self.added += 1
        ours = ast.If(
            ast.Compare(option, [ast.Eq()], [ast.Constant(METHOD)]),
            [ast.Assign(targets, ast.Name(HPARAMS, ast.Load()))],
            [node],
        )
        return ast.copy_location(ours, node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        kinds = {_kind(key, value) for key, value in zip(node.keys, node.values, strict=True)}
        if node.keys and kinds <= {"settings", "pair"} and len(kinds) == 1:
            names = (HPARAMS,) if kinds == {"settings"} else (HPARAMS, APPLY)
            loaded: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
            node.keys.append(ast.Constant(METHOD))
            node.values.append(loaded[0] if len(loaded) == 1 else ast.Tuple(loaded, ast.Load()))
            self.added += 1
        elif _is_table_of_ways(node):
            node.keys.append(ast.Constant(METHOD))
            node.values.append(node.values[[_text(key) for key in node.keys].index(LIKE)])
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Adds to `METHOD in ["ROME", "MEMIT"]`, by which a script treats some methods alike."""
        listed = node.comparators[0]
        named = listed.elts if isinstance(listed, (ast.List, ast.Tuple, ast.Set)) else []
        if isinstance(node.ops[0], (ast.In, ast.NotIn)) and LIKE in map(_text, named):
            named.append(ast.Constant(METHOD))
        return self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg == "choices" and isinstance(node.value, (ast.List, ast.Tuple)):
            named = {each.value for each in node.value.elts if isinstance(each, ast.Constant)}
            if named & PEERS:
                node.value.elts.append(ast.Constant(METHOD))
        self.generic_visit(node)
        return node


def _chosen_settings(node: ast.If) -> tuple[ast.expr, list[ast.expr]] | None:
    """OPTION and X of a branch `if OPTION == 'NAME': X = YHyperParams`; None for any other."""
    test = node.test
    if not (isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq) and _text(test.comparators[0])):
        return None
    assigned = next((each for each in node.body if isinstance(each, ast.Assign) and _is_settings(each.value)), None)
    return None if assigned is None else (test.left, assigned.targets)


def _kind(key: ast.expr | None, value: ast.expr) -> str:
    """What an entry of a table is: a class of settings, a pair of such a class and a function, or something else."""
    if _text(key) and _is_settings(value):
        return "settings"
    pair = isinstance(value, ast.Tuple) and len(value.elts) == 2 and _is_settings(value.elts[0])
    return "pair" if _text(key) and pair else "other"


def _is_table_of_ways(node: ast.Dict) -> bool:
    """Whether a table maps methods' names to functions of the script's own object."""
    own = [
        isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self"
        for each in node.values
    ]
    return all(own) and LIKE in map(_text, node.keys)


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_settings(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id.casefold().endswith("params")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UniEraseError(
            f"The script {shown(str(path))} cannot be read: {reason(error)}. Give the path of a .py file."
        ) from error


def _find_modules(path: Path) -> None:
    """Puts three folders on the path.

    The script's, as Python does; the current one, as `python -m` does; EasyEdit's checkout, if the script is in one.
    """
    folder = path.resolve().parent
    checkout = [each for each in folder.parents if (each / "easyeditor" / "__init__.py").is_file()]
    installed = importlib.util.find_spec("easyeditor") is not None
    sys.path[:0] = [str(each) for each in (folder, Path.cwd(), *([] if installed else checkout[:1]))]


def _imports_easyedit(program: ast.Module) -> bool:
    nodes = [node for node in ast.walk(program) if isinstance(node, (ast.Import, ast.ImportFrom))]
    sources = [getattr(node, "module", None) or node.names[0].name for node in nodes]
    return any(source.split(".")[0] == "easyeditor" for source in sources)


def _ours(easyedit: bool) -> Mapping[str, Any]:
    """Our class of settings and our function for this harness. EasyEdit is told of UniErase."""
    if easyedit:
        from . import easyedit as host

        host.register()
        return {HPARAMS: host.EasyEditHyperParams, APPLY: host.apply_unierase_to_model}
    from ..hparams import UniEraseHyperParams
    from .rome_family import apply_unierase_to_model

    return {HPARAMS: UniEraseHyperParams, APPLY: apply_unierase_to_model}
