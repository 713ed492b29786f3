"""What a BitNet checkpoint on disk is, read from its config.json and the headers of its files.

Four layouts are in public use, and each has a way to run and be wrong:

``transformers``  ``quantization_config: {"quant_method": "bitnet", ...}`` on any causal model.
                  ``linear_class: autobitlinear`` multiplies the product by ``weight_scale``,
                  ``bitlinear`` (the default) divides by it: the same bytes, opposite meanings.
                  Mode ``online`` stores latent weights, ``offline`` packed ternary codes. A model
                  of type ``bitnet`` without the entry runs its latent weights unrounded.
``1bitLLM``       calls itself ``llama``; latent weights and two norms a block that a Llama drops.
``qbench b1``     ``qbench_bitnet_b1``: latent weights, and the quantizers' options.

Torch-free. Left out: reading a weight (:mod:`qbench.models.bitnet.loading`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qbench.errors import QBenchError, unknown
from qbench.scheme import Scheme

CODES_PER_BYTE = 4
"""Ternary codes in a packed byte; they are those of four rows, so rows are a multiple of it."""
B1_TYPE = "qbench_bitnet_b1"
LATENT_MARK = "qbench_latent_weights"
"""Entry of a config.json: these are latent weights that were quantized as an ordinary model's."""
LINEAR_CLASSES = ("bitlinear", "autobitlinear")
MODES = ("offline", "online")
_RENAMED = (("inner_attn_ln", "attn_sub_norm"), ("ffn_layernorm", "ffn_sub_norm"))
"""1bitLLM's names of the norms before o_proj and down_proj, and transformers'."""
SUB_NORMS = {"attn_sub_norm": "o_proj", "ffn_sub_norm": "down_proj"}
"""Norms of a block that a Llama has not, and the linears they feed."""
SCALE = "weight_scale"
_HEAD = "lm_head.weight"
_ACTS = ("hidden_act", "activation_function", "activation", "hidden_activation")
"""Entries for the activation function: Llama's, OPT's, Falcon's and Gemma's."""
_FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: "F32", "BF16", "U8"."""


@dataclass(frozen=True)
class BitNetFormat:
    """How a BitNet checkpoint stores its weights, and so how they are to be run."""

    layout: str
    """"transformers", "1bitLLM" or "qbench b1"."""
    storage: str
    """"latent"; "packed" (four codes a byte); "codes" (-1, 0, 1 as floating point numbers)."""
    hidden_act: str
    tied: bool
    """Whether the output head is the embedding matrix."""
    divides: bool = False
    """Whether the product is divided by ``weight_scale`` instead of multiplied."""
    keep: tuple[str, ...] | None = None
    """Patterns of linears that stay in full precision; None: the output head."""
    norm_eps: float | None = None
    """ε of an RMS norm inside every quantized linear (``use_rms_norm``); None without one."""
    norm_weights: bool = False
    """Whether those norms have a weight in the file."""
    sub_norms: tuple[str, ...] = ()
    """Norms in the blocks that a Llama does not have."""
    options: tuple[tuple[str, Any], ...] = ()
    """Fields of BitLinearOptions that differ from its defaults (b1)."""
    mended: tuple[str, ...] = ()
    """What the config.json does not say, or says wrong, and what was done."""

    @property
    def is_latent(self) -> bool:
        """Whether full-precision weights are stored, to be quantized when they are loaded."""
        return self.storage == "latent"

    @property
    def has_input_norms(self) -> bool:
        """Whether its linears have norms inside."""
        return self.norm_eps is not None or dict(self.options).get("norm", "none") != "none"

    @property
    def renames(self) -> tuple[tuple[str, str], ...]:
        """(name in the file, name in the model) of parts of tensor names."""
        return _RENAMED if self.layout == "1bitLLM" else ()

    @property
    def scheme(self) -> Scheme:
        """The scheme the weights were trained at.

        b1.58 rounds activations to ±127 steps of absmax / 127, which is ``restricted``; B1 with
        the paper's Q_b = 2^(b-1) is ``bitnet``. B1 subtracts the mean before it takes the sign,
        which ``sign`` does not say; the load report does.
        """
        o = dict(self.options)
        if o.get("weights") != "binary":
            return Scheme(
                wbits=1.58,
                abits=8,
                w_granularity="tensor",
                a_granularity="token",
                grid="ternary",
                agrid="restricted",
            )
        granularity = o.get("activation_granularity", "token")
        return Scheme(
            wbits=1,
            abits=o.get("abits", 8),
            w_granularity="tensor",
            a_granularity="tensor" if granularity == "tensor" else "token",
            grid="sign",
            agrid="restricted" if o.get("qmax", "code") == "code" else "bitnet",
        ).normalized()

    def parameters(self, tensors: Mapping[str, Stored]) -> int:
        """Number of weights: a packed byte holds four, scales and a tied head's copy are none."""
        total = 0
        for name, stored in once(tensors, self.tied).items():
            packed = CODES_PER_BYTE if stored.dtype == "U8" else 1
            total += 0 if name.endswith(f".{SCALE}") else packed * math.prod(stored.shape)
        return total


def once(tensors: Mapping[str, Stored], tied: bool) -> dict[str, Stored]:
    """The tensors without an output head that is the embedding matrix and is stored beside it."""
    head = tensors.get(_HEAD) if tied else None
    twins = [n for n, t in tensors.items() if head and t.shape == head.shape and "embed" in n]
    return {name: stored for name, stored in tensors.items() if not (twins and name == _HEAD)}


def detect(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> BitNetFormat | None:
    """The format of a BitNet checkpoint, or None for a checkpoint of another kind.

    Args:
        name: how messages call the checkpoint.
        config: its config.json.
        tensors: every stored tensor by name; empty where headers cannot be read (pickles).

    Raises:
        QBenchError: for a checkpoint that is BitNet and would not run as it was trained.
    """
    quantized = config.get("quantization_config") or {}
    check_entry(name, "quantization_config", quantized, Mapping, "an object")
    named = [str(a) for a in config.get("architectures") or ()]
    model_type = config.get("model_type")
    if quantized and quantized.get("quant_method") != "bitnet":
        return None
    read = _Reader(name, config, tensors)
    if quantized:
        return read.transformers(quantized)
    if config.get(LATENT_MARK):
        return None
    if model_type == B1_TYPE:
        return read.b1()
    if model_type == "bitnet":
        return read.without_quantization_config()
    if {"weight_bits", "input_bits"} & set(config) or "bitnetforcausallm" in map(str.lower, named):
        return read.one_bit_llm()
    read.refuse_codes_without_meaning()
    return None


def check_entry(
    name: str, entry: str, value: Any, kind: type | tuple[type, ...], words: str
) -> None:
    """Raise a QBenchError for an entry of a config.json that is of another kind than ``words``."""
    if not isinstance(value, kind):
        raise QBenchError(f"{name} has {entry} {value!r} in its config.json; give {words}")


class _Reader:
    """A checkpoint's config and headers, with the questions that are asked of them."""

    def __init__(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        self.name, self.config, self.tensors = name, config, tensors

    def common(self, default_act: str = "silu") -> dict[str, Any]:
        """What every layout says in the same place."""
        if not self.tensors:
            raise QBenchError(
                f"{self.name} is a BitNet checkpoint with pickled weights, whose layout cannot be "
                "checked; convert them to safetensors"
            )
        new_names = dict(_RENAMED)
        parts = {part for name in self.tensors for part in name.split(".")}
        found = {new_names.get(part, part) for part in parts}
        return {
            "hidden_act": next((str(a) for a in map(self.config.get, _ACTS) if a), default_act),
            "tied": bool(self.config.get("tie_word_embeddings", False)),
            "sub_norms": tuple(norm for norm in SUB_NORMS if norm in found),
        }

    def linears(self, keep: tuple[str, ...] | None = None) -> dict[str, Stored]:
        """The matrices of the blocks by the names of their linears, without those kept."""
        return {
            name.removesuffix(".weight"): stored
            for name, stored in self.tensors.items()
            if name.endswith(".weight")
            and len(stored.shape) == 2
            and any(part.isdigit() for part in name.split("."))
            and not is_kept(name.removesuffix(".weight"), keep or ())
        }

    def transformers(self, quantized: Mapping[str, Any]) -> BitNetFormat:
        """The layout of transformers' BitNetQuantConfig."""
        where = f"in the quantization_config of {self.name}"
        linear_class = quantized.get("linear_class", LINEAR_CLASSES[0])
        mode = quantized.get("quantization_mode", MODES[0])
        if linear_class not in LINEAR_CLASSES:
            raise unknown(f"linear_class {where}", str(linear_class), LINEAR_CLASSES)
        if mode not in MODES:
            raise unknown(f"quantization_mode {where}", str(mode), MODES)
        common = self.common(self.default_act)
        kept = quantized.get("modules_to_not_convert")
        if kept is not None:
            check_entry(self.name, "modules_to_not_convert", kept, list, "a list of names")
        keep = None if kept is None else tuple(map(str, kept))
        for pattern in keep or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise QBenchError(
                    f"{pattern!r} in modules_to_not_convert {where} is no name and no regular "
                    f"expression ({error})"
                ) from None
        linears = self.linears(keep)
        if not linears:
            raise QBenchError(
                f"{self.name} has no matrix in its blocks that its quantization_config converts; "
                "correct modules_to_not_convert"
            )
        online = mode == "online" and linear_class == "autobitlinear"
        storage = self.storage(linears, linear_class, online)
        eps, has_weights = self.input_norms(quantized, linears)
        return BitNetFormat(
            layout="transformers",
            storage=storage,
            divides=linear_class == "bitlinear",
            keep=keep,
            norm_eps=eps,
            norm_weights=has_weights,
            mended=()
            if eps is None or has_weights
            else ("no rms_norm.weight is stored: the norms inside the linears have no weights",),
            **common,
        )

    @property
    def default_act(self) -> str:
        """The activation function of a config.json that names none."""
        known = {"bitnet": "relu2", "llama": "silu"}
        return known.get(str(self.config.get("model_type")), "as the class has it")

    def storage(self, linears: Mapping[str, Stored], linear_class: str, online: bool) -> str:
        """How the weights are stored; refused where files and config contradict each other."""
        packed = {n for n, stored in linears.items() if stored.dtype == "U8"}
        scaled = {n for n in linears if f"{n}.{SCALE}" in self.tensors}
        for name, stored in linears.items():
            if name not in packed and stored.dtype not in _FLOATS:
                raise QBenchError(
                    f"{self.name}: {name}.weight is stored as {stored.dtype}; BitNet weights are "
                    "packed in U8 or latent in floating point"
                )
        if packed and len(packed) < len(linears):
            other = next(n for n in linears if n not in packed)
            raise QBenchError(
                f"{self.name} is half converted: {min(packed)}.weight is packed, {other}.weight "
                f"is {linears[other].dtype}; convert it again, or name the latter in "
                "modules_to_not_convert"
            )
        first = next(iter(linears))
        if online:
            if packed or scaled:
                what = "packed" if packed else f"stored with a {SCALE}"
                raise QBenchError(
                    f"{self.name} says quantization_mode online, but {first}.weight is {what}; "
                    "say offline"
                )
            return "latent"
        unscaled = [n for n in linears if n not in scaled]
        if unscaled and not packed and not scaled:
            raise QBenchError(
                f"{self.name} says its weights are quantized, but {first}.weight is "
                f"{linears[first].dtype} without {SCALE}, so latent; say linear_class "
                "autobitlinear and quantization_mode online"
            )
        if unscaled:
            raise QBenchError(
                f"{self.name}: {unscaled[0]} has no {SCALE}, without which its codes mean "
                "nothing; fetch or convert the checkpoint again"
            )
        if not packed and linear_class == "bitlinear":
            raise QBenchError(
                f"{self.name} says linear_class bitlinear, whose weights are packed in U8, but "
                f"{first}.weight is {linears[first].dtype}; say autobitlinear if that made it"
            )
        return "packed" if packed else "codes"

    def input_norms(
        self, quantized: Mapping[str, Any], linears: Iterable[str]
    ) -> tuple[float | None, bool]:
        """ε of the norms inside the linears, and whether they have weights."""
        having = [n for n in linears if f"{n}.rms_norm.weight" in self.tensors]
        if not quantized.get("use_rms_norm"):
            return None, False
        lacking = [n for n in linears if n not in having]
        if having and lacking:
            raise QBenchError(
                f"{self.name}: {having[0]} has an rms_norm.weight and {lacking[0]} has none; "
                "convert the checkpoint again"
            )
        eps = quantized.get("rms_norm_eps")
        if eps is None:
            return 1e-6, bool(having)
        check_entry(self.name, "rms_norm_eps", eps, (int, float), "a number")
        return float(eps), bool(having)

    def without_quantization_config(self) -> BitNetFormat:
        """A model of type bitnet whose config.json does not say how it is quantized."""
        self.refuse_codes_without_meaning()
        return BitNetFormat(
            layout="transformers",
            storage="latent",
            mended=(
                "config.json has no quantization_config, and transformers would run these latent "
                "weights unrounded; they are made ternary and activations rounded, as trained",
            ),
            **self.common(self.default_act),
        )

    def refuse_codes_without_meaning(self) -> None:
        """Raise for packed codes where no config says what their scale does."""
        for name, stored in self.linears().items():
            if stored.dtype == "U8" and f"{name}.{SCALE}" in self.tensors:
                raise QBenchError(
                    f"{self.name}: {name}.weight is packed, but config.json has no "
                    f"quantization_config, so nobody knows whether {SCALE} multiplies or divides; "
                    "put the entry back"
                )

    def one_bit_llm(self) -> BitNetFormat:
        """The layout of 1bitLLM's reproduction."""
        common = self.common()
        for field, known in (("weight_bits", 1), ("input_bits", 8)):
            if self.config.get(field, known) != known:
                raise QBenchError(
                    f"{self.name} has {field} {self.config[field]}; only {known} is known, which "
                    "1bitLLM's checkpoints have"
                )
        blocks = {m[0] for name in self.tensors if (m := re.match(r".*?\.\d+(?=\.)", name))}
        for block in sorted(blocks):
            for norm in (f"self_attn.{_RENAMED[0][0]}", f"mlp.{_RENAMED[1][0]}"):
                if f"{block}.{norm}.weight" not in self.tensors:
                    raise QBenchError(
                        f"{self.name} is a BitNet of 1bitLLM's layout, but lacks "
                        f"{block}.{norm}.weight, a norm it was trained with; fetch it again"
                    )
        mended = (
            "config.json says "
            f"{self.config.get('model_type')}, which would run these latent weights unrounded and "
            "drop two norms a block; it runs as the BitNet it is",
        )
        return BitNetFormat(layout="1bitLLM", storage="latent", mended=mended, **common)

    def b1(self) -> BitNetFormat:
        """What qbench trains as b1."""
        given = self.config.get("bitlinear") or {}
        check_entry(self.name, "bitlinear", given, Mapping, "an object of quantizer options")
        options = {"weights": "binary", "norm": "layer"} | dict(given)
        made = BitNetFormat(
            layout="qbench b1",
            storage="latent",
            options=tuple(sorted(options.items())),
            **self.common(),
        )
        made.scheme  # noqa: B018 - refuses a width that no scheme has
        return made


def is_kept(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module stays as it is, as transformers reads ``modules_to_not_convert``.

    A pattern is the end of a name, or a regular expression for its beginning up to a dot.
    """
    for pattern in patterns:
        if name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.)|$)", name):
            return True
    return False
