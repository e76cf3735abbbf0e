"""The rules of the house: what may include what, one name for everything of an op, and files that stay short."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = sorted(p.stem for p in (ROOT / "csrc/include/pyvidx").glob("*.h") if "_cuda(" in p.read_text())
TOP = {
    "setup.py", "csrc", "pyvidx", "bench", "tests", "cmake", "docs", "README.md", "pyproject.toml", "Makefile",
    "LICENSE", "CHANGELOG.md",
}  # fmt: skip
LINES = 500


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    return [ROOT / n for n in names if (ROOT / n).exists()]


def test_top_level():
    extra = {p.relative_to(ROOT).parts[0] for p in tracked()} - TOP
    assert all(name.startswith(".") for name in extra), f"not a room of this house: {sorted(extra)}"


@pytest.mark.parametrize("folder", ["include", "common", "cpu", "cuda"])
def test_kernels_know_no_torch(folder):
    files = [f for f in (ROOT / "csrc" / folder).rglob("*") if f.is_file()]
    assert files
    for f in files:
        bad = re.findall(r'#include\s*[<"](?:torch|ATen|c10|Python|pybind11)\b.*', f.read_text())
        assert not bad, f"{f.relative_to(ROOT)}: {bad}"


def test_bindings_use_the_stable_abi_only():
    for f in (ROOT / "csrc/torch").iterdir():
        bad = re.findall(r'#include\s*[<"](?:ATen|c10|torch/(?!csrc/stable|headeronly))\b.*', f.read_text())
        assert not bad, f"{f.relative_to(ROOT)}: {bad}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_all_its_files(op):
    want = [
        f"csrc/include/pyvidx/{op}.h", f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu", f"csrc/torch/{op}.cpp",
        f"pyvidx/ops/{op}.py", f"tests/ops/test_{op}.py", f"bench/bench_{op}.py",
    ]  # fmt: skip
    missing = [w for w in want if not (ROOT / w).exists()]
    assert not missing, f"{op} lacks {missing}"


def test_files_stay_short():
    long = {}
    for f in tracked():
        if f.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".md", ".txt"} or f.name == "Makefile":
            lines = len(f.read_text().splitlines())
            if lines > LINES:
                long[str(f.relative_to(ROOT))] = lines
    assert not long, f"over {LINES} lines: {long}"


def test_no_list_of_sources_or_architectures_twice():
    """Sources are globbed; architectures and instruction sets stand in cmake/build.json alone."""
    for name in ("setup.py", "cmake/CMakeLists.txt", "cmake/native_build.py", "Makefile"):
        text = (ROOT / name).read_text()
        assert not [op for op in OPS if op in text], name
        assert "x86-64-v" not in text and "sm_80" not in text, name


def test_no_array_of_arrays_of_a_struct_on_a_gpu():
    """The first row of such an array alone gets the initial values of the struct's members from nvcc 12 and 13."""
    texts = {f.name: f.read_text() for f in (ROOT / "csrc/cuda").iterdir()}
    structs = {name for text in texts.values() for name in re.findall(r"\bstruct (\w+)", text)}
    array = re.compile(r"\b(\w+)(?:<[^;(){}]*?>)? (?:\w+\[[^;]*?\](?: = \{\})?, )*\w+\[[^;\]]+\]\[")
    assert array.search("  Levels sum[3][kOwn];")[1] in structs
    found = [(name, m[0]) for name, text in texts.items() for m in array.finditer(text) if m[1] in structs]
    assert not found, found


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_cpu_kernels_leave_nothing_to_share():
    """A function compiled at several instruction-set levels under one name is a crash on an older CPU: every level's
    object must define its entry points and nothing else that a linker could pick."""
    objects = sorted((ROOT / "build/native/kernels/obj").glob("cpu.*.o"))
    if not objects:
        pytest.skip("no build here: python setup.py build_ext --inplace")
    for o in objects:
        level = o.name.split(".")[-2]
        symbols = subprocess.check_output(["nm", "-C", "--defined-only", o], text=True).splitlines()
        # DW.ref.: a pointer to a function of the C++ runtime, the same at every level.
        code = [s for s in symbols if s.split(" ", 2)[1] in "WVuT" and "DW.ref." not in s]
        shared = [s for s in code if f"pyvidx::{level}::" not in s]
        entries = [s for s in shared if level == "baseline" and re.search(r" T pyvidx::\w+_cpu\(", s)]
        assert not set(shared) - set(entries), f"{o.name}: {shared}"


# Rooms of pyvidx, from the ground up: a room imports from those before it only. A __main__ starts all, in any folder.
ROOMS = (
    ("files", "sizes", "device", "spec"), ("tensor_files", "pictures"), ("ops",), ("layers", "video", "preprocess"),
    ("backbones",),
    ("temporal", "memory"), ("models",), ("graphs",), ("reference", "weights", "data"), ("hosts",), ("corpus",),
    ("train",), ("eval",), ("bench",), ("cli",), ("__main__",),
)  # fmt: skip


def arrows() -> dict[str, set[str]]:
    """Which module of pyvidx imports which, inside functions too."""
    files = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts) for f in (ROOT / "pyvidx").rglob("*.py")}
    names = {name.removesuffix(".__init__") for name in files.values()}
    found = {}
    for file, name in files.items():
        wanted = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyvidx":
                assert not node.level, f"{name}: imports are absolute"
                wanted |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in names else node.module
                           for a in node.names}  # fmt: skip
            elif isinstance(node, ast.Import):
                wanted |= {a.name for a in node.names if a.name.split(".")[0] == "pyvidx"}
        found[name.removesuffix(".__init__")] = wanted - {"pyvidx", "pyvidx._C", name}
    return found


def test_rooms_import_downwards():
    rank = {room: i for i, together in enumerate(ROOMS) for room in together}
    up = []
    for name, wanted in arrows().items():
        room = "__main__" if name.endswith(".__main__") else (name.split(".") + [""])[1]
        assert not room or room in rank, f"{room}: which rooms may it import from? ROOMS says"
        for other in wanted:
            into = other.split(".")[1]
            if room and into != room and rank[into] >= rank[room]:
                up.append(f"{name} -> {other}")
    assert not up, "\n".join(up)


def test_no_module_imports_itself_through_others():
    graph = arrows()
    graph = {name: {o for o in wanted if f"{o}.__init__" != name} for name, wanted in graph.items()}
    while free := [name for name, wanted in graph.items() if not wanted & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"circles among {sorted(graph)}"
