"""ExGRPO, stages 2 and 3: SFT warm-up on explanatory probes, then reinforcement in dialogues.

    python exgrpo.py --student Qwen2.5-0.5B --probes probes.jsonl --out runs/qwen

After "Probing to Refine: Reinforcement Distillation of LLMs via Explanatory Inversion" (ICLR 2026,
arXiv 2603.19266). D_EI, the file of probes that ei.py writes -> a model, a Hugging Face folder.

    warm_up     stage 2: SFT on every probe and question; the result, OUT/sft, is pi_ref     Eq. 3
    reinforce   stage 3, a step: rollout, grade, compute_rewards, dialogue_advantages,
                reply_advantages, update                                             Eqs. 4-8

    paper                  here                               flag            shape or unit
    Q, A                   question, answer                   --probes        a line of D_EI
    Q_aug, R_aug, A_aug    probe, rationale, answer           --probes        its "probes"
    k, k', G               turns, forks, group_size           --turns, --group-size
    pi_theta, pi_ref       policy, reference                  --student
    R_outcome   (Eq. 4)    verdicts, outcomes                                 (2, Q, G)
    r_dsu       (Eq. 5)    reward.dsu_bonus                   --delta, --nu   reward
    R_total     (Eq. 6)    reward.total_rewards, rewards                      (2, Q, G)
    U           (Eq. 7)    advantages, credit                 --advantage, --credit
    rho, epsilon (Eq. 7)   ratio, epsilon                     --epsilon       (B, T)
    beta, KL    (Eq. 7)    beta, kl                           --beta          nats a token
    L_SFT, L_aux (3, 8)    sft_backward                       --aux-weight    nats a token

Letters in shape comments: B sequences, T tokens, V vocabulary, Q questions of a step, G dialogues
of a group (in (2, Q, G) first the full ones, then the partial ones; with --turns 0 there are full
ones only, (1, Q, G)), N trained tokens, S slots of the KV cache, H heads, D width, R rows of P
places.

Where the paper is silent or ambiguous, we chose:
 1. A partial dialogue is forked from the full one after k' probes, k' uniform on 0..k-1 and drawn
    once per question (--partial independent: sampled apart). With k = 1 it is the question alone.
    A question with fewer than k probes uses all.
 2. What a group is: dialogue_advantages. What a reply to a probe is paid for: reply_advantages.
 3. The warm-up also trains on the question, and in dialogues: sft_examples.
 4. Eq. 7 is averaged over all trained tokens of the step. A dialogue whose replies all have
    advantage 0 is not forwarded: no KL, but its tokens count in the divisor. KL is k3, per token.
 5. Eq. 8 trains the teacher's reply at every probe turn, not the final turn, and is a mean over
    tokens, where the paper has a sum.
 6. A reply that is truncated by the token limit is wrong, whatever it says.
 7. The values of delta, nu, the weight of Eq. 8 and the learning rates (see main) are ours.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          logging as transformers_logging)

import reward

MAX_GRAD_NORM = 1.0


# ==================================================================================== 1. the method

def group_advantages(rewards: Tensor) -> Tensor:
    """(reward - mean) / (std + 1e-4) within each group: (groups, members) -> same shape.

    Unbiased std and 1e-4 are those of GRPO in TRL. If all rewards of a group are equal, the result
    is exactly 0: rounding can leave a tiny std, which would turn rounding errors into advantages.
    """
    assert rewards.shape[1] > 1, "a group of one has no standard deviation"
    mean, std = rewards.double().mean(1, keepdim=True), rewards.double().std(1, keepdim=True)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return ((rewards - mean) / (std + 1e-4)).masked_fill(equal, 0.0).to(rewards.dtype)


def dialogue_advantages(outcomes: Tensor, rewards: Tensor, variant: str) -> Tensor:
    """R_outcome and R_total of full and then partial dialogues, (2, Q, G) -> advantages (2, Q, G).

    separate   Each scenario is normalised by its own mean and deviation. The bonus scales {0, 1} to
               {0, 1 + delta}, and the normalisation divides it out again: it cancels.
    pooled     The 2G dialogues of a question share mean and deviation. The bonus acts, but it can
               push correct partial dialogues below the mean.
    added      Each scenario is normalised on its outcome, then the bonus, which is not normalised,
               is added to the advantage of correct full dialogues. Nothing correct is pushed down.
    """
    if variant == "pooled":
        pooled = group_advantages(rewards.transpose(0, 1).flatten(1))               # (Q, 2G)
        return pooled.unflatten(1, (len(rewards), -1)).transpose(0, 1)
    if variant == "separate":
        return group_advantages(rewards.flatten(0, 1)).view_as(rewards)
    bonus = rewards - outcomes  # r_dsu where a full dialogue is correct, else 0
    return group_advantages(outcomes.flatten(0, 1)).view_as(outcomes) + bonus


def policy_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor,
                mask: Tensor, *, epsilon: float, beta: float,
                n_tokens: int | None = None) -> tuple[Tensor, dict]:
    """Eq. 7, negated: clipped objective and KL penalty, averaged over the trained tokens.

    logps, old_logps, ref_logps, mask (B, T); advantages, per dialogue (B,) or per token (B, T).
    (update: T-1 columns, column t is about token t+1.) Sums are divided by n_tokens: the trained
    tokens of the whole step, if these rows are a micro-batch of it; by default, those of mask.
    Returns the loss and detached stats (kl, clip_share)."""
    mask = mask.bool()
    n_tokens = mask.sum() if n_tokens is None else n_tokens
    logps, old_logps, ref_logps = (  # not x * mask: nan * 0 is nan
        torch.where(mask, x, 0.0) for x in (logps, old_logps, ref_logps))
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    # In the first update the ratio is 1, yet its gradient is that of log pi: REINFORCE.
    ratio = torch.exp(logps - old_logps)                                            # (B, T)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    # k3: unbiased as a value, never negative. Its gradient is that of KL(pi_ref || pi_theta), not
    # of KL(pi_theta || pi_ref); GRPO uses it so. The clamp keeps exp finite.
    gap = (ref_logps - logps).clamp(max=20.0)
    kl = torch.exp(gap) - gap - 1
    loss = -((objective - beta * kl) * mask).sum() / n_tokens                       # Eq. 7
    outside = torch.where(advantages > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    clip = outside & (advantages != 0) & mask
    stats = {"kl": (kl * mask).sum() / n_tokens, "clip_share": clip.sum() / n_tokens}
    return loss, {name: value.detach() for name, value in stats.items()}


class Rollout(NamedTuple):
    """What a step samples. Dialogues stand group by group: question q, member g at q * G + g."""
    questions: list  # Q lines of D_EI
    probes: list     # Q lists of the probes drawn, in the order in which they were asked
    full: list       # Q * G dialogues: all probes, then the question
    partial: list    # Q * G dialogues: the first k' probes, then the question; none with --turns 0


def rollout(model, chat: Chat, questions: list, args, step: int) -> Rollout:
    """Draws up to k probes of each question and samples its G full and G partial dialogues."""
    rng = np.random.default_rng([args.seed, step, 1])
    generator = torch.Generator(model.device).manual_seed((args.seed * 1_000_003 + step) % 2 ** 63)
    probes = [[row["probes"][i] for i in rng.permutation(len(row["probes"]))[:args.turns]]
              for row in questions]
    forks = [int(rng.integers(len(drawn))) if drawn else 0 for drawn in probes]     # k' in 0..k-1
    scripts = [[user_turn(turn) for turn in (*drawn, row)] for drawn, row in zip(probes, questions)]
    forked = args.turns > 0 and args.partial == "forked"
    full, partial = sample_dialogues(model, chat, scripts, args, generator, forks if forked else ())
    if args.turns > 0 and args.partial == "independent":
        shorter = [script[:fork] + script[-1:] for script, fork in zip(scripts, forks)]
        partial, _ = sample_dialogues(model, chat, shorter, args, generator)
    return Rollout(questions, probes, full, partial)


def sample_dialogues(model, chat: Chat, scripts: list, args, generator,
                     forks=()) -> tuple[list, list]:
    """Plays each of Q scripts (lists of user turns) G times, all dialogues in one batch.

    With forks (k' of each question), partial dialogue g copies the first k' turns of full dialogue
    g, then gets the script's last turn and a reply of its own. It is an exact sample of the policy
    that costs one reply. Returns Q * G full dialogues and, with forks, as many partial ones.
    """
    G, cache, cached = args.group_size, None, []  # cached: full dialogues in the cache's first rows
    full = [Dialogue() for _ in scripts for _ in range(G)]
    partial = [None] * len(full) if forks else []
    for turn in range(max(map(len, scripts))):
        going = [b for b in range(len(full)) if turn < len(scripts[b // G])]
        forking = [b for b in going if forks and forks[b // G] == turn]
        for b in forking:
            partial[b] = copy.deepcopy(full[b])
        batch = [full[b] for b in going] + [partial[b] for b in forking]
        users = [scripts[b // G][turn] for b in going] + [scripts[b // G][-1] for b in forking]
        rendered = {user: chat.later(user) if turn else chat.first(user) for user in set(users)}
        for dialogue, user in zip(batch, users):
            dialogue.add_user(rendered[user])
        if turn:  # a fork gets a copy of its twin's keys and values; finished dialogues are dropped
            cache.select([cached.index(b) for b in going + forking])
        prompts = [dialogue.ids for dialogue in batch]
        replies, logps, cache = sample(  # at first, a group's prompt is the same: it is read once
            model, prompts if turn else prompts[::G], group_size=1 if turn else G, cache=cache,
            max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            stop_ids=chat.stop_ids, finish=chat.finish, generator=generator)
        for dialogue, ids, its_logps in zip(batch, replies, logps):
            dialogue.add_reply(ids, chat, its_logps)
        cached = going  # the forks have had their reply: the next turn drops them
    return full, partial


def grade(chat: Chat, played: Rollout) -> list:
    """Does each reply state the answer to its turn? A truncated reply states nothing.
    For each full and then each partial dialogue a list of bools, one per reply."""
    G, verdicts = len(played.full) // len(played.questions), []
    for b, dialogue in enumerate(played.full + played.partial):
        q = b % len(played.full) // G  # a partial dialogue's question is that of its twin
        rows = [*played.probes[q][:len(dialogue.replies) - 1], played.questions[q]]
        verdicts.append([
            not truncated and reward.is_correct(chat.decode(ids), row["answer"], row["answer_type"])
            for ids, truncated, row in zip(dialogue.replies, dialogue.truncated, rows)])
    return verdicts


def compute_rewards(verdicts: list, args) -> tuple[Tensor, Tensor]:
    """R_outcome (Eq. 4) and R_total (Eqs. 5 and 6) of full and then partial dialogues, (2, Q, G).
    Of grade()'s verdicts only a dialogue's last counts. With --turns 0 there is no bonus."""
    last = torch.tensor([own[-1] for own in verdicts], dtype=torch.float64)         # Eq. 4
    outcomes = last.view(2 if args.turns else 1, -1, args.group_size)
    if args.turns == 0:
        return outcomes, outcomes
    totals = [reward.total_rewards(full, partial, args.delta, args.nu)              # Eqs. 5 and 6
              for full, partial in zip(*outcomes.tolist())]
    return outcomes, torch.tensor(totals, dtype=torch.float64).transpose(0, 1)


def reply_advantages(verdicts: list, advantages: Tensor, args) -> list:
    """Advantages of dialogues (2, Q, G) -> for each dialogue a list, one advantage of each reply.

    --credit outcome  Every reply gets its dialogue's advantage. A forked pair trains its common
                      prefix in both roles, once with each advantage.
    --credit turn     The last reply gets its dialogue's advantage. A reply to a probe is paid for
                      its own answer, normalised over the group's G replies to this probe. Replies
                      that a fork has copied get 0 (they are trained in the full dialogue), but
                      count here, too, in the KL and the divisor.
    """
    G, credited = advantages.shape[2], []
    for i, last in enumerate(advantages.flatten(0, 1).tolist()):  # a group, full or partial
        own = torch.tensor(verdicts[i * G:(i + 1) * G], dtype=torch.float64).T      # (turns, G)
        by_turn = [last] * len(own)  # a list of G advantages for each turn
        if args.credit == "turn" and len(own) > 1:
            copied = i >= advantages.shape[1] and args.partial == "forked"
            by_turn[:-1] = group_advantages(0 * own[:-1] if copied else own[:-1]).tolist()
        credited += zip(*by_turn)
    return credited


def update(policy, reference, optimizer, dialogues: list, advantages: list, teacher: list,
           args) -> dict:
    """One step of Eq. 7 plus Eq. 8, `--updates` times over the same samples -> metrics.

    advantages: for each dialogue a list with one of each reply, which all its tokens share.
    reference: pi_ref; under LoRA the policy itself, its adapters off. teacher: dialogues of Eq. 8.
    """
    n_tokens = sum(sum(d.mask) for d in dialogues)  # the divisor, also for those that are dropped
    chosen = [b for b in range(len(dialogues)) if any(advantages[b])]
    advantages = [dialogues[b].per_token(advantages[b]) for b in chosen]
    dialogues = [dialogues[b] for b in chosen]
    old_logps, ref_logps = [], []  # one per micro-batch, filled in during the first update
    sampler_gap = 0.0
    for n in range(args.updates):
        metrics = dict.fromkeys(("loss", "kl", "clip_share", "aux_loss"), 0.0)
        for b, (members, trees) in enumerate(pack(dialogues, args.micro_batch_tokens, policy)):
            mask = trees.mask[:, 1:]                                                # (B, T-1)
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.bf16):
                if n == 0 and args.beta > 0:
                    with torch.no_grad(), adapters_off():
                        ref_logps.append(tree_logprobs(reference, trees, args.temperature))
                logps = tree_logprobs(policy, trees, args.temperature)              # (B, T-1)
            if n == 0:  # the weights are still those that sampled
                old_logps.append(logps.detach())
                sampled = [x for i in members for x in dialogues[i].logps]
                gap = old_logps[b][mask.bool()] - torch.tensor(sampled, device=policy.device)
                sampler_gap = max(sampler_gap, gap.abs().max().item())
            loss, stats = policy_loss(  # with beta 0 there is no pi_ref: kl is to old_logps
                logps, old_logps[b], (ref_logps or old_logps)[b],
                pad_rows([advantages[i] for i in members], policy.device)[:, 1:], mask,
                epsilon=args.epsilon, beta=args.beta, n_tokens=n_tokens)
            loss.backward()
            for name, value in {"loss": loss.detach(), **stats}.items():
                metrics[name] += value
        if args.aux_weight > 0 and teacher:
            metrics["aux_loss"] = sft_backward(policy, teacher, args, args.aux_weight)  # Eq. 8
        metrics["grad_norm"] = optimizer_step(policy, optimizer)
    forwarded = sum(sum(d.mask) for d in dialogues) or 1
    for name in ("kl", "clip_share"):  # reported per token that was forwarded
        metrics[name] *= n_tokens / forwarded
    return {name: float(value) for name, value in metrics.items()} | {"sampler_gap": sampler_gap}


def teacher_dialogue(chat: Chat, rows: list) -> Dialogue:
    """For each row, a probe or question, its user turn and the teacher's reply (trained)."""
    dialogue = Dialogue()
    for turn, row in enumerate(rows):
        dialogue.add_user(chat.later(user_turn(row)) if turn else chat.first(user_turn(row)))
        dialogue.add_reply(chat.reply(teacher_reply(row)), chat)
    if len(dialogue.ids) > chat.context:
        raise UserError(f"the teacher's reply to {user_turn(rows[-1])[:60]!r} ends at token "
                        f"{len(dialogue.ids)}, the model reads {chat.context}; leave it out")
    return dialogue


def sft_backward(model, dialogues: list, args, weight: float = 1.0) -> float:
    """Adds the gradient of weight * mean NLL of the trained tokens; returns the mean NLL."""
    n_tokens = sum(sum(d.mask) for d in dialogues)  # the divisor, for all micro-batches
    total = 0.0
    for _, trees in pack(dialogues, args.micro_batch_tokens, model):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            loss = -tree_logprobs(model, trees).sum() / n_tokens                    # Eqs. 3 and 8
        (weight * loss).backward()
        total += loss.detach()
    return float(total)


def optimizer_step(model, optimizer) -> float:
    """Clips the gradient's norm and steps -> the norm before. One that is not finite stops us."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def sft_examples(question: dict, args, rng) -> list:
    """The examples of the warm-up that a question gives: lists of rows, each list one dialogue.
    --sft-form single: one probe, or the question. dialogue: 1 to k + 1 of them in random order; the
    question is the last of its dialogue."""
    rows, examples = [question, *rng.permutation(question["probes"])], []
    longest = args.turns + 1 if args.sft_form == "dialogue" else 1
    while rows:
        n = rng.integers(1, longest + 1)
        examples.append(rows[:n][::-1])
        rows = rows[n:]
    return examples


def warm_up(args, questions: list, device) -> None:
    """Stage 2: SFT on D_EI for --sft-epochs. Writes OUT/sft: the start of stage 3, and pi_ref."""
    model, chat, optimizer = load_policy(args, args.student, device, args.sft_lr)
    rng = np.random.default_rng([args.seed, 2])
    examples = [teacher_dialogue(chat, rows) for question in questions
                for rows in sft_examples(question, args, rng)]
    order = data_order(len(examples), len(examples) * args.sft_epochs, args.seed)
    n_steps = -(-len(order) // args.sft_batch_size)
    start = load_checkpoint(args, "SFT", model, optimizer)
    model.train(args.gradient_checkpointing)
    with tqdm(range(start, n_steps), initial=start, total=n_steps, desc="SFT") as bar:
        for step in bar:
            batch = order[step * args.sft_batch_size:(step + 1) * args.sft_batch_size]
            loss = sft_backward(model, [examples[i] for i in batch], args)          # Eq. 3
            optimizer_step(model, optimizer)
            append_csv(os.path.join(args.out, "sft.csv"), {"step": step + 1, "loss": loss})
            bar.set_postfix(loss=f"{loss:.3f}")
            end_step(args, "SFT", step + 1, n_steps, model, optimizer)
    save_model(model, chat, os.path.join(args.out, "sft.tmp"))
    os.rename(os.path.join(args.out, "sft.tmp"), os.path.join(args.out, "sft"))  # whole, or not


def rl_samples(questions: list, kind: str) -> list:
    """What a step draws from. "probes" and "both" make each probe a question without probes: the
    paper's baseline, "RL (R_outcome)", where every EI probe is an independent sample."""
    probes = [probe | {"id": f"{row['id']}-{probe['rule']}", "probes": []}
              for row in questions for probe in row["probes"]]
    alone = [row | {"probes": []} for row in questions]
    return {"dialogues": questions, "probes": probes, "both": alone + probes}[kind]


def reinforce(args, questions: list, tests: dict, device) -> None:
    """Stage 3: --steps steps of ExGRPO from OUT/sft (or the student itself). Writes OUT."""
    source = os.path.join(args.out, "sft") if args.sft_epochs else args.student
    policy, chat, optimizer = load_policy(args, source, device, args.lr)
    reference = load_reference(args, policy, source)
    questions = rl_samples(questions, args.rl_data)
    order = data_order(len(questions), args.steps * args.questions_per_step, args.seed)
    if args.sft_epochs:
        evaluate_checkpoint(args, "after SFT", policy, chat, tests)
    start = load_checkpoint(args, "ExGRPO", policy, optimizer)
    if start > args.steps:
        raise UserError(f"--resume: {start} steps are done, more than --steps {args.steps}")
    with tqdm(range(start, args.steps), initial=start, total=args.steps, desc="ExGRPO") as bar:
        for step in bar:
            started = time.perf_counter()
            batch = order[step * args.questions_per_step:(step + 1) * args.questions_per_step]
            policy.eval()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                played = rollout(policy, chat, [questions[i] for i in batch], args, step)
            verdicts = grade(chat, played)
            outcomes, rewards = compute_rewards(verdicts, args)                     # Eqs. 4-6
            advantages = dialogue_advantages(outcomes, rewards, args.advantage)     # (2, Q, G)
            credit = reply_advantages(verdicts, advantages, args)
            teacher = [teacher_dialogue(chat, drawn or [row])  # a row can be a probe: rl_samples
                       for drawn, row in zip(played.probes, played.questions)
                       if drawn or "probe" in row]
            policy.train(args.gradient_checkpointing)  # checkpointing works in train mode only
            metrics = update(policy, reference, optimizer, played.full + played.partial, credit,
                             teacher, args)                                         # Eqs. 7 and 8
            metrics |= rollout_metrics(chat, played, verdicts, outcomes, rewards, advantages, args)
            metrics |= {"step": step + 1, "seconds": time.perf_counter() - started}
            metrics["tokens_per_s"] = metrics["sampled_tokens"] / metrics["seconds"]
            paid = bool((rewards > outcomes)[0, 0].any())
            log_step(args, chat, played, verdicts, credit, paid, metrics)
            bar.set_postfix_str(BAR.format(**metrics))
            if args.eval_every and (step + 1) % args.eval_every == 0:
                evaluate_checkpoint(args, f"after step {step + 1}", policy.eval(), chat, tests,
                                    again=True)
            end_step(args, "ExGRPO", step + 1, args.steps, policy, optimizer)
    if args.steps:
        evaluate_checkpoint(args, f"after step {args.steps}", policy.eval(), chat, tests)
    save_model(policy, chat, args.out)


def data_order(n: int, total: int, seed: int) -> list:
    """`total` indices below n: epoch after epoch, each in a new order that depends on the seed."""
    return [int(i) for epoch in range(-(-total // n))
            for i in np.random.default_rng([seed, epoch]).permutation(n)][:total]


# The columns of metrics.csv, one row a step. README.md says what each means.
METRICS = ("step reward acc_full acc_partial acc_probes bonus_share adv_partial_correct kl "
           "clip_share sampler_gap loss aux_loss grad_norm truncated unparsed zero_variance "
           "reply_tokens tokens_per_s seconds").split()
BAR = ("reward {reward:.2f} full {acc_full:.2f} partial {acc_partial:.2f} kl {kl:.4f} "
       "clip {clip_share:.3f} {tokens_per_s:.0f} tok/s")


def rollout_metrics(chat, played: Rollout, verdicts, outcomes, rewards, advantages, args) -> dict:
    """The columns of metrics.csv that describe a rollout."""
    def mean(values):  # nan if there is none
        return torch.as_tensor(values, dtype=torch.float64).mean().item()
    full, partial = outcomes[0], outcomes[1:]                                       # (., Q, G)
    replies = [len(ids) for dialogue in played.full for ids in dialogue.replies]
    fresh = -1 if args.partial == "forked" else 0  # a fork's earlier replies are copies
    n_sampled = sum(replies) + sum(len(ids) for d in played.partial for ids in d.replies[fresh:])
    unread = [reward.extract_answer(chat.decode(dialogue.replies[-1]), row["answer_type"]) is None
              for row, dialogue in zip(np.repeat(played.questions, args.group_size), played.full)]
    return {"reward": mean(rewards), "acc_full": mean(full), "acc_partial": mean(partial),
            "acc_probes": mean([x for own in verdicts[:len(played.full)] for x in own[:-1]]),
            "bonus_share": mean((rewards > outcomes)[0].any(1)) if args.turns else float("nan"),
            "adv_partial_correct": mean(advantages[1:][partial > 0]),
            "truncated": mean([d.truncated[-1] for d in played.full]), "unparsed": mean(unread),
            "zero_variance": mean(outcomes.amax(-1) == outcomes.amin(-1)),
            "reply_tokens": mean(replies), "sampled_tokens": n_sampled}


def log_step(args, chat: Chat, played: Rollout, verdicts: list, credit: list, paid: bool,
             metrics: dict) -> None:
    """Logs a row of metrics.csv, and the first dialogue of the step and its partial twin as text.
    Beside each reply stand its verdict and the advantage of its tokens. paid: whether the bonus was
    paid for this question."""
    append_csv(os.path.join(args.out, "metrics.csv"), {name: metrics[name] for name in METRICS})
    row, dialogues = played.questions[0], played.full + played.partial
    text = (f"==== step {metrics['step']}, question {row['id']}, gold {row['answer']}, "
            f"{'bonus paid' if paid else 'no bonus'}\n")
    for name, b in zip(("full", "partial"), range(0, len(dialogues), len(played.full))):
        text += f"---- {name}\n"
        end = 0
        for start, ids, is_right, advantage in zip(dialogues[b].starts, dialogues[b].replies,
                                                   verdicts[b], credit[b]):
            text += (f"{chat.tokenizer.decode(dialogues[b].ids[end:start])}\n"
                     f"[{'right' if is_right else 'wrong'}, advantage {advantage:+.2f}] "
                     f"{chat.tokenizer.decode(ids)}\n")
            end = start + len(ids)
    with open(os.path.join(args.out, "dialogues.txt"), "a", encoding="utf-8") as file:
        file.write(text + "\n")


# ====================================================================== 2. dialogues as token ids

def user_turn(row: dict) -> str:
    """The user's turn for a probe or a question: its text, and how to state the answer."""
    text = row["probe"] if "probe" in row else row["question"]
    return f"{text}\n{reward.INSTRUCTION[row['answer_type']]}"


def teacher_reply(row: dict) -> str:
    """The teacher's full response: its reasoning, then the answer in the form that is graded."""
    return f"{row['rationale'].strip()} The answer is {row['answer'].strip()}.".strip()


class Chat:
    """Turns <-> token ids. A dialogue only grows: nothing that was sampled is encoded again.
    A model without a chat template gets "Question: ... Answer:"."""

    def __init__(self, tokenizer, model):
        self.tokenizer, self.context = tokenizer, context_size(model)
        self.plain = tokenizer.chat_template is None
        ends = model.generation_config.eos_token_id  # one id, a list or None
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()
                   if token.special or i in ends}
        # The first special token behind a reply ends it. That need not be eos (Qwen's base models).
        behind = [] if self.plain else self._around_reply("x")[1] + self._around_reply()[1]
        self.end_id = next((i for i in behind if i in special), tokenizer.eos_token_id)
        if self.end_id is None:
            raise UserError(f"{model.name_or_path} has no end token (eos_token), so a reply could "
                            "not stop: see its tokenizer_config.json and chat template")
        self.stop_ids = sorted(ends | {self.end_id})
        self.special = list(special.values())

    def _render(self, *turns, reply_next):
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn}
                    for i, turn in enumerate(turns)]
        return list(self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=reply_next, tokenize=True, return_dict=False,
            date_string="26 Jul 2024"))  # else Llama 3 prints today's, and prompts would change

    def _around_reply(self, *user):
        """The ids before and after a reply to "x", if the next turn is `user`: the common start
        and end of two chats that differ in this reply only."""
        one, two = (self._render("x", reply, *user, reply_next=bool(user)) for reply in ("1", "2"))
        before = os.path.commonprefix([one, two])
        after = os.path.commonprefix([one[::-1], two[::-1]])[::-1]
        return before, after if one != two else []  # equal: the template leaves replies out

    def _clean(self, text):
        """Removes special tokens, which would open or close turns, from untrusted text."""
        while any(token in text for token in self.special):  # one may hide in the halves of another
            for token in self.special:
                text = text.replace(token, "")
        return text

    def encode(self, text: str) -> list:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: list) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return (text.partition("\nQuestion:")[0] if self.plain else text).strip()

    def finish(self, ids: list) -> tuple[list, bool]:
        """Sampled ids -> (the reply, whether the token limit truncated it). Without a template, a
        base model may not stop but ask itself a next "Question:". The reply ends there."""
        if self.plain and "\nQuestion:" in self.tokenizer.decode(ids):
            return next(ids[:n] for n in range(1, len(ids) + 1)
                        if "\nQuestion:" in self.tokenizer.decode(ids[:n])), False
        return ids, ids[-1] not in self.stop_ids

    def first(self, user: str) -> list:
        user = self._clean(user)
        if not self.plain:
            return self._render(user, reply_next=True)
        return self.tokenizer(f"Question: {user}\nAnswer:").input_ids  # with bos, if it has one

    def later(self, user: str) -> list:
        """The ids between the end token of a reply and the next reply. The template must leave
        earlier user turns as they were; it may open the next reply as it likes (<think>)."""
        user = self._clean(user)
        if self.plain:
            return self.encode(f"\n\nQuestion: {user}\nAnswer:")
        before, after = self._around_reply(user)
        asked = os.path.commonprefix([self._render("x", reply_next=on) for on in (True, False)])
        if self.end_id not in after or before[:len(asked)] != asked:
            raise UserError("the chat template rewrites earlier turns, so a dialogue cannot grow "
                            "token by token; give the tokenizer a template that only appends")
        return after[after.index(self.end_id) + 1:]

    def reply(self, text: str) -> list:
        """A teacher's reply as ids, with the end token."""
        return self.encode(self._clean(f" {text}" if self.plain else text)) + [self.end_id]

    def prompt(self, turns: list) -> list:
        """[user, reply, user, ...] of odd length -> ids up to where the next reply begins."""
        ids = self.first(turns[0])
        for reply, user in zip(turns[1::2], turns[2::2]):
            ids += self.reply(reply) + self.later(user)
        return ids


class Dialogue:
    """Token ids and a parallel mask (1 = sampled, or the teacher's: trained), turn by turn."""

    def __init__(self, ids=(), mask=()):
        self.ids, self.mask, self.logps = list(ids), list(mask), []  # logps: of the sampled tokens
        self.replies, self.truncated = [], []  # ids of each reply; whether it hit the token limit
        self.starts = []  # where each reply begins in ids

    def add_user(self, ids):
        self.ids += ids
        self.mask += [0] * len(ids)

    def add_reply(self, ids, chat, logps=()):
        """A reply without end token (truncated, or cut before a next "Question:") is closed by one
        that the student did not sample: mask 0."""
        ids, truncated = chat.finish(ids)
        open_end = ids[-1] not in chat.stop_ids
        self.starts.append(len(self.ids))
        self.ids += ids + [chat.end_id] * open_end
        self.mask += [1] * len(ids) + [0] * open_end
        self.logps += logps
        self.replies.append(ids)
        self.truncated.append(truncated)

    def per_token(self, values):
        """A value for each reply -> a list parallel to ids, 0 outside of the replies."""
        spread = [0.0] * len(self.ids)
        for start, ids, value in zip(self.starts, self.replies, values):
            spread[start:start + len(ids)] = [value] * len(ids)
        return spread


# =================================================================================== 3. the sampler

class KVCache:
    """Keys and values of B growing dialogues. Slot = position: token t of row b is at [b, :, t].
    A query at position p sees the slots up to p. What stands behind a row's last token is seen by
    no query, and is overwritten as the row grows."""

    def __init__(self, n_rows: int, device):
        self.lengths = [0] * n_rows  # tokens of each row whose keys and values are valid
        self.layers = []             # [keys, values] of each layer, (B, H, S, D)
        self.rows = None             # (B,), the rows in the forward pass: all, or some
        self.positions = None        # (B, T), of the tokens in the forward pass
        self.n_slots = 0             # slots in use, in blocks: shapes change rarely
        self.block = 16 if device.type == "cpu" else 128

    def reserve(self, n_tokens: int):
        self.n_slots = -(-n_tokens // self.block) * self.block

    def update(self, keys, values, layer_idx, *_, **__):
        """Called by each layer: stores keys and values (B, H, T, D), returns all, (B, H, S, D)."""
        if layer_idx == len(self.layers):
            self.layers.append([x[:, :, :0] for x in (keys, values)])
        layer, rows = self.layers[layer_idx], self.rows
        for i, new in enumerate((keys, values)):
            if layer[i].shape[2] < self.n_slots:
                layer[i] = F.pad(layer[i], (0, 0, 0, self.n_slots - layer[i].shape[2]))
            layer[i][rows[:, None], :, self.positions] = new.transpose(1, 2)        # (B, T, H, D)
        rows = rows if len(rows) < len(self.lengths) else slice(None)  # a slice copies nothing
        return [store[rows, :, :self.n_slots] for store in layer]

    def select(self, rows: list):
        """New row i is old row rows[i]: rows are repeated (prompts, forks) or left out."""
        if rows != list(range(len(self.lengths))):
            self.lengths = [self.lengths[row] for row in rows]
            self.layers = [[store[rows] for store in layer] for layer in self.layers]


def attention_mask(config, visible, distance):
    """Which keys a query sees, and how many tokens before it each stands, (B, T, S) -> the additive
    mask (B, 1, T, S), or a dict of two if only some layers have a sliding window."""
    full = visible.float().log()[:, None]  # 0 where visible, else -inf
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or kinds and "sliding_attention" not in kinds:
        return full
    sliding = (visible & (distance < window)).float().log()[:, None]
    return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding


def next_logits(model, cache: KVCache, ids, positions, rows, last=-1):
    """Reads ids at positions (B, T) of these rows of the cache -> the logits after token `last` of
    each row, (B, V)."""
    cache.rows, cache.positions = rows, positions
    slots = torch.arange(cache.n_slots, device=positions.device)
    distance = positions[..., None] - slots                                         # (B, T, S)
    mask = attention_mask(model.config.get_text_config(), distance >= 0, distance)
    hidden = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask,
                              use_cache=True, cache=cache).last_hidden_state        # (B, T, D)
    return head(model, hidden[torch.arange(len(ids), device=ids.device), last])


def prefill(model, cache: KVCache, chunks: list):
    """Reads the next ids of every row (B lists, none empty) -> logits after them, (B, V)."""
    ids, counts = pad_rows(chunks, model.device), [len(chunk) for chunk in chunks]  # (B, T)
    start, last = torch.tensor([cache.lengths, counts], device=model.device)
    positions = start[:, None] + torch.arange(ids.shape[1], device=model.device)
    positions = positions.clamp(max=context_size(model) - 1)  # padding may lie beyond the context
    cache.reserve(max(cache.lengths) + ids.shape[1])
    cache.lengths = [length + count for length, count in zip(cache.lengths, counts)]
    rows = torch.arange(len(chunks), device=model.device)
    return next_logits(model, cache, ids, positions, rows, last - 1)


class CudaGraphDecoder:
    """next_logits on a GPU, recorded as a CUDA graph and replayed: one launch a token.

    A graph reads and writes fixed addresses. So when the cache gets more slots, the next token runs
    without a graph, and the stores grow there. A model that needs a value from the GPU in its
    forward pass cannot be recorded, and always runs without.
    """

    def __init__(self):
        self.n_slots = self.graph = self.inputs = self.logits = None
        self.possible = True

    def __call__(self, model, cache, ids, positions, rows):
        if not self.possible or self.n_slots != cache.n_slots:
            self.n_slots, self.graph = cache.n_slots, None
            return next_logits(model, cache, ids, positions, rows)
        if self.graph is None:
            self.inputs, self.graph = (ids.clone(), positions.clone()), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.logits = next_logits(model, cache, *self.inputs, rows)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self.possible = False
                return self(model, cache, ids, positions, rows)
        for fixed, new in zip(self.inputs, (ids, positions)):
            fixed.copy_(new)
        self.graph.replay()
        return self.logits


def sample_token(logits, temperature: float, uniform):
    """logits (B, V), uniform (B,) in [0, 1) -> a token per row (B,) and its log-prob (B,), by
    inverse CDF of softmax(logits / temperature); greedy at temperature 0. Sums are in double
    precision: in fp32 they would lose the tail of a large vocabulary."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    scaled = logits / temperature                                                   # (B, V)
    scaled = scaled - scaled.amax(-1, keepdim=True)
    cdf = scaled.exp().double().cumsum(-1)
    total = cdf[:, -1]
    # Below the total, so that rounding never selects a last token of probability 0.
    mass = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, mass[:, None], right=True)                     # (B, 1)
    return tokens.squeeze(1), scaled.gather(1, tokens).squeeze(1) - total.log()


@torch.no_grad()
def sample(model, prompts: list, *, max_new_tokens: int, temperature: float, stop_ids: list,
           finish=lambda ids: (ids, False), group_size: int = 1, generator=None,
           cache: KVCache | None = None):
    """Samples group_size replies to each prompt (lists of ids) from softmax(logits / temperature).

    A group's prompt is read once; then there are B = Q * G rows, group by group. With the cache of
    an earlier call, prompts are its rows' whole dialogues, and only what is new in them is read.
    Returns B replies (ids up to the first stop token, or as many as fit, cut by `finish`), their
    log-probs, and the cache, which lacks each reply's last token.
    """
    device, context = model.device, context_size(model)
    cache = KVCache(len(prompts), device) if cache is None else cache
    logits = prefill(model, cache, [ids[n:] for n, ids in zip(cache.lengths, prompts)])
    if not logits.isfinite().all():
        raise UserError("the model's logits are not all finite numbers: its weights are spoiled, "
                        "as by too large an --lr or --sft-lr; start again from others")
    copies = [i for i in range(len(prompts)) for _ in range(group_size)]
    cache.select(copies)
    logits, prompts, B = logits[copies], [prompts[i] for i in copies], len(copies)
    longest = max(cache.lengths)
    if longest >= context:
        raise UserError(f"a prompt of {longest} tokens leaves no room for a reply: the model reads "
                        f"{context}; lower --turns or --max-new-tokens, or leave long texts out")
    lengths, stop = (torch.tensor(x, device=device) for x in (cache.lengths, stop_ids))
    limits = (context - lengths).clamp(max=max_new_tokens)  # new tokens of each row, (B,)
    max_new_tokens = min(max_new_tokens, context - min(cache.lengths))
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(B, max_new_tokens, dtype=torch.float64, device=device)
    running, rows = torch.ones(B, dtype=torch.bool, device=device), torch.arange(B, device=device)
    decode = CudaGraphDecoder() if device.type == "cuda" else next_logits
    for t in range(max_new_tokens):
        uniform = torch.rand(B, generator=generator, device=device, dtype=torch.float64)
        tokens[rows, t], logps[rows, t] = sample_token(logits, temperature, uniform[rows])
        running &= ~torch.isin(tokens[:, t], stop) & (t + 1 < limits)
        # To ask a GPU for a value is to wait for it.
        if t + 1 == max_new_tokens or (device.type == "cpu" or t % 8 == 7) and not running.any():
            break
        # Finished rows are left out once they are half of all: the others' keys are copied then.
        if device.type == "cpu" and 2 * running.sum() <= B:
            rows = running.nonzero().flatten()
        cache.reserve(longest + t + 1)
        positions = (lengths + t).clamp(max=context - 1)[rows, None]
        logits = decode(model, cache, tokens[rows, t:t + 1], positions, rows)
    ended = torch.isin(tokens, stop).long()
    # Tokens up to and with the first stop, or as many as fit.
    counts = torch.minimum((ended.cumsum(1) == ended).sum(1), limits).tolist()
    replies = [finish(ids[:n])[0] for ids, n in zip(tokens.tolist(), counts)]
    cache.lengths = [len(prompt) + len(reply) - 1 for prompt, reply in zip(prompts, replies)]
    return replies, [x[:len(ids)] for ids, x in zip(replies, logps.tolist())], cache


@torch.no_grad()
def generate(model, chat: Chat, prompts: list, *, max_new_tokens: int,
             token_budget: int = 16384) -> list:
    """Greedy replies to prompts (lists of ids) -> [(text, truncated, tokens)], in their order.
    Batches have at most token_budget tokens; what all prompts of one begin with is read once."""
    outputs = [None] * len(prompts)
    for batch in micro_batches([len(p) + max_new_tokens for p in prompts], token_budget):
        rows, cache = [prompts[i] for i in batch], KVCache(1, model.device)
        shared = os.path.commonprefix(rows)[:min(map(len, rows)) - 1]  # each has more to read
        if shared:
            prefill(model, cache, [shared])
        cache.select([0] * len(rows))
        replies, _, _ = sample(model, rows, max_new_tokens=max_new_tokens, temperature=0,
                               stop_ids=chat.stop_ids, cache=cache)
        for i, (ids, truncated) in zip(batch, map(chat.finish, replies)):
            outputs[i] = chat.decode(ids), truncated, len(ids)
    return outputs


# ============================================= 4. log-probs of dialogues, shared prefixes read once

LOGITS_HELD = 2 ** 26  # floats, 256 MiB: logits are formed for at most so many at a time


def micro_batches(lengths: list, budget: int) -> list:
    """Indices of the rows, longest first, in batches of at most `budget` padded tokens, or of one
    row. micro_batches([5, 9, 4], 10) == [[1], [0, 2]]."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def pad_rows(rows: list, device):
    """B lists, ids or masks, right-padded with zeros -> (B, T)."""
    T = max(map(len, rows))
    return torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)


def head(model, hidden):
    """Hidden states (N, D) -> logits (N, V), cast to fp32, soft-capped if the model does so."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def head_logprobs(model, hidden, targets, temperature: float):
    """hidden (N, D), targets (N,) -> log-probs (N,), in fp32 and over the full vocabulary. If all
    logits are too many to hold, they are computed in chunks, and again in the backward pass."""
    def chunk_logprobs(hidden, targets):
        return -F.cross_entropy(head(model, hidden) / temperature, targets, reduction="none")
    rows = max(1, LOGITS_HELD // model.get_output_embeddings().weight.shape[0])
    if len(targets) <= rows:
        return chunk_logprobs(hidden, targets)
    return torch.cat([checkpoint(chunk_logprobs, *chunk, use_reentrant=False)
                      for chunk in zip(hidden.split(rows), targets.split(rows))])


def token_logprobs(model, ids, mask, temperature: float = 1.0):
    """Right-padded ids and mask (B, T) -> their log-probs under softmax(logits / temperature) where
    mask is 1, else 0, (B, T-1). Column t is about token t+1: ids [[7, 8, 9]] with mask [[0, 0, 1]]
    give [[0, log p(9 | 7, 8)]]. Training uses tree_logprobs: the same, shared tokens read once."""
    keep = mask[:, 1:].bool()
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logps = head_logprobs(model, hidden[keep], ids[:, 1:][keep], temperature)       # (N,)
    return torch.zeros(keep.shape, device=ids.device).masked_scatter(keep, logps)


class PackedTrees(NamedTuple):
    """R prefix trees of B dialogues, one tree a row, padded to P places. Dialogues that begin alike
    share places: [1, 2, 3] and [1, 2, 4] become ids [1, 2, 3, 4] and the paths [0, 1, 2] and
    [0, 1, 3]."""
    ids: Tensor        # (R, P)
    visible: Tensor    # (R, P, P), bool: a query sees itself and its ancestors
    paths: Tensor      # (B, T), the places of a dialogue's tokens, as r * P + place
    mask: Tensor       # (B, T), 1 = trained; 0 elsewhere and after the dialogue's end


def prefix_trees(rows: list, budget: int, width: int) -> list:
    """B lists of ids -> trees, lists of (b, path), of at most `budget` places (or one row). A row
    joins the tree before it where that costs less than a tree of its own. Sharing saves places but
    adds attention pairs; a place costs about as much as 3 * width pairs."""
    trees, last, path, size = [], [], [], 0
    for b in sorted(range(len(rows)), key=lambda b: rows[b]):  # rows that begin alike are adjacent
        n, shared = len(rows[b]), len(os.path.commonprefix([rows[b], last]))
        new = n - shared
        pairs = (size + new) ** 2 - size ** 2 - n ** 2  # more of them in the tree than apart
        if pairs >= 3 * width * shared or size + new > budget:
            trees.append([])
            size, shared, new = 0, 0, n
        path, last = path[:shared] + list(range(size, size + new)), rows[b]
        size += new
        trees[-1].append((b, path))
    return trees


def pack(dialogues: list, budget: int, model):
    """Packs dialogues into micro-batches of at most `budget` padded places. Yields (the indices of
    the B dialogues of each, PackedTrees)."""
    width = model.config.get_text_config().hidden_size
    trees = prefix_trees([d.ids for d in dialogues], budget, width)
    sizes = [1 + max(max(path) for _, path in tree) for tree in trees]
    for batch in micro_batches(sizes, budget):
        R, P = len(batch), sizes[batch[0]]
        ids = torch.zeros(R, P, dtype=torch.long)
        ends = torch.arange(1, P + 1).repeat(R, 1)  # of each place's subtree; of padding, itself
        members, paths = [], []
        for r, (b, path) in ((r, member) for r, i in enumerate(batch) for member in trees[i]):
            members.append(b)
            paths.append([r * P + place for place in path])
            ids[r, path] = torch.tensor(dialogues[b].ids)
            ends[r, path] = path[-1] + 1  # a place's last dialogue has the last of its subtree
        key, masks = torch.arange(P, device=model.device), [dialogues[b].mask for b in members]
        visible = (key <= key[:, None]) & (key[:, None] < ends.to(model.device)[:, None])
        yield members, PackedTrees(ids.to(model.device), visible, pad_rows(paths, model.device),
                                   pad_rows(masks, model.device))


def tree_logprobs(model, trees: PackedTrees, temperature: float = 1.0):
    """token_logprobs of the B dialogues, (B, T-1), but a token shared in a tree is computed once.
    Autograd adds up, at such a token, the gradients of all dialogues that contain it."""
    positions = trees.visible.sum(-1) - 1  # a token's ancestors are all that stands before it
    distance = positions[:, :, None] - positions[:, None]                           # (R, P, P)
    mask = attention_mask(model.config.get_text_config(), trees.visible, distance)
    hidden = model.base_model(input_ids=trees.ids, position_ids=positions, attention_mask=mask,
                              use_cache=False).last_hidden_state                    # (R, P, D)
    keep = trees.mask[:, 1:].bool()                                                 # (B, T-1)
    # F.embedding, and not hidden[...]: its gradient adds up in a fixed order. That of indexing
    # adds in the order in which a CPU's threads arrive, and two runs would differ.
    before = F.embedding(trees.paths[:, :-1][keep], hidden.flatten(0, 1))           # (N, D)
    targets = trees.ids.flatten()[trees.paths[:, 1:][keep]]                         # (N,)
    logps = head_logprobs(model, before, targets, temperature)
    return torch.zeros(keep.shape, device=keep.device).masked_scatter(keep, logps)


# ========================================================================== 5. the model, and LoRA

HUB_OWNERS = {"qwen": "Qwen", "gemma": "google", "llama": "meta-llama", "smollm": "HuggingFaceTB"}


def resolve_model(name: str) -> str:
    """"Qwen2.5-0.5B" -> "Qwen/Qwen2.5-0.5B"; local folders and full Hub ids as they are."""
    owner = next((o for prefix, o in HUB_OWNERS.items() if name.lower().startswith(prefix)), None)
    return f"{owner}/{name}" if owner and "/" not in name and not os.path.isdir(name) else name


def load_model(name: str, device):
    """A Hub id or local folder -> (model in fp32, without dropout, in eval mode; its Chat)."""
    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True)
        chat = Chat(tokenizer, model)
    except UserError:
        raise
    except Exception as error:  # of many kinds: OSError, ValueError, ImportError, jinja's, ...
        raise UserError(f"{path} cannot be loaded, neither from a local folder nor from the Hub: "
                        f"is the name right, and is there a network? ({error!r:.300})")
    for parameter in model.parameters():  # aligned memory, unlike a mapped file's: reproducible
        parameter.data = parameter.data.clone()
    for module in model.modules():  # no dropout, or pi_theta would not be the policy that sampled
        for key, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in key or isinstance(module, nn.Dropout)):
                setattr(module, key, 0.0)
    model = model.to(device).eval()
    check_model(model)
    return model, chat


@torch.no_grad()
def check_model(model):
    """Refuses a model unless the sampler and the prefix trees give the log-probs of its own plain
    forward pass, here of two rows with a common beginning."""
    prompts, cache = [[2, 3, 4, 5], [2, 3, 4, 6]], KVCache(1, model.device)
    cache.block = 512  # a model must not take the last slot for the query's position
    try:
        prefill(model, cache, [[2, 3, 4]])
        cache.select([0, 0])
        replies, sampled, _ = sample(
            model, prompts, max_new_tokens=4, temperature=1.0, stop_ids=[], cache=cache,
            generator=torch.Generator(model.device).manual_seed(0))
        rows = [prompt + reply for prompt, reply in zip(prompts, replies)]
        ids, sampled = (torch.tensor(x, device=model.device) for x in (rows, sampled))
        own = model(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        (members, trees), = pack([Dialogue(row, [1] * len(row)) for row in rows], 99, model)
        gaps = [tree_logprobs(model, trees) - own[members], sampled - own[:, -4:]]
        worst = torch.cat(gaps, 1).abs().max().item()
        assert worst <= 1e-2, f"log-probs differ by {worst:.2g}"  # nan is never <=
    except Exception as error:  # whatever a model that is built otherwise raises
        raise UserError(f"the sampler does not reproduce {type(model).__name__} ({error!r:.300}); "
                        "use a Llama-like or GPT-2-like model")


def context_size(model) -> int:
    """The tokens that the model reads. longrope turns all keys where its original context ends."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def load_policy(args, source, device, lr):
    """The model that a stage trains, with fresh adapters if asked for; its Chat; its optimizer."""
    model, chat = load_model(source, device)
    if args.lora_rank:
        torch.manual_seed(args.seed % 2 ** 63)  # the start of the adapters
        add_lora(model, args.lora_rank, args.lora_alpha, args.bf16)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, chat, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def load_reference(args, policy, source):
    """pi_ref: the model as loaded from source. Under LoRA it is the policy, whose adapters update()
    switches off: no second copy in memory. With beta 0 it is never asked."""
    if args.lora_rank or args.beta == 0:
        return policy
    return freeze(load_model(source, policy.device)[0], args.bf16)


def freeze(model, bf16: bool):
    """No weight is trained. With bf16, linear weights are stored in it: autocast rounds them so."""
    model.requires_grad_(False)
    for module in model.base_model.modules():
        if bf16 and isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()
    return model


class LoRA(nn.Module):
    """A frozen linear layer and a trainable low-rank one: y = W x + alpha / rank * B A x."""
    enabled = True  # of all layers

    def __init__(self, base, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5 ** 0.5)
        self.A = nn.Parameter(start.to(base.weight.device))  # the same on every device
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        y = self.base(x)
        return y + self.scale * F.linear(F.linear(x, self.A), self.B) if LoRA.enabled else y


def add_lora(model, rank: int, alpha: float, bf16: bool = False):
    """Freezes the model and wraps every linear layer below the loss head."""
    adapted, total = 0, model.num_parameters()
    for name, layer in list(freeze(model, bf16).base_model.named_modules()):
        if type(layer) is nn.Linear:
            model.base_model.set_submodule(name, LoRA(layer, rank, alpha))
            adapted += layer.weight.numel()
    if not adapted:
        raise UserError(f"--lora-rank: {type(model).__name__} has no linear layer to adapt")
    print(f"LoRA     on linear layers, {adapted / total:.0%} of the weights")


@torch.no_grad()
def merge_lora(model):
    """Adds every B A to its W and puts the plain layer back."""
    for name, lora in list(model.named_modules()):
        if isinstance(lora, LoRA):
            delta = lora.scale * lora.B @ lora.A
            lora.base.weight.data = lora.base.weight.data.float() + delta
            model.set_submodule(name, lora.base)


@contextlib.contextmanager
def adapters_off():
    """All adapters are switched off: under LoRA, the policy is pi_ref then."""
    LoRA.enabled = False
    try:
        yield
    finally:
        LoRA.enabled = True


# ========================================================== 6. files, errors, and the run's folder

HERE = os.path.dirname(os.path.abspath(__file__))
STOP = threading.Event()  # set by Ctrl-C and SIGTERM: the step is finished and saved, then we leave
HINTS = {"out of memory|not enough memory|allocate memory":
         "memory is too small: lower --micro-batch-tokens, --group-size or --max-new-tokens",
         "failed writing|I/O error|No space left": "cannot write: is the disk full?",
         "non-finite": "training diverges; start again with a smaller --lr or --sft-lr:",
         "index out of range in self": "the tokenizer makes a token for which the model has no "
                                       "embedding: resize it (resize_token_embeddings)"}


class UserError(Exception):
    """Something that the user can mend: run() prints it in one line and exits with code 2."""


def run(main):
    """Runs main(). A user's mistake ends in one line and exit code 2, an interruption in 130."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):  # a pipe of Windows has no Greek letters
        stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except KeyboardInterrupt as interrupt:
        print(f"interrupted. {interrupt}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        hint = next((h for words, h in HINTS.items() if re.search(words, str(error))), "")
        if not hint and not isinstance(error, (UserError, OSError)):
            raise
        print("error:", *hint.split(), *str(error).split(), file=sys.stderr)
        sys.exit(2)


def read_jsonl(path):
    """Yields (where, object) for every line that is not blank; where is "file.jsonl:12"."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
                    if not isinstance(row, dict):
                        raise ValueError("a JSON object is expected")
                    yield f"{path}:{number}", row
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not JSON ({error}); mend or delete this line")


QUESTION = {"id": str, "question": str, "answer": str, "answer_type": str, "rationale": str}
PROBE = {"rule": str, "probe": str, "answer": str, "answer_type": str, "rationale": str,
         "consistent": bool}


def check_question(row, where, keys=QUESTION, seen=None):
    """Returns row if it is a question (with other keys, a probe); else says what is wrong, where.
    seen: where each id stood so far."""
    for key, kind in keys.items():
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, kind) or key != "rationale" and not str(value).strip():
            raise UserError(f'{where}: "{key}" is missing, empty or no {kind.__name__}')
    answer, kind = row["answer"], row["answer_type"]
    if kind not in reward.INSTRUCTION:
        raise UserError(f'{where}: unknown answer_type "{kind}"; it is one of '
                        f"{', '.join(reward.INSTRUCTION)}")
    if "id" in keys and not reward.is_correct(f"The answer is {answer}.", answer, kind):
        raise UserError(f"{where}: the answer {answer!r} cannot be read as a {kind}; mend it")
    if seen is not None and seen.setdefault(row["id"], where) != where:
        raise UserError(f'{where}: the id "{row["id"]}" stands at {seen[row["id"]]} already')
    return row


def read_probes(path, or_questions=False):
    """A D_EI file -> (header, rows), every line checked; README.md shows its format. With
    or_questions, a file of questions will do: its rows have no "probes"."""
    lines, keys, seen = list(read_jsonl(path)), QUESTION, {}
    header = lines[0][1].get("ei") if lines else None
    if isinstance(header, dict):
        del lines[0]
        keys = QUESTION | {"kept": bool, "probes": list}
    elif not or_questions:
        raise UserError(f'{path}:1: no D_EI file of ei.py: there is no {{"ei": ...}} header')
    for where, row in lines:
        check_question(row, where, keys, seen)
        for probe in row["probes"] if "probes" in keys else []:
            check_question(probe, f"{where}, a probe", PROBE)
    return header, [row for _, row in lines]


def write_whole(path, content):
    """Bytes, or a function that writes to a file, replace the old file: whole, or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        content(file) if callable(content) else file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def append_csv(path, row: dict):
    """Appends a row, below a line of names if the file is new."""
    with open(path, "a") as file:
        if file.tell() == 0:
            print(*row, sep=",", file=file)
        print(*(f"{value:.6g}" for value in row.values()), sep=",", file=file)


def lock(file, busy: str):
    """Locks an open file until it is closed; if another process holds it, an error says `busy`."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy)
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks


# Flags that may change in a resumed run; the content of --probes and --eval is hashed.
MAY_CHANGE = ("resume", "steps", "save_every", "device", "out", "probes", "eval", "eval_every",
              "micro_batch_tokens", "gradient_checkpointing")
LOGS = {"SFT": ["sft.csv"], "ExGRPO": ["metrics.csv", "dialogues.txt"]}  # written by each stage


def open_run(args):
    """Makes the run's folder and run.json or, with --resume, checks that it holds the same run.
    Returns run.json, open and locked: a run has one process."""
    path = os.path.join(args.out, "run.json")
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings["student"] = args.student.removeprefix(HERE + os.sep)  # this project may be moved
    for flag in ("probes", "eval"):
        content = b"".join(pathlib.Path(name).read_bytes() for name in getattr(args, flag))
        settings[f"{flag}_sha256"] = hashlib.sha256(content).hexdigest()
    files = set(os.listdir(args.out) if os.path.isdir(args.out) else ()) - {"run.json.tmp"}
    if files and not args.resume or args.resume and "run.json" not in files:
        raise UserError(f"{args.out} holds {', '.join(sorted(files)[:3]) or 'no run'}: --resume "
                        "goes on with the run that is there, a new --out starts another")
    if files & {"sft", "config.json"} and "checkpoint.pt" not in files:
        raise UserError(f"--resume: {args.out} holds a model, but its checkpoint.pt is gone: put "
                        "it back, or start again with a new --out")
    if not files:
        os.makedirs(args.out, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1).encode())
    theirs = json.loads(pathlib.Path(path).read_text("utf-8"))
    differing = [f"{name} = {theirs.get(name)!r}, not {value!r}"
                 for name, value in settings.items() if value != theirs.get(name)]
    if differing:
        raise UserError(f"--resume: the run in {args.out} was started with {'; '.join(differing)}; "
                        "use its flags and data, or a new --out")
    file = open(path, "r+b")  # NFS locks no file that is open for reading only
    lock(file, f"another process is working on the run in {args.out}; wait, or name another --out")
    return file


def ask_to_stop(number, _):
    """The handler of Ctrl-C and SIGTERM. A second one kills."""
    STOP.set()
    signal.signal(number, signal.SIG_DFL)
    # Not print(): the signal may come while one is under way.
    os.write(2, b"\nwill stop and save after this step; a second signal ends it at once\n")


def end_step(args, stage, step, last, model, optimizer):
    """Saves every --save-every steps, after the last one, and when we were asked to stop. Every
    draw is seeded by the seed and the step or epoch, so no state of a generator is saved."""
    if step % args.save_every == 0 or step == last or STOP.is_set():
        sizes = [os.path.getsize(os.path.join(args.out, log)) for log in LOGS[stage]]
        state = {"stage": stage, "step": step, "log_sizes": sizes,
                 "weights": {k: p.data for k, p in model.named_parameters() if p.requires_grad},
                 "optimizer": optimizer.state_dict()}
        write_whole(os.path.join(args.out, "checkpoint.pt"), lambda file: torch.save(state, file))
    if STOP.is_set():
        raise KeyboardInterrupt(f"Saved after step {step} of {stage}: go on with --resume")


def load_checkpoint(args, stage, model, optimizer) -> int:
    """Restores the state of this stage and returns its step, or 0. What its logs say of later steps
    is removed: it will be written again."""
    path, step, sizes = os.path.join(args.out, "checkpoint.pt"), 0, [0, 0]
    state = torch.load(path, map_location="cpu", weights_only=True) if os.path.exists(path) else {}
    if (state.get("stage"), stage) == ("ExGRPO", "SFT"):
        raise UserError(f"the run in {args.out} is past its warm-up, whose result, sft, is gone: "
                        "put it back, or start again with a new --out")
    if state.get("stage") == stage:
        step, sizes = state["step"], state["log_sizes"]
        model.load_state_dict(state["weights"], strict=False)  # frozen weights are not in it
        optimizer.load_state_dict(state["optimizer"])
    for name, size in zip(LOGS[stage], sizes):
        with open(os.path.join(args.out, name), "ab") as log:
            log.truncate(min(size, log.tell()))
    return step


def save_model(model, chat, folder):
    """Writes a plain Hugging Face folder, adapters merged."""
    merge_lora(model)
    # So that servers stop where we do. Settings of sampling are left out: they can be invalid.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id, eos_token_id=chat.stop_ids,
        pad_token_id=model.generation_config.pad_token_id)
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


# ================================================================================= 7. command line

TOY = os.path.join(HERE, "toy", "")
TOY_STUDENT = TOY + "student"
TOY_TESTS = [TOY + "test.jsonl", TOY + "test_reversed.jsonl", TOY + "ei_test.jsonl"]


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, and one-line errors as everywhere else."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


def at_least(low, kind=int, above=False):
    """An argparse type: a number that is >= low, or > low if `above`."""
    def number(text):
        value = kind(text)
        if low < value < float("inf") or value == low and not above:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}")
    return number


def pick_device(name: str):
    """"auto" is cuda where there is a GPU, else cpu."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds none on this machine; try --device auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def parse_args():
    parser = Parser("Stages 2 and 3 of ExGRPO: SFT warm-up on probes, then reinforcement.")
    natural, count, size = at_least(0), at_least(1), at_least(0, float)
    positive = at_least(0, float, above=True)
    add = parser.add_argument_group("what to train, on what").add_argument
    add("--student", default=TOY_STUDENT, help="local folder or Hub name")
    add("--probes", nargs="+", metavar="FILE", default=[TOY + "probes.jsonl"], help="D_EI files")
    add("--out", default="runs/exgrpo", help="folder of the run, new or empty unless --resume")
    add("--resume", action="store_true", help="go on with the run in --out")
    add = parser.add_argument_group("the method").add_argument
    add("--turns", type=natural, help="k, probes in a full dialogue; 0: plain GRPO; None: 1, or 0 "
        "where --rl-data is not dialogues")
    add("--group-size", type=at_least(2), default=8, help="G, dialogues per question and scenario")
    add("--partial", choices=["forked", "independent"], default="forked",
        help="partial dialogues: forked from the full ones, or sampled apart")
    add("--advantage", choices=["added", "separate", "pooled"], default="added",
        help="how the bonus enters the group's advantages")
    add("--credit", choices=["outcome", "turn"], help="what a reply to a probe is paid for: the "
        "dialogue's last answer, or its own; None: turn, where there are probes")
    add("--rl-data", choices=["dialogues", "probes", "both"], default="dialogues",
        help="what is sampled: dialogues; single probes, each paid for its own answer (the paper's "
        "baseline RL (R_outcome)); or single probes and questions")
    add("--delta", type=size, default=0.5, help="the bonus, Eq. 5, in units of reward; 0: none")
    add("--nu", type=at_least(1, float), default=1.0, help="margin of the bonus, Eq. 5")
    add("--beta", type=size, default=0.01, help="weight of the KL penalty, Eq. 7")
    add("--epsilon", type=positive, default=0.2, help="clip range, Eq. 7")
    add("--aux-weight", type=size, default=0.3, help="weight of the SFT loss, Eq. 8")
    add("--sft-epochs", type=natural, default=3, help="warm-up, Eq. 3; 0: a cold start")
    add("--sft-form", choices=["single", "dialogue"], help="an example of the warm-up: a probe or "
        "question, or a dialogue of 1 to k + 1; None: dialogue, where there are probes")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=natural, default=120, help="ExGRPO steps")
    add("--questions-per-step", type=count, default=12, help="Q, questions in a step")
    add("--updates", type=count, default=1, help="updates per step on the same samples")
    add("--lr", type=positive, help="of ExGRPO; None: 1.35e-6 * (3584 / width) ** 1.5, LoRA: * 10")
    add("--sft-lr", type=positive, help="of the warm-up; None: 3e-6 * 3584 / width, LoRA: * 10")
    add("--sft-batch-size", type=count, default=16, help="examples in a step of the warm-up")
    add("--temperature", type=positive, default=1.0, help="of sampling and of scoring")
    add("--max-new-tokens", type=count, default=256, help="longest reply, tokens")
    add("--lora-rank", type=natural, default=0, help="LoRA rank; 0 trains all weights")
    add("--lora-alpha", type=positive, default=32.0, help="LoRA scale * rank")
    add = parser.add_argument_group("the machine").add_argument
    add("--micro-batch-tokens", type=count, help="padded tokens in a forward pass of training: "
        "memory and speed, not the result; None: 1024 on a CPU, 4096 on a GPU")
    add("--bf16", action="store_true", help="bf16 autocast; trained weights stay fp32")
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--save-every", type=count, default=20, help="steps between checkpoints")
    add("--seed", type=natural, default=0, help="of the data order, the forks and the samples")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add = parser.add_argument_group("accuracy, in the table at the end").add_argument
    add("--eval", nargs="*", metavar="FILE", help="question or D_EI files (.jsonl), asked greedily "
        "before SFT, after it and at the end; None: the toy's, for the toy's student only")
    add("--eval-every", type=natural, default=0, help="ask them every so many steps, too; 0: don't")
    add("--eval-limit", type=count, default=600, help="questions or probes of each file")
    args = parser.parse_args()
    if args.turns is None:
        args.turns = int(args.rl_data == "dialogues")
    if args.turns and args.rl_data != "dialogues":
        raise UserError(f"--rl-data {args.rl_data} samples single turns: leave --turns out")
    if not args.turns and (args.credit == "turn" or args.sft_form == "dialogue"):
        raise UserError("--credit turn and --sft-form dialogue need probes: --turns 1 or more")
    args.credit = args.credit or ("turn" if args.turns else "outcome")
    args.sft_form = args.sft_form or ("dialogue" if args.turns else "single")
    if args.eval is None:  # the toy's tests say nothing about another student
        args.eval = TOY_TESTS if os.path.abspath(args.student) == TOY_STUDENT else []
    return args


def load_training_data(args) -> list:
    """The kept questions of D_EI with their consistent probes."""
    rows = [row for path in args.probes for row in read_probes(path)[1]]
    kept = [row | {"probes": [probe for probe in row["probes"] if probe["consistent"]]}
            for row in rows if row["kept"]]
    kept = [row for row in kept if row["probes"]]
    most = max((len(row["probes"]) for row in kept), default=0)
    if not kept or args.turns > most:
        raise UserError(f"{' '.join(args.probes)}: {len(kept)} of {len(rows)} questions are kept, "
                        f"none with more than {most} consistent probes: too few for --turns "
                        f"{args.turns}; python ei.py --report shows why")
    return kept


def load_eval(args) -> dict:
    """The questions, or the consistent probes, in every file of --eval -> {file: rows}."""
    tests = {}
    for path in args.eval:
        rows = [item for row in read_probes(path, True)[1] for item in row.get("probes", [row])
                if item.get("consistent", True)]
        name = os.path.basename(path).removesuffix(".jsonl")
        if not rows or name in tests:
            raise UserError(f"--eval {path}: no question in it, or another file of this name")
        tests[name] = rows[:args.eval_limit]
    return tests


def read_eval(run: str) -> dict:
    """The eval.json of a run's folder: {label: {file: a "0" or "1" for each question}}."""
    path = pathlib.Path(run, "eval.json")
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def evaluate_checkpoint(args, label: str, model, chat: Chat, tests: dict, again=False) -> None:
    """Asks tests, as load_eval() gave them, greedily, and adds the verdicts to OUT/eval.json.
    Those already there are kept; again replaces them: a kill has undone the steps they are of."""
    table = read_eval(args.out)
    known = table[label] = {} if again else table.get(label, {})
    for name, rows in tests.items():
        if name in known:
            continue
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            replies = generate(model, chat, [chat.first(user_turn(row)) for row in rows],
                               max_new_tokens=args.max_new_tokens)
        known[name] = "".join(
            "01"[not truncated and reward.is_correct(text, row["answer"], row["answer_type"])]
            for (text, truncated, _), row in zip(replies, rows))
        write_whole(os.path.join(args.out, "eval.json"), json.dumps(table, indent=1).encode())


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test -> p. If a and b were equally good, a fair coin would decide
    which of the two gets a question right that only one of them does."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def difference(after: str, before: str) -> str:
    """What two models' verdicts on the same questions differ by, per cent, and p."""
    pairs = list(zip(after, before))
    gained, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return f"{100 * (gained - lost) / len(after):+.1f} (p = {mcnemar(gained, lost):.1g})"


def print_summary(args):
    """The accuracies before and after, what reinforcement added, and what to do next."""
    table = read_eval(args.out)
    names = list([*table.values()][-1]) if table else []
    rows = {label: {name: reward.share(x.count("1"), len(x)) for name, x in found.items()}
            for label, found in table.items()}
    sft, end = (table.get(label) for label in ("after SFT", f"after step {args.steps}"))
    if sft and end:
        rows["ExGRPO - SFT"] = {name: difference(end[name], sft[name]) for name in end}
    if rows:
        print("\n% right (95 % interval)" + "".join(f"{name:>22}" for name in names))
    for label, cells in rows.items():
        print(f"{label:23}" + "".join(f"{cells.get(name, '-'):>22}" for name in names))
    student = os.path.relpath(args.student) if os.path.isdir(args.student) else args.student
    data = "" if args.eval == TOY_TESTS else (
        f" --data QUESTIONS.jsonl --max-new-tokens {args.max_new_tokens}")
    print(f"\nmodel in {args.out}, beside metrics.csv and dialogues.txt (read those!)\n"
          f"next: python evaluate.py --model {args.out} --baseline {student}{data}\n"
          f"      python evaluate.py --curves {args.out}")


def main():
    args = parse_args()
    device, questions, tests = pick_device(args.device), load_training_data(args), load_eval(args)
    model, chat = load_model(args.student, device)
    # Adam moves a layer's output by about rate * width, so rates of 7B models (3584) are scaled.
    # The power 1.5 of --lr fits two rates: a usual one at 7B, and 2e-4, the toy's best (width 128).
    narrower = 3584 / model.config.get_text_config().hidden_size
    lora = 10 if args.lora_rank else 1
    args.lr = args.lr or 1.35e-6 * narrower ** 1.5 * lora
    args.sft_lr = args.sft_lr or 3e-6 * narrower * lora
    args.micro_batch_tokens = args.micro_batch_tokens or (1024 if device.type == "cpu" else 4096)
    if args.turns:
        chat.later("")  # a template that cannot grow is refused now, and not after the warm-up
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    with open_run(args):
        n_probes = sum(len(row["probes"]) for row in questions)
        print(f"student  {args.student}: {model.num_parameters() / 1e6:.1f} M weights, {device}\n"
              f"data     {' '.join(args.probes)}: {len(questions)} questions, {n_probes} probes\n"
              f"plan     {args.sft_epochs} SFT epochs, learning rate {args.sft_lr:.2g}; then "
              f"{args.steps} steps at {args.lr:.2g}, of {args.questions_per_step} questions x "
              f"{args.group_size} dialogues, k = {args.turns}\nrun      {args.out}", flush=True)
        evaluate_checkpoint(args, "student", model, chat, tests)
        del model
        if args.sft_epochs and not os.path.exists(os.path.join(args.out, "sft", "config.json")):
            warm_up(args, questions, device)
        reinforce(args, questions, tests, device)
    print_summary(args)


if __name__ == "__main__":
    run(main)
