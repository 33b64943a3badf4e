"""The README says what is so: its commands parse, its tables are those of the code."""
import os
import re
import shlex
import sys

import pytest

import ablation
import ei
import evaluate
import exgrpo

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines() if line.startswith("python ")]
SCRIPTS = {"ei.py": ei, "exgrpo.py": exgrpo, "evaluate.py": evaluate}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_flags_that_exist(monkeypatch, command):
    """DPO's README names an option that has no file, rasbt's names paths that are gone."""
    script, *flags = shlex.split(command)[1:]
    if script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [script, *flags])
        SCRIPTS[script].parse_args()
    elif script != "-m":
        assert os.path.exists(os.path.join(ROOT, script))


def test_ci_runs_the_laptop_commands():
    """They take minutes, so CI runs them behind the tests, as written."""
    section = README.split("## On a laptop")[1].split("\n## ")[0]
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    with open(os.path.join(ROOT, ".ci", "run")) as file:
        ci = file.read().splitlines()
    assert len(commands) >= 3 and not set(commands) - set(ci)


def test_the_ablation_tables_are_those_of_the_recorded_runs(monkeypatch, capsys, tmp_path):
    """Each command, as written, runs nothing and prints what stands below it."""
    commands = [command for command in COMMANDS if "ablation.py --known" in command]
    monkeypatch.setattr(ablation.subprocess, "run", None)
    monkeypatch.chdir(ROOT)
    for words in commands:
        monkeypatch.setattr(sys, "argv", [*shlex.split(words)[1:], "--out", str(tmp_path)])
        ablation.main()
        assert f"```\n{capsys.readouterr().out}```" in README
    assert commands


def test_line_counts_are_those_of_the_files():
    for name, lines in re.findall(r"^\| `([\w/]+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            assert len(file.readlines()) == int(lines), f"{name} has another number of lines"


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
