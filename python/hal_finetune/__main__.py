"""``python -m hal_finetune`` is ``hal-finetune``."""

import sys

from .main import main

sys.exit(main())
