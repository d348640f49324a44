"""Makes HyperAdaLoRA known to PEFT, by three entries in `peft.mapping`'s public tables.

`peft.utils.register_peft_method` writes the same three, but only for the members of PEFT's own
enum. Nothing of PEFT is replaced or patched.
"""

import peft
from packaging.version import Version
from peft import mapping

from .config import HyperAdaLoraConfig, HyperAdaLoraType
from .model import HyperAdaLoraModel

OLDEST, NEWEST = "0.21.0", "0.22"
"""The supported versions of PEFT: OLDEST <= version < NEWEST."""


def register(version: str = peft.__version__) -> None:
    """Register the method. Doing so twice is the same as once.

    Raises:
        ImportError: this version of PEFT is not supported.
    """
    if not Version(OLDEST) <= Version(version) < Version(NEWEST):
        raise ImportError(
            f"hal_peft supports peft >= {OLDEST}, < {NEWEST}, found {version}: its hooks into PEFT "
            "were not tested with another (pip install 'peft>=0.21,<0.22')"
        )
    method = HyperAdaLoraType.HYPERADALORA
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method] = HyperAdaLoraConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[method] = HyperAdaLoraModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[method] = HyperAdaLoraModel.prefix  # type: ignore[index]
