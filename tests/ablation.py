"""The toy, one idea at a time: arms x seeds, each a run of exgrpo.py, and a table of their means.

    python tests/ablation.py --seeds 5 --jobs 2 --out runs/ablation

A finished run is not repeated: the same command goes on after an interruption, and adds seeds.
Other flags are handed to every run of exgrpo.py.
"""
import argparse
import concurrent.futures
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import ei  # noqa: E402
import exgrpo  # noqa: E402


def forward_only(row):
    """Every probe replaced by its question: as many examples, all of them (Q -> R_T, A)."""
    copy = {key: row[key] for key in ("answer", "answer_type", "rationale")}
    return row | {"probes": [probe | copy | {"probe": row["question"]} for probe in row["probes"]]}


def as_it_is(row):
    return row


ARMS = {  # name: (what becomes of a line of D_EI, flags of exgrpo.py)
    "SFT, forward only": (forward_only, ["--steps", "0"]),
    "SFT on EI": (as_it_is, ["--steps", "0"]),
    "SFT on EI, plain GRPO": (as_it_is, ["--turns", "0", "--aux-weight", "0"]),
    "SFT on EI, ExGRPO without bonus": (as_it_is, ["--delta", "0"]),
    "SFT on EI, ExGRPO": (as_it_is, [])}


def run(args, name, seed):
    """One arm with one seed -> its accuracies after every stage, [{file: [right, n]}, ...]."""
    change, flags = ARMS[name]
    folder = os.path.join(args.out, f"{name.replace(', ', '-').replace(' ', '_')}-{seed}")
    probes = folder + ".jsonl"
    if not os.path.exists(os.path.join(folder, "config.json")):  # the final model
        header, rows = exgrpo.read_probes(args.probes)
        with exgrpo.atomic(probes) as file:
            file.writelines(map(ei.dump, [{"ei": header}, *map(change, rows)]))
        resume = ["--resume"] if os.path.exists(folder) else []
        with open(folder + ".log", "a") as log:
            subprocess.run([sys.executable, os.path.join(ROOT, "exgrpo.py"), *args.others, *flags,
                            "--probes", probes, "--seed", str(seed), "--out", folder, *resume],
                           check=True, stdout=log, stderr=log, cwd=ROOT,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    return list(exgrpo.read_json(os.path.join(folder, "eval.json")).values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--probes", default=os.path.join(ROOT, "toy", "probes.jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    args, args.others = parser.parse_known_args()
    os.makedirs(args.out, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = {(name, seed): pool.submit(run, args, name, seed)
                for seed in range(args.seeds) for name in args.arms}
        found = {job: future.result() for job, future in jobs.items()}
    stages = [("student", [table[0] for table in found.values()])]
    for name in args.arms:
        tables = [found[name, seed] for seed in range(args.seeds)]
        if any(table[-1] != table[-2] for table in tables):
            stages.append((name + ": its SFT", [table[-2] for table in tables]))
        stages.append((name, [table[-1] for table in tables]))
    files = list(stages[0][1][0])
    print(f"% right, mean of {args.seeds} seeds (lowest - highest)\n{'':42}"
          + "".join(f"{file:>22}" for file in files))
    for name, tables in stages:
        shares = [[100 * table[file][0] / table[file][1] for table in tables] for file in files]
        print(f"{name:42}" + "".join(
            f"{f'{statistics.mean(x):.1f} ({min(x):.1f} - {max(x):.1f})':>22}" for x in shares))


if __name__ == "__main__":
    main()
