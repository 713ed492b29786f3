"""Models with random weights, tokenizers and windows: what the benchmarks run on.

Speed does not depend on what a model knows, so nothing is downloaded. A tokenizer is byte-level
BPE, trained on text at hand; where that holds too little for the vocabulary, unused tokens fill it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]


def llama_fields(
    hidden: int, layers: int, feed_forward: int, heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """Fields of ``LlamaConfig``; positions go to 2048 unless said otherwise."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


LLAMA_100M = llama_fields(768, 12, 2048, 12, 32000, tie_word_embeddings=True)
"""85 M parameters in 12 blocks, 25 M in the embeddings."""
LLAMA_SMALL = llama_fields(128, 2, 256, 2, 32000, tie_word_embeddings=True)
LLAMA_1B = llama_fields(2048, 22, 5632, 32, 32000, num_key_value_heads=4)
"""TinyLlama's shape, 1.10 B parameters."""


def random_llama(fields: dict[str, Any], seed: int = 0) -> Any:
    """A seeded Llama in float32, in eval mode; the global generator is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=torch.float32)
    return model.eval()


def training_text(data: Path | None, texts: Sequence[Path] = ()) -> list[Path]:
    """Files to train a tokenizer on: as given, else of the data folder, else bundled."""
    if texts:
        return list(texts)
    if data is not None:
        found = [p for p in sorted((data / "corpora").rglob("*")) if p.is_file()]
        found += sorted((data / "tasks" / "tinystories").glob("*.jsonl"))
        found += sorted((data / "tasks" / "wikitext103_train_sample").glob("*.jsonl"))
        if found:
            return found
    from qbench.models.files import data_folder

    world = data_folder("bundled:world")
    assert world is not None
    return sorted(world.rglob("*.jsonl"))


def bpe_tokenizer(files: Sequence[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly ``vocabulary`` tokens that puts <s> in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(files), trainer)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(vocabulary - tokenizer.get_vocab_size())])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=2048,
    )


def _lines(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if path.suffix != ".jsonl":
                yield line
            elif line.strip():
                yield from (v for v in json.loads(line).values() if isinstance(v, str))


def make_tokenizer(
    work: Path, data: Path | None, vocabulary: int, texts: Sequence[Path] = ()
) -> PreTrainedTokenizerFast:
    """A trained tokenizer, kept in the work folder by vocabulary and kind of text."""
    from transformers import PreTrainedTokenizerFast

    source = "data" if data is not None else "world"
    if texts:
        content = b"".join(path.read_bytes() for path in texts)
        source = hashlib.sha256(content).hexdigest()[:8]
    folder = work / f"tokenizer-{vocabulary}-{source}"
    if not (folder / "tokenizer.json").is_file():
        bpe_tokenizer(training_text(data, texts), vocabulary).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_checkpoint(
    work: Path, name: str, fields: dict[str, Any], data: Path | None = None
) -> Path:
    """A folder with a random Llama in float32 and a tokenizer of its vocabulary, made once."""
    folder = work / f"{name}-{'data' if data else 'world'}"
    wanted = json.dumps(fields, sort_keys=True)
    mark = folder / "made.json"
    if not mark.is_file() or mark.read_text() != wanted:
        tokenizer = make_tokenizer(work, data, fields["vocab_size"])
        random_llama(fields).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        mark.write_text(wanted)
    return folder


def make_windows(work: Path, vocabulary: int, nsamples: int, seqlen: int) -> Path:
    """A safetensors file with ``windows`` (nsamples, seqlen) of seeded random tokens."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    path = work / f"windows-{vocabulary}-{nsamples}x{seqlen}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(len(SPECIAL), vocabulary, (nsamples, seqlen), generator=generator)
    save_file({"windows": tokens}, path)
    return path


def make_sharded(work: Path, name: str, fields: dict[str, Any], data: Path | None) -> Path:
    """A random bfloat16 Llama written two blocks a shard, never whole in memory.

    Returns:
        The checkpoint's folder; it is made once.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder = work / f"{name}-{'data' if data else 'world'}"
    mark, wanted = folder / "made.json", json.dumps(fields, sort_keys=True)
    if mark.is_file() and mark.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    parts = list(_parts(fields))
    weight_map: dict[str, str] = {}
    total = 0
    generator = torch.Generator().manual_seed(0)
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {n: _random(shape, generator) for n, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = LlamaConfig(**fields, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    make_tokenizer(work, data, fields["vocab_size"]).save_pretrained(folder)
    mark.write_text(wanted)
    return folder


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of each shard: the embeddings, two blocks at a time, norm and head."""
    d, ff, vocabulary = (fields[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = d // fields["num_attention_heads"] * fields["num_key_value_heads"]
    inside = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    yield {"model.embed_tokens.weight": (vocabulary, d)}
    layers = range(fields["num_hidden_layers"])
    for start in layers[::2]:
        yield {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in layers[start : start + 2]
            for name, shape in inside.items()
        }
    yield {"model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}
