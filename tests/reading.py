"""Which settings the code reads, by its syntax trees: a name in the text may be anything's."""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterable

from todi.options import declared


def unread(config_type: type, sources: Iterable[str], declarations: str) -> set[str]:
    """'Group.option' for every option of `config_type` that no source reads.

    Args:
        sources: texts of the modules that may read.
        declarations: text of the module that declares the settings. What it checks counts for nothing; what one of its
            properties reads is read where the property is.
    """
    groups = {name: hint.__name__ for name, hint in typing.get_type_hints(config_type).items()
              if dataclasses.is_dataclass(hint)}
    kinds = {group.__name__ for group in declared(config_type)}
    found = {read for source in sources for read in _reads(ast.parse(source), groups, kinds)}
    for node in ast.parse(declarations).body:
        for method in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and (node.name, method.name) in found:
                found |= _reads(method, groups, kinds, {"self": node.name})
    return {f"{group.__name__}.{option.name}" for group, options in declared(config_type).items() for option in options
            if (group.__name__, option.name) not in found}


def _reads(tree: ast.AST, groups: dict[str, str], kinds: set[str],
           known: dict[str, str] | None = None) -> set[tuple[str, str]]:
    """(group, attribute) for every attribute that is taken of something that is known to be a group."""
    reader = _Reader(groups, kinds, known or {})
    reader.visit(tree)
    return reader.found


class _Reader(ast.NodeVisitor):
    """Knows a group by the field that holds it (`config.optim`), by a parameter's annotation (`config: OptimConfig`),
    by what a name is assigned from (`optim = config.optim`), and by `parse(EvalConfig)`."""

    def __init__(self, groups: dict[str, str], kinds: set[str], known: dict[str, str]):
        self.groups, self.kinds, self.known, self.found = groups, kinds, known, set()

    def kind_of(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.groups.get(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse":
            return self._named(node.args[0])
        return None

    def _named(self, node: ast.expr | None) -> str | None:
        words = re.findall(r"\w+", ast.unparse(node)) if node else []
        return next((word for word in words if word in self.kinds), None)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self.known)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if argument.arg != "self":
                self._learn(argument, self._named(argument.annotation))
        self.generic_visit(node)
        self.known = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = (zip(target.elts, node.value.elts, strict=True)
                     if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) else [(target, node.value)])
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self._learn(name, self.kind_of(value))

    def _learn(self, name: ast.arg | ast.Name, kind: str | None) -> None:
        """A name is a group, or is one no longer."""
        text = name.arg if isinstance(name, ast.arg) else name.id
        self.known.pop(text, None)
        if kind:
            self.known[text] = kind

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kind = self.kind_of(node.value)
        if kind:
            self.found.add((kind, node.attr))
        self.generic_visit(node)
