"""Training: a recipe as data, a loop that resumes to the same bits on any number of processes, and tasks for it."""

from pyvidx.train.distributed import Ranks, ranks
from pyvidx.train.loop import Stepped, evaluate, train
from pyvidx.train.recipe import Recipe
from pyvidx.train.task import State, Task

__all__ = ["Ranks", "Recipe", "State", "Stepped", "Task", "evaluate", "ranks", "train"]
