"""The toy world: its problems are right, its tests held out, its student cursed, and it learns."""
import argparse
import os
import re
import sys

import numpy as np
import pytest
import torch

import ablation
import ei
import exgrpo
import reward
import toy_solver

TOY = os.path.join(exgrpo.HERE, "toy")
sys.path.insert(0, TOY)
import make  # noqa: E402
import world  # noqa: E402


def rows(name):
    return [row for _, row in exgrpo.read_jsonl(os.path.join(TOY, name)) if "ei" not in row]


def numbers(text):
    return re.findall(r"\d+", text)


def test_the_data_is_what_make_py_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "TOY", str(tmp_path))
    make.write_data()
    for name in ("train.jsonl", "test.jsonl", "test_reversed.jsonl", "ei_test.jsonl",
                 "val.jsonl", "val_reversed.jsonl", "ei_val.jsonl"):
        with open(os.path.join(TOY, name), "rb") as file:
            assert file.read() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize("rule", ei.RULES)
def test_what_the_oracle_says_is_right_and_readable(rule):
    """Every sum in a rationale holds, its end gives the answer away, and ei.py can read the
    probe. R2 and R7 once ended before the comparison, and their answers were coin flips."""
    rng, ends = np.random.default_rng(3), {"right.": "yes", "agree.": "yes", "wrong.": "no",
                                           "differ.": "no"}
    for _ in range(200):
        told = world.ORACLE[rule](world.draw(rng, world.NAMES))
        if told is None:
            continue
        row = make.item(told)
        for v, op, n, w in re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", row["rationale"]):
            assert world.APPLY[op](int(v), int(n)) == int(w)
        if row["answer_type"] == "number":
            assert numbers(row["rationale"])[-1] == row["answer"]
        elif row["answer_type"] == "yesno":
            assert ends[row["rationale"].split()[-1]] == row["answer"]
        else:
            assert row["rationale"].endswith(f" That is ({row['answer']}).")
        example = ei.Example(row["question"], row["rationale"], row["answer_type"], row["answer"])
        assert ei.parse_reply(ei.REPLY.format(example))["answer"] == row["answer"]


def test_a_story_told_backwards_leads_back():
    rng = np.random.default_rng(4)
    for _ in range(300):
        problem = world.draw(rng, world.NAMES)
        question, _, _, answer = problem.backward()
        assert problem._replace(start=answer).result() == problem.result()
        if problem.events[0][0] != "buys":
            assert "some" in question.split(".")[0]


def test_train_and_test_share_no_problem():
    """Neither a pair of first numbers nor a name, and no training question joins the events of a
    held-out family, as toy/make.py says."""
    rng = np.random.default_rng(2)
    train = make.problems(rng, 480, world.NAMES, test=False)
    test = make.problems(rng, 600, world.TEST_NAMES, test=True)
    for problems, name in ((train, "train.jsonl"), (test, "test.jsonl")):
        assert [p.forward()[0] for p in problems] == [row["question"] for row in rows(name)]
    train_pairs, test_pairs = ({(p.start, p.events[0][1]) for p in problems}
                               for problems in (train, test))
    assert not train_pairs & test_pairs
    everything = " ".join(row["question"] for row in rows("train.jsonl")) + " ".join(
        probe["probe"] for row in rows("probes.jsonl") for probe in row["probes"])
    assert not [name for name in world.TEST_NAMES if re.search(rf"\b{name}\b", everything)]
    for row in rows("probes.jsonl"):  # nor do their probes tell a story with such a pair
        for probe in row["probes"]:
            told = re.search(r"has (\d+) \w+\. \w+ (?:\w+|shares all \w+ equally among) (\d+)|"
                             r"buys (?P<n>\d+) bags with (?P<v>\d+)", probe["probe"])
            pair = told and (told["v"] or told[1], told["n"] or told[2])
            assert not pair or (int(pair[0]), int(pair[1])) not in test_pairs, probe["probe"]
    held_out = [[tuple(event for event, _ in p.events) in world.HELD_OUT for p in problems]
                for problems in (train, test)]
    assert sum(held_out[0]) == 0 and sum(held_out[1]) >= 50
    assert min(len(test), len(rows("test_reversed.jsonl"))) >= 500
    assert sum(len(row["probes"]) for row in rows("ei_test.jsonl")) >= 500


def test_validation_problems_are_new_and_as_hard_as_those_of_test():
    """No question of val is in train or test. Names, first numbers and numbers of events are drawn
    as those of test are."""
    names = ("val.jsonl", "val_reversed.jsonl", "test.jsonl", "test_reversed.jsonl", "train.jsonl")
    val, val_reversed, *others = ({row["question"] for row in rows(name)} for name in names)
    assert len(val) == len(val_reversed) == 300
    assert not (val | val_reversed) & set().union(*others)
    rng = np.random.default_rng(2)
    make.problems(rng, 480, world.NAMES, test=False)
    test = make.problems(rng, 600, world.TEST_NAMES, test=True)
    problems = make.problems(rng, 300, world.TEST_NAMES, test=True, others=test)
    assert [p.forward()[0] for p in problems] == [row["question"] for row in rows("val.jsonl")]
    assert all(world.TEST_PAIRS[p.start, p.events[0][1]] for p in problems)
    assert {p.A for p in problems} | {p.B for p in problems} == set(world.TEST_NAMES)
    two = [np.mean([len(p.events) == 2 for p in some]) for some in (test, problems)]
    assert abs(two[0] - two[1]) < 0.1
    assert sum(len(row["probes"]) for row in rows("ei_val.jsonl")) >= 300


@pytest.mark.parametrize("name", ["ei_test.jsonl", "ei_val.jsonl"])
def test_the_solver_agrees_with_the_oracle(name):
    found = [toy_solver.is_gold_right(p) for row in rows(name) for p in row["probes"]]
    assert np.mean([mark is not None for mark in found]) >= 0.95
    assert False not in found


def test_the_solver_finds_wrong_answers():
    """Made by hand: a wrong gold, a right one, a story that cannot happen, and what says nothing
    that the solver knows."""
    leo = "Leo has 15 shells. Leo loses 2 shells. Leo finds 6 shells. "
    why = ("Leo has 15 shells. Leo loses 2 shells. Why does one {} 2?\n(A) Leo now also has what "
           "Leo finds\n(B) Leo no longer has what Leo loses")
    who = ("Leo has 8 pens. Leo loses 2 pens. Ida has 8 pens. Ida finds 2 pens. Who has more pens "
           "now?\n(A) Leo\n(B) Ida")
    for probe, answer, right in (
            (leo + "Somebody says that Leo now has 19 shells. Can that be right?", "no", False),
            (leo + "Somebody says that Leo now has 19 shells. Can that be right?", "yes", True),
            (leo + "Somebody says that Leo now has 18 shells. Can that be right?", "yes", False),
            (leo + "Somebody objects that one must add 2. Is the objection right?", "yes", False),
            (leo + "Somebody objects that one must add 6. Is the objection right?", "yes", True),
            (leo + "How many shells does Leo have now?", "18", False),
            (leo + "How many shells does Leo have after the first 1?", "14", None),
            ("Leo has 15 shells. Leo loses 2 shells. How many shells does Leo have after the "
             "first 1?", "15", False),
            (why.format("subtract"), "B", True), (why.format("subtract"), "A", False),
            (why.format("add"), "A", False), (who, "B", True), (who, "A", False),
            ("Leo has some shells. Leo loses 2 shells. Now Leo has 6 shells. How many shells did "
             "Leo have at first?", "4", False),
            ("Leo buys 3 bags with some nuts in each. Now Leo has 6 nuts. How many nuts are in "
             "each bag?", "2", True),
            ("Leo buys 3 bags with 4 nuts in each. How many nuts does one more bag add?", "3",
             False),
            ("Leo has 3 shells. Leo loses 5 shells. How many shells does Leo have now?", "2",
             False),
            ("Leo has 3 shells. Leo finds 5 pens. How many shells does Leo have now?", "8", None),
            ("Leo has 3 shells. Ida finds 5 shells. How many shells does Leo have now?", "8", None),
            ("How many shells are there?", "8", None), ("What?", "8", None)):
        assert toy_solver.is_gold_right({"probe": probe, "answer": answer}) is right, probe


def test_the_solver_counts_what_each_filter_leaves(tmp_path, capsys):
    """Two wrong golds of four: Eq. 1 rejects one of them and one right probe."""
    def probe(answer, consistent):
        return {"rule": "R9", "probe": "Leo has 3 pens. Leo finds 1 pens. How many pens does Leo "
                "have now?", "answer": answer, "answer_type": "number", "rationale": "",
                "consistent": consistent, "student_correct": None}
    row = {"id": "1", "question": "What?", "answer": "1", "answer_type": "number", "kept": True,
           "rationale": "", "probes": [probe("4", True), probe("4", False), probe("5", True),
                                       probe("5", False)]}
    path = tmp_path / "d_ei.jsonl"
    path.write_bytes(b"".join(map(ei.dump, [{"ei": {}}, row])))
    toy_solver.table(toy_solver.count(str(path)))
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    assert line.split() == ["all", "4", "4", "50.0", "50.0", "50.0", "50.0", "50.0"]


def test_text_survives_the_tokenizer():
    """A word-level tokenizer that loses spaces would hide a line break from ei.parse_reply."""
    tokenizer = exgrpo.AutoTokenizer.from_pretrained(os.path.join(TOY, "student"))
    for row in rows("train.jsonl")[:50] + rows("test.jsonl")[:50]:
        ids = tokenizer(row["question"], add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == row["question"]
        assert tokenizer.unk_token_id not in ids
    assert tokenizer("DECLINE").input_ids not in ([], [tokenizer.unk_token_id])


def test_the_lessons_say_no_unknown_word():
    """A rule's name without the blank in front of it was no token, so a teacher could not tell the
    rules apart and learnt to guess."""
    model, chat = exgrpo.load_model(exgrpo.TOY_STUDENT, torch.device("cpu"))
    rng = np.random.default_rng(6)
    for lesson in (make.student_lesson, make.first_teacher_lesson, make.second_teacher_lesson):
        for _ in range(3):
            ids = {i for group in lesson(rng, chat) for dialogue in group for i in dialogue.ids}
            assert chat.tokenizer.unk_token_id not in ids


def test_a_prompt_read_once_has_the_gradient_of_the_trees():
    """shared_backward against exgrpo.sft_backward, on dialogues that begin alike."""
    model, chat = exgrpo.load_model(exgrpo.TOY_STUDENT, torch.device("cpu"))
    rng, gradients, losses = np.random.default_rng(7), [], []
    dialogues = [make.teacher_probe(rng, chat, "R8") for _ in range(4)]
    for backward in (make.shared_backward, lambda *args: exgrpo.sft_backward(
            *args[:2], argparse.Namespace(micro_batch_tokens=1200, bf16=False), args[2])):
        model.zero_grad()
        losses.append(backward(model, dialogues, 0.5))
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_sizes():
    total = sum(os.path.getsize(os.path.join(folder, name))
                for folder, _, names in os.walk(TOY) for name in names if "pycache" not in folder)
    assert total < 12e6
    for name, limit in (("student", 1e6), ("teacher", 5e6)):
        model, _ = exgrpo.load_model(os.path.join(TOY, name), torch.device("cpu"))
        assert model.num_parameters() < limit


def test_the_student_has_the_reversal_curse():
    model, chat = exgrpo.load_model(exgrpo.TOY_STUDENT, torch.device("cpu"))
    probes = [probe for row in rows("ei_test.jsonl") for probe in row["probes"]]
    def share_right(items):
        prompts = [chat.first(exgrpo.user_turn(item)) for item in items]
        replies = exgrpo.generate(model, chat, prompts, max_new_tokens=64)
        return np.mean([reward.is_correct(text, item["answer"], item["answer_type"])
                        for (text, _, _), item in zip(replies, items)])
    forward, backward, probed = map(
        share_right, (rows("test.jsonl"), rows("test_reversed.jsonl"), probes))
    assert 0.50 <= forward <= 0.85
    assert backward <= forward / 2
    assert backward < probed < forward


def test_the_filters_have_work():
    header, rules, _, verdicts = ei.count(os.path.join(TOY, "probes.jsonl"))
    assert (header["teacher"], header["student"]) == ("toy/teacher", "toy/student")
    assert verdicts["kept"] >= 300
    assert sum(rules[rule, "declined"] for rule in ei.RULES) > 100
    assert sum(rules[rule, "inconsistent"] for rule in ei.RULES) > 0
    assert verdicts["too easy"] + verdicts["too hard"] > 0


def test_the_ablation_runs_each_arm_once(tmp_path, monkeypatch, capsys):
    """Forward only: as many examples, none of them a probe; a second call starts no run."""
    header, kept = exgrpo.read_probes(os.path.join(TOY, "probes.jsonl"))
    kept = [row for row in kept if row["kept"]][:3]
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"".join(map(ei.dump, [{"ei": header}, *kept])))
    monkeypatch.setattr(sys, "argv", [
        "ablation.py", "--probes", str(few), "--seeds", "1", "--out", str(tmp_path / "a"),
        "--arms", "SFT, forward only", "SFT", "--sft-epochs", "1", "--eval-limit", "4"])
    ablation.main()
    assert "SFT, forward only" in capsys.readouterr().out
    _, plain = exgrpo.read_probes(tmp_path / "a" / "SFT-forward_only-0.jsonl")
    assert [len(row["probes"]) for row in plain] == [len(row["probes"]) for row in kept]
    assert all(probe["probe"] == row["question"] for row in plain for probe in row["probes"])
    monkeypatch.setattr(ablation.subprocess, "run", None)
    ablation.main()
    known = tmp_path / "known.jsonl"
    known.write_bytes(b"".join(p.read_bytes() for p in sorted((tmp_path / "a").glob("*.json"))))
    table = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--known", str(known)])
    sys.argv[sys.argv.index("--out") + 1] = str(tmp_path / "b")
    ablation.main()
    assert capsys.readouterr().out == table and os.listdir(tmp_path / "b") == []
    sys.argv[sys.argv.index("--out") + 1] = str(tmp_path / "a")
    sys.argv += ["--sft-lr", "1e-5"]  # what is known was run without it
    with pytest.raises(exgrpo.UserError, match="another command"):
        ablation.main()


def test_the_ablation_changes_the_data_as_it_says():
    """Each arm's D_EI: as many examples, a share of the questions, some rules."""
    _, data = exgrpo.read_probes(os.path.join(TOY, "probes.jsonl"))
    kept = [row for row in data if row["kept"]]
    tenth = ablation.part(0.1)(data, np.random.default_rng(0))
    assert len(tenth) == round(len(kept) / 10) and all(row in kept for row in tenth)
    for arm, rules in (("R8 alone", {"R8"}), ("all but R8", {*ei.RULES} - {"R8"})):
        changed = ablation.ARMS[arm][0](data, None)
        assert {p["rule"] for row in changed for p in row["probes"]} == rules


def test_the_paired_t_test_by_its_table():
    """t = 2.776 leaves 5 % in both tails of 4 degrees of freedom, 4.604 leaves 1 %."""
    assert ablation.two_sided(2.776445, 4) == pytest.approx(0.05, abs=1e-6)
    assert ablation.two_sided(4.604095, 4) == pytest.approx(0.01, abs=1e-6)
    mean, half, p = ablation.paired([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == pytest.approx((3.0, 2.776445 * (2.5 / 5) ** 0.5), abs=1e-5)
    assert p == pytest.approx(0.0132, abs=1e-4)
    assert ablation.paired([0.0, 0.0]) == (0.0, 0.0, 1.0)


def sampled_accuracy(folder, questions):
    """Share of right answers among 8 sampled replies to each question, at temperature 1."""
    model, chat = exgrpo.load_model(folder, torch.device("cpu"))
    prompts = [chat.first(exgrpo.user_turn(row)) for row in questions]
    replies, _, _ = exgrpo.sample(model, prompts, max_new_tokens=48, temperature=1.0, group_size=8,
                                  stop_ids=chat.stop_ids,
                                  generator=torch.Generator().manual_seed(0))
    return np.mean([reward.is_correct(chat.decode(ids), questions[i // 8]["answer"], "number")
                    for i, ids in enumerate(replies)])


def test_the_reward_rises(tmp_path, monkeypatch):
    """The only proof end to end: after 60 steps of plain GRPO, the student samples more right
    answers to the questions that it was trained on, 1,920 replies before and after."""
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [
        "exgrpo.py", "--sft-epochs", "0", "--turns", "0", "--steps", "60", "--lr", "1e-4",
        "--aux-weight", "0", "--questions-per-step", "8", "--max-new-tokens", "48",
        "--out", str(out), "--eval"])
    exgrpo.main()
    questions = [row for row in rows("probes.jsonl") if row["kept"]][:240]
    before = sampled_accuracy(exgrpo.TOY_STUDENT, questions)
    after = sampled_accuracy(str(out), questions)
    print(before, after)
    assert after > before + 0.03
