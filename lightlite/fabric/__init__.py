"""Your own loop, on the Trainer's plugins and launchers."""

from lightlite.fabric.fabric import Fabric
from lightlite.fabric.wrappers import is_wrapped
from lightlite.utilities.seed import seed_everything

__all__ = ["Fabric", "is_wrapped", "seed_everything"]
