"""Predicted times: SASS that is run computes what it should, occupancy is CUDA's, the model's limits, and the page."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyvidx.bench import cases, cubin, execution, known, model, operands, predict, sass, semantics, tables
from pyvidx.cli.bench import main

ROOT = Path(__file__).parents[1]
GPUS = {gpu.name: gpu for gpu in model.gpus()}
PAGE = ROOT / "docs/predictions.md"
COMMITTED = ROOT / "bench/results/predictions.json"


class Recorded(execution.Memory):
    """What is written, byte by byte."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def write(self, addresses, data):
        for address, row in zip(addresses.tolist(), data):
            self.bytes.update((address + i, byte) for i, byte in enumerate(row.tolist()))

    def array(self, like: np.ndarray) -> np.ndarray:
        start = like.ctypes.data
        return np.array([self.bytes[start + i] for i in range(like.nbytes)], np.uint8).view(like.dtype)


def small(arch: int) -> sass.Kernel:
    """A kernel whose block sums rows: out[i] = s[i] + s[i ^ 1], s[i] = sum of in[r, i] over the rows."""
    return sass.parse((ROOT / f"tests/sass/sum_sm{arch}.txt").read_text())["sum_kernel"]


def run_small(arch: int, rows: int, threads: int = 64):
    given, out = torch.rand(rows, threads).numpy(), torch.empty(2, threads).numpy()  # aligned, as tensors are
    pointers = np.array([given.ctypes.data, out.ctypes.data], np.uint64).tobytes()
    parameters = pointers + np.array([rows], np.int32).tobytes()
    launch = execution.Launch("sum_kernel", (2, 1, 1), (threads, 1, 1), 0, parameters)
    memory, program = Recorded(), execution.Program(small(arch), arch)
    counts = [execution.Block(program, launch, i, memory, GPUS["V100"].latency).run() for i in range(2)]
    sums = given.sum(0)
    assert np.allclose(memory.array(out), np.tile(sums + sums[np.arange(threads) ^ 1], 2), rtol=1e-6)
    return counts


@pytest.mark.parametrize("arch", [70, 90])
def test_a_kernel_computes_what_it_should(arch):
    few, many = run_small(arch, 4)[0], run_small(arch, 12)[1]
    assert few.read == 4 * 64 * 4 and many.read == 12 * 64 * 4 and few.written == 64 * 4
    assert (few.rounds, many.rounds) == (4, 12), "each row is waited for"
    loop = (many.instructions - few.instructions) / 8 / 2  # of a row and warp
    assert 5 <= loop <= 8 and many.pipes["float"] - few.pipes["float"] == 8 * 2
    latency = GPUS["V100"].latency["global"]
    assert 8 * latency < many.cycles - few.cycles < 8 * (latency + 40)


def test_what_is_read():
    kernel = small(70)
    first = kernel.instructions[0]
    assert (first.address, first.opcode, first.operands) == (0, "MOV", ["R1", "c[0x0][0x28]"])
    load = next(i for i in kernel.instructions if i.name == "LDG")
    use = next(i for i in kernel.instructions if i.name == "FADD")
    assert load.sets is not None and load.sets in use.waits
    back = [i for i in kernel.instructions if i.name == "BRA" and i.guard]
    assert all(sass.target(i.operands[0]) in kernel.labels for i in back)
    with pytest.raises(ValueError, match="must be text of nvdisasm"):
        sass.parse("nothing")


def test_memory_that_is_not_there():
    launch = execution.Launch("sum_kernel", (1, 1, 1), (32, 1, 1), 0, bytes(16) + np.array([4], np.int32).tobytes())
    with pytest.raises(RuntimeError, match="sum_kernel at .*LDG.*where there is no memory"):
        execution.run(execution.Program(small(70), 70), launch, GPUS["V100"].latency)


def test_constants_of_the_compiler():
    """Those that ptxas puts into a bank of their own; what is in no bank is an error."""
    text = (ROOT / "tests/sass/sum_sm70.txt").read_text()
    section = '\t.section .nv.constant2.sum_kernel,"a",@progbits\n        /*0000*/ \t.byte 0x07, 0x01, 0x00, 0x00\n'
    kernel = sass.parse(section + text)["sum_kernel"]
    assert kernel.constants == {2: bytes([7, 1, 0, 0])} and kernel.instructions == small(70).instructions
    launch = execution.Launch("sum_kernel", (1, 1, 1), (32, 1, 1), 0, bytes(24))
    block = execution.Block(execution.Program(kernel, 70), launch, 0, Recorded(), GPUS["V100"].latency)
    warp = block.warps[0]
    assert operands.integer("c[0x2][0x0]")(warp).tolist() == [0x107]
    warp.file["R"][3] = np.arange(32) % 2 * 4
    warp.active = np.arange(32) % 2 == 0  # what others would read is not there, and not read
    assert operands.integer("c[0x2][R3]")(warp)[warp.active].tolist() == [0x107] * 16
    with pytest.raises(LookupError, match="constant bank 2"):
        operands.integer("c[0x2][0x4]")(warp)


@pytest.mark.parametrize("name, file, register", [("P2R", "P", "R"), ("UP2UR", "UP", "UR")])
def test_predicates_in_a_register(name, file, register):
    launch = execution.Launch("sum_kernel", (1, 1, 1), (32, 1, 1), 0, bytes(24))
    warp = execution.Block(execution.Program(small(70), 70), launch, 0, Recorded(), {}).warps[0]
    warp.file[file][0], warp.file[file][2], warp.file[register][5] = True, True, 0xF0
    semantics.build(name, [f"{register}4", f"{file}R", f"{register}5", "0x6"])(warp, warp.alive)
    assert (warp.file[register][4] == 0xF4).all(), "of the mask's three, that which is set; the rest as it was"


def test_what_the_lanes_of_a_warp_have_together():
    launch = execution.Launch("sum_kernel", (1, 1, 1), (32, 1, 1), 0, bytes(24))
    warp = execution.Block(execution.Program(small(70), 70), launch, 0, Recorded(), {}).warps[0]
    warp.file["R"][1], even = np.arange(32) + 0xFFFF_FF00, np.arange(32) % 2 == 0
    warp.file["P"][1] = np.arange(32) == 3
    for mask, most, least, some in [(warp.alive, 31, 0, True), (even, 30, 0, False), (~even, 31, 1, True)]:
        semantics.build("REDUX.MAX", ["UR4", "R1"])(warp, mask)
        semantics.build("REDUX.MIN", ["UR5", "R1"])(warp, mask)
        semantics.build("VOTEU.ANY", ["UP3", "P1"])(warp, mask)
        assert [int(warp.file["UR"][i][0]) & 255 for i in (4, 5)] == [most, least] and warp.file["UP"][3] == some
    with pytest.raises(operands.Unknown, match="REDUX.MAX.S32"):
        semantics.build("REDUX.MAX.S32", ["UR4", "R1"])


def test_what_numbers_become():
    launch = execution.Launch("sum_kernel", (1, 1, 1), (32, 1, 1), 0, bytes(24))
    warp = execution.Block(execution.Program(small(70), 70), launch, 0, Recorded(), {}).warps[0]
    given = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 3e38, float("inf"), float("nan"), 0.0])
    warp.file["R"][1], warp.file["R"][2] = given.repeat(4).numpy().view(np.uint32), np.float32(2).view(np.uint32)

    def done(opcode, *operands):
        semantics.build(opcode, list(operands))(warp, warp.alive)
        return warp.file["R"][3][: len(given)].copy()

    warp.file["R"][4], warp.file["R"][5], warp.file["R"][6] = 0xFF02_0103, 0xFE01_80FF, 10
    products = {
        "4A.U8.S8": 255 * -2 + 2 * 1 + 1 * -128 + 3 * -1, "4A.U8.U8": 255 * 254 + 2 * 1 + 128 + 3 * 255,
        "2A.LO.U16.U8": 0xFF02 * 0x80 + 0x0103 * 0xFF, "2A.HI.S16.U8": (0xFF02 - 65536) * 254 + 0x0103,
    }  # fmt: skip
    for kind, product in products.items():
        assert done(f"IDP.{kind}", "R3", "R4", "R5", "R6").view(np.int32)[0] == product + 10, kind
    warp.file["R"][4], warp.file["R"][5] = -7 & 0xFFFF_FFFF, 300
    assert done("I2IP.U8.S32.SAT", "R3", "R4", "R5", "R6")[0] == 10 << 16 | 0 << 8 | 255
    warp.file["R"][4] = np.resize(np.array([2**24 + 1, -(2**24) - 1, 2**24 + 3, 7], np.int32).view(np.uint32), 32)
    nearest, up, down = (
        [2.0**24 + a, -(2.0**24) + b, 2.0**24 + c, 7] for a, b, c in [(0, 0, 4), (2, 0, 4), (0, -2, 2)]
    )
    zero = [2.0**24, -(2.0**24), 2.0**24 + 2, 7]
    for mode, values in {"": nearest, ".RP": up, ".RM": down, ".RZ": zero}.items():
        assert done(f"I2F{mode}", "R3", "R4").view(np.float32)[:4].tolist() == values, mode
    with pytest.raises(operands.Unknown, match="PRMT.F4E"):
        done("PRMT.F4E", "R3", "R4", "R5", "R6")
    with np.errstate(over="ignore"):
        relu = torch.from_numpy(done("F2FP.RELU.F16.F32.PACK_AB", "R3", "RZ", "R1").astype(np.uint16)).view(
            torch.float16
        )
    assert torch.equal(relu.nan_to_num(7), given.half().relu().nan_to_num(7))
    halves = torch.from_numpy(done("F2FP.BF16.PACK_AB", "R3", "RZ", "R1").astype(np.uint16)).view(torch.bfloat16)
    assert torch.equal(halves.nan_to_num(7), given.bfloat16().nan_to_num(7)), "of two that are as near the even one"
    least = done("FMNMX", "R3", "R1", "R2", "PT").view(np.float32)
    assert np.array_equal(least, torch.fmin(given, torch.tensor(2.0)).numpy()), "NaN is passed over"
    assert np.isnan(done("FMNMX.NAN", "R3", "R1", "R2", "PT").view(np.float32)[6])


def test_lanes_that_wait_for_each_other():
    launch = execution.Launch("sum_kernel", (1, 1, 1), (32, 1, 1), 0, bytes(24))
    block = execution.Block(execution.Program(small(70), 70), launch, 0, Recorded(), GPUS["V100"].latency)
    warp = block.warps[0]
    first = np.arange(32) == 0
    warp.groups, warp.waiting = {}, {"BAR": (1, first), "B0": (1, ~first)}
    with pytest.raises(RuntimeError, match="sum_kernel: lanes wait for each other at BAR, B0"):
        block.run()


def test_an_unknown_instruction_is_named():
    kernel = small(90)
    kernel.instructions[3].opcode = "TENSORMAGIC.X"
    with pytest.raises(ValueError, match="TENSORMAGIC.X .* of sm_90 in sum_kernel"):
        execution.Program(kernel, 90)


@pytest.mark.parametrize("gpu, threads, registers, shared, blocks", [
    ("V100", 256, 32, 0, 8), ("V100", 256, 64, 0, 4), ("V100", 256, 65, 0, 3), ("V100", 1024, 64, 0, 1),
    ("V100", 128, 255, 0, 2), ("V100", 32, 16, 0, 32), ("V100", 128, 32, 48 << 10, 2), ("V100", 128, 32, 96 << 10, 1),
    ("A100", 256, 128, 0, 2), ("A100", 256, 32, 40 << 10, 4), ("A100", 128, 32, 163 << 10, 1),
    ("H100", 128, 168, 0, 3), ("H100", 256, 32, 227 << 10, 1), ("H100", 256, 32, 100 << 10, 2),
])  # fmt: skip
def test_occupancy(gpu, threads, registers, shared, blocks):
    """As CUDA's occupancy calculator has it."""
    assert model.resident(GPUS[gpu], threads, registers, shared) == blocks


def test_a_block_that_does_not_fit():
    with pytest.raises(ValueError, match="must hold a block"):
        model.resident(GPUS["V100"], 256, 32, 97 << 10)


def launch(**changes) -> dict:
    return {"blocks": 1000, "threads": 256, "registers": 32, "shared": 0, "read": 1e5, "written": 1e5, "cycles": 2000,
            "rounds": 2, "instructions": 5000, "pipes": {"float": 1000}, **changes}  # fmt: skip


def trace(*launches: dict, moved: float = 2e8) -> dict:
    return {"bytes": moved, "archs": {str(arch): list(launches) for arch in (70, 80, 90)}}


def test_limits():
    gpu = GPUS["A100"]
    assert model.predicted(gpu, trace(launch()))["limit"] == "bandwidth"
    assert model.predicted(gpu, trace(launch(instructions=500_000)))["limit"] == "issue"
    assert model.predicted(gpu, trace(launch(pipes={"special": 100_000})))["limit"] == "issue"
    assert model.predicted(gpu, trace(launch(blocks=108 * 8, cycles=1_000_000), moved=2e6))["limit"] == "latency"
    assert model.predicted(gpu, trace(launch(blocks=108 * 8 + 1, cycles=1_000_000), moved=2e6))["limit"] == "tail"
    few = trace(launch(blocks=108), launch(blocks=108), launch(blocks=108), moved=2e7)
    assert model.predicted(gpu, few)["limit"] == "launches"
    one = model.predicted(gpu, trace(launch()))
    assert 0.9 < one["share"] <= 1 and model.predicted(gpu, trace(launch(), launch()))["us"] > one["us"]


@pytest.mark.parametrize("worse", [
    {"instructions": 400_000}, {"cycles": 400_000}, {"registers": 128, "cycles": 50_000}, {"pipes": {"memory": 90_000}},
])  # fmt: skip
@pytest.mark.parametrize("gpu", GPUS)
def test_more_work_takes_longer(gpu, worse):
    before = {**launch(), **({"cycles": worse["cycles"]} if "registers" in worse else {})}
    assert (
        model.predicted(GPUS[gpu], trace({**before, **worse}))["us"] > model.predicted(GPUS[gpu], trace(before))["us"]
    )


def test_goals():
    """A case that is slower than wanted is listed with its limit, another is counted."""
    case = {"op": "st_pool", "shape": {"T": 8}, "dtype": "float16", "case": None}
    fast, slow = (
        {**case, **trace(launch(blocks=108 * 8, read=1e4, written=1e4, cycles=cycles), moved=2e7)}
        for cycles in (2e3, 2e5)
    )
    text = tables.goals([fast, slow], list(GPUS.values()))
    assert "3 of 6 hold" in text and text.count("| st_pool |") == 3 and "| latency |" in text
    assert text.rstrip().endswith(f"* `st_pool`: {tables.REASONS['st_pool']}") and "memory_scan_" not in text
    assert tables.goals([{**slow, "op": "bank_attention"}], list(GPUS.values())).count("0 of 0 hold") == 1


def test_a_faster_gpu_is_faster():
    times = [model.predicted(gpu, trace(launch()))["us"] for gpu in model.gpus()]
    assert times == sorted(times, reverse=True)
    faster = dataclasses.replace(GPUS["V100"], bandwidth_gbs=1800)
    assert model.predicted(faster, trace(launch()))["us"] < times[0]


def test_every_constant_is_explained():
    data = json.loads(model.FILE.read_text())
    names = {*data["model"], *(key for part in ("archs", "gpus") for row in data[part].values() for key in row)}
    assert names == {*data["meaning"]}


def test_every_op_of_gpu_check_is_predicted():
    sys.path.insert(0, str(ROOT))
    from bench.gpu_check import CASES

    modules = {asked.module.removeprefix("bench_") for asked in cases.PAPERS}
    assert {*CASES} - modules == {"encoder", "malmm"}, "models are mostly matrix products of torch"
    names = [predict.name_of(asked) for asked in cases.PAPERS]
    assert len({*names}) == len(names)
    with pytest.raises(ValueError, match="no case has nothing in its name; they are temporal_attention"):
        predict.chosen(["nothing"])
    (one,) = predict.chosen(["st_pool T=8"])  # words as a whole: not "T=80"
    with pytest.raises(ValueError, match="no case has st_pool T=10 in"):
        predict.chosen(["st_pool T=10"])
    assert one.arguments["T"] == 8


# ---- what is committed ----


def test_the_page_is_what_the_committed_predictions_give():
    traces = predict.load(COMMITTED)
    assert {t["op"] for t in traces} and all({*t["archs"]} == {"70", "80", "90"} for t in traces)
    page = PAGE.read_text()
    assert tables.filled(page, tables.markdown(traces, model.gpus())) == page, (
        "python -m pyvidx.bench predict --read bench/results/predictions.json --markdown docs/predictions.md"
    )
    asked = [*cases.PAPERS, *known.simulated_cases()]
    assert [t["case"] for t in traces] == [dataclasses.asdict(a) for a in asked], "predict --json anew"


def test_what_is_read_is_chosen(capsys, tmp_path):
    main(["predict", "--read", str(COMMITTED), "--arch", "90", "--cases", "token_gather B=1"])
    shown = capsys.readouterr().out.split("Against")[0]
    assert shown.count("token_gather") == 2 and "st_pool" not in shown, "on H100 and H200"
    for text in ('{"traces": [{"op": "st_pool"}]}', '{"traces": [{"case": {"size": 1}}]}', '{"traces": 3}', "{}"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="must be what --json wrote"):
            predict.load(tmp_path / "other.json")


def test_what_is_not_understood_costs_no_other_case(capsys, tmp_path, monkeypatch):
    traces, file = predict.load(COMMITTED)[:2], tmp_path / "some.json"
    monkeypatch.setattr(predict, "traced", lambda *given, **more: (traces, ["st_pool: Unknown: TENSORMAGIC"]))
    with pytest.raises(SystemExit, match="not in what was written:\nst_pool: Unknown: TENSORMAGIC"):
        main(["predict", "--json", str(file)])
    assert predict.load(file) == traces
    with pytest.raises(SystemExit):
        main(["predict", "--read", str(file), "--samples", "2"])
    assert "--read runs none" in capsys.readouterr().err


def test_against_the_simulator():
    """Its shares are lower bounds: loads wait for each other there."""
    found = known.against_simulation(predict.load(COMMITTED))
    assert len(found) == len(known.simulated()[2])
    assert all(0 < row["known_share"] < 1 and 0 < row["share"] <= 1 for row in found)
    assert "simulated, not measured" in tables.text(predict.load(COMMITTED), model.gpus([70]))


def test_measured_results_are_compared(tmp_path):
    one = predict.load(COMMITTED)[0]
    case = {k: one[k] for k in ("op", "shape", "dtype")} | {"case": "x", "ms": 0.02, "copy_ms": 0.01}
    head = {"gpu": "NVIDIA H200", "steps": []}
    (tmp_path / "nvidia-h200-2027-01-01.json").write_text(
        json.dumps({**head, "cases": [case, {**case, "op": "other"}]})
    )
    (tmp_path / "emulated.json").write_text(json.dumps({"gpu": "emulated", "cases": [case]}))
    (tmp_path / "cpu.json").write_text(json.dumps({"benchmarks": []}))
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GH200 480GB",
                  "NVIDIA A100-SXM4-40GB"):  # fmt: skip
        (tmp_path / f"{other}.json").write_text(json.dumps({"gpu": other, "steps": [], "cases": [case]}))
    assert {m["gpu"] for m in known.measurements(tmp_path)} == {"H200"}
    (row,) = known.against_measurements(predict.load(COMMITTED), [
        m for m in known.measurements(tmp_path) if m["op"] == one["op"]
    ])[:1]  # fmt: skip
    assert row["gpu"] == "H200" and row["known_us"] == 20 and row["known_share"] == 0.5
    assert tables.compared([row])[0][-2] == f"{row['share'] / 0.5 - 1:+.0%}"
    (tmp_path / "nvidia-a100.json").write_text(json.dumps({**head, "cases": [{"op": "x"}]}))
    with pytest.raises(ValueError, match="must hold cases with op, shape, dtype, ms"):
        known.measurements(tmp_path)


# ---- with the tools ----


def test_without_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(cubin, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="needs a checkout"):
        cubin.check_tools()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install nvidia-cuda-nvdisasm"):
        cubin.nvdisasm()


def usable() -> str | None:
    """Why kernels cannot be compiled and listed here."""
    try:
        cubin.check_tools()
    except (RuntimeError, OSError) as error:
        return str(error)
    from tests.cuda_emu import build

    return "no CUDA headers" if build.native.cuda_headers() is None else None


@pytest.mark.skipif(usable() is not None, reason=str(usable()))
def test_an_op_end_to_end(tmp_path):
    """Launched, compiled, run by its SASS, and predicted."""
    file = tmp_path / "predicted.json"
    command = [sys.executable, "-m", "pyvidx.bench", "predict", "--arch", "90", "--samples", "1"]
    command += ["--cases", "token_gather B=1 T=8", "--json", str(file)]
    text = subprocess.check_output(command, cwd=ROOT, text=True)
    assert "token_gather" in text and "H200" in text and "not measured" in text
    (one,) = predict.load(file)
    for arch, of_arch in one["archs"].items():
        (only,) = of_arch
        assert only["blocks"] * only["written"] == 8 * 77 * 2048 and only["spills"] == 0, arch
        read = only["blocks"] * only["read"]
        assert 2 * 8 * 77 * 2048 < read < 3 * 8 * 77 * 2048, "rows of x and position, and time rows that a block shares"
