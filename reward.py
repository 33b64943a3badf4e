"""What is right, and what it earns: answer extraction and matching, and Eqs. 4 to 6.

A student ends with "The answer is X." or \\boxed{X}. The last such statement counts; without one
there is no credit, and nothing is ever guessed from the rest of the text. In doubt the strict
reading wins: a policy finds and exploits a wrong answer that is paid, so that is the worst bug here.
Literals are compared as exact fractions, Python evaluates nothing, and every regular expression is
linear in its input, so that no output can hang, crash or fool the grader.
"""
import random
import re
from collections import deque
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

INSTRUCTION = {
    "number": 'End with the sentence "The answer is X", where X is one number.',
    "math": 'End with the sentence "The answer is X", where X is a number or formula in LaTeX.',
    "choice": 'End with the sentence "The answer is X", where X is the letter of one option.',
    "yesno": 'End with the sentence "The answer is X", where X is yes or no.',
    "text": 'End with the sentence "The answer is X", where X is a few words.',
}
ANSWER_TYPES = tuple(INSTRUCTION)

# ---- 1. Where does the output state its answer? ----

MARKER = re.compile(r"\\(?:boxed|fbox)\s*\{|####|(?:answer|Answer|ANSWER)[\s*_]*"
                    r"(?::|(?i:is\b(?!\s+correct\b)|is(?=n['’]?t\b)))")
LEAD = re.compile(r"(?:[\s:*_$]|\\[\[(])*")                      # dressing in front of an answer
END = re.compile(r"\.(?=[\s*_\"'”’$)A-Z\\]|$)|!(?=\s+[A-Z]|\s*$)|(?<!\\\\)(?<!matrix\})\n")
CLAUSE = re.compile(r"[.,;:!?—–]+\s|\s[(—–-]|\n|\.\.|\b(?:wait|actually|sorry|rather)\b|$", re.I)
GAP = re.compile(r"(?:\\[a-z]+|\W|_|\b(?:or|and|the|final|correct)\b)*|[^.!?\n]*\bor\W*", re.I)
LONGEST = 6_000                                                  # characters of an answer


def _statements(output, kind):
    """The text of the last statement, and of those side by side with it, in their order.

    An unfinished or over-long statement is "". Without any statement the list is empty.
    """
    marks, group, end = list(deque(MARKER.finditer(output), maxlen=9)), [], 0
    for mark, following in zip(marks, marks[1:] + [None]):
        if mark.start() < end:                                   # inside the box before it
            continue
        if not GAP.fullmatch(output, end, mark.start()):         # words in between: a correction
            group = []
        if mark[0][0] == "\\":
            text, end = _braced(output, mark.end())
        else:
            start = LEAD.match(output, mark.end()).end()
            stop = following.start() if following else len(output)
            line = output[start:max(start, min(stop, start + LONGEST))]
            cut = (re.compile(r"\n") if kind == "text" else END).search(line)
            text = line[:cut.start()] if cut else line
            end = start + CLAUSE.search(line).start()
            if following and not cut:                            # runs into the next statement
                text = re.sub(r"(?:\W*\b(?:or|and|the|final|correct))+\W*$", "", text.strip(), flags=re.I)
                if not text or following[0][0] == "\\" and not _read(text, kind):
                    continue                                     # "The answer is x = \boxed{5}"
        group.append(text if len(text) < LONGEST else "")
    return group


def _braced(output, start):
    """The text from `start` to the brace that closes there, and the position behind that."""
    depth = 1
    for hit in re.compile(r"\\.|[{}]", re.S).finditer(output, start, start + LONGEST):
        depth += (hit[0] == "{") - (hit[0] == "}")
        if depth == 0:
            return output[start:hit.start()], hit.end()
    return "", start


# ---- 2. Dressing: LaTeX and Markdown that does not change a value ----

SYMBOLS = str.maketrans({
    "−": "-", "×": "*", "·": "*", "÷": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "π": r"\pi ",
    "√": r"\sqrt ", "∞": r"\infty ", "∪": r"\cup ", "±": r"\pm ", "²": "^2", "³": "^3", "°": " ",
    "’": "'", "“": '"', "”": '"', "`": " ", "€": " ", "£": " ", "¥": " ", "₹": " ", "¢": " "})
DRESSING = [(re.compile(pattern, re.A), new) for pattern, new in [
    (r"\\begin ?\{[pb]?matrix\}", "⌈⌈"), (r"(?:\\\\)? ?\\end ?\{[pb]?matrix\}", "⌉⌉"),
    (r"\\\\", "⌉,⌈"), (r"&", ","),                               # a matrix as a list of rows
    (r"\{,\}|,\\! ?", ","), (r"(?<=\d)\\[,!](?=\d{3}(?!\d))", ""),       # 1{,}234 and 1\,234
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])|\\q?quad(?![a-z])|\\[,;:! ]|~", " "),
    (r"\\lbrace(?![a-z])", "{"), (r"\\rbrace(?![a-z])", "}"), (r"\\([{}])", r"\1"),
    (r"\^ ?\{? ?\\(?:circ|degree)(?![a-z]) ?\}?|\\degree(?![a-z])|\\?%", " "),
    (r"\\?\$|\\[()\[\]]|\*\*(?!\w)|(?<!\w)\*\*", " "), (r"\*\*", "^"),
    (r"\\[dtc]frac", r"\\frac"), (r"(?<![\\A-Za-z])(sqrt|pi)(?![a-z])", r"\\\1 "),
    (r"\\l(?:eq?|eqslant)(?![a-z])|<=", "≤"), (r"\\g(?:eq?|eqslant)(?![a-z])|>=", "≥"),
    (r"\\neq?(?![a-z])|!=", "≠"), (r"\\(?:cdot|times)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"),
    (r"(\\sqrt|\\frac) ?(\d)", r"\1{\2}"), (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}")]]
WRAP = re.compile(r"\\(?:text|math|operatorname)[a-z]* ?\{([^{}]*)\}|\\(?:mbox|boxed|fbox) ?\{([^{}]*)\}")


def _plain(text, unwrap=True):
    text = " ".join(text.translate(SYMBOLS).split())
    for pattern, new in DRESSING:
        text = pattern.sub(new, text)
    for _ in range(3 * unwrap):                                  # \textbf{\text{B}}
        text = WRAP.sub(lambda hit: f" {hit[1] or hit[2] or ''} ", text)
    return " ".join(text.split()).strip(' *_"\'')


# ---- 3. One reader per type: a statement's text -> its answer, None if it cannot be read ----

INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|\d+)"
LITERAL = re.compile(rf"[+-]? ?(?:(?:\d+ )?{INT} ?/ ?[+-]?{INT}|(?:{INT}(?:\.\d*)?|\.\d+)"
                     r"(?:[eE][+-]?\d{1,3}(?!\d))?)", re.A)
FRAC = re.compile(rf"\\frac ?\{{ ?([+-]?{INT}) ?\}} ?\{{ ?([+-]?{INT}) ?\}}", re.A)
CHANGES_A_NUMBER = re.compile(                                   # words that are more than a unit
    r"\b(?:and|or|nor|not?|never|wrong|incorrect|hundred|thousand|[mbt]r?illion|dozen|hal(?:f|ves)"
    r"|thirds?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|squared|cubed|factorial"
    r"|plus|minus|than|base|if|to)\b|n't", re.I)
UNIT_POWER = re.compile(r"(?<=[A-Za-z}]) ?(?:\^ ?\{?-?\d\}?|\d)(?![\d.,])", re.A)


def _read_number(text):
    *left, text = _plain(text).split("=")
    left = "=".join(left)
    if left and (left[-1] in "<>!~:" or CHANGES_A_NUMBER.search(left)
                 or re.search(r"[,;] |because|since|where", left)):
        return None
    text = re.sub(r"^([+-]?) ?(?:USD?|EUR|Rs\.?) ?(?=[\d.])", r"\1", text.strip())
    text = FRAC.sub(r" \1/\2", text).strip()
    hit = LITERAL.match(text)
    rest = UNIT_POWER.sub("", text[hit.end():]) if hit else "1"
    if (any(c.isnumeric() for c in rest) or CHANGES_A_NUMBER.search(rest)
            or re.match(r"[ /(-]*[xyzinkKMBeπθ]\b", rest)        # 5x, 5k
            or re.search(r"[^\w .,;:'\"/()!?-]|_| - ", rest)):
        return None
    return hit[0] if _fraction(hit[0]) is not None else None


def _fraction(text):
    """The exact value of a text that is one literal, else None."""
    text = FRAC.sub(r" \1/\2", text).strip()
    if not LITERAL.fullmatch(text):
        return None
    total = Fraction(0)
    for part in re.sub(r" ?/ ?", "/", text.lstrip("+- ").replace(",", "")).split():
        top, _, bottom = part.partition("/")                     # int() fails on 5,000 digits
        if not Decimal(bottom or 1):
            return None
        total += Fraction(Decimal(top)) / Fraction(Decimal(bottom or 1))
    return -total if text[0] == "-" else total


def _read_choice(text):
    hit = re.match(r"[\s\"'(\[{]*((?i:(?:the )?(?:option|choice|letter) )?[\"'(\[{]*)([A-Fa-f])"
                   r"(?![\w'+#^-]|\.\w\b)(.*)", text := _plain(text))
    if not hit:
        return None
    letter, rest = hit[2], hit[3]
    if letter.islower() and re.search(r"\w", rest) and f"({letter})" not in text[:hit.end(2) + 1]:
        return None
    if letter == "A" and re.match(r" (?!because|since|as\b|is\b)\w", rest):      # the article
        return None
    other = re.match(r"(\W*(?:(?:and|or|nor|option|choice|maybe|possibly)\b\W*)*)"
                     r"(?:\([a-f]\)|[A-F]\b(?!['-]))( ?\w)?", rest)
    if other and (not other[2] or re.search(r"[a-z,/;]", other[1]) and other[0][-1] != "A"):
        return None
    return letter.upper()


def _read_yesno(text):
    words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", _plain(text).casefold())
    words = [{"true": "yes", "false": "no"}.get(word, word) for word in words]
    return words[0] if words and {*words} & {"yes", "no"} == {words[0]} else None


def _read_text(text):
    text = WRAP.sub(r" \1 ", text.translate(SYMBOLS)).casefold()
    text = " ".join(re.sub(r"[*_`\"$\s]+", " ", text).split()).strip(" .,;:!?'")
    return re.sub(r"\b(?:an?|the) (?=\w)", "", text) or None


def _first_sentences(text):
    """The prefixes of a text that may be its first sentence ("Mr. Smith" is no end)."""
    ends = re.finditer(r"(?<!\b[A-Z][a-z])(?<!\bMrs)[.!](?=\s)", text)
    return [_read_text(text[:hit.start()]) for hit in ends][:9] + [_read_text(text)]


MONTH = r"((?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*)\.?"
DATES = [(re.compile(pattern, re.A), order) for pattern, order in [
    (MONTH + r" (\d\d?)(?:st|nd|rd|th)?,? (\d{4})\b", "mdy"),
    (r"\b(\d\d?)(?:st|nd|rd|th)? (?:of )?" + MONTH + r",? (\d{4})\b", "dmy"),
    (r"\b(\d{4})[-/](\d\d?)[-/](\d\d?)\b", "ymd"), (r"\b(\d\d?)[-/](\d\d?)[-/](\d{4})\b", "mdy")]]


def _date(text):
    """(month, day, year) of a text that is one date and at most a weekday, else None."""
    found = []
    for pattern, order in DATES:
        for hit in pattern.finditer(text):
            part = dict(zip(order, hit.groups()))
            if not part["m"].isdigit():
                part["m"] = "janfebmaraprmayjunjulaugsepoctnovdec".index(part["m"][:3]) // 3 + 1
            found.append(tuple(int(part[key]) for key in "mdy"))
        text = pattern.sub("", text)
    only = re.fullmatch(r"(?:on|[a-z]{3,6}day|[ ,.])*", text)
    return found[0] if len(found) == 1 and only else None


# ---- 4. Mathematics: normal forms, then structure, then values ----

UNIT = re.compile(
    r"(?<=[\d)\]}⌉])[\s,;:(-]*(?:\\(?:text|mbox|mathrm)[a-z]* ?\{(?! ?(?:and|or|[ied]) ?\})[^{}]*\}"
    r"|(?<![A-Za-z\\])(?:[A-Za-z]{4,}|[ckm]m|[km]g|m[lL]|in|ft|mi|lbs?|oz|hrs?|min|sec|day)\b)"
    r"(?: ?\^ ?\{?-?\d\}?|[\s,/().'*-]*(?:\\text ?\{[^{}]*\}|(?!and\b|or\b)[A-Za-z]+))*")
NAME = re.compile(r"(?:\\?[A-Za-z]|[A-Z]{2}|\\?[A-Za-z]{3,})(?:_\w+)?'?(?:\(\w(?:,\w)*\))?|\(\w(?:,\w)*\)")
TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|[A-Za-z]{3,}|\S", re.A)
GREEK = {"\\" + name for name in "alpha beta gamma theta lambda mu phi omega pi infty".split()}
CLOSE = {"(": ")", "[": "]", "{": "}", "|": "|"}
ENDS = {"", "+", "-", *CLOSE.values()}


def _math(text):
    """Normal form: no dressing, no units, spaces only between words."""
    text = _plain(UNIT.sub(lambda hit: hit[0] if CHANGES_A_NUMBER.search(hit[0]) else " ",
                           _plain(text, unwrap=False)))
    text = re.sub(r",? ?\b(?:and|or)\b ?", ",", text)
    text = re.sub(r"([_^]) ?\{ ?(\w|\d+) ?\}(?!\d)", r"\1\2", text)
    return re.sub(r" (?!\w)|(?<!\w) ", "", text).strip(".,;:")


def _same(ours, gold):
    """Are two normal forms equal? Not symmetric: a plain number wants a plain number."""
    if ours == gold:
        return True
    if (ours + gold).replace(" ", "").isalpha():                 # words, not products of letters
        return len(gold) > 2 and ours.casefold() == gold.casefold()
    (our_name, ours), (gold_name, gold) = _named(ours), _named(gold)
    if our_name and gold_name and our_name != gold_name:
        return False
    if _fraction(gold) is not None:
        return _fraction(ours) == _fraction(gold)
    for relation in (r"([=<>≤≥≠]|\\in\b)", r"\\cup\b"):
        ours_split, gold_split = re.split(relation, ours), re.split(relation, gold)
        if len(gold_split) > 1:
            same = _same_set if relation == r"\\cup\b" else _same_list
            return same(ours_split, gold_split)
    (kind, ours_split), (gold_kind, gold_split) = _parts(ours), _parts(gold)
    if len(gold_split) > 1:
        same = _same_list if kind else _same_set
        return kind == gold_kind and same(ours_split, gold_split)
    return _same_value(ours, gold)


def _named(text):
    """`x=5` -> (x, 5); the last of a chain of equations, `2+3=5` -> ("", 5)."""
    first, *middle = re.split(r"=|\\in\b", text)
    if middle and not any("," in part for part in middle[:-1]):
        if NAME.fullmatch(first):
            return first, middle[-1]
        if not re.search(r"[a-zA-Z]", first):
            return "", middle[-1]
    return "", text


def _parts(text):
    """The brackets around a whole text ("" for a set or a bare list), and the parts inside."""
    def split(text):
        parts, depth = [""], 0
        for c in text:
            depth += (c in "([{⌈") - (c in ")]}⌉")
            if depth < 0:
                return None
            if c == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += c
        return parts
    inner = split(text[1:-1]) if text and text[0] in "([{⌈" and text[-1] in ")]}⌉" else None
    kind = text[0] + text[-1] if inner else ""
    parts = inner or split(text) or [text]
    if kind in ("", "{}"):
        kind, parts = "", [part.replace(r"\pm", sign) for part in parts
                           for sign in ("+-" if r"\pm" in part else "+")]
    return kind, parts


def _same_list(ours, golds):
    return len(ours) == len(golds) and all(map(_same, ours, golds))


def _same_set(ours, golds):
    """In any order; a value that the gold names (x=1, y=2) must be named."""
    ours = list(ours)
    for gold in golds if len(ours) == len(golds) <= 20 else "":
        hit = next((our for our in ours if ("=" in gold) <= ("=" in our) and _same(our, gold)), None)
        if hit is not None:
            ours.remove(hit)
    return not ours


def _same_value(ours, gold):
    if max(len(ours), len(gold)) > 300:
        return False
    pairs = [pair for pair in zip(_values(ours), _values(gold)) if pair != (None, None)]
    return bool(pairs) and all(
        None not in (a, b) and abs(a - b) <= Decimal("1e-40") * max(abs(a), abs(b)) for a, b in pairs)


@lru_cache(maxsize=1000)
def _values(text):
    """A formula's values at three points, to 60 digits; None where it has none."""
    values = []
    for point in (1, 2, -3):                                     # negative: sqrt(x^2) is not x
        tokens = [""] + TOKEN.findall(text)[::-1]
        with localcontext(Context(prec=60)):
            try:
                if re.search(r"\d\\frac\{-?\d", text):           # 2\frac{1}{2}\pi: mixed or product?
                    raise ValueError
                values.append(_sum(tokens, point, ""))
            except (ValueError, ArithmeticError, RecursionError):
                values.append(None)
    return tuple(values)


def _sum(tokens, point, close):
    """Recursive descent over a stack of LaTeX tokens, up to and with the token `close`."""
    total = _product(tokens, point)
    while (token := tokens.pop()) != close:
        if token not in ("+", "-"):
            raise ValueError
        term = _product(tokens, point)
        total = total + term if token == "+" else total - term
    return total


def _product(tokens, point):
    value = _power(tokens, point)
    while tokens[-1] not in ENDS:
        operator = tokens.pop() if tokens[-1] in "*/" else ""
        if not operator and tokens[-1][0].isdigit():             # 5 6 is no product
            raise ValueError
        factor = _power(tokens, point)
        if operator == "/" and tokens[-1] not in ENDS | {"*", "/"}:      # 1/2x: (1/2)x or 1/(2x)?
            raise ValueError
        value = value / factor if operator == "/" else value * factor
    return value


def _power(tokens, point):
    token = tokens.pop()
    if token in ("+", "-"):
        return _power(tokens, point) * (1 if token == "+" else -1)
    base = _atom(token, tokens, point)
    if tokens[-1] != "^":
        return base
    tokens.pop()
    exponent = _power(tokens, point)
    if abs(exponent) > 99:
        raise ValueError
    return base ** exponent


def _atom(token, tokens, point):
    if token in CLOSE:
        value = _sum(tokens, point, CLOSE[token])
        return abs(value) if token == "|" else value
    if token == r"\frac":
        top = _atom(tokens.pop(), tokens, point)
        return top / _atom(tokens.pop(), tokens, point)
    if token == r"\sqrt":
        root = _atom(tokens.pop(), tokens, point) if tokens[-1] == "[" else Decimal(2)
        base = _atom(tokens.pop(), tokens, point)
        return base.sqrt() if root == 2 else base ** (1 / root)
    if token in GREEK or len(token) == 1 and token.isalpha():    # any value will do, even for pi
        value = random.Random(f"{token} {point}").uniform(1, 3)
        return Decimal(value).copy_sign(Decimal(point))
    return Decimal(token) if token[:1].isdigit() or token[:1] == "." else Decimal("")


# ---- 5. The two questions that the other files ask ----

READ = {"number": _read_number, "choice": _read_choice, "yesno": _read_yesno, "text": _read_text,
        "math": lambda text: text if _math(text) else None}


def _read(text, kind):
    return READ[kind](text) if text else None


def _matches(text, gold, kind):
    """Does a statement's text give the gold answer?"""
    if kind == "text":
        gold, said = _read_text(gold), _first_sentences(text)
        date = gold and _date(gold)
        return gold in said or bool(date) and date in map(_date, filter(None, said))
    if kind == "math":
        return _same(_math(text), _math(gold))
    ours, gold = _read(text, kind), _read(gold, kind)
    if kind == "number" and ours and gold:
        return _fraction(ours) == _fraction(gold)
    return ours is not None and ours == gold


def extract_answer(output, answer_type):
    """The answer that the output states, in a plain form; None if no statement can be read."""
    group = _statements(output, answer_type)
    if not group or _read(group[-1], answer_type) is None:
        return None
    if not all(_matches(text, group[-1], answer_type) for text in group[:-1]):
        return None
    return _read(group[-1], answer_type)


def is_correct(output, gold, answer_type):
    """Does the output state the gold answer? This is R_outcome, Eq. 4."""
    return (extract_answer(output, answer_type) is not None
            and _matches(_statements(output, answer_type)[-1], gold, answer_type))


# ---- 6. What it earns ----

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
