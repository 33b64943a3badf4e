"""Explanatory Inversion, stage 1: questions -> D_EI, probes that show if a student understands.

    python ei.py --teacher Qwen2.5-7B-Instruct --student Qwen2.5-0.5B --data gsm8k
    python ei.py --teacher http://localhost:8000/v1 ...        # any OpenAI-compatible server
    python ei.py --report probes.jsonl                         # the filter table, from the file

After "Probing to Refine: Reinforcement Distillation of LLMs via Explanatory Inversion" (ICLR 2026,
arXiv 2603.19266). For every question, the teacher is asked for

    1  its reasoning, where the data has none                                   invert
    2  a probe per rule, with reasoning and a short answer                      RULES, parse_reply
    3  the question again behind each probe: still right?                       Eq. 1, invert
    4  The question is kept if the student knows some of the probes, not all.   Eq. 2, select

Where the paper is silent or ambiguous, we chose:
 1. A question without rationale is dropped if the teacher's own answer to it is wrong.
 2. Only some rules' names are published. Our ten, with prompts and examples, are below.
 3. A probe ends in an answer that reward.py can grade. The rest is rejected, with a reason.
 4. Dropped too: probes that state the gold answer of their question (leaked; R7 and R8 may), and
    repetitions of the question, of our examples or of another probe (duplicate).
 5. Eq. 2 follows the paper's prose; its printed form has one comparison reversed.
"""
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import random
import re
import threading
import urllib.request
from typing import NamedTuple

from huggingface_hub import InferenceClient, is_offline_mode
from tqdm import tqdm

import exgrpo
import reward
from exgrpo import HERE, UserError, as_asked, at_least


# ------------------------------------------------------------------------------------ the ten rules

class Example(NamedTuple):
    probe: str
    rationale: str
    answer_type: str
    answer: str


class Rule(NamedTuple):
    name: str
    definition: str       # what the teacher is told to do
    arithmetic: Example   # a probe for MELONS, shown with questions whose answer is a number
    commonsense: Example  # a probe for SNOWMAN, shown with all other questions


MELONS = {
    "question": "A farmer fills 4 crates with 6 melons each and sells 9. How many melons are left?",
    "rationale": "The crates hold 4 x 6 = 24 melons. After the sale 24 - 9 = 15 are left.",
    "answer": "15"}
SNOWMAN = {
    "question": "Would a snowman survive a week of 15 degrees Celsius?",
    "rationale": "Snow melts above 0 degrees Celsius. A week at 15 degrees melts all of it.",
    "answer": "no"}

RULES = {
    "R1": Rule(
        "counterfactual", "Change one premise and ask for the answer that then follows.",
        Example("A farmer fills 5 crates with 6 melons each and sells 9. How many melons are left?",
                "The crates hold 5 x 6 = 30 melons, and 30 - 9 = 21.", "number", "21"),
        Example("Would a snowman survive a week of -5 degrees Celsius?",
                "Snow does not melt below 0 degrees, so it would survive.", "yesno", "yes")),
    "R2": Rule(
        "explanatory challenge", "Raise an objection to one step of the solution; ask if it holds.",
        Example("A farmer fills 4 crates with 6 melons each. Somebody objects that 4 and 6 must be "
                "added to count the melons. Is the objection right?",
                "6 melons are counted 4 times, which is multiplying.", "yesno", "no"),
        Example("A snowman stands in air of 15 degrees Celsius. Somebody objects that snow melts "
                "only in the sun. Is the objection right?",
                "Warm air brings heat to the snow as well, even at night.", "yesno", "no")),
    "R3": Rule(
        "decomposition", "Ask the sub-question on which the solution hinges.",
        Example("A farmer fills 4 crates with 6 melons each. How many melons are in the crates?",
                "4 crates of 6 melons hold 4 x 6 = 24.", "number", "24"),
        Example("Above how many degrees Celsius does snow melt?",
                "Snow is frozen water, and ice melts above 0 degrees.", "number", "0")),
    "R4": Rule(
        "why", "Ask why this operation or fact, and no other, is the right one; offer reasons.",
        Example("A farmer has 24 melons and sells 9. Why is 9 subtracted from 24?\n(A) 9 is odd\n"
                "(B) Sold melons are no longer there\n(C) 24 is divisible by 4",
                "A sale takes melons away, and taking away is subtracting.", "choice", "B"),
        Example("Why do 15 degrees Celsius matter to a snowman?\n(A) Snow turns into water above 0 "
                "degrees\n(B) Snow is white\n(C) A week has seven days",
                "Snow is lost when it is warmer than its melting point.", "choice", "A")),
    "R5": Rule(
        "mechanism", "Ask for the state or the value in the middle of the process.",
        Example("A farmer fills crates with 6 melons each. How many melons are in 3 full crates?",
                "3 crates of 6 melons hold 3 x 6 = 18.", "number", "18"),
        Example("A snowman stands in warm air. Into what does the snow turn first?",
                "Melting turns frozen water into liquid water.", "text", "water")),
    "R6": Rule(
        "contrast", "Put the case beside a near twin and ask what differs, if anything does.",
        Example("Farmer P fills 4 crates with 6 melons each, farmer Q fills 6 crates with 4 each. "
                "Both sell 9 melons. Do they have equally many left?",
                "4 x 6 and 6 x 4 are both 24, so both have 24 - 9 left.", "yesno", "yes"),
        Example("A snowman and a stone figure stand in air of 15 degrees Celsius. Which one loses "
                "its shape?\n(A) the stone figure\n(B) both\n(C) the snowman",
                "Snow melts at 15 degrees, and stone does not.", "choice", "C")),
    "R7": Rule(
        "hypothesis", "Propose a wrong answer or a hidden assumption; ask if the facts allow it.",
        Example("A farmer fills 4 crates with 6 melons each, sells 9 melons and says that 13 are "
                "left. Can that be right?",
                "He had 24 melons. With 13 left he would have sold 11.", "yesno", "no"),
        Example("Somebody says that a very white snowman survives a week of 15 degrees Celsius. "
                "Does white snow stay frozen at 15 degrees?",
                "Above 0 degrees snow melts, whatever its colour.", "yesno", "no")),
    "R8": Rule(
        "reversal", "Give the answer as a fact, hide one premise, and ask for the hidden premise.",
        Example("A farmer fills 4 crates with equally many melons. After selling 9 melons he has "
                "15 left. How many melons were in each crate?",
                "Before the sale he had 15 + 9 = 24 melons, and 24 / 4 = 6.", "number", "6"),
        Example("A snowman did not survive the week. Was the air mostly above or below 0 degrees "
                "Celsius?\n(A) below\n(B) above",
                "The snow melted, and it melts only above 0 degrees.", "choice", "B")),
    "R9": Rule(
        "transfer", "Ask a question from another setting that the same principle solves.",
        Example("A school buys 3 boxes of 8 pencils each and hands out 5. How many pencils remain?",
                "The boxes hold 3 x 8 = 24 pencils, and 24 - 5 = 19.", "number", "19"),
        Example("Would a bar of chocolate keep its shape for a day in a car at 60 degrees Celsius?",
                "Chocolate melts at about 35 degrees, so it would not.", "yesno", "no")),
    "R10": Rule(
        "cause and effect", "Ask which premise causes which part of the result, or by how much.",
        Example("A farmer fills crates with 6 melons each and sells 9. By how many does the number "
                "of melons left grow with every further crate?",
                "A crate brings 6 melons, and the sale stays the same.", "number", "6"),
        Example("A snowman is gone after a warm week. What caused that?\n(A) its hat\n"
                "(B) the heat of the air\n(C) the snow's colour",
                "Heat from the air melted the snow.", "choice", "B"))}
MAY_STATE_ANSWER = ("R7", "R8")  # by their definition

TEMPLATE = """\
You write a test question, called a probe, about a question whose solution is known. The probe \
shows whether a student has understood the solution or only remembers it.

The kind of probe: {rule.name}. {rule.definition}

The probe must
- make sense alone: repeat all facts that it needs, because the student sees nothing else;
- have exactly one right answer: a number, yes or no, the letter of an option, or up to five words;
- differ from the question{no_leak}.

Reply with these four labels in this order, each once, and with nothing else:
PROBE: the probe; options, if it has any, each on a line of its own, as (A) ...
REASONING: how the answer follows, in one to four sentences
TYPE: number, yesno, choice or text
ANSWER: the answer alone

If this kind of probe does not fit the question, reply with the one word DECLINE.

{task}"""
NO_LEAK = ", and not contain the answer of the question"
AGAIN = "Now a probe of the same kind for another question.\n\n"
TASK = "QUESTION: {question}\nSOLUTION: {rationale}\nRESULT: {answer}"
REPLY = "PROBE: {0.probe}\nREASONING: {0.rationale}\nTYPE: {0.answer_type}\nANSWER: {0.answer}"


def make_prompt(rule, row):
    """What the teacher reads: a dialogue that shows one rule's example and ends with the question.

    The example is a turn of the dialogue, because a weak teacher then keeps to the four labels.
    """
    by_number = row["answer_type"] in ("number", "math")
    example, probe = ((MELONS, RULES[rule].arithmetic) if by_number else
                      (SNOWMAN, RULES[rule].commonsense))
    no_leak = "" if rule in MAY_STATE_ANSWER else NO_LEAK
    return [TEMPLATE.format(rule=RULES[rule], no_leak=no_leak, task=TASK.format(**example)),
            REPLY.format(probe), AGAIN + TASK.format(**{key: row[key] for key in example})]


# ------------------------------------------------------------------ what a teacher's reply is worth

class Rejected(Exception):
    """Why a reply gives no probe: declined, unparsed: ..., leaked or duplicate."""


LABELS = ["PROBE", "REASONING", "TYPE", "ANSWER"]
LABEL = re.compile(r"^[ \t*#]*(PROBE|REASONING|TYPE|ANSWER)[ \t*]*:[ \t*]*", re.MULTILINE)
OPTION = re.compile(r"^\(([A-Z])\)[ \t]*(\S.*)", re.MULTILINE)
NUMBER = re.compile(r"(?<!\w)-?\d(?:[\d,]*\d)?(?:[./]\d+)?")


def check(holds, reason):
    if not holds:
        raise Rejected(f"unparsed: {reason}")


def parse_reply(text):
    """A teacher's reply -> {"probe", "rationale", "answer", "answer_type"}, or raises Rejected."""
    check(len(text) <= 10_000, "longer than 10,000 characters")
    if re.match(r"\W*DECLINED?\b", text):
        raise Rejected("declined")
    _, *parts = LABEL.split(text)
    labels, values = parts[::2], [value.strip(" \t\r\n*") for value in parts[1::2]]
    for label in LABELS:
        check(label in labels, f"no {label} line")
        check(labels.count(label) == 1, f"several {label} lines")
    check(labels == LABELS, "labels out of order")
    check(all(values), "nothing behind a label")
    probe, rationale, answer_type, answer = values
    answer_type = re.sub(r"\W", "", answer_type.lower())  # "Yes/No" is yesno
    check(answer_type in ("number", "yesno", "choice", "text"), "unknown TYPE")
    check("\n" not in answer, "text after the ANSWER line")
    check(answer_type == "choice" or len(answer) <= 60 and len(answer.split()) <= 5,
          "ANSWER is not short")  # of a choice, the letter is kept
    plain = reward.extract_answer(f"The answer is {answer.rstrip('.')}.", answer_type)
    check(plain, f"ANSWER does not fit TYPE {answer_type}")
    answer = plain if answer_type != "text" else answer.rstrip(".")  # keeps its capitals
    if answer_type == "choice":
        letters = "".join(letter for letter, _ in OPTION.findall(probe))
        check(len(letters) > 1 and "ABCDEF".startswith(letters), "options are not (A), (B), ...")
        check(answer in letters, "ANSWER is no option")
    probe = {"probe": probe, "rationale": rationale, "answer": answer, "answer_type": answer_type}
    check(reward.is_correct(exgrpo.teacher_reply(probe), answer, answer_type),
          "REASONING states another answer")  # it would be taught
    return probe


def words(text):
    return " ".join(re.findall(r"\w+", text.casefold()))


def contains(text, phrase):
    return phrase.strip() != "" and f" {words(phrase)} " in f" {words(text)} "


def leaks(probe, row):
    """Does the probe state the gold answer of its question, where the question itself does not?"""
    question, gold, answer_type = row["question"], row["answer"], row["answer_type"]
    if reward.is_correct(probe, gold, answer_type):  # "... the answer is 15 ..."
        return True
    if answer_type in ("number", "math"):
        new = set(NUMBER.findall(probe)) - set(NUMBER.findall(question))
        if any(reward.is_correct(f"The answer is {n}.", gold, answer_type) for n in new):
            return True
        gold, probe, question = ("".join(x.split()) for x in (gold, probe, question))
        return (len(gold) > 2 and not NUMBER.fullmatch(gold)  # an expression, letter by letter
                and gold in probe and gold not in question)
    if answer_type == "choice":  # the right option's words, and no other option's
        others = dict(OPTION.findall(question))
        gold = others.pop(reward.extract_answer(f"The answer is {gold}.", "choice"), "")
        if any(contains(probe, other) for other in others.values()):
            return False
        question = question.partition("\n(A)")[0]
    return answer_type != "yesno" and contains(probe, gold) and not contains(question, gold)


EXAMPLES = [set(words(text).split()) for rule in RULES.values() for text in (
    rule.arithmetic.probe, rule.commonsense.probe, MELONS["question"], SNOWMAN["question"])]


def repeats(probe, seen):
    """Is the probe among the texts seen, or nearly an example of ours (60 % of their words)?"""
    mine = set(words(probe).split())
    return words(probe) in seen or any(len(mine & e) > 0.6 * len(mine | e) for e in EXAMPLES)


# ------------------------------------------------------------------------------------- the teachers

def whole(text, cut_off):
    """(text, fault): without a reasoning model's thoughts; `fault`: why it is no whole reply."""
    text = text.rpartition("</think>")[2].encode("utf-8", "replace").decode()  # no lone surrogates
    return text, "cut off by the token limit" if cut_off else ""


TOO_LONG = "", "prompt too long for the model"


class LocalModel:
    """A Hub id or local folder, as teacher or student: dialogues -> [(text, fault)], greedy.

    A dialogue is [user, assistant, user, ...].
    """

    batch, workers = 16, 1  # questions that are asked side by side; threads that may call

    def __init__(self, name, args):
        self.model, self.chat = exgrpo.load_model(name, exgrpo.pick_device(args.device))
        self.max_new_tokens = args.max_new_tokens
        self.stop, self.counts = threading.Event(), collections.Counter()
        size = self.model.num_parameters() / 1e6
        self.about = f"{size:.1f} M parameters, fp32 on {self.model.device}, greedy"

    def __call__(self, dialogues):
        prompts = [self.chat.prompt(turns) for turns in dialogues]
        room = exgrpo.context_size(self.model) - self.max_new_tokens
        fit = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        outputs = exgrpo.generate(self.model, self.chat, [prompts[i] for i in fit],
                                  max_new_tokens=self.max_new_tokens,
                                  token_budget=self.batch * 2048)
        replies = [TOO_LONG] * len(prompts)
        for i, (text, truncated, n_tokens) in zip(fit, outputs):
            replies[i] = whole(text, truncated)
            self.counts.update({"requests": 1, "prompt tokens": len(prompts[i]),
                                "new tokens": n_tokens})
        return replies


class Server:
    """Any OpenAI-compatible server as the teacher; called from `workers` threads at a time."""

    batch = 1  # question by question in each thread
    TRIES, PAUSE = 8, 1.0  # attempts at a request; seconds before the second, doubled each time:
    TIMEOUT = 300          # two minutes in all, longer than a limit per minute; of one request

    def __init__(self, args):
        if is_offline_mode():
            raise UserError("HF_HUB_OFFLINE is set, and then the client calls no server, not even "
                            "a local one; unset it (models in local folders load without it)")
        # Without a key of its own, the client would send the Hugging Face token to this server.
        self.client = InferenceClient(base_url=args.teacher, timeout=self.TIMEOUT,
                                      api_key=os.environ.get("TEACHER_API_KEY") or "none")
        self.options = {"model": args.teacher_model, "max_tokens": args.max_new_tokens,
                        "temperature": 0, "seed": args.seed}
        self.workers, self.lock = args.concurrency, threading.Lock()
        self.stop, self.counts = threading.Event(), collections.Counter()
        self.about = f"a server, {self.workers} requests at a time"

    def __call__(self, dialogues):
        return [self.request(turns) for turns in dialogues]

    def request(self, turns):
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn}
                    for i, turn in enumerate(turns)]
        delay = 0
        for attempt in range(self.TRIES):
            if self.stop.wait(delay):
                raise KeyboardInterrupt
            try:
                return self.read(self.client.chat_completion(messages, **self.options))
            except Exception as error:  # HTTP errors, timeouts, closed connections, any garbage
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", 0)
                reason = f"{type(error).__name__}: {error}"[:300]
                said = getattr(response, "text", "")  # SGLang's words the client leaves out
                if status == 400 and "context" in f"{error} {said}":
                    return TOO_LONG
                if 400 <= status < 500 and status not in (408, 429):
                    raise UserError(f"{self.client.model} refused a request: {reason}. "
                                    + REFUSED.get(status, f"It said: {said[:300]}"))
                asked = response.headers.get("retry-after", "")[:5] if status else ""
                delay = min(60, int(asked) if asked.isdecimal() else self.PAUSE * 2 ** attempt)
            with self.lock:
                self.counts["retries"] += 1
        raise UserError(f"{self.client.model} failed {self.TRIES} times in a row: {reason}. "
                        "Nothing is lost: the same command goes on from here")

    def read(self, completion):
        choice, usage = completion.choices[0], completion.usage
        reply = whole(choice.message.content or "", choice.finish_reason == "length")
        with self.lock:
            self.counts.update({"requests": 1, "prompt tokens": usage and usage.prompt_tokens or 0,
                                "new tokens": usage and usage.completion_tokens or 0})
        return reply


REFUSED = {401: "Set the environment variable TEACHER_API_KEY to a valid key",
           403: "Set the environment variable TEACHER_API_KEY to a key that may use this model",
           404: "Check the base URL (it often ends in /v1) and --teacher-model"}


# ---------------------------------------------------------------------- one question and its probes

def right(reply, row):
    """Is this (text, fault) a whole reply with the answer of the question or probe?"""
    text, fault = reply
    return not fault and reward.is_correct(text, row["answer"], row["answer_type"])


CLOSING = re.compile(r"[\s*_#$]*The answer is[^\n]*\Z")  # the last line's, with its dressing


def invert(teacher, rows, rules):
    """Asks the teacher for the probes of some questions -> their lines of D_EI, before Eq. 2.

    The same request for all questions is one call: a local model answers them side by side.
    """
    lines = [{**row, "kept": False, "probes": [], "declined": [], "rejected": []} for row in rows]
    bare = [line for line in lines if not line["rationale"].strip()]
    for line, reply in zip(bare, teacher([[as_asked(line)] for line in bare])):
        if right(reply, line):
            line["rationale"] = CLOSING.sub("", reply[0].strip()) or reply[0]
        else:
            line["rejected"].append({"rule": "R_T", "reason": reply[1] or "wrong answer"})
    solved = [line for line in lines if not line["rejected"]]
    seen = [{words(line["question"])} for line in solved]
    for rule in rules:  # rule by rule: what these prompts begin with is read once
        replies = teacher([make_prompt(rule, line) for line in solved])
        for line, reply, its_seen in zip(solved, replies, seen):
            try:
                line["probes"].append(judge(rule, line, *reply, its_seen))
            except Rejected as reason:
                if str(reason) == "declined":
                    line["declined"].append(rule)
                else:
                    line["rejected"].append({"rule": rule, "reason": str(reason)})
    pairs = [(line, probe) for line in lines for probe in line["probes"]]
    replies = teacher([[as_asked(probe), exgrpo.teacher_reply(probe), as_asked(line)]
                       for line, probe in pairs])
    for (line, probe), reply in zip(pairs, replies):
        probe["consistent"], probe["student_correct"] = right(reply, line), None         # Eq. 1
    return lines


def judge(rule, row, text, fault, seen):
    """A reply -> a probe of this rule, or raises Rejected; `seen`: what it must not repeat."""
    check(not fault, fault)
    probe = parse_reply(text)
    if repeats(probe["probe"], seen):
        raise Rejected("duplicate")
    if rule not in MAY_STATE_ANSWER and leaks(probe["probe"], row):
        raise Rejected("leaked")
    seen.add(words(probe["probe"]))
    return {"rule": rule, **probe}


def keep_question(n_correct, n_consistent, tau_hard):
    """Eq. 2: neither too hard (n_correct < tau_hard) nor too easy (all of n_consistent correct)."""
    return n_consistent > 0 and tau_hard <= n_correct < n_consistent


def select(student, lines, tau_hard):
    """The untrained student answers the consistent probes, each by itself; then Eq. 2 decides."""
    if student:
        probes = [probe for line in lines for probe in line["probes"] if probe["consistent"]]
        for probe, reply in zip(probes, student([[as_asked(probe)] for probe in probes])):
            probe["student_correct"] = right(reply, probe)
    for line in lines:
        line["kept"] = verdict(line, tau_hard) == "kept"
    return lines


def verdict(line, tau_hard):
    """"kept", or why not: one of VERDICTS, from what the line itself holds."""
    if any(one["rule"] == "R_T" for one in line.get("rejected", [])):
        return "no reasoning"
    marks = [probe["student_correct"] for probe in line["probes"] if probe["consistent"]]
    if not marks:
        return "no probe left"
    if None in marks or keep_question(sum(marks), len(marks), tau_hard):  # None: without a student
        return "kept"
    return "too hard" if sum(marks) < tau_hard else "too easy"


def in_order(work, items, workers, stop):
    """work(item) for every item, `workers` at a time; yields the results in their order."""
    if workers == 1:
        yield from map(work, items)
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        ahead = collections.deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) == 4 * workers:  # memory must not grow with the data
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            stop.set()
            for future in ahead:
                future.cancel()


# --------------------------------------------------------------------------------------- the output

def dump(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def open_output(path, header):
    """A D_EI file to append to, locked: new, or an unfinished one of the same configuration.

    Returns the file, and its header line if that is still to be written.
    """
    file = open(path, "a+b")
    exgrpo.lock(file, f"another ei.py is writing {path}; wait for it, or name another --out")
    file.seek(0)
    first, mine, end = file.readline(), dump({"ei": header}), 0
    if first.endswith(b"\n") or not mine.startswith(first):
        if first != mine:
            raise UserError(f"{path} {difference(first, header)}; name another --out")
        end = len(mine)
    file.seek(end)
    for line in file:
        if not line.endswith(b"\n"):
            print(f"{path}: dropped a half-written last line, which is made again")
            file.truncate(end)
        end += len(line)
    return file, b"" if first == mine else mine


def difference(first, header):
    try:
        theirs = json.loads(first)["ei"]
        key = next(key for key in header if theirs.get(key) != header[key])
        if key == "prompts":  # a digest
            return "was made with other rules or prompts than those that ei.py holds now"
        return f"was started with {key} = {theirs.get(key)!r}, not {header[key]!r}; use its flags"
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return "is there already and was not made by this ei.py"


def skip_finished(path, questions, batch):
    """The number of questions in the file, which must be the iterator's first, and the questions
    that are to be asked.

    Where some are left, a batch that was cut is asked again with the rest of it, because a model's
    reply may depend, in its last digits, on what is beside it in a batch.
    """
    finished, again = 0, []
    for where, line in itertools.islice(exgrpo.read_jsonl(path), 1, None):
        row = next(questions, None)
        if row is None:  # --limit is smaller than it was
            break
        if any(line.get(key) != row[key] for key in ("id", "question", "answer", "answer_type")):
            raise UserError(f"{where} holds question {line.get('id')!r}, but here the data has "
                            f"{row['id']!r}: the data has changed; name another --out")
        finished += 1
        again = again + [row] if finished % batch else []
    left = list(itertools.islice(questions, 1))
    return finished, itertools.chain(again if left else [], left, questions)


VERDICTS = ["no reasoning", "no probe left", "too hard", "too easy", "kept"]
COLUMNS = ["asked", "declined", "unparsed", "leaked", "duplicate", "inconsistent", "kept"]


def count(path):
    """A D_EI file -> its header and Counters of (rule, column), of reasons and of verdicts."""
    lines = exgrpo.read_jsonl(path)
    where, first = next(lines, (path, {}))
    header = first.get("ei")
    if not isinstance(header, dict):
        raise UserError(f"{where}: no D_EI file: its first line is no header")
    rules, reasons, verdicts = (collections.Counter() for _ in range(3))
    for where, line in lines:
        try:
            rejected = [(one["rule"], one["reason"]) for one in line.get("rejected", [])]
            outcomes = [(rule, reason.partition(":")[0]) for rule, reason in rejected]
            outcomes += [(rule, "declined") for rule in line.get("declined", [])]
            outcomes += [(one["rule"], "kept" if one["consistent"] else "inconsistent")
                         for one in line["probes"]]
            right = [(one["rule"], "right") for one in line["probes"] if one["student_correct"]]
            kept, found = line["kept"], verdict(line, header.get("tau_hard"))
            rules.update(outcomes + right + [(rule, "asked") for rule, _ in outcomes])
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: no line of D_EI; README.md shows one")
        if kept != (found == "kept"):
            raise UserError(f'{where}: "kept" is {kept}, but by its probes the verdict is: {found}')
        reasons.update(reason for _, reason in rejected)
        verdicts[found] += 1
    return header, rules, reasons, verdicts


def report(path):
    """Prints what each filter did, from the file alone; returns the number of questions kept."""
    header, rules, reasons, verdicts = count(path)
    names = [rule for rule in RULES if rules[rule, "asked"]] + ["all"]
    for column in (*COLUMNS, "right"):
        rules["all", column] = sum(rules[rule, column] for rule in names)
    width, share = 14, functools.partial(reward.share, form="{:.0f} ({:.0f}-{:.0f})")
    print(f"\n{'probes':25}" + "".join(f"{column:>{width}}" for column in COLUMNS))
    for rule in names:
        print(f"{f'{rule} {RULES[rule].name}' if rule in RULES else rule:25}"
              + "".join(f"{rules[rule, column]:{width},}" for column in COLUMNS))
    print(f"\n{'% of the asked (95 %)':25}"
          + "".join(f"{column:>{width}}" for column in (*COLUMNS[1:], "student right")))
    for rule in names:
        of_kept = share(rules[rule, "right"], rules[rule, "kept"]) if header.get("student") else "-"
        print(f"{rule:25}"
              + "".join(f"{share(rules[rule, c], rules[rule, 'asked']):>{width}}"
                        for c in COLUMNS[1:]) + f"{of_kept:>{width}}")
    print(f"{'':25}{'(of the kept)':>{width * len(COLUMNS)}}\n")
    for reason, n in reasons.most_common():
        print(f"{n:9,}  {reason}")
    n = verdicts.total()
    print(f"\n{'questions':25}{'':>{width}}{'% (95 %)':>{width}}")
    for name in VERDICTS:
        print(f"{name:25}{verdicts[name]:{width},}{share(verdicts[name], n):>{width}}")
    if not header.get("student"):
        print("Eq. 2 was skipped, because there was no --student")
    return verdicts["kept"]


# ------------------------------------------------------------------------------------ the questions

def lettered(stem, texts, right, rationale=""):
    """A choice whose options are lettered from (A), whatever their labels were."""
    options = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCDEF", texts))
    return stem + options, "ABCDEF"[right], "choice", rationale


def options(row):  # csqa, arc, obqa
    stem = row["question"] if "question" in row else row["question_stem"]
    return lettered(stem, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def sqa(row):  # the facts are evidence, not part of the question; a string, or a list of them
    facts = row["facts"] if isinstance(row["facts"], str) else " ".join(row["facts"])
    return row["question"], "yes" if row["answer"] else "no", "yesno", facts


def boolq(row):
    question = f"{row['passage']}\nAccording to this text: {row['question']}?"
    return question, "yes" if row["answer"] else "no", "yesno", ""


def nli(row):  # anli, esnli
    stem = (f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\n"
            "What does the premise say about the hypothesis?")
    texts = ["it is true (entailment)", "nothing certain (neutral)", "it is false (contradiction)"]
    rationale = row.get("explanation_1") or row.get("reason") or ""
    return row["label"] >= 0 and lettered(stem, texts, row["label"], rationale)


def date(row):
    stem = re.sub(r"^Q: |\n *choice:.*|\nA:\s*$", "", row["inputs"])
    texts = list(row["multiple_choice_targets"])
    right = texts[row["multiple_choice_scores"].index(1)]
    random.Random(stem).shuffle(texts)  # the right one comes first in nearly every row
    return lettered(stem, texts, texts.index(right))


def gsm8k(row):
    rationale, _, answer = row["answer"].rpartition("####")
    return row["question"], answer.replace(",", ""), "number", re.sub(r"<<[^<>]*>>", "", rationale)


def gsm8k_rev(row):
    return row["question"], row["answer"], "number", row["explanation"]


def math(row):
    gold = reward.extract_answer(row["solution"], "math")  # the last box
    return gold and (row["problem"], gold, "math", row["solution"])


def tabmwp(row):
    stem = f"{row['table_title'] or 'Table'}\n{row['table']}\n\n{row['question']}"
    if row["choices"]:
        return lettered(stem, row["choices"], row["choices"].index(row["answer"]), row["solution"])
    unit = f" (in {row['unit']})" if row["unit"] else ""
    return stem + unit, row["answer"], "number", row["solution"]


GITHUB = "https://raw.githubusercontent.com/"
MATH = ("algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra "
        "precalculus")
DATASETS = {  # name: (mapping, Hub id or URL, its configurations, its train and its test split)
    "sqa": (sqa, "ChilleD/StrategyQA", "", "train test"),
    "csqa": (options, "tau/commonsense_qa", "", "train validation"),
    "arc": (options, "allenai/ai2_arc", "ARC-Challenge", "train test"),
    "math": (math, "EleutherAI/hendrycks_math", MATH, "train test"),
    "gsm8k": (gsm8k, "openai/gsm8k", "main", "train test"),
    "tabmwp": (tabmwp, GITHUB + "lupantech/PromptPG/main/data/tabmwp/problems_{}.json", "",
               "train test1k"),
    "anli": (nli, "facebook/anli", "", "train_r3 test_r3"),
    "date": (date, "tasksource/bigbench", "date_understanding", "train validation"),
    "boolq": (boolq, "google/boolq", "", "train validation"),
    "obqa": (options, "allenai/openbookqa", "main", "train test"),
    "esnli": (nli, "esnli/esnli", "", "train test"),
    "gsm8k_rev": (gsm8k_rev, GITHUB + "AllForward/ReversalMath/main/data/gsm8k/{}-backward.json",
                  "", "- test")}


def fetch(name, split):
    """The rows of a dataset as its authors publish them, one at a time."""
    _, source, configs, splits = DATASETS[name]
    split = splits.split()[("train", "test").index(split)]
    if source.startswith(GITHUB):
        with urllib.request.urlopen(source.format(split), timeout=60) as response:
            text = response.read().decode()
        lines = text.split("\n") if name == "gsm8k_rev" else []
        yield from map(json.loads, filter(None, lines)) if lines else json.loads(text).values()
        return
    try:
        import datasets
    except ImportError:
        raise UserError(f"the dataset {name} needs one package more: pip install datasets")
    parts = [datasets.load_dataset(source, config, split=split, streaming=True)
             for config in configs.split() or [None]]
    # in turns, so that --limit takes some of each
    yield from filter(None, itertools.chain.from_iterable(itertools.zip_longest(*parts)))


def stream_questions(source, split="train"):
    """Yields the questions of a .jsonl file or of one of the twelve datasets; holds only ids."""
    seen, keys = {}, ("id", "question", "answer", "answer_type", "rationale")
    if source.endswith(".jsonl"):
        for where, row in exgrpo.read_jsonl(source):
            exgrpo.check_question(row, where, seen=seen)
            yield {key: row[key] for key in keys}
        return
    if source not in DATASETS:
        raise UserError(f"--data {source}: neither a .jsonl file nor one of {', '.join(DATASETS)}")
    if split not in ("train", "test") or (source, split) == ("gsm8k_rev", "train"):
        raise UserError(f"--split {split}: {source} has no such split; use train or test")
    try:
        for i, row in enumerate(fetch(source, split)):
            texts = DATASETS[source][0](row)
            if texts:  # some rows have no gold answer, and some one that could not be graded
                row = dict(zip(keys, (f"{source}-{split}-{i}", *map(str.strip, texts))))
                if exgrpo.can_be_right(row):
                    yield row
    except UserError:
        raise
    except Exception as error:  # of many kinds: the network's, those of `datasets`, a changed field
        raise UserError(f"the dataset {source} could not be read: {type(error).__name__}: {error}. "
                        "Is there a network? Without one, give a .jsonl file of questions")


def load_questions(source, split="train"):
    """All questions of a .jsonl file, or of a split of one of the twelve DATASETS, as a list."""
    return list(stream_questions(source, split))


# ------------------------------------------------------------------------------------- command line

def parse_args():
    toy = os.path.join(HERE, "toy", "")
    parser = exgrpo.Parser("Stage 1, explanatory inversion: questions -> filtered probes.")
    add = parser.add_argument_group("what to make, of what").add_argument
    add("--teacher", default=toy + "teacher", help="Hub name, local folder or URL of a server")
    add("--student", help="Hub name or local folder of the untrained student; without it, Eq. 2 is "
                          "skipped (but the toy teacher has the toy student)")
    add("--data", default=toy + "train.jsonl", help=".jsonl file, or one of " + ", ".join(DATASETS))
    add("--split", default="train", help="of a named dataset: train or test")
    add("--limit", type=at_least(1), help="number of questions, from the first; none means all")
    add("--out", default="probes.jsonl", help="D_EI file; an unfinished one is continued")
    add = parser.add_argument_group("the method").add_argument
    add("--rules", default="all", help="all, or some, as R1,R8")
    add("--tau-hard", type=at_least(0), default=1, help="probes that the student must know, Eq. 2")
    add("--max-new-tokens", type=at_least(1), default=512, help="longest reply, tokens")
    add = parser.add_argument_group("a server as teacher; its key: TEACHER_API_KEY").add_argument
    add("--teacher-model", help="name by which the server knows the teacher")
    add("--concurrency", type=at_least(1), default=16, help="requests at a time")
    add = parser.add_argument_group("the machine, and other things to do").add_argument
    add("--seed", type=at_least(0), default=0, help="sent to a server; local models are greedy")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--dry-run", action="store_true", help="only print the prompts and the calls to expect")
    add("--report", metavar="FILE", help="only print the filter table of this D_EI file")
    args = parser.parse_args()
    if os.path.abspath(args.teacher) == toy + "teacher" and not args.student:
        args.student = exgrpo.TOY_STUDENT
    args.rules = list(RULES) if args.rules == "all" else args.rules.split(",")
    if not set(args.rules) <= set(RULES) or len(set(args.rules)) < len(args.rules):
        raise UserError(f"--rules: name each rule once, as in {','.join(RULES)}")
    if args.student and args.tau_hard >= len(args.rules):  # a rule gives one probe at most
        raise UserError(f"--tau-hard {args.tau_hard} with {len(args.rules)} --rules keeps no "
                        "question: by Eq. 2 the student must know so many probes, and not all; "
                        "lower the one or name more of the other")
    return args


def make_header(args):
    """All that the output depends on. Paths of this project are stored relative to it."""
    header = {key: getattr(args, key) for key in (
        "teacher", "teacher_model", "student", "data", "split", "rules", "tau_hard",
        "max_new_tokens", "seed")}
    for key in ("teacher", "student", "data"):
        header[key] = header[key] and header[key].removeprefix(HERE + os.sep)
    prompts = repr((TEMPLATE, NO_LEAK, AGAIN, TASK, REPLY, MELONS, SNOWMAN, RULES))
    return header | {"prompts": exgrpo.digest(prompts)}


def dry_run(questions, rules):
    """Prints the first question's prompts, and what the whole run will ask of the teacher."""
    n = calls = characters = 0
    for n, row in enumerate(questions, 1):
        prompts = [make_prompt(rule, row) for rule in rules]
        if n == 1:
            for rule, prompt in zip(rules, prompts):
                print(f"{f' {rule} ':=^80}\n" + "\n--------\n".join(prompt) + "\n")
        calls += len(rules) + (not row["rationale"].strip())
        characters += len("".join(turn for prompt in prompts for turn in prompt))
        characters += len(rules) * (len(row["question"]) + 400)  # Eq. 1
    print(f"{n:,} questions: {calls:,} calls for reasoning and probes, at most {n * len(rules):,} "
          f"more for Eq. 1; about {characters // 4:,} prompt tokens, at four characters each")


def main():
    args = parse_args()
    if args.report:
        report(args.report)
        return
    questions = itertools.islice(stream_questions(args.data, args.split), args.limit)
    if args.dry_run:
        dry_run(questions, args.rules)
        return
    first = list(itertools.islice(questions, 1))
    if not first:
        raise UserError(f"{args.data} holds no question")
    file, header = open_output(args.out, make_header(args))
    with file:
        remote = args.teacher.startswith(("http://", "https://"))
        teacher = Server(args) if remote else LocalModel(args.teacher, args)
        questions = itertools.chain(first, questions)
        finished, questions = skip_finished(args.out, questions, teacher.batch)
        student = LocalModel(args.student, args) if args.student else None
        print(f"teacher  {args.teacher}: {teacher.about}\n"
              f"student  {args.student}: {student.about if student else 'Eq. 2 is skipped'}\n"
              f"data     {args.data}, {args.split}; {len(args.rules)} rules\n"
              f"output   {args.out}, {finished:,} questions in it", flush=True)
        make(teacher, student, questions, file, header, finished, args)
    n_kept = report(args.out)
    counts = ", ".join(f"{n:,} {what}" for what, n in teacher.counts.items())
    print(f"\nteacher, this time: {counts or 'nothing was left to ask'}\nD_EI in {args.out}")
    if n_kept:
        student = exgrpo.shown(args.student or "STUDENT")
        print(f"next: python exgrpo.py --student {student} --probes {args.out}")
    else:
        print("No question was kept, so there is nothing to train on; the tables above say why")


def make(teacher, student, questions, file, header, finished, args):
    """Appends a line for every question that is left, in their order; some were asked before."""
    kept = probes = 0
    batches = iter(lambda: list(itertools.islice(questions, teacher.batch)), [])
    work = in_order(lambda rows: invert(teacher, rows, args.rules), batches, teacher.workers,
                    teacher.stop)
    before = finished % teacher.batch  # questions of the first batch that are in the file
    with contextlib.closing(work), tqdm(total=args.limit, initial=finished, unit="question") as bar:
        for lines in work:
            for line in select(student, lines, args.tau_hard)[before:]:
                file.write(header + dump(line))
                file.flush()
                header = b""
                kept += line["kept"]
                probes += sum(probe["consistent"] for probe in line["probes"])
            bar.set_postfix(kept=kept, probes=probes, refresh=False)
            bar.update(len(lines) - before)
            before = 0


if __name__ == "__main__":
    exgrpo.run(main)
