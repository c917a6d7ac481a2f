"""Training: tasks in, experts out."""

from adaptlib.training.loop import TrainOptions, train
from adaptlib.training.tasks import Row, Task, prompt, read_task

__all__ = ["Row", "Task", "TrainOptions", "prompt", "read_task", "train"]
