"""``python -m flute.autotune`` is ``flute tune``."""

import sys

from flute.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
