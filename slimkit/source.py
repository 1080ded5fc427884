"""Reads what a module defines from its source, without importing it or its packages."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from slimkit.errors import SlimkitError, did_you_mean

# Their constructors take no options, so a class on top of them has only its own.
_PLAIN_BASES = "slimkit.interfaces"
_SPACES = ("globals", "vars", "locals")


@dataclass(frozen=True)
class Parameter:
    """One argument of a function or constructor; annotation and default as written, or None."""

    name: str
    annotation: str | None
    default: str | None
    keyword_only: bool


@dataclass(frozen=True)
class Definition:
    """A class or function as its source shows it.

    Args:
        name: what it is called.
        doc: the docstring without indentation, or an empty string.
        parameters: of the function or constructor, without self; None where they cannot be known
            (``**kwargs``, a decorator, a constructor from another file).
        attributes: source of each value in the class body, such as ``scheme``.
    """

    name: str
    doc: str
    parameters: tuple[Parameter, ...] | None
    attributes: dict[str, str]

    @property
    def options(self) -> tuple[Parameter, ...] | None:
        """The keyword-only parameters, or None where they cannot be known."""
        if self.parameters is None:
            return None
        return tuple(p for p in self.parameters if p.keyword_only)


@dataclass(frozen=True)
class Source:
    """The parsed source of one module."""

    module: str
    text: str
    tree: ast.Module

    def names(self) -> set[str] | None:
        """Everything that can be imported from it, or None where the source does not tell."""
        bound = set(_bound(self.tree.body))
        return None if _makes_names(self.tree) or bound & {"*", "__getattr__"} else bound

    def find(self, name: str) -> Definition | None:
        """The class or function of that name, if it is defined at the top of this file."""
        node = self._node(name)
        if isinstance(node, ast.ClassDef):
            attributes = {
                key: self._written(value)
                for ancestor in reversed(self._lineage(node))
                for key, value in _assigned(ancestor.body)
            }
            return Definition(name, ast.get_docstring(node) or "", self._options(node), attributes)
        if isinstance(node, ast.FunctionDef):
            parameters = None if node.decorator_list else _parameters(node.args)
            return Definition(name, ast.get_docstring(node) or "", parameters, {})
        return None

    def _node(self, name: str) -> ast.stmt | None:
        for node in reversed(self.tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node
        return None

    def _lineage(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        """The class and its first bases, as far as they are in this file."""
        lineage = [node]
        while node.bases and isinstance(node.bases[0], ast.Name):
            base = self._node(node.bases[0].id)
            if not isinstance(base, ast.ClassDef) or base in lineage:
                break
            lineage.append(node := base)
        return lineage

    def _options(self, node: ast.ClassDef) -> tuple[Parameter, ...] | None:
        lineage = self._lineage(node)
        for ancestor in lineage:
            if ancestor.decorator_list or len(ancestor.bases) > 1:
                return None  # a dataclass, say, or a second constructor
            for item in ancestor.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    parameters = _parameters(item.args)
                    return parameters and parameters[1:]
        oldest = [ast.unparse(base) for base in lineage[-1].bases]
        plain = not oldest or oldest[0] in self._imported_from(_PLAIN_BASES)
        return () if plain else None

    def _class(self, name: str) -> Definition | None:
        """A class of this file or one that it imports by name; None without its source."""
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        try:
                            there = read(node.module)
                        except SlimkitError:
                            return None
                        return there.find(alias.name) if there else None
        return self.find(name) if isinstance(self._node(name), ast.ClassDef) else None

    def _imported_from(self, module: str) -> set[str]:
        return {
            alias.asname or alias.name
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and node.module == module
            for alias in node.names
        }

    def _written(self, value: ast.expr) -> str:
        """The source of a value; of a name, what it stands for at the top of the file.

        An attribute of a class, such as ``Parent.scheme``, is looked up where the class is defined.
        """
        if isinstance(value, ast.Name):
            value = dict(_assigned(self.tree.body)).get(value.id, value)
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            owner = self._class(value.value.id)
            if owner and value.attr in owner.attributes:
                return owner.attributes[value.attr]
        return textwrap.dedent(ast.get_source_segment(self.text, value, padded=True) or "").strip()


def read(module: str) -> Source | None:
    """The source of a module on the Python path or in the current folder.

    Returns:
        None if the module exists but is compiled.

    Raises:
        SlimkitError: there is no such module, or it is no valid Python.
    """
    spec = _find(module)
    get_source = getattr(spec.loader, "get_source", None)
    text = get_source(spec.name) if get_source else None
    if text is None:
        return None
    try:
        return Source(module, text, ast.parse(text))
    except SyntaxError as error:
        place = f"{spec.origin} line {error.lineno}"
        raise SlimkitError(f"module {module!r} is no valid Python: {place}: {error.msg}") from error


def _find(module: str) -> ModuleSpec:
    top, *rest = module.split(".")
    here = [str(Path.cwd()), *sys.path]
    spec = sys.modules[top].__spec__ if top in sys.modules else PathFinder.find_spec(top, here)
    spec = spec or importlib.util.find_spec(top)
    if spec is None:
        near = did_you_mean(top, _modules(here[:1]))
        raise SlimkitError(f"no module {top!r} on the Python path or in {here[0]}{near}")
    found = top
    for part in rest:
        folders = list(spec.submodule_search_locations or ())
        # By its last name only: the whole name would need the parent package to be imported.
        spec = PathFinder.find_spec(part, folders) if folders else None
        if spec is None:
            near = did_you_mean(f"{found}.{part}", (f"{found}.{m}" for m in _modules(folders)))
            raise SlimkitError(f"no module {part!r} in {found!r}{near}")
        found += f".{part}"
    return spec


def _modules(folders: Iterable[str]) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(folders)]


def _bound(body: Iterable[ast.AST]) -> Iterator[str]:
    """Names that statements bind, also inside if, try, with and for; "*" for a star import."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp():
                pass
            case ast.GeneratorExp():
                pass
            case _:
                yield from _bound(ast.iter_child_nodes(node))


def _makes_names(tree: ast.Module) -> bool:
    """Whether a module writes into its own names, at its top or in a function."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="exec")):
                return True
            case ast.Subscript(value=ast.Call(func=ast.Name(id=name)), ctx=ast.Store()):
                if name in _SPACES:
                    return True
            case ast.Assign(value=ast.Call(func=ast.Name(id=name))):
                if name in _SPACES:
                    return True
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id=name)), attr=method)):
                if name in _SPACES and method in ("update", "setdefault", "__setitem__"):
                    return True
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    modules = any(isinstance(n, ast.Attribute) and n.attr == "modules" for n in ast.walk(tree))
    return modules and "setattr" in names


def _assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value


def _parameters(arguments: ast.arguments) -> tuple[Parameter, ...] | None:
    if arguments.kwarg:
        return None
    plain = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(plain) - len(arguments.defaults))
    return tuple(
        Parameter(
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else None,
            ast.unparse(default) if default else None,
            keyword_only,
        )
        for arguments_, defaults, keyword_only in (
            (plain, [*missing, *arguments.defaults], False),
            (arguments.kwonlyargs, arguments.kw_defaults, True),
        )
        for argument, default in zip(arguments_, defaults, strict=True)
    )
