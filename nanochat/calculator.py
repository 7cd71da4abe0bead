"""The calculator tool: sums with + - * / ( ), and 'text'.count('x').

An expression must pass three gates: a length limit, a regular expression that allows only numbers,
quoted text, the operators and `.count`, and a nesting limit. Python's parser then builds a syntax
tree, and a walk over it computes the value. Nothing is evaluated by Python and no names can be
reached; without signals or timers it works in any thread.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_CHARS = 200  # of the expression; also bounds its strings and the parser's work
MAX_NESTING = 20  # open brackets
MAX_DIGITS = 50  # of any intermediate integer; floats are bounded by their format

Number = int | float

QUOTED = r"""'[^'\\\x00-\x1f]*'|"[^"\\\x00-\x1f]*\""""
NUMBER = r"(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
ALLOWED = re.compile(rf"(?:{QUOTED}|{NUMBER}|\.count\b|[-+*/() ])++")
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str | None:
    """The tool's output for `expression`; None if it is not allowed or has no finite value.

    Never raises. `calculate("12 * (3 + 4)")` is "84"; `calculate("'banana'.count('a')")` is "3".
    Values are Python's, except that a whole number prints without `.0` (8/2 prints 4): a small
    model has enough to learn without two spellings of four.
    """
    text = expression[: MAX_CHARS + 1].strip(" ")
    if len(expression) > MAX_CHARS or not ALLOWED.fullmatch(text) or not _brackets_fit(text):
        return None
    try:
        number = _value(ast.parse(text, mode="eval").body)
    # RecursionError, MemoryError: the parser, called from a deep stack.
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
        return str(int(number))
    return str(number)


def _brackets_fit(text: str) -> bool:
    """True if brackets close and do not nest too deeply: CPython's parser is slow on many."""
    depth = 0
    for char in re.sub(QUOTED, "", text):
        depth += (char == "(") - (char == ")")
        if not 0 <= depth <= MAX_NESTING:
            return False
    return depth == 0


def _value(node: ast.expr) -> Number:
    """The number that `node` stands for; ValueError for anything outside the language."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError


def _bounded(number: Number) -> Number:
    """`number` itself; ValueError for too many digits, infinity and NaN."""
    if abs(number) < (math.inf if isinstance(number, float) else 10**MAX_DIGITS):
        return number
    raise ValueError
