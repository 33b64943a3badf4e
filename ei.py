"""Explanatory Inversion, stage 1: questions -> D_EI, probes that show if a student understands.

    python ei.py --teacher Qwen2.5-7B-Instruct --student Qwen2.5-0.5B --data gsm8k
    python ei.py --teacher http://localhost:8000/v1 ...        # any OpenAI-compatible server
    python ei.py --report probes.jsonl                         # the filter table, from the file

After "Probing to Refine: Reinforcement Distillation of LLMs via Explanatory Inversion" (ICLR 2026,
arXiv 2603.19266). The teacher writes a probe of each question by each of ten rules, with reasoning
and an answer. Eq. 1 (make_probes): a probe is consistent if the teacher, asked the question again
after it, still answers the question correctly. Eq. 2 (keep_question): a question is kept if the
untrained student answers some of its consistent probes correctly, but not all.

Where the paper is silent or ambiguous, we chose:
 1. A question without rationale gets the teacher's, or is dropped if the teacher's answer is wrong.
 2. Only some rules' names are published. Our ten, with prompts and examples, are below.
 3. OUTCOMES lists why a probe is rejected. Only R7 and R8 may state the answer of their question.
 4. Eq. 2 follows the paper's prose. Its printed form has one comparison reversed.
"""
import collections
import hashlib
import itertools
import json
import os
import random
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import NamedTuple

from huggingface_hub import InferenceClient, is_offline_mode
from tqdm import tqdm

import exgrpo
import reward
from exgrpo import HERE, TOY, UserError, at_least, user_turn


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


def make_prompt(rule: str, row: dict) -> list[str]:
    """The dialogue that asks for a probe. It begins with an example, to show the four labels."""
    by_number = row["answer_type"] in ("number", "math")
    example, probe = ((MELONS, RULES[rule].arithmetic) if by_number else
                      (SNOWMAN, RULES[rule].commonsense))
    no_leak = "" if rule in MAY_STATE_ANSWER else NO_LEAK
    return [TEMPLATE.format(rule=RULES[rule], no_leak=no_leak, task=TASK.format(**example)),
            REPLY.format(probe), AGAIN + TASK.format(**row)]


# ---------------------------------------------------------------------- probes and their filters

# What becomes of a probe, in the order of the checks. Details may follow: "unparsed: no TYPE line".
OUTCOMES = {
    "refused": "no reply: the server refuses the request, or the prompt is too long for the model",
    "declined": "the teacher replies that the rule does not fit the question",
    "unparsed": "the reply is cut off, or it is no probe that can be graded",
    "duplicate": "the probe repeats the question, another probe or an example of ours",
    "leaked": "the probe states the answer of its question",
    "inconsistent": "Eq. 1: behind the probe, the teacher does not answer the question correctly",
    "kept": "none of these"}


class Rejected(Exception):
    """A reply gives no probe. The message is one of OUTCOMES, perhaps with details."""


def check_probe(rule: str, line: dict, text: str, fault: str) -> dict:
    """A reply -> a probe of this rule for this question, or raises Rejected."""
    if fault:
        raise Rejected(fault)  # refused, or unparsed: cut off
    if re.match(r"\W*DECLINED?\b", text):
        raise Rejected("declined")
    probe = parse_reply(text)  # else unparsed
    if repeats(probe["probe"], [line["question"], *(other["probe"] for other in line["probes"])]):
        raise Rejected("duplicate")
    if rule not in MAY_STATE_ANSWER and leaks(probe["probe"], line):
        raise Rejected("leaked")
    return {"rule": rule, **probe}


def make_probes(teacher, rows: list[dict], rules: list[str]) -> list[dict]:
    """Questions -> their lines of D_EI, up to Eq. 1. The teacher gets many dialogues in a call."""
    lines = [{**row, "kept": False, "probes": [], "declined": [], "rejected": []} for row in rows]
    unsolved = [line for line in lines if not line["rationale"].strip()]
    for line, reply in zip(unsolved, teacher([[user_turn(line)] for line in unsolved])):
        if is_right(reply, line):
            reasoning = reply[0].rpartition("The answer is")[0].strip().rstrip("*_#$ \n")
            line["rationale"] = reasoning or reply[0]
        else:
            line["rejected"].append({"rule": "R_T", "reason": reply[1] or "wrong answer"})
    pairs = [(line, rule) for line in lines if not line["rejected"] for rule in rules]
    replies = teacher([make_prompt(rule, line) for line, rule in pairs])
    for (line, rule), reply in zip(pairs, replies):
        try:
            line["probes"].append(check_probe(rule, line, *reply))
        except Rejected as reason:
            if str(reason) == "declined":
                line["declined"].append(rule)
            else:
                line["rejected"].append({"rule": rule, "reason": str(reason)})
    pairs = [(line, probe) for line in lines for probe in line["probes"]]
    replies = teacher([[user_turn(probe), exgrpo.teacher_reply(probe), user_turn(line)]
                       for line, probe in pairs])
    for (line, probe), reply in zip(pairs, replies):
        probe["consistent"], probe["student_correct"] = is_right(reply, line), None      # Eq. 1
        if reply[1].startswith("refused"):  # whether it is consistent was never asked
            line["probes"].remove(probe)
            line["rejected"].append({"rule": probe["rule"], "reason": reply[1]})
    return lines


def is_right(reply: tuple[str, str], row: dict) -> bool:
    """Is this (text, fault) a complete reply with the answer of the question or probe?"""
    text, fault = reply
    return not fault and reward.is_correct(text, row["answer"], row["answer_type"])


def keep_question(n_correct: int, n_consistent: int, tau_hard: int) -> bool:
    """Is the question neither too hard for the student nor too easy (all its probes are known)?"""
    return tau_hard <= n_correct < n_consistent                                          # Eq. 2


def apply_student_filter(student, lines: list[dict], tau_hard: int) -> list[dict]:
    """The untrained student answers every consistent probe, each by itself; then Eq. 2 decides."""
    if student:
        probes = [probe for line in lines for probe in line["probes"] if probe["consistent"]]
        for probe, reply in zip(probes, student([[user_turn(probe)] for probe in probes])):
            probe["student_correct"] = is_right(reply, probe)
    for line in lines:
        line["kept"] = verdict(line, tau_hard) == "kept"
    return lines


def verdict(line: dict, tau_hard: int) -> str:
    """What the filters make of a question: one of VERDICTS."""
    if any(one["rule"] == "R_T" for one in line.get("rejected", [])):
        return "no reasoning"
    marks = [one.get("student_correct") for one in line["probes"] if one["consistent"]]
    if not marks:
        return "no probe left"
    if None in marks or keep_question(sum(marks), len(marks), tau_hard):  # None: without a student
        return "kept"
    return "too hard" if sum(marks) < tau_hard else "too easy"


# -------------------------------------------------------------- what is in a reply, and in a probe

LABELS = ["PROBE", "REASONING", "TYPE", "ANSWER"]
LABEL = re.compile(r"^[ \t*#]*(PROBE|REASONING|TYPE|ANSWER)[ \t*]*:[ \t*]*", re.MULTILINE)
OPTION = re.compile(r"^\(([A-Z])\)[ \t]*(\S.*)", re.MULTILINE)
NUMBER = re.compile(r"(?<!\w)-?\d(?:[\d,]*\d)?(?:[./]\d+)?")


def require(condition, what):
    if not condition:
        raise Rejected(f"unparsed: {what}")


def parse_reply(text: str) -> dict:
    """A teacher's reply -> {"probe", "rationale", "answer", "answer_type"}, or raises Rejected."""
    require(len(text) <= 10_000, "longer than 10,000 characters")
    _, *parts = LABEL.split(text)
    labels, values = parts[::2], [value.strip(" \t\r\n*") for value in parts[1::2]]
    for label in LABELS:
        require(label in labels, f"no {label} line")
        require(labels.count(label) == 1, f"several {label} lines")
    require(labels == LABELS, "labels out of order")
    require(all(values), "nothing behind a label")
    probe, rationale, answer_type, answer = values
    answer_type = re.sub(r"\W", "", answer_type.lower())  # "Yes/No" is yesno
    require(answer_type in ("number", "yesno", "choice", "text"), "unknown TYPE")
    require("\n" not in answer, "text after the ANSWER line")
    require(answer_type == "choice" or len(answer) <= 60 and len(answer.split()) <= 5,
            "ANSWER is not short")  # of a choice, the letter is kept
    plain = reward.extract_answer(f"The answer is {answer.rstrip('.')}.", answer_type)
    require(plain, f"ANSWER does not fit TYPE {answer_type}")
    answer = plain if answer_type != "text" else answer.rstrip(".")  # keeps its capitals
    if answer_type == "choice":
        letters = "".join(letter for letter, _ in OPTION.findall(probe))
        require(len(letters) > 1 and "ABCDEF".startswith(letters), "options are not (A), (B), ...")
        require(answer in letters, "ANSWER is no option")
    probe = {"probe": probe, "rationale": rationale, "answer": answer, "answer_type": answer_type}
    require(reward.is_correct(exgrpo.teacher_reply(probe), answer, answer_type),
            "REASONING states another answer")  # it would be taught
    return probe


def words(text: str) -> str:
    """The words of a text, with a blank around each: `words(a) in words(b)` finds whole words."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def leaks(probe: str, row: dict) -> bool:
    """Does the probe state the gold answer of its question, where the question itself does not?"""
    question, gold, answer_type = row["question"], row["answer"], row["answer_type"]
    if reward.is_correct(probe, gold, answer_type):  # "... the answer is 15 ..."
        return True
    if answer_type in ("number", "math"):
        new = set(NUMBER.findall(probe)) - set(NUMBER.findall(question))
        if any(reward.is_correct(f"The answer is {n}.", gold, answer_type) for n in new):
            return True
    if answer_type == "yesno" or answer_type in ("number", "math") and NUMBER.fullmatch(gold):
        return False
    if answer_type == "choice":  # the right option's words, and no other option's
        others = dict(OPTION.findall(question))
        gold = others.pop(reward.extract_answer(f"The answer is {gold}.", "choice"), "?")
        if any(words(other) in words(probe) for other in others.values()):
            return False
        question = question.partition("\n(A)")[0]
    return words(gold) in words(probe) and words(gold) not in words(question)


EXAMPLES = [set(words(text).split()) for rule in RULES.values() for text in (
    rule.arithmetic.probe, rule.commonsense.probe, MELONS["question"], SNOWMAN["question"])]


def repeats(probe: str, earlier: list[str]) -> bool:
    """Is the probe one of the earlier texts, or nearly an example of ours (60 % of their words)?"""
    mine = set(words(probe).split())
    return (words(probe) in map(words, earlier)
            or any(len(mine & example) > 0.6 * len(mine | example) for example in EXAMPLES))


# ------------------------------------------------------------------------------------- the teachers

def clean_reply(text, finish_reason: str) -> tuple[str, str]:
    """(text, fault): without a reasoning model's thoughts; why it is no complete reply, or ""."""
    if not isinstance(text, str):  # None, or the parts of a reply: the thoughts, and the text
        text = "".join(part.get("text") or "" for part in text or [])
    text = text.rpartition("</think>")[2].encode("utf-8", "replace").decode()  # no lone surrogates
    faults = {"length": "unparsed: cut off by the token limit",
              "content_filter": "refused: withheld by the server's content filter"}
    return text, faults.get(finish_reason, "")


class LocalModel:
    """A Hub id or local folder, as teacher or student: dialogues -> [(text, fault)], greedy."""

    batch = align = 16  # questions in a call; a resumed run begins at a multiple of `align`

    def __init__(self, name, args):
        self.model, self.chat = exgrpo.load_model(name, exgrpo.pick_device(args.device))
        self.max_new_tokens, self.counts = args.max_new_tokens, collections.Counter()
        self.about = f"{self.model.num_parameters() / 1e6:.1f} M parameters, {self.model.device}"

    def __call__(self, dialogues: list[list[str]]) -> list[tuple[str, str]]:
        prompts = [self.chat.prompt(turns) for turns in dialogues]
        replies = [("", "refused: prompt too long for the model")] * len(prompts)
        context = exgrpo.context_size(self.model)
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < context]
        fitting.sort(key=prompts.__getitem__)  # what a batch has in common is read once
        for start in range(0, len(fitting), self.batch):
            some = fitting[start:start + self.batch]
            outputs = exgrpo.generate(self.model, self.chat, [prompts[i] for i in some],
                                      max_new_tokens=self.max_new_tokens, token_budget=32768)
            for i, (text, cut_off, n_tokens) in zip(some, outputs):
                replies[i] = clean_reply(text, "length" if cut_off else "stop")
                self.counts.update({"requests": 1, "prompt tokens": len(prompts[i]),
                                    "new tokens": n_tokens})
        return replies


class Server:
    """Any OpenAI-compatible server as the teacher: dialogues -> [(text, fault)]."""

    PING = ["Reply with the word yes."]  # refused only by a server that refuses everything
    chat, align = None, 1  # its template is not known; no reply depends on what else is asked
    TRIES, PAUSE, TIMEOUT = 8, 1.0, 300  # seconds: of the first pause, then doubled; of one try

    def __init__(self, args):
        if is_offline_mode():
            raise UserError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so the client calls no "
                            "server, not even a local one; unset it (local models load without)")
        url = args.teacher.rstrip("/")
        if re.search(r"/v\d[^?]*$", url) and not url.endswith("/chat/completions"):
            url += "/chat/completions"  # the client would add /v1 to Gemini's .../v1beta/openai
        # Without a key of its own, the client would send the Hugging Face token to this server.
        self.client = InferenceClient(base_url=url, timeout=self.TIMEOUT,
                                      api_key=os.environ.get("TEACHER_API_KEY") or "none")
        self.fields = {"model": args.teacher_model, "max_tokens": args.max_new_tokens,
                       "temperature": 0, "seed": args.seed, **args.request}
        self.workers, self.batch = args.concurrency, 2 * args.concurrency
        self.stop, self.fault, self.lock, self.counts = Event(), None, Lock(), collections.Counter()
        self.about = f"a server, {self.workers} requests at a time"

    def __call__(self, dialogues: list[list[str]]) -> list[tuple[str, str]]:
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                return list(pool.map(self.ask, dialogues))
            except BaseException:
                self.stop.set()  # for the other threads
                raise

    def ask(self, turns):
        """One request -> (text, fault). It raises an error if the server refuses everything."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn}
                    for i, turn in enumerate(turns)]
        delay = 0
        for attempt in range(self.TRIES):
            if self.stop.wait(delay):
                raise self.fault or KeyboardInterrupt
            try:
                completion = self.client.chat_completion(messages, extra_body=self.fields)
                choice = completion.choices[0] if completion.choices else None
                if choice and choice.message and choice.finish_reason != "error":
                    usage = completion.usage
                    self.add({"requests": 1, "prompt tokens": usage and usage.prompt_tokens or 0,
                              "new tokens": usage and usage.completion_tokens or 0})
                    return clean_reply(choice.message.content, choice.finish_reason)
                status, said, asked = 200, dump(completion).decode(), None
            except Exception as error:  # HTTP errors, timeouts, closed connections, broken JSON
                response = getattr(error, "response", None) or getattr(
                    error.__context__, "response", None)  # the client trips over Gemini's lists
                status = getattr(response, "status_code", 0)
                said = getattr(response, "text", "") or f"{type(error).__name__}: {error}"
                asked = status and re.match(r"\d+", response.headers.get("retry-after", ""))
            if 400 <= status < 500 and status not in (408, 429):
                break  # another try would not help
            delay = min(60, int(asked[0]) if asked else self.PAUSE * 2 ** attempt)
            self.add({"retries": 1})
        if turns == self.PING or status in (0, 408, 429) or status > 500:
            what = f"failed {attempt + 1} times in a row" if attempt else "refused a request"
            self.fault = UserError(
                f"{self.client.model} {what}: {status or ''} {said[:300]}. Check the URL (up to "
                "/v1 or /chat/completions), --teacher-model, the key in TEACHER_API_KEY and, if a "
                "field is refused, --request. Nothing is lost: the same command goes on from here")
            self.stop.set()
            raise self.fault
        self.ask(self.PING)
        self.add({"refused": 1})
        message = re.search(r'"(?:message|error|detail)": *"((?:[^"\\]|\\.)+)', said)
        reason = re.sub(r"[\w-]*\d[\w.,-]*", "N", message[1] if message else said)
        return "", f"refused: {reason[:100]}"  # equal reasons are counted together

    def add(self, counts):
        with self.lock:
            self.counts.update(counts)


# ---------------------------------------------------------------------------------- the output file

def dump(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def resume(file, header: dict, questions: list[dict]) -> int:
    """Checks that an open D_EI file is of this run -> how many of the questions it holds."""
    file.seek(0)
    content, mine = file.read(), dump({"ei": header})
    if not mine.startswith(content[:len(mine)]):
        theirs = next(exgrpo.read_jsonl(file.name), ("", {}))[1].get("ei", {})
        changed = [f"{key} = {theirs.get(key)!r}, not {header.get(key)!r}"
                   for key in {**header, **theirs} if theirs.get(key) != header.get(key)]
        raise UserError(f"{file.name} was made with {', '.join(changed)}. Use its flags (prompts: "
                        "the rules in ei.py; templates: chat templates), or name another --out")
    end = content.rfind(b"\n") + 1
    if end < len(content):
        print(f"{file.name}: dropped a half-written last line, which is made again")
    file.truncate(end)
    file.seek(end)
    finished, lines = 0, itertools.islice(exgrpo.read_jsonl(file.name), 1, None)
    for finished, ((where, line), row) in enumerate(zip(lines, questions), 1):
        if any(line.get(key) != row[key] for key in ("id", "question", "answer", "answer_type")):
            raise UserError(f"{where} holds question {line.get('id')!r}, but here the data has "
                            f"{row['id']!r}: the data has changed; name another --out")
    return finished


def write_probes(teacher, student, questions: list[dict], finished: int, file, header: dict):
    """Appends the lines of all questions but the first `finished` ones. A local model's batch that
    was cut is asked again as a whole: the last digits of logits may depend on all that is in it."""
    with tqdm(total=len(questions), initial=finished, unit="question") as bar:
        for start in range(finished - finished % teacher.align, len(questions), teacher.batch):
            lines = make_probes(teacher, questions[start:start + teacher.batch], header["rules"])
            lines = apply_student_filter(student, lines, header["tau_hard"])
            for line in lines[max(0, finished - start):]:
                if not file.tell():  # only now: a run that could not begin leaves no header behind
                    file.write(dump({"ei": header}))
                file.write(dump(line))
                file.flush()
                bar.update()


# --------------------------------------------------------------------------------------- the report

COLUMNS = ["asked", *OUTCOMES, "student right"]
VERDICTS = ["no reasoning", "no probe left", "too hard", "too easy", "kept"]


def count(path: str) -> tuple:
    """A D_EI file -> its header and Counters of (rule, column), of reasons and of verdicts."""
    header, lines = exgrpo.read_probes(path)
    rules, reasons, verdicts = (collections.Counter() for _ in range(3))
    for line in lines:
        outcomes = [(rule, "declined") for rule in line.get("declined", [])]
        for one in line.get("rejected", []):
            reason = one["reason"].replace("unparsed: refused by the server:", "refused:")  # of old
            outcomes.append((one["rule"], reason.partition(":")[0]))
            reasons[reason] += 1
        for probe in line["probes"]:
            outcomes.append((probe["rule"], "kept" if probe["consistent"] else "inconsistent"))
            rules[probe["rule"], "student right"] += bool(probe.get("student_correct"))
        rules.update(outcomes + [(rule, "asked") for rule, _ in outcomes])
        verdicts[verdict(line, header.get("tau_hard", 1))] += 1
    return header, rules, reasons, verdicts


def report(path: str):
    """Prints what each filter did, from the file alone."""
    header, rules, reasons, verdicts = count(path)
    table = {f"{rule} {RULES[rule].name}": [rules[rule, column] for column in COLUMNS]
             for rule in RULES if rules[rule, "asked"]}
    table["all"] = map(sum, zip(*table.values()))
    print(f"\n{'probes':25}" + "".join(f"{column:>14}" for column in COLUMNS))
    for name, numbers in table.items():
        print(f"{name:25}" + "".join(f"{n:14,}" for n in numbers))
    print("", *(f"{outcome:14}{meaning}" for outcome, meaning in OUTCOMES.items()), "", sep="\n")
    for reason, n in reasons.most_common():
        print(f"{n:9,}  {reason}")
    print(f"\n{'questions':39}  % (95 % interval)")
    for name in VERDICTS:
        print(f"{name:25}{verdicts[name]:14,}  {reward.share(verdicts[name], verdicts.total())}")
    if not header.get("student"):
        print("Eq. 2 was skipped, because there was no --student")


# ------------------------------------------------------------------------------------- the datasets

def lettered(stem, texts, right, rationale=""):
    """A choice whose options are lettered from (A), whatever their labels were."""
    options = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCDEF", texts))
    return stem + options, "ABCDEF"[right], "choice", rationale


def read_row(name: str, row: dict) -> tuple | None:
    """A published row -> question, answer, type and rationale; None if it has no gold answer."""
    if name in ("csqa", "arc", "obqa"):
        stem, options = row.get("question") or row["question_stem"], row["choices"]
        return lettered(stem, options["text"], options["label"].index(row["answerKey"]))
    if name in ("sqa", "boolq"):  # the facts are evidence, not part of the question
        question = (row["question"] if name == "sqa" else
                    f"{row['passage']}\nAccording to this text: {row['question']}?")
        return question, "yes" if row["answer"] else "no", "yesno", row.get("facts", "")
    if name in ("anli", "esnli"):
        stem = (f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\n"
                "What does the premise say about the hypothesis?")
        texts = ["it is true (entailment)", "nothing certain (neutral)",
                 "it is false (contradiction)"]
        rationale = row.get("explanation_1") or row.get("reason") or ""
        return lettered(stem, texts, row["label"], rationale) if row["label"] >= 0 else None
    if name == "date":
        stem = re.sub(r"^Q: |\n *choice:.*|\nA:\s*$", "", row["inputs"])
        texts = list(row["multiple_choice_targets"])
        right = texts[row["multiple_choice_scores"].index(1)]
        random.Random(stem).shuffle(texts)  # the right one comes first in nearly every row
        return lettered(stem, texts, texts.index(right))
    if name == "gsm8k":
        rationale, _, answer = row["answer"].rpartition("####")
        rationale = re.sub(r"<<[^<>]*>>", "", rationale)
        return row["question"], answer.replace(",", ""), "number", rationale
    if name == "gsm8k_rev":
        return row["question"], row["answer"], "number", row["explanation"]
    if name == "math":
        gold = reward.extract_answer(row["solution"], "math")  # the last box
        return (row["problem"], gold, "math", row["solution"]) if gold else None
    stem = f"{row['table_title'] or 'Table'}\n{row['table']}\n\n{row['question']}"  # tabmwp
    if row["choices"]:
        return lettered(stem, row["choices"], row["choices"].index(row["answer"]), row["solution"])
    unit = f" (in {row['unit']})" if row["unit"] else ""
    return stem + unit, row["answer"], "number", row["solution"]


GITHUB = "https://raw.githubusercontent.com/"
MATH = ("algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra "
        "precalculus")
DATASETS = {  # name: Hub id or URL, configurations, train split and test split
    "sqa": ("ChilleD/StrategyQA", "", "train test"),
    "csqa": ("tau/commonsense_qa", "", "train validation"),
    "arc": ("allenai/ai2_arc", "ARC-Challenge", "train test"),
    "math": ("EleutherAI/hendrycks_math", MATH, "train test"),
    "gsm8k": ("openai/gsm8k", "main", "train test"),
    "tabmwp": (GITHUB + "lupantech/PromptPG/main/data/tabmwp/problems_{}.json", "", "train test1k"),
    "anli": ("facebook/anli", "", "train_r3 test_r3"),
    "date": ("tasksource/bigbench", "date_understanding", "train validation"),
    "boolq": ("google/boolq", "", "train validation"),
    "obqa": ("allenai/openbookqa", "main", "train test"),
    "esnli": ("esnli/esnli", "", "train test"),
    "gsm8k_rev": (GITHUB + "AllForward/ReversalMath/main/data/gsm8k/{}-backward.json", "",
                  "- test")}


def fetch(name: str, split: str):
    """The rows of a dataset from GitHub or the Hub; its configurations take turns, for --limit."""
    source, configs, splits = DATASETS[name]
    split = splits.split()[("train", "test").index(split)]
    if source.startswith(GITHUB):
        with urllib.request.urlopen(source.format(split), timeout=60) as response:
            text = response.read().decode()
        return (json.loads(text).values() if name == "tabmwp" else
                map(json.loads, filter(None, text.split("\n"))))
    import datasets  # only these rows need it, so it is not in requirements.txt
    parts = [datasets.load_dataset(source, config, split=split, streaming=True)
             for config in configs.split() or [None]]
    return filter(None, itertools.chain.from_iterable(itertools.zip_longest(*parts)))


def load_questions(source: str, split: str = "train", limit: int | None = None) -> list[dict]:
    """The first `limit` questions of a .jsonl file, or of a split of one of the twelve DATASETS."""
    keys, questions = exgrpo.QUESTION, []
    if source.endswith(".jsonl"):
        rows = exgrpo.read_probes(source, or_questions=True)[1][:limit]
        return [{key: row[key] for key in keys} for row in rows]
    if source not in DATASETS:
        raise UserError(f"--data {source}: neither a .jsonl file nor one of {', '.join(DATASETS)}")
    if split not in ("train", "test") or (source, split) == ("gsm8k_rev", "train"):
        raise UserError(f"--split {split}: {source} has no such split; use train or test")
    try:
        for i, row in enumerate(fetch(source, split)):
            texts = read_row(source, row)
            row = texts and dict(zip(keys, (f"{source}-{split}-{i}", *map(str.strip, texts))))
            if row and reward.is_correct(f"The answer is {row['answer']}.", row["answer"],
                                         row["answer_type"]):  # else it could not be graded
                questions.append(row)
            if len(questions) == limit:
                break
    except Exception as error:  # of many kinds: the network's, those of `datasets`, a changed field
        raise UserError(f"the dataset {source} could not be read: {type(error).__name__}: {error}. "
                        "It takes a network and pip install datasets; or give a .jsonl file")
    return questions


# ------------------------------------------------------------------------------------- command line

def json_object(text):  # argparse names this function where the text is no JSON object
    return dict(json.loads(text))


def parse_args():
    parser = exgrpo.Parser("Stage 1, explanatory inversion: questions -> filtered probes.")
    add = parser.add_argument_group("what to make, of what").add_argument
    add("--teacher", default=TOY + "teacher", help="Hub name, local folder or URL of a server")
    add("--student", help="untrained student; None: the toy's for the toy teacher, else no Eq. 2")
    add("--data", default=TOY + "train.jsonl", help=".jsonl file, or one of " + ", ".join(DATASETS))
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
    add("--request", type=json_object, default={}, metavar="JSON", help="fields of each request to "
        """change, or to drop by null, as '{"max_tokens": null, "max_completion_tokens": 2048}'""")
    add = parser.add_argument_group("the machine, and other things to do").add_argument
    add("--seed", type=at_least(0), default=0, help="sent to a server; local models are greedy")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--dry-run", action="store_true", help="only print the prompts, calls and tokens to expect")
    add("--report", metavar="FILE", help="only print the filter table of this D_EI file")
    args = parser.parse_args()
    if os.path.abspath(args.teacher) == TOY + "teacher" and not args.student:
        args.student = exgrpo.TOY_STUDENT
    args.rules = list(RULES) if args.rules == "all" else args.rules.split(",")
    if not set(args.rules) <= set(RULES) or len(set(args.rules)) < len(args.rules):
        raise UserError(f"--rules: name each rule once, as in {','.join(RULES)}")
    if args.student and args.tau_hard >= len(args.rules):
        raise UserError(f"--tau-hard {args.tau_hard} with {len(args.rules)} --rules keeps no "
                        "question: the student must know tau-hard of its probes, but not all")
    return args


def make_header(args, teacher, student) -> dict:
    """All that the output depends on. Paths of this project are stored relative to it."""
    header = {key: getattr(args, key) for key in (
        "teacher", "teacher_model", "student", "data", "split", "rules", "tau_hard",
        "max_new_tokens", "seed")}
    for key in ("teacher", "student", "data"):
        header[key] = header[key] and header[key].removeprefix(HERE + os.sep)
    row = MELONS | {"answer_type": "number"}  # of what a server's template makes, nothing is known
    asked = (teacher, make_prompt("R1", row)), (student, [user_turn(row)])
    texts = {"prompts": (TEMPLATE, NO_LEAK, AGAIN, TASK, REPLY, MELONS, SNOWMAN, RULES),
             "templates": [model.chat.prompt(turns) for model, turns in asked
                           if model and model.chat]}
    header |= {key: hashlib.sha256(repr(value).encode()).hexdigest()[:12]
               for key, value in texts.items() if value}
    return header | ({"request": args.request} if args.request else {})


def main():
    args = parse_args()
    if args.report:
        return report(args.report)
    questions = load_questions(args.data, args.split, args.limit)
    if not questions:
        raise UserError(f"{args.data} holds no question")
    if args.dry_run:
        for rule in args.rules:
            turns = "\n--------\n".join(make_prompt(rule, questions[0]))
            print(f"{f' {rule} ':=^80}\n{turns}\n")
        n = len(questions) * len(args.rules)
        calls = n + sum(not row["rationale"].strip() for row in questions)
        size = sum(len("".join(make_prompt(rule, row))) for row in questions for rule in args.rules)
        return print(f"{len(questions):,} questions: {calls:,} calls for reasoning and probes, "
                     f"at most {n:,} more for Eq. 1; prompts: about {size / 3.5e6:.1f} M tokens")
    with open(args.out, "a+b") as file:
        exgrpo.lock(file, f"another ei.py is writing {args.out}; wait, or name another --out")
        teacher = Server(args) if "://" in args.teacher else LocalModel(args.teacher, args)
        student = LocalModel(args.student, args) if args.student else None
        header = make_header(args, teacher, student)
        finished = resume(file, header, questions)
        print(f"teacher  {args.teacher}: {teacher.about}\n"
              f"student  {args.student}: {student.about if student else 'Eq. 2 is skipped'}\n"
              f"data     {args.data}, {args.split}: {len(questions):,} questions\n"
              f"output   {args.out}, {finished:,} questions in it", flush=True)
        if finished < len(questions):
            write_probes(teacher, student, questions, finished, file, header)
    report(args.out)
    counts = ", ".join(f"{n:,} {what}" for what, n in teacher.counts.items())
    print(f"\nteacher, this time: {counts or 'nothing was left to ask'}\nD_EI in {args.out}\n"
          f"next: python exgrpo.py --student {args.student or 'STUDENT'} --probes {args.out}")


if __name__ == "__main__":
    exgrpo.run(main)
