"""Tiny random models of many architectures, for tests and for authors of baselines.

Every model is seeded, has a 512-token vocabulary, two decoder blocks and a context of 512 tokens,
and is built in milliseconds from its transformers configuration: nothing is downloaded. The global
random number generator is left as it was found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 512
CONTEXT = 512

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_OPT = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

# model_type -> what its configuration needs to be tiny; names differ from family to family
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma": {**_LLAMA, "head_dim": 16},
    "opt": {**_OPT, "word_embed_proj_dim": 64},
    "gpt2": _GPT2,
    "gpt_neox": {**_LLAMA, "rotary_pct": 0.5},
    "falcon": {k: v for k, v in _LLAMA.items() if k != "intermediate_size"},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "phi": {**_LLAMA, "num_key_value_heads": 4},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A seeded random causal language model in float32 and eval mode.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        seed: of the weights.
        changes: configuration fields to set differently.
    """
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    fields = {**common, **ARCHITECTURES[architecture], **changes}
    config = AutoConfig.for_model(architecture, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _roughen(model)
    return model.eval()


def _roughen(model: PreTrainedModel) -> None:
    """Give norms and biases values of their own: ones and zeros hide errors in folding."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            spread = 0.2 if name.endswith("weight") else 0.05
            parameter.data.add_(torch.randn_like(parameter) * spread)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 ids (<unk> <s> </s> first), <s> in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    for i in range(VOCAB_SIZE - tokenizer.get_vocab_size()):
        tokenizer.add_tokens([f"<unused{i}>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=CONTEXT,
    )


def tiny_checkpoint(
    folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any
) -> Path:
    """Save a tiny model with its tokenizer to ``folder`` and return the folder."""
    tiny_model(architecture, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_windows(nsamples: int = 8, seqlen: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids (nsamples, seqlen), never a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (nsamples, seqlen), generator=generator)


_SENTENCES = [
    f"{who} {did} the {what} {where} because {why}."
    for who in ("Anna", "The old man", "A small dog", "My sister", "Nobody")
    for did in ("carried", "found", "painted", "was afraid of", "sold")
    for what in ("green box", "broken clock", "bread", "boat", "letter")
    for where in ("near the river", "in the kitchen", "before the rain", "at night")
    for why in ("it was late", "she had promised", "the door stood open")
]
