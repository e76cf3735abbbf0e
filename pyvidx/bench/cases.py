"""The bench cases that are predicted: a function of bench/ and its arguments, at the sizes of the papers."""

from dataclasses import dataclass, field

HALF, FLOAT = "float16", "float32"


@dataclass(frozen=True)
class Asked:
    """module, function: of bench/. arguments: as the function names them; a dtype by its name. constants: of the
    module, changed for other sizes than its own."""

    module: str
    function: str
    arguments: dict
    constants: dict = field(default_factory=dict)


def _asked(module: str, function: str, *many: dict) -> list[Asked]:
    return [Asked(f"bench_{module}", function, arguments) for arguments in many]


def _sizes(*sizes: tuple[int, int], dtypes=(HALF,), **more) -> list[dict]:
    return [{"model": "l14", "B": B, "T": T, "dtype": dtype, **more} for dtype in dtypes for B, T in sizes]


PAPERS = [
    *_asked("temporal_attention", "case", *_sizes((1, 8), (1, 16), (1, 64), (8, 8)),
            *_sizes((1, 8), (1, 64), dtypes=[FLOAT])),
    *_asked("temporal_attention", "backward_case", *_sizes((8, 8), (1, 64))),
    *_asked("gated_fusion", "case", *_sizes((1, 8), (8, 8), form="gate", norm=True),
            *_sizes((1, 8), dtypes=[FLOAT, HALF], form="gate", norm=False), *_sizes((1, 16), form="first", norm=True)),
    *_asked("gated_fusion", "backward_case", *_sizes((4, 8))),
    *_asked("residual_norm", "case", {"model": "l14", "form": "space", "dtype": HALF},
            {"model": "l14", "form": "plain", "dtype": HALF}),
    *_asked("residual_norm", "backward_case", {"model": "l14", "form": "space", "dtype": HALF}),
    *_asked("quick_gelu", "case", {"model": "l14", "dtype": HALF}),
    *_asked("quick_gelu", "backward_case", {"model": "l14", "dtype": HALF}),
    *_asked("token_gather", "case", *_sizes((1, 8), (8, 8))),
    *_asked("st_pool", "case", *_sizes((1, 8), (1, 100))),
    *_asked("resize_normalize", "case", *({"name": name, "T": 8, "dtype": HALF} for name in ("360p", "1080p"))),
    *_asked("temporal_scale", "case", *_sizes((8, 8))),
    *_asked("temporal_scale", "backward_case", *_sizes((8, 8))),
    *_asked("memory_merge", "step_case", *({"B": 1, "M": 20, "layers": 6, "dtype": dtype} for dtype in (FLOAT, HALF)),
            {"B": 1, "M": 20, "layers": 0, "dtype": FLOAT}),
    *_asked("memory_merge", "merge_case", {"B": 1, "T": 21, "dtype": HALF}),
    *_asked("memory_scan", "scan_case", {"M": 20}),
    *_asked("memory_scan", "replay_case", {"M": 20, "dtype": HALF}),
    *_asked("bank_attention", "case", *({"path": "slots", "M": 20, "dtype": dtype} for dtype in (FLOAT, HALF)),
            {"path": "table", "M": 20, "dtype": HALF}),
    *_asked("bank_attention", "backward_case", {"path": "table", "M": 20, "dtype": HALF}),
    *_asked("bank_attention", "self_case", {"rows": 8, "N": 257, "backward": False, "dtype": HALF}),
]  # fmt: skip
