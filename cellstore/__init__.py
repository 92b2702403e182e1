"""The experiment store of image-based drug screens."""

from importlib.metadata import version

__version__ = version("cellstore")
