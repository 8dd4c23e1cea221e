r"""Decide whether a model's answer equals the reference answer. Pure functions: no process, no network, no torch.

`extract_answer` finds the answer in a response. `compare` decides exactly what numbers, text, lists and intervals can
decide (microseconds), and returns None for what needs algebra. `compare(..., algebra=True)` decides that too, with
math_expression.py and math-verify, and must run in a process that can be killed (`reward_server.WorkerPool`): model
output is hostile.

The policy, each line with a test in tests/test_verifier.py:

- Only the last 64 KB count, after the last `</think>`. The last balanced `\boxed{}`/`\fbox{}` wins (at most 16 tries,
  2,000 characters); then the last `Answer:` line, `####`, "final answer is". A bare last number only by option.
- An empty gold or an empty answer never pays.
- A list never pays for a single gold ("41 or 42" is a hedge). Parenthesised lists are ordered, bare lists and sets are
  not; if either side is parenthesised, order counts. Brackets of intervals matter.
- Integers and fractions are compared exactly (unreduced fractions are equal). A gold with a decimal point is compared
  to its printed digits: gold 3.14 accepts 3.14159 and \pi, gold 0.33 accepts 1/3; gold 1/3 does not accept 0.33.
- Thousands separators only between groups of three digits. `1\frac{1}{2}` and `1 1/2` are mixed numbers.
- Percent is accepted only if the gold says percent (then 50, 50\% and "50 percent" are equal); never a factor of 100.
- Degrees are not radians: a gold of 60 or 60^\circ accepts 60 and 60^\circ, never \pi/3; \cos 60 is not \cos 60^\circ.
- Numbers in another base are compared as written: 101_2 equals 101_{2}, and neither 101_3 nor 101 nor 5.
- `=` only as `symbol = value`, where a sum of different symbols counts as one (m + n = 42), or an equation where the
  gold is one; 1=42 is not 42, nor is x^2 = 42.
- Units only inside \text{} (\mathrm{}) or from a closed word list after a digit and a space, never single letters; two
  units that are both known and differ are wrong (degrees and percent are units too). Text that says more than a unit
  ("42 is wrong") is not a unit.
- Letter case matters for variables, not for words. Every variable of the gold must be the same in the answer.
- An answer outside the size limits (`too_complex`) is wrong; a gold outside them can only be matched as written.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import math_expression
from math_expression import NotReadable, TooBig

TAIL_CHARS = 65_536
MAX_BOX_CHARS = 2_000
MAX_BOX_TRIES = 16
MAX_LIST_ITEMS = 40
MAX_NESTING = 8  # lists in lists

Rest = tuple[bool, int]  # (algebra allowed, nesting depth), passed on by the comparisons of parts

# ---------------------------------------------------------------------------------------------------------------------
# Extraction
# ---------------------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}(?=\{)|\\boxed(?:\s{1,8}(?=[^\s{])|(?=\d))")
_ANSWER_LINE = re.compile(
    r"(?i)\banswer[ \t*_]{0,6}:[ \t*_]{0,8}([^\n]*)(?:\n\s{0,8}(?:(?:\$\$|\\\[)\s{0,8})?([^\n]*))?"
)
_HASHES = re.compile(r"(?m)####[ \t]*([^\n]*)")
_FINAL_IS = re.compile(r"(?i)final answer is[ \t]*:?[ \t]*([^\n]*)")
_IS_PREFIX = re.compile(
    r"(?i)^(?:so |thus |hence |therefore )?,? ?(?:the |my )?(?:final )?(?:answer|result|value)?"
    r" {0,4}(?:is|are|:|=) {0,4}:? {0,4}"
)
_SENTENCE_END = re.compile(r"(?<=[^.\s])\.(?=\s|$)(?!\s*\d)|\s{1,4}I hope it is correct|<\|[a-z_]{1,20}\|>|</s>")
# "The largest n is 34", but nothing with a second verb or a comma, which may say more.
_ONE_IS = re.compile(r"^(?:(?! is | are | not |[,;=]).){1,200} (?:is|are|equals) (?=[-+\d$\\(])(?!.* (?:is|are) )")
_MATH_SPAN = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_LAST_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


def _box_at(text: str, start: int) -> str | None:
    """The content of the group opening at `start`, or None if it does not close within MAX_BOX_CHARS."""
    if text[start] != "{":  # TeX's `\boxed 42`
        return text[start : start + 40].split()[0].strip("$.")
    depth = 0
    end = min(len(text), start + MAX_BOX_CHARS + 2)
    i = start
    while i < end:
        char = text[i]
        if char == "\\":  # an escaped brace is not a group
            i += 2
            continue
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : i]
        i += 1
    return None


def _last_box(text: str) -> str | None:
    """The last balanced box. Searching backwards keeps the cost at 16 boxes, however many the text opens."""
    stop = len(text)
    for _ in range(MAX_BOX_TRIES):
        start = max(text.rfind("\\boxed", 0, stop), text.rfind("\\fbox", 0, stop))
        if start < 0:
            return None
        match = _BOX.match(text, start)
        if match and match.end() < len(text):
            content = _box_at(text, match.end())
            if content is not None:
                return content
        stop = start
    return None


def _tidy_line(line: str) -> str:
    """The answer in a line of prose: without emphasis, "the answer is" and what follows the sentence."""
    line = line[:MAX_BOX_CHARS].strip().strip("*_").strip()
    line = _IS_PREFIX.sub("", line, count=1)
    if end := _SENTENCE_END.search(line):
        line = line[: end.start()]
    line = _ONE_IS.sub("", line, count=1)
    if line in ("$$", "\\["):  # the value is on the next line
        return ""
    span = _MATH_SPAN.match(line.lstrip(" *:="))  # anchored: a search would be quadratic in unclosed brackets
    if span and not span.string[span.end() :].strip(" *."):
        line = next(group for group in span.groups() if group is not None)
    return line.strip().strip("*").strip()[:MAX_BOX_CHARS]


def _last_match(pattern: re.Pattern[str], text: str, needles: tuple[str, ...], back: int) -> re.Match[str] | None:
    """The last match, `back` characters before a needle; searched backwards, as boxes are, with as many tries."""
    stop = len(text)
    for _ in range(MAX_BOX_TRIES):
        start = max(text.rfind(needle, 0, stop) for needle in needles)
        if start < 0:
            return None
        if start >= back and (match := pattern.match(text, start - back)):
            return match
        stop = start
    return None


def extract_answer(text: str, *, lenient: bool = False) -> str | None:
    """Return the answer written in a response, or None. Linear time, at most the last 64 KB are read."""
    text = text[-TAIL_CHARS:]
    think = text.rfind("</think>")
    if think >= 0:
        text = text[think + len("</think>") :]
    if "\\" in text:
        box = _last_box(text)
        if box is not None:
            return box.strip() or None
    line = _last_match(_ANSWER_LINE, text, ("nswer", "NSWER"), back=1)
    hashes = _last_match(_HASHES, text, ("####",), back=0)
    final = _last_match(_FINAL_IS, text, ("nswer is", "NSWER IS"), back=7)
    for match in (line, hashes, final):
        for value in match.groups() if match else ():
            if value and (tidy := _tidy_line(value)):
                return tidy
    if lenient:
        numbers = _LAST_NUMBER.findall(text)
        if numbers:
            return numbers[-1]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation: one spelling for what is written in many
# ---------------------------------------------------------------------------------------------------------------------

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "－": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ",     "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": "°", "º": "°", "√": r"\sqrt ", "±": r"\pm ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ℝ": r"\mathbb{R}", "∅": r"\emptyset ", "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}",
    "⅛": r"\frac{1}{8}", "∖": r"\setminus ", "，": ",", "（": "(", "）": ")", "％": "%", "．": ".", "。": ".", "′": "'",
    "’": "'", "\u2062": "", "\u200b": "", "\ufeff": "", "\u2009": r"\,", "\u202f": r"\,",
    "＝": "=", "＋": "+", "≈": r"\approx ",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])\s?\.?(?!\d)"
    r"|\\(?:normalsize|small|[lL]arge|LARGE|[hH]uge)(?![a-zA-Z])\s?|\\(?:textcolor|color)\s?\{[^{}]*\}"
)
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_ARGUMENT = r"\s*(?:(\d|[a-zA-Z]|\\[a-zA-Z]+)|(\{(?:[^{}]|\{[^{}]*\})*\}))"
_BARE_FRAC = re.compile(
    r"\\(frac|binom)(?:(?=\s*[^\s{])|(?=\s*\{(?:[^{}]|\{[^{}]*\})*\}\s*[^\s{]))" + _ARGUMENT + _ARGUMENT
)
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}")
_BARE_SQRT = re.compile(r"\\sqrt\s*([0-9a-zA-Z]|\\[a-zA-Z]+)|\\sqrt\s*\(([^()]*)\)")
# A backslash-space is a space; the first backslash of a row end is not looked at twice.
_SPACES = re.compile(
    r"(?<!\\)\\[;:> ]|\\q?quad(?![a-zA-Z])|\\(?:hspace|vspace|phantom)\*?(?:\{[^{}]*\}| ?[-+\d])|~|[\s\x00-\x1f]+"
)
_MATH_FONT = re.compile(
    r"\\(?:mathbf|mathcal|mathsf|mathtt|mathnormal|boldsymbol|bm|mathit|underline|operatorname\*?)\s*\{([^{}\\]*)\}"
)
_TEXT_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|emph|mbox|hbox|mathrm|rm|bf|it)\s*\{([^{}]*)\}"
    r"|\{\\(?:rm|bf|it|sf|tt|em)(?![a-zA-Z]) ?([^{}]*)\}"
)
_TEXT_FRACTION = re.compile(r"\\frac ?\{ ?\\text\{([^{}]*)\} ?\} ?\{ ?\\text\{([^{}]*)\} ?(\^ ?\d)? ?\}")  # km over h
_DEGREES = re.compile(
    r"\s?(?:\^ ?\{? ?\\circ ?\}?|\\(?:degree|textdegree)(?![a-zA-Z])|\\text\{ ?deg(?:ree)?s?\.? ?\}"
    r"|(?<=[\d}]) degrees?\b)"
)
_PERCENT = re.compile(r"\s?(?:\\%|\\text\{ ?(?:\\?%|per ?cent|percentage) ?\}|(?<=[\d}]) ?(?:per ?cent(?:age)?|pct)\b)")
_REALS = re.compile(
    r"\\mathbb\s*(?:\{\s*R\s*\}|R)|\\(?:R|Reals)(?![a-zA-Z])|\\text\{ ?(?:the set of )?all real(?: number)?s ?\}"
    r"|^(?:the set of )?all real(?: number)?s$"
)
_EMPTY_SET = re.compile(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"))
_NESTED_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_THIN_GROUP = re.compile(r"(?<=\d)(?:\\,|\\ |\{\\,\})(?=\d{3}(?!\d))")
_COMMA_SPACE = re.compile(r" ?\{ ?, ?\} ?(?=\d{3})|,\\! ?")
_THIN_SPACE = re.compile(r"\{\\,\}|(?<!\\)\\,")
_COMMANDS = (
    (re.compile(r"\\(?:leqslant|leqq|leq|le)(?![a-zA-Z])\s?"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geqq|geq|ge)(?![a-zA-Z])\s?"), r"\\ge "),
    (re.compile(r"\\(?:neq|ne)(?![a-zA-Z])\s?"), r"\\ne "),
    (re.compile(r"\\(?:lbrace)(?![a-zA-Z])\s?"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![a-zA-Z])\s?"), r"\\}"),
    (re.compile(r"\\langle(?![a-zA-Z])\s?"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])\s?"), ")"),
    (re.compile(r"\\text\{ ?infinity ?\}"), r"\\infty "),
    (re.compile(r"\\text\{ ?cis ?\}|(?<![a-zA-Z\\])cis(?![a-zA-Z])"), r"\\cis "),
    (re.compile(r"\\p?mod(?![a-zA-Z]) ?(\w+)"), r"\\pmod{\1}"),
    (re.compile(r"(?<=\d) ?\\text\{ ?to ?\} ?(?=\d)"), ":"),
    (re.compile(r"(?<=[\d.])\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?"), r"\\overline{\1\2\3}"),
    (re.compile(r"\\lt(?![a-zA-Z])\s?"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])\s?"), ">"),
)
_TO = re.compile(r"(?<=\d) to (?=\d)")  # 3 to 2
_ANSWER_IS = re.compile(
    r"(?i)^(?:the |my )?(?:final )?answer(?: is:? ?|: ?)|^\\text\{ ?(?:the )?(?:final )?answer(?: is:?|:) ?\} ?"
)
_NUMBER_IN_TEXT = re.compile(r"^\\text\{ ?([-+]?[\d.,/]+) ([a-zA-Z ./]+)\}$")  # \text{6 ways}
_ORDINAL = re.compile(r"(?<=\d)(?:\^?\{?\\text\{(?:st|nd|rd|th)\}\}?|(?:st|nd|rd|th))$")
_TEXT_IS_SYMBOL = frozenset("eidT")


def _fix_frac(match: re.Match[str]) -> str:
    one, two = (match[2] or match[3][1:-1]).strip(), (match[4] or match[5][1:-1]).strip()
    return rf"\{match[1]}{{{one}}}{{{two}}}"


def _fix_text(match: re.Match[str]) -> str:
    content = match[1] if match[1] is not None else match[2]
    inner = content.strip()
    if not inner:
        return " "
    if inner in _TEXT_IS_SYMBOL and "rm" in match[0][:8]:  # \mathrm{e}
        return inner
    if re.fullmatch(r"[-+]?[\d.,/]+", inner):  # \text{42}
        return inner
    return rf"\text{{{content}}}"


def _unwrap(text: str) -> str:
    """Strip math delimiters, emphasis, a whole-answer box and a trailing full stop."""
    for _ in range(6):
        before = text
        text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        text = text.removesuffix("\\\\")
        for left, right in _WRAPPERS:
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                inner = text[len(left) : -len(right)]
                if left not in inner and right not in inner:
                    text = inner
        match = _NESTED_BOX.match(text)
        if match and text.endswith("}") and _box_at(text, match.end() - 1) == text[match.end() : -1]:
            text = text[match.end() : -1]
        if text == before:
            break
    return text


def _to_ascii(text: str) -> str:
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    out = []
    for char in text:
        if char in _UNICODE:
            out.append(_UNICODE[char])
        elif not char.isascii() and unicodedata.decimal(char, None) is not None:
            out.append(str(unicodedata.decimal(char)))
        else:
            out.append(" " if char.isspace() else char)
    return "".join(out)


@lru_cache(maxsize=4_096)
def normalise(text: str) -> str:
    """Rewrite an answer to one canonical LaTeX spelling; says nothing about its value."""
    text = text.strip()
    if text.isdigit() and text.isascii():
        return text
    if not text.isascii():
        text = _to_ascii(text)
    text = _unwrap(text)
    if "\\" in text or "{" in text:
        text = _EMPTY_SET.sub(r"\\emptyset", _REALS.sub(r"(-\\infty,\\infty)", _SIZES.sub("", text)))
        text = _COMMA_SPACE.sub(",", text.replace("{,}", ",")).replace(r"\!", "")
        text = _SPACES.sub(" ", _THIN_SPACE.sub(" ", _THIN_GROUP.sub(",", text)))
        for _ in range(3):
            before = text
            text = _TEXT_FONT.sub(_fix_text, _MATH_FONT.sub(lambda m: m[1], text))
            if text == before:
                break
        text = _TEXT_FRACTION.sub(
            lambda m: rf"\text{{{m[1].strip()}/{m[2].strip()}{m[3] or ''}}}", _FRAC.sub(r"\\frac", text)
        )
        for _ in range(8 if text.count("\\frac") + text.count("\\binom") <= 40 else 0):
            before = text
            text = _BARE_FRAC.sub(_fix_frac, text)
            if text == before:
                break
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
        text = _BARE_SQRT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
        for pattern, replacement in _COMMANDS:
            text = pattern.sub(replacement, text)
    else:
        text = _TO.sub(":", _REALS.sub(r"(-\\infty,\\infty)", _SPACES.sub(" ", text)))
    text = _PERCENT.sub("%", _DEGREES.sub("°", text))
    text = _unwrap(_ANSWER_IS.sub("", _unwrap(text), count=1))
    text = _NUMBER_IN_TEXT.sub(r"\1\\text{ \2}", text)
    return _ORDINAL.sub("", text)


_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")


def _squeeze(text: str) -> str:
    """Without the spaces that mean nothing; `1 2` is not `12`, nor 1 1/2 11/2."""
    return _LOOSE_SPACE.sub("", text)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, exactly
# ---------------------------------------------------------------------------------------------------------------------

# canonical unit: its spellings. Two known units that differ make an answer wrong. Single letters only inside \text{}.
_UNIT_SPELLINGS = {
    "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "m": "meter metre",
    "km": "km kilometer kilometre",
    "in": "inch inches", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile", "kg": "kg kilogram", "g": "gram gm",
    "mg": "mg milligram", "lb": "lb pound", "oz": "oz ounce", "s": "sec second", "min": "min minute", "h": "hr hour",
    "day": "day", "week": "week", "month": "month", "year": "year yr", "l": "liter litre",
    "ml": "ml milliliter millilitre",
    "gal": "gallon", "dollar": "dollar usd", "cent": "cent", "euro": "euro", "mph": "mph", "km/h": "kmh kph km/h",
    "unit": "unit", "point": "point", "rad": "radian rad", "hz": "hz hertz", "am": "am a.m", "pm": "pm p.m",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _UNIT_SPELLINGS.items() for word in words.split()}
_UNITS |= {word + "s": unit for word, unit in _UNITS.items()}
_LETTER_UNITS = frozenset("m s g h l L N J W A V K C F".split())  # noqa: SIM905
# Further words that may follow a number and a space outside \text{}.
_COUNTED = frozenset(
    re.findall(
        r"\w+",
        "people students ways apples coins books marbles integers numbers solutions pairs triples cards balls times "
        "digits "
        "children boys girls men women tickets cookies pages cups eggs",
    )
)
_NOT_A_UNIT = re.compile(
    r"\b(?:is|are|was|not?|or|and|but|wrong|incorrect|false|true|if|then|than|the|answer|actually|should|be|nor|either|"
    r"neither|minus|plus|over|divided|more|less|it|its|that|this|because|since|so|million|billion|thousand|hundred|dozen|tenths?|hundredths?|thousandths?|"
    r"trillion|percent|base|mod|where|for|with|equals?|half|squared|cubed|maybe|possibly|approximately|about|to|mod)\b",
    re.I,
)
_TEXT_UNIT = re.compile(
    r" ?(?:[/·] ?|\\cdot ?)?\\text\{ ?([a-zA-Z](?:[a-zA-Z ./]|(?<=[a-zA-Z])\^-?[1-4]){0,40}?)\.? ?\}"
    r" ?(?:\^ ?\{? ?(-?[1-4]) ?\}?)?$"
)
_WORD_UNIT = re.compile(
    r"(?<=[\d}°)]) ((?:(?:sq|cu)\.? |square |cubic )?[a-zA-Z]{2,14}(?:/h)?|[ap]\.m)\.?(?: ?\^ ?\{?([23])\}?)?$"
)
_POWER_WORD = re.compile(r"(?i)(sq|square|cu|cubic)\.? (\w+)$")
_CURRENCY = re.compile(r"([-+]?) ?(\\\$|\$|€|£|\\pounds|\\euro|USD|US\\\$) ?(?=[-+]?[\d.])")
_TRAILING_CURRENCY = re.compile(r"(?<=\d) ?(\\\$|\$|€|£)$")
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MULTIPLE = re.compile(r"(?<=\d) ?(?:\\text\{ ?)?(" + "|".join(_MULTIPLES) + r")\b(?: ?\}| (?=[a-z ]*\}$))?")
_CELSIUS = re.compile(r"° ?(?:\\text\{ ?)?([CF])(?: ?\})?$")


def split_unit(text: str) -> tuple[str, str]:
    """Split trailing units off a normalised answer: ("5", "cm^2") for 5\\text{ cm}^2; "" if there is none."""
    units: list[str] = []
    for _ in range(3):
        match = _TEXT_UNIT.search(text)
        if not match or match.start() == 0:
            break
        words, power = match[1].strip(), match[2]
        if len(words.split()) > 4 or _NOT_A_UNIT.search(words):
            return text, ""
        if prefix := _POWER_WORD.match(words):
            words, power = prefix[2], "2" if prefix[1][0] in "sS" else "3"
        if len(words) == 1 and words not in _LETTER_UNITS:
            return text, ""  # 12k
        if words not in _LETTER_UNITS:
            words = _UNITS.get(words.lower(), words.lower())
        units.append(words + (f"^{power}" if power else ""))
        text = text[: match.start()].rstrip()
    if units:
        return text, "/".join(reversed(units))
    if match := _WORD_UNIT.search(text):
        words, power = match[1].lower(), match[2]
        if prefix := _POWER_WORD.match(words):
            words, power = prefix[2], "2" if prefix[1][0] == "s" else "3"
        if words in _UNITS or words in _COUNTED:
            return text[: match.start()].rstrip(), _UNITS.get(words, words) + (f"^{power}" if power else "")
    return text, ""


def units_differ(gold: str, answer: str) -> bool:
    """Whether two units contradict each other; a missing unit contradicts nothing, nor do "red balls" and "balls"."""
    if not gold or not answer or gold == answer:
        return False
    if gold in "%°" or answer in "%°":  # 60° is not 60 inches
        return True
    stems = [{word.rstrip("s") for word in re.findall(r"[a-zA-Z^0-9]+", unit)} for unit in (gold, answer)]
    return not stems[0] & stems[1] or gold.split("^")[0] in _UNITS.values()


_INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_INT}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<whole>{_DECIMAL})(?:\\overline ?\{{(?P<rep>\d+)\}})?"
    r"(?:[eE](?P<e>[+-]?\d{1,5})|"
    r"\s*(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?(?P<e1>[+-]? ?\d{1,5}) ?\}|(?P<e2>[+-]?\d{1,5})))?"
)
_SIGNED = rf"([+-]?) ?({_DECIMAL})"
_FRACTION = re.compile(rf"(?:(\d+) ?)?\\frac ?\{{ ?{_SIGNED} ?\}} ?\{{ ?{_SIGNED} ?\}}")
_SLASH = re.compile(rf"(?:(\d+) (?:and )?)?(){_DECIMAL.join('()')} ?/ ?(-?)({_DECIMAL})")


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value with what was written around it. `quantum` is the last printed digit of a decimal, else None."""

    value: Fraction
    quantum: Fraction | None = None
    percent: bool = False
    degrees: bool = False
    unit: str = ""


def _decimal(text: str) -> tuple[Fraction, Fraction | None]:
    whole, point, digits = text.replace(",", "").replace(" ", "").partition(".")
    if not point:
        return Fraction(int(whole)), None
    scale = 10 ** len(digits)
    return Fraction(int((whole or "0") + digits), scale), Fraction(1, scale)


def _unsigned(text: str) -> tuple[Fraction, Fraction | None] | None:
    match = _NUMBER.fullmatch(text)
    if match:
        value, quantum = _decimal(match["whole"])
        if match["rep"]:
            if quantum is None:
                return None
            value, quantum = value + quantum * Fraction(int(match["rep"]), 10 ** len(match["rep"]) - 1), None
        exponent = match["e"] or match["e1"] or match["e2"]
        if exponent:
            power = int(exponent.replace(" ", ""))
            if abs(power) > 1_000:
                return None
            value, quantum = value * Fraction(10) ** power, quantum and quantum * Fraction(10) ** power
        return value, quantum
    match = _FRACTION.fullmatch(text) or _SLASH.fullmatch(text)
    if not match:
        return None
    mixed, top_sign, top, bottom_sign, bottom = match.groups()
    if _decimal(bottom)[0] == 0:
        return None
    value = _decimal(top)[0] / _decimal(bottom)[0]
    if mixed:  # 2\frac{3}{2} is not a mixed number
        return (value + int(mixed), None) if value < 1 and not top_sign and not bottom_sign else None
    return (-value if (top_sign == "-") != (bottom_sign == "-") else value), None


@lru_cache(maxsize=4_096)
def parse_number(text: str) -> Number | None:
    """Parse a normalised answer that is one number, exactly; None if it is anything else."""
    if text.isdigit() and text.isascii() and len(text) <= 1_000:
        return Number(Fraction(int(text)))
    if len(text) > 1_000 or not any(char.isdigit() for char in text):
        return None
    unit = ""
    match = _CURRENCY.match(text) or _TRAILING_CURRENCY.search(text)
    if match:
        text = (match[1] + text[match.end() :]) if match.re is _CURRENCY else text[: match.start()]
        mark = match[2] if match.re is _CURRENCY else match[1]
        unit = "euro" if mark in ("€", "\\euro") else "sterling" if mark in ("£", "\\pounds") else "dollar"
    match = _CELSIUS.search(text)
    if match:
        text, unit = text[: match.start()], "°" + match[1]
    factor = 1
    match = _MULTIPLE.search(text)
    if match:  # "5 million", "5\\text{ million dollars}"
        rest = text[match.end() :].strip()
        text, factor = (
            text[: match.start()] + (f"\\text{{{rest}" if rest.endswith("}") else f" {rest}"),
            _MULTIPLES[match[1]],
        )
        text = text.strip()
    text, suffix = split_unit(text)
    unit = suffix or unit
    percent = degrees = negative = False
    for _ in range(5):  # -(5), (5)%, {5}, -5°
        if text.endswith("%") and not percent:
            text, percent = text[:-1].rstrip(), True
        elif text.endswith("°") and not degrees:
            text, degrees = text[:-1].rstrip(), True
        elif len(text) > 2 and text[0] + text[-1] in ("()", "{}") and "," not in text:  # (1,234) is a pair
            text = text[1:-1].strip()
        elif text[:1] in ("+", "-") and not negative:
            negative, text = text[0] == "-", text[1:].lstrip()
        else:
            break
    parsed = _unsigned(text)
    if parsed is None:
        return None
    value, quantum = parsed[0] * factor, parsed[1] and parsed[1] * factor
    return Number(-value if negative else value, quantum, percent, degrees, unit)


def numbers_equal(gold: Number, answer: Number) -> bool:
    """Compare two numbers by the policy: exact, or to the printed digits of a decimal gold."""
    if answer.percent and not gold.percent:
        return False
    marks = [number.unit or "%" * number.percent or "°" * number.degrees for number in (gold, answer)]
    if units_differ(*marks):
        return False
    if gold.value == answer.value or gold.quantum is None:
        return gold.value == answer.value
    scaled = abs(answer.value) / gold.quantum  # round half away from zero
    rounded = (2 * scaled.numerator + scaled.denominator) // (2 * scaled.denominator) * gold.quantum
    return (rounded if answer.value >= 0 else -rounded) == gold.value


# ---------------------------------------------------------------------------------------------------------------------
# Structure: lists, sets, tuples, intervals, unions, matrices, equations, text
# ---------------------------------------------------------------------------------------------------------------------


class UnparsableGold(Exception):
    """The reference answer itself cannot be read, so nothing can be said about the answer."""


def split_top(text: str, separators: str) -> list[str]:
    """Split at separator characters that are outside every bracket."""
    if not any(separator in text for separator in separators):
        return [text]
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        char = text[i]
        if char == "\\":
            if text[i + 1 : i + 2] in ("{", "}"):
                depth += 1 if text[i + 1] == "{" else -1
            i += 2
            continue
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif depth <= 0 and char in separators:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


_OR = re.compile(r",? ?\\text\{ ?,? ?or ?,? ?\} ?|,? or |,? ?\\(?:lor|vee)(?![a-zA-Z]) ?")
_AND = re.compile(r",? ?\\text\{ ?,? ?(?:and|or|&) ?,? ?\} ?|,? (?:and|or) |,? ?\\(?:lor|land|vee|wedge)(?![a-zA-Z]) ?")
_CUP = re.compile(r" ?\\cup(?![a-zA-Z]) ?")
_MEMBER = re.compile(r"^ ?\(?[a-zA-Z](?:_\{?\w\}?)?(?:, ?[a-zA-Z])?\)? ?\\in(?![a-zA-Z]) ?")
_APPROX = re.compile(r"^\\approx(?![a-zA-Z]) ?")
_MATRIX = re.compile(r"^[(\[]? ?\\begin ?\{([pbB]?matrix|array)\}(?: ?\{[lcr| ]*\})?(.*)\\end ?\{\1\} ?[)\]]?$", re.S)
_RELATION = re.compile(r" ?(\\le|\\ge|<|>) ?")
_FLIP = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_SYMBOL = re.compile(
    r"(?:\\?[A-Za-z]+|\\text\{[^{}]*\}"
    r"|\\(?:angle|overline|vec|hat|bar|mathbb|triangle) ?\{? ?[A-Za-z]+ ?\}?|\|[A-Za-z]+\|)"
    r"(?: ?_ ?(?:\{[^{}=]*\}|\w))?(?: ?\^ ?(?:(?:\{ ?-1 ?\}|-1)(?= ?\()|\*|\{\*\}))?'*(?: ?\([^()=]{0,40}\))?"
    r"|\( ?[a-zA-Z](?:_\w)?(?: ?, ?[a-zA-Z](?:_\w)?)+ ?\)|\[[A-Z]{3,8}\]|\\text\{[^{}]*\} ?\\?[a-zA-Z]{1,8}"
)
_SUM_OF_SYMBOLS = re.compile(r"[a-zA-Z](?:_\w)?(?: ?\+ ?[a-zA-Z](?:_\w)?){1,5}")  # m + n = 42
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z]+(?:(?:[' -]|\. ?)[A-Za-z]+)*[.!]?")
_PUNCTUATION = re.compile(r"[\s.,;:!'\"()]+")
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w)")
_CAPITALS = re.compile(r"[A-Z]{2,}")  # AC is an order or a name, so not CA
_SHORT_WORDS = frozenset("no yes odd all one two six ten any".split())  # noqa: SIM905
_BASE = re.compile(r"(-?)\(?([0-9A-Z]+)\)?_\{?(?:\\text\{ ?)?(\w+) ?\}?\}?")
_BASE_WORDS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_CHOICE = re.compile(r"\(?(?:\\text\{ ?)?\(?([A-J]|(?<=\()[a-j](?=\)))\)?[.:)]?(?: ?\})?\)?")
_CHOICE_WORD = re.compile(r"(?i)^(\\text\{ ?)?(?:option|choice|answer) ")
_CHOICE_PROSE = re.compile(r"(?:\\text\{ ?)?([A-J])[.:)] (?=[^\s,;+*/^%=_!)-])")  # A. 42
_CHOICE_LABEL = re.compile(r"(?:\\text\{ ?\(?([A-J])\) ?\}|\(([A-J])\)) ?(?=[^\s,;+*/^%=_!)-])")


# R \\ {1, 2} and x \ne 1
_SET_BUILDER = re.compile(r"\\\{ ?[a-z] ?(?:\\in ?\(-\\infty,\\infty\) ?)?(?::|\||\\mid|\\vert) ?(.+?) ?\\\}$")
_HOLES = re.compile(r"\(-\\infty,\\infty\) ?(?:\\setminus|\\backslash|-) ?\\\{([^{}]*)\\\}$|[a-zA-Z] ?\\ne (.+)$")


def _text_of(value: Fraction) -> str:
    return f"{value.numerator}/{value.denominator}"


@dataclass(frozen=True, slots=True)
class Group:
    """Several values: kind is the two brackets ("()", "[)", "{}", ...), "union", or "" for a bare list."""

    kind: str
    items: tuple[str, ...]
    variable: str = ""  # of an inequality


def parse_group(text: str) -> Group | None:
    """Read a normalised answer as a list, set, tuple, interval or union; None for a single item."""
    if "\\cup" in text:
        parts = [part for part in _CUP.split(text) if part]
        if len(parts) > 1:
            return Group("union", tuple(parts))
    interval = _inequality(text)
    if interval:
        return interval
    holes = _HOLES.match(text)
    points = [parse_number(item) for item in split_top(holes[1] or holes[2], ",")] if holes else [None]
    if holes and all(point and not point.percent for point in points):
        ends = ["-\\infty", *(_text_of(p.value) for p in sorted(points, key=lambda p: p.value)), "\\infty"]
        variable = text[0] if text[0].isalpha() else ""
        return Group("union", tuple(f"({a},{b})" for a, b in zip(ends, ends[1:], strict=False)), variable)
    if text.startswith("{") and _encloses(text) and len(split_top(text[1:-1], ",;")) > 1:
        text = "\\" + text[:-1] + "\\}"
    if (builder := _SET_BUILDER.match(text)) and (interval := _inequality(builder[1])):
        return interval
    brace = text.startswith("\\{")
    if (
        (brace or text[:1] in ("(", "["))
        and (text.endswith("\\}") if brace else text[-1:] in (")", "]"))
        and _encloses(text)
    ):
        items = split_top(_AND.sub(",", text[2:-2]) if brace else text[1:-1], ",;")
        if brace or len(items) > 1:
            return Group("{}" if brace else text[0] + text[-1], tuple(items))
        return None
    if ":" in text and "," not in text:  # 3:2, 8:34 p.m.
        parts = split_top(text, ":")
        if len(parts) > 1 and all(parse_number(part) for part in parts):
            return Group(":", tuple(parts))
    pieces = _OR.split(text)
    if len(pieces) > 1 and all(_inequality(piece) for piece in pieces):
        return Group("union", tuple(pieces))
    items = split_top(_AND.sub(",", text), ",;")
    if len(items) > 1 and not re.fullmatch(rf"[-+]?{_DECIMAL}", text):  # 1,234 is one number
        return Group("", tuple(item for item in items if item))
    return None


def _encloses(text: str) -> bool:
    """Whether the first bracket closes at the very end. `(` may close with `]` (half-open intervals)."""
    depth, i = 0, 0
    while i < len(text):
        char = text[i]
        if char == "\\" and text[i + 1 : i + 2] not in ("{", "}"):
            i += 2
            continue
        if char == "\\":
            i += 1
            char = text[i]
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0 and i < len(text) - 1:
                return False
        i += 1
    return depth == 0


def _inequality(text: str) -> Group | None:
    """Read `x < 3` or `1 \\le x < 2` as the interval it stands for; None if it is no such inequality."""
    if not ("<" in text or ">" in text or "\\le " in text or "\\ge " in text) or "=" in text or "," in text:
        return None
    parts = _RELATION.split(text)
    sides, signs = parts[0::2], parts[1::2]
    if len(sides) == 3 and (signs[0] in ("<", "\\le")) == (signs[1] in ("<", "\\le")) and _is_variable(sides[1]):
        if signs[0] in (">", "\\ge"):
            sides, signs = sides[::-1], [_FLIP[sign] for sign in signs[::-1]]
        return Group(
            ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]"), (sides[0], sides[2]), sides[1]
        )
    if len(sides) != 2 or not all(sides):
        return None
    sign = signs[0]
    if not _is_variable(sides[0]):
        sides, sign = sides[::-1], _FLIP[sign]
    if not _is_variable(sides[0]) or re.search(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", sides[1]):
        return None
    if sign in ("<", "\\le"):
        return Group("(" + (")" if sign == "<" else "]"), ("-\\infty", sides[1]), sides[0])
    return Group(("(" if sign == ">" else "[") + ")", (sides[1], "\\infty"), sides[0])


def _is_variable(text: str) -> bool:
    return bool(re.fullmatch(r"[a-zA-Z]|\\(?:theta|alpha|beta|lambda|mu|phi)", text.strip()))


def _expand_plus_minus(group: Group | None, text: str) -> Group | None:
    """`1 \\pm \\sqrt{2}` is a bare list of two."""
    if "\\pm" not in text:
        text = text.replace("\\mp", "\\pm")
    if "\\pm" not in text or (group and group.kind not in ("", "{}")):
        return group
    out: list[str] = []
    for item in group.items if group else (text,):
        if item.count("\\pm") == 1:
            left, right = item.split("\\pm")
            empty = not left.rpartition("=")[2].strip()  # \pm 3
            out += [left + ("" if empty else "+") + right, left + "-" + right]
        else:
            out.append(item)
    return Group(group.kind if group else "", tuple(out))


def _all(values: list[bool | None]) -> bool | None:
    """Three-valued and: one False decides."""
    if any(value is False for value in values):
        return False
    return None if any(value is None for value in values) else True


def _same_items(gold: tuple[str, ...], answer: tuple[str, ...], ordered: bool, rest: Rest) -> bool | None:
    if len(gold) != len(answer) or len(gold) > MAX_LIST_ITEMS or not all(gold) or not all(answer):
        return False
    if ordered or any("=" in item for item in gold):  # x = 1, y = 2 names its places
        in_order = _all([compare(g, a, *rest) for g, a in zip(gold, answer, strict=True)])
        if ordered or in_order is not False or not all("=" in item for item in answer):
            return in_order
    left, undecided = list(answer), False
    for g in gold:
        verdicts: list[bool | None] = []
        for index, a in enumerate(left):
            verdicts.append(compare(g, a, *rest))
            if verdicts[-1]:
                left.pop(index)
                break
        else:
            if None not in verdicts:
                return False
            undecided = True
    return None if undecided else True


def _bare(text: str) -> str:
    """The text inside one \\text{}, or the text itself."""
    match = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return match[1].strip() if match else text


def _words(text: str) -> str | None:
    """A textual answer in lower case without punctuation, or None if it is not text."""
    if text.lower() in _SHORT_WORDS:
        return text.lower()
    is_text = re.fullmatch(r"\\text\{[^{}]*\}", text) or (_WORDS.fullmatch(text) and not re.fullmatch("[a-z]{3}", text))
    return _plain(_bare(text)) or None if is_text else None


def _plain(text: str) -> str:
    return _ARTICLE.sub("", _PUNCTUATION.sub(" ", text.lower()).strip())


def compare(gold: str, answer: str, algebra: bool = False, depth: int = 0) -> bool | None:
    """Compare two answers by the policy. None: only algebra can decide (never with `algebra`, which needs a worker)."""
    gold, answer = normalise(gold), normalise(answer)
    if not gold or not answer or depth > MAX_NESTING:
        return False
    rest = (algebra, depth + 1)
    if gold == answer or _squeeze(_bare(gold)) == _squeeze(_bare(answer)):
        return True
    gold_number = parse_number(gold)
    if gold_number is None and gold.startswith("\\approx"):
        gold = _APPROX.sub("", gold)
        gold_number = parse_number(gold)
    if gold_number and gold_number.quantum:
        answer = _APPROX.sub("", answer)
    answer_number = parse_number(answer)
    if gold_number and answer_number:
        return numbers_equal(gold_number, answer_number)
    if too_complex(answer, MAX_BOX_CHARS):
        return False
    if too_complex(gold, MAX_BOX_CHARS):
        raise UnparsableGold(gold[:80])
    verdict = _compare_text(gold, answer)
    if verdict is not None:
        return verdict
    members = _MEMBER.match(gold), _MEMBER.match(answer)
    if members[0] and members[1] and _squeeze(members[0][0]) != _squeeze(members[1][0]):
        return False  # x \\in A is not y \\in A
    gold, answer = (text[m.end() :] if m else text for text, m in zip((gold, answer), members, strict=True))
    gold_group = None if gold_number else _expand_plus_minus(parse_group(gold), gold)
    answer_group = None if parse_number(answer) else _expand_plus_minus(parse_group(answer), answer)
    if bool(_MATRIX.match(gold)) != bool(_MATRIX.match(answer)):  # a column or a row is a point
        gold, answer = _vector(gold), _vector(answer)
        gold_group, answer_group = (parse_group(text) for text in (gold, answer))
    if gold_group or answer_group:
        return _compare_groups(gold, gold_group, answer, answer_group, rest)
    matrices = _MATRIX.match(gold), _MATRIX.match(answer)
    if matrices[0] and matrices[1]:
        rows = [[row.split("&") for row in m[2].strip().removesuffix("\\\\").split("\\\\")] for m in matrices]
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return False
        cells = [tuple(cell.replace("\\hline", "").strip() for row in m for cell in row) for m in rows]
        return _same_items(cells[0], cells[1], True, rest)
    return _compare_equations(gold, answer, rest)


def _vector(text: str) -> str:
    """A matrix of one row or one column as a point, `(1, 2, 3)`; anything else as it is."""
    match = _MATRIX.match(text)
    if match and match[1] != "vmatrix" and ("&" in match[2]) != ("\\\\" in match[2].strip().removesuffix("\\\\")):
        return "(" + re.sub(r" ?(?:&|\\\\) ?", ",", match[2].strip().removesuffix("\\\\").strip()) + ")"
    return text


def _compare_text(gold: str, answer: str) -> bool | None:
    """Decide choice letters, words and numbers in another base; None if the gold is none of these."""
    gold_choice = _CHOICE.fullmatch(gold)
    if gold_choice:
        answer = _CHOICE_WORD.sub(r"\1", answer)
    label = _CHOICE_LABEL.match(answer) or (gold_choice and _CHOICE_PROSE.match(answer))
    answer_choice = _CHOICE.fullmatch(answer) or label
    if gold_choice and answer_choice:
        rest = answer[label.end() :] if label else ""
        hedged = _AND.search(rest) or re.search(r"[,;]|\(?[A-J]\)", rest)
        return gold_choice[1].upper() == answer_choice[answer_choice.lastindex].upper() and not hedged
    if _CAPITALS.fullmatch(gold) and _CAPITALS.fullmatch(answer):
        return gold == answer
    gold_words, answer_words = _words(gold), _words(answer)
    if gold_words and answer_words:
        return gold_words == answer_words
    if gold_words and "=" not in answer and not _AND.search(answer):
        return _plain(re.sub(r"\\text\{([^{}]*)\}", r"\1", answer)) == gold_words
    bases = _BASE.fullmatch(_squeeze(gold)), _BASE.fullmatch(_squeeze(answer))
    if any(base and base[2][0].isdigit() for base in bases) and (bases[0] or parse_number(gold)):
        read = [base and (base[1], base[2], _BASE_WORDS.get(base[3], base[3])) for base in bases]
        return bool(read[0]) and read[0] == read[1]
    return None


def _compare_groups(
    gold: str, gold_group: Group | None, answer: str, answer_group: Group | None, rest: Rest
) -> bool | None:
    if gold_group is None or answer_group is None:
        group = gold_group or answer_group
        if group and len(group.items) == 1 and group.kind in ("", "{}") and group.items[0] != "\\emptyset":  # {5} and 5
            sides = (group.items[0], answer) if gold_group else (gold, group.items[0])
            return compare(*sides, *rest)
        if answer_group and "=" in answer.split(",")[0]:  # x = (1, 2)
            return _compare_equations(gold, answer, rest) if len(split_top(answer, ",;")) == 1 else False
        sides = split_top(gold, "="), split_top(answer, "=")
        if len(sides[0]) == 2 or len(sides[1]) == 2:
            return _compare_equations(gold, answer, rest)
        return False
    kinds = {gold_group.kind, answer_group.kind}
    if len(kinds) == 2 and "{}" in kinds and "" not in kinds:  # {(1, 2)} and (1, 2)
        for group, sides in ((gold_group, (gold[2:-2], answer)), (answer_group, (gold, answer[2:-2]))):
            if group.kind == "{}" and len(group.items) == 1:
                return compare(*sides, *rest)
    if gold_group.variable and answer_group.variable and gold_group.variable != answer_group.variable:
        return False
    if kinds <= {"", "{}"} or kinds == {"union"}:
        return _same_items(gold_group.items, answer_group.items, False, rest)
    if "union" in kinds or "{}" in kinds:
        return False
    if len(kinds) == 2 and kinds != {"", "()"} and len(gold_group.items) == 2:
        return False  # the brackets of intervals matter
    return _same_items(gold_group.items, answer_group.items, True, rest)


def _compare_equations(gold: str, answer: str, rest: Rest) -> bool | None:
    gold_sides, answer_sides = split_top(gold, "="), split_top(answer, "=")
    if len(gold_sides) == 1 and len(answer_sides) == 1:
        return _compare_values(gold, answer, rest)
    if not all(answer_sides) or not all(gold_sides) or len(answer_sides) > 8:
        return False
    gold_assigns = len(gold_sides) == 2 and _SYMBOL.fullmatch(gold_sides[0])
    if len(gold_sides) == 1:  # "symbol = value", or "symbol = value = value" with every value right
        parts = answer_sides[0].replace(" ", "").split("+")
        is_sum = _SUM_OF_SYMBOLS.fullmatch(answer_sides[0]) and len(set(parts)) == len(parts)
        if not is_sum and not _SYMBOL.fullmatch(answer_sides[0]):
            return False
        return _all([compare(gold, side, *rest) for side in answer_sides[1:]])
    if len(answer_sides) == 1:
        return compare(gold_sides[1], answer, *rest) if gold_assigns else False
    if len(gold_sides) != 2 or len(answer_sides) != 2:
        return False
    if gold_assigns and _SYMBOL.fullmatch(answer_sides[0]):
        names = [re.sub(r"[\s{}\\]|text", "", side) for side in (gold_sides[0], answer_sides[0])]
        if names[0] == names[1]:
            return compare(gold_sides[1], answer_sides[1], *rest)
        if parse_number(gold_sides[1]):
            return False  # x = 1 is not y = 1
    for sides in (answer_sides, answer_sides[::-1]):
        if _all([compare(g, a, *rest) for g, a in zip(gold_sides, sides, strict=True)]):
            return True
    if not rest[0]:
        return None
    try:
        trees = [math_expression.parse(f"({left})-({right})") for left, right in (gold_sides, answer_sides)]
        return math_expression.proportional(*trees)
    except (NotReadable, TooBig):
        return False


def _compare_values(gold: str, answer: str, rest: Rest) -> bool | None:
    """Two single values of which at least one is an expression: units and percent, exact arithmetic, then algebra."""
    quantum = number.quantum if (number := parse_number(gold)) else None
    (gold, gold_unit), (answer, answer_unit) = split_unit(gold), split_unit(answer)
    if units_differ(gold_unit, answer_unit) or (answer.endswith("%") and not gold.endswith("%")):
        return False
    gold, answer = gold.removesuffix("%").rstrip(), answer.removesuffix("%").rstrip()
    if answer.endswith("%"):
        return False
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc|cis)", gold + answer):  # degrees around a value are a unit
        gold, answer = gold.replace("°", ""), answer.replace("°", "")
    if answer.startswith("\\text") and _CHOICE_LABEL.match(answer):  # (B) 5
        answer = _CHOICE_LABEL.sub("", answer, count=1)
        return compare(gold, answer, *rest)
    if "\\text" in answer and "\\text" not in gold:
        return False  # prose around a value is not a value
    if _squeeze(gold) == _squeeze(answer):
        return bool(gold)
    if too_complex(gold):
        raise UnparsableGold(gold[:80])
    if too_complex(answer) or bool(_RELATION.search(gold)) != bool(_RELATION.search(answer)):
        return False
    trees: list[math_expression.Node | None] = []
    for text in (gold, answer):
        try:
            trees.append(math_expression.parse(text))
        except NotReadable:
            trees.append(None)
        except (TooBig, RecursionError):
            if text is gold:
                raise UnparsableGold(gold[:80]) from None
            return False
    if trees[0] and trees[1]:
        # Small exact arithmetic may run anywhere; thousands of digits only where time does not matter.
        bits = 400_000 if rest[0] else math_expression.MAX_BITS
        values = [math_expression.rational(tree, bits) for tree in trees]
        if values[0] is not None and values[1] is not None:
            return numbers_equal(Number(values[0], quantum), Number(values[1]))
        if not rest[0]:
            return None
        try:
            verdict = math_expression.trees_equal(*trees, quantum)
        except TooBig:
            return False
        if verdict is not None:
            return verdict
    if not rest[0]:
        return None
    verdict = math_expression.math_verify_equal(gold, answer)
    if verdict is None:
        raise UnparsableGold(gold[:80])
    return verdict


_LONG_EXPONENT = re.compile(r"\^ ?\{? ?[-+]? ?\d{6}|\d{400}")
_BIG_FACTORIAL = re.compile(r"\d{5} ?\}?\)? ?!|! ?!|\) ?! ?\) ?!|\\binom ?\{? ?\d{7}")
_TOWER = re.compile(r"(?:\^ ?\{[^{}]{0,40}){4}|(?:\^ ?\(?\d+\)?){3}")


def too_complex(text: str, length: int = 600) -> bool:
    """Cheap screen against answers made to exhaust the symbolic tier. Linear in the text."""
    if len(text) > length or text.count("^") > 60 or text.count("\\frac") > 60 or text.count("!") > 8:
        return True
    if text.count("\\pm") > 4 or text.count("\\text") > 20:
        return True
    if text.count("\\sum") + text.count("\\prod") + text.count("\\int") > 4 or _BIG_FACTORIAL.search(text):
        return True
    if _LONG_EXPONENT.search(text) or (text.count("^") > 2 and _TOWER.search(text)):
        return True
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest > 24
