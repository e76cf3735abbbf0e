"""What README and docs claim, page by page: CLAIMS are held to results, SETTINGS are no measurements."""

import re
import statistics

from bench.pages import ROOT, Claim, case, claim, pick, result

ZEN4, ZEN5, XEON = "cpu-zen4-2026-11-23", "cpu-zen5-2026-11-26", "cpu-xeon-2026-11-27"
BRANCH, MEMORY, MALMM = "cpu-branch-2026-11-25", "cpu-memory-2026-11-25", "cpu-malmm-2026-11-25"


def tower(kind: str, name: str, threads: int) -> float:
    """Time over pyvidx's, of a plain tower ("frames") or a BT-Adapter."""
    one = pick(result("towers-2026-11-28")["cases"], kind=kind, threads=threads)
    return pick(one["contenders"], name=name)["ratio"]


def malmm(M: int, path: str) -> list[float]:
    """Milliseconds of a frame and how many times the official one's, on a Zen 4 and on a Zen 5."""
    cases = [case(name, op="malmm", path=path, M=M) for name in (MALMM, ZEN5)]
    return [x for c in cases for x in (c["ms_per_frame"], c["vs_reference"])]


def encoder(size: str) -> dict:
    return case(ZEN5, op="encoder", size=size)


def readme() -> list[Claim]:
    stream = malmm(20, "stream")
    int8 = result("int8-2026-11-28")["towers, clip-b-16, 8 frames"]["frames"]["cpu_ms"]
    corpus = result("corpus-20000-2026-11-28")
    return [
        claim("against the official algorithm in torch | {:.1f}x, {:.1f}x | Zen 4, Zen 5", stream[1], stream[3]),
        claim("BT-Adapter L/14, 8 frames, against the official one | {:.1f}x |", encoder("clip-l-14")["vs_eager"]),
        claim("and against torch.compile of it, one thread | {:.2f}x, {:.2f}x |",
              tower("bt_adapter", "official", 1), tower("bt_adapter", "official, torch.compile", 1)),
        claim("against OpenVINO, transformers, float32, one thread | {:.2f}x, {:.2f}x |",
              tower("frames", "openvino", 1), tower("frames", "transformers", 1)),
        claim("the same tower in 8 bits against our float32 | {:.1f}x |", int8["pyvidx"] / int8["pyvidx, int8"]),
        claim("| {:,} clips on two cores, killed three times: clips a second | {:.0f} |",
              corpus["about"]["videos"], corpus["runs"]["killed"]["videos_per_s"]),
    ]  # fmt: skip


def encode() -> list[Claim]:
    int8, corpus = result("int8-2026-11-28"), result("corpus-20000-2026-11-28")
    tower = int8["towers, clip-b-16, 8 frames"]["frames"]
    stream = int8["malmm"]["stream"]["ms"]
    return [
        claim("on a cluster. {:,} small clips on two shared cores", corpus["about"]["videos"]),
        claim("(largest difference {:.0f}e-7) at {:.0f} a second", 1e7 * corpus["compared"]["largest difference"],
              corpus["runs"]["killed"]["videos_per_s"]),
        claim("is {:.1f} times as fast as in float32, cosine {:.4f}",
              tower["cpu_ms"]["pyvidx"] / tower["cpu_ms"]["pyvidx, int8"], tower["cosine"]["pyvidx, int8"]),
        claim("for 44 rows, gains {:.1f} times", stream["float32"] / stream["int8"]),
    ]  # fmt: skip


def hosts() -> list[Claim]:
    found = result("hosts-2026-11-28")
    memory = [row["resident_mib"] for row in found["session"]["rows"]]
    names = {
        "video_llava": "per frame (Video-LLaVA)", "llava_onevision": "per frame (LLaVA-OneVision)",
        "qwen3_vl": "on four levels per two frames",
    }  # fmt: skip
    rows = {name: pick(found["cost"]["rows"], host=name, capacity=16) for name in names}
    return [
        claim("over {:,} of them a process with a tiny model held {:.1f} to {:.1f} MiB",
              found["session"]["rows"][-1]["frames"], min(memory), max(memory)),
        *(claim(f"{text} | {{:.0f}} ms | {{:.1f}} ms | {{:.2f}} % |",
                rows[name]["encoder_ms"], rows[name]["compress_ms"], 100 * rows[name]["share"])
          for name, text in names.items()),
    ]  # fmt: skip


def install() -> list[Claim]:
    return [claim("oneDNN keeps {:.1f} MiB of code", result(ZEN5)["onednn_code"]["mib"])]


def motion() -> list[Claim]:
    study = result("motion-study-2026-11-28/study")
    rows = {}
    for run in study["runs"]:
        rows.setdefault(run["row"]["name"], []).append(run)

    def values(name: str, key: str) -> list[float]:
        of = [run["test"][key] for run in rows[name]]
        return [statistics.mean(of), statistics.stdev(of)] if len(of) > 1 else of

    plain = {"frame mean": "frame mean", "last frame": "last frame alone"}
    spread = {
        "+ 4-layer separate": "+ 4-layer separate space-time", "+ branch": "+ branch", "+ interaction": "+ interaction",
        "BT-Adapter, no mask": "BT-Adapter, no mask", "BT-Adapter, mask 40 %": "BT-Adapter, 40 % masked",
        "BT-Adapter": "BT-Adapter, 70 % masked as published",
        "BT-Adapter, official mask order": "- in the official mask order", "STAN": "STAN", "ST-Adapter": "ST-Adapter",
        "joint space-time, tower trained": "joint space-time, tower trained",
        "CLIP-ViP, tower trained": "CLIP-ViP, tower trained",
    }  # fmt: skip
    keys, cell = ("appearance", "time", "pair"), " {:.1f} ± {:.1f} |"
    without = [values(f"BT-Adapter without {loss}", key)[0] for key in keys for loss in ("MBTA", "MBCA", "both")]
    minutes = (study["clip"]["seconds"] + sum(run["cpu_seconds"] for run in study["runs"])) / 60
    recipe, shipped = study["plan"]["recipe"], ROOT / "pyvidx/models/motion.safetensors"
    clips = 2 * study["plan"]["scenes"]  # of an epoch: a scene is played backwards too
    return [
        *(claim(f"| {text} | {{:.1f}} | {{:.1f}} | {{:.1f}} |", *(values(name, k)[0] for k in keys))
          for name, text in plain.items()),
        *(claim(f"| {text} |{3 * cell}", *(x for k in keys for x in values(name, k))) for name, text in spread.items()),
        claim("without MBTA / MBCA / both |" + 3 * " {:.1f} / {:.1f} / {:.1f} |", *without),
        claim("with the same {:,.0f} steps of {} clips",
              recipe["epochs"] * clips / recipe["batch"], recipe["batch"]),
        claim("takes {:.0f} minutes of one core", minutes),
        claim("`pyvidx.TextVideo.default()`, {:.0f} MB", shipped.stat().st_size / 1e6),
    ]  # fmt: skip


OPS = {  # of docs/ops.md: the row's name, its result file, its case
    "`token_gather` T=64, 30 % kept": (ZEN4, dict(op="token_gather", T=64)),
    "`gated_fusion` T=64": (ZEN4, dict(op="gated_fusion gate", T=64)),
    "`gated_fusion` + LayerNorm T=64": (ZEN4, dict(op="gated_fusion gate + norm", T=64)),
    "`temporal_attention` T=8": (ZEN4, dict(op="temporal_attention", T=8)),
    "`temporal_attention` T=64 (bound by arithmetic)": (ZEN4, dict(op="temporal_attention", T=64)),
    "`residual_norm` B=4, T=8": (BRANCH, dict(op="residual_norm", N=257)),
    "its backward, B=4, T=8": (BRANCH, dict(op="residual_norm_backward", N=257)),
    "`quick_gelu` T=8": (BRANCH, {"op": "quick_gelu", "C": 4096, "with": None}),
    "its backward, T=8": (BRANCH, {"op": "quick_gelu_backward", "C": 4096, "with": None}),
    "`memory_merge_` M=20": (ZEN4, dict(op="memory_merge_", M=20, attached=0)),
    "`memory_merge_` M=20 with 12 K/V caches": (ZEN4, dict(op="memory_merge_", M=20, attached=12)),
    "`memory_scan_` M=20, 16 frames, vs 16 `memory_merge_`": (MEMORY, dict(op="memory_scan_", M=20)),
    "`memory_replay_` the same: slower, but one list serves all 16": (MEMORY, dict(op="memory_replay_", M=20)),
    "`bank_attention` M=20, 16 frames (bound by arithmetic)": (MEMORY, dict(op="bank_attention", path="table", M=20)),
    "its backward, 16 frames": (MEMORY, dict(op="bank_attention_backward", path="table", M=20)),
}


def ops() -> list[Claim]:
    claims = []
    for name, (file, fields) in OPS.items():
        text, values = f"| {name} |", []
        for dtype in ("float32", "bfloat16"):
            if not any(c["dtype"] == dtype and c["op"] == fields["op"] for c in result(file)["cases"]):
                text += " |"
                continue
            c = case(file, dtype=dtype, **fields)
            values += [c["ms"], c["floor_share"], c["vs_eager"]]
            digits = {"ms": ".0f" if c["ms"] > 20 else ".1f", "x": ".0f" if c["vs_eager"] > 10 else ".1f"}
            digits["x"] = ".2f" if c["vs_eager"] < 1 else digits["x"]
            text += f" {{:{digits['ms']}}}, {{:.2f}}, {{:{digits['x']}}}x,"
            if c["vs_compile"]:
                values.append(c["vs_compile"])
            text += " {:.1f}x |" if c["vs_compile"] else " - |"
        claims.append(claim(text, *values))
    shares = {
        dtype: [c["floor_share"] for c in result("cpu-branch-2026-11-26")["cases"]
                if c["dtype"] == dtype and c["threads"] == 1] for dtype in ("float32", "bfloat16")
    }  # fmt: skip
    claims.append(claim("at T = 8 reach {:.2f} to {:.2f} in float32 and {:.2f} to {:.2f} in bfloat16",
                        *(f(shares[d]) for d in shares for f in (min, max))))  # fmt: skip
    return claims


def performance() -> list[Claim]:
    names = {
        "| OpenVINO": "openvino",
        "| torch.compile of the public code": ("transformers, torch.compile", "official, torch.compile"),
        "| ONNX Runtime": "onnxruntime", "| transformers, or the official BT-Adapter": ("transformers", "official"),
        "in 8 bits: pyvidx": "pyvidx, int8", "in 8 bits: ONNX Runtime": "onnxruntime, int8",
        "in 8 bits: OpenVINO, calibrated": "openvino, int8",
    }  # fmt: skip
    claims = []
    for text, name in names.items():
        of = dict(zip(("frames", "bt_adapter"), (name, name) if isinstance(name, str) else name))
        values = [tower(kind, of[kind], threads) for kind in of for threads in (1, 2)]
        claims.append(claim(f"{text} | {{:.2f}}, {{:.2f}} | {{:.2f}}, {{:.2f}} |", *values))
    large, base = encoder("clip-l-14"), encoder("clip-b-16")
    since = {(row[0], row[1]): row[4] for row in result("towers-2026-11-28")["since then"]["rows"]}
    files = [r for r in result("files-to-embeddings-2026-11-28")["results"]]
    gains = {name: sorted(r["cpu_gain"] for r in files if r["name"] == name) for name in ("pyvidx", "pyvidx, int8")}
    frames = [row for row in result("preprocess-2026-11-28")["rows"] if row["threads"] == 1]
    least = [row["cpu_least_ms"]["pyvidx"] for row in frames]
    less = [row["cpu_ratio"]["torchvision"] for row in frames]
    push, forward = launches()
    clips = [row["clip"]["ratio"] for row in result("cpu-malmm-clip-2026-11-25")["rows"]]
    runs = {run["path"]: run["shares"] for run in result(MALMM)["profiles"]["runs"]}
    long = [row["resident_mib"] for row in result("long-run-2026-11-24")["long_run"][0]["rows"]]
    return claims + [
        claim("end to end it gains {:.1f}x on Zen 5", large["vs_eager"]),
        claim("{:.1f} s for {:.1f} s, {:.0f} GFLOP/s; B/16 {:.1f}x against torch.compile", large["ms"] / 1e3,
              large["eager_ms"] / 1e3, large["gflops"], base["vs_compile"]),
        claim("takes {:.2f} and {:.2f} of its time in 8 bits, and {:.2f} and {:.2f} in float32",
              *(since[precision, threads] for precision in ("int8", "float32") for threads in (1, 2))),
        claim("takes {:.1f} to {:.1f} times as much CPU, and {:.1f} to {:.1f} times as much as pyvidx in 8 bits",
              *gains["pyvidx"], *gains["pyvidx, int8"]),
        claim("takes {:.1f} to {:.1f} ms of one thread, {:.1f} to {:.1f} times less than", min(least), max(least),
              min(less), max(less)),
        *(claim(f"\n| {M} |" + 4 * " {:.0f} ms, {:.1f}x |", *malmm(M, "stream"), *malmm(M, "clip"))
          for M in (10, 20, 40)),
        claim("matrix products take {:.0f} % and attention over the banks {:.0f} %",
              100 * (runs["clip"]["aten::addmm"] + runs["clip"]["aten::mm"]),
              100 * runs["clip"]["pyvidx::bank_attention"]),
        claim("of a stream's at M = 10, {:.0f} % and {:.0f} %",
              100 * runs["stream"]["aten::addmm"], 100 * runs["stream"]["pyvidx::bank_attention"]),
        claim("in a test: {} for BT-Adapter L/14", forward),
        claim("folded), {} for a frame pushed", push),
        claim("from empty banks, there: {:.1f}x, {:.1f}x, {:.1f}x", *clips),
        claim("Over {:,} pushed frames the process stayed at {:,.0f} to {:,.0f} MiB",
              result("long-run-2026-11-24")["long_run"][0]["rows"][-1]["frames"], min(long), max(long)),
    ]  # fmt: skip


def limits() -> list[Claim]:
    video, corpus = result("../../tests/fuzz/results/video-2026-11-28"), result("corpus-20000-2026-11-28")
    damaged, rows = video["ffmpeg finds damaged"], corpus["compared"]
    push, forward = launches()
    return [
        claim("OpenVINO takes {:.2f} of its time", tower("bt_adapter", "openvino", 2)),
        claim("it gains {:.2f}x with one thread and {:.2f}x with two",
              *(tower("bt_adapter", "official, torch.compile", threads) for threads in (1, 2))),
        claim("calibrated activations: {:.2f} of the float32 time, OpenVINO {:.2f}",
              tower("bt_adapter", "pyvidx, int8", 1), tower("bt_adapter", "openvino, int8", 1)),
        claim("step by step: {:.2f}x at M = 20", case(MEMORY, op="memory_replay_", M=20, dtype="float32")["vs_eager"]),
        claim("at M = 10 gains {:.1f}x on a Zen 4, a clip at M = 40 {:.1f}x",
              malmm(10, "stream")[1], malmm(40, "clip")[1]),
        claim("memory launches {} kernels on a GPU, BT-Adapter L/14 {}:", push, forward),
        claim("{:,} of {:,} fail or are called damaged", damaged - video["bad"]["damage not told"], damaged),
        claim("Of the {:,} clips", corpus["about"]["videos"]),
        claim("{:,} of {:,} rows are equal", rows["equal to the bit"], rows["rows"] - rows["errors"]),
    ]  # fmt: skip


def launches() -> tuple[int, int]:
    """Of a frame pushed into MA-LMM's memories and of BT-Adapter L/14: a test counts and holds them."""
    text = (ROOT / "tests/launches.py").read_text()
    return tuple(int(re.search(f, text)[1]) for f in (r'"float32", 12, (\d+)', r"held\(mode, (\d+)\)"))


def promises() -> list[Claim]:
    video, weights, ops, kills = (result(f"../../tests/fuzz/results/{n}-2026-11-28")
                                  for n in ("video", "weights", "ops", "kills"))  # fmt: skip
    return [
        claim("{:,} damaged videos, {:,} damaged files of weights, {:,} mutated calls of ops, and {} kills",
              video["files"], weights["count"], ops["calls"], kills["kills"]),
    ]  # fmt: skip


def training() -> list[Claim]:
    rows = [(file, cpu, threads, B, K) for file, cpu, threads, B, K in (
        (XEON, "Xeon", 1, 1, 77), (XEON, "Xeon", 1, 1, 256), (XEON, "Xeon", 1, 4, 77), (XEON, "Xeon", 2, 4, 77),
        (XEON, "Xeon", 2, 16, 77), (ZEN5, "Zen 5", 1, 1, 77), (ZEN5, "Zen 5", 1, 1, 256), (ZEN5, "Zen 5", 1, 4, 77),
        (ZEN5, "Zen 5", 2, 4, 77),
    )]  # fmt: skip
    claims, steps = [], []
    for file, cpu, threads, B, K in rows:
        c = case(file, op="pretraining", threads=threads, B=B, K=K)
        steps.append(c)
        seconds = "{:.1f}" if c["ms"] > 1e4 else "{:.2f}"
        theirs = "{:.1f}" if c["eager_ms"] > 1e4 else "{:.2f}"
        claims.append(claim(
            f"| {cpu}, B = {B}, {'whole' if K == 256 else '70 % masked'} | {threads} | {seconds}, {theirs} s | "
            "{:.0f}, {:.0f} ms | {:.2f} | {:.0f} ms, {:.2f} |",
            c["ms"] / 1e3, c["eager_ms"] / 1e3, c["rest_ms"], c["eager_rest_ms"], c["rest_floor_share"], c["ops_ms"],
            c["ops_floor_share"],
        ))  # fmt: skip
    copies = [case(file, op="pretraining", threads=1, B=1, K=77)["rest_copy_gbps"] for file in (ZEN5, XEON)]
    plan = "\n".join(result("plan-pretrain-2026-11-29")["output"])
    least, most = re.findall(r"\((\d+)% of the peak\)", plan)
    few, many = (case(XEON, op="pretraining", threads=2, B=B, K=77)["rest_ms"] for B in (4, 16))
    products = [c["products_ms"] / c["ms"] for c in steps]
    faults = [n for many in result(XEON)["page_faults"]["glibc"].values() for n in many]
    return claims + [
        claim("Products are {:.0f} to {:.0f} % of a step", 100 * min(products), 100 * max(products)),
        claim("at an *assumed* {} % of the card's peak", int(re.search(r"(\d+)% of the products' peak", plan)[1])),
        claim("2.5 million videos take {:.2f} hours", float(re.search(r"PREDICTED: ([\d.]+) hours", plan)[1])),
        claim("ask for {} to {} % of the peak", int(least), int(most)),
        claim("the calls between products take some {:.0f} ms", few - (many - few) / (16 - 4) * 4),
        claim("Zen 5 copies {:.0f} GB/s a thread and the Xeon {:.0f}, which makes its floor {:.1f} times as low",
              *copies, copies[0] / copies[1]),
        claim("{:,} to {:,} in a step of B = 4", round(min(faults), -3), round(max(faults), -3)),
    ]  # fmt: skip


def contributing() -> list[Claim]:
    return [claim("{:.1f} % of the lines of `pyvidx/` ran", result("coverage-2026-11-29")["total"])]


CLAIMS = {
    "README.md": readme, "docs/contributing.md": contributing, "docs/encode.md": encode,
    "docs/hosts.md": hosts, "docs/install.md": install,
    "docs/limits.md": limits, "docs/motion.md": motion, "docs/ops.md": ops, "docs/performance.md": performance,
    "docs/promises.md": promises,
    "docs/training.md": training,
}  # fmt: skip

# Texts whose numbers are no measurements: what was chosen, what a paper says, how large a thing is.
SETTINGS = {
    "README.md": ["16 slots", "L/14, 8 frames"],
    "docs/chat.md": ["257 tokens at L/14"],
    "docs/contributing.md": [
        "at most 500 lines", "to 1e-5", "driver | 570 to 580; 580 is", "12.4 to 12.9", "at most 13 for", "14 for 12.8",
        "3.10 to 3.14", "2.10.0 of PyPI", "2.11 to 2.14", "for 16 cores", "exits with 2", "size 0", "Sizes are 1",
        "Under 85 %",
    ],
    "docs/encode.md": ["CLIP-B/16, 8 frames", "44 rows"],
    "docs/evaluation.md": ["17 annotation formats"],
    "docs/hosts.md": [
        "32 steps at a time", "64 steps into 16 slots", "257 tokens of 4096", "at 384, 196 tokens of 3584",
        "at 448, 196 tokens of 4096", "32 rows of the Q-Former",
    ],
    "docs/install.md": ["for up to 1,024 of them"],
    "docs/limits.md": ["more than 128 frames"],
    "docs/motion.md": ["R@1", "70 % of 16 patches", "4-layer", "40 % masked", "70 % masked"],
    "docs/ops.md": ["1.702 x", "above 1:", "30 % kept", "12 K/V caches", "16 frames", "16 `memory_merge_`", "all 16"],
    "docs/performance.md": [
        "CLIP-B/16, 8 frames", "8 frames of 360p", "medians of 5 rounds", "\n| 10 |", "\n| 20 |", "\n| 40 |",
        "of 100 frames", "128-bit vectors", "256-bit vectors", "512-bit vectors",
    ],
    "docs/serving.md": ["2.26 and newer"],
    "docs/training.md": [
        "8 videos at a time", "70 % of the branch", "2.5 million", "on 8 V100", "The 3 hours of", "70 % masked",
        "masked | 1 |", "masked | 2 |", "whole | 1 |", "every 4 KiB",
    ],
}  # fmt: skip
