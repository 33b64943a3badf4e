"""reward.py: what is paid, what is not, and that no output can hang, crash or fool the grader."""
import os
import random
import time

import pytest

import ei
import reward
from reward import INSTRUCTION, dsu_bonus, extract_answer, is_correct, total_rewards

TABLE = os.path.join(os.path.dirname(__file__), "data", "answers.txt")


def table():
    """The cases of data/answers.txt as (place, answer type, gold, mark, output)."""
    answer_type = gold = None
    with open(TABLE, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n").replace("⏎", "\n")
            if line.startswith("== "):
                answer_type, gold = line[3:].split(": ", 1)
            elif line[:2] in ("+ ", "- ", "? "):
                output = line[3:] if line[2] == ">" else f"The answer is {line[2:]}."
                yield f"answers.txt:{number}", answer_type, gold, line[0], output


CASES = list(table())
GOLDS = {kind: sorted({gold for _, k, gold, _, _ in CASES if k == kind}) for kind in INSTRUCTION}


@pytest.mark.parametrize("kind", INSTRUCTION)
def test_table(kind):
    """Paid, wrong or unreadable, each case as the table says; above all no wrong answer is paid.
    D26: simple_GRPO reads "-3" as 3 and "1,234" as 234."""
    cases = [case for case in CASES if case[1] == kind]
    verdict = {place: "+" if is_correct(output, gold, kind) else
               "?" if extract_answer(output, kind) is None else "-"
               for place, _, gold, _, output in cases}
    paid_wrongly = [case for case in cases if verdict[case[0]] == "+" != case[3]]
    assert not paid_wrongly
    assert not [(verdict[case[0]], *case) for case in cases if verdict[case[0]] != case[3]]
    assert len(cases) > 150


@pytest.mark.parametrize("kind, gold, paid, unpaid", [
    ("choice", "B",
     ["(B) dog", "(B), because (C) is wrong", "(B) dog, since (A) and (C) are cats",
      "(B) a cat, not (C)", "(B). (A) is wrong and (C) too", "B.\n(C) is a cat", "\n(B) dog"],
     ["(B) is wrong", "B) is wrong", "**B** is wrong", "(B) isn't right", "B, which is not true",
      "B) dog and C) cat", "(B) dog (C) cat", "\n(B) dog\n(C) cat", "B\n- C) cat\n- D) cow",
      "B was wrong", "B cannot be right", "(B) dog and (C) cat", "(B) dog or (C) cat",
      "(B) dog, (C) cat", "B together with C", "B versus C", "B, or maybe even C"]),
    ("number", "8",
     ["8 points", "8 sides", "8 left over", "8 (eight)", "8 dollars per week"],
     ["8 over two", "8 times two", "8 remainder three", "8 point five", "8, six",
      "8 feet six inches", "8 dollars fifty", "8 lakh", "8 below zero", "8 root two"]),
    ("number", "18", ["18 feet"], ["18th", "18th grade", "18 th"])])
def test_more_than_the_answer_is_not_paid(kind, gold, paid, unpaid):
    """A second option behind the first one's words, all options listed, an ordinal, a denial behind
    a bracket, number words that would pass for a unit: forms that a policy could learn, found by
    readers of reward.py."""
    assert [x for x in paid if not is_correct(f"The answer is {x}.", gold, kind)] == []
    assert [x for x in unpaid if is_correct(f"The answer is {x}.", gold, kind)] == []


# ---- The instruction and the grader agree ----

@pytest.mark.parametrize("kind", INSTRUCTION)
def test_what_the_instruction_asks_for_is_paid(kind):
    sentence = "The answer is X"
    assert sentence in INSTRUCTION[kind]
    for gold in GOLDS[kind]:
        for output in (sentence.replace("X", gold), f"I think.\n{sentence.replace('X', gold)}."):
            assert is_correct(output, gold, kind), (output, gold)


def test_every_example_of_every_rule_is_paid_as_asked():
    for rule in ei.RULES.values():
        for example in (rule.arithmetic, rule.commonsense):
            output = f"{example.rationale}\nThe answer is {example.answer}."
            assert is_correct(output, example.answer, example.answer_type), example
            assert not is_correct(output, "7777", example.answer_type)


def test_a_prompt_earns_nothing_by_its_own_text():
    """A student that repeats its question, with the instruction in it, must not be paid for it."""
    for kind in INSTRUCTION:
        for gold in GOLDS[kind] + ["X", "x", "one", "number", "a", "yes or no", "letter"]:
            for rule in ei.RULES.values():
                for example in (rule.arithmetic, rule.commonsense):
                    assert not is_correct(f"{example.probe}\n{INSTRUCTION[kind]}", gold, kind)
            plain = f"Question: What is {gold}?\n{INSTRUCTION[kind]}\nAnswer:"
            assert not is_correct(plain, gold, kind), (plain, gold)


# ---- Properties ----

def drawn_golds(rng, kind, count):
    """Random answers of a type, in many shapes."""
    def number():
        value = rng.choice([rng.randrange(10), rng.randrange(10 ** 6), rng.randrange(10 ** 20)])
        return rng.choice(["", "-"]) + rng.choice([
            f"{value}", f"{value:,}", f"{value}.{rng.randrange(1000):03}", f"{value}%",
            f"{value}/{rng.randrange(1, 99)}", f"${value:,}.50", f"{value}e{rng.randrange(9)}"])

    def formula(depth=2):
        if not depth or rng.random() < 0.2:
            return rng.choice([str(rng.randrange(1, 30)), "x", "y", r"\pi", "n"])
        a, b = formula(depth - 1), formula(depth - 1)
        return rng.choice([f"{a}+{b}", f"({a})({b})", rf"\frac{{{a}}}{{{b}}}", rf"\sqrt{{{a}}}",
                           f"({a})^{{{rng.randrange(2, 5)}}}", f"({a}, {b})", f"[{a}, {b})"])

    make = {"number": number, "math": formula, "choice": lambda: rng.choice("ABCDEF"),
            "yesno": lambda: rng.choice(["yes", "no", "true", "False"]),
            "text": lambda: " ".join("".join(rng.choices("abcdefgh", k=rng.randrange(1, 9)))
                                     for _ in range(rng.randrange(1, 4)))}[kind]
    return [make() for _ in range(count)]


@pytest.mark.parametrize("kind", INSTRUCTION)
def test_an_answer_equals_itself_in_every_form(kind):
    rng = random.Random(1)
    for gold in drawn_golds(rng, kind, 200) + GOLDS[kind]:
        for output in (f"The answer is {gold}.", f"Let us see.\n\\boxed{{{gold}}}", f"#### {gold}",
                       f"**Final Answer:** {gold}", f"The answer is {gold}.\n\\boxed{{{gold}}}"):
            assert is_correct(output, gold, kind), (output, gold)
            answer = extract_answer(output, kind)        # and what was read can serve as a gold
            assert is_correct(f"The answer is {answer}.", gold, kind), (answer, gold)
            assert is_correct(output, answer, kind), (output, answer)


@pytest.mark.parametrize("kind", INSTRUCTION)
def test_space_case_and_trailing_text_do_not_change_a_verdict(kind):
    rng = random.Random(2)
    golds = drawn_golds(rng, kind, 60)
    for gold, other in zip(golds, golds[1:]):
        verdict = is_correct(f"The answer is {other}.", gold, kind)
        for output in (f"  the ANSWER  is\n {other} .", f"THE ANSWER IS: {other}.",
                       f"THE ANSWER IS {other}. ", f"The answer is {other}. I hope this helps!",
                       f"x = 5, so {other}? Yes or no: (A) 3. The answer is {other}.\n\nA new line "
                       "with 3 words or 4."):
            assert is_correct(output, gold, kind) == verdict, (output, gold)


@pytest.mark.parametrize("kind", INSTRUCTION)
def test_two_statements_side_by_side_that_differ_earn_nothing(kind):
    """Rule 2. A policy that may state two answers states all of them."""
    rng = random.Random(3)
    golds = drawn_golds(rng, kind, 60)
    for gold, other in zip(golds, golds[1:]):
        if is_correct(f"The answer is {other}.", gold, kind) or is_correct(
                f"The answer is {gold}.", other, kind):
            continue
        for left, right in ((gold, other), (other, gold)):
            for output in (f"The answer is {left}. The answer is {right}.",
                           f"\\boxed{{{left}}}\\boxed{{{right}}}",
                           f"\\boxed{{{left}}} or \\boxed{{{right}}}", f"#### {left}\n#### {right}",
                           f"The answer is {left}\nFinal answer: {right}"):
                assert not is_correct(output, gold, kind), (output, gold)
        corrected = f"The answer is {other}. Wait, that is a slip. The answer is {gold}."
        assert is_correct(corrected, gold, kind), (corrected, gold)
        unfinished = f"The answer is {gold}. Therefore \\boxed{{{gold}"
        assert not is_correct(unfinished, gold, kind), unfinished


@pytest.mark.parametrize("kind", INSTRUCTION)
def test_grading_never_raises_and_agrees_with_extraction(kind):
    """Any text may come out of a model; None from extract_answer means that nothing is paid."""
    rng = random.Random(4)
    pieces = ["The answer is ", "\\boxed{", "####", "Answer:", "}", "{", "\\frac", "\\sqrt", "^",
              "_", "(", "[", "]", ")", ",", "\\", "$", "1", "2.5", "x", "=", "/", "-", "−", "\n",
              " ", "yes", "no", "A", "(B)", "or", "²", "½", "\x00", "\ud800", "\\begin{pmatrix}",
              "\\\\", "&", "\\end{pmatrix}", "\\text{", "\\pm", "9**9", "%", "05/03/2020",
              "May 33, 2020", "1/0", "0/0", "1e999", "\\sqrt[0]{x}", "0^{-1}", "∞", "٣", ".", "!"]
    for _ in range(3000):
        output = "".join(rng.choices(pieces, k=rng.randrange(1, 25)))
        gold = rng.choice(GOLDS[kind] + ["".join(rng.choices(pieces, k=3))])
        verdict = is_correct(output, gold, kind)
        assert verdict in (True, False)
        assert not (verdict and extract_answer(output, kind) is None), output


def test_exact_beyond_floats_and_beyond_4300_digits():
    """Floats merge 2^53 and 2^53 + 1, and int() raises on 5,000 digits: both are known bugs."""
    for digits in (16, 40, 300, 5000):
        gold = "9" + "0" * (digits - 2) + "1"
        assert is_correct(f"The answer is {gold}.", gold, "number")
        assert is_correct(f"\\boxed{{{gold}}}", gold, "math")
        assert not is_correct(f"The answer is {gold[:-1]}2.", gold, "number")
        assert not is_correct(f"\\boxed{{{gold[:-1]}2}}", gold, "math")
    assert not is_correct("The answer is 0." + "3" * 5000 + ".", "1/3", "number")


HOSTILE = {
    "letters": "a" * 100_000,
    "spaces": " " * 100_000,
    "backslashes": "\\" * 100_000,
    "digits": "The answer is " + "1" * 100_000,
    "answer": "answer" + " " * 100_000,
    "boxes": "\\boxed{" * 14_000,
    "full boxes": "\\boxed{5}" * 11_000,
    "nested boxes": "\\boxed{" * 7_000 + "5" + "}" * 7_000,
    "hashes": "#### " * 20_000,
    "braces": "\\boxed{" + "{" * 100_000,
    "statements": "the answer is " * 7_000,
    "dots": "The answer is 5" + "." * 100_000 + " The answer is 5",
    "lines": "The answer is\n" + "\n" * 100_000,
    "commas": "The answer is 5 " + ", " * 50_000 + "The answer is 5",
    "or": "The answer is 5 " + "or " * 30_000 + "the answer is 5",
    "tail": "The answer is 42." + " blah" * 20_000,
    "head": "blah " * 20_000 + "The answer is 42.",
    "power": "The answer is 9**9**9.",
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "powers": "\\boxed{" + "x^y+" * 72 + "1}",
    "root": "\\boxed{1.000001^{99999999999}}",
    "exponent": "The answer is 1e999999999.",
    "roots": "\\boxed{" + "\\sqrt[7]{x}+" * 24 + "1}",
    "fractions": "\\boxed{" + "\\frac12" * 800 + "}",
    "nested fractions": "\\boxed{" + "\\frac{" * 900 + "}" * 900 + "}",
    "parentheses": "\\boxed{" + "(" * 2_900 + "1" + ")" * 2_900 + "}",
    "list": "\\boxed{" + "x," * 145 + "1}",
    "rows": "\\boxed{" + "\\\\" * 2_900 + "}",
    "groups": "The answer is 1" + ",111" * 1_400 + ",11",
    "words": "The answer is 5" + " a" * 2_900,
    "one word": "The answer is " + "a" * 5_900,
    "reasons": "The answer is 5 " + "because " * 740,
    "equations": "The answer is " + "x=" * 2_900 + "y",
    "letters or": "The answer is B " + "or " * 1_900 + "C",
    "letter, commas": "The answer is B" + "," * 5_900,
    "dates": "The answer is " + "05/03/2020 " * 540,
    "brackets": "The answer is 5" + "(" * 100_000 + " The answer is 5",
    "tokens": "The answer is 5" + "</s>" * 25_000,
    "waits": "The answer is 5. " + "wait " * 20_000,
    "sections": "#### A heading\n" * 7_000,
    "reasons, or": "The answer is 5 " + "because " * 720 + "or 6",
    "date, reasons": "The answer is 05/03/2020 " + "as " * 1_900 + "or 6",
    "functions": "\\boxed{" + "\\sin x+" * 19 + "1}"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_outputs_take_milliseconds(name):
    """Regular expressions of known graders take ten seconds for 100,000 digits. These took 1 to 14
    ms on the machine they were written on; the bound leaves room for a busy one."""
    for kind, gold in (("number", "42"), ("math", "2\\sqrt{3}"), ("math", "1,2,3"), ("choice", "B"),
                       ("yesno", "yes"), ("text", "Paris")):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            is_correct(HOSTILE[name], gold, kind)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.1, (name, kind)


# ---- Eqs. 5 and 6 ----

@pytest.mark.parametrize("full, partial, nu, paid", [
    ([1, 1, 0, 0], [1, 0, 0, 0], 1, True), ([1, 0], [1, 0], 1, False), ([0, 0], [0, 0], 1, False),
    ([1, 0], [1, 1], 1, False), ([1, 0, 0, 0], [0, 0, 0, 0], 3, True), ([1, 1], [1, 0], 2, False),
    ([1] * 6 + [0] * 4, [1, 0], 1.2, False),         # 0.6 is not more than 1.2 * 0.5
    ([1] * 61 + [0] * 39, [1, 0], 1.2, True), ([1] * 3 + [0] * 7, [1] + [0] * 9, 3.0, False),
    ([1, 1, 0], [1, 0, 1, 0], 1.0, True), ([1, 1], [], 1, False),
    ([1] * 29 + [0] * 3, [1] * 25 + [0] * 7, 1.16, False)])
def test_the_bonus_is_paid_if_full_beats_nu_times_partial(full, partial, nu, paid):
    """In floats 1.2 * 0.5 may fall on either side of 0.6; the margin is compared exactly."""
    assert dsu_bonus(full, partial, 0.5, nu) == (0.5 if paid else 0.0)
    as_floats = [[float(x) for x in group] for group in (full, partial)]  # as exgrpo.py has them
    assert dsu_bonus(*as_floats, 0.5, nu) == (0.5 if paid else 0.0)
    assert isinstance(dsu_bonus(full, partial, 1, nu), float)


def test_the_bonus_goes_to_correct_full_dialogues_only():
    full, partial = total_rewards([1, 0, 1, 1], [1, 0, 0, 0], 0.5, 1)
    assert (full, partial) == ([1.5, 0, 1.5, 1.5], [1, 0, 0, 0])
    rng = random.Random(5)
    for _ in range(300):
        outcomes = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in "fp"]
        delta, nu = rng.choice([0, 0.1, 0.5]), rng.choice([1, 1.1, 2])
        bonus = dsu_bonus(*outcomes, delta, nu)
        full, partial = total_rewards(*outcomes, delta, nu)
        assert partial == outcomes[1]
        assert full == [r + bonus * r for r in outcomes[0]]
        right, right_partial = (sum(o) / len(o) for o in outcomes)
        assert not bonus or right > right_partial


def test_reward_needs_no_package():
    """reward.py can be copied alone: standard library only, and no eval anywhere in it."""
    with open(reward.__file__, encoding="utf-8") as file:
        source = file.read()
    forbidden = ("torch", "numpy", " eval(", "exec(", "import signal")
    assert not [word for word in forbidden if word in source]
