"""What is right, and what it earns: answer extraction and matching, and Eqs. 4 to 6.

A student ends with "The answer is X." or \\boxed{X}. The last such statement counts; without one
there is no credit, and nothing is guessed from the rest of the text. In doubt the strict reading
wins: a policy finds and exploits a wrong answer that is paid, so that is the worst bug here.
Literals are compared as exact fractions, Python evaluates nothing, and every regular expression
is linear in its input, so that no output can hang, crash or fool the grader.
"""
import random
import re
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from itertools import accumulate

INSTRUCTION = {kind: f'End with the sentence "The answer is X", where X is {what}.' for kind, what in {
    "number": "one number", "math": "a number or formula in LaTeX", "text": "a few words",
    "choice": "the letter of one option", "yesno": "yes or no"}.items()}
ANSWER_TYPES = tuple(INSTRUCTION)

# ---- 1. Where does the output state its answer? ----

MARKER = re.compile(r"\\(?:boxed|fbox)\s*\{|####|(?:answer|Answer|ANSWER)[\s*_]*"
                    r"(?::|(?i:is\b(?!\s+correct\b)|is(?=n['’]?t\b)))")
LEAD = re.compile(r"(?:[\s:*_$]|\\[\[(]|(?i:final answer\b))*")  # dressing in front of an answer
SENTENCE = re.compile(r"\.(?=[\s*_\"'”’$)A-Z]|\\[])]|$)|!(?=\s+[A-Z]|\s*$)|(?<!\\\\)(?<!x\})\n")
CLAUSE = re.compile(r"[.,;:!?—–]+\s|\s[(—–-]|\n|\.\.|\b(?:wait|actually|sorry|rather)\b", re.I)
GAP = re.compile(r"(?:\\[a-z]+|\W|_|\b(?:or|and|the|final|correct)\b)*|[^.!?\n]*\bor\W*", re.I)
BRACE = re.compile(r"\\.|[{}]", re.S)
LONGEST = 6_000                                                  # characters of an answer


def _statements(output, kind):
    """The texts of the last statement and of those side by side with it; unfinished: ""."""
    texts, end, marks = [], 0, list(MARKER.finditer(output))[-9:]
    for mark, following in zip(marks, marks[1:] + [None]):
        if mark.start() < end:                                   # inside the box before it
            continue
        if not GAP.fullmatch(output, end, mark.start()):         # words in between: a correction
            texts = []
        if mark[0][0] == "\\":                                   # up to the brace that closes it
            braces = [*BRACE.finditer(output, mark.end(), mark.end() + LONGEST)]
            depths = accumulate((hit[0] == "{") - (hit[0] == "}") for hit in braces)
            end = next((hit.end() for hit, depth in zip(braces, depths) if depth < 0), mark.end())
            text = output[mark.end():end][:-1]
        else:
            start = LEAD.match(output, mark.end()).end()
            rest = output[start:following.start() if following else None][:LONGEST]
            text = re.split("\n" if kind in ("text", "choice") else SENTENCE, rest, maxsplit=1)[0]
            end = start + len(CLAUSE.split(rest, 1)[0])
            if following and text == rest:                       # runs into the next statement
                text = re.sub(r"(?i)(?:\W*\b(?:or|and|the|final|correct))+\W*$", "", text.strip())
                if not text or following[0][0] == "\\" and _read(text, kind) is None:
                    continue                                     # "The answer is x = \boxed{5}"
        texts.append(text if len(text) < LONGEST else "")
    return texts


# ---- 2. What answer is that? First away with what does not change it: Markdown, LaTeX, units ----

CHARACTERS = str.maketrans("−×·’“”`°€£¥₹¢", "-**'\"\"       ") | {178: "^2", 179: "^3"}
COMMANDS = dict(zip(
    "le leq leqslant lt ge geq geqslant gt ne neq times cdot div pm cup in infty pi sqrt frac dfrac "
    "tfrac cfrac alpha beta theta lambda lbrace rbrace left right big Big quad qquad displaystyle"
    .split(), "≤≤≤<≥≥≥>≠≠**÷±∪∈∞π√ƒƒƒƒαβθλ{}       "))
REWRITE = [(re.compile(pattern, re.A), new) for pattern, new in [
    (r"\\\\", "⌉,⌈"), (r"\\begin ?\{[pb]?matrix\}", "⌈⌈"),        # a matrix is a list of rows
    (r"(?:⌉,⌈)? ?\\end ?\{[pb]?matrix\}", "⌉⌉"), (r"&", ","), (r"\{,\}|,\\! ?", ","),
    (r"(?<=\d)\\[,!](?=\d{3}(?!\d))", ""), (r"\\[,;:! ]|(?<=\w)~|\\?[%$]|\\[()\[\]]", " "),
    (r"\^ ?\{? ?\\circ ?\}?|\*\*(?!\w)|(?<!\w)\*\*", " "), (r"\*\*", "^"), (r"\\([{}])", r"\1"),
    (r"\\([A-Za-z]+) ?", lambda hit: COMMANDS.get(hit[1], hit[0])), ("<=", "≤"), (">=", "≥"),
    (r"(?<![\\A-Za-z])sqrt", "√"), (r"(?<![\\A-Za-z])pi(?![a-z])", "π"),
    (r"([_^]) ?\{ ?(\w|\d+) ?\}(?!\d)", r"\1\2"), (r"([√ƒ]) ?(\d)", r"\1{\2}"),
    (r"(ƒ ?\{[^{}]*\}) ?(\d)", r"\1{\2}")]]
WRAP = re.compile(r"\\(?:text|math|bold|operatorname|[mf]?box)[a-z]* ?\{([^{}]*)\}")
UNIT = re.compile(
    r"(?:\\(?:text|mbox|mathrm)[a-z]* ?\{(?! ?(?:and|or|[ied]) ?\})[^{}]*\}|(?<=[\d)\]}π])[ ,(-]*"
    r"(?:[A-Za-z]{4,}|[ckm]m|[km]g|m[lL]|in|ft|mi|lbs?|hrs?|min|day)\b)"
    r"(?: ?\^ ?\{?-?\d\}?|[ ,/().'*-]*(?:\\text ?\{[^{}]*\}|(?!and\b|or\b)[A-Za-z]+))*")
NOT_A_UNIT = re.compile(                                         # but changes the number
    r"(?i)\b(?:and|or|nor|not?|never|wrong|incorrect|hundred|thousand|[mbt]r?illion|dozen"
    r"|hal(?:f|ves)|thirds?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|squared|cubed"
    r"|factorial|plus|minus|than|mod|base|if|to|of \d|\d ?(?:rd|st|nd|th))\b|n't")
INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|\d+)"
LITERAL = (rf"[+-]? ?(?:(?:\d+ )?{INT}/[+-]?(?=[\d,]*[1-9]){INT}|(?:{INT}(?:\.\d*)?|\.\d+)"
           r"(?:[eE][+-]?\d{1,3}(?!\d))?)")
FRAC = re.compile(rf" ?ƒ\{{([+-]?{INT})\}}\{{([+-]?{INT})\}}", re.A)
NUMBER = re.compile(                                             # [x =] [currency] literal [unit]
    r"(?!.*\b(?:because|since|where|so)\b.*=)(?:(?:[^<>≤≥≠!~:,;]|,(?=\d))*= ?)?(?:(?:USD?|EUR) ?)?"
    rf"({LITERAL})(?![ /(-]*[xyzinkKMBe]\b|[/-]$|!|\.\.)[A-Za-zÀ-ɏµ .,;:'\"/()!?-]*", re.A)
UNIT_POWER = re.compile(r"(?<=[A-Za-z}])(?:\^\{?-?\d\}?|(?<!\d[eE])[23])(?![\d.,])", re.A)
CHOICE = re.compile(                                             # not the article A, not B or C
    r"[\s\"'(\[{*_$]*(?:(?i:(?:the )?(?:option|choice|letter) )[\"'(\[{]*)?(?:(?<=\()([A-Fa-f])"
    r"(?=\))|([B-F]|A(?! (?!because|since|as\b|is\b)\w))|([a-f])(?=\W*$|[.!] [A-Z]))"
    r"(?![\w+#^-]|'\w|\.\w\b)(?!\W*(?:\b(?:and|or|nor|option|choice|maybe|possibly)\b\W*)+"
    r"(?:[A-F]\b|[a-f]\))|\W*[,&/;+]\W*[B-F]\b|\W*[A-F]\W*$|\W*\([a-f]\))")
MONTH = r"\b(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?,? "
DATES = [                                                        # to month/day/year
    (MONTH + r"(\d\d?)(?:st|nd|rd|th)?,? (\d{4})\b", r"\1/\2/\3"),
    (r"\b(\d\d?)(?:st|nd|rd|th)? (?:of )?" + MONTH + r"(\d{4})\b", r"\2/\1/\3"),
    (r"\b(\d{4})[/-](\d\d?)[/-](\d\d?)\b", r"\2/\3/\1"), (r"\b0(?=\d[/-])", ""),
    (r"(?:on )?(?:[a-z]+day,? )?\b([a-z]{3}|\d\d?)[/-](\d\d?)[/-](\d{4})\b", lambda hit: "/".join(
        [str(MONTH.find(hit[1]) // 4 + 1) if hit[1].isalpha() else hit[1], hit[2], hit[3]]))]


def _read(text, kind):
    """A statement's text as an answer of a type, in a normal form; None if it cannot be read."""
    text = " ".join(text.translate(CHARACTERS).split())
    for pattern, new in REWRITE if kind in ("number", "math") else ():
        text = pattern.sub(new, text)
    if kind == "math":
        text = UNIT.sub(lambda hit: " " if hit.start() and not NOT_A_UNIT.search(hit[0]) else hit[0], text)
    for _ in range(3):                                           # \textbf{\text{B}}
        text = WRAP.sub(r" \1 ", text)
    text = " ".join(text.split()).strip(' *_"$')
    if kind == "text":
        text = text.casefold()
        for pattern, new in DATES:
            text = re.sub(pattern, new, text)
        return re.sub(r"\b(?:an?|the) (?=\w)", "", text.strip(" .,;:!?'\"*_$")) or None
    if kind == "yesno":
        words = [{"true": "yes", "false": "no"}.get(word, word)
                 for word in re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.casefold())]
        return words[0] if words and {*words} & {"yes", "no"} == {words[0]} else None
    if kind == "choice":
        hit = CHOICE.match(text)
        return hit and hit[hit.lastindex].upper()
    # Spaces stay only between words or numbers, and in "1, 234", which is no 1,234.
    text = re.sub(r" (?!\w)|(?<![\w,]) |(?<=,) (?!\d{3})", "", text)
    if kind == "math":
        text = re.sub(r",? ?\b(?:and|or)\b ?", ",", text).rstrip(".,;:")
        return (text if "=" not in text else ",".join(sorted(text.split(",")))
                if text.count("=") == text.count(",") + 1 else text) or None
    text = UNIT_POWER.sub("", FRAC.sub(r" \1/\2", text).strip())
    hit = None if NOT_A_UNIT.search(text) else NUMBER.fullmatch(text)
    return hit and hit[1].replace(",", "")


# ---- 3. Are two answers equal? Formulas as exact literals, or else by value ----

NAME = re.compile(r"(\\?[A-Za-z]|[αβθλ]|[A-Z]{2}|\\?[A-Za-z]{3,})(_\w+)?'?(\(\w(,\w)*\))?|\(\w(,\w)*\)"
                  r"|[^A-Za-z,]+")
UNCLEAR = re.compile(r"[_'\"]|[A-Za-z]{3}|^[A-Za-z]{2,}$|\dƒ\{-?\d|/\w+[(ƒ√A-Za-zπ]|([^\W\d]|[)}\]]|\d ) ?\d", re.A)
STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "÷": 2, "^": 4}      # an unwritten product is a *


def _equal(ours, gold, kind):
    if kind not in ("number", "math"):                           # "Mr. Smith" is one sentence or two
        return ours == gold or kind == "text" and ours.startswith((gold + ". ", gold + "! "))
    (our_name, ours), (name, gold) = _named(ours), _named(gold)
    if our_name and name and our_name != name:
        return False
    if _fraction(gold) is not None:                              # a plain number wants a plain number
        return _fraction(ours) == _fraction(gold)
    if ours == gold or gold.replace(" ", "").isalpha() and len(gold) > 1:
        return ours.lower() == gold.lower()
    ours, gold = _values(ours), _values(gold)
    return ours == gold and any(gold)


def _named(text):
    """`x=5` -> ("x", "5"), and so `x=2+3=5`; `x=1,x=2` -> ("x", "1,2"); `2x=5` stays whole."""
    name, *rest = re.split("[=∈]", text)
    *middle, last = re.split("[=∈]", text.replace(f",{name}=", ","))
    plain = rest and NAME.fullmatch(name) and "," not in "".join(middle[1:])
    return (name, last) if plain else ("", text)


def _fraction(text):
    """The exact value of a text that is one literal, else None. (int() fails on 5,000 digits.)"""
    text = FRAC.sub(r" \1/\2", text).strip()
    if not re.fullmatch(LITERAL, text, re.A):
        return None
    parts = [part.partition("/") for part in text.lstrip("+- ").replace(",", "").split()]
    total = sum(Fraction(Decimal(top)) / Fraction(Decimal(bottom or 1)) for top, _, bottom in parts)
    return -total if text[0] == "-" else total


def _values(text):
    """What a formula, a list or a relation comes to at three points; None where it has no value."""
    values, number = [], _fraction(text) if len(text) < 300 else None
    text = text if number is None else str(number)
    if "±" in text and "," not in text:
        text = text.replace("±", "+") + "," + text.replace("±", "-")
    for point in (1, 2, -3) if len(text) < 300 and not UNCLEAR.search(text) else ():
        try:                                                     # -3 shows that √(x^2) is not x
            with localcontext(Context(prec=120, Emax=100)):
                values.append([part if part in "=<>≤≥≠∈∪" else _show(_evaluate(
                    ["", "}"] + re.findall(r"\d+\.?\d*|\.\d+|\S", part)[::-1] + ["{"], point))
                    for part in re.split("([=<>≤≥≠∈∪])", text)])
        except (ArithmeticError, LookupError, TypeError, RecursionError):
            values.append(None)
    return values


def _show(value):
    return value if isinstance(value, str) else f"{value + 0:.100e}"


def _evaluate(tokens, point, strength=0):
    """Precedence climbing: the value of the tokens up to an operator no stronger than `strength`."""
    token = tokens.pop()
    if token in ("+", "-"):
        value = _evaluate(tokens, point, 3) * Decimal(token + "1")
    elif token in ("(", "[", "{", "⌈"):
        items, kind = [_evaluate(tokens, point)], token
        while (token := tokens.pop()) == ",":
            items.append(_evaluate(tokens, point))
        kind += token
        texts = map(_show, items) if kind != "{}" else sorted(map(_show, items))
        value = items[0] if len(items) == 1 and kind in ("()", "{}", "[]") else kind + ",".join(texts)
    elif token == "ƒ":
        value = _evaluate(tokens, point, 9) / _evaluate(tokens, point, 9)
    elif token == "√":
        root = _evaluate(tokens, point, 9) if tokens[-1] == "[" else 2
        value = _evaluate(tokens, point, 9)
        value = value.sqrt() if root == 2 else value ** (1 / root)
    elif token.isalpha():                                        # any value will do, even for pi
        value = Decimal(random.Random(f"{token}{point}").uniform(1, 3)).copy_sign(point)
    else:
        value = Decimal(token)
    while tokens[-1] not in ("", ",", ")", "]", "}", "⌉") and STRENGTH.get(tokens[-1], 2) > strength:
        operator = tokens.pop() if tokens[-1] in STRENGTH else "*"
        right = _evaluate(tokens, point, STRENGTH[operator] - (operator == "^"))
        value = (value + right if operator == "+" else value - right if operator == "-" else
                 value * right if operator == "*" else value ** right if operator == "^" else
                 value / right)
    return value


# ---- 4. The two questions that the other files ask ----

def extract_answer(output, answer_type):
    """The answer that the output states, in a plain form; None if no statement can be read."""
    answers = [_read(text, answer_type) if text else None for text in _statements(output, answer_type)]
    if not answers or None in answers:
        return None
    agree = all(_equal(answer, answers[-1], answer_type) for answer in answers)
    return answers[-1] if agree else None


def is_correct(output, gold, answer_type):
    """Does the output state the gold answer? This is R_outcome, Eq. 4."""
    answer, gold = extract_answer(output, answer_type), _read(gold, answer_type)
    return None not in (answer, gold) and _equal(answer, gold, answer_type)


# ---- 5. What it earns ----

def dsu_bonus(full, partial, delta, nu):
    """Eq. 5: `delta` if mean(full) > nu * mean(partial), else 0.0; lists of 0/1 outcomes.

    Compared as exact fractions, with nu as it is written: 0.6 is not more than 1.2 times 0.5.
    """
    better = sum(full) * len(partial) > Fraction(str(nu)) * sum(partial) * len(full)
    return float(delta) if better else 0.0


def total_rewards(full, partial, delta, nu):
    """Eq. 6: outcome plus bonus for correct full dialogues, the bare outcome for all others."""
    bonus = dsu_bonus(full, partial, delta, nu)
    return [outcome + bonus if outcome else outcome for outcome in full], list(partial)
