"""Advantages, log-probs and losses against closed forms, TRL's own numbers and each other."""
import copy
import itertools
import json
import math
import os
import statistics
import types

import pytest
import torch
from transformers import Qwen2Config

import exgrpo
import reward
from test_sampler import KINDS
from tiny import tiny_tokenizer

with open(os.path.join(os.path.dirname(__file__), "data", "trl.json")) as file:
    TRL = json.load(file)  # its "source" says what these numbers are


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def trl_inputs(case):
    names = ("per_token_logps", "old_per_token_logps", "ref_per_token_logps", "advantages")
    return [tensor(TRL["inputs"][name]) for name in names] + [torch.tensor(case["mask"])]


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: case["label"])
def test_policy_loss_equals_trl(case):
    """Value, gradient, KL and clip share to 1e-9, ratios on both sides of the clip range, ragged
    rows."""
    logps, old, ref, advantages, mask = trl_inputs(case)
    logps.requires_grad_()
    loss, stats = exgrpo.policy_loss(logps, old, ref, advantages, mask, epsilon=case["epsilon"],
                                     beta=case["beta"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    assert torch.allclose(logps.grad, tensor(case["grad"]), rtol=0, atol=1e-9)
    assert stats["kl"].item() == pytest.approx(case["metrics"]["kl"], abs=1e-9)
    assert stats["clip_share"].item() == pytest.approx(
        case["metrics"]["clip_ratio/region_mean"], abs=1e-9)


def test_group_advantages_equal_trl():
    """D10 too: four groups of eight, each with a mean and a deviation of its own."""
    fixture = TRL["advantages"]
    rewards = tensor(fixture["rewards"]).view(-1, fixture["group_size"])
    expected = tensor(fixture["advantages"]).view_as(rewards)
    assert torch.allclose(exgrpo.group_advantages(rewards), expected, rtol=0, atol=1e-6)
    exact = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(exgrpo.group_advantages(rewards), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [0.6, 0.01, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("members", [7, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_advantage_exactly_zero(value, members, dtype):
    """D9: eight rewards of 0.6 have a deviation of 1e-8 in fp32; with a small epsilon that is an
    advantage of 0.81. In double precision something is left too, and "no advantage" is tested
    by == 0."""
    rewards = torch.full((2, members), value, dtype=dtype)
    assert exgrpo.group_advantages(rewards).abs().max() == 0


def test_a_group_of_one_is_refused():
    with pytest.raises(AssertionError, match="group of one"):
        exgrpo.group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("advantage, ratio, gradient", [
    (1.0, 0.5, 0.5), (1.0, 1.5, 0.0), (-1.0, 0.5, 0.0), (-1.0, 1.5, -1.5)])
def test_clip_acts_on_the_right_side(advantage, ratio, gradient):
    """D14: for a negative advantage the bound is the lower one; reversed, a bad token is pushed
    down without end. d objective / d logp is ratio * advantage where nothing is clipped, else 0."""
    logps = tensor([[math.log(ratio)]]).requires_grad_()
    zero = torch.zeros(1, 1, dtype=torch.float64)
    loss, stats = exgrpo.policy_loss(logps, zero, zero, tensor([advantage]), torch.ones(1, 1),
                                     epsilon=0.2, beta=0.0)
    loss.backward()
    assert -logps.grad.item() == pytest.approx(gradient)
    assert stats["clip_share"] == (gradient == 0)


def test_the_ratio_is_per_token():
    """D22: one ratio for the whole reply would be 1.5 * 0.5, inside the clip range of neither its
    first token, which is clipped, nor of its second, which is not."""
    logps = tensor([[math.log(1.5), math.log(0.5)]]).requires_grad_()
    zero = torch.zeros(1, 2, dtype=torch.float64)
    loss, stats = exgrpo.policy_loss(logps, zero, zero, tensor([1.0]), torch.ones(1, 2),
                                     epsilon=0.2, beta=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 + 0.5) / 2) and stats["clip_share"] == 0.5
    assert logps.grad.tolist()[0] == pytest.approx([0.0, -0.5 / 2])


def test_an_advantage_may_stand_at_each_token():
    """(B,) is the same as (B, T) with equal rows; and one token's advantage moves that token
    alone: the place where someone else's idea of credit goes in."""
    case = TRL["cases"][0]
    logps, old, ref, advantages, mask = trl_inputs(case)
    logps.requires_grad_()

    def loss_and_gradient(advantages):
        loss, stats = exgrpo.policy_loss(logps, old, ref, advantages, mask, epsilon=0.2, beta=0.04)
        return loss, *stats.values(), torch.autograd.grad(loss, logps)[0]
    whole = loss_and_gradient(advantages)
    spread = advantages[:, None].expand(logps.shape).clone()
    assert all(torch.equal(a, b) for a, b in zip(whole, loss_and_gradient(spread), strict=True))
    # a trained token whose ratio is not clipped: its gradient must follow its advantage
    free = mask.bool() & ((logps - old).exp() - 1).abs().lt(0.2)
    b, t = free.nonzero()[0].tolist()
    spread[b, t] += 1.0
    moved = loss_and_gradient(spread)[-1] - whole[-1]
    assert moved[b, t].item() == pytest.approx(
        -(logps - old).exp()[b, t].item() / mask.sum().item())
    moved[b, t] = 0.0
    assert moved.abs().max() == 0


def test_ratio_one_has_the_gradient_of_reinforce():
    """D19: on fresh samples the ratio is 1 and the loss is minus the mean advantage, yet its
    gradient is that of advantage * log pi. An implementation without it learns nothing. D11: a
    token weighs the same in a short reply and in a long one; a mean per reply would make wrong
    answers longer."""
    logps = tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -1.0]]).requires_grad_()
    mask, advantages = torch.tensor([[1, 1, 1], [1, 1, 0]]), tensor([0.7, -1.2])
    loss, _ = exgrpo.policy_loss(logps, logps.detach(), logps.detach(), advantages, mask,
                                 epsilon=0.2, beta=0.04)
    loss.backward()
    assert torch.allclose(logps.grad, -(advantages[:, None] * mask) / 5)


def test_k3_is_the_kl_and_its_gradient_that_of_the_reverse_kl():
    """D13: over a whole vocabulary of six, E_pi[k3] is KL(pi || ref); the gradient of k3 as a loss
    is that of KL(ref || pi). A wrong sign would reward leaving the reference."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    pi = x.log_softmax(0)

    def k3(logps):
        _, stats = exgrpo.policy_loss(logps[:, None], logps[:, None], ref[:, None], torch.zeros(6),
                                      torch.ones(6, 1), epsilon=0.2, beta=1.0)
        return stats["kl"]
    per_token = torch.stack([exgrpo.policy_loss(
        pi[i:i + 1, None], pi[i:i + 1, None].detach(), ref[i:i + 1, None], torch.zeros(1),
        torch.ones(1, 1), epsilon=0.2, beta=1.0)[0] for i in range(6)])           # = +k3 each
    assert (per_token >= 0).all()
    value = (pi.exp() * per_token).sum()
    assert value.item() == pytest.approx((pi.exp() * (pi - ref)).sum().item())
    assert k3(pi.detach()).item() == pytest.approx(per_token.mean().item())
    (ours,) = torch.autograd.grad((pi.exp().detach() * per_token).sum(), x, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - pi)).sum(), x)
    assert torch.allclose(ours, reverse)


def test_kl_of_a_fled_policy_is_finite():
    """exp(ref - pi) overflows where the policy has all but lost a token of the reference."""
    logps = torch.tensor([[-300.0]]).requires_grad_()
    loss, _ = exgrpo.policy_loss(logps, logps.detach(), torch.zeros(1, 1), torch.ones(1),
                                 torch.ones(1, 1), epsilon=0.2, beta=0.04)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()


def test_padding_may_hold_anything_and_inputs_stay_as_they_are():
    """D23: nan * 0 is nan, so a mask must select, not multiply; and writing into a view of the
    batch doubled nano-aha's token count."""
    case = TRL["cases"][0]
    inputs = trl_inputs(case)
    clean, _ = exgrpo.policy_loss(*inputs, epsilon=0.2, beta=0.04)
    dirty = [x.clone() for x in inputs]
    for x in dirty[:3]:
        x[dirty[4] == 0] = float("nan")
    copies = [x.clone() for x in dirty]
    dirty[0].requires_grad_()
    loss, _ = exgrpo.policy_loss(*dirty, epsilon=0.2, beta=0.04)
    loss.backward()
    assert loss.item() == pytest.approx(clean.item())
    assert torch.isfinite(dirty[0].grad).all()
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(dirty, copies))


# ------------------------------------------------------------------ the bonus and what a group is

def answers(chat, *texts):
    """One-turn dialogues that answer so."""
    dialogues = [exgrpo.Dialogue() for _ in texts]
    for dialogue, text in zip(dialogues, texts):
        dialogue.add_user(chat.first("Why?"))
        dialogue.add_reply(chat.encode(f"The answer is {text}.") + [chat.end_id], chat)
    return dialogues


def question(answer):
    return {"answer": answer, "answer_type": "number"}


def played(chat, full, partial):
    """The rollout of one question, gold 3: two strings of answers, as "334"."""
    return exgrpo.Rollout([question("3")], [[question("5")]], answers(chat, *full),
                          answers(chat, *partial))


def rewards_of(chat, rollout, delta=0.5):
    """As a step forms them -> flags, verdicts, outcomes, rewards."""
    args = types.SimpleNamespace(group_size=len(rollout.full) // len(rollout.questions),
                                 turns=int(bool(rollout.partial)), partial="forked", delta=delta,
                                 nu=1.0)
    verdicts = exgrpo.grade(chat, rollout)
    return args, verdicts, *exgrpo.compute_rewards(verdicts, args)


def advantages_of(chat, rollout, variant, delta=0.5):
    """As a step forms them -> (2, G)."""
    *_, outcomes, rewards = rewards_of(chat, rollout, delta)
    return exgrpo.dialogue_advantages(outcomes, rewards, variant)[:, 0]


VARIANTS = ["added", "separate", "pooled"]


def test_the_bonus_reaches_the_advantages(loaded):
    """D25: dead, or paid the other way round, it would look like one that works, as long as the
    rewards rise for other reasons."""
    _, chat = loaded("llama")
    rollout = exgrpo.Rollout([question("3")] * 2, [[question("5")]] * 2,
                             answers(chat, *"334344"),   # 2/3, paid; 1/3, not paid
                             answers(chat, *"344334"))   # 1/3; 2/3

    def step(delta):
        args, verdicts, outcomes, rewards = rewards_of(chat, rollout, delta)
        advantages = exgrpo.dialogue_advantages(outcomes, rewards, "added")
        return advantages.flatten().tolist(), exgrpo.rollout_metrics(
            chat, rollout, verdicts, outcomes, rewards, advantages, args)
    advantages, metrics = step(0.5)
    most, least = 2 / 3 / (3 ** -0.5 + 1e-4), 1 / 3 / (3 ** -0.5 + 1e-4)
    two, one = [least, least, -most], [most, -least, -least]   # right of three, without bonus
    expected = [least + 0.5, least + 0.5, -most, *one, *one, *two]
    assert advantages == pytest.approx(expected)
    assert metrics["bonus_share"] == 0.5 and metrics["unparsed"] == 0
    assert metrics["acc_full"] == metrics["acc_partial"] == 0.5
    assert metrics["reward"] == pytest.approx((2 * 1.5 + 1 + 1 + 2) / 12)
    advantages, metrics = step(0.0)
    assert advantages == pytest.approx([*two, *one, *one, *two])
    assert metrics["bonus_share"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("replaced, by", [
    ("total_rewards", lambda full, partial, *_: ([-x for x in full], [-x for x in partial])),
    ("total_rewards", lambda full, partial, *_: ([0] * len(full), [0] * len(partial))),
    ("dsu_bonus", lambda *_: -2.0)])
def test_training_calls_the_equation_that_the_reader_is_shown(loaded, monkeypatch, variant,
                                                              replaced, by):
    """Our own bug: Eq. 6 stood twice. What reward.py shows served the log only, and garbage in its
    place changed no advantage."""
    _, chat = loaded("llama")
    rollout = played(chat, "334", "344")
    before = advantages_of(chat, rollout, variant)
    monkeypatch.setattr(reward, replaced, by)
    assert (advantages_of(chat, rollout, variant) - before).abs().max() > 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bonus_is_paid_to_right_full_dialogues_only(loaded, variant):
    """By hand, full dialogues 2/3 right and partial 1/3: rewards 1.5, 1.5, 0 and 1, 0, 0. A bonus
    that wrong full dialogues get too would leave the reward's own order, and differ here: under
    "separate" only by a few parts in 10^5."""
    _, chat = loaded("llama")

    def normalised(rewards, of=None):
        of = of or rewards
        return [(x - statistics.mean(of)) / (statistics.stdev(of) + 1e-4) for x in rewards]
    full, partial = [1.5, 1.5, 0.0], [1.0, 0.0, 0.0]
    expected = {
        "added": [[x + 0.5 * right for x, right in zip(normalised([1, 1, 0]), (1, 1, 0))],
                  normalised(partial)],
        "separate": [normalised(full), normalised(partial)],
        "pooled": [normalised(full, full + partial), normalised(partial, full + partial)]}
    ours = advantages_of(chat, played(chat, "334", "344"), variant)
    assert torch.allclose(ours, tensor(expected[variant]), rtol=0, atol=1e-9)


def test_a_reply_that_was_cut_earns_nothing(loaded):
    """"The answer is 12", cut out of 1225, was paid where the gold answer is 12. D21: it is counted
    as truncated, too."""
    _, chat = loaded("llama")
    rollout = exgrpo.Rollout(
        [question("12")], [[question("12")]],
        [conversation(chat, "12.", "12"), conversation(chat, "12", "12.")],
        [conversation(chat, "12."), conversation(chat, "12")])
    assert chat.decode(rollout.full[0].replies[-1]) == "The answer is 12"
    args, verdicts, outcomes, rewards = rewards_of(chat, rollout)
    assert verdicts == [[True, False], [False, True], [True], [False]]
    assert outcomes.tolist() == rewards.tolist() == [[[0, 1]], [[1, 0]]]
    metrics = exgrpo.rollout_metrics(chat, rollout, verdicts, outcomes, rewards,
                                     torch.zeros_like(rewards), args)
    assert metrics["truncated"] == metrics["acc_full"] == metrics["acc_probes"] == 0.5


def paid(full, partial, delta, variant):
    """Outcomes of one question's dialogues -> their advantages, (2, G)."""
    rewards = reward.total_rewards(full, partial, delta, 1.0)
    return exgrpo.dialogue_advantages(
        tensor([full, partial])[:, None], tensor(rewards)[:, None], variant)[:, 0]


def test_separate_normalisation_cancels_the_bonus():
    """{0, 1} and {0, 1 + delta} have the same z-scores, up to the epsilon of 1e-4."""
    without = paid([1, 1, 1, 0], [0, 0, 0, 0], 0.0, "separate")[0]
    for delta in (0.1, 0.5, 5.0):
        assert torch.allclose(paid([1, 1, 1, 0], [0, 0, 0, 0], delta, "separate")[0], without,
                              atol=1e-3)
    assert torch.allclose(without, tensor([0.5, 0.5, 0.5, -1.5]), atol=1e-3)


def test_pooled_normalisation_can_punish_correct_partial_dialogues():
    full, partial = paid([1, 1, 1, 1], [1, 1, 1, 0], 0.5, "pooled")
    assert torch.allclose(partial[:3], tensor([-0.2415] * 3), atol=1e-3)
    assert (full > 0).all()


THREE = list(itertools.product([0, 1], repeat=3))


@pytest.mark.parametrize("full", THREE)
def test_added_bonus_pays_correct_full_dialogues_only(full):
    """Over every outcome of two groups of three: the bonus lifts correct full dialogues by delta,
    changes no other advantage, and nothing correct is below 0."""
    for partial in THREE:
        base = paid(full, partial, 0.0, "added")
        ours = paid(full, partial, 0.5, "added")
        earned = 0.5 if sum(full) > sum(partial) else 0.0
        assert torch.allclose(ours[0] - base[0], earned * tensor(full))
        assert torch.equal(ours[1], base[1])
        assert (ours[tensor([full, partial]) == 1] >= 0).all()


def test_without_probes_it_is_plain_grpo(loaded):
    """--turns 0: full dialogues only, and the advantage of their outcomes under each variant."""
    _, chat = loaded("llama")
    rollout = exgrpo.Rollout([question("3"), question("4")], [[], []], answers(chat, *"334344"), [])
    *_, outcomes, rewards = rewards_of(chat, rollout)
    assert outcomes.tolist() == rewards.tolist() == [[[1, 1, 0], [0, 1, 1]]]
    for variant in VARIANTS:
        assert torch.allclose(exgrpo.dialogue_advantages(outcomes, rewards, variant)[0],
                              exgrpo.group_advantages(outcomes[0]), rtol=0, atol=1e-12)



# ------------------------------------------------------------------------- which token gets credit

def conversation(chat, *replies, twin=None, fork=0):
    """A dialogue with these replies; its first `fork` turns are copied from a twin. A reply without
    a full stop hit the token limit."""
    dialogue = copy.deepcopy(twin) if fork else exgrpo.Dialogue()
    for reply in replies:
        dialogue.add_user(chat.later("Why?") if dialogue.ids else chat.first("Why?"))
        ids = chat.encode(f"The answer is {reply}")
        dialogue.add_reply(ids + [chat.end_id] * reply.endswith("."), chat)
    return dialogue


def credit_of(chat, credit, partial="forked"):
    """Two questions, G = 2, golds 1 and 2 of the probes and 3 of the question. The first forks
    behind one turn of two, the second at once.
    -> the rollout, the dialogues' advantages by hand, those of their replies."""
    full = [conversation(chat, "1.", "2", "3."),    # its second reply is right, but truncated
            conversation(chat, "0.", "2.", "4."),
            conversation(chat, "1.", "2.", "3."),   # all replies of this group are right
            conversation(chat, "1.", "2.", "3.")]
    split = [conversation(chat, "1.", "3."), conversation(chat, "0.", "3.")]
    forked = [conversation(chat, "3.", twin=conversation(chat, "1."), fork=1),
              conversation(chat, "3.", twin=conversation(chat, "0."), fork=1)]
    rest = [conversation(chat, "3."), conversation(chat, "4.")]
    played = exgrpo.Rollout([question("3")] * 2, [[question("1"), question("2")]] * 2, full,
                            (forked if partial == "forked" else split) + rest)
    advantages = tensor([[[0.9, -0.8], [0.7, 0.6]], [[0.5, 0.4], [0.3, -0.2]]])
    args = types.SimpleNamespace(credit=credit, partial=partial)
    verdicts = exgrpo.grade(chat, played)
    return played, advantages, exgrpo.reply_advantages(verdicts, advantages, args)


def test_outcome_credit_gives_every_reply_the_advantage_of_its_dialogue(loaded):
    _, chat = loaded("llama")
    _, _, credit = credit_of(chat, "outcome")
    assert [list(x) for x in credit] == [
        [0.9] * 3, [-0.8] * 3, [0.7] * 3, [0.6] * 3, [0.5] * 2, [0.4] * 2, [0.3], [-0.2]]


@pytest.mark.parametrize("partial", ["forked", "independent"])
def test_turn_credit_pays_each_reply_for_its_own_answer(loaded, partial):
    """By hand: of two replies the right one gets 0.7070, the wrong one as much less. A truncated
    reply is wrong; a group of equal replies gets 0; so does what a fork has copied."""
    _, chat = loaded("llama")
    half = 0.5 / (0.5 ** 0.5 + 1e-4)
    copied = 0.0 if partial == "forked" else half
    _, _, credit = credit_of(chat, "turn", partial)
    expected = [[half, -half, 0.9], [-half, half, -0.8], [0.0, 0.0, 0.7], [0.0, 0.0, 0.6],
                [copied, 0.5], [-copied, 0.4], [0.3], [-0.2]]
    assert [list(x) for x in credit] == [pytest.approx(row) for row in expected]


def test_every_token_gets_the_advantage_of_its_reply(loaded):
    """Prompts, probes and the end token that closes a truncated reply get none."""
    _, chat = loaded("llama")
    played, _, credit = credit_of(chat, "turn")
    for dialogue, its in zip(played.full + played.partial, credit):
        spread = dialogue.per_token(its)
        assert len(spread) == len(dialogue.ids)
        assert not any(x for x, m in zip(spread, dialogue.mask) if m == 0)
        assert [x for x, m in zip(spread, dialogue.mask) if m] == [
            x for x, ids in zip(its, dialogue.replies) for _ in ids]


def test_turn_credit_in_the_gradient_is_a_sum_over_replies(loaded, loose_clip):
    """update() with an advantage for each reply = the sum of updates in which only one turn has
    its own."""
    model, chat = loaded("llama")
    args = changed(beta=0.0, aux_weight=0.0)
    dialogues, _, _ = a_step(model, chat)
    values = iter(torch.linspace(-1.0, 1.3, sum(len(d.replies) for d in dialogues)).tolist())
    whole = [[next(values) for _ in d.replies] for d in dialogues]

    def gradient(advantages):
        recorder = Recorder(model.parameters())
        exgrpo.update(model, model, recorder, copy.deepcopy(dialogues), advantages, [], args)
        return recorder.gradients[-1]
    parts = [gradient([[x if t == turn else 0.0 for t, x in enumerate(row)] for row in whole])
             for turn in range(3)]
    assert all(part.abs().max() > 0 for part in parts)
    assert torch.allclose(gradient(whole), sum(parts), atol=1e-5)


# -------------------------------------------------------------------- log-probs and whole gradients

ARGS = types.SimpleNamespace(group_size=3, max_new_tokens=10, temperature=0.7,
                             micro_batch_tokens=10 ** 6, bf16=False, beta=0.04, epsilon=0.2,
                             aux_weight=0.3, updates=1, turns=2)


def changed(**values):
    return types.SimpleNamespace(**(vars(ARGS) | values))


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "gemma3"])
def test_token_logprobs_padded_equal_unpadded(loaded, kind):
    """D6, D8: right-padded rows of ragged lengths, at exactly the places of the mask, equal the
    plain log_softmax of each row alone. A mask that is off by one speaks of the neighbouring
    token. The gradients are the plain ones, too."""
    model, _ = loaded(kind)
    rows = [[5, 17, 9, 40, 262, 262, 7], [8, 262, 3], [11, 12, 13, 14, 15]]
    masks = [[0, 0, 1, 1, 1, 0, 1], [0, 1, 1], [0, 1, 0, 1, 0]]
    ids, mask = (exgrpo.pad_rows(x, model.device) for x in (rows, masks))
    ours = exgrpo.token_logprobs(model, ids, mask, 0.7)
    assert ours.shape == (3, 6)
    expected = torch.zeros(3, 6)
    for b, (own, mark) in enumerate(zip(rows, masks)):
        logits = model(torch.tensor([own])).logits[0, :-1].float() / 0.7
        plain = torch.log_softmax(logits, -1).gather(1, torch.tensor(own[1:])[:, None])[:, 0]
        expected[b, :len(own) - 1] = plain * torch.tensor(mark[1:])
    assert torch.allclose(ours, expected, atol=1e-5)
    weights = next(model.parameters())
    grads = [torch.autograd.grad((logps * torch.arange(18.).view(3, 6)).sum(), weights)[0]
             for logps in (ours, expected)]
    assert grads[0].abs().max() > 0.1 and torch.allclose(*grads, atol=1e-4)


def test_chunked_head_has_the_same_values_and_gradients(loaded, monkeypatch):
    """D29: with a large vocabulary the logits are formed in chunks, at trained tokens only, and
    again in the backward pass: kept for it, all chunks would be in memory at once after all."""
    model, _ = loaded("qwen2")
    ids = torch.randint(2, 260, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    n_tokens, V = int(mask[:, 1:].sum()), model.config.vocab_size
    assert 20 < n_tokens <= 40
    results, rows = [], []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0])))
    for held, n_chunks, passes in ((2 ** 26, 1, 1), (20 * V, 2, 2), (n_tokens * V // 4, 4, 2)):
        monkeypatch.setattr(exgrpo, "LOGITS_HELD", held)
        model.zero_grad()
        rows.clear()
        logps = exgrpo.token_logprobs(model, ids, mask)
        assert len(rows) in (n_chunks, n_chunks + 1) and sum(rows) == n_tokens
        assert max(rows) * V <= held
        (logps * torch.arange(19)).sum().backward()
        assert sum(rows) == passes * n_tokens
        results.append([logps.detach()] + [p.grad.clone() for p in model.parameters()])
    hook.remove()
    model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-4) for other in results[1:]
               for a, b in zip(results[0], other))


def test_dropout_is_off_even_in_train_mode(loaded):
    """D16: with GPT-2's dropout of 0.1 the ratio between two passes ran from 0.22 to 8.5."""
    model, _ = loaded("gpt2")
    ids = torch.arange(2, 30)[None]
    try:
        once, twice, calm = model.train()(ids).logits, model(ids).logits, model.eval()(ids).logits
    finally:
        model.eval()
    assert torch.equal(once, twice) and torch.equal(once, calm)


def a_step(model, chat, seed=0):
    """Two questions, full and forked partial dialogues, teacher dialogues, and advantages by
    hand."""
    scripts = [["Why?", "So? " * 4, "The question"], ["What if?", "Then?", "The other"]]
    rng = torch.Generator().manual_seed(seed)
    full, partial = exgrpo.sample_dialogues(model, chat, scripts, ARGS, rng, [1, 0])
    probes = [[{"probe": "Why?", "rationale": "So.", "answer": "3", "answer_type": "number"}] * n
              for n in (1, 2)]
    advantages = torch.linspace(-1.0, 1.1, 12, dtype=torch.float64)
    return full + partial, advantages, [exgrpo.teacher_dialogue(chat, drawn) for drawn in probes]


def each_reply(dialogues, advantages):
    """One advantage a dialogue, for all of its replies, as `update` takes them."""
    return [[float(x)] * len(d.replies) for d, x in zip(dialogues, advantages, strict=True)]


class Recorder(torch.optim.SGD):
    """Keeps the gradients of every update, and moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1.0)
        self.gradients = []

    def step(self):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for group in self.param_groups
                                         for p in group["params"]]))


def gradient_of(model, chat, args, advantages=None, reference=None, order=None):
    dialogues, given, teacher = a_step(model, chat)
    advantages = given if advantages is None else advantages
    if order is not None:
        dialogues, advantages = [dialogues[i] for i in order], advantages[order]
    recorder = Recorder(model.parameters())
    metrics = exgrpo.update(model, reference or model, recorder, dialogues,
                            each_reply(dialogues, advantages), teacher, args)
    return recorder.gradients[-1], metrics


@pytest.fixture
def loose_clip(monkeypatch):
    """Compare gradients before they are clipped to norm 1."""
    monkeypatch.setattr(exgrpo, "MAX_GRAD_NORM", 1e9)


def packed_logprobs(model, dialogues, budget):
    """Log-probs (B, T-1) in the order of the dialogues, and the places that were forwarded."""
    values, places = [None] * len(dialogues), 0
    for members, trees in exgrpo.pack(dialogues, budget, model):
        places += trees.ids.numel()
        for b, row in zip(members, exgrpo.tree_logprobs(model, trees, 0.7)):
            values[b] = row[:len(dialogues[b].ids) - 1]
    return values, places


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 300, 10 ** 6])
def test_trees_equal_the_padded_form(loaded, kind, budget):
    """The training step reads what dialogues share once: a group's prompt, a pair up to its fork.
    A branch that saw its sibling, positions counted along the row, or a window measured in places
    would move these log-probs; a shared token that took one branch's gradient only would move the
    gradient. Learned positions and windows of 24 tokens are among the kinds, T = 0.7."""
    model, chat = loaded(kind)
    dialogues, _, teacher = a_step(model, chat)
    twin = dialogues[0]
    dialogues += teacher + [twin, exgrpo.Dialogue(twin.ids[:40], twin.mask[:40])]  # and a prefix
    ids, mask = (exgrpo.pad_rows(x, model.device)
                 for x in ([d.ids for d in dialogues], [d.mask for d in dialogues]))
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))[:, 1:]
    gradients = []
    padded = exgrpo.token_logprobs(model, ids, mask, 0.7)
    ours, places = packed_logprobs(model, dialogues, budget)
    for rows in (padded, ours):
        loss = sum((row * w[:len(row)]).sum() for row, w in zip(rows, weights))
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    for theirs, row in zip(padded, ours):
        assert torch.allclose(theirs[:len(row)], row, atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-5 * gradients[0].abs().max().item())
    assert budget < 10 ** 6 or places < ids.numel()


def test_gradients_on_two_threads_are_the_same_bit_for_bit(loaded):
    """Our own bug: where several dialogues run through a token, autograd adds what comes back from
    each. Of hidden[index], a CPU's threads add it in the order in which they get there, so that two
    runs of the same command differed in the sixth digit from the third step on."""
    model, _ = loaded("llama")
    generator = torch.Generator().manual_seed(0)
    shared, *own = [torch.randint(0, 250, (n,), generator=generator).tolist()
                    for n in [300] + [10] * 64]
    dialogues = [exgrpo.Dialogue(shared + ids, [1] * 310) for ids in own]
    weights = torch.rand(64, 309, generator=generator)
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(5):
        rows, _ = packed_logprobs(model, dialogues, 10 ** 6)
        (torch.stack(rows) * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], again) for again in gradients[1:])


def test_trees_hold_every_row_once_within_the_budget():
    """Shared beginnings stand once; memory is bounded by the budget however large the group."""
    model = types.SimpleNamespace(device=torch.device("cpu"), config=Qwen2Config(hidden_size=64))

    def packed(rows, budget):
        return list(exgrpo.pack([exgrpo.Dialogue(row, [1] * len(row)) for row in rows], budget,
                                model))
    (_, trees), = packed([[1, 2, 3], [1, 2, 4]], 10)
    assert trees.ids.tolist() == [[1, 2, 3, 4]] and trees.paths.tolist() == [[0, 1, 2], [0, 1, 3]]
    assert (trees.visible[0] == torch.tensor(
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]])).all()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in range(1, 60)]
    rows += [rows[0] + rows[40], rows[50], rows[50][:20]]
    for budget in (1, 50, 90, 1000):
        batches = packed(rows, budget)
        assert sorted(b for members, _ in batches for b in members) == list(range(len(rows)))
        for members, trees in batches:
            assert trees.ids.numel() <= budget or len(members) == 1
            for b, path, mask in zip(members, trees.paths, trees.mask, strict=True):
                path = path[:len(rows[b])]
                assert trees.ids.flatten()[path].tolist() == rows[b]
                assert (trees.visible.flatten(0, 1)[path].sum(-1) - 1).tolist() == list(
                    range(len(path)))  # as many ancestors as tokens before it
                assert mask.sum() == len(path)


def test_long_dialogues_share_a_row_only_where_it_pays():
    """In a tree, all pairs of tokens cost attention, seen or not: 8 dialogues of 1,000 tokens that
    share 20 must not become one row of 8,000; 8 replies of 60 to a prompt of 100 must. To spare a
    token, a wide model may spend more pairs. An older rule, a third of a row's tokens must be
    shared, did not know the width."""
    long = [[1] * 20 + [b] * 980 for b in range(8)]
    short = [[1] * 100 + [b] * 60 for b in range(8)]
    less = [[1] * 40 + [b] * 120 for b in range(2)]
    assert len(exgrpo.prefix_trees(long, 10 ** 6, 896)) == 8
    assert len(exgrpo.prefix_trees(short, 10 ** 6, 896)) == 1
    assert len(exgrpo.prefix_trees(less, 10 ** 6, 896)) == 1  # a quarter is shared
    # in the tree 280 ** 2 pairs, apart 2 * 160 ** 2; 40 tokens are spared
    pairs = 280 ** 2 - 2 * 160 ** 2
    assert [len(exgrpo.prefix_trees(less, 10 ** 6, width)) for width in (
        pairs // 120, pairs // 120 + 1)] == [2, 1]
    assert len(exgrpo.prefix_trees(less, 279, 896)) == 2  # the budget


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_micro_batches(loaded, kind, loose_clip):
    """D12: with all loss terms on. Averages of micro-batch means were off by up to 13 degrees."""
    model, chat = loaded(kind)
    whole, metrics = gradient_of(model, chat, ARGS)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for args, order in ((changed(micro_batch_tokens=1), None),
                        (changed(micro_batch_tokens=150), None),
                        (changed(micro_batch_tokens=150), shuffled)):
        parts, again = gradient_of(model, chat, args, order=order)
        assert torch.allclose(whole, parts, atol=1e-5 * whole.abs().max().item())
        assert again["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
        assert again["kl"] == pytest.approx(metrics["kl"], abs=1e-6)
        assert again["aux_loss"] == pytest.approx(metrics["aux_loss"], rel=1e-5)


def test_each_term_changes_the_gradient(loaded, tiny, loose_clip):
    """D25: an auxiliary term that is silently dead looks like one that works."""
    model, chat = loaded("llama")
    reference = exgrpo.load_model(tiny("llama"), model.device)[0]
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    whole, metrics = gradient_of(model, chat, ARGS, reference=reference)
    assert metrics["kl"] > 0
    for args in (changed(beta=0.0), changed(aux_weight=0.0), changed(temperature=1.0)):
        assert not torch.allclose(whole, gradient_of(model, chat, args, reference=reference)[0],
                                  rtol=1e-2)
    bonus = torch.linspace(-1.0, 1.1, 12, dtype=torch.float64)
    bonus[:6] += 0.5
    assert not torch.allclose(whole, gradient_of(model, chat, ARGS, bonus, reference)[0], rtol=1e-2)


def test_the_first_update_has_ratio_one_and_agrees_with_the_sampler(loaded, loose_clip):
    """D18: the log-probs of the scorer are those of the sampler, so the first ratio is 1; a gap
    here is the first sign of a wrong mask, temperature, position or precision."""
    model, chat = loaded("llama")
    _, metrics = gradient_of(model, chat, changed(beta=0.0))
    assert metrics["clip_share"] == 0
    assert metrics["sampler_gap"] < 1e-4
    dialogues, advantages, _ = a_step(model, chat)
    counts = torch.tensor([float(sum(d.mask)) for d in dialogues], dtype=torch.float64)
    assert metrics["loss"] == pytest.approx(
        -(counts * advantages).sum().item() / counts.sum().item(), abs=1e-6)


def test_dialogues_without_advantage_are_not_forwarded(loaded, loose_clip, monkeypatch):
    """Skipping them saves their passes and changes nothing: the divisor still counts their
    tokens."""
    model, chat = loaded("llama")
    advantages = torch.linspace(-1.0, 1.1, 12, dtype=torch.float64)
    advantages[:6] = 0.0
    args, rows = changed(beta=0.0, aux_weight=0.0), []
    tiny_but_there = advantages + 1e-30
    whole, _ = gradient_of(model, chat, args, tiny_but_there)
    own = exgrpo.tree_logprobs
    monkeypatch.setattr(exgrpo, "tree_logprobs",
                        lambda m, trees, *a: rows.append(len(trees.paths)) or own(m, trees, *a))
    skipped, _ = gradient_of(model, chat, args, advantages)
    assert sum(rows) == 6
    assert torch.allclose(whole, skipped, atol=1e-6)


def test_a_second_update_uses_the_stored_log_probs(loaded, loose_clip):
    """D19: with old log-probs formed anew at each update the ratio would be 1 for ever, and the
    clip dead."""
    model, chat = loaded("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    dialogues, advantages, teacher = a_step(model, chat)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    try:
        metrics = exgrpo.update(model, model, optimizer, dialogues,
                                each_reply(dialogues, advantages), teacher,
                                changed(updates=2, beta=0.0))
    finally:
        model.load_state_dict(state)
    assert metrics["clip_share"] > 0.01


def test_sft_ids_are_prompt_plus_reply_plus_end(loaded):
    """D24: a mask from the length of a prefix that is tokenised apart is off where tokens merge
    across the seam; here ids are joined, so that the reply's first and end tokens are exactly
    masked in."""
    model, _ = loaded("gpt2")
    chat = exgrpo.Chat(tiny_tokenizer(chat=False, seam=True), model)
    row = {"question": "the theme", "rationale": "and so.", "answer": "3", "answer_type": "number"}
    example = exgrpo.teacher_dialogue(chat, [row])
    prompt = chat.first(exgrpo.user_turn(row))
    answer = chat.encode(" and so. The answer is 3.")
    joint = chat.encode(chat.tokenizer.decode(prompt + answer))
    assert len(joint) < len(prompt + answer)  # ": " would be one token
    assert example.ids == prompt + answer + [chat.end_id]
    assert example.mask == [0] * len(prompt) + [1] * (len(answer) + 1)


def test_auxiliary_dialogue_trains_the_teachers_probe_replies_only(loaded):
    model, chat = loaded("llama")
    probes = [{"probe": "Why?", "rationale": "So.", "answer": "3", "answer_type": "number"},
              {"probe": "If?", "rationale": "", "answer": "yes", "answer_type": "yesno"}]
    dialogue = exgrpo.teacher_dialogue(chat, probes)
    trained = [i for i, m in zip(dialogue.ids, dialogue.mask) if m]
    assert trained == chat.reply("So. The answer is 3.") + chat.reply("The answer is yes.")
    assert dialogue.ids == chat.prompt([
        exgrpo.user_turn(probes[0]), "So. The answer is 3.",
        exgrpo.user_turn(probes[1])]) + chat.reply("The answer is yes.")


def test_micro_batches_hold_every_row_once():
    lengths = [7, 30, 2, 9, 9, 14, 1]
    for budget in (1, 10, 30, 1000):
        batches = exgrpo.micro_batches(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(7))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert exgrpo.micro_batches([5, 9, 4], 10) == [[1], [0, 2]]


def test_outcome_grades_the_last_reply_only(loaded):
    """A right answer to a probe, or one quoted in the prompt, earns nothing."""
    model, chat = loaded("llama")
    dialogue = exgrpo.Dialogue()
    for user, reply in (("The answer is 3.", "The answer is 3."), ("Q?", "I do not know.")):
        dialogue.add_user(chat.first(user))
        dialogue.add_reply(chat.reply(reply), chat)
    right = exgrpo.Dialogue()
    right.add_user(chat.first("Q?"))
    right.add_reply(chat.reply("The answer is 3."), chat)
    rollout = exgrpo.Rollout([question("3")], [[question("3")]], [dialogue, right], [])
    args, verdicts, outcomes, rewards = rewards_of(chat, rollout)
    assert verdicts == [[True, False], [True]] and outcomes.tolist() == [[[0.0, 1.0]]]
    metrics = exgrpo.rollout_metrics(chat, rollout, verdicts, outcomes, rewards, outcomes, args)
    assert metrics["unparsed"] == 0.5 and metrics["acc_probes"] == 1
