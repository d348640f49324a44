"""Objects that torch and transformers keep no list of."""

import gc
from typing import Any


def instances(kind: type) -> list[Any]:
    """Every live object of a class in Python or of its subclasses.

    They are found among what refers to the class, as each of its objects does. (A loop over all
    objects takes twice the time, and would have to mind proxies, which answer for other classes.)
    """
    kinds: list[type] = [kind]
    for known in kinds:
        kinds += known.__subclasses__()
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds]
