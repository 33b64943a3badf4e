"""What is right, and what it earns: answer extraction and matching, and Eqs. 4 to 6.

A student ends with "The answer is X." or \\boxed{X}. The last such statement counts; without one
there is no credit, and nothing is guessed from the rest of the text. In doubt the strict reading
wins: a policy finds and exploits a wrong answer that is paid, so that is the worst bug here.
Literals are compared as exact fractions, Python evaluates nothing, and every regular expression
is linear in its input, so that no output can hang, crash or fool the grader.
"""
import operator
import random
import re
from contextlib import suppress
from datetime import datetime
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from itertools import accumulate

INSTRUCTION = {answer_type: f'End with the sentence "The answer is X", where X is {what}.'
               for answer_type, what in [("number", "one number"), ("text", "a few words"),
                                         ("math", "a number or formula in LaTeX"),
                                         ("choice", "the letter of one option"),
                                         ("yesno", "yes or no")]}
ANSWER_TYPES = tuple(INSTRUCTION)

# ---- 1. Where does the output state its answer? ----

MARKER = re.compile(r"\\(?:boxed|fbox)\s*\{|####|(?:answer|Answer|ANSWER)[\s*_]*"
                    r"(?::|(?i:is\b(?!\s+correct\b)|is(?=n['’]?t\b)))")
LEAD = re.compile(r"[\s:*_$]*(?:(?:\\[\[(]|(?i:final answer\b))[\s:*_$]*)*")      # dressing
SENTENCE = re.compile(r"(?<!\.\.)\.(?=[\s*_\"'”’$)A-Z]|\\[])]|$)|!(?=\s+[A-Z]|\s*$)|(?<!\\\\)\n")
CORRECTION = re.compile(r"(?i)\b(?:wait|actually|sorry|incorrect|wrong)\b|[^\w\s]\s*"
                        r"(?:no|but|so|then|however|rather|because|since|which|oops|hmm)\b")
LINKS = {"or", "and", "the", "final", "correct", "text", "quad"}
LINKED = re.compile(r"(?i)(?:\W*\b(?:or|and|the|final|correct))*\W*$")
BRACE = re.compile(r"\\.|[{}]", re.S)
LONGEST = 6_000                                                  # characters of an answer


def _statements(output, kind):
    """The texts of the last statement and of those side by side with it; unfinished: ""."""
    texts, end, marks = [], 0, list(MARKER.finditer(output))[-9:]
    for mark, following in zip(marks, marks[1:] + [None]):
        if mark.start() < end:                                   # inside the box before it
            continue
        gap = output[end:mark.start()].lower() if texts else ""
        if (any(word[0] not in LINKS for word in re.finditer(r"[^\W_]+", gap))
                and not re.fullmatch(r"[^.!?\n]{0,200}\bor\W*", gap)):
            texts = []                                           # words in between: a correction
        if mark[0][0] == "\\":                                   # up to the brace that closes it
            braces = [*BRACE.finditer(output, mark.end(), mark.end() + LONGEST)]
            depths = accumulate((hit[0] == "{") - (hit[0] == "}") for hit in braces)
            end = next((hit.end() for hit, depth in zip(braces, depths) if depth < 0), mark.end())
            text = output[mark.end():end][:-1]
        else:
            start = LEAD.match(output, mark.end()).end()
            rest = output[start:following.start() if following else None][:LONGEST]
            text = SENTENCE.split(rest, 1)[0]
            end = start + len(CORRECTION.split(text, 1)[0])
            if kind in ("text", "choice"):                       # "Mr. Smith", "b. the dog"
                text = rest.split("\n", 1)[0]
            if kind == "choice":                                 # with the options listed behind
                text += re.match(r"(?:\n[ *-]*\(?[A-F][).:].*)*", rest[len(text):])[0]
            if following and text == rest:                       # runs into the next statement
                text = text[:-40] + LINKED.sub("", text[-40:])
                if not text or following[0][0] == "\\" and _read(text, kind) is None:
                    continue                                     # "The answer is x = \boxed{5}"
        texts.append(text if len(text) < LONGEST else "")
    return texts


# ---- 2. What does a statement's text answer? ----

CHARACTERS = str.maketrans("−×·‘’“”`€£¥₹¢", "-**''\"\"      ") | {
    ord("²"): "^2", ord("³"): "^3", ord("°"): r"^\circ ", ord("º"): r"^\circ "}
COMMANDS = dict(zip(
    "le leq leqslant lt ge geq geqslant gt ne neq times cdot div pm cup in infty pi sqrt frac "
    "dfrac tfrac cfrac alpha beta theta lambda lbrace rbrace left right big Big quad qquad"
    .split() + ["displaystyle"], "≤≤≤<≥≥≥>≠≠**÷±∪∈∞π√ƒƒƒƒαβθλ{}       "))
REWRITE = [(re.compile(pattern, re.A), new) for pattern, new in [
    (r"\\\\(?: ?\[[\d.]+[a-z]+\])?", "⌉,⌈"), (r"&", ","),         # a matrix: rows of cells
    (r"\\begin ?\{[pb]?matrix\}", "⌈⌈"), (r"(?:⌉,⌈)? ?\\end ?\{[pb]?matrix\}", "⌉⌉"),
    (r"\{,\}|,\\! ?", ","), (r"(?<=\d)\\[,!](?=\d{3}(?!\d))", ""),       # 1{,}234 and 1\,234
    (r"(?:\^ ?\{? ?\\circ ?\}?|\\degree) ?(?:[CF]\b)?|\\?[%$]|\\[()\[\]]", " "),
    (r"\\[,;:! ]|(?<=\w)~|(?<=\{)~(?=[A-Za-z])|\*\*(?!\w)|(?<!\w)\*\*", " "),
    (r"\\([A-Za-z]+) ?", lambda hit: COMMANDS.get(hit[1], hit[0])), (r"\\([{}])", r"\1"),
    (r"\*\*", "^"), (r"<=", "≤"), (r">=", "≥"), (r"([_^]) ?\{ ?(\w|\d+) ?\}", r"\1\2 "),
    (r"(?<![\\A-Za-z])sqrt", "√"), (r"(?<![\\A-Za-z])pi(?![a-z])", "π"),
    (r"([√ƒ]) ?(\d)", r"\1{\2}"), (r"(ƒ ?\{[^{}]*\}) ?(\d)", r"\1{\2}")]]       # \frac12
WRAP = re.compile(r"\\(?:text|math|bold|operatorname|[mf]?box)[a-z]* ?\{([^{}]*)\}")
UNIT = re.compile(
    r"(?:(?<=[\w)\]}∞])[ ,(-]*\\(?:text|mbox|mathrm)[a-z]* ?\{(?! ?(?:and|or|[ied]) ?\})[^{}]*\}"
    r"|(?<=[\d)\]}π])[ ,(-]*(?:[A-Za-z]{4,}|[ckm]m|[km]g|m[lL]|in|ft|mi|lbs?|hrs?|min|day)\b)"
    r"(?: ?\^ ?\{?-?\d\}?|[ ,/().'*-]*(?:\\text ?\{[^{}]*\}|(?!and\b|or\b)[A-Za-z]+))*")
NOT_A_UNIT = re.compile(                                         # but changes the number
    r"(?i)\b(?:and|or|nor|not?|never|false|wrong|incorrect|plus|minus|multiplied|divided|than|mod"
    r"|base|if|to|out|least|most|ish|squared|cubed|factorial|score|gross|hal(?:f|ves)"
    r"|(?:hundred|thousand|[mbt]r?illion|lakh|crore|dozen|ten)s?|of [\dxyz]|\d+ ?(?:rd|st|nd|th)"
    r"|(?<!\()(?<!ty-)(?:two|three|four|five|six|seven|eight|nine|eleven|twelve|fifteen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)|(?:point|over|root|remainder|below) (?=\w)"
    r"|(?:thir|four|fif|six|seven|eigh|nin|ten|hundred|thousand)(?:th|d)s?)\b|n't")
INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|\d+)"
LITERAL = (rf"[+-]? ?(?:(?:\d+ )?{INT}/[+-]?(?=[\d,]*[1-9]){INT}|(?:{INT}(?:\.\d*)?|\.\d+)"
           r"(?:[eE][+-]?\d{1,3}(?!\d))?)")
FRAC = re.compile(rf" ?ƒ\{{([+-]?{INT})\}}\{{([+-]?{INT})\}}", re.A)
NUMBER = re.compile(                                             # [x =] [currency] literal [unit]
    r"(?:(?:[^<>≤≥≠!~:,;]|,(?=\d))*= ?)?(?:(?:USD?|EUR) ?)?"
    rf"({LITERAL})(?![ /(-]*[bcefijknopqruvwxyzBKMX]\b|a\b|[abcxyz]{{2,3}}\b|[/-]$|!|\.\.)"
    r"(?:[A-Za-zÀ-ɏµ .,;:'\"/()!?-]|(?:(?<=[A-Za-z])\^\{?-?\d\}?|(?<=[mt])[23])(?![\d.,]))*", re.A)
CHOICE = re.compile(                                             # not the article A, not B or C
    r"[\s\"'(\[{*_$]*(?:(?i:(?:the )?(?:option|choice|letter):? )[\"'(\[{]*)?(?:(?<=\()([A-Fa-f])"
    r"(?=\))|([B-F]|A(?! (?!because|since|as\b|is\b)\w))|([a-f])(?=\W*$|[.!] [A-Z]))"
    r"(?![\w+#^-]|'\w|\.\w\b| ?=|\? *\w|[\"')\]}*_$]*,?(?: which)? "
    r"(?:(?:is|was)(?:n't| not| wrong| incorrect| false)|can(?:'t|not)))(?!\W*"
    r"(?:\b(?:and|n?or|to|through|plus|also|with|together|versus|vs|as|well|option|choice|maybe"
    r"|even|possibly)\b\W*)+"
    r"(?:[A-F]\b|[a-f]\))|[^\w,&/;+]*[,&/;+]\W*[B-F]\b|\W*[A-F]\b(?=\W*(?:$|[A-F]\b))"
    r"|\W*\([a-f]\)|(?:(?!\b(?:because|since|as|not|rather|unlike)\b)[^.!?;:])*?"    # (B) x, (C) y
    r"(?:(?:\b(?:and|n?or|versus|vs|plus)|[,&/]) *(?:\([A-F]\)|[A-F][).:](?= ))(?! (?:is|was)\b)"
    r"| \(?[B-F]\) \w))")
DATES = "%m/%d/%Y %m-%d-%Y %Y/%m/%d %Y-%m-%d %B_%d_%Y %b_%d_%Y %d_%B_%Y %d_%b_%Y".split()


def _read(text, kind):
    """A statement's text as an answer of a type, in a normal form; None if it cannot be read."""
    text = " ".join(text.translate(CHARACTERS).split())
    for pattern, new in REWRITE if kind in ("number", "math") else ():
        text = pattern.sub(new, text)
    for _ in range(3):                                           # \textbf{\text{B}}
        if kind == "math":
            text = UNIT.sub(lambda hit: hit[0] if NOT_A_UNIT.search(hit[0]) else " ", text)
        text = WRAP.sub(r" \1 ", text)
    text = " ".join(text.split()).strip(' *_"$')
    if kind == "text":
        text = re.sub(r'[*_"$]', "", text.casefold()).strip(" .,;:!?'")
        text = re.sub(r"\b(?:an?|the) (?=\w)", "", text)
        day = re.split(r"[.!] (?!\d)", text)[0]                  # "Sept. 3, 2020. That is a day"
        day = re.sub(r"^on |\b[a-z]{3,6}day\b| of |(?<=\d)[snrt][tdh]\b|(?<=sep)t\b|[.,]", " ", day)
        for form in DATES:
            with suppress(ValueError):
                return datetime.strptime("_".join(day.split()), form).strftime("%m/%d/%Y")
        return text or None
    if kind == "yesno":
        words = [{"true": "yes", "false": "no"}.get(word, word)
                 for word in re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.casefold())]
        return words[0] if words and {*words} & {"yes", "no"} == {words[0]} else None
    if kind == "choice":
        hit = CHOICE.match(text)
        return hit and hit[hit.lastindex].upper()
    # Spaces stay only between words or numbers, and in "1, 234", which is no 1,234.
    text = re.sub(r" (?!\w)|(?<![\w,]) |(?<=,) (?!\d{3})", "", text)
    if kind == "number":
        text = FRAC.sub(r" \1/\2", text).strip()
        reason = re.search(r"\b(?:because|since|where|so)\b", text.rpartition("=")[0])
        hit = None if reason or NOT_A_UNIT.search(text) else NUMBER.fullmatch(text)
        return hit and hit[1].replace(",", "")
    text = re.sub(r"[,;]? ?\b(?:and|or)\b ?|;", ",", text).rstrip(".,;:")
    parts = sorted(text.split(","))
    if all("=" in part for part in parts):                       # y=2,x=1 or x=1,x=2
        text = ",".join(parts).replace("," + parts[0].split("=")[0] + "=", ",")
    return text if text and text[-1] != "=" else None


# ---- 3. Are two answers equal? Formulas as exact literals, or else by value ----

NAMED = re.compile(                                              # (x)=(5), (f(x))=(2x), (x)=2+3=(5)
    r"((?:\\angle ?)?(?:\\?[A-Za-z]|[αβθλ]|[A-Z]{2}|\\?[A-Za-z]{3,})(?:_\w+)?'?(?:\(\w(?:,\w)*\))?"
    r"|\(\w(?:,\w)*\)|[^A-Za-z,=∈]+)(?:[=∈][^,=∈]*)*[=∈]([^=∈]+)")
UNCLEAR = re.compile(r"[_'\"]|[A-Za-z]{3}|^[A-Za-z]{2,}$|\dƒ\{-?\d|/\w+[(ƒ√A-Za-zπ]"      # 1/2x
                     r"|([^\W\d]|[)}\]]|\d ) ?\d", re.A)         # words, 2\frac12 x, x2, 5 6
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),
             "/": (2, operator.truediv), "÷": (2, operator.truediv), "^": (4, operator.pow)}


def _equal(ours, gold, kind):
    if kind not in ("number", "math"):                           # "Mr. Smith" may be a sentence
        return ours == gold or kind == "text" and ours.startswith((gold + ". ", gold + "! "))
    (our_name, ours), (name, gold) = (hit.groups() if hit else ("", text) for hit, text in (
        (NAMED.fullmatch(text), text) for text in (ours, gold)))
    if our_name and name and our_name != name:
        return False
    if _fraction(gold) is not None:                              # a plain number wants its like
        ours = re.sub(r"(?<=\d) [mgsLh](/s|/h)?(\^\d)?$", "", ours)      # here m is no variable
        return _fraction(ours) == _fraction(gold)
    if ours == gold or gold.replace(" ", "").isalpha() and len(gold) > 1:
        return ours.lower() == gold.lower()
    points = 1, 2, -3                                            # -3 shows that √(x^2) is not x
    wanted = [_value(gold, point) for point in points]
    return any(wanted) and all(_value(ours, point) == value for point, value in zip(points, wanted))


def _fraction(text):
    """The exact value of a text that is one literal, else None. (int() fails on 5,000 digits.)"""
    text = FRAC.sub(r" \1/\2", text).strip()
    if not re.fullmatch(LITERAL, text, re.A):
        return None
    parts = [part.partition("/") for part in text.lstrip("+- ").replace(",", "").split()]
    total = sum(Fraction(Decimal(top)) / Fraction(Decimal(bottom or 1)) for top, _, bottom in parts)
    return -total if text[0] == "-" else total


def _value(text, point):
    """What a formula, a list or a relation comes to at a point; None where it has no value."""
    text = str(_fraction(text)) if len(text) < 300 and _fraction(text) is not None else text
    if len(text) > 300 or text.count("^") + text.count("√") > 20 or UNCLEAR.search(text):
        return None
    if "±" in text and "," not in text:
        text = text.replace("±", "+") + "," + text.replace("±", "-")
    try:
        with localcontext(Context(prec=100, Emax=60)):           # a bare list is a set: {1,2}
            return [part if part in "=<>≤≥≠∈∪" else _evaluate(
                ["", "⟩", "}", *re.findall(r"\d+\.?\d*|\.\d+|\S", part)[::-1], "{", "⟨"], point)
                for part in re.split("([=<>≤≥≠∈∪])", text)]
    except (ArithmeticError, LookupError, TypeError, RecursionError):
        return None


def _evaluate(tokens, point, strength=0):
    """Precedence climbing: the value of the tokens up to an operator no stronger than `strength`.

    A number is a Decimal, a list the text of its values. An unwritten operator is a product.
    """
    token = tokens.pop()
    if token in ("+", "-"):
        value = _evaluate(tokens, point, 3) * Decimal(token + "1")
    elif token in ("(", "[", "{", "⌈", "⟨"):
        kind, items = token, [_evaluate(tokens, point)]
        while (token := tokens.pop()) == ",":
            items.append(_evaluate(tokens, point))
        texts = [item if isinstance(item, str) else f"{item + 0:.80e}" for item in items]
        value = (items[0] if len(items) == 1 and kind + token in ("()", "[]", "{}") else
                 kind + ",".join(sorted(texts) if kind == "{" else texts) + token)
    elif token == "ƒ":
        value = _evaluate(tokens, point, 9) / _evaluate(tokens, point, 9)
    elif token == "√":
        root = _evaluate(tokens, point, 9) if tokens[-1] == "[" else 2
        value = _evaluate(tokens, point, 9)
        value = Decimal.sqrt(value) if root == 2 else value ** (1 / root)
    elif token.isalpha() or token == "∞":                        # any value will do, even for pi
        value = Decimal(random.Random(f"{token}{point}").uniform(1, 3)).copy_sign(point)
    else:
        value = Decimal(token)
    while tokens[-1] not in ("", ",", ")", "]", "}", "⌉", "⟩"):
        power, apply = OPERATORS.get(tokens[-1], OPERATORS["*"])
        if power <= strength:
            break
        token = tokens.pop() if tokens[-1] in OPERATORS else "*"
        value = apply(value, _evaluate(tokens, point, power - (token == "^")))
    return value


# ---- 4. The two questions that the other files ask, and what an answer earns ----

def _stated(output, kind):
    """The text of the stated answer and its normal form; twice None if none can be read."""
    texts = _statements(output, kind)
    answers = [_read(text, kind) if text else None for text in texts]
    if None in answers or not all(_equal(answer, answers[-1], kind) for answer in answers):
        return None, None
    return (" ".join(texts[-1].split()).rstrip(" .$*"), answers[-1]) if texts else (None, None)


def extract_answer(output, answer_type):
    """The answer that the output states, as text; None if no statement of it can be read."""
    return _stated(output, answer_type)[answer_type != "math"]


def is_correct(output, gold, answer_type):
    """Does the output state the gold answer? This is R_outcome, Eq. 4."""
    ours, gold = _stated(output, answer_type)[1], _read(gold, answer_type)
    return None not in (ours, gold) and _equal(ours, gold, answer_type)


def dsu_bonus(full, partial, delta, nu):
    """Eq. 5: `delta` if mean(full) > nu * mean(partial), else 0.0; lists of 0/1 outcomes.

    Compared as exact fractions, with nu as it is written: 0.6 is not more than 1.2 times 0.5.
    """
    better = sum(full) * len(partial) > Fraction(str(nu)) * Fraction(sum(partial)) * len(full)
    return float(delta) if better else 0.0


def total_rewards(full, partial, delta, nu):
    """Eq. 6: outcome plus bonus for correct full dialogues, the bare outcome for all others."""
    bonus = dsu_bonus(full, partial, delta, nu)
    return [outcome + bonus if outcome else outcome for outcome in full], list(partial)


def wilson(right, n, z=1.959964):
    """Wilson's score interval (95 %) of the share right / n -> (low, high), within [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    centre, half = right + z * z / 2, z * (right * (n - right) / n + z * z / 4) ** 0.5
    return max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))


def share(right, n, form="{:.1f} ({:.1f} - {:.1f})"):
    """The share in per cent with its interval, as text."""
    low, high = wilson(right, n)
    return form.format(100 * right / n, 100 * low, 100 * high) if n else "-"
