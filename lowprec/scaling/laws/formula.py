"""A law written in the YAML file: an expression and its parameters.

    class: Formula
    options:
      expression: E + A / (N / 1e8) ** alpha + B / (D / 1e10) ** beta
      params:
        E: {low: 0, linear: true}
        A: {low: 0, high: 100, linear: true}
        B: {low: 0, high: 100, linear: true}
        alpha: {low: 0.02, high: 1.5, start: [0.2, 0.4, 0.8]}
        beta: {low: 0.02, high: 1.5, start: [0.2, 0.4, 0.8]}

Names in the expression that are no parameters are columns of the run table, all in natural units (nothing is pivoted:
divide by a round number as above, so that A is the loss at that size and is not tangled up with alpha). It may use
+ - * / **, numbers, parentheses, and exp, log, log2, sqrt, tanh. The expression is parsed and walked; nothing is
executed, so a file from elsewhere can do no harm.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": np.exp, "log": np.log, "log2": lambda x: np.log(x) / np.log(2.0), "sqrt": np.sqrt, "tanh": np.tanh,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b, ast.Pow: lambda a, b: a**b,
}  # fmt: skip
KEYS = ("low", "high", "start", "linear", "fixed")
LONGEST, DEEPEST = 2000, 200  # characters of an expression, and levels of its tree (of a sum, terms)


class Formula(ScalingLaw):
    """Options: `expression`, `params` ({name: {low, high, start, linear, fixed}}), `response` ("loss"), and
    `log_residuals` (true). `linear: true` promises that the response is linear in it."""

    pivots: Mapping[str, str] = {}

    def __init__(
        self,
        expression: str = "",
        params: "Mapping[str, Mapping[str, Any]] | None" = None,
        response: str = "loss",
        log_residuals: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not expression or not params:
            raise ValueError("law formula needs options.expression and options.params")
        self.formula, self.response, self.log_residuals = str(expression).strip(), response, bool(log_residuals)
        self.tree = _parse(self.formula)
        self.spec = tuple(_param(name, dict(keys or {})) for name, keys in params.items())
        called = {id(node.func) for node in ast.walk(self.tree) if isinstance(node, ast.Call)}
        used = sorted({n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name) and id(n) not in called})
        if idle := [p.name for p in self.spec if p.name not in used]:
            raise ValueError(f"parameter {idle[0]!r} of the formula does not occur in {self.formula!r}")
        known = {p.name for p in self.spec}
        self.needs = tuple(name for name in used if name not in known)

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return self.spec

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return _walk(self.tree, {**columns, **theta})


def _param(name: str, keys: dict[str, Any]) -> Param:
    if unknown := [key for key in keys if key not in KEYS]:
        raise ValueError(f"parameter {name!r} of the formula has no key {unknown[0]!r}; it has {', '.join(KEYS)}")
    linear, fixed = bool(keys.get("linear", False)), keys.get("fixed")
    start = keys.get("start", ())
    start = tuple(float(v) for v in (start if isinstance(start, list | tuple) else [start]))
    if not linear and fixed is None and not start:
        raise ValueError(f"parameter {name!r} of the formula needs `start`: values to begin from (or linear: true)")
    high = keys.get("high")
    if high is None and not (linear and name == "E"):
        high = 1e6
    return Param(name, float(keys.get("low", 0.0)), None if high is None else float(high), start, linear,
                 fixed=None if fixed is None else float(fixed))  # fmt: skip


def _parse(expression: str) -> ast.expr:
    """The tree of an expression that uses nothing but what `_walk` knows. ValueError says what is not allowed."""
    if len(expression) > LONGEST:
        raise ValueError(f"the formula has {len(expression)} characters; at most {LONGEST} are read")
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the formula {expression[:200]!r} cannot be parsed: {error}") from error
    level: list[ast.AST] = [tree]
    for _ in range(DEEPEST):
        for node in level:
            _check(node, expression)
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise ValueError(f"the formula is nested more than {DEEPEST} levels deep")
    return tree


def _check(node: ast.AST, expression: str) -> None:
    good = isinstance(node, (ast.Name, ast.expr_context, ast.UAdd, ast.USub, ast.BinOp, *OPERATORS))
    if isinstance(node, ast.UnaryOp):
        good = isinstance(node.op, ast.UAdd | ast.USub)
    if isinstance(node, ast.Constant):
        good = isinstance(node.value, int | float) and type(node.value) is not bool and abs(node.value) < 1e300
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        good = named and len(node.args) == 1 and not node.keywords
    if not good:
        part = ast.get_source_segment(expression, node) or type(node).__name__
        raise ValueError(
            f"{part[:80]!r} is not allowed in the formula {expression[:200]!r}; it may use + - * / **, numbers, names, "
            f"and {', '.join(FUNCTIONS)} of one argument"
        )


def _walk(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return np.float64(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ValueError(f"the formula uses {node.id!r}, which is neither a parameter nor a column")
        return names[node.id]
    if isinstance(node, ast.UnaryOp):
        return -_walk(node.operand, names) if isinstance(node.op, ast.USub) else _walk(node.operand, names)
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_walk(node.left, names), _walk(node.right, names))
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return FUNCTIONS[node.func.id](_walk(node.args[0], names))
