"""What a checkpoint in the GPTQ format is, read from its configuration and its files' headers.

The format of AutoGPTQ and what came after it (GPTQModel, optimum, transformers). Per linear of K
inputs and N outputs at b bits, in G groups:

    qweight  int32 (K b / 32, N)   codes of K, b bits each from the lowest bit up; at 3 bits a code
                                   may begin in one word and end in the next
    qzeros   int32 (G, N b / 32)   zero points of N, packed alike
    scales   float (G, N)
    g_idx    int32 (K)             group of each input: not in order after act-order

``checkpoint_format`` "gptq" (v1, also where none is named) stores each zero point minus one,
"gptq_v2" stores it as it is: read the wrong way, every weight is off by a step. GPTQModel subtracts
the ones from whole words, so that at 2, 4 and 8 bits a zero point of 0 borrows from its neighbour;
others let each wrap for itself. The two differ only where a zero point is 0, and the entry
``meta.quantizer`` says which it is. AutoGPTQ itself loses the rest of the word there, which nothing
can mend: such words are counted and told.

Known by the configuration (``quantization_config``, or quantize_config.json), never by a name.
Torch-free. Left out: unpacking (:mod:`~.gptq_loading`); other packings (Marlin, AWQ, planar 5 to 7
bits, words that are no int32) and widths that differ between layers, which are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.errors import QBenchError
from qbench.models import files
from qbench.models.bitnet.formats import Stored, check_entry, once
from qbench.models.own_scheme import OwnScheme
from qbench.record import BaselineSpec, LayerReport
from qbench.scheme import Scheme

CONFIG = "quantize_config.json"
"""Where AutoGPTQ wrote what transformers expects in config.json."""
BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
FORMATS = (V1, V2)
METHOD = "gptq"
"""``quant_method`` of the format, whichever method made the codes."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
WORD = 32
DAMAGED = "damaged_zero_points"
"""Entry of a layer's report: words of zero points that its packer may have damaged."""
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4}
_AGREE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
"""Entries that must not contradict each other where both files have them."""


@dataclass(frozen=True)
class GPTQFormat:
    """How a GPTQ checkpoint stores its weights."""

    bits: int
    group_size: int
    """-1: one scale for a whole row."""
    sym: bool
    act_order: bool
    """Columns were rounded by decreasing activation (``desc_act``)."""
    version: str
    """"gptq" (zero points minus one) or "gptq_v2"."""
    carries: bool
    """Whether the ones were subtracted from whole words, as GPTQModel does."""
    linears: tuple[str, ...]
    """Names of what is quantized."""
    made_by: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    """What else is known of how it was quantized."""

    @property
    def own_scheme(self) -> OwnScheme:
        """The scheme of the weights, under the name of a method of its own."""
        grouped = self.group_size > 0
        scheme = Scheme(
            wbits=self.bits,
            group_size=self.group_size,
            w_granularity="group" if grouped else "channel",
            grid="gptq_sym" if self.sym else "asym",
        )
        parameters = {"act_order": self.act_order, **dict(self.settings)}
        return OwnScheme(
            scheme, BaselineSpec(name="gptq (stored)", parameters=parameters), trained=False
        )

    def lines(self) -> list[str]:
        """What was decided about the checkpoint, a line each."""
        zeros = "as they are" if self.version == V2 else "minus one"
        if self.version == V1:
            zeros += ", subtracted from whole words" if self.carries else ", each wrapping"
        groups = f"groups of {self.group_size}" if self.group_size > 0 else "whole rows"
        order = "act-order" if self.act_order else "columns in order"
        return [
            f"weights: {self.bits}-bit codes in {len(self.linears)} matrices, unpacked once; "
            f"{'symmetric' if self.sym else 'asymmetric'}, {groups}, {order}",
            f"zero points: stored {zeros} ({self.version})",
            f"quantized elsewhere: by {self.made_by or 'a library that left no name'}; errors "
            "against the full-precision weights are not known",
        ]

    def parameters(self, tensors: Mapping[str, Stored], tied: bool) -> int:
        """Number of weights: a word of codes holds 32 / bits, scales and the like are none."""
        packed = {f"{name}.{part}" for name in self.linears for part in PARTS}
        total = sum(
            math.prod(stored.shape)
            for name, stored in once(tensors, tied).items()
            if name not in packed
        )
        codes = (math.prod(tensors[f"{name}.qweight"].shape) for name in self.linears)
        return total + sum(words * WORD // self.bits for words in codes)

    def stored_bits(self, tensors: Mapping[str, Stored], linear: str, indexed: bool) -> float:
        """Bits of a linear's tensors as they are stored; g_idx counts where it says something."""
        wanted = PARTS if indexed else PARTS[:3]
        found = (tensors[f"{linear}.{part}"] for part in wanted)
        return float(sum(8 * _BYTES[s.dtype] * math.prod(s.shape) for s in found))


def damage(layers: Iterable[LayerReport]) -> list[str]:
    """A sentence about zero points that were lost when a checkpoint was packed, if any were."""
    counts = [count for layer in layers if (count := layer.extra.get(DAMAGED))]
    if not counts:
        return []
    return [
        f"{sum(counts)} words of zero points in {len(counts)} matrices end in ones, as AutoGPTQ "
        "leaves them where a zero point is 0: it loses those after it, and these weights are then "
        "wrong in the file"
    ]


def quantize_config(folder: Path) -> dict[str, Any]:
    """quantize_config.json of a folder, empty where there is none."""
    path = folder / CONFIG
    return files.read_json(path) if path.is_file() else {}


def weight_files(folder: Path) -> list[Path]:
    """Weights under the names AutoGPTQ gave them, such as ``gptq_model-4bit-128g.safetensors``.

    Raises:
        QBenchError: where several files might be meant.
    """
    named = quantize_config(folder).get("model_file_base_name")
    if named and (folder / f"{named}.safetensors").is_file():
        return [folder / f"{named}.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise QBenchError(
            f"{folder} holds {len(found)} safetensors files and no index that says which belong "
            f"together; name the one to read model.safetensors, or in {CONFIG} as "
            "model_file_base_name"
        )
    return found


def entry_of(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any] | None:
    """What the configuration says of a GPTQ checkpoint; None for a checkpoint of another kind.

    Raises:
        QBenchError: where config.json and quantize_config.json contradict each other.
    """
    inside = config.get("quantization_config")
    if inside is not None and not isinstance(inside, Mapping):
        return None  # said elsewhere
    if inside:
        if inside.get("quant_method") != METHOD:
            return None
        beside = quantize_config(folder)
        for key in _AGREE:
            if key in beside and key in inside and beside[key] != inside[key]:
                raise QBenchError(
                    f"{folder}: config.json says {key} {inside[key]!r} and {CONFIG} says "
                    f"{beside[key]!r}; correct the wrong one"
                )
        return {**beside, **inside}
    beside = quantize_config(folder)
    return beside if "bits" in beside else None


def detect(
    name: str, entry: Mapping[str, Any] | None, tensors: Mapping[str, Stored]
) -> GPTQFormat | None:
    """The format of a GPTQ checkpoint, or None for a checkpoint of another kind.

    Args:
        name: how messages call the checkpoint.
        entry: from :func:`entry_of`.
        tensors: every stored tensor by name; empty where headers cannot be read (pickles).

    Raises:
        QBenchError: for a packing that is not read here, or files that are not what was said.
    """
    if entry is None:
        return None
    _check_packing(name, entry)
    bits, group_size = entry["bits"], entry.get("group_size", -1)
    if not tensors:
        raise QBenchError(
            f"{name} is a GPTQ checkpoint with pickled weights, whose packing cannot be checked; "
            "convert them to safetensors"
        )
    linears = tuple(sorted(n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")))
    if not linears:
        raise QBenchError(
            f"{name} says it is quantized by GPTQ but holds no tensor called qweight; fetch it "
            "again, or correct its configuration"
        )
    meta = entry.get("meta") or {}
    made_by = meta.get("quantizer") or "" if isinstance(meta, Mapping) else ""
    made_by = made_by if isinstance(made_by, str) else ", ".join(map(str, made_by))
    version = str(entry.get("checkpoint_format") or entry.get("format") or V1)
    found = GPTQFormat(
        bits=bits,
        group_size=group_size,
        sym=bool(entry.get("sym", True)),
        act_order=bool(entry.get("desc_act", False)),
        version=version,
        carries=version == V1 and "gptqmodel" in made_by.lower() and bits != 3,
        linears=linears,
        made_by=made_by,
        settings=tuple(_settings(entry, meta if isinstance(meta, Mapping) else {})),
    )
    mixed = bool(entry.get("dynamic"))
    for linear in linears:
        _check_shapes(name, linear, found, tensors, mixed)
    return found


def _check_packing(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse what is packed in another way."""
    method = entry.get("quant_method", METHOD)
    version = entry.get("checkpoint_format") or entry.get("format") or V1
    if entry.get("is_marlin_format"):
        version = "marlin"
    bits, group_size = entry.get("bits"), entry.get("group_size", -1)
    problem = ""
    if method != METHOD:
        problem = f"quant_method {method}"
    elif version not in FORMATS:
        problem = f"checkpoint_format {version}"
    elif str(entry.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        problem = f"pack_dtype {entry['pack_dtype']}"
    elif bits not in BITS:
        problem = f"{bits!r} bits"
    if problem:
        raise QBenchError(
            f"{name} is quantized already, with {problem}; what is read here is quant_method gptq "
            f"in checkpoint_format {' or '.join(FORMATS)}, int32 words, "
            f"{', '.join(map(str, BITS))} bits; give such a one, or its full-precision original"
        )
    is_size = isinstance(group_size, int) and (group_size == -1 or group_size > 0)
    check_entry(name, "group_size", group_size if is_size else str(group_size), int, "-1 or a size")


def _settings(entry: Mapping[str, Any], meta: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Hyperparameters that the configuration names, in the words of qbench."""
    words = {"damp_percent": "percdamp", "static_groups": "static_groups"}
    words |= {"true_sequential": "true_sequential"}
    both = {**meta, **entry}
    simple = (bool, int, float)
    return [(own, both[key]) for key, own in words.items() if isinstance(both.get(key), simple)]


def _check_shapes(
    name: str, linear: str, fmt: GPTQFormat, tensors: Mapping[str, Stored], mixed: bool
) -> None:
    """Refuse tensors that do not belong together."""
    missing = [part for part in PARTS[:3] if f"{linear}.{part}" not in tensors]
    if missing:
        raise QBenchError(f"{name}: {linear} has a qweight but no {missing[0]}; fetch it again")
    codes, zeros, scales = (tensors[f"{linear}.{part}"] for part in PARTS[:3])
    index = tensors.get(f"{linear}.g_idx")
    rows, outputs = codes.shape if len(codes.shape) == 2 else (0, 0)
    inputs = index.shape[0] if index and index.shape[0] else rows * WORD // fmt.bits
    groups = 1 if fmt.group_size < 0 else math.ceil(inputs / fmt.group_size)
    expected = {
        "qweight": (codes, ("I32",), (inputs * fmt.bits // WORD, outputs)),
        "qzeros": (zeros, ("I32",), (groups, outputs * fmt.bits // WORD)),
        "scales": (scales, ("F16", "BF16", "F32"), (groups, outputs)),
    }
    for part, (stored, kinds, shape) in expected.items():
        if stored.dtype in kinds and stored.shape == shape:
            continue
        why = (
            "layers of different widths (an entry dynamic) are not read"
            if mixed
            else "the file is damaged or its configuration wrong"
        )
        raise QBenchError(
            f"{name}: {linear}.{part} is {stored.dtype} {list(stored.shape)} where {fmt.bits} bits "
            f"and group_size {fmt.group_size} make {kinds[0]} {list(shape)}; {why}"
        )
    if not (index and index.shape[0]) and fmt.act_order and fmt.group_size > 0:
        raise QBenchError(
            f"{name}: {linear} has no g_idx, without which nobody knows which group an input "
            "belongs to after act-order (desc_act); fetch a checkpoint that has it"
        )
