"""One-token changes of Python source, which a test suite should notice."""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "in": "not in"}
COMPARISONS |= {"is not": "is", "not in": "in"}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "<<": ">>", ">>": "<<"}
ARITHMETIC |= {"|": "&", "&": "|", "^": "&"}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "sum": "mean"}
NAMES |= {"mean": "sum", "amax": "amin", "amin": "amax", "mul_": "div_", "div_": "mul_", "add_": "sub_", "sub_": "add_"}
NAMES |= {"minimum": "maximum", "maximum": "minimum", "round": "int", "float": "bfloat16", "float32": "bfloat16"}
# Keywords that do not affect the result of a call.
IDLE_KEYWORDS = {"strict", "stacklevel", "flush", "foreach", "non_blocking", "pin_memory", "memory_format", "encoding"}
IDLE_KEYWORDS |= {"device"}  # there is one device here
BUILTINS = {"min", "max", "any", "all", "round"}


@dataclass(frozen=True)
class Mutant:
    """Bytes `start` to `end` of a file replaced by `text`."""

    file: str
    line: int
    last_line: int
    start: int
    end: int
    text: str
    old: str  # the original line or lines
    new: str  # the changed lines

    @property
    def identity(self) -> str:
        """A hash of the change and its lines, independent of their position in the file."""
        return hashlib.sha256(f"{self.file}\n{self.old}\n{self.new}".encode()).hexdigest()

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Return all mutants of a file, one for each distinct change. Messages, annotations and decorators are not changed."""
    source = (root / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[str, Mutant] = {}
    for node, (start_node, end_node), text in _changes(ast.parse(source), source, starts):
        first, last = node.lineno, node.end_lineno or node.lineno
        lines = source[starts[first - 1] : starts[last]]
        offset = starts[first - 1]
        changed = lines[: start_node - offset] + text.encode() + lines[end_node - offset :]
        mutant = Mutant(file, first, last, start_node, end_node, text, _short(lines), _short(changed))
        if mutant.old != mutant.new and _compiles(mutant.applied(source)):
            found.setdefault(mutant.identity, mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.start))


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _short(lines: bytes) -> str:
    return " ".join(lines.decode().split())


_Change = tuple[ast.expr | ast.stmt, tuple[int, int], str]


def _changes(tree: ast.Module, source: bytes, starts: list[int]) -> Iterator[_Change]:
    def span(node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, (ast.expr, ast.stmt, ast.keyword))
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        start, end = span(node)
        return source[start:end].decode()

    def between(whole: ast.expr, left: ast.expr, right: ast.expr, swaps: dict[str, str]) -> Iterator[_Change]:
        start, end = span(left)[1], span(right)[0]
        gap = source[start:end].decode()
        operator = re.sub(r"#.*", "", gap).strip("() \n\\")
        operator = " ".join(operator.split())
        if operator in swaps:
            at = start + gap.index(operator.split()[0])
            yield whole, (at, at + len(operator)), swaps[operator]

    for node in _visited(tree):
        match node:
            case ast.Compare(left=left, comparators=comparators):
                for one, other in itertools.pairwise([left, *comparators]):
                    yield from between(node, one, other, COMPARISONS)
            case ast.BinOp(left=left, right=right):
                yield from between(node, left, right, ARITHMETIC)
            case ast.BoolOp(values=values):
                for one, other in itertools.pairwise(values):
                    yield from between(node, one, other, {"and": "or", "or": "and"})
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield node, span(node), f"({text(operand)})"
            case ast.Constant(value=bool(value)):
                yield node, span(node), str(not value)
            case ast.Constant(value=int(value)):
                yield node, span(node), str(value + 1)
            case ast.Constant(value=float(value)):
                yield node, span(node), str(value * 2 or 1.0)
            case ast.Attribute(attr=name) if name in NAMES:
                end = span(node)[1]
                yield node, (end - len(name), end), NAMES[name]
            case ast.Call(func=ast.Name(id=name) as function) if name in BUILTINS:
                yield node, span(function), NAMES[name]
            case ast.AugAssign():
                yield node, span(node), "pass"
            case ast.Expr(value=ast.Call() | ast.Yield()) if not _speaks(node.value):
                yield node, span(node), "pass"
            case ast.Raise(exc=exc) if exc is not None:
                yield node, span(node), "pass"
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield node, span(value), "None"
            case ast.Continue() | ast.Break():
                yield node, span(node), "pass"
        if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not _is_negated_otherwise(node.test):
            yield node.test, span(node.test), f"(not ({text(node.test)}))"
        if isinstance(node, ast.Call):
            arguments = [*node.args, *node.keywords]
            for keyword in node.keywords:
                if keyword.arg is None or keyword.arg in IDLE_KEYWORDS:
                    continue
                start, end = span(keyword)
                at = arguments.index(keyword)
                if at:
                    start = span(arguments[at - 1])[1]
                elif len(arguments) > 1:
                    end = span(arguments[1])[0]
                yield node, (start, end), ""


def _visited(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes whose change is a bug, without messages, annotations and decorators."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.JoinedStr, ast.Assert)) or (isinstance(node, ast.Expr) and _speaks(node.value)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, ast.Raise):
            continue
        if isinstance(node, ast.keyword) and node.arg in IDLE_KEYWORDS:
            continue
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            children = value if isinstance(value, list) else [value]
            waiting += [child for child in children if isinstance(child, ast.AST)]


def _is_negated_otherwise(test: ast.expr) -> bool:
    """Return whether another mutant already negates this test."""
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn))
    return isinstance(test, ast.UnaryOp)


def _speaks(value: ast.expr) -> bool:
    """Return whether an expression is only a message: a docstring, a log line, a warning."""
    if isinstance(value, ast.Constant):
        return True
    called = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    return bool(re.match(r"(logger|log|logging|warnings)\.|print$", called))
