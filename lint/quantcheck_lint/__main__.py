from __future__ import annotations

import sys

from quantcheck_lint.cli import main

sys.exit(main())
