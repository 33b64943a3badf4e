"""ei.py with a local model as the teacher: batches of questions, and runs that are killed.

    python tests/test_ei_local.py FOLDER DATA OUT    # a run, 20 times killed by SIGKILL, then ended
"""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE)]

import ei
import exgrpo

QUESTIONS = os.path.join(HERE, "data", "questions.jsonl")


# ----------------------------------------------------------------------- what a batch has in common

@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2", "mistral", "gemma3"])
def test_what_prompts_begin_with_is_read_once_and_changes_no_reply(loaded, monkeypatch, kind):
    """Prompts of 300 common tokens, over many sliding windows: each reply is as by itself."""
    model, chat = loaded(kind)
    prompts = [chat.first("A long common beginning. " * 12 + end)
               for end in ("Why?", "", "How many hens?", "Why? Because of rain, or of snow")]
    prompts += [prompts[0], prompts[0][:-1]]  # the same one again, and a part of another
    alone = [exgrpo.generate(model, chat, [p], max_new_tokens=12)[0] for p in prompts]
    read, extend = [], exgrpo.extend
    monkeypatch.setattr(exgrpo, "extend", lambda model, cache, chunks: read.extend(
        map(len, chunks)) or extend(model, cache, chunks))
    assert exgrpo.generate(model, chat, prompts, max_new_tokens=12) == alone
    assert read[0] > 250 and sum(read) < sum(map(len, prompts)) / 3
    different = [chat.encode("Why?"), chat.encode("So?")]  # nothing in common
    read.clear()
    assert len(exgrpo.generate(model, chat, different, max_new_tokens=2)) == 2
    assert read == [len(ids) for ids in different]


# ------------------------------------------------------------------------------- batches and resume

class Neighbours:
    """A teacher whose every reply tells how many dialogues were asked beside it, and which."""
    batch, workers, about = 4, 1, "stub"

    def __init__(self, name, args):
        self.stop, self.counts = None, {}

    def __call__(self, dialogues):
        beside = " ".join(turns[-1][-40:] for turns in dialogues if len(turns) == 3)
        return [(f"PROBE: {i} of {hash_of(beside)}?\nREASONING: r.\nTYPE: yesno\nANSWER: yes", "")
                for i, _ in enumerate(dialogues)]


def hash_of(text):
    return ei.hashlib.sha256(text.encode()).hexdigest()


def test_a_resumed_batch_has_the_members_that_it_always_had(monkeypatch, capsys, tmp_path):
    """Whatever line a run was cut behind, the rest of its batch is asked beside the same rows."""
    monkeypatch.setattr(ei, "LocalModel", Neighbours)
    path = tmp_path / "p.jsonl"
    monkeypatch.setattr(sys, "argv", ["ei.py", "--teacher", "stub", "--data", QUESTIONS,
                                      "--limit", "10", "--out", str(path)])
    lines = []
    for cut in (0, 1, 2, 4, 5, 8, 9, 10, 11):  # lines that are left, with the header
        path.write_bytes(b"".join(lines[:cut]))
        with pytest.raises(SystemExit) as end:
            exgrpo.run(ei.main)
        assert not end.value.code, capsys.readouterr().err
        lines = lines or path.read_bytes().splitlines(True)
        assert path.read_bytes() == b"".join(lines) and len(lines) == 11
    probes = {row["id"]: row["probes"][0]["probe"].split()[2] for row in map(json.loads, lines[1:])}
    assert len(set(probes.values())) == 3, "10 questions in batches of 4 are three batches"


def test_twenty_kills_and_the_file_is_that_of_an_undisturbed_run(tiny, tmp_path):
    """A real model in a real process, dead at twenty random moments. This file is the script."""
    pytest.importorskip("fcntl")
    done = subprocess.run([sys.executable, __file__, tiny("llama"), QUESTIONS,
                           str(tmp_path / "p.jsonl")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, seen, same = done.stdout.split()[-3:]
    assert int(kills) == 20 and int(seen) > 4 and same == "True", done.stdout


def kill_and_resume(folder, data, path, rng=random.Random(0)):
    """Forks a run of ei.py 20 times, kills each; prints kills, sizes seen, and if the end equals.

    Every reply of the random model is taken for a probe, so that its words are in the file.
    """
    ei.parse_reply = lambda text: {"probe": text or "?", "rationale": text or "?",
                                   "answer": "1", "answer_type": "number"}
    ei.LocalModel.batch = 4

    def start(out):
        child = os.fork()
        if child:
            return child
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.argv = ["ei.py", "--teacher", folder, "--data", data, "--out", out, "--device", "cpu",
                    "--max-new-tokens", "8", "--rules", "R1", "--limit", "10"]
        try:
            exgrpo.run(ei.main)
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(9)

    begin = time.perf_counter()
    assert os.waitpid(start(path + ".whole"), 0)[1] == 0, "the undisturbed run failed"
    seconds, sizes, kills = time.perf_counter() - begin, set(), 0
    while kills < 20:
        child = start(path)
        time.sleep(seconds * rng.random())
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL  # 0: it had ended by itself
        sizes.add(os.path.getsize(path) if os.path.exists(path) else 0)
        with open(path, "ab") as file:  # a kill that tears a line is rare: tear it, and start anew
            whole = open(path + ".whole", "rb").read()
            file.truncate(rng.randrange(len(whole)) if os.path.getsize(path) == len(whole)
                          else os.path.getsize(path))
    assert os.waitpid(start(path), 0)[1] == 0, "the last run failed"
    print(kills, len(sizes), open(path, "rb").read() == open(path + ".whole", "rb").read())


if __name__ == "__main__":
    kill_and_resume(*sys.argv[1:])
