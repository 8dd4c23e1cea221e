r"""Read a LaTeX expression without evaluating anything, and decide whether two expressions are equal.

`parse` is a small recursive-descent parser (numbers, variables, + - * / ^ !, \frac, \sqrt, \binom, the elementary
functions). `rational` evaluates a parsed expression exactly if it is rational; its cost is bounded, so it may run
anywhere. `trees_equal` and `proportional` need arithmetic at 50 and 200 digits and, for what the parser does not
read (integrals, sums, matrices, sets), math-verify and sympy: run them only in a process that can be killed.

Equality of expressions is decided at random points: if the difference of two expressions is zero, it shrinks by a
factor of 10^150 when the precision grows from 50 to 200 digits; if it is not zero, it stays. So neither rounding nor
cancellation makes two different values equal (e^{\pi\sqrt{163}} is not an integer).
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import comb, factorial, isqrt
from typing import Any

MAX_BITS = 20_000  # of an exact intermediate result
MAX_DEPTH = 60
MAX_TOKENS = 300  # a chain of factors is a tree as deep as the chain is long, and the tree is walked recursively

Node = tuple[Any, ...]  # ("num", Fraction) | ("sym", name) | (operator, Node, ...)


class NotReadable(Exception):
    """The parser does not know this notation (which says nothing about its value)."""


class TooBig(Exception):
    """Evaluating would take too long or too much memory."""


_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(\\[a-zA-Z]+|\\[{}|]|[a-zA-Z+\-*/^_()\[\]{}|!'°]))")
_FUNCTIONS = {
    f"\\{name}": name
    for name in "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp cis".split()  # noqa: SIM905
}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_GREEK = frozenset(
    "\\" + name
    for name in re.findall(
        r"\w+",
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
        "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar",
    )
)
_OPENERS = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_PRODUCT = frozenset(["*", "\\cdot", "\\times"])
_ENDS = frozenset(["+", "-", "*", "/", "\\cdot", "\\times", "\\div", ")", "]", "}", "|", "\\rfloor", "\\rceil"])
_PLAIN_FUNCTION = re.compile(
    r"(?<![a-zA-Z\\])(sqrt|arcsin|arccos|arctan|sinh?|cosh?|tanh?|cot|sec|csc|cis|ln|log|exp|pi)(?![a-zA-Z])"
)
_BARS = re.compile(r"\\(?:[lr]?vert|mid)(?![a-zA-Z])")


class _Parser:
    def __init__(self, text: str):
        text = _BARS.sub("|", _PLAIN_FUNCTION.sub(r"\\\1", text)).replace("**", "^")
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        self.tokens: list[str] = []
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise NotReadable(text[position : position + 20])
            self.tokens.append(match[1] or match[2])
            position = match.end()
            if len(self.tokens) > MAX_TOKENS:
                raise TooBig(text[:20])
        self.i = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise NotReadable(f"{token!r} instead of {expected!r}")
        self.i += 1
        return token

    def expression(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotReadable("nested too deeply")
        total = self.product()
        while self.peek() in ("+", "-"):
            operator = self.take()
            right = self.product()
            total = ("add", total, right if operator == "+" else ("neg", right))
        self.depth -= 1
        return total

    def product(self) -> Node:
        left = self.signed()
        while True:
            token = self.peek()
            if token in _PRODUCT:
                self.take()
                left = ("mul", left, self.signed())
            elif token in ("/", "\\div"):
                self.take()
                left = ("div", left, self.signed())
            else:
                return left

    def signed(self) -> Node:
        if self.peek() in ("+", "-"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise NotReadable("nested too deeply")
            operator, value = self.take(), self.signed()
            self.depth -= 1
            return ("neg", value) if operator == "-" else value
        return self.juxtaposed(stop_at_function=False)

    def juxtaposed(self, stop_at_function: bool) -> Node:
        """Factors written next to each other: 2x, 3\\sqrt{2}, and the mixed number 1\\frac{1}{2}."""
        left = self.power()
        literal = self.tokens[self.i - 1].isdigit() and left[0] == "num"
        while (token := self.peek()) and token not in _ENDS and not (stop_at_function and token in _FUNCTIONS):
            start = self.i
            right = self.power()
            if right[0] == "num" and token[0].isdigit():
                raise NotReadable("two numbers in a row")
            value = rational(right) if token == "\\frac" and literal and right[0] == "div" else None
            if value is not None and self.i == start + 7 and 0 < value < 1:
                left = ("add", left, right)
            else:
                left = ("mul", left, right)
            literal = False
        return left

    def power(self) -> Node:
        base = self.postfix(self.atom())
        if self.peek() == "^":
            self.take()
            if self.peek() in ("+", "-"):
                sign, exponent = self.take(), self.postfix(self.atom())
                exponent = ("neg", exponent) if sign == "-" else exponent
            else:
                exponent = self.postfix(self.atom())
            base = self.postfix(("pow", base, exponent))
            if self.peek() == "^":
                raise NotReadable("double superscript")
        return base

    def postfix(self, value: Node) -> Node:
        while self.peek() in ("!", "°", "'", "_"):
            token = self.take()
            if token == "!":
                value = ("fact", value)
            elif token == "°":
                value = ("mul", value, ("div", ("pi",), ("num", Fraction(180))))
            elif value[0] != "sym":
                raise NotReadable("a mark on something that is no variable")
            elif token == "'":
                value = ("sym", value[1] + "'")
                if self.peek() == "(":
                    value = self.applied(value[1])
            else:
                value = ("sym", f"{value[1]}_{self.subscript()}")
        return value

    def subscript(self) -> str:
        if self.peek() != "{":
            return self.take()
        start = self.i
        while self.take() != "}":
            if self.peek() == "{":
                raise NotReadable("nested subscript")
        return "".join(self.tokens[start + 1 : self.i - 1])

    def group(self) -> Node:
        """An argument: {...} or one token."""
        if self.peek() == "{":
            self.take()
            value = self.expression()
            self.take("}")
            return value
        token = self.peek()
        if len(token) > 1 and token.isdigit():  # \frac12 is one half
            self.tokens[self.i : self.i + 1] = list(token)
        return self.atom()

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotReadable("nested too deeply")
        value = self.bare_atom()
        self.depth -= 1
        return value

    def bare_atom(self) -> Node:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            if token.endswith(".") and self.peek():
                raise NotReadable("a point in the middle")  # 0.(3) is no product
            if len(token) > 1_000:
                raise TooBig(token[:20])
            return ("num", Fraction(token + "0" if token.endswith(".") else token))
        if token in _OPENERS:
            value = self.expression()
            self.take(_OPENERS[token])
            return {"|": ("abs", value), "\\lfloor": ("floor", value), "\\lceil": ("ceil", value)}.get(token, value)
        if token == "\\frac":
            return ("div", self.group(), self.group())
        if token == "\\binom":
            return ("binom", self.group(), self.group())
        if token == "\\sqrt":
            return self.root()
        if token in _FUNCTIONS:
            return self.function(_FUNCTIONS[token])
        if token == "\\pi" or token in ("e", "i"):
            return (token.strip("\\"),)
        if token.isalpha() and self.peek() == "(":
            if token in "fghFGHPQOo" or self.tokens[self.i + 1 : self.i + 2] == ["0"]:
                return self.applied(token)
        if token in _GREEK or (len(token) == 1 and token.isalpha()):
            return ("sym", token)
        raise NotReadable(token)

    def applied(self, name: str) -> Node:
        """f(x) or f'(0): an unknown of its own, compared as written."""
        start, depth = self.i, 0
        while True:
            depth += {"(": 1, ")": -1}.get(self.take(), 0)
            if depth == 0:
                return ("sym", name + "".join(self.tokens[start : self.i]))

    def root(self) -> Node:
        if self.peek() != "[":
            return ("root", self.group(), ("num", Fraction(2)))
        self.take()
        degree = self.expression()
        self.take("]")
        return ("root", self.group(), degree)

    def function(self, name: str) -> Node:
        exponent: Node | None = None
        base: Node = ("num", Fraction(10))
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                sign = self.take() if self.peek() == "-" else ""
                exponent = self.group() if not sign else ("neg", self.group())
            elif name == "log":
                base = self.group()
            else:
                raise NotReadable("subscript of a function")
        if exponent in (("neg", ("num", Fraction(1))), ("num", Fraction(-1))):
            if name not in _INVERSE:
                raise NotReadable("inverse of a function")
            name, exponent = _INVERSE[name], None
        bracketed = self.peek() in ("(", "{", "[", "|")
        argument = self.atom() if bracketed else self.juxtaposed(stop_at_function=True)
        value: Node = (name, argument, base) if name == "log" else (name, argument)
        return ("pow", value, exponent) if exponent is not None else value


def parse(text: str) -> Node:
    """Parse one expression completely, or raise NotReadable."""
    parser = _Parser(text)
    node = parser.expression()
    if parser.peek():
        raise NotReadable(parser.peek())
    return node


def symbols(node: Node) -> set[str]:
    """Names of the variables in an expression."""
    if node[0] == "sym":
        return {node[1]}
    return set().union(*(symbols(child) for child in node[1:] if isinstance(child, tuple))) if len(node) > 1 else set()


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def rational(node: Node, max_bits: int = MAX_BITS) -> Fraction | None:
    """The exact value if it is rational and of bounded size, else None. Never expensive."""
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind in ("sym", "pi", "e", "i") or kind in _FUNCTIONS.values():
        return None
    values = [rational(child, max_bits) for child in node[1:]]
    if any(value is None or _bits(value) > max_bits for value in values):
        return None
    return _rational_operation(kind, values, max_bits)


def _rational_operation(kind: str, values: list[Any], max_bits: int) -> Fraction | None:
    a, b = values[0], values[1] if len(values) > 1 else None
    simple = {"add": lambda: a + b, "neg": lambda: -a, "mul": lambda: a * b, "abs": lambda: abs(a)}
    if kind in simple:
        return simple[kind]()
    if kind == "div":
        return a / b if b else None
    if kind == "pow":
        if b.denominator != 1 or abs(b) > max_bits or _bits(a) * abs(b) > max_bits or (a == 0 and b <= 0):
            return None
        return a ** int(b)
    if kind == "root":
        if b != 2 or a < 0:
            return None
        top, bottom = isqrt(a.numerator), isqrt(a.denominator)
        return Fraction(top, bottom) if top * top == a.numerator and bottom * bottom == a.denominator else None
    if kind in ("floor", "ceil"):
        return Fraction(a.numerator // a.denominator) if kind == "floor" else Fraction(-(-a.numerator // a.denominator))
    if kind == "fact":
        return Fraction(factorial(int(a))) if a.denominator == 1 and 0 <= a <= 1_000 else None
    if kind == "binom":
        whole = a.denominator == 1 and b.denominator == 1
        return Fraction(comb(int(a), int(b))) if whole and 0 <= a <= 2_000 and 0 <= b <= 2_000 else None
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Below: only in a process that can be killed
# ---------------------------------------------------------------------------------------------------------------------


def _evaluate(node: Node, point: dict[str, Fraction], mp: Any) -> Any:
    kind = node[0]
    if kind == "num":
        return mp.mpf(node[1].numerator) / node[1].denominator
    if kind == "sym":
        return mp.mpf(point[node[1]].numerator) / point[node[1]].denominator
    if kind in ("pi", "e"):
        return +getattr(mp, kind)
    if kind == "i":
        return mp.mpc(0, 1)
    args = [_evaluate(child, point, mp) for child in node[1:]]
    a = args[0]
    if kind == "add" and 600 < mp.prec < 800 and a and args[1] and abs(mp.mag(a) - mp.mag(args[1])) > mp.prec + 32:
        raise TooBig("a term that rounding would swallow")  # x + 10^{-250} is not x
    if kind in ("add", "mul", "div", "neg"):
        return a + args[1] if kind == "add" else a * args[1] if kind == "mul" else a / args[1] if kind == "div" else -a
    if kind in ("pow", "root"):
        return _power(a, args[1], kind == "root", mp)
    if kind in ("fact", "binom"):
        if any(abs(value) > 1e6 for value in args):
            raise TooBig(kind)
        return mp.factorial(a) if kind == "fact" else mp.binomial(a, args[1])
    if kind == "exp" and abs(a) > 1e8:
        raise TooBig("exp")
    if kind in ("log", "lg"):
        return mp.log(a) / mp.log(args[1] if kind == "log" else 10)
    if kind in ("sin", "cos", "tan", "cot", "sec", "csc", "cis") and abs(a) > 1e30:
        raise TooBig(kind)
    if kind == "cis":
        return mp.cos(a) + mp.mpc(0, 1) * mp.sin(a)
    names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "fabs"}
    if kind == "abs":
        return abs(a)
    return getattr(mp, names.get(kind, kind))(a)


def _power(base: Any, exponent: Any, root: bool, mp: Any) -> Any:
    if root:
        if exponent == 3 and mp.im(base) == 0 and mp.re(base) < 0:
            return -mp.cbrt(-base)  # the real cube root
        exponent = 1 / exponent
    if base == 0 and exponent == 0:
        raise ValueError("0^0")
    if base == 0:
        return mp.mpf(1) / base if mp.re(exponent) < 0 else base
    if abs(exponent) > 1e12 or abs(exponent * mp.log(abs(base) + 2)) > 1e9:
        raise TooBig("power")
    return mp.power(base, exponent)


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def _points(names: list[str], steps: bool = False) -> list[dict[str, Fraction]]:
    """Fixed generic points: in (0, 1), above 1, mixed, then with negative values; many and wide for step functions."""
    points = []
    for trial in range((40 if steps else 6) if names else 1):
        point = {}
        for k, name in enumerate(names):
            prime = _PRIMES[k]
            unit = Fraction((isqrt(prime * 10**24) * (trial + 3)) % 10**12, 10**12)  # fractional part of a surd
            value = (
                unit
                + Fraction(1, 97)
                + ((0, 1, 3 * (k % 2), 0, 2, 1)[trial] if trial < 6 else (trial - 5) * (k + 3) * 2)
            )
            point[name] = -value if trial >= 3 and (k + trial) % 2 else value
        points.append(point)
    return points


def _vanishes(gold: Any, answer: Any) -> bool:
    """Whether gold - answer, given at 50 and 200 digits, is zero."""
    rough, fine = abs(gold[0] - answer[0]), abs(gold[1] - answer[1])
    floor = min(max(abs(gold[1]), abs(answer[1])), 1) * 1e-50  # where the rough values agree by luck
    return fine == 0 or fine < max(rough, floor) * 1e-60


def _sample(node: Node, point: dict[str, Fraction]) -> tuple[Any, Any] | None:
    """The value at two precisions: 50 and 200 digits, more where it is large, so that 10^{300} + 1 is not 10^{300}."""
    from mpmath import mp

    values: list[Any] = []
    digits = 50
    while len(values) < 2:
        with mp.workdps(digits):
            try:
                value = _evaluate(node, point, mp)
            except (ZeroDivisionError, ValueError, OverflowError):
                return None
            if not mp.isfinite(value):
                return None
            size = int(mp.mag(value) * 0.302) if value else 0
        if size > 5_000:
            raise TooBig("value")
        if size > digits - 40 and not values:
            digits = size + 50  # 50 digits behind the point
            continue
        values.append(value)
        digits += 150
    return values[0], values[1]


def trees_equal(gold: Node, answer: Node, quantum: Fraction | None = None) -> bool | None:
    """Whether two parsed expressions are the same function; None where no point decides. `quantum`: round."""
    from mpmath import mp

    names = sorted(symbols(gold) | symbols(answer))
    if len(names) > len(_PRIMES):
        return None
    agreed = 0
    for point in _points(names, steps=_has(gold, "floor", "ceil") or _has(answer, "floor", "ceil")):
        pair = _sample(gold, point), _sample(answer, point)
        if pair[1] is None and not names:
            return False  # 1/0, 0^0
        if pair[0] is None or pair[1] is None:
            continue
        with mp.workdps(5_400):
            real = [abs(mp.im(value[1])) <= abs(value[1]) * mp.mpf(10) ** -150 for value in pair]
            if quantum is not None and not names:
                value = mp.re(pair[1][1]) * quantum.denominator / quantum.numerator
                target = mp.re(pair[0][1]) * quantum.denominator / quantum.numerator
                return real[1] and mp.sign(value) * mp.floor(abs(value) + 0.5) == mp.nint(target)
            if _vanishes(*pair):
                agreed += 1
            elif real[0] and not real[1] and _has(gold, "abs") and not _has(answer, "abs"):
                return False  # \\ln x is not \\ln|x|
            elif all(real) or not names or _has(gold, "i") or _has(answer, "i"):
                return False  # off the real line branch cuts differ: log(ab) = log a + log b is not held against anyone
    return True if agreed >= (2 if names else 1) else None


def _has(node: Node, *kinds: str) -> bool:
    return node[0] in kinds or any(_has(child, *kinds) for child in node[1:] if isinstance(child, tuple))


def proportional(gold: Node, answer: Node) -> bool:
    """Whether gold = c * answer with a constant c that is not zero (two equations `gold = 0` and `answer = 0`)."""
    from mpmath import mp

    names = sorted(symbols(gold))
    if set(names) != symbols(answer) or not names or len(names) > len(_PRIMES):
        return False
    ratios = []
    for point in _points(names):
        pair = _sample(gold, point), _sample(answer, point)
        if pair[0] is None or pair[1] is None or pair[1][1] == 0:
            continue
        with mp.workdps(200):
            ratios.append((pair[0][0] / pair[1][0], pair[0][1] / pair[1][1]))
    return len(ratios) >= 3 and ratios[0][1] != 0 and all(_vanishes(ratios[0], ratio) for ratio in ratios[1:])


def math_verify_equal(gold: str, answer: str) -> bool | None:
    """math-verify's verdict on what `parse` does not read; None if the gold cannot be read."""
    from math_verify.grader import sympy_expr_eq
    from sympy import Basic, MatrixBase, nan, oo, zoo

    sides = []
    for text in (gold, answer):
        if _COSTLY.search(text):
            return None if text is gold else False
        try:
            expr = _read_latex(text)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # noqa: BLE001  (whatever the parser raises, it did not read this)
            return None if text is gold else False
        if not isinstance(expr, (Basic, MatrixBase)) or expr.has(nan, zoo):
            return None if text is gold else False
        sides.append(expr)
    if sides[0].has(oo) != sides[1].has(oo):
        return False
    if {str(s) for s in sides[0].free_symbols} != {str(s) for s in sides[1].free_symbols}:
        return False  # a term that was read away
    try:
        return bool(sympy_expr_eq(*sides, float_rounding=12, numeric_precision=30, strict=True))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001  (sympy could not relate the two: not shown equal)
        return False


# What makes sympy compute for long: powers and sums with bounds of four digits, large factorials, e^{e^{e^x}}.
_COSTLY = re.compile(
    r"\^ ?\{? ?[-+]? ?\d{4}|\d{4} ?[)}]? ?!|\d{40}|\d[eE][-+]?\d{4}|(?:\^ ?\{[^{}]*){4}|\^ ?\d+ ?\^ ?\d"
)
# Notation that math-verify's parser accepts and gets wrong: gcd(n, p - 1) is not 1, f' is not f.
_MISREAD = re.compile(
    r"\d\s+\d|[\d)]\s*_|\.\(|'|:|\\approx|\\sim|\\pmod|\\bmod|\\equiv|\\text|\\gcd|\\lcm|\{lcm\}|\\#|\\&|\?|\\ldots|\\cdots|\\dots|~"
)


def _read_latex(text: str) -> Any:
    """LaTeX to sympy through math-verify's parser, without its unit stripping and set joining."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

    if _MISREAD.search(text):
        raise NotReadable(text[:40])
    text = re.sub(r"(?<=\d)\s*\(", r"\\cdot (", text)  # it reads 42(43) as 42 + 43
    text = re.sub(r"(?<![\d.])(\d+)\.(\d+)(?![\d.])", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", text)
    text = text.replace("°", "\\cdot\\frac{\\pi}{180}")
    latex = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = ConversionConfig(lowercase_symbols=False)
    return latex2sympy(
        normalize_latex(text, latex),
        is_real=True,
        convert_degrees=False,
        normalization_config=None,
        conversion_config=config,
    )
