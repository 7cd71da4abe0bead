"""The calculator: right where Python's arithmetic is, refuses everything else, fast, in any thread.

The oracle is Python itself: `eval`, without names, of expressions that these tests make up.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat.calculator import MAX_DIGITS, calculate

NUM_MADE_UP = 20_000
HOSTILE = [
    "", "()", "9**9**9", "9**9", "7//2", "7%2", "1<<9999", "True", "None", "1j", "1e999",
    "1e308*10", "1e308*10-1e308*10", "1/0", "0/0", "9" * (MAX_DIGITS + 1),
    "1_000", "1,000", "1 2", "1 if 2 else 3", "1if 2else 3", "1\n+1", "1\x00", "\ufeff1", "１+１",
    "(" * 21 + "1" + ")" * 21, "(" * 199, "((((((((((1", ")(", "1" + "+1" * 100, "-" * 200 + "1",
    "1()", "1(2)", "(1).count('1')", "'a'", "'a'*9", "'a'+'b'", "'a'.upper()", "'a'.count",
    "'a'.count()", "'a'.count('a','a')", "'a'.count(*'a')", "'a'.count(1)", "'a'.count(x='a')",
    "'a'.count('a').real", "'a'.__class__", "'a'.count.__globals__", "b'a'.count(b'a')",
    "f'{1}'.count('1')", "'\\d'.count('d')", "'\ud800'.count('a')", "'a'.count('a",
    "__import__('os').system('true')", "().__class__.__bases__", "[x for x in 'abc']", "lambda: 1",
    "x", "print(1)", "#", "1#",
]  # fmt: skip


def test_prints_what_is_right_and_refuses_the_rest() -> None:
    printed = {
        "2+2": "4", " 12 * (3 + 4) ": "84", "8/2": "4", "0.5*4": "2", "7/2": "3.5",
        "1/3": "0.3333333333333333", "-3--4": "1", "1e20": "1e+20", "1" + "+1" * 99: "100",
        "9" * MAX_DIGITS: "9" * MAX_DIGITS, "(" * 20 + "1" + ")" * 20: "1",
        "'banana'.count('a')": "3", "'straw' 'berry'.count('r') * 2": "6",
        '"it\'s".count("\'")': "1", "'((('.count('(')": "3", "'日本日'.count('日')": "2",
    }  # fmt: skip
    assert {expression: calculate(expression) for expression in printed} == printed
    assert not [expression for expression in HOSTILE if calculate(expression) is not None]


def sum_of(random_: random.Random, depth: int) -> str:
    """A well-formed expression, at most `depth` operators deep."""
    if depth == 0 or random_.random() < 0.3:
        whole = random_.randint(0, 10 ** random_.randint(1, 6))
        return random_.choice([f"{whole}", f"{whole / 100}", f"'{whole}'.count('1')"])
    left, right = sum_of(random_, depth - 1), sum_of(random_, depth - 1)
    text = f"{left}{random_.choice(['+', ' - ', '*', '/'])}{right}"
    return random_.choice([text, f"({text})", f"-({text})"])


def noise(random_: random.Random) -> str:
    """Anything at all, much of it out of the alphabet of sums."""
    alphabet = random_.choice(
        ["0123456789+-*/(). ", "(()))'\".count1e", "\x00\n\\\ud800日f'{}_[]:=,#x1("]
    )
    return "".join(random_.choices(alphabet, k=random_.randint(0, 220)))


def mutated(random_: random.Random) -> str:
    """A sum or a hostile expression with a few characters changed."""
    text = list(random_.choice([sum_of(random_, 4), random_.choice(HOSTILE)]))
    for _ in range(random_.randint(1, 3)):
        text.insert(random_.randint(0, len(text)), random_.choice("()'*/.e19 \\_"))
    return "".join(text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of the oracle's own parsing
def test_many_expressions_against_python() -> None:
    random_ = random.Random(20)
    num_right = 0
    for i in range(NUM_MADE_UP):
        text = [lambda r: sum_of(r, 3), noise, mutated][i % 3](random_)
        for _ in range(5):  # a collection of garbage may fall in one
            begin = time.thread_time()
            result = calculate(text)
            if time.thread_time() - begin < 0.010:
                break
        else:
            pytest.fail(f"{text!r} is slow each time")
        if result is not None:
            value = eval(text.strip(), {"__builtins__": {}})
            assert float(result) == float(value), text
            whole = value == int(value) and abs(value) < 2**53
            assert result == str(int(value) if whole else value)
            num_right += 1
        elif i % 3 == 0:  # well-formed: only length and division by zero may refuse it
            refused = len(text) > 200
            try:
                refused |= eval(text, {"__builtins__": {}}) is None
            except ZeroDivisionError:
                refused = True
            assert refused, text
    assert num_right > NUM_MADE_UP / 4


def test_any_thread() -> None:
    with ThreadPoolExecutor(100) as pool:
        results = list(pool.map(calculate, [f"{i}*{i}" for i in range(1000)]))
    assert results == [str(i * i) for i in range(1000)]


def test_from_a_deep_stack() -> None:
    """Close to the recursion limit the parser fails, and the calculator says None instead."""

    def dive() -> set[str | None]:
        answer = {calculate("(1+(2+(3+4)))")}
        try:
            return answer | dive()
        except RecursionError:
            return answer

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(dive).result() <= {"10", None}
