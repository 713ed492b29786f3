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


class Observer(ABC):
    """Accumulates one statistic over a stream of inputs."""

    name: ClassVar[str]

    @abstractmethod
    def update(self, x: Tensor, n_sequences: int) -> None:
        """See inputs (tokens, in_features), float32, that came from ``n_sequences`` sequences."""

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
    """H = (2/n) Σ x xᵀ over all tokens, n sequences; (in_features, in_features), float32."""

    name = "hessian"

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.sequences = 0

    def update(self, x: Tensor, n_sequences: int) -> None:
        """Fold one batch into the running mean, which never outgrows its final size."""
        before, self.sequences = self.sequences, self.sequences + n_sequences
        if self.value is None:
            self.value = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.value.mul_(before / self.sequences)
        scaled = x * (2.0 / self.sequences) ** 0.5
        self.value.addmm_(scaled.T, scaled)

    def result(self) -> Tensor | None:
        """The mean so far."""
        return self.value


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

    def update(self, x: Tensor, n_sequences: int | None = None) -> None:
        """Show inputs (sequences, tokens, in_features), or one sequence (tokens, in_features).

        ``n_sequences`` is for inputs that lost the count: some blocks flatten (sequences, tokens).
        """
        if n_sequences is None:
            n_sequences = x.shape[0] if x.ndim == 3 else 1
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if not flat.shape[0]:
            return
        self._cache.clear()
        self.n_tokens += flat.shape[0]
        self.n_sequences += n_sequences
        for observer in self._observers.values():
            observer.update(flat, n_sequences)

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
