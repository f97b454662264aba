"""``python -m attention_ref``: see :mod:`attention_ref.cli`."""

import sys

from attention_ref.cli import main

if __name__ == "__main__":
    sys.exit(main())
