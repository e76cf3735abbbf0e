"""The lines of the study's tables."""

from bench.motion.temporal import Row

ALL = (1.0, 0.1, 0.1)  # weights of VTC, MBCA, MBTA

# Table 6 of the paper: what leads from single frames to BT-Adapter.
STEPS = (
    Row("frame mean", "mean"),
    Row("last frame", "last"),
    Row("+ 4-layer separate", "separate", {"layers": 4}),
    Row("+ branch", "branch", {"interact": False}),
    Row("+ interaction", "branch"),
    Row("BT-Adapter", pretraining={"weights": ALL}),
)
# Table 7: its masking and losses.
LOSSES = (
    Row("BT-Adapter without MBTA", pretraining={"weights": (1.0, 0.1, 0.0)}),
    Row("BT-Adapter without MBCA", pretraining={"weights": (1.0, 0.0, 0.1)}),
    Row("BT-Adapter without both", pretraining={"weights": (1.0, 0.0, 0.0)}),
    Row("BT-Adapter, no mask", pretraining={"weights": ALL, "mask_rate": 0.0}),
    Row("BT-Adapter, mask 40 %", pretraining={"weights": ALL, "mask_rate": 0.4}),
    Row("BT-Adapter, official mask order", pretraining={"weights": ALL, "mask_order": "official"}),
)
FRAMES = (
    Row("frame mean, 4 frames", "mean", frames=4),
    Row("frame mean, 16 frames", "mean", frames=16),
    Row("BT-Adapter, 4 frames", pretraining={"weights": ALL}, frames=4),
    Row("BT-Adapter, 16 frames", pretraining={"weights": ALL}, frames=16),
)
OTHERS = (
    Row("STAN", "stan"),
    Row("separate, all layers", "separate"),
    Row("ST-Adapter", "st_adapter", {"width": 32}),
    Row("joint space-time, tower trained", "joint", tower=True),
    Row("CLIP-ViP, tower trained", "clip_vip", tower=True),
)
TABLES = {
    "From frames to BT-Adapter": STEPS,
    "Masks and losses": LOSSES,
    "Number of frames": FRAMES,
    "Other modules": OTHERS,
}
ROWS = tuple(row for rows in TABLES.values() for row in rows)
