"""Training: tasks in, experts out."""

from adaptlib.training.loop import train
from adaptlib.training.masks import SELECTIONS
from adaptlib.training.options import SCHEDULES, TrainOptions
from adaptlib.training.plan import KINDS, Plan, plan
from adaptlib.training.readers import read_task, read_tasks
from adaptlib.training.run import Progress
from adaptlib.training.tasks import Chat, Message, Row, Task, Text, prompt

__all__ = [
    "KINDS",
    "SCHEDULES",
    "SELECTIONS",
    "Chat",
    "Message",
    "Plan",
    "Progress",
    "Row",
    "Task",
    "Text",
    "TrainOptions",
    "plan",
    "prompt",
    "read_task",
    "read_tasks",
    "train",
]
