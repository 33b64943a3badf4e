"""The sampler, its cache, and the scorer that must agree with it, on tiny random models."""
import copy
import types

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GPTNeoConfig, MptConfig, Phi3Config

import exgrpo
import tiny as maker

KINDS = list(maker.CONFIGS)
ARGS = types.SimpleNamespace(group_size=3, max_new_tokens=24, temperature=0.7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def own_logps(model, ids, temperature):
    """What the model itself says, by the plainest route: no cache, no padding, full log_softmax."""
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device)).logits[0, :-1].float().cpu()
    return torch.log_softmax(logits / temperature, -1).gather(
        1, torch.tensor(ids[1:])[:, None])[:, 0]


def assert_sampled_as_scored(model, dialogue, temperature):
    """Log-probs that the sampler kept == the model's own, at exactly the tokens of mask 1."""
    expected = own_logps(model, dialogue.ids, temperature)[torch.tensor(dialogue.mask[1:]).bool()]
    assert len(dialogue.logps) == len(expected)
    assert torch.allclose(torch.tensor(dialogue.logps), expected, atol=1e-4)


def test_a_model_that_takes_a_trees_places_for_positions_is_refused(tmp_path, monkeypatch):
    """ALiBi looks at how far apart two slots are: those of our cache are positions, those of a tree
    are not. MPT was accepted, and its log-probs in training were wrong by 0.3."""
    monkeypatch.setitem(maker.CONFIGS, "mpt", lambda **ids: MptConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=2048, **ids))
    monkeypatch.setattr(exgrpo.KVCache, "get_seq_length", lambda cache: max(cache.lengths),
                        raising=False)  # or MPT would be refused for asking
    folder = maker.tiny_model_folder("mpt", tmp_path)
    with pytest.raises(exgrpo.UserError, match="does not reproduce MptForCausalLM .*differ"):
        exgrpo.load_model(folder, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(loaded, kind):
    """Ragged prompts, our cache against transformers' own generate, token for token."""
    model, chat = loaded(kind)
    prompts = [chat.first("Why? " * n) for n in (1, 7, 3)]
    replies, _, _ = exgrpo.sample(model, prompts, max_new_tokens=24, temperature=0,
                                  stop_ids=chat.stop_ids)
    for prompt, reply in zip(prompts, replies):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24,
                                attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
        assert theirs[0, len(prompt):].tolist() == reply


@pytest.mark.parametrize("kind", KINDS)
def test_dialogue_logps_equal_the_models_own_at_every_turn(loaded, kind):
    """D5, D8: groups of several turns and ragged lengths, finished rows gone from the batch,
    T = 0.7.

    Scoring at T = 1 what was sampled at another temperature biases every ratio; padding without
    positions moved log-probs by up to 4 nats on learned positions (GPT-2).
    """
    model, chat = loaded(kind)
    scripts = [["Why? " * 3, "And then?", "So?"], ["What if it is not?", "So? " * 5]]
    dialogues, _ = exgrpo.sample_dialogues(model, chat, scripts, ARGS, generator())
    assert [len(d.replies) for d in dialogues] == [3] * 3 + [2] * 3
    for dialogue in dialogues:
        assert_sampled_as_scored(model, dialogue, 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_forked_dialogue_is_a_sample_of_the_policy(loaded, kind):
    """A fork that shared the cache instead of cutting it back would answer with the later turns of
    the full dialogue in view: its log-probs would not be those of its own ids."""
    model, chat = loaded(kind)
    scripts = [["Why?", "And then? " * 2, "So?", "The question"], ["What?", "If?", "The other"]]
    finals, cuts = ["The question", "The other"], [1, 2]
    full, partial = exgrpo.sample_dialogues(model, chat, scripts, ARGS, generator(), cuts)
    for b, dialogue in enumerate(partial):
        n_turns, final = cuts[b // 3], chat.later(finals[b // 3])
        end = len(dialogue.ids) - len(dialogue.replies[-1]) - dialogue.truncated[-1] - len(final)
        assert dialogue.ids[:end + len(final)] == full[b].ids[:end] + final
        assert dialogue.mask[:end] == full[b].mask[:end]
        assert dialogue.replies[:-1] == full[b].replies[:n_turns]
        assert len(full[b].replies) == len(scripts[b // 3])
        assert_sampled_as_scored(model, dialogue, 0.7)
        assert_sampled_as_scored(model, full[b], 0.7)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_rows_of_the_cache_are_repeated_forked_and_dropped(loaded, kind):
    """Each row must go on from its own past, whichever row it was copied from: read on, of ragged
    lengths, past a window of 24, the logits are those of the model that reads the row alone."""
    model, _ = loaded(kind)
    rows = [list(range(5, 12)), list(range(40, 50))]
    cache = exgrpo.KVCache(2, model.device)
    with torch.no_grad():
        exgrpo.prefill(model, cache, rows)
        for kept, counts in (([0, 0, 0, 1, 1, 1], [1, 4, 2, 1, 1, 3]),   # repeat: two groups
                             ([0, 1, 2, 3, 4, 5, 1, 4], [1] * 8),        # fork two of them
                             ([7, 2, 6], [16, 9, 1]),                    # drop five, reorder
                             ([0, 1, 2], [1, 20, 2])):                   # as they are
            cache.select(kept)
            new = [[60 + 7 * i + t for t in range(n)] for i, n in enumerate(counts)]
            rows = [rows[row] + ids for row, ids in zip(kept, new)]
            ours = exgrpo.prefill(model, cache, new)
            own = [model(torch.tensor([row])).logits[0, -1] for row in rows]
            assert torch.allclose(ours, torch.stack(own), atol=1e-4)
            assert cache.lengths == [len(row) for row in rows]


def test_a_groups_prompt_is_read_once(loaded, monkeypatch):
    """What makes sampling fast: two prompts and not six are read, then one token a row, and in a
    later turn the new tokens only. Once half have finished, a CPU reads the others alone, and
    when all have, nothing more."""
    model, chat = loaded("llama")
    shapes, own = [], exgrpo.next_logits
    monkeypatch.setattr(exgrpo, "next_logits", lambda model, cache, ids, *args:
                        shapes.append(tuple(ids.shape)) or own(model, cache, ids, *args))
    prompts = [chat.first("Why? " * n) for n in (1, 7)]
    options = dict(max_new_tokens=40, temperature=1.0)
    replies, _, _ = exgrpo.sample(model, prompts, stop_ids=[], group_size=3,
                                  generator=generator(), **options)
    assert shapes == [(2, len(prompts[1]))] + [(6, 1)] * 39
    shapes.clear()
    replies, _, cache = exgrpo.sample(model, prompts, stop_ids=[replies[b][n] for b, n in enumerate(
        (5, 7, 9, 11, 13, 20))], group_size=3, generator=generator(), **options)
    unfinished = [sum(len(reply) > t for reply in replies) for t in range(1, 22)]
    assert shapes[1:] == [(n if n <= 3 else 6, 1) for n in unfinished if n] and len(shapes) < 22
    shapes.clear()
    longer = [prompts[b // 3] + reply + [5, 6] for b, reply in enumerate(replies)]
    exgrpo.sample(model, longer, stop_ids=[], cache=cache, **options)
    assert shapes[0] == (6, 3)  # the last token of each reply was not read yet


def test_a_model_that_takes_the_last_slot_for_its_position_is_refused(tmp_path, monkeypatch):
    """GPT-Neo's local layers look back from the last slot of the cache, not from the query's. With
    slots to spare, or beside a longer row, a dialogue past its window had log-probs wrong by 0.2;
    the twelve ids by which a model is checked never reached the window."""
    monkeypatch.setitem(maker.CONFIGS, "gpt_neo", lambda **ids: GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=256, max_position_embeddings=2048, **ids))
    monkeypatch.setattr(exgrpo.KVCache, "get_seq_length", lambda cache: max(cache.lengths),
                        raising=False)
    folder = maker.tiny_model_folder("gpt_neo", tmp_path)
    with pytest.raises(exgrpo.UserError, match="does not reproduce GPTNeoForCausalLM .*differ"):
        exgrpo.load_model(folder, torch.device("cpu"))


def test_fork_at_zero_is_the_bare_question(loaded):
    model, chat = loaded("llama")
    full, partial = exgrpo.sample_dialogues(model, chat, [["Why?", "Q?"], ["What?", "R?"]], ARGS,
                                    generator(), [0, 1])
    for dialogue in partial[:3]:
        assert dialogue.ids[:len(chat.first("Q?"))] == chat.first("Q?")
        assert len(dialogue.replies) == 1
    for dialogue in full + partial:
        assert_sampled_as_scored(model, dialogue, 0.7)


def test_full_vocabulary_and_frequencies():
    """D4: transformers' generate draws from the top 50 unless told otherwise. Here 400 tokens of
    equal probability must all come up, and a sharp distribution must come up in its proportions."""
    u = torch.rand(20000, generator=generator(), dtype=torch.float64)
    tokens, logps = exgrpo.sample_token(torch.zeros(20000, 400), 1.0, u)
    assert len(tokens.unique()) == 400
    assert torch.allclose(logps.float(), torch.tensor(1 / 400).log())
    logits = torch.tensor([2.0, 1.0, 0.0, -30.0])
    for temperature in (0.5, 1.0, 2.0):
        tokens, _ = exgrpo.sample_token(logits.expand(20000, 4), temperature, u)
        share = torch.bincount(tokens, minlength=4) / 20000
        assert torch.allclose(share, torch.softmax(logits / temperature, -1), atol=0.015)


def test_what_has_no_probability_is_never_sampled():
    """At either end of u, with tokens of probability 0 before and behind. With 0.3 as the whole
    mass, a sum that rounding leaves above it would point behind the last token."""
    uniform = torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64)
    for size, place in ((3, 1), (300, 0), (300, 128), (300, 299)):
        logits = torch.full((2, size), -1e9)
        logits[:, place] = 0.0
        tokens, _ = exgrpo.sample_token(logits, 1.0, uniform)
        assert tokens.tolist() == [place, place]
    logits = torch.cat([torch.randn(50000, generator=generator()), torch.full((1000,), -1e9)])
    for temperature in (0.3, 0.7, 1.0):
        tokens, logps = exgrpo.sample_token(logits.expand(2, -1), temperature, uniform)
        assert tokens.max() < 50000 and logps.isfinite().all()


def test_sampling_inverts_the_distribution():
    """The inverse CDF by its definition, in double precision. Beside a sum of 1, fp32 has 84 steps
    for a tail of 50,000 tokens whose mass is 5e-6: most of them would never be sampled."""
    logits = torch.randn(200, 50000, generator=generator()) * 3
    u = torch.rand(200, generator=generator(1), dtype=torch.float64)
    tokens, logps = exgrpo.sample_token(logits, 0.7, u)
    plain = torch.log_softmax(logits.double() / 0.7, -1)
    expected = torch.searchsorted(plain.exp().cumsum(-1), u[:, None], right=True)
    assert (tokens == expected[:, 0]).float().mean() > 0.99  # fp32 and fp64 may part at an edge
    assert torch.allclose(logps.double(), plain.gather(1, tokens[:, None])[:, 0], atol=1e-5)
    logits = torch.tensor([0.0] + [-23.0] * 50000).expand(200, -1)
    tail = 1 - torch.linspace(4.9e-6, 1e-7, 200, dtype=torch.float64)
    tokens, _ = exgrpo.sample_token(logits, 1.0, tail)
    assert len(tokens.unique()) == 200


def test_first_tokens_of_a_group_differ(loaded):
    """D20: nanochat broadcast one first token to the whole group for two and a half months. With 16
    draws that are uniform over more than 200 tokens, all equal by chance happens less than
    once in 10^34."""
    model, chat = loaded("llama")
    head = model.get_output_embeddings().weight
    kept, head.data = head.data, torch.zeros_like(head.data)
    try:
        replies, _, _ = exgrpo.sample(
            model, [chat.first("Why?")], max_new_tokens=1, temperature=1.0, stop_ids=[],
            group_size=16, generator=generator())
    finally:
        head.data = kept
    assert len({tuple(reply) for reply in replies}) > 8


def test_a_reply_depends_on_no_other_reply(loaded):
    """When other rows finish must not change what a row samples."""
    model, chat = loaded("llama")
    prompts = [chat.first("Why? " * n) for n in (1, 2, 3)]

    def replies(stop_ids):
        return exgrpo.sample(model, prompts, max_new_tokens=30, temperature=1.0, stop_ids=stop_ids,
                             group_size=4, generator=generator(1))[0]
    never = replies([])
    stop = never[5][3]  # a token at which some rows will stop
    early = replies([stop])
    assert 3 < sum(map(len, early)) < sum(map(len, never))
    for long, short in zip(never, early):
        assert long[:len(short)] == short
        assert (short[-1] == stop) or len(short) == 30


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_rows_that_ended_early_go_on_in_the_next_turn(loaded, kind):
    """While some rows have finished, the others run on, and so does what the finished ones write
    into their own slots: the next turn must not see it."""
    model, chat = loaded(kind)
    prompts = [chat.first("Why? " * n) for n in (1, 2, 3)]

    def sampled(stop_ids):
        return exgrpo.sample(model, prompts, stop_ids=stop_ids, max_new_tokens=20,
                             temperature=1.0, generator=generator(1))
    free, _, _ = sampled([])
    replies, _, cache = sampled([free[0][4], free[2][6]])
    assert len({len(reply) for reply in replies}) == 3, "rows should end at different times"
    longer = [p + reply + chat.later("So?") for p, reply in zip(prompts, replies)]
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0, -1] for ids in longer]
        ours = exgrpo.prefill(model, cache, [ids[n:] for n, ids in zip(cache.lengths, longer)])
    assert torch.allclose(ours, torch.stack(expected), atol=1e-3)


def test_a_reply_ends_where_the_models_context_ends(loaded):
    """GPT-2's learned positions would end in an IndexError, on CUDA in an assert. A long prompt in
    the batch shortens its own reply alone."""
    model, chat = loaded("gpt2")
    options = dict(max_new_tokens=9, temperature=1.0, stop_ids=[], generator=generator())
    (reply, short), logps, cache = exgrpo.sample(model, [[5] * 2044, [5] * 7], **options)
    assert (len(reply), len(short)) == (4, 9) and exgrpo.context_size(model) == 2048
    assert list(map(len, logps)) == [4, 9] and cache.lengths == [2047, 15]
    with pytest.raises(exgrpo.UserError, match="2048 tokens leaves no room.*--turns"):
        exgrpo.sample(model, [[5] * 2048], **options)


def test_an_end_token_inside_the_prompt_does_not_stop_the_rollout(loaded):
    """D30: GRPO-Zero looked for the end token in the whole row; every chat prompt contains it."""
    model, chat = loaded("llama")
    prompt = chat.prompt(["Why?", "Because.", "And then?"])
    assert chat.end_id in prompt
    replies, _, _ = exgrpo.sample(model, [prompt], max_new_tokens=8, temperature=1.0, group_size=8,
                                  stop_ids=chat.stop_ids, generator=generator())
    assert max(map(len, replies)) > 1


def test_every_end_token_stops(loaded):
    """D7: a model may name several end tokens; missing one makes every reply run to the limit."""
    model, chat = loaded("llama")
    assert chat.end_id in chat.stop_ids
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [7, kept]
    try:
        assert exgrpo.Chat(chat.tokenizer, model).stop_ids == sorted({7, kept})
    finally:
        model.generation_config.eos_token_id = kept
    ends, prompt, last = [260, 33], chat.first("Why?"), set()
    for seed in range(4):
        replies, _, _ = exgrpo.sample(model, [prompt], max_new_tokens=200, temperature=1.0,
                                      group_size=8, stop_ids=ends, generator=generator(seed))
        for ids in replies:
            assert not set(ids[:-1]) & set(ends)
            last.add(ids[-1])
    assert set(ends) <= last
    dialogue = exgrpo.Dialogue()
    two = copy.copy(chat)
    two.stop_ids, two.end_id = ends, 260
    dialogue.add_reply([5, 33], two)
    assert dialogue.ids == [5, 33] and dialogue.mask == [1, 1] and not dialogue.truncated[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dialogue_ids_grow_and_the_mask_marks_what_was_sampled(loaded, kind):
    """D2, D3, D6: what the user says is never trained, the first end token is, and a truncated
    reply gets an end token that is not. pad == eos here: a mask made from values would drop the end
    token."""
    model, chat = loaded(kind)
    assert chat.tokenizer.pad_token_id == chat.end_id
    dialogue = exgrpo.Dialogue()
    dialogue.add_user(chat.first("Why?"))
    dialogue.add_reply([5, 6, chat.end_id], chat)
    dialogue.add_user(chat.later("And then?"))
    dialogue.add_reply([8, 9], chat)  # cut by the limit
    first, later, end = chat.first("Why?"), chat.later("And then?"), chat.end_id
    assert dialogue.ids == first + [5, 6, end] + later + [8, 9, end]
    assert dialogue.mask == [0] * len(first) + [1, 1, 1] + [0] * len(later) + [1, 1, 0]
    assert dialogue.truncated == [False, True]


def test_prompt_equals_the_templates_own_rendering(loaded):
    """D2: rendering only the new user turn would repeat the default system prompt; what is appended
    must be the difference of two renderings."""
    model, chat = loaded("llama")
    turns = ["Why?", "Because.", "And then?", "Nothing.", "So?"]
    assert chat.prompt(turns) == chat._render(*turns, reply_next=True)
    assert "system" in chat.tokenizer.decode(chat.first("Why?"))
    assert "system" not in chat.tokenizer.decode(chat.later("Why?"))


def test_a_template_that_rewrites_history_is_refused(loaded):
    model, chat = loaded("llama")
    kept = chat.tokenizer.chat_template
    try:
        for instead in ("{% if loop.last %}{{ m['content'] }}{% else %}...{% endif %}", "",
                        "{% if m['role'] == 'user' and not loop.last %}...{% else %}"
                        "{{ m['content'] }}{% endif %}"):  # the user's words only
            chat.tokenizer.chat_template = kept.replace("{{ m['content'] }}", instead)
            with pytest.raises(exgrpo.UserError, match="rewrites earlier turns"):
                chat.later("And then?")
    finally:
        chat.tokenizer.chat_template = kept


def test_a_template_that_prints_the_date_prints_the_same_every_day(loaded, monkeypatch):
    """Llama 3.2 prints today's date unless it is given one: a run that was resumed overnight read
    other prompts, and evaluations of different days were not of the same questions."""
    model, chat = loaded("llama")
    monkeypatch.setattr(chat.tokenizer, "chat_template", chat.tokenizer.chat_template.replace(
        "Be brief.", "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"))
    assert "26 Jul 2024" in chat.tokenizer.decode(chat.first("Why?"))


def test_without_a_template_a_reply_ends_where_the_next_question_begins(loaded, monkeypatch):
    """A base model that was never taught an end token goes on with a next "Question:" of its own,
    and its last, invented answer was graded: of 12 right answers all were lost."""
    model, chat = loaded("gpt2")
    said = chat.encode(" The answer is 5.\n\nQuestion: And then?\nAnswer: The answer is 7.")
    script = iter(said * 2)
    monkeypatch.setattr(exgrpo, "sample_token", lambda logits, temperature, uniform: (
        torch.full((len(logits),), next(script)), 0 * uniform))
    args = types.SimpleNamespace(group_size=2, max_new_tokens=len(said), temperature=1.0)
    (dialogue, _), _ = exgrpo.sample_dialogues(model, chat, [["Why?", "So?"]], args, generator())
    reply = dialogue.replies[0]
    assert reply == said[:len(reply)] and len(reply) < len(said) and not dialogue.truncated[0]
    assert chat.tokenizer.decode(reply).endswith("\nQuestion:")
    assert dialogue.ids == (chat.first("Why?") + reply + [chat.end_id] + chat.later("So?") + reply
                            + [chat.end_id])
    assert dialogue.mask.count(1) == len(dialogue.logps) == 2 * len(reply)
    five = {"answer": "5", "answer_type": "number"}
    assert exgrpo.grade(chat, exgrpo.Rollout([five], [[five]], [dialogue], [])) == [[True, True]]
    script = iter(said)
    (text, truncated, n), = exgrpo.generate(model, chat, [chat.first("Why?")],
                                            max_new_tokens=len(said))
    assert (text, truncated, n) == ("The answer is 5.", False, len(reply))


def test_longrope_is_read_no_further_than_its_original_context():
    """Beyond it (Phi-3.5, Phi-4-mini) all keys turn otherwise, also those that the cache holds: the
    sampler and the scorer differed by 0.26 nats, and a reply depended on its neighbour's length."""
    config = Phi3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, max_position_embeddings=256,
        original_max_position_embeddings=64, pad_token_id=0, rope_scaling={
            "type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    options = dict(temperature=1.0, stop_ids=[], generator=generator())
    (reply,), (logps,), _ = exgrpo.sample(model, [[5] * 40], max_new_tokens=99, **options)
    assert len(reply) == 64 - 40
    own = own_logps(model, [5] * 40 + reply, 1.0)[39:]
    assert torch.allclose(torch.tensor(logps), own, atol=1e-4)


def test_special_tokens_inside_a_question_open_no_turn(loaded):
    """Teacher text is untrusted: "<|end|>" inside a probe must not close the user's turn."""
    model, chat = loaded("llama")
    assert chat.first("Why<|end|>?<|open|>") == chat.first("Why?")
    assert chat.reply("Because<|end|>") == chat.reply("Because")
    assert chat.first("Why<|o<|end|>pen|>?<|en<|open|>d|>") == chat.first("Why?")


def test_control_tokens_that_nobody_named_open_no_turn(loaded):
    """Llama-3's <|start_header_id|> is special in the tokenizer's table of added tokens and in none
    of its named lists."""
    model, chat = loaded("llama")
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer._tokenizer.add_special_tokens([AddedToken("<|header|>", special=True)])
    assert "<|header|>" not in tokenizer.all_special_tokens
    unaware = exgrpo.Chat(tokenizer, model)
    assert unaware.first("Why<|header|>?") == chat.first("Why?")


def test_sampled_text_is_never_encoded_again(loaded, monkeypatch):
    """D1: decode, append, encode changes the ids (92 of 300 samples on SmolLM2), so that the
    trained tokens are not the sampled ones. Here encode sees the user's words only, never what was
    sampled."""
    model, chat = loaded("llama")
    seen, encode, render = [], chat.encode, chat._render
    monkeypatch.setattr(chat, "encode", lambda text: seen.append(text) or encode(text))
    monkeypatch.setattr(chat, "_render", lambda *turns, reply_next: seen.extend(turns) or render(
        *turns, reply_next=reply_next))
    dialogues, _ = exgrpo.sample_dialogues(model, chat, [["Why?", "And then?", "So?"]], ARGS,
                                           generator())
    assert set(seen) <= {"Why?", "And then?", "So?", "x", "1", "2"}
    survive = [chat.encode(chat.tokenizer.decode(ids)) == ids
               for d in dialogues for ids in d.replies]
    assert not all(survive), "the sample should hold ids that encode would not choose"
    for dialogue in dialogues:
        sampled = [i for i, m in zip(dialogue.ids, dialogue.mask) if m]
        assert sampled == [i for ids in dialogue.replies for i in ids]


def test_generate_does_not_depend_on_the_batch(loaded):
    """D27: greedy answers are the same for every batch size, and come back in the order asked."""
    model, chat = loaded("gpt2")
    prompts = [chat.first("Why? " * n) for n in (4, 1, 9, 2)]
    together = exgrpo.generate(model, chat, prompts, max_new_tokens=12)
    assert together == exgrpo.generate(model, chat, prompts, max_new_tokens=12, token_budget=1)
    assert [n for _, _, n in together] == [len(exgrpo.sample(
        model, [p], max_new_tokens=12, temperature=0, stop_ids=chat.stop_ids)[0][0])
        for p in prompts]
