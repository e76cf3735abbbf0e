from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.encoding import Encoding

__all__ = ["BTAdapter", "BTAdapterConfig", "Encoding"]
