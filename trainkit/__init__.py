"""trainkit: the detectron2-style trainer class hierarchy as a library of its own.

Importing this package is instant: it pulls in neither torch nor any of its own parts. Start reading
at `trainkit.engine`.
"""

__version__ = "0.1.0"
