"""Checks, found in a module's syntax tree, and the module rewritten so that each can be taken out.

A check is an ``if`` in a function one side of which refuses: it raises, faults, or returns or goes
on without having done anything; each operand of ``and``, ``or`` and chained comparisons in its
condition is one, too; and so are the operands of what a ``bool`` function returns. ``assert`` is
none: it states what is so already.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

SWITCH = "hvhost.check_switch"
#: What the switch is called in a rewritten module, which may have a ``_check`` of its own.
SEE = "_see_check_switch"
_REFUSING_CALL = re.compile(r"fault|refus|reject|drop|fail|complain|warn|error|ignore")
_REFUSING_VALUE = re.compile(
    r"invalid|fail|refus|reject|error|status|absent|nobody|mismatch|denied|check_condition",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: *part* is what is taken out of *condition*, by being always *neutral*."""

    file: str  # below src/hvhost
    function: str
    line: int
    condition: str
    part: str
    neutral: bool
    twin: int = 0  # of those that are alike in one function

    @property
    def key(self) -> str:
        """Names it, as long as its text does not change."""
        return "|".join((self.file, self.function, self.condition, self.part, str(self.twin)))

    def __str__(self) -> str:
        if self.part == self.condition:
            return f"{self.function}: {self.condition}"
        return f"{self.function}: {self.part}  in  {shorten(self.condition, 100)}"


def is_refusal(statements: Sequence[ast.stmt]) -> bool:
    """Whether a branch turns something away."""
    if not statements:
        return False
    last = statements[-1]
    if isinstance(last, ast.Raise | ast.Continue | ast.Break):
        return True
    if isinstance(last, ast.Return):
        value = last.value
        if value is None or isinstance(value, ast.JoinedStr):
            return True
        if isinstance(value, ast.Constant):
            return value.value is not True
        return bool(_REFUSING_VALUE.search(ast.unparse(value)))
    return any(
        isinstance(each, ast.Expr)
        and isinstance(each.value, ast.Call)
        and bool(_REFUSING_CALL.search(ast.unparse(each.value.func).rpartition(".")[2]))
        for each in statements
    )


class _Rewriter(ast.NodeTransformer):
    def __init__(self, file: str, first: int) -> None:
        self.file, self.first = file, first
        self.checks: list[Check] = []
        self._names: list[str] = []
        self._predicates: list[bool] = []
        self._twins: dict[str, int] = {}
        self._temporaries = 0

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        self._names.append(node.name)
        self._predicates.append(isinstance(node.returns, ast.Name) and node.returns.id == "bool")
        self.generic_visit(node)
        self._predicates.pop()
        self._names.pop()
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        is_elif = len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
        if self._predicates:
            if is_refusal(node.body):
                node.test = self._condition(node.test, neutral=False)
            elif not is_elif and is_refusal(node.orelse):
                node.test = self._condition(node.test, neutral=True)
        self.generic_visit(node)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is not None and self._predicates and self._predicates[-1]:
            node.value = self._parts(node.value, ast.unparse(node.value))
        return node

    def _condition(self, test: ast.expr, *, neutral: bool) -> ast.expr:
        text = ast.unparse(test)
        return self._switched(test, text, text, neutral)

    def _switched(self, node: ast.expr, condition: str, part: str, neutral: bool) -> ast.expr:
        check = Check(self.file, ".".join(self._names), node.lineno, condition, part, neutral)
        twin = self._twins[check.key] = self._twins.get(check.key, -1) + 1
        check = Check(self.file, ".".join(self._names), node.lineno, condition, part, neutral, twin)
        number = self.first + len(self.checks)
        self.checks.append(check)
        arguments = [ast.Constant(number), ast.Constant(neutral), self._parts(node, condition)]
        return ast.Call(ast.Name(SEE, ast.Load()), arguments, [])

    def _parts(self, node: ast.expr, condition: str) -> ast.expr:
        """*node* with its operands made into checks."""
        if isinstance(node, ast.BoolOp):
            neutral = isinstance(node.op, ast.And)
            node.values = [
                self._switched(each, condition, ast.unparse(each), neutral) for each in node.values
            ]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self._parts(node.operand, condition)
        elif isinstance(node, ast.Compare) and len(node.ops) > 1:
            return self._parts_of_chain(node, condition)
        return node

    def _parts_of_chain(self, node: ast.Compare, condition: str) -> ast.expr:
        """``a < b < c`` as ``a < (t := b) and t < c``."""
        values: list[ast.expr] = []
        left, left_text = node.left, node.left
        for number, (operator, right) in enumerate(zip(node.ops, node.comparators, strict=True)):
            text = ast.unparse(ast.Compare(left_text, [operator], [right]))
            following, kept = right, right
            if number < len(node.ops) - 1 and not isinstance(right, ast.Constant | ast.Name):
                self._temporaries += 1
                name = f"_chained_{self._temporaries}"
                kept = ast.NamedExpr(ast.Name(name, ast.Store()), right)
                following = ast.Name(name, ast.Load())
            compare = ast.copy_location(ast.Compare(left, [operator], [kept]), node)
            values.append(self._switched(compare, condition, text, True))
            left, left_text = following, right
        return ast.BoolOp(ast.And(), values)


def rewrite(source: str, file: str, first: int = 0) -> tuple[str, list[Check]]:
    """*source* with switches, and its checks; the number of the first is *first*."""
    tree = ast.parse(source)
    rewriter = _Rewriter(file, first)
    rewriter.visit(tree)
    position = 0
    for statement in tree.body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not is_text and not is_future:
            break
        position += 1
    tree.body.insert(position, ast.ImportFrom(SWITCH, [ast.alias("see", SEE)], 0))
    return ast.unparse(ast.fix_missing_locations(tree)), rewriter.checks
