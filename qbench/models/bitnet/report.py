"""What was decided about a BitNet checkpoint, in words: printed once, and kept in every record.

Torch-free, from :class:`~qbench.models.bitnet.formats.BitNetFormat` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from qbench.models.bitnet.formats import CODES_PER_BYTE, SCALE, SUB_NORMS, BitNetFormat


@dataclass(frozen=True)
class LoadReport:
    """Every decision about a checkpoint, in words."""

    weights: str
    """How they are stored, and what becomes of them."""
    scale: str
    quantizers: str
    hidden_act: str
    norms: str
    embeddings: str
    mended: tuple[str, ...] = ()
    """What its config.json does not say, or says wrong, and what was done."""

    @classmethod
    def of(cls, fmt: BitNetFormat, latent: bool = False) -> LoadReport:
        """The report of a format; ``latent`` for its latent weights as an ordinary model's."""
        return cls(
            weights="latent, as they are stored" if latent else _weights_text(fmt),
            scale="none" if latent else _scale_text(fmt),
            quantizers=f"none; trained at {fmt.scheme}" if latent else _quantizers_text(fmt),
            hidden_act=fmt.hidden_act,
            norms=_norms_text(fmt),
            embeddings=f"{'tied with' if fmt.tied else 'apart from'} the output head",
            mended=() if latent else fmt.mended,
        )

    def lines(self) -> list[str]:
        """One line for each decision."""
        decided = {
            "weights": self.weights,
            "scale": self.scale,
            "quantizers": self.quantizers,
            "activation function": self.hidden_act,
            "norms": self.norms,
            "embeddings": f"{self.embeddings}, in full precision",
        }
        return [*(f"{k}: {v}" for k, v in decided.items()), *(f"mended: {m}" for m in self.mended)]


def _weights_text(fmt: BitNetFormat) -> str:
    if fmt.storage == "packed":
        return f"ternary codes, {CODES_PER_BYTE} a byte, unpacked once"
    if fmt.storage == "codes":
        return "ternary codes as floating point numbers"
    how = "binary" if fmt.scheme.wbits == 1 else "ternary"
    return f"latent, made {how} once when loaded"


def _scale_text(fmt: BitNetFormat) -> str:
    if fmt.is_latent:
        return "mean |W| of each matrix"
    if fmt.divides:
        return f"stored {SCALE} divides the product (bitlinear): weights are codes / {SCALE}"
    return f"stored {SCALE} multiplies the product (autobitlinear): weights are codes x {SCALE}"


def _quantizers_text(fmt: BitNetFormat) -> str:
    o = dict(fmt.options)
    text = str(fmt.scheme)
    if o.get("weights") == "binary":
        text += "; the matrix' mean is subtracted before the sign (eq. 1)"
        text += ", Sign(0) = 0" if o.get("sign_of_zero") == "zero" else ", Sign(0) = -1"
    if not o.get("rounding", True):
        text += "; activations are clipped and not rounded"
    if o.get("span", "symmetric") != "symmetric":
        text += f"; activations span [0, Q_b] ({o['span']})"
    if o.get("groups", 1) > 1:
        text += f"; {o['groups']} groups with scales of their own"
    return text


def _norms_text(fmt: BitNetFormat) -> str:
    parts = [f"{norm} before {SUB_NORMS[norm]}" for norm in fmt.sub_norms]
    inside = dict(fmt.options).get("norm", "none")
    if inside != "none":
        parts.append(f"{inside} norm without weights inside every linear of the blocks")
    if fmt.norm_eps is not None:
        which = "with" if fmt.norm_weights else "without"
        parts.append(f"RMS norm {which} weights inside every linear of the blocks")
    return ", ".join(parts) or "no sub-norms"
