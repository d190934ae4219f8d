"""``python -m maestro_fast``: the same as the ``maestro-fast`` command."""

import sys

from maestro_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
