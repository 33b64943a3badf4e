"""ei.py with a local model as the teacher: batches of questions, and runs that are killed.

    python tests/test_ei_local.py FOLDER DATA OUT    # a run, 20 times killed by SIGKILL, then ended
"""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib

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
    read, prefill = [], exgrpo.prefill
    monkeypatch.setattr(exgrpo, "prefill", lambda model, cache, chunks: read.extend(
        map(len, chunks)) or prefill(model, cache, chunks))
    assert exgrpo.generate(model, chat, prompts, max_new_tokens=12) == alone
    assert read[0] > 250 and sum(read) < sum(map(len, prompts)) / 3
    different = [chat.encode("Why?"), chat.encode("So?")]  # nothing in common
    read.clear()
    assert len(exgrpo.generate(model, chat, different, max_new_tokens=2)) == 2
    assert read == [len(ids) for ids in different]


# ------------------------------------------------------------------------------- batches and resume

class Neighbours:
    """A teacher whose every reply tells how many dialogues were asked beside it, and which."""
    batch, align, about, chat = 4, 4, "stub", None

    def __init__(self, name, args):
        self.counts = {}

    def __call__(self, dialogues):
        mark = zlib.crc32(" ".join(turns[-1][-40:] for turns in dialogues
                                   if len(turns) == 3).encode())
        return [(f"PROBE: {i} of {mark}?\nREASONING: r.\nTYPE: yesno\nANSWER: yes", "")
                for i, _ in enumerate(dialogues)]


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
                           str(tmp_path / "p.jsonl")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, seen, same = done.stdout.split()[-3:]
    assert int(kills) == 20 and int(seen) > 4 and same == "True", done.stdout


def kill_and_resume(folder, data, path, rng=random.Random(0)):
    """Forks runs of ei.py until 20 were killed at work; prints kills, sizes seen, same end or not.

    Every reply of the random model is taken for a probe, so that its words are in the file.
    """
    from transformers import LlamaForCausalLM  # noqa: F401  imported once, not by each child
    ei.parse_reply = lambda text: {"probe": text or "?", "rationale": text or "?",
                                   "answer": "1", "answer_type": "number"}
    ei.LocalModel.batch = ei.LocalModel.align = 4
    write_probes = ei.write_probes

    def run(delay):
        """Forks a run that dies `delay` seconds after its first question -> its exit status."""
        def timed(*args):
            if delay is not None:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            begin = time.perf_counter()
            write_probes(*args)
            os.write(writes, str(time.perf_counter() - begin).encode())
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1]
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        ei.write_probes, sys.argv = timed, [
            "ei.py", "--teacher", folder, "--data", data, "--out", path, "--device", "cpu",
            "--max-new-tokens", "8", "--rules", "R1"]
        try:
            exgrpo.run(ei.main)
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(9)

    reads, writes = os.pipe()
    assert run(None) == 0, "the undisturbed run failed"
    seconds, whole = float(os.read(reads, 100)), open(path, "rb").read()
    os.remove(path)
    sizes, kills = set(), 0
    while kills < 20:
        status = run(seconds * rng.random())
        assert status in (0, signal.SIGKILL), "a resumed run failed"
        kills += status == signal.SIGKILL  # or it had ended before
        left = os.path.getsize(path)
        sizes.add(left)
        if left == len(whole):  # ended: goes on from a torn line
            os.truncate(path, rng.randrange(left))
    assert run(None) == 0, "the last run failed"
    print(kills, len(sizes), open(path, "rb").read() == whole)


if __name__ == "__main__":
    kill_and_resume(*sys.argv[1:])
