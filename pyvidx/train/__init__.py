"""Training: a recipe as data, a loop that resumes to the same bits on any number of processes, and tasks for it."""

from pyvidx.train.distributed import Ranks, ranks
from pyvidx.train.loop import State, Stepped, Task, evaluate, train
from pyvidx.train.recipe import Recipe

__all__ = ["Ranks", "Recipe", "State", "Stepped", "Task", "evaluate", "ranks", "train"]
