"""What differs on a GPU: tokens read by replayed CUDA graphs, bf16 products, no waiting.

Skipped where there is none. The other tests run on the CPU, with a GPU at hand too.
"""
import copy
import types
import warnings

import pytest
import torch

import exgrpo
import test_loss
import test_sampler
import test_train
from test_sampler import KINDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICE = torch.device("cuda")
ARGS = types.SimpleNamespace(group_size=8, max_new_tokens=150, temperature=0.7)
SCRIPTS = [["Why? " * 3, "And then?", "So?"], ["What if it is not?", "So? " * 5]]


@pytest.fixture
def moved(tiny):
    """moved("llama") -> (model, chat) on the GPU."""
    return lambda kind: exgrpo.load_model(tiny(kind), DEVICE)


@pytest.fixture
def replays(monkeypatch):
    """Counts the graphs that are recorded and replayed."""
    counts, (begin, replay) = {"recorded": 0, "replayed": 0}, (
        torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.replay)

    def counted(name, method):
        def call(self, *args, **kwargs):
            counts[name] += 1
            return method(self, *args, **kwargs)
        return call
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted("recorded", begin))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted("replayed", replay))
    return counts


def generator(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


def gaps(model, dialogue, temperature):
    """By how much the sampler's log-probs differ from the model's own, token by token."""
    own = test_sampler.own_logps(model, dialogue.ids, temperature)
    return own[torch.tensor(dialogue.mask[1:]).bool()] - torch.tensor(dialogue.logps)


@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_are_sampled_as_the_model_says(moved, replays, kind):
    """A graph replays addresses: of a store that has since been grown, of rows that were forked, or
    of the turn before, it would read another row's past. Groups of eight over several turns, whose
    rows end at different times and pass the 128 slots at which the cache grows, and their forks."""
    model, chat = moved(kind)
    full, partial = exgrpo.sample_dialogues(model, chat, SCRIPTS, ARGS, generator(), [1, 0])
    assert len({len(ids) for dialogue in full for ids in dialogue.replies}) > 8
    assert max(len(dialogue.ids) for dialogue in full) > 256
    for dialogue in full + partial:
        assert gaps(model, dialogue, 0.7).abs().max() < 2e-3
    assert replays["recorded"] > 4 and replays["replayed"] > 100


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_replies_are_those_of_the_cpu(loaded, moved, kind):
    (model, chat), (there, _) = loaded(kind), moved(kind)
    prompts = [chat.first("Why? " * n) for n in (1, 7, 3)]
    ours, theirs = (exgrpo.generate(m, chat, prompts, max_new_tokens=40) for m in (there, model))
    assert ours == theirs


def test_a_model_that_cannot_be_recorded_is_sampled_all_the_same(moved, replays):
    """A layer that asks for a value (a mixture of experts, a rotary embedding that grows) makes
    recording fail, half way; the rest must not notice. (torch's own generator of the GPU is of no
    use from there on.)"""
    model, chat = moved("llama")
    model.model.norm.register_forward_hook(lambda *_: _[-1] * (1 + 0 * int(_[-1].sum().isnan())))
    full, _ = exgrpo.sample_dialogues(model, chat, SCRIPTS, ARGS, generator())
    for dialogue in full:
        assert gaps(model, dialogue, 0.7).abs().max() < 2e-3
    assert replays["recorded"] == 3 and replays["replayed"] == 0
    exgrpo.add_lora(model, 2, 32.0)


def test_no_token_waits_for_the_gpu(moved):
    """To ask for a value stops Python until the GPU has done all it was asked for. The sampler asks
    every eight tokens, and a constant number of times a call."""
    model, chat = moved("llama")
    prompts = [chat.first("Why? " * n) for n in (1, 7, 3)]

    def waits(n_tokens):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                exgrpo.sample(model, prompts, max_new_tokens=n_tokens, temperature=1.0,
                              stop_ids=[], group_size=4, generator=generator())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)
    waits(8)
    assert waits(16) > 0, "torch no longer says when it waits"
    assert waits(80) - waits(16) <= 8 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_cpu(loaded, moved, kind, monkeypatch):
    """Trees, masks, divisors, all loss terms; and in bf16 still the same direction."""
    monkeypatch.setattr(exgrpo, "MAX_GRAD_NORM", 1e9)
    model, chat = loaded(kind)
    dialogues, advantages, teacher = test_loss.a_step(model, chat)

    def gradient(model, bf16=False):
        recorder = test_loss.Recorder(model.parameters())
        metrics = exgrpo.update(model, model, recorder,
                                copy.deepcopy(dialogues),
                                test_loss.each_reply(dialogues, advantages), teacher,
                                test_loss.changed(bf16=bf16))
        return recorder.gradients[-1].cpu(), metrics
    there, _ = moved(kind)
    (ours, metrics), (theirs, _) = gradient(there), gradient(model)
    assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item())
    assert metrics["sampler_gap"] < 1e-3
    rough, _ = gradient(there, bf16=True)
    assert torch.cosine_similarity(rough, theirs, dim=0) > 0.98


@pytest.mark.parametrize("extra", [
    [], ["--bf16"], ["--bf16", "--lora-rank", "2", "--gradient-checkpointing"],
    ["--bf16", "--updates", "2", "--partial", "independent"]])
def test_a_run_and_its_resumption(monkeypatch, tiny, tmp_path, extra):
    flags = ["--student", tiny("llama"), *test_train.SMALL, "--sft-epochs", 1, "--device", "cuda",
             "--out", tmp_path / "run", *extra]
    test_train.call(monkeypatch, *flags, "--steps", 1)
    test_train.call(monkeypatch, *flags, "--steps", 3, "--resume")
    rows = test_train.metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["sampler_gap"]) < (0.3 if extra else 1e-3) for row in rows)
