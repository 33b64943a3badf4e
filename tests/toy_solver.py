"""Are the toy teacher's gold answers right? A check that trusts neither the teacher nor ORACLE.

    python tests/toy_solver.py [toy/probes.jsonl]

It reads the text of a probe alone, sentence by sentence, follows the story by the world's rules,
and finds the right answer itself. The table counts, per rule, how many gold answers are wrong
before the filters, after Eq. 1 (consistent probes) and after Eq. 2 (of kept questions), and what
Eq. 1 rejects of the wrong probes and of the right ones.
"""
import os
import re
import sys

TOY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "toy")
sys.path.insert(0, os.path.dirname(TOY))
import ei  # noqa: E402
import exgrpo  # noqa: E402

N = r"(\d+|some)"
EVENTS = {  # what happens: its sentence
    "has": rf"(\w+) has {N} (\w+)",
    "gives": rf"(\w+) gives {N} (\w+) to (\w+)",
    "gets": rf"(\w+) gets {N} (\w+) from (\w+)",
    "loses": rf"(\w+) loses {N} (\w+)",
    "finds": rf"(\w+) finds {N} (\w+)",
    "buys": rf"(\w+) buys {N} bags with {N} (\w+) in each",
    "shares": rf"(\w+) shares all (\w+) equally among {N} friends"}
CLAIMS = {  # what is said about the story, or asked
    "now has": r"Now (\w+) has (\d+) (\w+)",
    "friend gets": r"Each friend gets (\d+) (\w+)",
    "objects": r"Somebody objects that one must (add|subtract|multiply by|divide by) (\d+)",
    "says": r"Somebody says that (\w+) now has (\d+) (\w+)",
    "says friend": r"Somebody says that each friend gets (\d+) (\w+)"}
QUESTIONS = {
    "now": r"How many (\w+) does (\w+) have now",
    "friend": r"How many (\w+) does each friend get",
    "first": r"How many (\w+) did (\w+) have at first",
    "bag": r"How many (\w+) are in each bag",
    "bags": r"How many (\w+) are in (\d+) of the bags",
    "after": r"How many (\w+) does (\w+) have after the first (\d+)",
    "one each": r"How many (\w+) does (\w+) have when each friend has one",
    "more bag": r"How many (\w+) does one more bag add",
    "more": r"How many more (\w+) does (\w+) have now with (\d+) more (\w+) at first",
    "who": r"Who has more (\w+) now",
    "why": r"Why does one (add|subtract|multiply by|divide by) (\d+)",
    "objection": r"Is the objection right",
    "can": r"Can that be right"}


class Unclear(Exception):
    """The text says something that the solver does not understand."""


class Impossible(Exception):
    """The story cannot happen, as when more is lost than there is: no answer is right."""


def need(condition):
    if not condition:
        raise Unclear


def match(sentence, kinds):
    """-> (kind, groups) of the first pattern that fits the whole sentence, or None."""
    for kind, pattern in kinds.items():
        if found := re.fullmatch(pattern, sentence):
            return kind, found.groups()
    return None


def read(text):
    """-> (events, claims, question, {letter: option}). What is told or asked is (kind, groups)."""
    body, *options = text.split("\n")
    *sentences, question = re.split(r"(?<=[.?]) ", body)
    events, claims = [], []
    for sentence in sentences:
        need(sentence.endswith("."))
        if event := match(sentence[:-1], EVENTS):
            events.append(event)
        else:
            claims.append(match(sentence[:-1], CLAIMS))
    question = match(question.removesuffix("?"), QUESTIONS)
    need(question and None not in claims and events)
    return events, claims, question, dict(ei.OPTION.findall("\n".join(options)))


def play(events, hidden=None):
    """-> ({who: how many}, what each friend gets or None, the thing). `hidden`: for "some"."""
    has, friend, things = {}, None, set()

    def number(word):
        need(word != "some" or hidden is not None)
        return hidden if word == "some" else int(word)

    def begin(who, n):
        need(who not in has)
        has[who] = n

    def change(who, n):
        has[who] += n
        if has[who] < 0:
            raise Impossible

    for kind, groups in events:
        if kind == "has":
            who, n, thing = groups
            begin(who, number(n))
        elif kind == "buys":
            who, bags, n, thing = groups
            begin(who, number(bags) * number(n))
        elif kind in ("gives", "gets"):
            one, n, thing, other = groups
            giver, taker = (one, other) if kind == "gives" else (other, one)
            need(giver in has or taker in has)
            for who, sign in ((giver, -1), (taker, 1)):
                if who in has:  # what the other one has may be unknown
                    change(who, sign * number(n))
        elif kind == "shares":
            who, thing, n = groups
            need(who in has and friend is None)
            if number(n) == 0 or has[who] % number(n):
                raise Impossible
            friend, has[who] = has[who] // number(n), 0
        else:
            who, n, thing = groups
            need(who in has)
            change(who, number(n) * (1 if kind == "finds" else -1))
        things.add(thing)
    need(len(things) == 1)  # in this world nobody has two kinds of things
    return has, friend, things.pop()


OPERATION = {"loses": "subtract", "finds": "add", "buys": "multiply by", "shares": "divide by"}


def operation(events, number):
    """-> (the first event with this number, the operation that is right for it)."""
    owner = next(groups[0] for kind, groups in events if kind in ("has", "buys"))
    for kind, groups in events:
        if kind in ("gives", "gets") and groups[1] == number:
            need(owner in (groups[0], groups[3]) and groups[0] != groups[3])
            giver = groups[0 if kind == "gives" else 3]
            return (kind, groups), "subtract" if giver == owner else "add"
        if kind in OPERATION and groups[2 if kind == "shares" else 1] == number:
            return (kind, groups), OPERATION[kind]
    raise Impossible  # no event has this number


def reason(event, done):
    """Why the operation `done` is right for an event."""
    kind, groups = event
    if kind in ("buys", "shares"):
        return f"every {'bag holds' if kind == 'buys' else 'friend gets'} as many"
    if done == "subtract":
        need(kind != "gets")
        return f"{groups[0]} no longer has what {groups[0]} {kind}"
    taker = groups[3] if kind == "gives" else groups[0]
    return f"{taker} now also has what {groups[0]} {kind}"


def hidden_number(events, claims):
    """The one number that "some" can be, given what the end of the story is said to be."""
    need([kind for kind, _ in claims] in (["now has"], ["friend gets"]))
    (kind, groups), = claims
    found = set()
    for hidden in range(1000):
        try:
            has, friend, thing = play(events, hidden)
        except Impossible:
            continue
        need(groups[-1] == thing and (kind == "friend gets" or groups[0] in has))
        if int(groups[-2]) == (friend if kind == "friend gets" else has[groups[0]]):
            found.add(hidden)
    if len(found) != 1:
        raise Impossible
    return found.pop()


def partly(events, kind, n):
    """What the owner has when the only event has happened to n things, or in n bags."""
    (first, groups), *event = events
    if kind == "bags":
        need(first == "buys" and not event and int(n) <= int(groups[1]))
        return int(n) * int(groups[2])
    need(first == "has" and len(event) == 1 and event[0][0] in ("gives", "gets", "loses", "finds"))
    need(int(n) <= int(event[0][1][1]))
    _, done = operation(events, event[0][1][1])
    return int(groups[1]) + (int(n) if done == "add" else -int(n))


def yes_if(condition):
    return {"yes" if condition else "no"}


def right_answers(text):
    """The text of a probe -> the set of its right answers, as text. Raises Unclear, Impossible."""
    events, claims, (kind, asked), options = read(text)
    some = any("some" in groups for _, groups in events)
    need(some == (kind in ("first", "bag")))
    if some:
        need(kind == ("bag" if events[0][0] == "buys" else "first"))
        _, _, thing = play(events, hidden_number(events, claims))
        need(asked[0] == thing and (kind == "bag" or asked[1] == events[0][1][0]))
        return {str(hidden_number(events, claims))}
    has, friend, thing = play(events)
    if kind == "objection":
        need([claim for claim, _ in claims] == ["objects"])
        (_, (claimed, n)), = claims
        return yes_if(operation(events, n)[1] == claimed)
    if kind == "can":
        need(len(claims) == 1 and claims[0][0] in ("says", "says friend"))
        (said, groups), = claims
        need(groups[-1] == thing)
        need(friend is not None if said == "says friend" else groups[0] in has)
        return yes_if(int(groups[-2]) == (friend if said == "says friend" else has[groups[0]]))
    need(not claims)
    if kind == "why":
        event, done = operation(events, asked[1])
        if done != asked[0]:
            raise Impossible  # it asks for the reason of what is not right
        return {letter for letter, option in options.items() if option == reason(event, done)}
    need(asked[0] == thing)
    if kind == "who":
        (one, n), (other, m) = has.items()
        best = "both the same" if n == m else one if n > m else other
        return {letter for letter, option in options.items() if option == best}
    if kind in ("now", "after", "one each", "more"):
        need(asked[1] in has)
    if kind == "friend":
        need(friend is not None)
        return {str(friend)}
    if kind == "more":
        need(asked[3] == thing and friend is None and events[0][0] == "has")
        return {asked[2]}
    if kind == "more bag":
        need(events[0][0] == "buys" and len(events) == 1)
        return {events[0][1][2]}
    if kind == "one each":
        (_, (who, n, _)), (what, (_, _, friends)) = events
        need(what == "shares" and asked[1] == who)
        if int(n) < int(friends):
            raise Impossible
        return {str(int(n) - int(friends))}
    if kind in ("bags", "after"):
        return {str(partly(events, kind, asked[-1]))}
    return {str(has[asked[1]])}


def is_gold_right(probe):
    """A probe of D_EI -> True, False, or None: the solver cannot say."""
    try:
        return probe["answer"] in right_answers(probe["probe"])
    except Impossible:
        return False
    except (Unclear, ValueError, IndexError):  # two values where one was expected, and the like
        return None


# ---------------------------------------------------------------------------------------- the table

def count(path):
    """-> {rule: [(right, consistent, kept), ...] of its probes}"""
    _, rows = exgrpo.read_probes(path)
    found = {rule: [] for rule in ei.RULES}
    for row in rows:
        for probe in row["probes"]:
            found[probe["rule"]].append((is_gold_right(probe), probe["consistent"],
                                         probe["consistent"] and row["kept"]))
    return found


def share(part, whole):
    return f"{100 * len(part) / len(whole):.1f}" if whole else "-"


def table(found):
    found = found | {"all": sum(found.values(), [])}
    print(f"{'rule':5}{'probes':>8}{'solved':>8}   wrong golds, %: {'all':>5}{'Eq. 1':>8}"
          f"{'Eq. 2':>8}   Eq. 1 rejects, %: {'wrong':>6}{'right':>7}")
    for rule, marks in found.items():
        solved = [mark for mark in marks if mark[0] is not None]
        wrong, right = ([mark for mark in solved if mark[0] is is_right]
                        for is_right in (False, True))
        after = [share([m for m in wrong if m[i]], [m for m in solved if m[i]]) for i in (1, 2)]
        print(f"{rule:5}{len(marks):8}{len(solved):8}{'':19}{share(wrong, solved):>5}"
              f"{after[0]:>8}{after[1]:>8}{'':21}"
              f"{share([m for m in wrong if not m[1]], wrong):>6}"
              f"{share([m for m in right if not m[1]], right):>7}")


if __name__ == "__main__":
    table(count(sys.argv[1] if len(sys.argv) > 1 else os.path.join(TOY, "probes.jsonl")))
