"""Makes toy/: word problems, a teacher and a student, all from a seed.

    python toy/make.py     # 40 minutes on two cores of a Zen 4, longer on older ones; no pictures

The world of the problems is in world.py. Its ORACLE knows the probe of every rule: the teacher
learns from it, and ei_test.jsonl is made of it.

    teacher   1.5 M parameters: answers ei.py's real prompts, all probes and questions, with errors
    student   0.7 M parameters: has read forward problems only, mostly answered without reasoning if
              there are two events. It never saw a story told backwards, so it has the reversal
              curse, which `python evaluate.py` measures

Train, val and test share no problem. The first two numbers of a test problem are one of TEST_PAIRS,
its names are TEST_NAMES, and its two events may be a pair that no training question has (HELD_OUT).
The student has read all names, events and sums, but no test pair of numbers inside a story.
Settings are chosen on val, whose problems are drawn as those of test are.
"""
import argparse
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOY = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TOY)
sys.path.insert(0, ROOT)
import ei  # noqa: E402
import exgrpo  # noqa: E402
import reward  # noqa: E402
from world import APPLY, DO, HELD_OUT, NAMES, ORACLE, TEST_NAMES, TEST_PAIRS, draw  # noqa: E402


# ------------------------------------------------------------------------------ what is read of it

def item(told):
    question, rationale, answer_type, answer = told
    return {"question": question, "answer": str(answer), "answer_type": answer_type,
            "rationale": rationale}


def small_talk(rng):
    """Questions about numbers alone: sums with all pairs, comparisons."""
    v, n, op = int(rng.integers(1, 21)), int(rng.integers(1, 10)), str(rng.choice(list(DO)))
    kind = rng.random()
    if kind < 0.7:
        w = APPLY[op](v, n)
        if not 1 <= w <= 20:
            return small_talk(rng)
        return item((f"How much is {v} {op} {n}?", f"It is {v} {op} {n} = {w}.", "number", w))
    if kind < 0.85:
        return item((f"Is {v} more than {n}?", f"Compare {v} and {n}.", "yesno",
                     "yes" if v > n else "no"))
    numbers = [int(x) for x in rng.choice(20, 3, replace=False) + 1]
    probe, letter, *_ = ei.lettered("Which number is the largest?", numbers, np.argmax(numbers))
    return item((probe, f"The largest is {max(numbers)}.", "choice", letter))


def story_talk(rng, one_step):
    """A story told forwards; its question wants a number, or yes or no, or an option."""
    problem = draw(rng, NAMES + TEST_NAMES, n_events=1 + (rng.random() > one_step))
    question, rationale, _, result = problem.forward()
    kind, numbers = rng.random(), [result, *rng.permutation([x for x in range(1, 21)
                                                             if x != result])[:2]]
    if kind < 0.7:
        return item((question, rationale, "number", result))
    if kind < 0.85:
        said = numbers[int(rng.integers(2))]
        return item((f"{question} Is it {said}?", rationale, "yesno",
                     "yes" if said == result else "no"))
    numbers = [int(x) for x in rng.permutation(numbers)]
    question, letter, *_ = ei.lettered(question, numbers, numbers.index(result))
    return item((question, rationale, "choice", letter))


def student_dialogue(rng, chat):
    """Stories told forwards, and small talk. Most answers that take two sums do without them, and
    are wrong: there SFT, forwards too, has something to teach."""
    turns = [small_talk(rng) if rng.random() < 0.3 else story_talk(rng, 0.6)
             for _ in range(rng.integers(1, 7))]
    for turn in turns:
        if turn["rationale"].count("=") > 1 and rng.random() < 0.8:
            turn["rationale"] = ""
    return exgrpo.teacher_dialogue(chat, turns)


def teacher_talk(rng, chat):
    """Probes of a problem, then the problem itself (as in Eq. 1), and small talk."""
    turns = []
    for _ in range(rng.integers(1, 4)):
        problem = draw(rng, NAMES)
        told = [ORACLE[str(rng.choice(list(ORACLE)))](problem), problem.forward()]
        turns += [item(one) for one in told if one]
        turns += [small_talk(rng)] * (rng.random() < 0.5)
    return exgrpo.teacher_dialogue(chat, turns)


def teacher_probe(rng, chat, rule, brief=False):
    """The reply to ei.py's prompt; brief: to the rule's name in place of the instructions. Trained,
    too, are the prompt's solution and result, which follow from the question."""
    problem, dialogue = draw(rng, NAMES), exgrpo.Dialogue()
    prompt, told = ei.make_prompt(rule, item(problem.forward())), ORACLE[rule](problem)
    if brief:
        prompt = [f"The kind of probe: {ei.RULES[rule].name}.\n\n{prompt[-1]}"]
    dialogue.add_user(chat.prompt(prompt))
    n = len(chat.encode(prompt[-1].partition("SOLUTION:")[2]))
    dialogue.mask[-2 - n:-2] = [1] * n  # the turn's end and the reply's opening are behind it
    dialogue.add_reply(chat.reply(ei.REPLY.format(ei.Example(*told[:3], str(told[3])))
                                  if told else "DECLINE"), chat)
    return dialogue


# A lesson is what one step learns: groups of dialogues. Those of a group may begin alike.

def student_lesson(rng, chat):
    return [[student_dialogue(rng, chat) for _ in range(8)]]


def first_teacher_lesson(rng, chat):
    """To copy and to calculate, for all ten rules, without the long instructions."""
    return [[teacher_probe(rng, chat, rule, brief=True) for rule in 2 * list(ORACLE)]
            + [teacher_talk(rng, chat) for _ in range(2)]]


def second_teacher_lesson(rng, chat):
    """ei.py's prompts as they are, of four rules; the hard ones are drawn twice as often."""
    rules = rng.choice(list(ORACLE) + ["R2", "R6", "R7", "R8"], 4, replace=False)
    return [[teacher_probe(rng, chat, str(rule)) for _ in range(5)] for rule in rules] + [
        [teacher_talk(rng, chat) for _ in range(3)]]


# ------------------------------------------------------------------------- tokenizer and two models

WORD = r" ?[A-Za-z]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]|\s"
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
ROPE = {"rope_type": "default", "rope_theta": 500.0}
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]


def all_texts():
    """Enough of what is said in this world to hold every word of it, with and without a space."""
    rng = np.random.default_rng(0)
    yield ei.REPLY.format(ei.Example("x", "x", "x", "x")) + " declined"
    yield "DECLINE"
    for sentence in reward.INSTRUCTION.values():
        yield f" The answer is x. {sentence}\n{sentence}"
    for rule in ei.RULES:
        for answer_type in ("number", "yesno"):
            yield from ei.make_prompt(rule, item(("x", "x", answer_type, "1")))
    for _ in range(2000):
        problem = draw(rng, NAMES + TEST_NAMES)
        for told in [rule(problem) for rule in ORACLE.values()]:
            for text in item(told).values() if told else ():
                yield f"{text} {text}"
        yield from small_talk(rng).values()
        yield from story_talk(rng, 0.5).values()


def make_tokenizer(texts):
    """A token is a word or a number with the space in front of it: ids decode to the very text."""
    split = pre_tokenizers.Split(Regex(WORD), "isolated")
    found = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    numbers = {space + str(n) for n in range(100) for space in ("", " ")}
    tokens = SPECIAL + sorted(found | numbers)
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, SPECIAL[3]))
    core.pre_tokenizer, core.decoder = split, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[0], unk_token=SPECIAL[3],
        additional_special_tokens=SPECIAL[1:3])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer, width, layers, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=width // 32, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, rope_parameters=ROPE))


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon in fp32: 25 times as fast on a CPU without bf16 products."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                momentum = self.state[w].setdefault("momentum", torch.zeros_like(w))
                momentum.lerp_(w.grad, 0.05)
                x = w.grad.lerp(momentum, 0.95)
                x = x.T / x.norm() if x.shape[0] > x.shape[1] else x / x.norm()
                for _ in range(5):  # Newton-Schulz: all singular values go to about 1
                    xx = x @ x.T
                    x = 3.4445 * x + (2.0315 * xx @ xx - 4.775 * xx) @ x
                x = x if x.shape == w.shape else x.T
                w.mul_(1 - 0.01 * group["lr"])
                w.sub_(x, alpha=group["lr"] * max(1, w.shape[0] / w.shape[1]) ** 0.5)


def shared_backward(model, dialogues, weight):
    """exgrpo.sft_backward of dialogues that begin with the same long prompt. It is read once, and
    they all attend to its keys and values: much less work than in exgrpo's trees."""
    n = len(os.path.commonprefix([dialogue.ids for dialogue in dialogues]))
    cache = model.model(torch.tensor([dialogues[0].ids[:n]]), use_cache=True).cache
    for layer in cache.layers:
        layer.keys = layer.keys.expand(len(dialogues), -1, -1, -1)
        layer.values = layer.values.expand(len(dialogues), -1, -1, -1)
    ids = exgrpo.pad_rows([dialogue.ids[n:] for dialogue in dialogues], "cpu")
    keep = exgrpo.pad_rows([dialogue.mask[n:] for dialogue in dialogues], "cpu")[:, 1:].bool()
    hidden = model.model(ids[:, :-1], cache=cache).last_hidden_state
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]), ids[:, 1:][keep])
    (weight * loss).backward()
    return float(loss.detach())


def learn(model, groups):
    """Adds the gradient of the mean NLL of all trained tokens; returns the mean NLL."""
    args, loss = argparse.Namespace(micro_batch_tokens=600, bf16=False), 0.0
    counts = [sum(sum(dialogue.mask) for dialogue in group) for group in groups]
    for group, count in zip(groups, counts):
        weight = count / sum(counts)
        alike = len(os.path.commonprefix([dialogue.ids for dialogue in group])) > 100
        loss += weight * (shared_backward(model, group, weight) if alike else
                          exgrpo.sft_backward(model, group, args, weight))
    return loss


def pretrain(model, chat, lessons, steps, muon):
    """Each lesson gets as many steps. By Muon the teacher, who has much to learn: it took half of
    AdamW's steps to the same loss. The student by AdamW, which goes on with it in exgrpo.py."""
    rng = np.random.default_rng(1)
    matrices = [w for w in model.model.layers.parameters() if w.ndim == 2] if muon else []
    others = [w for w in model.parameters() if not any(w is matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=2e-3, weight_decay=0.01)]
    if muon:
        optimizers.append(Muon(matrices, {"lr": 0.02}))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(  # up, level, down
        (step + 1) / 50, 1.0, 2.02 - 2 * step / steps)) for optimizer in optimizers]
    with tqdm(range(steps)) as bar:
        for step in bar:
            loss = learn(model, lessons[step * len(lessons) // steps](rng, chat))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for mover in optimizers + schedules:
                mover.step()
            model.zero_grad()
            bar.set_postfix(loss=f"{loss:.3f}")


# ---------------------------------------------------------------------------------------- the files

def write(name, rows):
    with open(os.path.join(TOY, name), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def problems(rng, n, names, test, others=()):
    """n problems, no two with the same question, and none that `others` hold. Half of those for
    training have two events: what is seldom sampled is seldom paid."""
    found, known = {}, {problem.forward()[0] for problem in others}
    while len(found) < n:
        problem = draw(rng, names, test, None if test else 1 + len(found) % 2)
        events, numbers = zip(*problem.events)
        # R1 and R6 make a number one less: that must not give a probe a test pair.
        leak = TEST_PAIRS[problem.start, numbers[0] - 1]
        if problem.forward()[0] not in known and (test or events not in HELD_OUT and not leak):
            found[problem.forward()[0]] = problem
    return list(found.values())


def questions(name, told):
    return [{"id": f"{name}-{i}", **item(one)} for i, one in enumerate(told)]


def write_tests(name, told, n_ei):
    """The problems forwards, and told backwards, and ORACLE's probes of the first n_ei of them."""
    write(f"{name}.jsonl", questions(name, [problem.forward() for problem in told]))
    write(f"{name}_reversed.jsonl", questions(
        f"{name}-reversed".removeprefix("test-"), [problem.backward() for problem in told]))
    rows = questions(f"{name}-ei".removeprefix("test-"), [p.forward() for p in told[:n_ei]])
    for row, problem in zip(rows, told):
        row |= {"kept": True, "probes": [], "declined": []}
        for rule, tell in ORACLE.items():
            probe = tell(problem)
            if probe is None:
                row["declined"].append(rule)
                continue
            probe = item(probe)
            row["probes"].append({"rule": rule, "probe": probe.pop("question"), **probe,
                                  "consistent": True, "student_correct": None})
    write(f"ei_{name}.jsonl", [{"ei": {"teacher": "toy/make.py"}}, *rows])


def write_data():
    rng = np.random.default_rng(2)
    train = problems(rng, 480, NAMES, test=False)
    test = problems(rng, 600, TEST_NAMES, test=True)
    val = problems(rng, 300, TEST_NAMES, test=True, others=test)
    write("train.jsonl", questions("train", [problem.forward() for problem in train]))
    write_tests("test", test, n_ei=75)
    write_tests("val", val, n_ei=40)


LESSONS = {  # model: (its width, its lessons, steps in all, by Muon?)
    "student": (128, [student_lesson], 1800, False),
    "teacher": (192, 2 * [first_teacher_lesson] + [second_teacher_lesson], 3000, True)}


def write_model(name):
    torch.set_num_threads(1)  # tiny matrices gain nothing from a second one
    width, *lessons = LESSONS[name]
    tokenizer = make_tokenizer(all_texts())
    model = make_model(tokenizer, width, layers=3, seed=0)
    chat = exgrpo.Chat(tokenizer, model)
    print(f"{name}: {model.num_parameters():,} parameters")
    pretrain(model, chat, *lessons)
    os.makedirs(os.path.join(TOY, name), exist_ok=True)
    exgrpo.save_model(model, chat, os.path.join(TOY, name))


def main():
    write_data()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, spawn) as pool:  # side by side, a core each
        list(pool.map(write_model, LESSONS))
    new = os.path.join(TOY, "probes.new.jsonl")  # ei.py would go on with a file that is there
    subprocess.run([sys.executable, os.path.join(ROOT, "ei.py"), "--out", new], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.replace(new, os.path.join(TOY, "probes.jsonl"))


if __name__ == "__main__":
    main()
