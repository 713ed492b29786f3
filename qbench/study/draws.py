"""What chance decides in a sweep: the calibration texts of its seeds, drawn once each.

Left out: what a method does with a seed (its own randomness).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import QBenchError
from qbench.evaluation.corpora import calibration_windows, is_text_path
from qbench.record import CalibrationSpec
from qbench.study.cells import Cell, Draw

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

KEPT = 1 << 26
"""Bytes of calibration windows that are kept; those of earlier seeds are drawn anew if need be."""


class CalibrationTexts:
    """Token windows of one checkpoint's tokenizer, by what was asked for.

    Args:
        tokenizer: gives the checkpoint's tokenizer.
        context: gives the model's context in tokens, None where it has none.
        data_dir: the user's data folder.
    """

    def __init__(
        self,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        context: Callable[[], int | None],
        data_dir: Path | None,
    ) -> None:
        self._tokenizer, self._context, self._data_dir = tokenizer, context, data_dir
        self._specs: dict[CalibrationSpec, CalibrationSpec] = {}
        self._windows: dict[CalibrationSpec, Tensor] = {}

    def spec(self, asked: CalibrationSpec) -> CalibrationSpec:
        """What was asked for, cut to the model's context, with the hash of its tokens."""
        if asked not in self._specs:
            self.windows(asked)
        return self._specs[asked]

    def windows(self, asked: CalibrationSpec) -> Tensor:
        """Token ids (nsamples, seqlen); the same object as long as they are kept.

        Raises:
            QBenchError: when the corpus is missing or holds no text long enough.
        """
        if asked not in self._windows:
            windows, self._specs[asked] = self._draw(asked)
            while self._windows and windows.nbytes + self._held > KEPT:
                del self._windows[next(iter(self._windows))]
            self._windows[asked] = windows
        return self._windows[asked]

    def clear(self) -> None:
        """Let go of all windows; their hashes stay known."""
        self._windows.clear()

    @property
    def _held(self) -> int:
        return sum(windows.nbytes for windows in self._windows.values())

    def _draw(self, asked: CalibrationSpec) -> tuple[Tensor, CalibrationSpec]:
        context = self._context()
        if context and asked.seqlen > context:
            asked = asked.model_copy(update={"seqlen": context})
        try:
            windows, spec = calibration_windows(self._tokenizer(), asked, self._data_dir)
        except QBenchError as error:
            raise QBenchError(f"calibration: {error}") from error
        if is_text_path(spec.source):  # the tokens' hash is in the key; where the file lies is not
            spec = spec.model_copy(update={"source": Path(spec.source).name})
        return windows, spec


def drawn(cell: Cell, draws: Iterable[Draw], reads_data: bool, is_random: bool) -> Iterator[Cell]:
    """A cell once for everything that chance decides about it; once if it decides nothing."""
    if not (reads_data or is_random):
        yield cell
        return
    own = (
        Draw(draw.calibration if reads_data else None, draw.seed if is_random else None)
        for draw in draws
    )
    yield from (replace(cell, draw=draw) for draw in dict.fromkeys(own))
