"""What is quantized, to how many bits, on which grid and at which granularity.

A scheme has a text form that round-trips: ``W4A16g128``, ``W8A8:w=tensor,a=tensor,static``,
``W4A8KV4``, ``W1.58A8``, and per-layer overrides after semicolons: ``W4A16;*.down_proj=W8A16``.
Sixteen bits always mean "not quantized". ``auto`` fields are filled in by the baseline before
anything runs, so a stored scheme never contains ``auto``.

Left out on purpose: what a grid's codes are (:mod:`qbench.grid`) and where scales come from.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace

from qbench.errors import QBenchError

WEIGHT_BITS = (16, 8, 7, 6, 5, 4, 3, 2, 1.58, 1)
ACTIVATION_BITS = (16, 8, 7, 6, 5, 4, 3, 2, 1)
WEIGHT_GRANULARITIES = ("auto", "tensor", "channel", "group")
ACTIVATION_GRANULARITIES = ("auto", "token", "tensor")

_HEAD = re.compile(r"W(?P<w>\d+(?:\.\d+)?)A(?P<a>\d+)(?:KV(?P<kv>\d+))?(?:g(?P<g>-?\d+))?$")
_FLAGS = ("static", "bmm")
_OPTIONS = {  # option -> field, in the order they are written
    "w": "w_granularity",
    "a": "a_granularity",
    "static": "static",
    "grid": "grid",
    "agrid": "agrid",
    "bmm": "bmm",
}


def format_bits(bits: float) -> str:
    """``4.0`` as "4", ``1.58`` as "1.58"."""
    return f"{bits:g}"


@dataclass(frozen=True)
class Scheme:
    """Bit widths, granularities and grids of one quantized model.

    Raises:
        QBenchError: for a width, granularity or group size that cannot be, naming the value.
    """

    wbits: float = 16
    """Bits per weight; 1.58 is ternary; 16 is not quantized."""
    abits: int = 16
    """Bits of the activations that enter quantized linears; 16 is not quantized."""
    kvbits: int = 16
    """Bits of keys and values as attention reads them (per token and head); 16 is not quantized."""
    group_size: int = -1
    """Input channels that share one weight scale; -1 is the whole row."""
    w_granularity: str = "auto"
    """What shares a weight scale: tensor, channel (one output row) or group."""
    a_granularity: str = "auto"
    """What shares an activation scale: token or tensor."""
    static: bool = False
    """Activation scales fixed at calibration (per tensor) instead of taken from each input."""
    grid: str = "auto"
    """Code set of the weights, by name (see qbench.grid)."""
    agrid: str = "auto"
    """Code set of the activations, by name."""
    bmm: bool = False
    """Also quantize what enters the attention's matmuls: the outputs of the query, key and value
    projections, at ``abits`` (SmoothQuant's ``quantize_bmm_input``)."""
    overrides: tuple[tuple[str, Scheme], ...] = ()
    """(pattern, scheme) pairs; the first shell-style pattern that matches a linear's name wins."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _check_one_of("weight bits", self.wbits, WEIGHT_BITS)
        _check_one_of("activation bits", self.abits, ACTIVATION_BITS)
        _check_one_of("KV-cache bits", self.kvbits, ACTIVATION_BITS)
        _check_one_of("weight granularity", self.w_granularity, WEIGHT_GRANULARITIES)
        _check_one_of("activation granularity", self.a_granularity, ACTIVATION_GRANULARITIES)
        if self.group_size != -1 and self.group_size < 1:
            raise QBenchError(f"group size {self.group_size} is impossible; use -1 or at least 1")
        if self.group_size > 0 and self.w_granularity not in ("auto", "group"):
            raise QBenchError(
                f"group size {self.group_size} contradicts w={self.w_granularity}; drop one of them"
            )
        if self.group_size == -1 and self.w_granularity == "group":
            raise QBenchError("w=group needs a group size, as in W4A16g128")
        if self.static and self.a_granularity == "token":
            raise QBenchError("static activation scales are per tensor; drop a=token or static")
        if self.bmm and self.abits == 16:
            raise QBenchError("bmm quantizes at the activation width; 16 bits leave nothing to do")
        if self.group_size > 0:  # one meaning, one form
            object.__setattr__(self, "w_granularity", "group")
        for pattern, _ in self.overrides:
            if not pattern or pattern != pattern.strip() or set(pattern) & set(";="):
                raise QBenchError(
                    f"override pattern {pattern!r} cannot be written down; it is a linear's name "
                    "with * and ?, without ';' and '='"
                )
        if any(inner.overrides for _, inner in self.overrides):
            raise QBenchError("an override cannot contain overrides; list them one after another")
        if any(inner.kvbits != 16 or inner.bmm for _, inner in self.overrides):
            raise QBenchError("KV bits and bmm belong to the whole model, not to an override")

    @property
    def quantizes_weights(self) -> bool:
        """Whether any weight is below 16 bits."""
        return self.wbits < 16 or any(s.quantizes_weights for _, s in self.overrides)

    @property
    def quantizes_activations(self) -> bool:
        """Whether any activation (keys and values included) is below 16 bits."""
        own = self.abits < 16 or self.kvbits < 16
        return own or any(s.quantizes_activations for _, s in self.overrides)

    @property
    def has_groups(self) -> bool:
        """Whether any weights are quantized in groups."""
        return self.group_size > 0 or any(s.has_groups for _, s in self.overrides)

    @property
    def is_identity(self) -> bool:
        """Whether nothing at all is quantized."""
        return not (self.quantizes_weights or self.quantizes_activations)

    @property
    def needs_static_scales(self) -> bool:
        """Whether activation scales have to be calibrated."""
        own = self.static and self.abits < 16
        return own or any(s.needs_static_scales for _, s in self.overrides)

    @property
    def depends_on_batch(self) -> bool:
        """Whether an activation scale is taken over the whole input tensor at run time.

        Such a model gives a sentence another score in another batch, so in an evaluation the scale
        is taken over each row alone. What ``bmm`` rounds has no static scales, only dynamic ones.
        """
        per_tensor = self.static or self.a_granularity == "tensor"
        own = self.abits < 16 and per_tensor and (self.bmm or not self.static)
        return own or any(s.depends_on_batch for _, s in self.overrides)

    @property
    def label(self) -> str:
        """The widths alone, as papers print them: ``W4A16g128``."""
        kv = f"KV{self.kvbits}" if self.kvbits != 16 else ""
        group = f"g{self.group_size}" if self.group_size != -1 else ""
        return f"W{format_bits(self.wbits)}A{self.abits}{kv}{group}"

    def for_linear(self, name: str) -> Scheme:
        """The scheme of one linear: the first override whose pattern matches, else this one."""
        for pattern, inner in self.overrides:
            if fnmatch.fnmatchcase(name, pattern):
                return inner
        return replace(self, overrides=())

    def __str__(self) -> str:
        """The text form: widths, then every field that differs from its default."""
        options = []
        for option, field in _OPTIONS.items():
            value = getattr(self, field)
            if option in _FLAGS:
                options += [option] if value else []
            elif value not in ("auto", "group"):  # group is said by the head's g128
                options.append(f"{option}={value}")
        text = self.label + (":" + ",".join(options) if options else "")
        return ";".join([text, *(f"{pattern}={inner}" for pattern, inner in self.overrides)])

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read the text form.

        Raises:
            QBenchError: naming the part that cannot be read and a form that can.
        """
        first, *rest = text.strip().split(";")
        overrides = []
        for part in rest:
            pattern, equals, inner = part.partition("=")
            if not (pattern and equals):
                raise QBenchError(
                    f"override {part!r} in scheme {text!r} is not pattern=scheme, "
                    "as in W4A16;*.down_proj=W8A16"
                )
            overrides.append((pattern.strip(), cls.parse(inner)))
        head, _, options = first.partition(":")
        match = _HEAD.match(head.strip())
        if not match:
            raise QBenchError(
                f"cannot read scheme {text!r}; write it like W4A16, W8A8:w=tensor, W4A16g128, "
                "W4A8KV4 or W1.58A8"
            )
        values: dict[str, object] = {
            "wbits": float(match["w"]) if "." in match["w"] else int(match["w"]),
            "abits": int(match["a"]),
            "kvbits": int(match["kv"] or 16),
            "group_size": int(match["g"] or -1),
            "overrides": tuple(overrides),
        }
        for option in filter(None, (o.strip() for o in options.split(","))):
            key, equals, value = option.partition("=")
            if key in _FLAGS and not equals:
                values[key] = True
            elif key in _OPTIONS and key not in _FLAGS and value:
                values[_OPTIONS[key]] = value
            else:
                raise QBenchError(
                    f"unknown option {option!r} in scheme {text!r}; "
                    "known: w=, a=, grid=, agrid=, static, bmm"
                )
        return cls(**values)  # type: ignore[arg-type]

    @property
    def weights_only(self) -> Scheme:
        """The same weights with activations, keys and values left at 16 bits."""
        overrides = tuple((pattern, inner.weights_only) for pattern, inner in self.overrides)
        return replace(
            self, abits=16, kvbits=16, bmm=False, static=False, overrides=overrides
        ).normalized()

    def normalized(self) -> Scheme:
        """The same meaning with every field that has no effect set back to its default.

        Two schemes that quantize alike then have one text form, and so one key in the store.
        """
        changes: dict[str, object] = {}
        if self.wbits >= 16:
            changes |= {"grid": "auto", "w_granularity": "auto", "group_size": -1}
        if self.abits >= 16:
            changes |= {"a_granularity": "auto", "static": False}
            if self.kvbits >= 16:
                changes["agrid"] = "auto"
        changes["overrides"] = tuple((p, s.normalized()) for p, s in self.overrides)
        return replace(self, **changes)  # type: ignore[arg-type]


def _check_one_of(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        shown = ", ".join(str(a) for a in allowed)
        raise QBenchError(f"{what} {value!r} is not offered; choose one of {shown}")
