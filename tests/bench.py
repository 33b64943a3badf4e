"""Benchmarks. Each compares this project with a peer in the same run.

    python tests/bench.py grader        # reward.py, beside math-verify (pip install math-verify)
    python tests/bench.py ei            # 100,000 questions through ei.py, from a stub server
    python tests/bench.py sampling      # replies to 4 prompts, beside transformers' generate
    python tests/bench.py dialogue      # k turns, full and partial, beside generate anew each turn
    python tests/bench.py step          # the update, beside TRL's trainer (pip install trl)
    python tests/bench.py head          # the loss over gemma3's 262,144 words, beside all logits
    python tests/bench.py whole         # sampling and update, beside TRL with a rollout_func

    --model FOLDER  --dtype fp32|bf16  --threads N  --repeats N  --device cpu|cuda

Each contender runs in a process of its own, and they take turns, so that other work on the machine
slows all of them. Figures are medians of --repeats turns, after a warm-up. A peer that is not
installed is skipped, and the output says so.
"""
import argparse
import functools
import http.server
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import exgrpo  # noqa: E402
import reward  # noqa: E402


def machine(device="cpu"):
    """The name of the processor, to stand beside every figure."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    return (re.findall(r"model name\s*: (.*)", cpuinfo) or ["unknown CPU"])[0]


def last_number(output, gold, kind):
    """The grader of many scripts: the last number of the output, compared as a float."""
    numbers = re.findall(r"-?\d+\.?\d*", output)
    try:
        return bool(numbers) and float(numbers[-1]) == float(gold)
    except ValueError:
        return False


def grader():
    """Accuracy, wrong answers paid and time on the number and math cases of data/answers.txt.
    reward.py was written against them: its own row is a regression figure, not an estimate."""
    from test_reward import CASES
    cases = [case for case in CASES if case[1] in ("number", "math")]
    graders = {"reward.py": reward.is_correct, "last number, float ==": last_number}
    try:
        from math_verify import parse, verify
        graders["math-verify"] = lambda output, gold, kind: verify(parse(f"${gold}$"),
                                                                   parse(output))
    except ImportError:
        print("math-verify: skipped, it is not installed")
    print(f"{len(cases)} cases, 1 thread, {machine()}\n"
          f"{'grader':24}{'right':>8}{'wrong paid':>12}{'s per 1,000':>13}")
    marks = [mark == "+" for _, _, _, mark, _ in cases]
    for name, grade in graders.items():
        start = time.perf_counter()
        paid = [grade(output, gold, kind) for _, kind, gold, _, output in cases]
        seconds = (time.perf_counter() - start) / len(cases) * 1000
        right = sum(p == m for p, m in zip(paid, marks)) / len(cases)
        wrong = sum(p and not m for p, m in zip(paid, marks))
        print(f"{name:24}{right:8.1%}{wrong:12}{seconds:13.3f}")


class Stub(http.server.BaseHTTPRequestHandler):
    """A teacher that declines every request after `delay` seconds."""
    protocol_version = "HTTP/1.1"
    body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "DECLINE"}}]}).encode()
    delay, laps = 0.0, []  # when each request came, and when its answer was ready

    def log_message(self, *_):
        pass

    def do_POST(self):
        start = time.perf_counter()
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.delay)
        self.laps.append((start, time.perf_counter()))
        # In one write: the client would wait for a second packet.
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(self.body) + self.body)


def stage1():
    """How busy ei.py keeps a slow server, then its speed and memory with a fast one, from the first
    request to the last answer. Each question is one request: rule R1, declined."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(machine())
    for n, Stub.delay in ((800, 0.2), (10_000, 0.0), (100_000, 0.0)):
        Stub.laps.clear()
        with tempfile.TemporaryDirectory() as folder:
            data = os.path.join(folder, "data.jsonl")
            with open(data, "w") as file:
                file.writelines(json.dumps({
                    "id": f"q{i}", "question": f"What is {i} and 1?", "answer": str(i + 1),
                    "answer_type": "number", "rationale": "Add."}) + "\n" for i in range(n))
            subprocess.run(
                [sys.executable, os.path.join(ROOT, "ei.py"), "--data", data, "--rules", "R1",
                 "--teacher", f"http://127.0.0.1:{server.server_address[1]}/v1", "--concurrency",
                 "16", "--out", data + ".out"], check=True, stdout=subprocess.DEVNULL)
        starts, ends = zip(*Stub.laps)
        seconds, open_requests = max(ends) - min(starts), sum(ends) - sum(starts)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"{n:7,} questions of {Stub.delay} s: {n / seconds:.0f} a second, "
              f"{open_requests / seconds:.1f} of 16 requests open, {peak:.0f} MiB", flush=True)


# ---------------------------------------------------------------------------------------- the race

def contend(contender, args, pipe):
    """The process of one contender. lap() reports the CPU seconds of the lap that ends, its seconds
    on the clock and the process's peak memory in GiB to race(), then waits for the next lap."""
    gpu, start = args.device == "cuda", (0.0, 0.0)

    def lap(*_, **__):
        nonlocal start
        if gpu:
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
        peak = (torch.cuda.max_memory_allocated() / 2 ** 30 if gpu else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
        pipe.send((cpu, wall, peak))
        pipe.recv()
        start = time.process_time(), time.perf_counter()
    pipe.recv()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        work = contender(args, lap)
    except (ImportError, exgrpo.UserError) as error:
        pipe.send(f"skipped ({error})")
        return
    while True:
        work()
        lap()


def race(args, contenders):
    """Lets contenders, {name: function}, take turns and prints their medians."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, contender in contenders.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=contend, args=(contender, args, theirs), daemon=True).start()
        theirs.close()
    laps = {name: [] for name in contenders}
    for _ in range(args.repeats + 1):  # the first lap includes all preparations, and is left out
        for name in list(laps):
            pipes[name].send("go")
            lap = pipes[name].recv()
            if isinstance(lap, str):
                print(f"{name}: {lap}")
                del laps[name]
            else:
                laps[name].append(lap)
    for process in multiprocessing.active_children():
        process.kill()
    print(f"{'':34}{'CPU s':>8}{'lowest..highest':>18}{'wall s':>8}{'lowest..highest':>18}"
          f"{'peak GiB':>10}")
    for name in laps:
        cpu, wall, peak = zip(*laps[name][1:])
        print(f"{name:34}" + "".join(
            f"{statistics.median(x):8.2f}{f'{min(x):.2f}..{max(x):.2f}':>18}" for x in (cpu, wall))
            + f"{max(peak):10.2f}", flush=True)


TEXT = ("Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did she sell altogether in April and May? ")


def load(args, peer=False):
    """(model, chat, optimizer) as exgrpo.py loads them, but no reply stops before its full length:
    equal work for all. bf16 means bf16 weights for generate: it is faster so than by autocast."""
    model, chat, optimizer = exgrpo.load_policy(args, args.model, torch.device(args.device), 1e-6)
    chat.stop_ids = []
    return model.to(torch.bfloat16) if peer and args.bf16 else model, chat, optimizer


def words_for(chat, n_tokens, seed):
    """A user's words of about n_tokens tokens."""
    words = (TEXT.split() * 20)[seed:]
    n = next(n for n in range(1, len(words)) if len(chat.encode(" ".join(words[:n]))) >= n_tokens)
    return " ".join(words[:n])


def workload(chat, args):
    """The scripts of full dialogues, k' of each, and the scripts of partial ones."""
    if args.benchmark in ("sampling", "step"):  # four of one turn, 120 tokens with the template
        lengths = [n - len(chat.first("")) for n in (121, 112, 128, 117)]
        return [[words_for(chat, n, seed)] for seed, n in enumerate(lengths)], [], []
    script, cut = [words_for(chat, 60, seed) for seed in range(args.turns + 1)], args.turns // 2
    return ([script] * args.questions, [cut] * args.questions,
            [script[:cut] + script[-1:]] * args.questions)


def random_dialogues(chat, args):
    """The dialogues of `step`: a group of replies, of random tokens, to each of four prompts."""
    generator, dialogues = torch.Generator().manual_seed(0), []
    for (user,) in workload(chat, args)[0]:
        for _ in range(args.group_size):
            ids = torch.randint(5, 250, (args.max_new_tokens,), generator=generator).tolist()
            dialogues.append(exgrpo.Dialogue())
            dialogues[-1].add_user(chat.first(user))
            dialogues[-1].add_reply(ids, chat, [0.0] * len(ids))
    return dialogues


# ------------------------------ the contenders: each prepares itself and returns the work of a lap

def sample(model, chat, scripts, cuts, args):
    """A group of full dialogues for each script and, with cuts, as many partial ones."""
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        full, partial = exgrpo.sample_dialogues(model, chat, scripts, args, generator, cuts)
    return full + partial


def our_dialogues(args, lap, forked=True):
    model, chat, _ = load(args)
    scripts, cuts, _ = workload(chat, args)
    return lambda: sample(model, chat, scripts, cuts if forked else [], args)


def our_update(args, lap, padded=False, sampled=False):
    """An update on the dialogues of `step` or on sampled ones. If padded, each is scored in a row
    of its own, by token_logprobs."""
    model, chat, optimizer = load(args)
    reference = exgrpo.load_reference(args, model, args.model)
    given = [] if sampled else random_dialogues(chat, args)
    scripts, cuts, _ = workload(chat, args)

    def pack(dialogues, budget, model):
        for batch in exgrpo.micro_batches([len(d.ids) for d in dialogues], budget):
            ids = exgrpo.pad_rows([dialogues[i].ids for i in batch], model.device)
            mask = exgrpo.pad_rows([dialogues[i].mask for i in batch], model.device)
            yield batch, types.SimpleNamespace(ids=ids, mask=mask)
    if padded:
        exgrpo.pack = pack
        exgrpo.tree_logprobs = lambda model, rows, temperature: exgrpo.token_logprobs(
            model, rows.ids, rows.mask, temperature)

    def work():
        dialogues = given or sample(model, chat, scripts, cuts, args)
        advantages = [[1.0 - 2.0 * (b % 2)] * len(d.replies) for b, d in enumerate(dialogues)]
        exgrpo.update(model, reference, optimizer, dialogues, advantages, [], args)
    return work


def converse(model, chat, scripts, args):
    """A group of dialogues for each script by transformers' generate, over the full vocabulary.
    Each turn reads all of them from their start."""
    dialogues = [exgrpo.Dialogue() for _ in scripts for _ in range(args.group_size)]
    for turn in range(len(scripts[0])):
        for b, dialogue in enumerate(dialogues):
            user = scripts[b // args.group_size][turn]
            dialogue.add_user(chat.later(user) if turn else chat.first(user))
        T = max(len(d.ids) for d in dialogues)  # left-padded
        ids = torch.tensor([[0] * (T - len(d.ids)) + d.ids for d in dialogues])
        mask = torch.tensor([[0] * (T - len(d.ids)) + [1] * len(d.ids) for d in dialogues])
        with torch.no_grad():
            output = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True,
                top_k=0, top_p=1.0, pad_token_id=0, min_new_tokens=args.max_new_tokens,
                max_new_tokens=args.max_new_tokens)
        for dialogue, new in zip(dialogues, output[:, T:].tolist()):
            dialogue.add_reply(new, chat)
    return dialogues


def their_dialogues(args, lap, forked=True):
    """Partial dialogues are sampled apart: generate cannot fork."""
    model, chat, _ = load(args, peer=True)
    full, _, partial = workload(chat, args)
    batches = [full, partial] if forked and partial else [full]
    return lambda: [converse(model, chat, scripts, args) for scripts in batches]


def their_update(args, lap, checkpointing=True, sampled=False):
    """The same by TRL's GRPOTrainer, whose group has full and partial dialogues."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    chat, members = load(args)[1], args.group_size * (1 + sampled)
    given = [] if sampled else random_dialogues(chat, args)
    full, _, partial = workload(chat, args)

    def rollout_func(prompts, trainer):
        dialogues = given or [dialogue for pair in zip(full, partial) for script in pair
                              for dialogue in converse(trainer.model, chat, [script], args)]
        starts = [d.mask.index(1) for d in dialogues]
        return {"prompt_ids": [d.ids[:n] for d, n in zip(dialogues, starts)], "logprobs": None,
                "completion_ids": [d.ids[n:] for d, n in zip(dialogues, starts)],
                "env_mask": [d.mask[n:] for d, n in zip(dialogues, starts)]}

    callback = TrainerCallback()
    callback.on_step_end = lap
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=args.device == "cpu", report_to=[],
        logging_strategy="no", disable_tqdm=True, beta=args.beta,
        learning_rate=1e-6, max_steps=1000, num_generations=members, temperature=1.0,
        per_device_train_batch_size=8, bf16=args.bf16, gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=args.questions * members // 8, max_completion_length=4096)
    GRPOTrainer(model=args.model, args=config, callbacks=[callback], rollout_func=rollout_func,
                reward_funcs=lambda completions, **_: [i % 2.0 for i in range(len(completions))],
                train_dataset=Dataset.from_dict({"prompt": [TEXT] * 4096})).train()


def loss(args, lap, chunked):
    """Forward and backward of the loss alone: 2,048 trained tokens, the head of gemma3-270m."""
    torch.set_default_device(args.device)
    head = torch.nn.Linear(640, 262144, bias=False)
    config = types.SimpleNamespace(get_text_config=lambda: None)
    model = types.SimpleNamespace(get_output_embeddings=lambda: head, config=config)
    hidden, targets = torch.randn(2048, 640, requires_grad=True), torch.arange(2048)
    if not chunked:
        exgrpo.LOGITS_HELD = sys.maxsize

    def work():
        exgrpo.head_logprobs(model, hidden, targets, 1.0).sum().backward()
        head.weight.grad = hidden.grad = None
    return work


# --------------------------------------------------------------------------------- the command line

RACES = {
    "sampling": [{"exgrpo": our_dialogues, "generate": their_dialogues}],
    "dialogue": [
        {"full dialogues, cache kept": functools.partial(our_dialogues, forked=False),
         "full, generate anew each turn": functools.partial(their_dialogues, forked=False)},
        {"full and forked partial": our_dialogues,
         "full and partial, generate apart": their_dialogues}],
    "step": [{"exgrpo.update": our_update,
              "exgrpo.update, padded": functools.partial(our_update, padded=True),
              "TRL, its default": their_update,
              "TRL, without checkpointing": functools.partial(their_update, checkpointing=False)}],
    "head": [{"loss, chunk by chunk": functools.partial(loss, chunked=True),
              "loss, all logits": functools.partial(loss, chunked=False)}],
    "whole": [{"exgrpo, whole step": functools.partial(our_update, sampled=True),
               "TRL, whole step": functools.partial(their_update, sampled=True)}]}
SETTINGS = {  # what differs from the defaults below
    "dialogue": {"questions": 1, "max_new_tokens": 48},
    "head": {"model": "the head of gemma3-270m"},
    "whole": {"questions": 2, "turns": 2, "max_new_tokens": 32, "micro_batch_tokens": 2048}}


def parse_args():
    parser = exgrpo.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("benchmark", nargs="?", choices=["grader", "ei", *RACES], default="grader")
    add("--model", default=exgrpo.TOY_STUDENT, help="local folder of the student")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="in training, bf16 is autocast")
    add("--threads", type=int, default=1, help="of each contender")
    add("--repeats", type=int, default=5, help="turns of each contender")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    for name, value in (("group-size", 8), ("turns", 5), ("questions", 4), ("max-new-tokens", 64),
                        ("micro-batch-tokens", None)):
        add(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    parser.set_defaults(lora_rank=0, gradient_checkpointing=False, updates=1, temperature=1.0,
                        beta=0.04, epsilon=0.2, aux_weight=0.0)
    parser.set_defaults(**SETTINGS.get(parser.parse_args().benchmark, {}))
    args = parser.parse_args()
    args.bf16 = args.dtype == "bf16"
    # 400: a tree of a prompt and four replies. 2048: more than the 8 rows of TRL.
    args.micro_batch_tokens = args.micro_batch_tokens or (400 if args.device == "cpu" else 2048)
    return args


def main():
    args = parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "TQDM_DISABLE": "1",
                   "PYTHONWARNINGS": "ignore", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if args.benchmark not in RACES:
        return grader() if args.benchmark == "grader" else stage1()
    print(f"{args.benchmark}: {os.path.basename(args.model)}, {args.dtype}, {args.threads} "
          f"thread(s), {machine(args.device)}, torch {torch.__version__}")
    for contenders in RACES[args.benchmark]:
        race(args, contenders)


if __name__ == "__main__":
    exgrpo.run(main)
