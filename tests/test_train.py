"""The whole of exgrpo.py through its command line, on tiny random models."""
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import exgrpo

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
PROBES = os.path.join(HERE, "data", "probes.jsonl")
SMALL = ["--probes", PROBES, "--group-size", "3", "--turns", "2", "--questions-per-step", "2",
         "--max-new-tokens", "8", "--device", "cpu", "--sft-lr", "1e-3", "--lr", "1e-3",
         "--sft-form", "single"]


def call(monkeypatch, *flags, expect=0):
    """Runs exgrpo.py's main in this process, as the shell would; returns nothing, checks the exit
    code."""
    monkeypatch.setattr(sys, "argv", ["exgrpo.py", *map(str, flags)])
    exgrpo.STOP.clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as leaving:
            exgrpo.run(exgrpo.main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (leaving.value.code or 0) == expect


def fails(monkeypatch, capsys, *flags, saying):
    """Exit code 2 and one line on stderr that holds every given word; nothing else goes wrong."""
    capsys.readouterr()
    call(monkeypatch, *flags, expect=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in saying), lines[0]


def metrics(out):
    with open(os.path.join(out, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def coin(chat, played):
    """In place of grade: random models are never right, so that all advantages would be 0, and no
    dialogue trained."""
    return [[sum(ids) % 2 == 1 for ids in dialogue.replies]
            for dialogue in played.full + played.partial]


@pytest.fixture
def varied(monkeypatch):
    monkeypatch.setattr(exgrpo, "grade", coin)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind, extra", [
    ("llama", []), ("gpt2", ["--partial", "independent", "--advantage", "pooled"]),
    ("qwen2", ["--turns", "0"]),
    ("gemma", ["--bf16", "--gradient-checkpointing", "--updates", "2"]),
    ("llama", ["--lora-rank", "2"]), ("qwen2", ["--lora-rank", "2", "--gradient-checkpointing"]),
    ("gemma3", ["--sft-epochs", "0", "--advantage", "separate", "--beta", "0",
                "--aux-weight", "0"])])
def test_a_run_leaves_a_plain_model_and_its_story(monkeypatch, capsys, tiny, tmp_path, varied, kind,
                                                  extra):
    out = tmp_path / "run"
    call(monkeypatch, "--student", tiny(kind), *SMALL, "--sft-epochs", 1, "--steps", 2,
         "--out", out, *extra)
    assert f"--model {out}" in capsys.readouterr().out
    assert [row["step"] for row in metrics(out)] == ["1", "2"]
    assert list(metrics(out)[0]) == exgrpo.METRICS
    assert all(0 < float(row["sampler_gap"]) < (0.5 if "--bf16" in extra else 1e-3)
               for row in metrics(out))
    assert "==== step 2, question" in (out / "dialogues.txt").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(tiny(kind)).state_dict()
    assert model.state_dict().keys() == start.keys()
    assert any(not torch.equal(start[name], value) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(out).chat_template == (
        AutoTokenizer.from_pretrained(tiny(kind)).chat_template)


def test_a_saved_model_stops_where_it_was_taught_to(tiny, tmp_path):
    """Qwen's base models have a chat template whose end of turn is not their eos: what was trained
    with it ran on for ever elsewhere, as the saved eos was still the old one (open-r1 #603)."""
    model, chat = exgrpo.load_model(tiny("llama"), torch.device("cpu"))
    model.generation_config.eos_token_id = 7
    chat = exgrpo.Chat(chat.tokenizer, model)
    exgrpo.save_model(model, chat, tmp_path)
    eos = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert eos == chat.stop_ids == [7, chat.end_id]


def test_a_student_whose_own_generation_config_is_invalid_can_be_saved(tiny, tmp_path):
    """transformers saves no temperature without do_sample; published models have it so."""
    path = tmp_path / "student"
    shutil.copytree(tiny("llama"), path)
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7, "bos_token_id": 5}
    (path / "generation_config.json").write_text(json.dumps(settings))
    model, chat = exgrpo.load_model(str(path), torch.device("cpu"))
    exgrpo.save_model(model, chat, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert saved.eos_token_id == chat.stop_ids and saved.bos_token_id == 5


def test_lora_trains_adapters_only_and_merges_them(tiny, loaded):
    model, chat = exgrpo.load_model(tiny("llama"), torch.device("cpu"))
    ids = torch.arange(2, 30)[None]
    before = model(ids).logits.detach()
    exgrpo.add_lora(model, 2, 8.0)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all(name.endswith((".A", ".B")) for name in adapters)
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.3)
    moved = model(ids).logits.detach()
    assert not torch.allclose(moved, before, atol=1e-2)
    with exgrpo.adapters_off():
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, moved)
    exgrpo.merge_lora(model)
    assert torch.allclose(model(ids).logits, moved, atol=1e-3)
    assert not any(isinstance(module, exgrpo.LoRA) for module in model.modules())


def test_lora_refuses_a_model_in_which_it_would_train_nothing(monkeypatch, capsys, tiny, tmp_path):
    """GPT-2's layers are no nn.Linear: without adapters, a run would go through all its steps and
    move no weight."""
    fails(monkeypatch, capsys, "--student", tiny("gpt2"), *SMALL, "--lora-rank", 2, "--out",
          tmp_path / "run", saying=["--lora-rank", "GPT2LMHeadModel", "no linear layer"])


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_frozen_layers_in_bf16_change_no_bit(kind, tiny):
    """Autocast would cast frozen fp32 weights anew at each token; held in bf16 they are cast once.
    Logits and the adapters' gradients must not notice."""
    def run(bf16):
        model, _ = exgrpo.load_model(tiny(kind), torch.device("cpu"))
        torch.manual_seed(0)
        exgrpo.add_lora(model, 2, 8.0, bf16)
        kinds = {layer.base.weight.dtype for layer in model.modules()
                 if isinstance(layer, exgrpo.LoRA)}
        assert kinds == {torch.bfloat16 if bf16 else torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.arange(2, 30)[None]).logits
            logits.float().logsumexp(-1).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        exgrpo.merge_lora(model)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return [logits.detach(), *gradients]
    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "2"], ["--updates", "2"]])
def test_pi_ref_is_the_policy_after_the_warm_up(monkeypatch, tiny, tmp_path, extra):
    """The KL penalty holds the policy near OUT/sft. Held near --student, it would undo the warm-up.
    And pi_ref stays there, while the policy moves."""
    ids, seen, own = torch.arange(2, 30)[None], [], exgrpo.update

    def logits(model):
        with torch.no_grad():
            return model(ids).logits

    def update(policy, reference, *args):
        before = logits(policy)
        metrics = own(policy, reference, *args)
        with exgrpo.adapters_off():
            seen.append((before, logits(reference)))
        return metrics
    monkeypatch.setattr(exgrpo, "update", update)
    call(monkeypatch, "--student", tiny("llama"), *SMALL, "--sft-epochs", 1, "--steps", 2,
         "--out", tmp_path / "run", "--lr", "1e-2", "--sft-lr", "1e-2", *extra)
    student, sft = (logits(AutoModelForCausalLM.from_pretrained(folder).eval())
                    for folder in (tiny("llama"), tmp_path / "run" / "sft"))
    assert not torch.allclose(student, sft, atol=1e-2)
    (first, ref), (second, again) = seen
    assert all(torch.allclose(x, sft, atol=1e-4) for x in (first, ref, again))
    assert not torch.allclose(second, sft, atol=1e-2)


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "2"]])
def test_killed_and_resumed_is_bit_identical(monkeypatch, tiny, tmp_path, varied, extra):
    """D28: SIGKILL in the warm-up, SIGKILL among the ExGRPO steps, then --resume: the same weights
    to the last bit, and the same logs, as the run that nobody disturbed. nano-aha repeats a batch
    here."""
    flags = ["--student", tiny("llama"), *SMALL, *extra, "--sft-epochs", "2", "--sft-batch-size",
             "24", "--steps", "6", "--save-every", "2", "--out"]
    quiet, broken = str(tmp_path / "quiet"), str(tmp_path / "broken")
    code = ("import exgrpo, test_train, torch; torch.set_num_threads(1); "
            "exgrpo.grade = test_train.coin; exgrpo.run(exgrpo.main)")
    environment = os.environ | {"PYTHONPATH": ROOT + os.pathsep + HERE}
    # header + 3 steps: one past a checkpoint
    for log, rows in (("sft.csv", 4), ("metrics.csv", 4)):
        resume = ["--resume"] if os.path.exists(broken) else []
        process = subprocess.Popen([sys.executable, "-c", code, *flags, broken, *resume],
                                   env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        wait_for_lines(os.path.join(broken, log), rows, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call(monkeypatch, *flags, broken, "--resume")
    call(monkeypatch, *flags, quiet)
    torch.set_num_threads(threads)
    assert same(weights(quiet), weights(broken))
    assert same(weights(os.path.join(quiet, "sft")), weights(os.path.join(broken, "sft")))
    for name in ("sft.csv", "dialogues.txt"):
        with open(os.path.join(quiet, name)) as ours, open(os.path.join(broken, name)) as theirs:
            assert ours.read() == theirs.read()
    timeless = [[{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}
                 for row in metrics(out)] for out in (quiet, broken)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 6


def test_a_run_has_one_process(monkeypatch, tiny, tmp_path):
    """Two processes on one run would write the same logs and checkpoint in turns."""
    pytest.importorskip("fcntl")
    monkeypatch.setattr(sys, "argv", ["exgrpo.py", "--student", tiny("llama"), "--probes", PROBES,
                                      "--out", str(tmp_path / "run")])
    args = exgrpo.parse_args()
    with exgrpo.open_run(args):
        args.resume = True
        with pytest.raises(exgrpo.UserError, match="another process is working on the run"):
            exgrpo.open_run(args)
    exgrpo.open_run(args).close()


def wait_for_lines(path, lines, process):
    for _ in range(6000):
        if process.poll() is not None:
            raise AssertionError("the run ended before it could be killed")
        if os.path.exists(path):
            with open(path) as file:
                if len(file.readlines()) >= lines:
                    return
        time.sleep(0.01)
    raise AssertionError(f"{path} never grew to {lines} lines")


def test_weights_are_fp32_whatever_the_checkpoint_and_the_products(monkeypatch, tiny, tmp_path):
    """D15: bf16 weights of 0.02 do not move under AdamW at 1e-6; the update is lost in rounding."""
    AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bf16")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "bf16")
    flags = ["--student", tmp_path / "bf16", *SMALL, "--sft-epochs", 1, "--sft-lr", "1e-6",
             "--steps", 0, "--out", tmp_path / "run", "--bf16"]
    call(monkeypatch, *flags)
    before, after = weights(tmp_path / "bf16"), weights(tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in after.values())
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (after[name] != before[name].float()).double().mean()
    assert moved > 0.9


def test_bf16_samples_what_it_scores(monkeypatch, tiny, tmp_path, varied):
    """In bf16 the two differ by nothing, or where a logit was rounded the other way, by its last
    bit: from 0 to 0.023 in 126 steps of seven kinds of tiny model. A rollout outside of autocast,
    from weights that are not quite those that are scored, was off by 0.01 or more in every step."""
    def gaps(kind, name=""):
        call(monkeypatch, "--student", tiny(kind), *SMALL, "--sft-epochs", 0, "--steps", 2,
             "--max-new-tokens", 16, "--out", tmp_path / (kind + name), "--bf16")
        return [float(row["sampler_gap"]) for row in metrics(tmp_path / (kind + name))]
    gap = {kind: gaps(kind) for kind in ("gpt2", "gemma2")}
    assert max(map(max, gap.values())) < 0.05 and min(gap["gemma2"]) < 0.005, gap
    own = exgrpo.rollout
    monkeypatch.setattr(exgrpo, "rollout",
                        torch.autocast("cpu", enabled=False)(lambda *args: own(*args)))
    assert 0.005 < min(gaps("gemma2", "-fp32"))


def test_gradient_checkpointing_changes_memory_only(monkeypatch, tiny, tmp_path, varied):
    """D17: layers are recomputed in train mode only, and there transformers drops the KV cache: a
    sampler that runs in train mode sees no prompt. The same dialogues and metrics must come out."""
    stories = []
    for extra in ([], ["--gradient-checkpointing"]):
        out = tmp_path / f"run{len(extra)}"
        call(monkeypatch, "--student", tiny("gpt2"), *SMALL, "--sft-epochs", 1, "--steps", 2,
             "--out", out, *extra)
        stories.append(((out / "dialogues.txt").read_text(), metrics(out)[-1]["grad_norm"]))
    assert stories[0][0] == stories[1][0]
    assert float(stories[0][1]) == pytest.approx(float(stories[1][1]), rel=1e-3)


def test_truncated_replies_are_counted(monkeypatch, tiny, tmp_path):
    """D21: replies cut before they state an answer earn nothing; silently, training
    stands still. Here every reply is cut, and the table says so."""
    call(monkeypatch, "--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--steps", 1,
         "--max-new-tokens", 1, "--out", tmp_path / "run")
    row, = metrics(tmp_path / "run")
    assert (float(row["truncated"]) > 0.9 and float(row["unparsed"]) == 1
            and float(row["reward"]) == 0)
    assert float(row["zero_variance"]) == 1 and float(row["reply_tokens"]) == 1


def test_ctrl_c_saves_and_resume_goes_on(monkeypatch, capfd, tiny, tmp_path):
    """The first signal finishes the step and saves it; nothing that was computed is lost."""
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--steps", 3,
             "--out", tmp_path / "run"]
    own = exgrpo.log_step
    monkeypatch.setattr(exgrpo, "log_step",
                        lambda *a: own(*a) or os.kill(os.getpid(), signal.SIGTERM))
    call(monkeypatch, *flags, expect=130)
    told = capfd.readouterr().err
    assert told.index("after this step; a second") < told.index("Saved after step 1")
    monkeypatch.setattr(exgrpo, "log_step", own)
    call(monkeypatch, *flags, "--resume", "--micro-batch-tokens", 512)  # now with less memory
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["1", "2", "3"]
    call(monkeypatch, *flags, "--resume")  # a finished run: nothing to do, nothing broken
    assert len(metrics(tmp_path / "run")) == 3


def test_a_log_that_was_deleted_begins_anew(monkeypatch, tiny, tmp_path):
    """To truncate a file to more than it has fills it with NUL bytes, and no header is written."""
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--out", tmp_path / "run"]
    call(monkeypatch, *flags, "--steps", 1)
    (tmp_path / "run" / "metrics.csv").unlink()
    call(monkeypatch, *flags, "--steps", 2, "--resume")
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["2"]


def test_a_checkpoint_or_warm_up_that_is_gone(monkeypatch, capsys, tiny, tmp_path):
    """--resume took a run without its checkpoint for one that had done nothing yet: it emptied the
    logs, began again at step 1 and wrote over the model."""
    run = tmp_path / "run"
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 1, "--out", run]
    call(monkeypatch, *flags, "--steps", 1)
    whole, logs = (run / "checkpoint.pt").read_bytes(), (run / "metrics.csv").read_bytes()
    again = [*flags, "--steps", 2, "--resume"]
    (run / "checkpoint.pt").unlink()
    fails(monkeypatch, capsys, *again, saying=["checkpoint.pt is gone", "put it back"])
    (run / "checkpoint.pt").write_bytes(whole)
    (run / "sft").rename(tmp_path / "sft")
    fails(monkeypatch, capsys, *again, saying=["sft", "put it back"])
    (tmp_path / "sft").rename(run / "sft")
    assert (run / "metrics.csv").read_bytes() == logs
    call(monkeypatch, *again)
    assert [row["step"] for row in metrics(run)] == ["1", "2"]


def test_out_of_memory_and_other_faults_of_torch(monkeypatch, capsys):
    """A GPU's lack of memory has a class of its own, that of a CPU is a RuntimeError."""
    def lacking():
        torch.empty(2 ** 60, dtype=torch.uint8)
    with pytest.raises(SystemExit) as leaving:
        exgrpo.run(lacking)
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and "memory is too small" in error and error.count("\n") == 1

    def unknown():  # a token that was added to the tokenizer only
        torch.nn.functional.embedding(torch.tensor([3]), torch.zeros(3, 2))
    with pytest.raises(SystemExit):
        exgrpo.run(unknown)
    assert "has no embedding: resize it" in capsys.readouterr().err

    def wrong():
        torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError):
        exgrpo.run(wrong)


def test_a_character_that_the_terminal_lacks(monkeypatch):
    """A Windows pipe speaks cp1252, which has no Greek: a question about an angle ended the run in
    a UnicodeEncodeError, be it in the plan, in --help or in the line that says what is wrong."""
    def leaves(main, code):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            exgrpo.run(main)
        assert (leaving.value.code or 0) == code
        for stream in streams:
            stream.flush()
        return [stream.buffer.getvalue().decode("cp1252") for stream in streams]

    def wrong():
        raise exgrpo.UserError("a dialogue that ends in 'What is \u03b1?' is too long")
    assert leaves(lambda: print("What is \u03b1?"), 0)[0].split() == ["What", "is", "??"]
    assert leaves(wrong, 2)[1].strip() == "error: a dialogue that ends in 'What is ??' is too long"


def test_templates_of_their_own_kind(monkeypatch, capsys, tiny, tmp_path):
    """A template may open a reply by what no finished reply has (DeepSeek-R1: <think>); there may
    be several, by name, which a model's folder holds in a folder; and one may fail."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    own = tokenizer.chat_template
    tokenizer.chat_template = own.replace("assistant\n{% endif", "assistant\nI think:\n{% endif")
    assert tokenizer.chat_template != own
    chat = exgrpo.Chat(tokenizer, model)
    assert chat.end_id == tokenizer.eos_token_id
    assert chat.decode(chat.first("Why?")).endswith("I think:")
    tokenizer.chat_template = {"default": own, "tool_use": own}
    chat = exgrpo.Chat(tokenizer, model)
    for _ in range(2):
        exgrpo.save_model(model, chat, tmp_path)
    assert os.path.isdir(tmp_path / "additional_chat_templates")
    tokenizer.chat_template = "{{ raise_exception('a system turn is needed') }}"
    tokenizer.save_pretrained(tmp_path)
    fails(monkeypatch, capsys, "--student", tmp_path, *SMALL, "--out", tmp_path / "run",
          saying=["cannot be loaded", "a system turn is needed"])


def test_templates_whose_last_turn_differs(tiny, loaded):
    """Phi-3 ends the whole by eos, and each turn by another token: eos was taught as the end of a
    reply, and dialogues were refused. Qwen3 puts an empty thought into the last reply only, and was
    refused, too. Both only append. So does Nemotron 3, which opens a reply by <think> and a new
    line, and puts an empty thought without one into every finished reply. GLM-4 ends a turn by the
    token that opens the next one: it was said to have no end token."""
    model, chat = loaded("llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    own, (phi3_end,) = tokenizer.chat_template, tokenizer.encode("<|open|>")
    later = chat.later("So?")
    tokenizer.chat_template = own.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n"
        "{% endif %}{{ m['content'] }}")
    assert tokenizer.chat_template != own
    qwen3 = exgrpo.Chat(tokenizer, model)
    assert (qwen3.end_id, qwen3.later("So?")) == (chat.end_id, later)
    tokenizer.chat_template = own.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] }}").replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    nemotron = exgrpo.Chat(tokenizer, model)
    assert nemotron.end_id == chat.end_id
    assert nemotron.later("So?") == later + chat.encode("<think>\n")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|open|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% else %}{{ eos_token }}{% endif %}")
    phi3 = exgrpo.Chat(tokenizer, model)
    assert phi3.end_id == phi3_end and set(phi3.stop_ids) == {phi3_end, tokenizer.eos_token_id}
    assert tokenizer.decode(phi3.later("So?")) == "\nuser\nSo?<|open|>\nassistant\n"
    tokenizer.chat_template = (
        "{% for m in messages %}<|open|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|open|>assistant\n{% endif %}")
    glm4 = exgrpo.Chat(tokenizer, model)
    assert glm4.end_id == phi3_end
    assert tokenizer.decode(glm4.later("So?")) == "user\nSo?<|open|>assistant\n"


def questions(path, n):
    path.write_text("".join(json.dumps({
        "id": str(i), "question": f"{i}?", "answer": str(i), "answer_type": "number",
        "rationale": ""}) + "\n" for i in range(n)))
    return path


def test_ctrl_c_while_the_table_is_asked(monkeypatch, capsys, tiny, tmp_path):
    """We leave after the questions and the step under way, and --resume completes the table."""
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--steps", 2, "--out",
             tmp_path / "run", "--eval", *(questions(tmp_path / f"{x}.jsonl", 1) for x in "ab")]
    own = exgrpo.generate

    def generate(*args, **more):
        if not exgrpo.STOP.is_set():  # a second signal kills at once
            os.kill(os.getpid(), signal.SIGINT)
        return own(*args, **more)
    monkeypatch.setattr(exgrpo, "generate", generate)
    call(monkeypatch, *flags, expect=130)
    assert "Saved after step 1" in capsys.readouterr().err
    monkeypatch.setattr(exgrpo, "generate", own)
    call(monkeypatch, *flags, "--resume")
    table = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert {label: set(found) for label, found in table.items()} == {
        "student": {"a", "b"}, "after step 2": {"a", "b"}}


def test_the_table_is_that_of_the_model_in_the_folder(monkeypatch, capsys, tiny, tmp_path):
    """More --steps on a finished run: a figure that was kept from before would be another model's.
    Other --eval files are refused: verdicts of another file of this name and length once stayed."""
    a, b = (questions(tmp_path / f"{x}.jsonl", 3) for x in "ab")
    asked, own = [], exgrpo.generate
    monkeypatch.setattr(exgrpo, "generate",
                        lambda *args, **more: asked.append(len(args[2])) or own(*args, **more))

    def go(steps, *flags, expect=0):
        asked.clear()
        call(monkeypatch, "--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--steps", steps,
             "--out", tmp_path / "run", *flags, expect=expect)
        return len(asked)
    assert go(1, "--eval", a) == 2                            # before and after
    assert go(1, "--eval", a, "--resume") == 0
    assert go(2, "--eval", a, "--resume") == 1                # the model has changed
    a.write_text(a.read_text().replace("1?", "2?"))
    for changed in (["--eval", a], ["--eval", a, b], []):
        assert go(2, *changed, "--resume", expect=2) == 0
        assert "eval_sha256" in capsys.readouterr().err
    a.write_text(b.read_text())
    assert go(2, "--eval", a, "--resume") == 0
    assert go(2, "--eval", a, "--resume", "--eval-limit", 2, expect=2) == 0


def test_the_table_while_it_trains(monkeypatch, capsys, tiny, tmp_path):
    """--eval-every: a figure whose checkpoint was lost in a kill is asked again, of the policy that
    goes on; no other is, and all are those of an undisturbed run."""
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 1, "--steps", 5, "--lr", 1e-2,
             "--save-every", 3, "--eval-every", 2, "--eval", questions(tmp_path / "a.jsonl", 3)]
    asked, own_generate, own_end = [], exgrpo.generate, exgrpo.end_step
    monkeypatch.setattr(exgrpo, "generate",
                        lambda *args, **more: asked.append(1) or own_generate(*args, **more))

    def dies(args, stage, step, *more):
        if (stage, step) == ("ExGRPO", 4):
            raise OSError("killed")
        own_end(args, stage, step, *more)
    monkeypatch.setattr(exgrpo, "end_step", dies)
    call(monkeypatch, *flags, "--out", tmp_path / "run", expect=2)
    assert len(asked) == 4  # before, after SFT, after steps 2 and 4
    monkeypatch.setattr(exgrpo, "end_step", own_end)
    table = json.loads((tmp_path / "run" / "eval.json").read_text())
    table["after step 4"]["a"] = "lost"
    (tmp_path / "run" / "eval.json").write_text(json.dumps(table))
    call(monkeypatch, *flags, "--out", tmp_path / "run", "--resume")
    assert len(asked) == 6
    call(monkeypatch, *flags, "--out", tmp_path / "quiet")
    tables = [json.loads((tmp_path / run / "eval.json").read_text()) for run in ("run", "quiet")]
    assert tables[0] == tables[1]
    assert list(tables[0]) == ["student", "after SFT", "after step 2", "after step 4",
                               "after step 5"]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "quiet"))
    page = capsys.readouterr().out
    assert "after step 4" in page and "ExGRPO - SFT" in page


def test_what_reinforcement_added_is_paired():
    """By hand: 3 questions won, 1 lost of 10; p = 2 (1 + 4) / 2^4. Equal verdicts: p = 1."""
    assert exgrpo.difference("1110100011", "0000100111") == "+20.0 (p = 0.6)"
    assert exgrpo.difference("0101", "0101") == "+0.0 (p = 1)"
    assert exgrpo.mcnemar(3, 1) == 10 / 16


def step_of(monkeypatch, tiny, out, *flags):
    """Runs one step -> (its rollout, the dialogues of Eq. 8, each with its advantages)."""
    seen = {}
    own_update, own_rollout = exgrpo.update, exgrpo.rollout

    def update(policy, reference, optimizer, dialogues, advantages, teacher, args):
        seen["update"] = dialogues, advantages, teacher
        return own_update(policy, reference, optimizer, dialogues, advantages, teacher, args)
    monkeypatch.setattr(exgrpo, "update", update)
    monkeypatch.setattr(exgrpo, "rollout",
                        lambda *args: seen.setdefault("rollout", own_rollout(*args)))
    call(monkeypatch, "--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--steps", 1,
         "--out", out, *flags)
    return seen["rollout"], *seen["update"]


@pytest.mark.parametrize("kind", ["probes", "both"])
def test_the_papers_baseline_samples_probes_alone(monkeypatch, tiny, tmp_path, varied, kind):
    """"RL (R_outcome)": each probe is a sample of one turn, paid for its own answer; the auxiliary
    loss is the teacher's reply to that very probe."""
    where = SMALL.index("--turns")
    monkeypatch.setattr(sys.modules[__name__], "SMALL", SMALL[:where] + SMALL[where + 2:])
    played, dialogues, _, teacher = step_of(
        monkeypatch, tiny, tmp_path / "run", "--rl-data", kind, "--questions-per-step", 12)
    assert len(dialogues) == len(played.full) == 36 and not played.partial
    assert all(len(d.replies) == 1 for d in dialogues)
    rows = [row for row in exgrpo.read_probes(PROBES)[1] if row["kept"]]
    golds = {probe["probe"]: probe["answer"] for row in rows for probe in row["probes"]}
    asked = [row for row in played.questions if "probe" in row]
    assert all(golds[row["probe"]] == row["answer"] for row in asked)
    assert len(asked) == 12 if kind == "probes" else 0 < len(asked) < 12
    assert len(teacher) == len(asked)
    text = teacher[0].ids[:len(dialogues[0].ids)]
    assert asked[0]["probe"].split()[0] in exgrpo.load_model(
        tiny("llama"), torch.device("cpu"))[1].decode(text)


def test_sft_examples_as_dialogues():
    """The same replies, each once; up to k + 1 in a dialogue, the question last in its own."""
    question = {"question": "Q", "probes": [{"probe": str(i)} for i in range(7)]}
    args = type("Args", (), {"sft_form": "single", "turns": 2})
    alone = exgrpo.sft_examples(question, args, np.random.default_rng(0))
    args.sft_form, lengths, orders = "dialogue", [], set()
    for seed in range(40):
        together = exgrpo.sft_examples(question, args, np.random.default_rng(seed))
        assert sorted(map(str, sum(together, []))) == sorted(map(str, sum(alone, [])))
        own = next(rows for rows in together if question in rows)
        assert own[-1] is question
        lengths += map(len, together)
        orders.add(str(together))
    assert set(lengths) == {1, 2, 3} and len(orders) > 30


def test_the_warm_up_reads_dialogues(monkeypatch, tiny, tmp_path):
    lengths, own = [], exgrpo.sft_backward
    monkeypatch.setattr(exgrpo, "sft_backward", lambda model, dialogues, *args: lengths.extend(
        len(d.replies) for d in dialogues) or own(model, dialogues, *args))
    call(monkeypatch, "--student", tiny("llama"), *SMALL, "--sft-epochs", 1, "--steps", 0,
         "--sft-form", "dialogue", "--out", tmp_path / "run")
    assert set(lengths) == {1, 2, 3}


def test_dialogues_txt_shows_what_each_reply_earned(monkeypatch, tiny, tmp_path, varied):
    played, dialogues, advantages, _ = step_of(monkeypatch, tiny, tmp_path / "run", "--credit",
                                               "turn")
    text = (tmp_path / "run" / "dialogues.txt").read_text()
    assert re.search("step 1, question .*, gold .*, (bonus paid|no bonus)\n", text)
    full, partial = text.split("---- partial")
    for part, d, its in ((full, 0, advantages[0]),
                         (partial, len(played.full), advantages[len(played.full)])):
        verdicts = coin(None, played)[d]
        assert re.findall(r"\[(right|wrong), advantage ([-+.\d]+)\]", part) == [
            (("wrong", "right")[right], f"{x:+.2f}") for right, x in zip(verdicts, its)]


def test_several_probes_files(monkeypatch, tiny, tmp_path):
    """All of their questions are trained, and a resumed run sees that one has changed."""
    lines = [line for line in open(PROBES, encoding="utf-8")]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(lines[:3]))
    two.write_text(lines[0] + "".join(lines[3:5]))
    monkeypatch.setattr(sys, "argv", ["exgrpo.py", "--probes", str(one), str(two), "--turns", "1",
                                      "--out", str(tmp_path / "run"), "--eval"])
    args = exgrpo.parse_args()
    together = exgrpo.load_training_data(args)
    args.probes = [str(one)]
    apart = exgrpo.load_training_data(args)
    assert 0 < len(apart) < len(together)
    args.probes = [str(one), str(two)]
    exgrpo.open_run(args).close()
    two.write_text(lines[0] + lines[3])
    args.resume = True
    with pytest.raises(exgrpo.UserError, match="probes_sha256"):
        exgrpo.open_run(args)


def test_reward_rises(monkeypatch, tiny, tmp_path):
    """The only end-to-end proof. Each question also stands as a probe with a wrong answer, so that
    the warm-up leaves a policy that is undecided between two answers; reinforcement must find the
    right one."""
    rows = [{"ei": {}}]
    for i, (question, right, wrong) in enumerate([("Sun?", "4", "7"), ("Moon?", "8", "5")]):
        probe = {"rule": "R7", "probe": question, "rationale": "", "answer": wrong,
                 "answer_type": "number", "consistent": True, "student_correct": None}
        rows.append({"id": str(i), "question": question, "answer": right, "answer_type": "number",
                     "rationale": "", "kept": True, "probes": [probe], "declined": []})
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(monkeypatch, "--student", tiny("llama"), "--probes", path, "--out", tmp_path / "run",
         "--device", "cpu", "--turns", 1, "--group-size", 8, "--questions-per-step", 2,
         "--sft-form", "single", "--credit", "outcome",
         "--max-new-tokens", 22, "--sft-epochs", 150, "--sft-batch-size", 4, "--sft-lr", 5e-3,
         "--steps", 30, "--lr", 1e-3, "--aux-weight", 0, "--save-every", 1000)
    right = [(float(row["acc_full"]) + float(row["acc_partial"])) / 2
             for row in metrics(tmp_path / "run")]
    first, last = sum(right[:6]) / 6, sum(right[-6:]) / 6
    assert 0.1 < first < 0.7, f"the warm-up should leave the policy undecided, not at {first:.2f}"
    assert last > first + 0.25, f"accuracy went from {first:.2f} to {last:.2f}"


# ---------------------------------------------------------------------------------------- bad input

def write(tmp_path, *lines):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line)
                              for line in lines))
    return path


HEADER = {"ei": {"teacher": "t"}}
PROBE = {"rule": "R1", "probe": "p?", "rationale": "r", "answer": "1", "answer_type": "number",
         "consistent": True, "student_correct": None}
ROW = {"id": "a", "question": "q?", "answer": "1", "answer_type": "number", "rationale": "",
       "kept": True, "probes": [PROBE], "declined": []}


@pytest.mark.parametrize("lines, saying", [
    ([], ["no D_EI file", "ei.py"]),
    ([ROW], ["bad.jsonl:1", "no D_EI file"]),
    ([HEADER, "{broken"], ["bad.jsonl:2", "not JSON"]),
    ([HEADER, "[1, 2]"], ["bad.jsonl:2", "object"]),
    ([HEADER, "[" * 100_000], ["bad.jsonl:2", "not JSON"]),
    ([HEADER, '{"id": "\\ud83d"}'], ["bad.jsonl:2", "surrogate"]),
    ([HEADER, ROW, "", ROW], ["bad.jsonl:4", '"a"', "bad.jsonl:2"]),
    ([HEADER, {k: v for k, v in ROW.items() if k != "answer"}], ["bad.jsonl:2", '"answer"']),
    ([HEADER, ROW | {"question": " "}], ["bad.jsonl:2", '"question" is missing, empty']),
    ([HEADER, ROW | {"answer_type": "poem"}], ["bad.jsonl:2", '"poem"', "yesno"]),
    ([HEADER, ROW | {"answer": 3}], ["bad.jsonl:2", '"answer"']),
    ([HEADER, ROW | {"kept": "yes"}], ["bad.jsonl:2", '"kept"']),
    ([HEADER, ROW | {"probes": [PROBE | {"probe": ""}]}], ["bad.jsonl:2", '"probe" is missing']),
    ([HEADER, ROW | {"probes": ["p?"]}], ["bad.jsonl:2", "probe"]),
    ([HEADER, ROW | {"kept": False}], ["0 of 1 questions"]),
    ([HEADER, ROW | {"probes": [PROBE | {"consistent": False}]}], ["0 of 1 questions"]),
])
def test_a_bad_probes_file_is_named_with_its_line(monkeypatch, capsys, tiny, tmp_path, lines,
                                                  saying):
    out = tmp_path / "run"
    fails(monkeypatch, capsys, "--student", tiny("llama"), "--probes", write(tmp_path, *lines),
          "--out", out, saying=saying)
    assert not out.exists()


@pytest.mark.parametrize("flags, saying", [
    (["--turns", 50], ["--turns 50", "more than"]),
    (["--group-size", 1], ["--group-size", "at least 2"]),
    (["--temperature", 0], ["--temperature", "above 0"]),
    (["--nu", 0.5], ["--nu", "at least 1"]),
    (["--lr", "fast"], ["--lr"]),
    (["--delta", "nan"], ["--delta"]),
    (["--advantage", "best"], ["--advantage"]),
    (["--unknown"], ["--unknown"]),
    (["--probes", "missing.jsonl"], ["missing.jsonl"]),
    (["--credit", "turn", "--turns", 0], ["--credit turn", "--turns"]),
    (["--sft-form", "dialogue", "--turns", 0], ["--sft-form dialogue", "--turns"]),
    (["--eval", os.devnull], ["--eval", "no question"]),
    (["--eval", PROBES, PROBES], ["--eval", "of this name"]),
    (["--rl-data", "probes", "--turns", 1], ["--rl-data probes", "--turns"]),
    (["--rl-data", "probes", "--credit", "turn"], ["--credit turn", "--turns"]),
    (["--resume"], ["holds no run", "new --out"]),
    (["--device", "cuda"], ["--device cuda"]),
])
def test_bad_flags(monkeypatch, capsys, tiny, tmp_path, flags, saying):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    fails(monkeypatch, capsys, "--student", tiny("llama"), "--probes", PROBES,
          "--out", tmp_path / "run", *flags, saying=saying)


@pytest.mark.parametrize("what, text", [
    ("rationale", "why " * 600), ("question", "why " * 600), ("question", "\N{MELON}" * 500)])
def test_a_text_that_is_too_long_is_found_before_training(monkeypatch, capsys, tiny, tmp_path, what,
                                                          text):
    """GPT-2's learned positions would end in an IndexError at some step, on CUDA in an assert.
    Tokens are counted, and not characters: a melon is four."""
    row = ROW | ({"probes": [PROBE | {what: text}]} if what == "rationale" else {what: text})
    fails(monkeypatch, capsys, "--student", tiny("gpt2"), *SMALL, "--turns", 1, "--out",
          tmp_path / "run", "--probes", write(tmp_path, HEADER, ROW | {"id": "b"}, row),
          saying=["the teacher's reply to", "2048", "leave it out"])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_template_that_rewrites_history_is_refused_before_the_warm_up(monkeypatch, capsys, tiny,
                                                                        tmp_path):
    """Single-turn SFT never meets it; three epochs later, the first dialogue would."""
    shutil.copytree(tiny("llama"), tmp_path, dirs_exist_ok=True)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template.replace(
        "{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% else %}...{% endif %}"))
    fails(monkeypatch, capsys, "--student", tmp_path, *SMALL, "--out", tmp_path / "run",
          saying=["rewrites earlier turns"])
    assert not (tmp_path / "run").exists()
    call(monkeypatch, "--student", tmp_path, *SMALL, "--out", tmp_path / "run", "--turns", 0,
         "--steps", 1)  # one turn: nothing is rewritten


def test_a_student_that_cannot_be_fetched(monkeypatch, capsys, tmp_path):
    """Without a network: the resolved name, that it cannot be fetched, and that a folder works."""
    assert exgrpo.resolve_model("Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert exgrpo.resolve_model("someone/model") == "someone/model"
    fails(monkeypatch, capsys, "--student", "Qwen2.5-0.5B", "--probes", PROBES, "--out",
          tmp_path / "run", saying=["Qwen/Qwen2.5-0.5B", "cannot be loaded", "Hub", "local folder"])
    (tmp_path / "empty").mkdir()
    fails(monkeypatch, capsys, "--student", tmp_path / "empty", "--probes", PROBES, "--out",
          tmp_path / "run", saying=[str(tmp_path / "empty"), "cannot be loaded"])


def test_a_tokenizer_without_end_token(monkeypatch, capsys, tiny, tmp_path):
    """A reply could never stop."""
    shutil.copytree(tiny("gpt2"), tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        config = json.loads((tmp_path / name).read_text())
        config.pop("eos_token", None)
        if "eos_token_id" in config:
            config["eos_token_id"] = None
        (tmp_path / name).write_text(json.dumps(config))
    fails(monkeypatch, capsys, "--student", tmp_path, "--probes", PROBES, "--out", tmp_path / "run",
          saying=["no end token", "eos_token"])


def test_a_model_that_computes_nan_is_refused(monkeypatch, capsys, tiny, tmp_path):
    """nan is not above any threshold: a comparison the other way round lets it pass."""
    model, tokenizer = (kind.from_pretrained(tiny("llama"))
                        for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.model.norm.weight.data[:] = float("nan")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "broken")
    fails(monkeypatch, capsys, "--student", tmp_path / "broken", "--probes", PROBES, "--out",
          tmp_path / "run", saying=["does not reproduce LlamaForCausalLM"])


def test_the_toys_student_is_known_by_any_path(monkeypatch):
    """ei.py's last line names it by a relative one."""
    for student, files in ((os.path.relpath(exgrpo.TOY_STUDENT), exgrpo.TOY_TESTS), ("x/y", [])):
        monkeypatch.setattr(sys, "argv", ["exgrpo.py", "--student", student])
        assert exgrpo.parse_args().eval == files


def test_another_run_is_never_overwritten(monkeypatch, capsys, tiny, tmp_path):
    out = tmp_path / "run"
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--steps", 1, "--out", out]
    call(monkeypatch, *flags)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    fails(monkeypatch, capsys, *flags, saying=["--resume", "new --out"])
    fails(monkeypatch, capsys, *flags, "--resume", "--beta", 0.5, "--lora-rank", 2,
          saying=["beta", "0.01", "0.5", "lora_rank"])
    fails(monkeypatch, capsys, *flags, "--resume", "--steps", 0, saying=["1 steps are done"])
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_no_space_left(monkeypatch, capsys, tiny, tmp_path):
    """The checkpoint is written beside the old one, which stays whole when the disk is full."""
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--save-every", 1,
             "--out", tmp_path / "run"]
    call(monkeypatch, *flags, "--steps", 1)
    capsys.readouterr()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        call(patch, *flags, "--steps", 2, "--resume", expect=2)
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    call(monkeypatch, *flags, "--steps", 2, "--resume")
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["1", "2"]


def test_a_run_of_the_projects_own_student_can_be_moved(monkeypatch, tiny, tmp_path):
    """run.json named it by its absolute path, so that --resume in another checkout refused."""
    flags = [*SMALL, "--steps", 1, "--sft-epochs", 0, "--out", tmp_path / "run"]
    for checkout, resume in (("one", []), ("two", ["--resume"])):
        monkeypatch.setattr(exgrpo, "HERE", str(tmp_path / checkout))
        student = shutil.copytree(tiny("llama"), tmp_path / checkout / "student")
        call(monkeypatch, "--student", student, *flags, *resume)


@pytest.mark.parametrize("spoiled_by", [3e38, float("nan")])
def test_spoiled_weights_end_in_one_line(monkeypatch, capsys, tiny, tmp_path, spoiled_by):
    """A finite gradient and an absurd --lr: the next rollout ended in an IndexError."""
    def step(model, optimizer):
        model.get_input_embeddings().weight.data.fill_(spoiled_by)
        return 1.0
    monkeypatch.setattr(exgrpo, "optimizer_step", step)
    call(monkeypatch, "--student", tiny("gpt2"), *SMALL, "--sft-epochs", 0, "--steps", 2,
         "--out", tmp_path / "run", expect=2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "not all finite" in last and "--lr" in last
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("stage", ["run.json", "model"])
def test_no_space_left_at_the_start_or_at_the_end(monkeypatch, capsys, tiny, tmp_path, stage):
    """What was half written must not be in the way of the same command, once there is room."""
    flags = ["--student", tiny("llama"), *SMALL, "--sft-epochs", 0, "--steps", 1,
             "--out", tmp_path / "run"]

    def full(*_, **__):
        raise (OSError(28, "No space left on device") if stage == "run.json" else
               SafetensorError("Error while serializing: I/O error: No space left"))
    with monkeypatch.context() as patch:
        patch.setattr({"run.json": "os.fsync",
                       "model": "transformers.PreTrainedModel.save_pretrained"}[stage], full)
        call(patch, *flags, expect=2)
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    call(monkeypatch, *flags, *(["--resume"] if stage == "model" else []))
    assert (tmp_path / "run" / "config.json").exists()
