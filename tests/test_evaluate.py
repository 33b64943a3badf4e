"""evaluate.py: its statistics against brute force, its files, its errors, and its curves."""
import itertools
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import exgrpo
import reward
from tiny import tiny_model_folder

HERE = os.path.dirname(os.path.abspath(__file__))
PROBES = os.path.join(HERE, "data", "probes.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    kinds = ("llama", "qwen2", "gemma", "gpt2")
    return {kind: tiny_model_folder(kind, folder / kind) for kind in kinds}


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def question(id, answer="4", **other):
    return {"id": id, "question": f"How many, {id}?", "answer": answer, "answer_type": "number",
            "rationale": ""} | other


def row(id, rule=None, right=True, answer="4", said="4", kind="number", data="d"):
    """A graded row, as report() and consistency() want it."""
    return {"data": data, "id": id + (f"/{rule}" if rule else ""), "source": id, "rule": rule,
            "question": id, "answer": answer, "answer_type": kind, "output": "", "truncated": False,
            "tokens": 3, "samples": [], "samples_correct": 0, "extracted": said, "correct": right}


# ------------------------------------------------------------------------------------- statistics

def test_wilson_limits_are_where_the_score_test_turns():
    """p is inside if and only if |share - p| <= z sqrt(p (1 - p) / n): looked up on a fine grid."""
    for right, n in ((0, 10), (1, 20), (5, 10), (37, 100), (299, 300), (12, 12)):
        low, high = reward.wilson(right, n)
        p = np.linspace(0, 1, 200_001)
        inside = p[np.abs(right / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n) + 1e-12]
        assert (low, high) == pytest.approx((inside.min(), inside.max()), abs=1e-5)
    assert reward.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)     # z^2 / (n + z^2)


def test_mcnemar_counts_the_throws_of_a_fair_coin():
    for a, b in itertools.product(range(6), repeat=2):
        heads = [sum(throws) for throws in itertools.product((0, 1), repeat=a + b)]
        as_uneven = sum(abs(2 * h - (a + b)) >= abs(a - b) for h in heads)
        assert evaluate.mcnemar(a, b) == pytest.approx(as_uneven / len(heads))
    assert evaluate.mcnemar(1, 9) == 22 / 1024
    assert 0 < evaluate.mcnemar(700, 800) < 0.02                      # 2 ** 1500 is no float


def test_bootstrap_against_all_resamples():
    """Five questions with 1, 1, 2, 3 and 2 probes: every one of the 5^5 ways to draw them again."""
    questions = [[0.3], [-1.7], [2.9, 0.4], [0.8, 1.1, -0.6], [0.2, 3.3]]
    every = [np.mean(sum(drawn, [])) for drawn in itertools.product(questions, repeat=5)]
    values = sum(questions, [])
    low, high = evaluate.bootstrap(values, list("abccdddee"), draws=40_000)
    assert (low, high) == pytest.approx(np.quantile(every, (0.025, 0.975)), abs=0.02)


def test_bootstrap_draws_questions_not_probes():
    """Ten copies of each verdict say no more than one; drawn apart, they look 3 times as sure."""
    values, names = [1, 0] * 10, [str(i) for i in range(20)]
    assert evaluate.bootstrap(values * 10, names * 10) == evaluate.bootstrap(values, names)
    group = [row(id, f"R{n}", right=id == "a") for id in "ab" for n in range(1, 9)]
    difference = evaluate.paired(group, [probe | {"correct": False} for probe in group], seed=0)
    assert (difference["difference_low"], difference["difference_high"]) == (0, 1)
    assert difference["difference"] == 0.5 and difference["p"] == 2 / 2 ** 8


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, right in itertools.product((1, 4, 6), (0, 1, 3, 4, 6)):
        verdicts = [i < right for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(verdicts, k))
            assert evaluate.pass_at_k(n, min(right, n), k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets))


# ---------------------------------------------------------------------------------------- figures

def test_consistency_wants_answers_that_fit_each_other():
    six = {"answer": "6", "said": "6"}
    rows = [row("a"), row("a", "R8"), row("a", "R1", **six),                  # both fit
            row("b", right=False, said="6"), row("b", "R8"),                  # right one way only
            row("b", "R1", **six),                                            # not moved: it was 6
            row("c", right=False, said=None), row("c", "R8", right=False),
            row("c", "R1", **six),                                            # moved from nothing
            row("d"), row("d", "R1"),                                         # gold and answer stay
            row("e"), row("e", "R1", answer="6", said="5", right=False),      # moved wrongly
            row("f"), row("f", "R1", answer="yes", said="yes", kind="yesno"), # cannot be compared
            row("g", answer="B", said="B", kind="choice"),                    # nor can letters:
            row("g", "R1", answer="B", said="B", kind="choice"),              # of other options
            row("z", "R1")]                                                   # has no question
    reverse, counterfactual = evaluate.consistency(rows)
    assert [pair["correct"] for pair in reverse] == [True, False, False]
    assert [(pair["source"], pair["correct"]) for pair in counterfactual] == [
        ("a", True), ("b", False), ("c", False), ("d", True), ("e", False)]


def test_report_by_hand():
    rows = [row("a"), row("a", "R10"), row("a", "R2", right=False),
            row("b", right=False, said=None), row("b", "R2"), row("c", data="other"),
            row("a", data="other")]  # asked in "d" already: counts once among all questions
    rows[3]["truncated"], rows[3]["tokens"] = True, 9
    baseline = [one | {"correct": one["id"] == "b/R2"} for one in reversed(rows)]    # in any order
    results = {result["figure"]: result for result in evaluate.report(rows, baseline)}
    assert {name: (r["right"], r["n"], r["baseline"]) for name, r in results.items()} == {
        "d": (1, 2, 0), "d, EI-Test": (2, 3, 1 / 3), "d, EI-Test R2": (1, 2, 1 / 2),
        "d, EI-Test R10": (1, 1, 0), "other": (2, 2, 0), "all questions": (2, 3, 0)}
    assert list(results)[2:4] == ["d, EI-Test R2", "d, EI-Test R10"]
    assert results["d, EI-Test R2"]["only_model"] == results["d, EI-Test R2"]["only_baseline"] == 0
    d = results["d"]
    assert (d["unparsed"], d["truncated"], d["tokens"]) == (0.5, 0.5, 6)
    assert (d["only_model"], d["only_baseline"], d["p"], d["difference"]) == (1, 0, 1, 0.5)
    assert results["all questions"]["p"] == 0.5


def test_markdown_leaves_out_what_nobody_asked_for():
    lines = evaluate.markdown(evaluate.report([row("a"), row("a", "R8")])).splitlines()
    assert "baseline" not in lines[0] and "pass@" not in lines[0]
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    samples = [{"output": text, "truncated": text == "z"} for text in "xyz"]
    sampled = [row("a") | {"samples": samples, "samples_correct": 1}]
    result, = evaluate.report(sampled)
    header = evaluate.markdown([result]).splitlines()[0]
    assert "pass@2" in header and "samples truncated" in header
    assert (result["pass@2"], result["samples_truncated"]) == pytest.approx((2 / 3, 1 / 3))


# ------------------------------------------------------------------------------ from model to files

def ask(model, data, out, *flags):
    """One call of evaluate.py -> the rows of its outputs.jsonl, below the header."""
    evaluate.main(["--model", model, "--data", data, "--out", str(out), "--device", "cpu", *flags])
    return rows_of(out / "outputs.jsonl")[1:]


def test_same_answers_for_every_batch_size(models, tmp_path):
    """STYLE D27: greedy answers that change with the batch were padded or positioned wrongly; GPT-2
    with its learned positions is the one to notice."""
    for kind, folder in models.items():
        one, two, every = (ask(folder, PROBES, tmp_path / f"{kind}{size}", "--limit", "1",
                               "--max-new-tokens", "10", "--batch-size", size)
                           for size in ("1", "2", "64"))
        assert one == two == every and len(one) > 5


def scripted(monkeypatch, replies):
    """From now on a model gives these (text, truncated, tokens), one after the other."""
    replies = iter(replies)
    monkeypatch.setattr(exgrpo, "generate", lambda model, chat, prompts, *, max_new_tokens: [
        next(replies) for _ in prompts])


def test_stored_outputs_give_the_same_figures_without_a_model(models, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "easy.jsonl", [question(f"q{i}", str(i)) for i in range(8)])
    said = [(f"The answer is {i % 3}.\u2028 ok", i == 7, 5 + i) for i in range(8)]  # 3 of 8 right
    base = [(f"The answer is {i % 5}.", False, 5) for i in range(7)] + [("Who knows?", False, 2)]
    scripted(monkeypatch, said + base)
    out = tmp_path / "out"
    first, *_ = ask(models["llama"], data, out, "--baseline", models["llama"], "--batch-size", "3")
    monkeypatch.setattr(exgrpo, "load_model", lambda *_: pytest.fail("a model was loaded"))
    evaluate.main(["--compare", str(out / "outputs.jsonl"), str(out / "baseline.jsonl"),
                   "--out", str(tmp_path / "again")])
    for name in ("results.json", "results.md"):
        assert (out / name).read_text() == (tmp_path / "again" / name).read_text()
    [result] = json.loads((out / "results.json").read_text())
    assert (result["right"], result["n"]) == (3, 8)
    assert (result["truncated"], result["tokens"]) == (1 / 8, 8.5)
    assert result["unparsed"] == 1 / 8  # a reply that was cut states nothing
    assert (result["only_model"], result["only_baseline"], result["p"]) == (0, 2, 0.5)
    header = rows_of(out / "outputs.jsonl")[0]["evaluate"]
    assert header["data"] == [data] and header["batch_size"] == 3
    assert (first["output"], first["extracted"], first["question"]) == (
        said[0][0], "0", "How many, q0?")
    assert "37.5%" in (out / "results.md").read_text()


def test_samples_stay_with_their_question(models, tmp_path, monkeypatch):
    """micro_batches puts the longest prompts first; replies must find their way back."""
    def echo(model, prompts, *, group_size=1, **_):
        return [prompt for prompt in prompts for _ in range(group_size)], None, None

    monkeypatch.setattr(exgrpo, "check_model", lambda model: None)  # it samples, too

    monkeypatch.setattr(exgrpo, "sample", echo)
    for answer in ask(models["llama"], PROBES, tmp_path / "out", "--limit", "2", "--samples", "3"):
        assert len(answer["samples"]) == 3
        assert all(answer["question"] in sample["output"] for sample in answer["samples"])


def test_a_truncated_sample_states_nothing(models, tmp_path, monkeypatch):
    """The answer 12, cut out of 1225, was paid in pass@k: greedy replies alone were looked at."""
    data = write_jsonl(tmp_path / "one.jsonl", [question("q", "12")])
    _, chat = exgrpo.load_model(models["llama"], "cpu")
    whole, cut = chat.reply("The answer is 12."), chat.encode("The answer is 12")
    monkeypatch.setattr(exgrpo, "check_model", lambda model: None)  # it samples, too
    monkeypatch.setattr(exgrpo, "sample", lambda *_, **__: ([whole, cut], None, None))
    scripted(monkeypatch, [("The answer is 12.", False, 5)])
    answer, = ask(models["llama"], data, tmp_path / "out", "--samples", "2")
    assert answer["samples"] == [{"output": "The answer is 12.", "truncated": False},
                                 {"output": "The answer is 12", "truncated": True}]
    assert answer["samples_correct"] == 1
    [result] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result["pass@1"], result["pass@2"], result["samples_truncated"]) == (0.5, 1, 0.5)
    stored = str(tmp_path / "out" / "outputs.jsonl")
    [again] = evaluate.report(evaluate.read_outputs(stored))
    assert again == result


def test_samples_follow_the_seed(models, tmp_path):
    def samples(name, seed):
        rows = ask(models["llama"], PROBES, tmp_path / name, "--limit", "1", "--samples", "4",
                   "--max-new-tokens", "8", "--seed", seed)
        return [[sample["output"] for sample in one["samples"]] for one in rows]

    first = samples("a", "5")
    assert first == samples("b", "5") != samples("c", "6")
    assert len(set(first[0])) == 4
    assert "pass@4" in json.loads((tmp_path / "a" / "results.json").read_text())[0]


def test_only_consistent_probes_are_asked(tmp_path):
    probe = {"probe": "And then?", "rationale": "", "answer": "5", "answer_type": "number"}
    probes = [probe | {"rule": "R1", "consistent": True},
              probe | {"rule": "R2", "consistent": False}]
    data = write_jsonl(tmp_path / "p.jsonl", [{"ei": {}}, question("q", kept=False, probes=probes)])
    items = evaluate.load_items([data], "test", None)
    assert [(item["data"], item["id"], item["source"], item["rule"]) for item in items] == [
        ("p", "q", "q", None), ("p", "q/R1", "q", "R1")]
    assert items[1]["question"] == "And then?" and items[1]["answer"] == "5"


def test_answers_before_a_crash_are_kept(models, tmp_path, monkeypatch):
    """Each batch is on disk before the next is asked, and nothing writes over it."""
    data = write_jsonl(tmp_path / "easy.jsonl", [question(f"q{i}") for i in range(6)])
    outputs, lines = tmp_path / "out" / "outputs.jsonl", []

    def generate(model, chat, prompts, **_):
        lines.append(outputs.read_text().count("\n"))
        if len(lines) == 3:
            raise RuntimeError("out of memory")
        return [("The answer is 4.", False, 5)] * len(prompts)

    monkeypatch.setattr(exgrpo, "generate", generate)
    with pytest.raises(RuntimeError):
        ask(models["llama"], data, tmp_path / "out", "--batch-size", "2")
    before = outputs.read_text()
    assert lines == [1, 3, 5] and before.count("\n") == 5
    with pytest.raises(exgrpo.UserError, match="exists already"):
        ask(models["llama"], data, tmp_path / "out", "--batch-size", "2")
    assert outputs.read_text() == before


def test_outputs_are_read_again_whatever_their_gold(tmp_path):
    """A probe's own answer is not checked when it is asked, so --compare must not refuse it."""
    path = write_jsonl(tmp_path / "o.jsonl", [{"evaluate": {}}, row("a", rule="R1", answer="five")])
    assert [answer["correct"] for answer in evaluate.read_outputs(path)] == [False]


# --------------------------------------------------------------------------------------- bad input

@pytest.fixture
def bad(tmp_path, models):
    """A folder of everything that can be wrong."""
    write_jsonl(tmp_path / "good.jsonl", [question("a"), question("b")])
    (tmp_path / "torn.jsonl").write_text(json.dumps(question("a")) + '\n{"id": "b", "que')
    (tmp_path / "empty.jsonl").write_text("")
    write_jsonl(tmp_path / "twice.jsonl", [question("a"), question("a")])
    write_jsonl(tmp_path / "type.jsonl", [question("a", answer_type="essay")])
    write_jsonl(tmp_path / "long.jsonl", [question("a", question="word " * 3000)])
    probes = [{"rule": "R1", "probe": "How?", "answer": "4", "answer_type": "number",
               "rationale": "", "consistent": True}] * 2
    write_jsonl(tmp_path / "two.jsonl", [{"ei": {}}, question("a", kept=True, probes=probes)])
    (tmp_path / "other").mkdir()
    write_jsonl(tmp_path / "other" / "good.jsonl", [question("a")])
    header, answers = {"evaluate": {}}, [row("a"), row("b")]
    write_jsonl(tmp_path / "A.jsonl", [header, *answers])
    write_jsonl(tmp_path / "fewer.jsonl", [header, answers[0]])
    write_jsonl(tmp_path / "other_gold.jsonl", [header, answers[0], answers[1] | {"answer": "5"}])
    write_jsonl(tmp_path / "no_output.jsonl", [header, answers[0] | {"output": None}])
    write_jsonl(tmp_path / "samples.jsonl", [header, answers[0] | {"samples": [1]}])
    write_jsonl(tmp_path / "sample.jsonl", [header, answers[0] | {"samples": [{"output": 1}]}])
    write_jsonl(tmp_path / "no_answers.jsonl", [header])
    (tmp_path / "cut.jsonl").write_text(json.dumps(header) + "\n" + json.dumps(answers[0])[:40])
    for name, text in (("no_kl", "step,reward\n1,0.5\n"), ("no_step", ",".join(METRICS) + "\n"),
                       ("begun", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "outputs.jsonl").write_text("precious")
    return tmp_path


METRICS = ["step", "reward", "acc_full", "acc_partial", "bonus_share", "kl", "reply_tokens",
           "adv_partial_correct"]


@pytest.mark.parametrize("command, says", [
    ("--data {}/nowhere.jsonl", "nowhere.jsonl"),
    ("--data {}/torn.jsonl", "torn.jsonl:2: not JSON"),
    ("--data {}/empty.jsonl", "no question in it"),
    ("--data {}/twice.jsonl", "twice.jsonl:2"),
    ("--data {}/type.jsonl", 'type.jsonl:1: unknown answer_type "essay"'),
    ("--data {}/good.jsonl {}/other/good.jsonl", "two files are called good"),
    ("--data {}/two.jsonl", "two: a/R1 occurs twice"),
    ("--data no-such-set", "no-such-set"),
    ("--data {}/long.jsonl --model GPT2", "the prompt of a has"),
    ("--data {}/good.jsonl --model {}/nowhere", "nowhere"),
    ("--data {}/good.jsonl --model GPT2 --out {}/full", "exists already"),
    ("--samples -1", "--samples"),
    ("--compare {}/A.jsonl {}/fewer.jsonl", "d: b is not the same in both"),
    ("--compare {}/fewer.jsonl {}/A.jsonl", "d: b is not the same in both"),
    ("--compare {}/A.jsonl {}/other_gold.jsonl", "d: b is not the same in both"),
    ("--compare {}/A.jsonl {}/good.jsonl", "good.jsonl:1: evaluate.py did not write this"),
    ("--compare {}/A.jsonl {}/no_output.jsonl", 'no_output.jsonl:2: "output"'),
    ("--compare {}/A.jsonl {}/samples.jsonl", 'samples.jsonl:2: "samples"'),
    ("--compare {}/A.jsonl {}/sample.jsonl", 'sample.jsonl:2: "samples"'),
    ("--compare {}/A.jsonl {}/no_answers.jsonl", "no answer in it"),
    ("--compare {}/A.jsonl {}/cut.jsonl", "cut.jsonl:2: not JSON"),
    ("--compare {}/A.jsonl {}/nowhere.jsonl", "nowhere.jsonl"),
    ("--compare {}/A.jsonl {}/A.jsonl --curves {}", "not allowed with argument --compare"),
    ("--curves {}/full", "full/metrics.csv"),
    ("--curves {}/no_kl", "no_kl/metrics.csv is not as this version of exgrpo.py writes it: "
                          "KeyError('acc_full')"),
    ("--curves {}/no_step", "no step in it yet"),
    ("--curves {}/begun", "no step in it yet"),
])
def test_bad_input_is_one_line_and_exit_code_2(command, says, bad, models, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace())  # found, but nothing is drawn
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=None))
    argv = command.replace("{}", str(bad)).replace("GPT2", models["gpt2"]).split()
    argv = ["--model", models["llama"], "--out", str(bad / "new"), *argv]      # later flags win
    with pytest.raises(SystemExit) as exit:
        exgrpo.run(lambda: evaluate.main([*argv, "--device", "cpu"]))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (bad / "new").exists() and (bad / "full" / "outputs.jsonl").read_text() == "precious"


def test_outputs_without_a_name_go_to_the_first_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in ("1", "2"):
        answers = write_jsonl(tmp_path / "A.jsonl", [{"evaluate": {}}, row("a")])
        evaluate.main(["--compare", answers, answers])
        assert sorted(os.listdir(tmp_path / "evals" / n)) == ["results.json", "results.md"]


# ----------------------------------------------------------------------------------------- curves

def fake_run(folder, seed, steps, **settings):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"seed": seed, **settings}))
    lines = [",".join(METRICS)]
    for step in range(1, steps + 1):
        advantage = "nan" if step % 2 else 0.3
        lines.append(f"{step},{seed + step},0.5,0.25,nan,{0.001 * step},40,{advantage}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def curve(runs, name):
    """What is drawn for these seeds: steps, mean, lowest and highest."""
    return evaluate.band([evaluate.read_metrics(run)[name] for run in runs])


def test_runs_of_one_setting_make_a_band(tmp_path):
    runs = [fake_run(tmp_path / "a0", 0, 60, delta=1), fake_run(tmp_path / "b0", 0, 4, delta=0),
            fake_run(tmp_path / "a1", 1, 50, delta=1)]
    a0, b0, a1 = runs
    assert evaluate.seeds_together(runs) == {f"{a0}, n = 2": [a0, a1], f"{b0}, n = 1": [b0]}
    steps, middle, low, high = curve([a0, a1], "reward")                       # a window of 50 / 25
    assert steps == list(range(2, 51))
    assert low == pytest.approx(np.array(steps) - 0.5)
    assert high == pytest.approx(np.array(steps) + 0.5) and middle == pytest.approx(steps)
    steps, middle, _, _ = curve([a0, a1], "adv_partial_correct")
    assert middle == pytest.approx([0.3] * 49)                                  # nan is passed over
    assert np.isnan(curve([b0], "bonus_share")[1]).all()


def test_a_band_joins_what_was_measured_at_the_same_steps():
    one, two = ([0, 20, 40, 60], [1, 2, 3, 4]), ([0, 40, 80], [5, 6, 7])
    steps, middle, low, high = evaluate.band([one, two])
    assert (steps, list(low), list(middle), list(high)) == ([0, 40], [1, 3], [3, 4.5], [5, 6])


def test_each_seeds_own_warm_up_is_one_setting_and_equal_names_are_told_apart(tmp_path):
    """tests/ablation.py starts seed 1 from SFT-1; and two folders called "run" are two lines."""
    for name in "abc":
        (tmp_path / name).mkdir()
    runs = [fake_run(tmp_path / "a" / "run", 0, 2, student="SFT-0"),
            fake_run(tmp_path / "b" / "run", 1, 2, student="SFT-1"),
            fake_run(tmp_path / "c" / "run", 1, 2, student="SFT-0")]
    assert evaluate.seeds_together(runs) == {f"{runs[0]}, n = 2": runs[:2],
                                             f"{runs[2]}, n = 1": runs[2:]}


def test_a_run_of_one_step_and_without_settings_can_be_drawn(tmp_path):
    run = fake_run(tmp_path / "one", 3, 1)
    os.remove(tmp_path / "one" / "run.json")
    assert evaluate.seeds_together([run]) == {f"{run}, n = 1": [run]}
    assert [list(values) for values in curve([run], "reward")] == [[1], [4], [4], [4]]


def add_eval(run, table):
    with open(os.path.join(run, "eval.json"), "w") as file:
        json.dump(table, file)
    return run


def test_accuracies_over_the_steps_are_those_of_eval_json(tmp_path):
    """From two steps on, in the order of steps; the student is a level line."""
    run, steps = fake_run(tmp_path / "a", 0, 3), [0, 9, 80]
    assert evaluate.read_accuracies(run) == {}
    table = {"student": {"test": "0001", "end": "0000"}, "after SFT": {"test": "0011"},
             "after step 80": {"test": "1111", "end": "0001"}, "after step 9": {"test": "0111"}}
    assert evaluate.read_accuracies(add_eval(run, table)) == {
        "test": (steps, [0.5, 0.75, 1]), "test, student": (steps, [0.25] * 3)}
    del table["student"]
    found, shares = evaluate.read_accuracies(add_eval(run, table))["test, student"]
    assert found == steps and np.isnan(shares).all()


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="curves need matplotlib: pip install matplotlib")
    runs = [fake_run(tmp_path / name, seed, 30) for seed, name in enumerate("ab")]
    evaluate.main(["--curves", *runs, "--out", str(tmp_path / "out")])
    picture = (tmp_path / "out" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    with pytest.raises(exgrpo.UserError, match="exists already"):
        evaluate.main(["--curves", *runs, "--out", str(tmp_path / "out")])


def test_accuracies_are_a_seventh_panel(tmp_path, monkeypatch):
    """A line for each file and setting, dashed for the student; runs without it still draw."""
    figures = pytest.importorskip("matplotlib.figure", reason="pip install matplotlib")
    drawn, draw = [], figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig",
                        lambda self, *args, **more: drawn.append(self) or draw(self, *args, **more))
    runs = [fake_run(tmp_path / f"a{seed}", seed, 30, delta=1) for seed in (0, 1)]
    runs += [fake_run(tmp_path / "b", 0, 30, delta=0), fake_run(tmp_path / "c", 0, 30, delta=2)]
    table = {"student": {"test": "0001", "more": "0000"}, "after SFT": {"test": "0011"},
             "after step 20": {"test": "0111", "more": "1000"},
             "after step 30": {"test": "1111", "more": "1100"}}
    add_eval(runs[0], table)
    add_eval(runs[1], {label: {file: "0011" for file in found} for label, found in table.items()})
    add_eval(runs[2], {label: {"test": found["test"]} for label, found in table.items()})
    evaluate.main(["--curves", *runs, "--out", str(tmp_path / "1")])
    evaluate.main(["--curves", runs[3], "--out", str(tmp_path / "2")])
    assert [len(figure.axes) for figure in drawn] == [7, 6]
    axes, = (axes for axes in drawn[0].axes if axes.get_title() == "accuracy")
    lines = [(line.get_color(), line.get_marker(), line.get_linestyle(), list(line.get_xdata()),
              list(line.get_ydata())) for line in axes.lines]
    every, two = [0, 20, 30], [20, 30]
    assert lines == [
        ("C0", "o", "-", every, [0.5, 0.625, 0.75]), ("C0", "o", "--", every, [0.375] * 3),
        ("C0", "s", "-", two, [0.375, 0.5]), ("C0", "s", "--", two, [0.25] * 2),
        ("C1", "o", "-", every, [0.5, 0.75, 1]), ("C1", "o", "--", every, [0.25] * 3)]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "test", "test, student", "more", "more, student"]


def test_curves_without_matplotlib_say_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(exgrpo.UserError, match="pip install matplotlib"):
        evaluate.main(["--curves", fake_run(tmp_path / "a", 0, 3), "--out", str(tmp_path / "out")])
