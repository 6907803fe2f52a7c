"""``python -m flute.flatquant``: see `flute.commands.flat_published`."""

import sys

from flute.commands.flat_published import main

if __name__ == "__main__":
    sys.exit(main())
