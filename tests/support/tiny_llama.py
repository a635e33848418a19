"""A random Llama of a few hundred kB, its byte-level tokenizer, and texts of a small vocabulary."""

from pathlib import Path

import torch

VOCABULARY = """
the quick brown fox jumps over a lazy dog while seven bright stars turn slowly above cold mountains
and rivers
"""
WORDS = VOCABULARY.split()


def make_text(words: int, seed: int = 0) -> str:
    """Sentences of a small vocabulary, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return " ".join(
        WORDS[pick] + ("." if number % 9 == 8 else "") for number, pick in enumerate(picks)
    )


def make_tokenizer(directory: Path, mask: bool = False) -> int:
    """A byte-level BPE tokenizer with a BOS and an EOS; with `mask` also what a masked language
    model needs. Returns its vocabulary size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(2000)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if mask:
        fast.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(directory)
    return len(fast)


def make_llama(
    directory: Path,
    *,
    tie: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **changes,
) -> Path:
    """A random Llama of two layers whose sizes are multiples of 128, so that every scheme fits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(directory)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
    }
    config = LlamaConfig(
        vocab_size=vocabulary,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        **(sizes | changes),
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory
