"""The public interface: what each room lists in __all__, with its signatures, is that of tests/api.txt.

A change of it is seen in the difference of that file. `python -m tests.test_api` writes it anew.
"""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

ROOMS = ("", "ops", "models", "temporal", "memory", "video", "corpus", "hosts", "hosts.language")
LIST = Path(__file__).parent / "api.txt"
SPECIAL = ("__init__", "__call__", "__enter__", "__getitem__", "__iter__", "__len__")


def public() -> dict[str, object]:
    """What users may name, by its full name; the shortest of them."""
    found: dict[str, object] = {}
    for room in ROOMS:
        module = importlib.import_module("pyvidx" + ("." + room) * bool(room))
        for name in module.__all__:
            thing = getattr(module, name)
            if not any(thing is other for other in found.values()):
                found[f"{module.__name__}.{name}"] = thing
    return found


def is_function(thing: object) -> bool:
    return inspect.isfunction(thing) or inspect.ismethod(thing)


def definition(thing: object) -> ast.stmt | None:
    """The source of a function or a class; none of a module or a value."""
    if not is_function(thing) and not inspect.isclass(thing):
        return None
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def signatures(name: str, node: ast.stmt):
    """(name, function) of a function, or of the public methods of a class and the special ones that users call."""
    if isinstance(node, ast.FunctionDef):
        yield name, node
    for one in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(one, ast.FunctionDef) and (not one.name.startswith("_") or one.name in SPECIAL):
            yield f"{name}.{one.name}", one


def lines() -> list[str]:
    """One line for each name, method and field."""
    out = []
    for name, thing in public().items():
        node = definition(thing)
        if not isinstance(node, ast.FunctionDef):
            bases = f"({', '.join(map(ast.unparse, node.bases))})" if isinstance(node, ast.ClassDef) else ""
            kind = "class" if bases or inspect.isclass(thing) else type(thing).__name__
            out.append(f"{name}: {kind}{bases}")
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.target).startswith("_"):
                out.append(f"{name}.{ast.unparse(field)}")
        for full, function in signatures(name, node) if node else ():
            out.append(f"{full}({ast.unparse(function.args)}) -> {ast.unparse(function.returns or ast.Constant(None))}")
    return sorted(out)


def test_the_interface_is_the_listed_one():
    assert lines() == LIST.read_text().splitlines(), "the public interface changed: python -m tests.test_api, and look"


def test_every_public_signature_is_typed():
    """Each parameter and each result, so that a type checker can tell a user's mistake."""
    bare = []
    for name, thing in public().items():
        for full, f in signatures(name, node) if (node := definition(thing)) else ():
            arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, f.args.vararg, f.args.kwarg]
            bare += [f"{full}: {a.arg}" for a in arguments if a and not a.annotation and a.arg not in ("self", "cls")]
            bare += [f"{full} ->"] if f.returns is None and f.name != "__init__" else []
    assert not bare, "\n".join(bare)


def test_public_names_are_documented():
    """What a room lists in __all__ has a docstring, and so have the public methods that its classes add."""
    bare = []
    for name, thing in public().items():
        bare += [name] if callable(thing) and not thing.__doc__ else []
        own = vars(thing) if isinstance(thing, type) else {}
        bare += [
            f"{name}.{method}"
            for method, f in own.items()
            if inspect.isfunction(f) and not method.startswith("_") and not inspect.getdoc(getattr(thing, method))
        ]
    assert not bare, bare


if __name__ == "__main__":
    LIST.write_text("\n".join(lines()) + "\n")
