"""The toy world: word problems, and ORACLE, which knows the probe of each rule.

A problem is a story: somebody has some things, one or two events change their number (gives, gets,
finds, loses, buys bags, shares), and a question asks for the result. All numbers are in 1..20.

ORACLE maps a rule to a function: a problem -> (probe, rationale, answer type, answer), or None
where the rule does not fit. Each rationale leads to its answer: whoever has read it needs no second
look at the story. A claim is computed and compared, an option is named by its letter.
"""
from typing import NamedTuple

import numpy as np

import ei

# ---------------------------------------------------------------------------------------- the world

NAMES = "Ann Ben Cara Dan Eva Finn Gina Hugo Ida Jon Kim Leo Mia Ned Ola Pia".split()
TEST_NAMES = "Quinn Rosa Sam Tara Uma Vera Will Zoe".split()
THINGS = "apples pens coins shells cards books stamps beads nuts plums".split()
EVENTS = {  # event: (operation, sentence, why the operation is right)
    "gives": ("-", "{A} gives {n} {o} to {B}.", "{A} no longer has what {A} gives"),
    "gets": ("+", "{A} gets {n} {o} from {B}.", "{A} now also has what {A} gets"),
    "loses": ("-", "{A} loses {n} {o}.", "{A} no longer has what {A} loses"),
    "finds": ("+", "{A} finds {n} {o}.", "{A} now also has what {A} finds"),
    "buys": ("x", "{A} buys {n} bags with {v} {o} in each.", "every bag holds as many"),
    "shares": ("/", "{A} shares all {o} equally among {n} friends.", "every friend gets as many")}
HELD_OUT = {("finds", "gives"), ("finds", "gets"), ("gives", "finds"), ("gives", "loses"),
            ("buys", "finds"), ("buys", "loses")}  # events that no training question joins
DO = {"+": "add", "-": "subtract", "x": "multiply by", "/": "divide by"}
UNDO = {"+": "-", "-": "+", "x": "/", "/": "x"}
APPLY = {"+": lambda v, n: v + n, "-": lambda v, n: v - n, "x": lambda v, n: v * n,
         "/": lambda v, n: v // n if v % n == 0 else -1}


class Problem(NamedTuple):
    A: str          # who has the things
    B: str          # who else is in the story
    o: str          # the things
    start: int      # how many at first (in each bag, if the first event is "buys")
    events: tuple   # ((event, n), ...), one or two

    def say(self, text, **numbers):
        return text.format(A=self.A, B=self.B, o=self.o, **numbers)

    def steps(self):
        """(event, its operation, value before it, n, value after it) of every event."""
        v, steps = self.start, []
        for event, n in self.events:
            w = APPLY[EVENTS[event][0]](v, n)
            steps.append((event, EVENTS[event][0], v, n, w))
            v = w
        return steps

    def result(self):
        return self.steps()[-1][-1]

    def first(self):
        return self._replace(events=self.events[:1])

    def shared(self):
        return self.events[-1][0] == "shares"

    def valid(self):
        return all(1 <= x <= 20 for step in self.steps() for x in step[2:])

    def story(self, hidden=False):
        """The sentences of the story; hidden: without the number at first."""
        v = "some" if hidden else self.start
        told = [] if self.events[0][0] == "buys" else [self.say("{A} has {v} {o}.", v=v)]
        return " ".join(told + [self.say(EVENTS[event][1], n=n, v=v) for event, n in self.events])

    def reasoning(self):
        return " ".join(
            self.say(("Each friend gets" if event == "shares" else "{A} has")
                     + " {v} {op} {n} = {w} {o}.", v=v, op=op, n=n, w=w)
            for event, op, v, n, w in self.steps())

    def forward(self):
        """-> (question, rationale, answer type, answer), as all that follows."""
        ask = ("How many {o} does each friend get?" if self.shared() else
               "How many {o} does {A} have now?")
        return f"{self.story()} {self.say(ask)}", self.reasoning(), "number", self.result()

    def backward(self):
        """The inverse question: the result is told, the number at first is asked for."""
        told = "Each friend gets {w} {o}." if self.shared() else "Now {A} has {w} {o}."
        ask = ("How many {o} are in each bag?" if self.events[0][0] == "buys" else
               "How many {o} did {A} have at first?")
        why = [self.say(("Each bag holds" if event == "buys" else "Before that {A} had")
                        + " {w} {op} {n} = {v} {o}.", v=v, op=UNDO[op], n=n, w=w)
               for event, op, v, n, w in self.steps()[::-1]]
        return (f"{self.story(hidden=True)} {self.say(told, w=self.result())} {self.say(ask)}",
                " ".join(why), "number", self.start)


# A quarter of the pairs (number at first, number of the first event) belongs to the test problems.
TEST_PAIRS = np.random.default_rng(0).random((21, 21)) < 0.25


def draw(rng, names, test=False, n_events=None):
    """A random problem with all its numbers in 1..20; test: its first two are one of TEST_PAIRS."""
    while True:
        A, B = map(str, rng.choice(names, 2, replace=False))
        kinds = [str(rng.choice(list(EVENTS))) for _ in range(n_events or rng.integers(1, 3))]
        if "buys" in kinds[1:] or "shares" in kinds[:-1]:
            continue
        start = int(rng.integers(2, 21))
        ns = [int(rng.integers(2, 6 if kind in ("buys", "shares") else 10)) for kind in kinds]
        problem = Problem(A, B, str(rng.choice(THINGS)), start, tuple(zip(kinds, ns)))
        if TEST_PAIRS[start, ns[0]] == test and problem.valid():
            return problem


# ----------------------------------------------------------- the ten rules, as somebody knows them

def pick(p, options):
    """A free choice; it depends on the number at first alone, so that a small teacher learns it."""
    return options[p.start % len(options)]


def choose(p, question, options, right):
    """-> (the question with its options, the letter of the right one). Their order, too, depends on
    the number at first alone, and not on which of them is right."""
    k = p.start % len(options)
    options = options[k:] + options[:k]
    return ei.lettered(question, options, options.index(right))[:2]


def after(word):
    """The next name, or the next thing, in its list."""
    words = next(words for words in (NAMES, TEST_NAMES, THINGS) if word in words)
    return words[(words.index(word) + 1) % len(words)]


def counterfactual(p):
    """The last number of the story is one less, which is always possible."""
    event, n = p.events[-1]
    twin = p._replace(events=(*p.events[:-1], (event, n - 1)))
    return twin.forward() if EVENTS[event][0] in "+-" else None


def challenge(p):
    event, op, _, n, _ = p.steps()[0]
    claim = pick(p, [x for wrong in DO if wrong != op for x in (op, wrong)])
    return (f"{p.story()} Somebody objects that one must {DO[claim]} {n}. Is the objection right?",
            f"One must {DO[op]} {n}, because {p.say(EVENTS[event][2])}. The objection says to "
            f"{DO[claim]} {n}, which is {'right' if claim == op else 'wrong'}.",
            "yesno", "yes" if claim == op else "no")


def decomposition(p):
    return p.first().forward() if len(p.events) > 1 else None


def why(p):
    event, op, _, n, _ = p.steps()[0]
    kinds = [event if op == "-" else "loses", event if op == "+" else "finds",
             event if op in "x/" else "buys"]  # one for each reason: less, more, as many
    right, *reasons = [p.say(EVENTS[kind][2]) for kind in (event, *kinds)]
    probe, letter = choose(p, f"{p.first().story()} Why does one {DO[op]} {n}?", reasons, right)
    return (probe, f"One must {DO[op]} {n}, because {right}. That is ({letter}).",
            "choice", letter)


def mechanism(p):
    event, op, v, n, _ = p.steps()[0]
    if event == "shares":
        return (f"{p.story()} " + p.say("How many {o} does {A} have when each friend has one?"),
                p.say("{A} has {v} - {n} = {w} {o}.", v=v, n=n, w=v - n), "number", v - n)
    j = pick(p, range(1, n))
    ask = "are in {j} of the bags" if event == "buys" else "does {A} have after the first {j}"
    return (f"{p.first().story()} " + p.say("How many {o} %s?" % ask, j=j),
            p.say("There are {v} {op} {j} = {w} {o}.", v=v, op=op, j=j, w=APPLY[op](v, j)),
            "number", APPLY[op](v, j))


def contrast(p):
    """Somebody else starts with as many; the first number is one less, which is always possible."""
    event, n = p.events[0]
    if EVENTS[event][0] not in "+-":
        return None
    C = after(p.A) if after(p.A) != p.B else after(p.B)
    twin = p._replace(A=C, events=((event, n - 1),))
    more = p.A if p.first().result() > twin.result() else C
    probe, letter = choose(p, f"{p.first().story()} {twin.story()} "
                           + p.say("Who has more {o} now?"), [p.A, C, "both the same"], more)
    return (probe, f"{p.first().reasoning()} {twin.reasoning()[:-1]}, so {more} has more. "
            f"That is ({letter}).", "choice", letter)


def hypothesis(p):
    result, claim = p.result(), p.result() + pick(p, (0, 1, 0, 2, 0, 3))
    who = "each friend gets" if p.shared() else "{A} now has"
    return (f"{p.story()} Somebody says that {p.say(who)} {claim} {p.o}. Can that be right?",
            f"{p.reasoning()} The claim is {claim}. {claim} - {result} = {claim - result}, so they "
            + ("agree." if claim == result else "differ."),
            "yesno", "yes" if claim == result else "no")


def transfer(p):
    return p._replace(A=after(p.A), B=after(p.B), o=after(p.o)).forward()


def cause(p):
    event, v = p.events[0][0], p.start
    if event == "shares":
        return None
    if event == "buys":
        return (f"{p.first().story()} " + p.say("How many {o} does one more bag add?"),
                p.say("Each bag holds {v} {o}.", v=v), "number", v)
    k = pick(p, range(2, 7))
    return (f"{p.first().story()} " + p.say("How many more {o} does {A} have now with {k} more {o} "
                                            "at first?", k=k),
            f"Every one more at first is one more now: {k} more at first are {k} more now.",
            "number", k)


ORACLE = {"R1": counterfactual, "R2": challenge, "R3": decomposition, "R4": why, "R5": mechanism,
          "R6": contrast, "R7": hypothesis, "R8": Problem.backward, "R9": transfer, "R10": cause}
