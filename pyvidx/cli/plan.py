"""pyvidx plan pretrain --cards 8 --card v100; pyvidx plan encode is in plan_encode.py"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pyvidx.cli import arguments, plan_encode
from pyvidx.models.config import BTAdapterConfig
from pyvidx.train import cost

# Of the paper's slides; they say 2 M pairs, the official data set's name 2.5 M.
HEADLINE = {"cards": 8, "card": "v100", "hours": 3.0, "videos": (2e6, 2.5e6)}
SHARES = cost.Shares()


def parser() -> argparse.ArgumentParser:
    whole = arguments.Parser(prog="pyvidx plan", description="What a job takes, before it is started.",
                             example="pyvidx plan encode some_videos/ --videos 1e6")  # fmt: skip
    jobs = whole.add_subparsers(dest="what", required=True)
    plan_encode.add_to(jobs)
    p = jobs.add_parser(
        "pretrain",
        help="one epoch of BT-Adapter's pretraining",
        description="Predict the hours of one epoch of BT-Adapter's pretraining. The work is counted by running the "
        "real step on tensors without data; cards are data-sheet numbers; the shares of them that are reached are "
        "assumptions, no GPU having been measured: --products-share, --memory-share, --link-share.",
        example="pyvidx plan pretrain --cards 8 --card v100 --decode-seconds 0.1",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--cards", type=arguments.count, default=8, help="how many")
    p.add_argument("--card", choices=list(cost.cards()["cards"]), default="v100", help="of which kind")
    p.add_argument("--videos", type=arguments.amount, default=2.5e6, help="video-text pairs of the epoch")
    p.add_argument("--frames", type=arguments.frames, default=8, help="of a video")
    p.add_argument("--batch", type=arguments.count, default=52, help="videos of one step on one card")
    p.add_argument("--size", choices=BTAdapterConfig.names(), default="clip-l-14", help="of the model")
    p.add_argument("--mask-rate", type=float, default=0.7, help="part of the patches the branch does not see")
    p.add_argument("--no-mask", dest="mask_rate", action="store_const", const=0.0, help="the same as --mask-rate 0")
    p.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True,
                   help="run the branch forward again in the backward pass, as the official recipe does")  # fmt: skip
    p.add_argument("--cached-features", action="store_true", help="read the frozen towers' outputs from storage")
    p.add_argument("--products-share", type=float, default=SHARES.products,
                   help="of the peak of matrix products (assumed)")  # fmt: skip
    p.add_argument("--memory-share", type=float, default=SHARES.memory,
                   help="of the memory bandwidth, by everything else (assumed)")  # fmt: skip
    p.add_argument("--link-share", type=float, default=SHARES.link, help="of NVLink (assumed)")
    decode = p.add_mutually_exclusive_group()
    decode.add_argument(
        "--decode-seconds", type=arguments.seconds, help="CPU seconds to decode the frames of one video"
    )
    decode.add_argument("--decode-video", type=arguments.existing, help="measure that here, on this file")
    p.add_argument(
        "--decode-cores",
        type=arguments.count,
        default=os.cpu_count(),
        help="CPU cores that decode, all machines together",
    )
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    if options.what == "encode":
        return plan_encode.run(p, options)
    if options.cached_features and (options.decode_seconds is not None or options.decode_video is not None):
        p.error("--cached-features decodes nothing: leave --decode-seconds and --decode-video out")
    try:
        shares = cost.Shares(options.products_share, options.memory_share, options.link_share)
        names = ("size", "frames", "batch", "mask_rate", "checkpoint")
        plan = cost.Plan(**{n: getattr(options, n) for n in names}, cached=options.cached_features)
        decode = options.decode_seconds
        if options.decode_video is not None:
            decode = decode_seconds(options.decode_video, options.frames)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        p.error(str(error))
    print(report(options, plan, shares, decode))
    return 0


def report(options: argparse.Namespace, plan: cost.Plan, shares: cost.Shares, decode: float | None) -> str:
    card, found = cost.cards()["cards"][options.card], cost.parts(plan)
    steps = math.ceil(options.videos / (options.cards * plan.batch))
    towers = "towers' outputs read" if plan.cached else "frozen towers run"
    lines = [
        f"{plan.size}, {plan.frames} frames, mask {plan.mask_rate:g}, {plan.batch} videos a step on each of "
        f"{options.cards} x {card['name']}; {towers}; {steps} steps for {options.videos:g} videos",
        f"{'per video':20} {'GFLOP':>8} {'MB (products)':>13} {'MB (rest)':>10} {'hours, products':>15} {'rest':>6}",
    ]
    for name, c in found.items():
        products, rest = (s * steps / 3600 for s in cost.seconds(c, card, shares))
        per_video = (c.flops / 1e9, c.product_bytes / 1e6, c.other_bytes / 1e6)
        flops, moved, other = (x / plan.batch for x in per_video)
        lines.append(f"{name:20} {flops:8.1f} {moved:13.1f} {other:10.1f} {products:15.2f} {rest:6.2f}")
    hours = epoch_hours(found, plan, options, shares)
    less, more = (epoch_hours(found, plan, options, replace(shares, products=s)) for s in (0.3, 0.6))
    lines += [
        f"PREDICTED: {hours:.2f} hours, nothing overlapping, gradients sent between cards included "
        f"({less:.2f} at 30 % of the products' peak, {more:.2f} at 60 %)",
        f"  card: {card['tflops']} TFLOP/s, {card['gbps']} GB/s ({cost.cards()['source']})",
        f"  assumed, not measured: {shares.products:.0%} of the products' peak, {shares.memory:.0%} of the memory "
        f"bandwidth, {shares.link:.0%} of the link",
    ]
    if plan.cached:
        stored = plan.cached_bytes
        lines.append(
            f"stored outputs: {stored / 1e6:.1f} MB a video, {stored * options.videos / 1e12:.1f} TB; to be read at "
            f"{stored * options.videos / hours / 3.6e12:.1f} GB/s"
        )
    else:
        lines.append(decode_line(options, decode, hours))
    return "\n".join([*lines, headline(plan, found)])


def epoch_hours(
    found: dict[str, cost.Cost], plan: cost.Plan, options: argparse.Namespace, shares: cost.Shares
) -> float:
    card = cost.cards()["cards"][options.card]
    step = sum(sum(cost.seconds(c, card, shares)) for c in found.values())
    step += cost.reduce_seconds(cost.trained(plan.step()), options.cards, card, shares)
    return step * math.ceil(options.videos / (options.cards * plan.batch)) / 3600


def decode_line(options: argparse.Namespace, decode: float | None, hours: float) -> str:
    if decode is None:
        return "decoding: not counted; give --decode-seconds or --decode-video"
    core_hours = decode * options.videos / 3600
    return (
        f"decoding, beside it: {decode * 1e3:.0f} ms of one core a video, {core_hours:.0f} core hours: "
        f"{core_hours / options.decode_cores:.1f} hours on {options.decode_cores} cores, "
        f"{core_hours / hours:.0f} cores to keep up"
    )


def headline(plan: cost.Plan, found: dict[str, cost.Cost]) -> str:
    """What the slides' hours ask of their cards for this work."""
    card = cost.cards()["cards"][HEADLINE["card"]]
    flops = sum(c.flops for c in found.values()) / plan.batch
    peak = card["tflops"]
    reached = [flops * n / (HEADLINE["hours"] * 3600 * HEADLINE["cards"]) / 1e12 for n in HEADLINE["videos"]]
    return (
        f"slides: {HEADLINE['hours']:g} hours on {HEADLINE['cards']} x {card['name']}; for this work and "
        f"{' or '.join(f'{n / 1e6:g} M' for n in HEADLINE['videos'])} videos that asks "
        f"{' or '.join(f'{r:.0f} TFLOP/s ({r / peak:.0%} of the peak)' for r in reached)} of every card"
    )


def decode_seconds(path: Path, frames: int) -> float:
    """CPU seconds to read that many frames, one per segment: the median of 5."""
    from pyvidx.video import read

    times = []
    for _ in range(5):
        start = time.process_time()
        read(path, frames=frames)
        times.append(time.process_time() - start)
    return statistics.median(times)
