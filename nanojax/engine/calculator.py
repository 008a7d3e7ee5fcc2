"""The calculator that a model may call: arithmetic, and how often a letter is in a word. It never runs code.

An expression is parsed by Python's own parser and its tree is walked; what is not in the tables below is refused. The text is
short, and so are its numbers: no expression takes longer than some hundred microseconds, in any thread.
"""

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable

CHARACTERS = 200  # of an expression
BITS = 256  # of an integer on the way; a result is at most 40 characters
RESULT = 40  # characters
DIGITS = 12  # of a fraction: 0.1+0.2 is 0.3

_BINARY: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# A comma between groups of three digits, outside of which commas mean something else.
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")


class _Refused(Exception):
    pass


def calculate(expression: str) -> str | None:
    """The result as text, or None where the expression is none that the calculator knows. Never raises.

    Whole numbers are written as such (10/5 is 2), others with up to 12 significant digits. `1,000*3` is 3000.
    """
    if not isinstance(expression, str) or len(expression) > CHARACTERS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), expression)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's parser warns of "1is"
            tree = ast.parse(expression.strip(), mode="eval")
        return _written(_value(tree.body))
    except (_Refused, ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call):
        return _count(node)
    raise _Refused


def _bounded(value: int | float) -> int | float:
    if isinstance(value, int) and value.bit_length() > BITS:
        raise _Refused
    return value


def _power(left: int | float, right: int | float) -> int | float:
    """left ** right, refused before it is computed if the result has more than BITS bits."""
    if abs(right) > BITS or (left != 0 and abs(right) * abs(math.log2(abs(left))) > BITS):
        raise _Refused
    value = left**right
    if isinstance(value, complex):
        raise _Refused
    return _bounded(value)


def _count(call: ast.Call) -> int:
    """'text'.count('part'), both literals."""
    method = call.func
    if not isinstance(method, ast.Attribute) or method.attr != "count" or len(call.args) != 1 or call.keywords:
        raise _Refused
    text, part = method.value, call.args[0]
    if not isinstance(text, ast.Constant) or not isinstance(part, ast.Constant):
        raise _Refused
    if not isinstance(text.value, str) or not isinstance(part.value, str):
        raise _Refused
    return text.value.count(part.value)


def _written(value: int | float) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _Refused
        value = value if value.is_integer() else float(f"{value:.{DIGITS}g}")
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    text = str(value)
    if len(text) > RESULT:
        raise _Refused
    return text
