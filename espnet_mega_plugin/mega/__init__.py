"""The MEGA prediction network. Imports torch only: it runs where ESPnet is not installed."""

from espnet_mega_plugin.mega.network import MegaNetwork

__all__ = ["MegaNetwork"]
