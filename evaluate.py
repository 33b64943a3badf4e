"""Does it understand?  Accuracy with intervals, paired tests, EI-Test, consistency and curves.

    python evaluate.py --model runs/qwen --baseline Qwen2.5-0.5B --data gsm8k probes.test.jsonl
    python evaluate.py --compare evals/1/outputs.jsonl evals/2/outputs.jsonl     # without a model
    python evaluate.py --curves runs/seed0 runs/seed1                            # a picture

Every question is asked alone, in one turn, and answered greedily: inference as in the paper. A D_EI
file (ei.py writes it) gives its questions and, as the EI-Test, the probes that passed Eq. 1.

What the paper leaves open, and we chose:
 1. "Forward and reverse": a question and its reversal probe (R8) are both right.
 2. "Counterfactual": the R1 probe is right, and the student's answers to it and to its question
    differ if and only if the two gold answers do. Left out are probes of another answer type and
    choices, whose letters stand for other options in a probe.
 3. The probes of one question are no independent trials. The bootstrap draws whole questions;
    Wilson's interval and McNemar's test do not: for all rules together they are too sure.
"""
import collections
import csv
import itertools
import json
import math
import os

import numpy as np
import torch
from tqdm import tqdm

import ei
import exgrpo
import reward
from exgrpo import UserError, at_least, mcnemar


# ---------------------------------------------------------------------------------- what is asked

# An item: its data set, its id, the id of its question, its rule (None: it is the question), ...
ITEM = {"data": str, "id": str, "source": str, "rule": (str, type(None)), "question": str,
        "answer": str, "answer_type": str}


def load_items(sources, split, limit):
    """The first `limit` questions of every file or named data set, each followed by its probes."""
    items = []
    for source in sources:
        is_file = source.endswith(".jsonl")
        data = os.path.basename(source).removesuffix(".jsonl") if is_file else f"{source}.{split}"
        rows = (exgrpo.read_probes(source, or_questions=True)[1][:limit] if is_file else
                ei.load_questions(source, split, limit))
        if not rows:
            raise UserError(f"{source}: there is no question in it")
        if any(item["data"] == data for item in items):
            raise UserError(f"--data: two files are called {data}, by which outputs are paired and "
                            "figures are named; rename one of them")
        for row in rows:
            items.append(row | {"data": data, "source": row["id"], "rule": None})
            for probe in row.get("probes", []):
                if probe["consistent"]:                                                     # Eq. 1
                    items.append(probe | {
                        "data": data, "source": row["id"], "question": probe["probe"],
                        "id": f"{row['id']}/{probe['rule']}"})
    for key, n in collections.Counter((item["data"], item["id"]) for item in items).items():
        if n > 1:
            raise UserError(f"--data: {': '.join(key)} occurs twice, but outputs are paired by id: "
                            "a question has one probe of a rule; leave one out")
    return [{key: item[key] for key in ITEM} for item in items]


# ------------------------------------------------------------------------------------ the outputs

OUTPUT = {"output": str, "truncated": bool, "tokens": int, "samples": list}


def answer(name, items, args, path):
    """Asks the model every item -> rows; each is on disk before the next batch is asked."""
    device = exgrpo.pick_device(args.device)
    model, chat = exgrpo.load_model(name, device)
    prompts = [chat.first(exgrpo.user_turn(item)) for item in items]
    for item, prompt in zip(items, prompts):
        if len(prompt) >= exgrpo.context_size(model):
            raise UserError(f"{item['data']}: the prompt of {item['id']} has {len(prompt)} tokens, "
                            f"the model reads {exgrpo.context_size(model)}: leave it out")
    print(f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, fp32 on {device}; "
          f"{len(items):,} prompts of {sum(map(len, prompts)):,} tokens; a greedy answer and "
          f"{args.samples} samples to each, at most {args.max_new_tokens} tokens; batches of "
          f"{args.batch_size}; into {path}", flush=True)
    generator = torch.Generator(device).manual_seed(args.seed % 2 ** 63)
    rows = []
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "x", encoding="utf-8") as file, tqdm(total=len(items), unit="question") as bar:
        header = {"evaluate": vars(args) | {"asked": name, "torch": torch.__version__}}
        print(json.dumps(header, ensure_ascii=False), file=file, flush=True)
        for start in range(0, len(items), args.batch_size):
            batch = slice(start, start + args.batch_size)
            greedy = exgrpo.generate(model, chat, prompts[batch],
                                     max_new_tokens=args.max_new_tokens)
            samples = sample_replies(model, chat, prompts[batch], args, generator)
            for item, reply, drawn in zip(items[batch], greedy, samples):
                rows.append(grade(item | dict(zip(OUTPUT, (*reply, drawn)))))
                print(json.dumps(rows[-1], ensure_ascii=False), file=file, flush=True)
            bar.update(len(greedy))
            bar.set_postfix_str(f"right {mean(rows, 'correct'):.1%}")
    return rows


def sample_replies(model, chat, prompts, args, generator):
    """--samples replies to each prompt, drawn from the model as it is (temperature 1)."""
    samples = [[] for _ in prompts]
    widths = [(len(prompt) + args.max_new_tokens) * args.samples for prompt in prompts]
    for batch in exgrpo.micro_batches(widths, 16384) if args.samples else []:
        replies, _, _ = exgrpo.sample(
            model, [prompts[i] for i in batch], temperature=1.0, stop_ids=chat.stop_ids,
            max_new_tokens=args.max_new_tokens, group_size=args.samples, generator=generator)
        for place, (ids, truncated) in enumerate(map(chat.finish, replies)):
            samples[batch[place // args.samples]].append(
                {"output": chat.decode(ids), "truncated": truncated})
    return samples


def grade(row):
    """Adds what reward.py reads as the answer (None: it cannot be read), and its verdicts. A reply
    that was cut by the token limit states nothing."""
    gold, kind, cut = row["answer"], row["answer_type"], row["truncated"]

    def right(reply):
        return not reply["truncated"] and reward.is_correct(reply["output"], gold, kind)
    return row | {"extracted": None if cut else reward.extract_answer(row["output"], kind),
                  "correct": right(row), "samples_correct": sum(map(right, row["samples"]))}


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def read_outputs(path):
    """What answer() wrote -> its rows, graded again: the verdicts are today's reward.py's."""
    lines, rows, seen = exgrpo.read_jsonl(path), [], {}
    where, first = next(lines, (path, {}))
    if "evaluate" not in first:
        raise UserError(f'{where}: evaluate.py did not write this: there is no {{"evaluate": ...}}')
    for where, row in lines:
        for key, kind in (ITEM | OUTPUT).items():
            if not isinstance(row.get(key), kind):
                raise UserError(f'{where}: "{key}" is not as evaluate.py writes it')
        if not all(isinstance(one, dict) and isinstance(one.get("output"), str)
                   and isinstance(one.get("truncated"), bool) for one in row["samples"]):
            raise UserError(f'{where}: "samples" is not as evaluate.py writes it')
        key = f"{row['data']}: {row['id']}"
        exgrpo.check_question(row | {"id": key}, where, {"question": str, "answer": str}, seen)
        rows.append(grade(row))
    if not rows:
        raise UserError(f"{path}: there is no answer in it")
    return rows


# ------------------------------------------------------------------------------------- statistics

def bootstrap(values, clusters, seed=0, draws=10_000):
    """95 % percentile interval of the mean of values; whole clusters (questions) are drawn."""
    index = np.unique(clusters, return_inverse=True)[1]
    sums, sizes = np.bincount(index, values), np.bincount(index)
    rng = np.random.default_rng(seed)
    picks = (rng.integers(len(sums), size=len(sums)) for _ in range(draws))
    means = [sums[pick].sum() / sizes[pick].sum() for pick in picks]
    return tuple(np.quantile(means, (0.025, 0.975)).tolist())


def pass_at_k(n, right, k):
    """Unbiased estimate of P(one of k samples is right), from n >= k of which `right` are right."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ------------------------------------------------------------------------------------- the report

def figures(rows):
    """The groups of which a share is told -> {name: rows}, each row with its verdict "correct"."""
    groups, sets = {}, list(dict.fromkeys(row["data"] for row in rows))
    for data in sets:
        mine = [row for row in rows if row["data"] == data]
        probes = [row for row in mine if row["rule"]]
        groups[data] = [row for row in mine if not row["rule"]]
        groups[f"{data}, EI-Test"] = probes
        for rule in sorted({row["rule"] for row in probes}, key=lambda rule: (len(rule), rule)):
            groups[f"{data}, EI-Test {rule}"] = [row for row in probes if row["rule"] == rule]
        reverse, counterfactual = consistency(mine)
        groups[f"{data}, forward and reverse"] = reverse
        groups[f"{data}, counterfactual"] = counterfactual
    if len(sets) > 1:  # what two files share counts once
        groups["all questions"] = list({row["question"]: row for row in rows
                                        if not row["rule"]}.values())
    return {name: group for name, group in groups.items() if group}


def consistency(rows):
    """Do the answers fit each other? -> the two groups of choices 1 and 2, one row a question."""
    questions = {row["source"]: row for row in rows if not row["rule"]}
    reverse, counterfactual = [], []
    for probe in rows:
        question, kind = questions.get(probe["source"]), probe["answer_type"]
        pair = {"data": probe["data"], "source": probe["source"]}
        if question and probe["rule"] == "R8":
            reverse.append(pair | {"correct": question["correct"] and probe["correct"]})
        if question and probe["rule"] == "R1" and kind == question["answer_type"] != "choice":
            golds_agree = same(question["answer"], probe["answer"], kind)
            fits = (question["extracted"] is not None and
                    same(question["extracted"], probe["extracted"], kind) == golds_agree)
            counterfactual.append(pair | {"correct": probe["correct"] and fits})
    return reverse, counterfactual


def same(a, b, kind):
    """Do two answers, as read by reward.py, say the same?"""
    return a == b or b is not None and reward.is_correct(f"The answer is {a}.", b, kind)


def report(rows, baseline=None, seed=0):
    """One result a group: its share and interval and, with a baseline's rows, the difference."""
    others = figures(same_questions(rows, baseline)) if baseline else {}
    results = []
    for name, group in figures(rows).items():
        n, right = len(group), sum(row["correct"] for row in group)
        result = {"figure": name, "n": n, "right": right, "accuracy": right / n}
        result["low"], result["high"] = reward.wilson(right, n)
        if baseline:
            result |= paired(group, others[name], seed)
        if "output" in group[0]:
            result |= {"unparsed": sum(row["extracted"] is None for row in group) / n,
                       "truncated": mean(group, "truncated"), "tokens": mean(group, "tokens")}
            samples = [sample for row in group for sample in row["samples"]]
            if samples:
                result["samples_truncated"] = mean(samples, "truncated")
            counts = [(len(row["samples"]), row["samples_correct"]) for row in group]
            for k in (2 ** power for power in range(min(counts)[0].bit_length())):
                result[f"pass@{k}"] = sum(pass_at_k(*count, k) for count in counts) / n
        results.append(result)
    return results


def same_questions(rows, baseline):
    """The baseline's rows in our order; an error if they do not answer the same questions."""
    ours, theirs = ({(row["data"], row["id"]): row for row in side} for side in (rows, baseline))
    for key in ours | theirs:
        if any(ours.get(key, {}).get(name) != theirs.get(key, {}).get(name) for name in ITEM):
            raise UserError(f"outputs that cannot be paired: {': '.join(key)} is not the same in "
                            "both; ask both models with the same --data, --split and --limit")
    return [theirs[key] for key in ours]


def paired(group, other, seed):
    """The same questions, answered by the model (group) and by the baseline (other)."""
    differences = [int(a["correct"]) - int(b["correct"]) for a, b in zip(group, other)]
    only_model, only_baseline = differences.count(1), differences.count(-1)
    low, high = bootstrap(differences, [f"{row['data']}: {row['source']}" for row in group], seed)
    return {"baseline": mean(other, "correct"), "difference": sum(differences) / len(differences),
            "difference_low": low, "difference_high": high, "only_model": only_model,
            "only_baseline": only_baseline, "p": mcnemar(only_model, only_baseline)}


COLUMNS = {"": "{figure}", "n": "{n}", "right": "{accuracy:.1%}", "95 %": "{low:.1%} to {high:.1%}",
           "baseline": "{baseline:.1%}", "difference": "{difference:+.1%}",
           "95 % of it": "{difference_low:+.1%} to {difference_high:+.1%}", "p": "{p:.2g}",
           "unparsed": "{unparsed:.1%}", "truncated": "{truncated:.1%}", "tokens": "{tokens:.0f}",
           "samples truncated": "{samples_truncated:.1%}"}


def markdown(results):
    """The results as a Markdown table, without the columns that no result fills."""
    forms = COLUMNS | {key: f"{{{key}:.1%}}" for key in results[0] if key.startswith("pass@")}

    def cell(form, result):
        try:
            return form.format_map(result)
        except KeyError:  # consistency has no tokens, a model alone no difference
            return ""

    columns = [[title, *(cell(form, result) for result in results)]
               for title, form in forms.items()]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [" | ".join(map(str.ljust, line, widths)) for line in zip(*columns)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_report(results, out):
    """OUT/results.json and OUT/results.md, and the table on the screen."""
    text = (f"{markdown(results)}\n\n95 %: Wilson's interval, of a difference the bootstrap over "
            "questions; p: exact McNemar test; unparsed: no readable answer.\n")
    os.makedirs(out, exist_ok=True)
    for name, content in (("results.json", json.dumps(results, indent=1)), ("results.md", text)):
        with open(os.path.join(out, name), "x", encoding="utf-8") as file:
            file.write(content)
    print(f"\n{text}\nresults in {out}")


# ----------------------------------------------------------------------------------------- curves

PANELS = {"reward": ["reward"], "accuracy: full, partial (dashed)": ["acc_full", "acc_partial"],
          "share of questions paid the bonus": ["bonus_share"], "KL to pi_ref, nats": ["kl"],
          "tokens a reply": ["reply_tokens"],
          "advantage of correct partial dialogues": ["adv_partial_correct"]}


def read_metrics(run):
    """RUN/metrics.csv, which exgrpo.py writes -> {column: (steps, values)}; no value is nan."""
    path = os.path.join(run, "metrics.csv")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path}: there is no step in it yet")
    try:
        return {name: ([float(row["step"]) for row in rows], [float(row[name]) for row in rows])
                for name in itertools.chain(*PANELS.values())}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not as this version of exgrpo.py writes it: {error!r}")


def read_accuracies(run):
    """RUN/eval.json, if it is there -> {file: (steps, shares of right answers)}, step 0 being after
    SFT, and {"FILE, student": the same}, a level line, for the student before SFT."""
    shares, curves = collections.defaultdict(dict), {}
    for label, found in exgrpo.read_eval(run).items():  # student, after SFT, after step 40, ...
        step = int({"student": -1, "after SFT": 0}.get(label, label.split()[-1]))
        for file, verdicts in found.items():
            if verdicts:
                shares[file][step] = verdicts.count("1") / len(verdicts)
    for file, found in shares.items():
        student, steps = found.pop(-1, math.nan), sorted(found)
        if len(found) > 1:
            curves[file] = steps, [found[step] for step in steps]
            curves[f"{file}, student"] = steps, [student for step in steps]
    return curves


def seeds_together(runs):
    """Runs whose settings (run.json) differ in the seed alone -> {label: runs}. Students named
    NAME-SEED, as tests/ablation.py names each seed's warm-up, count as one setting."""
    groups = {}
    for run in runs:
        path = os.path.join(run, "run.json")
        settings = json.load(open(path, encoding="utf-8")) if os.path.exists(path) else {"run": run}
        student = str(settings.get("student")).removesuffix(f"-{settings.get('seed')}")
        settings = json.dumps(settings | {"seed": None, "student": student}, sort_keys=True)
        groups.setdefault(settings, []).append(run)
    return {f"{group[0]}, n = {len(group)}": group for group in groups.values()}


def band(seeds):
    """A curve of several seeds -> (steps, mean, lowest, highest), over the steps all of them have.
    Each seed is a running mean over 1/25 of the steps, which passes over missing values."""
    steps = sorted(set.intersection(*(set(steps) for steps, _ in seeds)))
    window = np.ones(max(1, len(steps) // 25))
    values = np.array([[dict(zip(*seed))[step] for step in steps] for seed in seeds])
    seen = np.isfinite(values)
    slide = lambda rows: np.stack([np.convolve(row, window, "valid") for row in rows])
    with np.errstate(invalid="ignore"):  # 0 / 0 where a window is empty: a gap in the curve
        smooth = slide(np.where(seen, values, 0.0)) / slide(seen)
    return steps[len(window) - 1:], smooth.mean(0), smooth.min(0), smooth.max(0)


def draw_curves(runs, path):
    """A PNG of six panels: a line for each setting, its seeds' mean, in the band of their range. A
    seventh panel shows the accuracies in eval.json, with a marker for each file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--curves needs matplotlib, which is not installed: pip install matplotlib")
    groups = seeds_together(runs).items()
    metrics = {label: [read_metrics(run) for run in group] for label, group in groups}
    evals = {label: [read_accuracies(run) for run in group] for label, group in groups}
    files = list(dict.fromkeys(name for seeds in evals.values() for seed in seeds
                               for name in seed))
    figure = Figure(figsize=(18 if files else 12, 6.5), layout="constrained")
    places = figure.subplot_mosaic("ABCG;DEFG" if files else "ABC;DEF")
    for letter, (title, names) in zip(sorted(places), (PANELS | {"accuracy": files}).items()):
        axes, markers = places[letter], "os^vDPX*" * len(files) if letter == "G" else [""]
        for number, (label, seeds) in enumerate((evals if letter == "G" else metrics).items()):
            for name, style in zip(names, itertools.product(markers, ("-", "--"))):
                if all(name in curves for curves in seeds):
                    steps, middle, low, high = band([curves[name] for curves in seeds])
                    axes.plot(steps, middle, "".join(style), color=f"C{number}",
                              label=name if letter == "G" else label)
                    axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="step")
    if files:
        lines = {line.get_label(): line for line in axes.lines}  # of one setting, for all
        figure.legend(lines.values(), lines, loc="outside right upper")
    figure.legend(*places["A"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"curves in {path}")


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = exgrpo.Parser("Accuracy, paired tests, EI-Test and consistency of a model; curves.")
    add = parser.add_argument_group("what to ask whom").add_argument
    add("--model", default=exgrpo.TOY_STUDENT, help="local folder or Hub name")
    add("--baseline", help="a second model, asked the same and compared question by question")
    add("--data", nargs="+", default=exgrpo.TOY_TESTS, metavar="D",
        help="question or D_EI files (.jsonl), or names of data sets")
    add("--split", default="test", help="split of the data sets that are given by name")
    add("--limit", type=at_least(1), help="questions of each, from its start; None: all")
    add("--samples", type=at_least(0), default=0, help="sampled replies a question, for pass@k")
    add("--max-new-tokens", type=at_least(1), default=256, help="longest answer, tokens")
    add("--batch-size", type=at_least(1), default=32, help="questions asked, and stored, together")
    add("--out", help="folder of outputs.jsonl, baseline.jsonl, results.json, results.md and "
                      "curves.png; new or empty. None: the first free evals/N")
    add("--seed", type=at_least(0), default=0, help="of the samples and of the bootstrap")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    group = parser.add_argument_group("without a model").add_mutually_exclusive_group()
    add = group.add_argument
    add("--compare", nargs=2, metavar=("A", "B"), help="outputs.jsonl of two calls: A against B")
    add("--curves", nargs="+", metavar="RUN", help="picture of runs; a setting's seeds are a band")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    free = (f"evals/{n}" for n in itertools.count(1) if not os.path.exists(f"evals/{n}"))
    args.out = args.out or next(free)
    if os.path.exists(args.out) and not (os.path.isdir(args.out) and not os.listdir(args.out)):
        raise UserError(f"{args.out} exists already and is not overwritten; name another --out")
    if args.curves:
        return draw_curves(args.curves, os.path.join(args.out, "curves.png"))
    if args.compare:
        rows, baseline = map(read_outputs, args.compare)
        return write_report(report(rows, baseline, args.seed), args.out)
    items = load_items(args.data, args.split, args.limit)
    outputs = os.path.join(args.out, "outputs.jsonl")
    rows = answer(args.model, items, args, outputs)
    baseline = args.baseline and answer(args.baseline, items, args,
                                        os.path.join(args.out, "baseline.jsonl"))
    write_report(report(rows, baseline, args.seed), args.out)
    print(f"every output in {outputs}\n"
          f"next: python evaluate.py --compare {outputs} OTHER/outputs.jsonl")


if __name__ == "__main__":
    exgrpo.run(main)
