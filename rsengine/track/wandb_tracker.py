"""Weights & Biases, in the mode that WANDB_MODE or its login gives; its local files lie in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from rsengine.run.files import write_atomically
from rsengine.track import TrackedRun

ID_FILE = ".wandb-id"


class WandbTracker:
    """One run in the project ``rsengine``, or in $WANDB_PROJECT. A resumed run goes on in the same one."""

    def begin(self, run: TrackedRun) -> None:
        import os

        import wandb

        identity = run.folder / ID_FILE
        same = identity.read_text() if run.step and identity.exists() else None
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rsengine"),
            name=run.name,
            dir=run.folder,
            config=dict(run.settings),
            id=same,
            resume="allow" if same else None,
            settings=wandb.Settings(console="off", silent=True),  # the lines and the bar of the run stay as they are
        )
        self.image = wandb.Image
        write_atomically(identity, self.run.id.encode())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            self.run.log({name: self.image(picture.convert("RGB"))}, step=step)

    def finish(self, result: Mapping[str, float], completed: bool) -> None:
        self.run.summary.update(dict(result))
        self.run.finish(exit_code=0 if completed else 1)


make = WandbTracker
