"""TensorBoard: event files in the run folder itself, so that ``tensorboard --logdir runs`` lists runs by folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from rsengine.track import TrackedRun


class TensorBoardTracker:
    """Writes scalars, pictures, and what the HPARAMS tab compares: every setting, and the result as its metrics."""

    def begin(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # What a process that was killed wrote after the checkpoint is hidden by what is written now.
        self.writer = SummaryWriter(run.folder, purge_step=run.step + 1 if run.step else None)
        experiment, start, self._end = hparams(dict(run.settings), dict.fromkeys(run.results, 0.0))
        # Not SummaryWriter.add_hparams, which makes another folder, and with it another run, in the list.
        for summary in (experiment, start):
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.step = step
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def finish(self, result: Mapping[str, float], completed: bool) -> None:
        for name, value in result.items():
            self.writer.add_scalar(name, value, getattr(self, "step", 0))
        if completed:
            self.writer.file_writer.add_summary(self._end)
        self.writer.close()


make = TensorBoardTracker
