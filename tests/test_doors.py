"""What is handed to a public door and is no tensor, or out of range, is refused in one line."""

import numpy as np
import pytest
import torch

from pyvidx import memory, temporal
from pyvidx.backbones import TextConfig, TextTower, ViT
from pyvidx.models import MALMM, BTAdapter, VideoEncoder
from pyvidx.models.umt import UMTConfig, UMTStudent
from tests.test_models import CONFIG, VISION

ARRAY = np.zeros((2, 4, 3, 12, 12), dtype=np.float32)
MASK = np.ones((2, 4), dtype=bool)


def doors():
    model, encoder = BTAdapter(CONFIG), VideoEncoder(ViT(VISION), temporal.create("stan", VISION))
    malmm, text = MALMM.default(), TextTower(TextConfig(9, 5, 8, 2, 1, 8, 4))
    student = UMTStudent(UMTConfig(12, 4, 8, 2, 1, 8))
    policy = memory.create("fifo", capacity=2)
    bank, frame = policy.new(2, 3, 4), torch.zeros(2, 3, 4)
    pixels = torch.zeros(ARRAY.shape)
    return {
        "BTAdapter": lambda: model(ARRAY),
        "BTAdapter.encode_features": lambda: model.from_features(ARRAY[:, :, 0]),
        "BTAdapter.encode_layers": lambda: model.from_layers([ARRAY] * 3),
        "BTAdapter frame_mask": lambda: model(pixels, frame_mask=MASK),
        "BTAdapter mask": lambda: model(pixels, mask=MASK, outputs=["pooled"]),
        "VideoEncoder": lambda: encoder(ARRAY),
        "VideoEncoder frame_mask": lambda: encoder(pixels, frame_mask=MASK),
        "VideoEncoder.layers": lambda: encoder.layers(ARRAY),
        "VideoEncoder.from_layers": lambda: encoder.from_layers([ARRAY] * 4),
        "ViT": lambda: encoder.tower(ARRAY),
        "TextTower": lambda: text(ARRAY),
        "UMTStudent": lambda: student(ARRAY),
        "MALMM": lambda: malmm(ARRAY),
        "MALMM.features": lambda: malmm.features(ARRAY),
        "MALMM.encode": lambda: malmm.encode(ARRAY),
        "MALMM.push": lambda: malmm.push(malmm.start(malmm.prompt()), ARRAY),
        "MALMM.prompt": lambda: malmm.prompt(np.zeros((1, 2), dtype=np.int64)),
        "append": lambda: policy.append(bank, ARRAY),
        "append seconds": lambda: policy.push(bank, frame, np.zeros(2)),
        "append active": lambda: policy.push(bank, frame, active=MASK[:, 0]),
        "extend": lambda: policy.extend(bank, ARRAY),
        "reset": lambda: bank.reset(MASK[:, 0]),
    }


@pytest.mark.parametrize("name", doors())
def test_arrays_are_refused(name):
    with pytest.raises(ValueError, match="must be a tensor, got numpy.ndarray; torch.as_tensor"):
        doors()[name]()


@pytest.mark.parametrize("ids", [[[1, 10**6]], [[-1, 2]]])
def test_ids_are_in_the_vocabulary(ids):
    model, text = MALMM.default(), TextTower(TextConfig(9, 5, 8, 2, 1, 8, 4))
    with pytest.raises(ValueError, match=r"text_ids must be in \[0, \d+\)"):
        model.prompt(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"ids must be in \[0, 9\)"):
        text(torch.tensor(ids))
    assert text(torch.tensor([[8, 0]])).shape == (1, 4)


@pytest.mark.parametrize("index", [[0, 2], [-1], torch.tensor([5]), np.array([2])])
def test_selected_videos_are_in_the_bank(index):
    bank = memory.create("fifo", capacity=2).new(2, 3, 4)
    with pytest.raises(ValueError, match=r"index must be in \[0, 2\)"):
        bank.select(index)
    assert len(bank.select(np.array([1, 0, 1]))) == 3 and len(bank.select(torch.zeros(0, dtype=torch.int64))) == 0
