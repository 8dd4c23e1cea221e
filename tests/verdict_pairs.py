r"""Pairs of a gold and a response whose verdict is known by construction: near misses, and rewritings of right answers.

`pairs(golds, seed)` makes them from real golds (tests/test_verifier.py from a few, benchmarks/verdicts.py from all of
MATH, GSM8K, DeepMath and AIME). Each is (kind, gold, response, whether it should pay). What is made from a gold is
right or wrong whatever the question was; what cannot be known (is `0.33` right for 1/3?) follows the policy in
docs/verifier.md.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from fractions import Fraction

Pair = tuple[str, str, str, bool]

BAD_WORDS = [
    "fifths",
    "factorial",
    "millions",
    "thousands",
    "dozens",
    "squared",
    "cubed",
    "or six",
    "to six",
    "through six",
    "choose two",
    "root two",
    "times ten",
    "plus one",
    "minus one",
    "negative",
    "inverse",
    "impossible",
    "roughly",
    "approximately",
    "halves",
    "thirds",
    "quarters",
    "tenths",
    "hundredths",
    "sixteenths",
    "percent of it",
    "over two",
    "versus seven",
    "or more",
    "at most",
    "is wrong",
    "but not sure",
    "billion",
    "mod 7",
    "and a half",
]
GOOD_WORDS = [
    "cm",
    "ways",
    "apples",
    "square units",
    "red balls",
    "people",
    "dollars",
    "miles per hour",
    "cubic inches",
    "stuffed goats",
]
UNITS = [
    r"\text{ m}",
    r"\text{ m/s}",
    r"\text{ m/s}^2",
    r"\text{ s}",
    r"\text{ cm}^2",
    r"\text{ cm}^3",
    r"\text{ mol/L}",
    r"\text{ miles per hour}",
    r"\text{ miles per gallon}",
    r"\text{ people per day}",
    r"\text{ hours}",
]
TAKEN_BACK = [
    "Answer: {0}\n\nWait, no. The final answer is {1}.",
    "#### {0}\nOops.\n#### {1}",
    "Answer: {0}\n#### {1}",
    r"\boxed{{{0}}} is not right.{2}Answer: {1}",
    r"The final answer is {0}. No: \boxed{{{1}}}",
    r"<think>so \boxed{{{0}}}</think> \boxed{{{1}}}",
    r"<think> I guess \boxed{{{0}}}, or",
]
STATED = [
    "Answer: {0}",
    "**Answer:** ${0}$",
    "The final answer is {0}.",
    "#### {0}",
    r"So $\boxed{{{0}}}$.",
    "Final Answer: The final answer is ${0}$. I hope it is correct.",
    "Answer: {1}\nWrong.\n#### {0}",
    r"The final answer is {1}. Wait: $\boxed{{{0}}}$",
    "### Final Answer:\n\n\\[\n{0}\n\\]",
]


def box(answer: str) -> str:
    """Put an answer where the verifier looks for it."""
    return rf"So it is $\boxed{{{answer}}}$."


def pairs(golds: list[str], seed: int = 0, rounds: int = 60) -> Iterator[Pair]:
    """Every pair that can be made from the golds, then `rounds` times those of the kinds that few real golds have."""
    for index, gold in enumerate(golds):
        draw = random.Random(f"{seed} {index} {gold}")
        for kind, answer, pays in _from(gold.strip(), draw):
            yield kind, gold, answer if "boxed" in answer or kind.startswith("said") else box(answer), pays
    yield from _templates(random.Random(seed), rounds)


def _from(gold: str, draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    if re.fullmatch(r"-?\d{1,15}", gold):
        yield from _integer(int(gold), draw)
    elif re.fullmatch(r"-?\d*\.\d+", gold):
        yield from _decimal(gold, draw)
    elif match := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        yield from _fraction(Fraction(int(match[1] + match[2]), int(match[3])), draw)
    elif match := re.fullmatch(r"(?:\\left)?([\[(])([^()\[\]{}]*),([^()\[\]{},]*?)(?:\\right)?([\])])", gold):
        yield from _brackets(*match.groups(), draw)
    elif re.fullmatch(r"[^a-zA-Z,=<>()\[\]%:]*(?:\\(?:sqrt|frac|dfrac|pi)[^a-zA-Z,=<>()\[\]%:]*)+", gold):
        yield from _constant(gold, draw)
    elif re.fullmatch(r"[-+\d\s^{}()]*[xtnk][-+\d\sxtnk^{}()]*", gold) and not re.search(r"[({]\s*[)}]", gold):
        yield from _polynomial(gold, draw)
    elif re.fullmatch(r"-?\d+(?:, *-?\d+)+", gold) and not re.fullmatch(r"\d{1,3}(?:,\d{3})+", gold):
        yield from _list(re.split(", *", gold), draw)


def _integer(n: int, draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    other, commas = n + draw.choice((-10, -1, 1, 2, 100)), f"{n:,}"
    for wrong in (
        f"{other}",
        f"{n}.5",
        f"{-n or 1}",
        f"{n}1",
        f"{n}, {other}",
        rf"{n} \text{{ or }} {other}",
        f"{n}x+1",
        f"{other} = {n}",
        f"x = {n} = {other}",
        f"{n}_{{8}}",
        rf"{n}\%",
        f"x > {n}",
        rf"\pm {abs(n) or 1}",
        rf"\{{{n}, {other}\}}",
        f"({n}, {other})",
        f"({n}, {other}]",
        rf"\frac{{{n}}}{{2}} + 1/3",
        f"x^2 = {n}",
        rf"{n} \lor {other}",
        rf"{other}+0 \approx {n}",
        rf"\boxed{{{other}}}, \boxed{{{n}}}",
        rf"\boxed{{{n}}} and \boxed{{{other}}}",
    ):
        yield "integer, wrong", wrong, False
    for word in draw.sample(BAD_WORDS, 6):
        yield "words that change a number", rf"{n}\text{{ {word}}}", False
    if n > 2:
        yield "unicode root", f"√{n * n + 1}", False
        yield "unicode root", f"√{n * n}", True
        yield "unicode root", f"{n - 1}√{draw.randint(11, 15)}", False
    shown = rf"{n} \approx {n}.0" if n else "0"
    for right in (
        commas,
        commas.replace(",", "{,}"),
        commas.replace(",", r"\,"),
        f"x = {commas}",
        rf"N = \${commas}",
        rf"\text{{Total}} = {commas.replace(',', '{,}')}",
        f"{n}.00",
        rf"\text{{{n}}}",
        rf"\mathbf{{{n}}}",
        f"{n - 3} + 3 = {n}",
        f"x = {n - 5}+4+1 = {n}",
        rf"2 \cdot \frac{{{n}}}{{2}}",
        f"{n} = x",
        f"m+n = {n}",
        rf"\max f = {n}",
        shown,
        rf"\frac{{{2 * n}}}{{2}}",
        f"({n})",
        rf"\{{{n}\}}",
    ):
        yield "integer, rewritten", right, True
    for word in draw.sample(GOOD_WORDS, 3):
        yield "units and what is counted", rf"{n}\text{{ {word}}}", True
    for text in TAKEN_BACK:
        yield "said and taken back", text.format(n, other, " "), False
    for text in STATED:
        yield "said", text.format(n, other), True


def _decimal(gold: str, draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    value, step = Fraction(gold), Fraction(1, 10 ** (len(gold.partition(".")[2]) + 1))
    near = value + draw.choice((1, 2, 3, 4, -1, -2, -3, -4)) * step
    for wrong in (near, value + step / 10, -value or 1, value * 10, value + 10 * step):
        yield "near a decimal", f"{float(wrong):.12g}" if wrong is not near else f"{float(near):.15g}", False
    third = Fraction(round(value * 3) * 7 + 1, 21)
    if abs(third - value) < 1 and third != value:
        yield "near a decimal", rf"\frac{{{third.numerator}}}{{{third.denominator}}}", False
    for right in (
        gold + "0",
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
        f"x = {gold}",
        rf"\${gold}",
        rf"{gold}\text{{ cm}}",
    ):
        yield "decimal, rewritten", right, True


def _fraction(value: Fraction, draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    n, d = value.numerator, value.denominator
    if d == 1:
        return
    for wrong in (
        rf"\frac{{{n + 1}}}{{{d}}}",
        rf"\frac{{{n}}}{{{d + 1}}}",
        rf"-\frac{{{n}}}{{{d}}}",
        f"{n}",
        f"{n}:{d} + 1",
        rf"\frac{{{n}}}{{{d}}}\%",
        rf"\frac{{{n}}}{{{d}}}, {n}",
        f"{n}/{d}/2",
        rf"\frac{{{n}}}{{{d}}}x",
    ):
        yield "fraction, wrong", wrong, False
    if 10**8 % d:
        yield "a rounded decimal for a fraction", f"{float(value):.8f}", False
    for right in (
        f"{n}/{d}",
        rf"\dfrac{{{2 * n}}}{{{2 * d}}}",
        rf"p = \frac{{{n}}}{{{d}}}",
        rf"\frac{{{-n}}}{{{-d}}}",
        rf"\frac{{{n}}}{{{d}}} \approx {float(value):.9f}",
        rf"\frac{{{n * 7}}}{{{d * 7}}} = \frac{{{n}}}{{{d}}}",
        rf"1 - \frac{{{d - n}}}{{{d}}}",
    ):
        yield "fraction, rewritten", right, True
    if n > d:
        yield "fraction, rewritten", rf"{n // d}\frac{{{n % d}}}{{{d}}}", True


def _brackets(left: str, low: str, high: str, right: str, draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    if "," in low:
        low, *rest = low.split(",")
        rest = ",".join(rest)
        yield "tuple, wrong", f"{left}{low}, {high}{right}", False
        yield "tuple, wrong", f"{left}{low}+1,{rest},{high}{right}", False
        yield "tuple, rewritten", rf"\left{left} {low} , {rest} , {high} \right{right}", True
        return
    swap = {"(": "[", "[": "(", ")": "]", "]": ")"}
    for wrong in (
        f"{swap[left]}{low},{high}{right}",
        f"{left}{low},{high}{swap[right]}",
        f"{left}{low}+1,{high}{right}",
        f"{low},{high}",
        rf"{low} \text{{ and }} {high}",
        rf"x={low}\text{{ or }}x={high}",
        rf"\{{{low},{high}\}}",
        low,
        high,
        f"{left}{low},{high}{right} or {low}",
    ):
        yield "interval or pair, wrong", wrong, False
    for answer in (rf"\left{left}{low}, {high}\right{right}", f"{left} {low} ,{high} {right}"):
        yield "interval or pair, rewritten", answer, True
    if "infty" in low + high and "infty" not in (low if "infty" in high else high):
        bound, sign = (low, ">") if "infty" in high else (high, "<")
        closed = "=" * ((left if sign == ">" else right) in "[]")
        for answer, pays in (
            (f"x {sign}{closed} {bound}", True),
            (f"x {sign}{'' if closed else '='} {bound}", False),
            (rf"\{{x \mid x {sign}{closed} {bound}\}}", True),
            (f"-x {'<>'[sign == '<']}{closed} -({bound})", True),
            (rf"x \in {left}{low},{high}{right}", True),
            (f"x {'<>'[sign == '<']}{closed} {bound}", False),
        ):
            yield "interval as an inequality", answer, pays
    elif (left, right) != ("(", ")"):
        signs = {"(": "<", "[": r"\le", ")": "<", "]": r"\le"}
        yield "interval as an inequality", f"{low} {signs[left]} x {signs[right]} {high}", True
        yield "interval as an inequality", f"{low} {signs[left]} x {signs[swap[right]]} {high}", False


def _constant(gold: str, draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    for wrong in (
        f"{gold}+1",
        f"-({gold})",
        f"2({gold})",
        rf"{gold} \text{{ or }} 1",
        rf"\frac{{{gold}}}{{3}}",
        f"{gold} = 1",
        rf"{gold}, 1",
        rf"{gold} \approx 123456.5",
        rf"({gold})\cdot 1.0000001",
    ):
        yield "constant, wrong", wrong, gold.strip("-{} ") in ("", "0")
    for right in (
        f"({gold})",
        f"x = {gold}",
        rf"\frac{{2({gold})}}{{2}}",
        f"{gold} + 0",
        rf"{gold} \cdot 1",
        f"{gold} = {gold}",
        gold.replace(r"\sqrt", r"\sqrt ").replace("frac", "dfrac", 1).replace("ddfrac", "tfrac"),
    ):
        yield "constant, rewritten", right, True
    if match := re.fullmatch(r"(\d*)\\sqrt\{(\d+)\}", gold):
        yield "unicode root", f"{match[1]}√{match[2]}", True
        yield "unicode root", f"{match[1]}√({match[2]})", True
        yield "unicode root", f"{match[1]}√{match[2]}0", False


def _polynomial(gold: str, draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    name = re.search("[xtnk]", gold)[0]
    for wrong in (
        f"{gold}+1",
        f"-({gold})",
        gold.replace(name, "y"),
        f"({gold}){name}",
        f"{gold}, 1",
        f"{gold} = 0",
        f"({gold})^2 + 1/7",
        rf"{gold} + 10^{{-30}}",
    ):
        yield "polynomial, wrong", wrong, False
    for right in (
        f"({gold})",
        f"y = {gold}",
        f"{gold} + 0",
        f"0 + {gold}",
        rf"\frac{{2({gold})}}{{2}}",
        f"f({name}) = {gold}",
        f"({gold}) + {name} - {name}",
    ):
        yield "polynomial, rewritten", right, True


def _list(items: list[str], draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    joined, unlike = ", ".join(items), [*items[:-1], f"{items[-1]}7"]
    for wrong in (", ".join(items[:-1]), f"{joined}, 12345", ", ".join(unlike), rf"\boxed{{{items[0]}}}"):
        yield "list, wrong", wrong, False
    boxes = [rf"\boxed{{{item}}}" for item in items]
    for right in (
        ", ".join(items[::-1]),
        rf"\{{{joined}\}}",
        r" \text{ or } ".join(items),
        ", ".join(boxes),
        " and ".join(boxes),
        r" \quad \text{and} \quad ".join(boxes[::-1]),
        ", ".join(f"x = {item}" for item in items),
    ):
        yield "list, rewritten", right, True


def _templates(draw: random.Random, rounds: int) -> Iterator[Pair]:
    """Kinds that few real golds have, with numbers and letters drawn."""
    for _ in range(rounds):
        a, b, c = draw.sample(range(2, 60), 3)
        big = draw.randint(61, 5_000)
        x, y, p, q = draw.sample("xyztuvrw", 4)
        for gold, answer, pays in (
            (f"|{x}-{big}|", f"{big}-{x}", False),
            (f"|{x}-{a}|", f"{x}-{a}", False),
            (f"|{x}-{a}|", f"|{a}-{x}|", True),
            (rf"\sqrt{{({x}+{big})^2}}", f"{x}+{big}", False),
            (rf"\sqrt{{({x}-{a})^2}}", f"|{x}-{a}|", True),
            (rf"\frac{{|{x}-{a}|}}{{{x}-{a}}}", "1", False),
            (f"|{x}^2-{a}|", f"{x}^2-{a}", False),
            (f"|{x}|", f"{x}", False),
            (f"|{x}+{y}|", f"|{x}|+|{y}|", False),
            (rf"\lfloor {x}+{a} \rfloor", rf"\lfloor {x} \rfloor+{a}", True),
            (rf"{p} \land {q}", rf"{p} \lor {q}", False),
            (rf"{p} \vee {q}", rf"{p} \wedge {q}", False),
            (rf"{p} \land {q}", f"{p}, {q}", False),
            (rf"e_{a} \wedge e_{b}", rf"e_{b} \wedge e_{a}", False),
            (rf"{p} \lor \neg {q}", rf"\neg {q} \land {p}", False),
            (rf"{p} \to {q}", rf"{q} \to {p}", False),
            (rf"{x}={a} \lor {x}={b}", f"{b}, {a}", True),
            (rf"\frac{{\partial f}}{{\partial {x}}}", rf"\frac{{\partial f}}{{\partial {y}}}", False),
            (rf"{a}\frac{{\partial f}}{{\partial {x}}}", rf"\frac{{\partial f}}{{\partial {x}}} \cdot {a}", True),
            (rf"\frac{{d{p}}}{{d{x}}}", rf"\frac{{d{p}}}{{d{y}}}", False),
            (rf"\nabla \cdot F_{a}", rf"\nabla \times F_{a}", False),
            (f"f({x}) - f({y})", f"f({y}) - f({x})", False),
            (rf"\frac{{f({x})}}{{f({y})}}", rf"\frac{{{x}}}{{{y}}}", False),
            (rf"\frac{{h({p}+{q})}}{{{a}}}", rf"\frac{{({q}+{p})h}}{{{a}}}", True),
            (f"P(1+{p})^{{{a}}}", rf"P \cdot ({p}+1)^{{{a}}}", True),
            (f"h({p}+{q})", f"h{p}-h{q}", False),
            (f"f'({a})", f"f({a})", False),
            (f"({-a},{b})", rf"\{{{x} \mid {-a}<{x}<{b}\}}", True),
            (f"({-a},{b})", f"{x}={-a} or {x}={b}", False),
            (f"({-a},{a})", rf"\pm {a}", False),
            (f"[{-a},{a}]", rf"|{x}| \le {a}", True),
            (f"[{-a},{a}]", f"|{x}| < {a}", False),
            (r"(0,\infty)", r"\mathbb{R}^+", True),
            (r"[0,\infty)", r"\mathbb{R}^+", False),
            (rf"(\pm {a}, {b})", f"({a},{b}),({-a},{b})", True),
            (rf"(\pm {a}, {b})", f"({a},{b})", False),
            (f"({a},{b})", rf"\begin{{cases}} x={a} \\ y={b} \end{{cases}}", True),
            (f"({a},{b})", rf"\begin{{cases}} x={b} \\ y={a} \end{{cases}}", False),
            (f"({a},{b}),({b},{a})", rf"\boxed{{({b}, {a})}}, \boxed{{({a}, {b})}}", True),
            (f"({a},{b}),({b},{a})", rf"\boxed{{({b}, {a})}} or \boxed{{({a}, {b})}}", False),
            (f"p={a},q={b};p={c},q={b}", f"({a},{b}),({c},{b})", True),
            (f"{x}={a}, {y}={b}", f"{x}={b}, {y}={a}", False),
            (f"{a}:{b}", f"S_1:S = {a}:{b}", True),
            (f"{a}:{b}", f"{b}:{a}", False),
            (f"{y} = {a}{x}+{b}", f"{a}{x}-{y}+{b}=0", True),
            (f"{y} = {a}{x}+{b}", f"{a}{x}-{y}-{b}=0", False),
            (rf"{y} = \frac{{{a}}}{{{x}}}", f"{x}{y} = {a}", True),
            (f"{a}000", rf"{a},000", True),
            (rf"{a}000\pi", rf"{a},000\pi", True),
            (f"{a}000{x}+5", f"{a}{{,}}000{x}+5", True),
            (rf"{a}000\pi", rf"{a}\pi", False),
            (f"({a}000,{b}000)", f"({a}{{,}}000, {b}{{,}}000)", True),
            (r"\frac{1}{3}", r"0.\bar{3}", True),
            (r"\frac{1}{3}", r"0.\bar{4}", False),
            (f"{x} < {a}", f"-{x} > -{a}", True),
            (f"{x} < {a}", f"{x} > -{a}", False),
            (f"{x} <= {a}", rf"{x} \le {a}", True),
            (rf"{a}\pi", rf"{a}\pi \approx {a * 3.14159265:.2f}", True),
            (rf"{a}\pi", rf"{a}\pi \approx {a * 3.14159265 + 1:.2f}", False),
            (rf"\approx {a}.33", rf"{a}\frac{{1}}{{3}}", True),
            (f"{a}.33", rf"{a}\frac{{1}}{{3}}", False),
            (f"{a}", rf"\text{{{a} or {b}}}", False),
            (f"{a}_{{7}}", f"{a}", False),
            (f"{a}_{{7}}", f"{a}_7", True),
            (rf"{a}\%", rf"0.{a:02}", False),
            (rf"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}", rf"\begin{{pmatrix}}{a}&{b}\end{{pmatrix}}", False),
            (rf"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}", rf"\begin{{bmatrix}}{a}\\{b}\end{{bmatrix}}", True),
        ):
            yield f"made: {'right' if pays else 'wrong'}", gold, answer if "boxed" in answer else box(answer), pays
        one, two = draw.sample(UNITS, 2)
        yield "units that differ", f"{a}{one}", box(f"{a}{two}"), False
        yield "units that differ", f"{a}{one}", box(f"{a}"), True
