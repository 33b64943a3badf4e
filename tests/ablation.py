"""The toy, one idea at a time: arms x seeds, each a run of exgrpo.py, and a table of their means.

    python tests/ablation.py --seeds 5 --jobs 2 --out runs/ablation
    python tests/ablation.py --arms "SFT, forward only" "ExGRPO"       # some arms only

Below the means stand each arm's differences from --against, paired by seed: mean, 95 % interval and
p of the t-test. Seeds vary the order, the draws and the samples; all start from one student.

Arms that start from another arm's model share its run of the same seed. A finished run is not
repeated: the same command goes on after an interruption, and adds seeds. Other flags go to every
run of exgrpo.py.

The results, OUT/*.json, are a line each with every verdict, and name no folder. --known takes them
from a file and runs only what is missing.
"""
import concurrent.futures
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import ei  # noqa: E402
import exgrpo  # noqa: E402


# --------------------------------------------------------------- what becomes of the lines of D_EI

def as_it_is(rows, rng):
    return rows


def forward_only(rows, rng):
    """Every probe replaced by its question: as many examples, all of them (Q -> R_T, A)."""
    def copies(row):
        copy = {key: row[key] for key in ("answer", "answer_type", "rationale")}
        return [probe | copy | {"probe": row["question"]} for probe in row["probes"]]
    return [row | {"probes": copies(row)} for row in rows]


def part(share):
    """This share of the kept questions, drawn at random."""
    def change(rows, rng):
        kept = [row for row in rows if row["kept"]]
        return [kept[i] for i in rng.permutation(len(kept))[:round(share * len(kept))]]
    return change


def only(*rules):
    def change(rows, rng):
        return [row | {"probes": [p for p in row["probes"] if p["rule"] in rules]} for row in rows]
    return change


ALL_BUT_R8 = only(*{*ei.RULES} - {"R8"})
ALONE = ["--questions-per-step", "36"]  # as many replies a step as the default's
ARMS = {  # name: (what becomes of D_EI, or the arm whose model it starts from; flags of exgrpo.py)
    "SFT": (as_it_is, ["--steps", "0"]),
    "ExGRPO": ("SFT", []),
    "outcome credit": ("SFT", ["--credit", "outcome"]),
    "GRPO on questions": ("SFT", ["--turns", "0", *ALONE]),
    "RL (R_outcome)": ("SFT", ["--rl-data", "probes", "--aux-weight", "0", *ALONE]),  # the paper's
    "RL (R_outcome) + L_aux": ("SFT", ["--rl-data", "probes", *ALONE]),
    "no bonus": ("SFT", ["--delta", "0"]),
    "bonus pooled": ("SFT", ["--advantage", "pooled"]),
    "independent": ("SFT", ["--partial", "independent"]),
    "no L_aux": ("SFT", ["--aux-weight", "0"]),
    "L_aux alone": ("SFT", ["--aux-weight", "1000"]),  # Adam rescales: the reward hardly counts
    "k = 2": ("SFT", ["--turns", "2", "--questions-per-step", "9"]),
    "k = 5": ("SFT", ["--turns", "5", "--questions-per-step", "5"]),
    "cold start": (as_it_is, ["--sft-epochs", "0", "--aux-weight", "0"]),
    "cold start + L_aux": (as_it_is, ["--sft-epochs", "0"]),
    "10 % of the data": (part(0.10), []),
    "25 % of the data": (part(0.25), []),
    "25 % of the data, 12 epochs": (part(0.25), ["--sft-epochs", "12"]),  # as many updates as SFT
    "SFT, forward only": (forward_only, ["--steps", "0"]),
    "SFT, 13 epochs": (as_it_is, ["--sft-epochs", "13", "--steps", "0"]),
    "13 epochs, ExGRPO": ("SFT, 13 epochs", []),
    "13 epochs, GRPO on questions": ("SFT, 13 epochs", ["--turns", "0", *ALONE]),
    "13 epochs, no L_aux": ("SFT, 13 epochs", ["--aux-weight", "0"]),
    "13 epochs, outcome, no L_aux": ("SFT, 13 epochs",
                                     ["--credit", "outcome", "--aux-weight", "0"]),
    # One rule's probes, SFT only: the three that the paper names, and the reversal.
    **{f"{rule} alone": (only(rule), ["--steps", "0"]) for rule in ("R1", "R2", "R8", "R10")},
    "R8 alone, 14 epochs": (  # as many updates as SFT
        only("R8"), ["--sft-epochs", "14", "--steps", "0"]),
    "SFT, all but R8": (ALL_BUT_R8, ["--steps", "0"]),
    "all but R8": (ALL_BUT_R8, [])}


# ---------------------------------------------------------------------------------------- the runs

def folder_of(args, name, seed):
    return os.path.join(args.out, f"{name.replace(', ', '-').replace(' ', '_')}-{seed}")


def key_of(args, name, seed):
    """What tells a run's result from that of any other command."""
    files = [os.path.basename(path) for path in args.eval]
    return {"arm": name, "seed": seed, "flags": [*args.others, *ARMS[name][1]], "eval": files,
            "D_EI": args.digest}


def run(args, name, seed):
    """One arm with one seed -> {file: verdicts, "0110..."} at its end."""
    origin, folder, key = ARMS[name][0], folder_of(args, name, seed), key_of(args, name, seed)
    result = folder + ".json"
    if os.path.exists(result):  # the run was finished
        with open(result) as file:
            known = json.load(file)
        verdicts = known.pop("verdicts")
        if known != key:
            raise exgrpo.UserError(f"{folder} was made by another command, or of another D_EI: "
                                   "name another --out")
        return verdicts
    if origin in ARMS:
        probes, start = args.probes, ["--student", folder_of(args, origin, seed),
                                      "--sft-epochs", "0"]
    else:
        probes, start = folder + ".jsonl", []
        header, rows = exgrpo.read_probes(args.probes)
        lines = [{"ei": header}, *origin(rows, np.random.default_rng(seed))]
        exgrpo.write_whole(probes, b"".join(map(ei.dump, lines)))
    resume = ["--resume"] if os.path.exists(folder) else []
    with open(folder + ".log", "a") as log:
        code = subprocess.run(
            [sys.executable, os.path.join(ROOT, "exgrpo.py"), *key["flags"], *start, "--probes",
             probes, "--seed", str(seed), "--out", folder, "--eval", *args.eval, *resume],
            stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise exgrpo.UserError(f"the run {folder} ended with code {code}: see {folder}.log")
    with open(os.path.join(folder, "eval.json")) as file:
        verdicts = list(json.load(file).values())[-1]
    exgrpo.write_whole(result, ei.dump(key | {"verdicts": verdicts}))
    return verdicts


def read_known(args):
    """The results in --known that this command would find -> {(arm, seed): {file: verdicts}}."""
    found = {}
    for _, row in exgrpo.read_jsonl(args.known) if args.known else []:
        verdicts, job = row.pop("verdicts", None), (row.get("arm"), row.get("seed"))
        if job[0] in ARMS and row == key_of(args, *job):
            found[job] = verdicts
    return found


def run_all(args):
    """-> {arm: [{file: verdicts} of each seed]}; first the arms that others start from."""
    found = read_known(args)
    missing = [(arm, seed) for seed in range(args.seeds) for arm in ARMS
               if arm in args.arms and (arm, seed) not in found]
    origins = [(ARMS[arm][0], seed) for arm, seed in missing if ARMS[arm][0] in ARMS]
    for wave in ([job for job in dict.fromkeys(origins + missing) if ARMS[job[0]][0] not in ARMS],
                 [job for job in missing if ARMS[job[0]][0] in ARMS]):
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = {job: pool.submit(run, args, *job) for job in wave}
        found |= {job: future.result() for job, future in jobs.items()}
    return {arm: [found[arm, seed] for seed in range(args.seeds)] for arm in ARMS
            if arm in [*args.arms, args.against]
            and all((arm, seed) in found for seed in range(args.seeds))}


# --------------------------------------------------------------------------------------- the table

def two_sided(t, df):
    """P(|T| > t) for Student's t, by the trapezoid rule on its density."""
    x = np.linspace(0, t, 20001)
    y = (1 + x * x / df) ** (-(df + 1) / 2)
    scale = math.gamma((df + 1) / 2) / (math.gamma(df / 2) * math.sqrt(df * math.pi))
    return max(0.0, 1 - scale * float((y[1:] + y[:-1]).sum() * (x[1] - x[0])))


def paired(differences):
    """Mean, half of its 95 % interval, p of the paired t-test; n >= 2 differences."""
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    low, high = 0.0, 1000.0
    while high - low > 1e-6:  # t at which the two tails hold 5 %
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, n - 1) > 0.05 else (low, middle)
    p = two_sided(abs(mean) / error, n - 1) if error else float(mean == 0)
    return mean, low * error, p


def print_tables(args, found):
    found = {arm: [{file: 100 * each.count("1") / len(each) for file, each in verdicts.items()}
                   for verdicts in seeds] for arm, seeds in found.items()}
    files = list(next(iter(found.values()))[0])
    print(f"% right, mean of {args.seeds} seeds (lowest - highest)\n{'':28}"
          + "".join(f"{file:>26}" for file in files))
    for arm, tables in found.items():
        columns = [[table[file] for table in tables] for file in files]
        print(f"{arm:28}" + "".join(
            f"{f'{statistics.mean(x):.1f} ({min(x):.1f} - {max(x):.1f})':>26}" for x in columns))
    if args.against not in found or args.seeds < 2:
        return
    print(f"\ndifference from {args.against}, paired by seed: mean +- 95 %, p of the t-test")
    for arm, tables in found.items():
        if arm != args.against:
            pairs = list(zip(tables, found[args.against]))
            cells = [paired([a[file] - b[file] for a, b in pairs]) for file in files]
            print(f"{arm:28}" + "".join(
                f"{f'{mean:+.1f} +- {half:.1f}, ' + (f'{p:.3f}' if p > 0.0005 else '<.001'):>26}"
                for mean, half, p in cells))


def main():
    parser = exgrpo.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/ablation", help="folder of all runs")
    parser.add_argument("--probes", default=os.path.join(ROOT, "toy", "probes.jsonl"), help="D_EI")
    parser.add_argument("--eval", nargs="+", metavar="FILE", default=exgrpo.TOY_TESTS,
                        help="what each run is asked at its end")
    parser.add_argument("--seeds", type=exgrpo.at_least(1), default=5, help="runs of each arm")
    parser.add_argument("--jobs", type=exgrpo.at_least(1), default=2, help="runs side by side")
    parser.add_argument("--arms", nargs="*", choices=ARMS, metavar="ARM",
                        help=f"one or more of: {'; '.join(ARMS)}; all".replace("%", "%%"))
    parser.add_argument("--known", metavar="FILE", help="results of finished runs, see above")
    parser.add_argument("--against", choices=ARMS, default="SFT", metavar="ARM",
                        help="the arm that the others are compared with")
    args, args.others = parser.parse_known_args()
    args.arms = args.arms or list(ARMS)
    os.makedirs(args.out, exist_ok=True)
    with open(args.probes, "rb") as file:
        args.digest = hashlib.sha256(file.read()).hexdigest()
    print_tables(args, run_all(args))


if __name__ == "__main__":
    exgrpo.run(main)
