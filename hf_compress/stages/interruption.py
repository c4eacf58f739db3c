"""What a training stage leaves when it is interrupted, and goes on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that holds trainer_state.json, which is written last: a run killed while it saved leaves
    one without."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


class StopAfterSaving(TrainerCallback):
    """Ctrl-C once: finish the step, save a checkpoint, stop; the same command resumes from it. Twice: stop at once.
    In a thread other than the main one, where Python takes no signals, nothing of this."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked, self._say, self._before = False, say, signal.getsignal(signal.SIGINT)
        self._here = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._here:
            self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        if self._here:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._say("  stopping once this step is saved; Ctrl-C again stops at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self.asked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
