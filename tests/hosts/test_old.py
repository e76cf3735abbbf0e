"""A transformers that takes no encoded video is refused by name, before anything else is asked of it."""

import pytest
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")

from pyvidx import hosts  # noqa: E402
from pyvidx.hosts.language import names  # noqa: E402

USES = {
    "compress": lambda model: hosts.compress(model, {}),
    "attached": hosts.attached,
    "session": lambda model: hosts.Session(model, None),
}


@pytest.mark.parametrize("kind", names())
@pytest.mark.parametrize("use", USES)
def test_refused_by_name(use, kind, monkeypatch):
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20):
        monkeypatch.setattr(transformers, "__version__", "5.20.1")
    model = nn.Module()
    model.config = transformers.PreTrainedConfig()
    model.config.model_type = kind
    with pytest.raises(RuntimeError, match=r"from transformers 5\.20\.2 on, this is 5\.\d+\.\d: pip install -U"):
        USES[use](model)
