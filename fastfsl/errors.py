"""The errors fastfsl raises on purpose.

Every message states what was expected, what was got and what to do. The command line prints it and exits with code 2.
"""


class FastFSLError(Exception):
    """Base class of every error that fastfsl raises on purpose."""


class DataError(FastFSLError, ValueError):
    """The user's data cannot be used: missing, unreadable, mislabelled or too few."""


class ShapeError(FastFSLError, ValueError):
    """An array or tensor has the wrong shape or dtype."""


class DTypeError(ShapeError, TypeError):
    """An array holds something that is no number."""


class BundleError(FastFSLError):
    """A bundle, plan or run folder is incomplete, altered or of an unknown format."""


class DeviceError(FastFSLError, RuntimeError):
    """The device asked for cannot be used on this machine."""


class ConfigError(FastFSLError, ValueError):
    """An option, model name, checkpoint, output path or missing optional package stands in the way."""


class OverloadError(FastFSLError, RuntimeError):
    """More is asked of a running classifier than it keeps up with; nothing was accepted."""


class ClosedError(FastFSLError, RuntimeError):
    """A classifier or batcher is used after it was closed."""
