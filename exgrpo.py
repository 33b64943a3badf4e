"""ExGRPO, stages 2 and 3: SFT warm-up on explanatory probes, then reinforcement in dialogues.

    python exgrpo.py --student Qwen2.5-0.5B --probes probes.jsonl --out runs/qwen

It reads D_EI (what ei.py wrote) and follows "Probing to Refine: Reinforcement Distillation of LLMs
via Explanatory Inversion" (ICLR 2026, arXiv 2603.19266):

    stage 2   warm_up     SFT on every probe and question; OUT/sft, its result, is pi_ref     Eq. 3
    stage 3   reinforce   step by step: sample dialogues (rollout), pay them (pay),       Eqs. 4-6
                          update the policy (policy_loss and the auxiliary SFT loss)      Eqs. 7-8

Letters in shape comments: B sequences, T tokens, S cache slots, V vocabulary, D hidden size,
H heads, Q questions of a step, G dialogues of a group, N trained tokens, R rows of P places.

Where the paper is silent or ambiguous, we chose:
 1. A partial dialogue is forked from the full one; --partial independent is the paper's wording.
    The cut k' is uniform on 0..k-1, drawn once a question.
 2. What a group is: --advantage added, separate or pooled, see dialogue_advantages.
 3. The warm-up also trains on the original question. A question with fewer than k probes uses all.
 4. Eq. 7 is averaged over all trained tokens of the step, one divisor counted before the first
    micro-batch, so that a token's weight depends on nothing else. KL is k3, per token.
 5. A dialogue of advantage 0 (as where a group's outcomes are all equal, and no bonus was paid) is
    not forwarded: it adds nothing to the objective, and its KL term is left out too.
 6. Eq. 8 trains the teacher's reply at every probe turn of a teacher-forced dialogue, and not the
    final turn; as a mean over its tokens, where the paper has a sum.
 7. The values of delta, nu and the weight of Eq. 8, and the rule of scale_learning_rates, are ours.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import model_info, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM,
                          AutoTokenizer)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

import reward

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = os.path.dirname(os.path.abspath(__file__))
LOGITS_HELD = 2 ** 26  # floats, 256 MiB: logits are formed in chunks of at most so many
LOGITS_BLOCK = 2 ** 20  # floats, 4 MiB: what stays in a CPU's cache; a GPU takes 16 times as many
MAX_GRAD_NORM = 1.0
STOP = threading.Event()  # set by Ctrl-C and SIGTERM: what is under way is finished, then we leave


# --------------------------------------------------------- the user's files and the user's mistakes

class UserError(Exception):
    """Something that the user can mend: run() prints it in one line and exits with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, as everywhere else, and defaults in --help."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")

    def format_help(self):
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())


def at_least(low, kind=int, above=False):
    """An argparse type: a number that is >= low, or > low if `above`."""
    def number(text):
        value = kind(text)
        if not (value > low if above else value >= low) or value == float("inf"):
            relation = "above" if above else "at least"
            raise argparse.ArgumentTypeError(f"{text} is not {relation} {low}")
        return value
    return number


def run(main):
    """Runs main(). A user's mistake ends in one line and exit code 2, an interruption in 130."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        code = main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"error: memory is too small for this ({in_short(error).partition('. ')[0]}): "
              "lower --micro-batch-tokens or, if it was sampling, --group-size (exgrpo.py), or "
              "--batch-size (evaluate.py)", file=sys.stderr)
        code = 2
    except OSError as error:  # no space left, no permission, ...: the system's own words
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted. {interrupt}", file=sys.stderr)
        code = 130
    sys.exit(code)


def out_of_memory(error):
    """On a GPU it is an error of its own, elsewhere a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "not enough memory", "allocate memory"))


def read_json(path):
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); restore it, or start anew elsewhere")


def read_jsonl(path):
    """Yields (where, object) for every line; where is "file.jsonl:12", for messages to the user."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
                except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
                    raise UserError(f"{where}: not JSON ({error}); mend or delete this line")
                if not isinstance(row, dict):
                    raise UserError(f"{where}: a JSON object is expected, not {type(row).__name__}")
                yield where, row
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Is the path right?")


def check_question(row, where, keys=("id", "question", "answer"), seen=None):
    """Returns row if it is a question (with other keys, a probe); else says what it lacks, where.

    seen: a dict that remembers where each id stood, so that a second one is refused.
    """
    for key in (*keys, "answer_type", "rationale"):
        if not isinstance(row.get(key), str):
            raise UserError(f'{where}: "{key}" is missing or is not a string')
    for key in keys:
        if not row[key].strip():
            raise UserError(f'{where}: "{key}" is empty')
    if row["answer_type"] not in reward.INSTRUCTION:
        raise UserError(f'{where}: unknown answer_type "{row["answer_type"]}"; '
                        f"it is one of {', '.join(reward.INSTRUCTION)}")
    if "id" in keys and not can_be_right(row):
        raise UserError(f"{where}: the answer {row['answer']!r} cannot be read as a "
                        f'"{row["answer_type"]}", so that no reply could be right; mend it')
    if seen is not None and seen.setdefault(row["id"], where) != where:
        raise UserError(f'{where}: the id "{row["id"]}" stands at {seen[row["id"]]} already')
    return row


def can_be_right(row):
    """Is a reply that states the question's own answer graded as right?"""
    return reward.is_correct(f"The answer is {row['answer']}.", row["answer"], row["answer_type"])


def read_probes(path):
    """A D_EI file -> (header, rows). See README.md for its format; every line is checked."""
    lines, seen = read_jsonl(path), {}
    where, first = next(lines, (path, {}))
    if not isinstance(first.get("ei"), dict):
        raise UserError(f'{where}: no D_EI file: its first line is no {{"ei": ...}} header. '
                        "python ei.py writes such files")
    rows = []
    for where, row in lines:
        check_question(row, where, seen=seen)
        if not isinstance(row.get("kept"), bool) or not isinstance(row.get("probes"), list):
            raise UserError(f'{where}: "kept" (true or false) or "probes" (a list) is missing')
        for probe in row["probes"]:
            if not isinstance(probe, dict) or not isinstance(probe.get("consistent"), bool):
                raise UserError(f'{where}: a probe is no object with "consistent" true or false')
            check_question(probe, where, keys=("rule", "probe", "answer"))
        rows.append(row)
    return first["ei"], rows


def is_probes_file(path):
    """Does it begin with the header of a D_EI file?"""
    return "ei" in next(read_jsonl(path), ("", {}))[1]


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears under its name complete, or not at all."""
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # a full disk, say: what was written is in the way
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise


def write_json(path, value):
    with atomic(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def lock(file, busy):
    """Locks an open file until it is closed; if another process holds it, an error says `busy`."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy)
    except OSError:
        pass  # a file system without locks


# -------------------------------------------------------------------------------------------- model

def pick_device(name):
    """"auto" is the first of cuda, mps and cpu that this machine has."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
              "cpu": True}
    name = next(key for key in usable if usable[key]) if name == "auto" else name
    if not usable[name]:
        raise UserError(f"--device {name}: torch finds none on this machine; try --device auto")
    return torch.device(name)


HUB_OWNERS = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "gemma": "google", "llama": "meta-llama",
              "mistral": "mistralai", "phi": "microsoft"}


def resolve_model(name):
    """"Qwen2.5-0.5B" -> "Qwen/Qwen2.5-0.5B"; local folders and full Hub ids as they are."""
    if os.path.isdir(name) or "/" in name:
        return name
    owner = next((o for prefix, o in HUB_OWNERS.items() if name.lower().startswith(prefix)), None)
    return f"{owner}/{name}" if owner else name


def in_short(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def find_model(name):
    """The local folder or Hub id of a model; an error if there is none."""
    path = resolve_model(name)
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise UserError(f"the folder {path} holds no model (no config.json)")
        return path
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"there is no folder {path}: name a model by its folder or its Hub id")
    try:
        if not try_to_load_from_cache(path, "config.json"):
            model_info(path, timeout=10)  # fails at once, where from_pretrained retries for minutes
    except Exception as error:  # of many kinds: httpx errors, ValueError, ...
        raise UserError(f"the model {path} is no local folder and could not be fetched from the "
                        "Hugging Face Hub: is the name right, and is there a network? "
                        f"({in_short(error)}) Without a network, give the path of a local folder")
    return path


def load_model(name, device):
    """A Hub id or local folder -> (model in fp32, without dropout, in eval mode; its Chat)."""
    path = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # of many kinds: OSError, ValueError, ImportError, ...
        raise UserError(f"the model {path} is there, but cannot be loaded ({in_short(error)})")
    for parameter in model.parameters():  # out of the memory-mapped file: aligned, so reproducible
        parameter.data = parameter.data.clone()
    disable_dropout(model)
    model = model.to(device).eval()
    try:
        chat = Chat(tokenizer, model)
    except UserError:
        raise
    except Exception as error:  # jinja's, and what a template raises of itself
        raise UserError(f"the chat template of {path} fails ({in_short(error)}): mend it there, in "
                        "chat_template.jinja or tokenizer_config.json")
    check_model(model)
    return model, chat


def disable_dropout(model):
    """p = 0 everywhere: under dropout, pi_theta would not be the policy that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def check_model(model):
    """Our cache, trees and loss head must give the model's own logits; else it is refused. Takes
    our attention, attend, in place of sdpa, unless it is the reason why they do not."""
    ids = (torch.arange(2, 14) % model.get_input_embeddings().num_embeddings).tolist()
    own = model(torch.tensor([ids], device=model.device)).logits[0, -2:].float()    # (2, V)
    check_finite(own)
    attention = model.config._attn_implementation
    for name in ["grouped"] * (attention == "sdpa") + [attention]:
        model.set_attn_implementation(name)
        fault = sampler_fault(model, ids, own)
        if not fault:
            return
    raise UserError(f"the sampler does not reproduce {type(model).__name__} ({fault}); use a "
                    "Llama-like or GPT-2-like model")


def sampler_fault(model, ids, own):
    """What is wrong with our logits behind the last two of these ids; own: the model's, (2, V). ""
    if nothing is. Two groups of two rows read their prompts, then more, and then two times a token
    each, at last with many slots to spare: a model must not take the last for its position."""
    try:
        cache = KVCache(2, model)
        with packed(model):
            extend(model, cache, [ids[:8], ids[:5]])
            cache.repeat(2)
            extend(model, cache, [ids[8:10]] * 2 + [ids[5:10]] * 2)
            first = extend(model, cache, [ids[10:11]] * 4)
            cache.block = 512
            ours = torch.stack([first, extend(model, cache, [ids[11:]] * 4)], 1)    # (4, 2, V)
        gaps = torch.cat([(ours - own).flatten(), *tree_gaps(model, [ids, ids[:6] + ids[8:]])])
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError,
            ValueError) as error:
        if out_of_memory(error):
            raise
        return in_short(error)
    worst = gaps.abs().max().item()
    return "" if worst <= 1e-2 else f"its logits differ by {worst:.2g}"  # nan is never <=


def tree_gaps(model, rows):
    """What the rows' log-probs lose in a tree, where a token's place is not its position: there, an
    attention that looks at places (ALiBi) fails."""
    dialogues = [Dialogue(ids, [0] + [1] * (len(ids) - 1)) for ids in rows]
    padded = token_logprobs(model, *pad_rows(rows, [d.mask for d in dialogues], model.device))
    trees = grow_trees(rows, 99, sys.maxsize)
    for by_runs in {False, sees_runs(model, len(rows[0]))}:
        batch, forest = plant(trees, dialogues, model.device, by_runs)
        yield (tree_logprobs(model, forest) - padded[batch]).flatten()


def check_finite(logits):
    if not logits.isfinite().all():
        raise UserError("the model's logits are not all finite numbers: its weights are spoiled, "
                        "as by too large an --lr or --sft-lr; start again from others")


def has_bf16(device):
    """Are products in bf16 worth while? A CPU with AVX2 at best has none, and torch's own loops for
    them take four to eight times as long as products in fp32."""
    return device.type != "cpu" or (torch.backends.mkldnn.is_available()
                                    and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def context_size(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def head(model, hidden):
    """Hidden states (N, D) -> logits (N, V) in fp32."""
    return in_fp32(model, model.get_output_embeddings()(hidden))


def in_fp32(model, logits):
    """The output layer's product -> logits in fp32, capped where the model caps them."""
    logits = logits.float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def freeze(model, bf16):
    """No weight is trained. Under autocast to bf16, its linear layers are held in bf16: the results
    are the same bit for bit, and autocast, which keeps its copies of trained weights only, would
    make those of frozen ones again at every token."""
    model.requires_grad_(False)
    for module in model.base_model.modules():
        if bf16 and isinstance(module, (nn.Linear, Conv1D)):
            module.weight.data = module.weight.data.bfloat16()
    return model


class LoRA(nn.Module):
    """A frozen linear layer and a trainable low-rank one: y = W x + alpha / rank * B A x.

    With bf16, W is rounded as in freeze(). What that took from it, small but all that the warm-up
    may have taught it, waits in main memory and is put back when the layers are merged."""

    def __init__(self, base, rank, alpha, bf16=False):
        super().__init__()
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.T  # Conv1D: transposed
        self.base, self.scale, self.enabled = base, alpha / rank, True
        start = nn.init.kaiming_uniform_(torch.empty(rank, weight.shape[1]), a=5 ** 0.5)
        self.A = nn.Parameter(start.to(weight.device))  # the same on every device
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.rounded_off = None
        if bf16:
            exact = base.weight.data
            base.weight.data = exact.bfloat16()
            self.rounded_off = (exact - base.weight.data).to("cpu", torch.bfloat16)

    def forward(self, x):
        y = self.base(x)
        return y + self.scale * F.linear(F.linear(x, self.A), self.B) if self.enabled else y

    def merged(self):
        weight, delta = self.base.weight.data.float(), self.scale * self.B @ self.A
        if self.rounded_off is not None:
            weight += self.rounded_off.to(weight.device)
        self.base.weight.data = weight + (
            delta if isinstance(self.base, nn.Linear) else delta.T)
        return self.base


def add_lora(model, rank, alpha, bf16=False):
    """Freezes the model and wraps every linear layer below the loss head."""
    model.requires_grad_(False)
    for module in list(model.base_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, Conv1D) and not isinstance(module, LoRA):
                setattr(module, name, LoRA(child, rank, alpha, bf16))


@torch.no_grad()
def merge_lora(model):
    """Adds every B A to its W and puts the plain layer back."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRA):
                setattr(module, name, child.merged())


@contextlib.contextmanager
def adapters_off(model):
    """Under LoRA, pi_ref is the policy with its adapters off: no second copy in memory."""
    layers = [module for module in model.modules() if isinstance(module, LoRA)]
    for layer in layers:
        layer.enabled = False
    yield model
    for layer in layers:
        layer.enabled = True


# --------------------------------------------------------------------------- dialogues as token ids

def ask(question, answer_type):
    """The user's turn: the question and the sentence that says how to answer."""
    return f"{question}\n{reward.INSTRUCTION[answer_type]}"


def as_asked(row):
    """The user's turn of a question, or of a probe."""
    return ask(row.get("probe") or row["question"], row["answer_type"])


def teacher_reply(row):
    """The teacher's full response: its reasoning, then the answer in the form that is graded."""
    return f"{row['rationale'].strip()} The answer is {row['answer'].strip()}.".strip()


class Chat:
    """Turns <-> token ids. A dialogue only ever grows: nothing that was sampled is encoded again.

    first(user) opens a dialogue, later(user) continues it behind the end token of a reply, both up
    to where the next reply begins. A model without chat template gets "Question: ... Answer:".
    """

    def __init__(self, tokenizer, model):
        self.tokenizer, self.n_known = tokenizer, model.get_input_embeddings().num_embeddings
        ends = model.generation_config.eos_token_id  # one id, a list or None
        ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
        self.plain = tokenizer.chat_template is None
        self.end_id = tokenizer.eos_token_id if self.plain else self._end_of_turn(ends - {None})
        if self.end_id is None:
            raise UserError(f"no end token (eos_token) closes a reply of {model.name_or_path}, so "
                            "it could not stop: see its tokenizer_config.json and chat template")
        self.stop_ids = sorted(ends - {None} | {self.end_id})
        added = tokenizer.added_tokens_decoder.items()
        self.special = {str(token) for i, token in added if token.special or i in self.stop_ids}

    def _known(self, ids):
        if max(ids, default=0) >= self.n_known:
            raise UserError(f"the tokenizer makes {self.tokenizer.decode(max(ids))!r} a token, for "
                            "which the model has no embedding: resize it (resize_token_embeddings)")
        return ids

    def _render(self, *turns, reply_next):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return self._known(list(self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=reply_next, tokenize=True, return_dict=False)))

    def _around_reply(self, *user):
        """What the template puts in front of a reply and behind it, by two that differ: ids. It
        may leave replies out (as those that want lists): then, nothing is behind."""
        one, other = (self._render("x", y, *user, reply_next=bool(user)) for y in ("1", "2"))
        n_front, n_back = (len(os.path.commonprefix(pair)) for pair in (
            [one, other], [one[::-1], other[::-1]]))
        return one[:n_front], one[len(one) - n_back:] if one != other else []

    def _end_of_turn(self, ends):
        """The special token that the template puts behind a reply: not eos in a Qwen base model,
        and not what, as in Phi-3, only ends the whole."""
        special = ends | set(self.tokenizer.all_special_ids)
        (_, last), (_, inner) = self._around_reply(), self._around_reply("x")
        shared = os.path.commonprefix([last, inner])
        return next((i for i in shared[::-1] + last[::-1] if i in special), None)

    def _clean(self, text):
        """Special tokens inside a question or a teacher's text would open or close turns. Taking
        one out may join the halves of another, so we look until none is left."""
        while found := [token for token in self.special if token in text]:
            for token in found:
                text = text.replace(token, "")
        return text

    def encode(self, text):
        return self._known(self.tokenizer(text, add_special_tokens=False).input_ids)

    def first(self, user):
        user = self._clean(user)
        if not self.plain:
            return self._render(user, reply_next=True)
        bos = self.tokenizer.bos_token_id
        opens = self.tokenizer("x").input_ids[0] == bos is not None
        return [bos] * opens + self.encode(f"Question: {user}\nAnswer:")

    def later(self, user):
        """What follows the end token of a reply, where what is in front of it is as first() gives
        it (but for openers as <think>, which no finished reply has), or as in a last turn."""
        user = self._clean(user)
        if self.plain:
            return self.encode(f"\n\nQuestion: {user}\nAnswer:")
        (front, behind), opened = self._around_reply(user), self._render("x", reply_next=True)
        n = min(len(front), len(opened))
        if self.end_id not in behind or (
                front[:n] != opened[:n] and front != self._around_reply()[0]):
            raise UserError("the chat template rewrites earlier turns, so a dialogue cannot grow "
                            "token by token; give the tokenizer a template that only appends")
        return behind[behind.index(self.end_id) + 1:]

    def reply(self, text):
        """A teacher's reply as ids, with the end token."""
        return self.encode(self._clean(f" {text}" if self.plain else text)) + [self.end_id]

    def prompt(self, turns):
        """[user, reply, user, ...] of odd length -> ids up to where the next reply begins."""
        ids = self.first(turns[0])
        for reply, user in zip(turns[1::2], turns[2::2]):
            ids += self.reply(reply) + self.later(user)
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@dataclass
class Dialogue:
    """Token ids and a parallel mask (1 = a reply's token, which is trained), turn by turn."""
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)
    logps: list = field(default_factory=list)      # of the tokens with mask 1, from the sampler
    replies: list = field(default_factory=list)    # ids of each reply
    ends: list = field(default_factory=list)       # len(ids) behind each reply and its end token
    truncated: list = field(default_factory=list)  # whether each reply hit the token limit

    def add_user(self, ids):
        self.ids += ids
        self.mask += [0] * len(ids)

    def add_reply(self, ids, chat, logps=()):
        """A truncated reply is closed by an end token that the student did not choose: mask 0."""
        cut = ids[-1] not in chat.stop_ids
        self.ids += ids + [chat.end_id] * cut
        self.mask += [1] * len(ids) + [0] * cut
        self.logps += logps
        self.replies.append(ids)
        self.ends.append(len(self.ids))
        self.truncated.append(cut)

    def fork(self, n_turns):
        """A copy of the first n_turns turns."""
        end = self.ends[n_turns - 1] if n_turns else 0
        mask = self.mask[:end]
        return Dialogue(self.ids[:end], mask, self.logps[:sum(mask)], self.replies[:n_turns],
                        self.ends[:n_turns], self.truncated[:n_turns])


# ------------------------------------------------------------------------- the hand-written sampler

class KVCache:
    """Keys and values of B growing dialogues. Slot = position: token t of a row lies in its slot t.

    So a row needs no padding inside, and what it may see is `slot <= position`. For attend_grouped,
    the first C slots of a group's rows, which hold the same, are kept once for all of them; the
    rows' own stores begin behind these, and are fp32. No store has much room to spare: a CPU reads
    what lies without gaps up to twice as fast.
    """

    def __init__(self, n_rows, model):
        self.lengths = [0] * n_rows  # tokens of each row whose keys and values are valid
        self.layers = []             # [keys, values] of each layer, (B, H, S, D), from slot C on
        self.parts = {}              # the same of the active rows only, where some have finished
        self.active = torch.arange(n_rows, device=model.device)  # rows of the pass under way, (b,)
        self.positions = self.n_slots = None  # where in the stores its tokens go, slots in use
        self.places = {}             # the same, counted through a whole store, see _write
        self.block = 16 if model.device.type == "cpu" else 128  # slots are added so many at a time
        self.grouped = model.device.type == "cpu" and (  # whether attend_grouped is used
            model.config.get_text_config()._attn_implementation == "grouped")
        self.prompts, self.C = [], 0  # of each layer, what groups have in common, (Q, H, C, D)
        self.groups = None           # the group of each row, (B,)
        self.members = 0             # M, the most active rows of a group
        self.table = None            # which active row is member n of group q, at q * M + n
        self.cells = None            # the inverse: q * M + n of each active row, (b,); or all

    def get_seq_length(self, layer_idx=0):
        return max(self.lengths)

    def round_up(self, n_slots):
        return -(-n_slots // self.block) * self.block

    def activate(self, rows):
        self.active, self.parts = rows, {}
        if self.prompts:
            q, here = self.groups[rows], torch.arange(len(rows))
            n = (q == q[:, None]).tril(-1).sum(1)  # earlier active rows of the same group
            self.members = 1 + n.max().item()
            self.cells = q * self.members + n
            self.table = rows.new_zeros(len(self.prompts[0][0]) * self.members)
            self.table[self.cells] = here  # row 0 fills the rest, unused
            if torch.equal(self.table, here):  # whole groups, one behind the other: as they are
                self.cells = self.table = slice(None)

    def by_group(self, x):
        """(b, H, n, D) of the active rows -> (Q, H, M * n, D), a group's members side by side."""
        return x[self.table].unflatten(0, (-1, self.members)).transpose(1, 2).flatten(2, 3)

    def by_row(self, x):
        """The way back."""
        return x.unflatten(2, (self.members, -1)).transpose(1, 2).flatten(0, 1)[self.cells]

    def start(self, positions, n_slots):
        """A pass begins that reads the tokens at these positions (b, T) of the active rows."""
        self.positions, self.n_slots, self.places = positions - self.C, n_slots - self.C, {}

    def update(self, keys, values, layer_idx, *_, **__):
        """Called by the model's layers with new (b, H, T, D): stores them, returns (b, H, S, D),
        with one token a row without the slots that groups share."""
        new = [x.to(torch.float32 if self.grouped else values.dtype) for x in (keys, values)]
        if layer_idx == len(self.layers):
            self.layers.append([x.new_empty(len(self.lengths), x.shape[1], 0, x.shape[3])
                                for x in new])
        stores = self.layers[layer_idx] = self._write(self.layers[layer_idx], new)
        if len(self.active) < len(self.lengths):  # copied when rows leave, not at every token
            parts = self.parts.get(layer_idx)
            stores = self.parts[layer_idx] = [
                store[self.active] for store in stores] if parts is None else self._write(
                parts, new)
        stores = [store[:, :, :self.n_slots] for store in stores]
        more = self.C and keys.shape[2] > 1
        return self._join(layer_idx, stores, self.active) if more else stores

    def _join(self, layer_idx, stores, rows):
        """A layer's stores of these rows, with what these share in front."""
        return [torch.cat([prompts[self.groups[rows]], store], dim=2)
                for prompts, store in zip(self.prompts[layer_idx], stores)]

    def _write(self, stores, new):
        """Puts new keys and values (b, H, T, D) into two stores (B, H, S, D), or b rows of them, or
        their larger successors, which are returned."""
        stores = [store.to(x.dtype) for store, x in zip(stores, new)]  # once, behind unshare
        B, H, S = stores[0].shape[:3]
        if S < self.n_slots:
            stores = [F.pad(store, (0, 0, 0, self.n_slots - S)) for store in stores]
            S = self.n_slots
        if (B, H, S) not in self.places:  # for the first layer of a pass; others are like it
            rows, device = self.active, self.active.device
            rows = rows if B == len(self.lengths) else torch.arange(B, device=device)
            heads = rows[:, None, None] * H + torch.arange(H, device=device)[:, None]
            self.places[B, H, S] = (heads * S + self.positions[:, None]).flatten()  # of (b, H, T)
        for store, x in zip(stores, new):
            store.flatten(0, 2).index_copy_(0, self.places[B, H, S], x.flatten(0, 2))
        return stores

    def repeat(self, group_size):
        """Each row becomes group_size equal rows: the prompt of a group is read once, and what all
        rows have filled of it is shared."""
        if self.grouped:
            self.C = min(self.lengths)
            self.prompts = [[store[:, :, :self.C].contiguous() for store in layer]
                            for layer in self.layers]
            self.groups = torch.arange(len(self.lengths)).repeat_interleave(group_size)
        self.lengths = [n for n in self.lengths for _ in range(group_size)]
        self.layers = [[store[:, :, self.C:].repeat_interleave(group_size, dim=0)
                        for store in layer] for layer in self.layers]
        self.activate(torch.arange(len(self.lengths), device=self.active.device))

    def unshare(self):
        """Every row gets a copy of what it shares: attend_grouped is no longer used."""
        self.parts = {}
        for i, layer in enumerate(self.layers):
            layer[:] = self._join(i, layer, slice(None))
        self.prompts, self.C, self.grouped = [], 0, False

    def fork(self, rows):
        """Appends copies of these rows: dialogues that go on in a second way."""
        self.lengths += [self.lengths[row] for row in rows]
        rows = torch.tensor(rows, device=self.active.device)
        for layer in self.layers:
            layer[:] = [torch.cat([store, store[rows]]) for store in layer]
        if self.prompts:
            self.groups = torch.cat([self.groups, self.groups[rows]])

    def keep(self, n_rows):
        """Forgets all rows but the first n_rows, which stand group by group."""
        if n_rows == len(self.lengths):
            return
        self.lengths = self.lengths[:n_rows]
        for layer in self.layers:
            layer[:] = [store[:n_rows].clone() for store in layer]
        if self.prompts:
            self.groups = self.groups[:n_rows]
            self.prompts = [[x[:1 + self.groups[-1]] for x in layer] for layer in self.prompts]


def visible(config, seen, behind):
    """The attention mask as the model wants it, (B, 1, T, S), or a dict of two for mixed attention:
    0 where a query may look, -inf elsewhere, ready to be added in every layer.

    seen (B, T, S) is True where a query may look; behind (B, T, S) is how far behind the query each
    key stands, for layers with a sliding window."""
    def added(seen):
        kind = seen.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, float("-inf"))[:, None]
    window = sliding_window(config)
    if window is None:
        return added(seen)
    sliding = added(seen & (behind < window))
    mixed = getattr(config, "layer_types", None)
    return {"full_attention": added(seen), "sliding_attention": sliding} if mixed else sliding


def sliding_window(config):
    """How far some layers look back; None if all of them see everything."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


def attend(module, query, key, value, attention_mask, grouped=None, runs=None, **kwargs):
    """transformers' sdpa, (b, H, T, D) -> (b, T, H, D), without some copies and work on a CPU.
    Called by the model's layers: with a KVCache whose rows share slots (grouped), or with the runs
    of trees. With many queries a row, each of the h key heads serves its H / h query heads as it
    is: sdpa copies it for each.
    """
    scale = kwargs.get("scaling")
    if runs is not None:
        return attend_runs(query, key, value, runs, scale), None
    if grouped is not None:
        shared = grouped.prompts[module.layer_idx]
        return attend_grouped(query, key, value, attention_mask, grouped, shared, scale), None
    if key.device.type == "cpu" and query.shape[2] > 1 and attention_mask is not None:
        output = F.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scale, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@torch.autocast("cpu", enabled=False)
def attend_grouped(query, key, value, mask, cache, shared, scale):
    """Attention of one query a row, (b, H, 1, D) -> (b, 1, H, D). The C slots that a group's rows
    share (keys and values (Q, h, C, D)) are read once for all of them, and only the rest,
    (b, h, S, D), row by row; one softmax runs over both. In fp32 under autocast, too: a CPU's
    products of so few rows are no faster in bf16."""
    (b, H, _, D), (_, h, C, _), (keys, values) = query.shape, shared[0].shape, shared
    query = (query.float() * (scale or D ** -0.5)).reshape(b, h, H // h, D)
    common = cache.by_row(cache.by_group(query) @ keys.transpose(2, 3))          # (b, h, H / h, C)
    own = query @ key.transpose(2, 3) + mask                                     # (b, h, H / h, S)
    weights = torch.cat([common, own], dim=-1).softmax(-1)
    common = cache.by_row(cache.by_group(weights[..., :C]) @ values)             # (b, h, H / h, D)
    return (common + weights[..., C:] @ value).reshape(b, 1, H, -1)


@torch.autocast("cpu", enabled=False)
def attend_runs(query, key, value, runs, scale):
    """Attention over trees, (R, H, P, D) -> (R, P, H, D), run by run: its queries look at the runs
    before it in its dialogues, and at itself up to each query. What grows with the square of a
    dialogue's length need not grow with that of a tree's. In fp32 under autocast, too: a CPU goes
    back through products so small in two thirds of the time that it takes in bf16."""
    (R, H, P, D), h, outputs = query.shape, key.shape[1], []
    for tree, *tensors in zip(runs.trees, *(x.float().unbind() for x in (query, key, value))):
        sizes = [n for n, _ in tree]
        queries, keys, values = (x.split(sizes, dim=1) for x in tensors)             # (H, n, D)
        for i, (n, before) in enumerate(tree):
            k, v = (torch.cat([x[j] for j in (*before, i)], dim=1) for x in (keys, values))
            mask = runs.mask(n, k.shape[1], H // h)
            output = F.scaled_dot_product_attention(  # each key head has H / h * n queries
                queries[i].reshape(1, h, -1, D), k[None], v[None], mask, scale=scale)
            outputs.append(output.view(H, n, D).transpose(0, 1))
    return torch.cat(outputs).view(R, P, H, D)


AttentionInterface.register("grouped", attend)
AttentionMaskInterface.register("grouped", sdpa_mask)


@functools.lru_cache(maxsize=8)
def cache_argument(kind):
    """What a model class calls its cache: transformers 5.24 has renamed it."""
    names = inspect.signature(kind.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def forward_cached(model, cache, ids, positions, n_slots):
    """ids and positions (b, T) of the active rows -> hidden states (b, T, D); the cache grows."""
    config = model.config.get_text_config()
    if cache.C and n_slots > (sliding_window(config) or n_slots):
        cache.unshare()  # a window hides a part of the prompt from some
    cache.start(positions, n_slots)
    cached, first = {cache_argument(type(model.base_model)): cache, "use_cache": True}, 0
    if cache.C and ids.shape[1] == 1:
        cached["grouped"], first = cache, cache.C  # on its way to attend; all see what they share
    slots = torch.arange(first, n_slots, device=positions.device)
    behind = positions[..., None] - slots                                           # (b, T, S)
    return model.base_model(input_ids=ids, position_ids=positions, attention_mask=visible(
        config, behind >= 0, behind), **cached).last_hidden_state


def extend(model, cache, chunks):
    """Reads the next ids of each active row (b lists, none empty) -> logits behind them, (b, V)."""
    rows, counts = cache.active.tolist(), [len(chunk) for chunk in chunks]
    ids, _ = pad_rows(chunks, chunks, model.device)                                 # (b, T)
    start = torch.tensor([cache.lengths[row] for row in rows], device=model.device)[:, None]
    positions = start + torch.arange(ids.shape[1], device=model.device)
    # Padding must not run out of a table of learned positions.
    positions = positions.clamp(max=context_size(model) - 1)
    n_slots = cache.round_up(max(cache.lengths[row] for row in rows) + ids.shape[1])
    hidden = forward_cached(model, cache, ids, positions, n_slots)
    for row, count in zip(rows, counts):
        cache.lengths[row] += count
    last = torch.tensor(counts, device=model.device) - 1
    return head(model, hidden[torch.arange(len(chunks), device=model.device), last])


def read_token(model, cache, token, position, n_slots):
    """Reads one token (b,) at its position (b,) in each active row -> logits behind it, (b, V)."""
    hidden = forward_cached(model, cache, token[:, None], position[:, None], n_slots)
    return head(model, hidden[:, -1])


class Recorded:
    """read_token on a GPU: recorded as a CUDA graph and replayed, so that a token costs one launch
    in place of the thousand at whose speed Python would go.

    A graph reads and writes where it did when it was recorded. So the first token of a new shape
    (rows left, or more slots in use) is read without one: what is grown or copied, is so then. A
    model that asks the GPU for a value on its way cannot be recorded, and is not.
    """

    def __init__(self):
        self.shape = self.graph = self.inputs = self.logits = None
        self.possible = True

    def __call__(self, model, cache, token, position, n_slots):
        if not self.possible or self.shape != (len(token), n_slots):
            self.shape, self.graph = (len(token), n_slots), None
            return read_token(model, cache, token, position, n_slots)
        if self.graph is None:
            self.inputs, self.graph = (token.clone(), position.clone()), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.logits = read_token(model, cache, *self.inputs, n_slots)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                self.possible = False
                return self(model, cache, token, position, n_slots)
        for kept, new in zip(self.inputs, (token, position)):
            kept.copy_(new)
        self.graph.replay()
        return self.logits


def draw(logits, temperature, u):
    """One token a row from softmax(logits / temperature) over the whole vocabulary, by inverse CDF.

    logits (B, V); u (B,) uniform on [0, 1); temperature 0 is greedy. Returns tokens (B,) and their
    log-probs (B,). First a block of 128 tokens is found, then the token in it, so that the long sum
    is short; it runs in u's double precision: in fp32, 262k terms would lose the tail. (A block's
    own sum in fp32 is as exact as softmax is, and spares a copy of probs in double.)
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(u)
    probs = (logits if temperature == 1 else logits / temperature).softmax(-1)      # (B, V)
    tail = -probs.shape[1] % 128
    blocks = (F.pad(probs, (0, tail)) if tail else probs).unflatten(1, (-1, 128))   # (B, n, 128)
    sums = blocks.sum(-1).to(u.dtype)                                               # (B, n)
    block, left = _invert(sums, u * sums.sum(-1))
    rows = torch.arange(len(u), device=u.device)
    inside, _ = _invert(blocks[rows, block].to(u.dtype), left)
    tokens = block * 128 + inside
    return tokens, probs[rows, tokens].log()


def _invert(weights, mass):
    """Where the running sum of weights (B, n) passes mass (B,): index, mass left there; (B,) each.
    Kept below the whole sum, mass never ends at a weight of 0."""
    cdf = weights.cumsum(-1)
    mass = torch.minimum(mass, torch.nextafter(cdf[:, -1], torch.zeros_like(mass)))[:, None]
    index = torch.searchsorted(cdf, mass, right=True)
    left = (mass - cdf.gather(1, index) + weights.gather(1, index)).clamp(min=0)  # as if exact
    return index.squeeze(1), left.squeeze(1)


PACKED_FROM = 100_000  # weights of a layer; below, a call of the packed product costs what it saves


@contextlib.contextmanager
def packed(model):
    """While the weights stand still, on a CPU: large linear layers in the layout that oneDNN reads
    fastest, so that it is not made anew for each token: 32 rows then take a quarter less time, or
    a third. Siblings, which read the same tensor, are one product: 8 rows take a tenth less. Inside
    autocast the packed weights have its type, in place of the copies it would keep.

    The two operations are torch's own compiler's. Where they are missing, as on a GPU, nothing
    changes; and check_model() has compared the logits, packed, with the model's own.
    """
    layers, families, ops = [], [], torch.ops.mkldnn
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(
            ops, "_linear_pointwise") and (cast is None or has_bf16(model.device)):
        families = siblings(model)
    for family in families:
        family = [layer for layer in family
                  if layer.weight.numel() >= PACKED_FROM and "forward" not in vars(layer)]
        product = PackedProduct(family, cast) if family else None
        for i, layer in enumerate(family):
            layer.forward = functools.partial(product, i)
        layers += family
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


class PackedProduct:
    """Linear layers that read the same x as a single product: the first that is called computes it,
    and each takes its own part."""

    def __init__(self, layers, cast):
        self.dtype, self.sizes = cast or layers[0].weight.dtype, [len(x.weight) for x in layers]
        weight = torch.cat([layer.weight.detach().to(self.dtype) for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        self.bias = None
        if any(layer.bias is not None for layer in layers):
            self.bias = torch.cat([
                weight.new_zeros(n) if layer.bias is None else layer.bias.detach().to(self.dtype)
                for layer, n in zip(layers, self.sizes)])
        self.x, self.parts = None, {}

    def __call__(self, i, x):
        if x is not self.x or i not in self.parts:
            y = torch.ops.mkldnn._linear_pointwise(
                x.to(self.dtype), self.weight, self.bias, "none", [], "")
            self.x, self.parts = x, dict(enumerate(y.split(self.sizes, dim=-1)))
        part = self.parts.pop(i)
        if not self.parts:  # nothing is held longer than it is needed
            self.x = None
        return part


@torch.no_grad()
def siblings(model):
    """The linear layers in lists: those of a list read the same tensor, as queries, keys and values
    do. Found by reading a token, and kept with the model."""
    if not hasattr(model, "siblings"):
        read, families = {}, {}  # what each layer reads is held, so that no two share an id

        def note(layer, inputs):
            read[layer] = inputs[0]
        hooks = [layer.register_forward_pre_hook(note) for layer in model.modules()
                 if type(layer) is nn.Linear]
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"), cache_enabled=False):
            model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer, x in read.items():
            families.setdefault(id(x), []).append(layer)
        model.siblings = list(families.values())
    return model.siblings


class Sampled(NamedTuple):
    replies: list  # B lists of ids, each up to and with its stop token
    logps: list    # B lists of floats
    cache: KVCache


def without_grad(sampler):
    """torch.no_grad, and on a CPU inference mode, which makes each of a token's thousand operations
    cheaper. (A GPU's generator that a graph met first in that mode could be used in no other.)"""
    @functools.wraps(sampler)
    def sampling(model, *args, **kwargs):
        with torch.inference_mode() if model.device.type == "cpu" else torch.no_grad():
            return sampler(model, *args, **kwargs)
    return sampling


@without_grad
def sample(model, prompts, *, max_new_tokens, temperature, stop_ids, group_size=1, generator=None,
           cache=None, rows=None):
    """Samples group_size replies to each prompt (lists of ids) from softmax(logits / temperature).

    Without a cache each prompt is read once for its group: B = Q * G rows, group by group. With the
    cache of an earlier call, prompts are the whole dialogues of its `rows` (default: all), of which
    only what the cache does not hold is read. Prompts may contain stop_ids: a reply ends with the
    first one that was sampled.
    """
    device, cpu = model.device, model.device.type == "cpu"
    if cache is None:
        cache = KVCache(len(prompts), model)
        logits = extend(model, cache, prompts).repeat_interleave(group_size, dim=0)  # (B, V)
        cache.repeat(group_size)
        prompts = [prompt for prompt in prompts for _ in range(group_size)]
        rows = range(len(prompts))
    else:
        rows = range(len(cache.lengths)) if rows is None else rows  # in increasing order
        cache.activate(torch.tensor(list(rows), device=device))
        logits = extend(model, cache, [ids[cache.lengths[row]:] for row, ids in zip(rows, prompts)])
    check_finite(logits)
    B, where = len(prompts), cache.active                    # where: each reply's row in the cache
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest, stop = max(map(len, prompts)), torch.tensor(stop_ids, device=device)

    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(B, max_new_tokens, device=device)
    live = torch.arange(B, device=device)                    # the replies still in the batch
    going = torch.ones(B, dtype=torch.bool, device=device)   # which of those have not stopped, (b,)
    precise = torch.float32 if device.type == "mps" else torch.float64
    read = Recorded() if device.type == "cuda" else read_token
    for t in range(max_new_tokens):
        # A number for every row, finished or not: no row's luck depends on another's length.
        u = torch.rand(B, generator=generator, device=device, dtype=precise)
        token, logp = draw(logits, temperature, u[live])     # (b,), (b,)
        tokens[live, t], logps[live, t] = token, logp.to(logps.dtype)
        going &= ~torch.isin(token, stop)
        if t + 1 == max_new_tokens:
            break
        if cpu or t % 8 == 7:  # to ask a GPU is to wait: only now and then
            left = going.nonzero().squeeze(1)
            if len(left) == 0:
                break
            # Finished rows leave the batch: a GPU, to which they cost little, by halves.
            if len(left) * (1 if cpu else 2) < len(live):
                live, token, going = live[left], token[left], going[left]
                cache.activate(where[live])
        n_slots = cache.round_up(longest + t + 1)            # shapes that stay the same
        logits = read(model, cache, token, lengths[live] + t, n_slots)               # (b, V)

    ends = torch.isin(tokens, stop).long()
    counts = (ends.cumsum(1) == ends).sum(1).tolist()  # tokens up to and with the first that ends
    tokens, logps = tokens.tolist(), logps.tolist()
    for i, row in enumerate(rows):  # the last token of a reply was sampled but never read
        cache.lengths[row] = len(prompts[i]) + counts[i] - 1
    return Sampled([ids[:n] for ids, n in zip(tokens, counts)],
                   [values[:n] for values, n in zip(logps, counts)], cache)


@torch.no_grad()
def generate(model, chat, prompts, *, max_new_tokens, token_budget=16384):
    """Greedy replies to prompts (lists of ids) -> [(text, truncated, tokens)], in their order.

    Prompts of similar length share a batch of at most token_budget tokens, replies included. What
    all prompts of a batch begin with is read once.
    """
    outputs = [None] * len(prompts)
    with packed(model):
        for batch in micro_batches([len(p) + max_new_tokens for p in prompts], token_budget):
            rows, cache = [prompts[i] for i in batch], KVCache(1, model)
            shared = os.path.commonprefix(rows)[:min(map(len, rows)) - 1]  # each has more to read
            if shared:
                extend(model, cache, [shared])
            cache.repeat(len(rows))
            replies = sample(model, rows, max_new_tokens=max_new_tokens, temperature=0,
                             stop_ids=chat.stop_ids, cache=cache).replies
            for i, ids in zip(batch, replies):
                outputs[i] = (chat.decode(ids), ids[-1] not in chat.stop_ids, len(ids))
    return outputs


# ----------------------------------------------------------------- log-probs, advantages and losses

def micro_batches(lengths, budget):
    """Indices of the rows, longest first, in batches whose padded size is at most `budget` tokens.

    A row longer than the budget stands alone. micro_batches([5, 9, 4], 10) == [[1], [0, 2]].
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def pad_rows(rows, masks, device):
    """Right-pads B lists: ids and mask, both (B, T). The mask comes from lengths, never from ids:
    pad may equal eos. A row's padding lies behind it, where causal attention never looks."""
    T = max(map(len, rows))
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    mask = torch.tensor([list(m) + [0] * (T - len(m)) for m in masks], device=device)
    return ids, mask


class BlockByBlock(torch.autograd.Function):
    """logps(logits (n, V), targets (n,)) -> (n,), a block of rows at a time, each way: what stays
    in a CPU's cache takes a third of the time. Nothing is kept but the logits, as they came."""

    @staticmethod
    def forward(ctx, logps, block, logits, targets):
        ctx.logps, ctx.block = logps, block
        ctx.save_for_backward(logits, targets)
        return torch.cat([logps(*x) for x in zip(logits.split(block), targets.split(block))])

    @staticmethod
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        for x, t, g, out in zip(*(y.split(ctx.block) for y in (logits, targets, grad, result))):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                out.copy_(torch.autograd.grad(ctx.logps(x, t), x, g)[0])
        return None, None, result, None


def head_logps(model, hidden, targets, temperature):
    """hidden (N, D), targets (N,) -> log-probs (N,), in fp32. Logits are formed chunk by chunk, at
    most LOGITS_HELD at a time; those of more than two chunks again in the backward pass, in place
    of being kept for it."""
    rows, block = (max(1, n // len(model.get_output_embeddings().weight)) for n in (
        LOGITS_HELD, LOGITS_BLOCK * (1 if hidden.device.type == "cpu" else 16)))

    def logps(logits, targets):  # one pass each way: gather - logsumexp takes 1.7 times as long
        logits = in_fp32(model, logits)                                             # (n, V)
        return -F.cross_entropy(logits if temperature == 1 else logits / temperature, targets,
                                reduction="none")

    def formed(hidden, targets):
        return BlockByBlock.apply(logps, block, model.get_output_embeddings()(hidden), targets)
    n_chunks = max(1, -(-len(targets) // rows))
    if n_chunks > 2:
        formed = functools.partial(checkpoint, formed, use_reentrant=False)
    return torch.cat([formed(*x) for x in zip(hidden.chunk(n_chunks), targets.chunk(n_chunks))])


def token_logprobs(model, ids, mask, temperature=1.0):
    """log pi(ids[:, t] | ids[:, :t]) under softmax(logits / temperature) where mask is 1, else 0.

    ids, mask (B, T), right-padded -> (B, T-1): column t speaks of token t+1, since the logits at
    position t predict the token behind it. ids [[7, 8, 9]] with mask [[0, 0, 1]] give
    [[0, log p(9 | 7, 8)]]. Logits exist at masked positions only. The plain form: training uses
    tree_logprobs, which gives the same and reads what dialogues share only once.
    """
    keep = mask[:, 1:].bool()
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logps = head_logps(model, hidden[keep], ids[:, 1:][keep], temperature)          # (N,)
    return torch.zeros(keep.shape, device=ids.device).masked_scatter(keep, logps)


def grow_trees(rows, budget, width):
    """B lists of ids -> trees, each a list of (b, path): token t of row b stands at place path[t].

    Rows with a common beginning share its places: [1, 2, 3] and [1, 2, 4] become the tree 1, 2, 3,
    4 with paths [0, 1, 2] and [0, 1, 3]. A tree has at most `budget` tokens (a longer row stands
    alone), and a row joins it only if that pays: in a layer of `width` D a token costs about
    24 D^2, and each pair of a tree's tokens, seen or not, 4 D, at half the speed of a product.
    (By runs, pairs that are not seen cost nothing: plant_batches.)
    """
    trees, last, path, size = [], [], [], 0
    for b in sorted(range(len(rows)), key=lambda b: rows[b]):  # what begins alike stands together
        n, shared = len(rows[b]), len(os.path.commonprefix([rows[b], last]))
        joint = size + n - shared
        if joint > budget or joint ** 2 - size ** 2 - n ** 2 >= 3 * width * shared:
            trees.append([])
            shared, size, joint = 0, 0, n
        path = path[:shared] + list(range(size, joint))
        trees[-1].append((b, path))
        last, size = rows[b], joint
    return trees


def n_places(tree):
    return 1 + tree[-1][1][-1]  # rows are sorted: the last path ends at the last place


class Runs:
    """The trees of a forest, cut where paths part: trees[r] lists, in the order of the places of
    row r, (length, indices of the runs before it in its dialogues), and the padding as one more."""

    def __init__(self, trees, n_places):
        self.trees, self.masks = [cut_into_runs(tree, n_places) for tree in trees], {}

    def mask(self, n, n_keys, copies):
        """The last n of n_keys tokens look at what is not behind them: (copies * n, n_keys)."""
        key = n, n_keys, copies
        if key not in self.masks:
            mask = torch.full((n, n_keys), float("-inf")).triu(1 + n_keys - n)
            self.masks[key] = mask.repeat(copies, 1)
        return self.masks[key]


def cut_into_runs(tree, P):
    """cut_into_runs([(0, [0, 1, 2]), (1, [0, 1, 3])], 5) == [(2, []), (1, [0]), (1, [0]), (1, [])]:
    places 0 and 1; 2, behind them; 3, behind the first two as well; padding."""
    starts = {0, n_places(tree)} - {P}
    for _, path in tree:
        starts |= {start for a, b in zip(path, path[1:]) if b != a + 1 for start in (a + 1, b)}
    starts = sorted(starts)
    index, before = {start: i for i, start in enumerate(starts)}, [[] for _ in starts]
    for _, path in tree:
        chain = [index[place] for place in path if place in index]
        for n, i in enumerate(chain):
            before[i] = chain[:n]
    return list(zip(np.diff([*starts, P]).tolist(), before))


class Forest(NamedTuple):
    """Trees of dialogues side by side, one a row: P places a row, R rows, B dialogues."""
    ids: torch.Tensor        # (R, P)
    positions: torch.Tensor  # (R, P), of each token in its dialogue
    parents: torch.Tensor    # (R, P), the place of the token before, r * P + place
    trained: torch.Tensor    # (R, P)
    paths: torch.Tensor      # (B, T), the places of a dialogue's tokens, r * P + place
    mask: torch.Tensor       # (B, T), 1 = trained, 0 elsewhere and behind the dialogue's end
    # One of these two says what a query looks at, its ancestors and itself; the other is None.
    seen: torch.Tensor       # (R, P, P), True there
    runs: Runs


def plant(trees, dialogues, device, by_runs=False):
    """Trees over dialogues -> (their indices in the order of the rows of paths, the Forest)."""
    R, P = len(trees), max(map(n_places, trees))
    ids, positions, parents, trained = torch.zeros(4, R, P, dtype=torch.long)
    for r, tree in enumerate(trees):
        for b, path in tree:
            path, n = torch.tensor(path), len(path)
            ids[r, path] = torch.tensor(dialogues[b].ids)
            positions[r, path] = torch.arange(n)
            parents[r, path[1:]] = r * P + path[:-1]
            trained[r, path[1:]] |= torch.tensor(dialogues[b].mask[1:])
    chosen = [b for tree in trees for b, _ in tree]
    paths, mask = pad_rows([[r * P + place for place in path] for r, tree in enumerate(trees)
                            for _, path in tree], [dialogues[b].mask for b in chosen], device)
    tensors = [x.to(device) for x in (ids, positions, parents, trained.bool())]
    looks = (None, Runs(trees, P)) if by_runs else (see(trees, P).to(device), None)
    return chosen, Forest(*tensors, paths, mask, *looks)


def see(trees, P):
    """What a mask of attention over trees lets through: (R, P, P), see Forest.seen."""
    seen = torch.eye(P, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding sees itself: no nan
    for r, tree in enumerate(trees):
        for _, path in tree:
            path, n = torch.tensor(path), len(path)
            seen[r, path[:, None], path] = torch.ones(n, n, dtype=torch.bool).tril()
    return seen


def plant_batches(dialogues, model, budget):
    """All dialogues as forests of at most `budget` padded tokens -> (indices, Forest), ..."""
    by_runs = sees_runs(model, max((len(d.ids) for d in dialogues), default=0))
    # By runs, no pair of two dialogues is formed: what can be shared pays.
    width = sys.maxsize if by_runs else model.config.get_text_config().hidden_size
    trees = grow_trees([d.ids for d in dialogues], budget, width)
    for batch in micro_batches(list(map(n_places, trees)), budget):
        yield plant([trees[i] for i in batch], dialogues, model.device, by_runs)


def sees_runs(model, n_tokens):
    """Does attend_runs serve this model, over dialogues of this length? No layer may look back
    less far, and on a GPU many small products take longer than a large one."""
    window = sliding_window(model.config.get_text_config())
    return (model.device.type == "cpu" and model.config._attn_implementation == "grouped"
            and (window is None or n_tokens <= window))


def tree_logprobs(model, forest, temperature=1.0):
    """token_logprobs of the forest's B dialogues, (B, T-1), each shared token forwarded once.

    Autograd adds up, at a shared token, the gradients of all dialogues that run through it.
    """
    keep, positions, seen, runs = forest.trained, forest.positions, forest.seen, {}
    if forest.runs:  # no mask is looked at, but the model asks for one
        positions, seen, runs = positions[:1, :1], keep.new_ones(1, 1, 1), {"runs": forest.runs}
    mask = visible(model.config.get_text_config(), seen,
                   positions[:, :, None] - positions[:, None])
    hidden = model.base_model(
        input_ids=forest.ids, position_ids=forest.positions, attention_mask=mask,
        use_cache=False, **runs).last_hidden_state                                  # (R, P, D)
    # Looked up by F.embedding: what comes back to a shared place is added in one order, always. Of
    # hidden[...], a CPU's threads add it as they come, and two runs part in the last digit.
    before = F.embedding(forest.parents[keep], hidden.flatten(0, 1))                # (N, D)
    logps = head_logps(model, before, forest.ids[keep], temperature)                # (N,)
    logps = torch.zeros(keep.shape, device=keep.device).masked_scatter(keep, logps)
    logps = F.embedding(forest.paths, logps.view(-1, 1)).squeeze(-1)                # (B, T)
    return torch.where(forest.mask.bool(), logps, 0.0)[:, 1:]


def group_advantages(rewards):
    """(reward - mean) / (std + 1e-4) within each group: (groups, members) -> same shape.

    Unbiased std and epsilon are those of GRPO in TRL. Equal rewards give exactly 0: in floating
    point their std is not 0, and a smaller epsilon would make an advantage of its rounding error.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group of one has no deviation")
    wide = rewards.to(torch.float64 if rewards.device.type != "mps" else torch.float32)
    advantages = (wide - wide.mean(1, keepdim=True)) / (wide.std(1, keepdim=True) + 1e-4)
    equal = wide.amax(1, keepdim=True) == wide.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).to(rewards.dtype)


def dialogue_advantages(full, partial, bonus, variant):
    """Outcomes full, partial (Q, G) and the bonus of each question (Q,) -> advantages, (Q, G) each.

    separate   each scenario by its own mean and deviation: the bonus scales {0, 1} to
               {0, 1 + delta}, and the normalisation divides it out again. It cancels.
    pooled     the 2G dialogues of a question share mean and deviation: the bonus acts, but it can
               push correct partial dialogues below the mean.
    added      each scenario normalised on its outcome, then the bonus added to the advantage of
               correct full dialogues. Nothing correct is ever pushed down.
    """
    total = full + bonus[:, None] * full                                            # Eq. 6
    if variant == "added":
        return group_advantages(full) + bonus[:, None] * full, group_advantages(partial)
    if variant == "separate":
        return group_advantages(total), group_advantages(partial)
    return group_advantages(torch.cat([total, partial], dim=1)).chunk(2, dim=1)


def policy_loss(logps, old_logps, ref_logps, advantages, mask, *, epsilon, beta, n_tokens=None):
    """Eq. 7, negated: clipped objective and KL penalty, averaged over the trained tokens.

    logps, old_logps, ref_logps, mask (B, T); advantages (B,). n_tokens is the divisor: the trained
    tokens of the whole step where this is one of its micro-batches, else those of the mask. Returns
    the loss and detached stats (kl, clip_share) over the same divisor: micro-batches add up.
    """
    mask = mask.bool()
    n_tokens = mask.sum() if n_tokens is None else n_tokens
    logps, old_logps, ref_logps = (  # not by a product: nan * 0 is nan
        torch.where(mask, x, 0.0) for x in (logps, old_logps, ref_logps))
    U = advantages[:, None]
    # At the first update on fresh samples rho is 1, yet its gradient is that of log pi: REINFORCE.
    rho = torch.exp(logps - old_logps)                                              # per token
    clipped = torch.clamp(rho, 1 - epsilon, 1 + epsilon)
    objective = torch.minimum(rho * U, clipped * U)
    # k3: unbiased as a value, never negative. Its gradient is that of KL(pi_ref || pi_theta), not
    # of KL(pi_theta || pi_ref); GRPO uses it so. The clamp keeps exp finite if the policy has fled.
    gap = (ref_logps - logps).clamp(max=20.0)
    kl = torch.exp(gap) - gap - 1
    loss = -((objective - beta * kl) * mask).sum() / n_tokens                       # Eq. 7
    clip = torch.where(U > 0, rho > 1 + epsilon, rho < 1 - epsilon) & (U != 0)
    stats = {"kl": (kl * mask).sum() / n_tokens, "clip_share": (clip & mask).sum() / n_tokens}
    return loss, {name: value.detach() for name, value in stats.items()}


# ----------------------------------------------------------------- checkpoints and the run's folder

def step_order(n, per_step, seed, step, limit=sys.maxsize):
    """Which of n items step `step` uses, epoch after epoch, each in a new order, nothing dropped.
    A function of (seed, step) alone: a resumed run needs no saved position."""
    places = range(step * per_step, min((step + 1) * per_step, limit))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n)
              for epoch in {place // n for place in places}}
    return [int(orders[place // n][place % n]) for place in places]


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


LOGS = {"SFT": ["sft.csv"], "ExGRPO": ["metrics.csv", "dialogues.txt"]}  # written by each stage


def save_checkpoint(args, stage, step, model, optimizer):
    """Weights, optimizer, step, sizes of the logs. The old one stays until the new one is whole."""
    logs = [os.path.join(args.out, name) for name in LOGS[stage]]
    state = {"stage": stage, "step": step, "log_sizes": [os.path.getsize(log) for log in logs],
             "weights": {name: p.data for name, p in trainable(model).items()},
             "optimizer": optimizer.state_dict()}
    try:
        with atomic(os.path.join(args.out, "checkpoint.pt")) as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's own word for a failed write
        raise UserError(f"cannot write the checkpoint in {args.out} (is the disk full? {error}); "
                        "the previous one is intact: make room and go on with --resume")


def load_checkpoint(args, stage, model, optimizer):
    """Puts the state of this stage back and returns its step, or 0. What its logs hold beyond that
    step will be written again, so it is cut off; a log that was deleted begins anew."""
    path, state = os.path.join(args.out, "checkpoint.pt"), {}
    try:
        if os.path.exists(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({in_short(error)}): put the whole file back, or "
                        "start again with a new --out")
    if (state.get("stage"), stage) == ("ExGRPO", "SFT"):
        raise UserError(f"the run in {args.out} is past its warm-up, whose result, sft, is gone: "
                        "put it back, or start again with a new --out")
    if state.get("stage") != stage:
        state = {"step": 0, "log_sizes": [0] * len(LOGS[stage])}
    for name, size in zip(LOGS[stage], state["log_sizes"]):
        with open(os.path.join(args.out, name), "ab") as log:
            if 0 < log.tell() < size:
                raise UserError(f"{log.name} is shorter than when the checkpoint was saved: put it "
                                "back, or delete it to begin a new one, and go on with --resume")
            log.truncate(min(size, log.tell()))
    if state["step"]:
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                parameter.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save_model(model, chat, folder):
    """A plain Hugging Face folder: written apart, then moved in file by file, config.json last."""
    staging = os.path.join(folder, "saving.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    merge_lora(model)
    try:
        model.save_pretrained(staging)
        chat.tokenizer.save_pretrained(staging)
    except SafetensorError as error:  # safetensors' own word for a failed write
        raise UserError(f"cannot write the model in {folder} (is the disk full? {error}); make "
                        "room and go on with --resume")
    for name in sorted(os.listdir(staging), key=lambda name: name == "config.json"):
        target = os.path.join(folder, name)
        if os.path.isdir(target):  # of named chat templates: a folder replaces an empty one only
            shutil.rmtree(target)
        os.replace(os.path.join(staging, name), target)
    os.rmdir(staging)


def append_csv(path, row):
    """Appends one row, below a line of names if the file is empty; flushed when we return."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                         for key, value in row.items()})


FREE = ("resume", "steps", "save_every", "device", "out", "probes", "eval", "eval_limit",
        "micro_batch_tokens", "gradient_checkpointing")  # may differ in a resumed run


def open_run(args):
    """Makes the run's folder and run.json; or, with --resume, checks that it is the same run's.
    Returns run.json, open and locked: a run has one process."""
    path = os.path.join(args.out, "run.json")
    mine = {name: value for name, value in vars(args).items() if name not in FREE}
    mine["student"] = mine["student"].removeprefix(HERE + os.sep)  # this project may be moved
    mine["probes_sha256"] = sha256_of(args.probes)
    if args.resume:
        if not os.path.exists(path):
            raise UserError(f"--resume: {args.out} holds no run (no run.json); leave --resume out")
        theirs = read_json(path)
        differing = [f"{name} = {theirs.get(name)!r}, not {mine[name]!r}" for name in mine
                     if mine[name] != theirs.get(name)]
        if differing:
            raise UserError(f"--resume: the run in {args.out} was started with "
                            f"{'; '.join(differing)}; use its flags and data, or a new --out")
        checkpoint, *models = (os.path.exists(os.path.join(args.out, *name)) for name in (
            ["checkpoint.pt"], ["sft", "config.json"], ["config.json"]))
        if any(models) and not checkpoint:
            raise UserError(f"--resume: {args.out} holds a model, but its checkpoint.pt is gone: "
                            "put it back, or start again with a new --out")
    elif os.path.isdir(args.out) and set(os.listdir(args.out)) - {"run.json.tmp"}:
        raise UserError(f"{args.out} is not empty: --resume goes on with its run, a new --out "
                        "starts another")
    else:
        os.makedirs(args.out, exist_ok=True)
        write_json(path, mine)
    file = open(path, "r+b")  # NFS locks no file that is open for reading only
    lock(file, f"another process is working on the run in {args.out}; wait for it, or name another "
               "--out")
    return file


def end_step(args, stage, step, last, model, optimizer):
    """A checkpoint every --save-every steps, after the last one, and when we were asked to stop."""
    if step % args.save_every == 0 or step == last or STOP.is_set():
        save_checkpoint(args, stage, step, model, optimizer)
    if STOP.is_set():
        raise KeyboardInterrupt(f"Saved after step {step} of {stage}: go on with --resume")


# ------------------------------------------------------------------------- stage 2: the SFT warm-up

def prepare(args, source, device):
    """The model that a stage trains, with fresh adapters if asked for, and its Chat."""
    model, chat = load_model(source, device)
    if args.lora_rank:
        torch.manual_seed(args.seed % 2 ** 63)  # the adapters' start
        add_lora(model, args.lora_rank, args.lora_alpha, args.bf16)
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.24
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model, chat


def teacher_dialogue(chat, rows):
    """The teacher's dialogue over some probes (or one question), every reply of it trained.

    Ids are prompt ids + reply ids + end token: no mask rests on a prefix that is encoded twice.
    """
    dialogue = Dialogue()
    for turn, row in enumerate(rows):
        open_turn = chat.later if turn else chat.first
        dialogue.add_user(open_turn(as_asked(row)))
        dialogue.add_reply(chat.reply(teacher_reply(row)), chat)
    return dialogue


def sft_backward(model, dialogues, args, weight=1.0):
    """Backward of weight * mean NLL of the trained tokens (Eqs. 3 and 8) -> the mean NLL."""
    n_tokens = sum(sum(d.mask) for d in dialogues)  # the divisor, before the first micro-batch
    total = 0.0
    for _, forest in plant_batches(dialogues, model, args.micro_batch_tokens):
        with autocast(args, model.device):
            loss = -tree_logprobs(model, forest).sum() / n_tokens                   # Eq. 3, Eq. 8
        (weight * loss).backward()
        total += loss.detach()
    return float(total)


def autocast(args, device):
    """bf16 products where --bf16 asks for them; the weights that are trained stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def adamw(model, lr):
    """Fused: one pass over the weights in place of eight."""
    return torch.optim.AdamW(trainable(model).values(), lr=lr, weight_decay=0.0,
                             fused=model.device.type != "mps")


def optimizer_step(model, optimizer, stage):
    """Clips the gradient's norm to 1 and steps -> the norm. If it is not finite, stops the run."""
    norm = float(nn.utils.clip_grad_norm_(trainable(model).values(), MAX_GRAD_NORM))
    if not np.isfinite(norm):
        raise UserError(f"{stage}: the gradient is {norm}, so the run stops before it spoils the "
                        "weights; start again with a smaller --lr or --sft-lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def warm_up(args, questions, device):
    """Stage 2: SFT over D_EI for --sft-epochs. Writes OUT/sft: the start of stage 3, and pi_ref."""
    model, chat = prepare(args, args.student, device)
    examples = [teacher_dialogue(chat, [row]) for question in questions
                for row in (question, *question["probes"])]
    n_steps = -(-len(examples) * args.sft_epochs // args.sft_batch_size)
    optimizer = adamw(model, args.sft_lr)
    start = load_checkpoint(args, "SFT", model, optimizer)
    tokens = sum(sum(example.mask) for example in examples)
    print(f"SFT       {len(examples)} examples, {tokens:,} trained tokens, {n_steps} steps")
    model.train(args.gradient_checkpointing)
    with tqdm(range(start, n_steps), initial=start, total=n_steps, desc="SFT") as bar:
        for step in bar:
            chosen = step_order(len(examples), args.sft_batch_size, args.seed, step,
                                limit=len(examples) * args.sft_epochs)
            loss = sft_backward(model, [examples[i] for i in chosen], args)         # Eq. 3
            optimizer_step(model, optimizer, f"SFT step {step + 1}")
            append_csv(os.path.join(args.out, "sft.csv"), {"step": step + 1, "loss": loss})
            bar.set_postfix(loss=f"{loss:.3f}")
            end_step(args, "SFT", step + 1, n_steps, model, optimizer)
    save_model(model, chat, os.path.join(args.out, "sft"))


# ---------------------------------------------------------------------------------- stage 3: ExGRPO

class Rollout(NamedTuple):
    """What a step samples. Dialogues stand group by group: question q, member g at q * G + g."""
    questions: list  # Q rows of D_EI
    probes: list     # Q lists of the probes drawn, in the order in which they were asked
    full: list       # Q * G dialogues: all probes, then the question
    partial: list    # Q * G dialogues: the first k' probes, then the question; none with --turns 0


def rollout(model, chat, questions, args, step):
    """Draws each question's probes and samples its full and partial dialogues."""
    rng = np.random.default_rng([args.seed, step, 1])
    generator = torch.Generator(model.device)
    generator.manual_seed((args.seed * 1_000_003 + step) % 2 ** 63)
    probes = [[row["probes"][i] for i in rng.permutation(len(row["probes"]))[:args.turns]]
              for row in questions]
    cuts = [int(rng.integers(len(drawn))) if drawn else 0 for drawn in probes]      # k' in 0..k-1
    scripts = [[as_asked(turn) for turn in (*drawn, row)] for drawn, row in zip(probes, questions)]
    forked = args.turns > 0 and args.partial == "forked"
    full, partial = converse(model, chat, scripts, args, generator, cuts if forked else ())
    if args.turns > 0 and args.partial == "independent":
        shorter = [script[:cut] + script[-1:] for script, cut in zip(scripts, cuts)]
        partial, _ = converse(model, chat, shorter, args, generator)
    return Rollout(questions, probes, full, partial)


def converse(model, chat, scripts, args, generator, cuts=()):
    """Plays Q scripts (lists of user turns) G times each, all dialogues in step, the cache alive
    across turns -> (Q * G full dialogues, as many partial ones or, without cuts, none).

    A partial dialogue is a full one, forked after k' = cuts[q] turns and asked the script's last
    there: an exact sample of the policy for the price of one reply, paired with its full twin. That
    reply is sampled in one batch with the full ones' next.
    """
    G, cache = args.group_size, None
    full = [Dialogue() for _ in scripts for _ in range(G)]
    n, partial = len(full), [None] * len(full)
    for turn in range(max(map(len, scripts))):
        rows = [b for b in range(n) if turn < len(scripts[b // G])]
        forks = [b for b in range(n) if cuts and turn == cuts[b // G]]
        for b in forks:
            partial[b] = full[b].fork(turn)
        talk = [full[b] for b in rows] + [partial[b] for b in forks]
        users = [scripts[b // G][turn] for b in rows] + [scripts[b // G][-1] for b in forks]
        for dialogue, user in zip(talk, users):
            dialogue.add_user(chat.later(user) if turn else chat.first(user))
        if cache and forks:
            cache.fork(forks)
        rows += range(n, n + len(forks))  # in the cache, too, forks stand behind the full ones
        cache = reply(model, chat, talk, rows, cache, args, generator)
        cache.keep(n)
    return full, partial if cuts else []


def reply(model, chat, dialogues, rows, cache, args, generator):
    """Samples the next reply of each dialogue, which stands in one of these rows of the cache;
    without a cache, groups share a prompt. Returns the cache."""
    prompts = [dialogue.ids for dialogue in dialogues]
    new = cache is None
    sampled = sample(model, prompts[::args.group_size] if new else prompts, cache=cache,
                     rows=None if new else rows, group_size=args.group_size if new else 1,
                     max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                     stop_ids=chat.stop_ids, generator=generator)
    for dialogue, ids, logps in zip(dialogues, sampled.replies, sampled.logps):
        dialogue.add_reply(ids, chat, logps)
    return sampled.cache


def outcomes(chat, dialogues, questions, group_size):
    """R_outcome, Eq. 4: whether the last reply of each dialogue, and nothing before it, answers the
    question -> (Q, G), and the share of last replies that state no readable answer."""
    texts = [chat.decode(dialogue.replies[-1]) for dialogue in dialogues]
    golds = [(row["answer"], row["answer_type"]) for row in questions for _ in range(group_size)]
    right = [float(reward.is_correct(text, *gold)) for text, gold in zip(texts, golds)]
    unread = [reward.extract_answer(text, kind) is None for text, (_, kind) in zip(texts, golds)]
    return torch.tensor(right, dtype=torch.float64).view(-1, group_size), np.mean(unread)


def pay(chat, played, args):
    """Rewards of a rollout -> (advantages of its full and then partial dialogues, metrics)."""
    G = args.group_size
    full, unread = outcomes(chat, played.full, played.questions, G)
    if played.partial:
        partial, _ = outcomes(chat, played.partial, played.questions, G)
        groups = list(zip(full.tolist(), partial.tolist()))
        bonus = [reward.dsu_bonus(f, p, args.delta, args.nu) for f, p in groups]       # Eq. 5
        totals = [reward.total_rewards(f, p, args.delta, args.nu) for f, p in groups]  # Eq. 6
        advantages = torch.cat(dialogue_advantages(
            full, partial, torch.tensor(bonus, dtype=full.dtype), args.advantage))  # (2Q, G)
        correct_partial = advantages[len(full):][partial > 0]
    else:
        partial, bonus, totals = full[:0], [], full.tolist()
        advantages, correct_partial = group_advantages(full), full[:0]
    replies = [len(ids) for d in played.full for ids in d.replies]
    fresh = -1 if args.partial == "forked" else 0  # the first reply that was not copied
    probes_right = [reward.is_correct(chat.decode(ids), probe["answer"], probe["answer_type"])
                    for b, d in enumerate(played.full)
                    for ids, probe in zip(d.replies, played.probes[b // G])]
    groups = torch.cat([full, partial])
    return advantages.flatten(), {
        "reward": float(np.mean(totals)), "acc_full": full.mean().item(),
        "acc_partial": mean_or_nan(partial), "acc_probes": mean_or_nan(probes_right),
        "bonus_share": mean_or_nan([paid > 0 for paid in bonus]),
        "adv_partial_correct": mean_or_nan(correct_partial),
        "truncated": float(np.mean([d.truncated[-1] for d in played.full])),
        "unparsed": float(unread),
        "zero_variance": (groups.amax(1) == groups.amin(1)).double().mean().item(),
        "reply_tokens": float(np.mean(replies)), "sampled_tokens": sum(replies) + sum(
            len(ids) for dialogue in played.partial for ids in dialogue.replies[fresh:])}


def mean_or_nan(values):
    return float(np.mean(np.asarray(values, dtype=float))) if len(values) else float("nan")


def update(policy, reference, optimizer, dialogues, advantages, teacher, args, stage):
    """One step of Eq. 7 plus Eq. 8, `--updates` times over the same samples -> metrics.

    reference() is a context that gives pi_ref. Dialogues of advantage 0 are not forwarded.
    """
    n_tokens = sum(sum(d.mask) for d in dialogues)  # the divisor, before the first micro-batch
    chosen = [i for i in range(len(dialogues)) if advantages[i] != 0]
    rows, U = [dialogues[i] for i in chosen], advantages[chosen].to(policy.device, torch.float32)
    frozen = []  # (old_logps, ref_logps) of each micro-batch, formed at the first update
    sampler_gap = 0.0
    for _ in range(args.updates):
        metrics = {"loss": 0.0, "kl": 0.0, "clip_share": 0.0, "aux_loss": 0.0}
        for b, (batch, forest) in enumerate(plant_batches(rows, policy, args.micro_batch_tokens)):
            with autocast(args, policy.device):
                if len(frozen) == b and args.beta > 0:
                    with torch.no_grad(), reference() as ref:
                        ref_logps = tree_logprobs(ref, forest, args.temperature)
                logps = tree_logprobs(policy, forest, args.temperature)             # (B, T-1)
            mask = forest.mask[:, 1:]
            if len(frozen) == b:  # the weights are still those that sampled: old log-probs
                frozen.append((logps.detach(), ref_logps if args.beta > 0 else logps.detach()))
                sampled = torch.tensor([x for i in batch for x in rows[i].logps],
                                       device=policy.device)
                gap = logps.detach()[mask.bool()] - sampled
                sampler_gap = max(sampler_gap, gap.abs().max().item())
            loss, stats = policy_loss(logps, *frozen[b], U[batch], mask, epsilon=args.epsilon,
                                      beta=args.beta, n_tokens=n_tokens)
            loss.backward()
            for name, value in {"loss": loss.detach(), **stats}.items():
                metrics[name] += value
        if args.aux_weight > 0 and teacher:
            metrics["aux_loss"] = sft_backward(policy, teacher, args, args.aux_weight)  # Eq. 8
        metrics["grad_norm"] = optimizer_step(policy, optimizer, stage)
    forwarded = sum(sum(dialogues[i].mask) for i in chosen) or 1
    for name in ("kl", "clip_share"):  # per token that was forwarded
        metrics[name] *= n_tokens / forwarded
    return {name: float(value) for name, value in metrics.items()} | {"sampler_gap": sampler_gap}


# The columns of metrics.csv, one row a step; README.md says what each means.
METRICS = ("step reward acc_full acc_partial acc_probes bonus_share adv_partial_correct kl "
           "clip_share sampler_gap loss aux_loss grad_norm truncated unparsed zero_variance "
           "reply_tokens tokens_per_s seconds").split()
BAR = ("reward {reward:.2f} full {acc_full:.2f} partial {acc_partial:.2f} kl {kl:.4f} "
       "clip {clip_share:.3f} {tokens_per_s:.0f} tok/s")


def reinforce(args, questions, device):
    """Stage 3: --steps steps of ExGRPO from OUT/sft (or the student itself). Writes OUT."""
    source = os.path.join(args.out, "sft") if args.sft_epochs else args.student
    policy, chat = prepare(args, source, device)
    if args.lora_rank:
        reference = functools.partial(adapters_off, policy)
    else:
        pi_ref = freeze(load_model(source, device)[0], args.bf16) if args.beta > 0 else None
        reference = functools.partial(contextlib.nullcontext, pi_ref)
    optimizer = adamw(policy, args.lr)
    start = load_checkpoint(args, "ExGRPO", policy, optimizer)
    if start > args.steps:
        raise UserError(f"--resume: {start} steps are done, more than --steps {args.steps}")
    if start < args.steps and AFTER in (table := read_eval(args)):  # it goes on with more --steps
        write_eval(args, {label: table[label] for label in table if label != AFTER})
    with tqdm(range(start, args.steps), initial=start, total=args.steps, desc="ExGRPO") as bar:
        for step in bar:
            began = time.perf_counter()
            order = step_order(len(questions), args.questions_per_step, args.seed, step)
            with autocast(args, device), packed(policy):
                played = rollout(policy.eval(), chat, [questions[i] for i in order], args, step)
            advantages, metrics = pay(chat, played, args)
            policy.train(args.gradient_checkpointing)  # without it, layers would not be recomputed
            dialogues = played.full + played.partial
            teacher = [teacher_dialogue(chat, drawn) for drawn in played.probes if drawn]   # Eq. 8
            metrics |= update(policy, reference, optimizer, dialogues, advantages, teacher, args,
                              f"ExGRPO step {step + 1}")
            seconds = time.perf_counter() - began
            metrics |= {"step": step + 1, "seconds": seconds,
                        "tokens_per_s": metrics.pop("sampled_tokens") / seconds}
            log_step(args, chat, played, metrics)
            bar.set_postfix_str(BAR.format(**metrics))
            end_step(args, "ExGRPO", step + 1, args.steps, policy, optimizer)
    save_model(policy, chat, args.out)


def log_step(args, chat, played, metrics):
    """A row of metrics.csv, and the first full dialogue of the step as text."""
    append_csv(os.path.join(args.out, "metrics.csv"), {name: metrics[name] for name in METRICS})
    dialogue, row = played.full[0], played.questions[0]
    right = reward.is_correct(chat.decode(dialogue.replies[-1]), row["answer"], row["answer_type"])
    with open(os.path.join(args.out, "dialogues.txt"), "a", encoding="utf-8") as file:
        file.write(f"==== step {metrics['step']}, question {row['id']}, gold {row['answer']}, "
                   f"final answer {'right' if right else 'wrong'}\n"
                   f"{chat.tokenizer.decode(dialogue.ids)}\n\n")


# ------------------------------------------------------------------------------------- command line

TOY_STUDENT = os.path.join(HERE, "toy", "student")
TOY_TESTS = [os.path.join(HERE, "toy", f"{name}.jsonl")
             for name in ("test", "test_reversed", "ei_test")]


def parse_args():
    parser = Parser("Stages 2 and 3 of ExGRPO: SFT warm-up on probes, then reinforcement.")
    add = parser.add_argument_group("what to train, on what").add_argument
    add("--student", default=TOY_STUDENT, help="local folder or Hub name")
    add("--probes", default=os.path.join(HERE, "toy", "probes.jsonl"), help="D_EI file from ei.py")
    add("--out", default="runs/exgrpo", help="folder of the run, new or empty unless --resume")
    add("--resume", action="store_true", help="go on with the run in --out")
    add = parser.add_argument_group("the method").add_argument
    add("--turns", type=at_least(0), default=5, help="k, probes in a full dialogue; 0: plain GRPO")
    add("--group-size", type=at_least(2), default=8, help="G, dialogues per question and scenario")
    add("--partial", choices=["forked", "independent"], default="forked",
        help="partial dialogues: cut from the full ones, or sampled apart")
    add("--advantage", choices=["added", "separate", "pooled"], default="added",
        help="how the bonus enters the group's advantages")
    add("--delta", type=at_least(0, float), default=0.5, help="size of the bonus, Eq. 5; 0: none")
    add("--nu", type=at_least(1, float), default=1.0, help="margin of the bonus, Eq. 5")
    add("--beta", type=at_least(0, float), default=0.04, help="weight of the KL penalty, Eq. 7")
    add("--epsilon", type=at_least(0, float, above=True), default=0.2, help="clip range, Eq. 7")
    add("--aux-weight", type=at_least(0, float), default=0.01, help="weight of the SFT loss, Eq. 8")
    add("--sft-epochs", type=at_least(0), default=3, help="warm-up, Eq. 3; 0: a cold start")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=at_least(0), default=60, help="ExGRPO steps")
    add("--questions-per-step", type=at_least(1), default=4, help="Q, questions in a step")
    add("--updates", type=at_least(1), default=1, help="updates per step on the same samples")
    add("--lr", type=at_least(0, float, above=True),
        help="AdamW's, in ExGRPO. None: 1e-6 * 3584 / width of the model, times 10 with LoRA")
    add("--sft-lr", type=at_least(0, float, above=True),
        help="in the warm-up. None: 5e-6 * 3584 / width, times 10 with LoRA")
    add("--sft-batch-size", type=at_least(1), default=16, help="examples in a step of the warm-up")
    add("--temperature", type=at_least(0, float, above=True), default=1.0,
        help="of sampling and of scoring, over the full vocabulary")
    add("--max-new-tokens", type=at_least(1), default=256, help="longest reply, tokens")
    add("--lora-rank", type=at_least(0), default=0, help="LoRA rank; 0 trains all weights")
    add("--lora-alpha", type=at_least(0, float, above=True), default=32.0, help="LoRA scale * rank")
    add = parser.add_argument_group("the machine").add_argument
    add("--micro-batch-tokens", type=at_least(1), default=4096,
        help="padded tokens in a forward pass of training: bounds memory, leaves the result")
    add("--bf16", action="store_true", help="bf16 autocast; trained weights stay fp32")
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--save-every", type=at_least(1), default=20, help="steps between checkpoints")
    add("--seed", type=at_least(0), default=0, help="of the data order, the cuts and the samples")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add = parser.add_argument_group("the table at the end").add_argument
    add("--eval", nargs="*", default=TOY_TESTS, metavar="FILE",
        help="question or D_EI files (.jsonl), asked greedily before SFT, after it and at the end; "
             "not named, the toy's for the toy's student and none for others")
    add("--eval-limit", type=at_least(1), default=600, help="questions or probes of each file")
    args = parser.parse_args()
    if args.eval is TOY_TESTS and os.path.abspath(args.student) != TOY_STUDENT:
        args.eval = []  # the toy's tests tell nothing of another student
    return args


def scale_learning_rates(args, model):
    """Adam moves every weight by about the learning rate, however wide its layer is, so that what a
    layer's output moves by grows with its width: the rates usual for 7B models (width 3584) are
    divided by width. Adapters take about ten times as much."""
    scale = 3584 / model.config.get_text_config().hidden_size * (10 if args.lora_rank else 1)
    args.lr, args.sft_lr = args.lr or 1e-6 * scale, args.sft_lr or 5e-6 * scale


def load_training_data(args):
    """The kept questions of D_EI with their consistent probes."""
    _, rows = read_probes(args.probes)
    kept = [row | {"probes": [probe for probe in row["probes"] if probe["consistent"]]}
            for row in rows if row["kept"]]
    kept = [row for row in kept if row["probes"]]
    if not kept:
        raise UserError(f"{args.probes}: none of its {len(rows)} questions is kept with a probe, "
                        "so there is nothing to train on; python ei.py --report shows why")
    most = max(len(row["probes"]) for row in kept)
    if args.turns > most:
        raise UserError(f"--turns {args.turns}: no question in {args.probes} has more than {most} "
                        "consistent probes")
    return kept


def check_lengths(model, chat, questions, tests, args):
    """What is asked, taught and sampled must fit the model's context: better said now than at step
    700. The ten longest texts of each kind are counted in tokens."""
    limit, room, k = context_size(model), args.max_new_tokens + 1, args.turns

    def user(rows):
        return sum(len((chat.later if turn else chat.first)(as_asked(row)))
                   for turn, row in enumerate(rows))

    def taught(rows):
        return len(teacher_dialogue(chat, rows).ids)

    def check(kind, dialogues, size, count):
        for rows in sorted(dialogues, key=lambda rows: -sum(map(size, rows)))[:10]:
            if count(rows) > limit:
                raise UserError(f"{kind} that ends in {as_asked(rows[-1])[:60]!r} may have "
                                f"{count(rows)} tokens, the model reads {limit}; lower --turns or "
                                "--max-new-tokens, or leave that text out")

    def longest(row, size):
        return sorted(row["probes"], key=size)[::-1][:k]
    check("a dialogue", [[*longest(row, n_asked), row] for row in questions], n_asked,
          lambda rows: user(rows) + room * len(rows))
    check("a teacher's dialogue", [longest(row, n_taught) for row in questions if k], n_taught,
          taught)
    check("an example", [[row] for question in questions
                         for row in (question, *question["probes"])], n_taught, taught)
    check("a test", [[row] for rows in tests.values() for row in rows], n_asked,
          lambda rows: user(rows) + room)


def n_asked(row):
    return len(as_asked(row).encode())  # bytes: of an emoji, each may be a token


def n_taught(row):
    return n_asked(row) + len(teacher_reply(row).encode())


def print_plan(args, model, questions, device):
    size = model.num_parameters() / 1e6
    trained = f"LoRA of rank {args.lora_rank}" if args.lora_rank else "all trained"
    probes = [len(row["probes"]) for row in questions]
    few = sum(n < args.turns for n in probes)
    scenarios = "full and partial" if args.turns else "no probes: plain GRPO"
    dtype = "fp32" if not args.bf16 else "bf16 autocast" if has_bf16(device) else (
        "bf16 autocast (this CPU has no bf16 products: without --bf16 it is several times as fast)")
    print(f"student   {args.student}: {size:.1f} M parameters, {trained}, on {device}, "
          f"{dtype}\n"
          f"data      {args.probes}: {len(questions)} kept questions, {sum(probes)} consistent "
          f"probes; {few} questions have fewer than {args.turns}\n"
          f"plan      {args.sft_epochs} SFT epochs, {args.steps} steps; a step: "
          f"{args.questions_per_step} questions x {args.group_size} dialogues, {scenarios}, "
          f"k = {args.turns}, replies of at most {args.max_new_tokens} tokens; learning rates "
          f"{args.sft_lr:.2g} in SFT, {args.lr:.2g} after it\n"
          f"run       {args.out}", flush=True)


def count_right(model, chat, items, max_new_tokens):
    """How many questions or probes, each asked alone, get a right greedy answer."""
    outputs = generate(model, chat, [chat.prompt([as_asked(item)]) for item in items],
                       max_new_tokens=max_new_tokens)
    return sum(reward.is_correct(text, item["answer"], item["answer_type"])
               for (text, _, _), item in zip(outputs, items))


AFTER = "after ExGRPO"


def read_eval(args):
    """OUT/eval.json, {label: {file: [right, n, digest of what was asked]}}: what a resumed run need
    not ask again."""
    path = os.path.join(args.out, "eval.json")
    return read_json(path) if os.path.exists(path) else {}


def write_eval(args, table):
    write_json(os.path.join(args.out, "eval.json"), table)


def assess(args, label, source, device, tests):
    """Greedy accuracy of a model on tests, what load_eval() gave, kept in OUT/eval.json."""
    table = read_eval(args)
    digests = {file: digest(json.dumps(items)) for file, items in tests.items()}
    if not tests or {file: kept[-1] for file, kept in table.get(label, {}).items()} == digests:
        return
    model, chat = load_model(source, device)
    found = {}
    for file, items in tests.items():
        if STOP.is_set():
            raise KeyboardInterrupt("Go on with --resume")
        right = count_right(model, chat, items, args.max_new_tokens)
        found[file] = [right, len(items), digests[file]]
    write_eval(args, table | {label: found})


def load_eval(args):
    """The questions, or the consistent probes, in every file of --eval -> {file: rows}."""
    items = {}
    for path in args.eval:
        if is_probes_file(path):
            rows = [probe for row in read_probes(path)[1]
                    for probe in row["probes"] if probe["consistent"]]
        else:
            rows = [check_question(row, where) for where, row in read_jsonl(path)]
        name = os.path.basename(path).removesuffix(".jsonl")
        if name in items:
            raise UserError(f"--eval: two files are called {name}, and their columns would be one; "
                            "rename one of them")
        items[name] = rows[:args.eval_limit]
    return items


def shown(name):
    """A model's name as a command may have it: a local folder by its relative path."""
    return os.path.relpath(name) if os.path.isdir(name) else name


def print_summary(args):
    """First and last steps side by side, accuracy before and after, and what to do next."""
    with open(os.path.join(args.out, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    n = min(10, len(rows) // 2)
    if n:
        print(f"mean over steps     {'first ' + str(n):>9} {'last ' + str(n):>9}")
        for name in METRICS[1:]:
            first, last = (mean_or_nan([x for row in part if (x := float(row[name])) == x])
                           for part in (rows[:n], rows[-n:]))  # a step may have no value: nan
            print(f"{name:20}{first:9.3g} {last:9.3g}")
    if args.eval:  # what assess() found, a line for each stage
        table = read_eval(args)
        names = list(next(iter(table.values())))
        print("\n% right (95 % interval)" + "".join(f"{name:>22}" for name in names))
        for label, found in table.items():
            print(f"{label:23}" + "".join(f"{reward.share(*found[x][:2]):>22}" for x in names))
        print(f"{'n':23}" + "".join(f"{found[name][1]:>22}" for name in names))
    data = " ".join(map(os.path.relpath, args.eval)) if args.eval else "QUESTIONS.jsonl"
    student = shown(args.student)
    print(f"\nmodel in {args.out}, beside metrics.csv and dialogues.txt (read those!)\n"
          f"next: python evaluate.py --model {args.out} --baseline {student} --data {data}\n"
          f"      python evaluate.py --curves {args.out}")


def main():
    args = parse_args()
    device = pick_device(args.device)
    model, chat = load_model(args.student, device)
    scale_learning_rates(args, model)
    questions = load_training_data(args)
    tests = load_eval(args)  # read now: a mistake in these files should not wait for the end
    check_lengths(model, chat, questions, tests, args)
    for number in (signal.SIGINT, signal.SIGTERM):  # the first finishes the step, the second kills
        signal.signal(number, lambda number, _: (STOP.set(), signal.signal(number, signal.SIG_DFL)))
    with open_run(args):
        print_plan(args, model, questions, device)
        del model
        sft = os.path.join(args.out, "sft")
        assess(args, "student", args.student, device, tests)
        if args.sft_epochs and not os.path.exists(os.path.join(sft, "config.json")):
            warm_up(args, questions, device)
        if args.sft_epochs:
            assess(args, "after SFT", sft, device, tests)
        reinforce(args, questions, device)
        assess(args, AFTER, args.out, device, tests)
    print_summary(args)


if __name__ == "__main__":
    run(main)
