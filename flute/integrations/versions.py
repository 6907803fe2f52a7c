"""Which transformers loads our checkpoints. Older ones import this package too, for HIGGS, and must not fail then."""

from __future__ import annotations

from packaging.version import Version

from .. import __version__
from ..errors import IntegrationError

OLDEST = "5.8"  # the first that tells a quantizer which files it is about to load, so that they can be checked


def check_transformers() -> None:
    """Refuse a version whose loader does not do what ours needs.

    Raises:
        IntegrationError: naming the version that is here and those that are supported.
    """
    import transformers  # now: what is imported while transformers is still loading is another module than later

    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise IntegrationError(
            f"this is transformers {transformers.__version__}; flute {__version__} loads models with transformers "
            f"{OLDEST} or later; run: pip install -U transformers"
        )
