"""Benchmarks: each compares with a peer in the same run; a peer that is not installed is skipped
with a word.

    python tests/bench.py grader        # reward.py beside math-verify (pip install math-verify)
    python tests/bench.py ei            # 100,000 questions through ei.py, from a stub server
    python tests/bench.py sampling      # a group's replies, beside transformers' generate
    python tests/bench.py dialogue      # k turns, cache kept and forked, beside generate anew
    python tests/bench.py turns         # what a turn costs for k = 1, 2, 5, 10
    python tests/bench.py step          # the update, beside TRL's trainer (pip install trl)
    python tests/bench.py head          # the loss over gemma3's 262,144 words, beside all logits
    python tests/bench.py whole         # sampling and update, beside TRL with a rollout_func
    python tests/bench.py growth        # a step for G = 4..32 and k = 1..10
    python tests/bench.py limit         # beside the limits of this machine's memory and products

    --model FOLDER  --dtype fp32|bf16  --threads N  --repeats N  --device cpu|cuda

Contenders run in processes of their own and take turns, so that a busy machine is busy for all;
figures are medians of CPU seconds or, with --device cuda, of seconds on the clock and of the GPU's
memory. Without --model it is $EXGRPO_MODELS/smollm2, or else the toy student.
"""
import argparse
import contextlib
import functools
import http.server
import io
import json
import os
import platform
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

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import ei  # noqa: E402
import exgrpo  # noqa: E402
import reward  # noqa: E402


def machine(device="cpu"):
    """The processor's name, to stand beside every figure."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(": ")[1].strip() for line in file
                        if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def last_number(output, gold):
    """The grader of many scripts: the last number of the output, compared as a float."""
    numbers = re.findall(r"-?\d+\.?\d*", output)
    try:
        return bool(numbers) and float(numbers[-1]) == float(gold)
    except ValueError:
        return False


def grader():
    """Accuracy, wrong answers paid and time on the number and math cases of data/answers.txt.

    reward.py was written against this table: its own row is a regression figure, not an estimate.
    """
    from test_reward import CASES
    cases = [case for case in CASES if case[1] in ("number", "math")]
    graders = {"reward.py": reward.is_correct,
               "last number, float ==": lambda output, gold, kind: last_number(output, gold)}
    try:
        from math_verify import parse, verify
        graders["math-verify"] = lambda output, gold, kind: verify(parse(f"${gold}$"),
                                                                   parse(output))
    except ImportError:
        print("math-verify is not installed (pip install math-verify): skipped")
    print(f"{len(cases)} cases, 1 thread, {machine()}\n"
          f"{'grader':24}{'right':>8}{'wrong paid':>12}{'s per 1,000':>13}")
    for name, grade in graders.items():
        start = time.perf_counter()
        paid = [grade(output, gold, kind) for _, kind, gold, _, output in cases]
        seconds = (time.perf_counter() - start) / len(cases) * 1000
        marks = [mark == "+" for _, _, _, mark, _ in cases]
        right = sum(p == m for p, m in zip(paid, marks)) / len(cases)
        wrong = sum(p and not m for p, m in zip(paid, marks))
        print(f"{name:24}{right:8.1%}{wrong:12}{seconds:13.3f}")


class Stub(http.server.BaseHTTPRequestHandler):
    """Declines after `delay` seconds; `slots` answers at a time, and how long they were busy."""
    protocol_version = "HTTP/1.1"
    body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "DECLINE"}}]}).encode()
    delay, slots, busy = 0.0, threading.Semaphore(16), []

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.slots:
            start = time.perf_counter()
            time.sleep(self.delay)
            self.busy.append(time.perf_counter() - start if self.delay else 0)
        # one write, or the client waits for the second packet
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(self.body) + self.body)


def serve():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def stream(url, n, folder):
    """n questions through ei.py -> seconds; a line of memory every tenth. Each question is one
    request (R1, declined)."""
    data, out = os.path.join(folder, f"q{n}.jsonl"), os.path.join(folder, f"p{n}.jsonl")
    with open(data, "w") as file:
        for i in range(n):
            row = {"id": f"q{i}", "question": f"What is {i} and 1?", "answer": str(i + 1),
                   "answer_type": "number", "rationale": "Add."}
            file.write(json.dumps(row) + "\n")
    sys.argv = ["ei.py", "--teacher", url, "--data", data, "--out", out, "--rules", "R1",
                "--concurrency", "16"]
    select, done = ei.select, [0]

    def counted(student, lines, tau_hard):
        done[0] += 1
        if done[0] % max(1, n // 10) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{done[0]:9,} questions: {peak:.0f} MiB", file=sys.__stdout__, flush=True)
        return select(student, lines, tau_hard)
    ei.select, start = counted, time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ei.main()
    ei.select = select
    return time.perf_counter() - start


def stage1(n=100_000):
    """Memory while the questions stream, and how busy a slower server's slots are kept."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = stream(serve(), n, folder)
        print(f"{n / seconds:.0f} questions a second, {machine()}")
        Stub.delay, Stub.busy = 0.2, []
        seconds = stream(serve(), 800, folder)
        print(f"slots in use: {sum(Stub.busy) / seconds:.1f} of 16 on average, {seconds:.1f} s")


# ------------------------------------------------------------- contenders, each in its own process

class Lap:
    """with lap: work. Waits for its turn before, reports its CPU and wall seconds behind."""

    def __init__(self, device):
        self.gpu = device == "cuda"

    def clocks(self):
        if self.gpu:
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def __enter__(self):
        print("READY", flush=True)
        if not sys.stdin.readline().strip():
            print("PEAK", torch.cuda.max_memory_allocated() / 2 ** 30 if self.gpu else
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, flush=True)
            os._exit(0)
        self.start = self.clocks()

    def __exit__(self, *_):
        print("LAP", *(end - start for start, end in zip(self.start, self.clocks())), flush=True)


def listen(process, word):
    """The numbers behind the next line that begins with this word; None if the process ended."""
    for line in process.stdout:
        if line.startswith(word):
            return [float(x) for x in line.split()[1:]]


def race(args, contenders):
    """Lets contenders (names) take turns after a warm-up each and prints their medians, the first
    one's ratio to each, and peak memory. Returns {name: seconds}."""
    runners = {}
    for name in contenders:
        flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in vars(args).items()
                 if flag not in ("benchmark", "name")]
        runners[name] = subprocess.Popen([sys.executable, __file__, "contend", *flags, "--name",
                                          name], text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    laps, peaks = {name: [] for name in contenders}, {}
    for turn in range(args.repeats + 1):
        for name, runner in list(runners.items()):
            lap = None
            if listen(runner, "READY") is not None:
                print("go", file=runner.stdin, flush=True)
                lap = listen(runner, "LAP")
            if lap is None:
                words = runner.stderr.read().strip().splitlines() or ["no word"]
                print(f"{name}: skipped ({words[-1]})")
                del runners[name]
                continue
            if turn:  # the first one warms up
                laps[name].append(lap)
    for name, runner in runners.items():
        listen(runner, "READY")
        runner.stdin.close()
        peaks[name] = listen(runner, "PEAK")[0]
        runner.wait()
    return report(runners, laps, peaks, args.device == "cuda")


def report(names, laps, peaks, clock):
    """clock: compare seconds on the clock in place of CPU seconds."""
    medians = {name: statistics.median(lap[clock] for lap in laps[name]) for name in names}
    if not medians:
        return medians
    first = next(iter(medians))
    units = ("CPU s", "wall s")[::-1 if clock else 1]
    print(f"{'':34}{units[0]:>9}{'min..max':>16}{units[1]:>9}{'peak GiB':>10}{'time':>7}"
          f"{'peak':>7}")
    for name, median in medians.items():
        spread = "{:.2f}..{:.2f}".format(*(f(lap[clock] for lap in laps[name]) for f in (min, max)))
        other = statistics.median(lap[not clock] for lap in laps[name])
        print(f"{name:34}{median:9.2f}{spread:>16}{other:9.2f}{peaks[name]:10.2f}"
              f"{median / medians[first]:7.2f}{peaks[name] / peaks[first]:7.2f}", flush=True)
    print()
    return medians


def model_folder(args):
    """The folder of the model to measure."""
    if args.model and not os.path.isdir(args.model):
        sys.exit(f"error: --model {args.model}: there is no such folder")
    local = os.path.join(os.environ.get("EXGRPO_MODELS", ""), "smollm2")
    toy = os.path.join(os.path.dirname(HERE), "toy", "student")
    return next(filter(os.path.isdir, filter(None, (args.model, local, toy))))


def load(args):
    """(model, chat) as exgrpo.py loads them, and the settings of a step."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, chat = exgrpo.load_model(model_folder(args), torch.device(args.device))
    chat.stop_ids = []  # every reply has its full length: equal work for all
    return model, chat, types.SimpleNamespace(
        group_size=args.group, max_new_tokens=args.new_tokens, temperature=1.0, turns=args.turns,
        bf16=args.dtype == "bf16", micro_batch_tokens=args.micro_batch_tokens, beta=0.04,
        epsilon=0.2, aux_weight=0.0, updates=1, partial="forked", seed=0)


TEXT = ("Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did she sell altogether in April and May? ")


def user_turn(chat, n_tokens, seed=0):
    """A user's words of about n_tokens tokens."""
    words = (TEXT.split() * 20)[seed:]
    n = next(n for n in range(1, len(words)) if len(chat.encode(" ".join(words[:n]))) >= n_tokens)
    return " ".join(words[:n])


def ragged_prompts(chat):
    """Four prompts of about 120 tokens."""
    lengths = [n - len(chat.first("")) for n in (121, 112, 128, 117)]
    return [chat.first(user_turn(chat, n, seed)) for seed, n in enumerate(lengths)]


def hf_generate(model, prompts, copies, new_tokens):
    """transformers' generate over the full vocabulary, left-padded -> lists of new ids."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        output = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0,
                                min_new_tokens=new_tokens, max_new_tokens=new_tokens,
                                num_return_sequences=copies, pad_token_id=0)
    return output[:, T:].tolist()


def as_peer(args, model):
    """For generate, bf16 means bf16 weights: faster there than autocast over fp32 ones."""
    return model.to(torch.bfloat16) if args.dtype == "bf16" else model


def contend_sample(args, lap):
    model, chat, settings = load(args)
    prompts = ragged_prompts(chat)
    while True:
        with lap, exgrpo.autocast(settings, model.device), exgrpo.packed(model):
            exgrpo.sample(model, prompts, max_new_tokens=args.new_tokens, temperature=1.0,
                          stop_ids=[], group_size=args.group,
                          generator=torch.Generator(model.device))


def contend_generate(args, lap):
    model, chat, _ = load(args)
    model, prompts = as_peer(args, model), ragged_prompts(chat)
    while True:
        with lap:
            hf_generate(model, prompts, args.group, args.new_tokens)


def scripts_of(chat, args):
    """One question's turns: k probes and the question, about 60 tokens each."""
    turns = [user_turn(chat, 60, seed) for seed in range(args.turns + 1)]
    return turns, args.turns // 2  # k'


def contend_dialogue(args, lap, forked):
    model, chat, settings = load(args)
    (*probes, final), cut = scripts_of(chat, args)
    while True:
        with lap, exgrpo.autocast(settings, model.device), exgrpo.packed(model):
            rng = torch.Generator(model.device).manual_seed(0)
            exgrpo.converse(model, chat, [[*probes, final]], settings, rng,
                            [cut] if forked else ())


def render_and_generate(model, chat, script, args):
    """The peer: G chats as text, rendered anew at each turn -> what was said in each."""
    chats = [[] for _ in range(args.group)]
    for user in script:
        prompts = []
        for said in chats:
            said.append(user)
            prompts.append(chat.prompt(said))
        for said, new in zip(chats, hf_generate(model, prompts, 1, args.new_tokens)):
            said.append(chat.decode(new))
    return chats


def contend_rendered(args, lap, apart):
    model, chat, _ = load(args)
    model = as_peer(args, model)
    (*probes, final), cut = scripts_of(chat, args)
    while True:
        with lap:
            render_and_generate(model, chat, [*probes, final], args)
            if apart:
                render_and_generate(model, chat, [*probes[:cut], final], args)


def single_turns(chat, args):
    """The dialogues of the training step: four groups of replies to ragged prompts."""
    generator, dialogues = torch.Generator().manual_seed(0), []
    for prompt in ragged_prompts(chat):
        for _ in range(args.group):
            dialogue = exgrpo.Dialogue()
            dialogue.add_user(list(prompt))
            dialogue.add_reply(torch.randint(5, 250, (args.new_tokens,), generator=generator)
                               .tolist(), chat, [0.0] * args.new_tokens)
            dialogue.mask[-1] = 0
            dialogues.append(dialogue)
    return dialogues


def updater(args, model, settings):
    """(dialogues) -> one ExGRPO update with a frozen reference; no advantage is 0."""
    reference = exgrpo.load_model(model_folder(args), model.device)[0]
    exgrpo.freeze(reference, settings.bf16)
    optimizer = exgrpo.adamw(model, 1e-6)

    def update(dialogues):
        advantages = torch.where(torch.arange(len(dialogues)) % 2 == 0, 1.0, -1.0).double()
        exgrpo.update(model, lambda: contextlib.nullcontext(reference), optimizer, dialogues,
                      advantages, [], settings, "bench")
    return update


def contend_update(args, lap):
    model, chat, settings = load(args)
    update, dialogues = updater(args, model, settings), single_turns(chat, args)
    while True:
        with lap:
            update(dialogues)


def contend_padded(args, lap):
    """The same update with the padded form, token_logprobs, in place of the trees."""

    def plant_batches(dialogues, model, budget):
        for batch in exgrpo.micro_batches([len(d.ids) for d in dialogues], budget):
            yield batch, types.SimpleNamespace(**dict(zip(("ids", "mask"), exgrpo.pad_rows(
                [dialogues[i].ids for i in batch], [dialogues[i].mask for i in batch],
                model.device))))
    exgrpo.plant_batches = plant_batches
    exgrpo.tree_logprobs = lambda model, rows, temperature: exgrpo.token_logprobs(
        model, rows.ids, rows.mask, temperature)
    contend_update(args, lap)


def contend_head(args, lap, chunked):
    """Forward and backward of the loss alone: 2,048 trained tokens, the head of gemma3-270m."""
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    head = torch.nn.Linear(640, 262144, bias=False)
    config = types.SimpleNamespace(get_text_config=lambda: None)
    model = types.SimpleNamespace(get_output_embeddings=lambda: head, config=config)
    hidden, targets = torch.randn(2048, 640, requires_grad=True), torch.arange(2048)

    def all_logits(model, hidden, targets, temperature):
        logits = exgrpo.head(model, hidden) / temperature
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    logps = exgrpo.head_logps if chunked else all_logits
    while True:
        with lap:
            logps(model, hidden, targets, 1.0).sum().backward()
            head.weight.grad = hidden.grad = None


def trl_trainer(args, lap, rollout, members, checkpointing=True):
    """TRL's GRPOTrainer over dialogues that rollout(trainer) -> (prompts, completions, masks)
    returns; a lap is a step. members: dialogues of a group."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Laps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            lap.__enter__()

        def on_step_end(self, *_, **__):
            lap.__exit__()

    def rollout_func(prompts, trainer):
        prompt_ids, completion_ids, masks = rollout(trainer.model)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None,
                "env_mask": masks}

    def alternate(completions, **_):
        return [float(i % 2) for i in range(len(completions))]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=args.device == "cpu", report_to=[],
        logging_strategy="no", save_strategy="no", disable_tqdm=True, beta=0.04,
        learning_rate=1e-6, max_steps=1000,
        num_generations=members, per_device_train_batch_size=8, temperature=1.0,
        gradient_accumulation_steps=args.questions * members // 8, bf16=args.dtype == "bf16",
        gradient_checkpointing=checkpointing, max_completion_length=4096)
    GRPOTrainer(model=model_folder(args), reward_funcs=alternate, args=config,
                train_dataset=Dataset.from_dict({"prompt": [TEXT] * 4096}),
                rollout_func=rollout_func, callbacks=[Laps()]).train()


def contend_trl(args, lap, checkpointing):
    """TRL's training part alone: the dialogues of `step` are given, not sampled."""
    _, chat, _ = load(args)
    dialogues = single_turns(chat, args)
    starts = [d.mask.index(1) for d in dialogues]
    given = ([d.ids[:n] for d, n in zip(dialogues, starts)],
             [d.ids[n:] for d, n in zip(dialogues, starts)],
             [d.mask[n:] for d, n in zip(dialogues, starts)])
    trl_trainer(args, lap, lambda model: given, args.group, checkpointing)


def contend_whole(args, lap):
    """A whole step: full and forked partial dialogues of some questions, then the update."""
    model, chat, settings = load(args)
    update = updater(args, model, settings)
    (*probes, final), cut = scripts_of(chat, args)
    while True:
        with lap:
            rng = torch.Generator(model.device).manual_seed(0)
            with exgrpo.autocast(settings, model.device), exgrpo.packed(model):
                full, partial = exgrpo.converse(
                    model, chat, [[*probes, final]] * args.questions, settings, rng,
                    [cut] * args.questions)
            update(full + partial)


def contend_trl_whole(args, lap):
    """The same dialogues by TRL: generate anew each turn, both scenarios sampled apart."""
    _, chat, _ = load(args)
    (*probes, final), cut = scripts_of(chat, args)

    def rollout(model):
        outputs = [], [], []
        for _ in range(args.questions):
            for script in ([*probes, final], [*probes[:cut], final]):
                for said in render_and_generate(model, chat, script, args):
                    dialogue = exgrpo.Dialogue()
                    for turn, text in enumerate(said):
                        if turn % 2:
                            dialogue.add_reply(chat.encode(text) + [chat.end_id], chat)
                        else:
                            dialogue.add_user((chat.later if turn else chat.first)(text))
                    n = len(chat.first(script[0]))
                    for column, ids in zip(outputs, (dialogue.ids[:n], dialogue.ids[n:],
                                                     dialogue.mask[n:])):
                        column.append(ids)
        return outputs
    trl_trainer(args, lap, rollout, 2 * args.group)


CONTENDERS = {
    "exgrpo.sample": contend_sample,
    "generate": contend_generate,
    "full dialogues, cache kept": functools.partial(contend_dialogue, forked=False),
    "full, generate anew each turn": functools.partial(contend_rendered, apart=False),
    "full and forked partial": functools.partial(contend_dialogue, forked=True),
    "full and partial, generate apart": functools.partial(contend_rendered, apart=True),
    "exgrpo.update": contend_update,
    "exgrpo.update, padded": contend_padded,
    "TRL, its default": functools.partial(contend_trl, checkpointing=True),
    "TRL, without checkpointing": functools.partial(contend_trl, checkpointing=False),
    "loss, chunk by chunk": functools.partial(contend_head, chunked=True),
    "loss, all logits": functools.partial(contend_head, chunked=False),
    "exgrpo, whole step": contend_whole,
    "TRL, whole step": contend_trl_whole,
}


def dialogue(args):
    args.new_tokens = 48
    race(args, ["full dialogues, cache kept", "full, generate anew each turn"])
    race(args, ["full and forked partial", "full and partial, generate apart"])


def turns(args):
    args.new_tokens = 48
    print("seconds a turn, cache kept (k probes and the question):")
    for args.turns in (1, 2, 5, 10):
        for name, seconds in race(args, ["full dialogues, cache kept"]).items():
            print(f"k = {args.turns:2}: {seconds / (args.turns + 1):.2f} s a turn", flush=True)


def step(args):
    # Trees of four replies and their prompt, or, where memory is no matter, TRL's 8 rows.
    args.micro_batch_tokens = 400 if args.device == "cpu" else 2048
    race(args, ["exgrpo.update", "exgrpo.update, padded", "TRL, its default",
                "TRL, without checkpointing"])


def whole(args):
    args.new_tokens, args.questions, args.turns = 32, 2, 2
    args.micro_batch_tokens = 2048  # about 8 dialogues, as TRL takes them
    race(args, ["exgrpo, whole step", "TRL, whole step"])


def growth(args):
    args.questions, args.turns, args.new_tokens, args.micro_batch_tokens = 2, 2, 32, 1024
    for args.group in (4, 8, 16, 32):
        print(f"G = {args.group}, k = {args.turns}")
        race(args, ["exgrpo, whole step"])
    args.group = 8
    for args.turns in (1, 2, 5, 10):
        print(f"G = {args.group}, k = {args.turns}")
        race(args, ["exgrpo, whole step"])


def limit(args):
    """Decoding and training beside the matrix products of the model's own shapes, and a copy."""
    model, chat, settings = load(args)
    dtype, lap = torch.bfloat16 if settings.bf16 else torch.float32, Lap(args.device)

    def seconds(work):
        times = []
        for _ in range(args.repeats + 1):
            start = lap.clocks()[lap.gpu]
            work()
            times.append(lap.clocks()[lap.gpu] - start)
        return statistics.median(times[1:])
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    n_weights = sum(w.numel() for w in weights)
    buffer = torch.zeros(2 ** 27, device=model.device)
    copy = 2 * buffer.nbytes / seconds(lambda: buffer.clone().copy_(buffer)) * 2

    def products(rows, works):
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=dtype, device=model.device)
                  for w in weights}
        with torch.no_grad():
            return seconds(lambda: [work(inputs[w.shape[1]]) for work, w in zip(works, weights)])
    many = products(1024, [functools.partial(torch.nn.functional.linear, weight=w)
                           for w in weights])
    with exgrpo.autocast(settings, model.device), exgrpo.packed(model):
        bound = products(32, layers)
    prompts = ragged_prompts(chat)

    def decode(n):
        with exgrpo.autocast(settings, model.device), exgrpo.packed(model):
            exgrpo.sample(model, prompts, max_new_tokens=n, temperature=1.0, stop_ids=[],
                          group_size=8, generator=torch.Generator(model.device))
    ours = (seconds(lambda: decode(33)) - seconds(lambda: decode(1))) / 32
    update, dialogues = updater(args, model, settings), single_turns(chat, args)
    places = sum(int(forest.ids.numel()) for _, forest in exgrpo.plant_batches(
        dialogues, model, settings.micro_batch_tokens))
    head = weights[-1].numel()
    trained = sum(sum(d.mask) for d in dialogues)
    flops = 8 * ((n_weights - head) * places + head * trained)  # forward twice, backward twice that
    least, took = flops / (2 * n_weights * 1024 / many), seconds(lambda: update(dialogues))
    print(f"copy {copy / 1e9:.0f} GB/s; products {2e-9 * n_weights * 32 / bound:.0f} GFLOP/s at 32 "
          f"rows, {2e-9 * n_weights * 1024 / many:.0f} at 1024\n"
          f"decode step, 32 rows: {ours * 1e3:.0f} ms; its products alone {bound * 1e3:.0f} ms, "
          f"its weights read once {n_weights * weights[0].element_size() / copy * 1e3:.0f} ms: "
          f"{bound / ours:.0%} of the bound\n"
          f"training step: {took:.1f} s; its products at the speed of 1024 rows {least:.1f} s: "
          f"{least / took:.0%} of the bound\n")


BENCHMARKS = {"grader": lambda args: grader(), "ei": lambda args: stage1(),
              "sampling": lambda args: race(args, ["exgrpo.sample", "generate"]),
              "dialogue": dialogue, "turns": turns, "step": step,
              "head": lambda args: race(args, ["loss, chunk by chunk", "loss, all logits"]),
              "whole": whole, "growth": growth, "limit": limit}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("benchmark", nargs="*", metavar="|".join(BENCHMARKS),
                        help="default: grader")
    parser.add_argument("--model", default="", help="local folder, see above")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, value in (("group", 8), ("turns", 5), ("questions", 4), ("new-tokens", 64),
                        ("micro-batch-tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not set(args.benchmark) <= {*BENCHMARKS, "contend"}:
        parser.error(f"no such benchmark; choose from {', '.join(BENCHMARKS)}")
    return args


if __name__ == "__main__":
    args = parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    if args.benchmark == ["contend"]:
        CONTENDERS[args.name](args, Lap(args.device))
    for benchmark in args.benchmark or ["grader"]:
        if benchmark not in ("grader", "ei"):
            what = "gemma3's head, fp32" if benchmark == "head" else (
                f"{os.path.basename(model_folder(args))}, {args.dtype}")
            print(f"{benchmark}: {what}, {args.threads} thread(s), "
                  f"{machine(args.device)}, torch {torch.__version__}")
        BENCHMARKS[benchmark](types.SimpleNamespace(**vars(args)))
