"""The tool that the model may call: sums with + - * / ( ), and 'text'.count('x').

An expression passes three gates: a length, a regular expression that lets through numbers, quoted text,
the operators and `.count` and nothing else, and a limit on nesting. Only then does Python's own parser
build a syntax tree, and the walk over that tree computes the value. Nothing is ever evaluated by Python
itself, there are no names to reach, and no signal or timer is involved, so it works in any thread.

The choice that would surprise: the value is always Python's, but a whole number prints without its
`.0` (8/2 prints 4, 0.5*4 prints 2), because a small model has enough to learn without two spellings of
four. Backslashes, underscores in numbers, and line breaks are not part of the language.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_CHARS = 200  # of the expression; bounds the strings in it and the work of the parser as well
MAX_NESTING = 20  # open brackets
MAX_DIGITS = 50  # of any whole number on the way; fractions are bounded by the float format

Number = int | float

QUOTED = r"""'[^'\\\x00-\x1f]*'|"[^"\\\x00-\x1f]*\""""
NUMBER = r"(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
ALLOWED = re.compile(rf"(?:{QUOTED}|{NUMBER}|\.count\b|[-+*/() ])++")
OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SIGNS: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class NotAllowedError(Exception):
    """The expression is outside the language; never leaves this file."""


def calculate(expression: str) -> str | None:
    """What the tool prints for `expression`, or None where it is not allowed or has no finite value.

    Never raises. `calculate("12 * (3 + 4)")` is `"84"`; `calculate("'banana'.count('a')")` is `"3"`.
    """
    text = expression[: MAX_CHARS + 1].strip(" ")
    if len(expression) > MAX_CHARS or not ALLOWED.fullmatch(text) or not _brackets_fit(text):
        return None
    try:
        return _print(_value(ast.parse(text, mode="eval").body))
    # ValueError: lone surrogates. RecursionError, MemoryError: the parser, called from a deep stack.
    except (NotAllowedError, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _brackets_fit(text: str) -> bool:
    """True where brackets close and nest no deeper than allowed.

    Checked before parsing: CPython's parser is slow on many unclosed brackets.
    """
    depth = 0
    for char in re.sub(QUOTED, "", text):
        depth += (char == "(") - (char == ")")
        if not 0 <= depth <= MAX_NESTING:
            return False
    return depth == 0


def _value(node: ast.expr) -> Number:
    """The number that `node` stands for; raises NotAllowedError for what is not in the language."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in SIGNS:
            return SIGNS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise NotAllowedError


def _bounded(number: Number) -> Number:
    """`number` itself; raises NotAllowedError for too many digits, infinity and not-a-number."""
    if isinstance(number, int) and abs(number) < 10**MAX_DIGITS:
        return number
    if isinstance(number, float) and math.isfinite(number):
        return number
    raise NotAllowedError


def _print(number: Number) -> str:
    """Python's spelling, without the `.0` of whole numbers that a float holds exactly."""
    if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
        return str(int(number))
    return str(number)
