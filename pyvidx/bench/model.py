"""The time of a launch from what its blocks do: three limits, joined, and what a launch costs by itself.

For a launch of N blocks on a GPU of S multiprocessors, which hold R of its blocks each (registers, shared memory,
warps):

    bandwidth  bytes / (bandwidth * copy_share), or what passes through L2 / its rate, if that is more
    issue      ceil(N / S) * cycles that a block keeps the busiest unit of a scheduler / clock
    latency    ceil(N / (S R)) * cycles of a block that is alone / clock
    time       launch + (bandwidth^p + issue^p + latency^p)^(1/p)

A copy of the same bytes takes launch + bandwidth alone. The limit that is named is the largest; "tail" where that is
issue or latency and these would be a quarter smaller if the blocks could be divided evenly; "launches" where those
after the first cost more than half of the time by which a copy is faster.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("gpus.json")
LIMITS = ("bandwidth", "issue", "latency")


@dataclass(frozen=True)
class Gpu:
    """A row of gpus.json with those of its architecture and of the model; every field is explained there."""

    name: str
    arch: int
    sms: int
    clock_ghz: float
    bandwidth_gbs: float
    l2_bytes_per_clock: float
    registers: int
    shared_kb: int
    shared_reserved: int
    warps: int
    blocks: int
    latency: dict
    units: list
    copy_share: float
    l2_share: float
    launch_us: float
    sharpness: float

    def copy_us(self, moved: int) -> float:
        """A copy that moves so many bytes in all."""
        return self.launch_us + moved / (self.bandwidth_gbs * self.copy_share) / 1e3


def gpus(archs: list[int] | None = None) -> list[Gpu]:
    """Those of gpus.json, of some architectures."""
    data = json.loads(FILE.read_text())
    found = [Gpu(name, **row, **data["archs"][str(row["arch"])], **data["model"]) for name, row in data["gpus"].items()]
    return [gpu for gpu in found if archs is None or gpu.arch in archs]


def resident(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once by CUDA's occupancy rules: registers go to warps by 256, a quarter of
    them to each of four schedulers; shared memory by 128 bytes, on sm_70 by 256.

    Raises:
        ValueError: not even one fits.
    """
    warps = math.ceil(threads / 32)
    of_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    by_registers = gpu.registers // 4 // of_warp * 4 // warps
    unit = 256 if gpu.arch == 70 else 128
    of_block = math.ceil((shared + gpu.shared_reserved) / unit) * unit
    by_shared = gpu.shared_kb * 1024 // of_block if of_block else gpu.blocks
    fit = min(by_registers, by_shared, gpu.warps // warps, gpu.blocks)
    if fit < 1:
        asked = f"{threads} threads, {registers} registers and {shared} bytes"
        raise ValueError(f"occupancy: a multiprocessor must hold a block, got one of {asked}")
    return fit


@dataclass(frozen=True)
class Limits:
    """Microseconds of each limit, those of issue and latency if blocks could be divided evenly, and occupancy."""

    bandwidth: float
    issue: float
    latency: float
    even: float
    warps: int  # resident on a multiprocessor

    def time(self, gpu: Gpu) -> float:
        p = gpu.sharpness
        return gpu.launch_us + (self.bandwidth**p + self.issue**p + self.latency**p) ** (1 / p)

    @property
    def name(self) -> str:
        named = max(LIMITS, key=lambda n: getattr(self, n))
        return "tail" if named != "bandwidth" and self.even < 0.75 * getattr(self, named) else named


def limits(gpu: Gpu, launch: dict, moved: float) -> Limits:
    """Those of one launch of a trace that moves so many bytes of device memory."""
    fit = resident(gpu, launch["threads"], launch["registers"], launch["shared"])
    blocks = launch["blocks"]
    passed = (launch["read"] + launch["written"]) * blocks
    per_us = gpu.clock_ghz * 1e3  # cycles
    l2 = passed / (gpu.l2_bytes_per_clock * gpu.l2_share) / per_us
    bandwidth = max(moved / (gpu.bandwidth_gbs * gpu.copy_share) / 1e3, l2)
    units = [u["cycles"] * sum(launch["pipes"].get(p, 0) for p in u["pipes"]) for u in gpu.units]
    busy = [launch["instructions"], *units]
    issue, latency = max(busy) / 4 / per_us, launch["cycles"] / per_us
    whole = (math.ceil(blocks / gpu.sms) * issue, math.ceil(blocks / (gpu.sms * fit)) * latency)
    even = (blocks / gpu.sms * issue, max(1, blocks / (gpu.sms * fit)) * latency)
    warps = min(fit, math.ceil(blocks / gpu.sms)) * math.ceil(launch["threads"] / 32)
    return Limits(bandwidth, *whole, max(even), warps)


def predicted(gpu: Gpu, trace: dict) -> dict:
    """Microseconds and share of copy of a traced case, with its limit."""
    launches = trace["archs"][str(gpu.arch)]
    passed = [(x["read"] + x["written"]) * x["blocks"] for x in launches]
    each = [limits(gpu, x, trace["bytes"] * p / sum(passed)) for x, p in zip(launches, passed)]
    times = [x.time(gpu) for x in each]
    longest = max(range(len(each)), key=lambda i: times[i])
    worst, launch = each[longest], launches[longest]
    us, copy_us = sum(times), gpu.copy_us(trace["bytes"])
    more = (len(launches) - 1) * gpu.launch_us
    return {
        "gpu": gpu.name, "us": us, "copy_us": copy_us, "share": copy_us / us,
        "limit": "launches" if more > (us - copy_us) / 2 else worst.name, "launches": len(launches),
        "warps": worst.warps, "registers": launch["registers"], "rounds": launch["rounds"],
        "per_16_bytes": 16 * sum(x["instructions"] * x["blocks"] for x in launches) * 32 / trace["bytes"],
        "limits_us": {name: getattr(worst, name) for name in LIMITS},
    }  # fmt: skip
