r"""Decide whether a model's answer equals the reference answer. Pure functions: no process, no network, no torch.

`extract_answer` finds the answer in a response. `compare` decides exactly, in microseconds, what takes only numbers,
text, lists and sets, and raises NeedsAlgebra for the rest. `compare(..., algebra=True)` also decides the rest, with
math-verify's parser and sympy. It must run in a process that can be killed: model output is hostile.

An answer passes through four steps: extract -> normalise (one spelling) -> read (a number, a group such as a list or a
tuple, a set of reals, an equation, text, or else an expression) -> compare by what was read.

docs/verifier.md says what equals what, and tests/test_verifier.py tests each line of it. In doubt an answer does not
pay: reinforcement learning finds every wrong answer that pays.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

TAIL_CHARS = 65_536
MAX_BOX_CHARS = 2_000
MAX_TRIES = 16
MAX_STRUCTURE_CHARS = 1_000  # a longer answer is right only if it is a number, or written like the gold
MAX_LIST_ITEMS = 40
MAX_NESTING = 24  # of brackets


class NeedsAlgebra(Exception):
    """Only sympy can decide, which must run in a process that can be killed."""


class UnparsableGold(Exception):
    """The reference answer itself cannot be read, so nothing can be said about the answer."""


_BRACKET = re.compile(r"\\.|.", re.S)


def _walk(text: str) -> Iterator[tuple[int, str, int]]:
    """Position, text and depth of brackets after it of every token: a character, or a backslash and the next one."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += (match[0] in ("(", "[", "{", "\\{", "⟦")) - (match[0] in (")", "]", "}", "\\}", "⟧"))
        yield match.start(), match[0], depth


# -- Extraction -------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}(\{)|\\boxed(?:\s{1,8}|(?=\d))([^\s{]\S{0,39})")
_BETWEEN_BOXES = re.compile(
    r"(?=.*(?:[,;]|and|quad|or))"
    r"(?:[\s$*,;(]|\\[()\[\],;: ]|\\q?quad(?![a-zA-Z])|\\text\{[ ,]{0,3}(?:and|or)[ ,]{0,3}\}|\b(?:and|or)\b)+",
    re.S,
)
# The first letter is left out: the marker is found by searching backwards for "nswer".
_STATEMENT = re.compile(
    r"(?i)(?:(?<=\ba)nswer[ \t*_]{0,6}[:：]|(?<=final a|rrect a)nswer is\b[ \t]*:?|####|答案[是为]?[ \t]*[:：]?)"
    r"[ \t*_]{0,8}([^\n]*)(?:\n\s{0,8}(?:(?:\$\$|\\\[)\s{0,8})?([^\n]*))?"
)
_SENTENCE_END = re.compile(
    r"(?<=[^.\s])(?:[.?]|(?<!\d)!)(?=\s|$)(?!\s*\d)|\s{1,4}I hope it is correct|<\|[a-z_]{1,20}\|>|</s>|</answer>"
    r"| (?:since|because) |, [a-z]{4,20}\.?$"
)
# "The largest n is 34", but nothing with a negation, a second verb or a comma: those may say more than a value.
_SUBJECT = re.compile(
    r"^(?:(?! is | are |\b(?:not?|nor|never|except|hardly)\b|[,;=]).){1,200} "
    r"(?:is|are|equals):? +(?=[-+\d$\\(])(?!.* (?:is|are) )"
)
_PERCENT = r"(?: ?\\?%| ?(?:percent|pct)\b)"
_LAST_NUMBER = re.compile(rf"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?{_PERCENT}?")
_PROSE = re.compile(r"[A-Za-z]{2,} [A-Za-z]{2,}|[\u0400-\u1fff\u3040-\u9fff]{2}")
_VALUE = re.compile(r"\d|\\(?!end|\])")
_SAID = re.compile(r"(?i)\b(?:answer|solution|result)(?: is\b|:)|<answer>")
_DISPLAY = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(([^\n]+?)\\\)|\\\[(.+?)\\\]|\*\*([^*\n]+)\*\*"
    r"|\\begin\{align\*?\}(.+?)\\end\{align",
    re.S,
)
_BROKEN_FORMULA = re.compile(r"\n\s*(?:\$|\\\))\s*\Z")  # TeX has no inline formula over several lines
_MISTYPED_BOX = re.compile(r"\\boxed\{([^{}\\]+)\\\}(?=\s*\$)")
_NOTE = re.compile(r"(?<=[^\sa-zA-Z]) ?(?:\\approx|≈).*", re.S)


def _closing(text: str, start: int) -> int:
    """Where the brace at `start` is closed; -1 if that is not within MAX_BOX_CHARS."""
    depth = 0
    for match in _BRACKET.finditer(text, start, start + MAX_BOX_CHARS + 2):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return match.start()
    return -1


def _backwards(text: str, *needles: str) -> Iterator[int]:
    """Positions of the needles, the last one first, at most MAX_TRIES of them to keep the cost low."""
    stop = len(text)
    for _ in range(MAX_TRIES):
        stop = max(text.rfind(needle, 0, stop) for needle in needles)
        if stop < 0:
            return
        yield stop


def _last_boxes(text: str) -> tuple[int, str] | None:
    """Where the last closed box opens, and its contents, in one list with those of the boxes that are joined to it."""
    contents: list[str] = []
    last = following = 0
    for place in _backwards(text, "\\boxed", "\\fbox"):
        match = _BOX.match(text, place)
        end = _closing(text, match.end() - 1) if match and match[1] else match.end() - 1 if match else -1
        if contents and end > last:  # a box around the boxes so far is the answer
            contents.clear()
        between = text[end + 1 : following][:80] if contents else ""
        if contents and (end < 0 or not _BETWEEN_BOXES.fullmatch(between)):
            break
        if "or" in between:
            return last, ""  # a hedge
        if end >= 0:
            last, following = (last if contents else place), place
            contents.insert(0, text[match.end() : end].strip() if match[1] else match[2].strip("$."))
    return (last, ", ".join(contents) if all(contents) else "") if contents else None


def _tidy_line(line: str) -> str:
    """The answer in a line of prose, without emphasis, "the answer is" and what follows the sentence."""
    line = line[:MAX_BOX_CHARS].strip().strip("*_ ")
    line = _SENTENCE_END.split(line if "\\[" in line else line.removesuffix("\\]"), maxsplit=1)[0]
    line = _SUBJECT.sub("", re.sub(r"\*\*(?= [a-z]{2})", "", line)).strip(" *:=")
    return "" if line in ("$$", "\\[") else _unwrap(line)


def _last_statement(text: str) -> str | None:
    """What the last "Answer: ..." or the like says."""
    for place in _backwards(text, "nswer", "NSWER", "####", "答案"):
        match = _STATEMENT.match(text, place)
        for line in match.groups() if match else ():
            if line and (value := _tidy_line(line)):
                return value
    return None


def _last_side(formula: str) -> str:
    """The last side of a chain, without a note such as `\\approx 1.3`; lists and equations of variables stay whole."""
    formula = re.sub(r"\\approx|≈", "=", _NOTE.sub("", formula.rstrip(" .")))
    sides, _ = _split(formula, "=")
    chain = len(sides) > 2 or not re.search(r"(?<![\\a-zA-Z])[a-z](?![a-z])", sides[0])
    return sides[-1].strip(" &") if chain and not re.search(r",(?!\d{3}|\\!)|[<>!]=", formula) else formula


def _fall_back(text: str) -> str | None:
    """What the last "answer is" says; else the last formula, or the last number if that comes later."""
    if _BROKEN_FORMULA.search(text):
        return None
    text = _MISTYPED_BOX.sub(r"\1", text)
    whole, *said = _SAID.split(text[-MAX_BOX_CHARS:])
    text = (said[-1] if said else whole).strip()
    line = _tidy_line(text.partition("\n")[0]) if said else text.rpartition("\n")[2]
    if (line == text or _VALUE.search(line)) and not _PROSE.search(line) and not _DISPLAY.search(line):
        return _last_side(line) or None
    formulas = [(match.end(), match[match.lastindex]) for match in _DISPLAY.finditer(text)]
    end, formula = next((found for found in reversed(formulas) if _VALUE.search(found[1])), (formulas or [(0, "")])[-1])
    numbers = _LAST_NUMBER.findall(text, end)
    percent = re.match(_PERCENT, text[end:])
    return numbers[-1] if numbers else _last_side(formula) + (percent[0] if percent else "") or None


def after_reasoning(text: str) -> str:
    """What follows the last `</think>`, its last 64 KB; a thought that was cut off does not count."""
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    text = text[:opened] if opened > closed else text[max(closed, 0) :].removeprefix("</think>")
    return text[-TAIL_CHARS:]


def extract_answer(text: str, *, lenient: bool = False) -> str | None:
    """Return the answer written in a response, or None. Linear time."""
    text = after_reasoning(text)
    place, box = _last_boxes(text) or (0, None)
    answer = _last_statement(text[place:]) or box
    if answer is None:
        return _fall_back(text) if lenient else None
    if lenient and _PROSE.search(answer) and len(numbers := _LAST_NUMBER.findall(answer)) == 1:
        return numbers[0]
    return answer[:MAX_BOX_CHARS] or None


# -- Normalisation: one spelling for what is written in many ----------------------------------------------------------


def _table(rows: str) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Rewriting rules, one on each line: a pattern, at least two spaces, a replacement in which ~ is a space."""
    pairs = [re.split(" {2,}", row.strip()) for row in rows.strip().splitlines()]
    return tuple((re.compile(pair[0], re.S), (pair[1:] or [""])[0].replace("~", " ")) for pair in pairs)


def _dictionary(rows: str) -> dict[str, str]:
    """`leq le ≤|geq ge ≥` as {"leq": "≤", "le": "≤", ...}; ~ is a space."""
    words = [row.split() for row in rows.split("|")]
    return {name: value.replace("~", " ") for *names, value in words for name in names}


# Signs to LaTeX, and commands to the signs ≤ ≥ ≠ ± ≈ ∪ ∖ ∞, which are easier to look for.
_SIGNS = str.maketrans(
    _dictionary(r"""− – — ‐ ‑ -|× \times~|· ⋅ ∙ • \cdot~|÷ ∕ /|π \pi~|∩ \cap~|∈ \in~|º °|′ ’ '|θ \theta~|α \alpha~
    |β \beta~|λ \lambda~|ℝ \mathbb{R}|∅ \emptyset~|。 .|、 ,|⌊ \lfloor~|⌋ \rfloor~|⌈ \lceil~|⌉ \rceil~|和 \text{~and~}
    |或 \text{~or~}|√ \sqrt~|∛ \sqrt[3]|¢ \text{~cents}|→ \to~|€ EUR|£ GBP""")
    | {"\u2009": r"\,", "\u202f": r"\,"}
)
_COMMANDS = _dictionary(r"""le leq leqq leqslant ≤|ge geq geqq geqslant ≥|ne neq ≠|lt <|gt >|pm ±|approx ≈|cup ∪
    |setminus backslash ∖|infty ∞|lbrace \{|rbrace \}|langle (|rangle )|dfrac tfrac cfrac \frac~|dbinom tbinom \binom~
    |varnothing \emptyset~|euro EUR|pounds GBP|degree textdegree °|lvert rvert vert mid ¦|colon :|R Reals \mathbb{R}
    |left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits nolimits
    normalsize small large Large LARGE huge Huge hline quad qquad ~""")
_MARKS = {"<super>": "^{%s}", "<sub>": "_{%s}"}
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_TOKEN = r"(?:[0-9a-zA-Z]|\\[a-zA-Z]+)"  # what TeX takes as an argument without braces
_BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_NEAT = re.compile(r"[-+]?[\d.,]{1,40}|[a-zA-Z]")  # nothing to rewrite but the commas
_END = re.compile(r"(?<![\\,.\s])(?:[\\,\s]|(?<!\.)\.)+$")  # from the start of a run only, or the search is quadratic
_WRAPPED = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]"
    r"|\*\*([^*]+)\*\*|([`\"'])([^`\"']+)\6|\\(?:boxed|fbox|mathbf|boldsymbol|bm|underline)\s*\{(.*)\}",
    re.S,
)
_GROUPED = re.compile(
    # 1{,}234 and 1\,234; then 1,234, but in (1,234) and \{1,234,567\} the comma separates.
    r"(?<![\d.])[1-9]\d{0,2}(?: ?(?:\{ ?, ?\}|,\\! ?|\{?\\,\}?|\\ )(?=\d{3})\d{3})+(?!\d)"
    r"|(?<![\d.])(?<!\d,)(?<![(\[])(?<![(\[] )(?<!\\\{)[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)"
    r"|(?<=[(\[])[1-9]\d{0,2}(?:,\d{3})+(?=[^\d,)\]\\]|, )|(?:^|(?<=^-))[1-9]\d{0,2}(?: \d{3})+$"
)
_FONTS = _table(r"""
    \\(?:mathbf|mathcal|mathsf|mathtt|mathnormal|boldsymbol|bm|mathit|underline|operatorname\*?)\s*\{([^{}\\]*)\}  \1
    \\mathrm\s*\{ ?([eidT]) ?\}  \1
    \\(?:text(?:bf|it|rm|sf|tt|normal|up)|emph|[mh]box|mathrm|rm|bf|it)\s*\{([^{}]*)\}  \\text{\1}
    \\text\s*\{ *((?:\\\$)?[-+]?[\d.,/]*) *\}  ~\1
""")
_OPERAND = rf"((?:(?!\\over(?![a-zA-Z]))[^{{}}=<>≤≥,]|{_BRACES})*)"
_QUOTIENT = rf"{_OPERAND}\\over(?![a-zA-Z]){_OPERAND}"
# {a \over b}, or a whole a \over b; the first line leaves the braces where they may be an argument's.
_OVER = _table(
    rf"""
    (?:(?<=[a-zA-Z}}\]^_])|(?<=[a-zA-Z}}\]^_] ))\{{{_QUOTIENT}\}}  {{\\frac{{\1}}{{\2}}}}
    (?<!\\)\{{{_QUOTIENT}\}}|^{_QUOTIENT}$  \\frac{{\1\3}}{{\2\4}}
    """
)
_SPELLING = _table(
    rf"""
    (?<=\\\\)\[[\d.]+[a-z]+\]|,?\\!|\\(?:textcolor|color)\s?\{{[^{{}}]*\}}
    (?<!\\)\\[,;:> ]|\{{\\,\}}|\\[hv]space\*?\{{[^{{}}]*\}}|~|[\s\x00-\x1f]+  ~
    (?:\{{ ?\}})?\^ ?\{{?(\d+)\}}? ?C ?_ ?\{{?(\d+)\}}?  \\binom{{\1}}{{\2}}
    <=  ≤
    >=  ≥
    !=  ≠
    ^[a-zA-Z] ?\\in ?(?=\\\{{ ?-?\d)
    \+? ?∞|\\text\{{ ?infinity ?\}}|(?<![a-zA-Z\\])infinity(?![a-zA-Z])  ∞
    (?<=[\d.])\\dot ?\{{?(\d)\}}?(?:(\d*)\\dot ?\{{?(\d)\}}?)?  \\overline{{\1\2\3}}
    (?<=\d\.)(\d*)\((\d+)\)$|(?<=[\d.])\\bar ?\{{?(\d+)\}}?|(?<=[\d.])\\overline ?(\d)(?!\d)  \1\\overline{{\2\3\4}}
    \s?(?:\^ ?\{{? ?(?:\\circ|°) ?\}}?|\\text\{{ ?deg(?:ree)?s?\.? ?\}}|(?<=[\d}}]) degrees?\b)  °
    \s?(?:\\%|\\text\{{ ?(?:\\?%|per ?cent(?:age)?|pct) ?\}}|(?<=[\d}}]) ?(?:per ?cent(?:age)?|pct)\b)  %
    \\text\{{ ?(?:the set of )?all real(?: number)?s ?\}}|^(?:the set of )?all real(?: number)?s$  \\mathbb{{R}}
    \\mathbb ?\{{? ?R ?\}}? ?(?:[\^_] ?\{{?\+\}}?|_ ?\{{ ?> ?0 ?\}})  (0,∞)
    \\mathbb ?(?:\{{ ?R ?\}}|R(?![a-zA-Z]))(?! ?[_^])  (-∞,∞)
    \\\{{\s*\\\}}  \\emptyset
    (\\frac|\\binom) ?({_TOKEN})  \1{{\2}}
    (\\(?:frac|binom) ?{_BRACES}) ?({_TOKEN})  \1{{\2}}
    ^\\\{{ ?((?:[-+\d./]|\\frac ?\{{\d+\}} ?\{{\d+\}})+) ?\\\}}$  \1
    \\sqrt ?(\[[^\]]*\])? ?(\d+(?:\.\d+)?|{_TOKEN})  \\sqrt\1{{\2}}
    (?<![a-zA-Z}}\]_^])\{{ ?\}}
    \( ?(≈[^()]*)\)$  \1
    (?i)^(?:the |my )?(?:final )?answer(?: is:? ?|: ?)|^\\text\{{ ?(?:the )?(?:final )?answer(?: is:?|:) ?\}} ?
    ^\\text\{{ ?([-+]?[\d.,/]+) ([a-zA-Z ./]+)\}}$  \1\\text{{~\2}}
    \\?\$(?= ?[-+]?[\d.\\])|(?<=\d) ?\\?\$$  USD
    (?:^|(?<=[=≈])) ?([-+]?) ?(?:US)?(USD|EUR|GBP) ?(.*)  \1\3\\text{{~\2}}
    (?<=\d) ?(USD|EUR|GBP)$  \\text{{~\1}}
    """
)
_ROWS = re.compile(
    r"([^,;=<>≤≥]*?)([(\[]?)\\begin ?\{((?:[pbB]|small)?matrix|array|cases|aligned|align\*?|gathered)\}"
    r"(?: ?\{[lcr| ]*\})?(.*)\\end ?\{\3\} ?[)\]]? ?(\^ ?\{?(?:T|\\top)\}?)?",
    re.S,
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline ?\{(\d+)\}")
# Spaces that mean nothing. Others do: 1 2 is not 12, and 1 1/2 is not 11/2.
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")


def _fix_rows(match: re.Match[str]) -> str:
    """A system of equations as a list, a matrix as ⟦(a, b), (c, d)⟧, with the factor before it in each cell."""
    factor, bracket, kind, body, transposed = (match[1].strip(), *match.groups()[1:])
    body = re.sub(r"& ?([=<>≤≥])|(=) ?&", r"\1\2", body)
    rows = [row.split("&") for row in re.split(r"[\s,]*\\\\[\s,]*", body.strip(" ,").removesuffix("\\\\"))]
    if "matrix" not in kind and "&" not in body and not factor + bracket:
        return ", ".join(row[0].strip() for row in rows)
    if len(set(map(len, rows))) != 1 or "\\begin" in factor + body:
        return match[0]
    factor += "1" * (factor == "-")
    cells = [[f"({factor})({cell})" if factor else cell.strip() for cell in row] for row in rows]
    cells = list(zip(*cells, strict=True)) if transposed else cells
    return "⟦" + ", ".join("(" + ", ".join(row) + ")" if len(row) > 1 else row[0] for row in cells) + "⟧"


def _fix_repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as \frac{15}{90}."""
    whole, once, again = match.groups()
    return rf"\frac{{{int(whole + once + again) - int('0' + whole + once)}}}{{{'9' * len(again)}{'0' * len(once)}}}"


def _unwrap(text: str) -> str:
    """Strip math delimiters, emphasis, a whole-answer box, a trailing full stop or comma."""
    for _ in range(6):
        text = _END.sub("", text).strip()
        match = _WRAPPED.fullmatch(text)
        if not match or (match[8] is not None and _closing(text, text.index("{")) != len(text) - 1):
            break
        text = match[match.lastindex]
    return text


def _to_ascii(text: str) -> str:
    """Other alphabets' digits, superscripts, fractions and mathematical signs as LaTeX."""
    parts = []
    marked = itertools.groupby(text.translate(_SIGNS), lambda char: unicodedata.decomposition(char).split(" ")[0])
    for mark, run in marked:
        plain = unicodedata.normalize("NFKC", "".join(run)).translate(_SIGNS)
        parts.append(_MARKS.get(mark, "%s") % re.sub(r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}", plain))
    visible = (char for char in "".join(parts) if unicodedata.category(char) != "Cf")
    return "".join(char if char.isascii() else str(unicodedata.decimal(char, char)) for char in visible)


@lru_cache(maxsize=4_096)
def normalise(text: str) -> str:
    """Rewrite an answer to one canonical spelling, whatever its value."""
    text = _unwrap(text if text.isascii() else _to_ascii(text))
    if text.isdigit():
        return text
    if text.replace("\\$", "").count("$") % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    if "\\begin" not in text:  # JSON's \\frac, or the end of a line
        text = text.replace("\\\\", "\\")
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    if not _NEAT.fullmatch(text):
        text = _COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), text).replace("¦", "|")
        rules = _OVER * 3 if "\\over" in text else ()
        for pattern, replacement in rules + (_FONTS * 3 if "\\" in text else ()) + _SPELLING:
            text = pattern.sub(replacement, text)
        text = _REPEATING.sub(_fix_repeating, text)
        text = _unwrap(_fix_rows(rows) if (rows := _ROWS.fullmatch(text)) else text)
    return text


def _bare(text: str) -> str:
    """The text without \\text{}."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()


# -- Numbers, exactly, and the units behind them ----------------------------------------------------------------------

# Known units: canonical name and spellings.
_UNIT_SPELLINGS = """cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|ft foot feet
in inch inches|yd yard|mi mile|kg kilogram|g gram gm|mg milligram|lb pound|oz ounce|s sec second|min minute|h hr hour
l liter litre|mol mole|ml milliliter millilitre|gal gallon|dollar usd|cent|euro eur|gbp|mi/h mph|km/h kmh kph|unit|point
rad radian|hz hertz|am a.m|pm p.m|day|week|month|year yr|people person|child children|man men|woman women|way|solution
yuan|n newton|j joule|w watt|v volt|c|f"""
_UNITS = {
    word + plural: row.split()[0]
    for row in re.split(r"[|\n]", _UNIT_SPELLINGS)
    for word in row.split()
    for plural in ("", "s" * (len(word) > 1))
}
# Words after a number that change its value or take it back.
_COUNT = (
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty"
    r"|sixty|seventy|eighty|ninety|hundred|thousand|million|billion|trillion|dozen|score|half|halve|third|quarter"
)
_NOT_A_UNIT = re.compile(
    rf"\b(?:(?:{_COUNT}|negative|inverse|factorial|reciprocal|guesse?|percent(?:age|ile)?|root|basi)s?"
    rf"|(?:{_COUNT}|\w+tie|fif|eigh|nin|twelf)ths?"
    r"|is|was|isn|not?|or|and|but|if|then|than|the|be|nor|neither|either|minus|plus|times|over|by|divided|more|less|it|its"
    r"|this|that|as|because|since|so|base|mod|modulo|where|for|with|without|to|through|versus|vs|from|until|equals|except"
    r"|maybe|perhaps|about|roughly|approximately|wrong|at|below|above|under|unless|possibilities|of)\b"
)
_PLURAL = re.compile(r"(?:[a-z]+[ -]){0,3}[a-z]+[^sui\W]s")
_UNIT = re.compile(
    r"(?: ?\\text\{ ?([a-zA-Z][a-zA-Z ./^0-9-]{0,40}?)\.? ?\}|(?<=[\d}°)]) "
    r"((?:[a-zA-Z]+\.? ){0,2}[a-zA-Z]{2,14}(?:/h)?|[ap]\.m)\.?)(?: ?\^ ?\{? ?(-?\d) ?\}?)?$"
)
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def _unit(words: str) -> str:
    """The canonical name of a unit (m/s^2 for "meters per second squared"), or "" if the words are no unit."""
    names = []
    for part in re.split(r" ?/ ?| per ", words.lower().strip(" .")):
        part = re.sub(r"^(?:sq|square)\.? (.+)$|^(.+) squared$", r"\1\2^2", part)
        part = re.sub(r"^(?:cu|cubic)\.? (.+)$|^(.+) cubed$", r"\1\2^3", part)
        word, caret, power = re.sub(r"[{} ]+(?=[-\d}]|$)", "", part).partition("^")
        name = _UNITS.get(word.strip(" ."))
        if name is None and (not _PLURAL.fullmatch(word) or _NOT_A_UNIT.search(word)):
            return ""
        names.append((name or word) + caret + power)
    return "/".join(names)


@lru_cache(maxsize=4_096)
def split_unit(text: str) -> tuple[str, str]:
    """Split the unit off a normalised answer: ("5", "cm^2") for 5\\text{ cm}^2, ("5", "") for 5."""
    match = _UNIT.search(text)
    if match and match.start() > 0:
        words = match[1] or match[2]
        known = len(words) > 1 or words in "msghlLNJWVCF"  # 12k is 12,000
        unit = _unit(words + (f"^{match[3]}" if match[3] else "")) if known else ""
        return (text[: match.start()].rstrip(), unit) if unit else (text, "")
    if text.endswith(("%", "°")) and not _TRIG.search(text):
        return text[:-1].rstrip(), text[-1]
    return text, ""


def units_differ(gold: str, answer: str) -> bool:
    """Whether two units contradict each other; a missing unit contradicts nothing, nor do "red balls" and "balls"."""
    if answer == "%" or not gold or not answer:
        return answer == "%" != gold
    counted = not any(mark in gold + answer for mark in "/^°%") and not {gold, answer} & set(_UNITS.values())
    return gold != answer and not (counted and gold.split()[-1] == answer.split()[-1])


_DECIMAL = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(rf"(?:(\d+) (?:and )?)?([-+]?) ?({_DECIMAL})(?: ?/ ?([-+]?) ?({_DECIMAL}))?")
_POWER_OF_TEN = re.compile(r"^([\d.]+) ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{? ?([-+]?) ?(\d{1,3}) ?\}?$")
_FRACTION = re.compile(r"(.*?)\\frac ?\{ ?([^{}]+?) ?\} ?\{ ?([^{}]+?) ?\}")


@lru_cache(maxsize=4_096)
def parse_number(text: str) -> Fraction | None:
    """Parse a normalised answer that is one number without a unit, exactly; None if it is anything else."""
    sign = ""
    for _ in range(4):  # -(5), {5}
        if text[:1] + text[-1:] in ("()", "{}"):
            text = text[1:-1].strip()
        if not sign and text.startswith(("+", "-")):
            sign, text = text[0], text[1:].lstrip()
    if fraction := _FRACTION.fullmatch(text):
        text = "{} {}/{}".format(*fraction.groups()).strip()
    match = _NUMBER.fullmatch(_POWER_OF_TEN.sub(r"\1e\2\3", text)) if len(text) <= 1_000 else None
    if not match or not (bottom := Fraction(match[5] or 1)):
        return None
    value, negative = Fraction(match[3]) / bottom, sign + match[2] + (match[4] or "")
    if match[1]:
        if not match[5] or value >= 1 or match[2] or match[4]:
            return None  # neither 1 2 nor 2\frac{3}{2} is a mixed number
        value += int(match[1])
    return -value if negative.count("-") % 2 else value


# -- Reading: lists, sets, tuples, matrices, chains of relations ------------------------------------------------------

_OR = re.compile(r",? ?(?:\\text\{ ?,? ?or ?,? ?\}|(?<![a-zA-Z\\])or(?![a-z])|\\(?:lor|vee)(?![a-zA-Z])) ?")
_AND = re.compile(r",? ?(?:\\text\{ ?,? ?(?:and|&) ?,? ?\}|(?<![a-zA-Z\\])and(?![a-z])|\\(?:land|wedge)(?![a-zA-Z])) ?")
_LOGIC = re.compile(r"\\(?:lor|vee|land|wedge)(?![a-zA-Z])")
_RELATIONS = "=<>≤≥≠"
_FLIP = str.maketrans("<>≤≥", "><≥≤")
_BUILDER = r"[a-z] ?(?:\\in ?\(-∞,∞\) ?)?[:|]"  # of {x : ...}
# A text that names a set of reals: an inequality, a union, x \in ..., {x : ...}
_VARIABLE = re.compile(
    r"(?<![\\a-zA-Z])\(?([a-zA-Z](?:_\w)?)\)? ?(?:\\in(?![a-zA-Z]) ?|[<>≤≥≠=])|[<>≤≥≠=] ?([a-zA-Z](?:_\w)?)(?![a-zA-Z])"
)
_REAL_SET = re.compile(r"[<>≤≥≠∪∖]|\\in(?![a-zA-Z])|\\\{ ?[a-z] ?[:|]|^\(-∞,∞\)$")


def _split(text: str, separators: str) -> tuple[list[str], str]:
    """Split a text at the separators outside every bracket: the parts, and the separators found."""
    found = any(separator in text for separator in separators)
    places = [i for i, token, depth in _walk(text) if depth <= 0 and token in separators] if found else []
    ends = zip([-1, *places], [*places, len(text)], strict=True)
    return [text[start + 1 : end].strip() for start, end in ends], "".join(text[i] for i in places)


def _bracketed(text: str) -> tuple[str, str]:
    """(kind, content) if the first bracket closes at the very end, else ("", text). `(` may close with `]`."""
    if text.startswith("{") and text.endswith("}"):
        text = "\\" + text[:-1] + "\\}"
    kind = "{}" if text.startswith("\\{") and text.endswith("\\}") else text[:1] + text[-1:]
    if kind not in ("{}", "()", "[]", "(]", "[)", "⟦⟧") or any(
        depth <= 0 for _, _, depth in _walk(text[: -2 if kind == "{}" else -1])
    ):
        return "", text
    size = 2 if kind == "{}" else 1
    return kind, text[size:-size].strip()


def parse_group(text: str) -> tuple[str, list[str]] | None:
    """The brackets ("list" if there are none, ":" for a ratio) and the values of a group; None for a single value."""
    kind, content = _bracketed(text)
    if _LOGIC.search(text) and not all("=" in part for part in _OR.split(text)):
        return None
    if not kind and ":" in text and "," not in text:  # 3:2, 8:34 p.m.
        parts = _split(text, ":")[0]
        return None if None in [parse_number(split_unit(part)[0]) for part in parts] else (":", parts)
    if kind not in ("", "{}") and "±" in content:
        return "list", _signs(text)
    rows = [_split(row, ",")[0] for row in _split(_AND.sub(";", _OR.sub(";", content)), ";")[0]]
    if len(rows) > 1 and all(len(row) > 1 and _named(row) for row in rows):  # p=5,q=2; p=7,q=2 are tuples
        return "list", ["(" + ",".join(_named(row).values()) + ")" for row in rows]
    items = [signed for row in rows for item in row if item for signed in _signs(item)]
    if len(items) > 1 and "=" in items[0] and "=" not in "".join(items[1:]) and _is_name(items[0].partition("=")[0]):
        items[0] = items[0].partition("=")[2].strip()  # x = 1, 2
    is_group = len(items) > 1 or kind == "⟦⟧" or (kind == "{}" and text.startswith("\\"))
    return (kind or "list", items) if is_group else None


def _signs(text: str) -> list[str]:
    """Write out each `±` with both signs."""
    if not 0 < text.count("±") < 5:
        return [text]
    return [written for sign in "+-" for written in _signs(text.replace("±", sign, 1))]


def _named(items: Sequence[str]) -> dict[str, str]:
    """{x: 1, y: 2} for [y = 2, x = 1]; {} if not all items have names of their own."""
    values = dict(sorted([part.strip() for part in item.partition("=")[::2]] for item in items))
    return values if len(values) == len(items) and all(map(_is_name, values)) else {}


# Arguments and subscripts in the name of "name = value", which do not matter.
_ARGUMENTS = re.compile(
    r"\\(?:sum|prod) ?_ ?\{[^{}]*\} ?\^ ?(?:\{[^{}]*\}|\w)|_ ?(?:\{[^{}]*\}|\w)|\^ ?(?:\{ ?-1 ?\}|-1)(?= ?\()"
    r"|\^ ?\{?\*\}?|(?<=[a-zA-Z_'}]) ?\([^()=+*/-]{0,40}\)|\\text\{[^{}]*\}|'"
)
_NAME = re.compile(r"(?=.*[a-zA-Z])(?!-)(?:(?!\\(?:sqrt|log|ln|exp|lg))[a-zA-Z\\ {}()|:\[\],+*/-])+")
_OPERATION = re.compile(r"\\cdot|\\times|[-+*/]|(?<![A-Z\\a-z])[a-z](?=[a-z](?![a-z]))")


def _is_name(text: str, simple: bool = False) -> bool:
    """Whether a text can stand for what was asked: x, f(2), \\angle ABC, m + n; `simple`: neither sum nor product."""
    bare = _ARGUMENTS.sub("", text[:200]).strip()
    if not bare:  # \text{Area}
        return bool(text.strip())
    terms = [term.strip() for term in re.split(r"\\cdot|\\times|[+*]", bare)]
    return bool(_NAME.fullmatch(bare)) and len(set(terms)) == len(terms) and not (simple and _OPERATION.search(bare))


def _assigned(sides: list[str], simple: bool) -> tuple[str, list[str]]:
    """The name ("" if there is none) and the values of `name = value = value`, also if the name comes last."""
    if len(sides) > 1 and _is_name(sides[-1], simple) and not _is_name(sides[0], simple):
        sides = sides[::-1]
    return (sides[0], sides[1:]) if len(sides) > 1 and _is_name(sides[0], simple) else ("", sides)


def _chain(text: str) -> tuple[list[str], str]:
    """The sides of a chain of relations and the signs between them, of which the first is never `>`."""
    sides, signs = _split(text, _RELATIONS)
    return (sides[::-1], signs[::-1].translate(_FLIP)) if signs.startswith((">", "≥")) else (sides, signs)


# -- Comparison -------------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"(?=.*[A-Za-z]{3})(?![a-z]{3}$)[A-Za-z]+(?:(?:[' -]|, |\. ?)[A-Za-z]+)*[.!]?|\\text\{[^{}]*\}")
_SHORT_WORDS = frozenset(["no", "yes", "odd", "all", "one", "two", "six", "ten", "any"])
_PUNCTUATION = re.compile(r"(?:[\s.,;:!'\"()]|\band\b)+")
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w)")
_CAPITALS = re.compile(r"[A-Z]{2,}")  # AC is an order or a name, so not CA
# (B), B., Option B, and what a model puts behind it: (B) 12
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer) )?\(?([A-J]|(?<=\()[a-j](?=\)))\)?[.:)]?(?:(?<=[.:)]) *([^\s,;+*/^%=_!)}-].*))?"
)
_SECOND_CHOICE = re.compile(r"(?<![A-Za-z\\])(?:[B-J]|A(?! [a-z]))(?![A-Za-z])|(?<![a-z])or(?![a-z])")


def _same_items(gold: Sequence[str], answer: Sequence[str], ordered: bool, algebra: bool) -> bool:
    if len(gold) != len(answer) or len(gold) > MAX_LIST_ITEMS or not all(gold) or not all(answer):
        return False
    values, others = _named(gold), _named(answer)
    if values and others and not ordered:
        return values.keys() == others.keys() and all(compare(values[name], others[name], algebra) for name in values)
    if ordered or values:  # x = 1, y = 2 names its places
        return all(compare(g, a, algebra) for g, a in zip(gold, answer, strict=True))
    left = list(answer)
    for g in gold:
        found = next((place for place, a in enumerate(left) if compare(g, a, algebra)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def compare(gold: str, answer: str, algebra: bool = False) -> bool:
    """Whether gold and answer are equal. Raises UnparsableGold; without `algebra`, NeedsAlgebra if that is needed."""
    if "\\boxed" in gold:  # golds are used as they are; only a whole solution with a box is reduced to the box
        gold = extract_answer(gold) or gold
    gold, answer = normalise(gold), normalise(answer)
    if not gold or not answer:
        return False
    if gold == answer or (gold.isdigit() and answer.isdigit()):
        return gold.lstrip("0") == answer.lstrip("0")
    (gold_core, gold_unit), (answer_core, answer_unit) = split_unit(gold), split_unit(answer)
    gold_number, answer_number = parse_number(gold_core), parse_number(answer_core)
    if gold_number is not None and answer_number is not None:
        return gold_number == answer_number and not units_differ(gold_unit, answer_unit)
    if _LOOSE_SPACE.sub("", _bare(gold)) == _LOOSE_SPACE.sub("", _bare(answer)):
        return True
    if _too_complex(answer):
        return False
    if _too_complex(gold):
        raise UnparsableGold(gold[:80])
    for decide in (_compare_rounded, _compare_text, _compare_sets, _compare_groups):
        verdict = decide(gold, answer, algebra)
        if verdict is not None:
            return verdict
    return _compare_chains(gold, answer, algebra)


def _too_complex(text: str) -> bool:
    """Whether a text is too large to be taken apart, or could exhaust sympy. Takes linear time."""
    return (
        len(text) > MAX_STRUCTURE_CHARS
        or max(depth for *_, depth in _walk(text)) > MAX_NESTING
        or text.count("^") + text.count("\\frac") > 120
        or text.count("!") + text.count("≈") > 8
        or bool(_LARGE.search(text))
    )


def _compare_rounded(gold: str, answer: str, algebra: bool) -> bool | None:
    """`≈` in the gold marks a rounded value; in the answer, a note behind an exact value, which must be right."""
    exact, sign, note = (part.strip() for part in gold.partition("≈"))
    if sign:
        return _rounds(answer, note, algebra) or bool(exact and not _is_name(exact) and compare(exact, answer, algebra))
    exact, sign, note = (part.strip() for part in answer.rpartition("≈"))
    if exact and not _is_name(exact):
        return compare(gold, exact, algebra) and _rounds(exact.partition("≈")[0], note, algebra)
    return "." in gold and compare(gold, note, algebra) if sign else None


def _rounds(exact: str, note: str, algebra: bool) -> bool:
    """Whether an exact value (or the last side of a chain), rounded half away from zero, has the digits of a note."""
    (exact, exact_unit), (note, note_unit) = (split_unit(normalise(text.rpartition("=")[2])) for text in (exact, note))
    printed, value = parse_number(note), parse_number(exact)
    if printed is None or units_differ(note_unit, exact_unit):
        return False
    if value is None:
        number = _read_both("0", exact, algebra)[1]
        if number is None or not number.evalf(30).is_Float:
            return False
        value = Fraction(str(number.evalf(30)))
    scale = 10 ** len(re.sub(r"[^\d].*", "", note.partition(".")[2]))
    return value * printed >= 0 and math.floor(abs(value) * scale + Fraction(1, 2)) == abs(printed) * scale


def _compare_text(gold: str, answer: str, algebra: bool) -> bool | None:
    """Decide choice letters and words; None if the gold is neither."""
    gold_choice, choice = _CHOICE.fullmatch(_bare(gold)), _CHOICE.fullmatch(_bare(answer))
    if gold_choice and choice and not gold_choice[2]:
        return gold_choice[1].upper() == choice[1].upper() and not _SECOND_CHOICE.search(choice[2] or "")
    letters = [re.sub(r"[,\s]|\band\b", "", _bare(text)) for text in (gold, answer)]
    if all(map(_CAPITALS.fullmatch, letters)) and not ("," in gold and "," in answer):
        return letters[0] == letters[1]
    words = [_WORDS.fullmatch(text) or text.lower() in _SHORT_WORDS for text in (gold, answer)]
    if words[0] and (words[1] or not ("=" in answer or _AND.search(answer) or _OR.search(answer))):
        plain = [_PUNCTUATION.sub(" ", _bare(text).lower()).strip() for text in (gold, answer)]
        return _ARTICLE.sub("", plain[1]) == _ARTICLE.sub("", plain[0]) != ""
    return None


def _compare_groups(gold: str, answer: str, algebra: bool) -> bool | None:
    """Lists, tuples, intervals, matrices; None if neither is one."""
    (kind, items), (other, others) = parse_group(gold) or ("", [gold]), parse_group(answer) or ("", [answer])
    kinds = {kind, other}
    if "" in kinds:  # 5 is neither {4, 5} nor (4, 5); z = (4, 5) may be
        return None if kinds == {""} or ("=" in gold + answer and not kinds & {"list", "{}"}) else False
    if kinds <= {"list", "{}"}:
        return _same_items(items, others, False, algebra)
    if "()" in kinds and kinds & {"{}", "⟦⟧"} and 1 in (len(items), len(others)):  # {(1, 2)} and (1, 2), or one row
        return compare(*(i[0] if len(i) == 1 else t for i, t in ((items, gold), (others, answer))), algebra)
    if kinds == {"list", "()"}:
        bare = items if kind == "list" else others
        if values := list(_named(bare).values()):
            items, others = (values, others) if kind == "list" else (items, values)
        elif len(bare) == 2 or "=" in "".join(bare) or "∞" in "".join(bare):
            return False  # the ends of an interval are not the interval
    elif len(kinds) == 2 and kinds != {"⟦⟧", "()"} and (kinds != {"()", "[]"} or len(items) == 2):
        return False  # the brackets of intervals matter
    return _same_items(items, others, True, algebra)


def _compare_chains(gold: str, answer: str, algebra: bool) -> bool:
    """Equations, inequalities, `name = value`; a text without a relation is a chain of one side."""
    (gold_sides, gold_signs), (answer_sides, answer_signs) = map(_chain, (gold, answer))
    if not gold_signs and not answer_signs:
        return _same_value(gold, answer, algebra)
    if not all(gold_sides + answer_sides) or len(gold_sides + answer_sides) > 16:
        return False
    if set(gold_signs + answer_signs) == {"="}:
        gold_name, gold_values = _assigned(gold_sides, simple=True)
        name, values = _assigned(answer_sides, simple=bool(gold_signs))
        # Spaces and arguments of a name do not matter, and y is f(x).
        names = {re.sub(r"[\s{}\\]|text|\([^()]*\)$", "", text) for text in (gold_name, name)}
        same_name = len(names) == 1 or ("y" in names and "(x)" in (gold_name[-3:], name[-3:]))
        if not gold_signs or (gold_name and (not answer_signs or (name and same_name))):
            return all(compare(gold_values[-1], value, algebra) for value in values)
        if gold_name and not re.search(_LETTER, split_unit(gold_values[-1])[0]):
            return False  # x = 1 is neither y = 1 nor 2x = 2
    if gold_signs != answer_signs:
        return False
    ordered = gold_signs.strip("=") != ""
    if _same_items(gold_sides, answer_sides, ordered, algebra):
        return True
    differences = [f"({left})-({right})" for left, right in (gold_sides[:2], answer_sides[:2])]
    return len(gold_signs) == 1 and _proportional(*differences, gold_signs, algebra)


# -- Algebra: only in a process that can be killed --------------------------------------------------------------------


# Pairs that are compared before workers are forked: the parser is slow when it meets a piece of grammar first.
WARM_UP = [
    (r"\frac{\sqrt{5} - 1}{2} + e^{i\pi/3}", r"\left(1-x^{11}\right) \cdot \sqrt[3]{2}"),
    (r"\frac{qb}{2\pi\epsilon_0}\left((x-a)^2 + b^2\right)^{-3/2}", r"\frac{h(a_1+b)}{2} - |x|^n + n!"),
    (r"2\sin^2 x\cos(2x) + \ln 2x", r"\binom{n}{2} - \log_2 8 + \arctan 1 - \lfloor x/5 \rfloor"),
    (r"(-\infty, 1)", r"x < 1"),
]


# Peers read 5\text{ millions} as 5.
_MISREAD_BY_PEERS = re.compile(r"\\(?:text|partial|infty)|(?<![\\a-zA-Z])(?!and\b)[a-zA-Z]{2}")


def second_opinion(gold: str, text: str) -> str | None:
    r"""The answer in a response if math-verify finds it right, else None: peers pay `10\%` for 10, or four decimals."""
    from math_verify import parse, parser, verify

    parser.parse_expr_cached = None  # it would let sympy evaluate sums; numerals and LaTeX are read without
    stated, text = extract_answer(text), after_reasoning(text).strip()
    answer = stated or extract_answer(text, lenient=True) or ""
    name, sign, _ = answer.partition("=")
    last_line = text.rpartition("\n")[2]
    if last_line.count("\\boxed") > 1:
        text = last_line
    elif stated or sign or answer.startswith(("(", "[")):  # neither what was said before nor a part is the answer
        refused = _MISREAD_BY_PEERS.search(answer) or (sign and not _is_name(name))
        text = "" if refused else rf"\boxed{{{answer}}}"
    if _BROKEN_FORMULA.search(text) or re.search(r"(?s)\\boxed.*\bor\b.*\\boxed", gold):
        return None
    formula = gold if re.search(r"\$|\\boxed|\\[(\[]", gold) else f"${gold}$"
    gold_values, found = parse(formula, parsing_timeout=None), parse(text, parsing_timeout=None)
    right = verify(gold_values, found, float_rounding=4, timeout_seconds=None)
    return str(found[-1]) if right else None


_LARGE = re.compile(
    r"\^ ?\{? ?[-+]? ?\d{5}|\d{400}|\d{5} ?\}?\)? ?!|! ?!|\) ?! ?\) ?!|\\binom ?\{? ?\d{6}"
    r"|(?:\^ ?\{[^{}]{0,40}){4}|(?:\^ ?\(?\d+\)?){3}"
)
_ELEMENTARY = "arcsin|arccos|arctan|sinh|sin|cosh|cos|tanh|tan|cot|sec|csc|ln|log|exp"
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon"
    "|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Upsilon|Phi|Psi|Omega|ell"
)
_KNOWN = re.compile(rf"{_ELEMENTARY}|{_GREEK}|frac|sqrt|binom|pi|infty|cdot|times|div|lfloor|rfloor|lceil|rceil")
_LETTER = rf"(?:(?<![a-zA-Z\\])[a-zA-Z]|\\(?:{_GREEK})(?![a-zA-Z]))"
_PART_OF_SET = re.compile(rf"[∪∖,;]|\\\{{ ?{_BUILDER}|{_OR.pattern}|{_AND.pattern}")
_ALONE = re.compile(rf"(?:\\?[({{]| )*[-+]? ?\|? ?({_LETTER}(?: ?_ ?\{{?\w+\}}?)?)(?: ?\(\w\))? ?\|?(?:\\?[)}}]| )*")
# Parts that are compared as written: numbers in a base, derivatives, f'(0), vectors, angles and segments, words.
_ATOM = re.compile(
    r"(?<![\w.])\(?\d\w*?\)?_ ?(?:\{ ?\w+ ?\}|\w+)|"
    r"\\frac ?\{ ?(?:\\partial|d)(?![a-zA-Z]{2})[^{}]*\} ?\{ ?(?:\\partial|d) ?[a-z][^{}]*\}"
    r"|[a-zA-Z](?:'+|(?<=[fgFG]) ?\^ ?\{? ?-1 ?\}?(?= ?\())(?: ?\([^()]*\))?|\\text\{[^{}]*\}"
    r"|\\(?:vec|hat|bar|overline|tilde|angle|triangle|overrightarrow) ?(?:\{ ?[A-Za-z]+ ?\}|[A-Za-z]+)"
)
# What the parser takes for the imaginary unit, Euler's constant, and a transposition that it drops.
_NO_CONSTANT = re.compile(r"(?<!_)(?<!_\{)(?:(?<![\\a-zA-Z])[IT]|\\[gG]amma(?![a-z]))(?: ?_ ?(?:\w|\{[^{}]*\}))?")
_APPLIED = re.compile(rf"({_LETTER}(?:_\{{?\w+\}}?)?) ?\(([^()]*)\)")
_RAISED = r"(?:\^ ?(?:\w|\{[^{}]*\}))? ?"
_EXPLICIT = _table(
    rf"""
    \*\*  ^
    \*  \\cdot~
    (?<![a-zA-Z\\])({_ELEMENTARY}|sqrt|pi)(?![a-zA-Z])  \\\1~
    ∞  \\infty~
    (?<!\\sqrt)\[  (
    (?<![\d}}])\{{([a-zA-Z])\}}(?=_)  \1
    (?<=log)_ ?(\w)|_ ?(\d+|\w)  _{{\1\2}}
    (?<=\d)(?<!\^\d) ?(?=\()|(?<=\)) ?(?=[\d(])  \\cdot~
    (\\(?:{_ELEMENTARY})(?![a-z]) ?{_RAISED})((?:\d|[a-z]|\\pi ?|\^\w|_\w)+)(?= ?(?:\\cdot|\\times|/))  \1(\2)
    \^ ?([-+] ?\w)  ^{{\1}}
    (\\sqrt|\^) ?\(((?:[^()]|\([^()]*\))*)\)  \1{{\2}}
    """
)
_MISREAD = re.compile(
    r"(?<![\\a-zA-Z])[a-zA-Z] ?\\times ?[a-zA-Z]|Q_\{\d+\} ?\\times|\d\s+\d|(?:\\sqrt|\^) ?\("
    r"|[^\w\s\\+\-*/^(){}\[\]|!.=]|\b0 ?\^ ?\{? ?0|[\d)] ?_"
    r"|/ ?\d+ ?(?:[a-zA-Z]|\\(?!cdot|times|div|rfloor|rceil))|\^ ?(?:\w|\{[^{}]*\}) ?\^"  # 1/2x, 2^3^2
    r"|[A-Z] ?\^ ?\{? ?(?:T(?![a-z])|-1 ?\} ?[A-Z])|[A-Z] ?[A-Z] ?\^ ?\{ ?-1"  # matrices do not commute
)


def _functions(algebra: bool, gold: str, answer: str) -> set[str]:
    """The letters that stand for functions: f in f(x) + f(y), but not h in h(a + b) - ah.

    In both texts they stand only before brackets. A letter that is f in the gold, or that the gold applies twice, as in
    T(n - 1) + T(n - 2), is a function whatever the answer does. All algebra passes through here: without `algebra` this
    raises NeedsAlgebra before sympy is imported, which takes seconds.
    """
    if not algebra:
        raise NeedsAlgebra
    found = []
    for text in (f"{gold} ; {answer}", gold):
        alone = re.findall(rf"({_LETTER})(?! ?\()", text)
        found.append([letter for letter in re.findall(rf"({_LETTER})(?= ?\()", text) if letter not in alone])
    return {*found[0], *(letter for letter in found[1] if letter == "f" or found[1].count(letter) > 1)}


def _symbol(name: str) -> str:
    """The symbol for a part that is compared as written: the same for the same text."""
    name = re.sub(r"[{}() ]", "", name)
    name = name.upper() if name[0].isdigit() else name  # 2a_{16} is 2A_16
    return f"Q_{{{int.from_bytes(name.encode())}}}"


def _read(text: str, functions: set[str]) -> Any:
    """A sympy expression. What math-verify's parser would misread is spelled out before it reads the text."""
    if _TRIG.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?|[a-z]|\))°", r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = _ATOM.sub(lambda match: _symbol(match[0]), text.replace("°", ""))
    for pattern, replacement in _EXPLICIT:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<![\d.])(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    text = text.replace("]", ")") if "\\sqrt[" not in text else text
    text = re.sub(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", lambda match: " ".join(match[0]), text)  # tr is no trace

    def apply(match: re.Match[str]) -> str:  # f(2 + 1) and f(3) are the same symbol
        function = match[1].partition("_")[0] in functions
        return _symbol(f"{match[1]}({_read(match[2], functions).expand()})") if function else match[0]

    text = _APPLIED.sub(apply, text)
    if _MISREAD.search(text) or not all(map(_KNOWN.fullmatch, re.findall(r"\\([a-zA-Z]+|.)", text))):
        raise UnparsableGold(text[:40])
    try:
        return _parse(_NO_CONSTANT.sub(lambda match: _symbol(match[0]), text))
    except (MemoryError, RecursionError, UnparsableGold):
        raise
    except Exception as error:  # whatever the parser raises, it did not read this
        raise UnparsableGold(text[:40]) from error


def _real_set(text: str, functions: set[str]) -> Any:
    """A set of reals, or UnparsableGold."""
    import sympy

    text = _VARIABLE.sub("", text, count=1) if "\\in" in text and not text.startswith("\\{") else text
    kind, content = _bracketed(text)
    if kind == "{}" and (match := re.fullmatch(rf"{_BUILDER} ?(.+)", content)):
        return _real_set(match[1], functions)
    for sign, combine in (("∪", sympy.Union), (",", sympy.Intersection), ("∖", sympy.Complement)):
        parts, _ = _split(_AND.sub(",", _OR.sub("∪", text)), sign)
        if len(parts) > 1:
            return combine(*(_real_set(part, functions) for part in parts))
    if kind and kind != "⟦⟧":
        values = [sympy.simplify(_read(value, functions)) for value in _split(content, ",;")[0]]
        ends = kind[0] == "(", kind[1] == ")"
        return sympy.FiniteSet(*values) if kind == "{}" else sympy.Interval(*values, *ends)
    sides, signs = _split(text, _RELATIONS)
    operators = [{"≤": "<=", "≥": ">=", "≠": "!=", "=": "=="}.get(sign, sign) for sign in signs]
    values = [_read(side, functions) for side in sides]
    relation = sympy.And(*map(sympy.Rel, values[:-1], values[1:], operators))
    if len(relation.free_symbols) != 1:
        raise UnparsableGold(text[:40])
    return relation.as_set()


def _is_odd_root(expr: Any) -> bool:
    odd = expr.is_Pow and expr.exp.is_Rational and expr.exp.q % 2 == 1 < expr.exp.q
    return odd and expr.base.is_extended_real and not expr.base.is_zero


def _real_root(power: Any) -> Any:
    """b^(p/q) of a real b as b^n |b|^r with r between -1 and 1: for sympy the root of a negative b is complex."""
    import sympy

    base, exponent = sympy.powdenest(power).as_base_exp()
    whole = exponent.p % 2 + 2 * sympy.floor((exponent - exponent.p % 2 + 1) / 2)
    return base**whole * sympy.Abs(base) ** (exponent - whole)


@lru_cache(maxsize=256)  # of lists, every item is compared with every other
def _parse(text: str) -> Any:
    """LaTeX as a sympy expression in which i is imaginary, odd roots are real."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    config = ConversionConfig(lowercase_symbols=False)
    options = {"is_real": True, "convert_degrees": False, "normalization_config": None, "conversion_config": config}
    expr = latex2sympy(text, **options)
    expr = sympy.sympify(expr).subs({sympy.Symbol("i", real=True): sympy.I, sympy.Symbol("i"): sympy.I})
    for _ in range(2):  # the second time for products of what the first time wrote
        expr = expr.replace(_is_odd_root, _real_root)
    expr = expr.doit() if expr.has(sympy.floor, sympy.ceiling) else expr
    if not isinstance(expr, sympy.Expr) or expr.has(sympy.nan, sympy.zoo):
        raise UnparsableGold(str(expr)[:40])
    return expr


def _read_both(gold: str, answer: str, algebra: bool) -> tuple[Any, Any]:
    """Both expressions; None for an answer that cannot be read."""
    functions = _functions(algebra, gold, answer)
    gold_expr = _read(gold, functions)
    try:
        return gold_expr, _read(answer, functions)
    except UnparsableGold:
        return gold_expr, None


def _vanishes(expr: Any, point: dict[Any, Any]) -> bool | None:
    """Whether an expression is 0 at a point, to 50 digits; None if it has no value there. Powers need many digits."""
    for digits in (60, 2_000, 10_000):
        value = expr.evalf(20, subs=point, maxn=digits)
        parts = value.as_real_imag() if value.is_number else (value,)
        if not all(part.is_Number and part.is_finite for part in parts):
            return None
        differs = any(part != 0 and part._prec > 1 for part in parts)
        if differs or all(abs(part) < 1e-50 for part in parts):
            return not differs
    return None


def _same_value(gold: str, answer: str, algebra: bool) -> bool:
    """Whether two expressions are the same: numbers by their digits, functions by sympy if two points do not differ."""
    (gold, gold_unit), (answer, answer_unit) = split_unit(gold), split_unit(answer)
    if (choice := _CHOICE.fullmatch(_bare(answer))) and choice[2]:  # (B) 5
        return not _CHOICE.fullmatch(choice[2]) and compare(gold, choice[2], algebra)
    if units_differ(gold_unit, answer_unit) or ("\\text" in answer and "\\text" not in gold) or not gold or not answer:
        return False  # prose around a value is not a value
    plain = [_LOOSE_SPACE.sub("", _bracketed(text)[1] if text[0] == "(" else text) for text in (gold, answer)]
    if plain[0] == plain[1]:
        return True
    gold_expr, answer_expr = _read_both(gold, answer, algebra)
    import sympy

    written = (sympy.oo, sympy.floor, sympy.ceiling)
    if answer_expr is None or gold_expr.has(*written) or answer_expr.has(*written):
        return answer_expr == gold_expr
    difference = gold_expr - answer_expr
    splits = difference.has(sympy.log) and not difference.has(sympy.Abs)  # log(ab) = log a + log b where it is real
    difference = sympy.posify(difference)[0] if splits else difference
    sympy.core.random.seed(0)  # the same verdict every time
    names = sorted(difference.free_symbols, key=str)
    scales = (11, 2) if names else (1,)
    points = [{name: sympy.Rational(7 * index + 3, scale) for index, name in enumerate(names)} for scale in scales]
    same = [_vanishes(difference, point) for point in points]
    return False not in same and (difference.equals(0) if names else same[0]) is True


def _is_solved(text: str) -> bool:
    """Whether one variable stands alone in every inequality: x > 3, -x > -3, |x| < 3; not x - 3 > 0, nor x > a."""
    variables = set()
    for part in _PART_OF_SET.split(text):
        sides = re.split("[<>≤≥≠]", part)
        for side in sides if len(sides) > 1 else ():
            side = split_unit(side.strip())[0]
            if alone := _ALONE.fullmatch(side):
                variables |= {alone[1]} - {"e"}
            elif re.search(_LETTER, re.sub(r"(?<![a-zA-Z\\])e(?![a-zA-Z])", "", side)):
                return False
    return len(variables) <= 1


def _compare_sets(gold: str, answer: str, algebra: bool) -> bool | None:
    """Whether two texts name the same set of reals; None if one of them names no set, or one that cannot be read."""
    named = [_REAL_SET.search(text) for text in (gold, answer)]
    sets = [_REAL_SET.search(text) or len(_split(_bracketed(text)[1], ",;")[0]) == 2 for text in (gold, answer)]
    names = {*map("".join, _VARIABLE.findall(f"{gold} ; {answer}"))} - {"e"}
    if any(named) and _is_solved(gold) and not _is_solved(answer):
        return False  # the problem's own inequality is no answer to it
    if not any(named) or not all(sets) or len(names) > 1 or re.search(r"\[ ?-?∞|∞ ?\]", gold + answer):
        return None
    functions = _functions(algebra, gold, answer)
    try:
        gold_set, answer_set = _real_set(gold, functions), _real_set(answer, functions)
        return gold_set == answer_set or (gold_set ^ answer_set).is_empty is True
    except (MemoryError, RecursionError):
        raise
    except Exception:  # sympy cannot solve it, or cannot put the ends in order
        return None


def _proportional(gold: str, answer: str, sign: str, algebra: bool) -> bool:
    """Whether `gold = 0` is `answer = 0` times a factor, which of inequalities is positive."""
    gold_expr, answer_expr = _read_both(gold, answer, algebra)
    import sympy

    if answer_expr is None or gold_expr.free_symbols != answer_expr.free_symbols:
        return False
    if sign == "=":  # y = 1/x and xy = 1
        gold_expr, answer_expr = (sympy.fraction(sympy.together(expr))[0] for expr in (gold_expr, answer_expr))
    factor = sympy.cancel(gold_expr / answer_expr)
    return factor.is_number and bool(factor.is_positive or (sign in "=≠" and factor.is_negative))
