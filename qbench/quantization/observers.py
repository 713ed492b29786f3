"""Statistics of a linear's input, streamed batch by batch in float32.

An observer sees every calibration batch once and never keeps one. A plugin may bring its own:
subclass :class:`Observer`, give it a ``name``, and list the class among the baseline's statistics.

Source of the hessian's scale: GPTQ 2210.17323 as released, H = (2/n) Σ x xᵀ with n the number of
sequences. The factor cancels in every method here except where dead diagonals are set to the
absolute value 1, so it is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from qbench.errors import unknown

T = TypeVar("T")

PANEL = 256
"""Rows of a hessian that are accumulated together."""
CAST_TOKENS = 1024
"""Tokens of lower precision that are cast to float32 together."""


class Observer(ABC):
    """Accumulates one statistic over a stream of inputs."""

    name: ClassVar[str]

    @abstractmethod
    def update(self, x: Tensor, n_sequences: int) -> None:
        """See inputs (tokens, in_features), float32, that came from ``n_sequences`` sequences.

        Inputs of lower precision arrive in several parts, the sequences counted with the first.
        """

    @abstractmethod
    def result(self) -> Tensor | None:
        """The statistic, or None if nothing was seen."""


class AbsMax(Observer):
    """Largest magnitude of each input channel, (in_features,)."""

    name = "absmax"

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, x: Tensor, n_sequences: int) -> None:
        """Take the running maximum."""
        seen = x.abs().amax(0)
        self.value = seen if self.value is None else torch.maximum(self.value, seen)

    def result(self) -> Tensor | None:
        """The maxima so far."""
        return self.value


class MeanAbs(Observer):
    """Mean magnitude of each input channel, (in_features,)."""

    name = "mean_abs"

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor, n_sequences: int) -> None:
        """Add to the running sum, kept in float64."""
        seen = x.abs().sum(0, dtype=torch.float64)
        self.total = seen if self.total is None else self.total + seen
        self.tokens += x.shape[0]

    def result(self) -> Tensor | None:
        """The means so far, float32."""
        return None if self.total is None else (self.total / self.tokens).float()


class Hessian(Observer):
    """H = (2/n) Σ x xᵀ over all tokens, n sequences; (in_features, in_features), float32.

    H is symmetric: panels of rows are accumulated from their diagonal to the right, half of the
    whole product, and mirrored when H is asked for.
    """

    name = "hessian"

    def __init__(self) -> None:
        self.upper: Tensor | None = None
        """What stands left of a panel on the diagonal is stale until it is mirrored."""
        self.mirrored = True
        self.sequences = 0

    def update(self, x: Tensor, n_sequences: int) -> None:
        """Fold one batch into the running mean, which never outgrows its final size."""
        before, self.sequences = self.sequences, self.sequences + n_sequences
        if self.upper is None:
            self.upper = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        kept, share = before / self.sequences, 2 / self.sequences
        for start in range(0, len(self.upper), PANEL):
            panel = self.upper[start : start + PANEL, start:]
            panel.addmm_(x[:, start : start + PANEL].T, x[:, start:], beta=kept, alpha=share)
        self.mirrored = False

    def result(self) -> Tensor | None:
        """The mean so far; the observer's own matrix, not a copy."""
        if self.upper is not None and not self.mirrored:
            for start in range(0, len(self.upper), PANEL):
                end = start + PANEL
                self.upper[end:, start:end] = self.upper[start:end, end:].T
            self.mirrored = True
        return self.upper


OBSERVERS: dict[str, type[Observer]] = {cls.name: cls for cls in (AbsMax, MeanAbs, Hessian)}


def observer_class(wanted: str | type[Observer]) -> type[Observer]:
    """The class behind a statistic's name; a class stands for itself.

    Raises:
        QBenchError: for an unknown name.
    """
    if isinstance(wanted, type):
        return wanted
    if wanted not in OBSERVERS:
        raise unknown("statistic", wanted, OBSERVERS)
    return OBSERVERS[wanted]


class Statistics:
    """What was seen of one input; linears that read the same tensor share one of these.

    Results are read as attributes or items: ``stats.hessian``, ``stats["absmax"]``. They are None
    where no token arrived (an expert that was never chosen).
    """

    def __init__(self, wanted: tuple[str | type[Observer], ...] = ()) -> None:
        self._observers = {cls.name: cls() for cls in map(observer_class, wanted)}
        self._cache: dict[str, Any] = {}
        self.n_tokens = 0
        self.n_sequences = 0
        self.energies: dict[str, Tensor] = {}
        """Per linear that was seen to compute, Σ |W x|² over all tokens; float32."""

    def anew(self) -> Statistics:
        """The same statistics with nothing worked out from them yet, for another cell."""
        other = Statistics()
        other.__dict__ |= self.__dict__ | {"_cache": {}}
        return other

    def update(self, x: Tensor, n_sequences: int | None = None) -> None:
        """Show inputs (sequences, tokens, in_features), or one sequence (tokens, in_features).

        ``n_sequences`` is for inputs that lost the count: some blocks flatten (sequences, tokens).
        """
        if n_sequences is None:
            n_sequences = x.shape[0] if x.ndim == 3 else 1
        flat = x.detach().reshape(-1, x.shape[-1])
        if not flat.shape[0]:
            return
        self._cache.clear()
        self.n_tokens += flat.shape[0]
        self.n_sequences += n_sequences
        for part in (flat,) if flat.dtype == torch.float32 else flat.split(CAST_TOKENS):
            for observer in self._observers.values():
                observer.update(part.float(), n_sequences)
            n_sequences = 0

    def __getitem__(self, name: str) -> Any:
        return self._observers[name].result()

    def __getattr__(self, name: str) -> Any:
        observers = self.__dict__.get("_observers", {})
        if name in observers:
            return observers[name].result()
        collected = ", ".join(observers) or "none"
        raise AttributeError(
            f"statistic {name!r} was not collected (collected: {collected}); name it in the "
            "baseline's weight_statistics or transform_statistics"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._observers

    def cached(self, key: str, compute: Callable[[], T]) -> T:
        """``compute()`` once, then the same object again: a factorization shared by linears."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]
