"""Does a wheel run where it says? In fresh environments, without this source tree: python cmake/wheel_check.py

    python cmake/wheel_check.py [--wheels dist] [--pythons 3.10 3.11 ...] [--torch 2.10.0 2.11.0 ...]
                                [--transformers 5.17.0 5.20.2 ...] [--floor] [--out FILE.json]

One environment per pair of --pythons and --torch (the lists go side by side; "newest" is what pip takes). In each:

    info    pyvidx info: every op has its kernel, or (pure wheel) runs its reference and says so
    ops     tests/ops against the installed wheel
    demo    pyvidx demo
    hosts   tests/hosts with each transformers of --transformers; before 5.20.2, which does not take the
            encoded video of every model, the tests of its towers and language models, and that it is refused
    floor   with --floor, in the first environment: the oldest version of every package that pyproject.toml allows, and
            the tests of files, video, encoding and one host

FILE.json (bench/results) is written after every step: a row for each wheel, Python and torch, in the place of an older
one. Its table is printed, and docs/cases/wheels.md has it (python -m bench.pages). An environment of a CUDA torch takes
several GB: --envs names the folder, and they are removed one by one but for --keep. The exit status is 1 where a step
failed or an environment could not be made; a Python that is not at hand is told and left out.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.pages.wheels import table  # noqa: E402
from pyvidx.files import write_json  # noqa: E402

TOOLS = ["pytest", "pytest-timeout", "pytest-benchmark", "hypothesis"]
HOSTS = ["tests/hosts/test_compress.py", "tests/hosts/test_session.py", "tests/hosts/test_attached.py"]
BEFORE_ENCODED = ["tests/hosts/test_old.py", *(f"tests/test_{name}.py" for name in ("llava", "backbones", "language"))]
# Not taken over: pyvidx itself, and a torchvision that may not fit its torch, with what needs it.
HIDDEN = ("pyvidx", "__editable__", "torchvision", "open_clip")
# Taken out where PyPI's torchvision is for another build of torch.
NEED_VISION = ("torchvision", "open_clip_torch", "timm")
FLOOR = ["tests/test_files.py", "tests/test_encode.py", "tests/test_video.py", "tests/hosts/test_compress.py"]


def extras(names: list[str]) -> list[str]:
    """The requirements of pyvidx and of some of its extras, as pyproject.toml has them."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^dependencies = (\[.*?\])", text, re.M | re.S)[1]
    lists = [found] + [re.search(rf"^{name} = (\[.*?\])", text, re.M | re.S)[1] for name in names]
    return [requirement for one in lists for requirement in re.findall(r'"([^"]+)"', one)]


def interpreter(version: str) -> str | None:
    """A Python of that version: in PATH, or among pyenv's."""
    for found in [
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]:
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


class Environment:
    """A virtual environment outside of the source tree, where nothing but the wheel can be imported as pyvidx."""

    def __init__(self, folder: Path, python: str, outer: Path | None = None):
        """outer: a folder of packages to use instead of installing them; not those of HIDDEN."""
        self.python, self.folder, self.outer = folder / "bin/python", folder, outer
        self.work = folder / "work"
        if not self.python.exists():
            subprocess.check_call([python, "-m", "venv", *(["--without-pip"] if outer else []), folder])
        if outer:
            (packages := folder / "outer").mkdir(exist_ok=True)
            for found in outer.iterdir():
                if not found.name.startswith(HIDDEN):
                    packages.joinpath(found.name).symlink_to(found)
            (site,) = folder.glob("lib/python*/site-packages")
            site.joinpath("outer.pth").write_text(f"{packages}\n")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        for room in ("tests", "bench"):
            shutil.copytree(ROOT / room, self.work / room, ignore=shutil.ignore_patterns("__pycache__", "results"))
        self.work.joinpath("pytest.ini").write_text(
            "[pytest]\npythonpath = .\naddopts = --timeout=600\nmarkers = slow\n    gpu\n"
        )

    def pip(self, *packages: str) -> tuple[bool, str]:
        pip = [sys.executable, "-m", "pip", "--python", self.python] if self.outer else [self.python, "-m", "pip"]
        return self.run([*pip, "install", "-q", *packages], 3600)

    def run(self, command: list, seconds: int, path: str = "") -> tuple[bool, str]:
        """Whether a command ended well, and what it said."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYVIDX_")}
        env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(list(map(str, command)), cwd=self.work, env=env, text=True, errors="replace",
                                  timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        except subprocess.TimeoutExpired:
            return False, f"did not end in {seconds} s"
        return done.returncode == 0, done.stdout

    def version(self, package: str, path: str = "") -> str:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return self.run([self.python, "-c", code], 60, path)[1].strip().splitlines()[-1]

    def tests(self, names: list[str], path: str = "") -> tuple[bool, str]:
        command = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *names]
        well, said = self.run(command, 1800, path)
        counts = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|error|skipped)[^\n]*?) in [\d.]+ ?s", said, re.M)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
        return well, "; ".join([*failed, *counts[-1:]]) or said[-1500:]

    def info(self, pure: bool) -> tuple[bool, str]:
        well, said = self.run([self.folder / "bin/pyvidx", "info", "--json"], 300)
        if not well:
            return False, said[-1500:]
        info = json.loads(said[said.index("{") :])
        kernels = sum(on["cpu"]["runs"] == "kernel" for on in info["ops"].values())
        right = bool(info["build"]["library_error"]) if pure else kernels == len(info["ops"])
        cuda = " ".join(info["build"]["cuda_archs"])
        return right, f"{kernels} of {len(info['ops'])} kernels" + (f", CUDA for {cuda}" if cuda else "")

    def demo(self) -> tuple[bool, str]:
        well, said = self.run([self.folder / "bin/pyvidx", "demo", "--out", self.work / "demo", "--overwrite"], 900)
        return well, "" if well else said[-1500:]


def check(environment: Environment, wheel: Path, row: dict, options, floor: bool, save) -> None:
    """Fill a row, step by step."""

    def step(name: str, do) -> bool:
        began = time.perf_counter()
        well, said = do()
        row["steps"][name] = {"ok": well, "said": said, "seconds": round(time.perf_counter() - began, 1)}
        print(f"  {name}: {'ok' if well else 'FAILED'}: {said}", flush=True)
        save()
        return well

    pip, pure = environment.pip, "none-any" in wheel.name
    if not step("install", partial(pip, "--force-reinstall", "--no-deps", str(wheel))):
        return
    row["torch"] = environment.version("torch")
    if not step("info", partial(environment.info, pure)):
        return
    sample = ["--sample", str(options.sample)] if options.sample else []
    step("ops", partial(environment.tests, ["tests/ops", *sample]))
    step("demo", environment.demo)
    for version in options.transformers:
        path = "" if version == "newest" else str(environment.folder / f"transformers-{version}")
        if path and not Path(path).exists():
            if not step(f"hosts {version}: install", partial(pip, "--target", path, f"transformers=={version}")):
                shutil.rmtree(path, ignore_errors=True)
                continue
        have = environment.version("transformers", path)
        takes_encoded = tuple(map(int, re.findall(r"\d+", have)[:3])) >= (5, 20, 2)
        names = HOSTS if takes_encoded else BEFORE_ENCODED
        step(f"hosts {have}", partial(environment.tests, [*names, *sample], path))
    if floor:
        oldest = [re.sub(r">=\s*", "==", r) for r in extras(["video", "hosts", "cli"]) if not r.startswith("torch")]
        if step("floor: install", partial(pip, *oldest)):
            step("floor", partial(environment.tests, [*FLOOR, *sample]))


def kind(wheel: Path) -> str:
    return "pure" if "none-any" in wheel.name else "CUDA" if "+" in wheel.name else "CPU"


def same(one: dict, other: dict) -> bool:
    """Whether two rows are of one wheel, Python and torch ("2.13.0" is "2.13.0+cpu", too)."""
    return all(one[k].split("+")[0] == other[k].split("+")[0] for k in ("kind", "python", "torch"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, nargs="*", default=[ROOT / "dist"], help="wheels, or folders of them")
    parser.add_argument("--pythons", nargs="*", default=["3.10", "3.11", "3.12", "3.13"])
    parser.add_argument("--torch", nargs="*", default=["2.10.0", "2.13.0", "2.11.0", "newest"])
    parser.add_argument("--transformers", nargs="*", default=["newest"])
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--sample", type=int, help="at most so many cases of every parametrized test")
    parser.add_argument("--envs", type=Path, default=ROOT / "build/wheel-check")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if len(options.pythons) != len(options.torch):
        parser.error(f"--pythons and --torch go side by side, got {len(options.pythons)} and {len(options.torch)}")
    found = [w for given in options.wheels for w in (sorted(given.rglob("*.whl")) if given.is_dir() else [given])]
    wheels = sorted(found, key=lambda wheel: kind(wheel) != "pure")  # the last is the floor's, whose packages stay
    out = options.out or ROOT / f"bench/results/wheels-{datetime.date.today()}.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True).stdout
    results = json.loads(out.read_text()) if out.exists() else {"rows": []}
    results["sample"] = options.sample
    first, rows, unmade = True, [], 0
    for version, torch in zip(options.pythons, options.torch):
        if (python := interpreter(version)) is None:
            print(f"Python {version}: not at hand", file=sys.stderr)
            continue
        environment = Environment(options.envs.resolve() / f"py{version}-torch{torch}", python)
        wanted = "torch" if torch == "newest" else f"torch=={torch}"
        vision = extras(["video", "hosts", "cli"])
        packages = [r for r in vision if not r.startswith("torch")]
        well, said = environment.pip("-U", wanted, *packages, "torchvision", *TOOLS)
        if not well:
            print(f"Python {version}, torch {torch}: {said[-2000:]}", file=sys.stderr)
            unmade += 1
            continue
        if not environment.run([environment.python, "-c", "import torchvision"], 300)[0]:
            environment.run([environment.python, "-m", "pip", "uninstall", "-qy", *NEED_VISION], 300)
        for wheel in wheels:
            print(f"{wheel.name}, Python {version}, torch {torch}", flush=True)
            row = {"kind": kind(wheel), "python": version, "torch": torch, "wheel": wheel.name,
                   "bytes": wheel.stat().st_size, "commit": commit.strip(), "steps": {}}  # fmt: skip
            rows.append(row)
            results["rows"] = [r for r in results["rows"] if not same(r, row)] + [row]
            floor = options.floor and first and wheel == wheels[-1]
            check(environment, wheel, row, options, floor, partial(write_json, out, results, indent=1))
        first = False
        if not options.keep:
            shutil.rmtree(environment.folder)
    print(table(results))
    return 0 if rows and not unmade and all(s["ok"] for row in rows for s in row["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
