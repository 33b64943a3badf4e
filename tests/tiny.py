"""Tiny random checkpoints for the tests: real architectures, 2 layers, a byte-level tokenizer with
pad == eos.

    python tests/tiny.py llama FOLDER
"""
import os
import sys

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig,
                          GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast,
                          Qwen2Config)

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|open|>system\nBe brief.<|end|>\n{% endif %}"
    "{% for m in messages %}<|open|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|open|>assistant\n{% endif %}")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=4096)
CONFIGS = {
    "llama": lambda **ids: LlamaConfig(**SHAPE, **ids),
    "qwen2": lambda **ids: Qwen2Config(**SHAPE, tie_word_embeddings=True, **ids),
    "gemma": lambda **ids: GemmaConfig(**SHAPE, **ids),
    # dropout 0.1
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=2048, **ids),
    # all layers look back 24
    "mistral": lambda **ids: MistralConfig(**SHAPE, sliding_window=24, **ids),
    # no sdpa: eager attention with soft caps
    "gemma2": lambda **ids: Gemma2Config(**SHAPE, sliding_window=24, layer_types=[
        "sliding_attention", "full_attention"], query_pre_attn_scalar=8, **ids),
    "gemma3": lambda **ids: Gemma3TextConfig(**SHAPE, sliding_window=24, layer_types=[
        "sliding_attention", "full_attention"], **ids),
}


def tiny_tokenizer(chat=True, seam=False):
    """Byte-level, with a few merges, so that sampled ids are often not what encode would choose.
    seam: a colon and the space behind it are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "s"), ("e", "r"), ("Ġ", "a")]
    merges = [(":", "Ġ")] * seam + merges
    vocab = {token: i for i, token in enumerate(alphabet + [a + b for a, b in merges])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not seam)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<|end|>", "<|open|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>",
                                        pad_token="<|end|>",
                                        additional_special_tokens=["<|open|>"])
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_model_folder(kind, path, seed=0):
    """Writes a tiny random checkpoint of this kind (gpt2 without chat template) and returns its
    path."""
    tokenizer = tiny_tokenizer(chat=kind != "gpt2")
    torch.manual_seed(seed)
    config = CONFIGS[kind](vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                           pad_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    # sharper than the usual 0.02, so that the tests see distributions with a shape
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    os.makedirs(folder, exist_ok=True)
    print(tiny_model_folder(kind, folder))
