"""By name: what a folder of the corpus room holds one class each of."""

from collections.abc import Callable
from typing import Any


class Registry(dict[str, Any]):
    """An instance of every registered class by its name. Their `check()` raises RuntimeError if a package is missing.

    Args:
        what: they are, for the error of a name that is none.
    """

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def register(self, name: str) -> Callable[[type], type]:
        """Decorator: make a class known under a name."""

        def known(kind: type) -> type:
            self[name] = kind()
            return kind

        return known

    def named(self, name: str) -> Any:
        """The one of this name, whose packages are here.

        Raises:
            ValueError: there is none of that name.
            RuntimeError: a package is missing.
        """
        if name not in self:
            raise ValueError(f"{self.what} must be one of {', '.join(self)}, got {name!r}")
        self[name].check()
        return self[name]
