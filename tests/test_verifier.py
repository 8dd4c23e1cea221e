r"""The verifier's policy, line by line (see docs/verifier.md), in process and without a server.

Each list is (gold, what the model put in the box, whether it should pay). The expected verdicts are reasoned from the
policy, not from what the code says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sympy.parsing.sympy_parser
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from hostile_answers import HOSTILE
from verdict_pairs import pairs

import math_verifier
from math_verifier import extract_answer, normalise, parse_number
from reward_server import Verdict, exact_verdict, verify
from verifier_pool import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ROOT.parent / "shared" / "data" / "verifier" / "variants.jsonl"
REPORTS = VARIANTS.with_name("reported_cases.jsonl")

NUMBERS = [
    ("42", "42", True),
    ("42", "+42", True),
    ("42", "42.", True),
    ("42", "42.0", True),
    ("42", "042", True),
    ("42", "$42$", True),
    ("42", r"\(42\)", True),
    ("42", r"\[ 42 \]", True),
    ("42", "**42**", True),
    ("42", r"\mathbf{42}", True),
    ("42", r"\text{42}", True),
    ("42", r"\boxed{42}", True),
    ("42", r"\fbox{42}", True),
    ("42", "(42)", True),
    ("42", "{42}", True),
    ("42", "４２", True),
    ("42", "٤٢", True),
    ("-42", "−42", True),
    ("-42", "–42", True),
    ("-42", "- 42", True),
    ("-42", "-(42)", True),
    ("42", "-42", False),
    ("42", "--42", True),  # minus minus 42 is arithmetic
    ("42", "4 2", False),
    ("42", "24", False),
    ("42", "421", False),
    ("42", "4242", False),
    ("42", "42.5", False),
    ("42", "42.001", False),
    ("42", "", False),
    ("42", r"\,", False),
    ("42", "{}", False),
    ("0", "", False),
    ("0", "0", True),
    ("0", "-0", True),
    ("0", "0.0", True),
    ("0", "{}", False),
    ("1", "0.999999999999", False),
    ("1", "0.9999999999999999999999", False),
    ("1", r"0.\overline{9}", True),
    (r"\frac{1}{3}", r"0.\overline{3}", True),
    ("12345678901234567890", "12345678901234567891", False),
    ("12345678901234567890", "12345678901234567890", True),
    ("9007199254740993", "9007199254740992", False),
    # separators
    ("1234", "1,234", True),
    ("1234", "1{,}234", True),
    ("1234", r"1,\!234", True),
    ("14400", r"14\,400", True),
    ("14400", "14 400", True),
    ("14400", r"14 400\text{ cm}", False),  # a plain space separates only in a number that stands alone
    ("1234567", "1,234,567", True),
    ("1,234", "1234", True),
    ("1234", "12,34", False),
    ("1234", "1,23,4", False),
    ("1234", "1, 234", False),
    ("414", r"14\,400", False),
    ("123", "1,23", False),
    ("0.5", "0,5", False),
    # fractions
    (r"\frac{1}{2}", "1/2", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", ".5", True),
    (r"\frac{1}{2}", r"\frac12", True),
    (r"\frac{1}{2}", r"\frac1{2}", True),
    (r"\frac{1}{2}", r"\dfrac{2}{4}", True),
    (r"\frac{1}{2}", r"\tfrac{1}{2}", True),
    (r"\frac{1}{2}", "½", True),
    (r"\frac{1}{2}", "50/100", True),
    (r"\frac{1}{2}", "2/1", False),
    (r"\frac{1}{2}", "12", False),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
    (r"-\frac{1}{2}", r"\frac{1}{-2}", True),
    (r"-\frac{1}{2}", r"-\frac{-1}{2}", False),
    (r"\frac{1}{3}", "0.33", False),
    (r"\frac{1}{3}", "0.3333333333", False),
    (r"\frac{11}{2}", "1 1/2", False),
    ("11/2", "1 1/2", False),
    ("12", "1 2", False),
    (r"\frac{3}{2}", r"1\frac{1}{2}", True),
    (r"\frac{3}{2}", "1 1/2", True),
    (r"\frac{3}{2}", "1½", True),
    (r"\frac{1}{2}", r"1\frac{1}{2}", False),
    (r"1\frac{1}{2}", "1.5", True),
    (r"-1\frac{1}{2}", "-1.5", True),
    (r"-1\frac{1}{2}", "-0.5", False),
    ("0", r"\frac{0}{5}", True),
    ("0", r"\frac{5}{0}", False),
    ("1", r"\frac{0}{0}", False),
    # scientific notation
    ("0.000000354", "3.54e-07", True),
    (r"3.54 \times 10^{-7}", "0.000000354", True),
    ("3540", r"3.54 \cdot 10^3", True),
    ("3540", r"3.54 × 10³", True),
    ("3540", r"3.54e3", True),
    ("3540", r"3.54e4", False),
    ("3540", "3.54 x 10^3", True),
    ("50", r"1/2 \cdot 10^2", True),
    ("1000000", "10^6", True),
    ("1000000", "10^{6}", True),
    ("1000000", "106", False),
    # a decimal is exact, unless the gold is marked as rounded
    ("3.14", r"\pi", False),
    ("3.14", "3.14159", False),
    (r"\approx 3.14", r"\pi", True),
    (r"\approx 3.14", "3.14159", True),
    (r"\approx 3.14", "3.15", False),
    (r"\approx 3.14", r"-\pi", False),
    ("3.3", r"\frac{10}{3}", False),
    ("3.5", "3.46", False),
    ("3.14", "3.1", False),
    ("3.14", "3.15", False),
    ("0.33", "1/3", False),
    (r"\approx 0.33", r"\frac{1}{3}", True),
    ("0.0000672", "0.000067", False),
    ("1.41", r"\sqrt{2}", False),
    (r"\approx 1.41", r"\sqrt{2}", True),
    ("1.42", r"\sqrt{2}", False),
    ("6.4", r"\frac{32}{5}", True),
    (r"\pi", "3.14", False),
    (r"\pi", "3.14159265358979", False),
    (r"\sqrt{2}", "1.41421356", False),
    # percent
    (r"50\%", r"50\%", True),
    (r"50\%", "50%", True),
    (r"50\%", "50", True),
    (r"50\%", "50 percent", True),
    (r"50\%", r"50\text{ percent}", True),
    (r"50\%", "0.5", False),
    (r"50\%", r"\frac{1}{2}", False),
    ("0.5", r"50\%", False),
    ("50", r"50\%", False),
    ("3", "300", False),
    ("300", "3", False),
    ("3", r"300\%", False),
    # currency and units
    ("5", r"\$5", True),
    ("5", "$5", True),
    ("5", r"\$5.00", True),
    ("5", "5 dollars", True),
    ("5", "€5", True),
    (r"\$5", "5", True),
    (r"\$5", r"5\text{ cents}", False),
    (r"\$1,250", "1250", True),
    ("5", r"5\text{ cm}", True),
    ("5", r"5\,\mathrm{cm}", True),
    ("5", r"5~\mathrm{m}", True),
    ("5", "5 cm", True),
    ("5", r"5\text{ cm}^2", True),
    ("5", r"5 \text{ square units}", True),
    ("5", r"5\text{ apples}", True),
    ("5", "5 apples", True),
    ("5", r"5\text{ m/s}", True),
    (r"5\text{ cm}", "5", True),
    (r"5\text{ cm}", "5 cm", True),
    (r"5\text{ inches}", r"5\text{ in}", True),
    (r"5\text{ cm}", r"5\text{ m}", False),
    (r"5\text{ cm}^2", r"5\text{ cm}^3", False),
    (r"3\text{ PM}", r"3\text{ AM}", False),
    ("5", "5m", False),
    ("5", "5 m", False),
    ("5", "5x", False),
    ("4t", "4", False),
    ("4m", "4", False),
    ("4s", "4", False),
    ("4g", "4", False),
    ("4h", "4", False),
    ("4d", "4", False),
    ("4l", "4", False),
    ("4", "4t", False),
    ("4", "4l", False),
    ("42", r"42 \text{ is wrong, it is } 43", False),
    ("43", r"42 \text{ is wrong, it is } 43", False),
    ("42", r"42\text{ is wrong}", False),
    ("42", r"\text{not } 42", False),
    ("42", r"42 \text{ or more}", False),
    ("3", r"3\text{ million}", False),
    # degrees
    (r"60^\circ", "60", True),
    ("60", r"60^\circ", True),
    (r"60^\circ", r"60^{\circ}", True),
    (r"60^\circ", "60°", True),
    (r"60^\circ", r"60\text{ degrees}", True),
    (r"60^\circ", "60 degrees", True),
    (r"60^\circ", r"\frac{\pi}{3}", False),
    (r"\frac{\pi}{3}", r"60^\circ", False),
    (r"\frac{\pi}{3}", "60", False),
    (r"\frac{1}{2}", r"\cos 60^\circ", True),
    (r"\frac{1}{2}", r"\cos 60", False),
    (r"1", r"\frac{180}{\pi}", False),
    # other bases are compared as written
    ("101_2", "101_2", True),
    ("101_2", "101_{2}", True),
    ("101_2", "101_3", False),
    ("101_2", "5", False),
    ("101_2", "101", False),
    ("2516_8", "2516_{8}", True),
    ("101", "101_2", False),
    # `=` only as symbol = value
    ("42", "x = 42", True),
    ("42", "x_1 = 42", True),
    ("42", r"\text{Area} = 42", True),
    ("42", "f(2) = 42", True),
    ("42", r"\angle ABC = 42^\circ", True),
    ("42", r"x = 6 \cdot 7 = 42", True),
    ("42", "1=42", False),
    ("1", "1=42", False),
    ("42", "x = 42 = 43", False),
    ("42", "41 = 42", False),
    ("42", "x = 41", False),
    ("42", "x \\ne 42", False),
    ("42", "x > 42", False),
    ("42", r"x \approx 42", False),
    ("42", "=42", False),
    # arithmetic
    ("42", "40 + 2", True),
    ("42", r"6 \cdot 7", True),
    ("42", r"6 \times 7", True),
    ("42", "6*7", True),
    ("42", "84/2", True),
    ("1024", "2^{10}", True),
    ("120", "5!", True),
    ("252", r"\binom{10}{5}", True),
    ("2", r"\sqrt{4}", True),
    ("2", r"\sqrt[3]{8}", True),
    ("85", "42(43)", False),
    ("84", "42(2)", True),
    ("42", r"42 \# 43", False),
    ("42", "42 ? 43", False),
    ("42", r"\frac{42}{43}", False),
    ("42", r"42 \pmod{43}", False),
    ("262537412640768744", r"e^{\pi\sqrt{163}}", False),
    ("0", r"10^{-20}", False),
    ("0", r"e^{-100}", False),
]

MORE = [
    ("3", "3 million", False),
    ("3.14", r"\approx 3.14", True),
    ("42", r"\approx 42", False),
    ("1,2", "{1, 2}", True),
    ("(1,2)", r"\{(1, 2)\}", True),
    (r"(-\infty,0)\cup(0,\infty)", r"x \ne 0", True),
    (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R} \setminus \{0\}", True),
    (r"x \neq 0", r"(-\infty,0)\cup(0,\infty)", True),
    (r"x \neq 1", r"x \neq 2", False),
    ("1", r"\gcd(n, p-1)", False),
    ("3:2", "3 : 2", True),
    ("3:2", "2:3", False),
    ("3:2", "3", False),
    (r"8:34 \text{ p.m.}", "8:34 PM", True),
    (r"8:34 \text{ p.m.}", r"8:34\text{ a.m.}", False),
    (r"\approx 8.24 \text{ mph}", "8.24", True),
    ("a - b", "-a - b", False),
    ("n - k", "n + k", False),
    ("a, b, c", "a, b, C", False),
    ("e", "E", False),
    ("B", "(b)", True),
    ("even", "-even", False),
    ("sub-exponential", "sub+exponential", False),
    (r"x \in [-2,7]", r"y \in [-2,7]", False),
    (r"k \neq 1", r"r \neq 1", False),
    (r"\text{two-thirds}", "two-thirds", True),
    ("St. Mary", "st. mary", True),
    ("1999^{1999}", "1999^{1999} + 1", False),
    ("1999^{1999}", r"1999 \cdot 1999^{1998}", True),
    (r"10^{300}\sqrt{2}", r"10^{300}\sqrt{2}+1", False),
    (r"10^{300}\sqrt{2}", r"10^{299}\sqrt{200}", True),
    (r"20\%", r"20\%\%", False),
    ("A", "(A)^2", False),
    (r"\text{(A)}", r"\text{(A)} + 1", False),
    ("7", "7\\\\", True),
    ("7.25", "7.25$", True),
    ("x != 3", r"x \neq 3", True),
    ("180-x", r"180^\circ - x", True),
    ("6", r"\text{6 ways}", True),
    ("6", r"\text{6 or 7}", False),
    ("6", r"\text{6 is wrong}", False),
    ("12", r"\text{12 cm}", True),
    ("5x-7y+11z+4=0", "-5x+7y-11z-4=0", True),
    ("8", "2^{3}=8", True),
    ("4", r"\{4, 4\}", False),
    ("No", "no", True),
    ("no", "No", True),
    ("yes", "Yes", True),
    ("yes", "no", False),
    ("Yes", "No", False),
    ("x^2+y^2=1", "x^2+y^2-1=0", True),
    ("p-q=0", "p=q", True),
    ("10 inches", r"10.0\text{ inches}", True),
    (r"\frac{7\pi}{4}", r"\frac{7}{4}\pi", True),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", True),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,90^\circ)", False),
    ("6-5i", "6+5i", False),
    (r"\text{Evelyn}", "Evelyn", True),
    ("x^{10}", "x^{1}0", False),
    (r"\sqrt{x}", r"x^{1/2}", True),
    ("0.10", ".1", True),
    ("42", "42,", True),
    (r"\frac{\sqrt{3}}{3}", r"\tan 30°", True),
    (r"\frac{\sqrt{3}}{3}", r"\tan 30", False),
    (r"-\frac{\sqrt{3}}{2}", r"\frac{-\sqrt{3}}{2}", True),
    ("16", r"4^2", True),
    ("16", "42", False),
    ("2k", "k2", True),
    ("k+1", "k", False),
    ("1", "x^0", True),
    ("n", "n!", False),
    ("6", "3!", True),
    ("720", "3!!", False),
    ("0.333333", r"\frac{1}{3}", False),
    ("0", r"\sin \pi", True),
    ("0", r"\emptyset", False),
    (r"\text{none}", "0", False),
    ("100", "1e2", True),
    ("100", "1E2", True),
    ("100", "1e 2", False),
    ("11", "1 1", False),
    ("-3", r"\text{-3}", True),
    ("3-2x", "-(2x-3)", True),
    ("27", r"\sqrt[3]{19683}", True),
    (r"2+\sqrt{3}", r"\sqrt{7+4\sqrt{3}}", True),
    (r"2+\sqrt{3}", r"\frac{1}{2-\sqrt{3}}", True),
    (r"2+\sqrt{3}", "3.732", False),
    (r"2+\sqrt{3}", r"2-\sqrt{3}", False),
]

HEDGES = [
    ("42", "41, 42", False),
    ("42", "42, 43", False),
    ("42", "42 or 43", False),
    ("42", r"42 \text{ or } 43", False),
    ("42", r"41 \text{ and } 42", False),
    ("42", r"42 \lor 43", False),
    ("42", "42; 43", False),
    ("42", r"\{41, 42\}", False),
    ("42", "(41, 42)", False),
    ("42", r"[41, 42]", False),
    ("42", r"x = 41, x = 42", False),
    ("42", r"x = 41 \text{ or } x = 42", False),
    ("42", r"\pm 42", False),
    ("42", r"42 \quad 43", False),
    ("42", r"42 \mid 43", False),
    ("42", r"42 \Rightarrow 43", False),
    ("42", r"41 \to 42", False),
    ("42", r"41 < 42", False),
    ("42", r"\begin{pmatrix} 41 \\ 42 \end{pmatrix}", False),
    ("42", r"\text{42 or 43}", False),
    ("A", r"\text{A or B}", False),
    ("A", r"\text{A}, \text{B}", False),
    ("A", "A, B", False),
    ("A", r"\text{(A)} \text{ or } \text{(B)}", False),
    ("A", "(A) or (B)", False),
    ("yes", "yes or no", False),
    (r"\text{even}", r"\text{even or odd}", False),
    (r"\text{even}", r"\text{not even}", False),
    ("1, 2", "1", False),
    ("1, 2", "1, 2, 3", False),
]

STRUCTURES = [
    # bare lists are not ordered, parenthesised ones are
    ("1, 2", "2, 1", True),
    ("1,2", r"1 \text{ and } 2", True),
    ("1,2", "1 and 2", True),
    ("1,2", r"\{2, 1\}", True),
    ("1,2", r"x \in \{2, 1\}", True),
    ("1,2", "x = 1, x = 2", True),
    ("1,2", r"x = 1 \text{ or } x = 2", True),
    (r"x=1, y=2", "x=1, y=2", True),
    (r"x=1, y=2", "y=2, x=1", True),
    (r"x=1, y=2", "x=2, y=1", False),
    (r"x=1, y=2", "(1, 2)", True),
    (r"\{1,2\}", "1, 2", True),
    (r"\{1,2\}", "(1, 2)", False),
    (r"\{1,2,3\}", r"\{3,2,1\}", True),
    (r"\{1,2,3\}", r"\{1,2\}", False),
    ("3, -3", r"\pm 3", True),
    (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", True),
    (r"1 \pm \sqrt{2}", r"1+\sqrt{2}", False),
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", r"\left(1, 2\right)", True),
    ("(1,2)", "(2, 1)", False),
    ("(1,2)", "(1, 2, 3)", False),
    ("(1,2)", r"(x, y) = (1, 2)", True),
    ("(1,2)", r"\left(\frac{2}{2}, 2.0\right)", True),
    ("(1,2)", "1", False),
    ("(0,9),(9,0)", "(9,0),(0,9)", True),
    ("(0,9),(9,0)", "(0,9),(0,9)", False),
    ("(1,234)", "1234", False),
    ("5", r"\{5\}", True),
    # intervals
    ("(1,2]", "(1, 2]", True),
    ("(1,2]", "(1,2)", False),
    ("[1,2]", "(1,2)", False),
    ("(1,2)", "[1,2]", False),
    ("[1,2)", "1 \\le x < 2", True),
    ("[1,2)", "1 < x < 2", False),
    ("1 \\leq x < 2", "[1,2)", True),
    (r"(-\infty, 3)", "x < 3", True),
    (r"(-\infty, 3)", "3 > x", True),
    (r"(-\infty, 3)", r"x \le 3", False),
    (r"(-\infty, 3)", r"(3, \infty)", False),
    ("x > 3", "y > 3", False),
    ("x > 3", "x > 3", True),
    ("x > 3", r"x \geq 3", False),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty) \cup (-\infty, 1)", True),
    (r"(-\infty,1)\cup(2,\infty)", r"x < 1 \text{ or } x > 2", True),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1]\cup(2,\infty)", False),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)", False),
    (r"x \in [1,2]", "[1,2]", True),
    (r"(-\infty,\infty)", r"\mathbb{R}", True),
    (r"(-\infty,\infty)", "ℝ", True),
    # matrices
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", True),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", False),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", False),
    (r"\begin{pmatrix} 1 \\ 1/2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}", True),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix} -1 & 0 \\ 0 & 2 \end{pmatrix}", False),
    # equations
    ("x = 9", "9", True),
    ("x = 9", "x=9", True),
    ("x = 9", "y = 9", False),
    ("y = 2x + 3", "2x + 3", True),
    ("y = 2x + 3", "y = 3 + 2x", True),
    ("y = 2x + 3", "2x - y + 3 = 0", True),
    ("y = 2x + 3", "y = 2x - 3", False),
    ("2x + 3y = 6", "4x + 6y = 12", True),
    ("2x + 3y = 6", "6 = 2x + 3y", True),
    ("2x + 3y = 6", "2x + 3y = 7", False),
    ("2x + 3y = 6", "6", False),
    ("f(x) = x + 22", "x + 22", True),
    # text
    (r"\text{neither}", "neither", True),
    (r"\text{neither}", "Neither", True),
    (r"\text{neither}", r"\textbf{neither}", True),
    (r"\text{neither}", "either", False),
    (r"\text{Monday}", "Tuesday", False),
    (r"\text{October 30}", "October 31", False),
    ("Yes", r"\text{yes}.", True),
    ("True", "False", False),
    (r"\text{(B)}", "B", True),
    ("B", "(B)", True),
    ("B", r"\text{(B)}", True),
    ("B", r"\textbf{(B) }", True),
    ("B", "C", False),
    ("B", r"\textbf{(B)}\ 12", True),
    ("12", r"\textbf{(B)}\ 12", True),
    (r"\text{A,C,F}", "A, C, F", True),
]

EXPRESSIONS = [
    # TeX's own fractions
    (r"\frac{3}{4}", r"{3 \over 4}", True),
    (r"\frac{3}{4}", r"3 \over 4", True),
    (r"\frac{3}{4}", r"{3 \over 4 \over 1}", False),
    (r"a+\frac{b}{c}", r"a+{b \over c}", True),
    (r"a+\frac{b}{c}", r"{a+b \over c}", False),
    (r"\frac{ac}{b}", r"{a \over {b \over c}}", True),
    (r"\frac{1}{6}", r"\frac{1 \over 2}{3}", True),
    (r"\frac{3}{2}", r"\frac{1}{2 \over 3}", True),
    # odd roots of what may be negative
    (r"-\frac{2(x^2+6)}{9(x^2-2)\sqrt[3]{x^2-2}^2}", r"\frac{2}{3(x^2-2)^{2/3}}-\frac{8x^2}{9(x^2-2)^{5/3}}", True),
    (r"x^{5/3}", r"x\sqrt[3]{x^2}", True),
    (r"(x-1)^{1/3}", r"(1-x)^{1/3}", False),
    ("|x|", r"\sqrt[3]{x^3}", False),
    ("2x+3", "3+2x", True),
    ("2x+3", "2y+3", False),
    ("x", "X", False),
    ("x", "-x", False),
    ("x", "|x|", False),
    ("|x|", "x", False),
    (r"x^2-1", "(x-1)(x+1)", True),
    (r"x^2-1", "(x-1)^2", False),
    (r"(x+1)^{10}", "(1+x)^10", True),
    (r"\sqrt{12}", r"2\sqrt{3}", True),
    (r"\sqrt{12}", r"2\sqrt3", True),
    (r"\sqrt{12}", "2√3", True),
    (r"\sqrt{12}", "2*sqrt(3)", True),
    (r"\sqrt{12}", r"3\sqrt{2}", False),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
    (r"\frac{\sqrt{6}-\sqrt{2}}{4}", r"\sin 15^\circ", True),
    (r"\frac{\pi}{4}", r"\pi/4", True),
    (r"\frac{\pi}{4}", r"\frac14 \pi", True),
    (r"\frac{\pi}{4}", r"\arctan 1", True),
    (r"10\pi", "10π", True),
    (r"10\pi", "31.4", False),
    (r"e^{x}", r"\exp(x)", True),
    (r"\ln 2", r"\log 2", False),
    (r"\ln 6", r"\ln 2 + \ln 3", True),
    (r"\log_2 8", "3", True),
    (r"\sin^2 x + \cos^2 x", "1", True),
    (r"2\sin x\cos x", r"\sin 2x", True),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}", True),
    (r"\frac{n(n+1)}{2}", r"\frac{n(n-1)}{2}", False),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}", True),
    (r"2^{n+1}", r"2 \cdot 2^n", True),
    (r"2^{n+1}", r"2^n+1", False),
    (r"3+4i", "4i+3", True),
    (r"3+4i", "3-4i", False),
    (r"3+4i", r"3+4\cdot i", True),
    (r"e^{i\pi/3}", r"\frac{1+i\sqrt{3}}{2}", True),
    (r"\frac{x}{2}", "0.5x", True),
    (r"\frac{x}{2}", r"\frac{1}{2}x", True),
    (r"x^{-1}", r"\frac{1}{x}", True),
    (r"a_1 + a_2", "a_2 + a_1", True),
    (r"a_1 + a_2", "a_1 + a_3", False),
    (r"\omega_1", r"\omega_11", False),
    ("a_{11} + 1", "1 + a_11", True),
    ("3", r"\log_28", True),
    (r"12\sqrt{3}", "12 3", False),
    (r"\lfloor x \rfloor", r"\lceil x \rceil", False),
    (r"\lfloor x/5 \rfloor", r"\lfloor x/7 \rfloor", False),
    (r"f'(0)", "f(0)", False),
    (r"10\pi \text{ cm}^2", r"10\pi", True),
    (r"\infty", r"\infty", True),
    (r"\infty", r"-\infty", False),
    (r"\infty", "1", False),
    (r"\emptyset", r"\{\}", True),
]


SPELLINGS = [
    (r"28\%", "28 percentage", True),
    ("11111111100", r"11,\! 111,\! 111,\! 100", True),
    ("32349", "32, 349", False),
    ("14916", "14 {, }916", True),
    (r"0.\dot{3}", r"\frac13", True),
    (r"\frac{41}{333}", r"0.\dot12\dot3", True),
    ("9", "3.(3)", False),  # a repeating decimal, no product
    ("42", r"\underline{42}", True),
    ("42", r"\textcolor{red}{42}", True),
    ("42", r"\large 42", True),
    ("42", "'42'", True),
    ("42", r"\text{}42", True),
    ("42", r"\text{The answer is }42", True),
    ("42", "The answer is 42", True),
    ("42", "The answer is 42 or 43", False),
    ("42", "m + n = 42", True),
    ("42", "m + n = 40 + 2 = 42", True),
    ("42", "x + x = 42", False),
    ("42", "2x + y = 42", False),
    ("42", "x^2 = 42", False),
    ("42", "x^{-1} = 42", False),
    ("42", "f^{-1}(3) = 42", True),
    ("42", "[ABC] = 42", True),
    ("42", r"\text{Area of } ABC = 42", True),
    ("m+n=42", "42", False),
    ("9.8", r"9.8\ \mathrm{m/s^2}", True),
    ("5", "5 square units", True),
    ("5", "5cm", False),
    ("12", r"12\text{k}", False),
    ("12", r"12\text{ hundredths}", False),
    (r"60^\circ", r"60\text{ inches}", False),
    (r"20\%", r"20\text{ feet}", False),
    ("1112112_3", "(1112112)_3", True),
    ("-37", "-37_8", False),
    (r"3:30\text{ PM}", "3:30 p.m.", True),
    ("A", "A. 42", True),
    ("A", "A. 42 or (B)", False),
    ("A", "Option A", True),
    ("A", r"\text{choice (A)}", True),
    ("ACB", "CAB", False),
    (r"\text{hyperbola}", r"\text{a hyperbola}", True),
    (r"\begin{pmatrix}1\\2\\3\end{pmatrix}", "(1,2,3)", True),
    (r"\begin{pmatrix}1\\2\\3\end{pmatrix}", "(1,3,2)", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\{1,2\}", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"1 \le x \le 2", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"-\begin{bmatrix}-1\\-2\end{bmatrix}", True),
    (r"\begin{pmatrix}2\\4\end{pmatrix}", r"2\left(\begin{array}{c}1\\2\end{array}\right)", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)", False),
    (r"\emptyset", r"\{\emptyset\}", False),
    (r"(0,\infty)", r"\{x \mid x > 0\}", True),
    (r"(0,\infty)", r"\{x \in \mathbb{R} : x \ge 0\}", False),
    (r"\mathbb{R}", r"\text{all real numbers}", True),
    (r"\infty", r"\text{infinity}", True),
    (r"\text{infinite}", r"\infty", False),
    ("1", "0^0", False),
    (r"\ln|x|", r"\ln x", False),
    ("x", "x+10^{-250}", False),
    ("O", "O(1)", False),
]


KINDS = [
    # the ends of an interval are not the interval
    (r"(-\infty,4)", r"-\infty,4", False),
    ("(-2,7)", r"x=-2\text{ or }x=7", False),
    ("(-7,7)", r"\pm 7", False),
    ("(3,8)", "3, 8", False),
    ("3, 8", "(3,8)", False),
    ("3, 8, 9", "(3,8,9)", True),
    ("(3,8,9)", "3, 8, 9", True),
    ("(3,8,9)", "[3,8,9)", False),
    ("(3,8)", r"\{x \mid 3<x<8\}", True),
    (r"(-\infty,3)\cup(3,5)", r"x<5, x \ne 3", True),
    (r"(-\infty,3)\cup(3,5)", r"x \le 5, x \ne 3", False),
    (r"(-\infty, 1]\cup\{2\}", r"x \le 1 \text{ or } x = 2", True),
    (r"(-\infty,2)\cup(6,\infty)", "x<2 and x>6", False),
    (r"[-7,7]", r"|x| \le 7", True),
    (r"[-7,7]", "|x| < 7", False),
    (r"(0,\infty)", r"\mathbb{R}^+", True),
    ("x < 7", "-x > -7", True),
    ("x < 7", "-x < -7", False),
    ("x <= 7", r"7 \ge x", True),
    # a solved inequality accepts none that is not solved: it may be the problem's own
    ("x > 7", "7 < x", True),
    *[("x > 7", answer, False) for answer in ("x - 7 > 0", "2x > 14", "0 < a - a + x - 7", "x > 7, 2x > 14")],
    (r"(-\infty,-2)\cup(2,\infty)", "|x| > 2", True),
    (r"(-\infty,-2)\cup(2,\infty)", "x^2 > 4", False),
    (r"(7,\infty)", r"\{x \mid 2x > 14\}", False),
    (r"x \ne 7", r"x - 7 \ne 0", False),
    ("y > e", "ey > e^2", False),
    ("2x > 14", "x > 7", True),
    ("x > 2a", "x - 2a > 0", True),
    ("a > b > c", "c < b < a", True),
    # identities that hold only near 0 or on one side
    ("|x-9|", "9-x", False),
    ("|x-9|", "|9-x|", True),
    (r"\sqrt{(x+700)^2}", "x+700", False),
    ("|x-10^7|", "10^7-x", False),
    (r"\lfloor x \rfloor", r"\lceil x \rceil - 1", False),
    (r"|a-b|", "a-b", False),
    (r"|a-b|", "b-a", False),
    (r"|a-b|", "|b-a|", True),
    (r"\frac{|x-9|}{x-9}", "1", False),
    # connectives, wedges, derivatives, vectors: as written
    (r"p \land q", r"p \lor q", False),
    (r"p \land q", "p, q", False),
    (r"dx \wedge dy", r"dy \wedge dx", False),
    (r"\vec{a} \times \vec{b}", r"\vec{b} \times \vec{a}", False),
    (r"x=2 \lor x=1", "1, 2", True),
    ("A^T", "A", False),
    ("PDP^{-1}", "P^{-1}DP", False),
    (r"\frac{1}{T}", "T^{-1}", True),
    (r"\frac{\partial f}{\partial x}", r"\frac{\partial f}{\partial y}", False),
    (r"3\frac{\partial f}{\partial x}", r"\frac{\partial f}{\partial x} \cdot 3", True),
    # words behind a number
    *[
        ("7", rf"7\text{{ {word}}}", False)
        for word in ("eighths", "factorial", "millions", "or so", "squared", "and up")
    ],
    *[
        ("7", rf"7\text{{ {word}}}", True)
        for word in ("clips", "stuffed goats", "cubic feet", "people", "meters per second")
    ],
    (r"7\text{ m/s}", r"7\text{ m/s}^2", False),
    (r"7\text{ m/s}", r"7\text{ m}", False),
    (r"7\text{ m/s}", r"7\text{ meters per second}", True),
    (r"30\text{ mph}", r"30\text{ km/h}", False),
    # unicode roots
    ("3", "√13", False),
    (r"\sqrt{13}", "√13", True),
    ("4", "∛164", False),
    ("4", "∛64", True),
    ("4", r"\sqrt[3]64", True),
    (r"\sqrt{x+1}", "√(x+1)", True),
    ("x^{2n+2}", "x^(2(n+1))", True),
    ("x^{2n+2}", "x^(2((n+1)))", False),  # brackets in brackets in brackets, in plain notation
    (r"\frac{\sqrt{15}}{2}", "√15/2", True),
    # thousands beside anything
    ("24000", r"x = \$24,000", True),
    ("24000", r"N = 24\,000", True),
    ("24000", r"\text{Total} = 24,000", True),
    (r"24000\pi", r"24,000\pi", True),
    ("10000x+5", "10{,}000x+5", True),
    ("(1000,2000)", r"(1{,}000,\ 2{,}000)", True),
    ("24", "24,000", False),
    # named values, chains and notes
    ("7:32", "S_1:S = 7:32", True),
    ("S_1:S = 7:32", "7:32", True),
    ("p=5,q=2;p=7,q=2", "(5,2),(7,2)", True),
    ("(11,7)or(7,11)", r"(7,11),\ (11,7)", True),
    (r"125\text{ miles}", r"125\textnormal{ miles}", True),
    ("7", "3+4=7", True),
    ("7", "3+5=7", False),
    ("11", "x = 5+5+1 = 11", True),
    ("11", "x = 5+5+2 = 11", False),
    (r"10\pi", r"10\pi \approx 31.4", True),
    (r"10\pi", r"10\pi \approx 31.5", False),
    (r"\frac{1 + \sqrt{97}}{8} \approx 1.36", r"\frac{1 + \sqrt{97}}{8}", True),
    ("7", r"\max f = 7", True),
    ("7", "7 = x", True),
    ("y = 2x+1", "f(x) = 2x+1", True),
    (r"y=\frac{2}{x-1}", "y(x-1)=2", True),
    (r"r=\frac{2}{t}", "tr=2", True),
    # letters before a bracket
    (r"\frac{(a+b)h}{2}", r"\frac{h(a+b)}{2}", True),
    ("P(1+r)^n", r"P \cdot (1+r)^n", True),
    ("f(x) - f(y)", "f(y) - f(x)", False),
    ("f(x+2)", "fx+2f", False),  # the answer cannot make a factor of the gold's function
    ("T(n-1)+T(n-3)", "2Tn-4T", False),
    ("f^{-1}(x)", r"\frac{1}{f(x)}", False),
    ("f^{-1}(x) + 1", "1 + f^{-1}(x)", True),
    (r"\frac{f(x)}{f(y)}", r"\frac{x}{y}", False),
    # other spellings
    (r"(\pm 1, 2)", "(1,2),(-1,2)", True),
    (r"(\pm 1, 2)", "(1,2)", False),
    (r"\frac{1}{3}", r"0.\bar{3}", True),
    ("(1,2)", r"\begin{cases} x=1 \\ y=2 \end{cases}", True),
    ("(1,2)", r"\begin{cases} x=2 \\ y=1 \end{cases}", False),
    ("(1,2)", r"\\left(1, 2\\right)", True),  # escaped twice
    ("C", "C. or D", False),
    ("C", "(C) (D)", False),
    # letters that the parser takes for constants, or drops
    ("I^2R", "IR", False),
    ("3+4i", "3+4I", False),
    ("I_1 + I_2", "2I", False),
    (r"\frac{1}{2}I\omega^2", r"\frac{I\omega^2}{2}", True),
    ("I(a+b) + I", "aI + bI + I", True),
    ("(1+r)^T", "1+r", False),
    ("2^T", "2", False),
    ("(1+r)^{T}", "(r+1)^T", True),
    (r"\gamma", r"\Gamma", False),
    (r"|\gamma|", r"\gamma", False),
    # what is read in two ways
    (r"\frac{1}{2x}", "1/2x", False),
    (r"\frac{x}{2}", "1/2x", False),
    (r"\frac{1}{2x}", "1/(2x)", True),
    (r"\lfloor \frac{n}{2} \rfloor", r"\lfloor n/2 \rfloor", True),
    ("64", "2^3^2", False),
    ("3/4", r"3\frac{}{4}", False),
    # an equation that is not solved
    ("x = 9", "2x = 18", False),
    ("x = 9", "3x + 5 = 32", False),
    (r"x = \sqrt{2}", r"x - \sqrt{2} = 0", False),
    ("x = 9", "x = 18/2", True),
    ("x^2-5x+6=0", "2x^2-10x+12=0", True),
    # sets of reals
    ("(0,5)", "x>0, y<5", False),
    ("x>0, y<5", "y>0, x<5", False),
    ("x>0, y<5", "y<5, x>0", True),
    (r"(e,\infty)", "x > e", True),
    (r"x \le 2", r"[-\infty,2]", False),
    (r"(2,\infty)", r"\{x \in \mathbb{R} \mid x > 2\}", True),
    (r"(2,\infty)", r"\{x \in \mathbb{Z} \mid x > 2\}", False),
    # fonts and spellings
    (r"\frac{3}{4}", r"\mathbf{\frac{3}{4}}", True),
    (r"\frac{3}{4}", r"x = \boldsymbol{\frac34}", True),
    (r"\frac{3}{4}", r"\{\frac34\}", True),
    (r"\frac{1}{6}", r"0.1\overline6", True),
    ("2:3", r"2\colon 3", True),
    ("5.5", r"\text{\$5.50}", True),
    (r"2\pi", r"2\pi hr", False),
    *[("9", rf"9\text{{ {word}}}", False) for word in ("percentage points", "percentiles", "basis points")],
]


POLICY = NUMBERS + MORE + HEDGES + STRUCTURES + EXPRESSIONS + SPELLINGS + KINDS


def _ask(gold: str, answer: str) -> Verdict:
    return verify(rf"Some work, then \boxed{{{answer}}}", gold)


def _verify_all(rows: Iterable[tuple[str, str]]) -> list[Verdict]:
    """Verdicts on (text, gold) in order, by a worker on each of two cores."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda row: verify(*row), rows))


@pytest.fixture(scope="module")
def policy_verdicts() -> dict[tuple[str, str], Verdict]:
    """The verdict on each row of the policy's lists."""
    verdicts = _verify_all((rf"Some work, then \boxed{{{answer}}}", gold) for gold, answer, _ in POLICY)
    return {row[:2]: verdict for row, verdict in zip(POLICY, verdicts, strict=True)}


@pytest.mark.parametrize(("gold", "answer", "pays"), POLICY)
def test_policy(policy_verdicts: dict[tuple[str, str], Verdict], gold: str, answer: str, pays: bool) -> None:
    verdict = policy_verdicts[gold, answer]
    assert verdict.reward == float(pays), verdict
    assert (verdict.status == "correct") == pays


@pytest.mark.parametrize("gold", ["", "   ", "\n"])
def test_empty_gold_never_pays(gold: str) -> None:
    for answer in ("", " ", "42", "{}"):
        assert _ask(gold, answer).reward == 0.0
    assert _ask(gold, "42").status == "unparsable_gold"


EXTRACTION = [
    (r"\boxed{41} and then \boxed{42}", "42"),
    (r"\boxed{42}, but actually \boxed{41}", "41"),
    (r"\boxed {42}", "42"),
    ("\\boxed\n{42}", "42"),
    (r"\boxed 42", "42"),
    (r"\fbox{42}", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{42}. So \boxed{43", "42"),  # the last box that closes
    (r"\boxed{42} \boxed{}", None),  # the last box wins, and it is empty
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{1} </think> nothing", None),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"\boxed{1}</think></think> \boxed{2}", "2"),
    (r"\boxed{2} <think>\boxed{1}", "2"),  # reasoning that was cut off
    (r"\boxed{7}" + "x" * 70_000, None),  # outside the last 64 KB
    ("x" * 70_000 + r"\boxed{7}", "7"),
    (r"\boxed{" + "1" * 2_001 + "}", None),
    (r"\boxed{7}" + r"\boxed{" * 15, "7"),
    (r"\boxed{7}" + r"\boxed{" * 16, None),  # at most 16 tries
    ("Answer: 42", "42"),
    ("Answer: $42$.", "42"),
    ("**Answer:** 42", "42"),
    ("**Answer**: 42", "42"),
    ("Final Answer: The final answer is $42$. I hope it is correct.", "42"),
    ("Answer: 41\nWait.\nAnswer: 42", "42"),
    ("Answer:\n42", "42"),
    ("The answer: 42", "42"),
    ("ANSWER: 42", "42"),
    (r"Answer: \boxed{42}", "42"),
    ("Answer: 41\n" + r"\boxed{42}", "42"),
    ("so 6*7 = 42\n#### 42", "42"),
    ("#### 1,234", "1,234"),
    ("The final answer is 42.", "42"),
    ("The final answer is: 42", "42"),
    ("The final answer is $3.5$.", "3.5"),
    ("The final answer is 3.5. Done.", "3.5"),
    ("Answer:\n\n**42**", "42"),
    ("Answer:\n$$\n\\frac{3}{4}\n$$", r"\frac{3}{4}"),
    ("Final Answer: The largest $n$ is 34.", "34"),
    ("Answer: the least is 4 and the largest is 34", "the least is 4 and the largest is 34"),
    ("Answer: it is not 34", "it is not 34"),
    ("Answer: no number except 8 is 34", "no number except 8 is 34"),
    ("Answer: 4<|im_end|>", "4"),
    (r"$\boxed4$", "4"),
    # the last statement, whatever its kind
    ("Answer: 5\n\nWait, no. The final answer is 6.", "6"),
    ("The final answer is 5. Wait.\nAnswer: 6", "6"),
    ("\\boxed{5}? No.\n#### 6", "6"),
    ("\\boxed{5}. No, the correct answer is 6.", "6"),
    ("The correct answer is (B) because 3 > 2.", "(B)"),
    ("So \\boxed{255}. Final Answer: The final answer is $10,455$. I hope it is correct.", "10,455"),
    ("最终答案：42", "42"),
    ("### Final Answer:\n\n\\[\n42\n\\]", "42"),
    ("Answer: $x=42$ since $6\\cdot 7=42$", "x=42"),
    ("Final answer is 72 clips, altogether.", "72 clips"),
    ("<think>Perhaps \\boxed{42}? Hmm", None),
    # boxes that are one list
    (r"$\boxed{(1, 2)}, \boxed{(2, 1)}$", "(1, 2), (2, 1)"),
    (r"\[\boxed{-2} \quad \text{and} \quad \boxed{1}\]", "-2, 1"),
    (r"\(\boxed{1}\) and \(\boxed{2}\)", "1, 2"),
    (r"\boxed{1} or \boxed{2}", None),  # a hedge
    (r"$\boxed{1}$ \text{ or } $\boxed{2}$", None),
    (r"either \boxed{1}, or \boxed{2}", None),
    (r"$\boxed{1}$ (or $\boxed{2}$)", None),
    (r"\boxed{1} papers and \boxed{2}", "2"),
    (r"\boxed{1}, \boxed{}", None),
    # a box around boxes is the answer
    (r"\boxed{\boxed{6} or 7}", r"\boxed{6} or 7"),
    (r"\boxed{-\boxed{6}}", r"-\boxed{6}"),
    (r"\boxed{6}, \boxed{\boxed{7}}", r"6, \boxed{7}"),
    (r"\boxed{6 \boxed{7}", "7"),
    # on the line behind the marker, and emphasis in the middle
    ("Answer:\n\\[ x = 42. \\]", "x = 42"),
    ("Answer:\n$$42$$", "42$$"),
    ("Answer: \\[42\\] or 43", r"\[42\] or 43"),
    ("The final answer is **42** apples.", "42 apples"),
    ("It is 42", None),
    ("I like 42 boxes", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTION)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer
    assert (verify(text, "42").status == "no_answer") == (answer is None)


LENIENT = [
    ("We get 6 * 7 = 42", "42", "6"),
    ("The answer is 42.", "42", "43"),
    (r"Hence $\frac{1}{2}$ of $x^2$ is $\frac{1}{2}x^2$, as was to be shown.", r"\frac{x^2}{2}", "2"),
    (r"Therefore $x \geq 5$ is the solution.", r"x \ge 5", "5"),
    ("the number is not 10 but 1,000.99€", "1000.99", "10"),
    (r"\frac{10}{9}", "10/9", "9"),
    ("(1, 2)", "(1,2)", "2"),
    ("$28$ percent", r"28\%", "0.027"),
    ("it grows by 100%.", r"100\%", "10"),
    ("I hope it is right: 34", "34", "4"),
    # what is said to be the answer, before what follows; plain LaTeX, bold, aligned lines
    ("So the answer is $13$. Indeed $26 = 2 \\cdot 13$.", "13", "26"),
    ("So the answer is 5\\sqrt{7}", r"\sqrt{175}", "7"),
    ("<answer>-\\frac{4}{9}</answer>", r"-\frac49", "9"),
    ("Hence **\\frac{4}{9}**", r"\frac49", "9"),
    ("and so\n\n= \\sqrt{11}", r"\sqrt{11}", "11"),
    ("\\begin{align*}\nx &= 3 + y \\\\\n&= 8.\n\\end{align*}", "8", "3"),
    ("There are $7$ values of $k$.", "7", "8"),
    ("所以比例为13/28", "13/28", "13"),
    # the last side of a chain, without a note
    ("Hence \\[p(2) = \\frac{q(2)}{3} = \\frac{5}{6}.\\]", r"\frac56", "6"),
    ("That is $2 \\cdot 5! \\cdot 3! = 1{,}440$.", "1440", "440"),
    ("Thus $x = \\frac{8}{9} \\approx 0.89$.", r"\frac{8}{9}", "0.89"),
    ("The circle is $x^2 + y^2 = 4$.", "x^2+y^2=4", "4"),
    (r"It is $\boxed{42\}$.", "42", "2"),  # the brace is not closed
]


@pytest.mark.parametrize(("text", "gold", "other"), LENIENT)
def test_lenient_only_by_option(text: str, gold: str, other: str) -> None:
    assert verify(text, gold, lenient=True).reward == 1.0
    assert verify(text, other, lenient=True).reward == 0.0
    assert verify(text, gold).status == "no_answer"


# Right for peers' graders, wrong by the policy.
SECOND_OPINIONS = [
    (r"so \boxed{10\%}", "10"),
    (r"so \boxed{0.1667}", r"\frac{1}{6}"),
    ("Le prix est 2,74 $ par jour.", "2.74"),
    ("So there are **17** of them, the answer is 17 " + "and that is so. " * 300, "17"),
    (r"\boxed{(1, 2), (3, 4), (1, 2)}", "(1,2),(3,4)"),
    (r"so $\boxed{(3, 3)} \text{ for (a) and } \boxed{(1, 1)}$", "(3,3),(1,1)"),
]


@pytest.mark.parametrize(("text", "gold"), SECOND_OPINIONS)
def test_lenient_pays_what_peers_pay(text: str, gold: str) -> None:
    assert verify(text, gold, lenient=True).status == "correct"
    assert verify(text, gold).reward == 0.0


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"\boxed{5} is not right. Answer: 6", "5"),
        (r"It is $\boxed{5}$, no, it is $\boxed{6}$.", "5"),
        (r"\boxed{5\text{ millions}}", "5"),
        (r"\boxed{8 = 7}", "7"),
        (r"<think> It is \boxed{42}. </think> I do not know.", "42"),
        ("We get \\(\n9\n\\)", "9"),
        (r"\boxed{1, 2, 3}", r"\boxed{1} or so, but \boxed{2} and \boxed{3}"),
    ],
)
def test_lenient_refuses_what_is_wrong_for_everybody(text: str, gold: str) -> None:
    assert verify(text, gold, lenient=True).reward == 0.0


def test_lenient_keeps_what_strict_finds() -> None:
    assert verify(r"\boxed{41} and then 42", "41", lenient=True).reward == 1.0
    assert verify("Final Answer: Jane started growing it 3 hours ago.", "3", lenient=True).reward == 1.0
    for text in ("Answer: between 41 and 42", "Answer: 42 or 43"):
        assert verify(text, "42", lenient=True).reward == 0.0


GOLDS = [
    "7",
    "-12",
    "24000",
    "0",
    "3.5",
    "0.125",
    r"\frac{5}{6}",
    r"\frac{17}{4}",
    "(3,4)",
    "[2,5)",
    r"(-\infty,3]",
    "(1,2,5)",
]
GOLDS += [r"2\sqrt{3}", r"10\pi", r"\frac{\sqrt{5}}{2}", "x^2 + 2x", "3t - 5", "1, -2", "2, 3, 11"]


@pytest.mark.slow
def test_generated_near_misses_and_rewritings() -> None:
    rows = list(pairs(GOLDS, seed=1, rounds=2))
    verdicts = _verify_all((text, gold) for _, gold, text, _ in rows)
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if (v.reward == 1.0) != row[3]]
    assert len(rows) > 500
    assert [item for item in wrong if not item[0][3]] == []
    assert len(wrong) <= 0.003 * sum(row[3] for row in rows), wrong


def test_verified_separates_wrong_from_unknown() -> None:
    assert verify(r"\boxed{41}", "42").verified
    assert verify("nothing", "42").verified
    assert not verify(r"\boxed{41}", "").verified
    assert not verify(rf"\boxed{{{SLOW}}}", "42").verified


SLOW = r"\binom{10^5}{50000}+\binom{10^5}{49999}+\binom{10^5}{49998}"  # outlives every deadline used here


def test_deadline_holds_in_process() -> None:
    verify(r"\boxed{x+x}", "2x")
    start = time.monotonic()
    assert verify(rf"\boxed{{{SLOW}}}", "42").status == "timeout"
    assert time.monotonic() - start < PATIENCE + 3
    assert verify(r"\boxed{x+x+x}", "3x").reward == 1.0  # the killed worker was replaced


def test_lone_surrogates_do_not_crash() -> None:
    assert verify(r"\boxed{2x}", "x+\ud800").reward == verify("\\boxed{x+\ud800}", "2x").reward == 0.0


def test_verify_from_threads() -> None:
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda i: verify(rf"\boxed{{\sqrt{{2}} + {i}}}", rf"{i} + \sqrt{{2}}"), range(64)))
    assert all(verdict.reward == 1.0 for verdict in verdicts)


@pytest.mark.slow
def test_verify_after_fork() -> None:
    verify(r"\boxed{x+x}", "2x")
    pid = os.fork()
    if pid == 0:
        os._exit(int(verify(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").reward))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert verify(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").reward == 1.0


def test_import_starts_nothing() -> None:
    code = (
        "import sys, threading, reward_server\n"
        "assert reward_server.verify(r'\\boxed{42}', '42').reward == 1.0\n"
        "assert not {'torch', 'ray', 'sympy', 'vllm'} & set(sys.modules)\n"
        "assert threading.active_count() == 1 and reward_server.default_pool.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.slow
def test_script_without_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from reward_server import verify\nprint(verify(r'\\boxed{\\sqrt{8}}', r'2\\sqrt{2}').reward)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=env, check=True)
    assert done.stdout == "1.0\n"


def test_exact_tier_is_quick_on_hostile_text() -> None:
    for name, text in HOSTILE.items():
        best = 1.0
        for _attempt in range(3):
            start = time.perf_counter()
            exact_verdict(text, "42")
            best = min(best, time.perf_counter() - start)
        assert best < 0.02, name  # runs on the event loop


_PIECES = st.sampled_from(
    re.findall(
        r"[^ ]+",
        r"\boxed{ } { ( ) [ ] \frac \sqrt \text{ \left \right \pm \cup \{ \} , ; = < > \le ^ _ ! ° "
        r"% $ | & \\ - + . / ' \,"
        r" 1 2 0 42 x i e \pi \infty \begin{pmatrix} \end{pmatrix} and or million cm \circ \cdot \times 1,000 e5 "
        "Answer: #### </think> ½ − √ \x00 \n",
    )
)
_MATH = st.lists(_PIECES | st.text(max_size=3), max_size=30).map("".join)


@settings(max_examples=500, deadline=None)
@given(text=st.text(max_size=200) | _MATH, gold=st.text(max_size=40) | _MATH | st.just("42"))
def test_fuzz_exact_tier(text: str, gold: str) -> None:
    verdict = exact_verdict(rf"\boxed{{{text}}}", gold)
    assert isinstance(verdict, (Verdict, tuple))
    exact_verdict(text, gold)
    assert len(extract_answer(text) or "") <= 2_000
    assert isinstance(normalise(text), str)
    number = parse_number(normalise(text))
    assert number is None or number.denominator > 0


@settings(max_examples=150, deadline=None)
@given(value=st.fractions(max_denominator=10**6), other=st.fractions(max_denominator=10**6))
def test_fuzz_fractions_are_exact(value, other) -> None:
    n, d = value.numerator, value.denominator
    assert _ask(f"{n}/{d}", rf"\frac{{{3 * n}}}{{{3 * d}}}").reward == 1.0
    assert _ask(f"{n}/{d}", f"{other.numerator}/{other.denominator}").reward == float(value == other)


@settings(max_examples=100, deadline=None)
@given(value=st.integers(-(10**15), 10**15))
def test_fuzz_spellings_of_integers(value: int) -> None:
    spellings = [
        f"{value:,}",
        f"{value:,}".replace(",", r"\,"),
        f"{value:,}".replace(",", "{,}"),
        f"${value}$",
        f"{value}.0",
    ]
    for spelling in [*spellings, f"x = {value}", rf"\text{{{value}}}", f"{value} cm", str(value).replace("-", "−")]:
        assert _ask(str(value), spelling).reward == 1.0, spelling
    for wrong in (str(value + 1), f"{value}1", f"{value}.5", f"{value}, {value + 1}", rf"{value}\%", f"{value}+x"):
        assert _ask(str(value), wrong).reward == 0.0, wrong


@pytest.mark.slow
@pytest.mark.skipif(not REPORTS.exists(), reason="../shared/data/verifier/reported_cases.jsonl is not on this machine")
def test_public_reports() -> None:
    rows = [row for row in map(json.loads, REPORTS.read_text().splitlines()) if not row["contested"]]
    verdicts = _verify_all((row["text"], row["gold"]) for row in rows)
    paid = [verdict.reward == 1.0 for verdict in verdicts]
    wrong = [row for row, pays in zip(rows, paid, strict=True) if pays != row["expected"]]
    assert [row for row in wrong if not row["expected"]] == []
    assert len(wrong) <= 0.01 * len(rows), wrong


@pytest.mark.slow
@pytest.mark.skipif(not VARIANTS.exists(), reason="../shared/data/verifier/variants.jsonl is not on this machine")
def test_variants() -> None:
    rows = [json.loads(line) for line in VARIANTS.read_text().splitlines()][::6]  # benchmarks/verdicts.py takes all
    verdicts = _verify_all((rf"\boxed{{{row['pred_answer']}}}", row["gold"]) for row in rows)
    paid = [verdict.reward == 1.0 for verdict in verdicts]
    false_positives = [row for row, pays in zip(rows, paid, strict=True) if pays and not row["expected"]]
    right = sum(row["expected"] == pays for row, pays in zip(rows, paid, strict=True))
    assert false_positives == []
    assert right / len(rows) >= 0.998


def test_nothing_but_numerals_is_evaluated(monkeypatch) -> None:
    """Math-verify would read plain sums with sympy's `parse_expr`; to sympy's numbers their digits go through it."""
    evaluated, evaluate = [], sympy.parsing.sympy_parser.eval_expr

    def listen(code, *given):
        evaluated.append(str(code))
        return evaluate(code, *given)

    monkeypatch.setattr(sympy.parsing.sympy_parser, "eval_expr", listen)
    for text in ("1 + 1", "the answer is 1+1.", "final answer is: (1 + 1)", r"\boxed{1 + 1.5}", "$1 + 1$"):
        math_verifier.second_opinion("2", text)
    assert evaluated
    assert [code for code in evaluated if not re.fullmatch(r"(Integer|Float) \('?[\d.]+'? \)", code)] == []
