"""The sampler, its cache, and the scorer that must agree with it, on tiny random models."""
import copy
import types

import pytest
import torch
from tokenizers import AddedToken
from transformers import GPTNeoConfig, MptConfig

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
    folder = maker.tiny_model_folder("mpt", tmp_path)
    with pytest.raises(exgrpo.UserError, match="does not reproduce MptForCausalLM .*differ"):
        exgrpo.load_model(folder, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(loaded, kind):
    """Ragged prompts, our cache against transformers' own generate, token for token."""
    model, chat = loaded(kind)
    prompts = [chat.first("Why? " * n) for n in (1, 7, 3)]
    ours = exgrpo.sample(model, prompts, max_new_tokens=24, temperature=0, stop_ids=chat.stop_ids)
    for prompt, reply in zip(prompts, ours.replies):
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
    dialogues, _ = exgrpo.converse(model, chat, scripts, ARGS, generator())
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
    full, partial = exgrpo.converse(model, chat, scripts, ARGS, generator(), cuts)
    for b, dialogue in enumerate(partial):
        n_turns, final = cuts[b // 3], chat.later(finals[b // 3])
        end = full[b].ends[n_turns - 1]
        assert dialogue.ids[:end + len(final)] == full[b].ids[:end] + final
        assert len(dialogue.replies) == n_turns + 1
        assert len(full[b].replies) == len(scripts[b // 3])
        assert_sampled_as_scored(model, dialogue, 0.7)
        assert_sampled_as_scored(model, full[b], 0.7)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_a_groups_prompt_is_read_once_and_the_logits_are_the_models_own(loaded, kind, monkeypatch):
    """Whoever is still there: of two groups of three, all, some, one group alone, one row alone. Of
    one token a row, the 7 slots that all share are read twice, not six times, and the rest row by
    row. Of more tokens all is read the usual way. In gemma3 a layer looks 24 slots back: once a
    row is longer, each gets its prompt back."""
    model, chat = loaded(kind)
    rows = [list(range(5, 12)), list(range(40, 50))]
    calls, attend = [], exgrpo.attend_grouped
    monkeypatch.setattr(exgrpo, "attend_grouped", lambda query, key, value, mask, cache, shared, *x:
                        calls.append((len(key), len(shared[0]), key.shape[2], shared[0].shape[2]))
                        or attend(query, key, value, mask, cache, shared, *x))
    cache = exgrpo.KVCache(2, model)
    with torch.no_grad():
        exgrpo.extend(model, cache, rows)
        cache.repeat(3)
        rows = [list(row) for row in rows for _ in range(3)]
        for there, counts in (([0, 1, 2, 3, 4, 5], [1] * 6), ([0, 2, 3], [1, 3, 2]),
                              ([3, 4, 5], [1] * 3), ([1], [1])):
            cache.activate(torch.tensor(there))
            new = [[60 + row] * n for row, n in zip(there, counts)]
            for row, ids in zip(there, new):
                rows[row] += ids
            ours = exgrpo.extend(model, cache, new)
            own = [model(torch.tensor([rows[row]])).logits[0, -1] for row in there]
            assert torch.allclose(ours, torch.stack(own), atol=1e-4)
            assert calls == [(len(there), 2, 16 - 7, 7)] * 2 * (max(counts) == 1), "two layers"
            calls.clear()
        exgrpo.extend(model, cache, [[7] * 30])
        for prompts in cache.prompts:  # they must be looked at, but not through a window
            prompts[0].zero_()
        changed = exgrpo.extend(model, cache, [[7]])
        own = model(torch.tensor([rows[1] + [7] * 31])).logits[0, -1]
    assert torch.allclose(changed[0], own, atol=1e-4) == (kind == "gemma3")


@pytest.mark.parametrize("fault", ["fails", "is wrong"])
def test_a_model_that_our_attention_does_not_fit_keeps_its_own(tiny, fault, monkeypatch):
    """Gemma 3n and Gemma 4 have layers without keys of their own, Doge a learned bias of each slot:
    they are sampled by sdpa, not refused, and get no logits that are not their own. StableLM hands
    its attention no keywords of ours: it once kept our attention all the same, which then saw all
    tokens of a tree, and its log-probs in training were off by a nat."""
    def attention(query, *args):
        if fault == "fails":
            raise RuntimeError("no such layer")
        return torch.zeros_like(query).transpose(1, 2)
    monkeypatch.setattr(exgrpo, "attend_grouped", attention)
    model, chat = exgrpo.load_model(tiny("llama"), torch.device("cpu"))
    assert model.config._attn_implementation == "sdpa"
    full, _ = exgrpo.converse(model, chat, [["Why?", "So?"]], ARGS, generator())
    for dialogue in full:
        assert_sampled_as_scored(model, dialogue, 0.7)
    monkeypatch.undo()
    for kind, name in (("llama", "grouped"), ("stablelm", "sdpa")):
        model, _ = exgrpo.load_model(tiny(kind), torch.device("cpu"))
        assert model.config._attn_implementation == name


def test_a_model_that_takes_the_last_slot_for_its_position_is_refused(tmp_path, monkeypatch):
    """GPT-Neo's local layers look back from the last slot of the cache, not from the query's. With
    slots to spare, or beside a longer row, a dialogue past its window had log-probs wrong by 0.2;
    the twelve ids by which a model is checked never reached the window."""
    monkeypatch.setitem(maker.CONFIGS, "gpt_neo", lambda **ids: GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=256, max_position_embeddings=2048, **ids))
    folder = maker.tiny_model_folder("gpt_neo", tmp_path)
    with pytest.raises(exgrpo.UserError, match="does not reproduce GPTNeoForCausalLM .*differ"):
        exgrpo.load_model(folder, torch.device("cpu"))


def test_fork_at_zero_is_the_bare_question(loaded):
    model, chat = loaded("llama")
    full, partial = exgrpo.converse(model, chat, [["Why?", "Q?"], ["What?", "R?"]], ARGS,
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
    tokens, logps = exgrpo.draw(torch.zeros(20000, 400), 1.0, u)
    assert len(tokens.unique()) == 400
    assert torch.allclose(logps, torch.tensor(1 / 400).log())
    logits = torch.tensor([2.0, 1.0, 0.0, -30.0])
    for temperature in (0.5, 1.0, 2.0):
        tokens, _ = exgrpo.draw(logits.expand(20000, 4), temperature, u)
        share = torch.bincount(tokens, minlength=4) / 20000
        assert torch.allclose(share, torch.softmax(logits / temperature, -1), atol=0.015)


def test_draw_never_picks_what_has_no_probability():
    """At either end of u, beside zeros in the same block of 128 tokens, in other blocks, and in the
    padding that fills the last block."""
    for size, place in ((3, 1), (300, 0), (300, 128), (300, 255), (300, 299)):
        logits = torch.full((2, size), -1e9)
        logits[:, place] = 0.0
        tokens, _ = exgrpo.draw(logits, 1.0, torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64))
        assert tokens.tolist() == [place, place]
    weights = torch.tensor([[0.3, 0.0]], dtype=torch.float64)  # a sum that was rounded up elsewhere
    assert exgrpo._invert(weights, torch.tensor([0.3 + 1e-16], dtype=torch.float64))[0] == 0


def test_draw_in_blocks_equals_one_long_sum():
    """The inverse CDF by its definition, over a vocabulary that fills no whole number of blocks:
    a mass that is carried into the wrong block would pick from the right distribution's
    neighbourhood, and no histogram of a small vocabulary would show it."""
    logits = torch.randn(500, 1000, generator=generator()) * 3
    u = torch.rand(500, generator=generator(1), dtype=torch.float64)
    tokens, logps = exgrpo.draw(logits, 0.7, u)
    plain = torch.log_softmax(logits.double() / 0.7, -1)
    expected = torch.searchsorted(plain.exp().cumsum(-1), u[:, None], right=True)
    assert (tokens == expected[:, 0]).float().mean() > 0.99  # fp32 and fp64 may part at an edge
    assert torch.allclose(logps.double(), plain.gather(1, tokens[:, None])[:, 0], atol=1e-5)


def test_first_tokens_of_a_group_differ(loaded):
    """D20: nanochat broadcast one first token to the whole group for two and a half months. With 16
    draws that are uniform over more than 200 tokens, all equal by chance happens less than
    once in 10^34."""
    model, chat = loaded("llama")
    head = model.get_output_embeddings().weight
    kept, head.data = head.data, torch.zeros_like(head.data)
    try:
        replies = exgrpo.sample(model, [chat.first("Why?")], max_new_tokens=1, temperature=1.0,
                                stop_ids=[], group_size=16, generator=generator()).replies
    finally:
        head.data = kept
    assert len({tuple(reply) for reply in replies}) > 8


def test_a_rows_luck_depends_on_no_other_row(loaded):
    """Rows that finish leave the batch; the rows that stay must sample what they would have
    sampled."""
    model, chat = loaded("llama")
    prompts = [chat.first("Why? " * n) for n in (1, 2, 3)]
    def replies(stop_ids):
        return exgrpo.sample(model, prompts, max_new_tokens=30, temperature=1.0, stop_ids=stop_ids,
                             group_size=4, generator=generator(1)).replies
    never = replies([])
    stop = never[5][3]  # a token at which some rows will stop
    early = replies([stop])
    assert 3 < sum(map(len, early)) < sum(map(len, never))
    for long, short in zip(never, early):
        assert long[:len(short)] == short
        assert (short[-1] == stop) or len(short) == 30


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_rows_that_left_can_go_on_in_the_next_turn(loaded, kind):
    """While some rows have finished, the others run on a copy of their part of the cache; what it
    learns must stand in the cache itself too, or the next turn would look at empty slots."""
    model, chat = loaded(kind)
    prompts = [chat.first("Why? " * n) for n in (1, 2, 3)]
    free = dict(max_new_tokens=20, temperature=1.0, generator=generator(1))
    stop = exgrpo.sample(model, prompts, stop_ids=[], **free).replies[1][4]
    first = exgrpo.sample(model, prompts, stop_ids=[stop], **free | {"generator": generator(1)})
    assert len({len(reply) for reply in first.replies}) > 1, "rows should end at different times"
    longer = [p + reply + chat.later("So?") for p, reply in zip(prompts, first.replies)]
    with torch.inference_mode():  # which the sampler left its cache in
        expected = [model(torch.tensor([ids])).logits[0, -1] for ids in longer]
        first.cache.activate(torch.arange(3))
        ours = exgrpo.extend(model, first.cache, [
            ids[first.cache.lengths[row]:] for row, ids in enumerate(longer)])
    assert torch.allclose(ours, torch.stack(expected), atol=1e-3)


def test_an_end_token_inside_the_prompt_does_not_stop_the_rollout(loaded):
    """D30: GRPO-Zero looked for the end token in the whole row; every chat prompt contains it."""
    model, chat = loaded("llama")
    prompt = chat.prompt(["Why?", "Because.", "And then?"])
    assert chat.end_id in prompt
    replies = exgrpo.sample(model, [prompt], max_new_tokens=8, temperature=1.0, group_size=8,
                            stop_ids=chat.stop_ids, generator=generator()).replies
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
        for ids in exgrpo.sample(model, [prompt], max_new_tokens=200, temperature=1.0, group_size=8,
                                 stop_ids=ends, generator=generator(seed)).replies:
            assert not set(ids[:-1]) & set(ends)
            last.add(ids[-1])
    assert set(ends) <= last
    dialogue = exgrpo.Dialogue()
    two = types.SimpleNamespace(stop_ids=ends, end_id=260)
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
    assert dialogue.ends == [len(first) + 3, len(dialogue.ids)]


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
        for instead in ("{% if loop.last %}{{ m['content'] }}{% else %}...{% endif %}", ""):
            chat.tokenizer.chat_template = kept.replace("{{ m['content'] }}", instead)
            with pytest.raises(exgrpo.UserError, match="rewrites earlier turns"):
                chat.later("And then?")
    finally:
        chat.tokenizer.chat_template = kept


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
    dialogues, _ = exgrpo.converse(model, chat, [["Why?", "And then?", "So?"]], ARGS, generator())
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
        model, [p], max_new_tokens=12, temperature=0, stop_ids=chat.stop_ids).replies[0])
        for p in prompts]


def test_bf16_autocast_samples_what_it_scores(loaded):
    """The path of --bf16, on the CPU: the two agree to the precision of bf16."""
    model, chat = loaded("llama")
    with torch.autocast("cpu", torch.bfloat16):
        (dialogue, *_), _ = exgrpo.converse(model, chat, [["Why?", "So?"]], ARGS, generator())
        ids, mask = exgrpo.pad_rows([dialogue.ids], [dialogue.mask], model.device)
        scored = exgrpo.token_logprobs(model, ids, mask, 0.7)[mask[:, 1:].bool()]
    assert (scored - torch.tensor(dialogue.logps)).abs().mean() < 0.1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "lora"])
def test_packed_weights_are_those_of_the_moment(tiny, kind, bf16, monkeypatch):
    """A packed copy that outlived an update would sample from the policy of yesterday. Inside,
    logits are the model's own; outside, no layer remembers; after an update, they follow it."""
    if bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 products")
    monkeypatch.setattr(exgrpo, "PACKED_FROM", 0)
    model, chat = exgrpo.load_model(tiny("llama" if kind == "lora" else kind), torch.device("cpu"))
    if kind == "lora":
        exgrpo.add_lora(model, 2, 8.0, bf16)
    prompt = chat.first("Why?")

    def logits():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return exgrpo.extend(model, exgrpo.KVCache(1, model), [prompt])

    def replaced():
        return [layer for layer in model.modules() if "forward" in vars(layer)]
    for _ in range(2):
        plain = logits()
        with (torch.autocast("cpu", torch.bfloat16, enabled=bf16), exgrpo.packed(model),
              exgrpo.packed(model)):  # once in the other is no harm
            assert len(replaced()) == (1 if kind == "gpt2" else 15)
            assert torch.allclose(logits(), plain, atol=0.05 if bf16 else 1e-4)
        assert replaced() == []
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert not torch.allclose(logits(), plain, atol=0.2)


@pytest.mark.parametrize("kind, families", [
    ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"],
               ["gate_proj", "up_proj"], ["down_proj"]]),
    ("gpt2", [])])  # its layers are no nn.Linear
def test_siblings_are_the_layers_that_read_the_same_tensor(loaded, kind, families):
    """o_proj has the shape of q_proj, and stands beside it: only what it reads tells them apart."""
    model, _ = loaded(kind)
    names = {layer: name.rpartition(".")[2] for name, layer in model.named_modules()}
    found = [[names[layer] for layer in family] for family in exgrpo.siblings(model)]
    assert found == families * 2 + [["lm_head"]]
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_sibling_takes_its_part_of_what_it_reads_itself():
    """Keys that were computed for the tensor before, because it was queries' turn to ask, would be
    those of another token. Each layer gets its own product, in whatever order they are called."""
    layers = [torch.nn.Linear(8, 16), torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4)]
    with torch.no_grad():
        product, first, other = exgrpo.PackedProduct(layers, None), *torch.randn(2, 3, 1, 8)
        for i, x in [(0, first), (1, first), (2, first),  # as a model does
                     (2, other), (0, other), (1, first), (1, first), (1, other)]:
            assert torch.allclose(product(i, x), layers[i](x), atol=1e-5)
        product(0, other), product(2, other)
        assert product.x is None and product.parts == {}, "what all have taken is held no longer"


def test_a_machine_without_the_packed_product_samples_all_the_same(loaded, monkeypatch):
    model, _ = loaded("llama")
    monkeypatch.setattr(exgrpo, "PACKED_FROM", 0)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with exgrpo.packed(model):
        assert not any("forward" in vars(layer) for layer in model.modules())
