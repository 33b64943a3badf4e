"""What is right, and what it earns: answer extraction and matching, and the rewards.

A student ends with "The answer is X." or \\boxed{X}. The last such statement counts, and others
right before it must agree. Without one there is no credit, and none where a "wait" or an "or"
follows: in doubt the reading is strict, since a policy exploits any wrong answer that is paid.
"""
import operator
import random
import re
from contextlib import suppress
from datetime import datetime
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from itertools import accumulate

WHAT = {"number": "one number", "text": "a few words", "math": "a number or formula in LaTeX",
        "choice": "the letter of one option", "yesno": "yes or no"}
INSTRUCTION = {kind: f'End with the sentence "The answer is X", where X is {what}.'
               for kind, what in WHAT.items()}

# ---- 1. Where does the output state its answer? ----
MARKER = re.compile(r"\\(?:boxed|fbox)\s*\{|####|(?:answer|Answer|ANSWER)[\s*_]*"
                    r"(?::|(?i:is\b(?!\s+correct\b)|is(?=n['’]?t\b)))")
SPECIAL = re.compile(r"<[|｜][^<>\n]{1,30}[|｜]>|</\w{1,20}>|<(?:[a-z_]{2,20}|[bs])/?>")  # </s>
LEAD = re.compile(r"[\s:*_$`]*(?:(?:\\[\[(]|,? ?\b(?:(?i:final answer)|therefore|thus|hence|then"
                  r"|exactly|equal to)\b,?)[\s:*_$`]*)*")        # dressing
HEADING = re.compile(r"(?:\(?\w{1,3}[.):] *)?(?!(?:Yes|No|True|False)[^\w ])[A-Z][a-z]+.*\n\s*\S")
ITEM = re.compile(r"[–—] |(?<=\n)(?:[-•] (?![*$]*\\f?box)|\(?\d{1,3}[.)] +[A-Za-z])")    # of a list
FORMULA = r"(?!\W*[A-F]\b|.*(?:\([A-Fa-f]\)|\b(?i:or|yes|not?|true|false)\b)).*(?:[\d<>=]|\\[^tm])"
DENIED = re.compile(r"(?i)(?:\b(?:not|never|cannot|than)|n['’]t)(?: be)?[\s*_$]*$|[-−–<>≤≥≠]\$?$")
SENTENCE = re.compile(r"(?<!\.\.)\.(?=[\s*_\"'”’$)A-Z]|\\[])]|$)|!(?=\s+[A-Z]|\s*$)|(?<!\\\\)\n")
CORRECTION = re.compile(r"(?i)\b(?:wait|actually|sorry|wrong)\b|[^\w\s]\s*(?:no|but|so|then|hmm)\b")
WITHDRAWN = re.compile(r"(?i)^\W{0,9}(?:or|but|however)\b|^[$\s]*(?:,|and\b)[$\s]*\d|[.!?\n]\W{0,9}"
    r"(?:but )?(?:(?:wait|actually|oops|hmm|sorry|correction|hold on|scratch that)\b|no, (?:it|\d)"
    r"|(?:it|this|that) ?(?:(?:['’]s|is) (?:wrong|incorrect|false|not [rc]\w+)|could|might)\b)")
BESIDE = re.compile(r"(?i)[\W_]*(?:\b(?:or|and|the|final|correct|quad)\b[\W_]*)*|[^.!?\n]*\bor\W*")
LINKED = re.compile(r"(?i)(?:\W*\b(?:or|and|the|final|correct))*\W*$")
LONGEST = 6_000                                                  # characters of an answer


def _statements(output, kind):
    """The texts of the last statement and of those side by side with it; unfinished: ""."""
    output = SPECIAL.sub("\n", output)
    texts, end, marks = [], 0, list(MARKER.finditer(output))[-9:]
    for mark, following in zip(marks, marks[1:] + [None]):
        if mark.start() < end:                                   # inside the box before it
            continue
        start = LEAD.match(output, mark.end()).end()
        if (HEADING if mark[0] == "####" else ITEM).match(output, start):
            continue                                             # a section opens
        if texts and not BESIDE.fullmatch(output, end, mark.start()):
            texts = []                                           # words in between: a correction
        if mark[0][0] == "\\":                                   # up to the brace that closes it
            braces = [*re.finditer(r"\\.|[{}]", output[mark.end():mark.end() + LONGEST], re.S)]
            depths = accumulate((hit[0] == "{") - (hit[0] == "}") for hit in braces)
            end = mark.end() + next((hit.end() for hit, n in zip(braces, depths) if n < 0), 0)
            denied = DENIED.search(output, max(0, mark.start() - 30), mark.start())
            text, after = "" if denied else output[mark.end():end][:-1], end
            if kind in ("choice", "yesno") and re.match(FORMULA, text):
                continue                                         # "$\boxed{24 > 23}$, so yes"
        else:
            rest = output[start:following.start() if following else None][:LONGEST]
            text = SENTENCE.split(rest, 1)[0]
            end, after = start + len(CORRECTION.split(text, 1)[0]), start + len(text)
            if kind in ("text", "choice"):                       # "b. the dog", options behind it
                text = re.match(r".*(?:\n[ *-]*\(?[A-F][).:].*)*", rest)[0].replace("\n", " | ")
            if following and text == rest:                       # runs into the next statement
                text = text[:-40] + LINKED.sub("", text[-40:])
                if not text or following[0][0] == "\\" and _read(text, kind) is None:
                    continue                                     # "The answer is x = \boxed{5}"
        texts.append(text if len(text) < LONGEST else "")
    return [""] if texts and WITHDRAWN.search(output[after:after + 2000]) else texts


# ---- 2. What does a statement's text answer? ----
CHARACTERS = str.maketrans("−–—‐‑﹣－⁄∕×·‘’ʼ“”`€£¥₹₩¢", "-------//**'''\"\"\"      ") | {
    ord("²"): "^2", ord("³"): "^3", ord("°"): r"^\circ ", ord("º"): r"^\circ "}
COMMANDS = dict(zip("le leq leqslant lt ge geq geqslant gt ne neq times cdot div pm cup bigcup in "
    "infty pi sqrt frac dfrac tfrac cfrac binom dbinom tbinom emptyset varnothing Omega alpha beta "
    "theta lambda mid vert lvert rvert colon lbrace rbrace".split(),
    "≤≤≤<≥≥≥>≠≠**÷±∪∪∈∞π√ƒƒƒƒ∁∁∁∅∅Ωαβθλ||||:{}"))
REWRITE = [(re.compile(pattern, re.A), new) for pattern, new in [
    (r"[,;]?\$?,? \(?(?:because|since|where|which|that is)\b(?!.{0,99}\b(?:or|not|wrong)\b).*", ""),
    (r"^ ?\{([^{}]*)\} ?$", r"\1"), (r"\\\{ ?\\\}", "∅"), (r"&", ","), (r"<=", "≤"), (r">=", "≥"),
    (r"\\\\(?: ?\[[\d.]+[a-z]+\])?|\\cr\b", "⌉,⌈"),               # a matrix: rows of cells
    (r"\\begin ?\{(?:[pb]?matrix|array)\}(?: ?\{[clr]+\})?", "⌈⌈"),
    (r"(?:⌉,⌈)? ?\\end ?\{(?:[pb]?matrix|array)\}", "⌉⌉"),
    (r"\{,\}|,\\! ?", ","), (r"(?<=\d)\\[,!](?=\d{3}(?!\d))", ""),       # 1{,}234 and 1\,234
    (r"(?:\^ ?\{? ?\\circ ?\}?|\\degree) ?(?:[CF]\b)?|\b[A-Z]{1,2}(?=\$\d)|\\?[%$]|\\[][()]", " "),
    (r"\\[,;:! ]|(?<=\w)~|(?<=\{)~(?=[A-Za-z])|\*\*(?!\w)|(?<!\w)\*\*", " "), (r"\*\*", "^"),
    (r"(?:\\|(?<![\\A-Za-z]))((?:arc)?(?:sin|cos|tan|sec|csc|cot)h?|ln|log)(?![a-z])", r"\\\1∘"),
    (r"\\(?:left|right|[bB]ig[lr]?|q?quad|therefore|large|displaystyle|mathbb)(?![a-z]) ?", " "),
    (r"\\([A-Za-z]+)(?!∘) ?", lambda hit: COMMANDS.get(hit[1], hit[0])), (r"\\([{}])", r"\1"),
    (r"(?<![\\A-Za-z])sqrt", "√"), (r"(?<![\\A-Za-z])pi(?![a-z])", "π"), (r"\\exp", "e^"),
    (r"([_^]) ?\{ ?(\w|-?\d+) ?\}", r"\1\2 "), (r"([√ƒ∁]|√\[\w\]) ?(\w|π)", r"\1{\2}"),   # \frac12
    (r"([ƒ∁] ?\{[^{}]*\}) ?(\w|π)", r"\1{\2}"), (r"^([^,±]*)±([^,±]*)$", r"\1+\2,\1-\2")]]
WRAP = re.compile(r"\\(?:text|math|bold|operatorname|underline|[hmf]?box)[a-z]* ?\{([^{}]*)\}")
UNIT = re.compile(r"(?:(?<=[\d)\]π∞])|(?<=[\dπ)}]\}))[ (-]*(?:\\(?:text|mbox|mathrm)[a-z]* ?\{"
    r"(?! ?(?:and|or|[ied]) ?\})[^{}]*\}|(?:[A-Za-z]{4,}|[ckm]m|[km]g|m[lL]|in|ft|mi|lbs?|hrs?|min"
    r"|day|(?<= )[mgsLh])\b)(?: ?\^ ?\{?-?\d\}?|[ /().'*-]*(?:\\(?:text|mathrm) ?\{[^{}]*\}"
    r"|(?!and\b|or\b)[A-Za-z]+))*")
NOT_A_UNIT = re.compile(r"(?i)\b(?:and|or|nor|not?|never|false|wrong|incorrect|plus|minus|divided"
    r"|multiplied|than|mod|base|if|unless|to|too|out|least|most|minimum|approx\w*|roughly|nearly"
    r"|maybe|perhaps|might|may|could|so|ish|squared|cubed|factorial|score|grand|gross|bn|mil"
    r"|th|hal(?:f|ves)|of [\dxyz]|(?:point|over|root|remainder|below) (?=\w)|(?:hundred|thousand"
    r"|dozen|[mbt]r?illion|lakh|crore)(?:th)?s?|(?<!\()(?<!ty-)(?:two|th(?:ree|ir)|fou?r|fi[vf]e?"
    r"|six|seven|eight?|nine?|ten|eleven|twelv?f?e?|twen)(?:ty|teen)?(?:th|d)?s?)\b|n't"
    r"|doubled|\d ?(?:bn|mil|st|nd|rd|th)\b")                    # they change the number
INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|\d+)"
LITERAL = (rf"[+-]? ?(?:(?:\d+ )?{INT}/[+-]?(?=[\d,]*[1-9]){INT}|(?:{INT}(?:\.\d*)?|\.\d+)"
           r"(?:[eE][+-]?\d{1,3}(?!\d))?)")
FRAC = re.compile(rf" ?ƒ\{{([+-]?{INT})\}}\{{([+-]?{INT})\}}", re.A)
NUMBER = re.compile(r"(?:(?:[^<>≤≥≠!~:,;]|,(?=\d))*= ?)?(?:(?:USD?|EUR|GBP|CAD|INR|JPY|CNY|Rs) ?)?"
    rf"({LITERAL})(?![ /(-]*[bcefijknopqruvwxyzBKMX]\b|a\b|[abcxyz]{{2,3}}\b|[/-]$|!|\.\.|\. \w)"
    r"(?:[A-Za-zÀ-ɏµμΩ .,;:'\"/()!?-]|(?<=[A-Za-zΩ])\*(?=[A-Za-z])|(?:(?<=[A-Za-z])\^\{?-?\d\}?"
    r"|(?<=[mt])[23])(?![\d.,]))*", re.A)                        # [x =] [currency] literal [unit]
CHOICE = re.compile(r"[\s\"'(\[{*_$]*(?:(?i:(?:the )?(?:option|choice|letter):? )[\"'(\[{]*)?(?:"
    r"(?<=\()([A-Fa-f])(?=\))|([B-F]|A(?! (?!because|since|as\b|is\b)\w))|([a-f])(?=\W*$|[.!] "
    r"[A-Z]))(?![\w+#^-]|'\w|\.\w\b| ?=|\? *\w|[\"')\]}*_$]*,?(?: which)? (?:(?:is|was)(?:n't| not"
    r"| wrong| incorrect| false)|can(?:'t|not))|\W*(?:\b(?:and|n?or|to|through|plus|also|with"
    r"|together|versus|vs|as|well|option|choice|maybe|even|possibly)\b\W*)+(?:[A-F]\b|[a-f]\))"
    r"|[^\w,&/;+]*[,&/;+]\W*[B-F]\b|\W*[A-F]\b(?=\W*(?:$|[A-F]\b))|\W*\([a-f]\)"
    r"|[^|]*\| \W*[B-F][).:] (?!is\b|was\b)|(?:(?!\b(?:because|since|as|not|rather"
    r"|unlike)\b)[^.!?;:])*?(?: \(?[B-F]\) \w|(?:\b(?:and|n?or|versus|vs|plus)|[,&/]) *(?:\([A-F]\)"
    r"|[A-F][).:](?= ))(?! (?:is|was)\b)))")                     # not the article A, not B or C
DATES = "%m_%d_%Y %Y_%m_%d %B_%d_%Y %b_%d_%Y %d_%B_%Y %d_%b_%Y %Y_%B_%d".split()
NO_DATE = re.compile(r"^on | of |\b(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"
    r"\b|(?<=sep)t\b|(?<=\d)(?:st|nd|rd|th)\b|(?:\(|\b(?:because|since|which|as)\b)(?!.{0,99}(?:\d"
    r"|dd/m|\b(?:or|not|wrong|minus|plus|before|after)\b)).*|[-/,()]|\.(?!\d)")   # Sept. 3rd, 2020


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
        text = re.sub(r'[*_"$]|\b(?:a|(?i:an|the)) (?=\w)|^A (?=\w)', "", text)
        text = re.sub(r"\ba (?=\w)", "A ", text.strip(" .,;:!?'").casefold())   # hepatitis A virus
        day = "_".join(NO_DATE.sub(" ", re.split(r"(?<=[\d)])[.!] (?!\d)", text)[0]).split())
        for form in DATES:
            with suppress(ValueError):
                return datetime.strptime(day, form).strftime("%m/%d/%Y")
        return text or None
    if kind == "yesno":
        text = text.casefold().replace("true", "yes").replace("false", "no")
        words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text)
        return words[0] if words and {*words} & {"yes", "no"} == {words[0]} else None
    if kind == "choice":
        hit = CHOICE.match(text)
        return hit and hit[hit.lastindex].upper()
    text = re.sub(r" (?!\w)|(?<![\w,]) |(?<=,) (?!\d{3})", "", text)      # "1, 234" is no 1,234
    if kind == "number":
        hit = NUMBER.fullmatch(FRAC.sub(r" \1/\2", text).strip())
        return hit[1].replace(",", "") if hit and not NOT_A_UNIT.search(text) else None
    text = re.sub(r"[,;]? ?\b(?:and|or)\b ?|;", ",", text).rstrip(".,;:").lstrip("=")
    parts = sorted(text.split(","))
    if all("=" in part for part in parts):                       # y=2,x=1 or x=1,x=2
        text = ",".join(parts).replace("," + parts[0].split("=")[0] + "=", ",")
    return text if text and text[-1] != "=" else None


# ---- 3. Are two answers equal? Formulas as exact literals, or else by value ----
NAMED = re.compile(                                              # (x)=(5), (f(x))=(2x), (x)=2+3=(5)
    r"((?:m?\\angle ?)?(?:\\[A-Za-z]+|[A-Za-zαβθλ]|[A-Z]{2}|[A-Za-z]{3,})(?:_\w+ ?|\^-1 ?)?'?"
    r"(?:\(\w(?:,\w)*\))?|[fgP]\([^=]*\)|\(\w(?:,\w)*\)|[^A-Za-z,=∈]+)(?:[=∈][^,=∈]*)*[=∈]([^=∈]+)")
UNCLEAR = re.compile(r"(?<!∘)_|['\"]|(?<![\\A-Za-z])(?![abc]{3}|[xyz]{3})[A-Za-z]{3}|^[A-Za-z]{2,}$"
    r"|\dƒ\{-?\d|/\w+[(ƒ√A-Za-zπ]|([^\W\d_]|[)}\]]|(?<!_)\d ) ?\d", re.A)   # words, 1/2x, x2, 5 6
TOKEN = r"\\\w+∘(?:[\^_]\w+ ?)?(?:\([^()]*\)|\{[^{}]*\}|[^\W_ƒ]+(?! ?[\w{(\[^]))|[\d.]+|\S"
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),
             "/": (2, operator.truediv), "÷": (2, operator.truediv), "^": (4, operator.pow)}


def _equal(ours, gold, kind):
    if kind not in ("number", "math"):                           # "Mr. Smith" may be a sentence
        return ours == gold or kind == "text" and bool(          # "U.S. Navy" is not "U.S."
            re.match(re.escape(gold) + r"(?<!\.[a-z])[.!] ", ours))
    (our_name, ours), (name, gold) = (hit.groups() if hit else ("", text) for hit, text in (
        (NAMED.fullmatch(text), text) for text in (ours, gold)))
    if our_name and name and our_name != name:
        return False
    if _fraction(gold) is not None:                              # a plain number wants its like
        return _fraction(ours) == _fraction(gold)
    if ours == gold or gold.replace(" ", "").isalpha() and len(gold) > 1:
        return ours.lower() == gold.lower()
    values = [(_value(ours, point), _value(gold, point)) for point in (1, 2, -3)]   # √(x^2) is no x
    return any(want for _, want in values) and all(have == want for have, want in values)


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
    if len(text) > 300 or sum(map(text.count, "^√∘")) > 20 or UNCLEAR.search(text):
        return None
    if re.search("[>≥]", text):                                  # 5 > x is x < 5
        text = "".join(re.split("([<>≤≥=])", text)[::-1]).translate(str.maketrans("<>≤≥", "><≥≤"))
    try:
        with localcontext(Context(prec=100, Emax=60)):           # a bare list is a set: {1,2}
            return [side if side in "=<≤≠∈" else sorted((_evaluate(
                ["", "⟩", "}", *re.findall(TOKEN, part)[::-1], "{", "⟨"], point)
                for part in side.split("∪")), key=str) for side in re.split("([=<≤≠∈])", text)]
    except (ArithmeticError, LookupError, TypeError, RecursionError):
        return None


def _evaluate(tokens, point, strength=0):
    """The value of the tokens up to an operator no stronger than `strength`; a list's as text."""
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
    elif token.isalpha() or token == "∞" or "∘" in token:        # any value will do, even for pi
        name = re.sub(r"[({ ]+", " ", token.rstrip(")} ")).replace("∘ ", "∘")
        value = Decimal(random.Random(f"{name}{point}").uniform(1, 3)).copy_sign(point)
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


def extract_answer(output: str, answer_type: str) -> str | None:
    """The answer that the output states, as text; None if no statement of it can be read."""
    return _stated(output, answer_type)[answer_type != "math"]


def is_correct(output: str, gold: str, answer_type: str) -> bool:
    """Does the output state the gold answer?"""
    ours, gold = _stated(output, answer_type)[1], _read(gold, answer_type)
    return None not in (ours, gold) and _equal(ours, gold, answer_type)          # R_outcome, Eq. 4


def dsu_bonus(full: list, partial: list, delta: float, nu: float) -> float:
    """`delta`, in units of reward, if mean(full) > nu * mean(partial), else 0.0; lists of 0/1.

    Compared as exact fractions, with nu as it is written: 0.6 is not more than 1.2 times 0.5.
    """
    better = sum(full) * len(partial) > Fraction(str(nu)) * Fraction(sum(partial)) * len(full)
    return float(delta) if better else 0.0                                       # r_dsu, Eq. 5


def total_rewards(full: list, partial: list, delta: float, nu: float) -> tuple[list, list]:
    """The rewards of the full dialogues, with the bonus for correct ones, and of the partial."""
    bonus = dsu_bonus(full, partial, delta, nu)
    return [outcome + bonus if outcome else outcome for outcome in full], list(partial)   # Eq. 6


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
