"""ei.py: prompts, parsing, both filters, resume, and a teacher behind a real loopback server.

The oracle below plays the teacher: from its replies ei.py must make tests/data/probes.jsonl again.
"""
import gc
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import huggingface_hub
import pytest

import ei
import exgrpo
import reward

HERE = os.path.dirname(os.path.abspath(__file__))
QUESTIONS = os.path.join(HERE, "data", "questions.jsonl")
HEADER, ROWS = exgrpo.read_probes(os.path.join(HERE, "data", "probes.jsonl"))
MATH_ROW = {"question": "What is x^2?", "answer": r"\frac{1}{2}", "answer_type": "math"}
NUMBER_ROW = {"id": "n", "question": "5 hens lay 3 eggs each. How many eggs?", "answer": "15",
              "answer_type": "number", "rationale": "5 x 3 = 15."}
GOOD = ("PROBE: 4 hens lay 3 eggs each. How many eggs?\nREASONING: 4 x 3 = 12.\n"
        "TYPE: number\nANSWER: 12")


# -------------------------------------------------------------------------------- oracle and server

def stated(answer):
    return f"The answer is {answer}."


def oracle(turns):
    """The teacher who wrote tests/data/probes.jsonl."""
    if turns == ei.Server.PING:
        return "yes"
    row = next(row for row in ROWS if row["question"] in turns[-1])
    if "The kind of probe" not in turns[0]:  # Eq. 1: still right behind this probe?
        probe = next((p for p in row["probes"] if turns[0].startswith(p["probe"])), None)
        return stated(row["answer"] if not probe or probe["consistent"] else "none of these")
    name = re.search("The kind of probe: ([^.]*)", turns[0])[1]
    rule = next(key for key in ei.RULES if ei.RULES[key].name == name)
    if rule in row["declined"]:
        return "DECLINE"
    fault = {one["rule"]: one["reason"] for one in row["rejected"]}.get(rule)
    probe = next((p for p in row["probes"] if p["rule"] == rule), {
        "probe": {"leaked": f"The answer is {row['answer']}. Is it?",
                  "duplicate": row["question"]}.get(
            fault, "Is it so?"), "rationale": "It is.", "answer_type": "yesno", "answer": "yes"})
    reply = ei.REPLY.format(types.SimpleNamespace(**probe))
    if fault and fault.startswith("unparsed: no "):
        reply = re.sub(rf"(?m)^{fault.split()[2]}:.*\n?", "", reply)
    return reply + "\nANSWER: no" * (fault == "unparsed: several ANSWER lines")


class Teacher(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server. `faults`: what the next requests meet in place of an answer."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, faults=(), delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.delay, self.requests, self.keys = list(faults), delay, [], set()
        self.pings = []  # requests by which ei.py asks whether the server answers anything
        self.busy, self.most_busy, self.retry_after = 0, 0, "0"
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turns = [message["content"] for message in body["messages"]]
        with server.lock:
            (server.pings if turns == ei.Server.PING else server.requests).append(turns)
            server.path = self.path
            server.options = {key: body[key] for key in body if key != "messages"}
            server.keys.add(self.headers["Authorization"])
            server.busy += 1
            server.most_busy = max(server.busy, server.most_busy)
            fault = server.faults.pop(0) if server.faults else 200
        time.sleep(server.delay * random.random())
        with server.lock:
            server.busy -= 1
        if fault == "closed":
            return self.connection.close()
        if fault == "half":
            return self.send(200, b'{"choices": [{"index": 0, "mess', promised=500)
        if fault == "slow":
            time.sleep(0.6)  # then a good answer, but the client has left
            fault = 200
        if isinstance(fault, bytes):
            return self.send(200, fault)
        if isinstance(fault, tuple):
            return self.send(fault[0], json.dumps(fault[1]).encode())
        if fault == "as SGLang":
            return self.send(400, b'{"object": "error", "message": "longer than its context"}')
        if fault != 200:
            return self.send(fault, b'{"error": {"message": "the context window is 2048"}}'
                             if fault == 400 else b'{"error": "no"}')
        self.send(200, json.dumps({
            "id": "x", "object": "chat.completion", "created": 1, "model": "oracle",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {
                "role": "assistant", "content": oracle(turns)}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}).encode())

    def send(self, status, body, promised=0):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(promised or len(body)))
        if status == 429:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(body)


def stub_student(dialogues):
    """The student of tests/data/probes.jsonl."""
    probes = {exgrpo.user_turn(p): p for row in ROWS for p in row["probes"]}
    return [(stated(probes[turns[0]]["answer"] if probes[turns[0]]["student_correct"] else "?"), "")
            for turns in dialogues]


@pytest.fixture
def run_ei(monkeypatch, capsys):
    """run_ei(flags...) -> (exit code, stdout, stderr), in this process; the student is a stub."""
    stub_student.about, stub_student.chat = "stub", None
    monkeypatch.setattr(ei, "LocalModel", lambda name, args: stub_student)
    monkeypatch.setattr(ei.Server, "PAUSE", 0.001)

    def go(*flags):
        monkeypatch.setattr(sys, "argv", ["ei.py", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            exgrpo.run(ei.main)
        code = end.value.code or 0
        del end
        gc.collect()  # closes the output file, and with it the lock, that a traceback holds
        return (code, *capsys.readouterr())
    return go


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """conftest.py switches the hub off, and huggingface_hub then calls no server at all."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def stub_teacher(reply):
    return lambda dialogues: [(reply(turns), "") for turns in dialogues]


# ------------------------------------------------------------------------------ prompts and parsing

def test_every_prompt_names_its_rule_and_all_demands():
    for rule in ei.RULES:
        for row in (NUMBER_ROW, NUMBER_ROW | {"answer_type": "text", "question": "Where is {x}?"}):
            prompt = ei.make_prompt(rule, row)
            assert len(prompt) == 3 and row["question"] in prompt[2] and row["answer"] in prompt[2]
            assert ei.RULES[rule].name in prompt[0] and ei.RULES[rule].definition in prompt[0]
            for demand in ("PROBE:", "REASONING:", "TYPE:", "ANSWER:", "DECLINE",
                           "repeat all facts"):
                assert demand in prompt[0]
            assert ("not contain the answer" in prompt[0]) == (rule not in ("R7", "R8"))
            assert ("melons" in prompt[1] + prompt[0]) == (row["answer_type"] == "number")


def test_every_worked_example_is_parsed_graded_and_accepted():
    for rule, (_, _, arithmetic, commonsense) in ei.RULES.items():
        for source, answer_type, example in ((ei.MELONS, "number", arithmetic),
                                             (ei.SNOWMAN, "yesno", commonsense)):
            parsed = ei.parse_reply(ei.REPLY.format(example))
            assert parsed == example._asdict()
            assert reward.is_correct(exgrpo.teacher_reply(parsed), example.answer,
                                     example.answer_type)
            row = {**source, "answer_type": answer_type}
            assert rule in ei.MAY_STATE_ANSWER or not ei.leaks(example.probe, row)


@pytest.mark.parametrize("reply, reason", [
    (GOOD, None),
    ("Sure!\n\n**PROBE:** 4 hens?\n**REASONING:** 12.\n**TYPE:** Number\n**ANSWER:** 12.", None),
    (GOOD.replace("12", "12 eggs"), None),
    ("PROBE: Warm?\nREASONING: It is.\nTYPE: Yes/No\nANSWER: Yes", None),
    ("PROBE: Which?\n(A) x\n(B) y\nREASONING: x.\nTYPE: choice\nANSWER: (A) x", None),
    ("PROBE: Which?\n(A) x of two or three words\n(B) y\nREASONING: x.\nTYPE: choice\n"
     "ANSWER: (A) x of two or three words", None),
    ("", "unparsed: no PROBE line"), ("The answer is 15.", "unparsed: no PROBE line"),
    (GOOD.replace("TYPE: number\n", ""), "unparsed: no TYPE line"),
    (GOOD + "\n\n" + GOOD, "unparsed: several PROBE lines"),
    ("ANSWER: 12\n" + GOOD[:-11], "unparsed: labels out of order"),
    (GOOD.replace("4 x 3 = 12.", ""), "unparsed: nothing behind a label"),
    (GOOD.replace("= 12.", "= 12. The answer is 14."),
     "unparsed: REASONING states another answer"),
    (GOOD.replace("number", "integer"), "unparsed: unknown TYPE"),
    (GOOD + "\nI hope this helps.", "unparsed: text after the ANSWER line"),
    (GOOD + " eggs, that is one dozen", "unparsed: ANSWER is not short"),
    (GOOD.replace("ANSWER: 12", "ANSWER: many"), "unparsed: ANSWER does not fit TYPE number"),
    (GOOD.replace("ANSWER: 12", "ANSWER: 10 to 12"), "unparsed: ANSWER does not fit TYPE number"),
    (GOOD.replace("number", "choice").replace("R: 12", "R: A"),
     "unparsed: options are not (A), (B), ..."),
    ("PROBE: Which?\n(A) x\n(C) y\nREASONING: x.\nTYPE: choice\nANSWER: A",
     "unparsed: options are not (A), (B), ..."),
    ("PROBE: Which?\n(A) x\n(B) y\nREASONING: x.\nTYPE: choice\nANSWER: C",
     "unparsed: ANSWER is no option"),
    (GOOD + "x" * 10_000, "unparsed: longer than 10,000 characters"),
])
def test_parsing_is_strict_and_says_why(reply, reason):
    if reason is None:
        parsed = ei.parse_reply(reply)
        assert reward.is_correct(stated(parsed["answer"]), parsed["answer"], parsed["answer_type"])
        assert all(parsed.values()) and "*" not in "".join(parsed.values())
    else:
        with pytest.raises(ei.Rejected, match=f"^{re.escape(reason)}$"):
            ei.parse_reply(reply)


@pytest.mark.parametrize("text, fault, reason", [
    ("DECLINE", "", "declined"), ("**DECLINE**", "", "declined"),
    ("DECLINED: no premise to change", "", "declined"),
    ("", "refused: too long", "refused: too long"), ("", "", "unparsed: no PROBE line"),
    (GOOD.replace("4 hens", "5 hens"), "", "duplicate"),
    (GOOD.replace("?", ", of 15?"), "", "leaked"), (GOOD, "", None)])
def test_each_rejection_is_an_outcome_of_the_report(text, fault, reason):
    """A reader sought the reasons in five functions; one that the report lacks is not counted."""
    try:
        probe = ei.check_probe("R1", NUMBER_ROW | {"probes": []}, text, fault)
        assert reason is None and probe["rule"] == "R1"
    except ei.Rejected as rejected:
        assert str(rejected) == reason and reason.partition(":")[0] in ei.OUTCOMES


def garbled(rng):
    """A reply that was cut, shuffled, repeated, or filled with other characters."""
    lines = rng.choice([GOOD, "DECLINE",
                        ei.REPLY.format(ei.RULES[f"R{rng.randint(1, 10)}"].commonsense)])
    lines = lines.split("\n")
    for _ in range(rng.randint(0, 3)):
        i = rng.randrange(len(lines))
        lines[i:i + 1] = rng.choice([[], [lines[i]] * 2, [lines[i][rng.randint(0, 9):]],
                                     ["ANSWER: 1e999"],
                                     [lines[i] + rng.choice("{}\\\0\ud800²−½_*:\u2028") * 9],
                                     ["TYPE: " + rng.choice(["text", "choice", "yesno", "math",
                                                             ""])]])
        rng.shuffle(lines) if rng.random() < 0.2 else None
        lines = lines or [""]
    return "\n".join(lines)[:rng.choice([10, 60, 10_000])]


def fuzz(n, seed):
    rng = random.Random(seed)
    row = NUMBER_ROW | {"question": "?"}
    outcomes = []
    for _ in range(n // 10):
        line, = ei.make_probes(
            stub_teacher(lambda turns: ei.clean_reply(garbled(rng), "stop")[0]), [row],
            list(ei.RULES))
        for one in line["rejected"]:
            assert re.match("unparsed: .|leaked$|duplicate$", one["reason"])
        ei.dump(line).decode()
        ruled = [p["rule"] for p in line["probes"]] + line["declined"]
        ruled += [one["rule"] for one in line["rejected"]]
        assert sorted(ruled) == sorted(ei.RULES), "an outcome was lost or counted twice"
        outcomes += ["probe"] * len(line["probes"]) + ["declined"] * len(line["declined"])
        outcomes += [one["reason"] for one in line["rejected"]]
    return outcomes


def test_garbled_replies_never_raise_and_are_all_counted():
    outcomes = fuzz(10_000, seed=0)
    assert len(outcomes) == 10_000 and len(set(outcomes)) > 12 and outcomes.count("probe") > 100


@pytest.mark.parametrize("text", ["PROBE:" * 20_000, "1" * 100_000, "* " * 50_000, "\n" * 100_000,
                                  "(A) " * 25_000, "1,1." * 25_000, "DECLINE" * 15_000])
def test_parsing_time_is_linear(text):
    start = time.perf_counter()
    for reply in (text, text[:9_900], GOOD.replace("4 hens", text[:9_000])):
        try:
            ei.check_probe("R1", NUMBER_ROW | {"probes": []}, reply, "")
        except ei.Rejected:
            pass
    assert time.perf_counter() - start < 0.5


CHOICE_ROW = {"question": "Where do fish sleep?\n(A) in water\n(B) in trees\n(C) in bed",
              "answer": "A",
              "answer_type": "choice"}


@pytest.mark.parametrize("probe, row, leaked", [
    ("Are there 15 eggs?", NUMBER_ROW, True), ("Are there 15.0 eggs?", NUMBER_ROW, True),
    ("Are there $15, or more?", NUMBER_ROW, True),
    ("Are there 150 eggs or 3.15?", NUMBER_ROW, False),
    ("5 hens lay 3 eggs?", NUMBER_ROW | {"answer": "5"}, False),  # 5 stands in the question as well
    ("1,234 eggs?", NUMBER_ROW | {"answer": "1234"}, True),
    ("-3 degrees?", NUMBER_ROW | {"answer": "3"}, False),
    (r"One gets \frac{1} {2}. Why?", MATH_ROW, True),
    (r"Why halve, and not take \frac{1}{3}?", MATH_ROW, False),
    ("Why is x^2 + 1 never 0?", MATH_ROW | {"answer": "x^2+1"}, True),
    ("Why is x^2 never 0?", MATH_ROW | {"answer": "x^2"}, False),  # the question speaks of it
    ("Why do fish sleep in water?", CHOICE_ROW, True),
    ("Do fish sleep in trees?", CHOICE_ROW, False),
    ("Which is wetter, in water or in bed?", CHOICE_ROW, False),
    ("The answer is A. Why?", CHOICE_ROW, True),
    ("Why do fish sleep in water?", CHOICE_ROW | {"answer": "(A)"}, True),
    ("Why do fish sleep in water?", CHOICE_ROW | {"answer": "a"}, True),
    ("Is yes a word?", {"question": "Is it?", "answer": "yes", "answer_type": "yesno"}, False),
    ("The answer is yes. Why?", {"question": "Is it?", "answer": "yes", "answer_type": "yesno"},
     True),
    ("Why Thursday?", {"question": "Which day?", "answer": "Thursday", "answer_type": "text"},
     True),
    ("Why in 1990?", {"question": "Which year?", "answer": "1990", "answer_type": "text"}, True),
    ("Why Thursdays?", {"question": "Which day?", "answer": "Thursday", "answer_type": "text"},
     False)])
def test_gold_answers_in_a_probe_are_found(probe, row, leaked):
    assert ei.leaks(probe, row) == leaked


def test_copies_are_dropped_and_counterfactuals_are_not():
    """A weak teacher hands our example back with a word changed; SmolLM2 did so for most rules."""
    seen = {ei.words(NUMBER_ROW["question"])}
    assert ei.repeats("5 hens lay 3 eggs each: how many EGGS?", seen)
    assert ei.repeats(ei.RULES["R5"].arithmetic.probe.replace(" full", ""), seen)
    assert not ei.repeats("4 hens lay 3 eggs each. How many eggs?", seen)


# -------------------------------------------------------------------------------------- the filters

def test_keep_question_truth_table():
    table = {(n, m, tau): ei.keep_question(n, m, tau) for m in range(4) for n in range(m + 1)
             for tau in range(4)}
    kept = {key for key, value in table.items() if value}
    assert kept == {(0, 1, 0), (0, 2, 0), (1, 2, 0), (1, 2, 1), (0, 3, 0), (1, 3, 0), (2, 3, 0),
                    (1, 3, 1),
                    (2, 3, 1), (2, 3, 2)}


def test_eq1_asks_the_question_behind_the_probe_as_turns():
    asked = []

    def teacher(dialogues):
        asked.extend(dialogues)
        return [(GOOD if "The kind of probe" in turns[0] else stated(15), "")
                for turns in dialogues]
    line, = ei.make_probes(teacher, [NUMBER_ROW], ["R1", "R3"])
    assert [p["consistent"] for p in line["probes"]] == [True]
    assert line["rejected"] == [{"rule": "R3", "reason": "duplicate"}]
    assert asked[-1] == [exgrpo.user_turn(NUMBER_ROW | {
        "question": "4 hens lay 3 eggs each. How many eggs?"}),
                         "4 x 3 = 12. The answer is 12.",
                         exgrpo.user_turn(NUMBER_ROW)]


def test_a_cut_off_reply_passes_no_filter():
    cut = "unparsed: cut off"
    line, = ei.make_probes(lambda ds: [(GOOD if "The kind" in d[0] else stated(15), cut)
                                       for d in ds], [NUMBER_ROW], ["R1"])
    assert line["rejected"] == [{"rule": "R1", "reason": cut}]
    line, = ei.make_probes(lambda ds: [(GOOD, "") if "The kind" in d[0] else (stated(15), cut)
                                       for d in ds], [NUMBER_ROW], ["R1"])
    assert line["probes"][0]["consistent"] is False and line["rejected"] == []
    probe = {"consistent": True, "probe": "x", "answer": "1", "answer_type": "number"}
    line = {"probes": [probe], "rejected": []}
    ei.apply_student_filter(lambda ds: [(stated(1), cut)], [line], 1)
    assert probe["student_correct"] is False and not line["kept"]


@pytest.mark.parametrize("text, rationale", [
    ("5 times 3. The answer is 15.", "5 times 3."),
    ("5 times 3.\n\n**The answer is 15.**", "5 times 3."),  # its ** would be taught
    ("**The answer is 15.** For it is\n5 times 3.", "**The answer is 15.** For it is\n5 times 3."),
    ("The answer is 16.", None), ("15", None)])
def test_a_missing_rationale_is_the_teachers_or_the_question_goes(text, rationale):
    calls = []
    teacher = stub_teacher(lambda turns: calls.append(turns) or (GOOD if len(calls) == 2 else text))
    lines = ei.make_probes(teacher, [NUMBER_ROW | {"rationale": " "}], ["R1"])
    line, = ei.apply_student_filter(None, lines, 1)
    assert line["kept"] == (rationale is not None) and len(calls) == (3 if rationale else 1)
    assert ei.verdict(line, 1) == ("kept" if rationale else "no reasoning")
    assert rationale is None or line["rationale"] == rationale


def test_the_whole_stage_makes_the_test_data_again(run_ei, tmp_path):
    """Both filters, every reason and every key: the oracle's answers must give its own file."""
    with Teacher() as server:
        code, out, err = run_ei("--teacher", server.url, "--student", "stub", "--data", QUESTIONS,
                              "--out", tmp_path / "p.jsonl")
    assert code == 0, err
    assert exgrpo.read_probes(tmp_path / "p.jsonl")[1] == ROWS
    table = out[out.index("probes   "):]
    assert re.search(r"all +120 +0 +12 +3 +2 +3 +8 +92 +53\n", table)
    assert all(re.search(rf"(?m)^{word} +{re.escape(what)}$", table)
               for word, what in ei.OUTCOMES.items())
    assert re.search(r"no probe left +0  0.0 .*\ntoo hard +1  8.3 .*\ntoo easy +1 .*\n"
                     r"kept +10  83.3 \(55.2 - 95.3\)\n", table)
    assert f"{len(server.requests)} requests, {7 * len(server.requests):,} prompt tokens" in out
    code, again, _ = run_ei("--report", tmp_path / "p.jsonl")
    assert code == 0 and again.strip() in out


def test_without_a_student_eq2_is_skipped_and_said(run_ei, tmp_path):
    with Teacher() as server:
        code, out, _ = run_ei("--teacher", server.url, "--data", QUESTIONS, "--out",
                              tmp_path / "p.jsonl")
    rows = exgrpo.read_probes(tmp_path / "p.jsonl")[1]
    assert code == 0 and all(row["kept"] for row in rows) and "Eq. 2 was skipped" in out
    assert {p["student_correct"] for row in rows for p in row["probes"]} == {None}


# ------------------------------------------------------------------------------------------- resume

@pytest.fixture(scope="module")
def server():
    with Teacher() as one:
        yield one


def flags(server, path):
    return ["--teacher", server.url, "--data", QUESTIONS, "--out", str(path), "--concurrency", "3"]


def undisturbed(run_ei, server, tmp_path, *more):
    assert run_ei(*flags(server, tmp_path / "whole.jsonl"), *more)[0] == 0
    server.requests.clear()
    return (tmp_path / "whole.jsonl").read_bytes()


def test_a_run_cut_at_any_byte_ends_in_the_same_file(run_ei, server, tmp_path):
    """A torn line, a torn header, a finished file: no byte differs, no call is repeated."""
    small, path, rng = ("--limit", "5"), tmp_path / "p.jsonl", random.Random(1)
    whole = undisturbed(run_ei, server, tmp_path, *small)
    header = whole.index(b"\n")
    cuts = [0, 1, header, header + 1, len(whole) - 1, len(whole)]
    for cut in cuts + rng.sample(range(len(whole)), 14):
        path.write_bytes(whole[:cut])
        server.requests.clear()
        code, out, _ = run_ei(*flags(server, path), *small)
        done = max(0, whole[:cut].count(b"\n") - 1)
        assert code == 0 and path.read_bytes() == whole and f"{done} questions in it" in out
        assert ("half-written" in out) == (cut > 0 and whole[cut - 1:cut] != b"\n")
        asked = {row["id"] for row in ROWS for turns in server.requests
                 if row["question"] in turns[-1]}
        assert asked == {row["id"] for row in ROWS[done:5]}


def test_sigkill_and_finish_equals_one_run(run_ei, server, tmp_path):
    whole, path = undisturbed(run_ei, server, tmp_path), tmp_path / "p.jsonl"
    server.delay = 0.02
    process = subprocess.Popen([sys.executable, "ei.py", *flags(server, path)],
                               cwd=os.path.dirname(HERE), stderr=subprocess.DEVNULL)
    while len(server.requests) < 180 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 0 < len(path.read_bytes()) < len(whole)
    server.delay = 0.0
    assert run_ei(*flags(server, path))[0] == 0 and path.read_bytes() == whole


def test_two_processes_on_one_output_are_refused(run_ei, server, tmp_path):
    pytest.importorskip("fcntl")
    with open(tmp_path / "p.jsonl", "a+b") as file:
        exgrpo.lock(file, "")
        code, _, err = run_ei(*flags(server, tmp_path / "p.jsonl"))
    assert code == 2 and "another ei.py is writing" in err


def test_a_system_without_locks_goes_on(run_ei, server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert run_ei(*flags(server, tmp_path / "p.jsonl"), "--limit", "1")[0] == 0


def test_other_configurations_files_and_data_are_refused_untouched(run_ei, server, tmp_path,
                                                                   monkeypatch):
    path, data = tmp_path / "p.jsonl", tmp_path / "q.jsonl"
    data.write_text(open(QUESTIONS).read())
    mine = [*flags(server, path), "--data", data]
    assert run_ei(*mine, "--limit", "2")[0] == 0
    before = path.read_bytes()
    for extra, word in ((["--tau-hard", "2"], "tau_hard = 1, not 2"),
                        (["--rules", "R1"], "rules = "),
                        (["--student", "x"], "student = None, not 'x'")):
        code, _, err = run_ei(*mine, *extra)
        assert code == 2 and word in err and err.count("\n") == 1 and path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(ei, "TASK", "Think of something else.")
        code, _, err = run_ei(*mine)
    assert code == 2 and "prompts = '" in err and "rules in ei.py" in err
    assert path.read_bytes() == before
    data.write_text("".join(open(QUESTIONS).readlines()[1:]))
    code, _, err = run_ei(*mine)
    assert code == 2 and "the data has changed" in err and "p.jsonl:2" in err
    assert path.read_bytes() == before
    row = json.loads(open(QUESTIONS).readline())
    data.write_text(json.dumps(row | {"answer_type": "text"}) + "\n")
    code, _, err = run_ei(*mine)
    assert code == 2 and "the data has changed" in err and path.read_bytes() == before
    for content in (b"\n", b"my diary", b"my diary\n", open(QUESTIONS, "rb").read(), b"[]\n"):
        path.write_bytes(content)
        code, _, err = run_ei(*flags(server, path))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and str(path) in err
        assert path.read_bytes() == content


def test_another_chat_template_is_refused(tiny, monkeypatch, capsys, tmp_path):
    """A tokenizer that was edited, or updated, on the way would mix two kinds of probes."""
    path, models = tmp_path / "p.jsonl", {}
    for name in ("teacher", "student"):
        models[name] = shutil.copytree(tiny("qwen2"), tmp_path / name)

    def run():
        monkeypatch.setattr(sys, "argv", [
            "ei.py", "--teacher", str(models["teacher"]), "--student", str(models["student"]),
            "--data", QUESTIONS, "--limit", "1", "--max-new-tokens", "4", "--rules", "R1,R8",
            "--out", str(path), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            exgrpo.run(ei.main)
        gc.collect()
        return end.value.code or 0, capsys.readouterr().err
    assert run()[0] == 0 and run()[0] == 0
    before = path.read_bytes()
    for folder in models.values():
        template = folder / "chat_template.jinja"
        text = template.read_text()
        template.write_text("You are a helper." + text)
        code, err = run()
        assert code == 2 and "templates = '" in err and "chat templates" in err
        assert path.read_bytes() == before
        template.write_text(text)
    assert run()[0] == 0


def test_a_run_that_never_began_leaves_nothing_in_the_way(run_ei, server, tmp_path, monkeypatch):
    """The header of a run with a mistyped teacher used to stand in the way of the right one."""
    def missing(name, args):
        raise exgrpo.UserError("no such model")
    path = tmp_path / "p.jsonl"
    monkeypatch.setattr(ei, "LocalModel", missing)
    assert run_ei("--teacher", "typo", "--data", QUESTIONS, "--out", path)[0] == 2
    assert run_ei(*flags(server, path), "--limit", "1")[0] == 0


# ------------------------------------------------------------------------------ the server's faults

def test_output_keeps_the_input_order_under_concurrency(run_ei, tmp_path):
    with Teacher(delay=0.02) as server:
        code, _, _ = run_ei(*flags(server, tmp_path / "p.jsonl"), "--concurrency", "8")
    assert code == 0 and [row["id"] for row in exgrpo.read_probes(tmp_path / "p.jsonl")[1]] == [
        row["id"] for row in ROWS]
    assert 6 <= server.most_busy <= 8


@pytest.mark.parametrize("seconds", ["1", "1.5"])  # no RFC allows the second form; some send it
def test_a_server_is_given_the_time_that_it_asks_for(run_ei, server, tmp_path, monkeypatch,
                                                     seconds):
    monkeypatch.setattr(server, "retry_after", seconds)
    small, start = ("--limit", "1", "--rules", "R1"), time.perf_counter()
    server.faults = [429]
    assert run_ei(*flags(server, tmp_path / "p.jsonl"), *small)[0] == 0
    assert 1 <= time.perf_counter() - start < 5


@pytest.mark.parametrize("faults", [
    [429] * 7, [500, 503, 502], [408, 504], ["closed"] * 3, ["half"], ["slow"],
    [b"<html>", b"", b"[]", b"{}"],
    [b'{"choices": []}', b'{"choices": [{"message": null}]}']])
def test_passing_faults_change_nothing(run_ei, server, tmp_path, monkeypatch, faults):
    monkeypatch.setattr(ei.Server, "TIMEOUT", 0.3 if faults == ["slow"] else 300)
    small = ("--limit", "2", "--concurrency", "1")
    whole, path = undisturbed(run_ei, server, tmp_path, *small), tmp_path / "p.jsonl"
    server.faults = list(faults)
    code, out, err = run_ei(*flags(server, path), *small)
    assert code == 0 and path.read_bytes() == whole, err
    assert f"{len(faults)} retries" in out


@pytest.mark.parametrize("fault, calls, words", [
    (401, 1, "TEACHER_API_KEY"), (403, 1, "TEACHER_API_KEY"), (404, 1, "--teacher-model"),
    (422, 1, "refused"),
    (429, 8, "8 times in a row"), (500, 8, "8 times"), (b"garbage", 8, "8 times"),
    ("closed", 8, "8 times"), ("half", 8, "8 times")])
def test_lasting_faults_end_in_one_line_and_lose_nothing(run_ei, server, tmp_path, fault, calls,
                                                         words):
    small = ("--limit", "2", "--concurrency", "1")
    whole, path = undisturbed(run_ei, server, tmp_path, *small), tmp_path / "p.jsonl"
    run_ei(*flags(server, path), "--limit", "1")
    server.requests.clear()
    server.faults = [fault] * 1000
    code, _, err = run_ei(*flags(server, path), *small)
    server.faults = []
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and words in lines[0]
    assert calls <= len(server.requests) <= calls + 1  # the thread may have begun the next one
    assert "Traceback" not in err and path.read_bytes() == b"".join(whole.splitlines(True)[:2])
    assert run_ei(*flags(server, path), *small)[0] == 0 and path.read_bytes() == whole


def test_a_failure_stops_the_other_threads(monkeypatch):
    """They wait for another try, up to a minute each, and would keep the run from its end."""
    teacher = ei.Server(types.SimpleNamespace(teacher="http://x", teacher_model=None, request={},
                                              max_new_tokens=8, seed=0, concurrency=4))

    def ask(number):
        if number == 0:
            raise exgrpo.UserError("refused")
        return teacher.stop.wait(5)  # a request that is under way, then the next one
    monkeypatch.setattr(teacher, "ask", ask)
    start = time.perf_counter()
    with pytest.raises(exgrpo.UserError):
        teacher(range(1000))
    assert time.perf_counter() - start < 2


def body(content, reason="stop"):
    return json.dumps({"choices": [{"index": 0, "finish_reason": reason,
                                    "message": {"role": "assistant", "content": content}}],
                       "usage": {"prompt_tokens": 7}}).encode()


ONE = ("--limit", "1", "--rules", "R1,R3", "--concurrency", "1")


@pytest.mark.parametrize("faults, reason", [
    ([(400, {"error": {"message": "The response was filtered due to the prompt",
                       "code": "content_filter"}})], "The response was filtered due to the prompt"),
    ([(422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 1999"})],
     "`inputs` tokens + `max_new_tokens` must be <= N Given: N"),
    ([(400, {"error": {"message": "prompt is too long: 215000 tokens > 200000 maximum"}})],
     "prompt is too long: N tokens > N maximum"),
    ([(403, {"error": {"code": 403, "message": "Input was flagged"}})], "Input was flagged"),
    ([(400, {"detail": "x" * 5000})], "x" * 100),
    ([(413, "Payload too large")], '"Payload too large"'),
    ([(400, [{"error": {"code": 400, "message": "Blocked"}}])], "Blocked"),
    ([(500, {"error": {"message": "Invalid input batch."}})] * 8, "Invalid input batch."),
    ([(200, {"error": {"message": "No output", "code": 500}, "choices": []})] * 8, "No output")])
def test_a_refused_request_costs_one_probe(run_ei, server, tmp_path, faults, reason):
    """One prompt that a content filter stopped, or that was too long, ended the whole run, and at
    the same place again after every restart: only 400 with the word "context" was let pass.
    llama.cpp and Gemini refuse single prompts by a lasting 500, and by 200 without a choice. A body
    that is a list, as Gemini's, is an AttributeError of huggingface_hub."""
    server.faults, path = list(faults), tmp_path / "p.jsonl"
    code, out, err = run_ei(*flags(server, path), *ONE)
    assert code == 0 and server.faults == [], err
    line, = exgrpo.read_probes(path)[1]
    assert line["rejected"] == [{"rule": "R1", "reason": f"refused: {reason}"}]
    assert [probe["rule"] for probe in line["probes"]] == ["R3"]
    assert f"1  refused: {reason}\n" in out and "1 refused" in out
    assert re.search(r"all +2 +1 +0 +0 +0 +0 +0 +1 +0\n", out)


def test_a_refusal_in_eq1_is_no_inconsistency(run_ei, server, tmp_path):
    """Whether the probe is consistent was never asked: it counted as inconsistent."""
    server.faults, path = [200, 200, 400], tmp_path / "p.jsonl"  # R1, R3, then Eq. 1 of R1
    code, out, err = run_ei(*flags(server, path), *ONE)
    assert code == 0 and server.faults == [], err
    line, = exgrpo.read_probes(path)[1]
    assert line["rejected"] == [{"rule": "R1", "reason": "refused: the context window is N"}]
    assert [(p["rule"], p["consistent"]) for p in line["probes"]] == [("R3", True)]
    assert re.search(r"all +2 +1 +0 +0 +0 +0 +0 +1 +0\n", out)


def test_refusals_in_older_files_are_counted_as_such(run_ei, tmp_path):
    """They stood there as unparsed replies."""
    path, old = tmp_path / "p.jsonl", "unparsed: refused by the server: too long"
    row = ROWS[0] | {"probes": [], "declined": [], "rejected": [{"rule": "R1", "reason": old}]}
    path.write_bytes(b"".join(map(ei.dump, [{"ei": HEADER}, row])))
    code, out, _ = run_ei("--report", path)
    assert code == 0 and re.search(r"all +1 +1 +0 +0 .*\n", out) and "1  refused: too long\n" in out


def test_a_server_that_refuses_everything_ends_the_run(run_ei, server, tmp_path):
    """A field that it does not take: the server's words, the flag that helps, nothing written."""
    server.requests.clear()
    server.faults = [(400, {"error": {"message": "Unsupported parameter: 'max_tokens'"}})] * 99
    code, _, err = run_ei(*flags(server, tmp_path / "p.jsonl"), *ONE)
    server.faults = []
    assert code == 2 and "Unsupported parameter: 'max_tokens'" in err and "--request" in err
    assert len(server.requests) <= 2 and os.path.getsize(tmp_path / "p.jsonl") == 0


def test_fields_of_a_request_can_be_changed_and_dropped(run_ei, server, tmp_path):
    """Reasoning models refuse max_tokens and temperature, some servers refuse seed."""
    path, fields = tmp_path / "p.jsonl", {"max_tokens": None, "max_completion_tokens": 2048,
                                          "temperature": None, "seed": None}
    mine = [*flags(server, path), *ONE]
    assert run_ei(*mine, "--request", json.dumps(fields))[0] == 0
    assert server.options == {"model": "dummy", "max_completion_tokens": 2048, "stream": False}
    assert exgrpo.read_probes(path)[0]["request"] == fields
    assert run_ei(*mine, "--request", json.dumps(fields))[0] == 0  # the same run
    code, _, err = run_ei(*mine)
    assert code == 2 and "request = {'max_tokens': None" in err and "not None" in err
    path.unlink()
    assert run_ei(*mine)[0] == 0 and "request" not in exgrpo.read_probes(path)[0]  # as ever
    for text in ("{max_tokens: null}", "3", '["seed"]'):
        code, _, err = run_ei(*mine, "--request", text)
        assert code == 2 and "invalid json_object value" in err and err.count("\n") == 1


def test_the_text_parts_of_a_reply_are_the_reply(run_ei, server, tmp_path):
    """Reasoning models behind LiteLLM or Mistral's API answer so; no reply could be read."""
    parts = [{"type": "thinking", "thinking": "PROBE: no"},
             {"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}]
    server.faults = [body(parts)]
    assert run_ei(*flags(server, tmp_path / "p.jsonl"), *ONE)[0] == 0
    line, = exgrpo.read_probes(tmp_path / "p.jsonl")[1]
    assert line["probes"][0]["probe"] == "4 hens lay 3 eggs each. How many eggs?"


def test_an_error_with_status_200_is_tried_again_and_then_said(run_ei, server, tmp_path):
    """OpenRouter answers so; after two minutes the user read Python's words, not the server's."""
    error = (200, {"error": {"message": "No endpoints found", "code": 404}})
    server.faults = [error] * 3
    code, out, _ = run_ei(*flags(server, tmp_path / "1.jsonl"), *ONE)
    assert code == 0 and "3 retries" in out
    server.faults = [error] * 99
    code, _, err = run_ei(*flags(server, tmp_path / "2.jsonl"), *ONE)
    server.faults = []
    assert code == 2 and "No endpoints found" in err


def test_what_a_provider_broke_off_is_no_reply(run_ei, server, tmp_path):
    """Both texts would be taken for whole: one was filtered, one lost its provider (OpenRouter)."""
    server.faults = [body(GOOD, "content_filter"), body(GOOD.replace("4", "7"), "error")]
    code, out, _ = run_ei(*flags(server, tmp_path / "p.jsonl"), *ONE)
    line, = exgrpo.read_probes(tmp_path / "p.jsonl")[1]
    assert code == 0 and "1 retries" in out and "7 hens" not in str(line["probes"])
    assert line["rejected"][0]["reason"] == "refused: withheld by the server's content filter"


@pytest.mark.parametrize("base, path", [
    ("/v1", "/v1"), ("", "/v1"), ("/v1beta/openai/", "/v1beta/openai"),
    ("/api/paas/v4", "/api/paas/v4"), ("/x/chat/completions", "/x")])
def test_base_urls_are_those_of_the_vendors(run_ei, server, tmp_path, base, path):
    """The client asks Gemini's .../v1beta/openai for .../v1beta/openai/v1/chat/completions: 404."""
    url = server.url.removesuffix("/v1") + base
    assert run_ei(*flags(server, tmp_path / "p.jsonl"), *ONE, "--teacher", url)[0] == 0
    assert server.path == path + "/chat/completions"


def test_odd_replies_are_counted_not_fatal(run_ei, server, tmp_path):
    server.faults = [body("x" * 10_000_000), body(None), body(GOOD, "length"), 400, 200,
                     body(GOOD.replace("4 hens", "4 hens \ud800")),
                     body("<think>PROBE: no</think>DECLINE"), "as SGLang", 200]
    path = tmp_path / "p.jsonl"
    code, _, err = run_ei(*flags(server, path), "--concurrency", "1", "--limit", "1")
    server.faults = []
    line = exgrpo.read_probes(path)[1][0]
    assert code == 0 and line["declined"] == ["R6"], err
    assert [one["reason"] for one in line["rejected"]] == [
        "unparsed: longer than 10,000 characters", "unparsed: no PROBE line",
        "unparsed: cut off by the token limit",
        "refused: the context window is N",
        "refused: longer than its context"]
    assert line["probes"][0]["probe"].startswith("4 hens ?")  # half a character cannot be stored
    assert server.options == {"model": "dummy", "max_tokens": 512, "temperature": 0, "seed": 0,
                              "stream": False}


def test_no_key_leaves_its_place(run_ei, tmp_path, monkeypatch):
    """InferenceClient sends the user's Hugging Face token to any URL without a key of its own."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Teacher() as server:
        run_ei(*flags(server, tmp_path / "1.jsonl"), "--limit", "1")
        assert server.keys == {"Bearer none"}
        monkeypatch.setenv("TEACHER_API_KEY", "sk-42secret")
        server.keys.clear()
        code, out, err = run_ei(*flags(server, tmp_path / "2.jsonl"), "--limit", "1")
        assert server.keys == {"Bearer sk-42secret"}
        server.faults = [401] * 50
        _, _, refused = run_ei(*flags(server, tmp_path / "3.jsonl"), "--limit", "1")
    assert code == 0 and "secret" not in out + err + refused + (tmp_path / "2.jsonl").read_text()


def test_offline_mode_is_said(run_ei, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = run_ei("--teacher", "http://127.0.0.1:9", "--data", QUESTIONS, "--out",
                          tmp_path / "p.jsonl")
    assert code == 2 and "HF_HUB_OFFLINE" in err and err.count("\n") == 1


# ----------------------------------------------------------------------- local models and bad input

def test_a_local_teacher_and_student_end_to_end(tiny, monkeypatch, capsys, tmp_path):
    """A random model's replies are rejected, with reasons, and so are prompts over its context."""
    folder, path = tiny("gpt2"), tmp_path / "p.jsonl"
    monkeypatch.setattr(sys, "argv",
                        ["ei.py", "--teacher", folder, "--student", folder, "--data", QUESTIONS,
                                      "--limit", "1", "--max-new-tokens", "8", "--rules", "R1,R8",
                                      "--out", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        exgrpo.run(ei.main)
    line, = exgrpo.read_probes(path)[1]
    reasons = {one["reason"] for one in line["rejected"]}
    assert not end.value.code and len(line["rejected"]) == 2 and not line["kept"]
    assert reasons <= {"unparsed: cut off by the token limit",
                       "refused: prompt too long for the model",
                       "unparsed: no PROBE line"}
    out = capsys.readouterr().out
    assert re.search("no probe left +1 ", out)
    with pytest.raises(SystemExit):  # the same again, though a batch of 16 was not full: no reply
        exgrpo.run(ei.main)
    assert "nothing was left to ask" in capsys.readouterr().out


def test_a_token_limit_as_long_as_the_context_leaves_room_for_prompts(tiny):
    """It left none: each prompt was "too long", and the student was wrong about every probe."""
    args = types.SimpleNamespace(device="cpu", max_new_tokens=10_000)
    (text, fault), = ei.LocalModel(tiny("gpt2"), args)([["How many?"]])
    assert fault in ("", "unparsed: cut off by the token limit") and (text or not fault)


@pytest.mark.parametrize("content, words", [
    ("", "holds no question"), ("{", "q.jsonl:1: not JSON"), ("[1]\n", "a JSON object is expected"),
    ('{"id": "a"}\n', '"question" is missing'), ("\xff\n", "q.jsonl:1: not JSON")])
def test_bad_questions_end_in_one_line(run_ei, tmp_path, content, words):
    data = tmp_path / "q.jsonl"
    data.write_bytes(content.encode("latin-1"))
    code, _, err = run_ei("--teacher", "http://x", "--data", data, "--out", tmp_path / "p.jsonl")
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("change, words", [({"question": " "}, '"question" is '),
                                           ({"answer_type": "essay"},
                                            'unknown answer_type "essay"'),
                                           ({"answer": "a few"}, "the answer 'a few' cannot be"),
                                           ({"id": "rolls"}, 'the id "rolls" stands at')])
def test_bad_rows_name_their_line(run_ei, tmp_path, change, words):
    rows = [json.loads(line) for line in open(QUESTIONS)]
    rows[4].update(change)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run_ei("--teacher", "http://x", "--data", tmp_path / "q.jsonl", "--dry-run")
    assert code == 2 and words in err and "q.jsonl:5" in err and err.count("\n") == 1


@pytest.mark.parametrize("flags, words", [
    (["--data", "gsm9k"],
     "sqa, csqa, arc, math, gsm8k, tabmwp, anli, date, boolq, obqa, esnli, gsm8k_rev"),
    (["--data", "."], "neither a .jsonl file"),
    (["--data", "missing.jsonl"], "No such file or directory: 'missing.jsonl'"),
    (["--data", "gsm8k", "--split", "dev"], "--split dev"), (["--rules", "R1,R11"], "--rules"),
    (["--data", "gsm8k_rev"], "gsm8k_rev has no such split"), (["--rules", "R1,R1"], "--rules"),
    (["--tau-hard", "-1"], "--tau-hard"), (["--limit", "0"], "--limit"),
    (["--frobnicate"], "--frobnicate"),
    (["--student", "x", "--rules", "R8"], "--tau-hard 1 with 1 --rules keeps no question"),
    (["--out", "no/such/folder/p.jsonl"], "no/such/folder"),
    (["--report", QUESTIONS], "no D_EI file"),
    (["--report", "missing.jsonl"], "No such file or directory: 'missing.jsonl'")])
def test_bad_flags_end_in_one_line(run_ei, flags, words):
    code, _, err = run_ei("--teacher", "http://x", "--data", QUESTIONS, *flags)
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: ")


def test_a_report_trusts_no_line(run_ei, tmp_path):
    path = tmp_path / "p.jsonl"
    for change, words in (({"kept": 1}, '"kept" is missing, empty or no bool'),
                          ({"probes": 3}, '"probes" is missing, empty or no list')):
        path.write_text(json.dumps({"ei": HEADER}) + "\n" + json.dumps(ROWS[0] | change) + "\n")
        code, _, err = run_ei("--report", path)
        assert code == 2 and words in err and "p.jsonl:2" in err and err.count("\n") == 1


def test_dry_run_prints_every_prompt_and_the_bill(run_ei):
    code, out, _ = run_ei("--teacher", "http://x", "--data", QUESTIONS, "--dry-run")
    assert code == 0 and all(rule.definition in out for rule in ei.RULES.values())
    size = sum(len(turn) for row in ei.load_questions(QUESTIONS) for rule in ei.RULES
               for turn in ei.make_prompt(rule, row))
    assert "12 questions: 120 calls for reasoning and probes, at most 120 more for Eq. 1" in out
    assert f"about {size / 3.5e6:.1f} M tokens" in out


def test_letters_that_a_terminal_lacks_are_replaced(tmp_path):
    """A Windows terminal, or a pipe, is cp1252: the dry run ended in a UnicodeEncodeError."""
    path = tmp_path / "q.jsonl"
    question = "How many is \u221a4 + \u03b1, if \u03b1 = 13?"
    path.write_text(json.dumps(NUMBER_ROW | {"question": question}))
    done = subprocess.run([sys.executable, "ei.py", "--dry-run", "--data", str(path)],
                          cwd=os.path.dirname(HERE), capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"How many is ?4 + ?, if" in done.stdout, done.stderr[-300:]


# ------------------------------------------------------------------------------------- the datasets

CHOICES = {"text": ["a lamp", "a rope", "a bell"], "label": ["1", "2", "3"]}
PUBLISHED = {  # invented rows in their true format, and question's end, answer, type, rationale
    "gsm8k": ({"question": "Q?", "answer": "2 x 600 = <<2*600=1200>>1200.\n#### 1,200"},
              ("Q?", "1200", "number", "2 x 600 = 1200.")),
    "gsm8k_rev": ({"id": "x", "question": "Q?", "answer": "5", "explanation": "e", "wrong": ""},
                  ("Q?", "5", "number", "e")),
    "math": ({"problem": "P", "level": "1", "type": "t", "solution": r"So $\boxed{\frac{1}{2}}$."},
             ("P", r"\frac{1}{2}", "math", r"So $\boxed{\frac{1}{2}}$.")),
    "sqa": ({"qid": "1", "term": "t", "question": "Is it?", "answer": False, "facts": "F. G."},
            ("Is it?", "no", "yesno", "F. G.")),
    "csqa": ({"id": "1", "question": "Which?", "question_concept": "c", "choices": CHOICES,
              "answerKey": "3"},
             ("Which?\n(A) a lamp\n(B) a rope\n(C) a bell", "C", "choice", "")),
    "arc": ({"id": "1", "question": "Which?", "choices": CHOICES, "answerKey": "1"},
            ("Which?\n(A) a lamp\n(B) a rope\n(C) a bell", "A", "choice", "")),
    "obqa": ({"id": "1", "question_stem": "Which", "choices": CHOICES, "answerKey": "2"},
             ("Which\n(A) a lamp\n(B) a rope\n(C) a bell", "B", "choice", "")),
    "boolq": ({"question": "is it warm", "passage": "It is warm.", "answer": True},
              ("It is warm.\nAccording to this text: is it warm?", "yes", "yesno", "")),
    "anli": ({"uid": "1", "premise": "P.", "hypothesis": "H.", "label": 1, "reason": "r"},
             ("(B) nothing certain (neutral)\n(C) it is false (contradiction)", "B", "choice",
              "r")),
    "esnli": ({"premise": "P.", "hypothesis": "H.", "label": 2, "explanation_1": "e",
               "explanation_2": ""},
              ("(B) nothing certain (neutral)\n(C) it is false (contradiction)", "C", "choice",
               "e")),
    "tabmwp": ({"question": "How much?", "choices": None, "answer": "1.50", "unit": "$",
                "table_title": None,
                "table": "pen | $1.50", "solution": "s", "grade": 1},
               ("Table\npen | $1.50\n\nHow much? (in $)", "1.50", "number", "s")),
    "date": ({"idx": 1,
              "inputs": "Q: Today is 1/2/1990. What is the date tomorrow in MM/DD/YYYY?\nA:",
              "targets": ["01/03/1990"], "multiple_choice_scores": [1, 0, 0],
              "multiple_choice_targets": ["01/03/1990", "01/03/1991", "01/01/1990"]}, None)}


@pytest.fixture
def published(monkeypatch):
    """The package datasets and the web, as far as ei.py uses them: they hold the rows above."""
    asked = []

    def load_dataset(source, config, split, streaming):
        asked.append((source, config, split))
        name = next(name for name, entry in ei.DATASETS.items() if entry[0] == source)
        return iter([PUBLISHED[name][0]])

    def urlopen(url, timeout):
        asked.append((url,))
        name = "tabmwp" if "tabmwp" in url else "gsm8k_rev"
        row = PUBLISHED[name][0]
        return io.BytesIO(json.dumps({"17": row} if name == "tabmwp" else row).encode())
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(ei.urllib.request, "urlopen", urlopen)
    return asked


@pytest.mark.parametrize("name", list(ei.DATASETS))
def test_every_dataset_is_mapped(published, name):
    rows = ei.load_questions(name, "test")
    row = exgrpo.check_question(rows[0], name)
    assert len(rows) == (7 if name == "math" else 1) and row["id"] == f"{name}-test-0"
    assert reward.is_correct(stated(row["answer"]), row["answer"], row["answer_type"])
    if name != "date":
        end, *rest = PUBLISHED[name][1]
        assert row["question"].endswith(end)
        assert [row["answer"], row["answer_type"], row["rationale"]] == rest
    assert ("validation" in str(published)) == (name in ("csqa", "date", "boolq"))


def test_date_options_are_shuffled_the_same_way_each_time(published):
    row, = ei.load_questions("date")
    assert row == ei.load_questions("date")[0] and row["question"].startswith("Today is 1/2/1990.")
    assert f"\n({row['answer']}) 01/03/1990" in row["question"] and "A:" not in row["question"]
    rights = {ei.read_row("date", PUBLISHED["date"][0] | {"inputs": f"Day {i}?"})[1]
              for i in range(30)}
    assert rights == {"A", "B", "C"}


def test_rows_without_gold_are_skipped_and_choices_of_tables_lettered():
    assert not ei.read_row("anli", {"premise": "", "hypothesis": "", "label": -1})
    assert not ei.read_row("math", {"problem": "P", "solution": "no box"})
    for gold in (r"\{1,2\}", r"3\sqrt{2}", r"\left\{\frac{a_{b_{c_{d}}}}{2}\right\}"):
        solution = rf"First $\boxed{{0}}$, no: $x = \boxed{{{gold}}}$."
        assert ei.read_row("math", {"problem": "P", "solution": solution})[1] == gold
    row = PUBLISHED["tabmwp"][0] | {"choices": ["pen", "cup"], "answer": "cup"}
    question, *rest = ei.read_row("tabmwp", row)
    assert question.endswith("How much?\n(A) pen\n(B) cup") and rest == ["B", "choice", "s"]


def test_a_d_ei_file_gives_its_questions():
    """As in evaluate.py: the five keys of a question, nothing of its probes."""
    rows = ei.load_questions(os.path.join(HERE, "data", "probes.jsonl"), limit=3)
    keys = "id", "question", "answer", "answer_type", "rationale"
    assert rows == [{key: row[key] for key in keys} for row in ROWS[:3]]


def test_without_the_package_or_the_network_one_line_says_so(run_ei, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run_ei("--teacher", "http://x", "--data", "gsm8k", "--dry-run")
    assert code == 2 and "pip install datasets" in err and err.count("\n") == 1

    def no_network(*_, **__):
        raise ConnectionError("no route to host")

    def no_script(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported")
    monkeypatch.setattr(ei.urllib.request, "urlopen", no_network)
    for name, fails in (("gsm8k", no_network), ("tabmwp", no_network), ("esnli", no_script)):
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fails))
        code, _, err = run_ei("--teacher", "http://x", "--data", name, "--dry-run")
        assert code == 2 and "network" in err and err.count("\n") == 1
