from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.encoding import Encoding
from pyvidx.models.malmm import MALMM
from pyvidx.models.malmm_config import MALMMConfig

__all__ = ["BTAdapter", "BTAdapterConfig", "Encoding", "MALMM", "MALMMConfig"]
