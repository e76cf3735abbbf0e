"""Protocols of the public benchmarks: tasks as data, metrics, and writers. Annotations and videos are the user's."""

from pyvidx.eval.tasks import Task, names, task

__all__ = ["Task", "names", "task"]
