"""The READMEs say what is so: commands, flags, names, lengths, tables and code are checked."""
import ast
import glob
import os
import re
import shlex
import sys
import types

import pytest

import ablation
import bench
import ei
import evaluate
import exgrpo
import reward

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


PAGES = {page: read(page) for page in ("README.md", "toy/README.md", "tests/README.md")}
README = PAGES["README.md"]
SCRIPTS = {"ei.py": ei, "exgrpo.py": exgrpo, "evaluate.py": evaluate, "bench.py": bench}


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Lines of bash blocks, and `... script.py with flags` inside a sentence or a table."""
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:python )?[\w/]+\.py [^`]+)`", prose)
    return [" ".join(line.removeprefix("python ").split()) for line in lines
            if re.match(r"(python )?[\w/]+\.py\b", line)]


def parse(monkeypatch, folder, script, flags):
    """Runs the script's own parser on flags, and nothing else of it."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    if script in SCRIPTS:
        SCRIPTS[script].parse_args()
    elif script == "ablation.py":  # it hands what it does not know to exgrpo.py
        left = []
        monkeypatch.setattr(ablation, "run_all", lambda args: left.extend(args.others))
        monkeypatch.setattr(ablation, "print_tables", lambda args, found: None)
        monkeypatch.chdir(folder)  # it makes its --out
        ablation.main()
        parse(monkeypatch, folder, "exgrpo.py", left)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_parsed(monkeypatch, tmp_path, page):
    """DPO's README names an option that has no file, rasbt's names paths that are gone."""
    found = [shlex.split(command) for command in commands(PAGES[page])]
    assert len(found) >= 5
    for path, *flags in found:
        folder, script = os.path.split(path)
        assert any(os.path.exists(os.path.join(ROOT, place, script))
                   for place in ([folder] if folder else ["", "tests"])), f"{path} does not exist"
        parse(monkeypatch, tmp_path, script, flags)


def test_every_flag_and_name_exists(monkeypatch, capsys):
    """Flags that stand in a sentence without their script, and `module.name`."""
    for script in [*SCRIPTS, "ablation.py"]:
        with pytest.raises(SystemExit):
            parse(monkeypatch, ROOT, script, ["--help"])
    known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    for page, text in PAGES.items():
        spans = re.findall(r"`([^`\n]+)`", text)
        flags = {flag for span in spans if span.startswith("--")
                 for flag in re.findall(r"--[a-z0-9-]+", span)}
        assert flags <= known, f"{page}: {flags - known} is no flag"
        for module, name in re.findall(r"`(reward|ei|exgrpo|evaluate)\.(\w+)`", text):
            assert name == "py" or hasattr(sys.modules[module], name), f"{page}: {module}.{name}"


def test_links_lead_to_files():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^):]+)\)", text):
            assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), target)), target


def test_readme_is_short():
    """It once had 586 lines, most of them about figures: nobody read it to the end."""
    assert len(README.splitlines()) <= 260
    assert len(README.encode()) <= 22_000
    assert [line for line in README.splitlines() if len(line) > 120] == []


def test_ci_runs_the_laptop_commands():
    """They take minutes, so CI runs them behind the tests, as written."""
    section = README.split("## On a laptop")[1].split("\n## ")[0]
    wanted = blocks("bash", section)[0].splitlines()
    assert len(wanted) >= 3 and not set(wanted) - set(read(".ci", "run").splitlines())


def test_line_counts_are_those_of_the_files():
    rows = re.findall(r"^\| `([\w/]+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE)
    assert {"reward.py", "ei.py", "exgrpo.py", "evaluate.py"} <= set(dict(rows))
    for name, lines in rows:
        assert len(read(name).splitlines()) == int(lines), f"{name} has another number of lines"


def test_every_metric_is_explained():
    glossary = README.split("## What a run writes")[1].split("\n## ")[0]
    assert [name for name in exgrpo.METRICS if f"`{name}`" not in glossary] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as leaving:
        SCRIPTS[script].parse_args()
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for flag in re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE):
        assert re.search(rf"^  {flag}\b[^\n]*(\n +\S|  \S)", text,
                         re.MULTILINE), f"{flag} has no help"


def test_the_script_for_trl_gives_prompts_and_rewards(monkeypatch):
    """All of it but TRL and datasets, which are no packages of ours: they are played here."""
    script, = blocks("python", README)
    assert len(script.strip().splitlines()) <= 15
    calls = []

    class GRPOTrainer:
        def __init__(self, model, reward_function, config, data):
            calls.append((reward_function, data))

        def train(self):
            calls.append("trained")
    dataset = types.SimpleNamespace(from_list=list)
    for name, module in (("trl", {"GRPOConfig": dict, "GRPOTrainer": GRPOTrainer}),
                         ("datasets", {"Dataset": dataset})):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**module))
    monkeypatch.chdir(ROOT)
    exec(script.replace('GRPOConfig("runs/trl", ', "GRPOConfig("), {})
    (score, rows), end = calls
    assert end == "trained"
    _, questions = exgrpo.read_probes("toy/probes.jsonl")
    probes = [p for row in questions if row["kept"] for p in row["probes"] if p["consistent"]]
    assert len(rows) == len(probes) + sum(row["kept"] for row in questions)
    assert [{"role": "user", "content": exgrpo.user_turn(probes[0])}] in [r["prompt"] for r in rows]
    assert {row["answer_type"] for row in rows} == {p["answer_type"] for p in probes}
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    for say, paid in (("The answer is {}.", 1.0), ("{}", 0.0), ("The answer is not {}.", 0.0)):
        completions = [[{"role": "assistant", "content": say.format(row["answer"])}]
                       for row in rows]
        assert set(score(completions=completions, **columns)) == {paid}


def test_the_worked_diff_applies_and_changes_the_bonus():
    """`git apply` corrects the lines' numbers itself, but not their counts, and wants an unchanged
    line at either end; the first version of this diff lacked one."""
    name, n_before, n_after, hunk = re.fullmatch(
        r"--- a/(.*)\n\+\+\+ b/.*\n@@ -\d+,(\d+) \+\d+,(\d+) @@\n(.*)", *blocks("diff", README),
        re.DOTALL).groups()
    lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
    before, after = ([line[1:] for line in lines if line[0] in marks] for marks in (" -", " +"))
    assert (len(before), len(after)) == (int(n_before), int(n_after))
    assert lines[0][0] == lines[-1][0] == " "
    before, after = "".join(before), "".join(after)
    assert read(name).count(before) == 1
    changed = types.ModuleType("changed")
    exec(read(name).replace(before, after), vars(changed))
    outcomes = [1, 1, 1, 0], [1, 0, 0, 0]
    assert reward.dsu_bonus(*outcomes, 0.5, 1) == 0.5
    assert changed.dsu_bonus(*outcomes, 0.5, 1) == 0.25
    assert changed.total_rewards(*outcomes, 0.5, 1) == ([1.25, 1.25, 1.25, 0], [1, 0, 0, 0])
    assert changed.dsu_bonus(*outcomes[::-1], 0.5, 1) == 0.0


def test_the_ablation_tables_are_those_of_the_recorded_runs(monkeypatch, capsys, tmp_path):
    """toy/README.md shows what its commands print of tests/data/ablation.jsonl, of today's D_EI and
    flags: a toy that is made again, or an arm that changes, asks for new runs. All runs are told."""
    shown, print_tables = set(), ablation.print_tables

    def note(args, found):
        shown.update((arm, *args.others, *ablation.ARMS[arm][1]) for arm in found)
        print_tables(args, found)
    monkeypatch.setattr(ablation, "run", None)
    monkeypatch.setattr(ablation, "print_tables", note)
    monkeypatch.chdir(ROOT)
    for command in commands(PAGES["toy/README.md"]):
        if "--known" in command:
            script, *flags = shlex.split(command)
            monkeypatch.setattr(sys, "argv", [script, *flags, "--out", str(tmp_path)])
            ablation.main()
            for table in capsys.readouterr().out.strip().split("\n\n"):
                assert table in PAGES["toy/README.md"]
    recorded = exgrpo.read_jsonl(os.path.join("tests", "data", "ablation.jsonl"))
    assert shown == {(row["arm"], *row["flags"]) for _, row in recorded}


def test_each_known_bug_has_its_tests_and_each_test_file_its_line():
    """The list of D1 to D30 names tests; the docstring of each names the number."""
    page, stories = PAGES["tests/README.md"], {}
    for path in glob.glob(os.path.join(ROOT, "tests", "*.py")):
        assert f"`{os.path.basename(path)}`" in page
        stories |= {node.name: ast.get_docstring(node) or "" for node in ast.parse(read(path)).body
                    if isinstance(node, ast.FunctionDef)}
    rows = re.findall(r"^\| (D\d+) \|.*\| (.+) \|$", page, re.MULTILINE)
    assert [bug for bug, _ in rows] == [f"D{n}" for n in range(1, 31)]
    for bug, tests in rows:
        for test in re.findall(r"`(\w+)`", tests):
            assert re.search(rf"\b{bug}\b", stories.get(test, "")), f"{test} does not tell {bug}"
