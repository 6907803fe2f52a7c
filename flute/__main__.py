"""``python -m flute`` is ``flute``."""

from flute.cli import main

main()
